"""What a network costs: size, multiply-adds, time and memory, on this machine."""

import copy
import itertools
import json
import platform
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from common.errors import UserError
from common.files import write_text_atomic
from common.markup import markdown_table
from common.text import plain_text, say
from tasks.build import (
    build_module,
    build_network,
    call_inputs,
    describe_network,
    method_kind,
    network_kind,
)
from tasks.checkpoints import load_checkpoint, network_from_checkpoint
from tasks.configuration import checkpoint_config
from tasks.export import MOST_STEPS, make_portable, write_verified
from tasks.inference import accelerate, refuse_metadata
from tasks.onnx_module import OnnxModule

__all__ = ["run"]

console = Console(highlight=False)
PRESETS = Path(__file__).resolve().parent.parent / "conf" / "network"
# The methods of a network without checkpoint that denoises nothing, by its kind.
ONE_PASS = {
    "segmentation": {"name": "Segmentation", "losses": {"bce": {"weight": 1}}},
    "classification": {
        "name": "Classification",
        "losses": {"cross_entropy": {"weight": 1}},
        "classes": [],
    },
}
MASK_REPEATS = 5
ONNX_TOLERANCE = 1e-3
PRECISIONS = {"32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}
COLUMNS = {
    "name": "network",
    "params": "parameters",
    "param_mb": "MB",
    "gmac": "GMAC a call",
    "calls_per_mask": "calls a mask",
    "call_s": "s a call",
    "calls_per_s": "calls a s",
    "mask_s": "s a mask",
    "onnx_mask_s": "s a mask, ONNX",
    "peak_gb": "peak GB of the process",
}


@dataclass
class Subject:
    """Something that is measured.

    Attributes:
        name: for the tables.
        config: with `network`, `datamodule`, `sampler` and what else builds a module.
        module: the built module, on its device and in its precision.
        network: that of the module as it was before anything made it faster.
        precision: as `trainer.precision`.
    """

    name: str
    config: dict[str, Any]
    module: Any
    network: nn.Module
    precision: str

    @property
    def dtype(self) -> torch.dtype:
        """Precision of what the network is given."""
        kind, _, how = self.precision.partition("-")
        return PRECISIONS[kind] if how == "true" else torch.float32

    def casting(self, device: torch.device) -> AbstractContextManager:
        """Return the context in which mixed precision casts."""
        kind, _, how = self.precision.partition("-")
        return torch.autocast(device.type, PRECISIONS[kind]) if how == "mixed" else nullcontext()


def run(config: dict[str, Any]) -> None:
    """Measure the network of `checkpoint`, or of the config, or every preset of `conf/network`.

    Writes `benchmark.json` and `benchmark.md` to the run folder. With `against` another network is
    measured in turn with it: a checkpoint, a preset, or `plain`, the same one in float32 without
    `inference`.

    Raises:
        UserError: an argument is illegal or a checkpoint cannot be used.
    """
    device = _device(config["trainer"]["accelerator"])
    if config["presets"]:
        report: dict[str, Any] = {"networks": [_preset(p, config) for p in _preset_names()]}
        _print_sizes(report["networks"])
    else:
        subjects = [_subject(config, config["checkpoint"], device)]
        if config["against"]:
            subjects.append(_other(config, device))
        report = {"networks": _measure(subjects, device, config)}
        _print_costs(report["networks"])
        if len(subjects) > 1:
            first, second = report["networks"]
            report["ratio"] = round(second["call_s"] / first["call_s"], 3)
            say(f"{first['name']} is {report['ratio']:.2f} times as fast a call.")
    if config["efficiency_table"]:
        report["efficiency_table"] = efficiency_table()
        console.print(report["efficiency_table"], markup=False, soft_wrap=True)
    report = {**_machine(device), "precision": config["trainer"]["precision"], **report}
    folder = Path(config["paths"]["run"])
    write_text_atomic(folder / "benchmark.json", json.dumps(report, indent=2) + "\n")
    rows = [[_shown(k, row.get(k)) for k in COLUMNS] for row in report["networks"]]
    tables = [markdown_table(list(COLUMNS.values()), rows)]
    if not config["presets"]:
        tables.append(_batch_table(report["networks"]))
    tables.append(report.get("efficiency_table", ""))
    write_text_atomic(folder / "benchmark.md", "\n".join(filter(None, tables)))
    say(f"report: {folder / 'benchmark.md'}")


def _device(accelerator: str) -> torch.device:
    gpu = torch.cuda.is_available() and accelerator in ("auto", "gpu", "cuda")
    return torch.device("cuda" if gpu else "cpu")


def _preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("[!_]*.yaml"))


def _preset(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a preset's network is, without building its weights."""
    network_config = yaml.safe_load((PRESETS / f"{name}.yaml").read_text())
    with torch.device("meta"):
        network = build_network(network_config)
    return _size(name, network, {**config, "network": network_config})


def _size(name: str, network: nn.Module, config: Mapping[str, Any]) -> dict[str, Any]:
    described = describe_network(network, config)
    size = sum(p.numel() * p.element_size() for p in network.parameters())
    return {
        "name": name,
        **{k: described[k] for k in ("params", "gmac", "guidance_gmac")},
        "param_mb": size / 2**20,
    }


def _subject(
    config: dict[str, Any], checkpoint: str | None, device: torch.device, plain: bool = False
) -> Subject:
    if checkpoint:
        loaded = load_checkpoint(checkpoint)
        config = checkpoint_config(config, loaded["config"])
        network = network_from_checkpoint(loaded, checkpoint, "ema", "checkpoint")
        name = loaded["config"]["run_name"]
    else:
        network = build_network(config["network"])
        name = config["network"]["name"]
        config = _with_method(config, network)
    precision = "32-true" if plain else str(config["trainer"]["precision"])
    kind, _, how = precision.partition("-")
    if kind not in PRECISIONS or how not in ("true", "mixed"):
        raise UserError(f"trainer.precision={precision} cannot be measured; choose bf16-true.")
    module = build_module(config, copy.deepcopy(network), teacher=None)
    settings = dict.fromkeys(config["inference"], False) if plain else config["inference"]
    accelerate(module, settings)
    module.to(device)
    if how == "true":
        module.network.to(PRECISIONS[kind])
    return Subject("plain float32" if plain else name, config, module, network, precision)


def _with_method(config: dict[str, Any], network: nn.Module) -> dict[str, Any]:
    """Return a config with a method that the network is for."""
    kind = network_kind(network)
    if kind == "diffusion" or kind == method_kind(config) == "segmentation":
        return config
    optimizer = {"name": "Adam", "lr": 1e-3}
    module = {**ONE_PASS[kind], "optimizer": optimizer}
    if kind == "classification":
        module["classes"] = [str(number) for number in range(network.num_classes)]
    return {**config, "lightning_module": module, "sampler": {}, "metrics": {}}


def _other(config: dict[str, Any], device: torch.device) -> Subject:
    other = config["against"]
    if other == "plain":
        return _subject(config, config["checkpoint"], device, plain=True)
    if other in _preset_names():
        network = yaml.safe_load((PRESETS / f"{other}.yaml").read_text())
        subject = _subject({**config, "network": network}, None, device)
        subject.name = other
        return subject
    if not Path(other).is_file():
        raise UserError(
            f"against={other} is neither plain, nor a checkpoint, nor one of "
            f"{', '.join(_preset_names())}."
        )
    return _subject(config, other, device)


def _measure(
    subjects: list[Subject], device: torch.device, config: Mapping[str, Any]
) -> list[dict[str, Any]]:
    rows = []
    calls = {}
    for subject in subjects:
        whole = copy.copy(subject.config["network"])
        rows.append(
            {
                **_size(subject.name, build_on_meta(whole), subject.config),
                "image_size": subject.config["datamodule"]["image_size"],
                "precision": subject.precision,
                "network": {key: whole.get(key) for key in ("name", "kwargs")},
                "sampler": subject.config["sampler"],
                "calls_per_mask": subject.module.calls_per_mask,
                "batches": {},
            }
        )
    for batch_size in config["batch_sizes"]:
        for index, subject in enumerate(subjects):
            calls[index] = _call(subject, batch_size, device)
        times = _interleaved(calls, config["repeats"], device)
        for index, row in enumerate(rows):
            row["batches"][batch_size] = _spread(times[index], batch_size)
    for subject, row in zip(subjects, rows, strict=True):
        first = row["batches"][config["batch_sizes"][0]]
        row["onnx_mask_s"] = None
        row["call_s"], row["calls_per_s"] = first["median_s"], 1 / first["median_s"]
        row |= _mask_seconds(subject, row, device, config["longest_mask"])
        if config["onnx"]:
            row |= _onnx_mask_seconds(subject)
        row["peak_gb"] = _peak_memory(device)
    return rows


def build_on_meta(network_config: Mapping[str, Any]) -> nn.Module:
    """Return a network without weights, for its size."""
    with torch.device("meta"):
        return build_network(network_config)


def _call(subject: Subject, batch_size: int, device: torch.device) -> Callable[[], Tensor]:
    size = subject.config["datamodule"]["image_size"]
    image = torch.rand(batch_size, 3, size, size, device=device, dtype=subject.dtype)
    if subject.config["inference"]["channels_last"] and subject.name != "plain float32":
        image = image.contiguous(memory_format=torch.channels_last)
    inputs = call_inputs(build_on_meta(subject.config["network"]), image)

    def call() -> Tensor:
        with torch.inference_mode(), subject.casting(device):
            return subject.module.network(*inputs)

    return call


def _interleaved(
    calls: Mapping[int, Callable[[], Tensor]], repeats: int, device: torch.device
) -> dict[int, list[float]]:
    """Time each call in turn, so that a machine that slows down does so for all."""
    times: dict[int, list[float]] = {index: [] for index in calls}
    for turn, (index, call) in itertools.product(range(repeats + 2), calls.items()):
        started = _now(device)
        call()
        if turn >= 2:  # The first ones warm up.
            times[index].append(_now(device) - started)
    return times


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _spread(seconds: list[float], batch_size: int) -> dict[str, float]:
    median = statistics.median(seconds)
    return {
        "median_s": median,
        "min_s": min(seconds),
        "max_s": max(seconds),
        "images_per_s": batch_size / median,
    }


def _mask_seconds(
    subject: Subject, row: Mapping[str, Any], device: torch.device, longest: float
) -> dict[str, Any]:
    """Time one mask from image to probability; where it would take too long, reckon it."""
    reckoned = row["call_s"] * row["calls_per_mask"]
    if reckoned > longest:
        return {"mask_s": reckoned, "mask_s_reckoned": True}
    size = subject.config["datamodule"]["image_size"]
    image = torch.rand(1, 3, size, size, device=device, dtype=subject.dtype)
    predict = partial(subject.module.predict, {"image": image, "id": ["benchmark"]})
    repeats = MASK_REPEATS if reckoned * MASK_REPEATS < longest else 1
    with subject.casting(device):
        seconds = _median_seconds(predict, repeats, device)
    return {"mask_s": seconds, "mask_s_reckoned": False}


def _onnx_mask_seconds(subject: Subject) -> dict[str, Any]:
    """Time one mask by onnxruntime in float32; reckon it where a file would have too many steps."""
    refuse_metadata(subject.network, subject.name)
    config, size = subject.config, subject.config["datamodule"]["image_size"]
    calls, reckoned = subject.module.calls_per_mask, False
    if config["sampler"] and config["sampler"]["num_steps"] > MOST_STEPS:
        # Two steps from noise that a network predicts would multiply its rounding by more than 100.
        config = {
            **config,
            "sampler": {**config["sampler"], "num_steps": 2, "ensemble": 1},
            "lightning_module": {**config["lightning_module"], "objective": "x0"},
        }
        reckoned = True
    portable, metadata = make_portable(config, subject.network)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        write_verified(portable, metadata, path, ONNX_TOLERANCE)
        model = OnnxModule(path)
        image = torch.randint(0, 256, (1, 3, size, size)).float()
        predict = partial(model.predict, {"image": image, "id": ["benchmark"]})
        predict()
        seconds = _median_seconds(predict, MASK_REPEATS, torch.device("cpu"))
    return {"onnx_mask_s": seconds * (calls / 2 if reckoned else 1), "onnx_reckoned": reckoned}


def _median_seconds(function: Callable[[], Any], repeats: int, device: torch.device) -> float:
    times = []
    for _ in range(repeats):
        started = _now(device)
        function()
        times.append(_now(device) - started)
    return statistics.median(times)


def _peak_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def _machine(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
    return {
        "device": name or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _shown(key: str, value: Any) -> str:
    if value is None:
        return ""
    if key in ("name", "calls_per_mask"):
        return str(value)
    if key == "params":
        return f"{value:,}"
    precise = ("call_s", "mask_s", "onnx_mask_s", "peak_gb")
    return f"{value:.3f}" if key in precise else f"{value:.2f}"


def _batch_table(rows: list[dict[str, Any]]) -> str:
    """Return the times of a call by batch size, as Markdown."""
    columns = ("median_s", "min_s", "max_s", "images_per_s")
    cells = [
        (row["name"], batch_size, *(f"{times[key]:.4g}" for key in columns))
        for row in rows
        for batch_size, times in row["batches"].items()
    ]
    header = ("network", "batch", "s a call, median", "least", "most", "images a s")
    return markdown_table(header, cells)


def _print_sizes(rows: list[dict[str, Any]]) -> None:
    """Print a row for each network."""
    table = Table()
    for key in ("name", "params", "param_mb", "gmac"):
        table.add_column(COLUMNS[key], justify="left" if key == "name" else "right")
    for row in rows:
        table.add_row(
            *[plain_text(_shown(key, row[key])) for key in ("name", "params", "param_mb", "gmac")]
        )
    console.print(table)


def _print_costs(rows: list[dict[str, Any]]) -> None:
    """Print a column for each network."""
    table = Table("")
    for row in rows:
        table.add_column(plain_text(row["name"]), justify="right")
    for key in list(COLUMNS)[1:]:
        table.add_row(COLUMNS[key], *[_shown(key, row[key]) for row in rows])
    console.print(table)


# As the README of the EFKD repository prints them: "GFlops", "Memory (MB)", "FPS".
_PUBLISHED = {
    "dermosegdiff": (1990, 17.1),
    "dermosegdiff_ham10000": (2556, 17.1),
    "lite_dermosegdiff": (1865, 36.4),
    "lite_dermosegdiff_ham10000": (2566, 31.3),
}


_HOW = """
The published "GFlops" are multiply-adds of one network call that thop counted, times 250 steps;
thop knows plain convolutions and linear layers and leaves out the weight-standardised convolutions,
where most of the work is. The published frames a second are network calls and not images: a mask
takes 9 samples of 250 steps, which is 2250 calls.
"""


def efficiency_table() -> str:
    """Return the published efficiency figures beside the true ones, and how they came about."""
    rows = []
    for name, (published, fps) in _PUBLISHED.items():
        network_config = yaml.safe_load((PRESETS / f"{name}.yaml").read_text())
        counted = 250 * plain_giga_macs(network_config, 128)
        config = {"network": network_config, "datamodule": {"image_size": 128}}
        true = 250 * describe_network(build_on_meta(network_config), config)["gmac"]
        costs = (f"{gmac:.0f}" for gmac in (counted, true, 9 * true))
        rows.append((name, published, *costs, fps, f"{fps / 2250:.4f}"))
    table = markdown_table(
        (
            "network",
            'published "GFlops"',
            "plain layers x 250, GMAC",
            "all layers x 250, GMAC",
            "a mask (9 samples), GMAC",
            "published FPS",
            "masks a second at that rate",
        ),
        rows,
    )
    return table + _HOW


def plain_giga_macs(network_config: Mapping[str, Any], image_size: int) -> float:
    """Return the multiply-adds of the plain convolutions and linear layers alone, in 10^9."""
    network = build_on_meta(network_config)
    total = 0

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        total += output.numel() * layer.weight[0].numel()

    for layer in network.modules():
        if type(layer) is nn.Conv2d or isinstance(layer, nn.Linear):
            layer.register_forward_hook(count)
    network(*call_inputs(network, torch.empty(1, 3, image_size, image_size, device="meta")))
    return total / 1e9
