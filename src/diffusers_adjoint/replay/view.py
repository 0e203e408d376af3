"""A copy of the pipeline that shares its networks and owns everything else, so that replay does not change the user's object."""

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
    """Names of the networks that may predict for the pipeline, after a check that it can be replayed at all.

    The first is the one that diffusers puts LoRA on. Pipelines exist with a second one for the later steps, or for the
    predictions without a prompt, and a network may have any name, by which it is asked for.

    Args:
        component: name of one to train; `None` for the first.

    Raises:
        TypeError: if it is no diffusers pipeline.
        ValueError: if it has no scheduler, no denoiser, or one that is wrapped, cached or offloaded.
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
    """A modular pipeline comes without its weights; what its workflow can do without may stay away."""
    if not isinstance(pipeline, ModularPipeline):
        return
    absent = [name for name in pipeline.null_component_names if name in ("scheduler", *DENOISERS)]
    if absent:
        raise ValueError(
            f"the {' and the '.join(absent)} of this {type(pipeline).__name__} {'is' if len(absent) == 1 else 'are'} not loaded; "
            f"call load_components() or update_components(…) on it before."
        )


def _require_plain(name: str, denoiser: nn.Module) -> None:
    """A wrapper hides the network's adapters and its switches; around a part of it, its name comes into all names of weights."""
    if any(is_compiled_module(module) for module in denoiser.modules()):
        raise ValueError(f"the {name} is compiled; pass the pipeline as it was before torch.compile, and torch_compile=True.")
    if isinstance(denoiser, PeftModel):
        raise ValueError(
            f"the {name} is a PeftModel; pass the pipeline with the network itself, {name}.unload(), and a LoRA to train as "
            f"peft_config."
        )
    # DataParallel, DDP, DeepSpeed; what older FSDP holds is divided, see require_undivided.
    if isinstance(getattr(denoiser, "module", None), ModelMixin) and not isinstance(denoiser, FullyShardedDataParallel):
        raise ValueError(
            f"the {name} is inside a {type(denoiser).__name__}; pass the pipeline with the network itself, {name}.module, and "
            f"start the script by accelerate launch, which has the trainer distribute it."
        )


def require_undivided(pipeline: DiffusionPipeline | ModularPipeline, component: str | None = None) -> None:
    """Raises ValueError if FSDP has divided a denoiser: before training, in which the host does so itself.

    Args:
        component: as in `denoiser_names`.
    """
    for name in denoiser_names(pipeline, component):
        # The older FSDP is a module around a network or a part, the newer one a base class that these are given.
        if any(isinstance(module, FSDPModule | FullyShardedDataParallel) for module in getattr(pipeline, name).modules()):
            raise ValueError(
                f"the {name} is divided by FSDP; load the pipeline anew, and start the script by accelerate launch, which has "
                f"the trainer divide it."
            )


def set_differentiable(network: nn.Module) -> None:
    """Evaluation mode, but for modules that predict under `torch.no_grad` there, as a mixture of experts does: these train.

    The output is the same; in evaluation mode a part of the gradient would be missing, silently.
    """
    network.eval()
    without_gradient = {cls for cls in {type(module) for module in network.modules()} if _predicts_without_gradient(cls)}
    for module in network.modules():
        if type(module) in without_gradient:
            module.training = True  # the module alone: its parts have no mode of their own to change


def _predicts_without_gradient(cls: type) -> bool:
    # Fusing projections rewrites weights, under no_grad for good reason; no prediction does it.
    names = [name for name in dir(cls) if not name.startswith(("fuse_", "unfuse_"))]
    return any(_is_without_gradient(inspect.getattr_static(cls, name)) for name in names)


def _is_without_gradient(member: Any) -> bool:
    if not isinstance(member, types.FunctionType) or not hasattr(member, "__wrapped__"):
        return False
    held = inspect.getclosurevars(member).nonlocals.values()
    return any(isinstance(getattr(value, "__self__", None), torch.no_grad) for value in held)


def _require_resident(kind: str, name: str, denoiser: nn.Module) -> None:
    """Gradients need the network's own output, from weights that are still there in the backward pass."""
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
    """The pipeline's class, told its device. The property it replaces walks all modules of all networks in every call."""
    device = property(lambda view: view.__dict__["_replay_device"])
    return type(pipeline_class.__name__, (pipeline_class,), {"_execution_device": device})


def make_view(pipeline: DiffusionPipeline | ModularPipeline, cls: type[Any], scheduler: Any, device: torch.device) -> Any:
    """`pipeline` as a `cls` (from `view_class`) with another scheduler, and with a VAE and image processors of its own."""
    view = copy.copy(pipeline)
    view.__class__ = cls
    # Through __dict__, because setting a component the ordinary way rewrites the pipeline's config. Safety checker and watermark
    # are left out: they work on numpy images, so they have no gradient.
    view.__dict__.update(scheduler=scheduler, _progress_bar_config={"disable": True}, _replay_device=device)
    view.__dict__.update(safety_checker=None, watermark=None)
    processors = {name: part for name, part in view.__dict__.items() if isinstance(part, VaeImageProcessor)}
    view.__dict__.update({name: copy.copy(part) for name, part in processors.items()})
    if view.__dict__.get("vae") is not None:
        view.__dict__["vae"] = castable(view.__dict__["vae"])
    return view


def text_encoders(pipeline: DiffusionPipeline | ModularPipeline) -> dict[str, nn.Module]:
    """The pipeline's text encoders by name."""
    parts = {name: part for name, part in pipeline.components.items() if name.startswith("text_encoder")}
    return {name: part for name, part in parts.items() if isinstance(part, nn.Module)}


def called_in_place_of(component: nn.Module, function: Callable[..., Any]) -> nn.Module:
    """What the pipeline's code shall see as its component when `function` is to be called instead.

    A module of the component's class is taken as it is. A wrapper of the component (DDP, compiled, …) lacks the attributes that
    pipelines read (config, dtype, …): they see the component, and calling it calls the wrapper.
    """
    if isinstance(function, type(component)):
        return function

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

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


def preparing_methods(view: DiffusionPipeline) -> list[str]:
    """Names of the methods that encode or prepare something, as far as the pipeline has them.

    Those of its image processors ("image_processor.resize") are among them, which take tens of milliseconds at a megapixel, and
    "vae.encode" for condition images.
    """
    names = [name for name in dir(type(view)) if name.lstrip("_").startswith(("encode_", "prepare_"))]
    processors = [name for name, part in view.__dict__.items() if isinstance(part, VaeImageProcessor)]
    of_processors = [f"{name}.{method}" for name in processors for method in ("preprocess", "resize")]
    of_vae = ["vae.encode"] if callable(getattr(getattr(view, "vae", None), "encode", None)) else []
    return [name for name in names if callable(getattr(view, name, None))] + of_processors + of_vae


def set_method(view: DiffusionPipeline, name: str, function: Callable[..., Any]) -> None:
    """Put `function` in place of a method from `preparing_methods`; the parts of a view from `make_view` are its own."""
    part, _, method = name.rpartition(".")
    owner = getattr(view, part) if part else view
    owner.__dict__[method] = function


def no_guidance(pipeline: DiffusionPipeline | ModularPipeline) -> float:
    """The guidance scale that means none: 1, or 0 where the pipeline says that it still guides at 1."""
    says = inspect.getattr_static(type(pipeline), "do_classifier_free_guidance", None)
    if not isinstance(says, property) or says.fget is None:
        return 1.0
    view = copy.copy(pipeline)
    guides = []
    for scale in (0.0, 1.0):
        view.__dict__.update(_guidance_scale=scale, _image_guidance_scale=1.0)
        try:
            guides.append(bool(says.fget(view)))
        except AttributeError:  # it looks at scales of its own, which its call sets (LTX-2)
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
    """The number of samples in each call of the denoisers: the length of the first argument."""
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
    """Within this context these rows of what the denoisers return in the call of that number, from 0, are doubled."""
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
    """A tensor, a list of one a sample, or either as the first of a tuple or of a host's output class."""
    if isinstance(output, torch.Tensor):
        return output * factor.to(output).view(-1, *[1] * (output.ndim - 1))
    if isinstance(output, list):
        return [value * scale for value, scale in zip(output, factor.tolist(), strict=True)]
    first = _scaled(output[0], factor)
    return (first, *output[1:]) if isinstance(output, tuple) else type(output)(first)
