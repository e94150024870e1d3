"""Image encoders, one file per architecture. Importing this package registers them with timm."""

from ssmamba_models.models.ssmamba import SSMamba

__all__ = ["SSMamba"]
