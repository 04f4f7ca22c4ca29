"""Text learned per second: bits per byte on the Python sources of this very environment, and the seconds of stepping.

    python bench/corpus.py [--root SITE_PACKAGES] [--folder data/py-corpus] [--config qwen3-124m] [--tokens 30e6]
                           [--batch-size 32] [--grad-accum-steps 1] [--seeds 1] [--set n_layer=8 n_embd=512 …]
                           [--prepare-only]

The corpus: every .py file under `root` of at least 200 characters, deduplicated by content; those whose SHA-1 begins
with a byte below 4 are the validation text. The order is that of the SHA-1, which is as good as shuffled. A vocabulary
of 16,384 is learned from a third of it; as many documents are encoded as `tokens` need. Prepared once, then found in
`folder`.
Stepping doesn't count compiling: the clock starts after the first ten steps, and the rest is scaled to all of them.
Prints one JSON object a seed.
"""
import argparse
import hashlib
import json
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from llm_trainer.config import Config, all_settings, load_config
from llm_trainer.data.batches import Stream, Windows, val_batches
from llm_trainer.data.tokenizer import EOT, Tokenizer, bpe_backend
from llm_trainer.device import resolve, seed_everything
from llm_trainer.model.transformer import GPT
from llm_trainer.training.optimizer import LRSchedule, build_optimizer
from llm_trainer.training.trainer import Trainer, evaluate, token_lengths

QUIET = dict(log_every=0, eval_every=0, save_every=0, save_minutes=0, sample_every=0, max_steps=0)
SHAPE = dict(vocab_size=16_384, seq_len=1024)
UNCOUNTED = 10  # steps in which the compiler and the recording have their turn


def read(path: str) -> tuple[bytes, str] | None:
    "SHA-1 and text of a file; nothing where it is short or no UTF-8"
    try: text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError): return None
    return (hashlib.sha1(text.encode()).digest(), text) if len(text) >= 200 else None


def documents(root: Path) -> tuple[list[str], list[str]]:
    "The training and the validation texts, by SHA-1"
    paths = sorted(str(p) for p in root.rglob("*.py") if p.is_file())
    with ThreadPoolExecutor() as pool: found = dict(filter(None, pool.map(read, paths, chunksize=64)))
    held_out = [found[digest] for digest in sorted(found) if digest[0] < 4]
    return [found[digest] for digest in sorted(found) if digest[0] >= 4], held_out


def encode(texts: list[str], tokenizer: Tokenizer, most: float) -> np.ndarray:
    "Token numbers of texts, `<|endoftext|>` behind each, until there are `most`"
    parts, count = [], 0
    for start in range(0, len(texts), 1000):
        rows = tokenizer.encode_batch(texts[start:start + 1000])
        parts += [np.array([*row, tokenizer.eot_id], np.uint16) for row in rows]
        count += sum(map(len, rows))
        if count > most: break
    return np.concatenate(parts)


def prepare(root: Path, folder: Path, tokens: float) -> tuple[Tokenizer, np.ndarray, np.ndarray]:
    "The tokenizer, the training and the validation tokens; what they are of is printed when they are made"
    record = folder / "corpus.json"
    if not record.exists() or json.loads(record.read_text())["train_tokens"] < tokens:
        folder.mkdir(parents=True, exist_ok=True)
        train, val = documents(root)
        def size(texts): return sum(len(text.encode()) for text in texts)
        told = dict(documents=len(train), val_documents=len(val), bytes=size(train), val_bytes=size(val))
        print(json.dumps(told), flush=True)
        text = folder / "tokenizer.json"
        tokenizer = Tokenizer(text.read_text() if text.exists()
                              else bpe_backend(train[::3], SHAPE["vocab_size"]).to_str(), EOT)
        text.write_text(tokenizer.json)
        made = dict(train=encode(train, tokenizer, tokens), val=encode(val, tokenizer, math.inf))
        for name, ids in made.items(): np.save(folder / f"{name}.npy", ids)
        record.write_text(json.dumps(told | {f"{name}_tokens": len(ids) for name, ids in made.items()}))
    tokenizer = Tokenizer((folder / "tokenizer.json").read_text(), EOT)
    return tokenizer, *(np.lib.format.open_memmap(folder / f"{name}.npy", mode="r") for name in ("train", "val"))


def learn(config: Config, tokenizer: Tokenizer, train: np.ndarray, val: np.ndarray, tokens: float) -> dict:
    "Train on `tokens` tokens, then read the whole validation text"
    t, length = config.training, config.model.seq_len
    resolution = resolve(t)
    device = resolution.apply()
    steps = int(tokens // (t.batch_size * t.grad_accum_steps * length))
    seed_everything(t.seed)
    model = GPT(config.model, tokenizer.vocab_size).to(device)
    stream = Stream(Windows(train, length), t.batch_size, t.seed, pin_memory=device.type == "cuda")
    trainer = Trainer(model, build_optimizer(model, t), LRSchedule.from_config(t, steps), stream, t, resolution,
                      target_position=2**60, target_step=steps)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    began = time.perf_counter()
    for event in trainer:
        if event.kind == "step" and event.step == UNCOUNTED:
            wait()
            counted = time.perf_counter()
    wait()
    seconds = (time.perf_counter() - counted) * steps / (steps - UNCOUNTED)
    result = evaluate(model, val_batches(Windows(val, length), 16), token_lengths(tokenizer), device,
                      resolution.autocast)
    return dict(bits_per_byte=round(result["bits_per_byte"], 4), nats=round(result["loss"], 4),
                stepping_s=round(seconds, 1),
                before_s=round(counted - began, 1), steps=steps, tokens=trainer.state.tokens,
                skipped=trainer.state.skipped, tokens_per_second=round(trainer.state.tokens / seconds),
                parameters=sum(p.numel() for p in model.parameters()),
                recorded=bool(trainer.stepper.recorder and trainer.stepper.recorder.recording),
                device=resolution.device_name, seed=t.seed)


def arguments(doc: str, tokens: float, seeds: list[int], settings: list[str]) -> argparse.ArgumentParser:
    "What is read, and which model learns from it"
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(torch.__file__).parents[1])
    parser.add_argument("--folder", type=Path, default=Path("data/py-corpus"))
    parser.add_argument("--config", default="qwen3-124m")
    parser.add_argument("--tokens", type=float, default=tokens)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--grad-accum-steps", type=int, default=1)
    parser.add_argument("--seeds", type=int, nargs="+", default=seeds)
    parser.add_argument("--set", nargs="*", default=settings, metavar="NAME=VALUE", help="other settings")
    return parser


def chosen(pairs: list[str]) -> dict:
    "Settings by name, from `NAME=VALUE`"
    return {name: all_settings()[name].parse(value) for name, _, value in (pair.partition("=") for pair in pairs)}


def configured(args: argparse.Namespace) -> Config:
    "The config that the arguments ask for"
    return load_config(args.config).replace(**QUIET | SHAPE | dict(
        batch_size=args.batch_size, grad_accum_steps=args.grad_accum_steps) | chosen(args.set))


def main() -> None:
    parser = arguments(__doc__, 30e6, [1], [])
    parser.add_argument("--prepare-only", action="store_true", help="make the corpus and its tokens, and stop")
    args = parser.parse_args()
    config = configured(args)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    prepared = prepare(args.root, args.folder, args.tokens)
    if args.prepare_only: return
    for seed in args.seeds: print(json.dumps(learn(config.replace(seed=seed), *prepared, args.tokens)), flush=True)


if __name__ == "__main__": main()
