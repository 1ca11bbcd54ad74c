"""Attention operators; they need torch and nothing else."""

from . import flops
from .aggregation import aggregate
from .block_attention import block_attention, mixed_values
from .local_attention import available_backends, local_attention
from .stem_attention import (
    has_stem_kernels,
    normalized_stem_attention,
    pooled_stem_attention,
    relative_embedding,
    stem_attention,
)

__all__ = [
    "aggregate",
    "available_backends",
    "block_attention",
    "flops",
    "has_stem_kernels",
    "local_attention",
    "mixed_values",
    "normalized_stem_attention",
    "pooled_stem_attention",
    "relative_embedding",
    "stem_attention",
]
