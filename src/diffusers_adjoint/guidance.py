"""Where classifier-free guidance acts in training: the meaning of `cfg_mode`."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["GUIDANCE", "Guidance"]


@dataclass(frozen=True)
class Guidance:
    """What is guided in training when `guidance_scale` is above 1.

    The loss is never guided without the rollouts. So `rollout` tells whether anything is guided, and `not loss` whether anything
    is unguided.

    Args:
        rollout: whether the rollouts are guided.
        loss: whether the step means in the loss are guided.
    """

    rollout: bool
    loss: bool

    @property
    def biased(self) -> bool:
        """Whether the paths are guided and the loss is not, so that the tilted distribution is not the optimum."""
        return self.rollout and not self.loss


GUIDANCE = {
    "none": Guidance(rollout=False, loss=False),
    "rollout": Guidance(rollout=True, loss=False),
    "full": Guidance(rollout=True, loss=True),
}
