"""Makes a training fast, or small: how its network computes, and the batch of each process."""

import math
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch

from common.errors import UserError, check_choice
from lightning_modules.teacher import FrozenTeacher
from tasks.inference import accelerate
from tasks.recomputation import recompute_activations

__all__ = ["accelerate_teacher", "accelerate_training", "check_fused", "plan_batch"]

_RULES = {"none": lambda k: 1.0, "linear": float, "sqrt": math.sqrt}


def check_fused(config: Mapping[str, Any]) -> None:
    """Refuse to clip gradients that a fused optimizer unscales itself.

    Raises:
        UserError: `16-mixed` precision, clipping and a fused optimizer come together.
    """
    fused = config["lightning_module"]["optimizer"].get("fused")
    trainer = config["trainer"]
    if fused and trainer["precision"] == "16-mixed" and trainer["gradient_clip_val"]:
        raise UserError(
            "lightning_module.optimizer.fused=true unscales the gradients of "
            "trainer.precision=16-mixed after they would be clipped; set one of them to "
            "another value, such as trainer.precision=bf16-mixed, or "
            "trainer.gradient_clip_val=null."
        )


def accelerate_training(module: L.LightningModule, settings: Mapping[str, Any]) -> None:
    """Set how a module's network is trained; what it learns stays the same up to rounding.

    Args:
        module: with a `network`, which stays the same object with the same keys.
        settings: `channels_last` orders the memory of its kernels that way, and with it that of all
            that they compute; `compile` has `torch.compile` translate it; `checkpointing` is
            `recompute_activations`; `tf32` shortens the factors of products to 10 bits, on
            processors that can.

    Raises:
        UserError: two that exclude each other.
    """
    if settings["compile"] and settings["checkpointing"]:
        raise UserError(
            "training.compile=true chooses itself what it keeps for the backward pass, so it does "
            "not go with training.checkpointing=true; set one of them to false."
        )
    network = module.network
    if settings["tf32"]:
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
    if settings["channels_last"]:
        network.to(memory_format=torch.channels_last)
    if settings["checkpointing"]:
        recompute_activations(network)
    if settings["compile"]:
        # Methods that take features from the inside of a network do so by hooks, now and then.
        torch._dynamo.config.skip_nnmodule_hook_guards = False
        # `torch.compile(network)` would change the keys of the state dict.
        network.compile()


def accelerate_teacher(teacher: FrozenTeacher, settings: Mapping[str, Any]) -> None:
    """Have a frozen teacher compute the same with less work.

    What does not depend on the image is computed once. Whatever takes the teacher's weights must
    have them before.

    Args:
        teacher: of a student that `accelerate_training` is for.
        settings: as there; `channels_last` and `compile` are for the teacher too.
    """
    chosen = {"fold": True, "channels_last": settings["channels_last"], "compile": False}
    for member in teacher.members:
        accelerate(member, chosen)
        if settings["compile"]:
            member.network.compile()


def resumed_batch(batch_size: int, rule: str, earlier: Mapping[str, Any] | None) -> int:
    """Return the batch size with which a run goes on: that of its steps until now.

    In earlier versions each process had `datamodule.batch_size` images under every rule.

    Args:
        batch_size, rule: of the run's config.
        earlier: what `plan_batch` returned when it was started, if that is known.
    """
    if not earlier or rule != "none" or earlier.get("per_process") != batch_size:
        return batch_size
    return batch_size * earlier["processes"]


def plan_batch(
    module: L.LightningModule, rule: str, batch_size: int, processes: int, accumulate: int
) -> dict[str, Any]:
    """Divide a batch among the processes, or scale a module's learning rate to a larger one.

    With `none` the processes share the images of `batch_size`, rounded up where they do not divide,
    and the rate stays. With the other rules each process has that many images, and the rate is that
    of the config times `k` or `sqrt(k)` for `k = processes * accumulate` times the images. Sources:
    Goyal et al., "Accurate, Large Minibatch SGD", 2017, for `linear`; Krizhevsky, "One weird trick
    for parallelizing convolutional neural networks", 2014, for `sqrt`.

    Args:
        module: with the `optimizer_settings` of the config.
        rule: `none`, `linear` or `sqrt`.
        batch_size: images for which the learning rate of the config is.
        processes: how many there are on all machines.
        accumulate: batches whose gradients are one step.

    Returns:
        For `results.json`: `per_process`, `processes`, `accumulate`, `effective` (their product,
        the images of an optimizer step), `scale_lr` and `lr`.

    Raises:
        UserError: there is no such rule.
    """
    check_choice("training.scale_lr", rule, _RULES)
    if rule == "none":
        batch_size = -(-batch_size // processes)
    rate = module.configure_optimizers().param_groups[0]["lr"] * _RULES[rule](
        processes * accumulate
    )
    module.optimizer_settings["lr"] = rate
    return {
        "per_process": batch_size,
        "processes": processes,
        "accumulate": accumulate,
        "effective": batch_size * processes * accumulate,
        "scale_lr": rule,
        "lr": rate,
    }
