"""All rows of the family tests, in the order of docs/pipelines.md."""

from family import Family
from tiny_pipelines import sd3, sd15

__all__ = ["FAMILIES"]

FAMILIES: list[Family] = [
    Family("SD 1.5", sd15, "ε", columns={"prompt": ["a cat", "two dogs"], "negative_prompt": ["x", "y"]}, fast=True),
    Family("SD3", sd3, "flow", kwargs={"max_sequence_length": 8}, fast=True),
]
