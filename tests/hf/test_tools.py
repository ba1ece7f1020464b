"""Whole models as tools see them: FLOPs of a training step, torch.func, and ONNX."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from colonnade import FixedPattern
from colonnade.hf import retrofit
from tests.cases import mask_of
from tests.hf.models import dense_model, enable_recomputation, prompts, random_model
from tests.rounding import check_half_the_digits

pytestmark = pytest.mark.plain


def _flops(model: Any, ids: Tensor) -> dict[str, int]:
    """Return the FLOPs of a training step in our operations, and of all others."""
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids, use_cache=False).loss.backward()
    found = {str(name): n for name, n in counter.get_flop_counts()["Global"].items()}
    # Before PyTorch 2.15 its own attention on CPUs counts 0.
    rest = sum(n for name, n in found.items() if not name.startswith(("colonnade", "aten._scaled")))
    ours = {name: n for name, n in found.items() if name.startswith("colonnade")}
    ways = {way: sum(n for name, n in ours.items() if way in name) for way in ("_for", "_back")}
    return {**ways, "others": rest}


@pytest.mark.parametrize("recomputed", [False, True])
def test_a_training_step_of_a_retrofitted_model(recomputed: bool) -> None:
    """Two layers of three have the pattern, the other reads everything; heads are 8 wide."""
    model, ids = dense_model("llama"), prompts(2, 29)
    dense = _flops(model, ids)
    retrofit(model, 8, 2, layers=[0, 2]).train()
    if recomputed:
        enable_recomputation(model)
    pairs = 2 * 2 * int(mask_of(FixedPattern(8, 2), 29).sum()) + 2 * 29 * 30 // 2
    found = _flops(model, ids)
    forward, backward = 2 * 4 * pairs * 16, 2 * 4 * pairs * 40
    assert (found["_for"], found["_back"]) == (forward * (1 + recomputed), backward)
    assert (found["others"] == dense["others"]) is not recomputed


def test_a_training_step_of_the_sparse_transformer() -> None:
    """Both layers, two sub-blocks; queries are 2 wide and values 4."""
    found = _flops(random_model().train(), prompts(2, 29))
    pairs = 2 * 2 * 2 * int(mask_of(FixedPattern(8, 2, 2), 29, 2).sum())
    assert (found["_for"], found["_back"]) == (2 * pairs * (2 + 4), 2 * pairs * (3 * 2 + 2 * 4))


class _Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(ids, use_cache=False).logits
        return logits


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["sparse", "llama", "gpt2"])
def test_models_run_in_onnxruntime(name: str, tmp_path: Any) -> None:
    """This needs onnx, onnxscript and onnxruntime, and is skipped without them."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model: Any = random_model() if name == "sparse" else retrofit(dense_model(name), 8, 2)
    module = _Logits(model.float())
    length = torch.export.Dim("length", min=2, max=28)
    program = torch.onnx.export(
        module, (prompts(1, 20),), dynamo=True, dynamic_shapes=({1: length},)
    )
    assert program is not None
    program.save(tmp_path / "program.onnx")
    session = runtime.InferenceSession(tmp_path / "program.onnx")
    for ids in (prompts(1, 20), prompts(1, 27)):
        found = session.run(None, {session.get_inputs()[0].name: ids.numpy()})[0]
        torch.testing.assert_close(torch.from_numpy(found), module(ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["sparse_transformer", "llama"])
def test_vmap_maps_tokens_and_nothing_that_says_where_padding_is(family: str) -> None:
    model: Any = random_model()
    if family == "llama":
        model = retrofit(dense_model(family), 8, 2)
    ids = prompts(3, 20)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], ids: Tensor) -> Tensor:
        call = torch.func.functional_call(model, parameters, (ids[None],), {"use_cache": False})
        total: Tensor = call.logits.square().sum()
        return total

    found = torch.func.vmap(lambda row: model(row[None], use_cache=False).logits[0])(ids)
    check_half_the_digits(found, model(ids).logits)
    of_each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, ids)
    of_second = torch.func.grad(loss)(parameters, ids[1])
    flat = [
        torch.cat([g.flatten() for g in each])
        for each in ([of_each[name][1] for name in of_second], of_second.values())
    ]
    check_half_the_digits(*flat)  # Some of them are 0 but for rounding.
    with pytest.raises(NotImplementedError, match="got a mapped attention_mask"):
        torch.func.vmap(lambda row, mask: model(row[None], mask[None]).logits)(ids, ids > 0)
