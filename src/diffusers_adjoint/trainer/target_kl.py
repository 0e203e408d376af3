"""The KL between target and base that λ implies, in nats: estimated before training, and compared with the measured KL."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor
from transformers.utils import logging

from ..metrics.estimate import within_prompt_std
from .tell import tell

__all__ = ["TargetKL", "announce_tilt", "exceeds_target"]

logger = logging.get_logger(__name__)


class TargetKL:
    """The KL from the base that training should reach, in nats. Warns once if training goes much further.

    Args:
        asked: `target_kl`, if the user has set it; otherwise `announce` estimates the KL from λ.
    """

    def __init__(self, asked: float | None = None) -> None:
        self._kl = asked
        self._left = False

    def announce(self, reward_scale: float, rewards: Tensor) -> None:
        """Estimate the KL by `announce_tilt`, which prints it."""
        self._kl = announce_tilt(reward_scale, rewards)

    def logged(self, history: Sequence[dict[str, float]]) -> dict[str, float]:
        """The KL under its name in the log, if it is known. A resumed run finds it in `history`, the log lines so far."""
        if self._kl is None:
            known = [line["target_kl_estimate"] for line in history if "target_kl_estimate" in line]
            self._kl = known[-1] if known else None
        return {} if self._kl is None else {"target_kl_estimate": self._kl}

    def watch(self, line: dict[str, float]) -> None:
        """Warn if a log line `exceeds_target`; at most once."""
        self._left = self._left or exceeds_target(line)


def announce_tilt(reward_scale: float, rewards: Tensor) -> float | None:
    """Estimate the KL of the tilted distribution to the base and print it: KL ≈ ½ std(λr)², exact for a linear reward of a
    Gaussian.

    Each prompt has its own tilted distribution, so std(r) is taken over images of one prompt. Differences between prompts do not
    count.

    Args:
        reward_scale: λ, nats per unit of reward.
        rewards: rewards of images of the base, shape (P, n) for n images of each of P prompts, NaN where one is missing.

    Returns:
        The estimate in nats, averaged over prompts; `None`, with a warning, if no prompt has two rewards.
    """
    std = within_prompt_std(rewards)
    if not math.isfinite(std.mean):
        logger.warning(
            "the KL between target and base cannot be estimated, because no prompt has two images with a finite reward; pass "
            "probe_base=True, or num_generations=2 or more."
        )
        return None
    spread, error = reward_scale * std.mean, reward_scale * std.standard_error
    target = spread**2 / 2
    tell(f"λ·std(r) = {spread:.3g} ± {error:.1g} within a prompt: the target is about {target:.3g} nats from the base.")
    if not 0.1 <= spread <= 10:
        logger.warning(
            f"λ·std(r) = {spread:.3g} is outside 0.1–10; {'raise' if spread < 0.1 else 'lower'} reward_scale, or expect "
            f"{'no visible change' if spread < 0.1 else 'a collapse onto the highest rewards'}."
        )
    return target


def exceeds_target(logs: dict[str, float]) -> bool:
    """Whether the KL in a log line is above three times the estimated target plus one nat; warns if it is.

    Three times and one nat leave room for the error of the estimate and for the noise of a mean over few images.
    """
    target = logs.get("target_kl_estimate", math.inf)
    found = [(name, logs[name]) for name in ("kl", "kl_unguided") if logs.get(name, 0.0) > 3 * target + 1]
    for name, kl in found:
        logger.warning(
            f"{name} = {kl:.3g} nats, but the target is about {target:.3g} nats from the base: training went past it; lower "
            f"learning_rate."
        )
    return bool(found)
