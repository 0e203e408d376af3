"""Send images to the trackers of `report_to`; a tracker that fails causes a warning."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image
from transformers import TrainerCallback
from transformers.integrations import INTEGRATION_TO_CALLBACK, TensorBoardCallback, TrackioCallback, WandbCallback
from transformers.utils import logging

__all__ = ["spare_training", "to_trackers", "warn_if_lost"]

logger = logging.get_logger(__name__)


def to_trackers(callbacks: Sequence[TrainerCallback], grid: Image.Image, name: str, step: int) -> None:
    """Send a grid to the trackers among the callbacks; if one fails, warn and continue with the others."""
    for callback in callbacks:
        with warn_if_lost(f"{name} could not be written to {type(callback).__name__}"):
            _to_tracker(callback, grid, name, step)


def _to_tracker(callback: TrainerCallback, grid: Image.Image, name: str, step: int) -> None:
    # Uses the modules of wandb and trackio that the host has imported and started.
    if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
        callback.tb_writer.add_image(name, np.asarray(grid), step, dataformats="HWC")
    elif isinstance(callback, WandbCallback):
        _log_image(callback._wandb, name, grid, step)
    elif isinstance(callback, TrackioCallback):
        _log_image(callback._trackio, name, grid, step)


def _log_image(tracker: Any, name: str, grid: Image.Image, step: int) -> None:
    tracker.log({name: tracker.Image(grid), "train/global_step": step})


def spare_training(callbacks: Sequence[TrainerCallback]) -> None:
    """Make errors of trackers while they log a warning. A tracker that cannot start is still an error, before training."""
    for callback in callbacks:
        if isinstance(callback, tuple(INTEGRATION_TO_CALLBACK.values())):
            for event in ("on_log", "on_evaluate", "on_save", "on_train_end"):
                if event not in vars(callback):
                    setattr(callback, event, _warning(getattr(callback, event), f"{type(callback).__name__}.{event} has failed"))


def _warning(method: Callable[..., Any], what: str) -> Callable[..., Any]:
    def inner(*args: Any, **kwargs: Any) -> Any:
        with warn_if_lost(what):
            return method(*args, **kwargs)

    return inner


@contextmanager
def warn_if_lost(what: str) -> Iterator[None]:
    """Turn any error in this context into a warning that begins with `what`, so that training does not end for an image."""
    try:
        yield
    except Exception as error:  # trackers raise many kinds of network and disk errors
        logger.warning(f"{what} ({type(error).__name__}: {error}).")
