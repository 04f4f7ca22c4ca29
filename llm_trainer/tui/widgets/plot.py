"""Curves on axes: zoom and pan from textual-plot, our own calm axes, and a repaint of only what moved.

The one module of the watcher that loads textual-plot and numpy; screens that plot import it when they open."""
from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil, floor, isfinite, log10

import numpy as np
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Grid
from textual.geometry import Region
from textual_hires_canvas import Canvas, HiResMode
from textual_plot.plot_widget import Legend, PlotWidget

from llm_trainer.runs.curves import columns
from llm_trainer.terminal import count, duration


@dataclass
class Curve:
    """One thing to draw; `style` names a component class of the plot."""
    label: str
    x: np.ndarray
    y: np.ndarray
    style: str
    kind: str = "line"  # line: the mean · raw: from lowest to highest · points: with marks · marks: only those
    smooth: float = 0.0
    tag: str = ""       # A letter at the end of the curve, so that colour is not needed to tell curves apart
    key: tuple = field(default=(), compare=False)


def nice_step(span: float, most: int) -> float:
    "The round number (1, 2 or 5 times a power of ten) that cuts `span` into at most `most` parts"
    if not isfinite(span) or span <= 0: return 1.0
    rough = span / max(1, most)
    power = 10.0 ** floor(log10(rough))
    return next(power * times for times in (1, 2, 5, 10) if power * times >= rough * 0.999999)


def ticks(low: float, high: float, most: int) -> list[float]:
    "Round values between `low` and `high`"
    step = nice_step(high - low, most)
    return [n * step for n in range(ceil(low / step - 1e-9), floor(high / step + 1e-9) + 1)][:64]


class QuietCanvas(Canvas):
    """A canvas that is drawn whole and then repaints only the stretches of its lines that came out different."""

    def __init__(self, *args, **kwargs):
        self._drawing, self._shown, self.faint = False, None, ""
        super().__init__(*args, **kwargs)

    def refresh(self, *regions, repaint: bool = True, layout: bool = False, recompose: bool = False):
        if self._drawing and not layout: return self
        return super().refresh(*regions, repaint=repaint, layout=layout, recompose=recompose)

    def set_pixel(self, x: int, y: int, char: str = "█", style: str = "white") -> None:
        "Lines that meet in a cell share it, except over the one that stays in the background"
        if "\u2800" <= char <= "\u28ff" and 0 <= y < len(self._buffer) and 0 <= x < len(self._buffer[y]):
            there = self._buffer[y][x]
            if "\u2800" <= there <= "\u28ff" and self._styles[y][x] != self.faint: char = chr(ord(char) | ord(there))
        super().set_pixel(x, y, char, style)

    def begin(self) -> None:
        self._drawing = True
        self.reset()

    def end(self) -> None:
        self._drawing = False
        rows = [list(zip(text, style)) for text, style in zip(self._buffer, self._styles)]
        before, self._shown = self._shown, rows
        if before is None or len(before) != len(rows) or (rows and len(before[0]) != len(rows[0])):
            self.refresh()
            return
        for y, (old, new) in enumerate(zip(before, rows)):
            if old == new: continue
            moved = [x for x, (a, b) in enumerate(zip(old, new)) if a != b]
            cuts = [i for i in range(1, len(moved)) if moved[i] - moved[i - 1] > 8]
            for first, last in zip([0, *cuts], [*cuts, len(moved)]):
                self.refresh(Region(moved[first], y, moved[last - 1] - moved[first] + 1, 1))

    def put(self, x: int, y: int, text: str, style: str) -> None:
        "Write `text` as it is, cell by cell"
        for i, char in enumerate(text): self.set_pixel(x + i, y, char, style)


class Plot(PlotWidget, inherit_bindings=False):
    """Curves over a bottom and a left axis; limits are round and hold still until the data leaves them."""

    COMPONENT_CLASSES = {"plot--axis", "plot--tick", "plot--label", "curve--raw", "curve--train", "curve--val",
                         *(f"curve--{i}" for i in range(8))}
    BINDINGS = [Binding("up", "pan_up", "Pan up", show=False), Binding("down", "pan_down", "Pan down", show=False)]
    KEYBOARD_PAN_FACTOR = 4.0

    def __init__(self, *, id: str | None = None):
        super().__init__(id=id)
        self.curves: list[Curve] = []
        self.log_scale, self.unit, self.empty = False, "step", ""
        self._held: tuple[float, float, float, float] | None = None

    def compose(self) -> ComposeResult:
        with Grid():
            for part in ("margin-top", "margin-left", "plot", "margin-bottom"): yield QuietCanvas(1, 1, id=part)
        yield Legend(id="legend")

    def on_mount(self) -> None:
        self.margin_top, self.margin_bottom, self.margin_left = 0, 1, 8

    def show(self, curves: list[Curve], *, unit: str = "step", log_scale: bool = False, empty: str = "") -> None:
        "Draw these curves; a change of unit or scale starts from the whole curve again"
        if (unit, log_scale) != (self.unit, self.log_scale):
            self.unit, self.log_scale, self._held = unit, log_scale, None
            self._auto_x_min = self._auto_x_max = self._auto_y_min = self._auto_y_max = True
        self.curves, self.empty = curves, empty
        self._rerender()

    @property
    def zoomed(self) -> bool: return not (self._auto_x_max and self._auto_y_max)

    def action_reset_scales(self) -> None:
        self._held = None
        super().action_reset_scales()

    def _fit(self) -> None:
        "Round limits around the data; kept while the data stays inside and fills most of them"
        drawn = [c for c in self.curves if len(c.x)]
        if not drawn: return
        def tops(values): return (float(np.nanmin(values)), float(np.nanmax(values)))
        xs = [tops(c.x) for c in drawn]
        left, right = min(a for a, _ in xs), max(b for _, b in xs)
        ys = []
        for curve in drawn:
            values = self._scaled(curve.y[np.isfinite(curve.y)])
            if len(values): ys.append((float(np.quantile(values, 0.002)) if len(values) > 500 else float(values.min()),
                                       float(values.max())))
        if not ys: return
        low, high = min(a for a, _ in ys), max(b for _, b in ys)
        if high - low < 1e-9: low, high = low - max(abs(low), 1e-3) * 0.05, high + max(abs(high), 1e-3) * 0.05
        if right <= left: right = left + 1
        held = self._held
        if not held or right > held[1] or left < held[0] or right - left < 0.55 * (held[1] - held[0]):
            step = nice_step((right - left) * 1.02, 10)
            x_limits = (floor(left / step) * step if left > 0.2 * right else min(0.0, left), ceil(right / step) * step)
        else: x_limits = held[:2]
        if not held or high > held[3] or low < held[2] or high - low < 0.55 * (held[3] - held[2]):
            step = nice_step(high - low, 10)
            y_limits = (floor(low / step) * step, ceil(high / step) * step)
        else: y_limits = held[2:]
        self._held = (*x_limits, *y_limits)
        if self._auto_x_min: self._x_min = x_limits[0]
        if self._auto_x_max: self._x_max = x_limits[1]
        if self._auto_y_min: self._y_min = y_limits[0]
        if self._auto_y_max: self._y_max = y_limits[1]

    def _scaled(self, y: np.ndarray) -> np.ndarray:
        if not self.log_scale: return y
        with np.errstate(divide="ignore", invalid="ignore"): return np.where(y > 0, np.log10(y), np.nan)

    def _rerender(self) -> None:
        "Draw on the canvases at once: refreshing this widget would repaint all of them"
        self._needs_rerender = True
        if self.is_mounted and self.size: self.render()
        else: self.refresh()

    def _render_plot(self) -> None:
        canvases = {canvas.id: canvas for canvas in self.query(QuietCanvas)}
        if len(canvases) < 4: return
        for canvas in canvases.values(): canvas.begin()
        try:
            if canvases["plot"].size.width > 4 and canvases["plot"].size.height > 2: self._draw(canvases)
        finally:
            for canvas in canvases.values(): canvas.end()

    def _draw(self, canvases: dict[str, QuietCanvas]) -> None:
        canvas, left, bottom = canvases["plot"], canvases["margin-left"], canvases["margin-bottom"]
        width, height = canvas.size
        self._scale_rectangle = Region(1, 0, width - 1, height - 1)
        style = {name: str(self.get_component_rich_style(name)) for name in self.COMPONENT_CLASSES}
        axis, tick = style["plot--axis"], style["plot--tick"]
        for y in range(height - 1): canvas.set_pixel(0, y, "│", axis)
        canvas.put(0, height - 1, "└" + "─" * (width - 1), axis)
        if not any(len(curve.x) for curve in self.curves):
            canvas.put(max(2, (width - len(self.empty)) // 2), height // 2 - 1, self.empty, tick)
            return
        self._fit()
        canvas.faint = style["curve--raw"]
        marks = [self._curve(canvas, curve, style[curve.style], 2 * (width - 1)) for curve in self.curves]
        for x, y, sign, color in (mark for each in marks for mark in each): self._mark(canvas, x, y, sign, color)
        self._axes(canvas, left, bottom, axis, tick)
        self._legend(canvas, style)

    def _curve(self, canvas: QuietCanvas, curve: Curve, style: str, dots: int) -> list[tuple[float, float, str, str]]:
        "Draw the line; gives the marks that go on top of all lines"
        y = self._scaled(curve.y)
        reduced = columns(curve.x, y, self._x_min, self._x_max, dots, curve.smooth)
        if not len(reduced.x): return []
        def at(xs, ys): return [self.get_hires_pixel_from_coordinate(a, b) for a, b in zip(xs, ys)]
        if curve.kind == "raw":
            pairs = [(*a, *b) for a, b in zip(at(reduced.x, reduced.low), at(reduced.x, reduced.high))]
            pairs += [(*a, *b) for a, b in zip(at(reduced.x, reduced.mean), at(reduced.x[1:], reduced.mean[1:]))]
        else:
            points = at(reduced.x, reduced.mean)
            pairs = [(*a, *b) for a, b in zip(points, points[1:])]
        if curve.kind != "marks": canvas.draw_hires_lines(pairs, HiResMode.BRAILLE, style)
        marks = list(zip(reduced.x, reduced.mean))
        if curve.kind in ("line", "raw"): marks = marks[-1:] if curve.tag else []
        elif curve.kind == "points" and len(marks) > dots // 8:
            marks = marks[-1:]  # so close they would hide the curves
        return [(x, v, curve.tag or "•", style) for x, v in marks]

    def _mark(self, canvas: QuietCanvas, x: float, y: float, sign: str, style: str) -> None:
        px, py = self.get_hires_pixel_from_coordinate(x, y)
        px, py = min(int(px), canvas.size.width - 1), int(py)
        if px >= 1 and 0 <= py < canvas.size.height - 1: canvas.set_pixel(px, py, sign, style)

    def _axes(self, canvas: QuietCanvas, left: QuietCanvas, bottom: QuietCanvas, axis: str, tick: str) -> None:
        width, height = canvas.size
        end = 0
        name = {"step": "steps"}.get(self.unit, self.unit)
        if self.log_scale: canvas.put(2, 0, "log scale", tick)
        for value in ticks(self._x_min, self._x_max, max(2, width // 12)):
            x, _ = self.get_pixel_from_coordinate(value, 0.0)
            text = duration(value) if self.unit == "time" else count(round(value))
            start = min(max(0, x + self.margin_left - len(text) // 2), self.margin_left + width - len(text))
            if not 0 <= x < width or start <= end or start + len(text) > self.margin_left + width - len(name) - 1:
                continue
            if x: canvas.set_pixel(x, height - 1, "┴", axis)
            bottom.put(start, 0, text, tick)
            end = start + len(text) + 1
        bottom.put(self.margin_left + width - len(name), 0, name, axis)
        values = ticks(self._y_min, self._y_max, max(2, height // 3))
        if self.log_scale and self._y_max - self._y_min < 1.5:
            span = ticks(10 ** self._y_min, 10 ** self._y_max, max(2, height // 3))
            values = [log10(value) for value in span if value > 0]
        rows = set()
        digits = 0
        if len(values) > 1 and not self.log_scale: digits = max(0, -floor(log10(values[1] - values[0]) + 1e-9))
        for value in values:
            if not self._y_min - 1e-12 <= value <= self._y_max + 1e-12: continue
            _, y = self.get_hires_pixel_from_coordinate(0.0, value)
            y = min(int(y), height - 1)
            if y in rows or not 0 <= y < height: continue
            rows.add(y)
            shown = 10 ** value if self.log_scale else value
            text = f"{shown:.3g}" if self.log_scale or abs(shown) >= 1e5 else f"{shown:.{min(digits, 5)}f}"
            left.put(max(0, self.margin_left - 1 - len(text)), y, text[:self.margin_left - 1], tick)
            canvas.set_pixel(0, y, "┤" if y < height - 1 else "┼", axis)

    def _legend(self, canvas: QuietCanvas, style: dict[str, str]) -> None:
        parts = [(("•" if c.kind in ("points", "marks") else "━") if not c.tag else c.tag, c.label, style[c.style])
                 for c in sorted(self.curves, key=lambda c: c.kind) if c.label and len(c.x)]
        while parts and sum(len(label) + 4 for _, label, _ in parts) > canvas.size.width - 3: parts.pop()
        x = canvas.size.width - sum(len(label) + 4 for _, label, _ in parts)
        for sign, label, color in parts:
            canvas.put(x, 0, f" {sign} ", color)
            canvas.put(x + 3, 0, f"{label} ", style["plot--tick"])
            x += len(label) + 4
