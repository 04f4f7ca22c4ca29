"""The view in a notebook, without a browser: what it reads, what it shows, what it survives."""
import json
import math
import re
import shutil
import sys
import time
from html.parser import HTMLParser

import numpy as np
import pytest

pytest.importorskip("ipywidgets", reason="the live view needs: pip install 'llm_trainer[notebook]'")

from llm_trainer import workspace
from llm_trainer.runs import launch
from llm_trainer.notebook import headline, picture, png, quote, safe, watch
from llm_trainer.runs.curves import Curves, smooth, thin
from llm_trainer.runs.state import ENDED, State
from llm_trainer.notebook.buttons import Actions
from llm_trainer.system import locks
from llm_trainer.system.files import encode, replace_file
from llm_trainer.runs.run import create_run, find_run

HOSTILE = ["<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "</pre><svg/onload=alert(1)>",
           "\"><a href='javascript:alert(1)'>x",
           "<style>*{display:none}</style>", "\x1b]0;title\x07\x1b[2J", "\u202ereversed", "&lt;b&gt;", "<!--", "]]>",
           "\ud800", "$\\href{javascript:1}{x}$"]


@pytest.fixture
def runs(tmp_path): return tmp_path / "runs"


def write(runs, name, steps=50, status="completed", text="a list", new=True, first=1):
    "A run folder with `steps` training rows, validations and a sample"
    run = create_run(runs, {}, name=name) if new else find_run(runs, name)
    state = dict(status=status, step=first + steps - 1, steps=100, epoch=1., epochs=2, loss=2.1, val_loss=2.3,
                 attempt=1, run_id=name, created_at=run.meta["created_at"])
    replace_file(run.folder / "state.json", encode(state))  # whole and before the rest, or a view may look in between
    (run.folder / "samples.jsonl").write_bytes(encode(dict(step=10, prompt="The ", text=text)))
    with open(run.folder / "metrics.jsonl", "ab") as file:
        for i in range(first, first + steps):
            row = dict(attempt=1, step=i, epoch=i / 50, tokens=i * 100, time=1e9 + i)
            file.write(encode(dict(row, kind="train", loss=2 + math.exp(-i / 9))))
            if i % 10 == 0: file.write(encode(dict(row, kind="val", loss=2.2 + math.exp(-i / 9))))
    return run


@pytest.fixture
def view():
    "A `watch` whose thread is gone when the test ends"
    views = []
    def open_view(*args, **kw):
        views.append(watch(*args, **kw))
        return views[-1]
    yield open_view
    for v in views:
        v.close()
        v.again.thread.join(60)


class Elements(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs): self.found.append((tag, dict(attrs)))


def test_watch_shows_the_newest_run_and_returns_at_once(runs, view):
    write(runs, "older")
    write(runs, "newer")
    v = view(runs=runs)
    assert v.controls.run.value == "newer" and "completed" in v.panel.head.value and "a list" in v.panel.samples.value
    assert len(v.chart.lines["training"]["x"]) == 50
    assert v.controls.compare.options == ("older",) and v.controls.compare.layout.display == "flex"


def test_the_chart_takes_the_width_of_its_cell_and_nothing_from_the_network(runs, view):
    write(runs, "only-one")
    v = view(runs=runs)
    code = re.sub(r"(?m)^ *//.*$", "", v.chart._esm)
    assert v.chart.layout.width is None and "width: 100%" in code and "//" not in code
    assert v.controls.compare.layout.display == "none"


def test_it_follows_what_is_written_without_piling_up(runs, view):
    write(runs, "growing", steps=20)
    v = view("growing", runs)
    write(runs, "growing", steps=30, new=False, first=21)
    v.look()
    assert list(v.chart.lines) == ["training", "validation", "best"]
    assert list(v.chart.lines["training"]["x"]) == list(range(1, 51))


def test_controls_change_the_chart(runs, view):
    write(runs, "one-run")
    write(runs, "two-run")
    v = view("one-run", runs)
    c = v.controls
    c.smoothing.value, c.log.value, c.x.value, c.compare.value = .05, True, "time", ["two-run"]
    v.look()
    assert v.chart.content["log"] and "minutes" in v.chart.content["across"] and len(v.chart.lines) == 8
    assert v.chart.lines["one-run training, raw"]["style"] == "raw"
    assert max(v.chart.lines["one-run training, mean of 5.0%"]["x"]) == pytest.approx(49 / 60, rel=.05)


def test_it_opens_before_the_first_run_and_finds_it(runs, view):
    v = view(runs=runs)
    assert "no run yet" in v.panel.head.value
    write(runs, "first-run")
    v._refresh_runs()
    v.look()
    assert v.controls.run.value == "first-run" and len(v.chart.lines["training"]["x"]) == 50


def test_it_survives_deletion_and_damage(runs, view):
    run = write(runs, "doomed")
    v = view("doomed", runs)
    (run.folder / "state.json").write_bytes(b"\xff{")
    (run.folder / "metrics.jsonl").open("ab").write(b'{"kind": "train", "step": 51, "lo')
    v.look()
    shutil.rmtree(run.folder)
    v.look()
    assert "deleted" in v.panel.head.value and len(v.chart.lines["training"]["x"]) == 50
    assert v.buttons.stop.disabled and v.buttons.resume.disabled
    assert v.again.thread.is_alive()


def test_a_page_loaded_again_gets_what_is_drawn(runs, view):
    write(runs, "growing", steps=20)
    v = view("growing", runs)
    write(runs, "growing", steps=30, new=False, first=21)
    v.controls.log.value = True
    v.look()
    state = v.chart.get_state()
    assert [line["name"] for line in state["content"]["lines"]] == ["training", "validation", "best"]
    assert len(np.frombuffer(state["content"]["lines"][0]["x"], "<f8")) == 50 and state["content"]["log"]
    assert sum(len(str(value)) for value in state.values()) < 50_000, "a page loaded again waits for all of it"


def test_watching_again_replaces_the_old_view(runs, view):
    write(runs, "again")
    old = view("again", runs)
    new = view("again", runs)
    old.again.thread.join(60)
    assert not old.again.thread.is_alive() and new.again.thread.is_alive()
    assert len(new.chart.lines["training"]["x"]) == 50


def test_stop_asks_twice(runs, view):
    write(runs, "careful", status="completed")
    v = view("careful", runs)
    assert "again" in v.buttons._stop() and v.buttons.stop.description == "sure?"
    assert not v._run().asked()


def said(v, ends):
    "What the view says, once that is to the point"
    deadline = time.monotonic() + 120
    while not ends(v.buttons.said.value) and time.monotonic() < deadline: time.sleep(.02)
    return v.buttons.said.value


def clicked(v, button, ends):
    button.disabled = False
    button.click()
    return said(v, ends)


def test_a_button_says_what_went_wrong(runs, view):
    write(runs, "bare")
    v = view("bare", runs)
    text = clicked(v, v.buttons.further, lambda text: text)
    assert "settings.ini" in text or "can't be read" in text


def test_save_says_which_checkpoint_is_there(runs, view):
    run = write(runs, "saver")
    v = view("saver", runs)
    assert "no checkpoint yet" in clicked(v, v.buttons.save, lambda text: "yet" in text or "True" in text)
    state = json.loads((run.folder / "state.json").read_text())
    (run.folder / "state.json").write_text(json.dumps({**state, "checkpoint_step": 1040}))
    assert "step 1,040" in clicked(v, v.buttons.save, lambda text: "1,040" in text or "False" in text)


def test_save_waits_for_the_worker(runs, view, monkeypatch):
    run = write(runs, "slow", status="running")
    monkeypatch.setattr(type(run), "locked", property(lambda self: True))
    v = view("slow", runs)
    assert "saving" in clicked(v, v.buttons.save, lambda text: text and run.asked())
    assert run.asked() == {"save"}
    run.withdraw("save")
    assert "checkpoint" in said(v, lambda text: "checkpoint" in text)


def test_a_button_never_fails_in_silence(runs, view):
    run = write(runs, "odd")
    v = view("odd", runs)
    shutil.rmtree(run.folder / "control")
    assert "FileNotFoundError" in clicked(v, v.buttons.save, lambda text: text and "saving" not in text)


def test_epochs_are_told_in_two_decimals():
    assert "epoch 0.46 of 1.43" in headline(State(status="running", epoch=.4634, epochs=1.42884))


def test_a_logarithmic_picture_has_plain_numbers(runs):
    write(runs, "plain")
    curves = Curves(find_run(runs, "plain"))
    curves.poll()
    fig = picture([curves], log=True)
    fig.canvas.draw()
    assert not any("10^" in t.get_text() for axis in fig.axes for t in axis.get_yticklabels(which="both"))


@pytest.mark.parametrize("elsewhere", ["another home is exported", "runs/ lies outside the root"])
def test_a_text_is_generated_in_the_workspace_of_the_runs(tmp_path, view, monkeypatch, elsewhere):
    space, other = workspace.init(tmp_path / "space"), workspace.init(tmp_path / "other")
    home = other
    if "outside" in elsewhere:
        (space.root / "settings.ini").write_text(f"[llm_trainer]\nruns = {tmp_path}/far/runs")
        home = space = workspace.init(space.root)
    monkeypatch.setenv("LLM_TRAINER_HOME", str(home.root))
    write(space.runs, "known")
    v = view("known", space.runs)
    assert v.buttons.actions.space.root == space.root
    assert "known has no checkpoint" in clicked(v, v.buttons.generate, lambda text: "generating" not in text and text)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    "A run that was really trained"
    from llm_trainer.config import load_config
    space = workspace.init(tmp_path_factory.mktemp("real"))
    run = launch.start(load_config("tiny", {"max_steps": 6, "eval_every": 3, "device": "cpu"}), space, "real")
    deadline = time.monotonic() + 300
    while run.status().status not in ENDED and time.monotonic() < deadline: time.sleep(.2)
    assert run.status().status == "completed", run.log_tail()
    return space, run


def test_texts_come_as_they_are_written_from_the_checkpoint_and_at_the_temperature_asked_for(real):
    space, run = real
    actions, shown = Actions(space.runs), []
    try:
        said = actions.generate(run, shown.append, "The ", "latest", temperature=.5, max_new_tokens=40, ignore_eot=True)
        assert "latest checkpoint" in said and "step 6, temperature 0.5" in shown[-1] and "The " in shown[-1]
        warm = actions.writer.process

        def show(html):
            shown.append(html)
            actions.writer.cancel()
        assert "cancelled" in actions.generate(run, show, "The ", "3", temperature=1.0, max_new_tokens=100_000,
                                               ignore_eot=True)
        assert actions.writer.process is not warm and "step 3" in shown[-1]  # another checkpoint is another process
    finally: actions.writer.close()


def test_resume_goes_to_the_end_of_the_plan_and_epochs_are_added_by_another_button(real):
    space, run = real
    actions = Actions(space.runs)
    assert "+ epochs" in actions.resume(run) and run.status().attempt == 1
    state = json.loads((run.folder / "state.json").read_text())
    (run.folder / "state.json").write_text(json.dumps({**state, "status": "stopped"}))
    plan = launch.plan_resume(run, space)
    assert plan.more is None and plan.target_steps == 6 and not plan.nothing_to_do


@pytest.mark.parametrize("state, says", [
    (dict(status="queued", waiting_for=["owl", "fox"], step=9, steps=9), "waits for owl, fox"),
    (dict(status="crashed", step=1240, checkpoint_step=1200),
     "Step 1,200 is saved, 40 steps after it are not. Press resume"),
    (dict(status="crashed", step=7), "Nothing was saved. Press resume to start it again"),
    (dict(status="failed", step=7, checkpoint_step=7, reason=dict(message="no space")),
     "Once the cause is mended: press resume"),
    (dict(status="diverged", run_id="owl", step=7), "--checkpoint best --lr")])
def test_a_run_that_does_not_train_says_why_and_what_to_press(state, says):
    shown = headline(State(**state))
    assert says in shown and ("no space" in shown) == bool(state.get("reason"))


def test_a_queued_run_shows_no_full_bar(runs, view):
    run = write(runs, "waiting", steps=100, status="completed")
    v = view("waiting", runs)
    assert v.panel.progress.value == 1
    lock = locks.Lock(run.folder / "lock")
    assert lock.acquire()
    state = json.loads((run.folder / "state.json").read_text())
    (run.folder / "state.json").write_text(json.dumps({**state, "status": "queued", "waiting_for": ["owl"]}))
    v.look()
    lock.release()
    assert v.panel.progress.value == 0 and "waits for owl" in v.panel.head.value


def test_the_picture_that_stays_is_renewed_at_each_evaluation(runs, view):
    write(runs, "still", steps=15, status="running")
    v, given = view("still", runs), []

    class Handle:
        def update(self, html): given.append(html.data)
    v.panel.still.handle = Handle()
    v.look()
    n = len(given)
    write(runs, "still", steps=4, new=False, first=16, status="running")
    v.look()
    assert len(given) == n  # no evaluation among those
    write(runs, "still", steps=4, new=False, first=20, status="running")
    v.look()
    assert len(given) == n + 1
    assert 'alt="still · crashed · step 23 of 100' in given[-1] and "data:image/png" in given[-1]


def test_more_than_the_loss_is_drawn_and_scale_and_smoothing_say_that_they_are_on(runs, view):
    write(runs, "rich")
    v = view("rich", runs)
    star = v.chart.lines["best"]
    assert list(star["x"]) == [50] and star["style"] == "star"
    v.controls.smoothing.value, v.controls.log.value = .02, True
    v.look()
    assert "log scale" in v.chart.content["up"] and "training, mean of 2.0%" in v.chart.lines
    v.controls.y.value = "lr"
    v.look()
    assert "learning rate" in v.chart.content["up"] and len(v.chart.lines) == 2


def test_compare_is_in_bits_per_byte_where_tokenizers_differ(runs):
    from llm_trainer import notebook
    for name, lr, tokens in (("one", .1, "aa"), ("two", .2, "aa"), ("odd", .1, "bb")):
        run = write(runs, name)
        meta = json.loads((run.folder / "meta.json").read_text())
        (run.folder / "meta.json").write_text(json.dumps({**meta, "tokenizer_hash": tokens,
                                                          "config": {"training": {"lr": lr, "seed": 1}}}))
    alike, other = notebook.compare(["one", "two"], runs), notebook.compare(["one", "odd"], runs)
    assert alike.different == {"lr": [.1, .2]} and "bits per byte, and losses" not in alike._repr_html_()
    shown = other._repr_html_()
    assert "bits per byte, and losses can't be compared" in shown and "No setting differs" in shown
    assert shown.count("data:image/png") == 1


def test_the_table_of_runs_is_sorted_and_filtered(runs):
    from llm_trainer import notebook
    for name, steps in (("short", 10), ("long", 50)): write(runs, name, steps=steps)
    (runs / "short" / "notes.txt").write_text("the <b>first</b> one")
    table = notebook.runs(runs)
    table.by.value = "step"
    assert [row[0].run_id for row in table.chosen()] == ["short", "long"]
    table.down.value = True
    assert [row[0].run_id for row in table.chosen()] == ["long", "short"]
    table.words.value = "first one"
    assert [row[0].run_id for row in table.chosen()] == ["short"]
    assert "&lt;b&gt;" in table.table.value and "<b>" not in table.table.value


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_text_of_others_stays_text(runs, view, text):
    state = State(run_id=text, status=text, phase=text, steps=9, step=1, reason=dict(message=text))
    shown = headline(state) + quote([dict(step=text, prompt=text, text=text)]) + safe(text)
    run = write(runs, "hostile", text=text)
    (run.folder / "state.json").write_text(json.dumps(dict(status="failed", reason=dict(code="error", message=text))))
    v = view("hostile", runs)
    shown += v.panel.head.value + v.panel.samples.value
    v.buttons.say(text)
    for tag, attrs in Elements(shown + v.buttons.said.value).found:
        assert tag in ("div", "b", "br", "pre", "i"), tag
        assert set(attrs) <= {"style"} and "javascript:" not in str(attrs)
    assert not set(shown) & {"\x1b", "\x07", "\u202e"}


def test_a_hundred_thousand_points_stay_small(runs, view):
    run = create_run(runs, {}, name="long")
    line = '{"kind":"train","attempt":1,"step":%d,"epoch":0.1,"tokens":%d,"time":%d,"loss":%s}\n'
    (run.folder / "metrics.jsonl").write_text("".join(line % (i, i, i, 9. if i == 77_777 else 2.)
                                                      for i in range(1, 100_001)))
    v = view("long", runs)  # which returns with a sample of it
    x = v.chart.lines["training"]["x"]
    assert len(x) > 500 and x[-1] == 100_000
    while v.readings.curves["long"].reading: v.look()
    v.look()
    assert len(v.readings.curves["long"].train) == 100_000
    x = v.chart.lines["training"]["x"]
    assert len(x) <= 1600 and 77_777 in x and x[-1] == 100_000
    assert len(v.png()) < 60_000


def test_pictures_are_equal_bytes(runs):
    write(runs, "still")
    drawn = []
    for _ in range(2):
        curves = Curves(find_run(runs, "still"))
        curves.poll()
        drawn.append(png(picture([curves], smoothing=.05, log=True)))
    assert drawn[0] == drawn[1] and drawn[0].startswith(b"\x89PNG")


def test_thin_and_smooth_at_their_edges():
    for n in (0, 1, 2, 1499, 1500, 1501, 3001):
        kept = thin(np.arange(n, dtype=float)) if n else []
        assert n == 0 or (kept[0] == 0 and kept[-1] == n - 1 and len(kept) <= 1600 and list(kept) == sorted(set(kept)))
    assert np.isnan(smooth(np.full(3, np.nan), 1)).all() and np.allclose(smooth(np.array([np.nan, 3, 3, np.nan]), 2), 3)
    assert len(thin(np.full(10_000, np.nan))) > 0


def test_the_view_loads_no_torch():
    import subprocess
    code = "import llm_trainer.notebook, sys; sys.exit(bool({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
