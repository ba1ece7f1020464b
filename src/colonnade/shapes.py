"""Shapes of the tensors that cross module boundaries, and the notation that they are written in.

| axis       | meaning                                                  | in the paper |
|------------|----------------------------------------------------------|--------------|
| `batch`    | independent sequences                                    |              |
| `heads`    | query heads                                              |              |
| `kv_heads` | key/value heads; `heads` is a multiple of it             |              |
| `q_len`    | queries; the last `q_len` positions of the sequence      |              |
| `kv_len`   | keys and values: the length of the sequence              | n            |
| `total`    | tokens of all documents that are packed together         |              |
| `qk_dim`   | width of a query and of a key, per head                  | d            |
| `v_dim`    | width of a value and of an output, per head              |              |
| `slots`    | gathered summary columns                                 | c·n/l        |
| `kept`     | entries of a cache: slots, then a tail of positions      |              |
| `rows`     | rows of a plan: a run of queries inside one block        |              |

Sizes of a pattern: `stride` (the paper's l) and `summary` (its c). All positions are 0-based.

The aliases are checked at run time in the test suite only; elsewhere they cost nothing.
"""

from __future__ import annotations

from typing import TypeAlias

from jaxtyping import Bool, Float, Int
from torch import Tensor

Query: TypeAlias = Float[Tensor, "batch heads q_len qk_dim"]
Key: TypeAlias = Float[Tensor, "batch kv_heads kv_len qk_dim"]
Value: TypeAlias = Float[Tensor, "batch kv_heads kv_len v_dim"]
Output: TypeAlias = Float[Tensor, "batch heads q_len v_dim"]
LogSumExp: TypeAlias = Float[Tensor, "batch heads q_len"]

PackedQuery: TypeAlias = Float[Tensor, "total heads qk_dim"]
PackedKey: TypeAlias = Float[Tensor, "total kv_heads qk_dim"]
PackedValue: TypeAlias = Float[Tensor, "total kv_heads v_dim"]
PackedOutput: TypeAlias = Float[Tensor, "total heads v_dim"]
PackedLogSumExp: TypeAlias = Float[Tensor, "heads total"]
CuSeqlens: TypeAlias = Int[Tensor, " documents_and_1"]

Mask: TypeAlias = Bool[Tensor, "heads q_len kv_len"]
KeptMask: TypeAlias = Bool[Tensor, "batch kv_heads kept"]
SeenMask: TypeAlias = Bool[Tensor, "#batch kv_heads #q_len kv_len"]
Positions: TypeAlias = Int[Tensor, "..."]

Gather: TypeAlias = Int[Tensor, "kv_heads slots"]
Table: TypeAlias = Int[Tensor, "rows 7"]
Shift: TypeAlias = Int[Tensor, " kv_heads"]

Hidden: TypeAlias = Float[Tensor, "batch seq_len embed_dim"]
Rotary: TypeAlias = tuple[
    Float[Tensor, "#batch seq_len head_dim"], Float[Tensor, "#batch seq_len head_dim"]
]

__all__ = [
    "CuSeqlens",
    "Gather",
    "Hidden",
    "KeptMask",
    "Key",
    "LogSumExp",
    "Mask",
    "Output",
    "PackedKey",
    "PackedLogSumExp",
    "PackedOutput",
    "PackedQuery",
    "PackedValue",
    "Positions",
    "Query",
    "Rotary",
    "SeenMask",
    "Shift",
    "Table",
    "Value",
]
