"""The table of losses and scores, also of a run that goes on."""

import pytest
import torch

from common.errors import UserError
from lightning_modules.callbacks import MetricsFile


def test_columns_are_all_keys_in_order(tmp_path):
    logger = MetricsFile(tmp_path)
    logger.log_metrics({"train/loss": torch.tensor(0.5), "epoch": 0}, step=0)
    logger.log_metrics({"val/dice": 0.25, "epoch": 0}, step=1)
    logger.write()
    assert (tmp_path / "metrics.csv").read_text().splitlines() == [
        "epoch,step,train/loss,val/dice",
        "0,0,0.5,",
        "0,1,,0.25",
    ]


def test_nothing_logged_is_no_file(tmp_path):
    MetricsFile(tmp_path).finalize("success")
    assert not list(tmp_path.iterdir())


def test_it_is_not_written_at_every_step(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    logger = MetricsFile(tmp_path, interval=30)
    for clock[0], expected in ((129.0, 0), (130.0, 2), (159.0, 2), (160.0, 4)):
        logger.log_metrics({"train/loss": 1.0}, step=1)
        logger.save()
        path = tmp_path / "metrics.csv"
        assert (path.read_text().count("\n") - 1 if path.exists() else 0) == expected
    logger.log_metrics({"train/loss": 1.0}, step=1)
    logger.finalize("failed")
    assert path.read_text().count("\n") == 1 + 5


def rows_after(tmp_path, steps, validated):
    logger = MetricsFile(tmp_path)
    for step in range(4):
        logger.log_metrics({"train/loss": step / 3}, step=step)
        if step % 2:
            logger.log_metrics({"val/dice": step / 7}, step=step)
    logger.write()
    resumed = MetricsFile(tmp_path)
    resumed.restore(steps, validated)
    resumed.write()
    return (tmp_path / "metrics.csv").read_text().splitlines()[1:]


def test_a_resumed_run_keeps_what_its_checkpoint_knows(tmp_path):
    first = [f"0,{0.0},", f"1,{1 / 3},"]
    assert rows_after(tmp_path / "a", steps=2, validated=True) == [*first, f"1,,{1 / 7}"]
    assert rows_after(tmp_path / "b", steps=2, validated=False) == [f"0,{0.0}", f"1,{1 / 3}"]
    assert rows_after(tmp_path / "c", steps=3, validated=False)[2:] == [
        f"1,,{1 / 7}",
        f"2,{2 / 3},",
    ]


def test_a_run_without_a_table_starts_one(tmp_path):
    logger = MetricsFile(tmp_path)
    logger.restore(5, validated=True)
    logger.log_metrics({"train/loss": 1.0}, step=5)
    logger.write()
    assert (tmp_path / "metrics.csv").read_text() == "step,train/loss\n5,1.0\n"


@pytest.mark.parametrize(
    "content",
    [b"\x89\x00\xff", b"a,b\n1,2\n", b"step,a\nx,1\n", b"step,a\n1,2,3\n", b"a,step\n1\n"],
)
def test_a_damaged_file_is_named_when_a_run_goes_on(tmp_path, content):
    (tmp_path / "metrics.csv").write_bytes(content)
    with pytest.raises(UserError, match=r"metrics\.csv is damaged"):
        MetricsFile(tmp_path).restore(3, validated=True)
