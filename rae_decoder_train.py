"""Stage 1 of RAE: train a ViT decoder that turns the frozen encoder's latents back into images.

Zheng et al. 2025, Diffusion Transformers with Representation Autoencoders, arXiv 2510.11690, sections 3, 4.3.
L1, LPIPS and a GAN; noise on the latents, so that the decoder forgives what stage 2 will generate.

    torchrun rae_decoder_train.py
    torchrun --nproc_per_node 8 rae_decoder_train.py --preset imagenet256 --data imagenet/train
    torchrun rae_decoder_train.py --data my_images --image-size 64 --encoder dinov2-small --decoder ViT-S

The first line is the demo: it draws its own images, has no GAN and takes minutes on a laptop's CPU.
Letters in shapes: B batch, C token width, G tokens a side, N = G*G, W decoder width, p patch, S image size.
"""

import copy
import fcntl
import importlib.util
import json
import math
import os
import signal
import sys
import time
import warnings

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
from tqdm import tqdm

import rae_encoder
from rae_encoder import DEMO, Encoder, ImageData, even_order, load_images, read_weights, training_order

#              width  depth  heads  MLP
DECODERS = {
    "ViT-mini": (256, 6, 4, 1024),
    "ViT-S": (384, 12, 6, 1536),
    "ViT-B": (768, 12, 12, 3072),
    "ViT-L": (1024, 24, 16, 4096),
    "ViT-XL": (1152, 28, 16, 4096),
}

# As released; in epochs the discriminator learns from 6 and the decoder hears it from 8 on.
IMAGENET = dict(
    encoder="dinov2-base", image_size=256, decoder="ViT-XL", noise_tau=0.8, lpips_weight=1,
    lpips_weights="hub", gan_weight=0.75, disc_start=6, gan_start=8, batch_size=512, accum=1, epochs=16,
    warmup_epochs=1, lr=2e-4, final_lr=2e-5, ema=0.9978, seed=0, precision="bf16", log_every=100,
    eval_every=2500, preview_every=2500, save_every=2500, workers=8, out="runs/decoder",
)  # fmt: skip
PRESETS = {
    "demo": IMAGENET | DEMO | dict(
        decoder="ViT-mini", noise_tau=0.2, lpips_weight=0.1, lpips_weights="random", gan_weight=0,
        disc_start=1, gan_start=2, batch_size=32, epochs=4, lr=1e-3, ema=0.99, log_every=20, eval_every=100,
        preview_every=100, save_every=100, workers=2,
    ),
    "imagenet256": IMAGENET,
    "imagenet512": IMAGENET | dict(image_size=512),
}  # fmt: skip
TERMS = ("loss", "l1", "lpips", "gan", "lambda", "disc")


def sincos_position(width, grid):
    """Fixed 2-D position embedding (1, 1 + N, width), zeros for the class token, as in MAE.

    The first half of the channels encodes the column, the last the row; omega_k = 10000^(-k / (width / 4)).
    """
    omega = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * omega
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)  # (G, W/2)
    tokens = torch.cat([axis.repeat(grid, 1), axis.repeat_interleave(grid, dim=0)], dim=1)  # (N, W)
    return F.pad(tokens, (0, 0, 1, 0)).float()[None]


def dense(*sizes):
    return nn.ModuleDict({"dense": nn.Linear(*sizes)})


class Block(nn.Module):
    """A pre-LN transformer block (B, 1 + N, W); nested so that its state dict has the released names."""

    def __init__(self, width, heads, mlp):
        super().__init__()
        self.heads = heads
        projections = nn.ModuleDict({name: nn.Linear(width, width) for name in ("query", "key", "value")})
        self.attention = nn.ModuleDict({"attention": projections, "output": dense(width, width)})
        self.intermediate, self.output = dense(width, mlp), dense(mlp, width)
        self.layernorm_before, self.layernorm_after = (nn.LayerNorm(width, eps=1e-12) for _ in range(2))

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

    name: a row of DECODERS. channels: C. grid: G, to which latents of another grid are interpolated.
    patch_size: p = S / G. mean, std: of the encoder, three numbers each: it works on normalised pixels.
    """

    recomputes = False  # its blocks in the backward pass, to save memory

    def __init__(self, name, channels, grid, patch_size, mean, std):
        super().__init__()
        if name not in DECODERS:
            raise SystemExit(f"--decoder {name}: not one of {', '.join(DECODERS)}")
        width, depth, heads, mlp = DECODERS[name]
        self.grid, self.patch_size = grid, patch_size
        self.decoder_embed = nn.Linear(channels, width)
        self.trainable_cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("decoder_pos_embed", sincos_position(width, grid))
        self.decoder_layers = nn.ModuleList(Block(width, heads, mlp) for _ in range(depth))
        self.decoder_norm = nn.LayerNorm(width, eps=1e-12)
        self.decoder_pred = nn.Linear(width, patch_size**2 * 3)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, z):
        x = self.decoder_embed(z.flatten(2).mT)  # (B, g*g, W)
        if z.shape[-1] != self.grid:
            x = F.interpolate(x.mT.unflatten(2, z.shape[-2:]), size=self.grid, mode="bilinear")
            x = x.flatten(2).mT  # (B,W,G,G) -> (B, N, W)
        x = torch.cat([self.trainable_cls_token.expand(len(x), -1, -1), x], dim=1)  # (B, 1 + N, W)
        x = x + self.decoder_pos_embed
        for block in self.decoder_layers:
            x = recompute(block, x, use_reentrant=False) if self.recomputes else block(x)
        x = self.decoder_pred(self.decoder_norm(x))[:, 1:].float()  # (B, N, p*p*3)
        x = x.unflatten(1, (self.grid, self.grid)).unflatten(3, (self.patch_size, self.patch_size, 3))
        x = torch.einsum("bhwpqc->bchpwq", x).flatten(4, 5).flatten(2, 3)  # (B, 3, S, S)
        return x * self.std + self.mean


def load_decoder(path, encoder="dinov2-base"):
    """(Decoder in eval mode, config) from this project's checkpoint (its EMA) or a released bare state dict.

    A bare file tells its sizes by its shapes and has config {}; the pixels' mean and std are then those of
    `encoder`. Raises SystemExit for any other file.
    """
    file = read_weights(path)
    try:
        if file.get("format") == "rae-decoder/1":
            decoder = Decoder(**file["config"]["decoder"])
            decoder.load_state_dict(file["ema"])
            return decoder.eval(), file["config"]
        for level in ("ema", "model", "module", "state_dict"):
            file = file.get(level, file)
        state = {key.removeprefix("module.").removeprefix("decoder."): value for key, value in file.items()}
        width, channels = state["decoder_embed.weight"].shape
        name = next(name for name, sizes in DECODERS.items() if sizes[0] == width)
        position = state.get("decoder_pos_embed", torch.empty(1, 257))  # 16 x 16, as all 256 px releases
        grid, p = math.isqrt(position.shape[1] - 1), math.isqrt(len(state["decoder_pred.weight"]) // 3)
        pixels = timm.get_pretrained_cfg(rae_encoder.timm_name(encoder))
        decoder = Decoder(name, channels, grid, p, pixels.mean, pixels.std)
        defaults = {key: getattr(decoder, key) for key in ("decoder_pos_embed", "trainable_cls_token")}
        decoder.load_state_dict(defaults | state)
    except Exception as error:  # a foreign file can break in any of these lines
        reason = " ".join(str(error).split())[:200]
        raise SystemExit(f"{path}: neither rae-decoder/1 nor a released decoder ({reason})") from None
    return decoder.eval(), {}


def perceptual_loss(weights):
    """LPIPS on VGG-16 (Zhang et al. 2018), images in [-1,1]; weights: "hub" (torchvision's) or "random"."""
    warnings.filterwarnings("ignore", module="torchvision")  # lpips calls it by deprecated names
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # untrained weights are the same in every run: their distances compare
            network = lpips.LPIPS(net="vgg", pnet_rand=weights == "random", verbose=False)
    except OSError as error:
        folder = os.path.join(torch.hub.get_dir(), "checkpoints")
        raise SystemExit(f"LPIPS needs {folder}/vgg16-397923af.pth ({error}); or --lpips-weight 0") from None
    return network.requires_grad_(False).to(memory_format=torch.channels_last)


class Discriminator(nn.Module):
    """Images (B,3,S,S) in [-1,1] -> logits (B, 5*784), one for each head and token (after Sauer et al. 2023).

    Heads on the patch tokens of a frozen DINO ViT-S/8: after the last block, then after blocks 3, 6, 9, 12.
    weights: None (hub), "random", or a .safetensors / .pt file with timm's keys.
    """

    def __init__(self, weights=None):
        super().__init__()
        self.vit = rae_encoder.load_vit("vit_small_patch8_224.dino", weights, "--disc").requires_grad_(False)
        for block in self.vit.blocks:
            block.mlp.act = nn.GELU("tanh")  # as released
        self.heads = nn.ModuleList(disc_head(self.vit.embed_dim) for _ in range(5))
        for key in ("mean", "std"):
            self.register_buffer(key, torch.tensor(self.vit.pretrained_cfg[key]).view(3, 1, 1))

    def forward(self, x):
        x = (F.interpolate(x, size=224, mode="bilinear") / 2 + 0.5 - self.mean) / self.std  # (B, 3, 224, 224)
        features = self.vit.forward_intermediates(x, [2, 5, 8, 11], output_fmt="NLC", intermediates_only=True)
        logits = []
        with torch.autocast(x.device.type, enabled=False):  # spectral norm iterates in fp32
            for (first, second, last), tokens in zip(self.heads, features[-1:] + features, strict=True):
                h = first(tokens.float().mT)  # (B, 384, 784)
                h = (h + second(h)) / math.sqrt(2)
                logits.append(last(h).flatten(1))  # (B, 784)
        return torch.cat(logits, dim=1)


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
    u = torch.rand(len(x), 5, device=x.device) if u is None else u
    size, reach = x.shape[-1], round(x.shape[-1] / 8)
    first = (u[:, :2] * (2 * reach + 1)).long()  # (B, 2) row and column of the padded image
    rows, columns = (first[..., None] + torch.arange(size, device=x.device)).unbind(1)  # (B, S) each
    x = F.pad(x, [reach] * 4)
    x = x.gather(2, rows[:, None, :, None].expand(-1, 3, -1, x.shape[-1]))
    x = x.gather(3, columns[:, None, None, :].expand(-1, 3, size, -1))  # (B, 3, S, S)
    brightness, saturation, contrast = u[:, 2:].mT[..., None, None, None]  # (B, 1, 1, 1) each
    x = x + brightness - 0.5
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * 2 * saturation
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + (x - mean) * (contrast + 0.5)


def hinge_loss(real, fake):
    """Of the discriminator's logits (appendix)."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def learning_rate(step, steps, warmup, lr, final_lr):
    """Linear warm-up over `warmup` steps, then a cosine that reaches final_lr at `steps`."""
    if step < warmup:
        return lr * (step + 1) / warmup
    return final_lr + (lr - final_lr) * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


def to_8_bit(images):
    """Images clamped to [0,1] and rounded, not truncated, to the 256 levels of a file."""
    return (images.clamp(0, 1) * 255).round() / 255


def judge(xhat, x, u, perceptual, disc):
    """L1, LPIPS and GAN loss of decoded images xhat; zero where there is no such judge."""
    lpips_loss = perceptual(2 * xhat - 1, 2 * x - 1).float().mean() if perceptual else xhat.new_zeros(())
    gan = -disc(diff_augment(2 * xhat - 1, u)).mean() if disc else xhat.new_zeros(())
    return (xhat - x).abs().mean(), lpips_loss, gan


def decoder_step(model, perceptual, disc, optimizer, images, z, args):
    """One update by images (B,3,S,S) and latents (B,C,G,G) in `accum` micro-batches; returns TERMS.

    disc None leaves the GAN out. lambda is that of the whole batch, all micro-batches and ranks: none can go
    back through the decoder before the last is judged. So the gradients at their pixels are kept, and the
    decoder alone runs again, for all but the last. (The released lambda is of one micro-batch on one rank.)
    """
    # Section 4.3, as released: sigma ~ U(0, tau) for each image. The paper writes |N(0, tau^2)|.
    z = z + args.noise_tau * torch.rand(len(z), 1, 1, 1, device=z.device) * torch.randn_like(z)
    u = torch.rand(len(z), 5, device=z.device)
    autocast = torch.autocast(z.device.type, torch.bfloat16, enabled=args.precision == "bf16")
    weight = getattr(model, "module", model).decoder_pred.weight
    losses, at_weight, waiting = 0, torch.zeros(2, *weight.shape, device=z.device), []
    optimizer.zero_grad()
    for k, (x, z_k, u_k) in enumerate(zip(*(part.chunk(args.accum) for part in (images, z, u)), strict=True)):
        # DDP exchanges gradients in the last backward pass alone.
        model.require_backward_grad_sync = k == args.accum - 1 and (args.accum == 1 or not disc)
        xhat = None  # frees the activations of the micro-batch before
        with autocast:
            xhat = model(z_k)  # (B / accum, 3, S, S)
            pixels = xhat.detach().requires_grad_()
            l1, lpips_loss, gan = judge(pixels, x, u_k, perceptual, disc)
        judged = [l1 + args.lpips_weight * lpips_loss, gan] if disc else [l1 + args.lpips_weight * lpips_loss]
        gradients = [torch.autograd.grad(loss / args.accum, pixels)[0] for loss in judged]
        losses = losses + torch.stack([l1, lpips_loss, gan]).detach() / args.accum
        if disc:
            waiting.append((z_k, gradients))
            for i in range(2):
                at_weight[i] += torch.autograd.grad(xhat, weight, gradients[i], retain_graph=True)[0]
        else:
            xhat.backward(gradients[0])
    # lambda, as released; the paper takes the gradients at the reconstruction.
    norms = mean_over_ranks(at_weight).flatten(1).norm(dim=1) if disc else losses.new_zeros(2)
    scale = (norms[0] / (norms[1] + 1e-6)).clamp(0, 1e4)
    if disc:
        xhat.backward(gradients[0] + args.gan_weight * scale * gradients[1])
    for k, (z_k, gradients) in enumerate(waiting[:-1], 2):
        model.require_backward_grad_sync = k == args.accum
        with autocast:
            xhat = model(z_k)
        xhat.backward(gradients[0] + args.gan_weight * scale * gradients[1])
    optimizer.step()
    loss = losses @ losses.new_tensor([1, args.lpips_weight, 0]) + args.gan_weight * scale * losses[2]
    return torch.stack([loss, *losses, scale, 0 * scale])


def disc_step(model, decoder, optimizer, images, z, args):
    """One update of the discriminator by images and by fakes from latents without noise; returns its loss."""
    u, total = torch.rand(len(z), 2, 5, device=z.device), 0  # real and fake have their own draws
    optimizer.zero_grad()
    for k, (x, z_k, u_k) in enumerate(zip(*(part.chunk(args.accum) for part in (images, z, u)), strict=True)):
        model.require_backward_grad_sync = k == args.accum - 1
        model.train(k == 0)  # here alone spectral norm iterates: once a step
        with torch.autocast(z.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            with torch.no_grad():
                fake = to_8_bit(decoder(z_k))
            both = diff_augment(2 * torch.cat([x, fake]) - 1, u_k.transpose(0, 1).flatten(0, 1))
            loss = hinge_loss(*model(both).chunk(2)) / args.accum
        loss.backward()
        total = total + loss.detach()
    optimizer.step()
    model.eval()
    return total


@torch.no_grad()
def evaluate(decoder, encoder, perceptual, data, args, device, rank, world):
    """Means over the images of `data` of PSNR in dB on 8-bit pixels and, where it is trained with, LPIPS.

    In fp32 whatever --precision says: the numbers are the same for any batch size and number of ranks.
    """
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    order = even_order(len(data), len(data), args.batch_size // (world * args.accum), rank, world)
    for x, _ in load_images(data, order, device, args.workers):
        xhat = to_8_bit(decoder(encoder(x)))
        totals[0] += (-10 * (xhat - x).square().mean((1, 2, 3)).log10()).sum()
        totals[1] += perceptual(2 * xhat - 1, 2 * x - 1).sum() if perceptual else 0
    psnr, lpips_loss = (mean_over_ranks(totals) * world / len(data)).tolist()
    return {"eval_psnr": psnr} | ({"eval_lpips": lpips_loss} if perceptual else {})


@torch.no_grad()
def save_preview(path, decoder, encoder, images):
    """PNG with the originals (B,3,S,S) over their reconstructions."""
    rows = torch.stack([images, decoder(encoder(images))])  # (2, B, 3, S, S)
    pixels = (to_8_bit(rows) * 255).byte().permute(0, 3, 1, 4, 2)  # (2, S, B, S, 3)
    try:
        Image.fromarray(pixels.flatten(2, 3).flatten(0, 1).cpu().numpy()).save(path)
    except OSError as error:
        tqdm.write(f"{path}: no preview ({error}); training goes on", file=sys.stderr)


def join_ranks():
    """Joins torchrun's process group, if there is one; returns (rank, world size, device)."""
    rank, world, local = (int(os.environ.get(key, 0)) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return rank, max(1, world), device


def mean_over_ranks(values):
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


def open_log(folder):
    """metrics.jsonl, locked while this process lives, and TensorBoard's writer where that is installed."""
    try:
        os.makedirs(folder, exist_ok=True)
        file = open(os.path.join(folder, "metrics.jsonl"), "a", buffering=1)  # noqa: SIM115
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of the process: forked workers don't hold it
    except OSError as error:
        raise SystemExit(f"--out {folder}: another run is in it, or it can't be written ({error})") from None
    board = importlib.util.find_spec("tensorboard") and importlib.import_module("torch.utils.tensorboard")
    return file, board and board.SummaryWriter(folder)


def write_log(log, step, record):
    file, board = log
    try:
        print(json.dumps({"step": step} | record), file=file)
    except OSError as error:
        raise SystemExit(f"{file.name}: can't be written ({error}); the last checkpoint is whole") from None
    for name, value in record.items() if board else ():
        board.add_scalar(name, value, step)


def save(checkpoint, path):
    """Written beside it, flushed, renamed over it; a last.pt that was there stays as previous.pt."""
    try:
        with open(path + ".tmp", "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        if path.endswith("last.pt") and os.path.exists(path):
            os.replace(path, os.path.join(os.path.dirname(path), "previous.pt"))
        os.replace(path + ".tmp", path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise SystemExit(f"{path}: can't be written ({error}); the checkpoint before it is whole") from None


def resume(args, config, **state):
    """Loads --resume, or the run folder's last checkpoint, into `state`; returns it, or {"step": 0}."""
    last, previous = (os.path.join(args.out, name) for name in ("last.pt", "previous.pt"))
    # A kill between the two renames of save leaves only previous.pt.
    source = args.resume or next(filter(os.path.exists, (last, previous)), None)
    if not source:
        return {"step": 0}
    hint = f"; --resume {previous} goes on from the one before" * os.path.exists(previous)
    checkpoint = read_weights(source, hint)
    if checkpoint.get("format") != "rae-decoder/1" or not checkpoint.keys() >= {"config", "step", "model"}:
        raise SystemExit(f"--resume {source}: not a rae-decoder/1 checkpoint{hint}")
    for key, value in config.items():
        if (was := checkpoint["config"].get(key)) != value:
            raise SystemExit(f"{source} has {key} {was}, this run {value}: same flags, or another --out")
    for name, owner in state.items():
        owner.load_state_dict(checkpoint[name])
    return checkpoint


def build(args, device):
    """Returns (encoder, decoder, config); config is what later stages need to know of them."""
    size, p = args.image_size, args.patch_size
    encoder = Encoder(args.encoder, args.encoder_size, size * 16 // (p or 16), args.encoder_weights)
    tokens, p = encoder.grid, p or size / encoder.grid
    if size % p or p % 1:
        problem = f"--image-size {size} is no multiple of the patch: {tokens} tokens a side, patch size {p:g}"
        raise SystemExit(f"{problem}; change --image-size, --encoder-size or --patch-size")
    sizes = dict(name=args.decoder, channels=encoder.width, grid=int(size / p), patch_size=int(p))
    sizes |= {key: getattr(encoder, key).flatten().tolist() for key in ("mean", "std")}
    config = {key: getattr(args, key) for key in ("encoder", "encoder_weights", "image_size", "noise_tau")}
    config |= dict(encoder_size=encoder.encoder_size, latent_shape=[encoder.width, tokens, tokens])
    config |= dict(decoder=sizes, gan=args.gan_weight > 0)
    decoder = Decoder(**sizes)
    decoder.recomputes = args.checkpoint_activations
    if args.init:
        start = load_decoder(args.init, args.encoder)[0].state_dict()
        for name, value in decoder.state_dict().items():
            if name not in start or start[name].shape != value.shape:
                raise SystemExit(f"--init {args.init}: of other sizes, its {name} is not {list(value.shape)}")
        decoder.load_state_dict(start)
    return encoder.to(device), decoder.to(device), config


def main(argv=None):
    args = parse_args(argv)
    rae_encoder.keep_freed_memory()
    rank, world, device = join_ranks()
    if args.data == DEMO["data"] and rank == 0 and not os.path.exists(args.data):
        rae_encoder.draw_demo(args.data)
    if world > 1:
        dist.barrier()
    data = ImageData(args.data, args.image_size, "crop", args.seed, args.skip_broken)
    held_out = ImageData(
        args.eval_data or args.data, args.image_size, None, 0, args.skip_broken, "--eval-data"
    )
    epoch, batch = len(data) // args.batch_size, args.batch_size
    if not epoch:
        raise SystemExit(f"--data {args.data}: {len(data)} images, fewer than --batch-size {batch}")
    if batch % (world * args.accum):
        raise SystemExit(f"--batch-size {batch} is no multiple of {world} ranks x {args.accum} --accum")
    counts = (args.epochs, args.warmup_epochs, args.disc_start, args.gan_start)
    steps, warmup, disc_start, gan_start = (round(epoch * count) for count in counts)
    steps = args.steps or max(1, steps)
    log = open_log(args.out) if rank == 0 else None

    torch.manual_seed(args.seed)
    encoder, decoder, config = build(args, device)
    ema = copy.deepcopy(decoder).requires_grad_(False)
    perceptual = perceptual_loss(args.lpips_weights).to(device) if args.lpips_weight else None
    disc = Discriminator(args.disc_weights).to(device).eval() if args.gan_weight else None
    adamw = dict(lr=args.lr, betas=(0.9, 0.95), weight_decay=0, fused=True)
    optimizer = torch.optim.AdamW(decoder.parameters(), **adamw)
    state = dict(model=decoder, ema=ema, optimizer=optimizer)
    if disc:
        disc_optimizer = torch.optim.AdamW(disc.heads.parameters(), **adamw)
        state |= dict(disc=disc.heads, disc_optimizer=disc_optimizer)
    step = resume(args, config, **state)["step"]
    if args.compile or (args.compile is None and device.type == "cuda"):
        for block in decoder.decoder_layers:  # block by block: one compilation serves them all
            block.compile()
    model, disc_model = decoder, disc
    if world > 1:
        model = DistributedDataParallel(decoder, broadcast_buffers=False)
        disc_model = DistributedDataParallel(disc, broadcast_buffers=False) if disc else None

    last = os.path.join(args.out, "last.pt")
    if rank == 0:
        demo = "The demo: its numbers compare with nothing. " if args.data == DEMO["data"] else ""
        size = f"{sum(p.numel() for p in decoder.parameters()) / 1e6:.1f} M parameters"
        what = f"{demo}{len(data)} images of {args.data}; {args.encoder} {config['latent_shape']} -> "
        what += f"{args.decoder} ({size}); {world} x {device.type}, {args.precision}; step {step} of {steps}"
        print(what, file=sys.stderr)
        shown, _ = next(load_images(held_out, even_order(len(held_out), 8, 8), device))
    stop = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.append(True))
    order = training_order(len(data), batch, args.seed, step, steps, rank, world)
    progress = tqdm(total=steps, initial=step, unit="step", disable=rank > 0)
    schedule = (steps, warmup, args.lr, args.final_lr)
    scores, window, seconds, tick = {}, [], 0, time.time()
    for images, _ in load_images(data, order, device, args.workers):
        # The random numbers of a step depend on (seed, step, rank) alone, so a resumed run repeats them.
        torch.manual_seed(int(np.random.SeedSequence([args.seed, step, rank]).generate_state(1)[0]))
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            z = encoder(images)  # (B, C, G, G)
        lr = optimizer.param_groups[0]["lr"] = learning_rate(step, *schedule)
        heard = disc if step >= gan_start else None
        terms = decoder_step(model, perceptual, heard, optimizer, images, z, args)
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(decoder.parameters()), 1 - args.ema)
        if disc and step >= disc_start:
            disc_optimizer.param_groups[0]["lr"] = learning_rate(step - disc_start, *schedule)
            terms[5] = disc_step(disc_model, decoder, disc_optimizer, images, z, args)
        window.append(terms)
        step += 1
        progress.update()
        # Ranks must leave together, though a signal reaches them one by one.
        stopped = mean_over_ranks(torch.tensor(float(bool(stop)), device=device)).item() > 0
        final = stopped or step == steps
        seconds += time.time() - tick
        if evaluated := args.eval_data and (step % args.eval_every == 0 or step == steps):
            scores = evaluate(ema, encoder, perceptual, held_out, args, device, rank, world)
        if evaluated or final or step % args.log_every == 0:
            terms = mean_over_ranks(torch.stack(window).mean(0)).tolist()
            if not math.isfinite(terms[0]):
                raise SystemExit(f"step {step}: loss {terms[0]}; go on from {last} by fp32 or a lower --lr")
            rate = round(len(window) * batch / seconds, 1)
            record = dict(zip(TERMS[: 6 if disc else 3], terms, strict=False), lr=lr, images_per_s=rate)
            progress.set_postfix(loss=f"{terms[0]:.4f}", images_per_s=rate, **scores)
            if rank == 0:
                write_log(log, step, record | (scores if evaluated else {}))
            window, seconds = [], 0
        if rank == 0 and args.preview_every and (step % args.preview_every == 0 or final):
            save_preview(os.path.join(args.out, f"preview-{step:07d}.png"), ema, encoder, shown)
        if rank == 0 and (step % args.save_every == 0 or final):
            checkpoint = {name: owner.state_dict() for name, owner in state.items()}
            checkpoint |= dict(format="rae-decoder/1", config=config, step=step, args=vars(args))
            save(checkpoint, last)
            if args.keep_every and step % args.keep_every == 0:
                save(checkpoint, os.path.join(args.out, f"{step:07d}.pt"))
        if stopped:
            break
        tick = time.time()
    progress.close()

    broken = int(mean_over_ranks(data.broken.to(device).float()).count_nonzero())
    if rank == 0:
        done = "" if step == steps else "; stopped, the same command goes on from here"
        done += f"; {broken} broken images were replaced by others" if broken else ""
        print(f"{last}: step {step} of {steps}{done}", file=sys.stderr)
    if world > 1:
        dist.destroy_process_group()


def parse_args(argv=None):
    parser = rae_encoder.training_parser(__doc__)
    add = parser.add_argument
    add("--decoder", help=", ".join(DECODERS))
    add("--patch-size", type=int, help="pixels a side of a decoder token; default image size / tokens a side")
    add("--noise-tau", type=float, help="latent noise: sigma ~ U(0, tau) for each image")
    add("--lpips-weight", type=float, help="0 goes without LPIPS")
    add("--lpips-weights", choices=["hub", "random"], help="VGG-16: torchvision's, or untrained")
    add("--gan-weight", type=float, help="0 goes without GAN")
    add("--disc-weights", help="DINO ViT-S/8: file with timm's keys, or `random`; default: the hub")
    add("--disc-start", type=float, help="epoch from which the discriminator learns")
    add("--gan-start", type=float, help="epoch from which the decoder learns from it")
    add("--warmup-epochs", type=float, help="linear warm-up of the learning rate")
    add("--eval-data", help="folder or .tar of held-out images, for PSNR, LPIPS and the preview")
    add("--eval-every", type=int, help="steps")
    args = rae_encoder.parse_with_presets(parser, PRESETS, argv)
    if args.gan_weight and args.gan_start < args.disc_start:
        raise SystemExit(f"--gan-start {args.gan_start} is before --disc-start {args.disc_start}")
    return args


if __name__ == "__main__":
    main()
