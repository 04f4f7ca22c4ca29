"""One line of numbered parts to choose from; the digit is the key."""
from __future__ import annotations

from dataclasses import dataclass

from textual import events
from textual.app import RenderResult
from textual.content import Content
from textual.message import Message
from textual.reactive import reactive
from textual.widget import Widget


class TabLine(Widget):
    """Shows which part is open; a click opens another."""

    ALLOW_SELECT = False
    current: reactive[str] = reactive("")

    @dataclass
    class Chosen(Message):
        """A part was clicked."""
        name: str

    def __init__(self, parts: dict[str, str]):
        super().__init__()
        self.parts = parts

    @property
    def gap(self) -> int:
        "Air between the parts, less of it where it is narrow"
        return 3 if sum(len(title) + 5 for title in self.parts.values()) <= self.size.width else 1

    def render(self) -> RenderResult:
        texts = [Content.assemble((f"{i} ", "$primary" if name == self.current else "$foreground 60%"),
                                  (title, "bold underline" if name == self.current else "$foreground 60%"))
                 for i, (name, title) in enumerate(self.parts.items(), 1)]
        return Content(" " * self.gap).join(texts)

    def on_click(self, event: events.Click) -> None:
        x = self.styles.padding.left
        for name, title in self.parts.items():
            if x <= event.x < x + len(title) + 2: self.post_message(self.Chosen(name))
            x += len(title) + 2 + self.gap
