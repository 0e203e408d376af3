"""Several updates of the weights from one rollout: what is kept of a micro-batch, and where each iteration looks.

The lean adjoint belongs to a path and to the base, so that the shifts are as right after a step of the optimizer as before it.
What ages is the paths: they are drawn from the model as it was, and only there do they say how far it is from the base.
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
    """A micro-batch after its first iteration.

    Args:
        chain: with the conditioning of its prompts.
        grid: the scheduler with its tables, a copy: those of the next micro-batch may be others.
        targets: at the steps of all iterations, without images and rewards.
        steps: of each iteration.
        keep: the samples that still train, (B,) bool; one left out in an iteration stays out.
    """

    chain: PipelineChain
    grid: Any
    targets: Targets
    steps: Sequence[LossSteps]
    keep: Tensor


def union(steps: Sequence[LossSteps]) -> LossSteps:
    """The steps that any of the iterations has chosen, and how likely that was: 1 − Π(1 − p), the draws being independent."""
    if len(steps) == 1:
        return steps[0]
    single = {k: p for one in steps for k, p in zip(one.indices, one.inclusion, strict=True)}  # the same in all iterations
    return LossSteps(tuple(sorted(single)), tuple(1 - (1 - single[k]) ** len(steps) for k in sorted(single)))


def points_of(targets: Targets, steps: LossSteps) -> Targets:
    """The points at these steps, of which some objectives have several a step; `targets` has more steps than these."""
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
    """Raise ValueError if the optimizer is to move within an update but is not the trainer's to move.

    Args:
        deepspeed: whether DeepSpeed steps, in a backward pass.
        scaled: whether a gradient scaler of float16 decides about the steps.
    """
    if num_iterations > 1 and (deepspeed or scaled):
        other = "DeepSpeed, which moves the weights itself; use DDP or FSDP" if deepspeed else "fp16=True; pass bf16=True"
        raise ValueError(f"num_iterations={num_iterations} does not go with {other}, or leave num_iterations out.")
