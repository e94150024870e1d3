"""Building blocks that architectures share."""

from ssmamba_models.layers.dms import DMS, DirectionalSSM, pool_hold
from ssmamba_models.layers.lpr import LPR

__all__ = ["DMS", "LPR", "DirectionalSSM", "pool_hold"]
