"""The operation and its backends: validate, plan, choose, run."""

from colonnade.ops.attention import Explanation, attention, backends, explain

__all__ = ["Explanation", "attention", "backends", "explain"]
