"""The patterns as pictures: an off-by-one is seen at a glance."""

from __future__ import annotations

import pytest
from torch import Tensor

from colonnade import FixedPattern, FullPattern, LocalPattern, Pattern, StridedPattern

PICTURES = {
    "merged": (
        FixedPattern(4, 1),
        0,
        """
        #...........
        ##..........
        ###.........
        ####........
        ...##.......
        ...###......
        ...####.....
        ...#####....
        ...#...##...
        ...#...###..
        ...#...####.
        ...#...#####
        """,
    ),
    "local": (
        FixedPattern(4, 1, part="local"),
        0,
        """
        #...........
        ##..........
        ###.........
        ####........
        ....#.......
        ....##......
        ....###.....
        ....####....
        ........#...
        ........##..
        ........###.
        ........####
        """,
    ),
    "summary": (
        FixedPattern(4, 1, part="summary"),
        0,
        """
        ............
        ............
        ............
        ...#........
        ...#........
        ...#........
        ...#........
        ...#...#....
        ...#...#....
        ...#...#....
        ...#...#....
        ...#...#...#
        """,
    ),
    "second sub-block": (
        FixedPattern(4, 1, subblocks=2),
        1,
        """
        #.......
        ##......
        ###.....
        ####....
        ..#.#...
        ..#.##..
        ..#.###.
        ..#.####
        """,
    ),
    "third head of two sub-blocks": (
        FixedPattern(4, 2, subblocks=2, part="summary"),
        2,
        """
        ........
        ........
        ..#.....
        ..##....
        ..##....
        ..##....
        ..##..#.
        ..##..##
        """,
    ),
    "short last block": (
        FixedPattern(5, 2),
        0,
        """
        #.......
        ##......
        ###.....
        ####....
        #####...
        ...###..
        ...####.
        ...#####
        """,
    ),
    "bidirectional": (
        FixedPattern(4, 1, causal=False),
        0,
        """
        ####...#..
        ####...#..
        ####...#..
        ####...#..
        ...#####..
        ...#####..
        ...#####..
        ...#####..
        ...#...###
        ...#...###
        """,
    ),
    "bidirectional summary": (
        FixedPattern(3, 1, part="summary", causal=False),
        0,
        """
        ..#..#.
        ..#..#.
        ..#..#.
        ..#..#.
        ..#..#.
        ..#..#.
        ..#..#.
        """,
    ),
    "strided": (
        StridedPattern(4),
        0,
        """
        #...........
        ##..........
        ###.........
        ####........
        #####.......
        .#####......
        ..#####.....
        ...#####....
        #...#####...
        .#...#####..
        ..#...#####.
        ...#...#####
        """,
    ),
    "strided local": (
        StridedPattern(3, part="local"),
        0,
        """
        #......
        ##.....
        ###....
        ####...
        .####..
        ..####.
        ...####
        """,
    ),
    "strided summary": (
        StridedPattern(3, part="summary"),
        0,
        """
        #......
        .#.....
        ..#....
        #..#...
        .#..#..
        ..#..#.
        #..#..#
        """,
    ),
    "window": (
        LocalPattern(3),
        0,
        """
        #......
        ##.....
        ###....
        .###...
        ..###..
        ...###.
        ....###
        """,
    ),
    "full": (
        FullPattern(),
        0,
        """
        #..
        ##.
        ###
        """,
    ),
    "full bidirectional": (
        FullPattern(causal=False),
        0,
        """
        ###
        ###
        ###
        """,
    ),
}


def _draw(mask: Tensor) -> list[str]:
    return ["".join(".#"[read] for read in row) for row in mask.tolist()]


@pytest.mark.parametrize(("pattern", "head", "picture"), PICTURES.values(), ids=PICTURES.keys())
def test_pictures(pattern: Pattern, head: int, picture: str) -> None:
    lines = picture.split()
    assert _draw(pattern.mask(len(lines), head + 1)[head]) == lines
