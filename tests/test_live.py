"""The view in a notebook, without a browser: what it reads, what it shows, what it survives."""
import json
import math
import shutil
import sys
import time
from base64 import b64decode
from html.parser import HTMLParser

import numpy as np
import pytest

pytest.importorskip("ipywidgets", reason="the live view needs: pip install 'llm_trainer[notebook]'")

from llm_trainer import launch, workspace
from llm_trainer.live import Curves, headline, picture, png, quote, safe, smooth, thin, watch
from llm_trainer.records import encode
from llm_trainer.runs import create_run, find_run

HOSTILE = ["<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "</pre><svg/onload=alert(1)>", "\"><a href='javascript:alert(1)'>x",
           "<style>*{display:none}</style>", "\x1b]0;title\x07\x1b[2J", "\u202ereversed", "&lt;b&gt;", "<!--", "]]>", "\ud800",
           "$\\href{javascript:1}{x}$"]


@pytest.fixture
def runs(tmp_path): return tmp_path / "runs"


def write(runs, name, steps=50, status="completed", text="a list", new=True, first=1):
    "A run folder with `steps` training rows, validations and a sample"
    run = create_run(runs, {}, name=name) if new else find_run(runs, name)
    with open(run.folder / "metrics.jsonl", "ab") as file:
        for i in range(first, first + steps):
            row = dict(attempt=1, step=i, epoch=i / 50, tokens=i * 100, time=1e9 + i)
            file.write(encode(dict(row, kind="train", loss=2 + math.exp(-i / 9))))
            if i % 10 == 0: file.write(encode(dict(row, kind="val", loss=2.2 + math.exp(-i / 9))))
    (run.folder / "samples.jsonl").write_bytes(encode(dict(step=10, prompt="The ", text=text)))
    state = dict(status=status, step=first + steps - 1, steps=100, epoch=1., epochs=2, loss=2.1, val_loss=2.3, attempt=1)
    (run.folder / "state.json").write_text(json.dumps({**state, "run_id": name, "created_at": run.meta["created_at"]}))
    return run


@pytest.fixture
def view():
    "A `watch` whose thread is gone when the test ends"
    views = []
    def open_view(*args, **kw):
        views.append(watch(*args, **kw))
        return views[-1]
    yield open_view
    for v in views: v.close(); v._thread.join(60)


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
    assert v.run.value == "newer" and "completed" in v.head.value and "a list" in v.samples.value
    assert len(v.figure.data[1].x) == 50 and v.compare.options == ("older",) and v.compare.layout.display == "flex"


def test_the_figure_takes_the_width_of_its_cell_and_offers_no_upload(runs, view):
    write(runs, "only-one")
    v = view(runs=runs)
    assert v.figure.layout.width is None and v.figure.layout.autosize and v.figure._config["responsive"]
    assert "sendChartToCloud" in v.figure.layout.modebar.remove and not v.figure._config["displaylogo"]
    assert v.compare.layout.display == "none"


def test_it_follows_what_is_written_without_piling_up(runs, view):
    write(runs, "growing", steps=20)
    v = view("growing", runs)
    write(runs, "growing", steps=30, new=False, first=21)
    v.look()
    assert list(v.figure.data[1].x) == list(range(1, 51)) and len(v.figure.data) == 3


def test_controls_change_the_figure(runs, view):
    write(runs, "one-run")
    write(runs, "two-run")
    v = view("one-run", runs)
    v.smoothing.value, v.log.value, v.x.value, v.compare.value = .8, True, "time", ["two-run"]
    v.look()
    assert v.figure.layout.yaxis.type == "log" and "minutes" in v.figure.layout.xaxis.title.text and len(v.figure.data) == 6
    assert v.figure.data[0].opacity == .25 and max(v.figure.data[1].x) == pytest.approx(49 / 60)


def test_it_opens_before_the_first_run_and_finds_it(runs, view):
    v = view(runs=runs)
    assert "no run yet" in v.head.value
    write(runs, "first-run")
    v._refresh_runs()
    v.look()
    assert v.run.value == "first-run" and len(v.figure.data[1].x) == 50


def test_it_survives_deletion_and_damage(runs, view):
    run = write(runs, "doomed")
    v = view("doomed", runs)
    (run.folder / "state.json").write_bytes(b"\xff{")
    (run.folder / "metrics.jsonl").open("ab").write(b'{"kind": "train", "step": 51, "lo')
    v.look()
    shutil.rmtree(run.folder)
    v.look()
    assert "deleted" in v.head.value and len(v.figure.data[1].x) == 50 and v.stop.disabled and v.resume.disabled
    assert v._thread.is_alive()


def test_a_page_loaded_again_gets_what_is_drawn(runs, view):
    write(runs, "growing", steps=20)
    v = view("growing", runs)
    write(runs, "growing", steps=30, new=False, first=21)
    v.log.value = True
    v.look()
    state = v.figure.get_state()
    assert [t["name"] for t in state["_widget_data"]] == ["training, raw", "training", "validation"]
    x = state["_widget_data"][1]["x"]
    assert len(np.frombuffer(b64decode(x["bdata"]), x["dtype"])) == 50 and state["_widget_layout"]["yaxis"]["type"] == "log"


def test_watching_again_replaces_the_old_view(runs, view):
    write(runs, "again")
    old = view("again", runs)
    new = view("again", runs)
    old._thread.join(60)
    assert not old._thread.is_alive() and new._thread.is_alive() and len(new.figure.data[1].x) == 50


def test_stop_asks_twice(runs, view):
    write(runs, "careful", status="completed")
    v = view("careful", runs)
    assert "again" in v._stop_run(v._run()) and v.stop.description == "sure?"
    assert not v._run().asked()


def said(v, ends):
    "What the view says, once that is to the point"
    deadline = time.monotonic() + 120
    while not ends(v.said.value) and time.monotonic() < deadline: time.sleep(.02)
    return v.said.value


def clicked(v, button, ends):
    button.disabled = False
    button.click()
    return said(v, ends)


def test_a_button_says_what_went_wrong(runs, view):
    write(runs, "bare")
    v = view("bare", runs)
    text = clicked(v, v.resume, lambda text: text)
    assert "settings.ini" in text or "can't be read" in text


def test_save_says_which_checkpoint_is_there(runs, view):
    run = write(runs, "saver")
    v = view("saver", runs)
    assert "no checkpoint yet" in clicked(v, v.save, lambda text: "yet" in text or "True" in text)
    state = json.loads((run.folder / "state.json").read_text())
    (run.folder / "state.json").write_text(json.dumps({**state, "checkpoint_step": 1040}))
    assert "step 1,040" in clicked(v, v.save, lambda text: "1,040" in text or "False" in text)


def test_save_waits_for_the_worker(runs, view, monkeypatch):
    run = write(runs, "slow", status="running")
    monkeypatch.setattr(type(run), "locked", property(lambda self: True))
    v = view("slow", runs)
    assert "saving" in clicked(v, v.save, lambda text: text) and run.asked() == {"save"}
    run.withdraw("save")
    assert "checkpoint" in said(v, lambda text: "checkpoint" in text)


def test_a_button_never_fails_in_silence(runs, view):
    run = write(runs, "odd")
    v = view("odd", runs)
    shutil.rmtree(run.folder / "control")
    assert "FileNotFoundError" in clicked(v, v.save, lambda text: text)


def test_epochs_are_told_in_two_decimals():
    assert "epoch 0.46 of 1.43" in headline(dict(status="running", epoch=.4634, epochs=1.42884))


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
    v, asked = view("known", space.runs), []
    assert "known has no checkpoint" in (said := v._generate(v._run())), said
    monkeypatch.setattr(launch, "resume", lambda run, space, **how: asked.append(space.root))
    v._resume_run(v._run())
    assert asked == [space.root]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_text_of_others_stays_text(runs, view, text):
    state = dict(run_id=text, status=text, phase=text, steps=9, step=1, reason=dict(message=text))
    shown = headline(state) + quote([dict(step=text, prompt=text, text=text)]) + safe(text)
    run = write(runs, "hostile", text=text)
    (run.folder / "state.json").write_text(json.dumps(dict(status="failed", reason=dict(code="error", message=text))))
    v = view("hostile", runs)
    shown += v.head.value + v.samples.value
    v._say(text)
    for tag, attrs in Elements(shown + v.said.value).found:
        assert tag in ("div", "b", "br", "pre"), tag
        assert set(attrs) <= {"style"} and "javascript:" not in str(attrs)
    assert not set(shown) & {"\x1b", "\x07", "\u202e"}


def test_a_hundred_thousand_points_stay_small(runs, view):
    run = create_run(runs, {}, name="long")
    line = '{"kind":"train","attempt":1,"step":%d,"epoch":0.1,"tokens":%d,"time":%d,"loss":%s}\n'
    (run.folder / "metrics.jsonl").write_text("".join(line % (i, i, i, 9. if i == 77_777 else 2.) for i in range(1, 100_001)))
    v = view("long", runs)
    assert len(v.curves["long"].train) == 100_000
    assert len(v.figure.data[1].x) <= 1600 and 77_777 in v.figure.data[1].x and v.figure.data[1].x[-1] == 100_000
    assert len(v.png()) < 60_000


def test_pictures_are_equal_bytes(runs):
    write(runs, "still")
    drawn = []
    for _ in range(2):
        curves = Curves(find_run(runs, "still"))
        curves.poll()
        drawn.append(png(picture([curves], smoothing=.5, log=True)))
    assert drawn[0] == drawn[1] and drawn[0].startswith(b"\x89PNG")


def test_thin_and_smooth_at_their_edges():
    for n in (0, 1, 2, 1499, 1500, 1501, 3001):
        kept = thin(np.arange(n, dtype=float)) if n else []
        assert n == 0 or (kept[0] == 0 and kept[-1] == n - 1 and len(kept) <= 1600 and list(kept) == sorted(set(kept)))
    assert np.isnan(smooth(np.full(3, np.nan), .9)).all() and len(smooth(np.array([]), .5)) == 0
    assert len(thin(np.full(10_000, np.nan))) > 0


def test_the_view_loads_no_torch():
    import subprocess
    code = "import llm_trainer.live, sys; sys.exit(bool({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
