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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llm_trainer.system import failpoints, locks, process
from llm_trainer.training.checkpoint import Checkpoints
from llm_trainer.errors import BusyError, CheckpointError, LLMTrainerError, NotFoundError, RunFailed, UsageError
from llm_trainer.events import Emit, print_notes, silent
from llm_trainer.system.files import FULL, open_log, remove, sync_folder, write_whole
from llm_trainer.terminal import duration, quoted
from llm_trainer.runs.queue import Queue, choose_devices, kind_of
from llm_trainer.runs.run import RUN_ID, Run, check_id, create_run, is_run, sweep
from llm_trainer.runs.state import GONE, HEARD, TERMINAL, State, is_elsewhere, unheard
from llm_trainer.workspace import Workspace, refusal

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
    devices: str | list[str] | None = None,  # how many, which (0,2), or auto: all; None: one; a list: torchrun's ranks
    restarts: int = 0,  # how often a run on several devices goes on by itself after one was lost
    torchrun: str | None = None,  # which torchrun starts the processes
) -> Run:
    """Makes a run and starts its worker. In the foreground the caller is the worker: the run comes with its lock, for
    `worker.work(run, space)`. UsageError when the name is taken; nothing is left behind by a config that can't be."""
    config = config if isinstance(config, dict) else config.to_dict()
    if name and os.path.lexists(space.checkpoints / check_id(name)) and not is_run(space.runs / name):
        raise UsageError(f"{space.checkpoints / name} holds checkpoints of an earlier run {name}.\n"
                         "Remove that folder, or choose another name.")
    taken = take_devices(devices, config, space.runs)
    _require_place(space, space.checkpoints)
    run = create_run(space.runs, config, name, argv, note, locked=True)
    failpoints.hit("lock.taken")
    training = config.get("training", {})
    return _go(run, space, background, parallel, from_step=0, target_epochs=training.get("epochs"), changed={},
               target_steps=training.get("max_steps") or None, lr_plan=None, argv=argv, restarts=restarts,
               **_team(taken, config, torchrun))


def _require_place(space: Workspace, folder: Path) -> None:
    "CheckpointError where no checkpoint of a run could be saved: better told now than after its steps"
    Checkpoints(folder, "a run").steps()
    if why := refusal(folder):
        raise CheckpointError(f"No checkpoint could be saved, so nothing is trained: {why}.\nMake that folder "
                              f"writable, or name another as `checkpoints` in {space.root / 'settings.ini'}")


def take_devices(
    asked: str | list[str] | None,
    config: dict[str, Any],
    runs: Path,
    last: list[str] | None = None,  # of the attempt before
) -> list[str]:
    "The devices a run will take. UsageError where they are not there, or can't share the batch evenly"
    from llm_trainer.config import deal
    found = asked if isinstance(asked, list) else choose_devices(asked, config, runs, last)
    training = config.get("training", {})
    deal(training.get("batch_size", 1), training.get("grad_accum_steps", 1), len(found))
    return found


def _team(devices: list[str], config: dict[str, Any], torchrun: str | None) -> dict[str, Any]:
    "The part of an attempt's record that names its devices"
    asked = config.get("training", {}).get("strategy", "auto")  # auto is decided once the memory is known
    return {"devices": devices, "world_size": len(devices), "strategy": asked if len(devices) > 1 else "none",
            **({"torchrun": torchrun} if torchrun else {})}


def _go(run: Run, space: Workspace, background: bool, parallel: bool, **attempt) -> Run:
    "Records the attempt, then hands the locked run to its worker: a process of its own, or the caller"
    try:
        run.add_attempt(**attempt)
        mark(run, "queued")
        queue = Queue(space.runs, run.config(), attempt["devices"])
        queue.drop_ticket(run)  # a ticket of an earlier attempt is worth nothing
        if not background: return run
        if not parallel: queue.take_ticket(run)
        worker = _spawn(run, space)
    except BaseException as e:
        code = "disk_full" if isinstance(e, OSError) and e.errno in FULL else "error"
        try: mark(run, "failed", code, f"The worker could not be started: {getattr(e, 'strerror', None) or e}.")
        finally: run.lock.release()
        raise
    run.lock.release()  # the worker's copy of the descriptor holds it on
    run.lock = None
    deadline = time.monotonic() + 5
    while not _began(run.state(), worker.pid) and worker.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    if worker.poll() is not None and run.status().status == "crashed": raise _stillborn(run, worker.returncode)
    threading.Thread(target=worker.wait, daemon=True).start()  # a long-lived caller leaves no zombie
    return run


def _stillborn(run: Run, code: int) -> RunFailed:
    "The message about a worker that died before its first word; it goes on record too"
    words = " ".join(run.log_tail(1)) or "it said nothing"
    with suppress(BusyError, CheckpointError, NotFoundError), own(run) as lock:
        mark(Run(run.folder, lock), "failed", "error", f"The worker ended as soon as it was started (exit code "
                                                       f"{code}): {words}")
    return RunFailed("error", f"The worker of {run.id} ended as soon as it was started (exit code {code}): {words}\n"
                              f"Its log: llm-trainer logs {run.id}")


def _began(state: State, pid: int) -> bool:
    "Does the worker train, or has it said what it waits for?"
    return state.pid == pid and (state.status != "queued" or bool(state.waiting_for))


def _spawn(run: Run, space: Workspace) -> subprocess.Popen:
    "The worker: its own session, streams to train.log, the run's lock as an open descriptor"
    failpoints.hit("worker.spawn")
    with open_log(run.folder / "train.log") as log:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "llm_trainer.runs.worker", str(run.folder), "--lock-fd",
             str(run.lock.fileno())],
            cwd=space.root, env=environment(space), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True, pass_fds=[run.lock.fileno()])


def command(*words: str) -> list[str]:
    "The argument list that runs `llm-trainer WORDS` with this very package, whatever lies in the current folder"
    return [sys.executable, "-P", "-m", "llm_trainer", *words]


def environment(space: Workspace) -> dict[str, str]:
    "Our environment, with the path of this package unless it is installed"
    home, paths = str(Path(__file__).resolve().parents[2]), sysconfig.get_paths()
    extra = [] if home in (paths["purelib"], paths["platlib"]) else [home]
    path = os.pathsep.join([*extra, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONUNBUFFERED": "1", "LLM_TRAINER_HOME": str(space.root),
            **({"PYTHONPATH": path} if path else {})}


def mark(run: Run, status: str, code: str | None = None, message: str | None = None, aside: str = "") -> None:
    """Writes how a run stands on behalf of a worker that is not there; the run's lock must be ours. `aside`: it is not,
    as nobody can end its holder from here, who will see this when it wakes"""
    reason = {"code": code, "message": message} if code else None
    state = run.state()
    state.update(run_id=run.id, status=status, phase=None, reason=reason, eta_seconds=None, waiting_for=[])
    write_whole(run.folder / "state.json", state.to_record(), durable=True, aside=aside)


LISTEN = 15.0  # seconds in which a process gives a sign of life three times


@contextmanager
def own(run: Run, listen: bool = True):
    """The lock of an idle run, for as long as the block lasts; BusyError when a process has it, or still gives signs of
    life on another machine, whose locks may not be seen here (`listen`)"""
    lock = locks.Lock(run.folder / "lock")
    try: mine = lock.acquire(wait=0.5)  # a viewer's probe takes no longer
    except FileNotFoundError: raise NotFoundError(f"Run {run.id} is gone.\nSee the runs: llm-trainer runs") from None
    except PermissionError:
        raise CheckpointError(f"{run.id} is not yours to change: permission denied for {lock.path}.") from None
    except OSError as e:
        raise CheckpointError(f"The lock of {run.id} can't be opened: {e.strerror}.\n"
                              f"Remove what lies at {lock.path} and try again.") from None
    if not mine: raise BusyError(busy(run))
    try:
        if listen and _is_heard(run): raise BusyError(busy(run))
        failpoints.hit("lock.taken")
        yield lock
    finally:
        failpoints.hit("lock.release")
        lock.release()


def busy(run: Run) -> str:
    "Who has a run, and what helps"
    state = run.state()
    away = is_elsewhere(state)
    heard = f", last heard {duration(unheard(state))} ago" if away and state.heartbeat else ""
    who = f"pid {state.pid}{f' on {state.host}' if away else ''}{heard}"
    if state.status in TERMINAL:
        return (f"{run.id} has ended ({state.status}), and a process of it still holds its lock ({who}).\n"
                f"End that process{f', on {state.host}' if away else ''}: llm-trainer stop {run.id} --now")
    silent = (f"\nWhere it doesn't answer, end it on {state.host}: llm-trainer stop {run.id} --now"
              if away and unheard(state) > HEARD else "")
    return (f"{run.id} is being trained by another process ({who}).\n"
            f"See it: llm-trainer status {run.id}   Stop it: llm-trainer stop {run.id}{silent}")


def _is_heard(run: Run) -> bool:
    "Does a process on another machine train this run? Its lock may not be seen here: then it gives signs of life"
    state, deadline = run.state(), time.monotonic() + LISTEN
    if state.status in TERMINAL or not is_elsewhere(state) or unheard(state) > GONE: return False
    while time.monotonic() < deadline:
        if run.state().heartbeat != state.heartbeat: return True
        time.sleep(0.2)
    return False


# -- Resuming --

@dataclass(frozen=True)
class ResumePlan:
    """What a resume will do, before it does it; the learning rates are there where the schedule is known."""
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
    lost_step: int | None = None  # a step that was saved and whose checkpoints are gone, all of them
    lr_before: float | None = None  # of the last step done
    lr_after: float | None = None  # of the next one
    left: float | None = None  # epochs that were still to do, where more are added to them
    more: int | None = None  # epochs added
    devices: list[str] = field(default_factory=list)
    devices_before: int = 1  # how many the last attempt had

    def __str__(self) -> str:
        if self.nothing_to_do: return (f"{self.run_id} is completed: {self.epoch:g} epochs, nothing left to train.\n"
                                       f"Train on: llm-trainer resume {self.run_id} --more-epochs 1")
        limit = f", at most step {self.target_steps}" if self.target_steps else ""
        lines = [f"from       step {self.from_step} of {self.run_id}" + (" (a new run)" if self.fork else ""),
                 f"to         epoch {round(self.target_epochs, 2):g}{limit}" + self._added()]
        lines += [f"changed    {name}: {old} → {new}" for name, (old, new) in self.changed.items()]
        if self.lost_step:
            lines.insert(0, f"CHECKPOINTS ARE GONE: step {self.lost_step:,} was saved and nothing is left of it; "
                                           "the run begins again")
        if self.lr_plan: lines.append(f"lr plan    {self.lr_plan}")
        if max(len(self.devices), self.devices_before) > 1:
            same = len(self.devices) == self.devices_before
            other = "" if same else f", instead of {self.devices_before}: the last bits may differ"
            lines.append(f"devices    {len(self.devices)} ({', '.join(dict.fromkeys(self.devices))}){other}")
        if self.lr_after is not None: lines += self._rates()
        return "\n".join(lines)

    def _added(self) -> str: return f": {round(self.left, 2):g} left + {self.more} more" if self.more else ""

    def _rates(self) -> list[str]:
        "The learning rate before and after, with a remark if it jumps"
        lines = [f"lr         {self.lr_before:.3g} in the last step, {self.lr_after:.3g} in the next"]
        if self.lr_after > 2 * self.lr_before > 0:
            lines += [f"           {self.lr_after / self.lr_before:.3g} times as much at once: the loss may jump.",
                      "           --lr-plan hold stays low, rewarm climbs slowly."]
        return lines


def plan_resume(
    run: Run,
    space: Workspace,
    more_epochs: int | None = None,
    lr_plan: str | None = None,
    checkpoint: str | int = "latest",  # latest, best, the name of a pin, or a step
    changes: dict[str, Any] | None = None,  # settings by name
    emit: Emit = print_notes,  # called for damaged checkpoints
    devices: str | list[str] | None = None,  # None: those of the last attempt
) -> ResumePlan:
    "What `resume` would do, from files alone. UsageError for what can't change, NotFoundError for a missing step"
    if more_epochs is not None and not 1 <= more_epochs <= 1_000_000:
        raise UsageError("--more-epochs goes from 1 to 1,000,000.")
    if lr_plan not in (None, *LR_PLANS): raise UsageError(f"--lr-plan must be one of {', '.join(LR_PLANS)}.")
    if damage := run.damage():
        raise CheckpointError(f"{run.folder / damage} can't be read, and with it the settings of {run.id}.\n"
                              f"Train on from its weights: llm-trainer train --init-from {run.id}")
    name = run.meta.get("run_id")
    if name and name != run.id and RUN_ID.fullmatch(name):
        raise UsageError(f"The folder {run.folder} is that of the run {name}. {renamed(run, name)}")
    state, steps = run.status(), saved_steps(space.checkpoints / run.id)
    if state.status == "unknown" and state.reason["code"] != "damaged":
        raise CheckpointError(f"Nothing can be said of {run.id}: {state.reason['message']}.")
    step = _choose(run, space, steps, checkpoint)
    epochs, limit = _target(run, state)
    changed = _changed(run, changes or {})
    if more_epochs and "epochs" in (changes or {}):
        raise UsageError("--more-epochs adds to the plan and --epochs replaces it: give one of them.\n"
                         f"As planned and {more_epochs} more: llm-trainer resume {run.id} --more-epochs {more_epochs}\n"
                         f"{changes['epochs']} in all: llm-trainer resume {run.id} --epochs {changes['epochs']}")
    planned, old_limit = epochs, limit
    if more_epochs: epochs, limit = _planned(state, epochs, limit) + more_epochs, None
    if "epochs" in changed: epochs = changed["epochs"][1]
    if "max_steps" in changed: limit = changed["max_steps"][1] or None
    reached = (state.epoch or 0) * step / (state.step or 1)
    if ("epochs" in changed and epochs < reached) or ("max_steps" in changed and limit and limit < step):
        raise UsageError(f"{run.id} is past that: step {step:,}, epoch {reached:.2f}.\n"
                         f"Name a target ahead of it, or train on: llm-trainer resume {run.id} --more-epochs 1")
    fork = bool(steps) and step < steps[-1]
    if not (lr_plan or more_epochs): lr_plan = _lr_plan(run, changed)
    good = _undamaged(run, space, step, emit) if steps else 0
    if good != step and checkpoint not in ("latest", "best"):
        raise CheckpointError(f"Checkpoint {step} of {run.id} is damaged.\nSee what is left: llm-trainer verify "
                              f"{run.id}")
    further = epochs > _target(run, state)[0] or "max_steps" in changed or more_epochs
    plan = ResumePlan(run.id, state.status, good, state.epoch, epochs, limit, changed, lr_plan, fork,
                      nothing_to_do=state.status == "completed" and not fork and not further,
                      lost_step=None if steps else state.checkpoint_step,
                      left=max(0.0, _planned(state, planned, old_limit) - reached) if more_epochs else None,
                      more=more_epochs)
    last = _last_devices(run)
    taken = [] if plan.nothing_to_do else take_devices(devices, _after(run, plan), space.runs, last)
    return replace(plan, devices=taken, devices_before=len(last or [None]))


def renamed(run: Run, name: str) -> str:
    "What to do about a run whose folder got another name than its checkpoints have"
    home = run.folder.with_name(name)
    if is_run(home): return (f"It is a copy: {name} is there too, and the checkpoints are its own.\n"
                             f"Go on with that: llm-trainer resume {name}\n"
                             f"A new run from its weights: llm-trainer train --init-from {name}\n"
                             f"Remove the copy: llm-trainer delete {run.id}")
    there = quoted(home)
    aside = f"mv {there} {there}.away && " if os.path.lexists(home) else ""
    return (f"Its checkpoints are those of {name}; give it back that name: {aside}mv {quoted(run.folder)} "
            f"{there}\nThen: llm-trainer resume {name}")


def saved_steps(folder: Path) -> list[int]:
    "The steps that `checkpoints/<run>` holds, oldest first; none where it can't be read"
    try: return Checkpoints(folder, folder.name).steps()
    except OSError: return []


def _choose(run: Run, space: Workspace, steps: list[int], which: str | int) -> int:
    "The step that `which` names; without a checkpoint the latest and the best are step 0, the start"
    if not steps and which in ("latest", "best"): return 0
    return Checkpoints(space.checkpoints / run.id, run.id, emit=silent).find(which)  # `_undamaged` tells


def _undamaged(run: Run, space: Workspace, step: int, emit: Emit) -> int:
    "`step`, or the newest before or after it that verifies; CheckpointError when none does"
    store = Checkpoints(space.checkpoints / run.id, run.id, emit=emit)
    return int(store.select(step).name.removeprefix("step-"))


def _target(run: Run, state: State) -> tuple[float, int | None]:
    "The target of the last attempt: epochs, and steps if they are limited"
    training = run.config().get("training", {})
    for last in reversed(run.attempts()): return last.get("target_epochs"), last.get("target_steps")
    return training.get("epochs", 1), training.get("max_steps") or None


def _lr_plan(run: Run, changed: dict[str, list]) -> str | None:
    "The last attempt's --lr-plan; None if a changed setting needs a new one"
    if changed:
        from llm_trainer.config import LR_SETTINGS
        if changed.keys() & {"epochs", "max_steps", *LR_SETTINGS}: return None
    return run.attempts()[-1].get("lr_plan") if run.attempts() else None


def _planned(state: State, epochs: float, limit: int | None) -> float:
    "The epochs that --more-epochs adds to: those a completed run reached, those any other planned"
    if state.status == "completed": return min(epochs, state.epoch or epochs)
    if limit and state.step and state.epoch: return min(epochs, limit * state.epoch / state.step)
    return epochs


def _changed(run: Run, changes: dict[str, Any]) -> dict[str, list]:
    "The settings that really differ, as [old, new]; UsageError for one that a run can't change"
    from llm_trainer.config import Config, all_settings
    from llm_trainer.config import changes as differ
    old = Config.from_dict(run.config())
    if not changes: return {}
    found = differ(old, old.replace(**changes))
    if fixed := [name for name in found if all_settings()[name].change == "fixed"]:
        new = f"--{fixed[0]} {changes.get(fixed[0], '…')}"
        kept = any(all_settings()[name].group == "model" or name in ("tokenizer", "vocab_size") for name in fixed)
        raise UsageError(f"{', '.join(fixed)} can't change in the middle of a run.\n" + (
            f"Start a new run: llm-trainer train {new}" if kept else  # its weights would not fit
            f"Start a new run from its weights: llm-trainer train --init-from {run.id} {new}"))
    return {name: [before, after] for name, (before, after) in found.items()}


def _after(run: Run, plan: ResumePlan) -> dict[str, Any]:
    "The configuration of a run once it is resumed"
    return {group: {name: plan.changed.get(name, [None, value])[1] for name, value in values.items()}
            for group, values in run.config().items()}


def device_kind(run: Run) -> str:
    "cuda, mps or cpu: what a run was trained on, or will be"
    return (run.meta.get("device") or {}).get("type") or kind_of(run.config())


def _last_devices(run: Run) -> list[str] | None:
    return (run.attempts() or [{}])[-1].get("devices")


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
    devices: str | list[str] | None = None,  # None: those of the last attempt
    restarts: int = 0,
    torchrun: str | None = None,  # which torchrun starts the processes
) -> Run:
    """Continues a run, or forks a new one from an older step of it; gives the run that is trained. What is to be
    reached is on disk before the worker starts. BusyError when it is being trained; nothing happens if none is left."""
    with own(run) as lock:
        plan = plan_resume(run, space, more_epochs, lr_plan, checkpoint, changes, lambda message: None,
                           devices)  # the worker says it
        if plan.nothing_to_do: return Run(run.folder)
        _require_place(space, space.checkpoints / ("" if plan.fork else run.id))
        if plan.fork:
            meta = run.meta
            inherited = {k: meta[k] for k in ("data", "tokenizer_hash", "vocab_size", "resolution", "world_size")
                         if k in meta}
            heir = create_run(space.runs, run.config(), None, argv, meta.get("note"),
                              {"run_id": run.id, "step": plan.from_step}, locked=True, **inherited)
        else:
            heir = Run(run.folder, locks.Lock.adopt(os.dup(lock.fileno()), lock.path))  # outlasts this block's hold
            heir.withdraw()
        return _go(heir, space, background, parallel, from_step=plan.from_step, target_epochs=plan.target_epochs,
                   target_steps=plan.target_steps, changed=plan.changed, lr_plan=plan.lr_plan, argv=argv,
                   restarts=restarts, **_team(plan.devices, _after(run, plan), torchrun))


# -- Stopping --

def stop(
    run: Run,
    now: bool = False,  # end the process group instead of asking for a checkpoint
    show: Callable[[State], None] | None = None,  # called with the status, twice a second, while waiting
    timeout: float | None = None,  # seconds to wait for the worker; None: as long as it takes
) -> State:
    "Asks the worker to save and end, and waits for it; gives the last status. Stopping what has ended changes nothing"
    if locks.probe(run.folder / "lock") is None:
        raise CheckpointError(f"Whether {run.id} is being trained can't be seen: permission denied for {run.folder}.")
    if _lives(run):
        if now: _end(run)
        elif run.request("stop"):
            process.send(run.state().to_record(), signal.SIGTERM)  # a wake-up; the file is what asks
        if not now: _awake(run)
        _wait(run, show, timeout)
    if not run.locked and run.status().status == "crashed" and now: _record_end(run)
    return run.status()


def _awake(run: Run) -> None:
    "Wakes a suspended worker, which couldn't save otherwise"
    record = run.state().to_record()
    if process.same_process(record) and process.process_state(record["pid"]) == "stopped":
        process.send(record, signal.SIGCONT)


def _wait(run: Run, show, timeout: float | None) -> None:
    deadline = time.monotonic() + timeout if timeout is not None else None
    shown = 0.0
    while _lives(run) and (deadline is None or time.monotonic() < deadline):
        if time.monotonic() - shown >= 0.5:
            shown, state = time.monotonic(), run.status()
            if show: show(state)
            if is_elsewhere(state) and unheard(state) > HEARD: raise BusyError(busy(run))  # it can't be woken from here
        time.sleep(0.02)


def _lives(run: Run) -> bool:
    "Does a process have the run, here or on a machine whose locks are not seen here?"
    return run.locked or run.status().status in ("queued", "running")


def _end(run: Run) -> None:
    """Asks the worker to end without saving and wakes it: SIGTERM to its session, then SIGKILL. Only while every mark
    of the process agrees and the lock is held"""
    record = run.state().to_record()
    with suppress(OSError, LLMTrainerError): run.request("end")
    for signum, patience in ((signal.SIGTERM, 3.0), (signal.SIGKILL, 10.0)):
        if not _lives(run): return
        if not process.send_group(record, signum): return _wait(run, None, patience * is_elsewhere(run.state()))
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
