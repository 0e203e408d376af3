"""Checks that every trained tensor gets a gradient, and the right one: at the start and after the first backward pass."""

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

# (tolerance, floor). The tolerance is the largest relative error allowed in a tensor's gradient. A gradient smaller than `floor`
# times the largest one is compared relative to that size instead of its own. A layer that is evaluated again runs the same
# kernels on the same numbers: a CPU gives the same bits, and a GPU may sum in another order, an error of 1e-6 in float32. 16-bit
# layers round such a difference to three digits each, and small gradients then are mostly rounding error. Lost state, which this
# check looks for, makes an error of 1e-1 or more.
_FINE, _COARSE = (1e-3, 1e-3), (5e-2, 1e-1)
# Size of the perturbation of an adapter's matrix, in units of 1/√inputs. The adapter then adds about half of what its layer
# computes by itself, so that an error from losing it is large.
_PERTURBATION = 0.5


# ------------------------------------------------------------------------------------------------------- gradient checkpointing


def require_checkpointing(
    denoiser: PipelineDenoiser, x: Tensor, index: int, conditioning: Conditioning, *, guided: bool = False
) -> None:
    """Compare the gradients of the state and the trained weights with and without gradient checkpointing, if it is on.

    A checkpointed layer is evaluated again in the backward pass, after the network's forward has returned. Anything that the
    forward sets and resets at its end, such as the `scale` of a LoRA, is then missing, and autograd returns wrong gradients
    without an error. The check takes two evaluations with their backward passes.

    A new LoRA has B = 0, so half of its gradient is exactly 0 even if something is wrong. Adapters are therefore compared at
    random values, and restored afterwards. Weights that FSDP has divided are not compared: the check ran before they were.

    Args:
        denoiser: with the network that is trained.
        x: a state, shape (B, …).
        index: a step of the grid at which the trained network predicts.
        conditioning: from the last `prepare`.
        guided: whether the loss uses classifier-free guidance.

    Raises:
        ValueError: if the gradients differ.
    """
    network = denoiser.network
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    if not network.is_gradient_checkpointing or any(isinstance(p, DTensor) for p in trained.values()):
        return
    adapted = trained if denoiser.base_adapters is not None else {}

    def gradients() -> list[Tensor | None]:
        leaf = x.detach().requires_grad_()  # the adjoint needs ∂/∂x, which the scale of the base's own adapters can spoil, too
        output = denoiser.replay.predict(leaf, index, conditioning, guided=guided)
        direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
        return list(torch.autograd.grad(output, [leaf, *trained.values()], direction, allow_unused=True))

    with _perturbed(adapted), torch.enable_grad():
        checkpointed = gradients()
        with _without_checkpointing(network):
            plain = gradients()
    tolerance, least = _COARSE if network.dtype in (torch.float16, torch.bfloat16) else _FINE
    # Compared separately: the state's gradient is of another size than the weights'.
    error = max(_largest_error(checkpointed[:1], plain[:1], least), _largest_error(checkpointed[1:], plain[1:], least))
    if not error <= tolerance:
        raise ValueError(
            f"{denoiser.replay.name} cannot be trained with gradient checkpointing as it is called, because a gradient is off by "
            f"{error:.1%}: its {denoiser.replay.component} resets at the end of its forward what it has set there, before "
            f"layers are evaluated again; leave a LoRA scale out of pipeline_kwargs and set lora_alpha instead, or train without "
            f"gradient checkpointing."
        )


@contextmanager
def _perturbed(adapters: dict[str, nn.Parameter]) -> Iterator[None]:
    """Add random values to each adapter tensor, and restore them exactly; no global random number is drawn."""
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
    """Switch checkpointing off, and keep activations on the CPU: those of all layers together may not fit on the device."""
    switches: list[Any] = [module for module in network.modules() if getattr(module, "gradient_checkpointing", False)]
    try:
        for module in switches:  # not by the network's own method: it would lose a checkpointing function that the user set
            module.gradient_checkpointing = False
        with torch.autograd.graph.save_on_cpu():
            yield
    finally:
        for module in switches:
            module.gradient_checkpointing = True


def _largest_error(found: Sequence[Tensor | None], expected: Sequence[Tensor | None], least: float) -> float:
    """Largest ‖found − expected‖ / ‖expected‖ over the tensors.

    A missing gradient counts as 0. A tensor whose expected gradient is not finite is left out: the step overflows with and
    without checkpointing. Expected gradients below `least` times the largest are compared relative to that size.
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
    """Raise ValueError if a whole kind of layers gets no gradient, such as every `to_q`: they were meant to be trained.

    Args:
        trained: names of all trained tensors.
        without: names of those without a gradient.
        lora: whether they belong to adapters.

    Raises:
        ValueError: if no tensor has a gradient, or if none of two or more layers of one kind has. Single layers without a
            gradient are usual, because a network may not use every layer in this call: see `warn_of_unused`.
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
    """Warn of trained tensors that have no gradient, if there are any."""
    if without:
        logger.warning(
            f"{len(without)} of {len(trained)} trained tensors get no gradient and do not change, because the network's call "
            f"does not use them: {_listed(sorted(without), 'and')}."
        )


def _layer(tensor: str) -> str:
    """The layer of a tensor: 'blocks.0.to_out.0.lora_A.adjoint.weight', 'blocks.0.to_out.0.weight' → 'blocks.0.to_out.0'."""
    return tensor.partition(".lora_")[0] if ".lora_" in tensor else tensor.rpartition(".")[0]


def _kind(layer: str) -> str:
    """The last part of a layer's name, with the part before it if the last is a number: 'blocks.0.to_out.0' → 'to_out.0'."""
    *_, owner, own = ["", *layer.split(".")]
    return f"{owner}.{own}" if own.isdigit() else own


def _listed(names: Sequence[str], last: str, most: int = 6) -> str:
    shown = [*names[:most], *([f"{len(names) - most} more"] if len(names) > most else [])]
    return f" {last} ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)
