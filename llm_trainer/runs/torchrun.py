"""What a process does that torchrun started for `llm-trainer train` or `resume`: it joins the others in training.

Rank 0 makes the run and tells the others its name; they talk through torchrun's store. Loads torch only then."""
from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from llm_trainer import __version__
from llm_trainer.errors import LLMTrainerError, RunFailed, UsageError
from llm_trainer.events import Emit, Event, Finished, Note
from llm_trainer.runs import launch, worker
from llm_trainer.runs.queue import Queue
from llm_trainer.runs.rank import asked_by_signal, take_part
from llm_trainer.runs.ranks import BEAT, HUNG, SLOW, is_echo
from llm_trainer.runs.run import Run
from llm_trainer.runs.state import TERMINAL, State
from llm_trainer.runs.writer import RunWriter
from llm_trainer.system import locks, process
from llm_trainer.system.files import remove
from llm_trainer.workspace import Workspace

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
COME = 300.0  # seconds in which all ranks are there: the slowest of them reads Python from a network's disk
SILENT = 3 * worker.HEARTBEAT  # seconds without a sign of life on the disk, after which a rank 0 is given up
ALONE = "torchrun is gone"  # why a rank ends whose own torchrun has ended
GRACE = 5.0  # seconds in which a rank that heard of the end of another one says so itself


@dataclass(frozen=True)
class Seat:
    "The place of this process among those that torchrun started"
    rank: int
    world: int
    local_rank: int
    local_world: int
    restart: int  # how often torchrun has started all of them again
    launch: str  # tells one torchrun from another


def seat() -> Seat | None:
    "This process's, from torchrun's variables; None if it is alone. UsageError if they are not numbers"
    if not all(os.environ.get(name) for name in VARIABLES) or os.environ["WORLD_SIZE"] == "1": return None
    try: numbers = [int(os.environ[name]) for name in VARIABLES[:4]]
    except ValueError:
        raise UsageError("RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE are set, and are not all numbers.\n"
                         "They are torchrun's: unset them, or start with torchrun.") from None
    known, parent = os.environ.get("TORCHELASTIC_RUN_ID", "none"), os.getppid()
    launched = known if known != "none" else f"{os.uname().nodename} {parent} {process.start_ticks(parent)}"
    return Seat(*numbers, int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0), launched)


def _connect(place: Seat, patience: float):
    "A connection to torchrun's store, under a prefix for this start"
    from torch.distributed import PrefixStore, rendezvous
    try: store = next(iter(rendezvous("env://", timeout=timedelta(seconds=patience))))[0]
    except Exception as e:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise RunFailed("rank_lost", f"torchrun's store at {where} does not answer: {str(e).splitlines()[0][:200]}\n"
                                     "Is that port open between the machines? Try another: --rdzv-endpoint HOST:PORT"
                        ) from None
    return PrefixStore(f"llm-trainer/{place.restart}", store)


# -- Meeting --

_met = False


def met() -> bool:
    "Do the others know of this process?"
    return _met


def meet(place: Seat, space: Workspace, argv: list[str]) -> Team:
    "Waits for the others. UsageError at every rank if their arguments differ or they don't share a workspace"
    global _met
    team, token = Team(place), None
    if place.rank == 0:
        space.runs.mkdir(parents=True, exist_ok=True)
        token = space.runs / f".new-meeting-{os.urandom(4).hex()}"  # swept away with other half-made folders
        token.mkdir(mode=0o700)
    try:
        team.tell(f"here/{place.rank}", {**process.identity(), "argv": argv, "version": __version__, "rank": place.rank,
                                         "local_rank": place.local_rank, "runs": str(space.runs), "token": token
                                         and token.name})
        _met = True
        first = team.hear("here/0")
        if "code" not in first: team.tell(f"seen/{place.rank}", _leave_mark(space.runs / first["token"], place.rank))
        if token:
            team.known = [team.hear(f"here/{rank}") for rank in range(place.world)]
            team.tell("verdict", _fault(team, [one["rank"] for one in team.known if "code" not in one], token))
        if fault := _absent(first) if "code" in first else team.hear("verdict"): raise UsageError(fault)
        team.known = [team.hear(f"here/{rank}") for rank in range(place.world)]
    finally:
        if token: remove(token)
    team.begin()
    return team


def check(**flags) -> None:
    "Refuses those flags of `train` and `resume` that torchrun decides"
    instead = {"background": "torchrun holds the processes: put torchrun itself into the background (nohup, sbatch).",
               "parallel": "Runs that torchrun starts wait for nobody.",
               "devices": "torchrun starts a process for each device: --nproc-per-node says how many.",
               "restarts": "torchrun starts them again itself: --max-restarts says how often."}
    for name, value in flags.items():
        if value: raise UsageError(f"--{name} can't be used under torchrun.\n{instead[name]}")


def absent(place: Seat, argv: list[str], code: int) -> None:
    "Tells the others that this rank can't begin, so that they don't wait for it"
    with suppress(Exception):
        Team(place).tell(f"here/{place.rank}", {"code": code, "argv": argv, "host": os.uname().nodename,
                                                "rank": place.rank})


def _leave_mark(folder: Path, rank: int) -> str | None:
    "Writes a file where rank 0 looks for it; returns why it can't, if so. A network disk may show new folders late"
    deadline = time.monotonic() + 5
    while True:
        try: return (folder / str(rank)).write_text("here") and None
        except OSError as e:
            if time.monotonic() > deadline: return e.strerror or "it can't be written"
            time.sleep(0.2)


def _fault(team: Team, present: list[int], token: Path) -> str | None:
    "Why these ranks can't train together; None if they can"
    first = team.known[0]
    for one in team.known:
        if one["argv"] != first["argv"]:
            return (f"The nodes were started with different arguments.\nRank 0 on {first['host']}: {_words(first)}\n"
                    f"Rank {one['rank']} on {one['host']}: {_words(one)}\nStart all of them with the same.")
        if "code" in one: return _absent(one)
        if one["version"] != first["version"]:
            return (f"Rank {one['rank']} on {one['host']} has llm_trainer {one['version']}, rank 0 has "
                    f"{first['version']}.\n"
                    "Install the same version on all machines.")
    for rank in present:
        why, one = team.hear(f"seen/{rank}"), team.known[rank]
        if why is None and not _shows(token / str(rank)): why = "what it writes does not appear here"
        if why is None and one["runs"] != first["runs"]: why = "it is mounted at another path"
        if why:
            return (f"Rank {rank} on {one['host']} does not share the workspace of rank 0 on {first['host']}: {why}.\n"
                        f"Its runs are in {one['runs']}, those of rank 0 in {first['runs']}. All machines need one "
                        f"workspace,\n"
                        "on a disk they share and at the same path: export LLM_TRAINER_HOME=/shared/path")
    return None


def _words(one: dict) -> str: return " ".join(one["argv"])[:300]


def _absent(one: dict) -> str:
    return (f"Rank {one['rank']} on {one['host']} could not begin (exit code {one['code']}); it said why itself.\n"
            "All machines need the same arguments and one workspace.")


def _shows(file: Path) -> bool:
    deadline = time.monotonic() + 5
    while not file.exists():
        if time.monotonic() > deadline: return False
        time.sleep(0.2)
    return True


# -- What they know of each other --

def _alive(one: dict) -> bool:
    return process.same_process(one) and process.process_state(one["pid"]) not in (None, "zombie")


class Team:
    "The ranks that torchrun started, as seen from this one"
    def __init__(self, place: Seat, store=None):
        self.place, self.rank, self.launcher = place, place.rank, os.getppid()
        self._store, self.known = store or _connect(place, COME), []
        self.run: Run | None = None
        self._further, self._ending = time.monotonic(), False
        self._beats: dict[int, bytes] = {}
        self._silent: dict[int, float] = {}  # seconds without a new sign of life
        self._words: dict[int, dict] = {}  # the last ones of ranks that failed
        self._missed: set[int] = set()  # ranks whose end was seen by another one of their machine
        self._signalled = 0
        self._written: tuple[float | None, float] = None, time.monotonic()  # rank 0's last heartbeat on the disk
        self._on_loss: Callable[[str], None] = lambda why: None

    def tell(self, key: str, value: Any) -> None: self._store.set(key, json.dumps(value))

    def hear(self, key: str) -> Any:
        "The value of `key` in the store; waits for it"
        try: return json.loads(self._store.get(key))
        except Exception:
            raise RunFailed("rank_lost", f"Nothing was heard of {key.replace('/', ', rank ')} within {COME:.0f} "
                                         f"seconds.\n"
                                         "Look at what the other nodes say, and start all of them again.") from None

    def devices(self, kind: str) -> list[str]:
        "One for each rank on every machine"
        return [f"cuda:{one['local_rank']}" if kind == "cuda" else kind for one in self.known]

    def name(self, rank: int) -> str: return f"Rank {rank} on {self.known[rank]['host']}"

    # -- Signs of life --

    def begin(self) -> None:
        "From here on this rank gives signs of life, and ends when rank 0 or torchrun is gone"
        self._pulse = _connect(self.place, HUNG)
        threading.Thread(target=self._run, name="pulse", daemon=True).start()

    def further(self) -> None:
        "The loop has made progress"
        self._further = time.monotonic()

    def _near(self) -> list[dict]:
        "The other ranks on this machine"
        mine = self.known[self.rank]
        return [one for one in self.known if one is not mine
                and all(one[key] == mine[key] for key in ("host", "boot_id", "pid_namespace"))]

    def gone(self) -> list[int]:
        "Ranks whose process was seen to end, on this machine or their own, or that left last words"
        dead = [one["rank"] for one in self._near() if not _alive(one)]
        return sorted({*dead, *self._words, *(self._missed if self.rank == 0 else ())})

    def _report(self) -> None:
        "Tells rank 0 of the ranks of this machine that ended without a goodbye: on another one it can't see them"
        for one in self._near():
            rank = one["rank"]
            if rank in self._missed or _alive(one) or self._pulse.check([f"bye/{rank}"]): continue
            self._missed.add(rank)
            for key in (f"missed/{rank}", "missed"): self._pulse.set(key, "1")

    def _run(self) -> None:
        count, tick, grace = 0, time.monotonic(), None
        watched = range(1, self.place.world) if self.rank == 0 else (0,)
        while not self._ending:
            passed, tick = min(1.0, time.monotonic() - tick), time.monotonic()
            try:
                self._pulse.set(f"beat/{self.rank}", str(count := count + 1))
                self._listen(watched, passed)
                if self.rank: self._report()
                why = self._judge()
            except Exception as e:
                why = f"torchrun's store does not answer any more ({type(e).__name__})"
            if os.getppid() != self.launcher: why = ALONE
            grace = (grace or time.monotonic() + (0 if "no sign" in why or "no further" in why
                                                  else GRACE)) if why else None
            if grace and time.monotonic() >= grace and not self._ending: self._lose(why)
            time.sleep(BEAT)

    def _listen(self, watched: range | tuple, passed: float) -> None:
        "Counts how long each of them has been silent"
        keys = [f"beat/{rank}" for rank in watched if rank in self._beats or self._pulse.check([f"beat/{rank}"])]
        for key, beat in zip(keys, self._pulse.multi_get(keys) if keys else ()):
            rank = int(key[5:])
            same = self._beats.get(rank) == beat
            self._beats[rank], self._silent[rank] = beat, self._silent.get(rank, 0.0) + passed if same else 0.0
        if self.rank == 0 and self._pulse.check(["words"]):
            said = [rank for rank in watched if rank not in self._words and self._pulse.check([f"words/{rank}"])]
            for rank in said: self._words[rank] = json.loads(self._pulse.get(f"words/{rank}"))
        if self.rank == 0 and self._pulse.check(["missed"]):
            self._missed |= {rank for rank in watched if self._pulse.check([f"missed/{rank}"])}

    def _judge(self) -> str | None:
        "Why all ranks have to end; None as long as they don't"
        gone, limit = self.gone(), self._limit()
        if self.rank:
            if self._pulse.check(["end"]) or 0 in gone: return "rank 0 is gone"
            return "rank 0 gave no sign of life" if self._silent.get(0, 0.0) > limit + 2 * GRACE else None
        if self._pulse.check(["end"]): return "the others gave up rank 0, which was silent,"
        if gone: return f"{self.name(gone[0])} is gone"
        for rank, silent in self._silent.items():
            if silent > limit: return f"{self.name(rank)} gave no sign of life for {limit:.0f} seconds"
        if time.monotonic() - self._further > limit: return f"the ranks came no further for {limit:.0f} seconds"
        return None

    def _limit(self) -> float:
        "How many seconds a rank may be silent now"
        state = self._look() if self.run else None
        if state is None or not state.ranks: return 10 * SLOW  # the text is prepared
        return max(HUNG, 10 * state.step_seconds) if state.phase == "training" and state.step_seconds else SLOW

    def _look(self) -> State:
        "How the run stands on the disk; takes note of when rank 0 last wrote there"
        state = self.run.state()
        if state.heartbeat != self._written[0]: self._written = state.heartbeat, time.monotonic()
        return state

    def _lose(self, why: str) -> None:
        "Ends this process; rank 0 stores why, or another rank if rank 0 is gone"
        self._end_suspended()
        with suppress(Exception): self._on_loss(why)
        if self.rank == 0:
            with suppress(Exception): self._pulse.set("end", json.dumps({"code": 1}))
        os._exit(self._code_of_end())

    def _end_suspended(self) -> None:
        "Ends the ranks of this machine that can't end by themselves; one of them may have the run's lock"
        silent = [one for one in self._near() if self._silent.get(one["rank"], 0.0) > min(GRACE, HUNG)]
        for one in silent: process.send(one, signal.SIGKILL)
        deadline = time.monotonic() + GRACE
        while any(map(_alive, silent)) and time.monotonic() < deadline: time.sleep(0.05)

    def _code_of_end(self) -> int:
        state = self.run.state() if self.run else None
        if state is None or state.status not in TERMINAL: return 1
        if state.status == "stopped" and self._signalled: return 128 + self._signalled
        return 0 if state.status in ("completed", "stopped") else 1

    # -- Rank 0 --

    @contextmanager
    def making(self) -> Iterator[None]:
        "Rank 0 makes the run; if it can't, it tells the others why"
        try: yield
        except BaseException as e:
            known = isinstance(e, LLMTrainerError)
            self.tell("run", {"code": e.exit_code if known else 1, "message": str(e) if known
                              else f"Rank 0 failed: {e}"})
            raise

    def start(self, space: Workspace, argv: list[str], kind: str, make: Callable[..., Run]) -> Run:
        "The run that rank 0 tells the others of: an earlier start's, or what `make` makes of the devices and torchrun"
        run = self.again(space, argv) or make(devices=self.devices(kind), torchrun=self.place.launch)
        self.share(run)
        return run

    def share(self, run: Run | None) -> None:
        "Tells the others which run it is; None, or a run without its lock, means there is nothing to do"
        self.run = run
        if run and run.lock: return self.tell("run", {"folder": str(run.folder)})
        ended = run.state().status if run else "completed"
        self.tell("run", {"folder": None, "code": 0 if ended in ("completed", "stopped") else 1,
                          "message": f"The run is {ended}."})

    def again(self, space: Workspace, argv: list[str]) -> Run | None:
        "The run of an earlier start, if torchrun has restarted all ranks; None if there was none"
        if not self.place.restart: return None
        from llm_trainer.runs.run import list_runs
        for run in list_runs(space.runs):
            last = (run.attempts() or [{}])[-1]
            if last.get("torchrun") != self.place.launch or run.meta.get("argv") != argv and last.get("argv") != argv:
                continue
            state = run.state()
            if state.status in TERMINAL and (state.reason or {}).get("code") != "rank_lost": return Run(run.folder)
            run.lock = locks.Lock(run.folder / "lock")
            if not run.lock.acquire(wait=10): raise launch.BusyError(f"{run.id} is being trained by another process.")
            kept = {key: value for key, value in last.items() if key not in ("attempt", "started_at", "format_version")}
            steps = launch.saved_steps(space.checkpoints / run.id)
            run.add_attempt(**{**kept, "changed": {}, "from_step": max(steps, default=0),
                               "restart": self.place.restart})
            return run
        return None

    def lead(self, run: Run, space: Workspace, show: Emit) -> int:
        "Trains `run` with the others and writes down what happens; the exit code"
        writer = RunWriter(run, run.lock)
        again = f"\nGo on from the newest checkpoint: start the same torchrun with `resume {run.id}`."

        def see(event: Event) -> None:
            with suppress(Exception): show(event)

        def emit(event: Event) -> None:
            writer.log(event)
            see(event)
            self.further()
        self._on_loss = lambda why: writer.finish("failed", *self._verdict(why, writer.state.step, again))
        queue = self._take_turn(run, space, emit)
        writer.update(status="running", phase="starting", waiting_for=[])
        with worker.Watch(writer, see, deaf=lambda: bool(self.gone())) as watch:
            self.further()
            try:
                ended, code = worker.follow(take_part(run, space, self._local(run), writer.requests, emit), watch, emit)
            except BaseException as e:
                ended, code = self._explain(e, writer.state.step, again) or worker.failure(e, run, writer)
            watch.ends_within(worker.LAST_WORD, ended, code)
            self._ending = True
            writer.finish(ended.status, ended.code, ended.message)
            see(ended)
            self._dismiss(code)
        worker.ignore_signals()  # torchrun may send some to those that are still here
        run.lock.release()
        queue.release()
        return code

    def _local(self, run: Run) -> list[str]:
        "The devices of this machine's ranks, by their local numbers"
        kind = str(run.attempts()[-1]["devices"][self.rank]).partition(":")[0]
        return [f"cuda:{i}" if kind == "cuda" else kind for i in range(self.place.local_world)]

    def _take_turn(self, run: Run, space: Workspace, emit: Emit) -> Queue:
        "Takes this machine's devices, so that queued runs wait for this one; torchrun's own don't wait"
        queue = Queue(space.runs, run.config(), self._local(run))
        if self.place.local_rank == 0 and (others := queue.take_now(run)):
            emit(Note(f"This run doesn't wait for its turn on {os.uname().nodename}: {', '.join(others)} came first."))
        return queue

    def _explain(self, e: BaseException, step: int | None, again: str) -> tuple[Finished, int] | None:
        "What to store if `e` is only the consequence of another rank's end"
        if not is_echo(e): return None
        deadline = time.monotonic() + GRACE
        while time.monotonic() < deadline and not self._first_word():
            if self.gone() and time.monotonic() > deadline - GRACE + 1: break  # it had its time to say why
            time.sleep(0.1)
        lost = self.gone() or sorted(self._silent, key=lambda rank: -self._silent[rank])[:1]
        why = f"{self.name(lost[0])} is gone" if lost else "one of the ranks is gone"
        return Finished("failed", *self._verdict(why, step, again)), (self._first_word() or {}).get("exit_code") or 1

    def _verdict(self, why: str, step: int | None, again: str) -> tuple[str, str]:
        "The code and message of an end: those of the rank that failed first, if it left any"
        word = self._first_word()
        if word: return word["code"] or "error", f"{self.name(word['rank'])}: {word['message']}"
        return "rank_lost", f"{why[0].upper()}{why[1:]}, at step {step or 0}; the others were ended.{again}"

    def _first_word(self) -> dict | None:
        "The last words of the rank that failed on its own, not because another one did"
        said = [word for word in self._words.values() if not word["echo"]]
        return min(said, key=lambda word: word["time"], default=None)

    def _dismiss(self, code: int) -> None:
        "Tells the others how it ended, and gives them time to hear it"
        with suppress(Exception):
            self.tell("end", {"code": code})
            deadline, there = time.monotonic() + GRACE, set(range(1, self.place.world))
            while time.monotonic() < deadline and there:
                there -= {*self.gone(), *(rank for rank in there if self._store.check([f"bye/{rank}"]))}
                time.sleep(0.05 * bool(there))

    # -- The other ranks --

    def follow(self, space: Workspace) -> int:
        "Waits for rank 0's run and trains it with the others; the exit code"
        while not self._store.check(["run"]): time.sleep(0.1)
        told = self.hear("run")
        if not told.get("folder"):
            if told["code"]:
                error = LLMTrainerError(told["message"])
                error.exit_code = told["code"]
                raise error
            return 0
        self.run = run = Run(Path(told["folder"]))
        self._on_loss = self._inherit
        queue = self._take_turn(run, space, lambda event: None)
        with asked_by_signal(self._note_signal) as requests:
            try:
                for _ in take_part(run, space, self._local(run), requests): self.further()
                code = 0
            except BaseException as e:
                teller = SimpleNamespace(say=lambda text: print(text, file=sys.__stderr__, flush=True),
                                         state=run.state())
                ended, code = worker.failure(e, run, teller)
                self._say_last(ended, code, is_echo(e))
            code = self._await_end(code)
        self._ending = True
        worker.ignore_signals()
        queue.release()
        return code

    def _note_signal(self, signum: int) -> None: self._signalled = signum

    def _say_last(self, ended: Finished, code: int, echo: bool) -> None:
        with suppress(Exception):
            self.tell(f"words/{self.rank}", {"rank": self.rank, "code": ended.code, "message": ended.message,
                                             "exit_code": code,
                                            "time": time.time(), "echo": echo})
            self._store.set("words", "1")

    def _await_end(self, code: int) -> int:
        "The exit code of all ranks, from rank 0"
        deadline = time.monotonic() + worker.LAST_WORD + GRACE
        with suppress(Exception):
            while time.monotonic() < deadline:
                if self._store.check(["end"]):
                    code = self.hear("end")["code"]
                    self._store.set(f"bye/{self.rank}", "1")
                    return code
                if 0 in self.gone(): break
                time.sleep(0.05)
        with suppress(Exception): self._inherit("rank 0 is gone")
        return code or self._code_of_end()

    def _inherit(self, why: str) -> None:
        """Stores what rank 0 can't: why the run ended. A rank 0 that can't be ended from here may have the run's lock
        and be suspended, or its machine gone: once nothing is heard of it on the disk either, it is given up"""
        deadline = time.monotonic() + SILENT + GRACE
        while True:
            with suppress(launch.BusyError), launch.own(self.run, listen=False) as lock:
                return self._give_up(Run(self.run.folder, lock), why)
            state = self._look()
            if state.status in TERMINAL or why == ALONE or time.monotonic() > deadline: return  # it says why itself
            if time.monotonic() - self._written[1] > SILENT: break
            time.sleep(BEAT)
        first = self.known[0]
        still = " and" if why.startswith("rank 0") else "; rank 0"
        self._give_up(self.run, f"{why}{still} still holds the run's lock (pid {first['pid']})",
                      f"End it on {first['host']}: llm-trainer stop {self.run.id} --now\n", f".rank-{self.rank}")
        with suppress(Exception): self._pulse.set("end", json.dumps({"code": 1}))  # for when it wakes

    def _give_up(self, run: Run, why: str, before: str = "", aside: str = "") -> None:
        state, what = run.state(), why.replace("rank 0", self.name(0))
        if state.status in TERMINAL: return
        launch.mark(run, "failed", "rank_lost", f"{what[0].upper()}{what[1:]}, at step {state.step}.\n{before}"
                    f"Go on from the newest checkpoint: start the same torchrun with `resume {run.id}`.", aside)
