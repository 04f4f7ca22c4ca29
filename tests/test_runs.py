"""The run folder: it is never half there, says the truth about its process, and no file in it can hurt a reader."""
import errno
import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest

from llm_trainer.system import failpoints, locks, process
from llm_trainer.errors import BusyError, NotFoundError, UsageError
from llm_trainer.system.files import Appender, Follower, encode, read_lines, write_whole
from llm_trainer.runs.run import Run, _misfits, _number, _whole, _words, create_run, find_run, list_runs, sweep
from llm_trainer.runs.state import State, derive
from llm_trainer.runs.writer import RunWriter

CONFIG = {"training": {"epochs": 2, "lr": 0.001}}


@pytest.fixture
def runs(tmp_path): return tmp_path / "runs"


@pytest.fixture
def writer(runs):
    run = create_run(runs, CONFIG, "one", locked=True)
    run.add_attempt(from_step=0, target_epochs=2, target_steps=None, changed={}, lr_plan=None, argv=[])
    return RunWriter(run, run.lock)


def step(n, loss=1.0, **kw):
    values = dict(step=n, epoch=n / 10, tokens=n * 8, loss=loss, lr=0.1, grad_norm=1.0, tokens_per_second=5.0,
                  memory_bytes=9, eta_seconds=1.0)
    return SimpleNamespace(kind="step", **{**values, **kw})


def event(kind, **kw): return SimpleNamespace(kind=kind, **kw)


# -- The folder --

def test_a_new_run_is_whole_private_and_locked_when_it_can_first_be_seen(runs):
    run = create_run(runs, CONFIG, "a", ["train"], "a note", {"run_id": "b", "step": 3}, locked=True)
    assert run.status().status == "queued" and run.locked
    assert run.meta | {"created_at": 0} == {"format_version": 1, "run_id": "a", "created_at": 0, "argv": ["train"],
                                            "config": CONFIG, "note": "a note", "parent": {"run_id": "b", "step": 3}}
    for path in (run.folder, *run.folder.iterdir()):
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path
    assert os.listdir(runs) == ["a"]


def test_a_name_is_taken_once(runs):
    create_run(runs, CONFIG, "a")
    with pytest.raises(UsageError, match="llm-trainer resume a"): create_run(runs, CONFIG, "a")
    busy = create_run(runs, CONFIG, "b", locked=True)
    with pytest.raises(BusyError): create_run(runs, CONFIG, "b")
    assert busy.locked and sorted(os.listdir(runs)) == ["a", "b"]


def test_a_failed_creation_leaves_nothing(runs):
    failpoints.arm("state.write=enospc")
    try:
        with pytest.raises(OSError): create_run(runs, CONFIG, "a")
    finally: failpoints.arm(None)
    assert os.listdir(runs) == []


@pytest.mark.parametrize("name", ["", ".", "..", "../a", "/etc", "a/b", "a\\b", "A", "1a", "-a", "a b", "a.b", "a\x00",
                                  "a\n", "ä", "a" * 64, "a\u202eb", "\ud800", "%2e%2e"])
def test_a_name_that_could_be_a_path_or_a_flag_is_refused(runs, name):
    runs.mkdir()
    with pytest.raises(UsageError): create_run(runs, CONFIG, name)
    with pytest.raises(UsageError): find_run(runs, name)
    assert os.listdir(runs) == []


def test_meta_is_completed_once(writer):
    writer.log(event("prepared", meta={"device": {"type": "cpu"}, "parameters": 7, "steps": 40}))
    assert writer.run.meta["parameters"] == 7 and writer.run.meta["config"] == CONFIG
    assert (writer.run.state().device, writer.run.state().steps) == ("cpu", 40)
    with pytest.raises(ValueError): writer.run.complete_meta(parameters=8)
    writer.log(event("prepared", meta={"device": {"type": "cpu"}, "parameters": 8}))  # a resume tells it again
    assert writer.run.meta["parameters"] == 7


def test_what_was_typed_is_kept_exactly_and_printed_safely(runs):
    argv = ["train", "--sample-prompt", "\x1b[2J\u202eévil\ud800"]
    run = create_run(runs, {"sampling": {"sample_prompt": argv[2]}}, argv=argv)
    assert run.meta["argv"] == argv and run.config()["sampling"]["sample_prompt"] == argv[2]
    assert all(32 <= b < 127 or b == 10 for b in (run.folder / "meta.json").read_bytes())


def test_the_config_in_force_holds_what_later_attempts_changed(writer):
    writer.run.add_attempt(changed={"lr": [0.001, 0.01]})
    writer.run.add_attempt(changed={})
    assert writer.run.config() == {"training": {"epochs": 2, "lr": 0.01}}
    assert [a["attempt"] for a in writer.run.attempts()] == [1, 2, 3]


# -- Finding --

def test_runs_are_listed_newest_first_and_found_by_a_unique_beginning(runs):
    assert list_runs(runs) == []
    with pytest.raises(NotFoundError): find_run(runs)
    for name in ("wiki-a", "wiki-b", "docs"): create_run(runs, CONFIG, name)
    assert [run.id for run in list_runs(runs)] == ["docs", "wiki-b", "wiki-a"]
    assert find_run(runs).id == "docs" and find_run(runs, "d").id == "docs" and find_run(runs, "wiki-a").id == "wiki-a"
    with pytest.raises(UsageError, match="wiki-b, wiki-a"): find_run(runs, "wiki")
    with pytest.raises(NotFoundError, match="did you mean wiki-a"): find_run(runs, "wika")


def test_only_real_folders_of_the_workspace_are_runs(runs, tmp_path):
    outside = create_run(tmp_path / "outside", CONFIG, "a")
    runs.mkdir()
    (runs / "linked").symlink_to(outside.folder)
    (runs / "file").touch()
    (runs / "empty").mkdir()
    (runs / ".hidden").mkdir()
    assert list_runs(runs) == []
    with pytest.raises(NotFoundError): find_run(runs, "linked")


# -- Status --

def test_status_follows_the_lock(writer):
    run = writer.run
    writer.log(event("phase", name="training"))
    assert run.status().status == "running"
    writer.lock.release()
    assert run.status().status == "crashed" and run.status().stored_status == "running"
    writer.lock.acquire()
    writer.finish("completed")
    assert run.status().status == "completed"


def test_a_pid_says_nothing_about_being_alive(runs):
    run = create_run(runs, CONFIG)
    write_whole(run.folder / "state.json", {**State().to_record(), **process.identity(), "status": "running"})
    assert run.status().status == "crashed"


def test_a_run_says_its_name(runs): assert repr(create_run(runs, CONFIG, "a")) == "Run(a)"


def test_energy_is_that_of_the_gpus_that_train():
    from llm_trainer.runs.writer import _gpus
    assert _gpus(["cuda:0", "cuda:2"]) == (0, 2) and _gpus(["cuda:1"]) == (1,) and _gpus(["cuda"]) == (0,)
    assert _gpus(["cuda:0", "cuda:1"] * 2) == (0, 1) and _gpus(["cpu"]) == ()  # two machines: this one's


def test_a_silent_loop_is_stalled_and_a_set_clock_is_not(runs):
    now = SimpleNamespace(wall=1e9, mono=5e3)
    run = create_run(runs, CONFIG, locked=True)
    writer = RunWriter(run, run.lock, clock=lambda: now.mono, wall=lambda: now.wall)
    writer.log(event("phase", name="training"))
    assert run.status(monotonic=now.mono + 500, wall=now.wall).status == "running"  # the first step may take long
    for n in range(1, 6):
        now.mono += 10
        writer.log(step(n))
    def status(ahead, wall=0): return run.status(monotonic=now.mono + ahead, wall=now.wall + wall).status
    assert [status(59), status(99), status(101)] == ["running", "running", "stalled"]  # ten times the usual ten seconds
    assert status(1, wall=86400) == status(1, wall=-86400) == "running"
    writer.log(event("phase", name="compiling"))
    assert [status(500), status(2000)] == ["running", "stalled"]
    state = replace(run.state(), boot_id="another machine's")
    assert derive(state, True, wall=state.progress_at + 3000) == "stalled"


def test_a_run_of_another_machine_goes_by_its_signs_of_life_where_its_lock_is_not_seen(runs):
    run, far = create_run(runs, CONFIG), dict(host="far-away", boot_id="another")
    def status(later, **changes):
        record = {**run.state().to_record(), **process.identity(), "status": "running", "heartbeat": 1e6, **changes}
        write_whole(run.folder / "state.json", record)
        return run.status(wall=1e6 + later).status
    assert [status(59, **far), status(61, **far), status(601, **far)] == ["running", "stalled", "crashed"]
    assert status(59, **far, heartbeat=None) == "crashed" and status(59, **far, status="queued") == "queued"
    assert status(61, **far, status="failed") == "failed"
    for near in ({}, dict(host="far-away"), dict(boot_id="another"), dict(host=None, boot_id="another")):
        assert status(1, **near) == "crashed", near  # this machine, a container of it, or what it was before it booted


def test_a_writer_that_was_given_up_has_no_more_to_say(writer):
    writer.log(event("phase", name="training"))
    writer.log(step(1))
    writer.update(val_loss=2.0)
    run = writer.run
    given_up = {**run.state().to_record(), "status": "failed", "reason": {"code": "rank_lost", "message": "silent"}}
    write_whole(run.folder / "state.json", given_up, aside=".other")
    writer.beat()
    writer.log(step(2))
    writer.finish("completed")
    assert run.state().status == "failed" and run.state().reason == given_up["reason"] and run.state().step == 1
    other = RunWriter(run, run.lock)  # of the attempt that goes on
    other.log(event("phase", name="training"))
    assert run.state().status == "running"
    write_whole(run.folder / "state.json", {**run.state().to_record(), "loss": 5.0})  # no end: a restored file
    other.update(val_loss=1.0)
    assert run.state().val_loss == 1.0 and not list(run.folder.glob(".*"))


@pytest.mark.parametrize("kind, proper, others", [
    (_whole, (0, 1, 2**63 - 1), (-1, 2**63, True, 1.0, "1", [1])),
    (_number, (0, 0.0, 0.5, 2**63 - 1), (-0.5, -1, 2**63, 2.0**63, float("nan"), True, "1")),
    (_words, ([], ["a", "b"]), ("a", [1], ["a", None], {"a": "b"}))], ids=["whole", "number", "words"])
def test_what_a_record_may_hold(kind, proper, others):
    for value in (None, *proper): assert not _misfits({"it": value}, {"it": kind})
    for value in others: assert _misfits({"it": value}, {"it": kind}) == ["it"], value


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"null", b"\xff" * 99, b"[" * 200_000,
                                    b'{"status": 7, "step": "x"}', b'{"status": "running", "loss_history": 3}'])
def test_a_damaged_state_says_nothing_of_its_run_and_has_every_key(runs, damage):
    run = create_run(runs, CONFIG)
    (run.folder / "state.json").write_bytes(damage)
    status = run.status()
    assert (status.step, status.loss_history, status.run_id) == (0, [], run.id)
    said = ("crashed", None) if b'"running"' in damage else ("unknown", "damaged")
    assert (status.status, (status.reason or {}).get("code")) == said
    assert [r.id for r in list_runs(runs)] == [run.id]


def test_a_run_deleted_meanwhile_reads_as_empty(runs):
    run = Run(runs / "gone")
    assert (run.meta, run.attempts(), run.metrics(), run.samples(), run.log_tail(), run.notes(), run.asked()) == (
        {}, [], [], [], [], "", set())
    assert run.follow().poll() == [] and run.status().status == "unknown" and run._repr_markdown_()


def test_readers_follow_no_link_and_wait_for_no_pipe(runs, tmp_path):
    run = create_run(runs, CONFIG)
    (tmp_path / "secret").write_text('{"secret": 1}\n')
    for name in ("meta.json", "metrics.jsonl"):
        (run.folder / name).unlink(missing_ok=True)
        (run.folder / name).symlink_to(tmp_path / "secret")
    for name in ("train.log", "samples.jsonl"): os.mkfifo(run.folder / name)
    assert (run.meta, run.metrics(), run.log_tail(), run.samples(), run.follow().poll()) == ({}, [], [], [], [])


# -- Writing --

def test_metrics_keep_the_last_record_of_a_step_and_null_for_nan(writer):
    for n, loss in ((1, 5.0), (2, float("nan")), (3, 3.0), (2, 4.0)): writer.log(step(n, loss))
    writer.log(step(4, None))
    writer.log(event("evaluated", step=3, epoch=0.3, tokens=24, loss=2.0, perplexity=float("inf"), bits_per_byte=1.0,
                     parts=(("a", 1.5), ("b", float("nan")))))
    assert [(r["step"], r["loss"]) for r in writer.run.metrics("train")] == [(1, 5.0), (2, 4.0), (3, 3.0)]
    (val,) = writer.run.metrics("val")
    assert val["parts"] == [["a", 1.5], ["b", None]] and "a 1.5000, b nan" in writer.run.log_tail(9)[-1]
    assert val["perplexity"] is None and val["format_version"] == 1 and val["attempt"] == 1
    assert b"NaN" not in (writer.run.folder / "metrics.jsonl").read_bytes()


def test_the_state_is_rewritten_twice_a_second_at_most_while_stepping(runs):
    now = [0.0]
    run = create_run(runs, CONFIG, locked=True)
    writer = RunWriter(run, run.lock, clock=lambda: now[0])
    writer.log(event("phase", name="training"))
    seen = set()
    for n in range(1, 1001):
        now[0] += 0.01
        writer.log(step(n))
        seen.add((run.folder / "state.json").stat().st_ino)
        seen.add(run.state().step)
    assert len({s for s in seen if s <= 1000}) <= 22
    writer.log(event("phase", name="saving"))
    assert run.state().step == 1000 and len(run.state().loss_history) == 60


@pytest.mark.parametrize("action", ["enospc", "eio"])
def test_no_error_of_the_disk_reaches_the_training(writer, action):
    failpoints.arm(f"metrics.append={action}:2,state.write={action}:1")
    try:
        writer.log(event("phase", name="training"))
        for n in range(1, 4): writer.log(step(n))
    finally: failpoints.arm(None)
    writer.update()
    assert [r["step"] for r in writer.run.metrics()] == [1, 3]
    assert writer.run.state().write_errors == 2


def test_a_full_disk_can_still_be_told(writer, monkeypatch):
    failpoints.arm("state.write=enospc")
    try: writer.finish("failed", "disk_full", "No space is left.")
    finally: failpoints.arm(None)
    assert writer.run.status().status == "failed" and writer.run.state().reason["code"] == "disk_full"
    assert not list(writer.run.folder.glob(".*"))


def test_a_file_size_limit_does_not_end_the_run(runs):
    code = """
import resource, signal, sys
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, "tests")
from test_runs import create_run, RunWriter, step, event, CONFIG
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
run = create_run(Path(sys.argv[1]), CONFIG, "full", locked=True)
writer = RunWriter(run, run.lock)
resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))
for n in range(200): writer.log(step(n))
writer.finish("completed")
"""
    subprocess.run([sys.executable, "-c", code, str(runs)], check=True, cwd=os.path.dirname(os.path.dirname(__file__)))
    run = find_run(runs, "full")
    assert run.status().status == "completed" and run.state().write_errors > 0
    assert 0 < len(run.metrics()) < 200


@pytest.mark.parametrize("tail, left", [(b'{"step": 2', [1]), (b'{"step": 2}', [1, 2]), (b"\xff\xfe", [1]), (b"", [1])])
def test_a_torn_last_line_is_mended(tmp_path, tail, left):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"step": 1}\n' + tail)
    file = Appender(path)
    file.write(encode({"step": 9}))
    file.close()
    assert [r["step"] for r in read_lines(path)] == [*left, 9]
    assert path.read_bytes().count(b"\n") == len(left) + 1


def test_every_cut_of_a_metrics_file_can_be_read_and_continued(tmp_path):
    whole = b"".join(encode({"step": n}) for n in range(1, 4))
    for cut in range(len(whole) + 1):
        path = tmp_path / f"{cut}.jsonl"
        path.write_bytes(whole[:cut])
        file = Appender(path)
        file.write(encode({"step": 9}))
        file.close()
        steps = [r["step"] for r in read_lines(path)]
        assert steps[-1] == 9 and steps[:-1] == [1, 2, 3][:len(steps) - 1]
        assert len(path.read_bytes().splitlines()) == len(steps)


def test_the_writer_needs_the_lock(runs):
    run = create_run(runs, CONFIG)
    with pytest.raises(BusyError): RunWriter(run, locks.Lock(run.folder / "lock"))


def test_data_cannot_paint_the_terminal(writer):
    evil = "\x1b[31m\x1b]0;title\x07a\x9bb\u202ec\ud800\x7f"
    writer.log(event("sampled", step=1, prompt=evil, text=evil))
    writer.log(event("note", message=evil))
    writer.finish("failed", "error", evil)
    with open(writer.run.folder / "train.log", "ab") as f: f.write(f"\r50%\r99% {evil[:-2]}\n".encode())
    shown = json.dumps([writer.run.samples(), writer.run.log_tail(), writer.run.state().to_record()],
                       ensure_ascii=False)
    assert not set(shown) & set("\x1b\x07\x9b\u202e\ud800\x7f\r")
    assert writer.run.log_tail(1)[0].startswith("99% ")


# -- Following and asking --

def test_a_follower_sees_each_row_once_through_growth_tearing_and_replacement(tmp_path):
    path = tmp_path / "metrics.jsonl"
    follower = Follower(path, limit=64)
    assert follower.poll() == []
    path.write_bytes(b'{"step": 1}\n{"step"')
    assert follower.poll() == [{"step": 1}]
    with open(path, "ab") as f: f.write(b': 2}\n\xff garbage\n')
    assert follower.poll() == [{"step": 2}]
    path.write_bytes(b'{"step": 7}\n')
    assert follower.poll() == [{"step": 7}]
    with open(path, "ab") as f: f.write(b"".join(encode({"step": n}) for n in range(50)))
    rows = []
    while new := follower.poll(): rows += new
    assert [r["step"] for r in rows] == list(range(50))


def test_requests_are_seen_once_done_and_shown(writer):
    run = writer.run
    assert run.request("save") and not run.request("save")
    assert writer.requests() == {"save"}
    writer.log(event("saved", step=4, path="p", bytes=1, seconds=0.1))
    assert run.asked() == set() and "save" in run.state().acknowledged and run.state().checkpoint_step == 4
    run.request("save")
    writer.asked.looked = -1e9
    assert writer.requests() == {"save"}
    for event_ in (event("phase", name="saving"), event("note", message="not saved"), event("phase", name="training")):
        assert run.asked() == {"save"}
        writer.log(event_)
    assert run.asked() == writer.requests() == set()
    run.request("stop")
    writer.asked.looked = -1e9
    assert writer.requests() == {"stop"} and run.state().phase == "stopping"
    writer.log(event("phase", name="saving"))
    assert run.state().phase == "stopping"  # until the end
    writer.finish("stopped")
    assert run.asked() == set()


@pytest.mark.parametrize("name", ["../stop", "a/b", "", ".x"])
def test_a_request_is_a_plain_name_in_control(writer, name):
    with pytest.raises(UsageError): writer.run.request(name)


def test_control_is_no_door_out(writer, tmp_path):
    (writer.run.folder / "control").rmdir()
    (writer.run.folder / "control").symlink_to(tmp_path)
    with pytest.raises(OSError) as e: writer.run.request("stop")
    assert e.value.errno in (errno.ELOOP, errno.ENOTDIR) and not (tmp_path / "stop").exists()


# -- Cost --

@pytest.mark.skipif(not process.LINUX, reason="reads the peak memory from /proc")
def test_status_reads_no_metrics_and_imports_little(runs):
    run = create_run(runs, CONFIG)
    with open(run.folder / "metrics.jsonl", "wb") as f:
        for _ in range(1000): f.write(encode({"step": 1, "loss": 1.0, "kind": "train"}) * 1000)
    code = ("import sys; from pathlib import Path; from llm_trainer.runs.run import find_run;"
            "find_run(Path(sys.argv[1])).status(); heavy = {'torch', 'numpy', 'pydantic'} & set(sys.modules);"
            "print(Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0], *heavy)")
    out = subprocess.run([sys.executable, "-c", code, str(runs)], capture_output=True, text=True, check=True).stdout
    assert int(out.split()[0]) < 50_000 and len(out.split()) == 1  # kB


def test_sweeping_passes_over_a_folder_that_gets_its_name_meanwhile(tmp_path):
    over = threading.Event()
    def make():
        while not over.is_set():
            for i in range(20): (tmp_path / f".new-{i}").mkdir()
            for i in range(20): (tmp_path / f".new-{i}").rename(tmp_path / f"run-{i}")
            for i in range(20): (tmp_path / f"run-{i}").rmdir()
    maker = threading.Thread(target=make)
    maker.start()
    try:
        for _ in range(2000): sweep(tmp_path)
    finally:
        over.set()
        maker.join()
