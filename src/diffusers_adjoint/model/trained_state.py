"""Check that the network is still as it was prepared for training: adapter, strength, trained weights, optimizer."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiffusionPipeline, ModularPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .lora import ADAPTER

__all__ = ["TrainedState"]


class TrainedState:
    """The state of a denoiser as it was prepared for training, to compare it with its later state.

    Between calls of the trainer, and in callbacks, a user may change the adapter's strength for a preview, switch the adapter
    off, or remove it. Training or saving would then use another model.

    Args:
        pipeline: the pipeline.
        component: name of the trained network in it.
        base_adapters: names of the base's own adapters; `None` if all weights are trained.
    """

    def __init__(self, pipeline: DiffusionPipeline | ModularPipeline, component: str, base_adapters: list[str] | None) -> None:
        self._pipeline, self._component, self._base_adapters = pipeline, component, base_adapters
        self._network: nn.Module = getattr(pipeline, component)
        self._scalings = self._current_scalings(self._layers())
        self._trained = len(self._trained_weights())

    def require_adapter(self) -> None:
        """Raise ValueError, with advice, if adapters or their strengths have changed since the network was prepared.

        It also freezes the base's adapters again, because PEFT makes every adapter trainable that is activated. It is cheap
        enough for every update: it visits the network's modules, but reads no tensor.
        """
        if getattr(self._pipeline, self._component, None) is not self._network:
            raise ValueError(f"the pipeline's {self._component} is no longer the network in training; put it back.")
        layers = self._layers()
        if self._base_adapters is None:
            if layers:
                raise ValueError(f"{self._named} has adapters now, although all its weights are trained; unload them.")
            return
        if not any(ADAPTER in layer.scaling for layer in layers):
            raise ValueError(
                f"{self._named} no longer has the adapter {ADAPTER!r}, which unload_lora_weights() and delete_adapters() "
                f"remove; make a new trainer and resume from a checkpoint."
            )
        if any(layer.merged for layer in layers):
            raise ValueError(f"{self._named} carries a fused adapter; call unfuse_lora() first.")
        adapters = [*self._base_adapters, ADAPTER]
        if any(layer.disable_adapters for layer in layers):
            raise ValueError(f"the adapters of {self._named} are switched off; call enable_lora() first.")
        if any(set(layer.active_adapters) != set(adapters) for layer in layers):
            active = sorted({name for layer in layers for name in layer.active_adapters})
            raise ValueError(f"the active adapters of {self._named} are {active}; {self._way_back(adapters)} first.")
        if self._current_scalings(layers) != self._scalings:
            raise ValueError(
                f"an adapter of {self._named} has another strength than in training; {self._way_back(adapters)} first."
            )
        self._freeze_base(layers)

    def require_trainable(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Raise ValueError, with advice, if training would not change the weights.

        Args:
            optimizer: the user's optimizer; `None` if the trainer makes one.
        """
        self.require_adapter()
        if torch.is_inference_mode_enabled() or not torch.is_grad_enabled():
            raise ValueError("gradients are switched off; call train() outside of torch.no_grad() and torch.inference_mode().")
        if any(parameter.is_inference() for parameter in self._network.parameters()):
            raise ValueError(
                f"weights of {self._named} were created in torch.inference_mode() and cannot have gradients; load the pipeline "
                f"and make the trainer outside of it."
            )
        trained = self._trained_weights()
        if len(trained) != self._trained:
            raise ValueError(
                f"{len(trained)} weights of {self._named} require a gradient, instead of the {self._trained} that are trained; "
                f"do not call requires_grad_() after making the trainer."
            )
        if optimizer is not None:
            self._require_all_in(optimizer, trained)

    def _require_all_in(self, optimizer: torch.optim.Optimizer, trained: list[nn.Parameter]) -> None:
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        missing = sum(id(parameter) not in held for parameter in trained)
        if missing or len(held) != len(trained):
            raise ValueError(
                f"the optimizer holds {len(trained) - missing} of the {len(trained)} weights in training and "
                f"{len(held) - len(trained) + missing} others; leave optimizers out and choose one by args.optim, or set "
                f"trainer.optimizer to one of the parameters that require a gradient after the trainer is made."
            )

    @property
    def _named(self) -> str:
        return f"the {self._component} ({type(self._network).__name__})"

    def _trained_weights(self) -> list[nn.Parameter]:
        return [parameter for parameter in self._network.parameters() if parameter.requires_grad]

    def _layers(self) -> list[Any]:
        return [module for module in self._network.modules() if isinstance(module, BaseTunerLayer)]

    def _freeze_base(self, layers: list[Any]) -> None:
        for name in self._base_adapters or []:
            for layer in layers:
                for parts in (getattr(layer, kind) for kind in layer.adapter_layer_names):  # adapter's name → weights
                    if name in parts:
                        parts[name].requires_grad_(False)

    def _current_scalings(self, layers: list[Any]) -> list[dict[str, float]]:
        adapters = {*(self._base_adapters or []), ADAPTER}
        found = [{name: scale for name, scale in layer.scaling.items() if name in adapters} for layer in layers]
        return [scalings for scalings in found if scalings]  # without layers that only another adapter has

    def _way_back(self, adapters: list[str]) -> str:
        if len(adapters) == 1:
            return f"call set_adapters({ADAPTER!r}, 1.0) on the {self._component}"
        return f"call set_adapters({adapters}, […]) on the {self._component} with the strengths that it had, 1.0 for {ADAPTER!r},"
