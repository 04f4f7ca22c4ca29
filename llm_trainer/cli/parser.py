"""A strict front end for python-fire, built from the commands' signatures. Knows nothing of training.

Only an argument list without a fault reaches `fire.Fire`, its values as they were checked."""
from __future__ import annotations
# Fire alone guesses types, runs a command before it complains about a misspelt flag, and cuts text at a `#`.

import inspect
import math
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from textwrap import wrap

from llm_trainer.errors import LLMTrainerError, UsageError
from llm_trainer.system.process import no_memory, too_many_files
from llm_trainer.terminal import clean

MISSING = inspect.Parameter.empty
WIDTH = 80
EXPECTED = {int: "a whole number", float: "a number", bool: "true or false"}
BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
METAVAR = {int: "N", float: "X", bool: "true|false", str: "TEXT", Path: "PATH"}


# Types ---------------------------------------------------------------------------------------------------------------

def members(kind) -> list:
    "What may stand for the annotation `kind`: `int | None` → [int, NoneType]; a Literal stays whole"
    origin = typing.get_origin(kind)
    if origin is typing.Annotated: return members(typing.get_args(kind)[0])
    if origin in (typing.Union, types.UnionType): return [m for part in typing.get_args(kind) for m in members(part)]
    return [kind]


def choices(kind) -> list[str]:
    "The words that a Literal (or a bool inside a union) in `kind` offers"
    found = []
    for m in members(kind):
        if typing.get_origin(m) is typing.Literal: found += [_word(v) for v in typing.get_args(m)]
        elif m is bool: found += ["true", "false"]
    return found


def _word(value) -> str:
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def _as(text: str, kind):
    "`text` as one value of the plain type or Literal `kind`; ValueError where it is none"
    if typing.get_origin(kind) is typing.Literal: return {_word(v): v for v in typing.get_args(kind)}[text]
    if typing.get_origin(kind) is list: return [text]
    if kind is types.NoneType: return {"none": None}[text.lower()]
    if kind is bool: return BOOLEANS[text.lower()]
    if kind is int: return int(text)
    if kind is float:
        if not math.isfinite(value := float(text)): raise ValueError(text)
        return value
    if kind is Path and not text: raise ValueError(text)
    if kind in (str, Path): return text
    raise ValueError(text)


def convert(text: str, kind) -> object:
    "`text` as a value of the annotation `kind`; ValueError with what was expected"
    parts = sorted(members(kind), key=lambda m: m in (str, Path))  # text takes anything, so it is asked last
    if str in parts: parts = [m for m in parts if m is not types.NoneType]  # and "None" is a text like any other
    for part in parts:
        try: return _as(text, part)
        except (KeyError, ValueError): pass
    said = [" or ".join(choices(m)) if typing.get_origin(m) is typing.Literal else EXPECTED.get(m, "text")
            for m in parts if m is not types.NoneType]
    raise ValueError(", or ".join(said) or "text")


class From:
    """The bounds of a number, in its annotation: `Annotated[int, From(1, 100)]`."""

    def __init__(self, low: int, high: int | None = None):
        self.low, self.high = low, high

    def __contains__(self, value) -> bool: return self.low <= value <= (math.inf if self.high is None else self.high)
    def __str__(self) -> str: return f"from {self.low}" + (f" to {self.high:,}" if self.high is not None else "")


def alone(**others: str):
    "Says of a command which flags (words) take the place of the one named, which would have no effect beside them"
    def give(function):
        function.alone = {name: words.split() for name, words in others.items()}
        return function
    return give


# Commands and their flags --------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Flag:
    """One parameter of a command, as the command line sees it."""
    name: str
    kind: object = str
    default: object = MISSING
    description: str = ""
    group: str = "Flags"
    metavar: str = ""
    positional: bool = False
    hidden: bool = False
    note: str = ""  # said in place of the default, such as "3; 1 to 10"

    @property
    def is_switch(self) -> bool: return self.kind is bool
    @property
    def can_be_false(self) -> bool: return "false" in choices(self.kind)
    @property
    def repeats(self) -> bool: return any(typing.get_origin(m) is list for m in members(self.kind))
    @property
    def takes_number(self) -> bool: return bool({int, float} & set(members(self.kind)))
    @property
    def bounds(self) -> From | None: return next((m for m in typing.get_args(self.kind) if isinstance(m, From)), None)
    @property
    def spelling(self) -> str: return f"--{self.name}" if self.note else f"--{self.name.replace('_', '-')}"

    def placeholder(self) -> str:
        "What stands for its value in help"
        if self.metavar: return self.metavar
        words = choices(self.kind)
        if self.positional: return "|".join(words) or self.name.upper()
        plain = [METAVAR[m] for m in members(self.kind) if m in METAVAR and m is not bool]
        return "|".join([*words, *plain]) or METAVAR[str]


def docments(function) -> dict[str, tuple[str, str, str]]:
    "Parameter → (group, metavar, description), read from the comments in the signature"
    group, found = "", {}
    try: lines = inspect.getsource(function).splitlines()
    except (OSError, TypeError): return {}
    for line in lines:
        if re.match(r"\)? *(->.*)?:", line): break
        if m := re.match(r"\s+# (.+)", line): group = m[1]
        elif m := re.match(r"\s+\*{0,2}(\w+).*?  # (?:((?:[a-z]+\|)*[A-Z]+(?:\|[A-Za-z]+)*): )?(.+)", line):
            found[m[1]] = (group, m[2] or "", m[3])
    return found


class Command:
    """A plain function as a command: keyword-only parameters are flags, the others may also stand in order."""

    def __init__(self, name: str, function: Callable):
        self.name, self.function = name, function

    @property
    def summary(self) -> str: return (self.function.__doc__ or "").split("\n")[0]

    @cached_property
    def flags(self) -> dict[str, Flag]:
        "Every flag by its parameter's name; those of `function.knobs` (a callable) stand for its `**kwargs`"
        kinds, described = typing.get_type_hints(self.function, include_extras=True), docments(self.function)
        found: dict[str, Flag] = {}
        for p in inspect.signature(self.function).parameters.values():
            if p.kind is p.VAR_KEYWORD: continue
            group, metavar, text = described.get(p.name, ("", "", ""))
            found[p.name] = Flag(p.name, kinds.get(p.name, str), p.default, text, group or "Flags", metavar,
                                 positional=p.kind is p.POSITIONAL_OR_KEYWORD)
        for flag in getattr(self.function, "knobs", list)(): found.setdefault(flag.name, flag)
        return found

    @property
    def positionals(self) -> list[Flag]: return [f for f in self.flags.values() if f.positional]

    def find(self, key: str) -> tuple[Flag | None, bool]:
        "The flag spelt `key` (no leading dashes), and whether it is spelt as its negation"
        name = key.replace("-", "_")
        if name in self.flags: return self.flags[name], False
        for prefix in ("no_", "no"):
            if name.startswith(prefix) and (f := self.flags.get(name[len(prefix):])) and f.can_be_false: return f, True
        return None, False


def _one_edit(a: str, b: str) -> bool:
    "True where one letter added, dropped, changed or swapped with its neighbour makes `b` of `a`"
    if abs(len(a) - len(b)) > 1: return False
    i = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    return a[i + 1:] == b[i + 1:] or a[i + 1:] == b[i:] or a[i:] == b[i + 1:] or \
        (a[i:i + 2] == b[i:i + 2][::-1] and a[i + 2:] == b[i + 2:])


def nearest(word: str, names: Iterable[str]) -> list[str]:
    "The `names` that `word` was probably meant to be, the likeliest first"
    import difflib
    names, plain = list(names), word.lower().replace("-", "_")
    close = [n for n in names if _one_edit(plain, n.replace("-", "_"))]
    close.sort(key=lambda n: -difflib.SequenceMatcher(None, plain, n.replace("-", "_")).ratio())
    if close: return close[:4]
    begun = [n for n in names if len(plain) > 2 and n.replace("-", "_").startswith(plain)]
    return begun[:3] or difflib.get_close_matches(plain, names, 1, 0.6)


def shown(text: str, limit: int = 60) -> str:
    "A word of the user's, quoted for a message: cleaned, on one line, not too long"
    text = clean(text, keep="")
    return f"'{text if len(text) <= limit else text[:limit] + '…'}'"


def _or(words: list[str]) -> str:
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


# The front end -------------------------------------------------------------------------------------------------------

class FrontEnd:
    """Commands in groups, one strict argument list in, one exit code out."""

    def __init__(self, name: str, version: str, about: str, groups: dict[str, dict[str, Callable]],
                 candidates: dict[str, Callable[[], Iterable[str]]] = {}, examples: str = ""):
        self.name, self.version, self.about, self.groups = name, version, about, groups
        self.candidates, self.examples = candidates, examples
        self.commands = {n: Command(n, f) for group in groups.values() for n, f in group.items()}

    # -- reading an argument list

    def command(self, word: str) -> Command:
        if word in self.commands: return self.commands[word]
        if word.startswith("-"):
            raise UsageError(f"{shown(word)} stands before the command; flags come after it.\n"
                             f"All commands: {self.name} --help")
        close = nearest(word, self.commands)
        said = f" Did you mean {_or([f'`{self.name} {c}`' for c in close])}?" if close else ""
        raise UsageError(f"There is no command {shown(word)}.{said}\nAll commands: {self.name} --help")

    def parse(self, argv: list[str]) -> tuple[Command, dict[str, object]]:
        "The command and its values, every one of them checked; UsageError says the first fault. Nothing is run"
        command, values, loose = self.command(argv[0]), {}, []
        words = iter(argv[1:])
        for word in words:
            if word == "--": loose += words
            elif not word.startswith("-") or word == "-" or self._is_number(word): loose.append(word)
            else: self._read_flag(command, word, words, values)
        self._place(command, loose, values)
        self._check_required(command, values)
        self._check_pairs(command, values)
        return command, values

    def _fault(self, command: Command, text: str) -> UsageError:
        return UsageError(f"{text}\nAll flags: {self.name} {command.name} --help")

    @staticmethod
    def _is_number(word: str) -> bool:
        return bool(re.fullmatch(r"-(\d[\d_]*\.?\d*|\.\d+)([eE][+-]?\d+)?", word))

    def _read_flag(self, command: Command, word: str, words, values: dict):
        "Read the flag `word`, and from `words` its value if it needs one, into `values`"
        key, equals, text = word.removeprefix("--").partition("=")
        flag, negated = command.find(key) if word.startswith("--") else (None, False)
        if flag is None: raise self._fault(command, self._unknown(command, word))
        if negated:
            if equals: raise self._fault(command, f"--{key} takes no value: it means {flag.spelling}=false already.")
            value = False
        elif flag.is_switch:
            if equals and text.lower() not in BOOLEANS:
                raise self._fault(command, f"{flag.spelling} is on or off, not {shown(text)}: write {flag.spelling}, "
                                           f"--no-{flag.name.replace('_', '-')} or {flag.spelling}=true|false.")
            value = BOOLEANS[text.lower()] if equals else True
        else:
            if not equals:
                text = next(words, None)
                if text is None: raise self._fault(command, f"{flag.spelling} needs a value: {flag.placeholder()}.")
                if len(text) > 1 and text.startswith("-") and not (flag.takes_number and self._is_number(text)):
                    raise self._fault(command, f"{flag.spelling} needs a value, and {shown(text)} looks like a flag. A "
                                               f"value that begins with a dash is joined: {flag.spelling}=-…")
            value = self._value(command, flag, text)
        if flag.repeats and flag.name in values: values[flag.name] = values[flag.name] + value
        elif flag.name in values: raise self._fault(command, f"{flag.spelling} is given twice; give it once.")
        else: values[flag.name] = value

    def _value(self, command: Command, flag: Flag, text: str):
        try: value = convert(text, flag.kind)
        except ValueError as error:
            label = flag.name.upper() if flag.positional else flag.spelling
            close = nearest(text, choices(flag.kind)) if choices(flag.kind) else []
            said = f" Did you mean {_or(close)}?" if close else ""
            raise self._fault(command, f"{label} takes {error}, not {shown(text)}.{said}") from None
        if flag.bounds is None or value is None or value in flag.bounds: return value
        raise self._fault(command, f"{flag.spelling} takes a whole number {flag.bounds}, not {value}.")

    def _unknown(self, command: Command, word: str) -> str:
        "The message for a flag that `command` does not have"
        key = word.lstrip("-").partition("=")[0]
        if not key: return f"{shown(word)} is no flag."
        named, twin = shown(word.split("=")[0]), command.find(key)[0]
        if twin and not re.match("--[^-]", word): return f"{named} needs two dashes: {twin.spelling}."
        positive = command.flags.get(re.sub(r"^no[-_]?", "", key).replace("-", "_"))
        if positive: return f"{named}: {positive.spelling} is no on-off flag, it takes a value."
        visible = {n: f.spelling for n, f in command.flags.items() if not f.hidden}
        negations = {f"no_{n}": f"--no-{n.replace('_', '-')}" for n, f in command.flags.items() if f.can_be_false}
        close = [(negations | visible)[n] for n in nearest(key, negations | visible)]
        if close: return f"{command.name} has no flag {named}. Did you mean {_or(close)}?"
        name = key.replace("-", "_")
        others = [c.name for c in self.commands.values() if name in inspect.signature(c.function).parameters]
        return f"{command.name} has no flag {named}." + (f" ({', '.join(others)} has it.)" if others else "")

    def _place(self, command: Command, loose: list[str], values: dict):
        "Words without a flag go to the positional parameters in order"
        slots = command.positionals
        for i, word in enumerate(loose):
            if i < len(slots):
                twice = f"{slots[i].name.upper()} is given twice: {shown(word)} and {slots[i].spelling}."
                if slots[i].name in values: raise self._fault(command, twice)
                values[slots[i].name] = self._value(command, slots[i], word)
                continue
            names = " ".join(s.name.upper() for s in slots)
            takes = f"takes only {names}" if slots else "takes no words without a flag"
            hint = f" A value is joined to an on-off flag with '=': --flag={word}." if word.lower() in BOOLEANS else ""
            raise self._fault(command, f"{command.name} {takes}; {shown(word)} is one too many.{hint}")

    def _check_required(self, command: Command, values: dict):
        for flag in command.flags.values():
            if flag.default is MISSING and flag.name not in values:
                label = flag.name.upper() if flag.positional else flag.spelling
                raise UsageError(f"{command.name} needs {label}: {flag.description or flag.placeholder()}.\n"
                                 f"Usage: {self.usage(command)}")

    def _check_pairs(self, command: Command, values: dict):
        "No flag is passed over in silence: neither without the one it is said to be with, nor beside one that rules"
        flags = command.flags
        given = [flags[name] for name in flags if name in values and values[name] != flags[name].default]
        for flag in given:
            needed = re.match(r"With (--[\w-]+)", flag.description)
            if needed and command.find(needed[1][2:])[0] not in given:
                raise self._fault(command, f"{flag.spelling} has no effect without {needed[1]}.")
            for other in given:
                if other.name in getattr(command.function, "alone", {}).get(flag.name, ()):
                    raise self._fault(command, f"{flag.spelling} and {other.spelling} exclude each other; give one.")

    # -- running

    def call(self, command: Command, values: dict[str, object]):
        "Let Fire call the command with the values as they were checked; it reads none of them again"
        from fire import core
        core.Display = lambda lines, out: print(*lines, sep="\n", file=out)
        def checked(): return command.function(**values)
        return core.Fire({command.name: checked}, command=[command.name], name=self.name, serialize=lambda result: None)

    def run(self, argv: list[str] | None = None) -> int:
        "Read `argv` (default: the process's), run what it says and return the exit code; every fault is one message"
        argv = sys.argv[1:] if argv is None else list(argv)
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"): stream.reconfigure(errors="replace")
        try:
            code = self._dispatch(argv)
            sys.stdout.flush()
            return code if isinstance(code, int) else 0
        except LLMTrainerError as error: return self._complain(str(error), error.exit_code)
        except KeyboardInterrupt: return self._complain("interrupted.", 130)
        except Exception as error:
            if isinstance(error, BrokenPipeError) and not error.filename:  # who read standard output is gone
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                return 0
            if os.environ.get("LLM_TRAINER_DEBUG"): raise
            if advice := too_many_files(error) or no_memory(error): return self._complain(advice, 1)
            if isinstance(error, OSError) and error.strerror:
                where = f": {error.filename}" if error.filename else ""
                return self._complain(f"{error.strerror}{where}", 1)
            if str(error).startswith("Symlink loop from"): return self._complain(f"{error}.", 1)
            last = error.__traceback__
            while last.tb_next: last = last.tb_next
            place = f"{Path(last.tb_frame.f_code.co_filename).name}, line {last.tb_lineno}"
            return self._complain(f"internal error: {type(error).__name__}: {error} ({place}). This is a fault of "
                                  f"{self.name} {self.version}, not of yours.\nThe whole story: LLM_TRAINER_DEBUG=1 "
                                  f"{self.name} …", 1)

    def _dispatch(self, argv: list[str]):
        if f"_{self.name.upper().replace('-', '_')}_COMPLETE" in os.environ:
            for word, description in self.complete(argv):
                print(clean(f"{word}\t{description}" if description else word, keep="\t"))
            return 0
        if argv[:1] == ["--version"]: return print(f"{self.name} {self.version}")
        before_dashes = argv[:argv.index("--")] if "--" in argv else argv
        if argv[:1] == ["help"]: return print(self.help(self.command(argv[1]) if argv[1:] else None))
        if not argv or argv[0] in ("-h", "--help"): return print(self.help())
        if {"-h", "--help"} & set(before_dashes): return print(self.help(self.command(argv[0])))
        return self.call(*self.parse(argv))

    def _complain(self, message: str, code: int) -> int:
        try:
            sys.stdout.flush()
            print(f"{self.name}: {clean(message)}", file=sys.stderr, flush=True)
        except (OSError, ValueError): pass
        return code

    # -- help

    def usage(self, command: Command) -> str:
        required = [f"{f.spelling} {f.placeholder()}" for f in command.flags.values()
                    if f.default is MISSING and not f.positional]
        words = [f.placeholder() if f.default is MISSING else f"[{f.placeholder()}]" for f in command.positionals]
        more = ["[FLAGS]"] if any(not f.positional and f.default is not MISSING for f in command.flags.values()) else []
        return " ".join([self.name, command.name, *words, *required, *more])

    def help(self, command: Command | None = None) -> str:
        "The help page of one command, or of all of them, at most 80 columns wide"
        return self._command_help(command) if command else self._overview()

    def _overview(self) -> str:
        lines = [*wrap(self.about, WIDTH), "", f"Usage: {self.name} COMMAND [ARGUMENTS]", ""]
        for group, commands in self.groups.items():
            lines.append(bold(group))
            for name in commands: lines += _row(name, self.commands[name].summary, 14)
            lines.append("")
        if self.examples: lines += [bold("Begin with"), *self.examples.splitlines(), ""]
        return "\n".join([*lines, f"All flags of a command: {self.name} COMMAND --help"])

    def _command_help(self, command: Command) -> str:
        summary, _, rest = (command.function.__doc__ or "").partition("\n")
        lines = [*wrap(f"{self.name} {command.name}: {summary}", WIDTH), "", f"Usage: {self.usage(command)}", ""]
        if rest.strip(): lines += [*inspect.cleandoc(rest).splitlines(), ""]
        groups: dict[str, list[Flag]] = {}
        for flag in command.flags.values():
            if not flag.hidden: groups.setdefault("Arguments" if flag.positional else flag.group, []).append(flag)
        for group, flags in groups.items():
            lines.append(bold(group))
            for flag in flags: lines += self._flag_rows(flag)
            lines.append("")
        if any(flag.note for flag in command.flags.values()):
            lines.append(f"Each setting has its place: {self.name} docs configuration#lr")
        return "\n".join(lines).rstrip()

    @staticmethod
    def _flag_rows(flag: Flag) -> list[str]:
        quiet = flag.default is MISSING or flag.default is None or flag.default is False or flag.default == []
        default = flag.note or ("" if quiet else "on" if flag.default is True else _word(flag.default))
        name = flag.placeholder() if flag.positional else flag.spelling
        if flag.is_switch and (flag.note or flag.default): name = f"--[no-]{name[2:]}"
        elif not flag.positional and not flag.is_switch: name += f" {flag.placeholder()}"
        extra = (f" [{default}]" if default else "") + (" (may be repeated)" if flag.repeats else "")
        return _row(name, flag.description + extra, 27)

    # -- completion

    def complete(self, words: list[str]) -> list[tuple[str, str]]:
        "The (word, description) pairs that may stand for the last of `words`; none where a file is wanted"
        try: return list(self._complete(words))
        except Exception: return []  # a shell that completes must never show an error

    def _complete(self, words: list[str]) -> Iterable[tuple[str, str]]:
        *before, current = words or [""]
        def offer(pairs): return [(w, d) for w, d in pairs if w.startswith(current)]
        if not before or before == ["help"]: return offer([(n, c.summary) for n, c in self.commands.items()])
        if before[-1:] == ["="]: before = before[:-1]          # bash splits --flag=value in three
        elif current == "=" and len(before) > 1: current = ""
        command = self.commands[before[0]]
        flag, negated = command.find(before[-1].lstrip("-")) if before[-1].startswith("--") else (None, False)
        if flag and not flag.is_switch and not negated: return offer(self._values(flag))
        if current.startswith("--") and "=" in current:
            key, _, _ = current.partition("=")
            flag, _ = command.find(key.lstrip("-"))
            return offer([(f"{key}={w}", d) for w, d in self._values(flag)]) if flag else []
        slots, words = list(command.positionals), iter(before[1:])
        for word in words:
            known, negated = command.find(word[2:]) if word.startswith("--") else (None, False)
            if known and not known.is_switch and not negated: next(words, None)
            elif not word.startswith("-"): del slots[:1]
        if current.startswith("-") or (command.positionals and not slots):
            given = (command.find(w[2:].split("=")[0])[0] for w in before[1:] if w.startswith("--"))
            used = {f.name for f in given if f}
            return offer([("--help", "all flags of this command"),
                          *((f.spelling, f.description) for f in command.flags.values()
                            if not f.positional and not f.hidden and (f.repeats or f.name not in used))])
        return offer(self._values(slots[0])) if slots else []

    def _values(self, flag: Flag) -> list[tuple[str, str]]:
        if flag.name in self.candidates: return [(str(c), "") for c in self.candidates[flag.name]()]
        return [(c, "") for c in choices(flag.kind)]

    def completion_script(self, shell: str) -> str:
        "The script that asks this program for completions, for bash, zsh or fish"
        function = f"_{self.name.replace('-', '_')}"
        return SCRIPTS[shell].format(name=self.name, function=function, variable=f"{function.upper()}_COMPLETE")


def coloured(stream=None) -> bool:
    "Whether `stream` (default: standard output) is a terminal that wants colour"
    stream = stream or sys.stdout
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb" and stream.isatty()


def bold(text: str) -> str:
    return f"\x1b[1m{text}\x1b[0m" if coloured() else text


def _row(name: str, text: str, indent: int) -> list[str]:
    "A name and its description in two columns; a long name has a line of its own"
    body = wrap(clean(text, keep=""), WIDTH - indent - 2) or [""]
    if len(name) > indent - 2:
        names = [name] if len(name) <= WIDTH - 2 else wrap(name.replace("|", "| "), WIDTH - 6)
        return [f"  {n.replace('| ', '|')}" for n in names] + [" " * (indent + 2) + line for line in body]
    return [f"  {name:<{indent}}{body[0]}".rstrip()] + [" " * (indent + 2) + line for line in body[1:]]


SCRIPTS = {
    "bash": """\
# {name} completion for bash.  Use it with:  source <({name} completion bash)
{function}() {{
    local IFS=$'\\n'
    COMPREPLY=($({variable}=1 {name} "${{COMP_WORDS[@]:1:COMP_CWORD}}" 2>/dev/null | cut -f1))
}}
complete -o bashdefault -o default -F {function} {name}""",
    "zsh": """\
#compdef {name}
# {name} completion for zsh.  Use it with:  source <({name} completion zsh)
{function}() {{
    local -a found
    found=("${{(@f)$({variable}=1 {name} "${{(@)words[2,CURRENT]}}" 2>/dev/null)}}")
    if [[ -z "$found[1]" ]]; then _files; return; fi
    found=("${{(@)found//:/\\\\:}}")
    found=("${{(@)found/$'\\t'/:}}")
    _describe -o '{name}' found
}}
compdef {function} {name}""",
    "fish": """\
# {name} completion for fish.  Use it with:  {name} completion fish | source
function {function}
    set -l current (commandline -ct)
    set -l found (env {variable}=1 {name} (commandline -opc)[2..-1] "$current" 2>/dev/null)
    if test -n "$found"
        printf '%s\\n' $found
    else
        __fish_complete_path "$current"
    end
end
complete -c {name} -f -a '({function})'""",
}
