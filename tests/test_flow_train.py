"""Stage 2: shift, times, loss, schedule and step against closed forms; Theorem 1 of the paper."""

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import timm
import torch
from conftest import equal, message, read
from safetensors.torch import save_file
from test_sample import write_decoder

import dit_dh
import flow_train
import sample
from rae_encoder import Encoder


def test_shift_against_the_paper():
    assert flow_train.default_shift((768, 16, 16)) == pytest.approx(6.93, abs=0.005)
    assert flow_train.default_shift((768, 32, 32)) == pytest.approx(13.86, abs=0.005)
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


def test_learning_rate_at_exact_epochs():
    """1,281,167 images in batches of 1,024 are 1,251 steps an epoch."""
    args = argparse.Namespace(hold_epochs=40, decay_epochs=800)
    hold, decay = flow_train.milestones(args, 1251, 1400 * 1251)
    expected = {0: 2e-4, 40: 2e-4, 420: 1.1e-4, 800: 2e-5, 1400: 2e-5}
    for epoch, lr in expected.items():
        assert flow_train.learning_rate(epoch * 1251, hold, decay, 2e-4, 2e-5) == pytest.approx(lr)


def test_a_run_measured_in_steps_decays_over_its_second_half():
    args = argparse.Namespace(hold_epochs=None, decay_epochs=None)
    hold, decay = flow_train.milestones(args, 1251, 1000)
    expected = {0: 2e-4, 500: 2e-4, 750: 1.1e-4, 1000: 2e-5}
    for step, lr in expected.items():
        assert flow_train.learning_rate(step, hold, decay, 2e-4, 2e-5) == pytest.approx(lr)
    # Held up to its end or beyond, it would never decay, or from the first step on be the last.
    for epochs in (0.8, 1):
        args = argparse.Namespace(hold_epochs=epochs, decay_epochs=None)
        assert "--hold-epochs ends at step" in message(flow_train.milestones, args, 1251, 1000)


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
    assert finite
    assert one["loss"].item() == pytest.approx(four["loss"].item(), rel=1e-5)
    for a, b in zip(large, small, strict=True):
        assert (a - b).abs().max() <= 1e-5 * a.abs().max()
    assert min(gradient.abs().max() for gradient in large) > 0


def test_gradient_norm_is_clipped():
    terms, _, gradients, _ = small_step()
    norm = terms["gradient_norm"]
    assert norm.item() == pytest.approx(torch.cat([g.flatten() for g in gradients]).norm().item(), rel=1e-5)
    same, _, clipped, _ = small_step(clip=norm.item() / 2)
    assert same["gradient_norm"] == norm
    for whole, half in zip(gradients, clipped, strict=True):
        assert torch.allclose(half, whole / 2, rtol=1e-4, atol=1e-9)


def test_a_step_that_is_not_finite_changes_nothing():
    terms, finite, _, changes = small_step(poison=True)
    assert not torch.isfinite(terms["loss"]) and not finite
    assert all(change.eq(0).all() for change in changes)
    terms, finite, _, changes = small_step(poison_gradient=True)
    assert torch.isfinite(terms["loss"]) and not torch.isfinite(terms["gradient_norm"]) and not finite
    assert all(change.eq(0).all() for change in changes)
    assert any(change.ne(0).any() for change in small_step()[3])


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


def logged(out):
    return [json.loads(line) for line in Path(f"runs/{out}/metrics.jsonl").read_text().splitlines()]


def same_training(a, b):
    a, b = (read(f"runs/{out}/last.pt") for out in (a, b))
    return all(equal(a[key], b[key]) for key in ("step", "mean", "var", "model", "ema", "optimizer"))


@pytest.fixture
def encoded(monkeypatch):
    """The number of images in each call of the encoder so far."""
    batches = []
    forward = Encoder.forward

    def counted(encoder, x):
        batches.append(len(x))
        return forward(encoder, x)

    monkeypatch.setattr(Encoder, "forward", counted)
    return batches


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_cached_latents_train_like_images(folder, encoded, precision):
    """To the last bit, over three epochs of other flips; all images and mirrors are encoded just once."""
    flags = ["--precision", precision, "--stats-images", 20]
    train("plain", *flags, "--no-cache-latents")
    assert sum(encoded) == 2 * 20 + 6 * 8
    encoded.clear()
    train("cached", *flags, "--cache-latents")
    assert sum(encoded) == 2 * 22
    assert same_training("plain", "cached")
    losses = [[record["loss"] for record in logged(run)] for run in ("plain", "cached")]
    assert losses[0] == losses[1]


def test_the_cache_takes_the_place_of_broken_images_like_training_does(folder, capsys):
    Path("data/demo/circle/0001.png").write_text("broken")
    assert "0001.png: not a readable image" in message(train, "run", "--cache-latents")
    for run, flag in (("plain", "--no-cache-latents"), ("cached", "--cache-latents")):
        train(run, "--skip-broken", flag)
        assert "1 broken images were replaced by others" in capsys.readouterr().err
    assert same_training("plain", "cached")


def test_a_cache_larger_than_the_memory_is_refused_at_once(folder, monkeypatch, encoded):
    """22 images and their mirrors, latents (64,4,4), take 180,224 bytes a rank."""
    monkeypatch.setattr(flow_train, "available_memory", lambda: 180_223)
    assert "--cache-latents: no memory for 0.0 GB" in message(train, "run", "--cache-latents")
    assert not encoded
    monkeypatch.setattr(flow_train, "available_memory", lambda: 2 * 180_224 - 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert "--cache-latents: no memory for 0.0 GB" in message(train, "run", "--cache-latents")
    monkeypatch.setattr(flow_train, "available_memory", lambda: 2 * 180_224)
    train("run", "--cache-latents")


# Other starts: released weights, another checkpoint


def test_init_starts_model_and_ema_from_weights(folder):
    """--steps 1 at learning rate 0: the checkpoint is the start."""
    train("source")
    still = ["--steps", 1, "--lr", 0, "--final-lr", 0, "--ema", 0]
    source = read("runs/source/last.pt")
    torch.save(source["ema"], "released.pt")
    for name in ("released.pt", "runs/source/last.pt"):
        train(name[:4], *still, "--init", name)
        start = read(f"runs/{name[:4]}/last.pt")
        assert equal(start["model"], source["ema"]) and equal(start["ema"], source["ema"])

    os.rename("data/demo/ring", "data/ring")  # three classes
    train("three", *still, "--init", "released.pt")
    three = read("runs/three/last.pt")
    table = "y_embedder.embedding_table.weight"
    assert equal(three["model"], three["ema"])
    old = source["ema"][table]
    new = three["ema"][table]
    assert new.shape[0] == 4 and torch.equal(new[-1], old[-1])
    assert not any(torch.equal(row, other) for row in new[:-1] for other in old)
    others = [{key: value for key, value in s.items() if key != table} for s in (three["ema"], source["ema"])]
    assert equal(*others)
    line = message(train, "wide", "--width", 24, "--init", "released.pt")
    assert "--init released.pt has sizes {'width': 16" in line and "this run {'width': 24" in line
    assert "this run {" in message(train, "heads", "--heads", 1, "--init", "released.pt")
    Path("text.pt").write_text("text")
    assert "--init text.pt: not a flow checkpoint" in message(train, "x", "--init", "text.pt")


def test_recomputed_activations_train_alike(folder):
    train("plain")
    train("less-memory", "--checkpoint-activations")
    assert same_training("plain", "less-memory")


@pytest.mark.slow
def test_the_networks_compile_once_and_in_one_graph():
    torch._dynamo.reset()
    for name, sizes in (("DiT-DH-S", SMALL), ("DiT-S", dict(width=16, depth=1, heads=2))):
        for recompute in (False, True):
            model = dit_dh.build(name, (8, 2, 2), 3, **sizes).train()
            model.checkpoint_activations = recompute
            model.compile(backend="eager", fullgraph=True)  # an error at a graph break
            optimizer = torch.optim.AdamW(model.parameters())
            options = dict(time_dist="uniform", shift=1.0, clip=1.0, accum=2, precision="bf16")
            for step in range(3):
                with torch._dynamo.config.patch(error_on_recompile=step > 0):
                    x = torch.randn(4, 8, 2, 2)
                    y = torch.randint(3, (4,))
                    flow_train.train_step(model, optimizer, x, y, **options)


# Runs that go on


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_that_goes_on_keeps_its_precision(folder, precision):
    """Whichever of the two is this hardware's default; a flag still changes it."""
    without = [flag for flag in TINY.split() if flag not in ("--precision", "fp32")]

    def train(out, *flags):
        flow_train.main([*without, "--out", f"runs/{out}", *flags])
        return read(f"runs/{out}/last.pt")["precision"]

    assert train("whole", "--precision", precision) == precision
    assert train("resumed", "--precision", precision, "--steps", "2") == precision
    assert train("resumed") == precision
    assert same_training("whole", "resumed")
    other = {"fp32": "bf16", "bf16": "fp32"}[precision]
    assert train("resumed", "--steps", "7", "--precision", other) == other

    old = read("runs/resumed/last.pt")  # older versions have it among the flags alone
    del old["precision"]
    old["args"]["precision"] = precision
    torch.save(old, "runs/resumed/last.pt")
    assert train("resumed", "--steps", "8") == precision


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
    train("run", "--stats", "same.pt", "--init", "same.pt")  # the run itself goes on from its last step
    train("whole")
    assert same_training("run", "whole")


def test_a_run_shorter_than_before_is_refused(folder):
    train("run")
    line = message(train, "run", "--steps", 5)
    assert line.startswith("runs/run/last.pt is at step 6, this run ends at 5: more --steps")
    assert read("runs/run/last.pt")["step"] == 6
    without = [flag for flag in TINY.split() if flag not in ("--steps", "6")]
    line = message(flow_train.main, [*without, "--out", "runs/run", "--epochs", "2"])
    assert "is at step 6, this run ends at 4" in line


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
    write_decoder("decoder.pt", encoder_hash=encoder.hash, encoder_size=64, latent_shape=[64, 4, 4])

    flags = ["--preview-every", 0, "--decoder", "decoder.pt", "--encoder-weights"]
    train("run", "--steps", 1, *flags, "here/vit.pt")
    train("run", "--steps", 2, *flags, "./here/../here/vit.pt")
    train("run", "--steps", 3, *flags, "copy.safetensors")
    assert read("runs/run/last.pt")["step"] == 3
    train("whole", "--steps", 3, *flags, "here/vit.pt")
    assert same_training("run", "whole")

    line = message(train, "other", *flags, "there/vit.pt")
    assert f"--decoder decoder.pt has {encoder.hash}: they are no pair" in line
    line = message(train, "run", "--encoder-weights", "there/vit.pt")
    assert line.startswith(f"runs/run/last.pt has encoder_hash {encoder.hash}, this run ")


def test_numbered_copies_are_links_that_stay(folder):
    """No second write of a checkpoint; a later last.pt, or the same number again, leaves the others alone."""
    last = Path("runs/run/last.pt")
    numbered = [Path(f"runs/run/{step:07d}.pt") for step in (2, 4)]
    train("run", "--steps", 2, "--keep-every", 2)
    assert numbered[0].samefile(last)
    train("run", "--steps", 4, "--keep-every", 2)
    assert numbered[1].samefile(last) and not numbered[0].samefile(last)
    assert [read(path)["step"] for path in numbered] == [2, 4]

    second = read(numbered[1])
    train("run", "--resume", numbered[0], "--steps", 4, "--keep-every", 2)
    assert numbered[1].samefile(last)
    assert read(numbered[0])["step"] == 2 and equal(second["model"], read(last)["model"])


def test_what_a_killed_run_was_writing_is_removed_and_nothing_else(folder):
    os.makedirs("runs/[run]")
    Path("runs/[run]/last.pt.123.tmp").touch()
    Path("runs/[run]/notes.tmp").touch()
    train("[run]", "--steps", 1)
    assert {path.name for path in Path("runs/[run]").iterdir()} >= {"notes.tmp", "last.pt"}
    assert not Path("runs/[run]/last.pt.123.tmp").exists()


# What can go wrong


def test_files_that_are_no_checkpoint(folder):
    train("run", "--steps", 4)
    last = Path("runs/run/last.pt")
    whole = last.read_bytes()
    last.write_bytes(whole[: len(whole) // 2])
    assert "last.pt: not a file of weights" in message(train, "run")
    for other in ({"format": "rae-decoder/1"}, {"format": "rae-flow/1", "step": 4}):
        torch.save(other, last)
        assert "last.pt: not a whole rae-flow/1 checkpoint" in message(train, "run")
    last.write_bytes(whole)
    assert "has sizes" in message(train, "run", "--depth", 2)
    train("run")
    assert read(last)["step"] == 6


def test_a_system_without_locks_runs_and_says_so(folder, monkeypatch, capsys):
    find_spec = flow_train.importlib.util.find_spec
    missing = lambda name: None if name == "fcntl" else find_spec(name)  # noqa: E731
    monkeypatch.setattr(flow_train.importlib.util, "find_spec", missing)
    monkeypatch.setitem(sys.modules, "fcntl", None)  # to import it would be an error
    train("run", "--steps", 1)
    assert "runs/run can't be locked on this system" in capsys.readouterr().err
    assert read("runs/run/last.pt")["step"] == 1


# Flags


def test_the_sizes_of_a_preset_are_of_its_own_network():
    """--model names another one, with its own sizes; those of the demo never leak into one's own data."""
    cases = [
        ([], (128, 4)),
        (["--data", "x"], (384, 4)),
        (["--data", "x", "--model", "DiT-DH-S"], (None, None)),
        (["--data", "x", "--model", "DiT-S", "--width", "64"], (64, None)),
        (["--model", "DiT-S"], (None, None)),
        (["--preset", "imagenet256", "--data", "x"], (None, None)),
        (["--data", "x", "--width", "64"], (64, 4)),
    ]
    for flags, sizes in cases:
        args = flow_train.parse_args(flags)
        assert (args.width, args.depth) == sizes, flags


def test_a_network_is_stored_under_the_papers_name():
    """A run goes on whatever the case in which its network is named; an unknown name is found at once."""
    for name in ("DiT-DH-S", "dit-dh-s", "DIT-DH-S"):
        assert flow_train.parse_args(["--model", name]).model == "DiT-DH-S"
    assert flow_train.parse_args(["--model", "dit-xl"]).model == "DiT-XL"
    line = message(flow_train.parse_args, ["--model", "DiT-DH-M"])
    assert "--model: invalid choice: 'DiT-DH-M' (choose from" in line


@pytest.mark.parametrize(("num_classes", "classes"), [(3, "0,1,2"), (1000, "0,1,2,3,4,5,6,7,8,9")])
def test_a_preview_has_four_images_of_each_class(tmp_path, monkeypatch, num_classes, classes):
    """Of up to ten classes; a preview of the same step, of before a run went back, gives way."""
    left = tmp_path / "preview-0000004"
    left.mkdir()

    def run(command, **_):
        assert not left.exists()
        args = sample.parse_args(command[2:])
        assert (args.classes, args.num) == (classes, 4 * len(classes.split(",")))
        assert (args.flow, args.decoder, args.out) == ("last.pt", "decoder.pt", str(left))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(flow_train.subprocess, "run", run)
    cpu = torch.device("cpu")
    flow_train.save_preview(tmp_path, 4, [None, None], "last.pt", "decoder.pt", num_classes, cpu)


def test_own_data_has_nothing_of_the_demo():
    args = flow_train.parse_args(["--data", "x"])
    assert (args.preset, args.encoder, args.encoder_weights) == ("small", "dinov2-small", None)
    assert (args.image_size, args.encoder_size, args.decoder, args.cache_latents) == (64, 112, None, None)

    # Its layers are of any encoder, as raev2's, and give way to the last alone.
    assert args.layers == list(range(1, 12))
    assert flow_train.parse_args(["--data", "x", "--layers", "last"]).layers is None
    for preset, layers in (("small", list(range(1, 12))), ("raev2", [11, 13, 15, 17, 19, 21, 23])):
        flags = ["--preset", preset, "--data", "x", "--encoder", "dinov2-large"]
        assert flow_train.parse_args(flags).layers == layers


def test_epochs_take_the_place_of_the_steps_of_a_preset():
    for flags, length in (
        ([], (26, None)),
        (["--steps", "5"], (26, 5)),  # steps count
        (["--data", "x"], (None, 2000)),
        (["--data", "x", "--epochs", "3"], (3, None)),
        (["--data", "x", "--steps", "5"], (None, 5)),
    ):
        args = flow_train.parse_args(flags)
        assert (args.epochs, args.steps) == length, flags


def test_compile_is_on_off_or_up_to_the_device():
    for flags, value in ((["--compile"], True), (["--no-compile"], False), ([], None)):
        assert flow_train.parse_args(flags).compile is value
