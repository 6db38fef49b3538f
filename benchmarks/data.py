"""Images a second that the loader gives to training, and its memory.

`python benchmarks/data.py` measures, on made-up images of 128 px in batches of 16: the bare cache
(normalising and edge distance only), the `reference_student` policy, and the same with the
library's own piecewise affine, each in the training process (`-0`) and with two loader processes
(`-2`); median and best of 5 epochs after one to warm up. `own_memory_gb` is what these processes
have for themselves: pages of the cache are the system's, shared and given back when needed.
"""

import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measuring import (
    REPEATS,
    experiment_config,
    parse_arguments,
    run_cases,
    summary,
)
from tasks.build import build_datamodule

CASES = tuple(f"{what}-{workers}" for what in ("bare", "policy", "library") for workers in (0, 2))


def measure(case: str, batch_size: int, arguments: Namespace) -> dict[str, Any]:
    """Go through the training images a few times; return what `summary` does, and the memory."""
    what, workers = case.split("-")
    with tempfile.TemporaryDirectory() as folder:
        config = experiment_config(
            "datamodule=synthetic",
            f"datamodule.num_samples={arguments.num_images}",
            f"datamodule.image_size={arguments.image_size}",
            f"datamodule.batch_size={batch_size}",
            f"datamodule.num_workers={workers}",
            f"augmentation={'none' if what == 'bare' else 'reference_student'}",
            f"paths.cache={folder}",
        )["datamodule"]
        if what == "library":
            for transform in config["augmentation"]["transforms"]:
                if transform["name"] == "FastPiecewiseAffine":
                    transform["name"] = "PiecewiseAffine"
                    del transform["pull"]
        datamodule = build_datamodule(config)
        datamodule.prepare_data()
        datamodule.setup()
        loader = datamodule.train_dataloader()
        seconds, images, memory = [], 0, 0.0
        for epoch in range(1 + REPEATS):
            loader.sampler.set_epoch(epoch)
            started = time.perf_counter()
            images = sum(len(batch["id"]) for batch in loader)
            seconds.append(time.perf_counter() - started)
            memory = max(memory, own_memory(loader))
        return {**summary(seconds[1:], images, "cpu"), "own_memory_gb": round(memory, 3)}


def own_memory(loader: Any) -> float:
    """Return the memory in GB that this process and its loader processes have for themselves.

    Linux only: 0 where the system does not say.
    """
    workers = getattr(loader._iterator, "_workers", [])
    files = [Path(f"/proc/{process}/status") for process in ["self", *(w.pid for w in workers)]]
    lines = [line for file in files if file.is_file() for line in file.read_text().splitlines()]
    return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024 / 1e9


if __name__ == "__main__":
    options = parse_arguments(__doc__.splitlines()[0], CASES)
    options.batch_size = options.batch_size or [16]
    run_cases(options, measure)
