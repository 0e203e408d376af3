"""Functions that wrap reward functions: sum, normalise, clamp, smooth, average over frames, clip the gradient.

The result is a reward again, and a module: modules inside it are frozen, put in evaluation mode and moved with it. Each reward
function gets the dataset columns that it has arguments for, as in the trainer. A wrapper of one reward keeps its name in the
logs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence, Sized
from functools import partial
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from ..replay.plain import AUDIO
from .combine import RewardFunction, WeightedReward, with_graph
from .preprocess import check_images, check_tensor

__all__ = ["clamped", "gradient_clipped", "normalised", "per_frame", "smoothed", "weighted_sum"]

Columns = dict[str, list[Any]]
Score = Callable[[Tensor, list[str], Columns], Tensor]
"""Images, prompts, columns → (B,)."""


class _Around(nn.Module):
    """A reward computed from the score Σ_i w_i f_i.

    Args:
        functions: f_i.
        weights: w_i; `None` for all 1.
        around: f(score, images, prompts, columns) → the reward, (B,); `score` is a function of the other three.
        frames: f(number of frames in a video) → the frames that are used; `None` for those that the functions use.
    """

    def __init__(
        self,
        functions: Sequence[RewardFunction],
        weights: Sequence[float] | None,
        around: Callable[..., Tensor],
        frames: Callable[[int], list[int]] | None = None,
    ) -> None:
        super().__init__()
        for function in functions:
            if not callable(function):
                raise TypeError(f"reward {function!r} is not callable; pass f(images=, prompts=, **columns).")
        self.inner, self.around, self.frames = WeightedReward(list(functions), weights), around, frames
        self.parts = nn.ModuleList(f for f in functions if isinstance(f, nn.Module))
        self.__name__ = "_and_".join(self.inner.names)

    def forward(self, images: Tensor, prompts: list[str], **columns: Any) -> Tensor:
        check_tensor(images)
        return self.around(self._score, images, prompts, columns)

    def require_arguments(self, columns: Columns, *, with_audio: bool = False) -> set[str]:
        return self.inner.require_arguments(columns, with_audio=with_audio)

    def asked_frames(self, num_frames: int) -> set[int]:
        return self.inner.asked_frames(num_frames) if self.frames is None else set(self.frames(num_frames))

    def _score(self, images: Tensor, prompts: list[str], columns: Columns) -> Tensor:
        values = self.inner(images, prompts, **columns)
        if torch.is_grad_enabled() and images.requires_grad:  # the sum would hide that one of its rewards has no gradient
            shown = [part for part in (images, columns.get(AUDIO)) if isinstance(part, Tensor) and part.requires_grad]
            values |= {name: with_graph(name, values[name], *shown) for name in self.inner.aimed_at}
        return self.inner.total(values)


def weighted_sum(rewards: Sequence[RewardFunction], weights: Sequence[float]) -> nn.Module:
    """The sum Σ_i w_i r_i as one reward, named "a_and_b".

    A reward may have no value (NaN) for some images, such as those of another task. The sum is over the rewards that have one,
    and NaN if none has. A weight of 0 leaves a reward out. To log each r_i, pass the rewards to the trainer with `reward_weights`
    instead.

    Args:
        rewards: r_i.
        weights: w_i, finite, one for each reward; the result's unit per unit of r_i.

    Raises:
        ValueError: if there is no reward, a weight is not finite, or the numbers of rewards and weights differ.
        TypeError: if a reward is not callable, a weight is not a number, or either argument is not a list.
    """
    if not isinstance(rewards, list | tuple):
        raise TypeError(f"rewards is a {type(rewards).__name__}; pass a list of reward functions.")
    if not rewards:
        raise ValueError("rewards is empty; pass at least one reward function.")
    if not isinstance(weights, Sized):
        raise TypeError(f"weights is a {type(weights).__name__}; pass a list of numbers.")
    if len(weights) != len(rewards):
        raise ValueError(f"weights has {len(weights)} entries for {len(rewards)} rewards; pass one each.")
    _require_numbers(**{f"weights[{i}]": weight for i, weight in enumerate(weights)})
    if not all(map(math.isfinite, weights)):
        raise ValueError(f"weights={list(weights)} are not all finite; pass numbers.")
    return _Around(rewards, weights, lambda score, *shown: score(*shown))


def normalised(reward: RewardFunction, mean: float, std: float) -> nn.Module:
    """(r − mean)/std, so that rewards of different scales can be added.

    Args:
        reward: r.
        mean, std: mean and standard deviation of r over images of the base model, in units of r; std > 0.

    Raises:
        ValueError: if one of them is not finite, or std ≤ 0.
        TypeError: if the reward is not callable, or mean or std is not a number.
    """
    _require_numbers(mean=mean, std=std)
    if not (math.isfinite(mean) and 0 < std < math.inf):
        raise ValueError(
            f"mean={mean}, std={std} cannot normalise a reward; pass its finite mean and its standard deviation > 0."
        )
    return _Around([reward], None, lambda score, *shown: (score(*shown) - mean) / std)


def clamped(reward: RewardFunction, low: float | None = None, high: float | None = None) -> nn.Module:
    """r clamped to [low, high]. Outside the gradient is 0, so that a value of `high` is good enough and is not pushed further.

    Args:
        reward: r.
        low, high: bounds in units of r; `None` for no bound.

    Raises:
        ValueError: if low is not below high.
        TypeError: if the reward is not callable, or a bound is not a number.
    """
    bottom, top = -math.inf if low is None else low, math.inf if high is None else high
    _require_numbers(low=bottom, high=top)
    if not bottom < top:
        raise ValueError(f"low={low} is not below high={high}; pass low < high, or leave one out.")
    return _Around([reward], None, lambda score, *shown: score(*shown).clamp(bottom, top))


def per_frame(reward: RewardFunction, num_frames: int = 4) -> nn.Module:
    """Mean of an image reward over evenly spaced frames of a video.

    The frames include the first and the last; a single frame is the middle one; a shorter video has all its frames scored. They
    are scored in one batch of B × num_frames images. With `decode_frames="asked"` the trainer decodes only what these frames
    need.

    Args:
        reward: a reward of images (B, 3, H, W). It gets the prompt and the columns of the video for each frame.
        num_frames: number of frames, at least 1.

    Returns:
        A reward of videos (B, F, 3, H, W) in [0, 1], which raises ValueError for images.

    Raises:
        ValueError: if num_frames < 1.
        TypeError: if the reward is not callable, or num_frames is not a whole number.
    """
    _require_counts(num_frames=num_frames)
    if num_frames < 1:
        raise ValueError(f"num_frames={num_frames} leaves no frame to score; pass 1 or more.")

    def around(score: Score, videos: Tensor, prompts: list[str], columns: Columns) -> Tensor:
        if videos.ndim != 5:
            raise ValueError(
                f"images has shape {tuple(videos.shape)}; pass videos (B, F, 3, H, W), or the reward without per_frame."
            )
        frames = videos[:, spaced(videos.shape[1])]
        count = frames.shape[1]
        repeated = {name: _repeated(values, count) for name, values in columns.items()}
        return score(frames.flatten(0, 1), _repeated(prompts, count), repeated).view(-1, count).mean(1)

    spaced = partial(_evenly_spaced, num_frames)
    return _Around([reward], None, around, spaced)


def _evenly_spaced(count: int, of: int) -> list[int]:
    count = min(count, of)
    if count == 1:
        return [of // 2]
    return [round(i * (of - 1) / (count - 1)) for i in range(count)]


def _repeated(values: Any, times: int) -> Any:
    """Each entry of a list, or each row of a tensor, so many times in a row."""
    if isinstance(values, Tensor):
        return values.repeat_interleave(times, 0)
    return [value for value in values for _ in range(times)]


def smoothed(reward: RewardFunction, std: float = 0.02, num_copies: int = 20, seed: int = 0) -> nn.Module:
    """Mean of r over noisy copies, (1/n) Σ_i r(clip(x + std·ε_i, 0, 1)). It averages out details that only the reward sees.

    The noise ε_i is the same for every image, batch and call, so this is a fixed function, and the exact target is
    p_base·exp(λ·smoothed r). Where a copy is clipped to [0, 1], its gradient is 0.

    The copies are scored one after the other with gradient checkpointing. This takes the memory of one reward, and the time of
    num_copies rewards with two forward passes and one backward pass each.

    Args:
        reward: r, of images or videos.
        std: standard deviation of the noise, in units of the [0, 1] range, > 0.
        num_copies: n ≥ 1.
        seed: of the noise, which is drawn on the CPU and therefore the same on every device.

    Raises:
        ValueError: if std is not positive and finite, or num_copies < 1.
        TypeError: if the reward is not callable, std is not a number, or num_copies or seed is not a whole number.
    """
    _require_numbers(std=std)
    _require_counts(num_copies=num_copies, seed=seed)
    if not 0 < std < math.inf:
        raise ValueError(f"std={std} is not a standard deviation; pass a number > 0, such as 0.02.")
    if num_copies < 1:
        raise ValueError(f"num_copies={num_copies} leaves no copy to score; pass 1 or more.")

    def around(score: Score, images: Tensor, prompts: list[str], columns: Columns) -> Tensor:
        """The mean of the scores of noisy copies."""
        frames = images.flatten(0, 1) if images.ndim == 5 else images
        # Checked here, because the reward sees clipped copies, which are always in range.
        check_images(frames.detach().nan_to_num(0.5, 0.5, 0.5))
        x = images.where(images.isfinite(), torch.nan)  # such an image has no reward; the clip would turn infinity into 1
        x = x.to(torch.promote_types(x.dtype, torch.float32))  # in 16 bits the noise would be rounded
        generator = torch.Generator().manual_seed(seed)
        values = []
        for _ in range(num_copies):
            noise = std * torch.randn(x.shape[1:], generator=generator).to(x)
            values.append(checkpoint(score, (x + noise).clamp(0, 1), prompts, columns, use_reentrant=False))
        return torch.stack(values).mean(0)

    return _Around([reward], None, around)


def gradient_clipped(reward: RewardFunction, max_norm: float) -> nn.Module:
    """r with its gradient clipped: ∂r/∂pixels of each image has at most the norm `max_norm`. The value is not changed.

    It protects against rare images with huge gradients. A clipped gradient is not the gradient of any reward, so the target is no
    longer exactly p_base·exp(λr); `smoothed` and `clamped` keep it exact.

    Args:
        reward: r.
        max_norm: largest norm of ∂r/∂pixels of one image, before any weight, in units of r per unit of the [0, 1] range, > 0.

    Raises:
        ValueError: if max_norm is not positive and finite.
        TypeError: if the reward is not callable, or max_norm is not a number.
        RuntimeError: from autograd, if the reward is differentiated twice.
    """
    _require_numbers(max_norm=max_norm)
    if not 0 < max_norm < math.inf:
        raise ValueError(f"max_norm={max_norm} is not a norm; pass a finite number > 0.")

    def around(score: Score, images: Tensor, prompts: list[str], columns: Columns) -> Tensor:
        """The score, with its gradient in the images shortened."""
        if not (torch.is_grad_enabled() and images.requires_grad):
            return score(images, prompts, columns)
        x = images.detach().requires_grad_()
        sound: Any = columns.get(AUDIO)
        value = score(x, prompts, columns)
        hears = [sound] if isinstance(sound, Tensor) and sound.requires_grad else []
        gradient, *of_sound = torch.autograd.grad(value.sum(), [x, *hears], allow_unused=True, retain_graph=bool(hears))
        if gradient is not None and any(part is not None for part in of_sound):
            raise ValueError(
                "gradient_clipped shortens the gradient in the pixels, and this reward has one in the sound too; put it around "
                "one of the images alone."
            )
        if gradient is None:  # the value requires a gradient, but does not depend on the images
            return value
        with_gradient: Callable[..., Tensor] = _WithGradient.apply
        return with_gradient(images, value.detach(), _shortened(gradient, max_norm))

    return _Around([reward], None, around)


class _WithGradient(torch.autograd.Function):
    """Returns `value`, (B,), with `gradient`, (B, …), as its derivative in the images; cannot be differentiated twice."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factors: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return _times(gradient, factors), None, None


def _shortened(gradient: Tensor, length: float) -> Tensor:
    """Gradients (B, …), each scaled down to norm `length` if it is longer."""
    norms = torch.linalg.vector_norm(gradient.flatten(1), dim=1)
    return _times(gradient, length / norms.clamp_min(length))


def _times(gradient: Tensor, factors: Tensor) -> Tensor:
    """Gradients (B, …) times factors (B,)."""
    return gradient * factors.to(gradient.dtype).view(-1, *[1] * (gradient.ndim - 1))


def _require_numbers(**values: Any) -> None:
    for name, value in values.items():
        if not isinstance(value, Real | Tensor):
            raise TypeError(f"{name} is {value!r}; pass a number.")


def _require_counts(**values: Any) -> None:
    for name, value in values.items():
        if not isinstance(value, Integral):
            raise TypeError(f"{name} is {value!r}; pass a whole number.")
