"""One reward out of several, its checks, and its gradient with respect to the latent state."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..adjoint import vector_jacobian

__all__ = ["RewardFunction", "RewardGradient", "WeightedReward", "reward_gradient", "with_graph"]

RewardFunction = Callable[..., Tensor]
"""f(images=(B, 3, H, W) in [0, 1], prompts=list of B, **dataset columns) → (B,), differentiable in `images`."""


class WeightedReward:
    """r = Σ_i w_i f_i.

    Args:
        reward_funcs: one callable or module, or several. Modules are frozen and put in evaluation mode.
        weights: w_i, one for each function; `None` for all 1.

    Raises:
        TypeError: if one of them is not callable.
        ValueError: if there is none, or the number of weights differs.
    """

    def __init__(self, reward_funcs: RewardFunction | Sequence[RewardFunction], weights: Sequence[float] | None = None) -> None:
        functions: list[Any] = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
        if not functions:
            raise ValueError("reward_funcs is empty; pass at least one reward function.")
        for function in functions:
            if not callable(function):
                raise TypeError(f"reward_funcs contains {function!r}; pass callables f(images=, prompts=, **columns).")
        weights = [1.0] * len(functions) if weights is None else list(weights)
        if len(weights) != len(functions):
            raise ValueError(f"reward_weights has {len(weights)} entries for {len(functions)} reward functions; pass one each.")
        self.functions, self.weights = functions, weights
        self.names = _unique_names(functions)
        for module in (f for f in functions if isinstance(f, nn.Module)):
            module.requires_grad_(False).eval()  # frozen, but not under no_grad: the gradient goes through to the images

    def to(self, device: torch.device) -> WeightedReward:
        for module in (f for f in self.functions if isinstance(f, nn.Module)):
            module.to(device)
        return self

    def require_arguments(self, columns: dict[str, list[Any]]) -> set[str]:
        """The columns that a function asks for by name.

        Raises:
            ValueError: if a function cannot be called with images, prompts and what it takes of these dataset columns.
        """
        asked: set[str] = set()
        for name, function in zip(self.names, self.functions, strict=True):
            if hasattr(function, "require_arguments"):  # a function around others, which knows what they ask for
                asked |= function.require_arguments(columns)
                continue
            signature = _signature(function)
            try:
                signature.bind(images=None, prompts=None, **_taken(function, columns))
            except TypeError as error:
                raise ValueError(
                    f"reward {name!r} cannot be called as f(images=, prompts=, **columns) with the columns {sorted(columns)} "
                    f"({error}); give it these arguments, or the dataset the missing columns."
                ) from None
            asked |= signature.parameters.keys()
        return asked

    def __call__(self, images: Tensor, prompts: list[str], **columns: list[Any]) -> dict[str, Tensor]:
        """Each function's value, name → (B,) float32 or better. A function gets the columns that it has arguments for.

        It never sees NaN or infinite pixels, as an overflowing 16-bit decoder makes them: such an image has the value NaN.

        Raises:
            TypeError: if a function does not return a tensor.
            ValueError: if it does not return one value for each image, on their device.
        """
        finite = images.detach().flatten(1).isfinite().all(1)
        shown = images if finite.all() else torch.where(finite.view(-1, *[1] * (images.ndim - 1)), images, 0.5)
        values = {
            name: _checked(function(images=shown, prompts=prompts, **_taken(function, columns)), name, images)
            for name, function in zip(self.names, self.functions, strict=True)
        }
        return values if shown is images else {name: value.where(finite, torch.nan) for name, value in values.items()}

    @property
    def aimed_at(self) -> list[str]:
        """Names of the functions whose weight is not 0; the others are only looked at. All, if there is none."""
        return [name for name, w in zip(self.names, self.weights, strict=True) if w] or self.names

    def total(self, values: dict[str, Tensor]) -> Tensor:
        """Σ_i w_i f_i, shape (B,), from the values of a call."""
        # A weight of 0 logs a reward without aiming at it, so its NaN must not count.
        terms = [w * values[name] for w, name in zip(self.weights, self.names, strict=True) if w]
        return torch.stack(terms or [0.0 * values[self.names[0]]]).sum(0)


@dataclass(frozen=True)
class RewardGradient:
    """The reward at the end points, and its gradient there.

    Args:
        rewards: r, shape (B,), detached.
        values: name → f_i, shape (B,), detached.
        gradient: ∇ₓ r, shape (B, …) of the end points, reward units per state unit.
        images: the decoded end points, detached.
    """

    rewards: Tensor
    values: dict[str, Tensor]
    gradient: Tensor
    images: Tensor


def reward_gradient(
    end_point: Tensor,
    decode: Callable[[Tensor], Tensor],
    reward: WeightedReward,
    prompts: list[str],
    columns: dict[str, list[Any]],
) -> RewardGradient:
    """Decode the end points, score the images, and differentiate: one decoder pass forward and one back.

    Raises:
        ValueError: if a reward is not differentiable in the images.
    """
    x = end_point.detach().requires_grad_()
    with torch.enable_grad():
        decoded = decode(x)
        # A fresh leaf in float32: gradients in the pixels are small, a 16-bit decoder's output would round them away.
        images = decoded.detach().to(torch.promote_types(decoded.dtype, torch.float32)).requires_grad_()
        values = reward(images, prompts, **columns)
        values |= {name: with_graph(name, values[name], images) for name in reward.aimed_at}
        total = reward.total(values)
    in_pixels = torch.autograd.grad(total.sum(), images, allow_unused=True)[0]
    gradient = None if in_pixels is None else vector_jacobian(decoded, x, in_pixels)
    if gradient is None:
        raise ValueError(f"the rewards {', '.join(map(repr, values))} do not depend on the images; pass functions of the images.")
    return RewardGradient(total.detach(), {name: value.detach() for name, value in values.items()}, gradient, images.detach())


def with_graph(name: str, value: Tensor, images: Tensor) -> Tensor:
    """A reward's value, checked for a gradient in the images.

    Raises:
        ValueError: if it has none.
    """
    if value.requires_grad:
        return value
    if not value.isfinite().any():  # no reward for any of these images, and so nothing to differentiate
        return value + 0.0 * images.flatten(1).sum(1)
    raise ValueError(
        f"reward {name!r} is not differentiable in the images; remove torch.no_grad(), .detach(), .item(), PIL or uint8 "
        "conversion from it, Adjoint Matching needs ∂reward/∂pixels."
    )


def _checked(value: Any, name: str, images: Tensor) -> Tensor:
    batch = len(images)
    if isinstance(value, list | tuple):
        value = _stacked(value, images)
    if not isinstance(value, Tensor):
        raise TypeError(f"reward {name!r} returned a {type(value).__name__}; return a tensor of shape ({batch},).")
    if value.shape != (batch,):
        raise ValueError(f"reward {name!r} returned shape {tuple(value.shape)}; return one value per image, shape ({batch},).")
    if value.device != images.device:
        raise ValueError(f"reward {name!r} returned a tensor on {value.device} for images on {images.device}; return it there.")
    return value if value.dtype == torch.float64 else value.float()


def _stacked(values: Sequence[Any], images: Tensor) -> Any:
    """A tensor out of one scalar tensor for each image, `None` (no reward for this image) as NaN; others come back unchanged."""
    if any(value is not None and not (isinstance(value, Tensor) and value.ndim == 0) for value in values):
        return values
    given = next((value for value in values if value is not None), images.new_zeros(()))
    return torch.stack([given.new_tensor(torch.nan) if value is None else value for value in values])


def _taken(function: RewardFunction, columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """The columns that `function` has arguments for: all of them if it ends in **columns."""
    parameters = _signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return columns
    names = {parameter.name for parameter in parameters}
    return {name: values for name, values in columns.items() if name in names}


def _signature(function: RewardFunction) -> inspect.Signature:
    """Of a module, that of its `forward`: `__call__` takes anything and hands it on."""
    return inspect.signature(function.forward if isinstance(function, nn.Module) else function)


def _unique_names(functions: Sequence[RewardFunction]) -> list[str]:
    names: list[str] = []
    for function in functions:
        name = candidate = getattr(function, "__name__", type(function).__name__)
        for number in itertools.count(1):
            if candidate not in names:
                break
            candidate = f"{name}_{number}"
        names.append(candidate)
    return names
