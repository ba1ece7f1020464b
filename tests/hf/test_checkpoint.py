"""A model keeps its fixed attention, whatever loads it, or says that it lost it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    pipeline,
)

import colonnade as col
from colonnade.hf import FixedCache, byte_tokenizer, load, retrofit
from colonnade.hf.settings import patterns_of
from tests import fresh
from tests.hf.drawn import by_the_oracle
from tests.hf.models import (
    FAMILIES,
    SIZES,
    dense_model,
    prompts,
    random_model,
    windowed_model,
)
from tests.oracle import fixed_mask
from tests.rounding import check_half_the_digits

pytestmark = pytest.mark.plain


def _oracle(family: str, ids: Tensor) -> Tensor:
    """Return the logits of dense attention under the mask of the sets."""
    model = dense_model(family, attn_implementation="sdpa")
    kv_heads = getattr(model.config, "num_key_value_heads", 4)
    mask = fixed_mask(ids.shape[1], kv_heads, stride=8, summary=2, subblocks=2)
    mask = mask.repeat_interleave(4 // kv_heads, 0)
    hidden = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    logits: Tensor = model(ids, attention_mask=hidden.expand(len(ids), -1, -1, -1)).logits
    return logits


def _saved_class(path: Path, **options: Any) -> Any:
    """Load as trainers do that are given a path."""
    name = AutoConfig.from_pretrained(path).architectures[0]
    return getattr(transformers, name).from_pretrained(path, **options)


LOADERS: dict[str, Callable[..., Any]] = {
    "load": load,
    "auto": AutoModelForCausalLM.from_pretrained,
    "class": _saved_class,
    "configuration": lambda path, **options: AutoModelForCausalLM.from_pretrained(
        path, config=AutoConfig.from_pretrained(path), **options
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("loader", LOADERS)
def test_whatever_loads_it_gives_fixed_attention_again_and_again(
    family: str, loader: str, tmp_path: Path
) -> None:
    model: Any = retrofit(dense_model(family), 8, 2, subblocks=2)
    ids = prompts(2, 30)
    expected = _oracle(family, ids)
    for times in ("once", "twice"):
        model.save_pretrained(tmp_path / times)
        model = LOADERS[loader](tmp_path / times, dtype=torch.float64)
        check_half_the_digits(model(ids).logits, expected)


def test_a_base_model_and_a_pipeline_and_a_checkpoint_without_the_name(tmp_path: Path) -> None:
    retrofit(dense_model("llama"), 8, 2, subblocks=2).save_pretrained(tmp_path)
    ids = prompts(1, 30)
    expected = _oracle("llama", ids)
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings.pop("attn_implementation") == "colonnade"
    (tmp_path / "config.json").write_text(json.dumps(settings))
    base = AutoModel.from_pretrained(tmp_path, dtype=torch.float64)
    head = load(tmp_path, dtype=torch.float64).lm_head
    check_half_the_digits(head(base(ids).last_hidden_state), expected)
    made = pipeline(
        "text-generation", str(tmp_path), dtype=torch.float64, tokenizer=byte_tokenizer()
    )
    check_half_the_digits(made.model(ids).logits, expected)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")  # Of peft.
def test_an_adapter_goes_on_top_of_a_fixed_base(tmp_path: Path) -> None:
    """And one that was trained on a model in memory does not name the dense model it came from."""
    dense_model("llama").save_pretrained(tmp_path / "dense")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    retrofit(model, 8, 2, subblocks=2).save_pretrained(tmp_path / "base")
    lora = LoraConfig(
        r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    get_peft_model(model, lora).save_pretrained(str(tmp_path / "nameless"))
    nameless = json.loads((tmp_path / "nameless" / "adapter_config.json").read_text())
    assert nameless["base_model_name_or_path"] is None
    tuned: Any = get_peft_model(load(tmp_path / "base"), lora).eval()
    tuned.save_pretrained(str(tmp_path / "adapter"))
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    ids = prompts(1, 30)
    torch.testing.assert_close(again(input_ids=ids).logits, tuned(input_ids=ids).logits)
    with again.disable_adapter():
        base = again(input_ids=ids).logits
    torch.testing.assert_close(base.double(), _oracle("llama", ids), rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match=r"holds an adapter\. Use peft\.AutoPeftModel"):
        load(tmp_path / "adapter")


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_another_attention_that_is_asked_for_is_said(
    family: str, kind: str, tmp_path: Path
) -> None:
    retrofit(dense_model(family), 8, 2, subblocks=2).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=f"loses it: attn_implementation='{kind}'"):
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path, attn_implementation=kind, dtype=torch.float64
        )
    ids = prompts(1, 30)
    dense = dense_model(family, attn_implementation=kind)
    check_half_the_digits(model(ids).logits, dense(ids).logits)
    # What is saved again is still the model that was retrofitted.
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float64)
    check_half_the_digits(again(ids).logits, _oracle(family, ids))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize(
    "auto", [AutoModelForSequenceClassification, AutoModelForTokenClassification]
)
def test_load_gives_the_class_that_was_saved(auto: Any, family: str, tmp_path: Path) -> None:
    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family], "num_labels": 3})
    model = retrofit(auto.from_config(config).double().eval(), 8, 2)
    model.save_pretrained(tmp_path)
    again = load(tmp_path, dtype=torch.float64)
    assert type(again) is type(model)
    ids = prompts(1, 30)
    check_half_the_digits(again(ids).logits, model(ids).logits)
    assert again.config._attn_implementation == "colonnade"


def test_what_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    dense_model("llama").save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="needs colonnade_stride"):
        load(tmp_path / "dense")
    model = retrofit(dense_model("llama"), 8, 2)
    model.save_pretrained(tmp_path / "fixed")
    with pytest.raises(ValueError, match="load takes no attn_implementation but"):
        load(tmp_path / "fixed", attn_implementation="sdpa")
    config = AutoConfig.from_pretrained(tmp_path / "fixed", attn_implementation="sdpa")
    with (
        pytest.warns(UserWarning, match="loses it"),
        pytest.raises(ValueError, match="the configuration asks for 'sdpa'"),
    ):
        load(tmp_path / "fixed", config=config)
    for names, message in ((None, "must name the class"), (["Mine"], r"Use Mine\.from_pretrained")):
        settings = json.loads((tmp_path / "fixed" / "config.json").read_text())
        settings["architectures"] = names
        (tmp_path / "fixed" / "config.json").write_text(json.dumps(settings))
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "fixed")


WITHOUT_US = """
import sys
from transformers import AutoModel, AutoModelForCausalLM
for path in sys.argv[1:]:
    try:
        AutoModelForCausalLM.from_pretrained(path)
    except ValueError as error:
        print(error)
assert not [name for name in sys.modules if name.startswith("colonnade")]
"""


def test_a_process_without_this_package_refuses(tmp_path: Path) -> None:
    """Dense attention would be wrong without a word."""
    random_model().save_pretrained(tmp_path / "ours")
    for family in ("llama", "gpt2"):
        retrofit(dense_model(family), 8, 2).save_pretrained(tmp_path / family)
    load(tmp_path / "llama").save_pretrained(tmp_path / "again")
    names = ("ours", "llama", "gpt2", "again")
    done = fresh.run(WITHOUT_US, *(str(tmp_path / name) for name in names))
    assert done.returncode == 0, done.stderr
    assert "run `import colonnade.hf` before you load it" in done.stdout
    assert "upgrade" not in done.stdout
    assert done.stdout.count('attn_implementation="colonnade"` is not supported') == 3


SINKS = col.FixedPattern(8, 2, 2, sinks=4)
GROUPS = (col.LocalPattern(6, sinks=2), col.FixedPattern(8, 2, sinks=1))
KINDS: dict[str, Callable[[], Any]] = {
    "sinks": lambda: retrofit(dense_model("llama"), 8, 2, layers=[0, 2], sinks=3),
    "heads": lambda: retrofit(dense_model("qwen2"), patterns={0: GROUPS, 2: SINKS}),
    "windows": lambda: retrofit(windowed_model("ministral"), 8, 2, 2),
    "window alone": lambda: retrofit(windowed_model("mistral"), 8, 2, layers=[]),
    "learnt sink logits": lambda: retrofit(windowed_model("gpt_oss"), patterns={1: GROUPS}),
}


def _options(model: Any) -> dict[str, Any]:
    """Return what loads a model in float64, which experts have in one implementation only."""
    experts = {"experts_implementation": "eager"} if model.config.model_type == "gpt_oss" else {}
    return {"dtype": torch.float64, **experts}


@pytest.mark.parametrize("kind", KINDS)
def test_every_setting_is_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    model, ids = KINDS[kind](), prompts(2, 30)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    with by_the_oracle(), torch.no_grad():
        check_half_the_digits(model(ids, use_cache=False).logits, expected)
    model.save_pretrained(tmp_path)
    for load_it in LOADERS.values():
        found = load_it(tmp_path, **_options(model))
        patterns = [[patterns_of(each.config, i) for i in range(3)] for each in (model, found)]
        assert patterns[0] == patterns[1]
        with torch.no_grad():
            check_half_the_digits(found(ids, use_cache=False).logits, expected)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")  # Of peft.
@pytest.mark.parametrize("kind", ["heads", "learnt sink logits"])
def test_an_adapter_of_every_setting_is_saved_and_merged(kind: str, tmp_path: Path) -> None:
    base, ids = KINDS[kind](), prompts(1, 30)
    base.save_pretrained(tmp_path / "base")
    low_rank = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    tuned: Any = get_peft_model(base, low_rank).double().eval()
    with torch.no_grad():
        expected = tuned(input_ids=ids).logits
        tuned.save_pretrained(tmp_path / "adapter")
        again = PeftModel.from_pretrained(
            load(tmp_path / "base", **_options(base)), tmp_path / "adapter"
        )
        check_half_the_digits(again.double().eval()(input_ids=ids).logits, expected)
        tuned.merge_and_unload().save_pretrained(tmp_path / "merged")
        merged = load(tmp_path / "merged", **_options(base))
        check_half_the_digits(merged(ids).logits, expected)
        cached = merged(ids, past_key_values=FixedCache(merged.config)).logits
        check_half_the_digits(cached, expected)
