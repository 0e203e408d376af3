"""Base of the trainers that train a pipeline on a reward: constructor, chains, scoring, checks before training, logging."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar, cast

import torch
from diffusers import DiffusionPipeline, ModularPipeline
from peft import LoraConfig
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import TrainerState, set_seed
from transformers.utils import logging

from ..config import AdjointMatchingConfig, parsed, with_learning_rate
from ..core.matching import LossSteps
from ..data.columns import collate_columns, prompts_of, rows_of, without_prompt
from ..data.given_datasets import dataset_of, eval_datasets_of
from ..guidance import GUIDANCE
from ..hub import CardFacts
from ..model.chain import PipelineChain, predicts_scores
from ..model.denoiser import PipelineDenoiser
from ..model.devices import place
from ..model.loading import load_pipeline
from ..model.lora import add_lora
from ..model.randomness import Stream, random_numbers_kept, seeded_generator, seeded_generators
from ..model.sharding import from_first_process
from ..objectives import Method
from ..pictures.samples import SampleImages
from ..replay import PipelineReplay
from ..replay.frames import ChosenFrames, FrameChoice
from ..replay.selfcheck import check_replay
from ..rewards import WeightedReward
from ..rewards.quantised import warn_of_quantised_rewards
from ..schedulers import memoryless_scheduler
from ..schedulers.integrators import DEFAULT_INTEGRATOR
from ..soc import correlation
from .checks import (
    columns_to_check,
    require_config,
    require_prompts,
    require_unswitched_layers,
    require_writable,
    warn_of_flat_rewards,
    warn_of_given_start,
    warn_of_guidance,
    warn_of_whole_decodings,
)
from .cost import UpdateCost, rehearsal
from .dry_run import StopAfterOneUpdate, folder_unchanged, without_files
from .evaluation import kl_name, require_known_metric
from .gradients import require_checkpointing, require_gradients, warn_of_unused
from .host import PipelineTrainer
from .kl_budget import KLBudget, first_scale
from .probe import base_rewards, first_rows, probe_base, sampler_differences, warn_of_differences, warn_of_distillation
from .progress import progress
from .sample_log import announce_memory, per_prompt, summarise
from .scoring import ScoredImages, score_images
from .summary import RunSummary, describe_run
from .target_kl import TargetKL
from .updates import AfterOptimizerStep, require_asked_for, require_finite_weights

__all__ = ["RewardTrainer"]

logger = logging.get_logger(__name__)

Drawn = TypeVar("Drawn")


class RewardTrainer(PipelineTrainer):
    """Base of the trainers that fine-tune a diffusers pipeline on a reward. A subclass defines `training_step`.

    Arguments and errors are those of [`AdjointMatchingTrainer`].
    """

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
    ) -> None:
        require_config(args)
        train_dataset = None if train_dataset is None else dataset_of(train_dataset, "train_dataset")
        eval_dataset = None if eval_dataset is None else eval_datasets_of(eval_dataset)
        pipeline = load_pipeline(model, parsed(args.model_init_kwargs), args.trained_component) if args else load_pipeline(model)
        args = args or AdjointMatchingConfig(f"{type(pipeline).__name__}-AdjointMatching")
        args = with_learning_rate(args, full=peft_config is None)
        args = without_files(args) if args.dry_run else args
        self.method = self.method_of(args)
        require_writable(args.output_dir, create=not args.dry_run)
        self.reward = WeightedReward(reward_funcs, args.reward_weights, images_as=args.images_as, workers=args.reward_workers)
        _suit_the_host(args)
        set_seed(args.seed)  # before LoRA draws its weights

        self.pipeline = pipeline
        self.replay = _replay_of(pipeline, args, args.integrator or DEFAULT_INTEGRATOR)
        if self.replay.arguments.takes_prompt:
            require_prompts(train_dataset, "train_dataset")
            require_prompts(eval_dataset, "eval_dataset")
        self.guidance = GUIDANCE[args.cfg_mode]
        warn_of_guidance(self.replay, args.guidance_scale, self.guidance)
        warn_of_distillation(pipeline)
        self.denoiser = _denoiser_of(self.replay, peft_config)
        if self.method.switches_adapter:
            require_unswitched_layers(type(self.method).__name__, args, self.denoiser)

        with folder_unchanged(Path(args.output_dir)) if args.dry_run else contextlib.nullcontext():
            super().__init__(
                model=self.denoiser,
                args=args,
                data_collator=collate_columns,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                callbacks=callbacks,
                optimizers=optimizers,
            )
        self._suit_paths()
        place(pipeline, args.device, args.offload_text_encoders)
        self.reward.to(args.device)
        self._watch(args)

    def _watch(self, args: AdjointMatchingConfig) -> None:
        """Set up what is measured and reported during training."""
        self._target_kl = TargetKL(args.target_kl)
        self._idle_steps: list[int] = []  # steps that the trained network does not predict; found at the start of training
        self._probed: dict[str, float] = {}  # the probe's measurements, until they are logged
        self._rehearsal: PipelineChain | None = None  # made by the check at the start of training, to count evaluations once
        self.add_callback(AfterOptimizerStep(self._judge_update))
        self._summary = RunSummary(self._describe, args.device)
        self.add_callback(self._summary)
        if args.dry_run:
            self.add_callback(StopAfterOneUpdate())

    @cached_property
    def budget(self) -> KLBudget | None:
        """Adjusts λ if `target_kl` is set; `None` if λ is `reward_scale`."""
        summed = partial(self.accelerator.reduce, reduction="sum")
        return None if self.args.target_kl is None else KLBudget(self.args.target_kl, summed)

    def method_of(self, args: AdjointMatchingConfig) -> Method:
        """The method that the settings ask for; raises ValueError for settings that have no meaning for it."""
        raise NotImplementedError

    def choose_steps(self, chain: PipelineChain) -> LossSteps:
        """The loss steps of the next update, the same for all of its images."""
        raise NotImplementedError

    def cost_of(self, chain: PipelineChain) -> UpdateCost:
        """Cost of the next update. The denoiser of `chain` counts evaluations and makes none; see `rehearsal`."""
        raise NotImplementedError

    @property
    def method_name(self) -> str:
        """Name of the method in the settings, for the start-up summary."""
        raise NotImplementedError

    @property
    def reward_scale(self) -> float:
        """λ of the current or next update, nats per unit of reward; ValueError if `target_kl` has not estimated it yet."""
        return cast(float, self.args.reward_scale) if self.budget is None else self.budget.reward_scale

    def _suit_paths(self) -> None:
        """Choose the integrator that suits the method, unless the user has chosen one."""
        scores = predicts_scores(self.replay, self.guidance)
        wanted = self.method.integrator(scores)
        if not scores and self.method.integrator(True) != wanted:
            why = "guidance acts in training"
            if self.replay.starts_below_noise:
                why = "the paths start from an image"
            elif self.replay.guidance_is_distilled:
                why = f"the network takes guidance_scale={self.args.guidance_scale:g} as an input"
            logger.warning(
                f"{why}, so the base's predictions are not the scores of its own paths: pairing 'next' is used instead of "
                f"'score', on paths of integrator={self.args.integrator or wanted!r}."
            )
        if self.args.integrator is None and self.replay.scheduler.config.integrator != wanted:
            self.replay.scheduler = memoryless_scheduler(self.pipeline.scheduler, integrator=wanted)

    # ------------------------------------------------------------------------------------------- parts of a training step

    def prepare_chain(self, inputs: dict[str, Any]) -> PipelineChain:
        """Prompts → x_0 and conditioning. Every random number belongs to (seed, update, global image index)."""
        columns, first = inputs["columns"], inputs["first_image"]
        images = range(first, first + rows_of(columns))
        with self._summary.phases.of("prompts"), self._text_encoders():
            start, conditioning = self.replay.prepare(
                columns,
                self._generators(images, Stream.START),
                guided=self.guidance.rollout,
                unguided=not self.guidance.loss,
            )
        noise = self._generators(images, Stream.STEP_NOISE)
        drawn = self.denoiser, self.guidance, start, conditioning, noise, columns
        shared = inputs["share"], inputs["ends_update"], self.args.num_generations
        return PipelineChain(*drawn, *shared, frames=self._chosen_frames())

    def _chosen_frames(self) -> ChosenFrames | None:
        """The frames of this update's videos that are decoded for the rewards, the same in all; `None` for all frames."""
        layout = self.replay.frame_layout
        if layout is None:
            return None
        choice = FrameChoice.of(self.args.decode_frames)
        if choice.kind == "asked":
            asked = self.reward.asked_frames(layout.num_frames)
            return ChosenFrames(tuple(sorted(asked)), layout.num_frames, in_place=True)
        generator = seeded_generator(self.args.seed, self.state.global_step, 0, Stream.FRAMES)
        latent_frames = choice.latent_frames(len(layout.sizes), generator)
        return ChosenFrames(layout.frames_of(latent_frames), layout.num_frames)

    def _generators(self, images: Sequence[int], stream: Stream) -> list[torch.Generator]:
        return seeded_generators(self.args.seed, self.state.global_step, images, stream)

    def scorer(self, chain: PipelineChain) -> Callable[[Tensor], ScoredImages]:
        """The function that an objective calls to score end points of the chain, (B, …) → `ScoredImages`."""

        def score(end_point: Tensor) -> ScoredImages:
            if self.state.global_step == 0 and self.method.scores_end_points:
                memory = [correlation(start, end) for start, end in zip(chain.start, end_point, strict=True)]
                self._counts.samples.add("memory", chain.start.new_tensor(memory))
            with self._summary.phases.of("rewards"):
                return score_images(end_point, chain, self.reward, self.reward_scale, differentiate=self.method.needs_gradient)

        return score

    def _where_trained(self, scales: Tensor) -> Tensor:
        """`scales`, (K,), with 0 at the steps that another network predicts: they carry no loss."""
        scales = scales.clone()
        scales[self._idle_steps] = 0.0
        return scales

    def _begin_micro_batch(self) -> None:
        """Check that the adapter is active, since a callback may have changed it, and log the probe before the first update."""
        self.denoiser.state.require_adapter()
        if self._probed:
            self.log(self._probed)
            self._probed = {}

    def _end_micro_batch(self, model: nn.Module, chain: PipelineChain, scored: ScoredImages) -> None:
        """After the last micro-batch's backward passes: adjust λ, check gradients, and drop the update if it cannot be made."""
        if not chain.ends_update:
            return
        if self.budget is not None:
            self.budget.end_update()
        self._check_gradients()
        if not self._can_step(model, self.args.num_iterations):
            self._counts.updates.drop(model)
        if self.is_world_process_zero():
            self._shown.trained = self._pictures(chain, scored)
        if self.state.global_step == 0:  # earlier images show the base, and this update's rewards are those of the base
            self._shown.evaluated = None
            self._announce()

    def _pictures(self, chain: PipelineChain, scored: ScoredImages) -> SampleImages | Callable[[], SampleImages]:
        """The first images to show. Videos that were decoded in part are decoded completely, but only when they are shown."""
        first = partial(SampleImages.first, self.args.num_images_to_log, columns=chain.columns, rewards=scored.rewards)
        if chain.frames is None or not self.args.num_images_to_log:
            return first(images=scored.images)
        end_point = scored.end_point

        def decoded() -> SampleImages:
            with torch.no_grad():
                return first(images=chain.decode_all(end_point))

        return decoded

    def _check_gradients(self) -> None:
        """Check once, before the first optimizer step, that trained tensors have gradients."""
        updates = self._counts.updates
        if updates.gradients_checked or self.is_deepspeed_enabled:  # DeepSpeed does not keep gradients in `grad`
            return
        updates.gradients_checked = True
        trained = {name: p for name, p in self.denoiser.network.named_parameters() if p.requires_grad}
        reached = torch.tensor([p.grad is not None for p in trained.values()], dtype=torch.float, device=self.args.device)
        reached = self.accelerator.reduce(reached, reduction="sum")  # so that all processes decide the same
        without = [name for name, count in zip(trained, reached.tolist(), strict=True) if not count]
        require_gradients(trained, without, lora=self.denoiser.base_adapters is not None)
        if self.is_world_process_zero():
            warn_of_unused(trained, without)

    def _can_step(self, model: nn.Module, iteration: int) -> bool:
        """Whether the optimizer may step: an image counts, and the gradient is finite.

        With zero gradients an optimizer would still change the weights, by its momentum and weight decay.

        Args:
            model: the wrapped model.
            iteration: of the current update, from 1.
        """
        if self._counts.updates.can_step(model):
            return True
        if self.args.on_nonfinite == "raise":
            raise ValueError("the gradient of the loss is NaN or infinite; fix the inputs, or pass on_nonfinite='skip'.")
        if self.is_world_process_zero():
            which = f"iteration {iteration} of " if self.args.num_iterations > 1 else ""
            logger.warning(f"{which}update {self.state.global_step + 1} is skipped: rewards or gradients are NaN or infinite.")
        return False

    def _judge_update(self) -> None:
        """After the optimizer step: stop if a weight is NaN or infinite, before it is saved, and count the update."""
        require_finite_weights(self.denoiser.network, self.state.global_step + self.is_in_train)
        # Images that were kept, but whose update was dropped. `record` has counted those that were left out.
        self._counts.samples.add("skipped", self._counts.updates.end())

    @contextlib.contextmanager
    def _progress(self, what: str, steps: int) -> Iterator[None]:
        """Measure a phase of the update, with a progress bar if it takes long."""
        bar = progress(self.denoiser, f"update {self.state.global_step + 1}, {what}", steps, self._shows_progress)
        with self._summary.phases.of(what), bar:
            yield

    def _describe(self, state: TrainerState) -> list[str]:
        """Lines of the start-up summary; see `describe_run`."""
        if self._rehearsal is None:
            return []
        cost, self._rehearsal = self.cost_of(self._rehearsal), None
        given = self.denoiser, self.args, state
        return describe_run(*given, method=self.method_name, reward_scale=self.reward_scale, cost=cost)

    def require_images(self, keep: Tensor) -> Tensor:
        """Return `keep`, (B,) bool; raise ValueError if it leaves an image out and `on_nonfinite` is "raise"."""
        if self.args.on_nonfinite == "raise" and not keep.all():
            raise ValueError(
                f"{int((~keep).sum())} rewards, reward gradients, losses or adjoints are NaN or infinite, or too large to be "
                f"squared; fix the reward function, lower reward_scale, or pass on_nonfinite='skip'."
            )
        return keep

    # ---------------------------------------------------------------------------------------------- checks before training

    def _check_before_training(self) -> Collection[str]:
        """Check the settings, and then pipeline, grid and rewards on the first row, before any rollout."""
        require_known_metric(self.replay, self.guidance, self.reward, self.args, self.eval_dataset)
        require_asked_for(self.args, self.train_dataset)
        # The host switches it on later. The check below must not need more memory than training does.
        if self.args.gradient_checkpointing:
            self.denoiser.gradient_checkpointing_enable()
        names = self.check_first_row()
        warn_of_given_start(self.replay)
        return names

    def check_first_row(self) -> Collection[str]:
        """Raise ValueError if pipeline, grid or rewards fail on the first row. Finds the idle steps; returns the column names."""
        columns = columns_to_check(self.train_dataset, self.eval_dataset, self.args, self.replay, self.reward)
        generators = self._generators(range(rows_of(columns)), Stream.START)
        with self._text_encoders():
            modes = {"check_guided": self.guidance.rollout or self.guidance.loss, "check_unguided": not self.guidance.loss}
            check_replay(self.replay, columns, generators, **modes)
        warn_of_whole_decodings(self.replay)
        first = {"columns": columns, "first_image": 0, "share": 1.0, "ends_update": False}
        chain = self.prepare_chain(first)
        if self.guidance.loss and not self.replay.arguments.guides:
            self.replay.find_guidance(chain.start, chain.conditioning)
        if self.replay.starts_below_noise or self.replay.guides_itself:  # known only after the first `prepare`
            self._suit_paths()
            chain = self.prepare_chain(first)
        self._idle_steps = self.replay.idle_steps(chain.start, chain.conditioning, guided=self.guidance.loss)
        step = next(k for k in range(len(self.replay.stds)) if k not in self._idle_steps)
        require_checkpointing(self.denoiser, chain.start, step, chain.conditioning, guided=self.guidance.loss)
        self.choose_steps(chain)
        self._rehearsal = rehearsal(chain)
        scored = score_images(chain.start, chain, self.reward, 1.0, differentiate=self.method.needs_gradient)
        if self.method.needs_gradient:
            warn_of_flat_rewards(scored.norms)
            decode = partial(chain.decode, scored.end_point)
            warn_of_quantised_rewards(self.reward, decode, prompts_of(columns), without_prompt(columns))
        return columns.keys()

    def _probe_before_training(self) -> None:
        """Sample images of the base: estimate how far λ will move it, and compare its samplers; see `trainer.probe`.

        Every process samples the same images, so nothing has to be gathered.
        """
        if not self.args.probe_base:
            return
        probe = self._of_the_base(probe_base)
        self._probed = probe.summary()
        if self.is_world_process_zero():
            if self.budget is None:
                self._target_kl.announce(self.reward_scale, probe.rewards)
            # Logged with the probe too, for a run that is interrupted before its first log line.
            self._probed |= self._target_kl.logged(self.state.log_history)
            warn_of_differences(sampler_differences(probe), self.args.num_inference_steps)

    def _find_scale_before_training(self) -> None:
        """Estimate the first λ for `target_kl`, unless a checkpoint has one."""
        if self.budget is not None and self.budget.spent is None:
            rewards = self._of_the_base(base_rewards)
            self.budget.spent = from_first_process(partial(first_scale, rewards, self.budget.budget))

    def _of_the_base(self, measure: Callable[..., Drawn]) -> Drawn:
        """Call `measure` on images that the base samples for the first rows; no random number of training is drawn."""
        replay = _replay_of(self.pipeline, self.args, self.args.sampling_integrator)
        together = self.args.per_device_train_batch_size * self.args.num_generations
        with self.denoiser.base(), self._text_encoders(), random_numbers_kept(self.args.device):
            return measure(
                replay,
                self.reward,
                first_rows(self.train_dataset),
                batch_size=1 if self.args.auto_find_batch_size else together,
                guided=self.guidance.rollout,
                seed=self.args.seed,
                watched=partial(tqdm, desc="samples of the base", leave=False, disable=not self._shows_progress),
            )

    def _write_memory(self, folder: Path) -> None:
        if self.budget is not None:
            self.budget.write(folder)

    def _read_memory(self, folder: Path) -> None:
        if self.budget is not None:
            self.budget.read(folder)

    # ------------------------------------------------------------------------------------------------ logging, evaluation

    def _card_facts(self, *given: Any) -> tuple[CardFacts, SampleImages]:
        """As in the base class, with the λ that `target_kl` has led to."""
        facts, samples = super()._card_facts(*given)
        if self.budget is None or self.budget.spent is None:
            return facts, samples
        return replace(facts, settings={**facts.settings, "reward_scale": self.reward_scale}), samples

    def record(self, scored: ScoredImages, kl: Tensor, keep: Tensor, logged: Mapping[str, Tensor] = MappingProxyType({})) -> None:
        """Add a micro-batch to the next log line, and count its images.

        Args:
            scored: its rewards.
            kl: path KL of each image, (B,), nats.
            keep: images that count in the loss, (B,) bool.
            logged: further measurements of each image, name → (B,).
        """
        self._counts.updates.keep(keep)
        samples = self._counts.samples
        samples.add("reward", scored.rewards)
        for name, values in scored.values.items():
            samples.add(f"rewards/{name}", values)
        # The log averages over values that are not NaN, so images that were left out do not count.
        for name, values in {kl_name(self.replay, self.guidance): kl, **logged}.items():
            samples.add(name, torch.where(keep, values, torch.nan))
        if self.method.needs_gradient:
            samples.add("adjoint_norm", torch.where(keep, scored.norms, torch.nan))
        samples.add("skipped", (~keep).float())

    def _announce(self) -> None:
        """After the first update, report the memory of its end points and, without a probe, how far λ will move the model."""
        samples, main = self._counts.samples, self.is_world_process_zero()
        rewards = samples.gathered("reward", self.accelerator.gather)
        if main and not self.args.probe_base and self.budget is None:
            self._target_kl.announce(self.reward_scale, per_prompt(rewards, self.args.num_generations))
        if self.method.scores_end_points:
            memory = samples.gathered("memory", self.accelerator.gather)
            samples.forget("memory")
            if main:
                announce_memory(memory[memory.isfinite()])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add to a log line of training: reward, reward_std, reward_std_between, rewards/<name>/mean, /std and /missing; kl or
        kl_unguided and target_kl_estimate in nats; reward_scale with `target_kl`; adjoint_norm, skipped, evaluations_per_second;
        and what the objective logs, such as `capped`."""
        if "loss" in logs:
            logs |= summarise(self._counts.samples.drain(self.accelerator.gather), self.args.num_generations)
            logs |= {"evaluations_per_second": self._counts.rate.since_last()}
            logs |= self._target_kl.logged(self.state.log_history)
            logs |= {} if self.budget is None else {"reward_scale": self.budget.reward_scale}
            if self.is_world_process_zero():
                self._target_kl.watch(logs)
        super().log(logs, start_time)
        if "loss" in logs:
            self._show("train", self._shown.of_training())


def _denoiser_of(replay: PipelineReplay, peft_config: LoraConfig | None) -> PipelineDenoiser:
    """Freeze the pipeline, and wrap its network for training: with a new LoRA, or all of its weights."""
    for component in replay.pipeline.components.values():
        if isinstance(component, nn.Module):
            component.requires_grad_(False).eval()
    return PipelineDenoiser(replay, None if peft_config is None else add_lora(replay.pipeline, replay.component, peft_config))


def _suit_the_host(args: AdjointMatchingConfig) -> None:
    """Set the host's options that a pipeline's batches need."""
    # Rows are lists of Python values: each process collates its own, and numbers its images by its rank.
    args.accelerator_config.dispatch_batches = False
    if args.device.type == "cpu":  # pinned memory serves copies to a GPU only, and torch would warn
        args.dataloader_pin_memory = False
    if args.n_gpu > 1:  # torch.nn.DataParallel would scatter the states but not the conditioning
        logger.warning(f"{args.n_gpu} GPUs are visible, but one is used; start with `accelerate launch` to use them all.")
        args._n_gpu = 1


def _replay_of(pipeline: DiffusionPipeline | ModularPipeline, args: AdjointMatchingConfig, integrator: str) -> PipelineReplay:
    return PipelineReplay(
        pipeline,
        memoryless_scheduler(pipeline.scheduler, integrator=integrator),
        args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        pipeline_kwargs=parsed(args.pipeline_kwargs),
        component=args.trained_component,
        chooses_frames=args.decode_frames != "all",
    )
