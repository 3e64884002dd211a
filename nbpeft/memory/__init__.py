"""Memory: what is used now and by whom (``measure``), and what a run will need (``forecast``)."""

from nbpeft.memory.measure import Meter, measure, weights_by_kind
from nbpeft.memory.saved import SavedTensors

__all__ = ["Meter", "SavedTensors", "measure", "weights_by_kind"]
