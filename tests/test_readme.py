"""README keeps its word: commands parse, names exist, lines for Python run, and it stays short."""

import argparse
import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch
from helpers import write_decoder, write_flow

import fid
import flow_train
import rae_encoder

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SCRIPTS = ("rae_encoder", "rae_decoder_train", "dit_dh", "flow_train", "sample", "fid")
TESTS = "\n".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
ROWS = re.findall(r"^\|.*\| `([a-z_]+)\.([\w.]+)`.*\| `(test_\w+)`", README, re.M)  # paper, code, test
# These flags are of torchrun and of Docker.
OTHER_FLAGS = {"--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint", "--shm-size"}


def fences(language):
    """The text of each ```language block, also inside of <details>."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)
    assert blocks, f"README has no ```{language}"
    return blocks


def commands():
    """The words of each command in README, without the comments behind them."""
    found = []
    for block in fences("bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while "&&" in words:
                found.append(words[: words.index("&&")])
                words = words[words.index("&&") + 1 :]
            found.append(words)
    return [words for words in found if words]


def flags_of(parse_args, *words):
    """The flags that a script's parser knows."""
    known = set()

    def note(parser, *args):
        known.update(parser._option_string_actions)
        raise InterruptedError

    with pytest.MonkeyPatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(argparse.ArgumentParser, "parse_args", note)
        parse_args(*words)
    return known


def known_flags():
    """Those of the five commands and of the scripts in tests/."""
    flags = set(OTHER_FLAGS)
    for name in set(SCRIPTS) - {"dit_dh"}:
        flags |= flags_of(importlib.import_module(name).parse_args)
    for name in ("bench", "findings", "probe"):
        if (ROOT / "tests" / f"{name}.py").exists():
            flags |= flags_of(importlib.import_module(name).main, [])
    return flags


def test_every_command_parses(monkeypatch, tmp_path):
    """By the script's own parser; files that the reader will have by then are not looked for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(flow_train, "read_weights", lambda path, flag: {})
    monkeypatch.setattr(fid, "defaults_of_samples", lambda folder: {"ref": "images", "crop": 64})
    parsed = set()
    for words in commands():
        place = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
        if place is None:
            continue
        script = words[place]
        assert (ROOT / script).exists(), words
        if script.removesuffix(".py") in SCRIPTS:
            assert words[0] in ("python", "torchrun"), words
            importlib.import_module(script.removesuffix(".py")).parse_args(words[place + 1 :])
            parsed.add(script)
            # torchrun takes --num for an abbreviation of a flag of its own.
            assert words[0] == "python" or "--num" not in words, words
    assert parsed == {f"{name}.py" for name in SCRIPTS if name != "dit_dh"}


def test_flags_and_files_that_are_named_exist():
    code = " ".join(re.findall(r"`([^`\n]+)`", README)) + "\n".join(fences("bash"))
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z_-]+", code))
    assert named and named <= known_flags()
    files = set(re.findall(r"\b(?:tests/|\.ci/)[\w./-]*\w|\b\w+\.py\b", README))
    files |= {target for target in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in target}
    assert len(files) > 6
    for name in files:
        assert (ROOT / name).exists(), name


def test_names_of_code_that_are_given_exist():
    names = re.findall(rf"`((?:{'|'.join(SCRIPTS)})\.(?!py`)[\w.]+)`", README)
    assert len(names) > 20
    for name in names:
        script, *attributes = name.split(".")
        value = importlib.import_module(script)
        for attribute in attributes:
            assert hasattr(value, attribute), name
            value = getattr(value, attribute)


def test_the_table_names_a_test_of_each_item_of_the_paper():
    assert len(ROWS) >= 20
    for module, name, test in ROWS:
        assert module in SCRIPTS and name, test
        assert f"def {test}(" in TESTS, test


def test_it_is_short():
    """12,500 bytes are what a newcomer reads; the rest is folded. Only tables are wider than a screen."""
    assert README.count("<details>") == README.count("</details>") > 0
    shown = re.sub(r"<details>.*?</details>", "", README, flags=re.S)
    assert len(shown.encode()) <= 12_500
    wide = [line for line in README.splitlines() if len(line) > 110 and not line.startswith("|")]
    assert not wide


def test_the_lines_for_python_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for stage in ("decoder", "flow"):
        (tmp_path / "runs" / stage).mkdir(parents=True)
    write_decoder("runs/decoder/last.pt")
    write_flow("runs/flow/last.pt")
    rae_encoder.draw_demo("my_images", num=4)
    blocks = [block for block in fences("python") if "diffusers" not in block]
    assert blocks
    values = {}
    with torch.set_grad_enabled(True):  # a reader may switch gradients off for good
        for block in blocks:
            exec(block, values)
    for name in ("xhat", "images"):
        assert values[name].shape[1:] == (3, 32, 32), name
