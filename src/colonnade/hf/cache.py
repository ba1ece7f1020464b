"""`KVCache` for every layer of a transformers model: what `generate` keeps.

In transformers a mask is made without the cache, and a cache updated without the mask. So
`FixedCache` travels to our mask function in the `kv_offset` that transformers passes on, and learns
there which of the next positions are tokens. An update that was not announced comes from an
attention that takes what is left for everything, and is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from colonnade.cache import Entries, KVCache
from colonnade.hf.settings import NAME, patterns_of
from colonnade.ops.heads import Patterns, depends_on_head
from colonnade.shapes import Key, Output, Query, Value


def in_type_of(value: Tensor, tensor: Tensor) -> Tensor:
    """Return queries or keys that a norm in float32 has lifted, in the half precision of `value`.

    Models with norms of queries and keys do that once their norms are kept in float32, as under
    k-bit tuning; flash attention in transformers takes them in the type of the model too.
    """
    lifted = tensor.dtype == torch.float32 and value.dtype in (torch.float16, torch.bfloat16)
    return tensor.to(value.dtype) if lifted else tensor


class CacheOffset(int):
    """The kv_offset of a `FixedCache`, which it carries along; 0 to everybody else."""

    cache: FixedCache


@dataclass(frozen=True, eq=False)
class Announcement:
    """The positions that come next.

    Attributes:
        seen: Positions before them, padding included.
        length: Number of positions that come.
        is_token: [batch, length], False at padding; None if there is no padding.
        restarts: Whether each row begins another document; None: no row does.
        begun: [batch], where the document of each row begins then; None: at 0.
        padding: [batch, positions], True at tokens of all positions; None: there is no padding.
    """

    seen: int
    length: int
    is_token: Bool[Tensor, "batch length"] | None
    restarts: tuple[bool, ...] | None = None
    begun: Tensor | None = None
    padding: Tensor | None = None


class FixedLayer(CacheLayerMixin):
    """A `KVCache` as transformers' cache of one layer.

    Attributes:
        kv: The cache behind it.
        seen: Number of positions so far; as transformers counts, padding is included.
        given: What the last update returned; None if none came since positions were announced.
    """

    is_croppable = True
    is_sliding = False

    def __init__(self, pattern: Patterns, max_seq_len: int | None = None) -> None:
        super().__init__()
        self.kv = KVCache(pattern, max_seq_len)
        self.seen = 0
        self.given: Entries | None = None

    def __repr__(self) -> str:
        return repr(self.kv)

    @property
    def record_past(self) -> bool:
        """Whether every new position stays until it is cropped."""
        return not self.kv.evicting

    @record_past.setter
    def record_past(self, value: bool) -> None:
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
        self.seen += key_states.shape[2]
        self.is_initialized = True
        self.given = entries
        return entries

    def read(
        self, query: Query, key: Key, value: Value, scale: float | None, dropout: float
    ) -> Output:
        """Attend to what the last update returned, or to what the model made of each entry of it.

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
        return self.kv.read(query, key, value, scale, dropout)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return (positions with the next ones, 0), as if everything were kept."""
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        """Return the number of positions so far, padding included."""
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


class FixedCache(Cache):
    """Keys and values that later positions can still read, for attn_implementation="colonnade".

    With l = stride and c = summary a layer keeps, after n positions, n // l · c + n mod l entries
    for each key head (see `colonnade.KVCache`), and the result is that of a full cache. Layers
    whose pattern is full or strided keep everything. Each row of a left-padded batch keeps what it
    would keep alone.

    Args:
        config: Configuration of the model, which names the pattern of each layer.
        max_seq_len: Allocate for that many positions at once, and refuse more. None: grow.

    Raises:
        ValueError: The configuration has no `colonnade_stride` and `colonnade_summary`.
    """

    layers: list[FixedLayer]  # type: ignore[assignment]  # Of the kinds that transformers names.

    def __init__(self, config: PreTrainedConfig, max_seq_len: int | None = None) -> None:
        config = config.get_text_config(decoder=True)
        layers: list[Any] = [
            FixedLayer(patterns_of(config, index), max_seq_len)
            for index in range(config.num_hidden_layers)
        ]
        super().__init__(layers=layers)
        self._announced: Announcement | None = None
        self._padding: Tensor | None = None
        # Where the document of each row begins, if not at 0.
        self._begun: Tensor | None = None

    @property
    def num_stored(self) -> int:
        """Number of entries that each key head keeps; the most of any layer, batch row and head."""
        return max(layer.kv.num_stored for layer in self.layers)

    @property
    def nbytes(self) -> int:
        """Number of bytes that are allocated, in all layers."""
        return sum(layer.kv.nbytes for layer in self.layers)

    @property
    def has_restarted(self) -> bool:
        """Whether a row has begun another document since it was empty."""
        return self._begun is not None

    @property
    def batch_size(self) -> int:
        """Number of batch rows; -1 before the first update."""
        return len(self.layers[0].kv.seq_lens) or -1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return (positions with the next ones, 0); the 0 carries the cache along."""
        offset = CacheOffset(0)
        offset.cache = self
        return self.layers[layer_idx].seen + query_length, offset

    def announce(
        self,
        length: int,
        attention_mask: Tensor | None,
        restarts: Bool[Tensor, " batch"] | None = None,
    ) -> None:
        """Say which positions are appended next.

        Args:
            length: How many, padding included.
            attention_mask: [batch, positions so far and these], True at tokens; None: all are.
            restarts: [batch], True where a row begins another document, and what it holds is to be
                forgotten first; None: nowhere.

        Raises:
            ValueError: The mask is not that of all positions, or contradicts an earlier one.
        """
        seen = self.get_seq_length()
        if attention_mask is None and self._padding is not None:
            raise ValueError(
                "the cache holds padded rows, so attention_mask must go on saying where the "
                "padding is, got attention_mask=None."
            )
        is_token = None
        if attention_mask is not None:
            self.check_padding(attention_mask, seen, length)
            is_token = attention_mask[:, seen:]
            if self._padding is None and is_token.all():
                attention_mask = is_token = None
        begun = self._begun
        if restarts is not None:
            restarts = restarts.cpu()
            if begun is None:
                begun = torch.zeros(len(restarts), dtype=torch.long, device="cpu")
            begun = torch.where(restarts, seen, begun)
        rows = None if restarts is None else tuple(restarts.tolist())
        self._announced = Announcement(seen, length, is_token, rows, begun, attention_mask)
        for layer in self.layers:
            layer.given = None

    def check_padding(self, attention_mask: Tensor, seen: int, length: int) -> None:
        """Refuse a mask that is not that of all positions, or contradicts an earlier one.

        Raises:
            ValueError: It is such a mask.
        """
        if attention_mask.shape[1] != seen + length:
            raise ValueError(
                "attention_mask must cover every position so far and the new ones, got "
                f"attention_mask.shape={tuple(attention_mask.shape)} for {seen} positions in the "
                f"cache and {length} new ones."
            )
        said = attention_mask[:, :seen].bool().cpu()
        differs = ~said if self._padding is None else said != self._padding[:, :seen].cpu()
        if self._begun is not None:  # What a document left behind may be said in any way.
            differs = differs & (torch.arange(seen, device="cpu") >= self._begun[:, None])
        if seen and differs.any():
            raise ValueError(
                "attention_mask must say of earlier positions what it said when they came: what "
                f"was left out then is not in the cache. Its rows have now "
                f"{self._tokens(attention_mask, seen).tolist()} tokens there, and had "
                f"{self.layers[0].kv.seq_lens}."
            )

    def _tokens(self, padding: Tensor, seen: int) -> Tensor:
        """Return how many of its first `seen` positions each row's document has, on the CPU."""
        tokens = padding[:, :seen].bool().cpu()
        if self._begun is not None:
            tokens = tokens & (torch.arange(seen, device="cpu") >= self._begun[:, None])
        return tokens.sum(1)

    def update(
        self, key_states: Key, value_states: Value, layer_idx: int, *_: Any, **__: Any
    ) -> Entries:
        """Append the announced positions of a layer, and return what their queries may read.

        Raises:
            ValueError: They were not announced by our mask function: another attention is at work.
        """
        layer, announced = self.layers[layer_idx], self._announced
        if (
            announced is None
            or layer.seen != announced.seen
            or key_states.shape[2] != announced.length
        ):
            raise ValueError(
                f"a FixedCache works with attn_implementation={NAME!r} and a 2-D attention_mask, "
                "or none, only: any other attention would take what it keeps for everything. "
                "Use another cache, such as a DynamicCache, or call "
                f"model.set_attn_implementation({NAME!r})."
            )
        if announced.restarts is not None:
            left = zip(layer.kv.seq_lens, announced.restarts, strict=True)
            layer.kv.crop([0 if again else length for length, again in left])
        self._begun, self._padding = announced.begun, announced.padding
        return layer.update(key_states, value_states, announced.is_token)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._announced = self._padding = self._begun = None

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Forget the last -`tokens_to_remove` positions, and then what no later one can read.

        Raises:
            ValueError: A positive number, a document began since, or the shorter sequence would
                read what is gone. Call `activate_past_recording` before the positions that are to
                be cropped.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                "tokens_to_remove must be negative, the number of positions to forget, got "
                f"tokens_to_remove={tokens_to_remove}."
            )
        # Assisted decoding in earlier releases of transformers hands in a tensor.
        seen = max(self.get_seq_length() + int(tokens_to_remove), 0)
        if self._begun is not None and ((self._begun > 0) & (self._begun >= seen)).any():
            raise ValueError(
                "a document began at the new end or behind it, and what was before it is gone, got "
                f"tokens_to_remove={tokens_to_remove}, and documents that begin at "
                f"{self._begun.tolist()} of {self.get_seq_length()} positions."
            )
        for layer in self.layers:
            if layer.seen <= seen:
                continue
            padding = self._padding
            if padding is None:
                padding = torch.ones(len(layer.kv.seq_lens), seen, device="cpu")
            layer.kv.crop(self._tokens(padding, seen).tolist())
            layer.seen = seen
        if self._padding is not None:
            self._padding = self._padding[:, :seen]
        for layer in self.layers:
            layer.kv.evict()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row b what row beam_idx[b] was."""
        for layer in self.layers:
            layer.reorder_cache(beam_idx)
        if self._padding is not None:
            self._padding = self._padding[beam_idx.to(self._padding.device)]
        if self._begun is not None:
            self._begun = self._begun[beam_idx.cpu()]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times, one after the other."""
        rows = torch.arange(max(self.batch_size, 0), device="cpu")
        self.batch_select_indices(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows, in their order, by number or by a mask."""
        if indices.dtype == torch.bool:
            indices = indices.nonzero()[:, 0]
        for layer in self.layers:
            if layer.seen:
                layer.kv.select(indices)
        if self._padding is not None:
            self._padding = self._padding[indices.to(self._padding.device)]
        if self._begun is not None:
            self._begun = self._begun[indices.cpu()]
