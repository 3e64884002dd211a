"""Memory: what a model and its training use now (``measure``), and what a run will need (``forecast``)."""

from nbpeft.memory.forecast import Forecast, forecast
from nbpeft.memory.measure import Meter, measure, weights_by_kind
from nbpeft.memory.saved import SavedTensors
from nbpeft.memory.suggest import Suggestion

__all__ = ["Forecast", "Meter", "SavedTensors", "Suggestion", "forecast", "measure", "weights_by_kind"]
