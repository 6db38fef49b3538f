"""Runs compared image by image."""

import json

import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from common.runs import write_results
from tasks import compare


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
