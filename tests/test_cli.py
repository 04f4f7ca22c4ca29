"""The commands as a user meets them: wrong argument lists, prompts of every kind, and the life of a run."""
import json
import os
import random
import shlex
import shutil
import signal
import string
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, program, small_disk

from llm_trainer import workspace
from llm_trainer.cli import commands as cli, progress as follow
from llm_trainer.runs import run as runs
from llm_trainer.data.tokenizer import train_tokenizer
from llm_trainer.events import Evaluated, Phase, Saved, Step
from llm_trainer.events import Progress
from llm_trainer.runs.writer import RunWriter
from llm_trainer.system import locks
from llm_trainer.terminal import clean

PROGRAM = [sys.executable, "-m", "llm_trainer"]


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    "A workspace with the run `done`, trained through the real command line"
    space = workspace.init(tmp_path_factory.mktemp("trained"))
    ran = program(space, "train", "--config", "tiny", "--name", "done", "--max-steps", "12")
    assert ran.returncode == 0, ran.stderr
    return SimpleNamespace(root=space.root, said=ran.stdout)


def files(root: Path) -> set[str]: return {str(f) for f in root.rglob("*")}


# -- Wrong argument lists: refused, with one message, before anything happens

def typo(word: str, rng: random.Random) -> str:
    "`word` with one letter added, dropped, changed or swapped with the next"
    i = rng.randrange(len(word))
    letter = rng.choice(string.ascii_lowercase)
    swapped = word[:i] + word[i:i + 2][::-1] + word[i + 2:]
    changed = word[:i] + letter + word[i + 1:]
    return rng.choice([word[:i] + word[i + 1:], word[:i] + letter + word[i:], changed, swapped])


def wrong_arguments(rng: random.Random) -> tuple[list[str], str | None]:
    "An argument list that must be refused, and the flag that the message must name, if any"
    names = [name for name in cli.front.commands if name not in ("init", "completion", "bench")]
    command = cli.front.commands[rng.choice(names)]
    flags = [f for f in command.flags.values() if not f.positional and not f.hidden]
    base = [command.name, *("some-run" for f in command.positionals if rng.random() < 0.5)]
    junk = "".join(rng.choice([chr(rng.randrange(1, 0x250)), "\udc80", "\u202e", "🙂", "\x1b"]) for _ in range(5))
    if not flags: return [command.name, "--" + junk.replace("=", "") + "x"], None
    flag = rng.choice(flags)
    value = [] if flag.is_switch else ["1"]
    kind = rng.randrange(8)
    if kind == 0:
        wrong = typo(flag.name, rng)
        if command.find(wrong)[0] or wrong.startswith("-") or len(flag.name) < 2: kind = 1
        else: return [*base, f"--{wrong}", *value], flag.spelling
    if kind == 1: return [*base, "--" + junk.replace("=", "") + "q", *value], None
    if kind == 2 and not flag.is_switch: return [*base, flag.spelling], flag.spelling
    if kind == 3 and flag.takes_number: return [*base, f"{flag.spelling}={junk}"], flag.spelling
    if kind == 4 and flag.is_switch: return [*base, f"{flag.spelling}={junk}!"], flag.spelling
    if kind == 5 and not flag.repeats and flag.is_switch: return [*base, flag.spelling, flag.spelling], flag.spelling
    if kind == 6: return [flag.spelling, *base], None
    if kind == 7: return [typo(command.name, rng) + "_", flag.spelling], None
    return [*base, *["one-too-many"] * (len(command.positionals) + 1)], None


def fuzz(n: int, seed: int, run=cli.main) -> list[str]:
    "Try `n` wrong argument lists in the current folder; gives what went wrong, which should be nothing"
    import contextlib
    import io
    rng, faults, before = random.Random(seed), [], files(Path.cwd())
    for _ in range(n):
        argv, named = wrong_arguments(rng)
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try: code = run(argv)
            except BaseException as error: code = repr(error)
        said = err.getvalue()
        if code != 2: faults.append(f"{argv!r} gave {code}: {said or out.getvalue()[:80]}")
        if "Traceback" in said or "internal error" in said: faults.append(f"{argv!r} showed {said!r}")
        if named and named not in said: faults.append(f"{argv!r} did not name {named}: {said!r}")
        if any(c in said for c in "\x1b\x07\u202e"): faults.append(f"{argv!r} let control bytes through")
    if files(Path.cwd()) != before: faults.append(f"files appeared: {sorted(files(Path.cwd()) - before)[:5]}")
    return faults


def test_wrong_arguments_are_refused_and_touch_nothing(space): assert fuzz(2000, seed=1) == []


@pytest.mark.parametrize("argv, code, says", [
    (["train", "--epcohs", "3"], 2, "Did you mean --epochs?"),
    (["train", "--epochs", "ten"], 2, "takes a whole number"),
    (["train", "--epochs", "0"], 2, "epochs"),
    (["train", "--epochs", "2", "--epochs", "3"], 2, "given twice"),
    (["train", "--n_layer=2", "--n-layer=2"], 2, "given twice"),
    (["train", "--config", "nope"], 2, "No profile"),
    (["train", "--config", "./nope.toml"], 3, "nope.toml"),
    (["train", "--dataset", "nope.txt"], 3, "no file or folder nope.txt"),
    (["train", "--name", "../evil", "--config", "tiny"], 2, "can't name a run"),
    (["train", "--name", "12e4567", "--config", "tiny"], 2, "can't name a run"),
    (["train", "--config", "tiny", "--init-from", "nobody"], 3, "There is no run"),
    (["train", "--n_head", "3", "--n_embd", "32", "--config", "tiny"], 2, "multiple of n_head"),
    (["status", "nobody"], 3, "There is no run nobody"),
    (["resume"], 3, "There is no run"),
    (["stop"], 2, "stop needs RUN"),
    (["delete"], 2, "delete needs RUN"),
    (["generate", "--prompt", "x"], 3, "There is no run"),
    (["generate", "--prompt", ""], 2, "prompt is empty"),
    (["generate", "--prompt-file", "nope"], 3, "can't be read"),
    (["generate", "--prompt", "x", "--interactive"], 2, "exclude each other"),
    (["generate", "--prompt", "-x"], 2, "--prompt=-"),
    (["generate", "./nowhere", "--prompt", "x"], 3, "does not exist"),
    (["generate", "--prompt", "x", "--output", "nowhere/out.txt"], 3, "does not exist"),
    (["resume", "--more-epochs", "0"], 2, "more-epochs"),
    (["resume", "--lr-plan", "rewrm"], 2, "Did you mean rewarm?"),
    (["runs", "--csv", "nobody"], 3, "There is no run"),
    (["train", "--dataset", f"./{'x' * 300}"], 3, "no file or folder"),
    (["watch"], 2, "needs a terminal"),
    *((argv.split(), 2, f"{argv.split()[-2]} takes a whole number from") for argv in (
        "prepare --show -1", "plot --height 0", "plot --width -3", "plot --width 301", "logs --lines -1",
        "serve --rows 0", "serve --port 65536", "generate --num-samples 0", "train --restarts -1")),
    *((argv.split(), 2, "exclude each other") for argv in (
        "runs --csv a1 --json", "runs --reverse --csv a1", "generate --json --raw", "generate --interactive --json",
        "generate --prompts x --prompt-file y", "generate --num-samples 2 --interactive")),
    *((argv.split(), 2, f"has no effect without {needs}") for argv, needs in (
        ("train --parallel", "--background"), ("resume --parallel", "--background"),
        ("train --restarts 1", "--devices"), ("export --out x --public", "--push"),
        ("generate --force", "--output"), ("evaluate --text-column x", "--data"))),
    (["runs", "--csv", "nobody", "--no-json"], 3, "There is no run"),
    *((argv.split(), 3, "no home folder") for argv in (
        "init ~nobody-here/x", "train --config ~nobody-here/x.toml", "train --dataset ~nobody-here/x",
        "train --tokenizer ~nobody-here/x", "generate --prompt x --output ~nobody-here/x",
        "export --out ~nobody-here/x", "generate --prompt-file ~nobody-here/x", "generate --prompts ~nobody-here/x")),
])
def test_bad_input_gives_one_message(space, capsys, argv, code, says):
    if "--more-epochs" in argv: runs.create_run(space.runs, {"training": {}}, name="some")
    before = files(space.root)
    assert cli.main(argv) == code
    out, err = capsys.readouterr()
    assert says in err and not out and "Traceback" not in err
    assert files(space.root) == before


def test_outside_a_workspace_the_message_says_how_to_make_one(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("LLM_TRAINER_HOME", raising=False)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["status"]) == 3 and "llm-trainer init" in capsys.readouterr().err


def test_a_workspace_that_a_full_disk_refused_is_made_later(tmp_path):
    full = small_disk(0, "init", cwd=tmp_path)
    assert full.returncode == 1 and full.stderr.rstrip().endswith(f": {tmp_path / 'settings.ini'}")
    assert not list(tmp_path.iterdir())
    (tmp_path / "settings.ini").touch()  # what an older one left there
    assert program(SimpleNamespace(root=tmp_path), "init", ".").returncode == 0
    assert program(SimpleNamespace(root=tmp_path), "runs").returncode == 0


DAMAGED = {"torn": b"[llm_trainer\ndata = data\n", "twice": b"[llm_trainer]\ndata = a\ndata = b\n",
           "not text": b"[llm_trainer]\ndata = \xff\n", "pipe": os.mkfifo, "folder": os.mkdir,
           "dangling link": lambda path: os.symlink("nowhere", path), "loop": lambda path: os.symlink(path.name, path)}


@pytest.mark.parametrize("what", DAMAGED)
def test_damaged_settings_are_not_passed_over_and_the_command_of_the_message_helps(space, what, monkeypatch, capsys):
    sub = space.root / "sub"
    sub.mkdir()
    monkeypatch.chdir(sub)
    make = DAMAGED[what]
    (sub / "settings.ini").write_bytes(make) if isinstance(make, bytes) else make(sub / "settings.ini")
    for command in "runs", "status", "init":
        assert cli.main([command]) == 2
        out, said = capsys.readouterr()
        assert f"{sub / 'settings.ini'} can't be read: " in said and not out
    way = said.partition("make a new one: ")[2].partition("\n")[0].replace("llm-trainer", shlex.join(PROGRAM))
    subprocess.run(["sh", "-c", way], check=True, timeout=60, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert cli.main(["runs"]) == 0 and os.path.lexists(sub / "settings.ini.old")


@pytest.mark.parametrize("content", [b"", b"[other]\nx = 1\n", b"x = 1\n", b"\xff\n"])
def test_settings_of_something_else_are_passed_over(space, content, monkeypatch, capsys):
    (space.root / "sub").mkdir()
    (space.root / "sub" / "settings.ini").write_bytes(content)
    monkeypatch.chdir(space.root / "sub")
    assert workspace.find() == space
    assert cli.main(["init"]) == (2 if content else 0)


@pytest.mark.parametrize("root", ["/dev/null", "/dev/null/sub", "others"])
def test_where_no_workspace_can_be_none_is_proposed(tmp_path, monkeypatch, capsys, root):
    monkeypatch.chdir(tmp_path)
    Path("others").mkdir()
    Path("others/settings.ini").write_text("[other]\nx = 1\n")
    monkeypatch.setenv("LLM_TRAINER_HOME", root)
    assert cli.main(["runs"]) == 3 and "llm-trainer init" not in (said := capsys.readouterr().err)
    assert "is no folder" in said or "belongs to something else" in said
    assert cli.main(["init", root]) == 2 and "llm-trainer init FOLDER" in capsys.readouterr().err


# -- Help, from the signatures

@pytest.mark.parametrize("name", cli.front.commands)
def test_every_command_has_help_that_fits(name, capsys):
    assert cli.main([name, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 and lines[0].startswith(f"llm-trainer {name}: ")
    for flag in cli.front.commands[name].flags.values(): assert flag.description, f"{name} {flag.name} is not described"


def test_train_has_a_flag_for_every_setting():
    from llm_trainer.config import all_settings
    flags = cli.front.commands["train"].flags
    assert set(all_settings()) <= set(flags)
    for group in cli.GROUPS.values(): assert f"{group}\n" in cli.front.help(cli.front.commands["train"])


# -- Looking at runs that real writers left

def write_run(space, name, ends=None, steps=20):
    "A run folder as a worker leaves it; without `ends`, as a killed one does"
    run = runs.create_run(space.runs, {"training": {"batch_size": 8, "lr": 1e-3}}, name=name, locked=True)
    run.add_attempt(target_epochs=2, target_steps=steps)
    writer = RunWriter(run, run.lock)
    writer.log(Phase("training"))
    for i in range(1, steps + 1):
        writer.log(Step(i, i / 10, i * 512, 1e-3, 6 - i / 10, 1.0, 8500.0, 812_000_000, float(steps - i)))
    writer.log(Evaluated(steps, 2.0, steps * 512, 4.25, 70.1, 1.9))
    writer.log(Saved(steps, "checkpoint", 1000, 0.1))
    writer.beat()
    if ends: writer.finish(*ends)
    run.lock.release()
    return run


def test_status_tells_each_end_and_the_command_that_helps(space, capsys):
    ends = {"good": ("completed",), "big": ("failed", "oom", "Memory ran out: \x1b[31m3 GB"), "killed": None,
            "wild": ("diverged", "non_finite", "ten steps in a row"), "full": ("failed", "disk_full", "No space"),
            "gone": ("failed", "data", "no file or folder")}
    for name, end in ends.items(): write_run(space, name, end)
    says = {"good": ["✓ completed", "step 20 of 20", "4.2500"],
            "big": ["✗ failed", "oom: Memory ran out: 3 GB", "--batch-size 4"],
            "killed": ["! crashed", "llm-trainer resume killed", "the end of its log"],
            "wild": ["∞ diverged", "--checkpoint best --lr 0.0005"], "full": ["llm-trainer resume full"],
            "gone": ["llm-trainer resume gone"]}
    for name, texts in says.items():
        assert cli.main(["status", name]) == 0
        out = capsys.readouterr().out
        assert "\x1b" not in out
        for text in texts: assert text in out


def test_status_and_runs_as_json_and_csv(space, capsys):
    assert cli.main(["runs", "--json"]) == 0 and json.loads(capsys.readouterr().out) == []
    assert cli.main(["status", "--json"]) == 0 and json.loads(capsys.readouterr().out) == {}
    write_run(space, "older", ("completed",))
    write_run(space, "newer")
    assert cli.main(["runs", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [(r["run_id"], r["status"]) for r in listed] == [("newer", "crashed"), ("older", "completed")]
    assert cli.main(["status", "--json"]) == 0 and json.loads(capsys.readouterr().out)["run_id"] == "newer"
    assert cli.main(["runs"]) == 0
    heading, first, second = capsys.readouterr().out.splitlines()
    assert heading.startswith("RUN") and first.startswith("newer") and second.startswith("older")
    assert cli.main(["runs", "--csv", "older"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert "loss" in rows[0].split(",") and len(rows) == 22
    assert cli.main(["logs", "older", "--lines", "1"]) == 0 and capsys.readouterr().out.endswith("completed\n")
    assert cli.main(["status", "--watch"]) == 0 and "crashed" in capsys.readouterr().out


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_table_of_runs_fits_the_terminal(space, width):
    write_run(space, "a-name-of-as-many-letters-as-anyone-will-ever-type", ("completed",))
    write_run(space, "b")
    screen, terminal = os.openpty()
    env = {**os.environ, "LLM_TRAINER_HOME": str(space.root), "COLUMNS": str(width), "NO_COLOR": "1", "PYTHONUTF8": "1"}
    subprocess.run([*PROGRAM, "runs"], stdout=terminal, env=env, check=True)
    os.close(terminal)
    lines = os.read(screen, 9999).decode().splitlines()
    os.close(screen)
    assert len(lines) == 3 and max(map(len, lines)) <= width and lines[2].startswith("a-name-")
    assert ("CURVE" in lines[0]) == (width == 200) and "STATUS" in lines[0]


def test_plain_lines_tell_how_far_a_preparation_is(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(follow.time, "monotonic", lambda: now[0])
    with follow.screen() as screen:
        for done in range(1, 11):
            screen(Progress("reading", done, 100))
            now[0] += 1
    assert capsys.readouterr().out.splitlines() == ["reading 4%  1m36s left", "reading 9%  1m31s left"]


def test_a_prefix_is_enough_unless_it_is_ambiguous(space, capsys):
    write_run(space, "alpha-one")
    write_run(space, "alpha-two")
    assert cli.main(["status", "alpha-o"]) == 0
    assert cli.main(["status", "alpha"]) == 2 and "alpha-one" in capsys.readouterr().err


def test_a_damaged_run_folder_is_shown_not_raised(space, capsys):
    run = write_run(space, "broken")
    (run.folder / "state.json").write_bytes(b'{"status": [1], "loss": "\x1b[31m')
    (run.folder / "meta.json").write_bytes(b"\xff\xfe")
    for argv in (["status"], ["runs"], ["status", "--json"], ["runs", "--csv", "broken"]): assert cli.main(argv) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_delete_asks_and_stop_is_idempotent(space, capsys):
    write_run(space, "old", ("stopped", "signal", "asked"))
    assert cli.main(["stop", "old"]) == 0 and cli.main(["stop", "old"]) == 0
    assert cli.main(["delete", "old"]) == 2 and "--yes" in capsys.readouterr().err
    assert (space.runs / "old").exists()
    assert cli.main(["delete", "old", "--yes"]) == 0 and not (space.runs / "old").exists()


def test_a_living_run_is_not_deleted(space, capsys):
    run = runs.create_run(space.runs, {"training": {}}, name="alive", locked=True)
    assert cli.main(["delete", "alive", "--yes"]) == 75 and "llm-trainer stop alive" in capsys.readouterr().err
    run.lock.release()


# -- Completion

def test_completion_knows_commands_flags_profiles_and_runs(space):
    write_run(space, "quiet-otter-1234")
    def words(*argv): return [w for w, _ in cli.front.complete(list(argv))]
    assert "train" in words("t") and "--n_layer" in words("train", "--n") and "tiny" in words("train", "--config", "")
    assert words("status", "q") == ["quiet-otter-1234"] and words("resume", "--lr-plan", "re") == ["redecay", "rewarm"]


def test_bash_completes(space):
    write_run(space, "quiet-otter-1234")
    script = f"""llm-trainer() {{ {sys.executable} -m llm_trainer "$@"; }}
    source <(llm-trainer completion bash); COMP_WORDS=(llm-trainer status qui); COMP_CWORD=2
    _llm_trainer; echo "${{COMPREPLY[@]}}" """
    ran = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=space.root)
    assert ran.stdout == "quiet-otter-1234\n"


# -- The real program

def test_looking_loads_no_torch(space):
    code = ("import sys; from llm_trainer.cli.commands import main; main({!r})\n"
            "print(sorted({{'torch', 'pydantic', 'rich'}} & set(sys.modules)))")
    write_run(space, "some", ("completed",))
    for argv in (["runs"], ["status"], ["--help"], ["stop", "some"], ["logs"]):
        ran = subprocess.run([sys.executable, "-c", code.format(argv)], cwd=space.root, capture_output=True, text=True)
        assert ran.stdout.splitlines()[-1] == "[]", argv


@pytest.mark.parametrize("argv", [["train", "--epcohs", "3"], ["train", b"--epochs=\xff"], ["tra\x1b[31min"],
                                  ["runs", "--json", "--json"]])
def test_wrong_arguments_through_a_real_shell(space, argv):
    before = files(space.root)
    ran = program(space, *argv)
    assert ran.returncode == 2 and ran.stderr.startswith("llm-trainer: ") and "Traceback" not in ran.stderr
    assert files(space.root) == before


def test_a_closed_pipe_is_quiet(space):
    write_run(space, "long", steps=400)
    script = f"{sys.executable} -m llm_trainer runs --csv long | head -1; exit ${{PIPESTATUS[0]}}"
    ran = subprocess.run(["bash", "-c", script], cwd=space.root, capture_output=True, text=True)
    assert ran.returncode == 0 and ran.stderr == ""


def test_train_says_the_run_the_device_and_what_comes_next(trained):
    for text in ("Run done.", "llm-trainer status done --watch", "cpu", "validation loss", "bits per byte",
                 "✓ completed", "llm-trainer generate done", "resume done --more-epochs 1"): assert text in trained.said
    assert "\x1b" not in trained.said


def test_dry_run_creates_nothing(space):
    before = files(space.root)
    ran = program(space, "train", "--config", "tiny", "--dry-run")
    assert ran.returncode == 0 and files(space.root) == before
    for text in ("parameters", "* n_layer", "tokens/s", "Nothing was created."): assert text in ran.stdout


@pytest.mark.parametrize("where", [[], ["--background"], ["--dry-run"]])
def test_what_a_first_look_shows_to_be_no_text_is_refused_before_there_is_a_run(space, capsys, where):
    for name, content in {"empty.txt": b"", "photo.txt": b"JFIF\0", "notes.pdf": b"%PDF\0",
                          "rows.jsonl": b'{"a": 1, "b": 2}', "vocabulary": b"no JSON"}.items():
        (space.root / name).write_bytes(content)
    (space.root / "pictures").mkdir()
    before = files(space.root)
    for flag, name, says in (("--dataset", "empty.txt", "holds no text"), ("--dataset", "photo.txt", "not text"),
                             ("--dataset", "./notes.pdf", "pdftotext"), ("--dataset", "pictures", "no file with text"),
                             ("--dataset", "rows.jsonl", "--text-column NAME"),
                             ("--tokenizer", "./vocabulary", "not JSON")):
        assert cli.main(["train", "--config", "tiny", flag, name, *where]) == 2
        out, err = capsys.readouterr()
        assert says in err and not out, err
    assert files(space.root) == before


def test_a_name_means_the_same_to_a_worker_that_stands_elsewhere(space, tmp_path_factory, monkeypatch):
    "What lies here comes before what has its name in the workspace, and the run's config says where it is"
    here = tmp_path_factory.mktemp("books")
    for folder in (here / "data", space.data):
        folder.mkdir(exist_ok=True)
        (folder / "text.txt").write_text(f"{folder} " * 99)
        train_tokenizer("byte", 257, ()).save(folder / "tokens.d")
    (space.data / "only.txt").write_text("in data/ only " * 99)
    monkeypatch.setenv("LLM_TRAINER_HOME", str(space.root))
    monkeypatch.chdir(here)
    def settled(**knobs): return cli._config(space, "tiny", knobs).data
    found = settled(dataset="data", tokenizer="data/tokens.d", text_column="text")
    assert (found.dataset, found.tokenizer, found.text_column) == (f"{here}/data", f"{here}/data/tokens.d", "text")
    assert settled(dataset="only.txt").dataset == str(space.data / "only.txt")
    assert settled(dataset="python-docs").dataset == "python-docs" and settled(dataset="a/b").dataset == "a/b"
    (space.configs / "mix.toml").write_text(
        'data.dataset = [{name = "data", weight = 2.0, config = "c"}, {name = "python-docs"}]')
    mix = cli._config(space, "mix", {}).data.dataset
    parts = [(part.name, part.weight, part.config) for part in mix]
    assert parts == [(f"{here}/data", 2, "c"), ("python-docs", 1, None)]


def test_a_text_that_is_too_short_leaves_nothing(space):
    (space.root / "short.txt").write_text("Too short. " * 20)
    for verb in ("train", "prepare"):
        ran = program(space, verb, "--config", "tiny", "--dataset", "short.txt", "--seq_len", "500")
        assert ran.returncode == 2 and "fewer than one window" in ran.stderr, ran.stderr
        assert not os.listdir(space.data) and set(os.listdir(space.runs)) <= {".queue"}


def test_a_checkpoint_that_was_pruned_meanwhile_is_chosen_again(trained, tmp_path, monkeypatch):
    shutil.copytree(trained.root, tmp_path / "copy")
    monkeypatch.setenv("LLM_TRAINER_HOME", str(tmp_path / "copy"))
    tried = []

    def use(folder):
        tried.append(folder)
        if len(tried) == 1: shutil.rmtree(folder)  # as the worker does, which knows nothing of readers
        return (folder / "config.json").read_text()
    folder, text = cli._with_weights("done", None, use)
    assert len(set(tried)) == 2 and folder == tried[1] and "gpt2" in text


def test_resume_of_a_completed_run_has_nothing_to_do(trained):
    ran = program(trained, "resume", "done", "--dry-run")
    assert ran.returncode == 0 and "nothing left to train" in ran.stdout
    ran = program(trained, "resume", "done", "--more-epochs", "2", "--lr-plan", "hold", "--dry-run")
    assert ran.returncode == 0
    for text in ("from       step 12 of done", "lr plan    hold", "lr         ", "90 more"): assert text in ran.stdout
    ran = program(trained, "resume", "done", "--n_layer", "3")
    assert ran.returncode == 2 and "n_layer" in ran.stderr


def test_evaluate_prepares_again_what_was_removed(trained):
    before = program(trained, "evaluate", "done", "--json")
    shutil.rmtree(trained.root / "data")
    (trained.root / "data").mkdir()
    again = program(trained, "evaluate", "done", "--json")
    assert again.returncode == 0 and "They are prepared again." in again.stderr, again.stderr
    assert json.loads(again.stdout) == json.loads(before.stdout)


def test_verify_and_export(trained, tmp_path):
    assert program(trained, "verify", "done").returncode == 0
    assert program(trained, "export", "done", "--out", str(tmp_path / "out")).returncode == 0
    assert sorted(os.listdir(tmp_path / "out")) == [
        "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json"]
    assert program(trained, "export", "done", "--out", str(tmp_path / "out")).returncode == 2


def test_evaluate_repeats_the_loss_of_the_run(trained):
    status = json.loads(program(trained, "status", "done", "--json").stdout)
    found = json.loads(program(trained, "evaluate", "done", "--json").stdout)
    assert abs(found["loss"] - status["best_val_loss"]) < 1e-4 and found["split"] == "validation"
    assert found["perplexity"] < found["word_perplexity"] and found["stride"] == found["context"] == 64


PROMPTS = ["123", "[a]", "True", "None", "once # upon", "-x", "-", "--", "{'a': 1}", "a=b", "'\"\\", "new\nline", "é🙂",
           " "]


def test_prompts_arrive_byte_for_byte(trained, monkeypatch, capsys):
    monkeypatch.setenv("LLM_TRAINER_HOME", str(trained.root))
    for prompt in PROMPTS:
        assert cli.main(["generate", f"--prompt={prompt}", "--max-new-tokens=1", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["texts"][0]["prompt"] == prompt


@pytest.mark.parametrize("how", ["argument", "file", "stdin"])
def test_prompts_through_a_real_shell(trained, tmp_path, how):
    prompt = "once # upon\n[a] é🙂 \"'\\"
    (tmp_path / "prompt").write_bytes(prompt.encode())
    argv = {"argument": ["--prompt", prompt], "file": ["--prompt-file", str(tmp_path / "prompt")],
            "stdin": ["--prompt-file=-"]}[how]
    piped = prompt if how == "stdin" else ""
    ran = program(trained, "generate", *argv, "--max-new-tokens=1", "--json", input=piped)
    assert json.loads(ran.stdout)["texts"][0]["prompt"] == prompt


def test_bytes_that_are_no_text_are_refused(trained):
    ran = program(trained, "generate", b"--prompt=a\xffb")
    assert ran.returncode == 2 and "no valid UTF-8: character 2" in ran.stderr


def test_generate(trained, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("LLM_TRAINER_HOME", str(trained.root))
    def say(*argv):
        return (cli.main(["generate", "--prompt=The ", "--max-new-tokens=6", *argv]), *capsys.readouterr())
    assert say("--seed=3") == say("--seed=3")
    code, out, _ = say("--temperature=0", "--json", "--num-samples=2")
    texts = json.loads(out)["texts"]
    assert code == 0 and texts[0]["text"] == texts[1]["text"] and len(texts[0]["logprobs"]) == len(texts[0]["tokens"])
    assert say("--temperature=0", f"--output={tmp_path / 'out'}")[:2] == (0, "")
    assert (tmp_path / "out").read_text() == texts[0]["text"]
    for flag in ("--temperature=-1", "--top-p=0", "--top-p=1.5", "--top-k=100000", "--min-p=2", "--checkpoint=7",
                 f"--checkpoint={'9' * 5000}"):
        code, out, err = say(flag)
        assert code in (2, 3) and not out and err.startswith("llm-trainer: ") and "internal" not in err
    code, out, err = say("--prompt-file=x")
    assert code == 2 and "exclude each other" in err


LONG = ["generate", "done", "--prompt=The ", "--seed=3", "--max-new-tokens=900", "--ignore-eot", "--threads=1"]


@pytest.fixture(scope="module")
def long_text(trained, tmp_path_factory):
    "What is written for these words where there is room"
    file = tmp_path_factory.mktemp("whole") / "text"
    assert program(trained, *LONG, f"--output={file}").returncode == 0
    return file.read_bytes().decode()


@pytest.mark.parametrize("output, json_too", [
    ("old.txt", True),
    *(pytest.param(where, False, marks=pytest.mark.slow) for where in ("old.txt", "/dev/full", "pipe"))])
def test_a_text_that_finds_no_room_is_not_lost(trained, long_text, tmp_path, output, json_too):
    "Nor is the text that was there"
    (tmp_path / "old.txt").write_text("the old text")
    os.mkfifo(tmp_path / "pipe")
    said = small_disk(1, *LONG, *["--json"] * json_too, f"--output={output}", "--force", cwd=tmp_path,
                      home=trained.root)
    assert said.returncode == 1 and said.stderr.rstrip().endswith(f": {output}") and "Traceback" not in said.stderr
    assert json.loads(said.stdout)["texts"][0]["text"] == long_text if json_too else (
        said.stdout == f"{clean(long_text)}\n")
    assert (tmp_path / "old.txt").read_text() == "the old text" and len(list(tmp_path.iterdir())) == 2


def test_many_prompts(trained, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("LLM_TRAINER_HOME", str(trained.root))
    file, prompts = tmp_path / "prompts.jsonl", ["one", "two\u2028\u0085 lines", "three\n"]
    def say(*rows):
        file.write_text("\n".join(rows), encoding="utf-8", newline="")
        return cli.main(["generate", f"--prompts={file}", "--max-new-tokens=6", "--temperature=0",
                         "--json"]), *capsys.readouterr()
    rows = json.dumps({"prompt": prompts[0]}), "", json.dumps(prompts[1], ensure_ascii=False), json.dumps(prompts[2])
    code, out, _ = say(*rows)
    texts = json.loads(out)["texts"]
    assert code == 0 and [t["prompt"] for t in texts] == prompts and all(t["first_token_seconds"] for t in texts)
    for text in texts:
        cli.main(["generate", f"--prompt={text['prompt']}", "--max-new-tokens=6", "--temperature=0", "--json"])
        assert json.loads(capsys.readouterr().out)["texts"][0]["tokens"] == text["tokens"]
    for row, fault in (('{"text": "a"}', "line 2: expected"), ("[" * 100_000, "line 2: expected"),
                       ('"a\\ud800"', "line 2: the prompt is no valid UTF-8"),
                       ('""', "Prompt 2 of 2")):
        code, out, err = say('"one"', row)
        assert code == 2 and not out and fault in err


def test_ctrl_c_ends_a_text_politely(trained, tmp_path):
    env = {**os.environ, "LLM_TRAINER_HOME": str(trained.root), "OMP_NUM_THREADS": "1"}
    argv = ["generate", "--prompt=The ", "--max-new-tokens=1000000", "--ignore-eot"]
    def heard():
        return signal.signal(signal.SIGINT, signal.SIG_DFL)  # the tests themselves may run where Ctrl-C is ignored
    with subprocess.Popen([*PROGRAM, *argv], cwd=trained.root, env=env, preexec_fn=heard,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as writer:
        begun = writer.stdout.read(1)
        while True:  # one that falls into a destructor is lost to any Python program; a person presses again
            writer.send_signal(signal.SIGINT)
            try:
                rest, said = writer.communicate(timeout=30)
                break
            except subprocess.TimeoutExpired: continue
    assert begun and rest.endswith(b"\n") and not said and writer.returncode == 130


def test_a_damaged_checkpoint_folder_is_not_read(trained, tmp_path):
    whole = next((trained.root / "checkpoints" / "done").glob("step-*"))
    folder = tmp_path / "done" / whole.name
    shutil.copytree(whole, folder)
    argv = "generate", str(folder), "--prompt=a", "--max-new-tokens=1"
    assert program(trained, *argv).returncode == 0
    with open(folder / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    ran = program(trained, *argv)
    assert ran.returncode == 1 and not ran.stdout and "model.safetensors is damaged" in ran.stderr


def test_interactive(trained):
    said = ("The \n/set temperature 0\n/set tempreature 1\n/set top_p 3\n/more\n/more\n/sat\n"
            '/set stop ["a", "b"]\n/history\n/quit\n')
    ran = program(trained, "generate", "--interactive", "--max-new-tokens=90", input=said)
    assert ran.returncode == 0 and not ran.stderr
    for text in ("temperature 0.0", "Did you mean temperature?", "top_p must be", "Did you mean /set?", "('a', 'b')",
                 "1  The"):
        assert text in ran.stdout
    assert "The prompt has" not in ran.stdout  # /more goes on beyond the context


def test_who_waits_for_another_reads_so_while_waiting(space):
    (space.root / "a.txt").write_text("One word after another. " * 400)
    prepare = [*PROGRAM, "prepare", "--config", "tiny", "--dataset", "a.txt"]
    assert program(space, *prepare[len(PROGRAM):]).returncode == 0
    folder, = [f.parent for f in space.data.glob("tokens-*/meta.json")]
    shutil.rmtree(folder)
    with locks.Lock(folder.with_name(f".{folder.name}.lock")) as held:
        assert held.acquire()
        with subprocess.Popen(prepare, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as waits:
            said = next(line for line in waits.stdout if "Another process is preparing" in line)
            assert folder.name in said and "waiting" in said and waits.poll() is None
            held.release()
            assert "train tokens" in waits.communicate()[0] and waits.returncode == 0 and folder.is_dir()
