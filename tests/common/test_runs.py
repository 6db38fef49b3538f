"""Run folders: results are valid JSON and found newest first."""

import json
from pathlib import Path

import pytest

from common.runs import (
    dataset_label,
    find_runs,
    main_score,
    main_scores,
    name_runs,
    native_first,
    read_config,
    read_results,
    run_label,
    write_results,
)


def test_numbers_that_are_not_finite_become_null(tmp_path):
    results = {"test": {"dice": float("nan")}, "lr": [float("inf"), 1]}
    write_results(tmp_path, {"schema": 1, **results})
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored == {"schema": 1, "test": {"dice": None}, "lr": [None, 1]}
    assert read_results(tmp_path) == stored


def test_runs_are_found_newest_first_and_damaged_ones_skipped(tmp_path):
    for name in ("2026-01-01", "2026-03-01", "2026-02-01"):
        write_results(tmp_path / name, {"schema": 1, "experiment": name})
    (tmp_path / "2026-04-01").mkdir()
    (tmp_path / "2026-05-01").mkdir()
    (tmp_path / "2026-05-01" / "results.json").write_text("{half")
    assert [run.name for run, _ in find_runs(tmp_path)] == [
        "2026-03-01",
        "2026-02-01",
        "2026-01-01",
    ]
    assert list(find_runs(tmp_path / "none")) == []


def test_runs_are_named_by_what_trained_them_and_told_apart():
    runs = [
        (Path("a/1"), {"experiment": "teacher"}),
        (Path("test/2"), {"experiment": "test", "trained_as": "teacher"}),
        (Path("test/3"), {"experiment": "test", "trained_as": "student"}),
        (Path("lost"), {}),
    ]
    assert name_runs(runs) == ["teacher 1", "teacher 2", "student", "lost"]


def test_the_main_score_is_that_of_the_kind_of_run():
    masks = {"test": {"test/dice": 0.8, "test/iou": 0.7}}
    diagnoses = {"test": {"test/accuracy": 0.8, "test/balanced_accuracy": 0.6}}
    assert main_score(masks) == ("dice", 0.8)
    assert main_score(diagnoses) == ("balanced_accuracy", 0.6)
    assert main_score({"test": None}) == ("dice", None)
    both = {"test": {**masks["test"], "test/native_iou": 0.5, "test/native_dice": 0.6}}
    assert main_score(both) == ("native_dice", 0.6)
    assert list(main_scores(both).items()) == [("native_dice", 0.6), ("dice", 0.8)]
    assert main_scores(diagnoses) == {"balanced_accuracy": 0.6}


@pytest.mark.parametrize(
    ("datamodule", "root", "expected"),
    [
        ("isic2018", "data/isic2018", "isic2018"),
        ("isic2018", "/mnt/mine", "isic2018"),
        ("synthetic", None, "synthetic"),
        ("folder", "data/clinic", "clinic"),
        ("folder_diagnosis", "/data/clinic/", "clinic"),
        ("folder", "data/my photos (1)", "my-photos-1"),
        ("folder", "data/снимки, 2", "снимки-2"),
        ("folder", "data/a=b", "a-b"),
        ("folder", "data/sub/..", "data"),
        ("folder", "/", "folder"),
        ("folder", "data/...", "folder"),
    ],
)
def test_own_data_is_named_by_its_folder(datamodule, root, expected):
    assert dataset_label(datamodule, root) == expected


@pytest.mark.parametrize(
    ("experiment", "datamodule", "given", "expected"),
    [
        ("teacher_isic2018", "isic2018", ["experiment"], "teacher_isic2018"),
        ("teacher_isic2018", "isic2018", ["datamodule"], "teacher_isic2018"),
        ("teacher_isic2018", "isic2018", ["datamodule.root"], "teacher_isic2018"),
        ("teacher_isic2018", "folder", ["datamodule"], "teacher_isic2018-clinic"),
        ("teacher_isic2018", "folder", ["datamodule.image_size"], "teacher_isic2018"),
        ("d_kd_isic2019", "ham10000_diagnosis", ["datamodule"], "d_kd_isic2019-ham10000_diagnosis"),
        ("demo_teacher", "synthetic", [], "demo_teacher"),
        (None, "synthetic", [], "diffusion-synthetic"),
        (None, "folder", ["datamodule.root"], "diffusion-clinic"),
        ("teacher_clinic", "folder", ["datamodule.root"], "teacher_clinic-clinic"),
    ],
)
def test_a_run_on_chosen_data_is_named_by_it(experiment, datamodule, given, expected):
    assert run_label(experiment, "diffusion", datamodule, "data/clinic", given) == expected


def test_scores_at_the_original_size_come_first():
    names = ["test/loss", "test/dice", "test/native_dice", "iou", "native_iou"]
    expected = ["test/native_dice", "native_iou", "test/loss", "test/dice", "iou"]
    assert native_first(names) == expected


def test_plain_names_of_a_test_at_native_resolution_alone_are_read_as_native(tmp_path):
    scores = {"test/dice": 0.5, "test/loss/bce": 1.0, "test/batch_pooled_dice": 0.4}
    old = {"schema": 1, "resolution": "native", "test": scores}
    write_results(tmp_path, {**old, "test_intervals": {"test/dice": [0.4, 0.6]}})
    found = read_results(tmp_path)
    kept = {"test/loss/bce": 1.0, "test/batch_pooled_dice": 0.4}
    assert found["test"] == {"test/native_dice": 0.5, **kept}
    assert found["test_intervals"] == {"test/native_dice": [0.4, 0.6]}
    for results in (
        {**old, "resolution": "model"},
        {**old, "test": {"test/native_dice": 0.5, "test/referral_dice": 0.7}},
        {**old, "test": None},
    ):
        write_results(tmp_path, results)
        assert read_results(tmp_path) == results


WHOLE = {
    "schema": 1,
    "network": {"name": "N", "params": 3, "gmac": 0.5},
    "data": {"name": "x", "image_size": 64},
    "best": {"monitor": "val/dice", "score": 0.5, "mode": "max"},
    "sampler": {"name": "DDIM", "num_steps": 5, "ensemble": 1},
    "test": {"test/dice": 0.5, "test/hd95": None},
    "test_intervals": {"test/dice": [0.4, 0.6], "test/hd95": [None, None]},
}


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"data": 3}, "data"),
        ({"data": None}, "data.name"),
        ({"data": {"image_size": 64}}, "data.name"),
        ({"data": {"name": "x", "image_size": "64"}}, "data.image_size"),
        ({"network": ["N"]}, "network"),
        ({"network": {"name": "N", "gmac": True}}, "network.gmac"),
        ({"test": "none"}, "test"),
        ({"test": {"test/dice": "0.5"}}, "test.test/dice"),
        ({"test": {"test/dice": 10**400}}, "test.test/dice"),
        ({"test_intervals": {"test/dice": [0.4]}}, "test_intervals.test/dice"),
        ({"test_intervals": 5}, "test_intervals"),
        ({"best": 0.5}, "best"),
        ({"best": {"score": 0.5}}, "best.monitor"),
        ({"sampler": {"name": "DDIM"}}, "sampler.num_steps"),
        ({"teacher": "x"}, "teacher"),
        ({"batch": {"effective": []}}, "batch.effective"),
        ({"seconds": "long"}, "seconds"),
        ({"checkpoint": "a\0b"}, "checkpoint"),
        ({"experiment": 5}, "experiment"),
    ],
)
def test_results_of_the_wrong_kind_are_named_and_not_read(tmp_path, capsys, changes, fault):
    folder = tmp_path / "[v2]"
    write_results(folder, WHOLE)
    expected = WHOLE | {"test_intervals": {"test/dice": [0.4, 0.6]}}
    assert read_results(folder, ["data.name"]) == expected
    assert capsys.readouterr().out == ""
    (folder / "results.json").write_text(json.dumps(WHOLE | changes))
    assert read_results(folder, ["data.name"]) is None
    assert list(find_runs(tmp_path, ["data.name"])) == []
    (line,) = capsys.readouterr().out.splitlines()
    assert str(folder / "results.json") in line, "as it is, on one line, and once"
    assert f"({fault} is " in line


@pytest.mark.parametrize("content", [b"\x00\xff\xfe", b"[" * 100_000, b"[1]", b"{}", b""])
def test_files_that_are_no_json_are_named(tmp_path, capsys, content):
    (tmp_path / "results.json").write_bytes(content)
    assert read_results(tmp_path) is None
    assert str(tmp_path / "results.json") in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"\x00\xff", b"a: [", b"3", b"a: 2026-13-45"])
def test_a_config_that_is_damaged_is_named(tmp_path, capsys, content):
    assert read_config(tmp_path) is None
    assert capsys.readouterr().out == "", "there is none"
    (tmp_path / "config.yaml").write_bytes(content)
    assert read_config(tmp_path) is None
    assert str(tmp_path / "config.yaml") in capsys.readouterr().out
