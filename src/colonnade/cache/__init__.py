"""What a decoder keeps of keys and values, and attention over it.

After its block closes, a position that is no summary is never read again. So the open block and
the summaries before it are all that has to be kept, and the result is exact.

    key, value → append (evict, make room, write) → read (dense for one query, the plan for more)
"""

from colonnade.cache.kv_cache import KVCache
from colonnade.cache.store import GROWTH, Entries

__all__ = ["GROWTH", "Entries", "KVCache"]
