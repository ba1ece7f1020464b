"""The Sparse Transformer as a transformers model, built from the modules in `colonnade.nn`.

A layer is `nn.ResidualBlock` around the projections of `nn.SelfAttention`. The attention itself
runs in the function that is registered as "colonnade", as in every transformers model that asks
for it.
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

from colonnade.backends.tracing.operation import may_decide
from colonnade.hf.cache import FixedCache
from colonnade.hf.configuration import SparseTransformerConfig
from colonnade.hf.mask import PatternMask, check_mask
from colonnade.hf.names import CACHE, takes_either_name
from colonnade.hf.settings import NAME, patterns_of
from colonnade.nn import ImageEmbedding, ResidualBlock, SelfAttention, TextEmbedding


class SparseTransformerAttention(nn.Module):
    """The projections of `nn.SelfAttention` around transformers' attention interface and cache."""

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

    @takes_either_name
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: PatternMask | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Attend; [batch, seq_len, hidden_size]. Keys and values go through the cache, if any."""
        query, key, value = self.layer.project(hidden_states)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        dropout = self.layer.dropout if self.training else 0.0
        out, _ = ALL_ATTENTION_FUNCTIONS[NAME](
            self, query, key, value, attention_mask, dropout=dropout, **kwargs
        )
        return self.layer.merge_heads(out.transpose(1, 2))


class SparseTransformerLayer(GradientCheckpointingLayer):
    """A residual block, which the backward pass recomputes when checkpointing is on."""

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
        """Apply the block; [batch, seq_len, hidden_size]."""
        out: Tensor = self.block(hidden_states, **kwargs)
        return out


class SparseTransformerPreTrainedModel(PreTrainedModel):
    """The base of both models: their initialisation, and what they tell transformers."""

    config: SparseTransformerConfig
    config_class = SparseTransformerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    # transformers reads these as plain lists and dicts.
    _no_split_modules = ["SparseTransformerLayer"]  # noqa: RUF012
    _skip_keys_device_placement = [CACHE]  # noqa: RUF012
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": SparseTransformerLayer}  # noqa: RUF012

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise as the paper does (section 5.2); see `SparseTransformerConfig.initializer`.

        transformers calls this for modules that own a parameter, but not for their parents.
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
            # With zero logits the first loss is exactly log2(vocab_size) bits.
            initialization.zeros_(module.weight)
        elif isinstance(module, nn.Linear):
            variance = 0.125 if config.initializer == "code" else 0.125**2
            if self._ends_branch(module):
                variance /= 2 * config.num_hidden_layers
            initialization.normal_(module.weight, std=math.sqrt(variance / module.in_features))
            initialization.zeros_(module.bias)

    def _ends_branch(self, linear: nn.Linear) -> bool:
        """Whether the output of `linear` is added to the residual stream."""
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
        """Return the token table."""
        return self.embedding.token

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token table."""
        assert isinstance(value, nn.Embedding)
        self.embedding.token = value

    @takes_either_name
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
        """Return the hidden states [batch, seq_len, hidden_size] of tokens or of their embeddings.

        The arguments are those of `SparseTransformerForCausalLM`.

        Raises:
            ValueError: Both or neither of `input_ids` and `inputs_embeds` are given, the attention
                mask or what else says where documents are contradicts itself or the tokens, the
                model has no embedding for a token or a position, or packed rows come with a cache.
            NotImplementedError: A mask is of another kind, another attention is set, or the cache
                drops positions, is quantised or is offloaded.
        """
        if self.config._attn_implementation != NAME:  # transformers lets every model have "eager".
            raise NotImplementedError(
                f"the Sparse Transformer runs attn_implementation={NAME!r} only, got "
                f"{self.config._attn_implementation!r}. For dense attention set pattern='full'."
            )
        if (input_ids is None) == (inputs_embeds is None):
            given = "neither" if input_ids is None else "both"
            raise ValueError(f"give exactly one of input_ids and inputs_embeds, got {given}.")
        if inputs_embeds is None:
            assert input_ids is not None
            input_ids = _without_padding(input_ids, attention_mask, self.config.vocab_size)
            hint = " A tokenizer's special tokens need vocab_size=len(tokenizer)."
            _check_range("input_ids", input_ids, "vocab_size", self.config.vocab_size, hint)
            inputs_embeds = self.embedding.token(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = FixedCache(self.config)
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        mask = create_causal_mask(
            self.config, inputs_embeds, attention_mask, past_key_values, position_ids
        )
        check_mask(mask)
        if position_ids is None:
            position_ids = _positions(inputs_embeds, attention_mask, seen)
        limit = self.config.max_position_embeddings
        _check_range("positions", position_ids, "max_position_embeddings", limit)
        hidden_states = inputs_embeds + self.embedding.positions(position_ids)
        kwargs[CACHE] = past_key_values
        # Fewer for a draft of assisted decoding that exits early.
        for layer in self.layers[: self.config.num_hidden_layers]:
            hidden_states = layer(hidden_states, attention_mask=mask, **kwargs)
        return BaseModelOutputWithPast(self.norm(hidden_states), past_key_values)


def _check_range(name: str, numbers: Tensor, setting: str, limit: int, hint: str = "") -> None:
    """Refuse what has no embedding: an obscure index error, or worse on a GPU."""
    if not may_decide(numbers) or numbers.numel() == 0:
        return
    least, most = int(numbers.min()), int(numbers.max())
    if not 0 <= least <= most < limit:
        raise ValueError(
            f"{name} must be in [0, {setting}), got {name} from {least} to {most} and "
            f"{setting}={limit}.{hint}"
        )


def _without_padding(input_ids: Tensor, attention_mask: Tensor | None, vocab_size: int) -> Tensor:
    """Put token 0 where padding is that has an id without an embedding, such as a pad token's."""
    batch, length = input_ids.shape
    if attention_mask is None or attention_mask.ndim != 2:
        return input_ids
    if attention_mask.shape[0] != batch or attention_mask.shape[1] < length:
        return input_ids
    is_padding = attention_mask[:, attention_mask.shape[1] - length :] == 0
    has_embedding = (input_ids >= 0) & (input_ids < vocab_size)
    return input_ids.masked_fill(is_padding & ~has_embedding, 0)


def _positions(inputs_embeds: Tensor, attention_mask: Tensor | None, seen: int | Tensor) -> Tensor:
    """Count positions from each row's first token; padding gets 0, or its left neighbour's."""
    length = inputs_embeds.shape[1]
    if attention_mask is not None and attention_mask.ndim == 2:
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
    # A compiled static cache counts with a tensor.
    return (seen + torch.arange(length, device=inputs_embeds.device))[None]


class SparseTransformerForCausalLM(SparseTransformerPreTrainedModel, GenerationMixin):
    """The Sparse Transformer with its output head: p(x_(t+1) | x_0 … x_t)."""

    # Tied if the configuration says tie_word_embeddings.
    _tied_weights_keys = {"lm_head.weight": "model.embedding.token.weight"}  # noqa: RUF012

    def __init__(self, config: SparseTransformerConfig) -> None:
        super().__init__(config)
        self.model = SparseTransformerModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _prepare_cache_for_generation(  # type: ignore[override]  # The rest is only passed on.
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any
    ) -> None:
        """Give `generate` a `FixedCache`, unless the caller asked for another cache.

        Raises:
            NotImplementedError: The cache asked for is quantised or offloaded.
        """
        kind = generation_config.cache_implementation
        if kind is not None and kind.startswith(("offloaded", "quantized")):
            raise NotImplementedError(
                f"the Sparse Transformer has no {kind} cache, got cache_implementation={kind!r}. "
                "Leave it out: the model's own cache is small."
            )
        wants_ours = kind in (None, "dynamic") and generation_config.use_cache is not False
        if wants_ours and model_kwargs.get(CACHE) is None:
            cache = model_kwargs[CACHE] = FixedCache(self.config)
            if generation_config.is_assistant:
                cache.activate_past_recording()
            return
        inherited: Any = super()._prepare_cache_for_generation  # type: ignore[misc]  # Its self type.
        inherited(generation_config, model_kwargs, *args)

    @takes_either_name
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
        """Return the logits, and the mean loss in nats if `labels` are given.

        Args:
            input_ids: [batch, seq_len] tokens.
            attention_mask: [batch, positions so far], 0 at padding, on either side. Each row's
                tokens give what they would give alone.
            position_ids: [batch or 1, seq_len]; counted from each row's first token if None.
                A row whose positions restart is packed: no document attends to another.
            past_key_values: Keys and values of earlier positions, which may be given as `cache`
                too. If it is None and `use_cache` is set, a new `FixedCache`.
            inputs_embeds: [batch, seq_len, hidden_size], instead of `input_ids`.
            labels: [batch, seq_len]; label t is compared with the prediction from position t - 1,
                and labels of -100 are left out.
            use_cache: Return keys and values.
            logits_to_keep: Number of logits to compute, counted from the end, or the indices of
                those to compute; 0 computes all.
            **kwargs: Passed on to the loss function; `cu_seq_lens_q`, `cu_seq_lens_k` and `seq_idx`
                say where documents begin.

        Returns:
            The logits [batch, seq_len or fewer, vocab_size], the loss, and the cache.

        Raises:
            ValueError: As `SparseTransformerModel`.
            NotImplementedError: As `SparseTransformerModel`.
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
        chosen = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, chosen])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss, logits, outputs.get(CACHE), outputs.hidden_states, outputs.attentions
        )
