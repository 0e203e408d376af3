"""Per-sample metrics between two log lines: kept as tensors, averaged over all samples and processes when logged."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor
from transformers.utils import logging

__all__ = ["SampleLog", "announce_memory", "announce_tilt", "summarise"]

logger = logging.get_logger(__name__)


class SampleLog:
    """Collects (B,) tensors by name; a mean over them does not depend on how a batch was split."""

    def __init__(self) -> None:
        self._values: dict[str, list[Tensor]] = defaultdict(list)

    def add(self, name: str, values: Tensor) -> None:
        self._values[name].append(values.detach().flatten().float())

    def gathered(self, name: str, gather: Callable[[Tensor], Tensor]) -> Tensor:
        """The values of one name since the last `drain`, of all processes, (N,)."""
        return gather(torch.cat(self._values[name])).cpu()

    def forget(self, name: str) -> None:
        """Drop the values of one name: they are no part of the log."""
        del self._values[name]

    def drain(self, gather: Callable[[Tensor], Tensor] = lambda values: values) -> dict[str, Tensor]:
        """All values since the last call, name → (N,), gathered over processes; empties the log."""
        drained = {name: self.gathered(name, gather) for name in sorted(self._values)}
        self._values.clear()
        return drained


def summarise(samples: dict[str, Tensor]) -> dict[str, float]:
    """Means over finite values; rewards with their standard deviation too; `skipped` as a count."""
    summary: dict[str, float] = {}
    for name, values in samples.items():
        values = values[values.isfinite()]
        spread = values.std(correction=min(1, len(values) - 1)).item() if len(values) else math.nan
        if name.startswith("rewards/"):
            summary |= {f"{name}/mean": values.mean().item(), f"{name}/std": spread}
        else:
            summary[name] = (values.sum() if name == "skipped" else values.mean()).item()
        if name == "reward":
            summary["reward_std"] = spread
    return summary


def announce_tilt(scaled_rewards: Tensor) -> None:
    """How far λ asks the model to move, by the Gaussian estimate KL ≈ ½ std(λr)² (exact for a linear reward of a Gaussian)."""
    if len(scaled_rewards) < 2:
        return
    spread = scaled_rewards.std().item()
    logger.warning(f"λ·std(r) = {spread:.3g} in the first update: the target is about {spread**2 / 2:.3g} nats from the base.")
    if not 0.1 <= spread <= 10:
        logger.warning(
            f"λ·std(r) = {spread:.3g} is outside 0.1–10; {'raise' if spread < 0.1 else 'lower'} reward_scale, or expect "
            f"{'no visible change' if spread < 0.1 else 'a collapse onto the highest rewards'}."
        )


def announce_memory(correlations: Tensor) -> None:
    """What the end points x̂_K remember of the noise x_0 they came from, as the mean correlation over images; 0 is memoryless.

    It biases a tilt: with a linear reward on Gaussian data, to the share 1 − correlation² of the shift (2409.08861, Prop. 1). It
    does not see memory that is not linear: the ODE of the digits pipeline has .25 (tests/test_loss_types.py).
    """
    if len(correlations) == 0:
        return
    memory = correlations.mean().item()
    error = f" ± {correlations.std().item() / math.sqrt(len(correlations)):.1g}" if len(correlations) > 1 else ""
    logger.warning(f"leftover memory, the correlation of an image's noise x_0 and its end point x̂_K: {memory:.2g}{error}.")
    if abs(memory) > 0.2:
        logger.warning(
            f"with a correlation of {memory:.2g} the paths are not memoryless and the tilt is biased; let the pipeline start "
            f"from pure noise (not from an image at a low strength, nor far below its noisiest level), or expect less of it."
        )
