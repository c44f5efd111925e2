"""The commands as users run them: the chain of four, kills, signals, full disks, ranks that disagree."""

import json
import math
import multiprocessing
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from helpers import end_ranks, equal, kill_ranks, message, narrow, read, run_ranks, start_ranks, stop_at
from PIL import Image

import fid
import flow_train
import rae_decoder_train
import rae_encoder
import sample

pytestmark = pytest.mark.usefixtures("one_thread")
STAGES = {  # both at a few thousand weights; two steps an epoch, so that the GAN takes part from step 16 on
    rae_decoder_train: "--lpips-weight 0 --gan-weight 0.75 --disc-weights random --preview-every 0",
    flow_train: "--decoder= --model DiT-DH-S --width 16 --depth 1 --heads 2 --head-width 32 --head-depth 1 "
    "--head-heads 2",
}
COMMON = "--batch-size 8 --workers 0 --log-every 1 --save-every 1 --precision fp32"
TRAIN = {script: f"{COMMON} {flags}".split() for script, flags in STAGES.items()}
each_stage = pytest.mark.parametrize("script", STAGES, ids=lambda script: script.__name__)


def words(text):
    return text.split()


def start(script, out, *flags, world=1, before=()):
    """The ranks of a small training into runs/OUT."""
    flags = [*TRAIN[script], "--out", f"runs/{out}", *map(str, flags)]
    return start_ranks(script.main, flags, world=world, before=(narrow, *before))


def logged(out):
    """The steps in the log of runs/OUT."""
    log = Path(f"runs/{out}/metrics.jsonl")
    return [json.loads(line)["step"] for line in log.read_text().splitlines()] if log.exists() else []


def wait_for_steps(ranks, out, count):
    before = len(logged(out))
    while len(logged(out)) < before + count and all(rank.is_alive() for rank in ranks):
        time.sleep(0.01)


def same_training(a, b):
    """All that two run folders' checkpoints hold is equal, but for the flags."""
    a, b = (read(f"runs/{out}/last.pt") for out in (a, b))
    del a["args"], b["args"]
    return {"model", "ema", "optimizer", "step"} < a.keys() and equal(a, b)


# The chain


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """(a folder in which the demo's commands have run, the first three with two ranks; fid.py's record)."""
    folder = tmp_path_factory.mktemp("chain")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        rae_encoder.draw_demo("data/demo", num=22)
        short = f"{COMMON} --steps 4 --log-every 2 --save-every 2 --preview-every 100".split()
        run_ranks(rae_decoder_train.main, short, world=2)
        run_ranks(flow_train.main, short, world=2)
        run_ranks(sample.main, words("-n 8 --steps 2"), world=2)
        run_ranks(fid.main, words("--num 8 --ref-num 8 --metrics is,prec,rec --workers 0 --json"))
        return folder, json.loads(Path("stdout-0").read_text())


@pytest.mark.slow
def test_the_chain_ends_with_images_and_their_numbers(chain):
    folder, results = chain
    names = sorted(path.name for path in (folder / "samples").glob("*.png"))
    assert names == [f"{i:06d}.png" for i in range(8)]
    assert Image.open(folder / "samples/000000.png").size == (32, 32)
    assert (folder / "samples.png").exists()
    assert math.isfinite(results["is"]) and 0 <= results["prec"] <= 1
    assert os.path.samefile(results["ref"], folder / "data/demo")
    for stage in ("decoder", "flow"):
        log = (folder / "runs" / stage / "metrics.jsonl").read_text()
        records = [record for record in map(json.loads, log.splitlines()) if "loss" in record]
        assert [record["step"] for record in records] == [2, 4]
        assert all(math.isfinite(record["loss"]) for record in records)
        assert records[0]["time"] <= records[1]["time"]
        files = {path.name for path in (folder / "runs" / stage).glob("*.p*")}
        assert files == {"last.pt", "preview-0000004.png"}


@pytest.mark.slow
def test_stage_2_ends_with_a_preview_of_its_last_checkpoint(chain, monkeypatch):
    """Sixteen images in four classes, as sample.py draws them: the EMA, guided as the demo is."""
    folder, _ = chain
    monkeypatch.chdir(folder)
    sheet = np.asarray(Image.open("runs/flow/preview-0000004.png"))
    assert sheet.shape == (2 * 32, 8 * 32, 3)  # each column of one class
    sample.main(words("-n 4 --out samples-of-4"))
    for i in range(4):
        names = (f"{images}/{i:06d}.png" for images in ("runs/flow/preview-0000004", "samples-of-4"))
        preview, image = (np.asarray(Image.open(name)).astype(int) for name in names)
        assert abs(preview - image).max() <= 1 and image.std() > 0


FIRST = "--lpips-weight 0 --steps 2 --batch-size 8 --workers 0 --precision fp32"
PASTED = {
    "flow_train.py": (flow_train, "--steps 2 --batch-size 8 --preview-every 0 --model DiT-mini --depth 1"),
    "sample.py": (sample, "-n 6 --steps 2 --batch-size 6"),
    "fid.py": (fid, "--inception-weights random --metrics prec,rec --ref-num 8 --json"),
}


@pytest.mark.slow
def test_every_last_line_is_the_next_command(folder, monkeypatch, capsys):
    """SPEC 11: four commands and one flag, each pasted as it was printed, in a folder with a blank."""
    monkeypatch.setitem(rae_decoder_train.DECODERS, "ViT-S", (16, 2, 2, 24))
    os.rename("data/demo", "the dog's photos")
    decoy = {"preset": "demo", "data": "data/demo"}
    os.makedirs("runs/decoder")
    helpers.write_decoder("runs/decoder/last.pt", decoy)  # of another training, where stage 1 puts its own
    flags = f"--encoder test_vit --encoder-weights random --image-size 48 --layers 1,2 --no-flip {FIRST}"
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    rae_decoder_train.main(["--data", "the dog's photos", "--out", "my runs/d", *flags.split()])

    for name, (script, short) in PASTED.items():
        last_line = capsys.readouterr().err.splitlines()[-1]
        command = shlex.split(last_line.partition("next: ")[2])
        assert command[:2] == ["python", name], last_line
        script.main([*command[2:], *short.split(), "--workers", "0"])
        assert handlers == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    results = json.loads(capsys.readouterr().out)
    assert os.path.samefile(results["ref"], "the dog's photos") and results["samples"] == "my runs/samples"
    assert results["num"] == 6 and 0 <= results["prec"] <= 1

    decoder, flow = (read(f"my runs/{run}/last.pt") for run in ("d", "flow"))
    for key in ("encoder", "encoder_hash", "layers", "latent_shape", "image_size"):
        assert flow["config"][key] == decoder["config"][key], key
    assert flow["config"]["layers"] == [1, 2] and flow["config"]["flip"] is False
    assert flow["config"]["decoder"]["path"] == "my runs/d/last.pt"
    settings = json.loads(Path("my runs/samples/settings.json").read_text())
    assert settings["crop"] == 48 and Image.open("my runs/samples/000005.png").size == (48, 48)


# Kills and signals


@pytest.mark.slow
@pytest.mark.parametrize(("script", "world"), [(rae_decoder_train, 2), (flow_train, 1)])
def test_killed_runs_end_with_the_same_bits(folder, script, world):
    """SIGKILL with half a checkpoint written, before its rename, and RAE_KILLS times at random.

    Stage 1 has two ranks and a GAN from step 16 on; the killed run has other workers each time. Stage 2 ends
    with a cache of latents.
    """
    kills = int(os.environ.get("RAE_KILLS", 1))
    rng = np.random.default_rng(0)
    # So many that a fast machine is still at work when the kill comes
    steps = ["--steps", 100 + 10 * (kills - 1)]
    plain = []
    cached = []
    if script is flow_train:
        plain = ["--no-cache-latents"]
        cached = ["--cache-latents"]
    end_ranks(start(script, "whole", *steps, *plain, world=world))
    assert "disc" in read("runs/whole/last.pt") or script is flow_train

    moments = [3, 4] + [None] * kills  # each save has a flush and a rename
    for k, moment in enumerate(moments):
        before = (partial(stop_at, moment),) if moment else ()
        other = cached if k == len(moments) - 1 else plain
        ranks = start(script, "killed", *steps, *other, "--workers", k % 3, world=world, before=before)
        if moment:
            while not Path("stopped").exists() and all(rank.is_alive() for rank in ranks):
                time.sleep(0.01)
            Path("stopped").unlink()
            assert Path(f"runs/killed/last.pt.{ranks[0].pid}.tmp").exists()
            assert read("runs/killed/last.pt")["step"] == logged("killed")[-1] - 1
        else:
            wait_for_steps(ranks, "killed", 4)
            time.sleep(rng.uniform(0, 0.2))
        kill_ranks(ranks)
    assert 4 < max(logged("killed")) < steps[1]
    end_ranks(start(script, "killed", *steps, *plain, world=world))
    assert same_training("whole", "killed")


STOPPED = "stopped; the same command goes on (without --resume)"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "world", "number"),
    [
        (flow_train, 1, signal.SIGINT),
        (rae_decoder_train, 2, signal.SIGTERM),
        (rae_decoder_train, 1, signal.SIGUSR1),
        (flow_train, 2, signal.SIGHUP),
    ],
)
def test_a_signal_ends_a_run_with_a_checkpoint(folder, script, world, number):
    ranks = start(script, "run", "--steps", 10**5, "--save-every", 10**5, "--workers", 1, world=world)
    wait_for_steps(ranks, "run", 3)
    os.kill(ranks[-1].pid, number)  # one rank alone
    line = end_ranks(ranks)[-1]
    step = logged("run")[-1]
    assert line == f"runs/run/last.pt: step {step} of 100000; {STOPPED}"
    assert read("runs/run/last.pt")["step"] == step


@pytest.mark.slow
def test_ctrl_c_under_torchrun(folder):
    """torchrun hands it on to all ranks, waits for them, and ends with a code of its own."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    flags = [*TRAIN[flow_train], "--steps", "100000", "--out", "runs/run"]
    command = [*launcher, flow_train.__file__, *flags]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)
    while len(logged("run")) < 3 and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    printed = process.communicate()[1]
    step = logged("run")[-1]
    assert f"last.pt: step {step} of 100000; {STOPPED}" in printed
    assert read("runs/run/last.pt")["step"] == step


def interrupt_listing():
    """Ctrl-C comes while the images are listed."""
    walk = os.walk

    def interrupted(*args, **flags):
        os.kill(os.getpid(), signal.SIGINT)
        return walk(*args, **flags)

    os.walk = interrupted


@pytest.mark.slow
def test_ctrl_c_before_the_first_step(folder):
    """One line and 130, also in the middle of loading."""
    lines = run_ranks(rae_decoder_train.main, [], before=(interrupt_listing,), code=130)
    assert lines == ["interrupted; the same command goes on with what is saved"]


@pytest.mark.slow
def test_a_folder_has_one_run_and_the_lock_dies_with_it(folder):
    first = start(flow_train, "run", "--steps", 10**5, "--workers", 2)
    wait_for_steps(first, "run", 1)
    (line,) = end_ranks(start(flow_train, "run"), 1)
    assert line.startswith("--out runs/run: another run is in it") and first[0].is_alive()
    first[0].kill()
    first[0].join()  # its workers still live
    end_ranks(start(flow_train, "run", "--steps", logged("run")[-1] + 1))


# Ranks and workers


@pytest.mark.slow
def test_two_ranks_train_alike_from_cached_latents(folder):
    Path("data/demo/circle/0001.png").write_text("broken")
    for out in ("plain", "cached"):
        flags = ["--steps", 6, "--skip-broken", "--no-cache-latents" if out == "plain" else "--cache-latents"]
        line = end_ranks(start(flow_train, out, *flags, world=2))[-1]
        done = f"runs/{out}/last.pt: step 6 of 6; 1 broken images were replaced by others"
        assert line == f"{done}; next: python sample.py --flow runs/{out}/last.pt --out runs/samples"
    assert same_training("plain", "cached")


@pytest.mark.slow
def test_spawned_workers_load_the_same_bits(folder):
    """As on systems that can't fork: what a worker needs is pickled and not inherited."""
    flags = ["--steps", 3, "--no-cache-latents"]
    end_ranks(start(flow_train, "forked", *flags, "--workers", 0))
    before = partial(multiprocessing.set_start_method, "spawn", force=True)
    end_ranks(start(flow_train, "spawned", *flags, "--workers", 1, before=(before,)))
    assert same_training("forked", "spawned")


def read_late():
    """Rank 1's disk still shows the checkpoint of before."""
    if os.environ["RANK"] == "1":
        read_start = rae_encoder.read_start
        rae_encoder.read_start = lambda *args: read_start(*args) | read("before.pt")


@pytest.mark.slow
@each_stage
def test_ranks_that_resume_different_steps_end_in_one_line(folder, script):
    flags = ["--disc-start", 9, "--gan-start", 9] if script is rae_decoder_train else []
    end_ranks(start(script, "run", *flags, "--steps", 2, world=2))
    shutil.copy("runs/run/last.pt", "before.pt")
    end_ranks(start(script, "run", *flags, "--steps", 4, world=2))
    whole = Path("runs/run/last.pt").read_bytes()
    line = end_ranks(start(script, "run", *flags, "--steps", 6, world=2, before=(read_late,)), 1)[-1]
    assert line == "rank 0 has step 4, rank 1 has 2: they read different files; start again"
    assert Path("runs/run/last.pt").read_bytes() == whole


# Steps that are not finite


def poison(monkeypatch, script, bad):
    """The images or latents of a script hold NaN at the steps of `bad`, which count from 1."""
    name = "load_latents" if script is flow_train else "load_images"
    load = getattr(script, name)

    def poisoned(*args):
        for step, (x, y) in enumerate(load(*args), 1):
            yield x * math.nan if step in bad else x, y

    monkeypatch.setattr(script, name, poisoned)


@pytest.mark.slow
@each_stage
def test_ten_bad_steps_in_a_row_end_the_run_and_nine_do_not(folder, monkeypatch, capsys, script):
    """Nothing is updated at a bad step: a saved state is finite, and a window of bad steps has no loss."""
    monkeypatch.setitem(rae_decoder_train.DECODERS, "ViT-mini", (16, 2, 2, 24))
    flags = [*TRAIN[script], "--steps", "14"]
    if script is rae_decoder_train:
        flags += ["--gan-weight", "0"]
    with monkeypatch.context() as patch:
        poison(patch, script, bad=(2, *range(4, 13)))
        script.main([*flags, "--out", "runs/nine", "--keep-every", "1"])
    first, second, third = (read(f"runs/nine/{step:07d}.pt") for step in (1, 2, 3))
    for key in ("model", "ema"):
        assert equal(first[key], second[key]) and not equal(second[key], third[key])
    assert equal(first["optimizer"]["state"], second["optimizer"]["state"])
    assert read("runs/nine/last.pt")["step"] == 14
    log = Path("runs/nine/metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, log) if "lr" in record]
    assert [record["step"] for record in records if "loss" not in record] == [2, *range(4, 13)]
    assert all(math.isfinite(record["loss"]) for record in records if "loss" in record)
    assert records[-1]["skipped"] == 10
    name = "network" if script is flow_train else "decoder"
    assert f"step 2: the {name}'s update was skipped, not finite: " in capsys.readouterr().err

    # The last good step is kept.
    with monkeypatch.context() as patch:
        poison(patch, script, bad=range(4, 15))
        line = message(script.main, [*flags, "--out", "runs/ten", "--save-every", "100"])
    assert line.startswith(f"step 13: 10 updates of the {name} in a row not finite; try a lower --lr")
    last = read("runs/ten/last.pt")
    assert last["step"] == 13
    assert {int(moments["step"]) for moments in last["optimizer"]["state"].values()} == {3}
    assert all(torch.isfinite(value).all() for value in last["ema"].values())


# Folders and flags that don't fit


@each_stage
def test_a_folder_of_other_images_is_refused_before_anything_is_fetched(folder, monkeypatch, script):
    """One's own images in a run folder of the demo, and the demo's in one of one's own."""

    def fetch(*args, **options):
        raise AssertionError("weights are fetched")

    monkeypatch.setattr(rae_encoder, "load_vit", fetch)
    short = ["--batch-size", "8", "--out", "runs"]
    if script is flow_train:
        short.append("--decoder=")
    os.makedirs("runs")
    Path("runs/metrics.jsonl").touch()
    shutil.copytree("data/demo", "cats")
    image = next(Path("cats").rglob("*.png"))
    image.rename(image.with_name("cat.png"))
    for before, now, flags in (("data/demo", "cats", ["--data", "cats"]), ("cats", "data/demo", [])):
        images = rae_encoder.ImageData(before, 32).hash
        torch.save({"format": script.FORMAT, "images": images, "args": {"data": before}}, "runs/last.pt")
        line = message(script.main, [*flags, *short])
        assert line == f"runs/last.pt is of other images ({before}) than --data {now}: name another --out"


@pytest.mark.parametrize(
    ("script", "flags", "line"),
    [
        (flow_train, "--batch-size 23", "22 images, fewer than --batch-size 23"),
        (flow_train, "--batch-size 8 --out file/x", "[Errno 20] Not a directory: 'file/x'"),
        (flow_train, "--batch-size 8 --out data", "--out data: has files that are not this script's"),
        (flow_train, "--batch-size 8 --decoder flow.pt", "--decoder flow.pt: is a flow of flow_train.py"),
        (
            rae_decoder_train,
            "--batch-size 8 --resume flow.pt",
            "--resume flow.pt: not a rae-decoder/1 checkpoint",
        ),
        (fid, "none --ref data", "none: "),
    ],
)
def test_what_cannot_be_meant_ends_in_one_line(folder, script, flags, line):
    helpers.write_flow("flow.pt")
    Path("file").touch()
    assert line in message(rae_encoder.run, partial(script.main, flags.split()))


@pytest.mark.slow
def test_a_mistake_is_one_line_of_the_command(tmp_path):
    command = [sys.executable, flow_train.__file__, "--data", "none"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr == "--data none: No such file or directory; expected a folder of images\n"


@each_stage
def test_the_shortest_run_is_one_step(folder, monkeypatch, script):
    monkeypatch.setitem(rae_decoder_train.DECODERS, "ViT-mini", (16, 2, 2, 24))
    no_gan = ["--gan-weight", "0"] if script is rae_decoder_train else []
    script.main([*TRAIN[script], *no_gan, "--epochs", "0.01", "--out", "runs/run"])
    assert read("runs/run/last.pt")["step"] == 1
