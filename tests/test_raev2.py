"""RAEv2 (arXiv 2605.18324): layers, prediction of x, base and internal guidance, against slow formulas."""

import json
import math

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import equal, message, read
from test_sample import pixels, write_decoder, write_flow

import dit_dh
import flow_train
import rae_decoder_train
import rae_encoder
import sample
from rae_encoder import Encoder

SHAPE, SIZES = (8, 2, 2), dict(width=16, depth=3, heads=2, head_width=32, head_depth=1, head_heads=2)
TINY = (
    "--decoder= --model DiT-DH-S --width 16 --depth 2 --heads 2 --head-width 32 --head-depth 1 --head-heads 2"
)
TINY += " --batch-size 8 --steps 4 --log-every 1 --save-every 2 --workers 0"


def excited(**options):
    """A network whose weights are all random: nothing is zero at its start."""
    torch.manual_seed(0)
    model = dit_dh.build("DiT-DH-S", SHAPE, 3, **SIZES, **options).eval()
    for weight in model.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.2)
    return model


# Several layers (section 3, eq. 1)


@pytest.mark.parametrize(
    "name", ["test_vit", "test_vit3", "vit_tiny_patch16_dinov3_qkvb", "vit_small_patch14_reg4_dinov2"]
)
def test_layers_equal_hooks_on_the_blocks(name):
    if not timm.is_model(name):
        pytest.skip(f"this timm has no {name}")
    last = len(timm.create_model(name, pretrained=False).blocks) - 1
    for layers in ([0, last], list(range(last))):
        if len(layers) < 2:
            continue
        encoder = Encoder(name, 64 if "14" not in name else 56, weights="random", layers=layers)
        outputs = []
        for block in encoder.vit.blocks:
            block.register_forward_hook(lambda module, inputs, output, kept=outputs: kept.append(output))
        z = encoder(torch.rand(2, 3, 32, 32))
        features = []
        for layer in layers:
            tokens = outputs[layer][:, encoder.vit.num_prefix_tokens :].double()
            centred = tokens - tokens.mean(2, keepdim=True)
            features.append(centred / (centred.square().mean(2, keepdim=True) + encoder.vit.norm.eps).sqrt())
        expected = sum(features) / len(features) + features[-1].mean(1, keepdim=True)
        assert z.shape == (2, encoder.width, encoder.grid, encoder.grid)
        assert torch.allclose(z.flatten(2).mT.double(), expected, atol=1e-4)


def test_subsets_weigh_the_layers_of_each_image():
    encoder = Encoder("test_vit", 32, weights="random", layers=[1, 2, 3])
    images = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        x = (images - encoder.mean) / encoder.std
        f = encoder.vit.forward_intermediates(
            x, [1, 2, 3], norm=True, output_fmt="NLC", intermediates_only=True
        )
    weights = torch.tensor([[1, 0, 0], [0.5, 0, 0.5], [1 / 3] * 3])
    z = encoder(images, weights).flatten(2).mT
    for i, (a, b, c) in enumerate(weights.tolist()):
        expected = a * f[0][i] + b * f[1][i] + c * f[2][i] + f[2][i].mean(0)
        assert torch.allclose(z[i], expected, atol=1e-5)
    assert torch.allclose(encoder(images)[2], encoder(images, weights)[2], atol=1e-5)


def test_subsets_are_uniform_over_sizes_and_then_over_subsets():
    torch.manual_seed(0)
    weights = rae_decoder_train.draw_subsets(30_000, 3, torch.device("cpu"))
    assert torch.allclose(weights.sum(1), torch.ones(30_000))
    subsets, counts = (weights > 0).unique(dim=0, return_counts=True)
    expected = [1 / 3 / math.comb(3, int(subset.sum())) for subset in subsets]
    assert len(subsets) == 7 and torch.allclose(counts / 30_000, torch.tensor(expected), atol=0.01)


@pytest.mark.parametrize("text", ["5", "7,5", "5,5", "-1,3", "a,b", "", "1.5,2"])
def test_layers_that_cannot_be_meant(text):
    said = message(rae_encoder.parse_args, [f"--layers={text}"])
    assert "--layers: expected two or more blocks, ascending" in said


def test_layers_beyond_the_last_block():
    assert "--layers: test_vit has blocks 0 to" in message(Encoder, "test_vit", 32, 256, "random", [1, 99])


def test_raev2_is_dinov3_with_the_released_layers():
    args = flow_train.parse_args(["--preset", "raev2", "--data", "x"])
    assert args.layers == list(range(11, 24, 2)) and (args.prediction, args.base_depth) == ("x", 8)
    assert rae_encoder.timm_name(args.encoder) == "vit_large_patch16_dinov3.lvd1689m"
    assert (args.epochs, args.hold_epochs, args.decay_epochs, args.lr, args.final_lr) == (
        80,
        25,
        50,
        2e-4,
        2e-5,
    )
    assert flow_train.default_shift((1024, 16, 16)) == 8.0


# The noise law of stage 1


def test_noise_laws():
    seen = []

    class Recorder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder_pred = torch.nn.Linear(1, 1, bias=False)

        def forward(self, z):
            seen.append(z)
            return self.decoder_pred.weight[0, 0].expand(len(z), 3, 4, 4)

    how = dict(noise_tau=0.8, lpips_weight=0, gan_weight=0, accum=1, precision="fp32")
    model, clean = Recorder(), torch.zeros(4000, 300, 1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for law, quantiles in (("uniform", [0.25, 0.5, 0.75]), ("half-normal", [0.3186, 0.6745, 1.1503])):
        torch.manual_seed(0)
        images = torch.rand(4000, 3, 4, 4)
        rae_decoder_train.decoder_step(model, optimizer, images, clean, None, None, noise_law=law, **how)
        sigma = seen.pop().flatten(1).std(1) / 0.8
        found = torch.quantile(sigma, torch.tensor([0.25, 0.5, 0.75]))
        assert found.tolist() == pytest.approx(quantiles, rel=0.06)


# Prediction of x and the base (section 5)


def test_loss_of_x_prediction_is_the_scaled_error_of_x():
    torch.manual_seed(1)
    x, eps = torch.randn(2, 6, *SHAPE)
    t, y = torch.tensor([0.0, 0.01, 0.05, 0.3, 0.9, 1.0]), torch.zeros(6, dtype=torch.long)
    guess = torch.randn(6, *SHAPE)

    def network(output):
        return lambda x_t, t, y: dit_dh.to_velocity(output, x_t, t, "x")

    loss = flow_train.flow_loss(network(guess), x, y, t, eps, prediction="x")
    scale = np.maximum(t.double().numpy(), 0.05)[:, None, None, None]
    expected = np.mean(((guess - x).double().numpy() / scale) ** 2)
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert flow_train.flow_loss(network(x), x, y, t, eps, prediction="x").item() == 0
    # From t = 0.05 on the target is the velocity eps - x.
    late = t >= 0.05
    v = flow_train.flow_loss(network(guess[late]), x[late], y[late], t[late], eps[late])
    same = flow_train.flow_loss(network(guess[late]), x[late], y[late], t[late], eps[late], prediction="x")
    assert v.item() == pytest.approx(same.item(), rel=1e-4)


def test_loss_with_a_base_is_the_sum_of_both():
    model, (x, eps) = excited(prediction="x", base_depth=2), torch.randn(2, 4, *SHAPE)
    t, y = torch.rand(4), torch.tensor([0, 1, 2, 3])
    t_x = t.view(-1, 1, 1, 1)
    v, v_base = model((1 - t_x) * x + t_x * eps, t, y, with_base=True)
    target = (t_x * (eps - x)) / t_x.clamp(min=0.05)
    expected = F.mse_loss(v, target) + F.mse_loss(v_base, target)
    loss = flow_train.flow_loss(model, x, y, t, eps, "x", with_base=True)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("steps", [1, 2, 50])
def test_with_an_oracle_for_x_euler_ends_at_x(steps):
    x, noise = torch.randn(2, 3, *SHAPE)

    def velocity(x_t, t):
        return dit_dh.to_velocity(x, x_t, torch.full((3,), t), "x")

    # The last interval must begin at 0.05 or later: below it the released rule stops short of x.
    grid = sample.time_grid(steps, 8.0)
    assert grid[-2] >= 0.05
    assert torch.allclose(sample.sample_latents(velocity, noise, grid), x, atol=1e-4)


def test_internal_guidance_in_one_call():
    model = excited(prediction="x", base_depth=1)
    x, y, calls = torch.randn(2, *SHAPE), torch.tensor([0, 2]), []
    model.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        v, v_base = model(x, torch.full((2,), 0.6), y, with_base=True)
        assert (v - v_base).abs().max() > 1e-3
        for s in (1.0, 0.0, 1.78, -0.5):
            calls.clear()
            guided = sample.network_velocity(model, x, 0.6, y, internal=s, interval=(0.1, 1.0))
            assert torch.allclose(guided, v_base + s * (v - v_base), atol=1e-5) and len(calls) == 1
        assert torch.equal(
            sample.network_velocity(model, x, 0.05, y, 1.78, (0.1, 1.0)), model(x, torch.full((2,), 0.05), y)
        )
        # With CFG: internal guidance on both label branches, then CFG.
        inner = lambda x, t, y: sample.network_velocity(model, x, t, y, internal=1.5)  # noqa: E731
        both = sample.guided_velocity(x, 0.6, y, inner, None, 2.0, (0, 1), 3)
        a, b = inner(x, 0.6, y), inner(x, 0.6, torch.tensor([3, 3]))
        assert torch.allclose(both, b + 2.0 * (a - b), atol=1e-4)


# The commands at tiny size


@pytest.mark.slow
def test_a_network_with_all_of_it_is_trained_resumed_and_sampled(folder):
    flags = [
        *TINY.split(),
        "--layers",
        "1,2,3",
        "--prediction",
        "x",
        "--base-depth",
        "1",
        "--precision",
        "fp32",
    ]
    flow_train.main([*flags, "--steps", "4", "--out", "runs/whole"])
    flow_train.main([*flags, "--steps", "2", "--out", "runs/half"])
    flow_train.main([*flags, "--steps", "4", "--out", "runs/half"])
    whole, half = read("runs/whole/last.pt"), read("runs/half/last.pt")
    for part in ("model", "ema", "optimizer", "mean"):
        assert equal(whole[part], half[part]), part
    assert whole["config"]["layers"] == [1, 2, 3] and whole["config"]["base_depth"] == 1
    assert all(
        weight.abs().max() > 0 for name, weight in whole["model"].items() if name.startswith("base_layer")
    )

    stage1 = "--lpips-weight 0 --batch-size 8 --steps 2 --workers 0 --preview-every 0 --layer-subsets"
    rae_decoder_train.main([*stage1.split(), "--layers", "1,2,3", "--noise-law", "half-normal"])
    files = ["--flow", "runs/whole/last.pt", "--decoder", "runs/decoder/last.pt", "-n", "4", "--steps", "3"]
    for name, scale in (
        ("full", []),
        ("one", ["--internal-guidance", "1"]),
        ("two", ["--internal-guidance", "--cfg", "3"]),
    ):
        sample.main([*files, "--cfg", "1", *scale, "--out", name, "--precision", "fp32"])
    full, one, two = (pixels(name) for name in ("full", "one", "two"))
    assert all(np.array_equal(full[name], one[name]) for name in full)
    assert any(not np.array_equal(full[name], two[name]) for name in full)
    sample.main(
        ["--decoder", "runs/decoder/last.pt", "--reconstruct", "data/demo", "-n", "2", "--out", "rec"]
    )

    rae_decoder_train.main([*stage1.split()[:-1], "--out", "runs/plain"])
    said = message(sample.main, [*files[:2], "--decoder", "runs/plain/last.pt", "--out", "no"])
    assert "layers" in said and "no pair" in said
    said = message(flow_train.main, [*TINY.split(), *flags[-6:], "--out", "runs/whole"])
    assert "runs/whole/last.pt has layers [1, 2, 3], this run None" in said


def test_internal_guidance_needs_a_base_and_a_scale(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = ["--flow", write_flow("flow.pt"), "--decoder", write_decoder("decoder.pt")]
    assert "has no base" in message(sample.main, [*files, "--internal-guidance", "1.5"])
    assert "--internal-guidance: give its scale" in message(sample.main, [*files, "--internal-guidance"])


def test_settings_of_folders_without_the_new_flags_are_as_before(folder):
    files = [
        "--flow",
        write_flow("flow.pt"),
        "--decoder",
        write_decoder("decoder.pt"),
        "-n",
        "2",
        "--steps",
        "1",
    ]
    sample.main([*files, "--out", "s"])
    settings = json.loads((folder / "s/settings.json").read_text())
    assert not {"internal_guidance", "layers", "prediction"} & settings.keys()


def test_raw_pixels_of_a_bare_decoder(tmp_path):
    sizes = dict(name="ViT-mini", channels=6, grid=2, patch_size=4, mean=[0.0] * 3, std=[1.0] * 3)
    decoder, z = rae_decoder_train.Decoder(**sizes).eval(), torch.randn(1, 6, 2, 2)
    torch.save(decoder.state_dict(), tmp_path / "model.pt")
    raw, _ = rae_decoder_train.load_decoder(str(tmp_path / "model.pt"), raw_pixels=True)
    plain, _ = rae_decoder_train.load_decoder(str(tmp_path / "model.pt"))
    assert torch.equal(raw(z), decoder(z)) and not torch.allclose(plain(z), decoder(z))
