"""Colonnade: fixed factorized attention (Child et al. 2019) for PyTorch."""

from colonnade import nn
from colonnade.ops import Explanation, attention, backends, explain
from colonnade.pattern import FixedPattern, FullPattern, Pattern

__version__ = "0.1.0"

__all__ = [
    "Explanation",
    "FixedPattern",
    "FullPattern",
    "Pattern",
    "attention",
    "backends",
    "explain",
    "nn",
]
