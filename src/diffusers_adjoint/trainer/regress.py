"""The regression that all objectives share: it moves the model's step means towards the target shifts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.matching import bounded, clip_loss, half_square, regression_loss, step_kl
from ..core.trajectory import MeanFunction
from ..objectives import Targets

__all__ = ["Fit", "bounded_paths", "regress", "zero_unless"]


@dataclass(frozen=True)
class Fit:
    """Result of a regression; all tensors are detached.

    Args:
        loss: this micro-batch's share of the update's loss, 0-dimensional.
        kl: path KL of each sample, (B,), nats: the objective's own, or an estimate from the steps that carry the loss, which is
            unbiased if the scales are the steps' standard deviations.
        keep: the samples that count in the loss, (B,) bool.
        step_kls: step → its part of each sample's path KL, (B,), nats; empty if `kl` is the objective's own.
    """

    loss: Tensor
    kl: Tensor
    keep: Tensor
    step_kls: dict[int, Tensor]


def regress(
    mean: MeanFunction,
    targets: Targets,
    keep: Tensor,
    *,
    share: float,
    loss_clip: float | None,
    require: Callable[[Tensor], Tensor],
    backward: Callable[[Tensor], None],
    synchronised: Callable[[bool], AbstractContextManager[None]],
) -> Fit:
    """Backward through the loss ½‖((μ^θ − μ^base) − δ)/scale‖² of each point, with one forward and one backward pass for each.

    Args:
        mean: (k, x) → μ_k^θ(x), with gradient to the trained parameters.
        targets: the points and shifts of an objective.
        keep: the samples that may count in the loss, (B,) bool. Those with NaN, infinite or too large numbers are left out, too.
        share: factor of the mean over the batch.
        loss_clip: as for `clip_loss`.
        require: called with the samples that count, (B,) bool; returns them, or raises if none may be left out.
        backward: called with each point's loss.
        synchronised: f(last) → the context of a point's passes; processes average gradients in the last one only.
    """
    keep = require(keep & bounded_paths(targets.states, targets.base_means, targets.shifts))
    states, base_means, shifts = (zero_unless(keep, v) for v in (targets.states, targets.base_means, targets.shifts))
    total, kl, step_kls = states.new_zeros(()), states.new_zeros(len(keep)), dict[int, Tensor]()
    steps = targets.steps
    for i, (k, inclusion) in enumerate(zip(steps.indices, steps.inclusion, strict=True)):
        with synchronised(i == len(steps.indices) - 1):
            moved = mean(k, states[i])
            losses = clip_loss(regression_loss(moved, base_means[i], shifts[i], targets.scales[i]), loss_clip)
            keep = require(keep & bounded(losses.detach()))  # a sample left out at one step stays out at the others
            loss = torch.where(keep, losses, 0.0).mean() * share
            backward(loss)
        total += loss.detach()
        share_of_kl = step_kl(moved.detach(), base_means[i], targets.scales[i])
        step_kls[k] = step_kls.get(k, 0.0) + share_of_kl
        kl += share_of_kl / inclusion
    return Fit(total, kl, keep, step_kls) if targets.kl is None else Fit(total, targets.kl, keep, {})


def bounded_paths(*values: Tensor) -> Tensor:
    """Which samples are finite, and finite when squared, in all of these tensors (S, B, …); (B,) bool."""
    return torch.stack([bounded(half_square(value.transpose(0, 1))) for value in values]).all(0)


def zero_unless(keep: Tensor, values: Tensor) -> Tensor:
    """`values`, (S, B, …), with 0 for samples not in `keep`, (B,) bool; a mask on the loss is not enough, since 0·NaN is NaN."""
    return torch.where(keep.view(1, -1, *[1] * (values.ndim - 2)), values, 0.0)
