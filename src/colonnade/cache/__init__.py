"""Keys and values that a decoder keeps, and attention over them.

Once a block is complete, only its summary columns are ever read again. So the open block and the
summaries before it are all that has to be kept, and the result is exact.

    key, value → append (evict, make room, write) → read (dense for one query, the plan for more)
"""

from colonnade.cache.entries import Entries
from colonnade.cache.kv_cache import KVCache
from colonnade.cache.store import GROWTH

__all__ = ["GROWTH", "Entries", "KVCache"]
