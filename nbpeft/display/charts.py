"""Curves of a run as SVG, drawn from decimated points.

``loss_chart`` returns an inline ``<svg>`` in the colours of the theme. ``loss_image`` returns the same picture as a
self-contained ``<img>``, which remains when a notebook is saved, reopened or not trusted. An image cannot use the
theme's colours, so its colours are readable on light and on dark backgrounds.

The axis of the loss is logarithmic if all values are positive and span more than two decades.
"""

from __future__ import annotations

import base64
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from nbpeft.display import numbers, palette
from nbpeft.display.crosshair import Column, ShownCurve, columns
from nbpeft.display.quoting import escape
from nbpeft.state import ENDED, Curve, TrainState

Point = tuple[float, float]

WIDTH, HEIGHT = 900, 220
"""Size of a chart in pixels; a narrower chart keeps its height."""
TOP, BOTTOM = 18, 38
"""Pixels above and below the curves."""
RIGHT = 1.0
"""Margin to the right of the curves in percent of the width."""
_SMALL_WIDTH, _SMALL_HEIGHT = 200, 40
_SPARK_WIDTH, _SPARK_HEIGHT = 84, 22
_MOST_NEIGHBOURS = 10
"""Most points on each side of a point that smoothing takes into account."""
_DECADES = 100.0
"""A larger ratio of the largest to the smallest value is drawn on a logarithmic axis."""


@dataclass(frozen=True)
class ChartStyle:
    """Colours of a chart, as CSS values."""

    text: str
    grid: str
    line: str
    evaluated: str
    font: str


THEME = ChartStyle(
    text=palette.DIM,
    grid=palette.BORDER,
    line=palette.ACCENT,
    evaluated=palette.EVALUATION,
    font="var(--jp-ui-font-family, system-ui, sans-serif)",
)
NEUTRAL = ChartStyle(
    text="#808080",
    grid="rgba(128,128,128,.3)",
    line="#2b88e0",
    evaluated=palette.EVALUATION,
    font="system-ui, 'DejaVu Sans', sans-serif",
)


def decimate(points: Sequence[Point], buckets: int = 240) -> list[Point]:
    """Returns at most ``2 * buckets`` of the points: the lowest and the highest of each bucket.

    Args:
        points: (x, value) pairs.
        buckets: number of buckets of consecutive points.
    """
    if len(points) <= 2 * buckets:
        return list(points)
    kept: list[Point] = []
    for number in range(buckets):
        chunk = range(number * len(points) // buckets, (number + 1) * len(points) // buckets)
        low = min(chunk, key=lambda index: points[index][1])
        high = max(chunk, key=lambda index: points[index][1])
        kept.extend(points[index] for index in sorted({low, high}))
    return kept


def smooth(points: Sequence[Point], *, logarithmic: bool = False) -> list[Point]:
    """Returns the values of straight lines fitted to the points around each one.

    Unlike an average of the values so far, this does not lag behind a loss that falls.

    Args:
        points: (x, value) pairs with ascending x.
        logarithmic: whether to smooth the logarithms, for a logarithmic axis; all values are positive.
    """
    reach = min(_MOST_NEIGHBOURS, len(points) // 8 + 1)
    placed = [(x - points[0][0], math.log(value) if logarithmic else value) for x, value in points]
    products = ([x for x, _ in placed], [y for _, y in placed], [x * x for x, _ in placed], [x * y for x, y in placed])
    sums = [list(itertools.accumulate(values, initial=0.0)) for values in products]
    smoothed = []
    for number, (x, _) in enumerate(placed):
        first, last = max(0, number - reach), min(len(placed), number + reach + 1)
        count = last - first
        x_sum, y_sum, square_sum, product_sum = (up_to[last] - up_to[first] for up_to in sums)
        spread = square_sum - x_sum * x_sum / count
        slope = (product_sum - x_sum * y_sum / count) / spread if spread > 0 else 0.0
        fitted = (y_sum + slope * (count * x - x_sum)) / count
        smoothed.append((points[number][0], math.exp(fitted) if logarithmic else fitted))
    return smoothed


def ticks(low: float, high: float, most: int) -> list[float]:
    """Returns round values for an axis that includes a range.

    Args:
        low: lower end of the range; the first tick is at or below it.
        high: upper end of the range; the last tick is at or above it.
        most: approximate number of ticks.
    """
    span, largest = high - low, max(abs(low), abs(high))
    if span <= largest * 1e-9 or span < 1e-300:  # no differences to show
        span = largest if largest > 1e-300 else 1.0
    raw = span / max(1, most - 1)
    unit = 10.0 ** math.floor(math.log10(raw))
    step = unit * next(factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


@dataclass(frozen=True)
class Picture:
    """The parts of a chart. Curves stretch with its width; texts, dots and its height do not.

    Labels are above their grid lines at the left edge, and the curves begin to the right of them.

    Attributes:
        label: description for screen readers.
        levels: horizontal grid lines: (pixels from the top, label).
        curves: SVG paths, in pixels of a chart that is ``WIDTH`` wide.
        words: SVG texts and circles; x in percent of the width of the curves, y in pixels from the top.
        height: height in pixels.
    """

    label: str
    levels: Sequence[tuple[float, str]]
    curves: str
    words: str
    height: int = HEIGHT

    def svg(self, style: ChartStyle, *, fluid: bool = True) -> str:
        """Returns the chart as an ``<svg>`` element.

        Args:
            style: colours and fonts.
            fluid: whether it fills the available width and keeps its height; else it keeps its proportions.
        """
        box = f'width="{"100%" if fluid else WIDTH}" height="{self.height}"'
        box += "" if fluid else f' viewBox="0 0 {WIDTH} {self.height}"'
        left = left_of(words for _, words in self.levels)
        inner = f'x="{left:.2f}%" width="{100 - left - RIGHT:.2f}%" height="{self.height}"'
        grid = "".join(
            f'<line x2="100%" y1="{y:.1f}" y2="{y:.1f}" style="stroke:{style.grid}"/>'
            f'<text y="{y - 4:.1f}" style="fill:{style.text}">{escape(words)}</text>'
            for y, words in self.levels
        )
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" {box} role="img" aria-label="{escape(self.label)}" '
            f'style="display:block;max-width:{WIDTH}px;font:11px {style.font};font-variant-numeric:tabular-nums">{grid}'
            f'<svg {inner} overflow="visible" viewBox="0 0 {WIDTH} {self.height}" preserveAspectRatio="none">'
            f"{self.curves}</svg>"
            f'<svg {inner} overflow="visible" style="fill:{style.text}">{self.words}</svg></svg>'
        )

    def image(self, style: ChartStyle) -> str:
        """Returns the chart as a self-contained ``<img>``."""
        shape = f"display:block;width:100%;max-width:{WIDTH}px;height:{self.height}px;margin:0"
        return image(self.svg(style), WIDTH, self.height, shape, self.label)


def left_of(labels: Iterable[str]) -> float:
    """Returns the width of the axis labels in percent of the chart's width, enough for narrow charts."""
    return min(2 * max(map(len, labels), default=0) + 1.0, 18.0)


def across(x: float) -> str:
    """Returns an x coordinate in pixels of ``WIDTH`` as percent."""
    return f"{100 * x / WIDTH:.2f}%"


def loss_chart(train: TrainState, style: ChartStyle = THEME, *, fluid: bool = True) -> str:
    """Returns the loss curve of a run, of finite values, as an ``<svg>`` element; see ``Picture.svg`` for ``fluid``."""
    return _loss_picture(train, style).svg(style, fluid=fluid)


def loss_image(train: TrainState) -> str:
    """Returns the loss curve of a run as a self-contained ``<img>``."""
    return _loss_picture(train, NEUTRAL).image(NEUTRAL)


def loss_left(train: TrainState) -> float:
    """Returns the space to the left of the loss curve in percent of the chart's width."""
    frame = _frame_of(train)
    return left_of(words for _, words in frame.levels())


def _frame_of(train: TrainState) -> Frame:
    raw, evaluated = finite(train.history), finite(train.eval_history)
    return Frame.around(raw, evaluated, _begin(train), _end(train), _no_curve(train))


def _loss_picture(train: TrainState, style: ChartStyle) -> Picture:
    raw, evaluated, frame = finite(train.history), finite(train.eval_history), _frame_of(train)
    curve = _inside(smooth(raw, logarithmic=frame.logarithmic), raw)
    curves, words = [], [frame.words()]
    if len(raw) > 1:
        curves.append(_path(frame.place(decimate(curve, 60)), style.line, "5", ".28"))
        curves.append(_path(frame.place(decimate(raw)), style.line, "1.5", "1"))
    elif raw:
        words.append(_dots(frame.place(raw), style.line))
    if len(evaluated) > 1:
        curves.append(_path(frame.place(evaluated), style.evaluated, "1.5", ".8"))
    words.append(_dots(frame.place(evaluated), style.evaluated))
    words += [_ring(frame.place([point])[0], style.evaluated) for point in evaluated if point[0] == train.best_step]
    return Picture(describe(train), frame.levels(), "".join(curves), "".join(words))


def is_logarithmic(train: TrainState) -> bool:
    """Returns whether the losses are drawn on a logarithmic axis."""
    values = [value for _, value in (*finite(train.history), *finite(train.eval_history))]
    return bool(values) and _spans_decades(min(values), max(values))


def loss_columns(train: TrainState) -> list[Column]:
    """Returns the columns of the loss curve, with the values of a step each."""
    raw, frame = finite(train.history), _frame_of(train)
    smoothed = smooth(raw, logarithmic=frame.logarithmic) if len(raw) > 1 else []
    losses = [("loss", raw), ("smoothed", smoothed), ("eval loss", finite(train.eval_history))]
    shown = [ShownCurve(name, points, numbers.loss) for name, points in losses]
    for name, written in (("learning rate", numbers.learning_rate), ("gradient norm", numbers.metric)):
        shown.append(ShownCurve(name, finite(train.series.get(name, ())), written, sustained=True))
    return columns(shown, [step for step, _ in (*raw, *losses[2][1])], frame.begin, frame.end)


def small_chart(curve: Curve, train: TrainState) -> str:
    """Returns a small curve without axes: an ``<svg>`` while the run continues, an ``<img>`` once it has ended.

    Args:
        curve: the values; at least one is finite.
        train: the run, whose steps determine the x axis.
    """
    ended = train.status in ENDED
    style = NEUTRAL if ended else THEME
    points = decimate(finite(curve), 60)
    corners = _corners(points, _begin(train), _end(train), _SMALL_WIDTH, _SMALL_HEIGHT)
    box = f'width="{_SMALL_WIDTH}" height="{_SMALL_HEIGHT}"'
    shape = f"display:block;width:100%;height:{_SMALL_HEIGHT}px;margin:0"
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_SMALL_WIDTH} {_SMALL_HEIGHT}" {box} '
        f'preserveAspectRatio="none" style="{shape}">'
        f'<path d="M0 {_SMALL_HEIGHT - 0.5}H{_SMALL_WIDTH}" fill="none" style="stroke:{style.grid}"/>'
        f'<path d="M{corners}" fill="none" stroke-width="1.5" stroke-linejoin="round" '
        f'vector-effect="non-scaling-stroke" style="stroke:{style.line}"/></svg>'
    )
    return image(svg, _SMALL_WIDTH, _SMALL_HEIGHT, shape) if ended else svg


def spark_image(curve: Curve, words: str) -> str:
    """Returns a curve as large as a word, as a self-contained ``<img>``.

    Args:
        curve: the values; empty text is returned if none is finite.
        words: description for screen readers and as a tooltip.
    """
    points = decimate(finite(curve), _SPARK_WIDTH // 2)
    if not points:
        return ""
    corners = _corners(points, points[0][0], points[-1][0], _SPARK_WIDTH, _SPARK_HEIGHT)
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_SPARK_WIDTH}" height="{_SPARK_HEIGHT}">'
        f'<path d="M{corners}" fill="none" stroke-width="1.5" stroke-linejoin="round" stroke="{NEUTRAL.line}"/></svg>'
    )
    return image(svg, _SPARK_WIDTH, _SPARK_HEIGHT, "display:block;max-width:none;margin:0", words, tooltip=words)


def _corners(points: Sequence[Point], first: float, end: float, width: int, height: int) -> str:
    """Returns a curve that fills a box, as the points of an SVG path."""
    low, high = min(value for _, value in points), max(value for _, value in points)
    span = high - low
    placed = [
        (
            (step - first) / max(end - first, 1.0) * width,
            height - 3 - ((value - low) / span if span > 0 else 0.5) * (height - 6),
        )
        for step, value in points
    ]
    if len(placed) == 1:
        placed.append((placed[0][0] + 2, placed[0][1]))
    return " ".join(f"{x:.1f} {y:.1f}" for x, y in placed)


def describe(train: TrainState) -> str:
    """Returns a description of the chart for screen readers."""
    points = finite(train.history)
    if not points:
        return _no_curve(train)
    (first, start), (last, end) = points[0], points[-1]
    return f"training loss {start:.4g} at step {first:g}, {end:.4g} at step {last:g}"


def image(svg: str, width: int, height: int, style: str, words: str = "", *, tooltip: str = "") -> str:
    """Returns an SVG as a self-contained ``<img>``, which ``words`` describe for screen readers."""
    source = f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"
    title = f' title="{escape(tooltip)}"' if tooltip else ""
    return f'<img src="{source}" width="{width}" height="{height}" alt="{escape(words)}"{title} style="{style}">'


def _begin(train: TrainState) -> float:
    """Returns the first step of the x axis: 0 if the chart includes the curve of the run that was resumed."""
    return 0.0 if any(step <= train.first_step for step, _ in train.history) else float(train.first_step)


def _end(train: TrainState) -> float:
    """Returns the last step of the x axis: the last planned one while the run continues."""
    planned = 0 if train.status in ENDED else train.total_steps or 0
    drawn = [step for curve in (train.history, train.eval_history) for step, _ in curve]
    return float(max([planned, train.step, train.first_step + 1, *drawn]))


def _spans_decades(low: float, high: float) -> bool:
    return low > 0 and high / low > _DECADES


def _decades(low: float, high: float) -> list[float]:
    """Returns about six powers of ten, at most, that enclose the values."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    stride = -(-(last - first) // 5)
    return [10.0**power for power in range(first, last + stride, stride)]


@dataclass(frozen=True)
class Frame:
    """The axes of a chart, which map values to pixels; ``empty`` is the text without a curve."""

    across: tuple[float, ...]
    upwards: tuple[float, ...]
    begin: float
    end: float
    logarithmic: bool
    empty: str
    height: int = HEIGHT

    @classmethod
    def around(cls, raw: Sequence[Point], evaluated: Sequence[Point], begin: float, end: float, without: str) -> Frame:
        """Returns axes that include the points; ``without`` is the text to show if there are no points."""
        values = [value for _, value in (*raw, *evaluated)]
        low, high = (min(values), max(values)) if values else (0.0, 1.0)
        logarithmic = _spans_decades(low, high)
        if low >= 0 and low < high / 2:
            low = 0.0 if not logarithmic else low
        inside = (tick for tick in ticks(begin, end, 6) if begin <= tick <= end * (1 + 1e-9) and tick == int(tick))
        upwards = _decades(low, high) if logarithmic else ticks(low, high, 4)
        return cls(tuple(inside), tuple(upwards), begin, end, logarithmic, "" if values else without)

    def place(self, points: Sequence[Point]) -> list[Point]:
        """Returns points in pixels."""
        return [(self._x(step), self._y(value)) for step, value in points]

    def levels(self, written: Callable[[float], str] | None = None) -> list[tuple[float, str]]:
        """Returns the grid lines: (pixels from the top, label); ``written`` returns the label of a tick."""
        written = written or self._words
        return [(self._y(tick), written(tick)) for tick in self.upwards]

    def words(self) -> str:
        """Returns the labels of the x axis and its title, as SVG texts."""
        texts = []
        for tick in self.across:
            share = (tick - self.begin) / (self.end - self.begin)
            anchor = "start" if share < 0.02 else "end" if share > 0.98 else "middle"
            texts.append(svg_text(f"{100 * share:.2f}%", self.height - BOTTOM + 16, f"{tick:,.0f}", anchor))
        texts.append(svg_text("50%", self.height - 5, "step"))
        if self.empty:
            texts.append(svg_text("50%", (self.height - BOTTOM + TOP) // 2 + 4, self.empty))
        return "".join(texts)

    def _words(self, tick: float) -> str:
        if self.empty:
            return ""
        return f"{tick:g}" if self.logarithmic else _label(tick, self.upwards)

    def _x(self, step: float) -> float:
        return (step - self.begin) / (self.end - self.begin) * WIDTH

    def _y(self, value: float) -> float:
        low, high = self.upwards[0], self.upwards[-1]
        if self.logarithmic:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return self.height - BOTTOM - (value - low) / (high - low) * (self.height - TOP - BOTTOM)


def _no_curve(train: TrainState) -> str:
    """Returns the reason why there is no curve."""
    if train.history or (train.loss is not None and not math.isfinite(train.loss)):
        return "the loss is not a finite number"
    if train.status in ENDED:
        return "no loss was logged" if train.step else "no step was finished"
    return "no loss was logged yet" if train.step > train.first_step else "waiting for the first loss"


def _inside(curve: list[Point], raw: Sequence[Point]) -> list[Point]:
    """Returns a curve within the range of the values that it smooths: a fitted line may end beyond the axis."""
    values = [value for _, value in raw] or [0.0]
    low, high = min(values), max(values)
    return [(place, min(max(value, low), high)) for place, value in curve]


def finite(points: Sequence[tuple[int, float]]) -> list[Point]:
    """Returns the points whose values are finite."""
    return [(float(step), value) for step, value in points if math.isfinite(value)]


def _label(tick: float, all_ticks: Sequence[float]) -> str:
    """Returns a tick with enough decimals to distinguish it from its neighbours."""
    step = all_ticks[1] - all_ticks[0]
    decimals = max(0, -math.floor(math.log10(step)))
    if not math.isclose(step, round(step, decimals), rel_tol=1e-6):
        decimals += 1
    largest = max(abs(value) for value in all_ticks)
    if decimals <= 6 and largest < 1e6:
        return f"{tick:,.{decimals}f}"
    if tick == 0:
        return "0"
    mantissa, exponent = f"{tick:.{max(1, math.ceil(math.log10(largest / step)))}e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _path(points: Sequence[Point], colour: str, width: str, opacity: str) -> str:
    corners = " ".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return (
        f'<path d="M{corners}" fill="none" stroke-width="{width}" stroke-linejoin="round" '
        f'vector-effect="non-scaling-stroke" style="stroke:{colour};stroke-opacity:{opacity}"/>'
    )


def svg_text(x: str, y: float, text: str, anchor: str = "middle") -> str:
    """Returns a text of a chart."""
    return f'<text x="{x}" y="{y:g}" text-anchor="{anchor}">{escape(text)}</text>'


def _ring(point: Point, colour: str) -> str:
    x, y = point
    return f'<circle cx="{across(x)}" cy="{y:.1f}" r="7" fill="none" stroke-width="1.5" style="stroke:{colour}"/>'


def _dots(points: Sequence[Point], colour: str) -> str:
    return "".join(f'<circle cx="{across(x)}" cy="{y:.1f}" r="3.5" style="fill:{colour}"/>' for x, y in points)
