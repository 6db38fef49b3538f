"""One page of all runs."""

import json
import os
import re

import numpy as np
import pytest
import yaml
from PIL import Image

from common.errors import UserError
from common.runs import write_results
from tasks import report
from tasks.statistics import bootstrap_interval


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


def table(text, title):
    """Return the cells of the rows of a table."""
    lines = text[text.index(f"### {title}") :].split("\n\n")[1].splitlines()
    return [line[2:-2].split(" | ") for line in lines[2:]]


def test_every_tested_run_has_a_row_best_first(make_run, make_config, tmp_path):
    make_run("teacher", "t1", 0.80)
    make_run("student", "t2", 0.85)
    make_run("test", "t3", 0.75, trained_as="teacher")
    make_run("untested", "t4", 0.9, test=None)
    make_run("tried", "t5", 0.9, debug=True)
    text, page = write(make_config, tmp_path)
    rows = table(text, "Runs")
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
    again = again[again.index("### Runs") :]
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


def test_runs_of_one_method_stand_together_with_their_mean(make_run, make_config, tmp_path):
    """Three seeds, one of them tested again, and two on other data."""
    rng = np.random.default_rng(0)
    values = rng.uniform(0.6, 0.9, (3, 40))
    for seed, dices in enumerate(values):
        folder = make_run("student", f"t{seed}", float(dices.mean()))
        rows = "".join(f"i{k},{dice}\n" for k, dice in enumerate(dices))
        (folder / "test_images.csv").write_text("id,dice\n" + rows)
    again = {"trained_as": "student", "checkpoint": str(folder / "checkpoints" / "best.ckpt")}
    make_run("test", "t8", float(values[2].mean()), **again)
    data = {"name": "ham10000", "image_size": 64, "n_test": 4}
    make_run("test", "t9", 0.7, trained_as="student", data=data)
    text, page = write(make_config, tmp_path)
    other, ours = table(text, "Methods, the runs of each together")
    assert (other[0], other[1], other[4]) == ("student", "ham10000", "1")
    assert (ours[0], ours[1], ours[4]) == ("student", "isic2018", "3")
    means = values.mean(0)
    low, high = bootstrap_interval(means)
    assert ours[-4] == f"{means.mean():.4f} ({low:.4f} to {high:.4f})"
    assert ours[-1] == f"{values.mean(1).std(ddof=1):.4f}"
    assert other[-1] == ""
    assert len(table(text, "Runs")) == 5
    assert "Methods, the runs of each together" in page


def write_config(folder, **changes):
    config = {"network": {"name": "N"}, "trainer": {"max_epochs": 3}, "seed": 0}
    config |= {"datamodule": {"batch_size": 4}, "lightning_module": {"seed": changes.get("seed")}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config | changes))


def test_runs_of_a_sweep_stay_apart(make_run, make_config, tmp_path):
    for seed in range(2):
        for weight in (0.1, 0.5):
            folder = make_run("student", f"t{weight}_{seed}", 0.8 - weight / 10)
            losses = {"seed": seed, "losses": {"efkd": {"weight": weight}}}
            teacher = {"checkpoint": f"of seed {seed}", "experiment": "teacher"}
            write_config(folder, seed=seed, lightning_module=losses, teacher=teacher)
    checkpoint = str(folder / "checkpoints" / "best.ckpt")
    data = {"name": "ham10000", "image_size": 64, "n_test": 4}
    tested = make_run("test", "t9", 0.7, trained_as="student", data=data, checkpoint=checkpoint)
    write_config(tested)
    text, _ = write(make_config, tmp_path)
    rows = table(text, "Methods, the runs of each together")
    assert [(row[0], row[1], row[4]) for row in rows] == [
        ("student", "ham10000", "1"),
        ("student t0.1_1", "isic2018", "2"),
        ("student t0.5_1", "isic2018", "2"),
    ]


def test_seconds_come_from_the_newest_benchmark_of_the_same_network(
    make_run, make_config, tmp_path
):
    network = {"name": "N", "kwargs": {"width": 4}}
    for seed in range(2):
        folder = make_run("student", f"t{seed}", 0.8)
        write_config(folder, network=network, seed=seed)
    sampler = {"name": "DDIM", "num_steps": 5, "ensemble": 3}
    row = {
        "network": network,
        "image_size": 64,
        "precision": "32-true",
        "sampler": sampler,
        "mask_s": 0.25,
        "mask_s_reckoned": False,
        "onnx_mask_s": 0.125,
        "onnx_reckoned": True,
    }
    others = [
        {**row, "mask_s": 9, "network": {**network, "kwargs": {"width": 5}}},
        {**row, "mask_s": 8, "image_size": 128},
        {**row, "mask_s": 7, "precision": "bf16-true"},
        {**row, "mask_s": 6, "sampler": {**sampler, "num_steps": 1}},
    ]
    for age, (time, rows) in enumerate((("b2", [*others, row]), ("b1", [{**row, "mask_s": 5}]))):
        file = tmp_path / "runs" / "benchmark" / time / "benchmark.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps({"threads": 2, "device": "cpu", "networks": rows}))
        os.utime(file, (1000 - age, 1000 - age))
    text, page = write(make_config, tmp_path)
    (method,) = table(text, "Methods, the runs of each together")
    assert method[9:12] == ["7.50", "0.250", "0.125 (reckoned)"]
    assert "2 threads of cpu" in text
    assert "2 threads of cpu" in page


def test_what_is_computed_once_a_mask_counts_once(make_run, make_config, tmp_path):
    network = {"name": "N", "params": 1, "gmac": 0.5, "guidance_gmac": 0.25}
    make_run("student", "t1", 0.8, network=network)
    text, _ = write(make_config, tmp_path)
    (row,) = table(text, "Runs")
    assert row[8:10] == ["15", "4.00"]


def headings(text, title):
    """Return the headings of a table."""
    line = text[text.index(f"### {title}") :].split("\n\n")[1].splitlines()[0]
    return line[2:-2].split(" | ")


def test_scores_at_the_original_size_come_first(make_run, make_config, tmp_path):
    def both(dice, native):
        scores = {"test/dice": dice, "test/native_dice": native, "test/threshold_jaccard": 0.25}
        intervals = {"test/native_dice": [native - 0.1, native + 0.1]}
        return {"test": scores, "test_intervals": intervals, "resolution": "both"}

    make_run("good", "t1", 0.8, **both(0.8, 0.78))
    make_run("good", "t2", 0.8, **both(0.8, 0.74))
    make_run("shifted", "t3", 0.9, **both(0.9, 0.6))
    text, page = write(make_config, tmp_path)
    columns = headings(text, "Runs")
    first = columns.index("native Dice")
    assert columns[first : first + 3] == ["native Dice", "Dice", "threshold Jaccard"]
    rows = table(text, "Runs")
    assert [row[first] for row in rows] == [
        "0.7800 (0.6800 to 0.8800)",
        "0.7400 (0.6400 to 0.8400)",
        "0.6000 (0.5000 to 0.7000)",
    ]
    assert headings(text, "Methods")[-1] == "native Dice, deviation of runs"
    assert table(text, "Methods")[0][-1] == f"{np.std([0.78, 0.74], ddof=1):.4f}"
    assert "Native Dice against cost" in page
    # An older run without them has a row, and what all runs have is compared.
    make_run("older", "t4", 0.85)
    text, page = write(make_config, tmp_path)
    assert [row[0] for row in table(text, "Runs")] == ["shifted", "older", "good", "good"]
    assert table(text, "Runs")[1][first] == ""
    assert headings(text, "Methods")[-1] == "Dice, deviation of runs"
    assert ">Dice against cost" in page


def test_folds_of_a_cross_validation_share_a_row_with_all_their_images(
    make_run, make_config, tmp_path
):
    rng = np.random.default_rng(0)
    values = rng.uniform(0.7, 0.9, (3, 8))
    data = {"name": "isic2018", "image_size": 64, "n_test": 8, "folds": 3}
    for fold, own in enumerate(values):
        folder = make_run("teacher", f"f{fold}", own.mean(), data=data | {"fold": fold})
        rows = "".join(f"i{fold}_{place},{dice}\n" for place, dice in enumerate(own))
        (folder / "test_images.csv").write_text("id,dice\n" + rows)
    make_run("teacher", "plain", 0.95)
    text, _ = write(make_config, tmp_path)
    rows = {row[0].strip("| "): row for row in table(text, "Methods, the runs of each together")}
    assert set(rows) == {"teacher, 3 folds", "teacher"}
    low, high = bootstrap_interval(values.flatten())
    cell = f"{values.mean():.4f} ({low:.4f} to {high:.4f})"
    assert cell in " | ".join(rows["teacher, 3 folds"])


def test_tests_on_folders_of_ones_own_stay_apart(make_run, make_config, tmp_path):
    origin = make_run("unet-mine", "t1", 0.9, data=own_data("mine", "a"))
    checkpoint = str(origin / "checkpoints" / "best.ckpt")
    tests = [("other", "b"), ("mine", "c"), ("mine", "a")]
    for number, (label, split) in enumerate(tests):
        data, dice = own_data(label, split), 0.6 + number / 10
        more = {"trained_as": "unet-mine", "checkpoint": checkpoint, "data": data}
        make_run("test", f"t{number + 2}", dice, **more)
    text, _ = write(make_config, tmp_path)
    assert sorted(row[2] for row in table(text, "Runs")) == ["mine"] * 3 + ["other"]
    methods = table(text, "Methods")
    # The last test repeats that of the training, which counts.
    expected = [("mine", "0.9000"), ("mine", "0.7000"), ("other", "0.6000")]
    assert len(methods) == len(expected)
    for row, (data, dice) in zip(methods, expected, strict=True):
        assert row[1] == data
        assert any(cell.startswith(dice) for cell in row)


def own_data(label, split):
    """Return what a run records of a folder of one's own."""
    return {"name": "Folder", "label": label, "split_sha": split, "image_size": 64, "n_test": 4}


DAMAGE = {
    "no data": ("results.json", lambda whole: {k: v for k, v in whole.items() if k != "data"}),
    "number": ("results.json", lambda whole: whole | {"data": 7}),
    "text": ("results.json", lambda whole: whole | {"test": {"test/dice": "0.9"}}),
    "no network": ("results.json", lambda whole: whole | {"network": None}),
    "metrics": ("metrics.csv", b"\x89PNG\r\n\x00\xff\xfe"),
    "no steps": ("metrics.csv", b"epoch,train/loss\n1,0.5\n"),
    "words": ("metrics.csv", b"step,train/loss\n1,low\n"),
    "images": ("test_images.csv", b"\xff\xfe\x00id,dice\n"),
    "other columns": ("test_images.csv", b"a,b\n1,2\n"),
    "config": ("config.yaml", b"\x00\xff"),
}


def test_runs_with_damaged_files_are_named_and_the_others_reported(
    make_run, make_config, tmp_path, capsys
):
    for seed in range(2):
        write_config(make_run("student", f"t{seed}", 0.8), seed=seed)
    for name, (file, content) in DAMAGE.items():
        path = make_run("student", name, 0.9) / file
        if not isinstance(content, bytes):
            content = json.dumps(content(json.loads(path.read_text()))).encode()
        path.write_bytes(content)
    broken = tmp_path / "runs" / "benchmark" / "b" / "benchmark.json"
    broken.parent.mkdir(parents=True)
    broken.write_text('{"threads": 2, "device": "cpu", "networks": [{"mask_s": "fast"}]}')
    text, _ = write(make_config, tmp_path)
    assert [row[1] for row in table(text, "Runs")] == ["t1", "t0"]
    lines = capsys.readouterr().out.splitlines()
    for name, (file, _) in DAMAGE.items():
        (line,) = (line for line in lines if str(tmp_path / "runs" / "student" / name) in line)
        assert file in line
    assert sum(str(broken) in line for line in lines) == 1


def test_names_of_runs_stand_as_they_are(make_run, make_config, tmp_path, capsys):
    places = [("[", "b]"), *(("student", n) for n in ("[v2]", r"$\foo$", "\x1b[31m", "a\udcffb"))]
    for experiment, name in places:
        folder = make_run(experiment, name, 0.8)
        (folder / "metrics.csv").write_text("step,train/loss,val/dice\n1,0.5,0.1\n2,0.25,0.2\n")
    text, page = write(make_config, tmp_path)
    names = {row[1] for row in table(text, "Runs")}
    assert names == {"b]", "[v2]", r"$\foo$", r"\x1b[31m", r"a\xffb"}
    assert "\x1b" not in page + text + capsys.readouterr().out
    (tmp_path / "runs" / "[" / "b]" / "results.json").write_text("{half")
    write(make_config, tmp_path)
    assert "runs/[/b]/results.json" in capsys.readouterr().out


def test_a_folder_of_debug_runs_names_the_key(make_run, make_config, tmp_path):
    make_run("tried", "t1", 0.9, debug=True)
    with pytest.raises(UserError, match="debug_runs=true"):
        write(make_config, tmp_path)
    assert "tried" in write(make_config, tmp_path, "debug_runs=true")[0]
