"""fid.py against slow formulas, Pillow, scipy, torchvision, and the numbers of the programs it replaces."""

import functools
import hashlib
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import tracemalloc
import zipfile
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


def digest(network):
    """Eight digits of the SHA-256 of all weights."""
    content = b"".join(value.numpy().tobytes() for value in network.state_dict().values())
    return hashlib.sha256(content).hexdigest()[:8]


def run(capsys, *argv):
    """The JSON line of the command."""
    fid.main([str(word) for word in argv] + ["--json", "--workers", "0"])
    return json.loads(capsys.readouterr().out)


class Colours(torch.nn.Module):
    """A network of three features, the mean colour, and two classes: light and dark."""

    def __init__(self, protocol="adm"):
        super().__init__()
        self.fc = torch.nn.Linear(3, 2)
        self.fc.weight.data = torch.tensor([[1.0, 1, 1], [-1, -1, -1]]) / 32
        self.requires_grad_(False)

    def forward(self, images):
        return images.float().mean((2, 3)) - 128

    def fold(self):
        return self


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
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["adm", "pytorch-fid", "clean"])
def test_numbers_of_the_programs_it_replaces(place, inception, capsys, protocol):
    expected, first_features = PEERS[protocol]
    network, made_by = fid.load_network(None, protocol, inception)
    assert made_by.startswith(f"{protocol} inception ")
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules())  # all folded
    sets = [fid.ImageSet(str(place / name)) for name in "ab"]
    a, b = (fid.extract(source, network, 8, 0, torch.device("cpu")) for source in sets)
    first = sets[0].items.index(str(place / "a/0/00.png"))
    np.testing.assert_allclose(a[first, :2], first_features, rtol=1e-4)
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
        reference = torchvision.models.inception_v3(num_classes=1008, aux_logits=False, init_weights=False)
    network = fid.Inception()
    state = network.state_dict()
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in reference.state_dict().items()}
    # The forward leaves out the last four children, of which the first is written out.
    assert [name for name, _ in network.named_children()][-4:] == ["Mixed_7c", "avgpool", "dropout", "fc"]
    again = fid.Inception().state_dict()  # random, but seeded
    assert all(torch.equal(state[k], again[k]) for k in state if k != "fc.bias")  # that one is not used


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
    network = fid.TimmFeatures("vit_small_patch14_dinov2", model.state_dict())
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
    return np.stack([source.read(item) for item in source.items]).transpose(0, 2, 3, 1)


def test_sets_hold_the_same_images(place, tmp_path):
    """A folder's are shuffled, an .npz keeps its order; --num takes the first, --ref-num some of all."""
    array = arrays_of(place / "a")
    np.savez(tmp_path / "a.npz", array, np.arange(12))
    for num, spread, taken in (
        (None, False, range(12)),
        (99, True, range(12)),
        (4, False, [0, 1, 2, 3]),
        (4, True, [0, 3, 6, 9]),
        (5, True, [0, 2, 4, 7, 9]),
    ):
        order = np.random.default_rng(0).permutation(len(taken))
        for path, expected in ((place / "a", array[[*taken]][order]), (tmp_path / "a.npz", array[[*taken]])):
            source = fid.ImageSet(str(path), num=num, spread=spread)
            assert np.array_equal(opened(source), expected)


def test_npz_of_images_is_not_read_whole(tmp_path):
    np.savez(tmp_path / "x.npz", np.zeros((1000, 128, 128, 3), np.uint8))  # 49 MB
    tracemalloc.start()
    source = fid.ImageSet(str(tmp_path / "x.npz"), num=4, spread=True)
    assert source.read(source.items[1]).shape == (3, 128, 128)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e6


def test_listing_of_a_folder(tmp_path, monkeypatch):
    """All images below it, sorted; class folders mean nothing, named pipes are no images."""
    monkeypatch.chdir(tmp_path)
    files = ["x/10.PNG", "x/9.jpg", "x/a/2.webp", "x/a/b/1.bmp", "x/z.jpeg"]
    for name in [*files, "x/notes.txt", "x/._9.jpg", "x/.hidden/9.jpg", "x/a/x.gif", "far/1.png"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    os.mkfifo("x/pipe.png")
    (tmp_path / "x/empty").mkdir()
    assert fid.list_images("x", set()) == files
    (tmp_path / "far/2.png").symlink_to("1.png")
    for link, target in {"far/loop": "loop", "x/a/parent": "..", "x/b": "../far", "x/c": "../far"}.items():
        (tmp_path / link).symlink_to(target)
    assert fid.list_images("x", set()) == [*files[:4], "x/b/1.png", "x/b/2.png", files[4]]

    # Root may read every folder.
    listdir = os.listdir

    def refuse(folder):
        if folder == "x/a":
            raise PermissionError(13, "Permission denied", folder)
        return listdir(folder)

    monkeypatch.setattr(os, "listdir", refuse)
    for path, reason in {
        "x/9.jpg": "Not a directory: 'x/9.jpg'",
        "x": "Permission denied: 'x/a'",
        "x/empty": "0 images (.png .jpg .jpeg .webp .bmp), at least 4 are needed",
    }.items():
        line = message(fid.ImageSet, path)
        assert line.startswith(f"{path}: ") and reason in line


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

    # Without --json a line has a metric, which can be asked for in any case.
    fid.main([str(place / "a"), "--ref", str(place / "b"), "--metrics", "FID,Is"])
    lines = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert lines.keys() == {"fid", "is"}
    assert [float(lines[key]) for key in lines] == pytest.approx([expected[key] for key in lines], rel=1e-5)


# Statistics


@pytest.mark.slow
def test_saved_statistics_stand_for_the_images(place, capsys, tmp_path):
    def run_timm(*argv, weights=place / "test_vit.pth"):
        return run(capsys, *argv, "--features", "test_vit", "--features-weights", weights)

    expected = run_timm(place / "a", "--ref", place / "b")
    saved = run_timm(place / "b", "--save-stats", tmp_path / "b.npz")
    state = torch.load(place / "test_vit.pth", weights_only=True)
    assert saved["by"] == f"224px test_vit {digest(fid.TimmFeatures('test_vit', state))}"
    assert saved["ref"] is None
    save_file(state, tmp_path / "copy.safetensors")  # the same weights in another file
    again = run_timm(place / "b", "--ref", tmp_path / "b.npz", weights=tmp_path / "copy.safetensors")
    assert again["by"] == saved["by"] == np.load(tmp_path / "b.npz")["made_by"]
    found = run_timm(place / "a", "--ref", tmp_path / "b.npz")
    assert [found[key] for key in NUMBERS] == pytest.approx([expected[key] for key in NUMBERS], rel=1e-6)
    found = run_timm(place / "a", "--ref", tmp_path / "b.npz", "--metrics", "rec")
    assert "fid" not in found and found["rec"] == expected["rec"]


def test_statistics_are_whole_or_not_there(place, tmp_path, monkeypatch, colours):
    def full(path, **_arrays):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="No space"):
        fid.main([str(place / "a"), "--save-stats", str(tmp_path / "x.npz")])
    assert not (tmp_path / "x.npz").exists()


def test_reference_batches_as_adms(place, capsys, tmp_path, colours):
    """FID by mu and sigma, here shifted by 1, precision and recall by the images."""
    array = arrays_of(place / "b")
    colour = array.mean((1, 2)) - 128
    moments = {"mu": colour.mean(0) + 1, "sigma": np.cov(colour, rowvar=False)}
    np.savez(tmp_path / "adm.npz", array, **moments)
    np.savez(tmp_path / "moments.npz", **moments)
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


def test_features_that_are_not_finite(place, monkeypatch):
    class Broken(Colours):
        def forward(self, images):
            return super().forward(images) * torch.tensor([1, 1, float("nan")])

    monkeypatch.setattr(fid, "load_network", lambda *_: (Broken(), "adm inception 0"))
    line = message(fid.main, [str(place / "a"), "--ref", str(place / "b"), "--workers=0"])
    assert line == f"{place / 'a'}: its features are not finite; are the weights the network's?"


def test_statistics_are_of_one_network(place, capsys, tmp_path, monkeypatch):
    """Those of an unknown maker, as ADM's, are of Inception and adm; a set has no distance from itself."""
    moments = {"mu": np.ones(3), "sigma": np.eye(3)}
    for maker, network in (
        (None, "pytorch-fid inception 0"),
        (None, "224px test_vit 0"),
        ("clean inception 0", "adm inception 0"),
        ("adm inception 6726825d", "adm inception 0"),
    ):
        monkeypatch.setattr(fid, "load_network", lambda *_, by=network: (Colours(), by))
        made_by = {"made_by": maker} if maker else {}
        both, mine = (str(tmp_path / f"{name}.npz") for name in ("both", "mine"))
        np.savez(both, arrays_of(place / "a"), **moments, **made_by)
        np.savez(mine, **moments, **made_by)
        for path in (both, mine):
            start = f"{path}: mu and sigma are of {maker or 'adm inception'}, not of {network}; "
            assert message(fid.main, [str(place / "a"), "--ref", path]).startswith(start)
            assert message(fid.main, [path, "--ref", str(place / "a")]).startswith(start)
        assert run(capsys, place / "a", "--ref", both, "--ref-num", 12)["fid"] < 1e-4


def test_features_do_not_depend_on_batch_or_threads(place):
    network, _ = LOADED("test_vit", "adm", str(place / "test_vit.pth"))
    source = fid.ImageSet(str(place / "a"))
    cases = ((12, 0), (5, 2), (1, 8))
    one, *others = (fid.extract(source, network, *case, torch.device("cpu")) for case in cases)
    for features in others:
        np.testing.assert_allclose(features, one, rtol=1e-4, atol=1e-5)


def test_inception_score_does_not_depend_on_the_order_of_a_folder(tmp_path, capsys, colours, monkeypatch):
    """Splits of eight: in the folder sixteen dark images, a class, come before sixteen light ones."""
    monkeypatch.setattr(fid, "inception_score", functools.partial(fid.inception_score, split_size=8))
    array = np.full((32, 8, 8, 3), 8, np.uint8)
    array[16:] = 248
    for i, pixels in enumerate(array):
        Image.fromarray(pixels).save(tmp_path / f"{i:02}.png")
    np.savez(tmp_path / "sorted.npz", array)
    mixed = np.random.default_rng(1).permutation(32)
    np.savez(tmp_path / "mixed.npz", array[mixed])
    run(capsys, tmp_path, "--save-stats", tmp_path / "saved.npz")

    def score(order):
        counts = [np.bincount(part // 16, minlength=2) / 8 for part in order.reshape(4, 8)]
        return np.mean([np.exp(-np.sum(p[p > 0] * np.log(p[p > 0]))) for p in counts])

    shuffled = score(np.random.default_rng(0).permutation(32))
    assert shuffled > 1.7
    expected = {"sorted.npz": 1, "mixed.npz": score(mixed), "": shuffled, "saved.npz": shuffled}
    for name, value in expected.items():
        found = run(capsys, tmp_path / name, "--metrics", "is")["is"]
        assert found == pytest.approx(value, rel=1e-4), name


# Flags, and what settings.json says


def test_settings_of_samples_are_defaults(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def values(*argv):
        args = fid.parse_args([*argv, "--metrics", "is"])
        return args.ref, args.crop, args.inception_weights, args.num, args.ref_num

    normal = (None, None, "hub", None, None)
    demo = (str(tmp_path / "data/demo"), 32, "random", 200, 200)
    mine = (str(tmp_path / "my images"), 48, "hub", None, None)
    for folder, settings, expected in (
        ("demo", {"demo": True, "reference": "data/demo", "crop": 32}, demo),
        ("mine", {"demo": False, "reference": "my images", "crop": 48}, mine),
        ("released", {"demo": False, "reference": None, "crop": 48}, normal),
        ("strange", {}, normal),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "settings.json").write_text(json.dumps(settings))
        assert values(folder) == expected
    assert values("nowhere") == values("x.npz") == normal
    # A flag wins; with a reference, and for statistics of the samples alone, the file is not read.
    given = ["--crop", "9", "--num", "5", "--inception-weights", "hub"]
    assert values("demo", *given) == (demo[0], 9, "hub", 5, 200)
    assert values("mine", "--ref", "y") == ("y", *normal[1:])
    assert values("mine", "--save-stats", "x.npz") == normal
    assert "--ref is missing" in message(fid.main, ["strange"])


def test_reference_and_crop_come_from_the_samples(place, tmp_path, monkeypatch, capsys, colours):
    """As `python fid.py samples` after sample.py, whose training images are larger than the samples."""
    monkeypatch.chdir(tmp_path)
    images(tmp_path / "samples", 12, seed=4, size=(24, 24))
    # A folder of this name is a folder here: only --ref means ADM's batch by it.
    images(tmp_path / "imagenet256", 10, seed=5)
    settings = {"reference": "imagenet256", "crop": 24, "demo": False}
    (tmp_path / "samples/settings.json").write_text(json.dumps(settings))
    found = run(capsys)
    expected = run(capsys, "samples", "--ref", tmp_path / "imagenet256", "--crop", 24)
    assert found == expected and found["ref_num"] == 10
    other = run(capsys, "samples", "--crop", 8)
    assert other == run(capsys, "samples", "--ref", tmp_path / "imagenet256", "--crop", 8) != found
    (tmp_path / "imagenet256").rename(tmp_path / "moved")
    line = message(fid.main, [])
    assert f"No such file or directory: '{tmp_path / 'imagenet256'}'" in line and "--ref" in line
    assert fid.main(["samples", "--metrics", "is", "--workers=0"]) is None  # which needs no reference


def test_first_line(place, tmp_path, capsys, colours):
    def first_line(*argv):
        fid.main([str(word) for word in argv])
        return capsys.readouterr().err.splitlines()[0]

    line = first_line(place / "a", "--ref", place / "b", "--device=cpu")
    known = f"samples {place / 'a'}; num 12; ref {place / 'b'}; ref_num 10; by adm inception 0; fp32 on cpu; "
    assert line == known + "FID of fewer than 2048 images is biased"
    line = first_line(place / "a", "--ref", place / "b", "--inception-weights=random")
    assert line.endswith("an untrained network, as the demo's: its numbers compare with nothing")

    # One small set is enough for a bias, whichever it is.
    features = np.random.default_rng(0).normal(size=(2048, 3)).astype(np.float32)
    moments = {"mu": features.mean(0), "sigma": np.cov(features, rowvar=False), "made_by": "adm inception 0"}
    np.savez(tmp_path / "large.npz", features=features, **moments)
    np.savez(tmp_path / "small.npz", features=features[:2047], **moments)
    for samples, ref in (("large", "large"), ("large", "small"), ("small", "large")):
        line = first_line(tmp_path / f"{samples}.npz", "--ref", tmp_path / f"{ref}.npz", "--metrics=fid")
        assert ("biased" in line) == ("small" in (samples, ref))

    # Images of two sizes are named, whether or not both sets are cropped to one.
    images(tmp_path / "square", 5, seed=0, size=(24, 24))
    a, b, square = place / "a", place / "b", tmp_path / "square"
    for samples, ref, crop, two_sizes in (
        (a, square, [], True),
        (a, b, [], False),
        (a, square, ["--crop=16"], True),
        (square, a, ["--crop=24"], False),
    ):
        line = first_line(samples, "--ref", ref, "--metrics=fid", *crop)
        assert ("differ in size" in line) == two_sizes


def test_tf32_is_off_where_features_are_computed_and_there_alone(place, monkeypatch):
    seen = []

    class Spy(Colours):
        def forward(self, images):
            seen.append(torch.backends.cudnn.allow_tf32)
            return super().forward(images)

    monkeypatch.setattr(fid, "load_network", lambda *_: (Spy(), "adm inception 0"))
    for tf32 in (True, False):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
        fid.main([str(place / "a"), "--ref", str(place / "b")])
        assert torch.backends.cudnn.allow_tf32 is tf32 and not torch.is_inference_mode_enabled()
    assert seen and not any(seen)


SLOW_THREADS = """
import runpy, sys, threading, time
from PIL import Image
read = Image.open
def wait(path):
    if threading.current_thread() is not threading.main_thread():
        sys.stderr.write("\\nreading\\n")
        time.sleep(1)
    return read(path)
Image.open = wait
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_interrupt_ends_in_one_line(place):
    """Ctrl-C while threads read images."""
    words = f"a --ref b --features test_vit --features-weights {place}/test_vit.pth".split()
    command = [sys.executable, "-c", SLOW_THREADS, fid.__file__, *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=place, **pipes)
    while process.stderr.readline() != "reading\n":
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, rest = process.communicate(timeout=120)
    assert process.returncode == 130 and out == "" and "Traceback" not in rest
    assert rest.splitlines()[-1].startswith("interrupted; nothing was written")


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
            assert not source.items or opened(source).shape[3] == 3
        except SystemExit as stop:
            refused += 1
            assert "damaged.npz: " in str(stop) and "\n" not in str(stop)
    assert 200 < refused < 400


def test_hostile_npz_headers(tmp_path):
    start = "{'descr': '|u1', 'fortran_order': False, 'shape': "
    for header in (
        start + "(-4, -8, 8, 3)}",
        start + "(4000000000000, 8, 8, 3)}",
        start + "(0, 8, 8, 3)}",
        start + "(4, 8, 8)}",
        start.replace("False", "True") + "(4, 8, 8, 3)}",
        start.replace("u1", "O") + "(4, 8, 8, 3)}",
        "__import__('os').abort()",
    ):
        text = header.encode().ljust(117) + b"\n"
        with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
            content = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(4 * 8 * 8 * 3)
            archive.writestr("arr_0.npy", content)
        assert "x.npz: " in message(fid.ImageSet, str(tmp_path / "x.npz")), header


def test_hostile_images(tmp_path):
    """Each file by itself, beside good ones of its size: its name in one line. Good ones: test_images.py."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG")
    for name, write in {
        "truncated.jpg": lambda file: file.write_bytes(buffer.getvalue()[:700]),
        "bomb.png": lambda file: Image.new("1", (20000, 20000)).save(file),
        "dangling.png": lambda file: file.symlink_to(tmp_path / "nowhere.png"),
        "flat.png": lambda file: Image.new("RGB", (4000, 1)).save(file),
        "new\nline.png": lambda file: file.write_bytes(b""),
    }.items():
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        for good in ("000.png", "001.png", "002.png"):
            Image.fromarray(noise).save(folder / good)
        write(folder / name)
        assert repr(name)[1:-1] in message(lambda path: opened(fid.ImageSet(path)), str(folder))


# Files of others


def test_download_checks_the_hash(tmp_path, monkeypatch):
    """The released file's name ends in the first digits of its SHA-256: any other content is refused."""
    monkeypatch.setattr(fid, "Inception", Colours)
    released = tmp_path / "pt_inception-2015-12-05-6726825d.pth"
    assert fid.URLS["hub"].endswith(released.name)
    network = Colours()
    torch.save(network.state_dict(), released)
    monkeypatch.setitem(fid.URLS, "hub", released.as_uri())
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    assert "invalid hash value" in message(fid.load_network, None, "adm", "hub")
    assert not list((tmp_path / "hub").rglob("*.pth"))
    digits = hashlib.sha256(released.read_bytes()).hexdigest()[:8]
    renamed = released.rename(tmp_path / f"inception-{digits}.pth")
    monkeypatch.setitem(fid.URLS, "hub", renamed.as_uri())
    fetched, copied = (fid.load_network(None, "adm", weights)[1] for weights in ("hub", str(renamed)))
    assert fetched == copied == f"adm inception {digest(network)}"


def test_reference_batches_are_fetched_once(place, capsys, monkeypatch, tmp_path, colours):
    assert "imagenet/256/" in fid.URLS["imagenet256"] and "imagenet/512/" in fid.URLS["imagenet512"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    (tmp_path / "imagenet256").mkdir()  # the name means the reference batch all the same
    batch = tmp_path / "batch.npz"
    monkeypatch.setitem(fid.URLS, "imagenet256", batch.as_uri())
    np.savez(batch, arrays_of(place / "b"), mu=np.zeros(64), sigma=np.eye(64))
    some = ("--ref-num", 99)  # not its mu and sigma, which would be of Inception
    expected = run(capsys, place / "a", "--ref", batch, *some)
    found = run(capsys, place / "a", "--ref", "imagenet256", *some)
    assert found == expected | {"ref": "imagenet256"}
    content = batch.read_bytes()
    batch.unlink()
    assert run(capsys, place / "a", "--ref", "imagenet256", *some) == found
    (path,) = (tmp_path / "hub/hub/checkpoints").iterdir()
    assert path.name == "batch.npz" and path.read_bytes() == content

    # Batches that are cut, pages of an error, and what can't be had, are refused and leave no file.
    path.unlink()
    for found in (content[: len(content) // 2], content[:-30], b"<html>", None):
        reason = "BadZipFile" if found else "No such file"
        if found:
            batch.write_bytes(found)
        line = message(fid.local_file, "imagenet256")
        assert line.startswith(f"{batch.as_uri()}: ") and reason in line and "FILE" in line
        assert capsys.readouterr().err.startswith(f"fetching {batch.as_uri()}\n")  # before anything else
        batch.unlink(missing_ok=True)
    assert not list(path.parent.iterdir())


def test_weights_by_their_name_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(fid, "Inception", Colours)
    torch.save(Colours().state_dict(), tmp_path / "inception.pt")
    requested = []

    def download(repository, name):
        requested.append((repository, name))
        if name == "gone.pt":
            raise OSError("no such entry")
        return str(tmp_path / name.rpartition("/")[2])

    monkeypatch.setattr(fid, "hf_hub_download", download)
    _, by_name = fid.load_network(None, "adm", "hub:owner/repo/deep/inception.pt")
    _, by_file = fid.load_network(None, "adm", str(tmp_path / "inception.pt"))
    assert by_name == by_file and requested == [("owner/repo", "deep/inception.pt")]
    for name in ("hub:owner/repo/gone.pt", "hub:owner", str(tmp_path / "none.pt")):
        assert message(fid.load_network, None, "adm", name).startswith(f"Inception of {name}: ")


# Input that can't be used


@pytest.fixture(scope="module")
def bad(place):
    """Inputs that can't be used, by name."""
    for name, files in {"one": "x", "broken": "vwxy", "last": "vwxy", "sizes": "vwxy"}.items():
        (place / name).mkdir()
        for file in files:
            Image.new("RGB", (32, 32)).save(place / name / f"{file}.png")
    for path in (*(place / "broken").iterdir(), place / "last/y.png"):
        path.write_bytes(b"no image")
    Image.new("RGB", (32, 48)).save(place / "sizes" / "y.png")
    (place / "junk.npz").write_bytes(b"no zip")
    zeros, one = np.zeros(64), np.eye(64)
    np.savez(place / "half.npz", sigma=one)
    np.savez(place / "whole.npz", mu=zeros, sigma=one)
    np.savez(place / "lone.npz", mu=zeros)
    np.savez(place / "floats.npz", np.zeros((4, 8, 8, 3)))
    np.savez(place / "pickle.npz", mu=np.array([{}]), sigma=one)
    np.savez_compressed(place / "packed.npz", np.zeros((4, 8, 8, 3), np.uint8))
    torch.save({"weight": torch.zeros(2)}, place / "wrong.pth")
    (place / "code.pth").write_bytes(pickle.dumps(os.getcwd, 2))
    return place


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("nowhere --ref a", "nowhere: \"[Errno 2] No such file or directory: 'nowhere'"),
        ("a --ref nowhere.npz", "nowhere.npz: "),
        ("nowhere --ref imagenet256", "nowhere: "),
        ("one --ref a", "one: 1 images"),
        ("broken --ref a", "not a readable image (UnidentifiedImageError("),
        ("junk.npz --ref a", "junk.npz: 'File is not a zip file'; "),
        ("a --ref half.npz", "half.npz: 0 images"),
        ("a --ref lone.npz", "sigma is not a file in the archive"),
        ("a --ref floats.npz", "floats.npz: 'arr_0 is float64"),
        ("a --ref packed.npz", "arr_0, uncompressed"),
        ("a --ref pickle.npz", "allow_pickle"),
        ("whole.npz --ref a --num 3", "whole.npz: 0 images"),
        ("a --ref whole.npz --ref-num 9", "whole.npz: 0 images"),
        ("a --ref whole.npz --crop 8", "whole.npz: 0 images"),
        ("a --ref whole.npz --metrics prec", "--metrics prec: these sets allow fid,is; "),
        ("a --ref b --metrics is --features test_vit", "--metrics is: these sets allow none; "),
        ("a --ref b --metrics fid,kid", "--metrics fid,kid: these sets allow fid,prec,rec,is; "),
        ("a --save-stats nowhere/x.npz", "nowhere/x.npz: expected a new .npz in a folder"),
        ("a --save-stats x", "argument --save-stats: x: expected a new .npz"),
        ("a --save-stats whole.npz", "argument --save-stats: whole.npz: expected a new .npz"),
        ("a --ref b --num 0", "argument --num: expected a whole number from 1, got 0; --help lists the"),
        ("a --ref b --device cpux", "argument --device: cpux: no such device on this machine"),
        ("a --ref b --metric fid", "unrecognized arguments: --metric fid"),
        ("a --ref b --features-weights x.pth", "--features-weights needs --features"),
        ("a --ref b --features test_vit --inception-weights random", "not allowed with argument --features"),
    ],
)
def test_bad_sets_and_flags_are_named_before_anything_is_fetched(bad, monkeypatch, words, line):
    def fetch(*_args, **_options):
        raise AssertionError("fetched before the sets were looked at")

    monkeypatch.chdir(bad)
    monkeypatch.setattr(fid, "load_network", fetch)
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    assert line in message(fid.main, words.split())


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("last --batch-size 3", "'last/y.png': not a readable image "),
        ("last --workers 2", "'last/y.png': not a readable image "),
        ("sizes --batch-size 1", "[3, 48, 32]"),
        ("a --features no_such_model", "no_such_model of test_vit.pth: RuntimeError('Unknown model"),
        ("a --features-weights no.pth", "test_vit of no.pth: FileNotFoundError"),
        ("a --features-weights wrong.pth", "test_vit of wrong.pth: RuntimeError('Error(s) in loading"),
        ("a --features-weights code.pth", "test_vit of code.pth: UnpicklingError"),
    ],
)
def test_bad_images_and_weights_end_in_one_line(bad, monkeypatch, words, line):
    monkeypatch.chdir(bad)
    monkeypatch.setattr(fid, "load_network", LOADED)
    words = f"--ref b --features test_vit --features-weights test_vit.pth {words}"
    found = message(fid.main, words.split())
    assert line in found
    assert "will likely succeed" not in found  # torch's advice to run the code in a file
    if "sizes" in words:
        assert "'sizes/y.png'" in found and "[3, 32, 32]" in found and "--crop" in found
