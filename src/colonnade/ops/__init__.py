"""The operations that users call: inputs are checked here, and backends run them."""

from colonnade.backends.choice import Explanation, backends
from colonnade.ops.attention import attention, attention_varlen, explain

__all__ = ["Explanation", "attention", "attention_varlen", "backends", "explain"]
