"""Nothing is lost: kills at any moment, signals, full disks, files and flags that are hostile or wrong."""

import contextlib
import importlib
import itertools
import json
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

STAGES = {  # both at a few thousand weights; two steps an epoch, so that the GAN is heard from step 4 on
    "rae_decoder_train": "--lpips-weight 0 --gan-weight 0.75 --disc-weights random --preview-every 0",
    "flow_train": "--decoder= --model DiT-DH-S --width 16 --depth 1 --heads 2 --head-width 32 --head-depth 1 "
    "--head-heads 2",
}
COMMON = "--batch-size 8 --workers 0 --log-every 1 --save-every 1 --precision fp32"
STARTED = []  # process groups: the workers of a killed run may stay, each with its memory
# Forks of an interpreter that has imported everything: a run starts at once.
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # before 3.13 it does not get sys.path otherwise
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([*STAGES, "test_faults", "torch.utils.tensorboard"])


def narrow():
    """A decoder and a discriminator small enough for many runs."""
    rae_decoder_train.DECODERS["ViT-mini"] = (16, 2, 2, 24)
    load_vit, small = rae_encoder.load_vit, dict(patch_size=32, embed_dim=12, num_heads=2, num_classes=0)

    def load_small(name, weights, *flag):
        if "dino" not in name:
            return load_vit(name, weights, *flag)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return timm.create_model(name, pretrained=False, **small).eval()

    rae_encoder.load_vit = load_small


def die_at(moment):
    """SIGKILL at the so-manieth flush (with half of the file written) or rename of a checkpoint."""
    count, fsync, replace = itertools.count(1), os.fsync, os.replace

    def deadly_fsync(file):
        if next(count) == moment:
            os.ftruncate(file, os.fstat(file).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(file)

    def deadly_replace(*paths):
        if next(count) == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*paths)

    os.fsync, os.replace = deadly_fsync, deadly_replace


def one_rank(script, flags, rank, world, port, moment):
    os.setsid()  # the group of the rank and its workers
    os.environ |= dict(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    Path(f"said-{rank}").unlink(missing_ok=True)
    sys.stderr = open(f"said-{rank}", "w", buffering=1)  # noqa: SIM115
    torch.set_num_threads(1)
    narrow()
    if moment:
        die_at(moment)
    importlib.import_module(script).main(flags)


def start(script, world, out, *flags, moment=None):
    """The processes of a run into runs/OUT, one for each rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = [*f"{COMMON} {STAGES[script]} --out runs/{out}".split(), *map(str, flags)]
    ranks = [
        FORKS.Process(target=one_rank, args=(script, flags, r, world, port, moment)) for r in range(world)
    ]
    for rank in ranks:
        rank.start()
    STARTED.extend(rank.pid for rank in ranks)
    return ranks


def end(ranks, code=0):
    """Waits for a run; returns what its rank 0 said last."""
    for rank in ranks:
        rank.join(300)
    assert [rank.exitcode for rank in ranks] == [code] * len(ranks), Path("said-0").read_text()
    return Path("said-0").read_text().splitlines()[-1:]


def logged(out):
    """The steps in the log of runs/OUT."""
    log = Path(f"runs/{out}/metrics.jsonl")
    return [json.loads(line)["step"] for line in log.read_text().splitlines()] if log.exists() else []


def wait_for_steps(ranks, out, count):
    before = len(logged(out))
    while len(logged(out)) < before + count and all(rank.is_alive() for rank in ranks):
        time.sleep(0.01)


def same_training(a, b):
    """All that two run folders' checkpoints hold is equal, but for the flags --out and --workers."""
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


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("script", STAGES)
def test_killed_runs_end_with_the_same_bits(folder, script, world):
    """SIGKILL with half a checkpoint written, before and between its renames, and RAE_KILLS times at random.

    The killed run has other workers each time, then a cache.
    """
    kills = int(os.environ.get("RAE_KILLS", 1))
    rng, steps = np.random.default_rng(), ["--steps", 20 + 10 * kills]
    end(start(script, world, "whole", *steps))
    assert "disc" in read("runs/whole/last.pt") or script == "flow_train"
    for k, moment in enumerate([3, 5, 6][: 4 - world] + [None] * kills):
        other = ["--cache-latents"] if k == 3 and script == "flow_train" else ["--workers", k % 3]
        ranks = start(script, world, "killed", *steps, *other, moment=moment)
        if moment:
            ranks[0].join(300)
            there = {path.name for path in Path("runs/killed").glob("*.pt*")}
            assert there >= {"last.pt.tmp", "previous.pt" if moment == 6 else "last.pt"}
            assert ("last.pt" in there) == (moment != 6)
        else:
            wait_for_steps(ranks, "killed", 4)
            time.sleep(rng.uniform(0, 0.2))
        for rank in rng.permutation(ranks):
            rank.kill()
        end(ranks, -signal.SIGKILL)
    assert 4 < max(logged("killed")) < steps[1]
    end(start(script, world, "killed", *steps))
    assert same_training("whole", "killed")


@pytest.mark.parametrize(
    ("script", "world", "number"),
    [("flow_train", 1, signal.SIGINT), ("rae_decoder_train", 2, signal.SIGTERM)],
)
def test_a_signal_ends_a_run_with_a_checkpoint(folder, script, world, number):
    ranks = start(script, world, "run", "--steps", 10**5, "--save-every", 10**5, "--workers", 1)
    wait_for_steps(ranks, "run", 3)
    os.killpg(ranks[-1].pid, number)  # one rank alone, with its worker
    said, step = end(ranks), logged("run")[-1]
    assert said == [f"runs/run/last.pt: step {step} of 100000; stopped, the same command goes on from here"]
    assert read("runs/run/last.pt")["step"] == step


def test_ctrl_c_under_torchrun(folder):
    """torchrun hands it on to all ranks, waits for them, and ends with a code of its own."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    flags = f"{COMMON} {STAGES['flow_train']} --steps 100000 --out runs/run".split()
    command = [*launcher, flow_train.__file__, *flags]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)
    while len(logged("run")) < 3 and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said, step = process.communicate()[1], logged("run")[-1]
    assert f"last.pt: step {step} of 100000; stopped, the same command goes on from here" in said
    assert read("runs/run/last.pt")["step"] == step


@pytest.mark.parametrize("script", STAGES)
def test_a_folder_has_one_run_and_the_lock_dies_with_it(folder, script):
    first = start(script, 1, "run", "--steps", 10**5, "--workers", 2)
    wait_for_steps(first, "run", 1)
    (said,) = end(start(script, 1, "run"), 1)
    assert said.startswith("--out runs/run: another run is in it") and first[0].is_alive()
    first[0].kill()
    end(first, -signal.SIGKILL)  # its workers still live
    end(start(script, 1, "run", "--steps", logged("run")[-1] + 1))


# Disks and files


@pytest.mark.parametrize("file", ["last.pt.tmp", "metrics.jsonl"])
@pytest.mark.parametrize("script", STAGES)
def test_a_full_disk_leaves_the_last_checkpoint(folder, script, file):
    end(start(script, 1, "run", "--steps", 2))
    last, full = Path("runs/run/last.pt"), Path("runs/run", file)
    before = last.read_bytes()
    full.unlink(missing_ok=True)
    full.symlink_to("/dev/full")
    end(start(script, 1, "run", "--steps", 4), 1)
    said = Path("said-0").read_text()
    assert f"runs/run/{full.name.removesuffix('.tmp')}: can't be written ([Errno 28] No space left" in said
    assert "checkpoint" in said and "Traceback" not in said
    assert last.read_bytes() == before
    full.unlink()
    end(start(script, 1, "run", "--steps", 4))


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("hacked",)


TRAIN = {script: f"{COMMON} {flags}" for script, flags in STAGES.items()}
SAMPLE, FID = "--flow flow.pt --decoder decoder.pt", "data/demo --workers 0"


@pytest.mark.parametrize(
    ("module", "flags"),
    [
        (rae_encoder, "--encoder-weights FILE"),
        *((rae_decoder_train, f"--{f} FILE") for f in ("encoder-weights", "disc-weights", "init", "resume")),
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
        said = message(module.main, f"{common} {flags.replace('FILE', file)}".split())
        assert file in said and not Path("hacked").exists()
    torch.load("new.pt", weights_only=False)
    assert Path("hacked").exists()  # it would have


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
    args = fid.parse_args(["--inception-weights", "inception.safetensors"])
    assert equal(fid.load_network(args)[0].fc.bias, torch.arange(1008.0))


# Flags


@pytest.mark.parametrize(
    ("module", "flags", "line"),
    [
        (rae_encoder, "--workers -1", "--workers -1: expected 0 or more"),
        (rae_encoder, "--num 0", "--num 0: expected more than 0"),
        (rae_encoder, "--seed -1", "--seed -1: expected 0 or more"),
        (rae_decoder_train, "--steps 0", "--steps 0: expected more than 0"),
        (rae_decoder_train, "--epochs nan", "--epochs nan: expected more than 0"),
        (rae_decoder_train, "--lr -1", "--lr -1.0: expected 0 or more"),
        (rae_decoder_train, "--gan-weight -1", "--gan-weight -1.0: expected 0 or more"),
        (rae_decoder_train, "--patch-size 0", "--patch-size 0: expected more than 0"),
        (rae_decoder_train, "--eval-every 0", "--eval-every 0: expected more than 0"),
        (rae_decoder_train, "--eval-data none", "--eval-data none: no such folder or .tar"),
        (rae_decoder_train, "--preview-every -1", "--preview-every -1: expected 0 or more"),
        (flow_train, "--epochs inf", "--epochs inf: expected more than 0"),
        (flow_train, "--clip -1", "--clip -1.0: expected 0 or more"),
        (flow_train, "--width 0", "--width 0: expected more than 0"),
        (flow_train, "--stats-images 0", "--stats-images 0: expected more than 0"),
        (flow_train, "--ema 1", "--ema 1.0: expected less than 1"),
        (sample, "--seed -1", "--seed -1: expected 0 or more"),
        (sample, "--cfg nan", "--cfg nan: expected 0 or more"),
        (sample, "--reconstruct none --decoder decoder.pt", "--reconstruct none: no such folder"),
        (sample, "--latent-noise 1", "--latent-noise is for --reconstruct"),
        (fid, "--workers -1", "--workers -1: expected 0 or more"),
        (fid, "data --ref data --features nomodel", "--features nomodel: no model that timm knows"),
        (fid, "--save-stats none/x.npz", "--save-stats none/x.npz: expected an .npz in a folder"),
        (rae_encoder, "--out file/x.pt", "--out file/x.pt: not a file in a folder"),
        (rae_encoder, "--out data", "--out data: not a file in a folder"),
        (sample, f"{SAMPLE} --out file/x", "--out file/x: can't be written"),
        (sample, f"{SAMPLE} --out file", "--out file: can't be written"),
        (sample, f"{SAMPLE} --decoder strange.pt", "strange.pt: neither rae-decoder/1 nor"),
        (sample, f"{SAMPLE} --stats strange.pt", "--stats strange.pt: no latent statistics"),
        (
            rae_decoder_train,
            f"{COMMON} --lpips-weight 0 --resume strange.pt",
            "--resume strange.pt: not a rae",
        ),
    ],
)
def test_flags_that_cannot_be_meant(folder, module, flags, line):
    write_flow("flow.pt"), write_decoder("decoder.pt"), Path("file").touch()
    torch.save({"format": "rae-decoder/1", "mean": "text"}, "strange.pt")
    assert message(module.main, flags.split()).startswith(line)


@pytest.mark.parametrize("script", [rae_decoder_train, flow_train])
def test_a_numbered_copy_written_again_leaves_previous_alone(tmp_path, script):
    for step, name in ((1, "last"), (2, "last"), (2, "0000002"), (2, "0000002")):
        script.save({"step": step}, str(tmp_path / f"{name}.pt"))
    assert read(tmp_path / "previous.pt")["step"] == 1 and read(tmp_path / "0000002.pt")["step"] == 2


def test_the_shortest_run_is_one_step(folder):
    for script in STAGES:
        end(start(script, 1, script, "--epochs", 0.01))
        assert read(f"runs/{script}/last.pt")["step"] == 1
