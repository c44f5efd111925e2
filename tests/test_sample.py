"""sample.py against closed forms, and its images against themselves: any batch size, ranks, resume."""

import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import time
import tracemalloc
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    BODY_AND_HEAD,
    CLASSES,
    SHAPE,
    excite,
    message,
    narrow,
    read,
    run_ranks,
    start_ranks,
    write_decoder,
)
from helpers import write_flow as write_any_flow
from PIL import Image
from torch.utils.data import Subset

import dit_dh
import fid
import rae_encoder
import sample
from rae_decoder_train import DECODERS, Decoder
from rae_encoder import ImageData, weights_hash

FAST = "--steps 3 --cfg 1 --precision fp32 --device cpu --workers 0"
PAIR = f"--flow flow.pt --decoder decoder.pt {FAST}"
RECONSTRUCT = "--reconstruct photos --decoder decoder.pt --workers 0 --batch-size 2 --out out"


def write_flow(path, name="DiT-DH-S", seed=0, data=None, **changes):
    """A flow's checkpoint; changes are to its config."""
    known = {"layers": None, "prediction": "v", "base_depth": None, "decoder": None}
    write_any_flow(path, name, seed, **(known | changes))
    if data:
        alter(path, args={"data": str(data)})
    return str(path)


def alter(path, to=None, **values):
    """Replaces entries of the checkpoint at `path`; returns where the new one lies."""
    torch.save(read(path) | values, to or path)
    return str(to or path)


@pytest.fixture(autouse=True, scope="module")
def small_networks():
    """A decoder of few weights, and one thread, with which networks of this size are fastest."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DECODERS, "ViT-mini", (16, 2, 2, 24))
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with flow.pt and decoder.pt, an untrained pair."""
    folder = tmp_path_factory.mktemp("checkpoints")
    write_flow(folder / "flow.pt")
    write_decoder(folder / "decoder.pt")
    return folder


@pytest.fixture
def work(folder, tmp_path, monkeypatch):
    """A working folder with copies of the pair."""
    monkeypatch.chdir(tmp_path)
    for name in ("flow.pt", "decoder.pt"):
        shutil.copy(folder / name, tmp_path)
    return tmp_path


def run(*flags):
    sample.main(" ".join(map(str, flags)).split())


def refusal(*flags):
    return message(run, *flags)


def pixels(folder):
    """Every PNG of a folder, by its name."""
    return {path.name: np.array(Image.open(path)).astype(int) for path in sorted(Path(folder).glob("*.png"))}


def difference(folder, other):
    a = pixels(folder)
    b = pixels(other)
    assert a.keys() == b.keys() and a
    return max(np.abs(a[name] - b[name]).max() for name in a)


def settings_of(folder):
    return json.loads(Path(folder, "settings.json").read_text())


@pytest.fixture(scope="module")
def twenty(folder, tmp_path_factory):
    """Twenty samples in one batch, guided: what other ways of sampling must repeat; with their flags."""
    out = tmp_path_factory.mktemp("twenty") / "samples"
    pair = f"--flow {folder}/flow.pt --decoder {folder}/decoder.pt"
    flags = f"{pair} {FAST} -n 20 --cfg 1.5 --seed 5"
    run(flags, "--batch-size 64 --npz --out", out)
    return out, flags


@pytest.fixture
def copy_of_twenty(twenty, tmp_path):
    shutil.copytree(twenty[0], tmp_path / "samples")
    return tmp_path / "samples"


# The time grid and the solvers


def test_time_grid():
    """Section 4.2: t' = a t / (1 + (a-1) t) on even times; and the released code's own 50 points."""
    a = math.sqrt(768 * 16 * 16 / 4096)
    grid = sample.time_grid(10, a)
    assert len(grid) == 11 and grid[0] == 1 and grid[-1] == 0
    for i in range(11):
        t = 1 - i / 10
        assert abs(grid[i].item() - a * t / (1 + (a - 1) * t)) < 1e-12
    released = torch.linspace(1, 0.001, 50)
    released = a * released / (1 + (a - 1) * released)
    torch.testing.assert_close(sample.time_grid(49, a, 0.001).float(), released, rtol=1e-6, atol=1e-7)
    assert abs(sample.time_grid(49, a, 0.001)[-1].item() - 0.0069) < 5e-5
    # No time falls out of the interval (0, 1) of guidance, whatever the shift.
    assert all(sample.time_grid(2, a / 100)[0] <= 1 for a in range(1, 1000))


MU = torch.tensor([0.7, -1.2, 0.3], dtype=torch.float64)
ROOT_SIGMA = torch.tensor([[1.1, 0.3, 0.0], [0.3, 0.6, -0.2], [0.0, -0.2, 0.9]], dtype=torch.float64)
SIGMA = ROOT_SIGMA @ ROOT_SIGMA


def gaussian_velocity(x, t):
    """E[eps - x0 | x_t = x] for x0 ~ N(MU, SIGMA), eps ~ N(0, 1), x_t = (1-t) x0 + t eps; x (B, 3)."""
    eye = torch.eye(3, dtype=x.dtype)
    covariance = (1 - t) ** 2 * SIGMA + t**2 * eye
    gain = torch.linalg.solve(covariance, t * eye - (1 - t) * SIGMA).T
    return (x - (1 - t) * MU) @ gain.T - MU


def test_solvers_orders():
    """Against the flow's exact map, Euler's error falls like 1/N and Heun's like 1/N^2."""
    noise = torch.randn(200, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = MU + noise @ ROOT_SIGMA  # x_t = (1-t) MU + ((1-t)^2 SIGMA + t^2)^(1/2) noise solves the equation
    for heun, order in ((False, 1), (True, 2)):
        errors = []
        for steps in (32, 64, 128):
            grid = sample.time_grid(steps, 1.5)
            errors.append((sample.sample_latents(gaussian_velocity, noise, grid, heun=heun) - exact).norm())
        slopes = [math.log2(errors[i] / errors[i + 1]) for i in range(2)]
        assert all(abs(slope - order) < 0.12 for slope in slopes), (heun, slopes)


def test_heun_ends_with_euler():
    """The network is called twice on every interval but the last, and never at t = 0."""
    times = []
    velocity = lambda x, t: times.append(t) or -x  # noqa: E731
    grid = torch.tensor([1.0, 0.5, 0.0])
    x = sample.sample_latents(velocity, torch.ones(1, 1, 1, 1), grid, heun=True)
    assert times == [1.0, 0.5, 0.5]
    # 1 + 0.5 * (1 + 1.5) / 2 = 1.625; then Euler: 1.625 * 1.5
    assert x.item() == pytest.approx(1.625 * 1.5)
    # The name of a solver is not taken for one.
    with pytest.raises(TypeError):
        sample.sample_latents(velocity, x, grid, "midpoint")


# Guidance


class Counting:
    """A network whose velocity depends on image, time and label; its base is half of it. Counts its calls."""

    num_classes = 7

    def __init__(self, slope):
        self.slope = slope
        self.calls = 0
        self.images = 0

    def __call__(self, x, t, y, with_base=False):
        self.calls += 1
        self.images += len(x)
        assert t.shape == y.shape == (len(x),)
        v = self.slope * x + t.view(-1, 1, 1, 1) + y.view(-1, 1, 1, 1)
        return (v, v / 2) if with_base else v


def test_guidance_formulas():
    x = torch.randn(2, 4, 1, 1)
    y = torch.tensor([0, 2])
    labels = y.view(-1, 1, 1, 1)
    model = Counting(2.0)
    weak = Counting(0.5)
    own = 2 * x + 0.3 + labels
    null = 2 * x + 0.3 + 7  # the label after the last class
    assert_close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)

    assert_close(sample.guided_velocity(model, x, 0.3, y, scale=1.42), null + 1.42 * (own - null))
    assert (model.calls, model.images) == (1, 4)  # both in one call of twice the batch
    base = 0.5 * x + 0.3 + labels  # the weak network has the same label
    assert_close(sample.guided_velocity(model, x, 0.3, y, weak, scale=1.42), base + 1.42 * (own - base))
    assert (model.calls, weak.calls, weak.images) == (2, 1, 2)
    assert_close(sample.guided_velocity(model, x, 0.3, y), own)
    assert (model.calls, weak.calls) == (3, 1)

    # RAEv2's eq. 3 on both branches, then CFG; a weak network keeps its full output.
    inner = lambda v: v / 2 + 1.78 * (v - v / 2)  # noqa: E731
    assert_close(sample.guided_velocity(model, x, 0.3, y, internal=1.78), inner(own))
    assert_close(sample.guided_velocity(model, x, 0.3, y, internal=0.0), own / 2)
    both = inner(null) + 1.5 * (inner(own) - inner(null))
    assert_close(sample.guided_velocity(model, x, 0.3, y, scale=1.5, internal=1.78), both)
    both = base + 1.5 * (inner(own) - base)
    assert_close(sample.guided_velocity(model, x, 0.3, y, weak, scale=1.5, internal=1.78), both)
    assert (model.calls, weak.calls) == (7, 2)


@pytest.mark.parametrize("use_weak", [False, True])
def test_no_second_call_outside_the_interval(use_weak):
    """Of the times 1, .75, .5, .25 the interval [.25, .6] has two, its ends included."""
    y = torch.tensor([0, 1, 2])
    model = Counting(1.0)
    weak = Counting(2.0)
    guided = {"weak": weak if use_weak else None, "scale": 2.0, "interval": (0.25, 0.6)}

    def velocity(x, t, **options):
        return sample.guided_velocity(model, x, t, y, **guided, **options)

    x = torch.ones(3, 1, 1, 1)
    sample.sample_latents(velocity, x, sample.time_grid(4, 1.0))
    assert (model.calls, model.images) == (4, 12 if use_weak else 3 + 3 + 6 + 6)
    assert (weak.calls, weak.images) == ((2, 6) if use_weak else (0, 0))
    # Nor is a base asked for.
    assert torch.equal(velocity(x, 0.9, internal=5.0), sample.guided_velocity(model, x, 0.9, y))


@torch.no_grad()
def test_networks_see_one_time_a_batch_and_answer_in_fp32():
    network = excite(dit_dh.build("DiT-DH-S", SHAPE, CLASSES, base_depth=1, **BODY_AND_HEAD).eval(), 0)
    x = torch.randn(2, *SHAPE)
    y = torch.tensor([0, 2])
    times = torch.tensor([0.3, 0.3])
    assert torch.equal(sample.network_velocity(network, x, 0.3, y), network(x, times, y))
    with torch.autocast("cpu", torch.bfloat16):
        assert network(x, times, y).dtype == torch.bfloat16
        for internal in (None, 1.5):
            assert sample.network_velocity(network, x, 0.3, y, internal).dtype == torch.float32


# Noise and pixels


def test_pixels_are_rounded():
    levels = torch.tensor([-0.1, 0.0, 0.4 / 255, 0.6 / 255, 254.4 / 255, 254.6 / 255, 1.3])
    assert sample.to_pixels(levels.expand(1, 3, 1, 7))[0, 0, :, 0].tolist() == [0, 0, 0, 1, 254, 255, 255]


def test_seeds():
    """No two seeds and indices have the same noise, up to the bounds of both."""
    for i in (0, 7, 999_999):
        expected = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2_000_000 + i))
        assert torch.equal(sample.draw_noise([i], SHAPE, 2)[0], expected)
    pairs = [(seed, i) for seed in (0, 1, 2, 4292, 4293) for i in (0, 1, 967_295, 967_296, 999_999)]
    noise = {tuple(sample.draw_noise([i], (3,), seed)[0].tolist()) for seed, i in pairs}
    assert len(noise) == len(pairs)
    beyond = {tuple(sample.draw_noise([i], (3,), seed)[0].tolist()) for seed, i in [(0, 0), (4294, 967_296)]}
    assert len(beyond) == 1  # why 4,293 is the last


# The whole command; test_by_hand.py compares its images with the formulas


@pytest.mark.slow
def test_released_files(work):
    """Bare state dicts and --stats give the same PNGs as the checkpoint, whose shift is the formula's."""
    flow = read(write_flow("flow.pt", shift=1.0))  # 64 * 2 * 2 / 4096 is below 1
    sizes = dict(name="ViT-mini", channels=64, grid=2, patch_size=16)
    sizes |= dict(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])  # ImageNet's
    decoder = read(write_decoder("decoder.pt", decoder=sizes))
    torch.save(flow["ema"], "stage2_model.pt")
    torch.save(decoder["ema"] | {"decoder_pos_embed": Decoder(**sizes).decoder_pos_embed}, "model.pt")
    torch.save({"mean": flow["mean"], "var": flow["var"]}, "stat.pt")
    bare = f"--flow stage2_model.pt --decoder model.pt --stats stat.pt {FAST}"
    run(PAIR, "-n 4 --out ours")
    run(bare, "-n 4 --out released")
    assert difference("ours", "released") == 0
    assert settings_of("released") == settings_of("ours")


@pytest.mark.parametrize("size", [1, 7])
def test_batch_size(twenty, tmp_path, size):
    run(twenty[1], "--batch-size", size, "--out", tmp_path / "samples")
    assert difference(twenty[0], tmp_path / "samples") <= 1


@pytest.mark.slow
def test_the_demos_network_alone_is_guided_by_default(work, capsys):
    """Whether --flow names it or not; flags win; and its images are marked as the demo's."""
    alter("flow.pt", "demo.pt", args={"preset": "demo"})
    alter("flow.pt", "small.pt", args={"preset": "small"})
    common = "--decoder decoder.pt -n 1 --precision fp32"
    for k, (flags, steps, scale, demo) in enumerate(
        (
            ("--flow demo.pt", 25, 2.0, True),
            ("--flow demo.pt --cfg 0 --steps 3", 3, 0.0, True),
            ("--flow small.pt", 50, 1.0, False),
            ("--flow demo.pt --preset imagenet256 -n 1 --cfg 1", 25, 1.0, True),
        )
    ):
        run(common, flags, "--out", k)
        settings = settings_of(str(k))
        assert (settings["steps"], settings["cfg"], settings["demo"]) == (steps, scale, demo)
        assert ("The demo" in capsys.readouterr().err) is demo


def test_numbers_and_scales_by_default():
    """A preset's weak network has the paper's scale, and internal guidance its own (see test_hub.py, too)."""
    for flags, number in (
        ("", 400),
        ("--preset imagenet512 -n 7", 7),
        ("--preset imagenet256 --reconstruct photos", None),
        ("--reconstruct photos -n 3", 3),
    ):
        assert sample.parse_args(flags.split()).num == number
    assert sample.parse_args(["--preset", "imagenet512"]).batch_size == 64
    args = sample.parse_args(["--internal-guidance", "1.78", "--guidance-interval", "0.1", "1"])
    assert (args.internal_guidance, args.guidance_interval, args.cfg) == (1.78, [0.1, 1.0], None)


# Classes


def test_class_numbers():
    """Names go before numbers; a name of several classes is refused with theirs."""
    digits = ["0", "1", "10", "2"]  # as folders of digits in another order
    assert sample.class_numbers("10,2,0", digits, 4) == [2, 3, 0]
    assert sample.class_numbers("3", digits, 4) == [3]
    assert sample.class_numbers(None, digits, 4) == [0, 1, 2, 3]
    assert sample.class_numbers("0", [""], 1) == [0]  # one class has no name
    line = message(sample.class_numbers, "owl,bat", ["bat", "owl", "bat"], 3)
    assert "--classes bat" in line and "[0, 2]" in line
    for word in ("", "-1", "4", "x", "1.0", "²"):
        line = message(sample.class_numbers, f"0,{word}", digits, 4)
        assert f"--classes {word}:" in line and "0 to 3" in line and "0, 1, 10, 2" in line


def test_names_of_imagenet():
    """A released network keeps no names: they are timm's, the first of each class's synonyms."""
    assert sample.class_numbers("golden retriever,tabby,tench,3", [], 1000) == [207, 281, 0, 3]
    line = message(sample.class_numbers, "crane", [], 1000)
    assert "[134, 517]" in line and "0 to 999" in line  # a bird and a machine
    assert "tench, goldfish" in message(sample.class_numbers, "cat", [], 1000)
    assert "0 to 9" in message(sample.class_numbers, "tench", [], 10)


# Files that belong together


def own_decoder(path="decoder.pt"):
    return {"path": path, "hash": weights_hash(read(path))}


def test_the_flow_knows_its_decoder(work):
    write_flow("flow.pt", decoder=own_decoder())
    alone = f"--flow flow.pt {FAST} -n 2"
    run(alone, "--out alone")
    run(PAIR, "-n 2 --out pair")
    assert difference("alone", "pair") == 0

    # Another decoder in its place, such as the next run's, is refused, but taken where it is named.
    ema = read("decoder.pt")["ema"]
    ema["decoder_pred.bias"] = ema["decoder_pred.bias"] + 0.5
    alter("decoder.pt", ema=ema)
    line = refusal(alone, "--out other")
    assert "--flow flow.pt" in line and "decoder.pt is no longer" in line and "--decoder FILE" in line
    run(PAIR, "-n 2 --out other")
    assert difference("other", "pair") > 3
    os.remove("decoder.pt")
    assert refusal(alone, "--out none") == "--flow flow.pt needs its --decoder decoder.pt: no such file"
    write_flow("flow.pt")
    assert "does not tell its decoder; name it by --decoder FILE" in refusal(alone, "--out none")


def test_which_decoder(work):
    """The one that a flag names, the flow's own, the preset's."""
    preset = ["--preset", "imagenet256"]
    released = sample.parse_args(preset).decoder
    own = {"decoder": own_decoder()}
    assert sample.choose_decoder(sample.parse_args(preset), {}) == released
    assert sample.choose_decoder(sample.parse_args(preset), own) == "decoder.pt"
    assert sample.choose_decoder(sample.parse_args([*preset, "--decoder", "x.pt"]), own) == "x.pt"


def test_a_flow_of_raev2s_preset_tells_that_its_bare_decoder_puts_out_pixels(work):
    torch.save(read("decoder.pt")["ema"], "bare.pt")
    alter("flow.pt", "raev2.pt", args={"preset": "raev2"})
    for out, flags in (("flag", "flow.pt --raw-pixels"), ("preset", "raev2.pt"), ("neither", "flow.pt")):
        run(f"--decoder bare.pt -n 2 --steps 2 --out {out} --flow {flags}")
    assert difference("flag", "preset") == 0
    assert difference("flag", "neither") > 3


@pytest.mark.slow
def test_files_that_do_not_fit(work):
    """Each file is compared by what its checkpoint tells, not by shapes alone, before anything is done."""
    for name, config in (
        ("layers", {"layers": [1, 2, 3]}),
        ("names", {"classes": ["cat", "dog", "bird"]}),
        ("two", {"classes": ["cat", "dog"], "num_classes": 2}),
        ("pixels", {"image_size": 64}),
        ("vit", {"encoder": "test_vit2", "encoder_hash": "1" * 12}),
        ("grid", {"latent_shape": [64, 4, 4]}),
    ):
        write_flow(f"{name}.pt", seed=2, **config)
    for name in ("flow", "two", "vit"):
        torch.save(read(f"{name}.pt")["ema"], f"bare-{name}.pt")
    dit = read(write_flow("dit.pt", "DiT-S"))["ema"]
    torch.save(dit, "bare-dit.pt")
    write_decoder("512.pt", encoder_size=64, image_size=64, latent_shape=[64, 4, 4])
    torch.save({"mean": torch.zeros(SHAPE), "var": torch.ones(SHAPE)}, "stats.pt")
    known = {"encoder_hash": read("flow.pt")["config"]["encoder_hash"], "layers": [1, 2]}
    alter("stats.pt", "stats-of-layers.pt", config=known)
    mean = read("flow.pt")["mean"]
    alter("flow.pt", "means.pt", mean=mean + 0.05)
    alter("flow.pt", "rounded.pt", mean=mean + 1e-4)
    Path("junk.pt").write_text("junk")
    Path("empty").mkdir()

    weak = "--cfg 2 --autoguide"
    for flags, words in (
        ("--decoder none.pt", ("--decoder none.pt: no such file",)),
        ("--flow none.pt", ("--flow none.pt: no such file",)),
        ("--flow junk.pt", ("--flow junk.pt: not a flow checkpoint",)),
        ("--flow decoder.pt", ("--flow decoder.pt: not a flow checkpoint but rae-decoder/1",)),
        ("--flow bare-dit.pt", ("--flow bare-dit.pt: not a flow checkpoint",)),
        ("--decoder junk.pt", ("--decoder junk.pt",)),
        ("--decoder dit.pt", ("--decoder dit.pt: not a decoder",)),
        ("--flow vit.pt", ("--flow vit.pt has encoder", "--decoder decoder.pt has")),
        ("--flow grid.pt", ("latent_shape [64, 4, 4]", "[64, 2, 2]")),
        ("--flow layers.pt", ("--flow layers.pt has layers [1, 2, 3]", "--decoder decoder.pt has None")),
        ("--decoder 512.pt", ("encoder_size 32", "512.pt has 64")),
        (f"{weak} none.pt", ("--autoguide none.pt: no such file",)),
        (f"{weak} layers.pt", ("layers None", "--autoguide layers.pt has [1, 2, 3]")),
        (f"{weak} names.pt", ("classes ['cat', 'dog', '7']", "names.pt has ['cat', 'dog', 'bird']")),
        (f"{weak} two.pt", ("num_classes 3", "two.pt has 2")),
        (f"{weak} bare-two.pt", ("num_classes 3", "bare-two.pt has 2")),
        (f"{weak} means.pt", ("--autoguide means.pt: trained with other latent statistics",)),
        ("--stats layers.pt", ("layers None", "--stats layers.pt has [1, 2, 3]")),
        ("--stats pixels.pt", ("image_size 32", "--stats pixels.pt has 64")),
        ("--flow bare-flow.pt", ("--flow bare-flow.pt", "--stats FILE")),
        # A bare flow is of the latents that its decoder knows.
        ("--flow bare-flow.pt --stats stats-of-layers.pt", ("layers None", "of-layers.pt has [1, 2]")),
        ("--internal-guidance 1.5", ("--internal-guidance: flow.pt has no base output",)),
        ("--flow dit.pt --internal-guidance 1.5", ("--internal-guidance: dit.pt has no base output",)),
    ):
        line = refusal(PAIR, flags, "--out out")
        assert all(word in line for word in words), line
    for source in ("empty", "nowhere"):
        assert f"--reconstruct {source}" in refusal("--decoder decoder.pt --reconstruct", source, "--out out")
    assert not Path("out").exists()

    fit = (f"{weak} dit.pt", f"{weak} rounded.pt", f"{weak} bare-vit.pt", "--stats stats.pt")
    for k, flags in enumerate((*fit, "--flow bare-vit.pt --stats stats.pt")):
        run(PAIR, flags, "-n 1 --out", k)


def test_encoder_of_a_bare_decoder(work):
    """Its pixels have the mean and std of the flow's encoder, of a flag, or of DINOv2-B."""
    torch.save(read("decoder.pt")["ema"], "bare.pt")
    siglip = "vit_base_patch16_siglip_256.v2_webli"
    for flags, config, encoder, mean in (
        ("", {}, "vit_base_patch14_reg4_dinov2.lvd142m", [0.485, 0.456, 0.406]),
        ("", {"encoder": siglip}, siglip, [0.5] * 3),
        ("--encoder siglip2-base", {}, siglip, [0.5] * 3),
    ):
        args = sample.parse_args(flags.split())
        decoder, known = sample.open_decoder(args, "bare.pt", config, torch.device("cpu"))
        assert (known["encoder"], known["latent_shape"]) == (encoder, list(SHAPE))
        assert decoder.mean.flatten().tolist() == pytest.approx(mean)
    line = message(sample.open_decoder, args, "bare.pt", {"encoder": "test_vit"}, torch.device("cpu"))
    assert "has encoder test_vit" in line and "siglip" in line


# The folder: resume, settings, what lies there


def test_resume(twenty, copy_of_twenty):
    """What a killed run or a full disk left becomes the same folder: holes, a cut PNG, an empty one."""
    out = copy_of_twenty
    marked = Image.new("RGB", (32, 32), "red")
    marked.save(out / "000001.png")  # to see that what is there stays
    for i in (0, 3, 4, 19):
        os.remove(out / f"{i:06d}.png")
    for i, size in ((7, 0), (8, 5), (11, -1), (18, -12)):
        content = (out / f"{i:06d}.png").read_bytes()
        (out / f"{i:06d}.png").write_bytes(content[:size])
    (out / "000003.png.1.tmp").write_bytes(b"half")
    run(twenty[1], "--batch-size 4 --out", out)
    assert (pixels(out)["000001.png"] == np.array(marked)).all()
    shutil.copy(twenty[0] / "000001.png", out)
    assert difference(twenty[0], out) <= 1


def test_the_last_line(work, capsys):
    """How many images are there, others that fid.py would count, and the next command, to be pasted."""
    write_flow("flow.pt", data="my photos")
    (work / "bin").mkdir()
    (work / "bin/python").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (work / "bin/python").chmod(0o755)
    flags = [*PAIR.split(), "--out", "my samples"]
    sample.main([*flags, "-n", "3"])
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("all 3 images are in my samples; next: ")
    command = line.split("next: ")[1]
    path = {"PATH": f"{work}/bin:/bin"}
    typed = subprocess.check_output(command, shell=True, text=True, env=os.environ | path)
    assert typed.splitlines() == ["fid.py", "my samples"]
    args = fid.parse_args(shlex.split(command)[2:])
    assert (args.ref, args.crop) == (str(work / "my photos"), 32)

    sample.main([*flags, "-n", "3"])  # nothing is missing
    assert "all 3 images are" in capsys.readouterr().err.splitlines()[-1]
    sample.main([*flags, "-n", "2"])
    assert "2 images are in my samples (and 1 others, " in capsys.readouterr().err.splitlines()[-1]

    # Nothing is known of the data of released files.
    write_flow("flow.pt")
    run(PAIR, "-n 1 --out released")
    assert capsys.readouterr().err.splitlines()[-1] == "all 1 images are in released"


@pytest.mark.slow
def test_settings_guard(twenty, copy_of_twenty, folder, tmp_path):
    """A folder of other settings is refused, and the message says which; more of the same is welcome."""
    flow = read(folder / "flow.pt")
    other = alter(write_flow(tmp_path / "other.pt", seed=1), mean=flow["mean"])
    later = {}
    for name, key in (("flow", "blocks.0.attn.proj.weight"), ("decoder", "decoder_embed.weight")):
        ema = read(folder / f"{name}.pt")["ema"]
        ema[key] = ema[key] + 1e-6  # one more step of training, under the old name
        later[name] = alter(folder / f"{name}.pt", tmp_path / f"{name}.pt", ema=ema)
    later["mean"] = alter(folder / "flow.pt", tmp_path / "mean.pt", mean=flow["mean"] + 0.01)
    sizes = dict(name="ViT-mini", channels=SHAPE[0], grid=2, patch_size=16, mean=[0.0] * 3, std=[0.25] * 3)
    later["pixels"] = write_decoder(tmp_path / "pixels.pt", decoder=sizes)
    for change, words in (
        ("--seed 6", "seed 5, this run has 6"),
        ("--steps 4", "steps 3, this run has 4"),
        ("--cfg 1.6", "cfg"),
        ("--solver heun", "solver"),
        ("--shift 3", "shift"),
        ("--t-end 0.1", "t_end"),
        ("--classes 1", "classes"),
        ("--guidance-interval 0 0.9", "guidance_interval"),
        (f"--autoguide {other}", "autoguide"),
        ("--precision bf16", "precision"),
        (f"--flow {later['flow']}", "flow"),
        (f"--flow {later['mean']}", "flow"),
        (f"--decoder {later['decoder']}", "decoder"),
        (f"--decoder {later['pixels']}", "decoder"),
    ):
        line = refusal(twenty[1], change, "--out", copy_of_twenty)
        assert line.startswith(f"--out {copy_of_twenty} has {words}") and "name another folder" in line
    assert difference(twenty[0], copy_of_twenty) == 0
    run(twenty[1], "-n 22 --batch-size 64 --out", copy_of_twenty)
    assert len(pixels(copy_of_twenty)) == 22


@pytest.mark.parametrize("content", ["", "junk", "5", "[1, 2]", "{}", '{"editor.fontSize": 12}'])
def test_damaged_settings(tmp_path, content):
    """A settings.json that can't be read, or is another program's."""
    settings = {"steps": 50, "autoguide": None}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    sample.check_folder(str(tmp_path), settings)
    (tmp_path / "settings.json").write_text(content)
    line = message(sample.check_folder, str(tmp_path), settings)
    assert line.startswith(f"--out {tmp_path}") and "name another folder" in line


@pytest.mark.slow
def test_folders_of_others(work):
    """OUT is new, empty, or of this script: nothing is written beside what others left."""
    (work / "photos/cat").mkdir(parents=True)
    Image.new("RGB", (32, 32)).save("photos/cat/1.jpg")
    os.symlink("photos", "link")
    before = sorted(map(str, Path().rglob("*")))
    for out in ("photos", "photos/cat", "photos/.", "link", "."):
        assert "files that are not this script's" in refusal(PAIR, "-n 1 --out", out)
    for out in ("flow.pt", "flow.pt/x"):
        assert f"--out {out}: can't be used" in refusal(PAIR, "-n 1 --out", out)
    # The folder that is read is no place to write into, however it is spelled.
    for source, out in (
        *(("photos", out) for out in ("photos", "link/new", "photos/cat/../new", f"{work}/photos")),
        *((source, "photos/new") for source in ("link", "photos/cat/..")),
    ):
        line = refusal("--reconstruct", source, "--decoder decoder.pt --out", out)
        assert "lies in the folder that --reconstruct reads" in line
    assert sorted(map(str, Path().rglob("*"))) == before
    (work / "empty").mkdir()
    run(PAIR, "-n 1 --out empty")


def test_a_full_disk_ends_the_run(work, monkeypatch):
    """PNGs are written by threads, whose errors are easily lost."""

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    line = refusal(PAIR, "-n 2 --out samples")
    assert "can't be written" in line and "No space left" in line
    assert [path.name for path in Path("samples").iterdir()] == ["settings.json"]


def test_images_that_are_not_finite(work):
    """One line names the first of them, and nothing of its batch is written."""
    ema = read("flow.pt")["ema"]
    ema["y_embedder.embedding_table.weight"][2] = math.inf  # the last class
    alter("flow.pt", ema=ema)
    assert refusal(PAIR, "-n 9 --batch-size 2 --out samples").startswith("image 2 is not finite")
    assert list(pixels("samples")) == ["000000.png", "000001.png"]
    run(PAIR, "-n 9 --classes 0,1 --out others")


def test_only_settings_wait_for_the_disk(work, monkeypatch):
    """An fsync for each of 50,000 PNGs would take longer than some samplers; the sheet is one more file."""
    synced = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.readlink(f"/proc/self/fd/{file}")))
    run(PAIR, "-n 3 --out samples")
    assert len(synced) == 2 and "settings.json" in synced[0] and "samples.png" in synced[1]


# The sheet and the .npz


def test_beside_out(work, monkeypatch):
    """`--out .` has its sheet and its .npz beside the folder."""
    (work / "here").mkdir()
    monkeypatch.chdir(work / "here")
    run("--flow ../flow.pt --decoder ../decoder.pt", FAST, "-n 2 --npz --out .")
    assert {"here.npz", "here.png"} < {path.name for path in work.iterdir()}
    assert sorted(path.name for path in Path().iterdir()) == ["000000.png", "000001.png", "settings.json"]


def test_npz_and_sheet(twenty):
    out = twenty[0]
    images = np.stack(list(pixels(out).values()))
    packed = np.load(f"{out}.npz")
    assert packed["arr_0"].dtype == np.uint8 and packed["arr_0"].shape == (20, 32, 32, 3)
    assert (packed["arr_0"] == images).all()
    assert packed["arr_1"].tolist() == [i % CLASSES for i in range(20)]
    # Full rows alone, and each of 9 columns is of one class
    assert Image.open(f"{out}.png").size == (9 * 32, 2 * 32)


@pytest.mark.parametrize(
    ("number", "classes", "columns", "rows"),
    [(120, 1, 10, 10), (1, 5, 1, 1), (12, 4, 8, 1), (25, 12, 10, 2), (99, 10, 10, 9)],
)
def test_sheet(tmp_path, number, classes, columns, rows):
    files = [tmp_path / f"{i}.png" for i in range(number)]
    for i, file in enumerate(files):
        Image.new("RGB", (4, 4), (i, 7, 255 - i)).save(file)
    sample.write_sheet(str(tmp_path / "sheet.png"), files, classes)
    sheet = np.array(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (4 * rows, 4 * columns, 3)
    assert (sheet[::4, ::4, 0].flatten() == np.arange(columns * rows)).all()
    assert (sheet[..., 1] == 7).all() and (sheet[..., 2] == 255 - sheet[..., 0]).all()


@pytest.mark.slow
def test_npz_needs_no_memory(tmp_path, monkeypatch):
    """50,000 images of 256 px are 10 GB: memory stays flat, and a member of over 4 GB is possible."""
    Image.new("RGB", (128, 128), "red").save(tmp_path / "red.png")
    number = 2000
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 1_000_000)  # instead of 4 GB
    sample.write_npz(str(tmp_path / "warm.npz"), [tmp_path / "red.png"], [0])
    tracemalloc.start()
    sample.write_npz(str(tmp_path / "out.npz"), [tmp_path / "red.png"] * number, [1, 0])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < number * 128 * 128 * 3 / 4
    monkeypatch.undo()
    packed = np.load(tmp_path / "out.npz")
    assert packed["arr_0"].shape == (number, 128, 128, 3) and (packed["arr_0"] == [255, 0, 0]).all()
    assert packed["arr_1"].tolist() == [1, 0] * (number // 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.npz", "red.png", "warm.npz"]


# Reconstruction


@pytest.fixture
def copies(work):
    """Five images in two classes in the folder `photos`, of no square shape, in the order of the data."""
    rng = np.random.default_rng(0)
    for i in range(5):
        path = Path("photos", "ab"[i % 2], f"{i}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        low = rng.integers(0, 256, (4, 5, 3)).astype(np.uint8)
        Image.fromarray(low).resize((50, 40), Image.Resampling.BICUBIC).save(path)
    return sorted(Path("photos").rglob("*.png"))


def test_reconstruct(copies, capsys, monkeypatch):
    """What is there stays and counts; no noise is drawn without its flag (the images: test_by_hand.py)."""
    monkeypatch.setattr(sample, "draw_noise", None)
    run(RECONSTRUCT)
    printed, last = capsys.readouterr()
    assert Image.open("out.png").size == (5 * 32, 32)
    assert last.splitlines()[-1] == "all 5 images are in out; next: python fid.py out"
    settings = settings_of("out")
    assert settings["precision"] == "fp32"  # without a flag
    reference = str(Path("photos").resolve())
    assert (settings["reference"], settings["crop"], settings["demo"]) == (reference, 32, False)
    os.remove("out/000002.png")
    run(RECONSTRUCT)
    assert json.loads(capsys.readouterr().out) == pytest.approx(json.loads(printed), abs=1e-6)
    assert "has num 5, this run has 2" in refusal(RECONSTRUCT, "-n 2")
    # Samples share no folder with reconstructions.
    assert "--out out has flow None" in refusal(PAIR, "--out out")


def test_reconstruct_one_file(copies, capsys):
    """One file is a folder of one, with which no set of images can be compared."""
    run(RECONSTRUCT)
    run(RECONSTRUCT, "--out one --reconstruct", copies[3])
    printed, last = capsys.readouterr()
    assert abs(pixels("one")["000000.png"] - pixels("out")["000003.png"]).max() <= 1
    assert json.loads(printed.splitlines()[-1])["images"] == 1
    assert settings_of("one")["reference"] is None and last.splitlines()[-1] == "all 1 images are in one"


def test_reconstructed_images_are_known_by_content(copies):
    """A folder has many names; another picture under an old name is another set of images."""
    run(RECONSTRUCT)
    run(RECONSTRUCT, "--reconstruct ./photos/../photos/")
    time_of_change = copies[1].stat().st_mtime_ns
    os.utime(copies[1], ns=(0, time_of_change + 1))
    assert "--out out has images" in refusal(RECONSTRUCT)
    os.utime(copies[1], ns=(0, time_of_change))
    run(RECONSTRUCT)


@pytest.mark.slow
def test_reconstruct_with_another_encoder(copies):
    """What a flag says of the encoder must fit to what the decoder was trained with."""
    write_decoder("layers.pt", layers=[1, 2])
    torch.save(rae_encoder.load_vit("test_vit", "random").state_dict(), "vit.pt")
    state = read("vit.pt")
    state["blocks.0.attn.proj.bias"] = state["blocks.0.attn.proj.bias"] + 1
    torch.save(state, "vit2.pt")
    for flags, words in (
        ("--encoder-weights vit2.pt", ("has encoder_hash", "--decoder decoder.pt has")),
        ("--layers 0,1", ("has layers [0, 1]", "--decoder decoder.pt has None")),
        ("--decoder layers.pt --layers last", ("has layers None", "--decoder layers.pt has [1, 2]")),
        ("--encoder test_vit2 --encoder-weights random", ("encoder test_vit2 has",)),
    ):
        line = refusal(RECONSTRUCT, flags)
        assert all(word in line for word in words), line
    assert not Path("out").exists()
    run(RECONSTRUCT, "--encoder test_vit --encoder-weights vit.pt")


@pytest.mark.slow
def test_broken_images(copies, capsys):
    """They are named, or replaced and counted; a link to nothing is one of them."""
    copies[1].write_bytes(b"broken")
    line = refusal(RECONSTRUCT)
    assert f"{copies[1]}: not a readable image" in line and "--skip-broken" in line
    run(RECONSTRUCT, "--skip-broken")  # and what was made before stays
    assert json.loads(capsys.readouterr().out)["broken"] == 1

    copies[1].unlink()
    copies[1].symlink_to("nowhere")
    assert "has images" in refusal(RECONSTRUCT, "--skip-broken")
    run(RECONSTRUCT, "--skip-broken --out other")
    assert json.loads(capsys.readouterr().out)["broken"] == 1


def test_an_exact_copy_has_a_psnr(tmp_path):
    """Infinity is no JSON, and one black image must not make a mean of it: 100 dB is the most."""
    (tmp_path / "data").mkdir()
    for i, level in enumerate((0, 100)):
        Image.new("RGB", (256, 256), (level, level, level)).save(tmp_path / f"data/{i}.png")
    data = ImageData(tmp_path / "data", 256)
    made = [tmp_path / "a.png", tmp_path / "b.png"]
    for path, level in zip(made, (110, 0), strict=True):
        Image.new("RGB", (256, 256), (level, level, level)).save(path)
    scores = sample.scores(made, Subset(data, [(0, 1), (0, 0)]), 0)
    scores = json.loads(json.dumps(scores, allow_nan=False))
    assert scores["psnr"] == pytest.approx((10 * math.log10(255**2 / 10**2) + 100) / 2)

    # One level in one channel of one pixel is not better than an exact copy.
    nearly = Image.new("RGB", (256, 256))
    nearly.putpixel((0, 0), (1, 0, 0))
    nearly.save(made[1])
    assert sample.scores(made[1:], Subset(data, [(0, 0)]), 0)["psnr"] == 100


@pytest.mark.slow
def test_the_default_decoder_says_when_it_is_the_demos(copies, capsys):
    """--reconstruct takes the default run's decoder, which may be of another training."""
    default = "--workers 0 --device cpu -n 2 --reconstruct photos"
    assert "runs/decoder/last.pt: no such file" in refusal(default)
    Path("runs/decoder").mkdir(parents=True)
    for preset in ("small", "demo"):
        write_decoder("runs/decoder/last.pt", args={"preset": preset})
        run(default, "--out", preset)
        assert settings_of(preset)["demo"] is (preset == "demo")
        assert ("The demo" in capsys.readouterr().err) is (preset == "demo")


# Ranks and signals


def look_at_another_flow():
    if os.environ["RANK"] == "1":
        sample.local_file = lambda path, flag: str(path).replace("flow.pt", "late.pt")


def look_at_own_images_alone():
    """A network disk may show a rank what is not there, or no longer: other ranks' images are not its own."""
    rank = int(os.environ["RANK"])
    is_whole = sample.is_whole

    def own(file):
        assert int(Path(file).stem) % 3 == rank
        return is_whole(file)

    sample.is_whole = own


def run_command(flags):
    """As `python sample.py` does."""
    rae_encoder.run(partial(sample.main, flags))


def block_threads():
    """The third PNG takes a minute to write."""
    save = Image.Image.save

    def slow(image, file, **options):
        if "000002" in file.name:
            Path("blocked").touch()
            time.sleep(60)
        save(image, file, **options)

    Image.Image.save = slow


@pytest.mark.slow
def test_ranks(twenty, tmp_path, monkeypatch):
    """Ranks share the images, also where these don't divide; one bar, first and last line, one sheet."""
    monkeypatch.chdir(tmp_path)
    flags = [*twenty[1].split(), "--batch-size", "6", "--npz"]
    lines = run_ranks(sample.main, flags, world=3, before=(narrow, look_at_own_images_alone))
    assert difference(twenty[0], "samples") <= 1
    assert "3 x cpu, fp32" in lines[0] and lines[-1] == "all 20 images are in samples"
    assert "batch" in Path("stderr-0").read_text()
    assert all(not Path(f"stderr-{rank}").read_text() for rank in (1, 2))
    sheets = [np.array(Image.open(f"{out}.png")).astype(int) for out in (twenty[0], "samples")]
    assert np.abs(sheets[0] - sheets[1]).max() <= 1
    assert np.load("samples.npz")["arr_1"].tolist() == [i % CLASSES for i in range(20)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "before", "line"),
    [
        ("-n 4 --out new", (look_at_another_flow,), "rank 0 has flow"),
        ("-n 2 --steps 4", (), "--out samples has steps 3, this run has 4"),
    ],
)
def test_ranks_refuse_in_one_line_each(work, flags, before, line):
    """A network disk may still show the second rank the flow of before."""
    write_flow("late.pt", seed=4)
    run(PAIR, "-n 2")
    run_ranks(sample.main, f"{PAIR} {flags}".split(), world=2, before=(narrow, *before), code=1)
    for rank in range(2):
        (printed,) = Path(f"stderr-{rank}").read_text().splitlines()
        assert printed.startswith(line)
    assert not list(Path().glob("new/*"))


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once(work):
    """The first one waits for the PNGs that are being written, here on a disk that hangs."""
    (process,) = start_ranks(run_command, f"{PAIR} -n 4".split(), before=(narrow, block_threads))
    while process.is_alive() and not Path("blocked").exists():
        time.sleep(0.01)
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGINT)
    process.join(1)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGINT)
    process.join(20)
    assert process.exitcode == 130 and Path("samples/000001.png").exists()  # what is made stays
    assert "Traceback" not in Path("stderr-0").read_text()


# Flags


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--seed 4294", "--seed: beyond 1,000,000 and 4,293"),
        ("-n 1000001", "--num, --seed: beyond 1,000,000"),
        ("-n 0", "--num: expected a whole number from 1, got 0"),
        ("--t-end 1", "--t-end: expected a number from 0 to below 1, got 1"),
        ("--internal-guidance", "--internal-guidance: expected one argument"),
        ("--guidance-interval 0.5 0.4 --cfg 2", "--guidance-interval 0.5 0.4: expected MIN < MAX"),
        ("--guidance-interval 0 1", "--cfg SCALE"),
        ("--autoguide weak.pt --cfg 1", "--cfg SCALE"),
        ("--autoguide weak.pt --internal-guidance 1.5", "--cfg SCALE"),
        ("--autoguide", "--autoguide: expected FILE, but with --preset imagenet256 or imagenet512"),
        ("--reconstruct photos --npz", "--npz: is for sampling alone"),
        ("--reconstruct photos --guidance-interval 0 1", "--guidance-interval: is for sampling alone"),
        ("--latent-noise 1", "--latent-noise: is for reconstruction alone"),
        ("--layers 1,2", "--layers: is for reconstruction alone"),
    ],
)
def test_flags_that_cannot_be_meant(flags, line):
    assert line in message(sample.parse_args, flags.split())
