"""A teacher that has seen the student's validation or test images."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from common.errors import UserError
from datamodules.folder import Folder
from datamodules.isic2017 import ISIC2017
from datamodules.isic2018 import ISIC2018
from datamodules.splits import read_parts, write_split
from tasks import fit
from tasks.build import build_datamodule
from tasks.seen_images import check_teacher, find_seen, seen_record
from tasks.teachers import find_teachers


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Two sets of 16 photographs with masks, under the same names."""
    return tmp_path_factory.mktemp("photographs")


@pytest.fixture
def folder(pairs, tmp_path, photographs):
    """Makes a folder of 16 photographs, unless it is there, and divides them.

    The first 8 from number `turned` on are trained on, then come 4 of validation and 4 of the test.
    """

    def make(name, content=0, renamed="", turned=0):
        root, source = tmp_path / "data" / name, photographs / str(content)
        if not source.exists():
            names = [f"{number:03d}" for number in range(16)]
            pairs(source / "images", source / "masks", names, ".png", ".png", content)
        if not root.exists():
            for path in sorted(source.glob("*/*")):
                copy = root / path.parent.name / f"{renamed}{path.name}"
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, copy)
        ids = [f"{renamed}{(turned + number) % 16:03d}" for number in range(16)]
        parts = ["train"] * 8 + ["val"] * 4 + ["test"] * 4
        write_split(root / "splits.csv", dict(zip(ids, parts, strict=True)))
        return root

    return make


def data_config(root, name="Folder"):
    return {"name": name, "root": str(root)}


def seen_by(paths):
    return [find_seen(path, torch.load(path, weights_only=True)) for path in paths]


@pytest.fixture
def make_teacher(load, tmp_path):
    """Writes the run folder of a network that was trained on a folder; returns its checkpoint."""

    def make(
        root, name="teacher", cls=Folder, recorded=True, digests=True, teachers=(), weights=None
    ):
        datamodule = load(cls, root)
        checkpoint = torch.load(weights, weights_only=True) if weights else {"config": {}}
        config = checkpoint["config"]
        config["datamodule"] = {**config.get("datamodule", {}), **data_config(root, cls.__name__)}
        config.setdefault("lightning_module", {"name": "Segmentation"})
        if recorded:
            checkpoint["seen_images"] = seen_record(config, datamodule, seen_by(teachers))
        path = tmp_path / "teachers" / name / "checkpoints" / "best.ckpt"
        path.parent.mkdir(parents=True)
        torch.save(checkpoint, path)
        columns = (datamodule.parts, datamodule.digests)[: 1 + digests]
        write_split(path.parent.parent / "splits.csv", *columns)
        return path

    return make


@pytest.fixture
def check(load):
    """Checks teachers against the split of a student's folder, as a training does."""

    def run(root, *teachers, cls=Folder, allow_leak=False):
        datamodule = load(cls, root)
        data = data_config(root, cls.__name__)
        config = {"datamodule": data, "teacher": {"allow_leak": allow_leak}}
        return check_teacher(seen_by(teachers), config, datamodule.parts, datamodule.digests)

    return run


@pytest.mark.parametrize("recorded", [True, False], ids=["by its record", "by splits.csv"])
def test_overlap_is_counted_by_part(folder, make_teacher, check, recorded):
    teacher = make_teacher(folder("a"), recorded=recorded)
    assert check(folder("a"), teacher) == {"val": 0, "test": 0}, "the same split"
    # Divided two images later: two come from its training into our validation, two of those by
    # which it was chosen into our test.
    message = rf"{teacher} was trained on 2 validation images and was chosen by 2 test images"
    with pytest.raises(UserError, match=message):
        check(folder("b", turned=14), teacher)
    renamed = folder("c", renamed="x", turned=8)
    message = r"trained on 4 test and 4 validation images .*, first x004;.*teacher.allow_leak=true"
    with pytest.raises(UserError, match=message):
        check(renamed, teacher)
    assert check(renamed, teacher, allow_leak=True) == {"val": 4, "test": 4}


def test_equal_names_of_other_photographs_are_no_overlap(folder, make_teacher, check):
    teacher = make_teacher(folder("a"))
    assert check(folder("b", content=1, turned=8), teacher) == {"val": 0, "test": 0}


def test_the_part_in_an_id_hides_no_overlap(folder, make_teacher, check, tmp_path):
    root, official = folder("a"), tmp_path / "data" / "official"
    for part, numbers in (("train", range(8, 16)), ("val", range(4, 8)), ("test", range(4))):
        for kind in ("images", "masks"):
            (official / part / kind).mkdir(parents=True)
            for number in numbers:
                shutil.copy(root / kind / f"{number:03d}.png", official / part / kind)
    with pytest.raises(UserError, match="trained on 4 test and 4 validation .* first test/000"):
        check(official, make_teacher(root))


def test_a_photograph_that_the_student_has_twice_is_its_own_leak(folder, make_teacher, check):
    for name in ("a", "b"):
        root = folder(name)
        # 015 is in the test and 000 in the training part.
        shutil.copy(root / "images" / "000.png", root / "images" / "015.png")
    assert check(root, make_teacher(root.with_name("a"))) == {"val": 0, "test": 0}


def test_names_identify_photographs_of_the_archive(pairs, make_teacher, check, tmp_path):
    def write(folders, numbers):
        names = [f"ISIC_{number:07d}" for number in numbers]
        pairs(*(tmp_path / folder for folder in folders), names, content=numbers[0])

    for part, numbers in (("Training", range(8, 14)), ("Validation", [14]), ("Test_v2", [7])):
        stem = f"isic2017/ISIC-2017_{part}"
        write((f"{stem}_Data", f"{stem}_Part1_GroundTruth"), numbers)
    teacher = make_teacher(tmp_path / "isic2017", cls=ISIC2017)
    stem = "isic2018/ISIC2018_Task1"
    write((f"{stem}-2_Training_Input", f"{stem}_Training_GroundTruth"), range(1, 11))
    # Of 1 to 10 the reference trains on seven, validates on 8 and tests on 9 and 10.
    message = "trained on 2 test and 1 validation images .* first ISIC_0000009"
    with pytest.raises(UserError, match=message):
        check(tmp_path / "isic2018", teacher, cls=ISIC2018)


def test_runs_from_before_there_were_digests_are_compared_by_name(folder, make_teacher, check):
    teacher = make_teacher(folder("a"), recorded=False, digests=False)
    with pytest.raises(UserError, match="trained on 4 test and 4 validation"):
        check(folder("a", turned=8), teacher)
    assert check(folder("b", content=1, turned=8), teacher) is None, "other folders are not known"


def test_every_teacher_of_an_ensemble_is_checked(folder, make_teacher, check):
    fine = make_teacher(folder("a"), name="fine")
    leaks = make_teacher(folder("b", turned=8), name="leaks")
    with pytest.raises(UserError, match=rf"teacher {leaks} was trained on 4 test"):
        check(folder("a"), fine, leaks)
    assert check(folder("a"), fine, leaks, allow_leak=True) == {"val": 4, "test": 4}


def test_a_teacher_brings_what_its_own_teacher_has_seen(folder, make_teacher, check):
    first = make_teacher(folder("a"), name="first")
    other = folder("other", content=1)
    second = make_teacher(other, name="second", teachers=[first])
    assert check(other, second) == {"val": 0, "test": 0}
    with pytest.raises(UserError, match=rf"{second} was trained on 4 test and 4 validation"):
        check(folder("a", turned=8), second)


def test_a_checkpoint_without_record_cannot_be_checked(folder, make_teacher, check, tmp_path):
    root = folder("a")
    lone = shutil.copy(make_teacher(root, name="old", recorded=False), tmp_path / "lone.ckpt")
    assert check(root, lone) is None
    # What is known is still compared.
    student = make_teacher(root, name="student", teachers=[lone])
    assert check(root, student) is None
    with pytest.raises(UserError, match="trained on 4 test"):
        check(folder("a", turned=8), student)


@pytest.mark.parametrize("record", [3, {}, {"train": "a", "val": "b", "complete": True}])
def test_a_damaged_record_counts_as_none(tmp_path, record):
    seen = find_seen(tmp_path / "a.ckpt", {"seen_images": record})
    assert (seen.train, seen.val, seen.complete) == (frozenset(), frozenset(), False)


@pytest.fixture
def configure(make_config, tmp_path):
    """Composes a tiny run on a folder; with a teacher it distils from that."""

    def make(root, run, teacher=None):
        method = ["lightning_module=segmentation"]
        if teacher:
            method = ["lightning_module=segmentation_kd", "teacher=newest"]
            method += [f"teacher.checkpoint={teacher}", "teacher.experiment=demo_unet_teacher"]
        return make_config(
            *("experiment=demo_unet_teacher", "datamodule=folder", "debug=fast", *method),
            *(f"datamodule.root={root}", "datamodule.image_size=16", "augmentation=none"),
            f"hydra.runtime.output_dir={tmp_path}/runs/{run}",
        )

    return make


def train(config):
    fit.run(config)
    run = Path(config["paths"]["run"])
    return run / "checkpoints" / "best.ckpt", json.loads((run / "results.json").read_text())


def test_training_refuses_a_leak_unless_it_is_allowed(folder, configure, capsys, tmp_path):
    root = folder("a")
    trained, _ = train(configure(root, "teacher"))
    parts, digests = read_parts(tmp_path / "runs" / "teacher" / "splits.csv")
    assert list(parts.values()) == ["train"] * 8 + ["val"] * 4 + ["test"] * 4
    assert len(set(digests.values())) == 16
    path = shutil.move(trained, tmp_path / "moved.ckpt")
    leaking = folder("b", renamed="x", turned=8)
    config = configure(leaking, "student", path)
    with pytest.raises(UserError, match=rf"{path} was trained on 4 test and 4 validation"):
        fit.run(config)
    assert not (tmp_path / "runs" / "student" / "checkpoints").exists()
    # A student on other photographs brings them along, and is itself a fine teacher for its own.
    other = folder("c", content=1)
    student, results = train(configure(other, "other", path))
    assert results["teacher"]["leaked_images"] == {"val": 0, "test": 0}
    assert "It has seen" not in capsys.readouterr().out
    with pytest.raises(UserError, match=rf"{student} was trained on 4 test and 4 validation"):
        fit.run(configure(leaking, "chain", student))
    config["teacher"]["allow_leak"] = True
    _, results = train(config)
    assert results["teacher"]["leaked_images"] == {"val": 4, "test": 4}
    assert "It has seen 4 test and 4 validation" in " ".join(capsys.readouterr().out.split())


def test_names_that_leak_are_refused_before_photographs_are_decoded(
    make_checkpoint, make_config, tmp_path
):
    small = ("datamodule.num_samples=20", "datamodule.image_size=16")
    teacher = make_checkpoint(*small, one_pass=True)
    made = torch.load(teacher, weights_only=True)
    datamodule = build_datamodule(made["config"]["datamodule"])
    datamodule.setup()
    torch.save(made | {"seen_images": seen_record(made["config"], datamodule, [])}, teacher)
    config = make_config(
        *("experiment=demo_unet_kd", f"teacher.checkpoint={teacher}", "datamodule.split=random"),
        *(*small, f"datamodule.cache={tmp_path}/empty", "logger=csv"),
    )
    drawn = build_datamodule(config["datamodule"]).find_parts()
    count = sum(p == "test" and datamodule.parts[key] == "train" for key, p in drawn.items())
    with pytest.raises(UserError, match=rf"was trained on {count} test .*, first synthetic"):
        fit.run(config)
    assert not (tmp_path / "empty").exists()


@pytest.fixture
def finished(make_teacher, tmp_path):
    """Files a teacher's run on a folder as `fit` does; returns its checkpoint."""

    def make(root, name, weights=None):
        run = tmp_path / "runs" / f"demo_unet_teacher-{root.name}" / name
        made = make_teacher(root, name=f"{root.name}-{name}", weights=weights)
        shutil.copytree(made.parent.parent, run)
        data = {"name": "Folder", "label": root.name, "image_size": 16}
        results = {"schema": 1, "status": "finished", "debug": None, "data": data}
        (run / "results.json").write_text(json.dumps(results))
        (run / "config.yaml").write_text(f"datamodule:\n  root: {root}\n")
        return run / "checkpoints" / "best.ckpt"

    return make


@pytest.fixture
def search(tmp_path):
    """Looks for the teacher of a student on a folder."""

    def find(root, **teacher):
        config = {
            "datamodule": {**data_config(root), "image_size": 16},
            "data_label": root.name,
            "paths": {"runs": str(tmp_path / "runs")},
            "teacher": {"checkpoint": None, "experiment": "demo_unet_teacher", **teacher},
        }
        datamodule = Folder(root=root, cache=tmp_path, image_size=16, batch_size=4)
        return find_teachers(config, datamodule.find_parts)

    return find


def test_own_folders_have_their_own_teachers(folder, finished, search):
    ours, theirs = finished(folder("a"), "1"), finished(folder("b"), "2")
    assert search(folder("a")) == [ours]
    assert search(folder("b")) == [theirs]
    with pytest.raises(UserError, match=r"No finished run of demo_unet_teacher on the folder .*/c"):
        search(folder("c"))


@pytest.mark.parametrize(
    ("experiment", "chosen"),
    [
        ("demo_unet_teacher", "experiment=demo_unet_teacher"),
        ("segmentation", "lightning_module=segmentation"),
    ],
)
def test_a_missing_teacher_has_its_command(folder, search, experiment, chosen):
    root = folder("my (1)")
    with pytest.raises(UserError) as raised:
        search(root, experiment=experiment)
    command = str(raised.value).split("`python run.py ")[1].partition("`")[0]
    data = ["datamodule=folder", f"datamodule.root={root}", "datamodule.image_size=16"]
    assert shlex.split(command) == [chosen, *data]


def test_the_folder_itself_comes_before_one_of_its_name(
    folder, finished, search, configure, make_checkpoint
):
    ours = finished(folder("x/a"), "1")
    weights = make_checkpoint("datamodule.image_size=16", one_pass=True)
    newer = finished(folder("y/a", content=1), "2", weights)
    assert search(folder("x/a")) == [ours]
    assert search(folder("y/a", content=1)) == [newer]
    moved = folder("z/a", content=2)
    assert search(moved) == [newer]
    config = configure(moved, "student", newer)
    config["teacher"]["checkpoint"] = None
    with pytest.raises(UserError, match=rf"none of the training .*teacher.checkpoint={newer}"):
        fit.run(config)


def test_a_run_on_another_split_is_passed_over(folder, finished, search):
    older = finished(folder("a"), "1")
    finished(folder("a", turned=8), "2")
    assert search(folder("a")) == [older]
    shutil.rmtree(older.parent.parent)
    with pytest.raises(UserError, match=r"\(1 more have seen validation or test images"):
        search(folder("a"))
    assert len(search(folder("a"), allow_leak=True)) == 1


def test_leaks_are_allowed_by_true_alone(folder, search):
    with pytest.raises(UserError, match="teacher.allow_leak=no does not exist"):
        search(folder("a"), allow_leak="no")
