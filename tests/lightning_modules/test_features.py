"""Features by module path: found, named when they are not, and never kept."""

import gc
import weakref

import pytest
import torch
from torch import nn

from common.errors import UserError
from lightning_modules.features import check_paths, feature_shapes, last_map, watch, watched


@pytest.fixture
def network():
    parts = {"stem": nn.Conv2d(3, 6, 3, padding=1), "deep": nn.Sequential(nn.Conv2d(6, 9, 2, 2))}
    return nn.Sequential(nn.ModuleDict(parts)["stem"], parts["deep"])


def test_outputs_are_collected_by_name(network):
    image = torch.rand(2, 3, 8, 8)
    with watch(network, {"a": "0", "b": "1.0"}) as features:
        assert features == {}
        output = network(image)
    assert torch.equal(features["a"], network[0](image))
    assert torch.equal(features["b"], output)


def test_nothing_is_left_behind(network):
    for _ in range(3):
        with watch(network, {"a": "0"}) as features:
            network(torch.rand(1, 3, 8, 8))
    kept = weakref.ref(features["a"])
    with pytest.raises(RuntimeError), watch(network, {"a": "0"}) as features:
        network(torch.rand(1, 2, 8, 8))
    assert features == {}
    del features
    gc.collect()
    assert kept() is None
    assert not any(module._forward_hooks for module in network.modules())


def test_shapes_are_found_without_weights(network):
    before = {key: value.clone() for key, value in network.state_dict().items()}
    shapes = feature_shapes(network, {"a": "0", "b": "1"}, "key", size=32)
    assert shapes == {"a": (6, 32, 32), "b": (9, 16, 16)}
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert {p.device.type for p in network.parameters()} == {"cpu"}


def test_statistics_do_not_move_while_shapes_are_found():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).train()
    feature_shapes(network, {"a": "1"}, "key")
    assert network[1].num_batches_tracked == 0
    assert torch.equal(network[1].running_mean, torch.zeros(4))


def test_a_wrong_path_is_named_with_some_that_exist(network):
    with pytest.raises(UserError, match=r"key.a=1.1 is no module of Sequential; .* such as .*1.0"):
        check_paths(network, {"a": "1.1"}, "key")


def test_a_module_without_feature_map_is_refused():
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    with pytest.raises(UserError, match="key.a=2 gives no feature map"):
        feature_shapes(network, {"a": "2"}, "key")
    assert feature_shapes(network, {"a": "2"}, "key", ndim=1) == {"a": (2,)}
    with pytest.raises(UserError, match="key.a=0 gives no vector"):
        feature_shapes(network, {"a": "0"}, "key", ndim=1)


def test_output_and_features_come_together(network):
    image = torch.rand(2, 3, 8, 8)
    output, features = watched(network, {"stem": "0"}, image)
    assert torch.equal(output, network(image))
    assert torch.equal(features["stem"], network[0](image))
    assert not any(module._forward_hooks for module in network.modules())


def test_the_last_map_is_the_one_before_pooling():
    pooling = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(5, 5, 1), nn.Flatten())
    stage = nn.Sequential(nn.Conv2d(4, 5, 3), nn.ReLU())
    network = nn.Sequential(nn.Conv2d(3, 4, 3), stage, pooling)
    assert last_map(network, "key") == "1"
    with pytest.raises(UserError, match="Sequential gives no feature map; set key to the path"):
        last_map(nn.Sequential(nn.Flatten()), "key")
