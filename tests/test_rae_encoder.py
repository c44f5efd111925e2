"""Encoder and latent statistics against timm, formulas and numpy; the command from images to its file."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import message, picture, read
from torch import nn

import rae_encoder
from rae_encoder import Encoder, ImageData

CPU = torch.device("cpu")


def images_of(folder, indices, size=32):
    """Images (B,3,S,S) in [0,1] of the folder, centre-cropped."""
    data = ImageData(folder, size)
    return torch.stack([data[0, i][0] for i in indices]) / 255


@pytest.fixture
def shallow(monkeypatch):
    """timm's networks with three narrow blocks: their sizes and positions are their own."""
    create = timm.create_model
    small = {"depth": 3, "embed_dim": 32, "num_heads": 2}
    monkeypatch.setattr(timm, "create_model", lambda *args, **options: create(*args, **{**options, **small}))


# Encoder


def test_encoder_is_timms_vit_without_the_last_affine(tmp_path):
    torch.manual_seed(0)
    vit = timm.create_model("test_vit", num_classes=0).eval()
    nn.init.uniform_(vit.norm.weight, 0.5, 1.5)  # to be divided by
    nn.init.normal_(vit.norm.bias)
    torch.save(vit.state_dict(), tmp_path / "vit.pt")
    encoder = Encoder("test_vit", encoder_size=64, image_size=32, weights=str(tmp_path / "vit.pt"))
    images = torch.rand(2, 3, 32, 32)
    x = F.interpolate(images, size=64, mode="bicubic", align_corners=False)
    mean, std = (torch.tensor(vit.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    vit.set_input_size(64)
    tokens = vit.forward_features((x - mean) / std)[:, 1:]  # without the class token
    tokens = (tokens - vit.norm.bias) / vit.norm.weight
    z = encoder(images)
    assert z.shape == (2, 64, 4, 4) and (encoder.width, encoder.grid) == (64, 4)
    for row in range(4):
        for column in range(4):
            assert torch.allclose(z[:, :, row, column], tokens[:, 4 * row + column], atol=2e-5)
    assert not any(weight.requires_grad for weight in encoder.parameters()) and not z.requires_grad
    assert not encoder.training


@pytest.mark.parametrize(
    ("name", "eps"),
    [
        ("test_vit", 1e-6),
        ("vit_small_patch16_dinov3", 1e-5),
        ("vit_little_patch16_reg1_gap_256", 1e-6),  # without a final norm
    ],
)
def test_tokens_are_normalised_with_the_models_own_eps(shallow, name, eps):
    encoder = Encoder(name, image_size=32, weights="random")
    for weight in encoder.vit.parameters():
        weight *= 0.03  # so small that eps counts
    images = torch.rand(2, 3, 32, 32)
    z = encoder(images).double()
    encoder.vit.norm = nn.Identity()
    x = (images - encoder.mean) / encoder.std
    tokens = encoder.vit.forward_features(x)[:, encoder.vit.num_prefix_tokens :].double()
    var, mean = torch.var_mean(tokens, dim=2, correction=0, keepdim=True)
    expected = ((tokens - mean) / (var + eps).sqrt()).mT.unflatten(2, (2, 2))
    assert torch.allclose(z, expected, rtol=1e-4, atol=1e-6)
    assert (eps / var).min() > 1e-3  # another eps would be seen


@pytest.mark.parametrize(
    ("alias", "image_size", "patch_size", "encoder_size", "grid"),
    [
        ("dinov2-base", 256, 16, 224, 16),  # the paper's
        ("dinov2-large", 512, 32, 224, 16),
        ("dinov2-small", 96, 12, 112, 8),
        ("dinov3-small", 64, 8, 128, 8),
        ("siglip2-base", 128, 8, 256, 16),
        ("mae-base", 128, 32, 64, 4),
        ("test_vit3", 96, 16, 96, 6),  # a register, and no class token
    ],
)
def test_the_patch_size_decides_what_any_encoder_sees(
    shallow, alias, image_size, patch_size, encoder_size, grid
):
    """A token stands for patch_size pixels of the image, whatever the encoder's own patch is."""
    encoder = Encoder(alias, image_size=image_size, patch_size=patch_size, weights="random", layers="all")
    assert (encoder.encoder_size, encoder.grid) == (encoder_size, grid) and encoder.layers == [1, 2]
    z = encoder(torch.rand(1, 3, image_size, image_size))
    assert list(z.shape[1:]) == encoder.config()["latent_shape"] == [encoder.width, grid, grid]


@pytest.mark.parametrize(
    ("alias", "name", "grid", "prefix"),
    [
        ("mae-base", "vit_base_patch16_224.mae", 14, 1),
        ("siglip2-base", "vit_base_patch16_siglip_256.v2_webli", 16, 0),
        ("dinov2-small", "vit_small_patch14_reg4_dinov2.lvd142m", 37, 0),
    ],
)
@pytest.mark.parametrize("image_size", [128, 512])
def test_positions_are_resampled_as_the_authors_models_do_it(shallow, alias, name, grid, prefix, image_size):
    """Bicubically, for MAE and SigLIP 2 without antialias; it matters where the grid shrinks."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        native = timm.create_model(name, num_classes=0).pos_embed
    encoder = Encoder(alias, image_size=image_size, weights="random")
    size = image_size // 16
    assert encoder.grid == size and native.shape[1] == prefix + grid**2
    square = native[:, prefix:].unflatten(1, (grid, grid)).permute(0, 3, 1, 2)

    def resample(antialias):
        options = {"mode": "bicubic", "align_corners": False, "antialias": antialias}
        return F.interpolate(square, size=(size, size), **options).flatten(2).mT

    antialias = alias == "dinov2-small"
    assert torch.allclose(encoder.vit.pos_embed[:, prefix:], resample(antialias), atol=1e-7)
    assert torch.equal(encoder.vit.pos_embed[:, :prefix], native[:, :prefix])
    difference = (resample(True) - resample(False)).abs().max()
    assert difference > 1e-3 or (size >= grid and difference < 1e-6)


def test_siglip_2_has_the_gelu_of_hugging_face(shallow):
    x = torch.linspace(-3, 3, 100)
    for name, approximate in (("siglip2-base", "tanh"), ("mae-base", "none")):
        mlp = Encoder(name, weights="random").vit.blocks[0].mlp
        assert torch.equal(mlp.act(x), F.gelu(x, approximate=approximate))
    assert not torch.equal(F.gelu(x), F.gelu(x, approximate="tanh"))


@pytest.mark.parametrize(
    ("layers", "numbers"), [(None, None), ("last", None), ("all", [1, 2, 3, 4, 5]), ([0, 3], [0, 3])]
)
def test_layers_are_all_but_the_first_a_list_or_the_last(layers, numbers):
    """All of six blocks means five: with the first, latents would hold what is not yet mixed."""
    encoder = Encoder("test_vit", image_size=32, weights="random", layers=layers)
    assert len(encoder.vit.blocks) == 6 and encoder.config()["layers"] == numbers


def test_the_hash_is_of_the_weights_alone(tmp_path):
    vit = timm.create_model("test_vit", num_classes=10)
    torch.save(vit.state_dict(), tmp_path / "a.pt")  # with a classifier, which is left out
    torch.save(vit.state_dict(), tmp_path / "b.pt", _use_new_zipfile_serialization=False)
    a = Encoder("test_vit", 64, weights=str(tmp_path / "a.pt"))
    b = Encoder("test_vit", 32, weights=str(tmp_path / "b.pt"), layers=[1, 2])
    assert a.hash == b.hash == a.config()["encoder_hash"] and len(a.hash) == 12
    for level in ("model", "state_dict"):  # as MAE's authors and timm write their files
        torch.save({level: vit.state_dict(), "epoch": 5}, tmp_path / "c.pt")
        assert Encoder("test_vit", 64, weights=str(tmp_path / "c.pt")).hash == a.hash
    with torch.no_grad():
        vit.blocks[1].mlp.fc2.bias[3] += 1e-6
    torch.save(vit.state_dict(), tmp_path / "a.pt")
    assert Encoder("test_vit", 64, weights=str(tmp_path / "a.pt")).hash != a.hash


def test_untrained_weights_repeat_and_leave_the_generator_alone():
    torch.manual_seed(7)
    state = torch.get_rng_state()
    one, two = (Encoder("test_vit", 64, weights="random").state_dict() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one[key], two[key]) for key in one)


NOT_PLAIN = ["resnet18", "vit_relpos_small_patch16_224", "vit_srelpos_small_patch16_224"]
NOT_PLAIN += ["vit_small_r26_s32_224", "swin_tiny_patch4_window7_224", "samvit_base_patch16"]


@pytest.mark.parametrize("name", NOT_PLAIN)
def test_networks_that_are_no_plain_vit_end_in_one_line(name):
    with torch.device("meta"):  # no weight of them is drawn
        line = message(Encoder, name, None, 224, "random")
    assert line == f"--encoder {name}: not a plain ViT, with patches and tokens of one size"


MESSAGES = [
    ("vit_nano", {}, "--encoder vit_nano: neither one of dinov2-small, dinov2-base, "),
    ("vit_base_patch16_224.typo", {}, "--encoder vit_base_patch16_224.typo: neither"),
    (
        "test_vit",
        {"encoder_size": 65},
        "would see 65 pixels a side, no multiple of its patch size 16; change",
    ),
    ("test_vit", {"image_size": 8}, "--encoder test_vit: would see 8 pixels a side, no multiple of"),
    ("test_vit", {"image_size": 100, "patch_size": 12}, "would see 133 pixels a side, no multiple of"),
    (
        "test_vit",
        {"layers": [4, 6]},
        "--layers: test_vit has blocks 0 to 5, of which [4, 6] can't be averaged",
    ),
    ("test_vit", {"weights": "none.pt"}, "--encoder-weights none.pt: no such file"),
    ("test_vit", {"weights": "text.pt"}, "--encoder test_vit: text.pt is not to be had, or does not fit ("),
    ("test_vit", {"weights": "wrong.pt"}, "--encoder test_vit: wrong.pt is"),
    ("test_vit", {"weights": "level.pt"}, "--encoder test_vit: level.pt is"),
    ("test_vit", {"weights": "wide.pt"}, "fit (size mismatch for cls_token: copying a param with shape"),
    ("dinov2-small", {"weights": None}, "model.safetensors of timm/vit_small_patch14_reg4_dinov2.lvd142m is"),
]


@pytest.mark.parametrize(("name", "options", "line"), MESSAGES)
def test_bad_encoders_end_in_one_line(tmp_path, monkeypatch, name, options, line):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    torch.save({"wrong": torch.zeros(1)}, "wrong.pt")
    torch.save({"model": "test_vit"}, "level.pt")
    torch.save(timm.create_model("test_vit", embed_dim=128).state_dict(), "wide.pt")
    Path("text.pt").write_text("no weights")
    found = message(lambda: Encoder(name, **{"weights": "random", **options}))
    assert line in found and len(found) < 400  # of PyTorch's differences the first
    assert name != "dinov2-small" or "--encoder-weights FILE takes a local copy" in found


# Latent statistics


@pytest.mark.parametrize("flip", [True, False])
def test_statistics_are_numpys_over_all_latents(cats, flip):
    encoder = Encoder("test_vit", 32, weights="random")
    images = images_of(cats, range(11))
    views = [images, images.flip(-1)] if flip else [images]
    latents = torch.cat([encoder(view) for view in views]).double().numpy()
    data = ImageData(cats, 32)
    for batch_size in (1, 4, 11):
        order = rae_encoder.even_order(11, 11, batch_size)
        found = list(rae_encoder.encode_views(encoder, data, order, flip=flip))
        assert found[0][0].shape == (batch_size, len(views), 64, 2, 2)
        assert torch.cat([y for _, y in found]).tolist() == data.labels.tolist()
        mean, var = rae_encoder.latent_statistics(z for z, _ in found)
        assert mean.dtype == var.dtype == torch.float32
        assert np.allclose(mean, latents.mean(0), atol=1e-6)
        assert np.allclose(var, latents.var(0), atol=1e-6)


def test_statistics_are_exact_far_from_zero():
    torch.manual_seed(0)
    # float32 squares leave no digit of the variance.
    z = 1000 + 0.1 * torch.randn(64, 2, 3, 2, 2)
    mean, var = rae_encoder.latent_statistics(z.split(8))
    exact = z.double().flatten(0, 1).numpy()
    assert np.allclose(mean, exact.mean(0), rtol=1e-7)
    assert np.allclose(var, exact.var(0), rtol=1e-5)
    naive = z.flatten(0, 1).square().mean(0) - z.flatten(0, 1).mean(0).square()
    assert not np.allclose(naive, exact.var(0), rtol=0.1)


FLAGS = (
    "--encoder test_vit --encoder-weights random --layers last --image-size 32 --patch-size 16 --workers 0"
)


def run(folder, *flags):
    rae_encoder.main([*FLAGS.split(), "--data", str(folder), *map(str, flags)])


@pytest.mark.parametrize("flip", [True, False])
def test_the_command_writes_statistics_of_all_images(cats, tmp_path, capsys, flip):
    """--no-flip, for letters, leaves their mirrors out."""
    out = tmp_path / "stats.pt"
    run(cats, "--batch-size", 3, "--out", out, "--flip" if flip else "--no-flip")
    file = read(out)
    encoder = Encoder("test_vit", image_size=32, weights="random")
    images = images_of(cats, range(11))
    latents = encoder(torch.cat([images, images.flip(-1)]) if flip else images).double().numpy()
    assert np.allclose(file["mean"], latents.mean(0), atol=1e-6)
    assert np.allclose(file["var"], latents.var(0), atol=1e-6)

    # The file knows its latents, and the output says where they come from.
    assert file["config"] == {**encoder.config(), "image_size": 32, "flip": flip}
    first, *_, last = capsys.readouterr().err.splitlines()
    images = f"11 images of {cats}, classes: 2 (cat 9, cat 10)"
    assert first == f"{images}; test_vit (random) [64, 2, 2]; 1 x cpu, fp32"
    assert last == f"{out}: mean and variance of [64, 2, 2] latents"
    assert list(tmp_path.iterdir()) == [out]


def test_the_command_replaces_and_counts_broken_images(cats, tmp_path, capsys):
    data = tmp_path / "images"
    for i in range(5):
        (data / str(i)).mkdir(parents=True)
        picture(40, 60, seed=i).save(data / str(i) / "x.png")
    (data / "1/x.png").write_bytes(b"broken")
    (data / "2/x.png").write_bytes(b"broken")
    run(data, "--skip-broken", "--no-flip", "--out", tmp_path / "x.pt")
    latents = Encoder("test_vit", image_size=32, weights="random")(images_of(data, [0, 3, 3, 3, 4]))
    assert np.allclose(read(tmp_path / "x.pt")["mean"], latents.double().mean(0), atol=1e-6)
    assert capsys.readouterr().err.endswith(" latents; 2 broken images were replaced by others\n")
    line = message(run, data, "--out", tmp_path / "y.pt")
    assert line.startswith(f"{data}/1/x.png: not a readable image") and not (tmp_path / "y.pt").exists()
    # A folder that is missing is found before the work.
    assert message(run, data, "--out", "nowhere/x.pt").startswith("--out nowhere/x.pt: not in a folder")


def test_the_command_needs_an_image_for_each_rank(cats, tmp_path, monkeypatch):
    monkeypatch.setattr(rae_encoder, "set_up", lambda args: (0, 12, torch.device("cpu")))
    line = message(run, cats, "--out", tmp_path / "x.pt")
    assert line == f"--data {cats}: 11 images, fewer than 12 ranks"


def test_the_demo_says_that_it_is_one(folder, capsys):
    rae_encoder.main(["--workers", "0"])
    text = "The demo: its numbers compare with nothing. 22 images of data/demo, classes: 4 (bar, circle, "
    assert capsys.readouterr().err.startswith(text)
    assert read("stats.pt")["mean"].shape == (64, 4, 4)


def test_statistics_of_every_shape_are_read(tmp_path):
    path = str(tmp_path / "stat.pt")
    values = torch.tensor([1.0, 4.0])
    whole = values[:, None, None].expand(2, 3, 3)
    varied = torch.rand(2, 3, 3)
    cases = [
        ({"mean": None, "var": varied}, torch.zeros(2, 3, 3), varied),
        ({"mean": None}, torch.zeros(2, 3, 3), torch.ones(2, 3, 3)),
        ({"var": values}, torch.zeros(2, 3, 3), whole),
        ({"mean": values, "var": None}, whole, torch.ones(2, 3, 3)),
        ({"mean": varied.double(), "var": values[:, None, None]}, varied, whole),
        ({"mean": varied, "var": torch.tensor(2.0), "step": 5}, varied, torch.full((2, 3, 3), 2.0)),
    ]
    for file, mean, var in cases:
        torch.save(file, path)
        moments = rae_encoder.load_statistics(path, {"latent_shape": [2, 3, 3]})
        assert all(moment.dtype == torch.float32 for moment in moments)
        assert torch.equal(moments[0], mean) and torch.equal(moments[1], var)
    refused = [
        ({"mean": torch.zeros(2, 3, 3), "var": None}, [4, 3, 3], "of latents [2, 3, 3], these are [4, 3, 3]"),
        ({"mean": torch.zeros(3)}, [2, 3, 3], "of latents [3, 1, 1], these are [2, 3, 3]"),
        ({"step": 5}, [2, 3, 3], "no latent statistics; `rae_encoder.py --out FILE` writes them"),
    ]
    for file, shape, line in refused:
        torch.save(file, path)
        found = message(rae_encoder.load_statistics, path, {"latent_shape": shape}, "--moments")
        assert found.startswith(f"--moments {path}: {line}")


OTHER = {"encoder_hash": "f" * 12, "encoder_size": 64, "layers": [1, 3], "latent_shape": [64, 4, 4]}
OTHER |= {"encoder": "test_vit2", "image_size": 48}


@pytest.mark.parametrize("key", OTHER)
def test_statistics_of_other_latents_are_refused(tmp_path, key):
    """Of the same shape, too: what the file knows is compared, and a released file knows nothing."""
    config = {**Encoder("test_vit", 32, image_size=32, weights="random").config(), "image_size": 32}
    path = tmp_path / "stats.pt"
    moments = {"mean": torch.rand(64, 2, 2), "var": torch.rand(64, 2, 2)}
    torch.save({**moments, "config": {**config, key: OTHER[key]}}, path)
    line = message(rae_encoder.load_statistics, path, config)
    assert line.startswith(f"this run has {key} {config[key]}, --stats {path} has")
    assert f" {OTHER[key]}: " in line
    # Flips make no other latents.
    for known in ({}, {**config, "flip": False}):
        torch.save({**moments, "config": known}, path)
        assert torch.equal(rae_encoder.load_statistics(path, config)[1], moments["var"])


def test_statistics_are_a_copy(tmp_path):
    """The file may be replaced while a training runs."""
    path = tmp_path / "stats.pt"
    torch.save({"mean": torch.zeros(64, 2, 2), "var": torch.ones(64, 2, 2)}, path)
    moments = rae_encoder.load_statistics(path, {"latent_shape": [64, 2, 2]})
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(path) not in maps.read_text()
    assert all(moment.is_contiguous() for moment in moments)
