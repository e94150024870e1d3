"""The operators as Triton kernels, for CUDA and ROCm: forward, and backward without atomics.

Importing this package imports no triton; :mod:`~ssmamba_models.ops.triton.backend` does when a call needs it.

- tiles.py: what a program does to the tile that it holds in registers: the recurrence itself, the one scan primitive.
- forward.py, backward.py, carry.py: the scan kernels; directional_scan and selective_scan are both made of these.
- conv1d.py: the kernels of causal_conv1d.
- walk.py: how an operator's tensors are read as sequences, and how those are cut into chunks.
- launch.py, directional.py, selective.py, convolution.py: from tensors to launches.
"""
