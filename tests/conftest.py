"""What several rooms' tests share: golden numbers, small networks, made-up files."""

import json
import resource
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from PIL import Image
from safetensors.torch import load_file

import networks
from datamodules.synthetic import synthesise_lesion
from tasks.build import build_network
from tasks.configuration import plain

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).resolve().parent / "golden" / "dermosegdiff"

TINY = {
    "dim_x": 8,
    "dim_g": 8,
    "dim_x_mults": [1, 1],
    "dim_g_mults": [1, 1],
    "attention_heads": 1,
    "attention_head_dim": 8,
}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def manifest() -> dict[str, Any]:
    """What the golden files hold."""
    return json.loads((GOLDEN / "manifest.json").read_text())


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, torch.Tensor]]:
    """Reads a golden `.npz` as tensors; masks stored as int8 become float32."""

    def read(name: str) -> dict[str, torch.Tensor]:
        with np.load(GOLDEN / f"{name}.npz") as arrays:
            values = {key: torch.from_numpy(arrays[key]) for key in arrays}
        return {k: v.float() if v.dtype == torch.int8 else v for k, v in values.items()}

    return read


@pytest.fixture(scope="session")
def golden_json() -> Callable[[str], dict[str, Any]]:
    """Reads a golden `.json`."""
    return lambda name: json.loads((GOLDEN / f"{name}.json").read_text())


@dataclass
class GoldenCase:
    """One case of a golden file; the inputs that have gradients there require them."""

    name: str
    params: dict[str, Any]
    tolerance: dict[str, float]
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)

    def heads(self, prefix: str) -> dict[str, torch.Tensor]:
        """Return the inputs whose names have a prefix, without it."""
        return {k.removeprefix(prefix): v for k, v in self.inputs.items() if k.startswith(prefix)}

    def near(self, kind: str) -> dict[str, float]:
        """Return the tolerance of a `loss` or a `grad`."""
        return {key: self.tolerance[f"{kind}_{key}"] for key in ("rtol", "atol")}

    def check(self, loss: torch.Tensor) -> None:
        """Compare a loss and its gradients with the stored ones."""
        torch.testing.assert_close(loss.detach(), self.outputs["loss"], **self.near("loss"))
        assert self.gradients
        loss.backward()
        for name, expected in self.gradients.items():
            torch.testing.assert_close(self.inputs[name].grad, expected, **self.near("grad"))


@pytest.fixture(scope="session")
def golden_cases() -> Callable[[str, str], list[GoldenCase]]:
    """Reads the cases of a golden `.npz` of a system and its `.json`."""

    def read(system: str, item: str) -> list[GoldenCase]:
        stem = GOLDEN.parent / system / item
        described = json.loads(stem.with_suffix(".json").read_text())
        cases = {
            spec["case"]: GoldenCase(spec["case"], spec["params"], described["tolerance"])
            for spec in described["cases"]
        }
        with np.load(stem.with_suffix(".npz")) as arrays:
            for key in arrays:
                name, kind, value = key.split("/")
                case = cases[name]
                places = {"in": case.inputs, "out": case.outputs, "grad": case.gradients}
                places[kind][value] = torch.from_numpy(arrays[key])
        for case in cases.values():
            for name in case.gradients:
                case.inputs[name].requires_grad_()
        return list(cases.values())

    return read


@pytest.fixture(scope="session")
def golden_network(manifest) -> Callable[[str], tuple[torch.nn.Module, dict[str, torch.Tensor]]]:
    """Builds a golden network with its reference weights; returns it with all stored tensors."""

    def build(name: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
        spec = manifest["networks"][name]
        tensors = load_file(GOLDEN / f"net_{name}.safetensors")
        network = getattr(networks, spec["cls"])(**spec["params"])
        weights = {k[6:]: v for k, v in tensors.items() if k.startswith("param.")}
        networks.load_reference_state_dict(network, weights)
        return network, tensors

    return build


@pytest.fixture
def tiny_network() -> networks.DermoSegDiff:
    """A network that costs next to nothing."""
    return networks.DermoSegDiff(**TINY)


@pytest.fixture
def make_config(tmp_path) -> Callable[..., dict[str, Any]]:
    """Composes a config as the command line would, with every folder under `tmp_path`."""

    def make(*overrides: str) -> dict[str, Any]:
        places = [
            f"hydra.runtime.output_dir={tmp_path}/run",
            f"paths.runs={tmp_path}/runs",
            f"paths.cache={tmp_path}/cache",
        ]
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            config = compose("config", overrides=[*places, *overrides], return_hydra_config=True)
        HydraConfig.instance().set_config(config)
        del config.hydra
        return plain(config)

    return make


@pytest.fixture
def make_checkpoint(make_config, tmp_path) -> Callable[..., Path]:
    """Writes a checkpoint of a tiny network with random weights, as a run would."""

    def make(
        *overrides: str,
        name: str = "made",
        one_pass: bool = False,
        network: Mapping[str, Any] | None = None,
    ) -> Path:
        settings = (
            "experiment=demo_teacher",
            "lightning_module.objective=x0",
            "sampler=ddim",
            "sampler.num_steps=1",
            "sampler.ensemble=1",
        )
        if one_pass:
            settings = ("lightning_module=segmentation",)
        config = make_config(*settings, *overrides)
        config["network"] = network or {"name": "DermoSegDiff", "kwargs": TINY}
        if one_pass:
            config["network"] = {"name": "UNet", "kwargs": {"base_width": 4}}
            config |= {"schedule": {}, "sampler": {}}
        weights = build_network(config["network"]).state_dict()
        state = {f"network.{key}": value for key, value in weights.items()}
        path = tmp_path / f"{name}.ckpt"
        torch.save({"state_dict": state, "current_model_state": state, "config": config}, path)
        return path

    return make


@pytest.fixture(scope="session")
def isic_data(tmp_path_factory) -> Path:
    """A data folder with 20 made-up images in the official layout of ISIC 2018."""
    data = tmp_path_factory.mktemp("data")
    write_isic2018(data / "isic2018", 20)
    return data


@pytest.fixture(scope="session")
def ham_data(tmp_path_factory) -> Path:
    """A data folder with 24 made-up images of 16 lesions in the official layout of HAM10000."""
    data = tmp_path_factory.mktemp("data")
    write_ham10000(data / "ham10000", 24)
    return data


@pytest.fixture(scope="session")
def all_data(tmp_path_factory) -> Path:
    """A data folder with a few made-up images of every segmentation dataset as published."""
    data = tmp_path_factory.mktemp("data")
    write_isic2018(data / "isic2018", 20)
    write_ham10000(data / "ham10000", 24)
    for part, count in (("Training", 12), ("Test", 4)):
        names = [f"ISIC_{part[:2]}{index}" for index in range(count)]
        stem = data / "isic2016" / f"ISBI2016_ISIC_Part1_{part}"
        folders = [stem.with_name(f"{stem.name}_{kind}") for kind in ("Data", "GroundTruth")]
        write_pairs(*folders, names, "_Segmentation.png", content=count)
    for part, count in (("Training", 12), ("Validation", 2), ("Test_v2", 4)):
        names = [f"ISIC_{part[:2]}{index}" for index in range(count)]
        stem = data / "isic2017" / f"ISIC-2017_{part}"
        folders = [stem.with_name(f"{stem.name}_{k}") for k in ("Data", "Part1_GroundTruth")]
        write_pairs(*folders, names, content=count)
    names = [f"IMD{index:03d}" for index in range(20)]
    write_pairs(data / "ph2/trainx", data / "ph2/trainy", names, "_lesion.bmp", ".bmp", 1)
    for part, count in (("train", 8), ("valid", 2), ("test", 2)):
        names = [f"IMG_ENC{part}{index:04d}_00001" for index in range(count)]
        images, masks = (data / "mediqa_magic" / f for f in (f"images_{part}", "segmentations"))
        masks = None if part == "test" else masks / part
        write_pairs(images, masks, names, "_mask_ann1.tiff", content=count)
    return data


@pytest.fixture
def make_trainer(tmp_path) -> Callable[..., L.Trainer]:
    """Makes a silent Trainer on the CPU that leaves nothing behind."""

    def make(**settings: Any) -> L.Trainer:
        quiet = {
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "default_root_dir": tmp_path,
        }
        return L.Trainer(**{**quiet, **settings})

    return make


def write_pairs(
    images: Path,
    masks: Path | None,
    names: Sequence[str],
    mask_suffix: str = "_segmentation.png",
    image_suffix: str = ".jpg",
    content: int = 0,
) -> None:
    """Write made-up images, and their masks unless that folder is none."""
    for index, name in enumerate(names):
        image, mask = synthesise_lesion(content, index)
        images.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(images / f"{name}{image_suffix}", quality=95)
        if masks is not None:
            masks.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask * 255).save(masks / f"{name}{mask_suffix}")


def write_isic2018(root: Path, count: int) -> None:
    images = root / "ISIC2018_Task1-2_Training_Input"
    masks = root / "ISIC2018_Task1_Training_GroundTruth"
    write_pairs(images, masks, [f"ISIC_{index:07d}" for index in range(count)])


def write_ham10000(root: Path, count: int) -> None:
    """Write images to both parts; the lesions of the first images come back in the last ones."""
    masks = root / "HAM10000_segmentations_lesion_tschandl"
    masks.mkdir(parents=True)
    rows = ["lesion_id,image_id,dx,dx_type,age,sex,localization"]
    for index in range(count):
        image, mask = synthesise_lesion(1, index)
        images = root / f"HAM10000_images_part_{1 + 2 * index // count}"
        images.mkdir(exist_ok=True)
        name = f"ISIC_{index:07d}"
        Image.fromarray(image).save(images / f"{name}.jpg", quality=95)
        Image.fromarray(mask * 255).save(masks / f"{name}_segmentation.png")
        rows.append(f"HAM_{index % (2 * count // 3):07d},{name},nv,histo,50.0,male,back")
    (root / "HAM10000_metadata.csv").write_text("\r\n".join(rows))


@pytest.fixture
def pairs() -> Callable[..., None]:
    """Writes made-up images and masks in any layout."""
    return write_pairs


@pytest.fixture
def load(tmp_path) -> Callable[..., L.LightningDataModule]:
    """Builds a datamodule at 16 px in batches of 4 and sets it up."""

    def build(cls: type, root: Path, **settings: Any) -> L.LightningDataModule:
        arguments = {"image_size": 16, "batch_size": 4, **settings}
        datamodule = cls(root=root, cache=tmp_path / "cache", **arguments)
        datamodule.prepare_data()
        datamodule.setup()
        return datamodule

    return build


@pytest.fixture
def isic_copy(tmp_path) -> Path:
    """The same on a smaller scale, for a test to damage; returns the data folder."""
    write_isic2018(tmp_path / "data" / "isic2018", 10)
    return tmp_path / "data"


@pytest.fixture
def small_disk() -> Iterator[None]:
    """A file system that takes no file of more than 10,000 bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
