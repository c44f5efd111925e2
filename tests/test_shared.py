"""What the scripts share: flags, devices, ranks, signals, files, folders, and the plumbing of trainings."""

import argparse
import copy
import errno
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import shlex
import signal
import sys
import time
import timeit
import types
import warnings
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import equal, message, read, start_ranks
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import dit_dh
import fid
import flow_train
import rae_decoder_train
import rae_encoder
import sample

CPU = torch.device("cpu")
SCRIPTS = [rae_encoder, rae_decoder_train, flow_train, sample, fid]
TRAININGS = [rae_decoder_train, flow_train]


def in_ranks(function, *values, world):
    """What function(*values) returned, as JSON, or the line that it ended in, in each of `world` ranks."""
    ranks = start_ranks(print_json, function, *values, world=world)
    for process in ranks:
        process.join()
    found = []
    for number, process in enumerate(ranks):
        printed = Path(f"stderr-{number}").read_text()
        assert "Traceback" not in printed, printed
        if process.exitcode == 0:
            found.append(json.loads(Path(f"stdout-{number}").read_text()))
        else:
            assert process.exitcode == 1
            found.append(printed.strip().splitlines()[-1])
    return found


def print_json(function, *values):
    print(json.dumps(function(*values)))


def rank():
    return int(os.environ["RANK"])


@pytest.fixture
def pngs(tmp_path, monkeypatch):
    """Eight small images in two classes, in the working folder."""
    monkeypatch.chdir(tmp_path)
    for i in range(8):
        path = tmp_path / "images" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 40), (30 * i, 255 - 30 * i, 99)).save(path)
    return tmp_path / "images"


@pytest.fixture
def quiet():
    """Signals do nothing until they are caught: a job in the background, as this may be one, ignores some."""
    for number in rae_encoder.STOP_SIGNALS:
        signal.signal(number, lambda *_: None)


# Flags


class Parsed(Exception):
    """Ends a script at its first parse_args."""


def parser_of(script, monkeypatch):
    """The script's parser, with the defaults of its flags before any preset's."""

    def stop(parser, *_args, **_options):
        raise Parsed(parser)

    with monkeypatch.context() as patch, pytest.raises(Parsed) as end:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        patch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
        script.parse_args([])
    return end.value.args[0]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_number_has_bounds_and_every_default_is_in_the_help(monkeypatch, capsys, script):
    numbers = 0
    parser = parser_of(script, monkeypatch)
    for action in parser._actions:
        flag = action.option_strings[-1] if action.option_strings else action.dest
        assert "_" not in flag and action.help, flag
        switch = action.default is None or isinstance(action.default, bool)
        if not switch and action.default != argparse.SUPPRESS:
            assert "%(default)s" in action.help, flag
            assert action.type or isinstance(action.default, str), flag
        if action.type is None or action.nargs == 0:
            continue

        # A type that takes 1 for a number takes nothing that is none, and nothing below 0.
        try:
            number = isinstance(action.type("1"), (int, float))
        except (argparse.ArgumentTypeError, ValueError, SystemExit):
            number = False
        if number:
            numbers += 1
            for text in ("nan", "inf", "-1", "-0.5", "x", ""):
                values = [f"{flag}={text}"] if action.nargs != 2 else [flag, "1", text]
                assert f"{flag}" in message(parser.parse_args, values)
    assert numbers > 2

    with pytest.raises(SystemExit) as end:
        script.parse_args(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert text.count("  --") > 10 and "%(" not in text and text.index("\n") < 80


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        ("positive_int", {"1": 1, "20": 20}, ["0", "-1", "1.5", "x", "", "nan"]),
        ("non_negative_int", {"0": 0, "7": 7}, ["-1", "0.5", "x", str(2**63)]),
        ("positive_float", {"0.1": 0.1, "1e3": 1000.0}, ["0", "-1", "inf", "nan", "x"]),
        ("non_negative_float", {"0": 0.0, "0.5": 0.5}, ["-0.1", "inf", "nan", "x"]),
        ("share_below_one", {"0": 0.0, "0.9978": 0.9978}, ["1", "-0.1", "nan", "inf", "x"]),
    ],
)
def test_bounds_are_types_of_argparse(kind, good, bad):
    convert = getattr(rae_encoder, kind)
    for text, value in good.items():
        assert convert(text) == value and type(convert(text)) is type(value)
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=f"expected .*, got {text}$"):
            convert(text)


@pytest.mark.parametrize("text", ["5", "3,2", "2,2", "1,-2", "1,x", "", "²,3"])
def test_layers_are_a_word_or_several_ascending_blocks(text):
    assert [rae_encoder.layer_list(word) for word in ("last", "all", "0,3")] == ["last", "all", [0, 3]]
    with pytest.raises((argparse.ArgumentTypeError, ValueError)):
        rae_encoder.layer_list(text)


# One line for what is wrong: a kind of mistake each.
MESSAGES = [
    (rae_encoder, "--batch_size 5", "unrecognized arguments: --batch_size 5; --help lists the flags"),
    (rae_encoder, "--image 5", "unrecognized arguments: --image 5"),  # no abbreviations
    (rae_encoder, "--workers -1", "argument --workers: expected a whole number from 0, got -1"),
    (rae_encoder, "--data", "argument --data: expected one argument"),
    (rae_encoder, "--preset imagenet --data x", "argument --preset: invalid choice: 'imagenet'"),
    (rae_encoder, "--preset demo --data x", "--data x: the demo draws its own images; name another --preset"),
    (rae_encoder, "--preset imagenet256", "--preset imagenet256 needs --data DIR"),
    (rae_encoder, "--layers 5", "argument --layers: expected last, all, or ascending blocks"),
    (rae_decoder_train, "--steps 3 --epochs 3", "argument --epochs: not allowed with argument --steps"),
    (flow_train, "--ema 1", "argument --ema: expected a number from 0 to below 1, got 1"),
    (flow_train, "--precision half", "argument --precision: invalid choice: 'half'"),
]


@pytest.mark.parametrize(("script", "flags", "line"), MESSAGES)
def test_flags_that_cannot_be_meant_end_in_one_line(tmp_path, monkeypatch, script, flags, line):
    monkeypatch.chdir(tmp_path)
    assert line in message(script.parse_args, flags.split())


TABLE = {
    "demo": {"data": "drawn", "encoder_weights": "random", "steps": 7},
    "small": {"image_size": 64, "layers": "all", "steps": 9},
    "large": {},
}


@pytest.fixture
def parse():
    """with_preset on an invented table of presets."""

    def run(flags="", inherited=()):
        parser, _ = rae_encoder.training_parser("")
        parser.set_defaults(epochs=16)
        parser._option_string_actions["--preset"].choices = TABLE
        explicit = rae_encoder.explicit_flags(parser, flags.split())
        return rae_encoder.with_preset(parser, TABLE, explicit, inherited)

    return run


def test_the_preset_follows_the_data_and_flags_go_over_it(parse):
    demo = parse()
    assert (demo.preset, demo.data, demo.encoder_weights, demo.steps) == ("demo", "drawn", "random", 7)
    own = parse("--data x")
    # Nothing of the demo is in it.
    assert (own.preset, own.data, own.encoder_weights, own.image_size) == ("small", "x", None, 64)
    other = parse("--data x --preset large --image-size 48 --no-flip")
    assert (other.image_size, other.layers, other.flip) == (48, "last", False)
    assert (other.epochs, other.steps) == (16, None)
    assert other.explicit == {"data": "x", "preset": "large", "image_size": 48, "flip": False}
    # A default that is given is given.
    flags = "--seed 0 --skip-broken --no-flip --layers last"
    assert parse(flags).explicit == {"seed": 0, "skip_broken": True, "flip": False, "layers": "last"}
    assert vars(parse()) == vars(demo)  # a parse leaves no trace
    # Another encoder keeps the layers and the size of its tokens, whatever its patch and its depth.
    args = rae_encoder.parse_args(["--data", "x", "--encoder", "dinov3-large", "--image-size", "128"])
    assert (args.layers, args.patch_size, args.encoder_size, args.encoder_weights) == ("all", 8, None, None)


def test_epochs_and_steps_take_each_others_place(parse):
    for flags, length in (
        ("--data x", 9),
        ("--data x --epochs 3", None),
        ("--data x --steps 5", 5),
        ("--data x --preset large --epochs 3", None),
    ):
        assert parse(flags).steps == length, flags
    assert parse("--data x --epochs 3").epochs == 3


def test_flags_go_over_a_checkpoint_and_that_over_the_preset(parse):
    known = {"preset": "small", "data": "photos", "image_size": 32, "layers": None, "encoder": "mae-base"}
    args = parse("--encoder test_vit", known)
    assert (args.preset, args.data, args.image_size, args.layers) == ("small", "photos", 32, None)
    assert (args.encoder, args.steps, args.explicit) == ("test_vit", 9, {"encoder": "test_vit"})
    assert parse("--preset large", known).steps is None
    assert parse("--data other", known).data == "other"
    assert message(parse, "", {"preset": "large"}) == "--preset large needs --data DIR"
    assert "the demo draws its own images" in message(parse, "--preset demo --data x", known)


@pytest.mark.parametrize(
    ("ema", "steps", "decay"),
    [(0.9995, 20_000, 0.9995), (0.9995, 1000, 0.99), (0.9978, 40, 0.75), (0.9978, 3, 0), (0.5, 1000, 0.5)],
)
def test_the_ema_of_a_short_run_forgets_its_start(ema, steps, decay):
    """A full recipe is not touched, and a flag is obeyed."""
    args = argparse.Namespace(ema=ema, explicit={})
    assert rae_encoder.ema_decay(args, steps) == pytest.approx(decay)
    assert rae_encoder.ema_decay(argparse.Namespace(ema=ema, explicit={"ema": ema}), steps) == ema


@pytest.mark.parametrize(
    ("cores", "ranks", "workers"),
    [(1, 1, 1), (6, 1, 6), (6, 4, 1), (7, 2, 3), (64, 1, 8), (64, 4, 8), (2, 8, 1)],
)
def test_workers_are_the_cores_of_the_job(monkeypatch, cores, ranks, workers):
    """A container's, not the machine's, shared by the ranks on it."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    monkeypatch.setattr(os, "cpu_count", lambda: 1000)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(cores)), raising=False)
    parser = argparse.ArgumentParser()
    rae_encoder.computing_flags(parser)
    assert parser.parse_args([]).workers == workers

    # Systems that don't know it count the machine's.
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert rae_encoder.default_workers() == workers


def test_torchrun_leaves_the_number_of_images_to_the_script():
    from torch.distributed.run import parse_args

    assert parse_args(["sample.py", "-n", "7"]).training_script_args == ["-n", "7"]
    assert sample.parse_args(["-n", "7"]).num == 7


# Devices and precision


@pytest.mark.parametrize("devices", [0, 2])
def test_devices_that_are_not_there_end_in_one_line(monkeypatch, devices):
    module = types.SimpleNamespace(device_count=lambda: devices)
    chosen = []
    monkeypatch.setattr(torch, "get_device_module", lambda _: module)
    monkeypatch.setattr(torch.accelerator, "set_device_index", chosen.append)
    assert rae_encoder.choose_device("cpu", 3) == CPU
    for name in ("cuda", "mps", "xpu"):
        for rank in range(devices):
            assert rae_encoder.choose_device(name, rank) == torch.device(name, rank) and chosen[-1] == rank
        line = message(rae_encoder.choose_device, name, devices)
        assert line.startswith(f"--device {name}: this torch has {devices}, fewer than processes")


@pytest.mark.parametrize(
    ("bf16", "fp32", "precision"), [(400.0, 300.0, "bf16"), (399.0, 300.0, "fp32"), (165.4, 330.2, "fp32")]
)
def test_precision_is_what_is_faster_where_it_runs(monkeypatch, bf16, fp32, precision):
    """At least 4/3 as fast, since all else of a step gains nothing by it; never what the processor says."""
    rates = {torch.bfloat16: bf16, torch.float32: fp32}
    monkeypatch.setattr(rae_encoder, "product_rate", rates.get)
    name, why = rae_encoder.choose_precision(None, CPU)
    assert name == precision and why == f"products in bf16 {bf16:.0f}, in fp32 {fp32:.0f} GFLOP/s"
    for given in ("fp32", "bf16"):
        assert rae_encoder.choose_precision(given, CPU) == (given, "as given")


def test_the_rate_is_of_the_fastest_product(monkeypatch):
    """1024 x 1024 matrices take 2 * 1024^3 operations; the first product, before the clock runs, is slow."""
    clock = iter([0.0, 0.009, 0.009, 0.011, 0.011, 0.014, 0.014, 0.018, 0.018, 0.023])
    products = []
    matmul = torch.Tensor.__matmul__

    def tick():
        assert products  # one came before
        return next(clock)

    def product(a, b):
        products.append((a.dtype, a.shape, b.dtype, b.shape))
        return matmul(a[:1], b[:, :1])

    monkeypatch.setattr(timeit, "repeat", partial(timeit.repeat, timer=tick))
    monkeypatch.setattr(torch.Tensor, "__matmul__", product)
    assert rae_encoder.product_rate(torch.bfloat16) == pytest.approx(2 * 1024**3 / 0.002 / 1e9)
    assert products == [(torch.bfloat16, (1024, 1024)) * 2] * 6


@pytest.mark.parametrize("hardware", [True, False])
def test_emulated_bf16_is_not_taken(monkeypatch, hardware):
    def is_supported(including_emulation=True):
        return including_emulation or hardware

    monkeypatch.setattr(
        torch, "get_device_module", lambda _: types.SimpleNamespace(is_bf16_supported=is_supported)
    )
    for kind in ("cuda", "xpu"):
        assert rae_encoder.choose_precision(None, torch.device(kind))[0] == ("bf16" if hardware else "fp32")
    assert rae_encoder.choose_precision(None, torch.device("mps"))[0] == "fp32"


@pytest.fixture
def eight_gpus(monkeypatch):
    """join_ranks and set_up as on the third GPU of the second of two machines; yields what they asked for."""
    for name, value in {"RANK": 10, "LOCAL_RANK": 2, "WORLD_SIZE": 16, "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "somewhere")
    asked = {}

    def choose_device(name, local_rank):
        return torch.device(name, local_rank) if name == "cuda" else torch.device(name)

    monkeypatch.setattr(rae_encoder, "choose_device", choose_device)
    monkeypatch.setattr(dist, "init_process_group", asked.update)
    monkeypatch.setattr(dist, "barrier", lambda: asked.update(barrier=True))
    return asked


def test_a_rank_takes_the_gpu_of_its_own_machine_and_tf32(eight_gpus, monkeypatch, tmp_path):
    """On a CPU it keeps full precision and separate products."""
    monkeypatch.chdir(tmp_path)
    for device in ("cpu", "cuda"):
        expected = torch.device("cuda", 2) if device == "cuda" else CPU
        args = argparse.Namespace(device=device, preset="demo", data="data/demo")
        assert rae_encoder.set_up(args) == (10, 16, expected)
        assert eight_gpus["device_id"] == (expected if device == "cuda" else None)
        assert eight_gpus["timeout"].total_seconds() == 3600 and eight_gpus.pop("barrier")
        assert torch.get_float32_matmul_precision() == ("high" if device == "cuda" else "highest")
        assert torch.backends.cuda.flash_sdp_enabled() == (device == "cuda")
    assert not Path("data").exists()  # rank 0 draws


def test_one_process_draws_the_demo_once(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    drawn = []
    monkeypatch.setattr(rae_encoder, "draw_demo", lambda folder: drawn.append(folder) or os.makedirs(folder))
    for preset, data in (("small", "none"), ("demo", "data/demo"), ("demo", "data/demo")):
        args = argparse.Namespace(device="cpu", preset=preset, data=data)
        assert rae_encoder.set_up(args) == (0, 1, CPU)
    assert drawn == ["data/demo"]


@pytest.mark.parametrize(
    ("system", "device", "works", "thresholds"),
    [
        ("linux", "cpu", 1, [-3, -1]),
        ("linux", "cpu", 0, [-3]),
        ("linux", "cuda", 1, []),
        ("darwin", "cpu", 1, []),
    ],
)
def test_freed_memory_is_kept_where_it_helps(monkeypatch, system, device, works, thresholds):
    """Where the first threshold is refused the second does harm."""
    asked = []
    libc = types.SimpleNamespace(mallopt=lambda name, _size: asked.append(name) or works)
    monkeypatch.setattr(rae_encoder.ctypes, "CDLL", lambda _: libc)
    monkeypatch.setattr(sys, "platform", system)
    rae_encoder.keep_freed_memory(torch.device(device))
    assert asked == thresholds


@pytest.mark.parametrize("missing", ["RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_a_world_without_its_address_ends_in_one_line(monkeypatch, missing):
    """Schedulers set some of these for every job."""
    for name, value in {"RANK": "0", "MASTER_ADDR": "1", "MASTER_PORT": "1", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(missing)
    line = message(rae_encoder.join_ranks, "cpu")
    assert line.startswith("WORLD_SIZE is 4, ") and line.endswith("start with torchrun")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert rae_encoder.join_ranks("cpu")[1:] == (1, CPU)


# Ranks


def rank_exchanges():
    rae_encoder.join_ranks("cpu")
    rae_encoder.check_ranks_agree(step=3, images="abc")
    mean = flow_train.mean_over_ranks(torch.tensor([1.0 + rank(), 10.0 * rank()]))
    broken = torch.tensor([rank() == 0, True, False, rank() == 1])
    data = types.SimpleNamespace(broken=broken, skip_broken=True)
    # Of a product's speed each rank has its own opinion; rank 0's counts.
    rates = {torch.bfloat16: [900, 1, 1][rank()], torch.float32: 300}
    rae_encoder.product_rate = rates.get
    precision = rae_encoder.choose_precision(None, CPU)
    network = rae_encoder.parallel(nn.Linear(2, 1, bias=False), [], None, CPU)
    network(torch.tensor([[1.0 + rank(), rank()]])).sum().backward()
    gradient = network.module.weight.grad.tolist()
    return mean.tolist(), rae_encoder.broken_images(data, CPU), precision, gradient


@pytest.mark.slow
def test_ranks_share_means_counts_and_choices(pngs):
    found = in_ranks(rank_exchanges, world=3)
    precision = ["bf16", "products in bf16 900, in fp32 300 GFLOP/s"]
    replaced = "; 3 broken images were replaced by others"
    assert found[0] == [[2.0, 10.0], replaced, precision, [[2.0, 1.0]]]
    assert found[1] == found[2] == found[0]


def rank_measures(flags):
    """Statistics of images, which may be other ones on each rank."""
    rae_encoder.main([flag.replace("RANK", str(rank())) for flag in flags])


STATISTICS = (
    "--encoder test_vit --encoder-weights random --layers last --image-size 32 --patch-size 16 --workers 0"
)


@pytest.mark.slow
def test_statistics_of_two_ranks_are_those_of_one(pngs, tmp_path):
    flags = [*STATISTICS.split(), "--data", str(pngs)]
    rae_encoder.main([*flags, "--batch-size", "8", "--out", str(tmp_path / "1.pt")])
    in_ranks(rank_measures, [*flags, "--batch-size", "6", "--out", str(tmp_path / "2.pt")], world=2)
    one, two = (read(tmp_path / f"{world}.pt") for world in (1, 2))
    assert one["config"] == two["config"]
    for key in ("mean", "var"):
        assert torch.allclose(one[key], two[key], atol=1e-6) and one[key].unique().numel() > 200


@pytest.mark.slow
def test_a_command_whose_ranks_see_other_images_ends_on_all(pngs, tmp_path):
    (tmp_path / "rank-0").symlink_to(pngs)
    for path in pngs.rglob("*.png"):
        late = tmp_path / "rank-1" / path.relative_to(pngs)
        late.parent.mkdir(parents=True, exist_ok=True)
        late.symlink_to(path)
    late.unlink()  # a disk that shows files late
    flags = [*STATISTICS.split(), "--data", f"{tmp_path}/rank-RANK", "--out", f"{tmp_path}/stats.pt"]
    first, second = in_ranks(rank_measures, flags, world=2)
    assert first == second and re.match(r"rank 0 has images \w+, rank 1 has \w+: they read different", first)
    assert not (tmp_path / "stats.pt").exists()


def rank_stops(reasons):
    """Steps that a rank takes of six, where a rank stops for a reason at a step."""
    rae_encoder.join_ranks("cpu")
    stops = []

    def batches():
        for step in range(6):
            reason = reasons.get((rank(), step))
            if isinstance(reason, str):
                raise SystemExit(reason)
            if reason:
                stops.append(reason)
            yield step

    steps = list(flow_train.until_stopped(batches(), stops, CPU))
    return steps, [str(stop) for stop in stops]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reasons", "steps", "stops"),
    [
        ({}, 6, [[], []]),
        ({(1, 3): "x.png is broken"}, 3, [[], ["x.png is broken"]]),
        ({(0, 2): signal.SIGTERM}, 2, [[str(signal.SIGTERM)], []]),
    ],
)
def test_a_problem_or_a_signal_of_one_rank_ends_all_at_one_step(pngs, reasons, steps, stops):
    """No rank waits for another in an exchange that never comes."""
    found = in_ranks(rank_stops, reasons, world=2)
    assert found == [[list(range(steps)), stops[0]], [list(range(steps)), stops[1]]]


# Loading processes


def be_impatient(patch):
    """Let a DataLoader wait for 2 seconds instead of 60, and end its processes at once."""

    def loader(*args, timeout, **options):
        assert timeout == (60 if options["num_workers"] else 0)
        return DataLoader(*args, timeout=timeout / 30, **options)

    patch.setattr(rae_encoder, "DataLoader", loader)
    patch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.5)


def load(data, order, workers):
    for _ in rae_encoder.load_images(data, order, CPU, workers):
        pass


ONE_LINE = "; --workers 0 does without processes, and in Docker --shm-size gives them more shared memory"


@pytest.mark.slow
def test_a_killed_loading_process_ends_in_one_line(pngs, monkeypatch):
    """As by the kernel where memory is short; never in the midst of a step."""
    be_impatient(monkeypatch)
    data = rae_encoder.ImageData(pngs, 16)
    batches = rae_encoder.load_images(data, [[(0, i % 8)] for i in range(100)], CPU, workers=2)
    next(batches)
    for process in multiprocessing.active_children():
        os.kill(process.pid, signal.SIGKILL)
    time.sleep(0.5)  # the step: nothing is raised here
    line = message(list, batches)
    assert line.startswith("loading images failed (DataLoader ") and line.endswith(ONE_LINE)


@pytest.mark.slow
def test_a_loading_process_goes_on_at_ctrl_c(pngs, quiet):
    """It reaches all processes of a terminal; the training ends its step and its processes itself."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    data = rae_encoder.ImageData(pngs, 16)
    batches = rae_encoder.load_images(data, [[(0, i % 8)] for i in range(40)], CPU, workers=1)
    next(batches)
    (process,) = multiprocessing.active_children()
    os.kill(process.pid, signal.SIGINT)
    assert len(list(batches)) == 39


def load_stuck():
    """Load a file that never ends and a broken one, with the handlers of a training."""
    multiprocessing.set_start_method("fork", force=True)  # so that loading processes inherit them
    be_impatient(pytest.MonkeyPatch())
    stops = rae_encoder.catch_signals()
    data = rae_encoder.ImageData("stuck", 16)
    start = time.monotonic()
    line = message(load, data, [[(0, 0)], [(0, 1)], [(0, 0)]], 2)
    return line, time.monotonic() - start, stops


@pytest.mark.slow
def test_a_deaf_loading_process_ends_in_one_line(pngs):
    """A read that never returns, as of a dead network disk; processes inherit the handler of SIGTERM."""
    Path("stuck").mkdir()
    os.mkfifo("stuck/0.png")
    Path("stuck/1.png").write_bytes(b"broken")
    ((line, seconds, stops),) = in_ranks(load_stuck, world=1)  # it ends
    assert seconds < 30 and not stops
    assert line.startswith("loading images failed (DataLoader timed out") and line.endswith(ONE_LINE)


@pytest.mark.parametrize("error", [RuntimeError("unable to open shared memory"), OSError(28, "No space")])
def test_shared_memory_that_is_full_ends_in_one_line(pngs, monkeypatch, error):
    def fail(_index):
        raise error

    monkeypatch.setattr(rae_encoder, "DataLoader", lambda *_args, **_options: map(fail, [0]))
    line = message(load, rae_encoder.ImageData(pngs, 16), [[(0, 0)]], 2)
    assert line == f"loading images failed ({error}){ONE_LINE}"


# Signals and settings of the process


def test_stop_signals_are_noted_for_the_end_of_a_step(monkeypatch, quiet):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setattr(os, "_exit", lambda _code: pytest.fail("it ends at once"))
    numbers = [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT]
    stops = rae_encoder.catch_signals()
    for number in numbers:
        signal.raise_signal(number)
    assert stops == numbers

    # nohup goes on after the terminal's end; torchrun, which kills soon after, is not listened to any less.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stops = rae_encoder.catch_signals()
    signal.raise_signal(signal.SIGHUP)
    assert stops == []
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    stops = rae_encoder.catch_signals()
    signal.raise_signal(signal.SIGHUP)
    assert stops == [signal.SIGHUP]


@pytest.mark.parametrize(
    ("signals", "ends"),
    [
        ([("SIGINT", 0), ("SIGINT", 0.4)], False),  # torchrun's repetition of one Ctrl-C
        ([("SIGINT", 0), ("SIGINT", 0.4), ("SIGINT", 3)], True),
        ([("SIGTERM", 0), ("SIGINT", 20)], True),
        ([("SIGTERM", 0), ("SIGTERM", 20)], False),
    ],
)
def test_a_second_ctrl_c_ends_at_once(monkeypatch, quiet, signals, ends):
    codes = []
    clock = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(rae_encoder, "time", types.SimpleNamespace(monotonic=lambda: clock[-1]))
    rae_encoder.catch_signals()
    for name, moment in signals:
        assert codes == []
        clock.append(100 + moment)
        signal.raise_signal(getattr(signal, name))
    assert codes == ([130] if ends else [])


def settings():
    handlers = [signal.getsignal(number) for number in (signal.SIGCHLD, *rae_encoder.STOP_SIGNALS)]
    flash = torch.backends.cuda.flash_sdp_enabled()
    return torch.get_float32_matmul_precision(), flash, handlers, list(warnings.filters)


@pytest.mark.parametrize("script", [rae_encoder, *TRAININGS, sample])
def test_main_leaves_its_caller_as_it_was(monkeypatch, quiet, script):
    """Notebooks call main([...]): Ctrl-C, the precision and the attention of their own code stay."""
    precision, flash, *_ = before = settings()

    def change(_argv=None):
        torch.set_float32_matmul_precision("high" if precision == "highest" else "highest")
        torch.backends.cuda.enable_flash_sdp(not flash)
        rae_encoder.catch_signals()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        warnings.filterwarnings("ignore", "no such warning")
        assert not any(ours == theirs for ours, theirs in zip(settings(), before, strict=True))
        raise SystemExit("the end")

    monkeypatch.setattr(script, "parse_args", change)
    assert message(script.main, []) == "the end"
    assert settings() == before


def test_run_turns_ctrl_c_and_errors_of_files_into_one_line(monkeypatch, capsys):
    def interrupt():
        raise KeyboardInterrupt

    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    for rank, lines in (("0", "\ninterrupted; the same command goes on with what is saved\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        rae_encoder.run(interrupt)
        assert capsys.readouterr().err == lines
    assert codes == [130, 130]

    for error in (SystemExit("wrong"), OSError("wrong")):

        def fail(error=error):
            list(zip(tqdm(range(3), file=sys.stdout), range(1), strict=False))
            tqdm(total=3, file=sys.stdout)
            raise error

        assert message(rae_encoder.run, fail) == "wrong"
        assert not tqdm._instances  # the line begins on a line of its own


# The run folder


@pytest.fixture
def no_board(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)


def test_the_log_is_json_lines_and_tensorboards(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", mock.Mock())
    for step, record in ((3, {"loss": 0.5, "lr": 1e-4}), (4, {"l1": 2})):
        file, board = rae_encoder.open_log(str(tmp_path / "a/run"))
        board.reset_mock()
        rae_encoder.write_log((file, board), step, record)
        lines = (tmp_path / "a/run/metrics.jsonl").read_text().splitlines()  # while the run goes on
        found = json.loads(lines[-1])
        assert abs(found.pop("time") - time.time()) < 60
        assert found == {"step": step, **record} and len(lines) == step - 2
        scalars = [mock.call.add_scalar(name, value, step) for name, value in record.items()]
        assert board.mock_calls == [*scalars, mock.call.flush()]
        file.close()

    picture = Image.fromarray(np.arange(60, dtype=np.uint8).reshape(4, 5, 3))
    picture.save(tmp_path / "x.png")
    board.reset_mock()
    rae_encoder.log_picture((None, board), 4, tmp_path / "x.png")
    rae_encoder.log_picture((None, None), 5, tmp_path / "x.png")
    name, image, step = board.add_image.call_args.args
    assert (name, step, board.add_image.call_args.kwargs) == ("preview", 4, {"dataformats": "HWC"})
    assert np.array_equal(image, picture) and board.mock_calls[-1] == mock.call.flush()


def test_another_package_called_tensorboard_is_none(tmp_path, monkeypatch):
    (tmp_path / "tensorboard.py").write_text("raise RuntimeError")
    monkeypatch.syspath_prepend(tmp_path)
    for name in list(sys.modules):
        if name.partition(".")[0] == "tensorboard" or name.startswith("torch.utils.tensorboard"):
            monkeypatch.delitem(sys.modules, name)
    file, board = rae_encoder.open_log(str(tmp_path / "run"))
    file.close()
    assert board is None


@pytest.mark.parametrize("number", [errno.ENOLCK, None])
def test_a_system_without_locks_warns(tmp_path, monkeypatch, no_board, capsys, number):
    """Some network disks have none, and Windows has no fcntl."""

    def refuse(*_):
        raise OSError(number, "no locks")

    fcntl = types.SimpleNamespace(lockf=refuse, LOCK_EX=2, LOCK_NB=4) if number else None
    monkeypatch.setitem(sys.modules, "fcntl", fcntl)
    rae_encoder.open_log(str(tmp_path / "run"))[0].close()
    warning = f"{tmp_path}/run can't be locked on this system: start no second run in it\n"
    assert capsys.readouterr().err == warning


def test_a_run_folder_is_no_folder_of_somebody_else(tmp_path, no_board):
    foreign = {"photos": "cat/1.jpg", "samples": "settings.json", "notes": "notes.txt"}
    for name, file in {**foreign, "own": "metrics.jsonl", "copied": "last.pt"}.items():
        (tmp_path / name / file).parent.mkdir(parents=True)
        (tmp_path / name / file).touch()
    for name in foreign:
        line = message(rae_encoder.open_log, str(tmp_path / name))
        assert line.startswith(f"--out {tmp_path / name}: has files that are not this script's; name a new")
        assert not (tmp_path / name / "metrics.jsonl").exists()
    (tmp_path / "own/preview-0000100.png").touch()
    (tmp_path / "empty").mkdir()
    for name in ("own", "copied", "empty"):
        rae_encoder.open_log(str(tmp_path / name))[0].close()


# A run's start and end


def test_the_number_of_steps(parse):
    def plan(flags, images=22, world=1):
        return rae_encoder.plan_steps(images, parse(f"--data x --preset large {flags}"), world)

    assert plan("--batch-size 8 --epochs 3") == (2, 6)
    assert plan("--batch-size 8 --epochs 0.01") == (2, 1)
    assert plan("--batch-size 8 --steps 7") == (2, 7)
    assert plan("--batch-size 22 --epochs 1.4 --accum 2", world=11) == (1, 1)
    wrong = {
        "--batch-size 23": "--data x: 22 images, fewer than --batch-size 23",
        "--batch-size 8 --accum 3": "--batch-size 8 is no multiple of 1 ranks x 3 --accum",
        "--batch-size 8 --keep-every 30 --save-every 20": "--keep-every 30 is no multiple of --save-every 20",
    }
    for flags, line in wrong.items():
        assert message(plan, flags) == line
    assert "no multiple of 3 ranks x 1" in message(plan, "--batch-size 8", 22, 3)


def checkpoint(path, **parts):
    whole = {"format": "rae-flow/1", "config": {}, "model": {}, "optimizer": {}, "args": {"preset": "small"}}
    torch.save({**whole, "step": 4, **parts}, path)


def test_a_run_begins_with_its_own_checkpoint_or_none(tmp_path):
    def start(**flags):
        args = argparse.Namespace(**{"out": str(tmp_path), "resume": None, "data": "dogs", **flags})
        return rae_encoder.read_start(args, "rae-flow/1", "1234")

    last = tmp_path / "last.pt"
    assert start() == {}
    checkpoint(last)
    assert start()["path"] == str(last) and start()["step"] == 4
    checkpoint(tmp_path / "other.pt", step=7)
    assert start(resume=str(tmp_path / "other.pt"))["step"] == 7
    assert message(lambda: start(resume="none.pt")) == "--resume none.pt: no such file"

    # A file of something else, and one that is cut.
    whole = last.read_bytes()
    for form in ("rae-decoder/1", None):
        checkpoint(last, format=form)
        assert message(start) == f"--resume {last}: not a rae-flow/1 checkpoint"
    last.write_bytes(whole[: len(whole) // 2])
    assert message(start).startswith(f"--resume {last}: not a file of weights (")

    # The same images may have moved; a checkpoint of an earlier version does not tell its images.
    checkpoint(last, images="1234", args={"data": "elsewhere"})
    assert start()["images"] == "1234"
    checkpoint(last, images="5678", args={"data": "cats"})
    assert message(start) == f"{last} is of other images (cats) than --data dogs: name another --out"


def finish(step, stops=(), broken=(), rank=0, **flags):
    args = argparse.Namespace(out="runs/x")
    data = types.SimpleNamespace(broken=torch.tensor([False, *broken]), **{"skip_broken": False, **flags})
    with tqdm(disable=True) as progress:
        rae_encoder.end_of_run(args, rank, progress, step, 9, data, CPU, list(stops), "python x.py --y")


def test_the_last_line_says_what_comes_next(capsys):
    finish(9)
    assert capsys.readouterr().err == "runs/x/last.pt: step 9 of 9; next: python x.py --y\n"
    finish(9, broken=[True, True], skip_broken=True)
    replaced = "step 9 of 9; 2 broken images were replaced by others; next: python x.py --y"
    assert capsys.readouterr().err == f"runs/x/last.pt: {replaced}\n"
    finish(4, stops=[signal.SIGTERM])
    line = "runs/x/last.pt: step 4 of 9; stopped; the same command goes on (without --resume)\n"
    assert capsys.readouterr().err == line
    with pytest.raises(SystemExit, match="^x.png is broken$"):
        finish(4, stops=[SystemExit("x.png is broken"), signal.SIGINT])
    assert capsys.readouterr().err == line
    finish(9, rank=1)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("world", "out", "words"),
    [
        (1, "runs/decoder", ["python", "next.py", "--decoder", "runs/decoder/last.pt", "--out", "runs/flow"]),
        (4, "x/", shlex.split("torchrun --nproc_per_node 4 next.py --decoder x//last.pt --out flow")),
        (1, "a b/it's", ["python", "next.py", "--decoder", "a b/it's/last.pt", "--out", "a b/flow"]),
        (1, "$HOME", ["python", "next.py", "--decoder", "$HOME/last.pt", "--out", "flow"]),
    ],
)
def test_the_next_command_can_be_pasted(world, out, words):
    line = rae_encoder.next_command("next.py", world, "--decoder", out, "flow")
    assert shlex.split(line) == words
    # A shell reads nothing else in it.
    assert not re.search(r"[\s$'*;&|]", re.sub(r"'[^']*'|\"'\"", "", line).replace(" ", ""))


@pytest.mark.parametrize(("preset", "rank"), [("small", 0), ("demo", 0), ("small", 1)])
def test_the_first_line_names_data_networks_and_size(capsys, preset, rank):
    data = types.SimpleNamespace(summary=lambda: "9 images of x")
    network = nn.Linear(1000, 1499)
    args = argparse.Namespace(preset=preset, batch_size=8)
    bar = rae_encoder.first_line(args, rank, data, "A -> B", network, "2 x cpu, fp32 (as given)", 3, 9)
    assert (bar.n, bar.total, bar.disable) == (3, 9, rank > 0) or rank
    bar.close()
    demo = "The demo: its numbers compare with nothing. " if preset == "demo" else ""
    line = f"{demo}9 images of x; A -> B (1.5 M parameters); 2 x cpu, fp32 (as given); step 3 of 9\n"
    assert capsys.readouterr().err.startswith("" if rank else line)


# Files


@pytest.mark.parametrize("sync", [True, False])
def test_a_written_file_is_whole_or_not_there(tmp_path, monkeypatch, sync):
    path = tmp_path / "x.pt"
    written = []
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)

    def write(file):
        written.append((file.name, os.fstat(file.fileno()).st_ino))
        torch.save({"a": torch.ones(1)}, file)
        assert not path.exists()

    rae_encoder.write_file(str(path), write, sync)
    assert written == [(f"{path}.{os.getpid()}.tmp", path.stat().st_ino)] and read(path)["a"] == 1
    assert list(tmp_path.iterdir()) == [path] and len(synced) == sync


@pytest.mark.parametrize("size", [10, 10**6])
def test_a_full_disk_leaves_the_old_file_and_no_half_one(tmp_path, size):
    path = tmp_path / "x.pt"
    path.write_bytes(b"old")
    for write in (lambda file: torch.save(torch.zeros(size), file), lambda file: file.write(bytes(size))):
        (tmp_path / f"x.pt.{os.getpid()}.tmp").symlink_to("/dev/full")
        line = message(rae_encoder.write_file, str(path), write)
        assert line.startswith(f"{path}: can't be written (") and path.read_bytes() == b"old"
        assert list(tmp_path.iterdir()) == [path]
    line = message(rae_encoder.write_file, f"{tmp_path}/none/x", lambda file: None)
    assert line.startswith(f"{tmp_path}/none/x: can't be written ([Errno 2] No such file or directory")


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("hacked",)


def test_weights_are_read_in_every_format(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for new in (True, False):  # torchvision's VGG-16 is of the old format, which can't be mapped
        torch.save({"a": torch.arange(3)}, "x.pt", _use_new_zipfile_serialization=new)
        assert rae_encoder.read_weights("x.pt", "--x")["a"].tolist() == [0, 1, 2]
    save_file({"a": torch.arange(3)}, "x.safetensors")
    assert rae_encoder.read_weights(Path("x.safetensors"), "--x")["a"].tolist() == [0, 1, 2]

    torch.save([1, 2], "list.pt")
    Path("folder").mkdir()
    for name, content in zip(("empty", "text", "cut"), (b"", b"text", b"PK\3\4"), strict=True):
        Path(f"{name}.pt").write_bytes(content)
    Path("x.safetensors").write_bytes(b"x")
    for name in ("empty.pt", "text.pt", "cut.pt", "x.safetensors", "list.pt", "folder"):
        line = message(rae_encoder.read_weights, name, "--x")
        assert line.startswith(f"--x {name}: not a file of weights (")
    assert message(rae_encoder.read_weights, "none.pt", "--x") == "--x none.pt: no such file"
    for name in ("hub:", "hub:/repo/model.pt", "hub:owner//model.pt"):
        assert "the Hugging Face hub (HFValidationError" in message(rae_encoder.local_file, name, "--x")


READERS = {
    "rae_encoder": lambda path: rae_encoder.read_weights(path, "--x"),
    "timm": lambda path: rae_encoder.load_vit("test_vit", path),
    "LPIPS": lambda path: rae_decoder_train.perceptual_loss(path),
    "dit_dh": lambda path: dit_dh.load(path),
    "fid": lambda path: fid.load_network("test_vit", "adm", path),
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
@pytest.mark.parametrize("reader", READERS)
def test_no_file_of_weights_can_run_code(tmp_path, monkeypatch, reader):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rae_decoder_train.lpips, "LPIPS", nn.Identity)  # VGG-16 has 138 million weights
    torch.save({"format": "rae-flow/1", "model": Malicious()}, "new.pt")
    torch.save({"ema": Malicious()}, "legacy.pt", _use_new_zipfile_serialization=False)
    for name in ("old.pt", "false.safetensors"):
        Path(name).write_bytes(pickle.dumps({"a": Malicious()}))
    for file in ("new.pt", "legacy.pt", "old.pt", "false.safetensors"):
        assert file in message(READERS[reader], file)
        assert not Path("hacked").exists(), file
    torch.load("new.pt", weights_only=False)
    assert Path("hacked").exists()  # it would have


def test_nothing_else_reads_code():
    """The sixth reader is seen, too."""
    for script in (*SCRIPTS, dit_dh):
        source = re.sub("#.*", "", Path(script.__file__).read_text())
        calls = re.findall(r"torch\.load\(.*|load_state_dict\((?:local_file|path).*|hub\.load\w+\(.*", source)
        assert all("weights_only=True" in call for call in calls), calls
        assert not re.search(r"import pickle|allow_pickle=True|weights_only=False", source)


def test_hashes_are_of_values(tmp_path):
    """Of all of them in memory; of a file's only the first, so that it is not read whole."""
    a = torch.arange(6.0).view(2, 3)
    assert rae_encoder.fingerprint([a, a]) == rae_encoder.fingerprint(iter([a.clone(), a]))
    others = [[a], [a, a + 1], [a.bfloat16(), a], [a, a.long()]]
    assert len({rae_encoder.fingerprint(tensors) for tensors in ([a, a], *others)}) == 5
    assert rae_encoder.fingerprint([a.T.contiguous().T]) == rae_encoder.fingerprint([a])

    zeros = torch.zeros(5000)
    state = {"b": a, "a": zeros}
    other = {"b": a + 1, "a": zeros}
    assert rae_encoder.weights_hash(state) != rae_encoder.weights_hash(other)
    late = {"b": a, "a": zeros.index_fill(0, torch.tensor([4999]), 1)}
    for file in (
        {"a": zeros, "b": a},
        {"model": state, "step": 3},
        {"ema": state, "model": other},
        {"module": {"state_dict": state}},
        late,
    ):
        assert rae_encoder.weights_hash(file) == rae_encoder.weights_hash(state)


def test_what_two_files_both_know_must_be_the_same():
    flow = dict(encoder="a", encoder_hash="b", encoder_size=64, layers=None, latent_shape=[4, 2, 2])
    rae_encoder.check_same(flow, "flow.pt", {**flow, "noise_tau": 0.8}, "decoder.pt")
    rae_encoder.check_same(flow, "flow.pt", {}, "released.pt")  # says nothing of its encoder
    others = dict(encoder="c", encoder_hash="d", encoder_size=32, layers=[1], latent_shape=[4, 4, 4])
    for key, other in others.items():
        line = message(rae_encoder.check_same, flow, "flow.pt", {**flow, key: other}, "decoder.pt")
        assert line.startswith(f"flow.pt has {key} {flow[key]}, decoder.pt has {other}: they don't")

    # Other keys and another remedy are the caller's.
    rae_encoder.check_same({"x": 1}, "a", {"x": 2}, "b")
    options = ({"x": 1}, "a", {"x": list(range(1000))}, "b", ("x",), "use another --out")
    line = message(rae_encoder.check_same, *options)
    assert line.startswith("a has x 1, b has") and line.endswith(": use another --out") and len(line) < 200


# The plumbing of a training


def silent():
    return tqdm(disable=True)


def test_a_step_depends_on_seed_step_and_rank():
    def draw(*place):
        flow_train.seed_step(*place)
        return tuple(torch.rand(4).tolist())

    places = list(itertools.product(range(2), range(3), range(3)))
    draws = [draw(*place) for place in places]
    assert len(set(draws)) == 18 and draw(*places[11]) == draws[11]


def test_the_optimizer_is_the_papers():
    (group,) = flow_train.adamw(nn.Linear(2, 2)).param_groups
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.95), 1e-8, 0)
    assert len(group["params"]) == 2 and not group["amsgrad"] and not group["maximize"]


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.9995])
def test_ema_is_its_closed_form(decay):
    network = nn.Linear(3, 2)
    ema = copy.deepcopy(network).requires_grad_(False)
    start = ema.weight.double()
    weights = [torch.randn(2, 3) for _ in range(5)]
    for weight in weights:
        network.weight.data.copy_(weight)
        flow_train.update_ema(ema, network, decay)
        assert torch.equal(network.weight, weight)
    expected = decay**5 * start
    for k, weight in enumerate(weights):
        expected = expected + (1 - decay) * decay ** (4 - k) * weight.double()
    assert torch.allclose(ema.weight.double(), expected, atol=1e-6)
    assert torch.equal(ema.bias, network.bias)


def test_ten_skipped_updates_in_a_row_of_one_network_end_the_run(capsys):
    """Two networks have two counts; nine are said and forgotten."""
    skipped = Counter()
    recent = defaultdict(list)
    stops = []
    terms = {"l1": torch.tensor(math.nan), "gan": torch.tensor(0.12345)}

    def count(network, bad, step=7, progress=None):
        with tqdm(file=sys.stderr) if progress is None else progress as bar:
            flow_train.record_update(network, step, terms, not bad, recent, skipped, stops, bar)

    for _ in range(9):
        count("decoder", bad=True)
        count("discriminator", bad=False)
    count("decoder", bad=False)
    assert [len(values) for values in recent.values()] == [10, 10]  # those that were not skipped
    for _ in range(9):
        count("decoder", bad=True, progress=silent())
        count("discriminator", bad=True, progress=silent())
    assert skipped["all"] == 27 and stops == []
    printed = capsys.readouterr().err
    assert printed.count("step 7: the decoder's update was skipped, not finite: l1 nan, gan 0.123") == 9
    assert "discriminator" not in printed  # other ranks are silent
    count("discriminator", bad=True, step=8)
    assert str(stops[0]).startswith(
        "step 8: 10 updates of the discriminator in a row not finite; try a lower --lr"
    )
    count("decoder", bad=True, step=8)
    assert len(stops) == 2


def test_a_report_is_the_mean_of_the_updates_since_the_last(tmp_path):
    terms = {"loss": [1.0, 2.0, 6.0], "l1": [4.0, 0.0], "gan": [5.0]}
    recent = {name: [torch.tensor(value) for value in values] for name, values in terms.items()}
    with open(tmp_path / "log", "w") as file:
        flow_train.report((file, None), silent(), 8, recent, 3e-4, Counter(all=1))
    record = json.loads((tmp_path / "log").read_text())
    del record["time"]
    assert record == {"step": 8, "loss": 3.0, "l1": 2.0, "gan": 5.0, "lr": 3e-4, "skipped": 1}
    assert recent == {}

    # Steps that were all skipped have no loss, and ranks without a log write none.
    with open(tmp_path / "log", "w") as file:
        flow_train.report((file, None), silent(), 8, {}, 3e-4, Counter())
        flow_train.report(None, silent(), 8, {"loss": [torch.tensor(1.0)]}, 3e-4, Counter())
    (line,) = (tmp_path / "log").read_text().splitlines()
    assert "loss" not in json.loads(line)


def trained():
    """A small network that took a step, and its state as the trainings hold it."""
    network = nn.Linear(64, 64)
    optimizer = flow_train.adamw(network)
    network(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    return {"model": network, "ema": copy.deepcopy(network), "optimizer": optimizer}


def test_a_run_goes_on_where_its_file_ends_and_lets_go_of_it(tmp_path, monkeypatch):
    """Windows can't replace a file that is mapped, and Linux would keep the old one on the disk."""
    args = argparse.Namespace(out=str(tmp_path), keep_every=5)
    state = trained()
    replace = mock.Mock(wraps=os.replace)
    monkeypatch.setattr(os, "replace", replace)
    config = {"encoder": "x"}
    flow_train.save(args, state, 5, {"config": config})
    written = [os.path.basename(call.args[1]) for call in replace.call_args_list]
    assert written == ["last.pt", "0000005.pt"]  # both whole, or not there
    last = read(tmp_path / "last.pt")
    assert last.keys() == {"format", "step", "args", "model", "ema", "optimizer", "config"}
    assert last["format"] == flow_train.FORMAT and last["args"] == vars(args)

    def start():
        return {**rae_encoder.read_weights(tmp_path / "last.pt", "--resume"), "path": "last.pt"}

    other = trained()
    assert flow_train.resume(start(), config, other, 9) == 5
    for name, owner in state.items():
        assert equal(owner.state_dict(), other[name].state_dict()), name
    maps = Path("/proc/self/maps")
    if maps.exists():
        mapped = start()
        assert f"{tmp_path}/last.pt" in maps.read_text()  # it is, as long as it is read
        del mapped
        assert f"{tmp_path}/last.pt" not in maps.read_text()
    assert flow_train.resume({}, config, other, 9) == 0

    line = message(flow_train.resume, start(), config, other, 4)
    assert line.startswith("last.pt is at step 5, this run ends at 4: ") and "--steps" in line
    line = message(flow_train.resume, start(), {"encoder": "y"}, other, 9)
    assert line == "this run has encoder y, last.pt has x: same flags, or another --out"
