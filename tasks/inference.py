"""Makes a module's network as fast as it can be, where it need not learn any more."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn

from common.errors import UserError

__all__ = ["accelerate", "refuse_metadata"]


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
    if settings["compile"] and hasattr(network, "guidance"):
        # Masks are sampled by the parts of such a network.
        network.guidance.compile()
        network.denoiser.compile()
    elif settings["compile"]:
        network = torch.compile(network)
    module.network = network


def refuse_metadata(network: nn.Module, path: str | Path) -> None:
    """Refuse a network that needs more than a photograph.

    Raises:
        UserError: it takes metadata, which photographs do not bring.
    """
    if getattr(network, "metadata_inputs", 0):
        raise UserError(
            f"The network in {path} also needs {network.metadata_inputs} numbers of metadata, "
            "which a photograph does not have; train one with datamodule.metadata=false."
        )
