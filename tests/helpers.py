"""What tests of several files need: comparisons, one launcher of ranks, one builder of small checkpoints."""

import contextlib
import itertools
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import signal
import socket
import sys
from functools import cache, partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import dit_dh
import fid  # noqa: F401 (a fork has it already)
import flow_train  # noqa: F401
import rae_decoder_train
import rae_encoder
import sample  # noqa: F401


def read(path):
    return torch.load(path, map_location="cpu", weights_only=True)


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def picture(width, height, seed=0):
    """A random image as smooth as a photograph, on which rules of resampling differ visibly."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def message(function, *args):
    """The one line that function(*args) ends in."""
    with pytest.raises(SystemExit) as error:
        function(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


# Ranks: forks of an interpreter that has imported everything, so that a rank starts at once

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["helpers", "torch.utils.tensorboard"])
STARTED = []  # process groups: the workers of a killed rank may stay, each with its memory


def start_ranks(function, *args, world=1, before=()):
    """Start `world` processes that call function(*args) as torchrun's do; a list of them.

    function: one that can be imported, such as flow_train.main. before: functions without arguments that each
    rank calls first. A rank prints into stdout-RANK and stderr-RANK in the working folder.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    # Before Python 3.13 the interpreter that is forked does not get sys.path otherwise.
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
        multiprocessing.forkserver.ensure_running()
    ranks = []
    for rank in range(world):
        names = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ranks.append(FORKS.Process(target=be_rank, args=(names, before, function, args)))
        ranks[-1].start()
        STARTED.append(ranks[-1].pid)
    return ranks


def be_rank(names, before, function, args):
    os.setsid()  # the group of the rank and its workers
    os.environ.update(names)
    for stream in ("stdout", "stderr"):
        path = f"{stream}-{names['RANK']}"
        Path(path).unlink(missing_ok=True)
        setattr(sys, stream, open(path, "w", buffering=1))  # noqa: SIM115
    torch.set_num_threads(1)
    # A loading process of this one would otherwise start, and import all of this, once more.
    multiprocessing.set_start_method("fork", force=True)
    for prepare in before:
        prepare()
    rae_encoder.run(partial(function, *args))


def end_ranks(ranks, code=0):
    """Wait for ranks, which all must end with `code`; the lines of rank 0, without progress bars."""
    alive = list(ranks)
    while alive:
        multiprocessing.connection.wait([rank.sentinel for rank in alive])
        alive = [rank for rank in alive if rank.exitcode is None]
        # A rank whose peer is gone waits for an hour.
        if any(rank.exitcode not in (None, code) for rank in ranks):
            kill_started()
    printed = Path("stderr-0").read_text()
    assert [rank.exitcode for rank in ranks] == [code] * len(ranks), printed
    assert "Traceback" not in printed, printed
    return [line for line in printed.splitlines() if line.strip() and "%|" not in line]


def run_ranks(function, *args, world=1, before=(), code=0):
    return end_ranks(start_ranks(function, *args, world=world, before=before), code)


def kill_ranks(ranks):
    """All at once: stopped first, so that no rank sees a dead peer and leaves by itself."""
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for rank in ranks:
            os.kill(rank.pid, number)
    end_ranks(ranks, -signal.SIGKILL)


def kill_started():
    """End what a test has started and left behind."""
    while STARTED:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(STARTED.pop(), signal.SIGKILL)


# What a rank may call before its function


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
    """Stop this process at a checkpoint's flush, with half of the file written, or at its rename.

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


# Small checkpoints, as the trainings write them


SHAPE = (64, 2, 2)  # test_vit at 32 px: 2x2 tokens of width 64
CLASSES = 3
BODY_AND_HEAD = dict(width=32, depth=1, heads=2, head_width=64, head_depth=1, head_heads=2)


def excite(network, seed):
    """Give every weight a value: after adaLN-zero's start the velocity is 0."""
    torch.manual_seed(seed)
    for parameter in network.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.15)
    labels = network.y_embedder.embedding_table.weight
    torch.nn.init.normal_(labels, std=5)  # so that labels show in the images
    return network


@cache
def encoder_hash():
    return rae_encoder.Encoder("test_vit", 32, 32, "random").hash


def write_flow(path, name="DiT-DH-S", seed=0, **changes):
    """A flow's checkpoint of a small network `name` at `path`; changes are to its config."""
    sizes = BODY_AND_HEAD if "DH" in name else dict(width=32, depth=1, heads=2)
    config = {
        "encoder": "test_vit",
        "encoder_hash": encoder_hash(),
        "encoder_size": 32,
        "image_size": 32,
        "model": name,
        "sizes": sizes,
        "latent_shape": list(SHAPE),
        "classes": ["cat", "dog", "7"][:CLASSES],
        "num_classes": CLASSES,
        "shift": 1.7,
        "prediction": "v",
        "base_depth": None,
    }
    config |= changes
    networks = [
        excite(dit_dh.build(name, config["latent_shape"], config["num_classes"], **sizes), s)
        for s in (seed + 100, seed)
    ]
    torch.manual_seed(seed)
    file = dict(format="rae-flow/1", config=config, step=7, optimizer={}, precision="fp32", args={})
    file |= dict(mean=torch.randn(config["latent_shape"]), var=torch.rand(config["latent_shape"]) + 0.5)
    file |= dict(zip(("model", "ema"), (network.state_dict() for network in networks), strict=True))
    torch.save(file, path)
    return str(path)


def write_decoder(path, args=(), **changes):
    """A decoder's checkpoint at `path`, of 32 px images in 2x2 tokens; changes are to its config."""
    torch.manual_seed(1)
    sizes = dict(name="ViT-mini", channels=SHAPE[0], grid=2, patch_size=16, mean=[0.5] * 3, std=[0.25] * 3)
    config = {
        "encoder": "test_vit",
        "encoder_hash": encoder_hash(),
        "encoder_size": 32,
        "layers": None,
        "image_size": 32,
        "latent_shape": list(SHAPE),
        "decoder": sizes,
        "noise_tau": 0.8,
        "gan": False,
    }
    config |= changes
    state = rae_decoder_train.Decoder(**sizes).state_dict()
    flags = {
        "preset": "small",
        "data": "data/demo",
        "image_size": 32,
        "encoder": "test_vit",
        "encoder_weights": "random",
        "encoder_size": None,
        "layers": "last",
        "patch_size": 16,
        "flip": True,
        "skip_broken": False,
        **dict(args),
    }
    torch.save(dict(format="rae-decoder/1", config=config, model={}, ema=state, step=3, args=flags), path)
    return str(path)
