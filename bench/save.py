"""What a verified save costs: `Checkpoints.save` beside writing the same bytes to plain files with fsync, in one run.

    python bench/save.py [--megabytes 512] [--repeats 5]

Prints one JSON object; `ratio` is the median of the pairwise ratios.
"""
import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch

from llm_trainer.model.safetensors import write_tensors
from llm_trainer.training.checkpoint import Checkpoints, verify


def plain_save(folder: Path, content: dict[str, bytes]) -> float:
    "Seconds to write the same files, sync each and their folder"
    started = time.perf_counter()
    folder.mkdir()
    for name, data in content.items():
        with open(folder / name, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    fd = os.open(folder, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
    return time.perf_counter() - started


def measure(megabytes: int = 512, repeats: int = 5, where: Path | None = None) -> dict:
    "A third of the bytes as weights, two thirds as optimizer state, saved both ways in turn"
    root = Path(tempfile.mkdtemp(dir=where or Path.cwd(), prefix=".bench-save-"))
    rows = megabytes * 1_000_000 // (3 * 4 * 1024)
    def tensors(n): return {f"layer.{i:02d}": torch.randn(rows // 12, 1024) for i in range(12 * n)}
    weights, state = tensors(1), tensors(2)

    def write(folder: Path) -> dict[str, str]:
        (folder / "state").mkdir()
        return {"model.safetensors": write_tensors(folder / "model.safetensors", weights, {"format": "pt"}),
                "state/optimizer.safetensors": write_tensors(folder / "state" / "optimizer.safetensors", state)}
    try:
        store, pairs = Checkpoints(root / "bench-run", "bench-run", keep=0), []
        content = {p.name: p.read_bytes() for p in store.save(0, write).path.rglob("*") if p.is_file()}
        for step in range(1, repeats + 1):
            plain = plain_save(root / "plain", content)
            shutil.rmtree(root / "plain")
            saved = store.save(step, write).seconds
            started = time.perf_counter()
            assert not verify(store.path(step))
            pairs.append((saved, plain, time.perf_counter() - started))
            shutil.rmtree(store.path(step - 1))
        save, plain, read = (statistics.median(column) for column in zip(*pairs))
        size = sum(map(len, content.values()))
        return {"megabytes": round(size / 1e6), "repeats": repeats,
                "ratio": round(statistics.median(s / p for s, p, _ in pairs), 3), "save_seconds": round(save, 3),
                "plain_seconds": round(plain, 3), "verify_gb_per_second": round(size / read / 1e9, 2)}
    finally: shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    print(json.dumps(measure(**vars(parser.parse_args())), indent=1))
