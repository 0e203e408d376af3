"""Bookkeeping of updates: the current one, those that were made, and those that were dropped because nothing was finite."""

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

# More than the 16 updates in which a float16 gradient scaler halves its first scale, 2¹⁶, to 1. If a reward is missing for every
# second image, and an update has one image, so many updates in a row are dropped once in a million updates.
MOST_DROPPED = 20


@dataclass
class UpdateCount:
    """Numbers of updates in one call of `train`: made, dropped, and dropped without one made since."""

    made: int = 0
    dropped: int = 0
    dropped_in_a_row: int = 0

    def add(self, dropped: bool) -> None:
        """Count an update.

        Raises:
            ValueError: if it is the 20th dropped update in a row.
        """
        self.made += not dropped
        self.dropped += dropped
        self.dropped_in_a_row = self.dropped_in_a_row + 1 if dropped else 0
        if self.dropped_in_a_row >= MOST_DROPPED:
            raise ValueError(f"{MOST_DROPPED} updates in a row were dropped: {_WHY_DROPPED}")

    def require_one(self, state: TrainerState, images: int) -> None:
        """Raise ValueError if training has ended without an update, unless the run was already complete.

        Args:
            state: the trainer's state at the end.
            images: images of one update.
        """
        if self.made:
            return
        if self.dropped:
            raise ValueError(f"no update was made, because all {self.dropped} were dropped: {_WHY_DROPPED}")
        if state.global_step < state.max_steps:
            raise ValueError(
                f"no update was made, because the train_dataset has too few rows for the {images} images of one; add rows, or "
                f"lower per_device_train_batch_size or gradient_accumulation_steps."
            )


class Updates:
    """The current update of a call of `train`, and the counts of those before it.

    Args:
        accelerator: sums over processes. In float16 it has a gradient scaler, which checks gradients itself and skips the
            optimizer step if they are not finite.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.count = UpdateCount()
        self.gradients_checked = False  # whether the check for weights without a gradient has run
        self._accelerator = accelerator
        self._kept = torch.zeros((), device=accelerator.device)  # images of the current update on this process that count
        self._dropped = False  # whether the current update, or its last iteration, is dropped
        self._moved = False  # whether an earlier iteration of this update has changed the weights
        self._scale = 1.0  # the gradient scaler's scale before the optimizer step

    def keep(self, keep: Tensor) -> None:
        """Add the images of a micro-batch that count; `keep` is (B,) bool."""
        self._kept += keep.sum()

    def can_step(self, model: nn.Module) -> bool:
        """Whether an image counts on any process and the gradient norm is finite. All processes must call this."""
        scaler = self._accelerator.scaler
        if scaler is not None:
            self._scale = scaler.get_scale()
        if self._accelerator.reduce(self._kept, reduction="sum") == 0:
            return False
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        return scaler is not None or _finite_norm(gradients, 2.0)  # squared, because an optimizer squares gradients too

    def go_on(self, moved: bool) -> None:
        """Begin the next iteration of the update; `moved` says whether the one before has changed the weights."""
        self._moved |= moved
        self._kept = torch.zeros_like(self._kept)

    def drop(self, model: nn.Module) -> None:
        """Make the host's next optimizer step do nothing."""
        self._dropped = True
        if self._accelerator.scaler is None:
            model.zero_grad()
        else:  # a gradient scaler fails without gradients, and skips the step itself if one is infinite
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(torch.inf)

    def end(self) -> Tensor:
        """After the optimizer step: count the update, and begin the next one.

        Returns:
            Number of this process's images that counted but had no effect, because no optimizer step was made; 0-dimensional.

        Raises:
            ValueError: if it is the 20th dropped update in a row.
        """
        dropped, kept = not self._moved and (self._dropped or self._step_was_skipped()), self._kept
        self._kept, self._dropped, self._moved = torch.zeros_like(kept), False, False
        self.count.add(dropped)
        return kept if dropped else torch.zeros_like(kept)

    def _step_was_skipped(self) -> bool:
        """Whether the gradient scaler has skipped the optimizer step because a gradient overflowed."""
        if self._accelerator.scaler is None:
            return bool(self._accelerator.optimizer_step_was_skipped)
        # A fused optimizer skips its step itself, which accelerate does not report. The scale falls in either case.
        return bool(self._accelerator.scaler.get_scale() < self._scale)


def _finite_norm(tensors: list[Tensor], order: float) -> bool:
    """Whether the norm of the tensors is finite: the same answer on every process, also for tensors divided among them."""
    norm = nn.utils.get_total_norm(tensors, norm_type=order)
    return bool((norm.full_tensor() if isinstance(norm, DTensor) else norm).isfinite())


def require_finite_weights(network: nn.Module, update: int) -> None:
    """Raise ValueError, on every process, if a trained weight is NaN or infinite after this update."""
    if not _finite_norm([p.detach() for p in network.parameters() if p.requires_grad], torch.inf):
        raise ValueError(
            f"weights are NaN or infinite after update {update} and are not saved; lower learning_rate, and "
            f"start again, or resume from a checkpoint, where they are finite."
        )


def require_asked_for(args: AdjointMatchingConfig, train_dataset: Any) -> None:
    """Raise ValueError if the settings ask for no update (the host would make one), or no batch of the dataset is full."""
    if args.max_steps == 0 or (args.max_steps < 0 and args.num_train_epochs <= 0):
        asked = "max_steps=0" if args.max_steps == 0 else f"num_train_epochs={args.num_train_epochs}"
        raise ValueError(f"{asked} makes no update; pass a positive number.")
    batch = args.per_device_train_batch_size * args.world_size
    if args.dataloader_drop_last and has_length(train_dataset) and len(train_dataset) < batch:
        raise ValueError(
            f"the train_dataset has {len(train_dataset)} rows, fewer than the {batch} of a batch, and dataloader_drop_last=True "
            f"would drop them all; add rows, lower per_device_train_batch_size, or pass False."
        )


_WHY_DROPPED = (
    "no image had a finite reward, reward gradient, adjoint and loss, or the gradient of the weights was not finite; fix the "
    "reward function, or lower reward_scale or learning_rate."
)


class AfterOptimizerStep(TrainerCallback):
    """Calls a function after each optimizer step, before anything is logged, evaluated or saved."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._function()
