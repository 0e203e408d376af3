"""The conditioning of a batch: everything that the pipeline computes before its loop, recorded once and replayed."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Conditioning", "Origin", "Preparations", "Recording", "Returned", "copied", "fresh", "in_order"]
__all__ += ["Numbering", "joined", "latents_in", "origin_of", "place_of", "remembering"]


@dataclass(frozen=True)
class Returned:
    """What a preparing method returned, and the states of the samples' generators after it."""

    value: Any
    states: tuple[Tensor, ...]


@dataclass(frozen=True)
class Recording:
    """One dry run of the pipeline's call.

    Args:
        call_kwargs: arguments of the pipeline's `__call__`.
        returns: name of a preparing method → what it returned, call by call.
        vae_dtype: of the VAE's weights when the loop starts, which a preparing method may have cast; `None` without a VAE.
    """

    call_kwargs: dict[str, Any]
    returns: dict[str, tuple[Returned, ...]]
    vae_dtype: torch.dtype | None


@dataclass(frozen=True)
class Origin:
    """Where a latent that a scheduler steps comes from.

    Args:
        source: what draws it, such as "prepare_latents" or "randn_tensor"; the first tensor it returned holds it, whatever it
            returned beside it (image latents, masks) is condition.
        call: which of the calls of this name, from 0.
        place: where the elements of a sample's latent lie among those of that tensor, beside condition frames or channels, shape
            that of the latent without its batch, int64; `None` if the tensor is the latent.
    """

    source: str
    call: int = 0
    place: Tensor | None = None

    def latent(self, recording: Recording) -> Tensor:
        """Shape (B, …), in the pipeline's dtype."""
        latents = self._prepared(recording)
        return latents if self.place is None else latents.flatten(1)[:, self.place]

    def replaced(self, recording: Recording, returns: dict[str, tuple[Returned, ...]], latent: Tensor) -> None:
        """Put a latent of this shape in its place in `returns`, rounded to the pipeline's dtype."""
        latents = self._prepared(recording)
        whole = latent.to(latents.dtype)
        if self.place is not None:
            whole = latents.clone()  # as it lies in memory, by which kernels may round
            index: tuple[slice | Tensor, ...] = (slice(None), *torch.unravel_index(self.place, latents.shape[1:]))
            whole[index] = latent.to(latents.dtype)
        calls = list(returns[self.source])
        value = calls[self.call].value
        calls[self.call] = Returned((whole, *value[1:]) if isinstance(value, tuple) else whole, calls[self.call].states)
        returns[self.source] = tuple(calls)

    def _prepared(self, recording: Recording) -> Tensor:
        return latents_in(recording.returns[self.source][self.call].value)


@dataclass(frozen=True)
class Conditioning:
    """Recorded by `PipelineReplay.prepare`. It belongs to one batch as a whole: rows cannot be taken out of it.

    Args:
        recordings: guided or not → what the pipeline's call prepared; both the same where no guidance acts.
        origins: of x_0; several where the state is several latents, each stepped by a scheduler of its own.
        generators: of the samples, copies, as they were before the call.
    """

    recordings: dict[bool, Recording]
    origins: tuple[Origin, ...]
    generators: tuple[torch.Generator, ...]

    def recording(self, guided: bool) -> Recording:
        if guided not in self.recordings:
            raise ValueError(f"the conditioning was prepared without guided={guided}; ask prepare for it.")
        return self.recordings[guided]

    @property
    def start(self) -> Tensor:
        """x_0 in the pipeline's dtype, shape (B, …); of several latents (B, N), see `joined`."""
        return joined(self._latents(next(iter(self.recordings.values()))))

    def returns_with(self, x: Tensor, guided: bool) -> dict[str, tuple[Returned, ...]]:
        """The returns of the dry run with x in place of x_0, rounded to the pipeline's dtype (states are kept in float32).

        Raises:
            ValueError: if x has another shape than x_0.
        """
        if x.shape != self.start.shape:
            raise ValueError(f"x has shape {tuple(x.shape)}; it must be that of x_0, {tuple(self.start.shape)}.")
        recording = self.recording(guided)
        returns, latents = dict(recording.returns), self._latents(recording)
        for origin, latent in zip(self.origins, separated(x, [latent.shape for latent in latents]), strict=True):
            origin.replaced(recording, returns, latent)
        return returns

    def _latents(self, recording: Recording) -> list[Tensor]:
        return [origin.latent(recording) for origin in self.origins]


def joined(parts: Sequence[Tensor]) -> Tensor:
    """A tensor alone as it is; several of shapes (B, …) as one of shape (B, N), in their order."""
    return parts[0] if len(parts) == 1 else torch.cat([part.flatten(1) for part in parts], 1)


def separated(x: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """The tensors of these shapes that `joined` made x of."""
    if len(shapes) == 1:
        return [x]
    sizes = [shape[1:].numel() for shape in shapes]
    # Each as it would lie in memory by itself, by which kernels may round.
    return [part.reshape(shape).contiguous() for part, shape in zip(x.split(sizes, 1), shapes, strict=True)]


def origin_of(latent: Tensor, returns: Mapping[str, Sequence[Returned]]) -> Origin | None:
    """The call that returned this latent, as its first tensor; `None` if none did."""
    for source, calls in returns.items():
        for number, returned in enumerate(calls):
            found = latents_in(returned.value)
            if isinstance(found, Tensor) and found.shape == latent.shape and torch.equal(found, latent.to(found.dtype)):
                return Origin(source, number)
    return None


def latents_in(value: Any) -> Tensor:
    """The first of what prepare_latents returns holds x_0."""
    latents: Tensor = value[0] if isinstance(value, tuple) and value else value
    return latents


class Preparations:
    """Records what the wrapped functions return to the pipeline's call; nested calls are not recorded.

    Args:
        generators: those of the call.
    """

    def __init__(self, generators: list[torch.Generator]) -> None:
        self.returns: dict[str, list[Returned]] = {}
        self._generators = generators
        self._depth = 0

    def recording(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, recorded under `name`."""

        @functools.wraps(function)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            """The value, noted if the call is the pipeline's own, and where the generators stand after it."""
            self._depth += 1
            try:
                value = function(*args, **kwargs)
            finally:
                self._depth -= 1
            if self._depth == 0:
                states = tuple(generator.get_state() for generator in self._generators)
                self.returns.setdefault(name, []).append(Returned(value, states))
            return fresh(value)

        return recorded


class Numbering:
    """In place of `Preparations`: latents that say which of a sample's elements they are, in one digit of their numbers.

    Args:
        digit: 0 for the last one; to a base that is exact in every dtype of latents.
    """

    BASE = 256

    def __init__(self, digit: int) -> None:
        self._unit = self.BASE**digit

    def recording(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, whose first returned latents become numbers."""
        calls: list[None] = []

        @functools.wraps(function)
        def numbered(*args: Any, **kwargs: Any) -> Any:
            value = function(*args, **kwargs)
            calls.append(None)
            if len(calls) > 1:
                return value
            latents = latents_in(value)
            digits = torch.arange(latents[0].numel(), device=latents.device) // self._unit % self.BASE
            marked = digits.view(latents.shape[1:]).expand_as(latents).to(latents.dtype, copy=True)
            return (marked, *value[1:]) if isinstance(value, tuple) else marked

        return numbered

    @classmethod
    def digits_of(cls, latents: Tensor) -> range:
        """As many as it takes to number a sample's elements."""
        return range(max(1, math.ceil(math.log(latents[0].numel(), cls.BASE))))


def place_of(x: Tensor, latents: Tensor, digits: list[Tensor]) -> Tensor | None:
    """Where the elements of a sample of x lie among those of `latents`; `None` if x is no selection of them.

    Args:
        x: what the loop starts from, shape (B, …).
        latents: what was prepared, shape (B, …).
        digits: what the loop started from when `Numbering` prepared the latents, the last digit first.
    """
    if len(x) != len(latents) or any(found.shape != x.shape for found in digits):
        return None
    place = torch.zeros(x.shape, dtype=torch.int64, device=x.device)
    for position, found in enumerate(digits):
        place += found.round().to(torch.int64) * Numbering.BASE**position
    first, elements = place[0], latents.flatten(1)
    if not (place == first).all() or len(first.unique()) != first.numel() or first.min() < 0 or first.max() >= elements.shape[1]:
        return None
    return first if torch.equal(elements[:, first], x.to(latents.dtype)) else None


def copied(generators: Iterable[torch.Generator]) -> list[torch.Generator]:
    """Copies of the generators in the same state."""
    return [torch.Generator(generator.device).set_state(generator.get_state()) for generator in generators]


def remembering(function: Callable[..., Any], calls: list[tuple[Any, Any]]) -> Callable[..., Any]:
    """`function`, evaluated once for the same arguments; `calls` is its memory of (arguments, output).

    The output itself is given out again: pipelines leave what an encoder returned as it is.
    """

    def remembered(*args: Any, **kwargs: Any) -> Any:
        for arguments, output in calls:
            if _same(arguments, (args, kwargs)):
                return output
        calls.append(((args, kwargs), function(*args, **kwargs)))
        return calls[-1][1]

    return remembered


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if type(a) is not type(b) or isinstance(a, Tensor):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def fresh(value: Any) -> Any:
    """The same leaves in new tuples, lists and dicts: pipelines exist that write into the lists they are given."""
    if type(value) is dict:
        return {key: fresh(item) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(fresh(item) for item in value)
    return value


def in_order(name: str, returns: tuple[Returned, ...], generators: list[torch.Generator]) -> Callable[..., Any]:
    """A function that ignores its arguments and gives the recorded `returns` one after the other.

    It leaves the generators as the recorded call did: the pipeline may go on to draw from them.

    Raises:
        ValueError: (when called) if nothing is left to give.
    """
    remaining = iter(returns)

    def replayed(*args: Any, **kwargs: Any) -> Any:
        for returned in remaining:
            for generator, state in zip(generators, returned.states, strict=True):
                generator.set_state(state)
            return fresh(returned.value)
        raise ValueError(
            f"the pipeline calls {name} more than the {len(returns)} times recorded by prepare(); pass a conditioning that was "
            f"prepared with the same arguments."
        )

    return replayed
