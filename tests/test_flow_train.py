"""Stage 2: shift, times, loss, schedule and step against closed forms; what its run takes from stage 1."""

import json
import math
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import timm
import torch
from helpers import equal, message, read, write_decoder
from safetensors.torch import save_file

import dit_dh
import flow_train
import rae_encoder
import sample
from rae_encoder import Encoder

pytestmark = pytest.mark.usefixtures("one_thread")


def test_shift_against_the_paper():
    assert flow_train.default_shift((768, 16, 16)) == pytest.approx(6.93, abs=0.005)
    assert flow_train.default_shift((768, 32, 32)) == pytest.approx(13.86, abs=0.005)
    assert flow_train.default_shift((1024, 16, 16)) == 8  # RAEv2
    assert flow_train.default_shift((4, 8, 8)) == 1  # never below
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    shifted = flow_train.time_shift(t, 6.93)
    assert torch.equal(flow_train.time_shift(t, 1), t)
    assert shifted[0] == 0 and shifted[-1] == 1
    # The shift multiplies the noise-to-data ratio t / (1-t) by a, as SD3 defines it.
    assert torch.allclose(shifted[:-1] / (1 - shifted[:-1]), 6.93 * t[:-1] / (1 - t[:-1]))


@pytest.mark.parametrize("distribution", ["uniform", "logit-normal"])
def test_times_have_their_distribution(distribution):
    torch.manual_seed(0)
    t = flow_train.draw_times(20_000, distribution, 3.0, torch.device("cpu")).double()
    unshifted = (t / (3 - 2 * t)).numpy()  # the inverse of the shift by 3
    law = scipy.stats.uniform() if distribution == "uniform" else scipy.stats.norm()
    values = unshifted if distribution == "uniform" else np.log(unshifted / (1 - unshifted))
    assert scipy.stats.kstest(values, law.cdf).pvalue > 1e-3


def test_loss_is_the_squared_error_of_the_velocity():
    rng = np.random.default_rng(0)
    x, eps = rng.normal(size=(2, 3, 4, 2, 2))
    t, y, seen = np.array([0.0, 0.3, 1.0]), torch.tensor([0, 1, 2]), {}

    def model(x_t, t, y):
        seen.update(x_t=x_t, t=t, y=y)
        return (2 * x_t).bfloat16()

    loss = flow_train.flow_loss(model, torch.tensor(x), y, torch.tensor(t), torch.tensor(eps))
    x_t = np.stack([x[0], 0.7 * x[1] + 0.3 * eps[1], eps[2]])
    assert np.allclose(seen["x_t"], x_t) and torch.equal(seen["y"], y) and np.allclose(seen["t"], t)
    prediction = torch.tensor(2 * x_t).bfloat16().double().numpy()
    assert loss.item() == pytest.approx(np.mean((prediction - (eps - x)) ** 2), rel=1e-6)


def test_the_learning_rate_is_held_falls_and_stays():
    rates = [flow_train.learning_rate(step, 40, 800, 2e-4, 2e-5) for step in (0, 40, 420, 610, 800, 1400)]
    assert rates == pytest.approx([2e-4, 2e-4, 1.1e-4, 6.5e-5, 2e-5, 2e-5])


def schedule(*flags):
    """(steps, hold, decay) of small on 500 images."""
    return flow_train.schedule(flow_train.parse_args(["--data", "x", *flags]), 500, world=1)


def test_a_run_of_small_decays_over_its_second_half():
    """It is measured in steps, since an epoch of anybody's data can have any length: here of 62."""
    assert schedule("--steps", "1000") == (1000, 500, 1000)
    assert schedule("--steps", "1000", "--hold-epochs", "2") == (1000, 124, 1000)
    assert schedule("--epochs", "3", "--decay-epochs", "2.5") == (186, 93, 155)
    # Held up to its end or beyond, it would never decay.
    for hold, step in (("16", 992), ("17", 1054)):
        flags = ["--steps", "992", "--hold-epochs", hold]
        assert f"--hold-epochs ends at step {step}, --decay-epochs at step 992" in message(schedule, *flags)


SMALL = dict(width=16, depth=1, heads=2, head_width=32, head_depth=1, head_heads=2)


def small_step(accum=1, clip=0.0, poison=False, poison_gradient=False):
    """(terms, finite, gradients, changes of the weights) of one step of plain gradient descent."""
    torch.manual_seed(0)
    model = dit_dh.build("DiT-DH-S", (8, 2, 2), 3, **SMALL)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in weights:
        torch.nn.init.normal_(weight, std=0.1)
    before = [weight.detach().clone() for weight in weights]
    x = torch.randn(8, 8, 2, 2)
    y = torch.randint(3, (8,))
    if poison:
        x[0, 0, 0, 0] = math.nan
    if poison_gradient:
        weights[3].register_hook(lambda gradient: gradient / 0)

    options = dict(time_dist="uniform", shift=2.0, clip=clip, accum=accum, precision="fp32")
    torch.manual_seed(1)
    terms, finite = flow_train.train_step(model, torch.optim.SGD(weights, lr=1.0), x, y, **options)
    changes = [weight.detach() - start for weight, start in zip(weights, before, strict=True)]
    return terms, finite, [weight.grad for weight in weights], changes


def test_micro_batches_give_the_step_of_one_large_batch():
    one, finite, large, _ = small_step(accum=1)
    four, _, small, _ = small_step(accum=4)
    assert finite and one["loss"].item() == pytest.approx(four["loss"].item(), rel=1e-5)
    for a, b in zip(large, small, strict=True):
        assert a.abs().max() > 0 and (a - b).abs().max() <= 1e-5 * a.abs().max()


@pytest.mark.parametrize(
    ("poisoned", "loss_is_finite"), [("poison", False), ("poison_gradient", True), (None, True)]
)
def test_a_step_that_is_not_finite_changes_nothing(poisoned, loss_is_finite):
    terms, finite, _, changes = small_step(**({poisoned: True} if poisoned else {}))
    assert terms["loss"].isfinite() == loss_is_finite
    assert terms["gradient_norm"].isfinite() == finite == (poisoned is None)
    assert any(change.ne(0).any() for change in changes) == finite


def fit_one_image(width):
    """Final loss of a DiT of this width on one image, a single token of 16 channels (section 4.1)."""
    torch.manual_seed(0)
    model = dit_dh.build("DiT-S", (16, 1, 1), 1, width=width, depth=2, heads=2).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    x, y, losses = torch.randn(1, 16, 1, 1), torch.zeros(1, dtype=torch.long), []
    for _ in range(400):
        t, eps = torch.rand(128), torch.randn(128, 16, 1, 1)
        loss = flow_train.flow_loss(model, x.expand_as(eps), y.expand(128), t, eps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return np.mean(losses[300:])


@pytest.mark.slow
def test_theorem_1_a_network_narrower_than_a_token_cannot_fit_one_image():
    token_width, narrow = 16, 8
    bound = (token_width - narrow) / token_width
    assert bound * 0.97 < fit_one_image(narrow) < bound * 1.2
    assert fit_one_image(64) < bound * 0.2


# The command at tiny size, in this process


TINY = (
    "--decoder= --model DiT-DH-S --width 16 --depth 1 --heads 2 --head-width 32 --head-depth 1 --head-heads 2"
)
TINY += " --batch-size 8 --steps 6 --log-every 1 --save-every 2 --workers 0 --precision fp32"


def train(out, *flags):
    flow_train.main([*TINY.split(), "--out", f"runs/{out}", *map(str, flags)])


def same_training(a, b):
    a, b = (read(f"runs/{out}/last.pt") for out in (a, b))
    return all(equal(a[key], b[key]) for key in ("step", "mean", "var", "model", "ema", "optimizer"))


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "mirror"), [("fp32", "--flip"), ("bf16", "--no-flip")])
def test_cached_latents_train_like_images(folder, monkeypatch, precision, mirror):
    """To the last bit, over three epochs of other flips; all images and mirrors are encoded just once."""
    encoded = []  # the number of images in each call of the encoder
    forward = Encoder.forward
    monkeypatch.setattr(Encoder, "forward", lambda self, x: encoded.append(len(x)) or forward(self, x))
    views = 2 if mirror == "--flip" else 1
    flags = ["--precision", precision, mirror, "--stats-images", 20]
    train("plain", *flags, "--no-cache-latents")
    assert sum(encoded) == views * 20 + 6 * 8
    encoded.clear()
    train("cached", *flags, "--cache-latents")
    assert sum(encoded) == views * 22
    assert same_training("plain", "cached")
    logs = [Path(f"runs/{run}/metrics.jsonl").read_text().splitlines() for run in ("plain", "cached")]
    losses = [[json.loads(line)["loss"] for line in lines] for lines in logs]
    assert losses[0] == losses[1]


# Other starts: released weights, another checkpoint


@pytest.mark.slow
def test_init_starts_model_and_ema_from_weights(folder):
    """--steps 1 at learning rate 0: the checkpoint is the start."""
    table = "y_embedder.embedding_table.weight"

    def start(name, *flags):
        train(name, "--steps", 1, "--lr", 0, "--final-lr", 0, "--ema", 0, *flags)
        last = read(f"runs/{name}/last.pt")
        assert equal(last["model"], last["ema"])
        return last["model"], last["model"].pop(table)

    train("source")
    source = read("runs/source/last.pt")["ema"]
    torch.save(source, "released.pt")
    old = source.pop(table)
    for name in ("released.pt", "runs/source/last.pt"):
        weights, labels = start(name[:4], "--init", name)
        assert equal(weights, source) and equal(labels, old)

    os.rename("data/demo/ring", "data/ring")  # three classes
    weights, new = start("three", "--init", "released.pt")
    assert equal(weights, source) and new.shape[0] == 4 and torch.equal(new[-1], old[-1])
    assert not any(torch.equal(row, other) for row in new[:-1] for other in old)
    line = message(train, "wide", "--width", 24, "--init", "released.pt")
    assert "this run has sizes {'width': 24" in line and "--init released.pt has {'width': 16" in line
    assert "'heads': 1" in message(train, "heads", "--heads", 1, "--init", "released.pt")
    Path("text.pt").write_text("text")
    assert message(train, "x", "--init", "text.pt").startswith("--init text.pt: not a")


@pytest.mark.parametrize("flag", ["--init", "--stats"])
def test_a_flow_of_other_latents_gives_neither_weights_nor_statistics(folder, flag):
    """Shapes are the same throughout; a bare file knows none of it and passes."""
    train("source", "--steps", 1)
    source = read("runs/source/last.pt")
    others = {"layers": [0, 1], "encoder_hash": "0123456789ab", "encoder_size": 80, "image_size": 40}
    for key, other in others.items():
        torch.save({**source, "config": source["config"] | {key: other}}, "other.pt")
        line = message(train, "run", flag, "other.pt")
        ours = source["config"][key]
        assert line.startswith(f"this run has {key} {ours}, {flag} other.pt has {other}: ")
    bare = source["ema"] if flag == "--init" else {"mean": source["mean"], "var": source["var"]}
    torch.save(bare, "bare.pt")
    train("run", "--steps", 1, flag, "bare.pt")


@pytest.mark.slow
def test_a_compiled_network_compiles_once():
    torch._dynamo.reset()
    model = dit_dh.build("DiT-DH-S", (8, 2, 2), 3, **SMALL).train()
    model.compile(backend="eager", fullgraph=True)  # an error at a graph break
    optimizer = torch.optim.AdamW(model.parameters())
    options = dict(time_dist="uniform", shift=1.0, clip=1.0, accum=2, precision="bf16")
    for step in range(3):
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            x, y = torch.randn(4, 8, 2, 2), torch.randint(3, (4,))
            flow_train.train_step(model, optimizer, x, y, **options)


# Runs that go on


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "other"), [("fp32", "bf16"), ("bf16", "fp32")])
def test_a_run_that_goes_on_keeps_its_precision(folder, precision, other):
    """Whichever of the two is this hardware's default; a flag still changes it."""
    without = [flag for flag in TINY.split() if flag not in ("--precision", "fp32")]
    for steps, flags, expected in (
        ("1", [precision], precision),
        ("2", [], precision),
        ("3", [other], other),
    ):
        flags = ["--precision", *flags] if flags else []
        flow_train.main([*without, "--out", "runs/run", *flags, "--steps", steps])
        assert read("runs/run/last.pt")["precision"] == expected


@pytest.mark.slow
def test_weights_of_the_encoder_are_known_by_content(folder):
    """A run goes on, and a decoder fits, with another spelling or a copy; not with others of that name."""
    torch.manual_seed(0)
    for place in ("here", "there"):
        os.mkdir(place)
        vit = timm.create_model("test_vit", pretrained=False, num_classes=0)
        torch.save(vit.state_dict(), f"{place}/vit.pt")
        if place == "here":
            save_file(vit.state_dict(), "copy.safetensors")
    encoder = Encoder("test_vit", 64, 32, "here/vit.pt")
    decoder = {"data": "data/demo", "preset": "demo", "encoder_weights": "here/vit.pt", "patch_size": 8}
    write_decoder("decoder.pt", decoder, encoder_hash=encoder.hash, encoder_size=64, latent_shape=[64, 4, 4])

    flags = ["--preview-every", 0, "--decoder", "decoder.pt", "--encoder-weights"]
    for step, path in enumerate(("here/vit.pt", "./here/../here/vit.pt", "copy.safetensors"), 1):
        train("run", "--steps", step, *flags, path)
        assert read("runs/run/last.pt")["step"] == step
    line = message(train, "other", *flags, "there/vit.pt")
    assert f"--decoder decoder.pt has {encoder.hash}: they don't belong together" in line
    line = message(train, "run", "--encoder-weights", "there/vit.pt")
    assert line.startswith("this run has encoder_hash ") and f"runs/run/last.pt has {encoder.hash}" in line


@pytest.mark.slow
def test_files_of_a_new_run_are_looked_at_when_it_goes_on(folder):
    train("run", "--steps", 2)
    before = read("runs/run/last.pt")
    for flag in ("--init", "--stats"):
        assert f"{flag} nosuch.pt: no such file" in message(train, "run", flag, "nosuch.pt")
    torch.save({"mean": before["mean"], "var": before["var"] + 1}, "stats.pt")
    line = message(train, "run", "--stats", "stats.pt")
    assert line == "--stats stats.pt: not those of the run that goes on; leave it out"

    os.link("runs/run/last.pt", "same.pt")
    train("run", "--stats", "same.pt", "--init", "same.pt")
    assert read("runs/run/last.pt")["step"] == 6  # the run itself goes on from its last step


# What a run takes from the decoder's checkpoint


KNOWN = {  # flags of a stage 1, all other than their defaults
    "data": "my photos",
    "preset": "small",
    "skip_broken": True,
    "flip": False,
    "image_size": 24,
    "patch_size": 6,
    "encoder": "test_vit.r160_in1k",
    "encoder_weights": "vit.safetensors",
    "encoder_size": 32,
    "layers": [1, 3],
}


@pytest.fixture
def stage_1(tmp_path, monkeypatch):
    """runs/decoder/last.pt and decoder.pt are decoders of KNOWN."""
    monkeypatch.chdir(tmp_path)
    os.makedirs("runs/decoder")
    os.mkdir("my photos")
    config = {"encoder": KNOWN["encoder"], "encoder_size": 32, "layers": [1, 3], "image_size": 24}
    write_decoder("decoder.pt", KNOWN, **config)
    write_decoder("runs/decoder/last.pt", KNOWN, **config)


def flags_of(*flags):
    args = flow_train.parse_args(list(flags))
    return {name: getattr(args, name) for name in KNOWN}


def test_a_run_takes_from_the_decoder_what_its_flags_dont_say(stage_1):
    assert flags_of() == KNOWN and flow_train.parse_args([]).decoder == "runs/decoder/last.pt"
    for decoder in ([], ["--decoder", "decoder.pt"]):
        given = {"flip": True, "encoder_weights": "copy.pt"}
        assert flags_of(*decoder, "--flip", "--encoder-weights", "copy.pt", "--seed", "5") == KNOWN | given
        same = flags_of(*decoder, "--data", "./my photos/../my photos")  # the same folder in other words
        assert same == KNOWN | {"data": "./my photos/../my photos"}
    line = message(flow_train.main, ["--decoder", "decoder.pt", "--data", "none"])
    assert line == "--data none: No such file or directory; expected a folder of images"

    os.remove("runs/decoder/last.pt")
    assert flags_of("--decoder", "decoder.pt") == KNOWN
    assert flow_train.parse_args(["--decoder", "decoder.pt"]).model == "DiT-DH-XS"  # of the preset small
    assert flags_of()["data"] == "data/demo"  # without any decoder it is the demo
    torch.save(read("decoder.pt")["ema"], "bare.pt")  # a bare file decides nothing
    args = flow_train.parse_args(["--decoder", "bare.pt", "--data", "x"])
    assert (args.decoder, args.encoder, args.patch_size) == ("bare.pt", "dinov2-small", 8)


def test_other_images_than_the_decoders(stage_1):
    """The decoder that is named is taken; the one in the default place is of another training."""
    assert flags_of("--data", "cats", "--decoder", "decoder.pt") == KNOWN | {"data": "cats"}
    for flags in (["--data", "cats"], ["--preset", "imagenet256", "--data", "my photos"], ["--decoder="]):
        args = flow_train.parse_args(flags)
        assert not args.decoder and args.encoder in ("dinov2-small", "dinov2-base", "test_vit")
        assert args.patch_size != 6 and args.layers != [1, 3] and not args.skip_broken


@pytest.mark.parametrize(
    ("flags", "ours", "theirs"),
    [
        ("--encoder dinov2-small", "vit_small_patch14_reg4_dinov2.lvd142m", "test_vit.r160_in1k"),
        ("--encoder-size 48", "encoder_size 48", "64"),
        ("--image-size 48", "encoder_size 128", "64"),
        ("--patch-size 8", "encoder_size 48", "64"),
        ("--layers 0,1", "layers [0, 1]", "[1, 3]"),
    ],
)
def test_a_flag_that_contradicts_the_decoder_is_refused_with_both_values(stage_1, flags, ours, theirs):
    rae_encoder.draw_demo("my images", num=4)
    known = {**KNOWN, "data": "my images", "encoder_weights": "random", "encoder_size": None}
    config = {"encoder": KNOWN["encoder"], "encoder_hash": Encoder("test_vit", weights="random").hash}
    write_decoder("decoder.pt", known, **config, encoder_size=64, layers=[1, 3], image_size=24)
    short = "--decoder decoder.pt --batch-size 4 --model DiT-mini --steps 2 --workers 0"
    line = message(flow_train.main, [*short.split(), *flags.split()])
    assert ours in line and theirs in line and "--decoder decoder.pt has" in line


# Previews


@pytest.mark.parametrize(("num_classes", "num"), [(3, 12), (1000, 40)])
def test_a_preview_has_four_images_of_each_class(tmp_path, monkeypatch, num_classes, num):
    """Of up to ten classes; a preview of the same step, of before a run went back, gives way."""
    before = tmp_path / "preview-0000004"
    before.mkdir()

    def run(command, **_):
        assert not before.exists()
        args = sample.parse_args(command[2:])
        assert (args.num, args.flow, args.decoder) == (num, f"{tmp_path}/last.pt", "decoder.pt")
        assert args.out == str(before) and args.device == "cpu"
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(flow_train.subprocess, "run", run)
    cpu = torch.device("cpu")
    flow_train.save_preview(tmp_path, 4, [None, None], "decoder.pt", num_classes, cpu)
