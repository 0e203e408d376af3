"""Errors on the command line: one line without a traceback."""

from __future__ import annotations

import traceback
from pathlib import Path

__all__ = ["PROGRAM", "is_ours", "one_line"]

PROGRAM = "diffusers-adjoint"
LONGEST_ERROR = 1000  # characters of an error line


def is_ours(error: BaseException) -> bool:
    """Whether this package raised the error; its message is then a sentence for the user, and needs no traceback."""
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    return Path(raised_in).is_relative_to(Path(__file__).parents[1])


def one_line(error: BaseException) -> str:
    """The error's message in one line. A long one is cut in the middle, because what to pass instead stands at the end."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST_ERROR else f"{text[: LONGEST_ERROR - 300]} […] {text[-295:]}"
