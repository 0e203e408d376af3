"""Detect a VAE that decodes in tiles: the tiles' borders appear in every gradient, and the weights may learn them."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from diffusers import ModelMixin
from torch import Tensor, nn
from transformers.utils import logging

__all__ = ["noting_tiles", "warn_of_tiles"]

logger = logging.get_logger(__name__)


@contextmanager
def noting_tiles(vae: Any) -> Iterator[list[tuple[int, ...]]]:
    """The sizes, in latents, of what its decoder sees at a time within this context, where that is less than it was given.

    Height and width count, or the length of a sound. Slices of a batch and chunks of frames are no tiles; nor is an image that
    fits into one tile.
    """
    tiles: list[tuple[int, ...]] = []
    has_decoder = isinstance(vae, ModelMixin) and isinstance(getattr(vae, "decoder", None), nn.Module)
    # A `decode` of the user's own is left alone.
    observed = has_decoder and getattr(vae, "use_tiling", False) and "decode" not in vars(vae)
    if observed:
        vars(vae)["decode"] = types.MethodType(_noting(tiles), vae)
    try:
        yield tiles
    finally:
        if observed:
            del vars(vae)["decode"]


def _noting(tiles: list[tuple[int, ...]]) -> Callable[..., Any]:
    """The class's own `decode`, which adds the sizes of its tiles to the list."""

    def decode(self: Any, *args: Any, **kwargs: Any) -> Any:
        whole_size = _size([*args, *kwargs.values()][0])

        def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            size = _size(inputs[0])
            if any(part < whole for part, whole in zip(size, whole_size, strict=False)):
                tiles.append(size)

        handle = self.decoder.register_forward_pre_hook(note)
        try:
            return type(self).decode(self, *args, **kwargs)
        finally:
            handle.remove()

    return decode


def _size(z: Tensor) -> tuple[int, ...]:
    return tuple(z.shape[2:][-2:])


def warn_of_tiles(vae: ModelMixin) -> None:
    """Warn of tiled decoding, and say what else saves memory."""
    if vae._supports_gradient_checkpointing:
        memory = "vae.enable_gradient_checkpointing(), which leaves the images as they are"
    else:
        memory = "a smaller size"
    logger.warning(
        f"the {type(vae).__name__} decodes in tiles at this size, and the tiles' borders are in the gradients that train the "
        f"weights, so that they may be learnt as seams; call vae.disable_tiling(), and if memory is short take {memory}."
    )
