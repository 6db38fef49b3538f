"""The command line as a user meets it: mistakes are short messages and exit code 2."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from run import main
from tasks.statistics import read_images

ROOT = Path(__file__).resolve().parent.parent


def command(tmp_path, *arguments):
    places = [f"paths.runs={tmp_path}/runs", f"paths.cache={tmp_path}/cache"]
    return [str(ROOT / "run.py"), "logger=csv", *places, *arguments]


def run(tmp_path, *arguments):
    return subprocess.run(
        [sys.executable, *command(tmp_path, *arguments)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
        # Sums over pixels take another order with another number of threads.
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["experiment=nothing"], ["experiment=nothing", "Choose a file of conf/experiment, such"]),
        (["network=nothing"], ["Choose one of compact_dermosegdiff_m, compact_dermosegdiff_s"]),
        (["debug=fats"], ["debug=fats", "fast, limit, overfit, profile"]),
        (["-m", "sampler=ddim,ddpmm"], ["sampler=ddpmm", "nearest is ddpm"]),
        (["hydra/launcher=slrum"], ["hydra/launcher/slrum", "nearest is slurm"]),
        (["seed=1", "-m", "hydra/sweeper=basik"], ["hydra/sweeper/basik", "nearest is basic"]),
        (["datmodule=isic2018"], ["nearest keys are datamodule"]),
        (["sampler=ddim,ddpm"], ["sampler=ddim,ddpm has several values; add -m"]),
        (["datamodule.imagesize=32"], ["datamodule.image_size", "--cfg job"]),
        (["input=photos"], ["such as task=predict"]),
        (["logger.wandb.project=my (run)"], ["""'logger.wandb.project="my (run)"'"""]),
        (["task=predict", "checkpoint=x", "input=my photos (1)"], ["input=my photos (1) is no"]),
        (["task=test", "checkpoint=a=b,c[1]"], ["checkpoint=a=b,c[1] does not exist"]),
        (["resume=снимки 2"], ["resume=снимки 2 has no checkpoints/last.ckpt"]),
        (["network=null"], ["network=null", "dermosegdiff_small"]),
        (["lightning_module=classification", "datamodule=isic2018"], ["datamodule=isic2019"]),
        (["experiment=teacher_isic2018", "paths.data=gone"], ["gone/isic2018", "paths.data"]),
        (["task=test"], ["task=test needs checkpoint=<file>"]),
        (["task=test", "checkpoint=gone.ckpt"], ["checkpoint=gone.ckpt does not exist"]),
        (["experiment=demo_efkd"], ["python run.py experiment=demo_teacher"]),
        (
            ["experiment=demo_efkd", "teacher.checkpoint=gone.ckpt"],
            ["teacher.checkpoint=gone.ckpt"],
        ),
        (["trainer.precision=16-odd"], ["precision"]),
        (["sampler.num_steps=0"], ["sampler.num_steps=0"]),
        (["experiment=null", "debug=null", "~logger", "task=test"], ["task=test needs"]),
        (["trainer.max_epochs"], ["trainer.max_epochs"]),
        (["resume=gone"], ["error: resume=gone has no checkpoints/last.ckpt"]),
    ],
)
def test_mistakes_are_short_messages_before_any_training(
    tmp_path, monkeypatch, capsys, arguments, expected
):
    monkeypatch.setattr(sys, "argv", command(tmp_path, *arguments))
    monkeypatch.chdir(tmp_path)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as stop:
            main()
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert stop.value.code == 2
    message = check_message(capsys.readouterr().err)
    for part in expected:
        assert part in message
    assert not list(tmp_path.rglob("*.ckpt"))
    assert not list(tmp_path.glob("runs/*")), "no run folder is left behind, nor one above it"


def test_a_mistake_on_the_command_line_is_exit_code_2(tmp_path):
    done = run(tmp_path, "task=test")
    assert done.returncode == 2, done.stderr
    assert "task=test needs checkpoint=<file>" in check_message(done.stderr)


def check_message(errors):
    assert "Traceback" not in errors
    message = errors.strip().splitlines()[-1]
    assert message.startswith("error: ")
    assert len(message) < 800
    return message


def test_the_default_logger_works_offline_and_keeps_its_pictures(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    done = run(
        tmp_path,
        "experiment=demo_teacher",
        "debug=fast",
        "logger=wandb",
        "datamodule.num_samples=20",
    )
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.glob("runs/demo_teacher/*/wandb")
    assert list(folder.glob("offline-run-*/run-*.wandb"))
    tables = list(folder.glob("offline-run-*/files/media/table/*/samples*.json"))
    assert len(tables) == 2, "validation and test"
    columns = json.loads(tables[0].read_text())["columns"]
    assert columns == ["id", "image", "truth", "sample", "overlay"]
    staged = [p for p in folder.rglob("*") if p.is_file() and p.read_bytes()[1:4] == b"PNG"]
    assert len(staged) == 2 * 2 * 4, "two images of four pictures in each table"


def test_a_multirun_gives_each_job_its_own_folder_and_overrides(tmp_path):
    done = run(
        tmp_path,
        "hydra.mode=MULTIRUN",
        "experiment=demo_teacher",
        "debug=fast",
        "datamodule.num_samples=20",
        "lightning_module.losses.boundary.weight=0.1,0.5",
    )
    assert done.returncode == 0, done.stderr
    folders = sorted(p.parent for p in tmp_path.glob("runs/demo_teacher/*/results.json"))
    assert len(folders) == 2
    weights = []
    for folder in folders:
        assert json.loads((folder / "results.json").read_text())["status"] == "finished"
        config = yaml.safe_load((folder / "config.yaml").read_text())
        assert config["paths"]["run"] == str(folder)
        weights.append(config["lightning_module"]["losses"]["boundary"]["weight"])
    assert weights == [0.1, 0.5]


def test_a_fast_run_and_a_test_in_a_fresh_process_agree(tmp_path):
    done = run(tmp_path, "debug=fast", "datamodule.num_samples=20", "paths.runs=my runs=[1]")
    assert done.returncode == 0, done.stderr
    assert "Network calls on one image" in done.stdout
    chosen = "datamodule=synthetic augmentation=light network=dermosegdiff_small lightning_module="
    assert chosen in done.stdout
    (checkpoint,) = tmp_path.glob("my runs=[[]1]/diffusion-synthetic/*/checkpoints/best.ckpt")
    again = run(tmp_path, "task=test", f"checkpoint={checkpoint}", "trainer.limit_test_batches=1")
    assert again.returncode == 0, again.stderr
    first = checkpoint.parent.parent / "test_images.csv"
    (second,) = tmp_path.glob("runs/test/*/test_images.csv")
    assert first.read_text() == second.read_text()


def test_two_processes_train_together_and_test_as_one_does(tmp_path):
    places = ("paths.cache=my (cache)", "paths.runs=a=b, c")
    done = run(tmp_path, "debug=fast", "trainer.devices=2", "datamodule.num_samples=25", *places)
    assert done.returncode == 0, done.stderr
    (checkpoint,) = tmp_path.glob("a=b, c/diffusion-synthetic/*/checkpoints/best.ckpt")
    batch = json.loads((checkpoint.parent.parent / "results.json").read_text())["batch"]
    assert (batch["per_process"], batch["effective"]) == (1, 2)
    tables, scores = [], []
    for devices in (1, 2):
        runs = f"paths.runs={tmp_path}/{devices}"
        arguments = ("task=test", f"checkpoint={checkpoint}", "trainer.accelerator=cpu")
        done = run(tmp_path, *arguments, f"trainer.devices={devices}", runs)
        assert done.returncode == 0, done.stderr
        (folder,) = tmp_path.glob(f"{devices}/test/*")
        tables.append(read_images(folder))
        scores.append(json.loads((folder / "results.json").read_text())["test"])
    assert len(tables[0]) == 5, "an odd number"
    assert list(tables[1]) == list(tables[0])
    for image, values in tables[0].items():
        assert tables[1][image] == pytest.approx(values, rel=1e-3, abs=1e-6)
    assert scores[1] == pytest.approx(scores[0], rel=1e-6)
