"""A few lines of text that are laid out again only when their number changes and painted only when they differ."""
from __future__ import annotations

from collections.abc import Iterable

from textual.content import Content
from textual.widgets import Static


def flow(parts: Iterable[Content], width: int, gap: int = 3) -> list[Content]:
    "The parts side by side, on as many lines as they need; none of them is broken"
    rows: list[Content] = []
    for part in parts:
        if rows and rows[-1].cell_length + gap + part.cell_length <= width:
            rows[-1] = Content.assemble(rows[-1], " " * gap, part)
        else: rows.append(part)
    return rows


class Lines(Static):
    """`show` instead of `update`: a repaint of the whole screen twice a second is too much for a slow line."""

    def __init__(self, *, id: str | None = None, classes: str | None = None):
        super().__init__(id=id, classes=classes, markup=False)
        self.shown: Content | None = None

    def show(self, content: Content) -> None:
        before, self.shown = self.shown, content
        if before is not None and content.is_same(before): return
        width = self.content_size.width
        def rows(text): return len(text.wrap(width)) if text is not None and width else -1
        self.update(content, layout=before is None or not width or rows(before) != rows(content))
