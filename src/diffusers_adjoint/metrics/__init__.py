"""Numbers to read next to the reward: distance to the tilt, diversity, saturation."""

from .diversity import pairwise_diversity
from .estimate import Estimate, sample_mean
from .images import saturated_share
from .tilt import TiltEstimate, TiltGap, TiltReport, TiltShift, tilt_estimate, tilt_gap, tilt_shift

__all__ = [
    "Estimate",
    "TiltEstimate",
    "TiltGap",
    "TiltReport",
    "TiltShift",
    "pairwise_diversity",
    "sample_mean",
    "saturated_share",
    "tilt_estimate",
    "tilt_gap",
    "tilt_shift",
]
