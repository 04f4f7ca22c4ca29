"""The watcher with real processes: a run that trains while it is watched, a terminal whose every byte is counted."""
from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from textual.widgets import Input, Select
from tui_world import CONTROL, LIMIT, RUNNING, World, press, shows, text_of, told, until

from llm_trainer.runs import launch
from llm_trainer.runs.run import Run

SLOW = 300.0  # seconds for what processes do that load torch and train, on two cores that others use as well


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path / "runs" / "first-try")
    yield run
    launch.stop(run, now=True)


async def test_start_watch_resume_stop_and_generate(tmp_path, run):
    """Someone starts a model from the form, sees it finish, trains on, sees numbers move, stops it, writes with it."""
    world = World(tmp_path, recorded=False)
    app = world.app(clock=time.time, interval=0.2)
    async with app.run_test(size=(160, 30)) as pilot:
        await shows(pilot, "No run yet")
        await press(pilot, "n")
        await shows(pilot, "[model]")
        app.screen.query_one("#profile", Select).value = "tiny"
        await until(pilot, lambda: app.screen.query_one("#value-n_embd", Input).value == "32")
        app.screen.query_one("#value-epochs", Input).value = "1"
        app.screen.query_one("#run-name", Input).value = "first-try"
        app.screen.query_one("#note", Input).value = "my first model"
        await shows(pilot, "1 changed")
        await press(pilot, "ctrl+s")
        await shows(pilot, "first-try", "my first model", seconds=SLOW)
        await shows(pilot, "✓ completed", "epoch 1.0/1", "validation", seconds=SLOW)

        await press(pilot, "e")
        await shows(pilot, "nothing left to train")
        await press(pilot, *"300")
        await shows(pilot, "The plan", "epoch 301", "more, about", seconds=SLOW)
        await press(pilot, "enter")
        await shows(pilot, "● training", "ETA", seconds=SLOW)
        first = app.screen.row.step
        await until(pilot, lambda: app.screen.row.step > first and app.screen.row.loss is not None, SLOW)
        drawn = app.screen.reader.curves.train.last("step")
        await until(pilot, lambda: app.screen.reader.curves.train.last("step") > drawn, SLOW)

        await press(pilot, "w")
        await told(pilot, "will save")
        saved = app.screen.row.checkpoint
        await until(pilot, lambda: app.screen.row.checkpoint > saved, SLOW)
        await press(pilot, "x")
        await shows(pilot, "Stop first-try?")
        await press(pilot, "right", "enter")
        await shows(pilot, "■ stopped", "Press e to go on", seconds=SLOW)
        assert not run.locked

        await press(pilot, "g")
        await shows(pilot, "^g writes")
        app.screen.query_one("#knob-max_new_tokens", Input).value = "12"
        app.screen.query_one("#knob-temperature", Input).value = "0"
        await press(pilot, "ctrl+g")
        await shows(pilot, " tokens in ", seconds=SLOW)
        process = app.generator.process
        assert app.screen.text and not CONTROL.search(text_of(app))
        await press(pilot, "ctrl+g")
        await until(pilot, lambda: app.generator.number == 2 and not app.screen.busy, SLOW)
        assert app.generator.process is process and process.returncode is None
        app.screen.query_one("#knob-temperature", Input).value = "-1"
        await press(pilot, "ctrl+g")
        await shows(pilot, "temperature must be")
        app.screen.query_one("#knob-temperature", Input).value = "hot"
        await press(pilot, "ctrl+g")
        await shows(pilot, "temperature must be a number")
        process.kill()
        await process.wait()
        app.screen.query_one("#knob-temperature", Input).value = "1"
        await press(pilot, "ctrl+g")
        await shows(pilot, " tokens in ", seconds=SLOW)
        child = app.generator.process
    assert child.returncode is not None


# Textual's own: CSI, and the shape of the pointer
SEQUENCE = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\]22;[a-z-]*\x07")
EVIL = "\x1b]0;owned\x07\x1b]52;c;aGk=\x07\x9b2J\u202e\x08[/][bold]owned[/]"


class Feeder(threading.Thread):
    """Writes what a training process writes, four times a second, with text that would like to reach the terminal."""

    def __init__(self, folder: Path):
        super().__init__(daemon=True)
        self.folder, self.done = folder, threading.Event()
        self.state = json.loads((folder / "state.json").read_text())

    def run(self) -> None:
        step = self.state["step"]
        while not self.done.wait(0.25):
            step += 1
            self.state.update(step=step, steps=9000, loss=2 + 50 / step, progress_at=time.time(), heartbeat=time.time(),
                              eta_seconds=9000 - step, tokens_per_second=8000 + step % 100)
            (self.folder / ".next").write_text(json.dumps(self.state))
            os.replace(self.folder / ".next", self.folder / "state.json")
            with open(self.folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps({"kind": "train", "attempt": 1, "step": step, "time": time.time(), "loss": 2 + 50
                                       / step, "lr": 1e-3, "tokens": step * 2048}) + "\n")
            with open(self.folder / "train.log", "a") as file: file.write(f"step {step} {EVIL}\n")
            with open(self.folder / "samples.jsonl", "a") as file:
                if step % 4 == 0: file.write(json.dumps({"step": step, "prompt": "x", "text": EVIL * 3}) + "\n")


def tmux(socket: str, *words: str) -> str:
    return subprocess.run(["tmux", "-L", socket, *words], check=True, capture_output=True, text=True).stdout


LINE = 20_000  # Bytes a second, more than what changes on a screen may take


@pytest.mark.skipif(shutil.which("tmux") is None, reason="needs tmux")
def test_bytes_on_a_slow_line_and_no_sequence_from_data(tmp_path):
    world = World(tmp_path / "space")
    (world.space.runs / RUNNING / "notes.txt").write_text(EVIL)
    feeder, stream, go = Feeder(world.space.runs / RUNNING), tmp_path / "stream", tmp_path / "go"
    code = f"import sys; from llm_trainer.tui.app import watch; sys.exit(watch({str(world.space.root)!r}))"
    start = f'LC_ALL=C.UTF-8 COLORTERM=truecolor exec {sys.executable} -c "{code}"'
    shell = f"while [ ! -e {go} ]; do sleep 0.1; done; {start}"
    socket = f"llm-trainer-test-{os.getpid()}"
    def seen(): return tmux(socket, "capture-pane", "-p")

    def rate() -> float:
        before, started = stream.stat().st_size, time.monotonic()
        time.sleep(1.5)
        return (stream.stat().st_size - before) / (time.monotonic() - started)

    def come(true) -> None:
        end = time.monotonic() + LIMIT
        while not true():
            assert time.monotonic() < end, seen()
            time.sleep(0.1)

    def wait(*parts: str) -> None: come(lambda: all(map(seen().__contains__, parts)))
    feeder.start()
    try:
        tmux(socket, "-f", "/dev/null", "new-session", "-d", "-x", "80", "-y", "24", shell)
        tmux(socket, "pipe-pane", "-o", f"cat > {stream}")
        go.touch()
        wait(RUNNING, "● training")
        rates = {}
        for part, key, sign in (("runs", "", RUNNING), ("loss", "Enter", "1 Loss"), ("rates", "2", "gradient norm"),
                                ("samples", "3", "[bold]owned"), ("log", "4", "[bold]owned")):
            if key: tmux(socket, "send-keys", key)
            wait(sign)
            come(lambda: rate() < LINE)  # the picture is through, and what changes is left
            come(lambda part=part: rates.update({part: rate()}) or rates[part])
        tmux(socket, "send-keys", "q")
        come(lambda: b"\x1b[?1049l" in stream.read_bytes())
    finally:
        feeder.done.set()
        subprocess.run(["tmux", "-L", socket, "kill-server"], capture_output=True)
        world.close()
    print({part: f"{rate:,.0f} B/s" for part, rate in rates.items()})
    assert all(rate < LINE for rate in rates.values()), rates
    text = stream.read_bytes().decode("utf-8", "replace")
    rest = SEQUENCE.sub("", text).replace("\r", "").replace("\n", "")
    found = CONTROL.findall(rest)
    assert not found, [rest[max(0, m.start() - 30):m.end() + 40] for m in CONTROL.finditer(rest)][:6]
    assert "]0;owned" not in text and "owned" in text
