"""Checkpoint folders that are whole or absent, whenever the process is killed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

__all__ = ["checkpoint_to_resume", "discard_leftovers", "rotate", "whole_files", "whole_folder"]

logger = logging.get_logger(__name__)


@contextmanager
def whole_folder(folder: Path, writes: bool, barrier: Callable[[], None]) -> Iterator[Path]:
    """A folder under another name, which gets its own when everything in it is on the disk.

    Args:
        folder: the name it gets; one that exists already is replaced.
        writes: whether this process makes and renames the folder; the others may write into it.
        barrier: waits for all processes.
    """
    with _partial_folder(folder, writes, barrier) as partial:
        yield partial
    if writes:
        replaced = folder.with_name(f"_{folder.name}.replaced")
        if folder.exists():
            folder.rename(replaced)
        partial.rename(folder)
        _flush(folder.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    barrier()


@contextmanager
def whole_files(folder: Path, writes: bool, barrier: Callable[[], None]) -> Iterator[Path]:
    """A folder whose files are moved into `folder` one by one, each whole, replacing those of the same name."""
    with _partial_folder(folder / "model", writes, barrier) as partial:
        yield partial
    if writes:
        for source in sorted(partial.rglob("*")):
            target = folder / source.relative_to(partial)
            if source.is_dir():
                target.mkdir(exist_ok=True)
            else:
                source.replace(target)
        shutil.rmtree(partial)
    barrier()


@contextmanager
def _partial_folder(folder: Path, writes: bool, barrier: Callable[[], None]) -> Iterator[Path]:
    """An empty folder beside `folder`; on the disk when the context is left without an error."""
    partial = folder.with_name(f"_{folder.name}.partial")  # names that start with "_" are not uploaded
    if writes:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    barrier()
    yield partial
    barrier()
    if writes:
        for path in [*partial.rglob("*"), partial]:
            _flush(path)


def _flush(path: Path) -> None:
    """Ask for the content to be on the disk, not only in its cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _discard(folder: Path) -> None:
    """Delete, under a name that nobody takes for a checkpoint: a deletion may be interrupted, too."""
    doomed = folder.with_name(f"_{folder.name}.deleted")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def discard_leftovers(run_dir: Path) -> None:
    """Delete what killed processes left half written or half deleted; put back what was being replaced."""
    for replaced in run_dir.glob(f"_{PREFIX_CHECKPOINT_DIR}-*.replaced"):
        if not (folder := run_dir / replaced.stem.removeprefix("_")).exists():
            replaced.rename(folder)
    for folder in [*run_dir.glob(f"_{PREFIX_CHECKPOINT_DIR}-*"), *run_dir.glob("_model.partial")]:
        shutil.rmtree(folder)


def _step_of(folder: Path) -> int:
    """N of a folder `checkpoint-N`, −1 of any other."""
    prefix, _, step = folder.name.rpartition("-")
    return int(step) if prefix == PREFIX_CHECKPOINT_DIR and step.isdigit() else -1


def _checkpoints(run_dir: Path) -> list[Path]:
    """Oldest first."""
    return sorted((path for path in run_dir.glob("*") if _step_of(path) >= 0), key=_step_of)


def rotate(run_dir: Path, limit: int | None, newest: Path, best: str | None) -> None:
    """Keep the last `limit` checkpoints to be written, and the best one among or besides them.

    Args:
        newest: the one just written, whatever lies there from an earlier run.
    """
    if not limit or limit < 0:
        return
    protected = {newest.resolve()} | ({Path(best).resolve()} if best else set())
    checkpoints = sorted(_checkpoints(run_dir), key=lambda folder: folder.stat().st_mtime)
    others = [folder for folder in checkpoints if folder.resolve() not in protected]
    for folder in others[: max(len(checkpoints) - max(limit, len(protected)), 0)]:
        _discard(folder)


def checkpoint_to_resume(asked: str | Path | bool | None, run_dir: Path, needed: Sequence[str]) -> str | None:
    """The folder to go on from; `True` takes the newest whole one in `run_dir`.

    Args:
        asked: a folder, `True`, or `None`/`False` for a new start.
        run_dir: where this trainer's checkpoints are.
        needed: files and folders that a checkpoint must hold.

    Raises:
        ValueError: if there is none, or it lacks a file.
    """
    if asked is None or asked is False:
        return None
    if asked is not True:
        if missing := _missing(Path(asked), needed):
            raise ValueError(f"{asked} holds no {missing}; pass a checkpoint folder that a trainer with these settings wrote.")
        return str(asked)
    for folder in reversed(_checkpoints(run_dir)):
        if not (missing := _missing(folder, needed)):
            return str(folder)
        logger.warning(f"{folder} holds no {missing} and is passed over.")
    raise ValueError(f"output_dir={str(run_dir)!r} holds no checkpoint; pass resume_from_checkpoint=None to start anew.")


def _missing(folder: Path, needed: Sequence[str]) -> str | None:
    return next((name for name in needed if not (folder / name).exists()), None)
