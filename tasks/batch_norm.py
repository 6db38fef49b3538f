"""BatchNorm over the images of all processes, on GPUs and on CPUs."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.plugins.layer_sync import LayerSync
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["SyncedBatchNorm"]


class SyncedBatchNorm(LayerSync):
    """Has every BatchNorm of a distributed training take its statistics over all processes.

    Statistics and gradients are then those of one process with all the images, however many of them
    each process has. A layer stays the same object, with its parameters, buffers and hooks; its
    class is another until the training has ended. In evaluation mode it does what it always did.

    Layers whose class computes something of its own are left as they are, apart from timm's
    `BatchNormAct2d`, which is followed by dropout and an activation.
    """

    def apply(self, model: nn.Module) -> nn.Module:
        synced = _Synced if model.trainer.strategy.root_device.type == "cpu" else _SyncedOnGPU
        for layer in model.modules():
            if isinstance(layer, _BatchNorm) and _is_known(layer):
                layer.__class__ = _class(synced, type(layer))
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        for layer in model.modules():
            if isinstance(layer, _Synced):
                layer.__class__ = layer.plain
        return model


@cache
def _class(synced: type, plain: type[_BatchNorm]) -> type[_BatchNorm]:
    return type(f"Synced{plain.__name__}", (synced, plain), {"plain": plain})


def _is_known(layer: _BatchNorm) -> bool:
    own = type(layer).forward is not _BatchNorm.forward
    return not own or type(layer).__name__ == "BatchNormAct2d"


class _Synced:
    """Comes before the class of a layer; PyTorch's own `SyncBatchNorm` refuses the CPU."""

    plain: type[_BatchNorm]

    def forward(self, values: Tensor) -> Tensor:
        output = self.normalised(values)
        for name in ("drop", "act"):
            if hasattr(self, name):
                output = getattr(self, name)(output)
        return output

    def normalised(self, values: Tensor) -> Tensor:
        """Return `values`, `(B, C, ...)`, after what `BatchNorm` does, in the same precision.

        Raises:
            ValueError: all processes together have one value a channel.
        """
        if not self.training or not dist.is_initialized():
            return _BatchNorm.forward(self, values)
        self._check_input_dim(values)
        return _uncompiled(self._of_all_processes, values)

    def _of_all_processes(self, values: Tensor) -> Tensor:
        axes = [0, *range(2, values.ndim)]
        each = (-1,) + (1,) * (values.ndim - 2)
        wide = values.to(torch.promote_types(values.dtype, torch.float32))
        count = wide.new_tensor([values.numel() // values.shape[1]])
        total = _SumOverProcesses.apply(torch.cat((wide.sum(axes), count)))
        count = total[-1].detach()
        if count < 2:
            raise ValueError("Expected more than 1 value per channel when training.")
        mean = total[:-1] / count
        # Squares of what is centred lose nothing to cancellation, as means of squares would.
        centred = wide - mean.view(each)
        variance = _SumOverProcesses.apply(centred.square().sum(axes)) / count
        self._track(mean.detach(), variance.detach() * (count / (count - 1)))
        output = centred * (variance + self.eps).rsqrt().view(each)
        if self.affine:
            output = output * self.weight.view(each) + self.bias.view(each)
        return output.to(values.dtype)

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        if not self.track_running_stats:
            return
        self.num_batches_tracked.add_(1)
        share = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance.to(self.running_var.dtype), share)


class _SyncedOnGPU(_Synced, nn.SyncBatchNorm):
    """The same with PyTorch's kernels."""

    process_group = None

    def normalised(self, values: Tensor) -> Tensor:
        return nn.SyncBatchNorm.forward(self, values)


def _uncompiled(function: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    """Call a function, outside of what `torch.compile` makes of the network around it."""
    if torch.compiler.is_compiling():
        return torch.compiler.disable(function)(values)
    return function(values)


class _SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over all processes, of whose losses the gradient is that of the sum."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _SumOverProcesses.apply(gradient.contiguous())
