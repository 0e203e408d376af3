"""Whether training gets anywhere: the updates that were made, and those that were dropped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback, TrainerState
from transformers.trainer_utils import has_length

from ..config import AdjointMatchingConfig

__all__ = ["AfterOptimizerStep", "UpdateCount", "require_asked_for"]

# As many as a gradient scaler of float16 needs from its first scale, 2¹⁶, down to 1, and some more. A reward that is missing for
# every second image leaves so many single images out in a row once in a million updates.
MOST_DROPPED = 20


@dataclass
class UpdateCount:
    """The updates of one call of `train`."""

    made: int = 0
    dropped: int = 0
    dropped_in_a_row: int = 0

    def add(self, dropped: bool) -> None:
        """Count an update.

        Raises:
            ValueError: if it is the last of too many dropped ones without one that was made.
        """
        self.made += not dropped
        self.dropped += dropped
        self.dropped_in_a_row = self.dropped_in_a_row + 1 if dropped else 0
        if self.dropped_in_a_row >= MOST_DROPPED:
            raise ValueError(f"{MOST_DROPPED} updates in a row were dropped: {_WHY_DROPPED}")

    def require_one(self, state: TrainerState, images: int) -> None:
        """Raise ValueError if training is over and has changed nothing, unless it had been finished before.

        Args:
            state: the host's, at the end.
            images: of an update.
        """
        if self.made:
            return
        if self.dropped:
            raise ValueError(f"no update was made, because all {self.dropped} were dropped: {_WHY_DROPPED}")
        if state.global_step < state.max_steps:
            raise ValueError(
                f"no update was made, because the train_dataset never gave the {images} images of one; add rows, or lower "
                f"per_device_train_batch_size or gradient_accumulation_steps."
            )


def require_asked_for(args: AdjointMatchingConfig, train_dataset: Any) -> None:
    """Raise ValueError if no update is asked for, of which the host would make one, or if no batch of the dataset is whole."""
    if args.max_steps == 0 or (args.max_steps < 0 and args.num_train_epochs <= 0):
        asked = "max_steps=0" if args.max_steps == 0 else f"num_train_epochs={args.num_train_epochs}"
        raise ValueError(f"{asked} asks for no update; pass a positive number.")
    batch = args.per_device_train_batch_size * args.world_size
    if args.dataloader_drop_last and has_length(train_dataset) and len(train_dataset) < batch:
        raise ValueError(
            f"the train_dataset has {len(train_dataset)} rows, fewer than the {batch} of a batch, and dataloader_drop_last=True "
            f"would drop them all; add rows, lower per_device_train_batch_size, or pass False."
        )


_WHY_DROPPED = (
    "no image had a finite reward, reward gradient, adjoint and loss, or the gradient of the weights was not finite; mend the "
    "reward function, or lower reward_scale or learning_rate."
)


class AfterOptimizerStep(TrainerCallback):
    """Calls a function when the optimizer has moved, before anything is logged, evaluated or saved."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._function()
