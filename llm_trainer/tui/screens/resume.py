"""Go on with a run: how far, from where, at which learning rate; the plan is shown before anything happens."""
from __future__ import annotations

import asyncio
from typing import Any

from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Horizontal, Vertical
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Button, Input, Label, Select, Static

from llm_trainer.runs import launch
from llm_trainer.runs.run import Run
from llm_trainer.terminal import clean
from llm_trainer.tui.glyphs import line

PLANS = [("redecay: the schedule over the new total", "redecay"), ("hold: stay at the last learning rate", "hold"),
         ("rewarm: up to half the peak, then down again", "rewarm")]


class ResumeScreen(ModalScreen[dict[str, Any] | None]):
    """Gives what `launch.resume` needs, or None."""

    BINDINGS = [Binding("escape", "dismiss(None)", "Back", key_display="esc"),
                Binding("ctrl+s", "go", "Resume", key_display="^s", priority=True),
                Binding("down", "app.focus_next", "Next", show=False),
                Binding("up", "app.focus_previous", "Previous", show=False)]
    AUTO_FOCUS = "#more"

    def __init__(self, run_id: str):
        super().__init__()
        self.run_id, self.wish, self.planned = run_id, {}, asyncio.Event()

    def compose(self) -> ComposeResult:
        steps = launch.saved_steps(self.app.workspace.checkpoints / self.run_id)
        places = [("latest", "latest"), ("best", "best"), *((f"step {step:,}", str(step)) for step in reversed(steps))]
        with Vertical(classes="dialog wide") as box:
            box.border_title = Content(f"Resume {line(self.run_id, 50)}")
            box.border_subtitle = "^s resumes, esc goes back"
            with Horizontal(classes="row"):
                yield Label("more epochs")
                yield Input(compact=True, id="more", placeholder="empty: up to the target it has", type="integer")
            with Horizontal(classes="row"):
                yield Label("from")
                yield Select(places, value="latest", allow_blank=False, compact=True, id="place")
            with Horizontal(classes="row"):
                yield Label("learning rate")
                yield Select(PLANS, value="redecay", allow_blank=False, compact=True, id="lr-plan")
            with Horizontal(classes="row"):
                yield Label("devices")
                yield Input(compact=True, id="devices", placeholder="empty: as before")
            yield Static(id="plan", markup=False)
            with Horizontal(classes="buttons"):
                yield Button("Back", id="back", compact=True)
                yield Button("Resume", id="go", compact=True)

    @on(Input.Changed)
    @on(Select.Changed)
    def on_mount(self) -> None:
        "Plan again for what the fields say"
        more, lr_plan = self.query_one("#more", Input).value.strip(), self.query_one("#lr-plan", Select).value
        self.wish = {"more_epochs": int(more) if more.lstrip("-").isdecimal() else None,
                     "checkpoint": self.query_one("#place", Select).value,
                     "lr_plan": lr_plan if more or lr_plan != "redecay" else None,
                     "devices": self.query_one("#devices", Input).value.strip() or None}
        self.planned.clear()
        self._plan()

    @work(exclusive=True, group="plan")
    async def _plan(self) -> None:
        """Show what would happen; nothing is changed. The files are read in a thread, as a checkpoint may be large;
        learning rates, steps and time come from the command line, in a process that may load torch"""
        run, space = Run(self.app.workspace.runs / self.run_id), self.app.workspace
        try: plan = await asyncio.to_thread(lambda: launch.plan_resume(run, space, **self.wish))
        except Exception as problem: return self._show(str(problem), False)
        if plan.nothing_to_do: return self._show(str(plan), False)
        self._show(f"{plan}\nlr, time   …", True)
        await asyncio.sleep(0.4)  # somebody may be typing
        self._show(await self._foreseen() or str(plan), True)

    async def _foreseen(self) -> str:
        "The plan in the words of `resume --dry-run`; nothing when it can't tell"
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in self.wish.items() if value is not None]
        process = await asyncio.create_subprocess_exec(
            *launch.command("resume", self.run_id, "--dry-run", *flags),
            env=launch.environment(self.app.workspace), stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL)
        try: said, _ = await process.communicate()
        finally:
            if process.returncode is None: process.kill()
        return said.decode("utf-8", "replace") if process.returncode == 0 else ""

    def _show(self, text: str, ok: bool) -> None:
        texts = [clean(row, keep="")[:200] for row in text.splitlines()]
        if ok: rows = [Content.assemble((row[:11], "$foreground 60%"), row[11:]) for row in texts]
        else: rows = [Content.styled(row, "" if i else "$warning") for i, row in enumerate(texts)]
        rows = [Content.styled("\nThe plan", "bold $primary"), *rows] if ok else [Content(""), *rows]
        self.query_one("#plan", Static).update(Content("\n").join(rows))
        self.query_one("#go", Button).disabled = not ok
        self.planned.set()

    @on(Input.Submitted)
    @on(Button.Pressed, "#go")
    async def action_go(self) -> None:
        await self.planned.wait()
        if not self.query_one("#go", Button).disabled: self.dismiss({"run_id": self.run_id, **self.wish})

    @on(Button.Pressed, "#back")
    def _back(self) -> None: self.dismiss(None)
