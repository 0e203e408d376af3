"""A VAE that one call of the pipeline may cast, while the user's own stays as it is.

Pipelines that decode in float32 cast a float16 VAE up before they decode and back down afterwards (`force_upcast`). Our backward
pass runs later still: it needs the weights that the decoder ran with, and the user's VAE must not stay in another dtype.
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
    """A stand-in for `vae` in one call: it shares the weights until it is cast, and each cast gives it weights of its own.

    What was computed before a cast keeps the weights that it was computed with, and `vae` itself is never cast.
    """
    cls: type = type(vae)
    stand_in = copy.copy(vae)
    stand_in.__class__ = _castable_class(cls)
    return stand_in


@functools.cache
def _castable_class(cls: type) -> type:
    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        """The class's own `to`, on a copy of everything that this stand-in holds."""
        self.__dict__.update(copy.deepcopy(self.__dict__, {id(self): self}))
        with _without_false_warnings():
            return cls.to(self, *args, **kwargs)  # type: ignore[attr-defined]

    return type(cls.__name__, (cls,), {"to": to, "__module__": cls.__module__})


@contextmanager
def _without_false_warnings() -> Iterator[None]:
    """diffusers warns at every cast of modules to be kept in float32, though there are none; here twice for each decoding."""
    logger = logging.getLogger("diffusers.models.modeling_utils")

    def is_true(record: logging.LogRecord) -> bool:
        return "should be kept in float32: []" not in record.getMessage()

    logger.addFilter(is_true)
    try:
        yield
    finally:
        logger.removeFilter(is_true)


def vae_dtype(pipeline: DiffusionPipeline | ModularPipeline) -> torch.dtype | None:
    """Of the weights of its VAE; `None` if it has none."""
    vae = getattr(pipeline, "vae", None)
    weight = next(vae.parameters(), None) if isinstance(vae, nn.Module) else None
    return None if weight is None else weight.dtype
