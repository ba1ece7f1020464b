"""Sections of documentation that measurements write: between a pair of comments."""

from __future__ import annotations

from collections.abc import Iterable


def marks(name: str) -> tuple[str, str]:
    """Return the comments of Markdown between which a section lies."""
    return f"<!-- {name} -->", f"<!-- /{name} -->"


def fill(page: str, name: str, lines: Iterable[str]) -> str:
    """Return a page of Markdown whose section holds these lines, and nothing else.

    Raises:
        ValueError: The page has no such section, or several.
    """
    begin, end = marks(name)
    if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
        raise ValueError(f"the page must have one section from {begin} to {end}.")
    before, rest = page.split(begin)
    text = "\n".join(lines)
    return f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}"
