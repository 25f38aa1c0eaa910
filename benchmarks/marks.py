"""Text between two marks of a page, which a command writes anew."""

from __future__ import annotations


def put_between(text: str, start: str, end: str, body: str) -> str:
    """``text`` with ``body`` on lines of its own between the marks ``start`` and ``end``.

    Raises:
        ValueError: the marks are not there, once each.
    """
    if text.count(start) != 1 or text.count(end) != 1:
        raise ValueError(f"{start} and {end} must each be there once")
    before, rest = text.split(start)
    return f"{before}{start}\n{body}\n{end}{rest.split(end)[1]}"
