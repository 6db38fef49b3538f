"""Builds the objects of a run from its config, by name and never by a foreign `_target_`."""

import inspect
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import datamodules
import lightning_modules
import networks
from common.errors import UserError
from common.rooms import look_up
from lightning_modules import processes
from lightning_modules.processes import NoiseSchedule
from lightning_modules.processes.samplers import Sampler
from lightning_modules.teacher import FrozenTeacher

__all__ = [
    "build_datamodule",
    "build_module",
    "build_network",
    "describe_network",
    "giga_macs",
    "takes_teacher",
]

Config = Mapping[str, Any]


def build_network(config: Config) -> nn.Module:
    """Build a network from `{name, kwargs}`; the name is looked up in `networks.__all__`."""
    cls = look_up(networks, config.get("name"), "network.name")
    return _construct(cls, config.get("kwargs") or {}, "network.kwargs")


def build_datamodule(config: Config) -> L.LightningDataModule:
    """Build a datamodule from `{name, **arguments}`."""
    return _construct_named(datamodules, config, "datamodule")


def build_module(
    config: Config, network: nn.Module, teacher: FrozenTeacher | None = None
) -> L.LightningModule:
    """Build the LightningModule of a run's config around a network.

    Args:
        config: with `lightning_module`, `schedule` and `sampler`.
        network: what is trained.
        teacher: for methods that take one.
    """
    module = config["lightning_module"]
    cls = look_up(lightning_modules, module["name"], "lightning_module.name")
    arguments = {k: v for k, v in module.items() if k != "name"}
    if _parameter(cls, "schedule"):
        arguments["schedule"] = build_schedule(config["schedule"])
        arguments["sampler"] = build_sampler(config["sampler"])
    if takes_teacher(config):
        arguments["teacher"] = teacher
    if _parameter(cls, "metrics"):
        letterbox = bool(config["datamodule"].get("letterbox"))
        arguments["metrics"] = {**config.get("metrics", {}), "letterbox": letterbox}
    return _construct(cls, {"network": network, **arguments}, "lightning_module")


def build_schedule(config: Config) -> NoiseSchedule:
    """Build the noise schedule from its arguments."""
    return _construct(NoiseSchedule, config, "schedule")


def build_sampler(config: Config) -> Sampler:
    """Build a sampler from `{name, **arguments}`."""
    return _construct_named(processes, config, "sampler")


def takes_teacher(config: Config) -> bool:
    """Tell whether the config's LightningModule is a distillation."""
    name = config["lightning_module"]["name"]
    return _parameter(look_up(lightning_modules, name, "lightning_module.name"), "teacher")


def describe_network(network: nn.Module, config: Config) -> dict[str, Any]:
    """Return the `name`, `params` and `gmac` (10^9 multiply-adds a call) of a run's network."""
    return {
        "name": config["network"]["name"],
        "params": sum(parameter.numel() for parameter in network.parameters()),
        "gmac": round(giga_macs(config["network"], config["datamodule"]["image_size"]), 4),
    }


def giga_macs(network_config: Config, image_size: int) -> float:
    """Return the multiply-adds of one network call on one square image, in 10^9.

    Counted on the meta device, so the largest network costs nothing; an image size that the network
    refuses is an error here, before any training.
    """
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network = build_network(network_config)
        network(
            torch.empty(1, 1, image_size, image_size),
            torch.empty(1, 3, image_size, image_size),
            torch.zeros(1, dtype=torch.int64),
        )
    return counter.get_total_flops() / 2 / 1e9


def _construct_named(package: Any, config: Config, key: str) -> Any:
    cls = look_up(package, config["name"], f"{key}.name")
    return _construct(cls, {k: v for k, v in config.items() if k != "name"}, key)


def _construct(cls: type, arguments: Config, key: str) -> Any:
    legal = _parameters(cls)
    for name in arguments:
        if name not in legal:
            raise UserError(
                f"{key}.{name} is not an argument of {cls.__name__}; it takes {', '.join(legal)}."
            )
    missing = [
        name
        for name, parameter in legal.items()
        if parameter.default is parameter.empty and name not in arguments
    ]
    if missing:
        raise UserError(f"{key}.{missing[0]} is missing; {cls.__name__} needs it.")
    return cls(**arguments)


def _parameter(cls: type, name: str) -> bool:
    return name in _parameters(cls)


def _parameters(cls: type) -> dict[str, inspect.Parameter]:
    """Return the named constructor parameters of a class, through `**settings` to its bases."""
    found: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = list(inspect.signature(base.__init__).parameters.values())[1:]
        variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        for parameter in parameters:
            if parameter.kind not in variadic:
                found.setdefault(parameter.name, parameter)
        if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
            break
    return found
