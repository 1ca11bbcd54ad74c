"""Attention operators; they need torch and nothing else."""

from . import flops
from .aggregation import aggregate
from .block_attention import block_attention, mixed_values
from .blocks import relative_embedding
from .local_attention import available_backends, local_attention
from .stem_attention import (
    has_stem_kernels,
    normalized_stem_attention,
    pooled_stem_attention,
    stem_attention,
)
from .vector_aggregation import vector_aggregation, window_product
from .weights import attention_weights, block_attention_weights

__all__ = [
    "aggregate",
    "attention_weights",
    "available_backends",
    "block_attention",
    "block_attention_weights",
    "flops",
    "has_stem_kernels",
    "local_attention",
    "mixed_values",
    "normalized_stem_attention",
    "pooled_stem_attention",
    "relative_embedding",
    "stem_attention",
    "vector_aggregation",
    "window_product",
]
