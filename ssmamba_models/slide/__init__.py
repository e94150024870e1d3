"""Models over the tile features of a slide."""

from ssmamba_models.slide.slide_encoders import create_slide_encoder, list_slide_encoders

__all__ = ["create_slide_encoder", "list_slide_encoders"]
