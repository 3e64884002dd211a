"""Memory: what a model and its training use now (``measure``), and what a run will need (``forecast``).

Files:

    allocations.py     Runs a step on fake tensors and records what it would allocate, operation by operation
    architecture.py    Builds models without weights, whole or with fewer layers, from a model, a config, a folder or a
                       hub id
    checkpointing.py   Gradient checkpointing under the names of the installed transformers (5.24 renamed its methods)
    devices.py         Total and free memory of a device, what this process uses of it, and the peak since a mark
    estimate.py        Estimates the memory of a step: weights and adapters are counted, the rest comes from a run on
                       fake tensors
    fake_quantized.py  Quantized layers without data, for models on fake or meta tensors
    forecast.py        Forecasts the memory of a training run or of inference before it runs
    formatting.py      Sizes as text
    measure.py         Memory in use now, by part of a model and its training
    optimizers.py      The size of optimizer states
    processor.py       Which half-precision dtypes this machine's CPU has matrix-product instructions for
    saved.py           Counts the tensors that autograd saves for the backward pass
    per_process.py     The memory of one of several processes: with DDP it has the whole model, with FSDP2 a shard of
                       the weights
    stages.py          Tracks the stages of a step (which layer, forward or backward) and extrapolates the peak to more
                       layers
    suggest.py         Suggests changes of a setting that lower its peak memory
"""

from nbpeft.memory.forecast import Forecast, forecast
from nbpeft.memory.measure import Meter, measure, weights_by_kind
from nbpeft.memory.saved import SavedTensors
from nbpeft.memory.suggest import Suggestion

__all__ = ["Forecast", "Meter", "SavedTensors", "Suggestion", "forecast", "measure", "weights_by_kind"]
