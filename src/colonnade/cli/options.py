"""Options that several commands share, each with its type and its help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of the run.")]
Length = Annotated[int, typer.Option(help="Number of positions n in a sequence.")]
Stride = Annotated[int, typer.Option(help="Length l of a block.")]
Summary = Annotated[int, typer.Option(help="Number of summary columns c in a block.")]
Subblocks = Annotated[
    int, typer.Option(help="Number of sub-blocks; key/value heads take them in turn.")
]
Part = Annotated[str, typer.Option(help="Part of the pattern: merged, local or summary.")]
Batch = Annotated[int, typer.Option(help="Number of sequences in a batch.")]
Heads = Annotated[int, typer.Option(help="Number of query heads.")]
KvHeads = Annotated[
    int | None,
    typer.Option(help="Number of key/value heads. Default: the number of query heads."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
