r"""Is the fine-tuned model where it should be? Samples of it against the tilt p* ∝ p_base e^{λr} that training aims at.

The target needs no training: weighted by w = e^{λr}, samples of the base are samples of the tilt,

    E*[s] = E_base[w s]/E_base[w],    log Z = log E_base[w],    KL(p*‖p_base) = E*[λr] − log Z,

estimated with self-normalised weights p_i = w_i/Σ_j w_j (Owen, *Monte Carlo theory, methods and examples*, 2013, §9.2–9.3).
The effective sample size 1/Σ p_i² says how many samples of p* they are worth. Because the tilt solves the control problem
max_θ E_θ[λr] − KL(θ‖base), whose value is log Z (2409.08861, §2, §4.1), the part of log Z not reached is again a
distance: log Z − (E_θ[λr] − KL) = KL(paths of θ ‖ tilted paths) ≥ 0, in nats.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .estimate import Estimate, checked_samples, sample_mean

__all__ = ["MIN_EFFECTIVE_SAMPLES", "TiltEstimate", "TiltGap", "TiltReport", "TiltShift"]
__all__ += ["tilt_estimate", "tilt_gap", "tilt_shift"]

MIN_EFFECTIVE_SAMPLES = 100
"""Below this many effective samples a target counts as not estimable. At 100 the error of a tilted mean is a tenth of the
tilted spread and the bias of self-normalisation, one part in 100 of it, is hidden in that error; with fewer, a handful of
samples carries the weight, and the standard error itself cannot be trusted."""


@dataclass(frozen=True)
class TiltEstimate:
    """The mean of a statistic under p* ∝ p_base e^{λr}, from N samples of the base.

    Args:
        mean: E*[s], the statistic's unit.
        standard_error: of `mean`, by the delta method.
        effective_sample_size: 1/Σ p_i² as a share of N, in (0, 1].
        log_normalizer: log Z = log E_base[e^{λr}], nats.
        log_normalizer_standard_error: by the delta method, nats.
        kl_target: KL(p*‖p_base) = E*[λr] − log Z, nats: what reaching the target costs.
        num_samples: N.
    """

    mean: float
    standard_error: float
    effective_sample_size: float
    log_normalizer: float
    log_normalizer_standard_error: float
    kl_target: float
    num_samples: int

    @property
    def estimable(self) -> bool:
        """Whether the weights are even enough to be believed: at least `MIN_EFFECTIVE_SAMPLES` effective samples."""
        return self.effective_sample_size * self.num_samples >= MIN_EFFECTIVE_SAMPLES

    def __str__(self) -> str:
        return str(Estimate(self.mean, self.standard_error)) if self.estimable else "not estimable"


def tilt_estimate(log_weights: Tensor, statistic: Tensor) -> TiltEstimate:
    """Estimate E*[s] and log Z by self-normalised importance sampling of the base (Owen 2013, eqs. 9.6, 9.9).

    Args:
        log_weights: λ r(x_i) of N ≥ 2 independent base samples x_i, shape (N,), nats; a common constant changes log Z only.
        statistic: s(x_i) of the same samples, shape (N,).

    Returns:
        TiltEstimate, computed in float64. Look at `estimable` before using it.

    Raises:
        ValueError: if shapes are wrong or differ, or a value is not finite.
    """
    log_w, s = _checked_pair(log_weights, statistic)
    p, count = log_w.softmax(0), len(log_w)
    mean = (p * s).sum()
    log_z = log_w.logsumexp(0) - math.log(count)
    share = 1 / (count * p.square().sum())
    return TiltEstimate(
        mean=mean.item(),
        standard_error=_influence(p, s).square().sum().sqrt().item(),
        effective_sample_size=share.item(),
        log_normalizer=log_z.item(),
        # Var(w)/E[w]² is 1/share − 1; rounding may put it just below zero for equal weights.
        log_normalizer_standard_error=((1 / share - 1).clamp(min=0) / (count - 1)).sqrt().item(),
        kl_target=((p * log_w).sum() - log_z).item(),
        num_samples=count,
    )


def _checked_pair(log_weights: Tensor, statistic: Tensor) -> tuple[Tensor, Tensor]:
    log_w, s = checked_samples("log_weights", log_weights), checked_samples("statistic", statistic)
    if len(log_w) != len(s):
        raise ValueError(f"there are {len(log_w)} log_weights but {len(s)} statistics; pass both for the same samples.")
    return log_w, s


def _influence(p: Tensor, s: Tensor) -> Tensor:
    """How far each sample moves Σ p_i s_i, to first order: p_i (s_i − Σ p_j s_j), shape (N,)."""
    return p * (s - (p * s).sum())


@dataclass(frozen=True)
class TiltShift:
    """How far fine-tuning moved one statistic under one sampler.

    Args:
        statistic: its name.
        sampler: the name of the sampler that drew base and tuned samples alike ("ODE", "memoryless").
        before: mean over base samples.
        after: mean over samples of the fine-tuned model.
        target: its mean under the tilt of that sampler's base samples.
        fraction: (after − before)/(target − before), 1 at the target; None where the target is not estimable or not two
            standard errors away from `before`, so that there is no shift to take a share of.
    """

    statistic: str
    sampler: str
    before: Estimate
    after: Estimate
    target: TiltEstimate
    fraction: Estimate | None


def tilt_shift(statistic: str, sampler: str, before: Tensor, after: Tensor, log_weights: Tensor) -> TiltShift:
    """Compare base samples, tuned samples and the tilt of the base samples in one statistic.

    Args:
        statistic: name of the statistic, for the table.
        sampler: name of the sampler, for the table.
        before: the statistic of N base samples, shape (N,).
        after: the statistic of M samples of the fine-tuned model, shape (M,).
        log_weights: λ r of the N base samples, shape (N,), nats.

    Raises:
        ValueError: if shapes are wrong or a value is not finite.
    """
    target = tilt_estimate(log_weights, before)
    start, end = sample_mean(before), sample_mean(after)
    fraction = _shift_fraction(*_checked_pair(log_weights, before), end) if target.estimable else None
    return TiltShift(statistic, sampler, start, end, target, fraction)


def _shift_fraction(log_w: Tensor, s: Tensor, after: Estimate) -> Estimate | None:
    """(after − before)/(target − before) with its delta-method error.

    Before and target are means over the *same* samples, so their errors are summed sample by sample, with sign. Tuned and base
    samples count as independent; drawn from common seeds they are positively correlated and the error is an upper bound.
    """
    p, uniform = log_w.softmax(0), torch.full_like(s, 1 / len(s))
    move_before, move_target = _influence(uniform, s), _influence(p, s)
    before, target = s.mean().item(), (p * s).sum().item()
    shift = target - before
    shift_error = (move_target - move_before).square().sum().sqrt().item()
    if abs(shift) <= 2 * shift_error + 1e-12 * abs(before):  # a constant statistic moves by rounding errors only
        return None
    fraction = (after.mean - before) / shift
    from_base = ((fraction - 1) * move_before - fraction * move_target).square().sum().item()
    return Estimate(fraction, math.sqrt(after.standard_error**2 + from_base) / abs(shift))


@dataclass(frozen=True)
class TiltGap:
    """The distance of the tuned paths to the tilted ones; all in nats, all for the memoryless sampler.

    Args:
        scaled_reward: E_θ[λr] over samples of the fine-tuned model.
        kl_spent: KL(paths of θ ‖ paths of the base).
        kl_target: KL(p*‖p_base), what the exact tilt spends; None where not estimable.
        gap: log Z − (E_θ[λr] − KL spent), 0 at the exact tilt and positive elsewhere, up to its error; None where not estimable.
    """

    scaled_reward: Estimate
    kl_spent: Estimate
    kl_target: float | None
    gap: Estimate | None


def tilt_gap(base_log_weights: Tensor, tuned_log_weights: Tensor, path_kl: Tensor) -> TiltGap:
    """Measure log Z − (E_θ[λr] − KL) under the memoryless sampler, whose noise is what makes the path KL finite.

    Args:
        base_log_weights: λ r of N base samples, shape (N,), nats.
        tuned_log_weights: λ r of M samples of the fine-tuned model, shape (M,), nats.
        path_kl: Σ_k ½‖(μ_k^θ − μ_k^base)/s_k‖² along P paths of the fine-tuned model, shape (P,), nats.

    Raises:
        ValueError: if shapes are wrong or a value is not finite.
    """
    target = tilt_estimate(base_log_weights, base_log_weights)
    reward, kl = sample_mean(tuned_log_weights), sample_mean(path_kl)
    if not target.estimable:
        return TiltGap(reward, kl, None, None)
    # Counted as independent: on common paths reward and KL rise together, which makes this an upper bound.
    error = math.hypot(target.log_normalizer_standard_error, reward.standard_error, kl.standard_error)
    return TiltGap(reward, kl, target.kl_target, Estimate(target.log_normalizer - (reward.mean - kl.mean), error))


@dataclass(frozen=True)
class TiltReport:
    """Everything that tells a tilt from a hacked reward, as one table.

    Args:
        shifts: one per statistic and sampler; the reward first, then at least one statistic that is not the reward.
        gap: distance to the tilt in nats.
        before_after: other quantities by name, (before, after): diversity, saturated pixels, …
    """

    shifts: Sequence[TiltShift]
    gap: TiltGap
    before_after: Mapping[str, tuple[Estimate, Estimate]] = field(default_factory=dict)

    def format(self) -> str:
        """The report as Markdown that also reads well in a terminal; ± is one standard error."""
        shifts = [["statistic", "sampler", "before", "after", "target", "share of shift", "effective samples"]]
        shifts += [_shift_row(shift) for shift in self.shifts]
        others = [["", "before", "after"]]
        others += [[name, str(before), str(after)] for name, (before, after) in self.before_after.items()]
        tables = [_table(shifts), _table(_gap_rows(self.gap))] + ([_table(others)] if self.before_after else [])
        return "\n\n".join(tables)


def _or_not_estimable(value: object) -> str:
    return "not estimable" if value is None else str(value)


def _shift_row(shift: TiltShift) -> list[str]:
    target = shift.target
    effective = f"{target.effective_sample_size:.1%} of {target.num_samples}"
    start, end, share = str(shift.before), str(shift.after), _or_not_estimable(shift.fraction)
    return [shift.statistic, shift.sampler, start, end, str(target), share, effective]


def _gap_rows(gap: TiltGap) -> list[list[str]]:
    kl_target = None if gap.kl_target is None else f"{gap.kl_target:.3f}"
    return [
        ["distance to the tilt, memoryless sampler", "nats"],
        ["KL spent", str(gap.kl_spent)],
        ["KL of the exact tilt", _or_not_estimable(kl_target)],
        ["log Z − (E[λr] − KL spent), 0 at the exact tilt", _or_not_estimable(gap.gap)],
    ]


def _table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, columns padded to one width; the first row is the header."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])
