"""How far λ asks the model to move, in nats: announced before training, and watched while it goes on."""

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
    """How far from the base training is to end, in nats, and whether the user was told that it went further.

    Args:
        asked: by the user, who sets λ otherwise.
    """

    def __init__(self, asked: float | None = None) -> None:
        self._kl = asked
        self._left = False

    def announce(self, reward_scale: float, rewards: Tensor) -> None:
        """Estimate it by `announce_tilt`, which says so."""
        self._kl = announce_tilt(reward_scale, rewards)

    def logged(self, history: Sequence[dict[str, float]]) -> dict[str, float]:
        """By its name in the log, where it is known; a resumed run knows it from its `history`, the lines before."""
        if self._kl is None:
            known = [line["target_kl_estimate"] for line in history if "target_kl_estimate" in line]
            self._kl = known[-1] if known else None
        return {} if self._kl is None else {"target_kl_estimate": self._kl}

    def watch(self, line: dict[str, float]) -> None:
        """Warn if a line of the log `exceeds_target`, once."""
        self._left = self._left or exceeds_target(line)


def announce_tilt(reward_scale: float, rewards: Tensor) -> float | None:
    """How far λ asks the model to move, by the Gaussian estimate KL ≈ ½ std(λr)² (exact for a linear reward of a Gaussian).

    The target is one for each prompt, so the spread is that of one prompt's images: what differs between prompts is no tilt.

    Args:
        rewards: of images of the base, shape (P, n) for n images of each of P prompts, NaN where one is missing.

    Returns:
        The estimate in nats, averaged over prompts; `None`, and a line that says so, where no prompt has two rewards.
    """
    std = within_prompt_std(rewards)
    if not math.isfinite(std.mean):
        logger.warning(
            "how far λ asks the model to move cannot be estimated, because no prompt has two images with a finite reward; pass "
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
    """Whether a line of the log has a KL beyond three times the announced target plus one nat; says so if it has.

    The estimate of the target is rough, and a mean over few images is noisy: three times and one nat are beyond both.
    """
    target = logs.get("target_kl_estimate", math.inf)
    found = [(name, logs[name]) for name in ("kl", "kl_unguided") if logs.get(name, 0.0) > 3 * target + 1]
    for name, kl in found:
        logger.warning(
            f"{name} = {kl:.3g} nats, but the target is about {target:.3g} nats from the base: training went past it; lower "
            f"learning_rate."
        )
    return bool(found)
