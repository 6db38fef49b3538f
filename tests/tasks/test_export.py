"""Exported files compute what PyTorch does, and carry what is needed to use them.

An export takes seconds, so that tests share few of them.
"""

import csv
import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image

from common.errors import UserError
from datamodules.synthetic import synthesise_lesion
from datamodules.transforms import normalise, resize_image
from lightning_modules.processes import SampleNoise
from tasks import export, predict
from tasks.build import build_module
from tasks.checkpoints import load_checkpoint, network_from_checkpoint
from tasks.onnx_module import METADATA_KEY, OnnxModule


@pytest.fixture
def exported(make_config, make_checkpoint, tmp_path):
    """Exports a network that has just been made; returns the ONNX file and its checkpoint."""

    def run(*overrides, trained=(), **choices):
        checkpoint = make_checkpoint("datamodule.image_size=16", *trained, **choices)
        output = tmp_path / "out" / "model.onnx"
        config = make_config(
            "task=export", f"checkpoint={checkpoint}", f"output={output}", *overrides
        )
        export.run(config)
        return output, checkpoint, config["sampler"]

    return run


def photographs(count, size=16):
    images = [synthesise_lesion(0, index)[0] for index in range(count)]
    return np.stack([resize_image(image, size, antialias=True) for image in images])


def raw_batch(count):
    images = torch.from_numpy(photographs(count)).permute(0, 3, 1, 2).float()
    return {"image": images, "id": list("abcdef")[:count]}


def module_prediction(checkpoint, count, sampler, normalization):
    loaded = load_checkpoint(checkpoint)
    config = {**loaded["config"], "sampler": sampler}
    module = build_module(config, network_from_checkpoint(loaded, checkpoint, "ema", "checkpoint"))
    batch = [normalise(image, normalization, train=False) for image in photographs(count)]
    return module.predict({**raw_batch(count), "image": torch.stack(batch)})


def test_the_exported_model_predicts_as_the_module(exported, make_config, tmp_path):
    sampler = ("sampler=dpm_solver", "sampler.num_steps=2", "sampler.ensemble=2")
    output, checkpoint, settings = exported(*sampler)
    expected = module_prediction(checkpoint, 3, settings, "minmax")
    module = OnnxModule(output)
    found = module.predict(raw_batch(3))
    for name in ("probability", "uncertainty"):
        torch.testing.assert_close(found[name], expected[name], atol=1e-4, rtol=0)
    # The noise is that of the training's seed unless another is given.
    again, other = (OnnxModule(output, seed).predict(raw_batch(3)) for seed in (None, 5))
    assert torch.equal(found["probability"], again["probability"])
    assert not torch.equal(found["probability"], other["probability"])
    flat = module.predict({"image": torch.full((1, 3, 16, 16), 90.0), "id": ["a"]})
    assert flat["probability"].isfinite().all()

    # An application needs only the file and onnxruntime.
    session = onnxruntime.InferenceSession(str(output), providers=["CPUExecutionProvider"])
    inputs = {value.name: value.shape for value in session.get_inputs()}
    assert inputs["image"][1:] == [3, 16, 16]
    assert inputs["noise"][1:] == [2, 1, 16, 16]
    assert isinstance(inputs["image"][0], str), "any number of images"
    metadata = json.loads(session.get_modelmeta().custom_metadata_map[METADATA_KEY])
    assert metadata == module.metadata
    assert (metadata["draws"], metadata["image_size"]) == (2, 16)
    assert metadata["network"]["params"] > 0
    images = raw_batch(1)["image"]
    streams = [SampleNoise(metadata["seed"], ["a"], member, (1, 16, 16)) for member in range(2)]
    noise = torch.stack([stream() for stream in streams], dim=1)
    alone = session.run(None, {"image": images.numpy(), "noise": noise.numpy()})
    np.testing.assert_allclose(alone[0], found["probability"][:1], atol=1e-5)
    # The same program for those who have PyTorch.
    program = torch.export.load(output.with_suffix(".pt2")).module()
    np.testing.assert_allclose(program(images, noise)[0].detach(), alone[0], atol=1e-5)

    check_either_predicts_photographs(make_config, tmp_path, output, checkpoint, sampler)
    check_damaged_files_are_refused(output)


def test_guidance_is_in_the_file_once_and_every_operator_is_common(exported):
    kwargs = {"g_widths": [8, 8], "x_widths": [4, 4], "g_depths": [1, 1], "z_depths": [1, 1]}
    compact = {"name": "CompactDermoSegDiff", "kwargs": kwargs}
    sampler = ("sampler=ddim", "sampler.num_steps=2", "sampler.ensemble=1")
    output, checkpoint, settings = exported(*sampler, network=compact)
    expected = module_prediction(checkpoint, 2, settings, "minmax")
    found = OnnxModule(output).predict(raw_batch(2))
    torch.testing.assert_close(found["probability"], expected["probability"], atol=1e-4, rtol=0)
    nodes = onnx.load(output).graph.node
    assert {node.domain for node in nodes} <= {"", "ai.onnx"}
    assert {"Conv", "Resize"} <= {node.op_type for node in nodes}
    network = network_from_checkpoint(load_checkpoint(checkpoint), checkpoint, "ema", "checkpoint")
    guidance, denoiser = (
        sum(isinstance(m, torch.nn.Conv2d) for m in part.modules())
        for part in (network.guidance, network.denoiser)
    )
    # What the gates make of the image is shared by the steps, too.
    shared = guidance + len(network.denoiser.gates)
    convolutions = [node.op_type for node in nodes].count("Conv")
    assert convolutions == shared + 2 * (denoiser - len(network.denoiser.gates))


def test_a_model_of_one_pass_takes_an_image_alone(exported, make_config, tmp_path):
    output, checkpoint, _ = exported(one_pass=True)
    loaded = load_checkpoint(checkpoint)
    network = network_from_checkpoint(loaded, checkpoint, "ema", "checkpoint").eval()
    images = torch.stack([normalise(image, "minmax", train=False) for image in photographs(3)])
    chance = network(images).sigmoid().detach()
    found = OnnxModule(output).predict(raw_batch(3))
    torch.testing.assert_close(found["probability"], chance, atol=1e-4, rtol=0)
    assert "uncertainty" not in found

    session = onnxruntime.InferenceSession(str(output), providers=["CPUExecutionProvider"])
    (value,) = session.get_inputs()
    assert (value.name, value.shape[1:]) == ("image", [3, 16, 16])
    alone = session.run(None, {"image": raw_batch(1)["image"].numpy()})
    np.testing.assert_allclose(alone[1], (chance * (1 - chance)).sqrt()[:1], atol=1e-4)
    metadata = json.loads(session.get_modelmeta().custom_metadata_map[METADATA_KEY])
    assert (metadata["draws"], metadata["sampler"]) == (0, {})
    program = torch.export.load(output.with_suffix(".pt2")).module()
    np.testing.assert_allclose(program(raw_batch(1)["image"])[0].detach(), alone[0], atol=1e-5)
    check_either_predicts_photographs(make_config, tmp_path, output, checkpoint, ())


def test_a_sampler_for_one_pass_is_refused(exported):
    with pytest.raises(UserError, match=r"sampler.num_steps is given, .* one pass and no sampler"):
        exported("sampler.num_steps=3", one_pass=True)


def check_either_predicts_photographs(make_config, tmp_path, output, checkpoint, sampler):
    photos = tmp_path / "photos"
    photos.mkdir()
    for index, size in enumerate([(60, 40), (33, 70)]):
        image = Image.fromarray(synthesise_lesion(0, index)[0])
        image.resize(size).save(photos / f"photo_{index}.png")
    settings = ("task=predict", f"input={photos}", "trainer.accelerator=cpu", "num_workers=0")
    ways = {"torch": (checkpoint, *sampler), "onnx": (output,)}
    rows, chances = [], []
    for name, (file, *more) in ways.items():
        folder = tmp_path / name
        predict.run(make_config(*settings, f"checkpoint={file}", f"output={folder}", *more))
        with (folder / "predictions.csv").open(newline="") as table:
            rows.append([row["lesion_pixels"] for row in csv.DictReader(table)])
        picture = Image.open(folder / "photo_1_probability.png")
        chances.append(np.asarray(picture).astype(int))
    assert rows[0] == rows[1]
    assert np.abs(chances[0] - chances[1]).max() <= 1
    with pytest.raises(UserError, match=r"sampler.num_steps is part of .*model.onnx; leave it out"):
        predict.run(make_config(*settings, f"checkpoint={output}", "sampler.num_steps=3"))


def check_damaged_files_are_refused(output):
    model = onnx.load(output)
    del model.metadata_props[:]
    for content in (b"I am no model", output.read_bytes()[:-1000], model.SerializeToString()):
        path = output.with_name("bad.onnx")
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"bad.onnx is damaged or was not written by"):
            OnnxModule(path)
    with pytest.raises(UserError, match="gone.onnx does not exist"):
        OnnxModule(output.with_name("gone.onnx"))


def test_a_smaller_file_says_what_it_costs(exported, capsys):
    trained = ["datamodule.num_samples=30", "datamodule.normalization=imagenet"]
    sampler = ("sampler=ddpm", "sampler.num_steps=2", "sampler.ensemble=1")
    output, checkpoint, settings = exported(*sampler, "smaller=int8", "images=4", trained=trained)
    expected = module_prediction(checkpoint, 3, settings, "imagenet")["probability"]
    found = OnnxModule(output).predict(raw_batch(3))
    torch.testing.assert_close(found["probability"], expected, atol=1e-4, rtol=0)
    assert "uncertainty" not in found, "one member has none"
    assert "Dice of 4 test images 0." in " ".join(capsys.readouterr().out.split())

    small = output.with_suffix(".int8.onnx")
    half = output.with_suffix(".fp16.onnx")
    export.CONVERSIONS["fp16"](output, half)
    types = onnx.TensorProto
    for path, kind in ((small, types.UINT8), (half, types.FLOAT16)):
        assert kind in {tensor.data_type for tensor in onnx.load(path).graph.initializer}
        chance = OnnxModule(path).predict(raw_batch(3))["probability"]
        assert 0 < (chance - expected).abs().mean() < 0.05


class Simple(torch.nn.Module):
    def forward(self, image, noise):
        return image.mean(1), noise.sum(1)


def test_a_model_that_differs_is_not_written(tmp_path):
    output, metadata = tmp_path / "model.onnx", {"image_size": 8, "draws": 3}
    with pytest.raises(UserError, match=r"differs from PyTorch by .* nothing was written"):
        export.write_verified(Simple(), metadata, output, tolerance=-1.0)
    assert list(tmp_path.iterdir()) == []
    export.write_verified(Simple(), metadata, output, tolerance=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.pt2"]


class Diverged(torch.nn.Module):
    outputs = ("probability",)

    def forward(self, image):
        return (image.mean(1) / 0,)


def test_what_is_not_finite_is_not_written(tmp_path):
    metadata = {"image_size": 8, "draws": 0}
    with pytest.raises(UserError, match="is not finite"):
        export.write_verified(Diverged(), metadata, tmp_path / "model.onnx", tolerance=1e9)
    assert list(tmp_path.iterdir()) == []
    image = torch.ones(2, 3, 8, 8)
    difference = export._difference(Diverged(), (image,), [torch.zeros(2, 8, 8)])
    assert not difference <= 1e9


@pytest.mark.parametrize("name", ["model.pt2", "model", "model.pt", "folder.onnx"])
def test_only_onnx_files_are_written(exported, make_config, tmp_path, name):
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(UserError, match=r"must be a file that ends in .onnx"):
        exported(f"output={tmp_path / name}", "smaller=fp16")
    assert sorted(path.name for path in tmp_path.glob("*model*")) == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["datamodule.normalization=foo"], "normalization=foo does not exist; .*imagenet"),
        (["datamodule.image_size=0"], "image_size=0 must be a whole number"),
        (["sampler.num_steps=21"], "num_steps=21 would be unrolled .*at most 20"),
        (["smaller=int4"], "smaller=int4 does not exist; choose one of null, fp16, int8"),
    ],
)
def test_mistakes_are_named(exported, overrides, message):
    with pytest.raises(UserError, match=message):
        exported(*overrides)


def test_a_checkpoint_is_needed(make_config):
    with pytest.raises(UserError, match="task=export needs checkpoint"):
        export.run(make_config("task=export"))
