"""`dry_run`: everything is checked, one update is made, and nothing is left behind."""

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
    """A copy that asks for no repository, tracker, picture, or checkpoint when interrupted, nor for an evaluation first."""
    args = copy.copy(args)
    args.push_to_hub, args.report_to, args.num_images_to_log = False, [], 0
    args.save_on_interrupt = args.eval_on_start = False
    return args


@contextlib.contextmanager
def folder_unchanged(folder: Path) -> Iterator[None]:
    """Take the folder away again, and those that it lies in, if they were not there before."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    finally:
        for path in new:
            with contextlib.suppress(OSError):  # another process has done it, or has put something there
                path.rmdir()


class StopAfterOneUpdate(TrainerCallback):
    """Ends training after its first update, which is logged, not evaluated and not saved."""

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        control.should_training_stop = control.should_log = True
        control.should_evaluate = control.should_save = False

    def on_epoch_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        control.should_evaluate = control.should_save = False
