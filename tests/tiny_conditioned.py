"""Tiny image-conditioned pipelines."""

from __future__ import annotations

from family import Family

__all__ = ["FAMILIES"]

FAMILIES: list[Family] = []
