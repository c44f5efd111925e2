"""Files from the Hugging Face hub: the real download code against an HTTP server of the test's own.

The server speaks what huggingface_hub asks of the hub. Its files have the released names and layouts, but are
small. Nothing here needs a network.
"""

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from helpers import message
from PIL import Image
from torch import nn

import dit_dh
import flow_train
import rae_decoder_train
import rae_encoder
import sample

ROOT = Path(__file__).parents[1]
REPO = "nyu-visionx/RAE-collections"
COMMIT = "0123456789" * 4
NAME = f"hub:{REPO}/a/model.pt"
CANNOT = "can't be fetched"


class Handler(BaseHTTPRequestHandler):
    """One file a path; the bodies of those in the server's set `cut` end in the middle."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        self.server.requests.append((self.command, self.path))
        match = re.fullmatch("/([^/]+/[^/]+)/resolve/main/(.+)", self.path)
        files = self.server.repositories.get(match and match[1])
        data = files.get(match[2]) if files else None
        if data is None:
            self.send_response(404 if files else 401)
            self.send_header("X-Error-Code", "EntryNotFound" if files else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return

        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body and match[2] in self.server.cut:
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.connection.close()
            self.close_connection = True
        elif body:
            self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    """A hub on 127.0.0.1: repositories {name: {path: bytes}}, and the requests that it had."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.repositories = {REPO: {"a/model.pt": os.urandom(200_000)}}
    server.cut = set()
    server.requests = []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def use_endpoint(monkeypatch, port):
    """HF_ENDPOINT counts when huggingface_hub is imported, which this process has done."""
    endpoint = f"http://127.0.0.1:{port}"
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    for module in (huggingface_hub.constants, huggingface_hub.file_download):  # of 2.x, of 0.x
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)


@pytest.fixture
def hub(server, tmp_path, monkeypatch):
    """The server as this process's hub, with an empty cache, and without the pauses between retries."""
    use_endpoint(monkeypatch, server.server_port)
    cache = str(tmp_path / "hub-cache")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", cache)
    monkeypatch.setattr(rae_encoder, "HF_HUB_CACHE", cache)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "RANK"):
        monkeypatch.delenv(name, raising=False)
    # 0.x keeps a session that once was offline.
    getattr(huggingface_hub.utils, "reset_sessions", int)()
    return server


def bodies(server, path="a/model.pt"):
    """How often the file's body was asked for."""
    return sum(command == "GET" and name.endswith(path) for command, name in server.requests)


def blobs(tmp_path):
    """The whole files in the cache; not what is left of a download that was cut."""
    return [path for path in tmp_path.glob("hub-cache/*/blobs/*") if path.suffix != ".incomplete"]


def test_a_file_is_fetched_once_into_the_hubs_cache(hub, tmp_path, monkeypatch):
    """By four ranks at once; then the cache serves, also without a network."""
    data = hub.repositories[REPO]["a/model.pt"]
    with ThreadPoolExecutor(4) as ranks:
        paths = list(ranks.map(rae_encoder.local_file, [NAME] * 4, ["--flow"] * 4))
    assert len(set(paths)) == 1 and bodies(hub) == 1
    assert Path(paths[0]).read_bytes() == data and Path(paths[0]).is_relative_to(tmp_path / "hub-cache")
    assert [blob.stat().st_size for blob in blobs(tmp_path)] == [len(data)]  # one copy on the disk
    assert rae_encoder.local_file(NAME, "--flow") == paths[0] and bodies(hub) == 1

    with monkeypatch.context() as unreachable:
        use_endpoint(unreachable, 1)  # nothing listens there
        assert rae_encoder.local_file(NAME, "--flow") == paths[0]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    number = len(hub.requests)
    assert rae_encoder.local_file(NAME, "--flow") == paths[0]
    assert CANNOT in message(rae_encoder.local_file, f"hub:{REPO}/b.pt", "--flow")
    assert len(hub.requests) == number


def test_the_file_is_named_before_anything_is_asked(hub, monkeypatch, capsys, tmp_path):
    printed = []

    def download(repository, name):
        printed.append(capsys.readouterr().err)
        raise OSError("no network")

    monkeypatch.setattr(rae_encoder, "hf_hub_download", download)
    assert "no network" in message(rae_encoder.local_file, NAME, "--flow")
    monkeypatch.setenv("RANK", "1")  # of several ranks one speaks
    message(rae_encoder.local_file, NAME, "--flow")
    assert printed == [f"{NAME}, fetched into {tmp_path}/hub-cache where it is missing\n", ""]


def test_a_download_that_is_cut_is_never_read(hub, tmp_path):
    hub.cut.add("a/model.pt")
    line = message(rae_encoder.read_weights, NAME, "--decoder")
    assert line.startswith(f"--decoder {NAME}: {CANNOT}") and line.endswith("a local file does as well")
    assert not blobs(tmp_path) and not list(tmp_path.glob("hub-cache/*/snapshots/*/a/model.pt"))
    hub.cut.clear()
    path = rae_encoder.local_file(NAME, "--decoder")
    assert Path(path).read_bytes() == hub.repositories[REPO]["a/model.pt"]


@pytest.mark.parametrize(
    ("name", "error"),
    [
        (f"{REPO}/b.pt", r"\w*EntryNotFoundError: 404 .*"),
        ("no/repo/b.pt", "RepositoryNotFoundError: 401 .*"),
        ("no/repo", "RepositoryNotFoundError: 401 .*"),
        ("no--such/repo/b.pt", "HFValidationError: .*"),
        (f"{REPO}/a/model.pt", ".*"),  # where nothing listens
    ],
)
def test_what_the_hub_has_not_ends_in_one_line(hub, monkeypatch, name, error):
    if error == ".*":
        use_endpoint(monkeypatch, 1)
    file = "/diffusion_pytorch_model.safetensors" if name == "no/repo" else ""
    line = rf"--x hub:{name}{file}: {CANNOT} .*\({error}\); a local file does as well"
    assert re.fullmatch(line, message(rae_encoder.local_file, f"hub:{name}", "--x"))


def test_timms_own_downloads_are_named(hub, capsys):
    line = message(rae_encoder.Encoder, "dinov2-small")
    name = "timm/vit_small_patch14_reg4_dinov2.lvd142m"
    assert f"hub:{name}/model.safetensors, fetched into " in capsys.readouterr().err
    assert f"model.safetensors of {name}" in line
    assert "--encoder-weights FILE takes a local copy" in line


# The released networks

SIZES = {"width": 32, "depth": 2, "heads": 2, "head_width": 32, "head_depth": 2, "head_heads": 2}
SHAPE = (6, 16, 16)
FAST = "-n 2 --steps 2 --precision fp32 --device cpu --no-compile"
DIT = "DiTs/Dinov2/wReg_base/ImageNet{}/DiTDH-{}/stage2_model.pt"
FLOWS = {256: ("XL", "S_ep14"), 512: ("XL_ep400", "S_ep20")}  # and the weak networks
DECODERS = {
    size: f"decoders/dinov2/wReg_base/ViTXL_n08{end}/model.pt" for size, end in ((256, ""), (512, "_i512"))
}
STATS = {size: f"stats/dinov2/wReg_base/imagenet1k{end}/stat.pt" for size, end in ((256, ""), (512, "_512"))}


def as_bytes(file):
    buffer = io.BytesIO()
    torch.save(file, buffer)
    return buffer.getvalue()


def network(seed):
    torch.manual_seed(seed)
    model = dit_dh.build("DiT-DH-S", SHAPE, 1000, **SIZES)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.15)
    return model.state_dict()


def statistics(seed):
    torch.manual_seed(seed)
    return {"mean": torch.randn(SHAPE), "var": torch.rand(SHAPE) + 0.5}


@pytest.fixture
def released(server, tmp_path, monkeypatch):
    """The files of both presets by their released names, as the authors lay them out -> {path: dict}."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    white = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    decoder = rae_decoder_train.Decoder(name="ViT-mini", channels=6, grid=16, patch_size=2, **white)
    files = {}
    for size, flows in FLOWS.items():
        for k, flow in enumerate(flows):
            files[DIT.format(size, flow)] = network(size + k)
        files[DECODERS[size]] = decoder.state_dict()
        files[STATS[size]] = statistics(size)
    server.repositories[REPO] = {path: as_bytes(file) for path, file in files.items()}
    return files


def pixels(folder, num=2):
    return np.stack([np.array(Image.open(f"{folder}/{i:06d}.png")) for i in range(num)])


@pytest.mark.slow
@pytest.mark.parametrize(("size", "scale"), [(256, 1.42), (512, 1.5)])
def test_presets_are_the_released_networks(hub, released, size, scale):
    """huggingface_hub has requests of its own, too."""
    flow, weak = (DIT.format(size, name) for name in FLOWS[size])
    names = {"flow": flow, "weak": weak, "decoder": DECODERS[size], "stats": STATS[size]}
    for name, path in names.items():
        torch.save(released[path], f"{name}.pt")
    local = f"{FAST} --flow flow.pt --decoder decoder.pt --stats stats.pt"
    for guide, local_guide in (("", ""), ("--autoguide", f"--autoguide weak.pt --cfg {scale}")):
        hub.requests.clear()
        sample.main(f"--preset imagenet{size} {FAST} {guide} --out preset{guide}".split())
        asked = {path.split("/resolve/main/")[1] for _, path in hub.requests if "/resolve/main/" in path}
        assert asked == set(names.values()) - (set() if guide else {weak})
        sample.main(f"{local} {local_guide} --out local{guide}".split())
        np.testing.assert_array_equal(pixels(f"preset{guide}"), pixels(f"local{guide}"))
        settings = json.loads(Path(f"preset{guide}/settings.json").read_text())
        assert settings["cfg"] == (scale if guide else 1)
        assert settings == json.loads(Path(f"local{guide}/settings.json").read_text())
    assert not np.array_equal(pixels("preset"), pixels("preset--autoguide"))


def test_whose_statistics_count(hub, released, monkeypatch):
    """--stats, then those of the flow, of its decoder, of the preset."""
    preset = ["--preset", "imagenet256"]
    torch.save(statistics(8), "given.pt")
    config = {"latent_shape": list(SHAPE)}
    known = config | {"statistics": tuple(statistics(7).values())}
    for flags, file, seed in (
        ([*preset, "--stats", "given.pt"], known, 8),
        (preset, known, 7),
        (preset, config, 256),
    ):
        mean, std = sample.open_statistics(sample.parse_args(flags), file, "cpu")
        assert torch.equal(mean, statistics(seed)["mean"])
        assert torch.allclose(std**2 - 1e-5, statistics(seed)["var"], atol=1e-6)
    line = message(sample.open_statistics, sample.parse_args(["--flow", "bare.pt"]), config, "cpu")
    assert line == "--flow bare.pt: does not tell its latents' statistics; --stats FILE"

    torch.save(released[DECODERS[256]], "decoder.pt")
    decoder, _ = rae_decoder_train.load_decoder("decoder.pt")
    other = tuple(statistics(9).values())
    monkeypatch.setattr(sample, "load_decoder", lambda *_: (decoder, {"statistics": other}))
    for flow, expected in ((known, known["statistics"]), (config, other)):
        args = sample.parse_args(["--flow", "flow.pt", "--decoder", "decoder.pt"])
        _, found = sample.open_decoder(args, "decoder.pt", flow, torch.device("cpu"))
        assert found["statistics"] is expected


@pytest.mark.slow
def test_one_command_and_then_without_network(hub, released, tmp_path, monkeypatch):
    """The environment alone names the server and the cache, as a user's does."""
    command = f"{ROOT / 'sample.py'} --preset imagenet256 --autoguide {FAST}".split()
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(tmp_path / "home"),
        "NO_PROXY": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
    }
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        environment.pop(name, None)
    run = [sys.executable, *command, "--out", "a"]
    process = subprocess.run(run, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    cache = tmp_path / "home" / "hub"
    for name in (*(DIT.format(256, flow) for flow in FLOWS[256]), DECODERS[256], STATS[256]):
        assert f"hub:{REPO}/{name}, fetched into {cache} where it is missing\n" in process.stderr
        assert bodies(hub, name) == 1

    number = len(hub.requests)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    sample.main([*command[1:], "--out", "b"])
    assert len(hub.requests) == number
    np.testing.assert_array_equal(pixels("a"), pixels("b"))


@pytest.mark.parametrize("flag", ["--flow", "--decoder", "--stats", "--autoguide"])
def test_sampling_takes_hub_names_one_by_one(hub, released, flag):
    flags = {f"--{name}": sample.PRESETS["imagenet256"][name] for name in ("flow", "decoder", "stats")}
    flags |= {"--autoguide": sample.AUTOGUIDE["imagenet256"][0], "--cfg": "1.42"}
    flags[flag] = f"hub:{REPO}/none.pt"
    line = message(sample.main, [*FAST.split(), *(part for pair in flags.items() for part in pair)])
    assert line.startswith(f"{flag} hub:{REPO}/none.pt: {CANNOT}")


# The other files of weights


def test_encoders_and_starts_come_from_the_hub(hub, released):
    encoder = rae_encoder.Encoder("test_vit", 32, 32, "random")
    hub.repositories["a/b"] = {"vit.pt": as_bytes(rae_encoder.load_vit("test_vit", "random").state_dict())}
    assert rae_encoder.Encoder("test_vit", 32, 32, "hub:a/b/vit.pt").hash == encoder.hash

    network = dit_dh.build("DiT-DH-S", SHAPE, 1000, **SIZES)
    config = {"latent_shape": list(SHAPE), "sizes": network.sizes, "classes": [*map(str, range(1000))]}
    name = DIT.format(256, "XL")
    flow_train.initialise(network, config, f"hub:{REPO}/{name}")
    assert all(torch.equal(network.state_dict()[key], value) for key, value in released[name].items())


def test_a_repository_without_a_path_is_a_folder_of_two_files(hub, monkeypatch):
    """In the format of diffusers' AutoencoderRAE."""
    names = ("config.json", "diffusion_pytorch_model.safetensors")
    files = {name: os.urandom(100) for name in names}
    hub.repositories["nyu/rae"] = {**files, "README.md": b""}
    hub.repositories["nyu/half"] = {"config.json": b"{}"}

    def read_autoencoder(folder):
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}

    monkeypatch.setattr(rae_encoder, "read_autoencoder", read_autoencoder)
    for name in ("hub:nyu/rae", "hub:nyu/rae/"):
        assert rae_encoder.read_weights(name, "--decoder") == files
    line = message(rae_decoder_train.load_decoder, "hub:nyu/half")
    assert "--decoder hub:nyu/half/diffusion_pytorch_model.safetensors: can't be fetched" in line
