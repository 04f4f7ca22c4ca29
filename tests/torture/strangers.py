"""What strangers do to a workspace: damage data/, move folders, stop reading, signal, alter records, swap CPUs."""
from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from llm_trainer import terminal, workspace
from llm_trainer.config import load_config
from llm_trainer.errors import LLMTrainerError
from llm_trainer.runs import launch
from llm_trainer.runs.run import create_run, find_run, list_runs
from llm_trainer.runs.worker import STOPS

from . import lives
from .battery import ROOT, cases, kept_folder, struck, trial
from .forks import server

CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
_kept: dict[str, Path] = {}


def _tiny(**changes):
    return load_config("tiny").replace(**{"threads": 1, "sample_every": 0, "eval_every": 0, **changes})


def _space() -> Path:
    "A workspace whose text is prepared, made once a process"
    if "space" not in _kept or not _kept["space"].exists():
        from llm_trainer.training.recipe import prepare
        _kept["space"] = kept_folder("torture-strangers-") / "ws"
        prepare(_tiny(), workspace.init(_kept["space"]), emit=lambda event: None)
    return _kept["space"]


# T26 -----------------------------------------------------------------------------------------------------------------

@trial("T26", goal=1000, slice=4, chunk=12)
@cases
def damaged_tokens(case: int) -> str | None:
    """Token caches with flipped bits, zeroed pages, cut or swapped files, a changed record: named and prepared again to
    the same bytes, or refused; what is opened is what was made"""
    from llm_trainer.data.batches import open_tokens
    from llm_trainer.training.recipe import prepare
    rng, space = random.Random(f"tokens {case}"), workspace.open_workspace(_space())
    (folder,) = space.data.glob("tokens-*")
    whole = {f.name: f.read_bytes() for f in folder.iterdir()}
    name, kind = rng.choice(sorted(whole)), rng.choice(["bit", "page", "cut", "longer", "swap", "gone"])
    data = bytearray(whole[name])
    at = rng.randrange(len(data))
    if kind == "bit": data[at] ^= 1 << rng.randrange(8)
    elif kind == "page": data[at:at + 4096] = bytes(len(data[at:at + 4096]))
    elif kind == "cut": del data[at:]
    elif kind == "longer": data += b"\0\0"
    if kind == "swap": data = bytearray(whole[rng.choice([n for n in whole if n != name])])
    if kind == "gone": (folder / name).unlink()
    else: (folder / name).write_bytes(data)
    struck(f"{kind} of {name}")
    if bytes(data) == whole[name] and kind != "gone": return None
    try:
        open_tokens(folder)
        return f"{kind} of {name} at {at}: opened"
    except LLMTrainerError: pass
    finally:
        told = []
        prepare(_tiny(), space, emit=told.append)
    if any((folder / n).read_bytes() != tokens for n, tokens in whole.items() if n.endswith(".bin")):
        return f"{kind} of {name}: other tokens were made"
    if not any("is made again" in getattr(event, "message", "") for event in told):
        return f"{kind} of {name}: not a word"


# T27, T28, T29: real runs --------------------------------------------------------------------------------------------

def _train(space: Path, *words: str, before=(), **how) -> subprocess.Popen:
    "The program, training in the foreground until it is stopped"
    command = [*before, sys.executable, "-m", "llm_trainer", "train", "--config", "tiny", "--epochs", "100000",
               "--threads", "1",
               "--eval-every", "0", "--sample-every", "0", "--save-every", "0", "--name", "one", *words]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=space, env=env, **{"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL,
                                                          "stderr": subprocess.DEVNULL, "start_new_session": True,
                                                          "preexec_fn": _hears_signals, **how})


def _hears_signals() -> None:
    "For a child: as in a terminal, also where the battery runs under nohup or in the background of a script"
    for signum in STOPS: signal.signal(signum, signal.SIG_DFL)


def _until(condition, seconds: float = 120):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > deadline: raise TimeoutError("it never came")
        time.sleep(0.02)
    return found


@contextlib.contextmanager
def _fresh():
    "A copy of the prepared workspace, gone afterwards, what still runs in it too"
    with tempfile.TemporaryDirectory(prefix="torture-") as tmp:
        shutil.copytree(_space(), Path(tmp) / "ws")
        started: list[subprocess.Popen] = []
        try: yield Path(tmp) / "ws", started
        finally:
            for child in started:
                if child.poll() is None: child.kill()
                child.wait()


GROUND = ("move workspace", "delete run", "move run", "delete workspace", "rename run", "remove lock",
          "delete checkpoints", "move checkpoints", "delete data")


@trial("T27", goal=200, slice=1, chunk=4)
@cases
def the_ground_moves(case: int) -> str | None:
    """Workspace or run folder moved, renamed or deleted under a live run: it ends as failed: moved in its new place
    with a checkpoint, or with a word on stderr where it was deleted, and makes no folder above its own. Without its
    lock's file, its data or its folder of checkpoints it goes on, saves where that went, or says that it is gone"""
    rng = random.Random(f"ground {case}")
    kind = GROUND[case % len(GROUND)]
    with _fresh() as (root, started), tempfile.TemporaryFile() as said:
        started.append(child := _train(root, stderr=said))
        run = find_run(root / "runs", "one") if _until(lambda: (root / "runs/one").exists()) else None
        _until(lambda: run.state().step >= rng.choice([1, 3, 20]) or child.poll() is not None)
        there = root.with_name("there")
        struck(kind)
        match kind:
            case "move workspace": root.rename(there)
            case "move run":
                there.mkdir()
                (root / "runs/one").rename(there / "one")
            case "rename run": (root / "runs/one").rename(root / "runs/other")
            case "delete run": shutil.rmtree(root / "runs/one")
            case "delete workspace": shutil.rmtree(root, ignore_errors=True)
            case "remove lock": (root / "runs/one/lock").unlink()
            case "delete checkpoints": shutil.rmtree(root / "checkpoints", ignore_errors=True)
            case "move checkpoints": (root / "checkpoints").rename(root / "there")
            case "delete data": shutil.rmtree(root / "data")
        if kind in GROUND[5:]: return _goes_on(kind, root, child, run)
        code = child.wait(30)
        said.seek(0)
        words = said.read().decode()
        if code != 1: return f"{kind}: exit code {code}"
        if "delete" in kind:
            if "was deleted" not in words: return f"{kind}: it said {words[-200:]!r}"
            if (root / "runs/one").exists() or kind == "delete workspace" and root.exists():
                return f"{kind}: made again"
            return None
        if kind == "move workspace" and root.exists(): return "the old workspace was made again"
        home, name = {"move workspace": (there / "runs", "one"), "move run": (there, "one"),
                      "rename run": (root / "runs", "other")}[kind]
        found = find_run(home, name).status()
        kept = list(((there if kind == "move workspace" else root) / "checkpoints/one").glob("step-*"))
        ended = found.status, (found.reason or {}).get("code")
        if ended != ("failed", "moved") or not kept: return f"{kind}: {found.status} {found.reason} {kept}"


def _goes_on(kind: str, root: Path, child: subprocess.Popen, run) -> str | None:
    "What became of a run that lost something it can do without, and was then asked to stop"
    before = run.state().step
    _until(lambda: run.state().step > before + 5 or child.poll() is not None)
    if child.poll() is not None: return f"{kind}: it ended, exit code {child.returncode}"
    if not _until(lambda: run.locked, 30): return f"{kind}: anybody could train it, too"
    child.send_signal(signal.SIGTERM)
    code, state = child.wait(60), run.status()
    if kind == "delete checkpoints":
        if code != 1 or "is gone" not in (state.reason or {}).get("message", "") or (root / "checkpoints").exists():
            return f"{kind}: exit code {code}, {state.status} {state.reason}"
        return None
    home = root / ("there" if kind == "move checkpoints" else "checkpoints")
    if code != 143 or state.status != "stopped" or not list((home / "one").glob(f"step-*{state.step}")):
        return f"{kind}: exit code {code}, {state.status} {state.reason}"


VIEWERS = ("closed", "reader left", "nobody reads", "full disk", "all closed", "half read")


@trial("T28", goal=120, slice=0, chunk=6)
@cases
def viewers_leave(case: int) -> str | None:
    """A foreground run whose output is closed, left, full, on a full disk or read by nobody, or that is started without
    descriptors 0 to 2: it trains on to its end, exit code 0, or stops on a signal with a checkpoint"""
    kind, stops = VIEWERS[case % len(VIEWERS)], case // len(VIEWERS) % 2
    with _fresh() as (root, started):
        steps = [] if stops else ["--max-steps", "25"]
        if kind in ("closed", "all closed"):
            closing = ">&-" if kind == "closed" else "<&- >&- 2>&-"
            started.append(_train(root, *steps, before=["sh", "-c", f'exec "$@" {closing}', "sh"]))
        elif kind == "full disk":
            started.append(_train(root, *steps, stdout=open("/dev/full", "w"), stderr=subprocess.STDOUT))
        else:
            started.append(_train(root, *steps, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
            if kind == "half read": started[0].stdout.readline()
            if kind in ("reader left", "half read"): started[0].stdout.close()
        child, wanted = started[0], 0
        struck(kind)
        if stops:
            _until(lambda: (root / "runs/one").exists() and find_run(root / "runs", "one").state().step >= 2)
            child.send_signal(signal.SIGTERM)
            wanted = 143
        code = child.wait(120)
        state = find_run(root / "runs", "one").status()
        if code != wanted or state.status != ("stopped" if stops else "completed") or not state.checkpoint_step:
            return f"{kind}: exit code {code}, {state.status} {state.reason}"


SIGNALS = (signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU, signal.SIGALRM)


@trial("T29", goal=240, slice=1, chunk=6)
@cases
def other_signals(case: int) -> str | None:
    """HUP, QUIT, USR1, USR2, XCPU, ALRM to a run in the foreground or the background (HUP only to the foreground), at a
    random moment from its birth on, or as it prepares, trains, evaluates, samples or saves: a checkpoint or nothing to
    save, stopped, exit code 128 + signal, resumable"""
    rng, signum, behind = random.Random(f"signal {case}"), SIGNALS[case % 6], case // 6 % 3
    if behind == 2: return _as_a_phase_begins(rng, signum)
    with _fresh() as (root, started):
        space = workspace.open_workspace(root)
        if behind:
            run = launch.start(_tiny(epochs=100000, save_every=0), space, "one")
            pid = run.state().pid
        else:
            started.append(_train(root))
            _until(lambda: (root / "runs/one").exists())
            run, pid = find_run(root / "runs", "one"), started[0].pid
            _until(lambda: run.state().pid == pid)
        at = rng.choice(["birth", "training", "later"])
        if at != "birth": _until(lambda: run.state().step >= (1 if at == "training" else 40))
        os.kill(pid, signum)
        struck(f"{signum.name} {'behind' if behind else 'in front'}, {at}")
        if behind and signum == signal.SIGHUP:
            time.sleep(0.5)
            if not run.locked: return "a background run heard HUP"
            return None if launch.stop(run).status == "stopped" else "it did not stop"
        state = _until(lambda: not run.locked and run.status(), 60)
        if not behind and started[0].wait(30) != 128 + signum:
            return f"{signum.name}: exit code {started[0].returncode}"
        if state.status != "stopped" or (state.step and state.checkpoint_step != state.step):
            return f"{signum.name} at {at}: {state.status} {state.reason}"


def _as_a_phase_begins(rng: random.Random, signum: signal.Signals) -> str | None:
    "The signal at the beginning of a phase, then a resume to the end, which equals an untouched run"
    phase = rng.choice(lives.PHASES)
    at = {"phase": phase, "signals": [int(signum)], "nth": 1}
    with tempfile.TemporaryDirectory(prefix="torture-") as tmp:
        home = lives.new_home(tmp, prepared=phase not in lives.PREPARING)
        child = server().start(["train", "--config", "torture", "--name", lives.RUN], home, at_phase=at)
        code, state = child.wait(), lives.run_of(home).status()
        struck(f"{signum.name} while {phase}")
        if code != 128 + signum or state.status != "stopped" or state.step and state.checkpoint_step != state.step:
            return f"{signum.name} while {phase}: exit code {code}, {state.status} {state.reason}: {child.tail()}"
        if problem := lives.finish(home): return f"{signum.name} while {phase}: {problem}"


# T30 -----------------------------------------------------------------------------------------------------------------

HOSTILE = ["\x1b]0;owned\x07", "\x9b31m", "<script>alert(1)</script>", "[click](javascript:alert(1))", "| a | b |", "x"
           * 5000, "\u202egnp", "\x00", 1e999, -1e999, float("nan"), 10**400, -1, 2**63, True, None, [], {}, [[[]]],
           {"a": {"b": []}}, "", "completed", "99999999999", 0.1]


def _mutated(rng: random.Random, record):
    "`record` with some values put in place of others, at any depth"
    if isinstance(record, dict):
        made = {k: _mutated(rng, v) for k, v in record.items() if rng.random() > 0.03}
        if rng.random() < 0.2: made[rng.choice([h for h in HOSTILE if isinstance(h, str)])] = rng.choice(HOSTILE)
        return made
    if isinstance(record, list) and rng.random() < 0.7: return [_mutated(rng, v) for v in record]
    return rng.choice(HOSTILE) if rng.random() < 0.15 else record


def _views(root: Path) -> dict:
    "What each view says of the runs of a workspace: name → text, and whether it is Markdown"
    from llm_trainer.cli import render
    from llm_trainer.cli.commands import front
    from llm_trainer.tui import readers
    runs = list_runs(root / "runs")
    found = {"table": render.table([run.status() for run in runs]),
             "json": render.as_json([asdict(run.status()) for run in runs]),
             "completion": "\n".join(word for word, _ in front.complete(["status", ""]))}
    for run in runs:
        state, meta = run.status(), run.meta
        found |= {f"card {run.id}": render.card(state, meta, run.log_tail(5)), f"line {run.id}": render.line(state),
                  f"csv {run.id}": render.csv(run.metrics()), f"one {run.id}": render.as_json(run.metrics()),
                  f"markdown {run.id}": run._repr_markdown_(), f"notes {run.id}": run.notes()}
        row = readers.row_of(run, time.time())
        found[f"row {run.id}"] = terminal.clean(f"{row.word} {row.command} {row.fraction}")
        readers.RunReader(run, workspace.open_workspace(root), time.time).poll()
        with contextlib.suppress(LLMTrainerError): launch.plan_resume(run, workspace.open_workspace(root))
    for words in (["compare", "good", "bad"], ["plot", "bad"], ["runs", "--sort", "parameters"],
                  ["report", "bad", "--out", str(root / "report.md"), "--force"]):
        with contextlib.redirect_stdout(said := io.StringIO()), contextlib.redirect_stderr(said):
            with contextlib.chdir(root): front.run(words)
        found[" ".join(words[:2])] = said.getvalue()
    return found | {"report": (root / "report.md").read_text()}


@trial("T30", goal=5000, slice=20, chunk=100)
@cases
def hostile_records(case: int) -> str | None:
    """Records with values of other types, infinities, huge numbers, escape sequences, markup: every view (runs, status,
    csv, json, completion, notebook, watcher) shows the other runs, and no control byte and no markup of them"""
    rng, root = random.Random(f"records {case}"), workspace.init(kept_folder("torture-records-")).root
    try:
        facts = {"parameters": 1000, "world_size": 1, "tokenizer_hash": "ab", "data": {"weights": [1.0]},
                 "resolution": {"device": "cpu", "compile": False, "threads": 1}, "versions": {"torch": "2.13.0"}}
        good, bad = (create_run(root / "runs", _tiny().to_dict(), name, ["train", "--config", "tiny"], **facts)
                     for name in ("good", "bad"))
        for run in (good, bad):
            for last in (4, 8): run.add_attempt(from_step=0, target_epochs=2, target_steps=last, argv=["resume"],
                                                changed={"max_steps": [4, last]}, devices=["cpu"], world_size=1)
        rows = [{"kind": "train", "step": i, "loss": 1.5, "time": 1.0, "tokens": i} for i in range(3)]
        for run in (good, bad):
            (run.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        names = ["state.json", "meta.json", "metrics.jsonl", "attempts.jsonl", "samples.jsonl", "train.log"]
        for name in rng.sample(names, rng.randint(1, 3)):
            path = bad.folder / name
            sample = json.dumps({"step": 1, "text": "t", "prompt": "p"})
            lines = path.read_text().splitlines() if path.exists() else [sample]
            path.write_text("".join(json.dumps(_mutated(rng, json.loads(line))) + "\n" for line in lines))
            struck(name)
        found = _views(root)
    finally: shutil.rmtree(root, ignore_errors=True)
    if "good" not in found["table"] or "good" not in found["json"]: return "the good run is hidden"
    for view, text in found.items():
        if "internal error" in text: return f"{view}: {text[-500:]}"
        if bytes_ := CONTROL.findall(text): return f"{view}: {bytes_[:3]!r} {text[-300:]!r}"
        if view.startswith("markdown") and ("<script" in text or "](javascript" in text): return f"{view}: {text}"


# T31 -----------------------------------------------------------------------------------------------------------------

OTHERWISE = ({"ATEN_CPU_CAPABILITY": "default"}, {"MKL_CBWR": "COMPATIBLE"}, {"ATEN_CPU_CAPABILITY": "avx2"},
             {"ONEDNN_MAX_CPU_ISA": "SSE41"})


@trial("T31", goal=40, slice=0, chunk=4)
@cases
def another_cpu(case: int) -> str | None:
    """A run stopped, and resumed with other vector instructions or another setting of the math library: it goes on with
    the clause named before its first step, or is refused with it; never in silence"""
    otherwise = OTHERWISE[case % len(OTHERWISE)]
    with _fresh() as (root, started):
        def go(*words, **env):
            return subprocess.run([sys.executable, "-m", "llm_trainer", *words], cwd=root, capture_output=True,
                                  text=True, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env})
        go("train", "--config", "tiny", "--max-steps", "3", "--name", "one", "--eval-every", "0", "--sample-every", "0")
        ended = go("resume", "one", "--max-steps", "6", **otherwise)
        struck(" ".join(f"{k}={v}" for k, v in otherwise.items()))
        said = ended.stdout + ended.stderr
        from llm_trainer.device import cpu_kernels
        same = otherwise.get("ATEN_CPU_CAPABILITY", "").upper() == cpu_kernels().partition(",")[0]
        named = "CPU kernels" in said or "math library" in said
        if ended.returncode not in (0, 1) or named == same:
            return f"{otherwise}: exit code {ended.returncode}, {said[-400:]}"
