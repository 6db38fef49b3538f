"""Runs of a few seconds, and what of them must not depend on how they were started."""

import csv
from pathlib import Path

TINY = (
    "experiment=demo_teacher",
    "logger=csv",
    "trainer.accelerator=cpu",
    "trainer.log_every_n_steps=1",
    "trainer.check_val_every_n_epoch=1",
    "trainer.enable_progress_bar=false",
    "datamodule.batch_size=4",
    "datamodule.image_size=16",
    "network.kwargs.dim_x_mults=[1,1]",
    "network.kwargs.dim_g_mults=[1,1]",
    "callbacks.ema.update_after_step=3",
)


def timeless(path: Path) -> list[tuple[str, ...]]:
    """Return the columns of a table of metrics without those that no two runs have alike."""
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    columns = zip(*rows, strict=True)
    kept = [c for c in columns if c[0] != "train/images_per_second" and c[0][:7] != "system/"]
    assert len(rows[0]) - len(kept) in (1, 2), "a run of one step has no speed"
    return kept
