"""A built model on fused operators: as a plan for inference, and in place for training."""

from ssmamba_models.inference.fused_training import fuse_for_training, unfuse
from ssmamba_models.inference.optimize import optimize, optimized_or_eager, plan_of
from ssmamba_models.inference.represent import OptimizeError

__all__ = ["OptimizeError", "fuse_for_training", "optimize", "optimized_or_eager", "plan_of", "unfuse"]
