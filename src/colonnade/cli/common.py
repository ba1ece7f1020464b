"""The application, the options that commands share, errors in one line, and numbers for people."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn

try:
    import typer
    from rich.table import Table
except ImportError:
    sys.stderr.write("colonnade: this needs typer and rich; install extra 'train' or 'plot'.\n")
    sys.exit(2)

app = typer.Typer(
    help="Fixed factorized attention (Child et al. 2019): train, evaluate, sample, retrofit, show, "
    "measure.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
EXTRAS = {
    "transformers": "train",
    "accelerate": "train",
    "tokenizers": "train",
    "safetensors": "train",
    "numpy": "train",
    "peft": "tune",
    "matplotlib": "plot",
}
MISTAKE = 2
"""Exit code for a user's mistake."""
INTERRUPTED = 130
"""Exit code after Ctrl-C, that of shells: 128 and the number of the signal."""

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of the run.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
KvHeads = Annotated[
    int | None,
    typer.Option(help="Number of key/value heads. Default: the number of query heads."),
]


def fail(message: str) -> NoReturn:
    """Print the message in one line and exit with code 2."""
    typer.echo(f"colonnade: {' '.join(message.split())}", err=True)
    raise typer.Exit(MISTAKE)


@contextmanager
def one_line_for_mistakes() -> Iterator[None]:
    """Turn a user's mistake, or an extra that is not installed, into one line and exit code 2.

    It goes around what a command checks, opens and writes on the user's word, never around its
    work: an error in there is ours and deserves its traceback.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in EXTRAS:
            raise
        fail(f"this needs {package}; install the extra {EXTRAS[package]!r}.")
    except (ValueError, TypeError, NotImplementedError) as error:
        fail(str(error))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        fail(f"{where}{error.strerror or error}.")


@contextmanager
def one_line_for_the_world(resuming: str) -> Iterator[None]:
    """Turn an interruption by the user, or a full disk, into one line that says how to go on.

    Args:
        resuming: The command that goes on with what was begun.
    """
    from safetensors import SafetensorError

    try:
        yield
    except KeyboardInterrupt:
        typer.echo(
            f"colonnade: interrupted. {resuming} goes on from the last checkpoint.", err=True
        )
        raise typer.Exit(INTERRUPTED) from None
    except (OSError, RuntimeError, SafetensorError) as error:
        if not _is_full_disk(error):
            raise
        fail(
            f"no space is left on the disk. Make room; then {resuming} goes on from the last "
            "checkpoint."
        )


def _is_full_disk(error: BaseException | None) -> bool:
    """Whether an error, or one that it came of, is that of a full disk or quota."""
    while error is not None:
        numbers = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
        if isinstance(error, OSError) and error.errno in numbers:
            return True
        # safetensors and PyTorch have errors of their own, without a number.
        said = ("No space left on device", "Disk quota exceeded", "PytorchStreamWriter failed")
        if any(each in str(error) for each in said):
            return True
        error = error.__cause__ or error.__context__
    return False


def is_given(context: typer.Context, name: str) -> bool:
    """Whether a parameter comes from the command line, and not from its default."""
    # Every parameter of a running command has a source, whatever its type says.
    return context.get_parameter_source(name).name == "COMMANDLINE"  # type: ignore[union-attr]


def refuse_other_options(context: typer.Context, *allowed: str) -> None:
    """Refuse parameters besides those that --resume goes with, for all others are the run's."""
    given = [
        name.upper() if (name := parameter.opts[0])[0] != "-" else name
        for parameter in context.command.params
        if parameter.name not in allowed and is_given(context, parameter.name or "")
    ]
    if given:
        raise ValueError(
            f"--resume continues with the settings of the run; leave out {', '.join(given)}."
        )


def table_of(name: str, *of_numbers: str) -> Table:
    """Make a table whose cells may break into lines but lose no digit."""
    table = Table(name)
    for column in of_numbers:
        table.add_column(column, justify="right", overflow="fold")
    return table


def percent(share: float) -> str:
    """Format a share as a percentage with three digits."""
    return f"{three_digits(100 * share)} %"


def times(ratio: float) -> str:
    """Format a ratio with three digits or more."""
    return f"{ratio:,.0f} ×" if ratio >= 100 else f"{three_digits(ratio)} ×"


def three_digits(value: float) -> str:
    """Format a number with three digits; below 1,000 without an exponent."""
    return f"{value:#.3g}".removesuffix(".")


def flops(count: int) -> str:
    """Format a number of floating-point operations with a prefix."""
    return _scaled(count, ("", "k", "M", "G", "T", "P", "E", "Z"), 1000, "FLOP")


def size(count: int) -> str:
    """Format a number of bytes with a binary prefix."""
    return _scaled(count, ("", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei", "Zi"), 1024, "B")


def _scaled(value: float, prefixes: tuple[str, ...], step: int, unit: str) -> str:
    """Format with the largest prefix that leaves at least 1, with three digits or more."""
    power = 0
    while value >= step and power < len(prefixes) - 1:
        value, power = value / step, power + 1
    return f"{value:,.{0 if power == 0 or value >= 100 else 2}f} {prefixes[power]}{unit}"
