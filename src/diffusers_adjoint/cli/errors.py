"""What the command line says when it fails: one line."""

from __future__ import annotations

import traceback
from pathlib import Path

__all__ = ["PROGRAM", "is_ours", "one_line"]

PROGRAM = "diffusers-adjoint"
LONGEST_ERROR = 1000  # characters of an error line


def is_ours(error: BaseException) -> bool:
    """Whether this package raised it: then it is a sentence for the user."""
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    return Path(raised_in).is_relative_to(Path(__file__).parents[1])


def one_line(error: BaseException) -> str:
    """Cut in the middle when it is longer than a screen, as a value in it may be: what to pass instead stands at the end."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST_ERROR else f"{text[: LONGEST_ERROR - 300]} […] {text[-295:]}"
