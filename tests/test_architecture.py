"""Who may import whom: no wall between the rooms has a hole."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("common", "datamodules", "lightning_modules", "networks", "tasks")
MAY_IMPORT = {
    "common": {"common"},
    "networks": {"common", "networks"},
    "datamodules": {"common", "datamodules"},
    "lightning_modules": {"common", "lightning_modules"},
    "lightning_modules/losses": {"common", "lightning_modules.losses"},
    "lightning_modules/metrics": {"common", "lightning_modules.metrics"},
    "lightning_modules/processes": {"common", "lightning_modules.processes"},
    "tasks": set(ROOMS),
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_rooms_import_only_what_they_may(room):
    files = list((ROOT / room).rglob("*.py"))
    assert files
    for path in files:
        for name in imports(path):
            if name.split(".")[0] in ROOMS:
                allowed = any(name == a or name.startswith(f"{a}.") for a in MAY_IMPORT[room])
                assert allowed, f"{path} imports {name}"


def test_albumentations_is_imported_in_one_module():
    users = [
        path.name
        for room in ROOMS
        for path in (ROOT / room).rglob("*.py")
        if any(name.split(".")[0] == "albumentations" for name in imports(path))
    ]
    assert users == ["augmentations.py"]


def test_every_experiment_begins_with_its_command():
    for path in (ROOT / "conf" / "experiment").glob("[!_]*.yaml"):
        lines = path.read_text().splitlines()
        assert lines[0] == "# @package _global_"
        assert lines[1] == f"# python run.py experiment={path.stem}"
