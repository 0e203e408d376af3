"""Rewards: plain callables `f(images=, prompts=, **columns) -> Tensor (B,)`, differentiable in the images."""

from .combine import RewardGradient, WeightedReward, reward_gradient
from .pickscore import PickScore
from .preprocess import differentiable_preprocess

__all__ = ["PickScore", "RewardGradient", "WeightedReward", "differentiable_preprocess", "reward_gradient"]
