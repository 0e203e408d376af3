"""Where classifier-free guidance acts in training: `cfg_mode`, looked up once."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["GUIDANCE", "Guidance"]


@dataclass(frozen=True)
class Guidance:
    """What is guided where `guidance_scale` is above 1.

    Args:
        rollout: the paths that training draws.
        loss: the step means that the loss compares.

    The loss is never guided alone. So `rollout` says whether anything is guided, and `not loss` whether anything is not.
    """

    rollout: bool
    loss: bool

    @property
    def biased(self) -> bool:
        """Whether the paths are not those of the model that the loss trains, so that no tilted law is its optimum."""
        return self.rollout and not self.loss


GUIDANCE = {
    "none": Guidance(rollout=False, loss=False),
    "rollout": Guidance(rollout=True, loss=False),
    "full": Guidance(rollout=True, loss=True),
}
