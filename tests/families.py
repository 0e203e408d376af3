"""All rows of the family tests, in the order of docs/pipelines.md."""

import tiny_images
from family import Family

__all__ = ["FAMILIES", "Family"]

FAMILIES: list[Family] = [*tiny_images.FAMILIES]
