"""The layer against plain matrix products with its weights around the oracle's loops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from colonnade import FixedPattern, FullPattern, LocalPattern, Pattern, StridedPattern
from colonnade.nn import SelfAttention
from colonnade.nn.attention import rotate
from colonnade.pattern import Part
from tests import oracle
from tests.cases import mask_of
from tests.rounding import check_half_the_digits

Angles = tuple[Tensor, Tensor]

SHAPES = [
    {"embed_dim": 12, "num_heads": 3},
    {"embed_dim": 12, "num_heads": 6, "num_kv_heads": 2},
    {"embed_dim": 12, "num_heads": 4, "num_kv_heads": 1, "qk_dim": 8},
    {"embed_dim": 6, "num_heads": 1, "qk_dim": 10},
]


def _layer(pattern: Pattern | tuple[Pattern, ...], **sizes: Any) -> SelfAttention:
    return SelfAttention(pattern=pattern, **sizes).double()


def _angles(seq_len: int, head_dim: int, batch: int = 1) -> Angles:
    """Draw an angle for each batch row, position and pair; both halves of a head turn alike."""
    angle = 3 * torch.rand(batch, seq_len, head_dim // 2, dtype=torch.float64)
    return torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()


def _turn(heads: Tensor, rotary: Angles) -> Tensor:
    """Multiply each pair (i, i + head_dim/2), as a complex number, by e^(i·angle)."""
    half = heads.shape[-1] // 2
    turn = torch.complex(rotary[0], rotary[1])[:, None, :, :half]
    turned = torch.complex(heads[..., :half], heads[..., half:]) * turn
    return torch.cat([turned.real, turned.imag], -1)


def _by_hand(layer: SelfAttention, x: Tensor, mask: Tensor, rotary: Angles | None = None) -> Tensor:
    """Compute the layer's mathematics, head by head; mask is [kv_heads, seq_len, seq_len]."""

    def project(weight: Tensor, bias: Tensor, heads: int) -> Tensor:
        width = len(bias) // heads
        parts = [
            x @ weight[h * width : (h + 1) * width].T + bias[h * width : (h + 1) * width]
            for h in range(heads)
        ]
        return torch.stack(parts, 1)

    heads, kv_heads = layer.num_heads, len(mask)
    query = project(layer.query_proj.weight, layer.query_proj.bias, heads)
    key = project(layer.key_proj.weight, layer.key_proj.bias, kv_heads)
    value = project(layer.value_proj.weight, layer.value_proj.bias, kv_heads)
    if rotary is not None:
        query, key = _turn(query, rotary), _turn(key, rotary)
    out, _ = oracle.loop_attention(query, key, value, mask, 1 / math.sqrt(query.shape[-1]))
    side_by_side = torch.cat([out[:, h] for h in range(heads)], -1)
    return side_by_side @ layer.out_proj.weight.T + layer.out_proj.bias


@pytest.mark.parametrize("sizes", SHAPES, ids=str)
@pytest.mark.parametrize("turned", [False, True])
def test_layer_is_projections_around_the_definition(sizes: dict[str, int], turned: bool) -> None:
    """With grouped heads and half-size queries; value heads keep their width."""
    layer = _layer(FixedPattern(4, 1, subblocks=2), **sizes)
    kv_heads = sizes.get("num_kv_heads", sizes["num_heads"])
    head_dim = sizes.get("qk_dim", sizes["embed_dim"]) // sizes["num_heads"]
    mask = oracle.fixed_mask(10, kv_heads, stride=4, summary=1, subblocks=2)
    rotary = _angles(10, head_dim, batch=2) if turned else None
    x = torch.randn(2, 10, sizes["embed_dim"], dtype=torch.float64)
    y = layer(x, rotary=rotary)
    assert y.shape == x.shape
    check_half_the_digits(y, _by_hand(layer, x, mask, rotary))


@pytest.mark.parametrize("kv_heads", [3, 5])
@pytest.mark.parametrize(
    "patterns",
    [
        FixedPattern(4, 1, subblocks=2).factors(),
        StridedPattern(3).factors(),
        (FixedPattern(5, 2, subblocks=2, causal=False), LocalPattern(3), FullPattern()),
        (FixedPattern(4, 1, part="summary"),),
    ],
    ids=["fixed factors", "strided factors", "three patterns", "one pattern"],
)
def test_layer_over_a_tuple_of_patterns(patterns: tuple[Pattern, ...], kv_heads: int) -> None:
    """Runs of unlike length, as PyTorch's own splitting makes them; each counts its sub-blocks."""
    layer = _layer(patterns, embed_dim=30, num_heads=15, num_kv_heads=kv_heads)
    runs = torch.arange(kv_heads).tensor_split(len(patterns))
    mask = torch.cat([mask_of(p, 11, len(run)) for p, run in zip(patterns, runs, strict=True)])
    rotary = _angles(11, 2, batch=2)
    x = torch.randn(2, 11, 30, dtype=torch.float64)
    check_half_the_digits(layer(x, rotary=rotary), _by_hand(layer, x, mask, rotary))


@pytest.mark.parametrize("causal", [True, False])
def test_layer_over_full_attention(causal: bool) -> None:
    layer = _layer(FullPattern(causal), embed_dim=8, num_heads=2)
    every = torch.ones(2, 7, 7, dtype=torch.bool)
    x = torch.randn(1, 7, 8, dtype=torch.float64)
    check_half_the_digits(layer(x), _by_hand(layer, x, every.tril() if causal else every))


@pytest.mark.parametrize("batch", [1, 3])
def test_rotate_turns_pairs_half_a_head_apart(batch: int) -> None:
    """One angle for all batch rows, or one for each."""
    heads = torch.randn(3, 2, 5, 6, dtype=torch.float64)
    rotary = _angles(5, 6, batch)
    check_half_the_digits(rotate(heads, rotary), _turn(heads, rotary))


def test_rotary_scores_depend_on_distance_only() -> None:
    """The purpose of the rotation: all positions moved on by 5 give the same outputs."""
    layer = _layer(FixedPattern(4, 1), embed_dim=8, num_heads=2)
    frequency = torch.tensor([1.0, 0.1] * 2, dtype=torch.float64)
    x = torch.randn(1, 9, 8, dtype=torch.float64)
    ys = []
    for start in (0, 5):
        angle = torch.arange(start, start + 9, dtype=torch.float64)[None, :, None] * frequency
        ys.append(layer(x, rotary=(angle.cos(), angle.sin())))
    check_half_the_digits(*ys)


@pytest.mark.parametrize("part", ["merged", "local", "summary"])
@pytest.mark.parametrize("t", [1, 6, 11])
def test_no_position_sees_the_future(part: Part, t: int) -> None:
    """Exactly: what comes at t and later moves no bit before it, in the output or a gradient."""
    pattern = FixedPattern(4, 1, part=part)
    layer = _layer(pattern, embed_dim=8, num_heads=2)
    x = torch.randn(2, 12, 8, dtype=torch.float64, requires_grad=True)
    changed = x.detach().clone()
    changed[:, t:] = torch.randn(2, 12 - t, 8, dtype=torch.float64)
    before, after = layer(x), layer(changed)
    assert torch.equal(before[:, :t], after[:, :t])
    assert not torch.equal(before[:, t:], after[:, t:])
    (grad,) = torch.autograd.grad(before[:, :t].sum(), x)
    assert (grad[:, t:] == 0).all()


@pytest.mark.plain
@pytest.mark.parametrize("pattern", [None, "fixed", torch.ones(4, 4)])
def test_a_pattern_is_a_pattern(pattern: Any) -> None:
    with pytest.raises(TypeError, match=f"pattern must be a Pattern.*{type(pattern).__name__}"):
        SelfAttention(8, 2, pattern)


@pytest.mark.plain
@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        ({"embed_dim": 10, "num_heads": 3}, ValueError, "embed_dim=10 and num_heads=3"),
        ({"embed_dim": 8, "num_heads": 2, "qk_dim": 5}, ValueError, "qk_dim=5 and num_heads=2"),
        (
            {"embed_dim": 8, "num_heads": 4, "num_kv_heads": 3},
            ValueError,
            "num_heads=4 and num_kv_heads=3",
        ),
        (
            {"embed_dim": 8, "num_heads": 2, "num_kv_heads": 4},
            ValueError,
            "num_heads=2 and num_kv_heads=4",
        ),
        ({"embed_dim": 0, "num_heads": 1}, ValueError, "embed_dim=0"),
        ({"embed_dim": 8, "num_heads": 0}, ValueError, "num_heads=0"),
        ({"embed_dim": 8, "num_heads": 2, "num_kv_heads": 0}, ValueError, "num_kv_heads=0"),
        ({"embed_dim": 8, "num_heads": 2, "qk_dim": -2}, ValueError, "qk_dim=-2"),
        ({"embed_dim": 8.0, "num_heads": 2}, TypeError, r"embed_dim=8\.0"),
        ({"embed_dim": 8, "num_heads": True}, TypeError, "num_heads=True"),
        ({"embed_dim": 8, "num_heads": 2, "qk_dim": "4"}, TypeError, "qk_dim='4'"),
    ],
)
def test_bad_sizes(sizes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SelfAttention(pattern=FixedPattern(4, 1), **sizes)


@pytest.mark.plain
def test_an_odd_width_cannot_turn_in_pairs() -> None:
    layer = SelfAttention(embed_dim=6, num_heads=2, pattern=FixedPattern(4, 1))
    angles = (torch.ones(1, 5, 3), torch.zeros(1, 5, 3))
    with pytest.raises(ValueError, match=r"rotary needs an even width.*got head_dim=3"):
        layer(torch.randn(1, 5, 6), rotary=angles)
