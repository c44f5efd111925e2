"""Stage 0 of RAE: images in, latents out (arXiv 2510.11690, section 3).

A frozen, pretrained ViT turns an image into a grid of tokens; stage 2 learns in the space of these grids.
Both trainings take from here the images, the encoder, the statistics of its latents, and the common flags.

    python rae_encoder.py                                # the demo: seconds on a laptop's CPU
    torchrun rae_encoder.py --data my_images --out stats.pt
    torchrun --nproc_per_node 8 rae_encoder.py --preset imagenet256 --data imagenet/train --out stats.pt

Letters in shapes: B batch, C token width, G tokens a side, N = G*G tokens, S image size.
"""

import argparse
import contextlib
import ctypes
import datetime
import difflib
import hashlib
import json
import logging
import math
import os
import re
import shutil
import signal
import sys
import warnings
import zipfile
from functools import partial

import numpy as np
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_CACHE
from PIL import Image, ImageDraw, ImageOps, PngImagePlugin
from safetensors.torch import load_file
from timm.layers import PatchEmbed, resample_abs_pos_embed
from timm.models import load_state_dict
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, default_collate
from torchvision.transforms.functional import crop, pil_to_tensor, resize
from tqdm import tqdm

# Images and encoder of the presets that all scripts share. The demo's encoder is small and untrained.
DEMO = {
    "data": "data/demo",
    "image_size": 32,
    "encoder": "test_vit",
    "encoder_weights": "random",
    "encoder_size": 64,
    "workers": 2,
}
RAEV2 = {"encoder": "dinov3-large", "layers": [11, 13, 15, 17, 19, 21, 23]}  # Singh et al. 2026, K = 7
# 8x8 tokens of width 384. From the last layer alone a short training's images are blurred (RAEv2, section 3).
SMALL = {
    "image_size": 64,
    "encoder": "dinov2-small",
    "encoder_size": 112,
    "layers": [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11],
}
# What differs from the flags' own defaults, which are of the released recipe for 256 px.
PRESETS = {
    "demo": DEMO | {"batch_size": 100},
    "small": SMALL,
    "imagenet256": {},
    "imagenet512": {"image_size": 512, "batch_size": 64},
    "raev2": RAEV2,
}
# What a preset says of these does not hold where such a flag asks for something else.
REPLACED = {
    "epochs": ["steps"],
    "image_size": ["encoder_size"],
    "encoder": ["encoder_size", "encoder_weights"],
    "model": ["width", "depth", "heads", "head_width", "head_depth", "head_heads"],
}
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
# What a checkpoint's config means where it lacks a key
OLDER = {"layers": None, "noise_law": "uniform", "prediction": "v", "base_depth": None}
AUTOENCODER = ("diffusion_pytorch_model.safetensors", "config.json")  # the files of diffusers' format
EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
# A whole picture is read whatever its metadata: Pillow refuses PNG text and colour profiles over 1 MB.
PngImagePlugin.MAX_TEXT_CHUNK = 2**28
PngImagePlugin.MAX_TEXT_MEMORY = 2**28


def parse_args(argv=None):
    parser = common_parser(__doc__, PRESETS)
    add = parser.add_argument_group("output").add_argument
    # torchrun takes --num for an abbreviation of a flag of its own.
    add("-n", "--num", type=count, help="images, drawn evenly; default: all; under torchrun only as -n")
    add("--out", default="stats.pt", help="file for the statistics (%(default)s)")
    return parse_with_preset(parser, PRESETS, argv)


# Flags: what the scripts have in common


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake ends in one line, which names the nearest flag."""

    def __init__(self, **options):
        # Most flags and their help share a line, and no list of all flags comes before them.
        layout = partial(argparse.RawDescriptionHelpFormatter, max_help_position=28)
        usage = "%(prog)s [--flag value ...]"
        super().__init__(formatter_class=layout, usage=usage, allow_abbrev=False, **options)

    def error(self, message):
        # argparse names the nearest choice of a value, but not the nearest flag.
        unknown = re.search(r"unrecognized arguments: (--[\w-]+)", message)
        if unknown:
            flags = re.findall(r"--[\w-]+", self.format_help())
            near = difflib.get_close_matches(unknown[1].replace("_", "-"), flags, n=1)
            message += f" (perhaps {near[0]}?)" if near else ""
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
count = bounded(int, lambda value: value >= 1, "a whole number from 1")
whole = bounded(int, lambda value: 0 <= value < 2**63, "a whole number from 0")
positive = bounded(float, lambda value: 0 < value < math.inf, "a number above 0")
amount = bounded(float, lambda value: 0 <= value < math.inf, "a number from 0")
fraction = bounded(float, lambda value: 0 <= value < 1, "a number from 0 to below 1")


def layer_list(text):
    """An argparse type: blocks as 5,7,9,11, two or more, ascending, from 0; None for `last`."""
    if text == "last":
        return None
    layers = [int(part) if part.isdecimal() else -1 for part in text.split(",")]
    if len(layers) < 2 or layers != sorted(set(layers)) or layers[0] < 0:
        raise argparse.ArgumentTypeError(f"expected two or more blocks, ascending, as 5,7,9,11, got {text}")
    return layers


def common_parser(description, presets):
    """A parser with the flags of every stage that encodes images."""
    parser = Parser(description=description)
    help = "the defaults of other flags; default: small with --data, demo without"
    parser.add_argument("--preset", choices=presets, help=help)

    add = parser.add_argument_group("data").add_argument
    add("--data", metavar="DIR", help="folder of class folders, or of the images of one class")
    add("--image-size", type=count, default=256, help="pixels a side (%(default)s)")
    add("--skip-broken", action="store_true", help="replace broken images by others and count them")

    add = parser.add_argument_group("encoder").add_argument
    names = ", ".join(ALIASES)
    add("--encoder", default="dinov2-base", help=f"{names}, or any timm ViT by its full name (%(default)s)")
    add("--encoder-weights", metavar="FILE", help="with timm's keys, or `random`; default: the hub's")
    add("--encoder-size", type=count, help="pixels a side that it sees; default: patch * image size / 16")
    add(
        "--layers",
        type=layer_list,
        metavar="I,J,...",
        help="blocks to average, from 0 (RAEv2), or `last`, the default but for small, raev2",
    )

    add = computing_flags(parser)
    add("--seed", type=whole, default=0, help="of every random number (%(default)s)")
    return parser


def computing_flags(parser):
    """Adds the flags that sample.py has as well; returns how to add more to their group."""
    add = parser.add_argument_group("computing").add_argument
    workers = min(8, os.cpu_count())
    add("--batch-size", type=count, default=256, help="images a step, over all ranks (%(default)s)")
    add("--workers", type=whole, default=workers, help="loading processes of a rank (%(default)s)")
    add("--device", choices=["cuda", "cpu", "mps", "xpu"], help="default: cuda where there is one, else cpu")
    return add


def training_parser(description, presets):
    """common_parser with the flags that both trainings take; returns it and their group."""
    parser = common_parser(description, presets)
    group = parser.add_argument_group("training")
    # One of the two: a preset has the other, which then does not count.
    length = group.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=positive, help="passes over the data (%(default)s)")
    length.add_argument("--steps", type=count, help="instead of --epochs (%(default)s)")
    add = group.add_argument
    add("--accum", type=count, default=1, help="micro-batches a step, to save memory (%(default)s)")
    add("--lr", type=amount, default=2e-4, help="AdamW's learning rate, the paper's (%(default)s)")
    add("--final-lr", type=amount, default=2e-5, help="where its decay ends, the paper's (%(default)s)")
    add("--precision", choices=["bf16", "fp32"], help="default: bf16 (autocast) where hardware has it")
    add("--checkpoint-activations", action="store_true", help="less memory for one more forward pass")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile; default: on CUDA")
    add("--init", metavar="FILE", help="weights that a new run starts from: a checkpoint or a released file")
    add(
        "--resume", metavar="FILE", help="checkpoint to go on from; default: the run folder's last.pt, if any"
    )

    add = parser.add_argument_group("output").add_argument
    add("--out", help="run folder: last.pt, metrics.jsonl, preview-*.png (%(default)s)")
    add("--log-every", type=count, default=100, help="steps (%(default)s)")
    add("--preview-every", type=whole, default=2500, help="steps; 0 is off (%(default)s)")
    add("--save-every", type=count, default=2500, help="steps between versions of last.pt (%(default)s)")
    add("--keep-every", type=count, help="steps between copies that stay, a multiple of --save-every")
    return parser, group


def parse_with_preset(parser, presets, argv):
    """Flags over the defaults of their preset. Raises SystemExit for a preset without its data."""
    # These decide other defaults, so they are looked at first.
    first = Parser(add_help=False)
    for flag in ("preset", "data", *REPLACED):
        first.add_argument(f"--{flag.replace('_', '-')}", dest=flag)
    given = first.parse_known_args(argv)[0]
    name = given.preset or ("small" if given.data else "demo")
    # What is dropped from the preset falls back to the flags' own defaults.
    preset = dict(presets.get(name, {}))
    for flag, keys in REPLACED.items():
        asked = getattr(given, flag)
        ours = str(preset.get(flag))
        # A network is named with its own sizes, also where the preset's has that name.
        if asked and (flag == "model" or full_name(asked) != full_name(ours)):
            for key in keys:
                preset.pop(key, None)
    parser.set_defaults(**preset, preset=name)
    args = parser.parse_args(argv)

    # Only the demo makes its own images.
    if not args.data:
        raise SystemExit(f"--preset {name} needs --data DIR")
    if name == "demo" and given.data:
        raise SystemExit(f"--data {given.data}: the demo draws its own images; leave --preset or --data out")
    return args


# Devices and files


def choose_device(name=None, local_rank=0):
    """The torch device of --device: by default CUDA where there is one, else the CPU.

    Raises SystemExit where this machine has no such device, or too few for its ranks.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    # The CPU is one device for all ranks.
    if name == "cpu":
        return torch.device("cpu")
    # A torch built for CUDA names it where there is no GPU, too.
    accelerator = torch.accelerator.current_accelerator()
    if not torch.accelerator.is_available() or accelerator.type != name:
        raise SystemExit(f"--device {name}: this machine, or this torch, has none; --device cpu")
    # torchrun starts as many processes as it is told.
    devices = torch.accelerator.device_count()
    if local_rank >= devices:
        raise SystemExit(f"more processes than {name} devices: --nproc_per_node {devices}")
    torch.accelerator.set_device_index(local_rank)
    return torch.device(name, local_rank)


def choose_precision(asked, device):
    """("bf16" or "fp32", why): --precision, or bf16 where the device multiplies it in hardware."""
    if device.type in ("cuda", "xpu"):
        hardware = torch.get_device_module(device).is_bf16_supported(including_emulation=False)
    else:
        # Before torch 2.10 a CPU does not tell. An emulated bf16 product takes five times fp32's time.
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()
        names = ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")
        hardware = device.type == "cpu" and any(capabilities.get(name) for name in names)

    # A flag is obeyed, with a warning in the first line.
    if asked == "bf16" and not hardware:
        return asked, "as asked, but not in this hardware: up to five times slower than fp32"
    if asked:
        return asked, "as asked"
    return ("bf16", "in hardware") if hardware else ("fp32", "no bf16 in hardware")


def join_ranks(device_name):
    """Joins torchrun's process group, if there is one; returns (rank, world size, device)."""
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = choose_device(device_name, int(os.environ.get("LOCAL_RANK", 0)))
    if world > 1:
        # torch 2.14 has a new name for this flag of DDP's, older ones don't know it.
        warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)
        # An hour, since the others wait while rank 0 saves and draws a preview.
        hour = datetime.timedelta(hours=1)
        dist.init_process_group(timeout=hour, device_id=device if device.type == "cuda" else None)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as released: six times fp32's rate on an H100
    return rank, world, device


@contextlib.contextmanager
def exact_fp32():
    """Within it, or in a function that it decorates, fp32 is not TF32, convolutions included."""
    # TF32 keeps 10 of the 23 bits of a mantissa.
    outside = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(outside)


def compile_blocks(blocks, asked, device):
    """Compiles block by block, since one compilation serves all of one size. asked: None means on CUDA.

    Raises SystemExit where there is no C compiler.
    """
    if asked is None:
        asked = device.type == "cuda"
    if not asked:
        return
    if not any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))):
        raise SystemExit("torch.compile needs a C compiler, such as gcc; --no-compile goes without")
    # Two networks have four sizes of blocks, in two batch sizes or more; past torch's 8 they'd run eager.
    torch._dynamo.config.cache_size_limit = 64  # its newer name is not in torch 2.6
    for block in blocks:
        block.compile()


def keep_freed_memory(device):
    """glibc gives large blocks back at every free; new pages cost a CPU 10 to 20 % of a training step."""
    if sys.platform == "linux" and device.type == "cpu":
        libc = ctypes.CDLL(None)
        # Before glibc 2.35 so high a threshold is refused, and its own, which moves, is better left alone.
        if libc.mallopt(-3, 2**31 - 1):  # M_MMAP_THRESHOLD
            libc.mallopt(-1, 2**29)  # M_TRIM_THRESHOLD


def set_up(args):
    """What the scripts that read images begin with; returns (rank, world size, device)."""
    rank, world, device = join_ranks(args.device)
    keep_freed_memory(device)
    # On a CPU the fused attention's gradient takes twice the time of the same products one by one, in bf16
    # and for short sequences ten times.
    torch.backends.cuda.enable_flash_sdp(device.type != "cpu")
    # One rank draws, the others wait for it.
    if args.preset == "demo" and rank == 0 and not os.path.exists(args.data):
        try:
            draw_demo(args.data)
        except OSError as error:
            raise SystemExit(f"{args.data}: the demo's images can't be drawn ({reason(error)})") from None
    if world > 1:
        dist.barrier()
    return rank, world, device


def run(main):
    """main(), which Ctrl-C ends in one line and with exit code 130, as the shell has it."""
    try:
        main()
    except SystemExit:
        # The last line would stand behind a progress bar that is still open.
        for bar in list(tqdm._instances):
            bar.close()
        raise
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("\ninterrupted; nothing new was written, the same command starts again", file=sys.stderr)
        sys.exit(130)


def reason(error):
    """An error as part of a line; of PyTorch's list of keys that don't fit, the first."""
    # Of several lines the first says what happened.
    lines = re.sub(r"^Error\(s\) in loading.*\n\s*", "", str(error).strip()).splitlines()
    return lines[0][:200] if lines else type(error).__name__


def announce_fetch(repository, name):
    """Says where a file of the hub is, or at once that it is fetched: the hub's tools retry in silence."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it prints every retry
    cached = try_to_load_from_cache(repository, name)
    place = cached if isinstance(cached, str) else f"fetching it into {HF_HUB_CACHE}"
    if os.environ.get("RANK", "0") == "0":
        print(f"hub:{repository}/{name}: {place}", file=sys.stderr, flush=True)


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
    parts = re.fullmatch("hub:([^/]+/[^/]+)/?(.*)", path)
    if not parts:
        raise SystemExit(f"{flag} {path}: expected hub:OWNER/REPO/PATH")

    repository, wanted = parts.groups()
    # All files of an autoencoder come to lie in one folder of the cache.
    for name in [wanted] if wanted else AUTOENCODER:
        try:
            announce_fetch(repository, name)
            file = hf_hub_download(repository, name)
        except Exception as error:  # the hub's tools raise many kinds
            problem = f"{flag} hub:{repository}/{name}: can't be fetched from the Hugging Face hub"
            why = f"{type(error).__name__}: {reason(error)}"
            raise SystemExit(f"{problem} ({why}); a local file does as well") from None
    return file if wanted else os.path.dirname(file)


def read_autoencoder(folder):
    """A folder in the format of diffusers' AutoencoderRAE: its state dict, and what it tells of its sizes.

    config: as in our checkpoints, with "heads" and, where it has them, "statistics" (mean, var) of latents.
    sizes: of our Decoder. Raises OSError, KeyError or ValueError for another folder.
    """
    with open(f"{folder}/config.json") as file:
        theirs = json.load(file)
    # The encoder in it is Hugging Face's and not read: ours is timm's.
    state = load_file(f"{folder}/{AUTOENCODER[0]}")
    width = theirs["encoder_hidden_size"]
    size = {384: "small", 768: "base", 1024: "large"}[width]
    grid = theirs["encoder_input_size"] // theirs["encoder_patch_size"]
    config = {
        "encoder": f"{theirs['encoder_type']}-{size}",
        "encoder_size": theirs["encoder_input_size"],
        "image_size": grid * theirs["patch_size"],
        "latent_shape": [width, grid, grid],
        "heads": theirs["decoder_num_attention_heads"],
    }
    # Of one number where there are none. The authors add 1e-5 to the variance, and this is its root.
    if state["_latents_mean"].numel() > 1:
        config["statistics"] = (state["_latents_mean"], state["_latents_std"].square() - 1e-5)
    pixels = {key: state[f"encoder_{key}"].flatten().tolist() for key in ("mean", "std")}
    return {"model": state, "config": config, "sizes": pixels | {"grid": grid}}


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
        # Files of before torch 1.6, such as torchvision's VGG-16, are no zip files and can't be mapped.
        mapped = zipfile.is_zipfile(file)
        return dict(torch.load(file, map_location="cpu", mmap=mapped, weights_only=True))
    except Exception as error:  # torch and safetensors raise many kinds
        raise SystemExit(f"{flag} {path}: not a file of weights ({reason(error)})") from None


def write_file(path, write):
    """Calls write(file) on a file beside `path` and then renames it: nobody ever reads half of one.

    Raises SystemExit where that fails, as on a full disk.
    """
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            write(file)
            # The name must not reach the disk before what it names.
            file.flush()
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
        digest.update(tensor.detach().cpu().flatten().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:12]


def full_name(encoder):
    """timm's own name of an encoder that may be named by an alias."""
    return ALIASES.get(encoder, encoder)


def complete(config):
    """A checkpoint's config with what older versions leave out; a released file tells next to nothing."""
    return OLDER | config if "encoder_size" in config else config


def difference(config, other):
    """The first key that both configs have, with different values, or None; weights count, not names."""
    other = complete(other)
    # An encoder of one hash, or of an alias and its full name, is one; two unknown hashes are not one.
    same_hash = config.get("encoder_hash", "unknown") == other.get("encoder_hash")
    same_name = full_name(config.get("encoder")) == full_name(other.get("encoder"))
    for key, value in config.items():
        if other.get(key, value) != value and not (key == "encoder" and (same_hash or same_name)):
            return key
    return None


def check_pair(flow, flow_name, decoder, decoder_name):
    """Raises SystemExit where the configs of a flow and of a decoder tell of different latents."""
    names = ("encoder", "encoder_hash", "encoder_size", "layers", "latent_shape")
    # The image sizes may differ: a decoder can have larger patches than the encoder.
    flow = complete(flow)
    # A released file does not name its encoder: what is not known can't differ.
    ours = {name: flow[name] for name in names if name in flow}
    key = difference(ours, decoder)
    if key:
        problem = f"{flow_name} has {key} {ours[key]}, {decoder_name} has {complete(decoder)[key]}"
        raise SystemExit(f"{problem}: they are no pair")


# Images


def natural_order(names):
    """Names sorted with numbers by value; ties, as of `1` and `01` or `a` and `A`, by the plain string."""
    # Padded to the longest that a name can have, behind a character that sorts before any text.
    pad = partial(re.compile("[0-9]+").sub, lambda digits: "\0" + digits[0].zfill(255))
    return sorted(sorted(names), key=lambda name: pad(name.lower()))  # sorting leaves ties as they are


def list_images(root, flag):
    """The images below the folder `root`, which `flag` names -> classes, names, labels, left_out.

    classes: the folders with images, relative to root (root itself is ""), each level in natural order. names
    (N,), bytes: the file names, class by class, each in natural order. labels (N,), int32: the class of each.
    left_out: what was not taken, in words, or "". Links are followed, each real folder is listed once, and
    names that begin with a dot are skipped. Raises SystemExit where a folder can't be read, where images lie
    beside class folders, and where there is no image.
    """

    def refuse(error):
        raise SystemExit(f"{flag} {error.filename}: {error.strerror}; expected a folder of images")

    classes = []
    names = []  # an array a class: a million strings would take 100 MB
    left_out = {"files of other kinds": 0, "folders without images": 0, "folders listed before": 0}
    listed = set()
    for folder, subfolders, files in os.walk(root, onerror=refuse, followlinks=True):
        real = os.path.realpath(folder)
        if real in listed:
            left_out["folders listed before"] += 1
            subfolders.clear()  # a link to itself or a parent ends here
            continue
        listed.add(real)

        # os.walk goes on with what is left in this list, in its order.
        subfolders[:] = natural_order(name for name in subfolders if name[0] != ".")
        files = [name for name in files if name[0] != "."]
        images = [name for name in files if name.lower().endswith(EXTENSIONS)]
        left_out["files of other kinds"] += len(files) - len(images)
        if not images:
            left_out["folders without images"] += not subfolders
            continue

        # A folder is followed by what is below it: comparing with the class before finds all mixtures.
        relative = folder[len(os.path.join(root, "")) :]
        if classes and relative.startswith(os.path.join(classes[-1], "")):
            beside = os.path.join(root, classes[-1], os.fsdecode(names[-1][0]))
            mixture = f"{beside} lies beside the class folder {folder}"
            raise SystemExit(f"{flag} {root}: {mixture}; move it into a folder of its own, or away")
        classes.append(relative)
        names.append(np.array([os.fsencode(name) for name in natural_order(images)]))

    counts = ", ".join(f"{kind} ({count})" for kind, count in left_out.items() if count)
    if not classes:
        raise SystemExit(f"{flag} {root}: no {' '.join(EXTENSIONS)} in it; left out: {counts}")
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), [len(array) for array in names])
    return classes, np.concatenate(names), labels, f"left out: {counts}" if counts else ""


def to_rgb(image):
    """An open Pillow image -> RGB, 8 bit: upright by its EXIF tag, 16 bits scaled, transparency on white.

    Raises whatever Pillow meets in broken pixels; broken metadata is passed over.
    """
    image.load()
    # In place Pillow turns the pixels first, and only then meets what is broken in other metadata.
    with contextlib.suppress(Exception):  # of many kinds, in a picture that is whole
        ImageOps.exif_transpose(image, in_place=True)

    # Pillow's own conversion of 16-bit grey clips at 255.
    if image.mode.startswith("I"):
        levels = np.asarray(image).clip(0, 65535) / 257
        image = Image.fromarray(levels.round().astype(np.uint8))

    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def center_crop(image, size):
    """Pillow image -> its centre, size x size, as ADM evaluates (Dhariwal & Nichol 2021)."""
    # Halved first, as ADM has it: one large bicubic step is of lower quality.
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width = round(image.width * scale)
    height = round(image.height * scale)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    return crop(image, (height - size) // 2, (width - size) // 2, size, size)


def random_crop(image, size, rng):
    """PIL image -> short side to 1.5 size, then a random size x size crop (stage 1, paper appendix)."""
    image = resize(image, int(1.5 * size), Image.Resampling.BICUBIC)  # 384 pixels for images of 256
    # Every window is as likely, the first and the last place included.
    left = rng.integers(image.width - size + 1)
    top = rng.integers(image.height - size + 1)
    return crop(image, top, left, size, size)


class ImageData(Dataset):
    """The images below a folder; classes are its leaf folders in natural order (list_images).

    Args:
        root: the folder, or a single image, given by `flag`.
        size: pixels a side of the images that come out.
        augment: None (centre crop), "crop" (stage 1) or "flip" (stage 2: centre crop, half of them mirrored).
        seed: with the epoch and the index it decides every random number of an image.
        skip_broken: put the next readable image in the place of a broken one, and mark it in `broken`.

    data[epoch, i] is (uint8 image (3,S,S), class), or a line of text that says what is broken.
    `about` names the folder and what in it was left out.
    Raises SystemExit where there is no such folder or no image in it.
    """

    def __init__(self, root, size, augment=None, seed=0, skip_broken=False, flag="--data"):
        self.root = str(root)
        self.flag = flag
        self.about = self.root
        if os.path.isfile(self.root):  # one image is a folder of one
            self.root, name = os.path.split(self.root)
            self.names = np.array([os.fsencode(name)])
            self.classes = [""]
            self.labels = np.zeros(1, np.int32)
        else:
            self.classes, self.names, self.labels, left_out = list_images(self.root, flag)
            if left_out:
                self.about += f" ({left_out})"
        self.size = size
        self.augment = augment
        self.seed = seed
        self.skip_broken = skip_broken
        self.broken = torch.zeros(len(self.names), dtype=torch.bool).share_memory_()  # workers write into it

    def __len__(self):
        return len(self.names)

    def __getitem__(self, key):
        epoch, i = key
        # The image itself, or with skip_broken the first after it that can be read.
        for candidate in range(i, i + len(self)):
            candidate %= len(self)
            try:
                with Image.open(self.path(candidate)) as file:
                    image = to_rgb(file)
            except Exception as error:  # Pillow's decoders raise many kinds
                self.broken[candidate] = True
                if not self.skip_broken:
                    problem = f"{self.path(candidate)}: not a readable image ({reason(error)})"
                    return f"{problem}; repair it, remove it, or --skip-broken"
                continue
            # Of (epoch, i) alone, whatever image came in the place of a broken one.
            image = self.transform(image, np.random.default_rng((self.seed, epoch, i)))
            return pil_to_tensor(image), int(self.labels[candidate])
        return f"{self.flag} {self.about}: every image is broken"

    def path(self, i):
        return os.path.join(self.root, self.classes[self.labels[i]], os.fsdecode(self.names[i]))

    def transform(self, image, rng):
        if self.augment == "crop":
            return random_crop(image, self.size, rng)
        image = center_crop(image, self.size)
        mirrored = self.augment == "flip" and is_mirrored(rng)
        return ImageOps.mirror(image) if mirrored else image


def is_mirrored(rng):
    """Stage 2 sees half of the images mirrored."""
    return rng.random() < 0.5


def draw_demo(folder, num=2000, size=32):
    """Draws the demo's data, the same bytes each time: coloured shapes, size x size pixels, class = shape."""
    rng = np.random.default_rng(0)
    temporary = f"{folder}.{os.getpid()}.tmp"
    for i in range(num):
        # The order of the draws decides the bytes.
        shape = ("bar", "circle", "ring", "triangle")[i % 4]
        fill = tuple(rng.integers(90, 256, 3).tolist())

        # Eight times as large, then averaged down: the edges are smooth.
        large = 8 * size
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
        image.resize((size, size), Image.Resampling.BOX).save(f"{path}/{i:04d}.png")

    # Another process may have drawn the same meanwhile.
    if not os.path.isdir(folder):
        os.rename(temporary, folder)
    shutil.rmtree(temporary, ignore_errors=True)


def training_order(num, batch_size, seed, first_step, last_step, rank=0, world=1):
    """The (epoch, index) pairs of this rank's share of every step: a function of (seed, step) alone.

    An epoch is a new permutation; what does not fill its last batch is left out.
    """
    steps_per_epoch = num // batch_size
    shuffled = None  # the epoch of the permutation at hand
    for step in range(first_step, last_step):
        epoch, k = divmod(step, steps_per_epoch)
        if epoch != shuffled:
            order = np.random.default_rng((seed, epoch)).permutation(num)
            shuffled = epoch
        # The ranks take turns, so their shares make the batch of one process.
        batch = order[k * batch_size : (k + 1) * batch_size].tolist()
        yield [(epoch, i) for i in batch[rank::world]]


def even_order(total, num, batch_size, rank=0, world=1):
    """This rank's share of `num` images drawn evenly from `total`, in batches of `batch_size`."""
    # Epoch 0: a centre crop draws nothing.
    mine = [(0, i * total // num) for i in range(rank, num, world)]
    return list(BatchSampler(mine, batch_size, drop_last=False))


def collate(samples):
    # A text and no exception: one from a worker would come with the worker's traceback.
    errors = [sample for sample in samples if isinstance(sample, str)]
    return errors[0] if errors else default_collate(samples)


def ignore_signals(_worker):
    """Ctrl-C and SIGTERM reach the whole group; the workers must live on for the step that is running."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def load_images(data, order, device, workers=0):
    """Yields (images (B,3,S,S) in [0,1] float32, labels (B,)) on `device` for each list of keys in `order`.

    Raises SystemExit at a broken image.
    """
    loader = DataLoader(
        data,
        batch_sampler=order,
        collate_fn=collate,
        num_workers=workers,
        worker_init_fn=ignore_signals,
        pin_memory=device.type == "cuda",
    )
    for batch in loader:
        if isinstance(batch, str):
            raise SystemExit(batch)
        # Bytes travel to the device, a quarter of what floats would take.
        images, labels = batch
        yield images.to(device, non_blocking=True).float() / 255, labels.to(device, non_blocking=True)


# Encoder


def timm_name(name):
    """The full timm name of an encoder. Raises SystemExit for one that timm does not know."""
    # Without a tag any architecture of timm will do, with one its weights must exist.
    full = full_name(name)
    if not timm.is_model(full) or ("." in full and not timm.models.is_model_pretrained(full)):
        raise SystemExit(f"--encoder {name}: neither one of {', '.join(ALIASES)} nor a name that timm knows")
    return full


def load_vit(name, weights, flag="--encoder"):
    """timm's ViT `name` with weights from the hub (None), from a file, or "random"; see Encoder."""
    options = {}
    if "siglip" in name:
        options["act_layer"] = "gelu_tanh"  # as Hugging Face's SigLIP 2: without it latents differ by 2e-3
    repository = timm.get_pretrained_cfg_value(name, "hf_hub_id")
    if weights is None and repository:
        announce_fetch(repository, "model.safetensors")

    try:
        if weights not in (None, "random"):
            state = load_state_dict(local_file(weights, f"{flag}-weights"), weights_only=True)
            # Without its classifier timm loads it strictly; it converts and resamples as it does its own.
            state = {key: value for key, value in state.items() if not key.startswith("head.")}
            options["pretrained_cfg_overlay"] = {"state_dict": state, "num_classes": 0}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # untrained weights are the same in every script and on every rank
            return timm.create_model(name, pretrained=weights != "random", num_classes=0, **options)
    except Exception as error:  # timm, torch, safetensors and the hub raise many kinds
        if weights:
            problem = f"{flag}-weights {weights}: no weights of timm's {name}"
        else:
            problem = (
                f"{flag} {name}: model.safetensors of {repository} can't be fetched from the Hugging Face hub"
            )
        raise SystemExit(f"{problem} ({reason(error)}); {flag}-weights FILE takes a local copy") from None


class Encoder(nn.Module):
    """A frozen timm ViT: images (B,3,H,W) in [0,1] -> latents (B,C,G,G) (paper section 3.1).

    The patch tokens after the final LayerNorm without its affine: each token has mean 0 and variance 1.

    Args:
        name: an alias of ALIASES, or any timm ViT by its full name with tag.
        encoder_size: pixels a side that the ViT sees; default: patch * image_size / 16.
        layers: numbers of blocks, from 0, whose outputs are averaged (RAEv2); default: the last alone.
        weights: None (hub), "random" (seeded), or a .safetensors / .pt file with timm's keys.

    Attributes: width C, grid G, encoder_size, layers, hash of the weights, mean and std (3,1,1).
    Raises SystemExit for an unknown name, a size that is no multiple of the patch, weights that don't fit.
    """

    def __init__(self, name, encoder_size=None, image_size=256, weights=None, layers=None):
        super().__init__()
        self.vit = load_vit(timm_name(name), weights)
        needed = ("num_prefix_tokens", "pos_embed", "set_input_size")
        plain = all(hasattr(self.vit, attribute) for attribute in needed)
        if not plain or not isinstance(self.vit.patch_embed, PatchEmbed):
            raise SystemExit(f"--encoder {name}: not a plain ViT, with patches and tokens of one size")
        # Before positions are resampled, so that it does not depend on the size.
        self.hash = fingerprint(self.vit.state_dict().values())

        patch = self.vit.patch_embed.patch_size[0]
        self.encoder_size = encoder_size or patch * image_size // 16
        if self.encoder_size == 0 or self.encoder_size % patch:
            cause = f"--encoder-size {encoder_size}" if encoder_size else f"--image-size {image_size}"
            problem = (
                f"the encoder would see {self.encoder_size} pixels, no multiple of its patch size, {patch}"
            )
            raise SystemExit(f"{cause}: {problem}; give another --encoder-size")
        self.width = self.vit.embed_dim
        self.grid = self.encoder_size // patch
        self.resize_positions()
        self.layers = layers
        if layers and layers[-1] >= len(self.vit.blocks):
            raise SystemExit(f"--layers: {name} has blocks 0 to {len(self.vit.blocks) - 1}, not {layers[-1]}")

        # The last norm without its affine; a ViT without one gets it.
        eps = getattr(self.vit.norm, "eps", 1e-6)
        self.vit.norm = nn.LayerNorm(self.width, eps, elementwise_affine=False)
        for key in ("mean", "std"):
            self.register_buffer(key, torch.tensor(self.vit.pretrained_cfg[key]).view(3, 1, 1))
        # Frozen: no dropout, no gradients.
        self.eval().requires_grad_(False)

    def resize_positions(self):
        """Fits the ViT to encoder_size, with its positions resampled as the authors' models do it."""
        native = self.vit.pos_embed  # DINOv3 has none, but rotary positions
        self.vit.set_input_size(self.encoder_size)
        # timm antialiases, Hugging Face's MAE and SigLIP 2 don't: latents would be 0.05 and 0.18 apart.
        if self.vit.pretrained_cfg.get("tag") == "mae" or "siglip" in self.vit.pretrained_cfg["architecture"]:
            grid = self.vit.patch_embed.grid_size
            prefix = self.vit.num_prefix_tokens
            position = resample_abs_pos_embed(native, grid, num_prefix_tokens=prefix, antialias=False)
            self.vit.pos_embed = nn.Parameter(position)

    @torch.no_grad()
    def forward(self, x, weights=None):
        """weights: (B,L), of the layers in the average of each image; default: 1 / L each."""
        if x.shape[-2:] != (self.encoder_size, self.encoder_size):
            x = F.interpolate(x, size=self.encoder_size, mode="bicubic", align_corners=False)
        x = (x - self.mean) / self.std
        if self.layers:
            tokens = self.average(x, weights)
        else:
            tokens = self.vit.forward_features(x)  # (B, prefix + N, C)
            tokens = tokens[:, self.vit.num_prefix_tokens :].float()  # (B,N,C) class and registers dropped
        return tokens.mT.unflatten(2, (self.grid, self.grid))  # (B,C,G,G)

    def average(self, x, weights):
        """The mean of the layers' normalised tokens, plus the last one's spatial mean (RAEv2, eq. 1)."""
        # As released for DINOv3; the paper writes a sum.
        options = {"norm": True, "stop_early": True, "output_fmt": "NLC", "intermediates_only": True}
        layers = torch.stack(self.vit.forward_intermediates(x, self.layers, **options)).float()  # (L,B,N,C)
        mean = layers.mean(0) if weights is None else torch.einsum("bl,lbnc->bnc", weights, layers)
        return mean + layers[-1].mean(1, keepdim=True)  # (B,N,C) + (B,1,C)


# Latent statistics


def encode_views(encoder, data, order, workers=0):
    """Yields the latents (B,2,C,G,G) of images and of their mirrors, and labels (B,), for each list of keys.

    In fp32, as released: in bf16 they are 1.1 % off.
    """
    for images, labels in load_images(data, order, encoder.mean.device, workers):
        yield torch.stack([encoder(images), encoder(images.flip(-1))], dim=1), labels


@exact_fp32()
def latent_statistics(latents):
    """Mean and population variance, each (C,G,G), of this and all other ranks' latents (B,2,C,G,G).

    Exact: float64 sums in one pass. (The released code keeps a momentum-0.1 running average, which depends on
    order and batch size.)
    """
    number = 0
    total = 0
    for z in latents:
        z = z.flatten(0, 1)  # (2B,C,G,G)
        z = z.cpu().double() if z.device.type == "mps" else z.double()  # mps has no float64
        total = total + torch.stack([z.sum(0), z.square().sum(0)])
        number += len(z)
    # Ranks may have seen different numbers of images.
    number = total.new_tensor(number)
    if dist.is_initialized():
        dist.all_reduce(total)
        dist.all_reduce(number)
    # float64 has room for the difference of two large numbers.
    mean, square = total / number
    return mean.float(), (square - mean.square()).float()


def load_statistics(path, latent_shape, flag="--stats"):
    """Mean and variance, each (C,G,G), in the file that `flag` names, ours or released.

    A missing or None mean is 0, such a variance 1; one of shape (C,) or (C,1,1) holds for all positions.
    Raises SystemExit for other files.
    """
    file = read_weights(path, flag)
    moments = []
    for key, default in (("mean", 0.0), ("var", 1.0)):
        value = file.get(key)
        # Released files have mean None where the encoder's own norm centres the tokens.
        moment = torch.tensor(default) if value is None else value
        if not {"mean", "var"} & file.keys() or not torch.is_tensor(moment):
            raise SystemExit(f"{flag} {path}: no latent statistics; `rae_encoder.py --out FILE` writes them")
        if moment.ndim == 1:
            moment = moment[:, None, None]
        try:
            moments.append(moment.float().expand(*latent_shape))
        except RuntimeError:
            shapes = f"of latents {[*moment.shape]}, these are {[*latent_shape]}"
            raise SystemExit(f"{flag} {path}: {shapes}") from None
    return moments


def main(argv=None):
    args = parse_args(argv)
    rank, world, device = set_up(args)

    # Everything that can be wrong is found before the work
    data = ImageData(args.data, args.image_size, skip_broken=args.skip_broken)
    num = args.num or len(data)
    if not max(2, world) <= num <= len(data):
        needed = f"statistics need {max(2, world)} or more: two, and one for each rank"
        raise SystemExit(f"--num {num}: {args.data} has {len(data)} images, and {needed}")
    # The dot at the end makes a file in the folder's place fail.
    folder = os.path.join(os.path.dirname(args.out), ".")
    if os.path.isdir(args.out) or not os.access(folder, os.W_OK):
        raise SystemExit(f"--out {args.out}: not a file in a folder that exists and can be written into")
    encoder = Encoder(args.encoder, args.encoder_size, args.image_size, args.encoder_weights, args.layers)
    encoder.to(device)
    if rank == 0:
        demo = "The demo: its numbers compare with nothing. " if args.preset == "demo" else ""
        images = f"{demo}{num} images of {data.about}"
        print(f"{images}; {args.encoder}; {world} x {device.type}, fp32", file=sys.stderr)

    # One pass over the images and their mirrors, shared by the ranks
    order = even_order(len(data), num, max(1, args.batch_size // world), rank, world)
    views = encode_views(encoder, data, order, args.workers)
    progress = tqdm(views, total=len(order), desc="latent statistics", disable=rank > 0)
    mean, var = latent_statistics(z for z, _ in progress)
    broken = data.broken.to(device).int()
    if world > 1:
        dist.all_reduce(broken)

    if rank == 0:
        statistics = {"mean": mean.cpu(), "var": var.cpu()}
        write_file(args.out, lambda file: torch.save(statistics, file))
        replaced = f"; {broken.count_nonzero()} broken images were replaced by others" if broken.any() else ""
        print(f"{args.out}: mean and variance of {num} images, {[*mean.shape]}{replaced}", file=sys.stderr)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
