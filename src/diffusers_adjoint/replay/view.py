"""Views: copies of a pipeline that share its networks and own whatever replay changes, so the user's object is not modified."""

from __future__ import annotations

import copy
import inspect
import itertools
import logging
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, CpuOffload
from accelerate.utils import is_compiled_module
from diffusers import DiffusionPipeline, ModelMixin, ModularPipeline, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.cache_utils import CacheMixin
from peft import PeftModel
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

from .casting import castable

__all__ = ["called_in_place_of", "counting_rows", "denoiser_names", "make_view", "no_guidance", "preparing_methods"]
__all__ += [
    "processors_restored",
    "quiet",
    "require_undivided",
    "scaling_rows",
    "set_differentiable",
    "set_method",
    "text_encoders",
    "view_class",
]

DENOISERS = ("transformer", "unet", "transformer_2")


def denoiser_names(pipeline: DiffusionPipeline | ModularPipeline, component: str | None = None) -> list[str]:
    """Check that a pipeline can be replayed, and return the names of its denoisers.

    The first name is the denoiser that diffusers puts LoRA on. Some pipelines have a second denoiser, for the later steps or for
    the predictions without a prompt.

    Args:
        pipeline: the pipeline.
        component: name of the denoiser to train, any `ModelMixin` of the pipeline; `None` for the first.

    Raises:
        TypeError: if `pipeline` is not a diffusers pipeline.
        ValueError: if the pipeline has no scheduler or no denoiser (or a modular pipeline has not loaded it), or if a denoiser is
            compiled, wrapped, cached or offloaded.
    """
    if not isinstance(pipeline, DiffusionPipeline | ModularPipeline):
        raise TypeError(f"the pipeline is a {type(pipeline).__name__}; pass a diffusers DiffusionPipeline or ModularPipeline.")
    kind = type(pipeline).__name__
    _require_loaded(pipeline)
    if not isinstance(getattr(pipeline, "scheduler", None), SchedulerMixin):
        raise ValueError(f"{kind} has no scheduler; pass a pipeline that samples by calling scheduler.step.")
    networks = [name for name, part in vars(pipeline).items() if isinstance(part, nn.Module)]
    others = [name for name in networks if name.endswith(("transformer", "unet")) and name not in DENOISERS]
    names = [*(name for name in DENOISERS if name in networks), *others]
    if component is None and not names:
        raise ValueError(f"{kind} has no transformer and no unet; pass the name of its network as trained_component.")
    if component is not None and not isinstance(getattr(pipeline, component, None), ModelMixin):
        raise ValueError(f"{kind} has no denoiser {component!r} to train; pass one of {', '.join(names or networks)}.")
    names += [component] if component is not None and component not in names else []
    for name in names:
        _require_plain(name, getattr(pipeline, name))
        _require_resident(kind, name, getattr(pipeline, name))
    return names


def _require_loaded(pipeline: DiffusionPipeline | ModularPipeline) -> None:
    """A modular pipeline is created without weights. Only the scheduler and the denoisers must be loaded here."""
    if not isinstance(pipeline, ModularPipeline):
        return
    absent = [name for name in pipeline.null_component_names if name in ("scheduler", *DENOISERS)]
    if absent:
        raise ValueError(
            f"the {' and the '.join(absent)} of this {type(pipeline).__name__} {'is' if len(absent) == 1 else 'are'} not loaded; "
            f"call load_components() or update_components(…) on it before."
        )


def _require_plain(name: str, denoiser: nn.Module) -> None:
    """A wrapper hides the network's adapters and methods; a compiled part also changes the names of the weights in it."""
    if any(is_compiled_module(module) for module in denoiser.modules()):
        raise ValueError(f"the {name} is compiled; pass the pipeline as it was before torch.compile, and torch_compile=True.")
    if isinstance(denoiser, PeftModel):
        raise ValueError(
            f"the {name} is a PeftModel; pass the pipeline with the network itself, {name}.unload(), and a LoRA to train as "
            f"peft_config."
        )
    # DataParallel, DDP or DeepSpeed. The older FSDP wraps too, but `require_undivided` handles it.
    if isinstance(getattr(denoiser, "module", None), ModelMixin) and not isinstance(denoiser, FullyShardedDataParallel):
        raise ValueError(
            f"the {name} is inside a {type(denoiser).__name__}; pass the pipeline with the network itself, {name}.module, and "
            f"start the script by accelerate launch, which has the trainer distribute it."
        )


def require_undivided(pipeline: DiffusionPipeline | ModularPipeline, component: str | None = None) -> None:
    """Check that FSDP has not sharded a denoiser yet, because the trainer shards it itself. Call this before training.

    Args:
        pipeline, component: as in `denoiser_names`.

    Raises:
        ValueError: if a denoiser, or a part of one, is sharded; and as `denoiser_names`.
    """
    for name in denoiser_names(pipeline, component):
        # The older FSDP wraps a network or its parts in a module; the newer one adds a base class to them.
        if any(isinstance(module, FSDPModule | FullyShardedDataParallel) for module in getattr(pipeline, name).modules()):
            raise ValueError(
                f"the {name} is divided by FSDP; load the pipeline anew, and start the script by accelerate launch, which has "
                f"the trainer divide it."
            )


def set_differentiable(network: nn.Module) -> None:
    """Set evaluation mode, except for modules that then predict under `torch.no_grad`, as some mixtures of experts do.

    These modules are set to training mode. Their output is the same; in evaluation mode a part of the gradient would be missing
    without an error.
    """
    network.eval()
    without_gradient = {cls for cls in {type(module) for module in network.modules()} if _predicts_without_gradient(cls)}
    for module in network.modules():
        if type(module) in without_gradient:
            module.training = True  # only this module: its submodules stay in evaluation mode


def _predicts_without_gradient(cls: type) -> bool:
    # fuse_… and unfuse_… rewrite weights, rightly under no_grad, and no prediction calls them.
    names = [name for name in dir(cls) if not name.startswith(("fuse_", "unfuse_"))]
    return any(_is_without_gradient(inspect.getattr_static(cls, name)) for name in names)


def _is_without_gradient(member: Any) -> bool:
    if not isinstance(member, types.FunctionType) or not hasattr(member, "__wrapped__"):
        return False
    held = inspect.getclosurevars(member).nonlocals.values()
    return any(isinstance(getattr(value, "__self__", None), torch.no_grad) for value in held)


def _require_resident(kind: str, name: str, denoiser: nn.Module) -> None:
    """Gradients need outputs that are computed and not cached, and weights that stay on the device until the backward pass."""
    if isinstance(denoiser, CacheMixin) and denoiser.is_cache_enabled:
        raise ValueError(f"the {name} of {kind} reuses cached outputs, which have no gradient; call {name}.disable_cache().")
    hooks = [module.__dict__["_hf_hook"] for module in denoiser.modules() if "_hf_hook" in module.__dict__]
    offloaded = any(isinstance(hook, CpuOffload) or (isinstance(hook, AlignDevicesHook) and hook.offload) for hook in hooks)
    registries = [module.__dict__["_diffusers_hook"] for module in denoiser.modules() if "_diffusers_hook" in module.__dict__]
    if offloaded or any(registry.get_hook("group_offloading") is not None for registry in registries):
        raise ValueError(
            f"the {name} of {kind} is offloaded to the CPU between calls, where its backward pass would miss it; load the "
            f"pipeline without enable_model_cpu_offload(), enable_sequential_cpu_offload() or enable_group_offload()."
        )


def view_class(pipeline_class: type[Any]) -> type[Any]:
    """A subclass with a stored device: `_execution_device` of diffusers goes through all modules of all networks each time."""
    device = property(lambda view: view.__dict__["_replay_device"])
    return type(pipeline_class.__name__, (pipeline_class,), {"_execution_device": device})


def make_view(pipeline: DiffusionPipeline | ModularPipeline, cls: type[Any], scheduler: Any, device: torch.device) -> Any:
    """A view of `pipeline`: a copy of class `cls` (see `view_class`) with this scheduler and its own VAE and image processors."""
    view = copy.copy(pipeline)
    view.__class__ = cls
    # Through __dict__, because setting a component as an attribute rewrites the pipeline's config. Safety checker and watermark
    # are removed: they work on numpy images, so they have no gradient.
    view.__dict__.update(scheduler=scheduler, _progress_bar_config={"disable": True}, _replay_device=device)
    view.__dict__.update(safety_checker=None, watermark=None)
    processors = {name: part for name, part in view.__dict__.items() if isinstance(part, VaeImageProcessor)}
    view.__dict__.update({name: copy.copy(part) for name, part in processors.items()})
    if view.__dict__.get("vae") is not None:
        view.__dict__["vae"] = castable(view.__dict__["vae"])
    return view


def text_encoders(pipeline: DiffusionPipeline | ModularPipeline) -> dict[str, nn.Module]:
    """Name → text encoder of the pipeline."""
    parts = {name: part for name, part in pipeline.components.items() if name.startswith("text_encoder")}
    return {name: part for name, part in parts.items() if isinstance(part, nn.Module)}


def called_in_place_of(component: nn.Module, function: Callable[..., Any]) -> nn.Module:
    """A replacement for a pipeline's component: calling it calls `function`.

    If `function` is a module of the component's class, it is returned as it is. A wrapper (DDP, compiled, …) lacks attributes
    that pipelines read (config, dtype, …). The result is then a copy of the component with the same weights and attributes, whose
    call is the wrapper's.
    """
    if isinstance(function, type(component)):
        return function

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    stand_in = copy.copy(component)  # a shallow copy shares the weights, but has a class of its own
    stand_in.__class__ = type(type(component).__name__, (type(component),), {"__call__": call})
    return stand_in


@contextmanager
def processors_restored(denoiser: Any) -> Iterator[None]:
    """Restore the attention processors that a pipeline replaces before its loop, since a stopped call does not restore them."""
    before = denoiser.attn_processors
    try:
        yield
    finally:
        denoiser.set_attn_processor(before)


def preparing_methods(view: DiffusionPipeline) -> list[str]:
    """Names of the methods that run before the loop and are recorded: encode_… and prepare_… methods, if the pipeline has them.

    The names include "vae.encode", for condition images, and the methods of image processors ("image_processor.resize"), which
    take tens of milliseconds for an image of a megapixel.
    """
    names = [name for name in dir(type(view)) if name.lstrip("_").startswith(("encode_", "prepare_"))]
    processors = [name for name, part in view.__dict__.items() if isinstance(part, VaeImageProcessor)]
    of_processors = [f"{name}.{method}" for name in processors for method in ("preprocess", "resize")]
    of_vae = ["vae.encode"] if callable(getattr(getattr(view, "vae", None), "encode", None)) else []
    return [name for name in names if callable(getattr(view, name, None))] + of_processors + of_vae


def set_method(view: DiffusionPipeline, name: str, function: Callable[..., Any]) -> None:
    """Replace a method of the view, named as in `preparing_methods`. The owner is the view or its own copy of a component."""
    part, _, method = name.rpartition(".")
    owner = getattr(view, part) if part else view
    owner.__dict__[method] = function


def no_guidance(pipeline: DiffusionPipeline | ModularPipeline) -> float:
    """The guidance scale that switches off guidance: 1, or 0 for a pipeline whose `do_classifier_free_guidance` is true at 1."""
    says = inspect.getattr_static(type(pipeline), "do_classifier_free_guidance", None)
    if not isinstance(says, property) or says.fget is None:
        return 1.0
    view = copy.copy(pipeline)
    guides = []
    for scale in (0.0, 1.0):
        view.__dict__.update(_guidance_scale=scale, _image_guidance_scale=1.0)
        try:
            guides.append(bool(says.fget(view)))
        except AttributeError:  # the property reads further scales, which only the call sets (LTX-2)
            return 1.0
    return 0.0 if guides == [False, True] else 1.0


@contextmanager
def quiet(logger: logging.Logger) -> Iterator[None]:
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


@contextmanager
def counting_rows(*denoisers: nn.Module) -> Iterator[list[int]]:
    """Within this context, list the number of rows in each call of the denoisers: the length of its first argument."""
    rows: list[int] = []

    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows.append(len([*args, *kwargs.values()][0]))

    handles = [denoiser.register_forward_pre_hook(count, with_kwargs=True) for denoiser in denoisers]
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def scaling_rows(call: int, rows: slice, *denoisers: nn.Module) -> Iterator[None]:
    """Within this context, double these rows of the output of one call of the denoisers; `call` counts their calls from 0."""
    calls = itertools.count()

    def scale(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if next(calls) != call:
            return output
        factor = torch.ones(len(output if isinstance(output, torch.Tensor | list) else output[0]))
        factor[rows] = 2.0
        return _scaled(output, factor)

    handles = [denoiser.register_forward_hook(scale) for denoiser in denoisers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _scaled(output: Any, factor: torch.Tensor) -> Any:
    """Scale each row of a tensor, of a list with one tensor per row, or of the first item of a tuple or output object."""
    if isinstance(output, torch.Tensor):
        return output * factor.to(output).view(-1, *[1] * (output.ndim - 1))
    if isinstance(output, list):
        return [value * scale for value, scale in zip(output, factor.tolist(), strict=True)]
    first = _scaled(output[0], factor)
    return (first, *output[1:]) if isinstance(output, tuple) else type(output)(first)
