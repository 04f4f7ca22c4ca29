"""One run: its figures, its curves, what it writes, its log, its settings and its checkpoints."""
from __future__ import annotations

import re

from rich.text import Text
from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Container, Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.screen import Screen
from textual.widgets import ContentSwitcher, Input, Label, Static

from llm_trainer.runs.curves import SMOOTH, columns
from llm_trainer.runs.run import Run
from llm_trainer.events import silent
from llm_trainer.terminal import count, duration, number, size
from llm_trainer.tui.glyphs import bar, line, steps
from llm_trainer.tui.messages import RunRead
from llm_trainer.tui.readers import RunNews, RunReader, RunRow, Sample, epochs
from llm_trainer.tui.screens.actions import PlotActions, Polling, RunActions
from llm_trainer.tui.widgets.key_bar import KeyBar
from llm_trainer.tui.widgets.lines import Lines, flow
from llm_trainer.tui.widgets.log import Log
from llm_trainer.tui.widgets.plot import Curve, Plot
from llm_trainer.tui.widgets.table import Column, Table
from llm_trainer.tui.widgets.tab_line import TabLine
from llm_trainer.tui.widgets.top_bar import TopBar
from llm_trainer.tui.widgets.trend import Trend

TABS = {"loss": "Loss", "rates": "Rates", "samples": "Samples", "log": "Log", "config": "Config",
        "checkpoints": "Checkpoints"}
TRENDS = {"lr": ("learning rate", lambda v: "–" if v is None else f"{v:.2g}"),
          "grad_norm": ("gradient norm", lambda v: number(v, 2)),
          "tokens_per_second": ("tokens/s", count), "memory_bytes": ("memory", size)}
GROUNDED = ("tokens_per_second", "memory_bytes")  # drawn from zero, so that noise looks like noise
MOST_SAMPLES = 200
STAMP = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ")

CHECKPOINT_COLUMNS = [
    Column("step", "step", 9, lambda c, w: [(steps(c.step), "strong")], 0, True),
    Column("pins", "kept as", 14, lambda c, w: [("★ " if "best" in c.pins else "  ", "warning"),
                                                (" ".join(c.pins), "")], 1),
    Column("val", "val loss", 8, lambda c, w: [(number(c.val_loss, 4), "")], 2, True),
    Column("size", "size", 8, lambda c, w: [(size(c.bytes), "")], 4, True),
    Column("saved", "saved", 5, lambda c, w: [(c.saved, "dim")], 5, True),
    Column("verified", "verified", 23, lambda c, w: [(f"✓ {c.verified} ago" if c.verified not in ("", "now")
                                                      else "✓ now", "success")
                                                     if c.verified else ("not since it was written", "dim")], 3,
           grow=20)]


def _colour(text: str) -> str:
    "The colour of a line of the log"
    low = text.lower()
    if any(word in low for word in ("error", "traceback", "failed")): return "red"
    return "yellow" if "warning" in low else ""


class RunScreen(Polling, RunActions, PlotActions, Screen[None]):
    """The run that was opened; digits choose what the lower part shows."""

    BINDINGS = [
        Binding("escape,backspace", "leave", "Back", key_display="esc", tooltip="Back to all runs"),
        *(Binding(str(i + 1), f"tab('{name}')", title, show=True, tooltip=f"Show: {title.lower()}",
                  group=Binding.Group("1-6 Parts")) for i, (name, title) in enumerate(TABS.items())),
        *PlotActions.KEYS, *PlotActions.VIEW_KEYS,
        Binding("slash", "find", "Find", key_display="/", tooltip="Show only the log's lines that hold a word",
                priority=True),
        *RunActions.KEYS,
        Binding("v", "verify", "Verify", tooltip="Read all checkpoints again and compare their checksums"),
        Binding("r", "reread", "Reread", tooltip="Read the files again now")]

    def __init__(self, row: RunRow):
        super().__init__()
        self.run_id, self.row = row.id, row
        self.tab = "loss"
        self.samples: list[Sample] = []
        self.gone, self.drawn = False, None

    def compose(self) -> ComposeResult:
        yield TopBar()
        yield Lines(id="figures")
        yield TabLine(TABS)
        with ContentSwitcher(initial="loss", id="parts"):
            with Vertical(id="loss"):
                yield Plot(id="plot")
                with Container(id="small-trends"):
                    for name, (title, show) in TRENDS.items():
                        yield Trend(title, show, name in GROUNDED, id=f"small-{name}")
            with Container(id="rates"):
                for name, (title, show) in TRENDS.items():
                    yield Trend(title, show, name in GROUNDED, id=f"trend-{name}")
            with VerticalScroll(id="samples"): yield Static(id="sample-text", markup=False)
            with Vertical(id="log-part"):
                yield Log(id="log")
                with Horizontal(id="find-line"):
                    yield Label("find")
                    yield Input(id="find", placeholder="a word; only lines with it are shown, esc shows all",
                                compact=True)
            with VerticalScroll(id="config"): yield Static(id="config-text", markup=False)
            yield Table(CHECKPOINT_COLUMNS, lambda row: row.step, id="checkpoints",
                        empty="No checkpoint yet: w saves one now.")
        yield KeyBar()

    def on_mount(self) -> None:
        self.reader = RunReader(Run(self.app.workspace.runs / self.run_id), self.app.workspace, self.app.clock)
        self.plot.show([], empty=self._no_loss())
        self._figures()
        self.query_one(TopBar).show(["llm_trainer", line(self.run_id, 40)], [])
        self.action_tab("loss")
        self.start_polling()

    @property
    def plot(self) -> Plot: return self.query_one("#plot", Plot)

    @property
    def target(self) -> RunRow | None: return None if self.gone else self.row

    def poll(self) -> RunRead: return RunRead(self.reader.poll())

    def on_run_read(self, message: RunRead) -> None:
        self.polled()
        news = message.news
        if news.gone: return self._gone(news.row)
        self.gone = False
        before, self.row = self.row, news.row
        if before != self.row: self._figures()
        if (before.status, before.checkpoint) != (self.row.status, self.row.checkpoint): self.refresh_bindings()
        self.draw()
        if news.samples: self._samples(news.samples)
        if news.log: self._log(news.log)
        table = self.query_one("#checkpoints", Table)
        if list(news.checkpoints) != table.rows: self._checkpoints(news)

    def _gone(self, known: RunRow) -> None:
        if self.gone: return
        self.gone, self.row = True, known
        self._figures()
        self.app.notify(f"The folder of {self.run_id} is gone. What was read of it stays on this screen.",
                        severity="warning", title="Run deleted", timeout=12)
        self.query_one(TopBar).show(["llm_trainer", self.run_id], ["deleted"])
        self.refresh_bindings()

    def _figures(self) -> None:
        row, width = self.row, max(20, self.size.width - 2)
        facts = [row.dataset, row.device_name or row.device, f"{count(row.parameters)} parameters" if row.parameters
                 else "", f"attempt {row.attempt}" if (row.attempt or 0) > 1 else "", row.note]
        self.query_one(TopBar).show(["llm_trainer", self.run_id], [fact for fact in facts if fact])
        share = "" if row.fraction is None else f"{row.fraction * 100:3.0f}%"
        left = Content.assemble((f"{row.sign} {row.word:<12}", f"bold ${row.color}"))
        ahead = [("step", f"{steps(row.step)}/{steps(row.steps)}"), ("epoch", epochs(row)),
                 ("ETA", duration(row.eta)) if row.live else ("took", duration(row.elapsed))]
        moved = []
        while len(ahead) > 1 and left.cell_length + 13 + sum(len(name) + len(value) + 4 for name,
                                                             value in ahead) > width:
            moved.append(ahead.pop(0))
        right = Content("   ").join([Content(f" {share}"), *(Content.assemble((f"{name} ", "$foreground 60%"), (
            value, "bold" if name == "ETA" else "")) for name, value in ahead)])
        done, rest = bar(row.fraction, max(4, width - left.cell_length - right.cell_length))
        first = Content.assemble(left, (done, f"${row.color}"), (rest, "$panel-lighten-2"), right)
        pairs = [("loss", number(row.loss, 4)), ("val", number(row.val_loss, 4)), ("best", number(row.best, 4)), *moved,
                 ("speed", f"{count(row.rate)} tok/s" if row.rate else "–"), ("memory", size(row.memory)),
                 ("saved at", steps(row.checkpoint))]
        if row.live: pairs.append(("for", duration(row.elapsed)))
        if row.pid and row.live: pairs.append(("pid", str(row.pid)))
        second, used = [], 0
        for name, value in pairs:
            if used + len(name) + len(value) + 1 > width: break
            used += len(name) + len(value) + 4
            second.append(Content.assemble((f"{name} ", "$foreground 60%"),
                                           (value, "bold" if name in ("loss", "val") else "")))
        text = [first, Content("   ").join(second)]
        if row.devices: text += flow([Content.assemble(("devices ", "$foreground 60%"), row.devices),
                                      *([Content(row.slowest)] if row.slowest else [])], width)
        if row.reason and row.status != "stopped":
            text.append(Content.assemble((f"{row.code}: " if row.code else "", f"bold ${row.color}"), row.reason))
            text.append(Content.assemble(("→ ", "$foreground 60%"), (row.command, "bold")))
        elif row.doing: text.append(Content.styled(row.doing, "$foreground 60%"))
        elif row.status in ("crashed", "stalled", "stopped"):
            text.append(Content.styled({"crashed": "Its process is gone; everything saved is safe. Press e to go on.",
                                        "stalled": "Alive, but silent for a while: its log (4) may say why.",
                                        "stopped": "It ended on request. Press e to go on."}[row.status],
                                       "$foreground 60%"))
        self.query_one("#figures", Lines).show(Content("\n").join(text))

    def on_resize(self) -> None:
        self.set_class(self.size.height >= 32, "-tall")
        self._figures()
        self.call_after_refresh(self.draw, True)

    def draw(self, again: bool = False) -> None:
        "Draw the curves when there are new points or another wish"
        curves = self.reader.curves
        wish = (curves.version, self.unit, self.log_scale, self.smooth, self.tab, self._no_loss())
        if wish == self.drawn and not again: return
        self.drawn = wish
        if self.tab == "loss":
            x, y = curves.arrays("train", self.unit, "loss")
            vx, vy = curves.arrays("val", self.unit, "loss")
            reach = SMOOTH[self.smooth]
            shown = [Curve("raw" if reach else "train", x, y, "curve--raw" if reach else "curve--train", "raw")]
            shown.append(Curve("validation", vx, vy, "curve--val", "points"))
            if reach: shown.append(Curve(f"train, mean of {reach:.1%}", x, y, "curve--train", smooth=reach))
            self.plot.show(shown, unit=self.unit, log_scale=self.log_scale, empty=self._no_loss())
        self._trends("trend" if self.tab == "rates" else "small" if self.tab == "loss" else "")

    def _no_loss(self) -> str:
        if self.row.status == "queued": return "It waits for the device; the curve starts with the first steps."
        return f"No loss yet: {self.row.word}." if self.row.live else "It ended before the first loss was written."

    def _trends(self, where: str) -> None:
        if not where: return
        curves = self.reader.curves
        for name in TRENDS:
            trend = self.query_one(f"#{where}-{name}", Trend)
            if not trend.size.width or not trend.is_on_screen: continue
            x, y = curves.arrays("train", "step", name)
            reduced = columns(x, y, x[0], x[-1], 2 * trend.size.width) if len(x) > 1 else None
            values = list(reduced.mean) if reduced is not None else []
            if values and y[-1] == y[-1]: values[-1] = float(y[-1])
            trend.show(values)

    def _samples(self, new: list[Sample]) -> None:
        self.samples = (self.samples + new)[-MOST_SAMPLES:]
        blocks = [Content.assemble((f"step {sample.step:,}\n", "bold $primary"),
                                   (sample.prompt, "bold $foreground 60%"), sample.text)
                  for sample in reversed(self.samples)]
        self.query_one("#sample-text", Static).update(Content("\n\n").join(blocks))

    def _log(self, lines: list[str]) -> None:
        shown = []
        for text in lines[-5000:]:
            stamp, text = (text[11:20], text[20:]) if STAMP.match(text) else ("", text)
            shown.append(Text.assemble((stamp, "bright_black"), (text or " ", _colour(text))))
        self.query_one("#log", Log).add(shown)

    def _checkpoints(self, news: RunNews) -> None:
        self.query_one("#checkpoints", Table).show(news.checkpoints)
        self.refresh_bindings()

    @work(thread=True, exclusive=True, group="config")
    def _config(self) -> None:
        "Settings in force and what differs from the defaults; pydantic is loaded here, in a thread"
        from llm_trainer.config import all_settings
        flat, known = self.reader.run.settings(), all_settings()
        def show(value):
            return "none" if value is None else line(str(value).lower() if isinstance(value, bool) else value, 60)
        differ = [(line(name, 24), show(value), show(known[name].default)) for name, value in flat.items()
                  if name in known and value != known[name].default and known[name].default is not None]
        rest = [(line(name, 24), show(value)) for name, value in flat.items()]
        text = [Content.styled("Differs from the defaults", "bold $primary")]
        text += [Content.assemble(f"  {name:<20}", (f"{value:<27} ", "bold"), (f"default {default}", "$foreground 60%"))
                 for name, value, default in differ] or [Content.styled("  nothing", "$foreground 60%")]
        text.append(Content.styled("\nEverything", "bold $primary"))
        half = (len(rest) + 1) // 2
        for i in range(half):
            pair = [rest[i], *rest[i + half:i + half + 1]]
            text.append(Content.assemble(*(part for name, value in pair for part in (
                (f"  {name:<20}", "$foreground 60%"), f"{line(value, 17):<17}"))))
        self.app.call_from_thread(self.query_one("#config-text", Static).update, Content("\n").join(text))

    def action_tab(self, name: str) -> None:
        self.tab = name
        self.query_one("#parts", ContentSwitcher).current = "log-part" if name == "log" else name
        self.query_one(TabLine).current = name
        part = self.plot if name == "loss" else self.query_one(f"#{name}")
        if part.can_focus: part.focus()
        else: self.set_focus(None)
        if name == "config": self._config()
        if name == "log": self.call_after_refresh(part.scroll_end, animate=False, x_axis=False)
        if name == "samples" and not self.samples:
            every = self.reader.run.settings().get("sample_every")
            self.query_one("#sample-text", Static).update(Content.styled(
                f"No sample yet; one is written every {line(every, 12)} steps." if every else
                "No sample. A run writes them while it trains when sample_every is set.", "$foreground 60%"))
        self.refresh_bindings()
        self.call_after_refresh(self.draw, True)

    @on(TabLine.Chosen)
    def _tab_chosen(self, message: TabLine.Chosen) -> None: self.action_tab(message.name)

    def check_action(self, action: str, parameters: tuple) -> bool | None:
        if action in ("log_scale", "against", "smooth", "plot"): return self.tab == "loss"
        if action == "find": return self.tab == "log" and self.focused is not self.query_one("#find")
        if action == "verify": return self.tab == "checkpoints" and bool(self.query_one("#checkpoints", Table).rows)
        return self.run_action_allowed(action)

    def action_leave(self) -> None:
        if self.query_one("#find-line").has_class("-open"): self._close_find()
        else: self.dismiss()

    def action_find(self) -> None:
        self.query_one("#find-line").add_class("-open")
        self.set_focus(self.query_one("#find", Input))

    @on(Input.Changed, "#find")
    def _find(self, message: Input.Changed) -> None:
        log = self.query_one("#log", Log)
        found = log.find(message.value)
        self.query_one(TopBar).show(["llm_trainer", self.run_id], [f"{found} of {len(log.texts)} lines"])

    @on(Input.Submitted, "#find")
    def _found(self) -> None: self.set_focus(self.query_one("#log"))

    def _close_find(self) -> None:
        self.query_one("#find", Input).value = ""
        self.query_one("#find-line").remove_class("-open")
        self._figures()
        self.set_focus(self.query_one("#log"))

    @work(thread=True, exclusive=True, group="verify")
    def action_verify(self) -> None:
        from llm_trainer.training.checkpoint import Checkpoints
        store = Checkpoints(self.app.workspace.checkpoints / self.run_id, self.run_id, emit=silent)
        self._tell("Reading every checkpoint again …")
        try: found = store.verify()
        except Exception as problem: return self._tell(str(problem), "error")
        bad = {step: problems for step, problems in found.items() if problems}
        if not bad: return self._tell(f"{len(found)} checkpoint{'s' * (len(found) != 1)} whole: every checksum agrees.")
        self._tell("; ".join(f"step {step}: {problems[0]}" for step, problems in bad.items()), "error")

    def action_reread(self) -> None: self.wake()
