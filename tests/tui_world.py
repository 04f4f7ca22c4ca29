"""The world of the watcher's tests: copies of the recorded runs, a frozen clock, and what a screen shows as text.

Nothing here sleeps and hopes: a loaded machine is late, so everything is waited for, with a generous limit."""
from __future__ import annotations

import asyncio
import json
import re
import shutil
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

from textual import events
from textual._wait import wait_for_idle
from textual.keys import _character_to_key
from textual.pilot import Pilot
from textual.widgets import Input, TextArea
from torture.battery import kept_folder

from llm_trainer import workspace
from llm_trainer.system.locks import Lock
from llm_trainer.events import silent
from llm_trainer.runs.run import Run
from llm_trainer.tui.app import WatchApp, make_app
from llm_trainer.workspace import Workspace

FIXTURES = Path(__file__).parent / "fixtures"
sys.path.insert(0, str(FIXTURES))
from record_runs import NOW  # noqa: E402

RUNNING, FINISHED, FAILED, CRASHED, STOPPED, DIVERGED = (
    "clear-otter-3fa9", "brave-wren-77c0", "dawn-reef-0b1e", "late-heron-93d4", "quiet-larch-5a6b", "wise-crane-e1d2")
LIMIT = 60.0  # seconds that anything may take
CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class World:
    """A workspace with the recorded runs, of which one is alive because we hold its lock."""

    def __init__(self, root: Path, recorded: bool = True, checkpoints: bool = True):
        self.space: Workspace = workspace.init(root)
        shutil.copytree(FIXTURES.parent.parent / "configs", self.space.configs, dirs_exist_ok=True)
        self.locks: list[Lock] = []
        if recorded:
            shutil.copytree(past(checkpoints), root, dirs_exist_ok=True)
            self.hold(RUNNING)

    def hold(self, name: str) -> None:
        "Look alive: what a worker does"
        lock = Lock(self.space.runs / name / "lock")
        assert lock.acquire()
        self.locks.append(lock)

    def save(self, name: str, losses: dict[int, float]) -> None:
        "Checkpoints with small weights and the record of training that a resume is planned by"
        from llm_trainer.training.checkpoint import Checkpoints
        run = Run(self.space.runs / name)
        config, (attempt,) = run.config(), run.attempts()
        train, steps = config["training"], attempt["target_steps"]
        batch = train["batch_size"] * train["grad_accum_steps"]
        record = {"format_version": 1, "config": config, "target_position": steps * batch, "target_step": steps,
                  "schedule": {
            "kind": train["schedule"], "total": steps, "peak_lr": train["lr"], "warmup": train["warmup_steps"],
            "min_ratio": train["min_lr"] / train["lr"], "decay_fraction": train["decay_fraction"], "before": None}}
        store = Checkpoints(self.space.checkpoints / name, name, keep=0, emit=silent)

        def write(folder: Path, step: int) -> None:
            (folder / "model.safetensors").write_bytes(bytes(8_000))
            (folder / "state").mkdir()
            reached = {"step": step, "position": step * batch, "epoch": attempt["target_epochs"] * step / steps}
            (folder / "state" / "trainer.json").write_text(json.dumps({**record, **reached}))
        for step, loss in losses.items():
            store.save(step, lambda folder, step=step: write(folder, step))
            store.record(step, loss)
        store.verify()

    def close(self) -> None:
        for lock in self.locks: lock.release()

    def app(self, run: str | None = None, **options) -> WatchApp:
        return make_app(self.space, run, **{"clock": lambda: NOW, "interval": 0.05, "ascii_only": False, **options})


@cache
def past(checkpoints: bool) -> Path:
    "A workspace with the recorded runs, made once"
    world = World(kept_folder("recorded-"), recorded=False)
    shutil.copytree(FIXTURES / "runs", world.space.runs, dirs_exist_ok=True)
    for folder in world.space.runs.iterdir():
        (folder / "lock").touch()
        (folder / "control" / ".keep").unlink()
    if checkpoints:
        world.save(RUNNING, {100: 3.6, 150: 3.2, 200: 2.98})
        world.save(FINISHED, {300: 2.87, 347: 2.85})
    return world.space.root


def text_of(app: WatchApp) -> str:
    "What the screen shows, line by line"
    return "\n".join("".join(segment.text for segment in strip) for strip in app.screen._compositor.render_strips())


async def until(pilot: Pilot, true: Callable[[], object], seconds: float = LIMIT) -> None:
    "Wait for something that polling brings; fails with what the screen shows instead"
    end = time.monotonic() + seconds
    while True:
        late = time.monotonic() > end
        await pilot.pause(0)
        if true(): return await wait_for_idle(0, 0.2)  # it paints; what polls is never idle, and no limit means 1 s
        if late: raise AssertionError(f"it did not happen; the screen shows\n{text_of(pilot.app)}")
        await asyncio.sleep(0.05)


async def shows(pilot: Pilot, *parts: str, seconds: float = LIMIT) -> str:
    "Wait until the screen shows all parts; gives its text"
    await until(pilot, lambda: all(part in text_of(pilot.app) for part in parts), seconds)
    return text_of(pilot.app)


def all_heard(app: WatchApp) -> bool:
    "Has every key that was typed done what it does?"
    return not app.typed.waiting and (app.typed.task is None or app.typed.task.done())


async def press(pilot: Pilot, *keys: str) -> None:
    "Type like somebody who looks: a screen that a key opens is there, and has the focus, before the next key"
    app = pilot.app
    for key in keys:
        came = asyncio.Event()
        app.post_message(events.Key(_character_to_key(key), key) if len(key) == 1 else events.Key(key, None))
        app.post_message(events.Callback(callback=came.set))
        await until(pilot, lambda came=came: (came.is_set() or not app.is_running) and all_heard(app)
                    and (screen := app.screen).is_mounted and (screen.focused or not screen.focus_chain))


async def settle(pilot: Pilot) -> None:
    "Wait until the screen holds still, with nothing blinking"
    same, before = 0, None
    end = time.monotonic() + LIMIT
    while same < 6:
        assert time.monotonic() < end, f"it does not hold still\n{text_of(pilot.app)}"
        for box in pilot.app.screen.query("Input, TextArea"):
            assert isinstance(box, Input | TextArea)
            box.cursor_blink = False
        await pilot.pause(0.1)
        now = [list(strip) for strip in pilot.app.screen._compositor.render_strips()]
        same, before = same + 1 if now == before else 0, now


async def told(pilot: Pilot, *parts: str) -> None:
    "Wait for a notice that holds all parts"
    await until(pilot, lambda: any(all(part in f"{note.title} {note.message}" for part in parts)
                                   for note in pilot.app._notifications))
