"""What backend "triton" is compared with on a GPU, each made when it is asked for.

A contender that a machine does not have, or whose shapes it does not take, raises when it is made
or when it first runs; `rows.measure` records why.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from colonnade.bench.timing import Sizes
from colonnade.ops import attention
from colonnade.plan.table import gathered_mask

Rival = Callable[[], tuple[Tensor, ...]]
"""Runs what is measured once; returns the output, and the gradients if they are wanted."""
DENSE = {
    "dense": None,
    "dense, flash": SDPBackend.FLASH_ATTENTION,
    "dense, cuDNN": SDPBackend.CUDNN_ATTENTION,
}
"""PyTorch's dense causal attention: as it chooses itself, and by one kernel."""
FLASH = {"flash-attn 2": "flash_attn", "flash-attn 3": "flash_attn_interface"}
"""Packages with dense causal attention, by what the tables call them."""
TILES = ((128, 128), (128, 64), (128, 16))
"""Queries and keys of FlexAttention's tiles."""
FLEX = {
    f"{kind} {queries} × {keys}": (kind == "flex, gathered", (queries, keys))
    for kind in ("flex", "flex, gathered")
    for queries, keys in TILES
}
"""FlexAttention over all keys, or over [slots ; keys] as the plan has them, at each tile."""
NAMES = ("triton", *DENSE, *FLASH, "eager", *FLEX)
LONGEST_EAGER = 16_384
"""Longest sequence that "eager" is timed on: its scores go through memory, which takes long."""


class Rivals:
    """Contenders over one draw of tensors on a device.

    Attributes:
        sizes: The attention to measure.
        device: Where it runs.
    """

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        self.sizes, self.device = sizes, device
        self.query, self.key, self.value, self.grad = sizes.inputs(device)
        self.grouped = sizes.heads != sizes.kv_heads

    def make(self, name: str) -> Rival:
        """Return a function that runs one of `NAMES` once, as far as `sizes` asks.

        Raises:
            ImportError: Its package is not installed.
            NotImplementedError: It does not run on such a device.
            ValueError: No contender has that name.
        """
        if name in ("triton", "eager"):
            ours = partial(attention, pattern=self.sizes.pattern(), backend=name)
            return self._run(ours, self.query, self.key, self.value, self.grad)
        if name in DENSE:
            return self._run(self._dense(DENSE[name]), self.query, self.key, self.value, self.grad)
        if name not in FLASH and name not in FLEX:
            raise ValueError(f"a contender is one of {NAMES}, got {name!r}.")
        if self.device.type == "cpu":
            raise NotImplementedError("it needs a GPU.")
        if name in FLASH:
            return self._flash(FLASH[name])
        return self._run(self._flex(*FLEX[name]), self.query, self.key, self.value, self.grad)

    def _run(self, forward: Callable[..., Any], *tensors: Tensor) -> Rival:
        """Return a function that runs a forward, and its backward if the sizes ask for it."""
        *leaves, grad = tensors

        def run() -> tuple[Tensor, ...]:
            out = forward(*leaves)
            first: Tensor = out[0] if isinstance(out, tuple) else out
            grads = torch.autograd.grad(first, leaves, grad) if self.sizes.backward else ()
            return first, *grads

        return run

    def _dense(self, kernel: SDPBackend | None) -> Callable[..., Tensor]:
        call = partial(scaled_dot_product_attention, is_causal=True, enable_gqa=self.grouped)
        if kernel is None:
            return call

        def pinned(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            with sdpa_kernel(kernel):
                return call(query, key, value)

        return pinned

    def _flash(self, package: str) -> Rival:
        """Of tensors [batch, seq, heads, width], as these packages want them."""
        module = __import__(package)
        leaves = [
            t.detach().transpose(1, 2).contiguous().requires_grad_(t.requires_grad)
            for t in (self.query, self.key, self.value)
        ]
        grad = self.grad.transpose(1, 2).contiguous()
        return self._run(partial(module.flash_attn_func, causal=True), *leaves, grad)

    def _flex(self, gathered: bool, tile: tuple[int, int]) -> Callable[..., Any]:
        from torch.nn.attention.flex_attention import flex_attention

        from colonnade.bench.flex import block_mask  # It loads PyTorch's compiler.

        pattern, n = self.sizes.pattern(), self.sizes.seq_len
        reads: Callable[[Tensor, Tensor], Tensor] = pattern.reads
        slots = torch.empty(0, dtype=torch.long)
        if gathered:
            slots, reads = gathered_mask(pattern, n)
        slots = slots.to(self.device)
        call = partial(
            torch.compile(flex_attention, dynamic=False),
            block_mask=block_mask(reads, n, len(slots) + n, tile, self.device),
            enable_gqa=self.grouped,
            # A kernel's tile of keys must divide the mask's, and its own choice may not.
            kernel_options={"fwd_BLOCK_N": tile[1]} if tile[1] < 128 else None,
        )
        if not gathered:
            return call

        def gather(query: Tensor, key: Tensor, value: Tensor) -> Any:
            return call(query, *(torch.cat([t[:, :, slots], t], 2) for t in (key, value)))

        return gather
