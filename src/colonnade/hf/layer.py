"""A `KVCache` as transformers' cache of one layer."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from colonnade.cache import Entries, KVCache
from colonnade.ops.heads import Patterns, depends_on_head
from colonnade.ops.sink_logits import check_sink_logits, with_sink_logits
from colonnade.shapes import Key, Output, Query, Value


def in_type_of(value: Tensor, tensor: Tensor) -> Tensor:
    """Return queries or keys that a norm in float32 has lifted, in the half precision of `value`.

    Models with norms of queries and keys do that once their norms are kept in float32, as under
    k-bit tuning; flash attention in transformers takes them in the type of the model too.
    """
    lifted = tensor.dtype == torch.float32 and value.dtype in (torch.float16, torch.bfloat16)
    return tensor.to(value.dtype) if lifted else tensor


class FixedLayer(CacheLayerMixin):
    """A `KVCache` as transformers' cache of one layer.

    Attributes:
        kv: The cache behind it.
        given: What the last update returned; None if none came since positions were announced.
        is_compileable: Whether `generate` compiles its steps, where it does that at all.
    """

    is_croppable = True
    is_sliding = False

    def __init__(
        self, pattern: Patterns, max_seq_len: int | None = None, static: bool = False
    ) -> None:
        super().__init__()
        self.kv = KVCache(pattern, max_seq_len, static=static)
        self.given: Entries | None = None
        self.is_compileable = static
        # A tensor, so that a compiled step counts without being compiled again.
        self._seen: int | Tensor = 0
        if static:  # Counted on in whatever mode.
            with torch.inference_mode(False):
                self._seen = torch.zeros((), dtype=torch.long, device="cpu")

    def __repr__(self) -> str:
        return repr(self.kv)

    @property
    def seen(self) -> int:
        """Number of positions so far; as transformers counts, padding is included."""
        return int(self._seen)

    @seen.setter
    def seen(self, number: int) -> None:
        if isinstance(self._seen, Tensor):
            self._seen.fill_(number)
        else:
            self._seen = number

    @property
    def record_past(self) -> bool:
        """Whether every new position stays until it is cropped."""
        return not self.kv.evicting

    @record_past.setter
    def record_past(self, value: bool) -> None:
        if value and self.kv.static:
            raise NotImplementedError(
                "a FixedCache with static=True has no room for positions that may be taken back: "
                "assisted decoding and prompt lookup need FixedCache(config)."
            )
        self.kv.evicting = not value

    def activate_past_recording(self) -> None:
        """Keep every new position until it is cropped, for assisted decoding."""
        self.record_past = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the first update brings the sizes."""

    def update(
        self,
        key_states: Key,
        value_states: Value,
        is_token: Bool[Tensor, "batch length"] | None = None,
    ) -> Entries:
        """Append positions, and return the entries that their queries may read."""
        entries = self.kv.append(in_type_of(value_states, key_states), value_states, is_token)
        if isinstance(self._seen, Tensor):
            if not self.is_initialized:
                with torch.inference_mode(False):
                    self._seen = self._seen.to(key_states.device)
                torch._dynamo.mark_static_address(self._seen)
            self._seen.add_(key_states.shape[2])
        else:
            self._seen += key_states.shape[2]
        self.is_initialized = True
        self.given = entries
        return entries

    def read(
        self,
        query: Query,
        key: Key,
        value: Value,
        scale: float | None,
        dropout: float,
        sink_logits: Float[Tensor, " heads"] | None = None,
    ) -> Output:
        """Attend to what the last update returned, or to what the model made of each entry of it.

        Args:
            query: [batch, heads, q_len, qk_dim].
            key: [batch, kv_heads, kept, qk_dim].
            value: [batch, kv_heads, kept, v_dim].
            scale: Factor on the scores; 1/sqrt(qk_dim) if None.
            dropout: Share of the weights that is dropped.
            sink_logits: See `with_sink_logits`; None: there are none.

        Raises:
            ValueError: There was no update, or entries were added to it.
            NotImplementedError: The model made other heads of it, whose numbers matter.
        """
        given = self.given
        if given is None or key.shape[2] != given[0].shape[2]:
            found = "none" if given is None else f"{given[0].shape[2]} of {key.shape[2]}"
            raise ValueError(
                "keys and values must come from the FixedCache that was given to the model, got "
                f"{found} from it. Gradient checkpointing drops the cache of a model in training, "
                "and some models let layers share their keys: use another cache, or none."
            )
        if depends_on_head(self.kv.pattern) and not (key is given[0] and value is given[1]):
            raise NotImplementedError(
                "a FixedCache must keep the heads that attend where their numbers matter (several "
                f"sub-blocks or patterns), got {self.kv.pattern} and a model that makes "
                f"{key.shape[1]} heads of the {given[0].shape[1]} in its cache. Use a "
                "DynamicCache, or subblocks=1."
            )
        entries: tuple[Key | Entries, Value | None] = key, value
        if self.kv.static:
            if key is given[0] and value is given[1]:
                entries = given, None
            self.given = None  # So that it is no result of a compiled step.
        if sink_logits is None:
            return self.kv.read(query, *entries, scale, dropout)
        check_sink_logits(sink_logits, query.shape[1])
        out, lse = self.kv.read(query, *entries, scale, dropout, return_lse=True)
        return with_sink_logits(out, lse, sink_logits)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return (positions with the next ones, 0), as if everything were kept.

        Of a cache of fixed size, those that there may be: a mask whose size grows would be compiled
        again.
        """
        if self.kv.max_seq_len is not None and self.kv.static:
            return self.kv.max_seq_len, 0
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        """Return the number of positions so far, padding included.

        To a compiler, that of a cache of fixed size is a tensor.
        """
        if torch.compiler.is_compiling() and self.is_initialized:
            return self._seen  # type: ignore[return-value]  # As transformers' static caches do.
        return self.seen

    def get_max_length(self) -> int:
        """Return the `max_seq_len` asked for, or -1."""
        return -1 if self.kv.max_seq_len is None else self.kv.max_seq_len

    def offload(self) -> None:
        """Refuse: there is no offloading.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("a FixedCache is not offloaded: it is small. Use it as it is.")

    prefetch = offload

    def reset(self) -> None:
        """Forget everything."""
        self.kv.reset()
        self.seen = 0
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row b what row beam_idx[b] was."""
        if self.seen:
            self.kv.reorder(beam_idx)
