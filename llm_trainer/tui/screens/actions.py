"""What several screens can do: poll files in a thread while they are seen, and act on the run that is chosen."""
from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from textual import events, work
from textual.binding import Binding
from textual.message import Message
from textual.worker import get_current_worker

from llm_trainer.errors import LLMTrainerError
from llm_trainer.tui.glyphs import line
from llm_trainer.tui.readers import RunRow


class Polling:
    """Calls `poll` in a thread, twice a second, and posts what it returns; pauses while another screen is on top."""

    def start_polling(self) -> None:
        self._awake, self._unread, self._poll_problem = threading.Event(), False, ""
        self._follow()

    def poll(self) -> Message | None: raise NotImplementedError

    def polled(self) -> None:
        "To be called when a message was shown: only then the next one is sent"
        self._unread = False

    def wake(self) -> None: self._awake.set()

    def on_unmount(self) -> None: self._awake.set()

    def on_screen_resume(self) -> None:
        if hasattr(self, "_awake"): self._awake.set()

    @property
    def seen(self) -> bool:
        "Is this the screen in front? One behind a dialog rests too: its every change would repaint all of both"
        return self.app.screen_stack[-1:] == [self]

    @work(thread=True, exclusive=True, group="tail")
    def _follow(self) -> None:
        worker = get_current_worker()
        while not worker.is_cancelled:
            took = time.monotonic()
            if self.seen and not self._unread: self._poll_once(worker)
            took = time.monotonic() - took
            self._awake.wait(max(self.app.interval, min(5.0, 20
                                                        * took)))  # a huge workspace costs at most 5 % of a core
            self._awake.clear()

    def _poll_once(self, worker: Any) -> None:
        try: message = self.poll()
        except Exception as problem:  # a viewer outlives any file
            text = line(f"{type(problem).__name__}: {problem}", 300)
            if text != self._poll_problem and not worker.is_cancelled:
                self.app.call_from_thread(self.app.notify, text, severity="error", title="Could not read the run")
            self._poll_problem = text
            return
        self._poll_problem = ""
        if message is not None and not worker.is_cancelled:
            self._unread = True
            self.post_message(message)


def _next(value: str, values: Iterable[str]) -> str:
    "The one after `value`, in a circle"
    values = list(values)
    return values[(values.index(value) + 1) % len(values)]


class PlotActions:
    """Scale, axis, smoothing and view of the screen's plot; `draw` brings it up to date."""

    KEYS = [
        Binding("l", "log_scale", "Log", tooltip="Logarithmic or linear loss"),
        Binding("a", "against", "Against", tooltip="Curves against steps, tokens or training time"),
        Binding("m", "smooth", "Smooth", tooltip="How much the training curves are smoothed")]
    VIEW_KEYS = [
        Binding("plus,equals_sign", "plot('zoom_in')", "Zoom in", tooltip="Zoom in", group=Binding.Group("+- Zoom")),
        Binding("minus", "plot('zoom_out')", "Zoom out", tooltip="Zoom out", group=Binding.Group("+- Zoom")),
        Binding("left", "plot('pan_left')", "Pan left", tooltip="Move the view left", group=Binding.Group("←→ Pan")),
        Binding("right", "plot('pan_right')", "Pan right", tooltip="Move the view right",
                group=Binding.Group("←→ Pan")),
        Binding("0", "plot('reset_scales')", "Whole", tooltip="The whole curves again")]
    unit, log_scale, smooth = "step", False, "smooth"

    def draw(self) -> None: raise NotImplementedError

    def action_plot(self, what: str) -> None: getattr(self.query_one("#plot"), f"action_{what}")()

    def action_log_scale(self) -> None:
        self.log_scale = not self.log_scale
        self.draw()

    def action_against(self) -> None:
        from llm_trainer.runs.curves import AXES
        self.unit = _next(self.unit, AXES)
        self.draw()

    def action_smooth(self) -> None:
        from llm_trainer.runs.curves import SMOOTH
        self.smooth = _next(self.smooth, SMOOTH)
        self.draw()


class RunActions:
    """Resume, stop, save, generate and copy for `target`, the run that is chosen."""

    KEYS = [
        Binding("e", "resume", "Resume", tooltip="Go on training the chosen run, also for more epochs"),
        Binding("x", "stop", "Stop", tooltip="Save a checkpoint and end the chosen run (asks first)"),
        Binding("w", "save", "Save", tooltip="Save a checkpoint of the chosen run now"),
        Binding("g", "generate", "Generate", tooltip="Write text with the chosen run's model"),
        Binding("y", "copy", "Copy", tooltip="Copy the run's name, folder or a command")]

    @property
    def target(self) -> RunRow | None: raise NotImplementedError

    def run_action_allowed(self, action: str) -> bool | None:
        "None greys a key out: it makes no sense for the chosen run as it is"
        row = self.target
        if action in ("stop", "resume", "save", "generate", "copy") and row is None: return None
        if action == "stop": return row.live or None
        if action == "save": return row.status in ("running", "stalled") or None
        if action == "resume": return (not row.live and row.status != "unknown") or None
        if action == "generate": return row.checkpoint is not None or None
        return True

    def why_not(self, action: str) -> str:
        "What to do before a greyed key does something"
        row = self.target
        if row is None: return "There is no run to do that with."
        return {"stop": f"{row.id} is {row.word}; there is nothing to stop.",
                "save": f"{row.id} is {row.word}; only a run that trains can save.",
                "resume": f"{row.id} is {row.word}; x stops it." if row.live else f"{row.id} can't be read.",
                "generate": f"{row.id} has no checkpoint yet." + (" w saves one." if row.live else "")}.get(action, "")

    def on_key(self, event: events.Key) -> None:
        "A greyed key says why it is grey"
        found = self.active_bindings.get(event.key)
        if found is None or found.enabled: return
        if text := self.why_not(found.binding.action): self.app.notify(text, severity="warning", timeout=5)

    def _run(self, run_id: str) -> Any:
        from llm_trainer.runs.run import find_run
        return find_run(self.app.workspace.runs, run_id)

    def action_stop(self) -> None:
        from llm_trainer.tui.screens.dialogs import AskScreen
        row = self.target
        if row is None: return
        queued = row.status == "queued"
        self.app.push_screen(AskScreen(
            f"Stop {row.id}?",
            "It waits for the device and leaves the queue." if queued else
            "It finishes this step, saves a checkpoint and ends.\n"
            f"To go on later: llm-trainer resume {row.id}",
            {"no": "Keep training" if not queued else "Keep waiting", "yes": "Stop",
             **({} if queued else {"now": "Stop without saving"})}),
            lambda answer: answer in ("yes", "now") and self._stop(row.id, answer == "now"))

    @work(thread=True, group="actions")
    def _stop(self, run_id: str, now: bool) -> None:
        from llm_trainer.runs import launch
        self._try(lambda: launch.stop(self._run(run_id), now=now, timeout=0),
                  f"{run_id} was ended." if now else f"{run_id} saves and stops; its state will say so.")

    @work(thread=True, group="actions")
    def action_save(self) -> None:
        row = self.target
        if row is not None:
            self._try(lambda: self._run(row.id).request("save"), f"{row.id} will save at the end of this step.")

    def action_resume(self) -> None:
        from llm_trainer.tui.screens.resume import ResumeScreen
        if self.target: self.app.push_screen(ResumeScreen(self.target.id), lambda plan: plan and self._resume(**plan))

    @work(thread=True, group="actions")
    def _resume(self, run_id: str, **plan: Any) -> None:
        from llm_trainer.runs import launch
        run = self._try(lambda: launch.resume(self._run(run_id), self.app.workspace, **plan), f"{run_id} goes on.")
        if run is not None and run.id != run_id:
            self._tell(f"A new run, {run.id}, goes on from an older step of {run_id}.")
            self.app.call_from_thread(self.app.open_run, run.id)

    def action_generate(self) -> None:
        from llm_trainer.tui.screens.generate import GenerateScreen
        if self.target: self.app.push_screen(GenerateScreen(self.target.id))

    def action_copy(self) -> None:
        from llm_trainer.tui.screens.dialogs import CopyScreen
        if self.target: self.app.push_screen(CopyScreen(self.target, self.app.workspace))

    def _tell(self, text: str, severity: str = "information") -> None:
        self.app.call_from_thread(self.app.notify, text, severity=severity, timeout=4 if severity == "information"
                                  else 12)

    def _try(self, act: Callable[[], Any], done: str) -> Any:
        "Act in this thread; say what came of it, also when it failed"
        try: result = act()
        except (LLMTrainerError, OSError, RuntimeError) as problem: return self._tell(str(problem), "error")
        self._tell(done)
        self.wake()
        return result
