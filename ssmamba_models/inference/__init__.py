"""Fast inference: a built model as a plan of fused operators."""

from ssmamba_models.inference.optimize import OptimizeError, optimize

__all__ = ["OptimizeError", "optimize"]
