"""Small models: the Sparse Transformer, and others that are retrofitted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from colonnade.hf import SparseTransformerConfig, SparseTransformerForCausalLM

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
MORE_FAMILIES: dict[str, dict[str, Any]] = {
    "phi": {"intermediate_size": 48},
    "olmo2": GROUPED,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
}
"""For what is tried on many families at once."""
WINDOW = 5
WINDOWED: dict[str, Any] = {
    **GROUPED,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
EXPERTS: dict[str, Any] = {
    "moe_intermediate_size": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "experts_implementation": "eager",  # The others have no float64.
}
WINDOWED_FAMILIES: dict[str, dict[str, Any]] = {
    "mistral": {**GROUPED, "sliding_window": WINDOW},
    "phi3": {**GROUPED, "sliding_window": WINDOW},
    "qwen2": {**WINDOWED, "use_sliding_window": True},
    "qwen3": {**WINDOWED, "use_sliding_window": True, "head_dim": 8},
    "smollm3": {**WINDOWED, "use_sliding_window": True},
    "gemma3_text": {**WINDOWED, "head_dim": 8},
    "ministral": {**WINDOWED, "head_dim": 8},
    "olmo3": WINDOWED,
    "gpt_oss": {**WINDOWED, **EXPERTS, "head_dim": 8},
}
"""Models with a sliding window, in every layer or in all but the one in the middle."""
ALL_WINDOWED = ("mistral", "phi3")


def small_config(**changes: Any) -> SparseTransformerConfig:
    """Return the settings of two layers, three blocks of 8 and a short one."""
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "qk_size": 8,
        "max_position_embeddings": 29,
        "stride": 8,
        "summary": 2,
        "subblocks": 2,
    }
    return SparseTransformerConfig(**{**sizes, **changes})


def random_model(
    dtype: torch.dtype = torch.float64, **changes: Any
) -> SparseTransformerForCausalLM:
    """Return a model whose output head is not zero, so that its logits say something."""
    model = SparseTransformerForCausalLM(small_config(**changes))
    torch.nn.Module.to(model.eval(), dtype)
    torch.nn.init.normal_(model.lm_head.weight)
    for parameter in model.model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def tokens(batch: int, length: int) -> Tensor:
    """Draw bytes [batch, length]."""
    return torch.randint(256, (batch, length))


def dense_model(family: str, **changes: Any) -> PreTrainedModel:
    """Return a model of another architecture in float64 that always has the same weights."""
    sizes = {**FAMILIES, **MORE_FAMILIES}
    return _model(family, **{**sizes[family], **changes})


def windowed_model(family: str, **changes: Any) -> PreTrainedModel:
    """Return a model with sliding windows, as `dense_model` does."""
    return _model(family, **{**WINDOWED_FAMILIES[family], **changes})


def _model(family: str, **settings: Any) -> PreTrainedModel:
    config = AutoConfig.for_model(family, **{**SIZES, **settings})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).double().eval()
        for name, parameter in model.named_parameters():
            if name.endswith(".sinks"):  # Far enough from 0 to matter.
                torch.nn.init.normal_(parameter)
    assert isinstance(model, PreTrainedModel)
    return model


def prompts(batch: int, length: int) -> Tensor:
    """Draw tokens [batch, length] that are no special ones."""
    return torch.randint(2, VOCABULARY, (batch, length))


def positions_of(mask: Tensor) -> Tensor:
    """Return the positions that count the tokens of each row, as `generate` makes them."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def generate(model: Any, ids: Tensor, **options: Any) -> Any:
    """Return the tokens that follow prompts without padding, greedily; options may say otherwise.

    The model is Any, for transformers annotates `generate` for its own callers alone.
    """
    return model.generate(
        ids, **{"do_sample": False, "attention_mask": torch.ones_like(ids), **options}
    )


def enable_recomputation(model: PreTrainedModel, **options: bool) -> None:
    """Switch it on under the name that each tested release of transformers gives it."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(options or None)
    else:
        model.gradient_checkpointing_enable(options or None)
