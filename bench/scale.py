"""How training scales over the devices of this machine, beside what the model of a step's time foretells.

    python bench/scale.py [--config gpt2-124m] [--worlds 1,2] [--strategy ddp,fsdp] [--sequences 512] [--micro 32]
                          [--steps 50] [--warmup 5] [--shape n_layer=36,n_embd=2560,...] [--device cpu] [--predict]

Every world takes the same steps on the same global batch, each in processes of its own that torchrun starts. `waited`
is the share of a step that goes when gradients are not sent at all: what the wires cost that arithmetic does not hide.
Tokens are random. `--predict` needs no device: it prints what 1 to 1,024 GPUs would do. Prints JSON lines.
"""
import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def settings(args):
    "The config that all worlds train"
    from llm_trainer.config import load_config
    parts = (part.partition("=") for part in args.shape.split(",") if part)
    shape = {name: value if name == "arch" else int(value) for name, _, value in parts}
    return load_config(args.config).replace(
        log_every=0, eval_every=0, save_every=0, save_minutes=0, sample_every=0, schedule="constant", warmup_steps=0,
        device=args.device,
        batch_size=args.micro, grad_accum_steps=args.sequences // args.micro, strategy="auto", **shape)


def measure(args) -> None:
    "One world: this process is one of its ranks; rank 0 prints what was measured"
    import numpy as np
    import torch

    from llm_trainer.config import deal
    from llm_trainer.data.batches import Stream, Windows
    from llm_trainer.device import resolve, seed_everything
    from llm_trainer.model.cost import flops_per_token, parameters_count
    from llm_trainer.model.transformer import GPT
    from llm_trainer.training.distributed import join, lay_out, share_out
    from llm_trainer.training.optimizer import LRSchedule, build_optimizer
    from llm_trainer.training.trainer import Trainer
    config = settings(args)
    t, local = config.training, int(os.environ.get("LOCAL_RANK", 0))
    if torch.cuda.is_available() and args.device != "cpu": torch.cuda.set_device(local)
    resolution = resolve(t)
    device = resolution.apply()
    if device.type == "cpu": torch.set_num_threads(1)
    group = join(device.type)
    vocab = -(-config.data.vocab_size // 64) * 64
    seed_everything(t.seed)
    with device: model = GPT(config.model, vocab)  # random anyway, and billions of numbers take a CPU a minute
    micro, rounds = deal(t.batch_size, t.grad_accum_steps, group.world)
    spread = lay_out(model, group, "none" if group.alone else args.strategy, device, resolution.compile,
                     resolution.dtype, not args.no_hold)
    tokens = np.random.default_rng(0).integers(0, vocab, 64 * config.model.seq_len
                                               * max(8, group.world)).astype(np.uint16)
    stream = Stream(Windows(tokens, config.model.seq_len), micro, t.seed, rank=group.rank, world=group.world,
                    pin_memory=device.type == "cuda")
    optimizer = build_optimizer(model, t, resolution.muon_dtype)
    share_out(optimizer, spread)
    events = iter(Trainer(model, optimizer, LRSchedule.from_config(t, 1), stream, t, resolution, target_position=2**60,
                          target_step=2**60, spread=spread))

    def seconds(steps: int) -> float:
        if device.type == "cuda": torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(steps): next(event for event in events if event.kind == "step")
        if device.type == "cuda": torch.cuda.synchronize()
        return max(group.each(time.perf_counter() - began)) / steps

    seconds(args.warmup)
    step = seconds(args.steps)
    without, wire = step, 0.0
    if spread.strategy == "ddp":  # shares must be put together in any case
        send = spread.before
        spread.before = lambda k, n: send(0, n + 1)  # always one more to come: nothing is sent
        few = max(2, args.steps // 5)
        seconds(1)
        without = seconds(few)
        numbers = torch.zeros(parameters_count(config.model, vocab), device=device)
        for _ in range(2):
            if device.type == "cuda": torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(5): torch.distributed.all_reduce(numbers)
            if device.type == "cuda": torch.cuda.synchronize()
            wire = (time.perf_counter() - began) / 5
    peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0
    per_second = args.sequences * config.model.seq_len / step
    if group.first: print(json.dumps(dict(
        world=group.world, strategy=spread.strategy, device=resolution.device_name, torch=torch.__version__,
        compile=resolution.compile,
        parameters=parameters_count(config.model, vocab), micro=micro, rounds=rounds, steps=args.steps,
        step_ms=round(step * 1e3, 2),
        tokens_per_second=round(per_second), waited=round(1 - without / step, 4), all_reduce_ms=round(wire * 1e3, 2),
        flops_per_device=round(per_second * flops_per_token(config.model, vocab) / group.world),
        memory_gb=round(peak, 2))), flush=True)
    group.leave()


def predict(config, sequences: int, worlds: list[int], strategy: str, micro: int, flops: float,
            device_name: str, hold: bool = True) -> list[dict]:
    "What the model of a step's time says"
    from llm_trainer.training.scaling import step_time, wires_of
    vocab, rows = -(-config.data.vocab_size // 64) * 64, []
    one = step_time(config.model, vocab, sequences, 1, flops, wires_of(device_name), micro)
    for world in worlds:
        n = max(sequences, world)  # a device has one sequence at least
        found = step_time(config.model, vocab, n, world, flops, wires_of(device_name), micro, strategy,
                          config.training.optimizer, hold or strategy != "fsdp")
        rate = n * config.model.seq_len / found.total
        rows.append(dict(world=world, strategy=strategy, sequences=n, step_ms=round(found.total * 1e3, 2),
                         sent_ms=round(found.sent * 1e3, 2), waited=round(found.waited / found.total, 4),
                         tokens_per_second=round(rate),
                         share_of_linear=round(rate * one.total / (sequences * config.model.seq_len) / world, 4)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="gpt2-124m", help="profile or TOML file")
    parser.add_argument("--worlds", default="1,2")
    parser.add_argument("--strategy", default="ddp,fsdp")
    parser.add_argument("--sequences", type=int, default=512, help="of the global batch")
    parser.add_argument("--micro", type=int, default=32, help="sequences a device holds at once")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--shape", default="", help="model settings: n_layer=4,n_embd=256")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--flops", type=float, default=430e12, help="of one device in training, for --predict")
    parser.add_argument("--device-name", default="H100", help="whose wires --predict assumes")
    parser.add_argument("--no-hold", action="store_true", help="fsdp: blocks are whole only while they compute")
    parser.add_argument("--predict", action="store_true")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank: return measure(args)
    if args.predict:
        for strategy in args.strategy.split(","):
            for row in predict(settings(args), args.sequences, [1, 2, 8, 64, 1024], strategy, args.micro, args.flops,
                               args.device_name, not args.no_hold):
                print(json.dumps(row))
        return
    one = None
    for world in map(int, args.worlds.split(",")):
        for strategy in args.strategy.split(",") if world > 1 else ["none"]:
            done = subprocess.run(
                [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world),
                 __file__, "--rank",
                 "--strategy", strategy, *_without(sys.argv[1:], "--worlds", "--strategy")], stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])})
            if done.returncode:
                print(json.dumps(dict(world=world, strategy=strategy, failed=done.returncode)), flush=True)
                continue
            found = json.loads(done.stdout.strip().splitlines()[-1])
            one = one or found
            gain = found["tokens_per_second"] / one["tokens_per_second"]
            found["share_of_linear"] = round(gain / (world / one["world"]), 4)
            if world > 1 and one["world"] == 1:
                (foretold,) = predict(settings(args), args.sequences, [world], strategy, args.micro,
                                      one["flops_per_device"], found["device"], not args.no_hold)
                found["foretold"] = {name: foretold[name] for name in ("step_ms", "waited", "share_of_linear")}
            print(json.dumps(found), flush=True)


def _without(words: list[str], *flags: str) -> list[str]:
    "The arguments but those flags, with their values"
    kept, skip = [], False
    for word in words:
        if skip: skip = False
        elif word in flags: skip = True
        elif not word.startswith(tuple(f"{flag}=" for flag in flags)): kept.append(word)
    return kept


if __name__ == "__main__": main()
