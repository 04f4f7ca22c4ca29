"""Starting, stopping, resuming and deleting runs: everything that is done to a training process from outside it.

Knows run folders, locks and configs; loads no torch, so that a background run is on its way in well under a second."""
from __future__ import annotations

import os
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm_trainer import failpoints, host
from llm_trainer.checkpoint import Checkpoints
from llm_trainer.errors import BusyError, CheckpointError, NotFoundError, UsageError
from llm_trainer.records import CREATE, FULL, remove, sync_folder, write_whole
from llm_trainer.runs import RUN_ID, Run, check_id, create_run, is_run, sweep
from llm_trainer.workspace import Workspace

LR_PLANS = ("redecay", "hold", "rewarm")


# -- Starting --

def start(
    config: Any,  # a Config, or its dict
    space: Workspace,
    name: str | None = None,
    note: str | None = None,
    argv: list[str] | None = None,
    background: bool = True,
    parallel: bool = False,  # don't wait for other runs on the same device
) -> Run:
    """Makes a run and starts its worker. In the foreground the caller is the worker: the run comes with its lock, for
    `worker.work(run, space)`. UsageError when the name is taken; nothing is left behind by a config that can't be."""
    config = config if isinstance(config, dict) else config.to_dict()
    if name and os.path.lexists(space.checkpoints / check_id(name)) and not is_run(space.runs / name):
        raise UsageError(f"{space.checkpoints / name} holds checkpoints of an earlier run {name}.\n"
                         "Remove that folder, or choose another name.")
    run = create_run(space.runs, config, name, argv, note, locked=True)
    failpoints.hit("lock.taken")
    training = config.get("training", {})
    return _go(run, space, background, parallel, from_step=0, target_epochs=training.get("epochs"), changed={},
               target_steps=training.get("max_steps") or None, lr_plan=None, argv=argv)


def _go(run: Run, space: Workspace, background: bool, parallel: bool, **attempt) -> Run:
    "Records the attempt, then hands the locked run to its worker: a process of its own, or the caller"
    try:
        run.add_attempt(**attempt)
        mark(run, "queued")
        queue = Queue(space.runs, run.config())
        queue.leave(run)  # a ticket of an earlier attempt is worth nothing
        if not background: return run
        if not parallel: queue.enter(run)
        worker = _spawn(run, space)
    except BaseException as e:
        code = "disk_full" if isinstance(e, OSError) and e.errno in FULL else "error"
        try: mark(run, "failed", code, f"The worker could not be started: {getattr(e, 'strerror', None) or e}.")
        finally: run.lock.release()
        raise
    run.lock = run.lock.release()  # the worker's copy of the descriptor holds it on
    deadline = time.monotonic() + 0.7
    while not _began(run.state(), worker.pid) and worker.poll() is None and time.monotonic() < deadline: time.sleep(0.01)
    threading.Thread(target=worker.wait, daemon=True).start()  # a long-lived caller leaves no zombie
    return run


def _began(state: dict[str, Any], pid: int) -> bool:
    "Does the worker train, or say what it waits for?"
    return state["pid"] == pid and (state["status"] != "queued" or bool(state["waiting_for"]))


def _spawn(run: Run, space: Workspace) -> subprocess.Popen:
    "The worker: its own session, streams to train.log, the run's lock as an open descriptor"
    failpoints.hit("worker.spawn")
    log = os.open(run.folder / "train.log", os.O_WRONLY | os.O_APPEND | CREATE, 0o600)
    try:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "llm_trainer.worker", str(run.folder), "--lock-fd", str(run.lock.fileno())],
            cwd=space.root, env=environment(space), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True, pass_fds=[run.lock.fileno()])
    finally: os.close(log)


def environment(space: Workspace) -> dict[str, str]:
    "Ours, with the way to this package where it is not an installed one"
    home, paths = str(Path(__file__).resolve().parent.parent), sysconfig.get_paths()
    extra = [] if home in (paths["purelib"], paths["platlib"]) else [home]
    path = os.pathsep.join([*extra, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONUNBUFFERED": "1", "LLM_TRAINER_HOME": str(space.root),
            **({"PYTHONPATH": path} if path else {})}


def mark(run: Run, status: str, code: str | None = None, message: str | None = None) -> None:
    "Writes how a run stands on behalf of a worker that is not there; the run's lock must be ours"
    reason = {"code": code, "message": message} if code else None
    news = {"run_id": run.id, "status": status, "phase": None, "reason": reason, "eta_seconds": None, "waiting_for": []}
    write_whole(run.folder / "state.json", {**run.state(), **news}, durable=True)


@contextmanager
def own(run: Run):
    "The lock of an idle run, for as long as the block lasts; BusyError when a process has it"
    lock = host.Lock(run.folder / "lock")
    try: mine = lock.acquire(wait=0.5)  # a viewer's probe takes no longer
    except FileNotFoundError: raise NotFoundError(f"Run {run.id} is gone.\nSee the runs: llm-trainer runs") from None
    except OSError as e:
        raise CheckpointError(f"The lock of {run.id} can't be opened: {e.strerror}.\n"
                              f"Remove what lies at {lock.path} and try again.") from None
    if not mine:
        raise BusyError(f"{run.id} is being trained by another process (pid {run.state()['pid']}).\n"
                        f"See it: llm-trainer status {run.id}   Stop it: llm-trainer stop {run.id}")
    try:
        failpoints.hit("lock.taken")
        yield lock
    finally:
        failpoints.hit("lock.release")
        lock.release()


# -- One at a time on a device --

class Queue:
    """The runs that wait for a device, in order of creation: a ticket each, and a lock for the one that has it, which
    signs the lock with its name.

    A ticket counts only while its run's lock is held, so one left by a killed process holds nobody up."""

    def __init__(self, runs: Path, config: dict[str, Any]):
        wanted = config.get("training", {}).get("device", "auto")
        self.runs = runs
        self.folder = runs / ".queue" / (host.accelerator() if wanted == "auto" else str(wanted).replace(":", "-"))
        self.lock = host.Lock(self.folder / "lock")

    def enter(self, run: Run) -> None:
        "Takes the next ticket"
        self._open()
        os.close(os.open(self.folder / f"{time.time_ns():020d}.{run.id}", os.O_WRONLY | CREATE, 0o600))

    def _open(self) -> None:
        for folder in (self.folder.parent, self.folder): folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def ahead(self, run: Run) -> list[str]:
        "The runs whose ticket comes before this one's, in order; all that wait when it has none"
        tickets, ahead = sorted(name for name in os.listdir(self.folder) if "." in name), []
        for ticket in tickets:
            run_id = ticket.partition(".")[2]
            if run_id == run.id: break
            if host.is_locked(self.runs / run_id / "lock"): ahead.append(run_id)
            else: (self.folder / ticket).unlink(missing_ok=True)
        return ahead

    def before(self, run: Run) -> list[str]:
        "The run that has the device, then those whose turn comes before this one's"
        return [*self._holder(), *self.ahead(run)]

    def _holder(self) -> list[str]:
        "The run that holds the device's lock, by the name it wrote there"
        try: name = self.lock.path.read_text("ascii", "replace")
        except OSError: return []
        held = RUN_ID.fullmatch(name) and all(map(host.is_locked, (self.lock.path, self.runs / name / "lock")))
        return [name] if held else []

    def turn(self, run: Run) -> bool:
        "Takes the device if it is this run's turn and the device is free"
        if self.ahead(run) or not self._take(run): return False
        self.leave(run)
        return True

    def _take(self, run: Run) -> bool:
        if not self.lock.acquire(): return False
        with suppress(OSError):  # a full disk costs the others the name, not this run the device
            os.ftruncate(self.lock.fileno(), 0)
            os.pwrite(self.lock.fileno(), run.id.encode(), 0)
        return True

    def leave(self, run: Run) -> None:
        "Gives the ticket back"
        for ticket in self.folder.glob(f"*.{run.id}"): ticket.unlink(missing_ok=True)

    def waits(self, run: Run) -> bool:
        "Has this run a ticket?"
        return any(self.folder.glob(f"*.{run.id}"))

    def claim(self, run: Run) -> list[str]:
        "Takes the device out of turn, if it is free, so that those with tickets wait for this run; gives those before it"
        self._open()
        others = self.before(run)
        self._take(run)
        return others


# -- Resuming --

@dataclass(frozen=True)
class ResumePlan:
    """What a resume will do, before it does it; `lr_before` and `lr_after` are for who knows learning-rate plans."""
    run_id: str
    status: str  # how the run stands now
    from_step: int  # 0: from the start, nothing was saved
    epoch: float  # reached by now
    target_epochs: float
    target_steps: int | None
    changed: dict[str, list] = field(default_factory=dict)  # name → [old, new]
    lr_plan: str | None = None
    fork: bool = False  # an older step than the newest: a new run, with this one as its parent
    nothing_to_do: bool = False
    lr_before: float | None = None
    lr_after: float | None = None

    def __str__(self) -> str:
        if self.nothing_to_do: return (f"{self.run_id} is completed: {self.epoch:g} epochs, nothing left to train.\n"
                                       f"Train on: llm-trainer resume {self.run_id} --more-epochs 1")
        limit = f", at most step {self.target_steps}" if self.target_steps else ""
        lines = [f"from       step {self.from_step} of {self.run_id}" + (" (a new run)" if self.fork else ""),
                 f"to         epoch {self.target_epochs:g}{limit}"]
        lines += [f"changed    {name}: {old} → {new}" for name, (old, new) in self.changed.items()]
        if self.lr_plan: lines.append(f"lr plan    {self.lr_plan}")
        if self.lr_after is not None: lines.append(f"lr         {self.lr_before:.3g} → {self.lr_after:.3g}")
        return "\n".join(lines)


def plan_resume(
    run: Run,
    space: Workspace,
    more_epochs: int | None = None,
    lr_plan: str | None = None,
    checkpoint: str | int = "latest",  # latest, best, the name of a pin, or a step
    changes: dict[str, Any] | None = None,  # settings by name
    notify: Callable[[str], None] = lambda message: print(message, file=sys.stderr),  # told of damaged checkpoints
) -> ResumePlan:
    "What `resume` would do, told from files alone. UsageError for what can't change, NotFoundError for a missing step"
    if more_epochs is not None and not 1 <= more_epochs <= 1_000_000: raise UsageError("--more-epochs goes from 1 to 1,000,000.")
    if lr_plan not in (None, *LR_PLANS): raise UsageError(f"--lr-plan must be one of {', '.join(LR_PLANS)}.")
    if not run.meta.get("config"):
        raise CheckpointError(f"{run.folder / 'meta.json'} can't be read, and with it the settings of {run.id}.\n"
                              f"Train on from its weights: llm-trainer train --init-from {run.id}")
    state, steps = run.status(), saved_steps(space.checkpoints / run.id)
    step = _choose(run, space, steps, checkpoint)
    epochs, limit = _target(run, state)
    changed = _changed(run, changes or {})
    if more_epochs: epochs, limit = _planned(state, epochs, limit) + more_epochs, None
    if "epochs" in changed: epochs = changed["epochs"][1]
    if "max_steps" in changed: limit = changed["max_steps"][1] or None
    reached = (state["epoch"] or 0) * step / (state["step"] or 1)
    if ("epochs" in changed and epochs < reached) or ("max_steps" in changed and limit and limit < step):
        raise UsageError(f"{run.id} is past that: step {step:,}, epoch {reached:.2f}.\n"
                         f"Name a target ahead of it, or train on: llm-trainer resume {run.id} --more-epochs 1")
    fork = bool(steps) and step < steps[-1]
    if not (lr_plan or more_epochs): lr_plan = _lr_plan(run, changed)
    good = _undamaged(run, space, step, notify) if steps else 0
    if good != step and checkpoint not in ("latest", "best"):
        raise CheckpointError(f"Checkpoint {step} of {run.id} is damaged.\nSee what is left: llm-trainer verify {run.id}")
    further = epochs > _target(run, state)[0] or "max_steps" in changed or more_epochs
    return ResumePlan(run.id, state["status"], good, state["epoch"], epochs, limit, changed, lr_plan, fork,
                      nothing_to_do=state["status"] == "completed" and not fork and not further)


def saved_steps(folder: Path) -> list[int]:
    "The steps that `checkpoints/<run>` holds, oldest first; none where it can't be read"
    try: return Checkpoints(folder, folder.name).steps()
    except OSError: return []


def _choose(run: Run, space: Workspace, steps: list[int], which: str | int) -> int:
    "The step that `which` names; 0, the start, for the latest and the best of none"
    if not steps and which in ("latest", "best"): return 0
    return Checkpoints(space.checkpoints / run.id, run.id, notify=lambda message: None).find(which)  # `_undamaged` tells


def _undamaged(run: Run, space: Workspace, step: int, notify: Callable[[str], None]) -> int:
    "`step`, or the newest before or after it that verifies; CheckpointError when none does"
    store = Checkpoints(space.checkpoints / run.id, run.id, notify=notify)
    return int(store.select(step).name.removeprefix("step-"))


def _target(run: Run, state: dict[str, Any]) -> tuple[float, int | None]:
    "What the last attempt was to reach: epochs, and steps where they are limited"
    training = run.config().get("training", {})
    for last in reversed(run.attempts()): return last.get("target_epochs"), last.get("target_steps")
    return training.get("epochs", 1), training.get("max_steps") or None


def _lr_plan(run: Run, changed: dict[str, list]) -> str | None:
    "What the last attempt was to do with the learning rate; nothing where a change asks for a plan of its own"
    if changed:
        from llm_trainer.config import LR_SETTINGS
        if changed.keys() & {"epochs", "max_steps", *LR_SETTINGS}: return None
    return run.attempts()[-1].get("lr_plan") if run.attempts() else None


def _planned(state: dict[str, Any], epochs: float, limit: int | None) -> float:
    "The epochs that more are added to: those reached by a completed run, those planned by another"
    if state["status"] == "completed": return min(epochs, state["epoch"] or epochs)
    if limit and state["step"] and state["epoch"]: return min(epochs, limit * state["epoch"] / state["step"])
    return epochs


def _changed(run: Run, changes: dict[str, Any]) -> dict[str, list]:
    "The settings that really differ, as [old, new]; UsageError for one that a run can't change"
    if not changes: return {}
    from llm_trainer.config import Config, fields
    from llm_trainer.config import changes as differ
    old = Config.from_dict(run.config())
    found = differ(old, old.replace(**changes))
    if fixed := [name for name in found if fields()[name].change == "fixed"]:
        new = f"--{fixed[0]} {changes.get(fixed[0], '…')}"
        kept = any(fields()[name].group == "model" or name in ("tokenizer", "vocab_size") for name in fixed)
        raise UsageError(f"{', '.join(fixed)} can't change in the middle of a run.\n" + (
            f"Start a new run: llm-trainer train {new}" if kept else  # its weights would not fit
            f"Start a new run from its weights: llm-trainer train --init-from {run.id} {new}"))
    return {name: [before, after] for name, (before, after) in found.items()}


def resume(
    run: Run,
    space: Workspace,
    more_epochs: int | None = None,
    lr_plan: str | None = None,
    checkpoint: str | int = "latest",
    changes: dict[str, Any] | None = None,
    argv: list[str] | None = None,
    background: bool = True,
    parallel: bool = False,
) -> Run:
    """Continues a run, or forks a new one from an older step of it; gives the run that is trained. What is to be
    reached is on disk before the worker starts. BusyError when it is being trained; nothing happens if none is left."""
    with own(run) as lock:
        plan = plan_resume(run, space, more_epochs, lr_plan, checkpoint, changes, lambda message: None)  # the worker says it
        if plan.nothing_to_do: return Run(run.folder)
        if plan.fork:
            meta = run.meta
            inherited = {k: meta[k] for k in ("data", "tokenizer_hash", "vocab_size", "resolution") if k in meta}
            heir = create_run(space.runs, run.config(), None, argv, meta.get("note"),
                              {"run_id": run.id, "step": plan.from_step}, locked=True, **inherited)
        else:
            heir = Run(run.folder, host.Lock.adopt(os.dup(lock.fileno()), lock.path))  # outlasts this block's hold
            heir.withdraw()
        return _go(heir, space, background, parallel, from_step=plan.from_step, target_epochs=plan.target_epochs,
                   target_steps=plan.target_steps, changed=plan.changed, lr_plan=plan.lr_plan, argv=argv)


# -- Stopping --

def stop(
    run: Run,
    now: bool = False,  # end the process group instead of asking for a checkpoint
    notify: Callable[[dict[str, Any]], None] | None = None,  # called with the status, twice a second, while waiting
    timeout: float | None = None,  # seconds to wait for the worker; None: as long as it takes
) -> dict[str, Any]:
    "Asks the worker to save and end, and waits for it; gives the last status. Stopping what has ended changes nothing"
    if run.locked:
        if now: _end(run)
        elif run.request("stop"): host.send(run.state(), signal.SIGTERM)  # a wake-up; the file is what asks
        _wait(run, notify, timeout)
    if not run.locked and run.status()["status"] == "crashed" and now: _record_end(run)
    return run.status()


def _wait(run: Run, notify, timeout: float | None) -> None:
    deadline = time.monotonic() + timeout if timeout is not None else None
    told = 0.0
    while run.locked and (deadline is None or time.monotonic() < deadline):
        if notify and time.monotonic() - told >= 0.5: told = time.monotonic(); notify(run.status())
        time.sleep(0.02)


def _end(run: Run) -> None:
    """SIGTERM to the worker's session, again, so that it ends without saving, then SIGKILL; only while every mark of the
    process agrees and the lock is held"""
    record = run.state()
    for signum, patience in ((signal.SIGTERM, 0.05), (signal.SIGTERM, 3.0), (signal.SIGKILL, 10.0)):
        if not run.locked or not host.send_group(record, signum): return
        _wait(run, None, patience)


def _record_end(run: Run) -> None:
    try:
        with own(run) as lock: mark(Run(run.folder, lock), "stopped", "signal", "ended at once by stop --now")
    except (BusyError, CheckpointError, NotFoundError): pass


# -- Deleting --

def delete(run: Run, space: Workspace) -> int:
    "Removes a run that is not being trained, and its checkpoints; gives the bytes freed. BusyError for a live one"
    with own(run):
        freed, gone = 0, []
        for folder in (space.checkpoints / run.id, run.folder):
            if not os.path.lexists(folder): continue
            freed += _size(folder)
            gone.append(folder.parent / f".gone-{run.id}-{os.urandom(4).hex()}")
            os.rename(folder, gone[-1])
            sync_folder(folder.parent)
        for folder in gone: remove(folder)
    for folder in (space.checkpoints, space.runs): sweep(folder)
    return freed


def _size(folder: Path) -> int:
    "Bytes in a folder, following no links"
    if folder.is_symlink(): return 0
    return sum(os.lstat(os.path.join(at, name)).st_size for at, _, names in os.walk(folder) for name in names)
