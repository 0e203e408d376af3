"""The pipeline's own code as a differentiable function m(x, t): no line of it is written again here."""

from .conditioning import Conditioning
from .pipeline import PipelineReplay
from .selfcheck import check_replay

__all__ = ["Conditioning", "PipelineReplay", "check_replay"]
