"""Reads run folders for the screens: plain classes that poll files, usable with no UI. All text they give is clean."""
from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from llm_trainer.system.files import Follower, log_line
from llm_trainer.runs.run import RUN_ID, Run, is_run
from llm_trainer.events import silent
from llm_trainer.terminal import clean
from llm_trainer.tui.glyphs import line
from llm_trainer.runs.state import LIVE, STATES, devices_of, look_of, slowest_of
from llm_trainer.workspace import Workspace

PROBES = 200  # how many finished runs are looked at again per poll


@dataclass(frozen=True)
class RunRow:
    """What the screens show of one run; equal rows look the same, so they need no repaint."""
    id: str
    status: str = "unknown"
    phase: str = ""
    created: float = 0.0
    age: str = ""
    epoch: float | None = None
    epochs: float | None = None
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    val_loss: float | None = None
    best: float | None = None
    rate: float | None = None
    eta: float | None = None
    elapsed: float | None = None
    tokens: float | None = None
    memory: float | None = None
    checkpoint: int | None = None
    attempt: int | None = None
    pid: int | None = None
    device: str = ""
    device_name: str = ""
    dataset: str = ""
    note: str = ""
    parameters: float | None = None
    reason: str = ""
    code: str = ""
    history: tuple[float, ...] = ()
    doing: str = ""
    devices: str = ""
    slowest: str = ""

    @property
    def live(self) -> bool: return self.status in LIVE

    @property
    def word(self) -> str: return (self.phase or "running") if self.status == "running" else self.status

    @property
    def sign(self) -> str: return look_of(self.status).sign

    @property
    def color(self) -> str: return look_of(self.status).colour

    @property
    def fraction(self) -> float | None:
        if self.status == "completed": return 1.0
        return None if not self.steps or self.step is None else min(1.0, self.step / self.steps)

    @property
    def command(self) -> str:
        "What to type next about this run"
        verb = {"running": "status", "stalled": "logs", "queued": "status", "completed": "generate",
                "unknown": "status", "diverged": "logs"}.get(self.status, "resume")
        return f"llm-trainer {verb} {self.id}" + (' --prompt "The "' if verb == "generate" else "")


def _number(value: Any) -> float | None:
    "A finite number, or None for anything else a damaged file may hold"
    if isinstance(value, bool) or not isinstance(value, int | float): return None
    return value if abs(value) < 1e300 and value == value else None


def _whole(value: Any) -> int | None:
    value = _number(value)
    return None if value is None else int(value)


def seconds(value: Any) -> float:
    "A time as seconds since 1970, from a number or an ISO text; 0 where it is neither"
    if _number(value) is not None: return float(value)
    try: return datetime.fromisoformat(str(value).replace("Z", "+00:00")).timestamp()
    except (ValueError, OverflowError, OSError): return 0.0


def age(since: float, now: float) -> str:
    "How long ago, in one unit"
    gone = max(0.0, now - since)
    if not since: return ""
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if gone >= size: return f"{int(gone // size)}{unit}"
    return "now"


def _dict(value: Any) -> dict: return value if isinstance(value, dict) else {}


def dataset_of(meta: dict) -> str:
    "The name of what a run was trained on"
    data = _dict(_dict(_dict(meta.get("config")).get("data")) or _dict(meta.get("config"))).get("dataset", "")
    names = [str(_dict(part).get("name", "?")) for part in data] if isinstance(data, list) else [str(data)]
    return line(" + ".join(os.path.basename(name.rstrip("/")) or name for name in names), 40)


def is_closed(folder: Path) -> bool:
    "Is this a folder with a run's name that we may not look into?"
    return (RUN_ID.fullmatch(folder.name) is not None and folder.is_dir() and not folder.is_symlink()
            and not os.access(folder, os.R_OK | os.X_OK))


def row_of(run: Run, now: float) -> RunRow:
    "Read one run; whatever is wrong with its folder ends up in the row, never as an exception"
    name = line(run.id, 64)
    if is_closed(run.folder):
        return RunRow(name, reason=f"No permission to read {line(run.folder, 200)}.", code="unreadable")
    try: state, meta, note = run.status(wall=now), run.meta, run.notes()
    except Exception as problem:  # a viewer outlives any folder
        return RunRow(name, reason=line(f"{type(problem).__name__}: {problem}", 300), code="unreadable")
    status = state.status if state.status in STATES else "unknown"
    reason, device = _dict(state.reason), _dict(meta.get("device"))
    if state.stored_status is None: reason = {"code": "unreadable", "message": "state.json is missing or damaged"}
    if status == "queued" and state.waiting_for:
        reason = {"message": f"waits for {', '.join(map(str, state.waiting_for[:3]))}"}
    created = seconds(state.created_at or meta.get("created_at"))
    kind = state.device or device.get("type") or ""
    return RunRow(
        id=name, status=status, phase=line(state.phase, 12), created=created, age=age(created, now),
        epoch=state.epoch, epochs=state.epochs, step=state.step, steps=state.steps,
        loss=state.loss, val_loss=state.val_loss, best=state.best_val_loss, history=tuple(state.loss_history[-60:]),
        rate=state.tokens_per_second, eta=state.eta_seconds if status in LIVE else None, elapsed=state.elapsed_seconds,
        tokens=state.tokens, memory=state.memory_bytes, checkpoint=state.checkpoint_step, attempt=state.attempt,
        pid=state.pid,
        device=line(kind, 12), device_name=line(device.get("name"), 40), dataset=dataset_of(meta), note=line(note, 80),
        parameters=_number(meta.get("parameters")), reason=line(reason.get("message"), 400),
        code=line(reason.get("code"), 30), doing=_doing(state.progress) if status in LIVE else "",
        devices=line(devices_of(state), 200), slowest=line(slowest_of(state), 200))


def _doing(progress: dict | None) -> str:
    "How far a phase before the first step is: `reading documents: 1,200 of 6,270`"
    done, total = (_number(_dict(progress).get(key)) for key in ("done", "total"))
    if done is None: return ""
    return f"{line(progress.get('what'), 40)}: {done:,.0f}" + (f" of {total:,.0f}" if total else "")


class Overview:
    """All runs of a workspace. A live run is read at every poll, a finished one when its state file changed."""

    def __init__(self, workspace: Workspace, clock: Callable[[], float]):
        self.workspace, self.clock = workspace, clock
        self.rows: dict[str, RunRow] = {}
        self._seen: dict[str, tuple] = {}
        self._next = 0

    def poll(self) -> list[RunRow]:
        "The rows of all runs, newest first; raises OSError when the folder of runs can't be read"
        runs, now = self._list(), self.clock()
        finished = [run.id for run in runs if run.id in self.rows and not self.rows[run.id].live]
        again = set(finished)
        if len(finished) > PROBES:
            again = {finished[(self._next + i) % len(finished)] for i in range(PROBES)}
            self._next = (self._next + PROBES) % len(finished)
        for gone in self.rows.keys() - {run.id for run in runs}:
            del self.rows[gone]
            self._seen.pop(gone, None)
        for run in runs:
            row = self.rows.get(run.id)
            if row and not row.live and run.id not in again: continue
            mark = self._mark(run)
            if row and not row.live and row.status != "unknown" and mark == self._seen.get(run.id):
                fresh = age(row.created, now)
                if fresh != row.age: self.rows[run.id] = replace(row, age=fresh)
                continue
            self._seen[run.id], self.rows[run.id] = mark, row_of(run, now)
        return sorted(self.rows.values(), key=lambda row: (-row.created, row.id))

    def _list(self) -> list[Run]:
        runs = self.workspace.runs
        try: names = os.listdir(runs)
        except FileNotFoundError: return []
        return [Run(runs / name) for name in names if name in self.rows or is_run(runs / name)
                or is_closed(runs / name)]

    @staticmethod
    def _mark(run: Run) -> tuple:
        try:
            found = os.stat(run.folder / "state.json")
            return found.st_mtime_ns, found.st_size, found.st_ino
        except OSError: return ()


def epochs(row: RunRow) -> str:
    "`2.1/3`: the epochs read, and those asked for"
    if row.epoch is None: return "–"
    return f"{row.epoch:.1f}" + (f"/{round(row.epochs, 2):g}" if row.epochs else "")


@dataclass(frozen=True)
class Sample:
    """A text the model wrote while training."""
    step: int
    prompt: str
    text: str


@dataclass(frozen=True)
class CheckpointRow:
    """One saved step."""
    step: int
    pins: tuple[str, ...] = ()
    val_loss: float | None = None
    bytes: int | None = None
    saved: str = ""
    verified: str = ""


@dataclass
class RunNews:
    """What a poll found: the run as it is now and what was added since the last poll."""
    row: RunRow
    samples: list[Sample] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    checkpoints: tuple[CheckpointRow, ...] = ()
    gone: bool = False


class RunReader:
    """One run, followed: state, curves, samples, log and checkpoints."""

    def __init__(self, run: Run, workspace: Workspace, clock: Callable[[], float]):
        from llm_trainer.runs.curves import Curves  # loads numpy, which the list of runs needs not
        self.run, self.clock, self.folder = run, clock, workspace.checkpoints / run.id
        self.curves = Curves(run)
        self._samples = Follower(run.folder / "samples.jsonl", tail=1 << 20)
        self._log = Follower(run.folder / "train.log", log_line, limit=1 << 18, tail=1 << 16)
        self._sizes: dict[int, int] = {}
        self._known = RunRow(line(run.id, 64))

    def poll(self) -> RunNews:
        "What is new; of a run that is gone, the last that could be read of it"
        if not self.run.folder.is_dir(): return RunNews(self._known, gone=True)
        self.curves.poll()
        row = row_of(self.run, self.clock())
        if row.code != "unreadable": self._known = row
        return RunNews(row, list(self._read_samples()),
                       [text.expandtabs(4) for text in self._log.poll()], self.checkpoints())

    def _read_samples(self) -> Iterator[Sample]:
        for record in self._samples.poll():
            yield Sample(_whole(record.get("step")) or 0, clean(str(record.get("prompt") or "")),
                         clean(str(record.get("text") or "")))

    def checkpoints(self) -> tuple[CheckpointRow, ...]:
        "The saved steps, newest first, as index.json tells them; folders it doesn't know come without details"
        from llm_trainer.training.checkpoint import Checkpoints
        try: index = Checkpoints(self.folder, self.run.id, emit=silent).index()
        except Exception: return ()
        now, found = self.clock(), []
        for step, entry in sorted(index.items(), reverse=True):
            entry, folder = _dict(entry), self.folder / f"step-{step:08d}"
            if step not in self._sizes: self._sizes[step] = _bytes(folder)
            try: saved = age(os.stat(folder).st_mtime, now)
            except OSError: continue
            pins = entry.get("pins") if isinstance(entry.get("pins"), list) else []
            verified = entry.get("verified_at")
            found.append(CheckpointRow(step, tuple(line(pin, 20) for pin in pins), _number(entry.get("val_loss")),
                                       self._sizes[step], saved, age(seconds(verified), now) if verified else ""))
        return tuple(found)


def _bytes(folder: Path) -> int:
    "Size of a folder's files"
    return sum(os.lstat(os.path.join(where, name)).st_size for where, _, names in os.walk(folder) for name in names)
