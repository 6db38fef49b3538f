"""Makes a module's network as fast as it can be, where it need not learn any more."""

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch

__all__ = ["accelerate"]


def accelerate(module: L.LightningModule, settings: Mapping[str, Any]) -> None:
    """Replace a module's network by one that computes the same faster.

    Args:
        module: with a `network`; its precision is the Trainer's matter.
        settings: `fold` computes once what does not depend on the image, where the network can
            (`folded`); `channels_last` orders the memory of its kernels that way; `compile` has
            `torch.compile` translate it, which takes a minute or more at the first call.
    """
    network = module.network
    if settings["fold"] and hasattr(network, "folded"):
        schedule = getattr(module, "schedule", None)
        network = network.folded(*([] if schedule is None else [schedule.num_timesteps]))
    network = network.eval()
    if settings["channels_last"]:
        network = network.to(memory_format=torch.channels_last)
    if settings["compile"]:
        network = torch.compile(network)
    module.network = network
