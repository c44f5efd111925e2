"""fid.py against slow formulas, Pillow, scipy, torchvision, and the numbers of the programs it replaces."""

import hashlib
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import tracemalloc
import zipfile
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import scipy.linalg
import timm
import torch
import torchvision
from PIL import Image, ImageOps
from safetensors.torch import save_file

import fid
import rae_encoder

# By pytorch-fid 0.3.0, torch-fidelity 0.4.0 (adm) and clean-fid 0.1.35 with the weights and images below:
# FID by each one's own function; is, prec, rec by torch-fidelity's calculate_metrics(isc_splits=1,
# samples_shuffle=False, feature_extractor="inception-v3-compat"); then the first features of the first image.
# clean-fid takes TorchScript: a trace of pytorch-fid's network.
PEERS = {
    "adm": ({"fid": 0.36064443, "is": 1.02266545, "prec": 11 / 12, "rec": 1.0}, [0.03948952, 0.20683163]),
    "pytorch-fid": ({"fid": 0.36639956}, [0.04489471, 0.20604849]),
    "clean": ({"fid": 0.37512170}, [0.04458951, 0.20594095]),
}
# The modules that hold list_images, to_rgb and center_crop in the same words.
MODULES = [fid, rae_encoder]
NUMBERS = ["fid", "prec", "rec", "num", "ref_num"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with two sets of images, a and b, and weights for Inception and for a timm model."""
    folder = tmp_path_factory.mktemp("fid")
    images(folder / "a", 12, seed=0)
    images(folder / "b", 10, seed=1)
    torch.save(weights(), folder / "inception.pth")
    torch.manual_seed(0)
    torch.save(timm.create_model("test_vit").state_dict(), folder / "test_vit.pth")
    return folder


def images(folder, count, seed):
    """Images of 40 x 32 pixels out of random squares, in two sub-folders."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        squares = np.kron(rng.integers(0, 256, (5, 4, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))
        path = folder / str(i % 2) / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(squares).save(path)


def weights():
    """A random state dict in the published format, with features of a fair scale; drawn in order of names."""
    generator, state = torch.Generator().manual_seed(0), {}
    for name, value in sorted(fid.Inception().state_dict().items()):
        x = torch.empty(value.shape).normal_(generator=generator)
        if value.ndim == 4:
            x = (x - x.mean((1, 2, 3), keepdim=True)) * (2 / value[0].numel()) ** 0.5
        elif value.ndim == 1:
            x = 1 + 0.3 * x.tanh() if name.endswith(("bn.weight", "running_var")) else 0.1 * x
        if value.ndim:
            state[name] = x
    return state


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()[:8]


def run(capsys, *argv):
    """The JSON line of the command."""
    fid.main([str(word) for word in argv] + ["--json", "--workers", "0"])
    return json.loads(capsys.readouterr().out)


def run_timm(capsys, place, *argv):
    return run(capsys, *argv, "--features", "test_vit", "--features-weights", place / "test_vit.pth")


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["adm", "pytorch-fid", "clean"])
def test_numbers_of_the_programs_it_replaces(place, capsys, protocol):
    stats, network = place / f"{protocol}.npz", ["--inception-weights", place / "inception.pth"]
    found = run(
        capsys, place / "a", "--ref", place / "b", "--protocol", protocol, *network, "--save-stats", stats
    )
    expected, first_features = PEERS[protocol]
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-4)
    np.testing.assert_allclose(np.load(stats)["features"][0, :2], first_features, rtol=1e-4)
    assert found["by"] == f"{protocol} inception {digest(place / 'inception.pth')}"
    assert (found["num"], found["ref_num"]) == (12, 10)


def test_state_dict_is_torchvisions():
    theirs = torchvision.models.inception_v3(
        num_classes=1008, aux_logits=False, init_weights=False
    ).state_dict()
    ours = fid.Inception().state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    again = fid.Inception().state_dict()  # random, but seeded
    assert all(torch.equal(ours[k], again[k]) for k in ours if k != "fc.bias")  # that one is not used


@pytest.mark.parametrize("size", [(20, 31), (400, 310)])
def test_network_inputs(size):
    array = np.random.default_rng(0).integers(0, 256, (3, *size), dtype=np.uint8)

    def bilinear(source):
        """Each output pixel from the four neighbours of its source; places outside repeat the edge."""
        x, result = array.astype(np.float64), np.empty((3, 299, 299))
        for row in range(299):
            for column in range(299):
                (i, a), (j, b) = (divmod(source(k, n), 1) for k, n in ((row, size[0]), (column, size[1])))
                i, j, i1, j1 = int(i), int(j), min(int(i) + 1, size[0] - 1), min(int(j) + 1, size[1] - 1)
                top = x[:, i, j] * (1 - b) + x[:, i, j1] * b
                result[:, row, column] = top * (1 - a) + (x[:, i1, j] * (1 - b) + x[:, i1, j1] * b) * a
        return result

    found = {p: fid.inception_input(torch.from_numpy(array)[None], p)[0].double().numpy() for p in PEERS}
    # fp32 positions are off by 1e-5 of a pixel, at up to 255 levels a pixel
    adm = bilinear(lambda k, n: k * n / 299)  # TensorFlow 1
    np.testing.assert_allclose(found["adm"] * 128 + 128, adm, atol=2e-2)
    half_pixel = bilinear(lambda k, n: max((k + 0.5) * n / 299 - 0.5, 0))  # torch
    np.testing.assert_allclose((found["pytorch-fid"] + 1) * 127.5, half_pixel, atol=2e-2)
    floats = [Image.fromarray(channel.astype(np.float32)) for channel in array]
    pillow = [image.resize((299, 299), Image.Resampling.BICUBIC) for image in floats]
    np.testing.assert_allclose(found["clean"] * 128 + 128, np.clip(pillow, 0, 255), atol=1e-4)


def random_moments(dimension, count, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, dimension)) @ rng.normal(size=(dimension, dimension)) + rng.normal(
        size=dimension
    )
    return x.mean(0), np.cov(x, rowvar=False)


def test_frechet_distance():
    one, two = random_moments(64, 500, 0), random_moments(64, 500, 1)
    root = scipy.linalg.sqrtm(one[1] @ two[1]).real
    expected = np.sum((one[0] - two[0]) ** 2) + np.trace(one[1] + two[1] - 2 * root)
    assert fid.frechet_distance(*one, *two) == pytest.approx(expected, rel=1e-6)
    assert fid.frechet_distance(*two, *one) == pytest.approx(expected, rel=1e-6)
    # covariances a I and b I, means d apart: |d|^2 + D (sqrt(a) - sqrt(b))^2
    assert fid.frechet_distance(np.zeros(8), 4 * np.eye(8), np.ones(8), 9 * np.eye(8)) == pytest.approx(
        16, rel=1e-12
    )
    assert np.isnan(fid.frechet_distance(np.full(8, np.nan), np.eye(8), np.ones(8), np.eye(8)))  # not 0
    for count in (3, 40, 500):  # singular ones too
        mu, sigma = random_moments(64, count, 2)
        assert 0 <= fid.frechet_distance(mu, sigma, mu, sigma) <= 1e-6 * np.trace(sigma)
        assert 0 <= fid.frechet_distance(mu, sigma, mu, sigma * (1 + 1e-9)) <= 1e-6 * np.trace(sigma)


def test_moments_are_numpys():
    x = np.random.default_rng(0).normal(100, 0.01, (3000, 5)).astype(np.float32)
    mu, sigma = fid.moments(torch.from_numpy(x))
    np.testing.assert_allclose(mu, x.mean(0, dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(sigma, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-9)


def test_inception_score():
    certain = 100 * torch.eye(4).repeat(5, 1)  # 4 classes, equally often and without doubt
    assert fid.inception_score(certain, torch.eye(4)) == pytest.approx(4)
    # splits of 8, 8 and 4, the first of one class alone
    order = torch.cat([certain[::4][:8].repeat(2, 1)[:8], certain[:12]])
    assert fid.inception_score(order, torch.eye(4), split_size=8) == pytest.approx((1 + 4 + 4) / 3)
    ends_in_one_class = torch.cat([certain.repeat(250, 1), certain[:1].repeat(1000, 1)])  # 5,000 and 1,000
    assert fid.inception_score(ends_in_one_class, torch.eye(4)) == pytest.approx((4 + 1) / 2)


@pytest.mark.parametrize("digits", [9, 0])
def test_precision_recall_by_loops(digits):
    """Whole numbers have points at the very radius, and points that lie on others."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(37, 3)).round(digits), rng.normal(1, 0.8, (29, 3)).round(digits)

    def share_inside(points, centres):
        radius = [
            sorted(np.linalg.norm(c - o) for o in np.delete(centres, i, 0))[2] for i, c in enumerate(centres)
        ]
        return np.mean(
            [any(np.linalg.norm(p - c) <= r for c, r in zip(centres, radius, strict=True)) for p in points]
        )

    found = fid.precision_recall(torch.from_numpy(a), torch.from_numpy(b), block=10)
    assert (
        found == pytest.approx((share_inside(a, b), share_inside(b, a))) and 0 < min(found) < max(found) < 1
    )


def open_set(path, **options):
    return fid.open_set(str(path), "--ref", 4, "a", **options)


def open_images(path, **options):
    return open_set(path, **options)[0]


def test_sources_hold_the_same_images(place, tmp_path):
    paths = sorted((place / "a").rglob("*.png"))
    array = np.stack([np.asarray(Image.open(path)) for path in paths])
    np.savez(tmp_path / "a.npz", array, np.arange(12))
    for images in (open_images(place / "a"), open_images(tmp_path / "a.npz")):
        assert np.array_equal(torch.stack([images[i] for i in range(len(images))]).permute(0, 2, 3, 1), array)
        copy = pickle.loads(pickle.dumps(images))  # as workers that are not forked get it
        assert torch.equal(copy[7], images[7])
    assert len(pickle.dumps(open_images(tmp_path / "a.npz"))) < 1000
    for source in (place / "a", tmp_path / "a.npz"):
        every = fid.Images(str(source), "--ref").items
        taken = {(4, False): [0, 1, 2, 3], (4, True): [0, 3, 6, 9], (5, True): [0, 2, 4, 7, 9]}
        for (num, spread), expected in taken.items():
            assert open_images(source, num=num, spread=spread).items == [every[i] for i in expected]
        assert open_images(source, num=99, spread=True).items == list(every)


def test_npz_of_images_is_not_read_whole(tmp_path):
    np.savez(tmp_path / "x.npz", np.zeros((1000, 128, 128, 3), np.uint8))  # 49 MB
    tracemalloc.start()
    images = open_images(tmp_path / "x.npz", num=4, spread=True)
    assert images[1].shape == (3, 128, 128)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e6


@pytest.mark.parametrize("module", MODULES)
def test_natural_order(module):
    expected = ["01", "1", "2", "10", "A", "a", "a01", "a1", "a2b3", "a2b20", "b"]
    for seed in range(5):
        shuffled = np.random.default_rng(seed).permutation(expected).tolist()
        assert module.natural_order(shuffled) == expected


def touch(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()


def listed(classes, names, labels, _left_out):
    folders = [classes[label] for label in labels]
    return [os.path.join(folder, os.fsdecode(name)) for folder, name in zip(folders, names, strict=True)]


@pytest.mark.parametrize("module", MODULES)
def test_listing_of_a_folder(tmp_path, module):
    touch(tmp_path, "10/b.PNG", "9/x.jpg", "9/notes.txt", "9/._x.jpg", "01/p10.webp", "01/p9.bmp", "1/q.jpeg")
    touch(
        tmp_path, "A/1.png", "a/1.png", "a/01.png", "b/c/deep.png", "b/c\u00b2/deep.png", "b/\u2460/deep.png"
    )
    touch(tmp_path, "gif/x.gif", ".hidden/x.png", "s/x.tar")
    (tmp_path / "empty").mkdir()
    listing = module.list_images(str(tmp_path), "--data")
    classes, names, labels, left_out = listing
    assert classes == ["01", "1", "9", "10", "A", "a", "b/c", "b/c\u00b2", "b/\u2460"]
    files = ["01/p9.bmp", "01/p10.webp", "1/q.jpeg", "9/x.jpg", "10/b.PNG", "A/1.png", "a/01.png", "a/1.png"]
    assert listed(*listing)[:8] == files
    assert labels.tolist() == [0, 0, 1, 2, 3, 4, 5, 5, 6, 7, 8]
    assert names.dtype.kind == "S" and labels.dtype == np.int32
    assert left_out == "left out: files of other kinds (3), folders without images (3)"
    assert listed(*module.list_images(f"{tmp_path}/", "")) == listed(*listing)
    flat = module.list_images(str(tmp_path / "a"), "--data")
    assert (flat[0], listed(*flat), flat[3]) == ([""], ["01.png", "1.png"], "")


@pytest.mark.parametrize("module", MODULES)
def test_listing_lists_each_real_folder_once(tmp_path, module):
    touch(tmp_path, "data/a/1.png", "far/1.png")
    (tmp_path / "data/a/parent").symlink_to(tmp_path / "data")
    (tmp_path / "data/a/self").symlink_to(tmp_path / "data/a")
    (tmp_path / "data/loop").symlink_to("loop")
    for name in ("b", "c"):
        (tmp_path / "data" / name).symlink_to(tmp_path / "far")
    (tmp_path / "far/2.png").symlink_to(tmp_path / "far/1.png")
    listing = module.list_images(str(tmp_path / "data"), "--data")
    assert listed(*listing) == ["a/1.png", "b/1.png", "b/2.png"]
    assert listing[3] == "left out: files of other kinds (1), folders listed before (3)"


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("mixed", "--data mixed: mixed/x.png lies beside the class folder mixed/a/b; move it into a folder"),
        ("deep", "--data deep: deep/a/x.png lies beside the class folder deep/a/b; move it into a folder"),
        ("none", r"--data none: no \.png .* in it; left out: files of other kinds \(1\), folders without"),
        ("missing", "--data missing: No such file or directory; expected a folder of images"),
        ("deep/a/x.png", "--data deep/a/x.png: Not a directory; expected a folder of images"),
        ("shut", "--data shut/b: Permission denied; expected a folder of images"),
    ],
)
def test_listing_says_what_is_wrong(tmp_path, monkeypatch, module, path, message):
    monkeypatch.chdir(tmp_path)
    touch(tmp_path, "mixed/x.png", "mixed/a/b/y.png", "deep/a/x.png", "deep/a/b/y.png", "deep/Z/z.png")
    touch(
        tmp_path, "none/x.txt", "shut/a/x.png", "shut/b/x.png", "shut/c/x.png", "a-b/a/x.png", "a-b/a-/x.png"
    )
    scandir = os.scandir

    def refuse(folder):  # as for a folder without permission to read, which root has everywhere
        if folder == "shut/b":
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(SystemExit, match=f"^{message}") as stop:
        module.list_images(path, "--data")
    assert "\n" not in str(stop.value)
    assert module.list_images("a-b", "")[0] == ["a", "a-"]  # neighbours, and no mixture


@pytest.mark.parametrize("module", MODULES)
def test_any_image_becomes_rgb(tmp_path, module):
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    rgb = np.stack([grey, grey.T, grey[::-1]], 2)
    clear = np.dstack([rgb, np.zeros_like(grey)])
    half = np.dstack([rgb, np.full_like(grey, 128)])
    turned = Image.Exif()
    turned[0x0112] = 6  # stored a quarter turn anticlockwise
    cases = {
        "grey": (Image.fromarray(grey), {}, np.dstack([grey] * 3)),
        "deep": (
            Image.fromarray(grey.astype(np.uint16) * 257 - grey // 2),
            {},
            np.dstack([grey] * 3),
        ),
        "clear": (Image.fromarray(clear), {}, np.full_like(rgb, 255)),
        "half": (Image.fromarray(half), {}, (rgb * (128 / 255) + 127).round()),
        "palette": (
            Image.fromarray(grey).convert("P"),
            {"transparency": 7},
            np.dstack([np.where(grey == 7, 255, grey)] * 3),
        ),
        "turned": (Image.fromarray(rgb), {"exif": turned}, np.rot90(rgb, -1)),
    }
    for name, (image, options, expected) in cases.items():
        image.save(tmp_path / f"{name}.png", **options)
        with Image.open(tmp_path / f"{name}.png") as image:
            np.testing.assert_allclose(module.to_rgb(image), expected, atol=name == "half", err_msg=name)
    cmyk = Image.fromarray(np.full((8, 8, 4), (0, 255, 255, 0), np.uint8), "CMYK")
    assert module.to_rgb(cmyk).getpixel((0, 0)) == (255, 0, 0)
    wide = Image.fromarray(np.array([[-5, 0, 257, 65535, 70000]], np.int32))  # mode I holds more than 16 bits
    assert [module.to_rgb(wide).getpixel((k, 0))[0] for k in range(5)] == [0, 0, 1, 255, 255]


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("orientation", range(10))
def test_images_are_turned_as_pillow_turns_them(tmp_path, module, orientation):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "x.png", exif=exif)
    with Image.open(tmp_path / "x.png") as image:
        assert np.array_equal(module.to_rgb(image), ImageOps.exif_transpose(image))


def with_chunk(png, name, content, behind):
    """The bytes of a PNG with one more chunk, before or behind its pixels."""
    checksum = zlib.crc32(name + content)
    chunk = len(content).to_bytes(4, "big") + name + content + checksum.to_bytes(4, "big")
    place = len(png) - 12 if behind else 33  # before IEND, or behind IHDR
    return png[:place] + chunk + png[place:]


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        (b"eXIf", bytes.fromhex("0008000201120003")),
        (b"iCCP", b"profile\0\0" + zlib.compress(bytes(3_000_000))),
        (b"zTXt", b"Comment\0\0" + zlib.compress(bytes(3_000_000))),
        (b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(bytes(3_000_000))),
        (b"tEXt", b"Comment\0" + bytes(3_000_000)),
        (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0\xff\xfe\xe9"),
        (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n4\nno hex\n")),
    ],
)
def test_metadata_does_not_make_a_png_unreadable(module, name, content, behind):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    with Image.open(io.BytesIO(with_chunk(file.getvalue(), name, content, behind))) as image:
        assert np.array_equal(module.to_rgb(image), pixels)


@pytest.mark.parametrize("module", MODULES)
def test_xmp_that_is_not_utf8_does_not_keep_a_jpeg_from_being_turned(module):
    turned = Image.Exif()
    turned[0x0112] = 6
    file = io.BytesIO()
    image = Image.fromarray(np.kron([[0, 255]], np.ones((8, 8))).astype(np.uint8))  # left black, right white
    image.save(file, "JPEG", exif=turned, xmp=b'<x tiff:Orientation="6">\xff\xfe\xe9</x>')
    with Image.open(io.BytesIO(file.getvalue())) as image:
        upright = np.asarray(module.to_rgb(image))
    assert upright.shape == (16, 8, 3) and upright[:7].max() < 20 and upright[9:].min() > 235


@pytest.mark.parametrize("module", MODULES)
def test_centre_crop_is_adms(module):
    x = np.random.default_rng(0).integers(0, 256, (32, 70, 3), dtype=np.uint8)
    halves = x.reshape(16, 2, 35, 2, 3).mean((1, 3))  # 32 is twice 16: one BOX step, and no resize after it
    found = module.center_crop(Image.fromarray(x), 16)
    np.testing.assert_allclose(found, halves[:, 9:25], atol=1)  # rounded once an axis
    resized = Image.fromarray(x).resize((44, 20), Image.Resampling.BICUBIC)  # 70 * 20 / 32 = 43.75
    assert np.array_equal(module.center_crop(Image.fromarray(x), 20), np.asarray(resized)[:, 12:32])
    assert np.array_equal(module.center_crop(Image.fromarray(x[:, :32]), 32), x[:, :32])


def test_crop_is_the_references(place, capsys, tmp_path):
    for path in sorted((place / "a").rglob("*.png")):
        fid.center_crop(fid.to_rgb(Image.open(path)), 20).save(tmp_path / path.name)
    found = run_timm(capsys, place, tmp_path, "--ref", place / "a", "--crop", 20, "--num", 12)
    assert found["fid"] < 1e-3 and (found["prec"], found["rec"], found["num"]) == (1, 1, 12)
    whole = run_timm(capsys, place, place / "a", "--ref", place / "a", "--crop", 20)
    assert whole["fid"] > 0.1  # the samples are not cropped, unlike the reference
    stats = [tmp_path / "cropped.npz", tmp_path / "whole.npz"]
    run_timm(capsys, place, place / "a", "--crop", 20, "--save-stats", stats[0])
    run_timm(capsys, place, tmp_path, "--save-stats", stats[1])
    assert run_timm(capsys, place, stats[0], "--ref", stats[1])["fid"] < 1e-3


@pytest.mark.slow
def test_saved_statistics_stand_for_the_images(place, capsys, tmp_path):
    expected = run_timm(capsys, place, place / "a", "--ref", place / "b")
    saved = run_timm(capsys, place, place / "b", "--save-stats", tmp_path / "b.npz")
    state = torch.load(place / "test_vit.pth", weights_only=True)
    content = b"".join(v.numpy().tobytes() for v in fid.TimmFeatures("test_vit", state).state_dict().values())
    assert saved["by"] == f"224px test_vit {hashlib.sha256(content).hexdigest()[:8]}"
    assert saved["ref"] is None
    save_file(state, tmp_path / "copy.safetensors")  # the same weights in another file
    copy = ["--features", "test_vit", "--features-weights", tmp_path / "copy.safetensors"]
    assert run(capsys, place / "b", "--ref", tmp_path / "b.npz", *copy)["by"] == saved["by"]
    found = run_timm(capsys, place, place / "a", "--ref", tmp_path / "b.npz")
    assert [found[key] for key in NUMBERS] == pytest.approx([expected[key] for key in NUMBERS], rel=1e-6)
    # a reference batch as ADM's: FID by mu and sigma, here shifted by 1, precision and recall by the images
    array = np.stack([np.asarray(Image.open(path)) for path in sorted((place / "b").rglob("*.png"))])
    stats = np.load(tmp_path / "b.npz")
    assert stats["made_by"] == saved["by"]
    found = run_timm(capsys, place, place / "a", "--ref", tmp_path / "b.npz", "--metrics", "rec")
    assert "fid" not in found and found["rec"] == expected["rec"]
    np.savez(tmp_path / "adm.npz", array, mu=stats["mu"] + 1, sigma=stats["sigma"])
    np.savez(tmp_path / "moments.npz", mu=stats["mu"] + 1, sigma=stats["sigma"])
    for name, allowed in {"adm": {"fid", "prec", "rec"}, "moments": {"fid"}}.items():
        found = run_timm(capsys, place, place / "b", "--ref", tmp_path / f"{name}.npz")
        assert allowed == {"fid", "prec", "rec"} & found.keys()
        assert (found["num"], found["ref_num"]) == (10, None)  # of how many images mu is, is not known
    found = run_timm(capsys, place, place / "b", "--ref", tmp_path / "adm.npz")
    assert found["fid"] == pytest.approx(len(stats["mu"]), rel=1e-5)
    assert (found["prec"], found["rec"]) == (1, 1)
    # some of the images only: statistics of all do not stand for them
    np.savez(tmp_path / "all.npz", array, mu=stats["mu"], sigma=stats["sigma"], features=stats["features"])
    np.savez(tmp_path / "first.npz", array[:4])
    np.savez(tmp_path / "spread.npz", array[[0, 2, 5, 7]])
    options = [tmp_path / "all.npz", "--ref", tmp_path / "all.npz", "--num", 4, "--ref-num", 4]
    found = run_timm(capsys, place, *options)
    expected = run_timm(capsys, place, tmp_path / "first.npz", "--ref", tmp_path / "spread.npz")
    assert [found[key] for key in NUMBERS] == pytest.approx([expected[key] for key in NUMBERS], rel=1e-6)


def test_a_full_disk_ends_in_one_line(place, tmp_path, monkeypatch):
    def full(file, **_arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    words = [
        place / "a",
        "--features=test_vit",
        f"--features-weights={place / 'test_vit.pth'}",
        "--workers=0",
    ]
    with pytest.raises(SystemExit, match=r"^--save-stats .*x\.npz: No space left on device$"):
        fid.main([str(word) for word in [*words, "--save-stats", tmp_path / "x.npz"]])
    assert not list(tmp_path.iterdir())


def test_batch_sizes_and_workers_agree(place, capsys):
    command = [place / "a", "--ref", place / "b"]
    one = run_timm(capsys, place, *command)
    for options in (["--batch-size", 5], ["--batch-size", 7, "--workers", 2]):
        found = run_timm(capsys, place, *command, *options)
        assert [found[key] for key in NUMBERS] == pytest.approx([one[key] for key in NUMBERS], rel=1e-5)


def test_what_belongs_to_the_demo_is_for_the_demo_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chosen = ("ref", "inception_weights", "num", "ref_num")

    def values(*argv):
        args = fid.parse_args([*argv, "--metrics", "is"])
        return tuple(getattr(args, name) for name in chosen)

    demo, normal = ("data/demo", "random", 200, 200), (None, "hub", None, None)
    touch(tmp_path, "mine/0.png")
    for name, settings in {
        "drawn": '{"demo": true, "seed": 0}',
        "real": '{"demo": false}',
        "old": "{}",
        "list": "[]",
        "text": '{"demo": "yes"}',
        "cut": '{"dem',
        "void": "",
    }.items():
        touch(tmp_path, f"{name}/0.png")
        (tmp_path / name / "settings.json").write_text(settings)
        assert values(name) == (demo if name == "drawn" else normal)
    assert values("mine") == values("nowhere") == values("x.npz") == normal
    assert values("mine", "--preset", "demo") == demo
    assert values("drawn", "--num", "5", "--inception-weights", "hub") == ("data/demo", "hub", 5, 200)
    assert values("drawn", "--ref", "y") == ("y", "hub", None, None)
    for preset in ("small", "imagenet256", "imagenet512"):
        assert values("drawn", "--preset", preset) == normal
    assert values("drawn", "--save-stats", "x.npz") == normal
    with pytest.raises(SystemExit, match="--ref is missing: name a folder or an .npz"):
        for name in ("0.png", "1.png", "2.png", "3.png"):
            Image.new("RGB", (8, 8)).save(tmp_path / "mine" / name)
        fid.main(["mine"])


@pytest.mark.slow
def test_first_line_and_numbers(capsys, place):
    """The demo says so, few images too, convolutions are exact, and metrics are asked for in any case."""
    torch.backends.cudnn.allow_tf32 = True  # as torch has it
    words = [place / "a", "--ref", place / "b", "--inception-weights=random", "--num=4", "--ref-num=4"]
    fid.main([str(word) for word in [*words, "--metrics", "FID,Is", "--device", "cpu"]])
    assert not torch.backends.cudnn.allow_tf32
    out = capsys.readouterr()
    first = out.err.splitlines()[0]
    assert "compare with nothing" in first and "FID of fewer than 2048" in first and "fp32 on cpu" in first
    assert [line.split()[0] for line in out.out.splitlines()] == ["fid", "is"]


def test_what_is_left_out_is_said(capsys, place, tmp_path):
    images(tmp_path, 10, seed=1)
    (tmp_path / "0/notes.txt").touch()
    (tmp_path / "2").mkdir()
    weights = ["--features", "test_vit", "--features-weights", place / "test_vit.pth", "--workers", "0"]
    fid.main([str(word) for word in [place / "a", "--ref", tmp_path, *weights]])
    first = capsys.readouterr().err.splitlines()[0]
    assert f"{tmp_path} left out: files of other kinds (1), folders without images (1)" in first


@pytest.mark.slow
def test_interrupt_ends_in_one_line(place):
    """Ctrl-C as a terminal sends it: to the process and to its workers."""
    weights = ["--features", "test_vit", "--features-weights", place / "test_vit.pth"]
    words = [sys.executable, fid.__file__, place / "a", "--ref", place / "b", "--workers=2", "--batch-size=1"]
    process = subprocess.Popen(
        [str(word) for word in [*words, *weights]],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    line = process.stderr.readline()  # what is compared: then the images come
    os.killpg(process.pid, signal.SIGINT)
    out, rest = process.communicate(timeout=120)
    assert process.returncode == 130 and out == "" and "fp32 on" in line
    assert rest.splitlines()[-1].startswith("interrupted; nothing was written")
    assert "Traceback" not in rest


def test_position_embedding_as_dinov2s_authors_resize_it():
    model = timm.create_model("vit_small_patch14_dinov2", depth=1)  # 518 px: 37 x 37 patches
    torch.nn.init.normal_(model.pos_embed, generator=torch.Generator().manual_seed(0))
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("blocks.")}
    full = timm.create_model("vit_small_patch14_dinov2").state_dict() | state
    network = fid.TimmFeatures("dinov2-small", full)
    found = network.model.pos_embed[0, 1:].reshape(16, 16, 384)
    assert torch.equal(network.model.pos_embed[:, :1], model.pos_embed[:, :1])

    # Their interpolate_pos_encoding: bicubic (Keys, a = -0.75), no antialias, half-pixel centres, the scale
    # (16 + 0.1) / 37. One axis after the other, by loops; places outside repeat the edge.
    def weight(x):
        x = abs(x)
        inner, outer = 1.25 * x**3 - 2.25 * x**2 + 1, -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
        return inner if x <= 1 else outer if x < 2 else 0

    matrix = np.zeros((16, 37))
    for i in range(16):
        source = (i + 0.5) / (16.1 / 37) - 0.5
        for j in range(int(np.floor(source)) - 1, int(np.floor(source)) + 3):
            matrix[i, min(max(j, 0), 36)] += weight(source - j)
    native = model.pos_embed[0, 1:].detach().reshape(37, 37, 384).double().numpy()
    expected = np.einsum("ia,jb,abc->ijc", matrix, matrix, native)
    np.testing.assert_allclose(found.detach(), expected, atol=3e-5)  # positions in fp32: 4e-6 of a patch
    with torch.inference_mode():
        features = network(torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8))
    assert features.shape == (2, 384) and features.isfinite().all()


def test_damaged_npz_end_in_one_line(tmp_path):
    """Random truncations and bit flips of two whole files: a set or SystemExit."""
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "images.npz", rng.integers(0, 256, (4, 4, 5, 3), dtype=np.uint8))
    x = rng.normal(size=(9, 4)).astype(np.float32)
    np.savez(tmp_path / "stats.npz", mu=x.mean(0), sigma=np.cov(x.T), features=x, made_by="a")
    refused = 0
    for case in range(400):
        data = bytearray((tmp_path / ("images.npz", "stats.npz")[case % 2]).read_bytes())
        if case % 4 < 2:
            data = data[: rng.integers(len(data))]
        for place in rng.integers(0, len(data), 1 + case % 7) if data else ():
            data[place] ^= 1 << rng.integers(8)
        (tmp_path / "damaged.npz").write_bytes(data)
        try:
            found, statistics = open_set(tmp_path / "damaged.npz")
            assert statistics is None or np.isfinite(statistics.sigma).all()
            for image in found or ():
                assert image.shape == found[0].shape
        except SystemExit as stop:
            refused += 1
            assert "damaged.npz: " in str(stop) and "\n" not in str(stop)
    assert 200 < refused < 400


def npy(header, data=b""):
    """The bytes of an .npy whose header says what it likes."""
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '|u1', 'fortran_order': False, 'shape': (-4, -8, 8, 3)}",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (4000000000000, 8, 8, 3)}",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (4000000000000, 0, 8, 3)}",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (0, 8, 8, 3)}",
        "{'descr': '|u1', 'fortran_order': True, 'shape': (4, 8, 8, 3)}",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (4, 8, 8)}",
        "{'descr': '|u1', 'fortran_order': False, 'shape': ()}",
        "{'descr': '|O', 'fortran_order': False, 'shape': (4, 8, 8, 3)}",
        "{'descr': '|u1', 'fortran_order': False}",
        "__import__('os').abort()",
    ],
)
def test_hostile_npz_headers(tmp_path, header):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("arr_0.npy", npy(header, bytes(4 * 8 * 8 * 3)))
    with pytest.raises(SystemExit, match=r"x\.npz: [^;\n]{9}[^\n]+; expected a whole \.npz of [^\n]+$"):
        open_set(tmp_path / "x.npz")


@pytest.mark.slow
def test_hostile_images(tmp_path):
    """Every file by itself, beside a good one of its size: its name in one line, or its pixels."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 8
    good = {
        "spaces and \u00e9\u4e2d.png": lambda file: Image.fromarray(noise).save(file),
        "cmyk.jpg": lambda file: Image.fromarray(noise).convert("CMYK").save(file),
        "deep.png": lambda file: Image.fromarray(noise[..., 0].astype(np.uint16) * 257).save(file),
        "palette.png": lambda file: Image.fromarray(noise).convert("P").save(file, transparency=3),
        "bits.png": lambda file: Image.fromarray(noise).convert("1").save(file),
        "turned.jpg": lambda file: Image.fromarray(noise).save(file, exif=turned),
        "upper.JPEG": lambda file: Image.fromarray(noise).save(file, "JPEG"),
    }
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG")
    bad = {
        "truncated.jpg": lambda file: file.write_bytes(buffer.getvalue()[:700]),
        "zero.png": lambda file: file.write_bytes(b""),
        "text.png": lambda file: file.write_text("hello\n"),
        "bomb.png": lambda file: Image.new("1", (20000, 20000)).save(file),
        "dangling.png": lambda file: file.symlink_to(tmp_path / "nowhere.png"),
        "flat.png": lambda file: Image.new("RGB", (4000, 1)).save(file),
        "new\nline.png": lambda file: file.write_bytes(b""),
        "dot.png": lambda file: Image.new("RGB", (1, 1)).save(file),
    }
    for number, (name, write) in enumerate((good | bad).items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name_of_good in ("000.png", "001.png", "002.png"):
            Image.fromarray(noise).save(folder / name_of_good)
        write(folder / name)
        images = open_images(folder)
        if name in good:
            assert images[3].shape == (3, 64, 64)
        else:
            assert repr(name)[1:-1] in images[3] and "\n" not in images[3]
    assert open_images(folder, crop=32)[3].shape == (3, 32, 32)  # 1 x 1, scaled up


@pytest.mark.slow
def test_download_checks_the_hash(place, tmp_path, monkeypatch):
    """The released file's name ends in the first digits of its SHA-256: any other content is refused."""
    torch.save({"weight": torch.zeros(2)}, tmp_path / "pt_inception-2015-12-05-6726825d.pth")
    monkeypatch.setattr(fid, "HUB_URL", (tmp_path / "pt_inception-2015-12-05-6726825d.pth").as_uri())
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    with pytest.raises(SystemExit, match="invalid hash value"):
        fid.load_network(None, "adm", "hub")
    assert not list((tmp_path / "hub").rglob("*.pth"))
    released = tmp_path / f"inception-{digest(place / 'inception.pth')}.pth"
    released.symlink_to(place / "inception.pth")
    monkeypatch.setattr(fid, "HUB_URL", released.as_uri())
    fetched, copied = (fid.load_network(None, "adm", weights)[1] for weights in ("hub", str(released)))
    assert fetched == copied == f"adm inception {digest(released)}"


@pytest.fixture
def server(monkeypatch, tmp_path):
    """An HTTP server of files {path: (bytes that arrive, length that is promised)}; it counts the requests.

    Returns files, requests, its address; torch.hub's folder is a new one.
    """
    files = {}
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            if self.path not in files:
                return self.send_error(404)
            content, length = files[self.path]
            self.send_response(200)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield files, requests, f"http://127.0.0.1:{http.server_port}"
    http.shutdown()
    http.server_close()


def npz_bytes(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def test_reference_batches_are_fetched_once(place, capsys, monkeypatch, server, tmp_path):
    files, requests, address = server
    monkeypatch.chdir(tmp_path)
    touch(tmp_path, "imagenet256/0.png")  # the name means the reference batch all the same
    monkeypatch.setattr(fid, "REFERENCES", {"imagenet256": f"{address}/256/batch.npz"})
    array = np.stack([np.asarray(Image.open(path)) for path in sorted((place / "b").rglob("*.png"))])
    content = npz_bytes(arr_0=array, mu=np.zeros(64), sigma=np.eye(64))
    files["/256/batch.npz"] = (content, len(content))
    (tmp_path / "copy.npz").write_bytes(content)
    images = ("--ref-num", 99)  # not its mu and sigma, which would be of Inception
    expected = run_timm(capsys, place, place / "a", "--ref", tmp_path / "copy.npz", *images)
    first = run_timm(capsys, place, place / "a", "--ref", "imagenet256", *images)
    assert first == expected | {"ref": "imagenet256"} and requests == ["/256/batch.npz"]
    folder = tmp_path / "hub/hub/checkpoints"
    assert [path.name for path in folder.iterdir()] == ["batch.npz"]
    assert (folder / "batch.npz").read_bytes() == content
    assert run_timm(capsys, place, place / "a", "--ref", "imagenet256", *images) == first
    assert requests == ["/256/batch.npz"]  # no second one


def test_a_reference_batch_that_cannot_be_fetched(capsys, server, tmp_path):
    files, _, address = server
    whole = npz_bytes(arr_0=np.zeros((4, 64, 64, 3), np.uint8), mu=np.zeros(64), sigma=np.eye(64))
    damaged = bytearray(whole)
    damaged[len(whole) // 4] ^= 1
    lacking = npz_bytes(arr_0=np.zeros((4, 64, 64, 3), np.uint8), mu=np.zeros(64))
    for name, content, length in (
        ("cut", whole[: len(whole) // 2], len(whole)),
        ("tail", whole[:-30], len(whole)),
        ("damaged", bytes(damaged), len(whole)),
        ("lacking", lacking, len(lacking)),
        ("page", b"<html>", 6),
    ):
        files[f"/{name}.npz"] = (content, length)
    free = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)  # a port where nothing listens
    free.server_close()
    for url, reason in {
        f"{address}/cut.npz": "BadZipFile.*File is not a zip file",
        f"{address}/tail.npz": "BadZipFile.*File is not a zip file",
        f"{address}/damaged.npz": "not a whole .npz of mu, sigma and arr_0",
        f"{address}/lacking.npz": "not a whole .npz of mu, sigma and arr_0",
        f"{address}/page.npz": "BadZipFile.*File is not a zip file",
        f"{address}/none.npz": "404: 'Not Found'",
        f"http://127.0.0.1:{free.server_port}/x.npz": "Connection refused",
    }.items():
        with pytest.raises(
            SystemExit, match=f"^--ref: {url}: .*{reason}.*; --ref FILE takes a local"
        ) as stop:
            fid.fetch(url, "--ref")
        assert "\n" not in str(stop.value)
        assert capsys.readouterr().err.startswith(f"fetching {url}\n")  # before anything else
    assert not list((tmp_path / "hub/hub/checkpoints").iterdir())
    # torch.hub by itself takes half of a file for the whole: without check_reference it would stay.
    torch.hub.download_url_to_file(f"{address}/cut.npz", str(tmp_path / "cut.npz"), progress=False)
    assert (tmp_path / "cut.npz").read_bytes() == whole[: len(whole) // 2]


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "test_vit"])
def test_timm_features(name):
    """What the model computes of Pillow's resized image; the first has more features than its last block."""
    network = fid.TimmFeatures(name, timm.create_model(name).state_dict())
    image = np.random.default_rng(0).integers(60, 196, (300, 320, 3), dtype=np.uint8)  # stays in [0,255]
    seen = []
    network.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.inference_mode():
        features = network(torch.from_numpy(image).permute(2, 0, 1)[None])
    assert features.shape == (1, network.width)
    small = np.asarray(Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC), np.float32)
    config = timm.get_pretrained_cfg(name)
    expected = (small / 255 - np.float32(config.mean)) / np.float32(config.std)
    differ = np.abs(seen[0][0].permute(1, 2, 0).numpy() - expected) * np.float32(config.std) * 255
    assert differ.max() < 1.01 and (differ > 0.01).mean() < 0.3  # Pillow rounds after each axis, we once


@pytest.fixture(scope="module")
def bad(place):
    """Inputs that can't be used, by name."""
    Image.new("RGB", (32, 32)).save(place / "square.png")
    for name, files in {
        "empty": [],
        "one": ["x.png"],
        "broken": ["v.png", "w.png", "x.png", "y.png"],
        "sizes": ["v.png", "w.png", "x.png", "y.png"],
    }.items():
        (place / name).mkdir()
        for file in files:
            Image.new("RGB", (32, 32)).save(place / name / file)
    (place / "broken" / "y.png").write_bytes(b"no image")
    Image.new("RGB", (32, 48)).save(place / "sizes" / "y.png")
    (place / "junk.npz").write_bytes(b"no zip")
    zeros, one = np.zeros(64), np.eye(64)
    good = dict(mu=zeros, sigma=one, features=one)
    for key in ("mu", "sigma"):
        np.savez(place / f"nan_{key}.npz", **good | {key: good[key] * np.nan})
    np.savez(place / "shapes.npz", mu=zeros, sigma=one[:63])
    np.savez(place / "half.npz", sigma=one)
    np.savez(place / "small.npz", mu=zeros[:4], sigma=one[:4, :4])
    np.savez(place / "whole.npz", mu=zeros, sigma=one)
    np.savez(place / "lone.npz", mu=zeros)
    np.savez(place / "other.npz", mu=np.zeros(64), sigma=np.eye(64), made_by="clean inception 6726825d")
    np.savez(place / "floats.npz", np.zeros((4, 8, 8, 3)))
    np.savez_compressed(place / "packed.npz", np.zeros((4, 8, 8, 3), np.uint8))
    torch.save({"weight": torch.zeros(2)}, place / "wrong.pth")
    (place / "code.pth").write_bytes(pickle.dumps(os.getcwd, 2))
    return place


@pytest.mark.parametrize(
    ("samples", "options", "message"),
    [
        ("nowhere", "", "^the set nowhere: No such file or directory; expected a folder of images$"),
        ("nowhere.npz", "", "^the set nowhere.npz: FileNotFoundError.*No such file.*; expected a whole .npz"),
        ("empty", "", "^the set empty: no .png .jpg"),
        ("one", "", "^the set one: 1 images, at least 4"),
        (
            "broken",
            "",
            "^'broken/y.png': not a readable image .*cannot identify image file.*; repair or remove",
        ),
        ("broken", "--workers 1", "^'broken/y.png': not a readable image .*cannot identify"),
        ("sizes", "", r"^'sizes/y.png' is \[3, 48, 32\], 'sizes/v.png' is \[3, 32, 32\]; --crop .*reference"),
        ("junk.npz", "", "^the set junk.npz: BadZipFile.*; expected a whole .npz"),
        ("nan_mu.npz", "", "not finite"),
        ("nan_sigma.npz", "", "not finite"),
        (
            "shapes.npz",
            "",
            r"the set shapes.npz: .*\(64,\), sigma \(63, 64\) by .* not of 64 feat",
        ),
        ("half.npz", "", "0 images, at least 4"),
        ("floats.npz", "", "float64"),
        ("packed.npz", "", "compressed"),
        ("small.npz", "--num 3", "^the set small.npz: has no images to take 3 of"),
        ("a", "--ref whole.npz --ref-num 9", "^--ref whole.npz: has no images to take 9 of"),
        ("a", "--ref whole.npz --crop 8", "--ref whole.npz: --crop 8 can't crop"),
        ("a", "--ref small.npz", r"--ref small.npz: .*mu \(4,\).* not of 64 features"),
        (
            "a",
            "--features-weights wrong.pth",
            "^--features test_vit --features-weights wrong.pth: .*Missing key",
        ),
        (
            "a",
            "--save-stats nowhere/x.npz",
            "argument --save-stats: expected an .npz in a folder.*, got nowhere/x.npz; --help lists",
        ),
        ("a", "--save-stats x", "argument --save-stats: expected an .npz in a folder.*, got x; --help lists"),
        ("whole.npz", "--metrics is", "allow fid"),
        (
            "other.npz",
            "",
            "the set other.npz: .* by clean inception 6726825d; not of 64 features by 224px",
        ),
        (
            "a",
            "--metrics fid,kid",
            "argument --metrics: expected some of fid,is,prec,rec.*, got fid,kid; --help lists",
        ),
        ("a", "--num 0", "argument --num: expected a whole number from 1.*, got 0; --help lists"),
        (
            "a",
            "--batch-size 1.5",
            "argument --batch-size: expected a whole number from 1.*, got 1.5; --help lists",
        ),
        ("a", "--workers -1", "argument --workers: expected a whole number from 0.*, got -1; --help lists"),
        ("a", "--device cpux", "argument --device: cpux: no such device"),
        ("a", "--device meta:x", "argument --device: meta:x: no such device"),
        ("a", "--metric fid", r"unrecognized arguments: --metric fid \(perhaps --metrics\?\)"),
        ("a", "--zzz=1", "unrecognized arguments: --zzz=1; --help lists the flags$"),
        ("a", "--protocol tf", "argument --protocol: invalid choice: 'tf'"),
        ("a", "--ref whole.npz --metrics prec", r"--metrics: these sets allow fid \("),
        ("lone.npz", "", "sigma is not a file in the archive"),
        ("a", "--features no_such_model", "^--features no_such_model: no model that timm knows"),
        (
            "a",
            "--features-weights no.pth",
            "^--features test_vit --features-weights no.pth: .*No such file.*; FILE is",
        ),
        (
            "a",
            "--features-weights code.pth",
            "--features-weights code.pth: UnpicklingError.((?!will likely succeed).)*; FILE is",
        ),
        (
            "a",
            "--features= --features-weights hub --inception-weights wrong.pth",
            "Missing key.*Conv2d_1a_3x3.conv.weight",
        ),
        ("a", "--features=", "--features-weights needs --features"),
        ("a", "--protocol clean", "--protocol and --inception-weights are of Inception, not of --features"),
        ("a", "--inception-weights random", "are of Inception, not of --features"),
        (
            "a",
            "--ref imagenet256",
            "--ref imagenet256: its mu and sigma .*; --ref-num 10000 takes its images",
        ),
        ("a", "--ref imagenet512 --features= --features-weights hub --protocol clean", "its mu and sigma"),
    ],
)
def test_bad_input_ends_in_one_line(bad, monkeypatch, samples, options, message):
    monkeypatch.chdir(bad)
    words = f"{samples} --ref b --workers 0 --features test_vit --features-weights test_vit.pth {options}"
    with pytest.raises(SystemExit, match=message) as stop:
        fid.main(words.split())
    assert "\n" not in str(stop.value)


@pytest.mark.slow
def test_weights_by_their_name_on_the_hub(tmp_path, monkeypatch, capsys):
    torch.save(fid.Inception().state_dict(), tmp_path / "inception.pt")
    asked = []

    def download(repository, name):
        asked.append((repository, name))
        if name == "gone.pt":
            raise OSError("no such entry")
        return str(tmp_path / name.rpartition("/")[2])

    monkeypatch.setattr(fid, "hf_hub_download", download)
    _, by_name = fid.load_network(None, "adm", "hub:owner/repo/deep/inception.pt")
    _, by_file = fid.load_network(None, "adm", str(tmp_path / "inception.pt"))
    assert by_name == by_file and asked == [("owner/repo", "deep/inception.pt")]
    assert "fetching hub:owner/repo/deep/inception.pt" in capsys.readouterr().err
    for name in ("hub:owner/repo/gone.pt", "hub:owner"):
        with pytest.raises(SystemExit, match=f"^--inception-weights {name}: ") as stop:
            fid.load_network(None, "adm", name)
        assert "\n" not in str(stop.value)
