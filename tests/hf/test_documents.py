"""Whatever says where documents and padding are, one case of a kind; `drawn.py` draws many more."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    CsmBackboneModel,
    CsmConfig,
    DataCollatorWithFlattening,
    DynamicCache,
    LlamaForSequenceClassification,
    StaticCache,
)
from transformers.masking_utils import create_masks_for_generate

from colonnade.hf import FixedCache, documents, retrofit
from tests.hf.models import GROUPED, SIZES, dense_model, generate, prompts, random_model
from tests.rounding import check_half_the_digits

pytestmark = pytest.mark.plain
LENGTHS = (9, 1, 14)
ENDS = (0, *accumulate(LENGTHS))
TOTAL = sum(LENGTHS)
RESTARTS = torch.cat([torch.arange(n) for n in LENGTHS])[None]
each_model = pytest.mark.parametrize("family", ["sparse_transformer", "llama", "gpt2"])


def _model(family: str) -> Any:
    if family == "sparse_transformer":
        return random_model(max_position_embeddings=64)
    return retrofit(dense_model(family), 8, 2, subblocks=2)


def _alone(model: Any, ids: Tensor) -> Tensor:
    """Return the logits of the documents of one row, each by itself."""
    parts = [model(part, use_cache=False).logits for part in ids.split(LENGTHS, 1)]
    return torch.cat(parts, 1)


@each_model
@pytest.mark.parametrize("positions", [True, False])
def test_what_a_collator_says(family: str, positions: bool) -> None:
    """transformers' own, with all that it can say, and without positions."""
    model, ids = _model(family), prompts(1, TOTAL)
    collate = DataCollatorWithFlattening(
        return_position_ids=positions, return_flash_attn_kwargs=True, return_seq_idx=True
    )
    batch = collate([{"input_ids": part[0].tolist()} for part in ids.split(LENGTHS, 1)])
    assert set(batch) >= {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "seq_idx"}
    result = model(**batch)
    check_half_the_digits(result.logits, _alone(model, ids))
    assert result.past_key_values is None
    with torch.no_grad():
        assert result.loss.isfinite()


@each_model
@pytest.mark.parametrize(
    "given",
    [
        {"cu_seq_lens_q": torch.tensor(ENDS)},
        {"cu_seq_lens_k": torch.tensor(ENDS, dtype=torch.int32), "max_length_k": 14},
        {"cu_seq_lens_q": torch.tensor([0, 9, 9, 10, 24, 24])},
        {"seq_idx": torch.tensor([5] * 9 + [2] + [7] * 14)[None]},
        {"position_ids": RESTARTS, "attention_mask": torch.ones(1, TOTAL)},
        {"position_ids": RESTARTS + 2, "seq_idx": torch.tensor([0] * 9 + [1] + [0] * 14)[None]},
    ],
    ids=lambda given: " ".join(given),
)
def test_one_way_to_say_it_is_enough(family: str, given: dict[str, Tensor]) -> None:
    model, ids = _model(family), prompts(1, TOTAL)
    found = model(ids, **given).logits
    places = given.get("position_ids", RESTARTS)
    pieces = zip(ids.split(LENGTHS, 1), places.split(LENGTHS, 1), strict=True)
    parts = [model(part, position_ids=place).logits for part, place in pieces]
    check_half_the_digits(found, torch.cat(parts, 1))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"attention_mask": torch.ones(1, TOTAL)}, r"attention_mask must be \[batch"),
        ({"attention_mask": torch.ones(2, TOTAL + 1)}, r"attention_mask.shape=\(2, 25\)"),
        ({"attention_mask": torch.ones(2, TOTAL - 1)}, r"for 2 rows of 24 tokens"),
        ({"attention_mask": torch.ones(TOTAL)}, r"a tensor \[batch, positions\].*\(24,\)"),
        ({"attention_mask": torch.ones(2, 1, TOTAL)}, r"a tensor \[batch, positions\]"),
        ({"attention_mask": [[1] * TOTAL] * 2}, "got list"),
        ({"attention_mask": torch.full((2, TOTAL), 2)}, "1 at tokens and 0 at padding"),
        ({"attention_mask": torch.full((2, TOTAL), 0.5)}, "1 at tokens and 0 at padding"),
        ({"position_ids": torch.zeros(2, 3, dtype=torch.long)}, r"position_ids must be \[batch or"),
        ({"position_ids": torch.arange(TOTAL)[None] // 2}, "comes twice in position_ids="),
        ({"position_ids": RESTARTS[0]}, r"position_ids must be \[batch or"),
        ({"position_ids": RESTARTS.float()}, "position_ids must be integers"),
        ({"cu_seq_lens_q": [0, 24, 48]}, "cu_seq_lens_q must be a tensor, got a list"),
        ({"cu_seq_lens_q": torch.tensor([0, 9, 24])}, r"from 0 to the number of tokens.*2 · 24"),
        ({"cu_seq_lens_q": torch.tensor([1, 24, 48])}, "from 0"),
        ({"cu_seq_lens_q": torch.tensor([0, 30, 24, 48])}, "go up"),
        ({"cu_seq_lens_q": torch.tensor([0, 30, 48])}, "from one row of a batch to the next"),
        ({"cu_seq_lens_q": torch.tensor([[0, 24, 48]])}, r"cu_seq_lens_q.shape=\(1, 3\)"),
        (
            {"cu_seq_lens_q": torch.tensor([0, 24, 48]), "cu_seq_lens_k": torch.tensor([0, 48])},
            "must be equal",
        ),
        ({"cu_seq_lens_q": torch.tensor([0, 24, 48]), "max_length_q": 23}, "the longest document"),
        ({"max_length_q": 24}, "cu_seq_lens_q must say where"),
        ({"cu_seq_lens_q": torch.tensor([0.0, 24.0, 48.0])}, "cu_seq_lens_q must be integers"),
        ({"seq_idx": torch.full((2, TOTAL), float("nan"))}, "seq_idx must be integers"),
        ({"cache_position": torch.arange(1, TOTAL + 1)}, "must be the next places in the cache"),
        ({"cache_position": torch.arange(3)}, r"cache_position must be \[length\]"),
        ({"position_ids": RESTARTS.tolist()}, "position_ids must be a tensor, got a list"),
        ({"position_ids": RESTARTS > 0}, "position_ids must be integers"),
        ({"seq_idx": torch.zeros(3, TOTAL, dtype=torch.int)}, r"seq_idx must be \[batch or 1"),
        (
            {
                "seq_idx": torch.arange(TOTAL)[None] // 12,
                "cu_seq_lens_q": torch.tensor([0, 24, 48]),
            },
            "must say the same",
        ),
        (
            {"position_ids": RESTARTS, "cu_seq_lens_q": torch.tensor([0, 24, 48])},
            "restart only where cu_seq_lens_q",
        ),
        ({"position_ids": RESTARTS, "use_cache": True}, "take no cache.*use_cache=False"),
        ({"position_ids": RESTARTS, "past_key_values": DynamicCache()}, "take no cache"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
@each_model
def test_contradictions_are_refused(family: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _model(family)(prompts(2, TOTAL), **given)


@each_model
@pytest.mark.parametrize("name", ["document_ids", "segment_ids", "block_mask", "atention_mask"])
def test_an_argument_that_nobody_knows_is_refused(family: str, name: str) -> None:
    model, ids = _model(family), prompts(1, TOTAL)
    with pytest.raises(NotImplementedError, match=rf"has no {name}, got {name}=a tensor"):
        model(ids, **{name: torch.zeros(1, TOTAL)})
    assert torch.equal(model(ids, **{name: None}).logits, model(ids).logits)


@each_model
def test_positions_that_jump_forward_begin_no_document(family: str) -> None:
    """As in positional skip-wise training (PoSE): the pattern counts tokens."""
    model, ids = _model(family), prompts(1, TOTAL)
    jumps = torch.cat([torch.arange(10), torch.arange(30, 44)])[None]
    whole = model(ids, position_ids=jumps).logits
    cache = DynamicCache()
    parts = [
        model(part, position_ids=place, past_key_values=cache).logits
        for part, place in zip(ids.split([12, 12], 1), jumps.split([12, 12], 1), strict=True)
    ]
    check_half_the_digits(torch.cat(parts, 1), whole)
    other = ids.clone()
    other[:, 7] = (ids[:, 7] - 2 + 1) % 95 + 2  # A summary column, before the jump.
    assert not torch.allclose(model(other, position_ids=jumps).logits[:, -1], whole[:, -1])


@each_model
@pytest.mark.parametrize("make", [FixedCache, DynamicCache])
def test_a_document_may_begin_behind_a_cache(family: str, make: Any) -> None:
    model, ids = _model(family), prompts(2, TOTAL)
    cache = make(model.config) if make is FixedCache else make()
    parts = []
    for part, place in zip(ids.split(LENGTHS, 1), RESTARTS.split(LENGTHS, 1), strict=True):
        for token, at in zip(part.split(5, 1), place.split(5, 1), strict=True):
            parts.append(model(token, position_ids=at, past_key_values=cache).logits)
    check_half_the_digits(torch.cat(parts, 1), _alone(model, ids))


def test_a_row_begins_a_document_while_others_go_on() -> None:
    """In a FixedCache, which also selects rows afterwards; other caches refuse it."""
    model, ids = _model("llama"), prompts(3, TOTAL)
    first, second = torch.arange(13).expand(3, -1), torch.arange(13, TOTAL).repeat(3, 1)
    second[1] -= 13
    caches = [FixedCache(model.config), DynamicCache()]
    for each in caches:
        model(ids[:, :13], position_ids=first, past_key_values=each)
    with pytest.raises(NotImplementedError, match=r"begin a document at once.*Use a FixedCache"):
        model(ids[:, 13:], position_ids=second, past_key_values=caches[1])
    cache: Any = caches[0]
    cache.reorder_cache(torch.tensor([1, 2, 0]))
    rows, second = ids[[1, 2, 0]], second[[1, 0, 2]]
    model(rows[:, 13:20], position_ids=second[:, :7], past_key_values=cache)
    cache.batch_select_indices(torch.tensor([0, 2]))
    rows, second = rows[[0, 2]], second[[0, 2]]
    found = model(
        rows[:, 20:],
        position_ids=second[:, 7:],
        attention_mask=torch.ones(2, TOTAL),
        past_key_values=cache,
    ).logits
    check_half_the_digits(found[:1], model(rows[:1, 13:]).logits[:, 7:])
    check_half_the_digits(found[1:], model(rows[1:]).logits[:, 20:])
    with pytest.raises(ValueError, match="a document began at the new end or behind it"):
        cache.crop(-15)


@each_model
@pytest.mark.parametrize("make", [FixedCache, DynamicCache])
def test_positions_that_neither_go_on_nor_restart_are_refused(family: str, make: Any) -> None:
    model, ids = _model(family), prompts(1, TOTAL)
    cache = make(model.config) if make is FixedCache else make()
    model(ids[:, :9], past_key_values=cache)
    with pytest.raises(ValueError, match=r"go on where the row in the cache ends.*begin at \[4\]"):
        model(ids[:, 9:10], position_ids=torch.tensor([[4]]), past_key_values=cache)
    with pytest.raises(NotImplementedError, match="by position_ids alone, got seq_idx"):
        model(ids[:, 9:10], seq_idx=torch.zeros(1, 1, dtype=torch.int), past_key_values=cache)
    onward = model(ids[:, 9:], past_key_values=cache).logits
    check_half_the_digits(onward, model(ids).logits[:, 9:])


@each_model
@pytest.mark.filterwarnings("ignore:A decoder-only architecture")
def test_generation_from_padding_on_the_right_is_refused(family: str) -> None:
    """transformers would go on counting from the padding."""
    model, ids = _model(family), prompts(2, 10)
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    with pytest.raises(ValueError, match="put padding on the left"):
        generate(model, ids, attention_mask=mask, max_new_tokens=2, pad_token_id=0)


def test_a_head_of_another_task_is_told_too() -> None:
    base = retrofit(dense_model("llama"), 8, 2)
    model = LlamaForSequenceClassification(base.config).double().eval()
    model.model.load_state_dict(base.model.state_dict())
    ids = prompts(1, TOTAL)
    ends = torch.tensor([0, 10, TOTAL])
    found = model(ids, cu_seq_lens_q=ends, cu_seq_lens_k=ends).logits
    check_half_the_digits(found, model(ids[:, 10:]).logits)
    with pytest.raises(NotImplementedError, match="has no document_ids"):
        model(ids, document_ids=ids)


@each_model
@pytest.mark.parametrize("make", [FixedCache, DynamicCache])
def test_a_document_that_began_behind_a_cache_goes_on_without_positions(
    family: str, make: Any
) -> None:
    """They are counted in the document, as they would be alone; one row has padding."""
    model, ids = _model(family), prompts(2, TOTAL)
    cache = make(model.config) if make is FixedCache else make()
    model(ids[:, :9], past_key_values=cache)
    parts = [
        model(ids[:, 9:13], position_ids=torch.arange(4)[None], past_key_values=cache).logits,
        model(ids[:, 13:20], past_key_values=cache).logits,
    ]
    mask = torch.ones_like(ids)
    mask[0, 21] = 0
    parts.append(model(ids[:, 20:], attention_mask=mask, past_key_values=cache).logits)
    found = torch.cat(parts, 1)
    kept = mask[0, 9:].bool()
    check_half_the_digits(found[1], model(ids[1:, 9:]).logits[0])
    check_half_the_digits(found[0, kept], model(ids[:1, 9:][:, kept]).logits[0])


@each_model
@pytest.mark.parametrize("make", [FixedCache, DynamicCache])
def test_generation_from_a_cache_with_several_documents_is_refused(family: str, make: Any) -> None:
    """It counts the tokens of all of them, which looks like a jump. A real jump is obeyed."""
    model, ids = _model(family), prompts(2, TOTAL)
    cache = make(model.config) if make is FixedCache else make()
    model(ids[:, :9], past_key_values=cache)
    model(ids[:, 9:20], position_ids=torch.arange(11)[None], past_key_values=cache)
    with pytest.raises(ValueError, match=r"begin at \[20, 20\].*\[11, 11\].*`generate` counts"):
        generate(model, ids[:, :21], past_key_values=cache, max_new_tokens=2)
    there = torch.tensor([[*range(11), *range(30, 34)]])
    found = model(ids[:, 20:], position_ids=there[:, 11:], past_key_values=cache).logits
    check_half_the_digits(found, model(ids[:, 9:], position_ids=there).logits[:, 11:])


@each_model
def test_places_in_the_cache_may_be_said_again(family: str) -> None:
    """As callers did for earlier releases of transformers."""
    model, ids, cache = _model(family), prompts(1, TOTAL), DynamicCache()
    parts = [
        model(ids[:, part], past_key_values=cache, cache_position=torch.arange(TOTAL)[part]).logits
        for part in (slice(0, 9), slice(9, TOTAL))
    ]
    check_half_the_digits(torch.cat(parts, 1), model(ids).logits)


def test_a_restart_below_what_positions_jumped_to_is_seen() -> None:
    """The same positions in one call are two documents."""
    model, ids = _model("llama"), prompts(2, TOTAL)
    for make in (lambda: FixedCache(model.config), DynamicCache):
        cache = make()
        model(ids[:, :5], position_ids=torch.arange(100, 105)[None], past_key_values=cache)
        with pytest.raises(ValueError, match=r"restart at 0.*begin at \[50, 50\]"):
            model(ids[:, 5:9], position_ids=torch.arange(50, 54)[None], past_key_values=cache)
        restarted = model(ids[:, 5:], position_ids=torch.arange(19)[None], past_key_values=cache)
        check_half_the_digits(restarted.logits, model(ids[:, 5:]).logits)


def test_a_row_without_new_tokens_keeps_its_document() -> None:
    model, ids = _model("llama"), prompts(2, TOTAL)
    mask = torch.ones_like(ids)
    mask[1, 6:10] = 0
    second = {
        "attention_mask": mask[:, :10],
        "position_ids": torch.arange(4).expand(2, -1),
    }
    cache: Any = DynamicCache()
    model(ids[:, :6], past_key_values=cache)
    with pytest.raises(NotImplementedError, match="Use a FixedCache"):
        model(ids[:, 6:10], **second, past_key_values=cache)
    cache = FixedCache(model.config)
    model(ids[:, :6], past_key_values=cache)
    model(ids[:, 6:10], **second, past_key_values=cache)
    third = torch.stack([torch.arange(4, 18), torch.arange(6, 20)])
    found = model(ids[:, 10:], attention_mask=mask, position_ids=third, past_key_values=cache)
    check_half_the_digits(found.logits[0], model(ids[:1, 6:]).logits[0, 4:])
    there = mask[1].bool()
    check_half_the_digits(found.logits[1], model(ids[1:, there]).logits[0, 6:])


@each_model
def test_a_cache_may_have_either_name(family: str) -> None:
    model, ids = _model(family), prompts(2, TOTAL)
    cache = DynamicCache()
    parts = [model(part, cache=cache).logits for part in ids.split([11, 13], 1)]
    check_half_the_digits(torch.cat(parts, 1), model(ids).logits)
    cache = DynamicCache()
    model(ids[:, :11], cache=cache)
    second = torch.arange(3)[None]  # Behind the cache a document begins: the cache is seen.
    found = model(ids[:, 11:14], position_ids=second, cache=cache).logits
    check_half_the_digits(found, model(ids[:, 11:14]).logits)
    with pytest.raises(ValueError, match="two names of one argument"):
        model(ids, cache=DynamicCache(), past_key_values=DynamicCache())


def test_a_restart_under_another_default_device() -> None:
    model, ids = _model("llama"), prompts(2, TOTAL)
    cache = FixedCache(model.config)
    first, second = torch.arange(9)[None], torch.arange(TOTAL - 9)[None]
    with torch.device("meta"):
        cache.announce(9, None)
    model(ids[:, :9], position_ids=first, past_key_values=cache)
    with torch.device("meta"):
        cache.announce(TOTAL - 9, None, torch.ones(2, dtype=torch.bool, device="cpu"))
    found = model(ids[:, 9:], position_ids=second, past_key_values=cache).logits
    check_half_the_digits(found, model(ids[:, 9:]).logits)


def test_a_call_without_tokens_changes_nothing() -> None:
    model, ids = _model("sparse_transformer"), prompts(1, TOTAL)
    cache = FixedCache(model.config)
    model(ids[:, :9], position_ids=torch.arange(9)[None], past_key_values=cache)
    nothing = torch.zeros(1, 0, dtype=torch.long)
    read = {"input_ids": nothing, "position_ids": nothing, "past_key_values": cache}
    documents.read_batch(read, None, keeps=True)
    onward = torch.arange(9, TOTAL)[None]
    found = model(ids[:, 9:], position_ids=onward, past_key_values=cache).logits
    check_half_the_digits(found, model(ids).logits[:, 9:])


@each_model
def test_a_forward_that_nobody_could_see_is_refused(family: str) -> None:
    """Calling `forward` directly skips the hooks, so nothing has been read."""
    model, ids = _model(family), prompts(1, TOTAL)
    with pytest.raises(NotImplementedError, match=r"Call the model itself"):
        model.base_model.forward(ids, position_ids=RESTARTS)
    check_half_the_digits(model.forward(ids, position_ids=RESTARTS).logits, _alone(model, ids))


@pytest.mark.parametrize("where", ["lm_head", "base"])
def test_an_interrupted_call_leaves_nothing_behind(where: str) -> None:
    model, ids = _model("llama"), prompts(1, TOTAL)
    ends = torch.tensor([0, 10, TOTAL])
    expected = model(ids).logits
    part = model.lm_head if where == "lm_head" else model.model.layers[1]

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = part.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(ids, cu_seq_lens_q=ends)
    handle.remove()
    assert torch.equal(model.lm_head(model.model(ids).last_hidden_state), expected)
    assert torch.equal(model(ids).logits, expected)


def test_a_call_that_failed_forgets_no_document() -> None:
    model, ids = _model("llama"), prompts(1, TOTAL)
    cache = FixedCache(model.config)
    model(ids[:, :6], past_key_values=cache)
    handle = model.model.layers[0].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(ids[:, 6:9], position_ids=torch.arange(3)[None], past_key_values=cache)
    handle.remove()
    onward = torch.arange(6, TOTAL)[None]
    found = model(ids[:, 6:], position_ids=onward, past_key_values=cache).logits
    check_half_the_digits(found, model(ids).logits[:, 6:])


def _of_images() -> Any:
    """Return a retrofitted text decoder whose positions have three axes."""
    config = AutoConfig.for_model("qwen2_vl")
    text: Any = config.text_config
    sizes = {**SIZES, **GROUPED, "head_dim": 8, "num_hidden_layers": 2}
    text.update({key: value for key, value in sizes.items() if key != "pad_token_id"})
    text.rope_parameters = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    return retrofit(AutoModel.from_config(text).double().eval(), 8, 2)


def _with_an_image(before: int, after: int) -> Tensor:
    """Return positions [3, 1, length] of some words, an image of 2 × 2 tokens, and some words."""
    words, image = (
        torch.arange(before).expand(3, -1),
        torch.tensor([[0] * 4, [0, 0, 1, 1], [0, 1] * 2]),
    )
    behind = torch.arange(before + 2, before + 2 + after).expand(3, -1)
    return torch.cat([words, before + image, behind], 1)[:, None]


@pytest.mark.parametrize(
    "lengths", [(2, 8), (0, 9), (1, 1, 8), (1, 19), (1, 1, 18), (11, 1, 8)], ids=str
)
def test_documents_with_images(lengths: tuple[int, ...]) -> None:
    """Time stands still inside of an image, but no two of its tokens are at one place."""
    model = _of_images()
    first = _with_an_image(lengths[0], lengths[1]) if len(lengths) == 2 else None
    places = (
        [torch.arange(n).expand(3, 1, -1) for n in lengths] if first is None else [first, first]
    )
    ids = prompts(1, sum(place.shape[2] for place in places))
    found = model(ids, position_ids=torch.cat(places, 2), use_cache=False).last_hidden_state
    ends = [0, *accumulate(place.shape[2] for place in places)]
    for place, begin, end in zip(places, ends, ends[1:], strict=False):
        alone = model(ids[:, begin:end], position_ids=place, use_cache=False).last_hidden_state
        check_half_the_digits(found[:, begin:end], alone)


@pytest.mark.parametrize("make", [FixedCache, DynamicCache, None])
@pytest.mark.parametrize("length", [1, 12])
def test_with_images_no_document_begins_behind_a_cache(make: Any, length: int) -> None:
    model, ids, place = _of_images(), prompts(1, TOTAL), _with_an_image(3, TOTAL - 7)
    cache = make and (make(model.config) if make is FixedCache else make())

    def run(part: slice, positions: Tensor) -> Any:
        return model(ids[:, part], position_ids=positions, past_key_values=cache, use_cache=True)

    first = run(slice(0, length), torch.arange(length).expand(3, 1, -1))
    cache = first.past_key_values
    with pytest.raises(ValueError, match=r"must go on.*begin at \[0\]"):
        run(slice(length, TOTAL), torch.arange(TOTAL - length).expand(3, 1, -1))
    cache = make and (make(model.config) if make is FixedCache else make())
    parts = []
    for part in (slice(0, 5), slice(5, 6), slice(6, TOTAL)):  # Inside of the image too.
        parts.append(run(part, place[:, :, part]).last_hidden_state)
        cache = (
            cache or model(ids[:, :5], position_ids=place[:, :, :5], use_cache=True).past_key_values
        )
    expected = model(ids, position_ids=place, use_cache=False).last_hidden_state
    check_half_the_digits(torch.cat(parts, 1), expected)


@each_model
def test_a_cache_that_the_model_made_knows_where_its_rows_end(family: str) -> None:
    model, ids = _model(family), prompts(1, TOTAL)
    first = torch.tensor([[0, 1, 2, 3, 40, 41, 42, 43]])
    cache = model(ids[:, :8], position_ids=first, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"must go on.*begin at \[20\]"):
        model(ids[:, 8:9], position_ids=torch.tensor([[20]]), past_key_values=cache)
    found = model(ids[:, 8:9], position_ids=torch.tensor([[44]]), past_key_values=cache).logits
    whole = model(ids[:, :9], position_ids=torch.cat([first, torch.tensor([[44]])], 1))
    check_half_the_digits(found, whole.logits[:, 8:])


@each_model
@pytest.mark.parametrize("make", [FixedCache, DynamicCache, StaticCache])
def test_generation_goes_on_with_the_last_of_several_documents(family: str, make: Any) -> None:
    """From positions that say so. The mask of a static cache is made before the model is called."""
    model, ids = _model(family), prompts(1, 20)
    cache = make(model.config, 60) if make is StaticCache else make(config=model.config)
    model(ids[:, :10], past_key_values=cache)
    place = torch.arange(10).repeat(2)[None]
    found = generate(
        model,
        ids,
        attention_mask=torch.ones_like(ids),
        position_ids=place,
        past_key_values=cache,
        max_new_tokens=6,
    )
    alone = generate(model, ids[:, 10:], max_new_tokens=6)
    assert found[0, 20:].tolist() == alone[0, 10:].tolist()


@each_model
@pytest.mark.parametrize("packed", [True, False])
def test_a_mask_that_was_made_ahead_says_no_less(family: str, packed: bool) -> None:
    """The documents of the call are found as they are beside an ordinary mask."""
    model, ids = _model(family), prompts(2, TOTAL)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    embeds = model.get_input_embeddings()(ids)
    ahead = create_masks_for_generate(model.config, embeds, mask, past_key_values=None)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    if packed:
        places[:, 12:] -= places[:, 12:13].clone()
    given = {"position_ids": places, "use_cache": False}
    found = model(ids, attention_mask=ahead, **given).logits
    expected = model(ids, attention_mask=mask, **given).logits
    check_half_the_digits(found[mask.bool()], expected[mask.bool()])


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("make", [FixedCache, DynamicCache, StaticCache])
def test_a_compiled_call_goes_on_from_no_cache_with_several_documents(make: Any) -> None:
    model, ids = _model("llama"), prompts(1, 20)
    cache = make(model.config, 60) if make is StaticCache else make(config=model.config)
    model(ids[:, :9], past_key_values=cache)
    model(ids[:, 9:16], past_key_values=cache, position_ids=torch.arange(7)[None])
    compiled = torch.compile(model, backend="eager")
    for position_ids in (None, torch.tensor([[7]])):
        with pytest.raises(RuntimeError, match="cannot go on from a cache inside of which"):
            compiled(ids[:, 16:17], past_key_values=cache, position_ids=position_ids)


def test_numbers_of_codebooks_are_tokens_too() -> None:
    """A model for sound has several numbers for each position: [batch, length, codebooks]."""
    config = CsmConfig(**SIZES, **GROUPED, head_dim=8, num_codebooks=2)
    model = retrofit(CsmBackboneModel(config).double().eval(), 8, 2)
    ids = torch.stack([prompts(1, TOTAL), prompts(1, TOTAL)], 2)
    found = model(ids, position_ids=RESTARTS, use_cache=False).last_hidden_state
    parts = [model(part, use_cache=False).last_hidden_state for part in ids.split(LENGTHS, 1)]
    check_half_the_digits(found, torch.cat(parts, 1))
    with pytest.raises(ValueError, match="take no cache"):
        model(ids, position_ids=RESTARTS, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="1 at tokens and 0 at padding"):
        model(ids, attention_mask=torch.full((1, TOTAL), 2))
    with pytest.raises(ValueError, match=r"attention_mask.shape=\(1, 23\)"):
        model(ids, attention_mask=torch.ones(1, TOTAL - 1))
