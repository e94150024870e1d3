"""Models over the tile features of a slide."""
