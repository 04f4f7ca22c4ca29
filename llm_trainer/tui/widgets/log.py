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
        self.wanted = ""  # only lines with this are shown

    def add(self, texts: list[Text]) -> None:
        self.texts.extend(texts)
        if self.laid and texts: self._lay(texts, self.is_vertical_scroll_end)

    def find(self, wanted: str) -> int:
        "Show only the lines that hold `wanted`, in whatever case; how many these are"
        self.wanted = wanted.lower()
        self.clear()
        if self.laid: self._lay(list(self.texts), True)
        return sum(self.wanted in text.plain.lower() for text in self.texts)

    def on_resize(self) -> None:
        width = self.scrollable_content_region.width
        if width < 1 or width == self.laid: return
        self.laid = width
        self.clear()
        if self.texts: self._lay(list(self.texts), True)

    def _lay(self, texts: list[Text], to_end: bool) -> None:
        texts = [text for text in texts if self.wanted in text.plain.lower()]
        if texts: self.write(Text("\n").join(texts), width=self.laid, scroll_end=False)
        if to_end: self.scroll_end(animate=False, immediate=True, x_axis=False)
