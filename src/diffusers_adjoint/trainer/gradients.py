"""Every trained tensor gets a gradient, and the right one: checked at the start and after the first backward pass."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.utils import logging

from ..model.denoiser import PipelineDenoiser
from ..replay import Conditioning

__all__ = ["require_checkpointing", "require_gradients", "warn_of_unused"]

logger = logging.get_logger(__name__)

# Largest relative error of a tensor's gradient, and the size relative to the largest gradient below which it is measured against
# that instead. A layer that is evaluated again runs the same kernels on the same numbers: a CPU gives the same bits, and a GPU
# adds up in another order now and then, which leaves 1e-6 in float32. In 16 bits such a difference is rounded to three digits at
# every layer, and small gradients are made of nothing else. A state that is lost leaves 1e-1 and more.
_FINE, _COARSE = (1e-3, 1e-3), (5e-2, 1e-1)
# In units of 1/√inputs of a matrix of an adapter, which then adds about half of what its layer does by itself: the more it adds,
# the clearer is what becomes wrong where it is lost.
_PERTURBATION = 0.5


# ------------------------------------------------------------------------------------------------------- gradient checkpointing


def require_checkpointing(
    denoiser: PipelineDenoiser, x: Tensor, index: int, conditioning: Conditioning, *, guided: bool = False
) -> None:
    """Compare the gradients of state and trained weights with gradient checkpointing, if it is on, and without: two evaluations.

    A checkpointed layer is evaluated again in the backward pass, when the network's forward is over. Whatever that forward sets
    and takes back at its end, such as the `scale` of a LoRA, is then missing.

    Adapters start where half of their gradient is exactly 0 whatever is wrong, so they are compared at other values; they have
    their own again afterwards. Weights that FSDP has divided are left alone: they were compared before it did so.

    Args:
        denoiser: whose network is trained.
        x: a state, shape (B, …).
        index: a step of the grid at which the trained network predicts.
        conditioning: of the last `prepare`.
        guided: whether the loss is.

    Raises:
        ValueError: if they differ.
    """
    network = denoiser.network
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    if not network.is_gradient_checkpointing or any(isinstance(p, DTensor) for p in trained.values()):
        return
    adapted = trained if denoiser.base_adapters is not None else {}

    def gradients() -> list[Tensor | None]:
        leaf = x.detach().requires_grad_()  # the adjoint needs it: adapters of the base may be scaled, too
        output = denoiser.replay.predict(leaf, index, conditioning, guided=guided)
        direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
        return list(torch.autograd.grad(output, [leaf, *trained.values()], direction, allow_unused=True))

    with _perturbed(adapted), torch.enable_grad():
        checkpointed = gradients()
        with _without_checkpointing(network):
            plain = gradients()
    tolerance, least = _COARSE if network.dtype in (torch.float16, torch.bfloat16) else _FINE
    # Apart: the state's gradient is of another size than the weights'.
    error = max(_largest_error(checkpointed[:1], plain[:1], least), _largest_error(checkpointed[1:], plain[1:], least))
    if not error <= tolerance:
        raise ValueError(
            f"{denoiser.replay.name} cannot be trained with gradient checkpointing as it is called, because a gradient is off by "
            f"{error:.1%}: its {denoiser.replay.component} takes back at the end of its forward what it has set there, before "
            f"layers are evaluated again; leave a LoRA scale out of pipeline_kwargs and set lora_alpha instead, or train without "
            f"gradient checkpointing."
        )


@contextmanager
def _perturbed(adapters: dict[str, nn.Parameter]) -> Iterator[None]:
    """Random values added to each, and taken back exactly; the global random numbers do not advance."""
    before = {name: p.detach().clone() for name, p in adapters.items()}
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for p in adapters.values():
                inputs = p.numel() / len(p)
                p.add_(torch.randn(p.shape, generator=generator).to(p), alpha=_PERTURBATION / math.sqrt(inputs))
        yield
    finally:
        with torch.no_grad():
            for name, p in adapters.items():
                p.copy_(before[name])


@contextmanager
def _without_checkpointing(network: nn.Module) -> Iterator[None]:
    """Every activation is kept, on the CPU: those of all layers at once may be more than the device holds."""
    switches: list[Any] = [module for module in network.modules() if getattr(module, "gradient_checkpointing", False)]
    try:
        for module in switches:  # not through the network's own method, which would forget the function that a user gave it
            module.gradient_checkpointing = False
        with torch.autograd.graph.save_on_cpu():
            yield
    finally:
        for module in switches:
            module.gradient_checkpointing = True


def _largest_error(found: Sequence[Tensor | None], expected: Sequence[Tensor | None], least: float) -> float:
    """Largest ‖found − expected‖ / ‖expected‖ of a tensor.

    A gradient that is missing in one of both counts as 0. One that is not finite without checkpointing says nothing: the step
    overflows whatever is evaluated again.
    """
    pairs = [(0.0 if f is None else f, 0.0 if e is None else e) for f, e in zip(found, expected, strict=True)]
    sizes = [_norm(e) for _, e in pairs]
    differences = [_norm(f - e) for f, e in pairs]
    floor = max(least * max(filter(math.isfinite, sizes), default=0.0), torch.finfo(torch.float32).tiny)
    errors = [d / max(size, floor) for d, size in zip(differences, sizes, strict=True) if math.isfinite(size)]
    return max((error if math.isfinite(error) else math.inf for error in errors), default=0.0)


def _norm(values: Tensor | float) -> float:
    return torch.as_tensor(values).double().norm().item()


# ------------------------------------------------------------------------------------------------------- tensors without gradient


def require_gradients(trained: Collection[str], without: Collection[str], *, lora: bool) -> None:
    """Refuse to train where a whole kind of layers would never learn, such as every `to_q`: somebody meant to train these.

    Args:
        trained: names of all trained tensors.
        without: those that no gradient has reached.
        lora: whether they belong to adapters.

    Raises:
        ValueError: if no gradient has reached any tensor, or any of the layers of one name, of which there are two or more. A
            single layer, or some of many, are what a network has that this call of it does not use: see `warn_of_unused`.
    """
    members: dict[str, set[str]] = defaultdict(set)
    for name in trained:
        members[_kind(_layer(name))].add(_layer(name))
    reached = {_layer(name) for name in trained if name not in without}
    dead = [kind for kind, layers in members.items() if not layers & reached and (len(layers) > 1 or not reached)]
    if dead:
        unused = [layer for kind in dead for layer in sorted(members[kind])]
        raise ValueError(
            f"no gradient reaches any {_listed(dead, 'or')} of the network ({_listed(unused, 'and')}), which its call does not "
            f"use; call unfuse_qkv_projections() on it if its projections are fused, or "
            f"{'leave these out of' if lora else 'pass a peft_config without them in its'} target_modules."
        )


def warn_of_unused(trained: Collection[str], without: Collection[str]) -> None:
    """Name the trained tensors that no gradient has reached, if there are any."""
    if without:
        logger.warning(
            f"{len(without)} of {len(trained)} trained tensors get no gradient and stay as they are, because the network's call "
            f"does not use them: {_listed(sorted(without), 'and')}."
        )


def _layer(tensor: str) -> str:
    """'blocks.0.to_out.0.lora_A.adjoint.weight', 'blocks.0.to_out.0.weight' → 'blocks.0.to_out.0'."""
    return tensor.partition(".lora_")[0] if ".lora_" in tensor else tensor.rpartition(".")[0]


def _kind(layer: str) -> str:
    """The layer's own name, with its number where it is an entry of a list: 'blocks.0.to_out.0' → 'to_out.0'."""
    *_, owner, own = ["", *layer.split(".")]
    return f"{owner}.{own}" if own.isdigit() else own


def _listed(names: Sequence[str], last: str, most: int = 6) -> str:
    shown = [*names[:most], *([f"{len(names) - most} more"] if len(names) > most else [])]
    return f" {last} ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)
