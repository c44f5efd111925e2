"""Stage 2 of RAE: train a velocity network by flow matching in the latent space of the frozen encoder.

Zheng et al. 2025, Diffusion Transformers with Representation Autoencoders, arXiv 2510.11690, sections 4, 5.
Images are encoded as training goes; the times are shifted by the size of the latents (section 4.2).

    torchrun flow_train.py
    torchrun --nproc_per_node 8 flow_train.py --preset imagenet256 --data imagenet/train --decoder decoder.pt
    torchrun flow_train.py --data my_images --image-size 64 --encoder dinov2-small --model DiT-DH-S

The first line is the demo, after rae_decoder_train.py: three minutes on a laptop's CPU.
Letters in shapes: B batch, C token width, G tokens a side. t in [0,1]: t=0 is data, t=1 is noise.
"""

import copy
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import dit_dh
import rae_encoder
from rae_encoder import DEMO, Encoder, ImageData, load_images, read_weights, training_order

# Paper, appendix: 1,400 epochs of 1024 images; AdamW 2e-4, from epoch 40 to 800 down to 2e-5; EMA 0.9995.
IMAGENET = dict(
    encoder="dinov2-base", image_size=256, model="DiT-DH-XL", time_dist="logit-normal", stats_images=50_000,
    batch_size=1024, accum=1, epochs=1400, lr=2e-4, final_lr=2e-5, hold_epochs=40, decay_epochs=800, clip=1.0,
    ema=0.9995, precision="bf16", log_every=100, preview_every=10_000, save_every=2500, workers=8, seed=0,
    out="runs/flow",
)  # fmt: skip
PRESETS = {
    "demo": IMAGENET | DEMO | dict(
        decoder="runs/decoder/last.pt", model="DiT-DH-S", width=128, depth=4, heads=4, head_width=128,
        head_depth=2, head_heads=4, batch_size=64, epochs=40, hold_epochs=12, decay_epochs=40, lr=2e-3,
        ema=0.99, precision="fp32", log_every=20, preview_every=0, save_every=200, workers=2,
    ),
    "imagenet256": IMAGENET,
    "imagenet512": IMAGENET | dict(image_size=512),
}  # fmt: skip


# ----------------------------------------------------------------------------------------- flow matching


def time_shift(t, a):
    """Shifted time a t / (1 + (a-1) t): the larger the latents, the more noise hides them (section 4.2)."""
    return a * t / (1 + (a - 1) * t)


def default_shift(latent_shape):
    """a = sqrt(C G G / 4096), at least 1: 6.93 for DINOv2-B at 256 px (section 4.2)."""
    return max(1.0, math.sqrt(math.prod(latent_shape) / 4096))


def draw_times(num, distribution, a, device):
    """`num` shifted times in [0,1]; logit-normal (0,1) is the released code's, uniform the paper's."""
    t = (
        torch.rand(num, device=device)
        if distribution == "uniform"
        else torch.randn(num, device=device).sigmoid()
    )
    return time_shift(t, a)


def flow_loss(model, x, y, t, eps):
    """Mean squared error of the velocity v = eps - x at x_t = (1-t) x + t eps, in fp32 (section 2).

    x, eps: normalised latents and noise (B,C,G,G); y: labels (B,); t: times (B,) in [0,1].
    """
    t_x = t.view(-1, 1, 1, 1)
    v = model((1 - t_x) * x + t_x * eps, t, y)
    return (v.float() - (eps - x)).square().mean()


def learning_rate(epoch, args):
    """Constant for hold_epochs, then linear to final_lr at decay_epochs, then constant."""
    progress = (epoch - args.hold_epochs) / (args.decay_epochs - args.hold_epochs)
    return args.lr + (args.final_lr - args.lr) * min(max(progress, 0), 1)


def train_step(model, optimizer, x, y, args, shift):
    """One update by latents x (B,C,G,G) and labels y (B,) in `accum` micro-batches.

    Returns (loss, gradient norm); where one of the two is not finite nothing is updated.
    """
    t, eps = draw_times(len(x), args.time_dist, shift, x.device), torch.randn_like(x)
    optimizer.zero_grad()
    loss = torch.zeros((), device=x.device)
    chunks = (value.chunk(args.accum) for value in (x, y, t, eps))
    for k, micro_batch in enumerate(zip(*chunks, strict=True)):
        model.require_backward_grad_sync = k == args.accum - 1  # DDP exchanges gradients once a step
        with torch.autocast(x.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            micro_loss = flow_loss(model, *micro_batch) / args.accum
        micro_loss.backward()
        loss += micro_loss.detach()
    loss = sum_over_ranks(loss) / (dist.get_world_size() if dist.is_initialized() else 1)
    norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip or math.inf)
    if torch.isfinite(loss + norm):
        optimizer.step()
    return loss, norm


# ----------------------------------------------------------------------------------- ranks, checkpoints


def join_ranks():
    """Joins torchrun's process group, if there is one; returns (rank, world size, device)."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return rank, world, device


def sum_over_ranks(values):
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def open_log(folder):
    """metrics.jsonl to append to, and a TensorBoard writer where that package is installed, else None."""
    file = open(os.path.join(folder, "metrics.jsonl"), "a", buffering=1)  # noqa: SIM115
    if not importlib.util.find_spec("tensorboard"):
        return file, None
    from torch.utils.tensorboard import SummaryWriter

    return file, SummaryWriter(folder)


def write_log(log, step, record):
    file, board = log
    print(json.dumps({"step": step} | record), file=file)
    for name, value in record.items() if board else ():
        board.add_scalar(name, value, step)


def save(checkpoint, path):
    """Written beside it, flushed, renamed over it: a reader never sees half a file."""
    with open(path + ".tmp", "wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".tmp", path)


def resume(path, config, **state):
    """Loads what `save` wrote into the networks and optimizers of `state`; returns (step, mean, var)."""
    checkpoint = read_weights(path)
    if checkpoint.get("format") != "rae-flow/1":
        raise SystemExit(f"--resume {path}: not a rae-flow/1 checkpoint")
    for key, value in config.items():
        if checkpoint["config"][key] != value:
            was = checkpoint["config"][key]
            raise SystemExit(f"{path} has {key} {was}, this run {value}: same flags, or another --out")
    for name, owner in state.items():
        owner.load_state_dict(checkpoint[name])
    return checkpoint["step"], checkpoint["mean"], checkpoint["var"]


# ------------------------------------------------------------------------------------------------- main


def build(args, classes, device):
    """Returns (encoder, network, config); config is what sample.py needs to know of them."""
    encoder = Encoder(args.encoder, args.encoder_size, args.image_size, args.encoder_weights)
    latent_shape = [encoder.width, encoder.grid, encoder.grid]
    names = ("width", "depth", "heads", "head_width", "head_depth", "head_heads")
    sizes = {name: getattr(args, name) for name in names if getattr(args, name)}
    network = dit_dh.build(args.model, latent_shape, len(classes), **sizes)
    config = {key: getattr(args, key) for key in ("encoder", "encoder_weights", "image_size", "model")}
    config |= dict(encoder_size=encoder.encoder_size, latent_shape=latent_shape)
    config |= dict(sizes=network.sizes, classes=classes)
    config |= dict(num_classes=len(classes), shift=args.shift or default_shift(latent_shape))
    if args.decoder:
        decoder = read_weights(args.decoder).get("config", {})
        for key in ("encoder", "encoder_size", "encoder_weights", "latent_shape"):
            # Of a file of weights the name counts: its folder differs from machine to machine.
            there, here = (os.path.basename(str(c.get(key, config[key]))) for c in (decoder, config))
            if there != here:
                raise SystemExit(f"--decoder {args.decoder} has {key} {there}, this run {here}")
    return encoder.to(device), network.to(device), config


def check_batch(args, num_images, world):
    """Steps an epoch. Raises SystemExit for a batch that data, ranks or micro-batches can't share."""
    batch = args.batch_size
    if num_images < batch:
        raise SystemExit(f"--data {args.data}: {num_images} images, fewer than --batch-size {batch}")
    if batch % (world * args.accum):
        raise SystemExit(f"--batch-size {batch} is no multiple of {world} ranks x {args.accum} --accum")
    return num_images // batch


def say_what_runs(args, data, config, network, devices, step, steps):
    demo = "The demo: its numbers compare with nothing. " if args.data == DEMO["data"] else ""
    parameters = sum(p.numel() for p in network.parameters()) / 1e6
    print(
        f"{demo}{len(data)} images of {args.data}, {len(data.classes)} classes; {args.encoder} "
        f"{config['latent_shape']}, shift {config['shift']:.2f}; {args.model} ({parameters:.1f} M "
        f"parameters); {devices}, {args.precision}; step {step} of {steps}",
        file=sys.stderr,
    )


def save_preview(args, checkpoint, step, num_classes):
    """Samples of the EMA, by the sampler that users run: PNG grid preview-STEP.png."""
    sampler = os.path.join(os.path.dirname(os.path.abspath(__file__)), "sample.py")
    folder = os.path.join(args.out, f"preview-{step:07d}")
    flags = ["--flow", checkpoint, "--decoder", args.decoder, "--out", folder]
    flags += ["--num", str(4 * min(num_classes, 10))]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    if subprocess.run([sys.executable, sampler, *flags], env=environment).returncode:
        print(f"{folder}: no preview, see above; training goes on", file=sys.stderr)


def latent_moments(args, encoder, config, rank, world):
    """Mean and variance (C,G,G) that normalise the latents: those of --stats, or of the data itself."""
    if args.stats:
        return rae_encoder.load_statistics(args.stats, config["latent_shape"])
    data = ImageData(args.data, args.image_size, skip_broken=args.skip_broken)
    num = min(args.stats_images, len(data))
    how = (args.batch_size, args.precision, args.workers, rank, world)
    return rae_encoder.latent_statistics(encoder, data, num, *how)


def main(argv=None):
    args = parse_args(argv)
    rank, world, device = join_ranks()
    data = ImageData(args.data, args.image_size, "flip", args.seed, args.skip_broken)
    steps_per_epoch = check_batch(args, len(data), world)
    steps = args.steps or round(args.epochs * steps_per_epoch)

    torch.manual_seed(args.seed)
    encoder, network, config = build(args, data.classes, device)
    ema = copy.deepcopy(network).requires_grad_(False)
    weights = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, args.lr, (0.9, 0.95), weight_decay=0, fused=True)
    state = dict(model=network, ema=ema, optimizer=optimizer)

    last = os.path.join(args.out, "last.pt")
    source = args.resume or (last if os.path.exists(last) else None)
    step, mean, var = resume(source, config, **state) if source else (0, None, None)
    if args.compile:
        network.compile()
    model = DistributedDataParallel(network) if world > 1 else network
    if rank == 0:
        os.makedirs(args.out, exist_ok=True)
        log = open_log(args.out)
        say_what_runs(args, data, config, network, f"{world} x {device.type}", step, steps)
    if not source:
        mean, var = latent_moments(args, encoder, config, rank, world)
    mean, var = mean.to(device), var.to(device)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())

    order = training_order(len(data), args.batch_size, args.seed, step, steps, rank, world)
    progress = tqdm(total=steps, initial=step, unit="step", disable=rank > 0)
    window, window_step, window_time = torch.zeros(3, device=device), step, time.time()
    skipped, skipped_in_a_row = 0, 0
    for images, y in load_images(data, order, device, args.workers):
        # The random numbers of a step depend on (seed, step, rank) alone, so a resumed run repeats them.
        torch.manual_seed(int(np.random.SeedSequence([args.seed, step, rank]).generate_state(1)[0]))
        lr = optimizer.param_groups[0]["lr"] = learning_rate(step / steps_per_epoch, args)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            z = encoder(images)  # (B, C, G, G)
        x = (z - mean) / (var + 1e-5).sqrt()
        loss, norm = train_step(model, optimizer, x, y, args, config["shift"])
        step += 1
        if torch.isfinite(loss + norm):
            skipped_in_a_row = 0
            window += torch.stack([loss, norm, torch.ones_like(loss)])
            with torch.no_grad():
                torch._foreach_lerp_(list(ema.parameters()), list(network.parameters()), 1 - args.ema)
        else:
            skipped, skipped_in_a_row = skipped + 1, skipped_in_a_row + 1
            progress.write(
                f"step {step}: loss {loss:.3g}, gradient norm {norm:.3g}: skipped, {skipped} so far"
            )
            if skipped_in_a_row == 10:
                raise SystemExit(
                    f"10 steps in a row not finite: go on from {last}, --precision fp32 or lower --lr"
                )
        progress.update()
        # Ranks must leave together, though a signal reaches them one by one.
        stopped = sum_over_ranks(torch.tensor(float(stop.is_set()), device=device)).item() > 0
        final = stopped or step == steps
        if rank == 0 and (step % args.log_every == 0 or final):
            loss, norm = (window[:2] / window[2].clamp(min=1)).tolist()
            rate = (step - window_step) * args.batch_size / (time.time() - window_time)
            record = dict(loss=loss, gradient_norm=norm, lr=lr, images_per_s=round(rate, 1), skipped=skipped)
            write_log(log, step, record)
            progress.set_postfix(loss=f"{loss:.4f}", images_per_s=f"{rate:.1f}")
            window, window_step, window_time = torch.zeros(3, device=device), step, time.time()
        preview = args.decoder and args.preview_every and step % args.preview_every == 0
        if rank == 0 and (step % args.save_every == 0 or final or preview):
            checkpoint = {name: owner.state_dict() for name, owner in state.items()}
            checkpoint |= dict(format="rae-flow/1", config=config, step=step, args=vars(args))
            checkpoint |= dict(mean=mean.cpu(), var=var.cpu())
            save(checkpoint, last)
            if args.keep_every and step % args.keep_every == 0:
                save(checkpoint, os.path.join(args.out, f"{step:07d}.pt"))
            if preview:
                save_preview(args, last, step, len(data.classes))
        if stopped:
            break
    progress.close()

    broken = int(sum_over_ranks(data.broken.to(device).float()).count_nonzero())
    if rank == 0:
        replaced = f"; {broken} broken images were replaced by others" if broken else ""
        done = "" if step == steps else "; stopped, the same command goes on from here"
        print(f"{last}: step {step} of {steps}{replaced}{done}", file=sys.stderr)
    if world > 1:
        dist.destroy_process_group()


def parse_args(argv=None):
    parser = rae_encoder.common_parser(__doc__)
    add = parser.add_argument
    add("--model", help="DiT-S, -B, -L, -XL or DiT-DH-S, -B, -L, -XL")
    for part in ("", "head-"):
        for size in ("width", "depth", "heads"):
            add(f"--{part}{size}", type=int, help="instead of the model's own")
    add("--time-dist", choices=["logit-normal", "uniform"], help="of t before the shift: released, paper")
    add("--shift", type=float, help="default sqrt(C G G / 4096), at least 1; 1 is off")
    add("--stats", help="latent statistics of rae_encoder.py; default: computed from the data")
    add("--stats-images", type=int, help="images for that, drawn evenly")
    add("--decoder", help="decoder checkpoint for the previews")
    add("--accum", type=int, help="micro-batches a step")
    add("--epochs", type=float, help="passes over the data")
    add("--steps", type=int, help="instead of --epochs")
    add("--lr", type=float, help="AdamW's learning rate")
    add("--hold-epochs", type=float, help="epochs of constant learning rate")
    add("--decay-epochs", type=float, help="epoch at which its linear decay ends")
    add("--final-lr", type=float, help="learning rate from then on")
    add("--clip", type=float, help="largest gradient norm; 0 is off")
    add("--ema", type=float, help="decay of the averaged weights, a step")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--out", help="run folder: last.pt, metrics.jsonl, preview-*.png")
    add("--resume", help="checkpoint to go on from; default: last.pt of the run folder, if it is there")
    for event in ("log", "preview", "save"):
        add(f"--{event}-every", type=int, help="steps; of previews 0 is off")
    add("--keep-every", type=int, help="steps between numbered copies that stay; a multiple of --save-every")
    args = rae_encoder.parse_with_presets(parser, PRESETS, argv)
    if args.decay_epochs <= args.hold_epochs:
        raise SystemExit(
            f"--decay-epochs {args.decay_epochs} must be more than --hold-epochs {args.hold_epochs}"
        )
    return args


if __name__ == "__main__":
    main()
