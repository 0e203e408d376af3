"""Back-propagation of the reward through the sampler, to compare Adjoint Matching with."""

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
# Fields of the config that belong to the regression of Adjoint Matching.
UNUSED = ("loss_type", "loss_kwargs", "loss_clip", "num_loss_steps", "loss_step_selection", "num_iterations")


@dataclass(frozen=True)
class BackpropagationMethod:
    """The discrete adjoint (2409.08861, §3.2): the gradient of the control cost through all steps of the chain."""

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
        """The integrator of the paths, always "posterior"; see `objectives.Method.integrator`."""
        return "posterior"


class RewardBackpropagationTrainer(RewardTrainer):
    """Fine-tune a pipeline by back-propagation through the sampler, to compare [`AdjointMatchingTrainer`] with.

    Its other arguments are those of [`AdjointMatchingTrainer`]. The config's fields for a regression (`loss_type`, `loss_kwargs`,
    `loss_clip`, `num_loss_steps`, `loss_step_selection`, `num_iterations`) have no meaning here and must be left out.

    Args:
        method: "discrete_adjoint" minimises the paths' KL to the base minus λ times the reward, and differentiates both through
            all steps of the chain. Each step is evaluated again in the backward pass, to save memory. Its only fixed point is the
            tilted distribution, as for Adjoint Matching; its gradients have a higher variance.

    Raises:
        TypeError, ValueError: for bad input, before training. The message says what was wrong and what to pass instead.
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
        """The method given to the constructor; raises ValueError for settings that it does not have."""
        method = self._asked
        for name in UNUSED:
            if (value := getattr(args, name)) != AdjointMatchingConfig.__dataclass_fields__[name].default:
                raise ValueError(f"{name}={value!r} has no meaning for method={method.name!r}; leave it out.")
        if args.target_kl is not None:
            raise ValueError(
                f"target_kl={args.target_kl:g} is for AdjointMatchingTrainer; pass reward_scale to method={method.name!r}."
            )
        if args.fp16:  # the gradient scaler would also scale the adjoint that each step passes to the one before
            raise ValueError(f"method={method.name!r} does not work with fp16=True; pass bf16=True.")
        return method

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Rollout, then back through its steps from the reward at the end; returns the micro-batch's share of the loss."""
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
            keep = self.require_images(keep & scored[0].usable & bounded(costs.detach()))  # an image left out stays out
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
        """Cost of an update; see `RewardTrainer.cost_of`."""
        steps, path = self.choose_steps(chain).indices, chain.rollout()
        with torch.enable_grad():
            discrete_adjoint(chain.mean, chain.base_mean, path, torch.zeros_like(chain.start), steps=steps)
        return UpdateCost(len(steps), chain.denoiser.evaluations // len(chain.start))

    @property
    def method_name(self) -> str:
        return self.method.name

    def choose_steps(self, chain: PipelineChain) -> LossSteps:
        """All steps that have noise."""
        steps = noisy_steps(self._where_trained(chain.stds))
        return LossSteps(tuple(steps), (1.0,) * len(steps))

    def _card_facts(self, *given: Any) -> tuple[CardFacts, SampleImages]:
        """As in the base class, with the method instead of the settings of a regression."""
        facts, samples = super()._card_facts(*given)
        settings = {name: value for name, value in facts.settings.items() if name not in UNUSED}
        return replace(facts, settings={"method": self.method.name, **settings}), samples
