"""What a training run would be: size, memory, steps and time, estimated without creating anything."""
from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path

from llm_trainer.records import read_json
from llm_trainer.terminal import count, duration, size
from llm_trainer.workspace import home

# Within a few percent; they differ between versions of Python
KNOWN_BYTES = {"python-docs": 2_030_000, "python-code": 11_000_000, "python-docs-tiny": 50_000}


def estimate(config, space) -> dict:
    "The plan of a run with `config`, ready for JSON; measures the speed with one small step"
    from llm_trainer.config import differences
    from llm_trainer.cost import memory_estimate, parameters_count
    from llm_trainer.device import resolve
    resolution = resolve(config.training, space.device)
    vocab = _vocabulary(config.data)
    parameters = parameters_count(config.model, vocab)
    tokens = _corpus_tokens(config.data, vocab, space.data)
    per_step = config.training.batch_size * config.training.grad_accum_steps * config.model.seq_len
    epoch = math.ceil(tokens / per_step) if tokens else None
    ends = [epoch and epoch * config.training.epochs, config.training.max_steps]
    steps = min(filter(None, ends), default=None)
    training = config.training
    memory = memory_estimate(config.model, vocab, training.batch_size, training.optimizer, resolution.dtype,
                             resolution.device)
    fits = memory["total"] < resolution.memory_bytes
    speed = _speed(config, vocab, parameters, resolution) if fits else None
    return {"config": config.to_dict(), "changed": {k: new for k, (_, new) in differences(config).items()},
            "device": resolution.to_dict(), "vocab_size": vocab, "parameters": parameters, "memory": memory,
            "train_tokens": tokens, "tokens_per_step": per_step, "steps": steps, "tokens_per_second": speed,
            "seconds": steps * per_step / speed if steps and fits else None}


def report(plan: dict) -> str:
    "The same for people"
    from llm_trainer.config import fields
    device, memory = plan["device"], plan["memory"]
    flat = {k: v for group in plan["config"].values() for k, v in group.items()}
    lines = []
    for group in ("model", "data", "training", "sampling"):
        lines += [f"[{group}]", *(f"  {'*' if k in plan['changed'] else ' '} {k:<20} {flat[k]}"
                                  for k, knob in fields().items() if knob.group == group), ""]
    fits = "" if memory["total"] < device["memory_bytes"] else \
        "  MORE THAN THERE IS: lower --batch-size and raise --grad-accum-steps"
    row = lambda label, text: f"{label:<11} {text}"
    lines += ["(* differs from the default)", "",
              row("device", f"{device['device']} ({device['device_name']}), {device['dtype']}: {device['reason']}"),
              row("model", f"{plan['parameters']:,} parameters, a vocabulary of {plan['vocab_size']:,}"),
              row("memory", f"about {size(memory['total'])} of {size(device['memory_bytes'])}{fits}"),
              row("a step", f"{plan['tokens_per_step']:,} tokens"),
              row("speed", f"about {count(round(plan['tokens_per_second']))} tokens/s, measured with one small step"
                  if plan["tokens_per_second"] else "not measured: the model does not fit"),
              row("length", f"about {count(plan['train_tokens'])} tokens an epoch, {plan['steps']:,} steps, "
                  f"{duration(plan['seconds'])} of stepping" if plan["train_tokens"] else
                  f"{plan['steps']:,} steps, {duration(plan['seconds'])}" if plan["steps"] else
                  "known once the data is here: llm-trainer prepare, with the same flags"), "", "Nothing was created."]
    return "\n".join(lines)


def foresee(plan, run, space):
    "A resume plan with its learning rates, and in words how many steps and how long; as it was where that is unknown"
    record = read_json(space.checkpoints / run.id / f"step-{plan.from_step:08d}" / "state" / "trainer.json")
    if not record.get("schedule") or not record.get("epoch"): return plan, ""
    from llm_trainer.config import Config
    from llm_trainer.optimizer import LRPlan
    from llm_trainer.train import learning_rates
    config = Config.from_dict(run.config()).replace(**{name: new for name, (_, new) in plan.changed.items()})
    windows, step = round(record["position"] / record["epoch"]), record["step"]
    target = round(plan.target_epochs * windows), plan.target_steps or 2**62
    left = math.ceil((target[0] - record["position"]) / (config.training.batch_size * config.training.grad_accum_steps))
    total = min(target[1], step + left)
    after = learning_rates(config, {"lr_plan": plan.lr_plan}, record, target, step, total, lambda message: None)
    pace = run.state()["step_seconds"]
    words = f"steps      {total - step:,} more" + (f", about {duration(pace * (total - step))}" if pace else "")
    rates = LRPlan.from_dict(record["schedule"]).lr(max(0, step - 1)), after.lr(step)
    return replace(plan, lr_before=rates[0], lr_after=rates[1]), words


def _vocabulary(data) -> int:
    "The tokens of the tokenizer, as far as it can be known beforehand"
    if data.tokenizer == "byte": return 257
    if data.tokenizer == "char": return 256
    if data.tokenizer == "bpe": return data.vocab_size
    from llm_trainer.tokenizer import Tokenizer
    return Tokenizer.load(Path(data.tokenizer)).vocab_size


def _corpus_tokens(data, vocab: int, folder: Path) -> int | None:
    "How many training tokens the corpus has: counted, if they are there, else about; None where it can't be known"
    names = [data.dataset] if isinstance(data.dataset, str) else [source.name for source in data.dataset]
    caches = [read_json(record) for record in folder.glob("tokens-*/meta.json")]
    counted = {c["corpus"]: c["train_tokens"] for c in caches if c.get("vocab_size") == vocab and "corpus" in c}
    if set(names) <= set(counted): return sum(counted[name] for name in names)
    sizes = [KNOWN_BYTES.get(name) or _bytes(home(name)) for name in names]
    if not all(sizes): return None
    per_token = 1.0 if data.tokenizer in ("byte", "char") else 2.57 + 0.45 * max(0.0, math.log2(vocab / 1024))
    return int(sum(sizes) * (1 - data.val_fraction) / per_token)


def _bytes(path: Path) -> int:
    try: return path.stat().st_size if path.is_file() else sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
    except OSError: return 0


def _speed(config, vocab: int, parameters: int, resolution) -> float:
    "Tokens a second of one forward and backward pass over random tokens, after one to warm up"
    import torch

    from llm_trainer.model import GPT
    device = resolution.apply()
    budget = max(256, int((5e12 if device.type == "cuda" else 3e10) / (6 * parameters)))
    length = min(config.model.seq_len, budget)
    rows = max(1, min(config.training.batch_size, budget // length))
    with device: model, tokens = GPT(config.model, vocab), torch.randint(0, vocab, (rows, length))
    for _ in range(2):
        begun = time.perf_counter()
        with resolution.autocast(): loss = model.loss(tokens, tokens)
        loss.backward()
        loss.item()
    return rows * length / (time.perf_counter() - begun)
