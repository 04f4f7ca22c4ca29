"""Training speed here: our Trainer on a profile, beside Hugging Face's Trainer on a GPT-2 of the very same shape.

    python bench/train.py [--config quickstart] [--steps 10] [--rounds 5] [--peer auto|trainer|loop|none]
                          [--avx2] [--device D] [--dtype D] [--compile C] [--batch-size N] [--grad-accum-steps N]
                          [--threads N]

Everyone takes `steps` optimizer steps in turn, `rounds` times after one that doesn't count, so a busy machine is as
unkind to one as to another; `ratio` is the median of the ratios of a round. Tokens are random: speed doesn't read them.
Hugging Face's Trainer needs accelerate; without it the peer is a plain loop around the same GPT2LMHeadModel.
With --avx2 the same again as on a CPU that has AVX2 and no more, as most laptops: the row `avx2`.
Prints one JSON object.
"""
import argparse
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from llm_trainer.data.batches import Stream, Windows
from llm_trainer.config import Config, all_settings, load_config
from llm_trainer.model.cost import flops_per_token, memory_estimate, parameters_count
from llm_trainer.device import Resolution, memory_used, resolve, seed_everything
from llm_trainer.model.transformer import GPT
from llm_trainer.training.optimizer import LRSchedule, build_optimizer
from llm_trainer.training.trainer import Trainer
from llm_trainer.model.huggingface import hf_config

QUIET = dict(log_every=0, eval_every=0, save_every=0, save_minutes=0, sample_every=0, schedule="constant",
             warmup_steps=0)
KNOBS = "device", "dtype", "compile", "batch_size", "grad_accum_steps", "threads"
MATMULS = 10  # of one step of the matmul's own row


class Turns:
    "Lets each contender take some steps in turn, and keeps the seconds"
    def __init__(self, steps: int, resolution: Resolution):
        self.steps, self.resolution = steps, resolution
        self.contenders: dict[str, Callable] = {}  # name → takes one step
        self.seconds: dict[str, list[float]] = {}  # name → of each round
        self.guest_steps = 0

    def clock(self) -> float:
        if self.resolution.device == "cuda": torch.cuda.synchronize()
        return time.perf_counter()

    def round(self) -> None:
        torch.use_deterministic_algorithms(self.resolution.deterministic)
        for name, step in self.contenders.items():
            began = self.clock()
            for _ in range(self.steps): step()
            self.seconds.setdefault(name, []).append(self.clock() - began)

    def guest_begins(self) -> None:
        "A guest runs a loop of its own, with what determinism costs switched off"
        torch.use_deterministic_algorithms(False)
        self.began = self.clock()

    def guest_stepped(self) -> None:
        "Called by the guest's loop after each of its steps: when its turn is over, the others have theirs"
        self.guest_steps += 1
        if self.guest_steps % self.steps: return
        self.seconds.setdefault("peer", []).append(self.clock() - self.began)
        self.round()
        self.guest_begins()

    def ratio(self, slow: str, fast: str) -> float:
        pairs = list(zip(self.seconds[slow], self.seconds[fast]))[1:]
        return statistics.median(a / b for a, b in pairs)

    def step_seconds(self, name: str) -> float: return statistics.median(self.seconds[name][1:]) / self.steps


def our_step(config: Config, windows: Windows, vocab_size: int, resolution: Resolution) -> Callable:
    "A function that takes one step of our Trainer"
    t = config.training
    seed_everything(t.seed)
    model = GPT(config.model, vocab_size).to(resolution.device)
    stream = Stream(windows, t.batch_size, t.seed, pin_memory=resolution.device == "cuda")
    events = iter(Trainer(model, build_optimizer(model, t, resolution.muon_dtype), LRSchedule.from_config(t, 1), stream,
                          t, resolution, target_position=2**60, target_step=2**60))
    return lambda: next(event for event in events if event.kind == "step")


def matmul_step(resolution: Resolution) -> tuple[Callable, int]:
    "A function that does some large matrix products in the same dtype, and how many operations they are"
    n = 8192 if resolution.device == "cuda" else 1024
    a, b, c = torch.randn(3, n, n, device=resolution.device, dtype=getattr(torch, resolution.dtype))
    def step():
        for _ in range(MATMULS): torch.mm(a, b, out=c)
    return step, MATMULS * 2 * n**3


class Examples(torch.utils.data.Dataset):
    "The same windows as Hugging Face wants them: its models shift the labels themselves"
    def __init__(self, windows: Windows): self.windows = windows
    def __len__(self): return len(self.windows)
    def __getitem__(self, i): return dict(input_ids=self.windows[i][0], labels=self.windows[i][0])


def hf_model(config: Config, vocab_size: int):
    from transformers import GPT2Config, GPT2LMHeadModel
    with torch.device("meta"): ours = GPT(config.model, vocab_size)
    return GPT2LMHeadModel(GPT2Config(**hf_config(ours))).train()


def hf_trainer(config: Config, windows: Windows, vocab_size: int, turns: Turns, rounds: int) -> None:
    "Hugging Face's Trainer, as fast as its options make it"
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    class Turn(TrainerCallback):
        def on_train_begin(self, *_, **__): turns.guest_begins()
        def on_step_end(self, *_, **__): turns.guest_stepped()
    t, r = config.training, turns.resolution
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=turns.steps * rounds, per_device_train_batch_size=t.batch_size,
            gradient_accumulation_steps=t.grad_accum_steps, learning_rate=t.lr, weight_decay=t.weight_decay,
            adam_beta1=t.beta1, adam_beta2=t.beta2, max_grad_norm=t.grad_clip, lr_scheduler_type="constant",
            optim="adamw_torch_fused", bf16=r.dtype == "bfloat16", fp16=r.dtype == "float16", use_cpu=r.device == "cpu",
            torch_compile=r.compile, dataloader_pin_memory=r.device == "cuda", seed=t.seed, logging_strategy="no",
            save_strategy="no", eval_strategy="no", report_to="none", disable_tqdm=True)
        trainer = Trainer(hf_model(config, vocab_size), arguments, train_dataset=Examples(windows), callbacks=[Turn()])
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def hf_loop(config: Config, windows: Windows, vocab_size: int, turns: Turns, rounds: int) -> None:
    "The loop of a tutorial around Hugging Face's model"
    t, r = config.training, turns.resolution
    model = hf_model(config, vocab_size).to(r.device)
    loss_of = torch.compile(model) if r.compile else model
    optimizer = torch.optim.AdamW(model.parameters(), t.lr, (t.beta1, t.beta2), weight_decay=t.weight_decay, fused=True)
    loader = torch.utils.data.DataLoader(Examples(windows), t.batch_size, shuffle=True, pin_memory=r.device == "cuda")
    batches = (batch for _ in iter(int, 1) for batch in loader)
    turns.guest_begins()
    for _ in range(turns.steps * rounds):
        for _ in range(t.grad_accum_steps):
            batch = {name: x.to(r.device, non_blocking=True) for name, x in next(batches).items()}
            with r.autocast(): loss = loss_of(**batch).loss / t.grad_accum_steps
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), t.grad_clip or float("inf"))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        turns.guest_stepped()


AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}


def as_avx2(words: list[str]) -> dict:
    "What this script says of our own speed with these arguments, with AVX2 at most"
    words = [sys.executable, __file__, *(w for w in words if w != "--avx2"), "--peer", "none"]
    found = json.loads(subprocess.run(words, env={**os.environ, **AVX2}, stdout=subprocess.PIPE, check=True).stdout)
    return {name: found[name] for name in ("dtype", "profile", "gpt2", "matmul_tflops")}


PEERS = {"trainer": hf_trainer, "loop": hf_loop, "none": None}


def absent() -> list[str]:
    "What Hugging Face's Trainer needs and this Python doesn't have"
    return [name for name in ("transformers", "accelerate") if not importlib.util.find_spec(name)]


def choose_peer(asked: str, missing: list[str]) -> tuple[str, str]:
    "Which peer, and why it isn't Hugging Face's Trainer where it should have been"
    if asked != "auto": return asked, ""
    if not missing: return "trainer", ""
    why = f"{' and '.join(missing)} not installed, which Hugging Face's Trainer needs: pip install {' '.join(missing)}"
    return ("none" if "transformers" in missing else "loop"), why


def peak_memory(device: str) -> int:
    "Bytes: the GPU's peak, or the most this process ever had resident"
    if device == "cuda": return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform == "darwin": return peak
    found = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(found[0].split()[1]) * 1024 if found else peak * 1024


def measure(config: str = "quickstart", steps: int = 10, rounds: int = 5, peer: str = "auto", **knobs) -> dict:
    own = load_config(config).replace(**QUIET, **knobs)
    twin = own.replace(arch="gpt2", n_kv_head=None, head_size=None, n_hidden=None, optimizer="adamw")
    resolution = resolve(own.training)
    device = resolution.apply()
    vocab_size = {"char": 128, "byte": 320}.get(own.data.tokenizer,
                                                -(-own.data.vocab_size // 64) * 64)  # padded for all
    tokens = np.random.default_rng(0).integers(0, vocab_size, max(400_000, 64 * own.model.seq_len)).astype(np.uint16)
    windows = Windows(tokens, own.model.seq_len)
    turns, sequences = Turns(steps, resolution), own.training.batch_size * own.training.grad_accum_steps
    batch_tokens = sequences * own.model.seq_len

    def row(name: str, c: Config) -> dict:
        seconds, flops = turns.step_seconds(name), flops_per_token(c.model, vocab_size)
        rate = flops * batch_tokens / seconds
        return dict(arch=c.model.arch, optimizer=c.training.optimizer, parameters=parameters_count(c.model, vocab_size),
                    tokens_per_second=round(batch_tokens / seconds), step_ms=round(seconds * 1e3, 2),
                    tflops=round(rate / 1e12, 4), share_of_matmul=round(rate / matmul_rate, 3))

    before = 0 if resolution.device == "cuda" else memory_used(device)
    turns.contenders["ours, profile"] = step = our_step(own, windows, vocab_size, resolution)
    for _ in range(2): step()
    memory = peak_memory(resolution.device)
    estimate = memory_estimate(own.model, vocab_size, own.training.batch_size, own.training.optimizer, resolution.dtype,
                               resolution.device)["total"]
    turns.contenders["ours"] = our_step(twin, windows, vocab_size, resolution)
    turns.contenders["matmul"], operations = matmul_step(resolution)

    peer, why = choose_peer(peer, absent())
    if why: print(f"No side by side with Hugging Face's Trainer: {why}", file=sys.stderr)
    if PEERS[peer]: PEERS[peer](twin, windows, vocab_size, turns, rounds + 1)
    else:
        for _ in range(rounds + 1): turns.round()
    torch.use_deterministic_algorithms(False)

    matmul_rate = operations / turns.step_seconds("matmul")
    found = dict(
        config=config, device=resolution.device_name, dtype=resolution.dtype, compile=resolution.compile,
        threads=resolution.threads, torch=torch.__version__, batch_tokens=batch_tokens, steps=steps, rounds=rounds,
        profile=row("ours, profile", own), gpt2=row("ours", twin), matmul_tflops=round(matmul_rate / 1e12, 3),
        memory=dict(peak_mb=round(memory / 1e6), of_training_mb=round((memory - before) / 1e6),
                    estimate_mb=round(estimate / 1e6)))
    names = {"trainer": "Hugging Face Trainer", "loop": "plain loop around GPT2LMHeadModel"}
    if PEERS[peer]:
        found |= dict(peer=dict(row("peer", twin), name=names[peer]), ratio=round(turns.ratio("peer", "ours"), 3),
                                  ratio_profile=round(turns.ratio("peer", "ours, profile"), 3))
    return found | (dict(note=why) if why else {})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="quickstart", help="profile or TOML file")
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps of a turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer", choices=["auto", *PEERS], default="auto")
    for name in KNOBS:
        parser.add_argument(f"--{name.replace('_', '-')}", type=all_settings()[name].parse, default=argparse.SUPPRESS)
    parser.add_argument("--avx2", action="store_true", help="measure again with AVX2 at most")
    args = vars(parser.parse_args())
    again = args.pop("avx2")
    found = measure(**args)
    print(json.dumps(found | (dict(avx2=as_avx2(sys.argv[1:])) if again else {}), indent=1))
