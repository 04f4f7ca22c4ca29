"""What a training run would be: size, memory, steps and time, estimated without creating anything."""
from __future__ import annotations

import math
import statistics
import time
from dataclasses import replace
from pathlib import Path

from llm_trainer.errors import UsageError
from llm_trainer.runs.state import list_devices
from llm_trainer.system.files import read_json
from llm_trainer.events import silent
from llm_trainer.terminal import count, duration, size

# Within a few percent; they differ between versions of Python
KNOWN_BYTES = {"python-docs": 2_030_000, "python-code": 11_000_000, "python-docs-tiny": 50_000}


def estimate(
    config,
    space,
    devices: str | list[str] | None = None,  # as `--devices` has them; a list: one of each torchrun rank
    local_world: int | None = None,  # how many of them are on this machine; None: all
) -> dict:
    "The plan of a run with `config`, ready for JSON; measures the speed of one device with some small steps"
    from llm_trainer.config import differences
    from llm_trainer.model.cost import parameters_count
    from llm_trainer.device import resolve, total_memory
    from llm_trainer.runs.launch import take_devices
    from llm_trainer.runs.worker import take_device
    from llm_trainer.training.distributed import Group
    taken = take_devices(devices, config.to_dict(), space.runs)
    take_device(taken[0])  # what is measured is a device that would train
    resolution = resolve(config.training, space.device)
    if resolution.device == "cuda":
        resolution = replace(resolution, memory_bytes=min(total_memory(name) for name in set(taken)))
    group = Group(0, len(taken), 0, local_world or len(taken))
    vocab = _vocabulary(config, space)
    parameters = parameters_count(config.model, vocab)
    tokens = _corpus_tokens(config.data, vocab, space.data)
    per_step = config.training.batch_size * config.training.grad_accum_steps * config.model.seq_len
    epoch = math.ceil(tokens / per_step) if tokens else None
    ends = [epoch and epoch * config.training.epochs, config.training.max_steps]
    steps = min(filter(None, ends), default=None)
    spread = _spread(config, vocab, resolution, group)
    memory, available, hold = spread["memory"], spread.pop("available"), spread.pop("hold")
    fits = memory["total"] < available
    speed = _speed(config, vocab, parameters, resolution) if fits else None
    waited = 0.0
    if speed and group.world > 1:
        speed, waited = _together(config, vocab, resolution, group, spread["strategy"], hold, speed)
    return {"config": config.to_dict(), "changed": {k: new for k, (_, new) in differences(config).items()},
            "device": resolution.to_dict(), "devices": taken, **spread, "memory_available": available,
            "vocab_size": vocab,
            "parameters": parameters, "train_tokens": tokens, "tokens_per_step": per_step, "steps": steps,
            "tokens_per_second": speed, "step_seconds": per_step / speed if speed else None, "waited": waited,
            "seconds": _seconds(config.training, steps, per_step, tokens, config.data.val_fraction, speed) if steps
            and fits else None}


def _spread(config, vocab: int, resolution, group) -> dict:
    "How the model would be laid over the devices, why, and what each of them would hold"
    from llm_trainer.config import deal
    from llm_trainer.model.cost import memory_estimate
    from llm_trainer.training.recipe import how_to_spread
    t = config.training
    micro, _ = deal(t.batch_size, t.grad_accum_steps, group.world)
    strategy, hold, why = how_to_spread(config, vocab, resolution, group)
    shared = {"shards": group.local_world, "hold": hold} if strategy == "fsdp" else {}
    memory = memory_estimate(config.model, vocab, micro, t.optimizer, resolution.dtype, resolution.device, **shared)
    on_one = group.local_world if resolution.device == "cpu" else 1  # processes that share a device's memory
    return {"strategy": strategy, "hold": hold, "why": why, "memory": memory,
            "available": resolution.memory_bytes // on_one}


def _together(config, vocab: int, resolution, group, strategy: str, hold: bool,
              speed: float) -> tuple[float, float]:
    "Tokens a second of all devices, where one alone makes `speed`, and the share of time spent waiting"
    from llm_trainer.config import deal
    from llm_trainer.model.cost import flops_per_token
    from llm_trainer.training.scaling import Wires, step_time, wires_of
    t, on_cpu = config.training, resolution.device == "cpu"
    if on_cpu: wires = Wires(0.5e9, 0.1e9, group.local_world, 1e-3)
    else: wires = replace(wires_of(resolution.device_name), devices=group.local_world)
    sharing = group.local_world if on_cpu else 1  # processes on the same cores
    each = speed * flops_per_token(config.model, vocab) / sharing
    sequences = t.batch_size * t.grad_accum_steps
    found = step_time(config.model, vocab, sequences, group.world, each, wires,
                      deal(t.batch_size, t.grad_accum_steps, group.world)[0], strategy, t.optimizer, hold)
    return sequences * config.model.seq_len / found.total, found.waited / found.total


def _seconds(training, steps: int, per_step: int, tokens: int | None, held_out: float, speed: float) -> float:
    "Stepping, and reading the validation text a third as long for each token"
    each = min((tokens or 0) * held_out / (1 - held_out),
               (training.eval_batches or math.inf) * per_step) if held_out < 1 else 0
    evaluations = steps // training.eval_every + (steps % training.eval_every > 0) if training.eval_every else 0
    return (steps * per_step + evaluations * each / 3) / speed


def shortened(config, space, minutes: int):
    "The config of a run of about `minutes` at most here, and a sentence about it"
    if not 1 <= minutes <= 1_000_000: raise UsageError("--within goes from 1 to 1,000,000 minutes.")
    found = estimate(config, space)
    if not found["seconds"]: return config, "How long this takes is not known before the data is here."
    device = found["device"]
    speed, where = count(round(found["tokens_per_second"])), f"{device['device_name']}, {device['dtype']}"
    pace = f"measured: {speed} tokens/s on {where}"
    if found["seconds"] <= 60 * minutes: return config, f"This takes about {duration(found['seconds'])} here ({pace})."
    share = 60 * minutes / found["seconds"]
    steps, every = max(1, int(found["steps"] * share)), ("eval_every", "sample_every")
    cadence = {name: max(1, int(value * share)) for name in every if (value := getattr(config.training, name))}
    return config.replace(max_steps=steps, **cadence), (
        f"This would take about {duration(found['seconds'])} here ({pace}). "
        f"Shortened to {steps:,} of {found['steps']:,} steps, about {minutes} minutes; "
        "train it longer afterwards: llm-trainer resume --more-epochs 1")


def report(plan: dict) -> str:
    "The same for people"
    from llm_trainer.config import all_settings
    device, memory = plan["device"], plan["memory"]
    flat = {k: v for group in plan["config"].values() for k, v in group.items()}
    lines = []
    for group in ("model", "data", "training", "sampling"):
        lines += [f"[{group}]", *(f"  {'*' if k in plan['changed'] else ' '} {k:<20} {flat[k]}"
                                  for k, knob in all_settings().items() if knob.group == group), ""]
    several = len(plan["devices"]) > 1
    fits = "" if memory["total"] < plan["memory_available"] else \
        "  MORE THAN THERE IS: lower --batch-size and raise --grad-accum-steps"
    def row(label, text): return f"{label:<11} {text}"
    lines += ["(* differs from the default)", "",
              row("device", f"{device['device']} ({device['device_name']}), {device['dtype']}: {device['reason']}"),
              *([row("devices", _devices(plan))] if several else []),
              row("model", f"{plan['parameters']:,} parameters, a vocabulary of {plan['vocab_size']:,}"),
              row("memory", f"about {size(memory['total'])} of "
                            f"{size(plan['memory_available'])}{' on each' if several else ''}{fits}"),
              row("a step", f"{plan['tokens_per_step']:,} tokens{_step(plan)}"),
              row("speed", _pace(plan)), row("length", _length(plan)), "", "Nothing was created."]
    return "\n".join(lines)


def _pace(plan: dict) -> str:
    if not plan["tokens_per_second"]: return "not measured: the model does not fit"
    how = "some small steps of one device" if len(plan["devices"]) > 1 else "some small steps"
    return f"about {count(plan['tokens_per_second'])} tokens/s, measured with {how}"


def _length(plan: dict) -> str:
    if not plan["steps"]: return "known once the data is here: llm-trainer prepare, with the same flags"
    steps, time = f"{plan['steps']:,} steps", duration(plan["seconds"])
    if not plan["train_tokens"]: return f"{steps}, {time}"
    return f"about {count(plan['train_tokens'])} tokens an epoch, {steps}, {time} of stepping"


def _devices(plan: dict) -> str:
    "How many, which, and how the model is laid over them"
    return f"{list_devices(plan['devices'], plan['strategy'])}: {plan['why']}"


def _step(plan: dict) -> str:
    if not plan["step_seconds"]: return ""
    waited = f", {plan['waited']:.0%} of it waiting for each other" if len(plan["devices"]) > 1 else ""
    return f", about {plan['step_seconds']:.3g} s{waited}"


def foresee(plan, run, space):
    "A resume plan with its learning rates, and in words how many steps and how long; as it was where that is unknown"
    record = read_json(space.checkpoints / run.id / f"step-{plan.from_step:08d}" / "state" / "trainer.json")
    if not record.get("schedule") or not record.get("epoch"): return plan, ""
    from llm_trainer.config import Config
    from llm_trainer.training.optimizer import LRSchedule
    from llm_trainer.training.recipe import learning_rates
    config = Config.from_dict(run.config()).replace(**{name: new for name, (_, new) in plan.changed.items()})
    windows, step = round(record["position"] / record["epoch"]), record["step"]
    target = round(plan.target_epochs * windows), plan.target_steps or 2**62
    left = math.ceil((target[0] - record["position"]) / (config.training.batch_size * config.training.grad_accum_steps))
    total = min(target[1], step + left)
    after = learning_rates(config, {"lr_plan": plan.lr_plan}, record, target, step, total, silent)
    pace = run.state().step_seconds
    words = f"steps      {total - step:,} more" + (f", about {duration(pace * (total - step))}" if pace else "")
    rates = LRSchedule.from_dict(record["schedule"]).lr(max(0, step - 1)), after.lr(step)
    return replace(plan, lr_before=rates[0], lr_after=rates[1]), words


def _vocabulary(config, space) -> int:
    "The tokens of the model, as far as they can be known beforehand"
    data = config.data
    from llm_trainer.data.pretrained import model_folder
    if config.training.init_from:
        from llm_trainer.model.huggingface import model_from_config, read_config
        folder = model_folder(config.training.init_from, space.data, weights=False)
        return model_from_config(read_config(folder / "config.json")).vocab_size
    if data.tokenizer == "byte": return 257
    if data.tokenizer == "char": return 256
    if data.tokenizer == "bpe": return data.vocab_size
    from llm_trainer.data.tokenizer import Tokenizer
    return Tokenizer.load(model_folder(data.tokenizer, space.data, weights=False)).vocab_size


def _corpus_tokens(data, vocab: int, folder: Path) -> int | None:
    "How many training tokens the corpus has: counted, if they are there, else about; None where it can't be known"
    names = [data.dataset] if isinstance(data.dataset, str) else [source.name for source in data.dataset]
    caches = [read_json(record) for record in folder.glob("tokens-*/meta.json")]
    counted = {c["corpus"]: c["train_tokens"] for c in caches if c.get("vocab_size") == vocab and "corpus" in c}
    if set(names) <= set(counted): return sum(counted[name] for name in names)
    sizes = [KNOWN_BYTES.get(name) or _bytes(name, folder) for name in names]
    if not all(sizes): return None
    per_token = 1.0 if data.tokenizer in ("byte", "char") else 2.57 + 0.45 * max(0.0, math.log2(vocab / 1024))
    return int(sum(sizes) * (1 - data.val_fraction) / per_token)


def _bytes(name: str, data_dir: Path) -> int:
    "The bytes of local text, about; 0 for a dataset of the hub that is not here"
    from llm_trainer.data.readers import find_files, packing
    from llm_trainer.data.sources import local_paths
    files = [file for path in local_paths(name, data_dir) or [] for file in find_files(path)]
    return sum(file.stat().st_size * (4 if packing(file) else 1) for file in files)


def _speed(config, vocab: int, parameters: int, resolution) -> float:
    "Tokens a second, from small optimizer steps over random tokens, scaled up; of a very large model only a slice"
    import torch

    from llm_trainer.device import settings_kept
    from llm_trainer.model.cost import flops_per_token, parameters_count
    from llm_trainer.model.transformer import GPT
    from llm_trainer.training.optimizer import build_optimizer
    training, cuda = config.training, resolution.device == "cuda"
    whole, model, words = flops_per_token(config.model, vocab), config.model, vocab
    if parameters > (5e8 if cuda else 5e7): # two layers and some rows of the vocabulary; the rest is more of the same
        model, words = config.replace(n_layer=min(2, model.n_layer)).model, min(vocab, 8192)
        parameters = parameters_count(model, words)
    budget = max(128, int((5e12 if cuda else 6e10) / (6 * parameters)))
    length = min(model.seq_len, budget)
    rows = max(1, min(training.batch_size, budget // length))
    micro_batches = training.batch_size * training.grad_accum_steps * config.model.seq_len / (rows * length)
    with settings_kept():
        device = resolution.apply()
        generator = torch.random.fork_rng(devices=[])
        with generator, device: gpt, tokens = GPT(model, words), torch.randint(0, words, (rows, length))
        optimizer, times = build_optimizer(gpt, training, resolution.muon_dtype), []
        while len(times) < 4 or (len(times) < 12 and sum(map(sum, times)) < 2):
            begun = time.perf_counter()
            with resolution.autocast(): loss = gpt.loss(tokens, tokens)
            loss.backward()
            loss.item()
            between = time.perf_counter()
            torch.nn.utils.clip_grad_norm_(gpt.parameters(), training.grad_clip or math.inf)
            optimizer.step()
            optimizer.zero_grad()
            if device.type == "cuda": torch.cuda.synchronize()
            times.append((between - begun, time.perf_counter() - between))
    product, step = (statistics.median(part) for part in zip(*times[1:]))
    return micro_batches * rows * length / (micro_batches * product + step) * flops_per_token(model, words) / whole
