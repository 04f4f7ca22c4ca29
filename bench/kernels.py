"""Where a training step on a GPU spends its time, by family of kernels.

    python bench/kernels.py [--config gpt2-124m] [--steps 5] [--batch-size 32] [--grad-accum-steps 1]
                            [--set NAME=VALUE …] [--names 12]

Steps are taken as training takes them (compiled, recorded where they are) on random tokens, under PyTorch's profiler.
Of each family: milliseconds a step, share of the GPU's busy time, kernels a step. `limit_ms` is what the operations
of a step would take at the rate of a large matmul. Prints one JSON object; `longest` are the kernels that take most.
"""
import argparse
import json
import time
from collections import Counter

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from llm_trainer.config import load_config
from llm_trainer.data.batches import Windows
from llm_trainer.device import resolve
from llm_trainer.model.cost import flops_per_token

from corpus import chosen
from train import QUIET, matmul_step, our_step

FAMILIES = {  # the first word found in a kernel's name decides
    "attention": ("flash", "fmha", "sdpa", "cudnn_generated"),
    "matmul": ("gemm", "nvjet", "cutlass", "xmma", "cublas", "splitk"),
    "head's loss": ("cross_entropy",),
    "optimizer": ("multi_tensor", "adam", "foreach", "lpnorm"),
    "compiled, fused": ("triton_",),
    "copies and casts": ("memcpy", "memset", "copy", "cat"),
}


def family(name: str) -> str:
    "Which family a kernel is of"
    return next((title for title, words in FAMILIES.items() if any(word in name.lower() for word in words)), "other")


def measure(config: str, steps: int, names: int, **knobs) -> dict:
    own = load_config(config).replace(**QUIET | knobs)
    t, resolution = own.training, resolve(own.training)
    resolution.apply()
    vocabulary = -(-own.data.vocab_size // 64) * 64
    tokens = np.random.default_rng(0).integers(0, vocabulary, 1_000_000).astype(np.uint16)
    step = our_step(own, Windows(tokens, own.model.seq_len), vocabulary, resolution)

    def timed(act, times: int) -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(times): act()
        torch.cuda.synchronize()
        return (time.perf_counter() - began) / times

    timed(step, 8)
    seconds = timed(step, 4 * steps)
    with profile(activities=[ProfilerActivity.CUDA]) as found: timed(step, steps)
    kernels = [e for e in found.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    spent, count, longest = Counter(), Counter(), Counter()
    for e in kernels:
        spent[family(e.name)] += e.device_time / 1e3 / steps
        count[family(e.name)] += 1 / steps
        longest[e.name[:110]] += e.device_time / 1e3 / steps
    multiply, operations = matmul_step(resolution)
    multiply()
    rate = operations / timed(multiply, 5)
    batch_tokens = t.batch_size * t.grad_accum_steps * own.model.seq_len
    busy = sum(spent.values())
    return dict(config=config, device=resolution.device_name, torch=torch.__version__, batch_tokens=batch_tokens,
                tokens_per_second=round(batch_tokens / seconds), step_ms=round(seconds * 1e3, 2),
                busy_ms=round(busy, 2), matmul_tflops=round(rate / 1e12, 1),
                limit_ms=round(flops_per_token(own.model, vocabulary) * batch_tokens / rate * 1e3, 2),
                families={name: dict(ms=round(ms, 2), share=round(ms / busy, 3), kernels=round(count[name], 1))
                          for name, ms in spent.most_common()},
                longest={name: round(ms, 2) for name, ms in longest.most_common(names)})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="gpt2-124m")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--grad-accum-steps", type=int, default=1)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="other settings")
    parser.add_argument("--names", type=int, default=12, help="how many kernels to name")
    args = parser.parse_args()
    print(json.dumps(measure(args.config, args.steps, args.names, batch_size=args.batch_size,
                             grad_accum_steps=args.grad_accum_steps, **chosen(args.set)), indent=1))
