"""lm-evaluation-harness runs retrofitted models. These tests are skipped where it is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from colonnade import FixedPattern, LocalPattern
from colonnade.hf import byte_tokenizer, load, retrofit
from tests.hf.models import dense_model, generate

pytestmark = [
    pytest.mark.plain,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # Its own, of many packages.
]
QUESTIONS = [
    {"question": "What is read by every later position?", "choices": [" a sink", " a window"]},
    {"question": "How many?", "choices": [" one", " two"]},
    {"question": "Of a block that is closed, what stays?" * 2, "choices": [" all", " less"]},
    {"question": "And then?", "choices": [" none", " more of the same"]},
    {"question": "The last of these questions is as long as it is:", "choices": ["a", "b"]},
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a small model of bytes, whose layers and heads are of several kinds."""
    folder = tmp_path_factory.mktemp("saved")
    tokenizer = byte_tokenizer()
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model: Any = dense_model("llama", vocab_size=len(tokenizer), bos_token_id=None, **special)
    fixed = FixedPattern(8, 2, sinks=1)
    retrofit(model, patterns={0: fixed, 2: (LocalPattern(6, sinks=1), fixed)})
    model.float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _evaluate(folder: Path, task: dict[str, Any], batch_size: int) -> list[Any]:
    """Return the response to every request of a task, made of `QUESTIONS`."""
    lm_eval = pytest.importorskip("lm_eval")
    file = folder / "questions.jsonl"
    file.write_text("\n".join(map(json.dumps, QUESTIONS)))
    dataset = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "dtype": "float32"},
        tasks=[{"task": "questions", **dataset, **task}],
        batch_size=batch_size,
        device="cpu",
        bootstrap_iters=0,
    )
    samples = sorted(found["samples"]["questions"], key=lambda sample: int(sample["doc_id"]))
    return [response for sample in samples for (response,) in sample["resps"]]


def test_log_likelihoods_are_the_models_at_any_batch_size(saved: Path) -> None:
    """It pads batches on the right, and shows the model no mask."""
    task = {
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": 0,
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    model, tokenizer = load(saved).eval(), byte_tokenizer()
    expected = []
    for each in QUESTIONS:
        for choice in each["choices"]:
            asked, text = (tokenizer.encode(part) for part in (each["question"], choice))
            with torch.no_grad():
                logits = model(torch.tensor([asked + text])).logits[0, len(asked) - 1 : -1]
            picked = logits.log_softmax(-1).gather(1, torch.tensor(text)[:, None])
            expected.append(float(picked.sum()))
    for batch_size in (1, 4):
        found = [response[0] for response in _evaluate(saved, task, batch_size)]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_it_generates_what_the_model_generates(saved: Path) -> None:
    """It pads batches on the left, with a mask."""
    task = {
        "output_type": "generate_until",
        "doc_to_target": "",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 20, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }
    model, tokenizer = load(saved).eval(), byte_tokenizer()
    expected = []
    for each in QUESTIONS:
        asked = torch.tensor([tokenizer.encode(each["question"])])
        written = generate(model, asked, max_new_tokens=20)[0, asked.shape[1] :]
        text = str(tokenizer.decode(written, skip_special_tokens=True))
        expected.append(text.split("\n\n")[0])
    for batch_size in (1, 4):
        assert _evaluate(saved, task, batch_size) == expected
