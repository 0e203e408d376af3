"""`dry_run`: make all checks and one update, and write no file."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl

from ..config import AdjointMatchingConfig

__all__ = ["StopAfterOneUpdate", "folder_unchanged", "without_files"]


def without_files(args: AdjointMatchingConfig) -> AdjointMatchingConfig:
    """A copy of `args` with uploads, trackers, sample grids, checkpoints on interruption and `eval_on_start` switched off."""
    args = copy.copy(args)
    args.push_to_hub, args.report_to, args.num_images_to_log = False, [], 0
    args.save_on_interrupt = args.eval_on_start = False
    return args


@contextlib.contextmanager
def folder_unchanged(folder: Path) -> Iterator[None]:
    """Remove `folder` and its parents afterwards if they did not exist before."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    finally:
        for path in new:
            with contextlib.suppress(OSError):  # another process has removed it, or has written into it
                path.rmdir()


class StopAfterOneUpdate(TrainerCallback):
    """End training after the first update: log it, but do not evaluate and do not save."""

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        control.should_training_stop = control.should_log = True
        control.should_evaluate = control.should_save = False

    def on_epoch_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        control.should_evaluate = control.should_save = False
