"""The conditioning of a batch: what the pipeline computes before its denoising loop. It is recorded once and then replayed."""

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
    """One call of a preparing method.

    Args:
        value: the value that the method returned.
        states: the states of the samples' generators after the call, one for each generator.
    """

    value: Any
    states: tuple[Tensor, ...]


@dataclass(frozen=True)
class Recording:
    """One dry run of the pipeline's call.

    Args:
        call_kwargs: arguments of the pipeline's `__call__`.
        returns: name of a preparing method → its recorded calls, in order.
        vae_dtype: dtype of the VAE's weights when the loop starts; a preparing method may have cast them. `None` without a VAE.
    """

    call_kwargs: dict[str, Any]
    returns: dict[str, tuple[Returned, ...]]
    vae_dtype: torch.dtype | None


@dataclass(frozen=True)
class Origin:
    """The origin of a latent that a scheduler steps.

    Args:
        source: name of the function that draws the latent, such as "prepare_latents" or "randn_tensor". The first tensor that it
            returns contains the latent; its other values (image latents, masks) are conditions.
        call: number of the call of this function, from 0.
        place: indices of the latent's elements in one flattened sample of that tensor, int64, shape of the latent without its
            batch axis. Needed where the tensor also contains condition frames or channels; `None` if the tensor is the latent.
    """

    source: str
    call: int = 0
    place: Tensor | None = None

    def latent(self, recording: Recording) -> Tensor:
        """The latent in this recording, shape (B, …), in the pipeline's dtype."""
        latents = self._prepared(recording)
        return latents if self.place is None else latents.flatten(1)[:, self.place]

    def replaced(self, recording: Recording, returns: dict[str, tuple[Returned, ...]], latent: Tensor) -> None:
        """Replace the recorded latent in `returns`, which is changed in place.

        Args:
            recording: the dry run that `returns` was copied from.
            returns: name of a preparing method → its recorded calls.
            latent: the new latent, of the recorded one's shape (B, …); it is rounded to the pipeline's dtype.
        """
        latents = self._prepared(recording)
        whole = latent.to(latents.dtype)
        if self.place is not None:
            whole = latents.clone()  # keeps the memory layout, on which the rounding of kernels may depend
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
    """The conditioning of one batch, made by `PipelineReplay.prepare`. It holds for the whole batch; no rows can be selected.

    Args:
        recordings: guided (True) or not (False) → what the pipeline's call prepared. Both are the same where no guidance acts.
        origins: origin of each latent of x_0. There are several if the state consists of several latents, each stepped by its own
            scheduler.
        generators: copies of the samples' generators, in their state before the call.
    """

    recordings: dict[bool, Recording]
    origins: tuple[Origin, ...]
    generators: tuple[torch.Generator, ...]

    def recording(self, guided: bool) -> Recording:
        """The dry run with or without guidance.

        Raises:
            ValueError: if `prepare` did not make this recording.
        """
        if guided not in self.recordings:
            raise ValueError(f"the conditioning was prepared without guided={guided}; ask prepare for it.")
        return self.recordings[guided]

    @property
    def start(self) -> Tensor:
        """x_0 in the pipeline's dtype, shape (B, …), or (B, N) if it consists of several latents; see `joined`."""
        return joined(self._latents(next(iter(self.recordings.values()))))

    def returns_with(self, x: Tensor, guided: bool) -> dict[str, tuple[Returned, ...]]:
        """The recorded calls of the dry run, with x_0 replaced by x.

        Args:
            x: state, of the shape of x_0. States are kept in float32; here x is rounded to the pipeline's dtype.
            guided: whether the dry run is the one with guidance.

        Returns:
            Name of a preparing method → its calls, in order.

        Raises:
            ValueError: if the shape of x is not that of x_0, or `prepare` did not make this recording.
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
    """Flatten tensors of shapes (B, …) and join them, in their order, to shape (B, N). A single tensor is returned as it is."""
    return parts[0] if len(parts) == 1 else torch.cat([part.flatten(1) for part in parts], 1)


def separated(x: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """The inverse of `joined`: split x into tensors of these shapes (B, …)."""
    if len(shapes) == 1:
        return [x]
    sizes = [shape[1:].numel() for shape in shapes]
    # Contiguous, as a separate tensor would be: the rounding of kernels may depend on the memory layout.
    return [part.reshape(shape).contiguous() for part, shape in zip(x.split(sizes, 1), shapes, strict=True)]


def origin_of(latent: Tensor, returns: Mapping[str, Sequence[Returned]]) -> Origin | None:
    """Find the call whose first returned tensor equals this latent; `None` if there is none."""
    for source, calls in returns.items():
        for number, returned in enumerate(calls):
            found = latents_in(returned.value)
            if isinstance(found, Tensor) and found.shape == latent.shape and torch.equal(found, latent.to(found.dtype)):
                return Origin(source, number)
    return None


def latents_in(value: Any) -> Tensor:
    """The tensor that contains x_0: the first value that a preparing method returned."""
    latents: Tensor = value[0] if isinstance(value, tuple) and value else value
    return latents


class Preparations:
    """Records what the wrapped functions return to the pipeline's call, but not what they return to each other.

    Args:
        generators: the generators of the call, one for each sample.

    Attributes:
        returns: name of a function → its recorded calls, in order.
    """

    def __init__(self, generators: list[torch.Generator]) -> None:
        self.returns: dict[str, list[Returned]] = {}
        self._generators = generators
        self._depth = 0

    def recording(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap `function` so that its calls are recorded under `name`."""

        @functools.wraps(function)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            """Call the function; record its value and the generators' states unless another wrapped function called it."""
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
    """Replaces `Preparations` to find which prepared elements the loop starts from: each latent element becomes its own index.

    A half-precision latent cannot represent large indices. So one instance writes one digit of the indices, in base `BASE`.

    Args:
        digit: position of the digit; 0 is the least significant one.
    """

    BASE = 256  # integers below it are exact in every floating dtype of latents, bfloat16 included

    def __init__(self, digit: int) -> None:
        self._unit = self.BASE**digit

    def recording(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap `function` so that the latents of its first call are replaced by digits. Later calls are not changed."""
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
        """The digits that are needed to number the elements of one sample, from 0."""
        return range(max(1, math.ceil(math.log(latents[0].numel(), cls.BASE))))


def place_of(x: Tensor, latents: Tensor, digits: list[Tensor]) -> Tensor | None:
    """Find the elements of `latents` that x consists of.

    Args:
        x: the state that the loop starts from, shape (B, …).
        latents: the prepared latents, shape (B, …).
        digits: the states that the loop started from with `Numbering`, one for each digit, least significant first; shapes as x.

    Returns:
        Index of each element of x in one flattened sample of `latents`, int64, shape of x without the batch axis. `None` if x is
        not a selection of different elements, the same for all samples.
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
    """Copies of the generators, on the same devices and in the same states."""
    return [torch.Generator(generator.device).set_state(generator.get_state()) for generator in generators]


def remembering(function: Callable[..., Any], calls: list[tuple[Any, Any]]) -> Callable[..., Any]:
    """Wrap `function` so that it is evaluated once for the same arguments.

    The output is not copied, because pipelines do not write into the outputs of their encoders.

    Args:
        function: the function to wrap.
        calls: cache of ((args, kwargs), output); new calls are appended.
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
    """Copy nested tuples, lists and dicts, but not the objects in them: some pipelines write into the lists that they get."""
    if type(value) is dict:
        return {key: fresh(item) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(fresh(item) for item in value)
    return value


def in_order(name: str, returns: tuple[Returned, ...], generators: list[torch.Generator]) -> Callable[..., Any]:
    """Make a function that ignores its arguments and returns the recorded values in order.

    Each call also sets the generators to their recorded states, because the pipeline may draw from them afterwards.

    Args:
        name: name of the replaced method, for messages.
        returns: its recorded calls, in order.
        generators: the generators of the replay, one for each sample.

    Raises:
        ValueError: by the returned function, if it is called more often than was recorded.
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
