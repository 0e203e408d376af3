"""Replay: a pipeline's own code as a differentiable function m(x, t), without reimplementing any of it."""

from .conditioning import Conditioning
from .pipeline import PipelineReplay
from .selfcheck import check_replay

__all__ = ["Conditioning", "PipelineReplay", "check_replay"]
