"""Shapes of the tensors that cross module boundaries, and the words that the code uses.

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
| `rows`     | rows of a plan's table                                   |              |

Sizes of a pattern: `stride` (the paper's l) and `summary` (its c). All positions are 0-based.

| word       | meaning                                                                        |
|------------|--------------------------------------------------------------------------------|
| block      | positions b·l … (b+1)·l - 1; it is closed once it is complete, open before     |
| summary    | a column of every block that all later positions read                          |
| sub-block  | the g-th group of c columns from the end of a block; key heads take turns      |
| sink       | one of the first k positions of a sequence, which all later positions read     |
| slot       | a gathered sink or summary: a key and a value                                  |
| own key    | a key of the block that a query lies in                                        |
| row        | a row of a plan's table: queries of one block, and the keys that they read     |
| batch row  | one sequence of a batch                                                        |
| document   | one of several sequences that are packed together, one after the other         |
| entry      | a key and a value that a cache keeps                                           |
| tail       | the positions that a cache keeps one by one, behind its slots                  |
| chunk      | consecutive new positions that a cache is given                                |
| head group | key heads that read one pattern                                                |
| window     | the last positions that a query reads (in `train`: a stretch of bytes)         |
| tile       | rows that a kernel works on at once                                            |
| piece      | at most 128 queries of a row, which one thread takes (C++)                     |
| granule    | 64 keys that are packed together for the products (C++)                        |
| run        | one training from its first step to its last                                   |

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
