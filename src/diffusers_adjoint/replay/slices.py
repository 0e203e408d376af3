"""Decode a video VAE slice by slice, with gradient checkpointing of each slice, and find which frames a slice makes.

Many video VAEs call their decoder for one slice of a few latent frames after the other. A cache of the convolutions' inputs
carries what the next slice needs. This module calls the VAE's own `decode`, on fewer latent frames, and replaces the decoder by a
checkpointed one. Values and gradients are those of decoding the whole video, including the gradient through the caches.
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
"""The `decode` of a VAE: latents z (B, C, T, H, W) and further arguments → a tuple, or an object with a `sample`."""

# Relative tolerances of `same`, for float32 or better and for half precision: kernels may round differently at another length.
_SAME_FINE, _SAME_COARSE = 1e-4, 3e-2


def has_decoder(vae: Any) -> bool:
    """Whether `vae` is a diffusers model with a `decoder` module, which its `decode` can be expected to call."""
    return isinstance(vae, ModelMixin) and isinstance(getattr(vae, "decoder", None), nn.Module)


def decoding(layout: FrameLayout, frames: Sequence[int]) -> Callable[[Any], Decode]:
    """Make a function that maps a VAE to a `decode` of the chosen frames of a video.

    That `decode` leaves out the latent frames after the last one needed. If the VAE decodes in slices, it checkpoints each slice.

    Args:
        layout: the layout found by `measuring`.
        frames: numbers of the frames, ascending.

    Raises:
        ValueError: by that `decode`, if the number of latent frames is not the layout's.
    """

    def of(vae: Any) -> Decode:
        """The `decode` for this VAE."""
        own = vae.decode

        def decode(z: Tensor, *args: Any, **kwargs: Any) -> Any:
            """The chosen frames of latents z, (B, C, F, H, W), in the VAE's own form of output."""
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
    """Make a function that maps a VAE to a `decode` that also measures the layout of a video's frames.

    The layout is found by a few more decodings of the latents, of their beginning, and of changed latents.

    Args:
        pipeline: the pipeline's name, for messages.
        found: the layout of each decoded video is appended; latents without a time axis are decoded as usual.

    Raises:
        ValueError: by that `decode`, if the decoder keeps a state in its modules, so that a second evaluation of a slice differs;
            or if the latent frames after the first do not all become the same number of frames, and the first no more.
    """

    def of(vae: Any) -> Decode:
        """The `decode` for this VAE."""
        own = vae.decode

        def decode(z: Tensor, *args: Any, **kwargs: Any) -> Any:
            """Decode as the VAE does, and append the layout of the frames of a video's latents z, (B, C, F, H, W)."""
            if z.ndim == 5:
                found.append(_layout(pipeline, vae, lambda part: _frames_in(own(part, *args, **kwargs)), z))
            return own(z, *args, **kwargs)

        return decode

    return of


def _layout(pipeline: str, vae: Any, decode: Callable[[Tensor], Tensor], z: Tensor) -> FrameLayout:
    """Measure the layout of z, shape (B, C, T, H, W); `decode` maps latents to frames (B, 3, F, H, W)."""
    calls: list[tuple[int, int]] = []
    repeatable: list[bool] = []
    with _decoder_replaced(vae, _observed(vae.decoder, calls, repeatable)):
        whole = decode(z)  # not interrupted: VAEs clear their caches at the end
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
    # Only the first and the last proper beginning are tested, to save decodings; those between are assumed to behave alike.
    if not all(_stands_alone(decode, z, whole, sizes, end) for end in {beginnings[0], beginnings[-2:][0]} - {count}):
        beginnings = (count,)
    return FrameLayout(sizes, beginnings, sliced=len(calls) > 1)


def _parts(calls: Sequence[tuple[int, int]], latent_frames: int, frames: int) -> list[tuple[int, int]]:
    """Find the decoder calls that make the video once, each as (latent frames, frames).

    A VAE that decodes the samples of a batch, or tiles, one after the other repeats this sequence of calls. If no sequence adds
    up to the whole video, the result is a single part: the whole video.

    Args:
        calls: (latent frames, frames) of all calls of the decoder, in order.
        latent_frames, frames: numbers of the whole video.
    """
    for end in range(1, len(calls) + 1):
        if sum(before for before, _ in calls[:end]) == latent_frames:
            explained = sum(after for _, after in calls[:end]) == frames and len(calls) % end == 0
            if explained and list(calls) == list(calls[:end]) * (len(calls) // end):
                return list(calls[:end])
    return [(latent_frames, frames)]


def _sizes(pipeline: str, parts: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """Number of frames of each latent frame: the same for all, or fewer for the first.

    Args:
        pipeline: the pipeline's name, for messages.
        parts: (latent frames, frames) of each part of the video.

    Raises:
        ValueError: if the parts' numbers do not agree with that.
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
    """Whether the first `end` latent frames can be decoded alone.

    Two tests: their frames must not change at all with the later latent frames, and decoding them alone must give these frames.

    Args:
        decode: latents → frames (B, 3, F, H, W).
        z: latents of the whole video, shape (B, C, T, H, W).
        whole: its frames, shape (B, 3, F, H, W).
        sizes: number of frames of each latent frame.
        end: number of latent frames to test.
    """
    frames = sum(sizes[:end])
    changed = z.clone()
    changed[:, :, end:] *= -2
    if not torch.equal(decode(changed)[:, :, :frames], whole[:, :, :frames]):
        return False
    alone = decode(z[:, :, :end])
    return alone.shape[2] == frames and same(alone, whole[:, :, :frames])


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have one shape and differ by rounding only, in the norm relative to b's."""
    tolerance = _SAME_FINE if a.dtype in (torch.float32, torch.float64) else _SAME_COARSE
    return a.shape == b.shape and bool((a.double() - b.double()).norm() <= tolerance * b.double().norm())


# ---------------------------------------------------------------------------------------------------- replacing the decoder


@contextmanager
def _decoder_replaced(vae: Any, function: Callable[..., Any]) -> Iterator[None]:
    """Within this context `vae.decode` calls `function` instead of the decoder.

    Only the attribute of this object is set, because other objects share its dict of modules.
    """
    vars(vae)["decoder"] = called_in_place_of(vae.decoder, function)
    try:
        yield
    finally:
        del vars(vae)["decoder"]


def _checkpointed(decoder: nn.Module) -> Callable[..., Any]:
    """Wrap the decoder in gradient checkpointing: a call keeps only its inputs and caches, and is recomputed in backward."""

    def call(*args: Any, **kwargs: Any) -> Any:
        given = _own(args), _own(kwargs)
        output, written = checkpoint(_called, decoder, *given, use_reentrant=False)
        _write_back(written, (args, kwargs))
        return output

    return call


def _observed(decoder: nn.Module, calls: list[tuple[int, int]], repeatable: list[bool]) -> Callable[..., Any]:
    """Wrap the decoder so that its calls are recorded. Each call is evaluated twice, to see whether it can be repeated.

    A decoder that keeps a cache in its modules cannot: its second output differs.

    Args:
        decoder: the VAE's decoder.
        calls: (latent frames, frames) of each call is appended.
        repeatable: whether both outputs are equal is appended.
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
    """Call the decoder on copies of the lists and dicts among its arguments, because it may write its cache into them.

    Returns:
        The output, and the copied (args, kwargs) after the call.
    """
    own_args, own_kwargs = _own(args), _own(kwargs)
    return decoder(*own_args, **own_kwargs), (own_args, own_kwargs)


def _own(values: Any) -> Any:
    """Shallow copies of the lists and dicts among positional or keyword arguments; the tensors are not copied."""
    if isinstance(values, dict):
        return {name: _copied(value) for name, value in values.items()}
    return tuple(_copied(value) for value in values)


def _copied(value: Any) -> Any:
    return copy.copy(value) if isinstance(value, list | dict) else value


def _write_back(written: tuple[Any, Any], given: tuple[Any, Any]) -> None:
    """Copy the contents of the lists and dicts in `written` to those in `given`; both are (args, kwargs)."""
    pairs = [*zip(given[0], written[0], strict=True), *((given[1][name], written[1][name]) for name in given[1])]
    for original, own in pairs:
        if isinstance(original, list):
            original[:] = own
        elif isinstance(original, dict):
            original.clear()
            original.update(own)


def _first(output: Any) -> Tensor:
    """The frames in a decoder's output. A decoder that passes its cache on returns a tuple (frames, cache)."""
    frames: Tensor = output[0] if isinstance(output, tuple) else output
    return frames


def _frames_in(decoded: Any) -> Tensor:
    """The frames in the output of a `decode`, shape (B, 3, F, H, W)."""
    frames: Tensor = decoded[0] if isinstance(decoded, tuple) else decoded.sample
    return frames


def _with_frames(decoded: Any, frames: list[int]) -> Any:
    """The output of a `decode`, reduced to the frames of these numbers."""
    chosen = _frames_in(decoded)
    chosen = chosen if len(frames) == chosen.shape[2] else chosen[:, :, frames]
    return (chosen, *decoded[1:]) if isinstance(decoded, tuple) else type(decoded)(sample=chosen)
