"""All rows of the family tests, in the order of docs/pipelines.md."""

import tiny_audio
import tiny_conditioned
import tiny_images
import tiny_joint
import tiny_modular
import tiny_network_lora
import tiny_videos
from family import Family

__all__ = ["FAMILIES", "Family"]

FAMILIES: list[Family] = [
    *tiny_images.FAMILIES,
    *tiny_videos.FAMILIES,
    *tiny_joint.FAMILIES,
    *tiny_audio.FAMILIES,
    *tiny_conditioned.FAMILIES,
    *tiny_network_lora.FAMILIES,
    *tiny_modular.FAMILIES,
]
