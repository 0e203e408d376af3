r"""`target_kl`: find the λ at which the trained model's path KL to the base equals a budget.

λ starts from an estimate on images of the base, and is adjusted while training measures the KL. The model lags behind λ: the KL
of this update is lower than the one that this λ will lead to. Hence two rules:

- λ falls at once when an update's KL is above the budget, by log λ −= min(½ a log(KL/budget), .1), a = .2;
- λ rises only when the KL has settled: when its mean over the last 5 updates is less than 5 % above that over the 5 updates which
  came 10 earlier. It is then multiplied by (budget/KL)^{1/p}, at most e^{1/2}, and does not rise again for 15 updates. p is the
  power of λ with which the KL grew between the last two such times, limited to ½ … 2. It is 2 the first time (`metrics.scale`),
  and when λ has grown by less than a tenth since, which is too little to measure p.

A rule that moves λ by log(budget/KL) in both directions overshoots while the model lags: starting from the right λ it reaches
twice the budget, and these rules stay within a fifth of it (`tests/test_kl_budget.py`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers.utils import logging

from ..core.matching import LossSteps
from ..metrics.scale import tilt_scale
from .regress import Fit
from .tell import tell

__all__ = ["BUDGET_NAME", "KLBudget", "Spent", "first_scale", "next_scale"]

logger = logging.get_logger(__name__)

BUDGET_NAME = "kl_budget.json"
FALL, MOST_FALL, MOST_RISE = 0.2, 0.1, 0.5  # gain a, and the largest steps of log λ
FIRST_SHARE = 1 / 3  # share of the budget that the first λ aims for
WINDOW, BETWEEN, GROWTH = 5, 10, 1.05


@dataclass(frozen=True)
class Spent:
    """λ and the measured KL, as a checkpoint keeps them.

    Args:
        reward_scale: λ of the next update, nats per unit of reward.
        kls: KL of the last updates, at most 15, nats.
        rested: updates since λ last rose.
        last_rest: λ and KL, in nats, when it last rose.
        step_kls: step → its part of the KL when it last carried the loss, mean over images, nats.
    """

    reward_scale: float
    kls: tuple[float, ...] = ()
    rested: int = 0
    last_rest: tuple[float, float] | None = None
    step_kls: dict[int, float] = field(default_factory=dict)


def first_scale(rewards: Tensor, budget: float) -> Spent:
    """The first λ, at which `tilt_scale` estimates a third of the budget; prints a line about it.

    It aims low, because the estimate is off by a tenth to a third, and a chain of few steps has a higher KL at the same λ than
    the tilt. If λ is too low, it rises within some updates. If it is too high, the model has already left the base too far.

    Args:
        rewards: rewards of images of the base, shape (P, n) for n images of P prompts, NaN where one is missing.
        budget: above 0, nats.

    Raises:
        ValueError: if the images of each prompt all have the same reward.
    """
    whole = tilt_scale(rewards, budget)  # first, so that an error message names the budget and not a third of it
    first = tilt_scale(rewards, FIRST_SHARE * budget)
    tell(
        f"target_kl={budget:g} nats: λ starts at {first.reward_scale:.4g}, where {rewards.numel()} images of the base predict a "
        f"third of this KL; they predict all of it at {whole.reward_scale:.4g}."
    )
    if whole.saturated:
        logger.warning(
            f"even the images with the highest rewards are only {whole.measured:.2g} nats from the base, so target_kl={budget:g} "
            f"may be out of reach, and λ would rise without end; pass a smaller one."
        )
    return Spent(first.reward_scale)


def next_scale(spent: Spent, kl: float, budget: float) -> Spent:
    """λ and the measured KL after an update, by the two rules at the top of this file.

    Args:
        spent: before the update.
        kl: path KL of this update, nats.
        budget: above 0, nats.
    """
    spent = replace(spent, kls=(*spent.kls, kl)[-WINDOW - BETWEEN :], rested=spent.rested + 1)
    if kl > budget:
        fall = min(FALL * math.log(kl / budget) / 2, MOST_FALL)
        return replace(spent, reward_scale=spent.reward_scale * math.exp(-fall))
    now, before = sum(spent.kls[-WINDOW:]) / WINDOW, sum(spent.kls[:WINDOW]) / WINDOW
    if spent.rested < WINDOW + BETWEEN or now >= GROWTH * before or not 0 < now < budget:
        return spent
    rise = min(math.log(budget / now) / _power(spent, now), MOST_RISE)
    rest = spent.reward_scale, now
    return replace(spent, reward_scale=spent.reward_scale * math.exp(rise), rested=0, last_rest=rest)


def _power(spent: Spent, kl: float) -> float:
    """p of KL ∝ λ^p, from the last time λ rose to now, when the KL is `kl` nats."""
    scale, before = spent.last_rest or (spent.reward_scale, kl)
    if spent.reward_scale < 1.1 * scale:
        return 2.0
    return min(max(math.log(kl / before) / math.log(spent.reward_scale / scale), 0.5), 2.0)


class KLBudget:
    """Measures the path KL of each update and adjusts λ towards the budget.

    The path KL is a sum over all steps, and an update sees the steps that carry its loss. Dividing each part by the probability
    of its step gives an unbiased estimate, which is off by a quarter each time. So the part of each step is kept from the last
    update in which it carried the loss. Once all steps have one, the KL is the sum of these parts.

    Args:
        budget: KL of the model's paths to the base's, nats.
        reduce: sums a tensor over processes, so that all have the same λ.
    """

    def __init__(self, budget: float, reduce: Callable[[Tensor], Tensor]) -> None:
        self.budget = budget
        self.spent: Spent | None = None  # None until λ is estimated or read from a checkpoint
        self._reduce = reduce
        self._sums: list[Tensor] = []  # one a micro-batch: number of images, Σ of their KL, Σ of its parts at the steps
        self._steps = LossSteps((), ())

    @property
    def reward_scale(self) -> float:
        """λ of the current update, or of the next one between updates, nats per unit of reward.

        Raises:
            ValueError: before training, which estimates λ at its start.
        """
        if self.spent is None:
            raise ValueError(f"λ for target_kl={self.budget:g} is not known yet; call train() first, which estimates it.")
        return self.spent.reward_scale

    def add(self, fit: Fit, steps: LossSteps) -> None:
        """Add the KL of a micro-batch's images that count; `steps` are the loss steps of the update."""
        values = torch.stack([torch.ones_like(fit.kl), fit.kl, *fit.step_kls.values()])
        self._sums.append(torch.where(fit.keep, values, 0.0).sum(1))
        self._steps = steps if fit.step_kls else LossSteps((), ())

    def end_update(self) -> None:
        """Adjust λ by the mean KL over the images of all micro-batches and processes, if any image counts."""
        images, *sums = self._reduce(torch.stack(self._sums).sum(0)).tolist()
        self._sums = []
        if not images or self.spent is None:
            return
        kl, *shares = (value / images for value in sums)
        now = dict(zip(self._steps.indices, shares, strict=True))
        known = self.spent.step_kls | now
        count = round(sum(1 / p for p in self._steps.inclusion))  # Σ 1/p over the drawn steps is the number of all loss steps
        if len(known) > count:  # some are from a run with another grid, which this one resumes
            known = now
        if now and len(known) == count:
            kl = sum(known.values())
        self.spent = next_scale(replace(self.spent, step_kls=known), kl, self.budget)

    def begin_update(self) -> None:
        """Drop what an update that ended in an error has left."""
        self._sums = []

    def write(self, folder: Path) -> None:
        """Write λ and the measured KL into a checkpoint."""
        if self.spent is not None:
            (folder / BUDGET_NAME).write_text(json.dumps(asdict(self.spent)), encoding="utf-8")

    def read(self, folder: Path) -> None:
        """Read λ and the measured KL from a checkpoint. If it has none, nothing changes, and a new trainer estimates λ."""
        if (folder / BUDGET_NAME).exists():
            values = json.loads((folder / BUDGET_NAME).read_text(encoding="utf-8"))
            step_kls = {int(step): share for step, share in values["step_kls"].items()}
            rest = values["last_rest"] and tuple(values["last_rest"])
            self.spent = Spent(values["reward_scale"], tuple(values["kls"]), values["rested"], rest, step_kls)
