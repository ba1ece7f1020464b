"""Other models with fixed attention: which layers read what, saved, loaded and fine-tuned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    PreTrainedModel,
)

import colonnade as col
from colonnade.hf import FixedCache, load, retrofit
from colonnade.hf.attention import attention_function
from colonnade.hf.mask import PatternMask
from colonnade.hf.settings import patterns_of
from tests.hf.models import (
    FAMILIES,
    GROUPED,
    SIZES,
    dense_model,
    enable_recomputation,
    positions_of,
    prompts,
    random_model,
)
from tests.rounding import check_half_the_digits

each_family = pytest.mark.parametrize("family", FAMILIES)


@each_family
@pytest.mark.parametrize("padded", [False, True])
def test_without_a_layer_it_is_the_model_it_was(family: str, padded: bool) -> None:
    """Untouched layers stay dense, through the same function."""
    ids = prompts(2, 21)
    mask = torch.ones_like(ids)
    mask[0, : 9 * padded] = 0
    where: dict[str, Any] = {
        "attention_mask": mask,
        "position_ids": positions_of(mask),
    }
    dense = dense_model(family)(ids, **where).logits
    found = retrofit(dense_model(family), 8, 2, layers=[])(ids, **where).logits
    check_half_the_digits(found[mask.bool()], dense[mask.bool()])


@each_family
def test_chosen_layers_get_the_pattern(family: str) -> None:
    model = retrofit(dense_model(family), 8, 2, subblocks=2, layers=[0, 2])
    found = [patterns_of(model.config, layer) for layer in range(3)]
    assert found == [col.FixedPattern(8, 2, 2), col.FullPattern(), col.FixedPattern(8, 2, 2)]
    again = retrofit(model, 4, 1)
    assert again is model
    assert len(model.base_model._forward_pre_hooks) == 1
    assert {patterns_of(model.config, layer) for layer in range(3)} == {col.FixedPattern(4, 1)}


def test_layers_may_have_strides_of_their_own() -> None:
    model = retrofit(dense_model("llama"), 8, 2)
    model.config.per_layer_config = {1: {"colonnade_stride": 16, "colonnade_summary": 4}}
    found = [patterns_of(model.config, layer) for layer in range(3)]
    assert found == [col.FixedPattern(8, 2), col.FixedPattern(16, 4), col.FixedPattern(8, 2)]
    ids = prompts(1, 40)
    cache = FixedCache(model.config)
    parts = [model(part, past_key_values=cache).logits for part in ids.split([17, 1, 1, 21], 1)]
    check_half_the_digits(torch.cat(parts, 1), model(ids, use_cache=False).logits)
    assert [layer.kv.num_stored for layer in cache.layers] == [10, 2 * 4 + 8, 10]


@pytest.mark.plain
def test_our_model_takes_strides_per_layer_too() -> None:
    per_layer = {0: {"colonnade_stride": 4}, 1: {"colonnade_summary": 4, "colonnade_subblocks": 1}}
    model = random_model(per_layer_config=per_layer)
    found = [patterns_of(model.config, layer) for layer in range(2)]
    assert found == [col.FixedPattern(4, 2, 2), col.FixedPattern(8, 4)]
    assert [layer.block.attention.layer.pattern for layer in model.model.layers] == found
    ids = prompts(1, 29)
    cache = FixedCache(model.config)
    parts = [model(part, past_key_values=cache).logits for part in ids.split([17, 1, 11], 1)]
    check_half_the_digits(torch.cat(parts, 1), model(ids, use_cache=False).logits)
    assert (
        random_model(per_layer_config={1: {"stride": 16}}).model.embedding.column.num_embeddings
        == 8
    )
    with pytest.raises(ValueError, match="summary=9 and stride=8"):
        random_model(per_layer_config={1: {"colonnade_summary": 9}})


def _train(model: torch.nn.Module, steps: int = 8) -> list[float]:
    ids = prompts(4, 40)
    wanted = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(wanted, lr=1e-2)
    losses = []
    model.train()
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@each_family
@pytest.mark.plain
def test_it_is_fine_tuned_with_recomputation_in_bfloat16(family: str) -> None:
    found = []
    for checkpointing in (False, True):
        model = retrofit(dense_model(family).float(), 8, 2, layers=[0, 2])
        if checkpointing:
            enable_recomputation(model)
        torch.manual_seed(1)
        found.append(_train(model))
    assert found[0][-1] < found[0][0]
    assert found[0] == pytest.approx(found[1], rel=2**-8)


@pytest.mark.plain
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")  # Of peft.
def test_lora_on_top_saved_and_merged(tmp_path: Path) -> None:
    base = retrofit(dense_model("llama").float(), 8, 2)
    base.save_pretrained(tmp_path / "base")
    tuned: Any = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    losses = _train(tuned)
    assert losses[-1] < losses[0]
    tuned.eval()
    ids = prompts(1, 30)
    logits = tuned(input_ids=ids).logits
    tuned.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "adapter").eval()
    torch.testing.assert_close(again(input_ids=ids).logits, logits)
    tuned.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = load(tmp_path / "merged")
    torch.testing.assert_close(merged(ids).logits, logits, rtol=1e-4, atol=1e-4)
    cache = FixedCache(merged.config)
    merged.generate(ids, past_key_values=cache, max_new_tokens=3, do_sample=False)
    assert cache.num_stored < 20


def _untouched(model: PreTrainedModel) -> bool:
    return not hasattr(model.config, "colonnade_stride")


@pytest.mark.plain
def test_what_cannot_be_retrofitted_says_why() -> None:
    small: dict[str, Any] = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2}
    windowed = dense_model("mistral", sliding_window=8)
    with pytest.raises(NotImplementedError, match=r"sliding window, got sliding_window=8"):
        retrofit(windowed, 8, 2)
    assert _untouched(windowed)
    windowed.config.sliding_window = None
    retrofit(windowed, 8, 2)
    gemma = AutoConfig.for_model("gemma2", **small, intermediate_size=16, vocab_size=50, head_dim=8)
    with pytest.raises(NotImplementedError, match=r"sliding window|capped scores"):
        retrofit(AutoModelForCausalLM.from_config(gemma), 8, 2)
    with pytest.raises(NotImplementedError, match="cross-attention"):
        retrofit(dense_model("gpt2", add_cross_attention=True), 8, 2)
    linear: Any = torch.nn.Linear(1, 1)
    with pytest.raises(TypeError, match="transformers model, got a Linear"):
        retrofit(linear, 8, 2)
    with pytest.raises(ValueError, match="has a fixed pattern already"):
        retrofit(random_model(), 8, 2)
    model = dense_model("llama")
    with pytest.raises(ValueError, match="summary=9 and stride=8"):
        retrofit(model, 8, 9)
    with pytest.raises(ValueError, match=r"layers=\[3\] and num_hidden_layers=3"):
        retrofit(model, 8, 2, layers=[3])
    with pytest.raises(TypeError, match="layers"):
        retrofit(model, 8, 2, layers=[True])
    assert _untouched(model)


@pytest.mark.plain
def test_attention_of_another_kind_raises_where_it_is_called() -> None:
    """Settings alone do not make a model one that may have them."""
    settings = {"colonnade_stride": 8, "colonnade_summary": 2, "attn_implementation": "colonnade"}
    ids = prompts(1, 12)
    with pytest.raises(NotImplementedError, match=r"read within it, got sliding_window=8 and Fix"):
        dense_model("mistral", sliding_window=8, **settings)(ids)
    with pytest.raises(ValueError, match=r"needs colonnade_stride.*retrofit"):
        dense_model("llama", attn_implementation="colonnade")(ids)
    gpt2 = dense_model("gpt2", add_cross_attention=True, **settings)
    with pytest.raises(NotImplementedError, match="causal"):
        gpt2(ids, encoder_hidden_states=torch.randn(1, 5, 32, dtype=torch.float64))
    model = retrofit(dense_model("llama"), 8, 2)
    with pytest.raises(NotImplementedError, match="both directions"):
        model(ids, is_causal=False)
    with pytest.raises(ValueError, match="own mask function only"):
        model(ids, attention_mask=torch.ones(1, 1, 12, 12))
    attention = model.model.layers[0].self_attn
    query, key, value = torch.randn(3, 1, 4, 12, 8, dtype=torch.float64)
    mask = PatternMask(is_of_call=True)
    with pytest.raises(NotImplementedError, match="has no softcap, got softcap=8"):
        attention_function(attention, query, key, value, mask, softcap=8)
    with pytest.raises(NotImplementedError, match=r"one sliding window, got .*and 8 in its call"):
        attention_function(attention, query, key, value, mask, sliding_window=8)
    with pytest.raises(NotImplementedError, match=r"one sliding window, got .*, 8 in the mask"):
        attention_function(attention, query, key, value, PatternMask(window=8, is_of_call=True))
    with pytest.raises(TypeError, match="learnt sink logits must be floating-point"):
        attention_function(attention, query, key, value, mask, s_aux=torch.ones(4).long())
    with pytest.raises(ValueError, match=r"one learnt .* shape \(2,\) for 4 query heads"):
        attention_function(attention, query, key, value, mask, s_aux=torch.ones(2))
    with pytest.raises(NotImplementedError, match="causal self-attention only"):
        attention_function(
            attention, query, key, value, PatternMask(is_of_call=True), is_causal=False
        )
    with pytest.raises(ValueError, match=r"own mask function only, got None"):
        attention_function(attention, query, key, value, None)


@pytest.mark.plain
def test_a_mask_that_no_layer_reads_does_no_harm() -> None:
    """Qwen's mixture-of-experts models make a sliding-window mask as well as the causal one."""
    sizes = {**SIZES, **GROUPED, "moe_intermediate_size": 16, "num_experts": 4}
    sizes |= {"shared_expert_intermediate_size": 16, "num_experts_per_tok": 2}
    sizes |= {"experts_implementation": "eager"}  # The others have no float64.
    full: dict[str, Any] = {"layer_types": ["full_attention"] * 3, "sliding_window": 4}
    for kind, changes in (
        ("qwen2_moe", {}),
        ("qwen2", full),
        ("qwen3", full),
        ("gemma3_text", full),
    ):
        config = AutoConfig.for_model(kind, **{**sizes, **changes})
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).double().eval()
        ids = prompts(2, 21)
        dense = model(ids).logits
        check_half_the_digits(retrofit(model, 8, 2, layers=[])(ids).logits, dense)
        whole = retrofit(model, 8, 2)(ids, use_cache=False).logits
        assert (whole - dense).abs().max() > 1e-3
        cache = FixedCache(model.config)
        parts = [model(part, past_key_values=cache).logits for part in ids.split([17, 1, 3], 1)]
        check_half_the_digits(torch.cat(parts, 1), whole)


@pytest.mark.plain
@pytest.mark.parametrize("kind", ["bert", "roberta", "electra", "modernbert", "eurobert"])
def test_encoders_are_refused(kind: str) -> None:
    config = AutoConfig.for_model(kind, **{**SIZES, "intermediate_size": 48})
    model = AutoModelForMaskedLM.from_config(config)
    with pytest.raises(NotImplementedError, match="in both directions"):
        retrofit(model, 8, 2)
    assert _untouched(model)


@pytest.mark.plain
def test_a_decoder_made_of_an_encoder_is_taken() -> None:
    config = AutoConfig.for_model("bert", **{**SIZES, "intermediate_size": 48}, is_decoder=True)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    ids = prompts(2, 21)
    dense = model(ids).logits
    check_half_the_digits(retrofit(model, 8, 2, layers=[])(ids).logits, dense)


@pytest.mark.plain
def test_layers_that_look_into_the_mask_are_refused() -> None:
    latent = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4}
    latent |= {"v_head_dim": 8, "n_routed_experts": 4, "first_k_dense_replace": 3, "n_group": 1}
    latent |= {"index_n_heads": 2, "index_head_dim": 8, "index_topk": 4, "topk_group": 1}
    for kind, changes in (("doge", {}), ("deepseek_v32", latent), ("glm_moe_dsa", latent)):
        config = AutoConfig.for_model(kind, **{**SIZES, "intermediate_size": 48, **changes})
        model = AutoModelForCausalLM.from_config(config)
        with pytest.raises(NotImplementedError, match=r"pass its mask on.*looks into it"):
            retrofit(model, 8, 2)
        assert _untouched(model)


def _with_a_picture(text: str) -> PreTrainedModel:
    """Return a model that reads a picture of four patches, which stand at token 96, and text."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "image_size": 16, "patch_size": 8}
    config = AutoConfig.for_model(
        "llava",
        vision_config=AutoConfig.for_model("clip_vision_model", **sizes),
        text_config=AutoConfig.for_model(text, **{**SIZES, **FAMILIES[text]}),
        image_token_index=96,
        vision_feature_layer=-1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config).double().eval()
    assert isinstance(model, PreTrainedModel)
    return model


@pytest.mark.plain
@pytest.mark.parametrize("text", ["llama", "qwen2", "mistral"])
def test_of_a_vision_language_model_the_decoder_changes_alone(text: str, tmp_path: Path) -> None:
    """Without a layer it is the model it was; and saved and loaded it keeps its attention."""
    dense = _with_a_picture(text)
    ids = torch.cat([torch.full((1, 4), 96), torch.randint(2, 90, (1, 30))], 1)
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 16, 16).double()}
    before = dense(**inputs).logits
    model = retrofit(_with_a_picture(text), 8, 2, layers=[])
    assert model.config.vision_config._attn_implementation != "colonnade"
    assert model.config._attn_implementation != "colonnade"
    check_half_the_digits(model(**inputs).logits, before)
    after = retrofit(model, 8, 2, subblocks=2)(**inputs).logits
    assert (after - before).abs().max() > 1e-3
    cache = FixedCache(model.config)
    found = [model(**{**inputs, "input_ids": ids[:, :20]}, past_key_values=cache).logits]
    found.append(model(ids[:, 20:], past_key_values=cache).logits)
    check_half_the_digits(torch.cat(found, 1), after)
    for times in ("once", "twice"):
        model.save_pretrained(tmp_path / times)
        for load_it in (load, AutoModelForImageTextToText.from_pretrained):
            model = load_it(tmp_path / times, dtype=torch.float64)
            check_half_the_digits(model(**inputs).logits, after)
            assert model.config.vision_config._attn_implementation != "colonnade"


@pytest.mark.plain
@pytest.mark.parametrize(
    "layers",
    [
        np.array([0, 2]),
        torch.tensor([0, 2]),
        (np.int8(2), torch.tensor(0, dtype=torch.int32)),
        range(0, 3, 2),
        {0, 2},
        iter([2, 0, 2]),
    ],
    ids=lambda layers: type(layers).__name__,
)
def test_layers_are_integers_of_any_kind(layers: Any) -> None:
    model = retrofit(dense_model("llama"), 8, 2, layers=layers)
    expected = retrofit(dense_model("llama"), 8, 2, layers=[0, 2])
    assert model.config.to_json_string() == expected.config.to_json_string()


@pytest.mark.plain
@pytest.mark.parametrize("layers", [[1.0], ["0"], [np.bool_(True)], [torch.tensor(True)], [None]])
def test_layers_are_nothing_else(layers: Any) -> None:
    with pytest.raises(TypeError, match="layers must be integers, got"):
        retrofit(dense_model("llama"), 8, 2, layers=layers)
    with pytest.raises(ValueError, match=r"layers=\[-1\]"):
        retrofit(dense_model("llama"), 8, 2, layers=[np.int64(-1)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cached", [False, True])
def test_norms_of_queries_and_keys_may_be_in_float32(dtype: torch.dtype, cached: bool) -> None:
    """As k-bit tuning keeps them: queries and keys come in float32, values in half precision."""
    ids = prompts(2, 21)
    model: Any = retrofit(dense_model("qwen3"), 8, 2)
    model.to(dtype)
    seen: list[torch.dtype] = []

    def logits() -> torch.Tensor:
        cache = FixedCache(model.config) if cached else None
        first: torch.Tensor = model(ids[:, :20], past_key_values=cache, use_cache=cached).logits
        if cache is None:
            return first
        seen.extend(t.dtype for layer in cache.layers for t in layer.kv._groups.stores[0].buffers)
        return torch.cat([first, model(ids[:, 20:], past_key_values=cache).logits], 1)

    with torch.no_grad():
        half = logits()
        for layer in model.model.layers:
            layer.self_attn.q_norm.float()
            layer.self_attn.k_norm.float()
        lifted = logits()
    assert lifted.dtype == dtype
    assert set(seen) <= {dtype}
    # Norms in float32 round later than norms in half precision, and nothing else changes.
    near = 16 * torch.finfo(dtype).eps * half.abs().max().item()
    torch.testing.assert_close(lifted, half, rtol=0, atol=near)


def test_other_mixtures_of_types_are_still_refused() -> None:
    query, value = torch.randn(1, 2, 8, 4), torch.randn(1, 2, 8, 4, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match=r"must have one dtype.*query\.to\(value\.dtype\)"):
        col.attention(query, query, value, col.FixedPattern(4, 1))
