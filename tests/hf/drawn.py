"""Drawn calls of whole models against each document alone, under a dense mask of the oracle.

A draw is a model, a batch of documents with padding, and a way to say so: masks of every type and
positions, what collators make, caches of every kind and chunks. Every token's logits are what its
document gives alone, or the call is refused where it may be.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, StaticCache

from colonnade.hf import FixedCache, retrofit
from colonnade.hf.attention import attention_function
from colonnade.hf.settings import NAME, patterns_of
from colonnade.pattern import FixedPattern, FullPattern, LocalPattern, Pattern
from tests.hf import models
from tests.hf.models import dense_model, random_model, windowed_model
from tests.oracle import dense_attention, fixed_set, full_set, local_set, mask_of_sets

OURS = "sparse_transformer"
WINDOWED = tuple(f"{family} with windows" for family in models.WINDOWED_FAMILIES)
FAMILIES = (OURS, *models.FAMILIES, *models.MORE_FAMILIES, *WINDOWED)
LAYOUTS = ("one", "sub-blocks", "sinks", "heads")
"""What the layers read that read something else than they did."""
STRIDE, SUMMARY = 8, 2
MASK_TYPES = (torch.long, torch.int32, torch.bool, torch.float32, torch.uint8)
KINDS = ("padded", "packed", "flattened", "cached", "restarted", "bad")
REFUSALS = (ValueError, NotImplementedError)


@dataclass
class Draw:
    """A call of a model, or several that go on from a cache.

    Attributes:
        number: The document of each position [batch, length]; -1 at padding.
        positions: Of each token in its document [batch, length]; jumps are allowed.
        ends: Where the calls end, the last at length.
        given: What each call is given besides its tokens and its cache.
        may_refuse: Whether refusing is right.
    """

    family: str
    kind: str
    way: str
    layout: str
    cache: str
    number: Tensor
    positions: Tensor
    ends: list[int]
    given: list[dict[str, Any]] = field(default_factory=list)
    may_refuse: bool = False


@cache
def model_of(family: str, layout: str) -> Any:
    """Return a model whose layer in the middle, if it has three, reads something else.

    Layers with a window keep it. Of three layers that have none, the one in the middle reads
    everything, or a window and sinks.
    """
    if family == OURS:
        settings: dict[str, dict[str, Any]] = {
            "one": {"subblocks": 1},
            "sub-blocks": {"subblocks": 2},
            "sinks": {"subblocks": 1, "sinks": 3},
            "heads": {"colonnade_heads": [{"pattern": "local", "window": 5, "sinks": 1}, {}]},
        }
        return random_model(max_position_embeddings=128, **settings[layout])
    pattern = {
        "one": FixedPattern(STRIDE, SUMMARY),
        "sub-blocks": FixedPattern(STRIDE, SUMMARY, 2),
        "sinks": FixedPattern(STRIDE, SUMMARY, sinks=3),
        "heads": (LocalPattern(5, sinks=1), FixedPattern(STRIDE, SUMMARY)),
    }[layout]
    if family in WINDOWED:
        name = family.removesuffix(" with windows")
        chosen: Any = {} if name in models.ALL_WINDOWED else {1: pattern}
        return retrofit(windowed_model(name), patterns=chosen)
    middle = {"sinks": LocalPattern(5, sinks=2), "heads": (FullPattern(), LocalPattern(3))}
    chosen = {0: pattern, 1: middle.get(layout, FullPattern()), 2: pattern}
    return retrofit(dense_model(family), patterns=chosen)


def _oracle(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *_: Any,
    scaling: Any = None,
    s_aux: Tensor | None = None,
    **__: Any,
) -> tuple[Tensor, None]:
    """Attend as the definition says, over one whole document.

    A learnt sink logit is one more key, which all queries read and whose value is zero; another
    entry of queries and keys gives it the score.
    """
    heads, length = key.shape[1:3]
    patterns = patterns_of(module.config, module.layer_idx)  # type: ignore[arg-type]
    mask = _mask_of(patterns, heads, length)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if s_aux is not None:
        score = (s_aux / scale).view(1, -1, 1, 1).expand(*query.shape[:3], 1)
        query = torch.cat([query, score], 3)
        key = nn.functional.pad(key, (0, 1, 0, 1))
        key[:, :, -1, -1] = 1
        value = nn.functional.pad(value, (0, 0, 0, 1))
        mask = nn.functional.pad(mask, (0, 1), value=True)
    out, _lse = dense_attention(query, key, value, mask, scale)
    return out.transpose(1, 2).contiguous(), None


def _mask_of(patterns: Any, heads: int, length: int) -> Tensor:
    """Return the mask [heads, length, length]; each group counts its heads from 0."""
    groups = patterns if isinstance(patterns, tuple) else (patterns,)
    sizes = [heads // len(groups) + (g < heads % len(groups)) for g in range(len(groups))]

    def read(pattern: Pattern, head: int, i: int) -> set[int]:
        if isinstance(pattern, FixedPattern):
            sizes = pattern.stride, pattern.summary, head, pattern.subblocks
            return fixed_set(i, length, *sizes, sinks=pattern.sinks)
        if isinstance(pattern, LocalPattern):
            return local_set(i, length, pattern.window, pattern.sinks)
        assert isinstance(pattern, FullPattern)
        return full_set(i, length)

    parts = [
        mask_of_sets(length, size, partial(read, pattern))
        for pattern, size in zip(groups, sizes, strict=True)
    ]
    return torch.cat(parts)


@contextmanager
def by_the_oracle() -> Iterator[None]:
    """Let all models attend as the definition says."""
    AttentionInterface.register(NAME, _oracle)
    try:
        yield
    finally:
        AttentionInterface.register(NAME, attention_function)


def draw_call(seed: int, number: int) -> Draw:
    """Draw the call with this number; the same again for the same seed."""
    r = random.Random(f"{seed} {number}")
    kind = r.choice(KINDS)
    make = {
        "padded": _padded,
        "packed": _packed,
        "flattened": _flattened,
        "cached": _cached,
        "restarted": _restarted,
        "bad": _bad,
    }
    return make[kind](r, r.choice(FAMILIES), r.choice(LAYOUTS))


def _documents(r: random.Random, lengths: list[list[int]], jumps: bool) -> tuple[Tensor, Tensor]:
    """Return the number and the position of each token, rows of documents of these lengths.

    With jumps, positions skip some numbers inside of documents.
    """
    numbers, positions, count = [], [], 0
    start = r.choice((0, 0, 0, 2)) if jumps else 0
    for row in lengths:
        for length in row:
            skips = [r.choice((1, 1, 1, 4)) if jumps else 1 for _ in range(length)]
            positions += [start + sum(skips[:i]) for i in range(length)]
            numbers += [count] * length
            count += 1
    shape = len(lengths), -1
    return torch.tensor(numbers).view(shape), torch.tensor(positions).view(shape)


def _lengths(r: random.Random, total: int, most: int) -> list[int]:
    """Cut a row of this many tokens into documents; some have one token."""
    cuts = sorted({r.randrange(1, total) for _ in range(r.randrange(most))} if total > 1 else set())
    return [b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True)]


def _pad(r: random.Random, number: Tensor, positions: Tensor, side: str) -> tuple[Tensor, Tensor]:
    """Put padding among the tokens of each row, of one length together, with any positions."""
    rows, length = number.shape
    total = length + r.randrange(1, 9)
    padded = torch.full((rows, total), -1), torch.full((rows, total), r.choice((0, 1)))
    for row in range(rows):
        left = {"left": total - length, "right": 0}.get(side, r.randrange(total - length + 1))
        place = list(range(left, left + length))
        if side == "anywhere":
            place = sorted(r.sample(range(total), length))
        padded[0][row, place], padded[1][row, place] = number[row], positions[row]
    return padded


def _mask(r: random.Random, number: Tensor) -> Tensor:
    return (number >= 0).to(r.choice(MASK_TYPES))


def _padded(r: random.Random, family: str, layout: str) -> Draw:
    """Rows of unlike lengths, each one document."""
    rows, longest = r.randint(1, 4), r.randint(1, 40)
    side = r.choice(("left", "right", "both", "anywhere"))
    number, positions = (
        torch.full((rows, longest), -1),
        torch.zeros(rows, longest, dtype=torch.long),
    )
    for row in range(rows):
        length = longest if row == 0 else r.randint(0, longest)
        left = {"left": longest - length, "right": 0}.get(side, r.randint(0, longest - length))
        place = list(range(left, left + length))
        if side == "anywhere":
            place = sorted(r.sample(range(longest), length))
        number[row, place], positions[row, place] = row, torch.arange(length)
    given: dict[str, Any] = {"attention_mask": _mask(r, number)}
    way = r.choice(("mask", "mask and positions"))
    if way == "mask and positions":
        given["position_ids"] = positions
    else:
        positions = _default_positions(family, number)
    kept = r.choice(("none", "default"))
    return Draw(
        family, "padded", f"{way}, {side}", layout, kept, number, positions, [longest], [given]
    )


def _default_positions(family: str, number: Tensor) -> Tensor:
    """Return the positions that a model takes if it is given a mask and no positions."""
    if family in (OURS, "opt"):
        return ((number >= 0).cumsum(1) - 1).clamp(min=0)
    return torch.arange(number.shape[1]).repeat(len(number), 1)


def _packed(r: random.Random, family: str, layout: str) -> Draw:
    """Documents that positions say, with a mask of ones, with padding, or without a mask."""
    rows, length = r.randint(1, 3), r.randint(2, 40)
    lengths = [_lengths(r, length, 5) for _ in range(rows)]
    number, positions = _documents(r, lengths, jumps=r.random() < 0.4)
    way = r.choice(("alone", "ones", "left", "right", "both", "anywhere"))
    given: dict[str, Any] = {}
    if way not in ("alone", "ones"):
        number, positions = _pad(r, number, positions, way)
    if way != "alone":
        given["attention_mask"] = _mask(r, number)
    given["position_ids"] = positions
    kept = r.choice(("none", "default"))
    return Draw(family, "packed", way, layout, kept, number, positions, [number.shape[1]], [given])


def _flattened(r: random.Random, family: str, layout: str) -> Draw:
    """Documents as collators hand them to flash attention and state space models."""
    rows, length = r.choice((1, 1, 2)), r.randint(2, 40)
    lengths = [_lengths(r, length, 5) for _ in range(rows)]
    number, positions = _documents(r, lengths, jumps=False)
    ends = torch.tensor([0, *(n for row in lengths for n in row)]).cumsum(0)
    ends = ends.to(r.choice((torch.int32, torch.long)))
    ways = {"cu_seq_lens": r.random() < 0.7, "seq_idx": r.random() < 0.5}
    ways["cu_seq_lens"] |= not ways["seq_idx"]
    given: dict[str, Any] = {}
    if ways["cu_seq_lens"]:
        given |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
        if r.random() < 0.7:
            given |= dict.fromkeys(("max_length_q", "max_length_k"), max(map(max, lengths)))
    if ways["seq_idx"]:
        given["seq_idx"] = number.int()
    if r.random() < 0.5:
        given["position_ids"] = positions
    if r.random() < 0.3:
        given["attention_mask"] = _mask(r, number)
    kept = r.choice(("none", "default"))
    way = " and ".join(given)
    return Draw(family, "flattened", way, layout, kept, number, positions, [length], [given])


def _cached(r: random.Random, family: str, layout: str) -> Draw:
    """One document in each row, padded or not, in chunks through a cache."""
    draw = _padded(r, family, layout)
    number, positions = draw.number, draw.positions
    if r.random() < 0.4:
        number, positions = _documents(r, [[number.shape[1]]] * len(number), r.random() < 0.4)
    length = number.shape[1]
    draw.ends = sorted({r.randint(1, length) for _ in range(r.randrange(4))} | {length})
    says = bool((number < 0).any()) or r.random() < 0.5
    mask = _mask(r, number)
    default = says and bool(torch.equal(positions, _default_positions(family, number)))
    counts = not default or r.random() < 0.5
    draw.number, draw.positions = number, positions
    draw.kind, draw.cache = "cached", r.choice(("fixed", "dynamic", "static"))
    draw.way = f"mask {says}, positions {counts}"
    draw.given = _pieces(draw.ends, mask if says else None, positions if counts else None)
    # Such a cache drops positions, and a window counts tokens.
    gaps = ((number[:, :-1] >= 0) & (number[:, 1:] < 0)).any()
    draw.may_refuse = bool(gaps) and family in WINDOWED and draw.cache != "fixed"
    return draw


def _pieces(ends: list[int], mask: Tensor | None, positions: Tensor | None) -> list[dict[str, Any]]:
    """Return what each chunk is given."""
    pieces = []
    for begin, end in zip([0, *ends], ends, strict=False):
        piece = {}
        if mask is not None:
            piece["attention_mask"] = mask[:, :end]
        if positions is not None:
            piece["position_ids"] = positions[:, begin:end]
        pieces.append(piece)
    return pieces


def _restarted(r: random.Random, family: str, layout: str) -> Draw:
    """Documents that begin where a chunk does, in a cache that goes on."""
    rows = r.randint(1, 3)
    ends = sorted({r.randint(1, 40) for _ in range(4)})
    cuts = [end for end in ends[:-1] if r.random() < 0.6]
    at = [cuts if r.random() < 0.7 else [c for c in cuts if r.random() < 0.5] for _ in range(rows)]
    length = ends[-1]
    lengths = [[b - a for a, b in zip([0, *cut], [*cut, length], strict=True)] for cut in at]
    jumps = r.random() < 0.3
    number, positions = _documents(r, lengths, jumps)
    kept = r.choice(("fixed", "dynamic", "static"))
    mask = _mask(r, number) if r.random() < 0.5 else None
    given = _pieces(ends, mask, positions)
    unlike = any(cut != at[0] for cut in at)
    # Documents that count from 2 restart within one call only.
    # A jump to where `generate` would count on may be taken for that.
    counted = jumps and any((positions[:, end] == end).any() for end in ends[:-1])
    may_refuse = (unlike and kept != "fixed") or bool(positions[0, 0] > 0) or counted
    way = f"mask {mask is not None}"
    return Draw(family, "restarted", way, layout, kept, number, positions, ends, given, may_refuse)


def _bad(r: random.Random, family: str, layout: str) -> Draw:
    """Draw a call that contradicts itself; some of these turn out to be harmless."""
    draw = r.choice((_padded, _packed, _cached, _restarted))(r, family, layout)
    draw.kind, draw.may_refuse = "bad", True
    index = r.randrange(len(draw.given))
    piece, here = draw.given[index], slice([0, *draw.ends][index], draw.ends[index])
    mask, positions = piece.get("attention_mask"), piece.get("position_ids")
    ways = ["unknown"]
    if mask is not None:
        ways += ["one row", "numbers", "longer", "shorter"]
        ways += ["transposed"] if mask.shape[0] != mask.shape[1] else []
    if positions is not None:
        ways += ["shorter positions"]
        # Two tokens of equal positions and no others are two documents, and one is a jump forward.
        numbers = draw.number[:, here]
        ends_alike = (numbers[:, -2:] >= 0).all() and bool((numbers[:, -2:].diff() == 0).all())
        ways += ["twice"] if ends_alike and ((numbers >= 0).sum(1) > 2).all() else []
        if len(draw.number.unique()) > len(draw.number) + 1:  # Documents, rows and padding.
            ways += ["contradicted"]
    draw.way = r.choice(ways)
    if draw.way == "one row":
        assert mask is not None
        piece["attention_mask"] = mask[:1]
    elif draw.way == "numbers":
        assert mask is not None
        piece["attention_mask"] = mask.int() * r.choice((2, 3, -1))
    elif draw.way == "longer":
        assert mask is not None
        piece["attention_mask"] = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    elif draw.way == "shorter":
        assert mask is not None
        piece["attention_mask"] = mask[:, 1:]
    elif draw.way == "transposed":
        assert mask is not None
        piece["attention_mask"] = mask.mT
    elif draw.way == "twice":
        assert positions is not None
        positions[:, -2:] = 99
    elif draw.way == "shorter positions":
        assert positions is not None
        piece["position_ids"] = positions[:, 1:]
    elif draw.way == "contradicted":
        piece["cu_seq_lens_q"] = torch.tensor([0, draw.number.numel()])
    else:
        piece["document_ids"] = draw.number
    return draw


def results(draw: Draw, ids: Tensor) -> Tensor:
    """Return the logits of all positions, as the calls give them."""
    model = model_of(draw.family, draw.layout)
    length = ids.shape[1]
    options: dict[str, Any] = {"use_cache": False} if draw.cache == "none" else {}
    if draw.cache == "fixed":
        options["past_key_values"] = FixedCache(model.config)
    elif draw.cache == "dynamic":
        options["past_key_values"] = DynamicCache(config=model.config)
    elif draw.cache == "static":
        options["past_key_values"] = StaticCache(config=model.config, max_cache_len=length + 3)
    pieces = []
    for begin, end, given in zip([0, *draw.ends], draw.ends, draw.given, strict=False):
        pieces.append(model(ids[:, begin:end], **given, **options).logits)
    return torch.cat(pieces, 1)


def expected(draw: Draw, ids: Tensor) -> Tensor:
    """Return the logits of each token in its document alone, and zero at padding."""
    model = model_of(draw.family, draw.layout)
    logits: Tensor | None = None
    with by_the_oracle():
        for document in range(int(draw.number.max()) + 1):
            at = draw.number == document
            if not at.any():
                continue
            alone = model(
                ids[at][None], position_ids=draw.positions[at][None], use_cache=False
            ).logits
            if logits is None:
                logits = alone.new_zeros(*ids.shape, alone.shape[-1])
            logits[at] = alone[0]
    assert logits is not None
    return logits


def check_draw(draw: Draw) -> bool:
    """Assert that a call gives each document's logits; return False if it was refused instead.

    Raises:
        AssertionError: It gave something else, or was refused without need.
    """
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        ids = torch.randint(2, 90, draw.number.shape)
        try:
            found = results(draw, ids)
        except REFUSALS as error:
            if draw.may_refuse:
                return False
            raise AssertionError(f"refused without need: {error}") from error
        tokens = draw.number >= 0
        wanted = expected(draw, ids)
        torch.testing.assert_close(found[tokens], wanted[tokens], rtol=1e-6, atol=1e-6)
    return True
