"""The operation and its backends: validate, plan, choose, run."""

from colonnade.ops.attention import Explanation, attention, attention_varlen, backends, explain

__all__ = ["Explanation", "attention", "attention_varlen", "backends", "explain"]
