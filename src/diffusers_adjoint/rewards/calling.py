"""Call one reward function: on copies of its arguments, and with its name in every error."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from numbers import Real
from types import TracebackType
from typing import Any, Literal

import numpy as np
import torch
from accelerate.utils.memory import should_reduce_batch_size
from PIL import Image
from torch import Tensor
from transformers.utils import logging

from ..replay.plain import AUDIO
from .black_box import as_pil, numbers

__all__ = ["call_reward", "naming", "sound_column"]


logger = logging.get_logger(__name__)


def sound_column(sounds: Sequence[Tensor]) -> dict[str, Any]:
    """The column by which rewards get the sound of videos, (B, …); empty if `sounds` is."""
    return {AUDIO: sounds[0]} if sounds else {}


def call_reward(
    name: str,
    function: Callable[..., Any],
    images: Tensor,
    prompts: list[str],
    columns: dict[str, list[Any]],
    *,
    images_as: Literal["tensor", "pil"] = "tensor",
) -> Tensor:
    """Call a reward function and check its result.

    Images, prompts and columns are copied, so the function may write into them.

    Args:
        name: name of the reward, for messages.
        function: the reward function.
        images: (B, …).
        prompts: B prompts.
        columns: further arguments, name → B values; under `audio` the sound of videos, a tensor.
        images_as: "tensor", or "pil" for PIL images.

    Returns:
        The values, (B,), float32 or better; NaN for an image without a value, for which the gradient is set to 0 in the image and
        in its sound (autograd may give NaN there). If nothing is differentiated, the function may also return an array or a list
        of numbers.

    Raises:
        TypeError: if the function does not return a tensor (or an array or list, see above).
        ValueError: if it does not return one value for each image, on the images' device.
        Exception: an error of the function, of the same type; its message then begins with the reward's name, see `naming`.
    """
    own = images.clone()
    node = own.grad_fn  # None if nothing is differentiated
    own_columns = _copied(columns)
    nodes = [part.grad_fn for part in (own, own_columns.get(AUDIO)) if isinstance(part, Tensor) and part.grad_fn is not None]
    with naming(name):
        shown = own if images_as == "tensor" else as_pil(images)
        value = _checked(function(images=shown, prompts=list(prompts), **own_columns), name, images)
        if node is not None:
            _warn_of_writing_past_autograd(name, own, node, images)
    missing = value.detach().isnan()
    for copied_at in nodes if missing.any() else ():
        # Masking the value is not enough: autograd multiplies 0 by the NaN derivative of √−1, for example, and gets NaN. The hook
        # is on the copy's own node, so that it also sees what in-place operations of the function have done.
        copied_at.register_prehook(lambda gradients: _silenced(gradients[0], missing))
    return value


class naming:
    """A context that puts the reward's name in front of the message of an error raised in it.

    The error keeps its type and traceback. A RuntimeError replaces it if its type does not print the message unchanged
    (KeyError), or if Python would take it for the end of an iteration (StopIteration). Three kinds of errors are not changed:
    those that name a reward already; out-of-memory errors, after which the trainer may try smaller batches; and private exception
    classes, which a library raises for itself, as torch does in a checkpointed function.

    This is a class and not a generator, because a generator cannot tell a StopIteration in its body from its own end.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not isinstance(error, Exception):  # no error, or one that ends the program
            return
        said = " ".join(str(error).split())
        of_memory = isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)
        if of_memory or said.startswith("reward ") or type(error).__name__.startswith("_"):
            return
        if isinstance(error, StopIteration) or error.args != (str(error),):
            raise RuntimeError(f"reward {self.name!r} failed: {type(error).__name__} {said}".rstrip(" .") + ".") from error
        error.args = (f"reward {self.name!r} failed: {said.rstrip('.')}.",)


def _copied(value: Any) -> Any:
    """A copy of containers, tensors, arrays and images; other objects, text and numbers are returned as they are."""
    if isinstance(value, dict | list):
        own = copy.copy(value)  # keeps a subclass
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            own[key] = _copied(item)
        return own
    if type(value) is tuple:
        return tuple(_copied(item) for item in value)
    if isinstance(value, Tensor):
        return value.clone()
    return value.copy() if isinstance(value, set | np.ndarray | Image.Image) else value


def _checked(value: Any, name: str, images: Tensor) -> Tensor:
    batch = len(images)
    if value is None:
        logger.warning_once(
            f"reward {name!r} returned None, which means that it has no value for any image of the batch; if that is not meant, "
            f"add the missing `return`."
        )
        value = [None] * batch
    if not images.requires_grad:
        value = numbers(value, images.device)
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
    """Stack a list of one scalar tensor for each image to (B,); return any other list unchanged.

    `None` and a NaN of Python or NumPy mean that an image has no value, and become NaN. A list with other plain numbers is
    returned unchanged, because these have no gradient.
    """
    known = [None if isinstance(value, Real) and math.isnan(value) else value for value in values]
    if any(value is not None and not (isinstance(value, Tensor) and value.ndim == 0) for value in known):
        return values
    given = next((value for value in known if value is not None), images.new_zeros(()))
    return torch.stack([given.new_tensor(torch.nan) if value is None else value for value in known])


def _warn_of_writing_past_autograd(name: str, own: Tensor, node: Any, images: Tensor) -> None:
    """Warn if the function has changed its images without autograd noticing: the values differ, but `grad_fn` is the same."""
    if own.grad_fn is node and not torch.equal(own.detach(), images.detach()):
        logger.warning_once(
            f"reward {name!r} writes into its images where autograd does not see it (.data, torch.no_grad()), so its gradient "
            f"does not belong to its value; compute new images instead, such as images = 255 * images."
        )


def _silenced(gradient: Tensor | None, missing: Tensor) -> tuple[Tensor] | None:
    """The gradient with 0 for images without a value whose gradient is not finite; `None`, if an autograd function gave it."""
    if gradient is None:
        return None
    sound = gradient.flatten(1).isfinite().all(1) | ~missing
    return (gradient.where(sound.view(-1, *[1] * (gradient.ndim - 1)), 0.0),)
