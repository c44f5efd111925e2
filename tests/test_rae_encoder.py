"""Images, encoder and latent statistics against Pillow, torchvision, timm and numpy."""

import io
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import functional as tvf

import rae_encoder
from rae_encoder import Encoder, ImageData

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"


def noise_image(width, height, seed=0):
    """A smooth random picture, so that resampling rules differ visibly."""
    pixels = np.random.default_rng(seed).integers(
        0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8
    )
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes, eleven images of several sizes."""
    root = tmp_path_factory.mktemp("images")
    for i in range(11):
        path = root / ("cat 10" if i % 2 else "cat 9") / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        noise_image(40 + 3 * i, 70 - 2 * i, seed=i).save(path)
    return root


def batches(data, order, **kwargs):
    return list(rae_encoder.load_images(data, order, torch.device("cpu"), **kwargs))


# ------------------------------------------------------------------------------------------------ images


def test_center_crop_is_the_adm_rule():
    image = noise_image(300, 131)  # 131 -> 64 is more than a factor of 2: one halving first
    halved = image.resize((150, 65), Image.Resampling.BOX)
    expected = tvf.center_crop(
        tvf.resize(halved, [64, round(150 * 64 / 65)], tvf.InterpolationMode.BICUBIC), [64, 64]
    )
    assert np.array_equal(rae_encoder.center_crop(image, 64), expected)
    no_halving = tvf.resize(image, [64, round(300 * 64 / 131)], tvf.InterpolationMode.BICUBIC)
    assert not np.array_equal(rae_encoder.center_crop(image, 64), tvf.center_crop(no_halving, [64, 64]))


@pytest.mark.parametrize("size", [(123, 77), (50, 90), (64, 64)])
def test_random_crop_is_a_window_of_torchvisions_resize(size):
    image, rng = noise_image(*size), np.random.default_rng(0)
    resized = np.asarray(tvf.resize(image, 48, tvf.InterpolationMode.BICUBIC))
    windows = np.lib.stride_tricks.sliding_window_view(resized, (32, 32, 3))[:, :, 0]
    seen = set()
    for _ in range(100):
        match = (windows == np.asarray(rae_encoder.random_crop(image, 32, rng))).all(axis=(2, 3, 4))
        assert match.sum() == 1
        seen.add(tuple(np.argwhere(match)[0]))
    assert len(seen) > 50  # it is random, and the first and the last place are reached
    assert {0, windows.shape[0] - 1} <= {top for top, _ in seen}


def test_every_mode_becomes_the_right_rgb():
    def read(image, **options):
        file = io.BytesIO()
        image.save(file, **({"format": "PNG"} | options))
        return np.asarray(rae_encoder.read_image(file))[0, 0].tolist()

    rgba = Image.new("RGBA", (2, 2), (255, 0, 0, 51))  # a fifth red, the rest white
    assert read(rgba) == [255, 204, 204]
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    assert read(palette) == [10, 200, 30]
    assert read(palette, transparency=1) == [255, 255, 255]
    assert read(Image.fromarray(np.full((2, 2), 40_000, np.uint16))) == [round(40_000 / 257)] * 3
    assert read(Image.new("L", (2, 2), 77)) == [77, 77, 77]
    assert read(Image.new("LA", (2, 2), (0, 0))) == [255, 255, 255]
    cmyk = read(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), format="JPEG", quality=100)
    assert np.allclose(cmyk, [255, 0, 0], atol=3)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise: the bottom left corner comes to the top left
    corner = Image.new("RGB", (16, 16))
    corner.paste((255, 255, 255), (0, 8, 8, 16))
    assert np.allclose(read(corner, format="JPEG", quality=100, exif=exif), 255, atol=3)


def test_order_is_a_permutation_shared_by_the_ranks_and_resumes():
    whole = list(rae_encoder.training_order(11, 4, seed=3, first_step=0, last_step=6))
    assert [key for batch in whole[:2] for key in batch] != [key for batch in whole[2:4] for key in batch]
    for epoch in range(3):
        indices = [i for batch in whole[2 * epoch : 2 * epoch + 2] for e, i in batch if e == epoch]
        assert len(indices) == len(set(indices)) == 8
    ranks = [list(rae_encoder.training_order(11, 4, 3, 2, 6, rank, 2)) for rank in range(2)]
    for step, batch in enumerate(whole[2:]):
        assert sorted(ranks[0][step] + ranks[1][step]) == sorted(batch)


def test_images_depend_on_seed_epoch_and_index_alone(folder):
    for augment in ("crop", "flip"):
        order = [[(0, 1), (0, 2)], [(1, 1), (1, 2)], [(2, 5)]]
        one = batches(ImageData(folder, 32, augment, seed=1), order)
        two = batches(ImageData(folder, 32, augment, seed=1), order[::-1], workers=2)[::-1]
        assert all(torch.equal(a, b) and torch.equal(y, w) for (a, y), (b, w) in zip(one, two, strict=True))
    other = batches(ImageData(folder, 32, "crop", seed=2), order)
    crops = batches(ImageData(folder, 32, "crop", seed=1), order)
    assert not torch.equal(other[0][0], crops[0][0])
    assert not torch.equal(crops[0][0], crops[1][0])  # another epoch, another crop


def test_half_of_the_images_are_mirrored(folder):
    plain, data = ImageData(folder, 32)[0, 3][0], ImageData(folder, 32, "flip")
    views = [data[epoch, 3][0] for epoch in range(200)]
    mirrored = sum(torch.equal(view, plain.flip(-1)) for view in views)
    assert mirrored + sum(torch.equal(view, plain) for view in views) == 200
    assert 70 < mirrored < 130


def test_folder_and_tar_give_the_same(folder, tmp_path):
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        for path in sorted(folder.rglob("*.png"), reverse=True):
            tar.add(path, path.relative_to(folder))
    data, packed = ImageData(folder, 32), ImageData(str(tmp_path / "images.tar"), 32)
    assert data.classes == packed.classes == ["cat 9", "cat 10"]  # natural order
    keys = [[(0, i)] for i in range(11)]
    for (a, y), (b, w) in zip(batches(data, keys), batches(packed, keys, workers=2), strict=True):
        assert torch.equal(a, b) and torch.equal(y, w)
        assert a.dtype == torch.float32 and a.max() <= 1


def test_broken_images_are_named_or_replaced(folder, tmp_path):
    for name, content in {"a.png": b"", "b.png": b"text", "c.jpg": None}.items():
        if content is None:
            file = io.BytesIO()
            noise_image(64, 64).save(file, "JPEG")
            content = file.getvalue()[:600]
        (tmp_path / name).write_bytes(content)
        with pytest.raises(SystemExit, match=rf"{name}: not a readable image.*--skip-broken"):
            batches(ImageData(tmp_path, 32), [[(0, 0)]], workers=1)
        with pytest.raises(SystemExit, match="every image is broken"):
            batches(ImageData(tmp_path, 32, skip_broken=True), [[(0, 0)]])
        (tmp_path / name).unlink()
    (tmp_path / "1.png").write_bytes(b"broken")
    noise_image(40, 40).save(tmp_path / "2.png")
    data = ImageData(tmp_path, 32, skip_broken=True)
    assert torch.equal(batches(data, [[(0, 0)]], workers=1)[0][0], batches(data, [[(0, 1)]])[0][0])
    assert data.broken.tolist() == [True, False]


def test_odd_names_and_shapes_are_read_and_dangling_links_named(tmp_path):
    for name, size in {"Straße 1.png": (1, 1), "a b.png": (1, 400), "日本.jpg": (50, 40)}.items():
        Image.new("RGB", size, (200, 100, 50)).save(tmp_path / name)
    data = ImageData(tmp_path, 16)
    images = torch.cat([images for images, _ in batches(data, [[(0, i)] for i in range(3)])])
    assert (images.mean((2, 3)) * 255 - torch.tensor([200, 100, 50])).abs().max() < 3
    (tmp_path / "zz.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(SystemExit, match="zz.png: not a readable image"):
        batches(ImageData(tmp_path, 16), [[(0, i) for i in range(4)]])


def test_a_decompression_bomb_is_refused_by_name(tmp_path, monkeypatch):
    noise_image(40, 40).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)  # Pillow refuses twice as many
    with pytest.raises(SystemExit, match=r"bomb.png: not a readable image \(Image size \(1600 pixels\)"):
        batches(ImageData(tmp_path, 16), [[(0, 0)]])


def test_damaged_files_are_read_or_named_and_nothing_else(tmp_path):
    """A seeded fuzzer: bytes of good files are cut off, changed or repeated."""
    rng, outcomes = np.random.default_rng(0), []
    for i in range(300):
        file, format = io.BytesIO(), ("PNG", "JPEG", "WEBP", "BMP")[i % 4]
        noise_image(24, 17, seed=i).save(file, format)
        content = bytearray(file.getvalue())
        for position in rng.integers(0, len(content), rng.integers(1, 9)):
            content[position] = rng.integers(256)
        if rng.random() < 0.5:
            content = content[: rng.integers(len(content))]
        (tmp_path / f"x.{format.lower()}").write_bytes(content)
        sample = ImageData(tmp_path, 16)[0, 0]
        (tmp_path / f"x.{format.lower()}").unlink()
        outcomes.append(isinstance(sample, str))
        if outcomes[-1]:
            assert f"x.{format.lower()}: not a readable image" in sample and "\n" not in sample
        else:
            assert sample[0].shape == (3, 16, 16)
    assert 50 < sum(outcomes) < 290  # both happened


def test_bad_folders_end_in_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("no tar")
    (tmp_path / "broken.tar").write_text("no tar")
    for path in ("none", "empty", "broken.tar", "file.txt"):
        with pytest.raises(SystemExit, match=f"--data .*{path}: no such folder or .tar, or no .png .jpg"):
            ImageData(str(tmp_path / path), 32)


# ----------------------------------------------------------------------------------------------- encoder


def test_encoder_is_timms_vit_without_the_last_affine(tmp_path):
    vit = timm.create_model("test_vit", num_classes=0).eval()
    torch.nn.init.normal_(vit.norm.weight)
    torch.nn.init.normal_(vit.norm.bias)
    torch.save(vit.state_dict(), tmp_path / "vit.pt")
    encoder = Encoder("test_vit", encoder_size=64, image_size=32, weights=str(tmp_path / "vit.pt"))
    images = torch.rand(2, 3, 32, 32)
    x = F.interpolate(images, size=64, mode="bicubic", align_corners=False)
    x = (x - torch.tensor(vit.pretrained_cfg["mean"])[:, None, None]) / torch.tensor(
        vit.pretrained_cfg["std"]
    )[:, None, None]
    vit.set_input_size(64)
    tokens = (
        vit.forward_features(x)[:, 1:] - vit.norm.bias
    ) / vit.norm.weight  # class token dropped, affine undone
    z = encoder(images)
    assert z.shape == (2, 64, 4, 4) and (encoder.width, encoder.grid) == (64, 4)
    for row in range(4):
        for column in range(4):
            assert torch.allclose(z[:, :, row, column], tokens[:, 4 * row + column], atol=2e-5)
    assert torch.allclose(z.mean(1), torch.zeros(()), atol=1e-5)
    assert torch.allclose(z.var(1, correction=0), torch.ones(()), atol=1e-3)
    assert not any(p.requires_grad for p in encoder.parameters())


def test_register_tokens_are_dropped():
    encoder = Encoder("test_vit3", encoder_size=96, weights="random")  # one register, no class token
    assert encoder(torch.rand(1, 3, 96, 96)).shape == (1, 96, 6, 6)


def test_default_encoder_sizes():
    for name, image_size, size, grid in (("test_vit", 96, 96, 6), ("vit_small_patch14_dinov2", 64, 56, 4)):
        encoder = Encoder(name, image_size=image_size, weights="random")
        assert (encoder.encoder_size, encoder.grid) == (size, grid)


def test_mae_positions_are_resampled_without_antialias():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        native = timm.create_model("vit_base_patch16_224.mae", num_classes=0).pos_embed
    encoder = Encoder("mae-base", image_size=128, weights="random")
    grid = native[:, 1:].unflatten(1, (14, 14)).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, size=(8, 8), mode="bicubic", align_corners=False).flatten(2).mT
    assert torch.allclose(encoder.vit.pos_embed[:, 1:], expected, atol=1e-7)
    smooth = (
        F.interpolate(grid, size=(8, 8), mode="bicubic", align_corners=False, antialias=True).flatten(2).mT
    )
    assert (smooth - expected).abs().max() > 1e-3


def test_untrained_weights_repeat_and_leave_the_generator_alone():
    torch.manual_seed(7)
    state = torch.get_rng_state()
    one, two = (Encoder("test_vit", 64, weights="random").state_dict() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_bad_encoders_end_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    torch.save({"wrong": torch.zeros(1)}, tmp_path / "wrong.pt")
    cases = [
        (dict(name="vit_nano"), "vit_nano: neither"),
        (dict(name="vit_base_patch16_224.typo"), "vit_base_patch16_224.typo: neither"),
        (dict(name="resnet18", weights="random"), "not a plain ViT"),
        (
            dict(name="test_vit", encoder_size=65, weights="random"),
            "65: no multiple of the patch size, 16",
        ),
        (
            dict(name="test_vit", weights=str(tmp_path / "none.pt")),
            "none.pt: no such file",
        ),
        (
            dict(name="test_vit", weights=str(tmp_path / "wrong.pt")),
            "wrong.pt: no weights of timm's test_vit",
        ),
        (
            dict(name="dinov2-small"),
            "model.safetensors of timm/vit_small_patch14_reg4.*--encoder-weights FILE",
        ),
    ]
    for arguments, line in cases:
        with pytest.raises(SystemExit, match=line) as exit:
            Encoder(**arguments)
        assert "\n" not in str(exit.value)


# -------------------------------------------------------------------------------------------- statistics


def test_statistics_are_numpys_over_all_latents(folder):
    encoder, data = Encoder("test_vit", 32, weights="random"), ImageData(folder, 32)
    images = torch.cat([x for x, _ in batches(data, [[(0, i)] for i in range(11)])])
    latents = torch.cat([encoder(images), encoder(images.flip(-1))]).double().numpy()
    for batch_size in (1, 4, 11):
        mean, var = rae_encoder.latent_statistics(encoder, data, 11, batch_size, precision="fp32")
        assert np.allclose(mean, latents.mean(0), atol=1e-6)
        assert np.allclose(var, latents.var(0), atol=1e-6)


def test_statistics_of_two_ranks_are_those_of_one(folder, tmp_path):
    flags = [
        "--data",
        folder,
        "--image-size",
        "32",
        "--encoder-size",
        "32",
        "--precision",
        "fp32",
        "--workers",
        "0",
    ]
    files = []
    for world, batch_size in ((1, 11), (2, 6)):
        files.append(tmp_path / f"{world}.pt")
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(world)]
        command = [
            sys.executable,
            *launcher,
            ROOT / "rae_encoder.py",
            *flags,
            "--batch-size",
            str(batch_size),
        ]
        subprocess.run([*map(str, command), "--out", files[-1]], check=True, cwd=tmp_path)
    one, two = (rae_encoder.load_statistics(str(file), (64, 2, 2)) for file in files)
    assert torch.allclose(one[0], two[0], atol=1e-6) and torch.allclose(one[1], two[1], atol=1e-6)


def test_released_statistics_may_lack_mean_and_variance(tmp_path):
    path = str(tmp_path / "stat.pt")
    torch.save({"mean": None, "var": torch.full((2, 3, 3), 4.0)}, path)
    mean, var = rae_encoder.load_statistics(path, (2, 3, 3))
    assert mean.eq(0).all() and var.eq(4).all()
    torch.save({"mean": None}, path)
    assert rae_encoder.load_statistics(path, (2, 3, 3))[1].eq(1).all()
    with pytest.raises(SystemExit, match=r"latents"):
        torch.save({"mean": torch.zeros(2, 3, 3), "var": None}, path)
        rae_encoder.load_statistics(path, (4, 3, 3))


def test_shared_weights_give_dinov2_tokens():
    weights = SHARED / "weights" / "vit_small_patch14.safetensors"
    if not weights.exists():
        pytest.skip("needs shared/weights/vit_small_patch14.safetensors")
    encoder = Encoder("vit_small_patch14_dinov2", 112, 64, str(weights))
    z = encoder(torch.rand(1, 3, 64, 64))
    assert z.shape == (1, 384, 8, 8) and encoder.vit.pos_embed.shape == (1, 65, 384)
    assert torch.allclose(z.mean(1), torch.zeros(()), atol=1e-4)
