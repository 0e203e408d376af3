"""`diffusers-adjoint evaluate`: compare fine-tuned models with their base over prompts, steps, samplers and guidance scales."""

from .arguments import EvaluationArguments
from .report import Report, Row
from .run import evaluate, process_state

__all__ = ["EvaluationArguments", "Report", "Row", "evaluate", "process_state"]
