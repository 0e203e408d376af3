"""Samples as 8-bit images: grids, files, trackers."""
