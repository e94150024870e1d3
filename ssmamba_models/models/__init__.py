"""Image encoders, one file per architecture. Importing this package registers them with timm."""

from ssmamba_models.models.ssmamba import DMS, LPR, DirectionalSSM, SSMamba, pool_hold

__all__ = ["DMS", "LPR", "DirectionalSSM", "SSMamba", "pool_hold"]
