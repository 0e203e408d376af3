"""The scheduler that a replayed pipeline sees: it chooses the steps of the pipeline's loop and captures the arguments of `step`.

A pipeline's loop reads `for i, t in enumerate(scheduler.timesteps)`. Three replacements control this loop without a change of
the pipeline's code:

- timesteps whose iteration visits chosen positions only (`ReplayedTimesteps`),
- an `enumerate` that keeps the true index i,
- a `step` that stops the call.
"""

from __future__ import annotations

import builtins
import copy
import functools
import inspect
import types
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from .conditioning import copied, joined

__all__ = ["RecordedStep", "ReplayStop", "ReplayedTimesteps", "StandIn", "joined_steps", "make_probe"]
__all__ += ["make_recorder", "probe_class", "replayable"]


class ReplayStop(BaseException):
    """Raised to stop the pipeline's call. It is a BaseException, so that no `except Exception` in the pipeline catches it.

    Args:
        timesteps: the timesteps of the loop, shape (K',), if the call is stopped before its loop; otherwise `None`.
    """

    def __init__(self, timesteps: Tensor | None = None) -> None:
        super().__init__()
        self.timesteps = timesteps


class ReplayedTimesteps(Tensor):
    """The timesteps of the full grid, shape (K',). Only iteration differs from a tensor's: it visits chosen positions.

    Attributes:
        visit: the positions to visit, counted from the end: −1 is the last step. Image-to-image pipelines drop the first steps,
            which changes a step's index but not its distance to the end. If empty, the loop body never runs. If `None`,
            iteration raises `ReplayStop`.
    """

    visit: tuple[int, ...] | None

    @classmethod
    def of(cls, timesteps: Tensor, visit: tuple[int, ...] | None) -> ReplayedTimesteps:
        steps = timesteps.detach().as_subclass(cls)
        steps.visit = visit
        return steps

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **(kwargs or {}))
        if not isinstance(out, Tensor):
            return out
        # The pipeline may loop over a slice or a device copy, so these keep `visit`. Any other result is an ordinary tensor.
        if func in (Tensor.__getitem__, Tensor.to) and isinstance(args[0], cls) and out.ndim == 1:
            return cls.of(out, args[0].visit)
        return out.as_subclass(Tensor)

    def visited(self) -> list[tuple[int, Tensor]]:
        """(index, timestep) for each position to visit.

        Raises:
            ReplayStop: if `visit` is `None`.
            ValueError: if a position is not among the steps that the pipeline kept.
        """
        timesteps = self.as_subclass(Tensor)
        if self.visit is None:
            raise ReplayStop(timesteps)
        steps = len(timesteps)
        if any(position < -steps for position in self.visit):
            raise ValueError(
                f"the pipeline loops over {steps} steps of its grid only, and the one asked for is not among them; leave out "
                f"denoising_end, timesteps and whatever else cuts the grid."
            )
        return [(steps + position, timesteps[position]) for position in self.visit]

    def __iter__(self) -> Iterator[Tensor]:
        return iter([timestep for _, timestep in self.visited()])


def _enumerate(iterable: Iterable[Any], start: int = 0) -> Iterator[Any]:
    if isinstance(iterable, ReplayedTimesteps):
        return iter([(start + index, timestep) for index, timestep in iterable.visited()])
    return builtins.enumerate(iterable, start)


def _filter(function: Any, iterable: Iterable[Any]) -> Iterator[Any]:
    """Filter the grid without visiting it: a pipeline that only inspects its timesteps must not trigger the replay."""
    return builtins.filter(function, iterable.as_subclass(Tensor) if isinstance(iterable, ReplayedTimesteps) else iterable)


def replayable(function: Any) -> Any:
    """A copy of a pipeline's function without its `torch.no_grad`, and with the `enumerate` and `filter` of this module.

    The copy has globals of its own; those of the pipeline's module are not modified.
    """
    function = inspect.unwrap(function)
    names = {**function.__globals__, "enumerate": _enumerate, "filter": _filter}
    rebuilt = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    rebuilt.__kwdefaults__, rebuilt.__annotations__ = function.__kwdefaults__, function.__annotations__
    return rebuilt


class StandIn:
    """Attributes that pipelines written for scaling schedulers (Euler, LMS) expect, with values for memoryless schedulers."""

    init_noise_sigma = 1.0
    captured: Tensor | None = None

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        return sample


def probe_class(scheduler_class: type) -> type:
    """A subclass of the scheduler's class for `make_probe`."""

    # Pipelines inspect the signatures (`sigmas`, `mu`, `eta`, `generator`) before the call; `wraps` keeps the scheduler's own.
    @functools.wraps(scheduler_class.set_timesteps)  # type: ignore[attr-defined]
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        if self._visit is None:  # in the dry run the tables are computed, from the shift and the σ that the pipeline passes
            self._scheduler.set_timesteps(*args, **kwargs)
            _copy_tables(self)

    @functools.wraps(scheduler_class.step)  # type: ignore[attr-defined]
    def step(self: Any, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Capture the prediction and return the sample unchanged; once all awaited streams have captured one, stop the call."""
        self.captured = model_output
        if all(number < len(self.streams) and self.streams[number].captured is not None for number in self._awaited):
            raise ReplayStop
        return SchedulerOutput(prev_sample=sample) if kwargs.get("return_dict", True) else (sample,)

    def deepcopy(self: Any, memo: dict[int, Any]) -> Any:
        """Copy the probe as a further stream: a pipeline copies its scheduler to step a second latent (such as audio)."""
        twin = copy.copy(self)
        twin._scheduler, twin.captured = copy.copy(self._scheduler), None
        self.streams.append(twin)
        return twin

    methods = {"set_timesteps": set_timesteps, "step": step, "__deepcopy__": deepcopy, "__module__": __name__}
    return type("Replayed" + scheduler_class.__name__, (StandIn, scheduler_class), methods)


def _copy_tables(probe: Any) -> None:
    probe.__dict__.update(probe._scheduler.__dict__)
    probe.__dict__.pop("init_noise_sigma", None)
    probe.timesteps = ReplayedTimesteps.of(probe._scheduler.timesteps, probe._visit)


def make_probe(cls: Any, scheduler: Any, visit: tuple[int, ...] | None, awaited: tuple[int, ...] = ()) -> Any:
    """A stand-in for `scheduler` that visits the given positions of its grid.

    The probe's list `streams` holds the probe and the copies that the pipeline makes of it, in order. `step` stores the model
    output in the stream's `captured`.

    Args:
        cls: `probe_class(type(scheduler))`; the caller creates it once, for all probes.
        scheduler: the memoryless scheduler. With `visit=None` the probe's `set_timesteps` sets the tables of this scheduler;
            otherwise its tables are used as they are.
        visit: see `ReplayedTimesteps`.
        awaited: indices into `streams`. `step` stops the call when each of these streams has captured a model output.
    """
    probe = object.__new__(cls)
    probe._scheduler, probe._visit, probe._awaited, probe.streams = scheduler, visit, awaited, [probe]
    _copy_tables(probe)
    return probe


@dataclass(frozen=True)
class RecordedStep:
    """The arguments and the result of one `scheduler.step` in the pipeline's own call.

    The tensors have shape (B, …). If the pipeline steps several latents, they are those of one call of each scheduler, as one
    tensor (B, N) (see `joined`).
    """

    model_output: Tensor
    sample: Tensor
    prev_sample: Tensor
    timestep: Any


def joined_steps(recorder: Any) -> list[RecordedStep]:
    """Combine the records of a recorder's streams into one, step by step.

    Raises:
        ValueError: if the streams differ in their number of steps, their timesteps or their noise levels.
    """
    streams = [stream for stream in recorder.streams if stream.record]
    if len({len(stream.record) for stream in streams}) > 1:
        raise ValueError("one is called more often than another")
    steps = list(zip(*(stream.record for stream in streams), strict=True))
    if len(streams) > 1 and any(len({float(step.timestep) for step in together}) > 1 for together in steps):
        raise ValueError("they are called at different timesteps")
    if any(not torch.equal(stream.levels, streams[0].levels) for stream in streams):
        raise ValueError("they have different noise levels")
    return [
        RecordedStep(
            joined([step.model_output for step in together]),
            joined([step.sample for step in together]),
            joined([step.prev_sample for step in together]),
            together[0].timestep,
        )
        for together in steps
    ]


def make_recorder(
    scheduler: Any, generators: list[torch.Generator], stop_after: int | None = None, kept: int | None = None
) -> Any:
    """A copy of `scheduler` that steps as usual and records its steps.

    The recorder's list `streams` holds the recorder and the copies that the pipeline makes of it, in order. Each has a `record`
    of its own.

    The step noise comes from copies of the generators, whatever generator the pipeline passes. Otherwise it would depend on the
    pipeline whether the loop advances the call's own generators, and so what its decoder draws. The streams share the copies.

    Some pipelines double the batch for guidance and pass 2 B samples to `step`; the first B are used.

    Args:
        scheduler: the scheduler; it is not modified.
        generators: B generators.
        stop_after: stops the call when all streams have taken this many steps. It also stops when one stream starts a further
            step, because the pipeline may make a copy that it never steps. `None` never stops it.
        kept: how many of the last steps each record keeps; `None` for all.
    """
    scheduler_class, batch_size, noise = type(scheduler), len(generators), copied(generators)

    @functools.wraps(scheduler_class.step)
    def step(self: Any, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Take the scheduler's own step for the first B samples, record it, and repeat the result for a doubled batch."""
        if self.steps == stop_after:
            raise ReplayStop
        as_output, copies = kwargs.pop("return_dict", True), len(sample) // batch_size
        kwargs["generator"] = noise
        before = model_output[:batch_size].clone(), sample[:batch_size].clone()  # the pipeline may write into them later
        after = scheduler_class.step(self, before[0], timestep, before[1], *args, return_dict=False, **kwargs)[0]
        self.record.append(RecordedStep(*before, after, timestep))
        self.steps += 1
        if stop_after is not None and all(stream.steps >= stop_after for stream in self.streams):
            raise ReplayStop
        prev_sample = after.clone() if copies == 1 else torch.cat([after] * copies)
        return SchedulerOutput(prev_sample=prev_sample) if as_output else (prev_sample,)

    def deepcopy(self: Any, memo: dict[int, Any]) -> Any:
        twin = copy.copy(self)
        twin.record, twin.steps = deque(maxlen=kept), 0
        self.streams.append(twin)
        return twin

    recorder = copy.deepcopy(scheduler)
    recorder.__dict__.pop("init_noise_sigma", None)
    methods = {"step": step, "__deepcopy__": deepcopy}
    recorder.__class__ = type("Recorded" + scheduler_class.__name__, (StandIn, scheduler_class), methods)
    recorder.record, recorder.steps, recorder.streams = deque(maxlen=kept), 0, [recorder]
    return recorder
