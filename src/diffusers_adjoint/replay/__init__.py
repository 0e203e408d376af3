"""Replay: run a pipeline's own code as the differentiable function m(x, t), instead of reimplementing it."""

from .conditioning import Conditioning
from .pipeline import PipelineReplay
from .selfcheck import check_replay

__all__ = ["Conditioning", "PipelineReplay", "check_replay"]
