"""Names that a user chooses among, of options whose meaning stands in modules that need torch: help lists them too."""

from __future__ import annotations

# What a model computes in. "auto" is bf16 where a GPU computes in it, else fp32.
PRECISIONS = ("auto", "fp32", "bf16")
# What an encoder that only makes features computes in. "int8": an SSMamba on a CPU (see `inference.optimize`).
ENCODER_PRECISIONS = (*PRECISIONS, "int8")
# How many of the last maps a pool takes. "model": what the model's own head gives. The others: see
# `ssmamba_models.engine.feature_pool.pool_features`.
POOLS = {"model": 1, "mean_std": 1, "mean_std_last2": 2, "mean_std_last4": 4}
# Methods of self-supervision, on tiles and on slides.
METHODS = ("mamim", "sgcl")
SLIDE_METHODS = ("gigassl", "pama")
# Name of an aggregator -> (module under ssmamba_models.slide, class).
AGGREGATORS = {
    "mambamil": ("mamba_mil", "MambaMIL"),
    "abmil": ("torchmil_models", "ABMIL"),
    "clam": ("torchmil_models", "CLAM"),
    "dsmil": ("torchmil_models", "DSMIL"),
    "transmil": ("transmil", "TransMIL"),
    "transformer_abmil": ("torchmil_models", "TransformerABMIL"),
    "smabmil": ("torchmil_models", "SmABMIL"),
    "patchgcn": ("torchmil_models", "PatchGCN"),
    "pama": ("pama_aggregator", "PamaAggregator"),
    "mean": ("pooling", "MeanPooling"),
    "max": ("pooling", "MaxPooling"),
}
# Packages for k-means.
KMEANS = ("sklearn", "faiss")
# Extraction: where slides are worked on, and the type of stored features.
ENGINES = ("local", "ray")
FEATURE_DTYPES = ("float32", "float16")
# Format of cut tiles -> suffix of their files.
TILE_SUFFIXES = {"png": ".png", "jpeg": ".jpg"}
# Layouts of feature files.
FEATURE_LAYOUTS = ("ssmamba", "clam", "trident")
# Type of published weights.
WEIGHT_DTYPES = ("float32", "bfloat16")
