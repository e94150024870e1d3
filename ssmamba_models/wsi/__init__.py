"""Whole slides: readers, tissue, tiling grids, extraction of features."""
