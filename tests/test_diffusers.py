"""Decoders in the format of diffusers' AutoencoderRAE: read as they are, written by README's lines.

The files are built by the map of names; where diffusers and transformers are installed the real class makes
and reads them as well.
"""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from helpers import message, read, write_flow
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import dit_dh
import flow_train
import rae_decoder_train
import sample
from rae_decoder_train import Decoder, load_decoder

README = (Path(__file__).parents[1] / "README.md").read_text()
IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
HALF = [0.5] * 3, [0.5] * 3
# Type, width and patch of the encoder, its pixels' mean and deviation, and timm's name for it.
ENCODERS = [
    ("dinov2", 384, 14, *IMAGENET, "vit_small_patch14_reg4_dinov2.lvd142m"),
    ("dinov2", 768, 14, *IMAGENET, "vit_base_patch14_reg4_dinov2.lvd142m"),
    ("dinov2", 1024, 14, *IMAGENET, "vit_large_patch14_reg4_dinov2.lvd142m"),
    ("siglip2", 768, 16, *HALF, "vit_base_patch16_siglip_256.v2_webli"),
    ("mae", 768, 16, *IMAGENET, "vit_base_patch16_224.mae"),
]


@pytest.fixture(autouse=True)
def small_vit(monkeypatch):
    """ViT-mini so small that nothing here takes long: width, depth, heads, MLP."""
    monkeypatch.setitem(rae_decoder_train.DECODERS, "ViT-mini", (32, 2, 4, 64))


def make_decoder(channels, grid, mean, std, seed=0):
    """A decoder whose weights, class token and biases all count."""
    torch.manual_seed(seed)
    decoder = Decoder(name="ViT-mini", channels=channels, grid=grid, patch_size=2, mean=mean, std=std).eval()
    for parameter in decoder.parameters():
        nn.init.normal_(parameter, std=0.3)
    return decoder


def make_statistics(shape, seed=1):
    torch.manual_seed(seed)
    return torch.randn(shape), torch.rand(shape) + 0.5


def write_autoencoder(folder, kind, width, patch, decoder, statistics=None, heads=4):
    """The two files of an AutoencoderRAE around our decoder, name by name."""
    state = {"encoder.embeddings.cls_token": torch.randn(1, 1, width)}
    for key, value in decoder.state_dict().items():
        match = re.fullmatch(r"(decoder_layers\.\d+)\.attention\.(.+)\.(weight|bias)", key)
        if match:
            place = {"output.dense": "to_out.0"} | {
                f"attention.{k}": f"to_{k[0]}" for k in ("query", "key", "value")
            }
            key = f"{match[1]}.attention.{place[match[2]]}.{match[3]}"
        if key != "decoder_pos_embed":
            state[f"decoder.{key}"] = value.clone()
    state["encoder_mean"] = decoder.mean[None].clone()
    state["encoder_std"] = decoder.std[None].clone()
    state["_latents_mean"], state["_latents_std"] = torch.zeros(1), torch.ones(1)
    if statistics:
        mean, var = statistics
        state["_latents_mean"], state["_latents_std"] = mean, (var + 1e-5).sqrt()

    # Its config.json tells more, which is not read.
    config = {
        "encoder_type": kind,
        "encoder_hidden_size": width,
        "encoder_patch_size": patch,
        "encoder_input_size": patch * decoder.grid,
        "patch_size": decoder.patch_size,
        "decoder_num_attention_heads": heads,
    }
    os.makedirs(folder)
    save_file(state, os.path.join(folder, "diffusion_pytorch_model.safetensors"), metadata={"format": "pt"})
    Path(folder, "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize("number, grid", [*((number, 16) for number in range(5)), (0, 32)])
def test_an_autoencoder_is_read_by_the_map_of_names(tmp_path, number, grid):
    kind, width, patch, mean, std, name = ENCODERS[number]
    decoder = make_decoder(width, grid, mean, std)
    statistics = make_statistics((width, grid, grid)) if width == 384 else None
    folder = write_autoencoder(tmp_path / "rae", kind, width, patch, decoder, statistics)
    loaded, config = load_decoder(folder)
    z = torch.randn(2, width, grid, grid)
    with torch.no_grad():
        images = decoder(z)
        torch.testing.assert_close(loaded(z), images, rtol=0, atol=0)
    assert images.std() > 0.05
    assert (config["encoder"], config["encoder_size"]) == (name, patch * grid)
    assert (config["image_size"], config["latent_shape"]) == (2 * grid, [width, grid, grid])
    assert ("statistics" in config) == bool(statistics)
    if statistics:
        torch.testing.assert_close(config["statistics"], statistics, rtol=0, atol=1e-6)

    # A flow of another encoder is no pair with it.
    flow_train.identify_decoder(folder, {"encoder": name, "latent_shape": [width, grid, grid]})
    line = message(flow_train.identify_decoder, folder, {"encoder": "test_vit"})
    assert re.match(f"this run has encoder test_vit, --decoder {folder} has .*{re.escape(name)}: ", line)


@pytest.mark.parametrize(("mean", "std"), [([0.0] * 3, [1.0] * 3), ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])])
def test_training_starts_from_it_with_its_own_pixels(tmp_path, monkeypatch, mean, std):
    expected = make_decoder(384, 16, mean, std)
    folder = write_autoencoder(tmp_path / "rae", "dinov2", 384, 14, expected)
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **options: create(name, depth=1, **options))
    flags = f"--init {folder} --encoder dinov2-small --encoder-weights random --patch-size 2 --image-size 32"
    args = rae_decoder_train.parse_args([*flags.split(), "--layers", "last"])
    _, decoder, ema, config = rae_decoder_train.open_networks(args, torch.device("cpu"))
    z = torch.randn(2, 384, 16, 16)
    with torch.no_grad():
        assert torch.equal(decoder(z), expected(z)) and torch.equal(ema(z), expected(z))
    for name, values in (("mean", mean), ("std", std)):
        assert config["decoder"][name] == pytest.approx(values, rel=1e-6)

    args.encoder_size = 112
    line = message(rae_decoder_train.open_networks, args, torch.device("cpu"))
    assert re.match(f"this run has encoder_size 112, --init {folder} has .*224: ", line)


def test_sampling_takes_its_statistics(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shape = (384, 16, 16)
    mean, var = make_statistics(shape)
    decoder = make_decoder(384, 16, *ENCODERS[0][3:5])
    write_autoencoder("rae", "dinov2", 384, 14, decoder, (mean, var))
    write_autoencoder("plain", "dinov2", 384, 14, decoder)
    torch.save({"mean": mean, "var": var}, "stats.pt")
    torch.save(read(write_flow("flow.pt", latent_shape=list(shape)))["ema"], "flow.pt")

    flags = "--flow flow.pt -n 1 --steps 2 --precision fp32 --device cpu --no-compile"
    sample.main(f"{flags} --decoder rae --out a".split())
    sample.main(f"{flags} --decoder plain --stats stats.pt --out b".split())
    # The variance went through its root: a pixel may be one level off.
    a, b = (np.array(Image.open(f"{out}/000000.png")).astype(int) for out in "ab")
    assert abs(a - b).max() <= 1 and a.std() > 5


def test_other_folders_end_in_one_line(tmp_path):
    decoder = make_decoder(384, 16, *ENCODERS[0][3:5])
    folder = write_autoencoder(tmp_path / "heads", "dinov2", 384, 14, decoder, heads=8)
    assert "has 8 heads, a ViT-mini 4" in message(load_decoder, folder)
    os.remove(tmp_path / "heads" / "config.json")
    assert re.search(
        f"--decoder {folder}: not a file of weights .*config.json", message(load_decoder, folder)
    )
    decoder = make_decoder(32, 16, *ENCODERS[0][3:5])
    folder = write_autoencoder(tmp_path / "width", "dinov2", 32, 14, decoder)
    assert message(load_decoder, folder) == f"--decoder {folder}: not a file of weights (32)"
    assert "--flow" in message(dit_dh.load, folder)


# The real class


def autoencoder_class():
    reason = "needs diffusers 0.42 and transformers, which this project does not"
    diffusers = pytest.importorskip("diffusers", minversion="0.42", reason=reason)
    pytest.importorskip("transformers", reason=reason)
    return diffusers.AutoencoderRAE


def random_autoencoder(grid, statistics=None):
    """A small AutoencoderRAE with random weights; statistics: mean and var."""
    mean, var = statistics or (None, None)
    torch.manual_seed(2)
    model = autoencoder_class()(
        encoder_hidden_size=384,
        encoder_num_hidden_layers=1,
        encoder_input_size=14 * grid,
        decoder_hidden_size=32,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=4,
        decoder_intermediate_size=64,
        patch_size=2,
        latents_mean=mean,
        latents_std=None if var is None else (var + 1e-5).sqrt(),
    )
    for parameter in model.decoder.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def errors(model, decoder, statistics, grid=16):
    """(of raw, of normalised latents): the largest difference of decoded images, theirs to ours."""
    torch.manual_seed(4)
    z = torch.randn(2, 384, grid, grid)
    mean, var = statistics or (0, torch.tensor(1 - 1e-5))
    with torch.no_grad():
        theirs = model.decode(z).sample
        raw = decoder(model._denormalize_latents(z))
        normalised = decoder(z * (var + 1e-5).sqrt() + mean)
    assert theirs.std() > 0.05
    return (theirs - raw).abs().max().item(), (theirs - normalised).abs().max().item()


@pytest.mark.slow
@pytest.mark.parametrize("with_statistics", [False, True])
def test_what_diffusers_writes_gives_its_images(tmp_path, with_statistics):
    statistics = make_statistics((384, 16, 16)) if with_statistics else None
    model = random_autoencoder(16, statistics)
    model.save_pretrained(tmp_path / "rae")
    decoder, config = load_decoder(str(tmp_path / "rae"))
    assert ("statistics" in config) == with_statistics
    # diffusers adds 1e-5 to the deviation, the authors to the variance.
    assert max(errors(model, decoder, config.get("statistics"))) < 1e-5


@pytest.mark.slow
def test_at_32_tokens_a_side_diffusers_halves_the_positions(tmp_path):
    model = random_autoencoder(32)
    model.save_pretrained(tmp_path / "rae")
    decoder, _ = load_decoder(str(tmp_path / "rae"))
    assert errors(model, decoder, None, 32)[0] > 1e-2
    decoder.decoder_pos_embed.copy_(model.decoder.decoder_pos_embed)
    assert errors(model, decoder, None, 32)[0] < 1e-5
    # Theirs: every second token is at the place of a token of a 16 x 16 grid.
    theirs = model.decoder.decoder_pos_embed[:, 1:].unflatten(1, (32, 32))[:, ::2, ::2]
    ours = rae_decoder_train.sincos_position(32, 16).unflatten(1, (16, 16))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_readmes_lines_write_what_diffusers_reads(tmp_path, monkeypatch):
    blocks = re.findall("```python\n(.*?)```", README, re.DOTALL)
    (lines,) = [block for block in blocks if "AutoencoderRAE" in block]
    autoencoder = autoencoder_class()
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    monkeypatch.chdir(tmp_path)
    statistics = make_statistics((384, 16, 16))
    sizes = {"hidden_size": 384, "num_hidden_layers": 2, "num_attention_heads": 6}
    encoder_config = Dinov2WithRegistersConfig(**sizes, patch_size=14, image_size=518)
    encoder = Dinov2WithRegistersModel(encoder_config)
    encoder.save_pretrained("encoder")
    lines = re.sub(r'"facebook/[\w-]+"', '"encoder"', lines)

    # A checkpoint as stage 1 leaves it, and one of stage 2.
    decoder = make_decoder(384, 16, *ENCODERS[0][3:5])
    sizes = {"name": "ViT-mini", "channels": 384, "grid": 16, "patch_size": 2}
    sizes |= {"mean": ENCODERS[0][3], "std": ENCODERS[0][4]}
    config = {"encoder": ENCODERS[0][5], "encoder_size": 224, "image_size": 32, "layers": None}
    config |= {"latent_shape": [384, 16, 16], "decoder": sizes, "noise_tau": 0.8}
    file = {"format": "rae-decoder/1", "config": config, "ema": decoder.state_dict(), "args": {}}
    os.makedirs("runs/decoder")
    torch.save(file, "runs/decoder/last.pt")
    os.makedirs("runs/flow")
    torch.save({"mean": statistics[0], "var": statistics[1]}, "runs/flow/last.pt")

    exec(compile(lines, "README.md", "exec"), {"__name__": "__main__"})
    (folder,) = [path.parent for path in tmp_path.glob("*/diffusion_pytorch_model.safetensors")]
    model = autoencoder.from_pretrained(folder).eval()
    assert max(errors(model, decoder, statistics)) < 1e-5
    # With its encoder, and read back as ours.
    torch.manual_seed(5)
    x = torch.rand(2, 3, 224, 224)
    pixels = (x - model.encoder_mean) / model.encoder_std
    with torch.no_grad():
        tokens = encoder.eval()(pixels).last_hidden_state[:, 5:]
        tokens = torch.nn.functional.layer_norm(tokens, [384])
        z = model._denormalize_latents(model.encode(x).latent)
    torch.testing.assert_close(z, tokens.mT.unflatten(2, (16, 16)), rtol=0, atol=2e-4)
    loaded, config = load_decoder(str(folder))
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in decoder.state_dict().items())
    torch.testing.assert_close(config["statistics"], statistics, rtol=0, atol=1e-6)
