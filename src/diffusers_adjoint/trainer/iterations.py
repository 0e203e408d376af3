"""Several updates of the weights from one rollout (`num_iterations`): what is kept of a micro-batch, and which steps each uses.

The lean adjoint depends on the path and on the base only, so the target shifts stay correct after an optimizer step. The paths do
not: they were drawn from the model before that step, so they are off-policy, and the KL measured on them is no longer exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..core.matching import LossSteps
from ..model.chain import PipelineChain
from ..objectives import Targets

__all__ = ["KeptBatch", "points_of", "require_plain_steps", "union"]


@dataclass
class KeptBatch:
    """A micro-batch, kept after its first iteration for the others.

    Args:
        chain: with the conditioning of its prompts.
        grid: a copy of the scheduler: the next micro-batch may have another grid of noise levels.
        targets: at the steps of all iterations, without images and rewards.
        steps: the loss steps of each iteration.
        keep: the samples that count, (B,) bool. A sample left out in one iteration stays out.
    """

    chain: PipelineChain
    grid: Any
    targets: Targets
    steps: Sequence[LossSteps]
    keep: Tensor


def union(steps: Sequence[LossSteps]) -> LossSteps:
    """The steps that any iteration uses, each with its probability 1 − Π(1 − p) to be drawn in one of these independent draws."""
    if len(steps) == 1:
        return steps[0]
    single = {k: p for one in steps for k, p in zip(one.indices, one.inclusion, strict=True)}  # the same in all iterations
    return LossSteps(tuple(sorted(single)), tuple(1 - (1 - single[k]) ** len(steps) for k in sorted(single)))


def points_of(targets: Targets, steps: LossSteps) -> Targets:
    """The part of `targets` at these steps. Some objectives have several points at one step."""
    inclusion = dict(zip(steps.indices, steps.inclusion, strict=True))
    chosen = [i for i, k in enumerate(targets.steps.indices) if k in inclusion]
    indices = tuple(targets.steps.indices[i] for i in chosen)
    return replace(
        targets,
        states=targets.states[chosen],
        steps=LossSteps(indices, tuple(inclusion[k] for k in indices)),
        shifts=targets.shifts[chosen],
        base_means=targets.base_means[chosen],
        scales=targets.scales[chosen],
    )


def require_plain_steps(num_iterations: int, *, deepspeed: bool, scaled: bool) -> None:
    """Raise ValueError if several iterations are asked for but the trainer cannot make optimizer steps within an update.

    Args:
        num_iterations: updates of the weights from one rollout.
        deepspeed: whether DeepSpeed makes the steps, in a backward pass.
        scaled: whether a gradient scaler of float16 may skip steps.
    """
    if num_iterations > 1 and (deepspeed or scaled):
        other = "DeepSpeed, which moves the weights itself; use DDP or FSDP" if deepspeed else "fp16=True; pass bf16=True"
        raise ValueError(f"num_iterations={num_iterations} does not work with {other}, or leave num_iterations out.")
