"""Noise that depends on what a sample is, never on where it stands in a batch."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["SampleNoise", "stable_seed"]


def stable_seed(*parts: int | str) -> int:
    """Return a seed below 2^63 that is the same on every machine and in every process."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class SampleNoise:
    """Standard normal noise for a batch, one independent stream a sample.

    Each stream is a function of `(seed, id, member)`. It is drawn on the CPU, so that a mask does
    not depend on the device, batch size, order or number of processes.

    Args:
        seed: of the run.
        ids: unique id of each sample in the batch.
        member: which draw of an ensemble, or the name of another purpose.
        shape: `(C, H, W)` of one sample.
        device: where the noise is wanted.
    """

    def __init__(
        self,
        seed: int,
        ids: Sequence[str],
        member: int | str,
        shape: Sequence[int],
        device: torch.device | str = "cpu",
    ) -> None:
        self._generators = [
            torch.Generator().manual_seed(stable_seed(seed, sample, member)) for sample in ids
        ]
        self._shape = tuple(shape)
        self._device = device

    def __call__(self) -> Tensor:
        """Return fresh noise `(B, C, H, W)`, float32."""
        draws = [torch.randn(self._shape, generator=g) for g in self._generators]
        return torch.stack(draws).to(self._device)
