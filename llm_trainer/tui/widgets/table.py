"""A table of rows that repaints only the lines that changed, drops columns that do not fit and keeps its cursor."""
from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from rich.cells import cell_len, set_cell_size
from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.binding import Binding
from textual.geometry import Size
from textual.message import Message
from textual.reactive import reactive
from textual.scroll_view import ScrollView
from textual.strip import Strip

Row = TypeVar("Row", bound=Hashable)
Part = tuple[str, str]  # text and the component class, theme colour name or "" it is drawn with


@dataclass(frozen=True)
class Column(Generic[Row]):
    """One column: `cell` gives the parts to draw at a width; those with the highest `rank` leave first."""
    key: str
    title: str
    width: int
    cell: Callable[[Row, int], Sequence[Part]]
    rank: int = 0
    right: bool = False
    grow: int = 0


class Table(ScrollView, Generic[Row], can_focus=True):
    """Rows below a fixed line of titles; arrows, j and k, page keys, home and end move the cursor."""

    ALLOW_SELECT = False
    COMPONENT_CLASSES = {f"table--{name}" for name in (
        "title", "sorted", "cursor", "marked", "text", "dim", "strong", "success", "primary", "secondary", "warning",
        "error", "accent")}
    BINDINGS = [
        Binding("down,j", "move(1)", "Down", show=False), Binding("up,k", "move(-1)", "Up", show=False),
        Binding("pagedown,ctrl+d", "page(1)", "Page down", show=False),
        Binding("pageup,ctrl+u", "page(-1)", "Page up", show=False),
        Binding("home", "jump(0)", "First", show=False), Binding("end,G", "jump(-1)", "Last", show=False)]

    cursor: reactive[int] = reactive(0, repaint=False)
    sorted_by: reactive[str] = reactive("")

    @dataclass
    class Moved(Message):
        """The cursor is on another row."""
        table: Table
        row: object

        @property
        def control(self) -> Table: return self.table

    @dataclass
    class Chosen(Message):
        """A row was clicked while the cursor was on it."""
        table: Table
        row: object

        @property
        def control(self) -> Table: return self.table

    @dataclass
    class TitleClicked(Message):
        """A column's title was clicked."""
        table: Table
        key: str

        @property
        def control(self) -> Table: return self.table

    def __init__(self, columns: Sequence[Column[Row]], identity: Callable[[Row], Hashable] = lambda row: row, *,
                 id: str | None = None, empty: str = ""):
        super().__init__(id=id)
        self.columns, self.identity, self.empty = columns, identity, empty
        self.rows: list[Row] = []
        self.marked: set[Hashable] = set()
        self._layout_cache_key: tuple[int, int] | None = None
        self._fitted: list[tuple[Column[Row], int]] = []

    @property
    def row(self) -> Row | None:
        "The row under the cursor"
        return self.rows[self.cursor] if 0 <= self.cursor < len(self.rows) else None

    def show(self, rows: Sequence[Row]) -> None:
        "Take new rows: the cursor stays on its row, and only lines whose content changed are painted again"
        before, old = self.rows, self.row
        self.rows = list(rows)
        places = {self.identity(row): i for i, row in enumerate(self.rows)}
        self.marked &= places.keys()
        cursor = places.get(self.identity(old), self.cursor) if old is not None else self.cursor
        self.virtual_size = Size(0, len(self.rows) + 1)
        changed = [i for i in range(max(len(before), len(self.rows)))
                   if i >= len(before) or i >= len(self.rows) or before[i] != self.rows[i]]
        if not before or not self.rows: self.refresh()
        top, height = self.scroll_offset.y, self.size.height
        for i in changed:
            if top <= i < top + height: self._paint(i)
        cursor = max(0, min(cursor, len(self.rows) - 1))
        if cursor != self.cursor: self.cursor = cursor
        elif self.row != old: self.post_message(self.Moved(self, self.row))

    def toggle_mark(self) -> None:
        "Mark the row under the cursor, or take its mark away, and go one down"
        if self.row is None: return
        self.marked ^= {self.identity(self.row)}
        self._paint(self.cursor)
        self.action_move(1)

    def unmark(self) -> None:
        self.marked.clear()
        self.refresh()

    def _paint(self, index: int) -> None: self.refresh_line(index + 1)

    def watch_cursor(self, old: int, new: int) -> None:
        self._paint(old)
        self._paint(new)
        self.reveal()
        self.post_message(self.Moved(self, self.row))

    def watch_has_focus(self, _focus: bool) -> None:
        super().watch_has_focus(_focus)
        self._paint(self.cursor)

    def reveal(self) -> None:
        "Scroll so that the cursor's row is seen"
        top, room = self.scroll_offset.y, max(1, self.size.height - 1)
        if self.cursor < top: self.scroll_to(y=self.cursor, animate=False)
        elif self.cursor >= top + room: self.scroll_to(y=self.cursor - room + 1, animate=False)

    def on_resize(self) -> None: self.reveal()

    def action_move(self, by: int) -> None: self.cursor = max(0, min(len(self.rows) - 1, self.cursor + by))
    def action_page(self, by: int) -> None: self.action_move(by * max(1, self.size.height - 2))
    def action_jump(self, to: int) -> None: self.cursor = max(0, to % len(self.rows)) if self.rows else 0

    def on_click(self, event: events.Click) -> None:
        if event.y == 0:
            x = 1
            for column, width in self.fitted():
                if x <= event.x <= x + width: self.post_message(self.TitleClicked(self, column.key))
                x += width + self.gap
            return
        index = event.y - 1 + self.scroll_offset.y
        if not 0 <= index < len(self.rows): return
        if index == self.cursor and event.chain > 1: self.post_message(self.Chosen(self, self.rows[index]))
        self.cursor = index

    @property
    def gap(self) -> int:
        "Air between columns, where it costs none of them"
        room = self.scrollable_content_region.width - 1
        return 2 if sum(column.width + 2 for column in self.columns) - 2 <= room else 1

    def fitted(self) -> list[tuple[Column[Row], int]]:
        "The columns that fit the width, with the widths they get"
        width = self.scrollable_content_region.width - 1
        if self._layout_cache_key == (width, self.gap): return self._fitted
        shown = list(self.columns)
        def need(): return sum(column.width for column in shown) + self.gap * (len(shown) - 1)
        while len(shown) > 1 and need() > width:
            shown.remove(max((c for c in shown), key=lambda column: column.rank))
        spare, widths = max(0, width - need()), []
        for column in shown:
            extra = min(column.grow, spare)
            spare -= extra
            widths.append(column.width + extra)
        self._layout_cache_key, self._fitted = (width, self.gap), list(zip(shown, widths))
        return self._fitted

    def render_line(self, y: int) -> Strip:
        width = self.scrollable_content_region.width
        plain = self.get_component_rich_style("table--text")
        if y == 0: return self._titles(width)
        index = y - 1 + self.scroll_offset.y
        if index >= len(self.rows):
            text = self.empty if not self.rows and y == 2 else ""
            return Strip([Segment(set_cell_size("   " + text if text else "", width), self._style("dim"))])
        row = self.rows[index]
        if index == self.cursor and self.has_focus:
            ground = self.get_component_rich_style("table--cursor", partial=True)
        elif self.identity(row) in self.marked: ground = self.get_component_rich_style("table--marked", partial=True)
        else: ground = Style()
        sign = "◆" if self.identity(row) in self.marked else "▸" if index == self.cursor and self.has_focus else " "
        segments = [Segment(sign, self._style("accent") + ground)]
        for column, size in self.fitted():
            if len(segments) > 1: segments.append(Segment(" " * self.gap, plain + ground))
            segments += self._cell(column.cell(row, size), size, column.right, ground)
        return Strip(segments).adjust_cell_length(width, plain + ground).crop(0, width)

    def _cell(self, parts: Sequence[Part], size: int, right: bool, ground: Style) -> list[Segment]:
        used, segments = 0, []
        for text, name in parts:
            text = text if used + cell_len(text) <= size else set_cell_size(text, size - used)
            used += cell_len(text)
            segments.append(Segment(text, self._style(name) + ground))
        pad = Segment(" " * (size - used), self._style("text") + ground)
        return [pad, *segments] if right else [*segments, pad]

    def _style(self, name: str) -> Style: return self.get_component_rich_style(f"table--{name or 'text'}")

    def _titles(self, width: int) -> Strip:
        segments = [Segment(" ", self._style("title"))]
        for column, size in self.fitted():
            here = column.key == self.sorted_by
            title = column.title + (" ▼" if here and len(column.title) + 2 <= size else "")
            style = self._style("sorted" if here else "title")
            segments.append(Segment(title.rjust(size) if column.right else title.ljust(size), style))
            segments.append(Segment(" " * self.gap, self._style("title")))
        return Strip(segments).adjust_cell_length(width, self._style("title")).crop(0, width)
