"""The first line of a screen: where you are on the left, how much there is on the right."""
from __future__ import annotations

from rich.cells import cell_len
from textual.app import RenderResult
from textual.content import Content
from textual.reactive import reactive
from textual.widget import Widget


class TopBar(Widget):
    """One line; the last part of the path is the one that matters."""

    ALLOW_SELECT = False
    path: reactive[tuple[str, ...]] = reactive(("llm_trainer",))
    facts: reactive[tuple[str, ...]] = reactive(())

    def show(self, path: list[str], facts: list[str]) -> None: self.path, self.facts = tuple(path), tuple(facts)

    def render(self) -> RenderResult:
        left = Content(" / ").join(Content.styled(part, "bold" if i == len(self.path) - 1 else "$foreground 60%")
                                   for i, part in enumerate(self.path))
        facts = list(self.facts)
        room = self.size.width - left.cell_length - 2
        while facts and cell_len(" · ".join(facts)) > room: facts.pop()
        right = Content.styled(" · ".join(facts), "$foreground 60%")
        return Content.assemble(left, " " * max(1, self.size.width - left.cell_length - right.cell_length), right)
