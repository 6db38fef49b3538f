"""Which checkpoints predict together, and what they must agree in."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from datamodules.synthetic import synthesise_lesion
from tasks import predict as predict_task
from tasks.checkpoints import load_checkpoint
from tasks.ensembles import find_checkpoints, load_ensemble

QUICK = ("trainer.accelerator=cpu", "num_workers=0", "trainer.enable_progress_bar=false")
SIZE = "datamodule.image_size=32"


@pytest.fixture
def multirun(tmp_path):
    """Writes the records of a multirun's jobs, each with its overrides and status."""

    def write(*jobs):
        folder = tmp_path / "runs" / "sweeps" / "now"
        (folder / "jobs").mkdir(parents=True)
        for num, (overrides, status) in enumerate(jobs):
            record = {"num": num, "overrides": overrides, "status": status, "folder": f"x/{num}"}
            record |= {"reason": None, "seconds": None}
            (folder / "jobs" / f"{num:04d}.json").write_text(json.dumps(record))
        return str(folder)

    return write


def fold(number, *others, folds=3, status="finished"):
    return [f"cross_validation={folds}", f"datamodule.fold={number}", *others], status


def test_the_folds_of_a_multirun_are_found(multirun, tmp_path):
    folder = multirun(*(fold(k, f"seed={seed}") for seed in (0, 1) for k in range(3)))
    expected = [tmp_path / f"runs/x/{n}/checkpoints/best.ckpt" for n in range(6)]
    assert find_checkpoints(folder) == expected
    found = find_checkpoints(["one.ckpt", folder])
    assert [path.name for path in found] == ["one.ckpt", *["best.ckpt"] * 6]
    assert [str(path) for path in find_checkpoints("a.ckpt")] == ["a.ckpt"]


@pytest.mark.parametrize(
    ("jobs", "message"),
    [
        ([fold(0), fold(1), fold(2, status="failed")], "2 of 3 runs .* skip_finished=true"),
        ([fold(0), fold(1)], "2 of 3 runs"),
        ([fold(k, "seed=0") for k in range(3)] + [fold(0, "seed=1")], "4 of 6 runs"),
        ([fold(k, f"w={k % 2}") for k in range(3)], r"differ in w; .*checkpoint=\["),
        ([], "0 of 0 runs"),
    ],
)
def test_a_multirun_that_is_not_one_whole_setting_is_refused(multirun, jobs, message):
    with pytest.raises(UserError, match=message):
        find_checkpoints(multirun(*jobs))


@pytest.mark.parametrize("given", [[1, "a.ckpt"], [""], [["a.ckpt"]]])
def test_entries_that_are_no_names_are_refused(given):
    with pytest.raises(UserError, match="checkpoint has the entry"):
        find_checkpoints(given)


def test_other_tasks_take_one_file(tmp_path):
    with pytest.raises(UserError, match="only task=predict takes"):
        load_checkpoint(["a.ckpt", "b.ckpt"])
    with pytest.raises(UserError, match="is a folder"):
        load_checkpoint(tmp_path)


@pytest.fixture
def predict(make_config, tmp_path):
    """Predicts a photograph with some checkpoints; returns probability, deviation and row."""
    image, _ = synthesise_lesion(0, 3)
    # Of the network's size, so that nothing is interpolated.
    Image.fromarray(image[:32, :32]).save(tmp_path / "photo.png")

    def run(checkpoint, output, *overrides):
        folder = tmp_path / output
        places = (f"input={tmp_path}/photo.png", f"output={folder}", f"checkpoint={checkpoint}")
        predict_task.run(make_config("task=predict", *places, *QUICK, *overrides))
        with (folder / "predictions.csv").open(newline="") as file:
            (row,) = csv.DictReader(file)
        maps = [
            np.asarray(Image.open(folder / f"photo_{kind}.png"), dtype=float) / scale
            for kind, scale in (("probability", 255), ("uncertainty", 510))
        ]
        return (*maps, row)

    return run


def test_several_checkpoints_predict_their_mean_and_deviation(make_checkpoint, predict, capsys):
    paths = [make_checkpoint(SIZE, name=name) for name in ("a", "b")]
    alone = np.stack([predict(path, path.stem)[0] for path in paths])
    assert np.abs(alone[0] - alone[1]).max() > 0.1
    mean, deviation, row = predict(f"[{','.join(map(str, paths))}]", "all")
    # Each picture is rounded to a 255th.
    assert np.abs(mean - alone.mean(0)).max() < 0.005
    assert np.abs(deviation - alone.std(0)).max() < 0.005
    assert deviation.max() > 0.05
    assert float(row["mean_uncertainty"]) == pytest.approx(deviation.mean(), abs=0.005)
    capsys.readouterr()
    predict(f"[{','.join(map(str, paths))}]", "all", "skip_existing=true")
    assert "1 of 1 photographs are done" in capsys.readouterr().out
    predict(paths[0], "all", "skip_existing=true")
    assert "0 of 1 photographs are done" in capsys.readouterr().out


def test_members_that_need_other_photographs_are_refused(make_checkpoint, predict):
    one = make_checkpoint(SIZE, name="one")
    other = make_checkpoint(SIZE, "datamodule.normalization=imagenet", name="other")
    with pytest.raises(UserError, match=r"other\.ckpt has normalization=imagenet, .*minmax"):
        predict(f"[{one},{other}]", "masks")


def test_exported_and_trained_models_do_not_fit_together():
    with pytest.raises(UserError, match=r"exported b\.onnx and the trained a\.ckpt"):
        load_ensemble({"checkpoint": ["a.ckpt", "b.onnx"]}, lambda config: (config, None, {}))


def test_masks_and_diagnoses_do_not_fit_together():
    class Module:
        def __init__(self, classes):
            self.classes = classes

    def load(config):
        return config, Module(("mel", "nv") if "b" in config["checkpoint"] else None), {}

    with pytest.raises(UserError, match=r"b\.ckpt has classes=\['mel', 'nv'\], .*a\.ckpt has \[\]"):
        load_ensemble({"checkpoint": ["a.ckpt", "b.ckpt"]}, load)
