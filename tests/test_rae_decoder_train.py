"""Stage 1: the decoder against a naive one, its released names, its loss, schedule and step."""

import argparse
import copy
import io
import json
import math
import socket
import subprocess
import sys
from urllib.error import URLError

import lpips
import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
from conftest import equal, read
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
    assert position.shape == (26, 16) and position[0].eq(0).all()
    for row, column, k in ((0, 3, 0), (4, 1, 2), (2, 2, 3)):
        omega = 10_000 ** (-k / 4)
        token = position[1 + row * 5 + column]
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
    for file in (
        state,
        {"model": {f"module.decoder.{name}": value for name, value in state.items()}},
        {"ema": state, "model": {}},
        bare,
    ):
        torch.save(file, path)
        loaded, config = load_decoder(path)
        assert torch.equal(loaded(z), decoder(z)) and config == {} and not loaded.training
    del bare["trainable_cls_token"]
    torch.save(bare, path)
    assert load_decoder(path)[0].trainable_cls_token.eq(0).all()
    torch.save(state, path)
    siglip, _ = load_decoder(path, "siglip2-base")  # mean and std 0.5
    pixels = (decoder(z) - decoder.mean) / decoder.std
    assert torch.allclose(siglip(z), pixels * 0.5 + 0.5, atol=1e-5)
    for broken in ({"a": torch.zeros(1)}, state | {"extra": torch.zeros(1)}):
        torch.save(broken, path)
        with pytest.raises(SystemExit, match="neither rae-decoder/1 nor a released decoder"):
            load_decoder(path)


def test_learning_rate_at_exact_steps():
    def lr(step):
        return rae_decoder_train.learning_rate(step, steps=110, warmup=10, lr=2e-4, final_lr=2e-5)

    assert [lr(0), lr(4), lr(9), lr(10)] == pytest.approx([2e-5, 1e-4, 2e-4, 2e-4])
    assert [lr(60), lr(110)] == pytest.approx([1.1e-4, 2e-5])


def test_lpips_is_the_packages_own():
    torch.manual_seed(5)
    network = rae_decoder_train.perceptual_loss("random")
    x, y = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    torch.manual_seed(0)
    expected = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    assert torch.allclose(network(x, y), expected(x, y)) and network(x, x).eq(0).all()
    assert not any(p.requires_grad for p in network.parameters())


def test_vgg_that_cannot_be_had_ends_in_one_line(monkeypatch):
    def offline(*_args, **_kwargs):
        raise URLError("no network")

    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    monkeypatch.setattr("os.path.exists", lambda path: "vgg16" not in str(path))
    with pytest.raises(SystemExit, match=r"LPIPS needs .*vgg16-397923af.pth .*--lpips-weight 0") as exit:
        rae_decoder_train.perceptual_loss("hub")
    assert "\n" not in str(exit.value)


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


def step_args(**changes):
    args = dict(noise_tau=0.8, lpips_weight=1.0, gan_weight=0.75, accum=1, precision="fp32")
    return argparse.Namespace(**(args | changes))


def sgd(network):
    return torch.optim.SGD(network.parameters(), lr=0.0)


def test_noise_of_each_image_is_uniform_in_strength():
    recorder, images, clean = Recorder(), torch.rand(2000, 3, 8, 8), torch.randn(2000, 400, 2, 2)
    torch.manual_seed(0)
    decoder_step(recorder, None, None, sgd(recorder), images, clean, step_args())
    sigma = (recorder.seen[0] - clean).flatten(1).std(1) / 0.8
    quantiles = torch.quantile(sigma, torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9]))
    assert quantiles.tolist() == pytest.approx([0.1, 0.25, 0.5, 0.75, 0.9], abs=0.04)
    decoder_step(recorder, None, None, sgd(recorder), images, clean, step_args(noise_tau=0.0))
    assert torch.equal(recorder.seen[1], clean)


def test_loss_is_l1_plus_weighted_lpips():
    recorder, images = Recorder(), torch.rand(4, 3, 8, 8)
    args, z = step_args(lpips_weight=0.3), torch.zeros(4, 2, 1, 1)
    terms = decoder_step(recorder, squared, None, sgd(recorder), images, z, args)
    l1, lpips_loss = (images - 0.2).abs().mean().item(), 4 * (images - 0.2).square().mean().item()
    assert terms.tolist() == pytest.approx([l1 + 0.3 * lpips_loss, l1, lpips_loss, 0, 0, 0], rel=1e-5)


def whole_batch(decoder, disc, images, z, u, args):
    """TERMS and gradients by one graph over the whole batch, as the formulas read."""
    xhat = decoder(z)
    l1, lpips_loss = (xhat - images).abs().mean(), squared(2 * xhat, 2 * images).mean()
    gan = -disc(diff_augment(2 * xhat - 1, u)).mean()
    reconstruction = l1 + args.lpips_weight * lpips_loss
    last = decoder.decoder_pred.weight
    norms = [torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (reconstruction, gan)]
    scale = norms[0] / (norms[1] + 1e-6)
    loss = reconstruction + args.gan_weight * scale * gan
    loss.backward()
    return torch.stack([loss, l1, lpips_loss, gan, scale, 0 * loss])


# The softmax does not see the keys' bias: its gradient is rounding alone.
def gradients(network):
    return {n: p.grad for n, p in network.named_parameters() if "key.bias" not in n}


def same(one, other, tolerance=1e-4):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].abs().max() > 0
        assert (one[name] - other[name]).abs().max() <= tolerance * one[name].abs().max(), name


@pytest.mark.parametrize("accum", [1, 4])
def test_decoder_step_is_that_of_the_whole_batch_in_any_micro_batches(accum):
    disc, args = SmallDisc(), step_args(accum=accum, noise_tau=0.0, lpips_weight=0.5)
    decoder, reference = random_decoder(), random_decoder()
    images, z = torch.rand(8, 3, 12, 12), torch.randn(8, 6, 3, 3)
    torch.manual_seed(3)
    torch.rand(8, 1, 1, 1), torch.randn_like(z)  # the latent noise is drawn first
    expected = whole_batch(reference, disc, images, z, torch.rand(8, 5), args)
    torch.manual_seed(3)
    terms = decoder_step(decoder, squared, disc, sgd(decoder), images, z, args)
    assert terms.tolist() == pytest.approx(expected.tolist(), rel=1e-4)
    same(gradients(reference), gradients(decoder))


def test_decoder_step_leaves_the_discriminator_without_gradients():
    disc, decoder = SmallDisc(), random_decoder()
    images, z = torch.rand(2, 3, 12, 12), torch.randn(2, 6, 3, 3)
    decoder_step(decoder, None, disc, sgd(decoder), images, z, step_args())
    assert all(p.grad is None for p in disc.parameters())


def test_noise_and_draws_do_not_depend_on_micro_batches():
    found = []
    for accum in (1, 4):
        decoder, disc = random_decoder(), SmallDisc()
        torch.manual_seed(3)
        images, z = torch.rand(8, 3, 12, 12), torch.randn(8, 6, 3, 3)
        decoder_step(decoder, squared, disc, sgd(decoder), images, z, step_args(accum=accum))
        found.append(gradients(decoder))
    same(*found)


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
        args = step_args(lpips_weight=0.0, noise_tau=0.0)
        patch.setattr(rae_decoder_train.torch, "randn_like", lambda z: 0)
        terms = decoder_step(recorder, None, disc, sgd(recorder), images, z, args)
    assert terms[4].item() == pytest.approx(abs(slopes[0] / slopes[1]).item(), rel=1e-4)
    torch.nn.init.zeros_(disc.heads.weight)  # a discriminator that sees nothing
    terms = decoder_step(recorder, None, disc, sgd(recorder), images, z, args)
    assert terms[4].item() == 1e4


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
        loss = rae_decoder_train.disc_step(disc, decoder, optimizer, images, z, step_args(accum=accum))
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


@pytest.fixture
def small_dino(monkeypatch):
    """DINO's ViT, 784 tokens and 12 blocks, but 12 channels wide."""

    def load_vit(name, weights, *_):
        torch.manual_seed(0)
        return timm.create_model(name, pretrained=False, num_classes=0, embed_dim=12, num_heads=2).eval()

    monkeypatch.setattr("rae_encoder.load_vit", load_vit)


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


def test_spectral_norm_is_near_one_and_iterates_once_a_step(small_dino):
    disc, decoder = rae_decoder_train.Discriminator("random").eval(), random_decoder()
    images, z = torch.rand(4, 3, 12, 12), torch.randn(4, 6, 3, 3)
    buffers = []
    for accum in (1, 2):
        twin, args = copy.deepcopy(disc), step_args(accum=accum, precision="bf16")
        torch.manual_seed(0)
        rae_decoder_train.disc_step(twin, decoder, sgd(twin.heads), images, z, args)
        buffers.append(dict(twin.heads.named_buffers()))
        decoder_step(decoder, None, twin, sgd(decoder), images, z, args)
        assert all(torch.equal(v, buffers[-1][n]) for n, v in twin.heads.named_buffers())
    assert all(torch.equal(buffers[0][name], buffers[1][name]) for name in buffers[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert disc(images).dtype == torch.float32  # the heads, whose power iteration would suffer
    disc.heads.train()
    for _ in range(100):
        weights = [m.weight for m in disc.heads.modules() if isinstance(m, torch.nn.Conv1d)]
    for weight in weights:
        assert torch.linalg.matrix_norm(weight.detach().flatten(1), 2).item() == pytest.approx(1, abs=0.02)


def test_recomputed_activations_give_the_same_gradients():
    z, found = torch.randn(2, 6, 3, 3), []
    for recomputes in (False, True):
        decoder = random_decoder()
        decoder.recomputes = recomputes
        decoder(z).square().mean().backward()
        found.append(gradients(decoder))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_the_blocks_compile_once_and_in_one_graph():
    torch._dynamo.reset()
    for recomputes in (False, True):
        decoder = random_decoder().train()
        decoder.recomputes = recomputes
        for block in decoder.decoder_layers:
            block.compile(backend="eager", fullgraph=True)  # an error at a graph break
        for step in range(3):
            with torch._dynamo.config.patch(error_on_recompile=step > 0):
                images, z = torch.rand(4, 3, 12, 12), torch.randn(4, 6, 3, 3)
                args = step_args(accum=2, precision="bf16")
                decoder_step(decoder, squared, None, sgd(decoder), images, z, args)


def run(*flags):
    """The script in this process, on eight images a step, without LPIPS."""
    common = "--batch-size 8 --lpips-weight 0 --workers 0 --preview-every 0 --save-every 1 --precision fp32"
    rae_decoder_train.main([*common.split(), *map(str, flags)])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rae_encoder.draw_demo("data/demo", num=24)
    return tmp_path


GAN = "--gan-weight 0.75 --disc-weights random --disc-start 1 --gan-start 2".split()  # noqa: SIM905


def test_schedules_at_exact_steps(folder, small_dino, monkeypatch):
    seen = []

    def decoder_step(_model, _perceptual, disc, optimizer, *_):
        seen.append([optimizer.param_groups[0]["lr"], disc is not None, None])
        return torch.ones(6)

    def disc_step(_model, _decoder, optimizer, *_):
        seen[-1][2] = optimizer.param_groups[0]["lr"]
        return torch.ones(())

    monkeypatch.setattr(rae_decoder_train, "decoder_step", decoder_step)
    monkeypatch.setattr(rae_decoder_train, "disc_step", disc_step)
    run(*GAN, "--epochs", 4, "--lr", 3e-4, "--final-lr", 1e-4)  # three steps an epoch
    cosine = [1e-4 + 2e-4 * (1 + math.cos(math.pi * k / 9)) / 2 for k in range(9)]
    assert [lr for lr, _, _ in seen] == pytest.approx([1e-4, 2e-4, 3e-4, *cosine])
    assert [heard for _, heard, _ in seen] == [step >= 6 for step in range(12)]
    own = [lr for _, _, lr in seen]
    assert own[:3] == [None] * 3 and own[3:] == pytest.approx([1e-4, 2e-4, 3e-4, *cosine[:6]])


def test_resume_is_exact_with_the_discriminator_and_ema_is_its_closed_form(folder, small_dino):
    flags = [*GAN, "--epochs", 3, "--keep-every", 1, "--ema", 0.9]
    run(*flags)
    run(*flags, "--resume", "runs/decoder/0000005.pt", "--out", "again", "--workers", 1)
    whole, again = read("runs/decoder/last.pt"), read("again/last.pt")
    for part in ("model", "ema", "optimizer", "disc", "disc_optimizer", "step", "config"):
        assert equal(whole[part], again[part]), part
    early, late = read("runs/decoder/0000003.pt"), read("runs/decoder/0000004.pt")
    assert not equal(early["disc"], late["disc"]) and equal(
        read("runs/decoder/0000002.pt")["disc"], early["disc"]
    )
    steps = [read(f"runs/decoder/{step:07d}.pt") for step in range(1, 10)]
    for name, value in whole["ema"].items():
        expected = 0.9**8 * steps[0]["ema"][name]
        for k, checkpoint in enumerate(steps[1:], 2):
            expected = expected + 0.1 * 0.9 ** (9 - k) * checkpoint["model"][name]
        assert torch.allclose(value, expected, atol=1e-5), name
    assert equal(read("runs/decoder/previous.pt")["model"], steps[-2]["model"])


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
    for size in (1, 8, 24):
        args = argparse.Namespace(batch_size=size, accum=1, workers=0)
        found = rae_decoder_train.evaluate(decoder, encoder, squared, data, args, torch.device("cpu"), 0, 1)
        assert found["eval_psnr"] == pytest.approx(np.mean(psnr), abs=1e-3) and found["eval_lpips"] > 0
    run("--steps", 2, "--eval-data", "data/demo", "--eval-every", 1)
    lines = [json.loads(line) for line in (folder / "runs/decoder/metrics.jsonl").read_text().splitlines()]
    assert "eval_psnr" not in lines[0] and lines[1]["eval_psnr"] != pytest.approx(np.mean(psnr), abs=1e-6)
    assert "eval_lpips" not in lines[1]  # without LPIPS in training


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
    with pytest.raises(SystemExit, match="--init bare.pt: of other sizes, its decoder_pos_embed") as exit:
        run("--steps", 1, "--init", "bare.pt", "--out", "x", "--patch-size", 16)
    assert "\n" not in str(exit.value)


def test_decoder_upsampling():
    flags = "--preset imagenet512 --data x --patch-size 32 --encoder-weights random --decoder ViT-mini"
    args = rae_decoder_train.parse_args(flags.split())
    encoder, decoder, config = rae_decoder_train.build(args, torch.device("cpu"))
    assert (encoder.encoder_size, encoder.grid, decoder.grid) == (224, 16, 16)
    args.patch_size = None
    encoder, decoder, config = rae_decoder_train.build(args, torch.device("cpu"))
    assert (encoder.encoder_size, encoder.grid, decoder.grid, decoder.patch_size) == (448, 32, 32, 16)


def test_presets_hold_the_released_recipe():
    recipe = dict(
        encoder="dinov2-base", decoder="ViT-XL", noise_tau=0.8, lpips_weight=1, gan_weight=0.75,
        batch_size=512, epochs=16, disc_start=6, gan_start=8, lr=2e-4, final_lr=2e-5, warmup_epochs=1,
        ema=0.9978,
    )  # fmt: skip
    for size in (256, 512):
        args = rae_decoder_train.parse_args(["--preset", f"imagenet{size}", "--data", "x"])
        assert {name: getattr(args, name) for name in recipe} == recipe and args.image_size == size
    assert rae_decoder_train.parse_args([]).gan_weight == 0


class Malicious:
    def __reduce__(self):
        return (open, ("stolen", "w"))


def test_faults_end_in_one_line(folder):
    run("--steps", 2)
    last = folder / "runs/decoder/last.pt"
    whole = last.read_bytes()

    def refused(line, *flags):
        with pytest.raises(SystemExit, match=line) as exit:
            run("--steps", 3, *flags)
        assert "\n" not in str(exit.value)

    last.write_bytes(whole[: len(whole) // 2])
    refused("last.pt: not a weights file .*--resume runs/decoder/previous.pt")
    torch.save({"format": "rae-decoder/1", "config": Malicious()}, last)
    refused("last.pt: not a weights file .*UnpicklingError")
    assert not (folder / "stolen").exists()
    torch.save({"format": "rae-flow/1"}, last)
    refused("last.pt: not a rae-decoder/1 checkpoint")
    last.unlink()
    run("--steps", 2)  # a kill between the two renames leaves previous.pt alone
    assert equal(read(last)["model"], torch.load(io.BytesIO(whole), weights_only=True)["model"])
    refused("last.pt has gan False, this run True: same flags, or another --out", *GAN)
    refused("--gan-start 0.0 is before --disc-start 1", *GAN, "--gan-start", 0)
    (folder / "file").write_text("")
    refused("--out file/run: .*can't be written", "--out", "file/run")
    (folder / "runs/decoder/last.pt.tmp").symlink_to("/dev/full")
    before = last.read_bytes()
    refused("last.pt: can't be written .*No space left")
    assert last.read_bytes() == before


def test_second_run_in_a_folder_is_refused(folder):
    log = rae_decoder_train.open_log("runs/decoder")
    command = [sys.executable, rae_decoder_train.__file__, "--steps", "1", "--batch-size", "8"]
    second = subprocess.run(command, capture_output=True, text=True)
    assert second.returncode == 1
    assert second.stderr.splitlines()[-1].startswith("--out runs/decoder: another run is in it")
    log[0].close()


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
    args = step_args(accum=2, noise_tau=0.0)
    terms = decoder_step(nets[0], squared, disc, sgd(decoder), images, z, args)
    with_gan = {name: gradient.clone() for name, gradient in gradients(decoder).items()}
    decoder_step(nets[0], squared, None, sgd(decoder), images, z, args)
    assert exchanges == ["decoder"] * 2 * (world > 1)  # one a step, in spite of two micro-batches
    terms[5] = rae_decoder_train.disc_step(nets[1], decoder, sgd(disc), images, z, args)
    assert exchanges[2:] == ["disc"] * (world > 1)
    terms = rae_decoder_train.mean_over_ranks(terms)
    if rank == 0:
        torch.save(dict(terms=terms, decoder=with_gan, disc=gradients(disc)), out)


def test_two_processes_take_the_step_of_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for world in (1, 2):
        torch.multiprocessing.spawn(one_of_two, (world, port, str(tmp_path / f"{world}.pt")), nprocs=world)
    one, two = (read(tmp_path / f"{world}.pt") for world in (1, 2))
    assert one["terms"].tolist() == pytest.approx(two["terms"].tolist(), rel=1e-4) and one["terms"].all()
    same(one["decoder"], two["decoder"])
    same(one["disc"], two["disc"])
