"""Seconds and memory of one training step at the published sizes, as the Trainer runs it.

`python benchmarks/train_step.py` measures the teachers and the distilled students of ISIC 2018, and
those of ISIC 2019 that diagnose, at batch 4: forward, loss, backward, clipping, optimizer and
moving average, median and minimum of 5 after one step to warm up. With `--steps 200` it shows in
four quarters whether time and memory stay what they are. `efkd efkd_faster efkd_faster_bf16` shows
what the switches of the group `training` are worth and whether the processor gains from bfloat16.
The data is made up and the weights are fresh: neither changes the time.
"""

import sys
from argparse import Namespace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import lightning as L
import torch
from torch.utils.data import DataLoader

from benchmarks.measuring import (
    experiment_config,
    memory,
    now,
    parse_arguments,
    run_cases,
    summary,
)
from datamodules import edge_distance
from lightning_modules.teacher import FrozenTeacher
from tasks.acceleration import accelerate_teacher, accelerate_training
from tasks.build import build_module, build_network, complete
from tasks.training import build_trainer

EFKD = ("efkd_isic2018", "teacher_isic2018")
FASTER = ("training.channels_last=true", "lightning_module.optimizer.fused=true")
# Each with the experiment of its teacher, and what is changed.
EXPERIMENTS = {
    "teacher": ("teacher_isic2018", None),
    "efkd": EFKD,
    "efkd_faster": (*EFKD, *FASTER),
    "efkd_faster_bf16": (*EFKD, *FASTER, "trainer.precision=bf16-mixed"),
    "deeplab_teacher": ("deeplab_teacher_isic2018", None),
    "deeplab_kd": ("deeplab_kd_isic2018", "deeplab_aux_isic2018"),
    "unet_kd": ("unet_kd_isic2016", "unet_teacher_isic2016"),
    "d_kd": ("d_kd_isic2019", "classifier_teacher_isic2019"),
    "ssd_kd": ("ssd_kd_isic2019", "ssd_head_isic2019"),
}


class Batches(torch.utils.data.Dataset):
    """As many made-up batches as one run of the benchmark takes."""

    def __init__(self, batch_size: int, size: int, steps: int, views: bool) -> None:
        self.steps = steps
        y, x = torch.meshgrid(*[torch.linspace(-1, 1, size)] * 2, indexing="ij")
        mask = (x.square() + 2 * y.square() < 0.5).float()[None]
        self.batch = {
            "image": torch.rand(batch_size, 3, size, size),
            "mask": mask.repeat(batch_size, 1, 1, 1),
            "edge_distance": edge_distance(mask).repeat(batch_size, 1, 1, 1),
            "label": torch.arange(batch_size) % 2,
            "id": [str(i) for i in range(batch_size)],
        }
        if views:
            image = self.batch["image"]
            turned = [image.rot90(turn, (2, 3)) for turn in range(4)]
            self.batch["views"] = torch.stack(turned, dim=1)

    def __len__(self) -> int:
        return 1 + self.steps

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.batch


class Stopwatch(L.Callback):
    """Notes the time and the memory after each step."""

    def __init__(self, accelerator: str) -> None:
        self.accelerator = accelerator
        self.times: list[float] = []
        self.memory: list[float] = []

    def on_train_batch_end(self, *arguments: Any) -> None:
        self.times.append(now(self.accelerator))
        self.memory.append(memory(self.accelerator))


def measure(case: str, batch_size: int, arguments: Namespace) -> dict[str, Any]:
    """Train for a few steps; return what `summary` does."""
    experiment, teacher_experiment, *changes = EXPERIMENTS[case]
    config = experiment_config(
        f"experiment={experiment}",
        f"datamodule.image_size={arguments.image_size}",
        f"trainer.accelerator={arguments.accelerator}",
        f"trainer.precision={arguments.precision}",
        "trainer.enable_progress_bar=false",
        "trainer.max_epochs=1",
        *changes,
    )
    complete(config)
    config["callbacks"] = {"ema": config["callbacks"].get("ema")}
    config["logger"] = None
    config["trainer"] |= {"limit_val_batches": 0, "enable_checkpointing": False}
    teacher = None
    if teacher_experiment:
        theirs = experiment_config(f"experiment={teacher_experiment}")
        complete(theirs)
        teacher = FrozenTeacher(build_module(theirs, build_network(theirs["network"])))
    module = build_module(config, build_network(config["network"]), teacher)
    accelerate_training(module, config["training"])
    if teacher:
        accelerate_teacher(teacher, config["training"])
    trainer = build_trainer(config)
    stopwatch = Stopwatch(arguments.accelerator)
    trainer.callbacks.append(stopwatch)
    views = config["datamodule"].get("views", False)
    batches = Batches(batch_size, arguments.image_size, arguments.steps, views)
    trainer.fit(module, DataLoader(batches, batch_size=None))
    seconds = [b - a for a, b in pairwise(stopwatch.times)]
    ends = [len(seconds) * quarter // 4 for quarter in range(5)]
    return {
        **summary(seconds, batch_size, arguments.accelerator),
        "quarters_median_s": [round(median(seconds[a:b] or [0.0]), 4) for a, b in pairwise(ends)],
        "quarters_memory_gb": [round(stopwatch.memory[end], 3) for end in ends],
    }


if __name__ == "__main__":
    options = parse_arguments(__doc__.splitlines()[0], list(EXPERIMENTS))
    options.batch_size = options.batch_size or [4]
    run_cases(options, measure)
