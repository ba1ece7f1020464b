"""The Sparse Transformer as a transformers model: its formula, first loss, generation, leaks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import colonnade as col
from colonnade.hf import (
    SparseTransformerConfig,
    SparseTransformerForCausalLM,
)
from colonnade.ops.attention import attend
from tests.hf.models import enable_recomputation, generate, random_model, small_config, tokens
from tests.oracle import (
    fixed_mask,
    full_set,
    local_set,
    loop_attention,
    mask_of_sets,
    strided_set,
)


def _fixed(kv_heads: int, part: str) -> Tensor:
    return fixed_mask(29, kv_heads, stride=8, summary=2, subblocks=2, part=part)


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
"""Masks of the two key heads of each of three layers, by pattern and scheme."""


@pytest.mark.parametrize("preset", ["demo", "small"])
def test_first_loss_is_log2_of_the_vocabulary(preset: str) -> None:
    config = small_config() if preset == "small" else SparseTransformerConfig.preset(preset)
    model = SparseTransformerForCausalLM(config)
    batch = tokens(2, 29)
    bits = model(batch, labels=batch).loss.item() / math.log(2)
    # log_softmax of 256 equal logits in float32: a few roundings of a number near 5.5.
    assert bits == pytest.approx(8.0, abs=8 * 4 * torch.finfo(torch.float32).eps)


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
    with_cache, without = (
        generate(model, prompt, max_new_tokens=20, use_cache=use_cache)
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
    with pytest.warns(UserWarning, match="attn_implementation='eager' was asked for"):
        dense = AutoModelForCausalLM.from_config(small_config(), attn_implementation="eager")
    with pytest.raises(NotImplementedError, match="'colonnade' only, got 'eager'"):
        dense(tokens(1, 4))


def test_attention_is_the_registered_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model has no second way: what it runs is what `colonnade.attention` runs."""
    seen = []

    def spy(*args: Any, **kwargs: Any) -> object:
        seen.append(args[3])
        return attend(*args, **kwargs)

    monkeypatch.setattr("colonnade.ops.heads.attend", spy)
    random_model()(tokens(1, 9), use_cache=False)
    assert seen == [col.FixedPattern(8, 2, 2)] * 2


@pytest.mark.plain
@pytest.mark.parametrize("tied", [False, True])
def test_the_head_is_the_token_embedding_if_that_is_asked_for(tied: bool, tmp_path: Path) -> None:
    config = small_config(tie_word_embeddings=tied)
    model = SparseTransformerForCausalLM(config)
    separate = SparseTransformerForCausalLM(small_config()).num_parameters()
    assert (model.lm_head.weight is model.model.embedding.token.weight) is tied
    assert model.num_parameters() == separate - tied * 256 * 16
    assert model.model.embedding.token.weight.std() > 0  # The head begins at zero, this does not.
    torch.nn.init.normal_(model.lm_head.weight)
    model.save_pretrained(tmp_path)
    again = SparseTransformerForCausalLM.from_pretrained(tmp_path).eval()
    assert (again.lm_head.weight is again.model.embedding.token.weight) is tied
    batch = tokens(1, 20)
    assert torch.equal(again(batch).logits, model.eval()(batch).logits)
