"""The images on which a run is worst, beside what another run makes of them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.errors import UserError
from common.files import atomic_path
from common.pictures import draw_outlines, enlarge, stretch, tile
from common.runs import load_config, read_results
from common.text import printable
from tasks.build import build_datamodule, build_module
from tasks.checkpoints import load_checkpoint, network_from_checkpoint
from tasks.configuration import modernise
from tasks.inference import accelerate

__all__ = ["draw_cases", "predict_cases"]

SIDE = 192


def draw_cases(folders: Sequence[Path], ids: Sequence[str], output: Path) -> None:
    """Draw a row for each image: the photograph, and on it truth and prediction of each run.

    The truth is green, the prediction blue.

    Args:
        folders: run folders; the photographs and their truth are those of the first.
        ids: of test images that all runs have.
        output: PNG.

    Raises:
        UserError: a run's checkpoint, data or an image is missing.
    """
    predicted = [predict_cases(folder, ids) for folder in folders]
    rows = []
    for cases in zip(*predicted, strict=True):
        photo = enlarge(stretch(cases[0]["image"]), SIDE)
        row = [photo]
        for case in cases:
            truth, mask = (enlarge(case[key].astype(np.uint8), SIDE) for key in ("mask", "found"))
            row.append(draw_outlines(photo, truth, mask))
        rows.append(row)
    with atomic_path(output) as path:
        Image.fromarray(tile(rows)).save(path, format="PNG")


@torch.no_grad()
def predict_cases(folder: Path, ids: Sequence[str]) -> list[dict[str, np.ndarray]]:
    """Predict test images of a run again, as its test did.

    Args:
        folder: of a run that was tested.
        ids: of the images.

    Returns:
        For each `image` `(3, S, S)`, `mask` (truth) and `found`, both bool `(S, S)`.

    Raises:
        UserError: the run's config, checkpoint or data is missing, or it has no such image.
    """
    results = read_results(folder) or {}
    path = Path(results.get("checkpoint") or folder / "checkpoints" / "best.ckpt")
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} has no config.yaml; give folders of runs.")
    config = load_config(folder)
    modernise(config)
    checkpoint = load_checkpoint(path)
    network = network_from_checkpoint(checkpoint, path, "ema", "checkpoint")
    module = build_module(config, network, teacher=None).eval()
    accelerate(module, config["inference"])
    datamodule = build_datamodule(config["datamodule"])
    datamodule.prepare_data()
    datamodule.setup()
    images = datamodule.datasets["test"]
    # Tables have them so.
    places = {printable(name): place for place, name in enumerate(images.ids)}
    cases = []
    for name in ids:
        if name not in places:
            raise UserError(f"{folder} has no test image {name}; test the run again.")
        item = images.plain(places[name])
        batch = {"image": item["image"][None], "id": [images.ids[places[name]]]}
        probability = module.predict(batch)["probability"][0, 0]
        cases.append(
            {
                "image": item["image"].numpy(),
                "mask": (item["mask"][0] > 0.5).numpy(),
                "found": (probability > 0.5).numpy(),
            }
        )
    return cases
