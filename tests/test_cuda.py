"""The steps of training, sampling and evaluation on a real GPU, beside the same on the CPU."""

import copy
import types
from pathlib import Path

import pytest
import torch
from helpers import read, run_ranks

import dit_dh
import fid
import flow_train
import rae_decoder_train
import rae_encoder
import sample
from rae_encoder import exact_fp32

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)
LATENT = (64, 4, 4)
FLOW = {"time_dist": "logit-normal", "shift": 1.0, "clip": 1.0, "accum": 1, "precision": "fp32"}
DECODER = {"noise_tau": 0.0, "lpips_weight": 1.0, "gan_weight": 0.75, "accum": 1, "precision": "fp32"}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def close(a, b, relative=1e-3):
    """Whether the largest difference is small beside the largest value; of TF32 it would not be."""
    a = a.detach().double().cpu()
    b = b.detach().double().cpu()
    return (a - b).abs().max() <= relative * b.abs().max()


def small_dit(**options):
    """A DiT-DH whose outputs are not zero, as those of a new one are."""
    sizes = {"width": 64, "depth": 2, "heads": 2, "head_width": 64, "head_depth": 1, "head_heads": 2}
    network = dit_dh.build("DiT-DH-S", LATENT, 10, **sizes, **options)
    for weight in network.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.05)
    return network


def small_decoder():
    return rae_decoder_train.Decoder("ViT-mini", 64, 4, 16, [0.5] * 3, [0.25] * 3)


def batch(num=4):
    return torch.randn(num, *LATENT), torch.arange(num)


def adamw(network, lr):
    optimizer = flow_train.adamw(network)
    optimizer.param_groups[0]["lr"] = lr
    return optimizer


def both(module):
    """The module on the CPU and its copy on the GPU."""
    return (CPU, module), (GPU, copy.deepcopy(module).to(GPU))


def compare(results, relative=1e-3):
    cpu, gpu = results
    assert all(value.is_cuda for value in gpu)
    for expected, value in zip(cpu, gpu, strict=True):
        assert close(value, expected, relative)


# Stage 2


@pytest.mark.parametrize("prediction", ["v", "x"])
def test_flow_loss_and_gradients_are_those_of_the_cpu(prediction):
    x, y = batch()
    eps = torch.randn_like(x)
    t = torch.rand(4)
    results = []
    for device, network in both(small_dit(prediction=prediction, base_depth=1).eval()):
        inputs = (value.to(device) for value in (x, y, t, eps))
        with exact_fp32():
            loss = flow_train.flow_loss(network, *inputs)
            loss.backward()
        results.append([loss, *(weight.grad for weight in network.parameters() if weight.grad is not None)])
    compare(results)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_train_steps_learn(precision):
    """Of latents that are all alike, at first the error is theirs, 9, and the noise's, 1."""
    network = small_dit().to(GPU).train()
    optimizer = adamw(network, 2e-2)
    x = 3 * torch.randn(LATENT[0], 1, 1, device=GPU).expand(16, *LATENT)
    y = torch.zeros(16, dtype=torch.long, device=GPU)
    losses = []
    for _ in range(40):
        terms, finite = flow_train.train_step(network, optimizer, x, y, **FLOW | {"precision": precision})
        assert finite and terms["loss"].is_cuda
        losses.append(terms["loss"].item())
    assert losses[0] > 8 and losses[-1] < 4


def test_fused_adamw_goes_on_from_a_file(tmp_path):
    """Its step counters lie on the GPU, where a resumed run must have them again."""
    x, y = (value.to(GPU) for value in batch())
    network = small_dit().to(GPU)
    state = {"model": network, "optimizer": adamw(network, 1e-3)}

    def step(state, k):
        flow_train.seed_step(0, k, 0)
        flow_train.train_step(state["model"], state["optimizer"], x, y, **FLOW)

    step(state, 0)
    step(state, 1)
    args = types.SimpleNamespace(out=str(tmp_path), keep_every=None)
    flow_train.save(args, state, 2, {"config": {}})
    network = small_dit().to(GPU)
    again = {"model": network, "optimizer": adamw(network, 1e-3)}
    start = {**rae_encoder.read_weights(f"{tmp_path}/last.pt", "--resume"), "path": "last.pt"}
    assert flow_train.resume(start, {}, again, 10) == 2
    for values in again["optimizer"].state.values():
        assert all(value.device == GPU for value in values.values())
    assert again["optimizer"].param_groups[0]["fused"]

    step(state, 2)
    step(again, 2)
    for a, b in zip(state["model"].parameters(), again["model"].parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-6)


def test_compiled_blocks_compute_the_same():
    torch._dynamo.reset()
    network = small_dit().to(GPU).eval()
    x, y = (value.to(GPU) for value in batch())
    t = torch.rand(4, device=GPU)
    with torch.no_grad(), exact_fp32():
        expected = network(x, t, y)
        compiled = rae_encoder.parallel(network, network.blocks, None, GPU)
        assert close(compiled(x, t, y), expected)
    assert all(block._compiled_call_impl for block in network.blocks)


# Stage 1


def test_decoder_step_is_that_of_the_cpu(monkeypatch):
    """All terms, with LPIPS, GAN and lambda; without what is drawn, since devices draw differently."""
    monkeypatch.setattr(rae_decoder_train, "diff_augment", lambda x, u=None: x)
    images = torch.rand(2, 3, 64, 64)
    z, _ = batch(2)
    perceptual = rae_decoder_train.perceptual_loss("random")
    disc = rae_decoder_train.Discriminator("random").eval()
    networks = [both(module) for module in (small_decoder(), perceptual, disc)]
    results = []
    for (device, decoder), (_, perceptual), (_, disc) in zip(*networks, strict=True):
        optimizer = adamw(decoder, 1e-4)
        data = (images.to(device), z.to(device))
        with exact_fp32():
            terms, finite = rae_decoder_train.decoder_step(
                decoder, optimizer, *data, perceptual, disc, **DECODER
            )
            optimizer = adamw(disc.heads, 1e-4)
            loss, disc_finite = rae_decoder_train.disc_step(disc, optimizer, *data, decoder, 1, "fp32")
        assert finite and disc_finite
        results.append([*terms.values(), loss])
    compare(results, relative=5e-3)


def test_decoder_step_in_bf16():
    """As users run it, with what is drawn, in two micro-batches."""
    decoder = small_decoder().to(GPU)
    perceptual = rae_decoder_train.perceptual_loss("random").to(GPU)
    disc = rae_decoder_train.Discriminator("random").to(GPU).eval()
    optimizer = adamw(decoder, 1e-3)
    disc_optimizer = adamw(disc.heads, 1e-4)
    images = torch.rand(4, 3, 64, 64, device=GPU)
    z = batch()[0].to(GPU)
    settings = DECODER | {"noise_tau": 0.8, "accum": 2, "precision": "bf16"}
    losses = []
    for _ in range(5):
        terms, finite = rae_decoder_train.decoder_step(
            decoder, optimizer, images, z, perceptual, disc, **settings
        )
        _, disc_finite = rae_decoder_train.disc_step(disc, disc_optimizer, images, z, decoder, 2, "bf16")
        assert finite and disc_finite
        losses.append(terms["l1"].item())
    assert losses[-1] < losses[0]


# Images, statistics


@pytest.mark.parametrize("workers", [0, 1])
def test_pinned_loading_gives_the_images_of_the_cpu(folder, workers):
    data = rae_encoder.ImageData("data/demo", 32, "flip")
    order = rae_encoder.even_order(len(data), 22, 8)
    expected, loaded = (list(rae_encoder.load_images(data, order, device, workers)) for device in (CPU, GPU))
    for (x, y), (x_gpu, y_gpu) in zip(expected, loaded, strict=True):
        assert x_gpu.is_cuda and torch.equal(x_gpu.cpu(), x)
        assert y_gpu.is_cuda and torch.equal(y_gpu.cpu(), y)


def test_statistics_are_those_of_the_cpu(folder):
    """To 1e-4, where TF32 is off by 1e-3, even if the process allows it."""
    torch.set_float32_matmul_precision("high")
    try:
        data = rae_encoder.ImageData("data/demo", 64)
        order = rae_encoder.even_order(len(data), 22, 8)
        encoder = rae_encoder.Encoder("test_vit", 64, 64, "random")
        results = []
        for _, network in both(encoder):
            views = rae_encoder.encode_views(network, data, order)
            mean, var = rae_encoder.latent_statistics(z for z, _ in views)
            results.append((mean.cpu(), var.cpu()))
    finally:
        torch.set_float32_matmul_precision("highest")
    for expected, value in zip(*results, strict=True):
        assert close(value, expected, 1e-4)


# Sampling and FID


@pytest.mark.parametrize("guidance", ["none", "cfg", "autoguidance"])
@pytest.mark.parametrize("heun", [False, True])
def test_samples_are_those_of_the_cpu(guidance, heun):
    model = small_dit().eval()
    weak = small_dit().eval()
    y = torch.arange(4)
    noise = sample.draw_noise(range(4), LATENT, 0)
    images = []
    for (device, network), (_, other), (_, decoder) in zip(
        both(model), both(weak), both(small_decoder()), strict=True
    ):
        labels = y.to(device)
        guide = other if guidance == "autoguidance" else None
        scale = 1.0 if guidance == "none" else 2.0

        def velocity(x, t, network=network, labels=labels, guide=guide, scale=scale):
            return sample.guided_velocity(network, x, t, labels, guide, scale=scale)

        with torch.no_grad(), exact_fp32():
            z = sample.sample_latents(velocity, noise.to(device), sample.time_grid(4, 2.0), heun=heun)
            images.append(decoder(z))
    assert images[1].is_cuda and close(images[1], images[0])


def test_inception_is_that_of_the_cpu():
    images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    features = []
    for device, network in both(fid.Inception().fold()):
        with torch.inference_mode(), exact_fp32():
            features.append(network(images.to(device)))
    assert features[1].is_cuda and close(features[1], features[0])


# The commands


def run(script, *flags, ranks=1):
    """What rank 0 printed."""
    flags = [*map(str, flags), "--device", "cuda"]
    return "\n".join(run_ranks(script.main, flags, world=ranks))


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=two_gpus)])
def test_the_demo(folder, ranks):
    """Two ranks by NCCL, without a warning: without its device a rank guesses which GPU is its own."""
    short = ("--batch-size", 8, "--workers", 0)
    printed = [
        run(rae_decoder_train, *short, "--steps", 3, ranks=ranks),
        run(flow_train, *short, "--steps", 3, ranks=ranks),
        run(flow_train, *short, "--steps", 5, ranks=ranks),
        run(sample, "--steps", 2, "-n", 6, ranks=ranks),
    ]
    assert all(f"{ranks} x cuda" in text for text in printed)
    assert not any("barrier" in text or "broadcast_buffers" in text for text in printed)
    assert read("runs/flow/last.pt")["step"] == 5
    assert len(list(Path("samples").glob("*.png"))) == 6


@two_gpus
def test_statistics_of_two_ranks_are_those_of_one(folder):
    run(rae_encoder, "--workers", 0, "--out", "one.pt")
    run(rae_encoder, "--workers", 0, "--out", "two.pt", ranks=2)
    for key in ("mean", "var"):
        assert close(read("two.pt")[key], read("one.pt")[key], 1e-5)
