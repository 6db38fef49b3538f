"""Time and memory of something that is done again and again, each case in a process of its own."""

import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from common.files import write_text_atomic
from lightning_modules.callbacks.monitor import process_memory

__all__ = [
    "REPEATS",
    "experiment_config",
    "memory",
    "now",
    "parse_arguments",
    "peak_memory",
    "run_cases",
    "summary",
]

ROOT = Path(__file__).resolve().parent.parent
REPEATS = 5


def experiment_config(*overrides: str) -> dict[str, Any]:
    """Return a config as the command line would compose it; nothing is written anywhere."""
    from hydra import compose, initialize_config_dir
    from hydra.core.hydra_config import HydraConfig

    import tasks.resume  # noqa: F401  Makes the resolver known that names the run folder.
    from tasks.configuration import plain

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        overrides = ("hydra.runtime.output_dir=unused", "logger=csv", *overrides)
        config = compose("config", overrides=list(overrides), return_hydra_config=True)
    HydraConfig.instance().set_config(config)
    del config.hydra
    return plain(config)


def parse_arguments(description: str, cases: Sequence[str]) -> Namespace:
    """Read the command line that all benchmarks share."""
    parser = ArgumentParser(description=description)
    parser.add_argument("cases", nargs="*", default=list(cases), help=f"of {', '.join(cases)}")
    parser.add_argument("--batch-size", type=int, nargs="+", help="images a call")
    parser.add_argument("--image-size", type=int, default=128, help="side in px")
    parser.add_argument("--num-images", type=int, default=640, help="size of a made-up dataset")
    parser.add_argument("--steps", type=int, default=REPEATS, help="that are measured")
    parser.add_argument("--threads", type=int, default=2, help="threads on a CPU")
    parser.add_argument("--accelerator", default="cpu", choices=("cpu", "gpu"))
    parser.add_argument("--precision", default="32-true", help="as trainer.precision")
    parser.add_argument("--output", type=Path, help="file for the JSON that is printed")
    parser.add_argument("--alone", action="store_true", help="measure one case in this process")
    arguments = parser.parse_args()
    unknown = set(arguments.cases) - set(cases)
    if unknown:
        parser.error(f"{', '.join(unknown)} is no case; choose from {', '.join(cases)}")
    return arguments


def run_cases(
    arguments: Namespace, measure: Callable[[str, int, Namespace], dict[str, Any]]
) -> None:
    """Measure every case at every batch size and print JSON.

    Each is measured in a fresh process: the peak memory of a process is that of its whole life.
    """
    if arguments.alone:
        torch.set_num_threads(arguments.threads)
        (case,), (batch_size,) = arguments.cases, arguments.batch_size
        print(json.dumps(measure(case, batch_size, arguments)))
        return
    settings = ("image_size", "num_images", "steps", "threads", "accelerator", "precision")
    results: dict[str, Any] = {key: getattr(arguments, key) for key in settings}
    gpu = arguments.accelerator == "gpu"
    results["device"] = (
        torch.cuda.get_device_name() if gpu else platform.processor() or platform.machine()
    )
    results["torch"] = torch.__version__
    results["cases"] = []
    options = [f"--{key.replace('_', '-')}={results[key]}" for key in settings]
    for case in arguments.cases:
        for batch_size in arguments.batch_size:
            command = [sys.executable, sys.argv[0], case, f"--batch-size={batch_size}", "--alone"]
            done = subprocess.run([*command, *options], stdout=subprocess.PIPE, text=True)
            if done.returncode:
                sys.exit(done.returncode)
            measured = json.loads(done.stdout.splitlines()[-1])
            results["cases"].append({"case": case, "batch_size": batch_size, **measured})
    text = json.dumps(results, indent=2)
    print(text)
    if arguments.output:
        write_text_atomic(arguments.output, text + "\n")


def peak_memory(accelerator: str) -> float:
    """Return the largest memory so far in GB: of the process, or allocated on the GPU."""
    if accelerator == "gpu":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def memory(accelerator: str) -> float:
    """Return the memory in use in GB: of the process, or allocated on the GPU."""
    if accelerator == "gpu":
        return torch.cuda.memory_allocated() / 1e9
    return process_memory() / 1e9


def now(accelerator: str) -> float:
    """Return the time in seconds when everything asked of the device is done."""
    if accelerator == "gpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def summary(seconds: Sequence[float], batch_size: int, accelerator: str) -> dict[str, Any]:
    """Return median and minimum of some durations, images per second and peak memory."""
    median = statistics.median(seconds)
    return {
        "median_s": round(median, 4),
        "min_s": round(min(seconds), 4),
        "images_per_s": round(batch_size / median, 3),
        "peak_memory_gb": round(peak_memory(accelerator), 3),
    }
