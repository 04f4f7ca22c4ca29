"""The commands of `llm-trainer`, as plain functions: Fire makes the command line from their signatures.

Every import that costs something lies inside the function that needs it, so `runs` and `--help` start at once.
"""
from __future__ import annotations

import shlex
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal

from llm_trainer import __version__, show, workspace
from llm_trainer.errors import BusyError, LLMTrainerError, NotFoundError, UsageError
from llm_trainer.frontend import Flag, FrontEnd
from llm_trainer.settle import is_folder, settle, weights
from llm_trainer.terminal import clean, size


# Settings as flags ---------------------------------------------------------------------------------------------------

GROUPS = {"model": "Model", "data": "Data and tokenizer", "training": "Training", "sampling": "Samples while training"}


def _flags(choose=lambda knob: True, hide=lambda knob: False, default=None) -> list[Flag]:
    "The settings of the config as flags; `default`: what help says in place of their defaults"
    from llm_trainer.config import fields
    kinds = {"int": int, "float": float, "bool": bool, "text": str}
    kind = lambda knob: Literal[tuple(knob.choices)] if knob.type == "choice" else kinds[knob.type]
    return [Flag(k.name, kind(k), k.default, k.description, GROUPS[k.group], note=_note(k, default), hidden=hide(k))
            for k in fields().values() if choose(k)]


def _note(knob, default=None) -> str:
    "`6; from 1 to 1,000`: the default and the bounds; an upper bound no one meets is left out"
    own = "none" if knob.default is None else knob.default
    default = default or (("on" if own else "off") if knob.type == "bool" else str(own))
    if knob.type not in ("int", "float"): return default
    words = knob.expects.removeprefix("a whole number ").removeprefix("a number ")
    return f"{default}; {words.partition(' to ')[0] if (knob.bounds[1] or 0) >= 1e6 else words}"


def _knobs(**how):
    "Gives a command's `**knobs` their names: settings of the config"
    def give(function):
        function.knobs = lambda: _flags(**how)
        return function
    return give


def _config(space, config: str | None, knobs: dict):
    "The validated config of a new run; paths on the command line are meant from the current folder"
    from llm_trainer.config import load_config
    return settle(load_config(config or space.config, knobs, space.configs), space, knobs, _tell)


# Finding runs --------------------------------------------------------------------------------------------------------

def _run(text: str | None = None):
    "The run that `text` (an id or the unique beginning of one; None: the newest) names"
    from llm_trainer.runs import find_run
    return find_run(workspace.find().runs, text)


@contextmanager
def _progress(quiet: bool):
    "What shows events on the screen, and what shows how far something is: (what, done, of how much)"
    from llm_trainer import follow
    from llm_trainer.worker import Doing
    with follow.screen(quiet) as screen: yield screen, lambda *how_far: screen(Doing(*how_far))


def _tell(message: str):
    "A remark beside the result, which stays alone on standard output"
    print(clean(message), file=sys.stderr, flush=True)


def _checkpoints(run):
    from llm_trainer.checkpoint import Checkpoints
    return Checkpoints(workspace.find().checkpoints / run.id, run.id, notify=_tell)


def _with_weights(text: str | None, checkpoint: str | None, use):
    "That folder, and what `use` makes of it; chosen again where a run that goes on has pruned it meanwhile"
    while True:
        folder = weights(text, checkpoint, notify=_tell)
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
    if json: return print(show.as_json({"root": str(space.root)}))
    show.say(f"Workspace ready: {space.root}", "Next:", f"  cd {space.root}", "  llm-trainer doctor",
             "  llm-trainer train --config quickstart")


def doctor(
    *,
    json: bool = False,  # Print one JSON object
):
    "Say what this machine offers: device, memory, disk, packages"
    from llm_trainer import doctor as look
    found = look.examine()
    print(show.as_json(found)) if json else show.say(look.report(found))
    return 0 if found["ready"] else 1


@_knobs(choose=lambda knob: knob.group == "data" or knob.name == "seq_len")  # shorter than that is too short
def prepare(
    *,
    # Flags
    config: str | None = None,  # NAME|PATH: Profile (default: the one in settings.ini)
    json: bool = False,  # Print one JSON object
    **knobs,
):
    "Fetch the text and make tokens of it, without training"
    space = workspace.find()
    settings = _config(space, config, knobs)
    from llm_trainer.train import drain
    from llm_trainer.train import prepare as events
    with _progress(json) as (screen, told): material = drain(events(settings, space, progress=told), screen)
    meta = material.meta
    found = {**{k: v for k, v in meta["data"].items() if k in ("train_tokens", "val_tokens")},
             "vocab_size": meta["vocab_size"], "tokenizer_hash": meta["tokenizer_hash"]}
    if json: return print(show.as_json({**found, **meta["data"]}))
    show.say(show.facts(found), f"Next: llm-trainer {shlex.join(['train', *sys.argv[2:]])}")


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
    dry_run: bool = False,  # Show config, size, memory and time; create nothing
    json: bool = False,  # Print one JSON object
    **knobs,
):
    """Train a model

    The profile's settings, then your flags. Ctrl-C saves a checkpoint and stops;
    `llm-trainer resume` goes on from there. Dashes and underscores are the same.
    """
    space = workspace.find()
    settings = _config(space, config, knobs)
    _check_settings(settings)
    if dry_run:
        from llm_trainer import plan
        estimate = plan.estimate(settings, space)
        return print(show.as_json(estimate)) if json else show.say(plan.report(estimate))
    from llm_trainer import launch
    if not background:
        from llm_trainer.device import resolve
        resolve(settings.training, space.device)  # a device that is not there is said before there is a run
    run = launch.start(settings, space, name, note, sys.argv[1:], background, parallel)
    return _go(run, space, background, json)


def _check_settings(settings):
    "Say which settings have no effect"
    from llm_trainer.config import idle
    for remark in idle(settings): _tell(f"Note: {remark}")


def _go(run, space, background: bool, json: bool):
    "Say how to look at a run that begins and, in the foreground, train it here to its end"
    from llm_trainer import launch
    if background:
        state = run.status()
        if json: return print(show.as_json({**state, "folder": str(run.folder)}))
        after = f" behind {', '.join(state['waiting_for'])}" if state["waiting_for"] else ""
        show.say(f"Run {run.id} is {state['status']}{after} (pid {state['pid']}). It goes on when this shell closes.")
        return show.say(*_next(run))
    if not json: show.say(f"Run {run.id}. Meanwhile, from any other shell:", *_next(run), "")
    from llm_trainer import follow, worker
    with follow.screen(quiet=json) as screen: code = worker.work(run, space, screen)
    state = run.status()
    if code in (2, 3) and not state["step"] and len(run.attempts()) == 1:  # it could never begin: leave nothing behind
        launch.delete(run, space)
        message = (state["reason"] or {}).get("message") or "The run could not begin."
        raise UsageError(message) if code == 2 else NotFoundError(message)
    follow.conclude(run, json)
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
    more_epochs: int | None = None,  # Train exactly N epochs more, also after the run was completed
    lr_plan: Literal["redecay", "hold", "rewarm"] | None = None,  # How the learning rate covers what was added
    background: bool = False,  # Return at once; the run outlives this shell
    parallel: bool = False,  # With --background: don't queue behind the run that uses the device
    dry_run: bool = False,  # Show the plan; change nothing
    json: bool = False,  # Print one JSON object
    **knobs,
):
    """Go on with a run, as if it had never stopped

    redecay (the default) spreads the schedule over the new total, hold stays at
    the last learning rate, rewarm climbs to half the peak and falls again. Settings
    that a resumed run may change are below; the others are fixed when it begins.
    """
    from llm_trainer import launch
    found, space = _run(run), workspace.find()
    if not dry_run:
        with launch.own(found): pass  # busy is said before a plan is
    plan, more = launch.plan_resume(found, space, more_epochs, lr_plan, checkpoint, knobs), ""
    if not plan.nothing_to_do and (dry_run or not background):  # a background run is on its way before torch is loaded
        from llm_trainer.plan import foresee
        plan, more = foresee(plan, found, space)
    if json and (dry_run or plan.nothing_to_do): return print(show.as_json(vars(plan)))
    if not json: show.say(str(plan), *filter(None, [more]))
    if dry_run or plan.nothing_to_do: return None
    heir = launch.resume(found, space, more_epochs, lr_plan, checkpoint, knobs, sys.argv[1:], background, parallel)
    if not background and heir.lock is None: return show.say(f"{heir.id} was completed meanwhile; nothing is left to train.")
    return _go(heir, space, background, json)


def stop(
    run: str,  # Run, or the unique beginning of its id
    *,
    now: bool = False,  # End it at once; what is not saved yet is lost
    json: bool = False,  # Print one JSON object
):
    "Have a run save a checkpoint and end"
    from llm_trainer import launch
    found = _run(run)
    state = launch.stop(found, now, None if json else _waiting)
    if json: return print(show.as_json(state))
    step = f" at step {state['step']:,}" if state.get("step") is not None else ""
    show.say(f"Run {found.id} is {state['status']}{step}.",
             *([f"Go on with it: llm-trainer resume {found.id}"] if state["status"] != "completed" else []))


def _waiting(state: dict):
    "One line that says what a stopping run is at; it rewrites itself on a terminal"
    if sys.stderr.isatty(): print(f"\r\x1b[K{show.line(state)}", end="", file=sys.stderr, flush=True)


def delete(
    run: str,  # Run, or the unique beginning of its id
    *,
    yes: bool = False,  # Don't ask
    json: bool = False,  # Print one JSON object
):
    "Remove a run and its checkpoints for good"
    from llm_trainer import launch
    found, space = _run(run), workspace.find()
    if found.locked: raise BusyError(f"{found.id} is being trained. Stop it first: llm-trainer stop {found.id}")
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError(f"delete asks before it removes {found.id}, and there is nobody to ask here.\n"
                             f"Say so beforehand: llm-trainer delete {found.id} --yes")
        answer = input(f"Delete run {found.id} and its checkpoints? [y/N] ")
        if answer.strip().lower() not in ("y", "yes"): return show.say("Nothing was deleted.")
    freed = launch.delete(found, space)
    if json: return print(show.as_json({"run_id": found.id, "bytes": freed}))
    show.say(f"Deleted {found.id}: {size(freed)} are free again.")


# Look ----------------------------------------------------------------------------------------------------------------

NO_RUN = "There is no run yet. Start one: llm-trainer train --config quickstart"


def status(
    run: str | None = None,  # Run, or the unique beginning of its id (default: the newest)
    *,
    watch: bool = False,  # Print a line every two seconds until the run ends
    json: bool = False,  # Print one JSON object
):
    "Show how a run is doing"
    from llm_trainer.runs import list_runs
    found = next(iter(list_runs(workspace.find().runs)), None) if run is None else _run(run)
    if found is None: return print("{}") if json else show.say(NO_RUN)
    if watch:
        from llm_trainer import follow
        return follow.watch(found, json)
    state = found.status()
    from llm_trainer import host
    state["process_state"] = host.process_state(state["pid"]) if host.same_process(state) else None
    if json: return print(show.as_json(state))
    print(show.card(state, found.meta, found.log_tail(8)))


def runs(
    *,
    csv: str | None = None,  # RUN: Print the metrics of this run as CSV
    json: bool = False,  # Print a JSON list, newest first
):
    "List all runs, newest first"
    if csv is not None: return print(show.csv(_run(csv).metrics()))
    from llm_trainer.runs import list_runs
    states = [run.status() for run in list_runs(workspace.find().runs)]
    if json: return print(show.as_json(states))
    if not states: return show.say(NO_RUN)
    print(show.table(states))


def logs(
    run: str | None = None,  # Run, or the unique beginning of its id (default: the newest)
    *,
    follow: bool = False,  # Go on printing until the run ends
    lines: int = 200,  # How many of the last lines
):
    "Print the log of a run"
    found = _run(run)
    for text in found.log_tail(max(0, lines)): show.say(text.rstrip("\n"))
    if follow:
        from llm_trainer import follow as viewer
        viewer.log(found)


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

def generate(
    run: str | None = None,  # RUN|FOLDER: Run, or a Hugging Face model folder (default: the newest run)
    *,
    # Prompt
    prompt: str | None = None,  # Text to continue, taken byte for byte
    prompt_file: Path | None = None,  # FILE: File that holds the prompt; - for standard input
    prompts: Path | None = None,  # FILE: JSONL of many prompts, done in batches
    truncate: Literal["error", "left"] = "error",  # A prompt longer than the context: refuse it, or cut its beginning
    interactive: bool = False,  # Talk to the model: prompts, /set KNOB VALUE, /help
    # Choosing tokens
    temperature: float = 0.8,  # 0 always takes the likeliest token; above 1 is wilder
    top_k: int = 0,  # Only the K likeliest tokens; 0 is off
    top_p: float = 1.0,  # Only the likeliest tokens that reach this probability together; 1 is off
    min_p: float = 0.0,  # Only tokens of at least this share of the likeliest one's probability; 0 is off
    typical_p: float = 1.0,  # Only tokens of typical surprise, up to this probability; 1 is off
    repetition_penalty: float = 1.0,  # Above 1 discourages tokens that occurred, the prompt's too
    presence_penalty: float = 0.0,  # Taken off the logit of each token written already
    frequency_penalty: float = 0.0,  # The same, times how often it was written
    no_repeat_ngram: int = 0,  # No sequence of this many tokens twice; 0 is off
    beams: int = 1,  # Above 1: beam search, which neither samples nor streams
    seed: int | None = None,  # The same seed, the same text (default: another text each time)
    # How much
    max_new_tokens: int = 200,  # At most this many tokens
    num_samples: int = 1,  # How many texts
    stop: list[str] = [],  # End before this text
    ignore_eot: bool = False,  # Write on past the end of a document
    # Model and output
    checkpoint: str | None = None,  # best|latest|STEP: Which checkpoint of the run (default: best)
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto",  # Where to compute
    output: Path | None = None,  # FILE: Write the text here, unchanged
    raw: bool = False,  # Leave control bytes in a text that goes into a pipe
    json: bool = False,  # Print one JSON object: texts, tokens, log-probabilities, times
):
    "Continue a prompt with a trained model"
    from llm_trainer import talk
    _check_generate(prompt, prompt_file, prompts, interactive, num_samples, json, raw, output)
    many = talk.read_prompts(prompts) if prompts is not None else None
    if many is None and not interactive: many = [talk.one_prompt(prompt, prompt_file)]
    weights(run, checkpoint, need=(), notify=_tell)  # what is not there is said before torch is loaded
    from llm_trainer import sampler
    sampling = sampler.Sampling(
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        typical_p=typical_p, repetition_penalty=repetition_penalty, presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty, no_repeat_ngram=no_repeat_ngram, stop=tuple(stop), seed=seed,
        truncate=truncate, beams=beams, ignore_eot=ignore_eot, logprobs=json)
    load = lambda folder: sampler.load_for_generation(folder, device, workspace.preferred_device())
    folder, (model, tokenizer) = _with_weights(run, checkpoint, load)
    write = lambda text, how: sampler.generate(model, tokenizer, text, how)
    if interactive: return talk.converse(write, sampling, show.say)
    show_part = talk.silent if json or output else talk.to_pipe if raw else talk.to_terminal
    if len(many) == num_samples == 1:
        aloud = show_part is talk.to_terminal
        if aloud and sys.stdout.isatty(): print(show.paint(clean(many[0]), 2), end="", flush=True)
        texts = [talk.write(write(many[0], sampling), many[0], show_part)]
        if aloud: print(flush=True)
    else: texts = talk.write_many(sampler.generate_batch(model, tokenizer, many, sampling, num_samples), show_part)
    if output is not None: workspace.home(output).write_bytes("\n".join(t.text for t in texts).encode())
    told = [{name: value for name, value in vars(t).items() if name != "begun"} for t in texts]
    if json: print(show.as_json({"checkpoint": str(folder), "settings": vars(sampling), "texts": told}))
    return 130 if any(t.finish == "interrupted" for t in texts) else 0


def _check_generate(prompt, prompt_file, prompts, interactive, num_samples, json, raw, output):
    "Refuse what excludes each other, before anything is loaded"
    sources = {"--prompt": prompt, "--prompt-file": prompt_file, "--prompts": prompts,
               "--interactive": interactive or None}
    given = [name for name, value in sources.items() if value is not None]
    if len(given) > 1: raise UsageError(f"{' and '.join(given)} exclude each other; give one.")
    if num_samples < 1: raise UsageError(f"--num-samples takes a whole number from 1, not {num_samples}.")
    if interactive and (json or output):
        raise UsageError("--interactive talks to a person; leave out --json and --output.")
    if raw and sys.stdout.isatty() and output is None:
        raise UsageError("--raw would let a model command your terminal; pipe the text somewhere or use --output FILE.")
    if output is not None and not workspace.home(output).absolute().parent.is_dir():
        raise NotFoundError(f"The folder of --output {clean(output, '')} does not exist.")
    if output is not None and workspace.home(output).is_dir():
        raise UsageError(f"--output {clean(output, '')} is a folder; name a file in it.")


def evaluate(
    run: str | None = None,  # RUN|FOLDER: Run, or a Hugging Face model folder (default: the newest run)
    *,
    data: str | None = None,  # Another corpus to measure on (default: the run's validation text)
    checkpoint: str | None = None,  # best|latest|STEP: Which checkpoint of the run (default: best)
    stride: int | None = None,  # Tokens between two windows (default: the context, so none overlap)
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto",  # Where to compute
    json: bool = False,  # Print one JSON object
):
    "Measure a model: loss, perplexity, bits per byte"
    from llm_trainer.config import Config
    from llm_trainer.data import first_look
    space, meta = workspace.find(), {} if is_folder(run) else _run(run).meta
    if data is not None: first_look(Config().replace(dataset=data).data, space.data)
    weights(run, checkpoint, need=(), notify=_tell)  # what is not there is said before torch is loaded
    from llm_trainer.measure import measure
    with _progress(json) as (_, told):
        _, found = _with_weights(run, checkpoint, lambda folder: measure(folder, space, meta, data, stride, device, notify=_tell,
                                                                         progress=told))
    if json: return print(show.as_json(found))
    show.say(show.facts(found))


def verify(
    run: str,  # Run, or the unique beginning of its id
    *,
    json: bool = False,  # Print one JSON object
):
    "Read a run's checkpoints again and check every file"
    found = _run(run)
    with _progress(json) as (_, told): problems = _checkpoints(found).verify(partial(told, "verifying"))
    damaged = {step: faults for step, faults in problems.items() if faults}
    if json: print(show.as_json({"run_id": found.id, "checkpoints": problems, "damaged": len(damaged)}))
    elif not problems: show.say(f"Run {found.id} has no checkpoint yet, so there is nothing to verify.")
    else:
        for step, faults in problems.items(): show.say(f"  step {step:,}: {'; '.join(faults) if faults else 'whole'}")
        good = [step for step, faults in problems.items() if not faults]
        show.say("Every checkpoint is whole." if not damaged else f"{len(damaged)} of {len(problems)} are damaged." + (
                 f" Resuming and generating use the good ones, the newest of them step {max(good):,}." if good else
                 " None is whole: this run can't be resumed."))
    return 1 if damaged else 0


def export(
    run: str | None = None,  # Run, or the unique beginning of its id (default: the newest)
    *,
    out: Path,  # DIR: Folder to write; it must not exist yet
    format: Literal["hf", "gguf"] = "hf",  # hf: a Hugging Face folder; gguf: for llama.cpp
    checkpoint: str | None = None,  # best|latest|STEP: Which checkpoint (default: best)
    json: bool = False,  # Print one JSON object
):
    "Copy a checkpoint out, as other programs read it"
    import shutil
    target = workspace.home(out)
    if format == "gguf":
        raise UsageError("This version writes no gguf itself. llama.cpp's converter reads a checkpoint as it lies:\n"
                         f"python convert_hf_to_gguf.py {weights(run, checkpoint, notify=_tell)} --outfile {clean(str(out), '')}")
    if target.exists(): raise UsageError(f"{clean(str(target), '')} exists already; export writes a new folder.")
    hidden = target.with_name(f".{target.name}.tmp")

    def copy(folder):
        try: shutil.copytree(folder, hidden, ignore=shutil.ignore_patterns("state", "manifest.json"))
        except OSError: shutil.rmtree(hidden, ignore_errors=True); raise
    folder, _ = _with_weights(run, checkpoint, copy)
    hidden.rename(target)
    if json: return print(show.as_json({"folder": str(target), "checkpoint": str(folder)}))
    show.say(f"Wrote {target}.", "Open it in Python:", f"  AutoModelForCausalLM.from_pretrained({str(target)!r})")


def bench(
    what: Literal["train", "generate", "load", "save", "resume", "cli"],  # What to measure
):
    "Measure the speed of this machine with this program"
    import runpy
    script = Path(__file__).parent.parent / "bench" / f"{what}.py"
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


# The program ---------------------------------------------------------------------------------------------------------

def _run_ids() -> list[str]:
    from llm_trainer.runs import list_runs
    return [run.id for run in list_runs(workspace.find().runs)]


def _profiles() -> list[str]:
    from llm_trainer.config import profiles
    return list(profiles(workspace.find().configs))


front = FrontEnd(
    "llm-trainer", __version__,
    "Train a GPT-style Transformer on your own machine, in the background, and resume it as the very same run.",
    {"Prepare": {"init": init, "doctor": doctor, "prepare": prepare},
     "Train": {"train": train, "resume": resume, "stop": stop, "delete": delete},
     "Look": {"status": status, "runs": runs, "logs": logs, "watch": watch},
     "Use": {"generate": generate, "evaluate": evaluate, "verify": verify, "export": export},
     "Tools": {"bench": bench, "completion": completion}},
    candidates={"run": _run_ids, "csv": _run_ids, "init_from": _run_ids, "config": _profiles,
                "dataset": lambda: ["python-docs", "python-code"], "tokenizer": lambda: ["bpe", "char", "byte"],
                "checkpoint": lambda: ["best", "latest"]},
    examples="""\
  llm-trainer train --config quickstart     a first model, in minutes
  llm-trainer generate --prompt "The "      read what it writes
  llm-trainer train --background            a longer run that outlives this shell
  llm-trainer status --watch                how it is doing""")


def main(argv: list[str] | None = None) -> int:
    "The program: run the argument list (default: the process's) and return its exit code"
    return front.run(argv)


if __name__ == "__main__": sys.exit(main())
