"""The Adjoint Matching trainer: it trains a diffusers pipeline on a reward r until it samples from p_base(x)·exp(λ r(x)).

chain = prepare_chain(inputs)                        # prompts → x_0 and conditioning
steps = choose_steps(chain)                          # which steps of the chain carry the loss
targets = method.targets(chain, steps, score)        # states x_k, and at each the target shift δ of the step mean
loss = regress(model, chain, targets)                # ½‖((μ^θ − μ^base) − δ)/s‖², one forward and backward pass a point

With `num_iterations` above 1, the last micro-batch of an update also makes the optimizer steps between the iterations, and
regresses on other steps after each. The host makes the last optimizer step, so one of its updates is one rollout.
"""

from __future__ import annotations

from collections.abc import Collection
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..config import AdjointMatchingConfig
from ..core.matching import LossSteps, choose_loss_steps
from ..model.chain import PipelineChain
from ..model.randomness import Stream, seeded_generator
from ..objectives import Objective, Targets
from .cost import UpdateCost, unscored
from .iterations import KeptBatch, points_of, require_plain_steps, union
from .parallel import synchronised
from .regress import Fit, regress
from .reward_trainer import RewardTrainer
from .stages import begin_stage, load_stage, require_whole_weights, save_stage

__all__ = ["AdjointMatchingTrainer"]


class AdjointMatchingTrainer(RewardTrainer):
    """Fine-tune a diffusers pipeline on a reward r with Adjoint Matching (arXiv 2409.08861).

    After training the pipeline samples from p_base(x)·exp(λ r(x)), where λ is `AdjointMatchingConfig.reward_scale`: images with a
    higher reward are more likely, and the pipeline stays near its base.

    ```python
    trainer = AdjointMatchingTrainer(
        model=pipe, reward_funcs=brightness, args=AdjointMatchingConfig(output_dir="out", reward_scale=10.0),
        train_dataset=dataset, peft_config=LoraConfig(r=8),
    )
    trainer.train()
    ```

    Args:
        model: a `DiffusionPipeline`, a loaded `ModularPipeline`, or the name or folder of one. Its denoiser is trained in place.
            Its scheduler is not changed.
        reward_funcs: one function or module, or a list of them: `f(images=, prompts=, **columns) -> Tensor (B,)`. `images` are
            float (B, 3, H, W) in [0, 1], videos (B, F, 3, H, W), waveforms (B, …). The result must be differentiable in them,
            except for `loss_type="ram"`. Modules are moved to the device. A function moves its own networks.
        args: the settings. When not given, the defaults, with `output_dir="<pipeline>-AdjointMatching"`.
        train_dataset: a `datasets.Dataset` or `IterableDataset`, a torch `Dataset` of dicts, or a list of prompts or dicts. Its
            rows need a "prompt" column if the pipeline takes prompts. Columns named like an argument of the pipeline's `__call__`
            (negative_prompt, image, class_labels, …) are passed to it. All columns are passed to the rewards.
        eval_dataset: a dataset like `train_dataset` for `evaluate()`, or a dict of several.
        processing_class: unused, and here because other trainers have it: the pipeline has its own tokenizers.
        callbacks, optimizers: as in `transformers.Trainer`.
        peft_config: LoRA to train on the denoiser. `None` trains all its weights, and keeps a frozen copy of them as the base.

    Raises:
        TypeError, ValueError: for bad input, before training. The message says what was wrong and what to pass instead.
    """

    method: Objective
    _kept: list[KeptBatch]  # micro-batches of the current update, kept for its further iterations

    def method_of(self, args: AdjointMatchingConfig) -> Objective:
        """The objective that `loss_type` and `loss_kwargs` name."""
        return args.objective

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Rollout → reward → targets → regression; returns the micro-batch's share of the update's loss, 0-dimensional.

        Raises:
            ValueError: if the adapter was removed, disabled or rescaled since training began, by a callback for example. The
                other errors are those of `train`.
        """
        self._begin_micro_batch()
        chain = self.prepare_chain(inputs)
        steps = [self.choose_steps(chain, iteration) for iteration in range(self.args.num_iterations)]
        with self._progress("paths and targets", 2 * len(self.replay.stds)):  # exact for the lean adjoint; others differ
            targets = self.method.targets(chain, union(steps), self.scorer(chain))
        with self._progress("loss", len(steps[0].indices)):
            fit = self.regress(model, chain, targets if len(steps) == 1 else points_of(targets, steps[0]), targets.scored.usable)
        self.record(targets.scored, fit.kl, fit.keep, targets.logged)
        if self.budget is not None:
            self.budget.add(fit, steps[0])
        if len(steps) > 1:
            self._kept.append(KeptBatch(chain, copy(self.replay.scheduler), replace(targets, scored=None), steps, fit.keep))
            if chain.ends_update:
                self._go_on(model)
        self._end_micro_batch(model, chain, targets.scored)
        return fit.loss

    def cost_of(self, chain: PipelineChain) -> UpdateCost:
        """The evaluations that the targets take, and one for each point of the regression; see `RewardTrainer.cost_of`."""
        steps = [self.choose_steps(chain, iteration) for iteration in range(self.args.num_iterations)]
        # A fresh objective, not `self.method`: a user's own objective may keep state, which the count must not change.
        targets = self.args.objective.targets(chain, union(steps), unscored)
        points = [targets] if len(steps) == 1 else [points_of(targets, chosen) for chosen in steps]
        regressed = sum(len(of_one.steps.indices) for of_one in points)
        return UpdateCost(len(steps[0].indices), chain.denoiser.evaluations // len(chain.start) + regressed)

    @property
    def method_name(self) -> str:
        return self.args.loss_type

    def choose_steps(self, chain: PipelineChain, iteration: int = 0) -> LossSteps:
        """Draw the loss steps from (seed, update, iteration): all images, micro-batches and processes use the same steps."""
        generator = seeded_generator(self.args.seed, self.state.global_step, iteration, Stream.LOSS_STEPS)
        scales = self._where_trained(self.method.scales(chain))
        half = max((len(scales) - len(self._idle_steps)) // 2, 1)
        return choose_loss_steps(scales, self.args.num_loss_steps or half, self.args.loss_step_selection, generator)

    def regress(self, model: nn.Module, chain: PipelineChain, targets: Targets, keep: Tensor) -> Fit:
        """Backward through the loss of each point; `keep`, (B,) bool, selects the images that count."""
        return regress(
            chain.mean_of(model),
            targets,
            keep,
            share=chain.share,
            loss_clip=self.args.loss_clip,
            require=self.require_images,
            backward=self._backward,
            synchronised=synchronised(self.accelerator, model, chain.ends_update),
        )

    # ---------------------------------------------------------------------------------------- several updates from one rollout

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """The host calls this before each update. Drops what an update that ended in an error has left."""
        self._kept = []
        if (stages := self.args.stages) is not None:
            begin_stage(self.denoiser, self.state.global_step, self.args.max_steps, stages)
        if self.budget is not None:
            self.budget.begin_update()
        return super().get_batch_samples(*args, **kwargs)

    def _check_before_training(self) -> Collection[str]:
        scaled = self.accelerator.scaler is not None
        require_plain_steps(self.args.num_iterations, deepspeed=self.is_deepspeed_enabled, scaled=scaled)
        require_whole_weights(self.args.stages, divided=self.is_deepspeed_enabled or self.is_fsdp_enabled)
        return super()._check_before_training()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Also save the weights that the current stage started from."""
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            save_stage(self.denoiser, Path(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.args.stages is not None:
            load_stage(self.denoiser, Path(checkpoint))

    def _go_on(self, model: nn.Module) -> None:
        """Make the optimizer step of each iteration but the last, and the backward passes of the iteration after it."""
        for iteration in range(1, self.args.num_iterations):
            self._step(model, iteration)
            points = sum(len(batch.steps[iteration].indices) for batch in self._kept)
            with self._progress(f"loss of iteration {iteration + 1}", points):
                for batch in self._kept:
                    with self.replay.on(batch.grid):
                        fit = self.regress(model, batch.chain, points_of(batch.targets, batch.steps[iteration]), batch.keep)
                    batch.keep = fit.keep
                    self._counts.updates.keep(fit.keep)
        self._kept = []

    def _step(self, model: nn.Module, iteration: int) -> None:
        """Clip the gradients and step, as the host does, but without its learning-rate schedule and callbacks."""
        self._check_gradients()
        if can_step := self._can_step(model, iteration):
            if self.args.max_grad_norm > 0:
                self.accelerator.clip_grad_norm_(model.parameters(), self.args.max_grad_norm)
            self.optimizer.step()
        model.zero_grad()
        self._counts.updates.go_on(moved=can_step)
