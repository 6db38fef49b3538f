"""Builds the objects of a run from its config, by name and never by a foreign `_target_`."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
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
    "call_inputs",
    "check_batch",
    "complete",
    "describe_network",
    "giga_macs",
    "method_kind",
    "network_kind",
    "takes_teacher",
]

Config = Mapping[str, Any]

# What a method needs of its network, by its kind, and an example of that kind.
_WANTS = {
    "diffusion": "a network that is also given a noisy mask and times, such as dermosegdiff",
    "segmentation": "a network that makes a map of an image, such as unet",
    "classification": "a network that makes class logits of an image, such as resnet50",
}


def build_network(config: Config, pretrained: bool = False) -> nn.Module:
    """Build a network from `{name, kwargs}`; the name is looked up in `networks.__all__`.

    Args:
        config: the group `network`.
        pretrained: start from the weights that `network.weights` names, which are downloaded unless
            the machine has them; otherwise from random ones.

    Raises:
        UserError: an unknown name or argument, or weights that cannot be had.
    """
    cls = look_up(networks, config.get("name"), "network.name")
    kwargs, weights = dict(config.get("kwargs") or {}), config.get("weights")
    if not pretrained or weights is None:
        return _construct(cls, kwargs, "network.kwargs")
    if not _parameter(cls, "weights"):
        raise UserError(
            f"network.weights={weights} does not exist for {cls.__name__}, which starts from "
            "random weights; leave it out or set network.weights=null."
        )
    try:
        return _construct(cls, kwargs | {"weights": weights}, "network.kwargs")
    except OSError as error:
        raise UserError(
            f"network.weights={weights} of {cls.__name__} could not be downloaded "
            f"({type(error).__name__}); connect this machine to the internet once, or start from "
            "random weights with network.weights=null."
        ) from error


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
    cls = _method(config)
    arguments = {k: v for k, v in module.items() if k != "name"}
    kind = method_kind(config)
    if kind != network_kind(network):
        raise UserError(
            f"lightning_module.name={module['name']} needs {_WANTS[kind]}; "
            f"network.name={config['network']['name']} is none. Choose another network or "
            f"lightning_module={network_kind(network)}."
        )
    if kind == "diffusion":
        arguments["schedule"] = build_schedule(config["schedule"])
        arguments["sampler"] = build_sampler(config["sampler"])
    if takes_teacher(config):
        arguments["teacher"] = teacher
    if _parameter(cls, "image_size"):
        arguments["image_size"] = config["datamodule"]["image_size"]
    arguments["metrics"] = dict(config.get("metrics") or {})
    if kind != "classification":
        arguments["metrics"]["letterbox"] = bool(config["datamodule"].get("letterbox"))
    return _construct(cls, {"network": network, **arguments}, "lightning_module")


def build_schedule(config: Config) -> NoiseSchedule:
    """Build the noise schedule from its arguments."""
    return _construct(NoiseSchedule, config, "schedule")


def build_sampler(config: Config) -> Sampler:
    """Build a sampler from `{name, **arguments}`."""
    return _construct_named(processes, config, "sampler")


def method_kind(config: Config) -> str:
    """Return what the config's LightningModule does: diffusion, segmentation or classification."""
    return _method(config).kind


def network_kind(network: nn.Module) -> str:
    """Return what a network is for: diffusion, segmentation or classification.

    It is told by how the network is called and by `num_classes`, which classifiers have.
    """
    if len(inspect.signature(network.forward).parameters) >= 3:
        return "diffusion"
    return "classification" if hasattr(network, "num_classes") else "segmentation"


def complete(config: dict[str, Any]) -> None:
    """Write into a composed config what follows from its choices, so that a checkpoint has it.

    Classifiers get the classes of the datamodule, and its metadata; what is not sampled gets
    neither schedule nor sampler.

    Raises:
        UserError: the datamodule has no labels of the kind that the method needs.
    """
    kind = method_kind(config)
    if kind != "diffusion":
        config["schedule"], config["sampler"] = {}, {}
    data = config["datamodule"]
    datamodule = look_up(datamodules, data["name"], "datamodule.name")
    classes = getattr(datamodule, "classes", None)
    if (kind == "classification") != (classes is not None):
        needed, has, other = (
            ("masks", "diagnoses", "datamodule=isic2018")
            if classes is not None
            else ("diagnoses", "masks", "datamodule=isic2019")
        )
        raise UserError(
            f"lightning_module.name={config['lightning_module']['name']} learns from {needed}, and "
            f"datamodule.name={data['name']} has {has}; choose another, such as {other}."
        )
    if classes is None:
        return
    if not classes:
        classes = _find_classes(data)
    config["lightning_module"]["classes"] = list(classes)
    network = look_up(networks, config["network"]["name"], "network.name")
    kwargs = config["network"].setdefault("kwargs", {})
    if _parameter(network, "num_classes"):
        kwargs["num_classes"] = len(classes)
    if data.get("metadata"):
        kwargs["metadata"] = len(datamodule.available_metadata)


def _find_classes(data: dict[str, Any]) -> Sequence[str]:
    """Return classes that only the files of a dataset tell, and write them into its config."""
    if data.get("skip_other_classes") is None:
        data["skip_other_classes"] = data.get("classes") is not None
    classes = build_datamodule(data).find_classes()
    data["classes"] = list(classes)
    return classes


def takes_teacher(config: Config) -> bool:
    """Tell whether the config's LightningModule is a distillation."""
    return _parameter(_method(config), "teacher")


def describe_network(network: nn.Module, config: Config) -> dict[str, Any]:
    """Return what a run's network is.

    Returns:
        `name`, `params`, `gmac` (10^9 multiply-adds a call), and `guidance_gmac`, those of them
        that a mask takes once, however many calls it has.
    """
    size = config["datamodule"]["image_size"]
    return {
        "name": config["network"]["name"],
        "params": sum(parameter.numel() for parameter in network.parameters()),
        "gmac": round(giga_macs(config["network"], size), 4),
        "guidance_gmac": round(giga_macs(config["network"], size, guidance=True), 4),
    }


def giga_macs(network_config: Config, image_size: int, guidance: bool = False) -> float:
    """Return the multiply-adds of one network call on one square image, in 10^9.

    Counted on the meta device, so the largest network costs nothing; an image size that the network
    refuses is an error here, before any training.

    Args:
        network_config: the group `network`.
        image_size: in px.
        guidance: only those of its `guidance`, 0 for a network without.
    """
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network = build_network(network_config).eval()
        image = torch.empty(1, 3, image_size, image_size)
        if not guidance:
            network(*call_inputs(network, image))
        elif hasattr(network, "guidance"):
            network.guidance(image)
    return counter.get_total_flops() / 2 / 1e9


def call_inputs(network: nn.Module, image: Tensor) -> tuple[Tensor, ...]:
    """Return what a network is called with for images `(B, 3, H, W)`.

    A denoising network also gets noise and times of 0, one with metadata zeros.
    """
    if network_kind(network) == "diffusion":
        times = torch.zeros(len(image), dtype=torch.int64, device=image.device)
        return torch.randn_like(image[:, :1]), image, times
    metadata = getattr(network, "metadata_inputs", 0)
    return (image, image.new_zeros(len(image), metadata)) if metadata else (image,)


def check_batch(config: Config, images: int | None = None) -> None:
    """Refuse a batch too small for a network to learn from, before any data is read.

    BatchNorm over a map of one pixel needs two images.

    Args:
        config: of the run.
        images: of a process whose BatchNorm has no others; none: `datamodule.batch_size`.

    Raises:
        UserError: `datamodule.batch_size` is too small.
    """
    data = config["datamodule"]
    with torch.device("meta"):
        network = build_network(config["network"]).train()
        image = torch.empty(images or data["batch_size"], 3, *[data["image_size"]] * 2)
        try:
            network(*call_inputs(network, image))
        except ValueError as error:
            raise UserError(
                f"datamodule.batch_size={data['batch_size']} is too small for "
                f"network.name={config['network']['name']}, whose BatchNorm takes its statistics "
                "over the batch of a process; give at least 2 for each."
            ) from error


def _method(config: Config) -> type:
    return look_up(lightning_modules, config["lightning_module"]["name"], "lightning_module.name")


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
