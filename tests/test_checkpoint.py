"""The checkpoint store: the format byte for byte, every bit of a manifest, every station of a save."""
import fcntl
import hashlib
import json
import os
import random
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import threading
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from conftest import INSTEAD, instead
from safetensors.torch import save as reference_bytes
from torture.store import ACTIONS, HERE, content, exit_code_of, small_store, sound

from hearing import Heard
from llm_trainer.system import failpoints
from llm_trainer.model.safetensors import all_finite, non_finite, read_header, read_tensors, write_tensors
from llm_trainer.system.files import file_hash, replace_file, sealed, unsealed, write_file
from llm_trainer.training.checkpoint import Checkpoints, SaveFailed, place, step_name, verify, weights_hash
from llm_trainer.errors import CheckpointError, NotFoundError, RunFailed, UsageError

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.int16,
          torch.int8,
          torch.uint8, torch.bool, torch.complex64, torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn,
          torch.float8_e5m2]


@pytest.fixture(autouse=True)
def disarmed():
    yield
    failpoints.arm(None)


@pytest.fixture
def store(tmp_path): return small_store(tmp_path)


def random_tensors(rng: random.Random) -> dict:
    def shape(): return [rng.randrange(0, 5) for _ in range(rng.randrange(0, 4))]
    def bytes_of(dtype, s):
        return torch.randint(0, 2, s).to(dtype) if dtype == torch.bool else torch.randint(0, 100, s).to(dtype)
    return {f"{rng.choice('abé')}.{i}": bytes_of(rng.choice(DTYPES), shape()) for i in range(rng.randrange(0, 12))}


@pytest.mark.parametrize("seed", range(40))
def test_tensors_equal_the_reference_writer_byte_for_byte(tmp_path, seed):
    tensors, metadata = random_tensors(random.Random(seed)), {"format": "pt"} if seed % 2 else None
    digest = write_tensors(tmp_path / "x", tensors, metadata)
    assert (tmp_path / "x").read_bytes() == reference_bytes(tensors, metadata)
    assert digest == hashlib.sha256((tmp_path / "x").read_bytes()).hexdigest()
    back = read_tensors(tmp_path / "x")
    assert back.keys() == tensors.keys()
    def raw(t): return t.reshape(-1).view(torch.uint8)
    for name, t in tensors.items(): assert back[name].dtype == t.dtype and torch.equal(raw(back[name]), raw(t))


def test_views_and_slices_are_written_as_they_look(tmp_path):
    base = torch.arange(24.).reshape(4, 6)
    views = {"t": base.T, "slice": base[1:3, ::2], "expanded": torch.ones(1).expand(5),
             "grad": base.clone().requires_grad_()}
    write_tensors(tmp_path / "x", views)
    assert all(torch.equal(t, views[name]) for name, t in read_tensors(tmp_path / "x").items())


def test_a_long_file_is_hashed_whole_though_the_hash_runs_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("llm_trainer.system.files.AHEAD", 1000)
    chunks = [os.urandom(777) for _ in range(50)]
    digest = hashlib.sha256(b"".join(chunks)).hexdigest()
    assert write_file(tmp_path / "x", chunks) == digest == file_hash(tmp_path / "x")


def header(length=None, text=None, data=b"", **tensors):
    text = json.dumps(tensors).encode() if text is None else text
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
LIES = {
    "empty": b"", "short": b"\1\0\0", "huge header": header(2**63, b"{}"), "header past the end": header(100, b"{}"),
    "no JSON": header(text=b"hello!"), "a list": header(text=b"[1, 2]"), "deep": header(text=b"[" * 200_000),
    "deep object": header(text=b'{"a":' * 50_000 + b"1" + b"}" * 50_000), "NaN": header(text=b'{"a": NaN}'),
    "huge number": header(text=b'{"a": ' + b"9" * 10_000 + b"}"), "bytes missing": header(a=A, data=b"1234"),
    "bytes to spare": header(a=A, data=b"123456789"), "unknown dtype": header(a={**A, "dtype": "F31"}, data=bytes(8)),
    "shape lies": header(a={**A, "shape": [3]}, data=bytes(8)),
    "negative": header(a={**A, "shape": [-1, -2]}, data=bytes(8)),
    "overlap": header(a=A, b=A, data=bytes(8)), "gap": header(a={**A, "data_offsets": [4, 12]}, data=bytes(12)),
    "offsets back": header(a={**A, "data_offsets": [8, 0]}, data=bytes(8)),
    "fraction": header(a={**A, "shape": [2.0]}, data=bytes(8)),
    "boolean": header(a={**A, "shape": [2, True]}, data=bytes(8)), "not an object": header(a=[1], data=bytes(8)),
    "null": header(a=None), "strings": header(a={**A, "data_offsets": ["0", "8"]}, data=bytes(8)),
    "a zip": b"PK\3\4" + bytes(100), "a pickle": b"\x80\x02cos\nsystem\n" + bytes(100),
    "surrogate": header(text=b'{"\xed\xa0\x80": 1}'),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_one_plain_error(tmp_path, lie):
    (tmp_path / "x").write_bytes(LIES[lie])
    with pytest.raises(CheckpointError): read_header(tmp_path / "x")
    with pytest.raises(CheckpointError): read_tensors(tmp_path / "x")


def test_a_true_header_is_read(tmp_path):
    (tmp_path / "x").write_bytes(header(a=A, __metadata__={"format": "pt"}, data=bytes(8)))
    assert read_header(tmp_path / "x") == {"a": A} and read_tensors(tmp_path / "x")["a"].tolist() == [0, 0]


def test_non_finite_tensors_are_named():
    tensors = {"fine": torch.ones(3), "ints": torch.arange(3), "inf": torch.tensor([1, float("-inf")]),
               "nan": torch.tensor(float("nan"), dtype=torch.bfloat16)}
    assert non_finite(tensors) == ["inf", "nan"] and not all_finite(tensors) and all_finite({"a": torch.ones(1)})
    assert all_finite({})


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_every_single_bit_of_a_manifest_is_guarded(store, every):
    "Or each seventh: of each byte another"
    path = store.path(30) / "manifest.json"
    whole = path.read_bytes()
    assert unsealed(path)["step"] == 30
    for bit in range(0, 8 * len(whole), every):
        broken = bytearray(whole)
        broken[bit // 8] ^= 1 << bit % 8
        path.write_bytes(broken)
        with pytest.raises(CheckpointError): unsealed(path)


def test_a_manifest_has_one_form_only(tmp_path):
    text = sealed({"a": 1, "b": [2]})
    for other in (text + b"\n", text.replace(b'"a": 1', b'"a":  1'), text.replace(b'"a"', b'"\\u0061"'),
                  text.replace(b'"a": 1', b'"a": 1,\n "a": 1'), json.dumps(json.loads(text)).encode()):
        (tmp_path / "x").write_bytes(other)
        with pytest.raises(CheckpointError): unsealed(tmp_path / "x")
    (tmp_path / "x").write_bytes(text)
    assert unsealed(tmp_path / "x") == {"a": 1, "b": [2]}


def test_folders_in_the_wrong_place_do_not_verify(store, tmp_path):
    os.rename(store.path(30), store.path(40))
    assert "step-00000030 of run calm-heron-0001" in verify(store.path(40))[0]
    other = tmp_path / "warm-owl-0002" / step_name(20)
    other.parent.mkdir()
    store.path(20).rename(other)
    assert "calm-heron-0001" in verify(other)[0] and not verify(other, run_id="calm-heron-0001")


def test_verify_reads_only_what_is_asked_for_but_sees_strangers(store):
    (store.path(30) / "state" / "trainer.json").write_text("{}")
    def weights(name): return not name.startswith("state/")
    assert not verify(store.path(30), weights) and not verify(store.path(30), ["model.safetensors"])
    assert "state/trainer.json" in verify(store.path(30))[0]
    assert verify(store.path(30), ["tokenizer.json"]) == ["tokenizer.json is missing"]
    (store.path(30) / "pytorch_model.bin").write_bytes(b"x")
    assert verify(store.path(30), weights) == ["pytorch_model.bin is not in the manifest"]
    assert store.select("latest", weights) == store.path(20)


@pytest.mark.parametrize("what", ["link", "fifo", "folder", "dangling", "linked folder"])
def test_only_regular_files_count(store, tmp_path, what):
    victim = store.path(30) / "model.safetensors"
    victim.rename(tmp_path / "weights")
    if what == "link": victim.symlink_to(tmp_path / "weights")
    if what == "dangling": victim.symlink_to(tmp_path / "nowhere")
    if what == "fifo": os.mkfifo(victim)
    if what == "folder": victim.mkdir()
    if what == "linked folder":
        (tmp_path / "weights").rename(victim)
        (store.path(30) / "state").rename(tmp_path / "state")
        (store.path(30) / "state").symlink_to(tmp_path / "state")
    assert verify(store.path(30))


def test_pins_survive_pruning(tmp_path):
    store = small_store(tmp_path, steps=(), keep=2)
    for step, loss in [(10, 3.), (20, 1.), (30, 2.), (40, 2.5)]:
        store.save(step, content(step))
        store.record(step, loss)
        if step == 10: store.pin(10, "first")
    for step in (50, 60, 70): store.save(step, content(step))
    assert store.steps() == [10, 20, 60, 70]
    assert {s: e["pins"] for s, e in store.index().items()} == {10: ["first"], 20: ["best"], 60: [], 70: ["latest"]}
    assert [store.select(w).name[-2:] for w in ("best", "latest", "first", 60, "60")] == ["20", "70", "10", "60", "60"]


def test_what_was_just_saved_stays_though_newer_steps_are_damaged(tmp_path):
    store = small_store(tmp_path, (10, 20, 30), keep=2)
    for step in 20, 30: (store.path(step) / "manifest.json").unlink()
    store.save(15, content(15))
    assert store.select("latest").name[-2:] == "15"


def test_a_step_pruned_while_others_are_read_is_not_damaged(store):
    gone = store.steps()[1]
    found = store.verify(lambda *how_far: shutil.rmtree(store.path(gone), ignore_errors=True))
    assert gone not in found and not any(found.values())


def test_a_manifest_says_of_which_format_it_is(store):
    manifest = json.loads((store.path(30) / "manifest.json").read_text())
    assert manifest["format_version"] == 1 and (manifest["run_id"], manifest["step"]) == ("calm-heron-0001", 30)


def test_an_old_step_that_can_not_be_removed_is_said_in_a_few_words(store, monkeypatch):
    store.emit = Heard()
    blocked = store.folder / f".tmp-{step_name(10)}"
    real = os.rename
    def rename(source, target):
        if Path(target) == blocked:  # as if another process had just put something there
            blocked.mkdir()
            (blocked / "file").write_text("in the way")
        real(source, target)
    monkeypatch.setattr(os, "rename", rename)
    store.save(40, content(40))
    assert store.emit == [f"An old checkpoint in {store.folder} could not be removed: Directory not empty."]
    assert store.steps()[-1] == 40


def test_a_store_keeps_three_and_leaves_room_unless_told_otherwise(tmp_path):
    store = Checkpoints(tmp_path / "one", "one")
    assert (store.keep, store.reserve) == (3, 64 << 20)


def test_a_refused_write_is_said_in_the_systems_words(store):
    def full(folder): raise OSError(28, "No space left on device", "model.safetensors")
    with pytest.raises(SaveFailed, match=r": No space left on device\. Earlier"): store.save(40, full)
    new = Checkpoints(store.folder.with_name("new"), "new", emit=Heard())
    with pytest.raises(SaveFailed, match=r"device\. Nothing is saved so far\."):
        new.save(40, full)
    shutil.rmtree(new.folder)
    new.record(40, 1.0)
    assert new.emit == [], "there is nothing that an index could be of"
    index, store.emit = store.folder / "index.json", Heard()
    index.unlink()
    index.mkdir()
    store.record(30, 1.0)
    assert store.emit[-1] == f"{index} could not be written: Is a directory."


def test_a_checkpoint_is_nobody_elses_while_it_is_written_and_its_size_is_told(store):
    modes = []
    def write(folder):
        modes.append(stat.S_IMODE(folder.stat().st_mode))
        return content(40)(folder)
    saved = store.save(40, write)
    files = [f for f in saved.path.rglob("*") if f.is_file() and f.name != "manifest.json"]
    assert modes == [0o700] and 0 <= saved.seconds < 3600
    assert saved.bytes == sum(f.stat().st_size for f in files) == place(store.folder, store.run_id, 50, content(50))
    assert unsealed(store.folder / "index.json")["format_version"] == 1


def test_a_link_is_no_step_and_a_pipe_no_file(store):
    (store.folder / "step-00000099").symlink_to(store.path(30))
    assert store.steps() == [10, 20, 30]
    def write(folder):
        (folder / "empty").touch()
        return content(40)(folder)
    pipe = store.save(40, write).path / "empty"
    pipe.unlink()
    os.mkfifo(pipe)
    assert verify(pipe.parent) == [f"empty can't be read: {pipe} is not a regular file"]


def test_what_is_there_instead_is_said_up_to_a_measure(tmp_path):
    store = small_store(tmp_path, range(1, 11), keep=0)
    with pytest.raises(NotFoundError, match=r"it has: 3, 4, 5, 6, 7, 8, 9, 10\.\n"): store.find(77)
    for file in ("config.json", "model.safetensors", "state/trainer.json", "state/optimizer.safetensors"):
        (store.path(10) / file).unlink()
    store.emit = Heard()
    assert store.select("latest") == store.path(9) and store.emit[0].splitlines()[0].count(" is missing") == 3


def test_an_index_that_is_soon_free_is_waited_for(store):
    fd = os.open(store.folder, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    timer = threading.Timer(0.2, os.close, [fd])
    timer.start()
    store.record(10, 0.5)
    timer.join()
    assert unsealed(store.folder / "index.json")["checkpoints"]["10"]["val_loss"] == 0.5


def test_keep_zero_keeps_all(tmp_path):
    assert small_store(tmp_path, range(1, 9), keep=0).steps() == list(range(1, 9))


@pytest.mark.parametrize("loss", [None, float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_never_best(store, loss):
    store.save(40, content(40), val_loss=loss)
    assert store.select("best") == store.path(30) and store.index()[40]["val_loss"] is None


def test_without_validation_best_is_the_latest(tmp_path):
    store = small_store(tmp_path, steps=())
    for step in (1, 2): store.save(step, content(step))
    assert store.select("best") == store.path(2)


def test_what_is_not_there_is_said(store, tmp_path):
    with pytest.raises(NotFoundError, match="10, 20, 30"): store.select(25)
    for name in ("newest", "-10", "9" * 5000, "²"):
        with pytest.raises(NotFoundError, match="it has: 10, 20, 30") as e: store.select(name)
        assert len(str(e.value)) < 300
    assert store.find("0010") == store.find(10) == 10
    with pytest.raises(NotFoundError): store.pin(25)
    with pytest.raises(UsageError): store.pin(20, "best")
    with pytest.raises(NotFoundError, match="no checkpoint yet"): Checkpoints(tmp_path / "none", "none").select()


def test_when_all_are_damaged_none_is_used(store):
    for step in store.steps(): os.truncate(store.path(step) / "model.safetensors", 5)
    with pytest.raises(CheckpointError) as e: store.select("best")
    assert all(f"Step {step} is damaged: model.safetensors has 5 bytes" in str(e.value) for step in (10, 20, 30))


def test_the_index_is_only_a_memory(store):
    (store.folder / "index.json").unlink()
    assert list(store.index()) == store.steps() and store.select() == store.path(30)
    store.verify()
    assert all(e["verified_at"] for e in store.index().values()) and store.index()[30]["pins"] == ["latest"]


def test_saving_a_step_again_replaces_it(store):
    os.truncate(store.path(30) / "model.safetensors", 5)
    store.save(30, content(30))
    assert not verify(store.path(30))
    assert sorted(os.listdir(store.folder)) == ["index.json", *map(step_name, (10, 20, 30))]


def test_a_kill_between_the_two_names_of_a_replaced_step_loses_nothing(store):
    def replace(): store.save(30, content(30))
    os.rename(store.path(30), store.folder / f".old-{step_name(30)}")  # what such a kill leaves
    (store.folder / f".tmp-{step_name(30)}").mkdir()
    store.sweep()
    assert store.select() == store.path(30)
    failpoints.arm("save.after-rename=kill")
    assert exit_code_of(replace) == -signal.SIGKILL
    failpoints.arm(None)
    assert store.select() == store.path(30)
    store.sweep()
    assert not [n for n in os.listdir(store.folder) if n.startswith(".")]


@instead
def test_nothing_in_the_place_of_a_checkpoint_keeps_a_save_from_it(store, instead):
    for name in (step_name(40), f".tmp-{step_name(40)}", f".old-{step_name(40)}", f".old-{step_name(30)}"):
        instead(store.folder / name)
    for step in (40, 50): assert not verify(store.save(step, content(step)).path)
    assert sorted(os.listdir(store.folder)) == ["index.json", *map(step_name, (30, 40, 50))]
    os.rename(store.path(50), store.folder / f".old-{step_name(50)}")  # what a kill leaves
    if instead is not INSTEAD["folder"]: instead(store.path(50))
    store.sweep()
    assert store.select() == store.path(50)


@pytest.mark.parametrize("level", ["calm-heron-0001", "checkpoints"])
@pytest.mark.parametrize("kind", ["pipe", "file", "loop", "link"])
def test_what_is_no_folder_of_checkpoints_is_said_with_the_line_that_mends_it(tmp_path, kind, level):
    store = small_store(tmp_path / "checkpoints", ())
    if level != "checkpoints": store.folder.parent.mkdir()
    INSTEAD[kind](next(path for path in (store.folder, *store.folder.parents) if path.name == level))
    for act in (store.steps, store.index, store.verify, store.select):
        with pytest.raises(CheckpointError, match="is no folder") as said: act()
    with pytest.raises(SaveFailed): store.save(10, content(10))
    subprocess.run(shlex.split(str(said.value).partition("away: ")[2]), check=True)
    assert store.steps() == [] and not verify(store.save(10, content(10)).path)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_a_writer_that_fails_leaves_nothing(store, error):
    def write(folder):
        (folder / "half").write_bytes(b"x" * 1000)
        raise error()
    with pytest.raises(SaveFailed if error is OSError else error): store.save(40, write)
    assert sound(store, 30) is None and len(os.listdir(store.folder)) == 4


@pytest.mark.parametrize("name", HERE)
def test_each_station_is_really_passed(store, name):
    store.keep = 1
    failpoints.arm(f"{name}=raise")
    with pytest.raises(RuntimeError, match=name): store.save(40, content(40))


def test_trouble_after_the_rename_is_said_and_not_raised(tmp_path):
    store, said = small_store(tmp_path, keep=1), Heard()
    store.emit = said
    for name in ("save.before-index", "index.before-replace", "prune.before", "prune.middle"):
        failpoints.arm(f"{name}=enospc")
        step = store.steps()[-1] + 10
        store.save(step, content(step), val_loss=0.5 if name == "save.before-index" else None)
        failpoints.arm(None)
        assert len(said) == 1 and sound(store, step) is None
        said.clear()
    assert store.select("best") == store.path(40), "the loss that could not be written was written with the next save"


def test_no_room_is_seen_before_anything_is_written(store):
    with pytest.raises(SaveFailed, match="MB left.*\n.*llm-trainer resume calm-heron-0001") as e:
        store.require_space(10**15)
    assert e.value.code == "disk_full" and isinstance(e.value, RunFailed) and isinstance(e.value, OSError)
    with pytest.raises(SaveFailed): store.save(40, content(40), size=10**15)
    store.reserve = 10**15
    with pytest.raises(SaveFailed): store.save(40, content(40))
    assert store.steps() == [10, 20, 30]
    Checkpoints(store.folder / "not" / "yet" / "there", "there").require_space(1000)


def test_modes_are_private(tmp_path):
    old = os.umask(0)
    try: store = small_store(tmp_path)
    finally: os.umask(old)
    for path in [store.folder, *store.folder.rglob("*")]:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600), (path, oct(mode))


def _pin(folder, first):
    store = Checkpoints(folder, folder.name)
    for n in range(20): store.pin(10, f"pin-{first + n}")


def test_pins_from_several_processes_all_arrive(store):
    context = get_context("spawn" if sys.platform == "darwin" else "fork")
    workers = [context.Process(target=_pin, args=(store.folder, n)) for n in (0, 20, 40)]
    for w in workers: w.start()
    for w in workers: w.join()
    assert len(store.index()[10]["pins"]) == 60


def test_replacing_a_file_follows_no_link(tmp_path):
    (tmp_path / "secret").write_text("mine")
    (tmp_path / "index.json").symlink_to(tmp_path / "secret")
    (tmp_path / ".index.json.new").symlink_to(tmp_path / "secret")
    replace_file(tmp_path / "index.json", b"{}")
    assert (tmp_path / "secret").read_text() == "mine" and not (tmp_path / "index.json").is_symlink()


def test_weights_hash_is_that_of_the_file(store):
    data = (store.path(30) / "model.safetensors").read_bytes()
    assert weights_hash(store.path(30)) == hashlib.sha256(data).hexdigest() != weights_hash(store.path(20))
    (store.path(30) / "model.safetensors").unlink()
    with pytest.raises(OSError): weights_hash(store.path(30))


def test_weights_in_shards_have_the_hash_of_one_file(tmp_path):
    tensors = {"a": torch.arange(6.).reshape(2, 3), "b": torch.ones(4), "c": torch.zeros(1)}
    for i, names in enumerate(("ac", "b"), 1):
        write_tensors(tmp_path / f"model-0000{i}-of-00002.safetensors", {name: tensors[name] for name in names})
    assert weights_hash(tmp_path) == hashlib.sha256(reference_bytes(tensors, {"format": "pt"})).hexdigest()


def test_a_manifest_that_is_no_json_is_a_finding(store):
    (store.path(30) / "manifest.json").write_text("{")
    assert [found.partition(":")[0] for found in verify(store.path(30))] == ["manifest.json"]


def test_the_store_needs_no_torch():
    code = ("import sys, llm_trainer.training.checkpoint\n"
            "sys.exit(bool({'torch', 'numpy', 'safetensors'} & set(sys.modules)))")
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_failpoints_are_off_unless_asked_for_and_refuse_nonsense(monkeypatch):
    for name in failpoints.NAMES: failpoints.hit(name)
    for nonsense in ("save.before-tmp", "save.befor-tmp=kill", "save.before-tmp=explode", "save.before-tmp=kill:x"):
        with pytest.raises(ValueError): failpoints.arm(nonsense)
    failpoints.arm("*=raise:3")
    failpoints.hit("lock.taken")
    failpoints.hit("state.write")
    with pytest.raises(RuntimeError, match="prune.before"): failpoints.hit("prune.before")
    failpoints.hit("prune.before")
    env = {**os.environ, "LLM_TRAINER_FAILPOINTS": "worker.exit=kill"}
    code = "from llm_trainer.system import failpoints; failpoints.hit('worker.exit')"
    assert subprocess.run([sys.executable, "-c", code], env=env).returncode == -signal.SIGKILL


def test_every_action_is_known():
    for action in (*ACTIONS, "term", "int", "stop"): failpoints.arm(f"save.before-tmp={action}:2")
