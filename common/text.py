"""Text from outside, such as file names, for terminals and tables."""

__all__ = ["cell", "printable"]

# A spreadsheet runs a cell that begins with one of these as a formula.
_FORMULA = ("=", "+", "-", "@")


def printable(text: str) -> str:
    r"""Return text without control characters, on one line.

    Control characters, which a terminal obeys, and bytes of file names that are not UTF-8 become
    escapes, such as `\x1b`; letters of every alphabet stay.
    """
    return "".join(c if c.isprintable() else _escape(c) for c in text)


def cell(text: str) -> str:
    """Return text for a table: printable, and after an apostrophe where it looks like a formula."""
    shown = printable(text)
    return f"'{shown}" if shown.startswith(_FORMULA) else shown


def _escape(character: str) -> str:
    code = ord(character)
    # The way Python represents a byte of a file name that is not UTF-8.
    if 0xDC80 <= code <= 0xDCFF:
        code -= 0xDC00
    if code <= 0xFF:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"
