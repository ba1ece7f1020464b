"""The paper's embedding of text: tokens, and where they lie in a matrix as wide as the stride."""

from __future__ import annotations

from jaxtyping import Int
from torch import Tensor, nn

from colonnade.plan import num_rows, row_and_column
from colonnade.shapes import Hidden


class TextEmbedding(nn.Module):
    """token(x_i) + row(i // stride) + column(i mod stride), three learned tables (section 5.3).

    Args:
        vocab_size: Number of tokens.
        embed_dim: Width of the embedding.
        max_positions: The longest sequence; its last row may be short.
        stride: Width of the matrix that positions are laid out in: the pattern's stride.
    """

    def __init__(self, vocab_size: int, embed_dim: int, max_positions: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.token = nn.Embedding(vocab_size, embed_dim)
        self.row = nn.Embedding(num_rows(max_positions, stride), embed_dim)
        self.column = nn.Embedding(stride, embed_dim)

    def positions(self, position_ids: Int[Tensor, "#batch seq_len"]) -> Hidden:
        """The position part alone, for tokens that are embedded already."""
        row, column = row_and_column(position_ids, self.stride)
        embedded: Tensor = self.row(row) + self.column(column)
        return embedded

    def forward(
        self,
        input_ids: Int[Tensor, "batch seq_len"],
        position_ids: Int[Tensor, "#batch seq_len"],
    ) -> Hidden:
        """[batch, seq_len, embed_dim]; positions count from 0 and lie below `max_positions`."""
        embedded: Tensor = self.token(input_ids) + self.positions(position_ids)
        return embedded
