"""lilliput: a trained neural network in, a many times smaller and faster one out, with the measured proof.

The public names: first those written here, in reading order, then every method of the registry. They are imported when
first used, so that `import lilliput` costs nothing. After a change run `python scripts/names.py`: it writes the table
of methods, and `__init__.pyi` for type checkers and editors.
"""

import importlib
from typing import Any

from lilliput._names import METHODS

__version__ = "0.1.0"

_CORE = {
    # the main job
    "shrink": "lilliput.shrinking",
    "finish": "lilliput.shrinking",
    "pick": "lilliput.search.kept",
    "Result": "lilliput.search.finish",
    "save": "lilliput.export.save",
    "load": "lilliput.export.pack",
    "restore": "lilliput.export.restore",
    "run": "lilliput.runner",
    # the engine
    "compile": "lilliput.engine.compile",
    "Engine": "lilliput.engine.run",
    # the nouns
    "Task": "lilliput.task.protocol",
    "PerExample": "lilliput.task.transforms",
    "Code": "lilliput.code.base",
    "Stage": "lilliput.stage",
    "Rule": "lilliput.rule",
    "Finding": "lilliput.finding",
    "Recipe": "lilliput.recipe",
    "Reference": "lilliput.reference",
    "Store": "lilliput.store",
    # what is done with codes
    "attach": "lilliput.code.base",
    "realize": "lilliput.code.base",
    "build": "lilliput.code.deploy",
    "deploy": "lilliput.code.deploy",
    "codes": "lilliput.code.base",
    "storage": "lilliput.code.base",
    # failures
    "FloorNotMet": "lilliput.errors",
    "NotSupported": "lilliput.errors",
    "ExportError": "lilliput.errors",
    "StoreError": "lilliput.errors",
}
_NAMES = _CORE | METHODS

__all__ = ["__version__", *_NAMES]


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'lilliput' has no attribute {name!r}")
    value = getattr(importlib.import_module(_NAMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
