"""Tables and pages: what is said is escaped, and nothing is fetched."""

import base64

from common.markup import html_page, html_picture, html_table, markdown_table


def test_markdown_aligns_numbers_and_escapes_bars():
    text = markdown_table(("name", "Dice"), [("a|b", 0.5), ("c", 1)])
    assert text.splitlines() == [
        "| name | Dice |",
        "| --- | ---: |",
        "| a\\|b | 0.5 |",
        "| c | 1 |",
    ]


def test_html_cells_are_escaped_and_numbers_marked():
    text = html_table(("<name>",), [("<script>", "0.5"), ("-1", "-x")], kinds=["problem", "fine"])
    assert "<th>&lt;name&gt;</th>" in text
    assert "<td>&lt;script&gt;</td><td class=number>0.5</td>" in text
    assert "<tr class=problem>" in text
    assert "<td class=number>-1</td><td>-x</td>" in text


def test_a_page_holds_its_pictures():
    data = b"\x89PNG picture"
    page = html_page("A & B", html_picture(data, "png", "first\nsecond <3", width=20))
    assert "<title>A &amp; B</title>" in page
    assert f"data:image/png;base64,{base64.b64encode(data).decode()}" in page
    assert "first<br>second &lt;3" in page
    assert "http" not in page
