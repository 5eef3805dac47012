"""Spec: a code's settings as plain data, which a recipe holds and a code is made from again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lilliput import registry
from lilliput.code.base import Code


@dataclass(frozen=True)
class Spec:
    """Which code, with which settings.

    Args:
        code: the name of its class in the registry, or "module:Name".
        settings: pairs of name and plain value.

    Example:
        >>> from lilliput.code.low_rank import LowRank
        >>> Spec.of(LowRank(8)).data()
        {'code': 'LowRank', 'rank': 8}
    """

    code: str
    settings: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, value: Code | Spec | Mapping[str, Any]) -> Spec:
        """The spec of a code, or of plain data such as `{"code": "LowRank", "rank": 8}`.

        Raises:
            TypeError: for anything else.
        """
        if isinstance(value, Spec):
            return value
        if isinstance(value, Code):
            value = value.spec() | {"code": registry.written(type(value), "code")}
        if not isinstance(value, Mapping) or not isinstance(value.get("code"), str):
            raise TypeError(
                f'Spec: a code must be given as a Code or as {{"code": "Name", ...}}, got {value!r}. '
                "Write lilliput.LowRank(8)."
            )
        return cls(value["code"], tuple((name, _frozen(item)) for name, item in value.items() if name != "code"))

    def data(self) -> dict[str, Any]:
        """Plain data."""
        return {"code": self.code, **{name: _thawed(value) for name, value in self.settings}}

    def kind(self) -> type[Code]:
        """The class of the code.

        Raises:
            KeyError: for one that is not known or cannot be imported, with what to install.
        """
        kind: type[Code] = registry.resolve("code", self.code, "Spec")
        return kind

    def make(self, buffers: Mapping[str, Tensor] | None = None) -> Code:
        """A new code; with the buffers of one that was stored, the same as that one.

        Raises:
            KeyError: as `kind`.
            TypeError, ValueError: for settings that the code does not take.
        """
        return self.kind().made({name: _frozen(value) for name, value in self.settings}, buffers or {})


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def _thawed(value: Any) -> Any:
    return list(map(_thawed, value)) if isinstance(value, tuple) else value
