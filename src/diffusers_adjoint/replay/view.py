"""A copy of the pipeline that shares its networks and owns everything else: replaying leaves no trace on the user's object."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, CpuOffload
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.models.cache_utils import CacheMixin
from torch import nn

__all__ = ["called_in_place_of", "denoiser_name", "make_view", "processors_restored", "view_class"]


def denoiser_name(pipeline: DiffusionPipeline) -> str:
    """Name of the pipeline's denoiser, after a check that the pipeline can be replayed at all.

    Raises:
        TypeError: if it is no diffusers pipeline.
        ValueError: if it has no scheduler, no denoiser, no `prepare_latents`, or a denoiser that is cached or offloaded.
    """
    if not isinstance(pipeline, DiffusionPipeline):
        raise TypeError(f"the pipeline is a {type(pipeline).__name__}; pass a diffusers DiffusionPipeline.")
    kind = type(pipeline).__name__
    if not isinstance(getattr(pipeline, "scheduler", None), SchedulerMixin):
        raise ValueError(f"{kind} has no scheduler; pass a pipeline that samples by calling scheduler.step.")
    names = [name for name in ("transformer", "unet") if isinstance(getattr(pipeline, name, None), nn.Module)]
    if not names:
        raise ValueError(f"{kind} has no transformer and no unet; pass a pipeline with one of them.")
    if not callable(getattr(pipeline, "prepare_latents", None)):
        raise ValueError(f"{kind} has no prepare_latents, where a state could be put in; pass a pipeline that has it.")
    _require_resident(kind, names[0], getattr(pipeline, names[0]))
    return names[0]


def _require_resident(kind: str, name: str, denoiser: nn.Module) -> None:
    """Gradients need the network's own output, from weights that are still there in the backward pass."""
    if isinstance(denoiser, CacheMixin) and denoiser.is_cache_enabled:
        raise ValueError(f"the {name} of {kind} reuses cached outputs, which have no gradient; call {name}.disable_cache().")
    hooks = [module.__dict__["_hf_hook"] for module in denoiser.modules() if "_hf_hook" in module.__dict__]
    if any(isinstance(hook, CpuOffload) or (isinstance(hook, AlignDevicesHook) and hook.offload) for hook in hooks):
        raise ValueError(
            f"the {name} of {kind} is offloaded to the CPU between calls, where its backward pass would miss it; load the "
            f"pipeline without enable_model_cpu_offload() or enable_sequential_cpu_offload()."
        )


def view_class(pipeline_class: type[DiffusionPipeline]) -> type[DiffusionPipeline]:
    """The pipeline's class, told its device. The property it replaces walks all modules of all networks in every call."""
    device = property(lambda view: view.__dict__["_replay_device"])
    return type(pipeline_class.__name__, (pipeline_class,), {"_execution_device": device})


def make_view(
    pipeline: DiffusionPipeline, cls: type[DiffusionPipeline], scheduler: Any, device: torch.device
) -> DiffusionPipeline:
    """`pipeline` as a `cls` (from `view_class`) with another scheduler."""
    view = copy.copy(pipeline)
    view.__class__ = cls
    # Through __dict__, because setting a component the ordinary way rewrites the pipeline's config. The safety checker is left
    # out: it needs numpy images and blackens what it dislikes, so it has no gradient.
    view.__dict__.update(scheduler=scheduler, safety_checker=None, _progress_bar_config={"disable": True}, _replay_device=device)
    return view


def called_in_place_of(component: nn.Module, denoiser: nn.Module) -> nn.Module:
    """What the pipeline's code shall see as its denoiser when `denoiser` is the module to call.

    A module of the component's class is taken as it is. A wrapper of the component (DDP, compiled, …) lacks the attributes that
    pipelines read (config, dtype, …): they see the component, and calling it calls the wrapper.
    """
    if isinstance(denoiser, type(component)):
        return denoiser

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return denoiser(*args, **kwargs)

    stand_in = copy.copy(component)  # shares the weights, owns its class
    stand_in.__class__ = type(type(component).__name__, (type(component),), {"__call__": call})
    return stand_in


@contextmanager
def processors_restored(denoiser: Any) -> Iterator[None]:
    """Put the attention processors back that a pipeline exchanged before its loop: it is left before it does so itself."""
    before = denoiser.attn_processors
    try:
        yield
    finally:
        denoiser.set_attn_processor(before)
