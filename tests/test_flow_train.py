"""Stage 2: shift, times, loss, schedule and step against closed forms; Theorem 1 of the paper."""

import argparse
import math

import numpy as np
import pytest
import scipy.stats
import torch

import dit_dh
import flow_train


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


def small_step(accum=1, clip=0.0, poison=False):
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
