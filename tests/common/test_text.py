"""Text from outside cannot steer a terminal or a spreadsheet."""

import pytest
from rich.console import Console
from rich.table import Table

from common.errors import exit_with
from common.text import cell, from_cell, plain_text, printable, say


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Läsion 病変.jpg", "Läsion 病変.jpg"),
        ("a\x1b[31mb", "a\\x1b[31mb"),
        ("two\nlines\r", "two\\x0alines\\x0d"),
        ("caf\udce9", "caf\\xe9"),
        ("\u202egpj", "\\u202egpj"),
    ],
)
def test_control_characters_are_escaped(text, shown):
    assert printable(text) == shown
    printable(text).encode()


@pytest.mark.parametrize("text", ["=cmd|calc", "+A1", "-1+2", "@SUM(A1)", "'=x"])
def test_a_formula_is_no_cell(text):
    assert cell(text) == f"'{text}"
    assert cell(f"p1/{text}") == f"p1/{text}"
    assert from_cell(cell(text)) == text


@pytest.mark.parametrize("text", ["-0.5", "+1", "'x", "a'=b", ""])
def test_other_text_is_a_cell_as_it_is(text):
    assert cell(text) == from_cell(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("runs/[/b]/x", "runs/[/b]/x"),
        ("runs/[v2]/[red]x", "runs/[v2]/[red]x"),
        ("a:smile:b\\", "a:smile:b\\"),
        ("a\x1b[31mb\nc", "a\\x1b[31mb\\x0ac"),
        ("x" * 300, "x" * 300),
        ("a\udcffb", "a\\xffb"),
    ],
)
def test_text_stands_on_the_terminal_as_it_is(capsys, text, shown):
    say(text, style="red")
    assert capsys.readouterr().out == f"{shown}\n"
    table = Table("")
    table.add_row(plain_text(text))
    Console(width=400).print(table)
    assert shown in capsys.readouterr().out
    with pytest.raises(SystemExit):
        exit_with(text)
    assert capsys.readouterr().err == f"error: {shown}\n".replace("\\x0a", " ")
