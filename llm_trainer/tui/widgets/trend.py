"""A small picture of one figure over time: its name, its newest value and a braille line."""
from __future__ import annotations

from collections.abc import Callable, Sequence

from textual.app import RenderResult
from textual.content import Content
from textual.widget import Widget

from llm_trainer.tui.glyphs import braille


class Trend(Widget):
    """Fills the room it gets with the line; paints again only when what it shows changed."""

    ALLOW_SELECT = False

    def __init__(self, title: str, show: Callable[[float | None], str], from_zero: bool = False, *,
                 id: str | None = None):
        super().__init__(id=id)
        self.title, self.write, self.from_zero = title, show, from_zero
        self.values: Sequence[float | None] = ()
        self.shown: Content | None = None

    def show(self, values: Sequence[float | None]) -> None:
        self.values = values
        if self._draw() != self.shown: self.refresh()

    def _draw(self) -> Content:
        width, height = self.size
        real = [v for v in self.values if v is not None and v == v]
        last = self.write(real[-1]) if real else "–"
        span = f"{self.write(min(real))} … {self.write(max(real))}" if real else ""
        head = f"{self.title}  {last}"
        head = Content.assemble((f"{self.title} ", "$foreground 60%"), (last, "bold"),
                                (span.rjust(max(0, width - len(head) + 1)) if len(head) + len(span) < width else "",
                                 "$foreground 60%"))
        if height < 2: return head
        rows = braille(self.values, width, height - 1, 0.0 if self.from_zero else None)
        return Content("\n").join([head, *(Content.styled(row, "$primary") for row in rows)])

    def render(self) -> RenderResult:
        self.shown = self._draw()
        return self.shown
