"""The world of the watcher's tests: copies of the recorded runs, a frozen clock, and what a screen shows as text."""
from __future__ import annotations

import asyncio
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from textual.pilot import Pilot
from textual.widgets import Input, TextArea

from llm_trainer import workspace
from llm_trainer.host import Lock
from llm_trainer.tui.app import WatchApp, make_app
from llm_trainer.workspace import Workspace

FIXTURES = Path(__file__).parent / "fixtures"
sys.path.insert(0, str(FIXTURES))
from record_runs import NOW  # noqa: E402

RUNNING, FINISHED, FAILED, CRASHED, STOPPED, DIVERGED = (
    "clear-otter-3fa9", "brave-wren-77c0", "dawn-reef-0b1e", "late-heron-93d4", "quiet-larch-5a6b", "wise-crane-e1d2")
CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class World:
    """A workspace with the recorded runs, of which one is alive because we hold its lock."""

    def __init__(self, root: Path, recorded: bool = True, checkpoints: bool = True):
        self.space: Workspace = workspace.init(root)
        shutil.copytree(FIXTURES.parent.parent / "configs", self.space.configs, dirs_exist_ok=True)
        self.locks: list[Lock] = []
        if recorded:
            shutil.copytree(FIXTURES / "runs", self.space.runs, dirs_exist_ok=True)
            for folder in self.space.runs.iterdir(): (folder / "lock").touch(); (folder / "control" / ".keep").unlink()
            self.hold(RUNNING)
            if checkpoints:
                self.save(RUNNING, {100: 3.6, 150: 3.2, 200: 2.98})
                self.save(FINISHED, {300: 2.87, 347: 2.85})

    def hold(self, name: str) -> None:
        "Look alive: what a worker does"
        lock = Lock(self.space.runs / name / "lock")
        assert lock.acquire()
        self.locks.append(lock)

    def save(self, name: str, losses: dict[int, float]) -> None:
        "Real, if small, checkpoints"
        from llm_trainer.checkpoint import Checkpoints
        store = Checkpoints(self.space.checkpoints / name, name, keep=0, notify=lambda text: None)
        for step, loss in losses.items():
            store.save(step, lambda folder: (folder / "model.safetensors").write_bytes(bytes(8_000)) and None)
            store.record(step, loss)
        store.verify()

    def close(self) -> None:
        for lock in self.locks: lock.release()

    def app(self, run: str | None = None, **options) -> WatchApp:
        return make_app(self.space, run, **{"clock": lambda: NOW, "interval": 0.05, "ascii_only": False, **options})


def text_of(app: WatchApp) -> str:
    "What the screen shows, line by line"
    return "\n".join("".join(segment.text for segment in strip) for strip in app.screen._compositor.render_strips())


async def until(pilot: Pilot, true: Callable[[], object], seconds: float = 12.0) -> None:
    "Wait for something that polling brings; fails with what the screen shows instead"
    for _ in range(int(seconds / 0.05)):
        await pilot.pause()
        if true(): return
        await asyncio.sleep(0.05)
    raise AssertionError(f"it did not happen; the screen shows\n{text_of(pilot.app)}")


async def shows(pilot: Pilot, *parts: str, seconds: float = 12.0) -> str:
    "Wait until the screen shows all parts; gives its text"
    await until(pilot, lambda: all(part in text_of(pilot.app) for part in parts), seconds)
    return text_of(pilot.app)


async def press(pilot: Pilot, *keys: str) -> None:
    for key in keys:
        await pilot.press(key)
        await pilot.pause()


def still(app: WatchApp) -> None:
    "Stop what blinks"
    for box in app.screen.query("Input, TextArea"):
        assert isinstance(box, Input | TextArea)
        box.cursor_blink = False


async def told(pilot: Pilot, *parts: str) -> None:
    "Wait for a notice that holds all parts"
    await until(pilot, lambda: any(all(part in f"{note.title} {note.message}" for part in parts) for note in pilot.app._notifications))
