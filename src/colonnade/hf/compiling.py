"""How `generate` compiles the step of a token."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CompileConfig

MATRIX_TIMES_VECTOR: dict[str, Any] = {"post_grad_fusion_options": {"decompose_mm_pass": {}}}
"""Let the compiler write products with a single row itself, up to a width of 2,048: PyTorch's own
read the weights at a third of the memory's pace on CPUs."""


def compile_config(device: torch.device | str = "cpu") -> CompileConfig:
    """Return the `compile_config` with which `generate` compiles a step, in one graph.

    For a cache of fixed size, `FixedCache(config, max_seq_len, static=True)`. By itself `generate`
    compiles on accelerators only, and with options that suit those.

    Args:
        device: Where the model is.
    """
    if torch.device(device).type == "cpu":
        options = MATRIX_TIMES_VECTOR
        config = CompileConfig(fullgraph=True, mode=None, options=options)  # type: ignore[arg-type]
    else:
        config = CompileConfig(fullgraph=True)
    config._compile_all_devices = True  # type: ignore[assignment]  # Annotated by its default.
    return config
