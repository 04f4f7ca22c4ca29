"""A look at what a run would read: some documents and their tokens, how long all of them are, what was left out."""
from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from itertools import islice, zip_longest
from typing import TYPE_CHECKING

from llm_trainer.cli import render
from llm_trainer.terminal import clean, size

if TYPE_CHECKING:
    from llm_trainer.data.corpus import Corpus
    from llm_trainer.data.tokenizer import Tokenizer
    from llm_trainer.training.recipe import TrainingData

SHOWN = 600  # characters of a document that are shown
READ = 1 << 20  # bytes of a document that are made tokens of, about
GROUNDS = (44, 45, 46, 42)  # colours behind the tokens, in turn


def look(
    data: TrainingData,  # what `recipe.prepare` returned
    count: int,  # how many documents, from all corpora in turn
) -> list[dict]:
    """The first documents of the text: the bytes of each, how many of them train, the tokens of it (where `whole` is
    false: of its beginning) and the text of the first of them"""
    streams = [_documents(corpus, data.tokenizer) for corpus in data.corpora]
    return list(islice((found for turn in zip_longest(*streams) for found in turn if found), count))


def _documents(corpus: Corpus, tokenizer: Tokenizer) -> Iterator[dict]:
    "Each document of a corpus, whichever side it is on; an empty one is none"
    for pieces in corpus.each():
        held, sizes = [], {"train": 0, "val": 0}
        for split, piece, _ in pieces:
            if sum(sizes.values()) < READ: held.append(piece)
            sizes[split] += len(piece.encode())
        if not held: continue
        text, size_of = "".join(held), sum(sizes.values())
        read, ids = len(text.encode()), tokenizer.encode(text)
        yield {"corpus": corpus.name, "bytes": size_of, "train_bytes": sizes["train"], "whole": read == size_of,
               "tokens": len(ids), "bytes_per_token": read / max(1, len(ids)),
               "text": list(_spelt(tokenizer, ids, SHOWN))}


def _spelt(tokenizer: Tokenizer, ids: Iterable[int], most: int) -> Iterator[str]:
    "The text of some tokens; a character that several make up stands with the last of them"
    decoder, length = codecs.getincrementaldecoder("utf-8")("replace"), 0
    for i in ids:
        if not (text := decoder.decode(tokenizer.token_bytes(i))): continue
        yield text
        length += len(text)
        if length >= most: return
    if text := decoder.decode(b"", True): yield text


def lengths(corpora: Iterable[Corpus]) -> dict:
    "How many documents there are, and between which powers of two the shortest, the middle and the longest lie"
    lengths = (corpus.count.get("lengths", []) for corpus in corpora)
    counts = [sum(column) for column in zip_longest(*lengths, fillvalue=0)]
    total, below, found = sum(counts), 0, {}
    for bits, n in enumerate(counts):
        if n and "shortest" not in found: found["shortest"] = 1 << bits - 1
        below += n
        if "median" not in found and below * 2 >= total: found["median"] = 1 << bits
        if n: found["longest"] = 1 << bits
    return {"documents": total, **found}


def report(data: TrainingData, count: int) -> str:
    "The same for people: tokens on alternating backgrounds, or between bars where there is no colour"
    lines = []
    for number, found in enumerate(look(data, count), 1):
        lines += [render.paint(f"document {number} of {clean(found['corpus'], '')}: {_facts(found)}", 1),
                  _coloured(found["text"]), ""]
    meta, about = data.meta["data"], lengths(data.corpora)
    tokens = max(1, meta["train_tokens"] + meta["val_tokens"])
    held = sum(c.meta["train_bytes"] + c.meta["val_bytes"] for c in data.caches) / tokens
    counted = sorted(data.left_out.items(), key=lambda item: -item[1])
    left_out = ", ".join(f"{n:,} {clean(kind, '')}" for kind, n in counted)
    if about["documents"]: lines.append(
        f"  lengths    {about['documents']:,} document{'s' * (about['documents'] != 1)}, "
        f"from {size(about['shortest'])} to {size(about['longest'])}, half of them below {size(about['median'])} "
        "(powers of two)")
    lines += [f"  tokens     {meta['train_tokens']:,} to train, {meta['val_tokens']:,} to validate "
              f"({meta['val_share']:.1%} of the bytes), {held:.2f} bytes per token",
              f"  left out   {left_out or 'nothing'}"]
    return "\n".join(lines)


def _facts(found: dict) -> str:
    "The sizes of a document, and which part of it is held out"
    train, whole, part = found["train_bytes"], found["bytes"], "" if found["whole"] else " in its beginning"
    held = "" if train == whole else " (its end is held out to validate)" if train else " (held out to validate)"
    return f"{whole:,} bytes{held}, {found['tokens']:,} tokens{part}, {found['bytes_per_token']:.2f} bytes per token"


def _coloured(tokens: list[str]) -> str:
    "Tokens side by side, each distinct from its neighbours"
    if not render.coloured(): return "|".join(clean(token) for token in tokens)
    def ground(text, code):
        return "\n".join(f"\x1b[{code};97m{line}\x1b[0m" if line else "" for line in text.split("\n"))
    return "".join(ground(clean(token), GROUNDS[i % len(GROUNDS)]) for i, token in enumerate(tokens))
