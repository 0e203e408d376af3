r"""Reinforce Adjoint Matching (RAM, 2605.10759): for rewards without a gradient, with a correction by the paths' cost.

An end point x_1 of the model's own paths is noised to the loss steps. Each step's mean is moved towards the mean for the clean
prediction x_1, or away from it, by how much the reward of x_1 is above or below those of its prompt's other images:

    shift from μ_k^θ:  (c + γ (R − R̄)) (toward(x_1, x, k) − μ_k^θ(x))       x = noised(x_1, k), no gradient through any of it

| mode | R | the shift starts from | its fixed point |
|---|---|---|---|
| path_corrected | λ r(x̂_K) − Σ_{k<K−1} (w_k·ξ_k + ½‖w_k‖²) | μ_k^θ | p_base·e^{λr} |
| plain, c = 0 | λ r(x̂_K) | μ_k^base | another distribution; correct to first order in λ |
| tilt_matching, c = 0 | (λ/n) r(x̂_K) | μ_k^ref | none: each of n stages goes 1/n of the way, up to O(1/n²) |

**R of a path.** With w_k = (μ_k^θ − μ_k^base)/s_k and the path's own noise ξ_k = (x_{k+1} − μ_k^θ)/s_k, the sum is
log dP^θ/dP^base of the states x_0 … x_{K−1}: ½‖ξ_k + w_k‖² − ½‖ξ_k‖² a step. As everywhere the reward is taken at the mean of
the base's last step, x̂_K = μ_{K−1}^base(x_{K−1}), a function of x_{K−1} alone. So the last step has no part in the sum, and

    R = log dP*/dP^θ + log Z,     P* ∝ P^base e^{λ r(x̂_K)}

R is the same for all paths exactly if the model's paths have the tilted distribution, and then all shifts are 0. The expectation
of the sum is the path KL; ½ Σ‖w_k‖² is its part without noise. R̄ is the mean over the prompt's *other* images. It does not
change the expectation, and removes log Z and everything else that these images share.

**The consistency** c > 0 is flow matching on the model's own samples. Without it only the mean of R over the paths that end at
x_1 counts. A network whose end points have the tilted distribution would then not change, whatever its paths cost: a control at
one step that a later step undoes has no effect on R. Such step means do not belong to any noised data, and the ODE ends
elsewhere. With c the means become those of the noised end points. On a grid this has a price: the sampler's end points have a
discretisation error, which c reproduces and (R − R̄) has to correct.

**Tilt Matching** (2512.21829) does not need the paths' cost. A frozen copy of the model from the beginning of a stage draws the
paths, takes their last step, and is where the shift starts from. Tilting a distribution by e^{εr} moves E[x_1 | x_k] by
ε Cov(r, x_1 | x_k) to first order. A stage regresses on this with ε = λ/n. After n stages the distribution is the tilt by λ up
to O(1/n), and training must stop.

**The scale** of step k is the standard deviation of toward(x_1, x, k) − μ_k for data N(m, I). A reward is the same for all steps
of its path, so in this unit all targets have about the same noise. In units of the path KL, s_post, the last steps would have
nearly all of the gradient's noise and little of its signal (`benchmarks/black_box.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor

from ..core.matching import LossSteps, control, half_square
from ..core.trajectory import Trajectory
from .papers import REINFORCE_ADJOINT_MATCHING, TILT_MATCHING, Paper
from .targets import DiffusionChain, Scored, Targets

__all__ = ["Ram", "lead_over_the_others"]

CONSISTENCY = 0.3
"""In one dimension, .1 to .3 bring the ODE nearest to the tilt, and 1 is worse (`benchmarks/black_box.py`). Small networks in two
dimensions reach a W2 distance of .09 with it, and .4 without (`benchmarks/objectives.py`)."""


@dataclass(frozen=True)
class Ram:
    """Reinforce Adjoint Matching (RAM): for rewards r without a gradient.

    It compares a prompt's images by R = λr minus the cost of the image's path, which is the log ratio of the path's density under
    model and base. The target shift is (c + γ (R − R̄)) times the direction towards the image, where R̄ is the mean of R over the
    prompt's other images. Its fixed point is the tilted distribution p_base·exp(λr).

    It needs no derivative of the reward, of the decoder or with respect to the state. With K steps, a path and its R take 2K − 1
    evaluations. Each point of the loss takes 2 of the model ("plain": and 1 of the base), one with a backward pass.

    Args:
        mode: "path_corrected"; "plain", without the paths' cost, the paper's main loss, for comparison; or "tilt_matching", which
            reaches the tilt in `stages` and must stop there.
        strength: γ > 0. In "path_corrected" only its ratio to c matters, except for optimizers that depend on the gradient's
            size. Otherwise it multiplies the target shift.
        consistency: c ≥ 0, only for "path_corrected"; `None` for .3.
        noisings: number of times that each end point is noised to each loss step; two cost 4 evaluations per loss step.
        clip: bound on |R − R̄|, nats; `None` for no bound. At the tilt R − R̄ is 0, so clipping does not change the fixed point.
        stages: n, only for "tilt_matching"; each stage has max_steps/n updates.

    Raises:
        ValueError: for an unknown mode, a number out of range, or if `stages` and mode="tilt_matching" are not given together.
    """

    mode: Literal["path_corrected", "plain", "tilt_matching"] = "path_corrected"
    strength: float = 1.0
    consistency: float | None = None
    noisings: int = 1
    clip: float | None = None
    stages: int | None = None

    needs_gradient: ClassVar[bool] = False
    switches_adapter: ClassVar[bool] = False
    scores_end_points: ClassVar[bool] = True
    compares_images: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.mode not in ("path_corrected", "plain", "tilt_matching"):
            raise ValueError(f"mode={self.mode!r} is unknown; pass 'path_corrected', 'plain' or 'tilt_matching'.")
        if self.mode != "tilt_matching" and self.stages is not None:
            raise ValueError(f"stages={self.stages!r} has no meaning for mode={self.mode!r}; pass mode='tilt_matching'.")
        if self.mode == "tilt_matching" and not (isinstance(self.stages, int) and self.stages >= 1):
            raise ValueError(f"stages={self.stages!r} is not a number of stages; pass 1 or more, for example 10.")
        if not (isinstance(self.strength, int | float) and 0 < self.strength < math.inf):
            raise ValueError(f"strength={self.strength!r} is not a strength; pass a finite number above 0.")
        if self.consistency is not None and self.mode != "path_corrected":
            raise ValueError(f"consistency={self.consistency!r} has no meaning for mode={self.mode!r}; leave it out.")
        if self.consistency is not None and not (isinstance(self.consistency, int | float) and 0 <= self.consistency < math.inf):
            raise ValueError(f"consistency={self.consistency!r} is not a weight; pass a number of 0 or more, such as 0.3.")
        if not (isinstance(self.noisings, int) and self.noisings >= 1):
            raise ValueError(f"noisings={self.noisings!r} would make no points; pass 1 or more.")
        if self.clip is not None and not (isinstance(self.clip, int | float) and 0 < self.clip < math.inf):
            raise ValueError(f"clip={self.clip!r} is not a bound; pass a number of nats above 0, or None for no bound.")

    @property
    def paper(self) -> Paper:
        """As `Method.paper`."""
        return TILT_MATCHING if self.mode == "tilt_matching" else REINFORCE_ADJOINT_MATCHING

    @property
    def tilts(self) -> bool:
        """As `Method.tilts`."""
        return self.mode == "path_corrected"

    def integrator(self, predicts_scores: bool) -> str:
        """As `Method.integrator`."""
        return "posterior"

    def scales(self, chain: DiffusionChain) -> Tensor:
        """As `Objective.scales`: (∂μ_k/∂x̂_1) β_k/√(α_k² + β_k²)."""
        zero, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
        pulls = [chain.toward(one, zero, k) - chain.toward(zero, zero, k) for k in range(len(chain.times))]
        noise = 1 - chain.times
        return torch.cat(pulls)[:, 0] * noise / (chain.times**2 + noise**2).sqrt()

    def targets(self, chain: DiffusionChain, steps: LossSteps, score: Callable[[Tensor], Scored]) -> Targets:
        """As `Objective.targets`.

        Raises:
            ValueError: if a batch does not contain all images of each prompt, or prompts have one image only.
        """
        with chain.reference() if self.mode == "tilt_matching" else nullcontext():
            return self._targets_of_paths(chain, steps, score)

    def _targets_of_paths(self, chain: DiffusionChain, steps: LossSteps, score: Callable[[Tensor], Scored]) -> Targets:
        """Targets on new paths of `chain.mean`, which is the reference within its context."""
        group = chain.images_per_prompt
        path = chain.rollout(keep_means=True)
        if group < 2 or path.states.shape[1] % group:
            count = path.states.shape[1]
            raise ValueError(f"{count} images cannot be compared in groups of {group}; pass two or more of each prompt together.")
        with torch.no_grad():
            last = len(path) - 1
            ends = chain.mean if self.mode == "tilt_matching" else chain.base_mean
            clean = ends(last, path.states[last]).to(path.states)
            scored = score(clean)
            log_ratio, kl = _against_base(chain, path)
            values = scored.exponent / (self.stages or 1) - (log_ratio if self.mode == "path_corrected" else 0.0)
            leads = lead_over_the_others(values.where(scored.usable, torch.nan), group)
            return self._at_noised_points(chain, steps, clean, scored, leads, kl)

    def _at_noised_points(
        self, chain: DiffusionChain, steps: LossSteps, clean: Tensor, scored: Scored, leads: Tensor, kl: Tensor
    ) -> Targets:
        """The points of the regression. An image that has no other to compare with gets shifts of NaN, which leave it out."""
        indices = tuple(k for k in steps.indices for _ in range(self.noisings))
        inclusion = tuple(p for p in steps.inclusion for _ in range(self.noisings))
        consistency = CONSISTENCY if self.consistency is None else self.consistency
        weights = self.strength * (leads if self.clip is None else leads.clamp(-self.clip, self.clip))
        weights = weights + (consistency if self.tilts else 0.0)
        weights = weights.to(clean).view(-1, *[1] * (clean.ndim - 1))
        states, means, shifts = [], [], []
        for k in indices:
            x = chain.noised(clean, k)
            own = chain.mean(k, x)
            states.append(x)
            means.append(chain.base_mean(k, x) if self.mode == "plain" else own)
            shifts.append(weights * (chain.toward(clean, x, k) - own))
        # √noisings keeps the loss the same size for more noisings, which add points to its sum.
        scales = self.noisings**0.5 * self.scales(chain)[list(indices)].to(clean)
        logged = {"lead": leads.abs()} | ({} if self.clip is None else {"clipped": (leads.abs() > self.clip).float()})
        stacked = torch.stack(states), LossSteps(indices, inclusion), torch.stack(shifts), torch.stack(means)
        return Targets(*stacked, scales, scored, logged, kl)


def _against_base(chain: DiffusionChain, path: Trajectory) -> tuple[Tensor, Tensor]:
    """log dP^θ/dP^base of each path x_0 … x_{K−1}, and ½ Σ‖w_k‖², each (B,), nats; one evaluation of the base a step."""
    log_ratio = path.states.new_zeros(path.states.shape[1])
    kl = log_ratio.clone()
    for k, mean in enumerate(cast("Tensor", path.means)):
        if not path.stds[k].any():  # a step of length 0
            continue
        push = control(mean, chain.base_mean(k, path.states[k]), path.stds[k])
        noise = (path.states[k + 1] - mean) / path.stds[k]
        cost = half_square(push)
        log_ratio += (push * noise).flatten(1).sum(1) + cost
        kl += cost
    return log_ratio, kl


def lead_over_the_others(values: Tensor, group: int) -> Tensor:
    """Each value minus the mean of the others in its group, (B,); NaN if it is not finite or there is no other.

    Args:
        values: (B,), those of a group next to each other.
        group: n, the number of values in a group.
    """
    groups = values.view(-1, group)
    known = groups.isfinite()
    count = known.sum(1, keepdim=True)
    mean = groups.where(known, 0.0).sum(1, keepdim=True) / count
    # The distance to the mean of the others is n/(n − 1) times that to the mean of all.
    return ((groups - mean) * count / (count - 1)).where(known & (count > 1), torch.nan).flatten()
