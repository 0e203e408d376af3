"""Parse a command line and its `--config` file into the dataclasses that declare the options."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from peft import LoraConfig
from transformers.utils import logging
from trl import ModelConfig, ScriptArguments, get_peft_config

from ..baselines.backpropagation import METHODS
from ..config import AdjointMatchingConfig, parsed
from ..evaluate import EvaluationArguments
from ..evaluate.arguments import DTYPES, init_kwargs
from .errors import PROGRAM
from .options import NOT_FOR_PIPELINES, OptionParser
from .sections import EVALUATION, TEXTS, training_sections

__all__ = ["Arguments", "TrainArguments", "lora_config", "parse_arguments", "parse_evaluation_arguments"]

logger = logging.get_logger(__name__)


@dataclass
class TrainArguments(ScriptArguments):
    """Arguments of `train`: the dataset, as in TRL's scripts, the rewards, and the method."""

    reward_funcs: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Reward functions: names from diffusers_adjoint.rewards (such as PickScore), module:function, or "
            "path/to/file.py:function; a class is instantiated without arguments."
        },
    )

    method: str = field(
        default="adjoint_matching",
        metadata={
            "help": "Training method: adjoint_matching, with the objective of loss_type; or, for comparison, discrete_adjoint, "
            "back-propagation through the sampler."
        },
    )

    def __post_init__(self) -> None:
        if self.method not in ("adjoint_matching", *METHODS):
            raise ValueError(f"method={self.method!r} is unknown; pass adjoint_matching or {' or '.join(METHODS)}.")
        if isinstance(self.reward_funcs, str):  # a YAML file may name a single one
            self.reward_funcs = [self.reward_funcs]


@dataclass(frozen=True)
class Arguments:
    """The options of a command line and its recipe.

    Args:
        script: options of the script itself, of the `script_type` that was asked for.
        config: settings of the trainer.
        model: name, dtype and LoRA of the model.
    """

    script: Any
    config: AdjointMatchingConfig
    model: ModelConfig

    @property
    def resume(self) -> str | bool | None:
        """`--resume_from_checkpoint`: a folder, or `True` for the word "true", which stands for the newest checkpoint."""
        value = self.config.resume_from_checkpoint
        return {"true": True, "false": False}.get(str(value).lower(), value)


def parse_arguments(
    argv: Sequence[str], script_type: type = TrainArguments, prog: str = f"{PROGRAM} train", **defaults: Any
) -> Arguments:
    """Parse options and the `--config` file; an option overrides the file. Bad ones print one line and exit with status 2.

    Args:
        argv: the arguments, without the program's name.
        script_type: dataclass of the script's own options, `trl.ScriptArguments` or a subclass.
        prog: the program's name in help and errors.
        defaults: option → default value, to replace the option's own.
    """
    types = (script_type, AdjointMatchingConfig, ModelConfig)
    parser = OptionParser(types, prog, training_sections(script_type), TEXTS)
    parser.set_defaults(**defaults)
    with parser.one_line_errors():
        (script, config, model), in_file, in_argv = parser.read(argv)
        parser.require_known(in_file, in_argv)
        _check_model(model)
        config.model_init_kwargs = init_kwargs(parsed(config.model_init_kwargs), model.dtype, model.model_revision)
    return Arguments(script, config, model)


def parse_evaluation_arguments(argv: Sequence[str]) -> tuple[EvaluationArguments, list[str]]:
    """Parse the options of `evaluate`, as `parse_arguments` does; the file may be a recipe of `train`.

    Returns:
        The options, and the keys of the file that only `train` has, which are ignored.
    """
    parser = OptionParser((EvaluationArguments,), f"{PROGRAM} evaluate", EVALUATION)
    of_train = {field.name for each in (TrainArguments, AdjointMatchingConfig, ModelConfig) for field in fields(each)}
    with parser.one_line_errors():
        (arguments,), in_file, in_argv = parser.read(argv)
        passed_over = [key for key in in_file if key in of_train - NOT_FOR_PIPELINES]
        parser.require_known({key: value for key, value in in_file.items() if key not in passed_over}, in_argv)
    return arguments, passed_over


def _check_model(model: ModelConfig) -> None:
    usual = ModelConfig()
    if model.model_name_or_path is None:
        raise ValueError("model_name_or_path is missing; pass the name or folder of a diffusers pipeline.")
    if model.dtype not in DTYPES:
        raise ValueError(f"dtype={model.dtype!r} is not one of diffusers; pass one of {', '.join(DTYPES)}.")
    if not model.use_peft and (model.lora_r, model.lora_alpha) != (usual.lora_r, usual.lora_alpha):
        logger.warning("lora_r and lora_alpha have no effect: without use_peft all weights of the network are trained.")


def lora_config(model: ModelConfig) -> LoraConfig | None:
    """The adapter that the `lora_…` options describe; `None`, for full fine-tuning, without `use_peft`."""
    config = get_peft_config(model)
    if config is not None:
        config.task_type = None  # TRL's default is a language model
        if model.lora_dropout == ModelConfig().lora_dropout:
            config.lora_dropout = 0.0  # as the trainer needs it; it warns of a value that the user has chosen
        if isinstance(config.target_modules, str) and re.fullmatch(r"[\w.]+", config.target_modules):
            config.target_modules = {config.target_modules}  # ModelConfig makes a string of one name; PEFT takes it for a regex
    return config
