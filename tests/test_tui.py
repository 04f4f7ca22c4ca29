"""The watcher, as its users meet it: each test is a story; the pictures are compared with those in __snapshots__."""
from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from textual import events
from textual.widgets import Input, Select
from tui_world import (CONTROL, CRASHED, DIVERGED, FAILED, FINISHED, NOW, RUNNING, STOPPED, World, all_heard, press,
                       settle, shows, text_of, told, until)

from llm_trainer.runs import launch
from llm_trainer.runs.run import Run
from llm_trainer.system.files import Follower
from llm_trainer.tui.app import wants_ascii
from llm_trainer.tui.glyphs import braille, line, to_ascii
from llm_trainer.tui.readers import Overview, RunReader, dataset_of
from llm_trainer.tui.screens.runs import epochs
from llm_trainer.runs.curves import TRAIN, Curves, Series, columns
from llm_trainer.tui.widgets.key_bar import KeyBar
from llm_trainer.tui.widgets.plot import Plot, ticks
from llm_trainer.tui.widgets.table import Table


@pytest.fixture
def world(tmp_path):
    world = World(tmp_path)
    yield world
    world.close()


@pytest.fixture
def empty(tmp_path): return World(tmp_path, recorded=False)


# -- Finding and reading --

def test_an_epoch_goal_of_a_resumed_run_is_told_in_two_decimals():
    assert epochs(SimpleNamespace(epoch=.4634, epochs=1.42884)) == "0.5/1.43"
    assert epochs(SimpleNamespace(epoch=1, epochs=2)) == "1.0/2"


async def test_an_empty_workspace_says_what_to_type(empty):
    async with empty.app().run_test() as pilot:
        await shows(pilot, "No run yet", "llm-trainer train --config quickstart --background", "training goes on")


async def test_a_newcomer_finds_the_running_model_and_reads_its_loss_and_eta(world):
    async with world.app().run_test(size=(80, 24)) as pilot:
        text = await shows(pilot, RUNNING)
        row = next(row for row in text.splitlines() if RUNNING in row)
        assert all(part in row for part in ("● training", "61%", "2.909", "2.983", "32s"))
        await press(pilot, "enter")
        text = await shows(pilot, "step 213/347", "ETA 32s", "loss 2.9091", "validation", "steps")
        assert "8.42k tok/s" in text and "⠤" in text


async def test_every_state_has_its_own_word_and_sign(world):
    async with world.app().run_test(size=(120, 30)) as pilot:
        await shows(pilot, "● training", "✓ completed", "✗ failed", "! crashed", "■ stopped", "∞ diverged")


async def test_a_failed_run_tells_why_and_what_to_do(world):
    async with world.app(FAILED).run_test() as pilot:
        await shows(pilot, "oom:", "Halve batch_size to 32", f"llm-trainer resume {FAILED}")


async def test_a_new_run_appears_by_itself(world):
    async with world.app().run_test() as pilot:
        await shows(pilot, "6 runs")
        shutil.copytree(world.space.runs / FINISHED, world.space.runs / "fresh-run")
        await shows(pilot, "7 runs", "fresh-run")


async def test_one_run_is_enough(empty, world):
    for name in (FINISHED, FAILED, CRASHED, STOPPED, DIVERGED): shutil.rmtree(world.space.runs / name)
    async with world.app().run_test() as pilot: await shows(pilot, RUNNING, "1 run ")


async def test_numbers_move_and_only_their_line_is_painted_again(world):
    async with world.app().run_test(size=(80, 24)) as pilot:
        await shows(pilot, RUNNING)
        await settle(pilot)
        table = pilot.app.screen.table
        painted = []
        refresh = table.refresh
        table.refresh = lambda *regions, **options: (painted.extend(regions or ["all"]),
                                                     refresh(*regions, **options))[1]
        path = world.space.runs / RUNNING / "state.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "loss": 1.2345, "step": 300}))
        await shows(pilot, "1.23", "86%")
        assert painted and "all" not in painted and all(region.y == 1 and region.height == 1 for region in painted)


async def test_what_lies_behind_a_dialog_rests_and_is_up_to_date_after_it(world):
    "A change behind a dialog repaints the dialog and all around it: on a slow line no key gets through"
    path = world.space.runs / RUNNING / "state.json"
    async with world.app(interval=0.01).run_test(size=(80, 24)) as pilot:
        await shows(pilot, RUNNING)
        await press(pilot, "question_mark")
        await settle(pilot)
        read, screen = [], pilot.app.screen_stack[-2]
        poll = screen.poll
        screen.poll = lambda: (read.append(1), poll())[1]
        path.write_text(json.dumps({**json.loads(path.read_text()), "loss": 1.2345}))
        await pilot.pause(0.3)
        assert not read and screen.rows[0].loss != 1.2345
        await press(pilot, "escape")
        await shows(pilot, "1.23")


async def test_a_thousand_runs(empty):
    for i in range(1000):
        folder = empty.space.runs / f"run-{i:04d}"
        folder.mkdir()
        (folder / "state.json").write_text(json.dumps({"status": "completed", "step": i, "steps": 1000, "created_at":
                                                       f"2026-05-01T{i // 60:02d}:{i % 60:02d}:00Z", "loss": i / 100}))
    async with empty.app().run_test(size=(80, 24)) as pilot:
        await shows(pilot, "1000 runs", "run-0999")
        await press(pilot, "end")
        await shows(pilot, "run-0000")
        await press(pilot, "slash", *"0777", "enter")
        await shows(pilot, "1 of 1000 runs", "run-0777")


# -- Moving around --

async def test_keys_move_open_and_go_back(world):
    async with world.app().run_test() as pilot:
        await shows(pilot, RUNNING)
        table = pilot.app.screen.table
        await press(pilot, "j", "down", "k")
        assert table.row.id == FINISHED
        await press(pilot, "end")
        assert table.row.id == DIVERGED
        await press(pilot, "enter")
        await shows(pilot, f"/ {DIVERGED}", "non_finite")
        await press(pilot, "escape")
        await shows(pilot, "6 runs")
        assert table.row.id == DIVERGED


async def test_the_filter_narrows_says_so_and_goes_away(world):
    async with world.app().run_test() as pilot:
        await shows(pilot, RUNNING)
        await press(pilot, "slash", *"crash", "enter")
        text = await shows(pilot, "1 of 6 runs")
        assert CRASHED in text and FINISHED not in text
        await press(pilot, "slash", *"zzz", "enter")
        await shows(pilot, "No run matches", "Escape clears the filter")
        await press(pilot, "escape")
        await shows(pilot, "6 runs", FINISHED)


async def test_keys_typed_ahead_of_a_slow_line_reach_the_filter(world):
    async with world.app().run_test() as pilot:
        await shows(pilot, RUNNING)
        for char in "/yes": pilot.app.post_message(events.Key({"/": "slash"}.get(char, char), char))
        await until(pilot, lambda: pilot.app.screen_stack[1].query_one("#filter", Input).value == "yes")
        assert not pilot.app.screen.is_modal


async def test_keys_typed_ahead_of_a_slow_line_reach_their_field(empty):
    async with empty.app().run_test() as pilot:
        await shows(pilot, "No run yet")
        await press(pilot, "n")
        await shows(pilot, "[model]")
        pilot.app.screen.set_focus(pilot.app.screen.query_one("#run-name"))
        for key in ("a", "b", "tab", "c", "d", "tab", "e", "f"):
            pilot.app.post_message(events.Key(key, key if len(key) == 1 else None))
        await until(pilot, lambda: [pilot.app.screen.query_one(f"#{name}", Input).value
                                    for name in ("run-name", "devices", "note")]
                    == ["ab", "cd", "ef"])


def type_at_once(pilot, *keys):
    "All in one packet, as over a slow line"
    for key in keys: pilot.app.post_message(events.Key(key, key if len(key) == 1 else None))


async def test_keys_typed_ahead_of_a_dialog_that_opens_reach_the_dialog(world):
    async with world.app().run_test() as pilot:
        await shows(pilot, RUNNING)
        list_of_runs, asked = pilot.app.screen, world.space.runs / RUNNING / "control" / "stop"
        type_at_once(pilot, "question_mark", "q")  # help, and away with it: the list would have quit
        type_at_once(pilot, "x", "right", "enter")  # stop? yes: the list would have opened the run
        await until(pilot, asked.exists)
        await until(pilot, lambda: pilot.app.screen is list_of_runs and pilot.app.is_running)
        type_at_once(pilot, "y", "j", "enter")  # copy the second choice, j standing for down
        await told(pilot, "Copied: next command")
        type_at_once(pilot, "n", "x", "y", "escape")  # a form whose field x and y belong to
        await until(pilot, lambda: all_heard(pilot.app) and pilot.app.screen is list_of_runs)


async def test_sorting_says_the_order_and_keeps_the_cursor_on_its_run(world):
    async with world.app().run_test() as pilot:
        await shows(pilot, "newest first")
        await press(pilot, "down", "s", "s", "s")
        await shows(pilot, "lowest loss first")
        table = pilot.app.screen.table
        losses = [row.loss for row in table.rows]
        assert losses == sorted(losses) and table.row.id == FINISHED


async def test_the_mouse_works_too(world):
    async with world.app().run_test(size=(80, 24)) as pilot:
        await shows(pilot, RUNNING)
        await pilot.click("#runs", offset=(5, 3))
        assert pilot.app.screen.table.row.id == FAILED
        await pilot.click("#runs", offset=(5, 3), times=2)
        await shows(pilot, f"/ {FAILED}")
        await pilot.click("TabLine", offset=(24, 0))
        await shows(pilot, "No sample yet")
        bar = pilot.app.screen.query_one(KeyBar)
        await pilot.click(bar, offset=(1, 0))
        await shows(pilot, "6 runs")


async def test_every_size_from_tiny_to_huge_is_drawn(world):
    async with world.app().run_test(size=(80, 24)) as pilot:
        await shows(pilot, RUNNING)
        for width, height in ((120, 40), (40, 12), (20, 6), (250, 70), (80, 24)):
            await pilot.resize_terminal(width, height)
            await pilot.pause()
        narrow = text_of(pilot.app)
        await press(pilot, "enter")
        await shows(pilot, "step 213/347")
        for width, height in ((120, 40), (40, 12), (12, 4), (250, 70), (80, 24)):
            await pilot.resize_terminal(width, height)
            await pilot.pause()
        await shows(pilot, "step 213/347", "validation")
        assert "tok/s" not in narrow.splitlines()[1]


async def test_wide_terminals_show_more_columns(world):
    async with world.app().run_test(size=(150, 30)) as pilot:
        text = await shows(pilot, RUNNING)
        assert all(title in text.splitlines()[1] for title in ("step", "epoch", "best", "tok/s", "on", "age", "curve"))


# -- The run screen --

async def test_the_parts_of_a_run(world):
    async with world.app(RUNNING).run_test(size=(100, 30)) as pilot:
        await shows(pilot, "step 213/347")
        await press(pilot, "2")
        await shows(pilot, "learning rate", "gradient norm", "tokens/s", "memory")
        await press(pilot, "3")
        await shows(pilot, "step 200", "The return value of the module")
        await press(pilot, "4")
        await shows(pilot, "validation loss 2.9827")
        await press(pilot, "5")
        await shows(pilot, "Differs from the defaults", "qwen3", "default gpt2")
        await press(pilot, "6")
        text = await shows(pilot, "★", "best latest", "✓ now")
        assert [row.step for row in pilot.app.screen.query_one("#checkpoints", Table).rows] == [200, 150, 100]
        assert "2.98" in text


async def test_log_lines_that_come_while_it_is_hidden_are_as_wide_as_the_others(world):
    long = "step 214/347  epoch 1.23  loss 2.9091  8.42k tokens/s  32s left"
    async with world.app(RUNNING).run_test(size=(80, 24)) as pilot:
        await shows(pilot, "step 213/347")
        await press(pilot, "4")
        await shows(pilot, "validation loss")
        await press(pilot, "1")
        with open(world.space.runs / RUNNING / "train.log", "a") as file: file.write(f"2026-05-28 20:30:00 {long}\n")
        await until(pilot, lambda: any(long in text.plain for text in pilot.app.screen.query_one("#log").texts))
        await press(pilot, "4")
        await shows(pilot, f"20:30:00 {long}")
        await pilot.resize_terminal(60, 24)
        await shows(pilot, "20:30:00 step 214/347", "left")
        await pilot.resize_terminal(100, 24)
        await shows(pilot, f"20:30:00 {long}")


async def test_a_run_without_samples_says_when_one_comes(world):
    (world.space.runs / RUNNING / "samples.jsonl").unlink()
    async with world.app(RUNNING).run_test(size=(80, 24)) as pilot:
        await shows(pilot, "step 213/347")
        await press(pilot, "3")
        await shows(pilot, "No sample yet; one is written every")


async def test_zoom_pan_scale_unit_and_smoothing(world):
    async with world.app(RUNNING).run_test(size=(100, 30)) as pilot:
        await shows(pilot, "steps", "train")
        plot = pilot.app.screen.query_one(Plot)
        whole = (plot._x_min, plot._x_max)
        await press(pilot, "plus", "right")
        assert plot.zoomed and plot._x_max - plot._x_min < whole[1] - whole[0]
        await press(pilot, "0")
        await until(pilot, lambda: (plot._x_min, plot._x_max) == whole)
        await press(pilot, "a")
        assert "tokenss" not in await shows(pilot, "tokens")
        await press(pilot, "a")
        await shows(pilot, "time")
        await press(pilot, "l")
        assert plot.log_scale
        await press(pilot, "m", "m")
        assert [curve.kind for curve in plot.curves] == ["raw", "points"]


async def test_a_queued_run_says_what_it_waits_for(world):
    state = {"status": "queued", "waiting_for": [RUNNING], "created_at": "2026-05-28T20:26:00Z"}
    folder = world.space.runs / "next-run"
    (folder / "control").mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps(state))
    world.hold("next-run")
    async with world.app("next-run").run_test() as pilot:
        await shows(pilot, "○ queued", f"waits for {RUNNING}", "It waits for the device")


async def test_a_run_on_two_devices_says_which_and_who_waits(world):
    path = world.space.runs / RUNNING / "state.json"
    ranks = [dict(rank=rank, host="here", device="cpu", step_seconds=1 + rank / 2, waits=0.33 - rank * 0.33)
             for rank in (0, 1)]
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(ranks=ranks, strategy="ddp")))
    slowest = "rank 1 is the slowest, 1.5 s a step of its own; rank 0 waits 33%"
    async with world.app(RUNNING).run_test(size=(80, 24)) as pilot:
        await shows(pilot, "devices 2 (cpu), ddp", slowest)
    async with world.app(RUNNING).run_test(size=(120, 24)) as pilot:
        assert f"2 (cpu), ddp   {slowest}" in await shows(pilot, "devices 2 (cpu), ddp", slowest)


# -- Comparing --

async def test_compare_shows_curves_figures_and_what_differs(world):
    async with world.app().run_test(size=(100, 30)) as pilot:
        await shows(pilot, RUNNING)
        await press(pilot, "space", "space", "c")
        text = await shows(pilot, "final figures", "Settings that differ")
        assert f"A {RUNNING}" in text and f"B {FINISHED}" in text and "0.003" in text and "0.002" in text
        await press(pilot, "t", "t", "a", "l")
        await shows(pilot, "tokens")
        await press(pilot, "escape")
        await shows(pilot, "2 marked", "◆")
        await press(pilot, "escape")
        assert not pilot.app.screen.table.marked


async def test_comparing_needs_two_runs(world):
    async with world.app().run_test() as pilot:
        await shows(pilot, RUNNING)
        await press(pilot, "space", "c")
        await shows(pilot, "1 marked")
        await told(pilot, "Mark two runs or more")


async def test_the_titles_of_the_figures_stand_over_them_however_short_the_names(world):
    for old, new in ((RUNNING, "a"), (FINISHED, "b")): shutil.copytree(world.space.runs / old, world.space.runs / new)
    async with world.app().run_test(size=(80, 24)) as pilot:
        await shows(pilot, "8 runs")
        await press(pilot, "slash", *"python-docs", "enter")
        pilot.app.screen.table.marked |= {"a", "b"}
        await press(pilot, "c")
        rows = (await shows(pilot, "final figures", "B b")).splitlines()
        head, first = (next(row for row in rows if row.startswith(part)) for part in ("   final figures", " A a"))
        assert "time" in head and len(head.rstrip()) == len(first.rstrip())


# -- Acting --

async def test_stop_asks_first_and_keeping_is_the_default(world):
    asked = world.space.runs / RUNNING / "control" / "stop"
    async with world.app().run_test() as pilot:
        await shows(pilot, RUNNING)
        await press(pilot, "x")
        await shows(pilot, f"Stop {RUNNING}?", "Keep training", "Stop without saving")
        await press(pilot, "enter")
        await press(pilot, "x", "escape")
        assert not asked.exists()
        await press(pilot, "x", "right", "enter")
        await until(pilot, asked.exists)


async def test_what_makes_no_sense_is_greyed_out_and_does_nothing(world):
    async with world.app().run_test() as pilot:
        await shows(pilot, RUNNING)
        await press(pilot, "down", "x")
        assert not pilot.app.screen.is_modal
        await told(pilot, f"{FINISHED} is completed; there is nothing to stop.")
        on = {label: enabled for _, label, _, enabled in pilot.app.screen.query_one(KeyBar).entries()}
        assert on["Resume"] and on["Generate"] and not on["Stop"] and not on["Save"] and not on["Compare"]


async def test_save_now_leaves_the_request_and_says_so(world):
    async with world.app().run_test() as pilot:
        await shows(pilot, RUNNING)
        await press(pilot, "w")
        await until(pilot, (world.space.runs / RUNNING / "control" / "save").exists)
        await told(pilot, "will save at the end")


async def test_resume_shows_the_plan_before_anything_happens(world):
    async with world.app(FINISHED).run_test() as pilot:
        await shows(pilot, "completed")
        await press(pilot, "e")
        await shows(pilot, f"Resume {FINISHED}", "nothing left to train")
        await press(pilot, "2")
        await shows(pilot, "The plan", "epoch 4: 0 left + 2 more", "1.53e-05 in the last step, 0.002 in the next",
                    "347 more, about 1m23s")
        await press(pilot, "escape")
        assert len(Run(world.space.runs / FINISHED).attempts()) == 1


async def test_copy_puts_names_and_commands_into_the_clipboard(world, monkeypatch):
    monkeypatch.delenv("TMUX", raising=False)
    async with world.app().run_test() as pilot:
        await shows(pilot, RUNNING)
        await press(pilot, "y")
        await shows(pilot, "next command", "run folder")
        await press(pilot, "enter")
        assert pilot.app.clipboard == RUNNING
        await press(pilot, "y", "down", "down", "enter")
        assert pilot.app.clipboard == f"llm-trainer status {RUNNING}"


async def test_inside_tmux_a_copy_lands_in_its_buffer(world, tmp_path, monkeypatch):
    "tmux takes no clipboard sequence from a program unless its owner told it to"
    (tmp_path / "tmux").write_text(f'#!/bin/sh\ncase "$*" in *-w*) exit 1;; esac\necho "$@" > {tmp_path}/said; cat > '
                                   f'{tmp_path}/buffer\n')
    (tmp_path / "tmux").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("TMUX", "socket,1,0")
    async with world.app().run_test() as pilot:
        await shows(pilot, RUNNING)
        await press(pilot, "y", "enter")
        await until(pilot, lambda: (tmp_path / "buffer").exists() and (tmp_path / "buffer").read_text() == RUNNING)
        assert (tmp_path / "said").read_text() == "load-buffer -\n"


async def tiny_form(pilot):
    "The form of a new run, with the values of the tiny profile"
    await press(pilot, "n")
    await shows(pilot, "[model]", "run name")
    screen = pilot.app.screen
    screen.query_one("#profile", Select).value = "tiny"
    await until(pilot, lambda: screen.query_one("#value-n_embd", Input).value == "32")
    return screen


async def test_the_form_refuses_what_the_command_line_refuses_and_starts_the_rest(world, monkeypatch):
    monkeypatch.chdir(world.space.root)
    loaded = "torch" in sys.modules
    (world.space.root / "photo.txt").write_bytes(b"JFIF\0")
    async with world.app().run_test(size=(100, 30)) as pilot:
        await shows(pilot, RUNNING)
        screen = await tiny_form(pilot)
        def put(name, value): screen.query_one(f"#{name}", Input).value = value
        # it knows the bounds and names the field
        put("value-n_embd", "33")
        await shows(pilot, "not valid yet", "must be a multiple of n_head")
        put("value-n_embd", "64")
        await shows(pilot, "1 changed")
        await until(pilot, lambda: screen.query_one("#value-n_hidden", Input).placeholder == "256")
        put("value-lr", "fast")
        await shows(pilot, "must be a number above 0")
        await press(pilot, "ctrl+s")
        put("value-lr", "0.00123456789")
        # devices, in the words of the command line
        put("value-device", "cpu")
        for value, says in (("two", "--devices takes a number, a list such as 0,2, or auto; not 'two'."),
                            ("0,1", "--devices 0,1 lists GPUs, and this run uses cpu."),
                            ("3", "3 devices can't share")):
            put("devices", value)
            await shows(pilot, "not valid yet", says)
            await press(pilot, "ctrl+s")
        put("devices", "2")
        # what only a look at the files can tell
        for name, value, says in (("init_from", "nobody", "There is no run nobody"),
                                  ("init_from", RUNNING, "config.json"), ("dataset", "photo.txt", "is not text")):
            put(f"value-{name}", value)
            await shows(pilot, "4 changed")
            await press(pilot, "ctrl+s")
            await shows(pilot, says)
            put(f"value-{name}", screen.query_one(f"#field-{name}").base)
        assert len(list(world.space.runs.iterdir())) == 6
        put("run-name", "pair")
        await shows(pilot, "3 changed")
        await press(pilot, "ctrl+s", "ctrl+s")
        await shows(pilot, "/ pair", "Loss")
    launch.stop(run := Run(world.space.runs / "pair"), now=True)
    assert run.config()["training"]["lr"] == 0.00123456789 and ("torch" in sys.modules) == loaded
    assert run.attempts()[-1]["devices"] == ["cpu", "cpu"]


async def test_resume_takes_devices_and_refuses_them_in_the_words_of_the_command_line(world):
    async with world.app(FINISHED).run_test() as pilot:
        await shows(pilot, "completed")
        await press(pilot, "e", "2")
        await shows(pilot, "The plan")
        devices = pilot.app.screen.query_one("#devices", Input)
        devices.value = "two"
        await shows(pilot, "--devices takes a number, a list such as 0,2, or auto; not 'two'.")
        devices.value = "2"
        await shows(pilot, "devices    2 (cpu), instead of 1")
        await until(pilot, pilot.app.screen.planned.is_set)
        assert pilot.app.screen.wish["devices"] == "2"


# -- Finding one's way --

async def test_footer_palette_and_help_hold_every_action(world):
    from llm_trainer.tui.screens.dialogs import HelpScreen
    async with world.app().run_test(size=(120, 40)) as pilot:
        await shows(pilot, RUNNING)
        for key in (None, "enter"):
            if key:
                await press(pilot, key)
                await shows(pilot, "step 213/347")
            screen = pilot.app.screen
            footer = {label for _, label, _, enabled in screen.query_one(KeyBar).entries() if enabled}
            palette = {command.title.partition("  ")[0] for command in pilot.app.get_system_commands(screen)}
            groups = {"Parts", "Zoom", "Pan"}
            assert footer - palette - groups == {"All"}
            assert {"Resume", "Stop", "Save", "Generate", "Copy"} <= {label for _, label, _,
                                                                      _ in screen.query_one(KeyBar).entries()}
            await press(pilot, "question_mark")
            assert isinstance(pilot.app.screen, HelpScreen)
            await shows(pilot, "never stops training")
            await press(pilot, "escape")


async def test_the_palette_opens_and_acts(world):
    async with world.app().run_test(size=(100, 30)) as pilot:
        await shows(pilot, RUNNING)
        await press(pilot, "ctrl+p")
        await press(pilot, *"Sort")
        await shows(pilot, "Sort  (s)")
        await press(pilot, "enter")
        await shows(pilot, "live first")


async def test_leaving_changes_no_file(world):
    before = {path: path.read_bytes() for path in world.space.runs.rglob("*") if path.is_file()}
    async with world.app().run_test() as pilot:
        await shows(pilot, "Quit (training goes on)")
        await press(pilot, "enter")
        await shows(pilot, "step 213/347")
        await press(pilot, "q")
    assert {path: path.read_bytes() for path in world.space.runs.rglob("*") if path.is_file()} == before


# -- Trouble --

async def test_a_run_deleted_while_open_leaves_a_notice_and_its_curves(world):
    async with world.app(FINISHED).run_test() as pilot:
        await shows(pilot, "loss 2.8050")
        shutil.rmtree(world.space.runs / FINISHED)
        await told(pilot, "Run deleted")
        await shows(pilot, "deleted", "loss 2.8050")
        await press(pilot, "escape")
        await shows(pilot, "5 runs")


async def test_the_folder_of_runs_vanishes_and_comes_back(world):
    async with world.app().run_test() as pilot:
        await shows(pilot, RUNNING)
        away = world.space.runs.with_name("away")
        world.space.runs.rename(away)
        await shows(pilot, "No run yet")
        world.space.runs.write_text("a file")
        await shows(pilot, "can't be read")
        world.space.runs.unlink()
        away.rename(world.space.runs)
        await shows(pilot, RUNNING)


DAMAGE = {
    "state.json": [b"", b"{", b"[]", b'"text"', b"\xff\xfe",
                   b'{"status": 7, "step": "x", "loss": {}, "loss_history": {"a": 1}}',
                   b'{"status": "running", "step": 1e999, "loss": NaN, "epoch": -Infinity, "eta_seconds": 1e308}', b"["
                   * 5000, b'{"status": "no such status", "loss_history": ["a", null, [], 1]}'],
    "meta.json": [b"", b"{", b'{"config": 3, "device": []}',
                  b'{"config": {"data": {"dataset": [1, {}]}}, "created_at": 12}'],
    "metrics.jsonl": [b"", b'{"kind": "train", "step": 1, "lo',
                      b'{"kind":"train","step":"x","loss":[]}\n{"kind":3}\nnull\n',
                      b'{"kind":"train","step":5,"loss":null}\n', b"\x00" * 100,
                      b'{"kind":"train","step":1e400,"loss":1}\n'],
    "samples.jsonl": [b'{"step": {}, "prompt": 3, "text": null}\n', b"[]\n\n{"],
    "train.log": [b"\xff\x00\r\r\rhalf", b"a" * 300_000],
    "notes.txt": [b"\xff" * 100]}


LOOKED_AT = {"state.json": (1, 5, 6, 8), "meta.json": (2, 3)}  # a kind each; of the others, all in one run


def damaged(world, run, **files):
    shutil.copytree(world.space.runs / FINISHED, world.space.runs / run)
    for name, content in files.items(): (world.space.runs / run / name).write_bytes(content)
    return run


async def look_at(pilot, run, dated):
    pilot.app.open_run(run)
    await shows(pilot, run, "Loss")
    await until(pilot, lambda: pilot.app.screen.row.created or not dated)
    await press(pilot, "3", "5", "6", "escape")


async def test_damaged_files_are_shown_as_far_as_they_go(world):
    "All in the list, a kind each on the screens"
    runs = {(name, i): damaged(world, f"{name.partition('.')[0]}-{i}", **{name: content})
            for name in DAMAGE for i, content in enumerate(DAMAGE[name])}
    lines = damaged(world, "lines", **{name: b"\n".join(DAMAGE[name]) for name in DAMAGE if name not in LOOKED_AT})
    for run in runs.values():
        assert RunReader(Run(world.space.runs / run), world.space, lambda: NOW).poll().row.id == run
    async with world.app(interval=0.2).run_test() as pilot:
        await shows(pilot, f"{6 + len(runs) + 1} runs")
        for name in LOOKED_AT:
            for i in LOOKED_AT[name]: await look_at(pilot, runs[name, i], dated=False)
        await look_at(pilot, lines, dated=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", DAMAGE)
async def test_each_damaged_file_is_shown_as_far_as_it_goes(world, name):
    runs = [damaged(world, f"bad-{i}", **{name: content}) for i, content in enumerate(DAMAGE[name])]
    async with world.app().run_test() as pilot:
        await shows(pilot, f"{6 + len(runs)} runs")
        for run in runs: await look_at(pilot, run, dated=name not in LOOKED_AT)


async def test_folders_that_are_no_runs_and_files_that_are_no_files(world):
    runs = world.space.runs
    (runs / "Not A Run").mkdir()
    (runs / "link").symlink_to(runs / FINISHED)
    shutil.copytree(runs / FINISHED, runs / "odd-files")
    for name in ("metrics.jsonl", "train.log", "samples.jsonl"):
        (runs / "odd-files" / name).unlink()
    os.mkfifo(runs / "odd-files" / "metrics.jsonl")
    (runs / "odd-files" / "train.log").symlink_to("/dev/zero")
    (runs / "odd-files" / "samples.jsonl").mkdir()
    async with world.app("odd-files").run_test() as pilot:
        await shows(pilot, "completed", "It ended before the first loss was written")
        await press(pilot, "escape")
        await shows(pilot, "7 runs")


CLOSED = """
import asyncio, sys
from llm_trainer.tui.app import make_app
async def main():
    app = make_app(sys.argv[1], interval=0.05)
    async with app.run_test() as pilot:
        while len(app.screen.rows) < 6: await pilot.pause(0.05)
        row = next(row for row in app.screen.rows if row.id == sys.argv[2])
        print(row.status, "-", row.reason)
asyncio.run(main())"""


def test_a_folder_we_may_not_read_is_shown_as_such(world):
    "In a process without root's right to read everything"
    folder = world.space.runs / STOPPED
    folder.chmod(0)
    bound = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    if bound and (not shutil.which(bound[0]) or subprocess.run([*bound, "true"]).returncode):
        pytest.skip("root needs setpriv")
    try:
        done = subprocess.run([*bound, sys.executable, "-c", CLOSED, str(world.space.root), STOPPED],
                              capture_output=True, text=True)
    finally: folder.chmod(0o700)
    assert done.stdout == f"unknown - No permission to read {folder}.\n", done


async def test_a_reader_that_fails_is_a_notice_not_a_crash(world):
    async with world.app().run_test() as pilot:
        await shows(pilot, RUNNING)
        pilot.app.screen.overview.workspace = None
        await told(pilot, "Could not read")
        pilot.app.screen.overview.workspace = world.space
        await press(pilot, "r")
        await shows(pilot, RUNNING)


# -- Text from runs --

TRICKS = ["\x1b[31m", "\x1b]0;owned\x07", "\x1b]52;c;aGk=\x07", "\x1bP+q\x1b\\", "\x9b2J", "\x9d0;owned\x9c",
          "\x1b[?1049l", "\x1bc",
          "\x07", "\x08\x08", "\r", "\x00", "\x7f", "\x85", "\u202e", "\u2066", "\u200f", "\u061c", "\ud800", "\u2028",
          "\x1b",
          "\x1b[", "\x1b]8;;http://x\x1b\\", "[/]", "[bold]", "[@click=app.quit]x[/]", "[link='x']", "\\[", "[red on",
          "{0}", "%s", "$error"]
HOSTILE = [f"a{before}{trick}{after}z" for trick in TRICKS for before in ("", "[", "\n", "é")
           for after in ("", "]", "\x1b[0m")]


ONCE = [HOSTILE[12 * i + 5 * i % 12] for i in range(len(TRICKS))]  # each trick, in the surroundings by turns


def hostile(folder, texts):
    "A run with the texts in every field that holds text; each field starts with another one, as most are cut"
    folder.mkdir()
    turn = iter(range(0, 1000, 5))
    def text(): return " ".join(texts[(at := next(turn) % len(texts)):] + texts[:at])
    (folder / "state.json").write_text(json.dumps({
        "status": "failed", "phase": text(), "device": text(), "step": 1, "steps": 2,
        "created_at": "2026-05-01T00:00:00Z", "reason": {"code": text(), "message": text()},
        "loss_history": [text(), 1, 2]}))
    (folder / "meta.json").write_text(json.dumps({
        "config": {"data": {"dataset": text(), text(): text()}, "training": {"lr": text()}},
        "device": {"name": text(), "type": text()}, "note": text()}))
    (folder / "notes.txt").write_bytes(text().encode("utf-8", "replace"))
    (folder / "train.log").write_bytes("\n".join(texts).encode("utf-8", "surrogatepass"))
    (folder / "samples.jsonl").write_text("".join(json.dumps({"step": 1, "prompt": each, "text": each}) + "\n"
                                                  for each in texts))
    (folder / "metrics.jsonl").write_text(json.dumps({"kind": text(), "step": 1, "loss": text()}) + "\n")


@pytest.mark.parametrize("groups", [
    pytest.param([ONCE], id="each-once"),
    pytest.param([HOSTILE[i:i + 63] for i in range(0, len(HOSTILE), 63)], id="all", marks=pytest.mark.slow)])
async def test_hostile_text_reaches_no_terminal_and_is_no_markup(empty, groups):
    assert len(HOSTILE) > 300 and all(any(trick in text for text in ONCE) for trick in TRICKS)
    for i, group in enumerate(groups): hostile(empty.space.runs / f"bad-{i}", group)
    async with empty.app().run_test(size=(100, 36)) as pilot:
        await shows(pilot, f"{len(groups)} run")
        seen = [text_of(pilot.app)]
        for i in range(len(groups)):
            pilot.app.open_run(f"bad-{i}")
            await shows(pilot, f"bad-{i}", "failed")
            for key in "123456":
                await press(pilot, key)
                if key == "5": await shows(pilot, "Everything")
                seen.append(text_of(pilot.app))
            await press(pilot, "y")
            seen.append(text_of(pilot.app))
            await press(pilot, "escape", "escape")
        assert not [found.group() for text in seen for found in CONTROL.finditer(text)]
        assert any("[@click=app.quit]" in text for text in seen) and not any("owned" in text for text in seen)
        assert pilot.app.is_running


def test_a_line_is_one_line():
    for text in HOSTILE: assert not CONTROL.search(line(text)) and "\n" not in line(text) and "\t" not in line(text)
    assert line("  a \n b\t c  ") == "a b c" and line("abcdef", 4) == "abc…" and line(None) == ""


# -- Numbers --

def test_columns_keep_the_extremes_of_a_hundred_thousand_points():
    noise = np.random.default_rng(0)
    x, y = np.arange(100_000.0), noise.normal(size=100_000)
    y[54_321] = 99.0
    reduced = columns(x, y, 0, 100_000, 160)
    for i, block in enumerate(np.split(y, 160)):
        assert reduced.low[i] == block.min() and reduced.high[i] == block.max()
        assert np.isclose(reduced.mean[i], block.mean())
    assert reduced.high.max() == 99.0 and len(reduced.x) == 160


def test_smoothing_has_no_lag_and_ignores_what_is_not_a_number():
    x = np.arange(1000.0)
    y = 5 - x / 250
    y[::7] = np.nan
    reduced = columns(x, y, 0, 1000, 100, smoothing=0.04)
    assert np.allclose(reduced.mean[15:-15], 5 - reduced.x[15:-15] / 250, atol=0.02)
    assert len(columns(x, np.full(1000, np.nan), 0, 1000, 100).x) == 0 and len(columns(x, x, 5, 5, 100).x) == 0


def test_ticks_are_round_and_inside():
    for low, high in ((0, 1), (0, 347), (2.25, 6.93), (-3, 1e6), (5, 5 + 1e-9), (0, 1e-7)):
        found = ticks(low, high, 8)
        assert 1 <= len(found) <= 10, (low, high, found)
        assert all(low - 1e-9 <= tick <= high * (1 + 1e-9) + 1e-9 for tick in found), (low, high, found)


def test_braille_draws_the_line_from_the_first_to_the_last():
    assert braille([1, 2], 2) == ["⠠⠊"] or len(braille([1, 2], 2)[0]) == 2
    assert braille([], 4) == ["    "] and braille([1, float("nan"), None], 4) == ["    "]
    assert all(len(row) == 10 for row in braille(range(100), 10, 3))
    top, *_, bottom = braille(range(100), 10, 3)
    assert top.strip() and top[:3].strip() == "" and bottom[:2].strip()


def test_a_replayed_step_replaces_what_was_there():
    series = Series(TRAIN)
    for step, loss in ((1, 5.0), (2, 4.0), (3, 3.0), (2, 4.5), (3, 3.5), (4, 2.0)):
        series.append({"step": step, "loss": loss})
    assert list(series["step"]) == [1, 2, 3, 4] and list(series["loss"]) == [5.0, 4.5, 3.5, 2.0]


def test_a_mix_is_named_by_its_parts():
    def named(dataset): return dataset_of({"config": {"data": {"dataset": dataset}}})
    assert named([{"name": "a/wikitext", "weight": 1}, {"name": "/home/me/data/short.txt"}]) == "wikitext + short.txt"
    assert named("/home/me/texts/") == "texts" and named("/") == "/" and named([7]) == "?"


def test_pauses_between_attempts_are_no_training_time(world):
    run = Run(world.space.runs / FINISHED)
    with open(run.folder / "metrics.jsonl", "a") as file:
        for step, moment in ((400, 1e10), (401, 1e10 + 2)):
            file.write(json.dumps({"kind": "train", "attempt": 2, "step": step, "time": moment, "loss": 2.0}) + "\n")
    curves = Curves(run)
    curves.poll()
    times = curves.train["time"]
    assert times[-1] - times[-2] == pytest.approx(2) and times[-2] - times[-3] < 10


@pytest.mark.slow
def test_memory_stays_flat_over_ten_hours_of_metrics(world):
    curves = Curves(Run(world.space.runs / "nobody"), limit=20_000)
    held, step = [], 0
    for _ in range(10):
        for _ in range(36_000):  # an hour at ten rows a second
            step += 1
            curves.add({"kind": "train", "attempt": 1, "step": step, "time": step / 10, "loss": 7.0 if step == 5000
                        else 3.0, "lr": 1e-3, "grad_norm": 0.5, "tokens": step * 2048, "tokens_per_second": 8e3,
                        "memory_bytes": 6e8})
        held.append(sum(sys.getsizeof(values) for series in (curves.train, curves.val)
                        for values in series.columns.values()))
    assert len(curves.train) <= 40_000 and max(held[2:]) <= 1.3 * max(held[:2])
    assert curves.train["step"][-1] == step and max(curves.train["loss"]) == 7.0


def test_a_follower_of_the_tail_gives_whole_lines_and_survives_a_cut(tmp_path):
    path = tmp_path / "log"
    def follow(): return Follower(path, bytes, tail=10)
    tail = follow()
    assert tail.poll() == []
    path.write_bytes(b"one\ntw")
    assert tail.poll() == [b"one"]
    with open(path, "ab") as file: file.write(b"o\nthree\n")
    assert tail.poll() == [b"two", b"three"]
    path.write_bytes(b"new\n")
    assert tail.poll() == [b"new"]
    path.write_bytes(b"x" * 50 + b"\nend\n")
    assert follow().poll() == [b"end"]


def test_finished_runs_are_not_read_again(world):
    overview = Overview(world.space, lambda: NOW)
    first = {row.id: row for row in overview.poll()}
    again = {row.id: row for row in overview.poll()}
    assert all(again[name] is first[name] for name in (FINISHED, FAILED, STOPPED, DIVERGED))
    assert again[RUNNING] == first[RUNNING]


def test_a_million_lines_are_read_in_parts(world):
    run = Run(world.space.runs / RUNNING)
    reader = RunReader(run, world.space, lambda: NOW)
    reader.poll()
    with open(run.folder / "metrics.jsonl", "a") as file:
        for step in range(1000, 61_000):
            file.write(f'{{"kind":"train","attempt":1,"step":{step},"time":{step},"loss":2.5}}\n')
    while reader.curves.poll() or reader.curves.reading: pass
    assert reader.curves.train.last("step") == 60_999


# -- Loading --

def test_the_watcher_starts_without_torch_plot_or_pydantic(world):
    code = f"""
import asyncio, sys
from llm_trainer.tui.app import make_app
async def main():
    app = make_app({str(world.space.root)!r}, interval=0.05)
    async with app.run_test() as pilot:
        while not app.screen.rows: await pilot.pause(0.05)
        print(*sorted({{"torch", "numpy", "textual_plot", "pydantic", "transformers"}} & set(sys.modules)))
        await pilot.press("enter")
        while not app.screen.row.created: await pilot.pause(0.05)
        print(*sorted({{"torch", "transformers", "datasets"}} & set(sys.modules)), "textual_plot" in sys.modules)
asyncio.run(main())"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split("\n")[:2] == ["", "True"], done


async def test_no_color_and_ascii_show_the_same(world, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    async with world.app(ascii_only=True).run_test(size=(100, 30)) as pilot:
        await until(pilot, lambda: "* training" in text_of(pilot.app))
        for key in ("enter", "2", "3", "4", "5", "6", "question_mark", "escape", "y", "escape", "x", "escape", "escape",
                    "n", "ctrl+p"):
            await press(pilot, key)
            assert text_of(pilot.app).isascii(), key
        colors = {segment.style.color.triplet for strip in pilot.app.screen._compositor.render_strips()
                  for segment in strip
                  if segment.style and segment.style.color and segment.style.color.triplet}
        assert all(max(color) - min(color) <= 1 for color in colors)


@pytest.mark.parametrize("said, ascii_only", [({"LANG": "C"}, True), ({"LC_ALL": "POSIX", "LANG": "en_US.UTF-8"}, True),
                                              ({"LANG": "C", "LC_CTYPE": "C.UTF-8"}, True),
                                              ({"LANG": "C.UTF-8"}, False),
                                              ({"LC_ALL": "C.UTF-8", "LANG": "C"}, False), ({}, False),
                                              ({"LANG": "C", "LC_CTYPE": "en_US.UTF-8"}, False),
                                              ({"LANG": "C", "LLM_TRAINER_ASCII": "0"}, False)])
def test_a_locale_without_other_letters_asks_for_ascii(monkeypatch, said, ascii_only):
    "Python itself makes UTF-8 of such a locale, so its own encoding doesn't tell"
    for name in ("LC_ALL", "LC_CTYPE", "LANG", "LLM_TRAINER_ASCII"): monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "__stdout__", type("Out", (), {"encoding": "utf-8"}))
    for name, value in said.items(): monkeypatch.setenv(name, value)
    assert wants_ascii() == ascii_only


def test_ascii_is_as_wide_as_what_it_stands_for():
    from rich.cells import cell_len
    for text in ("● training ━━━╸──", "⠑⠢⠤⢄⣀", "日本語", "★ ✓ ✗ ▸ ◆", "┤└┴┼"):
        assert to_ascii(text).isascii() and len(to_ascii(text)) == cell_len(text)


# -- Writing --

async def test_a_checkpoint_that_a_run_replaces_while_it_is_loaded_is_no_error(world):
    asked = []

    async def ask(folder, wish):
        asked.append(folder.name)
        if len(asked) == 1:
            shutil.rmtree(folder)
            yield {"error": f"{folder} does not exist"}
        else:
            yield {"text": "a"}
            yield {"tokens": 1, "seconds": 1, "finish": "length"}
    async with world.app(RUNNING).run_test() as pilot:
        await shows(pilot, "step 213/347")
        await press(pilot, "g")
        pilot.app.generator.ask = ask
        pilot.app.screen.query_one("#knob-checkpoint", Input).value = "latest"
        await press(pilot, "ctrl+g")
        await shows(pilot, "1 tokens in", "step-00000150")
        assert asked == ["step-00000200", "step-00000150"]


# -- Pictures --

WRITTEN = ("class is a new object with the name of the given module. If the default is not given, the value is "
           "returned "
           "as a string, and the list of the names is sorted.\n\nThe method raises a TypeError if the first argument "
           "is not an "
           "instance of the class.")


def writes(screen) -> None:
    "What a child process answers, as it was recorded from a real one"
    screen.prompt = "The "
    for answer in ({"ready": True, "device": "cpu"}, {"text": WRITTEN},
                   {"tokens": 93, "seconds": 0.27, "finish": "length"}):
        screen._answer(answer, "step-00000200", [])


def picture(name: str, size: tuple[int, int] = (80, 24), keys: tuple[str, ...] = (), run: str | None = None,
            waits: str = "", wants: str = "", recorded: bool = True, then=None, marks=()):
    return pytest.param(size, keys, run, waits, wants, recorded, then, id=name, marks=marks)


PICTURES = [
    picture("runs", waits=RUNNING), picture("runs-wide", (120, 32), waits=RUNNING),
    picture("empty", waits="No run yet", recorded=False), picture("narrow", (60, 20), waits=RUNNING),
    picture("running", run=RUNNING, waits="validation"),
    picture("running-tall", (110, 40), run=RUNNING, waits="gradient norm"),
    picture("finished", run=FINISHED, waits="validation", marks=pytest.mark.slow),
    picture("failed", run=FAILED, waits="oom:"),
    picture("crashed", run=CRASHED, waits="Its process is gone", marks=pytest.mark.slow),
    picture("rates", keys=("2",), run=RUNNING, waits="ETA 32s", wants="gradient norm"),
    picture("samples", keys=("3",), run=RUNNING, waits="ETA 32s", wants="step 200"),
    picture("log", keys=("4",), run=FINISHED, waits="completed", wants="validation loss"),
    picture("config", keys=("5",), run=RUNNING, waits="ETA 32s", wants="Differs"),
    picture("checkpoints", keys=("6",), run=RUNNING, waits="ETA 32s", wants="best latest"),
    picture("compare", (100, 30), keys=("space", "space", "c"), waits=RUNNING, wants="Settings that differ"),
    picture("stop", keys=("x",), waits=RUNNING, wants="Keep training"),
    picture("resume", keys=("e", "2"), run=FINISHED, waits="completed", wants="more, about"),
    picture("start", keys=("n",), waits=RUNNING, wants="[model]"),
    picture("generate", keys=("g",), waits=RUNNING, wants="^g writes", then=writes)]


@pytest.mark.parametrize("size, keys, run, waits, wants, recorded, then", PICTURES)
def test_picture(tmp_path, snap_compare, size, keys, run, waits, wants, recorded, then):
    world = World(tmp_path, recorded)

    async def story(pilot):
        await shows(pilot, waits)
        await press(pilot, *keys)
        if wants: await shows(pilot, wants)
        if then: then(pilot.app.screen)
        await settle(pilot)
    try: assert snap_compare(world.app(run), terminal_size=size, run_before=story)
    finally: world.close()


# -- Small screens, quick hands, long logs --

async def test_a_run_s_screen_opens_with_what_the_list_knew(world):
    async with world.app().run_test() as pilot:
        await shows(pilot, RUNNING)
        await until(pilot, lambda: pilot.app.screen.target is not None)
        known = next(row for row in pilot.app.screen.rows if row.id == RUNNING)
        pilot.app.open_run(RUNNING)
        assert pilot.app.screen.row == known  # before anything was read again
        await until(pilot, lambda: pilot.app.screen.query("#plot") and "training" in text_of(pilot.app))


async def test_undo_brings_the_profile_s_value_back_into_its_field(world):
    async with world.app().run_test(size=(110, 40)) as pilot:
        await shows(pilot, RUNNING)
        await press(pilot, "n")
        await until(pilot, lambda: any(field.id for field in pilot.app.screen.query(Input)))
        await until(pilot, lambda: len(pilot.app.screen.query("Field")) > 3)
        field = next(field for field in pilot.app.screen.query("Field") if field.input.value)
        before = field.input.value
        field.input.focus()
        await press(pilot, "end", "7")
        assert field.input.value == before + "7"
        await press(pilot, "ctrl+u")
        assert field.input.value == before


async def test_a_low_window_shows_a_run(world):
    async with world.app().run_test(size=(40, 10)) as pilot:
        await shows(pilot, RUNNING)


async def test_the_log_is_searched(world):
    async with world.app().run_test(size=(100, 30)) as pilot:
        await shows(pilot, RUNNING)
        pilot.app.open_run(RUNNING)
        await press(pilot, "4")
        log = pilot.app.screen.query_one("#log")
        await until(pilot, lambda: len(log.texts) > 5)
        await press(pilot, "slash", *"saved")
        await until(pilot, lambda: "of " in text_of(pilot.app) and log.wanted == "saved")
        assert 0 < len(log.lines) < len(log.texts) and all("saved" in line.text for line in log.lines)
        await press(pilot, "escape")
        await until(pilot, lambda: log.wanted == "" and len(log.lines) >= len(log.texts))
        assert pilot.app.screen.run_id == RUNNING


def test_long_names_keep_the_end_that_tells_them_apart():
    from llm_trainer.tui.glyphs import name
    long = [f"sweep-over-the-learning-rate-{i}" for i in (1, 2)]
    assert name(long[0], 16) != name(long[1], 16) and all(len(name(text, 16)) == 16 for text in long)
    assert name("owl", 16) == "owl"


async def test_compare_draws_bits_per_byte_where_tokenizers_differ_and_warns_of_losses(world):
    path = world.space.runs / STOPPED / "meta.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_hash": "another"}))
    async with world.app().run_test(size=(110, 34)) as pilot:
        await shows(pilot, RUNNING)
        from llm_trainer.tui.screens.compare import CompareScreen
        pilot.app.push_screen(CompareScreen([FINISHED, STOPPED]))
        await until(pilot, lambda: "bits per byte" in text_of(pilot.app)
                    and len(pilot.app.screen.query_one(Plot).curves) == 4)
        val = Curves(Run(world.space.runs / FINISHED))
        val.poll()
        assert any(len(curve.y) and curve.y[-1] == val.val.last("bits_per_byte")
                   for curve in pilot.app.screen.query_one(Plot).curves)
        await press(pilot, "b")
        await until(pilot, lambda: "their tokenizers differ" in text_of(pilot.app))
