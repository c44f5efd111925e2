"""fid.py against slow formulas, Pillow, scipy, torchvision, and the numbers of the programs it replaces."""

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest
import scipy.linalg
import timm
import torch
import torchvision
from PIL import Image

import fid

# By pytorch-fid 0.3.0, torch-fidelity 0.4.0 (adm) and clean-fid 0.1.35 with the weights and images below:
# FID by each one's own function; is, prec, rec by torch-fidelity's calculate_metrics(isc_splits=1,
# samples_shuffle=False, feature_extractor="inception-v3-compat"); then the first features of the first image.
# clean-fid takes TorchScript: a trace of pytorch-fid's network.
PEERS = {
    "adm": ({"fid": 0.36064443, "is": 1.02266545, "prec": 11 / 12, "rec": 1.0}, [0.03948952, 0.20683163]),
    "pytorch-fid": ({"fid": 0.36639956}, [0.04489471, 0.20604849]),
    "clean": ({"fid": 0.37512170}, [0.04458951, 0.20594095]),
}
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


def test_sources_hold_the_same_images(place, tmp_path):
    folder = fid.ImageSet(str(place / "a"), "")
    paths = sorted((place / "a").rglob("*.png"))
    array = np.stack([np.asarray(Image.open(path)) for path in paths])
    np.savez(tmp_path / "a.npz", array, np.arange(12))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for path in reversed(paths):
            tar.add(path, path.relative_to(place))
    for images in (
        folder,
        fid.ImageSet(str(tmp_path / "a.npz"), ""),
        fid.ImageSet(str(tmp_path / "a.tar"), ""),
    ):
        assert np.array_equal(torch.stack([images[i] for i in range(len(images))]).permute(0, 2, 3, 1), array)
    first = fid.ImageSet(str(place / "a"), "", num=3)
    spread = fid.ImageSet(str(place / "a"), "", num=3, spread=True)
    assert [images.items for images in (first, spread)] == [folder.items[:3], folder.items[::4]]
    spread = fid.ImageSet(str(place / "a"), "", num=5, spread=True)
    assert spread.items == [folder.items[i] for i in (0, 2, 4, 7, 9)]
    for name in ("9.png", "b.png", "10.png"):  # by characters, as in the other programs
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    assert [item[0] for item in fid.ImageSet(str(tmp_path), "").items] == ["10.png", "9.png", "b.png"]


def test_any_image_becomes_rgb(tmp_path):
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
            np.testing.assert_allclose(fid.to_rgb(image), expected, atol=name == "half", err_msg=name)
    cmyk = Image.fromarray(np.full((8, 8, 4), (0, 255, 255, 0), np.uint8), "CMYK")
    assert fid.to_rgb(cmyk).getpixel((0, 0)) == (255, 0, 0)


def test_centre_crop_is_adms():
    x = np.random.default_rng(0).integers(0, 256, (32, 70, 3), dtype=np.uint8)
    halves = x.reshape(16, 2, 35, 2, 3).mean((1, 3))  # 32 is twice 16: one BOX step, and no resize after it
    np.testing.assert_allclose(
        fid.to_rgb(Image.fromarray(x), 16), halves[:, 9:25], atol=1
    )  # rounded once an axis
    resized = Image.fromarray(x).resize((44, 20), Image.Resampling.BICUBIC)  # 70 * 20 / 32 = 43.75
    assert np.array_equal(fid.to_rgb(Image.fromarray(x), 20), np.asarray(resized)[:, 12:32])
    assert np.array_equal(fid.to_rgb(Image.fromarray(x[:, :32]), 32), x[:, :32])


def test_crop_is_the_references(place, capsys, tmp_path):
    for path in sorted((place / "a").rglob("*.png")):
        fid.to_rgb(Image.open(path), 20).save(tmp_path / path.name)
    found = run_timm(capsys, place, tmp_path, "--ref", place / "a", "--crop", 20, "--num", 12)
    assert found["fid"] < 1e-3 and (found["prec"], found["rec"], found["num"]) == (1, 1, 12)
    whole = run_timm(capsys, place, place / "a", "--ref", place / "a", "--crop", 20)
    assert whole["fid"] > 0.1  # the samples are not cropped, unlike the reference
    stats = [tmp_path / "cropped.npz", tmp_path / "whole.npz"]
    run_timm(capsys, place, place / "a", "--crop", 20, "--save-stats", stats[0])
    run_timm(capsys, place, tmp_path, "--save-stats", stats[1])
    assert run_timm(capsys, place, stats[0], "--ref", stats[1])["fid"] < 1e-3


def test_saved_statistics_stand_for_the_images(place, capsys, tmp_path):
    expected = run_timm(capsys, place, place / "a", "--ref", place / "b")
    saved = run_timm(capsys, place, place / "b", "--save-stats", tmp_path / "b.npz")
    assert saved["ref"] is None and saved["by"] == f"224px test_vit {digest(place / 'test_vit.pth')}"
    found = run_timm(capsys, place, place / "a", "--ref", tmp_path / "b.npz")
    assert [found[key] for key in NUMBERS] == pytest.approx([expected[key] for key in NUMBERS], rel=1e-6)
    # a reference batch as ADM's: FID by mu and sigma, here shifted by 1, precision and recall by the images
    array = np.stack([np.asarray(Image.open(path)) for path in sorted((place / "b").rglob("*.png"))])
    stats = np.load(tmp_path / "b.npz")
    assert stats["made_by"] == saved["by"]
    found = run_timm(capsys, place, place / "a", "--ref", tmp_path / "b.npz", "--metrics", "rec")
    assert not {"fid", "prec"} & found.keys() and found["rec"] == expected["rec"]
    np.savez(tmp_path / "adm.npz", array, mu=stats["mu"] + 1, sigma=stats["sigma"])
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


def test_two_processes_and_batch_sizes_agree(place, capsys):
    options = ["--features", "test_vit", "--features-weights", place / "test_vit.pth"]
    command = [str(word) for word in [place / "a", "--ref", place / "b", *options]]
    one, small = (run(capsys, *command, "--batch-size", size) for size in (32, 5))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    words = [*torchrun, fid.__file__, *command, "--json", "--workers=1"]
    two = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert two.returncode == 0, two.stderr
    for found in (small, json.loads(two.stdout)):
        assert [found[key] for key in NUMBERS] == pytest.approx([one[key] for key in NUMBERS], rel=1e-5)


def test_the_demo_is_what_runs_without_a_reference(capsys, place):
    demo, real = fid.parse_args(["x"]), fid.parse_args(["x", "--ref", "y"])
    assert (demo.ref, demo.inception_weights, demo.num, demo.ref_num) == ("data/demo", "random", 400, 400)
    assert (real.ref, real.inception_weights, real.num, real.ref_num) == ("y", "hub", None, None)
    torch.backends.cudnn.allow_tf32 = True  # as torch has it
    fid.main(
        [str(place / "a"), "--ref", str(place / "b"), "--inception-weights=random", "--num=2", "--ref-num=2"]
    )
    assert not torch.backends.cudnn.allow_tf32
    out = capsys.readouterr()
    assert "compare with nothing" in out.err.splitlines()[0] and "FID of fewer than 2048" in out.err
    assert out.out.startswith("fid ")


def test_position_embedding_as_dinov2s_authors_resize_it(tmp_path):
    model = timm.create_model("vit_small_patch14_dinov2", depth=1)  # 518 px: 37 x 37 patches
    torch.nn.init.normal_(model.pos_embed, generator=torch.Generator().manual_seed(0))
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("blocks.")}
    full = timm.create_model("vit_small_patch14_dinov2").state_dict() | state
    torch.save(full, tmp_path / "vit.pth")
    network = fid.TimmFeatures("dinov2-small", str(tmp_path / "vit.pth"))
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
    """Random truncations and bit flips of two whole files: an ImageSet or SystemExit."""
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "images.npz", rng.integers(0, 256, (3, 4, 5, 3), dtype=np.uint8))
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
            images = fid.ImageSet(str(tmp_path / "damaged.npz"), "--ref")
            assert images.mu is None or np.isfinite(images.sigma).all()
            for i in range(len(images.items)):
                assert images[i].shape == images.shape
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
    with pytest.raises(SystemExit, match=r"x\.npz: [^;\n]{9}[^\n]+$"):
        fid.ImageSet(str(tmp_path / "x.npz"), "")


def test_zip_bombs_are_not_unpacked(tmp_path):
    for name, shape in {"sigma": (20000, 20000), "arr_0": (10**6, 8, 8, 3)}.items():
        header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}}}"
        with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("mu.npy", npy("{'descr': '<f8', 'fortran_order': False, 'shape': (0,)}"))
            archive.writestr(f"{name}.npy", npy(header, bytes(10**7)))
        with pytest.raises(SystemExit, match="it is a zip bomb"):
            fid.ImageSet(str(tmp_path / "bomb.npz"), "")


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
        "folder.png": lambda file: file.mkdir(),
        "flat.png": lambda file: Image.new("RGB", (4000, 1)).save(file),
        "new\nline.png": lambda file: file.write_bytes(b""),
        "dot.png": lambda file: Image.new("RGB", (1, 1)).save(file),
    }
    for number, (name, write) in enumerate((good | bad).items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        Image.fromarray(noise).save(folder / "000.png")
        write(folder / name)
        images = fid.ImageSet(str(folder), "--ref")
        if name in good:
            assert images[1].shape == (3, 64, 64)
        else:
            with pytest.raises(ValueError, match=name.replace("\n", " ")) as error:
                images[1]
            assert "\n" not in str(error.value)
    assert fid.ImageSet(str(folder), "", crop=32)[1].shape == (3, 32, 32)  # 1 x 1, scaled up


def test_download_checks_the_hash(place, tmp_path, monkeypatch):
    """The released file's name ends in the first digits of its SHA-256: any other content is refused."""
    torch.save({"weight": torch.zeros(2)}, tmp_path / "pt_inception-2015-12-05-6726825d.pth")
    monkeypatch.setattr(fid, "HUB_URL", (tmp_path / "pt_inception-2015-12-05-6726825d.pth").as_uri())
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    with pytest.raises(SystemExit, match="invalid hash value"):
        fid.load_network(fid.parse_args(["a", "--ref", "b"]))
    assert not list((tmp_path / "hub").rglob("*.pth"))
    released = tmp_path / f"inception-{digest(place / 'inception.pth')}.pth"
    released.symlink_to(place / "inception.pth")
    monkeypatch.setattr(fid, "HUB_URL", released.as_uri())
    fetched, copied = (
        fid.load_network(fid.parse_args(["a", "--ref", "b", "--inception-weights", weights]))[1]
        for weights in ("hub", str(released))
    )
    assert fetched == copied == f"adm inception {digest(released)}"


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "test_vit"])
def test_timm_features(tmp_path, name):
    """What the model computes of Pillow's resized image; the first has more features than its last block."""
    torch.save(timm.create_model(name).state_dict(), tmp_path / "model.pth")
    network = fid.TimmFeatures(name, str(tmp_path / "model.pth"))
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
        "broken": ["x.png", "y.png"],
        "sizes": ["x.png", "y.png"],
    }.items():
        (place / name).mkdir()
        for file in files:
            Image.new("RGB", (32, 32)).save(place / name / file)
    (place / "broken" / "y.png").write_bytes(b"no image")
    Image.new("RGB", (32, 48)).save(place / "sizes" / "y.png")
    (place / "junk.npz").write_bytes(b"no zip")
    zeros, one = np.zeros(4), np.eye(4)
    good = dict(mu=zeros, sigma=one, features=one)
    for key in good:
        np.savez(place / f"nan_{key}.npz", **good | {key: good[key] * np.nan})
    np.savez(place / "shapes.npz", mu=zeros, sigma=one[:3])
    np.savez(place / "half.npz", sigma=one)
    np.savez(place / "small.npz", mu=zeros, sigma=one)
    np.savez(place / "nomu.npz", mu=zeros, sigma=one, features=one[:, :3])
    np.savez(place / "lone.npz", mu=zeros)
    np.savez(place / "other.npz", mu=np.zeros(64), sigma=np.eye(64), made_by="clean inception 6726825d")
    np.savez(place / "floats.npz", np.zeros((4, 8, 8, 3)))
    np.savez_compressed(place / "packed.npz", np.zeros((4, 8, 8, 3), np.uint8))
    torch.save({"weight": torch.zeros(2)}, place / "wrong.pth")
    return place


@pytest.mark.parametrize(
    ("samples", "options", "message"),
    [
        ("nowhere", "", "No such file"),
        ("empty", "", "0 images, at least 2"),
        ("one", "", "1 images, at least 2"),
        ("broken", "", "y.png: cannot identify image file$"),
        ("broken", "--workers 1", "y.png: cannot identify"),
        ("sizes", "", r"y.png: \[3, 48, 32\], unlike x.png \[3, 32, 32\]"),
        ("junk.npz", "", "junk.npz"),
        ("nan_mu.npz", "", "not finite"),
        ("nan_sigma.npz", "", "not finite"),
        ("nan_features.npz", "", "not finite"),
        ("shapes.npz", "", r"shapes \(D,\), \(D,D\), \(N,D\)"),
        ("half.npz", "", "0 images, at least 2"),
        ("floats.npz", "", "float64"),
        ("packed.npz", "", "compressed"),
        ("a", "--ref small.npz", "not comparable, features of widths {"),
        ("a", "--features-weights wrong.pth", "Missing key"),
        ("a", "--save-stats nowhere/x.npz", "expected an .npz in a folder"),
        ("a", "--save-stats x", "expected an .npz in a folder"),
        ("small.npz", "--ref other.npz --metrics is", "allow fid"),
        ("other.npz", "", "not comparable: samples other.npz is by clean inception 6726825d, this run"),
        ("a", "--metrics fid,kid", "--metrics fid,kid"),
        ("a", "--num 0", "--num 0: expected 1 or more"),
        ("a", "--num 3 --metrics prec", r"--metrics prec: these sets allow fid \("),
        ("nomu.npz", "", r"shapes \(D,\), \(D,D\), \(N,D\)"),
        ("lone.npz", "", r"shapes \(D,\), \(D,D\), \(N,D\)"),
        ("a", "--features no_such_model", "no model that timm knows"),
        ("a", "--features-weights no.pth", "No such file"),
        ("a", "--features= --inception-weights wrong.pth", "Missing key.*Conv2d_1a_3x3.conv.weight"),
    ],
)
def test_bad_input_ends_in_one_line(bad, monkeypatch, samples, options, message):
    monkeypatch.chdir(bad)
    words = f"{samples} --ref b --workers 0 --features test_vit --features-weights test_vit.pth {options}"
    with pytest.raises(SystemExit, match=message) as stop:
        fid.main(words.split())
    assert "\n" not in str(stop.value)
