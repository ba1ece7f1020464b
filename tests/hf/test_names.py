"""A cache by each of the names that releases of transformers have for it."""

from __future__ import annotations

import warnings

import pytest
import torch

from colonnade.hf import FixedCache
from colonnade.hf.names import CACHE
from tests.hf.models import generate, random_model, tokens


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_cache_has_two_names(name: str) -> None:
    model = random_model()
    ids = tokens(2, 29)
    whole = model(ids).logits
    for module in (model, model.base_model):
        cache = FixedCache(model.config)
        module(ids[:, :13], **{name: cache})
        assert cache.get_seq_length() == 13
        out = module(ids[:, 13:], **{name: cache})
        assert out[CACHE] is cache
        logits = out.logits if module is model else model.lm_head(out.last_hidden_state)
        torch.testing.assert_close(logits, whole[:, 13:], rtol=1e-11, atol=1e-11)


def test_both_names_at_once_are_refused() -> None:
    model = random_model()
    with pytest.raises(ValueError, match="past_key_values and cache are two names of one"):
        model(
            tokens(1, 5),
            past_key_values=FixedCache(model.config),
            cache=FixedCache(model.config),
        )


def test_the_model_uses_the_name_of_the_installed_release() -> None:
    """The suite ignores transformers' warning of the other name, so here it is an error."""
    model = random_model()
    ids = tokens(1, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache = FixedCache(model.config)
        written = generate(model, ids, max_new_tokens=6)
        passed_on = generate(model, ids, **{CACHE: cache}, max_new_tokens=6)
    assert torch.equal(written, passed_on)
    # The last token that was written has not been read.
    assert cache.get_seq_length() == written.shape[1] - 1
