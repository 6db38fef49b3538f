"""Relations between features: the reference's numbers, by hand, invariances and hard batches."""

import math

import pytest
import torch
from torch.func import functional_call

from common.errors import UserError
from lightning_modules.adapters import ChannelAdapter
from lightning_modules.losses import (
    channel_gram_rmse,
    cross_entropy_loss,
    hint_mse,
    kd_kl,
    pairwise_distances,
    relational_kd,
    rkd_angle,
    rkd_distance,
)

OF_VECTORS = (rkd_distance, rkd_angle, relational_kd)
OF_MAPS = (channel_gram_rmse, hint_mse)


def adapted(case):
    """The student's features after the case's adapter, with a graph to the stored weights."""
    weights = case.heads("reg_")
    adapter = ChannelAdapter(case.inputs["feats_s"].shape[1:], case.inputs["feats_t"].shape[1:])
    weights = {name.replace("_", ".", 1): value for name, value in weights.items()}
    return functional_call(adapter, weights, (case.inputs["feats_s"],))


def labelled(case):
    inputs = case.inputs
    return cross_entropy_loss(inputs["logits_s"], inputs["target"], inputs["class_weight"])


def test_distances_are_the_references(golden_cases):
    cases = golden_cases("ssd_kd", "pdist")
    assert len(cases) == 3
    for case in cases:
        distances = pairwise_distances(case.inputs["feat"])
        torch.testing.assert_close(distances.float(), case.outputs["dist"], **case.near("loss"))


@pytest.mark.parametrize(
    ("item", "loss"), [("rkd_distance", rkd_distance), ("rkd_angle", rkd_angle)]
)
def test_relations_of_samples_are_the_references(golden_cases, item, loss):
    cases = golden_cases("ssd_kd", item)
    assert len(cases) == 3
    for case in cases:
        case.check(loss(case.inputs["feat_s"], case.inputs["feat_t"]))


def test_the_baseline_of_relations_is_the_references(golden_cases):
    cases = golden_cases("ssd_kd", "drkd_baseline")
    assert len(cases) == 3
    for case in cases:
        weights = (case.params["w_dist"], case.params["w_angle"])
        relations = relational_kd(case.inputs["feat_s"], case.inputs["feat_t"], *weights)
        case.check(relations + case.params["lambd"] * labelled(case))


def test_the_relation_of_channels_is_the_references(golden_cases):
    cases = golden_cases("ssd_kd", "crkd_channel")
    assert len(cases) == 3
    for case in cases:
        case.check(channel_gram_rmse(case.inputs["feat_s"], case.inputs["feat_t"]))


def test_the_baseline_of_hints_is_the_references(golden_cases):
    cases = golden_cases("ssd_kd", "fitnet_baseline")
    assert len(cases) == 3
    for case in cases:
        hint = hint_mse(adapted(case), case.inputs["feats_t"])
        case.check(hint + case.params["lambd"] * labelled(case))


def test_the_loss_of_d_kd_is_the_references(golden_cases):
    cases = golden_cases("ssd_kd", "d_kd_total")
    assert len(cases) == 6
    for case in cases:
        inputs, params = case.inputs, case.params
        share = params["lambd"]
        weights = (params["w_dist"], params["w_angle"])
        loss = (
            (1 - share) * labelled(case)
            + share * kd_kl(inputs["logits_s"], inputs["logits_t"], params["T"])
            + params["lambd_rkd"] * relational_kd(inputs["pool_s"], inputs["pool_t"], *weights)
            + params["lambd_crkd"] * channel_gram_rmse(adapted(case), inputs["feats_t"])
        )
        case.check(loss)


def test_distances_by_hand():
    features = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0], [3.0, 0.0]])
    near = 1e-6
    expected = [[0, 5, near, 3], [5, 0, 5, 4], [near, 5, 0, 3], [3, 4, 3, 0]]
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(pairwise_distances(features), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("student", "teacher", "distance", "angle"),
    [
        # A right angle of sides 3, 4, 5 and three points on a line at 0, 1, 3: distances over their
        # means are (3, 4, 5) / 4 and (1, 3, 2) / 2, each twice among 9.
        (
            [[0, 0], [3, 0], [0, 4]],
            [[0], [1], [3]],
            2 * 0.5 * (0.25**2 + 0.5**2 + 0.25**2) / 9,
            # Cosines at the three corners are 0, 3/5, 4/5 and 1, -1, 1; each twice among 27.
            2 * (0.5 * 1 + (1.6 - 0.5) + 0.5 * 0.2**2) / 27,
        ),
        # Two samples have one distance and no angle.
        ([[0, 0], [3, 4]], [[7], [1]], 0, 0),
        # The second and third sample coincide for the student: (1, 1, 0) / (2/3) and (1, 3, 2) / 2.
        (
            [[0.0], [1.0], [1.0]],
            [[0.0], [1.0], [3.0]],
            2 * (0.5 * 1 + 0.5 * 0 + 0.5 * 1) / 9,
            # At the first corner 1 and 1; at the others none and 1 with -1 and 1, and from these
            # corners to the coinciding one 0 and 1.
            (2 * 0.5 + 2 * 0.5 + 2 * 0.5) / 27,
        ),
    ],
)
def test_relations_of_samples_by_hand(student, teacher, distance, angle):
    student, teacher = (torch.tensor(f, dtype=torch.float64) for f in (student, teacher))
    # Coinciding rows are 1e-6 apart, not 0.
    assert rkd_distance(student, teacher).item() == pytest.approx(distance, rel=1e-5, abs=1e-12)
    assert rkd_angle(student, teacher).item() == pytest.approx(angle, rel=1e-9, abs=1e-12)
    total = relational_kd(student, teacher, 2.0, 3.0).item()
    assert total == pytest.approx(2 * distance + 3 * angle, rel=1e-5, abs=1e-12)


def test_relations_of_channels_by_hand():
    # Gram matrices of one pixel, over C H W = 2, and of two pixels, over 4.
    student = torch.tensor([1.0, 2.0]).view(1, 2, 1, 1)
    teacher = torch.tensor([[1.0, 1.0], [0.0, 2.0]]).view(1, 2, 1, 2)
    difference = torch.tensor([0.5 - 0.5, 1 - 0.5, 1 - 0.5, 2 - 1])
    expected = math.sqrt(difference.square().mean())
    assert channel_gram_rmse(student, teacher).item() == pytest.approx(expected)
    # One root over the batch: a second sample without difference halves the mean square.
    batch = [torch.cat([f, teacher[..., : f.shape[-1]]]) for f in (student, teacher)]
    batch[1] = torch.cat([teacher, teacher[..., :1].expand(1, 2, 1, 2)])
    assert channel_gram_rmse(*batch).item() == pytest.approx(expected / math.sqrt(2))


def test_hints_by_hand():
    student, teacher = torch.zeros(1, 2, 1, 2), torch.tensor([1.0, 2.0, 0.0, 3.0]).view(1, 2, 1, 2)
    assert hint_mse(student, teacher).item() == 14 / 4


def directly(features):
    """The cosines between differences of rows as their definition has it."""
    differences = features[None] - features[:, None]
    units = differences / differences.norm(dim=2, keepdim=True).clamp(min=1e-12)
    return torch.einsum("ijd,ikd->ijk", units, units)


def test_angles_are_those_of_the_definition():
    student, teacher = torch.randn(9, 5).double(), torch.randn(9, 20).double()
    student[4] = student[7]
    student.requires_grad_()
    value, expected = (
        rkd_angle(student, teacher),
        torch.nn.functional.smooth_l1_loss(directly(student), directly(teacher)),
    )
    torch.testing.assert_close(value, expected)
    gradient, expected_gradient = (
        torch.autograd.grad(v, student)[0][[0, 1, 2, 3, 5, 6, 8]] for v in (value, expected)
    )
    torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("channels", [3, 12, 40])
@pytest.mark.parametrize("teacher_size", [(4, 3), (2, 2), (5, 6)])
def test_the_relation_of_channels_is_that_of_the_gram_matrices(channels, teacher_size):
    student = torch.randn(3, channels, 4, 3, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, channels, *teacher_size, dtype=torch.float64)
    grams = [
        torch.einsum("ncp,ndp->ncd", f.flatten(2), f.flatten(2)) / f[0].numel()
        for f in (student, teacher)
    ]
    value, expected = (
        channel_gram_rmse(student, teacher),
        (grams[0] - grams[1]).square().mean().sqrt(),
    )
    torch.testing.assert_close(value, expected)
    gradients = [torch.autograd.grad(v, student)[0] for v in (value, expected)]
    torch.testing.assert_close(*gradients)


def transformed(features):
    """The same features turned, on another scale, elsewhere and in more dimensions."""
    count = features.shape[1]
    rotation = torch.linalg.qr(torch.randn(count, count, dtype=features.dtype)).Q
    moved = 3.7 * features @ rotation + torch.randn(count, dtype=features.dtype)
    return torch.cat([moved, torch.full_like(moved, 2.0)], dim=1)


@pytest.mark.parametrize("loss", OF_VECTORS)
def test_only_the_shape_of_the_batch_counts(loss):
    student, teacher = torch.randn(8, 6).double(), torch.randn(8, 9).double()
    value = loss(student, teacher)
    assert value > 0.01
    torch.testing.assert_close(loss(transformed(student), teacher), value)
    torch.testing.assert_close(loss(student, transformed(teacher)), value)
    assert loss(transformed(student), student) < 1e-12
    order = torch.randperm(8)
    torch.testing.assert_close(loss(student[order], teacher[order]), value)
    assert abs(loss(student[order], teacher) - value) > 1e-3
    stretched = student * torch.tensor([5.0, 1, 1, 1, 1, 1])
    assert abs(loss(stretched, teacher) - value) > 1e-3


@pytest.mark.parametrize("loss", OF_VECTORS)
def test_features_far_from_0_lose_no_digits(loss):
    student, teacher = torch.randn(8, 6).double(), torch.randn(8, 9).double()
    torch.testing.assert_close(loss(student + 1e6, teacher - 1e6), loss(student, teacher))


def test_the_relation_of_channels_knows_no_place():
    student, teacher = torch.randn(2, 2, 5, 3, 4).double()
    value = channel_gram_rmse(student, teacher)
    order = torch.randperm(12)
    elsewhere = student.flatten(2)[..., order].view_as(student)
    torch.testing.assert_close(channel_gram_rmse(elsewhere, teacher), value)
    assert abs(channel_gram_rmse(student[:, [1, 0, 2, 3, 4]], teacher) - value) > 1e-3


def hard_batches():
    """Student's and teacher's vectors, by what makes their distances or directions degenerate."""
    student, teacher = torch.randn(6, 4), torch.randn(6, 7)
    duplicates = student.clone()
    duplicates[3:] = duplicates[:3]
    close = student.clone()
    close[1:3] = close[0] * (1 + torch.tensor([[1e-7], [-1e-7]]))
    return {
        "one": (student[:1], teacher[:1]),
        "two": (student[:2], teacher[:2]),
        "duplicates": (duplicates, teacher),
        "duplicates of both": (duplicates, teacher[[0, 1, 2, 0, 1, 2]]),
        "close": (close, teacher),
        "close far from 0": (student * 1e-3 + 100, teacher),
        "equal": (student[:1].expand(6, 4), teacher),
        "equal for both": (student[:1].expand(6, 4), teacher[:1].expand(6, 7)),
        "the teacher's": (teacher.clone(), teacher),
        "zeros": (torch.zeros(6, 4), teacher),
        "zeros for both": (torch.zeros(6, 4), torch.zeros(6, 7)),
        "the teacher's are zeros": (student, torch.zeros(6, 7)),
        "large": (student * 1e18, teacher * 1e18),
        "one outlier": (torch.cat([student[:5], student[5:] * 1e12]), teacher),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("loss", OF_VECTORS)
@pytest.mark.parametrize("name", hard_batches())
def test_hard_batches_of_vectors_are_finite(name, loss, dtype):
    largest = torch.finfo(dtype).max
    student, teacher = (f.double().clamp(-largest, largest).to(dtype) for f in hard_batches()[name])
    student = student.clone().requires_grad_()
    value = loss(student, teacher)
    value.backward()
    assert value.isfinite()
    assert value >= 0
    assert value.dtype == torch.promote_types(dtype, torch.float32)
    assert student.grad.isfinite().all()
    if name in ("one", "equal for both", "zeros for both", "the teacher's"):
        assert value == 0
        torch.testing.assert_close(student.grad, torch.zeros_like(student), rtol=0, atol=1e-7)


def test_an_angle_is_no_larger_than_it_may_be_where_rows_are_close():
    student, teacher = hard_batches()["close"]
    values = [rkd_angle(student[[i, j, k]], teacher[:3]) for i, j, k in ((0, 1, 2), (1, 2, 5))]
    assert all(value <= 1.5 for value in values)
    # Float64 can hold rows so close that the products have no digit of their difference.
    tight = student.double()
    tight[1] = tight[0] * (1 + 1e-14)
    tight[2] = tight[0] * (1 - 1e-14)
    tight.requires_grad_()
    value = rkd_angle(tight, teacher.double())
    value.backward()
    assert value <= 1.5
    assert tight.grad.abs().max() < 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", OF_MAPS)
@pytest.mark.parametrize("channels", [4, 20])
def test_hard_batches_of_maps_are_finite(channels, loss, dtype):
    features = torch.randn(3, channels, 3, 3).relu().to(dtype)
    zeros, ones = torch.zeros_like(features), torch.ones_like(features)
    pairs = [
        (features, features, True),
        (zeros, zeros, True),
        (ones, ones, True),
        (zeros, features, False),
        (features, zeros, False),
        (features[:1], ones[:1], False),
        (features * 1e4, features, False),
        (features.nextafter(ones * 9) if dtype == torch.float32 else ones, features, False),
    ]
    for student, teacher, equal in pairs:
        student = student.clone().requires_grad_()
        value = loss(student, teacher.clone())
        value.backward()
        assert value.dtype == torch.float32
        assert value.isfinite()
        assert student.grad.isfinite().all()
        assert (value == 0) == equal
        assert (student.grad.abs().max() == 0) == equal or not student.any()


def test_a_small_difference_of_channels_is_told_apart():
    teacher = torch.randn(4, 64, 3, 3).double()
    step = torch.randn(4, 64, 3, 3).double()
    ratio = [channel_gram_rmse(teacher + size * step, teacher).item() for size in (1e-4, 1e-5)]
    assert ratio[0] / ratio[1] == pytest.approx(10, rel=1e-3)
    student = (teacher + 1e-5 * step).requires_grad_()
    channel_gram_rmse(student, teacher).backward()
    # The gradient of a root of squares has about one length near 0, as that of |x|.
    other = (teacher + 1e-3 * step).requires_grad_()
    channel_gram_rmse(other, teacher).backward()
    assert student.grad.norm().item() == pytest.approx(other.grad.norm().item(), rel=1e-2)


def vectors_or_maps(loss):
    shape = (6, 4, 2, 2) if loss in OF_MAPS else (6, 8)
    return torch.randn(2, *shape)


@pytest.mark.parametrize("loss", OF_VECTORS + OF_MAPS)
def test_half_precision_and_autocast_lose_no_digits(loss):
    student, teacher = vectors_or_maps(loss).bfloat16()
    exact = loss(student.float(), teacher.float())
    assert loss(student, teacher) == exact
    with torch.autocast("cpu", torch.bfloat16):
        cast = loss(student.float(), teacher.float())
    assert cast.dtype == torch.float32
    assert cast == exact
    assert loss(student.double(), teacher).dtype == torch.float64


@pytest.mark.parametrize("loss", OF_VECTORS + OF_MAPS)
def test_no_gradient_reaches_the_teacher(loss):
    student, teacher = (f.clone().requires_grad_() for f in vectors_or_maps(loss))
    loss(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


@pytest.mark.parametrize("loss", OF_VECTORS + OF_MAPS)
def test_gradients_are_those_of_finite_differences(loss):
    student, teacher = vectors_or_maps(loss).double()
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher), (student.requires_grad_(),))


def test_a_weight_of_0_computes_nothing(monkeypatch):
    def refuse(*_):
        raise AssertionError("computed in spite of its weight")

    module = "lightning_modules.losses.relational"
    student, teacher = torch.randn(6, 4, requires_grad=True), torch.randn(6, 7)
    distance, angle = rkd_distance(student, teacher), rkd_angle(student, teacher)
    with monkeypatch.context() as patch:
        patch.setattr(f"{module}.rkd_angle", refuse)
        assert relational_kd(student, teacher, 2.0, 0.0) == 2 * distance
        patch.setattr(f"{module}.rkd_distance", refuse)
        nothing = relational_kd(student, teacher, 0.0, 0.0)
        with pytest.raises(AssertionError, match="in spite"):
            relational_kd(student, teacher)
    assert relational_kd(student, teacher, 0.0, 3.0) == 3 * angle
    assert nothing == 0
    nothing.backward()
    assert torch.equal(student.grad, torch.zeros_like(student))


def test_the_weights_are_the_published_ones():
    student, teacher = torch.randn(6, 4).double(), torch.randn(6, 7).double()
    expected = 25 * rkd_distance(student, teacher) + 50 * rkd_angle(student, teacher)
    torch.testing.assert_close(relational_kd(student, teacher), expected)


def largest_saved(loss, student, teacher):
    """The most numbers that one tensor kept for the backward pass has."""
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: sizes.append(tensor.numel()) or tensor, lambda tensor: tensor
    ):
        value = loss(student.requires_grad_(), teacher)
    value.backward()
    assert student.grad.abs().sum() > 0
    return max(sizes)


def test_angles_of_128_samples_need_no_vectors_of_all_pairs():
    # (N, N, D) would be 8.4e6 numbers, (N, N, N) are 2.1e6.
    assert largest_saved(rkd_angle, torch.randn(128, 512), torch.randn(128, 600)) == 128**3


def test_the_relation_of_channels_takes_the_smaller_matrices():
    # (N, C, C) would be 8.4e6 numbers, the features are 2.0e5.
    maps = torch.randn(2, 2, 2048, 7, 7)
    assert largest_saved(channel_gram_rmse, *maps) == maps[0].numel()
    # Of few channels it is the products of all pixels that would be large.
    maps = torch.randn(2, 2, 4, 40, 40)
    assert largest_saved(channel_gram_rmse, *maps) == maps[0].numel()


@pytest.mark.parametrize("weight", [-1.0, math.nan])
@pytest.mark.parametrize("name", ["distance_weight", "angle_weight"])
def test_illegal_weights_are_named(name, weight):
    with pytest.raises(UserError, match=f"losses.drkd.{name}={weight} must be at least 0"):
        relational_kd(torch.zeros(2, 2), torch.zeros(2, 2), **{name: weight})


def test_maps_that_cannot_be_compared_are_refused():
    student, teacher = torch.zeros(2, 5, 3, 3), torch.zeros(2, 8, 3, 3)
    with pytest.raises(UserError, match="student's have 5 and the teacher's 8; adapt"):
        channel_gram_rmse(student, teacher)
    with pytest.raises(UserError, match=r"\(2, 5, 3, 3\) and the teacher's \(2, 8, 3, 3\); adapt"):
        hint_mse(student, teacher)
    with pytest.raises(UserError, match="equal shape"):
        hint_mse(torch.zeros(2, 8, 1, 1), teacher)
