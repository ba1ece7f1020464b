"""Whole models, compiled for training and exported: in one graph, with the results of the model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from colonnade import FixedPattern
from colonnade.hf import retrofit
from colonnade.nn import SelfAttention
from tests.hf.models import dense_model, positions_of, prompts, random_model
from tests.hf.test_batches import HOLES, SETTINGS

pytestmark = [
    pytest.mark.plain,
    # PyTorch's own: its compiler uses what it warns of.
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
]
LENGTHS = (40, 41, 57, 33)


def _model(name: str) -> Any:
    if name in SETTINGS:
        return random_model(max_position_embeddings=96, **SETTINGS[name]).train()
    model: Any = retrofit(dense_model(name), 8, 2, subblocks=2, layers=[0, 2]).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):  # GPT-2 has some.
            module.p = 0.0
    model.loss_type = "ForCausalLM"  # GPT-2 would log, in the graph, that it has none.
    return model


def _batch(kind: str, length: int) -> dict[str, Tensor]:
    """Return tokens, and whatever says where documents or padding are."""
    ids = prompts(4, length)
    batch = {"input_ids": ids, "labels": ids.clone()}
    if kind == "ones":
        batch["attention_mask"] = torch.ones_like(ids)
    if "padded" in kind:
        batch["attention_mask"] = F.pad(HOLES, (length - HOLES.shape[1], 0), value=True).long()
        batch["labels"][batch["attention_mask"] == 0] = -100
    if kind == "packed and ones":
        batch["attention_mask"] = torch.ones_like(ids)
    if kind == "packed and padded":
        batch["attention_mask"][:] = 1
        batch["attention_mask"][0, :3] = batch["attention_mask"][1:, -2:] = 0
        batch["labels"] = ids.masked_fill(batch["attention_mask"] == 0, -100)
    if kind == "padded and counted":
        batch["position_ids"] = positions_of(batch["attention_mask"])
    if kind == "flattened":
        parts = [torch.arange(n) for n in (17, 1, length - 18)] * 4
        ends = torch.tensor([0, *map(len, parts)]).cumsum(0)
        batch["cu_seq_lens_q"] = batch["cu_seq_lens_k"] = ends
        batch["seq_idx"] = torch.bucketize(torch.arange(4 * length), ends, right=True).view(4, -1)
    if "packed" in kind:
        parts = [torch.arange(n) for n in (17, 1, length - 18)]
        batch["position_ids"] = torch.cat(parts).expand(4, -1)
    return batch


QUICK = ("merged", "padded", "aot_eager")
CASES = [
    (name, kind, "aot_eager")
    for name in (*SETTINGS, "llama", "gpt2")
    for kind in ("plain", "ones", "padded", "packed")
]
CASES += [
    (name, kind, "aot_eager")
    for name in ("merged", "strided", "multihead", "llama")
    for kind in ("packed and ones", "packed and padded", "padded and counted", "flattened")
]
CASES += [(name, "padded", "inductor") for name in ("merged", "strided", "llama")]


@pytest.mark.parametrize(
    ("name", "kind", "compiler"),
    [pytest.param(*case, marks=() if case == QUICK else pytest.mark.slow) for case in CASES],
)
def test_training_compiled_is_training(name: str, kind: str, compiler: str) -> None:
    """Without a break, in at most four graphs for all lengths."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    model = _model(name)
    compiled = torch.compile(model, fullgraph=True, backend=compiler)

    def step(run: Any, batch: dict[str, Tensor]) -> list[Tensor]:
        model.zero_grad()
        loss = run(**batch, use_cache=False).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    for length in LENGTHS:
        batch = _batch(kind, length)
        for found, expected in zip(step(compiled, batch), step(model, batch), strict=True):
            # transformers computes losses in float32.
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["merged", "llama"])
def test_a_trainer_compiles(name: str, tmp_path: Path) -> None:
    losses = []
    for compiling in (False, True):
        torch.compiler.reset()
        torch.manual_seed(0)
        data = [{key: t[0] for key, t in _batch("padded", 40).items()} for _ in range(8)]
        trainer = Trainer(
            _model(name).float(),
            TrainingArguments(
                output_dir=str(tmp_path),
                torch_compile=compiling,
                max_steps=3,
                per_device_train_batch_size=2,
                report_to=[],
                logging_steps=1,
                save_strategy="no",
                use_cpu=True,
            ),
            train_dataset=data,
        )
        trainer.train()
        losses.append([e["loss"] for e in trainer.state.log_history if "loss" in e])
    torch.testing.assert_close(*losses, rtol=1e-4, atol=0.0)


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ["merged", "llama", "gpt2"])
def test_exported_with_any_length(name: str, masked: bool) -> None:
    model = _model(name).eval()
    model.config.use_cache = False

    def inputs(length: int) -> dict[str, Tensor]:
        batch = _batch("padded" if masked else "plain", length)
        del batch["labels"]
        return batch

    dim = torch.export.Dim("length", min=2, max=90)
    given = inputs(40)
    program = torch.export.export(
        model, (), given, dynamic_shapes={key: {1: dim} for key in given}
    ).module()
    for length in (21, 40, 57):
        given = inputs(length)
        there = given.get("attention_mask", torch.ones(4, length)).bool()
        found, expected = (run(**given).logits[there] for run in (program, model))
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("packaged", [False, True])
def test_a_program_runs_in_a_process_of_its_own(packaged: bool, tmp_path: Path) -> None:
    """After import colonnade; without the kernel that is baked in it says what is missing."""
    layer = SelfAttention(32, 4, FixedPattern(16, 4), backend="native").eval()
    x = torch.randn(1, 70, 32)
    length = torch.export.Dim("length", min=2, max=512)
    program = torch.export.export(layer, (x,), dynamic_shapes=({1: length},))
    file = str(tmp_path / "layer.pt2")
    if packaged:
        torch._inductor.aoti_compile_and_package(program, package_path=file)
        run = f"torch._inductor.aoti_load_package({file!r})"
    else:
        torch.export.save(program, file)
        run = f"torch.export.load({file!r}).module()"
    x = torch.randn(1, 100, 32)
    with torch.no_grad():
        torch.save((x, layer(x)), tmp_path / "expected.pt")
    code = f"""
import torch, colonnade
x, expected = torch.load({str(tmp_path / "expected.pt")!r})
torch.testing.assert_close({run}(x), expected)
"""

    def done(**environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
        )

    assert done().returncode == 0, done().stderr
    without = done(COLONNADE_NATIVE="0")
    assert without.returncode != 0
    assert "backend='eager'" in without.stderr
