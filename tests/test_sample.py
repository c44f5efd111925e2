"""sample.py against closed forms, and its images against themselves: any batch size, ranks, resume."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
import zipfile
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dit_dh
import sample
from rae_decoder_train import Decoder
from rae_encoder import Encoder, center_crop, to_rgb

ROOT = Path(__file__).parents[1]
SHAPE = (64, 2, 2)  # test_vit at 32 px: 2x2 tokens of width 64
CLASSES = 3
BODY_AND_HEAD = dict(width=32, depth=1, heads=2, head_width=64, head_depth=1, head_heads=2)


def excite(network, seed):
    """adaLN-zero starts with a velocity of 0: gives every weight a value."""
    torch.manual_seed(seed)
    for parameter in network.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.15)
    torch.nn.init.normal_(
        network.y_embedder.embedding_table.weight, std=5
    )  # so that labels show in the images
    return network


@cache
def encoder_hash():
    return Encoder("test_vit", 32, 32, "random").hash


def write_flow(path, name="DiT-DH-S", seed=0, **changes):
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


def write_decoder(path, **changes):
    torch.manual_seed(1)
    sizes = dict(name="ViT-mini", channels=SHAPE[0], grid=2, patch_size=16, mean=[0.5] * 3, std=[0.25] * 3)
    config = {
        "encoder": "test_vit",
        "encoder_hash": encoder_hash(),
        "encoder_size": 32,
        "image_size": 32,
        "latent_shape": list(SHAPE),
        "decoder": sizes,
        "noise_tau": 0.8,
        "gan": False,
    }
    config |= changes
    state = Decoder(**sizes).state_dict()
    args = {"encoder_weights": "random", "preset": "small"}
    torch.save(dict(format="rae-decoder/1", config=config, model={}, ema=state, step=3, args=args), path)
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """--flow and --decoder of an untrained pair, with the folder they are in."""
    folder = tmp_path_factory.mktemp("checkpoints")
    flow, decoder = write_flow(folder / "flow.pt"), write_decoder(folder / "decoder.pt")
    return folder, ["--flow", flow, "--decoder", decoder, "--steps", "3", "--cfg", "1", "--precision", "fp32"]


def pixels(folder):
    """Every PNG of a folder, by its name."""
    return {path.name: np.array(Image.open(path)).astype(int) for path in sorted(Path(folder).glob("*.png"))}


def rgb(path):
    with Image.open(path) as file:
        return to_rgb(file)


def difference(folder, other):
    a, b = pixels(folder), pixels(other)
    assert a.keys() == b.keys() and a
    return max(np.abs(a[name] - b[name]).max() for name in a)


@pytest.fixture(scope="module")
def twenty(files, tmp_path_factory):
    """Twenty samples in one batch, guided: what other ways of sampling must repeat."""
    out = tmp_path_factory.mktemp("twenty") / "samples"
    flags = [*files[1], "-n", "20", "--cfg", "1.5", "--seed", "5"]
    sample.main([*flags, "--batch-size", "64", "--npz", "--out", str(out)])
    return out, flags


# The time grid and the solvers


def test_time_grid():
    """Section 4.2: t' = a t / (1 + (a-1) t) on even times; and the released code's own 50 points."""
    a = math.sqrt(768 * 16 * 16 / 4096)
    grid = sample.time_grid(10, a)
    assert len(grid) == 11 and grid[0] == 1 and grid[-1] == 0 and (grid.diff() < 0).all()
    for i in range(11):
        t = 1 - i / 10
        assert abs(grid[i].item() - a * t / (1 + (a - 1) * t)) < 1e-12
    released = torch.linspace(1, 0.001, 50)
    released = a * released / (1 + (a - 1) * released)
    torch.testing.assert_close(sample.time_grid(49, a, 0.001).float(), released, rtol=1e-6, atol=1e-7)
    assert abs(sample.time_grid(49, a, 0.001)[-1].item() - 0.0069) < 5e-5
    torch.testing.assert_close(sample.time_grid(4, 1.0), torch.tensor([1, 0.75, 0.5, 0.25, 0]).double())
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
    for solver, order in (("euler", 1), ("heun", 2)):
        steps = (32, 64, 128)
        errors = [
            (sample.sample_latents(gaussian_velocity, noise, sample.time_grid(n, 1.5), solver) - exact).norm()
            for n in steps
        ]
        slopes = [math.log2(errors[i] / errors[i + 1]) for i in range(2)]
        assert all(abs(slope - order) < 0.12 for slope in slopes), (solver, slopes)


def test_generated_moments():
    """The samples of a Gaussian have its mean and covariance: to the error of 50,000 draws."""
    noise = torch.randn(50_000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x = sample.sample_latents(gaussian_velocity, noise, sample.time_grid(50, 1.0), "heun")
    assert (x.mean(0) - MU).abs().max() < 0.02
    assert (x.T.cov() - SIGMA).abs().max() < 0.03


def test_heun_ends_with_euler():
    """The network is called twice on every interval but the last, and never at t = 0."""
    times = []
    velocity = lambda x, t: times.append(t) or -x  # noqa: E731
    x = sample.sample_latents(velocity, torch.ones(1, 1, 1, 1), torch.tensor([1.0, 0.5, 0.0]), "heun")
    assert times == [1.0, 0.5, 0.5]
    # 1 + 0.5 * (1 + 1.5) / 2 = 1.625; then Euler: 1.625 * 1.5
    assert x.item() == pytest.approx(1.625 * 1.5)


# Guidance


class Counting:
    """A velocity that depends on the label; counts its calls and the images in them."""

    def __init__(self, slope):
        self.slope, self.calls, self.images = slope, 0, 0

    def __call__(self, x, t, y):
        self.calls, self.images = self.calls + 1, self.images + len(x)
        return self.slope * x + t + y.view(-1, 1, 1, 1)


def test_guidance_formulas():
    x, y = torch.randn(2, 4, 1, 1), torch.tensor([0, 2])
    main, weak = Counting(2.0), Counting(0.5)
    v = sample.guided_velocity(x, 0.3, y, main, None, 1.42, (0.1, 0.9), null=7)
    own, null = 2 * x + 0.3 + y.view(-1, 1, 1, 1), 2 * x + 0.3 + 7
    torch.testing.assert_close(v, null + 1.42 * (own - null))
    assert (main.calls, main.images) == (1, 4)  # both calls in one of twice the batch
    v = sample.guided_velocity(x, 0.3, y, main, weak, 1.42, (0.1, 0.9), null=7)
    base = 0.5 * x + 0.3 + y.view(-1, 1, 1, 1)  # the weak network has the same label
    torch.testing.assert_close(v, base + 1.42 * (own - base))
    assert (main.calls, weak.calls, weak.images) == (2, 1, 2)
    torch.testing.assert_close(sample.guided_velocity(x, 0.3, y, main), own)


def test_no_second_call_outside_the_interval():
    """Of the times 1, .75, .5, .25 the interval [.25, .6] has two, its ends included."""
    grid, x, y = sample.time_grid(4, 1.0), torch.ones(3, 1, 1, 1), torch.tensor([0, 1, 2])
    for use_weak in (False, True):
        main, weak = Counting(1.0), Counting(2.0)
        sample.sample_latents(
            lambda x, t, main=main, weak=weak if use_weak else None: sample.guided_velocity(
                x, t, y, main, weak, 2.0, (0.25, 0.6), null=3
            ),
            x,
            grid,
        )
        assert main.calls == 4
        assert main.images == (12 if use_weak else 3 + 3 + 6 + 6)
        assert (weak.calls, weak.images) == ((2, 6) if use_weak else (0, 0))


@torch.no_grad()
def test_networks_see_one_time_a_batch_and_answer_in_fp32():
    network = excite(dit_dh.build("DiT-DH-S", SHAPE, CLASSES, **BODY_AND_HEAD).eval(), 0)
    x, y = torch.randn(2, *SHAPE), torch.tensor([0, 2])
    velocity = sample.prepare(network, torch.device("cpu"), compiled=None)
    assert torch.equal(velocity(x, 0.3, y), network(x, torch.tensor([0.3, 0.3]), y))
    with torch.autocast("cpu", torch.bfloat16):
        assert network(x, torch.tensor([0.3, 0.3]), y).dtype == torch.bfloat16
        assert velocity(x, 0.3, y).dtype == torch.float32


@pytest.mark.slow
def test_only_the_first_batch_compiles():
    """Body and head, plain and doubled by guidance; a last batch that is not full takes what is there."""
    torch._dynamo.reset()
    network = dit_dh.build("DiT-DH-S", SHAPE, CLASSES, **BODY_AND_HEAD).eval()
    for block in network.blocks:
        block.compile(backend="eager", fullgraph=True)
    guidance = dict(scale=2.0, interval=(0.3, 0.6), null=3)
    for first, size in ((True, 6), (False, 6), (False, 4)):
        x, y = torch.randn(size, *SHAPE), torch.zeros(size, dtype=torch.long)
        function = partial(sample.network_velocity, network)
        velocity = partial(sample.guided_velocity, y=y, network=function, **guidance)
        with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=not first):
            sample.sample_latents(velocity, x, sample.time_grid(6, 1.0))


# Images: noise, labels, the whole command against its parts


def test_pixels_are_rounded():
    levels = torch.tensor([-0.1, 0.0, 0.4 / 255, 0.6 / 255, 254.4 / 255, 254.6 / 255, 1.3])
    assert sample.to_pixels(levels.expand(1, 3, 1, 7))[0, 0, :, 0].tolist() == [0, 0, 0, 1, 254, 255, 255]


@torch.no_grad()
@pytest.mark.parametrize(
    "a, guidance", [(None, None), (2.5, None), (None, "labels"), (None, "a smaller network")]
)
def test_sample_against_a_loop(files, tmp_path, a, guidance):
    """Image i by a plain loop over its formulas, one image at a time, is the command's PNG."""
    folder, flags = files
    checkpoint = torch.load(folder / "flow.pt", weights_only=True)
    flow, decoder = dit_dh.load(folder / "flow.pt"), sample.load_decoder(str(folder / "decoder.pt"))[0]
    assert torch.equal(
        flow.state_dict()["s_embedder.proj.weight"], checkpoint["ema"]["s_embedder.proj.weight"]
    )
    out, weak = tmp_path / "samples", dit_dh.load(write_flow(tmp_path / "weak.pt", "DiT-S", seed=9))
    flags = [*flags, *(["--shift", str(a)] if a else []), *(["--cfg", "1.5"] if guidance else [])]
    flags += ["--autoguide", str(tmp_path / "weak.pt")] if guidance == "a smaller network" else []
    sample.main([*flags, "--num", "5", "--classes", "2,0", "--seed", "3", "--out", str(out)])
    a = a or checkpoint["config"]["shift"]
    for i, png in enumerate(pixels(out).values()):
        x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3_000_000 + i))[None]
        times = [a * t / (1 + (a - 1) * t) for t in (1, 2 / 3, 1 / 3, 0)]
        for t, t_next in zip(times, times[1:], strict=False):
            time, label = torch.tensor([t]), torch.tensor([(2, 0)[i % 2]])
            v = flow(x, time, label)
            if guidance == "labels":
                v = v + 0.5 * (v - flow(x, time, torch.tensor([CLASSES])))
            elif guidance:
                v = v + 0.5 * (v - weak(x, time, label))
            x = x + (t_next - t) * v
        z = x * (checkpoint["var"] + 1e-5).sqrt() + checkpoint["mean"]
        image = (decoder(z)[0].clamp(0, 1) * 255).permute(1, 2, 0)
        assert png.std() > 3  # an image, not a flat field
        assert np.abs(png - image.numpy()).max() < 0.51


@pytest.mark.slow
def test_released_files(files, tmp_path):
    """Bare state dicts and --stats give the same PNGs as the checkpoint, whose shift is the formula's."""
    folder, flags = files
    write_flow(tmp_path / "flow.pt", shift=1.0)  # 64 * 2 * 2 / 4096 is below 1
    flow = torch.load(tmp_path / "flow.pt", weights_only=True)
    decoder = torch.load(folder / "decoder.pt", weights_only=True)
    decoder["ema"]["decoder_pos_embed"] = Decoder(**decoder["config"]["decoder"]).decoder_pos_embed
    decoder["config"]["decoder"] |= dict(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])  # ImageNet's
    torch.save({"mean": flow["mean"], "var": flow["var"]}, tmp_path / "stat.pt")
    torch.save(flow["ema"], tmp_path / "stage2_model.pt")
    torch.save(decoder["ema"], tmp_path / "model.pt")
    torch.save(decoder, tmp_path / "decoder.pt")
    ours = ["--flow", str(tmp_path / "flow.pt"), "--decoder", str(tmp_path / "decoder.pt")]
    released = ["--flow", str(tmp_path / "stage2_model.pt"), "--decoder", str(tmp_path / "model.pt")]
    released += ["--stats", str(tmp_path / "stat.pt")]
    for name, pair in (("ours", ours), ("released", released)):
        sample.main([*flags, *pair, "--num", "4", "--out", str(tmp_path / name)])
    assert difference(tmp_path / "ours", tmp_path / "released") == 0
    torch.save({"mean": None}, tmp_path / "stat.pt")  # as published: mean 0, var 1
    flow |= {"mean": torch.zeros(SHAPE), "var": torch.ones(SHAPE)}
    torch.save(flow, tmp_path / "flow.pt")
    for name, pair in (("ours0", ours), ("released0", released)):
        sample.main([*flags, *pair, "--num", "4", "--out", str(tmp_path / name)])
    assert difference(tmp_path / "ours0", tmp_path / "released0") == 0
    assert difference(tmp_path / "ours0", tmp_path / "ours") > 10
    wide = torch.load(write_flow(tmp_path / "flow.pt", latent_shape=[64, 16, 16]), weights_only=True)
    torch.save(wide["ema"], tmp_path / "stage2_model.pt")
    command = [*flags, *released, "--num", "1", "--out", str(tmp_path / "wide")]
    with pytest.raises(SystemExit, match=r"latent_shape \[64, 16, 16\], .* \[64, 2, 2\]: they are no pair"):
        sample.main(command)  # bare files, of 512 px and of 256 px
    wide_decoder = Decoder(**decoder["config"]["decoder"] | dict(grid=16))
    torch.save(wide_decoder.state_dict(), tmp_path / "model.pt")
    sample.main(command)
    assert json.loads((tmp_path / "wide" / "settings.json").read_text())["shift"] == 2  # (64*16*16/4096)^1/2


@pytest.mark.parametrize("size", [1, 7])
def test_batch_size(twenty, tmp_path, size):
    sample.main([*twenty[1], "--batch-size", str(size), "--out", str(tmp_path / "samples")])
    assert difference(twenty[0], tmp_path / "samples") <= 1


def test_batches_share_nothing(files, tmp_path):
    weak = write_flow(tmp_path / "weak.pt", seed=1)
    flags = [*files[1], "--num", "4", "--cfg", "2", "--autoguide", weak]
    flags += ["--guidance-interval", "0", "0.9"]
    for size in ("4", "2"):
        sample.main([*flags, "--batch-size", size, "--out", str(tmp_path / size)])
    assert difference(tmp_path / "4", tmp_path / "2") <= 1
    sample.main([*files[1], "--num", "4", "--out", str(tmp_path / "unguided")])
    assert difference(tmp_path / "4", tmp_path / "unguided") > 10


@pytest.mark.slow
def test_flags_reach_the_solver(files, tmp_path):
    """Each of these flags changes the images."""
    plain, guided = [*files[1], "--num", "2"], [*files[1], "--num", "2", "--cfg", "2"]
    for name, base, change in (
        ("heun", plain, ["--solver", "heun"]),
        ("t-end", plain, ["--t-end", "0.1"]),
        ("steps", plain, ["--steps", "4"]),
        ("interval", guided, ["--guidance-interval", "0.9", "1"]),
    ):
        without, out = tmp_path / f"{len(base)}", tmp_path / name
        sample.main([*base, "--out", str(without)])
        sample.main([*base, *change, "--out", str(out)])
        assert difference(without, out) > 3, name


def test_seeds():
    """Seed 0 has the noise it always had; no other seed and index have the same."""
    equal = []
    for i in (0, 7, 999_999):
        expected = torch.randn(SHAPE, generator=torch.Generator().manual_seed(i))
        assert torch.equal(sample.draw_noise([i], SHAPE, 0)[0], expected)
        # The formula of before: the generator reads 32 bits, so that all seeds were 0.
        before = torch.randn(SHAPE, generator=torch.Generator().manual_seed((5 << 32) + i))
        equal.append(torch.equal(before, expected))
    assert all(equal)
    pairs = [(seed, i) for seed in (0, 1, 2, 4292, 4293) for i in (0, 1, 967_295, 967_296, 999_999)]
    noise = {tuple(sample.draw_noise([i], (3,), seed)[0].tolist()) for seed, i in pairs}
    assert len(noise) == len(pairs)
    beyond = {tuple(sample.draw_noise([i], (3,), seed)[0].tolist()) for seed, i in [(0, 0), (4294, 967_296)]}
    assert len(beyond) == 1  # why 4,293 is the last


def test_seed(files, tmp_path):
    """Another seed gives other images."""
    for seed in ("0", "1"):
        sample.main([*files[1], "--num", "2", "--seed", seed, "--out", str(tmp_path / seed)])
    assert difference(tmp_path / "0", tmp_path / "1") > 3


def test_classes_by_name(files, tmp_path):
    """Names are those of the training's folders; what can be a number is one."""
    for name, classes in (("names", "dog,cat,7,1"), ("numbers", "1,0,2,1")):
        sample.main([*files[1], "--num", "4", "--classes", classes, "--out", str(tmp_path / name)])
        settings = json.loads((tmp_path / name / "settings.json").read_text())
        assert settings["classes"] == [1, 0, 2, 1]
    assert difference(tmp_path / "names", tmp_path / "numbers") == 0


def test_names_of_imagenet():
    """A released network keeps no names: they are timm's, the first of each class's synonyms."""
    names = sample.imagenet_names(1000)
    assert len(names) == 1000
    assert sample.class_numbers("golden retriever,tabby,tench,3", names, 1000, "x.pt") == [207, 281, 0, 3]
    assert sample.imagenet_names(10) == []
    with pytest.raises(SystemExit, match="--classes cat: --flow x.pt has 0 to 999, by name tench, goldfish"):
        sample.class_numbers("cat", names, 1000, "x.pt")


def test_resume(twenty, tmp_path, capfd):
    """What a killed run left, PNGs with holes between them and half a file, becomes the same folder."""
    out = tmp_path / "samples"
    shutil.copytree(twenty[0], out)
    marked = Image.new("RGB", (32, 32), "red")
    marked.save(out / "000001.png")  # to see that what is there stays
    for i in (0, 3, 4, 11, 18, 19):
        os.remove(out / f"{i:06d}.png")
    (out / "000003.png.tmp").write_bytes(b"half")
    sample.main([*twenty[1], "--batch-size", "4", "--out", str(out)])
    assert (pixels(out)["000001.png"] == np.array(marked)).all()
    shutil.copy(twenty[0] / "000001.png", out)
    assert difference(twenty[0], out) <= 1
    assert "6 of 20" in capfd.readouterr().err


ENV = os.environ | {"OMP_NUM_THREADS": "1"}


def torchrun(ranks, *flags, script=ROOT / "sample.py"):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [*launcher, str(script), *flags]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks(twenty, tmp_path, ranks):
    """torchrun: ranks share the 20 images, also where that does not divide; one bar; one grid."""
    out = tmp_path / "samples"
    flags = [*twenty[1], "--batch-size", "6", "--npz", "--out", str(out)]
    run = subprocess.run(torchrun(ranks, *flags), env=ENV, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    assert difference(twenty[0], out) <= 1
    assert run.stderr.count(" 0/20 [") == 1 and f"{ranks} x" in run.stderr
    grids = [np.array(Image.open(f"{folder}.png")).astype(int) for folder in (twenty[0], out)]
    assert np.abs(grids[0] - grids[1]).max() <= 1


@pytest.mark.slow
def test_interrupted_ranks(twenty, tmp_path):
    """Killed in the middle, three ranks go on as one process and end with the images of one run."""
    out = tmp_path / "samples"
    flags = [*twenty[1], "--batch-size", "3", "-n", "2000", "--out", str(out)]
    process = subprocess.Popen(torchrun(3, *flags), env=ENV, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(out.glob("*.png"))) < 7:
        time.sleep(0.01)
    process.terminate()
    process.wait()
    there = len(list(out.glob("*.png")))
    assert 7 <= there < 2000
    sample.main([*twenty[1], "--batch-size", "7", "--out", str(out)])
    for path in [path for path in out.glob("*.png") if int(path.stem) >= 20]:
        path.unlink()
    assert difference(twenty[0], out) <= 1


STALE = """
import os, sys
sys.path.insert(0, {root!r})
import sample

exists = os.path.exists
if os.environ["RANK"] == "1":
    os.path.exists = lambda path: True if str(path).endswith("png") else exists(path)
sample.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_ranks_take_what_the_first_one_sees(twenty, tmp_path):
    """A disk that shows the second rank images which are not there must not leave any out."""
    out = tmp_path / "samples"
    (tmp_path / "stale.py").write_text(STALE.format(root=str(ROOT)))
    command = torchrun(2, *twenty[1], "--out", str(out), script=tmp_path / "stale.py")
    run = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    assert difference(twenty[0], out) <= 1


@pytest.mark.slow
def test_a_refusal_is_one_line_under_torchrun(twenty, tmp_path):
    """What rank 0 finds wrong with the folder ends the other ranks, too, and once."""
    shutil.copytree(twenty[0], tmp_path / "samples")
    command = torchrun(2, *twenty[1], "--steps", "4", "--out", str(tmp_path / "samples"))
    run = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=300)
    assert run.returncode == 1
    assert run.stderr.count("steps 3 there and 4 here") == 1
    assert 'sample.py", line' not in run.stderr


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_ctrl_c(twenty, tmp_path, ranks):
    """One line that tells what is kept, no traceback of ours, exit code 130 of each process."""
    out = tmp_path / "samples"
    flags = [*twenty[1], "--batch-size", "4", "-n", "5000", "--out", str(out)]
    command = [sys.executable, str(ROOT / "sample.py"), *flags] if ranks == 1 else torchrun(ranks, *flags)
    process = subprocess.Popen(command, env=ENV, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while process.poll() is None and len(list(out.glob("*.png"))) < 7:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as the terminal does
    printed = process.communicate(timeout=120)[1]
    kept = len(list(out.glob("*.png")))
    assert 7 <= kept < 5000
    lines = [line for line in printed.splitlines() if "interrupted; " in line]
    assert len(lines) == 1
    done = int(lines[0].split()[1])
    assert done == kept if ranks == 1 else 7 <= done <= kept
    assert lines[0] == f"interrupted; {done} of 5000 images are in {out}, the same command goes on"
    assert 'sample.py", line' not in printed
    if ranks == 1:
        assert process.returncode == 130


def test_ctrl_c_while_loading(files, tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(dit_dh, "load", interrupted)
    monkeypatch.setattr(os, "_exit", leave)  # which would end pytest
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # pytest keeps its own
    with pytest.raises(SystemExit) as error:
        sample.main([*files[1], "--out", str(tmp_path / "samples")])
    assert error.value.code == 130
    assert capsys.readouterr().err.strip() == "interrupted; nothing was made yet"


def test_a_thread_that_cannot_write_ends_the_run(files, tmp_path, monkeypatch):
    """PNGs are written by threads, whose errors are easily lost."""

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(SystemExit, match="can't be written .*No space left"):
        sample.main([*files[1], "--num", "2", "--out", str(tmp_path / "samples")])
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["settings.json"]


@pytest.mark.slow
def test_npz_is_a_stream(tmp_path, monkeypatch):
    """50,000 images of 256 px are 10 GB: memory stays flat, and a member of over 4 GB is possible."""
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    number = 8000
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 1_000_000)  # instead of 4 GB
    tracemalloc.start()
    sample.write_npz(str(tmp_path / "out.npz"), [tmp_path / "red.png"] * number, [1] * number)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < number * 64 * 64 * 3 / 50
    monkeypatch.undo()
    packed = np.load(tmp_path / "out.npz")
    assert packed["arr_0"].shape == (number, 64, 64, 3) and packed["arr_1"].shape == (number,)
    assert (packed["arr_0"] == [255, 0, 0]).all()


def test_npz_and_grid(twenty):
    out, images = twenty[0], np.stack(list(pixels(twenty[0]).values()))
    packed = np.load(f"{out}.npz")
    assert packed["arr_0"].dtype == np.uint8 and packed["arr_0"].shape == (20, 32, 32, 3)
    assert (packed["arr_0"] == images).all()
    assert packed["arr_1"].tolist() == [i % CLASSES for i in range(20)]
    grid = np.array(Image.open(f"{out}.png"))
    assert grid.shape == (3 * 32, 9 * 32, 3)  # 9 columns: each is of one class
    assert (grid[32:64, 32:64] == images[10]).all() and (grid[64:, 64:] == 255).all()


@pytest.mark.slow
def test_settings_guard(twenty, files, tmp_path):
    """A folder of other settings is refused, and the message says which; more of the same is welcome."""
    out = tmp_path / "samples"
    shutil.copytree(twenty[0], out)
    other = write_flow(tmp_path / "other.pt", seed=1)
    later = {}
    for name, key in (("flow", "blocks.0.attn.proj.weight"), ("decoder", "decoder_embed.weight")):
        checkpoint = torch.load(files[0] / f"{name}.pt", weights_only=True)
        checkpoint["ema"][key] += 1e-6  # one more step of training, under the old name
        later[name] = str(tmp_path / f"{name}.pt")
        torch.save(checkpoint, later[name])
    sizes = dict(name="ViT-mini", channels=SHAPE[0], grid=2, patch_size=16, mean=[0.0] * 3, std=[0.25] * 3)
    later["pixels"] = write_decoder(tmp_path / "pixels.pt", decoder=sizes)
    for change, word in (
        (["--seed", "6"], "seed 5 there and 6 here"),
        (["--steps", "4"], "steps 3 there and 4 here"),
        (["--cfg", "1.6"], "cfg"),
        (["--solver", "heun"], "solver"),
        (["--shift", "3"], "shift"),
        (["--t-end", "0.1"], "t_end"),
        (["--classes", "1"], "classes"),
        (["--guidance-interval", "0", "0.9"], "guidance_interval"),
        (["--autoguide", other], "autoguide"),
        (["--precision", "bf16"], "precision"),
        (["--flow", later["flow"]], "flow"),
        (["--decoder", later["decoder"]], "decoder"),
        (["--decoder", later["pixels"]], "pixels"),
    ):
        with pytest.raises(SystemExit) as error:
            sample.main([*twenty[1], *change, "--out", str(out)])
        message = str(error.value)
        assert word in message and message.count(" here") == 1 and "\n" not in message, message
    assert difference(twenty[0], out) == 0
    sample.main([*twenty[1], "--num", "22", "--batch-size", "64", "--out", str(out)])
    assert len(pixels(out)) == 22


@pytest.mark.parametrize("content", ["", "junk", "5", "[1, 2]"])
def test_damaged_settings(twenty, tmp_path, content):
    out = tmp_path / "samples"
    shutil.copytree(twenty[0], out)
    (out / "settings.json").write_text(content)
    with pytest.raises(SystemExit) as error:
        sample.main([*twenty[1], "--out", str(out)])
    message = str(error.value)
    assert "settings.json can't be read" in message and "another --out" in message and "\n" not in message


def test_folders_of_older_versions(files, tmp_path):
    """They go on where all that decides the pixels is the same: seeds did not count then."""
    out = tmp_path / "samples"
    flags = [*files[1], "--num", "2", "--out", str(out)]
    sample.main(flags)
    settings = json.loads((out / "settings.json").read_text())
    del settings["demo"], settings["pixels"]
    for changes, goes_on in (
        ({"reuse_body": 1}, True),
        ({"reuse_body": 1, "pixels": [[0, 0, 0], [1, 1, 1]]}, False),
        ({"reuse_body": 2}, False),
        ({"reuse_body": 1, "cfg": 1.5}, False),
        ({"reuse_body": 1, "seed": 7}, False),
    ):
        (out / "settings.json").write_text(json.dumps(settings | changes))
        command = [*flags, "--seed", str(changes.get("seed", 0))]
        if goes_on:
            sample.main(command)
            continue
        with pytest.raises(SystemExit, match="images of other settings"):
            sample.main(command)


def test_beside_out(files, tmp_path, monkeypatch):
    """`--out .` has its grid beside the folder; what can't be written there is found before the work."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    sample.main([*files[1], "--num", "2", "--npz", "--out", "."])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["work", "work.npz", "work.png"]
    assert len(pixels(".")) == 2

    command = [*files[1], "--num", "2", "--out", "samples"]
    for blocked in ("samples.png", "samples.npz"):
        os.mkdir(blocked)
        with pytest.raises(SystemExit, match="samples.png and .npz are to be files"):
            sample.main(command)
        assert list(Path("samples").iterdir()) == []
        os.rmdir(blocked)
    access = os.access
    parent = str(tmp_path / "work")
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != parent and access(path, mode))
    with pytest.raises(SystemExit, match="samples.png can't be written, no permission for"):
        sample.main(command)
    assert list(Path("samples").iterdir()) == []


def test_demo_is_told_by_the_decoder(files, tmp_path, capsys):
    """fid.py compares with the demo's images only where the samples are the demo's."""
    decoder = torch.load(files[0] / "decoder.pt", weights_only=True)
    decoder["args"]["preset"] = "demo"
    torch.save(decoder, tmp_path / "demo.pt")
    for path, demo in ((tmp_path / "demo.pt", True), (files[0] / "decoder.pt", False)):
        out = tmp_path / str(demo)
        sample.main([*files[1], "--decoder", str(path), "--num", "1", "--out", str(out)])
        assert json.loads((out / "settings.json").read_text())["demo"] is demo
        assert ("The demo" in capsys.readouterr().err) is demo


@pytest.mark.slow
def test_reconstruct(files, tmp_path, capsys):
    """PNGs are decode(encode(crop)), in the folder's order, and the PSNR is the mean over images."""
    folder, flags = files
    rng = np.random.default_rng(0)
    for i in range(5):
        path = tmp_path / "data" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        low = rng.integers(0, 256, (4, 5, 3)).astype(np.uint8)
        Image.fromarray(low).resize((50, 40), Image.Resampling.BICUBIC).save(path)
    out = tmp_path / "out"
    command = [
        "--reconstruct",
        str(tmp_path / "data"),
        "--decoder",
        str(folder / "decoder.pt"),
        "--out",
        str(out),
    ]
    command += ["--workers", "0", "--batch-size", "2", "--flow", "not/needed.pt"]
    sample.main(command)
    assert json.loads((out / "settings.json").read_text())["precision"] == "fp32"  # without a flag
    printed = json.loads(capsys.readouterr().out)
    encoder = Encoder("test_vit", 32, 32, "random")
    decoder, psnr = sample.load_decoder(str(folder / "decoder.pt"))[0], []
    originals = sorted((tmp_path / "data").rglob("*.png"))  # class a, then b
    assert len(pixels(out)) == 5
    for png, path in zip(pixels(out).values(), originals, strict=True):
        original = np.array(center_crop(rgb(path), 32))
        image = torch.from_numpy(original).permute(2, 0, 1)[None] / 255
        with torch.no_grad():
            expected = (decoder(encoder(image))[0].clamp(0, 1) * 255).round().permute(1, 2, 0).numpy()
        assert np.abs(expected - png).max() <= 1
        psnr.append(10 * math.log10(255**2 / np.mean((png - original.astype(float)) ** 2)))
    assert printed == {"psnr": pytest.approx(np.mean(psnr), abs=1e-9), "images": 5, "broken": 0}
    assert Image.open(f"{out}.png").size == (5 * 32, 32)

    # One file is a folder of one.
    single = [*command[2:], "--reconstruct", str(originals[3]), "--out", str(tmp_path / "single")]
    sample.main(single)
    assert json.loads(capsys.readouterr().out) == {"psnr": pytest.approx(psnr[3]), "images": 1, "broken": 0}
    assert np.array_equal(pixels(tmp_path / "single")["000000.png"], pixels(out)["000003.png"])
    (out / "000002.png").unlink()
    sample.main(command)  # what is there counts as well
    assert json.loads(capsys.readouterr().out)["psnr"] == pytest.approx(printed["psnr"], abs=1e-6)
    with pytest.raises(SystemExit, match="num 5 there and 3 here"):
        sample.main([*command, "--num", "3"])
    noisy = [*command, "--latent-noise", "0.5", "--out", str(tmp_path / "noisy")]
    sample.main(noisy)
    capsys.readouterr()
    for i, (png, path) in enumerate(zip(pixels(tmp_path / "noisy").values(), originals, strict=True)):
        image = torch.from_numpy(np.array(center_crop(rgb(path), 32))).permute(2, 0, 1)[None] / 255
        with torch.no_grad():
            z = encoder(image)
            z += 0.5 * torch.randn(z.shape, generator=torch.Generator().manual_seed(i))
            expected = (decoder(z)[0].clamp(0, 1) * 255).round().permute(1, 2, 0).numpy()
        assert np.abs(expected - png).max() <= 1

    # The folder is known by what is in it, not by its name.
    original = originals[1].read_bytes()
    command[1] = f"{tmp_path}/./data/"
    sample.main(command)
    capsys.readouterr()
    time_of_change = originals[1].stat().st_mtime_ns
    for content, later in ((b"other", 0), (original, 1)):
        originals[1].write_bytes(content)
        os.utime(originals[1], ns=(0, time_of_change + later))
        with pytest.raises(SystemExit, match="images .* there and .* here"):
            sample.main(command)
    os.utime(originals[1], ns=(0, time_of_change))
    sample.main(command)
    capsys.readouterr()

    other = write_decoder(tmp_path / "other.pt", encoder_hash="0123456789ab")
    with pytest.raises(SystemExit, match="encoder_hash .*other.pt has 0123456789ab: they are no pair"):
        sample.main([*command, "--decoder", other, "--out", str(tmp_path / "other")])
    assert not (tmp_path / "other").exists()

    originals[1].write_bytes(b"broken")
    command[-1:] = ["not/needed.pt", "--out", str(tmp_path / "other")]
    with pytest.raises(SystemExit, match="2.png: not a readable image .* --skip-broken"):
        sample.main(command)
    shutil.rmtree(tmp_path / "other")
    sample.main([*command, "--skip-broken"])
    assert json.loads(capsys.readouterr().out)["broken"] == 1

    # A link to nothing is a broken image like any other.
    originals[1].unlink()
    originals[1].symlink_to("nowhere")
    with pytest.raises(SystemExit, match="images .* there and .* here"):
        sample.main([*command, "--skip-broken"])
    shutil.rmtree(tmp_path / "other")
    sample.main([*command, "--skip-broken"])
    assert json.loads(capsys.readouterr().out)["broken"] == 1


def test_the_demos_network_alone_is_guided_by_default(files, tmp_path):
    """Whether --flow names it or not; flags win."""
    demo = torch.load(files[0] / "flow.pt", weights_only=True)
    demo["args"]["preset"] = "demo"
    torch.save(demo, tmp_path / "demo.pt")
    common = ["--decoder", files[1][3], "--num", "1", "--precision", "fp32"]
    for k, (flow, flags, expected) in enumerate(
        (
            (tmp_path / "demo.pt", [], (25, 2.0)),
            (tmp_path / "demo.pt", ["--cfg", "0", "--steps", "3"], (3, 0.0)),
            (files[0] / "flow.pt", [], (50, 1.0)),
            (tmp_path / "demo.pt", ["--preset", "imagenet256", "--num", "1", "--cfg", "1"], (25, 1.0)),
        )
    ):
        sample.main([*common, "--flow", str(flow), *flags, "--out", str(tmp_path / str(k))])
        settings = json.loads((tmp_path / str(k) / "settings.json").read_text())
        assert (settings["steps"], settings["cfg"]) == expected


def test_numbers_by_default():
    for flags, number in (
        ("", 400),
        ("--preset small", 400),
        ("--preset imagenet256", 50_000),
        ("--preset imagenet512", 50_000),
        ("--preset imagenet512 -n 7", 7),
        ("--preset imagenet256 --reconstruct photos", None),
        ("--reconstruct photos --num 3", 3),
    ):
        assert sample.parse_args(flags.split()).num == number
    assert sample.parse_args(["--preset", "imagenet512"]).batch_size == 64


# What a user can do wrong


@pytest.mark.slow
def test_errors(files, tmp_path, monkeypatch):
    folder, flags = files
    monkeypatch.chdir(tmp_path)
    plain = write_flow(tmp_path / "dit.pt", "DiT-S")
    write_flow(tmp_path / "vit.pt", encoder="test_vit2", encoder_hash="1" * 12)
    write_flow(tmp_path / "hash.pt", encoder_hash="0123456789ab")
    write_flow(tmp_path / "grid.pt", latent_shape=[64, 4, 4])
    write_flow(tmp_path / "one.pt", num_classes=1)
    write_decoder(tmp_path / "decoder.pt")
    checkpoint = torch.load(folder / "flow.pt", weights_only=True)
    torch.save(checkpoint["ema"], tmp_path / "bare.pt")
    (tmp_path / "junk.pt").write_text("junk")
    decoder = ["--decoder", "decoder.pt"]
    (tmp_path / "empty").mkdir()
    write_decoder(tmp_path / "512.pt", encoder_size=64, image_size=64, latent_shape=[64, 4, 4])
    for arguments, words in (
        ([], ["--decoder runs/decoder/last.pt: no such file"]),
        (decoder, ["--flow runs/flow/last.pt: no such file"]),
        ([*flags, "--flow", "junk.pt"], ["--flow junk.pt", "not a flow checkpoint"]),
        ([*flags, "--flow", "decoder.pt"], ["--flow decoder.pt: is a decoder of rae_decoder_train.py"]),
        ([*flags, "--decoder", "junk.pt"], ["--decoder junk.pt"]),
        ([*flags, "--decoder", "dit.pt"], ["--decoder dit.pt: is a flow of flow_train.py"]),
        ([*flags, "--flow", "vit.pt"], ["has encoder test_vit2,", "has test_vit: they are no pair"]),
        ([*flags, "--flow", "hash.pt"], ["has encoder_hash 0123456789ab", "no pair"]),
        ([*flags, "--flow", "grid.pt"], ["latent_shape [64, 4, 4]", "[64, 2, 2]"]),
        ([*flags, "--flow", "bare.pt"], ["bare.pt", "--stats"]),
        ([*flags, "--decoder", "512.pt"], ["encoder_size 32", "512.pt has 64: they are no pair"]),
        ([*flags, "--classes", "1,x"], ["--classes x:", "0 to 2, by name cat, dog, 7"]),
        ([*flags, "--classes", ""], ["--classes :", "0 to 2"]),
        ([*flags, "--classes", "-1"], ["--classes"]),
        ([*flags, "--classes", "1,3"], ["--classes 3:", "0 to 2"]),
        ([*flags, "--shift", "0"], ["--shift", "above 0, got 0"]),
        ([*flags, "--t-end", "1"], ["--t-end", "below 1, got 1"]),
        ([*flags, "--steps", "0"], ["--steps", "from 1, got 0"]),
        ([*flags, "--num", "0"], ["--num", "from 1 to 1,000,000, got 0"]),
        ([*flags, "--num", "1000001"], ["--num", "from 1 to 1,000,000, got 1000001"]),
        ([*flags, "--seed", "4294"], ["--seed", "from 0 to 4293, got 4294"]),
        ([*flags, "--batch-size", "0"], ["--batch-size", "from 1, got 0"]),
        ([*flags, "--precisoin", "fp32"], ["--precisoin", "perhaps --precision"]),
        ([*flags, "--reuse-body", "2"], ["--reuse-body"]),
        ([*flags, "--autoguide", plain], ["--cfg"]),
        ([*flags, "--guidance-interval", "0", "1"], ["--cfg"]),
        ([*flags, "--cfg", "2", "--guidance-interval", "0.5", "0.4"], ["--guidance-interval", "MIN < MAX"]),
        ([*flags, "--cfg", "2", "--flow", "one.pt"], ["--cfg", "one class"]),
        ([*flags, "--cfg", "2", "--autoguide", "one.pt"], ["--autoguide", "classes"]),
        ([*flags, "--cfg", "2", "--autoguide", "none.pt"], ["--autoguide none.pt", "no such file"]),
        ([*decoder, "--reconstruct", "empty"], ["--reconstruct empty", "no .png"]),
        ([*decoder, "--reconstruct", "nowhere"], ["--reconstruct nowhere"]),
        ([*decoder, "--reconstruct", "empty", "--npz"], ["--reconstruct does not sample", "--npz"]),
        ([*decoder, "--reconstruct", "empty", "--classes", "1"], ["--reconstruct", "--classes"]),
        ([*decoder, "--reconstruct", "empty", "--steps", "9"], ["--reconstruct does not sample"]),
        ([*decoder, "--reconstruct", "empty", "--internal-guidance", "1.5"], ["does not sample"]),
        ([*decoder, "--latent-noise", "1"], ["--latent-noise", "are for --reconstruct"]),
        ([*decoder, "--skip-broken"], ["--skip-broken", "are for --reconstruct"]),
        ([*decoder, "--encoder-weights", "random"], ["are for --reconstruct"]),
        ([*flags, "--internal-guidance", "1.5", "--autoguide", plain], ["--cfg"]),
    ):
        with pytest.raises(SystemExit) as error:
            sample.main([*arguments, "--out", "out"])
        message = str(error.value)
        assert all(word in message for word in words) and "\n" not in message, (arguments, message)
        assert not Path("out").exists()  # nothing is done before everything is checked
    Image.new("RGB", (32, 32)).save("empty/000000.png")
    with pytest.raises(SystemExit, match="--out empty has images, but no settings.json"):
        sample.main([*flags, "--num", "1", "--out", "empty"])
