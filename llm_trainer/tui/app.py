"""The app: themes, the keys that work everywhere, and the first screen."""
from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from textual import events
from textual.app import App, SystemCommand
from textual.binding import Binding
from textual.screen import Screen
from textual.theme import Theme

from llm_trainer import workspace as workspaces
from llm_trainer.tui.generator import Generator
from llm_trainer.tui.glyphs import Border, line
from llm_trainer.tui.type_ahead import TypeAhead
from llm_trainer.workspace import Workspace

NIGHT = Theme(
    name="night", primary="#7aa2f7", secondary="#7dcfff", accent="#bb9af7", success="#9ece6a", warning="#e0af68",
    error="#f7768e", foreground="#c8d0e0", background="#12141c", surface="#181b25", panel="#222735", dark=True,
    variables={"footer-key-foreground": "#7aa2f7", "block-cursor-text-style": "none", "border-blurred": "#2b3144"})
PAPER = Theme(
    name="paper", primary="#2f5fb3", secondary="#1f7a8c", accent="#7a4fb5", success="#3d7a1e", warning="#9a6300",
    error="#b3263e", foreground="#2b2f38", background="#fafaf7", surface="#f1f1ec", panel="#e4e4dc", dark=False,
    variables={"footer-key-foreground": "#2f5fb3", "block-cursor-text-style": "none", "border-blurred": "#c9c9bf"})


def wants_ascii() -> bool:
    "True where the terminal can't show more: asked for, another encoding than UTF-8, or the plain Linux console"
    if (wish := os.environ.get("LLM_TRAINER_ASCII")) is not None: return wish not in ("", "0")
    every, letters, rest = (os.environ.get(name, "") for name in ("LC_ALL", "LC_CTYPE", "LANG"))
    if letters in ("C.UTF-8", "C.utf8", "UTF-8") and rest in ("C", "POSIX"):
        letters = ""  # Python's own doing, not the user's
    if (every or letters or rest) in ("C", "POSIX"): return True
    encoding = (getattr(sys.__stdout__, "encoding", None) or "utf-8").lower()
    return "utf" not in encoding or os.environ.get("TERM") == "linux"


def _to_tmux(text: str) -> None:
    "`-w` passes it on to the outer terminal; tmux before 3.2 knows only the buffer"
    for flags in (["-w"], []):
        try:
            done = subprocess.run(["tmux", "load-buffer", *flags, "-"], input=text.encode(), capture_output=True,
                                  timeout=5)
        except (OSError, subprocess.TimeoutExpired): return
        if done.returncode == 0: return


class WatchApp(App[None]):
    """Shows a workspace's runs. Everything is read from disk; closing it changes nothing."""

    CSS_PATH = "watch.tcss"
    TITLE = "llm-trainer watch"
    ENABLE_COMMAND_PALETTE = True
    BINDINGS = [
        Binding("question_mark", "help", "Help", key_display="?", tooltip="Keys and signs of this screen"),
        Binding("f1", "help", "Help", key_display="F1", tooltip="Keys and signs of this screen"),
        Binding("ctrl+p", "command_palette", "All", key_display="^p", tooltip="Every action, by name", priority=True),
        Binding("q", "quit", "Quit (training goes on)", tooltip="Close the watcher; no run stops"),
        Binding("ctrl+q", "quit", "Quit (training goes on)", key_display="^q",
                tooltip="Close the watcher; no run stops", priority=True),
        # before the key that follows: over a slow line both come at once, and that one would go to the old field
        Binding("tab", "focus_next", show=False, priority=True),
        Binding("shift+tab", "focus_previous", show=False, priority=True)]

    def __init__(self, workspace: Workspace, run: str | None = None, *, clock: Callable[[], float] = time.time,
                 interval: float = 0.5, ascii_only: bool | None = None):
        super().__init__()
        self.workspace, self.first_run, self.clock, self.interval = workspace, run, clock, interval
        self.border = Border(wants_ascii() if ascii_only is None else ascii_only)
        self.generator = Generator(workspace)
        self.typed = TypeAhead(self, super().on_event)
        for theme in (NIGHT, PAPER): self.register_theme(theme)
        if "TEXTUAL_THEME" not in os.environ: self.theme = "night"
        if "TEXTUAL_ANIMATIONS" not in os.environ:
            self.animation_level = "none"  # frames between frames fill a slow line

    def get_line_filters(self) -> list: return [self.border, *super().get_line_filters()]

    def on_mount(self) -> None:
        from llm_trainer.tui.screens.runs import RunsScreen
        self.push_screen(RunsScreen())
        if self.first_run: self.open_run(self.first_run)

    def open_run(self, run_id: str) -> None:
        "Show one run; the plotting code is loaded here, not before"
        from llm_trainer.runs.run import Run
        from llm_trainer.tui.readers import row_of
        from llm_trainer.tui.screens.run import RunScreen
        rows = (row for screen in self.screen_stack for row in getattr(screen, "rows", ()))
        known = next((row for row in rows if row.id == run_id), None)
        self.push_screen(RunScreen(known or row_of(Run(self.workspace.runs / run_id), self.clock())))

    async def on_event(self, event: events.Event) -> None:
        if isinstance(event, events.Key | events.Paste) and not event.is_forwarded: self.typed.put(event)
        else: await super().on_event(event)

    def action_press(self, key: str) -> None: self.typed.put(events.Key(key, None), first=True)

    def action_help(self) -> None:
        from llm_trainer.tui.screens.dialogs import HelpScreen
        if not isinstance(self.screen, HelpScreen): self.push_screen(HelpScreen(self.screen))

    def notify(self, message: str, **options) -> None:
        "A notice of clean text, never parsed as markup"
        options.setdefault("markup", False)
        options["title"] = line(options.get("title", ""), 60)
        super().notify(line(message, 300), **options)

    def copy_to_clipboard(self, text: str) -> None:
        "To the terminal's clipboard and, where tmux is between, to its buffer: it takes nothing else from a program"
        super().copy_to_clipboard(text)
        if os.environ.get("TMUX"): self.run_worker(lambda: _to_tmux(text), thread=True, group="clipboard")

    def get_system_commands(self, screen: Screen) -> Iterable[SystemCommand]:
        "Every key of the screen under the palette, then the themes and the picture"
        seen = set()
        for node, binding, enabled, tooltip in screen.active_bindings.values():
            if not enabled or binding.system or not binding.description or binding.action in seen: continue
            if binding.action in ("command_palette", "app.command_palette") or not (binding.show or binding.tooltip):
                continue
            seen.add(binding.action)
            key = self.get_key_display(binding)
            yield SystemCommand(f"{binding.description}  [{key}]".replace("[", "(").replace("]", ")"),
                                tooltip or binding.tooltip or binding.description,
                                lambda action=binding.action, node=node: self.call_later(self.run_action, action, node))
        yield SystemCommand("Theme", "Choose the colours", self.action_change_theme)
        yield SystemCommand("Picture", "Save this screen as SVG", lambda: self.set_timer(0.1, self.deliver_screenshot))

    async def on_unmount(self) -> None:
        self.typed.close()
        await self.generator.close()


def make_app(workspace: Workspace | Path | str | None = None, run: str | None = None, **options) -> WatchApp:
    "The app over a workspace (or a folder in one), for the command line and for tests"
    if not isinstance(workspace, Workspace): workspace = workspaces.find(workspace)
    return WatchApp(workspace, run, **options)


def watch(workspace: Workspace | Path | str | None = None, run: str | None = None) -> int:
    "Run the watcher until the user leaves; says where the runs are and which go on. Returns the exit code"
    from llm_trainer.runs.run import find_run
    from llm_trainer.tui.readers import Overview
    app = make_app(workspace)
    if run is not None: app.first_run = find_run(app.workspace.runs, run).id
    app.run()
    live = [row.id for row in Overview(app.workspace, app.clock).poll() if row.live]
    print(f"Runs: {app.workspace.runs}")
    if live:
        print(f"Training goes on: {', '.join(live[:3])}{' …' if len(live) > 3 else ''}")
        print(f"Back to it: llm-trainer watch {live[0]}")
    return app.return_code or 0
