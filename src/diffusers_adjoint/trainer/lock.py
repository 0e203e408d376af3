"""One training process at a time in a folder, and nothing left behind by one that was killed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.utils import logging

try:
    import fcntl as _fcntl
except ImportError:  # Windows
    _fcntl = None  # type: ignore[assignment]

__all__ = ["only_trainer"]

logger = logging.get_logger(__name__)

LOCK_NAME = ".diffusers-adjoint.lock"
_locked: set[int] = set()  # descriptors of the locks that this process holds


def _close_inherited() -> None:
    """A lock lasts as long as any process has its file open: a forked worker must not outlive the trainer with it."""
    while _locked:
        os.close(_locked.pop())


if _fcntl is not None:
    os.register_at_fork(after_in_child=_close_inherited)


@contextmanager
def only_trainer(folder: Path) -> Iterator[None]:
    """A lock of `folder`, created if missing, for as long as the context lasts.

    The system holds it for the process and drops it when the process ends, however that happens; its empty file
    `.diffusers-adjoint.lock` stays, and means nothing by itself. Windows has no such lock: there nothing is locked.

    Raises:
        ValueError: if another process, or another trainer of this one, holds it.
    """
    descriptor = _lock(folder)
    try:
        yield
    finally:
        if descriptor is not None:
            _locked.discard(descriptor)
            os.close(descriptor)


def _lock(folder: Path) -> int | None:
    """The open and locked file; `None`, with a warning, where the file system cannot lock."""
    if _fcntl is None:
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        _warn(folder, error)
        return None
    try:
        _fcntl.flock(descriptor, _fcntl.LOCK_EX | _fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ValueError(
            f"output_dir={str(folder)!r} is in use by another trainer; pass another output_dir, or wait until that one has ended."
        ) from None
    except OSError as error:
        os.close(descriptor)
        _warn(folder, error)
        return None
    _locked.add(descriptor)
    return descriptor


def _warn(folder: Path, error: OSError) -> None:
    logger.warning(f"output_dir={str(folder)!r} cannot be locked ({error.strerror}): a second trainer there would go unnoticed.")
