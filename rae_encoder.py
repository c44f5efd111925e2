"""Stage 0 of RAE: images in, latents out (arXiv 2510.11690, section 3).

A frozen, pretrained ViT turns an image into a grid of tokens; stage 2 learns in the space of these grids.
Both trainings take from here the images, the encoder, the statistics that normalise the latents, and flags.

    torchrun rae_encoder.py --data imagenet/train --encoder dinov2-base --out stats.pt
    torchrun --nproc_per_node 8 rae_encoder.py --data imagenet/train --encoder dinov2-base --out stats.pt
    python rae_encoder.py --data my_images --out stats.pt

Letters in shapes: B batch, C token width, G tokens a side, N = G*G tokens, S image size.
"""

import argparse
import ctypes
import logging
import math
import os
import signal
import sys

import numpy as np
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from safetensors.torch import load_file
from timm.data.readers import set_img_extensions
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from timm.layers import resample_abs_pos_embed
from timm.models import load_state_dict
from torch import nn
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
# The tag is part of the name: the mean and std of the training images come with it.
ALIASES = {
    "dinov2-small": "vit_small_patch14_reg4_dinov2.lvd142m",
    "dinov2-base": "vit_base_patch14_reg4_dinov2.lvd142m",
    "dinov2-large": "vit_large_patch14_reg4_dinov2.lvd142m",
    "siglip2-base": "vit_base_patch16_siglip_256.v2_webli",
    "mae-base": "vit_base_patch16_224.mae",
}

IMAGENET = dict(
    encoder="dinov2-base", image_size=256, batch_size=256, precision="bf16", workers=8, seed=0,
    out="stats.pt",
)  # fmt: skip
DEMO = dict(data="data/demo", encoder="test_vit", encoder_weights="random", encoder_size=64, image_size=32)
PRESETS = {
    "demo": IMAGENET | DEMO | dict(batch_size=100, workers=2),
    "imagenet256": IMAGENET,
    "imagenet512": IMAGENET | dict(image_size=512, batch_size=64),
}


def read_image(file):
    """An open file or path -> PIL image in RGB: upright by its EXIF tag, transparency laid on white.

    Raises whatever Pillow meets in a broken file.
    """
    image = ImageOps.exif_transpose(Image.open(file))
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion clips at 255
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def center_crop(image, size):
    """PIL image -> its centre, size x size, as ADM evaluates (Dhariwal & Nichol 2021)."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def random_crop(image, size, rng):
    """PIL image -> short side to 1.5 size, then a random size x size crop (stage 1, paper appendix)."""
    short, long = int(1.5 * size), int(1.5 * size * max(image.size) / min(image.size))
    width, height = (short, long) if image.width <= image.height else (long, short)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = rng.integers(width - size + 1), rng.integers(height - size + 1)
    return image.crop((left, top, left + size, top + size))


class ImageData(Dataset):
    """The images below a folder or inside a .tar; classes are the leaf folders in natural order.

    Args:
        root: folder or .tar file, given by `flag`.
        size: pixels a side of the images that come out.
        augment: None (centre crop), "crop" (stage 1) or "flip" (stage 2: centre crop, half of them mirrored).
        seed: with the epoch and the index it decides every random number of an image.
        skip_broken: put the next readable image in the place of a broken one, and mark it in `broken`.

    data[epoch, i] is (uint8 image (3,S,S), class), or a line of text that says what is broken.
    Raises SystemExit where there is no such folder or no image in it.
    """

    def __init__(self, root, size, augment=None, seed=0, skip_broken=False, flag="--data"):
        self.name = f"{flag} {root}"
        set_img_extensions(EXTENSIONS)
        folder = os.path.isdir(root)
        try:  # timm's tar handles are not cached: forked workers would share their position
            self.reader = ReaderImageFolder(root) if folder else ReaderImageInTar(root, cache_tarfiles=False)
        except Exception:  # of many kinds
            kinds = " ".join(EXTENSIONS)
            raise SystemExit(f"{self.name}: no such folder or .tar, or no {kinds} in it") from None
        self.classes = list(self.reader.class_to_idx if folder else self.reader.class_name_to_idx)
        self.size, self.augment, self.seed, self.skip_broken = size, augment, seed, skip_broken
        self.broken = torch.zeros(len(self.reader), dtype=torch.bool).share_memory_()  # workers write into it

    def __len__(self):
        return len(self.reader)

    def __getitem__(self, key):
        epoch, i = key
        for candidate in range(i, i + len(self)):
            candidate %= len(self)
            try:
                file, label = self.reader[candidate]
                with file:
                    image = self.transform(read_image(file), np.random.default_rng((self.seed, epoch, i)))
                return torch.from_numpy(np.array(image)).permute(2, 0, 1), int(label)  # (S,S,3) -> (3,S,S)
            except Exception as error:  # Pillow's decoders raise many kinds
                self.broken[candidate] = True
                if not self.skip_broken:
                    name = self.reader.filename(candidate, absolute=True)
                    return f"{name}: not a readable image ({error}); repair it, remove it, or --skip-broken"
        return f"{self.name}: every image is broken"

    def transform(self, image, rng):
        if self.augment == "crop":
            return random_crop(image, self.size, rng)
        image = center_crop(image, self.size)
        return ImageOps.mirror(image) if self.augment == "flip" and rng.random() < 0.5 else image


def draw_demo(folder, num=2000, size=32):
    """Draws the demo's data, the same bytes each time: coloured shapes, size x size pixels, class = shape."""
    rng, scale = np.random.default_rng(0), 8
    for i in range(num):
        shape = ("bar", "circle", "ring", "triangle")[i % 4]
        path = os.path.join(folder + ".tmp", shape)
        fill = tuple(rng.integers(90, 256, 3).tolist())
        radius = rng.uniform(0.34, 0.46) * size * scale
        x, y = rng.uniform(radius, size * scale - radius, 2)
        image = Image.new("RGB", (size * scale, size * scale), (24, 24, 32))
        draw, box = ImageDraw.Draw(image), (x - radius, y - radius, x + radius, y + radius)
        if shape == "circle":
            draw.ellipse(box, fill)
        elif shape == "ring":
            draw.ellipse(box, outline=fill, width=int(radius / 2.5))
        elif shape == "bar":
            draw.rectangle((x - radius, y - radius / 3, x + radius, y + radius / 3), fill)
        else:
            draw.regular_polygon((x, y, radius), 3, fill=fill)
        os.makedirs(path, exist_ok=True)
        image.resize((size, size), Image.Resampling.BOX).save(os.path.join(path, f"{i:04d}.png"))
    os.rename(folder + ".tmp", folder)


def training_order(count, batch_size, seed, first_step, last_step, rank=0, world=1):
    """The (epoch, index) pairs of this rank's share of every step: a function of (seed, step) alone.

    An epoch is a new permutation; what does not fill its last batch is left out.
    """
    steps_per_epoch, shuffled = count // batch_size, None
    for step in range(first_step, last_step):
        epoch, k = divmod(step, steps_per_epoch)
        if shuffled != epoch:
            shuffled, order = epoch, np.random.default_rng((seed, epoch)).permutation(count).tolist()
        yield [(epoch, i) for i in order[k * batch_size : (k + 1) * batch_size][rank::world]]


def even_order(count, num, batch_size, rank=0, world=1):
    """This rank's share of `num` images drawn evenly from `count`, in batches of `batch_size`."""
    mine = [(0, i * count // num) for i in range(rank, num, world)]
    return [mine[j : j + batch_size] for j in range(0, len(mine), batch_size)]


def collate(samples):
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
    options = dict(num_workers=workers, worker_init_fn=ignore_signals, pin_memory=device.type == "cuda")
    for batch in DataLoader(data, batch_sampler=order, collate_fn=collate, **options):
        if isinstance(batch, str):
            raise SystemExit(batch)
        images, labels = batch
        yield images.to(device, non_blocking=True).float() / 255, labels.to(device, non_blocking=True)


def timm_name(name):
    """The full timm name of an encoder. Raises SystemExit for one that timm does not know."""
    full = ALIASES.get(name, name)
    if not timm.is_model(full) or ("." in full and not timm.models.is_model_pretrained(full)):
        raise SystemExit(f"--encoder {name}: neither one of {', '.join(ALIASES)} nor a name that timm knows")
    return full


def load_vit(name, weights, flag="--encoder"):
    """timm's ViT `name` with weights from the hub (None), from a file, or "random"; see Encoder."""
    # Hugging Face's SigLIP 2 uses the tanh form of GELU: without it latents differ by 2e-3.
    options = {"act_layer": "gelu_tanh"} if "siglip" in name else {}
    if weights not in (None, "random") and not os.path.isfile(weights):
        raise SystemExit(f"{flag}-weights {weights}: no such file (`random` for an untrained network)")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it prints every retry
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # untrained weights are the same in every script and on every rank
            if weights not in (None, "random"):
                # Without the classifier, timm loads strictly.
                state = {key: value for key, value in load_state_dict(weights).items() if key[:5] != "head."}
                options["pretrained_cfg_overlay"] = dict(state_dict=state, num_classes=0)
            vit = timm.create_model(name, pretrained=weights != "random", num_classes=0, **options)
    except Exception as error:  # timm, safetensors and the hub raise many kinds
        reason = " ".join((str(error) or type(error).__name__).split())[:200]
        problem = f"{flag}-weights {weights}: no weights of timm's {name} ({reason})"
        if not weights:
            wanted = f"model.safetensors of {timm.get_pretrained_cfg_value(name, 'hf_hub_id')}"
            problem = f"{flag} {name}: {wanted} can't be had from the Hugging Face hub ({reason})"
        raise SystemExit(f"{problem}; {flag}-weights FILE takes a local copy") from None
    if not hasattr(vit, "num_prefix_tokens") or not hasattr(vit, "set_input_size"):
        raise SystemExit(f"--encoder {name}: not a plain ViT, with patch_embed and tokens of one size")
    return vit


class Encoder(nn.Module):
    """A frozen timm ViT: images (B,3,H,W) in [0,1] -> latents (B,C,G,G) (paper section 3.1).

    The patch tokens after the final LayerNorm without its affine: each token has mean 0 and variance 1.

    Args:
        name: an alias of ALIASES, or any timm ViT by its full name with tag.
        encoder_size: pixels a side that the ViT sees; default: patch * image_size / 16.
        weights: None (hub), "random" (seeded), or a .safetensors / .pt file with timm's keys.

    Attributes: width C, grid G, encoder_size, mean and std (3,1,1).
    Raises SystemExit for an unknown name, a size that is no multiple of the patch, weights that can't be had.
    """

    def __init__(self, name, encoder_size=None, image_size=256, weights=None):
        super().__init__()
        self.vit = load_vit(timm_name(name), weights)
        patch = self.vit.patch_embed.patch_size[0]
        self.encoder_size = encoder_size or patch * image_size // 16
        if self.encoder_size % patch:
            raise SystemExit(f"--encoder-size {self.encoder_size}: no multiple of the patch size, {patch}")
        native = self.vit.pos_embed
        self.vit.set_input_size(self.encoder_size)
        if self.vit.pretrained_cfg.get("tag") == "mae":  # timm antialiases, Hugging Face's MAE: 0.05 apart
            grid = self.vit.patch_embed.grid_size
            position = resample_abs_pos_embed(native, grid, num_prefix_tokens=1, antialias=False)
            self.vit.pos_embed = nn.Parameter(position)

        self.width, self.grid = self.vit.embed_dim, self.encoder_size // patch
        eps = getattr(self.vit.norm, "eps", 1e-6)
        self.vit.norm = nn.LayerNorm(self.width, eps, elementwise_affine=False)
        for key in ("mean", "std"):
            self.register_buffer(key, torch.tensor(self.vit.pretrained_cfg[key]).view(3, 1, 1))
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, x):
        if x.shape[-2:] != (self.encoder_size, self.encoder_size):
            x = F.interpolate(x, size=self.encoder_size, mode="bicubic", align_corners=False)
        tokens = self.vit.forward_features((x - self.mean) / self.std)  # (B, prefix + N, C)
        tokens = tokens[:, self.vit.num_prefix_tokens :]  # (B,N,C) class and registers dropped
        return tokens.float().mT.unflatten(2, (self.grid, self.grid))  # (B,C,G,G)


def latent_statistics(encoder, data, num, batch_size, precision="bf16", workers=0, rank=0, world=1):
    """Mean and population variance, each (C,G,G), of the latents of `num` images and their mirrors.

    The images are drawn evenly. Exact: float64 sums in one pass, added over the ranks. (The released code
    keeps a momentum-0.1 running average, which depends on order and batch size.)
    """
    device = encoder.mean.device
    total = torch.zeros(2, encoder.width, encoder.grid, encoder.grid, dtype=torch.float64, device=device)
    order = even_order(len(data), num, max(1, batch_size // world), rank, world)
    batches = load_images(data, order, device, workers)
    for images, _ in tqdm(batches, total=len(order), desc="latent statistics", disable=rank > 0):
        for view in (images, images.flip(-1)):
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                z = encoder(view).double()  # (B,C,G,G)
            total += torch.stack([z.sum(0), z.square().sum(0)])
    if world > 1:
        dist.all_reduce(total)
    mean, square = total / (2 * num)
    return mean.float(), (square - mean.square()).float()


def read_weights(path, hint=""):
    """The dict in a .safetensors or .pt file, read without running code. Raises SystemExit for others."""
    try:
        if path.endswith(".safetensors"):
            return load_file(path)
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except FileNotFoundError:
        raise SystemExit(f"{path}: no such file{hint}") from None
    except Exception as error:  # torch and safetensors raise many kinds
        raise SystemExit(f"{path}: not a weights file ({type(error).__name__}){hint}") from None


def load_statistics(path, latent_shape):
    """Reads {"mean", "var"}, each (C,G,G); None, as in released files, or a missing var mean 0 and 1."""
    file = read_weights(path)
    tensors = [file.get(key) is None or torch.is_tensor(file[key]) for key in ("mean", "var")]
    if "mean" not in file or not all(tensors):
        raise SystemExit(f"--stats {path}: no latent statistics; `rae_encoder.py --out FILE` writes them")
    mean = torch.zeros(*latent_shape) if file["mean"] is None else file["mean"].float()
    var = torch.ones(*latent_shape) if file.get("var") is None else file["var"].float()
    if [*mean.shape] != [*latent_shape] or mean.shape != var.shape:
        raise SystemExit(f"--stats {path}: of latents {[*mean.shape]}, these are {[*latent_shape]}")
    return mean, var


def keep_freed_memory():
    """glibc gives large blocks back at every free; new pages cost a CPU 10 to 20 % of a training step."""
    if sys.platform == "linux":
        ctypes.CDLL(None).mallopt(-1, 2**29)  # M_TRIM_THRESHOLD
        ctypes.CDLL(None).mallopt(-3, 2**31 - 1)  # M_MMAP_THRESHOLD


def common_parser(description):
    """A parser with the flags of every stage that trains or encodes; defaults are in the scripts' presets."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=raw, allow_abbrev=False)
    add = parser.add_argument
    add("--preset", default="demo", choices=PRESETS, help="the defaults of all other flags")
    add("--data", help="folder or .tar of class folders")
    add("--image-size", type=int, help="pixels a side")
    add("--encoder", help=f"{', '.join(ALIASES)}, or any timm ViT by its full name")
    add("--encoder-weights", help="file with timm's keys, or `random`; default: the hub")
    add("--encoder-size", type=int, help="pixels a side for the encoder; default patch * image size / 16")
    add("--batch-size", type=int, help="images a step, over all ranks and micro-batches")
    add("--precision", choices=["bf16", "fp32"], help="bf16 is autocast over fp32 weights")
    add("--workers", type=int, help="image loading processes of a rank")
    add("--skip-broken", action="store_true", help="replace broken images by others and count them")
    add("--seed", type=int, help="of every random number")
    return parser


def training_parser(description):
    """common_parser with the flags that both trainings take."""
    parser = common_parser(description)
    add = parser.add_argument
    add("--accum", type=int, help="micro-batches a step")
    add("--epochs", type=float, help="passes over the data")
    add("--steps", type=int, help="instead of --epochs")
    add("--lr", type=float, help="AdamW's learning rate")
    add("--final-lr", type=float, help="where its decay ends")
    add("--ema", type=float, help="decay of the averaged weights, a step")
    add("--checkpoint-activations", action="store_true", help="less memory for one more forward pass")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile; default: with CUDA")
    add("--out", help="run folder: last.pt, metrics.jsonl, preview-*.png")
    add("--init", help="weights that a new run starts from: a checkpoint or a released file")
    add("--resume", help="checkpoint to go on from; default: last.pt of the run folder, if it is there")
    for event in ("log", "preview", "save"):
        add(f"--{event}-every", type=int, help="steps; of previews 0 is off")
    add("--keep-every", type=int, help="steps between numbered copies that stay; a multiple of --save-every")
    return parser


def parse_with_presets(parser, presets, argv):
    """Flags over the defaults of their preset. Raises SystemExit for values that can't be meant."""
    given = parser.parse_known_args(argv)[0]
    parser.set_defaults(**presets[given.preset])
    if given.preset == "demo" and given.encoder not in (None, DEMO["encoder"]):
        parser.set_defaults(encoder_weights=None, encoder_size=None)  # those are of the demo's own encoder
    args = parser.parse_args(argv)
    if not args.data:
        raise SystemExit(f"--preset {args.preset} needs --data DIR")
    positive = "image_size encoder_size patch_size batch_size accum epochs steps shift stats_images num width"
    positive += " depth heads head_width head_depth head_heads decay_epochs log_every save_every eval_every"
    for flag, value in vars(args).items():
        least = "more than 0" if flag in positive.split() else "0 or more"
        if isinstance(value, int | float) and not (0 <= value < math.inf and (value or least[0] == "0")):
            raise SystemExit(f"--{flag.replace('_', '-')} {value}: expected {least}")
    if getattr(args, "ema", 0) >= 1:
        raise SystemExit(f"--ema {args.ema}: expected less than 1")
    if getattr(args, "keep_every", None) and args.keep_every % args.save_every:
        raise SystemExit(f"--keep-every {args.keep_every} is no multiple of --save-every {args.save_every}")
    return args


def parse_args(argv=None):
    parser = common_parser(__doc__)
    parser.add_argument("--num", type=int, help="images, drawn evenly; default: all")
    parser.add_argument("--out", help="file for the statistics")
    return parse_with_presets(parser, PRESETS, argv)


def main(argv=None):
    args = parse_args(argv)
    keep_freed_memory()
    rank, world, local = (int(os.environ.get(key, 0)) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    world = max(1, world)
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    data = ImageData(args.data, args.image_size, skip_broken=args.skip_broken)
    num = args.num or len(data)
    if not 2 <= num <= len(data):
        raise SystemExit(f"--num {num}: {args.data} has {len(data)} images, and statistics need two")
    folder = os.path.join(os.path.dirname(os.path.abspath(args.out)), "")
    if os.path.isdir(args.out) or not os.access(folder, os.W_OK):
        raise SystemExit(f"--out {args.out}: not a file in a folder that is there and can be written into")
    encoder = Encoder(args.encoder, args.encoder_size, args.image_size, args.encoder_weights).to(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    if rank == 0:
        demo = "The demo: its numbers compare with nothing. " if args.data == DEMO["data"] else ""
        what = f"{num} images of {args.data}; {args.encoder}; {world} x {device.type}, {args.precision}"
        print(demo + what, file=sys.stderr)
    how = (args.batch_size, args.precision, args.workers, rank, world)
    mean, var = latent_statistics(encoder, data, num, *how)
    broken = data.broken.to(device).int()
    if world > 1:
        dist.all_reduce(broken)
    if rank == 0:
        torch.save({"mean": mean.cpu(), "var": var.cpu()}, args.out + ".tmp")
        os.replace(args.out + ".tmp", args.out)
        replaced = f"; {broken.count_nonzero()} broken images were replaced by others" * bool(broken.any())
        print(f"{args.out}: mean and variance of {num} images, {[*mean.shape]}{replaced}", file=sys.stderr)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
