"""Outputs from the inside of a network, by module path and without a change to its code."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from difflib import get_close_matches
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import UserError

__all__ = ["check_paths", "feature_channels", "watch"]


def check_paths(network: nn.Module, paths: Mapping[str, str], key: str) -> None:
    """Refuse paths at which a network has no module.

    Args:
        network: whose modules are looked up.
        paths: name to path, such as `{aspp: head.aspp}`.
        key: the config key that holds them, for the message.

    Raises:
        UserError: there is no such module; the message has the paths most like it.
    """
    known = [path for path, _ in network.named_modules() if path]
    for name, path in paths.items():
        if path not in known:
            # A path that is too deep or misspelt at its end is still known up to there.
            like = get_close_matches(path, known, n=4, cutoff=0.3) or known[:4]
            raise UserError(
                f"{key}.{name}={path} is no module of {type(network).__name__}; "
                f"choose the path of one, such as {', '.join(like)}."
            )


@contextmanager
def watch(network: nn.Module, paths: Mapping[str, str]) -> Iterator[dict[str, Tensor]]:
    """Collect what some modules of a network return while the context is open.

    The hooks are gone when it is left, and what was collected goes with the last reference to it.

    Args:
        network: called within the context, once.
        paths: name to the module's path.

    Returns:
        The outputs by name, empty until the network was called.
    """
    outputs: dict[str, Tensor] = {}

    def note(name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        outputs[name] = output

    with ExitStack() as stack:
        for name, path in paths.items():
            handle = network.get_submodule(path).register_forward_hook(partial(note, name))
            stack.callback(handle.remove)
        yield outputs


def feature_channels(network: nn.Module, paths: Mapping[str, str], key: str) -> dict[str, int]:
    """Return how many channels the watched modules of a network give, by name.

    The network is called without its weights, which costs next to nothing.

    Args:
        network: `network(image)`.
        paths, key: as in `check_paths`.

    Raises:
        UserError: a module does not return one feature map `(B, C, h, w)`.
    """
    # A multiple of what any network here wants of an image's side.
    image = torch.empty(2, 3, 64, 64, device="meta")
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    weightless = {name: tensor.detach().to("meta") for name, tensor in tensors.items()}
    with torch.no_grad(), watch(network, paths) as outputs:
        torch.func.functional_call(network, weightless, (image,))
    for name, path in paths.items():
        if not isinstance(outputs.get(name), Tensor) or outputs[name].ndim != 4:
            raise UserError(
                f"{key}.{name}={path} gives no feature map; choose a module that returns one."
            )
    return {name: output.shape[1] for name, output in outputs.items()}
