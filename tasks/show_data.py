"""A picture of what the network will see."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from common.errors import check_number
from common.files import atomic_path
from common.pictures import TRUTH_COLOUR, draw_contour, enlarge, stretch, tile
from common.text import say
from datamodules.splits import spread
from tasks.build import build_datamodule

__all__ = ["run"]

SMALLEST_SIDE = 128


def run(config: dict[str, Any]) -> None:
    """Write `data.png`: a row for each of some training images, as they are and augmented.

    The first picture of a row is the image before augmentation, the last the distance to the mask's
    edge of the picture before it, bright where it is far; those between are the image in as many
    epochs. Outlines are those of the masks. Where there are classes instead of masks, the columns
    are epochs, or with `datamodule.views` the rotated views of the first.

    Raises:
        UserError: bad data or arguments.
    """
    for key in ("num_images", "num_epochs"):
        check_number(key, config[key], 1, whole=True)
    datamodule = build_datamodule(config["datamodule"])
    datamodule.prepare_data()
    datamodule.setup()
    dataset = datamodule.datasets["train"]
    rows = []
    for index in spread(len(dataset), config["num_images"]):
        items = [dataset[epoch, index] for epoch in range(config["num_epochs"])]
        rows.append(_row(items, dataset.plain(index)))
    path = Path(config["paths"]["run"]) / "data.png"
    with atomic_path(path) as temporary:
        Image.fromarray(tile(rows)).save(temporary, format="PNG")
    say(f"{len(rows)} training images of {datamodule.name}: {path}")


def _row(items: list[dict[str, Any]], plain: dict[str, Any]) -> list[np.ndarray]:
    if "views" in plain:
        return [_picture(plain), *(_picture({"image": view}) for view in items[0]["views"])]
    pictures = [_picture(item) for item in (plain, *items)]
    if "edge_distance" in plain:
        distance = items[-1]["edge_distance"][0].numpy()
        grey = (distance / max(float(distance.max()), 1e-6) * 255).astype(np.uint8)
        pictures.append(enlarge(cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB), SMALLEST_SIDE))
    return pictures


def _picture(item: dict[str, Any]) -> np.ndarray:
    photo = enlarge(stretch(item["image"].numpy()), SMALLEST_SIDE)
    if "mask" not in item:
        return photo
    mask = enlarge((item["mask"][0] > 0.5).numpy().astype(np.uint8), SMALLEST_SIDE)
    return draw_contour(photo, mask, TRUTH_COLOUR)
