"""tests/findings.py at toy size: every row runs, and what was made is not made twice."""

import importlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import rae_encoder

findings = importlib.import_module("findings")
probe = importlib.import_module("probe")


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


@pytest.mark.parametrize("script", ["rae_decoder_train", "flow_train"])
def test_a_stopped_training_ends_the_table(toys, monkeypatch, script):
    """A signal makes a main end early with a checkpoint, of which no row may draw samples."""

    def stop(argv):
        out = Path(argv[argv.index("--out") + 1])
        out.mkdir(parents=True)
        torch.save({"step": int(argv[argv.index("--steps") + 1]) - 1}, out / "last.pt")

    monkeypatch.setattr(getattr(findings, script), "main", stop)
    args = findings.parse_args(toys)
    with pytest.raises(SystemExit, match="stopped"):
        if script == "flow_train":
            findings.flow(args, "stopped", "decoder.pt", steps=1000, flags=[])
        else:
            findings.decoder(args, "stopped", steps=1000)


def test_figures_of_other_flags_are_not_taken(toys, tmp_path):
    flags = [*toys[:-1], str(tmp_path)]
    (tmp_path / "settings.json").write_text(json.dumps({"share": 0.5}))
    with pytest.raises(SystemExit, match="share 0.002, .* has 0.5: choose another"):
        findings.main(flags)


def test_a_mirrored_copy_is_near():
    photographs = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    plain = torch.tensor([[0.0, 5.0], [0.0, 1.0]])
    mirrored = torch.tensor([[3.0, 4.0], [9.0, 9.0]])
    nearest = probe.nearest_of([plain, mirrored], photographs)
    assert nearest.values.tolist() == [0, 1]
    assert nearest.indices.tolist() == [1, 0]


@pytest.mark.slow
def test_probe_knows_copies_of_photographs_and_their_classes(toys, tmp_path, capsys):
    """Samples that are photographs lie at distance 0 of themselves, and show the class they are of."""
    data = toys[1]
    images = rae_encoder.ImageData(data, 32)
    samples = tmp_path / "samples"
    samples.mkdir()
    # 40 copies, a class a column, as sample.py counts round its classes
    count = len(images.classes)
    of_class = [np.flatnonzero(np.array(images.labels) == k) for k in range(count)]
    for i in range(40):
        shutil.copy(images.path(of_class[i % count][i // count]), samples / f"{i:06d}.png")
    (samples / "settings.json").write_text(json.dumps({"classes": list(range(count)), "crop": 32}))

    weights = toys[toys.index("--features-weights") + 1]
    flags = ["--data", data, "--test", data, "--features", "test_efficientnet", "--features-weights", weights]
    probe.main([str(samples), *flags])
    result = json.loads(capsys.readouterr().out)
    assert result["nearest"] == pytest.approx(0, abs=1e-3)
    assert result["nearest_of_test"] == pytest.approx(0, abs=1e-3)
    assert result["named"] > 0.9  # of the photographs that it learned from
    assert result["named_of_test"] > 0.9

    # Four pairs of rows with a margin of 2: each sample over its copy
    sheet = np.asarray(Image.open(tmp_path / "samples-nearest.png"))
    for row in range(0, 8, 2):
        top = 2 + 34 * row
        assert (sheet[top : top + 32] == sheet[top + 34 : top + 66]).all()

    # Shifted labels: no sample is of its class any more.
    (samples / "settings.json").write_text(json.dumps({"classes": [*range(1, count), 0], "crop": 32}))
    probe.main([str(samples), *flags])
    assert json.loads(capsys.readouterr().out)["named"] < 0.1
