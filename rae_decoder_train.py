"""Stage 1 of RAE: train a ViT decoder that turns the frozen encoder's latents back into images.

Zheng et al. 2025, Diffusion Transformers with Representation Autoencoders, arXiv 2510.11690, sections 3, 4.3.
The loss is L1, LPIPS and a GAN; noise on the latents makes the decoder forgive the errors of stage 2.
"Released" means the authors' code and files; comments say where these differ from the paper.

    torchrun rae_decoder_train.py                        # the demo: a minute on a laptop's CPU
    torchrun rae_decoder_train.py --data my_images       # 64 px, without GAN
    torchrun --nproc_per_node 8 rae_decoder_train.py --preset imagenet256 --data imagenet/train

Letters in shapes: B batch, C token width, G tokens a side, N = G*G, W decoder width, p patch, S image size.
"""

import copy
import math
import sys
import warnings
from collections import Counter, defaultdict

import lpips
import numpy as np
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint as recompute
from torchvision.utils import save_image
from tqdm import tqdm

import rae_encoder
from rae_encoder import (
    DEMO,
    RAEV2,
    SMALL,
    ImageData,
    check_same,
    even_order,
    load_images,
    next_command,
    non_negative_float,
    read_weights,
    reason,
    training_order,
    write_file,
    write_log,
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
# Presets list only what differs from the flag defaults; those are the released 256 px recipe.
PRESETS = {
    "demo": DEMO
    | {
        "decoder": "ViT-mini",
        "noise_tau": 0.2,
        "lpips_weight": 0,  # it would take half of the time, and here its VGG would be untrained
        "gan_weight": 0,
        "batch_size": 32,
        "epochs": 4,
        "lr": 1e-3,
        "ema": 0.99,
        "log_every": 20,
        "preview_every": 100,
        "save_every": 100,
    },
    "small": SMALL
    | {
        "decoder": "ViT-S",
        "gan_weight": 0,
        "batch_size": 16,
        "steps": 800,
        "warmup_epochs": None,  # a twentieth of the run
        "lr": 1e-3,
        "ema": 0.99,
        "log_every": 20,
        "preview_every": 100,
        "save_every": 100,
    },
    "imagenet256": {"epochs": 16},
    # Eight GPUs of 80 GB hold these four micro-batches with the GAN.
    "imagenet512": {"epochs": 16, "accum": 4, "image_size": 512},
    "raev2": RAEV2 | {"epochs": 16, "raw_pixels": True},
}
FORMAT = "rae-decoder/1"  # of the checkpoints


# The decoder


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
        q = self.heads_of(h, "query")  # (B, heads, 1 + N, W/heads)
        k = self.heads_of(h, "key")
        v = self.heads_of(h, "value")
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, 1 + N, W)
        x = x + self.attention["output"]["dense"](h)
        h = F.gelu(self.intermediate["dense"](self.layernorm_after(x)))
        return x + self.output["dense"](h)

    def heads_of(self, h, name):
        return self.attention["attention"][name](h).unflatten(2, (self.heads, -1)).transpose(1, 2)


def dense(*sizes):
    return nn.ModuleDict({"dense": nn.Linear(*sizes)})


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


# Losses: LPIPS and the discriminator

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
        state = vgg_weights() if weights == "hub" else read_weights(weights, "--lpips-weights")
        names = {key: "features." + key.split(".", 1)[1] for key in network.net.state_dict()}
        if not set(names.values()) <= state.keys():
            raise SystemExit(f"--lpips-weights {weights}: not torchvision's VGG-16")
        network.net.load_state_dict({key: state[name] for key, name in names.items()})
    # Channels-last convolutions are a third faster on CPUs.
    return network.requires_grad_(False).to(memory_format=torch.channels_last)


class Discriminator(nn.Module):
    """Images (B,3,S,S) in [-1,1] -> logits (B, 5*784), one for each head and token (after Sauer et al. 2023).

    Heads on the patch tokens of a frozen DINO ViT-S/8: after blocks 12, 3, 6, 9, 12 (as released, one twice).
    weights: None (hub), "random", or a .safetensors / .pt file with timm's keys.
    """

    def __init__(self, weights=None):
        super().__init__()
        self.vit = rae_encoder.load_vit("vit_small_patch8_224.dino", weights, "--disc").requires_grad_(False)
        for block in self.vit.blocks:
            block.mlp.act = nn.GELU("tanh")  # the released one
        self.heads = nn.ModuleList(disc_head(self.vit.embed_dim) for _ in range(5))
        for key in ("mean", "std"):
            self.register_buffer(key, torch.tensor(self.vit.pretrained_cfg[key]).view(3, 1, 1))

    def forward(self, x):
        x = F.interpolate(x, size=224, mode="bilinear")  # (B, 3, 224, 224)
        x = (x / 2 + 0.5 - self.mean) / self.std
        features = self.vit.forward_intermediates(x, [2, 5, 8, 11], output_fmt="NLC", intermediates_only=True)
        # Each head gives one logit per token: 5 x 784 per image.
        logits = []
        with torch.autocast(x.device.type, enabled=False):  # spectral norm iterates in fp32
            for head, tokens in zip(self.heads, features[-1:] + features, strict=True):
                first, second, last = head
                h = first(tokens.float().mT)  # (B, 384, 784)
                h = (h + second(h)) / math.sqrt(2)
                logits.append(last(h).flatten(1))  # (B, 784)
        return torch.cat(logits, dim=1)


def disc_head(width):
    def layer(size):
        convolution = nn.Conv1d(width, width, size, padding=size // 2, padding_mode="circular")
        # The released norm is over the tokens of one image; the paper says batch norm.
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

    # Rows and columns are the source index of each output row and column in the padded image.
    first = (u[:, :2] * (2 * reach + 1)).long()  # (B, 2) its first row and column
    rows, columns = (first[..., None] + torch.arange(size, device=x.device)).unbind(1)  # (B, S) each
    x = F.pad(x, [reach] * 4)
    x = x.take_along_dim(rows[:, None, :, None], 2)
    x = x.take_along_dim(columns[:, None, None, :], 3)  # (B, 3, S, S)

    # Each change of colour works on the result of the one before it.
    brightness, saturation, contrast = u[:, 2:].mT[..., None, None, None]  # (B, 1, 1, 1) each
    x = x + brightness - 0.5
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * 2 * saturation
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + (x - mean) * (contrast + 0.5)


def hinge_loss(real, fake):
    """Hinge loss of the discriminator's logits (appendix)."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def adaptive_weight(reconstruction, gan, weight):
    """lambda = |grad of reconstruction| / (|grad of gan| + 1e-6) at the decoder's last weight, in [0, 1e4].

    Taking the gradients at the last weight is the released rule; the paper takes them at the reconstruction
    (section 3.2). The gradients are averaged over the ranks, so that all use one lambda.
    """
    # The step itself needs both graphs once more.
    gradients = [torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in (reconstruction, gan)]
    norms = mean_over_ranks(torch.stack(gradients)).flatten(1).norm(dim=1)
    return (norms[0] / (norms[1] + 1e-6)).clamp(0, 1e4)


# One step


def learning_rate(step, steps, warmup, lr, final_lr):
    """Linear warm-up over `warmup` steps, then a cosine that reaches final_lr at `steps`."""
    # The first rate is lr / warmup: a first step at 0 would do nothing.
    if step < warmup:
        return lr * (step + 1) / warmup
    return final_lr + (lr - final_lr) * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


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

    loss = L1 + lpips_weight LPIPS + gan_weight lambda GAN (section 3.2); terms whose network is None are left
    out. L1 + LPIPS is that of one large batch; lambda is of each micro-batch, as released.
    Returns ({term: its mean over micro-batches and ranks}, finite); where loss or gradients are not finite
    nothing is updated.
    """
    # Each image has its own sigma: U(0, tau) is released, |N(0, tau^2)| is the paper's.
    draw = torch.rand if noise_law == "uniform" else torch.randn
    sigma = noise_tau * draw(len(z), 1, 1, 1, device=z.device).abs()
    noisy = z + sigma * torch.randn_like(z)
    u = torch.rand(len(z), 5, device=z.device)
    last_weight = getattr(model, "module", model).decoder_pred.weight  # DDP keeps the network in .module
    terms = defaultdict(float)
    optimizer.zero_grad()
    chunks = (value.chunk(accum) for value in (images, noisy, u))
    for k, (x, noisy_k, u_k) in enumerate(zip(*chunks, strict=True)):
        model.require_backward_grad_sync = k == accum - 1  # DDP exchanges gradients once a step
        with torch.autocast(z.device.type, torch.bfloat16, enabled=precision == "bf16"):
            xhat = model(noisy_k)  # (B / accum, 3, S, S)
            parts = {"l1": (xhat - x).abs().mean()}
            loss = parts["l1"]
            if perceptual:
                parts["lpips"] = perceptual(2 * xhat - 1, 2 * x - 1).float().mean()
                loss = loss + lpips_weight * parts["lpips"]
            # lambda weighs the GAN against the sum of the terms above.
            if disc:
                parts["gan"] = -disc(diff_augment(2 * xhat - 1, u_k)).mean()
                parts["lambda"] = adaptive_weight(loss, parts["gan"], last_weight)
                loss = loss + gan_weight * parts["lambda"] * parts["gan"]
        (loss / accum).backward(inputs=list(model.parameters()))  # not into the discriminator
        parts["loss"] = loss
        # Means over the micro-batches, for the log
        for name, value in parts.items():
            terms[name] += value.detach() / accum
    return update(optimizer, terms)


def disc_step(model, optimizer, images, z, decoder, accum, precision):
    """One update of the discriminator by images and by fakes from latents without noise.

    Returns (loss, finite), as decoder_step does.
    """
    u = torch.rand(len(z), 2, 5, device=z.device)  # real and fake have their own draws
    total = 0
    optimizer.zero_grad()
    chunks = (value.chunk(accum) for value in (images, z, u))
    for k, (x, z_k, u_k) in enumerate(zip(*chunks, strict=True)):
        model.require_backward_grad_sync = k == accum - 1
        # Spectral norm's power iteration runs in train mode only; once per step.
        model.train(k == 0)
        with torch.autocast(z.device.type, torch.bfloat16, enabled=precision == "bf16"):
            # Fakes come from the just-updated decoder, rounded to 8-bit levels like the real images, so that
            # quantisation is no give-away.
            with torch.no_grad():
                fake = to_8_bit(decoder(z_k))
            both = 2 * torch.cat([x, fake]) - 1  # (2B / accum, 3, S, S)
            # Real and fake go through in one call, since DDP prepares one backward pass for each.
            logits = model(diff_augment(both, u_k.transpose(0, 1).flatten(0, 1)))
            loss = hinge_loss(*logits.chunk(2))
        (loss / accum).backward()
        total += loss.detach() / accum
    model.eval()
    terms, finite = update(optimizer, {"disc": total})
    return terms["disc"], finite


def update(optimizer, terms):
    """Step where terms and gradients are finite on all ranks; returns (terms over the ranks, finite)."""
    values = mean_over_ranks(torch.stack(list(terms.values())))
    terms = dict(zip(terms, values, strict=True))
    weights = optimizer.param_groups[0]["params"]
    # DDP averaged the gradients, so every rank computes the same norm and takes the same decision.
    norm = nn.utils.get_total_norm([weight.grad for weight in weights])
    finite = bool(torch.isfinite(values.sum() + norm))
    if finite:
        optimizer.step()
    return terms | {"gradient_norm": norm}, finite


@torch.no_grad()
def save_preview(folder, step, log, decoder, encoder, data):
    """preview-STEP.png with eight images of the data, drawn evenly, over their reconstructions."""
    # A preview has whole images instead of random crops.
    whole = copy.copy(data)
    whole.augment = None
    path = f"{folder}/preview-{step:07d}.png"
    try:
        order = even_order(len(data), 8, 8)
        images, _ = next(load_images(whole, order, encoder.mean.device))
        # A user of the checkpoint gets the EMA's images, in fp32.
        rows = torch.cat([images, decoder(encoder(images))])  # (2 * 8, 3, S, S)
        write_file(path, lambda file: save_image(to_8_bit(rows), file, "PNG", padding=0))
        rae_encoder.log_picture(log, step, path)
    except SystemExit as error:
        tqdm.write(f"no preview: {error}; training goes on", file=sys.stderr)


# The run


@rae_encoder.keeps_process_settings()
def main(argv=None):
    args = parse_args(argv)
    rank, world, device = rae_encoder.set_up(args)

    # Images, networks, optimizers
    data = ImageData(args.data, args.image_size, "crop", args.seed, args.skip_broken)
    steps, warmup, disc_start, gan_start = schedule(args, len(data), world)
    log = rae_encoder.open_log(args.out) if rank == 0 else None
    start = rae_encoder.read_start(args, FORMAT, data.hash)
    encoder, decoder, ema, config = open_networks(args, device)
    perceptual, disc, state = open_training(args, decoder, ema, device)
    disc_optimizer = state.get("disc_optimizer")

    # The checkpoint of a run that stopped before this one
    step = first = resume(start, config, state, steps)
    rae_encoder.check_ranks_agree(step=step, images=data.hash, encoder=encoder.hash)
    precision, why = rae_encoder.choose_precision(args.precision or start.get("precision"), device)
    checkpoint = {"config": config, "precision": precision, "images": data.hash}
    model = rae_encoder.parallel(decoder, decoder.decoder_layers, args.compile, device)
    ddp_disc = rae_encoder.parallel(disc, [], args.compile, device) if disc else None

    # First line of output and progress bar
    networks = f"{rae_encoder.encoder_summary(args, encoder)} -> {decoder_summary(args, gan_start, steps)}"
    computing = f"{world} x {device.type}, {precision} ({why})"
    progress = rae_encoder.first_line(args, rank, data, networks, decoder, computing, step, steps)

    # Train: everything that happens at a step, in the order in which it happens
    order = training_order(len(data), args.batch_size, args.seed, step, steps, rank, world)
    stops = rae_encoder.catch_signals()
    skipped = Counter()
    recent = defaultdict(list)  # the terms since the last report
    for images, _ in until_stopped(load_images(data, order, device, args.workers), stops, device):
        seed_step(args.seed, step, rank)
        lr = learning_rate(step, steps, warmup, args.lr, args.final_lr)
        state["optimizer"].param_groups[0]["lr"] = lr
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            z = encoder(images)  # (B, C, G, G)
        terms, finite = decoder_step(
            model,
            state["optimizer"],
            images,
            z,
            perceptual,
            disc if step >= gan_start else None,  # the GAN loss starts after the discriminator has trained
            noise_tau=args.noise_tau,
            noise_law=args.noise_law,
            lpips_weight=args.lpips_weight,
            gan_weight=args.gan_weight,
            accum=args.accum,
            precision=precision,
        )
        record_update("decoder", step + 1, terms, finite, recent, skipped, stops, progress)
        if finite:
            update_ema(ema, decoder, rae_encoder.ema_decay(args, steps))
        if finite and disc and step >= disc_start:
            # The discriminator's rate counts its own steps (released): it warms up, and ends above final_lr.
            disc_lr = learning_rate(step - disc_start, steps, warmup, args.lr, args.final_lr)
            disc_optimizer.param_groups[0]["lr"] = disc_lr
            loss, finite = disc_step(ddp_disc, disc_optimizer, images, z, decoder, args.accum, precision)
            record_update("discriminator", step + 1, {"disc": loss}, finite, recent, skipped, stops, progress)
        step += 1
        final = step == steps
        if final or stops or step % args.log_every == 0:
            report(log, progress, step, recent, lr, skipped)
        if rank == 0 and (final or step % args.save_every == 0):
            save(args, state, step, checkpoint)
        if rank == 0 and args.preview_every and (final or step % args.preview_every == 0):
            save_preview(args.out, step, log, ema, encoder, data)  # after the save, since it may fail
        progress.update()

    # A run that ends early leaves its last good step.
    if rank == 0 and first < step < steps:
        save(args, state, step, checkpoint)
    command = next_command("flow_train.py", world, "--decoder", args.out, "flow")
    rae_encoder.end_of_run(args, rank, progress, step, steps, data, device, stops, command)


def open_networks(args, device):
    """(encoder, decoder, EMA, config), as the flags say; later stages and a run that goes on need config."""
    torch.manual_seed(args.seed)  # all ranks and runs start alike
    encoder = rae_encoder.open_encoder(args)
    grid, rest = divmod(args.image_size, args.patch_size)
    if rest:
        raise SystemExit(f"--image-size {args.image_size}: no multiple of --patch-size {args.patch_size}")
    sizes = {
        "name": args.decoder,
        "channels": encoder.width,
        "grid": grid,
        "patch_size": args.patch_size,
    }
    if args.init:
        # Weights go with the pixels that they were trained for.
        decoder, source = load_decoder(args.init, args.encoder, "--init", args.raw_pixels)
        source.update(source["decoder"])
        keys = (*rae_encoder.LATENTS, *sizes)
        check_same({**encoder.config(), **sizes}, "this run", source, f"--init {args.init}", keys)
        sizes = source["decoder"]
    else:
        sizes.update(pixel_statistics(args.encoder, args.raw_pixels))
        decoder = Decoder(**sizes)
    config = {
        **encoder.config(),
        "image_size": args.image_size,
        "decoder": sizes,
        # A run that goes on must not change these; the weights of the losses it may.
        "noise_tau": args.noise_tau,
        "noise_law": args.noise_law,
        "gan": args.gan_weight > 0,
    }
    decoder.checkpoint_activations = args.checkpoint_activations
    decoder.to(device)
    return encoder.to(device), decoder, copy.deepcopy(decoder).requires_grad_(False), config


def open_training(args, decoder, ema, device):
    """(LPIPS, discriminator, state): None where a loss has no weight; state is what a checkpoint holds."""
    perceptual = perceptual_loss(args.lpips_weights).to(device) if args.lpips_weight else None
    disc = None
    state = {"model": decoder, "ema": ema, "optimizer": adamw(decoder)}
    if args.gan_weight:
        disc = Discriminator(args.disc_weights).to(device).eval()
        # The discriminator's backbone is frozen and comes from a file of its own.
        state.update(disc=disc.heads, disc_optimizer=adamw(disc.heads))
    return perceptual, disc, state


def schedule(args, images, world):
    """Steps of the run, steps of warm-up, and those from which discriminator and GAN loss take part."""
    steps_per_epoch, steps = rae_encoder.plan_steps(images, args, world)
    warmup = steps // 20 if args.warmup_epochs is None else round(args.warmup_epochs * steps_per_epoch)
    # A short run must reach the full learning rate, too.
    if "warmup_epochs" not in args.explicit:
        warmup = min(warmup, steps // 10)
    return steps, warmup, round(args.disc_start * steps_per_epoch), round(args.gan_start * steps_per_epoch)


# Flags


def parse_args(argv=None):
    parser, training = rae_encoder.training_parser(__doc__)
    parser.set_defaults(batch_size=512, out="runs/decoder", ema=0.9978)
    add = training.add_argument
    rise = "of a linear warm-up (%(default)s; unless it is given, at most a tenth of the run)"
    add("--warmup-epochs", type=non_negative_float, default=1, help=rise)
    add("--noise-tau", type=non_negative_float, default=0.8, help="strength of latent noise (%(default)s)")
    laws = ["uniform", "half-normal"]
    add("--noise-law", choices=laws, default="uniform", help="released, or the paper's (%(default)s)")
    add("--lpips-weight", type=non_negative_float, default=1.0, help="0 goes without LPIPS (%(default)s)")
    add("--lpips-weights", default="hub", help="VGG-16: hub, random, or a file (%(default)s)")
    add("--gan-weight", type=non_negative_float, default=0.75, help="0 goes without GAN (%(default)s)")
    add("--disc-weights", metavar="FILE", help="DINO ViT-S/8, timm's keys, or `random`; default: the hub's")
    add("--disc-start", type=non_negative_float, default=6, help="epoch when it first learns (%(default)s)")
    add("--gan-start", type=non_negative_float, default=8, help="epoch when its loss starts (%(default)s)")

    add = parser.add_argument_group("decoder").add_argument
    add("--decoder", choices=DECODERS, default="ViT-XL", help="(%(default)s)")
    add("--raw-pixels", action="store_true", help="it puts out [0,1] itself, as RAEv2's do")

    args = rae_encoder.with_preset(parser, PRESETS, rae_encoder.explicit_flags(parser, argv))
    if args.gan_weight and args.gan_start < args.disc_start:
        raise SystemExit(f"--gan-start {args.gan_start} is before --disc-start {args.disc_start}")
    return args


def decoder_summary(args, gan_start, steps):
    """The decoder's name and when its GAN loss begins, for the first line."""
    if not args.gan_weight:
        return f"{args.decoder}, no GAN"
    late = "" if gan_start < steps else ", after the end of this run"
    return f"{args.decoder}, GAN from step {gan_start}{late}"


# Files of others: decoders of the authors and of diffusers, VGG

# Parts of keys in files of torch.compile, DDP and diffusers, and our names for them
KEY_PARTS = {
    "_orig_mod.": "",
    "module.": "",
    "attention.to_q.": "attention.attention.query.",
    "attention.to_k.": "attention.attention.key.",
    "attention.to_v.": "attention.attention.value.",
    "attention.to_out.0.": "attention.output.dense.",
}


def load_decoder(path, encoder="dinov2-base", flag="--decoder", raw_pixels=False):
    """(Decoder in eval mode, config) from this project's checkpoint (its EMA) or from the authors' files.

    The shapes of a bare state dict tell its sizes, and its config has nothing else; the pixels' mean and std
    are then those of `encoder`, or with raw_pixels 0 and 1, as in RAEv2. A folder in diffusers' format has a
    config (rae_encoder.read_autoencoder): for 16x16 tokens our images equal diffusers'. For other grids they
    do not, because diffusers rescales the position embedding to base size 16. Raises SystemExit for any other
    file.
    """
    file = read_weights(path, flag)
    try:
        return build_decoder(file, encoder, raw_pixels)
    except (KeyError, RuntimeError) as error:
        problem = f"not a decoder, ours or released ({type(error).__name__}: {reason(error)})"
        raise SystemExit(f"{flag} {path}: {problem}") from None


def build_decoder(file, encoder, raw_pixels):
    """load_decoder for a file that is read. Raises KeyError or RuntimeError for other weights and sizes."""
    if file.get("format") == FORMAT:
        state = file["ema"]
        config = {**file["args"], **file["config"]}
    else:
        state = released_state(file)
        sizes = {**released_sizes(state), **pixel_statistics(encoder, raw_pixels)}
        config = {}
        # diffusers' format has both of these.
        if "sizes" in file:
            sizes.update(file["sizes"])
            config = file["config"]
        config["decoder"] = sizes
        heads = DECODERS[sizes["name"]][2]
        if config.get("heads", heads) != heads:
            raise RuntimeError(f"has {config['heads']} heads, a {sizes['name']} {heads}")

    decoder = Decoder(**config["decoder"])
    # Released files may lack these two.
    fixed = {
        "decoder_pos_embed": decoder.decoder_pos_embed,
        "trainable_cls_token": decoder.trainable_cls_token,
    }
    decoder.load_state_dict({**fixed, **state})
    return decoder.eval(), config


def released_state(file):
    """The decoder's state dict in a file of the authors: bare, wrapped, or beside its encoder's."""
    file = rae_encoder.unwrapped(file)
    for other, name in KEY_PARTS.items():
        file = {key.replace(other, name): value for key, value in file.items()}
    inner = {key.removeprefix("decoder."): file[key] for key in file if key.startswith("decoder.")}
    return inner or file


def released_sizes(state):
    """The sizes of a Decoder that a bare state dict implies by its shapes. Raises KeyError for others."""
    width, channels = state["decoder_embed.weight"].shape
    names = {sizes[0]: name for name, sizes in DECODERS.items()}
    # Only the grid must be guessed where a file leaves the positions out.
    position = state.get("decoder_pos_embed", torch.empty(1, 257))  # 16 x 16, as all 256 px releases
    return {
        "name": names[width],
        "channels": channels,
        "grid": math.isqrt(position.shape[1] - 1),
        "patch_size": math.isqrt(len(state["decoder_pred.weight"]) // 3),
    }


def pixel_statistics(encoder, raw_pixels):
    """Mean and std of the pixels that a decoder is trained for: its encoder's, or 0 and 1 of raw pixels."""
    if raw_pixels:
        return {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    pixels = timm.get_pretrained_cfg(rae_encoder.timm_name(encoder))
    return {"mean": pixels.mean, "std": pixels.std}


def vgg_weights():
    """torchvision's VGG-16 from torch's cache, or fetched into it with its hash checked."""
    try:
        return torch.hub.load_state_dict_from_url(VGG, check_hash=True, weights_only=True)
    except Exception as error:  # no network, no room, another hash, a cut file in the cache
        cache = f"{torch.hub.get_dir()}/checkpoints can't be filled, or its file is damaged"
        hint = "--lpips-weights FILE takes a local copy, --lpips-weight 0 goes without"
        raise SystemExit(f"LPIPS needs {VGG}: {cache} ({reason(error)}); {hint}") from None


# ---- The plumbing of a training: the same words in rae_decoder_train.py and flow_train.py ----


def mean_over_ranks(values):
    """Average the tensor `values` in place over the ranks."""
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


def until_stopped(batches, stops, device):
    """Yield the batches until the list `stops` of a rank has a signal or a problem: all ranks leave together.

    A rank that can't load its batch appends the problem.
    """
    batches = iter(batches)
    while True:
        try:
            batch = next(batches, None)
        except SystemExit as problem:
            stops.append(problem)
        # The stop of one rank makes the mean of all ranks positive.
        stopping = mean_over_ranks(torch.tensor(float(len(stops)), device=device))
        if stopping > 0 or batch is None:
            return
        yield batch


def adamw(network):
    """The paper's AdamW (appendix), whose learning rate each step sets; fused: one kernel for all weights."""
    return torch.optim.AdamW(network.parameters(), betas=(0.9, 0.95), eps=1e-8, weight_decay=0, fused=True)


def seed_step(seed, step, rank):
    """Make the random numbers of a step depend on (seed, step, rank) alone, so a resumed run repeats them."""
    # SeedSequence mixes: neighbouring steps and ranks have nothing in common.
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0]))


@torch.no_grad()
def update_ema(ema, network, decay):
    """ema + (1 - decay) (network - ema), all weights in one call."""
    torch._foreach_lerp_(list(ema.parameters()), list(network.parameters()), 1 - decay)


def record_update(network, step, terms, finite, recent, skipped, stops, progress):
    """Add the terms of an update of `network` to the lists in `recent`, from which the log has means.

    One that is not finite has changed nothing: it is counted and printed instead. Ten in a row mean
    divergence and end the run.
    """
    if finite:
        skipped[network] = 0
        for name, value in terms.items():
            recent[name].append(value)
        return
    skipped[network] += 1
    skipped["all"] += 1
    if not progress.disable:  # rank 0
        values = ", ".join(f"{name} {value:.3g}" for name, value in terms.items())
        progress.write(f"step {step}: the {network}'s update was skipped, not finite: {values}", sys.stderr)
    if skipped[network] == 10:
        problem = f"step {step}: 10 updates of the {network} in a row not finite"
        stops.append(SystemExit(f"{problem}; try a lower --lr or --precision fp32"))


def report(log, progress, step, recent, lr, skipped):
    """Log the mean of each term over the updates since the last report, and clear `recent`."""
    record = {name: torch.stack(values).mean().item() for name, values in recent.items()}
    recent.clear()
    if log:
        write_log(log, step, {**record, "lr": lr, "skipped": skipped["all"]})
    progress.set_postfix(step=step, loss=record.get("loss"))


def resume(start, config, state, steps):
    """Load the checkpoint `start` (read_start) into `state`; returns its step.

    Raises SystemExit for a checkpoint of another run.
    """
    if not start:
        return 0
    check_same(config, "this run", start["config"], start["path"], config, "same flags, or another --out")
    # A checkpoint beyond this run's end is refused instead of silently doing nothing.
    if start["step"] > steps:
        raise SystemExit(
            f"{start['path']} is at step {start['step']}, this run ends at {steps}: more --steps or "
            "--epochs, or another --out"
        )
    for name, owner in state.items():
        # A copy, since an optimizer would keep the file mapped that the next save replaces.
        owner.load_state_dict(copy.deepcopy(start.pop(name)))
    return start["step"]


def save(args, state, step, rest):
    """Write last.pt and, every --keep-every steps, a numbered copy: plain dicts, which run no code."""
    states = {name: owner.state_dict() for name, owner in state.items()}
    checkpoint = {"format": FORMAT, "step": step, "args": vars(args), **states, **rest}
    names = ["last.pt"]
    if args.keep_every and step % args.keep_every == 0:
        names.append(f"{step:07d}.pt")
    for name in names:
        write_file(f"{args.out}/{name}", lambda file: torch.save(checkpoint, file))


# ---- The end of the same words ----


if __name__ == "__main__":
    rae_encoder.run(main)
