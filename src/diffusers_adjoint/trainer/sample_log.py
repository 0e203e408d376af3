"""Per-sample metrics between two log lines, averaged over samples and processes when logged; the target KL that they give."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers.utils import logging

from ..metrics.estimate import between_prompt_std, within_prompt_std

__all__ = ["SampleLog", "Target", "announce_memory", "announce_tilt", "exceeds_target", "per_prompt", "summarise"]

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
    logger.warning(f"λ·std(r) = {spread:.3g} ± {error:.1g} within a prompt: the target is about {target:.3g} nats from the base.")
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


class Target:
    """How far from the base training is to end, in nats, and whether the user was told that it went further."""

    def __init__(self) -> None:
        self._kl: float | None = None
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
            f"from pure noise (not from an image at a low strength, nor far below its noisiest level), or expect less of it; "
            f"in a test with a network of random weights this is usual."
        )
