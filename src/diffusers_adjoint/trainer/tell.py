"""Output for the user that is not a warning."""

from __future__ import annotations

from tqdm.auto import tqdm

__all__ = ["tell"]


def tell(line: str) -> None:
    """Print a line to stdout, where the host prints its log too, without breaking a progress bar."""
    tqdm.write(line)
