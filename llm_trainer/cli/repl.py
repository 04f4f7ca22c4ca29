"""Prompts in, texts out, for people: where prompts come from, and how a text is streamed, stored and talked about."""
from __future__ import annotations

import json
import os
import select
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from llm_trainer.errors import LLMTrainerError, NotFoundError, UsageError
from llm_trainer.cli.parser import convert, nearest
from llm_trainer.generation.sampling import text_only
from llm_trainer.terminal import clean
from llm_trainer.workspace import home

if TYPE_CHECKING:
    from llm_trainer.generation.sampler import Completion  # which loads torch; prompts are read before that


# Prompts -------------------------------------------------------------------------------------------------------------

LONGEST = 64 << 20  # bytes of a prompt, or of a file of prompts


def read_text(path: str) -> str:
    "A file (`-`: standard input) as text, byte for byte; bytes that are no UTF-8 survive as lone surrogates"
    try:
        with sys.stdin.buffer if path == "-" else _opened(home(path)) as file: data = file.read(LONGEST + 1)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise NotFoundError(f"The file {clean(path, '')!r} can't be read: {why}.\n"
                            "Check the path, or give the prompt itself: --prompt TEXT") from None
    if len(data) > LONGEST: raise UsageError(f"{'Standard input' if path == '-' else clean(path, '')} has more than "
                                             f"{LONGEST >> 20} MB; no prompt is that long.")
    return data.decode("utf-8", "surrogateescape")


def _opened(path: Path) -> BinaryIO:
    "The file `path`, open for reading; a named pipe once somebody writes into it, which is said if it takes long"
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if stat.S_ISFIFO(os.fstat(fd).st_mode) and not select.select([fd], [], [], 1)[0]:
        print(f"Waiting for somebody to write into {clean(path, '')}, a named pipe.", file=sys.stderr, flush=True)
        select.select([fd], [], [])
    os.set_blocking(fd, True)
    return open(fd, "rb")


def read_prompts(path: str) -> list[str]:
    'The prompts of a JSONL file: each line a text, or an object with the key "prompt"'
    prompts = []
    for n, row in enumerate(read_text(path).split("\n"), 1):  # other signs that end a line may stand in a JSON text
        if not row.strip(): continue
        try: value = json.loads(row)
        except (ValueError, RecursionError): value = None
        if isinstance(value, dict): value = value.get("prompt")
        if not isinstance(value, str):
            raise UsageError(f'{clean(path, "")}, line {n}: expected a JSON text or an object with "prompt", '
                             f"not {clean(row, '')[:40]!r}.")
        prompts.append(text_only(value, f"{clean(path, '')}, line {n}: the prompt"))
    if not prompts: raise UsageError(f'{clean(path, "")} holds no prompt. A line looks like this: {{"prompt": "The"}}')
    return prompts


def one_prompt(prompt: str | None, prompt_file: str | None) -> str:
    "The prompt from the flag, the file or, where neither is given, what is piped in"
    if prompt is None and prompt_file is None and sys.stdin.isatty():
        raise UsageError('There is nothing to continue. Give a prompt: --prompt "The function"\n'
                         "or a file: --prompt-file FILE; or talk to the model: --interactive")
    text = prompt if prompt is not None else read_text(prompt_file or "-")
    if not text: raise UsageError('The prompt is empty; there is nothing to continue. Try --prompt "The"')
    return text_only(text, "The prompt")


# Texts ---------------------------------------------------------------------------------------------------------------

def write(pieces: Iterator, prompt: str, show: Callable[[str], None] = lambda text: None) -> Completion:
    "Collect the sampler's pieces, showing each as it comes; Ctrl-C ends the text politely"
    from llm_trainer.generation.sampler import Completion
    text = Completion(prompt)
    try:
        for piece in pieces:
            text.add(piece)
            if piece.text: show(piece.text)
    except KeyboardInterrupt: text.finish = "interrupted"
    return text


def write_many(completions: Iterator, show: Callable[[str], None]) -> list[Completion]:
    "Collect the texts of a batch, showing each when its batch is done"
    texts = []
    for text in completions:
        texts.append(text)
        show(f"{'' if len(texts) == 1 else chr(10)}--- {len(texts)}: {text.prompt[:60]!r}\n{text.text}\n")
    return texts


def silent(text: str):
    "Show nothing: the whole text is used later"


def to_terminal(text: str):
    "Show a part of a text at once, without the control bytes that a terminal would obey"
    sys.stdout.write(clean(text))
    sys.stdout.flush()


def to_pipe(text: str):
    "Hand a part of a text on unchanged"
    sys.stdout.buffer.write(text.encode("utf-8", "surrogateescape"))
    sys.stdout.buffer.flush()


# Talking -------------------------------------------------------------------------------------------------------------

REPL_HELP = """\
Type a prompt and press Enter; the model continues it. Ctrl-C stops a text, Ctrl-D leaves.
  /more              go on with the last text
  /set               show the knobs
  /set KNOB VALUE    change one, as in /set temperature 0.7 or /set stop ["\\n", "END"]
  /history           what was asked so far
  /help   /quit"""


def converse(generate: Callable, sampling, notify=print):
    "The REPL: `generate(prompt, sampling)` yields pieces; knobs change by /set"
    try: import readline  # noqa: F401  (arrow keys and history in input())
    except ImportError: pass
    if sys.stdin.isatty(): notify("Type a prompt, /help for the knobs, Ctrl-D to leave.")
    asked, last = [], ""
    while True:
        try: said = input("> " if sys.stdin.isatty() else "")
        except EOFError: return notify("") if sys.stdin.isatty() else None
        except KeyboardInterrupt:
            notify("\n(Ctrl-D leaves.)")
            continue
        word, _, rest = said.partition(" ")
        if not said.strip(): continue
        if word in ("/quit", "/exit"): return
        if word == "/help": notify(REPL_HELP)
        elif word == "/history":
            notify("\n".join(f"{n:>3}  {clean(p, '')}" for n, p in enumerate(asked, 1)) or "Nothing yet.")
        elif word == "/set":
            try: sampling = _set(sampling, rest.split(None, 1), notify)
            except LLMTrainerError as error: notify(str(error))
        elif word == "/more" and not last: notify("There is no text to go on with yet.")
        elif word.startswith("/") and word != "/more":
            close = nearest(word, ["/more", "/set", "/history", "/help", "/quit"])
            notify(f"There is no {clean(word, '')}. {f'Did you mean {close[0]}?' if close else 'Try /help.'}")
        else:
            prompt, how = (last, replace(sampling, truncate="left")) if word == "/more" else (said, sampling)
            if word != "/more": asked.append(said)
            try: last = prompt + write(generate(prompt, how), prompt, to_terminal).text
            except LLMTrainerError as error: notify(str(error))
            else: notify("\n")


def _set(sampling, words: list[str], notify):
    "`sampling` with one knob changed, or all knobs shown"
    kinds = {f.name: type(f.default) for f in fields(sampling) if f.name != "logprobs"}  # which nothing here shows
    if not words:
        notify("\n".join(f"  {name:<20} {getattr(sampling, name)}" for name in kinds))
        return sampling
    name = words[0].replace("-", "_")
    if name not in kinds:
        close = nearest(name, kinds)
        raise UsageError(f"There is no knob {clean(words[0], '')}." + (f" Did you mean {close[0]}?" if close else ""))
    if len(words) == 1: notify(f"  {name} {getattr(sampling, name)}")
    if len(words) == 1: return sampling
    try:
        if kinds[name] is tuple: value = _strings(words[1])
        else: value = convert(words[1].strip(), int | None if name == "seed" else kinds[name])
    except ValueError as error: raise UsageError(f"{name} takes {error}, not {clean(words[1], '')[:40]!r}.") from None
    sampling = replace(sampling, **{name: value})
    notify(f"  {name} {getattr(sampling, name)}")
    return sampling


def _strings(text: str) -> list[str] | str:
    "A JSON list of strings, or one string, in JSON or as it is"
    try: found = json.loads(text)
    except (ValueError, RecursionError): return text
    return found if isinstance(found, (list, str)) else text
