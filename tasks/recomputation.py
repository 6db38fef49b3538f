"""Computes activations again in the backward pass, so that they need not be kept until then."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint

__all__ = ["recompute_activations"]

_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)


def recompute_activations(network: nn.Module) -> list[str]:
    """Have the blocks of a network keep nothing but their inputs for the backward pass.

    Loss, gradients, statistics and dropout stay what they are, and so do the keys of the state
    dict. It costs a second forward pass. It acts in training mode, where gradients are asked for.

    Args:
        network: of any kind; a copy of it does as it does, with its own weights.

    Returns:
        The paths of the blocks: the residual blocks, attentions and pairs of convolutions.
    """
    blocks = dict(_blocks(network, ""))
    for block in blocks.values():
        block.forward = MethodType(_forward, block)
    return list(blocks)


def _blocks(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """Find the modules of several layers whose parts have for the most part only one each."""
    for name, part in _parts(module):
        below, layers = f"{path}{name}", _layers(part)
        in_larger_parts = sum(count for _, p in _parts(part) if (count := _layers(p)) > 1)
        # Less than that are the gates of a block, not its stages.
        if in_larger_parts > 0.75 * layers:
            yield from _blocks(part, f"{below}.")
        elif layers > 1 and "forward" not in vars(part):
            yield below, part


def _parts(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Return the children by name, and in place of a list of modules, which nobody calls, its."""
    for name, child in module.named_children():
        if type(child) in (nn.ModuleDict, nn.ModuleList):
            yield from ((f"{name}.{below}", part) for below, part in _parts(child))
        else:
            yield name, child


def _layers(module: nn.Module) -> int:
    return sum(isinstance(part, _LAYERS) for part in module.modules())


def _forward(block: nn.Module, *args: Any, **settings: Any) -> Any:
    forward = partial(type(block).forward, block)
    if not (block.training and torch.is_grad_enabled()):
        return forward(*args, **settings)
    contexts = partial(_contexts, block)
    # Some networks, such as DenseNets, go on to fill the list that they have given a block.
    args = tuple(list(value) if isinstance(value, list) else value for value in args)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **settings)


def _contexts(block: nn.Module) -> tuple[AbstractContextManager, AbstractContextManager]:
    return nullcontext(), _still_statistics(block)


@contextmanager
def _still_statistics(block: nn.Module) -> Iterator[None]:
    """Keep the running statistics of a block, which have seen its input already."""
    layers = [m for m in block.modules() if isinstance(m, _NormBase) and m.track_running_stats]
    before = [(layer.momentum, layer.num_batches_tracked.clone()) for layer in layers]
    try:
        for layer in layers:
            layer.momentum = 0.0
        yield
    finally:
        for layer, (momentum, tracked) in zip(layers, before, strict=True):
            layer.momentum = momentum
            layer.num_batches_tracked.copy_(tracked)
