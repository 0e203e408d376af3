r"""The matching loss: regress the control of each chosen step on minus the scaled adjoint.

    √Δ u_k = (μ_k^θ − μ_k^base) / s_k                                   control, for any sampler with Gaussian steps
    L_k    = ½ ‖ √Δ u_k + s_k ã_{k+1} ‖²                                 (2409.08861, eq. 37; eqs. 42, 223 on the grid)
    KL     = Σ_k ½ ‖ √Δ u_k ‖²                                          KL(path law of θ ‖ path law of the base), nats

The paper pairs step k with ã_k. For a chain of Gaussian steps the exact optimality condition is
√Δ u_k = −s_k E[ã_{k+1} | x_k], so ã_{k+1} is the default here; ã_k differs by O(1/K) and tilts too little.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .trajectory import MeanFunction, Trajectory

__all__ = ["LossSteps", "bounded", "choose_loss_steps", "clip_loss", "control", "half_square", "matching_loss", "noisy_steps"]
__all__ += ["path_kl", "regression_loss", "step_kl"]


def control(mean: Tensor, base_mean: Tensor, std: float | Tensor) -> Tensor:
    """√Δ u_k = (μ_k^θ − μ_k^base)/s_k: the drift change of one step in units of its noise (2409.08861, eqs. 26–27).

    Args:
        mean: μ_k^θ(x_k), shape (B, …), with gradient.
        base_mean: μ_k^base(x_k), shape (B, …).
        std: s_k > 0.

    Raises:
        ValueError: if shapes differ (they would broadcast silently) or s_k is not positive.
    """
    if mean.shape != base_mean.shape:
        raise ValueError(f"mean has shape {tuple(mean.shape)} but base_mean {tuple(base_mean.shape)}; they must agree.")
    if not torch.all(torch.as_tensor(std) > 0):
        raise ValueError(f"std is {std}; leave steps without noise out of the loss steps, because they have no control.")
    return (mean - base_mean) / std


def regression_loss(mean: Tensor, base_mean: Tensor, shift: Tensor, scale: float | Tensor) -> Tensor:
    """½‖((μ^θ − μ^base) − δ)/scale‖², the loss of all objectives that have a target shift δ of the step mean.

    The target is the shift and not μ^base + δ, because in float32 that sum would lose a small δ to rounding.

    Args:
        mean: μ_k^θ(x), shape (B, …), with gradient to the trained parameters.
        base_mean: μ_k^base(x), same shape.
        shift: δ, the target for μ_k − μ_k^base, same shape.
        scale: above 0, state units; with s_k, step k's noise, the loss is in nats.

    Returns:
        Loss per sample, shape (B,), summed over all other dimensions. Gradient reaches `mean` only.

    Raises:
        ValueError: if shapes differ (they would broadcast silently) or the scale is not positive.
    """
    if mean.shape != shift.shape:
        raise ValueError(f"mean has shape {tuple(mean.shape)} but shift {tuple(shift.shape)}; they must agree.")
    # Detached, because base and shift are targets: a gradient through them would change the fixed point.
    return half_square(control(mean, base_mean.detach(), scale) - shift.detach() / scale)


def matching_loss(mean: Tensor, base_mean: Tensor, std: float | Tensor, adjoint: Tensor) -> Tensor:
    """Adjoint Matching loss of one step, ½‖(μ^θ − μ^base)/s + s ã_{k+1}‖² (2409.08861, eq. 37).

    Args:
        mean: μ_k^θ(x_k), shape (B, …), with gradient to the trained parameters.
        base_mean: μ_k^base(x_k), shape (B, …).
        std: s_k > 0.
        adjoint: ã_{k+1}, shape (B, …). (Pass ã_k to reproduce the paper's pairing.)

    Returns:
        Loss per sample, shape (B,), summed over all other dimensions. Gradient reaches `mean` only.

    Raises:
        ValueError: if shapes differ or s_k is not positive.
    """
    if mean.shape != adjoint.shape:
        raise ValueError(f"mean has shape {tuple(mean.shape)} but adjoint {tuple(adjoint.shape)}; they must agree.")
    return regression_loss(mean, base_mean, -(std**2) * adjoint, std)


def clip_loss(loss: Tensor, loss_clip: float | None) -> Tensor:
    """The paper's loss clipping threshold LCT (app. G): per sample and step, min(LCT, ‖·‖²) on the *un-halved* norm.

    A clipped term has gradient 0, so an outlier is ignored instead of reduced. `None` does not clip.
    """
    return loss if loss_clip is None else loss.clamp(max=0.5 * loss_clip)


def step_kl(mean: Tensor, base_mean: Tensor, std: float | Tensor) -> Tensor:
    """½‖√Δ u_k‖², step k's share of KL(path of θ ‖ path of the base), shape (B,), nats (Girsanov on the grid)."""
    return half_square(control(mean, base_mean, std))


def path_kl(mean: MeanFunction, base_mean: MeanFunction, trajectory: Trajectory) -> Tensor:
    """KL(path law of the model ‖ path law of the base) along given paths, shape (B,), nats; all steps with noise (Girsanov)."""
    states, stds = trajectory.states, trajectory.stds
    with torch.no_grad():
        terms = [step_kl(mean(k, x := states[k]), base_mean(k, x), stds[k]) for k in noisy_steps(stds)]
    return torch.stack(terms).sum(0)


def half_square(values: Tensor) -> Tensor:
    """½‖·‖² of each sample, (B, …) → (B,)."""
    return 0.5 * values.square().reshape(len(values), -1).sum(1)


def bounded(costs: Tensor) -> Tensor:
    """Which costs are finite when squared, same shape, bool; in float32 the limit is 1.8e19.

    A gradient grows like the square root of its cost, so the norm of such an image's gradient is finite, too. The gradient of an
    image with a larger cost might not be, and then the update of all images would be dropped.
    """
    return costs.abs() <= torch.finfo(costs.dtype).max ** 0.5


@dataclass(frozen=True)
class LossSteps:
    """The steps of the sampler that carry the loss in one update.

    Args:
        indices: the drawn steps k, increasing; k = 0 starts from pure noise.
        inclusion: probability with which each of them was drawn, same length. Dividing each step's term by it makes the sum over
            the drawn steps an unbiased estimate of the sum over all steps.
    """

    indices: tuple[int, ...]
    inclusion: tuple[float, ...]


def noisy_steps(stds: Tensor) -> list[int]:
    """The steps that carry a control, those with s_k > 0; `stds` of shape (K,), or (K, …) for diagonal noise."""
    return [k for k, std in enumerate(stds) if std.any()]


def choose_loss_steps(
    stds: Tensor, num_loss_steps: int, selection: Literal["paper", "uniform"], generator: torch.Generator | None = None
) -> LossSteps:
    """Draw the steps of one update among those with s_k > 0.

    `"uniform"`: S of n without replacement. `"paper"` (app. G): the last quarter always, the rest uniformly from the
    others.

    Args:
        stds: s_k, shape (K,), or (K, …) for diagonal noise.
        num_loss_steps: S, 1 ≤ S ≤ number of steps with noise; "paper" needs more than the quarter it always takes.
        generator: CPU generator; `None` for the global one.

    Raises:
        ValueError: if S does not fit the grid or `selection` is unknown.
    """
    noisy = noisy_steps(stds)
    always = _always_chosen(noisy, num_loss_steps, selection)
    pool = noisy[: len(noisy) - len(always)]
    draws = num_loss_steps - len(always)
    drawn = [pool[i] for i in torch.randperm(len(pool), generator=generator)[:draws].tolist()]
    probability = {k: draws / len(pool) for k in pool} | dict.fromkeys(always, 1.0)
    indices = tuple(sorted(drawn + always))
    return LossSteps(indices, tuple(probability[k] for k in indices))


def _always_chosen(noisy: list[int], num_loss_steps: int, selection: str) -> list[int]:
    if selection not in ("paper", "uniform"):
        raise ValueError(f"loss_step_selection={selection!r} is unknown; pass 'uniform' or 'paper'.")
    if not 1 <= num_loss_steps <= len(noisy):
        raise ValueError(
            f"num_loss_steps={num_loss_steps} does not fit a grid with {len(noisy)} noisy steps; pass 1 to {len(noisy)}."
        )
    if selection == "uniform" or num_loss_steps == len(noisy):
        return []
    quarter = max(len(noisy) // 4, 1)
    if num_loss_steps <= quarter:
        raise ValueError(
            f"num_loss_steps={num_loss_steps} is too few, as loss_step_selection='paper' always uses the last {quarter} steps "
            f"and draws others; pass at least {quarter + 1}, or loss_step_selection='uniform'."
        )
    return noisy[-quarter:]
