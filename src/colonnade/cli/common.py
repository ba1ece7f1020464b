"""What the commands share: the application, one line for a mistake, numbers for people."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

try:
    import typer
    from rich.table import Table
except ImportError:
    sys.stderr.write("colonnade: this needs typer and rich; install extra 'train' or 'plot'.\n")
    sys.exit(2)

app = typer.Typer(
    help="Fixed factorized attention (Child et al. 2019): train, evaluate, sample, show, count.",
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
    "matplotlib": "plot",
}
MISTAKE = 2
"""Exit code for what a user did."""


def fail(message: str) -> NoReturn:
    """Say what the user did wrong, in one line, and leave."""
    typer.echo(f"colonnade: {' '.join(message.split())}", err=True)
    raise typer.Exit(MISTAKE)


@contextmanager
def one_line_for_mistakes() -> Iterator[None]:
    """Turn what a user did wrong, or did not install, into one line and exit code 2.

    Used around the checks and openings of a command, not around its work: an error in there is
    ours, and deserves its traceback.
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


def at_least_one(name: str, count: int) -> int:
    """The count, unless it is below 1."""
    if count < 1:
        raise ValueError(f"{name} must be at least 1, got {name}={count}.")
    return count


def table_of(name: str, *of_numbers: str) -> Table:
    """Its cells may break into lines, but lose no digit."""
    table = Table(name)
    for column in of_numbers:
        table.add_column(column, justify="right", overflow="fold")
    return table


def percent(share: float) -> str:
    """A share, in three digits."""
    return f"{three_digits(100 * share)} %"


def times(ratio: float) -> str:
    """A ratio, in three digits or more."""
    return f"{ratio:,.0f} ×" if ratio >= 100 else f"{three_digits(ratio)} ×"


def three_digits(value: float) -> str:
    """A number in three digits, without an exponent where it has no more before the point."""
    return f"{value:#.3g}".removesuffix(".")


def flops(count: int) -> str:
    """Floating-point operations, with a prefix."""
    return _scaled(count, ("", "k", "M", "G", "T", "P", "E", "Z"), 1000, "FLOP")


def size(count: int) -> str:
    """Bytes, with a binary prefix."""
    return _scaled(count, ("", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei", "Zi"), 1024, "B")


def _scaled(value: float, prefixes: tuple[str, ...], step: int, unit: str) -> str:
    """With the largest prefix that leaves at least 1, in three digits or more."""
    power = 0
    while value >= step and power < len(prefixes) - 1:
        value, power = value / step, power + 1
    return f"{value:,.{0 if power == 0 or value >= 100 else 2}f} {prefixes[power]}{unit}"
