"""BatchNorm over several processes is BatchNorm over all their images."""

import copy
import datetime
import functools
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from timm.layers import BatchNormAct2d
from torch import nn

from tasks.batch_norm import SyncedBatchNorm

SIZES = (3, 1)
SHAPES = {"1d": (5,), "2d": (5, 4, 3), "3d": (5, 2, 2, 2), "timm": (5, 4, 3)}
LAYERS = {
    "1d": nn.BatchNorm1d,
    "2d": functools.partial(nn.BatchNorm2d, momentum=None),
    "3d": functools.partial(nn.BatchNorm3d, affine=False),
    "timm": functools.partial(BatchNormAct2d, momentum=0.3),
}


def attached(network, device="cpu"):
    """Pretend that a Trainer trains it."""
    network.trainer = SimpleNamespace(
        strategy=SimpleNamespace(root_device=torch.device(device)),
    )
    return network


def build(kind):
    torch.manual_seed(3)
    layer = LAYERS[kind](5)
    if layer.affine:
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    return nn.Sequential(layer).double()


def data(kind):
    torch.manual_seed(4)
    values = torch.randn(sum(SIZES), *SHAPES[kind], dtype=torch.float64) * 3 + 100
    weight = torch.randn_like(values)
    return values, weight


def train(network, values, weight):
    """Return output, gradient of the input and of the parameters, and statistics of two steps."""
    for _ in range(2):
        values = values.detach().requires_grad_()
        network.zero_grad()
        output = network(values)
        (output.square() * weight).sum().backward()
    buffers = {key: value.clone() for key, value in network.named_buffers()}
    evaluated = network.eval()(values).detach()
    gradients = [parameter.grad for parameter in network.parameters()]
    return output.detach(), values.grad, gradients, buffers, evaluated


def one_of_several(rank, folder):
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=len(SIZES),
        timeout=datetime.timedelta(seconds=60),
    )
    results = {}
    for kind in LAYERS:
        network = build(kind)
        keys = list(network.state_dict())
        SyncedBatchNorm().apply(attached(network))
        assert list(network.state_dict()) == keys
        parts = [part.split(SIZES)[rank] for part in data(kind)]
        results[kind] = train(network, *parts)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of the processes has found."""
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(one_of_several, (folder,), nprocs=len(SIZES))
    return [torch.load(folder / f"{rank}.pt") for rank in range(len(SIZES))]


@pytest.mark.slow
@pytest.mark.parametrize("kind", LAYERS)
def test_unequal_parts_of_a_batch_are_the_whole(found, kind):
    found = [results[kind] for results in found]
    output, gradient, parameters, buffers, evaluated = train(build(kind), *data(kind))
    near = {"rtol": 1e-10, "atol": 1e-10}
    for place, whole in ((0, output), (1, gradient), (4, evaluated)):
        parts = torch.cat([result[place] for result in found])
        torch.testing.assert_close(parts, whole, **near)
    for index, whole in enumerate(parameters):
        torch.testing.assert_close(sum(result[2][index] for result in found), whole, **near)
    for result in found:
        assert result[3].keys() == buffers.keys()
        for key, whole in buffers.items():
            torch.testing.assert_close(result[3][key], whole, **near)


@pytest.mark.parametrize(("device", "sync"), [("cpu", False), ("cuda", True)])
def test_a_layer_stays_itself_and_becomes_what_it_was(device, sync):
    network = nn.Sequential(nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5), BatchNormAct2d(5))
    before = copy.deepcopy(network)
    layers, tensors = list(network), dict(network.named_parameters())
    plugin = SyncedBatchNorm()
    assert plugin.apply(attached(network, device)) is network
    assert all(isinstance(layer, nn.SyncBatchNorm) == sync for layer in network[1:])
    assert all(isinstance(layer, nn.BatchNorm2d) for layer in network[1:])
    image = torch.rand(2, 3, 4, 4)
    # A single process has all the images, and a copy is one of its own.
    for each in (network, copy.deepcopy(network.cpu())):
        torch.testing.assert_close(each.train()(image), copy.deepcopy(before).train()(image))
    plugin.revert(network)
    assert [type(layer) for layer in network] == [nn.Conv2d, nn.BatchNorm2d, BatchNormAct2d]
    assert list(network) == layers
    assert all(tensors[key] is value for key, value in network.named_parameters())
    assert network[1].num_batches_tracked == 1


def test_a_layer_with_a_way_of_its_own_is_left_alone():
    class Other(nn.BatchNorm2d):
        def forward(self, values):
            return super().forward(values) + 1

    network = nn.Sequential(Other(5), nn.InstanceNorm2d(5), nn.GroupNorm(1, 5))
    SyncedBatchNorm().apply(attached(network))
    assert [type(layer) for layer in network] == [Other, nn.InstanceNorm2d, nn.GroupNorm]


@pytest.fixture
def alone(tmp_path):
    """A group of one process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_process_in_any_precision(alone, dtype):
    network = nn.Sequential(nn.BatchNorm2d(5))
    plain = copy.deepcopy(network)
    SyncedBatchNorm().apply(attached(network))
    values = (torch.randn(4, 5, 6, 6) + 50).to(dtype)
    found, expected = network(values), plain(values)
    assert found.dtype == expected.dtype == dtype
    torch.testing.assert_close(
        found, expected, atol=1e-3 if dtype == torch.float32 else 0.02, rtol=0
    )
    torch.testing.assert_close(network[0].running_var, plain[0].running_var)


def test_one_value_has_no_variance(alone):
    network = SyncedBatchNorm().apply(attached(nn.Sequential(nn.BatchNorm2d(5))))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        network(torch.rand(1, 5, 1, 1))


def test_a_compiled_network_synchronises(alone):
    network = nn.Sequential(nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5), nn.ReLU()).double()
    plain = copy.deepcopy(network)
    SyncedBatchNorm().apply(attached(network))
    network.compile(backend="aot_eager")
    image = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    for _ in range(2):
        found, expected = network(image), plain(image)
        torch.testing.assert_close(found, expected)
        for each in (found, expected):
            each.square().sum().backward()
    for one, other in zip(network.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    assert network[1].num_batches_tracked == 2
