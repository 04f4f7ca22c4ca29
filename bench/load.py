"""Text to tokens to batches: each beside the bare operation it can't do without, in turns in one run; one JSON object.

    python bench/load.py [--megabytes 100] [--repeats 5] [--batches 2000]

`prepare.ratio`: bytes a second of `prepare_tokens` (read, split, encode, write, hash, sync) over those of bare
`encode_batch_fast` on the same documents, already in memory: 10 MB of the profile's corpus, again and again.
`stream.ratio`: batches a second of a shuffled `Stream` over those of cutting the next slice out of the memory-mapped
file. `memory`: the most that a process ever had resident which prepares a text of `megabytes`, beside what it had after
its imports.
"""
import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch

from llm_trainer.data.batches import TOGETHER, Stream, TokenCache, Windows, prepare_tokens
from llm_trainer.config import load_config
from llm_trainer.data.corpus import Corpus
from llm_trainer.data.sources import open_corpus, open_files
from llm_trainer.events import silent
from llm_trainer.data.tokenizer import Tokenizer, prepare_tokenizer

QUIET = silent
PREPARE_ALONE = """
import json, resource, sys
from pathlib import Path
from llm_trainer.data.batches import prepare_tokens
from llm_trainer.data.sources import open_files
from llm_trainer.data.tokenizer import Tokenizer

def peak():
    if sys.platform == "darwin": return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

text, tokenizer, data = map(Path, sys.argv[1:])
before = peak()
cache = prepare_tokens(open_files(text, data), Tokenizer.load(tokenizer), data)
print(json.dumps([before, peak(), cache.meta["train_tokens"] + cache.meta["val_tokens"]]))
"""


def seconds(act: Callable) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def together(corpus: Corpus) -> list[list[str]]:
    "All documents of a corpus, in lists as long as those that `prepare_tokens` encodes"
    lists, size = [[]], 0
    for text in (text for split in ("val", "train") for text in corpus.documents(split)):
        lists[-1].append(text)
        size += len(text)
        if size >= TOGETHER:
            lists.append([])
            size = 0
    return lists


def preparation(corpus: Corpus, tokenizer: Tokenizer, folder: Path, repeats: int) -> tuple[dict, TokenCache]:
    "`prepare_tokens` into an empty folder, and bare encoding, in turns"
    lists, pairs, size = together(corpus), [], corpus.count["bytes"]
    def bare():
        for texts in lists: tokenizer.backend.encode_batch_fast(texts, add_special_tokens=False)
    bare()
    for i in range(repeats):
        whole = partial(prepare_tokens, corpus, tokenizer, folder / str(i), QUIET)
        pairs.append((seconds(whole), seconds(bare)))
    ours, plain = (statistics.median(column) for column in zip(*pairs))
    return dict(ratio=round(statistics.median(p / o for o, p in pairs), 3), megabytes=round(size / 1e6, 2),
                mb_per_second=round(size / ours / 1e6, 2), bare_mb_per_second=round(size / plain / 1e6, 2)), \
        prepare_tokens(corpus, tokenizer, folder / "0", QUIET)


def slices(tokens: np.ndarray, batch_size: int, seq_len: int) -> Iterator:
    "Batches in the order of the text, made of the least that makes a batch"
    size = batch_size * seq_len
    for start in cycle(range(0, len(tokens) - size, size)):
        piece = torch.from_numpy(tokens[start:start + size + 1].astype(np.int64))
        yield piece[:-1].view(batch_size, seq_len), piece[1:].view(batch_size, seq_len)


def streaming(cache: TokenCache, batch_size: int, seq_len: int, batches: int, repeats: int) -> dict:
    "The stream and bare slices, in turns"
    ours = Stream(Windows(cache.train, seq_len), batch_size).iterate()
    bare = slices(cache.train, batch_size, seq_len)
    def drain(batches_of): return seconds(lambda: [None for _ in islice(batches_of, batches)])
    pairs = [(drain(ours), drain(bare)) for _ in range(repeats + 1)][1:]
    speed, plain = (batches / statistics.median(column) for column in zip(*pairs))
    return dict(ratio=round(statistics.median(p / o for o, p in pairs), 3), batch=[batch_size, seq_len],
                batches_per_second=round(speed), bare_batches_per_second=round(plain),
                tokens_per_second=round(speed * batch_size * seq_len))


def large_text(path: Path, corpus: Corpus, megabytes: int) -> None:
    "Documents of a corpus again and again, until they are as much as asked for"
    size = 0
    with open(path, "w", encoding="utf-8") as file:
        for text in cycle(list(corpus.documents("train"))):
            size += file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            if size >= megabytes * 1e6: return


def memory(corpus: Corpus, tokenizer: Tokenizer, folder: Path, megabytes: int) -> dict:
    "What it takes to prepare a large text, in a process of its own"
    tokenizer.save(folder / "tokenizer")
    large_text(folder / "large.jsonl", corpus, megabytes)
    began = time.perf_counter()
    child = subprocess.run([sys.executable, "-c", PREPARE_ALONE, folder / "large.jsonl", folder / "tokenizer", folder
                            / "large"],
                           check=True, capture_output=True, text=True)
    before, peak, tokens = json.loads(child.stdout.splitlines()[-1])
    return dict(megabytes=megabytes, tokens=tokens, peak_mb=round(peak / 1e6), of_imports_mb=round(before / 1e6),
                seconds=round(time.perf_counter() - began, 1))


def measure(megabytes: int = 100, repeats: int = 5, batches: int = 2000, config: str = "quickstart") -> dict:
    c = load_config(config)
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".bench-load-") as root:
        folder = Path(root)
        corpus = open_corpus(c.data, folder, QUIET)
        tokenizer = prepare_tokenizer(c.data, [corpus], folder, QUIET)
        large_text(folder / "text.jsonl", corpus, min(megabytes, 10))
        prepared, cache = preparation(open_files(folder / "text.jsonl", folder), tokenizer, folder, repeats)
        return dict(corpus=corpus.name, vocab_size=tokenizer.vocab_size, repeats=repeats, prepare=prepared,
                    stream=streaming(cache, c.training.batch_size, c.model.seq_len, batches, repeats),
                    memory=memory(corpus, tokenizer, folder, megabytes))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=100,
                        help="of the text whose preparation is watched for memory")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batches", type=int, default=2000, help="taken from the stream each time")
    parser.add_argument("--config", default="quickstart", help="profile: corpus, tokenizer, shape of a batch")
    print(json.dumps(measure(**vars(parser.parse_args())), indent=1))
