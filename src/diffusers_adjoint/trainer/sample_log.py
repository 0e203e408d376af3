"""Per-sample metrics between two log lines, averaged over samples and processes when logged; the target KL that they give."""

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


def summarise(samples: dict[str, Tensor], images_per_prompt: int | None = None) -> dict[str, float]:
    """Means over finite values; rewards with their standard deviation and the number of missing ones; `skipped` as a count.

    Args:
        samples: name → (N,).
        images_per_prompt: n, where the values of a prompt's n images are next to each other. `reward_std` is then that of one
            prompt's images, pooled over prompts, and `reward_std_between` that of the prompts' means: a number that is added to
            the rewards of one prompt changes the second only. What has no value is left out: with one image a prompt the first,
            with one prompt the second. Without it `reward_std` is that of all values.
    """
    summary: dict[str, float] = {}
    for name, values in samples.items():
        missing = int(values.isnan().sum())  # a function's `None`, or NaN
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
    """(N,) values of images, those of a prompt next to each other → (P, n), NaN for what is not finite."""
    return values.where(values.isfinite(), torch.nan).view(-1, images_per_prompt)


def _spreads(rewards: Tensor) -> dict[str, float]:
    spreads = {"reward_std": within_prompt_std(rewards).mean, "reward_std_between": between_prompt_std(rewards)}
    return {name: value for name, value in spreads.items() if math.isfinite(value)}


def announce_memory(correlations: Tensor) -> None:
    """What the end points x̂_K remember of the noise x_0 they came from, as the mean correlation over images; 0 is memoryless.

    It biases a tilt: with a linear reward on Gaussian data, to the share 1 − correlation² of the shift (2409.08861, Prop. 1). It
    does not see memory that is not linear: the ODE of the digits pipeline has .25 (tests/test_loss_types.py).
    """
    if len(correlations) == 0:
        return
    memory = correlations.mean().item()
    error = f" ± {correlations.std().item() / math.sqrt(len(correlations)):.1g}" if len(correlations) > 1 else ""
    tell(f"leftover memory, the correlation of an image's noise x_0 and its end point x̂_K: {memory:.2g}{error}.")
    if abs(memory) > 0.2:
        logger.warning(
            f"with a correlation of {memory:.2g} the paths are not memoryless and the tilt is biased; let the pipeline start "
            f"from pure noise (not from an image at a low strength, nor far below its noisiest level), or expect less of it; "
            f"in a test with a network of random weights this is usual."
        )
