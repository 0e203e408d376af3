"""A stand-in for a VAE that a pipeline's call may cast without changing the user's VAE.

With `force_upcast`, pipelines cast a float16 VAE to float32 before they decode, and back afterwards. The backward pass runs after
that. It needs the float32 weights that the decoder ran with. The user's VAE must keep its dtype, also after an error.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModularPipeline
from torch import nn

__all__ = ["castable", "vae_dtype"]


def castable(vae: Any) -> Any:
    """Make a stand-in for `vae`, for one call. It shares the weights of `vae` until it is cast; each cast copies them first.

    So `vae` itself is never cast, and the graph of what was computed before a cast keeps the weights of that computation.
    """
    cls: type = type(vae)
    stand_in = copy.copy(vae)
    stand_in.__class__ = _castable_class(cls)
    return stand_in


@functools.cache
def _castable_class(cls: type) -> type:
    """Subclass of a VAE's class whose `to` copies the weights before it casts them."""

    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Replace all that this stand-in holds by copies, then call the class's own `to`."""
        self.__dict__.update(copy.deepcopy(self.__dict__, {id(self): self}))
        with _without_false_warnings():
            return cls.to(self, *args, **kwargs)  # type: ignore[attr-defined]

    return type(cls.__name__, (cls,), {"to": to, "__module__": cls.__module__})


@contextmanager
def _without_false_warnings() -> Iterator[None]:
    """Suppress a false warning of diffusers within this context.

    At every cast, twice for each decoding here, diffusers warns of modules that should be kept in float32, even if there are
    none.
    """
    logger = logging.getLogger("diffusers.models.modeling_utils")

    def is_true(record: logging.LogRecord) -> bool:
        return "should be kept in float32: []" not in record.getMessage()

    logger.addFilter(is_true)
    try:
        yield
    finally:
        logger.removeFilter(is_true)


def vae_dtype(pipeline: DiffusionPipeline | ModularPipeline) -> torch.dtype | None:
    """The dtype of the weights of the pipeline's VAE; `None` if it has no VAE, or one without weights."""
    vae = getattr(pipeline, "vae", None)
    weight = next(vae.parameters(), None) if isinstance(vae, nn.Module) else None
    return None if weight is None else weight.dtype
