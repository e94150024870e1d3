"""Fast inference: a built model as a plan of fused operators."""

from ssmamba_models.inference.optimize import OptimizeError, optimize, optimized_or_eager, plan_of

__all__ = ["OptimizeError", "optimize", "optimized_or_eager", "plan_of"]
