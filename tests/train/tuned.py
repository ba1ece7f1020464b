"""A tiny dense model of bytes with its tokenizer in a folder, and texts to tune it on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

from colonnade.hf import byte_tokenizer
from colonnade.train.retrofit_settings import RetrofitSettings

CONTEXT = 64


def write_model(folder: Path, kind: type[PreTrainedConfig] = LlamaConfig, **changes: Any) -> Path:
    """Write a model whose predictions vary, so that every loss says something."""
    sizes: dict[str, Any] = {
        "vocab_size": 258,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": None,
        "eos_token_id": None,
        "initializer_range": 0.2,
    }
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(kind(**{**sizes, **changes}))
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def write_texts(folder: Path) -> Path:
    """Write eight documents of different lengths, two of them shorter than a window."""
    folder.mkdir()
    for number in range(8):
        line = f"Line {number}: the café by the river opens at {number + 5}.\n"
        (folder / f"{number}.txt").write_text(line * (1 if number < 2 else 3 + number))
    return folder


def settings_for(model: Path, data: Path, **changes: Any) -> RetrofitSettings:
    """Return settings of a retrofit that takes a second."""
    values: dict[str, Any] = {
        "model": str(model),
        "data": str(data),
        "eval_windows": 3,
        "seq_len": CONTEXT,
        "stride": 16,
        "summary": 4,
        "lora": 2,
        "steps": 6,
        "batch_size": 2,
        "learning_rate": 1e-2,
    }
    return RetrofitSettings(**{**values, **changes})
