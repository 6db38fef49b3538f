"""What a network costs: true sizes, calls that are counted, times in their ratio."""

import json

import pytest
import torch

from common.errors import UserError
from tasks import benchmark

# Parameters and GMAC a call at 128 px of the published networks.
PUBLISHED = {
    "dermosegdiff": (81_671_009, 28.05),
    "dermosegdiff_ham10000": (40_355_937, 39.19),
    "lite_dermosegdiff": (9_346_529, 26.87),
    "lite_dermosegdiff_ham10000": (8_504_929, 39.23),
}
QUICK = ("trainer.accelerator=cpu", "repeats=2", "datamodule.image_size=16")
FEW_CALLS = ("network=dermosegdiff_tiny", "sampler=ddim", "sampler.num_steps=2")


@pytest.fixture
def measure(make_config, tmp_path):
    """Runs the benchmark; returns its JSON."""

    def run(*overrides):
        benchmark.run(make_config("task=benchmark", *overrides))
        return json.loads((tmp_path / "run" / "benchmark.json").read_text())

    return run


def test_every_preset_has_its_size(measure, tmp_path):
    report = measure("presets=true", "efficiency_table=true")
    networks = {row["name"]: row for row in report["networks"]}
    for name, (params, gmac) in PUBLISHED.items():
        assert networks[name]["params"] == params
        assert networks[name]["gmac"] == pytest.approx(gmac, rel=1e-3)
        assert networks[name]["param_mb"] == pytest.approx(params * 4 / 2**20)
    text = (tmp_path / "run" / "benchmark.md").read_text()
    assert "| dermosegdiff | 81,671,009 |" in text
    # What the reference's README prints are its plain layers' multiply-adds times 250.
    rows = [
        line
        for line in report["efficiency_table"].splitlines()
        if line.startswith("| derm") or line.startswith("| lite")
    ]
    assert len(rows) == 4
    for row in rows:
        _, _, published, counted, *_ = (cell.strip() for cell in row.split("|"))
        assert int(counted) == pytest.approx(int(published), abs=1)


def test_a_checkpoint_is_measured_with_its_own_sampler(measure, make_checkpoint, tmp_path):
    checkpoint = make_checkpoint("sampler=ddpm", "sampler.num_steps=3", "sampler.ensemble=2")
    report = measure(f"checkpoint={checkpoint}", "batch_sizes=[1,3]", *QUICK)
    (row,) = report["networks"]
    assert row["calls_per_mask"] == 6
    assert row["image_size"] == 16
    assert set(row["batches"]) == {"1", "3"}
    for size, times in row["batches"].items():
        assert 0 < times["min_s"] <= times["median_s"] <= times["max_s"]
        assert times["images_per_s"] == pytest.approx(int(size) / times["median_s"])
    assert row["calls_per_s"] == pytest.approx(1 / row["call_s"])
    assert row["mask_s"] > row["call_s"], "six calls, and what is around them"
    assert row["mask_s_reckoned"] is False
    assert 0.1 < row["peak_gb"] < 16
    assert report["threads"] >= 1
    text = (tmp_path / "run" / "benchmark.md").read_text()
    assert "| demo_teacher | 1 | " in text
    assert "| demo_teacher | 3 | " in text


def test_a_network_of_one_pass_is_measured(measure, make_checkpoint):
    checkpoint = make_checkpoint(one_pass=True)
    report = measure(f"checkpoint={checkpoint}", "against=lite_dermosegdiff_tiny", *QUICK)
    student, other = report["networks"]
    assert (student["name"], student["calls_per_mask"]) == ("segmentation-synthetic", 1)
    assert other["calls_per_mask"] > 1
    assert student["call_s"] > 0
    assert student["mask_s"] > 0
    (row,) = measure("network=unet", "network.kwargs.base_width=4", *QUICK)["networks"]
    assert (row["name"], row["calls_per_mask"]) == ("UNet", 1)
    assert row["params"] == student["params"]


def test_a_mask_that_takes_too_long_is_reckoned(measure):
    report = measure("network=dermosegdiff_tiny", "sampler=ddpm", "longest_mask=0", *QUICK)
    (row,) = report["networks"]
    assert row["mask_s_reckoned"] is True
    assert row["mask_s"] == pytest.approx(row["call_s"] * row["calls_per_mask"])


def test_onnx_is_timed_too_and_reckoned_where_a_file_would_be_huge(measure):
    compact = [f"network.kwargs.{key}=[4,4]" for key in ("g_widths", "x_widths")]
    compact += [f"network.kwargs.{key}=[1,1]" for key in ("g_depths", "z_depths")]
    overrides = (
        *("network=compact_dermosegdiff_s", *compact, "lightning_module.objective=x0"),
        *("sampler=ddim", "sampler.num_steps=1", "onnx=true", *QUICK),
    )
    (row,) = measure(*overrides)["networks"]
    assert row["onnx_mask_s"] > 0
    assert row["onnx_reckoned"] is False
    assert 0 < row["guidance_gmac"] < row["gmac"]
    assert row["network"]["kwargs"]["g_widths"] == [4, 4]
    (row,) = measure(*overrides, "sampler.num_steps=200", "sampler.ensemble=3")["networks"]
    assert row["onnx_reckoned"] is True
    assert row["calls_per_mask"] == 600
    assert row["onnx_mask_s"] > 0


def test_rounding_is_not_multiplied_by_what_is_reckoned(measure, make_checkpoint, monkeypatch):
    settings = ("lightning_module.objective=noise", "sampler=ddpm", "sampler.num_steps=250")
    differences = []
    original = benchmark.make_portable

    def spy(config, network):
        portable, metadata = original(config, network)
        image, noise = torch.zeros(1, 3, 16, 16), torch.randn(1, metadata["draws"], 1, 16, 16)
        with torch.no_grad():
            mask = portable(image, noise)[0]
            for parameter in network.parameters():
                parameter.mul_(1 + 1e-5)
            other = original(config, network)[0](image, noise)[0]
        differences.append(float((mask - other).abs().max()))
        return portable, metadata

    monkeypatch.setattr(benchmark, "make_portable", spy)
    path = make_checkpoint(*settings)
    (row,) = measure(f"checkpoint={path}", "onnx=true", *QUICK)["networks"]
    assert row["onnx_reckoned"] is True
    assert 0 < differences[0] < 1e-4


@pytest.mark.parametrize("against", ["plain", "lite_dermosegdiff_tiny", "checkpoint"])
def test_two_are_measured_in_turn(measure, make_checkpoint, against):
    if against == "checkpoint":
        against = make_checkpoint()
    report = measure(
        *FEW_CALLS,
        "trainer.precision=bf16-true",
        f"against={against}",
        "inference.channels_last=true",
        *QUICK,
    )
    first, second = report["networks"]
    assert first["precision"] == "bf16-true"
    assert second["precision"] == ("32-true" if against == "plain" else "bf16-true")
    assert report["ratio"] == pytest.approx(second["call_s"] / first["call_s"], abs=1e-3)
    assert first["name"] != second["name"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["against=nothing"], "against=nothing is neither plain.*lite_dermosegdiff"),
        (["trainer.precision=64-true"], "precision=64-true cannot be measured"),
        (["checkpoint=gone.ckpt"], "checkpoint=gone.ckpt does not exist"),
    ],
)
def test_mistakes_are_named(measure, overrides, message):
    with pytest.raises(UserError, match=message):
        measure(*FEW_CALLS, *overrides, *QUICK)
