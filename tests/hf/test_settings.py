"""The settings of each layer: what is written is what is read, and nothing is read wrongly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

import colonnade as col
from colonnade.hf import load, retrofit
from colonnade.hf.settings import patterns_of, write_patterns
from colonnade.ops.heads import Patterns
from tests.hf.models import dense_model, prompts, small_config

pytestmark = pytest.mark.plain

FIXED, SUNK = col.FixedPattern(8, 2), col.FixedPattern(8, 2, 2, sinks=3)
LOCAL, FULL = col.LocalPattern(5, sinks=1), col.FullPattern()


def _written(model: Any) -> dict[str, Any]:
    """Return what the file of a configuration says of patterns."""
    every = json.loads(model.config.to_json_string())
    return {name: every[name] for name in every if "colonnade_" in name or "per_layer" in name}


def _read(config: Any) -> list[Patterns]:
    return [patterns_of(config, layer) for layer in range(3)]


@pytest.mark.parametrize(
    "patterns",
    [
        [FIXED, FULL, FIXED],
        [SUNK, FIXED, SUNK],
        [FULL, LOCAL, col.LocalPattern(9)],
        [SUNK, col.StridedPattern(6), FULL],
        [(LOCAL, SUNK), FIXED, (FULL, col.StridedPattern(4))],
        [(LOCAL, FIXED), (LOCAL, FIXED), (FIXED, LOCAL)],
        [(SUNK,), LOCAL, FIXED],
        [FULL, FULL, FULL],
    ],
)
def test_what_is_written_is_read_from_the_file(patterns: list[Patterns], tmp_path: Path) -> None:
    model = retrofit(dense_model("llama"), 4, 1, 2, sinks=1, layers=[0])
    retrofit(model, patterns=dict(enumerate(patterns)))
    assert _read(model.config) == patterns
    model.save_pretrained(tmp_path)
    assert _read(load(tmp_path).config) == patterns
    write_patterns(model.config, [FIXED, FIXED, FULL], FIXED)
    assert _read(model.config) == [FIXED, FIXED, FULL]
    assert _written(model) == _written(retrofit(dense_model("llama"), 8, 2, layers=[0, 1]))


def test_it_is_written_as_one_would_write_it() -> None:
    of_all: dict[str, Any] = {"colonnade_stride": 8, "colonnade_summary": 2}
    of_all |= {"colonnade_subblocks": 1}
    of_all |= {"colonnade_pattern": "fixed", "colonnade_sinks": 1}
    model = retrofit(dense_model("llama"), 8, 2, layers=[0, 2], sinks=1)
    assert _written(model) == {**of_all, "per_layer_config": {"1": {"colonnade_pattern": "full"}}}
    assert _written(retrofit(model, patterns={})) == {"colonnade_pattern": "full"}
    sunk, groups = col.FixedPattern(8, 2, sinks=1), (col.LocalPattern(4), FIXED)
    assert _written(retrofit(model, patterns={0: sunk, 1: sunk, 2: groups})) == {
        **of_all,
        "colonnade_heads": None,
        "per_layer_config": {
            "2": {
                "colonnade_heads": [
                    {"pattern": "local", "window": 4, "sinks": 0},
                    {"pattern": "fixed", "stride": 8, "summary": 2, "subblocks": 1, "sinks": 0},
                ]
            }
        },
    }


def test_settings_of_layers_that_are_not_ours_stay() -> None:
    model = dense_model("llama")
    model.config.per_layer_config = {1: {"attention_dropout": 0.5}}
    retrofit(model, 8, 2, layers=[0, 1])
    assert [each.attention_dropout for each in model.config.per_layer_config] == [0.0, 0.5, 0.0]
    assert _read(model.config) == [FIXED, FIXED, FULL]


def test_checkpoints_of_earlier_versions_read_as_before() -> None:
    earlier = {"colonnade_stride": 8, "colonnade_summary": 2}
    for kind, expected in {
        "fixed": FIXED,
        "strided": col.StridedPattern(8),
        "local": col.LocalPattern(8),
        "full": FULL,
    }.items():
        config = AutoConfig.for_model("llama", **earlier, colonnade_pattern=kind)
        assert patterns_of(config, 0) == expected
        assert patterns_of(small_config(subblocks=1, pattern=kind), 1) == expected
    assert patterns_of(AutoConfig.for_model("llama", **earlier), 0) == FIXED
    groups = {"colonnade_heads": [{"pattern": "local"}, {"sinks": 2}]}
    config = AutoConfig.for_model("llama", **earlier, **groups)
    assert patterns_of(config, 0) == (col.LocalPattern(8), col.FixedPattern(8, 2, sinks=2))


def test_our_model_takes_sinks_and_a_window() -> None:
    assert patterns_of(small_config(subblocks=1, sinks=3), 0) == col.FixedPattern(8, 2, sinks=3)
    local = small_config(pattern="local", sinks=9, colonnade_window=5)
    assert patterns_of(local, 0) == col.LocalPattern(5, sinks=9)
    factors = small_config(scheme="multihead", sinks=1)
    assert patterns_of(factors, 0) == col.FixedPattern(8, 2, 2, sinks=1).factors()
    assert small_config(pattern="full", sinks=3).sinks == 3
    with pytest.raises(ValueError, match=r"sinks must be at most .* = 4, got sinks=5"):
        small_config(sinks=5)
    with pytest.raises(ValueError, match=r"sinks must be 0 for pattern='strided'.*sinks=1"):
        small_config(pattern="strided", sinks=1)
    with pytest.raises(ValueError, match=r"sinks must be at least 0, got sinks=-1"):
        small_config(pattern="full", sinks=-1)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"colonnade_sink": 1},
            ValueError,
            r"knows .* only, got \['colonnade_sink'\]",
        ),
        ({"colonnade_sinks": "2"}, TypeError, "sinks must be an int, got sinks='2'"),
        ({"colonnade_sinks": 7}, ValueError, "sinks must be at most"),
        ({"colonnade_pattern": "local", "colonnade_window": 0}, ValueError, "window must be at"),
        ({"colonnade_pattern": "dense"}, ValueError, r"one of \['fixed', .*got pattern='dense'"),
        ({"colonnade_stride": None}, ValueError, "needs colonnade_stride and colonnade_summary"),
        ({"colonnade_heads": {}}, ValueError, r"heads must be a list with a dict.*heads=\{\}"),
        ({"colonnade_heads": []}, ValueError, "at least one, got colonnade_heads="),
        ({"colonnade_heads": [8, 2]}, ValueError, "must be a list with a dict for each group"),
        ({"colonnade_heads": [{"scheme": "merged"}]}, ValueError, r"got \['scheme'\]"),
        ({"colonnade_heads": [{"summary": 9}]}, ValueError, "summary=9 and stride=8"),
        (
            {"colonnade_heads": [{}], "colonnade_scheme": "multihead"},
            ValueError,
            "scheme must be 'merged' where head groups",
        ),
    ],
)
def test_what_cannot_be_read_is_refused(
    settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    every = {"colonnade_stride": 8, "colonnade_summary": 2, **settings}
    config = AutoConfig.for_model("llama", **every)
    with pytest.raises(error, match=message):
        patterns_of(config, 0)


def test_a_checkpoint_of_a_later_version_is_refused_where_it_is_loaded(tmp_path: Path) -> None:
    model = retrofit(dense_model("llama"), 8, 2)
    model.config.colonnade_learnt = True
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"\['colonnade_learnt'\]. A later version"):
        load(tmp_path)
    with pytest.raises(ValueError, match="colonnade_learnt"):
        small_config(colonnade_learnt=True)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, TypeError, "needs stride and summary, or patterns, got stride=None"),
        ({"stride": 8}, TypeError, "got stride=8 and summary=None"),
        ({"stride": 8, "patterns": {}}, ValueError, "got patterns and stride=8"),
        ({"layers": [], "patterns": {}}, ValueError, r"got patterns and layers=\[\]"),
        ({"subblocks": 2, "patterns": {}}, ValueError, "got patterns and subblocks=2"),
        ({"sinks": 1, "patterns": {0: FIXED}}, ValueError, "got patterns and sinks=1"),
        ({"stride": 8, "summary": 2, "sinks": 7}, ValueError, "sinks must be at most"),
        ({"stride": 8, "summary": 2, "sinks": 1.0}, TypeError, "sinks must be an int"),
        ({"patterns": [FIXED]}, TypeError, "must be a dict of layer indices.*got a list"),
        ({"patterns": {3: FIXED}}, ValueError, r"patterns=\[3\] and num_hidden_layers=3"),
        ({"patterns": {"0": FIXED}}, TypeError, "integers, got '0' in patterns"),
        ({"patterns": {0: 8}}, TypeError, "got a int. It stands in patterns for layer 0"),
        ({"patterns": {0: (FIXED,) * 3}}, ValueError, r"len\(pattern\)=3 and num_kv_heads=2"),
        ({"patterns": {0: ()}}, ValueError, r"len\(pattern\)=0"),
        ({"patterns": {0: col.FixedPattern(8, 2, part="local")}}, ValueError, "part='local'"),
        ({"patterns": {0: col.FixedPattern(8, 2, causal=False)}}, ValueError, "causal=False"),
        ({"patterns": {0: (FIXED, col.FullPattern(causal=False))}}, ValueError, "causal=False"),
        ({"patterns": {0: col.StridedPattern(8, part="summary")}}, ValueError, "part='summary'"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = dense_model("llama")
    with pytest.raises(error, match=message):
        retrofit(model, **arguments)
    assert not any(name.startswith("colonnade_") for name in vars(model.config))


@pytest.mark.parametrize("use_cache", [False, True])
def test_more_groups_than_key_heads_are_refused_where_they_attend(use_cache: bool) -> None:
    """They can be written into a configuration by hand."""
    model = retrofit(dense_model("llama"), 8, 2)
    model.config.colonnade_heads = [{"pattern": "full"}] * 3
    with pytest.raises(ValueError, match=r"len\(pattern\)=3 and num_kv_heads=2"):
        model(prompts(1, 20), use_cache=use_cache)
