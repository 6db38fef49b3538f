"""A run that was stopped, in whatever way, ends bit for bit as one that was not."""

import os
import shutil
import signal

import pytest
import torch

from common.errors import Interrupted
from common.runs import read_results
from lightning_modules import DiffusionSegmentation
from lightning_modules.callbacks import LastCheckpoint
from tasks import fit
from tiny_runs import timeless

SMALL = (
    "experiment=demo_teacher",
    "logger=csv",
    "trainer.accelerator=cpu",
    "trainer.log_every_n_steps=1",
    "trainer.enable_progress_bar=false",
    "datamodule.num_samples=57",  # 40 for training, 5 batches of 8
    "datamodule.batch_size=8",
    "datamodule.image_size=16",
    "callbacks.ema.update_after_step=3",
    "callbacks.plateau.patience=0",
)
TINY = (
    *SMALL,
    "network.kwargs.dim_x_mults=[1,1]",
    "network.kwargs.dim_g_mults=[1,1]",
    "lightning_module.validation.num_images=4",
)
# With dropout, which draws from the generator of the process.
ONE_PASS = (
    *SMALL[1:],
    "lightning_module=segmentation",
    "network=deeplabv3plus_resnet18",
    "network.weights=null",
)
EVERY, SECOND = (f"trainer.check_val_every_n_epoch={n}" for n in (1, 2))
EPOCHS = "trainer.max_epochs={}".format


@pytest.fixture
def train(make_config, tmp_path):
    """Trains into a folder of its own, from the start or on from where it stopped."""

    def run(folder, *overrides, resume=False, settings=TINY):
        place = tmp_path / "runs" / folder / "2026-01-01"
        config = make_config(
            *settings,
            f"hydra.runtime.output_dir={place}",
            *overrides,
            *([f"resume={place}"] if resume else []),
        )
        fit.run(config)
        return place

    return run


def outcome(folder):
    """Return everything that must not depend on whether the run was stopped."""
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    last = "state_dict", "current_model_state", "averaging_state", "optimizer_states", "global_step"
    parts = {key: checkpoint[key] for key in (*last, "random_state")}
    parts["callbacks"] = {
        name: state
        for name, state in checkpoint["callbacks"].items()
        if "Plateau" in name or "EMA" in name
    }
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"]
    parts["batches"] = progress
    results = read_results(folder)
    scores = {key: results[key] for key in ("val", "test", "status")}
    return parts, scores, timeless(folder / "metrics.csv"), (folder / "test_images.csv").read_text()


def assert_equal(one, two, where=""):
    assert type(one) is type(two), where
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, two), where
    elif isinstance(one, dict):
        assert one.keys() == two.keys(), where
        for key in one:
            assert_equal(one[key], two[key], f"{where}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(two), where
        for index, (a, b) in enumerate(zip(one, two, strict=True)):
            assert_equal(a, b, f"{where}/{index}")
    else:
        assert one == two, where


@pytest.mark.parametrize(
    ("straight", "stopped", "resumed"),
    [
        pytest.param(
            [EVERY, EPOCHS(3)],
            [EVERY, EPOCHS(1)],
            [EPOCHS(3)],
            id="after an epoch",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            [SECOND, EPOCHS(4)], [SECOND, EPOCHS(1)], [EPOCHS(4)], id="between validations"
        ),
        pytest.param(
            [EVERY, EPOCHS(3)],
            [EVERY, EPOCHS(3), "trainer.max_steps=7"],
            ["trainer.max_steps=-1"],
            id="within an epoch",
        ),
        pytest.param(
            [SECOND, "trainer.max_steps=18"],
            [SECOND, "trainer.max_steps=5"],
            ["trainer.max_steps=18"],
            id="by steps, after an epoch",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            [EVERY, "trainer.max_steps=13"],
            [EVERY, "trainer.max_steps=10"],
            ["trainer.max_steps=13"],
            id="by steps, after a validation",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            [EVERY, EPOCHS(3), "datamodule.num_workers=2"],
            [EVERY, EPOCHS(3), "datamodule.num_workers=2", "trainer.max_steps=7"],
            ["trainer.max_steps=-1"],
            id="with loader processes",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            [EVERY, EPOCHS(3), "trainer.accumulate_grad_batches=2"],
            [EVERY, EPOCHS(3), "trainer.accumulate_grad_batches=2", "trainer.max_steps=4"],
            ["trainer.max_steps=-1"],
            id="with accumulated gradients",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            [EVERY, EPOCHS(2), "trainer.val_check_interval=2"],
            [EVERY, EPOCHS(2), "trainer.val_check_interval=2", "trainer.max_steps=3"],
            ["trainer.max_steps=-1"],
            id="with validations within an epoch",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_resumed_run_ends_as_one_that_never_stopped(train, straight, stopped, resumed):
    expected = outcome(train("straight", *straight))
    train("stopped", *stopped)
    assert_equal(outcome(train("stopped", *resumed, resume=True)), expected)


def test_a_resumed_run_of_one_pass_ends_as_one_that_never_stopped(train):
    steps = (EVERY, "trainer.max_steps=4"), (EVERY, "trainer.max_steps=2")
    expected = outcome(train("straight", *steps[0], settings=ONE_PASS))
    train("stopped", *steps[1], settings=ONE_PASS)
    resumed = train("stopped", steps[0][1], resume=True, settings=ONE_PASS)
    assert_equal(outcome(resumed), expected)


def kill_at(monkeypatch, step, calls, signum):
    """Send a signal to this process within a given call of a step, once."""
    original = getattr(DiffusionSegmentation, step)
    seen = []

    def stepping(self, batch, batch_idx):
        seen.append(batch_idx)
        if len(seen) == calls:
            os.kill(os.getpid(), signum)
        return original(self, batch, batch_idx)

    monkeypatch.setattr(DiffusionSegmentation, step, stepping)


@pytest.mark.parametrize(
    "signum", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    ("step", "calls", "schedule"),
    [
        pytest.param("training_step", 7, EVERY, id="within an epoch"),
        pytest.param("training_step", 10, EVERY, id="before a validation", marks=pytest.mark.slow),
        pytest.param("training_step", 5, SECOND, id="after an epoch", marks=pytest.mark.slow),
        pytest.param("validation_step", 2, EVERY, id="within a validation"),
        pytest.param(
            "validation_step",
            1,
            "trainer.check_val_every_n_epoch=9",
            id="at the end",
            marks=pytest.mark.slow,
        ),
        pytest.param("test_step", 1, EVERY, id="within the test", marks=pytest.mark.slow),
    ],
)
def test_a_signalled_run_goes_on_as_if_nothing_had_been(
    train, monkeypatch, signum, step, calls, schedule
):
    expected = outcome(train("straight", schedule, EPOCHS(4)))
    with monkeypatch.context() as patch:
        kill_at(patch, step, calls, signum)
        with pytest.raises(Interrupted):
            train("stopped", schedule, EPOCHS(4))
    folder = train("stopped", resume=True)
    assert_equal(outcome(folder), expected)
    assert not [p for p in folder.rglob("*") if p.name.startswith(".")], "nothing half-written"


def test_an_interrupted_run_says_so(train, monkeypatch, tmp_path):
    kill_at(monkeypatch, "training_step", 2, signal.SIGTERM)
    with pytest.raises(Interrupted):
        train("stopped", EVERY, EPOCHS(1))
    results = read_results(tmp_path / "runs/stopped/2026-01-01")
    assert (results["status"], results["reason"]) == ("failed", "Interrupted: stopped by SIGTERM")


def test_a_student_goes_on_with_its_own_teacher(train, tmp_path):
    teacher = train("demo_teacher", EVERY, EPOCHS(1))
    student = ("experiment=demo_efkd", EVERY)
    expected = outcome(train("straight", *student, EPOCHS(2)))
    train("stopped", *student, EPOCHS(1))
    newer = shutil.copytree(teacher, teacher.with_name("2026-02-02"))
    path = newer / "checkpoints" / "best.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    zeros = {key: torch.zeros_like(value) for key, value in checkpoint["state_dict"].items()}
    torch.save(checkpoint | {"state_dict": zeros}, path)
    assert_equal(outcome(train("stopped", *student[:1], EPOCHS(2), resume=True)), expected)
    other = outcome(train("other", *student, EPOCHS(2)))
    assert other[2] != expected[2], "a new run takes the newer one"


def test_a_time_limit_counts_from_the_resumed_command(train):
    folder = train("stopped", EVERY, EPOCHS(50), "trainer.max_time=00:00:00:01")
    first = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    train("stopped", resume=True)
    second = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert 0 < first < second < 250


@pytest.mark.parametrize(
    ("count", "extra"),
    [
        pytest.param(2, (), id="within an epoch", marks=pytest.mark.slow),
        pytest.param(4, (), id="before its last batch"),
        pytest.param(
            1,
            ("trainer.accumulate_grad_batches=2",),
            id="with accumulated gradients",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_checkpoint_between_validations_is_enough_after_a_kill(train, monkeypatch, count, extra):
    often = ("callbacks.last.every_minutes=1e-9", EPOCHS(2), *extra)
    expected = outcome(train("straight", *often))
    saved = []

    class Killed(BaseException):
        pass

    original = LastCheckpoint._save

    def save(self, trainer, **state):
        original(self, trainer, **state)
        saved.append(state.get("batch_begun", False))
        if sum(saved) == count:
            # Nothing is written any more, as after SIGKILL.
            monkeypatch.setattr("lightning_modules.callbacks.MetricsFile.write", lambda self: None)
            raise Killed

    monkeypatch.setattr(LastCheckpoint, "_save", save)
    with pytest.raises(Killed):
        train("killed", *often)
    monkeypatch.undo()
    assert saved[-1], "within an epoch"
    assert_equal(outcome(train("killed", *often, resume=True)), expected)
