"""RAEv2 (arXiv 2605.18324): layers, prediction of x, base and internal guidance, against slow formulas."""

import functools
import re

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import message, read
from PIL import Image

import dit_dh
import flow_train
import rae_decoder_train
import rae_encoder
import sample
from rae_encoder import Encoder

SHAPE = (8, 2, 2)
SIZES = {"width": 16, "depth": 3, "heads": 2, "head_width": 32, "head_depth": 1, "head_heads": 2}


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
    ("name", "patch", "eps"),
    [
        ("test_vit", 16, 1e-6),
        ("vit_small_patch16_dinov3", 16, 1e-5),  # rotary positions
        ("vit_small_patch14_reg4_dinov2", 14, 1e-6),  # registers
    ],
)
def test_layers_equal_hooks_on_the_blocks(monkeypatch, name, patch, eps):
    monkeypatch.setattr(timm, "create_model", functools.partial(timm.create_model, depth=3))
    for layers, numbers in (([0, 2], [0, 2]), ([0, 1], [0, 1]), ("all", [1, 2])):
        encoder = Encoder(name, 4 * patch, weights="random", layers=layers)
        outputs = []
        for block in encoder.vit.blocks:
            block.register_forward_hook(lambda module, inputs, output, kept=outputs: kept.append(output))
        z = encoder(torch.rand(2, 3, 32, 32))
        features = []
        for layer in numbers:
            tokens = outputs[layer][:, encoder.vit.num_prefix_tokens :].double()
            centred = tokens - tokens.mean(2, keepdim=True)
            features.append(centred / (centred.square().mean(2, keepdim=True) + eps).sqrt())
        expected = sum(features) / len(features) + features[-1].mean(1, keepdim=True)
        assert z.shape == (2, encoder.width, encoder.grid, encoder.grid)
        assert torch.allclose(z.flatten(2).mT.double(), expected, atol=1e-4)
        assert encoder.vit.norm.eps == eps and encoder.config()["layers"] == numbers


def test_raev2_is_dinov3_whose_decoder_puts_out_pixels():
    flags = ["--preset", "raev2"]
    for script in (rae_decoder_train, sample):
        args = script.parse_args(flags if script is sample else [*flags, "--data", "x"])
        assert rae_encoder.timm_name(args.encoder) == "vit_large_patch16_dinov3.lvd1689m"
        assert args.layers == list(range(11, 24, 2)) and args.raw_pixels


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
    # The target is the velocity eps - x from t = 0.05 on.
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
    x, y = torch.randn(2, *SHAPE), torch.tensor([0, 2])
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        v, v_base = model(x, torch.full((2,), 0.6), y, with_base=True)
        assert (v - v_base).abs().max() > 1e-3
        for s in (1.0, 0.0, 1.78, -0.5):
            calls.clear()
            guided = sample.network_velocity(model, x, 0.6, y, internal=s)
            assert torch.allclose(guided, v_base + s * (v - v_base), atol=1e-5) and len(calls) == 1

        # Outside of the interval the full output counts; its ends are inside.
        for t, inside in ((0.05, False), (0.1, True), (0.8, True), (0.81, False)):
            found = sample.guided_velocity(model, x, t, y, internal=1.78, interval=(0.1, 0.8))
            expected = sample.network_velocity(model, x, t, y, internal=1.78 if inside else None)
            assert torch.equal(found, expected)

        # With CFG: internal guidance on both label branches, then CFG.
        both = sample.guided_velocity(model, x, 0.6, y, scale=2.0, internal=1.5)
        a = sample.network_velocity(model, x, 0.6, y, internal=1.5)
        b = sample.network_velocity(model, x, 0.6, torch.tensor([3, 3]), internal=1.5)
        assert torch.allclose(both, b + 2.0 * (a - b), atol=1e-4)


# The commands at tiny size


LAYERS = [1, 2, 3]
COMMON = "--batch-size 8 --workers 0 --preview-every 0 --precision fp32 --device cpu"
TINY = "--model DiT-DH-S --width 16 --depth 2 --heads 2 --head-width 32 --head-depth 1 --head-heads 2"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """runs/decoder and runs/flow in a folder of their own, with all of RAEv2; stage 2 names no layers."""
    folder = tmp_path_factory.mktemp("raev2")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setitem(rae_decoder_train.DECODERS, "ViT-mini", (16, 2, 2, 24))
        rae_encoder.draw_demo("data/demo", num=22)
        stage1 = f"{COMMON} --lpips-weight 0 --steps 2 --layers 1,2,3 --raw-pixels"
        rae_decoder_train.main(stage1.split())
        flow_train.main(f"{COMMON} {TINY} --prediction x --base-depth 1 --lr 1e-2 --steps 3".split())
        yield folder


def test_stage_2_learns_the_layers_of_its_decoder(trained):
    flow = read("runs/flow/last.pt")
    config = {"layers": LAYERS, "prediction": "x", "base_depth": 1}
    assert {name: flow["config"][name] for name in config} == config
    layers = ("base_layer.linear", "base_layer.adaLN_modulation")  # zero at the start
    base = [value for name, value in flow["model"].items() if name.startswith(layers)]
    assert len(base) == 4 and all(value.abs().max() > 0 for value in base)

    encoder = Encoder("test_vit", 64, weights="random", layers=LAYERS)
    data = rae_encoder.ImageData("data/demo", 32)
    images = torch.stack([data[0, i][0] for i in range(22)]) / 255
    latents = encoder(torch.cat([images, images.flip(3)])).double().numpy()
    assert np.allclose(flow["mean"].numpy(), latents.mean(0), atol=1e-5)
    assert np.allclose(flow["var"].numpy(), latents.var(0), atol=1e-5)


def test_samples_of_an_x_network_with_internal_guidance(trained, tmp_path):
    """The flow's checkpoint names its decoder, which puts out [0,1] itself."""
    flags = "--steps 3 --shift 2 --internal-guidance 1.78 --guidance-interval 0.6 1 --cfg 1 --precision fp32"
    sample.main(f"-n 2 {flags} --device cpu --out {tmp_path}/s".split())
    flow, decoder_file = read("runs/flow/last.pt"), read("runs/decoder/last.pt")
    model = dit_dh.load("runs/flow/last.pt")
    raw = {"mean": [0.0] * 3, "std": [1.0] * 3}
    decoder = rae_decoder_train.Decoder("ViT-mini", 64, 4, 8, **raw)
    decoder.load_state_dict(decoder_file["ema"])

    x = torch.stack([torch.randn(64, 4, 4, generator=torch.Generator().manual_seed(i)) for i in range(2)])
    y = torch.tensor([0, 1])
    with torch.no_grad():
        for t, t_next in ((1.0, 0.8), (0.8, 0.5), (0.5, 0.0)):  # 2 t / (1 + t) of 1, 2/3, 1/3, 0
            v, v_base = model(x, torch.full((2,), t), y, with_base=True)
            x = x + (t_next - t) * (v_base + 1.78 * (v - v_base) if t >= 0.6 else v)
        images = decoder(x * (flow["var"] + 1e-5).sqrt() + flow["mean"])
    expected = (images.clamp(0, 1) * 255).round().permute(0, 2, 3, 1).numpy()
    found = np.stack([np.array(Image.open(tmp_path / f"s/{i:06d}.png")) for i in range(2)]).astype(int)
    assert abs(found - expected).max() <= 1 and expected.std() > 5


def test_other_layers_are_no_pair(trained, tmp_path):
    plain = read("runs/decoder/last.pt")
    plain["config"]["layers"] = None
    torch.save(plain, tmp_path / "plain.pt")
    line = message(sample.main, ["--decoder", f"{tmp_path}/plain.pt", "--out", f"{tmp_path}/s"])
    assert re.search(
        r"--flow runs/flow/last.pt has layers \[1, 2, 3\], --decoder .*plain.pt has .*None", line
    )
    assert not (tmp_path / "s").exists()

    flags = [*f"{COMMON} {TINY}".split(), "--out", f"{tmp_path}/flow", "--layers", "0,2"]
    line = message(flow_train.main, flags)
    assert re.search(r"this run has layers \[0, 2\], --decoder .* has .*\[1, 2, 3\]", line)


def test_internal_guidance_needs_a_base(trained, tmp_path):
    state = read("runs/flow/last.pt")["ema"]
    bare = {name: value for name, value in state.items() if not name.startswith("base_layer")}
    torch.save(bare, tmp_path / "bare.pt")
    flags = f"--flow {tmp_path}/bare.pt --decoder runs/decoder/last.pt --stats runs/flow/last.pt"
    line = message(sample.main, f"{flags} --internal-guidance 1.5 --out {tmp_path}/s".split())
    assert line.startswith(f"--internal-guidance: {tmp_path}/bare.pt has no base output")
