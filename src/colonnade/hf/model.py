"""The Sparse Transformer as a transformers model: `nn`'s parts, transformers' machinery.

A layer is `nn.ResidualBlock` around `nn.SelfAttention`'s projections; the attention itself goes
through the function that is registered as "colonnade", the way every transformers model takes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
    initialization,
)
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from colonnade.hf.attention import PatternMask, check_mask
from colonnade.hf.cache import FixedCache, check_cache
from colonnade.hf.configuration import SparseTransformerConfig
from colonnade.hf.settings import NAME, patterns_of
from colonnade.nn import ImageEmbedding, ResidualBlock, SelfAttention, TextEmbedding


class SparseTransformerAttention(nn.Module):
    """`nn.SelfAttention`'s projections around transformers' attention interface and cache."""

    def __init__(self, config: SparseTransformerConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.layer = SelfAttention(
            config.hidden_size,
            config.num_attention_heads,
            patterns_of(config, layer_idx),
            config.num_key_value_heads,
            config.qk_size,
            config.attention_dropout,
        )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: PatternMask | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """[batch, seq_len, hidden_size] to the same; keys and values go through the cache."""
        query, key, value = self.layer.project(hidden_states)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS[NAME]
        dropout = self.layer.dropout if self.training else 0.0
        out, _ = attend(self, query, key, value, attention_mask, dropout=dropout, **kwargs)
        return self.layer.merge_heads(out.transpose(1, 2))


class SparseTransformerLayer(GradientCheckpointingLayer):
    """One residual block, recomputed in the backward pass when checkpointing is on."""

    def __init__(self, config: SparseTransformerConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.intermediate_size is not None, "the configuration fills it in"
        self.block = ResidualBlock(
            SparseTransformerAttention(config, layer_idx),
            config.hidden_size,
            config.intermediate_size,
            config.dropout,
            config.layer_norm_eps,
        )

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """[batch, seq_len, hidden_size] to the same."""
        out: Tensor = self.block(hidden_states, **kwargs)
        return out


class SparseTransformerPreTrainedModel(PreTrainedModel):
    """Initialisation, and what the model can do."""

    config: SparseTransformerConfig
    config_class = SparseTransformerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    # Plain lists and dicts are the form that transformers reads.
    _no_split_modules = ["SparseTransformerLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": SparseTransformerLayer}  # noqa: RUF012

    def _init_weights(self, module: nn.Module) -> None:
        """The paper's initialisation (section 5.2); see `SparseTransformerConfig.initializer`.

        transformers calls this for modules that own a parameter, and passes over their parents.
        """
        config = self.config
        if isinstance(module, nn.LayerNorm):
            initialization.ones_(module.weight)
            initialization.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            assert config.embedding_std is not None, "the configuration fills it in"
            is_token = module is self.get_input_embeddings()
            tables = 1 if is_token else 2 if config.image_shape is None else 3
            initialization.normal_(module.weight, std=config.embedding_std / math.sqrt(tables))
        elif module is self.get_output_embeddings():
            # Zero logits: the first loss is exactly log2(vocab_size) bits.
            initialization.zeros_(module.weight)
        elif isinstance(module, nn.Linear):
            variance = 0.125 if config.initializer == "code" else 0.125**2
            if self._ends_branch(module):
                variance /= 2 * config.num_hidden_layers
            initialization.normal_(module.weight, std=math.sqrt(variance / module.in_features))
            initialization.zeros_(module.bias)

    def _ends_branch(self, linear: nn.Linear) -> bool:
        """Whether the result of a linear map is added to the residual stream."""
        return any(
            linear is block.attention.layer.out_proj or linear is block.feed_forward.down_proj
            for block in self.base_model.modules()
            if isinstance(block, ResidualBlock)
            and isinstance(block.attention, SparseTransformerAttention)
        )


class SparseTransformerModel(SparseTransformerPreTrainedModel):
    """Embedding, residual blocks and the final norm: everything below the output head."""

    def __init__(self, config: SparseTransformerConfig) -> None:
        super().__init__(config)
        sizes = config.vocab_size, config.hidden_size
        self.embedding = (
            TextEmbedding(*sizes, config.max_position_embeddings, config.per_layer_config[0].stride)
            if config.image_shape is None
            else ImageEmbedding(*sizes, *config.image_shape)
        )
        self.layers = nn.ModuleList(
            SparseTransformerLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The token table."""
        return self.embedding.token

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token table."""
        assert isinstance(value, nn.Embedding)
        self.embedding.token = value

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states [batch, seq_len, hidden_size] of tokens, or of their embeddings.

        Raises:
            ValueError: Both or neither of `input_ids` and `inputs_embeds`, a 4-D attention mask, a
                position that the model has no embedding for, or a cache for packed rows.
            NotImplementedError: A mask of another kind, or a cache that drops positions, or that
                is quantised or offloaded.
        """
        check_cache(past_key_values)
        if self.config._attn_implementation != NAME:  # transformers lets every model have "eager".
            raise NotImplementedError(
                f"the Sparse Transformer runs attn_implementation={NAME!r} only, "
                f"got {self.config._attn_implementation!r}."
            )
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.embedding.token(input_ids)
        if attention_mask is not None and attention_mask.ndim == 2 and attention_mask.all():
            attention_mask = None  # transformers looks for packed rows only where there is none.
        packed = attention_mask is None and _restart(position_ids)
        if packed and past_key_values is not None:
            raise ValueError(
                "packed rows (position_ids that restart) cannot be continued, so they take no "
                "cache. Leave past_key_values out."
            )
        if use_cache and past_key_values is None and not packed:
            past_key_values = FixedCache(self.config)
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        check_mask(mask)
        if position_ids is None:
            position_ids = _positions(inputs_embeds, attention_mask, seen)
        self._check_positions(position_ids)
        hidden_states = inputs_embeds + self.embedding.positions(position_ids)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states, attention_mask=mask, past_key_values=past_key_values, **kwargs
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values
        )

    def _check_positions(self, position_ids: Tensor) -> None:
        """A position without an embedding would be an obscure index error, or worse on a GPU."""
        limit = self.config.max_position_embeddings
        if torch.compiler.is_compiling():  # It may not look at numbers.
            return
        if (
            position_ids.numel()
            and not 0 <= int(position_ids.min()) <= int(position_ids.max()) < limit
        ):
            raise ValueError(
                "positions must be in [0, max_position_embeddings), got "
                f"{int(position_ids.min())} to {int(position_ids.max())} "
                f"and max_position_embeddings={limit}."
            )


def _restart(position_ids: Tensor | None) -> bool:
    """Whether positions do anything but count on."""
    return position_ids is not None and bool((position_ids.diff() != 1).any())


def _positions(inputs_embeds: Tensor, attention_mask: Tensor | None, seen: int) -> Tensor:
    """Positions from each row's first token on; padding has position 0 or that of its neighbour."""
    length = inputs_embeds.shape[1]
    if attention_mask is not None and attention_mask.ndim == 2:
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
    return torch.arange(seen, seen + length, device=inputs_embeds.device)[None]


class SparseTransformerForCausalLM(SparseTransformerPreTrainedModel, GenerationMixin):
    """The Sparse Transformer with its output head: p(x_(t+1) | x_0 … x_t)."""

    def __init__(self, config: SparseTransformerConfig) -> None:
        super().__init__(config)
        self.model = SparseTransformerModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _prepare_cache_for_generation(  # type: ignore[override]  # Only these two are looked at.
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any
    ) -> None:
        """What `generate` calls to get a cache: ours, where no other was asked for.

        Raises:
            NotImplementedError: A quantised or an offloaded cache.
        """
        kind = generation_config.cache_implementation
        if kind is not None and kind.startswith(("offloaded", "quantized")):
            raise NotImplementedError(
                f"the Sparse Transformer has no {kind} cache, got cache_implementation={kind!r}. "
                "Leave it out: what is kept is small."
            )
        wants_ours = kind in (None, "dynamic") and generation_config.use_cache is not False
        if wants_ours and model_kwargs.get("past_key_values") is None:
            cache = model_kwargs["past_key_values"] = FixedCache(self.config)
            if generation_config.is_assistant:
                cache.activate_past_recording()
            return
        inherited: Any = super()._prepare_cache_for_generation  # type: ignore[misc]  # Its self type.
        inherited(generation_config, model_kwargs, *args)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [batch, seq_len, vocab_size], and the mean loss in nats where `labels` are given.

        Args:
            input_ids: [batch, seq_len] tokens.
            attention_mask: [batch, positions so far], 0 where there is padding, on either side.
                Each row's tokens give what they would give alone.
            position_ids: [batch or 1, seq_len]; counted from each row's first token if None.
                Without `attention_mask` and cache, a row whose positions restart is packed: nothing
                crosses from one document to another.
            past_key_values: Keys and values of earlier positions; a `FixedCache` if none is given.
            inputs_embeds: [batch, seq_len, hidden_size] in place of `input_ids`.
            labels: [batch, seq_len]; label t is compared with the prediction from position t - 1,
                and -100 is left out.
            use_cache: Return keys and values.
            logits_to_keep: Compute the last so many logits only (0: all), or those at the given
                indices.
            **kwargs: To the attention function and the loss function.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
