"""Detect a VAE that decodes in tiles. The borders of the tiles are in every gradient, so the weights may learn them as seams."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from diffusers import ModelMixin
from torch import Tensor, nn
from transformers.utils import logging

from .slices import has_decoder

__all__ = ["noting_tiles", "warn_of_tiles"]

logger = logging.get_logger(__name__)


@contextmanager
def noting_tiles(vae: Any) -> Iterator[list[tuple[int, ...]]]:
    """Collect the sizes of the tiles that a VAE's decoder gets within this context.

    A tile is a decoder input that is smaller than the latents given to `decode`, in height or width, or in length for a sound.
    Slices of a batch and slices of frames are not tiles.

    Args:
        vae: any object. Only a diffusers model with tiling enabled and its class's own `decode` is observed.

    Yields:
        A list to which the size of each tile is appended, in latent pixels: (height, width), or (length,) for a sound.
    """
    tiles: list[tuple[int, ...]] = []
    # A `decode` that the user has set on the object is not replaced.
    observed = has_decoder(vae) and getattr(vae, "use_tiling", False) and "decode" not in vars(vae)
    if observed:
        vars(vae)["decode"] = types.MethodType(_noting(tiles), vae)
    try:
        yield tiles
    finally:
        if observed:
            del vars(vae)["decode"]


def _noting(tiles: list[tuple[int, ...]]) -> Callable[..., Any]:
    """Wrap the class's `decode` so that the sizes of its tiles are appended to the list."""

    def decode(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Decode as the class does, and note each input of the decoder that is smaller than the latents."""
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
    """Height and width of latents, or the length of a sound's: the last two axes after batch and channels, as far as present."""
    return tuple(z.shape[2:][-2:])


def warn_of_tiles(vae: ModelMixin) -> None:
    """Warn that the VAE decodes in tiles, and name another way to save memory."""
    if vae._supports_gradient_checkpointing:
        memory = "vae.enable_gradient_checkpointing(), which leaves the images as they are"
    else:
        memory = "a smaller size"
    logger.warning(
        f"the {type(vae).__name__} decodes in tiles at this size, and the tiles' borders are in the gradients that train the "
        f"weights, so that they may be learnt as seams; call vae.disable_tiling(), and if memory is short take {memory}."
    )
