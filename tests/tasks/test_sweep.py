"""The jobs of a multirun: which are run, how their command lines read, and their table."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from common.errors import UserError
from common.runs import write_results
from tasks import sweep, sweep_table
from tasks.submission import submission_script

ROOT = Path(__file__).resolve().parents[2]


def job(num, *overrides, status="finished", **settings):
    """Return the record of a job in a folder of its own."""
    record = {"num": num, "overrides": list(overrides), "status": status, "reason": None}
    return record | {"folder": f"x/{num}", "seconds": 1.0} | settings


@pytest.fixture
def trained(tmp_path):
    """Writes the results of jobs: the best validation score and the Dice of the test."""

    def write(*scores, mode="max"):
        for num, (best, dice) in enumerate(scores):
            (tmp_path / "x" / str(num)).mkdir(parents=True)
            results = {
                "schema": 1,
                "status": "finished",
                "seconds": 10.0 + num,
                "best": {"monitor": "val/dice", "score": best, "mode": mode},
                "test": {"test/dice": dice, "test/hd95": 2.0},
            }
            write_results(tmp_path / "x" / str(num), results)
        return tmp_path

    return write


def test_settings_are_ordered_by_validation_with_mean_and_spread_over_seeds(trained):
    runs = trained((0.5, 0.9), (0.7, 0.8), (0.8, 0.2), (0.9, 0.4))
    jobs = [job(n, f"w={1 + n // 2}", f"seed={n % 2}", "debug=fast") for n in range(4)]
    lines, less = sweep_table.summarise(runs, jobs)
    assert not less
    assert [line.values for line in lines] == [{"w": "2"}, {"w": "1"}]
    header, rows = sweep_table._table(lines)
    assert header == ["w", "jobs", "best val/dice", "test/dice", "test/hd95", "seconds"]
    spread = "0.1414"  # of 0.7 and 0.5, and so on: their difference by the root of 2
    assert rows[1][:4] == ["1", "2", f"0.6000 ± {spread}", "0.8500 ± 0.0707"]
    assert rows[0][:4] == ["2", "2", "0.8500 ± 0.0707", f"0.3000 ± {spread}"]
    assert rows[1][4:] == ["2.0000 ± 0.0000", "10 ± 1"]


def test_scores_at_the_original_size_come_first(trained):
    runs = trained((0.5, 0.9), (0.7, 0.8))
    for number in range(2):
        folder = runs / "x" / str(number)
        results = json.loads((folder / "results.json").read_text())
        results["test"] |= {"test/native_dice": 0.6, "test/native_hd95": 30.0 + number}
        write_results(folder, results)
    lines, _ = sweep_table.summarise(runs, [job(n, f"seed={n}") for n in range(2)])
    header, (row,) = sweep_table._table(lines)
    shown = ["test/native_dice", "test/dice", "test/native_hd95"]
    assert header == ["jobs", "best val/dice", *shown, "seconds"]
    assert row[2:5] == ["0.6000 ± 0.0000", "0.8500 ± 0.0707", "30.5000 ± 0.7071"]


def test_of_losses_the_lowest_comes_first(trained):
    runs = trained((0.5, 0.9), (0.4, 0.8), mode="min")
    lines, less = sweep_table.summarise(runs, [job(0, "w=1"), job(1, "w=2")])
    assert less
    assert [line.values["w"] for line in lines] == ["2", "1"]


def test_without_training_the_test_orders_and_what_failed_comes_last(trained):
    runs = trained((None, 0.5), (None, 0.6))
    for folder in (runs / "x").iterdir():
        results = json.loads((folder / "results.json").read_text())
        write_results(folder, {**results, "best": None})
    jobs = [job(0, "n=1"), job(1, "n=2"), job(2, "n=3", status="failed", reason="no teacher")]
    lines, _ = sweep_table.summarise(runs, jobs)
    assert [(line.values["n"], line.missing) for line in lines] == [("2", 0), ("1", 0), ("3", 1)]


def test_the_tables_are_written_and_printed(trained, capsys):
    runs = trained((0.5, 0.9), (0.7, 0.8))
    jobs = [job(0, "a.b.w=0.123456789"), job(1, "a.b.w=2")]
    jobs.append(job(2, "a.b.w=3", status="failed", reason="no teacher"))
    folder = runs / "sweeps" / "now"
    sweep_table.write_tables(folder, jobs)
    sweep_table.print_table(folder, jobs)
    said = capsys.readouterr().out
    assert "3 jobs, highest first" in said
    assert "job 2 failed (a.b.w=3): no teacher" in said
    assert "0.1235" in said
    table = (folder / "table.md").read_text().splitlines()
    assert table[0].startswith("| a.b.w | jobs | best val/dice |")
    assert [line.split(" | ")[0] for line in table[2:]] == ["| 2", "| 0.1235", "| 3"]
    lines = (folder / "jobs.csv").read_text().splitlines()
    columns = "num,status,folder,seconds,reason,a.b.w,best val/dice,test/dice,test/hd95"
    assert lines[0] == columns
    assert lines[1] == "0,finished,x/0,1.0,,0.123456789,0.5,0.9,2.0"
    assert lines[3] == "2,failed,x/2,1.0,no teacher,3,,,"


@pytest.fixture
def folds(tmp_path):
    """Writes the runs of a cross-validation: each of two folds tests two of four images."""

    def write(*seeds):
        jobs = []
        for num, (seed, fold) in enumerate((s, f) for s in seeds for f in (0, 1)):
            folder = tmp_path / "x" / str(num)
            folder.mkdir(parents=True)
            dices = [0.1 * (2 * fold + place + 1) + 0.2 * seed for place in (0, 1)]
            rows = [f"i{2 * fold + place},{dice}" for place, dice in enumerate(dices)]
            (folder / "test_images.csv").write_text("\n".join(["id,dice", *rows, ""]))
            results = {
                "schema": 1,
                "best": {"monitor": "val/dice", "score": 0.5, "mode": "max"},
                "test": {"test/dice": sum(dices) / 2},
                "seconds": 1.0,
            }
            write_results(folder, results)
            told = (f"datamodule.fold={fold}", f"seed={seed}")
            jobs.append(job(num, "cross_validation=2", *told))
        return jobs

    return write


def test_folds_share_a_line_and_pool_their_images(folds, tmp_path, capsys):
    jobs = folds(0, 1)
    (line,), _ = sweep_table.summarise(tmp_path, jobs)
    assert line.values == {}
    assert line.scores["test/dice"] == pytest.approx([0.15, 0.35, 0.35, 0.55])
    folder = tmp_path / "sweeps" / "now"
    sweep_table.write_tables(folder, jobs)
    sweep_table.print_table(folder, jobs)
    assert "2 + 2" in capsys.readouterr().out
    table = (folder / "table.md").read_text().splitlines()
    assert table[2].startswith("| 4 | 0.5000 ± 0.0000 | 0.3500 ± 0.1633 |")
    assert table[-3] == "| folds | images | dice |"
    assert table[-1].startswith("| 2 + 2 | 4 | 0.3500 (")
    rows = (folder / "cross_validation.csv").read_text().splitlines()
    assert rows[0] == "seed,fold,id,dice"
    assert [row.split(",")[:3] for row in rows[1:]] == [
        [seed, fold, f"i{2 * int(fold) + place}"]
        for seed in "01"
        for fold in "01"
        for place in (0, 1)
    ]


def test_a_fold_that_failed_is_missing_from_the_pool(folds, tmp_path):
    first, second = folds(0)
    folder = tmp_path / "sweeps" / "now"
    sweep_table.write_tables(folder, [first, second | {"status": "failed"}])
    table = (folder / "table.md").read_text().splitlines()
    assert table[2].startswith("| 1 of 2 |")
    assert table[-1].startswith("| 1 | 2 | 0.1500 (")
    assert len((folder / "cross_validation.csv").read_text().splitlines()) == 3


@pytest.fixture
def hydra():
    """What Hydra knows of a job."""
    sources = [
        SimpleNamespace(provider="main", path="/conf"),
        SimpleNamespace(provider="command-line", path="/own configs"),
    ]
    overrides = SimpleNamespace(hydra=["hydra.mode=MULTIRUN", "hydra.searchpath=[a]"])
    return SimpleNamespace(runtime=SimpleNamespace(config_sources=sources), overrides=overrides)


def test_a_job_s_command_line_has_its_overrides_and_nothing_of_the_sweep(hydra, tmp_path):
    folder = tmp_path / "it's here"
    command = sweep._command(hydra, ["a=1", "b=[x,y]"], folder, "2026")
    place = str(folder).replace("'", "\\'")
    assert command[2:] == [
        *("--config-dir", "/own configs", "a=1", "b=[x,y]", "hydra.searchpath=[a]"),
        *("sweep_name='2026'", f"hydra.run.dir='{place}'", "hydra.mode=RUN"),
    ]
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "last.ckpt").touch()
    assert f"resume='{place}'" in sweep._command(hydra, [], folder, "2026")


def test_the_last_error_is_the_reason(capfd):
    code, reason = sweep._call(
        ["sh", "-c", "echo 'error: the first'>&2; echo 'error: no room'>&2; echo bye>&2; exit 3"]
    )
    assert (code, reason) == (3, "no room")
    assert "bye" in capfd.readouterr().err
    assert sweep._call(["sh", "-c", "exit 7"]) == (7, "exit code 7")


def test_an_earlier_job_is_found_by_what_it_was_told(tmp_path):
    records = {
        "1/jobs/0000.json": job(0, "a=1", "seed=0", status="finished", folder="old"),
        "2/jobs/0000.json": job(0, "seed=0", "a=1", status="interrupted", folder="new"),
        "2/jobs/0001.json": job(1, "a=2", "seed=0", status="running", folder="cut"),
    }
    for place, record in records.items():
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text(json.dumps(record))
    (tmp_path / "2/jobs/0002.json").write_text("{half")
    sweeps = [tmp_path / "1", tmp_path / "2"]
    assert sweep._find(sweeps, ["a=1", "seed=0", "skip_finished=true"])["folder"] == "old"
    assert sweep._find(sweeps[1:], ["a=1", "seed=0"])["folder"] == "new"
    assert sweep._find(sweeps, ["seed=0", "a=2"])["folder"] == "cut"
    assert sweep._find(sweeps, ["a=1"]) is None


def test_a_multirun_is_continued_by_the_same_command(tmp_path):
    for name, arguments in (("1", ["a=1,2"]), ("2", ["a=1,2"]), ("3", ["a=1,3"])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "sweep.json").write_text(json.dumps({"arguments": arguments}))
    assert sweep._continued(tmp_path, ["skip_finished=true", "a=1,2"]).name == "2"
    assert sweep._continued(tmp_path, ["a=1"]) is None


@pytest.fixture
def multirun():
    """Composes a multirun with Hydra's own part."""

    def make(*overrides):
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            return compose("config", overrides=list(overrides), return_hydra_config=True)

    return make


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("sweep=search", "trainer.devices=2"), "trainer.devices=2 each would train other"),
        (("sweep=search", "trainer.num_nodes=2"), "draws its values anew"),
        (("sweep=search", "trainer.devices=[0,1]"), "draws its values anew"),
        (("sweep=search", "trainer.devices=auto"), "draws its values anew"),
    ],
)
def test_a_search_on_several_devices_is_refused(multirun, overrides, message):
    with pytest.raises(UserError, match=message):
        sweep._refuse(multirun("experiment=demo_efkd", *overrides))


def test_what_is_not_installed_is_named(multirun, monkeypatch):
    monkeypatch.setattr(sweep, "find_spec", lambda name: None)
    for override, extra in (("sweep=search", "optuna"), ("hydra/launcher=slurm", "slurm")):
        with pytest.raises(UserError, match=rf"pip install -e \"\.\[{extra}\]\""):
            sweep._refuse(multirun("experiment=demo_efkd", override))


def test_grids_and_searches_on_one_device_are_not_refused(multirun):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    for overrides in (("trainer.devices=2",), ("sweep=search", "trainer.devices=[1]")):
        sweep._refuse(multirun("experiment=demo_efkd", *overrides))


def test_torchrun_is_refused(multirun, monkeypatch):
    for key in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(key, "2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(UserError, match="torchrun has started 2 multiruns"):
        sweep._refuse(multirun("experiment=demo_efkd"))


def test_the_script_for_slurm(multirun):
    pytest.importorskip("submitit")
    settings = multirun(
        *("experiment=efkd_isic2018", "hydra/launcher=slurm", "trainer.devices=4"),
        *("trainer.num_nodes=2", "hydra.launcher.partition=gpu", "hydra.job.name=demo"),
        "hydra.sweep.dir=/runs/sweeps/now",
    ).hydra.launcher
    settings = OmegaConf.to_container(settings, resolve=True)
    del settings["dry_run"]
    script = submission_script(settings, count=3)
    options = {line.removeprefix("#SBATCH --") for line in script.splitlines() if "#SBATCH" in line}
    assert options >= {
        *("array=0-2%3", "nodes=2", "ntasks-per-node=4", "gpus-per-node=4", "partition=gpu"),
        *("requeue", "signal=USR2@120", "time=1440", "cpus-per-task=8", "mem=64GB"),
        *("job-name=demo", "open-mode=append"),
    }
    (call,) = [line for line in script.splitlines() if line.startswith("srun ")]
    assert call.endswith("-m submitit.core._submit /runs/sweeps/now/slurm/%j")
    with pytest.raises(UserError, match="needs hydra/launcher=slurm"):
        submission_script({"_target_": "x.BasicLauncher"}, 1)


@pytest.mark.parametrize("name", ["distillation_weights", "edge_threshold", "sampler_steps"])
def test_shipped_sweeps_compose_each_of_their_jobs(name, multirun, make_config):
    base = {"sampler_steps": ("task=test", "checkpoint=x")}.get(name, ("experiment=efkd_isic2018",))
    config = multirun(*base, f"sweep={name}")
    assert str(config.hydra.mode) == "RunMode.MULTIRUN"
    for key, values in config.hydra.sweeper.params.items():
        for value in str(values).split(","):
            assert make_config(*base, f"{key}={value}")


def test_the_sweep_of_wandb_is_that_of_hydra():
    folder = ROOT / "conf" / "sweep"
    ours, theirs = (
        yaml.safe_load((folder / f"{name}distillation_weights.yaml").read_text())
        for name in ("", "_wandb_")
    )
    params = ours["hydra"]["sweeper"]["params"]
    values = {key: [str(v) for v in p["values"]] for key, p in theirs["parameters"].items()}
    assert values == {key: text.split(",") for key, text in params.items()}
    assert theirs["method"] == "grid"
    assert theirs["command"][1:4] == ["python", "run.py", "experiment=efkd_isic2018"]


@pytest.mark.parametrize(
    ("arguments", "expanded"),
    [
        (
            ["a=1", "cross_validation=3", "b=2"],
            ["--multirun", "a=1", "cross_validation=3", "datamodule.fold=0,1,2", "b=2"],
        ),
        (["-m", "cross_validation=2"], ["-m", "cross_validation=2", "datamodule.fold=0,1"]),
        (["cross_validation=3", "datamodule.fold=1"], None),
        (["cross_validation=3", "--cfg", "job"], None),
        (["cross_validation=null", "-m", "seed=0,1"], None),
        (["~cross_validation"], None),
        (["a=1"], None),
    ],
)
def test_a_cross_validation_is_a_multirun_over_folds(arguments, expanded):
    assert sweep.expand_cross_validation(arguments) == (expanded or arguments)


def test_a_multirun_has_no_one_config():
    with pytest.raises(UserError, match=r"--cfg shows one config, and -m runs several"):
        sweep.refuse_showing(["-m", "seed=0,1", "--cfg", "job"])
    sweep.refuse_showing(["-m", "seed=0,1"])
    sweep.refuse_showing(["--cfg", "job"])


@pytest.mark.parametrize("value", ["1", "0", "-3", "2.5", "five", "", "2,3", "[2]"])
def test_a_number_of_folds_is_whole_and_at_least_two(value):
    with pytest.raises(UserError, match="at least 2"):
        sweep.expand_cross_validation([f"cross_validation={value}"])


@pytest.mark.parametrize("split", ["datamodule.split=random", "datamodule.split_file=a.csv"])
def test_a_split_beside_a_cross_validation_is_refused(split):
    with pytest.raises(UserError, match=f"{split} and cross_validation=5"):
        sweep.expand_cross_validation(["cross_validation=5", split])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("task=predict",), "task=predict trains none"),
        (("sweep=search",), "cross_validation=5; cross-validate a grid"),
    ],
)
def test_what_is_no_grid_of_trainings_is_not_cross_validated(multirun, overrides, message):
    with pytest.raises(UserError, match=message):
        sweep._refuse(multirun("experiment=demo_efkd", "cross_validation=5", *overrides))


def test_too_few_images_for_the_folds_are_refused_before_the_first_job(multirun):
    def check(folds, *overrides):
        made = ("datamodule=synthetic", "datamodule.num_samples=6", f"cross_validation={folds}")
        config = multirun(*made)
        config.hydra.overrides.task = [f"cross_validation={folds}", *overrides]
        sweep._check_folds(config)

    check(6)
    with pytest.raises(UserError, match="cross_validation=7 .* 6 images in 6 groups"):
        check(7)
    check(7, "datamodule.num_samples=6,20")  # Each job knows its own data.


def test_damaged_files_of_jobs_are_named_and_the_others_shown(trained, tmp_path, capsys):
    runs = trained((0.5, 0.6), (0.6, 0.7), (0.7, 0.8))
    (runs / "x/0/results.json").write_text('{"schema": 1, "best": 3}')
    (runs / "x/1/test_images.csv").write_text("id,dice\ni0,0.5\n")
    (runs / "x/2/test_images.csv").write_bytes(b"\x89\x00\xff")
    folder = runs / "multirun" / "now"
    (folder / "jobs").mkdir(parents=True)
    for num in range(3):
        record = job(num, f"a={num // 2}", f"datamodule.fold={num}")
        (folder / "jobs" / f"{num}.json").write_text(json.dumps(record))
    for num, content in enumerate(("[1]", "3", '{"num": 1}', "{half"), 3):
        (folder / "jobs" / f"{num}.json").write_text(content)
    jobs = sweep.read_jobs(folder)
    assert [record["num"] for record in jobs] == [0, 1, 2]
    sweep_table.write_tables(folder, jobs)
    sweep_table.print_table(folder, jobs)
    out = capsys.readouterr().out
    assert out.count(str(runs / "x/0/results.json")) == 1
    assert out.count(f"skipped: {runs / 'x/2/test_images.csv'}") == 2, "both of its tables lack it"
    text = (folder / "table.md").read_text()
    assert "0.7000" in text
    assert "0.8000" in text
    assert "i0" in (folder / "cross_validation.csv").read_text()
