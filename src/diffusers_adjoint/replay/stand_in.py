"""The scheduler that a replayed pipeline sees: it steers the pipeline's loop and catches what is handed to `step`.

A pipeline's loop reads `for i, t in enumerate(scheduler.timesteps)`. Three small things put it under control without touching
the pipeline's code: timesteps that decide which of their positions are visited, an `enumerate` that keeps the true index i,
and a `step` that stops the call.
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
    """Leaves the pipeline's call. A BaseException, so that no `except Exception` on the way swallows it.

    Args:
        timesteps: those that the pipeline was about to loop over, when it is left before its loop.
    """

    def __init__(self, timesteps: Tensor | None = None) -> None:
        super().__init__()
        self.timesteps = timesteps


class ReplayedTimesteps(Tensor):
    """The full grid to look at (length, indexing, arithmetic), of which iteration visits chosen positions only.

    `visit` holds positions counted from the end, −1 being the last step: a pipeline that cuts off the beginning (image to
    image) moves the index but not the distance to the end. Empty: the loop body never runs. `None`: iteration stops the call.
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
        # A slice or a device copy is still a grid to loop over; whatever is computed from it is an ordinary tensor.
        if func in (Tensor.__getitem__, Tensor.to) and isinstance(args[0], cls) and out.ndim == 1:
            return cls.of(out, args[0].visit)
        return out.as_subclass(Tensor)

    def visited(self) -> list[tuple[int, Tensor]]:
        """(index, timestep) for each position to visit.

        Raises:
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
    """A function of the pipeline out of its `torch.no_grad` and with our `enumerate` among its globals, which are a copy."""
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

    # Pipelines read the signatures (`sigmas`, `mu`, `eta`, `generator`) before they call; `wraps` keeps the real ones.
    @functools.wraps(scheduler_class.set_timesteps)  # type: ignore[attr-defined]
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        if self._visit is None:  # the dry run: the pipeline's own shift and σ make the tables
            self._scheduler.set_timesteps(*args, **kwargs)
            _copy_tables(self)

    @functools.wraps(scheduler_class.step)  # type: ignore[attr-defined]
    def step(self: Any, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Keep the prediction, and go on to the next scheduler as if this one had done nothing, until all have theirs."""
        self.captured = model_output
        if all(number < len(self.streams) and self.streams[number].captured is not None for number in self._awaited):
            raise ReplayStop
        return SchedulerOutput(prev_sample=sample) if kwargs.get("return_dict", True) else (sample,)

    def deepcopy(self: Any, memo: dict[int, Any]) -> Any:
        """A pipeline copies its scheduler to step something beside its latents."""
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
    """A stand-in for `scheduler` that visits the given positions of its grid (see `ReplayedTimesteps`).

    Its `streams` are itself and the copies that the pipeline makes of it, in their order. A `step` keeps the model output as
    `captured`, and stops the call when those of the numbers in `awaited` have one. With `visit=None` its `set_timesteps` sets
    the tables of `scheduler` itself; otherwise they are taken as they are. `cls` is `probe_class(type(scheduler))`, made once.
    """
    probe = object.__new__(cls)
    probe._scheduler, probe._visit, probe._awaited, probe.streams = scheduler, visit, awaited, [probe]
    _copy_tables(probe)
    return probe


@dataclass(frozen=True)
class RecordedStep:
    """One call of `scheduler.step`, made by the pipeline itself, for the B samples of the batch.

    Where several latents are stepped, one call of each scheduler, with the tensors as `joined`.
    """

    model_output: Tensor
    sample: Tensor
    prev_sample: Tensor
    timestep: Any


def joined_steps(recorder: Any) -> list[RecordedStep]:
    """What the streams of a recorder have in their records, as one record.

    Raises:
        ValueError: if they have not stepped in turns, at the same timesteps, on the same noise levels.
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
    """A copy of `scheduler` that does its work, keeps the last `kept` steps in `record`, and stops the call after `stop_after`.

    Its `streams` are itself and the copies that the pipeline makes of it, in their order, each with a record of its own. All have
    to be at `stop_after` for the call to stop, or one beyond it: a copy may be made for nothing.

    The noise comes from copies of the generators, whatever the pipeline passes: whether the call's own ones move on during the
    loop would differ from pipeline to pipeline, and with it what its decoder draws. The streams draw from them in turns.

    A pipeline that carries a batch doubled for guidance hands 2 B samples to `step`, of which the first B count.
    """
    scheduler_class, batch_size, noise = type(scheduler), len(generators), copied(generators)

    @functools.wraps(scheduler_class.step)
    def step(self: Any, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The scheduler's own step on the first B samples, recorded, and repeated for the copies."""
        if self.steps == stop_after:
            raise ReplayStop
        as_output, copies = kwargs.pop("return_dict", True), len(sample) // batch_size
        kwargs["generator"] = noise
        before = model_output[:batch_size].clone(), sample[:batch_size].clone()  # the pipeline may go on to write into them
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
