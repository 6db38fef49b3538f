"""How a network is trained: faster, smaller, at another rate, and otherwise the same."""

import copy
import functools
import json
import math

import pytest
import torch
from torch import nn

from common.errors import UserError
from lightning_modules import DiffusionSegmentation, Segmentation
from lightning_modules.auxiliary import AuxiliarySegmentation
from lightning_modules.processes import DDIM, NoiseSchedule
from lightning_modules.teacher import FrozenTeacher
from networks import DermoSegDiff, UNet
from tasks import fit
from tasks.acceleration import (
    accelerate_teacher,
    accelerate_training,
    check_fused,
    plan_batch,
    resumed_batch,
)
from tasks.screen import print_batch

NOTHING = {"channels_last": False, "compile": False, "checkpointing": False, "tf32": False}
NARROW = {"dim_x": 8, "dim_g": 8, "dim_mults": [1, 2], "attention_head_dim": 8}
QUICK = (
    *("experiment=demo_unet_teacher", "datamodule.image_size=16", "datamodule.num_samples=20"),
    *("datamodule.num_workers=0", "datamodule.batch_size=2", "network.kwargs.base_width=4"),
    *("logger=csv", "trainer.accelerator=cpu", "trainer.enable_progress_bar=false"),
)
# As in conf/callbacks, which this experiment goes without.
AVERAGED = (
    "callbacks.ema={_target_:lightning_modules.callbacks.EMA,update_after_step:1}",
    "callbacks.plateau=null",
)


@pytest.fixture
def train(make_config, tmp_path):
    """Runs a small experiment; returns its results and its last checkpoint."""

    def run(name, *overrides):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True, exist_ok=True)
        fit.run(make_config(*QUICK, f"hydra.runtime.output_dir={folder}", *overrides))
        results = json.loads((folder / "results.json").read_text())
        return results, torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)

    return run


@pytest.fixture
def traced(monkeypatch):
    """Compiles without a compiler of C++, which takes a minute."""
    compiled = functools.partialmethod(nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(nn.Module, "compile", compiled)
    yield
    # Of each function, only so many translations are kept.
    torch.compiler.reset()


def module_of(network, **optimizer):
    return Segmentation(network, {"bce": {"weight": 1}}, {"name": "SGD", "lr": 0.1, **optimizer})


def assert_near(one, other, **near):
    assert one.keys() == other.keys()
    for key, value in one.items():
        torch.testing.assert_close(other[key], value, msg=key, **near)


@pytest.mark.parametrize("cls", [UNet, DermoSegDiff])
def test_every_map_has_its_channels_last(cls):
    # In double precision: what rounding does to a ReLU near 0 is no matter of the order.
    network = cls(**({"base_width": 4} if cls is UNet else NARROW)).double()
    inputs = (torch.rand(2, 3, 16, 16, dtype=torch.float64),)
    if cls is DermoSegDiff:
        noise = torch.randn(2, 1, 16, 16, dtype=torch.float64)
        inputs = (noise, *inputs, torch.tensor([1, 2]))
    plain = copy.deepcopy(network)
    orders = {}

    def note(path, _, __, output):
        last = output.is_contiguous(memory_format=torch.channels_last)
        orders[path] = last or 1 in (output.shape[1], output[0, 0].numel())

    for path, layer in network.named_modules():
        # The order of a mask of one channel says nothing; the network knows what to do.
        if isinstance(layer, nn.Conv2d) and path != "x_stem":
            layer.register_forward_hook(functools.partial(note, path))
    module = nn.Module()
    module.network = network
    accelerate_training(module, NOTHING | {"channels_last": True})
    for each in (network, plain):
        each(*inputs).square().mean().backward()
    assert len(orders) > 10
    assert all(orders.values()), [path for path, last in orders.items() if not last]
    gradients = [{k: p.grad for k, p in n.named_parameters()} for n in (plain, network)]
    assert_near(*gradients, rtol=1e-3, atol=1e-5)


def test_a_compiled_network_has_its_keys_and_its_features(traced):
    image, mask = torch.rand(2, 3, 16, 16), torch.ones(2, 1, 16, 16)
    losses = {"bce": {"weight": 1}, "auxiliary_bce": {"weight": 1}}
    module = AuxiliarySegmentation(
        *(UNet(4), losses, {"name": "SGD", "lr": 0.1}), auxiliary={"deep": "encoder.1"}
    )
    plain = copy.deepcopy(module)
    keys = list(module.state_dict())
    accelerate_training(module, NOTHING | {"compile": True})
    assert list(module.state_dict()) == keys
    batch = {"image": image, "mask": mask}
    for training in (True, False, True):
        for each in (module, plain):
            each.train(training)
            each.predict(batch)
        found, expected = (each.weighted_losses(batch, each.losses)[0] for each in (module, plain))
        assert_near(expected, found)
        for total in (found, expected):
            total["loss"].backward()
    gradients = [{k: p.grad for k, p in m.named_parameters()} for m in (plain, module)]
    assert_near(*gradients)


def test_products_are_short_only_if_asked_for():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32 = False
        accelerate_training(module_of(UNet(4)), NOTHING)
        assert torch.get_float32_matmul_precision() == before[0] == "highest"
        accelerate_training(module_of(UNet(4)), NOTHING | {"tf32": True})
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def test_accumulated_batches_are_one_step(train):
    results, last = train("run", "trainer.max_epochs=1", "trainer.accumulate_grad_batches=3")
    batches = -(-results["data"]["n_train"] // 2)
    assert last["global_step"] == -(-batches // 3)
    assert results["batch"]["effective"] == 6


def test_two_ways_to_keep_less_exclude_each_other():
    with pytest.raises(UserError, match=r"training\.compile=true .* training\.checkpointing=true"):
        accelerate_training(module_of(UNet(4)), NOTHING | {"compile": True, "checkpointing": True})


@pytest.mark.parametrize(
    ("rule", "factor", "each"), [("none", 1, 2), ("linear", 6, 4), ("sqrt", math.sqrt(6), 4)]
)
def test_the_rate_follows_the_images_of_a_step(rule, factor, each):
    settings = {"name": "SGD", "lr": 0.1}
    module = Segmentation(UNet(4), {"bce": {"weight": 1}}, settings)
    plan = plan_batch(module, rule, 4, processes=2, accumulate=3)
    rate = pytest.approx(0.1 * factor)
    assert plan == {
        **{"per_process": each, "processes": 2, "accumulate": 3, "effective": 6 * each},
        **{"scale_lr": rule, "lr": rate},
    }
    assert module.configure_optimizers().param_groups[0]["lr"] == rate
    assert module.optimizer_settings["lr"] == rate
    assert settings["lr"] == 0.1


@pytest.mark.parametrize(
    ("batch_size", "processes", "each"), [(16, 1, 16), (16, 4, 4), (16, 3, 6), (2, 4, 1)]
)
def test_processes_share_the_batch(batch_size, processes, each, capsys):
    plan = plan_batch(module_of(UNet(4)), "none", batch_size, processes, 1)
    assert (plan["per_process"], plan["effective"], plan["lr"]) == (each, each * processes, 0.1)
    print_batch(plan, None, batch_size)
    remark = f"batch_size={batch_size} is no multiple of {processes} processes"
    assert (remark in capsys.readouterr().out) == (each * processes != batch_size)


@pytest.mark.parametrize(
    ("rule", "per_process", "processes", "expected"),
    [("none", 4, 1, 4), ("none", 1, 4, 4), ("none", 4, 4, 16), ("linear", 4, 4, 4)],
)
def test_a_resumed_run_keeps_its_batch(rule, per_process, processes, expected):
    earlier = {"per_process": per_process, "processes": processes}
    assert resumed_batch(4, rule, earlier) == expected
    assert resumed_batch(4, rule, None) == 4


def test_an_unknown_rule_is_refused():
    with pytest.raises(UserError, match=r"training\.scale_lr=cubic .* linear, sqrt"):
        plan_batch(module_of(UNet(4)), "cubic", 4, 1, 1)


@pytest.mark.parametrize(
    "overrides",
    [
        ("training.checkpointing=true",),
        ("training.channels_last=true",),
        ("training.compile=true",),
        ("lightning_module.optimizer.fused=true",),
        ("training.channels_last=true", "training.compile=true", "inference.compile=true"),
    ],
)
def test_a_run_learns_the_same(train, traced, overrides):
    # After more steps, what begins as rounding decides which of two pixels a maximum is.
    common = ("datamodule.image_size=32", "datamodule.batch_size=4", "trainer.max_epochs=1")
    common = (*common, "trainer.limit_train_batches=2", *AVERAGED)
    common = (*common, "+lightning_module.optimizer.eps=0.1")
    expected, last = train("plain", *common)
    found, checkpoint = train("other", *common, *overrides)
    assert found["status"] == "finished"
    for part in ("state_dict", "current_model_state"):
        assert_near(last[part], checkpoint[part], rtol=1e-5, atol=1e-5)
    assert found["test"] == pytest.approx(expected["test"], rel=1e-2, abs=1e-3)


def test_a_resumed_run_keeps_its_rate_and_says_that_the_batch_is_another(train, traced, capsys):
    shared = ("training.scale_lr=linear", "trainer.accumulate_grad_batches=2")
    first, last = train("run", *shared, "trainer.max_epochs=1")
    assert first["batch"] == {
        **{"per_process": 2, "processes": 1, "accumulate": 2, "effective": 4},
        **{"scale_lr": "linear", "lr": pytest.approx(6e-3)},
    }
    line = "Effective batch 2 x 1 processes x 2 accumulated = 4 images; learning rate 0.006"
    assert f"{line} (training.scale_lr=linear)\n" in capsys.readouterr().out
    assert last["config"]["lightning_module"]["optimizer"]["lr"] == 3e-3

    resume = ("trainer.max_epochs=2", "trainer.accumulate_grad_batches=1", "training.compile=true")
    folder = f"resume={last['config']['paths']['run']}"
    second, checkpoint = train("run", "training.scale_lr=linear", *resume, folder)
    text = capsys.readouterr().out
    assert "Until now the run took 4 images a step" in text
    assert second["batch"]["effective"] == 2
    assert checkpoint["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(6e-3)
    assert checkpoint["epoch"] == 1
    third, _ = train("run", *resume[1:], "trainer.max_epochs=3", folder)
    assert "Until now" not in capsys.readouterr().out
    assert third["batch"]["lr"] == pytest.approx(3e-3), "scaled once, from the config"


@pytest.mark.parametrize("channels_last", [True, False])
def test_a_teacher_computes_the_same_with_less_work(channels_last):
    torch.manual_seed(0)
    network = DermoSegDiff(**NARROW)
    schedule = NoiseSchedule(50)
    losses = {"l2": {"weight": 1}}
    settings = {"num_images": 1, "ensemble": 1, "num_timesteps": 1}
    module = DiffusionSegmentation(
        network, schedule, DDIM(2), losses, {"name": "SGD", "lr": 0.1}, settings
    )
    teacher = FrozenTeacher(module)
    inputs = torch.rand(2, 1, 8, 8), torch.rand(2, 3, 8, 8), torch.tensor([3, 49])
    expected = teacher.denoise(*inputs)
    accelerate_teacher(teacher, NOTHING | {"channels_last": channels_last})
    assert teacher.network is not network
    assert isinstance(teacher.network.head_block.time, nn.Embedding)
    kernel = teacher.network.head_block.block1.conv.weight
    assert kernel.is_contiguous(memory_format=torch.channels_last) == channels_last
    torch.testing.assert_close(teacher.denoise(*inputs), expected, rtol=1e-4, atol=1e-5)
    teacher.to(torch.device("cpu"), torch.bfloat16)
    rounded = teacher.denoise(*(values.bfloat16() for values in inputs[:2]), inputs[2])
    torch.testing.assert_close(rounded.float(), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_a_fused_optimizer_clips_in_bfloat16_as_another(train, algorithm):
    common = (
        *("trainer.precision=bf16-mixed", "trainer.gradient_clip_val=1e-3"),
        *("trainer.max_epochs=1", f"trainer.gradient_clip_algorithm={algorithm}", *AVERAGED),
        *("lightning_module.optimizer.name=SGD", "~lightning_module.optimizer.betas"),
    )
    _, plain = train("plain", *common)
    _, fused = train("fused", *common, "lightning_module.optimizer.fused=true")
    _, free = train("free", *common, "trainer.gradient_clip_val=null")
    assert_near(plain["state_dict"], fused["state_dict"], rtol=1e-3, atol=1e-5)
    apart = [
        (plain["state_dict"][key] - free["state_dict"][key]).abs().max()
        for key, values in plain["state_dict"].items()
        if values.is_floating_point()
    ]
    assert max(apart) > 1e-3, "clipping matters"


def test_scaled_gradients_are_not_clipped_by_a_fused_optimizer(make_config):
    fused = ("lightning_module.optimizer.fused=true", "trainer.precision=16-mixed")
    check_fused(make_config(*fused))
    check_fused(make_config(*fused[1:], "trainer.gradient_clip_val=1"))
    with pytest.raises(UserError, match="fused=true unscales the gradients of trainer.precision"):
        check_fused(make_config(*fused, "trainer.gradient_clip_val=1"))
