"""Which run is resumed, and with which config."""

import pytest
import yaml

from common.errors import UserError
from common.runs import write_results
from datamodules.splits import write_split
from tasks.configuration import set_value
from tasks.resume import check_same_data, goes_on, resumed_config, run_folder


@pytest.fixture
def stopped(make_config, tmp_path):
    """A stopped run of demo_teacher with seed 3; returns its folder."""
    config = make_config(
        "experiment=demo_teacher", "seed=3", "trainer.max_epochs=5", "logger=wandb"
    )
    config["logger"]["wandb"]["id"] = "abcd1234"
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "last.ckpt").touch()
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def test_a_new_run_has_a_folder_of_its_own():
    assert run_folder(None, "runs", "demo", "12:00") == "runs/demo/12:00"


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"has no checkpoints/last.ckpt to go on from"):
        run_folder(str(tmp_path), "runs", "demo", "12:00")


def make_runs(tmp_path, *names):
    for name in names:
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        (tmp_path / name / "checkpoints" / "last.ckpt").touch()


def test_latest_is_the_newest_run_that_can_go_on(make_config, tmp_path):
    make_config()
    make_runs(tmp_path, "a/2026-01-03", "b/2026-01-05")
    (tmp_path / "a" / "2026-01-09").mkdir()
    assert run_folder("latest", str(tmp_path), "a", "x") == str(tmp_path / "b/2026-01-05")
    make_config("experiment=demo_teacher")
    assert run_folder("latest", str(tmp_path), "a", "x") == str(tmp_path / "a/2026-01-03")
    with pytest.raises(UserError, match=r"finds no run .*/c/\* or .*/c-\*/\*; leave resume"):
        run_folder("latest", str(tmp_path), "c", "x")


def test_latest_is_of_the_dataset_that_is_given(make_config, tmp_path):
    make_runs(tmp_path, "a/2026-01-03", "a-clinic/2026-01-05", "ab/2026-01-09")
    make_config("experiment=demo_teacher")
    assert run_folder("latest", str(tmp_path), "a", "x") == str(tmp_path / "a-clinic/2026-01-05")
    make_config("experiment=demo_teacher", "datamodule=synthetic")
    assert run_folder("latest", str(tmp_path), "a", "x") == str(tmp_path / "a/2026-01-03")


def test_latest_without_an_experiment_is_of_the_command(make_config, tmp_path):
    make_runs(tmp_path, "segmentation-synthetic/2026-01-03", "a/2026-01-05")
    make_config("lightning_module=segmentation", "trainer.max_epochs=2")
    found = run_folder("latest", str(tmp_path), "segmentation-synthetic", "x")
    assert found == str(tmp_path / "segmentation-synthetic/2026-01-03")
    make_config("trainer.max_epochs=2", "logger=csv")
    found = run_folder("latest", str(tmp_path), "diffusion-synthetic", "x")
    assert found == str(tmp_path / "a/2026-01-05")


def test_a_run_on_own_data_goes_on_without_naming_it(stopped, make_config):
    path = stopped / "config.yaml"
    chosen = ("experiment=demo_unet_teacher", "datamodule=folder", "datamodule.root=x/my clinic")
    stored = make_config(*chosen)
    assert (stored["run_name"], stored["data_label"]) == (
        "demo_unet_teacher-my-clinic",
        "my-clinic",
    )
    path.write_text(yaml.safe_dump(stored))
    for given in (chosen[:1], chosen, ()):
        config = resumed_config(make_config(*given, f"resume={stopped}"))
        assert config["run_name"] == "demo_unet_teacher-my-clinic"
    config = resumed_config(make_config(f"resume={stopped}", "datamodule.root=moved/my clinic"))
    assert config["datamodule"]["root"] == "moved/my clinic"
    with pytest.raises(UserError, match="experiment=demo_teacher cannot change"):
        resumed_config(make_config("experiment=demo_teacher", f"resume={stopped}"))


def test_latest_is_of_the_folder_that_is_given(make_config, tmp_path):
    make_runs(tmp_path, "a-skin/2026-01-03", "a-skin/2026-01-05")
    for name, root in (("2026-01-03", "one/skin"), ("2026-01-05", "two/skin")):
        text = yaml.safe_dump({"datamodule": {"root": root}})
        (tmp_path / "a-skin" / name / "config.yaml").write_text(text)
    for root, expected in (("one/skin", "03"), ("two/skin", "05"), ("three/skin", "05")):
        make_config("experiment=demo_teacher", "datamodule=folder", f"datamodule.root={root}")
        found = run_folder("latest", str(tmp_path), "a-skin", "x")
        assert found == str(tmp_path / f"a-skin/2026-01-{expected}")


def test_the_run_keeps_its_config(stopped, make_config):
    config = resumed_config(make_config(f"resume={stopped}"))
    assert config["seed"] == config["lightning_module"]["seed"] == 3
    assert config["trainer"]["max_epochs"] == 5
    assert config["resume"] == str(stopped)


def test_a_run_of_a_version_without_a_group_goes_on(stopped, make_config):
    path = stopped / "config.yaml"
    stored = yaml.safe_load(path.read_text())
    del stored["training"]
    path.write_text(yaml.safe_dump(stored))
    assert resumed_config(make_config(f"resume={stopped}"))["training"]["compile"] is False


def test_the_command_that_started_it_goes_on_with_it(stopped, make_config):
    config = resumed_config(
        make_config("experiment=demo_teacher", "seed=3", "trainer.max_epochs=5", "resume=latest")
    )
    assert config["seed"] == 3


def test_trainer_and_logger_may_be_given_anew(stopped, make_config):
    config = resumed_config(
        make_config(
            f"resume={stopped}",
            "trainer.max_epochs=9",
            "logger=tensorboard",
            "paths.data=/mnt/data",
            "datamodule.num_workers=7",
        )
    )
    assert config["trainer"]["max_epochs"] == 9
    assert config["trainer"]["check_val_every_n_epoch"] == 8, "as the experiment has it"
    assert set(config["logger"]) == {"csv", "tensorboard"}
    assert config["datamodule"]["num_workers"] == 7


def test_a_resumed_run_is_one_run_in_wandb(stopped, make_config):
    for logger in ("logger=wandb", "seed=3"):
        config = resumed_config(make_config(f"resume={stopped}", logger))
        assert config["logger"]["wandb"]["id"] == "abcd1234"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=4", "seed=4 cannot change the run .*, which has 3"),
        ("experiment=demo_efkd", "experiment=demo_efkd cannot change .*demo_teacher"),
        ("lightning_module.optimizer.lr=1.0", "optimizer.lr=1.0 cannot change .* 0.001"),
        ("network=lite_dermosegdiff_tiny", r"network\..* cannot change"),
        ("debug=limit", "debug=limit cannot change .* None"),
        ("schedule=cosine", "schedule.mode=cosine cannot change"),
    ],
)
def test_what_it_learns_cannot_change(stopped, make_config, override, message):
    with pytest.raises(UserError, match=message):
        resumed_config(make_config(f"resume={stopped}", override))


def test_a_moved_run_writes_where_it_is(stopped, make_config, tmp_path):
    moved = stopped.rename(tmp_path / "elsewhere")
    config = resumed_config(
        make_config(f"resume={moved}", f"hydra.runtime.output_dir={moved}", "paths.runs=x")
    )
    assert config["callbacks"]["last"]["folder"] == str(moved)
    assert config["callbacks"]["best"]["dirpath"] == f"{moved}/checkpoints"
    assert config["logger"]["csv"]["folder"] == config["paths"]["run"] == str(moved)


def test_the_data_may_lie_elsewhere(make_config, tmp_path):
    config = make_config("experiment=teacher_isic2018", "paths.data=old", "paths.cache=was")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    given = ("experiment=teacher_isic2018", "resume=x", "paths.data=new", "paths.cache=is")
    data = resumed_config(make_config(*given))["datamodule"]
    assert (data["root"], data["cache"]) == ("new/isic2018", "is")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("a: [", "cannot be read"),
        ("a: 2026-13-45", "cannot be read"),
        ("task: test", "is no training run"),
    ],
)
def test_a_folder_without_a_usable_config_is_refused(stopped, make_config, content, message):
    (stopped / "config.yaml").unlink()
    if content is not None:
        (stopped / "config.yaml").write_text(content)
    with pytest.raises(UserError, match=message):
        resumed_config(make_config(f"resume={stopped}"))


def test_other_data_is_refused(tmp_path):
    check_same_data(tmp_path, "new", {})
    write_results(tmp_path, {"schema": 1, "data": {"split_sha": "old"}})
    check_same_data(tmp_path, "old", {})
    with pytest.raises(UserError, match=r"split new, then old"):
        check_same_data(tmp_path, "new", {})
    parts, digests = {"a": "train", "b": "test"}, {"a": "0" * 16, "b": "1" * 16}
    write_split(tmp_path / "splits.csv", parts, digests)
    check_same_data(tmp_path, "old", digests)
    with pytest.raises(UserError, match=r"1 images, first b, are not those"):
        check_same_data(tmp_path, "old", digests | {"b": "2" * 16})


def test_a_job_that_was_queued_again_goes_on_in_its_folder(tmp_path, monkeypatch):
    make_runs(tmp_path, "a/2026-01-03", "a/2026-01-04", "a/2026-01-05", "b/2026-01-06")
    for name, job in (("a/2026-01-03", 6), ("a/2026-01-04", 7), ("a/2026-01-05", 8)):
        write_results(tmp_path / name, {"schema": 1, "job": f"slurm {job}"})
    write_results(tmp_path / "b/2026-01-06", {"schema": 1, "job": "slurm 7"})
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    arguments = (None, str(tmp_path), "a", "now")
    assert run_folder(*arguments) == str(tmp_path / "a/now"), "it is the first time"
    config = {"resume": None, "paths": {"run": str(tmp_path / "a/2026-01-04")}}
    assert not goes_on(config)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert run_folder(*arguments) == str(tmp_path / "a/2026-01-04")
    assert goes_on(config)
    assert config["resume"] == str(tmp_path / "a/2026-01-04")
    # It was stopped before there was anything to go on from.
    assert not goes_on({"resume": None, "paths": {"run": str(tmp_path / "none")}})


def test_a_run_is_refused_where_nothing_can_be_written(tmp_path):
    (tmp_path / "runs").touch()
    with pytest.raises(UserError, match=r"choose another place with paths\.runs"):
        run_folder(None, str(tmp_path / "runs"), "a", "now")


EVIL = {"_target_": "sympy.sympify", "a": "print(1)"}


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("callbacks.zz", EVIL, r"callbacks\.zz\._target_=sympy\.sympify"),
        ("logger.zz", EVIL, r"logger\.zz\._target_=sympy\.sympify"),
        ("trainer._target_", "os.system", r"trainer\._target_=os\.system"),
        ("trainer.strategy", EVIL, r"trainer\.strategy\._target_=sympy"),
        ("trainer.plugins", [1, {"a": EVIL}], r"trainer\.plugins\[1\]\.a\._target_=sympy"),
        ("callbacks.ema.beta", EVIL, r"callbacks\.ema\.beta\._target_=sympy"),
        ("callbacks.ema._target_", {"a": 1}, r"callbacks\.ema\._target_="),
        (
            "callbacks.zz",
            {"_target_": "lightning.pytorch.callbacks.model_checkpoint.os.system"},
            r"callbacks\.zz\._target_=lightning\.",
        ),
        ("callbacks.zz", {"_target_": "lightning.pytorch.callbacks.timer"}, r"callbacks\.zz"),
        (
            "callbacks.ema.beta",
            "${oc.decode:'{_target_: sympy.sympify, a: print(1)}'}",
            r"callbacks\.ema\.beta",
        ),
    ],
)
def test_a_stored_config_runs_no_foreign_code(stopped, make_config, key, value, named):
    path = stopped / "config.yaml"
    stored = yaml.safe_load(path.read_text())
    set_value(stored, key, value)
    path.write_text(yaml.safe_dump(stored))
    with pytest.raises(UserError, match=named):
        resumed_config(make_config(f"resume={stopped}"))


def test_classes_of_lightning_and_those_of_the_command_line_are_used(stopped, make_config):
    path = stopped / "config.yaml"
    stored = yaml.safe_load(path.read_text())
    stored["callbacks"]["rate"] = {"_target_": "lightning.pytorch.callbacks.LearningRateMonitor"}
    stored["callbacks"]["mine"] = {"_target_": "my_package.Mine"}
    path.write_text(yaml.safe_dump(stored))
    with pytest.raises(UserError, match=r"callbacks\.mine"):
        resumed_config(make_config(f"resume={stopped}"))
    given = "+callbacks.mine={_target_:my_package.Mine}"
    callbacks = resumed_config(make_config(f"resume={stopped}", given))["callbacks"]
    assert callbacks["mine"]["_target_"] == "my_package.Mine"
    assert callbacks["rate"]["_target_"].endswith("LearningRateMonitor")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("callbacks", 3),
        ("callbacks.ema", "x"),
        ("trainer", []),
        ("datamodule", None),
        ("paths", "x"),
        ("paths.run", 5),
        ("run_name", None),
        ("network", ""),
    ],
)
def test_a_damaged_config_is_refused_by_its_key(stopped, make_config, key, value):
    path = stopped / "config.yaml"
    stored = yaml.safe_load(path.read_text())
    set_value(stored, key, value)
    path.write_text(yaml.safe_dump(stored))
    with pytest.raises(UserError, match=rf"config\.yaml.*{key}"):
        resumed_config(make_config(f"resume={stopped}"))
