"""Several devices and compilation, for a network inside a pipeline."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from ..config import AdjointMatchingConfig
from ..model.denoiser import PipelineDenoiser

__all__ = ["compile_networks", "require_fsdp2", "round_in_network_alone", "synchronised"]


def compile_networks(denoiser: PipelineDenoiser, args: AdjointMatchingConfig, accelerator: Accelerator) -> None:
    """`torch_compile`: compile the trained network and its frozen copy; the host would compile the pipeline's code as well."""
    if not args.torch_compile:
        return
    accelerator.state.dynamo_plugin.backend = DynamoBackend.NO
    for network in (denoiser.network, denoiser.frozen):
        if network is not None:
            network.compile(backend=args.torch_compile_backend, mode=args.torch_compile_mode)


def require_fsdp2(plugin: Any) -> None:
    """Raise ValueError for settings of accelerate's FSDP plugin that do not work with a pipeline."""
    if plugin.fsdp_version != 2:
        raise ValueError(f"FSDP version {plugin.fsdp_version} is not supported; pass fsdp_version: 2.")
    if plugin.cpu_ram_efficient_loading:  # the host would leave the pipeline's other networks empty on all processes but one
        raise ValueError("fsdp_cpu_ram_efficient_loading does not work with a pipeline; pass false.")
    if plugin.activation_checkpointing:  # it is installed after the check of checkpointed gradients has run
        raise ValueError("fsdp_activation_checkpointing cannot be checked; pass false, and gradient_checkpointing=True.")


def round_in_network_alone(denoiser: PipelineDenoiser, plugin: Any, accelerator: Accelerator) -> None:
    """Under FSDP, use autocast for mixed precision: FSDP's own policy would also round the states and the step means."""
    if accelerator.mixed_precision == "no":
        return
    plugin.mixed_precision_policy = MixedPrecisionPolicy()
    forward: Callable[..., Tensor] = denoiser.forward

    def inner(*args: Any, **kwargs: Any) -> Tensor:
        with accelerator.autocast():
            return forward(*args, **kwargs)

    denoiser.forward = inner  # type: ignore[method-assign]


def synchronised(
    accelerator: Accelerator, model: nn.Module, ends_update: bool
) -> Callable[[bool], contextlib.AbstractContextManager[None]]:
    """A context for one evaluation and its backward pass, so that processes average gradients once before an optimizer step.

    Args:
        accelerator: of the trainer.
        model: the wrapped model.
        ends_update: whether the optimizer steps after this micro-batch.

    Returns:
        f(last) → the context; `last` says whether this backward pass is the last one of the micro-batch.
    """

    @contextlib.contextmanager
    def step(last: bool) -> Iterator[None]:
        averages = ends_update and last
        accelerator.gradient_state._set_sync_gradients(averages)  # DeepSpeed makes its step in a backward pass, if this is set
        with contextlib.nullcontext() if averages else accelerator.no_sync(model):
            yield

    return step
