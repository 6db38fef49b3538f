"""What a run prints of its results."""

import pytest

from tasks.screen import _CHOSEN as CHOSEN
from tasks.screen import print_choices, print_results

NETWORK = {"name": "N", "params": 1000, "gmac": 0.5}


def printed(capsys, tmp_path, **changes):
    """Return the lines of the printed results, each as its words."""
    results = {
        "experiment": "student",
        "data": {"n_test": 4},
        "network": NETWORK,
        "calls_per_mask": 3,
        "baselines": {"otsu": 0.25},
        **changes,
    }
    print_results(results, tmp_path)
    return [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines()]


def row(lines, start):
    (found,) = (line for line in lines if line[:1] == [start])
    return found


def test_scores_at_the_original_size_come_first(capsys, tmp_path):
    test = {"test/loss": 1.0, "test/dice": 0.875, "test/native_iou": 0.5, "test/native_dice": 0.75}
    teacher = {"network": NETWORK, "calls_per_mask": 9, "dice": 0.9375, "native_dice": None}
    lines = printed(capsys, tmp_path, test=test, teacher=teacher)
    names = [line[0] for line in lines if line and line[0].startswith("test/")]
    assert names == ["test/native_iou", "test/native_dice", "test/loss", "test/dice"]
    assert row(lines, "student")[-2:] == ["0.7500", "0.8750"]
    assert row(lines, "teacher")[-2:] == ["unknown", "0.9375"]
    # Baselines are masks at the network's size.
    assert row(lines, "Otsu's")[-2:] == ["-", "0.2500"]


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ({"test/dice": 0.875}, ["3", "0.8750"]),
        ({"test/native_dice": 0.75}, ["3", "0.7500", "unknown"]),
    ],
)
def test_one_resolution_is_shown_alone(capsys, tmp_path, scores, expected):
    lines = printed(capsys, tmp_path, test=scores)
    assert row(lines, "network")[-len(expected) :] == expected
    assert row(lines, "Otsu's")[-1] == "0.2500"


def test_names_from_outside_stand_as_they_are(capsys, tmp_path):
    lines = printed(
        capsys,
        tmp_path / "[/b]",
        test={"test/dice": 0.5, "test/recall/[red]": 0.25},
        experiment="[/b]:smile:",
    )
    words = [word for line in lines for word in line]
    assert "[/b]:smile::" in words
    assert row(lines, "[red]") == ["[red]", "0.2500"]
    assert "".join(words).count("[/b]") == 2
    print_choices({"network": {}, **{key: {1: 2} for key in CHOSEN}}, dict.fromkeys(CHOSEN, "[/b]"))
    assert "datamodule=[/b]" in capsys.readouterr().out
