"""What can be wrong with a dataset."""

from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError

__all__ = ["BadFileError", "Problem"]


@dataclass(frozen=True)
class Problem:
    """Something wrong with a dataset.

    Attributes:
        kind: a few words that problems of the same kind share, such as `image without partner`.
        path: the file or folder.
        message: one or two sentences: what was expected, and how to mend it.
    """

    kind: str
    path: Path
    message: str


class BadFileError(UserError):
    """A file that cannot be used.

    Args:
        kind, path, message: as in `Problem`.
    """

    def __init__(self, kind: str, path: Path, message: str) -> None:
        super().__init__(message)
        self.problem = Problem(kind, path, message)
