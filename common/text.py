"""Text from outside, such as file names, for terminals and tables."""

from pathlib import Path

from rich.console import Console
from rich.text import Text

__all__ = ["cell", "from_cell", "plain_text", "printable", "say", "skip"]

# A spreadsheet runs a cell that begins with one of these as a formula.
_FORMULA = ("=", "+", "-", "@")
# What `skip` has printed.
_SKIPPED: set[str] = set()


def printable(text: str) -> str:
    r"""Return text without control characters, on one line.

    Control characters, which a terminal obeys, and bytes of file names that are not UTF-8 become
    escapes, such as `\x1b`; letters of every alphabet stay.
    """
    return "".join(c if c.isprintable() else _escape(c) for c in text)


def cell(text: str) -> str:
    """Return text for a table: printable, and after an apostrophe where it looks like a formula.

    Numbers are none.
    """
    shown = printable(text)
    return f"'{shown}" if _is_formula(shown) else shown


def from_cell(text: str) -> str:
    """Return the printable text that `cell` made a cell of."""
    return text[1:] if text.startswith("'") and _is_formula(text) else text


def _is_formula(text: str) -> bool:
    # After apostrophes too, so that the one of `cell` can be told from those of a text.
    if not text.lstrip("'").startswith(_FORMULA):
        return False
    try:
        float(text)
    except ValueError:
        return True
    return False


def plain_text(text: str | Path) -> Text:
    """Return text from outside for a table or a tree of rich, which shows it as it is.

    Brackets are no markup, names between colons no emoji, and control characters are escapes.
    """
    return Text(printable(str(text)))


def say(text: str, style: str = "") -> None:
    """Print a line on the terminal as it is, not broken at the width of the terminal.

    Args:
        text: as for `plain_text`.
        style: such as `yellow`.
    """
    Console(highlight=False).print(plain_text(text), style=style, soft_wrap=True)


def skip(reason: str) -> None:
    """Print what is left out and why, once in a process."""
    if reason not in _SKIPPED:
        _SKIPPED.add(reason)
        say(f"skipped: {reason}", style="yellow")


def _escape(character: str) -> str:
    code = ord(character)
    # The way Python represents a byte of a file name that is not UTF-8.
    if 0xDC80 <= code <= 0xDCFF:
        code -= 0xDC00
    if code <= 0xFF:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"
