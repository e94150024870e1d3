"""Building blocks that architectures share."""

from ssmamba_models.layers.dms import DMS, DirectionalSSM, pool_hold
from ssmamba_models.layers.lpr import LPR
from ssmamba_models.layers.mamba import Mamba

__all__ = ["DMS", "LPR", "DirectionalSSM", "Mamba", "pool_hold"]
