"""The command line `diffusers-adjoint`, and its parts for scripts with a recipe of their own."""

from .commands import (
    Arguments,
    TrainArguments,
    load_prompts,
    lora_config,
    main,
    parse_arguments,
    parse_evaluation_arguments,
)
from .loading import load_rewards

__all__ = ["Arguments", "TrainArguments", "load_prompts", "load_rewards", "lora_config", "main"]
__all__ += ["parse_arguments", "parse_evaluation_arguments"]
