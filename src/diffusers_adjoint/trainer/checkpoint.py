"""Checkpoint folders that are whole or absent, whenever the process is killed."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from .run_record import RECORD_NAME, RunRecord

__all__ = ["checkpoint_to_resume", "discard_leftovers", "is_of", "last_written", "newest_of", "require_whole", "rotate"]
__all__ += ["whole_files", "whole_folder"]

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
        if os.path.lexists(folder):
            folder.rename(replaced)
        partial.rename(folder)
        _flush(folder.parent)
        _remove(replaced)
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
    """An empty folder beside `folder`; on the disk when the context is left without an error, and gone with one."""
    partial = folder.with_name(f"_{folder.name}.partial")  # names that start with "_" are not uploaded
    if writes:
        _remove(partial)
        partial.mkdir(parents=True)
    barrier()
    try:
        yield partial
        barrier()
        if writes:
            for path in [*partial.rglob("*"), partial]:
                _flush(path)
    except BaseException:
        if writes:  # a full disk needs the room for the next attempt
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _flush(path: Path) -> None:
    """Ask for the content to be on the disk, not only in its cache."""
    # No test holds this line: what was written is in the system's cache and seen by every process, flushed or not, until the
    # machine itself loses power. A killed process, which the tests can make, loses nothing either way.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    """Delete a folder, or a link but not what it leads to; nothing where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _discard(folder: Path) -> None:
    """Delete, under a name that nobody takes for a checkpoint: a deletion may be interrupted, too."""
    doomed = folder.with_name(f"_{folder.name}.deleted")
    _remove(doomed)
    folder.rename(doomed)
    _remove(doomed)


def discard_leftovers(run_dir: Path) -> None:
    """Delete what killed processes left half written or half deleted; put back what was being replaced.

    Only names that this module gives: a checkpoint that somebody renamed to keep it may begin with "_", too.
    """
    for replaced in _unfinished(run_dir, "replaced"):
        if not os.path.lexists(folder := run_dir / replaced.stem.removeprefix("_")):
            replaced.rename(folder)
    for path in [*_unfinished(run_dir, "(partial|deleted|replaced)"), run_dir / "_model.partial"]:
        _remove(path)


def _unfinished(run_dir: Path, ending: str) -> list[Path]:
    name = re.compile(rf"_{PREFIX_CHECKPOINT_DIR}-\d+\.{ending}")
    return [path for path in run_dir.glob("_*") if name.fullmatch(path.name)]


def _step_of(folder: Path) -> int:
    """N of a folder `checkpoint-N`, −1 of any other."""
    prefix, _, step = folder.name.rpartition("-")
    return int(step) if prefix == PREFIX_CHECKPOINT_DIR and step.isdecimal() else -1


def _checkpoints(run_dir: Path) -> list[Path]:
    """In the order of writing, whatever runs they are of; a link that leads nowhere is none."""
    found = [path for path in run_dir.glob("*") if _step_of(path) >= 0 and path.is_dir()]
    return sorted(found, key=lambda folder: (_written(folder), _step_of(folder)))


def _written(folder: Path) -> float:
    """When, in seconds since 1970: as its record says, which a copy of the folder does not change; else its own date."""
    record = _readable_record(folder)
    return record.written if record else folder.stat().st_mtime


def last_written(run_dir: Path) -> float:
    """When the newest checkpoint was written; 0 where there is none."""
    return max(map(_written, _checkpoints(run_dir)), default=0.0)


def _readable_record(folder: Path) -> RunRecord | None:
    """`None` also if it is damaged."""
    try:
        return RunRecord.read(folder)
    except ValueError:
        return None


def rotate(run_dir: Path, limit: int | None, newest: Path, best: str | None) -> None:
    """Keep the last `limit` checkpoints to be written, and the best one among or besides them.

    Args:
        newest: the one just written, whatever lies there from an earlier run.
    """
    if not limit or limit < 0:
        return
    protected = {newest.resolve()} | ({Path(best).resolve()} if best else set())
    checkpoints = _checkpoints(run_dir)
    others = [folder for folder in checkpoints if folder.resolve() not in protected]
    for folder in others[: max(len(checkpoints) - max(limit, len(protected)), 0)]:
        _discard(folder)


def checkpoint_to_resume(asked: str | Path | bool | None, run_dir: Path, needed: Sequence[str]) -> str | None:
    """The folder to go on from; `True` takes the last whole one to be written in `run_dir`, and with it the run.

    Args:
        asked: a folder, `True`, or `None`/`False` for a new start.
        run_dir: where this trainer's checkpoints are.
        needed: files and folders that a checkpoint must hold.

    Raises:
        TypeError: if `asked` is none of these.
        ValueError: if there is none, or it lacks a file, or one is not what was written.
    """
    if asked is None or asked is False:
        if found := _checkpoints(run_dir):
            logger.warning(
                f"output_dir={str(run_dir)!r} holds {_names(found)} of an earlier run, which this new one may overwrite or "
                f"delete; pass resume_from_checkpoint=True to go on from there, or another output_dir."
            )
        return None
    if asked is True:
        return str(_newest_whole(run_dir, needed))
    if not isinstance(asked, str | Path):
        raise TypeError(f"resume_from_checkpoint={asked!r} is of type {type(asked).__name__}; pass a folder, True or None.")
    if not str(asked):
        raise ValueError("resume_from_checkpoint='' names no folder; pass a checkpoint folder, True or None.")
    if fault := _fault(Path(asked), needed):
        raise ValueError(f"{asked} {fault}; pass a checkpoint folder that a trainer with these settings wrote.")
    return str(asked)


def _newest_whole(run_dir: Path, needed: Sequence[str]) -> Path:
    passed: list[Path] = []
    for folder in reversed(checkpoints := _checkpoints(run_dir)):
        if fault := _fault(folder, needed):
            logger.warning(f"{folder} {fault}; it is passed over.")
            passed.append(folder)
            continue
        known = {other: record.run for other in checkpoints if (record := _readable_record(other))}
        others = [other for other in known if known[other] != known.get(folder) and other not in passed]
        if others:
            logger.warning(f"{_names(others)} in {run_dir} are of other runs than {folder.name} and are passed over.")
        return folder
    found = "no whole checkpoint" if passed else "no checkpoint"
    raise ValueError(f"output_dir={str(run_dir)!r} holds {found}; pass resume_from_checkpoint=None to start anew.")


def newest_of(run_dir: Path, run: str) -> Path | None:
    """The last checkpoint that this run has written."""
    return next((folder for folder in reversed(_checkpoints(run_dir)) if is_of(folder, run)), None)


def is_of(folder: Path, run: str) -> bool:
    """Whether this is a checkpoint that the run has written."""
    record = _readable_record(folder)
    return record is not None and record.run == run


def _names(folders: Sequence[Path]) -> str:
    return ", ".join(folder.name for folder in folders)


def _fault(folder: Path, needed: Sequence[str]) -> str | None:
    """Why a checkpoint cannot be used, as "holds no optimizer.pt"; with a warning where that cannot be told for all files."""
    if missing := next((name for name in needed if not (folder / name).exists()), None):
        return f"holds no {missing}"
    try:
        record = RunRecord.read(folder)
    except ValueError:
        return f"is damaged, its {RECORD_NAME} is not what was written"
    if record is None:
        logger.warning(f"{folder} holds no {RECORD_NAME}: whether its files are whole and fit this run is not checked.")
    elif name := record.damaged(folder):
        return f"is damaged, its {name} is not what was written"
    return None


def require_whole(folder: Path, weights: str) -> None:
    """Raise ValueError unless the best checkpoint's `weights`, a file or a folder, are what was written."""
    record = RunRecord.read(folder)
    if name := record.damaged(folder, only=weights) if record else None:
        raise ValueError(
            f"the best checkpoint {folder} is damaged, its {name} is not what was written; pass load_best_model_at_end=False "
            f"and resume_from_checkpoint=True for the last weights."
        )
