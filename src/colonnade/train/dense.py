"""The dense model that a retrofit begins with: what it may be, and the type it is saved in."""

from __future__ import annotations

from pathlib import Path

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from colonnade.hf.settings import has_settings


def load_dense(name: str) -> PreTrainedModel:
    """Load a dense causal model in float32, on the accelerator if there is one.

    Raises:
        ValueError: It has a fixed pattern already, is no causal model of text, or there is no such
            folder.
        OSError: There is no such model.
    """
    _check_kind(name)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    if has_settings(model.config.get_text_config(decoder=True)):
        raise ValueError(f"model must be dense, got {name}, which has a fixed pattern already.")
    device = torch.accelerator.current_accelerator(check_available=True)
    return model if device is None else model.to(device)  # type: ignore[arg-type]


def saved_dtype(name: str) -> torch.dtype:
    """Return the type of a saved model's weights: what its configuration says, or they do."""
    config = AutoConfig.from_pretrained(name)
    stated = config.get_text_config(decoder=True).dtype
    if isinstance(stated, torch.dtype):
        return stated
    found: torch.dtype = AutoModelForCausalLM.from_pretrained(name, dtype="auto").dtype
    return found


def _check_kind(name: str) -> None:
    """Refuse what is no folder and no name of a model, and models that are not of text alone.

    Raises:
        ValueError: It is one of these.
        OSError: There is no such model.
    """
    if not Path(name).exists():
        try:
            validate_repo_id(name)
        except HFValidationError:
            raise ValueError(f"there is no folder {name}.") from None
    try:
        config = AutoConfig.from_pretrained(name)
    except OSError as error:
        if Path(name).exists():
            raise
        raise OSError(f"there is no folder {name}, and by that name: {error}") from None
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"model must be a causal model of text alone, got {name} of type "
            f"{config.model_type!r}. Save its language model in a folder of its own and retrofit "
            "that, or convert it untuned with colonnade.hf.retrofit."
        )
