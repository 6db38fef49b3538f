"""A lesion keeps its place on every way between a photograph's file and a mask, score or map."""

from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from common.geometry import fitted
from datamodules import Folder
from datamodules.photographs import Photographs
from disc_set import write_discs
from lightning_modules import Segmentation
from lightning_modules.metrics import SegmentationScores
from lightning_modules.teacher import FrozenTeacher
from tasks.export import Portable, write_verified
from tasks.onnx_module import OnnxModule
from tasks.prediction_writer import PredictionWriter
from tasks.teacher_maps import attach_teacher

SIDE = 64
# Height and width; down to less than the network's side, and three times as wide as high.
SHAPES = [(576, 767), (640, 640), (501, 333), (120, 360), (37, 51)]


class Darkness(nn.Module):
    """A network without error: its probability of lesion is how dark a pixel is.

    Discs have a brightness of 0.13 and skin of 0.73, after stretching to [0, 1].
    """

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, image: Tensor) -> Tensor:
        dark = (0.73 - image.mean(1, keepdim=True)) / 0.6
        return self.scale * (0.5 + 1.3 * (dark - 0.5)).clamp(1e-4, 1 - 1e-4).logit()


def make_module(**metrics):
    losses, optimizer = {"bce": {"weight": 1}}, {"name": "Adam", "lr": 1e-3}
    return Segmentation(Darkness(), losses, optimizer, metrics=metrics).eval()


@pytest.fixture(params=SHAPES, ids=lambda shape: f"{shape[1]}x{shape[0]}")
def discs(request, tmp_path):
    """A folder of photographs of discs and masks, and their shape."""
    height, width = request.param
    write_discs(tmp_path / "discs", count=4, size=(width, height))
    return tmp_path / "discs", request.param


@pytest.fixture(params=[False, True], ids=["squashed", "letterbox"])
def letterbox(request):
    return request.param


def centroid(values):
    """Centre of gravity of a map `(H, W)`, y and x, in px from the centre of its first pixel."""
    places = np.indices(values.shape).reshape(2, -1)
    values = np.asarray(values, dtype=np.float64)
    return places @ values.ravel() / values.sum()


def in_square(mask, letterbox):
    """Where the centroid of a mask lies in the network's square."""
    box = fitted(mask.shape, SIDE, letterbox)
    scale = np.array([box.height, box.width]) / mask.shape
    return np.array([box.top, box.left]) + (centroid(mask) + 0.5) * scale - 0.5


def true_masks(root):
    return {p.stem: np.asarray(Image.open(p)) > 0 for p in sorted((root / "masks").iterdir())}


def load(root, tmp_path, letterbox, **settings):
    datamodule = Folder(
        tmp_path / "cache", SIDE, 4, root=root, letterbox=letterbox, split="all", **settings
    )
    datamodule.prepare_data()
    datamodule.setup()
    return datamodule


def within(values, box):
    """Set what lies outside an image in its square to zero."""
    inside = np.zeros(values.shape, bool)
    inside[box.rows, box.columns] = True
    return np.where(inside, values, 0)


def test_photograph_mask_and_edge_of_a_batch_lie_on_each_other(discs, letterbox, tmp_path):
    root, shape = discs
    box = fitted(shape, SIDE, letterbox)
    masks = true_masks(root)
    datamodule = load(root, tmp_path, letterbox, mask_resize="soft")
    batch = next(iter(datamodule.test_dataloader()))
    assert sorted(batch["id"]) == sorted(masks)
    probability = make_module().predict(batch)["probability"]
    for index, key in enumerate(batch["id"]):
        expected = in_square(masks[key], letterbox)
        assert centroid(batch["mask"][index, 0]) == pytest.approx(expected, abs=0.05)
        seen = within(probability[index, 0].numpy(), box)
        assert centroid(seen) == pytest.approx(expected, abs=0.1), "the noise moves it"
        distance = batch["edge_distance"][index, 0].numpy()
        hard = batch["mask"][index, 0].numpy() > 0.5
        assert distance[hard].min() == distance[~hard].min() == 0.5, "between lesion and skin"


def test_predicted_masks_lie_on_their_photographs(discs, letterbox, tmp_path):
    root, shape = discs
    files = sorted((root / "images").iterdir())
    names = [path.stem for path in files]
    writer = PredictionWriter(
        tmp_path / "out", "png", 0.5, letterbox, 200.0, "settings", names, progress=False
    )
    photographs = Photographs(files, names, 2, image_size=SIDE, letterbox=letterbox)
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=[writer],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.predict(make_module(), datamodule=photographs, return_predictions=False)
    box = fitted(shape, SIDE, letterbox)
    scale = np.array([box.height, box.width]) / shape
    moved = []
    for key, truth in true_masks(root).items():
        found = np.asarray(Image.open(tmp_path / "out" / f"{key}_mask.png")) > 0
        assert found.shape == shape
        moved.append((centroid(found) - centroid(truth)) * scale)
        assert 2 * (found & truth).sum() / (found.sum() + truth.sum()) > 0.97
    assert np.abs(np.mean(moved, axis=0)).max() < 0.05
    assert np.abs(moved).max() < 0.15


def test_native_and_model_scores_of_a_network_without_error_agree(discs, letterbox, tmp_path):
    root, _ = discs
    datamodule = load(root, tmp_path, letterbox)
    datamodule.test_at_native_size()
    batch = next(iter(datamodule.test_dataloader()))
    scores = SegmentationScores(resolution="both", letterbox=letterbox)
    scores.update(make_module().predict(batch), batch)
    found = scores.compute()
    assert found["native_dice"] > 0.975
    assert found["dice"] > 0.97
    assert found["native_boundary_f1"] > 0.97


def test_maps_of_a_teacher_lie_on_the_masks_of_its_student(discs, letterbox, tmp_path):
    root, shape = discs
    datamodule = load(root, tmp_path, letterbox, mask_resize="soft")
    datamodule.datasets["train"] = datamodule.datasets["val"] = datamodule.datasets["test"]
    checkpoint = tmp_path / "teacher.ckpt"
    checkpoint.write_bytes(b"its digest names the maps")
    config = {
        "teacher": {"checkpoint": str(checkpoint), "weights": "ema", "sampler": None},
        "datamodule": {"batch_size": 2},
    }
    teacher = FrozenTeacher(make_module(), turns=True)
    attach_teacher(teacher, datamodule, config, torch.device("cpu"))
    box = fitted(shape, SIDE, letterbox)
    for index in range(4):
        item = datamodule.datasets["test"][0, index]
        taught = within(item["teacher_probability"][0].numpy(), box)
        expected = centroid(item["mask"][0])
        assert centroid(taught) == pytest.approx(expected, abs=0.1)


def test_an_exported_network_sees_what_pytorch_does(tmp_path, capsys):
    module = make_module()
    metadata = {
        "image_size": SIDE,
        "draws": 0,
        "seed": 0,
        "sampler": {},
        "normalization": "minmax",
    }
    path: Path = tmp_path / "model.onnx"
    write_verified(Portable(module, "minmax").eval(), metadata, path, 1e-5)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    dark = np.hypot(rows - 20.25, columns - 40.75) < 9
    image = torch.from_numpy(np.where(dark, 60, 200)).float().expand(1, 3, SIDE, SIDE)
    batch = {"image": image.contiguous(), "id": ["disc"]}
    exported = OnnxModule(path).predict(batch)["probability"][0, 0].numpy()
    assert centroid(exported > 0.5) == pytest.approx(centroid(dark), abs=1e-6)
