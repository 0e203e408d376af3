"""Samples as pictures: grids, files, trackers."""
