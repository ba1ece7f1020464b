"""Whole models on a GPU: the demo is trained, scored and sampled, and `generate` uses the cache."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from colonnade.backends import choice
from tests.gpu.common import DEVICE, INTERPRETED, marks, sized

pytestmark = [*marks, pytest.mark.plain]
STEPS = sized(100, 4)


@pytest.fixture
def triton_runs(monkeypatch: pytest.MonkeyPatch, backends_that_ran: list[str]) -> list[str]:
    """Let "auto" take backend "triton" where it can, before any other; list what ran."""
    monkeypatch.setattr(choice, "BY_NAME_ALONE", {})
    order = {"triton": choice.BACKENDS["triton"], **choice.BACKENDS}
    monkeypatch.setattr(choice, "BACKENDS", order)
    return backends_that_ran


def _small(changes: dict[str, Any]) -> dict[str, Any]:
    """Return settings of a model that the interpreter can train, in place of the demo's own."""
    tiny = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2}
    sizes = {"max_position_embeddings": 64, "stride": 16, "summary": 2}
    return {**tiny, **sizes} if INTERPRETED else changes


# PyTorch's compiler looks for gradients where there are none.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("compile", [False, True], ids=["plain", "compiled"])
def test_the_demo_learns_is_scored_and_sampled(
    compile: bool, triton_runs: list[str], tmp_path: Path
) -> None:
    from colonnade.hf import SparseTransformerConfig
    from colonnade.train import evaluate, folder, run, sample, settings
    from colonnade.train.data import standard_library

    data = tmp_path / "text.py"
    data.write_bytes(standard_library().read(0, sized(500_000, 6_000)).tobytes())
    config = SparseTransformerConfig.preset("demo", **_small({}))
    options = {"steps": STEPS, "bf16": True, "compile": compile, "data": str(data)}
    of_run = settings.RunSettings.preset("demo", **options)
    run.check(config, of_run)
    said: list[str] = []
    trainer = run.start(config, of_run, tmp_path / "run", said.append)
    assert not compile or not any("not compiled" in line for line in said), said
    if (
        not compile
    ):  # A compiler calls the operation itself, and a backend's `attend` while it traces.
        assert set(triton_runs) == {"triton"}
    _, losses = trainer.loss_curve()
    assert losses[0] == pytest.approx(8, abs=0.01)
    assert losses[-1] < (losses[0] if INTERPRETED else 6)

    model = folder.load_model(tmp_path / "run")
    torch.nn.Module.to(model, DEVICE)
    corpus = settings.RunSettings.load(tmp_path / "run").corpus()
    begin, end = corpus.split("test")
    held_out = corpus.read(begin, min(end, begin + sized(4_000, 100)))
    window = model.config.max_position_embeddings
    found = evaluate.compare(model, corpus, held_out, window // 2, 2, lambda _: None)
    bits = found[f"model, min context {window // 2}"]
    assert math.isfinite(bits)
    assert bits < 8

    written, count = bytearray(), sized(300, 20)
    report = sample.continue_bytes(model, b"def ", count, written.extend, do_sample=True)
    assert len(written) == count
    assert report.kept <= report.seen


@pytest.mark.parametrize("name", ["ours", "llama"])
def test_generate_gives_the_same_tokens_with_the_cache(name: str, triton_runs: list[str]) -> None:
    """In float32, beyond the ends of some blocks, and as without any cache."""
    from colonnade.hf import FixedCache, retrofit
    from tests.hf.models import dense_model, generate, prompts, random_model

    model: Any = random_model(torch.float32, max_position_embeddings=96)
    if name != "ours":
        model = retrofit(dense_model(name), 8, 2, subblocks=2, layers=[0, 2]).float()
    model = model.to(DEVICE)
    ids = prompts(2, 21).to(DEVICE)
    options = {"max_new_tokens": sized(40, 6), "pad_token_id": 0}
    cache = FixedCache(model.config)
    found = generate(model, ids, past_key_values=cache, **options)
    assert "triton" in triton_runs
    alone = generate(model, ids, use_cache=False, **options)
    assert torch.equal(found, alone)
    assert cache.get_seq_length() == found.shape[1] - 1
