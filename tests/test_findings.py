"""tests/findings.py at toy size: every row runs, and what was made is not made twice."""

import importlib
import json
from pathlib import Path

import pytest
import timm
from safetensors.torch import save_file

import rae_encoder

findings = importlib.import_module("findings")


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """Flags of small photographs, and of random weights for encoder and features."""
    folder = tmp_path_factory.mktemp("findings")
    rae_encoder.draw_demo(str(folder / "data"), num=44)
    weights = str(folder / "features.safetensors")
    save_file(timm.create_model("test_efficientnet", num_classes=1000).state_dict(), weights)
    flags = ["--data", str(folder / "data"), "--test", str(folder / "data"), "--encoder", "test_vit"]
    flags += ["--encoder-weights", "random", "--features", "test_efficientnet", "--features-weights", weights]
    return [*flags, "--share", "0.002", "--workers", "0", "--out", str(folder / "out")]


@pytest.mark.slow
@pytest.mark.parametrize("name", findings.ROWS)
def test_each_row_runs_at_toy_size_and_once(name, toys, capsys):
    findings.main([*toys, "--only", name])
    first = capsys.readouterr().out
    assert f"| {name} |" in first
    # A second call only reads the figures.
    findings.main([*toys, "--only", name])
    assert capsys.readouterr().out == first

    result = json.loads(Path(toys[-1], f"{name}.json").read_text())
    assert "nan" not in result["figures"]
