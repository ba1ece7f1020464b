"""PyTorch's counter of FLOPs: two for each multiply-add of each pair that is read, and no more.

Pairs are counted one by one in the oracle's masks. The backward counts five products against two,
as PyTorch's formula for its own attention does.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import (
    FlopCounterMode,
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from colonnade import FixedPattern, FullPattern, KVCache, LocalPattern, Pattern, StridedPattern
from colonnade.backends.dropout import Dropout
from colonnade.cost import Sizes, cost
from colonnade.nn import SelfAttention
from tests import fresh
from tests.cases import Case, attend, cases, each_pattern, mask_of, output, patterns
from tests.packing import attend_packed, cu_seqlens_of, cuts, packed, packed_case

WAYS = ("forward", "backward")
BACKENDS = ("eager", "native", "triton", "windowed")


def counted(call: Callable[..., object], *inputs: Any) -> dict[str, int]:
    """Return the FLOPs of each operation that a call runs."""
    with FlopCounterMode(display=False) as counter:
        call(*inputs)
    return {str(name): n for name, n in counter.get_flop_counts().get("Global", {}).items()}


def expected(case: Case, pairs: int) -> tuple[int, int]:
    """Return the FLOPs, forward and backward, of the pairs of one query head for each key head."""
    pairs *= case.batch * case.group
    return (
        2 * pairs * (case.qk_dim + case.v_dim),
        2 * pairs * (3 * case.qk_dim + 2 * case.v_dim),
    )


def split(found: dict[str, int]) -> tuple[int, int]:
    """Return what is counted for forward and for backward operations; there are no others."""
    forward, backward = (sum(n for name, n in found.items() if name.endswith(way)) for way in WAYS)
    assert forward + backward == sum(found.values())
    return forward, backward


@pytest.mark.parametrize("backend", ["auto", "eager"])
@settings(max_examples=20)
@given(case=cases(groups=(1, 3)))
def test_pairs_are_counted_as_they_are_read(backend: str, case: Case) -> None:
    inputs = case.inputs(torch.float32)
    found = split(counted(attend, case, inputs, backend))
    assert found == expected(case, int(case.mask().sum()))


@pytest.mark.parametrize("backend", ["auto", "eager"])
@settings(max_examples=20)
@given(case=cases(), lengths=st.integers(1, 20).flatmap(cuts))
def test_documents_are_counted_one_by_one(
    backend: str, case: Case, lengths: tuple[int, ...]
) -> None:
    case = packed_case(case, lengths)
    inputs, ends = case.inputs(torch.float32), cu_seqlens_of(lengths)
    found = split(counted(attend_packed, case, inputs, ends, backend))
    pairs = sum(int(mask_of(case.pattern, n, case.kv_heads).sum()) for n in lengths)
    assert found == expected(case, pairs)


def test_the_formulas_are_pytorchs_own_where_every_pair_is_read() -> None:
    case = Case(FullPattern(causal=False), q_len=7, group=1)
    inputs = case.inputs(torch.float32)
    query, key, value = (t.shape for t in inputs[:3])
    found = split(counted(attend, case, inputs, "eager"))
    assert found == (
        sdpa_flop_count(query, key, value),
        sdpa_backward_flop_count(inputs.grad_out.shape, query, key, value),
    )


@each_pattern
def test_without_a_log_sum_exp_it_is_the_same(pattern: Pattern) -> None:
    """Full patterns run in PyTorch's kernel then, which counts nothing on CPUs before 2.15."""
    case = Case(pattern, v_dim=4)
    leaves = case.inputs(torch.float32).leaves()
    found = split(counted(lambda: output(*leaves, pattern).sum().backward()))
    assert found == expected(case, int(case.mask().sum()))
    alone = split(counted(output, *case.inputs(torch.float32)[:3], pattern))
    assert alone == (found[0], 0)


def test_costs_and_counts_agree() -> None:
    pattern, sizes = FixedPattern(8, 2, subblocks=2), Sizes(6, 3, 24, 30, batch=2)
    case = Case(pattern, 2, 3, 2, 50, 50, sizes.qk_dim, sizes.v_dim)
    inputs = case.inputs(torch.float32)
    found = cost(pattern, 50, sizes)
    assert split(counted(attend, case, inputs, "auto")) == (
        found.forward_flops,
        found.backward_flops,
    )


def test_dropout_changes_no_count() -> None:
    case = Case(StridedPattern(4))
    inputs = case.inputs()
    found = split(counted(output, *inputs[:3], case.pattern, "auto", None, 0.5))
    assert found == (expected(case, int(case.mask().sum()))[0], 0)


@settings(max_examples=20)
@given(pattern=patterns(), lengths=st.integers(1, 24).flatmap(cuts))
def test_unknown_documents_count_as_one_which_is_the_most(
    pattern: Pattern, lengths: tuple[int, ...]
) -> None:
    case = packed_case(Case(pattern), lengths)
    tensors = case.inputs(torch.float32)[:3]
    total = int(mask_of(pattern, sum(lengths), case.kv_heads).sum())
    assert total >= sum(int(mask_of(pattern, n, case.kv_heads).sum()) for n in lengths)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in (*tensors, cu_seqlens_of(lengths))]
        found = split(counted(packed, *fakes, pattern))
    metas = [t.to("meta") for t in (*tensors, cu_seqlens_of(lengths))]
    assert found == split(counted(packed, *metas, pattern)) == (expected(case, total)[0], 0)


@pytest.mark.plain
@each_pattern
def test_fake_tensors_are_counted_like_others(pattern: Pattern) -> None:
    """With lengths that are symbols too: they count as those seen first, and stay symbols."""
    case = Case(pattern, q_len=11)
    tensors = case.inputs(torch.float32)[:3]
    for environment in (None, ShapeEnv()):
        with FakeTensorMode(shape_env=environment) as mode:
            fakes = [mode.from_tensor(t) for t in tensors]
            found = split(counted(output, *fakes, pattern))
        assert found == (expected(case, int(case.mask().sum()))[0], 0)
    assert not str(fakes[1].shape[2]).isdigit()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "pattern",
    [FixedPattern(4, 1, subblocks=2), FixedPattern(4, 1, part="summary"), LocalPattern(4)],
    ids=str,
)
def test_a_cache_counts_what_is_read(pattern: Pattern, dtype: torch.dtype) -> None:
    """A prompt, a chunk that goes on from it, and tokens: in all the pairs of the sequence.

    Without tokens where entries are marked, of which PyTorch's products compute all.
    """
    case = Case(pattern, q_len=26, kv_len=26)
    query, key, value = case.inputs(dtype)[:3]
    cache, flops = KVCache(pattern), 0
    last = [(n, n + 1) for n in range(21, 26)]
    if isinstance(pattern, FixedPattern) and pattern.part == "summary":
        last = [(21, 23), (23, 26)]
    for begin, end in [(0, 10), (10, 21), *last]:
        part = [t[:, :, begin:end] for t in (query, key, value)]
        with torch.no_grad():
            flops += sum(counted(cache.attend, *part).values())
    assert flops == expected(case, int(case.mask().sum()))[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_token_of_rows_of_different_lengths(dtype: torch.dtype) -> None:
    """C++ leaves out what is not marked; PyTorch's products compute everything that is kept."""
    case = Case(FixedPattern(4, 1), q_len=11, kv_len=11)
    query, key, value = case.inputs(dtype)[:3]
    mask = torch.arange(10) >= torch.tensor([[0], [4]])
    cache = KVCache(case.pattern)
    with torch.no_grad():
        cache.attend(query[:, :, :10], key[:, :, :10], value[:, :, :10], None, mask)
        token = query[:, :, 10:], key[:, :, 10:], value[:, :, 10:]
        native = "native runs" in str(cache.explain(*token))
        found = sum(counted(cache.attend, *token).values())
    # Two blocks of 4 and then 3 positions, and one block and then 3.
    read = (2 + 3) + (1 + 3) if native else 2 * (2 + 3)
    assert found == expected(replace(case, batch=1), case.kv_heads * read)[0]


def test_the_reference_counts_its_dense_products() -> None:
    case = Case(kv_len=13, q_len=13)
    inputs = case.inputs()
    found = counted(output, *inputs[:3], case.pattern, "reference")
    assert found == {"aten.bmm": expected(case, case.kv_heads * 13 * 13)[0]}


def _layer(pattern: Any) -> SelfAttention:
    return SelfAttention(16, 4, pattern, 2)


def test_a_layer_counts_its_projections_and_each_head_group() -> None:
    """Heads that read different patterns, forward, backward and recomputation."""
    pattern = FixedPattern(4, 1)
    layer, x = _layer(pattern.factors()), torch.randn(2, 13, 16, requires_grad=True)
    read = sum(int(mask_of(factor, 13).sum()) for factor in pattern.factors())
    forward, backward = expected(Case(qk_dim=4, v_dim=4), read)
    found = counted(lambda: layer(x).sum().backward())
    assert split({k: n for k, n in found.items() if "colonnade" in k}) == (forward, backward)
    # Query, output, and half as wide keys and values; twice that backward.
    assert sum(n for k, n in found.items() if "aten" in k) == 3 * 2 * 2 * 13 * 16 * 48
    again = counted(lambda: checkpoint(layer, x, use_reentrant=False).sum().backward())
    assert split({k: n for k, n in again.items() if "colonnade" in k}) == (2 * forward, backward)


def test_padding_is_not_counted() -> None:
    pattern, lengths = StridedPattern(4), (13, 5)
    layer, x = _layer(pattern), torch.randn(2, 13, 16)
    mask = torch.arange(13) < torch.tensor(lengths)[:, None]
    found = counted(lambda: layer(x, padding_mask=mask))
    read = sum(2 * int(mask_of(pattern, n).sum()) for n in lengths)
    case = Case(batch=1, qk_dim=4, v_dim=4)
    assert found["colonnade.windowed_forward"] == expected(case, read)[0]
    assert found["aten.addmm"] == 2 * sum(lengths) * 16 * 48


@pytest.mark.plain
@each_pattern
def test_transformed_attention_is_counted_too(pattern: Pattern) -> None:
    case = Case(pattern)
    query, key, value = case.inputs(torch.float32)[:3]

    def mapped(query: Tensor) -> Tensor:
        loss = torch.func.grad(lambda q: output(q, key, value, pattern, "eager").sum())
        grads = torch.vmap(loss)(query)
        assert isinstance(grads, Tensor)
        return grads

    found = split(counted(mapped, torch.stack([query] * 3)))
    assert found == expected(replace(case, batch=3 * case.batch), int(case.mask().sum()))


def test_a_formula_takes_what_inductor_adds() -> None:
    case = Case(LocalPattern(4))
    inputs = *case.inputs()[:3], 4, "window", 0, 1.0, 0, None, *Dropout()
    formula = flop_registry[torch.ops.colonnade.windowed_forward]
    found = formula(*inputs, out_val=None, _node_meta={})
    assert found == expected(case, int(case.mask().sum()))[0]


def test_modules_are_told_apart() -> None:
    model = nn.Sequential(_layer(FixedPattern(4, 1)), _layer(LocalPattern(4)))
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(1, 13, 16))
    names = {
        module: {str(name) for name in found if "colonnade" in str(name)}
        for module, found in counter.get_flop_counts().items()
    }
    assert names["Sequential.1"] == {"colonnade.windowed_forward"}
    assert len(names["Sequential.0"]) == 1
    assert "windowed" not in str(names["Sequential.0"])


@pytest.mark.parametrize("first", ["colonnade", "torch.utils.flop_counter"])
def test_either_may_be_imported_first(first: str) -> None:
    """`import colonnade` does not load PyTorch's counter, which loads triton."""
    code = f"""
import json, sys
sys.modules.pop("torch.utils.flop_counter", None)
import {first}
was_loaded = "torch.utils.flop_counter" in sys.modules
import colonnade
from torch.utils.flop_counter import flop_registry
names = sorted(str(name) for name in flop_registry if "colonnade" in str(name))
print(json.dumps([was_loaded, names]))
"""
    done = fresh.run(code)
    assert done.returncode == 0, done.stderr
    was_loaded, names = json.loads(done.stdout)
    assert was_loaded == (first != "colonnade")
    ways = [f"{name}_{way}" for name in BACKENDS for way in WAYS]
    assert names == sorted(f"colonnade.{name}" for name in ("native_decode", *ways))


@pytest.mark.parametrize(
    "way",
    [
        "importlib.util.find_spec(name)",
        "importlib.reload(importlib.import_module(name))",
        "importlib.import_module(name); del sys.modules[name]",
    ],
)
def test_a_counter_may_be_looked_for_and_loaded_again(way: str) -> None:
    code = f"""
import importlib.util, sys
import torch
import colonnade
name = "torch.utils.flop_counter"
sys.modules.pop(name, None)
{way}
from torch.utils.flop_counter import FlopCounterMode
x = torch.ones(1, 1, 8, 4)
with FlopCounterMode(display=False) as counter:
    colonnade.attention(x, x, x, colonnade.FixedPattern(4, 1), backend="eager")
print(counter.get_total_flops())
"""
    done = fresh.run(code)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 4 * 4 * FixedPattern(4, 1).num_pairs(8)
