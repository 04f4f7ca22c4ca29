"""The strict front end, tried on a small set of commands that really go through Fire."""
import itertools
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import pytest

from llm_trainer.errors import BusyError, UsageError
from llm_trainer.cli.parser import (
    Command, Flag, From, FrontEnd, _one_edit, _row, choices, convert, docments, members, nearest, shown)

seen = {}


def paint(
    canvas: str,  # FOLDER|FILE: What to paint on
    tint: str | None = None,  # A tint
    *,
    # Colour
    colour: Literal["red", "green"] = "red",  # Colour of the brush
    layers: int = 3,  # How many layers
    opacity: float | None = None,  # How much shines through
    glaze: bool = True,  # Glaze it at the end
    dry: bool = False,  # Wait until it is dry
    headless: bool = False,  # Paint without looking
    no_copies: int | None = None,  # Copies to leave out
    # Text
    title: str | None = None,  # What is written under it
    stop: list[str] = [],  # Words never to write
    note_file: Path | None = None,  # FILE: More words
):
    """Paint a picture

    It takes a while.
    """
    seen.clear()
    seen.update(locals())
    return 7 if canvas == "seven" else None


def hang(picture: str, *, title: str, **knobs):
    "Hang a picture"
    seen.clear()
    seen.update(locals())
    if picture == "busy": raise BusyError("The wall is busy.")
    if picture == "ctrl-c": raise KeyboardInterrupt
    if picture == "bug": return 1 / 0
    if picture == "full": raise OSError(28, "No space left on device", "/wall")
    if picture == "files": raise OSError(24, "Too many open files")
    if picture == "memory": raise MemoryError


hang.knobs = lambda: [Flag("n_hooks", int, 2, "Hooks in the wall", "Wall", note="2; 1 to 9"),
                      Flag("level", Literal["auto"] | bool, "auto", "Hang it level", "Wall", note="auto")]
front = FrontEnd("art", "1.2", "Pictures.", {"Make": {"paint": paint}, "Show": {"hang": hang}},
                 candidates={"picture": lambda: ["sunset", "seven"]})


def values(*argv): return front.parse(list(argv))[1]


def refused(*argv) -> str:
    with pytest.raises(UsageError) as error: front.parse(list(argv))
    return str(error.value)


def test_values_arrive_with_the_types_of_the_signature():
    assert values("paint", "x", "--layers=4", "--opacity", "-.5", "--colour", "green") == \
        {"canvas": "x", "layers": 4, "opacity": -0.5, "colour": "green"}
    assert type(values("paint", "x", "--opacity", "1")["opacity"]) is float
    assert values("paint", "x", "--note-file", "a b.txt")["note_file"] == "a b.txt"


def test_dashes_and_underscores_are_the_same():
    for spelling in ("--note-file=f", "--note_file=f"): assert values("paint", "x", spelling)["note_file"] == "f"
    for spelling in ("--n-hooks=4", "--n_hooks=4"): assert values("hang", "x", "--title=t", spelling)["n_hooks"] == 4


@pytest.mark.parametrize("word, value", [("--dry", True), ("--no-dry", False), ("--nodry", False), ("--no_dry", False),
                                         ("--dry=false", False), ("--dry=YES", True), ("--dry=0", False)])
def test_switches(word, value): assert values("paint", "x", word)["dry"] is value


def test_a_switch_never_swallows_a_word():
    assert values("paint", "--dry", "x") == {"dry": True, "canvas": "x"}
    assert "true|false" in refused("paint", "x", "--dry=maybe")
    assert "'=': --flag=false" in refused("paint", "x", "y", "--dry", "false")


def test_a_name_that_begins_with_no_is_itself():
    assert values("paint", "x", "--no-copies", "2")["no_copies"] == 2
    assert values("hang", "x", "--title=t", "--no-level")["level"] is False
    assert values("hang", "x", "--title=t", "--level", "true")["level"] is True


@pytest.mark.parametrize("argv, says", [
    (["paint", "x", "--coluor", "red"], "Did you mean --colour?"),
    (["paint", "x", "--layer", "3"], "Did you mean --layers?"),
    (["paint", "x", "--no-glase"], "Did you mean --no-glaze?"),
    (["paint", "x", "--colour=grene"], "Did you mean green?"),
    (["paint", "x", "--layers=two"], "takes a whole number, not 'two'"),
    (["paint", "x", "--layers=2.0"], "takes a whole number"),
    (["paint", "x", "--layers=2,3"], "takes a whole number"),
    (["paint", "x", "--layers"], "needs a value"),
    (["paint", "x", "--layers", "--dry"], "looks like a flag"),
    (["paint", "x", "--layers=1", "--layers", "1"], "given twice"),
    (["paint", "x", "--dry", "--no-dry"], "given twice"),
    (["paint", "x", "--note-file=a", "--note_file=a"], "given twice"),
    (["paint", "x", "--canvas", "x"], "given twice"),
    (["paint", "x", "--opacity=nan"], "takes a number"),
    (["paint", "x", "--opacity=inf"], "takes a number"),
    (["paint", "x", "--title", "-t"], "joined: --title=-…"),
    (["paint", "x", "--lay=3"], "Did you mean --layers?"),
    (["paint", "x", "--no-layers"], "it takes a value"),
    (["paint", "x", "-dry"], "two dashes"),
    (["paint", "x", "---dry"], "two dashes"),
    (["paint", "x", "-q"], "no flag '-q'"),
    (["paint", "x", "--n-hooks=2"], "no flag '--n-hooks'"),
    (["paint", "x", "y", "z"], "one too many"),
    (["paint"], "needs CANVAS"),
    (["paint", "x", "--note-file="], "takes"),
    (["hang", "x"], "needs --title"),
    (["pant", "x"], "Did you mean `art paint`?"),
    (["--dry", "paint"], "flags come after"),
    (["paint", "x", "--no-dry=1"], "takes no value"),
])
def test_faults_are_said_before_anything_runs(argv, says, capsys):
    seen.clear()
    assert says in refused(*argv)
    assert front.run(argv) == 2 and not seen
    out, err = capsys.readouterr()
    assert not out and says in err and "Traceback" not in err


def test_two_dashes_end_the_flags(): assert values("paint", "--", "--dry", "-h") == {"canvas": "--dry", "tint": "-h"}


def test_repeatable_flags_gather():
    assert values("paint", "x", "--stop", "a", "--stop=-b")["stop"] == ["a", "-b"]


def test_convert_asks_text_last():
    assert convert("5", int | str) == 5 and convert("best", int | str) == "best" and convert("none", int | None) is None
    with pytest.raises(ValueError, match="auto, or true or false|true or false"): convert("x", Literal["auto"] | bool)


def strings(n: int, seed: int):
    "`n` texts that tools like to mangle"
    awkward = ["", "123", "[a]", "{a}", "True", "None", "-x", "-", "--", "--dry", "once # upon", "a=b", "'", '"',
               "\\", "\n", "\0", "\x1b[31m", "\udc80", "\ud800", "é", "🙂", "\u202e", "1e5", "0x1f", "Hello, world",
               "(1, 2)", "$HOME", "%s"]
    rng = random.Random(seed)
    yield from awkward
    for _ in range(n - len(awkward)):
        yield "".join(rng.choice([rng.choice(awkward), chr(rng.randrange(0x110000)), chr(rng.randrange(32, 127))])
                      for _ in range(rng.randrange(12)))


def test_texts_pass_through_fire_unchanged():
    for text in strings(2000, seed=1):
        front.call(*front.parse(["paint", f"--title={text}", f"--stop={text}", "--", text]))
        assert seen["title"] == text and seen["stop"] == [text] and seen["canvas"] == text


def test_exit_codes_and_messages(capfd, monkeypatch):
    assert front.run(["paint", "seven"]) == 7
    assert front.run(["paint", "x"]) == 0
    assert capfd.readouterr() == ("", "")
    for picture, code, says in [("busy", 75, "The wall is busy."), ("ctrl-c", 130, "interrupted"),
                                ("bug", 1, "internal error: ZeroDivisionError"),
                                ("full", 1, "No space left on device: /wall")]:
        assert front.run(["hang", picture, "--title=t"]) == code
        out, err = capfd.readouterr()
        assert not out and says in err and "Traceback" not in err
    monkeypatch.setenv("LLM_TRAINER_DEBUG", "1")
    with pytest.raises(ZeroDivisionError): front.run(["hang", "bug", "--title=t"])


def test_a_reader_that_went_away_is_no_fault():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "llm_trainer", "--version"], stdout=write, stderr=subprocess.PIPE,
                          env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])})
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


def test_messages_hold_no_control_bytes(capsys):
    assert front.run(["paint", "x", "--\x1b[31mred\u202e"]) == 2
    assert front.run(["p\x1b]0;evil\x07int"]) == 2
    err = capsys.readouterr().err
    assert "\x1b" not in err and "\x07" not in err and "\u202e" not in err


@pytest.mark.parametrize("argv", [[], ["help"], ["--help"], ["-h"], ["help", "paint"], ["paint", "--help"],
                                  ["paint", "x", "-h"], ["paint", "--coluor", "-h"], ["hang", "--help"]])
def test_help_runs_nothing_and_fits(argv, capsys):
    seen.clear()
    assert front.run(argv) == 0 and not seen
    out = capsys.readouterr().out
    assert "Usage: art" in out and max(map(len, out.splitlines())) <= 80


def test_help_says_what_the_signature_says():
    page = front.help(front.commands["paint"])
    for text in ("Paint a picture", "It takes a while.", "FOLDER|FILE", "Colour\n", "--colour red|green", "[red]",
                 "--layers N", "[3]", "--[no-]glaze", "[on]", "(may be repeated)", "--note-file FILE"):
        assert text in page
    assert "--n_hooks N" in front.help(front.commands["hang"]) and "[2; 1 to 9]" in front.help(front.commands["hang"])


def test_version(capsys):
    for more in [], ["--help"]:
        assert front.run(["--version", *more]) == 0 and capsys.readouterr().out == "art 1.2\n"


def test_nearest():
    assert nearest("lr", ["l_r", "dry"]) == ["l_r"] and nearest("rl", ["lr", "layers"]) == ["lr"]
    assert not nearest("qqq", ["lr"]) and nearest("colouring", ["layers", "colour"]) == ["colour"]
    begun = ["note_file", "note_book", "note_size", "note_all"]
    assert nearest("not", begun) == begun[:3] and not nearest("no", begun)
    assert nearest("lay", ["laz", "lax", "law", "lat", "lab"]) == ["laz", "lax", "law", "lat"]
    assert nearest("seperation", ["separating", "separators"]) == ["separating"]  # of what is only alike the best


def test_completion():
    def words(*argv): return [w for w, _ in front.complete(list(argv))]
    assert words("") == ["paint", "hang"] and words("pa") == ["paint"]
    assert "--colour" in words("paint", "--") and "--colour" not in words("paint", "--colour=red", "--")
    assert words("paint", "--colour", "") == ["red", "green"] and words("paint", "--colour", "=", "r") == ["red"]
    assert words("paint", "--colour=g") == ["--colour=green"]
    assert words("hang", "s") == ["sunset", "seven"] and words("nothing", "x") == []
    assert "--n_hooks" in words("hang", "sunset", "") and "seven" not in words("hang", "sunset", "")
    assert words("hang", "--n_hooks", "3", "s") == ["sunset", "seven"]
    for shell in ("bash", "zsh", "fish"): assert "_ART_COMPLETE=1" in front.completion_script(shell)
    assert words("paint", "--colour", "=") == ["red", "green"] and words("hang", "=") == []
    assert words("paint", "x", "") == []  # nothing is known of a tint, and it is not time for flags
    assert dict(front.complete([""])) == {"paint": "Paint a picture", "hang": "Hang a picture"}


def test_what_a_signature_says():
    described = docments(paint)
    assert described["canvas"] == ("", "FOLDER|FILE", "What to paint on") and docments(len) == {}
    assert described["colour"] == ("Colour", "", "Colour of the brush")
    assert Command("paint", paint).flags["colour"].group == "Colour"
    assert "\n  paint         Paint a picture\n" in front.help()
    flags = Command("hang", hang).flags
    assert flags["title"].group == "Flags" and flags["n_hooks"].group == "Wall"
    assert members(Annotated[int | None, "how many"]) == [int, type(None)]
    assert choices(Literal["auto", None, False]) == ["auto", "none", "false"]
    assert values("paint", "x", "--title", "-")["title"] == "-"
    assert "CANVAS: What to paint on." in refused("paint") and "--title: TEXT." in refused("hang", "x")


def test_bounds_hold_their_ends(capsys):
    def cut(*, pieces: Annotated[int, From(2, 4)] = 2): print(pieces)
    end = FrontEnd("art", "1", "", {"All": {"cut": cut}})
    for pieces, code in (1, 2), (2, 0), (4, 0), (5, 2):
        assert end.run(["cut", f"--pieces={pieces}"]) == code
        assert capsys.readouterr().out == ("" if code else f"{pieces}\n")


def test_a_flag_that_needs_another_says_so(capsys):
    def cut(*, title: str = "",  # What stands on it
            size: int = 1):  # With --title: how large
        print(title, size)
    end = FrontEnd("art", "1", "", {"All": {"cut": cut}})
    assert end.run(["cut", "--size=2"]) == 2 and "--size has no effect without --title." in capsys.readouterr().err
    assert end.run(["cut", "--size=2", "--title=x"]) == 0 and capsys.readouterr().out == "x 2\n"
    assert end.run(["cut", "--=2"]) == 2 and "'--=2' is no flag." in capsys.readouterr().err


def test_what_runs_out_is_named(capsys):
    for picture, words in (("files", "Too many open files"), ("memory", "Memory ran out"), ("full", "/wall")):
        assert front.run(["hang", picture, "--title=x"]) == 1
        assert words in (said := capsys.readouterr().err) and "internal error" not in said


def test_usage_names_what_is_needed_and_what_may_be():
    def plain(a: str, b: str = "x"): "No flag"
    def must(*, title: str): "Only one that is needed"
    def may(*, title: str = "x"): "Only one that is not"
    end = FrontEnd("art", "1", "", {"All": {"plain": plain, "must": must, "may": may}})
    assert [end.usage(c) for c in end.commands.values()] == [
        "art plain A [B]", "art must --title TEXT", "art may [FLAGS]"]
    assert front.usage(front.commands["paint"]) == "art paint FOLDER|FILE [TINT] [FLAGS]"
    assert front.usage(front.commands["hang"]) == "art hang PICTURE --title TEXT [FLAGS]"


def test_every_row_of_help():
    rows = [row.rstrip() for row in front.help(front.commands["paint"]).splitlines()]
    assert rows == [
        "art paint: Paint a picture", "", "Usage: art paint FOLDER|FILE [TINT] [FLAGS]", "", "It takes a while.", "",
        "Arguments", "  FOLDER|FILE                What to paint on", "  TINT                       A tint", "",
        "Colour", "  --colour red|green         Colour of the brush [red]",
        "  --layers N                 How many layers [3]", "  --opacity X                How much shines through",
        "  --[no-]glaze               Glaze it at the end [on]", "  --dry                      Wait until it is dry",
        "  --headless                 Paint without looking", "  --no-copies N              Copies to leave out", "",
        "Text", "  --title TEXT               What is written under it",
        "  --stop TEXT                Words never to write (may be repeated)",
        "  --note-file FILE           More words"]
    assert front.help(front.commands["hang"]).splitlines()[-6:] == [
        "", "Wall", "  --n_hooks N                Hooks in the wall [2; 1 to 9]",
        "  --level auto|true|false    Hang it level [auto]", "",
        "Each setting has its place: art docs configuration#lr"]
    assert _row("a" * 25, "text", 27) == ["  " + "a" * 25 + "  text"]
    assert _row("a" * 26, "text", 27) == ["  " + "a" * 26, " " * 29 + "text"]
    assert _row("x", "", 27) == ["  x"]
    assert _row("x", "word " * 12, 27) == ["  x" + " " * 26 + "word " * 9 + "word", " " * 29 + "word word"]
    long = "|".join(["abcdefg"] * 10)[:78]
    assert _row(long, "", 27)[0] == f"  {long}" and len(_row(long + "x", "", 27)) == 3


def test_every_word_for_on_and_off():
    assert all(values("paint", "x", f"--dry={w}")["dry"] is True for w in ("true", "yes", "on", "1", "TRUE"))
    assert all(values("paint", "x", f"--dry={w}")["dry"] is False for w in ("false", "no", "off", "0", "No"))


def test_a_word_of_the_users_is_shown_up_to_its_limit():
    assert shown("x" * 60) == f"'{'x' * 60}'" and shown("x" * 61) == f"'{'x' * 60}…'"
    assert shown("a\nb\x1b[1m") == "'a b'"


def test_one_slip_of_the_fingers_by_trying_them_all():
    def slips(word):
        for i in range(len(word) + 1):
            yield from (word[:i] + c + word[i:] for c in "abc")
            if i == len(word): continue
            yield word[:i] + word[i + 1:]
            yield from (word[:i] + c + word[i + 1:] for c in "abc")
            yield word[:i] + word[i + 1:i + 2] + word[i] + word[i + 2:]
    words = ["".join(letters) for n in range(5) for letters in itertools.product("abc", repeat=n)]
    for word in words:
        near = set(slips(word))
        for other in words[:121]: assert _one_edit(word, other) == (other in near or other == word), (word, other)


def test_a_flag_of_another_command_is_pointed_at():
    said = refused("hang", "x", "--title=y", "--opacity=1")
    assert "hang has no flag '--opacity'" in said and "(paint has it.)" in said
    assert "(" not in refused("hang", "x", "--title=y", "--wholly-unknown=1")


def test_help_of_one_command_and_of_all(capsys):
    for argv, begins in ((["help", "paint"], "art paint:"), (["paint", "-h"], "art paint:"), (["help"], "Pictures."),
                         ([], "Pictures."), (["--help"], "Pictures."), (["--version"], "art 1.2")):
        assert front.run(argv) == 0 and capsys.readouterr().out.startswith(begins)
    assert front.run(["hang", "--title=x", "--", "--help"]) == 0 and seen["picture"] == "--help"
