"""Several processes that live several runs, one after the other: `python world.py SPACE LIVES.json`, a rank each."""
import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from socket import socket

HERE = Path(__file__).resolve()


def live_together(root: Path, world: int, lives: list[dict], device: str = "cpu") -> dict[str, dict]:
    "Lives each of `lives` (name, changes, stop, epochs) in `world` processes, on gloo or NCCL; their outcomes, by name"
    with socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    spec = root / f"lives-{world}-{os.urandom(2).hex()}.json"
    spec.write_text(json.dumps(lives))
    env = {**os.environ, "LLM_TRAINER_HOME": str(root), "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world),
           "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
           "WORLD_DEVICE": device,
           "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])}
    ranks = [subprocess.Popen([sys.executable, str(HERE), str(spec)], env={**env, "RANK": str(r), "LOCAL_RANK": str(r)},
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for r in range(world)]
    said = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert not any(rank.returncode for rank in ranks), "\n".join(text[-3000:] for text in said)
    return json.loads(spec.with_suffix(".out").read_text())


def after(steps: int | None):
    "Asks for a stop once so many steps are done"
    asked = iter(range(10**9))
    return set if steps is None else lambda: {"stop"} if next(asked) >= steps else set()


@contextmanager
def hindered(seconds: float):
    "Inside it each forward pass of this process takes that much longer"
    from llm_trainer.model.transformer import GPT
    loss = GPT.loss
    def slow(*args, **how):
        time.sleep(seconds)
        return loss(*args, **how)
    GPT.loss = slow if seconds else loss
    try: yield
    finally: GPT.loss = loss


@contextmanager
def roomless(memory: int | None):
    "Inside it a device has that many bytes"
    from llm_trainer.training import recipe
    known = recipe.total_memory
    if memory is not None: recipe.total_memory = lambda device: memory
    try: yield
    finally: recipe.total_memory = known


def live(group, space, lives: list[dict]) -> dict[str, list[dict]]:
    "Lives each of `lives`; what came of them at rank 0, by name"
    from llm_trainer.config import load_config
    from llm_trainer.training.checkpoint import Checkpoints, weights_hash
    from llm_trainer.training.recipe import train
    found = {}
    for life in lives:
        name = life["name"]
        known = space.root / f"{name}.meta.json"
        meta = group.share(json.loads(known.read_text()) if group.first and known.exists() else None)
        config = load_config("tiny").replace(threads=1, **life.get("changes", {}))
        attempt = dict(target_epochs=life.get("epochs", 1), target_steps=config.training.max_steps or None)
        with hindered(life.get("slow", {}).get(str(group.rank), 0)), roomless(life.get("memory")):
            said = []
            events = list(train(name, config, attempt, space, meta, after(life.get("stop")), said.append, group))
        told = {kind: [e for e in events if e.kind == kind] for kind in ("step", "evaluated", "sampled")}
        mine = dict(steps=[dict(loss=e.loss.hex(), lr=e.lr, tokens=e.tokens) for e in told["step"]],
                    status=events[-1].status, kinds=[e.kind for e in events if e.kind not in ("note", "sampled")],
                    val=[e.loss for e in told["evaluated"]],
                    seconds=[seconds for e in told["step"][-1:] for seconds in e.rank_seconds])
        others = group.gather(mine)
        if not group.first: continue
        known.write_text(json.dumps(next(e.meta for e in events if e.kind == "prepared")))
        folder = Checkpoints(space.checkpoints / name, name).select("latest")
        found.setdefault(name, []).append(mine | dict(weights=weights_hash(folder), folder=str(folder), others=others,
            samples=[e.text for e in told["sampled"]], notes=[e.message for e in said if e.kind == "note"]))
    return found


def main(spec: Path) -> None:
    from llm_trainer import workspace
    from llm_trainer.training.distributed import join
    device = os.environ["WORLD_DEVICE"]
    if device == "cuda":
        import torch
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    group = join(device)
    found = live(group, workspace.find(), json.loads(spec.read_text()))
    if group.first: spec.with_suffix(".out").write_text(json.dumps(found))
    group.leave()


if __name__ == "__main__": main(Path(sys.argv[1]))
