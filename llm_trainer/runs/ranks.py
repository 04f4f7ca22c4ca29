"""Several processes that train one run: torchrun's launcher starts them, and this one watches over them.

All hold the run's lock, all end with this process, none waits for one that is gone. Loads torch only to launch."""
from __future__ import annotations

import contextlib
import importlib
import logging
import mmap
import os
import signal
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_trainer.events import packed, unpacked
from llm_trainer.runs.run import Run
from llm_trainer.runs.state import TERMINAL
from llm_trainer.system import process
from llm_trainer.system.files import Appender, read_json, write_whole

BEAT = 0.5  # seconds between two signs of life
HUNG = float(os.environ.get("LLM_TRAINER_HUNG_SECONDS", 60))  # without one of a rank that steps
SLOW = 15 * HUNG  # of one that compiles, saves, evaluates or samples


# -- What all of them see --

class Handed:
    "An open descriptor that a new process inherits"
    def __init__(self, fd: int): self.fd = fd

    def __getstate__(self):
        from multiprocessing.reduction import DupFd
        return {"fd": DupFd(self.fd)}

    def __setstate__(self, state): self.fd = state["fd"].detach()


class Board(Handed):
    "A page of memory with a line for each rank: its process, its last sign of life, how far it has come"
    FIELDS = {"pid": "q", "start": "q", "beat": "d", "progress": "d",
              "done": "q"}  # of 8 bytes each, so that a write is one act
    LINE = struct.Struct("=" + "".join(FIELDS.values()))

    def __init__(self, world: int):
        self.world = world
        with tempfile.TemporaryFile() as file:
            file.truncate(world * self.LINE.size)
            super().__init__(os.dup(file.fileno()))
        self._open()

    def _open(self): self._page = mmap.mmap(self.fd, self.world * self.LINE.size)

    def __getstate__(self): return {**super().__getstate__(), "world": self.world}

    def __setstate__(self, state):
        super().__setstate__(state)
        self.world = state["world"]
        self._open()

    def read(self, rank: int) -> dict[str, Any]:
        return dict(zip(self.FIELDS, self.LINE.unpack_from(self._page, rank * self.LINE.size)))

    def write(self, rank: int, **news) -> None:
        "Changes part of a rank's line; only the rank itself does, or the launcher once it is gone"
        for name, value in news.items():
            struct.pack_into(f"={self.FIELDS[name]}", self._page, rank * self.LINE.size + 8
                             * list(self.FIELDS).index(name), value)

    def alive(self, rank: int) -> bool:
        "Does the process of a rank live?"
        line = self.read(rank)
        pid = line["pid"]
        return bool(pid) and process.start_ticks(pid) == line["start"] and process.process_state(pid) != "zombie"

    def lost(self) -> list[int]:
        "Ranks that started and ended before they were done"
        return [rank for rank, line in enumerate(self.lines()) if line["pid"] and not line["done"]
                and not self.alive(rank)]

    def signal(self, rank: int, signum: int) -> None:
        "Signals the process of a rank, if it is still the same process"
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if self.alive(rank): os.kill(self.read(rank)["pid"], signum)

    def lines(self) -> list[dict[str, Any]]: return [self.read(rank) for rank in range(self.world)]


@dataclass
class Hand:
    "What a rank is given on its way"
    entry: str  # the module whose `main` it runs
    folder: str  # the run's
    lock: Handed
    board: Board
    words: str  # the folder in which a rank leaves its last words
    channel: Handed | None  # to show events through, where somebody looks
    launcher: int  # its pid
    devices: list[str]

    def show(self, event) -> None:
        "Passes an event on to the launcher's screen; when there is no room, it is dropped"
        if self.channel is None: return
        with contextlib.suppress(OSError, ValueError):
            with socket.socket(fileno=os.dup(self.channel.fd)) as out: out.send(packed(event), socket.MSG_DONTWAIT)

    def last_words(self, rank: int, code: str | None, message: str, exit_code: int, echo: bool) -> None:
        "Leaves a note of why this rank ends; `echo`: only because another one is gone"
        word = {"rank": rank, "code": code, "message": message, "exit_code": exit_code, "time": time.monotonic(),
                "echo": echo}
        with contextlib.suppress(OSError): write_whole(Path(self.words) / f"{rank}.json", word)


def enter(hand: Hand) -> int:
    "Where a rank begins"
    return importlib.import_module(hand.entry).main(hand)


class Pulse:
    "A thread with a rank's signs of life; it ends the rank when its launcher is gone"
    def __init__(self, hand: Hand, rank: int, orphaned: Callable[[], None] = lambda: None):
        self.hand, self.rank, self.orphaned = hand, rank, orphaned
        now = time.monotonic()
        hand.board.write(rank, start=process.start_ticks(os.getpid()) or 0, beat=now, progress=now, done=False,
                         pid=os.getpid())
        threading.Thread(target=self._run, name="pulse", daemon=True).start()

    def _run(self) -> None:
        while os.getppid() == self.hand.launcher:
            self.hand.board.write(self.rank, beat=time.monotonic())
            time.sleep(BEAT)
        self.orphaned()
        os._exit(1)

    def further(self) -> None:
        "The loop has made progress"
        self.hand.board.write(self.rank, progress=time.monotonic())

    def done(self) -> None:
        "This rank may end now"
        self.hand.board.write(self.rank, done=True)


def is_echo(e: BaseException) -> bool:
    "Is `e` only the consequence of another rank's end?"
    known = "closed by peer", "connection reset", "broken pipe", "gloo", "nccl", "c10d", "store", "socket", "timed out"
    return isinstance(e, RuntimeError) and any(word in str(e).lower() for word in known)


# -- The launcher --

class Signals:
    "Notes the signals that arrive, for as long as the block lasts"
    def __init__(self, which: tuple[int, ...]): self.which, self.noted = which, []

    def __enter__(self) -> Signals:
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {n: signal.signal(n, lambda signum, frame: self.noted.append(signum)) for n in self.which}
        return self

    def __exit__(self, *_) -> None:
        for signum, handler in self._before.items(): signal.signal(signum, handler)


class Launch:
    "Starts the ranks of a run through torchrun's agent and watches over them until all are gone"
    def __init__(
        self,
        run: Run,  # its lock held
        entry: str,  # the module whose `main` a rank runs
        devices: list[str],  # one for each rank
        restarts: int,  # how often all start again from the newest checkpoint after one was lost
        signals: Signals,
        show: Callable[[Any], None] | None,  # called with each event of rank 0; None: nobody looks
    ):
        self.run, self.entry, self.devices, self.restarts = run, entry, devices, restarts
        self.signals, self.show = signals, show
        self.world, self.board = len(devices), Board(len(devices))
        self.result: dict[int, int] = {}
        self.error: BaseException | None = None
        self.exit_code, self._passed_on, self._lost, self._hung = 0, 0, None, None
        self._idle, self._latest, self._silent, self._tick = 0.0, None, [0.0] * self.world, time.monotonic()
        self._mine, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM) if show else (None, None)

    def until_gone(self) -> tuple[tuple[str, str | None, str] | None, int]:
        "Runs it to its end; how that was, if rank 0 could not say so itself (status, code, message), and the exit code"
        with tempfile.TemporaryDirectory(prefix="llm-trainer-") as self.words:
            agent = threading.Thread(target=self._agent, name="torchrun", daemon=True)
            agent.start()
            while agent.is_alive() and not self._stopped_early():
                self._relay()
                self._pass_on()
                self._look_after()
                agent.join(0.1)
            self._end(agent)
            status = self.run.state().status
            if status not in TERMINAL and not self._stopped_early() and self.board.lost(): self._lose()
            if status in TERMINAL:
                return None, self.result.get(0, self.exit_code if status in ("completed", "stopped") else 1)
            if self._stopped_early():
                noted = [signal.Signals(one).name for one in self.signals.noted]
                reason = f"{noted[0]} received" if noted else "asked to stop"
                return ("stopped", "signal", f"{reason} before the first step: nothing to save"), self.exit_code
            return self._verdict()

    def _agent(self) -> None:
        "torchrun, in a thread so that signals stay with us"
        try:
            logging.disable(logging.CRITICAL)  # its own account of a failure: ours is shorter
            from torch.distributed.launcher.api import LaunchConfig, elastic_launch
            config = LaunchConfig(
                min_nodes=1, max_nodes=1, nproc_per_node=self.world, run_id=self.run.id, rdzv_backend="c10d",
                rdzv_endpoint="127.0.0.1:0", local_addr="127.0.0.1", max_restarts=self.restarts, monitor_interval=0.5)
            hand = Hand(self.entry, str(self.run.folder), Handed(self.run.lock.fileno()), self.board, self.words,
                        self._theirs and Handed(self._theirs.fileno()), os.getpid(), self.devices)
            self.result = elastic_launch(config, enter)(hand)
        except BaseException as e: self.error = e

    # -- What is done meanwhile --

    def _relay(self) -> None:
        "Shows the events of rank 0"
        while self._mine:
            try: data = self._mine.recv(1 << 20, socket.MSG_DONTWAIT)
            except OSError: return
            self.show(unpacked(data))

    def _pass_on(self) -> None:
        "Passes signals on to rank 0, which makes all ranks save and end"
        if not self.board.alive(0): return
        for signum in self.signals.noted[self._passed_on:]:
            self.exit_code = self.exit_code or 128 + signum
            self._passed_on += 1
            self.board.signal(0, signum)

    def _stopped_early(self) -> bool:
        "Was a stop requested before rank 0 could take it?"
        if self.board.read(0)["pid"] or self._lost or not (self.signals.noted or "stop" in self.run.asked()):
            return False
        self.exit_code = 128 + self.signals.noted[0] if self.signals.noted else 0
        return True

    def _look_after(self) -> None:
        "Ends all ranks where one is gone or hangs"
        if self.board.lost(): return self._lose()
        now, lines = time.monotonic(), self.board.lines()
        passed, self._tick = min(1.0, now - self._tick), now  # this process may have been suspended
        if self.run.state().status in TERMINAL or not all(line["pid"] for line in lines): return
        fresh, limit = [now - line["beat"] < 10 * BEAT for line in lines], self._limit()
        for rank, well in enumerate(fresh):
            self._silent[rank] = 0.0 if well or not any(fresh) else self._silent[rank] + passed
        latest = max(line["progress"] for line in lines)
        self._idle = 0.0 if latest != self._latest else self._idle + passed * all(fresh)  # all suspended: nobody hangs
        self._latest = latest
        worst = self._silent.index(max(self._silent))
        if self._silent[worst] > limit: self._lose(worst, f"gave no sign of life for {limit:.0f} seconds")
        elif self._idle > limit: self._lose(0, f"came no further for {limit:.0f} seconds, nor did the others")

    def _limit(self) -> float:
        "How many seconds a rank may be silent now"
        state = self.run.state()
        if not state.ranks and state.phase in ("queued", "reading", "downloading", "tokenizing"): return float("inf")
        return max(HUNG, 10 * state.step_seconds) if state.phase == "training" and state.step_seconds else SLOW

    def _lose(self, rank: int | None = None, why: str = "is gone") -> None:
        "Ends all ranks because of `rank`, or of one that died; others may have died of that already"
        time.sleep(0.2)
        heard = [other for other in range(self.world) if (Path(self.words) / f"{other}.json").exists()]
        if rank is None:  # who left no word, and of these the one that was silent first
            rank = min(self.board.lost(), key=lambda other: (other in heard, self.board.read(other)["beat"]), default=0)
        self._lost = rank, why, self.run.state().step
        self._say(f"rank {rank} ({self.devices[rank]}) {why}; ending the others")
        for other in range(self.world): self.board.signal(other, signal.SIGKILL)
        for other in range(self.world): self.board.write(other, pid=0, done=False)  # torchrun may start them again
        self._idle, self._silent = 0.0, [0.0] * self.world

    def _say(self, text: str) -> None:
        "A line in the run's log, beside those of rank 0"
        file = Appender(self.run.folder / "train.log")
        with contextlib.suppress(OSError): file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n".encode())
        file.close()

    def _end(self, agent: threading.Thread) -> None:
        "No rank outlives its launch"
        import multiprocessing
        deadline = time.monotonic() + 30
        while agent.is_alive() and time.monotonic() < deadline:
            for child in multiprocessing.active_children(): child.kill()
            agent.join(0.1)
        self._relay()
        for rank in range(self.world): self.board.signal(rank, signal.SIGKILL)
        for end in filter(None, (self._mine, self._theirs)): end.close()
        logging.disable(logging.NOTSET)

    def _verdict(self) -> tuple[tuple[str, str, str], int]:
        "What to store of a failure that no rank 0 was left to report, and the exit code"
        said = [word for word in map(read_json, Path(self.words).glob("*.json"))
                if isinstance(word.get("message"), str)]
        said = sorted((word for word in said if not word.get("echo")), key=lambda word: word.get("time", 0))
        def name(rank): return f"Rank {rank} ({self.devices[rank]})"
        again = f"\nGo on from the newest checkpoint: llm-trainer resume {self.run.id}"
        if said:
            word = said[0]
            return ("failed", word.get("code") or "error",
                    f"{name(word['rank'])}: {word['message']}"), word.get("exit_code") or 1
        if self._lost:
            rank, why, step = self._lost
            return ("failed", "rank_lost", f"{name(rank)} {why}, at step {step}; the others were ended.{again}"), 1
        text = str(self.error or "they ended without saying how").strip()
        return ("failed", "rank_lost", f"The ranks could not be started: {text[-500:]}{again}"), 1
