"""Checkpoint folders that are complete or absent, even if the process is killed while it writes."""

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
    """Write a folder under a temporary name, and rename it to `folder` once every file in it is on the disk.

    Args:
        folder: the final path; an existing folder is replaced.
        writes: whether this process creates and renames the folder. The other processes may write files into it.
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
    """Write files into a temporary folder, then move them into `folder` one by one, so that no file there is ever partial."""
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
    """An empty folder beside `folder`: flushed to the disk when the context ends, deleted when it ends with an error."""
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
        if writes:  # if the disk was full, the next attempt needs the space
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _flush(path: Path) -> None:
    """Flush a file or folder from the system's cache to the disk."""
    # No test covers this: only a power failure loses what is in the system's cache. The tests can kill a process, and that loses
    # nothing, flushed or not.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    """Delete a folder or a link (not the link's target), if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _discard(folder: Path) -> None:
    """Rename the folder, then delete it: a deletion that is interrupted must not leave half a checkpoint under its name."""
    doomed = folder.with_name(f"_{folder.name}.deleted")
    _remove(doomed)
    folder.rename(doomed)
    _remove(doomed)


def discard_leftovers(run_dir: Path) -> None:
    """Delete folders that killed processes left half written or half deleted, and restore one that was being replaced.

    Only names that this module gives are touched: a user may have renamed a checkpoint so that it begins with "_", too.
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
    """N for a folder `checkpoint-N`, −1 for any other."""
    prefix, _, step = folder.name.rpartition("-")
    return int(step) if prefix == PREFIX_CHECKPOINT_DIR and step.isdecimal() else -1


def _checkpoints(run_dir: Path) -> list[Path]:
    """All checkpoints in `run_dir`, of any run, oldest first. A dangling link is not one."""
    found = [path for path in run_dir.glob("*") if _step_of(path) >= 0 and path.is_dir()]
    return sorted(found, key=lambda folder: (_written(folder), _step_of(folder)))


def _written(folder: Path) -> float:
    """Time of writing in seconds since 1970: from the run record, which survives copying, else the folder's own date."""
    record = _readable_record(folder)
    return record.written if record else folder.stat().st_mtime


def last_written(run_dir: Path) -> float:
    """When the newest checkpoint was written, in seconds since 1970; 0 if there is none."""
    return max(map(_written, _checkpoints(run_dir)), default=0.0)


def _readable_record(folder: Path) -> RunRecord | None:
    """The run record of a checkpoint; `None` if it is missing or damaged."""
    try:
        return RunRecord.read(folder)
    except ValueError:
        return None


def rotate(run_dir: Path, limit: int | None, newest: Path, best: str | None) -> None:
    """Delete the oldest checkpoints until `limit` are left; the newest and the best one are never deleted.

    Args:
        limit: `save_total_limit`; `None` or a number below 1 deletes nothing.
        newest: the checkpoint just written. Its number may be lower than that of one from an earlier run.
        best: path of the best checkpoint, if there is one.
    """
    if not limit or limit < 0:
        return
    protected = {newest.resolve()} | ({Path(best).resolve()} if best else set())
    checkpoints = _checkpoints(run_dir)
    others = [folder for folder in checkpoints if folder.resolve() not in protected]
    for folder in others[: max(len(checkpoints) - max(limit, len(protected)), 0)]:
        _discard(folder)


def checkpoint_to_resume(asked: str | Path | bool | None, run_dir: Path, needed: Sequence[str]) -> str | None:
    """The checkpoint folder to resume from, `None` for a new run.

    Args:
        asked: `resume_from_checkpoint`: a folder; `True` for the newest complete checkpoint in `run_dir`; `None` or `False` for a
            new run.
        run_dir: where this trainer's checkpoints are.
        needed: files and folders that a checkpoint must contain.

    Raises:
        TypeError: if `asked` is of another type.
        ValueError: if there is no such checkpoint, a file is missing in it, or a file is damaged.
    """
    if asked is None or asked is False:
        if found := _checkpoints(run_dir):
            logger.warning(
                f"output_dir={str(run_dir)!r} holds {_names(found)} of an earlier run, which this new run may overwrite or "
                f"delete; pass resume_from_checkpoint=True to resume from there, or another output_dir."
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
            logger.warning(f"{folder} {fault}; it is skipped.")
            passed.append(folder)
            continue
        known = {other: record.run for other in checkpoints if (record := _readable_record(other))}
        others = [other for other in known if known[other] != known.get(folder) and other not in passed]
        if others:
            logger.warning(f"{_names(others)} in {run_dir} are of other runs than {folder.name} and are skipped.")
        return folder
    found = "no complete checkpoint" if passed else "no checkpoint"
    raise ValueError(f"output_dir={str(run_dir)!r} holds {found}; pass resume_from_checkpoint=None to start a new run.")


def newest_of(run_dir: Path, run: str) -> Path | None:
    """The newest checkpoint of this run; `None` if it has written none."""
    return next((folder for folder in reversed(_checkpoints(run_dir)) if is_of(folder, run)), None)


def is_of(folder: Path, run: str) -> bool:
    """Whether `folder` is a checkpoint of this run."""
    record = _readable_record(folder)
    return record is not None and record.run == run


def _names(folders: Sequence[Path]) -> str:
    return ", ".join(folder.name for folder in folders)


def _fault(folder: Path, needed: Sequence[str]) -> str | None:
    """Why a checkpoint cannot be used, such as "holds no optimizer.pt", or `None`. Warns if the files cannot be verified."""
    if missing := next((name for name in needed if not (folder / name).exists()), None):
        return f"holds no {missing}"
    try:
        record = RunRecord.read(folder)
    except ValueError:
        return f"is damaged: its {RECORD_NAME} has changed since it was written"
    if record is None:
        logger.warning(f"{folder} holds no {RECORD_NAME}: whether its files are complete and fit this run is not checked.")
    elif name := record.damaged(folder):
        return f"is damaged: its {name} is missing or has changed since it was written"
    return None


def require_whole(folder: Path, weights: str) -> None:
    """Raise ValueError if the best checkpoint's `weights`, a file or a folder, have changed since they were written."""
    record = RunRecord.read(folder)
    if name := record.damaged(folder, only=weights) if record else None:
        raise ValueError(
            f"the best checkpoint {folder} is damaged: its {name} is missing or has changed since it was written; pass "
            f"load_best_model_at_end=False and resume_from_checkpoint=True to get the last weights instead."
        )
