"""Text files that people wrote: captions, tables and prompts, in whatever encoding an editor left them."""

from __future__ import annotations

import codecs
from pathlib import Path

from sdxl_ambient.errors import TextError

# The longer marks first: that of UTF-32 begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_WAYS_OUT = "save it as UTF-8, or say what it is with --caption_encoding (latin-1, cp1252, utf-16-le, …)"


def read_text(path: str | Path, encoding: str | None = None) -> str:
    """The text of a file: by its byte order mark, else in ``encoding``, else in UTF-8. Lines end in a line feed.

    Raises:
        TextError: it can't be read, or isn't text in that encoding. The message names the file.
    """
    path = Path(path)
    try:
        return decode(path.read_bytes(), str(path), encoding)
    except OSError as error:
        raise TextError(f"{path} can't be read: {error.strerror}") from None


def decode(data: bytes, name: str, encoding: str | None = None) -> str:
    """The same for bytes; ``name`` is what the message calls them.

    Raises:
        TextError: not text in that encoding.
    """
    wanted = next((one for mark, one in _MARKS if data.startswith(mark)), encoding or "utf-8")
    try:
        text = data.decode(wanted)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise TextError(f"{name}, line {line}: byte {error.start} is not {wanted.upper()}; {_WAYS_OUT}") from None
    if "\0" in text:  # what UTF-16 without its mark looks like
        raise TextError(f"{name}: it holds zero bytes, as UTF-16 without its mark does; {_WAYS_OUT}")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path: str | Path, encoding: str | None = None) -> list[str]:
    """The lines of a file without blanks around them, empty lines left out. Raises TextError."""
    return [line for line in map(str.strip, read_text(path, encoding).split("\n")) if line]


def is_encoding(name: str) -> bool:
    """Whether Python knows a text encoding by this name."""
    try:
        return isinstance("a".encode(name).decode(name), str)
    except (LookupError, UnicodeError, TypeError):
        return False
