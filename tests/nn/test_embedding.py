"""The embeddings against Python's own division of positions."""

from __future__ import annotations

import pytest
import torch

from colonnade.nn import ImageEmbedding, TextEmbedding


@pytest.mark.parametrize("batch_of_positions", [1, 2])
def test_token_plus_row_plus_column(batch_of_positions: int) -> None:
    """Positions for each batch row or one run for all; they need not start at 0."""
    embedding = TextEmbedding(vocab_size=11, embed_dim=3, max_positions=14, stride=4).double()
    tokens = torch.randint(11, (2, 6))
    positions = torch.stack([torch.arange(8, 14), torch.arange(6)])[:batch_of_positions]
    found = embedding(tokens, positions)
    assert found.shape == (2, 6, 3)
    for b in range(2):
        for t in range(6):
            row, column = divmod(int(positions[b % batch_of_positions, t]), 4)
            place = embedding.row.weight[row] + embedding.column.weight[column]
            assert torch.equal(found[b, t], embedding.token.weight[tokens[b, t]] + place)
            assert torch.equal(embedding.positions(positions)[b % batch_of_positions, t], place)


@pytest.mark.parametrize(("max_positions", "rows"), [(12, 3), (13, 4), (3, 1), (16, 4)])
def test_a_short_last_row_has_its_embedding(max_positions: int, rows: int) -> None:
    embedding = TextEmbedding(5, 3, max_positions=max_positions, stride=4)
    assert embedding.row.num_embeddings == rows
    assert embedding.column.num_embeddings == 4
    assert embedding.positions(torch.tensor([[max_positions - 1]])).shape == (1, 1, 3)


def test_a_position_beyond_the_last_row_raises() -> None:
    embedding = TextEmbedding(5, 3, max_positions=8, stride=4)
    with pytest.raises(IndexError):
        embedding.positions(torch.tensor([[8]]))


def test_every_table_learns() -> None:
    """Its entries get the number of times that they were read as gradient."""
    embedding = TextEmbedding(5, 1, max_positions=6, stride=4)
    embedding(torch.tensor([[0, 0, 1, 2, 2, 2]]), torch.arange(6)[None]).sum().backward()
    counts = {"token": [2, 1, 3, 0, 0], "row": [4, 2], "column": [2, 2, 1, 1]}
    for name, expected in counts.items():
        table = getattr(embedding, name)
        assert table.weight.grad.flatten().tolist() == expected


def test_the_bytes_of_an_image_lie_row_by_row_pixel_by_pixel() -> None:
    """Against three nested loops over an image of 2 rows, 3 pixels each, 4 channels."""
    embedding = ImageEmbedding(11, 5, height=2, width=3, channels=4).double()
    tokens = torch.randint(11, (2, 24))
    found = embedding(tokens, torch.arange(24)[None])
    i = 0
    for row in range(2):
        for column in range(3):
            for channel in range(4):
                place = embedding.row.weight[row] + embedding.column.weight[column]
                place = place + embedding.channel.weight[channel]
                for b in range(2):
                    expected = embedding.token.weight[tokens[b, i]] + place
                    torch.testing.assert_close(found[b, i], expected)
                i += 1
    with pytest.raises(IndexError):
        embedding.positions(torch.tensor([[24]]))
