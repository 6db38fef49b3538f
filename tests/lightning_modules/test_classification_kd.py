"""D-KD, SSD-KD and their baselines: what a student is compared with, on which views, by whom."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from common.errors import UserError
from lightning_modules import Classification, ClassificationDistillation, SelfSupervisedHead
from lightning_modules.adapters import ChannelAdapter, ProjectionHead
from lightning_modules.losses import (
    channel_gram_rmse,
    hint_mse,
    kd_kl,
    relational_kd,
    ss_contrastive,
    ss_kd,
    ss_similarity,
    transformed_kd,
)
from lightning_modules.teacher import FrozenTeacher
from tasks.build import build_module, build_network

SGD = {"name": "SGD", "lr": 0.05, "momentum": 0.9}
CLASSES = ("bkl", "mel", "nv")
TAPS = {"features": None, "pooled": "backbone"}
ONE_VIEW = {
    "cross_entropy": {"weight": 0.5},
    "kd": {"weight": 0.5, "temperature": 5.0},
    "drkd": {"weight": 1},
    "crkd": {"weight": 1000},
    "hint": {"weight": 0.3},
}
FOUR_VIEWS = {
    "cross_entropy": {"weight": 0.1},
    "kd": {"weight": 0.9, "temperature": 4.0},
    "transformed_kd": {"weight": 2.7},
    "ss_kd": {"weight": 10},
    "drkd": {"weight": 1},
    "crkd": {"weight": 1000},
}


def make(student, teacher, losses, **settings):
    paths = {"taps": TAPS, "teacher_taps": TAPS, "image_size": 16, **settings}
    return ClassificationDistillation(
        student, losses, SGD, classes=CLASSES, teacher=teacher, **paths
    )


def make_head(network, teacher=None):
    losses = {"ss_contrastive": {"weight": 1}}
    return SelfSupervisedHead(network, losses, SGD, CLASSES, teacher=teacher, taps=TAPS)


@pytest.fixture
def teacher(wider_classifier):
    """A classifier with a self-supervised head."""
    return FrozenTeacher(make_head(wider_classifier))


def test_d_kd_compares_one_view(small_classifier, teacher, photographs):
    module = make(small_classifier, teacher, ONE_VIEW)
    module.class_weights.copy_(torch.tensor([1.0, 4.0, 2.0]))
    batch = photographs(6)
    losses, _ = module.weighted_losses(batch, module.losses)

    image, network = batch["image"], teacher.network
    pooled = small_classifier.backbone(image)
    logits = small_classifier.head(pooled)
    # Maps that ReLU and BatchNorm have not seen the last of: those before pooling.
    maps = small_classifier.backbone[:5](image)
    theirs, their_maps = network.backbone(image), network.backbone[:5](image)
    adapted = module.adapter(maps)
    expected = {
        "cross_entropy": F.cross_entropy(logits, batch["label"], module.class_weights),
        "kd": kd_kl(logits, network(image), 5.0),
        "drkd": relational_kd(pooled, theirs, 25.0, 50.0),
        "crkd": channel_gram_rmse(adapted, their_maps),
        "hint": hint_mse(adapted, their_maps),
    }
    assert set(losses) == {"loss", *expected}
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value.detach(), msg=name)
    total = sum(ONE_VIEW[name]["weight"] * value for name, value in expected.items())
    torch.testing.assert_close(losses["loss"], total.to(losses["loss"].dtype))
    losses["loss"].backward()
    assert all(p.grad is not None for p in module.trained_parameters())
    assert all(p.grad is None for p in teacher.module.parameters())


def test_ssd_kd_compares_four_views(small_classifier, teacher, photographs):
    module = make(small_classifier, teacher, FOUR_VIEWS)
    assert module.wants_views
    batch = photographs(5)
    losses, answer = module.weighted_losses(batch, module.losses)

    rows = batch["views"].flatten(0, 1)
    network = teacher.network
    upright = torch.arange(20) % 4 == 0
    pooled = small_classifier.backbone(rows)
    logits = small_classifier.head(pooled)
    with torch.no_grad():
        their_pooled = network.backbone(rows)
        their_logits = network.head(their_pooled)
        their_maps = network.backbone[:5](rows)
        their_similarity = ss_similarity(teacher.module.projection(their_pooled))
    adapted = module.adapter(small_classifier.backbone[:5](rows))
    label = batch["label"].repeat_interleave(3)
    expected = {
        "cross_entropy": F.cross_entropy(logits[upright], batch["label"]),
        "kd": kd_kl(logits[upright], their_logits[upright], 4.0),
        "transformed_kd": transformed_kd(logits[~upright], their_logits[~upright], label),
        "ss_kd": ss_kd(ss_similarity(module.projection(pooled)), their_similarity),
        "drkd": relational_kd(pooled, their_pooled),
        "crkd": channel_gram_rmse(adapted, their_maps),
    }
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value.detach(), msg=name)
    assert torch.equal(answer["logits"], logits[upright])
    losses["loss"].backward()
    assert all(p.grad is not None for p in module.trained_parameters())


def test_one_call_of_each_network_a_step_and_a_teacher_that_does_not_move(
    small_classifier, teacher, photographs, make_trainer, calls
):
    module = make(small_classifier, teacher, FOUR_VIEWS)
    before = copy.deepcopy(teacher.module.state_dict())
    assert any("running_var" in key for key in before)
    student_calls, teacher_calls = calls(small_classifier), calls(teacher.network)
    loader = DataLoader([photographs(6)], batch_size=None)
    make_trainer(max_epochs=5, check_val_every_n_epoch=5).fit(module, loader, loader)
    assert (len(student_calls), len(teacher_calls)) == (5 + 1, 5), "validation needs no teacher"
    after = teacher.module.state_dict()
    assert all(torch.equal(value, before[key]) for key, value in after.items())
    assert not teacher.module.training
    hooked = [m for n in (small_classifier, teacher.network) for m in n.modules()]
    assert sum(len(m._forward_hooks) for m in hooked) == 2, "those that count calls"
    assert int(small_classifier.backbone[1].num_batches_tracked) == 5


def test_an_imitation(small_classifier, teacher, photographs, make_trainer):
    losses = {"kd": {"weight": 1, "temperature": 1.0}, "drkd": {"weight": 0.01}}
    module, batch = make(small_classifier, teacher, losses), photographs(12)
    with torch.no_grad():
        teacher.network.head.weight.mul_(20)
    make_trainer(max_epochs=120).fit(module, DataLoader([batch], batch_size=None))
    ours = small_classifier.train()(batch["image"]).softmax(1)
    theirs = teacher.predict(batch)["probability"]
    assert (theirs.amax(1) - theirs.amin(1)).mean() > 0.2
    assert (ours - theirs).abs().mean() < 0.05


def test_the_validation_loss_is_a_switch(small_classifier, teacher, photographs):
    batch = photographs(6)
    plain = make(small_classifier, teacher, ONE_VIEW)
    losses, answer = plain.weighted_losses(batch, plain.val_terms)
    assert set(losses) == {"loss", "cross_entropy"}
    torch.testing.assert_close(losses["loss"], F.cross_entropy(answer["logits"], batch["label"]))
    full = make(small_classifier, teacher, ONE_VIEW, val_loss="full_kd")
    assert set(full.weighted_losses(batch, full.val_terms)[0]) == {"loss", *ONE_VIEW}
    with pytest.raises(UserError, match="lightning_module.val_loss=all"):
        make(small_classifier, teacher, ONE_VIEW, val_loss="all")


def test_what_only_serves_to_learn_exists_where_a_term_needs_it(small_classifier, teacher):
    assert make(small_classifier, teacher, {"kd": {"weight": 1}}).adapter is None
    module = make(small_classifier, teacher, {"crkd": {"weight": 1}})
    assert isinstance(module.adapter, ChannelAdapter)
    assert module.projection is None
    module = make(small_classifier, teacher, {"ss_kd": {"weight": 1}})
    assert module.adapter is None
    assert isinstance(module.projection, ProjectionHead)
    own = {id(p) for p in (*small_classifier.parameters(), *module.projection.parameters())}
    assert {id(p) for p in module.trained_parameters()} == own
    assert {id(p) for p in module.parameters()} == own, "the teacher is outside"


def test_a_student_is_tested_without_its_teacher(
    small_classifier, teacher, photographs, make_trainer
):
    trained = make(small_classifier, teacher, FOUR_VIEWS)
    alone = make(copy.deepcopy(small_classifier), None, FOUR_VIEWS)
    state = trained.state_dict()
    assert {key.split(".")[0] for key in state} == {
        *("network", "adapter", "projection", "class_weights")
    }
    alone.load_state_dict(state)
    loader = DataLoader([photographs(6)], batch_size=None)
    (scores,) = make_trainer().test(alone, loader, verbose=False)
    assert {key for key in scores if "loss" in key} == {"test/loss", "test/loss/cross_entropy"}
    with pytest.raises(RuntimeError, match="Unexpected key"):
        alone.load_state_dict({**state, "other.weight": torch.zeros(1)})


def test_the_head_learns_and_nothing_of_the_network_moves(
    wider_classifier, photographs, make_trainer, calls
):
    owner = Classification(
        copy.deepcopy(wider_classifier), {"cross_entropy": {"weight": 1}}, SGD, CLASSES
    )
    with torch.no_grad():
        owner.network.head.bias.add_(1)
    module = make_head(wider_classifier, FrozenTeacher(owner))
    assert torch.equal(wider_classifier.head.bias, owner.network.head.bias)
    before = copy.deepcopy(wider_classifier.state_dict())
    batch = photographs(6)
    loader = DataLoader([batch], batch_size=None)
    start = module.weighted_losses(batch, module.losses)[0]["loss"]
    trainer = make_trainer(max_epochs=30, check_val_every_n_epoch=30)
    trainer.fit(module, loader, loader)
    logged = trainer.callback_metrics
    assert logged["val/loss/ss_contrastive"] < start - 0.05
    assert {"val/balanced_accuracy"} <= set(logged)
    after = wider_classifier.state_dict()
    assert all(torch.equal(value, before[key]) for key, value in after.items())
    assert not wider_classifier.training
    trained = {id(p) for p in module.trained_parameters()}
    assert trained == {id(p) for p in module.projection.parameters()}
    rows = batch["views"].flatten(0, 1)
    expected = ss_contrastive(ss_similarity(module.projection(wider_classifier.backbone(rows))))
    torch.testing.assert_close(logged["val/loss"], expected.detach())
    seen = calls(wider_classifier)
    (scores,) = trainer.test(module, loader, verbose=False)
    assert len(seen) == 1
    assert not [key for key in scores if "loss" in key]


def test_a_head_of_another_network_is_refused(small_classifier, wider_classifier):
    other = Classification(small_classifier, {"cross_entropy": {"weight": 1}}, SGD, CLASSES)
    with pytest.raises(UserError, match="teacher's network .* network.kwargs"):
        make_head(wider_classifier, FrozenTeacher(other))


def test_ss_kd_needs_a_teacher_with_a_head(small_classifier, wider_classifier):
    plain = Classification(wider_classifier, {"cross_entropy": {"weight": 1}}, SGD, CLASSES)
    with pytest.raises(UserError, match=r"ss_kd needs a teacher with a self-supervised head"):
        make(small_classifier, FrozenTeacher(plain), FOUR_VIEWS)


def test_taps_are_checked(small_classifier, teacher):
    for key in ("taps", "teacher_taps"):
        wrong = {key: {**TAPS, "features": "backbone.7"}}
        with pytest.raises(UserError, match=rf"lightning_module.{key}.features=backbone.7 is no"):
            make(small_classifier, teacher, ONE_VIEW, **wrong)
    vector = {"taps": {**TAPS, "pooled": "backbone.3"}}
    with pytest.raises(UserError, match=r"taps.pooled=backbone.3 gives no vector"):
        make(small_classifier, teacher, ONE_VIEW, **vector)
    with pytest.raises(UserError, match=r"taps.pooled has no value"):
        make(small_classifier, teacher, ONE_VIEW, taps={"features": None})


def test_taps_choose_other_features(small_classifier, teacher):
    module = make(small_classifier, teacher, ONE_VIEW, taps={**TAPS, "features": "backbone.2"})
    # Twice as large as the teacher's.
    assert module.adapter(torch.rand(2, 6, 8, 8)).shape == (2, 20, 4, 4)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "32-true"])
def test_terms_are_finite_in_every_precision(
    small_classifier, teacher, photographs, make_trainer, precision
):
    module = make(small_classifier, teacher, FOUR_VIEWS)
    batch = photographs(4)
    loader = DataLoader([batch], batch_size=None)
    trainer = make_trainer(max_epochs=2, precision=precision)
    if precision == "bf16-true":
        batch |= {key: batch[key].bfloat16() for key in ("image", "views")}
    trainer.fit(module, loader, loader)
    logged = trainer.callback_metrics
    assert all(torch.isfinite(logged[key]) for key in logged)
    assert len([key for key in logged if key.startswith("train/loss/")]) == len(FOUR_VIEWS)


@pytest.mark.parametrize("losses", [ONE_VIEW, FOUR_VIEWS])
def test_a_batch_of_one_image_gives_finite_gradients(
    small_classifier, teacher, photographs, losses
):
    module = make(small_classifier, teacher, losses)
    values, _ = module.weighted_losses(photographs(1), module.losses)
    values["loss"].backward()
    gradients = [p.grad for p in module.trained_parameters() if p.grad is not None]
    assert gradients
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize(
    ("method", "weights"),
    [
        ("blkd", {"cross_entropy": 0.5, "kd": 0.5}),
        ("d_kd", {"cross_entropy": 0.5, "kd": 0.5, "drkd": 1, "crkd": 1000}),
        ("fitnet", {"cross_entropy": 0.01, "hint": 1}),
        ("rkd", {"cross_entropy": 3, "drkd": 1}),
        ("ssd_kd", {name: term["weight"] for name, term in FOUR_VIEWS.items()}),
    ],
)
def test_published_methods_are_weights(method, weights, make_config):
    config = make_config(f"lightning_module={method}")["lightning_module"]
    assert config["name"] == "ClassificationDistillation"
    assert {k: v["weight"] for k, v in config["losses"].items() if v["weight"]} == weights
    temperature = {"d_kd": 5.0, "blkd": 5.0, "ssd_kd": 4.0}
    if method in temperature:
        assert config["losses"]["kd"]["temperature"] == temperature[method]
    terms = config["losses"]
    assert (terms["drkd"]["distance_weight"], terms["drkd"]["angle_weight"]) == (25, 50)
    assert (terms["transformed_kd"]["temperature"], terms["transformed_kd"]["ratio"]) == (4, 1)
    assert (terms["ss_kd"]["temperature"], terms["ss_kd"]["ratio"]) == (0.5, 0.75)


def test_the_published_pair_meets_at_the_published_taps(make_config):
    config = make_config("experiment=ssd_kd_isic2019")
    config["lightning_module"]["classes"] = list("ABCDEFGH")
    with torch.device("meta"):
        student, network = (
            build_network(make_config(f"network={name}")["network"])
            for name in ("mobilenet_v2", "resnet50")
        )
        head = SelfSupervisedHead(
            network, {"ss_contrastive": {"weight": 1}}, SGD, list("ABCDEFGH"), teacher=None,
            taps={"pooled": "backbone"},
        )  # fmt: skip
        module = build_module(config, student, FrozenTeacher(head))
    assert (module.taps["features"], module.teacher_taps["features"]) == (
        "backbone.features",
        "backbone.layer4",
    )
    counts = {
        name: sum(p.numel() for p in part.parameters())
        for name, part in (("adapter", module.adapter), ("projection", module.projection))
    }
    assert counts == {"adapter": 2_627_584, "projection": 3_279_360}
    assert sum(p.numel() for p in head.projection.parameters()) == 8_392_704
