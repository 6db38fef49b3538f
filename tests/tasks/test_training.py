"""The Trainer of a run: which strategies it has, and how BatchNorm is shared."""

import pytest
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from common.errors import UserError
from tasks.batch_norm import SyncedBatchNorm
from tasks.training import build_trainer

QUIET = ("logger=none", "callbacks=none", "trainer.accelerator=cpu")


@pytest.mark.parametrize(
    "strategy",
    [
        *("fsdp", "fsdp_cpu_offload", "deepspeed", "deepspeed_stage_3_offload", "ddp_spawn"),
        *("ddp_fork_find_unused_parameters_true", "ddp_notebook", "xla", "dp", "null"),
        "{_target_:lightning.pytorch.strategies.FSDPStrategy}",
    ],
)
def test_strategies_that_break_a_promise_are_refused(make_config, strategy):
    config = make_config(*QUIET, f"trainer.strategy={strategy}")
    with pytest.raises(UserError, match=r"trainer\.strategy=.* is not supported: the moving aver"):
        build_trainer(config)


@pytest.mark.parametrize(
    ("strategy", "devices", "cls", "unused"),
    [
        ("auto", 1, SingleDeviceStrategy, None),
        ("auto", 2, DDPStrategy, None),
        ("ddp", 2, DDPStrategy, None),
        ("ddp_find_unused_parameters_true", 2, DDPStrategy, True),
        ("ddp_find_unused_parameters_false", 2, DDPStrategy, False),
        (
            *("{_target_:lightning.pytorch.strategies.DDPStrategy,find_unused_parameters:true}", 2),
            *(DDPStrategy, True),
        ),
    ],
)
@pytest.mark.parametrize("sync", [True, False])
def test_the_others_share_batch_norm_unless_told_otherwise(
    make_config, strategy, devices, cls, unused, sync
):
    overrides = (f"trainer.strategy={strategy}", f"trainer.devices={devices}")
    config = make_config(*QUIET, *overrides, *(() if sync else ("trainer.sync_batchnorm=false",)))
    trainer = build_trainer(config)
    assert type(trainer.strategy) is cls
    if cls is DDPStrategy:
        assert trainer.strategy._ddp_kwargs.get("find_unused_parameters") == unused
        assert isinstance(trainer.strategy._layer_sync, SyncedBatchNorm) == sync
    assert config["trainer"]["sync_batchnorm"] == sync, "as it was recorded"
