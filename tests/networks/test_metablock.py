"""MetaBlock: the reference's numbers, shapes, and what it must not depend on."""

import pytest
import torch

import networks
from networks.metablock import MetaBlock


@pytest.fixture(scope="module")
def case(golden_cases):
    (case,) = golden_cases("ssd_kd", "metablock_forward")
    return case


def filled(case):
    """Return a block with the reference's parameters, where `fb` scales and `gb` shifts."""
    block = MetaBlock(4, 3)
    ours = {"fb": "scale", "gb": "shift"}
    state = {}
    for key, values in case.heads("param_").items():
        branch, layer, name = key.split("_", 2)
        state[f"{ours[branch]}.{layer}.{name}"] = values.clone()
    block.load_state_dict(state)
    return block


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_it_is_the_references(case, mode):
    block = filled(case).train(mode == "train")
    found = block(case.inputs["V"], case.inputs["U"])
    torch.testing.assert_close(found, case.outputs[f"out_{mode}"], **case.near("loss"))


def test_further_axes_share_the_scale_and_shift_of_their_group(case):
    block = filled(case).eval()
    vector, metadata = case.inputs["V"], case.inputs["U"]
    flat, maps = block(vector, metadata), block(vector.unflatten(2, (2, 3)), metadata)
    torch.testing.assert_close(maps, flat.unflatten(2, (2, 3)))
    torch.testing.assert_close(block(vector[..., 0], metadata), flat[..., 0])


def test_it_is_not_a_network_to_choose():
    assert "MetaBlock" not in networks.__all__
