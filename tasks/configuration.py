"""Configs as plain dicts, and the config of a checkpoint under the user's overrides."""

import copy
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from common.errors import UserError, check_choice
from common.runs import dataset_label, run_label
from datamodules.transforms import ANTIALIAS, NORMALIZATIONS

__all__ = [
    "TRAINED_FOR",
    "check_image_settings",
    "check_targets",
    "checkpoint_config",
    "choices",
    "get_value",
    "given_keys",
    "modernise",
    "plain",
    "relocate",
    "set_value",
    "split_override",
]

# What a checkpoint decides for itself; the rest of a config is about the present run.
_FIXED = ("network", "lightning_module", "schedule")
# What it suggests, unless the command line chooses another group.
_SUGGESTED = ("datamodule", "metrics", "sampler")
# What its network was trained for, also on another dataset.
TRAINED_FOR = ("image_size", "normalization", "antialias", "letterbox")
# Modules whose public classes a stored config may name.
_MODULES = (
    *("lightning_modules.callbacks", "lightning.pytorch.callbacks", "lightning.pytorch.loggers"),
    *("lightning.pytorch.strategies", "lightning.pytorch.profilers"),
)
# What Hydra builds, which resolves interpolations first, also to classes.
_BUILT = ("callbacks.", "logger.", "trainer.")


def plain(config: DictConfig) -> dict[str, Any]:
    """Return a config as resolved plain dicts, lists, strings and numbers.

    Raises:
        UserError: a value is missing.
    """
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise UserError(f"{missing[0]} has no value; give it as {missing[0]}=<value>.")
    return OmegaConf.to_container(config, resolve=True)


def checkpoint_config(config: dict[str, Any], trained: dict[str, Any]) -> dict[str, Any]:
    """Return the config for using a checkpoint: as it was trained, under the user's overrides.

    Network, method and schedule are the checkpoint's. Data, scores and sampler are too, unless the
    command line chooses a group (`datamodule=ph2`) or an experiment; single values on the command
    line (`sampler.num_steps=5`, `paths.data=...`, `seed=1`) change whichever is used. Image size
    and normalisation stay as trained unless given.

    Args:
        config: as composed from the command line, resolved.
        trained: the `config` of the checkpoint.

    Raises:
        UserError: a single value on the command line contradicts what the checkpoint decides, or
            a sampler is given for one that has none.
    """
    given = given_keys()
    for key in given:
        if key.split(".")[0] in _FIXED and "." in key:
            theirs, ours = get_value(trained, key), get_value(config, key)
            if theirs != ours:
                raise UserError(
                    f"{key}={ours} cannot change a trained checkpoint, which has {theirs}; "
                    "leave it out."
                )
    if not trained["sampler"]:
        for key in given:
            if key.split(".")[0] == "sampler":
                raise UserError(
                    f"{key} is given, and the checkpoint needs one pass and no sampler; leave it "
                    "out."
                )
    merged = copy.deepcopy(config | {group: trained[group] for group in _FIXED})
    for group in _SUGGESTED:
        # A checkpoint of another project's weights has no scores of its own.
        if group in trained and group not in given and "experiment" not in given:
            merged[group] = copy.deepcopy(trained[group])
            for key in given:
                if key.startswith(f"{group}."):
                    set_value(merged, key, get_value(config, key))
    data, trained_data = merged["datamodule"], trained["datamodule"]
    for name in TRAINED_FOR:
        if f"datamodule.{name}" not in given and name in trained_data:
            data[name] = trained_data[name]
    _keep_classes(data, trained, given)
    # Folds are those of the images that the checkpoint was cross-validated on.
    own = {f"datamodule.{name}" for name in ("root", "split", "split_file", "table")}
    if own & set(given) and not {"datamodule.fold", "cross_validation"} & set(given):
        data["folds"] = data["fold"] = None
    if "cross_validation" in given:
        data["folds"] = config["cross_validation"]
    data["cache"] = config["datamodule"]["cache"]
    if "paths.data" in given and data.get("root"):
        data["root"] = relocate(data["root"], trained["paths"]["data"], config["paths"]["data"])
    if "datamodule" not in given and "experiment" not in given:
        # Another folder of own data has another name; other datasets keep theirs.
        own = data["name"].startswith("Folder") and "datamodule.root" in given
        label = dataset_label("folder", data.get("root")) if own else trained.get("data_label")
        merged["data_label"] = label
    if "seed" in given:
        if "seed" in merged["lightning_module"]:
            merged["lightning_module"]["seed"] = config["seed"]
    else:
        merged["seed"] = trained["seed"]
    return merged


def _keep_classes(data: dict[str, Any], trained: dict[str, Any], given: Sequence[str]) -> None:
    """Have a dataset that takes its classes from the config label them as a checkpoint does."""
    classes = trained["lightning_module"].get("classes")
    if "classes" not in data or classes is None:
        return
    if "datamodule.classes" in given and list(map(str, data["classes"] or ())) != classes:
        raise UserError(
            f"datamodule.classes={data['classes']} cannot change a trained checkpoint, which has "
            f"{classes}; leave it out."
        )
    data["classes"] = list(classes)
    # Elsewhere a class may only be called otherwise, and must not be left out unseen.
    moved = {"datamodule", "datamodule.root", "datamodule.table"} & set(given)
    if moved and "datamodule.skip_other_classes" not in given:
        data["skip_other_classes"] = False


def check_image_settings(data: Mapping[str, Any]) -> None:
    """Refuse what no network can be given, of the values in `TRAINED_FOR`.

    Args:
        data: the group `datamodule`.

    Raises:
        UserError: one is outside its range.
    """
    size = data["image_size"]
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise UserError(f"datamodule.image_size={size} must be a whole number, at least 1.")
    check_choice("datamodule.normalization", data["normalization"], NORMALIZATIONS)
    # Of equal values, such as 1 and true, only one is meant.
    for key, choices in (("antialias", ANTIALIAS), ("letterbox", (True, False))):
        value = data.get(key, choices[0])
        check_choice(f"datamodule.{key}", str(value) if type(value) is int else value, choices)


def split_override(override: str) -> tuple[str, str]:
    """Return key and value of an override of the command line, such as `a.b=1`, `+a.b=1` or `~a`.

    The value is as it was written, and empty where there is none.
    """
    key, _, value = override.partition("=")
    return key.lstrip("+~"), value


def given_keys() -> list[str]:
    """Return the keys that the command line gives, of groups and of single values, in its order."""
    return [split_override(override)[0] for override in HydraConfig.get().overrides.task]


def _run_name(experiment: str | None, method: str, datamodule: str, root: str | None) -> str:
    return run_label(experiment, method, datamodule, root, given_keys())


OmegaConf.register_new_resolver("run_name", _run_name, replace=True)
OmegaConf.register_new_resolver("data_label", dataset_label, replace=True)


def choices() -> dict[str, str | None]:
    """Return the choice of each config group, none where nothing is chosen."""
    return dict(HydraConfig.get().runtime.choices)


def get_value(config: dict[str, Any], key: str) -> Any:
    """Return the value of a dotted key, `None` where there is none."""
    for part in key.split("."):
        config = config.get(part) if isinstance(config, dict) else None
    return config


def set_value(config: dict[str, Any], key: str, value: Any) -> None:
    """Set the value of a dotted key."""
    *parents, last = key.split(".")
    for parent in parents:
        config = config.setdefault(parent, {})
    config[last] = value


def relocate(root: str, old_base: str, new_base: str) -> str:
    """Move a dataset's folder from one data folder to another; leave it where it is in neither."""
    path = Path(root)
    return (
        str(Path(new_base) / path.relative_to(old_base)) if path.is_relative_to(old_base) else root
    )


def check_targets(stored: Any, composed: Any, place: Path, key: str = "") -> None:
    """Refuse a stored config that would have other code run than this project's and Lightning's.

    Args:
        stored: a config from a file, or a value in it.
        composed: what the command line and `conf` have at the same key, whose classes are allowed
            at their keys.
        place: the file, for the message.
        key: dotted, of the value.

    Raises:
        UserError: a `_target_` is no public class of the callbacks, loggers, strategies and
            profilers of Lightning and this project, nor what the command line has there; or an
            interpolation could become one.
    """
    if isinstance(stored, list):
        others = composed if isinstance(composed, list) else []
        for index, item in enumerate(stored):
            other = others[index] if index < len(others) else None
            check_targets(item, other, place, f"{key}[{index}]")
    if isinstance(stored, str) and "${" in stored and key.startswith(_BUILT) and stored != composed:
        raise UserError(
            f"{place} has an interpolation in {key}, and the config of a run has none; write the "
            "value there."
        )
    if not isinstance(stored, dict):
        return
    others = composed if isinstance(composed, dict) else {}
    if "_target_" in stored:
        target = stored["_target_"]
        if target != others.get("_target_") and not _is_known(target):
            raise UserError(
                f"{place} has {key}._target_={target}, which is no callback, logger, strategy or "
                "profiler of this project or of Lightning; remove it there, or give it on the "
                "command line too if it is yours."
            )
    for name, item in stored.items():
        check_targets(item, others.get(name), place, f"{key}.{name}" if key else str(name))


def _is_known(target: Any) -> bool:
    if target == "lightning.Trainer":
        return True
    # Of an allowed module only its own classes: its attributes lead to every other module.
    module, _, name = str(target).rpartition(".")
    return module in _MODULES and name in importlib.import_module(module).__all__


def modernise(config: dict[str, Any]) -> None:
    """Give a config that an earlier version stored the keys of today, with what they meant then.

    Masks and edges stay where they were for the network that the config belongs to.
    """
    data = config.get("datamodule")
    if not isinstance(data, dict) or "mask_resize" in data:
        return
    soft = data.pop("soft_masks", False)
    if data.get("letterbox"):
        data["mask_resize"] = "soft" if soft else "area"
    else:
        data["mask_resize"] = "pillow" if soft else "published"
    data.setdefault("edges", "canny")
