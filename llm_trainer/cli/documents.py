"""A look at what a run would read: some documents and their tokens, how long all of them are, what was left out."""
from __future__ import annotations

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
READ = 1 << 20  # bytes of a document that are read to count its tokens
GROUNDS = (44, 45, 46, 42)  # colours behind the tokens, in turn


def look(
    data: TrainingData,  # what `recipe.prepare` returned
    count: int,  # how many documents, from all corpora in turn
) -> list[dict]:
    "The first documents of the training text, each with its bytes, tokens and the text of the first of them"
    streams = [_documents(corpus, data.tokenizer) for corpus in data.corpora]
    return list(islice((found for turn in zip_longest(*streams) for found in turn if found), count))


def _documents(corpus: Corpus, tokenizer: Tokenizer) -> Iterator[dict]:
    "Each document of a corpus, the beginning of a very long one"
    pieces, over = [], False
    for _, piece, last in corpus.pieces("train"):
        if not over: pieces.append(piece)
        over = over or sum(map(len, pieces)) > READ
        if last or over and pieces:
            text = "".join(pieces)
            ids = tokenizer.encode(text)
            yield {"corpus": corpus.name, "bytes": len(text.encode()), "whole": last, "tokens": len(ids),
                   "bytes_per_token": len(text.encode()) / max(1, len(ids)),
                   "text": list(_spelt(tokenizer, ids, SHOWN))}
            pieces = []
        if last: over = False


def _spelt(tokenizer: Tokenizer, ids: Iterable[int], most: int) -> Iterator[str]:
    "The text of some tokens; those that are parts of one character are put together"
    held, length = b"", 0
    for i in ids:
        held += tokenizer.token_bytes(i)
        try: text = held.decode()
        except UnicodeDecodeError:
            if len(held) < 4: continue
            text = held.decode("utf-8", "replace")
        yield text
        held, length = b"", length + len(text)
        if length >= most: return


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
        more = "" if found["whole"] else " (its beginning)"
        size_of = (f"{found['bytes']:,} bytes, {found['tokens']:,} tokens, "
                   f"{found['bytes_per_token']:.2f} bytes per token")
        lines += [render.paint(f"document {number} of {clean(found['corpus'], '')}{more}: {size_of}", 1),
                  _coloured(found["text"]), ""]
    meta, about = data.meta["data"], lengths(data.corpora)
    tokens = max(1, meta["train_tokens"] + meta["val_tokens"])
    held = sum(c.meta["train_bytes"] + c.meta["val_bytes"] for c in data.caches) / tokens
    counted = sorted(data.left_out.items(), key=lambda item: -item[1])
    left_out = ", ".join(f"{n:,} {clean(kind, '')}" for kind, n in counted)
    if about["documents"]: lines.append(
        f"  lengths    {about['documents']:,} documents, from {size(about['shortest'])} to {size(about['longest'])}, "
        f"half of them below {size(about['median'])} (powers of two)")
    lines += [f"  tokens     {meta['train_tokens']:,} to train, {meta['val_tokens']:,} to validate "
              f"({meta['val_share']:.1%} of the bytes), {held:.2f} bytes per token",
              f"  left out   {left_out or 'nothing'}"]
    return "\n".join(lines)


def _coloured(tokens: list[str]) -> str:
    "Tokens side by side, each distinct from its neighbours"
    if not render.coloured(): return "|".join(clean(token) for token in tokens)
    def ground(text, code):
        return "\n".join(f"\x1b[{code};97m{line}\x1b[0m" if line else "" for line in text.split("\n"))
    return "".join(ground(clean(token), GROUNDS[i % len(GROUNDS)]) for i, token in enumerate(tokens))
