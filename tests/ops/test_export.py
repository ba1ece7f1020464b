"""torch.export and ONNX with lengths that are left open: the numbers of the call itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from colonnade import FixedPattern, FullPattern, Pattern, StridedPattern, attention
from colonnade import attention_varlen as varlen
from colonnade.nn import SelfAttention
from tests.packing import cu_seqlens_of

pytestmark = pytest.mark.plain

PATTERNS: tuple[Pattern, ...] = (FixedPattern(4, 1, subblocks=2), StridedPattern(4), FullPattern())
LENGTH = torch.export.Dim("length", min=2, max=512)
QUERIES = torch.export.Dim("queries", min=2, max=512)
DOCUMENTS = torch.export.Dim("documents", min=2, max=64)
ROWS = torch.export.Dim("rows", min=2, max=64)


class _Attention(nn.Module):
    def __init__(self, pattern: Pattern, backend: str) -> None:
        super().__init__()
        self.pattern, self.backend = pattern, backend

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = attention(query, key, value, self.pattern, backend=self.backend)
        assert isinstance(out, Tensor)
        return out


class _Packed(_Attention):
    def forward(self, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor) -> Tensor:  # type: ignore[override]
        out = varlen(query, key, value, cu_seqlens, self.pattern, backend=self.backend)
        assert isinstance(out, Tensor)
        return out


def _whole(length: int) -> tuple[Tensor, ...]:
    return tuple(torch.randn(1, heads, length, 8) for heads in (4, 2, 2))


def _documents(length: int) -> tuple[Tensor, ...]:
    tensors = (t[0].transpose(0, 1).contiguous() for t in _whole(length))
    return *tensors, cu_seqlens_of((3, 0, *[1] * (length // 8), length - 3 - length // 8))


def _padded(length: int) -> tuple[Tensor | None, ...]:
    """Rows with padding on the left, on the right and in the middle."""
    mask = torch.ones(3, length, dtype=torch.bool)
    mask[0, :3] = mask[1, -4:] = mask[2, 2:5] = False
    return torch.randn(3, length, 16), None, None, mask


def _made(kind: str, pattern: Pattern, backend: str) -> tuple[nn.Module, Any, Any]:
    """Return a module, what draws its inputs for a length, and which of their sizes are open."""
    if kind == "layer":
        layer = SelfAttention(16, 4, pattern, 2, backend=backend).eval()
        return layer, lambda length: (torch.randn(1, length, 16),), ({1: LENGTH},)
    if kind == "padded":
        layer = SelfAttention(16, 4, pattern, 2, backend=backend).eval()
        return layer, _padded, ({0: ROWS, 1: LENGTH}, None, None, {0: ROWS, 1: LENGTH})
    if kind == "packed":
        sizes = (*[{0: LENGTH}] * 3, {0: DOCUMENTS})
        return _Packed(pattern, backend), _documents, sizes
    return _Attention(pattern, backend), _whole, ({2: LENGTH},) * 3


each_kind = pytest.mark.parametrize("kind", ["whole", "packed", "layer", "padded"])
each_backend = pytest.mark.parametrize(
    "backend",
    [
        "auto",
        "eager",
        pytest.param(
            "reference",
            marks=pytest.mark.skipif(
                torch.__version__ < "2.13",
                reason="PyTorch 2.11 does not see that min(n, 2n) is n, where heads share keys",
            ),
        ),
    ],
)
each_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=str)


@each_kind
@each_pattern
@each_backend
def test_one_program_for_all_lengths(backend: str, pattern: Pattern, kind: str) -> None:
    module, draw, sizes = _made(kind, pattern, backend)
    program = torch.export.export(module, draw(29), dynamic_shapes=sizes).module()
    for length in (13, 29, 57):
        given = draw(length)
        torch.testing.assert_close(program(*given), module(*given))


@each_pattern
@each_backend
def test_one_program_for_the_last_queries_and_for_all(backend: str, pattern: Pattern) -> None:
    module, sizes = _Attention(pattern, backend), ({2: QUERIES}, {2: LENGTH}, {2: LENGTH})
    query, key, value = _whole(29)
    program = torch.export.export(
        module, (query[:, :, 20:].contiguous(), key, value), dynamic_shapes=sizes
    )
    for q_len, kv_len in ((9, 29), (2, 13), (13, 13)):
        query, key, value = _whole(kv_len)
        given = query[:, :, kv_len - q_len :].contiguous(), key, value
        torch.testing.assert_close(program.module()(*given), module(*given))


@each_backend
def test_one_program_for_any_number_of_documents(backend: str) -> None:
    module, sizes = _Packed(PATTERNS[0], backend), (*[{0: LENGTH}] * 3, {0: torch.export.Dim("d")})
    program = torch.export.export(module, _documents(29), dynamic_shapes=sizes).module()
    *tensors, _ = _documents(29)
    for lengths in ([29], [0, 20, 9], [1] * 29):
        given = *tensors, cu_seqlens_of(lengths)
        torch.testing.assert_close(program(*given), module(*given))


@each_kind
@each_pattern
def test_a_program_for_onnx_holds_no_operation_of_ours(
    pattern: Pattern, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    module, draw, _ = _made(kind, pattern, "auto")
    program = torch.export.export(module, draw(29))
    assert "colonnade" not in str(program.graph)
    for missing in ("colonnade", "sort", "cummax"):  # ONNX knows no sort that is stable.
        assert missing not in str(program.graph)
    given = draw(29)
    torch.testing.assert_close(program.module()(*given), module(*given))


@pytest.mark.parametrize("backend", ["native", "eager"])
def test_a_named_backend_does_not_go_to_onnx(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    module, draw, _ = _made("whole", PATTERNS[0], backend)
    with pytest.raises(NotImplementedError, match=r"ONNX does not have\. Use backend='reference'"):
        torch.export.export(module, draw(29))


@each_kind
def test_tracing_is_refused(kind: str) -> None:
    """The older exporter to ONNX traces, too."""
    module, draw, _ = _made(kind, PATTERNS[0], "auto")
    *others, last = draw(29)
    with pytest.raises(NotImplementedError, match=r"torch\.jit\.trace.*Use torch\.export"):
        torch.jit.trace(lambda last: module(*others, last), (last,))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@each_kind
@each_pattern
def test_onnxruntime_computes_the_same(pattern: Pattern, kind: str, tmp_path: Any) -> None:
    """This needs onnx, onnxscript and onnxruntime, and is skipped without them."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    module, draw, sizes = _made(kind, pattern, "auto")
    program = torch.onnx.export(module, draw(29), dynamo=True, dynamic_shapes=sizes)
    assert program is not None
    program.save(tmp_path / "program.onnx")
    session = runtime.InferenceSession(tmp_path / "program.onnx")
    names = [each.name for each in session.get_inputs()]
    for length in (13, 29, 57):
        given = draw(length)
        present = (t.numpy() for t in given if t is not None)
        tensors = dict(zip(names, present, strict=True))
        found = torch.from_numpy(session.run(None, tensors)[0])
        torch.testing.assert_close(found, module(*given), rtol=1e-5, atol=1e-5)
