r"""Compare the fine-tuned model with its target, the tilted distribution ("tilt") p* ∝ p_base e^{λr}.

The target can be estimated without training: samples of the base, weighted by w = e^{λr}, are samples of the tilt,

    E*[s] = E_base[w s]/E_base[w],    log Z = log E_base[w],    KL(p*‖p_base) = E*[λr] − log Z,

estimated with self-normalised weights p_i = w_i/Σ_j w_j (Owen, *Monte Carlo theory, methods and examples*, 2013, §9.2–9.3).
The effective sample size 1/Σ p_i² tells how many samples of p* they are worth. The tilt solves the control problem
max_θ E_θ[λr] − KL(θ‖base), whose maximum is log Z (2409.08861, §2, §4.1). So the difference to the maximum is a distance to the
target: log Z − (E_θ[λr] − KL) = KL(paths of θ ‖ tilted paths) ≥ 0, in nats.

A pipeline has a tilt for each prompt c: p*(x|c) ∝ p_base(x|c) e^{λ r(x, c)} with its own Z(c). Weights are therefore normalised
within each prompt, and results are means over prompts; weights normalised over all samples would prefer prompts with high
rewards. Standard errors are for the given prompts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .estimate import Estimate, by_prompt, finite, prompt_mean, sample_mean
from .table import markdown_table

__all__ = ["MIN_EFFECTIVE_SAMPLES", "TiltEstimate", "TiltGap", "TiltReport", "TiltShift"]
__all__ += ["tilt_estimate", "tilt_gap", "tilt_shift"]

MIN_EFFECTIVE_SAMPLES = 100
"""With fewer effective samples a target counts as not estimable. With 100, the error of a tilted mean is a tenth of the tilted
standard deviation, and the bias of self-normalisation a hundredth. With fewer, a handful of samples has most of the weight, and
the standard error itself is not reliable."""


@dataclass(frozen=True)
class TiltEstimate:
    """The mean of a statistic under p* ∝ p_base e^{λr}, from N samples of the base; for several prompts, the mean over them.

    Args:
        mean: E*[s], the statistic's unit.
        standard_error: of `mean`, by the delta method.
        effective_sample_size: 1/Σ p_i² as a share of N, in (0, 1]; for several prompts, the smallest.
        log_normalizer: log Z = log E_base[e^{λr}], nats.
        log_normalizer_standard_error: by the delta method, nats.
        kl_target: KL(p*‖p_base) = E*[λr] − log Z, nats.
        kl_target_standard_error: by the delta method, nats.
        num_samples: N, of each prompt.
    """

    mean: float
    standard_error: float
    effective_sample_size: float
    log_normalizer: float
    log_normalizer_standard_error: float
    kl_target: float
    kl_target_standard_error: float
    num_samples: int

    @property
    def estimable(self) -> bool:
        """Whether each prompt has at least `MIN_EFFECTIVE_SAMPLES` effective samples, so that the estimate is reliable."""
        return self.effective_sample_size * self.num_samples >= MIN_EFFECTIVE_SAMPLES

    def __str__(self) -> str:
        return str(Estimate(self.mean, self.standard_error)) if self.estimable else "not estimable"


def tilt_estimate(log_weights: Tensor, statistic: Tensor) -> TiltEstimate:
    """Estimate E*[s] and log Z by self-normalised importance sampling of the base (Owen 2013, eqs. 9.6, 9.9).

    Args:
        log_weights: λ r(x_i) of N ≥ 2 independent base samples x_i, shape (N,), or (P, N) for N of each of P prompts, nats. A
            constant added to all of a prompt's changes log Z only.
        statistic: s(x_i) of the same samples, same shape.

    Returns:
        TiltEstimate, computed in float64. Check `estimable` before using it.

    Raises:
        ValueError: if shapes are wrong or differ, or a value is not finite.
    """
    log_w, s = _checked_pair(log_weights, statistic)
    p, (prompts, count) = log_w.softmax(1), log_w.shape
    log_z = log_w.logsumexp(1) - math.log(count)
    share = 1 / (count * p.square().sum(1))
    # Var(w)/E[w]² is 1/share − 1; rounding may put it just below zero for equal weights.
    log_z_variance = (1 / share - 1).clamp(min=0) / (count - 1)
    return TiltEstimate(
        mean=_weighted_mean(p, s).item(),
        standard_error=_influence(p, s).norm().item(),
        effective_sample_size=share.min().item(),
        log_normalizer=log_z.mean().item(),
        log_normalizer_standard_error=(log_z_variance.sum().sqrt() / prompts).item(),
        kl_target=(_weighted_mean(p, log_w) - log_z.mean()).item(),
        # A sample moves E*[λr] by its influence, and log Z by p_i − 1/N.
        kl_target_standard_error=(_influence(p, log_w) - (p - 1 / count) / prompts).norm().item(),
        num_samples=count,
    )


def _checked_pair(log_weights: Tensor, statistic: Tensor) -> tuple[Tensor, Tensor]:
    """Both as (P, N)."""
    log_w, s = by_prompt("log_weights", log_weights), by_prompt("statistic", statistic)
    if log_w.shape != s.shape:
        weights, statistics = (" × ".join(map(str, x.shape)) for x in (log_weights, statistic))
        raise ValueError(f"there are {weights} log_weights but {statistics} statistics; pass both for the same samples.")
    return log_w, s


def _weighted_mean(p: Tensor, s: Tensor) -> Tensor:
    """Σ_i p_i s_i of each prompt, averaged over prompts."""
    return (p * s).sum(1).mean()


def _influence(p: Tensor, s: Tensor) -> Tensor:
    """Influence of each sample on `_weighted_mean`, to first order: p_i (s_i − Σ p_j s_j)/P, shape (P, N)."""
    return p * (s - (p * s).sum(1, keepdim=True)) / len(p)


def _mean_influence(s: Tensor) -> Tensor:
    """Influence of each sample on the mean of (P, N), scaled so that its norm is the unbiased standard error of the mean."""
    return (s - s.mean(1, keepdim=True)) / (len(s) * math.sqrt(s.shape[1] * (s.shape[1] - 1)))


def _mean(samples: Tensor) -> Estimate:
    """Mean of (P, N), with the standard error for the given prompts: differences between prompts do not count as error."""
    return Estimate(samples.mean().item(), _mean_influence(samples).norm().item())


def _of_prompts(values: Tensor, prompts: int) -> Tensor:
    """Samples of the tuned model, (P, M)."""
    x = by_prompt("values", values)
    if len(x) != prompts:
        raise ValueError(f"values has shape {tuple(values.shape)} but the base has {prompts} prompt(s); pass as many rows.")
    return x


@dataclass(frozen=True)
class TiltShift:
    """How far fine-tuning moved one statistic under one sampler.

    Args:
        statistic: its name.
        sampler: the name of the sampler that drew base and tuned samples alike ("ODE", "memoryless").
        before: mean over base samples.
        after: mean over samples of the fine-tuned model; of pairs, `before` + `rise`.
        rise: after − before, with the error of this difference.
        target: its mean under the tilt of that sampler's base samples.
        fraction: rise/(target − before), 1 at the target. `None` if the target is not estimable, or is within two standard
            errors of `before`, so that the shift is not significant.
    """

    statistic: str
    sampler: str
    before: Estimate
    after: Estimate
    rise: Estimate
    target: TiltEstimate
    fraction: Estimate | None


def tilt_shift(
    statistic: str, sampler: str, before: Tensor, after: Tensor, log_weights: Tensor, paired: bool = False
) -> TiltShift:
    """Compare base samples, tuned samples and the tilt of the base samples in one statistic.

    All errors are summed sample by sample, with sign: before and target are means over the same samples.

    Args:
        statistic: name of the statistic, for the table.
        sampler: name of the sampler, for the table.
        before: the statistic of N base samples, shape (N,), or (P, N) for N of each of P prompts.
        after: the statistic of M samples of the fine-tuned model, shape (M,) or (P, M), the same prompts.
        log_weights: λ r of the base samples, shape of `before`, nats.
        paired: whether the i-th tuned sample of a prompt has the noise of the i-th base sample, M ≤ N. Then the rise is the mean
            difference of the M pairs (common random numbers, Owen 2013, §8.6). Its error is smaller than without pairs if the
            two are correlated by more than about ½. Otherwise base and tuned samples count as independent.

    Raises:
        ValueError: if shapes are wrong, a value is not finite, or there are more pairs than base samples.
    """
    target = tilt_estimate(log_weights, before)
    log_w, s = _checked_pair(log_weights, before)
    tuned = _of_prompts(after, len(s))
    moves = _rise_influence(s, tuned, paired)
    rise = (tuned.mean() - (s[:, : tuned.shape[1]] if paired else s).mean()).item()
    end = Estimate(s.mean().item() + rise, (_widened(_mean_influence(s), moves) + moves).norm().item())
    fraction = _shift_fraction(log_w, s, rise, moves) if target.estimable else None
    return TiltShift(statistic, sampler, _mean(s), end, Estimate(rise, moves.norm().item()), target, fraction)


def _rise_influence(s: Tensor, tuned: Tensor, paired: bool) -> Tensor:
    """Influence of each independent sample on after − before: of N base samples with M pairs among them, or of N + M samples."""
    if not paired:
        return torch.cat([-_mean_influence(s), _mean_influence(tuned)], 1)
    pairs, count = tuned.shape[1], s.shape[1]
    if pairs > count:
        raise ValueError(f"there are {pairs} tuned samples for {count} of the base; pass a base sample for each of them.")
    return _widened(_mean_influence(tuned - s[:, :pairs]), s)


def _widened(influence: Tensor, like: Tensor) -> Tensor:
    """With zeros for the samples that only `like` has."""
    return torch.nn.functional.pad(influence, (0, like.shape[1] - influence.shape[1]))


def _shift_fraction(log_w: Tensor, s: Tensor, rise: float, moves: Tensor) -> Estimate | None:
    """rise/(target − before) with its delta-method error; `moves` are the influences on the rise."""
    p = log_w.softmax(1)
    move_shift = _influence(p, s) - _mean_influence(s)
    before, target = s.mean().item(), _weighted_mean(p, s).item()
    shift, shift_error = target - before, move_shift.norm().item()
    if abs(shift) <= 2 * shift_error + 1e-12 * abs(before):  # a constant statistic moves by rounding errors only
        return None
    fraction = rise / shift
    return Estimate(fraction, (moves - fraction * _widened(move_shift, moves)).norm().item() / abs(shift))


@dataclass(frozen=True)
class TiltGap:
    """The distance of the tuned paths to the tilted ones, in nats, for the memoryless sampler.

    Args:
        scaled_reward: E_θ[λr] over samples of the fine-tuned model.
        kl_spent: KL(paths of θ ‖ paths of the base).
        kl_target: KL(p*‖p_base) of the exact tilt; `None` if not estimable.
        gap: log Z − (E_θ[λr] − KL spent): 0 at the exact tilt, and positive elsewhere up to its error; `None` if not estimable.
    """

    scaled_reward: Estimate
    kl_spent: Estimate
    kl_target: Estimate | None
    gap: Estimate | None


def tilt_gap(base_log_weights: Tensor, tuned_log_weights: Tensor, path_kl: Tensor) -> TiltGap:
    """Measure log Z − (E_θ[λr] − KL) under the memoryless sampler, whose noise makes the path KL finite.

    Args:
        base_log_weights: λ r of N base samples, shape (N,), or (P, N) for N of each of P prompts, nats.
        tuned_log_weights: λ r of M samples of the fine-tuned model, shape (M,) or (P, M), the same prompts, nats.
        path_kl: Σ_k ½‖(μ_k^θ − μ_k^base)/s_k‖² along K paths of the fine-tuned model, shape (K,) or (P, K), nats. With several
            prompts K = 1 is enough; the error is then computed over prompts, which is an upper bound.

    Raises:
        ValueError: if shapes are wrong or a value is not finite.
    """
    target = tilt_estimate(base_log_weights, base_log_weights)
    prompts = len(torch.atleast_2d(base_log_weights))
    reward, kl = _mean(_of_prompts(tuned_log_weights, prompts)), _path_mean(path_kl, prompts)
    if not target.estimable:
        return TiltGap(reward, kl, None, None)
    # As if independent. On the same paths reward and KL are positively correlated, so this is an upper bound.
    error = math.hypot(target.log_normalizer_standard_error, reward.standard_error, kl.standard_error)
    kl_target = Estimate(target.kl_target, target.kl_target_standard_error)
    return TiltGap(reward, kl, kl_target, Estimate(target.log_normalizer - (reward.mean - kl.mean), error))


def _path_mean(path_kl: Tensor, prompts: int) -> Estimate:
    if prompts == 1 and path_kl.ndim == 1:
        return sample_mean(path_kl)
    if path_kl.ndim != 2 or len(path_kl) != prompts:
        raise ValueError(f"path_kl has shape {tuple(path_kl.shape)} but the base has {prompts} prompt(s); pass as many rows.")
    return prompt_mean(finite("path_kl", path_kl))


@dataclass(frozen=True)
class TiltReport:
    """A report that shows whether the model has reached its target, the tilt p* ∝ p_base e^{λr}, or has hacked the reward r.

    At the target each statistic has its mean under p*. If the reward is hacked, it may exceed its mean under p*, and other
    statistics move away from theirs.

    Args:
        shifts: one for each statistic and sampler: the reward first, then at least one statistic that is not the reward.
        gap: distance to the tilt in nats; `None` if it was not measured.
        before_after: other quantities by name, (before, after): diversity, saturated pixels, …
    """

    shifts: Sequence[TiltShift]
    gap: TiltGap | None
    before_after: Mapping[str, tuple[Estimate, Estimate]] = field(default_factory=dict)

    def format(self) -> str:
        """The report as Markdown that also reads well in a terminal; ± is one standard error."""
        shifts = [["statistic", "sampler", "before", "after", "target", "share of shift", "effective samples"]]
        shifts += [_shift_row(shift) for shift in self.shifts]
        others = [["", "before", "after"]]
        others += [[name, str(before), str(after)] for name, (before, after) in self.before_after.items()]
        tables = [shifts, [*_target_rows(self.shifts), *_gap_rows(self.gap)]] + ([others] if self.before_after else [])
        return "\n\n".join(map(markdown_table, tables))


def _or_not_estimable(value: object) -> str:
    return "not estimable" if value is None else str(value)


def _shift_row(shift: TiltShift) -> list[str]:
    target = shift.target
    effective = f"{target.effective_sample_size:.1%} of {target.num_samples}"
    start, end, share = str(shift.before), str(shift.after), _or_not_estimable(shift.fraction)
    return [shift.statistic, shift.sampler, start, end, str(target), share, effective]


def _target_rows(shifts: Sequence[TiltShift]) -> list[list[str]]:
    """Rows with log Z and the KL of the target, for each sampler."""
    rows = [["the tilt", "nats"]]
    for sampler, target in {shift.sampler: shift.target for shift in shifts}.items():
        log_z = Estimate(target.log_normalizer, target.log_normalizer_standard_error)
        kl = Estimate(target.kl_target, target.kl_target_standard_error)
        for name, value in {"log Z": log_z, "KL of the exact tilt": kl}.items():
            rows.append([f"{name}, {sampler}", str(value) if target.estimable else "not estimable"])
    return rows


def _gap_rows(gap: TiltGap | None) -> list[list[str]]:
    if gap is None:
        return []
    return [
        ["KL spent, memoryless", str(gap.kl_spent)],
        ["log Z − (E[λr] − KL spent), memoryless, 0 at the exact tilt", _or_not_estimable(gap.gap)],
    ]
