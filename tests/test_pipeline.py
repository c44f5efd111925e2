"""The four scripts as a user runs them, at tiny size, the first three with one and with two processes."""

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

ROOT = Path(__file__).parents[1]
TRAIN = "--steps 4 --batch-size 8 --log-every 2 --save-every 1 --keep-every 1 --workers 0".split()  # noqa: SIM905
STAGES = {"rae_decoder_train.py": "decoder", "flow_train.py": "flow"}
pytestmark = pytest.mark.slow


def run(script, *flags, cwd, world=None):
    """What the command printed; under torchrun where a number of processes is given."""
    command = [sys.executable]
    if world:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", world]
    command = [str(part) for part in (*command, ROOT / script, *flags)]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def read_log(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module", params=[1, 2], ids=["1 process", "2 processes"])
def chain(request, tmp_path_factory):
    """(a folder in which the four scripts have run one after the other, processes, fid.py's record)."""
    folder = tmp_path_factory.mktemp("chain")
    world = request.param
    run("rae_decoder_train.py", *TRAIN, world=world, cwd=folder)
    run("flow_train.py", *TRAIN, "--stats-images", 20, world=world, cwd=folder)
    run("sample.py", "-n", 8, "--steps", 2, world=world, cwd=folder)
    printed = run("fid.py", "samples", "--num", 8, "--ref-num", 8, "--json", cwd=folder)
    return folder, world, json.loads(printed.splitlines()[-1])


def test_the_chain_ends_with_images_and_a_fid(chain):
    folder, _, distances = chain
    names = sorted(path.name for path in (folder / "samples").glob("*.png"))
    assert names == [f"{i:06d}.png" for i in range(8)]
    assert Image.open(folder / "samples/000000.png").size == (32, 32)
    assert (folder / "samples.png").exists() and list((folder / "runs/decoder").glob("preview-*.png"))
    assert math.isfinite(distances["fid"]) and distances["fid"] > 0
    for stage in STAGES.values():
        records = read_log(folder / "runs" / stage)
        assert [record["step"] for record in records] == [2, 4]
        assert all(math.isfinite(record["loss"]) for record in records)
        assert records[0]["time"] <= records[1]["time"]
        assert not list((folder / "runs" / stage).glob("*.tmp"))


def test_ema_is_its_closed_form(chain):
    folder = chain[0]
    for stage in STAGES.values():
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
    for script, stage in STAGES.items():
        source = f"runs/{stage}/0000002.pt"
        run(script, *TRAIN, "--resume", source, "--out", f"again/{stage}", world=world, cwd=folder)
        whole, resumed = (read(folder / runs / stage / "last.pt") for runs in ("runs", "again"))
        for part in ("model", "ema", "optimizer", "step", "config", "precision"):
            assert equal(whole[part], resumed[part]), (stage, part)


def test_two_processes_train_like_one(chain, tmp_path):
    """Gradients are averaged over ranks: without random numbers one and two processes take the same step."""
    folder, world, _ = chain
    (tmp_path / "data").symlink_to(folder / "data")
    flags = [*TRAIN, "--noise-tau", 0, "--lpips-weight", 0, "--precision", "fp32", "--lr", 1e-5]
    run("rae_decoder_train.py", *flags, "--out", "runs/other", world=3 - world, cwd=tmp_path)
    run("rae_decoder_train.py", *flags, "--out", "runs/same", world=world, cwd=tmp_path)
    other, same = (read_log(tmp_path / "runs" / out) for out in ("other", "same"))
    for a, b in zip(other, same, strict=True):
        assert a["l1"] == pytest.approx(b["l1"], rel=1e-5)


def test_previews_are_samples_of_the_last_checkpoint(chain):
    folder, world, _ = chain
    if world > 1:
        pytest.skip("one process is enough to see that sample.py is run")
    flags = [*TRAIN, "--save-every", 100, "--keep-every", 100, "--preview-every", 4]
    flags += ["--resume", "runs/flow/0000003.pt", "--out", "runs/preview"]
    run("flow_train.py", *flags, cwd=folder)
    sheet = np.asarray(Image.open(folder / "runs/preview/preview-0000004.png"))
    assert sheet.shape == (2 * 32, 8 * 32, 3)  # 16 images, each column of one class

    run("sample.py", "-n", 4, "--out", "samples-of-4", cwd=folder)
    for i in range(4):
        preview, image = (
            np.asarray(Image.open(folder / images / f"{i:06d}.png")).astype(int)
            for images in ("runs/preview/preview-0000004", "samples-of-4")
        )
        assert abs(preview - image).max() <= 1 and image.std() > 0
