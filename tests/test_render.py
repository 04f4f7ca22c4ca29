"""What a person reads of a run, word by word: the card, the table, progress lines, comparisons, CSV."""
import io
import json
import os
import re
import time

import pytest

from llm_trainer.cli import parser, render
from llm_trainer.runs.state import STATES, State


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    "A terminal of 200 columns that shows Unicode, without colour"
    monkeypatch.setattr(render, "unicode_ok", lambda: True)
    monkeypatch.setattr(render, "coloured", lambda: False)


def state(**more):
    return State(**{"run_id": "one", "status": "running", "phase": "training", "attempt": 1, "epoch": 1.41,
                    "epochs": 3, "step": 4700, "steps": 10000, "tokens": 1_234_567, "loss": 1.51, "val_loss": 1.6,
                    "best_val_loss": 1.55, "loss_history": [3.0, 2.0, 1.0], "tokens_per_second": 9500.0,
                    "eta_seconds": 125.0, "elapsed_seconds": 3725.0, "device": "cpu", "memory_bytes": 2_500_000,
                    "host": "here", "pid": 77, "checkpoint_step": 4500, **more})


def test_a_card_tells_everything_about_a_running_one():
    text = render.card(state(heartbeat=time.time() - 65), notes="a\n\nb\nc\nd\ne\nf\n", process_state="running")
    assert text.splitlines() == [
        "● running · training   one",
        "  ━━━━━━━━━━━━━━━─────────────────  47%   step 4,700 of 10,000 · epoch 1.41 of 3",
        "  loss        1.5100   █▄▁",
        "  validation  1.6000 · best 1.5500",
        "  speed       9.5k tokens/s · 1.23M tokens so far",
        "  time        1h02m elapsed · about 2m05s left",
        "  device      cpu · 2.5 MB used",
        "  process     pid 77 on here · running · sign of life 1m05s ago",
        "  checkpoint  step 4,500",
        "  note        b", *(f"              {letter}" for letter in "cdef")]


def test_a_card_leaves_out_what_is_not_known():
    bare = State(run_id="one", status="queued", step=None, epoch=None, elapsed_seconds=None)
    assert render.card(bare) == "○ queued   one"
    assert render.position(State(run_id="one", status="unknown", step=7)) == ""
    text = render.card(state(status="completed", steps=None, epochs=None, loss=None, val_loss=None, attempt=2,
                             tokens_per_second=None, memory_bytes=None, checkpoint_step=None, waiting_for=["x", "y"],
                             skipped=1200, write_errors=3))
    assert text.splitlines() == [
        "✓ completed   one", "  step 4,700 · epoch 1.41", "  time        1h02m elapsed", "  device      cpu",
        "  waits for   x, y", "  skipped     1,200 steps that were not finite",
        "  disk        3 writes to the run folder failed", "  attempt     2"]


def test_who_has_a_process_is_said_where_it_matters():
    def process(**more): return [row for row in render.card(state(**more)).splitlines() if "pid" in row]
    assert process(status="crashed", heartbeat=1.0) == ["  process     pid 77 on here · gone"]
    assert process(status="stalled") == ["  process     pid 77 on here"]
    assert process(status="stopped") == process(status="completed") == process(status="running", pid=None) == []


def test_an_end_says_its_reason_its_log_and_what_helps():
    ended = state(status="failed", reason={"code": "oom", "message": "Memory ran out.\nReally."})
    meta = {"config": {"training": {"batch_size": 16, "grad_accum_steps": 2}}, "argv": ["train", "--config", "a b"]}
    assert render.card(ended, meta, ["last line"]).splitlines()[-7:] == [
        "  reason      oom: Memory ran out.", "              Really.", "", "  the end of its log:", "    last line",
        "", "  what helps: fewer sequences at once, the same tokens a step: llm-trainer train --config 'a b' "
        "--batch-size 8 --grad-accum-steps 4"]
    def helps(status, code=None, meta={}): return render.helps(state(status=status, reason={"code": code}), meta)
    assert helps("failed", "oom").endswith("train --batch-size 1 --grad-accum-steps 2")
    assert helps("diverged").endswith("resume one --checkpoint best --lr 0.0005")
    assert helps("diverged", meta={"config": {"training": {"lr": 0.01}}}).endswith("--lr 0.005")
    assert helps("failed", "disk_full") == "make room, then: llm-trainer resume one"
    assert helps("failed", "strange") == "llm-trainer logs one   then: llm-trainer resume one"
    assert helps("crashed", "oom") == "nothing saved is lost: llm-trainer resume one"
    assert helps("stalled").startswith("see what it does: llm-trainer logs one")
    assert [helps(status) for status in ("running", "queued", "completed", "stopped")] == [None] * 4
    for broken in ({"config": 1, "argv": "x"}, {"config": {"training": [1]}, "argv": [1, 2]}):
        assert helps("failed", "oom", broken).endswith("train --batch-size 1 --grad-accum-steps 2")
    stopped = render.card(state(status="stopped", reason={"code": "signal"}), {}, ["last line"])
    assert stopped.endswith("reason      signal: ") and "last line" not in stopped
    assert "last line" in render.card(state(status="stalled"), {}, ["last line"])


def test_several_devices_are_named_and_the_slowest_told():
    def devices(*ranks, **more):
        text = render.card(state(ranks=list(ranks), **more))
        return next((row[14:] for row in text.splitlines() if row.startswith("  devices ")), None)
    two = [{"rank": i, "host": "a", "device": f"cuda:{i}", "step_seconds": s, "waits": 0.6 - 2 * s}
           for i, s in enumerate((0.1, 0.25))]
    assert devices(*two, strategy="ddp") == "2 (cuda:0, cuda:1), ddp"
    assert "rank 1 is the slowest, 0.25 s a step of its own" in render.card(state(ranks=two))
    assert devices(two[0]) is None
    assert devices({"device": "cpu", "host": "a"}, {"device": "cpu", "host": "b"}) == "2 on 2 machines (cpu), ?"
    assert devices(*({"device": f"d{i}"} for i in range(8))) == f"8 ({', '.join(f'd{i}' for i in range(8))}), ?"
    assert devices(*({"device": f"d{i}"} for i in range(9))) == f"9 ({', '.join(f'd{i}' for i in range(8))} …), ?"


def test_a_line_of_progress():
    def line(**more): return re.sub(r"^\d\d:\d\d:\d\d ", "", render.line(state(**more)))
    assert line() == ("● running · training  step 4,700 of 10,000 · epoch 1.41 of 3 · loss 1.5100 · val 1.6000 · "
                      "9.5k tok/s · 2m05s left")
    assert line(status="stalled").endswith("2m05s left") and line(status="stalled").startswith("‖ stalled · training")
    assert line(status="stopped", steps=None, epochs=2.5, loss=None, val_loss=None, tokens_per_second=None) == \
        "■ stopped  step 4,700 · epoch 1.41 of 2.50"
    assert line(eta_seconds=None).endswith("9.5k tok/s")
    assert line(step=None, epoch=None, status=None, phase=None).startswith("? ?  loss")


def test_the_table_of_runs(monkeypatch):
    monkeypatch.setattr(render.sys, "stdout", open(os.devnull, "w"))  # no terminal, so all columns
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - 7200))
    rows = render.table([state(created_at=created), state(run_id="another", status="completed", phase=None, steps=None,
                                                          tokens_per_second=0.0, created_at="never")]).splitlines()
    assert [re.sub(" +", " ", row) for row in rows] == [
        "RUN STATUS STEP EPOCH LOSS VAL TOK/S ETA AGE CURVE",
        "one ● running · training 4.7k 47% 1.41 1.510 1.600 9.5k 2m05s 2h00m █▄▁",
        "another ✓ completed 4.7k 1.41 1.510 1.600 – – – █▄▁"]
    assert len({row.index(cell) for row, cell in zip(rows, ("STATUS", "●", "✓"))}) == 1


def test_a_narrow_terminal_drops_columns_then_letters(monkeypatch):
    many = [state(run_id="a-long-name-of-a-run"), state(run_id="b"), state(run_id="of-eight")]
    class Terminal:
        encoding = "utf-8"
        def isatty(self): return True
    def rows(width):
        with monkeypatch.context() as m:
            m.setattr(render.shutil, "get_terminal_size", lambda: os.terminal_size((width, 24)))
            m.setattr(render.sys, "stdout", Terminal())
            return render.table(many).splitlines()
    whole = rows(500)
    width = max(map(len, whole))
    assert rows(width) == whole and "CURVE" in whole[0] and "EPOCH" in whole[0]
    assert "EPOCH" not in (less := rows(width - 1))[0] and "CURVE" in less[0] and max(map(len, less)) <= width - 1
    assert [c for c in render.COLUMNS if c not in rows(30)[0]] == ["EPOCH", "VAL", "TOK/S", "ETA", "AGE", "CURVE"]
    least = rows(1)
    assert least[1].startswith("a-long-… ")
    assert least[2].startswith("b  ") and least[3].startswith("of-eight ")


def test_two_runs_side_by_side():
    found = {"runs": ["one", "two"], "figures": {
        "step": [10, 2000], "epoch": [1.0, 2.345], "tokens": [1500, 2.5e6], "elapsed_seconds": [61.0, None],
        "parameters": [1234, 5678], "tokens_per_second": [95.5, 1234.5], "perplexity": [12.345, None],
        "loss": [1.23456, 2.0], "device": ["cpu", "x\x1b[31m" + "y" * 60], "exact": [True, False],
        "unknown": [None, None]}, "settings": {}}
    rows = [re.sub("  +", " | ", row.strip()) for row in render.side_by_side(found).splitlines()]
    assert rows == ["A one | B two", "step | 10 | 2,000", "epoch | 1.00 | 2.35", "tokens | 1.5k | 2.5M",
                    "elapsed seconds | 1m01s | –", "parameters | 1.23k | 5.68k",
                    "tokens per second | 95.5 | 1.23k", "perplexity | 12.35 | –", "loss | 1.2346 | 2.0000",
                    "device | cpu | x" + "y" * 39, "exact | True | False", "", "No setting differs."]
    other = render.side_by_side({**found, "settings": {"lr": [0.001, 3e-5], "n_layer": [6, 1200]}}).splitlines()
    assert [re.sub("  +", " | ", row.strip()) for row in other[-3:]] == [
        "Settings that differ", "lr | 0.001 | 3e-05", "n_layer | 6 | 1,200"]
    assert other[-4].strip() == "" and not any("No setting" in row for row in other)


def test_small_pictures(monkeypatch):
    assert [render.bar(s, 4) for s in (-1, 0, 0.5, 1, 2)] == ["────", "────", "━━──", "━━━━", "━━━━"]
    assert [render.badge(name) for name in STATES] == [f"{look.sign} {name}" for name, look in STATES.items()]
    assert render.badge("running", "saving") == "● running · saving"
    assert render.badge("stopped", "saving") == "■ stopped"
    monkeypatch.setattr(render, "coloured", lambda: True)
    assert render.bar(0.5, 2) == "\x1b[32m━\x1b[0m─" and render.badge("failed") == "\x1b[31m✗ failed\x1b[0m"
    assert [render.badge(s)[:5] for s in ("running", "queued", "stalled", "completed")] == [
        "\x1b[32m", "\x1b[34m", "\x1b[33m", "\x1b[36m"]
    assert [render.paint_curve("x", i)[2:4] for i in range(5)] == ["34", "33", "32", "35", "34"]
    assert render.card(state()).splitlines()[0].endswith("\x1b[1mone\x1b[0m")
    assert render.columns([["A", "B"], ["1", "\x1b[31m2\x1b[0m"]]) == "\x1b[1mA  B\x1b[0m\n1  \x1b[31m2\x1b[0m"
    monkeypatch.setattr(render, "coloured", lambda: False)
    monkeypatch.setattr(render, "unicode_ok", lambda: False)
    assert render.bar(0.5, 4) == "##.." and render.badge("running", "saving") == "* running - saving"
    assert "█" not in render.card(state()) and "loss        1.5100" in render.card(state())


def test_facts_json_and_csv():
    assert render.facts({"train_tokens": 12345, "val_share": 0.0512345, "name": "x"}).splitlines() == [
        "  train tokens         12,345", "  val share            0.0512", "  name                 x"]
    value = {"a": float("nan"), "b": [float("inf"), (1.5,)], 3: State(run_id="\x1b"), "c": {"d": "é"}}
    text = render.as_json(value)
    found = json.loads(text)
    assert (found["a"], found["b"], found["3"]["run_id"], found["c"]) == (None, [None, [1.5]], "\x1b", {"d": "é"})
    assert "\x1b" not in text and "é" in text and "\n  " in text and "\n" not in render.as_json({"a": 1}, None)
    assert render.as_json({"a": 1}) == '{\n  "a": 1\n}'
    rows = [{"a": 1, "b": "x,\x1b[31my"}, {"a": None, "c": [1, "\x07"]}]
    assert render.csv(rows).splitlines() == ["a,b,c", '1,"x,y",', ",,\"[1, '\\x07']\""]


def test_an_age_is_of_a_moment_and_never_below_zero():
    assert [render._age(x) for x in (None, "yesterday", time.time() + 100)] == ["–", "–", "0s ago"]
    assert render._age(time.time() - 3661) == "1h01m ago" and render._age("2020-01-01T00:00:00+00:00").endswith("h ago")


def test_a_long_curve_has_24_bars_in_a_card_and_12_in_the_table():
    def bars(text): return sum(text.count(bar) for bar in "▁▂▃▄▅▆▇█")
    long = state(loss_history=[float(i) for i in range(60)])
    assert bars(render.card(long)) == 24 and bars(render.table([long])) == 12


def test_what_is_said_is_there_at_once(monkeypatch):
    class Stream(io.StringIO):
        seen = ""
        def flush(self): Stream.seen = self.getvalue()
    monkeypatch.setattr(render.sys, "stdout", Stream())
    render.say("a\x07", "b")
    assert Stream.seen == "a\nb\n"


def test_share_is_known_where_the_length_is():
    assert render.share(state()) == 0.47 and render.share(state(steps=None)) is None
    assert render.share(state(steps=0)) is None and render.share(state(step=None)) is None


@pytest.mark.parametrize("env, tty, wanted", [({}, True, True), ({}, False, False), ({"NO_COLOR": "1"}, True, False),
                                              ({"TERM": "dumb"}, True, False), ({"NO_COLOR": ""}, True, True)], ids=str)
def test_colour_is_for_terminals_that_want_it(monkeypatch, env, tty, wanted):
    for name in ("NO_COLOR", "TERM"): monkeypatch.delenv(name, raising=False)
    for name, value in env.items(): monkeypatch.setenv(name, value)
    class Stream:
        def isatty(self): return tty
    assert bool(parser.coloured(Stream())) == wanted
    monkeypatch.setattr(parser.sys, "stdout", Stream())
    assert bool(parser.coloured()) == wanted and (parser.bold("x") != "x") == wanted
