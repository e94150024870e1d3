"""Tile-level self-supervision: modules that turn views of tiles into losses."""
