"""The first screen: every run of the workspace, the chosen one in detail, and what can be done with it."""
from __future__ import annotations

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Horizontal
from textual.content import Content
from textual.screen import Screen
from textual.widgets import Input, Label, Static

from llm_trainer.terminal import count, duration, number
from llm_trainer.runs.state import LIVE
from llm_trainer.tui.glyphs import bar, braille, line, name, steps
from llm_trainer.tui.messages import RunsRead
from llm_trainer.tui.readers import Overview, RunRow, epochs
from llm_trainer.tui.screens.actions import Polling, RunActions
from llm_trainer.tui.widgets.key_bar import KeyBar
from llm_trainer.tui.widgets.lines import Lines, flow
from llm_trainer.tui.widgets.table import Column, Table
from llm_trainer.tui.widgets.top_bar import TopBar

SORTS = {"age": "newest first", "state": "live first", "val": "best validation first", "loss": "lowest loss first",
         "progress": "furthest first", "run": "by name"}
NEVER = float("inf")
ORDER = list(LIVE) + ["stopped", "crashed", "failed", "diverged", "completed", "unknown"]
BY = {"age": lambda row: -row.created, "state": lambda row: ORDER.index(row.status),
      "val": lambda row: row.best if row.best is not None else NEVER,
      "loss": lambda row: row.loss if row.loss is not None else NEVER,
      "progress": lambda row: -(row.fraction or 0.0), "run": lambda row: row.id}


def progress(row: RunRow, width: int) -> list[tuple[str, str]]:
    "A bar and a percentage"
    done, rest = bar(row.fraction, width - 5)
    share = "    –" if row.fraction is None else f" {row.fraction * 100:3.0f}%"
    return [(done, row.color if row.live else "dim"), (rest, "dim"), (share, "")]


COLUMNS = [
    Column("run", "run", 16, lambda r, w: [(name(r.id, w), "strong")], 0, grow=12),
    Column("state", "state", 13, lambda r, w: [(f"{r.sign} ", r.color), (r.word, r.color)], 0),
    Column("progress", "progress", 11, progress, 3, grow=8),
    Column("step", "step", 15, lambda r, w: [(f"{steps(r.step)}/{steps(r.steps)}" if r.steps else steps(r.step), "")],
           7, True),
    Column("epoch", "epoch", 8, lambda r, w: [(epochs(r), "")], 9, True),
    Column("loss", "loss", 6, lambda r, w: [(number(r.loss, 3), "strong")], 1, True),
    Column("val", "val", 6, lambda r, w: [(number(r.val_loss, 3), "")], 2, True),
    Column("best", "best", 6, lambda r, w: [(number(r.best, 3), "")], 8, True),
    Column("rate", "tok/s", 6, lambda r, w: [(count(r.rate), "")], 6, True),
    Column("eta", "ETA", 6, lambda r, w: [(duration(r.eta) if r.eta is not None else "–", "strong" if r.live
                                           else "dim")],
           1, True),
    Column("device", "on", 5, lambda r, w: [(line(r.device, w), "dim")], 10),
    Column("age", "age", 4, lambda r, w: [(r.age, "dim")], 5, True),
    Column("curve", "curve", 8, lambda r, w: [(braille(r.history, w)[0], r.color if r.live else "primary")], 4),
]


class RunsScreen(Polling, RunActions, Screen[None]):
    """Every run; arrows choose one, enter opens it."""

    BINDINGS = [
        Binding("enter", "open", "Open", key_display="⏎", tooltip="Show the chosen run"),
        Binding("space", "mark", "Mark", key_display="␣", tooltip="Mark the chosen run for comparison"),
        Binding("c", "compare", "Compare", tooltip="Curves and settings of the marked runs side by side"),
        Binding("slash", "filter", "Filter", key_display="/", tooltip="Show only runs whose line holds a word",
                priority=True),  # or what is typed right behind it would act on the runs
        Binding("s", "sort", "Sort", tooltip="Change the order of the runs"),
        Binding("n", "start", "New", tooltip="Start a run from a profile"),
        *RunActions.KEYS,
        Binding("r", "reread", "Reread", tooltip="Read the folder again now"),
        Binding("escape", "clear", "Clear filter and marks", show=False, tooltip="Clear the filter and the marks")]
    AUTO_FOCUS = "#runs"

    def compose(self) -> ComposeResult:
        yield TopBar()
        yield Table(COLUMNS, lambda row: row.id, id="runs", empty="")
        yield Static(id="welcome", markup=False)
        yield Lines(id="detail")
        with Horizontal(id="filter-line"):
            yield Label("filter")
            yield Input(id="filter", placeholder="part of a name, state, dataset or note", compact=True)
        yield KeyBar()

    def on_mount(self) -> None:
        self.rows: list[RunRow] = []
        self.problem, self.sort, self.acts_on = "", "age", None
        self.overview = Overview(self.app.workspace, self.app.clock)
        self.table.sorted_by = self.sort
        self.query_one("#filter-line").display = False
        self.show()
        self.start_polling()

    @property
    def table(self) -> Table: return self.query_one("#runs", Table)

    @property
    def target(self) -> RunRow | None: return self.table.row

    def poll(self) -> RunsRead:
        try: return RunsRead(self.overview.poll())
        except OSError as problem: return RunsRead([], f"The folder of runs can't be read: {problem}")

    def on_runs_read(self, message: RunsRead) -> None:
        self.polled()
        if message.problem and message.problem != self.problem:
            self.app.notify(message.problem, severity="error", timeout=10)
        first = not self.rows and not self.problem
        self.rows, self.problem = message.rows, message.problem
        self.show()
        if first: self.refresh_bindings()

    def show(self) -> None:
        "Hand the rows that pass the filter, in order, to the table"
        wanted = self.query_one("#filter", Input).value.lower().split()
        def text(row): return f"{row.id} {row.status} {row.word} {row.dataset} {row.device} {row.note}".lower()
        rows = [row for row in self.rows if all(word in text(row) for word in wanted)]
        rows.sort(key=BY[self.sort])
        table, empty = self.table, not self.rows
        had = table.row
        table.show(rows)
        table.display, self.query_one("#welcome").display = not empty, empty
        if empty: self._welcome()
        if table.row != had or empty or not rows: self._detail()
        live = sum(row.live for row in self.rows)
        shown = f"{len(rows)} of {len(self.rows)}" if wanted else f"{len(self.rows)}"
        parts = [f"{shown} run{'s' * (len(self.rows) != 1)}", f"{live} live" if live else "none live", SORTS[self.sort]]
        if table.marked: parts.insert(0, f"{len(table.marked)} marked")
        self.query_one(TopBar).show(["llm_trainer"], parts)

    def _welcome(self) -> None:
        if self.problem: text = Content.assemble((f"{line(self.problem, 300)}\n\n", "$error"), "Press r to try again.")
        else: text = Content.assemble(
            ("No run yet.\n\n", "bold"), "Press ", ("n", "bold $primary"),
            " to start one here, or type in a shell:\n\n",
            ("    llm-trainer train --config quickstart --background\n\n", "$success"),
            "It trains a small model on Python's own documentation in about three minutes, and appears here by itself.")
        self.query_one("#welcome", Static).update(text)

    @on(Table.Moved)
    def _detail(self) -> None:
        "The chosen run, with the figures that have no column at this width"
        row, box = self.table.row, self.query_one("#detail", Lines)
        mark = (row.status, row.checkpoint) if row else None
        if mark != self.acts_on:
            self.acts_on = mark
            self.refresh_bindings()
        if row is None:
            wanted = self.query_one("#filter", Input).value
            box.show(Content(f"No run matches “{line(wanted, 40)}”. Escape clears the filter." if wanted and self.rows
                             else ""))
            return
        facts = [("step", f"{steps(row.step)}/{steps(row.steps)}" if row.steps else steps(row.step)),
                 ("epoch", epochs(row)),
                 ("best", number(row.best, 3)), ("speed", f"{count(row.rate)} tok/s" if row.rate else "–"),
                 ("saved at", steps(row.checkpoint)), ("for", duration(row.elapsed))]
        if row.dataset: facts.append(("on", f"{row.dataset}, {row.device or '–'}"))
        text = [Content.assemble((f"{row.sign} {row.word} ", f"${row.color}"), (row.id, "bold"),
                                 (f"  {row.note}" if row.note else "", "italic $foreground 60%")),
                *flow((Content.assemble((f"{name} ", "$foreground 60%"), value) for name, value in facts),
                      self.size.width - 2)]
        if row.reason: text.append(Content.assemble((f"{row.code}: " if row.code else "", "$error"), row.reason))
        else: text.append(Content.assemble(("shell  ", "$foreground 60%"), row.command))
        box.show(Content("\n").join(text))

    def check_action(self, action: str, parameters: tuple) -> bool | None:
        if action == "compare": return True if len(self.table.marked) > 1 else None
        if action == "filter": return self.focused is not self.query_one("#filter")
        if action in ("open", "mark"): return True if self.table.rows else None
        return self.run_action_allowed(action)

    def why_not(self, action: str) -> str:
        if action == "compare": return "Mark two runs or more with the space bar; c then compares them."
        return super().why_not(action)

    def action_open(self) -> None:
        if self.target: self.app.open_run(self.target.id)

    @on(Table.Chosen)
    def _chosen(self) -> None: self.action_open()

    def action_mark(self) -> None:
        self.table.toggle_mark()
        self.show()
        self.refresh_bindings()

    def action_compare(self) -> None:
        from llm_trainer.tui.screens.compare import CompareScreen
        marked = [row.id for row in self.rows if row.id in self.table.marked]
        if len(marked) > 1: self.app.push_screen(CompareScreen(marked[:8]))
        if len(marked) > 8: self.app.notify("Eight curves fit one plot; the newest eight marked runs are shown.")

    def action_sort(self) -> None:
        names = list(SORTS)
        self._sort_by(names[(names.index(self.sort) + 1) % len(names)])

    @on(Table.TitleClicked)
    def _title(self, message: Table.TitleClicked) -> None:
        self._sort_by({"best": "val"}.get(message.key, message.key))

    def _sort_by(self, key: str) -> None:
        if key not in SORTS: return
        self.sort = self.table.sorted_by = key
        self.show()

    def on_resize(self) -> None:
        self.set_class(self.size.height < 16, "-low")
        self._detail()

    def action_filter(self) -> None:
        self.query_one("#filter-line").display = True
        self.set_focus(self.query_one("#filter", Input))

    @on(Input.Changed, "#filter")
    def _filter(self) -> None:
        self.table.cursor = 0
        self.show()

    @on(Input.Submitted, "#filter")
    def _filtered(self) -> None:
        self.table.focus()
        if not self.query_one("#filter", Input).value: self.query_one("#filter-line").display = False

    def action_clear(self) -> None:
        box, line = self.query_one("#filter", Input), self.query_one("#filter-line")
        if not line.display: self.table.unmark()
        box.value, line.display = "", False
        self.table.focus()
        self.show()

    def action_start(self) -> None:
        from llm_trainer.tui.screens.start import StartScreen
        self.app.push_screen(StartScreen(), lambda run_id: run_id and self.app.open_run(run_id))

    def action_reread(self) -> None: self.wake()
