"""The table of losses and scores, also of a run that goes on."""

import torch

from lightning_modules.callbacks import MetricsFile


def test_columns_are_all_keys_in_order(tmp_path):
    logger = MetricsFile(tmp_path)
    logger.log_metrics({"train/loss": torch.tensor(0.5), "epoch": 0}, step=0)
    logger.log_metrics({"val/dice": 0.25, "epoch": 0}, step=1)
    logger.save()
    assert (tmp_path / "metrics.csv").read_text().splitlines() == [
        "epoch,step,train/loss,val/dice",
        "0,0,0.5,",
        "0,1,,0.25",
    ]


def test_nothing_logged_is_no_file(tmp_path):
    MetricsFile(tmp_path).finalize("success")
    assert not list(tmp_path.iterdir())


def test_it_is_written_every_so_many_steps(tmp_path):
    logger = MetricsFile(tmp_path, flush_every_n_steps=10)
    logger.log_metrics({"train/loss": 1.0}, step=9)
    assert not (tmp_path / "metrics.csv").exists()
    logger.log_metrics({"train/loss": 1.0}, step=10)
    assert (tmp_path / "metrics.csv").exists()


def rows_after(tmp_path, steps, validated):
    logger = MetricsFile(tmp_path)
    for step in range(4):
        logger.log_metrics({"train/loss": step / 3}, step=step)
        if step % 2:
            logger.log_metrics({"val/dice": step / 7}, step=step)
    logger.save()
    resumed = MetricsFile(tmp_path)
    resumed.restore(steps, validated)
    resumed.save()
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
    logger.save()
    assert (tmp_path / "metrics.csv").read_text() == "step,train/loss\n5,1.0\n"
