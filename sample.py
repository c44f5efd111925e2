"""Sampling of RAE: noise in, images out, by Euler or Heun steps along the learned velocity.

Zheng et al. 2025, Diffusion Transformers with Representation Autoencoders (arXiv 2510.11690), section 4.
Image i depends on the checkpoints, the seed and i alone, not on batch size, number of ranks or resume.

    python sample.py                                        # the last training's; seconds for the demo
    python sample.py --preset imagenet256 -n 16             # the released networks, from the Hugging Face hub
    torchrun --nproc_per_node 8 sample.py --preset imagenet256 --autoguide --npz
    python sample.py --reconstruct imagenet/val --out reconstructions

A file of weights may also be hub:OWNER/REPO/PATH, on the Hugging Face hub.
Letters in shapes: B batch, C latent channels, G latent positions a side, S image size.
"""

import argparse
import json
import math
import os
import shlex
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import ImageNetInfo
from torch.utils.data import BatchSampler, Subset
from torchvision.transforms.functional import to_tensor
from torchvision.utils import save_image
from tqdm import tqdm

import dit_dh
from rae_decoder_train import load_decoder
from rae_encoder import (
    LATENTS,
    RAEV2,
    Encoder,
    ImageData,
    OneLineParser,
    check_own_folder,
    check_ranks_agree,
    check_same,
    choose_precision,
    compile_blocks,
    computing_flags,
    demo_notice,
    even_order,
    exact_fp32,
    explicit_flags,
    fingerprint,
    join_ranks,
    keeps_process_settings,
    layer_list,
    leave_ranks,
    load_images,
    load_statistics,
    local_file,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
    read_weights,
    reason,
    run,
    share_below_one,
    timm_name,
    weights_hash,
    write_file,
)

MAX_NUM = 1_000_000  # images of one seed
HUB = "hub:nyu-visionx/RAE-collections"
# Presets list only what differs from the flag defaults. FID takes 50,000 images; those of 512 px more memory.
PRESETS = {
    "demo": {},
    "small": {},
    "imagenet256": {
        "num": 50_000,
        "flow": f"{HUB}/DiTs/Dinov2/wReg_base/ImageNet256/DiTDH-XL/stage2_model.pt",
        "decoder": f"{HUB}/decoders/dinov2/wReg_base/ViTXL_n08/model.pt",
        "stats": f"{HUB}/stats/dinov2/wReg_base/imagenet1k/stat.pt",
    },
    "imagenet512": {
        "num": 50_000,
        "batch_size": 64,
        "flow": f"{HUB}/DiTs/Dinov2/wReg_base/ImageNet512/DiTDH-XL_ep400/stage2_model.pt",
        "decoder": f"{HUB}/decoders/dinov2/wReg_base/ViTXL_n08_i512/model.pt",
        "stats": f"{HUB}/stats/dinov2/wReg_base/imagenet1k_512/stat.pt",
    },
    "raev2": RAEV2 | {"num": 50_000, "raw_pixels": True},
}
# A weak network guides a preset's flow, with the paper's scale.
AUTOGUIDE = {
    "imagenet256": (f"{HUB}/DiTs/Dinov2/wReg_base/ImageNet256/DiTDH-S_ep14/stage2_model.pt", 1.42),
    "imagenet512": (f"{HUB}/DiTs/Dinov2/wReg_base/ImageNet512/DiTDH-S_ep20/stage2_model.pt", 1.5),
}
GUIDE_KEYS = (*LATENTS, "num_classes", "classes")  # a network and the weak one that guides it agree in these


def time_grid(steps, a, t_end=0.0):
    """The steps + 1 times from 1 to t_end, evenly spaced, then shifted by a as in training (section 4.2).

    The released code's "50 steps" are steps=49, t_end=0.001.
    """
    # float64 keeps a time that equals an end of --guidance-interval inside of it.
    t = torch.linspace(1, t_end, steps + 1, dtype=torch.float64)
    return (a * t / (1 + (a - 1) * t)).clamp(max=1)  # rounding can pass 1 where a is below 1


def sample_latents(velocity, noise, grid, *, heun=False):
    """Integrate dx/dt = velocity(x, t) along the times of grid from x = noise (B,C,G,G).

    velocity takes t as a number. The steps are Euler's, or with heun Heun's, which are of second order.
    """
    x = noise  # (B,C,G,G)
    times = grid.tolist()
    for t, t_next in pairwise(times):
        v = velocity(x, t)
        # Heun takes a plain Euler step on the last interval: the network is not trained at t = 0.
        if heun and t_next != times[-1]:
            v = (v + velocity(x + (t_next - t) * v, t_next)) / 2
        x = x + (t_next - t) * v
    return x


def guided_velocity(model, x, t, y, weak=None, scale=1.0, internal=None, interval=(0.0, 1.0)):
    """Velocity of model at x (B,C,G,G), the number t and labels y (B,), with guidance inside of interval.

    v_base + scale (v - v_base), where v_base has no class (classifier-free guidance, Ho & Salimans 2022) or
    is the `weak` network's (AutoGuidance, Karras et al. 2024: the paper's). internal: see network_velocity.
    """
    # Outside of the interval no network is called twice.
    if not interval[0] <= t <= interval[1]:
        scale = 1.0
        internal = None
    if scale == 1:
        return network_velocity(model, x, t, y, internal)
    if weak:
        v = network_velocity(model, x, t, y, internal)  # (B,C,G,G)
        v_base = network_velocity(weak, x, t, y)
    else:
        # One call with twice the batch is faster than two. The last label means no class.
        y = torch.cat([y, torch.full_like(y, model.num_classes)])  # (2B,)
        v, v_base = network_velocity(model, torch.cat([x, x]), t, y, internal).chunk(2)  # each (B,C,G,G)
    return v_base + scale * (v - v_base)


def network_velocity(model, x, t, y, internal=None):
    """Velocity (B,C,G,G) of one network where all images have one time t; in fp32 under autocast, too.

    internal: scale s of v_base + s (v - v_base), where v_base is the network's base output (RAEv2, eq. 3).
    """
    times = x.new_full((len(x),), t)  # (B,)
    if internal is None:
        return model(x, times, y).float()
    v, v_base = model(x, times, y, with_base=True)
    return v_base.float() + internal * (v.float() - v_base.float())


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
    """Convert images (B,3,S,S) about [0,1] to uint8 (B,S,S,3) in numpy; the released code truncates."""
    levels = (images.clamp(0, 1) * 255).round().byte()
    return levels.permute(0, 2, 3, 1).cpu().numpy()


# Images that can be made: samples, or reconstructions of other images (open_reconstruction)


def open_sampling(args, device):
    """Open and check all that sampling needs; returns (num, summary, settings, images, None).

    settings: all that decides the pixels, then what fid.py asks for. images: a function from lists of
    indices to their images (B,3,S,S). Raises SystemExit for files that don't belong together.
    """
    model, config = open_flow(args, args.flow, "--flow", device)
    path = choose_decoder(args, config)
    decoder, known = open_decoder(args, path, config, device)
    mean, std = open_statistics(args, known, device)  # (C,G,G) each
    weak = None
    if args.autoguide is not None:
        weak_path = args.autoguide or AUTOGUIDE[args.preset][0]
        weak, weak_config = open_flow(args, weak_path, "--autoguide", device)
        check_same(config, f"--flow {args.flow}", weak_config, f"--autoguide {weak_path}", GUIDE_KEYS)
        weak_mean, _ = open_statistics(args, known | weak_config, device)  # a bare file has the flow's
        if not torch.allclose(weak_mean, mean, atol=0.01):
            raise SystemExit(f"--autoguide {weak_path}: trained with other latent statistics than --flow")

    # The demo's small network draws shapes only when it is guided.
    demo = known.get("preset") == "demo"
    steps = args.steps or (25 if demo else 50)
    scale = args.cfg if args.cfg is not None else (2.0 if demo else 1.0)
    internal = args.internal_guidance
    if internal is not None and model.base_depth is None:
        raise SystemExit(f"--internal-guidance: {args.flow} has no base output (flow_train.py --base-depth)")

    shift = args.shift or config.get("shift") or max(1.0, math.sqrt(math.prod(model.latent_shape) / 4096))
    # The classes take turns, so that each has as many images: the protocol of the paper's FID.
    classes = class_numbers(args.classes, config.get("classes", []), model.num_classes)
    grid = time_grid(steps, shift, args.t_end)

    def sample_batch(indices):
        y = torch.tensor([classes[i % len(classes)] for i in indices], device=device)  # (B,)
        noise = draw_noise(indices, model.latent_shape, args.seed).to(device)  # (B,C,G,G)

        def velocity(x, t):
            return guided_velocity(model, x, t, y, weak, scale, internal, args.guidance_interval)

        z = sample_latents(velocity, noise, grid, heun=args.solver == "heun")  # (B,C,G,G)
        return decoder(z * std + mean)  # (B,3,S,S)

    settings = {
        "flow": weights_hash({**model.state_dict(), "mean": mean, "std": std}),
        "decoder": known["decoder_hash"],
        "autoguide": weights_hash(weak.state_dict()) if weak else None,
        "classes": classes,
        "steps": steps,
        "solver": args.solver,
        "shift": shift,
        "t_end": args.t_end,
        "cfg": scale,
        "internal_guidance": internal,
        "guidance_interval": args.guidance_interval,
        "reference": config.get("data"),
        "crop": decoder.grid * decoder.patch_size,
        "demo": demo,
    }
    summary = f"{args.flow}, {steps} {args.solver} steps, guidance {scale}, decoder {path}"
    return args.num, summary, settings, lambda batches: map(sample_batch, batches), None


def open_flow(args, path, flag, device):
    """Open a flow; returns the network and what its file tells, of a bare one its shapes."""
    path = local_file(path, flag)
    model = dit_dh.load(path, flag).to(device)
    compile_blocks(model.blocks, args.compile, device)
    file = read_weights(path, flag)
    config = {**file.get("args", {}), **model.config}
    # Training stores the statistics beside the config.
    if "mean" in file:
        config["statistics"] = (file["mean"], file["var"])
    return model, config


def choose_decoder(args, config):
    """The path of --decoder, else of the decoder that the flow was trained with, else of the preset's.

    Raises SystemExit where there is none, and where the flow's own has changed since.
    """
    own = config.get("decoder")
    if "decoder" not in args.explicit and own:
        # The decoder's own training may have gone on, or another may have taken its place.
        if weights_hash(read_weights(own["path"], f"--flow {args.flow} needs its --decoder")) != own["hash"]:
            raise SystemExit(
                f"--flow {args.flow}: {own['path']} is no longer the decoder of its training; "
                "name one by --decoder FILE"
            )
        return own["path"]
    if not args.decoder:
        raise SystemExit(f"--flow {args.flow}: does not tell its decoder; name it by --decoder FILE")
    return args.decoder


def open_decoder(args, path, flow_config, device):
    """Open a decoder that fits a flow; returns it and what its file tells, of a bare one shapes and flags."""
    # load_decoder takes this encoder's mean and std for a bare decoder.
    encoder = args.encoder or flow_config.get("encoder", "dinov2-base")
    # A flow of RAEv2's preset, too, says that its decoder's pixels are raw.
    raw_pixels = args.raw_pixels or flow_config.get("preset") == "raev2"
    decoder, config = load_decoder(path, encoder, "--decoder", raw_pixels)
    shape = [decoder.decoder_embed.in_features, decoder.grid, decoder.grid]  # (C,G,G)
    config = {"encoder": timm_name(encoder), "latent_shape": shape, **config}
    check_same(flow_config, f"--flow {args.flow}", config, f"--decoder {path}")
    # The state dict lacks the pixels' mean and std.
    config["decoder_hash"] = weights_hash({**decoder.state_dict(), **dict(decoder.named_buffers())})
    return decoder.to(device), {**config, **flow_config}


def open_statistics(args, config, device):
    """(mean, std), each (C,G,G): of --stats, else of the flow's file or its decoder's, else of the preset."""
    statistics = config.get("statistics")
    if "stats" in args.explicit or not statistics:
        if not args.stats:
            raise SystemExit(f"--flow {args.flow}: does not tell its latents' statistics; --stats FILE")
        statistics = load_statistics(args.stats, config)
    mean, var = statistics
    # The 1e-5 is in the normalisation that the network was trained with.
    return mean.to(device), (var + 1e-5).sqrt().to(device)


def class_numbers(text, names, num_classes):
    """The numbers of the classes in --classes, by default of all; names are the network's own or ImageNet's.

    A word is a name where a class has it, else a number. Raises SystemExit for any other, and for the name of
    several classes.
    """
    if text is None:
        return list(range(num_classes))
    # A released network keeps no names; commas separate synonyms, of which the first is taken.
    if not names and num_classes == 1000:
        names = [text.split(", ")[0] for text in ImageNetInfo().label_descriptions()]
    numbers = []
    for word in text.split(","):
        # Names go before numbers, since folders may have digits for names.
        same = [i for i, name in enumerate(names) if name == word]
        same = same or [i for i in range(num_classes) if str(i) == word]
        if len(same) != 1:
            raise SystemExit(
                f"--classes {word}: fits {same or 'none'} of the classes 0 to {num_classes - 1}; "
                f"give a number or a name: {', '.join(names[:10])}"
            )
        numbers += same
    return numbers


# The command


@keeps_process_settings()
def main(argv=None):
    args = parse_args(argv)
    rank, world, device = join_ranks(args.device)
    precision, why = choose_precision(args.precision, device)

    # Everything that can be wrong is found before the work.
    open_images = open_reconstruction if args.reconstruct else open_sampling
    num, summary, settings, images, originals = open_images(args, device)
    settings.update(seed=args.seed, precision=precision)
    check_folder(args.out, settings)
    check_ranks_agree(**settings)
    if rank == 0:
        write_file(f"{args.out}/settings.json", lambda file: file.write(json.dumps(settings).encode()))
        print(
            f"{demo_notice(settings['demo'])}{summary} -> {num} images in {args.out}; "
            f"{world} x {device.type}, {precision} ({why})",
            file=sys.stderr,
        )

    # Each rank looks for its own images alone, since a network disk may show each one other files.
    files = [f"{args.out}/{i:06d}.png" for i in range(num)]
    mine = [i for i in range(rank, num, world) if not is_whole(files[i])]
    batches = list(BatchSampler(mine, max(1, args.batch_size // world), False))
    progress = tqdm(batches, unit="batch", disable=rank > 0)
    # autocast keeps its bf16 copies of the weights until its region ends; one around all steps casts once.
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
    with torch.no_grad(), autocast:
        make_images(images(batches), progress, files)
    if world > 1:
        torch.distributed.barrier()
        leave_ranks()
    if rank > 0:
        return

    # The sheet and the .npz lie beside the folder, also that of `--out .`.
    beside = os.path.abspath(args.out)
    classes = settings.get("classes", [0])
    write_sheet(f"{beside}.png", files, len(classes))
    if args.npz:
        write_npz(f"{beside}.npz", files, classes)
    if originals:
        print(json.dumps(scores(files, originals, args.workers)))
    others = len(list(Path(args.out).rglob("*.png"))) - num
    beyond = f" (and {others} others, which fid.py counts as well)" if others else ""
    following = f"; next: {shlex.join(['python', 'fid.py', args.out])}" if settings["reference"] else ""
    print(f"all {num} images are in {args.out}{beyond}{following}", file=sys.stderr)


# Flags


def build_parser():
    parser = OneLineParser(description=__doc__)
    # Networks have no flags of their sizes: the files tell these.
    add = parser.add_argument_group("networks and images").add_argument
    add("--preset", choices=PRESETS, help="imagenet256, imagenet512: the released networks")
    add("--flow", metavar="FILE", default="runs/flow/last.pt", help="or a released file (%(default)s)")
    add("--decoder", metavar="FILE", help="or a released file; default: the one the flow was trained with")
    add("--raw-pixels", action="store_true", help="a bare decoder puts out [0,1] itself, as RAEv2's do")
    add("--encoder", help="of a bare decoder: gives mean and std; default: the flow's, else dinov2-base")

    # torchrun takes --num for an abbreviation of a flag of its own.
    add("-n", "--num", type=positive_int, default=400, help="images (%(default)s); under torchrun only as -n")
    add("--seed", type=non_negative_int, default=0, help="noise i is of (seed, i) (%(default)s)")
    add("--out", default="samples", help="folder, where a run goes on; sheet: OUT.png (%(default)s)")

    sampling = parser.add_argument_group("sampling")
    add = sampling.add_argument
    add("--stats", metavar="FILE", help="latent statistics; default: the flow's, decoder's or preset's")
    add("--classes", help="in turn: names, as tabby,tench, or numbers from 0; default: all")
    add("--steps", type=positive_int, help="from t = 1 to t = 0; default: 50, the demo's network 25")
    add(
        "--solver",
        choices=["euler", "heun"],
        default="euler",
        help="heun: second order, two calls a step (%(default)s)",
    )
    add("--shift", type=positive_float, help="of the times, 1 is off; default: as in training")
    add("--t-end", type=share_below_one, default=0.0, help="where times end, before the shift (%(default)s)")
    add("--cfg", type=non_negative_float, help="scale of guidance; default: 1 (off), the demo 2")
    add("--autoguide", metavar="FILE", nargs="?", const="", help="weak network to guide by, or the preset's")
    add(
        "--guidance-interval",
        type=non_negative_float,
        nargs=2,
        metavar=("MIN", "MAX"),
        default=[0.0, 1.0],
        help="shifted times to guide at (%(default)s)",
    )
    add("--internal-guidance", type=non_negative_float, help="scale of guidance by the base output (RAEv2)")
    add("--npz", action="store_true", help="also OUT.npz with arr_0 images, arr_1 labels")

    reconstruction = parser.add_argument_group("reconstruction")
    add = reconstruction.add_argument
    add("--reconstruct", metavar="DIR", help="decode(encode(image)) of its images or of one file; PSNR")
    add("--encoder-weights", metavar="FILE", help="with timm's keys, or `random`; default: the decoder's")
    add("--layers", type=layer_list, help="of a bare decoder's encoder (RAEv2)")
    add("--latent-noise", type=non_negative_float, default=0.0, help="its sigma (%(default)s)")
    add("--skip-broken", action="store_true", help="replace broken images by others and count them")

    add = computing_flags(parser)
    add("--precision", choices=["bf16", "fp32"], help="default: bf16 where faster; reconstruction: fp32")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile; default: on CUDA")
    return parser, sampling, reconstruction


def parse_args(argv=None):
    """Flags over their preset's. Raises SystemExit for flags that contradict each other."""
    parser, sampling, reconstruction = build_parser()
    explicit = explicit_flags(parser, argv)
    preset = explicit.get("preset", "small")
    parser.set_defaults(**PRESETS[preset], explicit=explicit)
    if "reconstruct" in explicit:
        # Reconstructions are for evaluation: by default of all images of the folder, and in fp32.
        parser.set_defaults(num=None, precision="fp32")
    if explicit.get("autoguide") == "":
        if preset not in AUTOGUIDE:
            raise SystemExit(f"--autoguide: expected FILE, but with --preset {' or '.join(AUTOGUIDE)}")
        parser.set_defaults(cfg=AUTOGUIDE[preset][1])
    args = parser.parse_args(argv)

    # Flags of the other task would be ignored in silence.
    foreign = sampling if args.reconstruct else reconstruction
    for action in foreign._group_actions:
        if action.dest in explicit:
            raise SystemExit(f"{action.option_strings[0]}: is for {foreign.title} alone")
    # An empty interval would turn guidance off.
    low, high = args.guidance_interval
    if low >= high:
        raise SystemExit(f"--guidance-interval {low} {high}: expected MIN < MAX")
    # The images' own seeds stay apart up to these bounds (draw_noise).
    if (args.num or 0) > MAX_NUM or args.seed > 4293:
        raise SystemExit(f"--num, --seed: beyond {MAX_NUM:,} and 4,293 two images would have one noise")
    needs_scale = "autoguide" in explicit or (
        "guidance_interval" in explicit and "internal_guidance" not in explicit
    )
    if needs_scale and args.cfg in (None, 1):
        raise SystemExit("--autoguide, --guidance-interval: they need the scale of guidance, --cfg SCALE")
    return args


# Reconstruction


def open_reconstruction(args, device):
    """Open and check what decode(encode(image)) needs; returns what open_sampling does and the originals.

    Raises SystemExit for another encoder and for a folder that is also --out.
    """
    root = Path(args.reconstruct).resolve()
    if Path(args.out).resolve().is_relative_to(root):
        raise SystemExit(f"--out {args.out}: lies in the folder that --reconstruct reads; name another")
    path = args.decoder or "runs/decoder/last.pt"
    decoder, config = open_decoder(args, path, {}, device)
    size = decoder.grid * decoder.patch_size
    data = ImageData(args.reconstruct, size, skip_broken=args.skip_broken, flag="--reconstruct")
    # Fewer than all are drawn evenly over the classes.
    num = min(args.num or len(data), len(data))
    originals = Subset(data, even_order(len(data), num, num)[0])

    # A bare decoder tells no more than the grid; the encoder's size follows from it.
    encoder = Encoder(
        args.encoder or config["encoder"],
        config.get("encoder_size"),
        size,
        args.encoder_weights or config.get("encoder_weights"),
        args.layers or config.get("layers"),
        decoder.patch_size,
    ).to(device)
    check_same(encoder.config(), f"encoder {encoder.name}", config, f"--decoder {path}")

    def images(batches):
        loaded = load_images(originals, batches, device, args.workers)
        with exact_fp32():  # these images are for evaluation
            for indices, (x, _) in zip(batches, loaded, strict=True):
                z = encoder(x)  # (B,C,G,G)
                if args.latent_noise:
                    z = z + args.latent_noise * draw_noise(indices, z.shape[1:], args.seed).to(device)
                yield decoder(z)  # (B,3,S,S)

    # Another picture under an old name has another time; lstat also tells that of a link to nothing.
    times = [os.lstat(data.path(i)).st_mtime_ns for i in range(len(data))]
    settings = {
        **encoder.config(),
        "decoder": config["decoder_hash"],
        "images": data.hash + fingerprint([torch.tensor(times)]),
        "num": num,
        "latent_noise": args.latent_noise,
        "reference": str(root) if root.is_dir() else None,
        "crop": size,
        "demo": config.get("preset") == "demo",
    }
    return num, f"{data.summary()}, decoder {path}", settings, images, originals


def scores(files, originals, workers):
    """Mean over images of the PSNR in dB on 8-bit pixels, and how many images there are and were broken.

    An exact copy counts as 100 dB, the most that an image can have: JSON has no infinity.
    """
    loaded = load_images(originals, [[i] for i in range(len(files))], torch.device("cpu"), workers)
    psnr = []  # of each image
    for file, (x, _) in zip(files, loaded, strict=True):
        error = (to_pixels(x)[0] - np.array(Image.open(file), float)) / 255  # (S,S,3)
        psnr.append(-10 * np.log10(max(1e-10, np.square(error).mean())))
    return {"psnr": np.mean(psnr), "images": len(files), "broken": originals.dataset.broken.sum().item()}


# The folder of images


def check_folder(out, settings):
    """Make the folder OUT. Raises SystemExit for one of other scripts or settings, or that can't be made."""
    check_own_folder(out, "settings.json")
    path = f"{out}/settings.json"
    stored = settings
    try:
        os.makedirs(out, exist_ok=True)
        if os.path.exists(path):
            # A folder of samples lacks the settings of reconstructions: None differs from all of them.
            stored = {**dict.fromkeys(settings), **json.loads(Path(path).read_bytes())}
    except (OSError, TypeError, ValueError) as error:
        raise SystemExit(f"--out {out}: can't be used ({reason(error)}); name another folder") from None
    check_same(stored, f"--out {out}", settings, "this run", settings, "name another folder")


def is_whole(file):
    """Whether a PNG is there up to its end: full disks and broken copies leave cut ones."""
    try:
        with open(file, "rb") as png:
            png.seek(-8, os.SEEK_END)
            return png.read(4) == b"IEND"  # the last chunk, of which a checksum follows
    except OSError:  # no file, or a shorter one
        return False


def write_png(path, pixels):
    """Write pixels (H,W,3) as a PNG, without fsync: after a crash a cut one is made anew."""
    write_file(path, lambda file: Image.fromarray(pixels).save(file, format="PNG"), sync=False)


def make_images(made, batches, files):
    """Write the images (B,3,S,S) of each list of indices in batches.

    Raises SystemExit for images that are not finite, and writes none of their batch.
    """
    # Threads write the PNGs, which one after the other took a quarter of the time of sampling.
    with ThreadPoolExecutor() as threads:
        for indices, images in zip(batches, made, strict=True):
            for k, image in enumerate(images):
                if not image.isfinite().all():
                    raise SystemExit(
                        f"image {indices[k]} is not finite; "
                        "--precision fp32 may help, or an earlier checkpoint"
                    )
            # list() raises what a thread raised, map() alone would not.
            list(threads.map(write_png, [files[i] for i in indices], to_pixels(images)))


def write_sheet(path, files, classes):
    """Write the first images on one sheet of up to ten full rows, where possible each column of one class."""
    # A multiple of the number of classes gives each column one class.
    columns = min(10 // classes * classes or 10, len(files))
    rows = min(10, len(files) // columns)
    images = [to_tensor(Image.open(file)) for file in files[: rows * columns]]  # each (3,S,S)
    write_file(path, lambda file: save_image(images, file, "PNG", nrow=columns, padding=0))


def write_npz(path, files, classes):
    """Write arr_0 images (N,S,S,3) uint8 and arr_1 labels (N,)."""

    def write(file):
        # 50,000 images of 256 pixels are 10 GB: the disk collects them.
        with tempfile.TemporaryFile(dir=os.path.dirname(path)) as disk:
            for name in files:
                disk.write(Image.open(name).tobytes())
            # np.savez reads the images from the disk as it writes them.
            size = Image.open(files[0]).width
            images = np.memmap(disk, np.uint8, "r", shape=(len(files), size, size, 3))
            np.savez(file, arr_0=images, arr_1=np.resize(classes, len(files)))

    write_file(path, write)


if __name__ == "__main__":
    run(main)
