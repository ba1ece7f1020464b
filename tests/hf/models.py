"""Small models of other architectures, to be retrofitted."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
)

VOCABULARY = 97
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    # Wide enough that greedy tokens vary.
    "initializer_range": 0.2,
}
GROUPED: dict[str, Any] = {"intermediate_size": 48, "num_key_value_heads": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "mistral": {**GROUPED, "sliding_window": None},
    "qwen2": GROUPED,
    "qwen3": {**GROUPED, "head_dim": 8},
    "gpt2": {},
    "gpt_neox": {"intermediate_size": 48},
}


def dense_model(family: str, **changes: object) -> PreTrainedModel:
    """A model in float64 that always has the same weights."""
    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family], **changes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).double().eval()
    assert isinstance(model, PreTrainedModel)
    return model


def prompts(batch: int, length: int) -> torch.Tensor:
    """Tokens that are no special ones."""
    return torch.randint(2, VOCABULARY, (batch, length))
