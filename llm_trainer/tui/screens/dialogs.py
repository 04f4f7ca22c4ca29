"""Small screens over a screen: a question, the help, and what to copy."""
from __future__ import annotations

from rich.cells import cell_len
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen, Screen
from textual.widgets import Button, OptionList, Static
from textual.widgets.option_list import Option

from llm_trainer.runs.state import STATES
from llm_trainer.tui.glyphs import line
from llm_trainer.tui.readers import RunRow
from llm_trainer.workspace import Workspace


class AskScreen(ModalScreen[str]):
    """A question with its answers as buttons; the first one is chosen at the start and by escape."""

    BINDINGS = [Binding("escape", "dismiss('no')", "Back", key_display="esc"),
                Binding("left,up", "app.focus_previous", "Previous", show=False),
                Binding("right,down", "app.focus_next", "Next", show=False)]

    def __init__(self, title: str, text: str, answers: dict[str, str]):
        super().__init__()
        self.heading, self.text, self.answers = title, text, answers

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog") as box:
            box.border_title, box.border_subtitle = Content(line(self.heading,
                                                                 60)), "←→ choose, enter answers, esc goes back"
            yield Static(Content(self.text))
            with Horizontal(classes="buttons"):
                for key, label in self.answers.items(): yield Button(label, id=f"answer-{key}", compact=True)

    def on_button_pressed(self, event: Button.Pressed) -> None: self.dismiss(event.button.id.removeprefix("answer-"))


class HelpScreen(ModalScreen[None]):
    """The keys of the screen below and what the signs mean."""

    BINDINGS = [Binding("escape,question_mark,q,enter", "dismiss", "Close", key_display="esc")]

    def __init__(self, below: Screen):
        super().__init__()
        self.below = below

    def compose(self) -> ComposeResult:
        with VerticalScroll(classes="dialog wide") as box:
            box.border_title, box.border_subtitle = "Help", "esc closes"
            yield Static(self._text())

    def _text(self) -> Content:
        keys, seen = [], set()
        for _, binding, _, tooltip in self.below.active_bindings.values():
            if binding.system or not binding.description or binding.action in seen: continue
            if not (binding.show or binding.tooltip): continue
            seen.add(binding.action)
            keys.append((self.app.get_key_display(binding), tooltip or binding.tooltip or binding.description))
        text = [Content("Closing the watcher (q) never stops training: runs are processes of their own."),
                Content.styled("\nKeys", "bold $primary")]
        for key, meaning in [*keys, ("↑↓ j k", "Move; page up and down, home and end too"),
                             ("tab", "To the next part of the screen")]:
            text.append(Content.assemble((" " * max(0, 8 - cell_len(key)) + key, "bold"), "  ", meaning))
        text.append(Content.styled("\nStates", "bold $primary"))
        for state, look in STATES.items():
            text.append(Content.assemble((f"{look.sign} {state:<10}", f"${look.colour}"), "  ", look.meaning))
        text.append(Content.styled("\nIn a shell: llm-trainer status, runs, logs, stop, resume, generate\n"
                                   f"Workspace: {line(self.app.workspace.root)}", "$foreground 60%"))
        return Content("\n").join(text)


class CopyScreen(ModalScreen[None]):
    """Puts a name, a path or a command into the clipboard of the terminal."""

    BINDINGS = [Binding("escape", "dismiss", "Back", key_display="esc"), Binding("j", "app.press('down')", show=False),
                Binding("k", "app.press('up')", show=False)]

    def __init__(self, row: RunRow, workspace: Workspace):
        super().__init__()
        run = row.id
        self.choices = [("name", run), ("next command", row.command), ("status", f"llm-trainer status {run}"),
                        ("watch", f"llm-trainer watch {run}"), ("resume", f"llm-trainer resume {run} --more-epochs 1"),
                        ("generate", f"llm-trainer generate {run} --prompt 'The '"),
                        ("run folder", line(workspace.runs / run)), ("checkpoints", line(workspace.checkpoints / run))]
        if row.reason: self.choices.append(("reason", row.reason))

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog wide") as box:
            box.border_title, box.border_subtitle = "Copy", "enter copies, esc goes back"
            yield OptionList(*(Option(Content.assemble((f"{name:<14}", "$foreground 60%"), value)) for name,
                               value in self.choices),
                             compact=True)

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        name, value = self.choices[event.option_index]
        self.app.copy_to_clipboard(value)
        self.app.notify(value, title=f"Copied: {name}", timeout=4)
        self.dismiss()
