"""The paper's embeddings of a token and of its place in a text or in an image.

Source: Child et al. 2019, arXiv:1904.10509, section 5.3.
"""

from __future__ import annotations

from jaxtyping import Int
from torch import Tensor, nn

from colonnade.plan.lines import block_and_offset, num_blocks
from colonnade.shapes import Hidden

PositionIds = Int[Tensor, "#batch seq_len"]


class TextEmbedding(nn.Module):
    """token(x_i) + row(i // stride) + column(i mod stride), from three learned tables.

    Args:
        vocab_size: Number of tokens.
        embed_dim: Width of the embedding.
        max_positions: Length of the longest sequence; its last row may be short.
        stride: Width of the matrix that positions are laid out in, the pattern's stride.
    """

    def __init__(self, vocab_size: int, embed_dim: int, max_positions: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.token = nn.Embedding(vocab_size, embed_dim)
        self.row = nn.Embedding(num_blocks(max_positions, stride), embed_dim)
        self.column = nn.Embedding(stride, embed_dim)

    def positions(self, position_ids: PositionIds) -> Hidden:
        """Return row + column alone, to add to tokens that are embedded already."""
        row, column = block_and_offset(position_ids, self.stride)
        embedded: Tensor = self.row(row) + self.column(column)
        return embedded

    def forward(self, input_ids: Int[Tensor, "batch seq_len"], position_ids: PositionIds) -> Hidden:
        """Return the embeddings, [batch, seq_len, embed_dim].

        Args:
            input_ids: The tokens, in [0, vocab_size).
            position_ids: Their positions, in [0, max_positions).
        """
        embedded: Tensor = self.token(input_ids) + self.positions(position_ids)
        return embedded


class ImageEmbedding(nn.Module):
    """token(x_i) + row + column + channel of byte i of an image, from four learned tables.

    Bytes lie row by row, pixel by pixel, channel by channel: byte i is channel i mod C of pixel
    i // C, which lies in column (i // C) mod W of row i // (C · W).

    Args:
        vocab_size: Number of tokens; 256 for bytes.
        embed_dim: Width of the embedding.
        height: Number of rows of the image.
        width: Number W of pixels in a row.
        channels: Number C of bytes in a pixel.
    """

    def __init__(
        self, vocab_size: int, embed_dim: int, height: int, width: int, channels: int
    ) -> None:
        super().__init__()
        self.width = width
        self.channels = channels
        self.token = nn.Embedding(vocab_size, embed_dim)
        self.row = nn.Embedding(height, embed_dim)
        self.column = nn.Embedding(width, embed_dim)
        self.channel = nn.Embedding(channels, embed_dim)

    def positions(self, position_ids: PositionIds) -> Hidden:
        """Return row + column + channel alone, to add to tokens that are embedded already."""
        pixel, channel = block_and_offset(position_ids, self.channels)
        row, column = block_and_offset(pixel, self.width)
        embedded: Tensor = self.row(row) + self.column(column) + self.channel(channel)
        return embedded

    def forward(self, input_ids: Int[Tensor, "batch seq_len"], position_ids: PositionIds) -> Hidden:
        """Return the embeddings, [batch, seq_len, embed_dim].

        Args:
            input_ids: The tokens, in [0, vocab_size).
            position_ids: Their positions, in [0, height · width · channels).
        """
        embedded: Tensor = self.token(input_ids) + self.positions(position_ids)
        return embedded
