"""The scans: what is computed (:mod:`~ssmamba_models.ops.reference`), and how fast (one module per backend).

Three operators, each with one public function that picks a backend: :func:`directional_scan` for images,
:func:`selective_scan` and :func:`causal_conv1d` for sequences. :func:`backends` tells what is available and used;
the environment variable SSMAMBA_BACKEND forces one. Forward-mode derivatives, torch.func's transforms and gradients of
a gradient are computed by formulas in torch's operators, whatever the backend.
"""

from ssmamba_models.ops.conv1d import causal_conv1d
from ssmamba_models.ops.directional import directional_scan
from ssmamba_models.ops.dispatch import backends
from ssmamba_models.ops.selective import selective_scan

__all__ = ["backends", "causal_conv1d", "directional_scan", "selective_scan"]
