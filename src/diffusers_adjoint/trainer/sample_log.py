"""Measurements of single images between two log lines, averaged over images and processes when they are logged."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor
from transformers.utils import logging

from ..metrics.estimate import between_prompt_std, within_prompt_std
from .tell import tell

__all__ = ["SampleLog", "announce_memory", "per_prompt", "summarise"]

logger = logging.get_logger(__name__)


class SampleLog:
    """Collects (B,) tensors by name. Means are taken over all values, so they do not depend on the micro-batches."""

    def __init__(self) -> None:
        self._values: dict[str, list[Tensor]] = defaultdict(list)

    def add(self, name: str, values: Tensor) -> None:
        self._values[name].append(values.detach().flatten().float())

    def gathered(self, name: str, gather: Callable[[Tensor], Tensor]) -> Tensor:
        """The values of `name` since the last `drain`, from all processes, (N,) float32 on the CPU."""
        return gather(torch.cat(self._values[name])).cpu()

    def forget(self, name: str) -> None:
        """Drop the values of `name`, which are not logged."""
        del self._values[name]

    def drain(self, gather: Callable[[Tensor], Tensor] = lambda values: values) -> dict[str, Tensor]:
        """Return all values since the last call, name → (N,), gathered over processes, and forget them."""
        drained = {name: self.gathered(name, gather) for name in sorted(self._values)}
        self._values.clear()
        return drained


def summarise(samples: dict[str, Tensor], images_per_prompt: int | None = None) -> dict[str, float]:
    """Means over finite values. Each reward also has its standard deviation and the number of missing ones; `skipped` is a sum.

    Args:
        samples: name → (N,).
        images_per_prompt: n, if the values of a prompt's n images are next to each other. Then `reward_std` is the standard
            deviation of one prompt's images, pooled over prompts, and is left out for n = 1. `reward_std_between` is that of the
            prompts' means, and is left out for one prompt. When not given, `reward_std` is that of all values.
    """
    summary: dict[str, float] = {}
    for name, values in samples.items():
        missing = int(values.isnan().sum())  # the reward function returned None or NaN
        finite = values[values.isfinite()]
        spread = finite.std(correction=min(1, len(finite) - 1)).item() if len(finite) else math.nan
        if name.startswith("rewards/"):
            summary |= {f"{name}/mean": finite.mean().item(), f"{name}/std": spread, f"{name}/missing": missing}
        else:
            summary[name] = (finite.sum() if name == "skipped" else finite.mean()).item()
        if name == "reward":
            summary |= {"reward_std": spread} if images_per_prompt is None else _spreads(per_prompt(values, images_per_prompt))
    return summary


def per_prompt(values: Tensor, images_per_prompt: int) -> Tensor:
    """Values (N,), those of a prompt's n images next to each other → (P, n), with NaN for values that are not finite."""
    return values.where(values.isfinite(), torch.nan).view(-1, images_per_prompt)


def _spreads(rewards: Tensor) -> dict[str, float]:
    spreads = {"reward_std": within_prompt_std(rewards).mean, "reward_std_between": between_prompt_std(rewards)}
    return {name: value for name, value in spreads.items() if math.isfinite(value)}


def announce_memory(correlations: Tensor) -> None:
    """Print the memory of the paths: the mean correlation, over images, of the noise x_0 and the end point x̂_K. 0 is memoryless.

    Memory biases the tilt: with a linear reward on Gaussian data, training reaches the share 1 − correlation² of the shift
    (2409.08861, Prop. 1). The correlation only sees linear memory: an ODE, which forgets nothing, has .25 on the digits pipeline
    (tests/test_loss_types.py).

    Args:
        correlations: of the images of one update, (N,).
    """
    if len(correlations) == 0:
        return
    memory = correlations.mean().item()
    error = f" ± {correlations.std().item() / math.sqrt(len(correlations)):.1g}" if len(correlations) > 1 else ""
    tell(f"leftover memory, the correlation of an image's noise x_0 and its end point x̂_K: {memory:.2g}{error}.")
    if abs(memory) > 0.2:
        logger.warning(
            f"with a correlation of {memory:.2g} the paths are not memoryless and the tilt is biased; let the pipeline start "
            f"from pure noise, not from an image at a low strength, nor far below its noisiest level (in a test with a network "
            f"of random weights a high correlation is usual)."
        )
