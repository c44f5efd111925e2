"""Stage 1 of RAE: train a ViT decoder that turns the frozen encoder's latents back into images.

Zheng et al. 2025, Diffusion Transformers with Representation Autoencoders, arXiv 2510.11690, sections 3, 4.3.
L1, LPIPS and a GAN; noise on the latents, so that the decoder forgives what stage 2 will generate.

    torchrun rae_decoder_train.py                        # the demo: a minute on a laptop's CPU
    torchrun rae_decoder_train.py --data my_images       # 64 px, without GAN
    torchrun --nproc_per_node 8 rae_decoder_train.py --preset imagenet256 --data imagenet/train

Letters in shapes: B batch, C token width, G tokens a side, N = G*G, W decoder width, p patch, S image size.
"""

import argparse
import copy
import hashlib
import importlib.util
import json
import math
import os
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path

import lpips
import numpy as np
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint as recompute
from torchvision.utils import save_image
from tqdm import tqdm

import rae_encoder
from rae_encoder import (
    DEMO,
    RAEV2,
    SMALL,
    Encoder,
    ImageData,
    amount,
    compile_blocks,
    count,
    difference,
    even_order,
    exact_fp32,
    fraction,
    load_images,
    read_weights,
    reason,
    training_order,
    write_file,
)

# The release has no small decoders: ViT-mini and ViT-S are for small images.
#              width  depth  heads  MLP
DECODERS = {
    "ViT-mini": (256, 6, 4, 1024),
    "ViT-S": (384, 12, 6, 1536),
    "ViT-B": (768, 12, 12, 3072),
    "ViT-L": (1024, 24, 16, 4096),
    "ViT-XL": (1152, 28, 16, 4096),
}
# Parts of names in other files, and what they are here: of torch.compile, DDP and diffusers' decoder
RELEASED = {
    "_orig_mod.": "",
    "module.": "",
    "attention.to_q.": "attention.attention.query.",
    "attention.to_k.": "attention.attention.key.",
    "attention.to_v.": "attention.attention.value.",
    "attention.to_out.0.": "attention.output.dense.",
}
# The same of the authors' discriminator: a residual module around `fn`, PyTorch's older spectral norm
HEADS = {
    "heads.": "",
    ".fn.": ".",
    "weight_orig": "parametrizations.weight.original",
    "weight_u": "parametrizations.weight.0._u",
    "weight_v": "parametrizations.weight.0._v",
}
FORMAT = "rae-decoder/1"  # of the checkpoints
PRESETS = {
    "demo": DEMO
    | {
        "decoder": "ViT-mini",
        "noise_tau": 0.2,
        "lpips_weight": 0,  # half of the time, and of an untrained network at that
        "gan_weight": 0,
        "batch_size": 32,
        "epochs": 4,
        "lr": 1e-3,
        "ema": 0.99,
        "log_every": 20,
        "eval_every": 100,
        "preview_every": 100,
        "save_every": 100,
    },
    "small": SMALL
    | {
        "decoder": "ViT-S",
        "gan_weight": 0,
        "batch_size": 16,
        "steps": 800,
        "warmup_epochs": None,
        "lr": 1e-3,
        "ema": 0.99,
        "log_every": 20,
        "eval_every": 200,
        "preview_every": 100,
        "save_every": 100,
    },
    "imagenet256": {"epochs": 16},
    # Four micro-batches, so that eight GPUs of 80 GB hold them with the GAN.
    "imagenet512": {"epochs": 16, "accum": 4, "image_size": 512},
    "raev2": RAEV2 | {"epochs": 16},
}


def parse_args(argv=None):
    parser, training = rae_encoder.training_parser(__doc__, PRESETS)
    parser.set_defaults(batch_size=512, out="runs/decoder")
    add = training.add_argument
    add("--ema", type=fraction, default=0.9978, help="decay of the averaged weights, a step (%(default)s)")
    add("--warmup-epochs", type=amount, default=1, help="linear warm-up of the learning rate (%(default)s)")
    add("--noise-tau", type=amount, default=0.8, help="strength of the latent noise (%(default)s)")
    laws = "sigma ~ U(0, tau), released, or |N(0, tau^2)|, the paper's (%(default)s)"
    add("--noise-law", choices=["uniform", "half-normal"], default="uniform", help=laws)
    add("--layer-subsets", action="store_true", help="average random subsets of --layers (FuseReg)")
    add("--lpips-weight", type=amount, default=1.0, help="0 goes without LPIPS (%(default)s)")
    add("--lpips-weights", default="hub", help="VGG-16: hub, random, or a file (%(default)s)")
    add("--gan-weight", type=amount, default=0.75, help="0 goes without GAN (%(default)s)")
    add(
        "--disc-weights",
        metavar="FILE",
        help="DINO ViT-S/8 with timm's keys, `random`, or the authors' heads; default: the hub's",
    )
    add(
        "--disc-start", type=amount, default=6, help="epoch from which the discriminator learns (%(default)s)"
    )
    add(
        "--gan-start",
        type=amount,
        default=8,
        help="epoch from which the decoder learns from it (%(default)s)",
    )

    add = parser.add_argument_group("decoder").add_argument
    add("--decoder", type=decoder_name, default="ViT-XL", help=f"{', '.join(DECODERS)} (%(default)s)")
    add("--patch-size", type=count, help="pixels a side of a token; default: image size / tokens a side")

    add = parser.add_argument_group("evaluation").add_argument
    add("--eval-data", metavar="DIR", help="held-out images for PSNR, LPIPS and the preview")
    add("--eval-every", type=count, default=2500, help="steps (%(default)s)")

    args = rae_encoder.parse_with_preset(parser, PRESETS, argv)
    if args.gan_weight and args.gan_start < args.disc_start:
        raise SystemExit(f"--gan-start {args.gan_start} is before --disc-start {args.disc_start}")
    if args.layer_subsets and not args.layers:
        raise SystemExit("--layer-subsets: of what? It needs --layers")
    if args.keep_every and args.keep_every % args.save_every:
        raise SystemExit(f"--keep-every {args.keep_every} is no multiple of --save-every {args.save_every}")
    return args


def decoder_name(text):
    """An argparse type: a row of DECODERS, in any case."""
    # Of the table's spelling, since checkpoints keep the name.
    for name in DECODERS:
        if name.lower() == text.lower():
            return name
    raise argparse.ArgumentTypeError(f"{text}: not one of {', '.join(DECODERS)}")


# The decoder


def sincos_position(width, grid):
    """Fixed 2-D position embedding (1, N, width) in fp32 for N = grid * grid tokens, row by row, as in MAE.

    The first half of the channels encodes the column, the last the row. Each half is [sin, cos] of the index
    times omega_k = 10000^(-k / (width / 4)), computed in float64.
    """
    omega = 10000.0 ** (-torch.arange(width // 4).double() / (width / 4))
    index = torch.arange(grid)
    position = torch.cartesian_prod(index, index).flip(1)  # (N, 2) column, row
    angle = position[:, :, None] * omega  # (N, 2, width / 4)
    embedding = torch.cat([angle.sin(), angle.cos()], dim=2)  # (N, 2, width / 2)
    return embedding.flatten(1).float()[None]


def dense(*sizes):
    return nn.ModuleDict({"dense": nn.Linear(*sizes)})


class Block(nn.Module):
    """A pre-LN transformer block (B, 1 + N, W); nested so that its state dict has the released names."""

    def __init__(self, width, heads, mlp):
        super().__init__()
        self.heads = heads
        projections = nn.ModuleDict({name: nn.Linear(width, width) for name in ("query", "key", "value")})
        self.attention = nn.ModuleDict({"attention": projections, "output": dense(width, width)})
        self.intermediate = dense(width, mlp)
        self.output = dense(mlp, width)
        self.layernorm_before = nn.LayerNorm(width, eps=1e-12)
        self.layernorm_after = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x):
        h = self.layernorm_before(x)
        q, k, v = (
            projection(h).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, heads, 1 + N, W/heads)
            for projection in self.attention["attention"].values()
        )
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, 1 + N, W)
        x = x + self.attention["output"]["dense"](h)
        h = F.gelu(self.intermediate["dense"](self.layernorm_after(x)))
        return x + self.output["dense"](h)


class Decoder(nn.Module):
    """ViT decoder: un-normalised latents (B,C,g,g) -> images (B,3,S,S) in about [0,1] (section 3.2).

    Args:
        name: a row of DECODERS.
        channels: C.
        grid: G, to which latents of another grid are interpolated.
        patch_size: p = S / G.
        mean, std: of the encoder, three numbers each: the decoder works on normalised pixels.

    checkpoint_activations = True trades time for memory in training.
    """

    def __init__(self, name, channels, grid, patch_size, mean, std):
        super().__init__()
        width, depth, heads, mlp = DECODERS[name]
        self.grid = grid
        self.patch_size = patch_size
        self.checkpoint_activations = False
        self.decoder_embed = nn.Linear(channels, width)
        self.trainable_cls_token = nn.Parameter(torch.zeros(1, 1, width))
        position = F.pad(sincos_position(width, grid), (0, 0, 1, 0))  # (1, 1 + N, W), 0 for the class token
        self.register_buffer("decoder_pos_embed", position)
        self.decoder_layers = nn.ModuleList(Block(width, heads, mlp) for _ in range(depth))
        self.decoder_norm = nn.LayerNorm(width, eps=1e-12)
        self.decoder_pred = nn.Linear(width, patch_size**2 * 3)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, z):
        # Tokens in the decoder's width, on the decoder's grid
        x = self.decoder_embed(z.flatten(2).mT)  # (B, g*g, W)
        if z.shape[-1] != self.grid:
            x = x.mT.unflatten(2, z.shape[-2:])  # (B, W, g, g)
            x = F.interpolate(x, size=self.grid, mode="bilinear").flatten(2).mT  # (B, N, W)
        # MAE's decoder has a class token; its output is dropped.
        x = torch.cat([self.trainable_cls_token.expand(len(x), -1, -1), x], dim=1)  # (B, 1 + N, W)
        x = x + self.decoder_pos_embed
        for block in self.decoder_layers:
            if self.checkpoint_activations:
                x = recompute(block, x, use_reentrant=False, preserve_rng_state=False)  # blocks draw nothing
            else:
                x = block(x)
        # Each token is a patch of pixels, in the encoder's normalisation.
        x = self.decoder_pred(self.decoder_norm(x))[:, 1:].float()  # (B, N, p*p*3)
        x = x.unflatten(1, (self.grid, self.grid)).unflatten(3, (self.patch_size, self.patch_size, 3))
        x = torch.einsum("bhwpqc->bchpwq", x).flatten(4, 5).flatten(2, 3)  # (B, 3, S, S)
        return x * self.std + self.mean


def load_decoder(path, encoder="dinov2-base", flag="--decoder", raw_pixels=False):
    """(Decoder in eval mode, config) from this project's checkpoint (its EMA) or from the authors' files.

    Theirs tell the sizes by their shapes and have config {}; the pixels' mean and std are then those of
    `encoder`, or with raw_pixels 0 and 1, as in RAEv2. A folder in diffusers' format has a config
    (rae_encoder.read_autoencoder); from 16 x 16 tokens the images are diffusers', from others not: theirs
    stretch the positions of any grid to 16 x 16. Raises SystemExit for any other file.
    """
    file = read_weights(path, flag)
    if file.get("format") == "rae-flow/1":
        raise SystemExit(f"{flag} {path}: is a flow of flow_train.py, not a decoder")
    if file.get("format") == FORMAT and file.keys() >= {"config", "ema", "args"}:
        state = file["ema"]
        sizes = file["config"]["decoder"]
        config = rae_encoder.complete(file["args"] | file["config"])
    else:
        state = released_state(file)
        config = file["config"] if "sizes" in file else {}  # of diffusers' format
        sizes = released_sizes(state, encoder, f"{flag} {path}") | file.get("sizes", {})
        heads = DECODERS[sizes["name"]][2]
        if config.get("heads", heads) != heads:
            raise SystemExit(f"{flag} {path}: has {config['heads']} heads, a {sizes['name']} {heads}")
        if raw_pixels:
            sizes = sizes | {"mean": [0.0] * 3, "std": [1.0] * 3}

    decoder = Decoder(**sizes)
    # Released files may leave these two out.
    fixed = {
        "decoder_pos_embed": decoder.decoder_pos_embed,
        "trainable_cls_token": decoder.trainable_cls_token,
    }
    try:
        decoder.load_state_dict(fixed | state)
    except RuntimeError as error:
        raise SystemExit(f"{flag} {path}: not a decoder, ours or released ({reason(error)})") from None
    return decoder.eval(), config


def released_state(file):
    """The decoder's state dict in a file of the authors: bare, one level down, or beside its encoder's."""
    for level in ("ema", "model", "module", "state_dict"):
        if isinstance(file.get(level), dict):
            file = file[level]
    state = rename(file, RELEASED)
    inner = {key.removeprefix("decoder."): state[key] for key in state if key.startswith("decoder.")}
    return inner or state


def rename(state, names):
    """The dict `state` with parts of its keys replaced as names = {old: new} says."""
    for old, new in names.items():
        state = {key.replace(old, new): value for key, value in state.items()}
    return state


def released_sizes(state, encoder, name):
    """The keyword arguments of Decoder that a bare state dict implies by its shapes."""
    for key in ("decoder_embed.weight", "decoder_pred.weight"):
        if key not in state:
            raise SystemExit(f"{name}: not a decoder, ours or released (it has no {key})")
    width, channels = state["decoder_embed.weight"].shape
    names = [known for known, sizes in DECODERS.items() if sizes[0] == width]
    if not names:
        raise SystemExit(f"{name}: not a decoder, ours or released (none has the width {width})")
    # Only the grid must be guessed where a file leaves the positions out.
    position = state.get("decoder_pos_embed", torch.empty(1, 257))  # 16 x 16, as all 256 px releases
    pixels = timm.get_pretrained_cfg(rae_encoder.timm_name(encoder))
    return {
        "name": names[0],
        "channels": channels,
        "grid": math.isqrt(position.shape[1] - 1),
        "patch_size": math.isqrt(len(state["decoder_pred.weight"]) // 3),
        "mean": pixels.mean,
        "std": pixels.std,
    }


# What the decoder is compared by: LPIPS and the discriminator

VGG = "https://download.pytorch.org/models/vgg16-397923af.pth"  # the digits begin its SHA-256


def perceptual_loss(weights):
    """LPIPS on VGG-16 (Zhang et al. 2018) of images in [-1,1].

    weights: "hub" (torchvision's), "random" or a file. Raises SystemExit where they can't be fetched or read.
    """
    warnings.filterwarnings("ignore", module="torchvision")  # lpips calls it by deprecated names
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # untrained weights are the same in every run: their distances compare
        network = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    if weights != "random":
        # lpips would read them through torchvision, which would run code that is in the file.
        file = fetch_vgg() if weights == "hub" else weights
        state = read_weights(file, "--lpips-weights")
        names = {key: "features." + key.split(".", 1)[1] for key in network.net.state_dict()}
        if not set(names.values()) <= state.keys():
            raise SystemExit(f"--lpips-weights {file}: not torchvision's VGG-16")
        network.net.load_state_dict({key: state[name] for key, name in names.items()})
    # Channels-last convolutions are a third faster on CPUs.
    return network.requires_grad_(False).to(memory_format=torch.channels_last)


def fetch_vgg():
    """The path of torchvision's VGG-16 in torch's cache, fetched where it is missing, its hash checked."""
    path = Path(torch.hub.get_dir(), "checkpoints", Path(VGG).name)
    prefix = VGG[-12:-4]
    hint = "--lpips-weights FILE takes a local copy, --lpips-weight 0 goes without"
    if not path.is_file():
        print(f"fetching {VGG}", file=sys.stderr)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(VGG, path, hash_prefix=prefix)
        except (OSError, RuntimeError) as error:  # no network, no room; another hash
            raise SystemExit(f"LPIPS needs {VGG} as {path} ({reason(error)}); {hint}") from None
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if not digest.startswith(prefix):
        raise SystemExit(f"{path}: damaged, its SHA-256 does not begin with {prefix}; remove it")
    return path


class Discriminator(nn.Module):
    """Images (B,3,S,S) in [-1,1] -> logits (B, 5*784), one for each head and token (after Sauer et al. 2023).

    Heads on the patch tokens of a frozen DINO ViT-S/8: after the last block, then after blocks 3, 6, 9, 12.
    weights: None (hub), "random", or a .safetensors / .pt file with timm's keys, or with trained heads of the
    authors, whose ViT is then the hub's. Raises SystemExit for other heads.
    """

    def __init__(self, weights=None):
        super().__init__()
        trained = trained_heads(weights)
        vit = None if trained else weights
        self.vit = rae_encoder.load_vit("vit_small_patch8_224.dino", vit, "--disc").requires_grad_(False)
        for block in self.vit.blocks:
            block.mlp.act = nn.GELU("tanh")  # as released
        self.heads = nn.ModuleList(disc_head(self.vit.embed_dim) for _ in range(5))
        if trained:
            try:
                self.heads.load_state_dict(trained)
            except RuntimeError as error:
                raise SystemExit(f"--disc-weights {weights}: other heads ({reason(error)})") from None
        for key in ("mean", "std"):
            self.register_buffer(key, torch.tensor(self.vit.pretrained_cfg[key]).view(3, 1, 1))

    def forward(self, x):
        x = F.interpolate(x, size=224, mode="bilinear")  # (B, 3, 224, 224)
        x = (x / 2 + 0.5 - self.mean) / self.std
        features = self.vit.forward_intermediates(x, [2, 5, 8, 11], output_fmt="NLC", intermediates_only=True)
        # A head reads every token, so each image has as many verdicts as tokens and heads.
        logits = []
        with torch.autocast(x.device.type, enabled=False):  # spectral norm iterates in fp32
            for head, tokens in zip(self.heads, features[-1:] + features, strict=True):
                first, second, last = head
                h = first(tokens.float().mT)  # (B, 384, 784)
                h = (h + second(h)) / math.sqrt(2)
                logits.append(last(h).flatten(1))  # (B, 784)
        return torch.cat(logits, dim=1)


def trained_heads(weights):
    """The state dict of the heads in the authors' checkpoint, or in a file with their keys; else {}."""
    if weights in (None, "random"):
        return {}
    file = read_weights(weights, "--disc-weights")
    file = file.get("disc") or file
    heads = {key: file[key] for key in file if key.startswith("heads.")}
    return rename(heads, HEADS)


def disc_head(width):
    def layer(size):
        convolution = nn.Conv1d(width, width, size, padding=size // 2, padding_mode="circular")
        # Over the tokens of one image, as released. The paper says batch norm.
        norm = nn.InstanceNorm1d(width, eps=1e-6, affine=True)
        return nn.Sequential(spectral_norm(convolution), norm, nn.LeakyReLU(0.2))

    return nn.ModuleList([layer(1), layer(9), spectral_norm(nn.Conv1d(width, 1, 1))])


def diff_augment(x, u=None):
    """Differentiable augmentation of images (B,3,S,S) in [-1,1], each with its own draw (Zhao et al. 2020).

    u: (B,5) uniform in [0,1), drawn if not given: moves of up to S/8 whole pixels, brightness
    +-0.5, saturation times 0 to 2, contrast times 0.5 to 1.5. 0.5 throughout changes nothing.
    """
    if u is None:
        u = torch.rand(len(x), 5, device=x.device)
    size = x.shape[-1]
    reach = round(size / 8)

    # A window of the padded image
    first = (u[:, :2] * (2 * reach + 1)).long()  # (B, 2) its first row and column
    rows, columns = (first[..., None] + torch.arange(size, device=x.device)).unbind(1)  # (B, S) each
    x = F.pad(x, [reach] * 4)
    x = x.gather(2, rows[:, None, :, None].expand(-1, 3, -1, x.shape[-1]))
    x = x.gather(3, columns[:, None, None, :].expand(-1, 3, size, -1))  # (B, 3, S, S)

    # Colours: each step works on what the one before it made.
    brightness, saturation, contrast = u[:, 2:].mT[..., None, None, None]  # (B, 1, 1, 1) each
    x = x + brightness - 0.5
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * 2 * saturation
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + (x - mean) * (contrast + 0.5)


def hinge_loss(real, fake):
    """Of the discriminator's logits (appendix)."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def adaptive_weight(reconstruction, gan, weight):
    """lambda = |grad of reconstruction| / (|grad of gan| + 1e-6) at the decoder's last weight, in [0, 1e4].

    As released, with the gradients averaged over the ranks, so that all use one lambda; the paper takes
    the gradients at the reconstruction (section 4.3).
    """
    # Both graphs are needed once more, by the step itself.
    gradients = [torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in (reconstruction, gan)]
    norms = mean_over_ranks(torch.stack(gradients)).flatten(1).norm(dim=1)
    return (norms[0] / (norms[1] + 1e-6)).clamp(0, 1e4)


# One step


def learning_rate(step, steps, warmup, lr, final_lr):
    """Linear warm-up over `warmup` steps, then a cosine that reaches final_lr at `steps`."""
    # From 1 / warmup on: a first step at 0 would do nothing.
    if step < warmup:
        return lr * (step + 1) / warmup
    return final_lr + (lr - final_lr) * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


def draw_subsets(num, layers, device):
    """Weights (num, layers) that average a random subset: uniform over sizes, then over subsets (FuseReg)."""
    size = torch.randint(1, layers + 1, (num, 1), device=device)
    place = torch.rand(num, layers, device=device).argsort(1).argsort(1)  # a permutation a row
    return (place < size) / size


def to_8_bit(images):
    """Images clamped to [0,1] and rounded, not truncated, to the 256 levels of a file."""
    return (images.clamp(0, 1) * 255).round() / 255


def decoder_step(
    model,
    optimizer,
    images,
    z,
    perceptual,
    disc,
    *,
    noise_tau,
    noise_law="uniform",
    lpips_weight,
    gan_weight,
    accum,
    precision,
):
    """One update by images (B,3,S,S) in [0,1] and latents (B,C,G,G) in `accum` micro-batches.

    loss = L1 + lpips_weight LPIPS + gan_weight lambda GAN (section 4.3), without what is None of
    perceptual and disc. L1 + LPIPS is that of one large batch; lambda is of each micro-batch, as released.
    Returns ({term: its mean over micro-batches and ranks}, finite); where loss or gradients are not finite
    nothing is updated.
    """
    # Each image its own sigma: U(0, tau) as released, or |N(0, tau^2)| as the paper writes.
    draw = torch.rand if noise_law == "uniform" else torch.randn
    sigma = noise_tau * draw(len(z), 1, 1, 1, device=z.device).abs()
    z = z + sigma * torch.randn_like(z)
    u = torch.rand(len(z), 5, device=z.device)
    last_weight = getattr(model, "module", model).decoder_pred.weight
    terms = {}
    optimizer.zero_grad()
    for k, (x, z_k, u_k) in enumerate(zip(images.chunk(accum), z.chunk(accum), u.chunk(accum), strict=True)):
        model.require_backward_grad_sync = k == accum - 1  # DDP exchanges gradients once a step
        with torch.autocast(z.device.type, torch.bfloat16, enabled=precision == "bf16"):
            xhat = model(z_k)  # (B / accum, 3, S, S)
            parts = {"l1": (xhat - x).abs().mean()}
            loss = parts["l1"]
            if perceptual:
                parts["lpips"] = perceptual(2 * xhat - 1, 2 * x - 1).float().mean()
                loss = loss + lpips_weight * parts["lpips"]
            if disc:
                parts["gan"] = -disc(diff_augment(2 * xhat - 1, u_k)).mean()
                parts["lambda"] = adaptive_weight(loss, parts["gan"], last_weight)
                loss = loss + gan_weight * parts["lambda"] * parts["gan"]
        (loss / accum).backward(inputs=list(model.parameters()))  # not into the discriminator
        parts["loss"] = loss
        # Means over the micro-batches, for the log
        for name, value in parts.items():
            terms[name] = terms.get(name, 0) + value.detach() / accum
    return update(optimizer, terms)


def disc_step(model, optimizer, images, z, decoder, accum, precision):
    """One update of the discriminator by images and by fakes from latents without noise.

    Returns (loss, finite), as decoder_step does.
    """
    u = torch.rand(len(z), 2, 5, device=z.device)  # real and fake have their own draws
    total = 0
    optimizer.zero_grad()
    for k, (x, z_k, u_k) in enumerate(zip(images.chunk(accum), z.chunk(accum), u.chunk(accum), strict=True)):
        model.require_backward_grad_sync = k == accum - 1
        model.train(k == 0)  # in train mode alone spectral norm iterates: once a step
        with torch.autocast(z.device.type, torch.bfloat16, enabled=precision == "bf16"):
            # As the step before left the decoder, and in the levels of a file: no clue but the image.
            with torch.no_grad():
                fake = to_8_bit(decoder(z_k))
            both = 2 * torch.cat([x, fake]) - 1  # (2B / accum, 3, S, S)
            # Real and fake in one call, which DDP counts as one.
            logits = model(diff_augment(both, u_k.transpose(0, 1).flatten(0, 1)))
            loss = hinge_loss(*logits.chunk(2))
        (loss / accum).backward()
        total += loss.detach() / accum
    model.eval()
    terms, finite = update(optimizer, {"disc": total})
    return terms["disc"], finite


def update(optimizer, terms):
    """Steps where terms and gradients are finite on all ranks; returns (terms over the ranks, finite)."""
    values = mean_over_ranks(torch.stack(list(terms.values())))
    terms = dict(zip(terms, values, strict=True))
    weights = optimizer.param_groups[0]["params"]
    # Equal on all ranks, since DDP has averaged the gradients: they decide alike.
    norm = nn.utils.get_total_norm([weight.grad for weight in weights])
    finite = bool(torch.isfinite(values.sum() + norm))
    if finite:
        optimizer.step()
    return terms | {"gradient_norm": norm}, finite


# Evaluation


@torch.no_grad()
@exact_fp32()
def evaluate(decoder, encoder, perceptual, data, workers, rank=0, world=1, batch_size=32):
    """Means over the images of `data` of PSNR in dB on 8-bit pixels and, where it is trained with, LPIPS.

    In fp32 whatever --precision says: the numbers are the same for any batch size and number of ranks.
    """
    device = encoder.mean.device
    psnr = []
    distances = []
    order = even_order(len(data), len(data), batch_size, rank, world)
    for x, _ in load_images(data, order, device, workers):
        xhat = to_8_bit(decoder(encoder(x)))
        psnr += (-10 * (xhat - x).square().mean((1, 2, 3)).log10()).tolist()
        if perceptual:
            distances += perceptual(2 * xhat - 1, 2 * x - 1).flatten().tolist()

    # In float64, which mps does not have, so only where ranks exchange it on the device.
    totals = torch.tensor([sum(psnr), sum(distances)], dtype=torch.float64)
    if world > 1:
        totals = totals.to(device)
        dist.all_reduce(totals)
    psnr, distance = (totals / len(data)).tolist()
    return {"eval_psnr": psnr, "eval_lpips": distance} if perceptual else {"eval_psnr": psnr}


def report_scores(log, progress, step, scores):
    if log:
        write_log(log, step, scores)
        values = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
        progress.write(f"step {step}: {values}", file=sys.stderr)


@torch.no_grad()
def save_preview(folder, step, log, decoder, encoder, images):
    """preview-STEP.png with the originals (B,3,S,S) over their reconstructions."""
    # Of the EMA, in fp32: what a user of the checkpoint will see
    rows = torch.cat([images, decoder(encoder(images))])  # (2B, 3, S, S)
    path = f"{folder}/preview-{step:07d}.png"
    try:
        write_file(path, lambda file: save_image(to_8_bit(rows), file, "PNG", nrow=len(images), padding=0))
        log_picture(log, step, path)
    except SystemExit as error:
        tqdm.write(f"no preview: {error}; training goes on", file=sys.stderr)


# ---- What any training needs: the same words in rae_decoder_train.py and flow_train.py ----


def mean_over_ranks(values):
    """The tensor `values`, averaged in place over the ranks."""
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


def any_rank(flag, device):
    """Whether `flag` is true on any rank: a signal reaches them one by one, but they must leave together."""
    # One process has nobody to ask, and a GPU nothing to wait for.
    if not dist.is_initialized():
        return flag
    return mean_over_ranks(torch.tensor(float(flag), device=device)).item() > 0


def catch_signals():
    """A list that SIGTERM and Ctrl-C fill from here on, so that the step that is running comes to its end."""
    signals = []
    # SIGTERM is what torchrun and job schedulers send.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: signals.append(number))
    return signals


def plan_steps(images, args, world):
    """(steps an epoch, steps of the run). Raises SystemExit for a batch that images or ranks don't fill."""
    batch_size = args.batch_size
    if images < batch_size:
        raise SystemExit(f"--data {args.data}: {images} images, fewer than --batch-size {batch_size}")
    if batch_size % (world * args.accum):
        raise SystemExit(f"--batch-size {batch_size} is no multiple of {world} ranks x {args.accum} --accum")
    # What does not fill a batch is left out of the epoch, other images each time.
    steps_per_epoch = images // batch_size
    return steps_per_epoch, args.steps or max(1, round(args.epochs * steps_per_epoch))


def parallel(network, blocks, compile, device):
    """The network as it is trained: its blocks compiled, and in DDP."""
    compile_blocks(blocks, compile, device)
    return DistributedDataParallel(network, broadcast_buffers=False) if dist.is_initialized() else network


def adamw(network, lr):
    """The paper's AdamW (appendix); fused: one kernel for all weights."""
    # Stage 2's fixed position embeddings are among them, as released: without a gradient they stay.
    weights = network.parameters()
    return torch.optim.AdamW(weights, lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0, fused=True)


def seed_step(seed, step, rank):
    """The random numbers of a step depend on (seed, step, rank) alone, so a resumed run repeats them."""
    # SeedSequence mixes: neighbouring steps and ranks have nothing in common.
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0]))


def set_learning_rate(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


@torch.no_grad()
def update_ema(ema, network, decay):
    # ema + (1 - decay) (network - ema), all weights in one call.
    torch._foreach_lerp_(list(ema.parameters()), list(network.parameters()), 1 - decay)


def report_skipped(steps, terms, progress, precision, last):
    """Says that the last of `steps` was not finite and changed nothing; ten in a row end the run."""
    step = steps[-1]
    if not progress.disable:  # rank 0
        values = ", ".join(f"{name} {value:.3g}" for name, value in terms.items())
        progress.write(f"step {step} skipped, not finite: {values}", file=sys.stderr)
    # One bad step is chance, ten are a run that has diverged: nothing good would come after them.
    if len(steps) >= 10 and steps[-10] == step - 9:
        remedy = "a lower --lr or --precision fp32" if precision == "bf16" else "a lower --lr"
        saved = f"; the last checkpoint is {last}" if os.path.exists(last) else ""
        raise SystemExit(f"step {step}: 10 steps in a row not finite; try {remedy}{saved}")


def report(log, progress, step, recent, images, since, **values):
    """Logs the mean of each term over the recent steps that have it, and images a second since `since`.

    `images` is a step's. Forgets the recent steps, and returns the time.
    """
    now = time.time()
    # A dict keeps their order; those of the GAN come in later.
    names = {name: None for terms in recent for name in terms}
    record = {}
    for name in names:
        record[name] = torch.stack([terms[name] for terms in recent if name in terms]).mean().item()
    # Everything is in that time: previews and checkpoints, too.
    record["images_per_s"] = round(len(recent) * images / (now - since), 1)
    recent.clear()
    if log:
        write_log(log, step, record | values)
    # None where every step was skipped
    progress.set_postfix(loss=record.get("loss"), images_per_s=record["images_per_s"])
    return now


def open_log(folder):
    """metrics.jsonl, locked while this process lives, and TensorBoard's writer where that is installed."""
    try:
        os.makedirs(folder, exist_ok=True)
        file = open(f"{folder}/metrics.jsonl", "a", buffering=1)  # noqa: SIM115
        # Two runs in one folder would overwrite each other. Windows has no fcntl.
        if importlib.util.find_spec("fcntl"):
            import fcntl

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of the process: forked workers don't hold it
        else:
            print(f"{folder} can't be locked on this system: start no second run in it", file=sys.stderr)
    except BlockingIOError:
        raise SystemExit(f"--out {folder}: another run is in it; stop it or name another folder") from None
    except OSError as error:
        raise SystemExit(f"--out {folder}: can't be written ({reason(error)})") from None

    # What a run that was killed was writing; the folder may hold other files of a user.
    for left in Path(folder).glob("*.[0-9]*.tmp"):
        left.unlink()
    if not importlib.util.find_spec("tensorboard"):
        return file, None
    from torch.utils.tensorboard import SummaryWriter

    return file, SummaryWriter(folder)


def write_log(log, step, record):
    # One JSON object a line, written at once: others may read along.
    file, board = log
    try:
        print(json.dumps({"step": step, "time": round(time.time(), 1)} | record), file=file)
    except OSError as error:
        raise SystemExit(f"{file.name}: can't be written ({reason(error)})") from None
    if board:
        for name, value in record.items():
            board.add_scalar(name, value, step)


def log_picture(log, step, path):
    """The PNG of a preview in TensorBoard, where that is installed."""
    board = log[1]
    if board and os.path.exists(path):
        board.add_image("preview", np.array(Image.open(path)), step, dataformats="HWC")


def resume(path, last, device, config, state, steps):
    """Loads --resume, or the run folder's last.pt if there is one, into `state`; returns its other values.

    Raises SystemExit for a checkpoint of another run.
    """
    # All ranks must decide alike: disks may show a file late.
    if not path and not any_rank(os.path.exists(last), device):
        return {"step": 0}
    source = path or last
    checkpoint = read_weights(source, "--resume")
    if checkpoint.get("format") != FORMAT or not checkpoint.keys() >= {"config", "model", "optimizer"}:
        raise SystemExit(f"--resume {source}: not a whole {FORMAT} checkpoint")
    # Older versions have a patch size, always 1, and the precision among their flags.
    theirs = checkpoint["config"]
    theirs.get("sizes", {}).pop("patch", None)
    checkpoint.setdefault("precision", checkpoint.get("args", {}).get("precision"))
    # Another network or other latents would train on from nonsense, or fail in PyTorch's words.
    key = difference(config, theirs)
    if key:
        # A list of classes is long.
        problem = f"{source} has {key} {theirs.get(key)!s:.80}, this run {config[key]!s:.80}"
        raise SystemExit(f"{problem}: same flags, or another --out")
    # Nothing to do, and no error of training either.
    if checkpoint["step"] > steps:
        problem = f"{source} is at step {checkpoint['step']}, this run ends at {steps}"
        raise SystemExit(f"{problem}: more --steps or --epochs, or another --out")
    for name, owner in state.items():
        owner.load_state_dict(checkpoint.pop(name))
    return checkpoint


def save(last, args, state, step, **rest):
    """Writes last.pt; every --keep-every steps a numbered copy is linked to it: no second write."""
    # Plain dicts of tensors, numbers and texts, so that reading one runs no code.
    states = {name: owner.state_dict() for name, owner in state.items()}
    checkpoint = {"format": FORMAT, "step": step, "args": vars(args), **states, **rest}
    write_file(last, lambda file: torch.save(checkpoint, file))
    if args.keep_every and step % args.keep_every == 0:
        numbered = Path(last).with_name(f"{step:07d}.pt")
        numbered.unlink(missing_ok=True)
        try:
            numbered.hardlink_to(last)
        except OSError:  # a disk without hard links
            shutil.copyfile(last, numbered)


def announce(log, args, data, models, network, run):
    """The first line: data, models, and how they are trained; of the rank with the log alone."""
    if not log:
        return
    demo = "The demo: its numbers compare with nothing. " if args.preset == "demo" else ""
    # Said before the first step, which may take minutes where it compiles.
    millions = sum(weight.numel() for weight in network.parameters()) / 1e6
    images = f"{len(data)} images of {data.about} in {len(data.classes)} classes"
    print(f"{demo}{images}; {models} ({millions:.1f} M parameters); {run}", file=sys.stderr)


def leave(log, progress, data, device, last, step, steps, following):
    """The last line of a run, which names the command that comes next, and the end of its process group."""
    progress.close()
    # Each rank knows of the images that it was to read.
    broken = int(mean_over_ranks(data.broken.to(device).float()).count_nonzero())
    if log:
        replaced = f"; {broken} broken images were replaced by others" if broken else ""
        end = f"next: {following} {last}"
        if step < steps:
            end = "stopped, the same command goes on from here (without --resume)"
        print(f"{last}: step {step} of {steps}{replaced}; {end}", file=sys.stderr)
    if dist.is_initialized():
        dist.destroy_process_group()


# ---- The end of the same words ----


# The run


def build(args, device):
    """(encoder, decoder, config), as the flags say. Raises SystemExit for sizes that don't fit together."""
    torch.manual_seed(args.seed)  # all ranks and runs start alike
    # With a patch twice as large, 512 px images come from the tokens of 256 px ones.
    seen = args.image_size * 16 // (args.patch_size or 16)
    encoder = Encoder(args.encoder, args.encoder_size, seen, args.encoder_weights, args.layers)
    patch = args.patch_size or args.image_size / encoder.grid
    if args.image_size % patch or patch % 1:
        problem = f"no multiple of the patch: {encoder.grid} tokens a side, patch size {patch:g}"
        raise SystemExit(f"--image-size {args.image_size}: {problem}; change one of them or --encoder-size")

    # What later stages need to know
    config = {
        "encoder": args.encoder,
        "encoder_hash": encoder.hash,
        "encoder_size": encoder.encoder_size,
        "image_size": args.image_size,
        "layers": args.layers,
        "latent_shape": [encoder.width, encoder.grid, encoder.grid],
        "decoder": {
            "name": args.decoder,
            "channels": encoder.width,
            "grid": args.image_size // int(patch),
            "patch_size": int(patch),
            "mean": encoder.mean.flatten().tolist(),
            "std": encoder.std.flatten().tolist(),
        },
        # Not needed to decode, but a run that goes on must not change it.
        "noise_tau": args.noise_tau,
        "noise_law": args.noise_law,
        "gan": args.gan_weight > 0,
    }
    decoder = Decoder(**config["decoder"])
    decoder.checkpoint_activations = args.checkpoint_activations
    if args.init:
        start = load_decoder(args.init, args.encoder, "--init")[0]
        try:
            decoder.load_state_dict(start.state_dict())
        except RuntimeError as error:
            raise SystemExit(f"--init {args.init}: of other sizes than this run ({reason(error)})") from None
    return encoder.to(device), decoder.to(device), config


def training_state(decoder, disc, lr):
    """All that changes in training, by its name in the checkpoint."""
    state = {
        "model": decoder,
        "ema": copy.deepcopy(decoder).requires_grad_(False),
        "optimizer": adamw(decoder, lr),
    }
    # Its backbone is frozen and comes from a file of its own.
    if disc:
        state["disc"] = disc.heads
        state["disc_optimizer"] = adamw(disc.heads, lr)
    return state


def open_held_out(args, data, device):
    """The images of --eval-data, and eight of them for the preview; without it those are training images."""
    if args.eval_data:
        held_out = ImageData(args.eval_data, args.image_size, None, 0, args.skip_broken, "--eval-data")
    else:
        # The same list of files, but whole images instead of random crops.
        held_out = copy.copy(data)
        held_out.augment = None
    shown, _ = next(load_images(held_out, even_order(len(held_out), 8, 8), device))
    return held_out, shown


def milestones(args, steps_per_epoch, steps):
    """The steps at which the warm-up ends, and from which discriminator and GAN loss take part."""
    warmup = steps // 20 if args.warmup_epochs is None else round(args.warmup_epochs * steps_per_epoch)
    return warmup, round(args.disc_start * steps_per_epoch), round(args.gan_start * steps_per_epoch)


def next_command(args):
    """What to type after this run, up to the name of its checkpoint."""
    # The demo has its own images.
    images = "" if args.preset == "demo" else f" --preset {args.preset} --data {args.data}"
    return f"torchrun flow_train.py{images} --decoder"


def main(argv=None):
    args = parse_args(argv)
    rank, world, device = rae_encoder.set_up(args)

    # What is trained, on what
    data = ImageData(args.data, args.image_size, "crop", args.seed, args.skip_broken)
    held_out, shown = open_held_out(args, data, device)
    steps_per_epoch, steps = plan_steps(len(data), args, world)
    log = open_log(args.out) if rank == 0 else None
    encoder, decoder, config = build(args, device)
    perceptual = perceptual_loss(args.lpips_weights).to(device) if args.lpips_weight else None
    disc = Discriminator(args.disc_weights).to(device).eval() if args.gan_weight else None
    state = training_state(decoder, disc, args.lr)

    # Where a run before this one stopped
    last = f"{args.out}/last.pt"
    start = resume(args.resume, last, device, config, state, steps)
    step = start["step"]
    precision, why = rae_encoder.choose_precision(args.precision or start.get("precision"), device)
    model = parallel(decoder, decoder.decoder_layers, args.compile, device)
    disc_model = parallel(disc, [], args.compile, device) if disc else None

    # What a user sees
    warmup, disc_start, gan_start = milestones(args, steps_per_epoch, steps)
    gan = f"GAN from step {gan_start}" if disc else "no GAN"
    models = f"{args.encoder} {config['latent_shape']} -> {args.decoder}, {gan}"
    run = f"{world} x {device.type}, {precision} ({why}); step {step} of {steps}"
    announce(log, args, data, models, decoder, run)
    progress = tqdm(total=steps, initial=step, unit="step", disable=rank > 0)

    # Train: everything that happens at a step, in the order in which it happens
    flags = ("noise_tau", "noise_law", "lpips_weight", "gan_weight", "accum")
    options = {name: getattr(args, name) for name in flags} | {"precision": precision}
    order = training_order(len(data), args.batch_size, args.seed, step, steps, rank, world)
    signals = catch_signals()
    recent = []
    skipped = []
    since = time.time()
    for images, _ in load_images(data, order, device, args.workers):
        seed_step(args.seed, step, rank)
        lr = set_learning_rate(state["optimizer"], learning_rate(step, steps, warmup, args.lr, args.final_lr))
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            subsets = draw_subsets(len(images), len(args.layers), device) if args.layer_subsets else None
            z = encoder(images, subsets)  # (B, C, G, G)
        critic = disc if step >= gan_start else None  # it must have learned first
        terms, finite = decoder_step(model, state["optimizer"], images, z, perceptual, critic, **options)
        if finite:
            update_ema(state["ema"], decoder, args.ema)
        if finite and disc and step >= disc_start:
            disc_lr = learning_rate(step - disc_start, steps, warmup, args.lr, args.final_lr)
            set_learning_rate(state["disc_optimizer"], disc_lr)
            terms["disc"], finite = disc_step(
                disc_model, state["disc_optimizer"], images, z, decoder, args.accum, precision
            )
        step += 1

        recent.append(terms if finite else {})
        if not finite:
            skipped.append(step)
            report_skipped(skipped, terms, progress, precision, last)
        stopped = any_rank(bool(signals), device)
        final = stopped or step == steps
        progress.update()
        if final or step % args.log_every == 0:
            since = report(log, progress, step, recent, args.batch_size, since, lr=lr, skipped=len(skipped))
        if args.eval_data and (step == steps or step % args.eval_every == 0):
            scores = evaluate(state["ema"], encoder, perceptual, held_out, args.workers, rank, world)
            report_scores(log, progress, step, scores)
        if rank == 0 and args.preview_every and (final or step % args.preview_every == 0):
            save_preview(args.out, step, log, state["ema"], encoder, shown)
        if rank == 0 and (final or step % args.save_every == 0):
            save(last, args, state, step, config=config, precision=precision)
        if stopped:
            break
    leave(log, progress, data, device, last, step, steps, next_command(args))


if __name__ == "__main__":
    rae_encoder.run(main)
