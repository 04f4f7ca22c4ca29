"""The footer: every key of the screen on as many lines as it needs, and the promise about quitting."""
from __future__ import annotations

from rich.cells import cell_len
from textual import events
from textual.app import RenderResult
from textual.content import Content
from textual.geometry import Size
from textual.widget import Widget
from textual.widgets import Input, TextArea


class KeyBar(Widget):
    """Shows the active bindings of its screen; a click on one does what the key does."""

    ALLOW_SELECT = False

    shown: list = []

    def on_mount(self) -> None: self.screen.bindings_updated_signal.subscribe(self, self._changed)

    def on_unmount(self) -> None: self.screen.bindings_updated_signal.unsubscribe(self)

    def _changed(self, _screen: object) -> None:
        if not self.is_attached: return
        rows, before = self.lines(self.size.width), self.shown
        self.shown = rows
        if rows != before: self.refresh(layout=len(rows) != len(before))

    def entries(self) -> list[tuple[str, str, str, bool]]:
        "Key as shown, label, key to press (none for a group) and whether it does something now"
        found, seen, typing = [], set(), isinstance(self.screen.focused, Input | TextArea)
        own = [*self.screen._bindings.key_to_bindings, *self.app._bindings.key_to_bindings]
        def rank(item):
            key, active = item
            if active.binding.action == "quit": return 1, len(key)  # last, q before ^q
            return 0, own.index(key) if key in own else -1  # what has the focus, the screen, the app
        for _, (_, binding, enabled, _) in sorted(self.screen.active_bindings.items(), key=rank):
            if not binding.show or binding.action in seen: continue
            if typing and len(self.app.get_key_display(binding)) == 1: continue
            seen.add(binding.action)
            if binding.group is None:
                key = self.app.get_key_display(binding)
                found.append((key, binding.description, binding.key, enabled))
            elif binding.group.description not in seen:
                seen.add(binding.group.description)
                key, _, label = binding.group.description.partition(" ")
                found.append((key, label, "", enabled))
        return found

    def lines(self, width: int) -> list[list[tuple[str, str, str, bool]]]:
        "The entries, as many on a line as fit"
        rows: list[list[tuple[str, str, str, bool]]] = [[]]
        used = 0
        for entry in self.entries():
            size = cell_len(entry[0]) + 1 + cell_len(entry[1])
            if rows[-1] and used + 2 + size > width:
                rows.append([])
                used = 0
            used += size + (2 if rows[-1] else 0)
            rows[-1].append(entry)
        return [row for row in rows if row]

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        # where it is low the runs come first; ? has all keys
        return max(1, min(len(self.lines(width)), viewport.height // 6))

    def render(self) -> RenderResult:
        def text(key, label, on):
            return Content.assemble((key, "bold $primary" if on else "$foreground 35%"), " ",
                                    (label, "$foreground 85%" if on else "$foreground 35%"))
        return Content("\n").join(Content("  ").join(text(key, label, on) for key, label, _, on in row)
                                  for row in self.lines(self.size.width))

    def on_click(self, event: events.Click) -> None:
        "Press the key that was clicked"
        place, rows = event.get_content_offset(self), self.lines(self.size.width)
        if place is None or place.y >= len(rows): return
        x = 0
        for key, label, press, on in rows[place.y]:
            end = x + cell_len(key) + 1 + cell_len(label)
            if x <= place.x < end and press and on: self.app.simulate_key(press)
            x = end + 2
