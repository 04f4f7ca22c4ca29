"""Prompts in, texts out, for people: where prompts come from, and how a text is streamed, stored and talked about."""
from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from llm_trainer.errors import LLMTrainerError, NotFoundError, UsageError
from llm_trainer.frontend import convert, nearest
from llm_trainer.terminal import clean


# Prompts -------------------------------------------------------------------------------------------------------------

def read_text(path: str) -> str:
    "A file (`-`: standard input) as text, byte for byte; bytes that are no UTF-8 survive as lone surrogates"
    if path == "-": return sys.stdin.buffer.read().decode("utf-8", "surrogateescape")
    try: return Path(path).expanduser().read_bytes().decode("utf-8", "surrogateescape")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise NotFoundError(f"The file {clean(path, '')!r} can't be read: {why}.\n"
                            "Check the path, or give the prompt itself: --prompt TEXT") from None


def read_prompts(path: str) -> list[str]:
    'The prompts of a JSONL file: each line a text, or an object with the key "prompt"'
    prompts = []
    for n, row in enumerate(read_text(path).splitlines(), 1):
        if not row.strip(): continue
        try: value = json.loads(row)
        except ValueError: value = None
        if isinstance(value, dict): value = value.get("prompt")
        if not isinstance(value, str):
            raise UsageError(f'{clean(path, "")}, line {n}: expected a JSON text or an object with "prompt", '
                             f"not {clean(row, '')[:40]!r}.")
        prompts.append(value)
    if not prompts: raise UsageError(f'{clean(path, "")} holds no prompt. A line looks like this: {{"prompt": "The"}}')
    return prompts


def one_prompt(prompt: str | None, prompt_file: str | None) -> str:
    "The prompt from the flag, the file or, where neither is given, what is piped in"
    if prompt is None and prompt_file is None and sys.stdin.isatty():
        raise UsageError('There is nothing to continue. Give a prompt: --prompt "The function"\n'
                         "or a file: --prompt-file FILE; or talk to the model: --interactive")
    text = prompt if prompt is not None else read_text(prompt_file or "-")
    if not text: raise UsageError('The prompt is empty; there is nothing to continue. Try --prompt "The"')
    try: text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"The prompt is no valid UTF-8: character {error.start + 1} is a stray byte. A tokenizer "
                         "reads text only; convert the file first, for example with iconv.") from None
    return text


# Texts ---------------------------------------------------------------------------------------------------------------

@dataclass
class Text:
    """What was written for one prompt, and how fast."""
    prompt: str
    text: str = ""
    finish: str | None = None  # length, eot, stop, interrupted
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    seconds: float = 0.0
    first_token_seconds: float | None = None

    def to_dict(self) -> dict:
        "Ready for JSON"
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**own, "tokens_per_second": len(self.tokens) / self.seconds if self.seconds else None}


def write(pieces: Iterator, prompt: str, show: Callable[[str], None] = lambda text: None) -> Text:
    "Collect the sampler's pieces, showing each as it comes; Ctrl-C ends the text politely"
    result, begun = Text(prompt), time.perf_counter()
    try:
        for piece in pieces:
            if piece.token is not None:
                result.first_token_seconds = result.first_token_seconds or time.perf_counter() - begun
                result.tokens.append(piece.token)
                result.logprobs.append(piece.logprob)
            result.text += piece.text
            result.finish = piece.finish or result.finish
            if piece.text: show(piece.text)
    except KeyboardInterrupt: result.finish = "interrupted"
    result.seconds = time.perf_counter() - begun
    return result


def write_many(completions: Iterator, show: Callable[[str], None]) -> list[Text]:
    "Collect the texts of a batch, showing each when it is whole; Ctrl-C keeps those that are"
    texts, begun = [], time.perf_counter()
    try:
        for done in completions:
            show(f"{'' if not texts else chr(10)}--- {len(texts) + 1}: {done.prompt[:60]!r}\n{done.text}\n")
            texts.append(Text(done.prompt, done.text, done.finish, done.tokens, done.logprobs))
            texts[-1].seconds = time.perf_counter() - begun
    except KeyboardInterrupt:
        if texts: texts[-1].finish = "interrupted"
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
  /set KNOB VALUE    change one, as in /set temperature 0.7
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
            prompt = last if word == "/more" else said
            if word != "/more": asked.append(said)
            try: last = prompt + write(generate(prompt, sampling), prompt, to_terminal).text
            except LLMTrainerError as error: notify(str(error))
            else: notify("\n")


def _set(sampling, words: list[str], notify):
    "`sampling` with one knob changed, or all knobs shown"
    kinds = {f.name: type(f.default) for f in fields(sampling)}
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
        if kinds[name] is tuple: value = (words[1],)
        else: value = convert(words[1].strip(), int | None if name == "seed" else kinds[name])
    except ValueError as error: raise UsageError(f"{name} takes {error}, not {clean(words[1], '')[:40]!r}.") from None
    sampling = replace(sampling, **{name: value})
    notify(f"  {name} {value}")
    return sampling
