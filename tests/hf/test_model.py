"""The Sparse Transformer as a transformers model: sizes, first loss, masks, generation, leaks."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

import colonnade as col
from colonnade.hf import (
    SparseTransformerConfig,
    SparseTransformerForCausalLM,
    SparseTransformerModel,
)
from tests.oracle import (
    fixed_mask,
    full_set,
    local_set,
    loop_attention,
    mask_of_sets,
    strided_set,
)


def small_config(**changes: object) -> SparseTransformerConfig:
    """Two layers, three blocks of 8 and a short one."""
    sizes: dict[str, object] = {
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
    dtype: torch.dtype = torch.float64, **changes: object
) -> SparseTransformerForCausalLM:
    """A model whose output head is not zero, so that its logits say something."""
    model = SparseTransformerForCausalLM(small_config(**changes)).to(dtype).eval()
    torch.nn.init.normal_(model.lm_head.weight)
    for parameter in model.model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def enable_recomputation(model: PreTrainedModel, **options: bool) -> None:
    """Under the name that each tested release of transformers gives it."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(options or None)
    else:
        model.gradient_checkpointing_enable(options or None)


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(256, (batch, length))


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


@pytest.mark.parametrize("preset", ["demo", "small"])
def test_first_loss_is_log2_of_the_vocabulary(preset: str) -> None:
    config = small_config() if preset == "small" else SparseTransformerConfig.preset(preset)
    model = SparseTransformerForCausalLM(config)
    batch = tokens(2, 29)
    bits = model(batch, labels=batch).loss.item() / math.log(2)
    # log_softmax of 256 equal logits in float32: a few roundings of a number near 5.5.
    assert bits == pytest.approx(8.0, abs=8 * 4 * torch.finfo(torch.float32).eps)


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


MERGED = {"stride": 8, "summary": 2, "subblocks": 2}


def _fixed(kv_heads: int, part: str) -> Tensor:
    return fixed_mask(29, kv_heads, **MERGED, part=part)


def _strided(kv_heads: int, part: str) -> Tensor:
    return mask_of_sets(29, kv_heads, lambda head, i: strided_set(i, 29, 8, part))


MASKS: dict[tuple[str, str], list[Tensor]] = {
    ("fixed", "merged"): [_fixed(2, "merged")] * 3,
    ("fixed", "interleaved"): [_fixed(2, part) for part in ("local", "summary", "local")],
    ("fixed", "multihead"): [torch.cat([_fixed(1, "local"), _fixed(1, "summary")])] * 3,
    ("strided", "merged"): [_strided(2, "merged")] * 3,
    ("strided", "interleaved"): [_strided(2, part) for part in ("local", "summary", "local")],
    ("strided", "multihead"): [torch.cat([_strided(1, "local"), _strided(1, "summary")])] * 3,
    ("local", "merged"): [mask_of_sets(29, 2, lambda head, i: local_set(i, 29, 8))] * 3,
    ("full", "merged"): [mask_of_sets(29, 2, lambda head, i: full_set(i, 29))] * 3,
}
"""What the two key heads of each of three layers read, by pattern and scheme."""


@pytest.mark.parametrize(("pattern", "scheme"), MASKS)
@pytest.mark.parametrize("image_shape", [None, [2, 5, 3]], ids=["text", "image"])
def test_model_equals_its_formula(image_shape: list[int] | None, pattern: str, scheme: str) -> None:
    """The whole forward, written out with plain loops for the attention."""
    model = random_model(
        pattern=pattern, scheme=scheme, image_shape=image_shape, num_hidden_layers=3
    )
    ids = tokens(2, 29)
    core = model.model
    embedding = core.embedding
    h = embedding.token.weight[ids]
    if image_shape is None:
        places = torch.unravel_index(torch.arange(29), (4, 8))
        tables = [embedding.row, embedding.column]
    else:
        places = torch.unravel_index(torch.arange(29), tuple(image_shape))
        tables = [embedding.row, embedding.column, embedding.channel]
    for table, place in zip(tables, places, strict=True):
        h = h + table.weight[place]
    for layer, mask in zip(core.layers, MASKS[pattern, scheme], strict=True):
        block, attention = layer.block, layer.block.attention.layer
        x = block.attention_norm(h)
        q, k, v = (
            projection(x).reshape(2, 29, heads, -1).transpose(1, 2)
            for projection, heads in (
                (attention.query_proj, 4),
                (attention.key_proj, 2),
                (attention.value_proj, 2),
            )
        )
        out, _ = loop_attention(q, k, v, mask, scale=1 / math.sqrt(2))
        h = h + attention.out_proj(out.transpose(1, 2).reshape(2, 29, 16))
        hidden = block.feed_forward.up_proj(block.feed_forward_norm(h))
        h = h + block.feed_forward.down_proj(hidden * torch.sigmoid(1.702 * hidden))
    logits = core.norm(h) @ model.lm_head.weight.T
    torch.testing.assert_close(model(ids).logits, logits, rtol=1e-10, atol=1e-10)


def test_nothing_leaks_from_the_future() -> None:
    model = random_model()
    ids = tokens(1, 29)
    for changed in (0, 7, 8, 15, 28):
        other = ids.clone()
        other[0, changed] = (ids[0, changed] + 1) % 256
        before, after = model(ids).logits, model(other).logits
        assert torch.equal(before[:, :changed], after[:, :changed])
        assert not torch.equal(before[:, changed], after[:, changed])


def test_generate_with_a_cache_gives_the_same_tokens() -> None:
    model = random_model()
    prompt = tokens(2, 5)
    attention_mask = torch.ones_like(prompt)
    with_cache, without = (
        model.generate(
            prompt,
            attention_mask=attention_mask,
            max_new_tokens=20,
            do_sample=False,
            use_cache=use_cache,
        )
        for use_cache in (True, False)
    )
    assert torch.equal(with_cache, without)
    assert with_cache.shape == (2, 25)


def test_chunks_through_a_cache_equal_the_whole() -> None:
    model = random_model()
    ids = tokens(2, 29)
    whole = model(ids).logits
    cache, pieces = None, []
    for begin, end in ((0, 3), (3, 11), (11, 12), (12, 29)):
        out = model(ids[:, begin:end], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-11, atol=1e-11)


def test_recomputation_changes_nothing() -> None:
    """Loss and gradients, with dropout: the masks of the recomputation are those of the forward."""
    model = random_model(dropout=0.3).train()
    ids = tokens(2, 29)

    def gradients() -> tuple[Tensor, list[Tensor]]:
        torch.manual_seed(7)
        loss = model(ids, labels=ids, use_cache=False).loss
        return loss, list(torch.autograd.grad(loss, list(model.parameters())))

    loss, plain = gradients()
    enable_recomputation(model)
    recomputed_loss, recomputed = gradients()
    assert torch.equal(loss, recomputed_loss)
    for one, other in zip(plain, recomputed, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


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


def test_embeddings_in_place_of_tokens_and_hidden_states() -> None:
    model = random_model()
    ids = tokens(1, 29)
    embedded = model.get_input_embeddings()(ids)
    out = model(inputs_embeds=embedded, output_hidden_states=True)
    torch.testing.assert_close(out.logits, model(ids).logits, rtol=0, atol=0)
    assert len(out.hidden_states) == 3


def test_logits_to_keep() -> None:
    model = random_model()
    ids = tokens(1, 29)
    logits = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, logits[:, -2:])
    kept = torch.tensor([0, 5])
    torch.testing.assert_close(model(ids, logits_to_keep=kept).logits, logits[:, kept])


@pytest.mark.plain
def test_what_would_be_silently_wrong_raises() -> None:
    model = random_model()
    ids = tokens(2, 12)
    with pytest.raises(ValueError, match="own mask function"):
        model(ids, attention_mask=torch.zeros(2, 1, 12, 12))
    with pytest.raises(ValueError, match="own mask function"):
        model(ids, attention_mask=torch.zeros(2, 1, 12, 12, dtype=torch.bool))
    with pytest.raises(ValueError, match="max_position_embeddings=29"):
        model(tokens(1, 30))
    with pytest.raises(ValueError, match="exactly one of input_ids"):
        model()


@pytest.mark.plain
def test_other_attention_implementations_raise() -> None:
    with pytest.raises(ValueError, match="scaled_dot_product_attention"):
        AutoModelForCausalLM.from_config(small_config(), attn_implementation="sdpa")
    dense = AutoModelForCausalLM.from_config(small_config(), attn_implementation="eager")
    with pytest.raises(NotImplementedError, match="'colonnade' only, got 'eager'"):
        dense(tokens(1, 4))


def test_impossible_configurations_raise() -> None:
    with pytest.raises(ValueError, match="got summary=9 and stride=8"):
        small_config(summary=9)
    with pytest.raises(ValueError, match="got num_hidden_layers=0"):
        small_config(num_hidden_layers=0)
    with pytest.raises(ValueError, match="preset='enwik9'"):
        SparseTransformerConfig.preset("enwik9")


def test_attention_is_the_registered_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model has no second way: what it runs is `colonnade.attention`."""
    seen = []

    def spy(*args: object, **kwargs: object) -> object:
        seen.append(args[3])
        return col.attention(*args, **kwargs)

    monkeypatch.setattr("colonnade.ops.heads.attention", spy)
    random_model()(tokens(1, 9), use_cache=False)
    assert seen == [col.FixedPattern(8, 2, 2)] * 2


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
