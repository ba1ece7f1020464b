"""An operation and its gradients, stated once for all backends.

An operation takes query, key, value and its options, and gives output and log-sum-exp. Its backward
takes the gradients of both, then query, key and value, those results that it asked to be saved, and
the options; it gives the gradients of query, key and value. It has no derivatives of second order,
and says so when one is asked for.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import profiler
from torch.autograd.forward_ad import unpack_dual
from torch.utils._python_dispatch import (
    _get_current_dispatch_mode_stack,
    is_in_torch_dispatch_mode,
)

from colonnade.backends.tracing.autocast import without_autocast
from colonnade.backends.tracing.flops import Pairs, count_attention

LSE = slice(1, 2)
OUTPUT_AND_LSE = slice(0, 2)
INPUTS = ("Tensor query", "Tensor key", "Tensor value")
GRADS = ("Tensor grad_out", "Tensor grad_lse")
RESULTS = ("Tensor out", "Tensor lse")


def is_tracing() -> bool:
    """Whether something records operations or runs them in its own way, with its own lengths."""
    return torch.compiler.is_compiling() or is_in_torch_dispatch_mode()


def _is_watched(tensor: Tensor) -> bool:
    """Whether something wants to see an operation by its name, or its shapes alone."""
    return is_tracing() or profiler._is_profiler_enabled or tensor.is_meta


def may_be_counted() -> bool:
    """Whether a mode looks at operations as they run, such as PyTorch's counter of FLOPs.

    Before PyTorch 2.15 that one has no formula for its own attention on CPUs, and counts 0.
    """
    return is_in_torch_dispatch_mode() and not torch.compiler.is_compiling()


def contents(tensor: Tensor | None) -> Tensor | None:
    """Return the plain tensor with the numbers of a tensor, or None if nobody may look at them.

    That is so for a fake or meta tensor, and for one that torch.vmap maps or
    torch.func.functionalize follows, under whatever other transformations.
    """
    if tensor is not None and torch._C._are_functorch_transforms_active():
        if torch.compiler.is_compiling():
            return None  # A compiler cannot trace what comes now.
        *wrappers, tensor = _unwrapped(tensor)
        functorch = torch._C._functorch
        if any(functorch.is_batchedtensor(w) or functorch.is_functionaltensor(w) for w in wrappers):
            return None
    return None if type(tensor) is not Tensor or tensor.is_meta else tensor


def is_functionalized() -> bool:
    """Whether torch.func.functionalize is one of the transformations."""
    functorch = torch._C._functorch
    return torch._C._are_functorch_transforms_active() and any(
        level.key() == functorch.TransformType.Functionalize
        for level in functorch.get_interpreter_stack() or ()
    )


def is_mapped(*tensors: Tensor) -> bool:
    """Whether torch.vmap maps a tensor, under whatever other transformations."""
    return torch._C._are_functorch_transforms_active() and any(
        torch._C._functorch.is_batchedtensor(each)
        for tensor in tensors
        for each in _unwrapped(tensor)
    )


def _unwrapped(tensor: Tensor) -> list[Tensor]:
    """Return a tensor, then what each wrapper of torch.func wraps; the last one is no wrapper."""
    found = [tensor]
    while torch._C._functorch.is_functorch_wrapped_tensor(found[-1]):
        found.append(torch._C._functorch.get_unwrapped(found[-1]))
    return found


def rows_of(tensor: Tensor) -> Tensor | None:
    """Return all rows [rows, n] of a tensor [n] that torch.vmap maps; None if they have no numbers.

    They are for a look at the numbers, with torch.func switched off.
    """
    axis, functorch = 0, torch._C._functorch
    *wrappers, plain = _unwrapped(tensor)
    for wrapper in wrappers:
        if functorch.is_functionaltensor(wrapper):
            return None
        if functorch.is_batchedtensor(wrapper) and functorch.maybe_get_bdim(wrapper) <= axis:
            axis += 1
    known = type(plain) is Tensor and not plain.is_meta and not is_recorded()
    return plain.movedim(axis, -1).reshape(-1, plain.shape[axis]) if known else None


def may_decide(tensor: Tensor) -> bool:
    """Whether the contents of a tensor are there, and sizes may depend on them."""
    return not is_recorded() and contents(tensor) is not None


def is_recorded() -> bool:
    """Whether a compiler or a tracer notes operations down, to run them with other numbers.

    A mode that looks on, such as a counter, does not.
    """
    return torch.compiler.is_compiling() or (
        is_in_torch_dispatch_mode()
        and any(mode.is_infra_mode() for mode in _get_current_dispatch_mode_stack())
    )


def has_tangent(*tensors: Tensor) -> bool:
    """Whether a derivative in forward mode is being computed, as far as it can be seen here."""
    transformed = torch._C._are_functorch_transforms_active()
    return any(
        # Inside of vmap nothing can be asked, and the autograd function refuses.
        not (transformed and torch._C._functorch.is_batchedtensor(tensor))
        and unpack_dual(tensor).tangent is not None
        for tensor in tensors
    )


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """The gradients need nothing: there are none."""


def _refuse(ctx: Any, *grads: Tensor | None) -> NoReturn:
    raise NotImplementedError(
        "this backend has first derivatives in reverse mode, and none of higher order or in "
        "forward mode. Use backend='reference', which has them all."
    )


def define_attention(
    name: str,
    options: str,
    forward: Callable[..., tuple[Tensor, Tensor]],
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]],
    saved: slice,
    pairs: Pairs,
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Make the operations `name`_forward and `name`_backward, and return what calls the first.

    Args:
        name: Of the operation, with its namespace.
        options: What comes after query, key and value, as a schema says it.
        forward: Computes the results.
        backward: Computes the gradients.
        saved: The results that `backward` needs: LSE or OUTPUT_AND_LSE.
        pairs: Counts what is read.
    """
    count = saved.stop - saved.start

    def set_up(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        # Options such as cu_seqlens may be edited through NumPy before the backward.
        options = [
            each.clone() if isinstance(each, Tensor) and each.device.type == "cpu" else each
            for each in inputs[3:]
        ]
        inputs = (*inputs[:3], *options)
        tensors = [each if isinstance(each, Tensor) else None for each in inputs]
        ctx.save_for_backward(*output[saved], *tensors)
        ctx.others = [
            each if tensor is None else None for each, tensor in zip(inputs, tensors, strict=True)
        ]

    def gradients(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        if has_tangent(grad_out, grad_lse):
            _refuse(ctx)
        kept = ctx.saved_tensors  # Unpacked once: under checkpointing a second time is an error.
        inputs = [
            other if tensor is None else tensor
            for other, tensor in zip(ctx.others, kept[count:], strict=True)
        ]
        # The caller's autocast would run float32 products in half precision.
        with without_autocast(grad_out.device.type):
            grads = differentiate(grad_out, grad_lse, *inputs[:3], *kept[:count], *inputs[3:])
        return (*grads, *[None] * (len(inputs) - 3))

    differentiate = define(
        f"{name}_backward",
        f"({', '.join((*GRADS, *INPUTS, *RESULTS[saved], options))}) -> (Tensor, Tensor, Tensor)",
        backward,
        _fake_backward,
    )
    attend = define(
        f"{name}_forward",
        f"({', '.join((*INPUTS, options))}) -> (Tensor, Tensor)",
        forward,
        fake_forward,
        set_up,
        gradients,
    )
    count_attention(name, pairs, count)
    return attend


def define(
    name: str,
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    set_up: Callable[..., None] = _save_nothing,
    gradients: Callable[..., Any] = _refuse,
) -> Callable[..., Any]:
    """Make an operation out of a function, and return what calls it.

    Where something compiles, traces, fakes tensors, counts or takes times, it is the operation of
    PyTorch's dispatcher, whose inside no compiler sees. Elsewhere an autograd function calls the
    function as it is, which is faster. Only that one can be transformed by torch.func, and only the
    other one functionalized.
    """
    # The schema is spelled out: read off annotations it would depend on who wraps the function.
    # The tag: what a call keeps on a device must not lie in the memory of a compiler's graph, and a
    # graph would not look into cu_seqlens again.
    torch.library.define(name, schema, tags=(torch.Tag.cudagraph_unsafe,))
    torch.library.impl(name, "CompositeExplicitAutograd")(run)
    torch.library.register_fake(name, fake)
    torch.library.register_autograd(name, gradients, setup_context=set_up)
    operation = getattr(torch.ops.colonnade, name.removeprefix("colonnade::"))

    def compute(*inputs: Any) -> Any:
        return (operation if _is_watched(inputs[0]) else run)(*inputs)

    function = _function(run, fake, set_up, gradients)
    transformed = _function(compute, fake, set_up, gradients)

    def call(*inputs: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            return (operation if is_functionalized() else transformed)(*inputs)
        # The second: autograd.grad(…, is_grads_batched=True), whose tensors know few functions.
        if _is_watched(inputs[0]) or any(
            map(torch._C._functorch.is_legacy_batchedtensor, inputs[:2])
        ):
            return operation(*inputs)
        return (function if torch.is_grad_enabled() else run)(*inputs)

    return call


def _function(
    run: Callable[..., Any],
    fake: Callable[..., Any],
    set_up: Callable[..., None],
    gradients: Callable[..., Any],
) -> Callable[..., Any]:
    """Return an autograd function whose leading tensors are all [batch, …]."""

    def apply(*inputs: Any) -> Any:
        return Function.apply(*inputs)  # type: ignore[no-untyped-call]  # PyTorch's.

    class Function(torch.autograd.Function):
        setup_context = staticmethod(set_up)
        backward = staticmethod(gradients)
        jvp = staticmethod(_refuse)

        @staticmethod
        def forward(*inputs: Any) -> Any:
            return run(*inputs)

        @staticmethod
        def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
            size = info.batch_size
            is_option = [not isinstance(x, Tensor) for x in inputs]
            num_tensors = [*is_option, True].index(True)
            tensors, options = inputs[:num_tensors], inputs[num_tensors:]
            if size == 0:
                of_rows = (
                    x if dim is None else x.new_empty(x.movedim(dim, 0).shape[1:])
                    for x, dim in zip(tensors, in_dims, strict=False)
                )
                # Part of the graph, although there is nothing to compute.
                nothing = torch.cat([x.flatten()[:0] for x in tensors])
                results = fake(*of_rows, *options)
                return tuple(nothing.to(x.dtype).view(0, *x.shape) for x in results), 0
            if any(isinstance(option, Tensor) for option in options):
                each = [
                    apply(
                        *(
                            x if dim is None else x.select(dim, index)
                            for x, dim in zip(inputs, in_dims, strict=True)
                        )
                    )
                    for index in range(size)
                ]
                return tuple(torch.stack(parts) for parts in zip(*each, strict=True)), 0
            together = [
                (x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)
                for x, dim in zip(tensors, in_dims, strict=False)
            ]
            found = apply(*together, *options)
            return tuple(x.unflatten(0, (size, x.shape[0] // size)) for x in found), 0

    # Else PyTorch works it out in every call, which takes as long as everything else around one.
    signature = inspect.signature(Function.forward)
    Function.forward.__signature__ = signature  # type: ignore[attr-defined]
    return apply


def first_order(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return tensors whose derivatives end after the first order, in words that help.

    For attention in PyTorch's own kernels: they end there too, and speak of their own names only.
    """
    if is_tracing() or not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
        return tensors
    if is_functionalized():  # An autograd function cannot be.
        return tensors
    return tuple(_first_order(tensor)[0] for tensor in tensors)


def _view(tensor: Tensor) -> tuple[Tensor]:
    return (tensor.view_as(tensor),)


_zeroth_order = _function(_view, _view, _save_nothing, _refuse)
_first_order = _function(_view, _view, _save_nothing, lambda ctx, grad: _zeroth_order(grad))


def fake_forward(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp without the numbers."""
    compute = torch.promote_types(query.dtype, torch.float32)
    return (
        query.new_empty(*query.shape[:3], value.shape[3]),
        query.new_empty(query.shape[:3], dtype=compute),
    )


def _fake_backward(
    grad_out: Tensor, grad_lse: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)
