"""A trained module that is only ever asked."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import UserError
from lightning_modules.features import watched

__all__ = ["FrozenTeacher", "OnTeachersNetwork"]


class FrozenTeacher:
    """Holds a teacher outside its student: not a submodule, so never among the student's
    parameters, in its optimizer, state dict or moving average.

    Args:
        module: the trained LightningModule; it is frozen and put into evaluation mode, in which
            no statistics of a BatchNorm move and nothing is dropped.
        others: further ones; the teacher predicts the mean over all of them, and has nothing else
            to say.
        turns: let it predict the mean over the eight turns and mirror images of each square image.

    Attributes:
        members: all modules.
        module: the first one, the only one where there are no others.
        objective: what a denoising teacher predicts, none for others and for several.
        seen: for each member, which images it was trained on; set where that is looked up.
    """

    def __init__(self, module: nn.Module, *others: nn.Module, turns: bool = False) -> None:
        self.members = [member.eval().requires_grad_(False) for member in (module, *others)]
        self.module = module
        self.turns = turns
        self.seen: Sequence[Any] = ()
        self.objective: str | None = None if others else getattr(module, "objective", None)

    def __deepcopy__(self, memo: dict[int, Any]) -> "FrozenTeacher":
        # Weight averaging deep-copies the student; the teacher must not be copied with it.
        return self

    @property
    def network(self) -> nn.Module:
        """The network of the first module."""
        return self.module.network

    @property
    def averages(self) -> bool:
        """Whether it predicts a mean, and nothing but its probability."""
        return self.turns or len(self.members) > 1

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> None:
        """Move the modules, which no Trainer does for what is not a submodule.

        Args:
            device: of the student.
            dtype: that their networks shall have, as the student's under `bf16-true`.
        """
        for member in self.members:
            member.to(device)
            member.network.to(dtype=dtype)

    @torch.no_grad()
    def denoise(self, x_t: Tensor, image: Tensor, t: Tensor) -> Tensor:
        """Return the output of a denoising teacher's network, without graph."""
        return self.network(x_t, image, t)

    @torch.no_grad()
    def watched(self, image: Tensor, paths: Mapping[str, str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the logits of a one-pass teacher, and the outputs of some of its modules.

        Args:
            image: `(B, 3, H, W)`.
            paths: name to the module's path in the teacher's network.
        """
        return watched(self.network, paths, image)

    @torch.no_grad()
    def predict(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the teacher predicts for a batch, or what the batch brings of it.

        Args:
            batch: with `teacher_probability` where that was computed once for every image.
        """
        known = batch.get("teacher_probability")
        if known is not None:
            return {"probability": known}
        return self._mean(batch) if self.averages else self.module.predict(batch)

    def _mean(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        axes, maps = (-2, -1), []
        turns = itertools.product(range(4), (False, True)) if self.turns else [(0, False)]
        for (quarters, mirrored), member in itertools.product(turns, self.members):
            image = batch["image"].rot90(quarters, axes)
            image = image.flip(-1) if mirrored else image
            found = member.predict({**batch, "image": image})["probability"]
            found = found.flip(-1) if mirrored else found
            maps.append(found.rot90(-quarters, axes))
        return {"probability": torch.stack(maps).mean(0)}


class OnTeachersNetwork:
    """Mixin of a method that trains something on the frozen network of a teacher.

    Nothing of the network moves, not even the statistics of its BatchNorm.
    """

    def take_network(self, teacher: FrozenTeacher | None) -> None:
        """Freeze the network, with the weights of the teacher's.

        Args:
            teacher: whose network it is; none where the weights come from a checkpoint.

        Raises:
            UserError: the teacher's network is another than this one.
        """
        if teacher is not None:
            try:
                self.network.load_state_dict(teacher.network.state_dict())
            except RuntimeError as error:
                raise UserError(
                    f"The teacher's network ({type(teacher.network).__name__}) has other weights "
                    f"than that of network.name and network.kwargs ({type(self.network).__name__})"
                    "; make them equal, or choose another teacher."
                ) from error
        self.network.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> "OnTeachersNetwork":
        super().train(mode)
        self.network.eval()
        return self
