"""A few lines of text that are laid out again only when their number changes and painted only when they differ."""
from __future__ import annotations

from textual.content import Content
from textual.widgets import Static


class Lines(Static):
    """`show` instead of `update`: a repaint of the whole screen twice a second is too much for a slow line."""

    def __init__(self, *, id: str | None = None, classes: str | None = None):
        super().__init__(id=id, classes=classes, markup=False)
        self.shown: Content | None = None

    def show(self, content: Content) -> None:
        before, self.shown = self.shown, content
        if before is not None and content.is_same(before): return
        width = self.content_size.width
        rows = lambda text: len(text.wrap(width)) if text is not None and width else -1
        self.update(content, layout=before is None or not width or rows(before) != rows(content))
