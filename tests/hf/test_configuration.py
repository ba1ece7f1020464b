"""Settings of the Sparse Transformer: sizes, patterns, initialisation, and what is saved."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

import colonnade as col
from colonnade.hf import (
    SparseTransformerConfig,
    SparseTransformerForCausalLM,
    SparseTransformerModel,
)
from tests.hf.models import random_model, small_config, tokens


@pytest.mark.parametrize(
    ("preset", "millions"),
    [("enwik8", 94.95), ("cifar10", 59.20), ("imagenet64", 151.65), ("demo", 0.87)],
)
def test_presets_have_the_stated_parameters(preset: str, millions: float) -> None:
    with torch.device("meta"):
        model = SparseTransformerForCausalLM(SparseTransformerConfig.preset(preset))
    assert model.num_parameters() / 1e6 == pytest.approx(millions, rel=0.005)


@pytest.mark.parametrize(
    ("preset", "layers", "width", "qk_width", "feed_forward", "tables", "stated"),
    [
        ("enwik8", 30, 512, 512, 2048, 96 + 128, 94_949_376),
        ("cifar10", 128, 256, 128, 512, 32 + 32 + 3, 59_196_672),
        ("imagenet64", 48, 512, 512, 2048, 64 + 64 + 3, 151_644_672),
    ],
)
def test_parameters_of_the_papers_models_counted_by_hand(
    preset: str,
    layers: int,
    width: int,
    qk_width: int,
    feed_forward: int,
    tables: int,
    stated: int,
) -> None:
    """Weights with a bias each, two norms a block and one at the end, 256 tokens in and out."""
    attention = 2 * (width + 1) * qk_width + 2 * (width + 1) * width
    network = (width + 1) * feed_forward + (feed_forward + 1) * width
    block = attention + network + 2 * 2 * width
    counted = layers * block + 2 * width + (tables + 2 * 256) * width
    with torch.device("meta"):
        model = SparseTransformerForCausalLM(SparseTransformerConfig.preset(preset))
    assert model.num_parameters() == counted == stated


def test_the_paper_preset_is_the_papers() -> None:
    config = SparseTransformerConfig.preset("enwik8")
    assert (config.num_hidden_layers, config.num_attention_heads, config.hidden_size) == (
        30,
        8,
        512,
    )
    assert (config.stride, config.summary, config.dropout) == (128, 32, 0.40)
    assert (config.max_position_embeddings, config.intermediate_size) == (12_288, 2_048)


@pytest.mark.parametrize(("initializer", "variance"), [("code", 0.125), ("paper", 0.125**2)])
def test_initialisation(initializer: str, variance: float) -> None:
    config = small_config(hidden_size=256, qk_size=256, initializer=initializer)
    model = SparseTransformerForCausalLM(config)
    block = model.model.layers[1].block
    attention, feed_forward = block.attention.layer, block.feed_forward
    branch = 2 * config.num_hidden_layers
    expected = {
        attention.query_proj: variance / 256,
        attention.key_proj: variance / 256,
        attention.value_proj: variance / 256,
        attention.out_proj: variance / 256 / branch,
        feed_forward.up_proj: variance / 256,
        feed_forward.down_proj: variance / 1024 / branch,
        model.model.embedding.token: 0.125**2 / 256,
        model.model.embedding.column: 0.125**2 / 256 / 2,
    }
    for module, wanted in expected.items():
        draws = module.weight.numel()
        # A sample variance of n normal draws has relative standard deviation sqrt(2/n); five of
        # them leave a chance of 6e-7 a table.
        assert module.weight.var().item() == pytest.approx(wanted, rel=5 * math.sqrt(2 / draws))
        if isinstance(module, torch.nn.Linear):
            assert module.bias is not None
            assert not module.bias.any()


def test_an_image_model_has_three_position_tables_and_begins_at_eight_bits() -> None:
    """Each of them smaller by the root of their number."""
    config = small_config(image_shape=[4, 7, 3], hidden_size=256, qk_size=128, embedding_std=0.5)
    model = SparseTransformerForCausalLM(config)
    embedding = model.model.embedding
    tables = {"row": 4, "column": 7, "channel": 3, "token": 256}
    for name, rows in tables.items():
        weight = getattr(embedding, name).weight
        assert weight.shape == (rows, 256)
        std = 0.5 if name == "token" else 0.5 / math.sqrt(3)
        # Five standard deviations of a sample variance of n draws: a chance of 6e-7 a table.
        spread = 5 * math.sqrt(2 / weight.numel())
        assert weight.var().item() == pytest.approx(std**2, rel=spread)
    ids = tokens(1, 29)
    bits = model(ids, labels=ids).loss.item() / math.log(2)
    assert bits == pytest.approx(8.0, abs=8 * 4 * torch.finfo(torch.float32).eps)


def _patterns(model: SparseTransformerForCausalLM) -> list[object]:
    return [layer.block.attention.layer.pattern for layer in model.model.layers]


def test_the_scheme_says_what_each_layer_reads() -> None:
    pattern = col.FixedPattern(8, 2, 2)
    assert _patterns(random_model()) == [pattern] * 2
    assert _patterns(random_model(scheme="interleaved")) == list(pattern.factors())
    assert _patterns(random_model(scheme="multihead")) == [pattern.factors()] * 2
    assert _patterns(random_model(pattern="strided")) == [col.StridedPattern(8)] * 2
    assert _patterns(random_model(pattern="local")) == [col.LocalPattern(8)] * 2
    assert _patterns(random_model(pattern="full")) == [col.FullPattern()] * 2


def test_dropout_sits_at_the_end_of_each_branch() -> None:
    model = SparseTransformerForCausalLM(small_config(dropout=0.3))
    drops = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Dropout)]
    assert drops == [f"model.layers.{i}.block.dropout" for i in range(2)]


# The type checks replace a configuration's constructor by one that takes its fields alone.
@pytest.mark.plain
def test_saved_as_safetensors_and_loaded_by_the_auto_classes(tmp_path: Path) -> None:
    model = random_model(torch.float32)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert isinstance(loaded, SparseTransformerForCausalLM)
    assert loaded.config._attn_implementation == "colonnade"
    ids = tokens(1, 29)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    base = AutoModel.from_pretrained(tmp_path)
    assert isinstance(base, SparseTransformerModel)


@pytest.mark.plain
def test_every_setting_is_saved(tmp_path: Path) -> None:
    changes = {
        "pattern": "strided",
        "scheme": "multihead",
        "image_shape": [2, 5, 3],
        "attention_dropout": 0.25,
    }
    model = random_model(torch.float32, **changes)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    for name, value in changes.items():
        assert getattr(loaded.config, name) == value
    assert _patterns(loaded) == _patterns(model)
    ids = tokens(1, 29)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_impossible_configurations_raise() -> None:
    with pytest.raises(ValueError, match="got summary=9 and stride=8"):
        small_config(summary=9)
    with pytest.raises(ValueError, match="got num_hidden_layers=0"):
        small_config(num_hidden_layers=0)
    with pytest.raises(ValueError, match="preset='enwik9'"):
        SparseTransformerConfig.preset("enwik9")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pattern": "dilated"}, "pattern must be one of .*got pattern='dilated'"),
        ({"scheme": "mixed"}, "scheme must be one of .*got scheme='mixed'"),
        ({"pattern": "local", "scheme": "interleaved"}, "without factors"),
        ({"pattern": "full", "scheme": "multihead"}, "without factors"),
        ({"scheme": "multihead", "num_key_value_heads": 1}, "num_kv_heads=1"),
        ({"attention_dropout": 1.5}, r"attention_dropout=1\.5"),
        ({"image_shape": [2, 3, 3]}, "image_shape"),
        ({"image_shape": [4, 8]}, "image_shape"),
    ],
)
def test_settings_that_do_not_go_together_raise(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_config(**changes)
