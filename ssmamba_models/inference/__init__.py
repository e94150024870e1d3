"""A built model on fused operators: as a plan for inference, and in place for training."""

from ssmamba_models.inference.fused_training import fuse_for_training, unfuse
from ssmamba_models.inference.optimize import AutocastModel, OptimizeError, optimize, plan_of

__all__ = ["AutocastModel", "OptimizeError", "fuse_for_training", "optimize", "plan_of", "unfuse"]
