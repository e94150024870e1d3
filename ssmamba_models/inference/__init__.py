"""Fast inference: a built model as a plan of fused operators."""

from ssmamba_models.inference.optimize import AutocastModel, OptimizeError, optimize, plan_of

__all__ = ["AutocastModel", "OptimizeError", "optimize", "plan_of"]
