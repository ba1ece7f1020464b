"""Documents behind what a cache holds: rows that go on, and rows that begin another one.

What the masks of transformers' own caches cannot say is written on these caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers.cache_utils import Cache

from colonnade.hf.batch import Batch, require
from colonnade.hf.cache import FixedCache


def behind_cache(
    cache: Any, seen: int | Tensor, positions: Tensor, padding: Tensor | None, of_images: bool
) -> Batch:
    """Say which rows begin a document behind what is in the cache."""
    hidden = hidden_in(cache, seen)
    first, comes = positions[:, 0], None
    if padding is not None:
        so_far = padding.shape[1] - positions.shape[1]
        new = padding[:, so_far:]
        first = positions.gather(1, new.long().argmax(1, keepdim=True))[:, 0]
        comes = new.any(1)
    if torch.compiler.is_compiling():  # It cannot tell one from the other.
        before = seen if padding is None else padding[:, :so_far].sum(1)
        if isinstance(cache, FixedCache) and cache.static:
            before = cache.layers[0].kv.lengths
        goes_on = first >= (1 if of_images else before)
        goes_on = goes_on if comes is None else goes_on | ~comes
        require(goes_on.all(), _GOES_ON_COMPILED, lambda: "other positions")
        return Batch()
    held = _held(cache, int(seen), hidden, padding, positions)
    present = [True] * len(first) if comes is None else comes.tolist()
    rows = list(zip(first.tolist(), held, present, strict=True))
    last = _last_in(cache, int(seen))

    def goes_on_at(start: int, count: int) -> bool:
        if of_images:  # An image has more tokens than times. It comes behind a token at least.
            return start >= max(last, 1)
        return count == 0 or (start >= count and start > last)

    stops = [here and not goes_on_at(start, count) for start, count, here in rows]
    if not any(stops):
        if not of_images:
            every = [int(seen)] * len(rows)
            if padding is not None:
                every = padding[:, :so_far].sum(1).tolist()
            _refuse_counts_of_all(rows, every, last)
        return Batch(hidden=hidden)
    if of_images or any(
        stop and start > 0 for (start, _, _), stop in zip(rows, stops, strict=True)
    ):
        raise ValueError(
            f"{_GOES_ON}, got position_ids that begin at {first.tolist()} for rows with "
            f"{list(held)} tokens so far. For `generate`, put padding on the left."
        )
    if isinstance(cache, FixedCache):
        return Batch(restarts=torch.tensor(stops, device=first.device))
    if any(count > 0 and not stop for (_, count, _), stop in zip(rows, stops, strict=True)):
        raise NotImplementedError(
            f"all rows must begin a document at once in a {type(cache).__name__}, got position_ids "
            f"that begin at {first.tolist()} for rows with {list(held)} tokens so far. Use a "
            "FixedCache."
        )
    setattr(cache, _HIDDEN, [*getattr(cache, _HIDDEN, ()), seen])
    return Batch(hidden=int(seen))


def _refuse_counts_of_all(
    rows: Sequence[tuple[int, int, bool]], every: Sequence[int], last: int
) -> None:
    """Refuse positions that count the tokens of earlier documents too, as `generate` does.

    They would be taken for a jump forward.

    Args:
        rows: Of each row, where its new positions begin, the tokens of its document so far, and
            whether it has new tokens.
        every: The tokens of each row so far, of all its documents.
        last: The lowest last position of the rows; -1 if it is not known.

    Raises:
        ValueError: They are such positions.
    """
    begun = [
        (start, total)
        for (start, count, here), total in zip(rows, every, strict=True)
        if here and count < total
    ]
    # All rows at once: one alone may jump there.
    if begun and all(start == total > last + 1 for start, total in begun):
        raise ValueError(
            "position_ids must count the tokens of a row's last document, and a document began "
            f"inside of the cache, got position_ids that begin at {[start for start, *_ in rows]} "
            f"for rows with {[count for _, count, _ in rows]} tokens of their last document. "
            "`generate` counts all tokens in a cache: hand it the cache of one document."
        )


def has_documents(cache: Cache | None) -> bool:
    """Whether a document began inside of a cache."""
    if isinstance(cache, FixedCache):
        return cache.has_restarted
    return bool(getattr(cache, _HIDDEN, ()))


def hidden_in(cache: Cache | None, seen: int | Tensor) -> int:
    """Return how many positions in a cache belong to documents before the last one.

    A cache of transformers does not know it, so it is written on the cache.
    """
    if isinstance(seen, Tensor) or not hasattr(cache, _HIDDEN):
        return 0
    # What was cropped away and came again is no document's beginning.
    begun = [begin for begin in getattr(cache, _HIDDEN) if begin < seen]
    setattr(cache, _HIDDEN, begun)
    return max(begun, default=0)


_HIDDEN = "_colonnade_documents"


def _held(cache: Any, seen: int, hidden: int, padding: Tensor | None, new: Tensor) -> Sequence[int]:
    """Return how many tokens of its document each row has in a cache."""
    if isinstance(cache, FixedCache):
        if padding is not None:
            cache.check_padding(padding, seen, new.shape[1])
        return cache.layers[0].kv.seq_lens
    if padding is None:
        return [seen - hidden] * new.shape[0]
    held: list[int] = padding[:, hidden : padding.shape[1] - new.shape[1]].sum(1).tolist()
    return held


def positions_behind(
    cache: Cache | None, tokens: Tensor, padding: Tensor | None
) -> Int[Tensor, "..."] | None:
    """Return the positions of tokens that go on with a document that began inside of a cache.

    None if none did: then a model counts as it always does.
    """
    if cache is None or torch.compiler.is_compiling():
        return None
    seen = int(cache.get_seq_length())
    hidden = hidden_in(cache, seen)
    if not has_documents(cache):
        return None
    held = torch.tensor(_held(cache, seen, hidden, padding, tokens), device=tokens.device)
    token = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
    if padding is not None:
        token = padding[:, padding.shape[1] - tokens.shape[1] :].long()
    return held[:, None] + (token.cumsum(1) - 1).clamp(min=0)


_LAST = "_colonnade_last"


def end_of(
    cache: Cache | None, seen: int, positions: Tensor, padding: Tensor | None
) -> tuple[int, int]:
    """Return (positions that a cache holds behind a call, where its rows end).

    That is the lowest last position, for rows may be reordered.
    """
    rows, length = positions.shape
    if padding is not None:
        positions = positions.masked_fill(~padding, -1)[padding.any(1)]
    ends = [int(positions.amax(1).min())] if positions.numel() else []
    if len(positions) < rows or not ends:  # Some rows stay as they are.
        ends.append(_last_in(cache, seen))
    return seen + length, min(ends)


def remember_end(cache: Cache, end: tuple[int, int]) -> None:
    """Write on a cache where its rows end."""
    setattr(cache, _LAST, end)


def _last_in(cache: Cache | None, seen: int) -> int:
    """Return the lowest last position of the rows of a cache; -1 if it was changed since."""
    end, last = getattr(cache, _LAST, (-1, -1))
    return last if end == seen else -1


_GOES_ON_COMPILED = (
    "position_ids must go on where the row in the cache ends, or jump forward, in a compiled call: "
    "call the model uncompiled for a document that restarts at 0"
)
_GOES_ON = (
    "position_ids must go on where the row in the cache ends, jump forward, or restart at 0 for a "
    "document of its own"
)
