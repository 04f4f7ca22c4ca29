"""Staying with a run to its end: in the foreground by its events, as a viewer by the files of its folder."""
from __future__ import annotations

import sys
import time

from llm_trainer.cli import render
from llm_trainer.errors import NotFoundError
from llm_trainer.runs.state import LIVE
from llm_trainer.events import print_notes
from llm_trainer.terminal import clean, count, duration, fixed, size

# phases that come before the first step and can take long
BEFORE = ("reading", "downloading", "tokenizing", "compiling")


def watch(run, json: bool = False, every: float = 2.0):
    "A line (or a JSON object) whenever the state changed, until the run ends; then its card"
    last = None
    while True:
        state = run.status()
        if (state.reason or {}).get("code") == "deleted":
            raise NotFoundError(f"The run {run.id} was deleted meanwhile.\nSee the others: llm-trainer runs")
        now = (state.status, state.phase, state.step, state.val_loss, state.attempt)
        if now != last: print(render.as_json(state, None) if json else render.line(state), flush=True)
        if state.status not in LIVE: break
        last = now
        time.sleep(every)
    if not json: print(render.card(state, run.meta, run.log_tail(12)))


def log(run, every: float = 0.5):
    "New lines of the log as they come, until the run ends"
    follower = run.follow_log()
    for _ in iter(follower.poll, []): pass  # what is there already was printed
    while True:
        over = run.status().status not in LIVE
        if lines := follower.poll(): render.say(*lines)
        elif over: return
        else: time.sleep(every)


def screen(quiet: bool = False):
    "What shows the events of a run in the foreground, as a context manager that is called with each event"
    if quiet: return _Nothing()
    return _Bar() if sys.stdout.isatty() else _Lines()


def conclude(run, quiet: bool = False):
    "Says how a run ended, and the commands that follow"
    state = run.status()
    if quiet: return print(render.as_json(state))
    print("", render.card(state, run.meta, run.log_tail(8)), sep="\n")
    if state.status in ("completed", "stopped") and state.checkpoint_step is not None:
        go_on = f"  llm-trainer resume {run.id}" + (" --more-epochs 1" if state.status == "completed" else "")
        render.say("", "Next:", f'  llm-trainer generate {run.id} --prompt "The "', go_on)


def sentence(event) -> str | None:
    "An event in words; None for one that is not worth a line"
    if event.kind == "prepared":
        meta, tokens = event.meta, event.meta.get("data", {}).get("train_tokens", 0)
        return f"{meta.get('parameters', 0):,} parameters, {tokens:,} training tokens, {meta.get('steps') or 0:,} steps"
    if event.kind == "evaluated":
        return f"step {event.step:,}  validation loss {event.loss:.4f}, perplexity {fixed(event.perplexity, 2)}, " \
               f"{event.bits_per_byte:.3f} bits per byte" + \
               "".join(f", {clean(name, '')} {loss:.4f}" for name, loss in event.parts)
    if event.kind == "sampled": return f"step {event.step:,}  sample: {clean(event.prompt + event.text, '')}"
    if event.kind == "skipped": return f"step {event.step:,}  skipped: {event.what} was not finite"
    if event.kind == "saved": return f"step {event.step:,}  saved {size(event.bytes)} in {event.seconds:.1f} s"
    if event.kind == "stopping": return f"Stopping ({event.message}): a checkpoint first. Ctrl-C again ends it at once."
    if event.kind == "note": return event.message
    if event.kind == "waiting": return f"Waiting for the device, after {', '.join(event.runs)}."
    return None


def progress(event) -> str:
    "A step in words"
    parts = [f"loss {event.loss:.3f}" if event.loss is not None else "",
             f"{count(event.tokens_per_second)} tok/s" if event.tokens_per_second else "",
             f"{duration(event.eta_seconds)} left" if event.eta_seconds is not None else ""]
    return "  ".join(filter(None, parts))


class _Pace:
    """How far a preparation is, in words, and how much longer it will take at this pace."""
    what, begun, first = None, 0.0, 0

    def __call__(self, event) -> str:
        if event.what != self.what: self.what, self.begun, self.first = event.what, time.monotonic(), event.done
        done = event.done - self.first
        left = self.seconds * (event.total - event.done) / done if done and self.seconds > 1 else None
        return f"{event.done / max(1, event.total):.0%}" + (f"  {duration(left)} left" if left is not None else "")

    @property
    def seconds(self) -> float: return time.monotonic() - self.begun


class _Nothing:
    """Shows remarks only, beside the result."""

    def __enter__(self): return self
    def __exit__(self, *_): pass
    def __call__(self, event): print_notes(event)


class _Lines(_Nothing):
    """Plain lines, for pipes, files and cron: what happened, and every few seconds where the run is."""
    every, shown, steps = 5.0, 0.0, None

    def __enter__(self):
        self.pace = _Pace()
        return self

    def __call__(self, event):
        if text := sentence(event): render.say(text)
        if event.kind == "prepared": self.steps = event.meta.get("steps")
        if event.kind == "phase" and event.name in BEFORE: render.say(f"{event.name} …")
        if event.kind == "progress": text, worth = f"{event.what} {self.pace(event)}", self.pace.seconds > 2
        elif event.kind == "step":
            text, worth = f"step {event.step:,}{self._of()}  {progress(event)}", event.loss is not None
        else: return
        if worth and time.monotonic() - self.shown >= self.every:
            self.shown = time.monotonic()
            render.say(text)

    def _of(self) -> str: return f" of {self.steps:,}" if self.steps else ""


class _Bar(_Nothing):
    """A bar with the time left on a terminal; everything else scrolls by above it."""
    steps = None

    def __enter__(self):
        from rich.progress import BarColumn, Progress, ProgressColumn
        from rich.text import Text

        class Words(ProgressColumn):
            def __init__(self, name):
                self.name = name
                super().__init__()
            def render(self, task): return Text(task.fields[self.name], no_wrap=True, overflow="ellipsis")
        self.bar = Progress(Words("before"), BarColumn(bar_width=14), Words("after"), transient=True)
        self.pace = _Pace()
        self.task, self.loss, self.moved = self.bar.add_task("", total=None, before="starting", after=""), "", 0.0
        self.bar.start()
        self.bar.console.show_cursor(True)  # a second Ctrl-C leaves at once and could not bring it back
        return self

    def __exit__(self, *_): self.bar.stop()

    def __call__(self, event):
        if event.kind == "saved": return
        if text := sentence(event): self.bar.console.print(clean(text), markup=False, highlight=False, soft_wrap=True)
        if event.kind == "prepared":
            self.steps = event.meta.get("steps")
            self.bar.update(self.task, total=self.steps, completed=0, after="")
        elif event.kind == "phase":
            self.bar.update(self.task, before=clean(event.name, ""))
            if event.name in BEFORE: self.bar.update(self.task, completed=0, after="")
        elif event.kind == "progress":
            self.bar.update(self.task, before=clean(event.what, ""), after=self.pace(event), total=event.total or None,
                            completed=event.done)
        elif event.kind == "step":
            if event.loss is not None: self.loss = f"loss {event.loss:.3f}"
            if time.monotonic() - self.moved < 0.1: return
            self.moved, words = time.monotonic(), progress(event)
            words = words if event.loss is not None else f"{self.loss}  {words}"
            self.bar.update(self.task, completed=event.step, after=f"{event.step:,}/{self.steps or 0:,}  {words}")
