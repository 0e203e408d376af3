"""One regression for all objectives: the model's step means at an update's points, towards the shifts wished for."""

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
    """What a regression found on its way, detached.

    Args:
        loss: its share of the update's loss, 0-dimensional.
        kl: the path KL of each sample, (B,), nats: the objective's own, or an estimate if the scales are the steps' noise.
        keep: the samples that had their part in the loss, (B,) bool.
        step_kls: step → its share of the path KL of each sample, (B,), nats; empty where `kl` is the objective's own.
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
    """Backward through the loss of each point; one forward and one backward pass of the model for each.

    Args:
        mean: (k, x) → μ_k^θ(x), with gradient to the trained parameters.
        targets: the points and shifts of an objective.
        keep: the samples that may have a part in the loss, (B,) bool; those whose numbers are not bounded are left out, too.
        share: factor of the mean over the batch.
        loss_clip: as for `clip_loss`.
        require: called with what is kept, which it returns, or raises.
        backward: called with each point's loss.
        synchronised: called with whether a point is the last; the context of its passes, so that processes average once.
    """
    keep = require(keep & bounded_paths(targets.states, targets.base_means, targets.shifts))
    states, base_means, shifts = (zero_unless(keep, v) for v in (targets.states, targets.base_means, targets.shifts))
    total, kl, step_kls = states.new_zeros(()), states.new_zeros(len(keep)), dict[int, Tensor]()
    steps = targets.steps
    for i, (k, inclusion) in enumerate(zip(steps.indices, steps.inclusion, strict=True)):
        with synchronised(i == len(steps.indices) - 1):
            moved = mean(k, states[i])
            losses = clip_loss(regression_loss(moved, base_means[i], shifts[i], targets.scales[i]), loss_clip)
            keep = require(keep & bounded(losses.detach()))  # one left out stays out
            loss = torch.where(keep, losses, 0.0).mean() * share
            backward(loss)
        total += loss.detach()
        share_of_kl = step_kl(moved.detach(), base_means[i], targets.scales[i])
        step_kls[k] = step_kls.get(k, 0.0) + share_of_kl
        kl += share_of_kl / inclusion
    return Fit(total, kl, keep, step_kls) if targets.kl is None else Fit(total, targets.kl, keep, {})


def bounded_paths(*values: Tensor) -> Tensor:
    """Which samples have no NaN, infinite or too large value in any of these (S, B, …), (B,) bool."""
    return torch.stack([bounded(half_square(value.transpose(0, 1))) for value in values]).all(0)


def zero_unless(keep: Tensor, values: Tensor) -> Tensor:
    """`values` of shape (S, B, …) with zeros for the samples not in `keep`, (B,): a NaN times a zero gradient would be a NaN."""
    return torch.where(keep.view(1, -1, *[1] * (values.ndim - 2)), values, 0.0)
