"""Several updates per rollout: an objective whose paths and adjoints serve more than one update."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from diffusers_adjoint.core.matching import LossSteps, noisy_steps
from diffusers_adjoint.objectives import Objective, Scored, Targets


class Kept:
    """An objective that makes targets for all steps once in `count` updates, and gives each update those of its own steps.

    The lean adjoint belongs to path and base, and not to the weights: what is kept is as right as on the day it was made. Only
    the paths grow old. One batch an update.
    """

    def __init__(self, objective: Objective, count: int) -> None:
        self.objective, self.count = objective, count
        self._uses, self._kept = 0, None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.objective, name)

    def targets(self, chain: Any, steps: LossSteps, score: Callable[[Tensor], Scored]) -> Targets:
        """As `Objective.targets`."""
        if self._uses % self.count == 0:
            noisy = tuple(noisy_steps(self.objective.scales(chain)))
            self._kept = self.objective.targets(chain, LossSteps(noisy, (1.0,) * len(noisy)), score)
        self._uses += 1
        kept = self._kept
        chosen = [kept.steps.indices.index(k) for k in steps.indices]
        parts = {name: getattr(kept, name)[chosen] for name in ("states", "shifts", "base_means", "scales")}
        return replace(kept, steps=steps, **parts)
