"""Write with a run's model: a prompt, the sampler's settings, and the text as it comes from the warm child process."""
from __future__ import annotations

import asyncio
import time
from dataclasses import fields
from typing import Any

from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Container, Horizontal, VerticalScroll
from textual.content import Content
from textual.screen import Screen
from textual.widgets import Input, Label, Static, TextArea

from llm_trainer.errors import LLMTrainerError
from llm_trainer.generation.sampling import Sampling
from llm_trainer.runs.run import Run
from llm_trainer.terminal import clean
from llm_trainer.tui.glyphs import line
from llm_trainer.tui.widgets.key_bar import KeyBar
from llm_trainer.tui.widgets.top_bar import TopBar

NAMES = {"max_new_tokens": "tokens", "temperature": "temperature", "top_k": "top k", "top_p": "top p", "min_p": "min p",
         "repetition_penalty": "repetition"}
DEFAULTS = {field.name: field.default for field in fields(Sampling)}
KNOBS: dict[str, tuple[str, type, str]] = {  # name → label, kind and default of each field
    **{name: (label, type(DEFAULTS[name]), f"{DEFAULTS[name]:g}") for name, label in NAMES.items()},
    "seed": ("seed", int, ""), "checkpoint": ("checkpoint", str, "best")}


class GenerateScreen(Screen[None]):
    """The prompt above, the text below; the process that writes stays warm until the watcher closes."""

    BINDINGS = [
        Binding("escape", "leave", "Stop, back", key_display="esc", tooltip="Stop the text; then back"),
        Binding("ctrl+g", "write", "Generate", key_display="^g", tooltip="Continue the prompt", priority=True),
        Binding("ctrl+t", "go_on", "Go on", key_display="^t", tooltip="Continue prompt and text", priority=True),
        Binding("ctrl+y", "copy_text", "Copy text", key_display="^y", tooltip="Copy prompt and text", priority=True),
        Binding("tab", "app.focus_next", "Knobs", tooltip="To the next field", priority=True)]
    AUTO_FOCUS = "#prompt"

    def __init__(self, run_id: str):
        super().__init__()
        self.run_id, self.prompt, self.text = run_id, "", ""
        self.busy, self.painted = False, 0.0

    def compose(self) -> ComposeResult:
        stored = Run(self.app.workspace.runs / self.run_id).settings()
        yield TopBar()
        box = TextArea(clean(str(stored.get("sample_prompt", "The "))), id="prompt", show_line_numbers=False,
                       soft_wrap=True, tab_behavior="focus")
        box.border_title = "Prompt"
        yield box
        with Container(id="knobs"):
            for name, (label, _, value) in KNOBS.items():
                given = stored.get(name) if name not in ("seed", "checkpoint") else None
                with Horizontal(classes="knob"):
                    yield Label(label)
                    yield Input(line(f"{given:g}" if isinstance(given, float) else given if given is not None
                                     else value, 20),
                                compact=True, id=f"knob-{name}", select_on_focus=True,
                                placeholder={"seed": "any"}.get(name, value))
        yield Static(id="said", markup=False)
        with VerticalScroll(id="output") as out:
            out.border_title = "Text"
            yield Static(id="text", markup=False)
        yield KeyBar()

    def on_mount(self) -> None:
        self.query_one(TopBar).show(["llm_trainer", line(self.run_id, 40), "generate"], [])
        prompt = self.query_one("#prompt", TextArea)
        prompt.move_cursor(prompt.document.end)
        self._say("^g writes. The first text takes a few seconds: the model is loaded once.")

    def request(self, prompt: str) -> dict[str, Any]:
        "What the child process is asked; ValueError names the knob that is no number"
        wish: dict[str, Any] = {"prompt": prompt}
        for name, (label, kind, _) in KNOBS.items():
            text = self.query_one(f"#knob-{name}", Input).value.strip()
            if not text: continue
            try: wish[name] = kind(text)
            except ValueError:
                wanted = "whole number" if kind is int else "number"
                raise ValueError(f"{label} must be a {wanted}, not {line(text, 20)}") from None
        return wish

    def action_write(self) -> None: self._start(self.query_one("#prompt", TextArea).text)

    @on(Input.Submitted)
    def _submitted(self) -> None: self.action_write()

    def action_go_on(self) -> None:
        if self.text: self._start(self.prompt + self.text)

    def _start(self, prompt: str) -> None:
        if self.busy: return self._say("It is still writing; esc stops it.")
        if not prompt: return self._say("The prompt is empty; there is nothing to continue.", "error")
        try: wish = self.request(prompt)
        except ValueError as problem: return self._say(str(problem), "error")
        self._write(prompt, wish)

    @work(group="generate")
    async def _write(self, prompt: str, wish: dict[str, Any]) -> None:
        from llm_trainer.training.checkpoint import Checkpoints
        self.prompt, self.text, self.busy = prompt, "", True
        self._paint(True)
        generator, which, notes = self.app.generator, wish.pop("checkpoint", "best"), []
        store = Checkpoints(self.app.workspace.checkpoints / self.run_id, self.run_id,
                            emit=lambda event: notes.append(event.message))
        try:
            for last in (False, False, True):
                self._say("checking the checkpoint …")
                folder = await asyncio.to_thread(store.select, which)
                warm = generator.alive and generator.folder == folder
                self._say(f"writing from {folder.name} …" if warm else f"loading the model of {folder.name} …")
                async for answer in generator.ask(folder, wish):
                    if "error" in answer and not last and not folder.is_dir():
                        break  # a run that trains has replaced it
                    self._answer(answer, folder.name, notes)
                else: break
        except (LLMTrainerError, OSError) as problem: self._say(str(problem), "error")
        finally:
            self.busy = False
            self._paint(True)

    def _answer(self, answer: dict[str, Any], source: str, notes: list[str]) -> None:
        if "error" in answer: self._say(str(answer["error"]), "error")
        elif "text" in answer:
            self.text += str(answer["text"])
            self._paint()
        elif answer.get("ready"): self._say(f"writing from {source} on {line(answer.get('device'), 20)} …")
        elif answer.get("finish"):
            count, took = answer.get("tokens") or 0, answer.get("seconds") or 0
            ends = {"length": "as long as asked", "eot": "the model ended it", "stop": "at a stop text",
                    "cancelled": "stopped"}
            self._say(" · ".join([f"{count} tokens in {took:.{1 + (took < 1)}f} s",
                                  *([f"{count / took:,.0f} tok/s"] if took else []),
                                  ends.get(answer["finish"], line(answer["finish"], 20)), source, *notes]))

    def _paint(self, now: bool = False) -> None:
        "Show what there is, at most ten times a second; cleaned as a whole, so that no split sequence slips through"
        if not now and time.monotonic() - self.painted < 0.1: return
        self.painted = time.monotonic()
        box = self.query_one("#output", VerticalScroll)
        at_end = box.is_vertical_scroll_end
        self.query_one("#text", Static).update(Content.assemble((clean(self.prompt), "$foreground 60%"),
                                                                clean(self.text),
                                                                ("▌" if self.busy else "", "$primary")))
        if at_end: box.scroll_end(animate=False)

    def _say(self, text: str, kind: str = "") -> None:
        self.query_one("#said", Static).update(Content.styled(line(text, 400), "$error" if kind == "error"
                                                              else "$foreground 60%"))

    async def action_leave(self) -> None:
        if not self.busy: self.dismiss()
        else: await self.app.generator.cancel()

    def action_copy_text(self) -> None:
        self.app.copy_to_clipboard(clean(self.prompt + self.text))
        self.app.notify("Prompt and text are in the clipboard.", title="Copied", timeout=3)
