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
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from colonnade.backends.tracing.uncompiled import caller_without_compiler
from colonnade.cache import Entries
from colonnade.hf.layer import FixedLayer
from colonnade.hf.settings import NAME, patterns_of
from colonnade.pattern import check_flag
from colonnade.shapes import Key, Value


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


_COMPILED = -1
"""Stands for the number of positions before a compiled step, which nobody may look at."""
_MASK_IS_MISSING = (
    "the cache holds padded rows, so attention_mask must go on saying where the padding is, got "
    "attention_mask=None."
)
_COMPILED_PADDING = (
    "attention_mask must cover every position so far and the new one, say of earlier positions "
    "what it said when they came, and be 1 at the new one: a compiled step brings each row a "
    "token. Call the model uncompiled where a row has none."
)


class FixedCache(Cache):
    """Keys and values that later positions can still read, for attn_implementation="colonnade".

    With l = stride and c = summary a layer keeps, after n positions, n // l · c + n mod l entries
    for each key head (see `colonnade.KVCache`), and the result is that of a full cache. Layers
    whose pattern is full or strided keep everything, and those with a window keep it. Each row of
    a left-padded batch keeps what it would keep alone.

    Args:
        config: Configuration of the model, which names the pattern of each layer.
        max_seq_len: Allocate for that many positions at once, and refuse more. None: grow.
        static: Keep everything in buffers whose size and place never change, so that a compiler
            takes a step of one token whole, without compiling it again; `generate` compiles it by
            itself where it does so for static caches. It needs `max_seq_len`, which counts tokens
            and not padding; batch size and type are those of the prompt.

    Raises:
        TypeError: `max_seq_len` is no int, or `static` no bool.
        ValueError: The configuration lacks our settings, or `static` comes without `max_seq_len`.
    """

    layers: list[FixedLayer]  # type: ignore[assignment]  # Of the kinds that transformers names.

    def __init__(
        self, config: PreTrainedConfig, max_seq_len: int | None = None, *, static: bool = False
    ) -> None:
        check_flag("static", static)
        config = config.get_text_config(decoder=True)
        layers: list[Any] = [
            FixedLayer(patterns_of(config, index), max_seq_len, static)
            for index in range(config.num_hidden_layers)
        ]
        super().__init__(layers=layers)
        self.static = static
        self._uncompiled = caller_without_compiler() if static else None
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
        """Return those of a layer; the offset 0 carries the cache along.

        A compiler makes no such number; there the mask function finds the cache in the call.
        """
        length, _ = self.layers[layer_idx].get_mask_sizes(query_length)
        if self.static and torch.compiler.is_compiling():
            return length, 0
        offset = CacheOffset(0)
        offset.cache = self
        return length, offset

    def announce(
        self,
        length: int,
        attention_mask: Tensor | None,
        restarts: Bool[Tensor, " batch"] | None = None,
    ) -> Bool[Tensor, "batch length"] | None:
        """Say which positions are appended next; return which of them are tokens, or None: all are.

        Args:
            length: How many, padding included.
            attention_mask: [batch, positions so far and these], True at tokens; None: all are.
            restarts: [batch], True where a row begins another document, and what it holds is to be
                forgotten first; None: nowhere.

        Raises:
            ValueError: The mask is not that of all positions, or contradicts an earlier one.
        """
        if self.static and torch.compiler.is_compiling():
            return self._announce_compiled(length, attention_mask, restarts)
        seen = self.get_seq_length()
        if attention_mask is None and self._padding is not None:
            raise ValueError(_MASK_IS_MISSING)
        is_token = None
        if attention_mask is not None:
            self.check_padding(attention_mask, seen, length)
            is_token = attention_mask[:, seen:]
            if (self._padding is None or self.static) and is_token.all():
                is_token = None
                if self._padding is None:
                    attention_mask = None
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
        return is_token

    def _announce_compiled(
        self,
        length: int,
        attention_mask: Tensor | None,
        restarts: Bool[Tensor, " batch"] | None,
    ) -> Bool[Tensor, "batch length"] | None:
        """Say which position comes next in a step whose numbers nobody may look at.

        Every batch row then has a token, and goes on with what it holds.
        """
        if self._takes_chunk(length):
            assert self._uncompiled is not None, "only a static cache is asked"
            new: Tensor | None = self._uncompiled(self.announce, length, attention_mask, restarts)
            return new
        if attention_mask is None and self._padding is not None:
            raise ValueError(_MASK_IS_MISSING)
        if attention_mask is not None:
            whole = self.tokens_so_far(attention_mask.shape[1])
            if whole is None:
                whole = torch.ones_like(attention_mask, dtype=torch.bool)
            torch._assert_async((attention_mask == whole).all(), _COMPILED_PADDING)
            covers = self.layers[0].get_seq_length() + length == attention_mask.shape[1]
            torch._assert_async(torch.as_tensor(covers), _COMPILED_PADDING)
        self.announce_checked(length, None)
        return None

    def announce_checked(self, length: int, is_token: Tensor | None) -> None:
        """Say which position comes next in a compiled step, of a mask that was looked at before.

        Args:
            length: How many positions.
            is_token: [batch, length], False at padding; None: there is none.
        """
        if is_token is not None:
            torch._assert_async(is_token.all(), _COMPILED_PADDING)
        self._announced = Announcement(_COMPILED, length, None)

    def _takes_chunk(self, length: int) -> bool:
        """Whether new positions are more than a step: one position behind others."""
        return length != 1 or not self.layers[0].is_initialized

    def tokens_so_far(self, seen: int) -> Tensor | None:
        """Return which of the first `seen` positions are tokens; None: all are."""
        if self._padding is None:
            return None
        # Compiled steps bring nothing but tokens, and do not write it down.
        return F.pad(self._padding, (0, seen - self._padding.shape[1]), value=True)

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
        known = self.tokens_so_far(seen)
        differs = ~said if known is None else said != known.cpu()
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
        is_step = torch.compiler.is_compiling() and self.static
        if is_step and self._takes_chunk(key_states.shape[2]):
            assert self._uncompiled is not None, "it is static"
            entries: Entries = self._uncompiled(self.update, key_states, value_states, layer_idx)
            return entries
        seen = _COMPILED if is_step else layer.seen
        if announced is None or seen != announced.seen or key_states.shape[2] != announced.length:
            raise ValueError(
                f"a FixedCache works with attn_implementation={NAME!r} and a 2-D attention_mask, "
                "or none, only: any other attention would take what it keeps for everything. "
                "Use another cache, such as a DynamicCache, or call "
                f"model.set_attn_implementation({NAME!r})."
            )
        if is_step:
            if layer_idx == len(self.layers) - 1:
                self._announced = None
            return layer.update(key_states, value_states)
        if announced.restarts is not None:
            left = zip(layer.kv.seq_lens, announced.restarts, strict=True)
            layer.kv.crop([0 if again else length for length, again in left])
        self._begun, self._padding = announced.begun, announced.padding
        return layer.update(key_states, value_states, announced.is_token)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what a process has to make for itself."""
        return {name: each for name, each in self.__dict__.items() if name != "_uncompiled"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a cache that was copied, or pickled."""
        self.__dict__.update(state)
        self._uncompiled = caller_without_compiler() if self.is_compileable else None

    def reset(self) -> None:
        """Forget every position; with static=True the buffers, and so all sizes, stay."""
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
            padding = self.tokens_so_far(seen)
            if padding is None:
                padding = torch.ones(len(layer.kv.seq_lens), seen, device="cpu")
            layer.kv.crop(self._tokens(padding, seen).tolist())
            layer.seen = seen
        self._padding = self.tokens_so_far(seen)
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
