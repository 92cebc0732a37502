"""A line chart as SVG, without a plotting library."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

COLOURS = ("#3366cc", "#dc3912", "#109618", "#ff9900", "#990099", "#0099c6", "#dd4477", "#66aa00", "#316395")
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 720, 420, 70, 40, 170, 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    label: str
    low: float
    high: float
    log: bool = False

    def place(self, value: float) -> float:
        """Where a value lies, from 0 to 1."""
        low, high, at = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return (at - low) / ((high - low) or 1.0)

    def ticks(self) -> list[float]:
        """Powers of two or five even steps."""
        if self.log:
            return [2.0**p for p in range(math.floor(math.log2(self.low)), math.ceil(math.log2(self.high)) + 1)]
        return [self.low + (self.high - self.low) * i / 5 for i in range(6)]


def line_chart(
    title: str, x_label: str, y_label: str, series: Mapping[str, Sequence[tuple[float, float]]], *, log: bool = False
) -> str:
    """One line for each series; ``log`` for both axes. Points must be positive for it."""
    points = [p for line in series.values() for p in line]
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    x = Axis(label=x_label, low=min(xs), high=max(xs), log=log)
    y = Axis(label=y_label, low=min(ys) if log else min(0.0, *ys), high=max(ys), log=log)
    body = [_frame(title), *_grid(x, y)]
    for i, (name, line) in enumerate(series.items()):
        body.append(_line(name, [_spot(x, y, p) for p in line], COLOURS[i % len(COLOURS)], i))
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}">{"".join(body)}</svg>\n'


def _spot(x: Axis, y: Axis, point: tuple[float, float]) -> tuple[float, float]:
    across, down = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    return LEFT + across * x.place(point[0]), TOP + down * (1 - y.place(point[1]))


def _frame(title: str) -> str:
    font = "<style>text{font:12px sans-serif}</style>"
    return f'{font}<rect width="100%" height="100%" fill="#fff"/>{_text(LEFT, 22, title)}'


def _text(x: float, y: float, words: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def _grid(x: Axis, y: Axis) -> list[str]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = [_text((LEFT + right) / 2, HEIGHT - 12, x.label, "middle"), _text(8, TOP - 6, y.label)]
    for tick in x.ticks():
        at = _spot(x, y, (tick, y.low))[0]
        if LEFT - 1 <= at <= right + 1:
            parts.append(
                f'<path d="M{at:.1f} {TOP}V{bottom}" stroke="#ddd"/>{_text(at, bottom + 16, f"{tick:g}", "middle")}'
            )
    for tick in y.ticks():
        at = _spot(x, y, (x.low, tick))[1]
        if TOP - 1 <= at <= bottom + 1:
            parts.append(
                f'<path d="M{LEFT} {at:.1f}H{right}" stroke="#ddd"/>{_text(LEFT - 6, at + 4, f"{tick:.3g}", "end")}'
            )
    return parts


def _line(name: str, spots: list[tuple[float, float]], colour: str, row: int) -> str:
    path = "L".join(f"{a:.1f} {b:.1f}" for a, b in spots)
    key = WIDTH - RIGHT + 12
    legend = f'<path d="M{key} {TOP + 18 * row}h18" stroke="{colour}" stroke-width="2"/>'
    label = _text(key + 24, TOP + 18 * row + 4, name)
    return f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>{legend}{label}'
