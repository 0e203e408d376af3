"""Rewards: plain callables `f(images=, prompts=, **columns) -> Tensor (B,)`, differentiable in the images."""

from .combine import RewardGradient, WeightedReward, reward_gradient

__all__ = ["RewardGradient", "WeightedReward", "reward_gradient"]
