"""The decoder of a video VAE, slice by slice: which frames a slice makes, and one slice's graph at a time.

Video VAEs call their decoder for a few latent frames after the other and hand on what the next slice needs of the last (a cache
of convolutions' inputs). Nothing of them is written again here: their own `decode` runs, on fewer latent frames and with a
decoder in its place that is evaluated again in the backward pass. The gradient is that of the whole, through the caches too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .frames import FrameLayout
from .view import called_in_place_of

__all__ = ["Decode", "decoding", "has_decoder", "measuring", "same"]

Decode = Callable[..., Any]
"""The `decode` of a VAE: (z, …) → a tuple, or an object with a `sample`."""

# How far the beginning of a video may be from the same frames of the whole: rounding, where a kernel sees another length.
_SAME_FINE, _SAME_COARSE = 1e-4, 3e-2


def has_decoder(vae: Any) -> bool:
    """Whether its `decode` can be expected to call its `decoder`."""
    return isinstance(vae, ModelMixin) and isinstance(getattr(vae, "decoder", None), nn.Module)


def decoding(layout: FrameLayout, frames: Sequence[int]) -> Callable[[Any], Decode]:
    """VAE → its `decode` as it is for these frames of a video: no latent frame after those that they need, and less memory."""

    def of(vae: Any) -> Decode:
        own = vae.decode

        def decode(z: Tensor, *args: Any, **kwargs: Any) -> Any:
            if z.shape[2] != len(layout.sizes):
                raise ValueError(
                    f"a video has {z.shape[2]} latent frames where the first one had {len(layout.sizes)}; make all of one length "
                    f"or leave decode_frames out."
                )
            beginning = z[:, :, : layout.latent_frames_for(frames[-1])]
            checkpointed = layout.sliced and torch.is_grad_enabled()
            with _decoder_replaced(vae, _checkpointed(vae.decoder) if checkpointed else vae.decoder):
                decoded = own(beginning, *args, **kwargs)
            return _with_frames(decoded, list(frames))

        return decode

    return of


def measuring(pipeline: str, found: list[FrameLayout]) -> Callable[[Any], Decode]:
    """VAE → its `decode`, which adds to the list what it finds out about videos, by decodings of the one that it is given.

    Raises:
        ValueError: (when called) naming the pipeline, if a slice is not a function of what the decoder is given, or the frames of
            a latent frame cannot be told.
    """

    def of(vae: Any) -> Decode:
        own = vae.decode

        def decode(z: Tensor, *args: Any, **kwargs: Any) -> Any:
            if z.ndim == 5:
                found.append(_layout(pipeline, vae, lambda part: _frames_in(own(part, *args, **kwargs)), z))
            return own(z, *args, **kwargs)

        return decode

    return of


def _layout(pipeline: str, vae: Any, decode: Callable[[Tensor], Tensor], z: Tensor) -> FrameLayout:
    calls: list[tuple[int, int]] = []
    repeatable: list[bool] = []
    with _decoder_replaced(vae, _observed(vae.decoder, calls, repeatable)):
        whole = decode(z)  # to its end, where a VAE clears its memory
    if not all(repeatable):
        raise ValueError(
            f"the {type(vae).__name__} of {pipeline} remembers earlier frames in its modules, so that no slice can be "
            f"evaluated again; leave decode_frames out."
        )
    count, frames = z.shape[2], whole.shape[2]
    parts = _parts(calls, count, frames)
    if len(parts) > 1:
        beginnings = tuple(accumulate(latent_frames for latent_frames, _ in parts))
    else:
        together = bool(calls) and all(latent_frames == count for latent_frames, _ in calls)
        beginnings = tuple(range(1, count + 1)) if together else (count,)
        first = decode(z[:, :, :1]).shape[2]
        parts = [(1, first), (count - 1, frames - first)] if count > 1 else [(1, frames)]
    sizes = _sizes(pipeline, parts)
    # The first and the last beginning speak for those between.
    if not all(_stands_alone(decode, z, whole, sizes, end) for end in {beginnings[0], beginnings[-2:][0]} - {count}):
        beginnings = (count,)
    return FrameLayout(sizes, beginnings, sliced=len(calls) > 1)


def _parts(calls: Sequence[tuple[int, int]], latent_frames: int, frames: int) -> list[tuple[int, int]]:
    """The calls that one after the other make the whole video, (latent frames, frames) each; the whole if they do not.

    They are repeated where the VAE decodes the samples of a batch, or tiles, one after the other.
    """
    for end in range(1, len(calls) + 1):
        if sum(before for before, _ in calls[:end]) == latent_frames:
            explained = sum(after for _, after in calls[:end]) == frames and len(calls) % end == 0
            if explained and list(calls) == list(calls[:end]) * (len(calls) // end):
                return list(calls[:end])
    return [(latent_frames, frames)]


def _sizes(pipeline: str, parts: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """Frames of each latent frame: the same number of all, or fewer of the first one.

    Raises:
        ValueError: if the parts are otherwise.
    """
    count, frames = (sum(column) for column in zip(*parts, strict=True))
    each = parts[-1][1] // parts[-1][0]
    first = frames - each * (count - 1)
    if not 1 <= first <= each:
        raise ValueError(
            f"{pipeline} makes {frames} frames of {count} latent frames, not as many of each; leave decode_frames out."
        )
    return (first, *[each] * (count - 1))


def _stands_alone(decode: Callable[[Tensor], Tensor], z: Tensor, whole: Tensor, sizes: Sequence[int], end: int) -> bool:
    """Whether the frames of the first `end` latent frames depend on no later one, and are what these alone decode to."""
    frames = sum(sizes[:end])
    changed = z.clone()
    changed[:, :, end:] *= -2
    if not torch.equal(decode(changed)[:, :, :frames], whole[:, :, :frames]):
        return False
    alone = decode(z[:, :, :end])
    return alone.shape[2] == frames and same(alone, whole[:, :, :frames])


def same(a: Tensor, b: Tensor) -> bool:
    """Whether these are the same but for rounding."""
    tolerance = _SAME_FINE if a.dtype in (torch.float32, torch.float64) else _SAME_COARSE
    return a.shape == b.shape and bool((a.double() - b.double()).norm() <= tolerance * b.double().norm())


# ------------------------------------------------------------------------------------------------ the decoder that is called


@contextmanager
def _decoder_replaced(vae: Any, function: Callable[..., Any]) -> Iterator[None]:
    """Within this context the `decode` of this object calls `function`; its modules, which others share, are not touched."""
    vars(vae)["decoder"] = called_in_place_of(vae.decoder, function)
    try:
        yield
    finally:
        del vars(vae)["decoder"]


def _checkpointed(decoder: nn.Module) -> Callable[..., Any]:
    """The decoder, evaluated again in the backward pass; of a call only its inputs are kept, the caches among them."""

    def call(*args: Any, **kwargs: Any) -> Any:
        given = _own(args), _own(kwargs)
        output, written = checkpoint(_called, decoder, *given, use_reentrant=False)
        _write_back(written, (args, kwargs))
        return output

    return call


def _observed(decoder: nn.Module, calls: list[tuple[int, int]], repeatable: list[bool]) -> Callable[..., Any]:
    """The decoder, which adds to the lists how many frames it gets and gives, and whether it gives the same a second time.

    One that keeps a cache in its modules does not.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        given = _own(args), _own(kwargs)
        output, written = _called(decoder, *given)
        again, _ = _called(decoder, *given)
        repeatable.append(torch.equal(_first(output), _first(again)))
        calls.append(([*args, *kwargs.values()][0].shape[2], _first(output).shape[2]))
        _write_back(written, (args, kwargs))
        return output

    return call


def _called(decoder: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, Any]]:
    """The output, and the arguments afterwards: a cache may be a list that is written into, here into a copy."""
    own_args, own_kwargs = _own(args), _own(kwargs)
    return decoder(*own_args, **own_kwargs), (own_args, own_kwargs)


def _own(values: Any) -> Any:
    """The arguments with copies of the lists and dicts among them, which hold the same tensors."""
    if isinstance(values, dict):
        return {name: _copied(value) for name, value in values.items()}
    return tuple(_copied(value) for value in values)


def _copied(value: Any) -> Any:
    return copy.copy(value) if isinstance(value, list | dict) else value


def _write_back(written: tuple[Any, Any], given: tuple[Any, Any]) -> None:
    """Into the lists and dicts that were given, what was written into their copies."""
    pairs = [*zip(given[0], written[0], strict=True), *((given[1][name], written[1][name]) for name in given[1])]
    for original, own in pairs:
        if isinstance(original, list):
            original[:] = own
        elif isinstance(original, dict):
            original.clear()
            original.update(own)


def _first(output: Any) -> Tensor:
    """A decoder that hands its cache on returns it beside the frames."""
    frames: Tensor = output[0] if isinstance(output, tuple) else output
    return frames


def _frames_in(decoded: Any) -> Tensor:
    """(B, 3, F, H, W)."""
    frames: Tensor = decoded[0] if isinstance(decoded, tuple) else decoded.sample
    return frames


def _with_frames(decoded: Any, frames: list[int]) -> Any:
    """The output of a `decode` with these frames only."""
    chosen = _frames_in(decoded)
    chosen = chosen if len(frames) == chosen.shape[2] else chosen[:, :, frames]
    return (chosen, *decoded[1:]) if isinstance(decoded, tuple) else type(decoded)(sample=chosen)
