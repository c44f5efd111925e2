"""Images, encoder and latent statistics against Pillow, torchvision, timm and numpy."""

import argparse
import errno
import hashlib
import io
import itertools
import os
import re
import struct
import subprocess
import sys
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import message, read
from PIL import Image, ImageOps
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
        return np.asarray(rae_encoder.to_rgb(Image.open(file)))[0, 0].tolist()

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


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_pillow_does(orientation):
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = orientation
    noise_image(24, 16).save(file, "PNG", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(file))
    assert np.array_equal(rae_encoder.to_rgb(Image.open(file)), upright)
    assert upright.size == ((24, 16) if orientation < 5 else (16, 24))


def with_chunk(kind, content):
    """A small PNG with this chunk before its pixels."""
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (10, 200, 30)).save(file, "PNG")
    head, tail = file.getvalue()[:33], file.getvalue()[33:]
    chunk = struct.pack(">I", len(content)) + kind + content
    return head + chunk + struct.pack(">I", zlib.crc32(kind + content)) + tail


MEGABYTES = zlib.compress(bytes(2**21))
METADATA = {
    "EXIF": with_chunk(b"eXIf", bytes([0, 8, 0, 2, 1, 0x12, 0, 3])),
    "profile": with_chunk(b"iCCP", b"x\0\0" + MEGABYTES),
    "text": with_chunk(b"zTXt", b"x\0\0" + MEGABYTES),
    "unicode": with_chunk(b"iTXt", b"x\0\1\0\0\0" + MEGABYTES),
    "XMP": with_chunk(b"iTXt", b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6" \xff\xfe/>'),
}


@pytest.mark.parametrize("kind", METADATA)
def test_metadata_never_breaks_a_picture(tmp_path, monkeypatch, kind):
    (tmp_path / "x.png").write_bytes(METADATA[kind])
    image, label = ImageData(tmp_path, 4)[0, 0]
    assert label == 0 and image.flatten(1).unique(dim=1).flatten().tolist() == [10, 200, 30]

    # What went wrong before: Pillow's limits, and its ways with EXIF.
    monkeypatch.setattr("PIL.PngImagePlugin.MAX_TEXT_CHUNK", 2**20)
    if kind == "EXIF":
        with pytest.raises(SyntaxError):
            ImageOps.exif_transpose(Image.open(tmp_path / "x.png"))
    elif kind != "XMP":  # Pillow 11.2.1 alone
        assert "not a readable image" in ImageData(tmp_path, 4)[0, 0]


@pytest.mark.parametrize("error", [UnicodeDecodeError("utf-8", b"", 0, 1, "?"), struct.error, KeyError])
def test_any_error_of_exif_is_passed_over(monkeypatch, error):
    def getexif(_image):
        raise error

    monkeypatch.setattr(Image.Image, "getexif", getexif)
    assert rae_encoder.to_rgb(Image.new("RGB", (2, 2), "red")).getpixel((0, 0)) == (255, 0, 0)


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


def test_images_and_labels_are_those_of_the_files(folder):
    data = ImageData(folder, 32)
    assert data.classes == ["cat 9", "cat 10"] and len(data) == 11 and data.about == str(folder)
    expected = [(f"cat 9/{i}.png", 0) for i in (0, 2, 4, 6, 8, 10)] + [
        (f"cat 10/{i}.png", 1) for i in (1, 3, 5, 7, 9)
    ]
    loaded = batches(data, [[(0, i)] for i in range(11)], workers=2)
    for i, (images, labels) in enumerate(loaded):
        path, label = expected[i]
        assert data.path(i) == str(folder / path) and labels.tolist() == [label]
        pixels = np.asarray(rae_encoder.center_crop(Image.open(folder / path), 32))
        assert images.dtype == torch.float32
        assert np.array_equal(images[0].permute(1, 2, 0).numpy(), np.float32(pixels) / np.float32(255))


def test_natural_order_is_one_for_any_order_of_the_input():
    expected = ["01", "1", "9", "10", "A", "a", "B2", "b2", "b10", "b\u00b2", "\u2460"]  # squared, circled 1
    rng = np.random.default_rng(0)
    for _ in range(200):
        assert rae_encoder.natural_order(rng.permutation(expected).tolist()) == expected
    for names in itertools.permutations(["x1", "x01", "x001", "X1"]):
        assert rae_encoder.natural_order(names) == ["X1", "x001", "x01", "x1"]

    # As comparing text with text and number with number, part by part
    def parts(name):
        return [int(part) if part.isdecimal() else part for part in re.split("([0-9]+)", name.lower())]

    letters = list("aAb019.- _\u00e9\t")
    names = ["".join(rng.choice(letters, rng.integers(1, 9))) for _ in range(3000)]
    assert rae_encoder.natural_order(names) == sorted(sorted(names), key=parts)


def make(root, *paths):
    """Files below root: images of one pixel where the name says so, else text."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        if path.lower().endswith(rae_encoder.EXTENSIONS):
            Image.new("RGB", (1, 1)).save(root / path)
        else:
            (root / path).write_text("no image")


def listing(root):
    """(the class and name of each image, what was left out) of list_images."""
    classes, names, labels, left_out = rae_encoder.list_images(str(root), "--data")
    pairs = [(classes[label], os.fsdecode(name)) for label, name in zip(labels, names, strict=True)]
    return pairs, left_out


def test_classes_are_the_leaf_folders_in_natural_order(tmp_path):
    make(
        tmp_path,
        "val/cat/1.png",
        "train/cat/10.PNG",
        "train/cat/9.JpEg",
        "train/Cat/1.webp",
        "train/10/x.bmp",
    )
    make(tmp_path, "train/9/x.jpg", "train/09/x.jpg")
    assert listing(tmp_path) == (
        [
            ("train/09", "x.jpg"),
            ("train/9", "x.jpg"),
            ("train/10", "x.bmp"),
            ("train/Cat", "1.webp"),
            ("train/cat", "9.JpEg"),
            ("train/cat", "10.PNG"),
            ("val/cat", "1.png"),
        ],
        "",
    )
    for root in (tmp_path / "train/cat", f"{tmp_path}/train/cat/"):
        assert listing(root)[0] == [("", "9.JpEg"), ("", "10.PNG")]
    assert listing(f"{tmp_path}/val/") == ([("cat", "1.png")], "")


def test_hidden_names_are_skipped_and_what_is_left_out_is_counted(tmp_path):
    make(tmp_path, "a/1.png", "a/._1.png", ".hidden/2.png", "a/.ipynb_checkpoints/3.png")
    assert listing(tmp_path) == ([("a", "1.png")], "")
    make(tmp_path, "a/4.gif", "a/notes.txt", "b/5.gif")
    (tmp_path / "c").mkdir()
    left_out = "left out: files of other kinds (3), folders without images (2)"
    assert listing(tmp_path) == ([("a", "1.png")], left_out)
    assert ImageData(tmp_path, 8).about == f"{tmp_path} ({left_out})"
    line = message(ImageData, str(tmp_path / "b"), 8)
    assert line.startswith(f"--data {tmp_path / 'b'}: no .png .jpg") and "files of other kinds (1)" in line


@pytest.mark.parametrize(
    ("files", "image", "beside"),
    [
        (["0.png", "cat/1.png"], "0.png", "cat"),
        (["a/0.png", "a/b/none.txt", "a/c/d/1.png"], "a/0.png", "a/c/d"),
        (["a/0.png", "a/b/1.png", "c/2.png"], "a/0.png", "a/b"),
    ],
)
def test_images_beside_class_folders_are_refused(tmp_path, files, image, beside):
    make(tmp_path, *files)
    line = message(rae_encoder.list_images, str(tmp_path), "--data")
    assert f"{tmp_path / image} lies beside" in line and f"folder {tmp_path / beside};" in line
    (tmp_path / image).unlink()
    assert len(listing(tmp_path)[0]) == len([name for name in files[1:] if name.endswith("png")])


def test_folders_whose_names_begin_alike_are_no_mixture(tmp_path):
    make(tmp_path, "a/0.png", "a b/1.png", "ab/2.png")
    assert [name for name, _ in listing(tmp_path)[0]] == ["a", "a b", "ab"]


def test_links_are_followed_and_each_real_folder_is_listed_once(tmp_path):
    make(tmp_path, "data/a/1.png", "elsewhere/2.png", "file/3.png")
    (tmp_path / "data/a/self").symlink_to(tmp_path / "data/a")
    (tmp_path / "data/a/up").symlink_to(tmp_path / "data")
    (tmp_path / "data/b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/c").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/a/3.png").symlink_to(tmp_path / "file/3.png")
    expected = [("a", "1.png"), ("a", "3.png"), ("b", "2.png")]
    assert listing(tmp_path / "data") == (expected, "left out: folders listed before (3)")


def test_an_unreadable_folder_is_an_error(tmp_path, monkeypatch):
    make(tmp_path, "a/1.png", "b/2.png")
    scandir = os.scandir

    def forbidden(path):
        if str(path).endswith("b"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbidden)  # root may read all that chmod forbids
    line = message(rae_encoder.list_images, str(tmp_path), "--eval-data")
    assert line == f"--eval-data {tmp_path / 'b'}: Permission denied; expected a folder of images"


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
    lines = {"none": "No such file or directory", "empty": "no .png .jpg"}
    for path, line in lines.items():
        found = message(ImageData, str(tmp_path / path), 32)
        assert found.startswith(f"--data {tmp_path / path}: {line}")

    # A file is taken for an image.
    (tmp_path / "file.txt").write_text("no image")
    assert ImageData(str(tmp_path / "file.txt"), 32)[0, 0].startswith(
        f"{tmp_path / 'file.txt'}: not a readable"
    )


def test_the_demo_draws_the_same_pixels(tmp_path):
    rae_encoder.draw_demo(str(tmp_path / "demo"), num=40)
    digest = hashlib.sha256()
    paths = sorted((tmp_path / "demo").rglob("*.png"))
    for path in paths:
        digest.update(str(path.relative_to(tmp_path / "demo")).encode())
        digest.update(np.asarray(Image.open(path)).tobytes())
    assert digest.hexdigest()[:16] == "4a58ff58201e0563"  # of the first version; Pillow 10.1 to 13.0

    # A second process that comes late leaves them alone.
    before = [path.stat().st_mtime_ns for path in paths]
    rae_encoder.draw_demo(str(tmp_path / "demo"), num=4)
    assert [path.stat().st_mtime_ns for path in paths] == before
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_a_demo_that_cannot_be_drawn_ends_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data").write_text("no folder")
    line = message(rae_encoder.main, ["--workers", "0"])
    assert line.startswith("data/demo: the demo's images can't be drawn (")


# ----------------------------------------------------------------------------------------------- encoder


def test_encoder_is_timms_vit_without_the_last_affine(tmp_path):
    torch.manual_seed(0)
    vit = timm.create_model("test_vit", num_classes=0).eval()
    torch.nn.init.uniform_(vit.norm.weight, 0.5, 1.5)  # to be divided by
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


@pytest.mark.parametrize(
    ("alias", "name", "grid", "prefix"),
    [
        ("mae-base", "vit_base_patch16_224.mae", 14, 1),
        ("siglip2-base", "vit_base_patch16_siglip_256.v2_webli", 16, 0),
        ("dinov2-small", "vit_small_patch14_reg4_dinov2.lvd142m", 37, 0),
    ],
)
@pytest.mark.parametrize("image_size", [128, 512])
def test_positions_are_resampled_as_the_authors_models_do_it(
    monkeypatch, alias, name, grid, prefix, image_size
):
    """Bicubically, for MAE and SigLIP 2 without antialias; it matters where the grid shrinks."""
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: create(*args, depth=1, **kwargs))
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


def test_siglip_2_has_the_gelu_of_hugging_face(monkeypatch):
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: create(*args, depth=1, **kwargs))
    encoder = Encoder("siglip2-base", weights="random")
    x = torch.linspace(-3, 3, 100)
    assert torch.equal(encoder.vit.blocks[0].mlp.act(x), F.gelu(x, approximate="tanh"))
    assert not torch.equal(F.gelu(x), F.gelu(x, approximate="tanh"))


def test_the_hash_is_of_the_weights_alone(tmp_path):
    vit = timm.create_model("test_vit", num_classes=10)
    torch.save(vit.state_dict(), tmp_path / "a.pt")  # with a classifier, which is left out
    torch.save(vit.state_dict(), tmp_path / "b.pt", _use_new_zipfile_serialization=False)
    a, b = (Encoder("test_vit", size, weights=str(tmp_path / f)) for f, size in (("a.pt", 64), ("b.pt", 32)))
    assert a.hash == b.hash and len(a.hash) == 12
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
    line = message(Encoder, name, None, 224, "random")
    assert line == f"--encoder {name}: not a plain ViT, with patches and tokens of one size"


@pytest.mark.parametrize(
    ("name", "size", "weights", "line"),
    [
        ("vit_nano", None, None, "--encoder vit_nano: neither"),
        ("vit_base_patch16_224.typo", None, None, "--encoder vit_base_patch16_224.typo: neither"),
        (
            "test_vit",
            65,
            "random",
            "--encoder-size 65: the encoder would see 65 pixels, no multiple of its patch size, 16",
        ),
        ("test_vit", 0, "random", "--image-size 0: the encoder would see 0 pixels"),
        ("test_vit", None, "none.pt", "--encoder-weights none.pt: no such file"),
        ("test_vit", None, "text.pt", "--encoder-weights text.pt: no weights of timm's test_vit ("),
        ("test_vit", None, "wrong.pt", "--encoder-weights wrong.pt: no weights of timm's test_vit ("),
        ("test_vit", None, "level.pt", "--encoder-weights level.pt: no weights of timm's test_vit ("),
        ("test_vit", None, "wide.pt", "size mismatch for cls_token: copying a param with shape"),
        (
            "dinov2-small",
            None,
            None,
            "model.safetensors of timm/vit_small_patch14_reg4_dinov2.lvd142m",
        ),
    ],
)
def test_bad_encoders_end_in_one_line(tmp_path, monkeypatch, name, size, weights, line):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    torch.save({"wrong": torch.zeros(1)}, "wrong.pt")
    torch.save({"model": "test_vit"}, "level.pt")
    torch.save(timm.create_model("test_vit", embed_dim=128).state_dict(), "wide.pt")
    Path("text.pt").write_text("no weights")
    found = message(Encoder, name, size, 0 if size == 0 else 256, weights)
    assert line in found
    assert weights != "wide.pt" or len(found) < 300  # the first of PyTorch's list of differences
    assert name != "dinov2-small" or "--encoder-weights FILE" in found


# -------------------------------------------------------------------------------------------- statistics


def test_statistics_are_numpys_over_all_latents(folder):
    encoder, data = Encoder("test_vit", 32, weights="random"), ImageData(folder, 32)
    images = torch.cat([x for x, _ in batches(data, [[(0, i)] for i in range(11)])])
    latents = torch.cat([encoder(images), encoder(images.flip(-1))]).double().numpy()
    for batch_size in (1, 4, 11):
        order = rae_encoder.even_order(11, 11, batch_size)
        views = list(rae_encoder.encode_views(encoder, data, order))
        assert views[0][0].shape == (batch_size, 2, 64, 2, 2)
        assert torch.cat([y for _, y in views]).tolist() == data.labels.tolist()
        mean, var = rae_encoder.latent_statistics(z for z, _ in views)
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


@pytest.mark.parametrize("total", [1, 7, 1000])
def test_images_are_drawn_evenly(total):
    for num in {1, total // 2, total} - {0}:
        ranks = [sum(rae_encoder.even_order(total, num, 3, rank, 2), []) for rank in range(2)]
        indices = sorted(i for _, i in ranks[0] + ranks[1])
        assert indices == [i * total // num for i in range(num)] and len(set(indices)) == num
        assert max(map(len, rae_encoder.even_order(total, num, 3))) <= 3


@pytest.mark.slow
def test_statistics_of_two_ranks_are_those_of_one(folder, tmp_path):
    network = "--encoder test_vit --encoder-weights random --encoder-size 32 --layers last"
    flags = [*f"{network} --image-size 32 --workers 0 --data".split(), str(folder)]
    one, two = str(tmp_path / "1.pt"), str(tmp_path / "2.pt")
    rae_encoder.main([*flags, "--batch-size", "11", "--out", one])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    script = [str(ROOT / "rae_encoder.py"), *flags, "--batch-size", "6", "--out", two]
    subprocess.run([*launcher, *script], check=True, cwd=tmp_path)
    for a, b in zip(*(rae_encoder.load_statistics(file, (64, 2, 2)) for file in (one, two)), strict=True):
        assert torch.allclose(a, b, atol=1e-6) and a.unique().numel() > 200


def test_statistics_need_two_images_and_one_a_rank(folder, monkeypatch):
    flags = ["--data", str(folder), "--image-size", "32", "--num", "3"]
    monkeypatch.setattr(rae_encoder, "set_up", lambda _: (0, 4, torch.device("cpu")))
    assert "--num 3: " in message(rae_encoder.main, flags)
    monkeypatch.setattr(rae_encoder, "set_up", lambda _: (0, 1, torch.device("cpu")))
    assert "--num 1: " in message(rae_encoder.main, [*flags[:-1], "1"])
    assert "--num 12: " in message(rae_encoder.main, [*flags[:-1], "12"])
    assert "--out nowhere/x.pt: not a file" in message(rae_encoder.main, [*flags, "--out", "nowhere/x.pt"])


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
        moments = rae_encoder.load_statistics(path, (2, 3, 3))
        assert all(moment.dtype == torch.float32 for moment in moments)
        assert torch.equal(moments[0], mean) and torch.equal(moments[1], var)
    refused = [
        ({"mean": torch.zeros(2, 3, 3), "var": None}, (4, 3, 3), "of latents [2, 3, 3], these are [4, 3, 3]"),
        ({"mean": torch.zeros(3)}, (2, 3, 3), "of latents [3, 1, 1], these are [2, 3, 3]"),
        ({"mean": "text"}, (2, 3, 3), "no latent statistics"),
        ({"step": 5}, (2, 3, 3), "no latent statistics"),
        ({}, (2, 3, 3), "no latent statistics"),
    ]
    for file, shape, line in refused:
        torch.save(file, path)
        found = message(rae_encoder.load_statistics, path, shape, "--moments")
        assert found.startswith(f"--moments {path}: ") and line in found


def test_shared_weights_give_dinov2_tokens():
    weights = SHARED / "weights" / "vit_small_patch14.safetensors"
    if not weights.exists():
        pytest.skip("needs shared/weights/vit_small_patch14.safetensors")
    encoder = Encoder("vit_small_patch14_dinov2", 112, 64, str(weights))
    z = encoder(torch.rand(1, 3, 64, 64))
    assert z.shape == (1, 384, 8, 8) and encoder.vit.pos_embed.shape == (1, 65, 384)
    assert torch.allclose(z.mean(1), torch.zeros(()), atol=1e-4)


# ------------------------------------------------------------------------------------- devices and files


@pytest.mark.parametrize(
    ("capabilities", "fast"),
    [
        ({}, False),
        ({"avx512_f": True, "avx2": True, "amx_bf16": False, "avx512_bf16": False}, False),
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": True}, True),
        ({"architecture": "aarch64", "bf16": True}, True),
    ],
)
def test_precision_is_bf16_where_a_cpu_has_it(monkeypatch, capabilities, fast):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    cpu = torch.device("cpu")
    default = ("bf16", "in hardware") if fast else ("fp32", "no bf16 in hardware")
    assert rae_encoder.choose_precision(None, cpu) == default
    assert rae_encoder.choose_precision("fp32", cpu) == ("fp32", "as asked")
    slow = "as asked, but not in this hardware: up to five times slower than fp32"
    assert rae_encoder.choose_precision("bf16", cpu) == ("bf16", "as asked" if fast else slow)
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # before torch 2.10
    assert rae_encoder.choose_precision(None, cpu)[0] == "fp32"


@pytest.mark.parametrize("hardware", [True, False])
@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_emulated_bf16_is_not_taken(monkeypatch, kind, hardware):
    module = types.SimpleNamespace(
        is_bf16_supported=lambda including_emulation=True: including_emulation or hardware
    )
    monkeypatch.setattr(torch, "get_device_module", lambda _: module)
    found = rae_encoder.choose_precision(None, torch.device(kind))
    assert found[0] == ("bf16" if hardware else "fp32")
    assert rae_encoder.choose_precision(None, torch.device("mps"))[0] == "fp32"


def test_devices_that_are_not_there_end_in_one_line(monkeypatch):
    for built_for in (None, torch.device("cuda")):  # a torch built for CUDA says so without a GPU, too
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda built_for=built_for: built_for)
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
        assert rae_encoder.choose_device("cpu") == torch.device("cpu")
        for name in ("cuda", "mps", "xpu"):
            line = message(rae_encoder.choose_device, name)
            assert line == f"--device {name}: this machine, or this torch, has none; --device cpu"
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert "has none" in message(rae_encoder.choose_device, "mps")
    assert (
        message(rae_encoder.choose_device, "cuda", 2)
        == "more processes than cuda devices: --nproc_per_node 2"
    )
    chosen = []
    monkeypatch.setattr(torch.accelerator, "set_device_index", chosen.append)
    assert rae_encoder.choose_device("cuda", 1) == torch.device("cuda", 1) and chosen == [1]


def test_a_written_file_is_whole_or_not_there(tmp_path):
    path = tmp_path / "x.pt"
    names = []

    def write(file):
        names.append(file.name)
        torch.save({"a": torch.ones(1)}, file)
        assert not path.exists()

    rae_encoder.write_file(str(path), write)
    assert names == [f"{path}.{os.getpid()}.tmp"] and read(path)["a"] == 1
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("size", [10, 10**6])
def test_a_full_disk_leaves_the_old_file_and_no_half_one(tmp_path, size):
    path = tmp_path / "x.pt"
    path.write_bytes(b"old")
    (tmp_path / f"x.pt.{os.getpid()}.tmp").symlink_to("/dev/full")
    for write in (lambda file: torch.save(torch.zeros(size), file), lambda file: file.write(bytes(size))):
        line = message(rae_encoder.write_file, str(path), write)
        assert line.startswith(f"{path}: can't be written (") and path.read_bytes() == b"old"
        assert list(tmp_path.iterdir()) == [path]
        (tmp_path / f"x.pt.{os.getpid()}.tmp").symlink_to("/dev/full")
    line = message(rae_encoder.write_file, str(tmp_path / "none/x"), lambda file: None)
    assert line.endswith("x: can't be written ([Errno 2] No such file or directory: "
                         f"'{tmp_path}/none/x.{os.getpid()}.tmp')")  # fmt: skip


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), RuntimeError("write failed")])
def test_whatever_torch_calls_a_full_disk_is_one_line(tmp_path, error):
    def write(file):
        file.write(b"half")
        raise error

    line = message(rae_encoder.write_file, str(tmp_path / "x.pt"), write)
    assert line == f"{tmp_path}/x.pt: can't be written ({error})" and not list(tmp_path.iterdir())


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("hacked",)


def test_weights_are_read_in_every_format_and_run_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refusal = "--x x.pt: not a file of weights ("
    for new in (True, False):  # torchvision's VGG-16 is of the old format, which can't be mapped
        torch.save({"a": torch.arange(3)}, "x.pt", _use_new_zipfile_serialization=new)
        assert rae_encoder.read_weights("x.pt", "--x")["a"].tolist() == [0, 1, 2]
        torch.save({"a": Malicious()}, "x.pt", _use_new_zipfile_serialization=new)
        assert message(rae_encoder.read_weights, "x.pt", "--x").startswith(refusal)
        assert not Path("hacked").exists()
    for content in (b"", b"text", b"PK\3\4"):
        Path("x.pt").write_bytes(content)
        assert message(rae_encoder.read_weights, "x.pt", "--x").startswith(refusal)
    assert message(rae_encoder.read_weights, "none.pt", "--x") == "--x none.pt: no such file"


def test_no_code_of_encoder_weights_runs_with_an_old_timm(tmp_path, monkeypatch):
    def load_state_dict(path, use_ema=True, device="cpu", weights_only=False):  # as in timm 1.0.20
        return torch.load(path, map_location=device, weights_only=weights_only)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rae_encoder, "load_state_dict", load_state_dict)
    torch.save({"a": Malicious()}, "x.pt")
    assert "x.pt: no weights of timm's test_vit (" in message(Encoder, "test_vit", 64, 64, "x.pt")
    assert not Path("hacked").exists()
    load_state_dict("x.pt")
    assert Path("hacked").exists()


def test_a_pair_is_of_one_encoder_and_one_latent_shape():
    flow = {"encoder": "test_vit", "encoder_hash": "a", "encoder_size": 64, "latent_shape": [4, 2, 2]}
    rae_encoder.check_pair(flow, "flow.pt", flow | {"noise_tau": 0.8}, "decoder.pt")
    rae_encoder.check_pair(flow, "flow.pt", {}, "released.pt")  # says nothing of its encoder
    for key, other in (("encoder_hash", "b"), ("encoder_size", 32), ("latent_shape", [4, 4, 4])):
        line = message(rae_encoder.check_pair, flow, "flow.pt", flow | {key: other}, "decoder.pt")
        assert line == f"flow.pt has {key} {flow[key]}, decoder.pt has {other}: they are no pair"

    # An alias is its full name, also where a file holds no hash; another encoder is another.
    full = {"encoder": rae_encoder.ALIASES["dinov2-base"], "encoder_size": 224, "latent_shape": [768, 16, 16]}
    rae_encoder.check_pair(full, "flow.pt", full | {"encoder": "dinov2-base"}, "decoder.pt")
    rae_encoder.check_pair(full | {"encoder": "dinov2-base"}, "flow.pt", full, "decoder.pt")
    other = full | {"encoder": "mae-base"}
    assert "no pair" in message(rae_encoder.check_pair, full, "flow.pt", other, "decoder.pt")


# ------------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        ("count", {"1": 1, "20": 20}, ["0", "-1", "1.5", "x", "", "nan"]),
        ("whole", {"0": 0, "7": 7}, ["-1", "0.5", "x"]),
        ("positive", {"0.1": 0.1, "1e3": 1000.0}, ["0", "-1", "inf", "nan", "x"]),
        ("amount", {"0": 0.0, "0.5": 0.5}, ["-0.1", "inf", "nan", "x"]),
        ("fraction", {"0": 0.0, "0.9978": 0.9978}, ["1", "-0.1", "nan", "inf", "x"]),
    ],
)
def test_bounds_are_types_of_argparse(kind, good, bad):
    convert = getattr(rae_encoder, kind)
    for text, value in good.items():
        assert convert(text) == value and type(convert(text)) is type(value)
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=f"expected a .*, got {text}$"):
            convert(text)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--batch_size 5", "unrecognized arguments: --batch_size 5 (perhaps --batch-size?)"),
        ("--encodr x", "unrecognized arguments: --encodr x (perhaps --encoder?)"),
        ("--zzzzz", "unrecognized arguments: --zzzzz; --help"),
        ("--image 5", "unrecognized arguments: --image 5"),
        ("--num 0", "argument -n/--num: expected a whole number from 1, got 0"),
        ("--workers -1", "argument --workers: expected a whole number from 0, got -1"),
        ("--data", "argument --data: expected one argument"),
        ("--preset nosuch --data x", "argument --preset: invalid choice: 'nosuch'"),
        ("--preset demo --data x", "--data x: the demo draws its own images"),
        ("--preset imagenet256", "--preset imagenet256 needs --data DIR"),
        ("--preset small", "--preset small needs --data DIR"),
    ],
)
def test_bad_flags_end_in_one_line(flags, line):
    assert line in message(rae_encoder.parse_args, flags.split())


def test_the_preset_follows_the_data_and_flags_go_over_it():
    demo, own = rae_encoder.parse_args([]), rae_encoder.parse_args(["--data", "x"])
    assert (demo.preset, demo.data, demo.encoder, demo.image_size) == ("demo", "data/demo", "test_vit", 32)
    assert (own.preset, own.data, own.encoder, own.image_size) == ("small", "x", "dinov2-small", 64)
    assert (own.encoder_size, own.encoder_weights) == (112, None)  # nothing of the demo
    large = rae_encoder.parse_args(["--data=x", "--preset=imagenet512", "--batch-size", "8"])
    assert (large.image_size, large.encoder, large.batch_size) == (512, "dinov2-base", 8)
    assert rae_encoder.parse_args(["--image-size", "48", "--seed", "3"]).image_size == 48
    assert rae_encoder.parse_args([]) == demo  # a parse leaves no trace in the presets
    # The preset's encoder in other words keeps its size; another encoder has its own.
    full = rae_encoder.ALIASES["dinov2-small"]
    assert rae_encoder.parse_args(["--data=x", "--encoder", full]).encoder_size == 112
    assert rae_encoder.parse_args(["--data=x", "--encoder", "dinov2-base"]).encoder_size is None


def test_torchrun_leaves_the_number_of_images_to_the_script():
    from torch.distributed.run import parse_args

    assert parse_args(["rae_encoder.py", "-n", "7"]).training_script_args == ["-n", "7"]
    assert rae_encoder.parse_args(["-n", "7"]).num == 7


def test_help_shows_every_default(capsys):
    with pytest.raises(SystemExit):
        rae_encoder.parse_args(["--help"])
    text = capsys.readouterr().out
    for flag, default in (("--image-size", "(32)"), ("--batch-size", "(100)"), ("--out", "(stats.pt)")):
        assert default in " ".join(text.split(flag)[-1].split()[:15])
