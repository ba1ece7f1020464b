"""The parts of the Sparse Transformer as plain torch modules."""

from colonnade.nn.attention import SelfAttention
from colonnade.nn.block import FeedForward, ResidualBlock
from colonnade.nn.embedding import ImageEmbedding, TextEmbedding

__all__ = ["FeedForward", "ImageEmbedding", "ResidualBlock", "SelfAttention", "TextEmbedding"]
