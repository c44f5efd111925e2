"""Sampling of RAE: noise in, images out, by Euler or Heun steps along the learned velocity.

Zheng et al. 2025, Diffusion Transformers with Representation Autoencoders (arXiv 2510.11690), section 4.
Image i depends on checkpoints, seed and i alone; batch size, number of ranks and resume do not count.

    python sample.py                                        # the demo: a minute on a laptop
    torchrun --nproc_per_node 8 sample.py --preset imagenet256 --cfg 1.42 --autoguide weak.pt --npz
    python sample.py --preset imagenet256 --flow stage2_model.pt --decoder model.pt --stats stat.pt --num 16
    python sample.py --reconstruct imagenet/val --out reconstructions
Letters in shapes: B batch, C latent channels, G latent positions a side, S image size.
"""

import argparse
import hashlib
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

import dit_dh
import rae_encoder
from rae_decoder_train import load_decoder
from rae_encoder import DEMO, Encoder, ImageData, even_order, load_images, load_statistics

IMAGENET = dict(
    flow="runs/flow/last.pt", decoder="runs/decoder/last.pt", num=50_000, steps=50, solver="euler", t_end=0.0,
    encoder="dinov2-base", reuse_body=1, batch_size=256, precision="bf16", workers=8, seed=0,
    latent_noise=0.0, out="samples",
)  # fmt: skip
PRESETS = {
    "demo": IMAGENET | dict(num=400, steps=None, batch_size=100, workers=2),  # steps, cfg: by the checkpoint
    "imagenet256": IMAGENET,
    "imagenet512": IMAGENET | dict(batch_size=64),
}


def time_grid(steps, a, t_end=0.0):
    """The steps + 1 times from 1 to t_end, evenly spaced, then shifted by a as in training (section 4.2)."""
    t = torch.linspace(1, t_end, steps + 1, dtype=torch.float64)  # released "50 steps": steps 49, t_end 0.001
    return a * t / (1 + (a - 1) * t)


def sample_latents(velocity, noise, grid, solver="euler"):
    """Integrates dx/dt = velocity(x, t) along grid from x = noise (B,C,G,G); solver: "euler" or "heun"."""
    x, times = noise, grid.tolist()
    for t, t_next in zip(times[:-1], times[1:], strict=True):
        v = velocity(x, t)
        if solver == "heun" and t_next != times[-1]:  # second order, plain Euler on the last interval
            v = (v + velocity(x + (t_next - t) * v, t_next)) / 2
        x = x + (t_next - t) * v
    return x


def guided_velocity(x, t, y, network, weak=None, scale=1.0, interval=(0.0, 1.0), null=None):
    """Velocity at x (B,C,G,G), time t, labels y (B,): v_base + scale (v - v_base), or v outside of interval.

    v_base: of the label `null` (classifier-free guidance, Ho & Salimans 2022) or, if given, of the `weak`
    network (AutoGuidance, Karras et al. 2024: the paper's). Networks: (x, t, y) -> velocity, t a number.
    """
    if scale == 1 or not interval[0] <= t <= interval[1]:
        return network(x, t, y)
    if weak:
        v, v_base = network(x, t, y), weak(x, t, y)
    else:
        y = torch.cat([y, torch.full_like(y, null)])  # (2B,)
        v, v_base = network(torch.cat([x, x]), t, y).chunk(2)
    return v_base + scale * (v - v_base)


def as_function(model, body_times):
    """The network as (x, t, y) -> velocity in fp32, t a number; one function serves one batch.

    A DiT-DH's body runs at body_times; its last output serves the head in between (DDT, Wang et al. 2025).
    """
    s = ()

    def network(x, t, y):
        nonlocal s
        times = x.new_full((len(x),), t)
        if not hasattr(model, "body"):
            return model(x, times, y).float()
        if len(s) != len(x) or t in body_times:  # the batch doubles where CFG begins
            s = model.body(x, times, y)
        return model.head(x, times, s).float()

    return network


def draw_noise(indices, shape, seed):
    """Noise (B,C,G,G) of the images `indices`, each its own by (seed, i); made on the CPU, in fp32."""
    generators = (torch.Generator().manual_seed((seed << 32) + i) for i in indices)
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def to_pixels(images):
    """Images (B,3,S,S) about [0,1] -> uint8 (B,S,S,3) in numpy; rounded, the released code truncates."""
    return (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def save_image(path, pixels):
    """Written beside it and renamed, so that a PNG that is there is whole."""
    try:
        Image.fromarray(pixels).save(path + ".tmp", format="PNG")
        os.replace(path + ".tmp", path)
    except OSError as error:
        raise SystemExit(f"{path}: can't be written ({error}); the same command goes on from there") from None


def fingerprint(*tensors):
    """A short hash of the first values of each tensor: cheap, and a step of training changes it."""
    start = [tensor.detach().flatten()[:1000].cpu() for tensor in tensors]
    return hashlib.sha256(torch.cat(start).numpy().tobytes()).hexdigest()[:12]


def claim_folder(out, settings, rank):
    """OUT/settings.json has what decides the pixels; raises SystemExit for a folder of other settings."""
    path = os.path.join(out, "settings.json")
    if os.path.exists(path):
        with open(path) as file:
            there = json.load(file)
        keys = [key for key in there | settings if there.get(key) != settings.get(key)]
        if keys:
            what = ", ".join(f"{key} {there.get(key)} there and {settings.get(key)} here" for key in keys)
            raise SystemExit(f"--out {out} has images of other settings ({what}): name another folder")
    elif any(Path(out).glob("*.png")):
        raise SystemExit(f"--out {out} has images, but no settings.json to tell whose: name another folder")
    elif rank == 0:
        try:
            os.makedirs(out, exist_ok=True)
            with open(path + ".tmp", "w") as file:
                json.dump(settings, file, indent=1)
            os.replace(path + ".tmp", path)
        except OSError as error:
            raise SystemExit(f"--out {out}: can't be written ({error})") from None


def open_flow(args, decoder, config):
    """(network, mean, std, shift), mean and std (C,G,G) of its latents. SystemExit if decoder has others."""
    model, file = dit_dh.load(args.flow), dit_dh.read(args.flow)
    flow = {"latent_shape": list(model.latent_shape)} | file.get("config", {})
    config = {"latent_shape": [decoder.decoder_embed.in_features, decoder.grid, decoder.grid]} | config
    for key in ("encoder", "encoder_weights", "encoder_size", "latent_shape"):
        # Of a file of weights the name counts: its folder differs from machine to machine.
        a, b = (os.path.basename(str(source.get(key))) for source in (flow, config))
        if key in flow and key in config and a != b:
            raise SystemExit(f"--flow {args.flow} has {key} {a}, but --decoder {args.decoder} {b}: no pair")
    if not args.stats and "mean" not in file:
        raise SystemExit(f"--flow {args.flow}: a bare state dict needs its latents' statistics, --stats FILE")
    mean, var = load_statistics(args.stats, model.latent_shape) if args.stats else (file["mean"], file["var"])
    demo = file.get("args", {}).get("data") == DEMO["data"]  # its small network needs guidance to draw shapes
    args.steps = args.steps or (25 if demo else 50)
    args.cfg = (2.0 if demo else 1.0) if args.cfg is None else args.cfg
    shift = flow.get("shift", max(1.0, math.sqrt(math.prod(model.latent_shape) / 4096)))  # section 4.2
    return model, mean, (var + 1e-5).sqrt(), args.shift or shift


def open_sampling(args, decoder, config, device):
    """Opens and checks what sampling needs; returns (images of index batches, labels, settings)."""
    model, mean, std, shift = open_flow(args, decoder, config)
    weak = dit_dh.load(args.autoguide) if args.autoguide else None
    classes = args.classes or range(model.num_classes)
    if not all(0 <= label < model.num_classes for label in classes):
        raise SystemExit(f"--classes {args.classes}: {args.flow} has 0 to {model.num_classes - 1}")
    if weak and (weak.latent_shape, weak.num_classes) != (model.latent_shape, model.num_classes):
        raise SystemExit(f"--autoguide {args.autoguide}: other latents or classes than --flow {args.flow}")
    if args.cfg != 1 and not weak and model.num_classes == 1:
        raise SystemExit(f"--cfg {args.cfg}: {args.flow} has one class; --cfg 1 is off, or --autoguide FILE")
    if args.reuse_body > 1 and not hasattr(model, "body"):
        raise SystemExit(f"--reuse-body: {args.flow} is a DiT, only a DiT-DH has a body and a head")
    for network in filter(None, (model, weak)):
        network.to(device)
        if args.compile or (args.compile is None and device.type == "cuda"):
            for block in network.blocks:
                block.compile()
    keys = "seed classes steps solver t_end cfg guidance_interval reuse_body precision"
    settings = {key: getattr(args, key) for key in keys.split()} | dict(shift=shift)
    settings["flow"] = fingerprint(*model.parameters(), mean, std)
    settings["autoguide"] = weak and fingerprint(*weak.parameters())
    mean, std, grid = mean.to(device), std.to(device), time_grid(args.steps, shift, args.t_end)
    body_times = set(grid[:: args.reuse_body].tolist())
    guidance = dict(scale=args.cfg, interval=args.guidance_interval or (0, 1), null=model.num_classes)
    labels = [classes[i % len(classes)] for i in range(args.num)]

    def images(indices):
        y = torch.tensor([labels[i] for i in indices], device=device)
        networks = as_function(model, body_times), weak and as_function(weak, body_times)
        noise = draw_noise(indices, model.latent_shape, args.seed).to(device)
        velocity = lambda x, t: guided_velocity(x, t, y, *networks, **guidance)  # noqa: E731
        return decoder(sample_latents(velocity, noise, grid, args.solver) * std + mean)

    return lambda batches: map(images, batches), labels, settings


def open_reconstruction(args, decoder, config, device):
    """The same for decode(encode(image)); returns (images of index batches, the originals, settings)."""
    size = decoder.grid * decoder.patch_size
    data = ImageData(args.reconstruct, size, None, 0, args.skip_broken, "--reconstruct")
    args.num = min(args.num or len(data), len(data))
    (keys,) = even_order(len(data), args.num, args.num)
    weights = args.encoder_weights = args.encoder_weights or config.get("encoder_weights")
    # A bare decoder does not tell the encoder's size, but its tokens: by default each is of 16 pixels.
    encoder = Encoder(config["encoder"], config.get("encoder_size"), 16 * decoder.grid, weights).to(device)

    def images(batches):
        order = [[keys[i] for i in indices] for indices in batches]
        for indices, (x, _) in zip(batches, load_images(data, order, device, args.workers), strict=True):
            z = encoder(x)
            yield decoder(z + args.latent_noise * draw_noise(indices, z.shape[1:], args.seed).to(device))

    names = "reconstruct num encoder_weights latent_noise seed skip_broken precision"
    settings = {key: getattr(args, key) for key in names.split()}
    return images, data, settings | dict(encoder=config["encoder"])


def main(argv=None):
    args = parse_args(argv)
    rae_encoder.keep_freed_memory()
    rank, world, local = (int(os.environ.get(key, 0)) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    world, device = max(1, world), torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    decoder, config = load_decoder(args.decoder, args.encoder)
    config = {"encoder": args.encoder} | config
    open_job = open_reconstruction if args.reconstruct else open_sampling
    images, truth, settings = open_job(args, decoder.to(device), config, device)
    settings["decoder"] = fingerprint(*decoder.parameters())
    claim_folder(args.out, settings, rank)
    files = [os.path.join(args.out, f"{i:06d}.png") for i in range(args.num)]
    missing = [i for i, file in enumerate(files) if not os.path.exists(file)]
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        dist.barrier()  # nobody writes before everybody has looked
    mine, size = missing[rank::world], max(1, args.batch_size // world)
    batches = [mine[j : j + size] for j in range(0, len(mine), size)]
    if rank == 0:
        what = args.reconstruct or f"{args.flow}, {args.steps} {args.solver} steps, guidance {args.cfg}"
        what += f", {args.decoder} -> {len(missing)} of {args.num} images in {args.out}"
        if config.get("encoder_weights") == "random":
            print("The demo, with an untrained encoder: its numbers compare with nothing.", file=sys.stderr)
        print(f"{what}; {world} x {device.type}, {args.precision}", file=sys.stderr)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")
    with torch.no_grad(), autocast, tqdm(total=len(missing), unit="image", disable=rank > 0) as progress:
        for indices, batch in zip(batches, images(batches), strict=True):
            for i, pixels in zip(indices, to_pixels(batch), strict=True):
                save_image(files[i], pixels)
            progress.update(min(world * len(indices), len(missing) - progress.n))  # ranks keep step
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    if rank == 0:
        finish(args, files, truth)


def finish(args, files, truth):
    """Writes the grid of the first 100 and OUT.npz; prints the PSNR of --reconstruct."""
    tiles = [np.array(Image.open(file)) for file in files[:100]]
    columns = 10 if args.reconstruct else 10 - 10 % len(set(truth)) or 10  # a column is of one class
    tiles += [np.full_like(tiles[0], 255)] * (-len(tiles) % columns)
    rows = [np.concatenate(tiles[i : i + columns], axis=1) for i in range(0, len(tiles), columns)]
    name = os.path.normpath(args.out)
    save_image(name + ".png", np.concatenate(rows))
    if args.npz:  # arr_0 images, arr_1 labels; allocated once, as 50,000 images fill 10 GB
        image = np.dtype((np.uint8, tiles[0].shape))
        pixels = np.fromiter(map(np.array, map(Image.open, files)), image, count=args.num)
        np.savez(name + ".tmp.npz", pixels, np.array(truth))
        os.replace(name + ".tmp.npz", name + ".npz")
    if args.reconstruct:  # the mean over images, on 8-bit pixels
        originals = load_images(truth, even_order(len(truth), args.num, 1), torch.device("cpu"))
        pairs = ((to_pixels(x)[0], Image.open(file)) for (x, _), file in zip(originals, files, strict=True))
        errors = [np.square(original - np.array(image, float)).mean() for original, image in pairs]
        psnr, broken = np.mean(10 * np.log10(255**2 / np.array(errors))), int(truth.broken.count_nonzero())
        print(json.dumps(dict(psnr=psnr, images=args.num, broken=broken)))


def class_list(text):
    try:
        return [int(label) for label in text.split(",")]
    except ValueError:
        raise SystemExit(f"--classes {text}: expected numbers between commas, as 1,5") from None


def parse_args(argv=None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    add = parser.add_argument
    add("--preset", default="demo", choices=PRESETS, help="the defaults of all other flags")
    add("--flow", help="checkpoint of flow_train.py, or a released stage2_model.pt")
    add("--decoder", help="checkpoint of rae_decoder_train.py, or a released model.pt")
    add("--stats", help="latent statistics; default: those in the flow checkpoint")
    add("--encoder", help="that of a released decoder, for its mean and std; default dinov2-base")
    add("--encoder-weights", help="for --reconstruct: file with timm's keys; default: the decoder's")
    add("--num", type=int, help="images; with --reconstruct default all. `torchrun -- sample.py --num N`")
    add("--classes", type=class_list, help="in turn, as 1,5; default: all")
    add("--steps", type=int, help="from t = 1 to t = 0; default 50, for the demo's network 25")
    add("--solver", choices=["euler", "heun"], help="heun: second order, two network calls a step")
    add("--shift", type=float, help="of the times; default: as in training")
    add("--t-end", type=float, help="where the times end, before the shift")
    add("--cfg", type=float, metavar="SCALE", help="of guidance; default 1, that is off; the demo's has 2")
    add("--autoguide", metavar="FILE", help="weak network to guide by: smaller, or trained for less time")
    add("--guidance-interval", type=float, nargs=2, metavar=("MIN", "MAX"), help="shifted times to guide at")
    add("--reuse-body", type=int, metavar="K", help="DiT-DH: run the body at every K-th step only")
    add("--batch-size", type=int, help="images at once, over all ranks")
    add("--precision", choices=["bf16", "fp32"], help="bf16 is autocast over fp32 weights and state")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile; default: on CUDA")
    add("--workers", type=int, help="image loading processes of a rank, for --reconstruct")
    add("--seed", type=int, help="image i starts from noise of (seed, i)")
    add("--out", help="folder of 000000.png ...; beside it a grid, OUT.png. Images in it are kept: resume")
    add("--npz", action="store_true", help="also OUT.npz with arr_0 images, arr_1 labels")
    add("--reconstruct", metavar="DIR", help="decode(encode(image)) of a folder instead, and its PSNR")
    add("--skip-broken", action="store_true", help="with it: replace broken images by others and count them")
    add("--latent-noise", type=float, metavar="SIGMA", help="with it: noise on the latents (section 4.3)")
    given = parser.parse_known_args(argv)[0]
    parser.set_defaults(**PRESETS[given.preset] | (dict(num=None) if given.reconstruct else {}))
    args = parser.parse_args(argv)
    bounds = dict(steps=1, num=1, batch_size=1, reuse_body=1, seed=0, workers=0, cfg=0, latent_noise=0)
    for flag, least in bounds.items():
        value = getattr(args, flag)
        if value is not None and not least <= value < 2**32:
            raise SystemExit(f"--{flag.replace('_', '-')} {value}: expected {least} or more, below 2^32")
    if not 0 <= args.t_end < 1:
        raise SystemExit(f"--t-end {args.t_end}: expected 0 or more, below 1")
    if args.shift is not None and args.shift <= 0:
        raise SystemExit(f"--shift {args.shift}: expected more than 0; 1 is off")
    if args.guidance_interval and args.guidance_interval[0] >= args.guidance_interval[1]:
        raise SystemExit(f"--guidance-interval {args.guidance_interval}: expected MIN < MAX")
    if args.cfg in (None, 1) and (args.autoguide or args.guidance_interval):
        raise SystemExit("--autoguide, --guidance-interval: they need the scale of guidance, --cfg SCALE")
    if args.reconstruct and (args.cfg or args.npz or args.classes or args.stats):
        raise SystemExit("--reconstruct does not sample: no --cfg, --npz, --classes, --stats with it")
    if args.latent_noise and not args.reconstruct:
        raise SystemExit("--latent-noise is for --reconstruct DIR")
    for path, script in ((args.decoder, "rae_decoder_train.py"), (args.flow, "flow_train.py")):
        if not os.path.isfile(path) and not (args.reconstruct and path == args.flow):
            raise SystemExit(f"{path}: no such file; {script} makes it")
    return args


if __name__ == "__main__":
    main()
