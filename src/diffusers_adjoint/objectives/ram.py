r"""Reinforce Adjoint Matching (2605.10759): rewards that are only numbers, along paths that carry what they cost.

An end point x_1 of the model's own paths is noised to the steps that carry the loss. Each step's mean is pulled towards where it
would lie if x_1 were the clean prediction, or pushed away, by how much better x_1 has done than its prompt's other images:

    shift from μ_k^θ:  (c + γ (R − R̄)) (toward(x_1, x, k) − μ_k^θ(x))       x = noised(x_1, k), no gradient through any of it

| mode | R | the shift starts from | its fixed point |
|---|---|---|---|
| path_corrected | λ r(x̂_K) − Σ_{k<K−1} (w_k·ξ_k + ½‖w_k‖²) | μ_k^θ | p_base·e^{λr} |
| plain, c = 0 | λ r(x̂_K) | μ_k^base | another law; right to first order in λ |
| tilt_matching, c = 0 | (λ/n) r(x̂_K) | μ_k^ref | none: each of n stages goes 1/n of the way, up to O(1/n²) |

**R of a path.** With w_k = (μ_k^θ − μ_k^base)/s_k and the path's own noise ξ_k = (x_{k+1} − μ_k^θ)/s_k, the sum is
log dP^θ/dP^base of the states x_0 … x_{K−1}: ½‖ξ_k + w_k‖² − ½‖ξ_k‖² a step. As everywhere the reward is taken at the mean of
the base's last step, x̂_K = μ_{K−1}^base(x_{K−1}), a function of x_{K−1} alone. So the last step has no part in the sum, and

    R = log dP*/dP^θ + log Z,     P* ∝ P^base e^{λ r(x̂_K)}

R is one number for all paths exactly where the model's paths have the tilted law, and there no target moves. The sum is the path
KL, too, on the average; ½ Σ‖w_k‖² is its part without noise. R̄ is the mean over the prompt's *other* images, which leaves the
expectation as it is and takes log Z and whatever else they share away.

**The consistency** c > 0 is flow matching on the model's own samples. Without it only the mean of R over the paths that end in
x_1 counts. A network whose end points have the tilted law would then stay as it is, whatever its paths cost: a push at one step
that a later one takes back is never seen. Such means are those of no noised data, and the ODE ends elsewhere. With c the means
become those of the noised end points. On a grid c has a price: it trusts the sampler, whose end points are off by the grid's
error, and (R − R̄) has to hold against that.

**Tilt Matching** (2512.21829) needs no paths' cost. The model as it was at the beginning of a stage, frozen, draws the paths,
ends them with its own last step, and is what the shift starts from. Tilting a law by e^{εr} moves E[x_1 | x_k] by
ε Cov(r, x_1 | x_k) to first order; a stage regresses on that with ε = λ/n. After n stages the law is the tilt by λ, up to
O(1/n), and training must stop.

**The scale** of step k is the deviation that toward(x_1, x, k) − μ_k has for data N(m, I). A number says the same of all steps of
its path, so each target has about the same noise in this unit. In that of the paths' KL, s_post, the last steps would have nearly
all of the gradient's noise and little of its signal (`benchmarks/black_box.py`).
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
"""On the line .1 to .3 bring the ODE nearest to the tilt, and 1 is worse (`benchmarks/black_box.py`). Small networks in the plane
come to W2 .09 with it, and to .4 without (`benchmarks/objectives.py`)."""


@dataclass(frozen=True)
class Ram:
    """Reinforce Adjoint Matching, by default with the paths' cost, which makes the tilt its fixed point.

    No derivative of the reward, of the decoder or in the state: 2K − 1 evaluations for a path and its R, and for each of its
    points 2 of the model ("plain": 1 of the base, too), of which one has a backward pass to the weights.

    Args:
        mode: "path_corrected"; "plain", without the paths' cost: the paper's main loss, for comparison; or "tilt_matching", which
            goes to the tilt in `stages` and must stop there.
        strength: γ > 0. In "path_corrected" only its ratio to c counts, but for optimizers that see the gradient's size;
            otherwise it is a factor of the target.
        consistency: c ≥ 0, in "path_corrected" alone; `None` for .3.
        noisings: how often each end point is noised to each of the loss steps; two cost 4 evaluations a loss step.
        clip: bound of |R − R̄|, nats; `None` for none. Where the model's law is the tilt there is nothing to clip.
        stages: n of "tilt_matching", of max_steps/n updates each.

    Raises:
        ValueError: for another mode, numbers that are none above 0, or `stages` without "tilt_matching" or the other way round.
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
            raise ValueError(f"stages={self.stages!r} leads nowhere; pass how many stages lead to the tilt, 10 for example.")
        if not (isinstance(self.strength, int | float) and 0 < self.strength < math.inf):
            raise ValueError(f"strength={self.strength!r} pulls nowhere; pass a number above 0.")
        if self.consistency is not None and self.mode != "path_corrected":
            raise ValueError(f"consistency={self.consistency!r} has no meaning for mode={self.mode!r}; leave it out.")
        if self.consistency is not None and not (isinstance(self.consistency, int | float) and 0 <= self.consistency < math.inf):
            raise ValueError(f"consistency={self.consistency!r} is no weight; pass a number of 0 or more, such as 0.3.")
        if not (isinstance(self.noisings, int) and self.noisings >= 1):
            raise ValueError(f"noisings={self.noisings!r} makes no point to learn at; pass 1 or more.")
        if self.clip is not None and not (isinstance(self.clip, int | float) and 0 < self.clip < math.inf):
            raise ValueError(f"clip={self.clip!r} bounds no difference; pass a number of nats above 0, or None for no bound.")

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
            ValueError: if a prompt's images are not all there, or there is one only.
        """
        with chain.reference() if self.mode == "tilt_matching" else nullcontext():
            return self._targets_of_paths(chain, steps, score)

    def _targets_of_paths(self, chain: DiffusionChain, steps: LossSteps, score: Callable[[Tensor], Scored]) -> Targets:
        """Along new paths of what `chain.mean` is now."""
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
        """The regression's points; an image without anything to be compared with has shifts of NaN, which leave it out."""
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
        # One noising more makes the sum over points longer, not the loss larger.
        scales = self.noisings**0.5 * self.scales(chain)[list(indices)].to(clean)
        logged = {"lead": leads.abs()} | ({} if self.clip is None else {"clipped": (leads.abs() > self.clip).float()})
        stacked = torch.stack(states), LossSteps(indices, inclusion), torch.stack(shifts), torch.stack(means)
        return Targets(*stacked, scales, scored, logged, kl)


def _against_base(chain: DiffusionChain, path: Trajectory) -> tuple[Tensor, Tensor]:
    """log dP^θ/dP^base of each path x_0 … x_{K−1}, and ½ Σ‖w_k‖², each (B,), nats; one evaluation of the base a step."""
    log_ratio = path.states.new_zeros(path.states.shape[1])
    kl = log_ratio.clone()
    for k, mean in enumerate(cast("Tensor", path.means)):
        if not path.stds[k].any():  # a step of no length
            continue
        push = control(mean, chain.base_mean(k, path.states[k]), path.stds[k])
        noise = (path.states[k + 1] - mean) / path.stds[k]
        cost = half_square(push)
        log_ratio += (push * noise).flatten(1).sum(1) + cost
        kl += cost
    return log_ratio, kl


def lead_over_the_others(values: Tensor, group: int) -> Tensor:
    """Each value minus the mean of the others of its group, (B,); NaN for one that is not finite or has no other.

    Args:
        values: (B,), those of a group next to each other.
        group: n, how many these are.
    """
    groups = values.view(-1, group)
    known = groups.isfinite()
    count = known.sum(1, keepdim=True)
    mean = groups.where(known, 0.0).sum(1, keepdim=True) / count
    # The mean of the others is n/(n − 1) times as far away as the mean of all.
    return ((groups - mean) * count / (count - 1)).where(known & (count > 1), torch.nan).flatten()
