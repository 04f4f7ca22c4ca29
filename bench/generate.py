"""How fast text is written: our sampler beside Hugging Face's `generate` on the same weights, in one run.

    python bench/generate.py [--size quickstart|124m] [--batch 1] [--tokens 100] [--repeats 5] [--device auto]
                             [--threads 0]

Prints one JSON object. `ratio` is the median of the pairwise ratios, ours over theirs, in tokens per second.
`share_of_limit` is tokens per second over what streaming the weights once per token would allow at the measured copy
rate; it says something where the weights are larger than the caches.
"""
import argparse
import json
import statistics
import tempfile
import time

import torch

from llm_trainer.config import ModelConfig
from llm_trainer.generation.sampling import Sampling
from llm_trainer.model.transformer import GPT
from llm_trainer.generation.sampler import sample_tokens
from llm_trainer.model.huggingface import save_weights

SIZES = {"quickstart": (dict(n_layer=4, n_head=4, n_embd=192, seq_len=128), 1024),
         "124m": (dict(n_layer=12, n_head=12, n_embd=768, seq_len=1024), 50257)}


def wait(device: str):
    "Let the device finish"
    if device == "cuda": torch.cuda.synchronize()


def read_rate(device: str, megabytes: int = 1024) -> float:
    "Bytes per second that a copy reads and writes"
    source = torch.ones(megabytes * 250_000, device=device)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(5):
        wait(device)
        started = time.perf_counter()
        target.copy_(source)
        wait(device)
        best = min(best, time.perf_counter() - started)
    return 2 * source.numel() * 4 / best


def bench_generate(arch: str = "gpt2", size: str = "quickstart", batch: int = 1, tokens: int = 100, repeats: int = 5,
                   device: str = "auto") -> dict:
    "Tokens per second of both, in turn, sampling with temperature 0.8 and top-k 50"
    from transformers import AutoModelForCausalLM
    if device == "auto": device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes, vocabulary = SIZES[size]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    model = GPT(ModelConfig(arch=arch, **sizes), vocabulary).eval()
    with tempfile.TemporaryDirectory() as folder:
        save_weights(model, folder)
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    model.to(device, dtype)
    prompts = [list(range(8))] * batch
    sampling, ids = Sampling(max_new_tokens=tokens, temperature=0.8, top_k=50), torch.tensor(prompts, device=device)
    first = []

    def ours() -> float:
        wait(device)
        started = time.perf_counter()
        for i, _ in enumerate(sample_tokens(model, prompts, sampling, list(range(batch)))):
            if i == 0: first.append(time.perf_counter() - started)
        wait(device)
        return batch * tokens / (time.perf_counter() - started)

    @torch.inference_mode()
    def hugging_face() -> float:
        wait(device)
        started = time.perf_counter()
        theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens,
                        do_sample=True, temperature=0.8, top_k=50, eos_token_id=None, pad_token_id=0)
        wait(device)
        return batch * tokens / (time.perf_counter() - started)

    ours()
    hugging_face()
    first.clear()
    pairs = [(ours(), hugging_face()) for _ in range(repeats)]
    limit = batch * read_rate(device) / sum(p.numel() * p.element_size() for p in model.parameters())
    return {"arch": arch, "size": size, "batch": batch, "device": device, "dtype": str(dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(), "tokens_per_second": round(statistics.median(a for a, _ in pairs)),
            "hugging_face": round(statistics.median(b for _, b in pairs)),
            "ratio": round(statistics.median(a / b for a, b in pairs), 2),
            "share_of_limit": round(max(a for a, _ in pairs) / limit, 3),
            "first_token_ms": round(1000 * statistics.median(first), 1)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="quickstart")
    parser.add_argument("--arch", choices=["gpt2", "qwen3", "both"], default="both")
    for name, default in (("batch", 1), ("tokens", 100), ("repeats", 5), ("threads", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    if args.threads: torch.set_num_threads(args.threads)
    from transformers.utils.logging import disable_progress_bar
    disable_progress_bar()
    archs = ["gpt2", "qwen3"] if args.arch == "both" else [args.arch]
    results = [bench_generate(arch, args.size, args.batch, args.tokens, args.repeats, args.device) for arch in archs]
    print(json.dumps({"what": "generate", "torch": torch.__version__, "results": results}, indent=2))
