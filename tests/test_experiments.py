"""Every shipped experiment trains, validates, samples, stores and tests."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.errors import UserError
from datamodules.decoding import read_mask
from tasks import fit
from tasks import test as test_task
from tasks.build import build_network, complete
from tasks.statistics import read_images
from tiny_runs import timeless

# Those that diagnose have their tests in test_diagnosis.py.
DIAGNOSES = ("classifier_", "d_kd_", "ssd_")
EXPERIMENTS = sorted(
    path.stem
    for path in (Path(__file__).resolve().parent.parent / "conf/experiment").iterdir()
    if not path.name.startswith((*DIAGNOSES, "_"))
)
TEACHER_OF = {
    name: name.replace("efkd_", "teacher_") for name in EXPERIMENTS if name.startswith("efkd_")
} | {
    "demo_efkd": "demo_teacher",
    "demo_unet_kd": "demo_unet_teacher",
    "deeplab_aux_isic2018": "deeplab_teacher_isic2018",
    "deeplab_kd_isic2018": "deeplab_aux_isic2018",
    "unet_kd_isic2016": "unet_teacher_isic2016",
    "unet_from_diffusion_isic2018": "teacher_isic2018",
    "one_step_efkd_isic2018": "one_step_teacher_isic2018",
    "one_step_published_isic2018": "one_step_teacher_isic2018",
    "one_step_compact_kd_isic2018": "one_step_compact_isic2018",
}
# Published without masks of their test part.
UNTESTABLE = [name for name in EXPERIMENTS if name.endswith("mediqa_magic")]
SMALL = ("datamodule.image_size=16", "sampler.ensemble=2")
# The made-up images are all in the training part; SegFormer needs multiples of 32 px.
SPECIAL = {
    name: ["datamodule.split=reference"] for name in EXPERIMENTS if name.startswith("deeplab_")
} | {
    key: ["datamodule.image_size=32"] for key in ("smp_segformer_isic2018", "one_step_smp_isic2018")
}


@pytest.fixture
def train(make_config, all_data, tmp_path):
    """Runs an experiment with `debug=fast` into a folder of `paths.runs`."""

    def run(experiment, *overrides, folder=None):
        config = make_config(
            f"experiment={experiment}",
            "debug=fast",
            *SMALL,
            "datamodule.num_samples=20" if "demo" in experiment else f"paths.data={all_data}",
            f"hydra.runtime.output_dir={tmp_path}/runs/{experiment}/{folder or 'now'}",
            *overrides,
        )
        fit.run(config)
        return Path(config["paths"]["run"])

    return run


AVERAGE, HAM_AVERAGE = (500, 0.9), (200, 0.95)
TEACHER, STUDENT = {"l2": 1, "boundary": 0.25}, {"l2": 1, "boundary": 0.25, "efkd": 0.25}
HAM_STUDENT = STUDENT | {"boundary": 0.2}
PUBLISHED = {
    # epochs, batch, rate, weights of losses, moving average (start, power), patience, clipping,
    # members, augmentation, its probability
    "teacher_isic2018": (2000, 16, 1e-4, TEACHER, AVERAGE, 5, None, 9, "teacher", 0.5),
    "student_isic2018": (2000, 16, 2e-4, STUDENT, AVERAGE, 10, 1.0, 9, "student", 0.7),
    "teacher_ham10000": (2000, 16, 1e-4, TEACHER, HAM_AVERAGE, 5, None, 9, "teacher", 0.25),
    "student_ham10000": (2000, 16, 2e-4, HAM_STUDENT, AVERAGE, 10, 1.0, 9, "student", 0.35),
    "teacher_isic2016": (500, 32, 1e-4, {"l2": 1}, AVERAGE, 5, None, 2, None, 1.0),
    "teacher_isic2017": (500, 32, 1e-4, {"l2": 1}, AVERAGE, 5, None, 2, None, 1.0),
    "teacher_ph2": (3000, 32, 1e-4, TEACHER, AVERAGE, 9, None, 5, "teacher", 0.5),
    "student_ph2": (2000, 16, 2e-4, STUDENT, AVERAGE, 10, 1.0, 9, "student", 0.7),
    "teacher_mediqa_magic": (500, 8, 1e-4, TEACHER, HAM_AVERAGE, 5, None, 5, "teacher", 0.5),
    "student_mediqa_magic": (2000, 8, 2e-4, HAM_STUDENT, AVERAGE, 10, 1.0, 9, "student", 0.35),
}
PARAMETERS = {
    "teacher_isic2018": 81_671_009,
    "teacher_ham10000": 40_355_937,
    "teacher_isic2016": 321_181_377,
    "teacher_isic2017": 321_181_377,
    "teacher_ph2": 321_181_377,
    "teacher_mediqa_magic": 157_749_441,
    "student_isic2018": 9_346_529,
    "student_ham10000": 8_504_929,
    "student_ph2": 9_346_529,
    "student_mediqa_magic": 8_504_929,
}


ONE_PASS = {
    # network, parameters, method, weights of losses, epochs, batch, px, rate, factor and patience
    "deeplab_teacher_isic2018": (
        *("DeepLabV3Plus", 58_748_833, "Segmentation", {"bce": 1}),
        *(200, 32, 224, 1e-3, (0.1, 10)),
    ),
    "deeplab_aux_isic2018": (
        *("DeepLabV3Plus", 58_748_833, "AuxiliaryHeads", {"auxiliary_bce": 1}),
        *(200, 32, 224, 1e-3, (0.1, 10)),
    ),
    "deeplab_kd_isic2018": (
        *("DeepLabV3Plus", 16_012_705, "SegmentationDistillation"),
        {"bce": 1, "logit_kd": 1, "auxiliary_kd": 0.05, "auxiliary_bce": 1},
        *(200, 32, 224, 1e-3, (0.1, 10)),
    ),
    "deeplab_raw_isic2018": (
        *("DeepLabV3Plus", 16_012_705, "Segmentation", {"bce": 1}),
        *(200, 32, 224, 1e-3, (0.1, 10)),
    ),
    "unet_teacher_isic2016": (
        *("DeepLabV3", 58_625_857, "Segmentation", {"bce": 1, "dice": 1}),
        *(50, 16, 256, 1e-3, (0.1, 5)),
    ),
    "unet_kd_isic2016": (
        *("UNet", 7_763_041, "SegmentationDistillation", {"dice": 0.5, "bernoulli_kl": 0.5}),
        *(50, 16, 256, 1e-3, (0.1, 5)),
    ),
    "unet_raw_isic2016": (
        *("UNet", 7_763_041, "Segmentation", {"bce": 1, "dice": 1}),
        *(50, 16, 256, 1e-3, (0.1, 5)),
    ),
    "unet_raw_isic2018": (
        *("UNet", 7_763_041, "Segmentation", {"bce": 1}),
        *(100, 16, 128, 1e-3, (0.5, 5)),
    ),
    "unet_from_diffusion_isic2018": (
        *("UNet", 7_763_041, "SegmentationDistillation", {"bce": 1, "logit_kd": 1}),
        *(100, 16, 128, 1e-3, (0.5, 5)),
    ),
    "smp_segformer_isic2018": (
        *("SmpNetwork", 3_714_401, "Segmentation", {"bce": 1, "dice": 1}),
        *(100, 16, 128, 1e-4, (0.5, 5)),
    ),
}


def test_every_experiment_has_its_recipe_here():
    students = {name for name in EXPERIMENTS if name.startswith("student_")}
    distilled = {name.replace("student_", "efkd_") for name in students}
    shipped = {name for name in EXPERIMENTS if not name.startswith(("demo_", "one_step_"))}
    assert set(PUBLISHED) | set(ONE_PASS) == shipped - distilled
    assert distilled <= shipped


@pytest.mark.parametrize("experiment", ONE_PASS)
def test_one_pass_experiments_are_the_specified_recipes(experiment, make_config):
    name, parameters, method, losses, *expected = ONE_PASS[experiment]
    config = make_config(f"experiment={experiment}")
    data, module, plateau = (config[key] for key in ("datamodule", "lightning_module", "callbacks"))
    plateau = (plateau["plateau"]["factor"], plateau["plateau"]["patience"])
    assert config["network"]["name"] == name
    with torch.device("meta"):
        network = build_network(config["network"])
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert module["name"] == method
    weights = {name: term["weight"] for name, term in module["losses"].items() if term["weight"]}
    assert weights == losses
    assert expected == [
        config["trainer"]["max_epochs"],
        data["batch_size"],
        data["image_size"],
        module["optimizer"]["lr"],
        plateau,
    ]
    # The published recipes have no average of weights; what is compared with diffusion has its own.
    published = experiment.startswith("deeplab") or experiment.endswith("2016")
    assert (config["callbacks"]["ema"] is None) == published
    assert config["teacher"]["experiment"] == TEACHER_OF.get(experiment)
    if "deeplab" in experiment:
        assert module["optimizer"]["name"] == "Adam"
        assert (data["split"], data["normalization"]) == ("official", "imagenet")
        assert config["augmentation"]["transforms"][1]["name"] == "MirrorPaddedAffine"
    pretrained = name not in ("UNet",) and method != "AuxiliaryHeads"
    assert config["network"].get("weights") == ("imagenet" if pretrained else None)


@pytest.mark.parametrize(
    "experiment",
    [
        name
        for name in EXPERIMENTS
        if not name.startswith(("demo_", "one_step_")) and name not in ONE_PASS
    ],
)
def test_experiments_are_the_published_recipes(experiment, make_config):
    config = make_config(f"experiment={experiment}")
    module, ema = config["lightning_module"], config["callbacks"]["ema"]
    weights = {name: term["weight"] for name, term in module["losses"].items() if term["weight"]}
    recipe = experiment.replace("efkd_", "student_")
    *expected, losses, average, patience, clipping, members, policy, share = PUBLISHED[recipe]
    if experiment.startswith("student_"):
        losses = {name: weight for name, weight in losses.items() if name != "efkd"}
    assert weights == losses
    assert expected == [
        config["trainer"]["max_epochs"],
        config["datamodule"]["batch_size"],
        module["optimizer"]["lr"],
    ]
    assert average == (ema["update_after_step"], ema["power"])
    assert patience == config["callbacks"]["plateau"]["patience"]
    assert clipping == config["trainer"]["gradient_clip_val"]
    assert (module["optimizer"]["name"], module["optimizer"]["betas"]) == ("Adam", [0.7, 0.99])
    assert (ema["beta"], ema["inv_gamma"], ema["update_every"]) == (0.9999, 1.0, 1)
    assert config["datamodule"]["image_size"] == 128
    assert module["losses"]["boundary"]["gamma"] == (0.25 if recipe == "teacher_ph2" else 0.2)
    assert (module["objective"], module["t_min"]) == ("noise", 1)
    assert list(config["schedule"].values())[:4] == [250, 4e-4, 0.08, "linear"]
    assert list(config["sampler"].values()) == ["DDPM", 250, members, False, None]
    name = f"reference_{policy}" if policy else "none"
    transforms = make_config(f"augmentation={name}")["augmentation"]["transforms"]
    assert config["augmentation"] == {"transforms": transforms, "p": share}
    if "efkd" in experiment:
        efkd = module["losses"]["efkd"]
        assert (efkd["edge_weight"], efkd["body_weight"], efkd["gamma"]) == (5, 2, 1.5)
        wide = experiment.endswith(("ham10000", "mediqa_magic"))
        assert efkd["edge_threshold"] == (0.6 if wide else 0.3)
        assert config["teacher"]["experiment"] == TEACHER_OF[experiment]
    with torch.device("meta"):
        network = build_network(config["network"])
    assert sum(p.numel() for p in network.parameters()) == PARAMETERS[recipe]


BOUNDARY, DISTILLED = {"l2": 1, "boundary": 0.25}, {"l2": 1, "boundary": 0.25, "efkd": 0.25}
ONE_STEP = {
    # network, parameters, objective, weights of losses, calls a mask
    "teacher": ("DermoSegDiff", 5_122_649, "x0", BOUNDARY, 1),
    "published": ("LiteDermoSegDiff", 589_049, "noise", DISTILLED, 250),
    "efkd": ("LiteDermoSegDiff", 589_049, "x0", DISTILLED, 1),
    "compact": ("CompactDermoSegDiff", 894_836, "x0", BOUNDARY, 1),
    "compact_kd": ("CompactDermoSegDiff", 894_836, "x0", DISTILLED, 1),
    "smp": ("SmpNetwork", 933_073, None, {"bce": 1, "dice": 1}, 1),
}


def test_one_step_students_are_compared_at_one_budget(make_config):
    shared = []
    assert {f"one_step_{row}_isic2018" for row in ONE_STEP} == {
        name for name in EXPERIMENTS if name.startswith("one_step_")
    }
    for row, (name, parameters, objective, losses, calls) in ONE_STEP.items():
        experiment = f"one_step_{row}_isic2018"
        config = make_config(f"experiment={experiment}")
        complete(config)
        module = config["lightning_module"]
        with torch.device("meta"):
            network = build_network(config["network"])
        assert config["network"]["name"] == name
        assert sum(p.numel() for p in network.parameters()) == parameters
        assert module.get("objective") == objective
        assert {k: v["weight"] for k, v in module["losses"].items() if v["weight"]} == losses
        sampler = config["sampler"]
        assert (sampler["num_steps"] * sampler["ensemble"] if sampler else 1) == calls
        assert config["teacher"]["experiment"] == TEACHER_OF.get(experiment)
        assert config["network"].get("weights") is None
        trainer = {k: v for k, v in config["trainer"].items() if k != "check_val_every_n_epoch"}
        parts = ("datamodule", "augmentation", "training", "seed")
        rate = module["optimizer"]["lr"]
        shared.append([trainer, config["callbacks"]["ema"], rate, *(config[k] for k in parts)])
    assert all(other == shared[0] for other in shared)


def test_overfitting_drives_the_loss_down_and_the_dice_up(make_config, tmp_path):
    config = make_config(
        *("experiment=demo_teacher", "debug=overfit", "datamodule.num_samples=20"),
        *("datamodule.image_size=16", "trainer.accelerator=cpu", "trainer.max_epochs=120"),
        f"hydra.runtime.output_dir={tmp_path}/run",
    )
    fit.run(config)
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["val"]["val/dice"] == results["test"]["test/dice"] > 0.9
    rows = (tmp_path / "run/test_images.csv").read_text().splitlines()
    assert len(rows) == 1 + 8


def test_a_limited_run_keeps_the_network_and_the_size(make_config, tmp_path):
    config = make_config(
        *("experiment=demo_teacher", "debug=limit", "datamodule.num_samples=40"),
        *("datamodule.image_size=16", "datamodule.batch_size=2", "trainer.accelerator=cpu"),
        f"hydra.runtime.output_dir={tmp_path}/run",
    )
    fit.run(config)
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["network"]["params"] == 1_463_841
    assert results["calls_per_mask"] == 4
    checkpoint = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 2 * 10


def test_a_profiled_run_lists_the_dearest_operations(make_config, tmp_path):
    config = make_config(
        *("experiment=demo_teacher", "debug=profile", "datamodule.num_samples=20"),
        *("datamodule.image_size=16", "datamodule.batch_size=2", "trainer.accelerator=cpu"),
        f"hydra.runtime.output_dir={tmp_path}/run",
    )
    fit.run(config)
    table = (tmp_path / "run/profile/operations.txt").read_text()
    assert "aten::convolution_backward" in table
    assert 5 <= table.count("aten::") <= 10
    trace = json.loads((tmp_path / "run/profile/trace.json").read_text())
    assert any(event.get("name") == "aten::conv2d" for event in trace["traceEvents"])


def test_a_run_in_mixed_precision(train):
    folder = train("demo_teacher", "trainer.precision=bf16-mixed")
    results = json.loads((folder / "results.json").read_text())
    assert 0 <= results["test"]["test/dice"] <= 1
    state = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert {value.dtype for value in state.values()} == {torch.float32}


@pytest.mark.parametrize("experiment", ["demo_efkd", "demo_unet_kd"])
@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_a_distillation_in_half_precision(train, teachers, experiment, precision):
    settings = teacher_overrides(experiment, train, teachers)
    folder = train(experiment, *settings, f"trainer.precision={precision}")
    results = json.loads((folder / "results.json").read_text())
    assert results["status"] == "finished"
    assert all(value is not None for value in results["val"].values()), "none is NaN"


def test_a_run_with_tensorboard(train):
    folder = train("demo_teacher", "logger=tensorboard")
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert {"val/dice", "val/loss", "train/lr", "test/dice"} <= set(events.Tags()["scalars"])
    assert {"val/samples", "test/samples"} <= set(events.Tags()["images"])
    assert (folder / "metrics.csv").is_file()


@pytest.fixture(scope="module")
def teachers():
    """The checkpoints of teachers by experiment, each trained once for all tests."""
    return {}


def teacher_overrides(experiment, train, teachers):
    if experiment not in TEACHER_OF:
        return SPECIAL.get(experiment, [])
    teacher = TEACHER_OF[experiment]
    if teacher not in teachers:
        folder = train(teacher, *teacher_overrides(teacher, train, teachers))
        teachers[teacher] = folder / "checkpoints" / "best.ckpt"
    own = SPECIAL.get(experiment, [])
    return [f"teacher.checkpoint={teachers[teacher]}", *own]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiment_runs_and_leaves_its_records(experiment, train, teachers):
    folder = train(experiment, *teacher_overrides(experiment, train, teachers))
    left = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert left >= {
        "config.yaml",
        "splits.csv",
        "metrics.csv",
        "results.json",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        "samples/step_0000001.png",
    }
    tested = {"test_images.csv", "samples/test.png"}
    assert left & tested == (set() if experiment in UNTESTABLE else tested)
    assert not any(Path(name).name.startswith(".") for name in left), "nothing half-written"

    results = json.loads((folder / "results.json").read_text())
    assert results["schema"] == 1
    assert results["status"] == "finished"
    assert results["debug"] is True
    assert results["experiment"] == experiment
    one_pass = experiment in ONE_PASS or experiment.startswith(("demo_unet", "one_step_smp"))
    assert results["calls_per_mask"] == (1 if one_pass else 4)
    assert (results["sampler"] is None) == one_pass
    assert results["data"]["image_size"] == (32 if "smp" in experiment else 16)
    assert results["network"]["params"] > 0
    assert set(results["val"]) >= {"val/loss", "val/dice", "val/iou"}
    if experiment in TEACHER_OF:
        terms = {key.split("/")[-1] for key in results["val"] if key.startswith("val/loss/")}
        assert terms & {"efkd", "logit_kd", "bernoulli_kl", "auxiliary_bce"}
        if not one_pass:
            predicts = "x0" if experiment.startswith("one_step_") else results["objective"]
            assert results["teacher"]["objective"] == predicts

    if experiment in UNTESTABLE:
        assert results["test"] is None
    else:
        assert set(results["test"]) >= {"test/dice", "test/iou", "test/pooled_f1"}
        assert set(results["baselines"]) == {"otsu", "constant"}
        rows = (folder / "test_images.csv").read_text().splitlines()
        columns = rows[0].split(",")
        assert columns[:2] == ["id", "native_dice"], "what a result is quoted by comes first"
        assert {"dice", "iou", "hd95", "lesion_pixels", "predicted_pixels"} <= set(columns)
        assert len(rows) == 1 + 2, "one batch of two images"

    for name in ("best", "last"):
        checkpoint = torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)
        assert checkpoint["config"]["network"].keys() >= {"name", "kwargs"}
        parts = {key.split(".")[0] for key in checkpoint["state_dict"]}
        heads = experiment in ("deeplab_aux_isic2018", "deeplab_kd_isic2018")
        assert parts == ({"network", "auxiliary_heads"} if heads else {"network"})
        if checkpoint["config"]["callbacks"]["ema"]:
            assert set(checkpoint["state_dict"]) == set(checkpoint["current_model_state"])


def test_testing_again_gives_the_same_bits(train, make_config, tmp_path, isic_data):
    folder = train("teacher_isic2018", "trainer.limit_test_batches=1.0")
    config = make_config(
        "task=test",
        "logger=csv",
        "trainer.accelerator=cpu",
        f"checkpoint={folder}/checkpoints/best.ckpt",
        f"hydra.runtime.output_dir={tmp_path}/runs/test/now",
    )
    test_task.run(config)
    again = Path(config["paths"]["run"])
    first = json.loads((folder / "results.json").read_text())
    second = json.loads((again / "results.json").read_text())
    assert second["test"] == first["test"]
    assert second["baselines"] == first["baselines"]
    assert second["data"] == first["data"]
    assert second["sampler"] == first["sampler"]
    assert (again / "test_images.csv").read_text() == (folder / "test_images.csv").read_text()
    assert second["checkpoint"] == f"{folder}/checkpoints/best.ckpt"
    assert second["trained_as"] == "teacher_isic2018"
    assert second["tested_images"] == second["data"]["n_test"]
    for key, (low, high) in second["test_intervals"].items():
        assert low <= second["test"][key] <= high
    assert {"test/dice", "test/hd95"} <= second["test_intervals"].keys() <= second["test"].keys()


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "bf16-mixed"])
def test_a_test_in_half_precision(train, make_config, tmp_path, precision):
    folder = train("demo_teacher", "trainer.limit_test_batches=1.0")
    config = make_config(
        "task=test",
        "logger=csv",
        "trainer.accelerator=cpu",
        f"trainer.precision={precision}",
        "inference.channels_last=true",
        f"checkpoint={folder}/checkpoints/best.ckpt",
        f"hydra.runtime.output_dir={tmp_path}/runs/test/now",
    )
    test_task.run(config)
    first = json.loads((folder / "results.json").read_text())["test"]
    second = json.loads((tmp_path / "runs/test/now/results.json").read_text())["test"]
    for key in ("test/dice", "test/calibration_error", "test/boundary_f1"):
        assert second[key] == pytest.approx(first[key], abs=0.03)
    assert all(value is not None for value in second.values()), "none is NaN"
    # The means are not rounded to half precision on their way.
    images = read_images(tmp_path / "runs/test/now").values()
    for score in ("dice", "hd95", "boundary_f1"):
        mean = np.mean([image[score] for image in images])
        assert second[f"test/{score}"] == pytest.approx(mean, rel=1e-6)


@pytest.mark.parametrize(
    ("num_workers", "resolution", "recorded"),
    [(0, "both", "both"), (2, "native", "native"), (0, "model", "model")],
)
def test_scores_at_native_size(
    train, make_config, tmp_path, isic_data, num_workers, resolution, recorded
):
    folder = train("demo_teacher")
    config = make_config(
        "task=test",
        "logger=csv",
        "trainer.accelerator=cpu",
        "datamodule=isic2018",
        f"datamodule.num_workers={num_workers}",
        f"metrics.resolution={resolution}",
        f"paths.data={isic_data}",
        f"checkpoint={folder}/checkpoints/best.ckpt",
        f"hydra.runtime.output_dir={tmp_path}/runs/test/now",
    )
    test_task.run(config)
    now = tmp_path / "runs/test/now"
    results = json.loads((now / "results.json").read_text())
    assert results["resolution"] == recorded
    keys = {"test/native_dice", "test/native_threshold_jaccard", "test/native_referral_dice"}
    assert keys <= results["test"].keys() or resolution == "model"
    plain = {"test/dice", "test/threshold_jaccard", "test/referral_dice"}
    assert plain <= results["test"].keys() or resolution == "native"
    of_images = {key for key in results["test_intervals"] if "native" in key}
    assert len(of_images) == (0 if resolution == "model" else 9)
    assert len(results["test_intervals"]) == (18 if resolution == "both" else 9)
    masks = isic_data / "isic2018" / "ISIC2018_Task1_Training_GroundTruth"
    with (now / "test_images.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    for row in rows:
        mask = read_mask(masks / f"{row['id']}_segmentation.png")
        assert row["finite"] == "1"
        sizes = {"native_": mask.shape, "": (results["data"]["image_size"],) * 2}
        for prefix, size in sizes.items():
            scored = resolution == "both" or (prefix == "native_") == (resolution == "native")
            assert (f"{prefix}dice" in row) == scored
            if scored:
                diagonal = float(row[f"{prefix}hd95_relative"]) * np.hypot(*size)
                assert float(row[f"{prefix}hd95"]) == pytest.approx(diagonal)
        if resolution != "model":
            assert float(row["native_lesion_pixels"]) == mask.sum()
            assert next(name for name in row if name != "id") == "native_dice"


@pytest.mark.parametrize(
    ("chosen", "sizes", "expected"),
    [
        ("both", [(64, 64), (40, 64)], "model"),
        ("both", [(64, 64), (40, 65)], "both"),
        ("native", [(8, 8)], "native"),
        ("model", [(99, 99)], "model"),
    ],
)
def test_originals_no_larger_than_the_networks_image_are_not_scored_again(chosen, sizes, expected):
    # The first image of the cache belongs to another part.
    cache = SimpleNamespace(sizes=np.array([(999, 999), *sizes]))
    test = SimpleNamespace(cache=cache, indices=np.arange(len(sizes)) + 1)
    datamodule = SimpleNamespace(datasets={"test": test}, image_size=64)
    config = {"metrics": {"resolution": chosen}}
    assert test_task.chosen_resolution(config, datamodule) == expected


def test_the_averaged_weights_are_tested(train, make_config, tmp_path):
    # In a longer run they differ from the online ones; here the online ones are spoilt.
    folder = train("demo_teacher", "trainer.limit_test_batches=1.0")
    checkpoint = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)
    spoilt = {key: torch.zeros_like(v) for key, v in checkpoint["current_model_state"].items()}
    torch.save(checkpoint | {"current_model_state": spoilt}, tmp_path / "spoilt.ckpt")
    config = make_config(
        "task=test",
        "logger=csv",
        f"checkpoint={tmp_path}/spoilt.ckpt",
        f"hydra.runtime.output_dir={tmp_path}/runs/test/now",
    )
    test_task.run(config)
    again = tmp_path / "runs/test/now/test_images.csv"
    assert again.read_text() == (folder / "test_images.csv").read_text()


def test_training_again_gives_the_same_bits(train):
    one, two = (train("demo_teacher", folder=name) for name in ("one", "two"))
    states = [
        torch.load(f / "checkpoints" / "last.ckpt", weights_only=True)["current_model_state"]
        for f in (one, two)
    ]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    assert timeless(one / "metrics.csv") == timeless(two / "metrics.csv")


def test_a_test_takes_single_values_from_the_command_line(train, make_config, tmp_path):
    folder = train("demo_teacher", "datamodule.limit_test=3")
    config = make_config(
        "task=test",
        "logger=csv",
        f"checkpoint={folder}/checkpoints/best.ckpt",
        "sampler.num_steps=1",
        "datamodule.batch_size=5",
        f"hydra.runtime.output_dir={tmp_path}/runs/test/now",
    )
    test_task.run(config)
    results = json.loads((tmp_path / "runs/test/now/results.json").read_text())
    assert results["sampler"]["num_steps"] == 1
    assert results["sampler"]["ensemble"] == 2, "as trained"
    assert results["data"]["n_test"] == 3, "as trained"


def test_a_teacher_can_be_tested_on_other_data(train, make_config, tmp_path, isic_data):
    folder = train("demo_teacher")
    config = make_config(
        "task=test",
        "logger=csv",
        "datamodule=isic2018",
        "datamodule.num_workers=0",
        f"paths.data={isic_data}",
        f"checkpoint={folder}/checkpoints/best.ckpt",
        f"hydra.runtime.output_dir={tmp_path}/runs/test/now",
    )
    test_task.run(config)
    results = json.loads((tmp_path / "runs/test/now/results.json").read_text())
    assert results["data"]["name"] == "ISIC2018"
    assert results["data"]["image_size"] == 16, "as trained"
    assert results["data"]["n_test"] == 4


def test_a_distilled_student_is_tested_without_its_teacher(train, make_config, tmp_path):
    overrides = teacher_overrides("demo_efkd", train, {})
    folder = train("demo_efkd", *overrides)
    (Path(overrides[0].removeprefix("teacher.checkpoint="))).unlink()
    config = make_config(
        "task=test",
        "logger=csv",
        f"checkpoint={folder}/checkpoints/best.ckpt",
        f"hydra.runtime.output_dir={tmp_path}/runs/test/now",
    )
    test_task.run(config)
    first = json.loads((folder / "results.json").read_text())
    second = json.loads((tmp_path / "runs/test/now/results.json").read_text())
    assert second["network"] == first["network"]
    assert second["data"] == first["data"]


def test_a_failed_run_says_so(train, monkeypatch, tmp_path):
    def fail(*arguments, **settings):
        raise RuntimeError("the power went")

    monkeypatch.setattr(fit, "evaluate", fail)
    with pytest.raises(RuntimeError, match="the power went"):
        train("demo_teacher")
    results = json.loads((tmp_path / "runs/demo_teacher/now/results.json").read_text())
    assert results["status"] == "failed"


def test_the_size_is_checked_before_the_data(make_config):
    config = make_config("experiment=demo_teacher", "datamodule.image_size=30")
    with pytest.raises(UserError, match="multiples of 8, such as 32x32"):
        fit.run(config)


def test_the_base_config_trains_at_full_size(make_config):
    config = make_config("datamodule=isic2018", "network=lite_dermosegdiff")
    assert (config["run_name"], config["data_label"]) == ("diffusion-isic2018", "isic2018")
    assert config["datamodule"]["image_size"] == 128
    assert config["datamodule"]["batch_size"] == 16
    assert config["trainer"]["max_epochs"] == 100
    assert config["lightning_module"]["objective"] == "noise"
    assert config["lightning_module"]["optimizer"]["lr"] == 2e-4
    assert config["sampler"]["num_steps"] == 20


METHODS = {
    # network, what chooses the best checkpoint, views, a key of its metrics
    "diffusion": ("DermoSegDiff", "val/dice", "max", None, "resolution"),
    "efkd": ("DermoSegDiff", "val/dice", "max", None, "resolution"),
    "segmentation": ("UNet", "val/dice", "max", None, "resolution"),
    "segmentation_kd": ("UNet", "val/dice", "max", None, "resolution"),
    "auxiliary": ("UNet", "val/loss", "min", None, "resolution"),
    "classification": ("Classifier", "val/balanced_accuracy", "max", False, "positive"),
    "classification_kd": ("Classifier", "val/balanced_accuracy", "max", False, "positive"),
    "blkd": ("Classifier", "val/balanced_accuracy", "max", False, "positive"),
    "fitnet": ("Classifier", "val/balanced_accuracy", "max", False, "positive"),
    "rkd": ("Classifier", "val/balanced_accuracy", "max", False, "positive"),
    "d_kd": ("Classifier", "val/balanced_accuracy", "max", False, "positive"),
    "ssd_kd": ("Classifier", "val/balanced_accuracy", "max", True, "positive"),
    "ssd_head": ("Classifier", "val/loss", "min", True, "positive"),
}


def test_every_method_is_listed_here():
    files = (Path(__file__).resolve().parent.parent / "conf/lightning_module").glob("*.yaml")
    assert set(METHODS) == {path.stem for path in files}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_brings_what_fits_it(method, make_config):
    network, monitor, mode, views, metric = METHODS[method]
    data = "isic2018" if views is None else "isic2019"
    config = make_config(f"lightning_module={method}", f"datamodule={data}")
    complete(config)
    assert config["network"]["name"] == network
    best = config["callbacks"]["best"]
    assert (best["monitor"], best["mode"]) == (monitor, mode)
    assert config["datamodule"].get("views") is views
    assert metric in config["metrics"]
    assert config["run_name"] == f"{method}-{data}"
    own = make_config(
        f"lightning_module={method}", "callbacks=none", "network=smp", f"datamodule={data}"
    )
    assert own["network"]["name"] == "SmpNetwork"
    assert own["callbacks"] == {}


def test_a_method_trains_without_an_experiment(make_config, tmp_path):
    config = make_config("lightning_module=segmentation", "debug=fast", "datamodule.num_samples=20")
    fit.run(config)
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["status"] == "finished"
    assert results["experiment"] == "segmentation-synthetic"
    assert results["data"]["label"] == "synthetic"
