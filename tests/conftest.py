"""The scripts live one folder up and are imported as they are; here is what tests of several need."""

import signal
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import rae_encoder  # noqa: E402


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: starts processes or takes longer than a second")


def read(path):
    return torch.load(path, map_location="cpu", weights_only=True)


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def message(function, *args):
    """The one line that function(*args) ends in."""
    with pytest.raises(SystemExit) as error:
        function(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with 22 images of the demo; signals are given back to pytest afterwards."""
    monkeypatch.chdir(tmp_path)
    rae_encoder.draw_demo("data/demo", num=22)
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGINT)]
    yield tmp_path
    for number, handler in handlers:
        signal.signal(number, handler)
