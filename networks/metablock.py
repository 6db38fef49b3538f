"""Features of an image under the influence of what is known of the patient.

Source: Pacheco and Krohling, "An Attention-Based Mechanism to Combine Images and Metadata in Deep
Learning Models Applied to Skin Cancer Classification", 2021.
"""

from torch import Tensor, nn

# Not public: what is listed here can be chosen as a network.
__all__: list[str] = []


class MetaBlock(nn.Module):
    """Scales and shifts groups of features `V` by metadata `U`: `sigmoid(tanh(V a(U)) + b(U))`.

    `a` and `b` are linear layers with batch norm.

    Args:
        groups: of features that share a scale and a shift.
        metadata_features: numbers an image.
    """

    def __init__(self, groups: int, metadata_features: int) -> None:
        super().__init__()
        self.scale = nn.Sequential(nn.Linear(metadata_features, groups), nn.BatchNorm1d(groups))
        self.shift = nn.Sequential(nn.Linear(metadata_features, groups), nn.BatchNorm1d(groups))

    def forward(self, features: Tensor, metadata: Tensor) -> Tensor:
        """Return features in (0, 1), of the same shape.

        Args:
            features: `(B, groups, ...)`. In training `B` is at least 2.
            metadata: `(B, metadata_features)`.
        """
        each = (...,) + (None,) * (features.ndim - 2)
        scale, shift = self.scale(metadata)[each], self.shift(metadata)[each]
        return ((features * scale).tanh() + shift).sigmoid()
