"""Turn a checkpoint of the reference repositories into one of ours."""

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy._core import multiarray
from torch import Tensor, nn

from common.errors import UserError
from common.files import atomic_path
from common.text import say
from networks import infer_reference_architecture, load_reference_state_dict
from tasks.build import build_network, describe_network
from tasks.configuration import get_value, given_keys, set_value

__all__ = ["run"]

# What the references store beside tensors: a loss that numpy has averaged.
_HARMLESS = [
    (multiarray.scalar, "numpy.core.multiarray.scalar"),
    multiarray.scalar,
    np.dtype,
    np.dtypes.Float64DType,
    np.dtypes.Float32DType,
]
# Such as n-tiny_t_s-16_b-64_t-20_sc-linear_best.pth.
_FILE_NAME = re.compile(r"_s-(?P<size>\d+)_b-\d+_t-(?P<steps>\d+)_sc-(?P<mode>[a-z]+)")


def run(config: dict[str, Any]) -> None:
    """Write the networks in `source` to `output` as a checkpoint of ours.

    The architecture is read off the tensors. Noise schedule, image size and ensemble come from the
    command line where given, else from `reference_config` or the config that the references'
    students carry, else from the file's name, else from the config of this run.

    Raises:
        UserError: there is no such file, or it is no checkpoint of the references; nothing in it is
            executed in any case.
    """
    if not config["source"]:
        raise UserError("task=import_weights needs source=<file>, such as source=teacher_best.pth.")
    source = Path(config["source"])
    checkpoint = _load(source)
    online, average = _states(checkpoint, source)
    reference = _reference_config(config["reference_config"]) or checkpoint.get("config") or {}
    network_config = infer_reference_architecture(average or online)
    groups = get_value(reference, "model.params.resnet_block_groups")
    if groups is not None:
        network_config["kwargs"]["resnet_block_groups"] = groups
    made = _imported_config(config, network_config, reference, source.name)
    states = {}
    for key, state in (("current_model_state", online), ("state_dict", average or online)):
        network = build_network(network_config)
        load_reference_state_dict(network, state or average)
        states[key] = {f"network.{name}": value for name, value in network.state_dict().items()}
    output = Path(config["output"])
    with atomic_path(output) as temporary:
        torch.save({**states, "config": made}, temporary)
    _report(network, made, reference, output)


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"source={path} does not exist; give a .pth file of the references.")
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # Damaged bytes can make the reader fail in any way.
        reason = str(error).partition("Please file an issue")[0].splitlines()
        named = [line.strip() for line in reason if "GLOBAL" in line or "class" in line.lower()]
        raise UserError(
            f"source={path} is damaged or holds more than tensors and numbers, and was not "
            f"executed ({type(error).__name__}{': ' + named[0] if named else ''}); give a .pth "
            "file as the references' training writes it."
        ) from error
    if not isinstance(checkpoint, dict):
        raise UserError(f"source={path} holds no weights but {type(checkpoint).__name__}.")
    return checkpoint


def _states(
    checkpoint: Mapping[str, Any], path: Path
) -> tuple[dict[str, Tensor] | None, dict[str, Tensor] | None]:
    """Return the online and the averaged weights, of which one may be none."""
    ema = checkpoint.get("ema") or {}
    online = checkpoint.get("model") or _under(ema, "online_model.")
    average = _under(ema, "ema_model.")
    if not online and not average:
        plain = {key: value for key, value in checkpoint.items() if isinstance(value, Tensor)}
        if not plain:
            raise UserError(
                f"source={path} has neither model nor ema, so it is no checkpoint of the "
                "references."
            )
        online = plain
    return _without_module(online), _without_module(average)


def _under(state: Mapping[str, Any], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _without_module(state: Mapping[str, Tensor] | None) -> dict[str, Tensor] | None:
    # DataParallel puts it before every name.
    return {k.removeprefix("module."): v for k, v in state.items()} if state else None


def _reference_config(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"reference_config={path} cannot be read ({error}).") from error
    if not isinstance(loaded, dict):
        raise UserError(f"reference_config={path} is no config of the references.")
    return loaded


def _imported_config(
    config: dict[str, Any], network: dict[str, Any], reference: dict[str, Any], file_name: str
) -> dict[str, Any]:
    """Return the config with which the imported network will be used."""
    made = copy.deepcopy(config)
    named = _FILE_NAME.search(file_name)
    schedule = get_value(reference, "diffusion.schedule") or {}
    steps = schedule.get("timesteps") or (int(named["steps"]) if named else None)
    found = {
        "schedule.num_timesteps": steps,
        "schedule.beta_start": schedule.get("beta_start"),
        "schedule.beta_end": schedule.get("beta_end"),
        "schedule.mode": schedule.get("mode") or (named["mode"] if named else None),
        "datamodule.image_size": get_value(reference, "dataset.input_size")
        or (int(named["size"]) if named else None),
        # The references resize without a low-pass.
        "datamodule.antialias": False,
        # Its network has learnt masks that lie where the references' shrinking moves them.
        "datamodule.mask_resize": "published",
        "datamodule.edges": "canny",
        "sampler.num_steps": steps,
        "sampler.ensemble": get_value(reference, "testing.ensemble"),
    }
    given = given_keys()
    for key, value in found.items():
        group = key.split(".")[0]
        # Another dataset does not change what the network has learnt from.
        chosen = key in given or (group in given and group != "datamodule")
        if value is not None and not chosen:
            set_value(made, key, value)
    made["network"] = network
    return made


def _report(
    network: nn.Module, config: dict[str, Any], reference: Mapping[str, Any], output: Path
) -> None:
    described = describe_network(network, config)
    schedule = config["schedule"]
    say(
        f"{described['name']}, {described['params']:,} parameters, {described['gmac']} GMAC at "
        f"{config['datamodule']['image_size']} px; {schedule['mode']} schedule of "
        f"{schedule['num_timesteps']} steps from {schedule['beta_start']} to "
        f"{schedule['beta_end']}."
    )
    if not reference:
        say(
            "The file does not say its variances: check them, or give reference_config=<yaml>, "
            "schedule.beta_start and schedule.beta_end.",
            style="yellow",
        )
    say(f"checkpoint: {output}")
