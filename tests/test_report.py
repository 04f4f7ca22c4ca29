"""A report of a run, runs chosen and compared, notes, and curves drawn in characters: read from run folders only."""
import fcntl
import json
import os
import re
import select
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import conftest
import pytest

from llm_trainer.config import load_config
from llm_trainer.errors import UsageError
from llm_trainer.runs.charts import Curve, plot, points, svg
from llm_trainer.runs.compare import compare
from llm_trainer.runs.report import energy, report, toml
from llm_trainer.runs.run import create_run, list_runs
from llm_trainer.runs.select import choose
from llm_trainer.system.energy import Counter, Meter, cpu_counters


def made(space, name, loss=3.0, lr=1e-3, tokenizer="t1", status="completed", **more):
    "A run that has ended, written as the worker writes it"
    config = load_config("tiny", {"lr": lr, **more}).to_dict()
    argv = ["train", "--config", "tiny", "--lr", str(lr)]
    run = create_run(space.runs, config, name=name, argv=argv, note=f"the note of {name}")
    run.add_attempt(from_step=0, target_epochs=2, target_steps=None, changed={}, lr_plan=None, argv=argv)
    run.complete_meta(device={"type": "cpu", "name": "A chip"}, versions={"torch": "2.13.0"}, tokenizer_hash=tokenizer,
                      data={"train_tokens": 1000, "val_tokens": 100, "fingerprint": "f00"}, parameters=43_904,
                      vocab_size=512)
    rows = [{"kind": "train", "attempt": 1, "step": n, "time": 100.0 + n, "tokens": 64 * n, "loss": 6 - n
             * (6 - loss) / 40,
             "lr": lr, "grad_norm": 1.0, "tokens_per_second": 500.0, "memory_bytes": 1 << 20, "cpu_joules": 90.0 * n}
            for n in range(1, 41)]
    rows += [{"kind": "val", "attempt": 1, "step": n, "time": 100.0 + n, "tokens": 64 * n, "loss": loss + (40 - n) / 20,
              "perplexity": 20.0, "bits_per_byte": loss / 2} for n in (20, 40)]
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sample = {"attempt": 1, "step": 40, "prompt": "The ", "text": "<b>end</b>"}
    (run.folder / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    stored = json.loads((run.folder / "state.json").read_text())
    stored |= {"status": status, "step": 40, "steps": 40, "epoch": 2.0, "epochs": 2, "loss": loss, "val_loss": loss,
               "tokens": 2560, "best_val_loss": loss, "elapsed_seconds": 40.0, "tokens_per_second": 500.0}
    (run.folder / "state.json").write_text(json.dumps(stored))
    return run


def program(space, *argv): return conftest.program(space, *argv, COLUMNS="100")


class Page(HTMLParser):
    "Tags, attributes and words of a page"
    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data): self.words.append(data)


# -- The report

def test_a_report_says_what_was_asked_done_and_how_to_do_it_again(space):
    text = " ".join(Page(report(made(space, "first", loss=2.5, lr=2e-3), space)).words)
    for said in ("43,904 parameters", "2.5000", "the note of first", "A chip (cpu)", "a flag", "profile tiny",
                 "40 kB of text teach no more", "<b>end</b>", "llm-trainer train --config tiny --lr 0.002", "f00",
                 "torch 2.13.0", "0.001 kWh (CPU package, by RAPL)", "64 tokens/s", "1,000"): assert said in text, said


def test_the_page_needs_nothing_else_and_holds_no_script(space):
    text = report(made(space, "first"), space)
    page = Page(text)
    policy = dict(page.attributes)["content"] if "content" in dict(page.attributes) else ""
    assert any("default-src 'none'" in (value or "") for _, value in page.attributes), policy
    assert not {"script", "link", "img", "iframe", "a", "object", "base",
                "form"} & set(page.tags) and page.tags.count("style") == 1
    assert not [v for k, v in page.attributes if k in ("src", "href") or k.startswith("on")]
    assert "url(" not in text and "@import" not in text
    assert page.tags.count("svg") == 4
    assert text.index("<h2>In short") < text.index("<svg") < text.index("<h2>The same again")


def test_the_profile_in_a_report_is_the_configuration(space, tmp_path):
    run = made(space, "first", lr=2e-3, dataset="my notes\\and \"more\"")
    (tmp_path / "again.toml").write_text(toml(run.config()))
    assert load_config(str(tmp_path / "again.toml")).to_dict() == run.config()
    assert toml(run.config()) in report(run, space, "md")


def test_a_report_of_a_run_that_has_nothing_yet(space):
    text = report(create_run(space.runs, {}, name="bare"), space)
    text += report(create_run(space.runs, {"x": 1}, name="odd"), space, "md")
    assert "Nothing was measured yet" in text and "No evaluation yet" in text and "crashed" in text


def test_markdown_in_a_run_is_text_in_the_report(space):
    run = made(space, "first")
    run.add_note("| a * table [x](http://y) <img src=x> ```")
    text = report(run, space, "md")
    rest = re.sub(r"^(`{3,})\w*\n.*?^\1$", "", text, flags=re.S | re.M)
    assert "````\nthe note of first\n| a * table" in text and "<img" not in rest and "](http" not in rest


SPELL = "<script>window.hit = 1</script><img src=//foreign.invalid onerror='window.hit = 2'>\"'&lt;]]>-->"


def spelled(value, name=""):
    "The same value with something in each of its texts that would act in a page that took it for markup"
    if isinstance(value, dict): return {key: spelled(part, key) for key, part in value.items()}
    if isinstance(value, list): return [spelled(part, name) for part in value]
    return value + SPELL if isinstance(value, str) and name not in ("kind", "status") else value


def bewitched(space, name, config):
    "A run whose files hold that in every text, its settings only with `config`"
    run = made(space, name, status="failed", dataset=f"text {SPELL}".replace("/", "|"), sample_prompt=SPELL)
    run.add_note(SPELL)
    (run.folder / "log.txt").write_text(SPELL)
    for file in (file for file in run.folder.iterdir() if file.suffix in (".json", ".jsonl")):
        rows = [json.loads(row) for row in file.read_text().splitlines()] if file.suffix == ".jsonl" \
            else [json.loads(file.read_text())]
        for row in rows:
            if file.name == "state.json": row |= {"phase": "training", "reason": {"code": "error", "message": "why"}}
            kept = {} if config else {"config": row["config"]} if "config" in row else {}
            row |= spelled(row) | kept
        file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return run


@pytest.mark.parametrize("config", [False, True])
def test_nothing_in_a_run_is_markup_in_its_report(space, config):
    plain = Page(report(made(space, "plain", status="failed"), space))
    page = Page(report(bewitched(space, "spelled", config), space))
    assert set(page.tags) <= set(plain.tags) and {k for k, _ in page.attributes} <= {k for k, _ in plain.attributes}
    assert " ".join(page.words).count("window.hit = 1") > 15


# -- Energy

def test_each_attempt_adds_its_last_figure():
    rows = [{"attempt": 1, "cpu_joules": 1.8e6}, {"attempt": 1, "cpu_joules": 3.6e6},
            {"attempt": 2, "cpu_joules": 3.6e6, "gpu_joules": 7.2e6}]
    assert energy(rows).startswith("2 kWh (CPU package, by RAPL), 2 kWh (GPU, by NVML)")
    assert energy([{"loss": 1.0}]).startswith("not known")


def test_a_counter_that_starts_again_goes_on():
    now = iter([10.0, 60.0, 5.0])
    counter = Counter(lambda: next(now), wrap=100.0)
    assert (counter.poll(), counter.poll()) == (50.0, 95.0)


def test_the_packages_are_counted_once_and_what_may_not_be_read_is_left_out(tmp_path):
    for name in ("intel-rapl:0", "intel-rapl:1", "intel-rapl:0:0"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "max_energy_range_uj").write_text("100000000\n")
        (tmp_path / name / "energy_uj").write_text("5000000\n")
    (tmp_path / "intel-rapl:2").mkdir()
    assert len(cpu_counters(tmp_path)) == 2
    meter = Meter(rapl=tmp_path)
    meter.EVERY = 0
    for name in ("intel-rapl:0", "intel-rapl:1"): (tmp_path / name / "energy_uj").write_text("8000000\n")
    assert meter.read() == {"cpu_joules": 6.0}
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    assert meter.read() == {"cpu_joules": 6.0} and Meter(rapl=tmp_path / "nowhere").read() == {}


# -- Choosing, comparing, noting

@pytest.mark.parametrize("asked, names", [
    ({}, ["c", "b", "a"]), ({"sort": "val_loss"}, ["b", "a", "c"]),
    ({"sort": "val-loss", "reverse": True}, ["c", "a", "b"]),
    ({"filters": ["val_loss<3"]}, ["b"]), ({"filters": ["lr >= 2e-3, status=completed"]}, ["b"]),
    ({"filters": ["status!=completed"]}, ["c"]),
    ({"filters": ["status=Completed", "val_loss>2.5"]}, ["a"]), ({"filters": ["note~of b"]}, ["b"]),
    ({"filters": ["run_id~a"]}, ["a"]),
    ({"filters": ["n_layer=2"], "sort": "lr"}, ["a", "b", "c"]), ({"filters": ["init_from=none"]}, ["c", "b", "a"]),
    ({"filters": ["init_from<3"]}, []), ({"filters": ["status<3"]}, [])])
def test_runs_are_chosen_and_sorted(space, asked, names):
    made(space, "a", 3.0)
    made(space, "b", 2.0, lr=2e-3)
    made(space, "c", 4.0, lr=3e-3, status="stopped")
    assert [state.run_id for state in choose(list_runs(space.runs), **asked)] == names


@pytest.mark.parametrize("text", ["foo", "a=", "=3", "a<>3", "__import__('os')", "val_los<2", "a=1;b=2"])
def test_an_expression_that_says_nothing_is_refused(space, text):
    made(space, "a")
    with pytest.raises(UsageError, match="--filter|no field"): choose(list_runs(space.runs), [text])


def test_the_commands(space):
    made(space, "first", 3.0)
    made(space, "second", 2.0, lr=1.00001e-3, tokenizer="t2")
    table = program(space, "runs", "--sort", "val_loss", "--filter", "val_loss<2.5").stdout
    assert "second" in table and "first" not in table
    assert "None of 2 runs" in program(space, "runs", "--filter", "lr>1").stdout
    beside = program(space, "compare", "first", "second").stdout
    assert "only bits per byte" in beside and "n_layer" not in beside
    assert re.search(r"^lr +0.001 +0.00100001$", beside, re.M) and re.search(r"^epoch +2.00 +2.00$", beside, re.M)
    assert json.loads(program(space, "compare", "first", "second", "--json").stdout)["measure"] == "bits_per_byte"
    assert program(space, "note", "first", "\x1b[2Jbetter  end\n").returncode == 0
    assert program(space, "note", "first").stdout == "the note of first\nbetter end\n"
    assert "better end" in program(space, "status", "first").stdout
    assert program(space, "report", "first", "--out", "x.txt").returncode == 2
    assert program(space, "report", "first").returncode == 0 and "better end" in (space.root / "first.html").read_text()
    assert program(space, "report", "first").returncode == 2
    drawn = program(space, "plot", "first", "--ascii", "--width", "60", "--height", "10").stdout.splitlines()
    assert drawn[0].startswith("* training  o validation") and all(line.isascii() and len(line) <= 60 for line in drawn)


@pytest.mark.parametrize("out", ["page.html", "link.html"])
def test_a_report_replaces_a_page_as_a_whole_or_not_at_all(space, out):
    made(space, "one")
    page, link = space.root / "page.html", space.root / "link.html"
    page.write_text("the old page")
    page.chmod(0o640)
    link.symlink_to(page.name)
    before = set(space.root.iterdir())
    words = "report", "one", "--out", out, "--force"
    full = conftest.small_disk(4, *words, cwd=space.root)
    assert full.returncode == 1 and full.stderr.rstrip().endswith(f": {out}")
    assert page.read_text() == "the old page" and set(space.root.iterdir()) == before
    assert program(space, *words).returncode == 0 and page.read_text().startswith("<!doctype html>")
    assert page.stat().st_mode & 0o777 == 0o640 and link.is_symlink() and set(space.root.iterdir()) == before


def test_a_report_goes_into_a_pipe_that_somebody_reads(space):
    made(space, "one")
    os.mkfifo(space.root / "pipe.html")
    words = "report", "one", "--out", "pipe.html", "--force"
    alone = program(space, *words)
    assert alone.returncode == 1 and "Nobody reads it: pipe.html" in alone.stderr
    for most, code in (None, 0), (10, 1):
        reader = open(os.open(space.root / "pipe.html", os.O_RDONLY | os.O_NONBLOCK), "rb")
        os.set_blocking(reader.fileno(), True)
        fcntl.fcntl(reader, getattr(fcntl, "F_SETPIPE_SZ", fcntl.F_GETFD), 4096)  # so that the page doesn't fit
        with subprocess.Popen([sys.executable, "-m", "llm_trainer", *words], cwd=space.root, text=True,
                              stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(conftest.ROOT)}) as child:
            select.select([reader], [], [])
            with reader: assert len(reader.read(most) if most else reader.read()) > 9
            said = child.stderr.read()
        assert child.returncode == code and ("is gone: pipe.html" in said) == bool(code), said


def test_the_figure_that_can_be_compared(space):
    runs = made(space, "a"), made(space, "b", 2.0), made(space, "c", 2.0, tokenizer="t2")
    assert compare(list(runs[:2]))["measure"] == "loss" and compare(list(runs))["measure"] == "bits_per_byte"
    assert compare(list(runs[:2]))["settings"] == {}


def test_a_note_stands_behind_what_somebody_wrote_without_a_newline(space):
    run = made(space, "a")
    (run.folder / "notes.txt").write_text("by hand")
    run.add_note("by the program")
    assert run.notes() == "by hand\nby the program\n"
    with pytest.raises(UsageError): run.add_note(" \n")


# -- Curves

def test_of_many_points_the_peaks_stay():
    ys = [1.0] * 50_000
    ys[777], ys[40_001] = 9.0, -9.0
    kept = points(Curve("", range(50_000), ys), 500)
    assert len(kept) <= 520 and {(777, 9.0), (40_001, -9.0)} <= set(kept) and kept[-1][0] == 49_999


@pytest.mark.parametrize("ys", [[], [None, "x", float("nan"), float("inf"), True], [1.0], [2.0, 2.0, 2.0], [0.0, 0.0],
                                [-1.0, -5.0], [1e-12, 1e12], [10**400, 1.0]])
@pytest.mark.parametrize("log", [False, True])
def test_whatever_the_numbers_a_picture_is_drawn_or_there_is_none(ys, log):
    curves = [Curve("a<b", range(len(ys)), ys), Curve("marks", range(len(ys)), ys, True)]
    picture, text = svg(curves, "a & b", log=log), plot(curves, log=log, width=40, height=8)
    if picture:
        assert ET.fromstring(picture).find("{http://www.w3.org/2000/svg}title").text == "a & b" and "nan" not in picture
    assert text and all(len(line) <= 40 for line in text.splitlines()[1:])


def test_a_falling_line_falls_in_the_terminal():
    lines = plot([Curve("a", range(100), range(100, 0, -1))], width=60, height=13, braille=False).splitlines()[1:-2]
    columns = [line.index("*") for line in lines]
    assert columns == sorted(columns) and columns[0] == 9 and len(set(columns)) == len(columns)
