"""Whether training gets anywhere: the update under way, the updates that were made, and those that were dropped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerState
from transformers.trainer_utils import has_length

from ..config import AdjointMatchingConfig

__all__ = ["AfterOptimizerStep", "UpdateCount", "Updates", "require_asked_for", "require_finite_weights"]

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


class Updates:
    """The updates of one call of `train`: the one under way, and what became of those before it.

    Args:
        accelerator: sums over processes. Where it has a gradient scaler, in float16, that one looks itself whether gradients are
            finite, and skips the optimizer's step where they are not.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.count = UpdateCount()
        self.gradients_checked = False  # whether weights without a gradient were looked for, as after the first backward passes
        self._accelerator = accelerator
        self._kept = torch.zeros((), device=accelerator.device)  # images of the update under way, on this process, that train
        self._dropped = False  # the update under way, or its last iteration
        self._moved = False  # whether an iteration before has moved the weights
        self._scale = 1.0  # of the gradient scaler, before the optimizer's step

    def keep(self, keep: Tensor) -> None:
        """Count the images that train; `keep` has shape (B,), bool."""
        self._kept += keep.sum()

    def can_step(self, model: nn.Module) -> bool:
        """Whether an image trains, on any process, and the weights survive the gradients; to be asked on all processes."""
        scaler = self._accelerator.scaler
        if scaler is not None:
            self._scale = scaler.get_scale()
        if self._accelerator.reduce(self._kept, reduction="sum") == 0:
            return False
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        return scaler is not None or _finite_norm(gradients, 2.0)  # an optimizer squares them

    def go_on(self, moved: bool) -> None:
        """After an iteration that is not the update's last, which has moved the weights or not: the next one counts anew."""
        self._moved |= moved
        self._kept = torch.zeros_like(self._kept)

    def drop(self, model: nn.Module) -> None:
        """Make the coming step of the optimizer do nothing."""
        self._dropped = True
        if self._accelerator.scaler is None:
            model.zero_grad()
        else:  # it insists on gradients, and skips the step itself when one overflows
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(torch.inf)

    def end(self) -> Tensor:
        """After the optimizer's step: count the update, and begin the next one.

        Returns:
            Images of this process that were kept for nothing, because the optimizer has not moved in any iteration,
            0-dimensional.

        Raises:
            ValueError: if it is the last of too many dropped ones without one that was made.
        """
        dropped, kept = not self._moved and (self._dropped or self._step_was_skipped()), self._kept
        self._kept, self._dropped, self._moved = torch.zeros_like(kept), False, False
        self.count.add(dropped)
        return kept if dropped else torch.zeros_like(kept)

    def _step_was_skipped(self) -> bool:
        """Whether the optimizer has not moved, because a gradient overflowed in mixed precision."""
        if self._accelerator.scaler is None:
            return bool(self._accelerator.optimizer_step_was_skipped)
        # accelerate does not notice where a fused optimizer skips its step itself; the scale falls in any case.
        return bool(self._accelerator.scaler.get_scale() < self._scale)


def _finite_norm(tensors: list[Tensor], order: float) -> bool:
    """The same on every process, of tensors that are equal there or divided among them."""
    norm = nn.utils.get_total_norm(tensors, norm_type=order)
    return bool((norm.full_tensor() if isinstance(norm, DTensor) else norm).isfinite())


def require_finite_weights(network: nn.Module, update: int) -> None:
    """Raise ValueError, on every process, if a trained weight is NaN or infinite after this update."""
    if not _finite_norm([p.detach() for p in network.parameters() if p.requires_grad], torch.inf):
        raise ValueError(
            f"weights are NaN or infinite after update {update} and are not saved; lower learning_rate, and "
            f"start again or from a checkpoint, where they are finite."
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
