"""Reward functions: `f(images=, prompts=, **columns) -> Tensor (B,)`, differentiable in the images (B, 3, H, W) in [0, 1]."""

from .aesthetic import AestheticScore
from .around import clamped, gradient_clipped, normalised, per_frame, smoothed, weighted_sum
from .classifier import ClassLogProbability
from .clipscore import CLIPScore
from .combine import RewardGradient, WeightedReward, reward_gradient
from .hpsv2 import HPSv2
from .image_statistics import brightness, colourfulness, compressibility, contrast, saturation, sharpness
from .imagereward import ImageReward
from .pickscore import PickScore
from .preprocess import differentiable_preprocess
from .prompt_contrast import PromptContrast
from .video_motion import MotionFloor, motion

__all__ = [
    "AestheticScore",
    "CLIPScore",
    "ClassLogProbability",
    "HPSv2",
    "ImageReward",
    "MotionFloor",
    "PickScore",
    "PromptContrast",
    "RewardGradient",
    "WeightedReward",
    "brightness",
    "clamped",
    "colourfulness",
    "compressibility",
    "contrast",
    "differentiable_preprocess",
    "gradient_clipped",
    "motion",
    "normalised",
    "per_frame",
    "reward_gradient",
    "saturation",
    "sharpness",
    "smoothed",
    "weighted_sum",
]
