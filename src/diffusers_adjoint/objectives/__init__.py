"""Objectives, one file each: they compute the target shifts of the step means. They need torch only."""

from .adjoint_matching import AdjointMatching
from .basic_adjoint_matching import BasicAdjointMatching
from .by_name import OBJECTIVES, objective_of
from .efficient_adjoint_matching import EfficientAdjointMatching
from .one_step import OneStep
from .ram import Ram
from .targets import Chain, DiffusionChain, Method, Objective, Scored, Targets

__all__ = ["OBJECTIVES", "AdjointMatching", "BasicAdjointMatching", "EfficientAdjointMatching", "OneStep", "Ram"]
__all__ += ["objective_of", "Chain", "DiffusionChain", "Method", "Objective", "Scored", "Targets"]
