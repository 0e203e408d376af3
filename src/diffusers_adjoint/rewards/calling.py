"""One call of one reward function: on copies of its own, and with its name on whatever goes wrong."""

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

from .black_box import as_pil, numbers

__all__ = ["AUDIO", "call_reward", "naming"]

AUDIO = "audio"  # the argument by which rewards ask for the sound of videos

logger = logging.get_logger(__name__)


def call_reward(
    name: str,
    function: Callable[..., Any],
    images: Tensor,
    prompts: list[str],
    columns: dict[str, list[Any]],
    *,
    images_as: Literal["tensor", "pil"] = "tensor",
) -> Tensor:
    """What `function` returns, float32 or better, (B,); NaN for an image that it has no value for.

    Images, prompts and columns are copies: a function may write into them, and nobody else sees it. The gradient of an image
    that the function has no value for is 0, where the function's own may be NaN; so is that of its sound, which is a column.
    Where nothing is differentiated an array or a list of numbers is as good as a tensor.

    Raises:
        TypeError: if it does not return a tensor, or what is as good.
        ValueError: if it does not return one value for each image, on their device.
        Exception: of the type that the function raises; its text then begins with the name, see `naming`.
    """
    own = images.clone()
    node = own.grad_fn  # None where nothing is differentiated
    own_columns = _copied(columns)
    nodes = [part.grad_fn for part in (own, own_columns.get(AUDIO)) if isinstance(part, Tensor) and part.grad_fn is not None]
    with naming(name):
        shown = own if images_as == "tensor" else as_pil(images)
        value = _checked(function(images=shown, prompts=list(prompts), **own_columns), name, images)
        if node is not None:
            _warn_of_writing_past_autograd(name, own, node, images)
    missing = value.detach().isnan()
    for copied_at in nodes if missing.any() else ():
        # At the copy's node, below whatever the function did in place: 0 · NaN of a root of −1, say, would be NaN.
        copied_at.register_prehook(lambda gradients: _silenced(gradients[0], missing))
    return value


class naming:
    """A context: an error in it says that it is of the reward `name`.

    It keeps its type and its traceback. A RuntimeError is raised from it only where the type does not show a text as it is, as
    KeyError, or where Python takes the type for the end of an iteration: contexts and generators further out would lose the text.
    Left as they are: what names a reward already; a lack of memory, for which the trainer has smaller batches; and exceptions of
    a private class, by which a library talks to itself, as torch does within a checkpointed function.

    No generator, because in one a StopIteration cannot be told from its own end.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not isinstance(error, Exception):  # none, or one that ends the program
            return
        said = " ".join(str(error).split())
        of_memory = isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)
        if of_memory or said.startswith("reward ") or type(error).__name__.startswith("_"):
            return
        if isinstance(error, StopIteration) or error.args != (str(error),):
            raise RuntimeError(f"reward {self.name!r} failed: {type(error).__name__} {said}".rstrip(" .") + ".") from error
        error.args = (f"reward {self.name!r} failed: {said.rstrip('.')}.",)


def _copied(value: Any) -> Any:
    """A copy of what can be written into; text, numbers and objects of other classes are handed on."""
    if isinstance(value, dict | list):
        own = copy.copy(value)  # of its own class
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
            f"a `return` is missing."
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
    """A tensor out of one scalar tensor for each image; others come back unchanged.

    NaN stands where there is no value for this image: `None`, or the NaN of Python or NumPy. Other numbers have no gradient.
    """
    known = [None if isinstance(value, Real) and math.isnan(value) else value for value in values]
    if any(value is not None and not (isinstance(value, Tensor) and value.ndim == 0) for value in known):
        return values
    given = next((value for value in known if value is not None), images.new_zeros(()))
    return torch.stack([given.new_tensor(torch.nan) if value is None else value for value in known])


def _warn_of_writing_past_autograd(name: str, own: Tensor, node: Any, images: Tensor) -> None:
    """An in-place operation that autograd sees gives the tensor another node; one that it does not see leaves the old one."""
    if own.grad_fn is node and not torch.equal(own.detach(), images.detach()):
        logger.warning_once(
            f"reward {name!r} writes into its images where autograd does not see it (.data, torch.no_grad()), so its gradient is "
            f"not that of its value; compute new images instead, such as images = 255 * images."
        )


def _silenced(gradient: Tensor | None, missing: Tensor) -> tuple[Tensor] | None:
    """Without what is not finite of the images that have no value; `None`, as an autograd function may give, stays as it is."""
    if gradient is None:
        return None
    sound = gradient.flatten(1).isfinite().all(1) | ~missing
    return (gradient.where(sound.view(-1, *[1] * (gradient.ndim - 1)), 0.0),)
