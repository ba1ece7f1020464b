"""Padded and packed batches through the layer: each row, each document, is as if alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from colonnade import FixedPattern, FullPattern, LocalPattern, StridedPattern
from colonnade.nn import SelfAttention
from colonnade.ops.heads import Patterns
from tests.rounding import check_half_the_digits

PATTERNS: dict[str, Patterns] = {
    "fixed": FixedPattern(4, 1, subblocks=2),
    "bidirectional": FixedPattern(4, 1, causal=False),
    "strided": StridedPattern(3),
    "local": LocalPattern(3),
    "full": FullPattern(),
    "multihead": FixedPattern(4, 1).factors(),
}
each_pattern = pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS.keys())
MASKS = {
    "right": "11111110000 11111111111 11000000000",
    "left": "00001111111 11111111111 00000000001",
    "holes": "01011101110 10000000001 11111100000",
    "an empty row": "00000000000 11111111000 00000000000",
    "nothing at all": "00000000000 00000000000 00000000000",
}


def _mask(drawn: str) -> Tensor:
    return torch.tensor([[token == "1" for token in row] for row in drawn.split()])


def _angles(batch: int, seq_len: int, head_dim: int) -> tuple[Tensor, Tensor]:
    angle = 3 * torch.rand(batch, seq_len, head_dim // 2, dtype=torch.float64).repeat(1, 1, 2)
    return angle.cos(), angle.sin()


def _check_gradients(layer: SelfAttention, outs: list[Tensor], x: Tensor) -> None:
    """Assert that x and every parameter have the same gradients in both ways."""
    weight = torch.randn_like(outs[0])
    wanted = [x, *layer.parameters()]
    # Side by side: some are 0 but for rounding, as a key's bias moves all scores of a row alike.
    found, expected = (
        torch.cat([t.flatten() for t in torch.autograd.grad((out * weight).sum(), wanted)])
        for out in outs
    )
    check_half_the_digits(found, expected)


@each_pattern
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("drawn", MASKS.values(), ids=MASKS.keys())
def test_a_padded_row_is_the_row_alone(drawn: str, turned: bool, pattern: Patterns) -> None:
    """Its tokens together, wherever the padding is; 0 at padding; gradients too."""
    mask = _mask(drawn)
    layer = SelfAttention(8, 4, pattern, 2).double()
    x = torch.randn(3, 11, 8, dtype=torch.float64, requires_grad=True)
    rotary = _angles(3, 11, 2) if turned else None
    y = layer(x, padding_mask=mask, rotary=rotary)
    assert (y[~mask] == 0).all()
    expected = torch.zeros_like(y)
    for row in range(3):
        tokens = mask[row]
        alone = (
            None if rotary is None else (rotary[0][row, None, tokens], rotary[1][row, None, tokens])
        )
        if tokens.any():
            expected[row, tokens] = layer(x[row, None, tokens], rotary=alone)[0]
    check_half_the_digits(y, expected)
    if mask.any():
        _check_gradients(layer, [y, expected], x)


@each_pattern
def test_what_lies_under_padding_does_not_matter(pattern: Patterns) -> None:
    mask = _mask(MASKS["left"])
    layer = SelfAttention(8, 4, pattern).double()
    x = torch.randn(3, 11, 8, dtype=torch.float64)
    bad = x.masked_fill(~mask[..., None], torch.nan)
    assert torch.equal(layer(x, padding_mask=mask), layer(bad, padding_mask=mask))


@each_pattern
def test_one_run_of_angles_may_serve_all_padded_rows(pattern: Patterns) -> None:
    """Angles belong to places in the padded row, wherever its blocks begin."""
    mask = _mask(MASKS["left"])
    layer = SelfAttention(8, 4, pattern).double()
    x = torch.randn(3, 11, 8, dtype=torch.float64)
    cos, sin = _angles(1, 11, 2)
    each = (cos.repeat(3, 1, 1), sin.repeat(3, 1, 1))
    one, other = (layer(x, padding_mask=mask, rotary=rotary) for rotary in ((cos, sin), each))
    assert torch.equal(one, other)
    assert not torch.equal(one, layer(x, padding_mask=mask))


@each_pattern
@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)], ids=str)
def test_a_batch_of_nothing(shape: tuple[int, int], pattern: Patterns) -> None:
    layer = SelfAttention(8, 4, pattern)
    x = torch.randn(*shape, 8)
    mask = torch.ones(shape, dtype=torch.bool)
    for y in (layer(x), layer(x, padding_mask=mask), layer(x, rotary=(x[..., :2], x[..., :2]))):
        assert y.shape == x.shape
    assert layer(torch.randn(1, 0, 8), cu_seqlens=torch.tensor([0])).shape == (1, 0, 8)


def test_hooks_on_the_layer_see_a_padded_batch_once() -> None:
    """Sharding and offloading hang on them."""
    layer = SelfAttention(8, 4, FixedPattern(4, 1))
    seen = []
    layer.register_forward_hook(lambda module, args, y: seen.append((args[0].shape, y.shape)))
    x = torch.randn(3, 11, 8)
    layer(x, padding_mask=_mask(MASKS["left"]))
    assert seen == [(x.shape, x.shape)]


@each_pattern
@pytest.mark.parametrize("turned", [False, True])
def test_a_packed_document_is_the_document_alone(turned: bool, pattern: Patterns) -> None:
    layer = SelfAttention(8, 4, pattern, 2).double()
    x = torch.randn(1, 23, 8, dtype=torch.float64, requires_grad=True)
    rotary = _angles(1, 23, 2) if turned else None
    cu_seqlens = torch.tensor([0, 5, 5, 6, 23], dtype=torch.int32)
    y = layer(x, cu_seqlens=cu_seqlens, rotary=rotary)
    pieces = []
    for begin, end in ((0, 5), (5, 6), (6, 23)):
        part = slice(begin, end)
        alone = None if rotary is None else (rotary[0][:, part], rotary[1][:, part])
        pieces.append(layer(x[:, part], rotary=alone))
    expected = torch.cat(pieces, 1)
    check_half_the_digits(y, expected)
    _check_gradients(layer, [y, expected], x)


@pytest.mark.plain
def test_one_way_to_say_where_tokens_are() -> None:
    layer = SelfAttention(8, 2, FixedPattern(4, 1))
    x, cu_seqlens = torch.randn(2, 6, 8), torch.tensor([0, 6])
    mask = torch.ones(2, 6, dtype=torch.bool)
    with pytest.raises(ValueError, match="cu_seqlens or padding_mask, not both"):
        layer(x, cu_seqlens=cu_seqlens, padding_mask=mask)
    with pytest.raises(ValueError, match=r"\[1, total, embed_dim\], got x\.shape=\(2, 6, 8\)"):
        layer(x, cu_seqlens=cu_seqlens)
    with pytest.raises(TypeError, match=r"padding_mask must be a bool tensor.*got torch\.float32"):
        layer(x, padding_mask=mask.float())
    with pytest.raises(TypeError, match=r"padding_mask must be a bool tensor.*got list"):
        layer(x, padding_mask=mask.tolist())
    with pytest.raises(ValueError, match=r"padding_mask\.shape=\(2, 5\)"):
        layer(x, padding_mask=mask[:, 1:])


def test_padding_on_another_device() -> None:
    """A layer without data takes a mask that has some; not the other way round."""
    layer, mask = SelfAttention(16, 4, PATTERNS["fixed"]), _mask(MASKS["holes"])
    x = torch.randn(3, 11, 16)
    with pytest.raises(ValueError, match=r"padding_mask must have data.*device=meta and x\."):
        layer(x, padding_mask=mask.to("meta"))
    layer, x = layer.to("meta"), x.to("meta")
    for each in (mask, mask.to("meta")):
        assert layer(x, padding_mask=each).shape == x.shape
    with pytest.raises(NotImplementedError, match=r"padding_mask.*no contents"):
        layer(x, layer.new_cache(), padding_mask=mask)
