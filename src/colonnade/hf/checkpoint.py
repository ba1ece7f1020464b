"""A model keeps its fixed attention when it is saved and loaded, by whatever loads it.

transformers reads the name of an attention from a checkpoint but never writes it. So the name is
written here, where transformers chooses a model's attention; and a configuration that has our
settings gets our attention there, unless another one is asked for, which is said.
"""

from __future__ import annotations

import warnings
from functools import wraps
from os import PathLike
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file

from colonnade.hf.settings import NAME, has_settings, patterns_of
from colonnade.hf.watch import watch


def keep_attention() -> None:
    """Have transformers choose our attention for every configuration that has our settings.

    transformers offers no hook there, so this wraps the method in which each model settles on its
    attention, when it is made and in `set_attn_implementation`.
    """
    choose = PreTrainedModel.get_correct_attn_implementation
    if getattr(choose, "__module__", None) == __name__:  # This module was loaded again.
        return

    @wraps(choose, assigned=("__name__", "__qualname__", "__doc__"))
    def choose_ours(
        self: PreTrainedModel,
        requested_attention: str | None,
        is_init_check: bool = False,
        **others: Any,
    ) -> str:
        fixed = has_settings(self.config)
        wanted = NAME if requested_attention is None and fixed else requested_attention
        chosen = choose(self, wanted, is_init_check, **others)
        if chosen == NAME:
            watch(self)
        elif fixed and is_init_check:
            warnings.warn(
                f"this {self.config.model_type} has the settings of fixed attention, but loses it: "
                f"attn_implementation={chosen!r} was asked for. Leave that out to keep fixed "
                "attention.",
                stacklevel=2,
            )
        write_name(self.config)
        return chosen

    PreTrainedModel.get_correct_attn_implementation = choose_ours  # type: ignore[method-assign]


def write_name(config: PreTrainedConfig) -> None:
    """Have the configuration saved with the name of the attention, if it has our settings.

    A process without this package then refuses the checkpoint instead of running it densely.
    """
    inside = {key: getattr(config, key, None) for key in config.sub_configs}
    names = {key: NAME for key, each in inside.items() if each is not None and has_settings(each)}
    if names:
        config.attn_implementation = names
    elif has_settings(config):
        config.attn_implementation = NAME


def load(path: str | PathLike[str], **options: Any) -> Any:
    """Load a model that was saved after `retrofit`, and make sure that its attention is fixed.

    Args:
        path: Folder or name, as for `from_pretrained`.
        **options: Passed on to `from_pretrained`.

    Returns:
        The model, in the class that was saved. With `output_loading_info=True`, what
        `from_pretrained` returns.

    Raises:
        ValueError: The configuration lacks the settings that `retrofit` writes, or does not name
            the class of the model; `path` holds an adapter alone; or another attention is asked
            for.
    """
    if options.pop("attn_implementation", NAME) != NAME:
        raise ValueError(
            f"load takes no attn_implementation but {NAME!r}. Use from_pretrained for another "
            "attention."
        )
    names = ("revision", "cache_dir", "token", "local_files_only", "subfolder")
    shared = {name: options[name] for name in names if name in options}
    config = options.get("config")
    if config is None:
        _refuse_adapter(path, shared)
        trusted = {"trust_remote_code": options.get("trust_remote_code")}
        config = AutoConfig.from_pretrained(path, **shared, **trusted)
    patterns_of(config.get_text_config(decoder=True), 0)
    if not config.architectures:
        raise ValueError(
            f"the configuration must name the class that was saved, got architectures="
            f"{config.architectures}. Use from_pretrained of that class, which keeps the attention."
        )
    name = config.architectures[0]
    loaded = getattr(transformers, name, AutoModelForCausalLM).from_pretrained(path, **options)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    if type(model).__name__ != name:
        raise ValueError(
            f"{path} holds a {name}, which is no class of transformers, and AutoModelForCausalLM "
            f"makes a {type(model).__name__} of it. Use {name}.from_pretrained, which keeps the "
            "attention."
        )
    found = model.config.get_text_config(decoder=True)._attn_implementation
    if found != NAME:
        raise ValueError(
            f"load gives fixed attention, and the configuration asks for {found!r}. Take "
            "attn_implementation out of the configuration, or use from_pretrained."
        )
    return loaded


def _refuse_adapter(path: str | PathLike[str], shared: dict[str, Any]) -> None:
    whole = Path(path, "config.json").exists()  # As transformers decides it.
    if not whole and find_adapter_config_file(str(path), **shared) is not None:
        raise ValueError(
            f"load takes a whole model, and {path} holds an adapter. Use "
            "peft.AutoPeftModelForCausalLM.from_pretrained (or that of its task), which keeps the "
            "fixed attention of the adapter's base, or PeftModel.from_pretrained(load(base), path)."
        )
