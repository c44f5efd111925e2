"""Stage 1: the decoder against a naive one, its released names, its loss, schedule and step."""

import copy
import hashlib
import io
import json
import math
import os
import socket
import types
from pathlib import Path
from urllib.error import URLError

import lpips
import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
import torchvision
from conftest import equal, message, read
from PIL import Image
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import rae_decoder_train
import rae_encoder
from rae_decoder_train import Decoder, decoder_step, diff_augment, load_decoder

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(autouse=True)
def small_vit(monkeypatch):
    """ViT-mini small enough for loops in Python."""
    monkeypatch.setitem(rae_decoder_train.DECODERS, "ViT-mini", (16, 2, 2, 24))


def random_decoder(channels=6, grid=3, patch_size=4):
    torch.manual_seed(0)
    decoder = Decoder("ViT-mini", channels, grid, patch_size, IMAGENET_MEAN, IMAGENET_STD).eval()
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return decoder


def naive_decoder(state, z, heads, patch, mean, std):
    """MAE's decoder (He et al. 2022) in numpy float64 for one image, from the released names."""
    s = {name: value.double().numpy() for name, value in state.items()}

    def linear(x, name):
        return x @ s[f"{name}.weight"].T + s[f"{name}.bias"]

    def layer_norm(x, name):
        x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-12)
        return x * s[f"{name}.weight"] + s[f"{name}.bias"]

    channels, grid, _ = z.shape
    x = linear(z.reshape(channels, -1).T, "decoder_embed")
    x = np.concatenate([s["trainable_cls_token"][0], x]) + s["decoder_pos_embed"][0]
    depth = 1 + max(int(name.split(".")[1]) for name in s if name.startswith("decoder_layers"))
    for i in range(depth):
        block = f"decoder_layers.{i}"
        h = layer_norm(x, f"{block}.layernorm_before")
        q, k, v = (linear(h, f"{block}.attention.attention.{name}") for name in ("query", "key", "value"))
        size, mixed = q.shape[1] // heads, []
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            scores = np.exp(q[:, part] @ k[:, part].T / math.sqrt(size))
            mixed.append(scores / scores.sum(1, keepdims=True) @ v[:, part])
        x = x + linear(np.concatenate(mixed, 1), f"{block}.attention.output.dense")
        h = linear(layer_norm(x, f"{block}.layernorm_after"), f"{block}.intermediate.dense")
        h = h * np.vectorize(lambda value: (1 + math.erf(value / math.sqrt(2))) / 2)(h)
        x = x + linear(h, f"{block}.output.dense")
    x = linear(layer_norm(x, "decoder_norm"), "decoder_pred")[1:]
    image = np.zeros((3, grid * patch, grid * patch))
    for n in range(grid * grid):
        for i, value in enumerate(x[n]):
            row, column, channel = i // (3 * patch), i // 3 % patch, i % 3
            image[channel, n // grid * patch + row, n % grid * patch + column] = (
                value * std[channel] + mean[channel]
            )
    return image


def test_decoder_agrees_with_a_naive_one():
    decoder, z = random_decoder(), torch.randn(2, 6, 3, 3)
    expected = [
        naive_decoder(decoder.state_dict(), z_i.double().numpy(), 2, 4, IMAGENET_MEAN, IMAGENET_STD)
        for z_i in z
    ]
    assert np.abs(decoder(z).detach().numpy() - np.stack(expected)).max() < 1e-5 * np.abs(expected).max()


def test_position_embedding_has_the_released_order():
    position = rae_decoder_train.sincos_position(16, 5)[0].double()
    assert position.shape == (25, 16)
    embedded = random_decoder(grid=5).decoder_pos_embed[0].double()
    assert embedded[0].eq(0).all() and torch.equal(embedded[1:], position)
    for row, column, k in ((0, 3, 0), (4, 1, 2), (2, 2, 3)):
        omega = 10_000 ** (-k / 4)
        token = position[row * 5 + column]
        expected = [
            math.sin(column * omega),
            math.cos(column * omega),
            math.sin(row * omega),
            math.cos(row * omega),
        ]
        assert token[[k, 4 + k, 8 + k, 12 + k]].tolist() == pytest.approx(expected, abs=1e-6)


def test_another_token_grid_is_interpolated():
    decoder, z = random_decoder(grid=6), torch.randn(1, 6, 3, 3)
    large = torch.nn.functional.interpolate(z, size=(6, 6), mode="bilinear", align_corners=False)
    assert torch.allclose(decoder(z), decoder(large), atol=1e-4)  # the embedding is affine: the order is free
    assert decoder(z).shape == (1, 3, 24, 24)


RELEASED = """decoder_pos_embed trainable_cls_token decoder_embed.weight decoder_embed.bias
    decoder_norm.weight decoder_norm.bias decoder_pred.weight decoder_pred.bias"""
RELEASED_LAYER = """attention.attention.query attention.attention.key attention.attention.value
    attention.output.dense intermediate.dense output.dense layernorm_before layernorm_after"""


def test_released_names_and_files(tmp_path):
    decoder, z, path = random_decoder(grid=16), torch.randn(1, 6, 16, 16), str(tmp_path / "model.pt")
    state = decoder.state_dict()
    layers = [
        f"decoder_layers.{i}.{n}.{kind}"
        for i in range(2)
        for n in RELEASED_LAYER.split()
        for kind in ("weight", "bias")
    ]
    assert set(state) == {*RELEASED.split(), *layers}
    assert state["decoder_pos_embed"].shape == (1, 257, 16) and state["trainable_cls_token"].shape == (
        1,
        1,
        16,
    )
    bare = {name: value for name, value in state.items() if name != "decoder_pos_embed"}
    autoencoder = {f"encoder.{name}": value for name, value in state.items()}
    autoencoder |= {f"decoder.{name}": value + 0 for name, value in state.items()}
    autoencoder["encoder.decoder_pred.bias"] = torch.zeros(48)
    files = [
        state,
        bare,
        {"model": {f"module.decoder.{name}": value for name, value in state.items()}},
        {"ema": state, "model": {}, "step": 5},
        {"state_dict": state, "model": "ViT-XL"},
        {"ema": autoencoder, "model": {}, "optimizer": {"state": {}}},
    ]
    for prefix in ("_orig_mod.", "module.", "_orig_mod.module.", "module._orig_mod."):
        files.append({"model": {f"{prefix}{name}": value for name, value in autoencoder.items()}})
    files.append({f"module.decoder._orig_mod.{name}": value for name, value in state.items()})
    for i, file in enumerate(files):
        torch.save(file, path)
        loaded, config = load_decoder(path)
        assert torch.equal(loaded(z), decoder(z)) and config == {} and not loaded.training, i
    del bare["trainable_cls_token"]
    torch.save(bare, path)
    assert load_decoder(path)[0].trainable_cls_token.eq(0).all()
    torch.save(state, path)
    siglip, _ = load_decoder(path, "siglip2-base")  # mean and std 0.5
    pixels = (decoder(z) - decoder.mean) / decoder.std
    assert torch.allclose(siglip(z), pixels * 0.5 + 0.5, atol=1e-5)
    no_decoder = "not a decoder, ours or released"
    refused = [
        ({"a": torch.zeros(1)}, f"{no_decoder} (it has no decoder_embed.weight)"),
        ({"model": torch.zeros(1)}, f"{no_decoder} (it has no decoder_embed.weight)"),
        (state | {"extra": torch.zeros(1)}, f"{no_decoder} (Unexpected key(s) in state_dict"),
        (state | {"decoder_embed.weight": torch.zeros(17, 6)}, f"{no_decoder} (none has the width 17)"),
        ({"format": "rae-flow/1", "ema": {}}, "is a flow of flow_train.py, not a decoder"),
    ]
    for file, line in refused:
        torch.save(file, path)
        found = message(load_decoder, path, "dinov2-base", "--weights")
        assert found.startswith(f"--weights {path}: ") and line in found


def test_learning_rate_at_exact_steps():
    def lr(step):
        return rae_decoder_train.learning_rate(step, steps=110, warmup=10, lr=2e-4, final_lr=2e-5)

    assert [lr(0), lr(4), lr(9), lr(10)] == pytest.approx([2e-5, 1e-4, 2e-4, 2e-4])
    assert [lr(60), lr(110)] == pytest.approx([1.1e-4, 2e-5])


@pytest.fixture
def quick_vgg(monkeypatch):
    """torchvision's VGG-16 without its classifier, which takes seconds to draw."""
    layers = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])
    network = types.SimpleNamespace(features=layers)
    monkeypatch.setattr(torchvision.models, "vgg16", lambda **_: copy.deepcopy(network))


@pytest.mark.slow
def test_lpips_is_the_packages_own():
    torch.manual_seed(5)
    network = rae_decoder_train.perceptual_loss("random")
    x, y = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    torch.manual_seed(0)
    expected = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    assert torch.allclose(network(x, y), expected(x, y)) and network(x, x).eq(0).all()
    assert not any(p.requires_grad for p in network.parameters())


@pytest.fixture
def vgg(tmp_path, monkeypatch, quick_vgg):
    """A random VGG-16 in torch's cache, as if it were the published file: its state dict and its path."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    torch.manual_seed(3)
    places = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
    widths = (3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
    state = {"classifier.0.bias": torch.zeros(1)}
    for i, width, out in zip(places, widths[:-1], widths[1:], strict=True):
        state[f"features.{i}.weight"] = torch.randn(out, width, 3, 3) / math.sqrt(9 * width)
        state[f"features.{i}.bias"] = torch.randn(out)
    return state, publish(tmp_path, monkeypatch, state)


def publish(home, monkeypatch, content):
    """Saves `content` in the format of torchvision's file of 2017, and makes its hash the published one."""
    torch.save(content, home / "x.pth", _use_new_zipfile_serialization=False)
    digest = hashlib.sha256((home / "x.pth").read_bytes()).hexdigest()
    monkeypatch.setattr(rae_decoder_train, "VGG", f"https://nowhere.invalid/vgg16-{digest[:8]}.pth")
    path = home / "hub" / "checkpoints" / f"vgg16-{digest[:8]}.pth"
    path.parent.mkdir(parents=True, exist_ok=True)
    return (home / "x.pth").rename(path)


def test_lpips_takes_torchvisions_file_from_the_cache(vgg):
    state, path = vgg
    x, y = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    network = rae_decoder_train.perceptual_loss("hub")
    expected = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    convolutions = [module for module in expected.net.modules() if isinstance(module, torch.nn.Conv2d)]
    names = [name for name in state if name.startswith("features") and name.endswith("weight")]
    for module, name in zip(convolutions, names, strict=True):
        module.weight.data = state[name]
        module.bias.data = state[name.replace("weight", "bias")]
    assert torch.allclose(network(x, y), expected(x, y), rtol=1e-4)
    assert torch.allclose(rae_decoder_train.perceptual_loss(str(path))(x, y), expected(x, y), rtol=1e-4)
    assert not torch.allclose(rae_decoder_train.perceptual_loss("random")(x, y), expected(x, y), rtol=0.1)


def test_a_damaged_vgg_ends_in_one_line(tmp_path, vgg):
    content = vgg[1].read_bytes()
    for broken in (content[:-1], content[:1000], b"", b"text"):
        vgg[1].write_bytes(broken)
        line = message(rae_decoder_train.perceptual_loss, "hub")
        assert line.startswith(f"{vgg[1]}: damaged, its SHA-256 does not begin with") and "remove it" in line
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "x.pt")
    line = message(rae_decoder_train.perceptual_loss, str(tmp_path / "x.pt"))
    assert line == f"--lpips-weights {tmp_path}/x.pt: not torchvision's VGG-16"


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("hacked",)


def test_no_code_in_a_vgg_file_runs(tmp_path, monkeypatch, quick_vgg):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = publish(tmp_path, monkeypatch, {"features.0.weight": Malicious()})  # of the right hash
    assert "not a file of weights (" in message(rae_decoder_train.perceptual_loss, "hub")
    assert "not a file of weights (" in message(rae_decoder_train.perceptual_loss, str(path))
    monkeypatch.setattr(rae_decoder_train, "VGG", "https://nowhere.invalid/vgg16-00000000.pth")
    path.rename(path.with_name("vgg16-00000000.pth"))
    assert "damaged" in message(rae_decoder_train.perceptual_loss, "hub")
    assert not Path("hacked").exists()


def test_vgg_that_cannot_be_had_ends_in_one_line(tmp_path, monkeypatch, quick_vgg):
    def offline(*_args, **_kwargs):
        raise URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    line = message(rae_decoder_train.perceptual_loss, "hub")
    path = tmp_path / "hub/checkpoints/vgg16-397923af.pth"
    assert line.startswith(f"LPIPS needs {rae_decoder_train.VGG} as {path} (<urlopen error no network>)")
    assert line.endswith("--lpips-weight 0 goes without")


class Recorder(torch.nn.Module):
    """A decoder that keeps the latents it is given and answers with a learned constant."""

    def __init__(self):
        super().__init__()
        self.decoder_pred, self.seen = torch.nn.Linear(1, 1, bias=False), []
        torch.nn.init.constant_(self.decoder_pred.weight, 0.2)

    def forward(self, z):
        self.seen.append(z)
        return self.decoder_pred.weight[0, 0].expand(len(z), 3, 8, 8)


class SmallDisc(torch.nn.Module):
    """Something to be fooled: a convolution whose logit depends on each image alone."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(7)
        self.heads = torch.nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.heads(x).tanh().flatten(1)


def squared(fake, real):
    """Not LPIPS: something easy to compute by hand, from images in [-1,1]."""
    return (fake - real).square().mean((1, 2, 3), keepdim=True)


def step(model, images, z, perceptual=None, disc=None, optimizer=None, **changes):
    """decoder_step with the paper's weights; the optimizer leaves the weights alone."""
    options = {"noise_tau": 0.8, "lpips_weight": 1.0, "gan_weight": 0.75, "accum": 1, "precision": "fp32"}
    optimizer = optimizer or sgd(getattr(model, "module", model))
    return decoder_step(model, optimizer, images, z, perceptual, disc, **(options | changes))


def sgd(network):
    return torch.optim.SGD(network.parameters(), lr=0.0)


def test_noise_of_each_image_is_uniform_in_strength():
    recorder, images, clean = Recorder(), torch.rand(2000, 3, 8, 8), torch.randn(2000, 400, 2, 2)
    torch.manual_seed(0)
    step(recorder, images, clean)
    sigma = (recorder.seen[0] - clean).flatten(1).std(1) / 0.8
    quantiles = torch.quantile(sigma, torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9]))
    assert quantiles.tolist() == pytest.approx([0.1, 0.25, 0.5, 0.75, 0.9], abs=0.04)
    step(recorder, images, clean, noise_tau=0.0)
    assert torch.equal(recorder.seen[1], clean)


def numbers(terms):
    return {name: value.item() for name, value in terms.items()}


@pytest.mark.parametrize("accum", [1, 2])
def test_loss_is_l1_plus_weighted_lpips(accum):
    recorder, images, z = Recorder(), torch.rand(4, 3, 8, 8), torch.zeros(4, 2, 1, 1)
    terms, finite = step(recorder, images, z, squared, lpips_weight=0.3, accum=accum)
    l1, lpips_loss = (images - 0.2).abs().mean().item(), 4 * (images - 0.2).square().mean().item()
    slope = (0.2 - images).sign().mean() + 0.3 * 8 * (0.2 - images).mean()
    expected = {"l1": l1, "lpips": lpips_loss, "loss": l1 + 0.3 * lpips_loss}
    expected["gradient_norm"] = slope.abs().item()
    assert finite and numbers(terms) == pytest.approx(expected, rel=1e-5)
    terms, _ = step(recorder, images, z)
    assert terms.keys() == {"l1", "loss", "gradient_norm"} and terms["loss"] == terms["l1"]


def slow_step(decoder, disc, images, z, u, lpips_weight, gan_weight, accum):
    """Terms and gradients by one graph for each micro-batch, as the formulas read."""
    size = len(images) // accum
    means = {}
    for k in range(accum):
        part = slice(k * size, (k + 1) * size)
        xhat = decoder(z[part])
        l1 = (xhat - images[part]).abs().mean()
        lpips_loss = squared(2 * xhat, 2 * images[part]).mean()
        reconstruction = l1 + lpips_weight * lpips_loss
        gan = -disc(diff_augment(2 * xhat - 1, u[part])).mean()
        last = decoder.decoder_pred.weight
        norms = [
            torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (reconstruction, gan)
        ]
        terms = {"l1": l1, "lpips": lpips_loss, "gan": gan}
        terms["lambda"] = norms[0] / (norms[1] + 1e-6)
        terms["loss"] = reconstruction + gan_weight * terms["lambda"] * gan
        (terms["loss"] / accum).backward()
        means = {name: means.get(name, 0) + value.item() / accum for name, value in terms.items()}
    return means


# The softmax does not see the keys' bias: its gradient is rounding alone.
def gradients(network):
    return {n: p.grad for n, p in network.named_parameters() if "key.bias" not in n}


def same(one, other, tolerance=1e-4):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].abs().max() > 0
        assert (one[name] - other[name]).abs().max() <= tolerance * one[name].abs().max(), name


@pytest.mark.parametrize("accum", [1, 4])
def test_decoder_step_is_the_slow_formula_in_any_micro_batches(accum):
    disc, decoder, reference = SmallDisc(), random_decoder(), random_decoder()
    images, z = torch.rand(8, 3, 12, 12), torch.randn(8, 6, 3, 3)
    torch.manual_seed(3)
    torch.rand(8, 1, 1, 1), torch.randn_like(z)  # the latent noise is drawn first
    u = torch.rand(8, 5)
    expected = slow_step(reference, disc, images, z, u, lpips_weight=0.5, gan_weight=0.75, accum=accum)
    torch.manual_seed(3)
    terms, finite = step(decoder, images, z, squared, disc, lpips_weight=0.5, noise_tau=0.0, accum=accum)
    expected["gradient_norm"] = torch.cat([p.grad.flatten() for p in reference.parameters()]).norm().item()
    assert finite and numbers(terms) == pytest.approx(expected, rel=1e-4)
    same(gradients(reference), gradients(decoder))


def test_micro_batches_change_lambda_alone():
    found = {}
    images, z = torch.rand(8, 3, 12, 12), torch.randn(8, 6, 3, 3)
    for gan in (False, True):
        for accum in (1, 4):
            decoder = random_decoder()
            torch.manual_seed(3)
            terms, _ = step(decoder, images, z, squared, SmallDisc() if gan else None, accum=accum)
            found[gan, accum] = terms, gradients(decoder)
    same(found[False, 1][1], found[False, 4][1])  # with the noise of each image: it does not depend on accum
    for one, four in ((found[gan, 1][0], found[gan, 4][0]) for gan in (False, True)):
        for name in {"l1", "lpips", "gan"} & one.keys():
            assert one[name].item() == pytest.approx(four[name].item(), rel=1e-4), name
    assert found[True, 1][0]["lambda"].item() != pytest.approx(found[True, 4][0]["lambda"].item(), rel=1e-3)


def test_the_decoders_step_leaves_nothing_in_that_of_the_discriminator():
    images, z = torch.rand(4, 3, 12, 12), torch.randn(4, 6, 3, 3)
    found = []
    for before in (False, True):
        disc, decoder = SmallDisc(), random_decoder()
        state = copy.deepcopy(disc.state_dict())
        if before:
            step(decoder, images, z, disc=disc)
        assert equal(state, disc.state_dict())
        torch.manual_seed(3)
        rae_decoder_train.disc_step(disc, sgd(disc), images, z, decoder, 1, "fp32")
        found.append(gradients(disc))
    assert equal(*found)


def broken_steps():
    """Pairs of a name and (images, whether a gradient is broken)."""
    images = torch.rand(4, 3, 12, 12)
    poisoned = images.clone()
    poisoned[2, 1, 5, 5] = math.nan
    return {"image": (poisoned, False), "gradient": (images, True), "nothing": (images, False)}


def poison(weight):
    weight.register_hook(lambda gradient: gradient / 0)


@pytest.mark.parametrize("accum", [1, 2])
@pytest.mark.parametrize("broken", broken_steps())
def test_a_decoder_step_that_is_not_finite_changes_nothing(broken, accum):
    decoder, z = random_decoder(), torch.randn(4, 6, 3, 3)
    images, break_gradient = broken_steps()[broken]
    if break_gradient:
        poison(decoder.decoder_layers[1].output["dense"].weight)
    before = copy.deepcopy(decoder.state_dict())
    optimizer = rae_decoder_train.adamw(decoder, 1e-2)
    terms, finite = step(decoder, images, z, squared, SmallDisc(), optimizer, accum=accum)
    assert finite == (broken == "nothing")
    assert equal(before, decoder.state_dict()) != finite
    assert (optimizer.state_dict()["state"] == {}) != finite
    assert torch.isfinite(terms["loss"]) == (broken != "image")
    assert torch.isfinite(terms["gradient_norm"]) == finite


@pytest.mark.parametrize("accum", [1, 2])
@pytest.mark.parametrize("broken", broken_steps())
def test_a_discriminator_step_that_is_not_finite_changes_nothing(broken, accum):
    disc, decoder, z = SmallDisc(), random_decoder(), torch.randn(4, 6, 3, 3)
    images, break_gradient = broken_steps()[broken]
    if break_gradient:
        poison(disc.heads.weight)
    before = copy.deepcopy(disc.state_dict())
    optimizer = rae_decoder_train.adamw(disc, 1e-2)
    loss, finite = rae_decoder_train.disc_step(disc, optimizer, images, z, decoder, accum, "fp32")
    assert finite == (broken == "nothing")
    assert equal(before, disc.state_dict()) != finite
    assert (optimizer.state_dict()["state"] == {}) != finite
    assert torch.isfinite(loss) == (broken != "image") and not disc.training


def test_lambda_by_finite_differences_and_its_bound():
    # The recorder's last weight is one number w: both gradients are quotients of differences.
    recorder, disc, images = Recorder().double(), SmallDisc().double(), torch.rand(4, 3, 8, 8).double()
    u = torch.rand(4, 5).double()

    def losses(w):
        xhat = torch.full_like(images, w)
        return (xhat - images).abs().mean(), -disc(diff_augment(2 * xhat - 1, u)).mean()

    slopes = [(b - a) / 2e-6 for a, b in zip(losses(0.2 - 1e-6), losses(0.2 + 1e-6), strict=True)]
    torch.manual_seed(0)
    z = torch.zeros(4, 2, 1, 1).double()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rae_decoder_train.torch, "rand", lambda *_, **__: u)
        patch.setattr(rae_decoder_train.torch, "randn_like", lambda z: 0)
        terms, _ = step(recorder, images, z, disc=disc, noise_tau=0.0)
    assert terms["lambda"].item() == pytest.approx(abs(slopes[0] / slopes[1]).item(), rel=1e-4)
    torch.nn.init.zeros_(disc.heads.weight)  # a discriminator that sees nothing
    terms, _ = step(recorder, images, z, disc=disc, noise_tau=0.0)
    assert terms["lambda"].item() == 1e4


def test_losses_of_the_discriminator():
    real, fake = [2.0, 0.5, -1.0], [-3.0, -0.5, 0.25]
    expected = sum(max(0, 1 - v) for v in real) / 6 + sum(max(0, 1 + v) for v in fake) / 6
    found = rae_decoder_train.hinge_loss(torch.tensor(real), torch.tensor(fake))
    assert found.item() == pytest.approx(expected)


def test_discriminator_step_takes_clean_8_bit_fakes_in_any_micro_batches():
    images, z = torch.rand(8, 3, 12, 12), torch.randn(8, 6, 3, 3)
    found, decoder = [], random_decoder()
    for accum in (1, 4):
        disc = SmallDisc()
        torch.manual_seed(3)
        optimizer = sgd(disc)
        loss, finite = rae_decoder_train.disc_step(disc, optimizer, images, z, decoder, accum, "fp32")
        assert finite
        found.append(gradients(disc) | {"loss": loss})
        assert not disc.training
    same(*found, tolerance=1e-5)
    torch.manual_seed(3)
    u, disc = torch.rand(8, 2, 5), SmallDisc()
    fake = np.rint(decoder(z).detach().double().numpy().clip(0, 1) * 255) / 255
    fake = torch.from_numpy(fake).float()
    logits = [disc(diff_augment(2 * x - 1, u[:, i])) for i, x in enumerate((images, fake))]
    (0.5 * ((1 - logits[0]).clamp(min=0).mean() + (1 + logits[1]).clamp(min=0).mean())).backward()
    same(gradients(disc), {name: found[0][name] for name in gradients(disc)})
    assert all(p.grad is None for p in decoder.parameters())


def naive_augment(x, u):
    """Zhao et al. 2020 in numpy for one image in [-1,1]: move, brightness, saturation, contrast."""
    size = x.shape[-1]
    reach = round(size / 8)
    down, right = (reach - int(math.floor(value * (2 * reach + 1))) for value in u[:2])
    moved = np.zeros_like(x)
    for i in range(size):
        for j in range(size):
            if 0 <= i - down < size and 0 <= j - right < size:
                moved[:, i, j] = x[:, i - down, j - right]
    x = moved + (u[2] - 0.5)
    x = (x - x.mean(0)) * (2 * u[3]) + x.mean(0)
    return (x - x.mean()) * (u[4] + 0.5) + x.mean()


def test_augmentation_agrees_with_a_naive_one():
    torch.manual_seed(0)
    x = torch.rand(40, 3, 16, 16, requires_grad=True) * 2 - 1
    u = torch.rand(40, 5)
    u[0], u[1], u[2] = 0.0, 1 - 2**-24, 0.5
    out = diff_augment(x, u)
    for i in range(40):
        expected = naive_augment(x[i].detach().double().numpy(), u[i].double().tolist())
        assert np.abs(out[i].detach().numpy() - expected).max() < 1e-5, i
    assert torch.allclose(out[2], x[2], atol=1e-6)
    (gradient,) = torch.autograd.grad(out.square().sum(), x)
    assert gradient.isfinite().all() and gradient.flatten(1).abs().sum(1).min() > 0
    torch.manual_seed(1)
    drawn = diff_augment(x)
    torch.manual_seed(1)
    assert torch.equal(drawn, diff_augment(x, torch.rand(40, 5)))


def dino(monkeypatch, **sizes):
    """DINO's ViT, 12 blocks, but 12 channels wide."""

    def load_vit(name, weights, *_):
        torch.manual_seed(0)
        options = {"num_classes": 0, "embed_dim": 12, "num_heads": 2} | sizes
        return timm.create_model(name, pretrained=False, **options).eval()

    monkeypatch.setattr("rae_encoder.load_vit", load_vit)


@pytest.fixture
def small_dino(monkeypatch):
    """DINO with its 784 tokens."""
    dino(monkeypatch)


@pytest.fixture
def tiny_dino(monkeypatch):
    """DINO with 49 tokens, for what takes many steps."""
    dino(monkeypatch, patch_size=32)


def test_discriminator_has_the_released_structure(small_dino):
    torch.manual_seed(0)
    disc = rae_decoder_train.Discriminator("random").eval()
    x = torch.rand(3, 3, 32, 32) * 2 - 1
    logits = disc(x)
    assert logits.shape == (3, 5 * 784)
    assert torch.allclose(logits, torch.cat([disc(image[None]) for image in x]), atol=1e-4)
    vit, after = disc.vit, []
    for block in vit.blocks:
        block.register_forward_hook(lambda *hooked: after.append(hooked[2][:, 1:]))
        assert torch.equal(block.mlp.act(x), torch.nn.functional.gelu(x, approximate="tanh"))
    resized = torch.nn.functional.interpolate(x, size=(224, 224), mode="bilinear", align_corners=False)
    std, mean = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_STD, IMAGENET_MEAN))
    vit((resized * 0.5 + 0.5 - mean) / std)
    for head, (k, depth) in enumerate(zip(range(5), (12, 3, 6, 9, 12), strict=True)):
        first, second, last = disc.heads[k]
        h = after[depth - 1].mT
        outputs = []
        for layer in (first, second):
            size = layer[0].kernel_size[0]
            padded = torch.cat([h[..., -(size // 2) :], h, h[..., : size // 2]], 2) if size > 1 else h
            y = torch.nn.functional.conv1d(padded, layer[0].weight, layer[0].bias)
            y = (y - y.mean(2, keepdim=True)) / (y.var(2, keepdim=True, unbiased=False) + 1e-6).sqrt()
            y = y * layer[1].weight[:, None] + layer[1].bias[:, None]
            outputs.append(torch.where(y > 0, y, 0.2 * y))
            h = outputs[-1]
        mixed = (outputs[1] + outputs[0]) / 2**0.5
        expected = torch.nn.functional.conv1d(mixed, last.weight, last.bias).flatten(1)
        assert torch.allclose(logits[:, head * 784 : (head + 1) * 784], expected, atol=1e-4), head
    assert {name.split(".")[0] for name, p in disc.named_parameters() if p.requires_grad} == {"heads"}


def test_spectral_norm_is_near_one_and_iterates_once_a_step(tiny_dino):
    disc, decoder = rae_decoder_train.Discriminator("random").eval(), random_decoder()
    images, z = torch.rand(4, 3, 12, 12), torch.randn(4, 6, 3, 3)
    buffers = []
    for accum in (1, 2):
        twin = copy.deepcopy(disc)
        torch.manual_seed(0)
        rae_decoder_train.disc_step(twin, sgd(twin.heads), images, z, decoder, accum, "bf16")
        buffers.append({name: buffer.clone() for name, buffer in twin.heads.named_buffers()})
        step(decoder, images, z, disc=twin, accum=accum, precision="bf16")
        assert all(torch.equal(v, buffers[-1][n]) for n, v in twin.heads.named_buffers())
    assert all(torch.equal(buffers[0][name], buffers[1][name]) for name in buffers[0])
    assert any(not torch.equal(v, buffers[0][name]) for name, v in disc.heads.named_buffers())
    with torch.autocast("cpu", torch.bfloat16):
        assert disc(images).dtype == torch.float32  # the heads, whose power iteration would suffer
    disc.heads.train()
    for _ in range(100):
        weights = [m.weight for m in disc.heads.modules() if isinstance(m, torch.nn.Conv1d)]
    for weight in weights:
        assert torch.linalg.matrix_norm(weight.detach().flatten(1), 2).item() == pytest.approx(1, abs=0.02)


def test_a_loss_that_is_not_finite_counts_where_gradients_are():
    recorder, images = Recorder(), torch.rand(2, 3, 8, 8)
    images[0, 0, 0, 0] = math.inf  # the gradient of L1 is a sign
    terms, finite = step(recorder, images, torch.zeros(2, 2, 1, 1))
    assert terms["gradient_norm"].isfinite() and terms["loss"].isinf() and not finite


def test_recomputed_activations_give_the_same_gradients():
    z, found = torch.randn(2, 6, 3, 3), []
    for recomputes in (False, True):
        decoder = random_decoder()
        decoder.checkpoint_activations = recomputes
        decoder(z).square().mean().backward()
        found.append(gradients(decoder))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_the_blocks_compile_once_and_in_one_graph():
    torch._dynamo.reset()
    for recomputes in (False, True):
        decoder = random_decoder().train()
        decoder.checkpoint_activations = recomputes
        for block in decoder.decoder_layers:
            block.compile(backend="eager", fullgraph=True)  # an error at a graph break
        for repeat in range(3):
            with torch._dynamo.config.patch(error_on_recompile=repeat > 0):
                images, z = torch.rand(4, 3, 12, 12), torch.randn(4, 6, 3, 3)
                step(decoder, images, z, squared, accum=2, precision="bf16")


def run(*flags):
    """The script in this process, on eight images a step, without LPIPS."""
    common = "--batch-size 8 --lpips-weight 0 --workers 0 --preview-every 0 --save-every 1 --precision fp32"
    rae_decoder_train.main([*common.split(), *map(str, flags)])


def log(folder="runs/decoder"):
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


GAN = "--gan-weight 0.75 --disc-weights random --disc-start 1 --gan-start 2".split()  # noqa: SIM905


def test_schedules_at_exact_steps(folder, tiny_dino, monkeypatch, capsys):
    seen = []

    def decoder_step(_model, optimizer, _images, _z, _perceptual, disc, **_):
        seen.append([optimizer.param_groups[0]["lr"], disc is not None, None])
        return {"loss": torch.ones(())}, True

    def disc_step(_model, optimizer, *_):
        seen[-1][2] = optimizer.param_groups[0]["lr"]
        return torch.ones(()), True

    monkeypatch.setattr(rae_decoder_train, "decoder_step", decoder_step)
    monkeypatch.setattr(rae_decoder_train, "disc_step", disc_step)
    run(*GAN, "--epochs", 6, "--lr", 3e-4, "--final-lr", 1e-4)  # two steps an epoch
    assert "ViT-mini, GAN from step 4 (" in capsys.readouterr().err
    cosine = [1e-4 + 2e-4 * (1 + math.cos(math.pi * k / 10)) / 2 for k in range(10)]
    assert [lr for lr, _, _ in seen] == pytest.approx([1.5e-4, 3e-4, *cosine])
    assert [critic for _, critic, _ in seen] == [step >= 4 for step in range(12)]
    own = [lr for _, _, lr in seen]
    assert own[:2] == [None] * 2 and own[2:] == pytest.approx([1.5e-4, 3e-4, *cosine[:8]])


def test_the_next_command_is_of_the_same_images():
    for flags, line in (
        ("", "torchrun flow_train.py --decoder"),
        ("--data x", "torchrun flow_train.py --preset small --data x --decoder"),
        ("--preset raev2 --data x", "torchrun flow_train.py --preset raev2 --data x --decoder"),
    ):
        assert rae_decoder_train.next_command(rae_decoder_train.parse_args(flags.split())) == line


@pytest.mark.slow
def test_resume_is_exact_with_the_discriminator_and_ema_is_its_closed_form(folder, tiny_dino):
    flags = [*GAN, "--steps", 9, "--keep-every", 1, "--ema", 0.9]
    run(*flags)
    run(*flags, "--resume", "runs/decoder/0000005.pt", "--out", "again", "--workers", 1)
    whole, again = read("runs/decoder/last.pt"), read("again/last.pt")
    for part in ("model", "ema", "optimizer", "disc", "disc_optimizer", "step", "config"):
        assert equal(whole[part], again[part]), part
    first, second, third = (read(f"runs/decoder/000000{k}.pt")["disc"] for k in (1, 2, 3))
    assert equal(first, second) and not equal(second, third)
    steps = [read(f"runs/decoder/{step:07d}.pt") for step in range(1, 10)]
    for name, value in whole["ema"].items():
        expected = 0.9**8 * steps[0]["ema"][name]
        for k, checkpoint in enumerate(steps[1:], 2):
            expected = expected + 0.1 * 0.9 ** (9 - k) * checkpoint["model"][name]
        assert torch.allclose(value, expected, atol=1e-5), name
    assert os.path.samefile("runs/decoder/last.pt", "runs/decoder/0000009.pt")  # no second write
    assert not list(Path("runs/decoder").glob("*.tmp"))


def test_a_numbered_copy_can_be_written_again(tmp_path):
    last = str(tmp_path / "last.pt")
    args = types.SimpleNamespace(keep_every=2)
    network = torch.nn.Linear(2, 2)
    for bias in (1.0, 2.0):
        torch.nn.init.constant_(network.bias, bias)
        rae_decoder_train.save(last, args, {"model": network}, 4)
    torch.nn.init.constant_(network.bias, 3.0)
    rae_decoder_train.save(last, args, {"model": network}, 5)
    assert read(tmp_path / "0000004.pt")["model"]["bias"].tolist() == [2, 2]
    assert read(last)["model"]["bias"].tolist() == [3, 3] and len(list(tmp_path.iterdir())) == 2


def test_held_out_numbers_are_those_of_numpy_for_any_batch(folder):
    run("--steps", 1)
    decoder, config = load_decoder("runs/decoder/last.pt")
    encoder = rae_encoder.Encoder("test_vit", 64, 32, "random")
    data, psnr = rae_encoder.ImageData("data/demo", 32), []
    for i in range(len(data)):
        x = data[0, i][0]
        y = decoder(encoder(x[None] / 255))[0].detach().clamp(0, 1).double().numpy()
        error = (np.rint(255 * y) - x.numpy()) ** 2
        psnr.append(10 * np.log10(255**2 / error.mean()))
    for size in (1, 8, 22):
        found = rae_decoder_train.evaluate(decoder, encoder, squared, data, workers=0, batch_size=size)
        assert found["eval_psnr"] == pytest.approx(np.mean(psnr), abs=1e-3) and found["eval_lpips"] > 0
    run("--steps", 2, "--eval-data", "data/demo", "--eval-every", 1)
    scores = [record for record in log() if "eval_psnr" in record]
    assert [record["step"] for record in scores] == [2]
    assert scores[0]["eval_psnr"] != pytest.approx(np.mean(psnr), abs=1e-6)
    assert "eval_lpips" not in scores[0]  # without LPIPS in training


def test_a_run_starts_from_another_decoder(folder):
    run("--steps", 1)
    ours = read("runs/decoder/last.pt")
    torch.save({f"module.{name}": value for name, value in ours["model"].items()}, "bare.pt")
    for file, part in (("runs/decoder/last.pt", "ema"), ("bare.pt", "model")):
        run("--steps", 1, "--init", file, "--out", part, "--lr", 0, "--final-lr", 0)
        started = read(f"{part}/last.pt")
        for name, value in ours[part].items():
            assert torch.equal(started["model"][name], value)
            assert torch.allclose(started["ema"][name], value, atol=1e-7), name
    line = message(run, "--steps", 1, "--init", "bare.pt", "--out", "x", "--patch-size", 16)
    assert line.startswith(
        "--init bare.pt: of other sizes than this run (size mismatch for decoder_pos_embed:"
    )


@pytest.mark.slow
def test_decoder_upsampling():
    flags = "--preset imagenet512 --data x --encoder-weights random --decoder ViT-mini"
    flags = [*flags.split(), "--lpips-weight", "0", "--gan-weight", "0"]
    for patch_size, encoder_size, grid in ((32, 224, 16), (16, 448, 32), (None, 448, 32)):
        more = ["--patch-size", str(patch_size)] if patch_size else []
        args = rae_decoder_train.parse_args(flags + more)
        encoder, decoder, config = rae_decoder_train.build(args, torch.device("cpu"))
        assert (encoder.encoder_size, encoder.grid, decoder.grid) == (encoder_size, grid, grid)
        assert decoder.patch_size == (patch_size or 16) == config["decoder"]["patch_size"]


def test_presets_hold_the_released_recipe():
    recipe = dict(
        encoder="dinov2-base", decoder="ViT-XL", noise_tau=0.8, lpips_weight=1, gan_weight=0.75,
        batch_size=512, epochs=16, disc_start=6, gan_start=8, lr=2e-4, final_lr=2e-5, warmup_epochs=1,
        ema=0.9978,
    )  # fmt: skip
    for size in (256, 512):
        args = rae_decoder_train.parse_args(["--preset", f"imagenet{size}", "--data", "x"])
        assert {name: getattr(args, name) for name in recipe} == recipe and args.image_size == size
        assert args.eval_data is None and not args.checkpoint_activations
    for flags in ([], ["--data", "x"]):
        assert rae_decoder_train.parse_args(flags).gan_weight == 0


def steps_of(*flags):
    """The steps of a run on 160 images."""
    args = rae_decoder_train.parse_args([*map(str, flags), "--batch-size", "16"])
    return rae_decoder_train.plan_steps(160, args, world=1)[1]


def test_the_length_that_is_given_beats_that_of_the_preset():
    assert (
        steps_of() == 40 and steps_of("--epochs", 2) == 20 and steps_of("--steps", 7) == 7
    )  # the demo's 4 epochs
    own = ("--data", "x")
    assert steps_of(*own) == 800 and steps_of(*own, "--steps", 7) == 7
    assert steps_of(*own, "--epochs", 2) == 20 and steps_of(*own, "--epochs=0.01") == 1
    full = (*own, "--preset", "imagenet256")
    assert steps_of(*full) == 160 and steps_of(*full, "--steps", 7) == 7
    assert "--steps: not allowed with argument --epochs" in message(steps_of, "--epochs", 2, "--steps", 7)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--gan-weight 1 --gan-start 0", "--gan-start 0.0 is before --disc-start 6"),
        ("--keep-every 150", "--keep-every 150 is no multiple of --save-every 100"),
        ("--decoder ViT-nano", "argument --decoder: ViT-nano: not one of ViT-mini, ViT-S, "),
        ("--ema 1", "argument --ema: expected a number from 0 to below 1, got 1"),
        ("--lr -1", "argument --lr: expected a number from 0, got -1"),
        ("--epochs 0", "argument --epochs: expected a number above 0, got 0"),
        ("--preview-every -1", "argument --preview-every: expected a whole number from 0, got -1"),
        ("--batch_size 5", "--batch_size 5 (perhaps --batch-size?)"),
    ],
)
def test_bad_flags_end_in_one_line(flags, line):
    assert line in message(rae_decoder_train.parse_args, flags.split())


def test_bad_runs_end_in_one_line(folder):
    run("--steps", 2)
    last = Path("runs/decoder/last.pt")
    whole = last.read_bytes()

    def refused(line, *flags):
        assert message(run, "--steps", 3, *flags).startswith(line)

    last.write_bytes(whole[: len(whole) // 2])
    refused("--resume runs/decoder/last.pt: not a file of weights (")
    for other in (
        torch.load(io.BytesIO(whole), weights_only=True) | {"format": "rae-flow/1"},
        {"format": "rae-decoder/1", "mean": "text"},
    ):
        torch.save(other, last)
        refused("--resume runs/decoder/last.pt: not a whole rae-decoder/1 checkpoint")
    last.write_bytes(whole)
    refused("runs/decoder/last.pt has gan False, this run True: same flags, or another --out", *GAN)
    refused("runs/decoder/last.pt has noise_tau 0.2, this run 0.3", "--noise-tau", 0.3)
    line = message(run, "--steps", 1)
    assert line.startswith("runs/decoder/last.pt is at step 2, this run ends at 1: more --steps or --epochs")
    refused("--resume none.pt: no such file", "--resume", "none.pt")
    refused("--init none.pt: no such file", "--init", "none.pt")  # on a resume, too
    refused("--data data/demo: 22 images, fewer than --batch-size 32", "--batch-size", 32)
    refused("--batch-size 8 is no multiple of 1 ranks x 3 --accum", "--accum", 3)
    refused("--eval-data none: No such file", "--eval-data", "none")
    refused("--image-size 32: no multiple of the patch: 4 tokens a side, patch size 5", "--patch-size", 5)
    Path("file").write_text("")
    refused("--out file/run: can't be written (", "--out", "file/run")
    assert last.read_bytes() == whole


# A step that is not finite


@pytest.fixture
def poisoned(monkeypatch):
    """Runs the script with steps of the decoder, or of the discriminator, whose images are not finite."""

    def run_poisoned(steps, *flags, part="decoder_step"):
        original = getattr(rae_decoder_train, part)
        calls = []

        def broken(model, optimizer, images, *rest, **options):
            calls.append(len(calls) + 1)
            images = images * math.nan if calls[-1] in steps else images
            return original(model, optimizer, images, *rest, **options)

        monkeypatch.setattr(rae_decoder_train, part, broken)
        run(*flags)

    return run_poisoned


def all_finite(value):
    if isinstance(value, dict):
        return all(all_finite(part) for part in value.values())
    return not isinstance(value, torch.Tensor) or bool(value.isfinite().all())


@pytest.mark.parametrize("accum", [1, 2])
def test_ten_steps_in_a_row_end_the_run_and_leave_a_good_checkpoint(folder, poisoned, capsys, accum):
    flags = ["--steps", 30, "--keep-every", 1, "--log-every", 100, "--accum", accum]
    line = message(poisoned, range(4, 31), *flags)
    remedy = "try a lower --lr; the last checkpoint is runs/decoder/last.pt"
    assert line == f"step 13: 10 steps in a row not finite; {remedy}"
    last, good = read("runs/decoder/last.pt"), read("runs/decoder/0000003.pt")
    assert all_finite(last)
    assert equal(last["model"], good["model"]) and equal(last["ema"], good["ema"])
    assert equal(last["optimizer"]["state"], good["optimizer"]["state"])
    text = capsys.readouterr().err
    assert all(f"step {step} skipped, not finite: l1 nan" in text for step in range(4, 14))
    assert "step 3 skipped" not in text


def test_the_line_names_what_is_there_and_what_helps(folder, poisoned):
    flags = ["--steps", 30, "--save-every", 100, "--precision", "bf16"]
    line = message(poisoned, range(1, 31), *flags)
    assert line == "step 10: 10 steps in a row not finite; try a lower --lr or --precision fp32"


def test_nine_steps_are_skipped_and_counted(folder, poisoned):
    broken = {*range(2, 11), *range(12, 21)}
    poisoned(broken, "--steps", 22, "--log-every", 4, "--keep-every", 1)
    records = log()
    assert [record["skipped"] for record in records] == [3, 7, 10, 14, 18, 18]
    assert ["loss" in record for record in records] == [True, False, True, False, False, True]
    assert all(math.isfinite(value) for record in records for value in record.values())
    before, after = read("runs/decoder/0000001.pt"), read("runs/decoder/0000010.pt")
    assert equal(before["model"], after["model"]) and equal(before["ema"], after["ema"])
    assert not equal(after["model"], read("runs/decoder/last.pt")["model"])


@pytest.mark.slow
def test_a_discriminator_step_that_is_not_finite_is_skipped_too(folder, tiny_dino, poisoned, capsys):
    flags = [*GAN, "--steps", 12, "--keep-every", 1]  # it learns from the third step on
    poisoned({2, 3}, *flags, part="disc_step")
    third, fifth, sixth = (read(f"runs/decoder/000000{step}.pt") for step in (3, 5, 6))
    assert all_finite(read("runs/decoder/last.pt"))
    assert equal(third["disc_optimizer"]["state"], fifth["disc_optimizer"]["state"])
    assert not equal(fifth["disc_optimizer"]["state"], sixth["disc_optimizer"]["state"])
    text = capsys.readouterr().err
    assert "step 4 skipped, not finite: " in text and "disc nan" in text and "step 6 skipped" not in text


def one_of_two(rank, world, port, out):
    """A decoder step and a discriminator step on this rank's share of eight images."""
    if world > 1:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    rae_decoder_train.DECODERS["ViT-mini"] = (16, 2, 2, 24)
    torch.manual_seed(0)
    images, z, u = torch.rand(8, 3, 12, 12), torch.randn(8, 6, 3, 3), torch.rand(8, 2, 5)
    shares = {(1,): u[:, 0, :1], (5,): u[:, 0], (2, 5): u}  # of the draws too
    torch.rand = lambda n, *shape, **_: shares.get(shape, u[:, 0, :1, None, None])[rank::world]
    images, z = images[rank::world], z[rank::world]
    decoder, disc = random_decoder(), SmallDisc()
    nets, exchanges = [decoder, disc], []

    def exchange(name, bucket):
        exchanges.append(name)
        return allreduce_hook(None, bucket)

    if world > 1:
        nets = [torch.nn.parallel.DistributedDataParallel(net) for net in nets]
        for net, name in zip(nets, ("decoder", "disc"), strict=True):
            net.register_comm_hook(name, exchange)
    terms, _ = step(nets[0], images, z, squared, disc, accum=2, noise_tau=0.0)
    with_gan = {name: gradient.clone() for name, gradient in gradients(decoder).items()}
    step(nets[0], images, z, squared, accum=2, noise_tau=0.0)
    assert exchanges == ["decoder"] * 2 * (world > 1)  # one a step, in spite of two micro-batches
    terms["disc"], _ = rae_decoder_train.disc_step(nets[1], sgd(disc), images, z, decoder, 2, "fp32")
    assert exchanges[2:] == ["disc"] * (world > 1)
    if rank == 0:
        torch.save(dict(terms=terms, decoder=with_gan, disc=gradients(disc)), out)


@pytest.mark.slow
def test_two_processes_take_the_step_of_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for world in (1, 2):
        torch.multiprocessing.spawn(one_of_two, (world, port, str(tmp_path / f"{world}.pt")), nprocs=world)
    one, two = (read(tmp_path / f"{world}.pt") for world in (1, 2))
    assert numbers(one["terms"]) == pytest.approx(numbers(two["terms"]), rel=1e-4)
    assert len(one["terms"]) == 7 and all(one["terms"].values())
    same(one["decoder"], two["decoder"])
    same(one["disc"], two["disc"])


def test_losses_and_previews_are_in_tensorboard(folder):
    """Where that package is installed."""
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = "--steps 2 --batch-size 8 --log-every 1 --preview-every 1 --workers 0 --out runs/board"
    rae_decoder_train.main(flags.split())
    events = EventAccumulator("runs/board").Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2]
    assert [event.step for event in events.Images("preview")] == [1, 2]
    with open("runs/board/preview-0000002.png", "rb") as file:
        expected = np.asarray(Image.open(file))
    shown = Image.open(io.BytesIO(events.Images("preview")[1].encoded_image_string))
    assert np.array_equal(np.asarray(shown), expected)
