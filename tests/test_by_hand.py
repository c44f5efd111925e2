"""Commands by hand: training steps from images to last.pt and the log, samples from checkpoints to PNGs.

The formulas of the scripts are tested one by one elsewhere. These tests see the lines that join them: order,
crops, seeds, statistics, noise, times, losses, AdamW, learning rate, EMA, guidance, each written once more.
"""

import copy
import json
import math
import re

import lpips
import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image, ImageOps
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import relu

import dit_dh
import flow_train
import rae_decoder_train
import rae_encoder
import sample
from rae_encoder import Encoder

SEED = 8
BATCH = 8
CLASSES = {"2": 5, "10": 8, "b": 9}  # 22 images: two steps an epoch, and six images are left over
COMMON = f"""--preset imagenet256 --data images --seed {SEED} --batch-size {BATCH} --precision fp32
    --device cpu --encoder test_vit --encoder-weights random --lr 1e-3 --final-lr 4e-4 --ema 0.9 --workers 0
    --log-every 1 --save-every 1 --keep-every 1 --preview-every 0 --out run"""


@pytest.fixture(autouse=True, scope="module")
def plain_kernels():
    """One thread, which small networks are fastest on, and the attention that the trainings use on a CPU."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with sdpa_kernel(SDPBackend.MATH):
        yield
    torch.set_num_threads(threads)


def draw_images(folder, levels=(0, 256)):
    """Draws 22 images in three classes; returns (path, class) of each, in the order of the data."""
    rng = np.random.default_rng(1)
    paths = []
    for label, (name, number) in enumerate(CLASSES.items()):
        (folder / "images" / name).mkdir(parents=True)
        # Numbers by value: 8, 9, 10, 11 in the order of the text would begin with 10.
        for i in range(8, 8 + number):
            width, height = rng.integers(50, 120, size=2)
            pixels = rng.integers(*levels, size=(6, 6, 3), dtype=np.uint8)
            path = folder / "images" / name / f"{i}.png"
            Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).save(path)
            paths.append((path, label))
    return paths


def batch_of(step):
    """(epoch, images of a step): the next eight of the epoch's permutation, whose last six are left out."""
    epoch = step // 2
    first = step % 2 * BATCH
    return epoch, np.random.default_rng((SEED, epoch)).permutation(22)[first : first + BATCH].tolist()


def seed_of(step):
    return int(np.random.SeedSequence([SEED, step, 0]).generate_state(1)[0])  # 0 is the rank


def to_tensor(images):
    """Pillow images -> (B,3,S,S) in [0,1]."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2) / 255


class AdamW:
    """Loshchilov & Hutter 2019 in float64: betas (0.9, 0.95), eps 1e-8, no decay of the weights."""

    def __init__(self):
        self.step = 0
        self.first = {}
        self.second = {}

    def update(self, weights, gradients, lr):
        """{name: (the weight after the step, how far from it rounding can move it)}, both in float64."""
        self.step += 1
        updated = {}
        for name, g in gradients.items():
            g = g.double()
            self.first[name] = 0.9 * self.first.get(name, 0) + 0.1 * g
            self.second[name] = 0.95 * self.second.get(name, 0) + 0.05 * g**2
            m = self.first[name] / (1 - 0.9**self.step)
            v = self.second[name] / (1 - 0.95**self.step)

            # A gradient in fp32 is a sum: its error is a share of the largest. Where v is small AdamW divides
            # that error by a small root. The weight itself is rounded, too, by up to 6e-8 of its size.
            weight = weights[name].double() - lr * m / (v.sqrt() + 1e-8)
            rounding = 1e-5 * v.sqrt().max() / (v.sqrt() + 1e-8)
            updated[name] = weight, lr * rounding + 1e-7 * weight.abs() + 1e-9
        return updated


def gradients_of(loss, network):
    """{name: gradient} of the weights that are trained."""
    weights = {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
    return dict(zip(weights, torch.autograd.grad(loss, weights.values()), strict=True))


def norm_of(gradients):
    return math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))


def assert_updated(state, start, updated, unseen="nothing"):
    """Compares a state dict after a step with `updated` of AdamW; the rest of it is as it was at `start`.

    unseen: a pattern of weights whose gradient is rounding alone, since the network does not see them.
    """
    assert state.keys() == start.keys()
    for name, value in state.items():
        if name not in updated:
            assert torch.equal(value, start[name]), name
        elif not re.search(unseen, name):
            weight, tolerance = updated[name]
            excess = ((value.double() - weight).abs() / tolerance).max()
            assert excess < 1, (name, float(excess))


def assert_averaged(ema, before, state, decay):
    """Compares an EMA after a step with its average before and the weights; fp32 rounds at 6e-8."""
    assert ema.keys() == before.keys() == state.keys()
    for name, value in ema.items():
        average = decay * before[name].double() + (1 - decay) * state[name].double()
        assert torch.allclose(value.double(), average, rtol=3e-7, atol=1e-8), name


def read_run(steps):
    """The checkpoints after each step, from 1 on, and the lines of the log."""
    names = [f"run/{step:07d}.pt" for step in range(1, steps + 1)] + ["run/last.pt"]
    checkpoints = [torch.load(name, map_location="cpu", weights_only=True) for name in names]
    last = checkpoints.pop()
    assert last["step"] == steps and all(
        torch.equal(value, checkpoints[-1]["model"][name]) for name, value in last["model"].items()
    )
    with open("run/metrics.jsonl") as file:
        log = [json.loads(line) for line in file]
    return checkpoints, log


# Stage 2

NETWORK = {"width": 32, "depth": 2, "heads": 2, "head_width": 64, "head_depth": 1, "head_heads": 2}
MODEL = "--model DiT-DH-S --width 32 --depth 2 --heads 2 --head-width 64 --head-depth 1 --head-heads 2"
FLOW = f"{MODEL} --image-size 48 --encoder-size 192 --steps 3 --hold-epochs 0.25 --decay-epochs 1.25"


@pytest.fixture
def flat_paths(tmp_path, monkeypatch):
    """Images of little contrast, whose latents have a variance of 0.01: the 1e-5 beside it counts."""
    monkeypatch.chdir(tmp_path)
    return draw_images(tmp_path, levels=(126, 130))


@pytest.fixture
def moved_network(monkeypatch):
    """dit_dh.build with all weights moved: at its own start most gradients are 0, and labels don't count."""
    build = dit_dh.build

    def build_and_move(*args, **options):
        network = build(*args, **options)
        generator = torch.Generator().manual_seed(1)
        for weight in network.parameters():
            if weight.requires_grad:
                weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
        return network

    monkeypatch.setattr(dit_dh, "build", build_and_move)


def center_crop(path, size):
    """ADM's crop: halves while that leaves `size` pixels, then the short side to `size`, then the centre."""
    image = Image.open(path)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    width, height = (round(side * size / min(image.size)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("variant", ["images", "cache"])
def test_three_steps_of_stage_2(flat_paths, moved_network, variant, flip):
    """Images: the formula's shift, logit-normal times. Cache: shift 3, uniform times, x, with a base."""
    # AdamW does not see the scale of gradients, unless they are as small as its eps.
    clip = 0.001 if variant == "images" else 1.0
    if variant == "images":
        flags = f"{COMMON} {FLOW} --clip {clip}"
    else:
        flags = f"{COMMON} {FLOW} --cache-latents --shift 3 --time-dist uniform --prediction x --base-depth 1"
        flags = flags.replace("--ema 0.9", "") + " --log-every 3"
    if not flip:
        flags += " --no-flip"
    flow_train.main(flags.split())
    checkpoints, log = read_run(steps=3)

    # Latents (22,2,64,12,12) of all images and of their mirrors
    encoder = Encoder("test_vit", encoder_size=192, weights="random")
    images = [center_crop(path, 48) for path, _ in flat_paths]
    mirrors = [ImageOps.mirror(image) for image in images]
    latents = torch.stack([encoder(to_tensor(images)), encoder(to_tensor(mirrors))], dim=1)
    views = latents.double().numpy() if flip else latents[:, :1].double().numpy()
    views = views.reshape(-1, 64, 12, 12)
    mean = views.mean(axis=0)
    var = views.var(axis=0)
    assert np.allclose(checkpoints[-1]["mean"], mean, rtol=1e-6, atol=1e-6)
    assert np.allclose(checkpoints[-1]["var"], var, rtol=1e-5, atol=1e-8)

    # 64 channels and 144 positions: sqrt(9216 / 4096) = 1.5
    shift = 1.5 if variant == "images" else 3.0
    base_depth = None if variant == "images" else 1
    config = checkpoints[-1]["config"]
    assert config["latent_shape"] == [64, 12, 12] and config["classes"] == list(CLASSES)
    assert config["shift"] == shift and config["image_size"] == 48 and config["encoder_size"] == 192
    assert config["prediction"] == ("v" if variant == "images" else "x")
    assert config["base_depth"] == base_depth and config["sizes"] == NETWORK

    # A network that predicts v gives its plain output, and in eval mode drops no labels: the test does both.
    torch.manual_seed(SEED)
    network = dit_dh.build("DiT-DH-S", (64, 12, 12), 3, base_depth=base_depth, **NETWORK).eval()
    start = copy.deepcopy(network.state_dict())
    states = [start] + [checkpoint["model"] for checkpoint in checkpoints]
    emas = [start] + [checkpoint["ema"] for checkpoint in checkpoints]
    optimizer = AdamW()
    terms = []

    for step in range(3):
        # Each step starts where the command's own step did, so that rounding does not add up.
        network.load_state_dict(states[step])

        # Data: each image or its mirror, by the draw of (seed, epoch, image)
        epoch, batch = batch_of(step)
        mirrored = [int(flip and np.random.default_rng((SEED, epoch, i)).random() < 0.5) for i in batch]
        z = latents[batch, mirrored].double().numpy()
        x = torch.from_numpy((z - mean) / np.sqrt(var + 1e-5)).float()  # (8,64,12,12)
        y = torch.tensor([flat_paths[i][1] for i in batch])

        # The draws of a step: times, noise, dropped labels
        torch.manual_seed(seed_of(step))
        t = torch.randn(BATCH).sigmoid() if variant == "images" else torch.rand(BATCH)
        t = shift * t / (1 + (shift - 1) * t)
        eps = torch.randn(x.shape)
        dropped = torch.rand(BATCH) < 0.1
        y = torch.where(dropped, 3, y)
        if step == 0:
            assert dropped.any()  # the seed is chosen so

        # Loss: the squared error of the velocity, or of what a network that predicts x implies
        t_x = t[:, None, None, None]
        x_t = (1 - t_x) * x + t_x * eps
        if variant == "images":
            loss = (network(x_t, t, y) - (eps - x)).square().mean()
        else:
            target = (x_t - x) / t_x.clamp(min=0.05)
            outputs = network(x_t, t, y, with_base=True)
            full, base = ((x_t - output) / t_x.clamp(min=0.05) for output in outputs)
            loss = (full - target).square().mean() + (base - target).square().mean()

        # Clipped gradients; the learning rate is held for half a step and reaches its end at 2.5 steps.
        gradients = gradients_of(loss, network)
        norm = norm_of(gradients)
        assert norm > 1.2 * clip
        gradients = {name: gradient * clip / norm for name, gradient in gradients.items()}
        lr = (1e-3, 1e-3 - 6e-4 * 0.5 / 2, 1e-3 - 6e-4 * 1.5 / 2)[step]
        terms.append({"step": step + 1, "loss": loss.item(), "gradient_norm": norm, "lr": lr})
        updated = optimizer.update(states[step], gradients, lr)
        assert_updated(states[step + 1], start, updated)
        # An EMA that no flag gives is at most 1 - 10 / steps, which is below 0.
        decay = 0.9 if variant == "images" else 0.0
        assert_averaged(emas[step + 1], emas[step], states[step + 1], decay)

    # A line of the log has the means of the steps since the line before it, and the last learning rate.
    if variant == "cache":
        means = {name: np.mean([term[name] for term in terms]) for name in ("loss", "gradient_norm")}
        terms = [terms[-1] | means]
    assert [record["step"] for record in log] == [term["step"] for term in terms]
    for record, term in zip(log, terms, strict=True):
        assert {name: record[name] for name in term} == pytest.approx(term, rel=2e-6)


# Stage 1

SMALL_VIT = (32, 2, 2, 48)
DECODER = """--image-size 16 --encoder-size 64 --patch-size 4 --decoder ViT-mini --steps 4 --warmup-epochs 1
    --noise-tau 0.6 --lpips-weight 0.5 --lpips-weights vgg.pt"""
GAN = """--gan-weight 0.75 --disc-weights random --disc-start 0.5 --gan-start 1 --noise-law half-normal"""


@pytest.fixture
def paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return draw_images(tmp_path)


@pytest.fixture
def small_networks(paths, monkeypatch):
    """A small decoder, VGG-16 without its classifier (seconds to draw) in a file, a DINO of 49 tokens."""
    monkeypatch.setitem(rae_decoder_train.DECODERS, "ViT-mini", SMALL_VIT)

    torch.manual_seed(2)
    layers = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])
    network = torch.nn.ModuleDict({"features": layers})
    monkeypatch.setattr(torchvision.models, "vgg16", lambda **_: copy.deepcopy(network))
    # The file has other weights than an untrained network: all of them larger.
    weights = {name: 1.2 * value for name, value in network.state_dict().items()}
    torch.save(weights, "vgg.pt")

    create = timm.create_model

    def create_small(name, **options):
        if "dino" in name:
            options |= {"patch_size": 32, "embed_dim": 48, "num_heads": 3}
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", create_small)


def random_crop(path, size, rng):
    """The short side to 1.5 sizes, then a window: its left side is drawn first, then its top."""
    image = Image.open(path)
    short = int(1.5 * size)
    width, height = image.size
    if width < height:
        width, height = short, int(short * height / width)
    else:
        width, height = int(short * width / height), short
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left = rng.integers(width - size + 1)
    top = rng.integers(height - size + 1)
    return image.crop((left, top, left + size, top + size))


def test_four_steps_of_stage_1(paths, small_networks):
    """Without GAN, but with previews: eight images, cropped in the centre, over those of the EMA."""
    rae_decoder_train.main(f"{COMMON} {DECODER} --gan-weight 0 --preview-every 3".split())
    check_stage_1(paths, disc=None)

    encoder, decoder, _ = networks_of_stage_1()
    decoder.load_state_dict(torch.load("run/0000003.pt", weights_only=True)["ema"])
    top = to_tensor([center_crop(paths[i * 22 // 8][0], 16) for i in range(8)])  # drawn evenly
    with torch.no_grad():
        rows = np.stack([to_bytes(top), to_bytes(decoder(encoder(top)))])  # (2,8,16,16,3)
    sheet = rows.transpose(0, 2, 1, 3, 4).reshape(32, 128, 3).astype(int)
    preview = np.asarray(Image.open("run/preview-0000003.png"))
    assert preview.shape == sheet.shape and abs(preview - sheet).max() <= 1


def test_four_steps_of_stage_1_with_the_gan(paths, small_networks, monkeypatch):
    """The discriminator learns from step 1 on, the decoder from it from step 2 on."""
    original = rae_decoder_train.Discriminator
    starts = []

    def keep_start(*args, **options):
        disc = original(*args, **options)
        starts.append(copy.deepcopy(disc))
        return disc

    monkeypatch.setattr(rae_decoder_train, "Discriminator", keep_start)
    rae_decoder_train.main(f"{COMMON.replace('--ema 0.9', '')} {DECODER} {GAN}".split())
    check_stage_1(paths, starts[0])


def networks_of_stage_1():
    """Encoder, decoder at its start, and LPIPS with the weights of the file."""
    encoder = Encoder("test_vit", encoder_size=64, weights="random")
    mean, std = (moment.flatten().tolist() for moment in (encoder.mean, encoder.std))
    torch.manual_seed(SEED)
    decoder = rae_decoder_train.Decoder("ViT-mini", channels=64, grid=4, patch_size=4, mean=mean, std=std)
    # In this layout convolutions round as the command's do: gradients of the two layouts differ by 1e-4.
    perceptual = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).to(memory_format=torch.channels_last)
    layers = torch.load("vgg.pt", weights_only=True)
    names = {name: "features." + name.split(".", 1)[1] for name in perceptual.net.state_dict()}
    perceptual.net.load_state_dict({name: layers[other] for name, other in names.items()})
    return encoder, decoder, perceptual


def check_stage_1(paths, disc):
    checkpoints, log = read_run(steps=4)
    assert [record["step"] for record in log] == [1, 2, 3, 4]
    encoder, decoder, perceptual = networks_of_stage_1()
    config = checkpoints[-1]["config"]
    assert config["latent_shape"] == [64, 4, 4]
    assert config["image_size"] == 16 and config["encoder_size"] == 64
    assert config["noise_tau"] == 0.6 and config["noise_law"] == ("half-normal" if disc else "uniform")

    start = copy.deepcopy(decoder.state_dict())
    states = [start] + [checkpoint["model"] for checkpoint in checkpoints]
    emas = [start] + [checkpoint["ema"] for checkpoint in checkpoints]
    optimizer = AdamW()
    if disc:
        disc_states = [copy.deepcopy(disc.heads.state_dict())]
        disc_states += [checkpoint["disc"] for checkpoint in checkpoints]
        disc_optimizer = AdamW()

    for step in range(4):
        # Each step starts where the command's own step did, so that rounding does not add up.
        decoder.load_state_dict(states[step])
        if disc:
            disc.heads.load_state_dict(disc_states[step])

        # Data: a crop by the draws of (seed, epoch, image)
        epoch, batch = batch_of(step)
        crops = [random_crop(paths[i][0], 16, np.random.default_rng((SEED, epoch, i))) for i in batch]
        x = to_tensor(crops)
        z = encoder(x)  # (8,64,4,4)

        # The draws of a step: strength of the noise, noise, augmentation; then those of the discriminator
        torch.manual_seed(seed_of(step))
        draw = torch.randn if disc else torch.rand
        sigma = 0.6 * draw(BATCH, 1, 1, 1).abs()
        noisy = z + sigma * torch.randn_like(z)  # in the order of z's memory: token by token
        u = torch.rand(BATCH, 5)

        xhat = decoder(noisy)
        l1 = (xhat - x).abs().mean()
        distance = perceptual(2 * xhat - 1, 2 * x - 1).mean()
        loss = l1 + 0.5 * distance
        expected = {"l1": l1, "lpips": distance}
        if disc and step >= 2:
            disc.eval()
            gan = -disc(rae_decoder_train.diff_augment(2 * xhat - 1, u)).mean()
            last = [decoder.decoder_pred.weight]
            slopes = [torch.autograd.grad(part, last, retain_graph=True)[0].norm() for part in (loss, gan)]
            weight = slopes[0] / (slopes[1] + 1e-6)
            loss = loss + 0.75 * weight * gan
            expected |= {"gan": gan, "lambda": weight}
        expected["loss"] = loss

        # No clipping. Warm-up over the two steps of an epoch, then a cosine over the other two
        gradients = gradients_of(loss, decoder)
        norm = norm_of(gradients)
        lr = (5e-4, 1e-3, 1e-3, 7e-4)[step]
        updated = optimizer.update(states[step], gradients, lr)
        # The softmax does not see the keys' bias.
        assert_updated(states[step + 1], start, updated, unseen="key.bias")
        # An EMA that no flag gives is at most 1 - 10 / steps, which is below 0.
        decay = 0.0 if disc else 0.9
        assert_averaged(emas[step + 1], emas[step], states[step + 1], decay)

        # Fakes of the decoder as it now is, from latents without noise, in 256 levels
        if disc and step >= 1:
            v = torch.rand(BATCH, 2, 5)
            disc.train()
            decoder.load_state_dict(states[step + 1])
            with torch.no_grad():
                fake = (decoder(z).clamp(0, 1) * 255).round() / 255
            both = 2 * torch.cat([x, fake]) - 1
            logits = disc(rae_decoder_train.diff_augment(both, torch.cat([v[:, 0], v[:, 1]])))
            hinge = 0.5 * (relu(1 - logits[:BATCH]).mean() + relu(1 + logits[BATCH:]).mean())
            # It has its own count of steps, so it warms up in steps 1 and 2.
            updated = disc_optimizer.update(
                disc_states[step], gradients_of(hinge, disc.heads), (None, 5e-4, 1e-3, 1e-3)[step]
            )
            # Spectral norm has iterated once; the norm behind a convolution takes away what its bias adds.
            assert_updated(disc_states[step + 1], disc.heads.state_dict(), updated, unseen=r"[01]\.0\.bias")
            expected["disc"] = hinge

        record = log[step]
        others = {"step", "time", "skipped", "lr", "gradient_norm"}
        assert record.keys() - others == expected.keys()
        for name, value in expected.items():
            assert record[name] == pytest.approx(value.item(), rel=5e-6), name
        assert record["gradient_norm"] == pytest.approx(norm, rel=5e-6)
        assert record["lr"] == pytest.approx(lr, rel=1e-9)


# Samples and reconstructions


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder of images and checkpoints of both trainings, whose networks are random; (path, class)s."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setitem(rae_decoder_train.DECODERS, "ViT-mini", SMALL_VIT)
        paths = draw_images(folder)
        short = COMMON + " --image-size 16 --encoder-size 64 --steps 1"
        rae_decoder_train.main(
            f"{short} --decoder ViT-mini --patch-size 4 --gan-weight 0 --lpips-weight 0".split()
        )
        decoder = torch.load("run/last.pt", weights_only=True)
        flow_train.main(f"{short} {MODEL} --base-depth 1 --shift 2 --out flow".split())
        flow = torch.load("flow/last.pt", weights_only=True)

        # The EMA is what counts, so that the weights beside it are of no use.
        for name in decoder["model"]:
            decoder["model"][name] = torch.zeros_like(decoder["model"][name])
        torch.save(decoder, "decoder.pt")
        torch.save(decoder["ema"], "bare.pt")

        # Two flows of random weights, in which labels count for much; one is the weak network
        for seed, path in ((1, "flow.pt"), (2, "weak.pt")):
            torch.manual_seed(seed)
            for name, value in flow["ema"].items():
                if not re.search("rope|pos_embed|[.]W$", name):
                    size = 2.0 if "y_embedder" in name else 0.1
                    flow["ema"][name] = value + size * torch.randn_like(value)
                flow["model"][name] = torch.zeros_like(value)
            torch.save(flow, path)
        mean = torch.randn(64, 4, 4)
        torch.save({"mean": mean, "var": mean.square() + 0.5}, "stats.pt")
        yield paths


def noise_of(seed, i, shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed * 1_000_000 + i))


@torch.no_grad()
def samples_by_hand(
    number=4,
    seed=0,
    steps=50,
    solver="euler",
    shift=2.0,
    t_end=0.0,
    scale=1.0,
    interval=(0.0, 1.0),
    internal=None,
    weak=None,
    classes=(0, 1, 2),
    stats="flow.pt",
    pixels=(0.5, 0.5),
    bf16=False,
):
    """Images (number,16,16,3), uint8, of flow.pt and decoder.pt."""
    networks = {}
    for path in ("flow.pt", "weak.pt"):
        networks[path] = dit_dh.build("DiT-DH-S", (64, 4, 4), 3, base_depth=1, **NETWORK).eval()
        networks[path].load_state_dict(torch.load(path, weights_only=True)["ema"])
    decoder = rae_decoder_train.Decoder("ViT-mini", 64, 4, 4, [pixels[0]] * 3, [pixels[1]] * 3)
    decoder.load_state_dict(torch.load("bare.pt", weights_only=True))
    moments = torch.load(stats, weights_only=True)

    def velocity_of(path, x, t, y, strength):
        v, base = networks[path](x, torch.full([number], t), y, with_base=True)
        return base.float() + strength * (v.float() - base.float())

    def velocity(x, t):
        inside = interval[0] <= t <= interval[1]
        strength = internal if internal and inside else 1.0
        v = velocity_of("flow.pt", x, t, labels, strength)
        if scale == 1 or not inside:
            return v
        null = torch.full([number], 3)
        base = velocity_of(weak, x, t, labels, 1.0) if weak else velocity_of("flow.pt", x, t, null, strength)
        return base + scale * (v - base)

    labels = torch.tensor([classes[i % len(classes)] for i in range(number)])
    times = np.linspace(1, t_end, steps + 1)
    times = (shift * times / (1 + (shift - 1) * times)).tolist()
    x = torch.stack([noise_of(seed, i, (64, 4, 4)) for i in range(number)])
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        for k, (t, t_next) in enumerate(zip(times[:-1], times[1:], strict=True)):
            v = velocity(x, t)
            # The last interval is Euler's, since no network is trained at t = 0.
            if solver == "heun" and k < steps - 1:
                v = (v + velocity(x + (t_next - t) * v, t_next)) / 2
            x = x + (t_next - t) * v
        return to_bytes(decoder(x * (moments["var"] + 1e-5).sqrt() + moments["mean"]))


def to_bytes(images):
    return (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()


def assert_images(folder, expected):
    """Compares PNGs with arrays: rounding in fp32 can move a value over the half of a level, but rarely."""
    files = sorted(folder.glob("*.png"))
    assert [file.name for file in files] == [f"{i:06d}.png" for i in range(len(expected))]
    images = np.stack([np.asarray(Image.open(file)) for file in files]).astype(int)
    assert images.std() > 20  # neither grey nor clipped to one colour
    assert abs(images - expected).max() <= 1 and (images != expected).mean() < 0.01


PART = "--guidance-interval 0.4 0.8"
BARE = "--decoder bare.pt --encoder test_vit"


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ("", {}),
        ("-n 5 --seed 3 --steps 3 --batch-size 2", {"number": 5, "seed": 3, "steps": 3}),
        ("--shift 3 --t-end 0.1", {"shift": 3.0, "t_end": 0.1}),
        ("--solver heun --classes b,0", {"solver": "heun", "classes": (2, 0)}),
        (f"--cfg 1.7 {PART}", {"scale": 1.7, "interval": (0.4, 0.8)}),
        (f"--cfg 1.5 --autoguide weak.pt {PART}", {"scale": 1.5, "weak": "weak.pt", "interval": (0.4, 0.8)}),
        (f"--internal-guidance 1.78 {PART}", {"internal": 1.78, "interval": (0.4, 0.8)}),
        ("--internal-guidance 1.3 --cfg 1.6", {"internal": 1.3, "scale": 1.6}),
        ("--stats stats.pt", {"stats": "stats.pt"}),
        (BARE, {}),
        (f"{BARE} --raw-pixels", {"pixels": (0.0, 1.0)}),
        ("--precision bf16", {"bf16": True}),
    ],
)
def test_samples_by_hand(trained, tmp_path, monkeypatch, flags, options):
    """Each flag of sample.py reaches the pixels, in five steps where it says no other number."""
    if flags and "steps" not in options:
        flags += " --steps 5"
        options = options | {"steps": 5}
    expected = samples_by_hand(**options)
    # Without any one of the flags the images would be others.
    for other in options.keys() - {"number"}:
        rest = {name: value for name, value in options.items() if name != other}
        assert (samples_by_hand(**rest) != expected).mean() > 0.05, other
    precision = "" if "bf16" in options else "--precision fp32"
    files = "--flow flow.pt --decoder decoder.pt -n 4"
    sample.main(f"{files} --out {tmp_path}/out --device cpu --workers 0 {precision} {flags}".split())
    assert_images(tmp_path / "out", expected)


def test_fifty_steps_by_default(trained, tmp_path, monkeypatch):
    """Images of 49 steps are nearly the same, so calls of the network are counted."""
    forward = dit_dh.DiTDH.forward
    calls = []
    monkeypatch.setattr(dit_dh.DiTDH, "forward", lambda *inputs: calls.append(1) or forward(*inputs))
    sample.main(f"--flow flow.pt --decoder decoder.pt --out {tmp_path}/out --device cpu -n 2".split())
    assert len(calls) == 50


@pytest.mark.parametrize(
    ("flags", "layers", "number", "sigma", "seed"),
    [
        ("--decoder decoder.pt", None, 22, 0.0, 0),
        ("--decoder decoder.pt -n 5 --latent-noise 0.5 --seed 3", None, 5, 0.5, 3),
        (f"{BARE} --encoder-weights random --layers 1,3 -n 5", [1, 3], 5, 0.0, 0),
    ],
)
def test_reconstructions_by_hand(trained, tmp_path, capsys, flags, layers, number, sigma, seed):
    """Some of the images, drawn evenly, through encoder and decoder; the PSNR is of just these."""
    flags = f"--reconstruct images --out {tmp_path}/out --device cpu --workers 0 --batch-size 3 {flags}"
    sample.main(flags.split())
    encoder = Encoder("test_vit", encoder_size=64, weights="random", layers=layers)
    decoder = rae_decoder_train.Decoder("ViT-mini", 64, 4, 4, [0.5] * 3, [0.5] * 3)
    decoder.load_state_dict(torch.load("bare.pt", weights_only=True))
    originals = to_tensor([center_crop(trained[i * 22 // number][0], 16) for i in range(number)])
    with torch.no_grad():
        z = encoder(originals)
        z = z + sigma * torch.stack([noise_of(seed, i, (64, 4, 4)) for i in range(number)])
        expected = to_bytes(decoder(z))
    assert_images(tmp_path / "out", expected)
    errors = np.square(expected.astype(float) - to_bytes(originals)).mean(axis=(1, 2, 3))
    psnr = np.mean(10 * np.log10(255**2 / errors))
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["psnr"] == pytest.approx(psnr, abs=1e-3) and record["images"] == number


# The recipes, as the papers and the released configurations have them

BOTH = "encoder dinov2-base encoder_size None patch_size 16 layers last steps None lr 0.0002 final_lr 2e-05"
STAGE_2 = """model DiT-DH-XL prediction v base_depth None time_dist logit-normal shift None flip True clip 1.0
    stats_images 50000 batch_size 1024 epochs 1400 hold_epochs 40 decay_epochs 800 ema 0.9995"""
STAGE_1 = """decoder ViT-XL raw_pixels False noise_tau 0.8 noise_law uniform lpips_weight 1.0 gan_weight 0.75
    lpips_weights hub disc_weights None disc_start 6 gan_start 8 batch_size 512 epochs 16 warmup_epochs 1
    ema 0.9978"""
# Singh et al. 2026: seven layers of DINOv3-L, x-prediction with a base after block 8, 80 epochs
RAEV2 = {"encoder": "dinov3-large", "layers": "[11, 13, 15, 17, 19, 21, 23]"}
RAEV2_STAGE_2 = {
    "prediction": "x",
    "base_depth": "8",
    "epochs": "80",
    "hold_epochs": "25",
    "decay_epochs": "50",
}


@pytest.mark.parametrize(
    ("script", "preset", "size", "changes", "epochs"),
    [
        # 1,281,167 images are 1,251 batches of 1,024, and 2,502 of 512.
        (flow_train, "imagenet256", 256, {}, (1400, 40, 800)),
        (flow_train, "imagenet512", 512, {}, (1400, 40, 800)),
        (flow_train, "raev2", 256, RAEV2 | RAEV2_STAGE_2, (80, 25, 50)),
        (rae_decoder_train, "imagenet256", 256, {}, (16, 1, 6, 8)),
        (rae_decoder_train, "imagenet512", 512, {}, (16, 1, 6, 8)),
        (rae_decoder_train, "raev2", 256, RAEV2 | {"raw_pixels": "True"}, (16, 1, 6, 8)),
    ],
)
def test_the_recipes_of_training(script, preset, size, changes, epochs):
    args = script.parse_args(["--preset", preset, "--data", "x"])
    words = f"{BOTH} {STAGE_2 if script is flow_train else STAGE_1}".split()
    recipe = dict(zip(words[::2], words[1::2], strict=True)) | changes
    assert {name: str(getattr(args, name)) for name in recipe} == recipe and args.image_size == size
    schedule = script.schedule(args, 1_281_167, world=8)
    batches = 1251 if script is flow_train else 2502
    assert schedule == tuple(batches * number for number in epochs)
    assert rae_encoder.ema_decay(args, schedule[0]) == args.ema


def heads_of(network, *inputs):
    """The number of heads in each attention of a network on the meta device."""
    calls = []

    def attention(q, k, v):
        calls.append(q.shape[1])
        return v

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
        network(*inputs)
    return calls


@pytest.mark.parametrize(
    ("size", "width", "depth", "heads", "mlp"),
    [
        ("S", 384, 12, 6, 1536),
        ("B", 768, 12, 12, 3072),
        ("L", 1024, 24, 16, 4096),
        ("XL", 1152, 28, 16, 4096),
    ],
)
def test_sizes_of_the_networks(size, width, depth, heads, mlp):
    """A change of heads changes no shape: a released file would load and compute wrongly."""
    with torch.device("meta"):
        z = torch.empty(2, 768, 16, 16)
        decoder = rae_decoder_train.Decoder(f"ViT-{size}", 768, 16, 16, mean=[0.5] * 3, std=[0.5] * 3)
        assert heads_of(decoder, z) == [heads] * depth
        assert decoder.decoder_layers[0].intermediate["dense"].weight.shape == (mlp, width)
        assert decoder.decoder_pred.weight.shape == (16 * 16 * 3, width)
        for family, head in (("DiT", 0), ("DiT-DH", 2)):
            network = dit_dh.build(f"{family}-{size}", (768, 16, 16), 1000).eval()
            assert [len(block.norm1.weight) for block in network.blocks] == [width] * depth + [2048] * head
            calls = heads_of(network, z, torch.empty(2), torch.zeros(2, dtype=torch.int64))
            assert calls == [heads] * depth + [16] * head


def test_the_recipes_of_sampling():
    """50,000 images for FID; files and the scales of AutoGuidance are in test_hub.py."""
    for preset in ("imagenet256", "imagenet512", "raev2"):
        args = sample.parse_args(["--preset", preset])
        assert args.num == 50_000 and args.cfg is None and args.steps is None
        raev2 = preset == "raev2"
        assert args.raw_pixels == raev2 and str(args.layers) == (RAEV2["layers"] if raev2 else "None")
