"""An exported model in the place of a trained module."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import onnxruntime
import torch
from torch import Tensor

from common.errors import UserError
from lightning_modules.processes import SampleNoise

__all__ = ["METADATA_KEY", "OnnxModule"]

# Under which an exported file says how it is to be used.
METADATA_KEY = "dermodistill"


class OnnxModule(L.LightningModule):
    """Predicts with a file of `task=export`, by onnxruntime on the CPU with PyTorch's threads.

    Args:
        path: the file.
        seed: of the noise; that of the training by default.

    Attributes:
        metadata: what the export says of the model, such as `image_size` and `sampler`.
        classes: names of the classes of a classifier, none of other models.

    Raises:
        UserError: the file is missing, damaged or not of `task=export`.
    """

    def __init__(self, path: str | Path, seed: int | None = None) -> None:
        super().__init__()
        if not Path(path).is_file():
            raise UserError(f"checkpoint={path} does not exist; give a file of task=export.")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            self.session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
            properties = self.session.get_modelmeta().custom_metadata_map
            self.metadata = json.loads(properties[METADATA_KEY])
        except Exception as error:
            # onnxruntime has an error class of its own for every fault of a file.
            raise UserError(
                f"checkpoint={path} is damaged or was not written by task=export "
                f"({type(error).__name__}); export the checkpoint again."
            ) from error
        self.classes: tuple[str, ...] = tuple(self.metadata.get("classes") or ())
        self.seed = self.metadata["seed"] if seed is None else seed

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Tensor]:
        return self.predict(batch)

    def predict(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return what the exported module's `predict` does.

        Args:
            batch: with `image`, RGB from 0 to 255, and `id`.
        """
        image = batch["image"]
        inputs = {"image": image.cpu().float().numpy()}
        members = self.metadata["sampler"].get("ensemble", 1)
        if self.metadata["draws"]:
            each = self.metadata["draws"] // members
            shape = (1, *image.shape[-2:])
            streams = [SampleNoise(self.seed, batch["id"], m, shape) for m in range(members)]
            noise = torch.stack([stream() for stream in streams for _ in range(each)], dim=1)
            inputs["noise"] = noise.numpy()
        chance, *unsure = (torch.from_numpy(v) for v in self.session.run(None, inputs))
        result = {"probability": chance}
        return result | {"uncertainty": unsure[0]} if members > 1 else result
