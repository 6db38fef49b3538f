"""Self-supervised distillation: the reference's numbers, kept rows and the order of rotations."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from common.errors import UserError
from lightning_modules.adapters import ChannelAdapter, ProjectionHead
from lightning_modules.losses import (
    channel_gram_rmse,
    cross_entropy_loss,
    kd_kl,
    rank_filter,
    relational_kd,
    ss_contrastive,
    ss_kd,
    ss_similarity,
    transformed_kd,
)


def projected(case, head, pooled):
    """The case's projection of pooled features, with a graph to the stored weights."""
    weights = {name.replace("_", "."): value for name, value in case.heads(head).items()}
    return functional_call(ProjectionHead(pooled.shape[1]), weights, (pooled,))


def images_of_rows(count):
    return torch.arange(count).repeat_interleave(3)


def split(rows):
    """Rows of normal images and those of transformed ones."""
    normal = torch.arange(len(rows)) % 4 == 0
    return rows[normal], rows[~normal]


def test_the_teachers_contrast_is_the_references(golden_cases):
    cases = golden_cases("ssd_kd", "ss_teacher_contrastive")
    assert len(cases) == 3
    for case in cases:
        similarity = ss_similarity(projected(case, "projt_", case.inputs["pool_t"]))
        torch.testing.assert_close(similarity, case.outputs["simi"], **case.near("loss"))
        assert torch.equal(case.outputs["target"], images_of_rows(similarity.shape[1]))
        case.check(ss_contrastive(similarity))


def test_the_students_step_is_the_references(golden_cases):
    cases = golden_cases("ssd_kd", "ssd_kd_student_step")
    assert len(cases) == 3
    for case in cases:
        inputs, params = case.inputs, case.params
        normal, transformed = split(inputs["logits_s"])
        teacher_normal, teacher_transformed = split(inputs["logits_t"])
        label = inputs["target"].repeat_interleave(3)
        student_similarity, teacher_similarity = (
            ss_similarity(projected(case, f"proj{who}_", inputs[f"pool_{who}"])) for who in "st"
        )
        adapter = ChannelAdapter(inputs["feats_s"].shape[1:], inputs["feats_t"].shape[1:])
        weights = {k.replace("_", ".", 1): v for k, v in case.heads("reg_").items()}
        adapted = functional_call(adapter, weights, (inputs["feats_s"],))
        relations = relational_kd(
            inputs["pool_s"], inputs["pool_t"], params["w_dist"], params["w_angle"]
        )
        channels = channel_gram_rmse(adapted, inputs["feats_t"])
        terms = {
            "loss1_ce": cross_entropy_loss(normal, inputs["target"], inputs["class_weight"]),
            "loss2_kd": kd_kl(normal, teacher_normal, params["kd_T"]),
            "loss3_tf": transformed_kd(
                transformed, teacher_transformed, label, params["tf_T"], params["ratio_tf"]
            ),
            "loss4_ss": ss_kd(
                student_similarity, teacher_similarity, params["ss_T"], params["ratio_ss"]
            ),
            "loss5_dr": params["lambd_drkd"] * relations + params["lambd_crkd"] * channels,
        }
        names = ("ce_weight", "kd_weight", "tf_weight", "ss_weight", "hr_w")
        total = sum(params[n] * term for n, term in zip(names, terms.values(), strict=True))
        near = {"rtol": case.tolerance["loss_rtol"], "atol": 1e-6}
        values = {**terms, "total": total, "s_simi": student_similarity}
        for name, value in {**values, "t_simi": teacher_similarity}.items():
            torch.testing.assert_close(value.detach(), case.outputs[name], **near)

        target = images_of_rows(len(inputs["target"]))
        for name, scores, rows, ratio in (
            ("tf", teacher_transformed, label, params["ratio_tf"]),
            ("ss", teacher_similarity, target, params["ratio_ss"]),
        ):
            kept = case.outputs[f"distill_index_{name}"]
            assert torch.equal(rank_filter(scores, rows, ratio), kept)

        total.backward()
        assert len(case.gradients) == 11
        # Batch norm takes the mean away, and with it the bias before; what remains is rounding.
        bias = inputs["reg_conv_bias"].grad.abs().max()
        assert bias < 1e-4 * inputs["reg_bn_bias"].grad.abs().max()
        for name, expected in case.gradients.items():
            if name != "reg_conv_bias":
                torch.testing.assert_close(inputs[name].grad, expected, **case.near("grad"))


def test_defaults_are_those_of_the_reference(golden_cases):
    case = golden_cases("ssd_kd", "ssd_kd_student_step")[0]
    transformed, teacher = (split(case.inputs[f"logits_{who}"])[1] for who in "st")
    label = case.inputs["target"].repeat_interleave(3)
    near = {"rtol": case.tolerance["loss_rtol"], "atol": 1e-6}
    value = transformed_kd(transformed, teacher, label).detach()
    torch.testing.assert_close(value, case.outputs["loss3_tf"], **near)
    value = ss_kd(case.outputs["s_simi"], case.outputs["t_simi"])
    torch.testing.assert_close(value, case.outputs["loss4_ss"], **near)


def test_similarities_by_hand():
    zero = [0.0, 0.0]
    rows = [[2.0, 0.0], [1.0, 0.0], [0.0, 5.0], [-3.0, 0.0]]
    rows += [[3.0, 4.0], [1.0, 1.0], zero, [-6.0, -8.0]]
    half = math.sqrt(0.5)
    expected = [[1, 0.6], [0, 0.8], [-1, -0.6], [half, 1.4 * half], zero, [-0.6, -1]]
    similarity = ss_similarity(torch.tensor(rows))
    torch.testing.assert_close(similarity, torch.tensor(expected))


def test_similarities_are_cosines_whatever_the_lengths():
    rows = torch.randn(20, 6)
    normal, transformed = split(rows)
    expected = F.cosine_similarity(transformed[:, None], normal[None], dim=2)
    torch.testing.assert_close(ss_similarity(rows), expected)
    scaled = rows * torch.rand(20, 1).add(0.5).log().exp() * 1e12
    torch.testing.assert_close(ss_similarity(scaled), expected)


def test_rows_of_zeros_are_finite():
    rows = torch.randn(12, 6)
    rows[[0, 2, 5]] = 0
    rows.requires_grad_()
    similarity = ss_similarity(rows)
    assert torch.equal(similarity[:, 0], torch.zeros(9))
    assert torch.equal(similarity[1], torch.zeros(3))
    ss_contrastive(similarity).backward()
    assert rows.grad.isfinite().all()
    # Of a size that a step of the optimiser survives.
    assert rows.grad.abs().max() < 10


def test_an_image_without_its_rotations_is_refused():
    with pytest.raises(UserError, match="got 6 rows, but an image has 4"):
        ss_similarity(torch.randn(6, 3))


@pytest.mark.parametrize(
    ("similarity", "expected"),
    [
        # One image leaves no choice; two equal ones leave a half.
        ([[0.3], [-1.0], [1.0]], 0.0),
        ([[0.5, 0.5]] * 6, math.log(2)),
        ([[1.0, -1.0]] * 3 + [[-1.0, 1.0]] * 3, math.log(1 + math.exp(-2))),
        ([[-1.0, 1.0]] * 3 + [[1.0, -1.0]] * 3, math.log(1 + math.exp(2))),
        ([[1.0, -1.0]] * 6, (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(2))) / 2),
    ],
)
def test_the_contrast_by_hand(similarity, expected):
    value = ss_contrastive(torch.tensor(similarity, dtype=torch.float64)).item()
    assert value == pytest.approx(expected, abs=1e-12)


# Ranks of the target 0: 0, 2, 1, 0, 1, 2.
SCORES = torch.tensor(
    [
        [3.0, 1.0, 2.0],
        [1.0, 2.0, 3.0],
        [2.0, 3.0, 1.0],
        [9.0, 0.0, 8.0],
        [2.0, 1.0, 3.0],
        [1.0, 3.0, 2.0],
    ]
)


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        (0.0, [0, 3]),
        (0.24, [0, 3]),
        (0.25, [0, 2, 3]),
        (0.5, [0, 2, 3, 4]),
        (0.75, [0, 1, 2, 3, 4]),
        (0.99, [0, 1, 2, 3, 4]),
        (1.0, [0, 1, 2, 3, 4, 5]),
        (1, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_kept_rows_by_hand(ratio, expected):
    kept = rank_filter(SCORES, torch.zeros(6, dtype=torch.int64), ratio)
    assert kept.dtype == torch.int64
    assert kept.tolist() == expected


def test_kept_rows_follow_the_target():
    target = torch.tensor([1, 2, 1, 0, 0, 2])
    # Ranks 2, 0, 0, 0, 1, 1.
    assert rank_filter(SCORES, target, 0.0).tolist() == [1, 2, 3]
    assert rank_filter(SCORES, target, 0.4).tolist() == [1, 2, 3, 4]
    assert rank_filter(SCORES, target, 0.7).tolist() == [1, 2, 3, 4, 5]
    assert rank_filter(SCORES[:, :1], torch.zeros(6, dtype=torch.int64), 0.0).tolist() == [
        *range(6)
    ]


@pytest.mark.parametrize("count", [20, 300, 5000])
def test_ties_are_resolved_by_order(count):
    # Only a stable sort puts the first of many equal ones first.
    scores, target = torch.zeros(count, 40), torch.arange(count) % 40
    right = [index for index in range(count) if index % 40 == 0]
    assert rank_filter(scores, target, 0.0).tolist() == right
    # All wrong rows have one rank: the first of them are kept.
    scores[:, 0] = 1
    kept = rank_filter(scores, torch.ones(count, dtype=torch.int64), 0.5)
    assert kept.tolist() == [*range(count // 2)]


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.75, 1.0])
def test_what_is_kept_ranks_no_higher_than_what_is_dropped(ratio):
    scores, target = torch.randn(200, 9), torch.randint(9, (200,))
    rank = (scores > scores.gather(1, target[:, None])).sum(1)
    kept = rank_filter(scores, target, ratio)
    assert torch.equal(kept, kept.unique())
    wrong = int((rank > 0).sum())
    assert 0 < wrong < 200
    assert len(kept) == 200 - wrong + int(ratio * wrong)
    assert set((rank == 0).nonzero().flatten().tolist()) <= set(kept.tolist())
    dropped = torch.ones(200, dtype=torch.bool).scatter(0, kept, False)
    assert dropped.any() == (ratio < 1)
    if dropped.any():
        assert rank[kept].max() <= rank[dropped].min()


@pytest.mark.parametrize("ratio", [-0.1, 1.01, math.nan])
def test_illegal_ratios_are_named(ratio):
    similarity, label = torch.randn(6, 2), torch.zeros(6, dtype=torch.int64)
    for call in (
        lambda: rank_filter(SCORES, label, ratio),
        lambda: transformed_kd(SCORES, SCORES, label, ratio=ratio),
        lambda: ss_kd(similarity, similarity, ratio=ratio),
    ):
        with pytest.raises(UserError, match=f"ratio={ratio} of a rank filter must be in"):
            call()


@pytest.mark.parametrize("temperature", [0, -1.0, math.nan])
def test_illegal_temperatures_are_named(temperature):
    similarity, label = torch.randn(6, 2), torch.zeros(6, dtype=torch.int64)
    message = "losses.{}.temperature={} must be above 0"
    with pytest.raises(UserError, match=message.format("transformed_kd", temperature)):
        transformed_kd(SCORES, SCORES, label, temperature)
    with pytest.raises(UserError, match=message.format("ss_kd", temperature)):
        ss_kd(similarity, similarity, temperature)


def test_distillation_is_over_the_rows_kept():
    student, label = torch.randn(6, 3), torch.zeros(6, dtype=torch.int64)
    for ratio, kept in ((1.0, [0, 1, 2, 3, 4, 5]), (0.5, [0, 2, 3, 4]), (0.0, [0, 3])):
        value = transformed_kd(student, SCORES, label, 4.0, ratio)
        assert value == kd_kl(student[kept], SCORES[kept], 4.0)
    # The teacher finds the image of the rows 0 and 5 alone.
    teacher = torch.tensor([[0.9, 0.1]] + [[0.2, 0.8]] * 2 + [[0.7, 0.3]] * 2 + [[0.1, 0.9]])
    student = torch.rand(6, 2)
    for ratio, kept in ((0.75, [0, 1, 2, 3, 5]), (0.0, [0, 5])):
        value = ss_kd(student, teacher, 0.5, ratio)
        assert value == kd_kl(student[kept], teacher[kept], 0.5)


def test_nothing_kept_costs_nothing():
    logits, teacher = torch.randn(3, 2, requires_grad=True), torch.tensor([[0.0, 1.0]] * 3)
    value = transformed_kd(logits, teacher, torch.zeros(3, dtype=torch.int64), ratio=0.3)
    assert value == 0
    value.backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))
    similarity = torch.randn(6, 2, requires_grad=True)
    wrong = torch.tensor([[0.0, 1.0]] * 3 + [[1.0, 0.0]] * 3)
    value = ss_kd(similarity, wrong, ratio=0.1)
    assert value == 0
    value.backward()
    assert torch.equal(similarity.grad, torch.zeros_like(similarity))


def calls(rows, teacher_rows):
    """Every loss of a batch of two images, whose pooled features stand in for their logits."""
    label = torch.tensor([0, 0, 0, 2, 2, 2])
    similarity, teacher_similarity = ss_similarity(rows), ss_similarity(teacher_rows)
    yield ss_contrastive(similarity)
    yield transformed_kd(split(rows)[1], split(teacher_rows)[1], label)
    yield ss_kd(similarity, teacher_similarity)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast_lose_no_digits(dtype):
    student, teacher = torch.randn(2, 8, 5).to(dtype)
    exact = list(calls(student.float(), teacher.float()))
    for half, expected in zip(calls(student, teacher), exact, strict=True):
        assert half.dtype == torch.float32
        assert half == expected
    with torch.autocast("cpu", torch.bfloat16):
        assert list(calls(student.float(), teacher.float())) == exact
    assert all(value.dtype == torch.float64 for value in calls(student.double(), teacher))


def test_equal_students_have_nothing_to_learn_and_teachers_no_gradient():
    teacher = torch.randn(8, 5, requires_grad=True)
    student = teacher.detach().clone().requires_grad_()
    _, transformed, similarity = calls(student, teacher)
    assert transformed == 0
    assert similarity == 0
    (transformed + similarity).backward()
    torch.testing.assert_close(student.grad, torch.zeros_like(student), rtol=0, atol=1e-6)
    student = torch.randn(8, 5, requires_grad=True)
    sum(calls(student, teacher)).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0
