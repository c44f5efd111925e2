"""Sampling of RAE: noise in, images out, by Euler or Heun steps along the learned velocity.

Zheng et al. 2025, Diffusion Transformers with Representation Autoencoders (arXiv 2510.11690), section 4.
Image i depends on checkpoints, seed and i alone; batch size, number of ranks and resume do not count.

    python sample.py                                        # the demo: seconds on a laptop
    python sample.py --preset imagenet256 -n 16             # the released networks, from the Hugging Face hub
    torchrun --nproc_per_node 8 sample.py --preset imagenet256 --autoguide --npz
    python sample.py --reconstruct imagenet/val --out reconstructions

A file of weights may also be hub:OWNER/REPO/PATH, on the Hugging Face hub.
Letters in shapes: B batch, C latent channels, G latent positions a side, S image size.
"""

import argparse
import hashlib
import json
import math
import os
import signal
import sys
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from timm.data import ImageNetInfo
from torch.utils.data import BatchSampler
from tqdm import tqdm

import dit_dh
from rae_decoder_train import load_decoder
from rae_encoder import (
    RAEV2,
    Encoder,
    ImageData,
    Parser,
    amount,
    bounded,
    check_pair,
    choose_precision,
    compile_blocks,
    computing_flags,
    count,
    even_order,
    exact_fp32,
    fingerprint,
    fraction,
    join_ranks,
    keep_freed_memory,
    layer_list,
    load_images,
    load_statistics,
    local_file,
    positive,
    reason,
    write_file,
)

MAX_NUM = 1_000_000  # images of one seed
HUB = "hub:nyu-visionx/RAE-collections"
# What differs from the flags' own defaults. FID is of 50,000 images; those of 512 px take more memory.
PRESETS = {
    "demo": {},
    "small": {},
    "imagenet256": {
        "num": 50_000,
        "flow": f"{HUB}/DiTs/Dinov2/wReg_base/ImageNet256/DiTDH-XL/stage2_model.pt",
        "decoder": f"{HUB}/decoders/dinov2/wReg_base/ViTXL_n08/model.pt",
    },
    "imagenet512": {
        "num": 50_000,
        "batch_size": 64,
        "flow": f"{HUB}/DiTs/Dinov2/wReg_base/ImageNet512/DiTDH-XL_ep400/stage2_model.pt",
        "decoder": f"{HUB}/decoders/dinov2/wReg_base/ViTXL_n08_i512/model.pt",
    },
    "raev2": RAEV2 | {"num": 50_000, "raw_pixels": True},
}
# What belongs to the released flows: latent statistics, the weak network to guide by, the paper's scale.
RELEASED = {
    "imagenet256": {
        "stats": f"{HUB}/stats/dinov2/wReg_base/imagenet1k/stat.pt",
        "weak": f"{HUB}/DiTs/Dinov2/wReg_base/ImageNet256/DiTDH-S_ep14/stage2_model.pt",
        "cfg": 1.42,
    },
    "imagenet512": {
        "stats": f"{HUB}/stats/dinov2/wReg_base/imagenet1k_512/stat.pt",
        "weak": f"{HUB}/DiTs/Dinov2/wReg_base/ImageNet512/DiTDH-S_ep20/stage2_model.pt",
        "cfg": 1.5,
    },
}


def build_parser(add_help=True):
    parser = Parser(description=__doc__, add_help=add_help)
    parser.add_argument("--preset", choices=PRESETS, help="imagenet256, imagenet512: the released ones")

    # The sizes of the networks are no flags: the files tell them.
    add = parser.add_argument_group("networks").add_argument
    add("--flow", metavar="FILE", default="runs/flow/last.pt", help="or a released file (%(default)s)")
    add("--decoder", metavar="FILE", default="runs/decoder/last.pt", help="or a released file (%(default)s)")
    add("--raw-pixels", action="store_true", help="a bare decoder puts out [0,1] itself, as RAEv2's do")
    add("--stats", metavar="FILE", help="latent statistics; default: the flow's, decoder's or preset's")
    add("--encoder", default="dinov2-base", help="of a released decoder: gives mean and std (%(default)s)")
    weak = "weak network to guide by: smaller or trained for less; alone: the preset's"
    add("--autoguide", metavar="FILE", nargs="?", const="released", help=weak)

    add = parser.add_argument_group("sampling").add_argument
    # These bounds keep the images' own seeds apart (draw_noise).
    number = bounded(int, lambda value: 1 <= value <= MAX_NUM, f"a whole number from 1 to {MAX_NUM:,}")
    seed = bounded(int, lambda value: 0 <= value <= 4293, "a whole number from 0 to 4293")
    # torchrun takes --num for an abbreviation of a flag of its own.
    add("-n", "--num", type=number, default=400, help="images (%(default)s); under torchrun only as -n")
    add("--classes", metavar="LIST", help="in turn: numbers from 0, or names, as tabby,crane; default: all")
    add("--seed", type=seed, default=0, help="image i starts from noise of (seed, i) (%(default)s)")
    add("--steps", type=count, help="from t = 1 to t = 0; default: 50, the demo's network 25")
    add("--solver", choices=["euler", "heun"], default="euler", help="heun: of second order (%(default)s)")
    add("--shift", type=positive, help="of the times, 1 is off; default: as in training")
    add("--t-end", type=fraction, default=0.0, help="where the times end, before the shift (%(default)s)")
    add("--cfg", type=amount, metavar="SCALE", help="of guidance; default: 1, off; the demo's network 2")
    add("--guidance-interval", type=amount, nargs=2, metavar=("MIN", "MAX"), help="shifted times to guide at")

    internal = "by the network's own base (RAEv2); without SCALE by --cfg's, and then there is no CFG"
    add("--internal-guidance", type=amount, nargs="?", const=True, metavar="SCALE", help=internal)

    add = parser.add_argument_group("reconstruction").add_argument
    add("--reconstruct", metavar="DIR", help="decode(encode(image)) of its images or of one file; PSNR")
    add("--encoder-weights", metavar="FILE", help="with timm's keys, or `random`; default: the decoder's")
    add("--layers", type=layer_list, metavar="I,J,...", help="of a bare decoder's encoder (RAEv2)")
    add("--latent-noise", type=amount, default=0.0, metavar="SIGMA", help="on the latents (%(default)s)")
    add("--skip-broken", action="store_true", help="replace broken images by others and count them")

    add = computing_flags(parser)
    add(
        "--precision",
        choices=["bf16", "fp32"],
        help="default: bf16 where hardware has it; reconstruction: fp32",
    )
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile; default: on CUDA")

    add = parser.add_argument_group("output").add_argument
    add("--out", default="samples", help="folder; what is there stays: resume. Grid: OUT.png (%(default)s)")
    add("--npz", action="store_true", help="also OUT.npz with arr_0 images, arr_1 labels")

    return parser


def parse_args(argv=None):
    parser = build_parser()
    # What decides other defaults is looked at first: --help shows them.
    given = build_parser(add_help=False).parse_known_args(argv)[0]
    parser.set_defaults(**PRESETS.get(given.preset, {}))
    if given.reconstruct:
        # All images of the folder, and for evaluation: in fp32.
        parser.set_defaults(num=None, precision="fp32")
    if given.autoguide == "released":
        if given.preset not in RELEASED:
            raise SystemExit(f"--autoguide: expected FILE, but with --preset {' or '.join(RELEASED)}")
        parser.set_defaults(cfg=RELEASED[given.preset]["cfg"])
    args = parser.parse_args(argv)
    check_together(args)
    return args


def check_together(args):
    """Raises SystemExit for flags that contradict each other."""
    if args.guidance_interval and args.guidance_interval[0] >= args.guidance_interval[1]:
        raise SystemExit(f"--guidance-interval {args.guidance_interval}: expected MIN < MAX")
    internal = args.internal_guidance
    if internal is True and (args.cfg is None or args.autoguide):
        raise SystemExit("--internal-guidance: give its scale, by --cfg or, beside --autoguide, as its value")
    needs_scale = args.autoguide or (args.guidance_interval and internal is None)
    if needs_scale and args.cfg in (None, 1):
        raise SystemExit("--autoguide, --guidance-interval: they need the scale of guidance, --cfg SCALE")
    sampling = ("cfg", "classes", "stats", "steps", "shift", "internal_guidance", "autoguide")
    given = [name for name in sampling if getattr(args, name) is not None]
    if args.reconstruct and (given or args.npz):
        raise SystemExit(
            "--reconstruct does not sample: no --npz, --cfg, --classes, --stats or the like with it"
        )
    if not args.reconstruct and (args.latent_noise or args.encoder_weights or args.skip_broken):
        raise SystemExit("--latent-noise, --encoder-weights, --skip-broken are for --reconstruct DIR")


# Formulas


def time_grid(steps, a, t_end=0.0):
    """The steps + 1 times from 1 to t_end, evenly spaced, then shifted by a as in training (section 4.2).

    The released code's "50 steps" are steps=49, t_end=0.001.
    """
    # In float64: a time at an end of the guidance interval must not fall out of it.
    t = torch.linspace(1, t_end, steps + 1, dtype=torch.float64)
    return (a * t / (1 + (a - 1) * t)).clamp(max=1)  # rounding can pass 1 where a is below 1


def sample_latents(velocity, noise, grid, solver="euler"):
    """Integrates dx/dt = velocity(x, t) along the times of grid from x = noise (B,C,G,G).

    velocity takes t as a number. solver: "euler", or "heun", which is of second order.
    """
    x = noise  # (B,C,G,G)
    times = grid.tolist()
    for t, t_next in zip(times[:-1], times[1:], strict=True):
        v = velocity(x, t)
        # Plain Euler on the last interval: the network is not trained at t = 0.
        if solver == "heun" and t_next != times[-1]:
            v = (v + velocity(x + (t_next - t) * v, t_next)) / 2
        x = x + (t_next - t) * v
    return x


def network_velocity(model, x, t, y, internal=None, interval=(0.0, 1.0)):
    """model's velocity (B,C,G,G), in fp32 under autocast too, where all images have one time t, a number.

    internal: scale s of v_base + s (v - v_base) by the model's own base, inside of interval (RAEv2, eq. 3).
    """
    times = x.new_full((len(x),), t)  # (B,)
    if internal is None or not interval[0] <= t <= interval[1]:
        return model(x, times, y).float()
    v, v_base = model(x, times, y, with_base=True)
    return v_base.float() + internal * (v.float() - v_base.float())


def guided_velocity(x, t, y, network, weak=None, scale=1.0, interval=(0.0, 1.0), null=None):
    """Velocity at x (B,C,G,G), time t, labels y (B,): v_base + scale (v - v_base), or v outside of interval.

    v_base: of the label `null` (classifier-free guidance, Ho & Salimans 2022) or, if given, of the `weak`
    network (AutoGuidance, Karras et al. 2024: the paper's). Networks: (x, t, y) -> velocity, t a number.
    """
    if scale == 1 or not interval[0] <= t <= interval[1]:
        return network(x, t, y)
    if weak:
        v = network(x, t, y)
        v_base = weak(x, t, y)
    else:
        # One call with twice the batch is faster than two.
        y = torch.cat([y, torch.full_like(y, null)])  # (2B,)
        v, v_base = network(torch.cat([x, x]), t, y).chunk(2)  # each (B,C,G,G)
    return v_base + scale * (v - v_base)


def draw_noise(indices, shape, seed):
    """Noise (B,C,G,G) of the images `indices`, each its own by (seed, i); made on the CPU, in fp32.

    torch's CPU generator reads 32 bits of its seed: for i < 1,000,000 and seed <= 4,293 no two are equal.
    """
    noise = []
    for i in indices:
        generator = torch.Generator().manual_seed(seed * MAX_NUM + i)
        noise.append(torch.randn(shape, generator=generator))  # (C,G,G)
    return torch.stack(noise)


def to_pixels(images):
    """Images (B,3,S,S) about [0,1] -> uint8 (B,S,S,3) in numpy; rounded, the released code truncates."""
    levels = (images.clamp(0, 1) * 255).round().byte()
    return levels.permute(0, 2, 3, 1).cpu().numpy()


# What there is to make: samples or reconstructions


class Job(NamedTuple):
    """The images to be made: how many, of what, and by which function."""

    number: int
    settings: dict  # what decides the pixels
    images: Callable  # lists of indices below number -> for each list images (B,3,S,S)
    labels: list | None = None  # of samples
    originals: ImageData | None = None  # of reconstructions


def network_hash(tensors):
    """A fingerprint of the first values of each tensor: cheap, and a step of training changes it."""
    return fingerprint(tensor.flatten()[:1000] for tensor in tensors)


def imagenet_names(num_classes):
    """English names of ImageNet's classes, for a released network, which keeps none; [] for other numbers."""
    info = ImageNetInfo()
    if num_classes != info.num_classes():
        return []
    # The first of its synonyms: the others stand behind commas.
    return [info.index_to_description(i).split(", ")[0] for i in range(num_classes)]


def class_numbers(text, names, num_classes, flow):
    """The numbers of the classes in --classes, which may be names; None, that is all, without the flag.

    Raises SystemExit for others.
    """
    if text is None:
        return None
    names = names or imagenet_names(num_classes)
    numbers = []
    for name in text.split(","):
        # A number stays a number where folders have digits for names, too.
        if name.isdecimal() and int(name) < num_classes:
            numbers.append(int(name))
        elif name in names:
            numbers.append(names.index(name))
        else:
            known = f", by name {', '.join(names[:10])}" if any(names) else ""
            raise SystemExit(f"--classes {name}: --flow {flow} has 0 to {num_classes - 1}{known}")
    return numbers


def open_statistics(args, file, decoder_config, latent_shape, device):
    """(mean, std), each (C,G,G): of --stats, the flow checkpoint `file`, the decoder or else the preset."""
    # A flag goes before what the files know.
    if args.stats:
        mean, var = load_statistics(args.stats, latent_shape, "--stats")
    elif "mean" in file:
        mean = file["mean"]
        var = file["var"]
    elif "statistics" in decoder_config:
        mean, var = decoder_config["statistics"]
    elif args.preset in RELEASED:
        mean, var = load_statistics(RELEASED[args.preset]["stats"], latent_shape, "--stats")
    else:
        raise SystemExit(f"--flow {args.flow}: a bare state dict needs its latents' statistics, --stats FILE")
    # The 1e-5 is in the normalisation that the network was trained with.
    return mean.to(device), (var + 1e-5).sqrt().to(device)


def open_weak(args, model):
    """The weak network of --autoguide, or None. Raises SystemExit for one that does not fit to model."""
    if not args.autoguide:
        return None
    path = RELEASED[args.preset]["weak"] if args.autoguide == "released" else args.autoguide
    weak = dit_dh.load(local_file(path, "--autoguide"), "--autoguide")
    if (weak.latent_shape, weak.num_classes) != (model.latent_shape, model.num_classes):
        raise SystemExit(f"--autoguide {args.autoguide}: other latents or classes than --flow {args.flow}")
    return weak


def prepare(model, device, compiled, **options):
    """model as a function (x, t, y) -> velocity on device; compiled: None means on CUDA.

    options: of network_velocity.
    """
    model.to(device)
    compile_blocks(model.blocks, compiled, device)
    return partial(network_velocity, model, **options)


def guidance_scales(args, model, demo):
    """Scales of CFG or AutoGuidance, and of internal guidance or None. SystemExit for what model can't do."""
    # The demo's small network draws shapes only when it is guided.
    scale = args.cfg if args.cfg is not None else (2.0 if demo else 1.0)
    internal = args.internal_guidance
    if internal is True:
        internal = scale
        scale = 1.0
    if internal is not None and model.base_depth is None:
        raise SystemExit(
            f"--internal-guidance: {args.flow} has no base; flow_train.py --base-depth makes one"
        )
    if scale != 1 and not args.autoguide and model.num_classes == 1:
        raise SystemExit(f"--cfg {scale}: {args.flow} has one class; --cfg 1 is off, or --autoguide FILE")
    return scale, internal


def open_sampling(args, decoder, decoder_config, device):
    """Opens and checks what sampling needs -> Job. Raises SystemExit for networks that don't fit."""
    path = local_file(args.flow, "--flow")
    model = dit_dh.load(path, "--flow")
    file = dit_dh.read(path, "--flow")
    # A released file has no config; the network tells the shape of its latents.
    config = {"latent_shape": list(model.latent_shape)} | file.get("config", {})
    check_pair(config, f"--flow {args.flow}", decoder_config, f"--decoder {args.decoder}")
    mean, std = open_statistics(args, file, decoder_config, model.latent_shape, device)  # (C,G,G) each
    weak = open_weak(args, model)

    demo = file.get("args", {}).get("preset") == "demo"
    steps = args.steps or (25 if demo else 50)
    scale, internal = guidance_scales(args, model, demo)
    interval = args.guidance_interval or (0.0, 1.0)

    # Where the file does not tell the shift, the formula does (section 4.2).
    formula = max(1.0, math.sqrt(math.prod(model.latent_shape) / 4096))
    shift = args.shift or config.get("shift", formula)

    # The classes take turns: as the paper's FID has it, each has as many images.
    classes = class_numbers(args.classes, config.get("classes"), model.num_classes, args.flow)
    cycle = classes or range(model.num_classes)
    labels = [cycle[i % len(cycle)] for i in range(args.num)]

    settings = {
        "flow": network_hash([*model.parameters(), mean, std]),
        "autoguide": network_hash(weak.parameters()) if weak else None,
        "classes": classes,
        "steps": steps,
        "solver": args.solver,
        "shift": shift,
        "t_end": args.t_end,
        "cfg": scale,
        "guidance_interval": args.guidance_interval,
    }
    if internal is not None:  # folders of older versions don't have it
        settings["internal_guidance"] = internal
    velocity = partial(
        guided_velocity,
        network=prepare(model, device, args.compile, internal=internal, interval=interval),
        weak=prepare(weak, device, args.compile) if weak else None,
        scale=scale,
        interval=interval,
        null=model.num_classes,
    )
    grid = time_grid(steps, shift, args.t_end)

    def images(batches):
        for indices in batches:
            y = torch.tensor([labels[i] for i in indices], device=device)  # (B,)
            noise = draw_noise(indices, model.latent_shape, args.seed).to(device)  # (B,C,G,G)
            z = sample_latents(partial(velocity, y=y), noise, grid, args.solver)  # (B,C,G,G)
            yield decoder(z * std + mean)  # (B,3,S,S)

    return Job(args.num, settings, images, labels=labels)


def files_hash(data):
    """A hash of the names, sizes and times of all images: another picture under an old name changes it."""
    digest = hashlib.sha256()
    for i in range(len(data)):
        path = data.path(i)
        # A link to nothing is a broken image, which the loader names or replaces.
        status = os.stat(path) if os.path.exists(path) else os.lstat(path)
        # The name below the folder: the folder itself may be named in more than one way.
        name = os.path.relpath(path, data.root)
        digest.update(os.fsencode(f"{name} {status.st_size} {status.st_mtime_ns}\n"))
    return digest.hexdigest()[:12]


def open_reconstruction(args, decoder, decoder_config, device):
    """Opens and checks what decode(encode(image)) needs -> Job. Raises SystemExit for another encoder."""
    size = decoder.grid * decoder.patch_size
    data = ImageData(args.reconstruct, size, skip_broken=args.skip_broken, flag="--reconstruct")
    # Fewer than all are drawn evenly over the classes.
    number = min(args.num or len(data), len(data))
    (keys,) = even_order(len(data), number, number)

    # A bare decoder does not tell the encoder's size, but its tokens: by default each is of 16 pixels.
    name = decoder_config["encoder"]
    weights = args.encoder_weights or decoder_config.get("encoder_weights")
    layers = decoder_config.get("layers", args.layers)
    encoder_size = decoder_config.get("encoder_size")
    encoder = Encoder(name, encoder_size, 16 * decoder.grid, weights, layers).to(device)

    # The decoder was trained with one encoder, which its checkpoint knows by a hash.
    config = {
        "encoder_hash": encoder.hash,
        "layers": layers,
        "latent_shape": [encoder.width, encoder.grid, encoder.grid],
    }
    source = f"--encoder-weights {weights}" if weights else f"encoder {name}"
    check_pair(config, source, decoder_config, f"--decoder {args.decoder}")

    settings = {
        "images": files_hash(data),
        "num": number,
        "skip_broken": args.skip_broken,
        "encoder": encoder.hash,
        "latent_noise": args.latent_noise,
    }
    if layers:  # folders of older versions don't have it
        settings["layers"] = layers

    def images(batches):
        order = [[keys[i] for i in indices] for indices in batches]
        loaded = load_images(data, order, device, args.workers)
        for indices, (x, _) in zip(batches, loaded, strict=True):
            with exact_fp32():  # these images are for evaluation
                z = encoder(x)  # (B,C,G,G)
                noise = draw_noise(indices, z.shape[1:], args.seed).to(device)  # (B,C,G,G)
                xhat = decoder(z + args.latent_noise * noise)  # (B,3,S,S)
            yield xhat

    return Job(number, settings, images, originals=data)


# The folder of images


def check_settings(out, path, settings):
    """Raises SystemExit where `path`, OUT/settings.json, says that the images are of other settings."""
    try:
        stored = dict(json.loads(Path(path).read_bytes()))
    except (OSError, TypeError, ValueError) as error:
        raise SystemExit(f"{path} can't be read ({reason(error)}): name another --out") from None

    # Older folders don't tell the pixels' mean and std.
    stored.setdefault("pixels", settings["pixels"])
    # Still older ones have no `demo`, but `reuse_body`, 1 where it was off; only of seed 0 is noise the same.
    if stored.get("reuse_body") == 1 and stored.get("seed") == 0:
        del stored["reuse_body"]
        stored["demo"] = settings["demo"]

    differences = [
        f"{key} {stored.get(key)} there and {settings.get(key)} here"
        for key in stored | settings
        if stored.get(key) != settings.get(key)
    ]
    if differences:
        problem = f"has images of other settings ({', '.join(differences)})"
        raise SystemExit(f"--out {out} {problem}: name another folder")


def claim_folder(out, settings, files):
    """Makes the folder OUT and OUT/settings.json -> the indices of the images that are not in it yet.

    Raises SystemExit for a folder of other settings, and where OUT or a file beside it can't be written: that
    must show before the work, not after it.
    """
    path = f"{out}/settings.json"
    if os.path.exists(path):
        check_settings(out, path, settings)
    elif any(Path(out).glob("*.png")):
        raise SystemExit(f"--out {out} has images, but no settings.json to tell whose: name another folder")

    try:
        os.makedirs(out, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"--out {out}: can't be written ({reason(error)})") from None
    # The grid and the npz are written last.
    beside = os.path.abspath(out)
    parent = os.path.dirname(beside)
    if not os.access(parent, os.W_OK):
        raise SystemExit(f"--out {out}: {beside}.png can't be written, no permission for {parent}")
    if os.path.isdir(f"{beside}.png") or os.path.isdir(f"{beside}.npz"):
        raise SystemExit(f"--out {out}: {beside}.png and .npz are to be files, but one is a folder")

    # Written each time anew, since that shows whether OUT can be written into.
    write_file(path, lambda file: file.write(json.dumps(settings, indent=1).encode()))
    return [i for i, file in enumerate(files) if not os.path.exists(file)]


def on_first_rank(function, rank, world):
    """function() of rank 0, for all ranks: a network disk may show each of them other files.

    Where it raises SystemExit all ranks end, and rank 0 says why.
    """
    result = None
    problem = None
    if rank == 0:
        try:
            result = function()
        except SystemExit as error:
            problem = str(error)
    if world > 1:
        answer = [result, problem]
        dist.broadcast_object_list(answer)
        result, problem = answer
    if problem:
        raise SystemExit(problem if rank == 0 else 1)  # one line, not one a rank
    return result


# What is written


def save_image(path, pixels):
    """Writes pixels (H,W,3) as a PNG that is whole wherever it is seen."""
    write_file(path, lambda file: Image.fromarray(pixels).save(file, format="PNG"))


def make_images(job, batches, files, progress, world):
    """Makes and writes the images of each list of indices; the bar moves as if all ranks kept step."""
    # In threads, since PNGs one after the other took a quarter of the time of sampling.
    with ThreadPoolExecutor() as threads:
        for indices, images in zip(batches, job.images(batches), strict=True):
            paths = [files[i] for i in indices]
            list(threads.map(save_image, paths, to_pixels(images)))  # raises what a thread raised
            progress.update(min(world * len(indices), progress.total - progress.n))


def write_grid(path, files, labels):
    """The first 100 images on one sheet; where it can be, each column is of one class."""
    classes = len(set(labels or [0]))  # reconstructions have none
    # Up to ten, a multiple of the number of classes.
    columns = 10 - 10 % classes if classes <= 10 else 10
    columns = min(columns, len(files))
    files = files[:100]
    rows = math.ceil(len(files) / columns)
    size = Image.open(files[0]).width

    # White where the last row is not full.
    sheet = Image.new("RGB", (columns * size, rows * size), "white")
    for i, file in enumerate(files):
        row, column = divmod(i, columns)
        sheet.paste(Image.open(file), (column * size, row * size))
    save_image(path, np.array(sheet))


def write_npz(path, files, labels):
    """arr_0 images (N,S,S,3) uint8 and arr_1 labels (N,), as np.savez writes them."""
    shape = np.array(Image.open(files[0])).shape  # (S,S,3)
    # As np.save has it for uint8
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(files), *shape)}

    # One image in memory at a time: 50,000 of 256 px are 10 GB.
    def write(file):
        with zipfile.ZipFile(file, "w") as archive:
            # Without zip64 a member ends at 4 GB.
            with archive.open("arr_0.npy", "w", force_zip64=True) as array:
                np.lib.format.write_array_header_1_0(array, header)
                for name in files:
                    array.write(Image.open(name).tobytes())
            with archive.open("arr_1.npy", "w") as array:
                np.lib.format.write_array(array, np.array(labels))

    write_file(path, write)


def mean_psnr(files, originals, workers):
    """The mean over images of the PSNR in dB, on 8-bit pixels."""
    # In the order in which open_reconstruction drew them.
    order = even_order(len(originals), len(files), 1)
    loaded = load_images(originals, order, torch.device("cpu"), workers)
    psnr = []  # of each image
    for file, (x, _) in zip(files, loaded, strict=True):
        error = to_pixels(x)[0] - np.array(Image.open(file), float)  # (S,S,3)
        psnr.append(10 * math.log10(255**2 / np.square(error).mean()))
    return float(np.mean(psnr))


# The command


def first_line(args, job, missing, computing):
    """What is made of what, and where."""
    demo = "The demo: its numbers compare with nothing. " if job.settings["demo"] else ""
    if job.originals:
        source = job.originals.about
    else:
        source = f"{args.flow}, {job.settings['steps']} {args.solver} steps, guidance {job.settings['cfg']}"
        if "internal_guidance" in job.settings:
            source += f", internal {job.settings['internal_guidance']}"
    target = f"{len(missing)} of {job.number} images in {args.out}"
    return f"{demo}{source}, {args.decoder} -> {target}; {computing}"


def end_interrupted(files, out, rank):
    """Says what is kept and ends with 130, the exit code of commands that Ctrl-C ended."""
    # torchrun sends the signal to its ranks once more.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if rank == 0:
        state = "nothing was made yet"
        if files:
            done = sum(map(os.path.exists, files))
            state = f"{done} of {len(files)} images are in {out}, the same command goes on"
        print(f"interrupted; {state}", file=sys.stderr, flush=True)
    # At once: sys.exit waits for loading processes, for ever where they had only half started.
    os._exit(130)


def main(argv=None):
    args = parse_args(argv)
    rank, world, device = join_ranks(args.device)
    keep_freed_memory(device)
    precision, why = choose_precision(args.precision, device)
    files = []
    try:
        # What there is to make
        decoder, config = load_decoder(args.decoder, args.encoder, "--decoder", args.raw_pixels)
        latent_shape = [decoder.decoder_embed.in_features, decoder.grid, decoder.grid]
        config = {"encoder": args.encoder, "latent_shape": latent_shape} | config
        open_job = open_reconstruction if args.reconstruct else open_sampling
        job = open_job(args, decoder.to(device), config, device)
        job.settings.update(
            seed=args.seed,
            precision=precision,
            decoder=network_hash(decoder.parameters()),
            pixels=[decoder.mean.flatten().tolist(), decoder.std.flatten().tolist()],
            demo=config.get("preset") == "demo",  # for fid.py
        )

        # What a run before this one left
        files = [f"{args.out}/{i:06d}.png" for i in range(job.number)]
        missing = on_first_rank(lambda: claim_folder(args.out, job.settings, files), rank, world)
        mine = missing[rank::world]
        batches = list(BatchSampler(mine, max(1, args.batch_size // world), drop_last=False))

        # The images
        if rank == 0:
            computing = f"{world} x {device.type}, {precision} ({why})"
            print(first_line(args, job, missing, computing), file=sys.stderr)
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
        progress = tqdm(total=len(missing), unit="image", disable=rank > 0)
        with torch.no_grad(), autocast, progress:
            make_images(job, batches, files, progress, world)
        if world > 1:
            dist.barrier()
            dist.destroy_process_group()

        # What is made of all of them
        if rank == 0:
            beside = os.path.abspath(args.out)
            write_grid(f"{beside}.png", files, job.labels)
            if args.npz:
                write_npz(f"{beside}.npz", files, job.labels)
            if job.originals:
                psnr = mean_psnr(files, job.originals, args.workers)
                broken = int(job.originals.broken.count_nonzero())
                print(json.dumps({"psnr": psnr, "images": job.number, "broken": broken}))
    except KeyboardInterrupt:
        end_interrupted(files, args.out, rank)


if __name__ == "__main__":
    main()
