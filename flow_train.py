"""Stage 2 of RAE: train a velocity network by flow matching in the latent space of the frozen encoder.

Zheng et al. 2025, Diffusion Transformers with Representation Autoencoders, arXiv 2510.11690, sections 4, 5.
Images are encoded as training goes, or once for all; times are shifted by the latents' size (section 4.2).

    torchrun flow_train.py                        # the demo, after rae_decoder_train.py: two minutes on a CPU
    torchrun flow_train.py --data my_images --decoder runs/decoder/last.pt
    torchrun --nproc_per_node 8 flow_train.py --preset imagenet256 --data imagenet/train --decoder decoder.pt

Letters in shapes: B batch, C token width, G tokens a side. t in [0,1]: t=0 is data, t=1 is noise.
"""

import argparse
import copy
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import dit_dh
import rae_encoder
from rae_encoder import (
    DEMO,
    RAEV2,
    SMALL,
    Encoder,
    ImageData,
    amount,
    check_pair,
    compile_blocks,
    count,
    difference,
    encode_views,
    even_order,
    exact_fp32,
    fraction,
    is_mirrored,
    latent_statistics,
    load_images,
    load_statistics,
    local_file,
    positive,
    read_weights,
    reason,
    training_order,
    write_file,
)

FORMAT = "rae-flow/1"  # of the checkpoints
MODELS = [f"{family}-{size}" for family in ("DiT", "DiT-DH") for size in dit_dh.SIZES]
SIZES = ("width", "depth", "heads", "head_width", "head_depth", "head_heads")
# What differs from the flags' own defaults, which are the released recipe's.
PRESETS = {
    "demo": DEMO
    | {
        "decoder": "runs/decoder/last.pt",
        "model": "DiT-DH-S",
        # 2 M parameters, as wide as its 64 channels demand
        "width": 128,
        "depth": 4,
        "heads": 4,
        "head_width": 128,
        "head_depth": 2,
        "head_heads": 4,
        "batch_size": 64,
        # A minute or two on two cores
        "epochs": 26,
        "hold_epochs": 8,
        "decay_epochs": 26,
        "lr": 2e-3,
        "ema": 0.99,
        "cache_latents": True,  # 2,000 small images
        "log_every": 20,
        "preview_every": 0,
        "save_every": 200,
    },
    # 21 M parameters: a token has 384 channels, so the head has more (section 4.1).
    "small": SMALL
    | {
        "model": "DiT-DH-S",
        "width": 384,
        "depth": 4,
        "heads": 6,
        "head_width": 512,
        "head_depth": 2,
        "head_heads": 8,
        "prediction": "x",  # in a short training the better samples
        "batch_size": 8,  # many small steps, for the same reason
        "steps": 2000,  # 23 minutes on two cores in fp32
        "hold_epochs": None,  # half of the run
        "decay_epochs": None,  # the end of the run
        "lr": 1e-3,
        "ema": 0.995,
        "log_every": 50,
        "preview_every": 500,
        "save_every": 250,
    },
    # Micro-batches that eight GPUs of 80 GB hold in fp32 too: at most 8192 tokens each.
    "imagenet256": {"epochs": 1400, "accum": 4},
    "imagenet512": {"epochs": 1400, "accum": 16, "image_size": 512},
    "raev2": RAEV2
    | {"prediction": "x", "base_depth": 8, "epochs": 80, "hold_epochs": 25, "decay_epochs": 50, "accum": 4},
}


def parse_args(argv=None):
    parser, training = rae_encoder.training_parser(__doc__, PRESETS)
    parser.set_defaults(batch_size=1024, out="runs/flow", preview_every=10_000)
    add = training.add_argument
    add("--ema", type=fraction, default=0.9995, help="decay of the averaged weights, a step (%(default)s)")
    add(
        "--hold-epochs",
        type=amount,
        default=40,
        help="of the first learning rate (%(default)s; small: half the run)",
    )
    add(
        "--decay-epochs",
        type=positive,
        default=800,
        help="when its decay ends (%(default)s; small: with the run)",
    )
    add("--clip", type=amount, default=1.0, help="largest gradient norm; 0 is off (%(default)s)")
    add(
        "--time-dist",
        choices=["logit-normal", "uniform"],
        default="logit-normal",
        help="of t before the shift: released, paper (%(default)s)",
    )
    add("--shift", type=positive, help="of the times; 1 is off; default: sqrt(C G G / 4096), at least 1")
    add("--decoder", metavar="FILE", help="decoder checkpoint for the previews (%(default)s)")

    add = parser.add_argument_group("network").add_argument
    add(
        "--model",
        type=model_name,
        choices=MODELS,
        metavar="NAME",
        default="DiT-DH-XL",
        help="DiT-S, -B, -L, -XL or DiT-DH-S, -B, -L, -XL (%(default)s)",
    )
    add(
        "--prediction",
        choices=["v", "x"],
        default="v",
        help="velocity, or clean latents (RAEv2) (%(default)s)",
    )
    add("--base-depth", type=count, help="a second output after so many blocks, to guide by (RAEv2: 8)")
    for size in SIZES:
        add(f"--{size.replace('_', '-')}", type=count, help="instead of the model's own (%(default)s)")

    add = parser.add_argument_group("latents").add_argument
    add("--stats", metavar="FILE", help="latent statistics, or a flow's checkpoint; default: the data's own")
    add("--stats-images", type=count, default=50_000, help="images for that, drawn evenly (%(default)s)")
    add(
        "--cache-latents",
        action=argparse.BooleanOptionalAction,
        help="encode all images once, into memory (%(default)s)",
    )

    args = rae_encoder.parse_with_preset(parser, PRESETS, argv)
    # The copy is a link to last.pt, which must be of that step.
    if args.keep_every and args.keep_every % args.save_every:
        raise SystemExit(f"--keep-every {args.keep_every} is no multiple of --save-every {args.save_every}")
    return args


def model_name(text):
    """An argparse type: a network's name as the paper spells it, in which checkpoints are compared."""
    return text.upper().replace("DIT", "DiT")


def time_shift(t, a):
    """Shifted time a t / (1 + (a-1) t): the larger the latents, the more noise hides them (section 4.2)."""
    return a * t / (1 + (a - 1) * t)


def default_shift(latent_shape):
    """a = sqrt(C G G / 4096), at least 1: 6.93 for DINOv2-B at 256 px (section 4.2)."""
    return max(1.0, math.sqrt(math.prod(latent_shape) / 4096))


def draw_times(num, distribution, a, device):
    """`num` shifted times in [0,1]; logit-normal (0,1) is the released code's, uniform the paper's."""
    # Logit-normal times are rarely near data or noise.
    if distribution == "uniform":
        t = torch.rand(num, device=device)
    else:
        t = torch.randn(num, device=device).sigmoid()
    return time_shift(t, a)


def flow_loss(model, x, y, t, eps, prediction="v", with_base=False):
    """Mean squared error of the velocity v = eps - x at x_t = (1-t) x + t eps, in fp32 (section 2).

    x, eps: normalised latents and noise (B,C,G,G); y: labels (B,); t: times (B,) in [0,1]. For a network that
    predicts x the target is (x_t - x) / max(t, 0.05); a base's error is added to that of the full output
    (RAEv2, section 5).
    """
    # From data at t = 0 to noise at t = 1, each image at its own time
    t_x = t.view(-1, 1, 1, 1)
    x_t = (1 - t_x) * x + t_x * eps
    target = dit_dh.to_velocity(x, x_t, t, "x") if prediction == "x" else eps - x
    # All outputs have one target.
    outputs = model(x_t, t, y, with_base=True) if with_base else [model(x_t, t, y)]
    return sum((v.float() - target).square().mean() for v in outputs)


def learning_rate(step, hold, decay, lr, final_lr):
    """Constant for `hold` steps, then linear to final_lr at step `decay`, then constant."""
    progress = (step - hold) / (decay - hold)  # below 0 before, above 1 after
    return lr + (final_lr - lr) * min(max(progress, 0), 1)


def milestones(args, steps_per_epoch, steps):
    """The steps at which the decay of the learning rate begins and ends. SystemExit where it ends first."""
    # None: parts of the run, for epochs are of any length with a user's own images.
    hold = steps / 2 if args.hold_epochs is None else args.hold_epochs * steps_per_epoch
    decay = steps if args.decay_epochs is None else args.decay_epochs * steps_per_epoch
    if decay <= hold:
        problem = f"--hold-epochs ends at step {hold:g}, --decay-epochs at step {decay:g}"
        raise SystemExit(f"{problem}: the learning rate must be held first")
    return hold, decay


# Latents


def available_memory():
    """Bytes that this machine can give without swapping; infinite where it does not tell."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return math.inf
    kilobytes = re.search(r"MemAvailable:\s+(\d+)", meminfo.read_text())
    return 1024 * int(kilobytes[1])


class LatentCache:
    """The latents (N,2,C,G,G) of all images and of their mirrors, and labels (N,), in every rank's memory.

    seed: that of the data, whose mirroring it repeats. Raises SystemExit where they don't fit into memory.
    """

    @exact_fp32()  # the data's statistics are taken of them, too
    def __init__(self, encoder, data, batch_size, workers, rank, world):
        self.seed = data.seed
        # In fp32, as the encoder gives them; each rank of this machine has its own copy.
        shape = (len(data), 2, encoder.width, encoder.grid, encoder.grid)
        size = 4 * math.prod(shape) * int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if size > available_memory():
            raise SystemExit(f"--cache-latents: no memory for {size / 1e9:.1f} GB of latents; leave it out")
        self.latents = torch.zeros(shape)
        self.labels = torch.zeros(len(data), dtype=torch.int64)

        # Each rank encodes its share, in batches as of training.
        order = even_order(len(data), len(data), max(1, batch_size // world), rank, world)
        progress = tqdm(order, "latents", disable=rank > 0)
        for keys, (z, y) in zip(progress, encode_views(encoder, data, order, workers), strict=True):
            rows = [i for _, i in keys]
            self.latents[rows] = z.cpu()
            self.labels[rows] = y.cpu()

        # Each rank has its own rows, and zeros elsewhere: the sum is exact.
        if world > 1:
            for part in (*self.latents.split(256), self.labels):
                total = part.to(encoder.mean.device)
                dist.all_reduce(total)
                part.copy_(total)

    def __len__(self):
        return len(self.labels)

    def batch(self, keys):
        """Latents (B,C,G,G) and labels (B,), mirrored by the draws that ImageData makes."""
        rows = [i for _, i in keys]
        # The generator of image i in epoch e, as ImageData makes it
        mirrored = [int(is_mirrored(np.random.default_rng((self.seed, *key)))) for key in keys]
        return self.latents[rows, mirrored], self.labels[rows]


def load_latents(source, encoder, mean, var, order, workers):
    """Yields (normalised latents (B,C,G,G), labels (B,)) for each list of (epoch, index) in `order`.

    source: ImageData, whose images are encoded in fp32, as released, or a LatentCache.
    """
    device = mean.device
    if isinstance(source, LatentCache):
        batches = map(source.batch, order)
    else:
        images = load_images(source, order, device, workers)
        # In the order of the cache's memory: that is the order in which noise is drawn.
        batches = ((encoder(x).contiguous(), y) for x, y in images)
    # The 1e-5 is the released code's.
    for z, y in batches:
        yield (z.to(device) - mean) / (var + 1e-5).sqrt(), y.to(device)


def latent_moments(args, start, source, encoder, latent_shape, rank, world):
    """Mean and variance (C,G,G) that normalise the latents: of the run before, of --stats, or of the data."""
    kept = [start[key] for key in ("mean", "var") if key in start]
    # A file that is named is looked at, even where the run before has its own.
    if args.stats:
        moments = load_statistics(args.stats, latent_shape)
        if kept and not all(map(torch.equal, kept, moments)):
            raise SystemExit(f"--stats {args.stats}: not those of the run that goes on; leave it out")
        return moments
    if kept:
        return kept

    # At least one image for each rank
    num = max(world, min(args.stats_images, len(source)))
    order = even_order(len(source), num, max(1, args.batch_size // world), rank, world)
    if isinstance(source, LatentCache):
        # On the device, since that is where ranks exchange the sums.
        device = encoder.mean.device
        return latent_statistics(source.latents[[i for _, i in keys]].to(device) for keys in order)
    # Unmirrored, since each image counts with its mirror.
    whole = copy.copy(source)
    whole.augment = None
    views = encode_views(encoder, whole, order, args.workers)
    return latent_statistics(z for z, _ in tqdm(views, "latent statistics", len(order), disable=rank > 0))


# One step


def train_step(
    model, optimizer, x, y, *, time_dist, shift, clip, accum, precision, prediction="v", with_base=False
):
    """One update by latents x (B,C,G,G) and labels y (B,) in `accum` micro-batches.

    Returns ({"loss", "gradient_norm"}, finite); where one of the two is not finite nothing is updated.
    """
    t = draw_times(len(x), time_dist, shift, x.device)
    eps = torch.randn_like(x)
    loss = torch.zeros((), device=x.device)
    optimizer.zero_grad()
    # These draws come first, so that micro-batches see those of one large batch. (The network drops labels.)
    chunks = (value.chunk(accum) for value in (x, y, t, eps))
    for k, micro_batch in enumerate(zip(*chunks, strict=True)):
        model.require_backward_grad_sync = k == accum - 1  # DDP exchanges gradients once a step
        with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16"):
            micro_loss = flow_loss(model, *micro_batch, prediction, with_base) / accum
        micro_loss.backward()
        loss += micro_loss.detach()
    loss = mean_over_ranks(loss)
    # Equal on all ranks, since DDP has averaged the gradients: they decide alike.
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf)
    finite = bool(torch.isfinite(loss + norm))
    if finite:
        optimizer.step()
    return {"loss": loss, "gradient_norm": norm}, finite


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


def build(args, classes, device):
    """(encoder, network, config), as the flags say."""
    torch.manual_seed(args.seed)  # all ranks and runs start alike
    encoder = Encoder(args.encoder, args.encoder_size, args.image_size, args.encoder_weights, args.layers)
    latent_shape = [encoder.width, encoder.grid, encoder.grid]
    sizes = {name: getattr(args, name) for name in SIZES}
    network = dit_dh.build(args.model, latent_shape, len(classes), args.prediction, args.base_depth, **sizes)
    network.checkpoint_activations = args.checkpoint_activations
    if args.init:
        initialise(network, args.init)

    # What sample.py needs to know
    config = {
        "encoder": args.encoder,
        "encoder_hash": encoder.hash,
        "encoder_size": encoder.encoder_size,
        "image_size": args.image_size,
        "model": args.model,
        "sizes": network.sizes,
        "prediction": args.prediction,
        "base_depth": args.base_depth,
        "layers": args.layers,
        "latent_shape": latent_shape,
        "classes": classes,
        "num_classes": len(classes),
        "shift": args.shift or default_shift(latent_shape),
    }
    return encoder.to(device), network.to(device), config


def initialise(network, path):
    """--init: the weights of `path`, ours or released.

    For another number of classes, of the labels only "no class" is taken. SystemExit for other sizes.
    """
    source = dit_dh.load(local_file(path, "--init"), "--init")
    for name in ("sizes", "latent_shape", "prediction", "base_depth"):
        theirs, ours = (getattr(model, name) for model in (source, network))
        if theirs != ours:
            raise SystemExit(f"--init {path} has {name} {theirs}, this run {ours}")
    # "No class" is the last row of the labels, and means the same for any data.
    weights = source.state_dict()
    if source.num_classes != network.num_classes:
        table = "y_embedder.embedding_table.weight"
        weights[table] = torch.cat([network.state_dict()[table][:-1], weights[table][-1:]])
    network.load_state_dict(weights)


def check_decoder(path, config):
    """Raises SystemExit for a --decoder that can't decode this run's latents."""
    # Found now and not at the first preview.
    decoder = read_weights(path, "--decoder")
    if decoder.get("format") == FORMAT:
        raise SystemExit(f"--decoder {path}: is a flow of flow_train.py, not a decoder")
    check_pair(config, "this run", decoder.get("config", {}), f"--decoder {path}")


def save_preview(folder, step, log, last, decoder, num_classes, device):
    """Samples of the EMA, by the sampler that users run: the grid preview-STEP.png, a column a class."""
    torch.cuda.empty_cache()  # sample.py works on the same GPU; does nothing without one
    # A process of its own, with the flags that a user would give.
    samples = f"{folder}/preview-{step:07d}"
    shutil.rmtree(samples, ignore_errors=True)  # of a step that is trained again
    # Four of each class, in ten columns at most
    classes = [str(number) for number in range(min(num_classes, 10))]
    sampler = Path(__file__).with_name("sample.py")
    command = [sys.executable, sampler, "--flow", last, "--decoder", decoder, "--out", samples]
    command += ["--classes", ",".join(classes), "--num", str(4 * len(classes))]
    command += ["--device", device.type, "--no-compile"]
    if subprocess.run(command, env=os.environ | {"RANK": "0", "WORLD_SIZE": "1"}).returncode:
        tqdm.write(f"{samples}: no preview, see above; training goes on", file=sys.stderr)
    else:
        log_picture(log, step, f"{samples}.png")


def main(argv=None):
    args = parse_args(argv)
    rank, world, device = rae_encoder.set_up(args)

    # What is trained, on what
    augment = None if args.cache_latents else "flip"  # the cache has both views of an image
    data = ImageData(args.data, args.image_size, augment, args.seed, args.skip_broken)
    steps_per_epoch, steps = plan_steps(len(data), args, world)
    hold, decay = milestones(args, steps_per_epoch, steps)
    log = open_log(args.out) if rank == 0 else None
    encoder, network, config = build(args, data.classes, device)
    if args.decoder:
        check_decoder(args.decoder, config)
    ema = copy.deepcopy(network).requires_grad_(False)
    optimizer = adamw(network, args.lr)
    state = {"model": network, "ema": ema, "optimizer": optimizer}

    # Where a run before this one stopped; the latents' statistics come from there, a file or the data
    last = f"{args.out}/last.pt"
    start = resume(args.resume, last, device, config, state, steps)
    step = start["step"]
    precision, why = rae_encoder.choose_precision(args.precision or start.get("precision"), device)
    source = data
    if args.cache_latents:
        source = LatentCache(encoder, data, args.batch_size, args.workers, rank, world)
    moments = latent_moments(args, start, source, encoder, config["latent_shape"], rank, world)
    mean, var = (moment.to(device) for moment in moments)
    model = parallel(network, network.blocks, args.compile, device)

    # What a user sees
    models = f"{args.encoder} {config['latent_shape']}, shift {config['shift']:.2f}; {args.model}"
    run = f"{world} x {device.type}, {precision} ({why}); step {step} of {steps}"
    announce(log, args, data, models, network, run)
    progress = tqdm(total=steps, initial=step, unit="step", disable=rank > 0)

    # Train: everything that happens at a step, in the order in which it happens
    options = {name: getattr(args, name) for name in ("time_dist", "clip", "accum", "prediction")}
    options["shift"] = config["shift"]
    options["precision"] = precision
    options["with_base"] = args.base_depth is not None
    order = training_order(len(data), args.batch_size, args.seed, step, steps, rank, world)
    signals = catch_signals()
    recent = []
    skipped = []
    since = time.time()
    for x, y in load_latents(source, encoder, mean, var, order, args.workers):
        seed_step(args.seed, step, rank)
        lr = set_learning_rate(optimizer, learning_rate(step, hold, decay, args.lr, args.final_lr))
        terms, finite = train_step(model, optimizer, x, y, **options)
        if finite:
            update_ema(ema, network, args.ema)
        step += 1

        # What was skipped counts as a step, but not in the means of the log.
        recent.append(terms if finite else {})
        if not finite:
            skipped.append(step)
            report_skipped(skipped, terms, progress, precision, last)

        stopped = any_rank(bool(signals), device)
        final = stopped or step == steps
        progress.update()
        if final or step % args.log_every == 0:
            since = report(log, progress, step, recent, args.batch_size, since, lr=lr, skipped=len(skipped))
        # sample.py reads the checkpoint, so a preview comes after it.
        preview = args.decoder and args.preview_every and step % args.preview_every == 0
        if rank == 0 and (final or preview or step % args.save_every == 0):
            save(last, args, state, step, config=config, precision=precision, mean=mean.cpu(), var=var.cpu())
        if rank == 0 and preview:
            save_preview(args.out, step, log, last, args.decoder, len(data.classes), device)
        if stopped:
            break
    leave(log, progress, data, device, last, step, steps, "python sample.py --flow")


if __name__ == "__main__":
    rae_encoder.run(main)
