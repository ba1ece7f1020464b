"""Finds where documents begin, from all the arguments that a model is called with.

Callers say it in many ways: by position_ids that restart, and by what collators make for flash
attention and state space models (cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k and
seq_idx). `read_batch` reads all of it, and each of these is obeyed or refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn import functional as F

from colonnade.hf.batch import NAMES, Batch, positions_in, require, shape_of
from colonnade.hf.continued import behind_cache, end_of, hidden_in


def read_batch(arguments: Mapping[str, Any], padding: Tensor | None, keeps: bool) -> Batch:
    """Read where documents begin, from whatever a model is called with.

    A document begins where the positions of a row's tokens go down or stay at the lowest, and where
    cu_seq_lens or seq_idx says so. Positions that jump forward begin none.

    Args:
        arguments: The arguments of the call by name. It has input_ids or inputs_embeds.
        padding: [batch, positions so far and new], True at tokens; None: all are.
        keeps: Whether the call keeps keys and values for later ones.

    Raises:
        ValueError: What is said contradicts itself or the tokens, or documents come with a cache.
        NotImplementedError: Some rows, but not all, begin documents behind what a cache keeps that
            is no `FixedCache`.
    """
    batch, length = shape_of(arguments)
    cache, seen = arguments.get("past_key_values"), positions_in(arguments)
    positions = _positions(arguments.get("position_ids"), batch, length) if length else None
    of_images = positions is not None and len(arguments["position_ids"].shape) == 3
    of_images = of_images and arguments["position_ids"].shape[0] != 4
    _check_places(arguments.get("cache_position"), seen, length)
    new = None if padding is None else padding[:, padding.shape[1] - length :]
    said = _named(arguments, batch, length)
    if said is not None and not _is_zero(seen):
        raise NotImplementedError(
            f"a call that goes on from a cache says where documents begin by position_ids alone, "
            f"got {_given(arguments)} and {seen} positions in the cache."
        )
    inside = None if said is None else _changes(said, new)
    if positions is not None and length > 1:
        other_axes = arguments["position_ids"][1:].expand(-1, batch, -1) if of_images else ()
        restart = _restarts(positions, other_axes, new)
        if inside is not None:
            require(
                ~(restart & ~inside).any(),
                f"position_ids must restart only where {_given(arguments)} begin a document",
                lambda: f"position_ids={_shown(positions)}",
            )
        else:
            inside = restart
    if inside is not None and (keeps or not torch.compiler.is_compiling()):
        if keeps:
            require(
                ~inside.any(),
                _NOT_CONTINUED,
                lambda: f"documents inside of rows by {_given(arguments)}, and {_kept(cache)}",
            )
        if keeps or not bool(inside.any()):
            inside = None
    begins = None if inside is None else inside | _is_first(new, inside)
    found = Batch(begins, hidden=hidden_in(cache, seen))
    if positions is not None and not _is_zero(seen):
        found = behind_cache(cache, seen, positions, padding, of_images)
    if positions is not None and not torch.compiler.is_compiling():
        found = replace(found, end=end_of(cache, int(seen), positions, new))
    return found


_NOT_CONTINUED = (
    "packed rows (position_ids that restart, cu_seq_lens or seq_idx) cannot be continued, so they "
    "take no cache (past_key_values=None, use_cache=False)"
)


def _kept(cache: object) -> str:
    return "use_cache=True" if cache is None else f"a {type(cache).__name__}"


def counted(begins: Bool[Tensor, "batch length"], padding: Tensor | None) -> Int[Tensor, "..."]:
    """Return the position of each token in its document."""
    token = torch.ones_like(begins) if padding is None else padding
    count = token.long().cumsum(1) - 1
    return count - count.gather(1, last_true(begins).clamp(min=0))


def _positions(position_ids: object, batch: int, length: int) -> Int[Tensor, "..."] | None:
    """Return the positions of text [batch, length], if they are said."""
    position_ids = _integers("position_ids", position_ids)
    if position_ids is None:
        return None
    if position_ids.ndim == 3:  # Of text, if there are four; of time, height and width.
        position_ids = position_ids[0]
    if (
        position_ids.ndim != 2
        or position_ids.shape[0] not in (1, batch)
        or position_ids.shape[1:] != (length,)
    ):
        raise ValueError(
            f"position_ids must be [batch or 1, length], got position_ids.shape="
            f"{tuple(position_ids.shape)} for {batch} rows of {length} tokens."
        )
    return position_ids.expand(batch, -1)


def _check_places(cache_position: object, seen: int | Tensor, length: int) -> None:
    """Refuse places in the cache that are not the next ones."""
    places = _integers("cache_position", cache_position)
    if places is None:
        return
    next_ones = seen + torch.arange(length, device=places.device)
    if places.shape != next_ones.shape:
        raise ValueError(
            f"cache_position must be [length], got cache_position.shape={tuple(places.shape)} for "
            f"{length} tokens."
        )
    require(
        (places == next_ones).all(),
        "cache_position must be the next places in the cache; leave it out",
        lambda: f"{places.tolist()[:10]} and {seen} positions in the cache",
    )


def _named(arguments: Mapping[str, Any], batch: int, length: int) -> Int[Tensor, "..."] | None:
    """Return a number of each position's document, if an argument in `NAMES` says so."""
    of_query, of_key, idx = (
        _integers(name, arguments.get(name))
        for name in ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")
    )
    longest = [arguments.get(name) for name in ("max_length_q", "max_length_k")]
    if of_query is not None and of_key is not None:
        if of_query.shape != of_key.shape:
            raise ValueError(
                "cu_seq_lens_q and cu_seq_lens_k must be equal, got shapes "
                f"{tuple(of_query.shape)} and {tuple(of_key.shape)}."
            )
        require(
            (of_query == of_key).all(),
            "cu_seq_lens_q and cu_seq_lens_k must be equal",
            lambda: (
                f"cu_seq_lens_q={arguments['cu_seq_lens_q'].tolist()} and another cu_seq_lens_k"
            ),
        )
    ends = of_key if of_query is None else of_query
    if ends is None and any(most is not None for most in longest):
        raise ValueError(
            "max_length_q and max_length_k say how long documents are, so cu_seq_lens_q must say "
            f"where they are, got {_given(arguments)} alone."
        )
    number = None if ends is None else _of_ends(ends, longest, batch, length)
    if idx is None:
        return number
    if idx.ndim != 2 or idx.shape[0] not in (1, batch) or idx.shape[1] != length:
        raise ValueError(
            f"seq_idx must be [batch or 1, length], got seq_idx.shape={tuple(idx.shape)} for "
            f"{batch} rows of {length} tokens."
        )
    of_idx = idx.expand(batch, -1)
    if number is not None:
        require(
            ((of_idx.diff() != 0) == (number.diff() != 0)).all(),
            "seq_idx and cu_seq_lens_q must say the same",
            lambda: f"documents that begin elsewhere in seq_idx={_shown(of_idx)}",
        )
    return of_idx


def _integers(name: str, given: object) -> Tensor | None:
    """Return an argument that is a tensor of integers, or None if it was not given."""
    if given is None:
        return None
    if not isinstance(given, Tensor):
        raise ValueError(f"{name} must be a tensor, got a {type(given).__name__}.")
    if given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
        raise ValueError(f"{name} must be integers, got {given.dtype}.")
    return given


def _of_ends(
    ends: Tensor, longest: list[Any], batch: int, length: int
) -> Int[Tensor, "batch length"]:
    """Return the number of each position's document, from cu_seq_lens of the flattened batch."""
    ends = ends.long()
    if ends.ndim != 1 or ends.shape[0] < 2:
        raise ValueError(
            f"cu_seq_lens_q must be [documents + 1], got cu_seq_lens_q.shape={tuple(ends.shape)}."
        )
    lengths = ends.diff()
    rows = torch.arange(batch, device=ends.device) * length
    require(
        (ends[0] == 0) & (ends[-1] == batch * length) & (lengths >= 0).all(),
        "cu_seq_lens_q must go up from 0 to the number of tokens",
        lambda: f"{ends.tolist()} for {batch} · {length} tokens",
    )
    require(
        torch.isin(rows, ends).all(),
        "no document may go from one row of a batch to the next",
        lambda: f"cu_seq_lens_q={ends.tolist()} for {batch} rows of {length} tokens",
    )
    for most in longest:
        if most is not None:
            require(
                (lengths <= most).all(),
                "max_length_q and max_length_k must be at least the longest document",
                lambda: f"{longest} for documents of {lengths.tolist()} tokens",
            )
    place = torch.arange(batch * length, device=ends.device)
    return torch.searchsorted(ends, place, right=True).view(batch, length)


def _shown(positions: Tensor) -> str:
    """Return a few of the numbers, for an error."""
    most = 40
    rows = positions[:4, :most].tolist()
    return f"{rows}{'…' if positions.numel() > sum(map(len, rows)) else ''}"


def _given(arguments: Mapping[str, Any]) -> str:
    names = [name for name in NAMES if arguments.get(name) is not None]
    return " and ".join(names or ["position_ids"])


def _changes(number: Tensor, padding: Tensor | None) -> Bool[Tensor, "batch length"]:
    """Say which tokens have another number than their row's token before."""
    before, is_second = _before(number, padding)
    return (number != before) & is_second


def _restarts(
    positions: Tensor, other_axes: Iterable[Tensor], padding: Tensor | None
) -> Bool[Tensor, "batch length"]:
    """Say which tokens have no higher position than their row's token before.

    An image is at one time, so its tokens differ on another axis.
    """
    before, is_second = _before(positions, padding)
    again = (positions == before) & is_second
    for axis in other_axes:
        again = again & (axis == _before(axis, padding)[0])
    # Documents of one token restart at once. Some models count from 2.
    lowest = positions if padding is None else positions.masked_fill(~padding, _HIGHEST)
    lowest = F.pad(lowest, (0, 1), value=_HIGHEST).amin(1, keepdim=True)
    require(
        ~(again & (positions != lowest)).any(),
        "position_ids must go up from token to token, or restart for another document (and "
        "attention_mask must be 0 at padding)",
        lambda: f"a position that comes twice in position_ids={_shown(positions)}",
    )
    return again | ((positions < before) & is_second)


_HIGHEST = 2**31 - 1


def _before(x: Tensor, padding: Tensor | None) -> tuple[Tensor, Bool[Tensor, "batch length"]]:
    """Return what stands at each token's predecessor, and which tokens have one."""
    token = torch.ones_like(x, dtype=torch.bool) if padding is None else padding
    last = F.pad(last_true(token)[:, :-1], (1, 0), value=-1)
    return x.gather(1, last.clamp(min=0)), token & (last >= 0)


def last_true(flags: Bool[Tensor, "batch length"]) -> Int[Tensor, "batch length"]:
    """Return the last place up to each at which a flag is set; -1 if there is none.

    A cumulative maximum would say it, but ONNX has none.
    """
    place = torch.arange(flags.shape[1], device=flags.device).expand(flags.shape)
    count = flags.long().cumsum(1)
    of_count = torch.zeros_like(F.pad(place, (0, 1)))
    of_count = of_count.scatter(1, torch.where(flags, count, 0), place)
    return F.pad(of_count[:, 1:], (1, 0), value=-1).gather(1, count)


def _is_first(padding: Tensor | None, like: Tensor) -> Bool[Tensor, "batch length"]:
    """Say which tokens are the first of their rows."""
    token = torch.ones_like(like) if padding is None else padding
    return token & (token.cumsum(1) == 1)


def _is_zero(seen: int | Tensor) -> bool:
    """Whether a cache is known to hold nothing."""
    return not isinstance(seen, Tensor) and seen == 0
