"""One file for applications that have no PyTorch: ONNX, and a program of torch.export."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import onnx
import onnxruntime
import torch
from onnx_ir.passes.common import CommonSubexpressionEliminationPass
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.shape_inference import quant_pre_process
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxscript import optimizer
from torch import Tensor, nn
from torch.utils.data import Dataset

from common.errors import UserError, check_choice
from common.files import atomic_path
from common.text import say
from datamodules.transforms import IMAGENET_MEAN, IMAGENET_STD
from lightning_modules.metrics import dice_score, overlap_counts
from tasks.build import build_datamodule, build_module, describe_network, method_kind
from tasks.checkpoints import load_checkpoint, network_from_checkpoint
from tasks.configuration import check_image_settings, checkpoint_config
from tasks.inference import accelerate, refuse_metadata
from tasks.onnx_module import METADATA_KEY, OnnxModule
from tasks.test import check_data

__all__ = ["CONVERSIONS", "MOST_STEPS", "Portable", "make_portable", "run", "write_verified"]

MOST_STEPS = 20
OPSET = 18

Config = Mapping[str, Any]


class Portable(nn.Module):
    """A trained module as a function of an image.

    Args:
        module: anything with `network` and `predict`.
        normalization: of its training.
    """

    draws = 0
    outputs: ClassVar[tuple[str, ...]] = ("probability", "uncertainty")

    def __init__(self, module: Any, normalization: str) -> None:
        super().__init__()
        # A list hides the LightningModule, of which only the network is needed.
        self._module = [module]
        self.network = module.network
        self.normalization = normalization

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return probability and uncertainty, both `(B, 1, S, S)`.

        Args:
            image: RGB `(B, 3, S, S)`, float32 from 0 to 255.
        """
        (module,) = self._module
        result = module.predict({"image": _normalised(image, self.normalization), "id": []})
        return _with_uncertainty(result)


class PortableClassifier(Portable):
    """A trained classifier as a function of an image.

    Args:
        module, normalization: as in `Portable`.
    """

    outputs = ("probability",)

    def forward(self, image: Tensor) -> tuple[Tensor]:
        """Return the probability of each class, `(B, C)`.

        Args:
            image: as in `Portable`.
        """
        (module,) = self._module
        return (module.predict({"image": _normalised(image, self.normalization)})["probability"],)


class PortableDiffusion(Portable):
    """A trained diffusion module as a function of an image and noise.

    Args:
        module: a `DiffusionSegmentation`.
        normalization: of its training.
    """

    def __init__(self, module: Any, normalization: str) -> None:
        super().__init__(module, normalization)
        self.schedule = module.schedule
        self.draws = count_draws(module)

    def forward(self, image: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return probability and uncertainty, both `(B, 1, S, S)`.

        Args:
            image: RGB `(B, 3, S, S)`, float32 from 0 to 255.
            noise: standard normal `(B, draws, 1, S, S)`, those of one member after another.
        """
        (module,) = self._module
        members = module.sampler.ensemble
        each = self.draws // members
        streams = [
            iter(noise[:, member * each : (member + 1) * each].unbind(1)).__next__
            for member in range(members)
        ]
        return _with_uncertainty(
            module.predict_from(_normalised(image, self.normalization), streams)
        )


def _with_uncertainty(result: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    chance = result["probability"]
    return chance, result.get("uncertainty", (chance * (1 - chance)).sqrt())


def count_draws(module: Any) -> int:
    """Return how much noise one mask takes, in fields."""
    drawn = 0

    def draw() -> Tensor:
        nonlocal drawn
        drawn += 1
        return torch.zeros(1, 1, 1, 1)

    for _ in range(module.sampler.ensemble):
        module.sampler.sample(lambda x, t: x, module.schedule, draw)
    return drawn


def _normalised(image: Tensor, normalization: str) -> Tensor:
    if normalization == "imagenet":
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        return (image / 255 - mean) / std
    low, high = (f(image, dim=(1, 2, 3), keepdim=True) for f in (torch.amin, torch.amax))
    spread = high - low
    stretched = (image - low) / torch.where(spread > 0, spread, 1.0)
    return torch.where(spread > 0, stretched, 0.5)


def run(config: dict[str, Any]) -> None:
    """Write `checkpoint` as `output` (ONNX) and beside it as `.pt2`, once both are verified.

    With `smaller` there is a second ONNX file, such as `model.int8.onnx`, with what it does to the
    Dice of `images` test images, or to how many of them are diagnosed right.

    Raises:
        UserError: an argument is illegal, or an exported model differs from PyTorch by more than
            `tolerance`.
    """
    if not config["checkpoint"]:
        raise UserError("task=export needs checkpoint=<file>, such as .../checkpoints/best.ckpt.")
    output = Path(config["output"])
    if output.suffix != ".onnx" or output.is_dir():
        raise UserError(
            f"output={output} must be a file that ends in .onnx, such as model.onnx; the program "
            "of torch.export is written beside it, with .pt2."
        )
    check_choice("smaller", config["smaller"], (None, *CONVERSIONS))
    checkpoint = load_checkpoint(config["checkpoint"])
    config = checkpoint_config(config, checkpoint["config"])
    check_image_settings(config["datamodule"])
    network = network_from_checkpoint(checkpoint, config["checkpoint"], "ema", "checkpoint")
    refuse_metadata(network, config["checkpoint"])
    test_set = _test_set(config, network) if config["smaller"] else None
    portable, metadata = make_portable(config, network)
    write_verified(portable, metadata, output, config["tolerance"])
    draws = f"draws of noise a mask: {portable.draws}"
    _say(output, draws if config["sampler"] else "one pass, no noise")
    if test_set is not None:
        small = output.with_suffix(f".{config['smaller']}{output.suffix}")
        with atomic_path(small) as path:
            CONVERSIONS[config["smaller"]](output, path)
        before, after = (_mean_score(path, test_set) for path in (output, small))
        score = "accuracy" if isinstance(portable, PortableClassifier) else "Dice"
        _say(
            small,
            f"{score} of {len(test_set)} test images {after:.4f}, of float32 {before:.4f}, "
            f"{after - before:+.4f}",
        )


def make_portable(config: dict[str, Any], network: nn.Module) -> tuple[Portable, dict[str, Any]]:
    """Return a trained network as a function of an image, and what an application must know of it.

    Args:
        config: that the network was trained with, with `inference` and the sampler to use.
        network: as it was trained.

    Raises:
        UserError: a mask takes too many steps for one file.
    """
    sampler = dict(config["sampler"])
    if sampler:
        if sampler["num_steps"] > MOST_STEPS:
            raise UserError(
                f"sampler.num_steps={sampler['num_steps']} would be unrolled into a huge file; "
                f"export at most {MOST_STEPS}, such as sampler=dpm_solver sampler.num_steps=10."
            )
        # Of members that go through the network together only one is unrolled.
        sampler["members_at_once"] = sampler["ensemble"]
    config = {**config, "sampler": sampler}
    module = build_module(config, network, teacher=None)
    accelerate(module, {**config["inference"], "compile": False})
    portable_class = {"diffusion": PortableDiffusion, "classification": PortableClassifier}.get(
        method_kind(config), Portable
    )
    portable = portable_class(module, config["datamodule"]["normalization"]).eval()
    return portable, _metadata(config, network, portable.draws)


def _metadata(config: Config, network: nn.Module, draws: int) -> dict[str, Any]:
    """Return what an application must know to use the exported model."""
    data = config["datamodule"]
    return {
        "image_size": data["image_size"],
        "letterbox": bool(data.get("letterbox")),
        "antialias": data["antialias"],
        "normalization": data["normalization"],
        "draws": draws,
        "seed": config["lightning_module"].get("seed", config["seed"]),
        "sampler": config["sampler"],
        "classes": config["lightning_module"].get("classes"),
        "network": describe_network(network, config),
    }


def write_verified(
    portable: nn.Module, metadata: Mapping[str, Any], output: Path, tolerance: float
) -> None:
    """Write a module as ONNX and as `.pt2` if both compute what it does.

    Args:
        portable: maps `image`, and `noise` where it draws any, to what it names in `outputs`, by
            default those of `Portable`.
        metadata: goes into the ONNX file; with `image_size` and `draws`.
        output: the ONNX file.
        tolerance: largest difference of an output.

    Raises:
        UserError: there is a larger one, or an output is not finite; then nothing is written.
    """
    size, draws = metadata["image_size"], metadata["draws"]
    generator = torch.Generator().manual_seed(0)
    inputs = {"image": torch.randint(0, 256, (2, 3, size, size), generator=generator).float()}
    if draws:
        inputs["noise"] = torch.randn(2, draws, 1, size, size, generator=generator)
    arguments = tuple(inputs.values())
    batch = torch.export.Dim("batch", min=1, max=1024)
    with torch.no_grad():
        expected = portable(*arguments)
        if not all(values.isfinite().all() for values in expected):
            raise UserError(
                "What the network computes for random images is not finite, so nothing was "
                "written; export another checkpoint."
            )
        program = torch.export.export(
            portable, arguments, dynamic_shapes=tuple({0: batch} for _ in arguments)
        )
    exported = torch.onnx.export(
        program,
        input_names=list(inputs),
        output_names=list(getattr(portable, "outputs", Portable.outputs)),
        opset_version=OPSET,
        dynamo=True,
        optimize=False,
        verbose=False,
    )
    # The exporter's own optimiser takes minutes for a few steps; this is what matters of it.
    optimizer.fold_constants(exported.model)
    optimizer.remove_unused_nodes(exported.model)
    CommonSubexpressionEliminationPass()(exported.model)
    model = exported.model_proto
    entry = model.metadata_props.add()
    entry.key, entry.value = METADATA_KEY, json.dumps(metadata)
    with (
        atomic_path(output.with_suffix(".pt2")) as saved,
        atomic_path(output) as path,
    ):
        with saved.open("wb") as file:
            torch.export.save(program, file)
        onnx.save(model, path)
        for kind, call in (("ONNX", _session(path)), ("torch.export", _program(saved))):
            difference = _difference(call, arguments, expected)
            say(f"largest difference of {kind} to PyTorch: {difference:.2e}")
            if not difference <= tolerance:
                raise UserError(
                    f"The exported {kind} model differs from PyTorch by {difference:.2e}, more "
                    f"than tolerance={tolerance}; nothing was written."
                )


Call = Callable[..., Sequence[Tensor]]


def _session(path: Path) -> Call:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def call(*arguments: Tensor) -> list[Tensor]:
        names = (value.name for value in session.get_inputs())
        inputs = {name: a.numpy() for name, a in zip(names, arguments, strict=True)}
        return [torch.from_numpy(values) for values in session.run(None, inputs)]

    return call


def _program(path: Path) -> Call:
    with path.open("rb") as file:
        return torch.export.load(file).module()


@torch.no_grad()
def _difference(call: Call, arguments: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    apart = [torch.zeros(())]
    for count in (len(arguments[0]), 1):
        outputs = call(*(values[:count] for values in arguments))
        for got, wanted in zip(outputs, expected, strict=True):
            apart.append((got - wanted[:count]).abs().max())
    # Unlike Python's, this maximum is not a number where one of the differences is not.
    return float(torch.stack(apart).max())


def _to_fp16(source: Path, output: Path) -> None:
    model = convert_float_to_float16(onnx.load(source), keep_io_types=True)
    # Of a value that a node takes twice the converter writes the cast twice.
    nodes = {node.name: node for node in model.graph.node}
    del model.graph.node[:]
    model.graph.node.extend(nodes.values())
    onnx.save(model, output)


def _to_int8(source: Path, output: Path) -> None:
    # Kernels have 8 bits but for depthwise ones, activations are quantised as they come.
    with TemporaryDirectory() as folder:
        bare, prepared = (Path(folder) / f"{name}.onnx" for name in ("bare", "prepared"))
        # Shapes that the exporter noted contradict those of weights that are turned meanwhile.
        model = onnx.load(source)
        del model.graph.value_info[:]
        onnx.save(model, bare)
        quant_pre_process(bare, prepared, skip_symbolic_shape=True)
        # A depthwise kernel is a channel's own, and their sizes differ by orders of magnitude: in
        # 8 bits a MobileNet is no better than chance. They are few numbers.
        depthwise = [
            node.name
            for node in onnx.load(prepared).graph.node
            if any(entry.name == "group" and entry.i > 1 for entry in node.attribute)
        ]
        quantize_dynamic(
            prepared,
            output,
            per_channel=True,
            weight_type=QuantType.QUInt8,
            nodes_to_exclude=depthwise,
        )


# Makes a smaller ONNX file from one, by the name of its numbers.
CONVERSIONS: dict[str, Callable[[Path, Path], None]] = {"fp16": _to_fp16, "int8": _to_int8}


def _test_set(config: Config, network: nn.Module) -> Dataset:
    """Return evenly spaced test images of the data of a config, from 0 to 255."""
    datamodule = build_datamodule({**config["datamodule"], "limit_test": config["images"]})
    check_data(config, network, datamodule)
    datamodule.prepare_data()
    datamodule.setup()
    check_data(config, network, datamodule)
    datamodule.check_testable()
    images = datamodule.datasets["test"]
    # The exported model normalises by itself.
    images.normalization = "none"
    return images


def _mean_score(path: Path, images: Dataset) -> float:
    """Return the mean Dice, or the share of images whose class is predicted."""
    module = OnnxModule(path)
    scores = []
    for index in range(len(images)):
        sample = images[(0, index)]
        batch = {"image": sample["image"][None], "id": [sample["id"]]}
        probability = module.predict(batch)["probability"]
        if not probability.isfinite().all():
            raise UserError(
                f"What {path.name} computes for the test image {sample['id']} is not finite; "
                "leave out smaller, or choose another."
            )
        if module.classes:
            scores.append((probability.argmax(1) == sample["label"]).float())
            continue
        predicted = probability > 0.5
        scores.append(dice_score(overlap_counts(predicted, sample["mask"][None])))
    return float(torch.cat(scores).mean())


def _say(path: Path, what: str) -> None:
    say(f"{path} ({path.stat().st_size / 1e6:.1f} MB): {what}")
