"""Nothing is lost: kills at any moment, signals, full disks, files and flags that are hostile or wrong."""

import contextlib
import importlib
import itertools
import json
import math
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import equal, message, read
from safetensors.torch import save_file
from test_sample import write_decoder, write_flow

import fid
import flow_train
import rae_decoder_train
import rae_encoder
import sample

STAGES = {  # both at a few thousand weights; two steps an epoch, so that the GAN takes part from step 16 on
    "rae_decoder_train": "--lpips-weight 0 --gan-weight 0.75 --disc-weights random --preview-every 0",
    "flow_train": "--decoder= --model DiT-DH-S --width 16 --depth 1 --heads 2 --head-width 32 --head-depth 1 "
    "--head-heads 2",
}
COMMON = "--batch-size 8 --workers 0 --log-every 1 --save-every 1 --precision fp32"
TRAIN = {script: f"{COMMON} {flags}" for script, flags in STAGES.items()}
STARTED = []  # process groups: the workers of a killed run may stay, each with its memory
# Forks of an interpreter that has imported everything: a run starts at once.
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # before 3.13 it does not get sys.path otherwise
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([*STAGES, "test_faults", "torch.utils.tensorboard"])


def narrow():
    """A decoder and a discriminator small enough for many runs."""
    rae_decoder_train.DECODERS["ViT-mini"] = (16, 2, 2, 24)
    load_vit = rae_encoder.load_vit
    small = dict(patch_size=32, embed_dim=12, num_heads=2, num_classes=0)

    def load_small(name, weights, *flag):
        if "dino" not in name:
            return load_vit(name, weights, *flag)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return timm.create_model(name, pretrained=False, **small).eval()

    rae_encoder.load_vit = load_small


def stop_at(moment):
    """Stops this process at a checkpoint's flush, with half of the file written, or at its rename.

    Both are counted from 1. A process that is stopped and then killed dies right there, and its peers, which
    wait for it, can't see it die first.
    """
    count = itertools.count(1)
    fsync = os.fsync
    replace = os.replace

    def stop():
        Path("stopped").touch()
        os.kill(os.getpid(), signal.SIGSTOP)

    def stopping_fsync(file):
        if next(count) == moment:
            os.ftruncate(file, os.fstat(file).st_size // 2)
            stop()
        fsync(file)

    def stopping_replace(*paths):
        if next(count) == moment:
            stop()
        replace(*paths)

    os.fsync = stopping_fsync
    os.replace = stopping_replace


def fill_disk():
    """No file that is to be renamed can be written any more."""

    def open_full(path, *mode):
        if path.endswith(".tmp"):
            os.symlink("/dev/full", path)
        return open(path, *mode)

    rae_encoder.open = open_full


def one_rank(script, flags, rank, world, port, before):
    os.setsid()  # the group of the rank and its workers
    os.environ |= dict(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    Path(f"stderr-{rank}").unlink(missing_ok=True)
    sys.stderr = open(f"stderr-{rank}", "w", buffering=1)  # noqa: SIM115
    torch.set_num_threads(1)
    narrow()
    if before:
        function, *values = before
        function(*values)
    importlib.import_module(script).main(flags)


def start(script, world, out, *flags, before=None):
    """The processes of a run into runs/OUT, one for each rank. before: a function to call, and its values."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = [*TRAIN[script].split(), "--out", f"runs/{out}", *map(str, flags)]
    ranks = []
    for rank in range(world):
        ranks.append(FORKS.Process(target=one_rank, args=(script, flags, rank, world, port, before)))
        ranks[-1].start()
        STARTED.append(ranks[-1].pid)
    return ranks


def end(ranks, code=0):
    """Waits for a run; returns the lines that its rank 0 wrote, without progress bars."""
    for rank in ranks:
        rank.join()
    printed = Path("stderr-0").read_text()
    assert [rank.exitcode for rank in ranks] == [code] * len(ranks), printed
    assert "Traceback" not in printed
    return [line for line in printed.splitlines() if line.strip() and "%|" not in line]


def kill(ranks):
    """The whole run at once: stopped first, so that no rank sees a dead peer and leaves by itself."""
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for rank in ranks:
            os.kill(rank.pid, number)
    end(ranks, -signal.SIGKILL)


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


@pytest.fixture
def folder(folder):
    """As elsewhere; what a test has started is gone at its end."""
    yield folder
    while STARTED:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(STARTED.pop(), signal.SIGKILL)


# Kills and signals


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("script", STAGES)
def test_killed_runs_end_with_the_same_bits(folder, script, world):
    """SIGKILL with half a checkpoint written, before its rename, and RAE_KILLS times at random.

    The killed run has other workers each time, then a cache.
    """
    kills = int(os.environ.get("RAE_KILLS", 1))
    rng = np.random.default_rng(0)
    steps = ["--steps", 20 + 10 * kills]
    plain = []
    cached = []
    if script == "flow_train":
        plain = ["--no-cache-latents"]
        cached = ["--cache-latents"]
    end(start(script, world, "whole", *steps, *plain))
    assert "disc" in read("runs/whole/last.pt") or script == "flow_train"

    moments = [3, 4] + [None] * kills  # each save has a flush and a rename
    for k, moment in enumerate(moments):
        before = (stop_at, moment) if moment else None
        other = cached if k == len(moments) - 1 else plain
        ranks = start(script, world, "killed", *steps, *other, "--workers", k % 3, before=before)
        if moment:
            while not Path("stopped").exists() and all(rank.is_alive() for rank in ranks):
                time.sleep(0.01)
            Path("stopped").unlink()
            files = {path.name for path in Path("runs/killed").glob("*.pt*")}
            assert files == {"last.pt", f"last.pt.{ranks[0].pid}.tmp"}
        else:
            wait_for_steps(ranks, "killed", 4)
            time.sleep(rng.uniform(0, 0.2))
        kill(ranks)
    assert 4 < max(logged("killed")) < steps[1]
    end(start(script, world, "killed", *steps, *plain))
    assert same_training("whole", "killed")
    assert not list(Path("runs/killed").glob("*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "world", "number"),
    [("flow_train", 1, signal.SIGINT), ("rae_decoder_train", 2, signal.SIGTERM)],
)
def test_a_signal_ends_a_run_with_a_checkpoint(folder, script, world, number):
    ranks = start(script, world, "run", "--steps", 10**5, "--save-every", 10**5, "--workers", 1)
    wait_for_steps(ranks, "run", 3)
    os.killpg(ranks[-1].pid, number)  # one rank alone, with its worker
    line = end(ranks)[-1]
    step = logged("run")[-1]
    stopped = "stopped, the same command goes on from here (without --resume)"
    assert line == f"runs/run/last.pt: step {step} of 100000; {stopped}"
    assert read("runs/run/last.pt")["step"] == step


@pytest.mark.slow
def test_ctrl_c_under_torchrun(folder):
    """torchrun hands it on to all ranks, waits for them, and ends with a code of its own."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    flags = f"{TRAIN['flow_train']} --steps 100000 --out runs/run".split()
    command = [*launcher, flow_train.__file__, *flags]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)
    while len(logged("run")) < 3 and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    printed = process.communicate()[1]
    step = logged("run")[-1]
    assert (
        f"last.pt: step {step} of 100000; stopped, the same command goes on from here (without --resume)"
        in printed
    )
    assert read("runs/run/last.pt")["step"] == step


@pytest.mark.slow
@pytest.mark.parametrize("module", [rae_encoder, rae_decoder_train, flow_train])
def test_ctrl_c_before_the_first_step(folder, module):
    """One line and 130, also in the middle of loading: here while the images are listed."""
    os.mkdir("slow")
    Path("slow/sitecustomize.py").write_text(
        "import os, signal\n"
        "walk = os.walk\n"
        "os.walk = lambda *args, **flags: os.kill(os.getpid(), signal.SIGINT) or walk(*args, **flags)\n"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(["slow", os.environ["PYTHONPATH"]])}
    result = subprocess.run([sys.executable, module.__file__], capture_output=True, text=True, env=env)
    assert result.returncode == 130
    assert result.stderr == "\ninterrupted; nothing new was written, the same command starts again\n"


@pytest.mark.slow
@pytest.mark.parametrize("script", STAGES)
def test_a_folder_has_one_run_and_the_lock_dies_with_it(folder, script):
    first = start(script, 1, "run", "--steps", 10**5, "--workers", 2)
    wait_for_steps(first, "run", 1)
    (line,) = end(start(script, 1, "run"), 1)
    assert line.startswith("--out runs/run: another run is in it") and first[0].is_alive()
    first[0].kill()
    first[0].join()  # its workers still live
    end(start(script, 1, "run", "--steps", logged("run")[-1] + 1))


# Ranks and workers


@pytest.mark.slow
def test_two_ranks_train_alike_from_cached_latents(folder):
    """Each rank encodes its share of the images, and has them all."""
    Path("data/demo/circle/0001.png").write_text("broken")
    for out in ("plain", "cached"):
        flags = ["--steps", 6, "--skip-broken", "--no-cache-latents" if out == "plain" else "--cache-latents"]
        line = end(start("flow_train", 2, out, *flags))[-1]
        done = f"runs/{out}/last.pt: step 6 of 6; 1 broken images were replaced by others"
        assert line == f"{done}; next: python sample.py --flow runs/{out}/last.pt"
    assert same_training("plain", "cached")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_of_any_kind_load_the_same_bits(folder, method):
    """As on systems that can't fork, or where forking is no longer the default."""
    flags = ["--steps", 3, "--no-cache-latents"]
    end(start("flow_train", 1, "forked", *flags, "--workers", 0))
    before = (multiprocessing.set_start_method, method, True)
    end(start("flow_train", 1, method, *flags, "--workers", 2, before=before))
    assert same_training("forked", method)


# Checkpoints of other versions, of other lengths


@pytest.mark.slow
@pytest.mark.parametrize("script", STAGES)
def test_checkpoints_of_older_versions_go_on(folder, script):
    """They name the encoder's weights instead of hashing them, have a patch size, and precision as a flag.

    Their optimizer counts the fixed parameters, too.
    """
    end(start(script, 1, "whole", "--steps", 4))
    end(start(script, 1, "run", "--steps", 2))
    old = read("runs/run/last.pt")
    buffers = {"decoder_pos_embed"}
    buffers |= {name for name in old["model"] if name.endswith(("freqs_cos", "freqs_sin"))}
    numbers = old["optimizer"]["param_groups"][0]["params"]
    assert numbers == list(range(len(old["model"].keys() - buffers)))
    del old["config"]["encoder_hash"], old["precision"]
    old["config"].get("sizes", {})["patch"] = 1
    old["args"]["precision"] = "fp32"
    old["config"]["encoder_weights"] = "random"
    torch.save(old, "runs/run/last.pt")
    end(start(script, 1, "run", "--steps", 4))
    assert same_training("whole", "run")


# Steps that are not finite


def poison(monkeypatch, module, function, bad):
    """The batches that module.function yields hold NaN at the steps of `bad`, which count from 1."""
    load = getattr(module, function)

    def poisoned(*args):
        for step, (x, y) in enumerate(load(*args), 1):
            yield x * math.nan if step in bad else x, y

    monkeypatch.setattr(module, function, poisoned)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "function"), [(rae_decoder_train, "load_images"), (flow_train, "load_latents")]
)
def test_ten_bad_steps_in_a_row_end_the_run_and_nine_do_not(folder, monkeypatch, capsys, module, function):
    """Nothing is updated at a bad step: a saved state is finite, and a window of bad steps has no loss."""
    monkeypatch.setitem(rae_decoder_train.DECODERS, "ViT-mini", (16, 2, 2, 24))
    flags = f"{TRAIN[module.__name__]} --steps 14".split()
    if module is rae_decoder_train:
        flags += ["--gan-weight", "0"]
    with monkeypatch.context() as patch:
        poison(patch, module, function, bad=(2, *range(4, 13)))
        module.main([*flags, "--out", "runs/nine", "--keep-every", "1"])
    first, second, third = (read(f"runs/nine/{step:07d}.pt") for step in (1, 2, 3))
    for key in ("model", "ema"):
        assert equal(first[key], second[key]) and not equal(second[key], third[key])
    assert equal(first["optimizer"]["state"], second["optimizer"]["state"])
    assert read("runs/nine/last.pt")["step"] == 14
    records = [json.loads(line) for line in Path("runs/nine/metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "loss" not in record] == [2, *range(4, 13)]
    assert all(math.isfinite(record["loss"]) for record in records if "loss" in record)
    assert records[-1]["skipped"] == 10
    assert "step 2 skipped, not finite: " in capsys.readouterr().err

    with monkeypatch.context() as patch:
        poison(patch, module, function, bad=range(4, 15))
        line = message(module.main, [*flags, "--out", "runs/ten", "--save-every", "3"])
    assert line.startswith("step 13: 10 steps in a row not finite; try a lower --lr")
    assert line.endswith("; the last checkpoint is runs/ten/last.pt") and "fp32" not in line
    last = read("runs/ten/last.pt")
    assert last["step"] == 12
    assert all(torch.isfinite(value).all() for value in last["ema"].values())

    with monkeypatch.context() as patch:
        poison(patch, module, function, bad=range(15))
        flags = [*flags, "--precision", "bf16", "--save-every", "100", "--out", "runs/none"]
        line = message(module.main, flags)
    assert "step 10: " in line and "--precision fp32" in line and "last.pt" not in line
    assert not Path("runs/none/last.pt").exists()


# Disks and files


@pytest.mark.slow
@pytest.mark.parametrize("script", STAGES)
def test_a_full_disk_leaves_the_last_checkpoint(folder, script):
    end(start(script, 1, "run", "--steps", 2))
    last = Path("runs/run/last.pt")
    whole = last.read_bytes()
    end(start(script, 1, "run", "--steps", 4, before=(fill_disk,)), 1)
    full = "can't be written ([Errno 28] No space left on device)"
    assert f"runs/run/last.pt: {full}" in Path("stderr-0").read_text()
    assert not list(Path("runs/run").glob("*.tmp"))

    log = Path("runs/run/metrics.jsonl")
    log.unlink()
    log.symlink_to("/dev/full")
    end(start(script, 1, "run", "--steps", 4), 1)
    assert f"{log}: {full}" in Path("stderr-0").read_text()
    assert last.read_bytes() == whole
    log.unlink()
    end(start(script, 1, "run", "--steps", 4))


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("hacked",)


SAMPLE = "--flow flow.pt --decoder decoder.pt"
FID = "data/demo --ref data/demo --workers 0"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "flags"),
    [
        (rae_encoder, "--encoder-weights FILE"),
        *(
            (rae_decoder_train, f"--{f} FILE")
            for f in ("encoder-weights", "disc-weights", "lpips-weight 1 --lpips-weights", "init", "resume")
        ),
        *((flow_train, f"--{f} FILE") for f in ("encoder-weights", "decoder", "stats", "init", "resume")),
        *((sample, f"--{f} FILE") for f in ("flow", "decoder", "stats", "cfg 2 --autoguide")),
        (sample, "--reconstruct data/demo --encoder-weights FILE"),
        (fid, "--inception-weights FILE"),
        (fid, "--features test_vit --features-weights FILE"),
    ],
)
def test_no_file_of_weights_can_run_code(folder, module, flags):
    write_flow("flow.pt"), write_decoder("decoder.pt")
    torch.save({"format": "rae-flow/1", "model": Malicious()}, "new.pt")
    Path("old.pt").write_bytes(pickle.dumps(Malicious()))
    Path("false.safetensors").write_bytes(pickle.dumps(Malicious()))
    common = {sample: SAMPLE, fid: FID}.get(module, TRAIN.get(module.__name__, ""))
    for file in ("new.pt", "old.pt", "false.safetensors"):
        line = message(module.main, f"{common} {flags.replace('FILE', file)}".split())
        assert file in line and not Path("hacked").exists()
    torch.load("new.pt", weights_only=False)
    assert Path("hacked").exists()  # it would have


@pytest.mark.slow
def test_safetensors_wherever_weights_are_read(folder):
    flow, decoder = read(write_flow("flow.pt")), read(write_decoder("decoder.pt"))
    vit = timm.create_model("test_vit", pretrained=False, num_classes=0)
    dino = timm.create_model("vit_small_patch8_224.dino", pretrained=False, num_classes=0)
    files = dict(flow=flow["ema"], decoder=decoder["ema"], stats={key: flow[key] for key in ("mean", "var")})
    files |= dict(vit=vit.state_dict(), dino=dino.state_dict(), inception=fid.Inception().state_dict())
    files["inception"]["fc.bias"] = torch.arange(1008.0)
    for name, state in files.items():
        save_file({key: value.contiguous() for key, value in state.items()}, f"{name}.safetensors")

    names = "--flow flow.safetensors --decoder decoder.safetensors --stats stats.safetensors"
    sample.main(f"{names} --cfg 2 --autoguide flow.safetensors --num 1 --steps 1".split())
    assert Path("samples/000000.png").exists()
    flags = (
        f"{TRAIN['flow_train']} --width 32 --head-width 64 --encoder-size 32 --steps 1 --lr 0 --final-lr 0"
    )
    files_of = "--init flow.safetensors --stats stats.safetensors --encoder-weights vit.safetensors"
    flow_train.main(f"{flags} {files_of} --decoder decoder.safetensors".split())
    last = read("runs/flow/last.pt")
    assert equal(last["mean"], flow["mean"])
    assert equal(last["model"]["final_layer.linear.weight"], flow["ema"]["final_layer.linear.weight"])
    flags = f"{COMMON} --lpips-weight 0 --preview-every 0 --encoder-size 32 --steps 1 --lr 0 --final-lr 0"
    rae_decoder_train.main(f"{flags} --init decoder.safetensors".split())
    assert equal(read("runs/decoder/last.pt")["model"], decoder["ema"])
    disc = rae_decoder_train.Discriminator("dino.safetensors")
    assert equal(disc.vit.state_dict(), dino.state_dict())
    inception, *_ = fid.load_network(None, "adm", "inception.safetensors")
    assert equal(inception.fc.bias, torch.arange(1008.0))


# Flags


@pytest.mark.parametrize(
    ("module", "flags", "line"),
    [
        # Bounds
        (rae_encoder, "--workers -1", "--workers: expected a whole number from 0, got -1"),
        (rae_encoder, "--num 0", "--num: expected a whole number from 1, got 0"),
        (rae_encoder, "--seed -1", "--seed: expected a whole number from 0, got -1"),
        (rae_decoder_train, "--steps 0", "--steps: expected a whole number from 1, got 0"),
        (rae_decoder_train, "--epochs nan", "--epochs: expected a number above 0, got nan"),
        (rae_decoder_train, "--lr -1", "--lr: expected a number from 0, got -1"),
        (rae_decoder_train, "--gan-weight -1", "--gan-weight: expected a number from 0, got -1"),
        (rae_decoder_train, "--patch-size 0", "--patch-size: expected a whole number from 1, got 0"),
        (rae_decoder_train, "--eval-every 0", "--eval-every: expected a whole number from 1, got 0"),
        (rae_decoder_train, "--preview-every -1", "--preview-every: expected a whole number from 0, got -1"),
        (rae_decoder_train, "--batch-size 0", "--batch-size: expected a whole number from 1, got 0"),
        (flow_train, "--epochs inf", "--epochs: expected a number above 0, got inf"),
        (flow_train, "--clip -1", "--clip: expected a number from 0, got -1"),
        (flow_train, "--width 0", "--width: expected a whole number from 1, got 0"),
        (flow_train, "--stats-images 0", "--stats-images: expected a whole number from 1, got 0"),
        (flow_train, "--ema 1", "--ema: expected a number from 0 to below 1, got 1"),
        (flow_train, "--ema -0.1", "--ema: expected a number from 0 to below 1, got -0.1"),
        (flow_train, "--shift 0", "--shift: expected a number above 0, got 0"),
        (sample, "--seed -1", "--seed: expected a whole number from 0"),
        (sample, "--cfg nan", "--cfg: expected a number from 0, got nan"),
        (fid, "--workers -1", "expected a whole number from 0"),
        # Words
        (rae_encoder, "--preset imagenet", "--preset: invalid choice: 'imagenet' (choose from"),
        (rae_decoder_train, "--preset imagenet", "--preset: invalid choice: 'imagenet' (choose from"),
        (flow_train, "--preset imagenet", "--preset: invalid choice: 'imagenet' (choose from"),
        (rae_decoder_train, "--decoder ViT-Q", "--decoder: ViT-Q: not one of"),
        (flow_train, "--model DiT-Q", "--model: invalid choice: 'DiT-Q'"),
        (flow_train, "--learning_rate 1", "unrecognized arguments: --learning_rate"),
        (flow_train, "--save_every 1", "(perhaps --save-every?)"),
        (fid, "data --ref data --features nomodel", "--features nomodel: no model that timm knows"),
        # Flags together
        (rae_decoder_train, "--preset imagenet256", "--preset imagenet256 needs --data DIR"),
        (rae_encoder, "--preset demo --data x", "--data x: the demo draws its own images"),
        (flow_train, "--preset demo --data x", "--data x: the demo draws its own images"),
        (flow_train, "--steps 3 --epochs 3", "not allowed with argument --steps"),
        (flow_train, "--keep-every 150", "--keep-every 150 is no multiple of --save-every 200"),
        (rae_decoder_train, "--keep-every 150", "--keep-every 150 is no multiple of --save-every 100"),
        (rae_decoder_train, "--gan-weight 1 --gan-start 5", "--gan-start 5.0 is before --disc-start 6"),
        (
            flow_train,
            f"{COMMON} --hold-epochs 50",
            "--hold-epochs ends at step 100, --decay-epochs at step 52",
        ),
        (flow_train, f"{COMMON} --decay-epochs 3", "--hold-epochs ends at step 16, --decay-epochs at step 6"),
        (rae_decoder_train, "", "22 images, fewer than --batch-size 32"),
        (rae_decoder_train, "--batch-size 4 --accum 3", "--batch-size 4 is no multiple of 1 ranks x 3"),
        (rae_decoder_train, f"{COMMON} --image-size 30", "--image-size 30: the encoder would see 30 pixels"),
        (
            sample,
            "--latent-noise 1",
            "--latent-noise, --encoder-weights, --skip-broken are for --reconstruct",
        ),
        # Files and folders
        (rae_decoder_train, "--data none", "--data none: No such file or directory"),
        (flow_train, "--data none", "--data none: No such file or directory"),
        (rae_decoder_train, "--eval-data none", "--eval-data none: No such file or directory"),
        (sample, "--reconstruct none --decoder decoder.pt", "--reconstruct none: No such file or directory"),
        (fid, "data --ref data --save-stats none/x.npz", "--save-stats: expected an .npz in a folder"),
        (rae_encoder, "--out file/x.pt", "--out file/x.pt: not a file in a folder"),
        (rae_encoder, "--out data", "--out data: not a file in a folder"),
        (flow_train, f"{TRAIN['flow_train']} --out file/x", "--out file/x: can't be written"),
        (sample, f"{SAMPLE} --out file/x", "--out file/x: can't be written"),
        (sample, f"{SAMPLE} --out file", "--out file: can't be written"),
        (sample, f"{SAMPLE} --decoder strange.pt", "--decoder strange.pt: not a decoder"),
        (sample, f"{SAMPLE} --stats strange.pt", "--stats strange.pt: no latent statistics"),
        (rae_decoder_train, f"{COMMON} --lpips-weight 0 --resume strange.pt", "--resume strange.pt: not a"),
        (flow_train, COMMON, "--decoder runs/decoder/last.pt: no such file"),
        (flow_train, f"{COMMON} --decoder flow.pt", "--decoder flow.pt: is a flow of flow_train.py"),
        (flow_train, f"{COMMON} --decoder decoder.pt", "they are no pair"),
    ],
)
def test_flags_that_cannot_be_meant(folder, module, flags, line):
    write_flow("flow.pt"), write_decoder("decoder.pt"), Path("file").touch()
    torch.save({"format": "rae-decoder/1", "mean": "text"}, "strange.pt")
    assert line in message(module.main, flags.split())


@pytest.mark.slow
def test_a_mistake_is_one_line_of_the_command(tmp_path):
    command = [sys.executable, flow_train.__file__, "--data", "none"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr == "--data none: No such file or directory; expected a folder of images\n"


@pytest.mark.slow
@pytest.mark.parametrize("script", STAGES)
def test_the_shortest_run_is_one_step(folder, script):
    end(start(script, 1, "run", "--epochs", 0.01))
    assert read("runs/run/last.pt")["step"] == 1
