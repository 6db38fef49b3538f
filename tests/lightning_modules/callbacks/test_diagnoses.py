"""The table and the figures of a classifier's test."""

import csv

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from PIL import Image
from torch.utils.data import DataLoader

from lightning_modules.callbacks import Diagnoses, Pictures
from lightning_modules.callbacks import TestImages as TableOfTestImages
from lightning_modules.metrics import ClassificationScores

CLASSES = ("AK", "MEL", "NV")
FIGURES = ("confusion_matrix", "roc", "reliability")


class Classifier(L.LightningModule):
    """Says of an image what its first pixels hold."""

    def __init__(self):
        super().__init__()
        self.classes = CLASSES
        self.scores = ClassificationScores(CLASSES)

    def test_step(self, batch, batch_idx):
        probability = batch["image"][:, 0, 0, :3].softmax(1)
        return {
            "probability": probability,
            "per_image": self.scores.update(probability, batch["label"]),
        }


class Segmenter(L.LightningModule):
    def test_step(self, batch, batch_idx):
        return {"probability": batch["image"][:, :1], "per_image": {"dice": torch.ones(2)}}


class SilentWandb(WandbLogger):
    """Keeps what it is to log."""

    save_dir = None

    def __init__(self):
        self.logged = {}

    def log_image(self, key, images, step=None, **kwargs):
        self.logged[key] = images

    def finalize(self, status):
        pass

    def log_metrics(self, metrics, step=None):
        pass

    def save(self):
        pass


def make_data(count=10):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, 8, 8, generator=generator) * 2
    rows = [
        {"image": image, "label": torch.tensor(index % 3), "id": f"i{(7 * index) % count}"}
        for index, image in enumerate(images)
    ]
    return rows, DataLoader(rows, batch_size=2)


def read(folder):
    with (folder / "predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_test_leaves_predictions_and_figures(tmp_path, make_trainer):
    data, loader = make_data()
    run = tmp_path / "run"
    callbacks = [Diagnoses(run, bins=5), TableOfTestImages(run), Pictures(run, 4)]
    logger = SilentWandb()
    make_trainer(callbacks=callbacks, logger=logger).test(Classifier(), loader, verbose=False)
    rows = read(run)
    assert list(rows[0]) == ["id", "label", "predicted", "correct", "confidence", *CLASSES]
    assert [row["id"] for row in rows] == [f"i{index}" for index in range(10)]
    by_id = {sample["id"]: sample for sample in data}
    for row in rows:
        sample = by_id[row["id"]]
        chance = sample["image"][0, 0, :3].softmax(0)
        found = torch.tensor([float(row[name]) for name in CLASSES])
        torch.testing.assert_close(found, chance)
        assert row["label"] == CLASSES[sample["label"]]
        assert row["predicted"] == CLASSES[chance.argmax()]
        assert row["correct"] == str(int(row["label"] == row["predicted"]))
        assert row["confidence"] == row[row["predicted"]]
    assert {row["correct"] for row in rows} == {"0", "1"}
    for name in FIGURES:
        with Image.open(run / "figures" / f"{name}.png") as image:
            assert min(image.size) > 400
            assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 20
    assert logger.logged == {
        f"test/{name}": [str(run / "figures" / f"{name}.png")] for name in FIGURES
    }
    # The other callbacks know that there are no masks.
    table = (run / "test_images.csv").read_text().splitlines()
    assert table[0] == "id,correct,confidence"
    assert [line.split(",")[1] for line in table[1:]] == [row["correct"] for row in rows]
    assert not (run / "samples").exists()
    left = {path.name for path in run.rglob("*") if path.is_file()}
    assert left == {"predictions.csv", "test_images.csv", *(f"{name}.png" for name in FIGURES)}


def test_figures_are_shown_in_tensorboard(tmp_path, make_trainer):
    logger = TensorBoardLogger(tmp_path / "logs")
    shown = {}
    logger.experiment.add_image = lambda key, picture, *_, **__: shown.update({key: picture})
    _, loader = make_data(4)
    trainer = make_trainer(callbacks=[Diagnoses(tmp_path)], logger=logger)
    trainer.test(Classifier(), loader, verbose=False)
    assert set(shown) == {f"test/{name}" for name in FIGURES}
    assert all(p.dtype == np.uint8 and p.shape[2] == 3 for p in shown.values())


def test_a_second_test_replaces_the_first(tmp_path, make_trainer):
    _, loader = make_data(4)
    trainer = make_trainer(callbacks=[Diagnoses(tmp_path)])
    for _ in range(2):
        trainer.test(Classifier(), loader, verbose=False)
        assert len(read(tmp_path)) == 4


def test_modules_that_predict_masks_leave_nothing(tmp_path, make_trainer):
    _, loader = make_data(4)
    trainer = make_trainer(callbacks=[Diagnoses(tmp_path / "run")])
    trainer.test(Segmenter(), loader, verbose=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("labels", [[1], [1, 1, 1]])
@pytest.mark.filterwarnings("error")
def test_few_images_of_one_class_are_drawn(tmp_path, make_trainer, labels):
    callback, module, trainer = Diagnoses(tmp_path), Classifier(), make_trainer()
    callback.on_test_start(trainer, module)
    probability = torch.eye(3)[: len(labels)]
    probability[0] = torch.nan
    batch = {"id": list("abc")[: len(labels)], "label": torch.tensor(labels)}
    callback.on_test_batch_end(trainer, module, {"probability": probability}, batch, 0)
    callback.on_test_end(trainer, module)
    assert (tmp_path / "figures" / "roc.png").is_file()
    first = read(tmp_path)[0]
    assert (first["predicted"], first["correct"], first["MEL"]) == ("", "0", "nan")


def test_only_one_process_writes(tmp_path, make_trainer, monkeypatch):
    """The other processes' rows come first to the one that writes."""
    others = [{"id": "a", "label": 2, "chance": np.float32([0, 0.25, 0.75])}]
    target = "lightning_modules.callbacks.test_images.gather_rows"
    monkeypatch.setattr(target, lambda rows: [*rows, *others])
    _, loader = make_data(4)
    for rank, expected in ((1, 0), (0, 5)):
        folder = tmp_path / str(rank)
        trainer = make_trainer(callbacks=[Diagnoses(folder)])
        monkeypatch.setattr(type(trainer), "is_global_zero", property(lambda _, r=rank: r == 0))
        trainer.test(Classifier(), loader, verbose=False)
        assert (folder / "predictions.csv").exists() == bool(expected)
    rows = read(folder)
    assert len(rows) == expected
    assert rows[0] == {
        **{"id": "a", "label": "NV", "predicted": "NV", "correct": "1", "confidence": "0.75"},
        **{"AK": "0.0", "MEL": "0.25", "NV": "0.75"},
    }
