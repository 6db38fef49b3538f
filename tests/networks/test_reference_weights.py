"""Loading the reference's weights is strict and changes nothing when it fails."""

import pytest
import torch

from common.errors import UserError
from networks import LiteDermoSegDiff, load_reference_state_dict


def reference_weights(tensors):
    return {k[6:]: v.clone() for k, v in tensors.items() if k.startswith("param.")}


@pytest.mark.parametrize("damage", ["missing", "unknown", "reshaped"])
def test_weights_that_do_not_fit_are_refused(golden_network, damage):
    network, tensors = golden_network("lite_3level_eca")
    weights = reference_weights(tensors)
    key = "encoder_blocks.1.0.rb_x1.rb.block1.proj.weight"
    if damage == "missing":
        del weights[key]
    elif damage == "unknown":
        weights["encoder_blocks.9.0.rb_x1.rb.block1.proj.weight"] = weights[key]
    else:
        weights[key] = weights[key][:, :2]
    for value in weights.values():
        value.zero_()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    with pytest.raises(UserError, match=rf"1 {damage} \(first: encoder"):
        load_reference_state_dict(network, weights)
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_weights_of_another_architecture_are_refused(golden_network):
    _, tensors = golden_network("lite_3level_eca")
    other = LiteDermoSegDiff(8, 4, dim_x_mults=[1, 1, 2], dim_g_mults=[1, 1, 1])
    with pytest.raises(UserError, match="use_eca"):
        load_reference_state_dict(other, reference_weights(tensors))
