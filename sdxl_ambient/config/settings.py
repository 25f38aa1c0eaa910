"""Options → the settings of a library function, which knows no options."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, TypeVar

Settings = TypeVar("Settings")


def settings_of(kind: type[Settings], options: object, **values: Any) -> Settings:
    """A settings dataclass ``kind`` whose fields have the values of the options of their names.

    ``values`` are those of fields that are no option.
    """
    names = [field.name for field in fields(kind) if field.name not in values]  # pyright: ignore[reportArgumentType] - any dataclass
    return kind(**{name: getattr(options, name) for name in names}, **values)
