"""Forecasts of one model for any batch size, length and rank, in a millisecond, once prepared."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from nbpeft.errors import ConfigError, TargetError
from nbpeft.memory.simulate import FEW, Setting, Trained, Weights, further, largest, run_step, weights_of
from nbpeft.memory.timeline import Peak, record
from nbpeft.memory.trace import FIRST, SECOND, IrregularError, Point, Trace, write_log

_CLOSE = 5e-3
"""A trace that misses a run by more than this share is not used for it."""
_PROBE = Point(1, 211, 5)


@dataclass(frozen=True)
class Surface:
    """A setting with batch size, length and rank left open.

    Attributes:
        setting: the setting; its batch size, length and rank mean nothing.
        weights: what lies in memory at rank ``FIRST.rank``, and at rank ``SECOND.rank``.
        traces: of a few layers each, or one of the whole model.
        single: the same for batches of one sequence, where kernels do something else for these.
    """

    setting: Setting
    weights: tuple[Weights, Weights]
    traces: tuple[Trace, ...]
    single: tuple[Trace, ...] | None

    def peak(self, point: Point) -> Peak:
        """The peak of a step beyond weights and optimizer state."""
        traces = self.single if self.single is not None and point.batch_size == 1 else self.traces
        found = [trace.peaks(point) for trace in traces]
        if len(found) == 1:
            return largest(found[0])
        low, high = found
        return largest([further(low[end], high[end], self.setting.architecture.layer_count) for end in (0, -1)])

    def weights_at(self, rank: int) -> Weights:
        """What lies in memory before a step."""
        low, high = self.weights
        if low.trained == high.trained:
            return low
        trained: Trained = tuple(
            (tuple(_dimension(a, b, rank) for a, b in zip(one, two, strict=True)), item)
            for (one, item), (two, _) in zip(low.trained, high.trained, strict=True)
        )
        adapter_bytes = sum(math.prod(shape) * item for shape, item in trained)
        return dataclasses.replace(low, trained=trained, adapter_bytes=adapter_bytes)


def _dimension(low: int, high: int, rank: int) -> int:
    """A dimension at a rank: constant, or a multiple of it."""
    return low if low == high else low * rank // FIRST.rank


def at(setting: Setting, point: Point) -> Setting:
    """The setting with batch size, length and (where its adapter has one) rank replaced."""
    adapter = setting.adapter_config
    if adapter is not None and has_rank(setting):
        adapter = adapter.copy(r=point.rank)
    return setting.with_changes(
        batch_size=point.batch_size, sequence_length=point.sequence_length, adapter_config=adapter
    )


def point_of(setting: Setting) -> Point:
    """Batch size, length and rank of a setting; rank 1 where it has none."""
    rank = getattr(setting.adapter_config, "r", 1) if has_rank(setting) else 1
    return Point(setting.batch_size, setting.sequence_length, rank)


def has_rank(setting: Setting) -> bool:
    """Whether one rank holds for all of the adapter, so that it can be varied."""
    adapter = setting.adapter_config
    return isinstance(getattr(adapter, "r", None), int) and not getattr(adapter, "rank_pattern", None)


def survey(setting: Setting) -> Surface:
    """Prepares a surface: four runs of a step on fake tensors, and one that checks.

    Raises:
        IrregularError: the step is no function of such a kind.
        ConfigError: the model cannot run without data.
        TargetError: the adapter does not fit the model.
    """
    weights = (weights_of(at(setting, FIRST)), weights_of(at(setting, SECOND)))
    several = setting.architecture.layer_count > max(FEW) and weights[0].alike
    if several:
        try:
            return _surveyed(setting, weights, FEW)
        except TargetError:  # the adapter is on later layers
            pass
    return _surveyed(setting, weights, (None,))


def _surveyed(setting: Setting, weights: tuple[Weights, Weights], layers: tuple[int | None, ...]) -> Surface:
    traces = tuple(_trace(setting, count, (FIRST, SECOND)) for count in layers)
    single = None
    if not _right(setting, layers[0], traces[0]):
        first, second = (dataclasses.replace(point, batch_size=1) for point in (FIRST, SECOND))
        single = tuple(_trace(setting, count, (first, second)) for count in layers)
        if not _right(setting, layers[0], single[0]):
            raise IrregularError("the step does other things at other sizes")
    return Surface(setting, weights, traces, single)


def _trace(setting: Setting, layers: int | None, points: tuple[Point, Point]) -> Trace:
    first, second = (run_step(at(setting, point), layers, write_log) for point in points)
    return Trace(first, second, points)


def _right(setting: Setting, layers: int | None, trace: Trace) -> bool:
    """Whether a trace agrees with a run of a batch of one sequence."""
    real = largest(run_step(at(setting, _PROBE), layers, record)).total
    return abs(largest(trace.peaks(_PROBE)).total - real) <= _CLOSE * real


_surfaces: dict[str, Surface | None] = {}
_LIMIT = 64


def known_surface(setting: Setting) -> Surface | None:
    """The surface of a setting if it was prepared."""
    return _surfaces.get(_key(setting))


def surface_of(setting: Setting) -> Surface | None:
    """The surface of a setting, prepared unless it was; None where there can be none.

    Some models run at the setting's own length and not at those a surface is made of.

    Raises:
        TargetError: the adapter does not fit the model.
    """
    key = _key(setting)
    if key not in _surfaces:
        while len(_surfaces) >= _LIMIT:
            _surfaces.pop(next(iter(_surfaces)))
        try:
            _surfaces[key] = survey(setting)
        except (IrregularError, ConfigError):
            _surfaces[key] = None
    return _surfaces[key]


def _key(setting: Setting) -> str:
    return at(setting, FIRST).key(step=True)
