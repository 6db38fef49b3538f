"""What the README tells a user to type is understood."""

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
TASKS = ROOT / "conf" / "task"
BLOCKS = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [
    shlex.split(line, comments=True)
    for block in BLOCKS
    for line in block.replace("\\\n", " ").splitlines()
]
TABLE = re.findall(r"^\| .*? \| (.*`.*) \|$", README, flags=re.MULTILINE)
SPANS = [span for row in TABLE for span in re.findall(r"`([^`]+)`", row) if "=" in span]


def filled(words):
    return [re.sub(r"<[^>]*>", "x", word) for word in words]


@pytest.mark.parametrize("command", [c for c in COMMANDS if "run.py" in c])
def test_commands_compose(command, make_config):
    words = filled(word for word in command[command.index("run.py") + 1 :] if word != "-m")
    if "-m" in command:  # Of a sweep its first job.
        words = [word.split(",")[0] for word in words]
    config = make_config(*words)
    assert (TASKS / f"{config['task']}.yaml").is_file()


@pytest.mark.parametrize("span", [s for s in SPANS if not s.startswith("WANDB_MODE")])
def test_overrides_in_tables_compose(span, make_config):
    words = [word for word in filled(span.split()) if word not in ("python", "run.py", "-m")]
    single = [word for word in words if "," not in word]
    one_pass = any(term in span for term in ("losses.bce", "losses.dice"))
    experiment = "deeplab_raw_isic2018" if one_pass else "efkd_isic2018"
    experiment = "d_kd_isic2019" if "val_loss" in span else experiment
    assert make_config(f"experiment={experiment}", *single)


def test_every_command_is_of_a_kind_that_is_tested():
    known = {"make", "python", "python3", "pip", "torchrun", "wandb"}
    assert COMMANDS
    assert {command[0] for command in COMMANDS} == known
    scripts = {c[1] for c in COMMANDS if c[0] == "python"}
    benchmarks = {"benchmarks/train_step.py", "benchmarks/data.py"}
    assert scripts == {"run.py", *benchmarks}
    makefile = (ROOT / "Makefile").read_text()
    targets = [c[1] for c in COMMANDS if c[0] == "make"]
    assert all(f"\n{target}:" in makefile for target in targets)
