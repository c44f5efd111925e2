"""The README keeps its word: the table of the paper's items, and the lines for Python."""

import importlib
import re
from pathlib import Path

import pytest
from test_sample import write_decoder, write_flow

import rae_encoder

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
ROWS = re.findall(r"^\| .*? \| `([a-z_]+)\.(\w+)` \| `(test_\w+)` \| (\d*) ?\|$", README, re.M)
TESTS = "\n".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))


def test_the_table_is_there():
    assert len(ROWS) >= 20


@pytest.mark.parametrize(("module", "name", "test", "difference"), ROWS)
def test_each_row_of_the_table_names_code_a_test_and_a_difference(module, name, test, difference):
    assert hasattr(importlib.import_module(module), name)
    assert f"def {test}(" in TESTS
    assert not difference or re.search(rf"^{difference}\. ", README, re.M)


def test_names_of_code_in_the_text_exist():
    names = re.findall(r"`((?:rae_encoder|rae_decoder_train|dit_dh|flow_train|sample|fid)\.\w+)`", README)
    assert len(names) > 20
    for module, name in (text.split(".") for text in names if not text.endswith(".py")):
        assert hasattr(importlib.import_module(module), name), (module, name)


def test_the_lines_for_python_run(tmp_path, monkeypatch):
    section = README.split("## Use it from Python")[1].split("\n## ")[0]
    blocks = [block for block in re.findall(r"(?:^    .*\n)+", section, re.M)]
    assert [len(block.splitlines()) <= limit for block, limit in zip(blocks, (6, 8), strict=True)] == [
        True
    ] * 2

    monkeypatch.chdir(tmp_path)
    for stage in ("decoder", "flow"):
        (tmp_path / "runs" / stage).mkdir(parents=True)
    write_decoder("runs/decoder/last.pt")
    write_flow("runs/flow/last.pt")
    rae_encoder.draw_demo("my_images", num=4)
    values = {}
    for block in blocks:
        exec(re.sub(r"^    ", "", block, flags=re.M), values)
    assert values["xhat"].shape == (1, 3, 32, 32)
    assert values["images"].shape == (4, 3, 32, 32)
