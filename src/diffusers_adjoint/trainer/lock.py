"""A lock that lets one trainer at a time use an output folder. A killed trainer leaves no lock behind."""

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
    """Close inherited lock files in a forked worker: the lock lasts until every process has closed the file."""
    while _locked:
        os.close(_locked.pop())


if _fcntl is not None:
    os.register_at_fork(after_in_child=_close_inherited)


@contextmanager
def only_trainer(folder: Path) -> Iterator[None]:
    """Lock `folder`, which is created if missing, while the context lasts.

    The operating system releases the lock when the process ends, even if it is killed. The empty file `.diffusers-adjoint.lock`
    stays, and does not mean that the folder is locked. Windows has no such lock, so nothing is locked there.

    Raises:
        ValueError: if another process, or another trainer in this process, holds the lock.
    """
    descriptor = _lock(folder)
    try:
        yield
    finally:
        if descriptor is not None:
            _locked.discard(descriptor)
            os.close(descriptor)


def _lock(folder: Path) -> int | None:
    """Descriptor of the locked file; `None`, with a warning, if the file system cannot lock."""
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
    logger.warning(f"output_dir={str(folder)!r} cannot be locked ({error.strerror}); start no second trainer there.")
