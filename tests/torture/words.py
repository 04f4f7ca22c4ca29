"""Argument lists and prompts: nothing wrong is obeyed, nothing right is changed."""
from __future__ import annotations

import contextlib
import io
import json
import os
import random
import string
import subprocess
import sys
import tempfile
from pathlib import Path

from llm_trainer.cli import commands as cli, repl as talk
from llm_trainer.errors import UsageError
from llm_trainer.cli.parser import FrontEnd

from .battery import trial
from .children import in_child

NOISE = ["", " ", "é", "🙂", "\u202e", "a\nb", "\x1b[2J", "\udc80", "#", "[a]", "{a}", "None", "True", "1e999",
         "0x1f", "a" * 3000, "--", "-"]


def _typo(rng: random.Random, word: str) -> str:
    "One slip of the fingers"
    spot, letter = rng.randrange(len(word)), rng.choice(string.ascii_lowercase)
    match rng.randrange(4):
        case 0: return word[:spot] + word[spot + 1:]
        case 1: return word[:spot] + word[spot] + word[spot:]
        case 2: return word[:spot] + letter + word[spot + 1:]
        case _: return word[:spot] + word[spot + 1:spot + 2] + word[spot] + word[spot + 2:]


def wrong(rng: random.Random) -> tuple[list[str], str | None]:
    "An argument list that is surely wrong, and the flag its message must suggest"
    name = rng.choice(list(cli.front.commands))
    command = cli.front.commands[name]
    flags = {n: f for n, f in command.flags.items() if not f.positional}
    required = [word for f in command.flags.values() if f.positional and f.default is not None for word in ["x"]][:1]
    flag = rng.choice(list(flags.values())) if flags else None
    kind = rng.choice(["unknown", "typo", "no value", "twice", "type", "command", "one dash", "switch value",
                       "too many"])
    def noise():
        return rng.choice([*NOISE, "".join(rng.choice(string.printable) for _ in range(rng.randrange(1, 12)))])
    if kind == "command" or flag is None:
        word = _typo(rng, name) if rng.random() < .5 else rng.choice([n for n in NOISE if n])
        return ([word, "--x"] if word not in cli.front.commands else [word + "x"]), None
    if kind == "typo":
        typed = _typo(rng, flag.name if rng.random() < .5 else flag.name.replace("_", "-"))
        if typed and not command.find(typed)[0] and len(flag.name) > 3 and not flag.hidden and typed[0] != "-":
            return [name, *required, f"--{typed}={noise()}"], flag.spelling
    if kind == "no value" and not flag.is_switch: return [name, *required, flag.spelling], None
    if kind == "twice" and not flag.repeats:
        value = [] if flag.is_switch else ["=" + ("1" if flag.takes_number else "x")]
        return [name, *required, *(flag.spelling + "".join(value) for _ in range(2))], None
    if kind == "type" and flag.kind in (int, float):
        return [name, *required, f"{flag.spelling}={rng.choice(['ten', '', '1,2', '2..5', '[1]'])}"], None
    if kind == "switch value" and flag.is_switch: return [name, *required, f"{flag.spelling}=perhaps"], None
    if kind == "one dash": return [name, *required, f"-{flag.name}"], None
    if kind == "too many": return [name, *(noise().lstrip("-") or "x" for _ in range(5)), "--surely-unknown"], None
    return [name, *required, f"--zz{rng.randrange(10**6)}{noise()}"], None


class Written(BaseException):
    "A wrong argument list was about to write"


def _forbid_writes() -> None:
    def hook(event, args):
        if event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "subprocess.Popen", "os.fork",
                     "os.posix_spawn"):
            raise Written(f"{event} {args[:1]}")
        if event == "open" and (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and args[0] != os.devnull:
            raise Written(f"open {args[0]}")
    sys.addaudithook(hook)


@trial("T10", goal=50000, slice=2000, chunk=2500)
def arguments(n: int, seed: int) -> list[str]:
    """wrong argument lists (unknown flags, one-letter typos of each flag, missing, doubled and ill-typed values, odd
    Unicode): exit 2, no traceback, nothing written or started (audited), the right flag suggested"""
    with tempfile.TemporaryDirectory(prefix="torture-") as tmp:
        from llm_trainer import workspace
        workspace.init(tmp)

        def act():
            os.chdir(tmp)
            os.environ["LLM_TRAINER_HOME"] = tmp
            for module in ("llm_trainer.config", "llm_trainer.runs.run", "llm_trainer.runs.launch", "fire"):
                __import__(module)
            sys.dont_write_bytecode = True
            _forbid_writes()
            failures = []
            for case in range(seed, seed + n):
                argv, suggestion = wrong(random.Random(f"argv {case}"))
                said = io.StringIO()
                try:
                    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said): code = cli.main(argv)
                except BaseException as e: code = repr(e)
                text = said.getvalue()
                problem = (f"exit code {code}" if code != 2 else "traceback" if "Traceback" in text else
                           f"{suggestion} not suggested" if suggestion and suggestion not in text
                           and "is no on-off flag" not in text else "")
                if problem: failures.append(f"case {case}: {argv!r:.200}: {problem}: {text[:200]}")
            return json.dumps(failures)
        ended = in_child(act, limit=600)
    if ended.code == 0: return json.loads(ended.said)
    return [f"cases from {seed}: ended {ended.code}: {ended.said[-500:]}"]


# Prompts --------------------------------------------------------------------------------------------------------------

PROMPTS = ["123", "1.50", "0x1f", "1e5", "[a]", "{a}", "{'a': 1}", "(1,)", "True", "None", "Hello, world",
           "once # upon", "'", '"', '"a"', "\\", "\\n", "-", "--", "---", "-x", "--foo", "--foo=bar", "-1", "a\nb",
           "\n", "\t", " ", "  a  ", "🙂", "é", "\u202e", "\x1b[2J", "\x07", "$HOME", "`id`", "a" * 5000, "=", "a=b",
           "@file", "%s", "{}", "<|endoftext|>", "\udc80\udcff", "\r\n", "\ufeff", "b'x'", "lambda: 0"]


def prompt(rng: random.Random) -> str:
    "A text somebody might want to continue"
    if rng.random() < .3: return rng.choice(PROMPTS)
    letters = string.printable + "éß漢🙂\u202e\x1b\udcff"
    return "".join(rng.choice(letters) for _ in range(rng.randrange(1, 60))).replace("\0", "") or "x"


_heard: list = []


def echo(
    *,
    prompt: str | None = None,  # Text
    prompt_file: Path | None = None,  # FILE: File
):
    "Remember what arrives"
    _heard.append(prompt if prompt is not None else talk.read_text(prompt_file))


ECHO = FrontEnd("echo", "0", "Remembers prompts.", {"Use": {"echo": echo}})


@trial("T11", goal=10000, slice=500, chunk=500)
def prompts(n: int, seed: int) -> list[str]:
    """prompts (numbers, brackets, quotes, #, dashes, newlines, emoji, control and stray bytes) as a flag, from a file
    and, each 100th, through a real process and its stdin: byte-equal"""
    failures = []
    with tempfile.TemporaryDirectory(prefix="torture-") as tmp:
        file = Path(tmp) / "prompt"
        for case in range(seed, seed + n):
            text = PROMPTS[case] if case < len(PROMPTS) else prompt(random.Random(f"prompt {case}"))
            data = text.encode("utf-8", "surrogateescape")
            _heard.clear()
            file.write_bytes(data)
            spaced = not text.startswith("-") or text == "-"
            joined = ["echo", f"--prompt={text}"]
            codes = [ECHO.run(argv) for argv in (joined, ["echo", "--prompt", text] if spaced else joined,
                                                 ["echo", "--prompt-file", str(file)])]
            if codes != [0, 0, 0] or _heard != [text] * 3:
                failures.append(f"case {case}: {text!r} became {_heard!r}, {codes}")
            elif case % 100 == 0:
                code = ("import sys; from torture.words import ECHO, _heard; c = ECHO.run(); "
                        "sys.stdout.buffer.write(_heard[0].encode('utf-8', 'surrogateescape')); sys.exit(c)")
                env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str,
                                                                       [Path(__file__).parents[1],
                                                                        Path(__file__).parents[2]]))}
                for argv in ([b"echo", b"--prompt=" + data], [b"echo", b"--prompt-file", b"-"]):
                    done = subprocess.run([sys.executable, "-c", code, *argv], input=data, capture_output=True, env=env)
                    if done.returncode or done.stdout != data:
                        failures.append(f"case {case}: {data!r} became {done.stdout!r}: {done.stderr[-200:]!r}")
            try: talk.one_prompt(text, None)
            except UsageError: pass  # a stray byte is refused in words: a tokenizer reads text
    return failures
