"""Stage 2 of RAE: train a velocity network by flow matching in the latent space of the frozen encoder.

Zheng et al. 2025, Diffusion Transformers with Representation Autoencoders, arXiv 2510.11690, sections 4, 5.
Images are encoded as training goes, or once for all; times are shifted by the latents' size (section 4.2).

    torchrun flow_train.py
    torchrun --nproc_per_node 8 flow_train.py --preset imagenet256 --data imagenet/train --decoder decoder.pt
    torchrun flow_train.py --data my_images --image-size 64 --encoder dinov2-small --model DiT-DH-S

The first line is the demo, after rae_decoder_train.py: three minutes on a laptop's CPU.
Letters in shapes: B batch, C token width, G tokens a side. t in [0,1]: t=0 is data, t=1 is noise.
"""

import copy
import fcntl
import hashlib
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
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
SIZES = ("width", "depth", "heads", "head_width", "head_depth", "head_heads")
PRESETS = {
    "demo": IMAGENET | DEMO | dict(
        decoder="runs/decoder/last.pt", model="DiT-DH-S", width=128, depth=4, heads=4, head_width=128,
        head_depth=2, head_heads=4, batch_size=64, epochs=40, hold_epochs=12, decay_epochs=40, lr=2e-3,
        ema=0.99, precision="fp32", log_every=20, preview_every=0, save_every=200, workers=2,
    ),
    "imagenet256": IMAGENET,
    "imagenet512": IMAGENET | dict(image_size=512),
}  # fmt: skip


def time_shift(t, a):
    """Shifted time a t / (1 + (a-1) t): the larger the latents, the more noise hides them (section 4.2)."""
    return a * t / (1 + (a - 1) * t)


def default_shift(latent_shape):
    """a = sqrt(C G G / 4096), at least 1: 6.93 for DINOv2-B at 256 px (section 4.2)."""
    return max(1.0, math.sqrt(math.prod(latent_shape) / 4096))


def draw_times(num, distribution, a, device):
    """`num` shifted times in [0,1]; logit-normal (0,1) is the released code's, uniform the paper's."""
    uniform = distribution == "uniform"
    t = torch.rand(num, device=device) if uniform else torch.randn(num, device=device).sigmoid()
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


def encode(encoder, images, precision):
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
        z = encoder(images)  # (B,3,S,S) -> (B,C,G,G)
    return z.contiguous()  # as the cache has it: noise is drawn in the order of memory


def cache_latents(args, encoder, data, rank, world):
    """Latents of all images and their mirrors as a memory map; where the file is missing the ranks make it.

    records["latents"] is (images,2,C,G,G) in fp32, records["label"] (images,). The file lies beside the run
    folder for other runs to share; its name is a hash of all that decides what is in it.
    """
    files = data.reader.filenames(absolute=True) if os.path.isdir(args.data) else [args.data]
    files += [args.encoder_weights] * os.path.isfile(args.encoder_weights or "")
    stats = [(file.st_size, file.st_mtime_ns) for file in map(os.stat, files)]
    key = [args.encoder, args.encoder_weights, encoder.encoder_size, args.image_size, args.precision]
    key = json.dumps([*key, args.skip_broken, data.reader.filenames(), stats])
    out, device = os.path.abspath(args.out), encoder.mean.device
    path = os.path.join(os.path.dirname(out), f"latents-{hashlib.sha256(key.encode()).hexdigest()[:16]}.bin")
    latents = np.dtype((np.float32, (2, encoder.width, encoder.grid, encoder.grid)))  # image and mirror
    record = dict(names=["latents", "label"], formats=[latents, np.int64], offsets=[0, latents.itemsize])
    pages = latents.itemsize // 4096 + 1  # whole ones: machines that share the disk never write into the same
    record = np.dtype(record | dict(itemsize=4096 * pages))
    if mean_over_ranks(torch.tensor(float(not os.path.exists(path)), device=device)) == 0:
        return np.memmap(path, record, "r")

    partial, size = f"{path}.{os.path.basename(out)}", len(data) * record.itemsize
    if shutil.disk_usage(os.path.dirname(out)).free < size:  # writing to a map without room would kill us
        raise SystemExit(f"--cache-latents {path}: no room for {size / 1e9:.1f} GB")
    if rank == 0:
        with open(partial, "wb") as file:
            file.truncate(size)
    wait = dist.barrier if world > 1 else lambda: None
    wait()
    records = np.memmap(partial, record, "r+")
    order = rae_encoder.even_order(len(data), len(data), args.batch_size // world, rank, world)
    progress = tqdm(order, desc=f"{path}, {size / 1e9:.1f} GB", disable=rank > 0)
    for keys, (images, y) in zip(progress, load_images(data, order, device, args.workers), strict=True):
        rows = [i for _, i in keys]
        for k, view in enumerate((images, images.flip(-1))):
            records["latents"][rows, k] = encode(encoder, view, args.precision).cpu()
        records["label"][rows] = y.cpu()
    records.flush()
    wait()
    if rank == 0:
        os.replace(partial, path)
    return records


def load_latents(args, data, encoder, mean, var, order):
    """Yields (normalised latents (B,C,G,G), labels (B,)) for each list of (epoch, index) in `order`."""

    def from_cache(keys):
        rows = [i for _, i in keys]
        # The draw by which ImageData mirrors an image.
        mirrored = [int(np.random.default_rng((args.seed, *key)).random() < 0.5) for key in keys]
        return torch.from_numpy(data["latents"][rows, mirrored]), torch.from_numpy(data["label"][rows])

    if isinstance(data, np.memmap):
        batches = map(from_cache, order)
    else:
        images = load_images(data, order, mean.device, args.workers)
        batches = ((encode(encoder, x, args.precision), y) for x, y in images)
    for z, y in batches:
        yield (z.to(mean.device) - mean) / (var + 1e-5).sqrt(), y.to(mean.device)


def latent_moments(args, encoder, data, latent_shape, rank, world):
    """Mean and variance (C,G,G) that normalise the latents: those of the data itself."""
    num = min(args.stats_images, len(data))
    if isinstance(data, np.memmap):
        total = np.zeros((2, *latent_shape))
        for ((_, i),) in rae_encoder.even_order(len(data), num, 1, rank, world):
            z = data["latents"][i].astype(np.float64)  # (2,C,G,G)
            total += np.stack([z.sum(0), np.square(z).sum(0)])
        mean, square = mean_over_ranks(torch.tensor(total, device=encoder.mean.device)) * world / (2 * num)
        return mean.float(), (square - mean.square()).float()
    data = ImageData(args.data, args.image_size, skip_broken=args.skip_broken)
    how = (args.batch_size, args.precision, args.workers, rank, world)
    return rae_encoder.latent_statistics(encoder, data, num, *how)


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
    loss = mean_over_ranks(loss)
    norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip or math.inf)
    if torch.isfinite(loss + norm):
        optimizer.step()
    return loss, norm


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
    if checkpoint.get("format") != "rae-flow/1" or not checkpoint.keys() >= {"config", "step", "model"}:
        raise SystemExit(f"--resume {source}: not a rae-flow/1 checkpoint{hint}")
    for key, value in config.items():
        if (was := checkpoint["config"].get(key)) != value:
            raise SystemExit(f"{source} has {key} {was}, this run {value}: same flags, or another --out")
    for name, owner in state.items():
        owner.load_state_dict(checkpoint[name])
    return checkpoint


def initialise(network, path):
    """--init: weights of `path`. For another number of classes, of the labels it takes "no class" alone."""
    source, table = dit_dh.load(path), "y_embedder.embedding_table.weight"
    there, here = (f"{model.sizes}, latents {model.latent_shape}" for model in (source, network))
    if there != here:
        raise SystemExit(f"--init {path} is of {there}, this run of {here}")
    weights = source.state_dict()
    if source.num_classes != network.num_classes:
        weights[table] = torch.cat([network.state_dict()[table][:-1].cpu(), weights[table][-1:]])
    network.load_state_dict(weights)


def build(args, classes, device):
    """Returns (encoder, network, config); config is what sample.py needs to know of them."""
    encoder = Encoder(args.encoder, args.encoder_size, args.image_size, args.encoder_weights)
    latent_shape = [encoder.width, encoder.grid, encoder.grid]
    sizes = {name: getattr(args, name) for name in SIZES if getattr(args, name)}
    network = dit_dh.build(args.model, latent_shape, len(classes), **sizes)
    network.checkpoint_activations = args.checkpoint_activations
    config = {key: getattr(args, key) for key in ("encoder", "encoder_weights", "image_size", "model")}
    config |= dict(encoder_size=encoder.encoder_size, latent_shape=latent_shape, sizes=network.sizes)
    config |= dict(classes=classes, num_classes=len(classes), shift=args.shift or default_shift(latent_shape))
    if args.decoder:
        decoder = read_weights(args.decoder).get("config", {})
        for key in ("encoder", "encoder_size", "encoder_weights", "latent_shape"):
            # Of a file of weights the name counts: its folder differs from machine to machine.
            there, here = (os.path.basename(str(c.get(key, config[key]))) for c in (decoder, config))
            if there != here:
                raise SystemExit(f"--decoder {args.decoder} has {key} {there}, this run {here}")
    return encoder.to(device), network.to(device), config


def save_preview(args, checkpoint, step, num_classes):
    """Samples of the EMA, by the sampler that users run: PNG grid preview-STEP.png."""
    sampler = os.path.join(os.path.dirname(os.path.abspath(__file__)), "sample.py")
    folder = os.path.join(args.out, f"preview-{step:07d}")
    command = [sys.executable, sampler, "--flow", checkpoint, "--decoder", args.decoder, "--out", folder]
    command += ["--num", str(4 * min(num_classes, 10))]
    if subprocess.run(command, env=os.environ | {"RANK": "0", "WORLD_SIZE": "1"}).returncode:
        tqdm.write(f"{folder}: no preview, see above; training goes on", file=sys.stderr)


def main(argv=None):
    args = parse_args(argv)
    rae_encoder.keep_freed_memory()
    rank, world, device = join_ranks()
    augment = None if args.cache_latents else "flip"  # the cache has both views of an image
    data = ImageData(args.data, args.image_size, augment, args.seed, args.skip_broken)
    batch, steps_per_epoch = args.batch_size, len(data) // args.batch_size
    if not steps_per_epoch:
        raise SystemExit(f"--data {args.data}: {len(data)} images, fewer than --batch-size {batch}")
    if batch % (world * args.accum):
        raise SystemExit(f"--batch-size {batch} is no multiple of {world} ranks x {args.accum} --accum")
    steps = args.steps or max(1, round(args.epochs * steps_per_epoch))
    torch.manual_seed(args.seed)
    encoder, network, config = build(args, data.classes, device)
    log, last = open_log(args.out) if rank == 0 else None, os.path.join(args.out, "last.pt")
    ema = copy.deepcopy(network).requires_grad_(False)
    optimizer = torch.optim.AdamW(network.parameters(), args.lr, (0.9, 0.95), weight_decay=0, fused=True)
    state = dict(model=network, ema=ema, optimizer=optimizer)
    start = resume(args, config, **state)
    step = start["step"]
    if args.init and not step:
        initialise(network, args.init)
        ema.load_state_dict(network.state_dict())
    if args.compile or (args.compile is None and device.type == "cuda"):
        network.compile()
    model = DistributedDataParallel(network) if world > 1 else network
    if rank == 0:
        demo = "The demo: its numbers compare with nothing. " if args.data == DEMO["data"] else ""
        millions = sum(p.numel() for p in network.parameters()) / 1e6
        what = f"{len(data)} images of {args.data}, {len(data.classes)} classes; {args.encoder} "
        what += f"{config['latent_shape']}, shift {config['shift']:.2f}; {args.model} ({millions:.1f} M "
        what += f"parameters); {world} x {device.type}, {args.precision}"
        print(f"{demo}{what}; step {step} of {steps}", file=sys.stderr)
    moments = start.get("mean"), start.get("var")
    if args.stats and not step:
        moments = rae_encoder.load_statistics(args.stats, config["latent_shape"])
    source = cache_latents(args, encoder, data, rank, world) if args.cache_latents else data
    if not (step or args.stats):
        moments = latent_moments(args, encoder, source, config["latent_shape"], rank, world)
    mean, var = (moment.to(device) for moment in moments)
    del start  # as large as all that is trained, on every rank
    order = training_order(len(data), args.batch_size, args.seed, step, steps, rank, world)
    batches = load_latents(args, source, encoder, mean, var, order)

    signals = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: signals.append(number))
    progress = tqdm(total=steps, initial=step, unit="step", disable=rank > 0)
    window, window_step, window_time = torch.zeros(3, device=device), step, time.time()
    skipped = skipped_in_a_row = 0
    for x, y in batches:
        # The random numbers of a step depend on (seed, step, rank) alone, so a resumed run repeats them.
        torch.manual_seed(int(np.random.SeedSequence([args.seed, step, rank]).generate_state(1)[0]))
        lr = optimizer.param_groups[0]["lr"] = learning_rate(step / steps_per_epoch, args)
        loss, norm = train_step(model, optimizer, x, y, args, config["shift"])
        step += 1
        if torch.isfinite(loss + norm):
            skipped_in_a_row = 0
            window += torch.stack([loss, norm, torch.ones_like(loss)])
            with torch.no_grad():
                torch._foreach_lerp_(list(ema.parameters()), list(network.parameters()), 1 - args.ema)
        else:
            skipped, skipped_in_a_row = skipped + 1, skipped_in_a_row + 1
            tqdm.write(f"step {step} skipped: loss {loss:.3g}, gradient norm {norm:.3g}", file=sys.stderr)
            if skipped_in_a_row == 10:
                raise SystemExit(f"10 steps in a row not finite; from {last} on: fp32, or a lower --lr")
        progress.update()
        # Ranks must leave together, though a signal reaches them one by one.
        stopped = mean_over_ranks(torch.tensor(float(len(signals)), device=device)).item() > 0
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

    broken = int(mean_over_ranks(data.broken.to(device).float()).count_nonzero())
    if rank == 0:
        replaced = f"; {broken} broken images were replaced by others" if broken else ""
        done = "" if step == steps else "; stopped, the same command goes on from here"
        print(f"{last}: step {step} of {steps}{replaced}{done}", file=sys.stderr)
    if world > 1:
        dist.destroy_process_group()


def parse_args(argv=None):
    parser = rae_encoder.training_parser(__doc__)
    add = parser.add_argument
    add("--model", help="DiT-S, -B, -L, -XL or DiT-DH-S, -B, -L, -XL")
    for size in SIZES:
        add(f"--{size.replace('_', '-')}", type=int, help="instead of the model's own")
    add("--time-dist", choices=["logit-normal", "uniform"], help="of t before the shift: released, paper")
    add("--shift", type=float, help="default sqrt(C G G / 4096), at least 1; 1 is off")
    add("--stats", help="latent statistics: of rae_encoder.py, a checkpoint's; default: the data's own")
    add("--stats-images", type=int, help="images for that, drawn evenly")
    add("--decoder", help="decoder checkpoint for the previews")
    add("--hold-epochs", type=float, help="epochs of constant learning rate")
    add("--decay-epochs", type=float, help="epoch at which its linear decay to --final-lr ends")
    add("--clip", type=float, help="largest gradient norm; 0 is off")
    add("--cache-latents", action="store_true", help="encode all images once, into a file beside --out")
    given, presets = parser.parse_known_args(argv)[0], PRESETS
    if given.model or given.encoder not in (None, DEMO["encoder"]):  # the demo's sizes are of its own network
        presets = PRESETS | {"demo": PRESETS["demo"] | dict.fromkeys(SIZES)}
    args = rae_encoder.parse_with_presets(parser, presets, argv)
    args.cache_latents |= args.data == DEMO["data"]  # small, and a third faster
    if args.decay_epochs <= args.hold_epochs:
        raise SystemExit(f"--decay-epochs {args.decay_epochs} is not after --hold-epochs {args.hold_epochs}")
    return args


if __name__ == "__main__":
    main()
