"""Mistakes of a user: each one raises, and the message names the argument and its value.

These run without the type-checking plugin, which would raise before the package can.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from colonnade import (
    FixedPattern,
    FullPattern,
    LocalPattern,
    Pattern,
    StridedPattern,
    attention,
    attention_varlen,
    backends,
    explain,
)

pytestmark = pytest.mark.plain

FIXED = FixedPattern(4, 1)
SHAPES = {"query": (2, 4, 6, 8), "key": (2, 2, 6, 8), "value": (2, 2, 6, 8)}


def _shaped(**shapes: tuple[int, ...]) -> list[Any]:
    """Return query, key and value, some of them of another shape than fits."""
    return [torch.zeros(shape) for shape in (SHAPES | shapes).values()]


def _changed(**changes: Callable[[Tensor], object]) -> list[Any]:
    """Return query, key and value, some of them made into something else."""
    tensors: dict[str, Any] = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    for name, change in changes.items():
        tensors[name] = change(tensors[name])
    return list(tensors.values())


class _Drawn:
    """An object whose method `mask` gives whatever it was made with."""

    def __init__(self, drawn: object) -> None:
        self.drawn = drawn

    def mask(self, seq_len: int, num_heads: int) -> object:
        return self.drawn


def _meta(tensor: Tensor) -> Tensor:
    return tensor.to("meta")


@pytest.mark.parametrize("function", [attention, explain])
@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        (_changed(query=lambda _: None), TypeError, "query must be a tensor, got a NoneType"),
        (_changed(key=Tensor.tolist), TypeError, "key must be a tensor, got a list"),
        (_changed(value=Tensor.numpy), TypeError, "value must be a tensor, got a ndarray"),
        (_changed(query=Tensor.long), TypeError, r"query\.dtype=torch\.int64"),
        (_changed(key=Tensor.bool), TypeError, r"key\.dtype=torch\.bool"),
        (_changed(value=lambda t: t + 0j), TypeError, r"value\.dtype=torch\.complex64"),
        (_changed(key=Tensor.to_sparse), TypeError, r"key\.layout=torch\.sparse_coo"),
        (
            _changed(key=Tensor.double),
            TypeError,
            r"one dtype, got query\.dtype=torch\.float32, key\.dtype=torch\.float64",
        ),
        (_changed(value=Tensor.half), TypeError, r"one dtype.*value\.dtype=torch\.float16"),
        (_changed(key=_meta), ValueError, r"one device.*key\.device=meta, value\.device=cpu"),
        (_changed(query=_meta), ValueError, r"one device, got query\.device=meta"),
        (_shaped(query=(4, 6, 8)), ValueError, r"\[batch, heads.*query\.shape=\(4, 6, 8\)"),
        (_shaped(value=(1, 2, 2, 6, 8)), ValueError, r"value\.shape=\(1, 2, 2, 6, 8\)"),
        (_shaped(query=(3, 4, 6, 8)), ValueError, r"agree in batch.*query\.shape=\(3, 4, 6, 8\)"),
        (_shaped(key=(1, 2, 6, 8)), ValueError, r"agree in batch.*key\.shape=\(1, 2, 6, 8\)"),
        (_shaped(value=(1, 2, 6, 8)), ValueError, r"agree in batch.*value\.shape=\(1, 2, 6, 8\)"),
        (_shaped(query=(2, 4, 6, 7)), ValueError, r"head width.*query\.shape=\(2, 4, 6, 7\)"),
        (_shaped(key=(2, 1, 6, 8)), ValueError, r"key and value in heads.*key\.shape=\(2, 1,"),
        (_shaped(value=(2, 2, 5, 8)), ValueError, r"and length.*value\.shape=\(2, 2, 5, 8\)"),
        (
            _shaped(query=(2, 3, 6, 8)),
            ValueError,
            r"multiple of key's.*query\.shape=\(2, 3, 6, 8\), key\.shape=\(2, 2, 6, 8\)",
        ),
        (_shaped(query=(2, 1, 6, 8)), ValueError, r"multiple of key's.*query\.shape=\(2, 1,"),
        (_shaped(query=(2, 0, 6, 8)), ValueError, r"at least 1.*query\.shape=\(2, 0, 6, 8\)"),
        (
            _shaped(key=(2, 0, 6, 8), value=(2, 0, 6, 8)),
            ValueError,
            r"at least 1.*key\.shape=\(2, 0, 6, 8\)",
        ),
        (
            _shaped(query=(2, 4, 6, 0), key=(2, 2, 6, 0)),
            ValueError,
            r"widths must be at least 1.*query\.shape=\(2, 4, 6, 0\)",
        ),
        (_shaped(value=(2, 2, 6, 0)), ValueError, r"widths.*value\.shape=\(2, 2, 6, 0\)"),
        (
            _shaped(query=(2, 4, 7, 8)),
            ValueError,
            r"not be longer than key.*query\.shape=\(2, 4, 7, 8\), key\.shape=\(2, 2, 6, 8\)",
        ),
    ],
)
def test_tensors(
    tensors: list[Any],
    error: type[Exception],
    message: str,
    function: Callable[..., object],
) -> None:
    with pytest.raises(error, match=message):
        function(*tensors, FIXED)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scale": math.nan}, ValueError, "scale must be finite, got scale=nan"),
        ({"scale": -math.inf}, ValueError, "scale must be finite, got scale=-inf"),
        ({"scale": 10**400}, ValueError, "scale must be finite, got scale=1000"),
        ({"backend": ["eager"]}, TypeError, r"backend must be a str, got backend=\['eager'\]"),
        ({"scale": True}, TypeError, "scale must be a float, got scale=True"),
        ({"scale": "0.5"}, TypeError, "got scale='0.5'"),
        ({"scale": torch.tensor(0.5)}, TypeError, r"got scale=tensor\(0\.5"),
        ({"dropout_p": -0.1}, ValueError, r"in \[0, 1\], got dropout_p=-0\.1"),
        ({"dropout_p": 1.5}, ValueError, r"in \[0, 1\], got dropout_p=1\.5"),
        ({"dropout_p": math.nan}, ValueError, "dropout_p must be finite, got dropout_p=nan"),
        ({"dropout_p": None}, TypeError, "got dropout_p=None"),
        ({"dropout_p": False}, TypeError, "got dropout_p=False"),
        (
            {"backend": "flash"},
            ValueError,
            r"\['auto', 'eager', 'native', 'reference', 'triton'\].*backend='flash'",
        ),
        ({"backend": "Eager"}, ValueError, "got backend='Eager'"),
        ({"backend": None}, TypeError, "backend must be a str, got backend=None"),
        ({"pattern": None}, TypeError, "pattern must be a Pattern.*got a NoneType"),
        ({"pattern": "fixed"}, TypeError, r"mask\(seq_len, num_heads\), got a str"),
        ({"pattern": FIXED.factors()}, TypeError, "got a tuple"),
        ({"pattern": torch.ones(6, 6)}, TypeError, "got a Tensor"),
        ({"pattern": FIXED.mask}, TypeError, "got a method"),
        ({"pattern": FixedPattern}, TypeError, "got the class FixedPattern"),
        ({"pattern": _Drawn(torch.ones(2, 6, 6))}, ValueError, r"bool tensor.*torch\.float32"),
        (
            {"pattern": _Drawn(torch.ones(6, 6, dtype=torch.bool))},
            ValueError,
            r"= \(2, 6, 6\), got torch\.bool of shape \(6, 6\)",
        ),
        ({"pattern": _Drawn([True])}, ValueError, r"got \[True\]"),
    ],
)
def test_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    options = {"pattern": FIXED} | options
    with pytest.raises(error, match=message):
        attention(*_shaped(), **options)
    if not isinstance(options["pattern"], _Drawn):  # Nothing is drawn to explain.
        with pytest.raises(error, match=message):
            explain(*_shaped(), **options)


PACKED = {"query": (6, 4, 8), "key": (6, 2, 8), "value": (6, 2, 8)}
GOOD = torch.tensor([0, 2, 6])


@pytest.mark.parametrize("backend", sorted(name for name, why in backends().items() if why is None))
@pytest.mark.parametrize("lengths", [[1, 6], [0, 4, 2, 6], [0, 5], [0, 7], [0, -1, 6], [0, 6, 5]])
def test_what_cu_seqlens_says(lengths: list[int], backend: str) -> None:
    """It starts at 0, does not decrease and ends at the number of tokens: in every backend."""
    query, key, value = (torch.zeros(shape) for shape in PACKED.values())
    cu_seqlens = torch.tensor(lengths)
    with pytest.raises(
        ValueError, match=r"cu_seqlens must .*got cu_seqlens\[-?\d\]=-?\d"
    ) as raised:
        attention_varlen(query, key, value, cu_seqlens, FIXED, backend=backend)
    with pytest.raises(ValueError, match=r"cu_seqlens must .*got cu_seqlens\[-?\d\]=-?\d"):
        explain(query, key, value, FIXED, cu_seqlens=cu_seqlens, backend=backend)
    assert any(str(number) in str(raised.value) for number in lengths)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"cu_seqlens": [0, 2, 6]}, TypeError, "cu_seqlens must be a tensor, got a list"),
        ({"cu_seqlens": None}, TypeError, "cu_seqlens must be a tensor, got a NoneType"),
        ({"cu_seqlens": GOOD.float()}, TypeError, r"got cu_seqlens\.dtype=torch\.float32"),
        ({"cu_seqlens": GOOD.bool()}, TypeError, r"got cu_seqlens\.dtype=torch\.bool"),
        ({"cu_seqlens": GOOD.short()}, TypeError, r"got cu_seqlens\.dtype=torch\.int16"),
        ({"cu_seqlens": GOOD[None]}, ValueError, r"got cu_seqlens\.shape=\(1, 3\)"),
        ({"cu_seqlens": GOOD[0]}, ValueError, r"got cu_seqlens\.shape=\(\)"),
        ({"cu_seqlens": GOOD[:0]}, ValueError, r"got cu_seqlens\.shape=\(0,\)"),
        ({"query": torch.zeros(5, 4, 8)}, ValueError, r"in length.*query\.shape=\(5, 4, 8\)"),
        ({"key": torch.zeros(7, 2, 8)}, ValueError, r"in length.*key\.shape=\(7, 2, 8\)"),
        ({"value": torch.zeros(6, 1, 8)}, ValueError, r"in length.*value\.shape=\(6, 1, 8\)"),
        ({"query": torch.zeros(6, 3, 8)}, ValueError, r"multiple of key's.*\(6, 3, 8\)"),
        ({"query": torch.zeros(1, 4, 6, 8)}, ValueError, r"\[total, heads, head_dim\], got query"),
        ({"value": torch.zeros(6, 2, 0)}, ValueError, r"at least 1.*value\.shape=\(6, 2, 0\)"),
        ({"key": torch.zeros(6, 2, 8).half()}, TypeError, r"one dtype.*key\.dtype=torch\.float16"),
        ({"pattern": None}, TypeError, "pattern must be a Pattern.*got a NoneType"),
        ({"scale": math.inf}, ValueError, "scale must be finite, got scale=inf"),
        ({"dropout_p": 2.0}, ValueError, r"in \[0, 1\], got dropout_p=2\.0"),
        ({"backend": "flash"}, ValueError, "got backend='flash'"),
    ],
)
def test_packed(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {name: torch.zeros(shape) for name, shape in PACKED.items()}
    arguments |= {"cu_seqlens": GOOD, "pattern": FIXED} | changes
    with pytest.raises(error, match=message):
        attention_varlen(**arguments)
    if arguments["cu_seqlens"] is not None:
        with pytest.raises(error, match=message):
            explain(**arguments)


@pytest.mark.parametrize("function", [attention_varlen, explain])
def test_cu_seqlens_without_data(function: Callable[..., Any]) -> None:
    """Tensors without data take boundaries that have some, if they are right."""
    tensors = {name: torch.zeros(shape) for name, shape in PACKED.items()}
    with pytest.raises(ValueError, match=r"cu_seqlens must have data.*device=meta and query\."):
        function(**tensors, cu_seqlens=_meta(GOOD), pattern=FIXED)
    tensors = {name: _meta(tensor) for name, tensor in tensors.items()}
    function(**tensors, cu_seqlens=GOOD, pattern=FIXED)
    function(**tensors, cu_seqlens=_meta(GOOD), pattern=FIXED)
    with pytest.raises(ValueError, match=r"must start at 0, got cu_seqlens\[0\]=1"):
        function(**tensors, cu_seqlens=GOOD + 1, pattern=FIXED)


HUGE = 2**40
"""Tokens of tensors that hold one number: whatever touched them all would need terabytes."""


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"query": (1, 3, HUGE, 8)}, ValueError),
        ({"query": (1, 4, HUGE + 1, 8)}, ValueError),
        ({"key": (1, 2, HUGE, 9)}, ValueError),
        ({"value": (1, 2, HUGE - 1, 8)}, ValueError),
        ({"pattern": 3}, TypeError),
        ({"scale": math.nan}, ValueError),
        ({"dropout_p": -1.0}, ValueError),
        ({"backend": "flash"}, ValueError),
        ({"dtype": torch.int8}, TypeError),
    ],
    ids=str,
)
def test_mistakes_are_met_before_anything_large_is_made(
    changes: dict[str, Any], error: type[Exception]
) -> None:
    shapes = {"query": (1, 4, HUGE, 8), "key": (1, 2, HUGE, 8), "value": (1, 2, HUGE, 8)}
    dtype = changes.pop("dtype", torch.float32)
    for name in shapes:
        shapes[name] = changes.pop(name, shapes[name])
    tensors: dict[str, Any] = {
        n: torch.zeros((), dtype=dtype).expand(shape) for n, shape in shapes.items()
    }
    with pytest.raises(error):
        attention(**({**tensors, "pattern": FIXED} | changes))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"summary": 160}, ValueError, r"in \[1, stride\], got summary=160 and stride=128"),
        ({"summary": 0}, ValueError, "got summary=0 and stride=128"),
        ({"summary": -8}, ValueError, "got summary=-8"),
        ({"stride": 0}, ValueError, "stride must be at least 1, got stride=0"),
        ({"stride": -128}, ValueError, "got stride=-128"),
        ({"subblocks": 0}, ValueError, "subblocks must be at least 1, got subblocks=0"),
        ({"subblocks": 17}, ValueError, "got subblocks=17, summary=8 and stride=128"),
        ({"part": "strided"}, ValueError, "'merged', 'local', 'summary'.*got part='strided'"),
        ({"part": None}, ValueError, "got part=None"),
        ({"part": ["merged"]}, ValueError, r"got part=\['merged'\]"),
        ({"stride": 128.0}, TypeError, r"stride must be an int, got stride=128\.0"),
        ({"stride": True}, TypeError, "got stride=True"),
        ({"stride": None}, TypeError, "got stride=None"),
        ({"summary": "8"}, TypeError, "summary must be an int, got summary='8'"),
        ({"summary": torch.tensor(8)}, TypeError, r"got summary=tensor\(8\)"),
        ({"subblocks": 2.0}, TypeError, r"subblocks must be an int, got subblocks=2\.0"),
        ({"causal": 1}, TypeError, "causal must be a bool, got causal=1"),
        ({"causal": "yes"}, TypeError, "got causal='yes'"),
    ],
)
def test_fixed_pattern(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FixedPattern(**({"stride": 128, "summary": 8} | arguments))


@pytest.mark.parametrize("causal", [None, 0, "full"])
def test_full_pattern(causal: Any) -> None:
    with pytest.raises(TypeError, match=f"causal must be a bool, got causal={causal!r}"):
        FullPattern(causal=causal)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"stride": 0}, ValueError, "stride must be at least 1, got stride=0"),
        ({"stride": 4.0}, TypeError, r"stride must be an int, got stride=4\.0"),
        ({"stride": True}, TypeError, "got stride=True"),
        ({"stride": 4, "part": "fixed"}, ValueError, "'merged', 'local', 'summary'.*part='fixed'"),
        ({"stride": 4, "part": ["local"]}, ValueError, r"got part=\['local'\]"),
    ],
)
def test_strided_pattern(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        StridedPattern(**arguments)


@pytest.mark.parametrize(
    ("window", "error", "message"),
    [
        (0, ValueError, "window must be at least 1, got window=0"),
        (-4, ValueError, "got window=-4"),
        (None, TypeError, "window must be an int, got window=None"),
        (True, TypeError, "got window=True"),
    ],
)
def test_local_pattern(window: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LocalPattern(window)


@pytest.mark.parametrize("pattern", [FIXED, StridedPattern(4), LocalPattern(4), FullPattern()])
@pytest.mark.parametrize(
    ("method", "arguments", "error", "message"),
    [
        ("indices", {"i": -1}, ValueError, "i must be at least 0, got i=-1"),
        ("indices", {"i": 5, "seq_len": 5}, ValueError, "got i=5 and seq_len=5"),
        ("indices", {"i": 0, "seq_len": -5}, ValueError, "got seq_len=-5"),
        ("indices", {"i": 0, "head": -1}, ValueError, "head must be at least 0, got head=-1"),
        ("indices", {"i": 1.0}, TypeError, r"i must be an int, got i=1\.0"),
        ("indices", {"i": True}, TypeError, "got i=True"),
        ("mask", {"seq_len": -1}, ValueError, "got seq_len=-1"),
        ("mask", {"seq_len": 4.0}, TypeError, r"got seq_len=4\.0"),
        ("mask", {"seq_len": 4, "num_heads": 0}, ValueError, "got num_heads=0"),
        ("mask", {"seq_len": 4, "num_heads": True}, TypeError, "got num_heads=True"),
        ("num_pairs", {"seq_len": -4}, ValueError, "got seq_len=-4"),
        ("num_pairs", {"seq_len": False}, TypeError, "got seq_len=False"),
        ("num_pairs", {"seq_len": 4, "head": -1}, ValueError, "got head=-1"),
        ("num_pairs", {"seq_len": 4, "head": 0.5}, TypeError, r"got head=0\.5"),
        ("density", {"seq_len": 0}, ValueError, "seq_len must be at least 1, got seq_len=0"),
        ("density", {"seq_len": 4.5}, TypeError, r"got seq_len=4\.5"),
    ],
)
def test_methods(
    method: str,
    arguments: dict[str, Any],
    error: type[Exception],
    message: str,
    pattern: Pattern,
) -> None:
    with pytest.raises(error, match=message):
        getattr(pattern, method)(**arguments)


@pytest.mark.parametrize("pattern", [FixedPattern(4, 1, causal=False), FullPattern(causal=False)])
def test_a_bidirectional_set_needs_the_length(pattern: FixedPattern | FullPattern) -> None:
    with pytest.raises(ValueError, match=r"needs seq_len, got seq_len=None.*causal=False"):
        pattern.indices(0)


@pytest.mark.parametrize(
    ("seq_len", "summary", "error", "message"),
    [
        (0, 1, ValueError, "seq_len must be at least 1, got seq_len=0"),
        (4, 0, ValueError, "summary must be at least 1, got summary=0"),
        (4, 5, ValueError, "at most seq_len, got summary=5 and seq_len=4"),
        (4.0, 1, TypeError, r"got seq_len=4\.0"),
        (4, True, TypeError, "got summary=True"),
    ],
)
def test_best_stride(seq_len: Any, summary: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FixedPattern.best_stride(seq_len, summary)
