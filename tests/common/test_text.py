"""Text from outside cannot steer a terminal or a spreadsheet."""

import pytest

from common.text import cell, printable


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


@pytest.mark.parametrize("text", ["=cmd|calc", "+1", "-1+2", "@SUM(A1)"])
def test_a_formula_is_no_cell(text):
    assert cell(text) == f"'{text}"
    assert cell(f"p1/{text}") == f"p1/{text}"
