"""Options of `diffusers-adjoint evaluate`."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch

from ..field_types import require_types
from ..rewards.black_box import IMAGES_AS
from ..schedulers.integrators import DEFAULT_INTEGRATOR, INTEGRATORS
from ..schedulers.memoryless import check_integrator
from .measure import Setting
from .models import holds_model

__all__ = ["DTYPES", "EvaluationArguments", "init_kwargs"]

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SAMPLERS = ("ode", "sde")
EXAMPLE = '{"height": 512}'
LISTS = ("reward_funcs", "adapter", "num_inference_steps", "sampler", "guidance_scale", "diversity", "reward_weights")


@dataclass
class EvaluationArguments:
    """Options of `evaluate`; each field's help describes it.

    Raises:
        ValueError: for a missing option or an invalid value.
        TypeError: for a value of the wrong type.
    """

    model_name_or_path: str = field(default="", metadata={"help": "Name or folder of the base pipeline."})
    dataset_name: str = field(
        default="", metadata={"help": "File (.txt, .json, .jsonl, .csv, .parquet), folder or Hub dataset with a 'prompt' column."}
    )
    reward_funcs: list[str] = field(
        default_factory=list,
        metadata={"help": "Reward functions: names from diffusers_adjoint.rewards, module:function or path/to/file.py:function."},
    )
    adapter: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Folders or Hub ids of fine-tuned models: LoRAs or whole pipelines. When not given, the model that training "
            "left in output_dir, or only the base if there is none."
        },
    )
    num_inference_steps: list[int] = field(default_factory=lambda: [40], metadata={"help": "Numbers of sampling steps."})
    sampler: list[str] = field(
        default_factory=lambda: ["ode"],
        metadata={"help": "'ode', the pipeline's own scheduler; 'sde', the memoryless one; or both."},
    )
    sampling_integrator: str = field(
        default=DEFAULT_INTEGRATOR,
        metadata={"help": f"Discretisation of the memoryless SDE: {', '.join(INTEGRATORS)}; need not be that of training."},
    )
    guidance_scale: list[float] = field(
        default_factory=lambda: [1.0],
        metadata={"help": "Classifier-free guidance scales, 1 for none; or scales that a distilled network takes as an input."},
    )
    num_generations_eval: int = field(default=10, metadata={"help": "Images for each prompt, model and setting."})
    diversity: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Features in which diversity is measured: 'pixels', CLIPScore, PickScore, HPSv2, DreamSim, LPIPS, "
            "module:function. Default: those of the given rewards, 'pixels' if they have none."
        },
    )
    kl_paths: int = field(
        default=1, metadata={"help": "Memoryless paths for each prompt on which the KL to the base is measured; 0 for none."}
    )
    reward_weights: list[float] | None = field(default=None, metadata={"help": "Weights of the rewards in the tilt report."})
    images_as: Literal["tensor", "pil"] = field(
        default="tensor", metadata={"help": "How rewards get images: 'tensor', or 'pil' for PIL images."}
    )
    reward_workers: int = field(default=1, metadata={"help": "Threads that call a slow reward, each on a part of the batch."})
    reward_scale: float | None = field(
        default=None, metadata={"help": "λ of the training, nats per unit of reward; if given, a tilt report is written."}
    )
    output_dir: str = field(
        default="evaluation",
        metadata={"help": "Folder for tables, contact sheets and finished prompts, shared by all processes."},
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Delete an earlier evaluation in output_dir, and start again."}
    )
    seed: int = field(default=0, metadata={"help": "Seed; the same seed gives the same numbers on any number of processes."})
    batch_size: int = field(default=10, metadata={"help": "Images of a prompt that are sampled together."})
    num_prompts: int | None = field(default=None, metadata={"help": "Number of prompts, from the first on; all when not given."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to evaluate on; a single file is 'train'."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    dataset_streaming: bool = field(default=False, metadata={"help": "Read the dataset's rows only when they are needed."})
    pipeline_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Further arguments of the pipeline's call, as JSON: '{\"height\": 512}'."}
    )
    trained_component: str | None = field(default=None, metadata={"help": "The network that was trained, as in training."})
    dtype: str = field(default="float32", metadata={"help": "Dtype of the pipeline's weights."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the base on the Hub."})
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments of DiffusionPipeline.from_pretrained for the base, as JSON."}
    )
    sheet_prompts: int = field(
        default=4, metadata={"help": "Prompts on each contact sheet, 0 for none; prompts that are finished keep their images."}
    )
    sheet_samples: int = field(default=5, metadata={"help": "Samples of each prompt on the sheets."})

    def __post_init__(self) -> None:
        for name in LISTS:
            if not isinstance(value := getattr(self, name), list | None):  # a YAML file may name a single one
                setattr(self, name, [value])
        for name in ("pipeline_kwargs", "model_init_kwargs"):
            setattr(self, name, _json_object(name, getattr(self, name)))
        require_types(self, EvaluationArguments)
        for name in ("model_name_or_path", "dataset_name", "reward_funcs", "num_inference_steps", "sampler", "guidance_scale"):
            if not getattr(self, name):
                raise ValueError(f"{name} is missing; pass --{name}.")
        if not self.adapter and holds_model(self.output_dir):
            self.adapter = [self.output_dir]
        self._check_numbers()
        self._check_choices()

    def _check_numbers(self) -> None:
        for name, least in {
            "num_generations_eval": 1,
            "batch_size": 1,
            "reward_workers": 1,
            "kl_paths": 0,
            "sheet_prompts": 0,
            "sheet_samples": 1,
        }.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} is too small; pass {least} or more.")
        if wrong := [scale for scale in self.guidance_scale if not 1 <= scale < math.inf]:
            raise ValueError(f"guidance_scale={wrong[0]:g} is not a guidance scale; pass 1 for none, or more.")
        if self.reward_scale is not None and not 0 < self.reward_scale < math.inf:
            raise ValueError(f"reward_scale={self.reward_scale:g} gives no tilt report; pass a finite number above 0.")
        if self.reward_weights is not None and not all(map(math.isfinite, self.reward_weights)):
            raise ValueError(f"reward_weights={self.reward_weights} are not all finite; pass numbers.")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} is below 0; pass 0 or more.")
        if min(self.num_inference_steps) < 1 or (self.num_prompts is not None and self.num_prompts < 1):
            raise ValueError("num_inference_steps and num_prompts must be at least 1; pass larger numbers.")

    def _check_choices(self) -> None:
        if unknown := [name for name in self.sampler if name not in SAMPLERS]:
            raise ValueError(f"sampler={unknown[0]!r} is unknown; pass 'ode', 'sde' or both.")
        check_integrator(self.sampling_integrator, "sampling_integrator")
        if self.images_as not in IMAGES_AS:
            raise ValueError(f"images_as={self.images_as!r} is unknown; pass one of {', '.join(map(repr, IMAGES_AS))}.")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is not one of diffusers; pass one of {', '.join(DTYPES)}.")
        init_kwargs(cast("dict[str, Any] | None", self.model_init_kwargs), self.dtype, self.model_revision)

    @property
    def init_kwargs(self) -> dict[str, Any]:
        """Arguments of `DiffusionPipeline.from_pretrained` for the base."""
        return init_kwargs(cast("dict[str, Any] | None", self.model_init_kwargs), self.dtype, self.model_revision)

    @property
    def settings(self) -> list[Setting]:
        """All combinations of guidance scales, steps and samplers, in the order of the table's rows."""
        every = itertools.product(self.guidance_scale, self.num_inference_steps, self.sampler)
        return list(dict.fromkeys(Setting(k, s, w) for w, k, s in every))


def init_kwargs(kwargs: dict[str, Any] | None, dtype: str, revision: str) -> dict[str, Any]:
    """Arguments of `DiffusionPipeline.from_pretrained`.

    Args:
        kwargs: `model_init_kwargs`.
        dtype: a key of `DTYPES`.
        revision: branch, tag or commit on the Hub.

    Raises:
        ValueError: if `kwargs` contains an argument that has an option of its own.
    """
    kwargs = kwargs or {}
    for name, option in {"dtype": "dtype", "torch_dtype": "dtype", "revision": "model_revision"}.items():
        if name in kwargs:
            raise ValueError(f"model_init_kwargs contains {name!r}; pass {option} instead.")
    return kwargs | {"dtype": DTYPES[dtype], "revision": revision}


def _json_object(name: str, value: Any) -> dict[str, Any] | None:
    """Parse JSON text from the command line; a dict from a YAML file is returned as it is."""
    try:
        parsed = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}={value!r} is not JSON ({error.msg}); pass an object such as {EXAMPLE}.") from None
    if not isinstance(parsed, dict | None):
        raise ValueError(f"{name}={value!r} is a {type(parsed).__name__}; pass an object such as {EXAMPLE}.")
    return parsed
