"""fid.py against slow formulas, Pillow, scipy, torchvision, and the numbers of the programs it replaces."""

import functools
import gc
import hashlib
import io
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import warnings
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import scipy.special
import timm
import torch
import torchvision
from conftest import message
from PIL import Image
from safetensors.torch import save_file

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
LOADED = functools.cache(fid.load_network)
NUMBERS = ["fid", "prec", "rec", "num", "ref_num"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with two sets of images, a and b, and weights for a timm model."""
    folder = tmp_path_factory.mktemp("fid")
    images(folder / "a", 12, seed=0)
    images(folder / "b", 10, seed=1)
    torch.manual_seed(0)
    torch.save(timm.create_model("test_vit").state_dict(), folder / "test_vit.pth")
    return folder


def images(folder, number, seed, size=(40, 32)):
    """Images of random squares, in two sub-folders."""
    rng = np.random.default_rng(seed)
    for i in range(number):
        squares = rng.integers(0, 256, (size[0] // 8, size[1] // 8, 3), dtype=np.uint8)
        path = folder / str(i % 2) / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.kron(squares, np.ones((8, 8, 1), np.uint8))).save(path)


def arrays_of(folder):
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.rglob("*.png"))])


def write(path, text=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()[:8]


def run(capsys, *argv):
    """The JSON line of the command."""
    fid.main([str(word) for word in argv] + ["--json", "--workers", "0"])
    return json.loads(capsys.readouterr().out)


def run_timm(capsys, place, *argv):
    return run(capsys, *argv, "--features", "test_vit", "--features-weights", place / "test_vit.pth")


class Colours(torch.nn.Module):
    """A network of three features, the mean colour, and two classes: light and dark."""

    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(3, 2)
        self.fc.weight.data = torch.tensor([[1.0, 1, 1], [-1, -1, -1]]) / 32
        self.requires_grad_(False)

    def forward(self, images):
        return images.float().mean((2, 3)) - 128


@pytest.fixture
def colours(monkeypatch):
    """The mains of a test have a network that is there at once."""
    monkeypatch.setattr(fid, "load_network", lambda _, protocol, __: (Colours(), f"{protocol} inception 0"))


# Formulas


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


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(weights(), path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["adm", "pytorch-fid", "clean"])
def test_numbers_of_the_programs_it_replaces(place, inception, capsys, protocol):
    expected, first_features = PEERS[protocol]
    network, made_by = fid.load_network(None, protocol, str(inception))
    assert made_by == f"{protocol} inception {digest(inception)}"
    a, b = (fid.extract(fid.ImageSet(str(place / name)), network, 8, 0, torch.device("cpu")) for name in "ab")
    np.testing.assert_allclose(a[0, :2], first_features, rtol=1e-4)
    # 22 features span 22 dimensions, and the distance is the same in any orthonormal basis of them.
    basis, _ = torch.linalg.qr(torch.cat([a, b]).double().T)
    distance = fid.frechet_distance(*fid.moments(a.double() @ basis), *fid.moments(b.double() @ basis))
    assert distance == pytest.approx(expected["fid"], rel=1e-4)
    if protocol == "adm":
        known = [SimpleNamespace(features=x, items=range(len(x)), path="x.npz") for x in (a, b)]
        found = fid.evaluate(["is", "prec", "rec"], network, *known)
        assert found == pytest.approx({key: expected[key] for key in found}, rel=1e-4)


def test_state_dict_is_torchvisions():
    with torch.device("meta"):
        theirs = torchvision.models.inception_v3(num_classes=1008, aux_logits=False, init_weights=False)
    ours = fid.Inception()
    state = ours.state_dict()
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    # The forward leaves out the last four children, of which the first is written out.
    assert [name for name, _ in ours.named_children()][-4:] == ["Mixed_7c", "avgpool", "dropout", "fc"]
    again = fid.Inception().state_dict()  # random, but seeded
    assert all(torch.equal(state[k], again[k]) for k in state if k != "fc.bias")  # that one is not used


@pytest.mark.slow
def test_batch_norms_are_folded_into_convolutions(inception):
    network, _ = fid.load_network(None, "clean", str(inception))
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules())
    plain = fid.Inception("clean")
    plain.load_state_dict(weights())
    image = torch.randint(0, 256, (1, 3, 70, 50), dtype=torch.uint8)
    with torch.inference_mode():
        np.testing.assert_allclose(network(image), plain(image), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("size", [(20, 31), (400, 310)])
def test_network_inputs(size):
    rng = np.random.default_rng(0)
    array = rng.integers(0, 256, (3, *size), dtype=np.uint8)
    corners = [(0, 0), (0, 298), (298, 0), (298, 298)]
    rows, columns = np.array([*corners, *rng.integers(0, 299, (500, 2))]).T

    def bilinear(source):
        """Pixels from the four neighbours of their source; places outside repeat the edge."""
        x, result = array.astype(np.float64), []
        for row, column in zip(rows, columns, strict=True):
            (i, a), (j, b) = (divmod(source(k, n), 1) for k, n in ((row, size[0]), (column, size[1])))
            i, j, i1, j1 = int(i), int(j), min(int(i) + 1, size[0] - 1), min(int(j) + 1, size[1] - 1)
            top = x[:, i, j] * (1 - b) + x[:, i, j1] * b
            result.append(top * (1 - a) + (x[:, i1, j] * (1 - b) + x[:, i1, j1] * b) * a)
        return np.transpose(result)

    def found(protocol):
        return fid.inception_input(torch.from_numpy(array)[None], protocol)[0].double().numpy()

    # fp32 positions are off by 1e-5 of a pixel, at up to 255 levels a pixel
    adm = bilinear(lambda k, n: k * n / 299)  # TensorFlow 1
    np.testing.assert_allclose(found("adm")[:, rows, columns] * 128 + 128, adm, atol=2e-2)
    half_pixel = bilinear(lambda k, n: max((k + 0.5) * n / 299 - 0.5, 0))  # torch
    np.testing.assert_allclose((found("pytorch-fid")[:, rows, columns] + 1) * 127.5, half_pixel, atol=2e-2)
    floats = [Image.fromarray(channel.astype(np.float32)) for channel in array]
    pillow = [image.resize((299, 299), Image.Resampling.BICUBIC) for image in floats]
    np.testing.assert_allclose(found("clean") * 128 + 128, np.clip(pillow, 0, 255), atol=1e-4)


def random_moments(dimension, number, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(number, dimension)) @ rng.normal(size=(dimension, dimension))
    x += rng.normal(size=dimension)
    return x.mean(0), np.cov(x, rowvar=False)


def distance_by_scipy(mu1, sigma1, mu2, sigma2):
    root = scipy.linalg.sqrtm(sigma1 @ sigma2).real
    return np.sum((mu1 - mu2) ** 2) + np.trace(sigma1 + sigma2 - 2 * root)


def test_frechet_distance():
    one, two = random_moments(64, 500, 0), random_moments(64, 500, 1)
    expected = distance_by_scipy(*one, *two)
    assert fid.frechet_distance(*one, *two) == pytest.approx(expected, rel=1e-6)
    assert fid.frechet_distance(*two, *one) == pytest.approx(expected, rel=1e-6)
    # covariances a I and b I, means d apart: |d|^2 + D (sqrt(a) - sqrt(b))^2
    distance = fid.frechet_distance(np.zeros(8), 4 * np.eye(8), np.ones(8), 9 * np.eye(8))
    assert distance == pytest.approx(16, rel=1e-12)
    assert np.isnan(fid.frechet_distance(np.full(8, np.nan), np.eye(8), np.ones(8), np.eye(8)))  # not 0
    for number in (3, 40, 500):  # singular ones too
        mu, sigma = random_moments(64, number, 2)
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


def share_inside(points, centres):
    """Points within the distance of any centre to its third neighbour, by loops."""
    inside = 0
    radii = [sorted(np.linalg.norm(np.delete(centres, i, 0) - c, axis=1))[2] for i, c in enumerate(centres)]
    for p in points:
        inside += any(np.linalg.norm(p - c) <= radius for c, radius in zip(centres, radii, strict=True))
    return inside / len(points)


@pytest.mark.parametrize("digits", [9, 0])
def test_precision_recall_by_loops(digits):
    """Whole numbers have points at the very radius, and points that lie on others."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(37, 3)).round(digits), rng.normal(1, 0.8, (29, 3)).round(digits)
    found = fid.precision_recall(torch.from_numpy(a), torch.from_numpy(b), block=10)
    assert found == pytest.approx((share_inside(a, b), share_inside(b, a)))
    assert 0 < min(found) < max(found) < 1


# timm's networks


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "test_vit"])
def test_timm_features(name):
    """What the model computes of Pillow's resized image; the first has more features than its last block."""
    network = fid.TimmFeatures(name, timm.create_model(name).state_dict())
    array = np.random.default_rng(0).integers(0, 2, (30, 50, 3), dtype=np.uint8) * 255  # bicubic overshoots
    inputs = []
    network.model.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.inference_mode():
        features = network(torch.from_numpy(array).permute(2, 0, 1)[None])
        assert torch.equal(features, network.model(inputs[0]))
    floats = [Image.fromarray(channel.astype(np.float32)) for channel in array.transpose(2, 0, 1)]
    resized = np.stack([image.resize((224, 224), Image.Resampling.BICUBIC) for image in floats], 2)
    assert resized.min() < -5 and resized.max() > 260
    config = timm.get_pretrained_cfg(name)
    levels = (inputs[0][0].permute(1, 2, 0).numpy() * config.std + config.mean) * 255
    np.testing.assert_allclose(levels, levels.round(), atol=1e-3)
    np.testing.assert_allclose(levels, resized.clip(0, 255), atol=0.501)


def test_position_embedding_as_dinov2s_authors_resize_it(monkeypatch):
    shallow = functools.partial(timm.create_model, depth=1)
    model = shallow("vit_small_patch14_dinov2")  # 518 px: 37 x 37 patches
    torch.nn.init.normal_(model.pos_embed, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(timm, "create_model", shallow)
    network = fid.TimmFeatures("dinov2-small", model.state_dict())
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


# Sets


def opened(source):
    """All images of a set (N,H,W,3)."""
    return source.read(source.items).transpose(0, 2, 3, 1)


def test_sources_hold_the_same_images(place, tmp_path):
    array = arrays_of(place / "a")
    np.savez(tmp_path / "a.npz", array, np.arange(12))
    for path in (place / "a", tmp_path / "a.npz"):
        source = fid.ImageSet(str(path))
        assert np.array_equal(opened(source), array)
        copy = pickle.loads(pickle.dumps(source))  # as workers that are not forked get it
        assert np.array_equal(opened(copy), array)
        taken = {(4, False): [0, 1, 2, 3], (4, True): [0, 3, 6, 9], (5, True): [0, 2, 4, 7, 9]}
        for (num, spread), expected in taken.items():
            some = fid.ImageSet(str(path), num=num, spread=spread)
            assert some.items == [source.items[i] for i in expected]
        assert fid.ImageSet(str(path), num=99, spread=True).items == list(source.items)
    assert len(pickle.dumps(source)) < 1000


def test_npz_of_images_is_not_read_whole(tmp_path):
    np.savez(tmp_path / "x.npz", np.zeros((1000, 128, 128, 3), np.uint8))  # 49 MB
    tracemalloc.start()
    source = fid.ImageSet(str(tmp_path / "x.npz"), num=4, spread=True)
    assert source.read(source.items[1:2]).shape == (1, 3, 128, 128)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e6


def test_listing_of_a_folder(tmp_path, monkeypatch):
    """All images below it, sorted, whatever lies beside what; class folders mean nothing here."""
    monkeypatch.chdir(tmp_path)
    files = ["x/10.PNG", "x/9.jpg", "x/a/2.webp", "x/a/b/1.bmp", "x/z.jpeg"]
    for name in [*files, "x/notes.txt", "x/._9.jpg", "x/.hidden/9.jpg", "x/a/x.gif", "x/settings.json"]:
        write(tmp_path / name)
    (tmp_path / "x/empty").mkdir()
    assert fid.list_images("x", set()) == files
    write(tmp_path / "far/1.png")
    (tmp_path / "far/2.png").symlink_to("1.png")
    for link, target in {"loop": "loop", "x/a/parent": "..", "x/b": "../../far", "x/c": "../../far"}.items():
        (tmp_path / link).symlink_to(tmp_path / "far" if "far" in target else target)
    assert fid.list_images("x", set()) == [*files[:4], "x/b/1.png", "x/b/2.png", files[4]]


def test_listing_says_what_is_wrong(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("none/x.txt", "shut/a/x.png", "shut/b/x.png", "file.png"):
        write(tmp_path / name)
    listdir = os.listdir

    def refuse(folder):  # as for a folder without permission to read, which root has everywhere
        if folder == "shut/b":
            raise PermissionError(13, "Permission denied", folder)
        return listdir(folder)

    monkeypatch.setattr(os, "listdir", refuse)
    assert (
        message(fid.ImageSet, "none") == "none: 0 images (.png .jpg .jpeg .webp .bmp), at least 4 are needed"
    )
    for path, reason in {
        "missing": "No such file or directory: 'missing'",
        "file.png": "Not a directory: 'file.png'",
        "shut": "Permission denied: 'shut/b'",
    }.items():
        line = message(fid.ImageSet, path)
        assert line.startswith(f"{path}: ") and f"{reason}" in line and "--ref are folders of images" in line


def test_crop_is_the_references(place, capsys, tmp_path, colours):
    for path in sorted((place / "a").rglob("*.png")):
        fid.center_crop(fid.to_rgb(Image.open(path)), 20).save(tmp_path / path.name)
    found = run(capsys, tmp_path, "--ref", place / "a", "--crop", 20, "--num", 12)
    assert found["fid"] < 1e-3 and (found["prec"], found["rec"], found["num"]) == (1, 1, 12)
    whole = run(capsys, place / "a", "--ref", place / "a", "--crop", 20)
    assert whole["fid"] > 0.1  # the samples are not cropped, unlike the reference
    stats = [tmp_path / "cropped.npz", tmp_path / "whole.npz"]
    run(capsys, place / "a", "--crop", 20, "--save-stats", stats[0])
    run(capsys, tmp_path, "--save-stats", stats[1])
    assert run(capsys, stats[0], "--ref", stats[1])["fid"] < 1e-3


def test_main_joins_images_and_formulas(place, capsys, colours):
    """Numbers of mean colours, by numpy, scipy and loops."""
    a, b = (arrays_of(place / name).mean((1, 2)) - 128 for name in "ab")
    moments = [f(x) for x in (a, b) for f in (lambda x: x.mean(0), lambda x: np.cov(x, rowvar=False))]
    p = scipy.special.softmax(a @ Colours().fc.weight.numpy().T, 1)
    divergence = np.mean(np.sum(p * np.log(p / p.mean(0)), 1))
    expected = {
        "fid": distance_by_scipy(*moments),
        "is": np.exp(divergence),
        "prec": share_inside(a, b),
        "rec": share_inside(b, a),
    }
    assert expected["prec"] != expected["rec"]
    found = run(capsys, place / "a", "--ref", place / "b")
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-5)
    known = {"samples": str(place / "a"), "num": 12, "ref": str(place / "b"), "ref_num": 10}
    assert found == found | known | {"by": "adm inception 0"} and len(found) == 9


# Statistics


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
    assert np.load(tmp_path / "b.npz")["made_by"] == saved["by"]
    found = run_timm(capsys, place, place / "a", "--ref", tmp_path / "b.npz", "--metrics", "rec")
    assert "fid" not in found and found["rec"] == expected["rec"]


def wide(network):
    """A network of 2,048 features, as ADM's mu is long: the mean colour and zeros."""

    class Wide(Colours):
        def forward(self, images):
            return torch.nn.functional.pad(super().forward(images), (0, 2045))

    network = Wide()
    network.fc.weight.data = torch.nn.functional.pad(network.fc.weight.data, (0, 2045))
    return network


def test_reference_batches_as_adms(place, capsys, tmp_path, monkeypatch):
    """FID by mu and sigma, here shifted by 1, precision and recall by the images."""
    monkeypatch.setattr(fid, "load_network", lambda *_: (wide(Colours()), "adm inception 0"))
    # The eigenvalues of 2,048 dimensions take seconds; all but the first three are 0.
    narrow = fid.frechet_distance
    monkeypatch.setattr(
        fid, "frechet_distance", lambda m1, s1, m2, s2: narrow(m1[:3], s1[:3, :3], m2[:3], s2[:3, :3])
    )
    array = arrays_of(place / "b")
    colour = array.mean((1, 2)) - 128
    mu, sigma = np.zeros(2048), np.zeros((2048, 2048))
    mu[:3], sigma[:3, :3] = colour.mean(0) + 1, np.cov(colour, rowvar=False)
    np.savez(tmp_path / "adm.npz", array, mu=mu, sigma=sigma)
    np.savez(tmp_path / "moments.npz", mu=mu, sigma=sigma)
    for name, allowed in {"adm": {"fid", "is", "prec", "rec"}, "moments": {"fid", "is"}}.items():
        found = run(capsys, place / "b", "--ref", tmp_path / f"{name}.npz")
        assert {"fid", "is", "prec", "rec"} & found.keys() == allowed
        assert (found["num"], found["ref_num"]) == (10, None)  # of how many images mu is, is not known
        assert found["fid"] == pytest.approx(3, rel=1e-4)  # 1 in each of three features
    assert run(capsys, place / "b", "--ref", tmp_path / "adm.npz")["prec"] == 1
    # Some of the images only: mu and sigma of all do not stand for them.
    np.savez(tmp_path / "first.npz", array[:4])
    np.savez(tmp_path / "spread.npz", array[[0, 2, 5, 7]])
    found = run(capsys, tmp_path / "adm.npz", "--ref", tmp_path / "adm.npz", "--num", 4, "--ref-num", 4)
    expected = run(capsys, tmp_path / "first.npz", "--ref", tmp_path / "spread.npz")
    assert [found[key] for key in NUMBERS] == pytest.approx([expected[key] for key in NUMBERS], rel=1e-6)
    assert found["ref_num"] == 4 and found["fid"] > 0


@pytest.mark.parametrize(
    "words", ["--protocol pytorch-fid", "--protocol clean", "--features test_vit --features-weights {}"]
)
def test_statistics_of_an_unknown_maker_hold_for_inception_and_adm_alone(
    place, capsys, tmp_path, monkeypatch, words
):
    """As ADM's files are; the set against itself had a distance, since its mu is of other features."""
    monkeypatch.setattr(fid, "load_network", LOADED)
    if "protocol" in words:
        protocol = words.split()[1]
        monkeypatch.setattr(fid, "load_network", lambda *_: (wide(Colours()), f"{protocol} inception 0"))
    array = arrays_of(place / "a")
    np.savez(tmp_path / "both.npz", array, mu=np.ones(2048), sigma=np.eye(2048))
    np.savez(tmp_path / "mine.npz", mu=np.ones(2048), sigma=np.eye(2048))
    words = words.format(place / "test_vit.pth").split()
    for name in ("both", "mine"):
        for sets in (
            [place / "a", "--ref", tmp_path / f"{name}.npz"],
            [tmp_path / f"{name}.npz", "--ref", place / "a"],
        ):
            line = message(fid.main, [*map(str, sets), *words, "--workers=0"])
            assert f"{name}.npz: mu and sigma are of adm inception, not of " in line
            assert "--num and --ref-num take its images instead" in line
    monkeypatch.setattr(fid, "frechet_distance", lambda m1, s1, m2, s2: float(abs(m1 - m2).max()))
    assert run(capsys, place / "a", "--ref", tmp_path / "both.npz", "--ref-num", 12, *words)["fid"] < 1e-4


def test_statistics_are_of_the_network_asked_for(tmp_path, colours):
    zeros, one = np.zeros(3), np.eye(3)
    np.savez(tmp_path / "clean.npz", mu=zeros, sigma=one, made_by="clean inception 0")
    np.savez(tmp_path / "other.npz", mu=zeros, sigma=one, made_by="adm inception 6726825d")
    np.savez(tmp_path / "unknown.npz", mu=zeros, sigma=one)
    np.savez(tmp_path / "mine.npz", mu=zeros, sigma=one, made_by="adm inception 0")
    for name, maker in {
        "clean": "clean inception 0",
        "other": "adm inception 6726825d",
        "unknown": "others",
    }.items():
        sets = [str(tmp_path / "mine.npz"), "--ref", str(tmp_path / f"{name}.npz")]
        line = message(fid.main, sets)
        assert line.startswith(f"{sets[2]}: mu and sigma are of {maker}, not of adm inception 0; ")


def test_save_stats_overwrites_statistics_of_its_own_alone(place, tmp_path, capsys, colours):
    images(tmp_path / "mine", 4, seed=3)
    (tmp_path / "notes.npz").write_text("my notes")
    np.savez(tmp_path / "images.npz", arrays_of(place / "a"))
    np.savez(tmp_path / "adm.npz", arrays_of(place / "a"), mu=np.zeros(2048), sigma=np.eye(2048))
    (tmp_path / "folder.npz").mkdir()
    run(capsys, place / "a", "--save-stats", tmp_path / "a.npz")
    run(capsys, place / "b", "--save-stats", tmp_path / "b.npz")
    (tmp_path / "link.npz").symlink_to("b.npz")
    before = {path: path.read_bytes() for path in tmp_path.glob("*.npz") if path.is_file()}
    for target, sets in {
        "notes.npz": [place / "a"],
        "images.npz": [place / "a"],
        "adm.npz": [place / "a"],
        "folder.npz": [place / "a"],
        "a.npz": [tmp_path / "a.npz"],
        "b.npz": [place / "a", "--ref", tmp_path / "b.npz"],
        "link.npz": [place / "a", "--ref", tmp_path / "b.npz"],
    }.items():
        line = message(fid.main, [*map(str, sets), "--save-stats", str(tmp_path / target)])
        assert line.startswith(f"--save-stats {tmp_path / target}: expected an .npz ")
    assert {path: path.read_bytes() for path in before} == before
    run(capsys, place / "b", "--save-stats", tmp_path / "a.npz")  # its own, of no set in use
    assert np.array_equal(np.load(tmp_path / "a.npz")["mu"], np.load(tmp_path / "b.npz")["mu"])


def test_a_full_disk_ends_in_one_line(place, tmp_path, monkeypatch, colours):
    def full(path, **_arrays):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    words = [str(place / "a"), "--workers=0", "--save-stats", str(tmp_path / "x.npz")]
    assert message(fid.main, words) == f"--save-stats {words[3]}: No space left on device"
    assert not list(tmp_path.iterdir())


def test_batch_sizes_and_workers_agree(place, capsys, colours):
    command = [place / "a", "--ref", place / "b"]
    one = run(capsys, *command)
    for options in (["--batch-size", 5], ["--batch-size", 7, "--workers", 2]):
        found = run(capsys, *command, *options)
        assert [found[key] for key in NUMBERS] == pytest.approx([one[key] for key in NUMBERS], rel=1e-5)


def test_features_do_not_depend_on_the_batch(place):
    network, _ = LOADED("test_vit", "adm", str(place / "test_vit.pth"))
    source = fid.ImageSet(str(place / "a"), num=5)
    one, two = (fid.extract(source, network, size, 0, torch.device("cpu")) for size in (5, 2))
    np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)


def test_inception_score_does_not_depend_on_the_order_of_a_folder(tmp_path, capsys, colours, monkeypatch):
    """Splits of eight: four dark images come first in the folder, as classes do, then four light ones ..."""
    monkeypatch.setattr(fid, "inception_score", functools.partial(fid.inception_score, split_size=8))
    array = np.full((32, 8, 8, 3), 8, np.uint8)
    array[16:] = 248
    for i, pixels in enumerate(array):
        Image.fromarray(pixels).save(tmp_path / f"{i:02}.png")
    np.savez(tmp_path / "sorted.npz", array)
    order = np.random.default_rng(1).permutation(32)
    np.savez(tmp_path / "mixed.npz", array[order])
    features = 120 * np.sign(array[:, 0, 0, :1] - 128.0).repeat(3, 1).astype(np.float32)
    moments = {"mu": features.mean(0), "sigma": np.cov(features, rowvar=False)}
    np.savez(tmp_path / "saved.npz", features=features, **moments, made_by="adm inception 0")
    score = {}
    for name in ("", "sorted.npz", "mixed.npz", "saved.npz"):
        score[name] = run(capsys, tmp_path / name, "--metrics", "is")["is"]
    assert score["sorted.npz"] == pytest.approx(1)  # its own order: each split is of one class
    counts = [np.bincount(part // 16, minlength=2) / 8 for part in order.reshape(4, 8)]
    shares = [np.exp(-np.sum(p[p > 0] * np.log(p[p > 0]))) for p in counts]
    assert score["mixed.npz"] == pytest.approx(np.mean(shares), rel=1e-4)
    assert score[""] == run(capsys, tmp_path, "--metrics", "is")["is"] > 1.7
    assert score["saved.npz"] == pytest.approx(score[""], rel=1e-6)


# Flags, and what settings.json says


def test_settings_of_samples_are_defaults(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chosen = ("ref", "crop", "inception_weights", "num", "ref_num")

    def values(*argv):
        args = fid.parse_args([*argv, "--metrics", "is"])
        return tuple(getattr(args, name) for name in chosen)

    normal = (None, None, "hub", None, None)
    demo = ("data/demo", None, "random", 200, 200)
    mine = (str(tmp_path / "my images"), 48, "hub", None, None)
    for number, (settings, expected) in enumerate(
        [
            ('{"demo": true, "seed": 0}', demo),
            ('{"demo": true, "reference": "/x/demo", "crop": 64}', ("/x/demo", 64, *demo[2:])),
            ('{"demo": false, "reference": "my images", "crop": 48}', mine),
            ('{"reference": "my images", "crop": 48}', mine),
            ('{"demo": false, "reference": null, "crop": 48}', normal),
            ('{"demo": "yes", "reference": ["my images"], "crop": 48}', normal),
            ('{"reference": "my images", "crop": "big"}', normal),
            ('{"reference": "my images", "crop": 0}', normal),
            ("{}", normal),
            ("[]", normal),
            ('{"dem', normal),
            ("", normal),
            ("\udcff", normal),
        ]
    ):
        path = tmp_path / str(number) / "settings.json"
        path.parent.mkdir()
        path.write_bytes(settings.encode(errors="surrogateescape"))
        assert values(str(number)) == expected, settings
    assert values("nowhere") == values("x.npz") == normal
    # A flag wins; with a reference, and for statistics of the samples alone, the file is not asked.
    assert values("2", "--crop", "32") == (mine[0], 32, *mine[2:])
    assert values("0", "--num", "5", "--inception-weights", "hub") == ("data/demo", None, "hub", 5, 200)
    assert values("1", "--ref", "y") == ("y", *normal[1:])
    assert values("2", "--ref", "y", "--crop", "9") == ("y", 9, *normal[2:])
    assert values("2", "--save-stats", "x.npz") == normal
    images(tmp_path / "4", 4, seed=0)
    line = message(fid.main, ["4"])
    assert "--ref is missing: the set to compare with; --metrics is (Inception Score) needs none" in line


def test_reference_and_crop_come_from_the_samples(place, tmp_path, monkeypatch, capsys, colours):
    """As `python fid.py samples` after sample.py, whose training images are larger than the samples."""
    monkeypatch.chdir(tmp_path)
    images(tmp_path / "samples", 12, seed=4, size=(24, 24))
    # A folder of this name is a folder here: only --ref means ADM's batch by it.
    images(tmp_path / "imagenet256", 10, seed=5)
    settings = {"reference": "imagenet256", "crop": 24, "demo": False}
    write(tmp_path / "samples/settings.json", json.dumps(settings))
    found = run(capsys)
    expected = run(capsys, "samples", "--ref", tmp_path / "imagenet256", "--crop", 24)
    assert found == expected and found["ref_num"] == 10
    other = run(capsys, "samples", "--crop", 8)
    assert other == run(capsys, "samples", "--ref", tmp_path / "imagenet256", "--crop", 8) != found
    (tmp_path / "imagenet256").rename(tmp_path / "moved")
    line = message(fid.main, [])
    assert f"No such file or directory: '{tmp_path / 'imagenet256'}'" in line and "--ref" in line
    assert fid.main(["samples", "--metrics", "is", "--workers=0"]) is None  # which needs no reference


def test_sets_are_opened_before_a_network(bad, monkeypatch):
    """On a machine without a network, too, the missing folder is named at once, not the hub."""

    def fetch(*_args, **_options):
        raise AssertionError("fetched before the sets were looked at")

    monkeypatch.chdir(bad)
    monkeypatch.setattr(fid, "load_network", fetch)
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    for words, start in {
        "nowhere --ref a": "nowhere: ",
        "a --ref nowhere": "nowhere: ",
        "nowhere --ref imagenet256": "nowhere: ",
        "broken --ref a": "'broken/a.png': not a readable image",
        "a --ref junk.npz": "junk.npz: ",
        "a --ref nan_mu.npz": "nan_mu.npz: ",
        "one --ref a": "one: 1 images",
        "a --ref whole.npz --metrics prec": "--metrics prec: these sets allow fid,is; ",
        "a --ref b --save-stats a": "--save-stats a: expected an .npz",
    }.items():
        assert message(fid.main, words.split()).startswith(start)


def test_workers_follow_the_cores_of_this_process(monkeypatch):
    for cores, expected in ((3, 3), (1, 1), (64, 8)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)), raising=False)
        assert fid.parse_args(["--metrics", "is"]).workers == expected
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert fid.parse_args(["--metrics", "is"]).workers == 5


def first_line(capsys, *argv):
    fid.main([str(word) for word in argv])
    return capsys.readouterr().err.splitlines()[0]


def test_first_line(place, tmp_path, capsys, colours, monkeypatch):
    line = first_line(capsys, place / "a", "--ref", place / "b", "--device=cpu", "--workers=0")
    known = f"samples {place / 'a'}; num 12; ref {place / 'b'}; ref_num 10; by adm inception 0; fp32 on cpu; "
    assert line == known + "FID of fewer than 2048 images is biased"
    # Settings.json is a file of another kind and no news.
    write(place / "a/settings.json", "{}")
    assert first_line(capsys, place / "a", "--ref", place / "b", "--device=cpu", "--workers=0") == line
    line = first_line(capsys, place / "a", "--ref", place / "b", "--inception-weights=random", "--workers=0")
    assert line.endswith("an untrained network, as the demo's: its numbers compare with nothing")
    # One small set is enough for a bias, whichever it is.
    features = np.random.default_rng(0).normal(size=(2048, 3)).astype(np.float32)
    moments = {"mu": features.mean(0), "sigma": np.cov(features, rowvar=False), "made_by": "adm inception 0"}
    np.savez(tmp_path / "large.npz", features=features, **moments)
    np.savez(tmp_path / "small.npz", features=features[:2047], **moments)
    for samples, ref in (("large", "large"), ("large", "small"), ("small", "large")):
        words = [tmp_path / f"{samples}.npz", "--ref", tmp_path / f"{ref}.npz", "--metrics=fid"]
        assert ("biased" in first_line(capsys, *words)) == ("small" in (samples, ref))


def test_first_line_names_two_image_sizes(place, tmp_path, capsys, colours):
    images(tmp_path, 5, seed=0, size=(24, 24))
    for ref, crop, expected in (
        (tmp_path, [], True),
        (place / "b", [], False),
        (tmp_path, ["--crop=16"], True),
    ):
        words = [place / "a", "--ref", ref, "--metrics=fid", "--workers=0", *crop]
        assert ("differ in size" in first_line(capsys, *words)) == expected
    cropped = first_line(capsys, tmp_path, "--ref", place / "a", "--crop=24", "--metrics=fid", "--workers=0")
    assert "differ in size" not in cropped


def test_metrics_by_name_in_any_case(place, capsys, colours):
    fid.main([str(place / "a"), "--ref", str(place / "b"), "--workers=0", "--metrics", "FID,Is"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["fid", "is"]
    found = run(capsys, place / "a", "--ref", place / "b", "--metrics", "fid,is")
    assert [float(line.split()[1]) for line in lines] == pytest.approx([found["fid"], found["is"]], rel=1e-5)


def test_main_leaves_its_caller_as_it_found_it(place, monkeypatch):
    """TF32 is off where features are computed, and there alone."""
    seen = []

    class Spy(Colours):
        def forward(self, images):
            seen.append(torch.backends.cudnn.allow_tf32)
            return super().forward(images)

    def state():
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        return (
            handlers,
            list(warnings.filters),
            torch.backends.cudnn.allow_tf32,
            torch.is_inference_mode_enabled(),
        )

    monkeypatch.setattr(fid, "load_network", lambda *_: (Spy(), "adm inception 0"))
    for tf32 in (True, False):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
        before = state()
        assert fid.main([str(place / "a"), "--ref", str(place / "b"), "--workers=0"]) is None
        assert state() == before and before[2] is tf32
        message(fid.main, [str(place / "nowhere")])
        assert state() == before
    assert seen and not any(seen)


def test_features_that_are_not_finite(place, monkeypatch):
    class Broken(Colours):
        def forward(self, images):
            return super().forward(images) * torch.tensor([1, 1, float("nan")])

    monkeypatch.setattr(fid, "load_network", lambda *_: (Broken(), "adm inception 0"))
    line = message(fid.main, [str(place / "a"), "--ref", str(place / "b"), "--workers=0"])
    assert line == f"{place / 'a'}: its features are not finite; are the weights the network's?"


# Loading processes


def stuck_set(tmp_path):
    """A set whose fifth image never arrives."""
    images(tmp_path / "set", 4, seed=0)
    os.mkfifo(tmp_path / "set" / "x.png")
    return fid.ImageSet(str(tmp_path / "set"))


@pytest.fixture
def limits(monkeypatch):
    """Time limits of loaders (seconds); their minute takes 1.5 seconds here."""
    limits = []
    loader = torch.utils.data.DataLoader

    def quick(*args, **options):
        limits.append(options["timeout"])
        return loader(*args, **options | {"timeout": options["timeout"] / 40})

    monkeypatch.setattr(torch.utils.data, "DataLoader", quick)
    return limits


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGBUS, signal.SIGTERM])
def test_a_loading_process_that_dies(tmp_path, limits, number):
    """SIGBUS is what a process without shared memory gets, SIGTERM what loaders end their processes with."""
    source = stuck_set(tmp_path)

    def kill():
        while not multiprocessing.active_children():
            time.sleep(0.01)
        time.sleep(0.3)  # it has its own handlers by now
        os.kill(multiprocessing.active_children()[0].pid, number)

    threading.Thread(target=kill, daemon=True).start()
    line = message(fid.extract, source, Colours(), 2, 1, torch.device("cpu"))
    assert line.startswith(f"{source.path}: DataLoader worker (pid")
    assert line.endswith("; try --workers 0 or, in a container, --shm-size=1g")


@pytest.mark.slow
def test_a_loading_process_that_is_stuck(tmp_path, limits):
    source = stuck_set(tmp_path)
    line = message(fid.extract, source, Colours(), 2, 1, torch.device("cpu"))
    assert line.startswith(f"{source.path}: DataLoader timed out after 1.5 seconds; try --workers 0")
    source.items = source.items[:4]
    assert fid.extract(source, Colours(), 2, 0, torch.device("cpu")).shape == (4, 3)
    assert limits == [60, 0]
    # The process that is stuck is gone, too.
    gc.collect()
    assert not multiprocessing.active_children()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_loading_needs_no_shared_memory(place, monkeypatch):
    """Tensors of a loading process lie in shared memory, arrays go through a pipe."""
    assert type(fid.ImageSet(str(place / "a")).read([str(place / "a/0/00.png")])) is np.ndarray

    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(multiprocessing.synchronize.SemLock, "__init__", full)
    source = fid.ImageSet(str(place / "a"))
    line = message(fid.extract, source, Colours(), 2, 1, torch.device("cpu"))
    assert "No space left on device; try --workers 0 or, in a container, --shm-size=1g" in line
    gc.collect()  # the half of a loader warns here, not in another test


def test_an_error_of_the_network_keeps_its_traceback(place):
    class Wrong(Colours):
        def forward(self, images):
            raise RuntimeError("sizes of tensors must match")

    with pytest.raises(RuntimeError, match="^sizes of tensors"):
        fid.extract(fid.ImageSet(str(place / "a")), Wrong(), 2, 0, torch.device("cpu"))


@pytest.mark.slow
def test_interrupt_ends_in_one_line(place):
    """Ctrl-C as a terminal sends it: to the process and to its workers."""
    features = ["--features", "test_vit", "--features-weights", place / "test_vit.pth"]
    words = [sys.executable, fid.__file__, place / "a", "--ref", place / "b", "--workers=2", "--batch-size=1"]
    process = subprocess.Popen(
        [str(word) for word in [*words, *features]],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    line = process.stderr.readline()  # then the images come
    os.killpg(process.pid, signal.SIGINT)
    out, rest = process.communicate(timeout=120)
    assert process.returncode == 130 and out == "" and "fp32 on" in line
    assert rest.splitlines()[-1].startswith("interrupted; nothing was written")
    assert "Traceback" not in rest


@pytest.mark.slow
def test_a_second_interrupt_ends_at_once(tmp_path):
    """Here the end would take 100 seconds; the first Ctrl-C comes while a set without images is opened."""
    os.mkfifo(tmp_path / "x.png")
    for name in ("y", "z", "zz"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    script = f"""
import atexit, runpy, sys, time
atexit.register(time.sleep, 100)
sys.argv = ["fid.py", {str(tmp_path)!r}, "--ref", "x"]
sys.stderr.write("started\\n")
runpy.run_path({fid.__file__!r}, run_name="__main__")
"""
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    assert process.stderr.readline() == "started\n"
    fifo = os.open(tmp_path / "x.png", os.O_WRONLY)  # waits until fid.py reads
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline().startswith("interrupted; nothing was written")
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == -signal.SIGINT
    os.close(fifo)


# Damaged and hostile files


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
        for position in rng.integers(0, len(data), 1 + case % 7) if data else ():
            data[position] ^= 1 << rng.integers(8)
        (tmp_path / "damaged.npz").write_bytes(data)
        try:
            source = fid.ImageSet(str(tmp_path / "damaged.npz"))
            assert source.moments is None or np.isfinite(source.moments[1]).all()
            assert not source.items or opened(source).shape[3] == 3
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
    line = message(fid.ImageSet, str(tmp_path / "x.npz"))
    assert "x.npz: " in line and "whole .npz of arr_0" in line


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
    for number, (name, write_file) in enumerate((good | bad).items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name_of_good in ("000.png", "001.png", "002.png"):
            Image.fromarray(noise).save(folder / name_of_good)
        write_file(folder / name)
        source = fid.ImageSet(str(folder))
        if name in good:
            assert source.read(source.items).shape == (4, 3, 64, 64)
        else:
            found = source.read(source.items)
            assert repr(name)[1:-1] in found and "\n" not in found
    cropped = fid.ImageSet(str(folder), crop=32)
    assert cropped.read(cropped.items).shape == (4, 3, 32, 32)  # the last is 1 x 1, scaled up


# Files of others


def test_urls():
    assert "imagenet/256/" in fid.URLS["imagenet256"] and "imagenet/512/" in fid.URLS["imagenet512"]
    assert fid.URLS["hub"].endswith("pt_inception-2015-12-05-6726825d.pth")  # SHA-256 6726825d0af5f729...


@pytest.fixture
def small_inception(monkeypatch):
    """Files of weights of kilobytes stand for those of Inception."""
    monkeypatch.setattr(fid, "Inception", SmallInception)


class SmallInception(Colours):
    def __init__(self, protocol):
        super().__init__()

    def fold(self):
        return self


def test_download_checks_the_hash(tmp_path, monkeypatch, small_inception):
    """The released file's name ends in the first digits of its SHA-256: any other content is refused."""
    released = tmp_path / "pt_inception-2015-12-05-6726825d.pth"
    torch.save(Colours().state_dict(), released)
    monkeypatch.setitem(fid.URLS, "hub", released.as_uri())
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    assert "invalid hash value" in message(fid.load_network, None, "adm", "hub")
    assert not list((tmp_path / "hub").rglob("*.pth"))
    renamed = released.rename(tmp_path / f"inception-{digest(released)}.pth")
    monkeypatch.setitem(fid.URLS, "hub", renamed.as_uri())
    fetched, copied = (fid.load_network(None, "adm", weights)[1] for weights in ("hub", str(renamed)))
    assert fetched == copied == f"adm inception {digest(renamed)}"


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
    threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
    yield files, requests, f"http://127.0.0.1:{http.server_port}"
    http.shutdown()
    http.server_close()


def npz_bytes(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def test_reference_batches_are_fetched_once(place, capsys, monkeypatch, server, tmp_path, colours):
    files, requests, address = server
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "imagenet256/0.png")  # the name means the reference batch all the same
    monkeypatch.setitem(fid.URLS, "imagenet256", f"{address}/256/batch.npz")
    content = npz_bytes(arr_0=arrays_of(place / "b"), mu=np.zeros(64), sigma=np.eye(64))
    files["/256/batch.npz"] = (content, len(content))
    (tmp_path / "copy.npz").write_bytes(content)
    some = ("--ref-num", 99)  # not its mu and sigma, which would be of Inception
    expected = run(capsys, place / "a", "--ref", tmp_path / "copy.npz", *some)
    first = run(capsys, place / "a", "--ref", "imagenet256", *some)
    assert first == expected | {"ref": "imagenet256"} and requests == ["/256/batch.npz"]
    folder = tmp_path / "hub/hub/checkpoints"
    assert [path.name for path in folder.iterdir()] == ["batch.npz"]
    assert (folder / "batch.npz").read_bytes() == content
    assert run(capsys, place / "a", "--ref", "imagenet256", *some) == first
    assert requests == ["/256/batch.npz"]  # no second one


def test_a_reference_batch_that_cannot_be_fetched(capsys, server, tmp_path, monkeypatch):
    files, _, address = server
    whole = npz_bytes(arr_0=np.zeros((4, 64, 64, 3), np.uint8), mu=np.zeros(64), sigma=np.eye(64))
    for name, content, length in (
        ("cut", whole[: len(whole) // 2], len(whole)),
        ("tail", whole[:-30], len(whole)),
        ("page", b"<html>", 6),
    ):
        files[f"/{name}.npz"] = (content, length)
    free = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)  # a port where nothing listens
    free.server_close()
    for url, reason in {
        f"{address}/cut.npz": "BadZipFile('File is not a zip file')",
        f"{address}/tail.npz": "BadZipFile('File is not a zip file')",
        f"{address}/page.npz": "BadZipFile('File is not a zip file')",
        f"{address}/none.npz": "404: 'Not Found'",
        f"http://127.0.0.1:{free.server_port}/x.npz": "Connection refused",
    }.items():
        monkeypatch.setitem(fid.URLS, "imagenet512", url)
        line = message(fid.local_file, "imagenet512")
        assert line.startswith(f"{url}: ") and reason in line
        assert line.endswith("; the flag takes a FILE, too: a local copy")
        assert capsys.readouterr().err.startswith(f"fetching {url}\n")  # before anything else
    assert not list((tmp_path / "hub/hub/checkpoints").iterdir())


def test_weights_by_their_name_on_the_hub(tmp_path, monkeypatch, capsys, small_inception):
    torch.save(Colours().state_dict(), tmp_path / "inception.pt")
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
        assert message(fid.load_network, None, "adm", name).startswith(f"Inception of {name}: ")


# Input that can't be used


@pytest.fixture(scope="module")
def bad(place):
    """Inputs that can't be used, by name."""
    Image.new("RGB", (32, 32)).save(place / "square.png")
    for name, files in {
        "empty": [],
        "one": ["x.png"],
        "broken": ["a.png", "w.png", "x.png", "y.png"],
        "last": ["v.png", "w.png", "x.png", "y.png"],
        "sizes": ["v.png", "w.png", "x.png", "y.png"],
    }.items():
        (place / name).mkdir()
        for file in files:
            Image.new("RGB", (32, 32)).save(place / name / file)
    (place / "broken" / "a.png").write_bytes(b"no image")
    (place / "last" / "y.png").write_bytes(b"no image")
    Image.new("RGB", (32, 48)).save(place / "sizes" / "y.png")
    (place / "junk.npz").write_bytes(b"no zip")
    zeros, one = np.zeros(64), np.eye(64)
    by = f"224px test_vit {fid.load_network('test_vit', 'adm', str(place / 'test_vit.pth'))[1][-8:]}"
    good = dict(mu=zeros, sigma=one, features=one, made_by=by)
    for key in ("mu", "sigma"):
        np.savez(place / f"nan_{key}.npz", **good | {key: good[key] * np.nan})
    np.savez(place / "shapes.npz", mu=zeros, sigma=one[:63])
    np.savez(place / "column.npz", mu=zeros[:, None], sigma=one)
    np.savez(place / "half.npz", sigma=one)
    np.savez(place / "whole.npz", mu=zeros, sigma=one, made_by=by)
    np.savez(place / "lone.npz", mu=zeros)
    np.savez(place / "floats.npz", np.zeros((4, 8, 8, 3)))
    np.savez(place / "pickle.npz", mu=np.array([{}]), sigma=one)
    np.savez_compressed(place / "packed.npz", np.zeros((4, 8, 8, 3), np.uint8))
    torch.save({"weight": torch.zeros(2)}, place / "wrong.pth")
    (place / "code.pth").write_bytes(pickle.dumps(os.getcwd, 2))
    return place


@pytest.mark.parametrize(
    ("samples", "options", "start", "end"),
    [
        ("nowhere", "", "nowhere: ", ""),
        ("nowhere.npz", "", "nowhere.npz: ", "No such file"),
        ("empty", "", "empty: 0 images (.png .jpg", "at least 4 are needed"),
        ("one", "", "one: 1 images", "at least 4 are needed"),
        ("broken", "", "'broken/a.png': not a readable image ", "cannot identify image file"),
        ("last", "--batch-size 3", "'last/y.png': not a readable image ", "; repair or remove it"),
        ("last", "--workers 1", "'last/y.png': not a readable image ", "cannot identify image file"),
        (
            "sizes",
            "",
            "'sizes/y.png' is [3, 48, 32], but 'sizes/v.png' is [3, 32, 32]; ",
            "--crop makes those",
        ),
        ("sizes", "--batch-size 1", "'sizes/y.png' is [3, 48, 32], but 'sizes/v.png' is [3, 32, 32]; ", ""),
        ("junk.npz", "", "junk.npz: 'File is not a zip file'; ", "whole .npz of arr_0"),
        ("nan_mu.npz", "", "nan_mu.npz: ", "not finite"),
        ("nan_sigma.npz", "", "nan_sigma.npz: ", "not finite"),
        ("shapes.npz", "", "shapes.npz: ", "mu (64,), sigma (63, 64): not moments"),
        ("column.npz", "", "column.npz: ", "mu (64, 1), sigma (64, 64): not moments"),
        ("half.npz", "", "half.npz: 0 images", ""),
        ("lone.npz", "", "lone.npz: ", "sigma is not a file in the archive"),
        ("floats.npz", "", "floats.npz: ", "arr_0 is float64"),
        ("packed.npz", "", "packed.npz: ", "arr_0, uncompressed"),
        ("pickle.npz", "", "pickle.npz: ", "allow_pickle"),
        ("whole.npz", "--num 3", "whole.npz: 0 images", ""),
        ("a", "--ref whole.npz --ref-num 9", "whole.npz: 0 images", ""),
        ("a", "--ref whole.npz --crop 8", "whole.npz: 0 images", ""),
        ("whole.npz", "--metrics prec", "--metrics prec: these sets allow fid; ", "prec and rec need images"),
        ("a", "--metrics is", "--metrics is: these sets allow none; ", "is needs images and Inception"),
        ("a", "--metrics fid,kid", "--metrics fid,kid: these sets allow fid,prec,rec; ", ""),
        (
            "a",
            "--save-stats nowhere/x.npz",
            "--save-stats nowhere/x.npz: ",
            "folder that can be written into",
        ),
        ("a", "--save-stats x", "--save-stats x: expected an .npz", ""),
        ("a", "--num 0", "", "argument --num: expected a whole number from 1, got 0; --help lists the flags"),
        ("a", "--batch-size 1.5", "", "argument --batch-size: invalid positive_int value: '1.5'; --help"),
        ("a", "--workers -1", "", "argument --workers: expected a whole number from 0, got -1; --help"),
        ("a", "--device cpux", "", "argument --device: cpux: no such device on this machine; --help"),
        ("a", "--device meta:x", "", "argument --device: meta:x: no such device on this machine; --help"),
        ("a", "--metric fid", "", "unrecognized arguments: --metric fid; --help lists the flags"),
        ("a", "--protocol tf", "", "argument --protocol: invalid choice: 'tf'"),
        ("a", "--features no_such_model", "no_such_model of test_vit.pth: ", "Unknown model"),
        ("a", "--features-weights no.pth", "test_vit of no.pth: ", "No such file or directory"),
        ("a", "--features-weights wrong.pth", "test_vit of wrong.pth: ", "Missing key"),
        ("a", "--features-weights code.pth", "test_vit of code.pth: UnpicklingError", "takes timm's files"),
        (
            "a",
            "--features= --features-weights hub --inception-weights code.pth",
            "Inception of code.pth: ",
            "",
        ),
        ("a", "--features=", "", "--features-weights needs --features"),
        ("a", "--protocol clean", "", "--protocol and --inception-weights need Inception"),
        ("a", "--inception-weights random", "", "--protocol and --inception-weights need Inception"),
    ],
)
def test_bad_input_ends_in_one_line(bad, monkeypatch, small_inception, samples, options, start, end):
    monkeypatch.chdir(bad)
    monkeypatch.setattr(fid, "load_network", LOADED)
    words = f"{samples} --ref b --workers 0 --features test_vit --features-weights test_vit.pth {options}"
    line = message(fid.main, words.split())
    assert line.startswith(start) and end in line
    assert "will likely succeed" not in line  # torch's advice to run the code in a file
