"""`diffusers-adjoint evaluate`: the base against what was fine-tuned from it, over prompts, steps, samplers and guidance."""

from .arguments import EvaluationArguments
from .report import Report, Row
from .run import evaluate, process_state

__all__ = ["EvaluationArguments", "Report", "Row", "evaluate", "process_state"]
