"""Small trained modules between a student's features and a loss that compares them."""

from collections.abc import Sequence

from torch import Tensor, nn

from common.errors import UserError

__all__ = ["ChannelAdapter", "ProjectionHead"]


class ChannelAdapter(nn.Module):
    """Brings a student's feature map to the shape of its teacher's: convolution, batch norm, ReLU.

    The convolution is 1x1 between maps of one size, 3x3 of stride 2 from twice the size, 4x4
    transposed of stride 2 from half the size, and otherwise as large as it takes without padding.

    Args:
        student_shape: `(C, h, w)` of the maps that come in.
        teacher_shape: `(C', h', w')` of those that go out.

    Raises:
        UserError: the student's map is smaller than the teacher's, by another factor than 2.

    Source: Romero et al., "FitNets: Hints for Thin Deep Nets", 2015, the regressor.
    """

    def __init__(self, student_shape: Sequence[int], teacher_shape: Sequence[int]) -> None:
        super().__init__()
        (channels, *size), (teacher_channels, *teacher_size) = student_shape, teacher_shape
        doubled = [2 * pixels for pixels in size]
        if size == [2 * pixels for pixels in teacher_size]:
            self.conv = nn.Conv2d(channels, teacher_channels, 3, stride=2, padding=1)
        elif doubled == teacher_size:
            self.conv = nn.ConvTranspose2d(channels, teacher_channels, 4, stride=2, padding=1)
        else:
            kernel = tuple(1 + s - t for s, t in zip(size, teacher_size, strict=True))
            if min(kernel) < 1:
                raise UserError(
                    f"No adapter leads from the student's features {tuple(student_shape)} to the "
                    f"teacher's {tuple(teacher_shape)}: a map can shrink or double. Choose feature "
                    "paths whose maps are of like size."
                )
            # Also the 1x1 of equal sizes.
            self.conv = nn.Conv2d(channels, teacher_channels, kernel)
        self.bn = nn.BatchNorm2d(teacher_channels)
        self.relu = nn.ReLU()

    def forward(self, features: Tensor) -> Tensor:
        """Return `(N, C', h', w')` of features `(N, C, h, w)`, at least 0."""
        return self.relu(self.bn(self.conv(features)))


class ProjectionHead(nn.Sequential):
    """Turns pooled features `(N, D)` into vectors `(N, D)` for a loss on their similarities.

    Args:
        features: `D`.

    Source: Xu et al., "Knowledge Distillation Meets Self-Supervision", ECCV 2020.
    """

    def __init__(self, features: int) -> None:
        super().__init__(nn.Linear(features, features), nn.ReLU(), nn.Linear(features, features))
