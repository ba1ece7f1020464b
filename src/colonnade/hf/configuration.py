"""The configuration of the Sparse Transformer, and the paper's settings as presets."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from colonnade.hf.settings import NAME, patterns_of
from colonnade.ops.check import check_probability
from colonnade.ops.heads import check_patterns
from colonnade.pattern import FixedPattern

PRESETS: dict[str, dict[str, Any]] = {
    # Child et al. 2019, sections 7.1 to 7.3.
    "enwik8": {
        "num_hidden_layers": 30,
        "num_attention_heads": 8,
        "hidden_size": 512,
        "max_position_embeddings": 12_288,
        "stride": 128,
        "summary": 32,
        "dropout": 0.40,
    },
    # Half-size feed-forward, queries and keys; the stride is that of OpenAI's code: a row of bytes.
    "cifar10": {
        "num_hidden_layers": 128,
        "num_attention_heads": 2,
        "hidden_size": 256,
        "intermediate_size": 512,
        "qk_size": 128,
        "max_position_embeddings": 3_072,
        "image_shape": [32, 32, 3],
        "pattern": "strided",
        "stride": 96,
        "dropout": 0.25,
    },
    "imagenet64": {
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "hidden_size": 512,
        "max_position_embeddings": 12_288,
        "image_shape": [64, 64, 3],
        "pattern": "strided",
        "stride": 128,
        "dropout": 0.01,
    },
    # About a million parameters, to be trained in minutes on two cores.
    "demo": {
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "hidden_size": 128,
        "max_position_embeddings": 1_024,
        "stride": 64,
        "summary": 8,
        "dropout": 0.0,
        "embedding_std": 1.0,
    },
}


@strict
class SparseTransformerConfig(PreTrainedConfig):
    """A Sparse Transformer on bytes or other tokens (Child et al. 2019, sections 5 and 6).

    Args:
        vocab_size: Number of tokens; 256 for bytes.
        hidden_size: Width of the residual stream.
        num_hidden_layers: Residual blocks N.
        num_attention_heads: Query heads; a divisor of `hidden_size` and of `qk_size`.
        num_key_value_heads: Key/value heads; `num_attention_heads` if None.
        intermediate_size: Width inside the feed-forward network; 4 · hidden_size if None.
        qk_size: Width of queries and keys over all heads; hidden_size if None.
        max_position_embeddings: The longest sequence, in tokens.
        stride: Length l of a block, and width of the matrix that positions are laid out in.
        summary: Columns c of every block that all later positions read.
        subblocks: Key/value head h reads the summary columns of sub-block h mod subblocks.
        pattern: "fixed", or for comparison "strided", "local" (a window as wide as the stride) or
            "full".
        scheme: How the two factors of a fixed or strided pattern are used: "merged" (every head
            reads both), "interleaved" (layers take turns), "multihead" (in every layer the first
            half of the key heads reads the own blocks, the rest the summaries).
        image_shape: [height, width, channels]: the positions are those of an image, byte by byte,
            with an embedding of row, column and channel. None: text, with an embedding of row and
            column of a matrix as wide as the stride.
        dropout: At the end of each residual branch.
        attention_dropout: Of the attention's weights; the paper has none.
        layer_norm_eps: Added to the variance in every layer norm.
        initializer: With "code" projections are drawn with standard deviation sqrt(0.125/d_in),
            as OpenAI's code does; with "paper" with 0.125/sqrt(d_in), as printed (section 5.2).
        embedding_std: Standard deviation of the token embedding; that of each position embedding
            is smaller by the root of their number. The paper's 0.125/sqrt(hidden_size) if None.
        use_cache: Whether `generate` keeps keys and values.

    Raises:
        ValueError: A pattern or scheme that does not exist, a size below 1, or more positions than
            `image_shape` has.
    """

    model_type = "sparse_transformer"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    # The names under which every model says what attn_implementation="colonnade" shall do.
    attribute_map: ClassVar[dict[str, str]] = {
        "colonnade_stride": "stride",
        "colonnade_summary": "summary",
        "colonnade_subblocks": "subblocks",
        "colonnade_pattern": "pattern",
        "colonnade_scheme": "scheme",
    }

    vocab_size: int = 256
    hidden_size: int = 512
    num_hidden_layers: int = 30
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    intermediate_size: int | None = None
    qk_size: int | None = None
    max_position_embeddings: int = 12_288
    stride: int = 128
    summary: int = 32
    subblocks: int = 1
    pattern: str = "fixed"
    scheme: str = "merged"
    image_shape: list[int] | None = None
    dropout: float = 0.0
    attention_dropout: float = 0.0
    layer_norm_eps: float = 1e-5
    initializer: Literal["code", "paper"] = "code"
    embedding_std: float | None = None
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in the sizes that follow from others, and refuse an impossible pattern."""
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.qk_size is None:
            self.qk_size = self.hidden_size
        if self.embedding_std is None:
            self.embedding_std = 0.125 / math.sqrt(self.hidden_size)
        FixedPattern(self.stride, self.summary, self.subblocks)
        for name in ("vocab_size", "num_hidden_layers", "intermediate_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {name}={getattr(self, name)}.")
        if self.max_position_embeddings < 1:
            raise ValueError(
                "max_position_embeddings must be at least 1, "
                f"got max_position_embeddings={self.max_position_embeddings}."
            )
        if self.image_shape is not None:
            self._check_image(self.image_shape)
        for name in ("dropout", "attention_dropout"):
            check_probability(name, getattr(self, name))
        super().__post_init__(**kwargs)
        for layer in range(self.num_hidden_layers if self.is_heterogeneous else 1):
            check_patterns(patterns_of(self, layer), self.num_key_value_heads)
        # Not saved with a checkpoint: the configuration itself has to ask for it.
        if self._attn_implementation is None:
            self._attn_implementation = NAME

    def _check_image(self, image_shape: list[int]) -> None:
        if len(image_shape) != 3 or min(image_shape) < 1:
            raise ValueError(
                "image_shape must be [height, width, channels], each at least 1, "
                f"got image_shape={image_shape}."
            )
        if self.max_position_embeddings > math.prod(image_shape):
            raise ValueError(
                "max_position_embeddings must be at most the bytes of image_shape, got "
                f"max_position_embeddings={self.max_position_embeddings} and "
                f"image_shape={image_shape}."
            )

    @classmethod
    def preset(cls, name: str, **changes: Any) -> SparseTransformerConfig:
        """The settings of one of the paper's models, or of the demo, with `changes` on top.

        Raises:
            ValueError: An unknown preset.
        """
        if name not in PRESETS:
            raise ValueError(f"preset must be one of {sorted(PRESETS)}, got preset={name!r}.")
        return cls(**{**PRESETS[name], **changes})
