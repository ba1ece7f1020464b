"""Colonnade: fixed factorized attention (Child et al. 2019) for PyTorch."""

from colonnade import nn
from colonnade.cache import KVCache
from colonnade.ops import Explanation, attention, attention_varlen, backends, explain
from colonnade.pattern import FixedPattern, FullPattern, LocalPattern, Pattern, StridedPattern

__version__ = "0.1.0"

__all__ = [
    "Explanation",
    "FixedPattern",
    "FullPattern",
    "KVCache",
    "LocalPattern",
    "Pattern",
    "StridedPattern",
    "attention",
    "attention_varlen",
    "backends",
    "explain",
    "nn",
]
