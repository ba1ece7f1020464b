"""Configurations that are timed on the device, if COLONNADE_AUTOTUNE=1 asks for it.

The first call of a kernel, at sizes that no earlier call had, times its configuration of the table
against up to 35 neighbours of it. Each of them is compiled, so this takes about a minute a kernel.
What was fastest is kept in a file, in the folder that COLONNADE_CACHE names, and later processes
read it. Another configuration adds up in another order, so results may differ in their last bits
from those of the table.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import timeit
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import triton
from triton.runtime.errors import OutOfResources, PTXASError

from colonnade.backends.environment import cache_folder, is_on
from colonnade.backends.triton.configurations import Configuration, Kernel, Words

Launch = Callable[[Configuration], object]
"""Launches a kernel, at a configuration."""

log = logging.getLogger(__name__)


class Sizes(NamedTuple):
    """The sizes that decide which configuration is fastest; lengths are powers of 2, rounded up."""

    device: str
    kernel: Kernel
    dtype: str
    precision: str
    qk_dim: int
    v_dim: int
    members: int
    heads: int
    """Key heads of all batch rows."""
    q_len: int
    slots: int
    longest: int
    """Most queries of a row."""
    words: Words = "none"
    """The way to compute random words for dropout."""

    def path(self) -> Path:
        """Return the file that keeps the configuration for these sizes.

        Raises:
            RuntimeError: There is no home for a folder.
        """
        sizes = hashlib.sha256(repr((triton.__version__, *self)).encode()).hexdigest()[:16]
        return cache_folder() / f"triton-{self.kernel}-{sizes}.json"


_known: dict[Sizes, Configuration] = {}


def is_asked_for() -> bool:
    """Whether configurations are to be timed.

    Raises:
        ValueError: COLONNADE_AUTOTUNE is neither on nor off.
    """
    return is_on("COLONNADE_AUTOTUNE", default=False)


def tuned(sizes: Sizes, of_table: Configuration, launch: Launch | None) -> Configuration:
    """Return the fastest configuration of a kernel, timed now unless it ever was.

    Without `launch` nothing can be timed, and one that never was is that of the table.
    """
    found = _known.get(sizes) or _read(sizes)
    if found is None:
        if launch is None:
            return of_table
        found = _fastest(sizes, of_table, launch)
    _known[sizes] = found
    return found


def neighbours(of_table: Configuration, longest: int) -> Iterator[Configuration]:
    """Yield configurations with tiles from half to twice as large as those of the table."""
    for queries in (of_table.queries // 2, of_table.queries, of_table.queries * 2):
        for keys in (of_table.keys // 2, of_table.keys, of_table.keys * 2):
            for warps in (4, 8):
                for stages in (of_table.stages, of_table.stages + 1):
                    found = Configuration(queries, keys, warps, stages)
                    if min(queries, keys) >= 16 and queries <= longest and found != of_table:
                        yield found


def _fastest(sizes: Sizes, of_table: Configuration, launch: Launch) -> Configuration:
    times = {of_table: _milliseconds(launch, of_table)}
    for each in neighbours(of_table, sizes.longest):
        # Some take more registers or shared memory than there is, and some do not compile: then
        # Triton's passes raise no error of their own.
        with suppress(OutOfResources, PTXASError, RuntimeError):
            times[each] = _milliseconds(launch, each)
    best = min(times, key=times.__getitem__)
    log.info("%s: %s in %.3g ms, of %d tried.", sizes, best, times[best], len(times))
    _write(sizes, best, times)
    return best


def _milliseconds(launch: Launch, configuration: Configuration) -> float:
    from triton.testing import do_bench

    if triton.knobs.runtime.interpret:  # There is no device whose clock could be read.
        return 1e3 * timeit.timeit(lambda: launch(configuration), number=1)
    return float(do_bench(lambda: launch(configuration), return_mode="median"))


def _read(sizes: Sizes) -> Configuration | None:
    """Return what an earlier process found; None where nothing is there, or nothing of use."""
    with suppress(OSError, RuntimeError, ValueError, TypeError, KeyError):
        found = Configuration(**json.loads(sizes.path().read_text("utf-8"))["configuration"])
        whole = all(isinstance(size, int) and size >= 1 for size in found)
        powers = whole and all(size & (size - 1) == 0 for size in found[:3])
        if powers and min(found[:2]) >= 16 and found.queries <= sizes.longest:
            return found
    return None


def _write(sizes: Sizes, best: Configuration, times: dict[Configuration, float]) -> None:
    found = {
        "sizes": sizes._asdict(),
        "configuration": best._asdict(),
        "milliseconds": [{**each._asdict(), "median": ms} for each, ms in times.items()],
    }
    try:
        path = sizes.path()
        path.parent.mkdir(parents=True, exist_ok=True)
        # Under its name in one step: other processes write the same file.
        handle, unfinished = tempfile.mkstemp(dir=path.parent, prefix=path.stem)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=1)
        Path(unfinished).replace(path)
    except (OSError, RuntimeError) as error:
        log.warning("Cannot keep the configuration that was tuned: %s", error)
