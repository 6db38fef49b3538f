"""Weights of the reference implementations in our own module names."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from common.errors import UserError

__all__ = ["infer_reference_architecture", "load_reference_state_dict"]

# The reference nests every block in wrappers; each rule removes one of them or renames a part.
# Rules apply in order, so that the inner attention parts are named after their wrappers are gone.
_RULES = [
    (r"^init_conv_([xg])\.", r"\1_stem."),
    (r"^time_mlp_([xg])\.1\.", r"\1_time.expand."),
    (r"^time_mlp_([xg])\.3\.", r"\1_time.project."),
    (r"^encoder_blocks\.(\d+)\.0\.", r"encoder.\1."),
    (r"^encoder_blocks\.(\d+)\.1\.", r"g_downsample.\1."),
    (r"^encoder_blocks\.(\d+)\.2\.", r"x_downsample.\1."),
    (r"^decoder_blocks\.(\d+)\.0\.", r"decoder.\1."),
    (r"^decoder_blocks\.(\d+)\.1\.", r"decoder.\1.upsample."),
    (r"^bottleneck\.rb_before\.", r"bottleneck.block1."),
    (r"^bottleneck\.rb_after\.", r"bottleneck.block2."),
    (r"^bottleneck\.ls_attn\.s_attn\.fn\.", r"bottleneck.self_attention."),
    (r"^bottleneck\.ls_attn\.l_attn\.att\.fn\.", r"bottleneck.linear_attention."),
    (r"^final_rb\.", r"head_block."),
    (r"^final_conv\.", r"head."),
    (r"^(encoder\.\d+)\.rb_([xg])([12])\.", r"\1.\2_block\3."),
    (r"^(encoder\.\d+)\.g_feedback\.", r"\1.gate."),
    (r"^(encoder\.\d+)\.att_([xg])\.att\.fn\.", r"\1.\2_attention."),
    (r"^(decoder\.\d+)\.rb_d([12])\.", r"\1.block\2."),
    (r"^(decoder\.\d+)\.att_x\.att\.fn\.", r"\1.attention."),
    (r"\.rb\.mlp\.1\.", r".time."),
    (r"\.rb\.eca\.", r".channel_attention."),
    (r"\.rb\.res_conv\.", r".shortcut."),
    (r"\.rb\.(block[12])\.proj\.", r".\1.conv."),
    (r"\.rb\.(block[12])\.norm\.", r".\1.norm."),
    (r"attention\.fn\.to_qkv\.", r"attention.to_qkv."),
    (r"attention\.fn\.to_out\.0\.", r"attention.to_out."),
    (r"attention\.fn\.to_out\.1\.", r"attention.out_norm."),
    (r"attention\.fn\.to_out\.", r"attention.to_out."),
]
_RULES = [(re.compile(pattern), replacement) for pattern, replacement in _RULES]


def load_reference_state_dict(network: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Load a state dict of the reference implementations into one of our networks, strictly.

    Args:
        network: a `DermoSegDiff` or `LiteDermoSegDiff` of the same architecture.
        state_dict: tensors by the reference's names, such as `encoder_blocks.0.0.rb_x1.rb...`.

    Raises:
        UserError: a tensor is missing, unknown or of another shape; the network is unchanged then.
    """
    renamed = {_rename(key): value for key, value in state_dict.items()}
    own = network.state_dict()
    missing = sorted(own.keys() - renamed.keys())
    unknown = sorted(renamed.keys() - own.keys())
    reshaped = sorted(k for k in own.keys() & renamed.keys() if own[k].shape != renamed[k].shape)
    if missing or unknown or reshaped:
        counts = [
            f"{len(keys)} {what} (first: {keys[0]})"
            for what, keys in (("missing", missing), ("unknown", unknown), ("reshaped", reshaped))
            if keys
        ]
        raise UserError(
            f"The reference weights do not fit this {type(network).__name__}: {', '.join(counts)} "
            "tensors. Build the network with the widths, multipliers and use_eca of the checkpoint."
        )
    network.load_state_dict(renamed)


def infer_reference_architecture(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return `{name, kwargs}` of the network that a reference's tensors belong to.

    Widths, levels, channels and channel attention are in the tensors. The number of groups is not,
    and is 4, as in every published configuration; nor is how the features of an attention are
    divided into heads, 4 in the reference's code.

    Raises:
        UserError: these are not the tensors of a reference network.
    """
    shapes = {key: tuple(value.shape) for key, value in state_dict.items()}
    try:
        (dim_x, channels_x, *_), (dim_g, channels_g, *_) = (
            shapes[f"init_conv_{branch}.weight"] for branch in "xg"
        )
        levels = 1 + max(int(key.split(".")[1]) for key in shapes if key.startswith("encoder_"))
        widths = {
            branch: [_out_channels(shapes, f"encoder_blocks.{i}.{n}") for i in range(levels)]
            for branch, n in (("g", 1), ("x", 2))
        }
        features = shapes["bottleneck.ls_attn.s_attn.fn.fn.to_qkv.weight"][0] // 3
        out_dim = shapes["final_conv.weight"][0]
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(
            f"The tensors are not those of a reference network: {error} is missing."
        ) from error
    eca = any(".eca." in key for key in shapes)
    return {
        "name": "LiteDermoSegDiff" if eca else "DermoSegDiff",
        "kwargs": {
            "dim_x": dim_x,
            "dim_g": dim_g,
            "channels_x": channels_x,
            "channels_g": channels_g,
            "out_dim": out_dim,
            "dim_x_mults": [width // dim_x for width in widths["x"]],
            "dim_g_mults": [width // dim_g for width in widths["g"]],
            "attention_heads": 4,
            "attention_head_dim": features // 4,
            **({"use_eca": True} if eca else {}),
        },
    }


def _out_channels(shapes: Mapping[str, tuple[int, ...]], transition: str) -> int:
    # A plain convolution at the last level, one behind a space-to-depth at the others.
    key = f"{transition}.weight" if f"{transition}.weight" in shapes else f"{transition}.1.weight"
    return shapes[key][0]


def _rename(key: str) -> str:
    for pattern, replacement in _RULES:
        key = pattern.sub(replacement, key)
    return key
