"""Which devices a run takes, and whose turn it is on them. Knows no torch: a run that waits costs next to nothing."""
from __future__ import annotations

import os
import stat
import time
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from llm_trainer.errors import UsageError
from llm_trainer.runs.run import RUN_ID, Run
from llm_trainer.system import locks, process
from llm_trainer.system.files import CREATE, open_regular, remove


# -- Which devices --

def kind_of(config: dict[str, Any]) -> str:
    "cuda, mps or cpu, as far as it can be known without torch"
    wanted = config.get("training", {}).get("device", "auto")
    return process.accelerator() if wanted == "auto" else str(wanted)


def choose_devices(
    asked: str | None,  # a number, a list such as 0,2, or auto: all; None: as `last`, or one
    config: dict[str, Any],
    runs: Path,
    last: list[str] | None = None,  # of the attempt before
) -> list[str]:  # one for each process, such as cuda:0; cpu as often as there are to be processes
    "The devices a run will take, free ones first. UsageError when there are too few"
    kind, text = kind_of(config), str(asked).strip().lower()
    if asked is None and not last: text = "1"
    elif asked is None:
        text = str(len(last)) if kind != "cuda" else ",".join(name.partition(":")[2] or "0" for name in last)
    if asked is None and kind == "cuda" and len(set(last or ())) < len(last or ()):
        raise UsageError(f"This run was on {len(last)} GPUs of several machines.\n"
                         "Resume it with the same torchrun on all of them, or on some of this one: "
                         f"--devices {len(process.gpus()) or 1}")
    listed = "," in text or (asked is None and last and kind == "cuda")
    if not (text == "auto" or all(part.strip().isdecimal() for part in text.split(","))):
        raise UsageError(f"--devices takes a number, a list such as 0,2, or auto; not {text[:40]!r}.")
    if kind != "cuda":
        if listed: raise UsageError(f"--devices {text} lists GPUs, and this run uses {kind}.\n"
                                    "On a CPU it is a number of processes: --devices 2")
        count = 1 if text == "auto" else int(text)
        if count < 1 or count > 1024: raise UsageError("--devices takes a number from 1 to 1,024.")
        if kind == "mps" and count > 1:
            raise UsageError("There is one mps device.\nLeave --devices out, or add --device cpu.")
        return [kind] * count
    there = process.gpus()
    if listed or text == "auto":
        chosen = [int(part) for part in text.split(",")] if listed else list(range(len(there) or 1))
    else:
        busy = [_Line(runs, there[i]).busy() for i in range(len(there))]
        chosen = sorted(sorted(range(len(there)), key=lambda i: (busy[i],
                                                                 i))[:int(text)]) if there else list(range(int(text)))
        if len(chosen) < int(text): chosen = list(range(int(text)))
    if not chosen or len(set(chosen)) < len(chosen):
        raise UsageError(f"--devices {text} names no device, or one twice.")
    if there and max(chosen) >= len(there):
        how = "As many as the run had" if asked is None else f"--devices {text}"
        raise UsageError(f"{how}: GPU {max(chosen)} is not there. This machine shows {len(there)}, numbered from 0.\n"
                         f"Take all of them: --devices {len(there)}")
    return [f"cuda:{i}" for i in chosen]


def lock_names(devices: list[str], config: dict[str, Any]) -> list[str]:
    """The names under which runs exclude each other. A GPU has one of its own, which doesn't depend on
    CUDA_VISIBLE_DEVICES as its number does; others are told from those of other machines by when theirs began"""
    machine = sha256(process.boot_id().encode()).hexdigest()[:8]
    there, names = process.gpus() if any(name.startswith("cuda") for name in devices) else [], set()
    for name in devices or [kind_of(config)]:
        kind, _, index = name.partition(":")
        known = kind == "cuda" and int(index or 0) < len(there)
        names.add(there[int(index or 0)] if known else f"{name.replace(':', '-')}-{machine}")
    return sorted(names)


# -- One at a time on each --

class Queue:
    """The runs that wait for a run's devices. One that needs several takes all of them at once or none, so no two runs
    ever wait for each other."""

    def __init__(self, runs: Path, config: dict[str, Any], devices: list[str] = ()):
        self.lines = [_Line(runs, name) for name in lock_names(list(devices), config)]

    def take_ticket(self, run: Run) -> None:
        "Takes the next ticket"
        at = time.time_ns()
        for line in self.lines: line.take_ticket(run, at)

    def blockers(self, run: Run) -> list[str]:
        "The runs that have a device, then those whose turn comes before this one's"
        return list(dict.fromkeys([*(name for line in self.lines for name in line.holder()),
                                   *(name for line in self.lines for name in line.earlier(run))]))

    def try_acquire(self, run: Run) -> bool:
        "Takes the devices if it is this run's turn and all of them are free"
        if any(line.earlier(run) for line in self.lines) or not all(line.take(run) for line in self.lines):
            return self.release()
        self.drop_ticket(run)
        return True

    def drop_ticket(self, run: Run) -> None:
        "Gives the ticket back"
        for line in self.lines: line.drop_ticket(run)

    def has_ticket(self, run: Run) -> bool:
        "Has this run a ticket?"
        return any(line.has_ticket(run) for line in self.lines)

    def take_now(self, run: Run) -> list[str]:
        "Takes the free devices out of turn, so that runs with tickets wait for this one; gives those before it"
        others = self.blockers(run)
        for line in self.lines: line.take(run)
        return others

    def release(self) -> bool:
        "Lets go of the devices"
        for line in self.lines: line.lock.release()
        return False


class _Line:
    """The queue of one device, in order of creation: a ticket for each run, and a lock for the one that has the device,
    which signs the lock with its name.

    A ticket counts only while its run's lock is held, so one left by a killed process holds nobody up."""

    def __init__(self, runs: Path, name: str):
        self.runs, self.folder = runs, runs / ".queue" / name
        self.lock = locks.Lock(self.folder / "lock")

    def take_ticket(self, run: Run, at: int) -> None:
        self.open()
        os.close(os.open(self.folder / f"{at:020d}.{run.id}", os.O_WRONLY | os.O_EXCL | CREATE, 0o600))

    def open(self) -> None:
        "Makes the folders. It only orders runs, so whatever lies in their place or in that of the lock has to go"
        for folder in (self.folder.parent, self.folder):
            if not folder.is_dir():
                with suppress(OSError): folder.unlink()  # a folder that another run has just made stays
            folder.mkdir(mode=0o700, exist_ok=True)
        with suppress(FileNotFoundError):
            if not stat.S_ISREG(os.lstat(self.lock.path).st_mode): remove(self.lock.path)

    def earlier(self, run: Run | None) -> list[str]:
        "The runs whose ticket comes before this one's, in order; all that wait when it has none"
        try: tickets, found = sorted(name for name in os.listdir(self.folder) if "." in name), []
        except OSError: return []  # whoever takes the device will hear of it
        for ticket in tickets:
            run_id = ticket.partition(".")[2]
            if run and run_id == run.id: break
            if locks.is_locked(self.runs / run_id / "lock"): found.append(run_id)
            else: (self.folder / ticket).unlink(missing_ok=True)
        return found

    def busy(self) -> bool:
        "Does a run have the device, or wait for it?"
        return self.folder.is_dir() and (locks.is_locked(self.lock.path) or bool(self.earlier(None)))

    def holder(self) -> list[str]:
        "The run that holds the device's lock, by the name it wrote there"
        try:
            with open_regular(self.lock.path) as f: name = f.read(99).decode("ascii", "replace")
        except OSError: return []
        held = RUN_ID.fullmatch(name) and all(map(locks.is_locked, (self.lock.path, self.runs / name / "lock")))
        return [name] if held else []

    def take(self, run: Run) -> bool:
        self.open()
        if not self.lock.acquire(): return False
        with suppress(OSError):  # a full disk costs the others the name, not this run the device
            os.ftruncate(self.lock.fileno(), 0)
            os.pwrite(self.lock.fileno(), run.id.encode(), 0)
        return True

    def drop_ticket(self, run: Run) -> None:
        for ticket in self.folder.glob(f"*.{run.id}"): ticket.unlink(missing_ok=True)

    def has_ticket(self, run: Run) -> bool: return any(self.folder.glob(f"*.{run.id}"))
