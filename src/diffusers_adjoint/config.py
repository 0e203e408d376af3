"""Training arguments of Adjoint Matching: `transformers.TrainingArguments` plus what the method needs."""

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
    "continuous_adjoint": "its gradient is that of 'basic_adjoint_matching', which a trainer takes instead",
    "discrete_adjoint": "train with RewardBackpropagationTrainer(method='discrete_adjoint'), or --method discrete_adjoint",
}
OWN_DICTS = ["pipeline_kwargs", "model_init_kwargs", "loss_kwargs"]  # text of JSON on the command line
LORA_LEARNING_RATE, FULL_LEARNING_RATE = 1e-4, 2e-5  # the second is the paper's (2409.08861)

CHOICES: dict[str, tuple[str, ...]] = {
    "cfg_mode": tuple(GUIDANCE),
    "images_as": IMAGES_AS,
    "loss_step_selection": ("uniform", "paper"),
    "on_nonfinite": ("skip", "raise"),
}


@dataclass(repr=False)  # a generated one would print tokens, which the host masks
class AdjointMatchingConfig(TrainingArguments):
    r"""Configuration of [`AdjointMatchingTrainer`].

    Only the fields of Adjoint Matching, and the defaults that differ from `TrainingArguments`, are listed here.

    > Parameters that control the target distribution p_base(x)·exp(λ r(x))

    Args:
        reward_scale (`float`, *optional*):
            λ, nats per unit of reward; 1 when neither it nor `target_kl` is given. The larger, the further from the base;
            λ·std(r) of 1 to 2 is a moderate tilt.
        target_kl (`float`, *optional*):
            In place of `reward_scale`: how far from the base to go, as the KL of the model's paths to the base's, nats. λ is
            estimated from 256 images of the base, and follows the KL that training measures (the logged `kl` is noisier).
        reward_weights (`list[float]`, *optional*):
            Weight of each reward function in r; all 1 when not given.
        images_as (`str`, defaults to `"tensor"`):
            What the reward functions get: `"tensor"`, or `"pil"`, a list of PIL images (of lists of frames, for videos), with an
            objective that does not differentiate them (`loss_type="ram"`).
        reward_workers (`int`, defaults to 1):
            Threads in which each reward function is called, on a part of the batch each, for slow ones such as the call of a
            server; with such an objective, too.
        guidance_scale (`float`, defaults to 1.0):
            Classifier-free guidance. 1 means none, and then the target is exact whatever `cfg_mode` says.
        cfg_mode (`str`, defaults to `"none"`):
            Where guidance above 1 acts. `"none"`: nowhere in training, only in evaluation (exact for the unguided model).
            `"rollout"`: trajectories only (the official code's choice; the result is *not* the tilt). `"full"`: everywhere
            (exact for the guided model, twice the work, and the adjoint can blow up).

    > Parameters that control the sampler

    Args:
        num_inference_steps (`int`, defaults to 20):
            K, steps of the memoryless sampler in training. Cost is proportional to it.
        integrator (`str`, *optional*):
            Discretisation of the memoryless SDE on whose paths training goes: "ancestral", "posterior", "compensated", "euler"
            (the paper's) or "local_linear". When not given, the one that suits the objective: "ancestral" for score pairing,
            "posterior" for all else. `benchmarks/discretisation.py` compares them.
        sampling_integrator (`str`, defaults to `"posterior"`):
            Discretisation of memoryless paths outside of training: of the start-up comparison, and of the KL of an evaluation.
        pipeline_kwargs (`dict`, *optional*):
            Further arguments of the pipeline's `__call__`, such as `{"height": 512, "width": 512}`. Arguments with one value for
            each image (negative_prompt, image, …) may be dataset columns instead.
        trained_component (`str`, *optional*):
            The network to train in a pipeline with several ("transformer_2" of Wan 2.2, which predicts the later steps), or
            with one of another name than "transformer" and "unet"; the one that diffusers puts LoRA on when not given. The
            steps of the others stay as they are and carry no loss.
        offload_text_encoders (`bool`, defaults to `False`):
            Keep the text encoders on the CPU while the denoiser works; they are moved for the encoding of each batch.
        decode_frames (`str`, defaults to `"all"`):
            Of videos, what is decoded for the rewards in training, chosen by latent frames, each of which is one frame or a few.
            `"all"`; `"first"`, the first latent frame; `"even_2"`, two in even distances, or as many as the number says;
            `"random_2"`, two that are drawn for each update, and then the target is the tilt by the mean reward over the draws:
            the rewards get a shorter video. `"asked"`: the frames that the rewards look at (`per_frame`), in a video that is grey
            elsewhere, with the same values as `"all"`. With all but `"all"` a decoder that works in slices keeps one slice's
            graph, for one forward pass more; no later frame is decoded where it would change nothing.
        num_generations (`int`, defaults to 1):
            Images per prompt. A rollout has `per_device_train_batch_size` × `num_generations` images. `loss_type="ram"` compares
            those of one prompt, and takes 2 or more.
        probe_base (`bool`, defaults to `True`):
            Before the first update draw 16 images or more of up to 8 prompts, by the base's memoryless chain and as many by the
            pipeline's own call. They say how far λ asks the model to move, and whether training starts from what a user sees.

    > Parameters that control the loss

    Args:
        loss_type (`str`, defaults to `"adjoint_matching"`):
            `"adjoint_matching"`, or another objective of `diffusers_adjoint.objectives`, for comparison:
            `"basic_adjoint_matching"` (the full adjoint: two networks a step instead of one), `"efficient_adjoint_matching"` (no
            derivative of the network outside the loss; may diverge) or `"one_step"` (biased). `"ram"` is for
            rewards that have no gradient.
        loss_kwargs (`dict`, *optional*):
            Options of that objective, such as `{"pairing": "next"}` of `"adjoint_matching"`: the fields of its dataclass.
        num_loss_steps (`int`, *optional*):
            S, steps of each trajectory that carry the loss; half of them when not given.
        loss_step_selection (`str`, defaults to `"uniform"`):
            `"uniform"`, or `"paper"`: the last quarter always, the rest at random.
        num_iterations (`int`, defaults to 1):
            Updates of the weights from each rollout, each on S steps of its own, towards shifts that are made once. `max_steps`
            and the learning rate's schedule count rollouts. From the second on the paths are no longer the model's own.
        loss_clip (`float`, *optional*):
            The paper's LCT, on the un-halved squared norm per sample and step; a term above it has no gradient. Off by default.
        adjoint_pairing (`str`, *optional*):
            Moved: an error that says where to.
        on_nonfinite (`str`, defaults to `"skip"`):
            What a NaN or Inf in an image's reward, its gradient, the states, the adjoint or the loss does, or a number whose
            square is none: `"skip"` leaves the image out and counts it, `"raise"` stops. After 20 updates in a row without an
            image, or with a gradient of the weights that is not finite, training stops in any case.

    > Parameters that control evaluation, pictures and interruption

    Args:
        num_generations_eval (`int`, defaults to 2):
            Images per prompt in `evaluate()`; with 2 or more, the diversity of one prompt's images is reported.
        num_images_to_log (`int`, defaults to 8):
            Images in the grids of samples, with rewards and prompts, that are drawn at each log line and evaluation: into
            `output_dir/samples/` and to the trackers of `report_to` (tensorboard, wandb, trackio). They also go to the Hub, with
            the model. 0 draws none.
        save_on_interrupt (`bool`, defaults to `False`):
            On Ctrl-C or SIGTERM finish the update, write a checkpoint, and end; the second signal ends at once. `True` is the
            default of the command `diffusers-adjoint train`.
        dry_run (`bool`, defaults to `False`):
            Make all checks and one update, say what it took, and end. Nothing is evaluated, saved or uploaded, and no tracker is
            started; `save_model()` and `push_to_hub()` do nothing either.

    > Defaults that differ from `TrainingArguments`

    Args:
        logging_steps (`float`, defaults to 10): updates between two lines of the log.
        save_steps (`float`, defaults to 50): updates between two checkpoints; a run has hundreds of them, not thousands.
        learning_rate (`float`, *optional*): 1e-4 for LoRA and 2e-5 (the paper's) for all weights when not given.
        lr_scheduler_type (`str`, defaults to `"constant"`): no warm-up, no decay.
        per_device_train_batch_size (`int`, defaults to 4): prompts per rollout.
        per_device_eval_batch_size (`int`, defaults to 4): prompts sampled together in `evaluate()`.
        metric_for_best_model (`str`, *optional*): "eval_reward", where one is needed.
        remove_unused_columns (`bool`, defaults to `False`): dataset columns reach the reward functions.
        model_init_kwargs (`dict`, *optional*): for `from_pretrained`, and a modular pipeline's `load_components`, when the model
            is given by name.
    """

    _VALID_DICT_FIELDS = TrainingArguments._VALID_DICT_FIELDS + OWN_DICTS

    logging_steps: float = field(default=10, metadata={"help": "Updates between two lines of the log."})
    save_steps: float = field(default=50, metadata={"help": "Updates between two checkpoints."})
    learning_rate: float | None = field(
        default=None, metadata={"help": "Initial learning rate of the optimizer; 1e-4 for LoRA and 2e-5 for all weights."}
    )
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Learning rate schedule."})
    per_device_train_batch_size: int = field(default=4, metadata={"help": "Prompts per rollout and device."})
    per_device_eval_batch_size: int = field(default=4, metadata={"help": "Prompts sampled together in evaluation, per device."})
    remove_unused_columns: bool | None = field(
        default=False, metadata={"help": "Keep False: dataset columns reach the reward functions."}
    )

    metric_for_best_model: str | None = field(default=None, metadata={"help": "Where one is needed; eval_reward when not given."})
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Arguments of from_pretrained (and a modular pipeline's load_components), when the model is a name."},
    )
    reward_scale: float | None = field(
        default=None, metadata={"help": "λ, nats per unit of reward; 1 when neither it nor target_kl is given."}
    )
    target_kl: float | None = field(
        default=None, metadata={"help": "In place of reward_scale: the KL to the base to go to, nats; λ follows it."}
    )
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each reward function; all 1 when not given."}
    )
    images_as: Literal["tensor", "pil"] = field(
        default="tensor",
        metadata={"help": "What the rewards get: 'tensor', or 'pil' for PIL images, where nothing is differentiated."},
    )
    reward_workers: int = field(
        default=1,
        metadata={"help": "Threads in which a slow reward is called on parts of a batch, where nothing is differentiated."},
    )
    guidance_scale: float = field(default=1.0, metadata={"help": "Classifier-free guidance; 1 means none."})
    cfg_mode: Literal["none", "rollout", "full"] = field(
        default="none", metadata={"help": "Where guidance above 1 acts in training: 'none', 'rollout' or 'full'."}
    )
    num_inference_steps: int = field(default=20, metadata={"help": "K, steps of the memoryless sampler."})
    integrator: str | None = field(
        default=None,
        metadata={"help": f"Of the paths of training: {', '.join(INTEGRATORS)}; None for the one that suits the objective."},
    )
    sampling_integrator: str = field(
        default=DEFAULT_INTEGRATOR, metadata={"help": "Of memoryless images outside of training, as integrator."}
    )
    pipeline_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Further arguments of the pipeline's __call__."}
    )
    trained_component: str | None = field(
        default=None, metadata={"help": "The denoiser to train where a pipeline has several; None for its first."}
    )
    offload_text_encoders: bool = field(
        default=False, metadata={"help": "Keep the text encoders on the CPU except while a batch is encoded."}
    )
    decode_frames: str = field(
        default="all",
        metadata={
            "help": "Of videos, the latent frames decoded for the rewards: all, first, asked, random_2, even_2 (any number)."
        },
    )
    num_generations: int = field(default=1, metadata={"help": "Images per prompt."})
    probe_base: bool = field(
        default=True, metadata={"help": "Draw images of the base before the first update, to see where training starts."}
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
        metadata={"help": "The paper's LCT on the un-halved squared norm, per sample and step; None is off."},
    )
    adjoint_pairing: str | None = field(default=None, metadata={"help": argparse.SUPPRESS})  # says where it has moved to
    on_nonfinite: Literal["skip", "raise"] = field(
        default="skip",
        metadata={"help": "Leave images with a non-finite reward, gradient, adjoint or loss out ('skip') or stop ('raise')."},
    )
    num_generations_eval: int = field(
        default=2, metadata={"help": "Images per prompt in evaluation; 2 or more measure their diversity."}
    )
    num_images_to_log: int = field(default=8, metadata={"help": "Images in the grids of samples, and on the Hub; 0 for none."})
    save_on_interrupt: bool = field(
        default=False, metadata={"help": "On Ctrl-C or SIGTERM finish the update, write a checkpoint, and end."}
    )
    dry_run: bool = field(
        default=False, metadata={"help": "Make all checks and one update, say what it took, and end; nothing is written."}
    )

    def __post_init__(self) -> None:
        require_types(self, AdjointMatchingConfig, unchecked=self._VALID_DICT_FIELDS)  # these may be text yet, see below
        self._check_json()
        self._check_output_dir()
        self._check_host_numbers()
        if self.metric_for_best_model is None and (self.load_best_model_at_end or self.save_strategy == "best"):
            self.metric_for_best_model = "eval_reward"  # the host's default is a loss, which evaluation has none of
        # The host fills it into DeepSpeed's config here, before a trainer can know what it trains.
        if self.deepspeed and self.learning_rate is None:
            raise ValueError("learning_rate is missing, which DeepSpeed's config wants at once; pass it, 1e-4 for a LoRA.")
        super().__post_init__()
        self._check_choices()
        self._check_numbers()

    def __str__(self) -> str:
        shown = masked({f.name: getattr(self, f.name) for f in fields(self)})
        return "\n".join([f"{type(self).__name__}(", *(f"{name}={value}," for name, value in sorted(shown.items())), ")"])

    __repr__ = __str__

    def to_dict(self) -> dict[str, Any]:
        """The host's, which trackers and `to_json_string` show, with the tokens inside dicts masked too."""
        return masked(super().to_dict())

    def _check_json(self) -> None:
        """Of the texts that the host is going to parse, in words that tell which one it is."""
        for name in OWN_DICTS:
            if isinstance(value := getattr(self, name), str) and value.startswith("{"):
                try:
                    json.loads(value)
                except ValueError as error:
                    # The text itself is not told: it may hold a token.
                    raise ValueError(f'{name} is no JSON ({error}); pass a dict, or text like {{"name": "value"}}.') from None

    def _check_output_dir(self) -> None:
        if not isinstance(self.output_dir, str | os.PathLike | None):
            raise TypeError(f"output_dir={self.output_dir!r} is of type {type(self.output_dir).__name__}; pass a folder as text.")
        if self.output_dir is not None and not str(self.output_dir).strip():
            raise ValueError(f"output_dir={self.output_dir!r} names no folder; pass one, such as output_dir='out'.")

    def _check_host_numbers(self) -> None:
        """What the host would refuse in words of its own, or fail on in training."""
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is too few; pass at least 1.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed} is none that NumPy takes; pass a number from 0 to {2**32 - 1}.")
        if self.dataloader_num_workers < 0:
            raise ValueError(f"dataloader_num_workers={self.dataloader_num_workers} is below 0; pass 0 for none.")
        if self.learning_rate is not None and not 0 <= self.learning_rate < math.inf:
            raise ValueError(f"learning_rate={self.learning_rate} is no rate; pass a finite number ≥ 0.")
        if self.max_steps <= 0 and not math.isfinite(self.num_train_epochs):
            raise ValueError(f"num_train_epochs={self.num_train_epochs} has no end; pass a finite number, or max_steps.")
        for name in ("logging_steps", "eval_steps", "save_steps"):
            value = getattr(self, name) or 0
            if not math.isfinite(value) or (abs(value) > 1 and value != int(value)):
                raise ValueError(
                    f"{name}={value} is neither a number of updates nor a share of all; pass a whole number, or one below 1."
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
            raise ValueError(f"guidance_scale={self.guidance_scale} is not a number from 1 on; pass 1 for no guidance.")
        if not all(map(math.isfinite, self.reward_weights or [])):
            raise ValueError(f"reward_weights={self.reward_weights} are not all finite; pass numbers, 0 to log a reward only.")
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns=True would take the columns from the rewards; leave it out.")
        for name in ("num_generations", "num_generations_eval"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} makes no image; pass at least 1.")
        if self.num_iterations < 1:
            raise ValueError(f"num_iterations={self.num_iterations} would leave the weights as they are; pass at least 1.")
        if self.reward_workers < 1:
            raise ValueError(f"reward_workers={self.reward_workers} calls no reward; pass 1 for one call a batch, or more.")
        if self.num_images_to_log < 0:
            raise ValueError(f"num_images_to_log={self.num_images_to_log} is no number of images; pass 0 for none, or more.")
        self._check_objective()
        self._check_target()
        if self.loss_clip is not None and not self.loss_clip > 0:
            raise ValueError(f"loss_clip={self.loss_clip} would silence every term; pass a positive number or None.")

    def _check_target(self) -> None:
        """λ, or the KL in its place; with neither λ is 1 from here on."""
        if self.target_kl is None:
            self.reward_scale = 1.0 if self.reward_scale is None else self.reward_scale
            if not (math.isfinite(self.reward_scale) and self.reward_scale >= 0):
                raise ValueError(
                    f"reward_scale={self.reward_scale} is not a scale; pass a finite number ≥ 0 and negate the reward."
                )
            return
        if self.reward_scale is not None:
            raise ValueError(
                f"target_kl={self.target_kl} finds the scale that reward_scale={self.reward_scale} sets; pass one of the two."
            )
        if not 0 < self.target_kl < math.inf:
            raise ValueError(f"target_kl={self.target_kl} is no distance to go; pass a finite number of nats above 0.")
        if not self.objective.tilts:
            raise ValueError(
                f"target_kl is the distance of a tilt, and loss_type={self.loss_type!r} with these options converges to another "
                f"law; pass reward_scale."
            )
        if self.cfg_mode == "rollout" and self.guidance_scale > 1:
            raise ValueError(
                "cfg_mode='rollout' draws paths by guidance that the loss does not have, whose KL to the base is not measured; "
                "pass reward_scale in place of target_kl, or cfg_mode='none' or 'full'."
            )

    @property
    def objective(self) -> Objective:
        """The one that `loss_type` and `loss_kwargs` name."""
        return objective_of(self.loss_type, parsed(self.loss_kwargs))

    @property
    def stages(self) -> int | None:
        """In how many stages `loss_type="ram"` trains, each from a frozen copy of the model; `None` where there are none."""
        return self.objective.stages if isinstance(self.objective, Ram) else None

    def _check_objective(self) -> None:
        if self.adjoint_pairing is not None:
            raise ValueError(f"adjoint_pairing has moved; pass loss_kwargs={{'pairing': {self.adjoint_pairing!r}}} instead.")
        if self.loss_type in MOVED:
            raise ValueError(f"loss_type={self.loss_type!r} has moved; {MOVED[self.loss_type]}.")
        self._check_black_box()

    def _check_black_box(self) -> None:
        """What an objective that does not differentiate the reward needs, and what another one cannot have."""
        if self.objective.needs_gradient:
            for name, plain in (("images_as", "tensor"), ("reward_workers", 1)):
                if (value := getattr(self, name)) != plain:
                    raise ValueError(
                        f"{name}={value!r} takes the reward's gradient away, which loss_type={self.loss_type!r} needs; leave it "
                        f"out, or pass loss_type='ram'."
                    )
        if self.stages is not None and self.max_steps < self.stages:
            raise ValueError(
                f"max_steps={self.max_steps} has fewer updates than the {self.stages} stages of mode='tilt_matching', whose ends "
                f"must be known; pass max_steps, a multiple of stages."
            )
        if self.objective.compares_images and self.num_generations < 2:
            raise ValueError(
                f"loss_type={self.loss_type!r} compares the images of one prompt, and num_generations={self.num_generations} "
                f"draws one; pass 2 or more, 8 for example."
            )
        if self.objective.compares_images and self.cfg_mode == "rollout" and self.guidance_scale > 1:
            raise ValueError(
                f"cfg_mode='rollout' draws paths by guidance that the loss does not have, and loss_type={self.loss_type!r} needs "
                f"the model's own; pass cfg_mode='none', or 'full'."
            )


def parsed(kwargs: dict[str, Any] | str | None) -> dict[str, Any] | None:
    """The same, for mypy: TrainingArguments has parsed the command line's string, and the config checked it."""
    return cast("dict[str, Any] | None", kwargs)


def masked(value: Any) -> Any:
    """The same with a placeholder for each token, by its key as the host does, in dicts, lists and tuples at any depth."""
    if isinstance(value, dict):
        secret = {key for key in value if isinstance(key, str) and key.lower().endswith("token") and value[key] is not None}
        return {key: f"<{key.upper()}>" if key in secret else masked(item) for key, item in value.items()}
    return type(value)(map(masked, value)) if type(value) in (list, tuple) else value


def with_learning_rate(args: AdjointMatchingConfig, *, full: bool) -> AdjointMatchingConfig:
    """`args`, or a copy with the default rate if none was given: they may serve another trainer afterwards.

    Args:
        full: whether all weights are trained, not a LoRA.
    """
    if args.learning_rate is not None:
        return args
    args = copy.copy(args)
    args.learning_rate = FULL_LEARNING_RATE if full else LORA_LEARNING_RATE
    return args
