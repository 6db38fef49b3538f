"""Choices of groups are checked before Hydra composes anything."""

from pathlib import Path

import pytest

from common.choices import check_choices, explain_key, leave_to_jobs
from common.errors import UserError

CONF = Path(__file__).resolve().parent.parent.parent / "conf"
GROUPS = sorted(path.name for path in CONF.iterdir() if path.is_dir() and path.name != "hydra")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["experiment=efkd_ph2", "seed=0,1"], ["experiment=efkd_ph2", "seed=0,1"]),
        (["+experiment=efkd_ph2"], ["experiment=efkd_ph2"]),
        (["logger=null"], ["logger=none"]),
        (["~callbacks"], ["callbacks=none"]),
        (["-m", "logger=null,csv"], ["-m", "logger=none,csv"]),
        (["experiment=efkd_ph2", "debug=null", "experiment=null"], []),
        (["-m", "sampler=choice(ddim,ddpm)"], ["-m", "sampler=choice(ddim,ddpm)"]),
        (["--config-dir", "mine", "sampler=own"], ["--config-dir", "mine", "sampler=own"]),
        (["hydra/launcher=slurm", "trainer.strategy=null"],) * 2,
        (["network=dermosegdiff (small)"],) * 2,
    ],
)
def test_known_choices_are_as_hydra_takes_them(arguments, expected):
    assert check_choices(arguments, CONF) == expected


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("form", ["{}=null", "~{}", "{}=Null"])
def test_nothing_is_a_choice_or_is_refused_in_every_group(group, form):
    argument = form.format(group)
    if group in ("experiment", "debug", "sweep"):
        assert check_choices([argument], CONF) == []
    elif (CONF / group / "none.yaml").is_file():
        assert check_choices([argument], CONF) == [f"{group}=none"]
    else:
        with pytest.raises(UserError, match=f"{group}=null is no choice here; choose one of "):
            check_choices([argument], CONF)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("form", ["{}=zzz", "+{}=zzz", "{}=_images,zzz", "{}=choice(zzz)", "{}=''"])
def test_unknown_choices_of_every_group_are_refused(group, form):
    with pytest.raises(UserError, match=f"{group}=(zzz|_images|) does not exist"):
        check_choices([form.format(group)], CONF)


@pytest.mark.parametrize(
    ("argument", "near"),
    [
        ("debug=fats", "nearest is fast"),
        ("debug=FAST", "debug=FAST does not exist; the nearest is fast"),
        ("debug=false", "debug=false does not exist"),
        ("sweep=edge_treshold", "nearest is edge_threshold"),
        ("sampler=ddim,ddpmm", "ddpmm does not exist; the nearest is ddpm"),
        ("experiment=efkd_isic2081", "such as efkd_isic2018, "),
        ("network=_dermosegdiff", "nearest is dermosegdiff"),
        ("experiment=null,efkd_ph2", "experiment=null cannot be one of several"),
        ("hydra/launcher=null", "hydra/launcher=null is no choice"),
        ("~hydra", "hydra=null is no choice"),
    ],
)
def test_the_nearest_choices_are_named(argument, near):
    with pytest.raises(UserError, match=near):
        check_choices([argument], CONF)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("datmodule", "datmodule does not exist; the nearest keys are datamodule"),
        ("datamodule.imagesize", "nearest keys are datamodule.image_size, "),
        ("lightning_module.losses.boundry.weight", "lightning_module.losses.boundary.weight"),
        ("output_format", "output_format belongs to another choice, such as task=predict"),
        ("callbacks.ema.beta", "callbacks.ema={_target_:lightning_modules.callbacks.EMA,beta:"),
        ("network.weights", "network.weights belongs to another choice, such as network="),
        ("teacher.sampler.num_steps", "give teacher.sampler={num_steps:<value>}"),
        ("lightning_module.losses.efkd.weight", "such as lightning_module=efkd"),
        ("datamodule.annotators", "such as datamodule=mediqa_magic"),
        ("datamodule.soft_masks", "datamodule.soft_masks is now datamodule.mask_resize, "),
        ("zzzzzz", "zzzzzz does not exist"),
    ],
)
def test_a_key_is_explained(key, message):
    assert message in explain_key(key, CONF)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            [
                "-m",
                "experiment=efkd_ph2,efkd_isic2018",
                "network.kwargs.dim=8",
                "trainer.devices=2",
            ],
            ["network.kwargs.dim=choice(8)", "trainer.devices=2"],
        ),
        (
            [
                "-m",
                "lightning_module=rkd,blkd",
                "lightning_module.optimizer={lr:1}",
                "paths.runs=x",
            ],
            ["lightning_module.optimizer=choice({lr:1})", "paths.runs=x"],
        ),
        (["-m", "seed=0,1", "network.kwargs.dim=8"], ["network.kwargs.dim=8"]),
        (["-m", "network=unet,smp", "+network.x=1", "~network.y", "network.z=1,2"],) * 2,
        (["-m", "datamodule=ph2,folder", "datamodule.root=a"], ["datamodule.root=choice(a)"]),
    ],
)
def test_keys_of_varying_choices_are_left_to_the_jobs(arguments, expected):
    count = len(expected)
    assert leave_to_jobs(arguments, CONF) == [*arguments[: len(arguments) - count], *expected]
