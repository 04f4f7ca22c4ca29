"""One change of the recipe at a time: what it does to the bits per byte learned from `bench/corpus.py`'s text.

    python bench/ablate.py [--tokens 16e6] [--seeds 1 2] [--only NAME …] [--seconds 600] [--set n_layer=8 n_embd=512 …]
                           [--config qwen3-124m] [--batch-size 32] [--root …] [--folder …]

Every change is trained with every seed, all of them with the first seed before any with the second, until `seconds`
are over. Prints one JSON object a run, then one that holds for each change its mean, its runs and its distance from
the recipe as it is. A change that helps at this length needn't at another: repeat what is to be kept with
`bench/corpus.py`.
"""
import json
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from statistics import mean
from typing import NamedTuple
from unittest.mock import patch

import numpy as np

from llm_trainer.model import transformer
from llm_trainer.model.transformer import GPT
from llm_trainer.training import optimizer
from llm_trainer.training.optimizer import AdamW, Muon, Optimizers, build_optimizer

import corpus
from corpus import arguments, configured, learn, prepare


class CautiousMuon(Muon):
    "Weights decay only where the step makes them smaller, too"
    def step(self) -> None:
        for group in self.param_groups:
            before, decay = [p.detach().clone() for p in group["params"]], group["weight_decay"]
            group["weight_decay"] = 0.0
            super().step()
            group["weight_decay"] = decay
            for p, old in zip(group["params"], before):
                p.data.sub_(old * (((p.data - old) * old) < 0) * (group["lr"] * decay))


def own_rates(model, training, dtype="bfloat16", embedding: float = 1.0, head: float = 1.0):
    "Other learning rates for the embedding and for the head, as multiples of `lr`"
    built = build_optimizer(model, training, dtype)
    muon, adamw = built.optimizers
    rest = {"embedding": [], "head": [], "vector": []}
    for group in adamw.param_groups:
        for p in group["params"]:
            name = built.names[p]
            rest["head" if "lm_head" in name else "embedding" if "embed" in name else "vector"].append(p)
    groups = [dict(params=rest["embedding"], lr=training.lr * embedding, weight_decay=training.weight_decay),
              dict(params=rest["head"], lr=training.lr * head, weight_decay=training.weight_decay),
              dict(params=rest["vector"], lr=training.lr, weight_decay=0.0)]
    adamw = AdamW([g for g in groups if g["params"]], training.lr, (training.beta1, training.beta2), fused=True,
                  capturable=model.head.is_cuda)
    for group in muon.param_groups: group["lr"] = training.muon_lr
    return Optimizers([muon, adamw], model)


def zero_projections(cfg, name: str, shape: tuple, plain=transformer.init_std):
    "What a block adds to the residual stream begins as nothing"
    return 0.0 if "o_proj" in name or "down_proj" in name else plain(cfg, name, shape)


def at_window_starts(tokens: np.ndarray, length: int, separator: int) -> np.ndarray:
    "Each window begins with a document; what doesn't fit its last one is left out"
    ends = np.flatnonzero(tokens == separator) + 1
    rows, row, left = [], [], length
    for begin, end in zip([0, *ends[:-1]], ends):
        row.append(tokens[begin:min(end, begin + left)])
        left -= len(row[-1])
        if not left:
            rows.append(np.concatenate(row))
            row, left = [], length
    return np.concatenate(rows)


untied = patch.object(corpus, "GPT", partial(GPT, tied=False))
def rates(**kw): return patch.object(corpus, "build_optimizer", partial(own_rates, **kw))


class Change(NamedTuple):
    "What a run differs in"
    settings: dict = {}
    patches: tuple = ()  # what is put in the place of something else
    arrange: Callable = lambda tokens, length, separator: tokens  # of the training text


CHANGES = {
    "as it is": Change(),
    "rows not levelled": Change(patches=(patch.object(Muon, "levels", False),)),
    "momentum 0.95 throughout": Change(patches=(patch.object(optimizer, "momentum_at", lambda step, factor: 0.95),)),
    "fall over the last 0.2": Change(dict(decay_fraction=0.2)),
    "fall over the last 0.65": Change(dict(decay_fraction=0.65)),
    "fall from the start": Change(dict(decay_fraction=1.0)),
    "projections begin as zero": Change(patches=(patch.object(transformer, "init_std", zero_projections),)),
    "cautious weight decay": Change(patches=(patch.object(optimizer, "Muon", CautiousMuon),)),
    "no weight decay": Change(dict(weight_decay=0.0)),
    "own head": Change(patches=(untied,)),
    "own head, embedding x 30": Change(patches=(untied, rates(embedding=30))),
    "tied, embedding x 3": Change(patches=(rates(embedding=3),)),
    "documents at window starts": Change(arrange=at_window_starts),
    "gradient clipped at 1": Change(dict(grad_clip=1.0)),
    "batch of 64": Change(dict(batch_size=64)),
    "half as many key heads": Change(dict(n_kv_head=2)),
    "Muon's rate x 0.5": Change(dict(muon_lr=5e-3)),
    "Muon's rate x 2": Change(dict(muon_lr=2e-2)),
    "AdamW's rate x 0.5": Change(dict(lr=3e-3)),
    "AdamW's rate x 2": Change(dict(lr=1.2e-2)),
    "gpt2's blocks": Change(dict(arch="gpt2")),
    "AdamW for all": Change(dict(optimizer="adamw", lr=2e-3)),
}


def main() -> None:
    parser = arguments(__doc__, 16e6, [1, 2], ["n_layer=8", "n_embd=512", "n_head=4", "grad_clip=0", "warmup_steps=20"])
    parser.add_argument("--seconds", type=float, default=600, help="no run begins later")
    parser.add_argument("--only", nargs="+", choices=CHANGES, default=list(CHANGES), metavar="NAME")
    args = parser.parse_args()
    began, config = time.monotonic(), configured(args)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    tokenizer, train, val = prepare(args.root, args.folder, 1.5 * args.tokens)
    found: dict[str, list[float]] = {}
    for seed in args.seeds:
        for name in args.only:
            if time.monotonic() - began > args.seconds: break
            settings, patches, arrange = CHANGES[name]
            with ExitStack() as stack:
                for p in patches: stack.enter_context(p)
                text = arrange(train, config.model.seq_len, tokenizer.eot_id)
                row = learn(config.replace(seed=seed, **settings), tokenizer, text, val, args.tokens)
            found.setdefault(name, []).append(row["bits_per_byte"])
            print(json.dumps(dict(change=name, **row)), flush=True)
    plain = mean(found["as it is"])
    print(json.dumps({name: dict(mean=round(mean(runs), 4), runs=runs, worse=round(mean(runs) - plain, 4))
                      for name, runs in sorted(found.items(), key=lambda pair: mean(pair[1]))}, indent=1))


if __name__ == "__main__": main()
