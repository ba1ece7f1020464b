"""Packed files: what windows hold, against a stream that is put together here, and runs on them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from colonnade.hf import SparseTransformerConfig, SparseTransformerForCausalLM
from colonnade.hf.model import SparseTransformerModel
from colonnade.train import run
from colonnade.train.data import SPLITS, Corpus, PackedWindows, open_corpus
from colonnade.train.folder import prepare_folder
from colonnade.train.settings import RunSettings

CONTEXT = 24
sizes_of_files = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(
    lambda sizes: 20 <= sum(sizes) <= 256
)


@contextmanager
def _counting(sizes: list[int]) -> Iterator[Corpus]:
    """Files whose bytes say where they lie: byte i of all of them is i."""
    with tempfile.TemporaryDirectory() as folder:
        for number, (begin, size) in enumerate(zip(accumulate([0, *sizes]), sizes, strict=False)):
            Path(folder, f"{number:03}").write_bytes(bytes(range(begin, begin + size)))
        yield open_corpus(Path(folder))


def _pieces(window: dict[str, Tensor]) -> list[list[int]]:
    """The bytes of a window, taken apart where its positions restart."""
    pieces: list[list[int]] = []
    ids, positions = window["input_ids"].tolist(), window["position_ids"].tolist()
    for byte, position in zip(ids, positions, strict=True):
        if position == 0:
            pieces.append([])
        assert position == len(pieces[-1])
        pieces[-1].append(byte)
    return pieces


@given(sizes=sizes_of_files, split=st.sampled_from(list(SPLITS)), seed=st.integers(0, 99))
def test_a_window_as_long_as_its_split_holds_every_document_once(
    sizes: list[int], split: str, seed: int
) -> None:
    """Whole, but for the two that the ends of the split cut; empty files are nothing."""
    with _counting(sizes) as corpus:
        begin, end = corpus.split(split)
        window = PackedWindows(corpus, split, end - begin, 1, seed)[0]
    files = [range(last - size, last) for size, last in zip(sizes, accumulate(sizes), strict=True)]
    documents = [[byte for byte in file if begin <= byte < end] for file in files]
    assert sorted(_pieces(window)) == list(filter(None, documents))


@given(
    sizes=sizes_of_files,
    context=st.integers(2, 18),
    seed=st.integers(0, 99),
    index=st.integers(0, 50),
)
def test_a_window_is_cut_out_of_one_stream(
    sizes: list[int], context: int, seed: int, index: int
) -> None:
    """Shorter than its documents or longer: a part of what the longest window of the seed holds.

    What it begins in the middle of has positions from there on; no piece's first byte is a label.
    """
    with _counting(sizes) as corpus:
        begin, end = corpus.split("train")
        whole = _pieces(PackedWindows(corpus, "train", end - begin, 1, seed)[0])
        window = PackedWindows(corpus, "train", context, index + 1, seed)[index]
    stream = [(byte, place) for document in whole for place, byte in enumerate(document)]
    first = [byte for byte, _ in stream].index(int(window["input_ids"][0]))
    expected = stream[first : first + context]
    assert window["input_ids"].tolist() == [byte for byte, _ in expected]
    cut = expected[0][1]
    positions = [t if place == cut + t else place for t, (_, place) in enumerate(expected)]
    labels = [byte if p > 0 else -100 for p, (byte, _) in zip(positions, expected, strict=True)]
    assert window["position_ids"].tolist() == positions
    assert window["labels"].tolist() == labels


def test_the_order_of_documents_depends_on_the_seed() -> None:
    with _counting([10] * 20) as corpus:
        orders = {
            tuple(PackedWindows(corpus, "train", 180, 1, seed)[0]["input_ids"].tolist())
            for seed in (0, 0, 1, 2)
        }
    assert len(orders) == 3


def test_every_place_of_the_stream_is_as_likely() -> None:
    """There are 181 - 90 = 91 places: in 4,000 draws one is missing with a chance of 91·e^(-43)."""
    with _counting([1, 30, 0, 69, 100]) as corpus:
        windows = PackedWindows(corpus, "train", 90, 4_000, seed=0)
        first = {int(windows[i]["input_ids"][0]) for i in range(4_000)}
        whole = PackedWindows(corpus, "train", 180, 1, seed=0)[0]["input_ids"]
    assert first == set(whole[:91].tolist())


def _config(**changes: Any) -> SparseTransformerConfig:
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "summary": 1,
    }
    return SparseTransformerConfig(**sizes, max_position_embeddings=CONTEXT, stride=4, **changes)


def test_the_loss_of_a_window_is_that_of_its_pieces_alone() -> None:
    """The mean over all bytes but each piece's first."""
    model = SparseTransformerForCausalLM(_config()).double()
    torch.nn.init.normal_(model.lm_head.weight)
    with _counting([3, 1, 7, 30, 2, 5, 9, 1, 1, 4, 6, 5, 2, 40]) as corpus:
        windows = PackedWindows(corpus, "train", CONTEXT, 8, seed=1)
        batch = [windows[i] for i in range(8)]
    assert max(len(_pieces(window)) for window in batch) > 3
    losses = []
    for window in batch:
        for piece in map(torch.tensor, _pieces(window)):
            logits = model(piece[None]).logits[0, :-1]
            losses.append(F.cross_entropy(logits, piece[1:], reduction="none"))
    together = model(**{name: torch.stack([w[name] for w in batch]) for name in batch[0]})
    # transformers computes the loss in float32; the mean has fewer than 200 terms.
    expected = torch.cat(losses).mean().item()
    assert together.loss.item() == pytest.approx(expected, rel=200 * torch.finfo(torch.float32).eps)


def _folder(path: Path) -> Path:
    """Files of 1 to 60 letters."""
    path.mkdir()
    for number in range(1, 61):
        (path / f"{number:02}").write_bytes(bytes([64 + number]) * number)
    return path


# The type checks replace a configuration's constructor by one that takes its fields alone.
@pytest.mark.plain
@pytest.mark.parametrize("recompute", [False, True])
def test_a_run_reads_packed_windows_and_goes_on_with_them(
    recompute: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is given the windows, each once; resumed, the rest, and ends with equal weights."""
    seen: list[tuple[bool, list[int], list[int]]] = []
    forward = SparseTransformerModel.forward

    def record(self: SparseTransformerModel, *args: Any, **kwargs: Any) -> Any:
        ids, positions = kwargs["input_ids"], kwargs["position_ids"]
        for row, of_row in zip(ids.tolist(), positions.tolist(), strict=True):
            seen.append((self.training, row, of_row))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(SparseTransformerModel, "forward", record)
    settings = RunSettings(
        data=str(_folder(tmp_path / "texts")),
        steps=4,
        batch_size=2,
        learning_rate=1e-2,
        warmup_steps=1,
        pack=True,
        recompute=recompute,
    )
    config = _config(scheme="interleaved", attention_dropout=0.2)
    folder = tmp_path / "run"
    prepare_folder(folder, overwrite=False)
    run.check(config, settings)
    run.start(config, settings, folder, say=lambda said: None)

    corpus = settings.corpus()
    for training, split, count in ((True, "train", 8), (False, "validation", 32)):
        windows = PackedWindows(corpus, split, CONTEXT, count, settings.seed)
        expected = sorted(
            (w["input_ids"].tolist(), w["position_ids"].tolist())
            for w in (windows[i] for i in range(count))
        )
        found = [row[1:] for row in seen if row[0] == training]
        assert sorted(map(tuple, found[:count])) == expected

    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    shutil.rmtree(folder / "checkpoint-4")
    trained = [row[1:] for row in seen if row[0]]
    seen.clear()
    run.resume(folder, say=lambda said: None)
    assert [row[1:] for row in seen if row[0]] == trained[6:]
    assert (folder / "model.safetensors").read_bytes() == weights
