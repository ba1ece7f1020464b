"""The configuration of the Sparse Transformer, with the paper's models as presets."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from colonnade.hf.settings import NAME, patterns_of
from colonnade.ops.check import check_probability
from colonnade.ops.heads import check_patterns
from colonnade.pattern import FixedPattern, check_counts

_IMPORT_US = (
    "This is a Sparse Transformer: run `import colonnade.hf` before you load it."
    "--configuration.SparseTransformerConfig"
)
"""An entry of auto_map. transformers prints it, up to the two dashes, if it lacks the model."""

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
    # The feed-forward network, queries and keys are half-size. The stride is that of OpenAI's code,
    # the bytes in a row of pixels.
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
    # Under a million parameters, so that it trains in minutes on two cores.
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
        num_hidden_layers: Number N of residual blocks.
        num_attention_heads: Number of query heads; a divisor of `hidden_size` and of `qk_size`.
        num_key_value_heads: Number of key/value heads; `num_attention_heads` if None.
        intermediate_size: Width inside the feed-forward network; 4 · hidden_size if None.
        qk_size: Width of queries and keys, summed over all heads; `hidden_size` if None.
        max_position_embeddings: Length of the longest sequence, in tokens.
        stride: Length l of a block, and width of the matrix that positions are laid out in.
        summary: Number c of columns of every block that all later positions read.
        subblocks: Number of sub-blocks; key/value head h reads the summary columns of sub-block
            h mod subblocks.
        pattern: "fixed", or for comparison "strided", "local" (a window as wide as the stride) or
            "full".
        sinks: Number of positions at the start of a sequence that all later positions read, under
            "fixed" and "local".
        scheme: The use of the two factors of a fixed or strided pattern: "merged" (every head
            reads both), "interleaved" (layers take turns) or "multihead" (in every layer the first
            half of the key heads reads its own blocks, the rest reads the summaries).
        image_shape: [height, width, channels] if positions are the bytes of an image, which get
            embeddings of row, column and channel. None is for text, which gets embeddings of row
            and column in a matrix as wide as the stride.
        dropout: Probability of dropping an entry at the end of each residual branch.
        attention_dropout: Probability of dropping a weight of the attention; 0 in the paper.
        layer_norm_eps: Constant that every layer norm adds to the variance.
        initializer: "code" draws projections with standard deviation sqrt(0.125/d_in), as OpenAI's
            code does; "paper" draws them with 0.125/sqrt(d_in), as printed (section 5.2).
        embedding_std: Standard deviation of the token embedding; that of each position embedding
            is smaller by the square root of their number. The paper's 0.125/sqrt(hidden_size) if
            None.
        use_cache: Keep keys and values in `generate`.
        tie_word_embeddings: Use the token embedding as the output head too. The first loss is then
            not that of equal logits.

    Raises:
        TypeError: A size is not an integer.
        ValueError: A pattern or scheme does not exist, a size is below 1, a probability lies
            outside [0, 1], or `image_shape` has fewer bytes than there are positions.
    """

    model_type = "sparse_transformer"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]
    # The names under which attn_implementation="colonnade" looks for its settings in every model.
    attribute_map: ClassVar[dict[str, str]] = {
        "colonnade_stride": "stride",
        "colonnade_summary": "summary",
        "colonnade_subblocks": "subblocks",
        "colonnade_sinks": "sinks",
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
    sinks: int = 0
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
        check_counts(
            1,
            vocab_size=self.vocab_size,
            num_hidden_layers=self.num_hidden_layers,
            intermediate_size=self.intermediate_size,
            max_position_embeddings=self.max_position_embeddings,
        )
        if self.image_shape is not None:
            self._check_image(self.image_shape)
        check_probability("dropout", self.dropout)
        check_probability("attention_dropout", self.attention_dropout)
        super().__post_init__(**kwargs)
        self.auto_map = {"AutoConfig": _IMPORT_US}
        for layer in range(self.num_hidden_layers if self.is_heterogeneous else 1):
            check_patterns(patterns_of(self, layer), self.num_key_value_heads)
        # A checkpoint does not name the attention, so the configuration itself asks for ours.
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
                "max_position_embeddings must be at most height · width · channels, got "
                f"max_position_embeddings={self.max_position_embeddings} and "
                f"image_shape={image_shape}, which has {math.prod(image_shape)} bytes."
            )

    @classmethod
    def preset(cls, name: str, **changes: Any) -> SparseTransformerConfig:
        """Return the settings of one of the paper's models or of the demo.

        Args:
            name: "enwik8", "cifar10", "imagenet64" (sections 7.1 to 7.3) or "demo".
            **changes: Settings that replace those of the preset.

        Raises:
            ValueError: `name` is not a preset, or the settings with `changes` are impossible.
        """
        if name not in PRESETS:
            raise ValueError(f"preset must be one of {sorted(PRESETS)}, got preset={name!r}.")
        return cls(**{**PRESETS[name], **changes})
