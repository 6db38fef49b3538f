"""Optimizers by name."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from common.errors import UserError

__all__ = ["build_optimizer"]

OPTIMIZERS = ("Adam", "AdamW", "SGD")


def build_optimizer(
    parameters: Iterable[nn.Parameter], settings: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """Build an optimizer from config.

    Args:
        parameters: what is trained.
        settings: `name`, one of Adam, AdamW and SGD, and the optimizer's own arguments.

    Raises:
        UserError: an unknown name or argument, or a value that the optimizer refuses.
    """
    arguments = dict(settings)
    name = arguments.pop("name", None)
    if name not in OPTIMIZERS:
        raise UserError(
            f"lightning_module.optimizer.name={name} does not exist; "
            f"choose one of {', '.join(OPTIMIZERS)}."
        )
    if not arguments.get("fused"):
        arguments.setdefault("foreach", True)
    try:
        optimizer = getattr(torch.optim, name)(parameters, **arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"lightning_module.optimizer is refused by {name}: {error}") from error
    # The Trainer would hold the gradients until the next forward pass is done.
    optimizer.register_step_post_hook(lambda optimizer, *_: optimizer.zero_grad(set_to_none=True))
    return optimizer
