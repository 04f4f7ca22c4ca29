"""Start a run: a profile, and every setting with its reason; only what you change is passed on."""
from __future__ import annotations

import json
import subprocess
from itertools import takewhile
from pathlib import Path
from typing import Any

from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.screen import Screen
from textual.widgets import Input, Label, Select, Static

from llm_trainer import config as settings
from llm_trainer.errors import LLMTrainerError
from llm_trainer.runs.launch import command, environment, take_devices
from llm_trainer.system.files import open_regular
from llm_trainer.tui.glyphs import line
from llm_trainer.tui.widgets.key_bar import KeyBar
from llm_trainer.tui.widgets.top_bar import TopBar


def shown(value: Any) -> str:
    "A value as one would type it; nothing for one that is derived from others"
    if value is None: return ""
    if isinstance(value, bool): return str(value).lower()
    if isinstance(value, float): return f"{value:g}"
    return line(value, 200)


def purpose(profile: Path) -> str:
    "What a profile says of itself: the comment at its head"
    try:
        with open_regular(profile, follow=True) as f: lines = f.read(65_536).decode(errors="replace").splitlines()
    except OSError as problem: return str(problem)
    return line(" ".join(row.lstrip("# ") for row in takewhile(lambda row: row.startswith("#"), lines)), 400)


class Field(Horizontal):
    """One setting: its name, what is typed, and what it may be or why it can't be that."""

    def __init__(self, knob: settings.Setting):
        super().__init__(classes="field", id=f"field-{knob.name}")
        self.knob, self.base = knob, ""

    def compose(self) -> ComposeResult:
        yield Label(self.knob.name, classes="name")
        yield Input(compact=True, id=f"value-{self.knob.name}", select_on_focus=False)
        yield Label(self.knob.expects, classes="hint", markup=False)

    @property
    def input(self) -> Input: return self.query_one(Input)

    @property
    def changed(self) -> bool: return self.input.value.strip() != self.base

    def reset(self, base: str, derived: str = "") -> None:
        "Show the profile's value, or faintly the one that follows from others"
        self.base = self.input.value = base
        self.input.placeholder = derived
        self.mark("")

    def mark(self, problem: str) -> None:
        "Say what is wrong with the value, or what it may be"
        self.set_class(bool(problem), "-wrong")
        self.set_class(self.changed, "-changed")
        self.query_one(".hint", Label).update(Content(problem or self.knob.expects))


class StartScreen(Screen[str | None]):
    """A form over `config.all_settings()`, checked by the config's own rules while you type."""

    BINDINGS = [
        Binding("escape", "leave", "Back", key_display="esc", tooltip="Back without starting anything"),
        Binding("ctrl+s", "start", "Start", key_display="^s", tooltip="Start the run", priority=True),
        Binding("ctrl+u", "undo", "Undo field", key_display="^u", tooltip="The profile's value again",
                priority=True),  # or the field takes it, and empties itself
        Binding("ctrl+f", "find", "Find", key_display="^f", tooltip="Find a setting by a part of its name",
                priority=True),
        Binding("down", "app.focus_next", "Next", show=False),
        Binding("up", "app.focus_previous", "Previous", show=False)]
    AUTO_FOCUS = "#profile"

    def compose(self) -> ComposeResult:
        names = list(settings.profiles(self.app.workspace.configs))
        first = self.app.workspace.config if self.app.workspace.config in names else names[0]
        yield TopBar()
        with Vertical(id="head"):
            with Horizontal(classes="field"):
                yield Label("profile", classes="name")
                yield Select([(line(name, 40), name) for name in names], value=first, allow_blank=False, id="profile",
                             compact=True)
            with Horizontal(classes="field"):
                yield Label("run name", classes="name")
                yield Input(compact=True, id="run-name", placeholder="two words")
                yield Label("small letters, digits and dashes", classes="hint")
            with Horizontal(classes="field"):
                yield Label("devices", classes="name")
                yield Input(compact=True, id="devices", placeholder="one")
                yield Label("how many, which (0,2), or auto", classes="hint")
            with Horizontal(classes="field"):
                yield Label("note", classes="name")
                yield Input(compact=True, id="note", placeholder="for you")
                yield Input(compact=True, id="find", placeholder="find a setting")
        with VerticalScroll(id="fields", can_focus=False):
            group = ""
            for knob in settings.all_settings().values():
                if knob.group != group:
                    yield Static(f"[{knob.group}]", classes="group", id=f"group-{knob.group}", markup=False)
                group = knob.group
                yield Field(knob)
        yield Static(id="about", markup=False)
        yield KeyBar()

    def on_mount(self) -> None:
        self.problem, self.starting = "", False
        self.query_one(TopBar).show(["llm_trainer", "new run"], [])
        self._profile()

    @on(Select.Changed, "#profile")
    def _profile(self) -> None:
        try: made = settings.load_config(self.query_one("#profile", Select).value, configs=self.app.workspace.configs)
        except (LLMTrainerError, OSError) as problem: return self._about(str(problem), True)
        flat, stated = made.flat(), made.model.model_fields_set
        for field in self.query(Field):
            name, value = field.knob.name, shown(flat[field.knob.name])
            if field.knob.group == "model" and field.knob.default is None and name not in stated: field.reset("", value)
            else: field.reset(value)
        self._check()

    def overrides(self) -> dict[str, Any]:
        "The settings that differ from the profile, typed"
        return {field.knob.name: None if field.knob.default is None and not field.input.value.strip()
                else field.knob.parse(field.input.value.strip())
                for field in self.query(Field) if field.changed}

    def config(self) -> settings.Config:
        return settings.load_config(self.query_one("#profile", Select).value, self.overrides(),
                                    self.app.workspace.configs)

    @property
    def devices(self) -> str | None: return self.query_one("#devices", Input).value.strip() or None

    @on(Input.Changed)
    def _changed(self, event: Input.Changed) -> None:
        if event.input.id == "find": return self._find(event.value)
        if event.input.id == "devices" or str(event.input.id).startswith("value-"): self._check()

    def _find(self, part: str) -> None:
        for field in self.query(Field):
            field.display = part.lower() in field.knob.name or part.lower() in field.knob.description.lower()
        found = {field.knob.group for field in self.query(Field) if field.display}
        for title in self.query(".group"): title.display = title.id.removeprefix("group-") in found

    def _check(self) -> None:
        "Ask the config itself; its words appear beside the field they are about"
        made, said = None, ""
        try:
            made = self.config()
            take_devices(self.devices, made.to_dict(), self.app.workspace.runs)
        except (LLMTrainerError, OSError) as problem: said = str(problem)
        self.problem = said
        for field in self.query(Field):
            mine = [text for text in said.splitlines()
                    if field.knob.name in text.split(":")[0].replace("--", "").split()]
            field.mark(line(mine[0].partition(": ")[2], 200) if mine and field.changed else "")
            if made is not None and field.knob.default is None:
                field.input.placeholder = shown(made.flat()[field.knob.name])
        changed = len(self.overrides())
        facts = [f"{changed} changed" if changed else "the profile as it is"]
        if said: facts.append("not valid yet")
        self.query_one(TopBar).show(["llm_trainer", "new run"], facts)
        if said: self._about(said.splitlines()[0], True)
        elif made is not None: self._describe()

    def on_descendant_focus(self) -> None: self._describe()

    def _describe(self) -> None:
        field = self.focused.parent if self.focused is not None and isinstance(self.focused.parent, Field) else None
        if self.problem: return self._about(self.problem.splitlines()[0], True)
        if self.focused is self.query_one("#profile"):
            chosen = self.query_one("#profile", Select).value
            return self._about(purpose(settings.profiles(self.app.workspace.configs)[chosen]))
        if field is None: return self._about("^s starts the run. It goes on when you close the watcher.")
        self._about(f"{field.knob.name}: {field.knob.description}. Default: {shown(field.knob.default) or 'derived'}.")

    def _about(self, text: str, wrong: bool = False) -> None:
        self.query_one("#about", Static).update(Content.styled(line(text, 400), "$error" if wrong else ""))

    def action_leave(self) -> None: self.dismiss(None)

    def action_find(self) -> None: self.set_focus(self.query_one("#find"))

    def action_undo(self) -> None:
        if self.focused is not None and isinstance(self.focused.parent, Field):
            field = self.focused.parent
            field.reset(field.base, field.input.placeholder)
            self._check()

    def action_start(self) -> None:
        if self.problem: return self._about(self.problem.splitlines()[0], True)
        if self.starting: return
        self.starting = True
        self._about("looking at what is named …")
        given = {field.knob.name: field.input.value.strip() for field in self.query(Field) if field.changed}
        given |= {"name": self.query_one("#run-name", Input).value.strip(),
                  "note": self.query_one("#note", Input).value.strip(), "devices": self.devices}
        self._start(["train", "--config", self.query_one("#profile", Select).value, "--background", "--json",
                     *(f"--{name}={text}" for name, text in given.items() if text)])

    @work(thread=True, group="start")
    def _start(self, words: list[str]) -> None:
        "By the command line, in a process of its own: it finds and checks what is named, and may load torch for it"
        done = subprocess.run(command(*words), env=environment(self.app.workspace),
                              stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
        self.app.call_from_thread(self._started, done)

    def _started(self, done: subprocess.CompletedProcess[str]) -> None:
        self.starting = False
        if done.returncode: return self._about(done.stderr.removeprefix("llm-trainer: "), True)
        run_id = json.loads(done.stdout)["run_id"]
        self.app.notify(f"{run_id} is on its way; it goes on when you close the watcher.")
        if self.is_current: self.dismiss(run_id)
