"""Images: their pixels, crops, listings and orders, against Pillow, torchvision and numpy."""

import errno
import hashlib
import io
import itertools
import os
import struct
import sys
import zlib

import numpy as np
import pytest
import torch
from helpers import message, picture
from PIL import Image, ImageOps
from torchvision.transforms import functional as tvf

import rae_encoder
from rae_encoder import ImageData

CPU = torch.device("cpu")


def saved(image, format="PNG", **options):
    """The image as it comes out of a file of this format."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return Image.open(file)


def batches(data, order, **options):
    return list(rae_encoder.load_images(data, order, CPU, **options))


# From a file to RGB

GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)
COLOURS = np.stack([GREY, GREY.T, GREY[::-1]], 2)


def with_alpha(alpha):
    return Image.fromarray(np.dstack([COLOURS, np.broadcast_to(alpha, (16, 16)).astype(np.uint8)]))


def over_white(alpha):
    share = np.broadcast_to(alpha, (16, 16))[..., None] / 255
    return COLOURS * share + 255 * (1 - share)


def palette(transparency):
    return saved(Image.fromarray(GREY).convert("P"), transparency=transparency)


RGB = {
    "grey": (Image.fromarray(GREY), np.dstack([GREY] * 3)),
    "16 bits": (Image.fromarray(GREY.astype(np.uint16) * 257 - GREY // 2), np.dstack([GREY] * 3)),
    "32 bits": (
        Image.fromarray(np.array([[-5, 0, 257, 65535, 70000]], np.int32)),
        np.array([[[0] * 3, [0] * 3, [1] * 3, [255] * 3, [255] * 3]]),
    ),
    "half": (with_alpha(128), over_white(128)),
    "partly clear": (with_alpha(GREY), over_white(GREY)),
    "one pixel": (with_alpha(np.eye(1, 256).reshape(16, 16)), over_white(np.eye(1, 256).reshape(16, 16))),
    "grey, clear in part": (
        Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(255 * (GREY > 9).astype(np.uint8))]),
        np.dstack([np.where(GREY > 9, GREY, 255)] * 3),
    ),
    "palette": (Image.fromarray(GREY).convert("P"), np.dstack([GREY] * 3)),
    "clear entry": (palette(7), np.dstack([np.where(GREY == 7, 255, GREY)] * 3)),
    "CMYK": (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), np.full((8, 8, 3), (255, 0, 0))),
    # An alpha that is 0 throughout is no alpha, whatever the format.
    "no alpha": (with_alpha(0), COLOURS),
    "grey, no alpha": (Image.new("LA", (3, 2), (90, 0)), np.full((2, 3, 3), 90)),
    "palette, no alpha": (palette(bytes(256)), np.dstack([GREY] * 3)),
}


@pytest.mark.parametrize("kind", RGB)
def test_every_kind_of_pixels_becomes_rgb(kind):
    image, expected = RGB[kind]
    files = [image]
    if image.mode in ("L", "LA", "RGBA", "I;16"):
        files.append(saved(image))
    if image.mode == "RGBA":
        files.append(saved(image, "WEBP", lossless=True, exact=True))
    for file in files:
        found = rae_encoder.to_rgb(file)
        assert found.mode == "RGB"
        # Laying a share on white rounds.
        rounds = kind in ("half", "partly clear", "one pixel")
        np.testing.assert_allclose(np.asarray(found, float), expected, atol=1 if rounds else 0)


def bmp_of_32_bits(bgra):
    """A BMP (V4, bit fields) with these bytes (H,W,4), whose fourth channel is declared as alpha."""
    height, width, _ = bgra.shape
    masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    fields = struct.pack("<IiiHHIIiiII", 108, width, height, 1, 32, 3, bgra.size, 2835, 2835, 0, 0)
    header = fields + masks + bytes(108 - len(fields) - len(masks))
    rows = bgra[::-1].tobytes()  # from the bottom up
    return b"BM" + struct.pack("<IHHI", 14 + len(header) + len(rows), 0, 0, 14 + len(header)) + header + rows


@pytest.mark.parametrize(("alpha", "share"), [(0, 1), (255, 1), (51, 0.2)])
def test_a_bmp_of_32_bits_is_white_only_where_its_alpha_says_so(tmp_path, alpha, share):
    bgra = np.dstack([COLOURS[..., ::-1], np.full((16, 16), alpha, np.uint8)])
    (tmp_path / "x.bmp").write_bytes(bmp_of_32_bits(bgra))
    with Image.open(tmp_path / "x.bmp") as file:
        assert file.mode == "RGBA"
    pixels = ImageData(tmp_path, 16)[0, 0][0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(pixels, COLOURS * share + 255 * (1 - share), atol=1)


@pytest.mark.parametrize("orientation", range(10))  # 0 and 9 mean nothing
def test_images_are_turned_as_pillow_does(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = saved(picture(24, 16), "JPEG", exif=exif)
    upright = ImageOps.exif_transpose(file)
    assert upright.size == ((16, 24) if orientation in range(5, 9) else (24, 16))
    assert np.array_equal(rae_encoder.to_rgb(file), upright)


LARGE = zlib.compress(bytes(3_000_000))
METADATA = {
    "EXIF": (b"eXIf", bytes.fromhex("0008000201120003")),
    "profile": (b"iCCP", b"profile\0\0" + LARGE),
    "text": (b"tEXt", b"Comment\0" + bytes(3_000_000)),
    "compressed text": (b"zTXt", b"Comment\0\0" + LARGE),
    "unicode": (b"iTXt", b"Comment\0\1\0\0\0" + LARGE),
    "XMP": (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0\xff\xfe\xe9"),
    "EXIF in text": (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n4\nno hex\n")),
}


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("kind", METADATA)
def test_metadata_never_breaks_a_picture(tmp_path, kind, behind):
    name, content = METADATA[kind]
    file = io.BytesIO()
    image = picture(24, 16)
    image.save(file, "PNG")
    png = file.getvalue()
    chunk = struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    place = len(png) - 12 if behind else 33  # before IEND, or behind IHDR
    (tmp_path / "x.png").write_bytes(png[:place] + chunk + png[place:])
    pixels, _ = ImageData(tmp_path, 16)[0, 0]
    assert np.array_equal(pixels.permute(1, 2, 0), rae_encoder.center_crop(image, 16))


def test_xmp_that_is_not_utf8_does_not_keep_a_jpeg_from_being_turned():
    turned = Image.Exif()
    turned[0x0112] = 6
    image = Image.fromarray(np.kron([[0, 255]], np.ones((8, 8))).astype(np.uint8))  # left black, right white
    file = saved(image, "JPEG", exif=turned, xmp=b'<x tiff:Orientation="6">\xff\xfe\xe9</x>')
    upright = np.asarray(rae_encoder.to_rgb(file))
    assert upright.shape == (16, 8, 3) and upright[:7].max() < 20 and upright[9:].min() > 235


@pytest.mark.parametrize("turned", [False, True])
def test_a_strip_counts_as_broken(tmp_path, turned):
    """Up to 100 times as long as wide is an image; no pixel of a longer one is looked at."""
    for name, size in {"a.png": (4, 401), "b.png": (4, 400)}.items():
        Image.new("RGB", size[::-1] if turned else size, (9, 99, 199)).save(tmp_path / name)
    size = "401 x 4" if turned else "4 x 401"
    with pytest.raises(SystemExit, match=rf"a.png: not a readable image \({size} pixels: more than 100 "):
        batches(ImageData(tmp_path, 8), [[(0, 0), (0, 1)]])
    data = ImageData(tmp_path, 8, skip_broken=True)
    ((images, _),) = batches(data, [[(0, 0), (0, 1)]])
    assert data.broken.tolist() == [True, False]
    assert (255 * images).flatten(2).unique(dim=2).flatten().tolist() == [9, 99, 199] * 2


# Crops


def test_center_crop_is_the_adm_rule():
    image = picture(300, 131)  # 131 -> 64 is more than a factor of 2: one halving first
    halved = image.resize((150, 65), Image.Resampling.BOX)
    resized = tvf.resize(halved, [64, round(150 * 64 / 65)], tvf.InterpolationMode.BICUBIC)
    assert np.array_equal(rae_encoder.center_crop(image, 64), tvf.center_crop(resized, [64, 64]))
    resized = tvf.resize(image, [64, round(300 * 64 / 131)], tvf.InterpolationMode.BICUBIC)
    assert not np.array_equal(rae_encoder.center_crop(image, 64), tvf.center_crop(resized, [64, 64]))

    pixels = np.random.default_rng(0).integers(0, 256, (32, 70, 3), dtype=np.uint8)
    halves = pixels.reshape(16, 2, 35, 2, 3).mean((1, 3))  # 32 is twice 16: a halving, and no resize after it
    image = Image.fromarray(pixels)
    np.testing.assert_allclose(rae_encoder.center_crop(image, 16), halves[:, 9:25], atol=1)  # rounded twice
    resized = image.resize((44, 20), Image.Resampling.BICUBIC)  # 70 * 20 / 32 = 43.75
    assert np.array_equal(rae_encoder.center_crop(image, 20), np.asarray(resized)[:, 12:32])
    square = image.crop((0, 0, 32, 32))
    assert np.array_equal(rae_encoder.center_crop(square, 32), square)


def test_every_window_is_as_likely():
    """The pixels of this image are their own place, and it has the size that is cropped from."""
    x, y = np.meshgrid(np.arange(15), np.arange(12))
    image = Image.fromarray(np.dstack([x, y, x]).astype(np.uint8))
    rng = np.random.default_rng(0)
    number = 4000
    counts = np.zeros((5, 8))
    for _ in range(number):
        crop = np.asarray(rae_encoder.random_crop(image, 8, rng))
        left, top, _ = crop[0, 0]
        assert crop.shape == (8, 8, 3) and crop[7, 7].tolist() == [left + 7, top + 7, left + 7]
        counts[top, left] += 1
    # Chi-squared with 39 degrees of freedom is above 72 once in a thousand.
    expected = number / counts.size
    assert ((counts - expected) ** 2 / expected).sum() < 72


# Listings


def test_natural_order_is_one_for_any_order_of_the_input():
    # Superscripts and circled digits are no digits.
    expected = ["01", "1", "9", "10", "A", "a", "a01", "a1", "a2b3", "a2b20", "B2", "b2", "b10", "b²", "①"]
    rng = np.random.default_rng(0)
    for _ in range(50):
        assert sorted(rng.permutation(expected).tolist(), key=rae_encoder.natural_key) == expected
    for names in itertools.permutations(["x1", "x01", "x001", "X1"]):
        assert sorted(names, key=rae_encoder.natural_key) == ["X1", "x001", "x01", "x1"]


def touch(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()


def listing(root):
    """The class and the name of each image, in order."""
    classes, paths, labels = rae_encoder.list_images(str(root), "--data")
    assert paths.dtype.kind == "S" and np.unique(labels).tolist() == list(range(len(classes)))
    found = []
    for label, path in zip(labels, paths, strict=True):
        folder, name = os.path.split(os.fsdecode(path))
        assert folder == classes[label]
        found.append((folder, name))
    return found


def test_classes_are_the_leaf_folders_in_natural_order(tmp_path):
    touch(tmp_path, "b/cat/1.png", "a/cat/10.PNG", "a/cat/9.JpEg", "a/Cat/1.webp", "a/10/x.bmp", "a/9/x.jpg")
    touch(tmp_path, "a/09/x.jpg", "a/②/x.jpg", "a/cat/notes.txt", "a/gif/x.gif", "a/cat/x.tar")
    (tmp_path / "empty").mkdir()
    expected = [("a/09", "x.jpg"), ("a/9", "x.jpg"), ("a/10", "x.bmp"), ("a/Cat", "1.webp")]
    expected += [("a/cat", "9.JpEg"), ("a/cat", "10.PNG"), ("a/②", "x.jpg"), ("b/cat", "1.png")]
    assert listing(tmp_path) == listing(f"{tmp_path}/") == expected
    for root in (tmp_path / "a/cat", f"{tmp_path}/a/cat/"):
        assert listing(root) == [("", "9.JpEg"), ("", "10.PNG")]
    assert listing(f"{tmp_path}/b/") == [("cat", "1.png")]


def test_hidden_names_are_skipped_and_names_that_begin_alike_are_no_mixture(tmp_path):
    touch(
        tmp_path,
        "a/1.png",
        "a/._1.png",
        ".hidden/2.png",
        "a/.ipynb_checkpoints/3.png",
        "a b/1.png",
        "a-/3.png",
    )
    assert sorted(listing(tmp_path)) == [("a", "1.png"), ("a b", "1.png"), ("a-", "3.png")]
    assert listing(tmp_path / ".hidden") == [("", "2.png")]


def test_links_are_followed_and_each_real_folder_is_listed_once(tmp_path):
    touch(tmp_path, "data/a/1.png", "far/2.png", "file/3.png")
    links = {"data/a/self": "data/a", "data/a/up": "data", "data/b": "far", "data/c": "far"}
    for link, folder in {**links, "data/a/3.png": "file/3.png"}.items():
        (tmp_path / link).symlink_to(tmp_path / folder)
    (tmp_path / "data/loop").symlink_to("loop")
    assert listing(tmp_path / "data") == [("a", "1.png"), ("a", "3.png"), ("b", "2.png")]


@pytest.mark.parametrize(
    ("files", "root", "line"),
    [
        (["x.png", "a/b/y.png"], ".", "data/.: images lie beside the class folder data/./a/b;"),
        (
            ["a/x.png", "a/b/no.txt", "a/c/d/1.png"],
            "",
            "data: images lie beside the class folder data/a/c/d;",
        ),
        (["a/x.png", "a/b/y.png", "Z/z.png"], "", "data: images lie beside the class folder data/a/b;"),
        (["x.txt", "a/.png"], "", f"data: no {' '.join(rae_encoder.EXTENSIONS)} in it"),
        ([], "none", "data/none: No such file or directory; expected a folder of images"),
        (["a/x.png"], "a/x.png", "data/a/x.png: Not a directory; expected a folder of images"),
        (["a/x.png", "shut/x.png", "z/x.png"], "", "data/shut: Permission denied; expected a folder of"),
    ],
)
def test_a_listing_says_what_is_wrong(tmp_path, monkeypatch, files, root, line):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    touch(tmp_path / "data", *files)
    scandir = os.scandir

    def refuse(folder):
        if str(folder).endswith("shut"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)  # root may read all that chmod forbids
    path = os.path.join("data", root) if root else "data"
    assert message(rae_encoder.list_images, path, "--eval-data").startswith(f"--eval-data {line}")


@pytest.mark.parametrize("parts", [["Train", "validation"], ["test", "train", "val"], ["test", "valid"]])
def test_the_parts_of_a_data_set_are_no_classes(tmp_path, parts):
    for part in (*parts, "extra"):
        touch(tmp_path, f"set/{part}/cat/1.png", f"set/{part}/dog/2.png")
    line = message(ImageData, tmp_path / "set", 8)
    assert line.startswith(f"--data {tmp_path}/set: has the parts {', '.join(parts)}; name one")
    # Of one part, or of classes that are called so in a part, nothing is to be chosen.
    assert len(ImageData(tmp_path / "set" / parts[0], 8)) == 2
    touch(tmp_path, "one/train/cat/1.png", "one/other/1.png", "deep/x/train/1.png", "deep/x/test/1.png")
    assert len(ImageData(tmp_path / "one", 8)) == len(ImageData(tmp_path / "deep", 8)) == 2


# The data set


def test_a_listing_has_a_summary_and_a_hash(tmp_path):
    """A wrong folder, such as the one above, is seen by its classes; the hash is of all paths."""
    touch(
        tmp_path, "one/a/1.png", "one/b/2.png", "two/a/1.png", "two/b/2.png", "other/a/1.png", "other/b/3.png"
    )
    touch(
        tmp_path,
        "moved/a/1.png",
        "moved/a/2.png",
        "less/a/1.png",
        "plain/1.png",
        *[f"k/{k}/x.png" for k in range(9)],
    )
    hashes = [ImageData(tmp_path / name, 8).hash for name in ("one", "two", "other", "moved", "less")]
    assert hashes[0] == hashes[1] and len(set(hashes)) == 4
    assert ImageData(tmp_path / "one", 8).summary() == f"2 images of {tmp_path}/one, classes: 2 (a, b)"
    assert ImageData(tmp_path / "k", 8).summary() == f"9 images of {tmp_path}/k, classes: 9 (0, 1, 2)"
    assert ImageData(tmp_path / "plain", 8).summary() == f"1 images of {tmp_path}/plain, classes: 1 ()"


def test_a_single_image_is_a_folder_of_one(tmp_path):
    picture(40, 30).save(tmp_path / "ü x.png")
    picture(50, 30).save(tmp_path / "other.png")
    data = ImageData(str(tmp_path / "ü x.png"), 16)
    assert len(data) == 1 and data.path(0) == str(tmp_path / "ü x.png") and data.labels.tolist() == [0]
    assert np.array_equal(data[0, 0][0].permute(1, 2, 0), rae_encoder.center_crop(picture(40, 30), 16))


def test_broken_images_are_named_or_replaced(tmp_path):
    file = io.BytesIO()
    picture(64, 64).save(file, "JPEG")
    for name, content in {"a.png": b"", "b.png": b"text", "c.jpg": file.getvalue()[:600]}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(SystemExit, match=rf"^{tmp_path}/{name}: not a readable image .*--skip-broken$"):
            batches(ImageData(tmp_path, 32), [[(0, 0)]])
        with pytest.raises(SystemExit, match=f"^{tmp_path}: every image is broken$"):
            batches(ImageData(tmp_path, 32, skip_broken=True), [[(0, 0)]])
        (tmp_path / name).unlink()

    # The next one takes its place, with the random numbers of the broken one; a worker says so, too.
    for i in range(4):
        picture(40, 60, seed=i).save(tmp_path / f"{i}.png")
    for name in ("1.png", "3.png"):
        (tmp_path / name).write_bytes(b"broken")
    data = ImageData(tmp_path, 32, "crop", skip_broken=True)
    ((images, _),) = batches(data, [[(0, 1), (0, 2), (0, 3)]], workers=1)
    assert data.broken.tolist() == [False, True, False, True]
    for image, i, source in zip(images, (1, 2, 3), (2, 2, 0), strict=True):
        crop = rae_encoder.random_crop(picture(40, 60, seed=source), 32, np.random.default_rng((0, 0, i)))
        assert np.array_equal((image * 255).round().permute(1, 2, 0), crop)


def test_odd_names_are_read_and_dangling_links_named(tmp_path):
    sizes = {"Straße 1.png": (1, 1), "a b.png": (1, 90), "日本.jpg": (50, 40)}
    if sys.platform == "linux":
        sizes[os.fsdecode(b"\xff.png")] = (9, 9)  # no UTF-8
    for name, size in sizes.items():
        Image.new("RGB", size, (200, 100, 50)).save(tmp_path / name)
    order = [[(0, i)] for i in range(len(sizes))]
    images = torch.cat([images for images, _ in batches(ImageData(tmp_path, 16), order)])
    assert (images.mean((2, 3)) * 255 - torch.tensor([200, 100, 50])).abs().max() < 3
    (tmp_path / "zz.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(SystemExit, match="zz.png: not a readable image"):
        batches(ImageData(tmp_path, 16), [[(0, i) for i in range(len(sizes) + 1)]])


def test_a_decompression_bomb_is_refused_by_name(tmp_path, monkeypatch):
    picture(40, 40).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)  # Pillow refuses twice as many
    with pytest.raises(SystemExit, match=r"bomb.png: not a readable image \(Image size \(1600 pixels\)"):
        batches(ImageData(tmp_path, 16), [[(0, 0)]])


def test_damaged_files_are_read_or_named_and_nothing_else(tmp_path):
    """A seeded fuzzer: bytes of good files are changed or cut off."""
    rng = np.random.default_rng(0)
    broken = 0
    for i in range(200):
        format = ("PNG", "JPEG", "WEBP", "BMP")[i % 4]
        file = io.BytesIO()
        picture(24, 17, seed=i).save(file, format)
        content = bytearray(file.getvalue())
        for position in rng.integers(0, len(content), rng.integers(1, 9)):
            content[position] = rng.integers(256)
        if rng.random() < 0.5:
            content = content[: rng.integers(len(content))]
        path = tmp_path / f"x.{format.lower()}"
        path.write_bytes(content)
        try:
            assert ImageData(tmp_path, 16)[0, 0][0].shape == (3, 16, 16)
        except ValueError as error:
            broken += 1
            assert str(error).startswith(f"{path}: not a readable image (") and "\n" not in str(error)
        path.unlink()
    assert 30 < broken < 190  # both happened


# Orders


def test_an_epoch_is_a_new_permutation_of_its_own():
    """Indices alone are looked at: they are shuffled, and otherwise in another epoch or with another seed."""

    def indices(seed, epoch, num=40, batch_size=8):
        steps = num // batch_size
        order = rae_encoder.training_order(num, batch_size, seed, epoch * steps, (epoch + 1) * steps)
        keys = [key for batch in order for key in batch]
        assert {e for e, _ in keys} == {epoch}
        return [i for _, i in keys]

    orders = [indices(seed, epoch) for seed, epoch in itertools.product(range(3), range(3))]
    for order in orders:
        assert sorted(order) == list(range(40))
        # A permutation of 40 has one fixed place on average, and about 20 descents.
        assert sum(i == k for k, i in enumerate(order)) < 6
        assert 10 < sum(a > b for a, b in itertools.pairwise(order)) < 30
    assert len({tuple(order) for order in orders}) == 9
    # Images that fill no batch are left out, other ones in another epoch.
    left_out = [set(range(43)) - set(indices(0, epoch, num=43)) for epoch in range(5)]
    assert {len(left) for left in left_out} == {3} and len(set(map(frozenset, left_out))) > 1


def test_an_order_goes_on_and_the_ranks_share_it():
    whole = list(rae_encoder.training_order(11, 4, seed=3, first_step=0, last_step=7))
    for first in range(7):
        assert list(rae_encoder.training_order(11, 4, 3, first, 7)) == whole[first:]
    for world in (2, 4):
        ranks = [list(rae_encoder.training_order(11, 4, 3, 2, 7, rank, world)) for rank in range(world)]
        for step, batch in enumerate(whole[2:]):
            shares = [ranks[rank][step] for rank in range(world)]
            assert [key for keys in zip(*shares, strict=True) for key in keys] == batch


@pytest.mark.parametrize("total", [1, 7, 1000])
def test_images_are_drawn_evenly(total):
    for num in {1, total // 2, total} - {0}:
        ranks = [sum(rae_encoder.even_order(total, num, 3, rank, 2), []) for rank in range(2)]
        indices = sorted(i for _, i in ranks[0] + ranks[1])
        assert indices == [i * total // num for i in range(num)] and len(set(indices)) == num
        assert max(map(len, rae_encoder.even_order(total, num, 3))) <= 3


# The demo's images


def test_the_demo_draws_the_same_pixels(tmp_path):
    rae_encoder.draw_demo(str(tmp_path / "demo"), num=40)
    digest = hashlib.sha256()
    paths = sorted((tmp_path / "demo").rglob("*.png"))
    for path in paths:
        digest.update(str(path.relative_to(tmp_path / "demo")).encode())
        digest.update(np.asarray(Image.open(path)).tobytes())
    assert digest.hexdigest()[:16] == "4a58ff58201e0563"  # with Pillow 10.1 to 13.0

    assert [path.name for path in tmp_path.iterdir()] == ["demo"]
