"""What the user is told that is no warning."""

from __future__ import annotations

from tqdm.auto import tqdm

__all__ = ["tell"]


def tell(line: str) -> None:
    """On stdout, as the host prints its log, above a progress bar."""
    tqdm.write(line)
