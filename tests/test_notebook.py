"""The quickstart runs from the first cell to the last, and is stored without what it printed."""

import json
import os
import re
import shlex
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
QUICKSTART = ROOT / "notebooks" / "quickstart.ipynb"
TEACHER_OF = {"demo_efkd": "demo_teacher", "demo_unet_kd": "demo_unet_teacher"}
SHORT = (
    "datamodule.image_size=16",
    "trainer.accelerator=cpu",
    "trainer.max_epochs=1",
    *(f"trainer.limit_{part}_batches=2" for part in ("train", "val", "test")),
)


def read():
    return nbformat.read(QUICKSTART, as_version=4)


def commands():
    """Every command of the project, in cells and in text."""
    text = "\n".join(cell.source for cell in read().cells)
    text = re.sub(r'"\n +f?"', "", text)
    found = re.findall(r"^.*?(python run\.py [^\"\n]+)", text, flags=re.MULTILINE)
    return [shlex.split(re.sub(r"<[^>]*>|\{[^}]*\}", "x", line), comments=True) for line in found]


@pytest.mark.slow
def test_it_runs_and_shows_what_it_promises(tmp_path, monkeypatch):
    places = (f"paths.runs={tmp_path}/runs", f"paths.cache={tmp_path}/cache")
    monkeypatch.setenv("QUICKSTART_OVERRIDES", " ".join([*SHORT, *places]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "jupyter"))
    notebook = read()
    folder = {"metadata": {"path": str(QUICKSTART.parent)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=folder).execute()

    streams = [o for cell in notebook.cells for o in cell.get("outputs", []) if "text" in o]
    assert all(output.name == "stdout" for output in streams)
    assert not any("\x1b" in output.text for output in streams), "what a cell cannot draw"
    outputs = {cell["id"]: cell.get("outputs", []) for cell in notebook.cells}
    shown = {
        name: "".join(output.get("data", {}).get("text/markdown", "") for output in listed)
        for name, listed in outputs.items()
    }
    experiments = {*TEACHER_OF, *TEACHER_OF.values()}
    rows = re.findall(r"^\| (demo_\w+) \|", shown["report"], flags=re.MULTILINE)
    assert sorted(rows) == sorted(experiments)
    for name in ("test-images", "predict"):
        assert [o for o in outputs[name] if "image/png" in o.get("data", {})], name

    for experiment in experiments:
        (run,) = (tmp_path / "runs" / experiment).iterdir()
        results = json.loads((run / "results.json").read_text())
        assert results["status"] == "finished"
        assert list(run.glob("tensorboard/events*"))
        if experiment in TEACHER_OF:
            (teacher,) = (tmp_path / "runs" / TEACHER_OF[experiment]).iterdir()
            assert results["teacher"]["checkpoint"] == f"{teacher}/checkpoints/best.ckpt"


def test_it_is_stored_as_it_was_written():
    notebook = read()
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in notebook.cells:
        assert re.fullmatch("[a-z-]+", cell["id"]), "named, so that it stays the same"
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


@pytest.mark.parametrize("command", commands(), ids=lambda command: " ".join(command[2:]))
def test_commands_compose(command, make_config):
    config = make_config(*command[2:])
    assert (ROOT / "conf" / "task" / f"{config['task']}.yaml").is_file()


def test_every_demo_is_trained():
    text = " ".join(word for command in commands() for word in command)
    demos = [path.stem for path in (ROOT / "conf" / "experiment").glob("demo_*.yaml")]
    assert set(demos) == {*TEACHER_OF, *TEACHER_OF.values()}
    assert all(f"experiment={demo} " in text for demo in demos)


@pytest.fixture
def setup(monkeypatch):
    """Runs the setup in a folder and returns the one it ends in."""
    cells = {cell["id"]: cell.source for cell in read().cells}
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(os, "environ", dict(os.environ))

    def run(folder):
        monkeypatch.chdir(folder)
        exec(f"{cells['repository']}\n{cells['setup']}", {})
        return Path.cwd()

    return run


@pytest.mark.parametrize("folder", [ROOT, ROOT / "notebooks"])
def test_it_finds_the_project(setup, folder):
    assert setup(folder) == ROOT


def test_without_the_project_it_says_what_it_needs(setup, tmp_path):
    with pytest.raises(RuntimeError, match="address of its repository into REPOSITORY"):
        setup(tmp_path)
