"""The benchmarks run, here on small images, and print what can be read by a machine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


def measure(script, tmp_path, *arguments):
    output = tmp_path / "out.json"
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments]
    command += ["--image-size=32", "--threads=1", f"--output={output}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == [output], "nothing else is left behind"
    return json.loads(output.read_text())


def check(case):
    assert 0 < case["min_s"] <= case["median_s"] < 60
    assert case["images_per_s"] == pytest.approx(case["batch_size"] / case["median_s"], rel=0.02)
    assert 0.3 < case["peak_memory_gb"] < 16


@pytest.mark.slow
def test_data(tmp_path):
    cases = ("bare-0", "policy-2")
    results = measure("data.py", tmp_path, *cases, "--num-images=40", "--batch-size=4")["cases"]
    assert [case["case"] for case in results] == list(cases)
    for case in results:
        assert 0 < case["min_s"] <= case["median_s"]
        assert case["images_per_s"] == pytest.approx(28 / case["median_s"], rel=0.02)
        assert 0.1 < case["own_memory_gb"] < 8
    assert results[1]["own_memory_gb"] > results[0]["own_memory_gb"], "two more processes"


@pytest.mark.slow
@pytest.mark.parametrize("case", ["teacher", "efkd", "deeplab_kd", "unet_kd", "d_kd", "ssd_kd"])
def test_train_step(tmp_path, case):
    (result,) = measure("train_step.py", tmp_path, case, "--batch-size=2", "--steps=4")["cases"]
    assert (result["case"], result["batch_size"]) == (case, 2)
    check(result)
    assert all(0 < seconds < 60 for seconds in result["quarters_median_s"])
    assert len(result["quarters_memory_gb"]) == 5
    assert 0.3 < min(result["quarters_memory_gb"]) <= result["peak_memory_gb"]


def test_an_unknown_case_is_named(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks/train_step.py"), "stundent"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=100)
    assert done.returncode == 2
    assert "stundent is no case; choose from teacher, efkd" in done.stderr
