"""Attention layers; they need torch and nothing else."""

from .attention_stem import AttentionStem
from .local_attention import LocalSelfAttention2d
from .vector_attention import PairwiseAttention2d, PatchwiseAttention2d

__all__ = ["AttentionStem", "LocalSelfAttention2d", "PairwiseAttention2d", "PatchwiseAttention2d"]
