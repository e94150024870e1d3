"""What benchmarks measure where nothing else is asked for, and what can be asked for; help lists it without torch."""

from __future__ import annotations

DEFAULT_MODEL = "ssmamba_small"
DEFAULT_PEERS = ("vit_small_patch16_224", "mambaout_tiny", "convnext_tiny")
DEFAULT_SIZES = (224, 512, 1024)
# Trained as a masked autoencoder.
DEFAULT_PEER = "vit_small_patch16_224"
# Names of types: of models, and of single operators.
DTYPES = ("float32", "bfloat16")
DTYPE_CHOICES = (*DTYPES, "both")
OP_DTYPES = ("float32", "bfloat16", "float16")
ALLOCATORS = ("system", "kept", "both")
# What `benchmark train` measures.
METHODS = ("supervised", "mamim", "both")
LAYOUTS = ("auto", "contiguous", "channels_last")
OPS = ("directional_scan", "selective_scan", "causal_conv1d")
# The first line of the page of all benchmarks, by which a report of something else is known.
TITLE = "# Benchmarks"
