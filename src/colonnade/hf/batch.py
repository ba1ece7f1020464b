"""What a call of a model says of its batch: where padding is, and where documents begin.

Callers say it in many ways: attention_mask, position_ids that restart, and what collators make for
flash attention (cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, seq_idx). `read_batch`
reads all of it, and each of these is obeyed or refused.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.utils.generic import TransformersKwargs

from colonnade.hf.cache import FixedCache
from colonnade.hf.settings import NAME

NAMES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
"""Arguments that say where documents are, besides position_ids."""
SAID = ("attention_mask", "position_ids", "past_key_values", *NAMES)
"""All arguments that are read."""


@dataclass(frozen=True, eq=False)
class Batch:
    """The tokens of a batch, as a call describes them.

    Attributes:
        begins: [batch, length], True at the first token of each document; None: each row is one,
            or goes on with the one in the cache.
        restarts: [batch], True where a row begins a document that does not read what its
            `FixedCache` holds; None: nowhere.
        hidden: Number of positions in another cache that belong to earlier documents.
        said: The tokens, and the arguments in `SAID`, as they were read.
        told: Those in `NAMES` that the call was given.
        of: The model that is called.
        outer: What the call around this one says, if it is a part of one.
        is_read: Whether the arguments were read; not if the tokens come under other names.
    """

    begins: Bool[Tensor, "batch length"] | None = None
    restarts: Bool[Tensor, " batch"] | None = None
    hidden: int = 0
    said: tuple[Any, ...] = ()
    told: dict[str, Any] = field(default_factory=dict)
    of: nn.Module | None = None
    outer: Batch | None = None
    is_read: bool = True


# A subclass with a default would be shorter, but compilers read the default even after a change.
_HERE = threading.local()


def batch_of_call() -> Batch | None:
    """Return what the innermost call that runs in this thread says; None outside of any.

    transformers hands the mask function neither the arguments nor the cache of a call.
    """
    return getattr(_HERE, "batch", None)


def set_batch_of_call(batch: Batch | None) -> None:
    """Say what the call that begins is about, or that of the call around the one that ended."""
    _HERE.batch = batch


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
    positions = _positions(arguments.get("position_ids"), batch, length)
    of_images = positions is not None and len(arguments["position_ids"].shape) == 3
    of_images = of_images and arguments["position_ids"].shape[0] != 4
    new = None if padding is None else padding[:, padding.shape[1] - length :]
    said = _named(arguments, batch, length)
    if said is not None and not _is_zero(seen):
        raise NotImplementedError(
            f"a call that goes on from a cache says where documents begin by position_ids alone, "
            f"got {_given(arguments)} and {seen} positions in the cache."
        )
    inside = None if said is None else _changes(said, new)
    if positions is not None and length > 1:
        restart = _restarts(positions, new, of_images)
        if inside is not None:
            _require(
                ~(restart & ~inside).any(),
                f"position_ids must restart only where {_given(arguments)} begin a document",
                lambda: f"position_ids={_shown(positions)}",
            )
        else:
            inside = restart
    if inside is not None and (keeps or not torch.compiler.is_compiling()):
        if keeps:
            _require(
                ~inside.any(),
                _NOT_CONTINUED,
                lambda: f"documents inside of rows by {_given(arguments)}, and {_kept(cache)}",
            )
        if keeps or not bool(inside.any()):
            inside = None
    begins = None if inside is None else inside | _is_first(new, inside)
    found = Batch(begins, hidden=hidden_in(cache, seen))
    if positions is not None and not _is_zero(seen):
        found = _behind_cache(cache, seen, positions, padding, of_images)
    if positions is not None and isinstance(cache, Cache) and not torch.compiler.is_compiling():
        _remember(cache, int(seen), positions, new)
    return found


_NOT_CONTINUED = (
    "packed rows (position_ids that restart, cu_seq_lens or seq_idx) cannot be continued, so they "
    "take no cache (past_key_values=None, use_cache=False)"
)


def _kept(cache: object) -> str:
    return "use_cache=True" if cache is None else f"a {type(cache).__name__}"


def tokens_of(arguments: Mapping[str, Any]) -> Tensor | None:
    """Return the tokens of a call, or their embeddings; None if they come under another name."""
    ids = arguments.get("input_ids")
    tokens = arguments.get("inputs_embeds") if ids is None else ids
    if not isinstance(tokens, Tensor) or tokens.ndim != (3 if ids is None else 2):
        return None  # Codebooks, for example.
    return tokens


def shape_of(arguments: Mapping[str, Any]) -> tuple[int, int]:
    """Return (batch, length) of the tokens of a call."""
    tokens = tokens_of(arguments)
    assert tokens is not None, "the caller looks whether there are any"
    batch, length = tokens.shape[:2]
    return batch, length


def positions_in(arguments: Mapping[str, Any]) -> int | Tensor:
    """Return how many positions the cache of a call holds; a compiled static cache counts alone."""
    cache = arguments.get("past_key_values")
    seen: int | Tensor = cache.get_seq_length() if isinstance(cache, Cache) else 0
    return int(seen) if isinstance(seen, Tensor) and not torch.compiler.is_compiling() else seen


def check_mask_of_tokens(
    mask: Tensor, batch: int, length: int, seen: int | Tensor
) -> Bool[Tensor, "batch positions"]:
    """Return a 2-D attention mask as booleans.

    Raises:
        ValueError: It does not have a row for each row of the batch and an entry for each position
            so far, or it has other numbers than 0 and 1.
    """
    known = not isinstance(seen, Tensor)
    if mask.shape[0] != batch or (known and mask.shape[1] != seen + length):
        raise ValueError(
            "attention_mask must be [batch, positions] and cover every position so far and the "
            f"new ones, got attention_mask.shape={tuple(mask.shape)} for {batch} rows of {length} "
            f"tokens{f' and {seen} positions in the cache' if known and seen else ''}."
        )
    token = mask.bool()
    if mask.dtype != torch.bool:
        _require(
            (mask == token).all(),
            "attention_mask must be 1 at tokens and 0 at padding (seq_idx numbers documents)",
            lambda: f"attention_mask with {mask.unique().tolist()[:5]}",
        )
    return token


def counted(begins: Bool[Tensor, "batch length"], padding: Tensor | None) -> Int[Tensor, "..."]:
    """Return the position of each token in its document."""
    token = torch.ones_like(begins) if padding is None else padding
    count = token.long().cumsum(1) - 1
    return count - count.gather(1, last_true(begins).clamp(min=0))


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


def _behind_cache(
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
        before = seen - hidden if padding is None else padding[:, hidden:so_far].sum(1)
        goes_on = first >= (0 if of_images else before)
        goes_on = goes_on if comes is None else goes_on | ~comes
        _require(goes_on.all(), _GOES_ON, lambda: "other positions")
        return Batch(hidden=hidden)
    held = _held(cache, int(seen), hidden, padding, positions)
    present = [True] * len(first) if comes is None else comes.tolist()
    rows = list(zip(first.tolist(), held, present, strict=True))
    last = _last_in(cache, int(seen))

    def goes_on_at(start: int, count: int) -> bool:
        if of_images:  # An image has more tokens than times.
            return start >= last
        return count == 0 or (start >= count and start > last)

    stops = [here and not goes_on_at(start, count) for start, count, here in rows]
    if not any(stops):
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
    if not hidden and not (isinstance(cache, FixedCache) and cache.has_restarted):
        return None
    held = torch.tensor(_held(cache, seen, hidden, padding, tokens), device=tokens.device)
    token = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
    if padding is not None:
        token = padding[:, padding.shape[1] - tokens.shape[1] :].long()
    return held[:, None] + (token.cumsum(1) - 1).clamp(min=0)


_LAST = "_colonnade_last"


def _remember(cache: Cache, seen: int, positions: Tensor, padding: Tensor | None) -> None:
    """Write on a cache where its rows end: the lowest last position, for rows may be reordered."""
    length = positions.shape[1]
    if padding is not None:
        positions = positions.masked_fill(~padding, -1)[padding.any(1)]
    lowest = int(positions.amax(1).min()) if positions.numel() else _HIGHEST
    if padding is not None and not bool(padding.any(1).all()):  # Of rows that stay as they are.
        lowest = min(lowest, _last_in(cache, seen))
    setattr(cache, _LAST, (seen + length, lowest))


def _last_in(cache: Cache, seen: int) -> int:
    """Return the lowest last position of the rows of a cache; -1 if it was changed since."""
    end, last = getattr(cache, _LAST, (-1, -1))
    return last if end == seen else -1


_GOES_ON = (
    "position_ids must go on where the row in the cache ends, jump forward, or restart at 0 for a "
    "document of its own"
)


def _positions(position_ids: object, batch: int, length: int) -> Int[Tensor, "..."] | None:
    """Return the positions of text [batch, length], if they are said."""
    if not isinstance(position_ids, Tensor):
        return None
    if position_ids.ndim == 3:  # Of text, if there are four; of time, height and width.
        position_ids = position_ids[0]
    if position_ids.is_floating_point():
        raise ValueError(f"position_ids must be integers, got {position_ids.dtype}.")
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


def _named(arguments: Mapping[str, Any], batch: int, length: int) -> Int[Tensor, "..."] | None:
    """Return a number of each position's document, if an argument in `NAMES` says so."""
    of_query, of_key, idx = (
        arguments.get(name) for name in ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")
    )
    for name, given in zip(
        ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"), (of_query, of_key, idx), strict=True
    ):
        if given is not None and not isinstance(given, Tensor):
            raise ValueError(f"{name} must be a tensor, got a {type(given).__name__}.")
    longest = [arguments.get(name) for name in ("max_length_q", "max_length_k")]
    if of_query is not None and of_key is not None:
        same = of_query.shape == of_key.shape
        _require(
            (of_query == of_key).all() if same else torch.tensor(False),
            "cu_seq_lens_q and cu_seq_lens_k must be equal",
            lambda: f"{of_query.tolist()} and {of_key.tolist()}",
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
    idx = idx.expand(batch, -1)
    if number is not None:
        _require(
            ((idx.diff() != 0) == (number.diff() != 0)).all(),
            "seq_idx and cu_seq_lens_q must say the same",
            lambda: f"documents that begin elsewhere in seq_idx={_shown(idx)}",
        )
    return idx  # type: ignore[no-any-return]


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
    _require(
        (ends[0] == 0) & (ends[-1] == batch * length) & (lengths >= 0).all(),
        "cu_seq_lens_q must go up from 0 to the number of tokens",
        lambda: f"{ends.tolist()} for {batch} · {length} tokens",
    )
    _require(
        torch.isin(rows, ends).all(),
        "no document may go from one row of a batch to the next",
        lambda: f"cu_seq_lens_q={ends.tolist()} for {batch} rows of {length} tokens",
    )
    for most in longest:
        if most is not None:
            _require(
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
    positions: Tensor, padding: Tensor | None, of_images: bool
) -> Bool[Tensor, "batch length"]:
    """Say which tokens have no higher position than their row's token before.

    An image is at one time, so there it has to be a lower one.
    """
    before, is_second = _before(positions, padding)
    if of_images:
        return (positions < before) & is_second
    again = (positions == before) & is_second
    # Documents of one token restart at once. Some models count from 2.
    lowest = positions if padding is None else positions.masked_fill(~padding, _HIGHEST)
    lowest = F.pad(lowest, (0, 1), value=_HIGHEST).amin(1, keepdim=True)
    _require(
        ~(again & (positions != lowest)).any(),
        "position_ids must go up from token to token, or restart for another document (and "
        "attention_mask must be 0 at padding)",
        lambda: f"a position that comes twice in position_ids={_shown(positions)}",
    )
    return (positions <= before) & is_second


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


def _require(condition: Tensor, rule: str, got: Callable[[], str]) -> None:
    """Refuse what breaks a rule; where a compiler cannot look, when the compiled program runs.

    Sizes in the rule itself would be compiled again for every size.
    """
    if torch.compiler.is_compiling():
        torch._assert_async(condition, f"{rule}.")
    elif not bool(condition):
        raise ValueError(f"{rule}, got {got()}.")


_HARMLESS = {
    *TransformersKwargs.__annotations__,
    *("use_cache", "past_key_values", "cache", "cache_params", "return_dict"),
    *("position_embeddings", "logits_to_keep", "token_type_ids", "deterministic"),
    *("ignore_index", "shift_labels"),
    # Where a forward was replaced by one that takes anything.
    *("input_ids", "inputs_embeds", "attention_mask", "labels"),
}
"""Arguments without a place of their own that models pass on, and that change no attention."""


def refuse_unknown(others: Mapping[str, Any]) -> None:
    """Refuse arguments that may ask for something, and that nobody here has heard of.

    Raises:
        NotImplementedError: There is one.
    """
    for name, value in others.items():
        if value is not None and name not in _HARMLESS:
            shown = (
                f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else value
            )
            raise NotImplementedError(
                f"attn_implementation={NAME!r} has no {name}, got {name}={shown}. Leave it out if "
                "the model can do without."
            )
