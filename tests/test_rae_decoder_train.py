"""Stage 1: the decoder against a naive one, its released names, its loss, schedule and step."""

import argparse
import math
from urllib.error import URLError

import lpips
import numpy as np
import pytest
import torch

import rae_decoder_train
from rae_decoder_train import Decoder, load_decoder

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
    with pytest.raises(SystemExit, match=r"vgg16-397923af.pth can't be had.*--lpips-weight 0") as exit:
        rae_decoder_train.perceptual_loss("hub")
    assert "\n" not in str(exit.value)


class Recorder(torch.nn.Module):
    """A decoder that keeps the latents it is given and answers with a learned constant."""

    def __init__(self):
        super().__init__()
        self.constant, self.seen = torch.nn.Parameter(torch.tensor(0.2)), []

    def forward(self, z):
        self.seen.append(z)
        return self.constant.expand(len(z), 3, 8, 8)


def step_args(**changes):
    return argparse.Namespace(**(dict(noise_tau=0.8, lpips_weight=1.0, accum=1, precision="fp32") | changes))


def test_noise_of_each_image_is_uniform_in_strength():
    recorder, images = Recorder(), torch.rand(2000, 3, 8, 8)
    optimizer = torch.optim.SGD(recorder.parameters(), lr=0.0)
    clean = torch.randn(2000, 400, 2, 2)
    torch.manual_seed(0)
    rae_decoder_train.train_step(recorder, lambda _: clean, None, optimizer, images, step_args())
    sigma = (recorder.seen[0] - clean).flatten(1).std(1) / 0.8
    quantiles = torch.quantile(sigma, torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9]))
    assert quantiles.tolist() == pytest.approx([0.1, 0.25, 0.5, 0.75, 0.9], abs=0.04)
    rae_decoder_train.train_step(recorder, lambda _: clean, None, optimizer, images, step_args(noise_tau=0.0))
    assert torch.equal(recorder.seen[1], clean)


def test_loss_is_l1_plus_weighted_lpips():
    recorder, images = Recorder(), torch.rand(4, 3, 8, 8)
    optimizer = torch.optim.SGD(recorder.parameters(), lr=0.0)

    def perceptual(fake, real):  # not LPIPS: something easy to compute by hand, from images in [-1,1]
        return (fake - real).square().mean((1, 2, 3), keepdim=True)

    args = step_args(lpips_weight=0.3)
    loss, l1, lpips_loss = rae_decoder_train.train_step(
        recorder, lambda x: torch.zeros(len(x), 2, 1, 1), perceptual, optimizer, images, args
    )
    expected_l1, expected_lpips = (images - 0.2).abs().mean(), 4 * (images - 0.2).square().mean()
    assert torch.allclose(torch.stack([l1, lpips_loss]), torch.stack([expected_l1, expected_lpips]))
    assert torch.allclose(loss, expected_l1 + 0.3 * expected_lpips)


def test_micro_batches_give_the_step_of_one_large_batch():
    gradients = []
    for accum in (1, 4):
        decoder = random_decoder()
        optimizer = torch.optim.SGD(decoder.parameters(), lr=0.0)
        torch.manual_seed(3)
        images, z = torch.rand(8, 3, 12, 12), torch.randn(8, 6, 3, 3)
        args = step_args(accum=accum)
        rae_decoder_train.train_step(decoder, lambda _, z=z: z, None, optimizer, images, args)
        # The softmax does not see the keys' bias: its gradient is rounding alone.
        gradients.append([p.grad for n, p in decoder.named_parameters() if "key.bias" not in n])
    for one, four in zip(*gradients, strict=True):
        assert one.abs().max() > 0
        assert (one - four).abs().max() <= 1e-4 * one.abs().max()
