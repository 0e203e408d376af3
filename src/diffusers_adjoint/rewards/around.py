"""Functions around reward functions: rewards of different scale in one, of videos, smoothed, held in bounds.

What they give is again a reward, and a module: the modules in it are frozen, put in evaluation mode and moved with it. A function
gets the columns that it has arguments for, as in the trainer. Around one reward its name is kept, for the logs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .combine import RewardFunction, WeightedReward, with_graph
from .preprocess import check_range

__all__ = ["clamped", "gradient_clipped", "normalised", "per_frame", "smoothed", "weighted_sum"]

Columns = dict[str, list[Any]]
Score = Callable[[Tensor, list[str], Columns], Tensor]
"""Images, prompts, columns → (B,)."""


class _Around(nn.Module):
    """A reward of the score Σ_i w_i f_i.

    Args:
        functions: f_i.
        weights: w_i; `None` for all 1.
        around: f(score, images, prompts, columns) → (B,).
    """

    def __init__(
        self, functions: Sequence[RewardFunction], weights: Sequence[float] | None, around: Callable[..., Tensor]
    ) -> None:
        super().__init__()
        self.inner, self.around = WeightedReward(list(functions), weights), around
        self.parts = nn.ModuleList(f for f in functions if isinstance(f, nn.Module))
        self.__name__ = "_and_".join(self.inner.names)

    def forward(self, images: Tensor, prompts: list[str], **columns: Any) -> Tensor:
        return self.around(self._score, images, prompts, columns)

    def require_arguments(self, columns: Columns) -> set[str]:
        return self.inner.require_arguments(columns)

    def _score(self, images: Tensor, prompts: list[str], columns: Columns) -> Tensor:
        values = self.inner(images, prompts, **columns)
        if torch.is_grad_enabled() and images.requires_grad:  # in a sum nobody else would see that one has no gradient
            values |= {name: with_graph(name, values[name], images) for name in self.inner.aimed_at}
        return self.inner.total(values)


def weighted_sum(rewards: Sequence[RewardFunction], weights: Sequence[float]) -> nn.Module:
    """Σ_i w_i r_i as one reward, named "a_and_b".

    A weight of 0 leaves the reward out, its NaN too. To log the r_i, pass them to the trainer with `reward_weights` instead.

    Args:
        rewards: r_i.
        weights: w_i, finite, one for each reward; the result's unit per unit of r_i.

    Raises:
        ValueError: if there is no reward, or the weights are not finite or of another number.
        TypeError: if a reward is not callable.
    """
    if not isinstance(rewards, list | tuple):
        raise TypeError(f"rewards is a {type(rewards).__name__}; pass a list of reward functions.")
    if len(weights) != len(rewards):
        raise ValueError(f"weights has {len(weights)} entries for {len(rewards)} rewards; pass one each.")
    if not all(map(math.isfinite, weights)):
        raise ValueError(f"weights={list(weights)} are not all finite; pass numbers.")
    return _Around(rewards, weights, lambda score, *shown: score(*shown))


def normalised(reward: RewardFunction, mean: float, std: float) -> nn.Module:
    """(r − mean)/std, so that rewards of different scale can be added.

    Args:
        reward: r.
        mean, std: of r over images of the base model, in units of r; std > 0.

    Raises:
        ValueError: if one is not finite or std ≤ 0.
        TypeError: if the reward is not callable.
    """
    if not (math.isfinite(mean) and 0 < std < math.inf):
        raise ValueError(
            f"mean={mean}, std={std} give no scale; pass the finite mean and the standard deviation > 0 of the reward."
        )
    return _Around([reward], None, lambda score, *shown: (score(*shown) - mean) / std)


def clamped(reward: RewardFunction, low: float | None = None, high: float | None = None) -> nn.Module:
    """r held in [low, high]: a goal that is good enough, beyond which nothing pulls, as outside the gradient is 0.

    Args:
        reward: r.
        low, high: in units of r; `None` for no bound.

    Raises:
        ValueError: if low is not below high.
        TypeError: if the reward is not callable.
    """
    bottom, top = -math.inf if low is None else low, math.inf if high is None else high
    if not bottom < top:
        raise ValueError(f"low={low} is not below high={high}; pass low < high, or leave one out.")
    return _Around([reward], None, lambda score, *shown: score(*shown).clamp(bottom, top))


def per_frame(reward: RewardFunction, num_frames: int = 4) -> nn.Module:
    """Mean of an image reward over frames of a video.

    The frames are evenly spaced (to the nearest frame) from the first to the last, which are among them; one alone is the middle
    one, and of a shorter video it is all. They are scored in one batch of B × num_frames images.

    Args:
        reward: of images (B, 3, H, W); the prompts and columns of a video are repeated for its frames.
        num_frames: at least 1.

    Returns:
        A reward of videos (B, F, 3, H, W), which raises ValueError for images.

    Raises:
        ValueError: if num_frames < 1.
        TypeError: if the reward is not callable.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames={num_frames} leaves nothing to score; pass 1 or more.")

    def around(score: Score, videos: Tensor, prompts: list[str], columns: Columns) -> Tensor:
        if videos.ndim != 5:
            raise ValueError(
                f"images has shape {tuple(videos.shape)}; pass videos (B, F, 3, H, W), or the reward without per_frame."
            )
        frames = videos[:, _evenly_spaced(num_frames, videos.shape[1])]
        count = frames.shape[1]
        repeated = {name: _repeated(values, count) for name, values in columns.items()}
        return score(frames.flatten(0, 1), _repeated(prompts, count), repeated).view(-1, count).mean(1)

    return _Around([reward], None, around)


def _evenly_spaced(count: int, of: int) -> list[int]:
    count = min(count, of)
    if count == 1:
        return [of // 2]
    return [round(i * (of - 1) / (count - 1)) for i in range(count)]


def _repeated(values: Sequence[Any], times: int) -> list[Any]:
    return [value for value in values for _ in range(times)]


def smoothed(reward: RewardFunction, std: float = 0.02, num_copies: int = 20, seed: int = 0) -> nn.Module:
    """Mean of r over noisy copies, (1/n) Σ_i r(clip(x + std ε_i, 0, 1)): detail that only a reward sees averages out.

    The noise ε_i is drawn once and for all, the same for every image, batch and call. So this is a function like any other, and
    the exact target is p_base e^{λ·smoothed r}. What is clipped in a copy has no gradient there.

    The copies go through the reward one after the other, and for the gradient once more (checkpointing): that takes the memory of
    one, and the time of num_copies rewards with two forward passes and one back each.

    Args:
        reward: r; of videos too.
        std: of the noise, in units of the [0, 1] range, > 0.
        num_copies: n ≥ 1.
        seed: of the noise, drawn on the CPU so that every device sees the same.

    Raises:
        ValueError: if std is not positive and finite, or num_copies < 1.
        TypeError: if the reward is not callable.
    """
    if not 0 < std < math.inf:
        raise ValueError(f"std={std} is no spread of noise; pass a number > 0, such as 0.02.")
    if num_copies < 1:
        raise ValueError(f"num_copies={num_copies} leaves nothing to average; pass 1 or more.")

    def around(score: Score, images: Tensor, prompts: list[str], columns: Columns) -> Tensor:
        if images.ndim not in (4, 5):
            raise ValueError(f"images has shape {tuple(images.shape)}; pass images (B, C, H, W) or videos (B, F, C, H, W).")
        finite = images[images.detach().flatten(1).isfinite().all(1)]  # the others have no reward
        if len(finite):  # the reward sees copies that are cut to the range, whatever they were
            check_range(finite)
        x = images.to(torch.promote_types(images.dtype, torch.float32))  # 16 bits would round the noise
        generator = torch.Generator().manual_seed(seed)
        values = []
        for _ in range(num_copies):
            noise = std * torch.randn(x.shape[1:], generator=generator).to(x)
            values.append(checkpoint(score, (x + noise).clamp(0, 1), prompts, columns, use_reentrant=False))
        return torch.stack(values).mean(0)

    return _Around([reward], None, around)


def gradient_clipped(reward: RewardFunction, max_norm: float) -> nn.Module:
    """r itself, but its gradient in the pixels of one image is shortened to `max_norm` where it is longer.

    A guard against rare images with huge gradients. Where it acts the gradient is that of no reward, and the target no longer
    exactly the tilt p_base e^{λr}; to keep the target exact use `smoothed` or `clamped`.

    Args:
        reward: r.
        max_norm: of ∂r/∂pixels, before any weight, in units of r per unit of the [0, 1] range, > 0.

    Raises:
        ValueError: if max_norm is not positive and finite.
        TypeError: if the reward is not callable.
    """
    if not 0 < max_norm < math.inf:
        raise ValueError(f"max_norm={max_norm} is no length; pass a number > 0.")

    def around(score: Score, images: Tensor, prompts: list[str], columns: Columns) -> Tensor:
        seen = images.view_as(images)  # a node of its own in the graph, for this reward's gradient alone
        value = score(seen, prompts, columns)
        if value.requires_grad and seen.requires_grad:
            factors: list[Tensor] = []  # what ∂r/∂pixels comes multiplied by: weights, and whatever is around this
            value.register_hook(factors.append)
            seen.register_hook(lambda gradient: _shortened(gradient, max_norm * factors[-1].abs()))
        return value

    return _Around([reward], None, around)


def _shortened(gradient: Tensor, lengths: Tensor) -> Tensor:
    """(B, …), each of the B at most as long as it should be."""
    norms = torch.linalg.vector_norm(gradient.flatten(1), dim=1)
    factor = torch.where(norms > lengths, lengths / norms, 1.0).to(gradient.dtype)
    return gradient * factor.view(-1, *[1] * (gradient.ndim - 1))
