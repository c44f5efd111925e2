"""RAEv2 (arXiv 2605.18324): layers, prediction of x, internal guidance, against slow formulas.

test_by_hand.py has the commands: training with x-prediction and a base, samples with internal guidance.
"""

import functools

import numpy as np
import pytest
import timm
import torch

import dit_dh
import flow_train
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


@pytest.mark.parametrize("steps", [1, 2, 50])
def test_with_an_oracle_for_x_euler_ends_at_x(steps):
    x, noise = torch.randn(2, 3, *SHAPE)

    def velocity(x_t, t):
        return dit_dh.to_velocity(x, x_t, torch.full((3,), t), "x")

    # The last interval must begin at 0.05 or later: below it the released rule stops short of x.
    grid = sample.time_grid(steps, 8.0)
    assert grid[-2] >= 0.05
    assert torch.allclose(sample.sample_latents(velocity, noise, grid), x, atol=1e-4)


@torch.no_grad()
def test_internal_guidance_in_one_call():
    """Outside of the interval the full output counts; test_sample.py has it together with CFG."""
    model = excited(prediction="x", base_depth=1)
    x, y = torch.randn(2, *SHAPE), torch.tensor([0, 2])
    v, v_base = model(x, torch.full((2,), 0.6), y, with_base=True)
    assert (v - v_base).abs().max() > 1e-3
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    for s in (1.0, 0.0, 1.78, -0.5):
        calls.clear()
        guided = sample.network_velocity(model, x, 0.6, y, internal=s)
        assert torch.allclose(guided, v_base + s * (v - v_base), atol=1e-5) and len(calls) == 1
    for t, inside in ((0.05, False), (0.1, True), (0.8, True), (0.81, False)):
        found = sample.guided_velocity(model, x, t, y, internal=1.78, interval=(0.1, 0.8))
        expected = sample.network_velocity(model, x, t, y, internal=1.78 if inside else None)
        assert torch.equal(found, expected)
