"""FLOP formulas of the operations, for `torch.utils.flop_counter.FlopCounterMode`.

They count the pairs that are read and nothing else. A multiply-add is two FLOPs, as there. The
forward has the scores and their product with the values; the backward has the scores once more and
the four products of the gradients, as PyTorch counts its own attention. The softmax is left out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

COUNTER = "torch.utils.flop_counter"


class Sizes(NamedTuple):
    """The sizes of a call; a compiler's symbols are the numbers that they stand for by then."""

    batch: int
    kv_heads: int
    q_len: int
    kv_len: int


Pairs = Callable[..., int]
"""From `Sizes` and an operation's options: the pairs of all batch rows and key heads, each with one
query head."""


def count_attention(name: str, pairs: Pairs, num_saved: int) -> None:
    """Give the operations `name`_forward and `name`_backward their formulas."""
    count_forward(f"{name}_forward", pairs)

    def backward(
        grad_out: Tensor, grad_lse: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any
    ) -> int:
        widths = 3 * key.shape[3] + 2 * value.shape[3]
        return _flops(pairs, query, key, widths, rest[num_saved:])

    _count(f"{name}_backward", backward)


def count_forward(name: str, pairs: Pairs) -> None:
    """Give an operation without a backward its formula."""

    def forward(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> int:
        return _flops(pairs, query, key, key.shape[3] + value.shape[3], options)

    _count(name, forward)


def _flops(pairs: Pairs, query: Tensor, key: Tensor, widths: int, options: Sequence[Any]) -> int:
    batch, heads, q_len, _ = map(_number, query.shape)
    _, kv_heads, kv_len, _ = map(_number, key.shape)
    sizes = Sizes(batch, kv_heads, q_len, kv_len)
    # Whatever else watches or fakes tensors does not see how this is counted.
    with torch._C._DisableTorchDispatch():
        read = pairs(sizes, *map(_number, options))
    flops: int = 2 * read * (heads // kv_heads) * _number(widths)
    return flops


def _number(size: Any) -> Any:
    """A size that a compiler knows as a symbol only, as the number that it goes by."""
    if not isinstance(size, torch.SymInt):
        return size
    return size.node.hint if size.node.has_hint() else 4096


def _count(name: str, formula: Callable[..., int]) -> None:
    """Register the formula of an operation, now or as soon as PyTorch's counter is imported."""
    operation = getattr(torch.ops.colonnade, name.removeprefix("colonnade::"))
    # By name come the results and, from inductor, notes on a node.
    _formulas[operation] = lambda *inputs, **_: formula(*inputs)
    if COUNTER in sys.modules:
        _register(sys.modules[COUNTER])


_formulas: dict[Any, Callable[..., int]] = {}


def _register(counter: ModuleType) -> None:
    for operation, formula in _formulas.items():
        if operation not in counter.flop_registry:
            counter.register_flop_formula(operation, get_raw=True)(formula)


class _AtImport(MetaPathFinder):
    """Registers the formulas whenever PyTorch's counter is executed, which loads triton.

    It stays: a module may be looked for and not imported, reloaded, or imported once more.
    """

    def find_spec(self, name: str, *where: Any) -> ModuleSpec | None:
        if name != COUNTER:
            return None
        others = [each for each in sys.meta_path if each is not self and hasattr(each, "find_spec")]
        found = (finder.find_spec(name, *where) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register(module)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _AtImport())
