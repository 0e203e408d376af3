"""TRL's former DDPOTrainer and AlignPropTrainer, on Adjoint Matching; see docs/migrating_from_ddpo.md."""

from .config import AlignPropConfig, DDPOConfig, config_from_ddpo
from .holder import DefaultDDPOStableDiffusionPipeline
from .scorer import aesthetic_scorer
from .trainer import AlignPropTrainer, DDPOTrainer

__all__ = ["AlignPropConfig", "AlignPropTrainer", "DDPOConfig", "DDPOTrainer", "DefaultDDPOStableDiffusionPipeline"]
__all__ += ["aesthetic_scorer", "config_from_ddpo"]
