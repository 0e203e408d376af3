r"""λ that follows a budget of KL: estimated from images of the base, and moved while training measures what is spent.

A model that learns lags behind its λ, so that what is spent now says little about where this λ leads. Hence two rules:

- λ falls at once when an update's KL is above the budget, by log λ −= min(½ a log(KL/budget), .1), a = .2;
- it rises only where the KL has come to rest: when the mean of the last 5 updates has grown by less than 5 % over that of 5
  updates 10 before. It rises at once by (budget/KL)^{1/p}, by at most e^{1/2}, and then not for the 15 updates that are compared.
  p is the power with which KL grew from the last such rest to this one, between ½ and 2. It is 2 at the first one
  (`metrics.scale`), and where λ has grown by less than a tenth since, which tells nothing.

A rule that moves λ by log(budget/KL) alone, in both directions, goes past the budget as long as the learner lags: to twice of it
from the right λ, where these rules stay within a fifth (`tests/test_kl_budget.py`).
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
FIRST_SHARE = 1 / 3  # of the budget, which λ is to spend at first
WINDOW, BETWEEN, GROWTH = 5, 10, 1.05


@dataclass(frozen=True)
class Spent:
    """What a checkpoint keeps: λ, and what was measured.

    Args:
        reward_scale: λ of the coming update, nats per unit of reward.
        kls: of the last updates, nats, as many as are compared.
        rested: updates since λ last rose.
        last_rest: λ and KL, nats, where it did.
        step_kls: step → its share of the KL when it was last trained on, mean over images, nats.
    """

    reward_scale: float
    kls: tuple[float, ...] = ()
    rested: int = 0
    last_rest: tuple[float, float] | None = None
    step_kls: dict[int, float] = field(default_factory=dict)


def first_scale(rewards: Tensor, budget: float) -> Spent:
    """λ to begin with, where a third of the budget is spent by `tilt_scale`, and a line that says it.

    The estimate is off by a tenth to a third, and a chain of few steps spends more at a λ than the tilt does. From below a rise
    mends that in some updates; what was spent beyond the budget is spent.

    Args:
        rewards: of images of the base, shape (P, n), NaN where one is missing.
        budget: above 0, nats.

    Raises:
        ValueError: if the rewards do not tell the images of a prompt apart.
    """
    whole = tilt_scale(rewards, budget)  # before the share of it, so that an error names the budget
    first = tilt_scale(rewards, FIRST_SHARE * budget)
    tell(
        f"target_kl={budget:g} nats: λ begins at {first.reward_scale:.4g}, where {rewards.numel()} images of the base say that "
        f"a third of it is spent; all of it at {whole.reward_scale:.4g}."
    )
    if whole.saturated:
        logger.warning(
            f"even the images of the highest rewards are {whole.measured:.2g} nats from the base: target_kl={budget:g} may be "
            f"out of reach, and then λ rises without end; pass a smaller one."
        )
    return Spent(first.reward_scale)


def next_scale(spent: Spent, kl: float, budget: float) -> Spent:
    """By the rules above.

    Args:
        kl: of this update, nats.
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
    """p of KL ∝ λ^p between the last rest and this one, with `kl` nats."""
    scale, before = spent.last_rest or (spent.reward_scale, kl)
    if spent.reward_scale < 1.1 * scale:
        return 2.0
    return min(max(math.log(kl / before) / math.log(spent.reward_scale / scale), 0.5), 2.0)


class KLBudget:
    """The budget of a run, what is spent of it, and the images of the update under way.

    Which steps carry the loss differs from update to update, and so do their shares of the KL: the estimate that divides each by
    the probability of its choice is right in the mean, and off by a quarter each time. So each step's share is remembered from
    when it was last trained on, and as soon as all are known the KL is their sum.

    Args:
        budget: KL of the model's paths to the base's, nats.
        reduce: sums a tensor over processes, all of which so come to the same λ.
    """

    def __init__(self, budget: float, reduce: Callable[[Tensor], Tensor]) -> None:
        self.budget = budget
        self.spent: Spent | None = None  # until λ was estimated, or read from a checkpoint
        self._reduce = reduce
        self._sums: list[Tensor] = []  # of each micro-batch: images, Σ of their KL, and of their shares at the steps
        self._steps = LossSteps((), ())

    @property
    def reward_scale(self) -> float:
        """λ of the update under way, or of the coming one, nats per unit of reward.

        Raises:
            ValueError: before training, which estimates it.
        """
        if self.spent is None:
            raise ValueError(f"no λ is known yet for target_kl={self.budget:g}; call train() first, which estimates it.")
        return self.spent.reward_scale

    def add(self, fit: Fit, steps: LossSteps) -> None:
        """What a micro-batch has found, of the images that train; `steps` are those of the whole update."""
        values = torch.stack([torch.ones_like(fit.kl), fit.kl, *fit.step_kls.values()])
        self._sums.append(torch.where(fit.keep, values, 0.0).sum(1))
        self._steps = steps if fit.step_kls else LossSteps((), ())

    def end_update(self) -> None:
        """Move λ by what the images of all micro-batches and processes have spent in the mean, if one trains."""
        images, *sums = self._reduce(torch.stack(self._sums).sum(0)).tolist()
        self._sums = []
        if not images or self.spent is None:
            return
        kl, *shares = (value / images for value in sums)
        now = dict(zip(self._steps.indices, shares, strict=True))
        known = self.spent.step_kls | now
        count = round(sum(1 / p for p in self._steps.inclusion))  # Σ 1/p over the chosen steps: how many could have been
        if len(known) > count:  # some are of another grid, before the run was resumed
            known = now
        if now and len(known) == count:
            kl = sum(known.values())
        self.spent = next_scale(replace(self.spent, step_kls=known), kl, self.budget)

    def begin_update(self) -> None:
        """Forget the images of an update that an error has ended."""
        self._sums = []

    def write(self, folder: Path) -> None:
        """Into a checkpoint."""
        if self.spent is not None:
            (folder / BUDGET_NAME).write_text(json.dumps(asdict(self.spent)), encoding="utf-8")

    def read(self, folder: Path) -> None:
        """From a checkpoint, if it has one; else what is known stays, and a new trainer has λ still to estimate."""
        if (folder / BUDGET_NAME).exists():
            values = json.loads((folder / BUDGET_NAME).read_text(encoding="utf-8"))
            step_kls = {int(step): share for step, share in values["step_kls"].items()}
            rest = values["last_rest"] and tuple(values["last_rest"])
            self.spent = Spent(values["reward_scale"], tuple(values["kls"]), values["rested"], rest, step_kls)
