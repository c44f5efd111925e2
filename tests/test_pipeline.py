"""The four scripts as a user runs them, at tiny size, with one and with two processes; resume; bad input."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import equal, read
from PIL import Image

import flow_train
import rae_decoder_train
import rae_encoder

ROOT = Path(__file__).parents[1]
TRAIN = "--steps 4 --batch-size 8 --log-every 2 --save-every 1 --keep-every 1 --workers 0".split()  # noqa: SIM905


def torchrun(script, *flags, world=1, cwd):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", world, "--"]
    command = [str(part) for part in (*launcher, ROOT / script, *flags)]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result


def read_log(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module", params=[1, 2], ids=["1 process", "2 processes"])
def chain(request, tmp_path_factory):
    """A folder in which the four scripts have run one after the other."""
    folder, world = tmp_path_factory.mktemp("chain"), request.param
    torchrun("rae_decoder_train.py", *TRAIN, world=world, cwd=folder)
    torchrun("flow_train.py", *TRAIN, "--stats-images", 20, world=world, cwd=folder)
    torchrun("sample.py", "--num", 8, "--steps", 2, world=world, cwd=folder)
    judged = torchrun("fid.py", "samples", "--num", 8, "--ref-num", 8, "--json", world=world, cwd=folder)
    return folder, world, json.loads(judged.stdout.splitlines()[-1])


def test_the_chain_ends_with_images_and_a_fid(chain):
    folder, _, judged = chain
    assert sorted(p.name for p in (folder / "samples").glob("*.png")) == [f"{i:06d}.png" for i in range(8)]
    assert Image.open(folder / "samples" / "000000.png").size == (32, 32)
    assert (folder / "samples.png").exists() and list((folder / "runs/decoder").glob("preview-*.png"))
    assert math.isfinite(judged["fid"]) and judged["fid"] > 0
    for stage in ("decoder", "flow"):
        lines = read_log(folder / "runs" / stage)
        assert [line["step"] for line in lines] == [2, 4]
        assert all(math.isfinite(line["loss"]) for line in lines)


def test_ema_is_its_closed_form(chain):
    folder = chain[0]
    for stage in ("decoder", "flow"):
        copies = [read(folder / "runs" / stage / f"{step:07d}.pt") for step in range(1, 5)]
        decay = copies[0]["args"]["ema"]
        for name, value in copies[-1]["ema"].items():
            if not value.is_floating_point() or "rope" in name or name in ("pos_embed", "t_embedder.W"):
                continue
            expected = copies[0]["ema"][name].double() * decay**3
            for k, copy in enumerate(copies[1:], 2):
                expected += (1 - decay) * decay ** (4 - k) * copy["model"][name].double()
            assert torch.allclose(value.double(), expected, atol=1e-6), (stage, name)


def test_resumed_runs_end_with_the_same_bits(chain):
    folder, world, _ = chain
    for script, stage in (("rae_decoder_train.py", "decoder"), ("flow_train.py", "flow")):
        source = f"runs/{stage}/0000002.pt"
        out = f"again/{stage}"
        torchrun(script, *TRAIN, "--resume", source, "--out", out, world=world, cwd=folder)
        whole, resumed = (read(folder / run / stage / "last.pt") for run in ("runs", "again"))
        for part in ("model", "ema", "optimizer", "step", "config"):
            assert equal(whole[part], resumed[part]), (stage, part)


def test_two_processes_train_like_one(chain, tmp_path):
    """Gradients are averaged over ranks: without random numbers one and two processes take the same step."""
    folder, world, _ = chain
    flags = [
        *TRAIN,
        "--data",
        folder / "data/demo",
        "--noise-tau",
        0,
        "--lpips-weight",
        0,
        "--precision",
        "fp32",
    ]
    torchrun("rae_decoder_train.py", *flags, "--lr", 1e-5, world=3 - world, cwd=tmp_path)
    torchrun("rae_decoder_train.py", *flags, "--lr", 1e-5, "--out", "runs/same", world=world, cwd=tmp_path)
    one, two = (read_log(tmp_path / "runs" / run) for run in ("decoder", "same"))
    for a, b in zip(one, two, strict=True):
        assert a["l1"] == pytest.approx(b["l1"], rel=1e-5)


def test_bad_input_ends_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rae_encoder.draw_demo("data/demo", num=20)
    common = ["--workers", "0", "--steps", "1"]
    stage1, stage2 = rae_decoder_train.main, flow_train.main
    torch.save({"format": "other"}, "other.pt")
    decoder = dict(format="rae-decoder/1", config=dict(encoder="dinov2-base", encoder_size=224))
    torch.save(decoder, "decoder.pt")
    small = ["--batch-size", "4", *common]
    cases = [
        (stage1, ["--data", "none", *common], "--data none: no such folder"),
        (stage1, ["--preset", "imagenet256", *common], "--preset imagenet256 needs --data"),
        (stage1, [*common], "20 images, fewer than --batch-size 32"),
        (stage1, [*small, "--accum", "3"], "--batch-size 4 is no multiple of 1 ranks x 3"),
        (stage1, ["--batch-size", "0"], "--batch-size 0: expected more than 0"),
        (stage1, ["--keep-every", "150"], "--keep-every 150 is no multiple of --save-every 100"),
        (stage2, ["--hold-epochs", "50"], "--decay-epochs 40 is not after --hold-epochs 50"),
        (stage1, [*small, "--image-size", "30"], "--image-size 30 is no multiple of the patch"),
        (stage1, [*small, "--decoder", "ViT-Q"], "--decoder ViT-Q: not one of"),
        (stage1, [*small, "--lpips-weight", "0", "--resume", "other.pt"], "other.pt: not a rae-decoder/1"),
        (stage2, [*small, "--decoder", "", "--model", "DiT-Q"], "DiT-Q"),
        (stage2, [*small], "runs/decoder/last.pt: no such file"),
        (
            stage2,
            [*small, "--decoder", "decoder.pt"],
            "decoder.pt has encoder dinov2-base, this run test_vit",
        ),
    ]
    for main, flags, line in cases:
        with pytest.raises(SystemExit) as exit:
            main(flags)
        assert line in str(exit.value) and "\n" not in str(exit.value), flags
    for main in (stage1, stage2, rae_encoder.main):
        with pytest.raises(SystemExit):
            main(["--preset", "imagenet"])
        assert "--preset: invalid choice: 'imagenet' (choose from" in capsys.readouterr().err
    result = subprocess.run(
        [sys.executable, ROOT / "flow_train.py", "--data", "none"], capture_output=True, text=True
    )
    assert result.returncode == 1 and result.stderr.splitlines() == [
        "--data none: no such folder or .tar, or no .png .jpg .jpeg .webp .bmp in it"
    ]


def test_the_demos_network_and_weights_are_not_those_of_other_encoders():
    own = flow_train.parse_args([])
    assert (own.encoder_weights, own.encoder_size, own.width) == ("random", 64, 128)
    other = flow_train.parse_args(["--data", "x", "--encoder", "dinov2-small", "--model", "DiT-S"])
    assert (other.encoder_weights, other.encoder_size, other.width) == (None, None, None)
    assert flow_train.parse_args(["--model", "DiT-S", "--width", "64"]).width == 64


def test_previews_are_samples(chain):
    folder, world, _ = chain
    if world > 1:
        pytest.skip("one process is enough to see that sample.py is run")
    flags = [*TRAIN[:-6], "--save-every", 4, "--preview-every", 4, "--resume", "runs/flow/0000003.pt"]
    torchrun("flow_train.py", *flags, "--out", "runs/preview", cwd=folder)
    preview = np.asarray(Image.open(folder / "runs/preview/preview-0000004.png"))
    assert preview.shape[2] == 3 and preview.std() > 0
