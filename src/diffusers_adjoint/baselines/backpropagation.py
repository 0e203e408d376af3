"""Rewards by back-propagation through the sampler: no regression, and what Adjoint Matching is compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from diffusers import DiffusionPipeline, ModularPipeline
from peft import LoraConfig
from torch import Tensor, nn

from ..config import AdjointMatchingConfig
from ..core.control_cost import discrete_adjoint
from ..core.matching import LossSteps, bounded, noisy_steps
from ..hub import CardFacts
from ..model.chain import PipelineChain
from ..objectives.papers import ADJOINT_MATCHING, Paper
from ..pictures.samples import SampleImages
from ..trainer.cost import UpdateCost
from ..trainer.parallel import synchronised
from ..trainer.regress import bounded_paths, zero_unless
from ..trainer.reward_trainer import RewardTrainer
from ..trainer.scoring import ScoredImages

__all__ = ["METHODS", "BackpropagationMethod", "RewardBackpropagationTrainer"]

METHODS = ("discrete_adjoint",)
# Fields of a regression.
UNUSED = ("loss_type", "loss_kwargs", "loss_clip", "num_loss_steps", "loss_step_selection", "num_iterations")


@dataclass(frozen=True)
class BackpropagationMethod:
    """The discrete adjoint (2409.08861, §3.2): the gradient of the control cost, through all steps of the chain."""

    name: Literal["discrete_adjoint"] = "discrete_adjoint"

    needs_gradient: ClassVar[bool] = True
    switches_adapter: ClassVar[bool] = True
    scores_end_points: ClassVar[bool] = True
    compares_images: ClassVar[bool] = False
    tilts: ClassVar[bool] = True
    paper: ClassVar[Paper] = replace(ADJOINT_MATCHING, method="the discrete adjoint")

    def __post_init__(self) -> None:
        if self.name not in METHODS:
            raise ValueError(f"method={self.name!r} is unknown; pass one of {', '.join(map(repr, METHODS))}.")

    def integrator(self, predicts_scores: bool) -> str:
        """As `objectives.Method.integrator`."""
        return "posterior"


class RewardBackpropagationTrainer(RewardTrainer):
    """Back-propagate the reward through the sampler, in the harness of [`AdjointMatchingTrainer`], for comparison.

    Args:
        method: "discrete_adjoint": the paths' KL to the base and minus the reward, differentiated through the whole chain, each
            step evaluated again in the backward pass. Its only fixed point is the tilted law, as Adjoint Matching's; its
            gradients have a higher variance.

    The other arguments are those of [`AdjointMatchingTrainer`]; of the config, the fields of a regression (`loss_type`,
    `loss_kwargs`, `loss_clip`, `num_loss_steps`, `loss_step_selection`, `num_iterations`) have no meaning here and must be left
    out.

    Raises:
        TypeError, ValueError: for bad input, before any training, in one sentence.
    """

    method: BackpropagationMethod

    def __init__(
        self,
        model: str | DiffusionPipeline | ModularPipeline,
        reward_funcs: Callable[..., Tensor] | list[Callable[..., Tensor]],
        args: AdjointMatchingConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: LoraConfig | None = None,
        method: Literal["discrete_adjoint"] = "discrete_adjoint",
    ) -> None:
        self._asked = BackpropagationMethod(method)
        data = train_dataset, eval_dataset, processing_class
        super().__init__(model, reward_funcs, args, *data, callbacks, optimizers, peft_config)

    def method_of(self, args: AdjointMatchingConfig) -> BackpropagationMethod:
        """The one of the constructor, when nothing is asked of it that it does not have."""
        method = self._asked
        for name in UNUSED:
            if (value := getattr(args, name)) != AdjointMatchingConfig.__dataclass_fields__[name].default:
                raise ValueError(f"{name}={value!r} has no meaning for method={method.name!r}; leave it out.")
        if args.target_kl is not None:
            raise ValueError(
                f"target_kl={args.target_kl:g} is for AdjointMatchingTrainer; pass reward_scale to method={method.name!r}."
            )
        if args.fp16:  # the gradient scaler would scale what one step hands to the next
            raise ValueError(f"method={method.name!r} does not go with fp16=True; pass bf16=True.")
        return method

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Rollout, then back through its steps from the reward at its end; returns the micro-batch's share of the loss."""
        self._begin_micro_batch()
        chain = self.prepare_chain(inputs)
        steps = self.choose_steps(chain)
        with self._progress("rollout", len(self.replay.stds) - 1):
            path = chain.rollout()
        keep, score, scored = bounded_paths(path.states), self.scorer(chain), list[ScoredImages]()
        path = replace(path, states=zero_unless(keep, path.states))

        def terminal(end_point: Tensor) -> Tensor:
            scored.append(score(end_point))
            return -scored[0].tilt

        def weigh(costs: Tensor) -> Tensor:
            nonlocal keep
            keep = self.require_images(keep & scored[0].usable & bounded(costs.detach()))  # one left out stays out
            return torch.where(keep, costs, 0.0).mean() * chain.share

        step, first = synchronised(self.accelerator, model, chain.ends_update), steps.indices[0]
        with self._progress("chain", 2 * len(path)):
            found = discrete_adjoint(
                chain.mean_of(model),
                chain.base_mean,
                path,
                terminal,
                steps=steps.indices,
                weigh=weigh,
                backward=self._backward,
                around=lambda k: step(k == first),
            )
        self.record(scored[0], found.kl, keep)
        self._end_micro_batch(model, chain, scored[0])
        return found.loss

    def cost_of(self, chain: PipelineChain) -> UpdateCost:
        """As `RewardTrainer.cost_of`."""
        steps, path = self.choose_steps(chain).indices, chain.rollout()
        with torch.enable_grad():
            discrete_adjoint(chain.mean, chain.base_mean, path, torch.zeros_like(chain.start), steps=steps)
        return UpdateCost(len(steps), chain.denoiser.evaluations // len(chain.start))

    @property
    def method_name(self) -> str:
        return self.method.name

    def choose_steps(self, chain: PipelineChain) -> LossSteps:
        """All that have noise."""
        steps = noisy_steps(self._where_trained(chain.stds))
        return LossSteps(tuple(steps), (1.0,) * len(steps))

    def _card_facts(self, *given: Any) -> tuple[CardFacts, SampleImages]:
        """With the method in place of what a regression is set to."""
        facts, samples = super()._card_facts(*given)
        settings = {name: value for name, value in facts.settings.items() if name not in UNUSED}
        return replace(facts, settings={"method": self.method.name, **settings}), samples
