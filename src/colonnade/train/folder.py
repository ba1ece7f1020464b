"""The folder of a run: prepared for a new one, searched for a checkpoint, read for its model.

It holds `run.json` (the settings), the Trainer's checkpoints, and at the end the model and its
tokenizer, which `from_pretrained` loads.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

from transformers import AutoConfig, PreTrainedModel
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from colonnade.hf import SparseTransformerConfig, SparseTransformerForCausalLM
from colonnade.train.settings import SETTINGS_FILE


def prepare_folder(folder: Path, overwrite: bool) -> None:
    """Make the folder, and make sure that a run can be written into it.

    Raises:
        ValueError: It holds a run already, and `overwrite` is False.
        OSError: It cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / SETTINGS_FILE).exists():
        if not overwrite:
            raise ValueError(
                f"{folder} holds a run already; --resume continues it, --overwrite replaces it."
            )
        for checkpoint in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
            shutil.rmtree(checkpoint)
        for weights in folder.glob("*.safetensors"):
            weights.unlink()
        # Last: what is left when this is interrupted is still a run, and not taken for empty.
        (folder / SETTINGS_FILE).unlink()
    tempfile.TemporaryFile(dir=folder).close()


def last_checkpoint(folder: Path) -> Path:
    """Return the checkpoint that a run resumes from: the last one that was written completely.

    Raises:
        ValueError: There is none.
    """
    checkpoint = find_checkpoint(folder)
    if checkpoint is None:
        raise ValueError(
            f"{folder} holds no checkpoint to resume from: the run ended before its first. "
            "Start it again with --overwrite."
        )
    return checkpoint


def find_checkpoint(folder: Path) -> Path | None:
    """Return the last checkpoint of a folder that was written completely; None: there is none."""
    complete = [
        path
        for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if path.name.rpartition("-")[2].isdecimal() and _is_complete(path)
    ]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _is_complete(checkpoint: Path) -> bool:
    """Whether the Trainer got as far as its own state, which it writes last."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
    except (OSError, json.JSONDecodeError):
        return False
    return True


def load_model(folder: Path) -> PreTrainedModel:
    """Load a trained byte model, ready to evaluate.

    Raises:
        ValueError: The folder holds no model, or another kind of model.
    """
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise ValueError(f"{folder} holds no finished model (config.json and *.safetensors).")
    config = AutoConfig.from_pretrained(folder)
    if not isinstance(config, SparseTransformerConfig) or config.vocab_size != 256:
        raise ValueError(
            f"{folder} must hold a Sparse Transformer on bytes, "
            f"got a model of type {config.model_type!r} with {config.vocab_size} tokens."
        )
    logging.disable_progress_bar()
    model: PreTrainedModel = SparseTransformerForCausalLM.from_pretrained(folder).eval()
    return model
