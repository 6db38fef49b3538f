"""One page of all runs."""

import re

import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from common.runs import write_results
from tasks import report


@pytest.fixture
def make_run(tmp_path):
    """Writes what the report reads of a run."""

    def make(experiment, time, dice, **more):
        folder = tmp_path / "runs" / experiment / time
        results = {
            "schema": 1,
            "experiment": experiment,
            "network": {"name": "N", "params": 1234567, "gmac": 0.5},
            "data": {"name": "isic2018", "image_size": 64, "n_test": 4},
            "objective": "x0",
            "sampler": {"name": "DDIM", "num_steps": 5, "ensemble": 3},
            "calls_per_mask": 15,
            "test": {"test/dice": dice, "test/iou": 0.5, "test/hd95": 3.25},
            "test_intervals": {"test/dice": [dice - 0.1, dice + 0.1]},
            "test_seconds": 8.0,
            "tested_images": 2,
        }
        folder.mkdir(parents=True)
        write_results(folder, results | more)
        return folder

    return make


def write(make_config, tmp_path, *overrides):
    report.run(make_config("task=report", *overrides))
    folder = tmp_path / "run"
    return (folder / "report.md").read_text(), (folder / "report.html").read_text()


def test_every_tested_run_has_a_row_best_first(make_run, make_config, tmp_path):
    make_run("teacher", "t1", 0.80)
    make_run("student", "t2", 0.85)
    make_run("test", "t3", 0.75, trained_as="teacher")
    make_run("untested", "t4", 0.9, test=None)
    make_run("tried", "t5", 0.9, debug=True)
    text, page = write(make_config, tmp_path)
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")][2:]
    assert [row[0].strip("| ") for row in rows] == ["student", "teacher", "teacher"]
    first = " | ".join(rows[0])
    for cell in (
        "t2",
        "isic2018",
        "64",
        "x0",
        "1,234,567",
        "0.500",
        "5 DDIM x 3",
        "15",
        "7.50",
        "0.8500 (0.7500 to 0.9500)",
        "0.5000",
        "3.25",
        "4.000",
    ):
        assert f" {cell} " in f"{first} "
    one_pass = {"objective": None, "sampler": None, "calls_per_mask": 1}
    make_run("unet", "t6", 0.7, **one_pass)
    again, _ = write(make_config, tmp_path)
    (row,) = (line for line in again.splitlines() if line.startswith("| unet "))
    assert "| 64 |  | 1,234,567 | 0.500 | none | 1 | 0.50 | 0.7000" in row
    assert "student" in page
    assert "0.8500 (0.7500 to 0.9500)" in page
    assert "tried" not in page + text
    text, _ = write(make_config, tmp_path, "debug_runs=true")
    assert "tried" in text


def test_the_page_holds_curves_and_cases_and_fetches_nothing(make_run, make_config, tmp_path):
    folder = make_run("teacher", "t1", 0.8)
    _, bare = write(make_config, tmp_path)
    rows = "".join(f"{k},{1 / (k + 1)},,{k / 10}\n" for k in range(5))
    (folder / "metrics.csv").write_text("step,train/loss,val/loss,val/dice\n" + rows)
    (folder / "samples").mkdir()
    for case in ("best", "worst"):
        colours = np.random.default_rng(0).integers(0, 255, (8, 32, 3), dtype=np.uint8)
        Image.fromarray(colours).save(folder / "samples" / f"{case}.png")
    _, page = write(make_config, tmp_path)
    assert bare.count("<img") == 1, "Dice against cost"
    assert page.count("<img") == 1 + 1 + 2
    assert "Training" in page
    assert "Training" not in bare
    assert not re.search(r"(src|href)=['\"](?!data:)", page)


def test_no_run_is_an_error(make_config, tmp_path):
    with pytest.raises(UserError, match="no run with a test; train one"):
        write(make_config, tmp_path)
