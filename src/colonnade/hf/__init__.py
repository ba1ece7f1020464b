"""Fixed attention for transformers: a model of its own, a cache, and `retrofit` for other models.

Importing this package registers attn_implementation="colonnade", has models with our settings load
with it, and registers the Sparse Transformer with AutoConfig, AutoModel and AutoModelForCausalLM.
Nothing below it imports transformers.
"""

from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
)

from colonnade.hf.attention import attention_function
from colonnade.hf.cache import FixedCache
from colonnade.hf.checkpoint import keep_attention, load
from colonnade.hf.compiling import compile_config
from colonnade.hf.configuration import SparseTransformerConfig
from colonnade.hf.mask import mask_function
from colonnade.hf.measure import MEASURING, measuring_attention, measuring_mask
from colonnade.hf.model import SparseTransformerForCausalLM, SparseTransformerModel
from colonnade.hf.retrofit import retrofit
from colonnade.hf.settings import NAME
from colonnade.hf.suggest import suggest
from colonnade.hf.suggestion import Suggestion
from colonnade.hf.tokenizer import byte_tokenizer

AttentionInterface.register(NAME, attention_function)
AttentionMaskInterface.register(NAME, mask_function)
AttentionInterface.register(MEASURING, measuring_attention)
AttentionMaskInterface.register(MEASURING, measuring_mask)
keep_attention()
AutoConfig.register("sparse_transformer", SparseTransformerConfig, exist_ok=True)
AutoModel.register(SparseTransformerConfig, SparseTransformerModel, exist_ok=True)
AutoModelForCausalLM.register(SparseTransformerConfig, SparseTransformerForCausalLM, exist_ok=True)

__all__ = [
    "FixedCache",
    "SparseTransformerConfig",
    "SparseTransformerForCausalLM",
    "SparseTransformerModel",
    "Suggestion",
    "byte_tokenizer",
    "compile_config",
    "load",
    "retrofit",
    "suggest",
]
