"""Settings of Adjoint Matching: `transformers.TrainingArguments` plus the fields of the method."""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
from dataclasses import dataclass, field, fields
from typing import Any, Literal, cast

from transformers import TrainingArguments

from .field_types import require_types
from .guidance import GUIDANCE
from .objectives import OBJECTIVES, Objective, Ram, objective_of
from .replay.frames import FrameChoice
from .rewards.black_box import IMAGES_AS
from .schedulers.integrators import DEFAULT_INTEGRATOR, INTEGRATORS
from .schedulers.memoryless import check_integrator

__all__ = ["AdjointMatchingConfig", "parsed", "with_learning_rate"]

MOVED = {
    "continuous_adjoint": "pass 'basic_adjoint_matching', which has the same gradient",
    "discrete_adjoint": "train with RewardBackpropagationTrainer(method='discrete_adjoint'), or --method discrete_adjoint",
}
OWN_DICTS = ["pipeline_kwargs", "model_init_kwargs", "loss_kwargs"]  # JSON text on the command line
LORA_LEARNING_RATE, FULL_LEARNING_RATE = 1e-4, 2e-5  # the second is the paper's (2409.08861)

CHOICES: dict[str, tuple[str, ...]] = {
    "cfg_mode": tuple(GUIDANCE),
    "images_as": IMAGES_AS,
    "loss_step_selection": ("uniform", "paper"),
    "on_nonfinite": ("skip", "raise"),
}


@dataclass(repr=False)  # a generated `__repr__` would print tokens
class AdjointMatchingConfig(TrainingArguments):
    r"""Configuration of [`AdjointMatchingTrainer`].

    Only the fields of Adjoint Matching, and the defaults that differ from `TrainingArguments`, are listed here.

    > Parameters that control the target distribution p_base(x)·exp(λ r(x))

    Args:
        reward_scale (`float`, *optional*):
            λ, nats per unit of reward; 1 when neither it nor `target_kl` is given. A larger λ moves the model further from the
            base. λ·std(r) between 1 and 2 is a moderate tilt.
        target_kl (`float`, *optional*):
            The KL of the model's paths to the base's paths that training should reach, nats; given instead of `reward_scale`. λ
            is estimated from 256 images of the base, and then adjusted to the KL that training measures (the logged `kl` is a
            noisier estimate).
        reward_weights (`list[float]`, *optional*):
            Weight of each reward function in r; all 1 when not given.
        images_as (`str`, defaults to `"tensor"`):
            How reward functions get the images: `"tensor"`; or `"pil"`, a list of PIL images, or of lists of frames for videos.
            `"pil"` works only with an objective that does not differentiate the reward (`loss_type="ram"`).
        reward_workers (`int`, defaults to 1):
            Threads that call each reward function, each on a part of the batch, for slow functions such as a request to a server.
            Above 1 only with an objective that does not differentiate the reward.
        guidance_scale (`float`, defaults to 1.0):
            Scale of classifier-free guidance. 1 means none, and then the target is exact for every `cfg_mode`.
        cfg_mode (`str`, defaults to `"none"`):
            Where a guidance scale above 1 acts. `"none"`: nowhere in training, only in evaluation (exact for the unguided model).
            `"rollout"`: in the rollouts only (as in the official code; the result is *not* the tilted distribution). `"full"`:
            everywhere (exact for the guided model, but twice the work, and the adjoint can diverge).

    > Parameters that control the sampler

    Args:
        num_inference_steps (`int`, defaults to 20):
            K, steps of the memoryless sampler in training. The cost is proportional to it.
        integrator (`str`, *optional*):
            Discretisation of the memoryless SDE in training: "ancestral", "posterior", "compensated", "euler" (the paper's) or
            "local_linear". When not given, it suits the objective: "ancestral" for score pairing, "posterior" for all others.
            `benchmarks/discretisation.py` compares them.
        sampling_integrator (`str`, defaults to `"posterior"`):
            Discretisation of the memoryless SDE outside of training: for the images of `probe_base`, and for the KL of an
            evaluation.
        pipeline_kwargs (`dict`, *optional*):
            Further arguments of the pipeline's `__call__`, such as `{"height": 512, "width": 512}`. Arguments with one value for
            each image (negative_prompt, image, …) may be dataset columns instead.
        trained_component (`str`, *optional*):
            The network to train, in a pipeline that has several ("transformer_2" of Wan 2.2, which predicts the later steps), or
            whose network is not called "transformer" or "unet". When not given, the one that diffusers puts LoRA on. Steps that
            another network predicts are not trained.
        offload_text_encoders (`bool`, defaults to `False`):
            Keep the text encoders on the CPU, and move them to the device only while a batch of prompts is encoded.
        decode_frames (`str`, defaults to `"all"`):
            Which frames of a video are decoded for the rewards in training, to save memory. Frames are chosen by latent frames,
            each of which decodes to one frame or a few. `"all"`: all. `"first"`: the first latent frame. `"even_2"`: two latent
            frames evenly spaced, or another number. `"random_2"`: two (or another number) drawn for each update; the target is
            then the tilt by the mean reward over such draws. With these three the rewards get a shorter video. `"asked"`: the
            frames that the rewards look at (`per_frame`), in a video that is grey elsewhere; the rewards are the same as for
            `"all"`. With any choice but `"all"`, a decoder that works in slices keeps the graph of one slice only, at the cost of
            one more forward pass, and does not decode frames after the last chosen one unless they influence it.
        num_generations (`int`, defaults to 1):
            Images per prompt. A rollout has `per_device_train_batch_size` × `num_generations` images. `loss_type="ram"` compares
            the images of one prompt, and needs 2 or more.
        probe_base (`bool`, defaults to `True`):
            Before the first update, sample at least 16 images of up to 8 prompts on the base's memoryless chain, and as many with
            the pipeline's own sampler. They tell how far λ will move the model, and whether training starts from the images that
            users of the pipeline see.

    > Parameters that control the loss

    Args:
        loss_type (`str`, defaults to `"adjoint_matching"`):
            The objective. `"adjoint_matching"`, or for rewards without a gradient `"ram"`. For comparison:
            `"basic_adjoint_matching"` (the full adjoint, with two networks a step instead of one), `"efficient_adjoint_matching"`
            (no derivative of the network outside the loss; may diverge) and `"one_step"` (biased). See
            `diffusers_adjoint.objectives`.
        loss_kwargs (`dict`, *optional*):
            Options of the objective, the fields of its dataclass, such as `{"pairing": "next"}` for `"adjoint_matching"`.
        num_loss_steps (`int`, *optional*):
            S, steps of each trajectory that carry the loss; half of them when not given.
        loss_step_selection (`str`, defaults to `"uniform"`):
            How these steps are drawn: `"uniform"`, or `"paper"`, the last quarter always and the others at random.
        num_iterations (`int`, defaults to 1):
            Updates of the weights from each rollout. Each draws S steps of its own; the target shifts are computed once.
            `max_steps` and the learning-rate schedule count rollouts. After the first update the paths are off-policy.
        loss_clip (`float`, *optional*):
            The paper's loss clipping threshold (LCT), on the squared norm (without the ½) of each sample and step. A term above
            it has no gradient. Off by default.
        adjoint_pairing (`str`, *optional*):
            Has moved to `loss_kwargs={"pairing": …}`; a value here is an error.
        on_nonfinite (`str`, defaults to `"skip"`):
            What to do when a reward, its gradient, a state, an adjoint or a loss of an image is NaN, infinite, or too large to be
            squared: `"skip"` leaves the image out and counts it, `"raise"` stops training. After 20 updates in a row without a
            valid image or without a finite gradient, training stops in any case.

    > Parameters that control evaluation, pictures and interruption

    Args:
        num_generations_eval (`int`, defaults to 2):
            Images per prompt in `evaluate()`. With 2 or more, the diversity of one prompt's images is reported.
        num_images_to_log (`int`, defaults to 8):
            Images in the sample grids, with rewards and prompts. A grid is made at each log line and evaluation, written to
            `output_dir/samples/`, and sent to the trackers of `report_to` (tensorboard, wandb, trackio). The last one goes to
            the Hub with the model. 0 makes none.
        save_on_interrupt (`bool`, defaults to `False`):
            On Ctrl-C or SIGTERM, finish the update, write a checkpoint, and end; a second signal ends at once. The command
            `diffusers-adjoint train` sets it to `True`.
        dry_run (`bool`, defaults to `False`):
            Make all checks and one update, print its time and memory, and end. Nothing is evaluated, saved or uploaded, and no
            tracker is started; `save_model()` and `push_to_hub()` do nothing either.

    > Defaults that differ from `TrainingArguments`

    Args:
        logging_steps (`float`, defaults to 10): updates between two log lines.
        save_steps (`float`, defaults to 50): updates between two checkpoints; a run has hundreds of updates, not thousands.
        learning_rate (`float`, *optional*): when not given, 1e-4 for a LoRA, and 2e-5 (the paper's) for all weights.
        lr_scheduler_type (`str`, defaults to `"constant"`): no warm-up, no decay.
        per_device_train_batch_size (`int`, defaults to 4): prompts per rollout and process.
        per_device_eval_batch_size (`int`, defaults to 4): prompts sampled together in `evaluate()`.
        metric_for_best_model (`str`, *optional*): when not given and one is needed, "eval_reward".
        remove_unused_columns (`bool`, defaults to `False`): must stay `False`, because dataset columns reach the reward
            functions.
        model_init_kwargs (`dict`, *optional*): arguments of `from_pretrained`, and of a modular pipeline's `load_components`,
            when the model is given by name.
    """

    _VALID_DICT_FIELDS = TrainingArguments._VALID_DICT_FIELDS + OWN_DICTS

    logging_steps: float = field(default=10, metadata={"help": "Updates between two log lines."})
    save_steps: float = field(default=50, metadata={"help": "Updates between two checkpoints."})
    learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate; when not given, 1e-4 for a LoRA and 2e-5 for all weights."}
    )
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Learning rate schedule."})
    per_device_train_batch_size: int = field(default=4, metadata={"help": "Prompts per rollout and device."})
    per_device_eval_batch_size: int = field(default=4, metadata={"help": "Prompts sampled together in evaluation, per device."})
    remove_unused_columns: bool | None = field(
        default=False, metadata={"help": "Keep False: dataset columns reach the reward functions."}
    )

    metric_for_best_model: str | None = field(
        default=None, metadata={"help": "Metric of an evaluation that chooses the best checkpoint; eval_reward when not given."}
    )
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Arguments of the pipeline's from_pretrained, and of a modular pipeline's load_components."},
    )
    reward_scale: float | None = field(
        default=None, metadata={"help": "λ, nats per unit of reward; 1 when neither it nor target_kl is given."}
    )
    target_kl: float | None = field(
        default=None, metadata={"help": "KL to the base that training should reach, nats; given instead of reward_scale."}
    )
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each reward function; all 1 when not given."}
    )
    images_as: Literal["tensor", "pil"] = field(
        default="tensor",
        metadata={"help": "How rewards get images: 'tensor', or 'pil' for PIL images (loss_type ram only)."},
    )
    reward_workers: int = field(
        default=1,
        metadata={"help": "Threads that call a slow reward, each on a part of the batch (loss_type ram only)."},
    )
    guidance_scale: float = field(default=1.0, metadata={"help": "Classifier-free guidance; 1 means none."})
    cfg_mode: Literal["none", "rollout", "full"] = field(
        default="none", metadata={"help": "Where guidance above 1 acts in training: 'none', 'rollout' or 'full'."}
    )
    num_inference_steps: int = field(default=20, metadata={"help": "K, steps of the memoryless sampler."})
    integrator: str | None = field(
        default=None,
        metadata={
            "help": f"Discretisation of the SDE in training: {', '.join(INTEGRATORS)}; None for the one that suits the objective."
        },
    )
    sampling_integrator: str = field(
        default=DEFAULT_INTEGRATOR,
        metadata={"help": "Discretisation of the SDE for the probe and the KL of an evaluation; same names as integrator."},
    )
    pipeline_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Further arguments of the pipeline's __call__."}
    )
    trained_component: str | None = field(
        default=None, metadata={"help": "The network to train, if the pipeline has several; None for its first."}
    )
    offload_text_encoders: bool = field(
        default=False, metadata={"help": "Keep the text encoders on the CPU except while prompts are encoded."}
    )
    decode_frames: str = field(
        default="all",
        metadata={
            "help": "Latent frames of a video that are decoded for the rewards: all, first, asked, random_2, even_2 (any number)."
        },
    )
    num_generations: int = field(default=1, metadata={"help": "Images per prompt."})
    probe_base: bool = field(
        default=True, metadata={"help": "Sample images of the base before the first update, and report where training starts."}
    )
    loss_type: str = field(default="adjoint_matching", metadata={"help": f"The objective: {', '.join(OBJECTIVES)}."})
    loss_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": 'Options of the objective, such as {"pairing": "paper"}.'}
    )
    num_loss_steps: int | None = field(
        default=None, metadata={"help": "S, steps of each trajectory that carry the loss; None for half of them."}
    )
    loss_step_selection: Literal["uniform", "paper"] = field(
        default="uniform", metadata={"help": "'uniform', or 'paper': the last quarter always, the rest at random."}
    )
    num_iterations: int = field(default=1, metadata={"help": "Updates of the weights from each rollout."})
    loss_clip: float | None = field(
        default=None,
        metadata={"help": "The paper's loss clipping threshold, on the squared norm of each sample and step; None is off."},
    )
    adjoint_pairing: str | None = field(default=None, metadata={"help": argparse.SUPPRESS})  # the error says where it moved
    on_nonfinite: Literal["skip", "raise"] = field(
        default="skip",
        metadata={"help": "If a reward, gradient, adjoint or loss is not finite: 'skip' the image, or 'raise' an error."},
    )
    num_generations_eval: int = field(
        default=2, metadata={"help": "Images per prompt in evaluation; with 2 or more, their diversity is measured."}
    )
    num_images_to_log: int = field(default=8, metadata={"help": "Images in the sample grids and on the Hub; 0 for none."})
    save_on_interrupt: bool = field(
        default=False, metadata={"help": "On Ctrl-C or SIGTERM finish the update, write a checkpoint, and end."}
    )
    dry_run: bool = field(
        default=False, metadata={"help": "Make all checks and one update, print its time and memory, and end; writes no file."}
    )

    def __post_init__(self) -> None:
        require_types(self, AdjointMatchingConfig, unchecked=self._VALID_DICT_FIELDS)  # these may still be JSON text
        self._check_json()
        self._check_output_dir()
        self._check_host_numbers()
        if self.metric_for_best_model is None and (self.load_best_model_at_end or self.save_strategy == "best"):
            self.metric_for_best_model = "eval_reward"  # the host's default is a loss, which evaluations do not have
        # The host copies it into DeepSpeed's config below, before a trainer knows whether it trains a LoRA.
        if self.deepspeed and self.learning_rate is None:
            raise ValueError("learning_rate is missing, and DeepSpeed's config needs it; pass it, for example 1e-4 for a LoRA.")
        super().__post_init__()
        self._check_choices()
        self._check_numbers()

    def __str__(self) -> str:
        shown = masked({f.name: getattr(self, f.name) for f in fields(self)})
        return "\n".join([f"{type(self).__name__}(", *(f"{name}={value}," for name, value in sorted(shown.items())), ")"])

    __repr__ = __str__

    def to_dict(self) -> dict[str, Any]:
        """As in `TrainingArguments`, with tokens inside dicts masked, too: trackers and `to_json_string` show the result."""
        return masked(super().to_dict())

    def _check_json(self) -> None:
        """Raise ValueError, naming the field, for text that is not valid JSON; the host parses it later."""
        for name in OWN_DICTS:
            if isinstance(value := getattr(self, name), str) and value.startswith("{"):
                try:
                    json.loads(value)
                except ValueError as error:
                    # The message does not show the text: it may contain a token.
                    raise ValueError(f'{name} is not JSON ({error}); pass a dict, or text like {{"name": "value"}}.') from None

    def _check_output_dir(self) -> None:
        if not isinstance(self.output_dir, str | os.PathLike | None):
            raise TypeError(f"output_dir={self.output_dir!r} is of type {type(self.output_dir).__name__}; pass a folder as text.")
        if self.output_dir is not None and not str(self.output_dir).strip():
            raise ValueError(f"output_dir={self.output_dir!r} is empty; pass a folder, such as output_dir='out'.")

    def _check_host_numbers(self) -> None:
        """Numbers of `TrainingArguments` that would fail later, or with an unclear message."""
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is too few; pass at least 1.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed} is not valid for NumPy; pass a number from 0 to {2**32 - 1}.")
        if self.dataloader_num_workers < 0:
            raise ValueError(f"dataloader_num_workers={self.dataloader_num_workers} is below 0; pass 0 for none.")
        if self.learning_rate is not None and not 0 <= self.learning_rate < math.inf:
            raise ValueError(f"learning_rate={self.learning_rate} is not a learning rate; pass a finite number ≥ 0.")
        if self.max_steps <= 0 and not math.isfinite(self.num_train_epochs):
            raise ValueError(f"num_train_epochs={self.num_train_epochs} would never end; pass a finite number, or max_steps.")
        for name in ("logging_steps", "eval_steps", "save_steps"):
            value = getattr(self, name) or 0
            if not math.isfinite(value) or (abs(value) > 1 and value != int(value)):
                raise ValueError(
                    f"{name}={value} is neither a number of updates nor a share of all updates; pass a whole number, or a "
                    f"number below 1."
                )

    def _check_choices(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; pass one of {', '.join(map(repr, allowed))}.")
        for name in ("integrator", "sampling_integrator"):
            if (value := getattr(self, name)) is not None:
                check_integrator(value, name)
        FrameChoice.of(self.decode_frames)
        for name in OWN_DICTS:
            if not isinstance(value := getattr(self, name), dict | None):
                raise TypeError(f"{name} is a {type(value).__name__}; pass a dict of arguments, or JSON on the command line.")

    def _check_numbers(self) -> None:
        if self.num_inference_steps < 2:
            raise ValueError(f"num_inference_steps={self.num_inference_steps} is too few; pass at least 2.")
        if self.num_loss_steps is not None and not 1 <= self.num_loss_steps <= self.num_inference_steps:
            raise ValueError(
                f"num_loss_steps={self.num_loss_steps} does not fit num_inference_steps={self.num_inference_steps}; "
                f"pass 1 to {self.num_inference_steps}."
            )
        if not (math.isfinite(self.guidance_scale) and self.guidance_scale >= 1):
            raise ValueError(f"guidance_scale={self.guidance_scale} is not a finite number ≥ 1; pass 1 for no guidance.")
        if not all(map(math.isfinite, self.reward_weights or [])):
            raise ValueError(f"reward_weights={self.reward_weights} are not all finite; pass numbers, 0 to log a reward only.")
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns=True would remove the columns that rewards need; leave it out.")
        for name in ("num_generations", "num_generations_eval"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} would make no image; pass at least 1.")
        if self.num_iterations < 1:
            raise ValueError(f"num_iterations={self.num_iterations} would not change the weights; pass at least 1.")
        if self.reward_workers < 1:
            raise ValueError(f"reward_workers={self.reward_workers} would call no reward; pass 1 or more.")
        if self.num_images_to_log < 0:
            raise ValueError(f"num_images_to_log={self.num_images_to_log} is below 0; pass 0 for none.")
        self._check_objective()
        self._check_target()
        if self.loss_clip is not None and not self.loss_clip > 0:
            raise ValueError(f"loss_clip={self.loss_clip} would clip every term; pass a positive number, or None.")

    def _check_target(self) -> None:
        """Check `reward_scale` or `target_kl`; with neither, set λ to 1."""
        if self.target_kl is None:
            self.reward_scale = 1.0 if self.reward_scale is None else self.reward_scale
            if not (math.isfinite(self.reward_scale) and self.reward_scale >= 0):
                raise ValueError(
                    f"reward_scale={self.reward_scale} is not a scale; pass a finite number ≥ 0, or negate the reward."
                )
            return
        if self.reward_scale is not None:
            raise ValueError(
                f"target_kl={self.target_kl} and reward_scale={self.reward_scale} both set λ; pass only one of them."
            )
        if not 0 < self.target_kl < math.inf:
            raise ValueError(f"target_kl={self.target_kl} is not a KL to reach; pass a finite number of nats above 0.")
        if not self.objective.tilts:
            raise ValueError(
                f"target_kl needs an objective that converges to the tilted distribution, and loss_type={self.loss_type!r} with "
                f"these options converges to another one; pass reward_scale."
            )
        if self.cfg_mode == "rollout" and self.guidance_scale > 1:
            raise ValueError(
                "cfg_mode='rollout' draws guided paths for an unguided loss, and their KL to the base is not measured; "
                "pass reward_scale instead of target_kl, or cfg_mode='none' or 'full'."
            )

    @property
    def objective(self) -> Objective:
        """The objective that `loss_type` and `loss_kwargs` name."""
        return objective_of(self.loss_type, parsed(self.loss_kwargs))

    @property
    def stages(self) -> int | None:
        """Number of stages in which `loss_type="ram"` trains, each from a frozen copy of the model; `None` without stages."""
        return self.objective.stages if isinstance(self.objective, Ram) else None

    def _check_objective(self) -> None:
        if self.adjoint_pairing is not None:
            raise ValueError(f"adjoint_pairing has moved; pass loss_kwargs={{'pairing': {self.adjoint_pairing!r}}} instead.")
        if self.loss_type in MOVED:
            raise ValueError(f"loss_type={self.loss_type!r} has moved; {MOVED[self.loss_type]}.")
        self._check_black_box()

    def _check_black_box(self) -> None:
        """Settings for rewards without a gradient, which other objectives cannot have, and what "ram" needs."""
        if self.objective.needs_gradient:
            for name, plain in (("images_as", "tensor"), ("reward_workers", 1)):
                if (value := getattr(self, name)) != plain:
                    raise ValueError(
                        f"{name}={value!r} removes the reward's gradient, which loss_type={self.loss_type!r} needs; leave it "
                        f"out, or pass loss_type='ram'."
                    )
        if self.stages is not None and self.max_steps < self.stages:
            raise ValueError(
                f"max_steps={self.max_steps} is fewer than the {self.stages} stages of mode='tilt_matching', which needs to know "
                f"where each ends; pass a max_steps that is a multiple of stages."
            )
        if self.objective.compares_images and self.num_generations < 2:
            raise ValueError(
                f"loss_type={self.loss_type!r} compares the images of one prompt, and num_generations={self.num_generations} "
                f"draws one; pass 2 or more, 8 for example."
            )
        if self.objective.compares_images and self.cfg_mode == "rollout" and self.guidance_scale > 1:
            raise ValueError(
                f"cfg_mode='rollout' draws guided paths for an unguided loss, and loss_type={self.loss_type!r} needs "
                f"the model's own paths; pass cfg_mode='none' or 'full'."
            )


def parsed(kwargs: dict[str, Any] | str | None) -> dict[str, Any] | None:
    """`kwargs` as a dict, for mypy: `TrainingArguments` has already parsed text from the command line."""
    return cast("dict[str, Any] | None", kwargs)


def masked(value: Any) -> Any:
    """`value` with a placeholder for each token in dicts, lists and tuples, at any depth. The host does so at the top level."""
    if isinstance(value, dict):
        secret = {key for key in value if isinstance(key, str) and key.lower().endswith("token") and value[key] is not None}
        return {key: f"<{key.upper()}>" if key in secret else masked(item) for key, item in value.items()}
    return type(value)(map(masked, value)) if type(value) in (list, tuple) else value


def with_learning_rate(args: AdjointMatchingConfig, *, full: bool) -> AdjointMatchingConfig:
    """`args`, or a copy with the default learning rate if it has none; the same `args` may be used for another trainer.

    Args:
        args: the settings.
        full: whether all weights are trained, not a LoRA.
    """
    if args.learning_rate is not None:
        return args
    args = copy.copy(args)
    args.learning_rate = FULL_LEARNING_RATE if full else LORA_LEARNING_RATE
    return args
