"""Tables and pages for people, as Markdown and as HTML that needs no other file."""

import base64
import html
from collections.abc import Iterable, Sequence

__all__ = ["html_page", "html_picture", "html_table", "markdown_table", "plot_label"]

_STYLE = """
body { font: 14px sans-serif; margin: 2em; color: #222; }
table { border-collapse: collapse; margin-bottom: 2em; }
th, td { border: 1px solid #ccc; padding: .3em .6em; vertical-align: top; text-align: left; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
tr.problem td:first-child { color: #b00; }
tr.remark td:first-child { color: #960; }
figure { display: inline-block; margin: 4px; text-align: center; vertical-align: top; }
img { max-width: 100%; }
figcaption { font-size: 10px; overflow-wrap: anywhere; }
"""


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table; all columns but the first are aligned to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    cells = [[str(cell).replace("|", "\\|") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def html_table(
    header: Sequence[str], rows: Iterable[Sequence[object]], kinds: Sequence[str] | None = None
) -> str:
    """Return an HTML table; `kinds` gives each row a class, numbers are aligned to the right."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = []
    for index, row in enumerate(rows):
        cells = "".join(
            f"<td{' class=number' if _is_number(cell) else ''}>{html.escape(str(cell))}</td>"
            for cell in row
        )
        body.append(f"<tr{f' class={kinds[index]}' if kinds else ''}>{cells}</tr>\n")
    return f"<table><thead><tr>{head}</tr></thead>\n{''.join(body)}</table>\n"


def plot_label(text: str) -> str:
    """Return text for matplotlib, which shows it as it is: a `$` begins no formula."""
    return text.replace("$", r"\$")


def _is_number(cell: object) -> bool:
    return str(cell)[:1].isdigit() or (str(cell)[:1] in "+-" and str(cell)[1:2].isdigit())


def html_picture(data: bytes, kind: str, caption: str = "", width: int | None = None) -> str:
    """Return a figure that holds its picture: `kind` is `png` or `jpeg`; lines break at `\\n`."""
    text = "<br>".join(html.escape(line) for line in caption.split("\n"))
    size = f" style='width:{width}px'" if width else ""
    source = base64.b64encode(data).decode()
    return (
        f"<figure><img{size} src='data:image/{kind};base64,{source}' alt='{html.escape(caption)}'>"
        f"<figcaption>{text}</figcaption></figure>\n"
    )


def html_page(title: str, *parts: str) -> str:
    """Return a whole page of parts that are HTML already."""
    name = html.escape(title)
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{name}</title>\n'
        f"<style>{_STYLE}</style>\n<h1>{name}</h1>\n{''.join(parts)}</html>\n"
    )
