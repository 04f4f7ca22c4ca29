"""Marked runs side by side: their curves on one plot, their final figures, and the settings in which they differ."""
from __future__ import annotations

from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import VerticalScroll
from textual.content import Content
from textual.screen import Screen

from llm_trainer.runs.compare import different, same_tokens
from llm_trainer.runs.curves import SMOOTH, Curves
from llm_trainer.runs.run import Run
from llm_trainer.terminal import count, duration, number
from llm_trainer.tui.glyphs import line, name as named, steps
from llm_trainer.tui.messages import CurvesRead
from llm_trainer.tui.readers import RunRow, row_of
from llm_trainer.tui.screens.actions import PlotActions, Polling
from llm_trainer.tui.widgets.key_bar import KeyBar
from llm_trainer.tui.widgets.lines import Lines
from llm_trainer.tui.widgets.plot import Curve, Plot
from llm_trainer.tui.widgets.top_bar import TopBar

LETTERS = "ABCDEFGH"
COLORS = ["$primary", "$warning", "$success", "$accent", "$error", "$secondary", "$foreground",
          "$foreground 50%"]  # as curve--0 …
FIGURES = {  # width and text of each figure; the last ones leave first where the terminal is narrow
    "loss": (8, lambda row, curves: number(row.loss, 4)), "val": (8, lambda row, curves: number(row.val_loss, 4)),
    "best": (8, lambda row, curves: number(row.best, 4)), "step": (8, lambda row, curves: steps(row.step)),
    "bits/byte": (11, lambda row, curves: number(curves.val.last("bits_per_byte"), 3)),
    "time": (8, lambda row, curves: duration(row.elapsed)), "tok/s": (8, lambda row, curves: count(row.rate))}


class CompareScreen(Polling, PlotActions, Screen[None]):
    """The curves of the marked runs; letters name them where colours can't."""

    BINDINGS = [
        Binding("escape,backspace", "leave", "Back", key_display="esc", tooltip="Back to all runs"),
        *PlotActions.KEYS,
        Binding("b", "per_byte", "Bits/byte", tooltip="Bits per byte, which can be compared between tokenizers, or "
                                                      "nats per token"),
        Binding("t", "which", "Train/val", tooltip="Training curves, validation curves or both"),
        *PlotActions.VIEW_KEYS,
        Binding("down,j", "tables(1)", "Down", show=False), Binding("up,k", "tables(-1)", "Up", show=False),
        Binding("r", "reread", "Reread", tooltip="Read the files again now")]

    def __init__(self, run_ids: list[str]):
        super().__init__()
        self.run_ids = run_ids
        self.which = "both"
        self.rows: list[RunRow] = []
        self.drawn = None

    def compose(self) -> ComposeResult:
        yield TopBar()
        yield Plot(id="plot")
        with VerticalScroll(id="tables", can_focus=False): yield Lines(id="compared")
        yield KeyBar()

    def on_mount(self) -> None:
        runs = [Run(self.app.workspace.runs / run_id) for run_id in self.run_ids]
        self.followed = [(run, Curves(run)) for run in runs]
        self.different, self.mixed = different(runs), not same_tokens(runs)
        self.per_byte = self.mixed
        self.query_one(Plot).focus()
        self.start_polling()

    def poll(self) -> CurvesRead:
        for _, curves in self.followed: curves.poll()
        now = self.app.clock()
        return CurvesRead([row_of(run, now) for run, _ in self.followed])

    def on_curves_read(self, message: CurvesRead) -> None:
        self.polled()
        if message.rows != self.rows:
            self.rows = message.rows
            self.query_one("#compared", Lines).show(self._tables())
        self.draw()

    def draw(self) -> None:
        wish = (self.unit, self.log_scale, self.smooth, self.which, self.per_byte,
                *(curves.version for _, curves in self.followed))
        if wish == self.drawn: return
        self.drawn, shown = wish, []
        for i, (run, curves) in enumerate(self.followed):
            name, style = named(run.id, 18), f"curve--{i}"
            both = self.which == "both"
            if self.which != "validation":
                x, y = curves.losses("train", self.unit, self.per_byte)
                shown.append(Curve(name, x, y, style, smooth=SMOOTH[self.smooth], tag=LETTERS[i]))
            if self.which != "training":
                x, y = curves.losses("val", self.unit, self.per_byte)
                shown.append(Curve("" if both and len(curves.train) else name, x, y, style,
                                   "marks" if both else "points", tag="•" if both else LETTERS[i]))
        self.query_one(TopBar).show(["llm_trainer", "compare"], self._said())
        self.query_one(Plot).show(shown, unit=self.unit, log_scale=self.log_scale,
                                  empty="None of these runs has a loss yet.")

    def _said(self) -> list[str]:
        "What is drawn, and whether it may be compared"
        warning = ["their tokenizers differ: b draws bits per byte"] if self.mixed and not self.per_byte else []
        return [*warning, "bits per byte" if self.per_byte else "nats per token", f"{len(self.run_ids)} runs"]

    def action_per_byte(self) -> None:
        self.per_byte = not self.per_byte
        self.draw()

    def _tables(self) -> Content:
        width = min(28, max(len(row.id) for row in self.rows))
        shown = dict(FIGURES)
        while len(shown) > 3 and width + 17 + sum(size for size, _ in shown.values()) > self.size.width - 3:
            shown.popitem()
        head = f"  {'final figures':<{width + 15}}" + "".join(f"{title:>{size}}" for title, (size, _) in shown.items())
        text = [Content.styled(head, "$foreground 60%")]
        for i, (row, (_, curves)) in enumerate(zip(self.rows, self.followed)):
            cells = "".join(f"{show(row, curves):>{size}}" for size, show in shown.values())
            text.append(Content.assemble((f"{LETTERS[i]} ", f"bold {COLORS[i]}"), f"{named(row.id, width):<{width}}",
                                         (f"  {row.sign} {row.word:<11}", f"${row.color}"), cells))
        return Content("\n").join([*text, Content(""), *self._differences()])

    def _differences(self) -> list[Content]:
        if not self.different: return [Content.styled("No setting differs.", "$foreground 60%")]
        many = len(self.followed)
        width = max(10, min(24, (self.size.width - 24) // many))
        text = [Content.assemble(("Settings that differ".ljust(22), "bold $primary"),
                                 *((f"{LETTERS[i]:<{width}}", f"bold {COLORS[i]}") for i in range(many)))]
        for name, values in self.different.items():
            text.append(Content.assemble((f"{line(name, 20):<22}", "$foreground 60%"),
                                         *(f"{line('–' if value is None else value, width - 1):<{width}}"
                                           for value in values)))
        return text

    def on_resize(self) -> None:
        if self.rows: self.query_one("#compared", Lines).show(self._tables())

    def action_leave(self) -> None: self.dismiss()

    def action_tables(self, by: int) -> None: self.query_one("#tables").scroll_relative(y=by, animate=False)

    def action_which(self) -> None:
        self.which = {"both": "training", "training": "validation", "validation": "both"}[self.which]
        self.draw()

    def action_reread(self) -> None: self.wake()
