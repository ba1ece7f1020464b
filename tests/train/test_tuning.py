"""A retrofit from a folder to a folder: what is saved, resumed and measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    TrainerCallback,
)

from colonnade import FixedPattern, FullPattern, LocalPattern
from colonnade.hf import load
from colonnade.hf.settings import patterns_of
from colonnade.train import retrofitting, tuning
from colonnade.train.retrofit_settings import RetrofitSettings, layers_in
from colonnade.train.retrofitting import CONVERTED, DENSE, DENSE_TUNED, TUNED, open_retrofit, run
from colonnade.train.scores import score
from colonnade.train.steps import rate_share, seconds_per_step
from tests.train.tuned import settings_for, write_model, write_texts

# Of peft, for the adapters of a checkpoint.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    return write_model(folder / "model"), write_texts(folder / "texts")


def start(settings: RetrofitSettings, folder: Path) -> list[dict[str, Any]]:
    opened = open_retrofit(settings)
    retrofitting.prepare_folder(folder)
    return run(opened, folder, say=lambda line: None)


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def losses(folder: Path, step: int) -> list[dict[str, float]]:
    state = json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())
    names = ("step", "loss", "bits_per_byte", "divergence")
    return [{n: e[n] for n in names if n in e} for e in state["log_history"] if "loss" in e]


class Interruption(TrainerCallback):
    """Ends a run in the middle of a step, as Ctrl-C does."""

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 2:
            raise KeyboardInterrupt


@pytest.mark.parametrize("kind", ["lora", "full", pytest.param("dense", marks=pytest.mark.slow)])
def test_a_resumed_run_equals_an_unbroken_one(
    kind: str, inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = 0 if kind == "full" else 2
    settings = settings_for(*inputs, steps=5, lora=rank, tune_dense=kind == "dense")
    whole = tmp_path / "whole"
    results = start(settings, whole)
    broken = tmp_path / "broken"
    runs = []
    of_trainer = tuning.Tuning._trainer

    def interrupted(self: Any, *arguments: Any, **options: Any) -> Any:
        trainer = of_trainer(self, *arguments, **options)
        runs.append(trainer)
        if len(runs) == (2 if kind == "dense" else 1):
            trainer.add_callback(Interruption)
        return trainer

    monkeypatch.setattr(tuning.Tuning, "_trainer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        start(settings, broken)
    monkeypatch.undo()
    assert (broken / "model.safetensors").exists() == (kind == "dense")
    said: list[str] = []
    opened = open_retrofit(RetrofitSettings.load(broken), broken)
    assert run(opened, broken, said.append) == results
    assert any("resuming from" in line for line in said)
    names = [DENSE, CONVERTED, TUNED] + ([DENSE_TUNED] if kind == "dense" else [])
    assert [line["model"] for line in results] == names
    inside = Path("dense") if kind == "dense" else Path()
    assert losses(broken / inside, 5) == losses(whole / inside, 5)
    assert len(losses(whole / inside, 5)) == 5
    assert weights(broken / inside) == weights(whole / inside)
    again = open_retrofit(RetrofitSettings.load(broken), broken)
    assert run(again, broken, said.append) == results


def test_the_saved_model_is_the_tuned_one(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    settings = settings_for(*inputs, layers="1", sinks=1, subblocks=2)
    opened = open_retrofit(settings)
    made: list[PreTrainedModel] = []
    of_run = tuning.Tuning.run

    def kept(self: tuning.Tuning, *arguments: Any) -> PreTrainedModel:
        made.append(of_run(self, *arguments))
        return made[0]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tuning.Tuning, "run", kept)
        retrofitting.prepare_folder(tmp_path)
        results = run(opened, tmp_path, lambda line: None)
    tokens = torch.randint(258, (2, 50))
    with torch.no_grad():
        expected = made[0].eval()(tokens).logits
    for loaded in (load(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert loaded.config._attn_implementation == "colonnade"
        assert loaded.config.use_cache
        assert patterns_of(loaded.config, 1) == FixedPattern(16, 4, 2, sinks=1)
        with torch.no_grad():
            assert (loaded(tokens).logits - expected).abs().max() < 1e-5
        again = score(loaded, opened.corpus, opened.windows)
        assert again.as_results()["by_position"] == results[2]["by_position"]
    assert AutoTokenizer.from_pretrained(tmp_path)("ab").input_ids == [97, 98]
    tuned = [line["bits_per_byte"] for line in results]
    assert tuned[2] < tuned[1]
    dense, converted, _ = results
    assert dense["cache_share"] == 1
    # In one of two layers at most a sink, the summaries of three blocks of 16, and the fourth.
    assert converted["cache_entries"] == 2 * (64 + 1 + 3 * 4 + 16)
    assert dense["cache_bytes"] == 2 * 2 * 64 * 2 * 8 * 4


def test_without_steps_a_model_is_converted_and_measured(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    results = start(settings_for(*inputs, steps=0), tmp_path)
    assert [line["model"] for line in results] == [DENSE, CONVERTED]
    dense = AutoModelForCausalLM.from_pretrained(inputs[0])
    loaded = load(tmp_path)
    for (name, ours), (other, theirs) in zip(
        loaded.named_parameters(), dense.named_parameters(), strict=True
    ):
        assert name == other
        assert torch.equal(ours, theirs)
    tokens = torch.randint(258, (1, 64))
    with torch.no_grad():
        change = (loaded(tokens).logits - dense(tokens).logits).abs().amax((0, 2))
    assert change[:16].max() < 1e-4  # In its first block everything is read.
    assert change[16:].max() > 1e-2


def test_minutes_become_steps_and_leave_no_trace(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run after the timing is that of as many steps, weight for weight."""
    monkeypatch.setattr(tuning, "seconds_per_step", _seconds(seconds_per_step))
    start(settings_for(*inputs, steps=None, minutes=1.0), tmp_path / "timed")
    steps = RetrofitSettings.load(tmp_path / "timed").steps
    assert steps in (4, 5)
    start(settings_for(*inputs, steps=steps), tmp_path / "counted")
    assert weights(tmp_path / "timed") == weights(tmp_path / "counted")


def _seconds(real: Any) -> Any:
    """Run the timed steps, and say that they took eleven seconds each."""

    def eleven(*arguments: Any) -> float:
        assert real(*arguments) > 0
        return 11.0

    return eleven


def test_several_windows_at_once_and_recomputation_give_the_same(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    start(settings_for(*inputs, steps=3), tmp_path / "plain")
    start(settings_for(*inputs, steps=3, recompute=True), tmp_path / "recomputed")
    assert losses(tmp_path / "recomputed", 3) == losses(tmp_path / "plain", 3)
    start(settings_for(*inputs, steps=3, at_once=2), tmp_path / "together")
    # Windows of two documents have a label less, and count as much as others where they are alone.
    found, expected = (losses(tmp_path / name, 3) for name in ("together", "plain"))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=0.02)


def test_weights_keep_the_type_that_they_came_in(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    half = AutoModelForCausalLM.from_pretrained(inputs[0], dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(inputs[0]).save_pretrained(tmp_path / "half")
    settings = settings_for(tmp_path / "half", inputs[1], steps=1, tune_dense=True, bf16=True)
    out = tmp_path / "out"
    opened = open_retrofit(settings)
    retrofitting.prepare_folder(out)

    def early(line: str) -> None:
        assert load_config(out)["dtype"] == "bfloat16", line

    results = run(opened, out, early)
    # The cache is that of the model that is saved: two layers of two heads, each 8 wide.
    assert results[0]["cache_bytes"] == 2 * 2 * 64 * 2 * 8 * 2
    found = load_config(out)
    assert found["architectures"] == ["LlamaForCausalLM"]
    run(open_retrofit(RetrofitSettings.load(out), out), out, early)
    assert load_config(out) == found
    assert load(out).dtype == torch.bfloat16


def load_config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def test_the_type_of_weights_is_theirs_where_nothing_says_it(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    model = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(inputs[0], dtype=torch.bfloat16).save_pretrained(model)
    AutoTokenizer.from_pretrained(inputs[0]).save_pretrained(model)
    config = load_config(model)
    del config["dtype"]
    (model / "config.json").write_text(json.dumps(config))
    start(settings_for(model, inputs[1], steps=0), tmp_path / "out")
    assert load(tmp_path / "out").dtype == torch.bfloat16


def test_a_single_step_tunes(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    start(settings_for(*inputs, steps=1), tmp_path / "out")
    assert weights(tmp_path / "out") != weights(inputs[0])
    tuned, dense = (AutoModelForCausalLM.from_pretrained(f) for f in (tmp_path / "out", inputs[0]))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(tuned.state_dict()[name], dense.state_dict()[name])


def test_the_rate_rises_from_above_0_and_decays() -> None:
    """Against a table for four steps of warm-up and two behind it."""
    found = [rate_share(step, 4, 6) for step in range(7)]
    assert found == pytest.approx([0.25, 0.5, 0.75, 1, 1, 0.5, 0])
    for warm_up in (0, 1):
        assert rate_share(0, warm_up, 1) == 1


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"distill": 1.5}, r"distill must be in \[0, 1\], got distill=1\.5"),
        ({"summary": 17}, r"summary must be in \[1, stride\]"),
        ({"sinks": 13}, r"sinks"),
        ({"at_once": 3}, r"batch_size must be a multiple of at_once, got batch_size=2"),
        ({"budget": 0.5}, r"--budget is for --layers suggest, which needs it; got layers='all'"),
        ({"layers": "suggest"}, r"--budget is for --layers suggest, .* and budget=None"),
        ({"layers": "suggest", "budget": 0.5, "subblocks": 2}, r"no sub-blocks, got subblocks=2"),
        ({"layers": "0,2"}, r"layers must be in \[0, 2\), .* got layers='0,2'"),
        ({"layers": "first"}, r"layers must be 'all', .* got layers='first'"),
        ({"layers": "1-0"}, r"a range of layers must go up, got 1-0 in layers='1-0'"),
        ({"layers": "0,1-0"}, r"a range of layers must go up, got 1-0 in layers='0,1-0'"),
        ({"eval_share": 0.0}, r"eval_share must be between 0 and 1, got eval_share=0\.0"),
        ({"eval_share": 0.004}, r"documents of at most \d+ tokens and stride=16"),
        ({"seq_len": 65}, r"at most the model's max_position_embeddings=64, got seq_len=65"),
        ({"seq_len": 16}, r"seq_len must be above stride"),
        ({"minutes": 0.0}, r"minutes must be finite and above 0, got minutes=0\.0"),
        ({"learning_rate": -1.0}, r"learning_rate must be finite and above 0, got .*=-1\.0"),
        ({"steps": -1}, r"steps must be at least 0"),
        ({"steps": 0, "tune_dense": True}, r"tune_dense needs steps"),
        ({"eval_share": 0.99}, r"text to tune on must hold at least one window of 64 tokens"),
    ],
)
def test_what_cannot_work_is_refused(
    changes: dict[str, Any], rule: str, inputs: tuple[Path, Path]
) -> None:
    with pytest.raises(ValueError, match=rule):
        open_retrofit(settings_for(*inputs, **changes))


def test_models_and_texts_that_do_not_fit_are_refused(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    start(settings_for(*inputs, steps=0), tmp_path / "fixed")
    with pytest.raises(ValueError, match=r"model must be dense, got .*fixed"):
        open_retrofit(settings_for(tmp_path / "fixed", inputs[1]))
    small = write_model(tmp_path / "small", vocab_size=100)
    with pytest.raises(ValueError, match="must belong together, got token 195 and a model of 100"):
        open_retrofit(settings_for(small, inputs[1]))
    text = tmp_path / "text.txt"
    text.write_text("a text that changes " * 40)
    settings = settings_for(inputs[0], text, steps=0)
    start(settings, tmp_path / "changed")
    text.write_text("a text that changed " * 40)
    with pytest.raises(ValueError, match="has changed since the retrofit was started"):
        open_retrofit(RetrofitSettings.load(tmp_path / "changed"), tmp_path / "changed")


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"must be empty, got .*--resume goes on"):
        retrofitting.prepare_folder(tmp_path)
    with pytest.raises(ValueError, match="must be empty"):
        retrofitting.prepare_folder(tmp_path / "notes.txt")
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_layers_are_named_in_words_and_numbers() -> None:
    assert layers_in("all", 3, [0, 1, 2]) == [0, 1, 2]
    assert layers_in("alternate", 5, range(5)) == [1, 3]
    assert layers_in(" 4,0, 1-2 ", 5, range(5)) == [0, 1, 2, 4]
    assert layers_in("2,2-3,3", 5, range(5)) == [2, 3]


def test_words_for_layers_speak_of_those_with_full_attention() -> None:
    assert layers_in("all", 6, [1, 3, 5]) == [1, 3, 5]
    assert layers_in("alternate", 6, [1, 3, 5]) == [3]
    assert layers_in("0", 6, [1, 3, 5]) == [0]
    with pytest.raises(ValueError, match=r"needs two layers with full attention, got .* with 1"):
        layers_in("alternate", 2, [1])


def test_layers_with_a_window_keep_it(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    kinds = ["sliding_attention", "full_attention"]
    sizes = {"sliding_window": 8, "use_sliding_window": True, "layer_types": kinds}
    mixed = write_model(tmp_path / "mixed", Qwen2Config, **sizes)
    start(settings_for(mixed, inputs[1], steps=1), tmp_path / "out")
    saved = load(tmp_path / "out").config
    expected = [LocalPattern(8), FixedPattern(16, 4, sinks=1)]
    assert [patterns_of(saved, layer) for layer in range(2)] == expected
    windows = write_model(tmp_path / "windows", MistralConfig, sliding_window=8)
    with pytest.raises(NotImplementedError, match=r"every layer has a sliding window, got .*=8"):
        open_retrofit(settings_for(windows, inputs[1]))


def test_suggested_layers_are_converted_and_resumed(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for(*inputs, layers="suggest", budget=0.8, steps=1, sinks=1)
    results = start(settings, tmp_path)
    assert results[1]["cache_share"] <= 0.8
    saved = load(tmp_path).config
    patterns = [patterns_of(saved, layer) for layer in range(2)]
    assert sorted(map(str, patterns)) == sorted(map(str, [settings.pattern(), FullPattern()]))
    monkeypatch.setattr(retrofitting, "_suggested", None)  # It was written down.
    opened = open_retrofit(RetrofitSettings.load(tmp_path), tmp_path)
    assert [patterns_of(opened.model.config, layer) for layer in range(2)] == patterns
