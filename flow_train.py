"""Stage 2 of RAE: train a velocity network by flow matching in the latent space of the frozen encoder.

Zheng et al. 2025, Diffusion Transformers with Representation Autoencoders, arXiv 2510.11690, sections 4, 5.
"Released" means the authors' code and files; comments say where these differ from the paper.
Images are encoded as training goes, or once and for all (--cache-latents). Data, encoder and image size come
from the decoder's checkpoint, runs/decoder/last.pt or --decoder, where flags don't say otherwise.

    torchrun flow_train.py                        # after rae_decoder_train.py, on the same images
    python flow_train.py --decoder runs/mine/decoder/last.pt --out runs/mine/flow
    torchrun --nproc_per_node 8 flow_train.py --preset imagenet256 --data imagenet/train --decoder decoder.pt

Letters in shapes: B batch, C token width, G tokens a side, V views of an image (it and its mirror).
t in [0,1]: t=0 is data, t=1 is noise.
"""

import argparse
import copy
import math
import os
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

import dit_dh
import rae_encoder
from rae_encoder import (
    DEMO,
    RAEV2,
    SMALL,
    ImageData,
    check_same,
    encode_views,
    even_order,
    exact_fp32,
    is_mirrored,
    latent_statistics,
    load_images,
    load_statistics,
    non_negative_float,
    positive_float,
    positive_int,
    read_weights,
    training_order,
    write_file,
    write_log,
)

# Presets list only what differs from the flag defaults; those are the released recipe.
PRESETS = {
    "demo": DEMO
    | {
        "model": "DiT-DH-mini",
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
    "small": SMALL
    | {
        "model": "DiT-DH-XS",  # a token has 384 channels, so the head has more (section 4.1)
        "prediction": "x",  # in a short training the better samples
        "label_std": 1.0,  # beside time embeddings of norm 10 the released 0.02 is learned too late
        "batch_size": 8,  # many small steps, for the same reason
        "steps": 2000,  # 18 minutes on one core in bf16
        "hold_epochs": None,  # half of the run
        "decay_epochs": None,  # the end of the run
        "lr": 1e-3,
        "ema": 0.995,
        "log_every": 50,
        "preview_every": 500,
        "save_every": 250,
    },
    # Eight GPUs of 80 GB hold these micro-batches in fp32 too: at most 8192 tokens each.
    "imagenet256": {"epochs": 1400, "accum": 4},
    "imagenet512": {"epochs": 1400, "accum": 16, "image_size": 512},
    "raev2": RAEV2
    | {"prediction": "x", "base_depth": 8, "epochs": 80, "hold_epochs": 25, "decay_epochs": 50, "accum": 4},
}
FORMAT = "rae-flow/1"  # of the checkpoints
DECODER = "runs/decoder/last.pt"  # where stage 1 leaves its checkpoint by default


# Flow matching


def time_shift(t, a):
    """Shifted time a t / (1 + (a-1) t): large latents need more noise to be hidden (section 4.2)."""
    return a * t / (1 + (a - 1) * t)


def default_shift(latent_shape):
    """a = sqrt(C G G / 4096), at least 1: 6.93 for DINOv2-B at 256 px (section 4.2)."""
    return max(1.0, math.sqrt(math.prod(latent_shape) / 4096))


def draw_times(num, distribution, a, device):
    """`num` shifted times in [0,1]; logit-normal (0,1) is the released code's, uniform the paper's."""
    if distribution == "uniform":
        t = torch.rand(num, device=device)
    else:
        # Logit-normal times are rarely near data or noise.
        t = torch.randn(num, device=device).sigmoid()
    return time_shift(t, a)


def flow_loss(model, x, y, t, eps, prediction="v", with_base=False):
    """Mean squared error of the velocity v = eps - x at x_t = (1-t) x + t eps, in fp32 (section 2).

    x, eps: normalised latents and noise (B,C,G,G); y: labels (B,); t: times (B,) in [0,1]. For a network that
    predicts x the target is (x_t - x) / max(t, 0.05); a base's error is added to that of the full output
    (RAEv2, section 5).
    """
    # Each image has its own time.
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


def train_step(
    model, optimizer, x, y, *, time_dist, shift, clip, accum, precision, prediction="v", with_base=False
):
    """One update by latents x (B,C,G,G) and labels y (B,) in `accum` micro-batches.

    Returns ({"loss", "gradient_norm"}, finite); where one of the two is not finite nothing is updated.
    """
    # All draws are for the whole batch, so that --accum does not change them. (Label dropout is drawn per
    # micro-batch, by the network.)
    t = draw_times(len(x), time_dist, shift, x.device)
    eps = torch.randn_like(x)
    loss = 0
    optimizer.zero_grad()
    chunks = (value.chunk(accum) for value in (x, y, t, eps))
    for k, micro_batch in enumerate(zip(*chunks, strict=True)):
        model.require_backward_grad_sync = k == accum - 1  # DDP exchanges gradients once a step
        with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16"):
            micro_loss = flow_loss(model, *micro_batch, prediction, with_base) / accum
        micro_loss.backward()
        loss += micro_loss.detach()
    loss = mean_over_ranks(loss)
    # DDP averaged the gradients, so every rank computes the same norm and takes the same decision.
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf)
    finite = bool(torch.isfinite(loss + norm))
    if finite:
        optimizer.step()
    return {"loss": loss, "gradient_norm": norm}, finite


# Latents


class LatentCache:
    """The latents (N,V,C,G,G) of all images and, with flip, of their mirrors, and labels (N,), in memory.

    seed: that of the data, whose mirroring it repeats. Each rank makes its own copy, in fp32.
    """

    @exact_fp32()  # statistics are taken of these latents
    def __init__(self, encoder, data, flip, share, workers, rank):
        self.seed = data.seed
        self.flip = flip
        self.latents = torch.zeros(len(data), 1 + flip, encoder.width, encoder.grid, encoder.grid)
        self.labels = torch.zeros(len(data), dtype=torch.int64)

        # Batches have the size of this rank's share of a training batch.
        order = even_order(len(data), len(data), share)
        progress = tqdm(order, "latents", disable=rank > 0)
        views = encode_views(encoder, data, order, workers, flip)
        for keys, (z, y) in zip(progress, views, strict=True):
            rows = [i for _, i in keys]
            self.latents[rows] = z.cpu()
            self.labels[rows] = y.cpu()

    def batch(self, keys):
        """Latents (B,C,G,G) and labels (B,), mirrored by the draws that ImageData makes."""
        rows = [i for _, i in keys]
        views = []  # 1 is the mirror
        for key in keys:
            # ImageData makes the same generator for image i in epoch e.
            rng = np.random.default_rng((self.seed, *key))
            views.append(int(self.flip and is_mirrored(rng)))
        return self.latents[rows, views], self.labels[rows]


def load_latents(source, encoder, mean, var, order, workers):
    """Yield normalised latents (B,C,G,G) and labels (B,) for each list of (epoch, index) in `order`.

    source: ImageData, whose images are encoded in fp32, as released, or a LatentCache.
    """
    device = mean.device
    std = (var + 1e-5).sqrt()  # the 1e-5 is the released code's
    if isinstance(source, LatentCache):
        for keys in order:
            z, y = source.batch(keys)
            yield (z.to(device) - mean) / std, y.to(device)
    else:
        for images, y in load_images(source, order, device, workers):
            # randn_like draws in the order of strides: contiguous as the cache's, they draw the same noise.
            z = encoder(images).contiguous()
            yield (z - mean) / std, y


def open_latents(args, start, config, encoder, data, rank, world):
    """(source, mean, var): images or with --cache-latents a LatentCache, and statistics (C,G,G).

    The statistics come from the run before, from --stats, or from the data.
    """
    share = args.batch_size // world
    source = data
    if args.cache_latents:
        source = LatentCache(encoder, data, args.flip, share, args.workers, rank)

    device = encoder.mean.device
    moments = load_statistics(args.stats, config) if args.stats else None
    if start:
        before = [start["mean"].clone(), start["var"].clone()]  # the file is mapped, and will be replaced
        # Another file is an error, since it would be ignored in silence.
        if moments and not all(map(torch.equal, moments, before)):
            raise SystemExit(f"--stats {args.stats}: not those of the run that goes on; leave it out")
        moments = before
    if moments:
        return source, *(moment.to(device) for moment in moments)

    # Each rank needs at least one image.
    num = max(world, min(args.stats_images, len(data)))
    order = even_order(len(data), num, share, rank, world)
    if args.cache_latents:
        # latent_statistics adds up on the device, where ranks exchange the sums.
        batches = (source.latents[[i for _, i in keys]].to(device) for keys in order)
    else:
        views = encode_views(encoder, data, order, args.workers, args.flip)
        batches = (z for z, _ in tqdm(views, "latent statistics", len(order), disable=rank > 0))
    return source, *latent_statistics(batches)


# The run


@rae_encoder.keeps_process_settings()
def main(argv=None):
    args = parse_args(argv)
    rank, world, device = rae_encoder.set_up(args)

    # Images, networks, optimizer
    data = ImageData(args.data, args.image_size, seed=args.seed, skip_broken=args.skip_broken)
    steps, hold, decay = schedule(args, len(data), world)
    log = rae_encoder.open_log(args.out) if rank == 0 else None
    start = rae_encoder.read_start(args, FORMAT, data.hash)
    encoder, network, ema, config = open_networks(args, data.classes, device)
    decoder_id = identify_decoder(args.decoder, config)
    optimizer = adamw(network)
    state = {"model": network, "ema": ema, "optimizer": optimizer}

    # The checkpoint of a run that stopped before this one
    step = first = resume(start, config, state, steps)
    rae_encoder.check_ranks_agree(step=step, images=data.hash, encoder=encoder.hash, decoder=decoder_id)
    precision, why = rae_encoder.choose_precision(args.precision or start.get("precision"), device)
    source, mean, var = open_latents(args, start, config, encoder, data, rank, world)
    # Statistics and caches have both views of an image, a training step has one of them.
    data.augment = "flip" if args.flip else None
    model = rae_encoder.parallel(network, network.blocks, args.compile, device)
    # Added after resume has compared the configs: a run that goes on may have another decoder.
    config["decoder"] = decoder_id
    checkpoint = {"config": config, "precision": precision, "images": data.hash}
    checkpoint.update(mean=mean.cpu(), var=var.cpu())

    # First line of output and progress bar
    networks = f"{rae_encoder.encoder_summary(args, encoder)}, shift {config['shift']:.2f}; {args.model}"
    computing = f"{world} x {device.type}, {precision} ({why})"
    progress = rae_encoder.first_line(args, rank, data, networks, network, computing, step, steps)

    # Train: everything that happens at a step, in the order in which it happens
    order = training_order(len(data), args.batch_size, args.seed, step, steps, rank, world)
    latents = load_latents(source, encoder, mean, var, order, args.workers)
    stops = rae_encoder.catch_signals()
    skipped = Counter()
    recent = defaultdict(list)  # the terms since the last report
    for x, y in until_stopped(latents, stops, device):
        seed_step(args.seed, step, rank)
        lr = learning_rate(step, hold, decay, args.lr, args.final_lr)
        optimizer.param_groups[0]["lr"] = lr
        terms, finite = train_step(
            model,
            optimizer,
            x,
            y,
            time_dist=args.time_dist,
            shift=config["shift"],
            clip=args.clip,
            accum=args.accum,
            precision=precision,
            prediction=args.prediction,
            with_base=args.base_depth is not None,
        )
        if finite:
            update_ema(ema, network, rae_encoder.ema_decay(args, steps))
        step += 1
        record_update("network", step, terms, finite, recent, skipped, stops, progress)

        final = step == steps
        if final or stops or step % args.log_every == 0:
            report(log, progress, step, recent, lr, skipped)
        preview = decoder_id and args.preview_every and (final or step % args.preview_every == 0)
        if rank == 0 and (final or preview or step % args.save_every == 0):
            save(args, state, step, checkpoint)
        if rank == 0 and preview:
            save_preview(args.out, step, log, args.decoder, len(data.classes), device)
        progress.update()

    # A run that ends early leaves its last good step.
    if rank == 0 and first < step < steps:
        save(args, state, step, checkpoint)
    command = rae_encoder.next_command("sample.py", 1, "--flow", args.out, "samples")
    rae_encoder.end_of_run(args, rank, progress, step, steps, data, device, stops, command)


def open_networks(args, classes, device):
    """(encoder, network, EMA, config), as the flags say; config is for sample.py and a run that goes on."""
    torch.manual_seed(args.seed)  # all ranks and runs start alike
    encoder = rae_encoder.open_encoder(args)
    latent_shape = encoder.config()["latent_shape"]
    network = dit_dh.build(
        args.model,
        latent_shape,
        len(classes),
        args.prediction,
        args.base_depth,
        width=args.width,
        depth=args.depth,
        heads=args.heads,
        head_width=args.head_width,
        head_depth=args.head_depth,
        head_heads=args.head_heads,
    )
    network.checkpoint_activations = args.checkpoint_activations
    # The table is drawn with the released 0.02, so only its scale depends on the flag.
    network.y_embedder.embedding_table.weight.data *= args.label_std / 0.02
    config = {
        **encoder.config(),
        "image_size": args.image_size,
        "flip": args.flip,
        "model": args.model,
        "sizes": network.sizes,
        "prediction": args.prediction,
        "base_depth": args.base_depth,
        "classes": classes,
        "num_classes": len(classes),
        "shift": args.shift or default_shift(latent_shape),
    }
    if args.init:
        initialise(network, config, args.init)
    network.to(device)
    return encoder.to(device), network, copy.deepcopy(network).requires_grad_(False), config


def initialise(network, config, path):
    """Load --init, a flow of the same latents and sizes, into the network.

    For other classes only "no class" is taken of the labels. Raises SystemExit for other latents or sizes.
    """
    released = dit_dh.load(rae_encoder.local_file(path, "--init"), "--init")
    source = released.config
    keys = (*rae_encoder.LATENTS, "image_size", "sizes", "prediction", "base_depth")
    check_same(config, "this run", source, f"--init {path}", keys)

    weights = released.state_dict()
    # "No class" is the last row of the labels, and means the same for any data.
    if (
        source.get("classes", config["classes"]) != config["classes"]
        or released.num_classes != network.num_classes
    ):
        table = "y_embedder.embedding_table.weight"
        weights[table] = torch.cat([network.state_dict()[table][:-1], weights[table][-1:]])
    network.load_state_dict(weights)


def identify_decoder(path, config):
    """{"path", "hash"} of the decoder that previews and sample.py use, or None.

    Raises SystemExit for one that can't decode this run's latents.
    """
    if not path:
        return None
    file = read_weights(path, "--decoder")
    if file.get("format") == FORMAT:
        raise SystemExit(f"--decoder {path}: is a flow of flow_train.py, not a decoder")
    check_same(config, "this run", file.get("config", {}), f"--decoder {path}")
    return {"path": path, "hash": rae_encoder.weights_hash(file)}


def schedule(args, images, world):
    """Steps of the run, and those at which the decay of the learning rate begins and ends."""
    steps_per_epoch, steps = rae_encoder.plan_steps(images, args, world)
    # None (preset small): fractions of the run, because an epoch of a user's data can have any length.
    hold = steps / 2 if args.hold_epochs is None else args.hold_epochs * steps_per_epoch
    decay = steps if args.decay_epochs is None else args.decay_epochs * steps_per_epoch
    if decay <= hold:
        problem = f"--hold-epochs ends at step {hold:g}, --decay-epochs at step {decay:g}"
        raise SystemExit(f"{problem}: the learning rate must be held first")
    return steps, hold, decay


def save_preview(folder, step, log, decoder, num_classes, device):
    """Draw samples of the EMA by sample.py, as a user would: four a class, the grid preview-STEP.png."""
    torch.cuda.empty_cache()  # sample.py works on the same GPU
    samples = f"{folder}/preview-{step:07d}"
    shutil.rmtree(samples, ignore_errors=True)  # of a step that is trained again
    sampler = Path(__file__).with_name("sample.py")
    command = [sys.executable, sampler, "--flow", f"{folder}/last.pt", "--decoder", decoder, "--out", samples]
    command += ["--num", str(4 * min(num_classes, 10)), "--device", device.type, "--no-compile"]
    if subprocess.run(command, env=os.environ | {"RANK": "0", "WORLD_SIZE": "1"}).returncode:
        tqdm.write(f"{samples}: no preview, see above; training goes on", file=sys.stderr)
    else:
        rae_encoder.log_picture(log, step, f"{samples}.png")


# Flags


def parse_args(argv=None):
    parser, training = rae_encoder.training_parser(__doc__)
    parser.set_defaults(batch_size=1024, out="runs/flow", preview_every=10_000, ema=0.9995)
    add = training.add_argument
    add(
        "--hold-epochs", type=non_negative_float, default=40, help="at --lr (%(default)s; small: half of all)"
    )
    add("--decay-epochs", type=positive_float, default=800, help="end of decay (%(default)s; small: the end)")
    add(
        "--label-std",
        type=positive_float,
        default=0.02,
        help="standard deviation of the class embeddings at the start, released (%(default)s; small: 1)",
    )
    add("--clip", type=non_negative_float, default=1.0, help="largest gradient norm; 0 is off (%(default)s)")
    add(
        "--time-dist",
        choices=["logit-normal", "uniform"],
        default="logit-normal",
        help="of t before the shift: released, paper (%(default)s)",
    )
    add(
        "--shift", type=positive_float, help="of the times; 1 is off; default: sqrt(C G G / 4096), at least 1"
    )
    add(
        "--decoder",
        metavar="FILE",
        help=f"gives data, encoder, sizes, and decodes previews; default: {DECODER}, if it is of the images",
    )

    add = parser.add_argument_group("network").add_argument
    add("--model", choices=dit_dh.NAMES, default="DiT-DH-XL", help="(%(default)s)")
    add("--prediction", choices=["v", "x"], default="v", help="velocity, or clean latents (%(default)s)")
    add(
        "--base-depth", type=positive_int, help="a second output after so many blocks, to guide by (RAEv2: 8)"
    )
    for size in dit_dh.DIMENSIONS:
        add(f"--{size.replace('_', '-')}", type=positive_int, help="default: the model's own")

    add = parser.add_argument_group("latents").add_argument
    add("--stats", metavar="FILE", help="latent statistics, or a flow's checkpoint; default: the data's own")
    add(
        "--stats-images",
        type=positive_int,
        default=50_000,
        help="images for that, drawn evenly (%(default)s)",
    )
    add("--cache-latents", action=argparse.BooleanOptionalAction, help="encode all images once, into memory")
    explicit = rae_encoder.explicit_flags(parser, argv)
    return rae_encoder.with_preset(parser, PRESETS, explicit, decoder_flags(explicit))


def decoder_flags(explicit):
    """The flags that the decoder's checkpoint decides, as {name: value}, where it is this project's.

    Raises SystemExit where --encoder names another encoder.
    """
    path = explicit.get("decoder", DECODER)
    if not path or ("decoder" not in explicit and not os.path.exists(path)):
        return {}
    file = read_weights(path, "--decoder")
    if file.get("format") != "rae-decoder/1":
        return {"decoder": path}
    known = file["args"]

    # A decoder in the default place may be of another training.
    if "decoder" not in explicit:
        data = explicit.get("data", known["data"])
        other_data = os.path.realpath(data) != os.path.realpath(known["data"])
        if other_data or explicit.get("preset", known["preset"]) != known["preset"]:
            return {}
    encoder = rae_encoder.timm_name(explicit.get("encoder", known["encoder"]))
    # An encoder may have to be fetched before its latents can be compared.
    check_same({"encoder": encoder}, "this run", file["config"], f"--decoder {path}")
    names = (
        "data",
        "preset",
        "skip_broken",
        "flip",
        "image_size",
        "patch_size",
        "encoder",
        "encoder_weights",
        "encoder_size",
        "layers",
    )
    return {"decoder": path, **{name: known[name] for name in names}}


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
