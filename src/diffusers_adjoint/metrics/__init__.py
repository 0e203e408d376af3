"""Measurements besides the reward: distance to the tilted distribution, diversity, image statistics."""

from .diversity import pairwise_diversity, vendi_score
from .estimate import Estimate, prompt_difference, prompt_mean, sample_mean
from .features import LPIPS, DreamSim
from .images import image_statistics, saturated_share
from .panel import StatisticChange, StatisticsPanel, statistics_panel
from .scores import mean_score
from .table import markdown_table
from .tilt import TiltEstimate, TiltGap, TiltReport, TiltShift, tilt_estimate, tilt_gap, tilt_shift

__all__ = [
    "LPIPS",
    "DreamSim",
    "Estimate",
    "StatisticChange",
    "StatisticsPanel",
    "TiltEstimate",
    "TiltGap",
    "TiltReport",
    "TiltShift",
    "image_statistics",
    "markdown_table",
    "mean_score",
    "pairwise_diversity",
    "prompt_difference",
    "prompt_mean",
    "sample_mean",
    "saturated_share",
    "statistics_panel",
    "tilt_estimate",
    "tilt_gap",
    "tilt_shift",
    "vendi_score",
]
