"""How good a model is on a text: loss, perplexity per token and per word, bits per byte. Knows nothing of training."""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from llm_trainer.data.batches import prepare_tokens
from llm_trainer.config import Config, DataConfig
from llm_trainer.data.sources import open_mix
from llm_trainer.device import choose_device
from llm_trainer.errors import DataError, UsageError
from llm_trainer.data.tokenizer import Tokenizer
from llm_trainer.training.recipe import reopen_data
from llm_trainer.events import Emit, Note, Progress, print_notes
from llm_trainer.generation.sampler import choose_threads
from llm_trainer.terminal import clean
from llm_trainer.training.trainer import evaluate, metrics, token_lengths
from llm_trainer.model.huggingface import load_model
from llm_trainer.workspace import Workspace


def strided(tokens: np.ndarray, context: int, stride: int, batch_size: int) -> Iterator:
    """Batches (x, y) that predict each token but the first exactly once, every window `stride` tokens after the last.

    A window sees `context` tokens and is asked for the last `stride` of them (the first window for all), so a smaller
    stride gives each token more to go by. With stride = context these are the windows of training."""
    rows, end = [], 0
    for start in range(0, len(tokens) - 1, stride):
        piece = np.full(context + 1, -100, np.int64)
        piece[:len(found)] = (found := tokens[start:start + context + 1])
        y = piece[1:].copy()
        y[:end - start] = -100  # predicted by the windows before
        rows.append((np.maximum(piece[:-1], 0), y))
        end = min(start + context, len(tokens) - 1)
        if len(rows) == batch_size or end == len(tokens) - 1:
            yield tuple(torch.from_numpy(np.stack(part)) for part in zip(*rows))
            rows = []
        if end == len(tokens) - 1: return


def words(tokens: np.ndarray, tokenizer: Tokenizer, block: int = 1 << 16) -> int:
    "How many words, divided by white space, the text of `tokens` has"
    spelt, count, rest = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)], 0, b""
    spelt[tokenizer.eot_id] = b"\n"  # a border between words, no word itself
    for start in range(0, len(tokens), block):
        text = rest + b"".join(spelt[i] for i in tokens[start:start + block])
        whole = text.split()
        rest = whole.pop() if whole and not text[-1:].isspace() else b""
        count += len(whole)
    return count + bool(rest)


def _validation(meta: dict, tokenizer: Tokenizer, space: Workspace, emit: Emit) -> list[np.ndarray]:
    "The tokens a run was validated on; prepared again where they are gone, and only if they come out the same"
    return [cache.val for cache in reopen_data(meta, tokenizer, Config.from_dict(meta["config"]), space, emit).caches]


def measure(
    folder: Path,  # a checkpoint, or another Hugging Face folder
    space: Workspace,
    meta: dict,  # the run's record, for the text it was validated on; empty where there is no run
    data: str | None = None,  # another corpus; all of it is read
    stride: int | None = None,
    device: str = "auto",
    batch_size: int = 8,
    threads: int | None = None,  # None: as many as are fast
    text_column: str | None = None,  # where the text of `data` is, if it is a table
    emit: Emit = print_notes,  # called with each event
) -> dict:
    "The figures of one model on one text, and what they were taken with"
    model, tokenizer = load_model(folder), Tokenizer.load(folder)
    if tokenizer.changes:
        emit(Note(f"The tokenizer changes a text before it reads it ({clean(tokenizer.changes, '')}); what is measured "
                  "is the changed text."))
    context = model.config.seq_len
    stride = context if stride is None else stride
    if not 1 <= stride <= context:
        raise UsageError(f"--stride goes from 1 to the model's context of {context}, not {stride}.")
    if data is not None:
        wanted = DataConfig(dataset=data, text_column=text_column)
        corpora = [corpus.whole() for corpus, _ in open_mix(wanted, space.data, emit)]
        caches = [prepare_tokens(corpus, tokenizer, space.data, emit) for corpus in corpora]
        # a split of its own begins with <|endoftext|>, too
        texts = [np.concatenate([c.train, c.val[1:]]) for c in caches]
        name, split = data, "all"
    elif meta.get("data"):
        if tokenizer.hash != meta.get("tokenizer_hash"):
            raise UsageError("The checkpoint's tokenizer is not the one its run was trained with.\n"
                             f"See what else is damaged: llm-trainer verify {meta.get('run_id')}")
        texts = _validation(meta, tokenizer, space, emit)
        name, split = meta.get("config", {}).get("data", {}).get("dataset"), "validation"
        if isinstance(name, list): name = " + ".join(part["name"] for part in name)
    else: raise UsageError(f"{folder} comes without a validation text. Name one: --data FILE.txt")
    if not any(len(t) > 1 for t in texts): raise DataError(f"{name} has no text to measure on.")
    where = torch.device(choose_device(device, space.device)[0])
    threads = choose_threads(model.to(where), threads, 64)

    def batches():
        done, total = 0, sum(map(len, texts))
        for x, y in (batch for text in texts for batch in strided(text, context, stride, batch_size)):
            yield x, y
            emit(Progress("measuring", done := done + int((y >= 0).sum()), total))
    found = evaluate(model.to(where), batches(), token_lengths(tokenizer), where)
    n_words = sum(words(text, tokenizer) for text in texts)
    return {"data": str(name), "split": split, "loss": found["loss"], "perplexity": found["perplexity"],
            "word_perplexity": metrics(found["nats"], 0, n_words, 0)["perplexity"],
            "bits_per_byte": found["bits_per_byte"], "tokens": found["tokens"], "words": n_words,
            "bytes": found["bytes"], "context": context, "stride": stride,
            "device": where.type, **({"threads": threads} if where.type == "cpu" else {}),
            "tokenizer_hash": tokenizer.hash, "checkpoint": str(folder)}
