"""Runs compared image by image."""

import json

import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from common.runs import write_results
from tasks import compare, test
from tasks.cases import predict_cases
from tasks.statistics import read_images


@pytest.fixture
def make_run(tmp_path):
    """Writes a run that has scored images: its Dice by id."""

    def make(name, dices, experiment=None):
        folder = tmp_path / name
        folder.mkdir()
        rows = "".join(f"{image},{dice},{1 - dice}\n" for image, dice in dices.items())
        (folder / "test_images.csv").write_text("id,dice,hd95\n" + rows)
        write_results(folder, {"schema": 1, "experiment": experiment or name})
        return folder

    return make


def dices(count, gain=0.0, seed=0):
    rng = np.random.default_rng(seed)
    base = np.random.default_rng(7).uniform(0.5, 0.8, count)
    return {f"i{k}": float(v + gain + rng.normal(0, 0.01)) for k, v in enumerate(base)}


def run(make_config, tmp_path, *folders, overrides=()):
    names = ",".join(str(folder) for folder in folders)
    compare.run(make_config("task=compare", f"runs=[{names}]", *overrides))
    return json.loads((tmp_path / "run" / "comparison.json").read_text())


def test_a_gain_on_every_image_is_found_where_the_means_hide_it(
    make_run, make_config, tmp_path, capsys
):
    first = make_run("first", dices(60))
    better = make_run("better", {**dices(60, 0.02, 1), "of its own": 0.1})
    (entry,) = run(make_config, tmp_path, first, better)
    score = entry["scores"]["dice"]
    assert entry["runs"] == [str(first), str(better)]
    assert score["images"] == 60
    assert score["difference"] == pytest.approx(score["second"] - score["first"])
    assert 0.015 < score["interval"][0] < score["difference"] < score["interval"][1] < 0.025
    assert score["p"] < 1e-6
    assert entry["scores"]["hd95"]["difference"] == pytest.approx(-score["difference"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "better (second) against first (first), 60 images" in printed
    with Image.open(tmp_path / "run" / "comparison.png") as picture:
        assert picture.size == (600, 600)


def test_equal_runs_do_not_differ(make_run, make_config, tmp_path):
    folders = [make_run(name, dices(20), "same") for name in ("a", "b", "c")]
    entries = run(make_config, tmp_path, *folders)
    assert len(entries) == 2
    for entry in entries:
        assert entry["scores"]["dice"]["interval"] == [0, 0]
        assert entry["scores"]["dice"]["p"] == 1


@pytest.mark.parametrize(
    ("names", "overrides", "message"),
    [
        (["a"], [], r"needs runs=\[<folder>,<folder>\]"),
        (["a", "gone"], [], "gone does not exist"),
        (["a", "empty"], [], "empty/test_images.csv cannot be read .*task=test checkpoint="),
        (["a", "other"], [], "no test image in common"),
        (["a", "b"], ["score=dise"], "score=dise is not in these runs; choose from dice, hd95"),
    ],
)
def test_mistakes_are_named(make_run, make_config, tmp_path, names, overrides, message):
    make_run("a", dices(3))
    make_run("b", dices(3))
    make_run("other", {"x": 0.5})
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        run(make_config, tmp_path, *(tmp_path / name for name in names), overrides=overrides)


def test_the_folder_of_an_experiment_is_the_mean_of_its_tested_runs(
    make_run, make_config, tmp_path
):
    first = make_run("first", dices(30))
    seeds = [dices(30, 0.02, seed) for seed in (1, 2, 3)]
    folder = tmp_path / "experiment"
    folder.mkdir()
    for number, values in enumerate(seeds):
        make_run(f"experiment/t{number}", values)
        results = {"schema": 1, "experiment": "e", "test": {"test/dice": 0.5}}
        write_results(folder / f"t{number}", results | {"data": {"name": "x"}})
    (folder / "untested").mkdir()
    write_results(folder / "untested", {"schema": 1, "experiment": "e", "test": None})
    (entry,) = run(make_config, tmp_path, first, folder)
    score = entry["scores"]["dice"]
    expected = np.mean([list(values.values()) for values in seeds])
    assert score["second"] == pytest.approx(expected)
    assert score["images"] == 30
    # Of one seed alone the differences scatter more.
    (alone,) = run(make_config, tmp_path, first, folder / "t0")
    width = [np.ptp(e["scores"]["dice"]["interval"]) for e in (entry, alone)]
    assert width[0] < width[1]
    untested = tmp_path / "other"
    untested.mkdir()
    (untested / "t0").mkdir()
    with pytest.raises(UserError, match="other has no tested run"):
        run(make_config, tmp_path, first, untested)


def test_the_worst_images_are_drawn_beside_the_first_run(
    make_config, make_checkpoint, tmp_path, capsys
):
    small = ("datamodule.image_size=16", "datamodule.num_samples=20", "datamodule.num_workers=0")
    checkpoint = make_checkpoint(*small)
    folders = []
    for name in ("teacher", "student"):
        folder = tmp_path / name
        paths = (f"paths.run={folder}", f"checkpoint={checkpoint}", "trainer.accelerator=cpu")
        test.run(make_config("task=test", "logger=none", *paths))
        folders.append(folder)
    images = read_images(folders[1])
    capsys.readouterr()
    run(make_config, tmp_path, *folders, overrides=("pictures=2",))
    with Image.open(tmp_path / "run" / "worst.png") as picture:
        assert picture.size == (3 * 192 + 2 * 2, 2 * 192 + 2)
    worst = sorted(images, key=lambda image: (images[image]["native_dice"], image))[:2]
    printed = capsys.readouterr().out
    assert all(image in printed for image in worst)
    (first, second) = (predict_cases(folder, worst) for folder in folders)
    for one, other, image in zip(first, second, worst, strict=True):
        assert np.array_equal(one["found"], other["found"])
        overlap = 2 * (one["found"] & one["mask"]).sum() + 1e-6
        dice = overlap / (one["found"].sum() + one["mask"].sum() + 1e-6)
        assert dice == pytest.approx(images[image]["dice"], abs=1e-4)
    # As earlier versions wrote it.
    text = (folders[0] / "config.yaml").read_text()
    kept = [line for line in text.splitlines() if line.strip() not in ("mask_resize: area",)]
    (folders[0] / "config.yaml").write_text("\n".join(kept).replace("  edges: border\n", ""))
    assert len(predict_cases(folders[0], worst)) == 2
    (folders[0] / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"teacher has no config.yaml; give folders of runs"):
        run(make_config, tmp_path, *folders, overrides=("pictures=2",))


def test_scores_at_the_original_size_come_first(make_run, make_config, tmp_path, capsys):
    folders = []
    for name, gain in (("first", 0.0), ("second", 0.02)):
        folder = make_run(name, dices(20))
        rows = "".join(
            f"{image},{dice / 2 + gain},30,{dice},1\n" for image, dice in dices(20).items()
        )
        (folder / "test_images.csv").write_text("id,native_dice,native_hd95,dice,finite\n" + rows)
        folders.append(folder)
    (entry,) = run(make_config, tmp_path, *folders)
    assert list(entry["scores"]) == ["native_dice", "native_hd95", "dice"]
    assert entry["scores"]["native_dice"]["difference"] == pytest.approx(0.02)
    printed = capsys.readouterr().out
    assert printed.index("native_dice") < printed.index("native_hd95") < printed.index(" dice ")
    # Of an older run only the plain score is known.
    older = make_run("older", dices(20))
    (entry,) = run(make_config, tmp_path, folders[0], older)
    assert list(entry["scores"]) == ["dice"]
    assert entry["scores"]["dice"]["difference"] == 0


def test_folds_of_a_cross_validation_bring_their_own_images(make_config, tmp_path):
    def make(name, gain):
        values = dices(40, gain, int(gain * 100))
        for fold in range(2):
            own = dict(list(values.items())[fold::2])
            folder = tmp_path / name / f"run_{fold}"
            folder.mkdir(parents=True)
            rows = "".join(f"{image},{dice}\n" for image, dice in own.items())
            (folder / "test_images.csv").write_text("id,dice\n" + rows)
            results = {"schema": 1, "experiment": name, "test": {"test/dice": 0.5}}
            write_results(folder, results | {"data": {"name": "x", "folds": 2, "fold": fold}})
        return tmp_path / name

    (entry,) = run(make_config, tmp_path, make("plain", 0.0), make("better", 0.05))
    score = entry["scores"]["dice"]
    assert score["images"] == 40
    assert score["difference"] == pytest.approx(0.05, abs=0.01)


def test_runs_that_cannot_be_read_are_named_and_the_others_compared(
    make_run, make_config, tmp_path, capsys
):
    whole = [make_run(name, dices(20)) for name in ("[v2]", "second")]
    lost, number, binary = (make_run(name, dices(20)) for name in ("lost", "number", "binary"))
    tested = {"schema": 1, "experiment": "e", "test": {"test/dice": 0.5}}
    write_results(lost, tested)
    write_results(number, tested | {"data": 3})
    (binary / "test_images.csv").write_bytes(b"\x89\x00\xff")
    folders = (lost, whole[0], number, whole[1], binary)
    (entry,) = run(make_config, tmp_path, *(f"'{folder}'" for folder in folders))
    assert entry["runs"] == [str(folder) for folder in whole]
    lines = capsys.readouterr().out.splitlines()
    for folder in (lost, number, binary):
        assert sum(line.startswith(f"skipped: {folder}/") for line in lines) == 1
    with pytest.raises(UserError, match=r"number/results\.json .*data"):
        run(make_config, tmp_path, number, whole[1])
    # The same in the folder of an experiment.
    experiment = tmp_path / "experiment"
    experiment.mkdir()
    for name in ("good", "bad"):
        folder = make_run(f"experiment/{name}", dices(20))
        write_results(folder, tested | {"data": {"name": "x"}})
    (folder / "test_images.csv").write_bytes(b"\x89\x00\xff")
    (entry,) = run(make_config, tmp_path, whole[1], experiment)
    assert entry["scores"]["dice"]["images"] == 20
    assert str(folder) in capsys.readouterr().out
