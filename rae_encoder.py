"""Stage 0 of RAE: images in, latents out (arXiv 2510.11690, section 3).

A frozen, pretrained ViT turns an image into a grid of tokens; stage 2 learns in the space of these grids.
Both trainings take the images and the encoder from here, stage 2 the statistics of the latents as well.
"Released" means the authors' code and files; comments say where these differ from the paper.

    python rae_encoder.py                                # the demo: seconds on a laptop's CPU
    python rae_encoder.py --data my_images --out stats.pt
    torchrun --nproc_per_node 8 rae_encoder.py --preset imagenet256 --data imagenet/train --out stats.pt

Letters in shapes: B batch, C token width, G tokens a side, N = G*G tokens, S image size, V views of an image.
"""

import argparse
import contextlib
import ctypes
import datetime
import hashlib
import json
import logging
import math
import os
import re
import shlex
import shutil
import signal
import sys
import time
import timeit
import warnings
import zipfile

import numpy as np
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from huggingface_hub.constants import HF_HUB_CACHE
from PIL import Image, ImageDraw, ImageOps, PngImagePlugin
from safetensors.torch import load_file
from timm.layers import PatchEmbed, resample_abs_pos_embed
from timm.models import load_state_dict
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, DataLoader
from torchvision.transforms.functional import crop, pil_to_tensor, resize
from tqdm import tqdm

# The tag is part of the name: the mean and std of the training images come with it.
ALIASES = {
    "dinov2-small": "vit_small_patch14_reg4_dinov2.lvd142m",
    "dinov2-base": "vit_base_patch14_reg4_dinov2.lvd142m",
    "dinov2-large": "vit_large_patch14_reg4_dinov2.lvd142m",
    "dinov3-small": "vit_small_patch16_dinov3.lvd1689m",
    "dinov3-base": "vit_base_patch16_dinov3.lvd1689m",
    "dinov3-large": "vit_large_patch16_dinov3.lvd1689m",
    "siglip2-base": "vit_base_patch16_siglip_256.v2_webli",
    "mae-base": "vit_base_patch16_224.mae",
}


# The encoder


class Encoder(nn.Module):
    """A frozen timm ViT: images (B,3,H,W) in [0,1] -> latents (B,C,G,G) (paper section 3.1).

    Latents are the patch tokens after the final LayerNorm, whose affine is dropped: each token has mean 0 and
    variance 1, unless several layers are averaged.

    Args:
        name: an alias of ALIASES, or any timm ViT by its full name with tag.
        encoder_size: pixels a side that the ViT sees; default: its patch * image_size / patch_size.
        weights: None (hub), "random" (seeded), or a .safetensors / .pt file with timm's keys.
        layers: numbers of blocks, from 0, whose outputs are averaged (RAEv2), "all" (but the first), or the
            last alone (None, "last").
        patch_size: side of the square of image pixels that a token stands for.

    Attributes: width C, grid G, encoder_size, layers, hash of the weights, mean and std (3,1,1).
    Raises SystemExit for an unknown name, a size that is no multiple of the patch, weights that don't fit.
    """

    def __init__(self, name, encoder_size=None, image_size=256, weights=None, layers=None, patch_size=16):
        super().__init__()
        self.name = timm_name(name)
        self.vit = load_vit(self.name, weights)
        self.width = self.vit.embed_dim
        # The hash comes before positions are resampled, so that it does not depend on the size.
        self.hash = fingerprint(self.vit.state_dict().values())
        self.layers = block_numbers(layers, name, len(self.vit.blocks))

        patch = self.vit.patch_embed.patch_size[0]
        self.encoder_size = encoder_size or patch * image_size // patch_size
        self.grid = self.encoder_size // patch
        if self.encoder_size % patch:
            raise SystemExit(
                f"--encoder {name}: would see {self.encoder_size} pixels a side, no multiple of its patch "
                f"size {patch}; change --encoder-size or --patch-size"
            )
        self.resize_positions()

        # A ViT without a final norm gets one, too.
        eps = getattr(self.vit.norm, "eps", 1e-6)
        self.vit.norm = nn.LayerNorm(self.width, eps, elementwise_affine=False)
        for key in ("mean", "std"):
            self.register_buffer(key, torch.tensor(self.vit.pretrained_cfg[key]).view(3, 1, 1))
        # A frozen network has no dropout and no gradients.
        self.eval().requires_grad_(False)

    def resize_positions(self):
        """Fit the ViT to encoder_size, with its positions resampled as the authors' models do it."""
        native = self.vit.pos_embed  # set_input_size replaces it
        self.vit.set_input_size(self.encoder_size)
        # timm antialiases, Hugging Face's MAE and SigLIP 2 don't: latents would be 0.05 and 0.18 apart.
        if self.vit.pretrained_cfg.get("tag") == "mae" or "siglip" in self.name:
            grid = self.vit.patch_embed.grid_size
            prefix = self.vit.num_prefix_tokens
            position = resample_abs_pos_embed(native, grid, num_prefix_tokens=prefix, antialias=False)
            self.vit.pos_embed = nn.Parameter(position)

    @torch.no_grad()
    def forward(self, x):
        if x.shape[-2:] != (self.encoder_size, self.encoder_size):
            x = F.interpolate(x, size=self.encoder_size, mode="bicubic", align_corners=False)
        x = (x - self.mean) / self.std
        if self.layers:
            tokens = self.average(x)  # (B,N,C)
        else:
            tokens = self.vit.forward_features(x)  # (B, prefix + N, C)
            tokens = tokens[:, self.vit.num_prefix_tokens :].float()  # (B,N,C) class and registers dropped
        return tokens.mT.unflatten(2, (self.grid, self.grid))  # (B,C,G,G)

    def average(self, x):
        """Mean of the layers' normalised tokens, plus the last one's spatial mean (RAEv2, eq. 1)."""
        # The released code takes the mean; the paper writes a sum.
        tokens = self.vit.forward_intermediates(
            x, self.layers, norm=True, stop_early=True, output_fmt="NLC", intermediates_only=True
        )
        layers = torch.stack(tokens).float()  # (L,B,N,C)
        return layers.mean(0) + layers[-1].mean(1, keepdim=True)  # (B,N,C) + (B,1,C)

    def config(self):
        """The settings that decide the latents, as checkpoints hold them and check_same compares them."""
        return {
            "encoder": self.name,
            "encoder_hash": self.hash,
            "encoder_size": self.encoder_size,
            "layers": self.layers,
            "latent_shape": [self.width, self.grid, self.grid],
        }


def load_vit(name, weights, flag="--encoder"):
    """timm's plain ViT `name` with weights from the hub (None), from a file, or "random"; see Encoder."""
    options = {}
    if "siglip" in name:
        options["act_layer"] = (
            "gelu_tanh"  # Hugging Face's SigLIP 2 has it: without it latents differ by 2e-3
        )
    repository = timm.get_pretrained_cfg_value(name, "hf_hub_id")
    if weights is None and repository:
        announce_fetch(repository, "model.safetensors")

    try:
        if weights not in (None, "random"):
            state = load_state_dict(local_file(weights, f"{flag}-weights"), weights_only=True)
            # Without the classifier's keys timm loads strictly, and converts names and positions as usual.
            state = {key: value for key, value in state.items() if not key.startswith("head.")}
            options["pretrained_cfg_overlay"] = {"state_dict": state, "num_classes": 0}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # untrained weights are the same in every script and on every rank
            vit = timm.create_model(name, pretrained=weights != "random", num_classes=0, **options)
    except Exception as error:  # timm, torch, safetensors and the hub raise many kinds
        raise SystemExit(
            f"{flag} {name}: {weights or f'model.safetensors of {repository}'} is not to be had, or does not "
            f"fit ({reason(error)}); {flag}-weights FILE takes a local copy"
        ) from None

    plain = hasattr(vit, "pos_embed") and hasattr(vit, "set_input_size")
    if not plain or not isinstance(vit.patch_embed, PatchEmbed):
        raise SystemExit(f"{flag} {name}: not a plain ViT, with patches and tokens of one size")
    return vit


def timm_name(name):
    """The full timm name of an encoder. Raises SystemExit for one that timm does not know."""
    full = ALIASES.get(name, name)
    if not timm.models.is_model_pretrained(full):
        raise SystemExit(
            f"--encoder {name}: neither one of {', '.join(ALIASES)} nor one of timm's with weights"
        )
    return full


def block_numbers(layers, name, depth):
    """Numbers of the blocks that --layers means in an encoder of `depth` blocks; None for the last alone."""
    if layers == "all":
        layers = list(range(1, depth))
    if layers in (None, "last"):
        return None
    if layers[-1] >= depth:
        raise SystemExit(f"--layers: {name} has blocks 0 to {depth - 1}, of which {layers} can't be averaged")
    return layers


# Latent statistics


@contextlib.contextmanager
def exact_fp32():
    """Context manager and decorator: true fp32 (no TF32) in matmuls and convolutions."""
    # TF32 keeps 10 of the 23 bits of a mantissa.
    outside = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(outside)


def encode_views(encoder, data, order, workers=0, flip=True):
    """Yield (latents (B,V,C,G,G), labels (B,)) a batch; views are the image and, with flip, its mirror.

    Call it outside of autocast: bf16 latents are 1.1 % off. A consumer in exact_fp32() excludes TF32, too.
    """
    for images, labels in load_images(data, order, encoder.mean.device, workers):
        views = [images, images.flip(-1)] if flip else [images]
        yield torch.stack([encoder(view) for view in views], dim=1), labels


@exact_fp32()
def latent_statistics(latents):
    """Mean and population variance, each (C,G,G), over batches of latents (B,V,C,G,G) on all ranks.

    Exact: float64 sums in one pass. (The released code keeps a momentum-0.1 running average, which depends on
    order and batch size.)
    """
    number = 0
    total = 0
    for z in latents:
        z = z.flatten(0, 1)  # (B*V,C,G,G)
        z = z.cpu().double() if z.device.type == "mps" else z.double()  # mps has no float64
        total = total + torch.stack([z.sum(0), z.square().sum(0)])
        number += len(z)
    # Ranks may have encoded different numbers of images.
    number = total.new_tensor(number)
    if dist.is_initialized():
        dist.all_reduce(total)
        dist.all_reduce(number)
    # float64 has room for the difference of two large numbers.
    mean, square = total / number
    return mean.float(), (square - mean.square()).float()


def load_statistics(path, config, flag="--stats"):
    """Mean and variance, each (C,G,G), in the file that `flag` names, ours or released.

    config: the Encoder.config() that the statistics must fit, at least its latent_shape. A missing or None
    mean is 0, a variance 1; a moment of shape (C,) or (C,1,1) holds for all positions. Raises SystemExit for
    other files, and for statistics of other latents.
    """
    file = read_weights(path, flag)
    check_same(config, "this run", file.get("config", {}), f"{flag} {path}", (*LATENTS, "image_size"))
    if not {"mean", "var"} & file.keys():
        raise SystemExit(f"{flag} {path}: no latent statistics; `rae_encoder.py --out FILE` writes them")
    moments = []
    for key, default in (("mean", 0.0), ("var", 1.0)):
        # Released files have mean None where the encoder's own norm centres the tokens.
        moment = file.get(key)
        if moment is None:
            moment = torch.tensor(default)
        # A moment of each channel holds for all positions.
        if moment.ndim == 1:
            moment = moment[:, None, None]
        try:
            # A copy, since the file is mapped and may be replaced while a training runs.
            moments.append(moment.float().expand(*config["latent_shape"]).clone())
        except RuntimeError:
            shapes = f"of latents {[*moment.shape]}, these are {config['latent_shape']}"
            raise SystemExit(f"{flag} {path}: {shapes}") from None
    return moments


# Images


def to_rgb(image):
    """Convert an open Pillow image to upright 8-bit RGB: 16 bits are scaled, transparency is laid on white.

    Raises whatever Pillow meets in broken pixels, and ValueError for a strip; broken metadata is passed over.
    """
    # Resizing the short side of a strip to the size of a crop would take gigabytes.
    if max(image.size) > 100 * min(image.size):
        raise ValueError(f"{image.width} x {image.height} pixels: more than 100 times as long as wide")
    image.load()
    # With in_place Pillow rotates the pixels before it parses, and may choke on, the rest of the metadata.
    with contextlib.suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)

    # Pillow's own conversion of 16-bit grey clips at 255.
    if image.mode.startswith("I"):
        levels = np.asarray(image).clip(0, 65535) / 257
        image = Image.fromarray(levels.round().astype(np.uint8))

    if image.has_transparency_data:
        image = image.convert("RGBA")
        highest = image.getchannel("A").getextrema()[1]
        # Many 32-bit BMPs have an alpha that is 0 throughout: it is no alpha.
        if highest > 0:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def center_crop(image, size):
    """Cut the centre, size x size, out of a Pillow image as ADM evaluates (Dhariwal & Nichol 2021)."""
    # ADM halves first: one large bicubic step is of lower quality.
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width = round(image.width * scale)
    height = round(image.height * scale)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    return crop(image, (height - size) // 2, (width - size) // 2, size, size)


def random_crop(image, size, rng):
    """Short side to 1.5 size, then a random size x size crop of a PIL image (stage 1, paper appendix)."""
    image = resize(image, int(1.5 * size), Image.Resampling.BICUBIC)  # 384 pixels for images of 256
    # Every window is as likely, the first and the last place included.
    left = rng.integers(image.width - size + 1)
    top = rng.integers(image.height - size + 1)
    return crop(image, top, left, size, size)


class ImageData:
    """The images below a folder; classes are its leaf folders in natural order (list_images).

    Args:
        root: the folder, or a single image, which the user named by `flag`.
        size: pixels a side of the images that come out.
        augment: None (centre crop), "crop" (stage 1) or "flip" (stage 2: centre crop, half of them mirrored).
        seed: with the epoch and the index it decides every random number of an image.
        skip_broken: put the next readable image in the place of a broken one, and mark it in `broken`.

    Attributes: classes, paths, labels (see list_images), hash of the listing, broken.
    data[epoch, i] is (uint8 image (3,S,S), class). Raises ValueError for a broken image, and SystemExit where
    there is no such folder or no image in it.
    """

    def __init__(self, root, size, augment=None, seed=0, skip_broken=False, flag="--data"):
        self.root = str(root)
        if os.path.isfile(self.root):
            # A single image, as --reconstruct takes it, is a folder of one.
            self.root, name = os.path.split(self.root)
            self.classes = [""]
            self.paths = np.array([os.fsencode(name)])
            self.labels = np.zeros(1, int)
        else:
            self.classes, self.paths, self.labels = list_images(self.root, flag)
        self.hash = hashlib.sha256(self.paths.tobytes()).hexdigest()[:12]
        self.size = size
        self.augment = augment
        self.seed = seed
        self.skip_broken = skip_broken
        self.broken = torch.zeros(len(self), dtype=torch.bool).share_memory_()  # workers write into it

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, key):
        epoch, i = key
        # With skip_broken the first readable image after a broken one takes its place.
        for candidate in range(i, i + len(self)):
            candidate %= len(self)
            try:
                with Image.open(self.path(candidate)) as file:
                    image = to_rgb(file)
            except Exception as error:  # Pillow's decoders raise many kinds
                self.broken[candidate] = True
                if not self.skip_broken:
                    raise ValueError(
                        f"{self.path(candidate)}: not a readable image ({reason(error)}); repair it, remove "
                        "it, or --skip-broken"
                    ) from None
                continue
            # Seeded by (epoch, i), not by the candidate, so a replaced image does not shift other draws.
            image = self.transform(image, np.random.default_rng((self.seed, epoch, i)))
            return pil_to_tensor(image), int(self.labels[candidate])
        raise ValueError(f"{self.root}: every image is broken")

    def path(self, i):
        return os.path.join(self.root, os.fsdecode(self.paths[i]))

    def transform(self, image, rng):
        if self.augment == "crop":
            return random_crop(image, self.size, rng)
        image = center_crop(image, self.size)
        mirrored = self.augment == "flip" and is_mirrored(rng)
        return ImageOps.mirror(image) if mirrored else image

    def summary(self):
        """Number, folder and first classes of the images, for a first line of output."""
        first = ", ".join(self.classes[:3])
        return f"{len(self)} images of {self.root}, classes: {len(self.classes)} ({first})"


def is_mirrored(rng):
    """Stage 2 sees half of the images mirrored."""
    return rng.random() < 0.5


def training_order(num, batch_size, seed, first_step, last_step, rank=0, world=1):
    """The (epoch, index) pairs of this rank's share of every step: a function of (seed, step) alone.

    An epoch is a new permutation; images that do not fill its last batch are left out.
    """
    # A run that goes on begins in the middle of an epoch, whose permutation it needs, too.
    steps_per_epoch = num // batch_size
    for step in range(first_step, last_step):
        epoch, k = divmod(step, steps_per_epoch)
        if k == 0 or step == first_step:
            order = np.random.default_rng((seed, epoch)).permutation(num)
        # The ranks take turns, so their shares make the batch of one process.
        batch = order[k * batch_size : (k + 1) * batch_size].tolist()
        yield [(epoch, i) for i in batch[rank::world]]


def even_order(total, num, batch_size, rank=0, world=1):
    """This rank's share of `num` images drawn evenly from `total`, in batches of `batch_size`."""
    # The epoch only seeds augmentation, and these images have none.
    share = [(0, i * total // num) for i in range(rank, num, world)]
    return list(BatchSampler(share, batch_size, drop_last=False))


def load_images(data, order, device, workers=0):
    """Yield images (B,3,S,S) in [0,1] float32 and labels (B,) on `device` for each list of keys in `order`.

    Raises SystemExit at a broken image, and where a loading process dies or does not answer.
    """
    loader = DataLoader(
        data,
        batch_sampler=order,
        num_workers=workers,
        worker_init_fn=obey_parent,
        timeout=60 if workers else 0,
        pin_memory=device.type == "cuda",
    )
    try:
        batches = iter(loader)
        # torch's handler raises at any line of a step when a worker dies; the timeout reports that as well.
        if workers and hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for images, labels in batches:
            # Bytes travel to the device, a quarter of what floats would take.
            yield images.to(device, non_blocking=True).float() / 255, labels.to(device, non_blocking=True)
    except ValueError as error:
        # A worker's error has its traceback for a message, of which the last line tells.
        raise SystemExit(str(error).splitlines()[-1].removeprefix("ValueError: ")) from None
    except (RuntimeError, OSError) as error:
        raise SystemExit(
            f"loading images failed ({reason(error)}); --workers 0 does without processes, and in Docker "
            "--shm-size gives them more shared memory"
        ) from None


# The command


@contextlib.contextmanager
def keeps_process_settings():
    """Decorator of a main() that a notebook may call: what it changes there is put back at its end."""
    precision = torch.get_float32_matmul_precision()
    flash = torch.backends.cuda.flash_sdp_enabled()
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    try:
        with warnings.catch_warnings():
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cuda.enable_flash_sdp(flash)
        for number, handler in handlers.items():
            if signal.getsignal(number) != handler:
                signal.signal(number, handler)


@keeps_process_settings()
def main(argv=None):
    args = parse_args(argv)
    rank, world, device = set_up(args)

    # Everything that can be wrong is found before the work.
    data = ImageData(args.data, args.image_size, skip_broken=args.skip_broken)
    if len(data) < world:
        raise SystemExit(f"--data {args.data}: {len(data)} images, fewer than {world} ranks")
    if not os.access(os.path.dirname(args.out) or ".", os.W_OK):
        raise SystemExit(f"--out {args.out}: not in a folder that exists and can be written into")
    encoder = open_encoder(args).to(device)
    check_ranks_agree(images=data.hash, encoder=encoder.hash)
    if rank == 0:
        print(
            f"{demo_notice(args.preset == 'demo')}{data.summary()}; "
            f"{encoder_summary(args, encoder)}; {world} x {device.type}, fp32",
            file=sys.stderr,
        )

    # One pass over the images and their mirrors, shared by the ranks
    order = even_order(len(data), len(data), max(1, args.batch_size // world), rank, world)
    # --no-flip leaves the mirrors out, which stage 2 then does not see.
    views = encode_views(encoder, data, order, args.workers, args.flip)
    progress = tqdm(views, "latent statistics", len(order), disable=rank > 0)
    mean, var = latent_statistics(z for z, _ in progress)
    replaced = broken_images(data, device)

    if rank == 0:
        config = {**encoder.config(), "image_size": args.image_size, "flip": args.flip}
        statistics = {"mean": mean.cpu(), "var": var.cpu(), "config": config}
        write_file(args.out, lambda file: torch.save(statistics, file))
        print(f"{args.out}: mean and variance of {[*mean.shape]} latents{replaced}", file=sys.stderr)


def parse_args(argv=None):
    parser = common_parser(__doc__)
    parser.add_argument("--out", default="stats.pt", help="file for the statistics (%(default)s)")
    return with_preset(parser, PRESETS, explicit_flags(parser, argv))


# ---- Shared by the scripts: presets, flags, devices, runs, files, folders. No formula follows. ----

# Presets list only what differs from the flag defaults; those are the released 256 px recipe. DEMO, SMALL and
# RAEV2 hold a preset's images and encoder, which all scripts share. The demo's encoder is untrained.
DEMO = {
    "data": "data/demo",
    "image_size": 32,
    "patch_size": 8,
    "encoder": "test_vit",
    "encoder_weights": "random",
    "workers": 2,
}
# 8x8 tokens of width 384. Latents of the last layer alone decode to blurred images (RAEv2, section 3).
SMALL = {"image_size": 64, "patch_size": 8, "encoder": "dinov2-small", "layers": "all"}
RAEV2 = {"encoder": "dinov3-large", "layers": [11, 13, 15, 17, 19, 21, 23]}  # Singh et al. 2026, K = 7
PRESETS = {
    "demo": DEMO | {"batch_size": 100},
    "small": SMALL,
    "imagenet256": {},
    "imagenet512": {"image_size": 512, "batch_size": 64},
    "raev2": RAEV2,
}
# Keys of Encoder.config()
LATENTS = ("encoder", "encoder_hash", "encoder_size", "layers", "latent_shape")
AUTOENCODER = ("diffusion_pytorch_model.safetensors", "config.json")  # the files of diffusers' format
PARTS = ("train", "val", "valid", "validation", "test")
EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
# Job schedulers send SIGTERM and SIGUSR1, Ctrl-C SIGINT, a closed terminal SIGHUP; Windows lacks two of them.
STOP_SIGNALS = [
    number for number in signal.Signals if number.name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
]
# Pillow refuses PNG text and colour profiles over 1 MB, but a picture is whole whatever its metadata.
PngImagePlugin.MAX_TEXT_CHUNK = 2**28
PngImagePlugin.MAX_TEXT_MEMORY = 2**28


# Flags


class OneLineParser(argparse.ArgumentParser):
    """argparse, but a mistake ends in one line."""

    def __init__(self, **options):
        # No list of all flags comes before their help.
        usage = "%(prog)s [--flag value ...]"
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(formatter_class=layout, usage=usage, allow_abbrev=False, **options)

    def error(self, message):
        raise SystemExit(f"{self.prog}: {message}; --help lists the flags")


def bounded(convert, fits, expected):
    """An argparse type: convert(text) where that fits, else an error that says what was expected."""

    # argparse shows the message of an ArgumentTypeError, but of a ValueError only the function's name.
    def parse(text):
        with contextlib.suppress(ValueError):
            value = convert(text)
            if fits(value):
                return value
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text}")

    return parse


# inf and nan fit nowhere: every comparison with nan is false.
positive_int = bounded(int, lambda value: value >= 1, "a whole number from 1")
non_negative_int = bounded(int, lambda value: 0 <= value < 2**63, "a whole number from 0")
positive_float = bounded(float, lambda value: 0 < value < math.inf, "a number above 0")
non_negative_float = bounded(float, lambda value: 0 <= value < math.inf, "a number from 0")
share_below_one = bounded(float, lambda value: 0 <= value < 1, "a number from 0 to below 1")


def layer_list(text):
    """An argparse type: `last`, `all`, or the numbers of two or more blocks, ascending, from 0."""
    if text in ("last", "all"):
        return text
    layers = [int(number) for number in text.split(",")]
    if len(layers) < 2 or layers != sorted(set(layers)) or layers[0] < 0:
        raise argparse.ArgumentTypeError(f"expected last, all, or ascending blocks as 5,7,9,11, got {text}")
    return layers


def common_parser(description):
    """A parser with the flags of every stage that encodes images."""
    parser = OneLineParser(description=description)
    parser.add_argument("--preset", choices=PRESETS, help="default: small with --data, demo without")

    add = parser.add_argument_group("data").add_argument
    add("--data", metavar="DIR", help="folder of class folders, or of the images of one class")
    add("--image-size", type=positive_int, default=256, help="pixels a side (%(default)s)")
    add("--skip-broken", action="store_true", help="replace broken images by others and count them")
    add(
        "--flip",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="mirror half of the images in stage 2; --no-flip for letters, digits, signs",
    )

    add = parser.add_argument_group("encoder").add_argument
    add(
        "--encoder",
        default="dinov2-base",
        help=f"{', '.join(ALIASES)}, or any timm ViT by its full name (%(default)s)",
    )
    add("--encoder-weights", metavar="FILE", help="with timm's keys, or `random`; default: the hub's")
    add("--encoder-size", type=positive_int, help="pixels a side that it sees; default: by --patch-size")
    add("--patch-size", type=positive_int, default=16, help="pixels of a token (%(default)s; small, demo: 8)")
    add(
        "--layers",
        type=layer_list,
        default="last",
        metavar="LIST",
        help="blocks to average, from 0 (RAEv2): `all` but the first, a list I,J,..., or the `last` alone "
        "(%(default)s; small: all)",
    )

    add = computing_flags(parser)
    add("--seed", type=non_negative_int, default=0, help="of every random number (%(default)s)")
    return parser


def open_encoder(args):
    """The encoder that the flags of common_parser name."""
    return Encoder(
        args.encoder, args.encoder_size, args.image_size, args.encoder_weights, args.layers, args.patch_size
    )


def computing_flags(parser):
    """Add the flags that sample.py has as well; return their group's add_argument."""
    add = parser.add_argument_group("computing").add_argument
    add("--batch-size", type=positive_int, default=256, help="images a step, over all ranks (%(default)s)")
    add("--workers", type=non_negative_int, default=default_workers(), help="loaders a rank (%(default)s)")
    add("--device", choices=["cuda", "cpu", "mps", "xpu"], help="default: cuda where there is one, else cpu")
    return add


def default_workers():
    """One loading process for each core that a rank of this machine may use, at most 8."""
    # Containers and job schedulers give a process fewer cores than the machine has.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(8, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def training_parser(description):
    """common_parser with the flags that both trainings take; returns it and their group."""
    parser = common_parser(description)
    group = parser.add_argument_group("training")
    length = group.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=positive_float, help="passes over the data; default: the preset's")
    length.add_argument("--steps", type=positive_int, help="instead of --epochs; default: the preset's")
    add = group.add_argument
    add("--accum", type=positive_int, default=1, help="micro-batches a step, to save memory (%(default)s)")
    add(
        "--lr", type=non_negative_float, default=2e-4, help="AdamW's learning rate, the paper's (%(default)s)"
    )
    add("--final-lr", type=non_negative_float, default=2e-5, help="where its decay ends (%(default)s)")
    add(
        "--ema",
        type=share_below_one,
        help="decay of the averaged weights (%(default)s; unless it is given, at most 1 - 10 / steps)",
    )
    add("--precision", choices=["bf16", "fp32"], help="default: bf16 (autocast) where it is faster")
    add("--checkpoint-activations", action="store_true", help="less memory for one more forward pass")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile; default: on CUDA")
    add("--init", metavar="FILE", help="weights that a new run starts from: a checkpoint or a released file")
    add(
        "--resume", metavar="FILE", help="checkpoint to go on from; default: the run folder's last.pt, if any"
    )

    add = parser.add_argument_group("output").add_argument
    add("--out", help="run folder: last.pt, metrics.jsonl, preview-*.png (%(default)s)")
    add("--log-every", type=positive_int, default=100, help="steps (%(default)s)")
    add("--preview-every", type=non_negative_int, default=2500, help="steps; 0 is off (%(default)s)")
    add(
        "--save-every",
        type=positive_int,
        default=2500,
        help="steps between versions of last.pt (%(default)s)",
    )
    add("--keep-every", type=positive_int, help="steps between copies that stay, a multiple of --save-every")
    return parser, group


def explicit_flags(parser, argv):
    """The flags that are on the command line, as {name: value}."""
    # argparse sets a default only where an attribute is missing; in this namespace all are there, as None.
    namespace = argparse.Namespace(**dict.fromkeys(vars(parser.parse_args([]))))
    flags = vars(parser.parse_args(argv, namespace))
    return {name: value for name, value in flags.items() if value is not None}


def with_preset(parser, presets, explicit, inherited=()):
    """All flags: the `explicit` ones go over `inherited` (from a checkpoint), these over the preset.

    args.explicit holds the flags of the command line. Raises SystemExit for a preset without its data.
    """
    # A preset may come with the checkpoint; without one, the presence of --data decides.
    known = dict(inherited) | explicit
    name = known.get("preset", "small" if "data" in explicit else "demo")
    if name == "demo" and "data" in explicit:
        raise SystemExit(f"--data {explicit['data']}: the demo draws its own images; name another --preset")
    parser.set_defaults(**presets[name] | known | {"preset": name, "explicit": explicit})
    # plan_steps prefers --steps, so those of a preset must give way to --epochs on the command line.
    if "epochs" in explicit:
        parser.set_defaults(steps=None)
    # set_defaults knows every flag by now, so the empty command line gives them all.
    args = parser.parse_args([])
    if not args.data:
        raise SystemExit(f"--preset {name} needs --data DIR")
    return args


def ema_decay(args, steps):
    """--ema; by default at most 1 - 10 / steps, so that a short run's EMA forgets its untrained start."""
    return args.ema if "ema" in args.explicit else min(args.ema, max(0.0, 1 - 10 / steps))


def demo_notice(demo):
    return "The demo: its numbers compare with nothing. " if demo else ""


def encoder_summary(args, encoder):
    """Name, weights and latents of the encoder, for a first line of output."""
    weights = f" ({args.encoder_weights})" if args.encoder_weights else ""
    return f"{args.encoder}{weights} {encoder.config()['latent_shape']}"


# Devices and processes


def choose_device(name=None, local_rank=0):
    """The torch device of --device: by default CUDA where there is one, else the CPU.

    Raises SystemExit where this machine has no such device, or too few for its ranks.
    """
    # mps and xpu are taken only by name: the released recipes ran on CUDA.
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    # The CPU is one device for all ranks.
    if name == "cpu":
        return torch.device("cpu")
    # torchrun starts as many processes as it is told.
    devices = torch.get_device_module(name).device_count()
    if local_rank >= devices:
        raise SystemExit(
            f"--device {name}: this torch has {devices}, fewer than processes; --nproc_per_node, or "
            "--device cpu"
        )
    torch.accelerator.set_device_index(local_rank)
    return torch.device(name, local_rank)


def choose_precision(explicit, device):
    """("bf16" or "fp32", why): --precision, or bf16 where the device multiplies it faster. Rank 0 decides."""
    if explicit:
        return explicit, "as given"
    if device.type != "cpu":
        module = torch.get_device_module(device)
        hardware = device.type != "mps" and module.is_bf16_supported(including_emulation=False)
        return ("bf16", "in hardware") if hardware else ("fp32", "no bf16 in hardware")

    # The processor's flags don't tell: with AMX bf16 is four times as fast, with AVX512-BF16 sometimes half.
    bf16 = product_rate(torch.bfloat16)
    fp32 = product_rate(torch.float32)
    name = "bf16" if bf16 >= fp32 * 4 / 3 else "fp32"
    answer = [(name, f"products in bf16 {bf16:.0f}, in fp32 {fp32:.0f} GFLOP/s")]
    # Every rank measures other rates; those of rank 0 count.
    if dist.is_initialized():
        dist.broadcast_object_list(answer)
    return answer[0]


def product_rate(dtype):
    """GFLOP/s of a product of two 1024 x 1024 matrices on the CPU: the best of several."""
    matrix = torch.ones(1024, 1024, dtype=dtype)
    # The first product compiles its kernel, and starts the threads.
    matrix @ matrix
    return 2 * 1024**3 / 1e9 / min(timeit.repeat(lambda: matrix @ matrix, number=1))


def join_ranks(device_name):
    """Join torchrun's process group, if there is one, and allow TF32; returns (rank, world size, device)."""
    # torchrun tells each process its place by these variables; without it there is one process.
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = choose_device(device_name, int(os.environ.get("LOCAL_RANK", 0)))
    if world > 1:
        if not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
            raise SystemExit(f"WORLD_SIZE is {world}, but who the others are is unknown: start with torchrun")
        # torch 2.14 has a new name for this flag of DDP's, older ones don't know it.
        warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)
        # The others wait while rank 0 saves and draws a preview.
        dist.init_process_group(
            timeout=datetime.timedelta(hours=1), device_id=device if device.type == "cuda" else None
        )
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as released
    keep_freed_memory(device)
    return rank, world, device


def leave_ranks():
    """End the process group, if there is one."""
    if dist.is_initialized():
        # Without a pause gloo of torch 2.6 may hang: its end waits for a thread that waits for Python's lock.
        time.sleep(0.2)
        dist.destroy_process_group()


def set_up(args):
    """Begin a script that reads images; returns (rank, world size, device)."""
    rank, world, device = join_ranks(args.device)
    # On a CPU the fused attention's gradient takes twice the time of the same products one by one, in bf16
    # and for short sequences ten times. (Despite its name the switch also governs the CPU kernel.)
    torch.backends.cuda.enable_flash_sdp(device.type != "cpu")
    # One rank draws, the others wait for it.
    if args.preset == "demo" and rank == 0 and not os.path.exists(args.data):
        draw_demo(args.data)
    if world > 1:
        dist.barrier()
    return rank, world, device


def check_ranks_agree(**values):
    """Raise SystemExit, on every rank, where the ranks read different values: disks may show files late."""
    if not dist.is_initialized():
        return
    # All ranks compare all values, so that all of them end, and none waits for another.
    ranks = [None for _ in range(dist.get_world_size())]
    dist.all_gather_object(ranks, values)
    for rank, other in enumerate(ranks):
        check_same(
            ranks[0], "rank 0", other, f"rank {rank}", values, "they read different files; start again"
        )


def compile_blocks(blocks, explicit, device):
    """Compile block by block, since one compilation serves all of one size. explicit: None means on CUDA.

    Raises SystemExit where there is no C compiler.
    """
    wanted = device.type == "cuda" if explicit is None else explicit
    if not wanted:
        return
    if not shutil.which(os.environ.get("CC", "cc")):
        raise SystemExit("torch.compile needs a C compiler, such as gcc; --no-compile goes without")
    # torch compiles a function for 8 shapes and runs it eagerly for others. Two networks of body and head,
    # each in two batch sizes or more, can need more.
    torch._dynamo.config.cache_size_limit = 64  # its newer name is not in torch 2.6
    for block in blocks:
        block.compile()


def keep_freed_memory(device):
    """Make glibc keep freed memory instead of returning it: page faults cost 10 to 20 % of a CPU step."""
    if sys.platform == "linux" and device.type == "cpu":
        libc = ctypes.CDLL(None)
        # Before glibc 2.35 so high a threshold is refused, and its own, which moves, is better left alone.
        if libc.mallopt(-3, 2**31 - 1):  # M_MMAP_THRESHOLD
            libc.mallopt(-1, 2**29)  # M_TRIM_THRESHOLD


def obey_parent(_worker):
    """Let a worker ignore Ctrl-C, which reaches the whole group, and end quietly at the loader's SIGTERM."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def run(main):
    """Run main(); an error of a file or a disk ends in one line, and Ctrl-C as well, with 130."""
    # PyTorch's and Python's other errors keep their traceback: they are mistakes of the code.
    try:
        main()
        leave_ranks()
    except OSError as error:
        raise SystemExit(reason(error)) from None
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("\ninterrupted; the same command goes on with what is saved", file=sys.stderr, flush=True)
        # sys.exit waits for loading processes, for ever where they had only half started.
        os._exit(130)
    finally:
        # An error's line would stand behind a progress bar that is still open.
        for bar in list(tqdm._instances):
            bar.close()


# Runs: what the two trainings have in common before and around their loops


def plan_steps(images, args, world):
    """(steps an epoch, steps of the run). Raises SystemExit for a batch that images or ranks don't fill."""
    batch_size = args.batch_size
    if images < batch_size:
        raise SystemExit(f"--data {args.data}: {images} images, fewer than --batch-size {batch_size}")
    if batch_size % (world * args.accum):
        raise SystemExit(f"--batch-size {batch_size} is no multiple of {world} ranks x {args.accum} --accum")
    if args.keep_every and args.keep_every % args.save_every:
        raise SystemExit(f"--keep-every {args.keep_every} is no multiple of --save-every {args.save_every}")
    # Images that do not fill a batch are left out of the epoch, other ones each time.
    steps_per_epoch = images // batch_size
    return steps_per_epoch, args.steps or max(1, round(args.epochs * steps_per_epoch))


def catch_signals():
    """A list that stop signals fill from here on, so that the step that is running comes to its end."""
    stops = []
    first = math.inf  # time of the first signal

    def note(number, _frame):
        nonlocal first
        # torchrun passes a Ctrl-C on within one second; a SIGINT after that is a new one, and ends at once.
        if number == signal.SIGINT and time.monotonic() > first + 1:
            os._exit(130)
        first = min(first, time.monotonic())
        stops.append(number)

    # Python calls a handler between two instructions of the main thread, which then goes on with its step.
    for number in STOP_SIGNALS:
        # SIGHUP stays ignored under nohup, but not under torchrun, which passes it on and then kills.
        if signal.getsignal(number) != signal.SIG_IGN or "TORCHELASTIC_RUN_ID" in os.environ:
            signal.signal(number, note)
    return stops


def open_log(folder):
    """The run folder's metrics.jsonl, locked while this process lives, and TensorBoard's writer or None."""
    check_own_folder(folder, "metrics.jsonl", "last.pt")
    # The log is appended to, since a run may go on after it was stopped.
    os.makedirs(folder, exist_ok=True)
    file = open(f"{folder}/metrics.jsonl", "a", buffering=1)  # noqa: SIM115
    try:
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of the process: forked workers don't hold it
    except BlockingIOError:
        raise SystemExit(f"--out {folder}: another run is in it; stop it or name another folder") from None
    except (ImportError, OSError):
        # Windows has no fcntl, and some network disks have no locks.
        print(f"{folder} can't be locked on this system: start no second run in it", file=sys.stderr)
    try:
        from torch.utils.tensorboard import SummaryWriter
    except Exception:  # not installed, or another package of that name
        return file, None
    return file, SummaryWriter(folder)


def write_log(log, step, record):
    """Append one JSON object, written at once since others may read along, and TensorBoard's scalars."""
    file, board = log
    print(json.dumps({"step": step, "time": round(time.time(), 1), **record}), file=file)
    if board:
        for name, value in record.items():
            board.add_scalar(name, value, step)
        board.flush()  # the writer's thread dies with the process


def log_picture(log, step, path):
    """Show the PNG of a preview in TensorBoard, where that is installed."""
    board = log[1]
    if board:
        board.add_image("preview", np.array(Image.open(path)), step, dataformats="HWC")
        board.flush()


def read_start(args, checkpoint_format, images):
    """The checkpoint of --resume, or the run folder's last.pt, with its path; {} where there is none.

    images: the hash of the run's ImageData. Raises SystemExit for a file of another format or other images.
    """
    path = args.resume or f"{args.out}/last.pt"
    if not args.resume and not os.path.exists(path):
        return {}
    start = read_weights(path, "--resume")
    if start.get("format") != checkpoint_format:
        raise SystemExit(f"--resume {path}: not a {checkpoint_format} checkpoint")
    # This check needs no encoder, which may have to be fetched before configs can be compared.
    if start.get("images", images) != images:
        before = start["args"]["data"]
        raise SystemExit(f"{path} is of other images ({before}) than --data {args.data}: name another --out")
    return {**start, "path": path}


def broken_images(data, device):
    """The clause of a last line on the images that were broken on any rank, empty without --skip-broken."""
    if not data.skip_broken:
        return ""
    # An image may have been broken for one rank alone, as on a disk of its own.
    broken = data.broken.to(device).int()
    if dist.is_initialized():
        dist.all_reduce(broken)
    return f"; {broken.count_nonzero()} broken images were replaced by others"


def end_of_run(args, rank, progress, step, steps, data, device, stops, command):
    """Print the last line of a training, with the command that comes next; raise what ended it early."""
    progress.close()
    replaced = broken_images(data, device)
    if rank == 0:
        end = f"next: {command}" if step == steps else "stopped; the same command goes on (without --resume)"
        print(f"{args.out}/last.pt: step {step} of {steps}{replaced}; {end}", file=sys.stderr)
    if stops and isinstance(stops[0], SystemExit):
        raise stops[0]


def next_command(script, world, flag, out, name):
    """A command line to paste: `flag` names this run's last.pt, --out the run folder's neighbour `name`."""
    launcher = ["python"] if world == 1 else ["torchrun", "--nproc_per_node", str(world)]
    # Without normpath the neighbour of `runs/decoder/`, as a shell completes it, would lie inside of it.
    neighbour = os.path.join(os.path.dirname(os.path.normpath(out)), name)
    return shlex.join([*launcher, script, flag, f"{out}/last.pt", "--out", neighbour])


def first_line(args, rank, data, networks, model, computing, step, steps):
    """Print the data, the networks, the size of the trained one and how it is trained; return a bar."""
    if rank == 0:
        millions = sum(weight.numel() for weight in model.parameters()) / 1e6
        print(
            f"{demo_notice(args.preset == 'demo')}{data.summary()}; {networks} ({millions:.1f} M "
            f"parameters); {computing}; step {step} of {steps}",
            file=sys.stderr,
        )
    # The bar counts images, and its rate is images a second.
    return tqdm(total=steps, initial=step, unit="image", unit_scale=args.batch_size, disable=rank > 0)


def parallel(network, blocks, compiled, device):
    """The network as it is trained: its blocks compiled, and in DDP."""
    compile_blocks(blocks, compiled, device)
    return DistributedDataParallel(network, broadcast_buffers=False) if dist.is_initialized() else network


# Files and folders


def reason(error):
    """First line of an error message (for load_state_dict errors, the first bad key)."""
    lines = re.sub(r"^Error\(s\) in loading.*\n\s*", "", str(error).strip()).splitlines()
    return lines[0][:200] if lines else type(error).__name__


def announce_fetch(repository, name):
    """Print at once which file of the hub is wanted: the hub's tools retry in silence."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it prints every retry
    if os.environ.get("RANK", "0") == "0":
        print(f"hub:{repository}/{name}, fetched into {HF_HUB_CACHE} where it is missing", file=sys.stderr)


def local_file(path, flag):
    """The local path of the file that `flag` names; hub:OWNER/REPO/PATH is fetched into the hub's own cache.

    hub:OWNER/REPO is an autoencoder in diffusers' format, and its path a folder. All ranks may call it: the
    hub's tools lock. Raises SystemExit for a file that is not there or can't be fetched.
    """
    path = str(path)
    if not path.startswith("hub:"):
        if not os.path.exists(path):
            raise SystemExit(f"{flag} {path}: no such file")
        return path
    # The pattern fits any name: huggingface_hub refuses what is no OWNER/REPO.
    repository, wanted = re.fullmatch("hub:([^/]*/?[^/]*)/?(.*)", path).groups()
    # All files of an autoencoder come to lie in one folder of the cache.
    for name in [wanted] if wanted else AUTOENCODER:
        try:
            announce_fetch(repository, name)
            file = hf_hub_download(repository, name)
        except Exception as error:  # the hub's tools raise many kinds
            raise SystemExit(
                f"{flag} hub:{repository}/{name}: can't be fetched from the Hugging Face hub "
                f"({type(error).__name__}: {reason(error)}); a local file does as well"
            ) from None
    return file if wanted else os.path.dirname(file)


def read_autoencoder(folder):
    """A folder in the format of diffusers' AutoencoderRAE: its state dict, and the sizes that it implies.

    config: as in our checkpoints, with "heads" and, where it has them, "statistics" (mean, var) of latents.
    sizes: of our Decoder. Raises OSError, KeyError or ValueError for another folder.
    """
    with open(f"{folder}/config.json") as file:
        released = json.load(file)
    # The encoder in it is Hugging Face's and not read: ours is timm's.
    state = load_file(f"{folder}/{AUTOENCODER[0]}")
    width = released["encoder_hidden_size"]
    size = {384: "small", 768: "base", 1024: "large"}[width]
    grid = released["encoder_input_size"] // released["encoder_patch_size"]
    config = {
        "encoder": ALIASES[f"{released['encoder_type']}-{size}"],
        "encoder_size": released["encoder_input_size"],
        "image_size": grid * released["patch_size"],
        "latent_shape": [width, grid, grid],
        "heads": released["decoder_num_attention_heads"],
    }
    # A file without statistics stores a single number. `_latents_std` is sqrt(var + 1e-5): undo that.
    if state["_latents_mean"].numel() > 1:
        config["statistics"] = (state["_latents_mean"], state["_latents_std"].square() - 1e-5)
    pixels = {key: state[f"encoder_{key}"].flatten().tolist() for key in ("mean", "std")}
    return {"model": state, "config": config, "sizes": {**pixels, "grid": grid}}


def read_weights(path, flag):
    """The dict in the .safetensors or .pt file that `flag` names, read without running code.

    A folder is read by read_autoencoder. Raises SystemExit for what is not there or holds something else.
    """
    file = local_file(path, flag)
    try:
        if os.path.isdir(file):
            return read_autoencoder(file)
        if file.endswith(".safetensors"):
            return load_file(file)
        # Files written before torch 1.6, such as torchvision's VGG-16, are no zip files and can't be mapped.
        mapped = zipfile.is_zipfile(file)
        return dict(torch.load(file, map_location="cpu", mmap=mapped, weights_only=True))
    except Exception as error:  # torch and safetensors raise many kinds
        raise SystemExit(f"{flag} {path}: not a file of weights ({reason(error)})") from None


def write_file(path, write, sync=True):
    """Call write(file) on a file beside `path`, then rename it: nobody ever reads half of one.

    Raises SystemExit where that fails, as on a full disk.
    """
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            # fsync before the rename, or a crash can leave the new name on an empty file.
            if sync:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise SystemExit(f"{path}: can't be written ({reason(error)})") from None


def fingerprint(tensors):
    """A short hash of the values of all tensors."""
    digest = hashlib.sha256()
    for tensor in tensors:
        # Bytes, since numpy has no bf16.
        digest.update(tensor.cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:12]


def unwrapped(file):
    """The state dict in a file of weights: bare, or one or more levels down, the EMA where there is one."""
    for level in ("ema", "model", "module", "state_dict"):
        if isinstance(file.get(level), dict):
            file = file[level]
    return file


def weights_hash(file):
    """A short hash of the first values of each tensor in a file of weights, of its EMA where it has one."""
    state = unwrapped(file)
    return fingerprint(state[key].flatten()[:1000] for key in sorted(state) if torch.is_tensor(state[key]))


def check_same(config, name, other, other_name, keys=LATENTS, remedy="they don't belong together"):
    """Raise SystemExit, with both values, where two configs differ in a key that both of them have.

    A released file has no config.
    """
    for key in keys:
        if key in config and key in other and config[key] != other[key]:
            # A list of classes is long.
            raise SystemExit(
                f"{name} has {key} {config[key]!s:.80}, {other_name} has {other[key]!s:.80}: {remedy}"
            )


def check_own_folder(out, *marks):
    """Raise SystemExit where the folder of --out has files, but none of `marks`, which its script leaves."""
    foreign = os.path.isdir(out) and os.listdir(out)
    if foreign and not any(os.path.exists(f"{out}/{mark}") for mark in marks):
        raise SystemExit(f"--out {out}: has files that are not this script's; name a new or empty folder")


def natural_key(name):
    """A key for sorting by numbers' values; ties, as of `1` and `01` or `a` and `A`, by the plain string."""
    parts = re.split(r"(\d+)", name.lower())  # text and digits in turn
    return [int(part) if part.isdecimal() else part for part in parts], name


def list_images(root, flag):
    """The images below the folder `root`, which `flag` names -> classes, paths, labels.

    classes: the folders with images, relative to root (root itself is ""), each level in natural order. paths
    (N,), bytes: the files, relative to root, class by class, each in natural order. labels (N,): the class of
    each. Links are followed, each real folder is listed once, and names that begin with a dot are skipped.
    Raises SystemExit for a folder that can't be read, that has images beside class folders, or no image, or
    parts.
    """

    def refuse(error):
        raise SystemExit(f"{flag} {error.filename}: {error.strerror}; expected a folder of images")

    classes = []
    paths = []
    labels = []
    listed = set()
    for folder, subfolders, files in os.walk(root, onerror=refuse, followlinks=True):
        # A link to a folder that was listed, such as a parent, ends there.
        real = os.path.realpath(folder)
        if real in listed:
            subfolders.clear()
            continue
        listed.add(real)

        # os.walk goes on with the names in this list, in its order.
        subfolders[:] = sorted((name for name in subfolders if name[0] != "."), key=natural_key)
        # Folders such as train and val are parts of a data set, of which the user must name one.
        parts = [name for name in subfolders if name.lower() in PARTS]
        if folder == root and len(parts) > 1:
            raise SystemExit(f"{flag} {root}: has the parts {', '.join(parts)}; name one of these folders")

        # Sidecars such as ._1.png, which macOS leaves on other disks, are no images.
        images = [name for name in files if name[0] != "." and name.lower().endswith(EXTENSIONS)]
        if not images:
            continue
        # os.walk is depth-first, so a folder above this one with images is always the class before.
        name = folder.removeprefix(root).lstrip(os.sep)
        if classes and name.startswith(os.path.join(classes[-1], "")):
            raise SystemExit(f"{flag} {root}: images lie beside the class folder {folder}; move them away")
        labels += [len(classes) for _ in images]
        paths += [os.fsencode(os.path.join(name, image)) for image in sorted(images, key=natural_key)]
        classes.append(name)

    if not classes:
        raise SystemExit(f"{flag} {root}: no {' '.join(EXTENSIONS)} in it")
    # Arrays take a third of the memory of lists, and loading processes share it.
    return classes, np.array(paths), np.array(labels)


def draw_demo(folder, num=2000):
    """Draw the demo's data, the same bytes each time: coloured shapes, 32 x 32 pixels, class = shape."""
    rng = np.random.default_rng(0)
    temporary = f"{folder}.tmp"
    for i in range(num):
        # The order of the draws decides the bytes.
        shape = ("bar", "circle", "ring", "triangle")[i % 4]
        fill = tuple(rng.integers(90, 256, 3).tolist())

        # Eight times as large, then averaged down: the edges are smooth.
        large = 256
        radius = rng.uniform(0.34, 0.46) * large
        x, y = rng.uniform(radius, large - radius, 2)
        image = Image.new("RGB", (large, large), (24, 24, 32))
        draw = ImageDraw.Draw(image)
        box = (x - radius, y - radius, x + radius, y + radius)
        if shape == "circle":
            draw.ellipse(box, fill)
        elif shape == "ring":
            draw.ellipse(box, outline=fill, width=int(radius / 2.5))
        elif shape == "bar":
            draw.rectangle((x - radius, y - radius / 3, x + radius, y + radius / 3), fill)
        else:
            draw.regular_polygon((x, y, radius), 3, fill=fill)

        path = f"{temporary}/{shape}"
        os.makedirs(path, exist_ok=True)
        image.resize((32, 32), Image.Resampling.BOX).save(f"{path}/{i:04d}.png")

    os.rename(temporary, folder)


if __name__ == "__main__":
    run(main)
