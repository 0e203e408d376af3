"""The trained network as a function: the step mean of the fine-tuned model and of the frozen base."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin, ModularPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..replay import Conditioning, PipelineReplay
from ..replay.quantised import quantisation_of
from ..replay.view import set_differentiable
from .frozen_weights import FrozenWeights
from .lora import adapter_off
from .trained_state import TrainedState

__all__ = ["PipelineDenoiser"]


class PipelineDenoiser(nn.Module):
    """The pipeline's denoiser as a module whose `forward` is the step mean μ_k(x). `Trainer` wraps it (DDP, autocast, …).

    The base is the same network with the trained adapter switched off; without an adapter, a frozen copy that is made here.

    Args:
        replay: turns the pipeline's own `__call__` into the prediction m(x, t).
        base_adapters: names of the base's own adapters, if a LoRA is trained on top of them; `None` if all weights are trained.
        frozen: the base's network, if it exists already, instead of a frozen copy.

    Raises:
        ValueError: if all weights are to be trained but the network is quantised or of 16 bits, or carries adapters.
    """

    config = None  # `Trainer` writes into `model.config`, and a diffusers config cannot be written
    accepts_loss_kwargs = False

    def __init__(self, replay: PipelineReplay, base_adapters: list[str] | None, frozen: ModelMixin | None = None) -> None:
        super().__init__()
        self.replay = replay
        self.network: ModelMixin = getattr(replay.pipeline, replay.component)
        self.base_adapters = base_adapters
        self.frozen = frozen
        if base_adapters is None and frozen is None:
            _require_trainable(self.network)
            _require_no_adapters(replay.pipeline)
            self.frozen = copy.deepcopy(self.network).requires_grad_(False)
            self.network.requires_grad_(True)
        self.state = TrainedState(replay.pipeline, replay.component, base_adapters)
        self.evaluations = 0  # one for each image and step, for the log
        self.base_active = False
        self.stage: FrozenWeights | None = None  # the trained weights at the beginning of the stage, if there are stages
        # Units that FSDP wraps. The network itself is one, because pipelines call it without this module when they sample.
        units = {type(self.network).__name__, *(self.network._no_split_modules or [])}
        self._no_split_modules = sorted(units & {type(module).__name__ for module in self.network.modules()})
        self.train(False)

    def forward(self, x: Tensor, index: int, conditioning: Conditioning, guided: bool = False) -> Tensor:
        """μ_k(x) of step `index`, shape of `x`, float32 or better; differentiable in `x` and the trained weights."""
        return self.replay.transition(self._predicted(x, index, conditioning, guided), x, index).mean

    def score(self, x: Tensor, conditioning: Conditioning, guided: bool = False, *, noise: float) -> Tensor:
        """The score ∇ log p of slightly noised data at x, by Tweedie's formula; shape of `x`, float32 or better.

        The data are blurred by noise of standard deviation β/α, to X_1 + (β/α) X_0. Their score is α s(αx), where s is the score
        of α X_1 + β X_0, which the network predicts at one noise level beside the grid.

        Args:
            x: a clean state, shape (B, …).
            conditioning: of the batch.
            guided: whether classifier-free guidance acts.
            noise: β/(α + β) of that level, between 0 and 1. With less noise the score is nearer to that of the data, but the
                error of the network's clean prediction is divided by the square of it.
        """
        grid, last = self.replay.scheduler.ending_at(noise), len(self.replay.scheduler.timesteps) - 1
        alpha = float(grid.levels[0, last])
        x = alpha * x
        output = self._predicted(x, len(self.replay.timesteps) - 1, conditioning, guided, grid)
        return alpha * grid.score(grid.clean(grid.transition(output, x, last).mean, x, last), x, last)

    def _predicted(self, x: Tensor, index: int, conditioning: Conditioning, guided: bool, grid: Any = None) -> Tensor:
        self.evaluations += len(x)
        network = self.frozen if self.base_active and self.frozen is not None else self.network
        return self.replay.predict(x, index, conditioning, guided=guided, denoiser=network, grid=grid)

    @contextmanager
    def base(self) -> Iterator[None]:
        """Within this context `forward` is the frozen base; contexts may be nested."""
        if self.base_active:
            yield
            return
        self.base_active = True
        try:
            with contextlib.nullcontext() if self.base_adapters is None else adapter_off(self.network, self.base_adapters):
                yield
        finally:
            self.base_active = False

    def reference(self) -> AbstractContextManager[None]:
        """Within this context `forward` is the model at the beginning of the current stage.

        Raises:
            ValueError: if there are no stages.
        """
        if self.stage is None:
            raise ValueError("no weights are frozen yet; train with loss_kwargs={'mode': 'tilt_matching', 'stages': …}.")
        return self.stage.in_place()

    def train(self, mode: bool = True) -> PipelineDenoiser:
        """Stay in evaluation mode even in training: with dropout, rollout, adjoint and loss would use different functions."""
        super().train(False)
        for network in (self.network, self.frozen):
            if network is not None:
                set_differentiable(network)
        return self

    def gradient_checkpointing_enable(self, **kwargs: object) -> None:
        """`Trainer`'s hook for `gradient_checkpointing=True`: the denoiser's own switch."""
        if self.replay.exchanges_processors:  # it restores them before the backward pass evaluates layers again
            raise ValueError(f"{self.replay.name} exchanges attention processors; train without gradient checkpointing.")
        self.network.enable_gradient_checkpointing()
        if self.frozen is not None:
            self.frozen.enable_gradient_checkpointing()

    activation_checkpointing_enable = gradient_checkpointing_enable  # the name in newer versions of transformers


def _require_trainable(network: ModelMixin) -> None:
    if stored := quantisation_of(network):
        raise ValueError(f"{type(network).__name__} holds {stored}, which cannot be trained; pass a peft_config.")
    # The weights are looked at, because `network.dtype` of a network with layerwise casting is the dtype of the computation.
    if coarse := next((p.dtype for p in network.parameters() if p.dtype in (torch.float16, torch.bfloat16)), None):
        raise ValueError(
            f"full fine-tuning of a {coarse} network rounds most updates to 0; load the pipeline in float32 and set "
            f"bf16=True, or pass a peft_config."
        )


def _require_no_adapters(pipeline: DiffusionPipeline | ModularPipeline) -> None:
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module) and any(isinstance(module, BaseTunerLayer) for module in part.modules()):
            raise ValueError(
                f"the {name} has adapters, and a whole pipeline cannot be saved with adapters; call fuse_lora() and "
                f"unload_lora_weights() first, or pass a peft_config."
            )
