"""Every network: a plain module that the registry finds and whose source enters the store's keys."""

import inspect

import pytest
from torch import nn

from lilliput.registry import Entry, entries


@pytest.mark.parametrize("entry", [pytest.param(entry, id=entry.name) for entry in entries("net")])
def test_a_network_is_a_plain_module(entry: Entry) -> None:
    kind = entry.load()
    assert issubclass(kind, nn.Module) and kind.__name__ == entry.attribute and entry.summary
    assert kind.forward is not nn.Module.forward
    assert "forward" in inspect.getsource(kind)
