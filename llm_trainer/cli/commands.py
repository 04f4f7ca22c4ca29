"""The commands of `llm-trainer`, as plain functions: Fire makes the command line from their signatures.

Every import that costs something lies inside the function that needs it, so `runs` and `--help` start at once.
"""
from __future__ import annotations

import os
import re
import secrets
import shlex
import sys
import time
import typing
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from llm_trainer import __version__, workspace
from llm_trainer.cli import render
from llm_trainer.errors import BusyError, LLMTrainerError, NotFoundError, UsageError
from llm_trainer.events import print_notes
from llm_trainer.cli.parser import Flag, From, FrontEnd, alone, docments
from llm_trainer.runs.resolve import is_folder, resolve_inputs, weights
from llm_trainer.system.files import deliver
from llm_trainer.terminal import clean, quoted, size


# Settings as flags ---------------------------------------------------------------------------------------------------

DRAWN = ("loss", "perplexity", "bits_per_byte", "lr", "grad_norm", "tokens_per_second", "memory_bytes")
GROUPS = {"model": "Model", "data": "Data and tokenizer", "training": "Training", "sampling": "Samples while training"}


def _flags(choose=lambda knob: True, hide=lambda knob: False, default=None) -> list[Flag]:
    "The settings of the config as flags; `default`: what help says in place of their defaults"
    from llm_trainer.config import all_settings
    kinds = {"int": int, "float": float, "bool": bool, "text": str}
    def kind(knob): return Literal[tuple(knob.choices)] if knob.type == "choice" else kinds[knob.type]
    return [Flag(k.name, kind(k), k.default, k.description, GROUPS[k.group], note=_note(k, default), hidden=hide(k))
            for k in all_settings().values() if choose(k)]


def _sampling_flags() -> list[Flag]:
    "The knobs of a text as flags"
    from llm_trainer.generation.sampling import Sampling
    kinds, described = typing.get_type_hints(Sampling), docments(Sampling)
    def kind(name): return list[str] if name == "stop" else kinds[name]
    return [Flag(f.name, kind(f.name), list(f.default) if f.name == "stop" else f.default, described[f.name][2],
                 described[f.name][0])
            for f in fields(Sampling) if f.name != "logprobs"]


def _note(knob, default=None) -> str:
    "`6; from 1 to 1,000`: the default and the bounds; an upper bound no one meets is left out"
    own = "none" if knob.default is None else knob.default
    default = default or (("on" if own else "off") if knob.type == "bool" else str(own))
    if knob.type not in ("int", "float"): return default
    words = knob.expects.removeprefix("a whole number ").removeprefix("a number ")
    return f"{default}; {words.partition(' to ')[0] if (knob.bounds[1] or 0) >= 1e6 else words}"


def _knobs(flags=_flags, **how):
    "Gives a command's `**knobs` their names: settings of the config, or other flags"
    def give(function):
        function.knobs = lambda: flags(**how)
        return function
    return give


def _config(space, config: str | None, knobs: dict, whole: bool = True):
    "The validated config of a new run; paths on the command line are meant from the current folder"
    from llm_trainer.config import load_config
    return resolve_inputs(load_config(config or space.config, knobs, space.configs), space, knobs, print_notes, whole)


# Finding runs --------------------------------------------------------------------------------------------------------

def _run(text: str | None = None):
    "The run that `text` (an id or the unique beginning of one; None: the newest) names"
    from llm_trainer.runs.run import find_run
    return find_run(workspace.find().runs, text)


def _tell(message: str) -> None:
    "A remark beside the result, which stays alone on standard output"
    print(clean(message), file=sys.stderr, flush=True)




def _checkpoints(run):
    from llm_trainer.training.checkpoint import Checkpoints
    return Checkpoints(workspace.find().checkpoints / run.id, run.id, emit=print_notes)


def _with_weights(text: str | None, checkpoint: str | None, use):
    "That folder, and what `use` makes of it; chosen again where a run that goes on has pruned it meanwhile"
    while True:
        folder = weights(text, checkpoint, emit=print_notes)
        try: return folder, use(folder)
        except (LLMTrainerError, OSError):
            if folder.is_dir(): raise


# Prepare -------------------------------------------------------------------------------------------------------------

def init(
    folder: str = ".",  # DIR: Where; made if it does not exist
    *,
    json: bool = False,  # Print one JSON object
):
    """Make a workspace: the folders data/ checkpoints/ runs/ configs/

    settings.ini marks its root; every command finds it from any folder below, or
    from anywhere through $LLM_TRAINER_HOME.
    """
    space = workspace.init(folder)
    if json: return print(render.as_json({"root": str(space.root)}))
    render.say(f"Workspace ready: {space.root}", "Next:", f"  cd {quoted(space.root)}",
               "  llm-trainer doctor", "  llm-trainer train --config quickstart")


def doctor(
    *,
    json: bool = False,  # Print one JSON object
):
    "Say what this machine offers: device, memory, disk, packages"
    from llm_trainer.cli import doctor as look
    found = look.examine()
    if json: print(render.as_json(found))
    else: render.say(look.report(found))
    return 0 if found["ready"] else 1


@_knobs(choose=lambda knob: knob.group == "data" or knob.name == "seq_len")  # shorter than that is too short
def prepare(
    *,
    # Flags
    config: str | None = None,  # NAME|PATH: Profile (default: the one in settings.ini)
    show: Annotated[int, From(0)] = 0,  # Print so many documents, their tokens in colour, and how long all are
    json: bool = False,  # Print one JSON object
    **knobs,
):
    "Fetch the text and make tokens of it, without training"
    space = workspace.find()
    settings = _config(space, config, knobs)
    from llm_trainer.cli import progress
    from llm_trainer.training.recipe import prepare as prepare_data
    with progress.screen(quiet=json) as emit: data = prepare_data(settings, space, emit=emit)
    meta, shown = data.meta, {}
    if show:
        from llm_trainer.cli import documents
        if json: shown = {"lengths": documents.lengths(data.corpora), "documents": documents.look(data, show)}
        else: print(documents.report(data, show), "", sep="\n")
    found = {**{k: v for k, v in meta["data"].items() if k in ("train_tokens", "val_tokens", "val_share")},
             "vocab_size": meta["vocab_size"], "tokenizer_hash": meta["tokenizer_hash"]}
    if json: return print(render.as_json({**found, **meta["data"], **shown}))
    same = re.sub(r" --show[ =]\d+", "", f" {shlex.join(sys.argv[2:])}")
    render.say(render.facts(found), f"Next: llm-trainer train{same.rstrip()}")


# Train ---------------------------------------------------------------------------------------------------------------

@_knobs()
def train(
    *,
    # The run
    config: str | None = None,  # NAME|PATH: Profile (default: the one in settings.ini)
    name: str | None = None,  # ID: Name of the run: a-z, 0-9 and dashes (default: two words and four digits)
    note: str | None = None,  # A line to remember the run by
    background: bool = False,  # Return at once; the run outlives this shell
    parallel: bool = False,  # With --background: don't queue behind the run that uses the device
    devices: str | None = None,  # N|auto|0,2: How many devices train together, or which (default: one)
    restarts: Annotated[int, From(0)] = 0,  # With --devices: go on by itself up to N times after one was lost
    log_to: str | None = None,  # NAMES: Also log to tensorboard, wandb, trackio or mlflow, from a process of its own
    dry_run: bool = False,  # Show config, size, memory and time; create nothing
    within: int | None = None,  # MINUTES: Say how long it will take, and shorten it to this where it is longer
    json: bool = False,  # Print one JSON object
    **knobs,
):
    """Train a model

    The profile's settings, then your flags. Ctrl-C saves a checkpoint and stops;
    `llm-trainer resume` goes on from there. Dashes and underscores are the same.
    """
    space, sinks = workspace.find(), _sinks(log_to)
    team = None if dry_run else _team(space, background=background, parallel=parallel, devices=devices,
                                      restarts=restarts)
    if team and team.rank: return team.follow(space)
    with team.making() if team else nullcontext():
        settings = _config(space, config, knobs, whole=not dry_run)
        _check_settings(settings)
        if within is not None:
            from llm_trainer.cli import estimate as plan
            settings, words = plan.shortened(settings, space, within)
            _tell(words)
        if dry_run:
            from llm_trainer.cli import estimate as plan
            estimate = plan.estimate(settings, space, *_layout(settings, space, devices))
            if json: return print(render.as_json(estimate))
            return render.say(plan.report(estimate))
        from llm_trainer.runs import launch
        if not background:
            from llm_trainer.device import resolve
            # a device that is not there is refused before there is a run
            kind = resolve(settings.training, space.device).device
        make = partial(launch.start, settings, space, name, note, sys.argv[1:], background, parallel)
        run = team.start(space, sys.argv[1:], kind, make) if team else make(devices, restarts)
    return _go(run, space, background, json, sinks, team)


def _layout(settings, space, devices: str | None) -> tuple:
    "The devices of a dry run, and how many of them are here: what was asked for, or those of torchrun's processes"
    from llm_trainer.runs import torchrun
    if not (place := torchrun.seat()): return devices, None
    from llm_trainer.device import resolve
    kind, here = resolve(settings.training, space.device).device, place.local_world
    return [f"cuda:{rank % here}" if kind == "cuda" else kind for rank in range(place.world)], here


def _team(space, **flags):
    "The other processes, where torchrun started this one among several"
    from llm_trainer.runs import torchrun
    if not (place := torchrun.seat()): return None
    torchrun.check(**flags)
    return torchrun.meet(place, space, sys.argv[1:])


def _check_settings(settings):
    "Say which settings have no effect"
    from llm_trainer.config import idle
    for remark in idle(settings): _tell(f"Note: {remark}")


def _sinks(names: str | None) -> list[str]:
    "What to log to beside the run's own files, checked before there is a run"
    if names is None: return []
    from llm_trainer.runs import loggers
    return loggers.named(names)


def _go(run, space, background: bool, json: bool, sinks=(), team=None):
    "Say how to look at a run that begins and, in the foreground, train it here to its end"
    from llm_trainer.runs import launch
    if not background and run.lock is None:  # somebody else brought it to its end
        if not json: render.say(f"{run.id} is {run.state().status}; nothing is left to train.")
        return 0 if run.state().status in ("completed", "stopped") else 1
    if sinks:
        from llm_trainer.runs import loggers
        loggers.start(run, space, sinks)
        if "tensorboard" in sinks: _tell(f"Curves in TensorBoard: tensorboard --logdir {quoted(space.runs)}")
    if background:
        state = run.status()
        if json: return print(render.as_json({**asdict(state), "folder": str(run.folder)}))
        after = f" behind {', '.join(state.waiting_for)}" if state.waiting_for else ""
        render.say(f"Run {run.id} is {state.status}{after} (pid {state.pid}). It goes on when this shell closes.")
        return render.say(*_next(run))
    if not json: render.say(f"Run {run.id}. Meanwhile, from any other shell:", *_next(run), "")
    from llm_trainer.cli import progress
    from llm_trainer.runs import worker
    with progress.screen(quiet=json) as screen:
        code = team.lead(run, space, screen) if team else worker.work(run, space, screen)
    state = run.status()
    if code in (2, 3) and not state.step and len(run.attempts()) == 1:  # it could never begin: leave nothing behind
        launch.delete(run, space)
        message = (state.reason or {}).get("message") or "The run could not begin."
        raise UsageError(message) if code == 2 else NotFoundError(message)
    progress.conclude(run, json)
    return code


def _next(run) -> list[str]:
    verbs = f"status {run.id} --watch", f"logs {run.id} --follow", f"stop {run.id}"
    return [f"  llm-trainer {verb}" for verb in verbs]


@_knobs(hide=lambda knob: knob.change == "fixed", default="as it is")
def resume(
    run: str | None = None,  # Run, or the unique beginning of its id (default: the newest)
    *,
    # How
    checkpoint: str = "latest",  # latest|best|STEP: Where to go on; an older step than the newest makes a new run
    more_epochs: int | None = None,  # Add N epochs to what is left of the plan (a completed run: exactly N)
    lr_plan: Literal["redecay", "hold", "rewarm"] | None = None,  # How the learning rate covers what was added
    background: bool = False,  # Return at once; the run outlives this shell
    parallel: bool = False,  # With --background: don't queue behind the run that uses the device
    devices: str | None = None,  # N|auto|0,2: How many devices train together, or which (default: as before)
    restarts: Annotated[int, From(0)] = 0,  # With several devices: go on by itself up to N times after one was lost
    log_to: str | None = None,  # NAMES: Also log to tensorboard, wandb, trackio or mlflow, from a process of its own
    dry_run: bool = False,  # Show the plan; change nothing
    json: bool = False,  # Print one JSON object
    **knobs,
):
    """Go on with a run, as if it had never stopped

    redecay (the default) spreads the schedule over the new total, hold stays at
    the last learning rate, rewarm climbs to half the peak and falls again. Settings
    that a resumed run may change are below; the others are fixed when it begins.
    """
    from llm_trainer.runs import launch
    space, sinks = workspace.find(), _sinks(log_to)
    team = None if dry_run else _team(space, background=background, parallel=parallel, devices=devices,
                                      restarts=restarts)
    if team and team.rank: return team.follow(space)
    with team.making() if team else nullcontext():
        if team and (heir := team.again(space, sys.argv[1:])):
            team.share(heir)
            return _go(heir, space, background, json, sinks, team)
        found = _run(run)
        if not dry_run:
            with launch.own(found): pass  # a busy run is refused before anything is planned
        if team: devices = team.devices(launch.device_kind(found))
        plan, more = launch.plan_resume(found, space, more_epochs, lr_plan, checkpoint, knobs, devices=devices), ""
        # a background run is on its way before torch is loaded
        if not plan.nothing_to_do and (dry_run or not background):
            from llm_trainer.cli.estimate import foresee
            plan, more = foresee(plan, found, space)
        if team and plan.nothing_to_do: team.share(None)
        if json and (dry_run or plan.nothing_to_do): return print(render.as_json(vars(plan)))
        if not json: render.say(str(plan), *filter(None, [more]))
        if dry_run or plan.nothing_to_do: return None
        heir = launch.resume(found, space, more_epochs, lr_plan, checkpoint, knobs, sys.argv[1:], background, parallel,
                             devices, restarts, team and team.place.launch)
        if team: team.share(heir)
    return _go(heir, space, background, json, sinks, team)


def stop(
    run: str,  # Run, or the unique beginning of its id
    *,
    now: bool = False,  # End it at once; what is not saved yet is lost
    json: bool = False,  # Print one JSON object
):
    "Have a run save a checkpoint and end"
    from llm_trainer.runs import launch
    found = _run(run)
    with _waiting() as show: state = launch.stop(found, now, None if json else show)
    if json: return print(render.as_json(state))
    step = f" at step {state.step:,}" if state.status != "unknown" else ""
    render.say(f"Run {found.id} is {state.status}{step}.",
             *([f"Go on with it: llm-trainer resume {found.id}"] if state.status != "completed" else []))


@contextmanager
def _waiting(every: float = 10.0):
    "Shows what a stopping run is at: on a terminal in one line, which goes in the end, elsewhere one every ten seconds"
    again, cut, whole = "\r\x1b[K", "\x1b[?7l", "\x1b[?7h"  # where a line would wrap, the terminal cuts it
    shown, drawn = time.monotonic(), False

    def show(state):
        nonlocal shown, drawn
        if sys.stderr.isatty():
            drawn = True
            return print(again, cut, render.line(state), whole, sep="", end="", file=sys.stderr, flush=True)
        if time.monotonic() - shown < every: return
        shown = time.monotonic()
        _tell(f"Waiting for {state.run_id} to save and end: {render.line(state)}")

    try: yield show
    finally:
        if drawn: print(again, end="", file=sys.stderr, flush=True)


def delete(
    run: str,  # Run, or the unique beginning of its id
    *,
    yes: bool = False,  # Don't ask
    json: bool = False,  # Print one JSON object
):
    "Remove a run and its checkpoints for good"
    from llm_trainer.runs import launch
    found, space = _run(run), workspace.find()
    if found.locked: raise BusyError(f"{found.id} is being trained. Stop it first: llm-trainer stop {found.id}")
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError(f"delete asks before it removes {found.id}, and there is nobody to ask here.\n"
                             f"Say so beforehand: llm-trainer delete {found.id} --yes")
        answer = input(f"Delete run {found.id} and its checkpoints? [y/N] ")
        if answer.strip().lower() not in ("y", "yes"): return render.say("Nothing was deleted.")
    freed = launch.delete(found, space)
    if json: return print(render.as_json({"run_id": found.id, "bytes": freed}))
    render.say(f"Deleted {found.id}: {size(freed)} are free again.")


# Look ----------------------------------------------------------------------------------------------------------------

NO_RUN = "There is no run yet. Start one: llm-trainer train --config quickstart"


def status(
    run: str | None = None,  # Run, or the unique beginning of its id (default: the newest)
    *,
    watch: bool = False,  # Print a line every two seconds until the run ends
    json: bool = False,  # Print one JSON object
):
    "Show how a run is doing"
    from llm_trainer.runs.run import list_runs
    found = next(iter(list_runs(workspace.find().runs)), None) if run is None else _run(run)
    if found is None:
        if json: return print("{}")
        return render.say(NO_RUN)
    if watch:
        from llm_trainer.cli import progress
        return progress.watch(found, json)
    state = found.status()
    from llm_trainer.system import process
    how = process.process_state(state.pid) if process.same_process(state.to_record()) else None
    if json: return print(render.as_json({**asdict(state), "process_state": how}))
    print(render.card(state, found.meta, found.log_tail(8), how, found.notes()))


@alone(csv="sort reverse filter json")
def runs(
    *,
    sort: str | None = None,  # FIELD: Smallest first: val_loss, tokens_per_second, lr … (default: newest first)
    reverse: bool = False,  # The other way round
    filter: list[str] = [],  # EXPR: Only runs for which it is true: "status=completed, val_loss<2"
    csv: str | None = None,  # RUN: Print the metrics of this run as CSV
    json: bool = False,  # Print a JSON list
):
    """List all runs, newest first

    A FIELD is a key of `runs --json`, any setting (n_layer, lr, dataset …),
    parameters, train_tokens, note or created. EXPR is FIELD, one of = != < <= > >=
    and ~ (contains), and a value; several, joined by commas or given one by one,
    must all be true.
    """
    if csv is not None:
        (found := _run(csv)).require("metrics.jsonl")
        return print(render.csv(found.metrics()))
    from llm_trainer.runs.select import choose
    from llm_trainer.runs.run import list_runs
    found = list_runs(workspace.find().runs)
    states = choose(found, filter, sort, reverse)
    if json: return print(render.as_json([asdict(state) for state in states]))
    if not found: return render.say(NO_RUN)
    if not states: return render.say(f"None of {len(found)} runs is like that.")
    print(render.table(states))


def plot(
    run: str | None = None,  # Run, or the unique beginning of its id (default: the newest)
    *,
    what: Literal[DRAWN] = "loss",  # What is drawn
    against: Literal["step", "tokens", "time"] = "step",  # What it is drawn against; time is time in training
    log: bool = False,  # Logarithmic scale
    height: Annotated[int, From(6, 100)] = 20,  # Lines of the picture
    width: Annotated[int | None, From(30, 300)] = None,  # Columns of the picture (default: the terminal's)
    ascii: bool = False,  # Only ASCII (default where the terminal can't show more)
):
    "Draw the curves of a run in the terminal"
    from llm_trainer.runs.charts import plot as draw
    from llm_trainer.runs.compare import curve
    found = _run(run)
    found.require("metrics.jsonl")
    kinds = ("train", "val") if what == "loss" else ("val",) if what in ("perplexity", "bits_per_byte") else ("train",)
    names = {"train": "training", "val": "validation"} if what == "loss" else dict.fromkeys(kinds, found.id)
    curves = [curve(found.metrics(kind), what, names[kind], against, marks=kind == "val") for kind in kinds]
    print(draw(curves, against, what.replace("_", " "), log, width or _columns(), height,
               render.unicode_ok() and not ascii, render.paint_curve))


def _columns() -> int:
    "How wide a picture may be"
    import shutil
    return max(30, min(300, shutil.get_terminal_size((80, 24)).columns - 1))


def compare(
    a: str,  # Run, or the unique beginning of its id
    b: str,  # Another one
    *,
    against: Literal["step", "tokens", "time"] = "step",  # What the curves are drawn against; time is time in training
    json: bool = False,  # Print one JSON object
):
    "Two runs side by side: figures, settings that differ, curves"
    from llm_trainer.runs import compare as beside
    from llm_trainer.runs.charts import plot as draw
    found = beside.compare([_run(a), _run(b)], against)
    curves = found.pop("curves")
    if json: return print(render.as_json(found))
    print(render.side_by_side(found))
    if found["measure"] != "loss": render.say("", "Their tokenizers differ, so only bits per byte can be compared.")
    print("", draw(curves, against, f"validation {found['measure'].replace('_', ' ')}", False, _columns(), 16,
                   render.unicode_ok(), render.paint_curve), sep="\n")


def report(
    run: str | None = None,  # Run, or the unique beginning of its id (default: the newest)
    *,
    out: Path | None = None,  # FILE.html|.md: Where to write it (default: RUN.html in this folder)
    force: bool = False,  # Write over a file that is there
):
    """Write one page about a run, to keep or to send

    What was asked and why, text and tokenizer, curves, best figures, texts,
    machine, speed, energy, attempts and how to do it again: one file that needs
    nothing else and holds no script.
    """
    found, space = _run(run), workspace.find()
    path = workspace.home(out) if out is not None else Path(f"{found.id}.html")
    if path.suffix not in (".html", ".md"):
        raise UsageError(f"--out takes a name that ends in .html or .md, not {clean(path, '')}.")
    if path.is_dir(): raise UsageError(f"--out {clean(path, '')} is a folder; name a file in it.")
    if not path.absolute().parent.is_dir():
        raise NotFoundError(f"The folder of --out {clean(path, '')} does not exist.")
    if path.exists() and not force:
        raise UsageError(f"{clean(path, '')} exists already.\n"
                         f"Write over it: llm-trainer report {found.id} --out {quoted(path)} --force")
    from llm_trainer.runs.report import report as tell
    page = tell(found, space, path.suffix[1:]).encode()
    deliver(path, page)
    render.say(f"Wrote {clean(path, '')} ({size(len(page))}).")


def note(
    run: str,  # Run, or the unique beginning of its id
    text: str | None = None,  # A line to remember (default: print the notes there are)
):
    "Add a line to the notes of a run"
    found = _run(run)
    if text is None:
        found.require("notes.txt")
        none = f"{found.id} has no notes. Add one: llm-trainer note {found.id} TEXT"
        return render.say(found.notes().rstrip() or none)
    found.add_note(text)


def logs(
    run: str | None = None,  # Run, or the unique beginning of its id (default: the newest)
    *,
    follow: bool = False,  # Go on printing until the run ends
    lines: Annotated[int, From(0)] = 200,  # How many of the last lines
):
    "Print the log of a run"
    found = _run(run)
    found.require("train.log")
    for text in found.log_tail(lines): render.say(text.rstrip("\n"))
    if follow:
        from llm_trainer.cli import progress
        progress.log(found)


def log_to(
    run: str,  # Run, or the unique beginning of its id
    names: str,  # Where to: tensorboard, wandb, trackio, mlflow; several with commas
    *,
    project: str = "llm_trainer",  # NAME: Where wandb, trackio and mlflow group runs
    once: bool = False,  # Send what is there and end (default: go on until the run ends)
):
    """Send what a run writes to another program's logger, while it trains or afterwards

    It reads the run's files, so it can neither slow nor stop the training; called
    again, it goes on where it was. TensorBoard's files lie in runs/RUN/tensorboard.
    """
    from llm_trainer.runs import loggers
    sinks = loggers.named(names)
    read = loggers.log_to(found := _run(run), sinks, project, once)
    sent = f"{read['metrics']:,} rows of metrics, {read['samples']:,} samples"
    board = f"See them: tensorboard --logdir {quoted(found.folder.parent)}"
    render.say(f"Sent {found.id} to {', '.join(sinks)}: {sent}.", *[board] * ("tensorboard" in sinks))


def watch(
    run: str | None = None,  # Run to open first (default: the list of runs)
):
    "Watch all runs in a full-screen terminal view"
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UsageError("watch needs a terminal. In a script: llm-trainer status --watch")
    found = _run(run) if run is not None else None
    from llm_trainer.tui.app import watch as open_watcher
    return open_watcher(workspace.find(), found.id if found else None)


# Use -----------------------------------------------------------------------------------------------------------------

@_knobs(_sampling_flags)
@alone(interactive="prompt prompt_file prompts json output num_samples raw", prompts="prompt prompt_file",
       prompt_file="prompt", json="raw")
def generate(
    run: str | None = None,  # RUN|FOLDER: Run, or a Hugging Face model folder (default: the newest run)
    *,
    # Prompt
    prompt: str | None = None,  # Text to continue, taken byte for byte
    prompt_file: Path | None = None,  # FILE: File that holds the prompt; - for standard input
    prompts: Path | None = None,  # FILE: JSONL of many prompts, done in batches
    interactive: bool = False,  # Talk to the model: prompts, /set KNOB VALUE, /help
    # How much
    num_samples: Annotated[int, From(1)] = 1,  # How many texts
    # Model and output
    checkpoint: str | None = None,  # best|latest|STEP: Which checkpoint of the run (default: best)
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto",  # Where to compute
    threads: int | None = None,  # CPU threads (default: as many as are fast now, measured)
    output: Path | None = None,  # FILE: Write the text here, unchanged
    force: bool = False,  # With --output: overwrite its file
    raw: bool = False,  # Leave control bytes in a text that goes into a pipe
    json: bool = False,  # Print one JSON object: texts, tokens, log-probabilities, times
    **knobs,
):
    "Continue a prompt with a trained model"
    from llm_trainer.cli import repl
    from llm_trainer.generation.sampling import Sampling
    _check_generate(raw, output, force)
    if json and knobs.get("seed") is None:
        knobs["seed"] = secrets.randbelow(2**31)  # on record: a lucky text can be had again
    sampling = Sampling(**knobs, logprobs=json)
    many = repl.read_prompts(prompts) if prompts is not None else None
    if many is None and not interactive: many = [repl.one_prompt(prompt, prompt_file)]
    weights(run, checkpoint, need=(), emit=print_notes)  # what is missing is refused before torch is loaded
    from llm_trainer.generation import sampler
    def load(folder): return sampler.load_for_generation(folder, device, workspace.preferred_device())
    folder, (model, tokenizer) = _with_weights(run, checkpoint, load)
    threads = sampler.choose_threads(model, threads)
    def write(text, how): return sampler.generate(model, tokenizer, text, how)
    if interactive: return repl.converse(write, sampling, render.say)
    show_part = repl.silent if json or output else repl.to_pipe if raw else repl.to_terminal
    if len(many) == num_samples == 1: texts = [_write_one(write(many[0], sampling), many[0], show_part)]
    else: texts = repl.write_many(sampler.generate_batch(model, tokenizer, many, sampling, num_samples), show_part)
    whole = "\n".join(t.text for t in texts)
    try:
        if output is not None: deliver(workspace.home(output), whole.encode())
    except OSError:
        if not json: (repl.to_pipe if raw and not sys.stdout.isatty() else repl.to_terminal)(f"{whole}\n")
        raise
    finally:
        if json:
            rows = [{name: value for name, value in vars(t).items() if name != "begun"} for t in texts]
            found = {"checkpoint": str(folder), "settings": vars(sampling), "threads": threads, "texts": rows}
            print(render.as_json(found))
    return 130 if any(t.finish == "interrupted" for t in texts) else 0


def _write_one(pieces, prompt: str, show_part):
    "One text, shown as it comes; on a terminal behind its prompt"
    from llm_trainer.cli import repl
    echo = show_part is repl.to_terminal
    if echo and sys.stdout.isatty(): print(render.paint(clean(prompt), 2), end="", flush=True)
    text = repl.write(pieces, prompt, show_part)
    if echo: print(flush=True)
    return text


def _check_generate(raw, output, force):
    "Refuse where a text can't go, before anything is loaded"
    if raw and sys.stdout.isatty() and output is None:
        raise UsageError("--raw would let a model command your terminal; pipe the text somewhere or use --output FILE.")
    if output is not None and not workspace.home(output).absolute().parent.is_dir():
        raise NotFoundError(f"The folder of --output {clean(output, '')} does not exist.")
    if output is not None and workspace.home(output).is_file() and not force:
        raise UsageError(f"--output {clean(output, '')} exists already. Overwrite it: --force")
    if output is not None and workspace.home(output).is_dir():
        raise UsageError(f"--output {clean(output, '')} is a folder; name a file in it.")


def evaluate(
    run: str | None = None,  # RUN|FOLDER: Run, or a Hugging Face model folder (default: the newest run)
    *,
    data: str | None = None,  # Another text to measure on, the whole of it (default: the run's validation text)
    text_column: str | None = None,  # With --data: its column that holds the text, where it is a table
    checkpoint: str | None = None,  # best|latest|STEP: Which checkpoint of the run (default: best)
    stride: int | None = None,  # Tokens between two windows (default: the context, so none overlap)
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto",  # Where to compute
    threads: int | None = None,  # CPU threads (default: as many as are fast now, measured)
    json: bool = False,  # Print one JSON object
):
    "Measure a model: loss, perplexity, bits per byte"
    from llm_trainer.config import Config
    from llm_trainer.data.sources import first_look
    space, meta = workspace.find(), {} if is_folder(run) else _run(run).meta
    if data is not None: first_look(Config().replace(dataset=data, text_column=text_column).data, space.data)
    weights(run, checkpoint, need=(), emit=print_notes)  # what is missing is refused before torch is loaded
    from llm_trainer.training.evaluate import measure
    from llm_trainer.cli import progress
    with progress.screen(quiet=json) as emit:
        _, found = _with_weights(run, checkpoint, lambda folder: measure(
            folder, space, meta, data, stride, device, threads=threads, text_column=text_column, emit=emit))
    if json: return print(render.as_json(found))
    render.say(render.facts(found))


def verify(
    run: str,  # Run, or the unique beginning of its id
    *,
    json: bool = False,  # Print one JSON object
):
    "Read a run's checkpoints again and check every file"
    found = _run(run)
    from llm_trainer.cli import progress
    with progress.screen(quiet=json) as emit: problems = _checkpoints(found).verify(emit)
    damaged = {step: faults for step, faults in problems.items() if faults}
    if json: print(render.as_json({"run_id": found.id, "checkpoints": problems, "damaged": len(damaged)}))
    elif not problems: render.say(f"Run {found.id} has no checkpoint yet, so there is nothing to verify.")
    else:
        for step, faults in problems.items(): render.say(f"  step {step:,}: {'; '.join(faults) if faults else 'whole'}")
        good = [step for step, faults in problems.items() if not faults]
        render.say("Every checkpoint is whole." if not damaged else f"{len(damaged)} of {len(problems)} are damaged."
                   + (
                 f" Resuming and generating use the good ones, the newest of them step {max(good):,}." if good else
                 " None is whole: this run can't be resumed."))
    return 1 if damaged else 0


def export(
    run: str | None = None,  # RUN|FOLDER: Run, or a Hugging Face model folder (default: the newest run)
    *,
    out: Path | None = None,  # PATH: Folder (hf) or file (gguf) to write; it must not exist yet
    format: Literal["hf", "gguf"] = "hf",  # hf: a Hugging Face folder; gguf: one file for llama.cpp, Ollama, LM Studio
    quantize: Literal["f32", "f16", "q8_0"] | None = None,  # Precision of a gguf file (default: f16)
    checkpoint: str | None = None,  # best|latest|STEP: Which checkpoint (default: best)
    push: str | None = None,  # USER/NAME: Then send it to this repository of the Hugging Face hub
    public: bool = False,  # With --push: a repository that is made is for everyone, not private
    json: bool = False,  # Print one JSON object
):
    """Copy a model out, as other programs read it

    A Hugging Face folder gets a README.md, the model card, with the data, the
    figures and the settings of the run. Nothing is sent anywhere unless --push
    names where.
    """
    from llm_trainer.runs import export as leave
    out = workspace.home(out) if out else None
    if out is None and push is None:
        raise UsageError("--out says where to write: --out my-model, or --format gguf --out my-model.gguf")
    if quantize and format == "hf":
        raise UsageError("--quantize belongs to --format gguf; a Hugging Face folder keeps the weights whole.")
    if push: leave.check_push(push)
    weights(run, checkpoint, need=(), emit=print_notes)  # what is missing is refused before torch is loaded
    with leave.room(out, push, format) as target:
        said: list[str] = []

        def write(folder):
            with leave.written(target) as path:
                if format == "gguf":
                    from llm_trainer.model.gguf import write_gguf
                    said[:] = write_gguf(folder, path, quantize or "f16", target.stem)
                    return
                card = leave.model_card(target.name, folder, *leave.origin(folder, _runs_here()))
                leave.copy_folder(folder, path, card)
        folder, _ = _with_weights(run, checkpoint, write)
        for line in said: _tell(f"Note: {line}")
        if not json and out:
            render.say(f"Wrote {clean(str(target), '')} ({size(leave.bytes_of(target))}).", *_use(target, format))
        address = leave.push(target, push, public) if push else None
    found = {"folder" if format == "hf" else "file": str(target.absolute()) if out else None, "checkpoint": str(folder),
             "notes": said, "pushed": address}
    if json: return print(render.as_json(found))
    if push: render.say(f"Pushed to {address}.")


def _runs_here() -> Path | None:
    "The runs/ folder; a model folder is exported outside a workspace, too"
    try: return workspace.find().runs
    except NotFoundError: return None


def _use(target: Path, format: str) -> list[str]:
    "How to open what was written"
    if format == "gguf": return ["Open it:", f"  llama-cli -m {quoted(target)} -no-cnv -p 'The '"]
    return ["Open it in Python:", f"  AutoModelForCausalLM.from_pretrained({str(target)!r})"]


def serve(
    run: str | None = None,  # RUN|FOLDER: Run, or a Hugging Face model folder (default: the newest run)
    *,
    # Who may use it
    host: str = "127.0.0.1",  # HOST: Address to answer at; 0.0.0.0 for everyone who reaches this machine
    port: Annotated[int, From(0, 65535)] = 8000,  # Port to answer at; 0 takes any free one
    api_key: str | None = None,  # KEY: What clients must send (default: $LLM_TRAINER_API_KEY, else nothing)
    # Model
    checkpoint: str | None = None,  # best|latest|STEP: Which checkpoint of the run (default: best)
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto",  # Where to compute
    rows: Annotated[int, From(1, 1024)] = 32,  # Texts written at the same time
    queue: Annotated[int, From(1, 1_000_000)] = 256,  # Texts that may wait; more are refused
    json: bool = False,  # Print one JSON object once it answers
):
    """Answer OpenAI's clients with a trained model, until Ctrl-C

    http://127.0.0.1:8000 is a page to try it; clients take that address with /v1
    and the run's id as the model. A key given in the environment is not seen in ps.
    """
    import os
    key = os.environ.get("LLM_TRAINER_API_KEY") or None if api_key is None else api_key
    if key is not None and not (key.isascii() and key.isprintable() and key.strip()):
        raise UsageError("--api-key takes letters, digits and signs of ASCII.")
    weights(run, checkpoint, need=(), emit=print_notes)  # what is missing is refused before torch is loaded
    name = workspace.home(run).resolve().name if is_folder(run) else _run(run).id
    from llm_trainer.generation import serve as http
    with http.bind(host, port) as listener:
        def load(folder): return http.open_model(folder, name, device, workspace.preferred_device(), rows)
        folder, (model, engine) = _with_weights(run, checkpoint, load)

        def ready(url: str):
            if json:
                return print(render.as_json({"url": url, "model": name, "checkpoint": str(folder), "pid": os.getpid()}),
                             flush=True)
            if key is None and not url.startswith(("http://127.", "http://[::1]")):
                _tell("Note: whoever reaches this machine can use the model. Ask for a key: --api-key KEY")
            render.say(f"Serving {name} ({folder.name}) on {engine.model.head.device}. Ctrl-C ends it.",
                       f"  in a browser: {url}", f"  OpenAI clients: base_url {url}/v1, model {name}")
            sys.stdout.flush()
        http.serve(model, engine, listener, key, queue, ready)


def bench(
    what: Literal["train", "generate", "load", "save", "resume", "cli"],  # What to measure
):
    "Measure the speed of this machine with this program"
    import runpy
    script = Path(__file__).parents[2] / "bench" / f"{what}.py"
    if not script.is_file(): raise NotFoundError(f"bench {what} is part of the source checkout; {script} is not there.")
    sys.argv = [str(script)]
    runpy.run_path(str(script), run_name="__main__")


def completion(
    shell: Literal["bash", "zsh", "fish"],  # Your shell
):
    """Let your shell complete commands, flags and run ids

    bash: add this to ~/.bashrc    source <(llm-trainer completion bash)
    zsh:  add this to ~/.zshrc     source <(llm-trainer completion zsh)
    fish: run this once            llm-trainer completion fish >
                                   ~/.config/fish/completions/llm-trainer.fish
    """
    print(front.completion_script(shell))


def docs(
    page: str = "index",  # PAGE|PAGE#PLACE: commands, configuration#lr, tutorials/05_resume … (default: the first page)
    *,
    print_path: bool = False,  # Say where it is instead of opening it
):
    "Open the documentation that came with this program, without a network"
    name, _, place = page.partition("#")
    found = _site()
    if found is None: raise NotFoundError("The pages were not built into this installation. In a checkout: make docs\n"
                                          "In a terminal: llm-trainer COMMAND --help   Every setting: llm-trainer "
                                          "train --help")
    path = found / f"{name.removesuffix('.html')}.html"
    if not path.resolve().is_relative_to(found.resolve()) or not path.is_file():
        from difflib import get_close_matches
        names = sorted(str(p.relative_to(found).with_suffix("")) for p in found.rglob("*.html"))
        near = get_close_matches(name, names, 1)
        raise NotFoundError(f"There is no page {clean(name, '')[:60]}{f'; did you mean {near[0]}?' if near else '.'}\n"
                            f"Pages: {', '.join(names)}")
    address = path.resolve().as_uri() + (f"#{place}" if place else "")
    import webbrowser
    if print_path or not webbrowser.open(address): print(address)


def _site() -> Path | None:
    "The built pages: in the installed package, or beside the package in a checkout"
    package = Path(__file__).resolve().parents[1]
    return next((folder for folder in (package / "site", package.parent / "_docs")
                 if (folder / "index.html").is_file()), None)


# The program ---------------------------------------------------------------------------------------------------------

def _run_ids() -> list[str]:
    from llm_trainer.runs.run import list_runs
    return [run.id for run in list_runs(workspace.find().runs)]


def _profiles() -> list[str]:
    from llm_trainer.config import profiles
    return list(profiles(workspace.find().configs))


front = FrontEnd(
    "llm-trainer", __version__,
    "Train a GPT-style Transformer on your own machine, in the background, and resume it as the very same run.",
    {"Prepare": {"init": init, "doctor": doctor, "prepare": prepare},
     "Train": {"train": train, "resume": resume, "stop": stop, "delete": delete},
     "Look": {"status": status, "runs": runs, "logs": logs, "log-to": log_to, "watch": watch, "plot": plot,
              "compare": compare, "report": report, "note": note},
     "Use": {"generate": generate, "evaluate": evaluate, "verify": verify, "export": export,
             "serve": serve},
     "Tools": {"docs": docs, "bench": bench, "completion": completion}},
    candidates={"run": _run_ids, "a": _run_ids, "b": _run_ids, "csv": _run_ids, "init_from": _run_ids,
                "config": _profiles,
                "dataset": lambda: ["python-docs", "python-code"], "tokenizer": lambda: ["bpe", "char", "byte"],
                "checkpoint": lambda: ["best", "latest"]},
    examples="""\
  llm-trainer train --config quickstart     a first model, in minutes
  llm-trainer generate --prompt "The "      read what it writes
  llm-trainer train --background            a longer run that outlives this shell
  llm-trainer status --watch                how it is doing""")


def main(argv: list[str] | None = None) -> int:
    "The program: run the argument list (default: the process's) and return its exit code"
    from llm_trainer.cli import viewer
    from llm_trainer.system import process
    words, ours = sys.argv[1:] if argv is None else argv, argv is None
    if ours:
        process.prepare()
        viewer.let_go()
    if words[:1] in (["train"], ["resume"]) and os.environ.get("LOCAL_RANK"): return _beside_others(words)
    if words[:1] not in (["train"], ["resume"], ["serve"]) or {"--background", "--dry-run", "--dry_run"} & set(words):
        return front.run(argv)
    with viewer.attached(): code = front.run(argv)
    if ours: viewer.gone_within(15, code)
    return code


def _beside_others(words: list[str]) -> int:
    "The same where torchrun may have started this process among several: one on each machine prints"
    from llm_trainer.cli import viewer
    from llm_trainer.runs import torchrun, worker
    try: place = torchrun.seat()
    except UsageError: place = None  # the command says so
    if not place or {"-h", "--help"} & set(words): return 0 if place and place.rank else front.run(words)
    if place.rank and {"--dry-run", "--dry_run"} & set(words): return 0
    if place.local_rank: sys.stdout = sys.stderr = open(os.devnull, "w")
    with viewer.attached(): code = front.run(words)
    if code and not torchrun.met(): torchrun.absent(place, words, code)
    worker.leave(code)  # threads of torch may wait for ranks that are gone


if __name__ == "__main__": sys.exit(main())
