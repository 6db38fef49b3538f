"""Paths on the command line reach Hydra as they are."""

import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from common.quoting import hydra_string, quoted, suggest_quotes


def read(argument):
    return OverridesParser.create().parse_override(argument).value()


@pytest.mark.parametrize(
    "name",
    [
        *("photos", "my photos (1)", "a=b,c", "br[1]", "[old]", "{x}", "a{b}", "it's", 'say "x"'),
        *("снимки", "写真/一", "2024", "1e5", "007", "true", "a: b", "tail\\", "a\\b", "a\\'b"),
        *(
            "x,y",
            "choice(a,b)",
            "int(5)",
            "a#b",
            "a;b&c|d",
            "100%",
            "-",
            "!",
            "'",
            "''x",
            "'a','b'",
        ),
        *("photos/*.jpg", "photos/[ab]?.jpg", " lead", "trail ", "tab\there", "$HOME", "a~", "🙂"),
    ],
)
@pytest.mark.parametrize(
    "key", ["input", "+output", "datamodule.root", "paths.data", "++paths.any", "resume"]
)
def test_a_path_is_read_as_typed(key, name):
    (argument,) = quoted([f"{key}={name}"])
    assert argument.startswith(f"{key}=")
    assert read(argument) == name
    assert quoted([argument]) == [argument], "as a process started by this one gives it"


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("resume=null", None),
        ("resume=latest", "latest"),
        ("input='a b'", "a b"),
        ('input="photos/*.jpg"', "photos/*.jpg"),
        ("checkpoint=[a b.ckpt,c=d.ckpt]", ["a b.ckpt", "c=d.ckpt"]),
        ("teacher.checkpoint=['a,b.ckpt', 2024]", ["a,b.ckpt", "2024"]),
        ("runs=[]", []),
        ("paths.data=${oc.env:DATA}", "${oc.env:DATA}"),
        ("paths.data=${oc.env:DATA,x}/my (1)", "${oc.env:DATA,x}/my (1)"),
    ],
)
def test_what_hydra_means_is_kept(argument, expected):
    (argument,) = quoted([argument])
    assert read(argument) == expected


@pytest.mark.parametrize(
    "flag", ["-m", "--multirun", "hydra.mode=MULTIRUN", "sweep=search", "cross_validation=3"]
)
def test_commas_separate_the_values_of_a_multirun(flag):
    _, argument = quoted([flag, "checkpoint=a b.ckpt,c(1).ckpt,[d e,f],'g,h',${x:1,2}"])
    parts = [
        getattr(part, "text", part)
        for part in OverridesParser.create().parse_override(argument).value().list
    ]
    assert parts[:2] == ["a b.ckpt", "c(1).ckpt"]
    assert [getattr(part, "text", part) for part in parts[2]] == ["d e", "f"]
    assert parts[3:] == ["g,h", "${x:1,2}"]
    assert quoted([flag, "checkpoint=choice(a,b)"])[1] == "checkpoint=choice(a,b)"


@pytest.mark.parametrize(
    "arguments",
    [
        ["sweep=search", "input=a,b", "hydra.mode=RUN"],
        ["sweep=null", "input=a,b"],
        ["cross_validation=2", "input=a,b", "datamodule.fold=0"],
        ["cross_validation=null", "input=a,b"],
    ],
)
def test_a_job_of_a_multirun_is_none(arguments):
    assert read(quoted(arguments)[1]) == "a,b"


@pytest.mark.parametrize(("value", "read_as"), [("false", False), ("True", True), ("a b", "a b")])
def test_a_table_may_be_switched_off(value, read_as):
    (argument,) = quoted([f"datamodule.table={value}"])
    assert read(argument) == read_as
    (argument,) = quoted(["input=false"])
    assert read(argument) == "false"


@pytest.mark.parametrize("name", ["[a,b]", "'x'", "a,b", "choice(a,b)", "${x}", "null"])
def test_a_path_that_exists_wins(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).touch()
    _, argument = quoted(["-m", f"checkpoint={name}"])
    assert read(argument) == name.replace("${", "\\${"), "an interpolation is escaped"


def test_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert read(quoted(["input=~/my photos"])[0]) == "/home/me/my photos"


@pytest.mark.parametrize(
    "argument",
    ["-m", "--cfg", "job", "seed=0,1", "logger.wandb.name=a(b)", "~logger", "input=", "input"],
)
def test_other_arguments_are_left(argument):
    assert quoted([argument]) == [argument]


@pytest.mark.parametrize("value", ["my (run)", "it's", 'a "b"', "x,y", "a=b\\"])
def test_the_suggestion_can_be_typed(value):
    (typed,) = shlex.split(suggest_quotes(f"logger.wandb.name={value}"))
    assert read(typed) == value
    assert read(f"x={hydra_string(value)}") == value
