"""A run's log: wrapped to the width there is, and again when that changes; followed while its end is seen."""
from __future__ import annotations

from collections import deque

from rich.text import Text
from textual.widgets import RichLog


class Log(RichLog):
    """Lines that arrive while it is hidden, and has no width, wait for it."""

    def __init__(self, most: int = 5000, *, id: str | None = None):
        super().__init__(id=id, max_lines=most, wrap=True, highlight=False, markup=False, auto_scroll=False)
        self.texts: deque[Text] = deque(maxlen=most)
        self.laid = 0  # the width the lines are wrapped to

    def add(self, texts: list[Text]) -> None:
        self.texts.extend(texts)
        if self.laid and texts: self._lay(texts, self.is_vertical_scroll_end)

    def on_resize(self) -> None:
        width = self.scrollable_content_region.width
        if width < 1 or width == self.laid: return
        self.laid = width
        self.clear()
        if self.texts: self._lay(list(self.texts), True)

    def _lay(self, texts: list[Text], to_end: bool) -> None:
        self.write(Text("\n").join(texts), width=self.laid, scroll_end=False)
        if to_end: self.scroll_end(animate=False, immediate=True, x_axis=False)
