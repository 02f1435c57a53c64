"""Frozen records: dataclasses(frozen=True) at a tenth of its price, for the modules that a dry run imports.

The standard decorator compiles six methods for each class, 0.4 ms on Python 3.11: for the launcher's forty classes more
than a dry run's own work. These share theirs. Fields, defaults, `field(default_factory=…)`, equality, hash, repr,
`dataclasses.asdict` and `fields` are as there; there is no inheritance, no `__post_init__` and no `init=False`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar, dataclass_transform

T = TypeVar("T")
field = dataclasses.field
_MISSING: Any = dataclasses.MISSING
_FIELD: Any = vars(dataclasses)["_FIELD"]


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def frozen(cls: type[T]) -> type[T]:
    """Make a class with annotated fields a frozen record."""
    fields: dict[str, dataclasses.Field[Any]] = {}
    for name, kind in cls.__dict__.get("__annotations__", {}).items():
        given = cls.__dict__.get(name, _MISSING)
        one: Any = given if isinstance(given, dataclasses.Field) else dataclasses.field(default=given)
        one.name, one.type, one._field_type = name, kind, _FIELD
        if one.default is not _MISSING:
            setattr(cls, name, one.default)
        elif name in cls.__dict__:
            delattr(cls, name)
        fields[name] = one
    methods: dict[str, Any] = {"__init__": _init, "__setattr__": _refuse, "__delattr__": _refuse}
    methods |= {"__eq__": _eq, "__hash__": _hash, "__repr__": _repr}
    for name, method in methods.items():
        setattr(cls, name, method)
    made: Any = cls
    made.__dataclass_fields__ = fields
    setattr(cls, "__match_args__", tuple(fields))  # noqa: B010
    return cls


def replace(record: T, **changes: Any) -> T:
    """The record with some fields changed."""
    return type(record)(**{**vars(record), **changes})


def _init(self: Any, *given: Any, **named: Any) -> None:
    fields = self.__dataclass_fields__
    if len(given) > len(fields):
        raise TypeError(f"{type(self).__name__} takes {len(fields)} values, got {len(given)}")
    values = dict(zip(fields, given, strict=False))
    if not named and len(values) == len(fields):
        self.__dict__.update(values)
        return
    for name in named:
        if name not in fields or name in values:
            what = "is given twice" if name in values else "is no field"
            raise TypeError(f"{type(self).__name__}: {name} {what}")
    values.update(named)
    for name, one in fields.items():
        if name not in values:
            if one.default is not _MISSING:
                values[name] = one.default
            elif one.default_factory is not _MISSING:
                values[name] = one.default_factory()
            else:
                raise TypeError(f"{type(self).__name__} needs {name}")
    self.__dict__.update((name, values[name]) for name in fields)


def _refuse(self: Any, name: str, *value: Any) -> None:
    raise dataclasses.FrozenInstanceError(f"cannot assign to field {name!r}")


def _eq(self: Any, other: object) -> Any:
    return vars(self) == vars(other) if type(other) is type(self) else NotImplemented


def _hash(self: Any) -> int:
    return hash((type(self), *vars(self).values()))


def _repr(self: Any) -> str:
    shown = ", ".join(f"{name}={getattr(self, name)!r}" for name, one in self.__dataclass_fields__.items() if one.repr)
    return f"{type(self).__qualname__}({shown})"
