"""Make an objective from `loss_type` and `loss_kwargs`."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from .adjoint_matching import AdjointMatching
from .basic_adjoint_matching import BasicAdjointMatching
from .efficient_adjoint_matching import EfficientAdjointMatching
from .one_step import OneStep
from .ram import Ram
from .targets import Objective

__all__ = ["OBJECTIVES", "objective_of"]

OBJECTIVES: dict[str, type[Objective]] = {
    "adjoint_matching": AdjointMatching,
    "basic_adjoint_matching": BasicAdjointMatching,
    "efficient_adjoint_matching": EfficientAdjointMatching,
    "one_step": OneStep,
    "ram": Ram,
}


def objective_of(loss_type: str, loss_kwargs: dict[str, Any] | None = None) -> Objective:
    """The objective of this name with these options.

    Raises:
        ValueError: for an unknown name, an unknown option, or an invalid value of an option.
    """
    if loss_type not in OBJECTIVES:
        raise ValueError(f"loss_type={loss_type!r} is unknown; pass one of {', '.join(map(repr, OBJECTIVES))}.")
    objective = OBJECTIVES[loss_type]
    known = [field.name for field in fields(objective)]  # type: ignore[arg-type]
    if unknown := (loss_kwargs or {}).keys() - set(known):
        raise ValueError(
            f"loss_kwargs has {min(unknown, key=str)!r}, which loss_type={loss_type!r} does not take; "
            + (f"pass {' or '.join(map(repr, known))}." if known else "leave loss_kwargs out.")
        )
    return objective(**loss_kwargs or {})
