"""Our own checkpoints: plain types only, written whole, architecture looked up by name."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import nn

from common.errors import UserError, check_choice
from common.files import atomic_path
from tasks.build import build_network
from tasks.configuration import modernise

__all__ = [
    "AtomicCheckpointIO",
    "load_checkpoint",
    "load_weights",
    "network_from_checkpoint",
    "refuse_not_finite",
]

WEIGHTS = {"ema": "state_dict", "online": "current_model_state"}
# The groups without which a checkpoint's network cannot be rebuilt and used as it was trained.
GROUPS = ("datamodule", "lightning_module", "network", "sampler", "schedule")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place, then renames it.

    The Trainer's own way writes it in memory, then to the system's temporary folder, and moves it
    from there, which across file systems is a copy that a kill can cut short.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        # Into a file that Python has opened, whose errors tell a full disk from other failures.
        with atomic_path(Path(path)) as temporary, temporary.open("wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:
                # That the file has no proper end hides why.
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from error
                raise

    def load_checkpoint(self, path: str | Path, *args: Any, **settings: Any) -> dict[str, Any]:
        return load_checkpoint(path, key="resume")


def load_checkpoint(path: str | Path, key: str = "checkpoint") -> dict[str, Any]:
    """Load a checkpoint of ours onto the CPU, without executing anything in it.

    Args:
        path: the file.
        key: the config key that named it, for the message.

    Raises:
        UserError: there is no such file, there are several, or it is no checkpoint of ours.
    """
    if not isinstance(path, str | Path):
        raise UserError(
            f"{key} names several files; only task=predict takes those. Give one .ckpt file."
        )
    path = Path(path)
    if path.is_dir():
        raise UserError(
            f"{key}={path} is a folder; give a .ckpt file from a run's checkpoints/ folder."
        )
    if not path.is_file():
        raise UserError(
            f"{key}={path} does not exist; give a .ckpt file from a run's checkpoints/ folder."
        )
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # Damaged bytes can make the reader fail in any way, such as by an IndexError.
        raise UserError(
            f"{key}={path} is damaged or no checkpoint of this project "
            f"({type(error).__name__}); give a .ckpt file from a run's checkpoints/ folder."
        ) from error
    config = checkpoint.get("config") if isinstance(checkpoint, dict) else None
    if not isinstance(config, dict) or not {"state_dict", "config"} <= checkpoint.keys():
        raise UserError(
            f"{key}={path} has no state_dict and config, so it is no checkpoint of this project; "
            "give a .ckpt file from a run's checkpoints/ folder."
        )
    missing = [group for group in GROUPS if not isinstance(config.get(group), dict)]
    if missing:
        raise UserError(
            f"The config in {key}={path} has no {missing[0]}, so it is no checkpoint of this "
            "project; give a .ckpt file from a run's checkpoints/ folder."
        )
    modernise(config)
    return checkpoint


def network_from_checkpoint(
    checkpoint: dict[str, Any], path: str | Path, weights: str, key: str
) -> nn.Module:
    """Build a checkpoint's network and load its weights, strictly.

    Args:
        checkpoint, path, weights, key: as in `load_weights`.

    Raises:
        UserError: as `load_weights`; or some of the weights are not finite.
    """
    network = build_network(checkpoint["config"]["network"])
    load_weights(network, checkpoint, path, weights, key, prefix="network.")
    refuse_not_finite(network, path, key)
    return network


def refuse_not_finite(network: nn.Module, path: str | Path, key: str) -> None:
    """Refuse a network whose training has diverged.

    Args:
        network: with its weights.
        path: where they came from.
        key: the config key that named it.

    Raises:
        UserError: some of the weights are not finite.
    """
    bad = [name for name, values in network.state_dict().items() if not values.isfinite().all()]
    if bad:
        raise UserError(
            f"{key}={path} has weights that are not finite, in {len(bad)} tensor(s), first "
            f"{bad[0]}: its training has diverged. Give another checkpoint."
        )


def load_weights(
    module: nn.Module,
    checkpoint: dict[str, Any],
    path: str | Path,
    weights: str,
    key: str,
    prefix: str = "",
) -> None:
    """Load a checkpoint's weights into a LightningModule, or into a part of it, strictly.

    Args:
        module: as the checkpoint's config builds it.
        checkpoint: as loaded.
        path: where it came from, for messages.
        weights: `ema` for the averaged ones, `online` for those that the optimizer had.
        key: the config group that chose, for messages.
        prefix: of the part's tensors.

    Raises:
        UserError: an unknown choice, a checkpoint without online weights, or weights that do not
            fit the architecture that the checkpoint names.
    """
    check_choice(f"{key}.weights", weights, WEIGHTS)
    if WEIGHTS[weights] not in checkpoint:
        raise UserError(f"{key}.weights={weights} is not in this checkpoint; choose ema.")
    state = checkpoint[WEIGHTS[weights]]
    try:
        module.load_state_dict(
            {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        )
    except RuntimeError as error:
        raise UserError(
            f"The weights in {path} do not fit the network that it names "
            f"({checkpoint['config']['network']['name']}); the file is damaged."
        ) from error
