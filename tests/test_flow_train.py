"""Stage 2: shift, times, loss, schedule and step against closed forms; Theorem 1 of the paper."""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import equal, message, read

import dit_dh
import flow_train
import rae_encoder


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
    args = argparse.Namespace(lr=2e-4, final_lr=2e-5, hold_epochs=40, decay_epochs=800)
    expected = {0: 2e-4, 40: 2e-4, 420: 1.1e-4, 800: 2e-5, 1400: 2e-5}
    for epoch, lr in expected.items():
        assert flow_train.learning_rate(epoch, args) == pytest.approx(lr)


SMALL = dict(width=16, depth=1, heads=2, head_width=32, head_depth=1, head_heads=2)


def small_step(accum=1, clip=0.0, poison=False, poison_gradient=False):
    """(loss, gradient norm, gradients, changes of the weights) of one step of plain gradient descent."""
    torch.manual_seed(0)
    model = dit_dh.build("DiT-DH-S", (8, 2, 2), 3, **SMALL)
    weights = [p for p in model.parameters() if p.requires_grad]
    for weight in weights:
        torch.nn.init.normal_(weight, std=0.1)
    before = [weight.detach().clone() for weight in weights]
    x, y = torch.randn(8, 8, 2, 2), torch.randint(3, (8,))
    if poison:
        x[0, 0, 0, 0] = math.nan
    if poison_gradient:
        weights[3].register_hook(lambda gradient: gradient / 0)
    args = argparse.Namespace(accum=accum, clip=clip, precision="fp32", time_dist="uniform")
    torch.manual_seed(1)
    loss, norm = flow_train.train_step(model, torch.optim.SGD(weights, lr=1.0), x, y, args, shift=2.0)
    changes = [weight.detach() - start for weight, start in zip(weights, before, strict=True)]
    return loss, norm, [weight.grad for weight in weights], changes


def test_micro_batches_give_the_step_of_one_large_batch():
    one, four = small_step(accum=1), small_step(accum=4)
    assert one[0].item() == pytest.approx(four[0].item(), rel=1e-5)
    for a, b in zip(one[2], four[2], strict=True):
        assert (a - b).abs().max() <= 1e-5 * a.abs().max()
    assert min(gradient.abs().max() for gradient in one[2]) > 0


def test_gradient_norm_is_clipped():
    _, norm, gradients, _ = small_step()
    assert norm.item() == pytest.approx(torch.cat([g.flatten() for g in gradients]).norm().item(), rel=1e-5)
    _, same_norm, clipped, _ = small_step(clip=norm.item() / 2)
    assert same_norm == norm
    for whole, half in zip(gradients, clipped, strict=True):
        assert torch.allclose(half, whole / 2, rtol=1e-4, atol=1e-9)


def test_a_step_that_is_not_finite_changes_nothing():
    loss, _, _, changes = small_step(poison=True)
    assert not torch.isfinite(loss)
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


def test_theorem_1_a_network_narrower_than_a_token_cannot_fit_one_image():
    token_width, narrow = 16, 8
    bound = (token_width - narrow) / token_width
    assert bound * 0.97 < fit_one_image(narrow) < bound * 1.2
    assert fit_one_image(64) < bound * 0.2


# The command at tiny size, in this process


TINY = (
    "--decoder= --model DiT-DH-S --width 16 --depth 1 --heads 2 --head-width 32 --head-depth 1 --head-heads 2"
)
TINY += " --batch-size 8 --steps 6 --log-every 1 --save-every 2 --workers 0"


def train(out, *flags):
    flow_train.main([*TINY.split(), "--out", f"runs/{out}", *map(str, flags)])


def losses(out):
    lines = Path(f"runs/{out}/metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def same_training(a, b):
    a, b = read(f"runs/{a}/last.pt"), read(f"runs/{b}/last.pt")
    return all(equal(a[key], b[key]) for key in ("step", "mean", "var", "model", "ema", "optimizer"))


def no_images(*_):
    raise AssertionError("an image was decoded or encoded")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_cached_latents_train_like_images(folder, monkeypatch, precision):
    """To the last bit, over three epochs of other flips; the second run reads no image at all."""
    flags = ["--precision", precision, "--stats-images", 20]
    train("plain", *flags)
    train("cached", *flags, "--cache-latents")
    assert same_training("plain", "cached")
    monkeypatch.setattr(rae_encoder, "read_image", no_images)
    monkeypatch.setattr(rae_encoder.Encoder, "forward", no_images)
    train("again", *flags, "--cache-latents")
    assert same_training("plain", "again") and losses("plain") == losses("again")
    assert len(list(Path("runs").glob("latents-*"))) == 1


def test_the_cache_is_made_anew_for_other_latents(folder):
    def caches(*flags):
        train("run", "--steps", 1, "--cache-latents", "--resume", "start.pt", *flags)
        return len(list(Path("runs").glob("latents-*.bin")))

    train("start", "--steps", 1)
    os.replace("runs/start/last.pt", "start.pt")
    assert caches() == caches("--seed", 1) == 1  # the seed decides the flips, not the latents
    assert caches("--precision", "bf16") == 2
    assert caches("--skip-broken") == 3
    os.utime("data/demo/bar/0000.png", (1, 1))
    assert caches() == 4
    os.rename("data/demo/bar/0000.png", "data/demo/bar/0001.png")
    assert caches() == 5
    rae_encoder.read_image("data/demo/bar/0001.png").resize((40, 40)).save("data/demo/bar/0001.png")
    os.utime("data/demo/bar/0001.png", (1, 1))
    assert caches() == 6


def test_the_cache_takes_the_place_of_broken_images_like_training_does(folder):
    Path("data/demo/circle/0001.png").write_text("broken")
    assert "0001.png: not a readable image" in message(train, "run", "--cache-latents")
    assert not list(Path("runs").glob("latents-*.bin"))
    train("plain", "--skip-broken")
    train("cached", "--skip-broken", "--cache-latents")
    assert same_training("plain", "cached")


def test_a_cache_larger_than_the_disk_is_refused_at_once(folder, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: argparse.Namespace(free=1000))
    assert "no room for 0.0 GB" in message(train, "run", "--cache-latents")


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
    train("rele", "--init", "gone.pt")  # a run that goes on does not start again
    assert read("runs/rele/last.pt")["step"] == 6

    os.rename("data/demo/ring", "data/ring")  # three classes
    train("three", *still, "--init", "released.pt")
    three, table = read("runs/three/last.pt"), "y_embedder.embedding_table.weight"
    assert equal(three["model"], three["ema"])
    old, new = source["ema"][table], three["ema"][table]
    assert new.shape[0] == 4 and torch.equal(new[-1], old[-1])
    assert not any(torch.equal(row, other) for row in new[:-1] for other in old)
    others = [{key: value for key, value in s.items() if key != table} for s in (three["ema"], source["ema"])]
    assert equal(*others)
    said = message(train, "wide", "--width", 24, "--init", "released.pt")
    assert "--init released.pt is of {'width': 16" in said and "this run of {'width': 24" in said
    assert "this run of" in message(train, "heads", "--heads", 1, "--init", "released.pt")
    Path("text.pt").write_text("text")
    assert "text.pt: not a flow checkpoint" in message(train, "x", "--init", "text.pt")


def test_recomputed_activations_train_alike(folder):
    train("plain")
    train("less-memory", "--checkpoint-activations")
    assert same_training("plain", "less-memory")


def test_the_networks_compile_once_and_in_one_graph():
    torch._dynamo.reset()
    for name, sizes in (("DiT-DH-S", SMALL), ("DiT-S", dict(width=16, depth=1, heads=2))):
        for recompute in (False, True):
            model = dit_dh.build(name, (8, 2, 2), 3, **sizes).train()
            model.checkpoint_activations = recompute
            model.compile(backend="eager", fullgraph=True)  # an error at a graph break
            optimizer = torch.optim.AdamW(model.parameters())
            args = argparse.Namespace(time_dist="uniform", accum=2, precision="bf16", clip=1.0)
            for step in range(3):
                with torch._dynamo.config.patch(error_on_recompile=step > 0):
                    x, y = torch.randn(4, 8, 2, 2), torch.randint(3, (4,))
                    flow_train.train_step(model, optimizer, x, y, args, 1.0)


# What can go wrong


def test_a_gradient_that_is_not_finite_changes_nothing():
    loss, norm, _, changes = small_step(poison_gradient=True)
    assert torch.isfinite(loss) and not torch.isfinite(norm)
    assert all(change.eq(0).all() for change in changes)


def test_ten_bad_steps_in_a_row_end_the_run_and_nine_do_not(folder, monkeypatch, capsys):
    loss, calls = flow_train.flow_loss, []

    def poisoned(model, x, *rest):
        calls.append(0)
        return loss(model, x * (math.nan if bad(len(calls)) else 1), *rest)

    monkeypatch.setattr(flow_train, "flow_loss", poisoned)
    bad = lambda step: step in (2, *range(4, 13))  # noqa: E731
    train("nine", "--steps", 14)
    assert read("runs/nine/last.pt")["step"] == 14
    assert json.loads(Path("runs/nine/metrics.jsonl").read_text().splitlines()[-1])["skipped"] == 10
    assert "step 2 skipped: loss nan" in capsys.readouterr().err
    calls.clear()
    bad = lambda step: step > 3  # noqa: E731
    said = message(train, "ten", "--steps", 14)
    assert "10 steps in a row not finite" in said and "fp32" in said and "runs/ten/last.pt" in said
    assert len(calls) == 13 and read("runs/ten/last.pt")["step"] == 12  # a saved state is always finite
    assert all(torch.isfinite(value).all() for value in read("runs/ten/last.pt")["ema"].values())


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("hacked",)


def test_files_that_are_no_checkpoint(folder):
    train("run", "--steps", 4)  # saved at 2 and 4
    last = Path("runs/run/last.pt")
    whole = last.read_bytes()
    last.write_bytes(whole[: len(whole) // 2])
    assert read("runs/run/previous.pt")["step"] == 2
    said = message(train, "run")
    assert "last.pt: not a weights file" in said and "--resume runs/run/previous.pt" in said
    train("run", "--resume", "runs/run/previous.pt")
    assert read(last)["step"] == 6
    last.unlink()  # as a kill between the two renames leaves it
    train("run")
    assert read(last)["step"] == 6
    torch.save({"format": "rae-decoder/1"}, last)
    assert "not a rae-flow/1 checkpoint" in message(train, "run")
    torch.save(Malicious(), last)
    assert "last.pt: not a weights file" in message(train, "run") and not Path("hacked").exists()
    last.write_bytes(whole)
    assert "has sizes" in message(train, "run", "--depth", 2)


def test_a_run_folder_has_one_run(folder):
    Path("runs/run").mkdir(parents=True)
    other = "import fcntl; file = open('runs/run/metrics.jsonl', 'a'); fcntl.lockf(file, fcntl.LOCK_EX);"
    other = [sys.executable, "-c", other + "print(flush=True); input()"]
    process = subprocess.Popen(other, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    process.stdout.readline()  # it has the lock
    assert "another run is in it" in message(train, "run")
    process.communicate("\n")
    train("run", "--steps", 1)


def test_a_folder_or_disk_that_cannot_be_written(folder, monkeypatch):
    Path("runs").write_text("a file")
    assert "--out runs/run" in message(train, "run") and "can't be written" in message(train, "run")
    Path("runs").unlink()

    def full(*_):
        raise OSError(28, "No space left on device")

    train("run", "--steps", 2)
    monkeypatch.setattr(torch, "save", full)
    said = message(train, "run")
    assert "last.pt: can't be written ([Errno 28] No space left" in said and "is whole" in said
    assert read("runs/run/last.pt")["step"] == 2


def test_flags_that_cannot_be_meant():
    for flags, words in (
        (["--ema", "1"], "--ema 1.0: expected"),
        (["--ema", "-0.1"], "--ema -0.1: expected"),
        (["--shift", "0"], "--shift 0.0: expected more than 0"),
        (["--decay-epochs", "3"], "--decay-epochs 3.0 is not after --hold-epochs 12"),
    ):
        assert words in message(flow_train.parse_args, flags)


def test_the_demos_sizes_are_of_its_own_network():
    widths = {(): 128, ("--encoder", "dinov2-small"): None, ("--model", "DiT-S"): None}
    widths |= {("--model", "DiT-S", "--width", "64"): 64, ("--encoder", "test_vit"): 128}
    for flags, width in widths.items():
        assert flow_train.parse_args(["--data", "x", *flags]).width == width
    assert flow_train.parse_args(["--compile"]).compile is True
    assert flow_train.parse_args(["--no-compile"]).compile is False
    assert flow_train.parse_args([]).compile is None
