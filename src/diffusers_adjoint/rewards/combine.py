"""The weighted sum of reward functions, its checks, and its gradient with respect to the latent state."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge

from ..core.adjoint import vector_jacobian
from ..replay.plain import AUDIO
from .black_box import asked_in_threads
from .calling import call_reward, naming, sound_column

__all__ = ["RewardFunction", "RewardGradient", "WeightedReward", "reward_gradient", "total_reward"]
__all__ += ["with_graph"]

RewardFunction = Callable[..., Tensor]
"""f(images=(B, 3, H, W) in [0, 1], prompts=list of B, **dataset columns) → (B,), differentiable in `images`.

Of videos with a sound `audio=(B, …)`, the waveform, is among the columns, and what is asked for it may be differentiable in it.
"""


class WeightedReward:
    """The reward r = Σ_i w_i f_i, summed over the functions that have a value for an image.

    Args:
        reward_funcs: f_i: one function or module, or a list of them. Modules are frozen and put in evaluation mode.
        weights: w_i, one for each function; `None` for all 1.
        images_as: "tensor"; or "pil", and the functions get a list of PIL images (of lists of frames, for videos) and cannot be
            differentiated.
        workers: threads that call a function, each on a part of the batch. A function that is differentiated is called once.

    Raises:
        TypeError: if one of them is not callable, or is a class.
        ValueError: if there is no function, or the numbers of weights and functions differ.
    """

    def __init__(
        self,
        reward_funcs: RewardFunction | Sequence[RewardFunction],
        weights: Sequence[float] | None = None,
        *,
        images_as: Literal["tensor", "pil"] = "tensor",
        workers: int = 1,
    ) -> None:
        functions: list[Any] = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
        if not functions:
            raise ValueError("reward_funcs is empty; pass at least one reward function.")
        for function in functions:
            if isinstance(function, type):
                name = function.__name__
                raise TypeError(f"reward_funcs contains the class {name}; pass an instance, {name}().")
            if not callable(function):
                raise TypeError(f"reward_funcs contains {function!r}; pass callables f(images=, prompts=, **columns).")
        weights = [1.0] * len(functions) if weights is None else list(weights)
        if len(weights) != len(functions):
            raise ValueError(f"reward_weights has {len(weights)} entries for {len(functions)} reward functions; pass one each.")
        self.functions, self.weights, self.images_as, self.workers = functions, weights, images_as, workers
        self.names = _unique_names(functions)
        for module in (f for f in functions if isinstance(f, nn.Module)):
            module.requires_grad_(False).eval()  # not torch.no_grad(): the gradient must pass through to the images

    def to(self, device: torch.device) -> WeightedReward:
        for module in (f for f in self.functions if isinstance(f, nn.Module)):
            module.to(device)
        return self

    def require_arguments(self, columns: dict[str, list[Any]], *, with_audio: bool = False) -> set[str]:
        """The dataset columns that the functions take by name.

        Args:
            with_audio: whether the images are videos that come with their sound, which is then the column of that name.

        Raises:
            ValueError: if a function cannot be called with images, prompts and what it takes of these dataset columns.
        """
        if with_audio and AUDIO in columns:
            raise ValueError(f"column {AUDIO!r} has the name of the sound that the pipeline makes for the rewards; rename it.")
        asked: set[str] = set()
        given = {**columns, AUDIO: []} if with_audio else columns
        for name, function in zip(self.names, self.functions, strict=True):
            if hasattr(function, "require_arguments"):  # a function around others, which knows what they ask for
                asked |= function.require_arguments(columns, with_audio=with_audio)
                continue
            signature = _signature(function)
            if AUDIO not in given and _needs_audio(function):
                raise ValueError(
                    f"reward {name!r} asks for audio=, but the pipeline makes no sound with its images; take audio out of its "
                    f"arguments (a pipeline that makes nothing but sound hands it over as images=), or take another pipeline."
                )
            try:
                signature.bind(images=None, prompts=None, **_taken(function, given))
            except TypeError as error:
                raise ValueError(
                    f"reward {name!r} cannot be called as f(images=, prompts=, **columns) with the columns {sorted(columns)} "
                    f"({error}); give the function these arguments, or add the missing columns to the dataset."
                ) from None
            asked |= signature.parameters.keys()
        return asked

    def asked_frames(self, num_frames: int) -> set[int]:
        """The numbers of the frames that the functions use, in a video of `num_frames`.

        Raises:
            ValueError: if a function does not tell, or names frames that do not exist.
        """
        asked: set[int] = set()
        for name, function in zip(self.names, self.functions, strict=True):
            if not hasattr(function, "asked_frames"):
                raise ValueError(
                    f"reward {name!r} does not tell which frames it uses, which decode_frames='asked' needs; wrap it in "
                    f"per_frame, or pass decode_frames='all'."
                )
            frames = set(function.asked_frames(num_frames))
            if not (frames and frames <= set(range(num_frames))):
                told = f"reward {name!r} asks for the frames {sorted(frames)} of {num_frames}"
                raise ValueError(f"{told}; ask for some from 0 to {num_frames - 1}.")
            asked |= frames
        return asked

    def __call__(self, images: Tensor, prompts: list[str], **columns: list[Any]) -> dict[str, Tensor]:
        """The value of each function, name → (B,), float32 or better; NaN for an image without a value.

        A function gets the columns that it has arguments for, and copies of its arguments, so it may write into them. An image
        with NaN or infinite pixels, or with such a sound, as an overflowing 16-bit decoder makes them, is not shown to the
        functions: its values are NaN.

        Args:
            images: (B, 3, H, W) or (B, F, 3, H, W) in [0, 1], or waveforms (B, …).
            prompts: B prompts.
            columns: further columns of the dataset, name → B values; under `audio` the sound of videos, a tensor.

        Raises:
            TypeError: if a function does not return a tensor.
            ValueError: if it does not return one value for each image, on their device.
            Exception: an error of a function, of the same type; its message then begins with the function's name.
        """
        sound: Any = columns.get(AUDIO)
        heard = [sound] if isinstance(sound, Tensor) else []
        finite = torch.stack([part.detach().flatten(1).isfinite().all(1) for part in (images, *heard)]).all(0)
        shown = images
        if not finite.all():
            shown = _where(finite, images, 0.5)
            columns |= sound_column([_where(finite, part, 0.0) for part in heard])
        values = {
            name: self._value(name, function, shown, prompts, _taken(function, columns))
            for name, function in zip(self.names, self.functions, strict=True)
        }
        return values if shown is images else {name: value.where(finite, torch.nan) for name, value in values.items()}

    def _value(
        self, name: str, function: RewardFunction, images: Tensor, prompts: list[str], columns: dict[str, list[Any]]
    ) -> Tensor:
        ask = partial(call_reward, name, function, images_as=self.images_as)
        if self.workers == 1 or images.requires_grad:
            return ask(images, prompts, columns)
        return asked_in_threads(ask, images, prompts, columns, self.workers)

    @property
    def aimed_at(self) -> dict[str, float]:
        """Name → weight of the functions whose weight is not 0; the others are only logged. If all weights are 0, all."""
        weights = dict(zip(self.names, self.weights, strict=True))
        return {name: w for name, w in weights.items() if w} or weights

    def total(self, values: dict[str, Tensor]) -> Tensor:
        """Σ_i w_i f_i, shape (B,), from the values of a call; see `total_reward`."""
        return total_reward(values, self.aimed_at)


def _where(rows: Tensor, values: Any, other: float) -> Any:
    """`values`, (B, …), where `rows`, (B,), is true, and `other` elsewhere."""
    return torch.where(rows.view(-1, *[1] * (values.ndim - 1)), values, other)


def _needs_audio(function: RewardFunction) -> bool:
    """Whether it cannot be called without the sound of the videos."""
    asked = _signature(function).parameters.get(AUDIO)
    return asked is not None and asked.default is asked.empty


def total_reward(values: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Σ_i w_i f_i over the functions that have a value; NaN where none has.

    Args:
        values: name → f_i, all of one shape; NaN where the function has no value.
        weights: name → w_i of the functions in the sum, at least one.
    """
    missing = torch.stack([values[name].isnan() for name in weights])
    terms = [w * values[name].where(~none, 0.0) for (name, w), none in zip(weights.items(), missing, strict=True)]
    return torch.stack(terms).sum(0).where(~missing.all(0), torch.nan)


@dataclass(frozen=True)
class RewardGradient:
    """The reward at the end points x, and its gradient; all tensors are detached.

    Args:
        rewards: r, (B,).
        values: name → f_i, (B,).
        gradient: ∇ₓ r, (B, …) as the end points, in units of r per unit of the state.
        images: the decoded end points.
    """

    rewards: Tensor
    values: dict[str, Tensor]
    gradient: Tensor
    images: Tensor


def reward_gradient(
    end_point: Tensor,
    decode: Callable[[Tensor], Tensor | tuple[Tensor, Tensor | None]],
    reward: WeightedReward,
    prompts: list[str],
    columns: dict[str, list[Any]],
) -> RewardGradient:
    """Decode the end points, score the images, and differentiate: one forward and one backward pass through the decoder.

    Args:
        end_point: x, (B, …).
        decode: latent states → images, or images and their sound, which rewards get as `audio`.
        reward: the weighted reward functions.
        prompts: B prompts.
        columns: further columns of the dataset, name → B values.

    Raises:
        ValueError: if a reward with a weight is not differentiable in the images or the sound, or these not in the end points.
    """
    x = end_point.detach().requires_grad_()
    with torch.enable_grad():
        made = decode(x)
        decoded = [made] if isinstance(made, Tensor) else [part for part in made if part is not None]
        if not decoded[0].requires_grad:
            raise ValueError(_NO_GRADIENT_IN_THE_DECODER)
        # New leaves in float32: gradients in the pixels are small, and 16 bits would round them to 0.
        shown = [part.detach().to(torch.promote_types(part.dtype, torch.float32)).requires_grad_() for part in decoded]
        values = reward(shown[0], prompts, **columns | sound_column(shown[1:]))
        values |= {name: with_graph(name, values[name], *shown) for name in reward.aimed_at}
        total = reward.total(values).detach()
        slopes = _in_what_is_shown(values, reward.aimed_at, shown)
    values = {name: value.detach() for name, value in values.items()}  # frees the rewards' graphs before the decoder's is used
    gradient = _pulled_back(decoded, x, slopes)
    return RewardGradient(total, values, gradient, shown[0].detach())


_NO_GRADIENT_IN_THE_DECODER = (
    "the decoded images have no gradient in the end points; remove torch.no_grad(), .detach() and NumPy arrays from the decoder."
)


def _pulled_back(decoded: list[Tensor], x: Tensor, slopes: list[Tensor | None]) -> Tensor:
    """Σ (∂decoded/∂x)ᵀ slope over images and sound, as far as there is a slope, in one pass back.

    Raises:
        ValueError: if what a reward depends on has no gradient in x.
    """
    acting = [(part, slope) for part, slope in zip(decoded, slopes, strict=True) if slope is not None]
    if not all(part.requires_grad for part, _ in acting):
        raise ValueError(_NO_GRADIENT_IN_THE_DECODER.replace("images have", "sound has"))
    output, slope = acting[0]
    if len(acting) > 1:
        output, slope = (torch.cat([part.flatten(1) for part in parts], 1) for parts in zip(*acting, strict=True))
    gradient = vector_jacobian(output, x, slope)
    if gradient is None:
        raise ValueError(_NO_GRADIENT_IN_THE_DECODER)
    return gradient


def _in_what_is_shown(values: dict[str, Tensor], weights: dict[str, float], shown: list[Tensor]) -> list[Tensor | None]:
    """Σ_i w_i ∂f_i/∂images, and the same for the sound; `None` for what no reward depends on.

    They are computed one by one so that an error names its reward.
    """
    slopes: list[Tensor | None] = [None] * len(shown)
    last = next(reversed(weights))
    for name, w in weights.items():
        term = total_reward(values, {name: w}).sum()
        with naming(name):  # functions may share a part of their graphs, which must stay until the last one
            found = torch.autograd.grad(term, shown, retain_graph=name != last, allow_unused=True)
        if all(gradient is None for gradient in found):  # a custom autograd function of the reward may return None
            raise _of_something_else(name)
        slopes = [a if b is None else b if a is None else a + b for a, b in zip(slopes, found, strict=True)]
    return slopes


def with_graph(name: str, value: Tensor, *shown: Tensor) -> Tensor:
    """The value of a reward, after checking that autograd connects it to the images or their sound.

    Raises:
        ValueError: if it is not connected, although at least one image has a value.
    """
    if not value.isfinite().any():  # no image has a reward, so there is nothing to differentiate
        return value + 0.0 * shown[0].flatten(1).sum(1)
    if not value.requires_grad:
        raise ValueError(
            f"reward {name!r} is not differentiable in the images; remove torch.no_grad(), .detach(), .item(), PIL or uint8 "
            "conversion from it, because Adjoint Matching needs ∂reward/∂pixels."
        )
    # A function may use what another one has computed and cached, so its graph may lead to another copy of the same images.
    sources = {node for part in shown for node in _graph(part)}
    if not any(node in sources for node in _graph(value)):
        raise _of_something_else(name)
    return value


def _of_something_else(name: str) -> ValueError:
    return ValueError(
        f"reward {name!r} does not depend on the images; compute it from them, or return None for images it is not for."
    )


def _graph(tensor: Tensor) -> Iterator[Node]:
    """The autograd nodes that a tensor depends on, each once; takes 1 ms for 1500 nodes."""
    seen: set[Node] = set()
    waiting: list[Node | None] = [get_gradient_edge(tensor).node]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:  # None stands for an input that needs no gradient
            seen.add(node)
            yield node
            waiting += [behind for behind, _ in node.next_functions]


def _taken(function: RewardFunction, columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """The columns that `function` has arguments for; all if it has `**columns`."""
    parameters = _signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return columns
    names = {parameter.name for parameter in parameters}
    return {name: values for name, values in columns.items() if name in names}


def _signature(function: RewardFunction) -> inspect.Signature:
    """The signature of a function, or of a module's `forward`, since its `__call__` accepts any arguments."""
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
