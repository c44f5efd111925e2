"""Stage 1: the decoder against a naive one, its files, its losses and step, and what its run refuses."""

import copy
import functools
import hashlib
import io
import itertools
import json
import math
import os
import re
import types
from collections import Counter
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
import torchvision
from helpers import equal, message, read, run_ranks
from PIL import Image
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import rae_decoder_train
import rae_encoder
from rae_decoder_train import Decoder, decoder_step, diff_augment, load_decoder

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SMALL_VIT = (16, 2, 2, 24)  # width, depth, heads, MLP


@pytest.fixture(autouse=True)
def small_vit(monkeypatch):
    """ViT-mini small enough for loops in Python."""
    monkeypatch.setitem(rae_decoder_train.DECODERS, "ViT-mini", SMALL_VIT)


def random_decoder(channels=6, grid=3, patch_size=4):
    torch.manual_seed(0)
    decoder = Decoder("ViT-mini", channels, grid, patch_size, IMAGENET_MEAN, IMAGENET_STD).eval()
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return decoder


# The decoder


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
        size = q.shape[1] // heads
        mixed = []
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
            pixel = value * std[channel] + mean[channel]
            image[channel, n // grid * patch + row, n % grid * patch + column] = pixel
    return image


def test_decoder_agrees_with_a_naive_one():
    decoder, z = random_decoder(), torch.randn(2, 6, 3, 3)
    state = decoder.state_dict()
    expected = [naive_decoder(state, z_i.double().numpy(), 2, 4, IMAGENET_MEAN, IMAGENET_STD) for z_i in z]
    assert np.abs(decoder(z).detach().numpy() - np.stack(expected)).max() < 1e-5 * np.abs(expected).max()


def test_position_embedding_has_the_released_order():
    position = rae_decoder_train.sincos_position(16, 5)[0].double()
    assert position.shape == (25, 16)
    embedded = random_decoder(grid=5).decoder_pos_embed[0].double()
    assert embedded[0].eq(0).all() and torch.equal(embedded[1:], position)
    for row, column, k in ((0, 3, 0), (4, 1, 2), (2, 2, 3)):
        x = column * 10_000 ** (-k / 4)
        y = row * 10_000 ** (-k / 4)
        token = position[row * 5 + column]
        expected = [math.sin(x), math.cos(x), math.sin(y), math.cos(y)]
        assert token[[k, 4 + k, 8 + k, 12 + k]].tolist() == pytest.approx(expected, abs=1e-6)


def test_another_token_grid_is_interpolated():
    decoder, z = random_decoder(grid=6), torch.randn(1, 6, 3, 3)
    large = torch.nn.functional.interpolate(z, size=(6, 6), mode="bilinear", align_corners=False)
    assert torch.allclose(decoder(z), decoder(large), atol=1e-4)  # the embedding is affine: the order is free
    assert decoder(z).shape == (1, 3, 24, 24)


def test_recomputed_and_compiled_gradients_are_the_same():
    """Blocks compile once and in one graph."""
    torch._dynamo.reset()
    images, z = torch.rand(4, 3, 12, 12), torch.randn(4, 6, 3, 3)
    found = []
    for recomputes in (False, True):
        decoder = random_decoder().train()
        decoder.checkpoint_activations = recomputes
        for block in decoder.decoder_layers:
            block.compile(backend="eager", fullgraph=True)  # an error at a graph break
        for repeat in range(3):
            with torch._dynamo.config.patch(error_on_recompile=repeat > 0):
                torch.manual_seed(1)
                step(decoder, images, z, squared, accum=2, precision="bf16")
        found.append(gradients(decoder))
    assert equal(*found)


# Released files

RELEASED = """decoder_pos_embed trainable_cls_token decoder_embed.weight decoder_embed.bias
    decoder_norm.weight decoder_norm.bias decoder_pred.weight decoder_pred.bias"""
RELEASED_LAYER = """attention.attention.query attention.attention.key attention.attention.value
    attention.output.dense intermediate.dense output.dense layernorm_before layernorm_after"""


def test_released_names(tmp_path):
    state = random_decoder(grid=16).state_dict()
    names = set(RELEASED.split())
    for i in range(2):
        for layer in RELEASED_LAYER.split():
            names |= {f"decoder_layers.{i}.{layer}.{kind}" for kind in ("weight", "bias")}
    assert set(state) == names
    assert state["decoder_pos_embed"].shape == (1, 257, 16)
    assert state.pop("trainable_cls_token").shape == (1, 1, 16)
    torch.save(state, tmp_path / "model.pt")
    assert load_decoder(tmp_path / "model.pt")[0].trainable_cls_token.eq(0).all()


def released_layouts(state):
    """The layouts in which the authors' exports and trainings hold a decoder, by a name for each."""
    autoencoder = {f"encoder.{name}": value for name, value in state.items()}
    autoencoder |= {f"decoder.{name}": value + 0 for name, value in state.items()}
    autoencoder["encoder.decoder_pred.bias"] = torch.zeros(48)
    files = {
        "bare": state,
        "no positions": {name: value for name, value in state.items() if name != "decoder_pos_embed"},
        "DDP": {"model": {f"module.decoder.{name}": value for name, value in state.items()}},
        "EMA": {"ema": state, "model": {}, "step": 5},
        "text beside it": {"state_dict": state, "model": "ViT-XL"},
        "training": {"ema": autoencoder, "model": {}, "optimizer": {"state": {}}},
        "inner": {f"module.decoder._orig_mod.{name}": value for name, value in state.items()},
    }
    for prefix in ("_orig_mod.", "module.", "_orig_mod.module.", "module._orig_mod."):
        files[prefix] = {"model": {f"{prefix}{name}": value for name, value in autoencoder.items()}}
    return files


@pytest.mark.parametrize("layout", released_layouts({}))
def test_released_files_are_read(tmp_path, layout):
    decoder, z = random_decoder(grid=16), torch.randn(1, 6, 16, 16)
    torch.save(released_layouts(decoder.state_dict())[layout], tmp_path / "model.pt")
    loaded, config = load_decoder(tmp_path / "model.pt", "siglip2-base")
    sizes = {"name": "ViT-mini", "channels": 6, "grid": 16, "patch_size": 4}
    assert config == {"decoder": {**sizes, "mean": (0.5,) * 3, "std": (0.5,) * 3}} and not loaded.training
    pixels = (decoder(z) - decoder.mean) / decoder.std
    assert torch.allclose(loaded(z), pixels * 0.5 + 0.5, atol=1e-4)
    raw, _ = load_decoder(tmp_path / "model.pt", raw_pixels=True)  # RAEv2's
    assert torch.allclose(raw(z), pixels, atol=1e-4)
    imagenet, _ = load_decoder(tmp_path / "model.pt")
    assert torch.equal(imagenet(z), decoder(z))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"decoder_embed.weight": torch.zeros(17, 6)}, "17"),
        ({"extra": torch.zeros(1)}, "Unexpected key(s) in state_dict"),
        ({"decoder_pred.bias": torch.zeros(1)}, "size mismatch for decoder_pred.bias"),
        ({"format": "rae-decoder/1"}, "'ema'"),
        ({"format": "rae-flow/1", "ema": {"pos_embed": torch.zeros(1)}}, "'decoder_embed.weight'"),
    ],
)
def test_other_files_end_in_one_line(tmp_path, changes, line):
    path = str(tmp_path / "model.pt")
    torch.save(random_decoder().state_dict() | changes, path)
    found = message(load_decoder, path, "dinov2-base", "--weights")
    assert found.startswith(f"--weights {path}: not a decoder, ours or released (") and line in found


# LPIPS


@pytest.fixture
def quick_vgg(monkeypatch):
    """torchvision's VGG-16 without its classifier, which takes seconds to draw."""

    def vgg16(**_):
        layers = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])
        return types.SimpleNamespace(features=layers)

    monkeypatch.setattr(torchvision.models, "vgg16", vgg16)


def test_an_untrained_lpips_is_the_same_in_every_run(quick_vgg):
    states = []
    for seed in (5, 6):
        torch.manual_seed(seed)
        outside = torch.get_rng_state()
        states.append(rae_decoder_train.perceptual_loss("random").state_dict())
        assert torch.equal(torch.get_rng_state(), outside)
    assert equal(*map(dict, states))


PLACES = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)  # of the convolutions


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory):
    """A random VGG-16 in the format of torchvision's file of 2017: its state dict and its path."""
    torch.manual_seed(3)
    widths = (3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
    state = {"classifier.0.bias": torch.zeros(1)}
    for i, width, out in zip(PLACES, widths[:-1], widths[1:], strict=True):
        state[f"features.{i}.weight"] = torch.randn(out, width, 3, 3) / math.sqrt(9 * width)
        state[f"features.{i}.bias"] = torch.randn(out)
    path = tmp_path_factory.mktemp("vgg") / "vgg.pth"
    torch.save(state, path, _use_new_zipfile_serialization=False)
    return state, path


@pytest.fixture
def cache(tmp_path, monkeypatch, quick_vgg):
    """The place of torchvision's file in an empty cache of torch's."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "hub/checkpoints/vgg16-397923af.pth"
    path.parent.mkdir(parents=True)
    return path


def test_lpips_takes_torchvisions_file_from_the_cache(cache, vgg_file):
    state, path = vgg_file
    cache.symlink_to(path)
    for weights in ("hub", str(path)):
        network = rae_decoder_train.perceptual_loss(weights).net
        convolutions = [module for module in network.modules() if isinstance(module, torch.nn.Conv2d)]
        assert len(convolutions) == 13
        for module, place in zip(convolutions, PLACES, strict=True):
            assert torch.equal(module.weight, state[f"features.{place}.weight"])
            assert torch.equal(module.bias, state[f"features.{place}.bias"])


def test_a_vgg_that_cannot_be_had_ends_in_one_line(cache, vgg_file, monkeypatch):
    """A cut file in the cache, no network, a file with another hash."""
    path = vgg_file[1]

    def refused(reason):
        line = message(rae_decoder_train.perceptual_loss, "hub")
        place = f"{cache.parent} can't be filled, or its file is damaged ("
        assert line.startswith(f"LPIPS needs {rae_decoder_train.VGG}: {place}{reason}")
        assert line.endswith("--lpips-weights FILE takes a local copy, --lpips-weight 0 goes without")

    for length in (-1, 1000, 0):
        cache.write_bytes(path.read_bytes()[:length])
        refused("")
    cache.unlink()

    def offline(*_args, **_kwargs):
        raise URLError("no network")

    with monkeypatch.context() as patch:
        patch.setattr("torch.hub.download_url_to_file", offline)
        refused("<urlopen error no network>")

    # The digits in the name begin the SHA-256.
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    for digits in ("0" * 8, digest):
        link = path.with_name(f"vgg16-{digits}.pth")
        link.symlink_to(path)
        monkeypatch.setattr(rae_decoder_train, "VGG", link.as_uri())
        if digits != digest:
            refused(f'invalid hash value (expected "{digits}", got "{digest}')
            assert list(cache.parent.iterdir()) == []
    rae_decoder_train.perceptual_loss("hub")

    torch.save({"features.0.weight": torch.zeros(1)}, "x.pt")
    line = message(rae_decoder_train.perceptual_loss, "x.pt")
    assert line == "--lpips-weights x.pt: not torchvision's VGG-16"


# The discriminator and its input


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


@pytest.fixture
def small_dino(monkeypatch):
    """DINO's ViT, 12 blocks, but 12 channels wide, and 49 tokens for 784."""

    def load_vit(name, weights, *flag):
        if "dino" not in name:
            return original(name, weights, *flag)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            sizes = {"patch_size": 32, "embed_dim": 12, "num_heads": 2}
            return timm.create_model(name, pretrained=False, num_classes=0, **sizes).eval()

    original = rae_encoder.load_vit
    monkeypatch.setattr(rae_encoder, "load_vit", load_vit)


def test_discriminator_has_the_released_structure(small_dino):
    torch.manual_seed(0)
    disc = rae_decoder_train.Discriminator("random").eval()
    x = torch.rand(3, 3, 32, 32) * 2 - 1
    logits = disc(x)
    assert logits.shape == (3, 5 * 49)
    assert torch.allclose(logits, torch.cat([disc(image[None]) for image in x]), atol=1e-4)

    # The tokens after each block
    vit, after = disc.vit, []
    for block in vit.blocks:
        block.register_forward_hook(lambda *hooked: after.append(hooked[2][:, 1:]))
        assert torch.equal(block.mlp.act(x), torch.nn.functional.gelu(x, approximate="tanh"))
    resized = torch.nn.functional.interpolate(x, size=(224, 224), mode="bilinear", align_corners=False)
    std, mean = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_STD, IMAGENET_MEAN))
    vit((resized * 0.5 + 0.5 - mean) / std)

    for head, depth in enumerate((12, 3, 6, 9, 12)):
        first, second, last = disc.heads[head]
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
        assert torch.allclose(logits[:, head * 49 : (head + 1) * 49], expected, atol=1e-4), head
        assert [layer[0].kernel_size for layer in (first, second)] == [(1,), (9,)]
    assert {name.split(".")[0] for name, p in disc.named_parameters() if p.requires_grad} == {"heads"}


def test_spectral_norm_iterates_once_a_step_in_fp32(small_dino):
    disc, decoder = rae_decoder_train.Discriminator("random").eval(), random_decoder()
    images, z = torch.rand(4, 3, 12, 12), torch.randn(4, 6, 3, 3)
    found = []
    for accum in (1, 2):
        twin = copy.deepcopy(disc)
        torch.manual_seed(0)
        rae_decoder_train.disc_step(twin, sgd(twin.heads), images, z, decoder, accum, "bf16")
        found.append({name: buffer.clone() for name, buffer in twin.heads.named_buffers()})
        step(decoder, images, z, disc=twin, accum=accum, precision="bf16")
        assert equal(found[-1], dict(twin.heads.named_buffers()))
    assert equal(*found) and not equal(found[0], dict(disc.heads.named_buffers())) and len(found[0]) == 30
    with torch.autocast("cpu", torch.bfloat16):
        assert disc(images).dtype == torch.float32  # the heads, whose power iteration would suffer


# One step of the decoder


class Recorder(torch.nn.Module):
    """A decoder that keeps the latents it is given and answers with a learned constant."""

    def __init__(self):
        super().__init__()
        self.decoder_pred = torch.nn.Linear(1, 1, bias=False)
        self.latents = []
        torch.nn.init.constant_(self.decoder_pred.weight, 0.2)

    def forward(self, z):
        self.latents.append(z)
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


@pytest.mark.parametrize(
    ("law", "quantiles"),
    [
        ("uniform", [0.1, 0.25, 0.5, 0.75, 0.9]),
        # The paper's: of |N(0,1)|, from a table of the normal distribution
        ("half-normal", [0.1257, 0.3186, 0.6745, 1.1503, 1.6449]),
    ],
)
def test_noise_of_each_image_is_uniform_in_strength(law, quantiles):
    recorder, clean = Recorder(), torch.randn(2000, 400, 2, 2)
    torch.manual_seed(0)
    step(recorder, torch.rand(2000, 3, 8, 8), clean, noise_tau=0.6, noise_law=law)
    strengths = (recorder.latents[0] - clean).flatten(1).std(1) / 0.6  # of each image
    found = torch.quantile(strengths, torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9])).tolist()
    assert found == pytest.approx(quantiles, abs=0.04 if law == "uniform" else 0.07)


def numbers(terms):
    return {name: value.item() for name, value in terms.items()}


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
    """One graph for each micro-batch, as the formulas read."""
    disc, decoder, slow = SmallDisc(), random_decoder(), random_decoder()
    images, z = torch.rand(8, 3, 12, 12), torch.randn(8, 6, 3, 3)
    torch.manual_seed(3)
    noisy = z + 0.8 * torch.rand(8, 1, 1, 1) * torch.randn_like(z)
    u = torch.rand(8, 5)
    expected = Counter()
    for x, noisy_k, u_k in zip(images.chunk(accum), noisy.chunk(accum), u.chunk(accum), strict=True):
        xhat = slow(noisy_k)
        terms = {"l1": (xhat - x).abs().mean(), "lpips": squared(2 * xhat, 2 * x).mean()}
        terms["gan"] = -disc(diff_augment(2 * xhat - 1, u_k)).mean()
        reconstruction = terms["l1"] + 0.5 * terms["lpips"]
        last = slow.decoder_pred.weight
        norms = [
            torch.autograd.grad(loss, last, retain_graph=True)[0].norm()
            for loss in (reconstruction, terms["gan"])
        ]
        terms["lambda"] = norms[0] / (norms[1] + 1e-6)
        terms["loss"] = reconstruction + 0.75 * terms["lambda"] * terms["gan"]
        slow_gradients = torch.autograd.grad(terms["loss"] / accum, slow.parameters())
        for weight, gradient in zip(slow.parameters(), slow_gradients, strict=True):
            weight.grad = gradient if weight.grad is None else weight.grad + gradient
        expected.update({name: value.item() / accum for name, value in terms.items()})
    expected["gradient_norm"] = torch.cat([p.grad.flatten() for p in slow.parameters()]).norm().item()

    torch.manual_seed(3)
    terms, finite = step(decoder, images, z, squared, disc, lpips_weight=0.5, accum=accum)
    assert finite and numbers(terms) == pytest.approx(expected, rel=1e-4)
    same(gradients(slow), gradients(decoder))
    assert all(weight.grad is None for weight in disc.parameters())
    # Terms whose network is None are left out.
    terms, _ = step(decoder, images, z, accum=accum)
    assert terms.keys() == {"l1", "loss", "gradient_norm"} and terms["loss"] == terms["l1"]


@pytest.mark.parametrize(
    ("reconstruction", "gan", "expected"), [(3.0, 2.0, 1.5), (3.0, 0.0, 1e4), (5e-7, 5e-7, 0.5)]
)
def test_lambda_is_a_quotient_of_norms_with_a_bound(reconstruction, gan, expected):
    weight = torch.ones(4, requires_grad=True)  # so that the norm is twice the slope
    losses = [slope * weight.sum() for slope in (reconstruction, gan)]
    found = rae_decoder_train.adaptive_weight(*losses, weight)
    assert found.item() == pytest.approx(expected, rel=1e-5) and not found.requires_grad


@pytest.mark.parametrize("accum", [1, 2])
@pytest.mark.parametrize("broken", ["image", "gradient", "nothing"])
@pytest.mark.parametrize("trained", ["decoder", "disc"])
def test_a_step_that_is_not_finite_changes_nothing(trained, broken, accum):
    decoder, disc = random_decoder(), SmallDisc()
    images, z = torch.rand(4, 3, 12, 12), torch.randn(4, 6, 3, 3)
    network = decoder if trained == "decoder" else disc
    if broken == "image":
        images[2, 1, 5, 5] = math.nan
    if broken == "gradient":
        weight = disc.heads.weight if trained == "disc" else decoder.decoder_layers[1].output["dense"].weight
        weight.register_hook(lambda gradient: gradient / 0)
    before = copy.deepcopy(network.state_dict())
    optimizer = rae_decoder_train.adamw(network)
    if trained == "decoder":
        terms, finite = step(decoder, images, z, squared, disc, optimizer, accum=accum)
        loss = terms["loss"]
        assert terms["gradient_norm"].isfinite() == finite
    else:
        loss, finite = rae_decoder_train.disc_step(disc, optimizer, images, z, decoder, accum, "fp32")
    assert finite == (broken == "nothing") and loss.isfinite() == (broken != "image")
    assert equal(before, network.state_dict()) != finite
    assert (optimizer.state_dict()["state"] == {}) != finite


def test_a_loss_that_is_not_finite_counts_where_gradients_are():
    recorder, images = Recorder(), torch.rand(2, 3, 8, 8)
    images[0, 0, 0, 0] = math.inf  # the gradient of L1 is a sign
    terms, finite = step(recorder, images, torch.zeros(2, 2, 1, 1))
    assert terms["gradient_norm"].isfinite() and terms["loss"].isinf() and not finite


def test_discriminator_step_is_one_in_any_micro_batches():
    torch.manual_seed(0)
    images, z = torch.rand(8, 3, 12, 12), torch.randn(8, 6, 3, 3)
    found, decoder = [], random_decoder()
    for accum in (1, 4):
        disc = SmallDisc()
        torch.manual_seed(3)
        loss, _ = rae_decoder_train.disc_step(disc, sgd(disc), images, z, decoder, accum, "fp32")
        found.append(gradients(disc) | {"loss": loss})
        assert not disc.training
    same(*found, tolerance=1e-5)
    assert all(p.grad is None for p in decoder.parameters())


# Two ranks


def one_of_two(out):
    """A decoder step and a discriminator step on this rank's share of the images."""
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    if world > 1:
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    images, z, u = torch.rand(8, 3, 12, 12), torch.randn(8, 6, 3, 3), torch.rand(8, 2, 5)
    images, z = images[rank::world], z[rank::world]
    shares = {(1,): u[:, 0, :1], (5,): u[:, 0], (2, 5): u}  # of the draws too
    exchanges = []

    def draw_share(_num, *shape, **_):
        return shares.get(shape, u[:, 0, :1, None, None])[rank::world]

    def exchange(name, bucket):
        exchanges.append(name)
        return allreduce_hook(None, bucket)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(rae_decoder_train.DECODERS, "ViT-mini", SMALL_VIT)
        decoder, disc = random_decoder(), SmallDisc()
        networks = [decoder, disc]
        if world > 1:
            networks = [torch.nn.parallel.DistributedDataParallel(network) for network in networks]
            for network, name in zip(networks, ("decoder", "disc"), strict=True):
                network.register_comm_hook(name, exchange)

        patch.setattr(torch, "rand", draw_share)
        terms, _ = step(networks[0], images, z, squared, disc, accum=2, noise_tau=0.0)
        with_gan = {name: gradient.clone() for name, gradient in gradients(decoder).items()}
        step(networks[0], images, z, squared, accum=2, noise_tau=0.0)
        assert exchanges == ["decoder"] * 2 * (world > 1)  # one a step, in spite of two micro-batches
        optimizer = sgd(disc)
        terms["disc"], _ = rae_decoder_train.disc_step(networks[1], optimizer, images, z, decoder, 2, "fp32")
        assert exchanges[2:] == ["disc"] * (world > 1)
    if rank == 0:
        torch.save({"terms": terms, "decoder": with_gan, "disc": gradients(disc)}, out)


@pytest.mark.slow
def test_two_processes_take_the_step_of_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one_of_two("1.pt")
    run_ranks(one_of_two, "2.pt", world=2)
    one, two = read("1.pt"), read("2.pt")
    assert numbers(one["terms"]) == pytest.approx(numbers(two["terms"]), rel=1e-4)
    assert len(one["terms"]) == 7 and all(one["terms"].values())
    same(one["decoder"], two["decoder"])
    same(one["disc"], two["disc"])


# Runs


def log(folder="runs/decoder"):
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


def run(*flags):
    """The script in this process, on eight images a step, without LPIPS."""
    common = "--batch-size 8 --lpips-weight 0 --workers 0 --preview-every 0 --save-every 1 --precision fp32"
    rae_decoder_train.main([*common.split(), *map(str, flags)])


def test_learning_rate_at_exact_steps():
    def lr(step):
        return rae_decoder_train.learning_rate(step, steps=110, warmup=10, lr=2e-4, final_lr=2e-5)

    assert [lr(0), lr(4), lr(9), lr(10)] == pytest.approx([2e-5, 1e-4, 2e-4, 2e-4])
    assert [lr(60), lr(110)] == pytest.approx([1.1e-4, 2e-5])


@pytest.mark.parametrize(
    ("flags", "warmup"),
    [
        # An epoch is 100 steps. small warms up for a twentieth of the run, and no run for more than a tenth.
        ("--preset imagenet256 --steps 500", 50),
        ("--preset imagenet256 --steps 7", 0),
        ("--preset imagenet256 --steps 500 --warmup-epochs 1", 100),
        ("--preset small --batch-size 512", 40),
        ("--preset small --batch-size 512 --steps 40", 2),
        ("--preset small --batch-size 512 --steps 40 --warmup-epochs 0.1", 10),
    ],
)
def test_warm_up_of_short_runs(flags, warmup):
    args = rae_decoder_train.parse_args(["--data", "x", *flags.split()])
    assert rae_decoder_train.schedule(args, 51_263, world=1)[1] == warmup


def test_the_first_line_says_when_the_gan_begins():
    """Steps count from 0: a run of four has none from step 4 on, one of five has one."""
    args = rae_decoder_train.parse_args(["--data", "x", "--gan-weight", "1"])
    summaries = [rae_decoder_train.decoder_summary(args, 4, steps) for steps in (4, 5)]
    assert summaries == ["ViT-S, GAN from step 4, after the end of this run", "ViT-S, GAN from step 4"]
    args.gan_weight = 0
    assert rae_decoder_train.decoder_summary(args, 4, 9) == "ViT-S, no GAN"


def test_a_preview_that_fails_finds_its_step_saved(folder, monkeypatch):
    """Memory can end there, or a time limit; a full disk ends no training."""

    def die(*_):
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(rae_decoder_train, "save_preview", die)
        run("--steps", 6, "--save-every", 2, "--preview-every", 2)
    assert read("runs/decoder/last.pt")["step"] == 2
    Path(f"runs/decoder/preview-0000003.png.{os.getpid()}.tmp").symlink_to("/dev/full")
    run("--steps", 3, "--preview-every", 3)
    assert read("runs/decoder/last.pt")["step"] == 3 and not Path("runs/decoder/preview-0000003.png").exists()


def test_losses_and_previews_are_in_tensorboard(folder):
    """The package is no requirement."""
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run("--steps", 2, "--log-every", 1, "--preview-every", 1)
    events = EventAccumulator("runs/decoder").Reload()
    losses = {event.step: event.value for event in events.Scalars("loss")}
    assert losses == pytest.approx({record["step"]: record["loss"] for record in log()})
    assert [event.step for event in events.Images("preview")] == [1, 2]
    picture = Image.open(io.BytesIO(events.Images("preview")[1].encoded_image_string))
    with Image.open("runs/decoder/preview-0000002.png") as expected:
        assert np.array_equal(np.asarray(picture), np.asarray(expected))


def test_bad_runs_end_in_one_line(folder):
    run("--steps", 2)
    last = Path("runs/decoder/last.pt")
    whole = last.read_bytes()
    bare = read(last)["ema"]
    torch.save(bare, "bare.pt")

    def refused(line, *flags):
        assert re.match(line, message(run, "--steps", 3, *map(str, flags)))

    # A run that goes on has the settings that it began with.
    refused("this run has gan True, .*last.pt has .*False: same flags, or another --out", *ADVERSARIES)
    refused("this run has noise_tau 0.3, runs/decoder/last.pt has .*0.2: same flags", "--noise-tau", 0.3)
    refused("this run has noise_law half-normal, .*last.pt has .*uniform: ", "--noise-law", "half-normal")
    refused(r"this run has decoder {.*'mean': \(0.0, .*last.pt has .*'mean': \(0.5, ", "--raw-pixels")
    refused("--image-size 32: no multiple of --patch-size 12", "--patch-size", 12, "--encoder-size", 64)
    refused("--gan-start 0.0 is before --disc-start 6", "--gan-weight", 1, "--gan-start", 0)

    # Weights to start from are of the same latents and sizes.
    init = "--init", "runs/decoder/last.pt"
    refused("--init none.pt: no such file", "--init", "none.pt")
    refused(r"this run has layers \[0, 2\], --init .*last.pt has .*None: ", *init, "--layers", "0,2")
    refused("this run has encoder_size 32, --init .*last.pt has .*64: ", *init, "--encoder-size", 32)
    torch.save(timm.create_model("test_vit", num_classes=0).state_dict(), "vit.pt")
    refused(r"this run has encoder_hash \w+, --init .* has \w+", *init, "--encoder-weights", "vit.pt")
    refused("this run has name ViT-S, --init .*last.pt has .*ViT-mini: ", *init, "--decoder", "ViT-S")
    refused("this run has grid 2, --init bare.pt has .*4: ", "--init", "bare.pt", "--patch-size", 16)
    assert last.read_bytes() == whole


# The size of the tokens


@pytest.mark.parametrize(
    ("flags", "encoder_size", "grids"),
    [
        # Patches of 14 pixels, then of 16: eight tokens a side are eight patches.
        ("--encoder dinov2-small --image-size 64 --patch-size 8", 112, (8, 8)),
        ("--encoder dinov3-small --image-size 96 --patch-size 12", 128, (8, 8)),
        # The decoder has the tokens of the image, whatever the encoder sees.
        ("--encoder dinov2-small --image-size 64 --patch-size 8 --encoder-size 56", 56, (4, 8)),
        # 512 px: as released, and the paper's upsampling out of 256 tokens
        ("--preset imagenet512", 448, (32, 32)),
        ("--preset imagenet512 --patch-size 32", 224, (16, 16)),
    ],
)
def test_tokens_stand_for_pixels_of_the_image(monkeypatch, flags, encoder_size, grids):
    monkeypatch.setattr(timm, "create_model", functools.partial(timm.create_model, depth=1))
    common = "--data x --encoder-weights random --layers last --decoder ViT-mini"
    args = rae_decoder_train.parse_args([*common.split(), *flags.split()])
    encoder, decoder, ema, config = rae_decoder_train.open_networks(args, torch.device("cpu"))
    assert (encoder.encoder_size, encoder.grid, decoder.grid) == (encoder_size, *grids)
    assert config["encoder_size"] == encoder_size
    assert decoder.patch_size == args.patch_size == config["decoder"]["patch_size"]
    size = args.image_size
    with torch.no_grad():
        assert ema(encoder(torch.rand(1, 3, size, size))).shape == (1, 3, size, size)


# --init


def opened(*flags):
    """Decoder and EMA at the start of a run of the demo, and its config."""
    args = rae_decoder_train.parse_args(list(map(str, flags)))
    _, decoder, ema, config = rae_decoder_train.open_networks(args, torch.device("cpu"))
    return decoder, ema, config


def write_decoder(path, **changes):
    """A checkpoint of the demo's size with random weights; returns its decoder."""
    _, _, config = opened()
    sizes = config["decoder"] | changes
    torch.manual_seed(7)
    decoder = Decoder(**sizes)
    file = {"format": "rae-decoder/1", "config": {**config, "decoder": sizes}, "args": {}, "step": 3}
    torch.save(file | {"ema": decoder.state_dict(), "model": {}}, path)
    return decoder


RAW = {"mean": [0.0] * 3, "std": [1.0] * 3}


@pytest.mark.parametrize(
    ("file", "pixels", "flags"),
    [
        ("checkpoint", {"mean": [0.1, 0.2, 0.3], "std": [2.0, 3.0, 4.0]}, []),
        ("bare", {}, []),
        ("bare", RAW, ["--raw-pixels"]),
    ],
)
def test_init_takes_weights_with_the_pixels_they_were_trained_for(tmp_path, file, pixels, flags):
    path = tmp_path / "start.pt"
    expected = write_decoder(path, **pixels)
    if file == "bare":
        torch.save({f"module.{name}": value for name, value in expected.state_dict().items()}, path)
    decoder, ema, config = opened("--init", path, *flags)
    z = torch.randn(1, 64, 4, 4)
    assert torch.equal(decoder(z), expected(z)) and torch.equal(ema(z), expected(z))
    for name in ("mean", "std"):
        assert config["decoder"][name] == pytest.approx(getattr(expected, name).flatten().tolist())


def test_a_run_starts_from_another_decoder_and_goes_on(folder):
    expected = write_decoder("start.pt", **RAW)
    flags = ["--init", "start.pt", "--lr", 0, "--final-lr", 0]
    run("--steps", 1, *flags)
    run("--steps", 2, *flags)
    decoder, config = load_decoder("runs/decoder/last.pt")
    z = torch.randn(1, 64, 4, 4)
    assert read("runs/decoder/last.pt")["step"] == 2
    assert torch.allclose(decoder(z), expected(z), atol=1e-5)


# A step that is not finite

ADVERSARIES = "--gan-weight 0.75 --disc-weights random --disc-start 0 --gan-start 0".split()  # noqa: SIM905


@pytest.mark.slow
def test_a_discriminator_step_that_is_not_finite_is_counted_by_itself(
    folder, small_dino, monkeypatch, capsys
):
    """Decoder and EMA have moved by then, and their losses stay in the log."""
    disc_step = rae_decoder_train.disc_step
    count = itertools.count(1)

    def broken(model, optimizer, images, *rest):
        factor = math.nan if next(count) in (2, 3) else 1
        return disc_step(model, optimizer, images * factor, *rest)

    monkeypatch.setattr(rae_decoder_train, "disc_step", broken)
    run(*ADVERSARIES, "--steps", 4, "--keep-every", 1, "--log-every", 1, "--ema", 0.75)
    states = [read(f"runs/decoder/000000{step}.pt") for step in range(1, 5)]
    moments = [state["disc_optimizer"]["state"] for state in states]
    assert [equal(a, b) for a, b in itertools.pairwise(moments)] == [True, True, False]
    for part in ("model", "ema"):
        assert not any(equal(a[part], b[part]) for a, b in itertools.pairwise(states))

    assert [record["skipped"] for record in log()] == [0, 1, 2, 2]
    assert ["disc" in record for record in log()] == [True, False, False, True]
    assert all("l1" in record and "gan" in record for record in log())
    lines = [line for line in capsys.readouterr().err.splitlines() if "not finite" in line]
    skipped = "step {}: the discriminator's update was skipped, not finite: disc nan"
    assert lines == [skipped.format(2), skipped.format(3)]
