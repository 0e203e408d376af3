"""The start-up summary: what will be trained, and what the first update took; at most eight lines, on the main process."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerState

from ..config import AdjointMatchingConfig
from ..model.denoiser import PipelineDenoiser
from ..model.lora import ADAPTER
from .cost import UpdateCost
from .phases import Phases
from .tell import tell

__all__ = ["RunSummary", "describe_first_update", "describe_run"]


class RunSummary(TrainerCallback):
    """Print the summary when training begins, and time and memory after the first update.

    Args:
        describe: f(state) → the lines to print when training begins.
        device: the device whose time and memory are measured.

    Attributes:
        phases: times of the first update of this call of `train`.
    """

    def __init__(self, describe: Callable[[TrainerState], Sequence[str]], device: torch.device) -> None:
        self.phases = Phases(device)
        self._describe = describe
        self._device = device

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.phases = Phases(self._device)
        if state.is_world_process_zero and state.global_step < state.max_steps:
            for line in self._describe(state):
                tell(line)

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if not self.phases.seconds:
            self.phases.begin()

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if not self.phases.measuring:
            return
        self.phases.end()
        if state.is_world_process_zero:
            for line in describe_first_update(self.phases.seconds, state, self._device):
                tell(line)


def describe_run(
    denoiser: PipelineDenoiser,
    args: AdjointMatchingConfig,
    state: TrainerState,
    *,
    method: str,
    reward_scale: float,
    cost: UpdateCost,
) -> list[str]:
    """The six lines of the summary before the first update.

    Args:
        denoiser: with the trained network.
        args: the settings.
        state: the trainer's state as training begins.
        method: name of the objective or of another training method.
        reward_scale: λ of the first update, nats per unit of reward.
        cost: of the first update.
    """
    replay, images = denoiser.replay, _images_of_an_update(args)
    asked = f"{images * cost.evaluations:,} in update {state.global_step + 1}, {cost.evaluations} an image"
    return [
        f"{type(replay.pipeline).__name__}: {_weights(denoiser)}",
        f"objective: {method}, λ = {reward_scale:.4g} nats per unit of reward",
        f"steps: {_steps(len(replay.stds), args, cost)}",
        f"images an update: {images} = {_product(args)}; {_updates(state, args)}",
        f"denoiser evaluations: {asked}",
        f"devices: {_device(args.device)}, {_counted(args.world_size, 'process')}; {_dtype(denoiser, args)}",
    ]


def describe_first_update(seconds: dict[str, float], state: TrainerState, device: torch.device) -> list[str]:
    """The two lines after the first update, or one if no update is left.

    Args:
        seconds: phase of the update → seconds.
        state: the trainer's state after the update.
        device: the device whose peak memory is reported.
    """
    total, left = sum(seconds.values()), state.max_steps - state.global_step
    phases = ", ".join(f"{name} {_duration(spent)}" for name, spent in seconds.items())
    lines = [f"update {state.global_step} took {_duration(total)}: {phases}{_peak_memory(device)}"]
    if left > 0:
        time = _duration(left * total)
        lines.append(f"{_counted(left, 'update')} to go, about {time} at this speed, without evaluations and checkpoints")
    return lines


def _weights(denoiser: PipelineDenoiser) -> str:
    """Which weights are trained, and how many are frozen."""
    replay, network = denoiser.replay, denoiser.network
    modules = [part for part in replay.pipeline.components.values() if isinstance(part, nn.Module)]
    weights = {id(p): p for part in modules for p in part.parameters()}.values()  # parts may share some
    trained = sum(p.numel() for p in weights if p.requires_grad)
    frozen = sum(p.numel() for p in weights) - trained
    if denoiser.base_adapters is None:
        which, kept = "all weights of", ", and a frozen copy of the trained ones"
    else:
        which, kept = f"LoRA of rank {network.peft_config[ADAPTER].r} on", ""
    part = f"{which} the {replay.component} ({type(network).__name__})"
    return f"{part}, {_large(trained)} weights trained, {_large(frozen)} frozen{kept}"


def _steps(count: int, args: AdjointMatchingConfig, cost: UpdateCost) -> str:
    iterations = f", in each of {args.num_iterations} iterations" if args.num_iterations > 1 else ""
    return f"K = {count} on each path, S = {cost.loss_steps} carry the loss{iterations}"


def _images_of_an_update(args: AdjointMatchingConfig) -> int:
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    return rows * args.num_generations


def _product(args: AdjointMatchingConfig) -> str:
    factors = [
        _counted(args.per_device_train_batch_size, "prompt"),
        _counted(args.num_generations, "image") + " a prompt",
        f"{args.gradient_accumulation_steps} accumulated",
        _counted(args.world_size, "process"),
    ]
    return " × ".join(factors)


def _updates(state: TrainerState, args: AdjointMatchingConfig) -> str:
    left = _counted(state.max_steps - state.global_step, "update")
    return f"{left} to make, this dry run makes one" if args.dry_run else f"{left} to make"


def _device(device: torch.device) -> str:
    """Name of the device, and how many GPUs are visible."""
    if device.type != "cuda":
        return str(device)
    return f"{device} ({torch.cuda.get_device_name(device)}, of {_counted(torch.cuda.device_count(), 'GPU')} visible)"


def _dtype(denoiser: PipelineDenoiser, args: AdjointMatchingConfig) -> str:
    """Dtype of the base's weights, and of the computation if it is another."""
    weights = next(p for name, p in denoiser.network.named_parameters() if p.is_floating_point() and "lora_" not in name)
    mixed = "bfloat16" if args.bf16 else "float16" if args.fp16 else ""
    return str(weights.dtype).removeprefix("torch.") + (f", computed in {mixed}" if mixed else "")


def _peak_memory(device: torch.device) -> str:
    """Peak memory of a CUDA device, else of the process; empty if neither is known."""
    if device.type == "cuda":
        return f"; peak memory {torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB on {device}"
    if sys.platform == "win32":  # which has no `resource`
        return ""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return f"; peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.2f} GiB of the process"


def _counted(number: int, one: str) -> str:
    plural = f"{one}es" if one.endswith("s") else f"{one}s"
    return f"{number} {one if number == 1 else plural}"


def _large(number: int) -> str:
    """1234 → "1.23 k"."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {letter}"
    return str(number)


def _duration(seconds: float) -> str:
    """A duration in seconds, minutes or hours."""
    if seconds >= 2 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 120 else f"{seconds:.2f} s"
