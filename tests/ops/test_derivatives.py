"""Every mode of differentiation is right, or refused by name: none gives zeros.

What is right comes from backend "reference", which is plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, functional

from colonnade import (
    FixedPattern,
    FullPattern,
    KVCache,
    LocalPattern,
    Pattern,
    StridedPattern,
    attention,
    attention_varlen,
    backends,
    explain,
)

pytestmark = pytest.mark.plain

PATTERNS: tuple[Pattern, ...] = (
    FixedPattern(4, 1),
    FixedPattern(4, 1, subblocks=2, causal=False),
    FixedPattern(4, 1, part="summary"),
    StridedPattern(4),
    LocalPattern(3),
    FullPattern(),
)
Function = Callable[[Tensor], Tensor]
LAYOUTS = ("whole", "last queries", "packed")


def _takes(backend: str, pattern: Pattern) -> bool:
    return backend == "eager" or (isinstance(pattern, FixedPattern) and pattern.causal)


CASES = [
    pytest.param(backend, pattern, layout, id=f"{backend}-{pattern}-{layout}")
    for backend in ("eager", "native")
    for pattern in PATTERNS
    for layout in LAYOUTS
    if _takes(backend, pattern)
]
each_case = pytest.mark.parametrize(("backend", "pattern", "layout"), CASES)


def _function(backend: str, pattern: Pattern, layout: str, reduce: bool = True) -> Function:
    """Return a function of x [batch, 2, 11, 8], on which queries, keys and values depend."""
    if backend == "native" and (why_not := backends()["native"]):
        pytest.skip(f"native {why_not}")

    def attend(x: Tensor) -> Tensor:
        key, value = x.sin(), x.cos()
        options: dict[str, Any] = {"backend": backend, "scale": 0.7}
        if layout == "packed":
            cu_seqlens = torch.tensor([0, 3, 3, 11])
            q, k, v = (t[0].transpose(0, 1) for t in (x, key, value))
            out: Tensor = attention_varlen(q, k, v, cu_seqlens, pattern, **options)
        else:
            query = x if layout == "whole" else x[:, :, 6:]
            out = attention(query, key, value, pattern, **options)
        return (out * out).sum() if reduce else out

    return attend


def _x(*batches: int) -> Tensor:
    return torch.randn(*batches, 1, 2, 11, 8)


def _second(function: Function, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(function(x), x, create_graph=True)
    (second,) = torch.autograd.grad((grad * grad).sum(), x)
    return second


SECOND: dict[str, Callable[[Function, Tensor], Any]] = {
    "gradient penalty": _second,
    "functional.hessian": functional.hessian,
    "func.hessian": lambda function, x: torch.func.hessian(function)(x),
    "grad of grad": lambda function, x: torch.func.grad(
        lambda y: (torch.func.grad(function)(y) ** 2).sum()
    )(x),
}


@each_case
@pytest.mark.parametrize("way", SECOND)
def test_second_derivatives_are_refused(
    way: str, backend: str, pattern: Pattern, layout: str
) -> None:
    function = _function(backend, pattern, layout)
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        SECOND[way](function, _x())


def test_the_reference_has_second_derivatives() -> None:
    """Against differences of first ones, in float64."""
    function = _function("reference", PATTERNS[0], "whole")
    x = _x().double().requires_grad_()
    assert torch.autograd.gradgradcheck(function, x)


def _forward_mode(function: Function, x: Tensor) -> Tensor:
    tangent: Tensor = torch.func.jvp(function, (x,), (torch.ones_like(x),))[1]
    return tangent


def _dual(function: Function, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        out = function(forward_ad.make_dual(x, torch.ones_like(x)))
        tangent: Tensor | None = forward_ad.unpack_dual(out).tangent
        assert tangent is not None
        return tangent


@each_case
@pytest.mark.parametrize("way", [_forward_mode, _dual])
def test_forward_mode_is_right_or_refused(
    way: Callable[[Function, Tensor], Tensor], backend: str, pattern: Pattern, layout: str
) -> None:
    x = _x()
    expected = way(_function("reference", pattern, layout), x)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(way(_function("auto", pattern, layout), x), expected)
    with pytest.raises(NotImplementedError, match=r"forward mode.*backend='reference'"):
        way(_function(backend, pattern, layout), x)


def test_forward_mode_is_explained() -> None:
    x = _x()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        explanation = explain(dual, x, x, PATTERNS[0])
    assert explanation.backend == "reference"
    assert "forward mode" in explanation.others["eager"]


def test_a_decoders_token_has_forward_mode_too() -> None:
    x = _x()

    def read(backend: str) -> Function:
        cache = KVCache(PATTERNS[0], backend=backend)
        cache.append(*(t[:, :, :10] for t in (x.sin(), x.cos())))
        entries = cache.append(*(t[:, :, 10:] for t in (x.sin(), x.cos())))
        return lambda query: cache.read(query, entries)

    token = x[:, :, 10:]
    expected = _forward_mode(read("reference"), token)
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(_forward_mode(read("auto"), token), expected)
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        _forward_mode(read("eager"), token)


TRANSFORMED: dict[str, tuple[bool, tuple[int, ...], Callable[[Function], Function]]] = {
    "grad": (True, (), torch.func.grad),
    "grad, mapped": (True, (3,), lambda function: torch.vmap(torch.func.grad(function))),
    "mapped, grad": (
        True,
        (3,),
        lambda function: torch.func.grad(lambda x: torch.vmap(function)(x).sum()),
    ),
    "mapped": (False, (3,), torch.vmap),
    "mapped twice": (False, (2, 3), lambda function: torch.vmap(torch.vmap(function))),
    "jacobian": (False, (), torch.func.jacrev),
}


# A jacobian maps the backward of PyTorch's own kernel for full patterns, which says so.
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@each_case
@pytest.mark.parametrize("way", TRANSFORMED)
def test_transformations_are_those_of_the_reference(
    way: str, backend: str, pattern: Pattern, layout: str
) -> None:
    reduce, batches, transform = TRANSFORMED[way]
    x = _x(*batches)
    found, expected = (
        transform(_function(name, pattern, layout, reduce))(x) for name in (backend, "reference")
    )
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pattern", [PATTERNS[0], PATTERNS[3]], ids=str)
@pytest.mark.parametrize("randomness", ["same", "different", "error"])
def test_mapping_draws_as_it_is_told_to(pattern: Pattern, randomness: str) -> None:
    x = _x().expand(4, 1, 2, 11, 8)

    def drop(x: Tensor) -> Tensor:
        out = attention(x, x, x, pattern, dropout_p=0.5, backend="eager")
        assert isinstance(out, Tensor)
        return out

    mapped = torch.vmap(drop, randomness=randomness)
    if randomness == "error":
        with pytest.raises(RuntimeError, match="random"):
            mapped(x)
        return
    first, *others = mapped(x)
    assert all(torch.equal(first, other) == (randomness == "same") for other in others)


@each_case
def test_a_functionalized_call_is_the_call(backend: str, pattern: Pattern, layout: str) -> None:
    function = _function(backend, pattern, layout)
    x = _x().requires_grad_()
    found, expected = torch.func.functionalize(function)(x), function(x)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, x), torch.autograd.grad(expected, x))


@pytest.mark.parametrize(
    "transform",
    [
        lambda function: torch.func.functionalize(torch.func.grad(function)),
        lambda function: torch.func.grad(torch.func.functionalize(function)),
        lambda function: lambda x: torch.vmap(torch.func.functionalize(function))(x[None]),
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_functionalize_among_others_takes_the_reference(
    layout: str, transform: Callable[[Function], Function]
) -> None:
    x = _x()
    found, expected = (
        transform(_function(backend, PATTERNS[0], layout))(x) for backend in ("auto", "reference")
    )
    assert torch.equal(found, expected)
    with pytest.raises(NotImplementedError, match=r"functionalize.*backend='reference'"):
        transform(_function("eager", PATTERNS[0], layout))(x)


@each_case
def test_a_mapping_over_nothing(backend: str, pattern: Pattern, layout: str) -> None:
    function, x = _function(backend, pattern, layout, reduce=False), _x(0).requires_grad_()
    out = torch.vmap(function)(x)
    assert out.shape == (0, *function(_x()).shape)
    assert torch.autograd.grad(out.sum(), x)[0].shape == x.shape
    assert torch.vmap(torch.func.grad(lambda x: function(x).sum()))(x).shape == x.shape


@each_case
def test_the_jacobian_of_nothing(backend: str, pattern: Pattern, layout: str) -> None:
    def attend(x: Tensor) -> Tensor:
        if layout == "packed":
            out = attention_varlen(x, x, x, torch.tensor([0]), pattern, backend=backend)
        else:
            out = attention(x[None], x[None], x[None], pattern, backend=backend)
        assert isinstance(out, Tensor)
        return out

    x = torch.zeros(0, 2, 8) if layout == "packed" else torch.zeros(2, 0, 8)
    jacobian = torch.func.jacrev(attend)(x)
    assert isinstance(jacobian, Tensor)
    assert jacobian.shape == (*attend(x).shape, *x.shape)


def test_a_mapping_over_no_documents() -> None:
    x, cu_seqlens = torch.randn(11, 2, 8), torch.zeros(0, 3, dtype=torch.long)
    for backend in ("auto", "eager", "reference"):
        out = torch.vmap(
            lambda ends, b=backend: attention_varlen(x, x, x, ends, PATTERNS[0], backend=b)
        )(cu_seqlens)
        assert out.shape == (0, 11, 2, 8)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_each_row_of_a_mapping_may_have_its_own_documents(pattern: Pattern) -> None:
    x = torch.randn(11, 2, 8)
    cu_seqlens = torch.tensor([[0, 3, 11], [0, 7, 11]])

    def attend(backend: str) -> Function:
        return lambda ends: attention_varlen(x, x, x, ends, pattern, backend=backend)

    expected = torch.stack([attend("reference")(ends) for ends in cu_seqlens])
    for backend in ("auto", "eager", "reference"):
        torch.testing.assert_close(torch.vmap(attend(backend))(cu_seqlens), expected)


def test_a_mapping_over_documents_needs_a_pattern() -> None:
    """An object that has only a mask draws one for each length, which nobody knows there."""

    class Mask:
        def mask(self, seq_len: int, num_heads: int) -> Tensor:
            return torch.ones(num_heads, seq_len, seq_len, dtype=torch.bool)

    x = torch.randn(11, 2, 8)
    with pytest.raises(NotImplementedError, match=r"torch\.vmap maps it.*Use a Pattern"):
        torch.vmap(lambda ends: attention_varlen(x, x, x, ends, Mask()))(torch.tensor([[0, 11]]))


@pytest.mark.parametrize("transform", [torch.func.grad, lambda f: lambda x: _forward_mode(f, x)])
def test_compiled_transformations_are_right(transform: Callable[[Function], Function]) -> None:
    x = _x()
    torch.compiler.reset()
    function = transform(_function("auto", PATTERNS[0], "whole"))
    expected = transform(_function("reference", PATTERNS[0], "whole"))(x)
    torch.testing.assert_close(torch.compile(function, backend="aot_eager")(x), expected)


@each_case
def test_forward_mode_over_a_backward_is_refused(
    backend: str, pattern: Pattern, layout: str
) -> None:
    """The weight after attention has a tangent: so has the gradient, although no input has one."""
    x, weight = _x().requires_grad_(), torch.randn(8, 8)
    out = _function(backend, pattern, layout, reduce=False)(x)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(weight, torch.ones_like(weight))
        loss = ((out @ dual) ** 2).sum()
        with pytest.raises(NotImplementedError, match="backend='reference'"):
            torch.autograd.grad(loss, x)


@each_case
def test_batched_gradients_are_one_after_the_other(
    backend: str, pattern: Pattern, layout: str
) -> None:
    x = _x().requires_grad_()
    out = _function(backend, pattern, layout, reduce=False)(x)
    grads = torch.randn(3, *out.shape)
    (found,) = torch.autograd.grad(out, x, grads, is_grads_batched=True, retain_graph=True)
    alone = [torch.autograd.grad(out, x, grad, retain_graph=True)[0] for grad in grads]
    torch.testing.assert_close(found, torch.stack(alone), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_documents_edited_after_the_forward_do_not_change_gradients(pattern: Pattern) -> None:
    x = torch.randn(11, 2, 8, requires_grad=True)
    cu_seqlens = torch.tensor([0, 3, 11])
    expected = torch.autograd.grad(attention_varlen(x, x, x, cu_seqlens, pattern).sum(), x)
    out = attention_varlen(x, x, x, cu_seqlens, pattern)
    cu_seqlens.numpy()[1] = 7
    torch.testing.assert_close(torch.autograd.grad(out.sum(), x), expected)
