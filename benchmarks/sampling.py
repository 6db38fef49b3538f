"""Seconds and memory of one network call without graph; a mask takes calls_per_mask of them.

`python benchmarks/sampling.py` measures the published student and teacher of ISIC 2018 at batch 1
and 4, median and minimum of 5 after one call to warm up. Weights are fresh: they do not change the
time.
"""

import sys
from argparse import Namespace
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.measuring import (
    REPEATS,
    experiment_config,
    now,
    parse_arguments,
    run_cases,
    summary,
)
from tasks.build import build_network

NETWORKS = {"student": "lite_dermosegdiff", "teacher": "dermosegdiff"}


@torch.inference_mode()
def measure(case: str, batch_size: int, arguments: Namespace) -> dict[str, Any]:
    """Call a network a few times; return what `summary` does."""
    accelerator, size = arguments.accelerator, arguments.image_size
    device = torch.device("cuda" if accelerator == "gpu" else "cpu")
    config = experiment_config(f"network={NETWORKS[case]}", f"datamodule.image_size={size}")
    network = build_network(config["network"]).eval().to(device)
    inputs = (
        torch.randn(batch_size, 1, size, size, device=device),
        torch.rand(batch_size, 3, size, size, device=device),
        torch.full((batch_size,), 100, device=device),
    )
    half = arguments.precision.startswith("bf16")
    times = []
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
        for _ in range(2 + REPEATS):
            times.append(now(accelerator))
            network(*inputs)
    seconds = [b - a for a, b in pairwise(times[1:])]
    return summary(seconds, batch_size, accelerator)


if __name__ == "__main__":
    options = parse_arguments(__doc__.splitlines()[0], list(NETWORKS))
    options.batch_size = options.batch_size or [1, 4]
    run_cases(options, measure)
