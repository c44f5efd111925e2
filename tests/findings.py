"""The papers' findings on photographs, without a GPU: trains, samples, judges, prints a Markdown table.

    python tests/findings.py --data cifar10/train --test cifar10/test \\
        --encoder-weights vit_small.safetensors --features-weights efficientnet_lite0.safetensors
    python tests/findings.py ... --only shift      # one row

Networks, samples and figures are kept under --out and not made twice, so a killed run goes on. The six
scripts do all the work; pictures and curves lie beside the figures. Photographs are seen as 8x8 tokens. The
minutes of a row are of its last run, without the networks that earlier rows had trained.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).parents[1]))
import dit_dh  # noqa: E402
import fid  # noqa: E402
import flow_train  # noqa: E402
import rae_decoder_train  # noqa: E402
import rae_encoder  # noqa: E402
import sample  # noqa: E402

SEEDS = (0, 1)
# The flow that most rows share
FLOW = ["--prediction", "x", "--lr", "1e-3", "--ema", "0.99", "--label-std", "1"]
FLOW_STEPS = 700
# Published by a replication of the paper, on DINOv2-B with tokens of 768; or by a paper, where it is named
PUBLISHED = {
    "width": "loss 0.671, 0.197, 0.135",
    "shift": "loss 1.1326, 0.9668; paper: FID 23.1, 4.8",
    "noise": "tau 0: 25.87, 25.79, 25.66, 24.40, 22.97, 19.68 dB at 0, 0.1, 0.3, 0.5, 1, 2; of 500 "
    "photographs, at 0, 0.3, 0.6, 1: tau 0: 25.65, 24.87, 24.84, 22.39 dB, "
    "tau 0.5: 25.30, 25.73, 24.44, 22.91 dB",
    "head": "-47.8 % parameters, +30.4 % steps a second, -41.8 % memory, loss 1.1579, 1.1496",
    "representation": "paper: worse generation from latents that mean nothing",
    "layers": "RAEv2: PSNR 18.93 dB (one), 27.03 dB (23 layers)",
    "guidance": "paper: FID 1.51 without, 1.13 with AutoGuidance",
}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="photographs to train on, as class folders")
    parser.add_argument("--test", required=True, help="photographs to judge by, of the same classes")
    parser.add_argument("--encoder", default="vit_small_patch14_dinov2")
    parser.add_argument("--encoder-weights", required=True)
    parser.add_argument("--features", default="tf_efficientnet_lite0")
    parser.add_argument("--features-weights", required=True)
    parser.add_argument("--out", default="runs/findings")
    parser.add_argument("--only", choices=ROWS)
    parser.add_argument("--workers", default="2")
    parser.add_argument("--share", type=float, default=1.0, help="of all steps and images; tests take little")
    return parser.parse_args(argv)


# What the rows share: photographs, trainings, judgements


def scaled(args, number, least=1):
    return max(least, round(number * args.share))


def photographs(args, num, copies=1):
    """A folder of links to `num` photographs, evenly drawn, each `copies` times."""
    folder = f"{args.out}/photographs-{num}x{copies}"
    if not os.path.exists(folder):
        data = rae_encoder.ImageData(args.data, 32)
        if len(data) < num:
            raise SystemExit(f"{args.data} has {len(data)} photographs, and this takes {num}")
        shutil.rmtree(f"{folder}.part", ignore_errors=True)  # of a run that was killed
        for _, i in rae_encoder.even_order(len(data), num, num)[0]:
            for k in range(copies):
                link = Path(
                    f"{folder}.part", data.classes[data.labels[i]], f"{i}-{k}{Path(data.path(i)).suffix}"
                )
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(os.path.abspath(data.path(i)))
        os.rename(f"{folder}.part", folder)
    return folder


def encoder_flags(args, data, layers="all", weights=None):
    return [
        *("--preset", "small", "--data", data, "--image-size", "32", "--patch-size", "4", "--layers", layers),
        *("--encoder", args.encoder, "--encoder-weights", weights or args.encoder_weights),
        *("--workers", args.workers),
    ]


def decoder(args, name, data=None, steps=600, layers="all", weights=None, flags=()):
    """The checkpoint of a ViT-mini decoder, trained with L1 alone."""
    out = f"{args.out}/decoder-{name}"
    steps = scaled(args, steps)
    rae_decoder_train.main(
        [
            *encoder_flags(args, data or args.data, layers, weights),
            *("--preview-every", "0", "--log-every", "20"),
            *("--decoder", "ViT-mini", "--lpips-weight", "0", "--noise-tau", "0.2", "--batch-size", "32"),
            *("--steps", str(steps), "--save-every", "100", "--out", out, *flags),
        ]
    )
    return finished(f"{out}/last.pt", steps)


def finished(path, steps):
    """The checkpoint; raises SystemExit where a signal has stopped the training."""
    if torch.load(path, mmap=True, weights_only=True)["step"] < steps:
        raise SystemExit("stopped; the same command goes on")
    return path


def flow(args, name, decoder_path, steps, data=None, batch=32, *, flags):
    """The checkpoint of a flow in the latents of a decoder's encoder."""
    # Tests need no photographs that one recognises.
    if args.share < 0.1:
        flags = [
            "DiT-mini" if flag == "DiT-S" else flag.replace("DiT-DH-XS", "DiT-DH-mini") for flag in flags
        ]
    out = f"{args.out}/flow-{name}"
    steps = scaled(args, steps)
    # The decoder's checkpoint decides the encoder; its photographs are this flow's by default.
    images = ["--data", data] if data else []
    flow_train.main(
        [
            *("--decoder", decoder_path, *images, "--workers", args.workers, "--preview-every", "0"),
            *("--batch-size", str(batch), "--steps", str(steps), "--log-every", "20"),
            *("--save-every", "100", "--stats-images", str(scaled(args, 2000, 32)), "--out", out, *flags),
        ]
    )
    return finished(f"{out}/last.pt", steps)


def output(function, argv):
    """What a command prints on stdout."""
    with contextlib.redirect_stdout(io.StringIO()) as text:
        function(argv)
    return text.getvalue()


def shared_flow(args, name, decoder_path):
    """The flow of the rows on representation, layers, noise, head and guidance."""
    return flow(
        args, name, decoder_path, FLOW_STEPS, flags=["--model", "DiT-DH-XS", "--base-depth", "2", *FLOW]
    )


def samples(args, name, flow_path, num=500, flags=()):
    """A folder of samples in 25 Euler steps."""
    out = f"{args.out}/samples-{name}"
    count = str(scaled(args, num, 8))
    output(sample.main, ["--flow", flow_path, "-n", count, "--steps", "25", "--out", out, *flags])
    return out


def frechet(args, folder):
    """Fréchet distance of a folder to the test photographs, in features of a trained network."""
    features = ["--features", args.features, "--features-weights", args.features_weights]
    argv = [folder, "--ref", args.test, "--crop", "32", "--metrics", "fid", "--json", *features]
    return json.loads(output(fid.main, [*argv, "--workers", args.workers]))["fid"]


def psnr(args, name, decoder_path, sigma):
    """PSNR in dB of the test photographs, with noise on their latents."""
    out = f"{args.out}/reconstructions-{name}-{sigma}"
    argv = ["--reconstruct", args.test, "--decoder", decoder_path, "--latent-noise", str(sigma), "--out", out]
    return json.loads(output(sample.main, [*argv, "-n", str(scaled(args, 200, 8))]))["psnr"]


def judge(args, name, decoder_path):
    """(PSNR of reconstructions, Fréchet distance of the shared flow's samples) of a decoder's latents."""
    run = shared_flow(args, name, decoder_path)
    return psnr(args, name, decoder_path, 0), frechet(args, samples(args, name, run))


def both_figures(figures):
    """A line of {label: (PSNR, Fréchet distance)}."""
    return "; ".join(f"{label}: {decibel:.2f} dB, FD {fd:.0f}" for label, (decibel, fd) in figures.items())


@torch.no_grad()
def loss_under(args, flow_path, shift):
    """The EMA's loss on test photographs, under uniform times with this shift."""
    model = dit_dh.load(flow_path)
    file = rae_encoder.read_weights(flow_path, "--flow")
    config = file["config"]
    encoder = rae_encoder.Encoder(
        config["encoder"], config["encoder_size"], 32, file["args"]["encoder_weights"], config["layers"]
    )
    data = rae_encoder.ImageData(args.test, 32)
    order = rae_encoder.even_order(len(data), scaled(args, 256, 8), 32)
    torch.manual_seed(0)
    losses = []
    for images, y in rae_encoder.load_images(data, order, torch.device("cpu")):
        x = (encoder(images) - file["mean"]) / (file["var"] + 1e-5).sqrt()
        t = flow_train.draw_times(len(x), "uniform", shift, x.device)
        losses.append(flow_train.flow_loss(model, x, y, t, torch.randn_like(x), config["prediction"]))
    return torch.stack(losses).mean().item()


def last_loss(checkpoint):
    """Mean of the last five lines of a run's log."""
    return float(np.mean([record["loss"] for record in log_of(checkpoint)[-5:]]))


def log_of(checkpoint):
    lines = Path(checkpoint).with_name("metrics.jsonl").read_text().splitlines()
    # A killed run has some steps twice, of which the last counts.
    records = {record["step"]: record for record in map(json.loads, lines) if "loss" in record}
    return [records[step] for step in sorted(records)]


def curves(path, runs):
    """Draw the loss curves of runs {label: checkpoint}, in a logarithmic scale, as a PNG."""
    image = Image.new("RGB", (640, 400), "white")
    draw = ImageDraw.Draw(image)
    logs = {label: log_of(checkpoint) for label, checkpoint in runs.items()}
    losses = np.log([record["loss"] for log in logs.values() for record in log])
    low = losses.min()
    high = max(losses.max(), low + 1e-6)
    last = max(log[-1]["step"] for log in logs.values())
    for k, (label, log) in enumerate(logs.items()):
        color = ("crimson", "royalblue", "seagreen", "darkorange")[k % 4]
        points = []
        for record in log:
            height = (np.log(record["loss"]) - low) / (high - low)
            points.append((20 + 600 * record["step"] / last, 380 - 360 * height))
        draw.line(points, color, 2)
        draw.text((480, 20 + 16 * k), label, color)
    image.save(path)


# The rows: each returns (one line of figures, {measure: whether the papers' direction came out})


def width(args):
    """4.1, theorem 1: DiTs narrower and wider than a token, fitted to one photograph.

    width.png shows the photograph, and a sample of each.
    """
    base = decoder(args, "all")
    statistics = f"{args.out}/stats.pt"
    photos = photographs(args, scaled(args, 2000, 32))
    if not os.path.exists(statistics):
        rae_encoder.main([*encoder_flags(args, photos), "--out", statistics])
    photograph = photographs(args, 1, copies=8)
    runs = {}
    pictures = [Image.open(next(Path(photograph).rglob("*.*"))).convert("RGB").resize((32, 32))]
    for size, heads in ((192, 6), (384, 6), (448, 7)):
        flags = ["--model", "DiT-S", "--width", str(size), "--heads", str(heads), "--stats", statistics]
        flags += ["--no-flip", "--cache-latents", "--prediction", "v", "--ema", "0.99", "--seed", "0"]
        runs[f"width {size}"] = flow(args, f"width-{size}", base, 1200, photograph, 8, flags=flags)
        out = samples(args, f"width-{size}", runs[f"width {size}"], 8)
        pictures.append(Image.open(f"{out}/000000.png"))
    sheet = Image.new("RGB", (32 * len(pictures), 32))
    for k, picture in enumerate(pictures):
        sheet.paste(picture, (32 * k, 0))
    sheet.resize((128 * len(pictures), 128), Image.Resampling.NEAREST).save(f"{args.out}/width.png")
    curves(f"{args.out}/width-curves.png", runs)
    losses = [last_loss(run) for run in runs.values()]
    figures = ", ".join(f"{loss:.3f}" for loss in losses)
    return f"widths 0.5, 1, 1.17 of a token: loss {figures}", {"loss": losses[0] > losses[1] > losses[2]}


def shift(args):
    """4.2: two equal DiTs, one trained without, one with the dimension-dependent shift."""
    base = decoder(args, "all")
    photos = photographs(args, scaled(args, 2000, 32))
    formula = flow_train.default_shift((384, 8, 8))
    distances = {}
    losses = {}
    lines = []
    for a in (1.0, formula):
        flags = ["--model", "DiT-S", "--prediction", "v", "--time-dist", "uniform", "--shift", str(a)]
        run = flow(args, f"shift-{a:.2f}", base, 625, photos, flags=[*flags, "--cache-latents"])
        distances[a] = frechet(args, samples(args, f"shift-{a:.2f}", run))
        losses[a] = last_loss(run)
        plain = loss_under(args, run, 1.0)
        shifted = loss_under(args, run, formula)
        lines.append(
            f"shift {a:.2f}: loss {losses[a]:.3f} (times of shift 1: {plain:.3f}, of the formula: "
            f"{shifted:.3f}), FD {distances[a]:.0f}"
        )
    came_out = {
        "loss under its own times": losses[formula] < losses[1.0],
        "FD": distances[formula] < distances[1.0],
    }
    return "; ".join(lines), came_out


def noise(args):
    """4.3: decoders with and without noise in training, on noisy and on sampled latents."""
    photos = photographs(args, scaled(args, 500, 32))
    sampled = shared_flow(args, "all", decoder(args, "all"))
    table = {}
    distances = {}
    lines = []
    for tau in ("0", "0.5"):
        sigmas = (0, 0.1, 0.3, 0.5, 0.6, 1, 2) if tau == "0" else (0, 0.3, 0.6, 1)
        paths = {}
        for seed in SEEDS:
            flags = ["--noise-tau", tau, "--seed", str(seed)]
            paths[f"tau-{tau}-{seed}"] = decoder(args, f"tau-{tau}-{seed}", photos, 234, flags=flags)
        table[tau] = {
            sigma: np.mean([psnr(args, name, path, sigma) for name, path in paths.items()])
            for sigma in sigmas
        }
        judged = [
            frechet(args, samples(args, name, sampled, flags=["--decoder", path]))
            for name, path in paths.items()
        ]
        distances[tau] = np.mean(judged)
        figures = ", ".join(f"{value:.2f}" for value in table[tau].values())
        lines.append(
            f"tau {tau}: {figures} dB at {', '.join(map(str, sigmas))}; FD of samples "
            f"{' and '.join(f'{value:.0f}' for value in judged)}"
        )
    came_out = {"PSNR at sigma 1": table["0.5"][1] > table["0"][1], "FD": distances["0.5"] < distances["0"]}
    return "; ".join(lines), came_out


def measure_training(name, sizes, steps):
    """Millions of parameters, steps a second, peak memory in GB and mean of the last ten losses.

    The latents are random. To be called in a process of its own, whose peak is of this training alone.
    """
    # All networks fit the same latents.
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 384, 8, 8, generator=generator)
    y = torch.arange(4)
    torch.backends.cuda.enable_flash_sdp(False)  # as set_up of the trainings does on a CPU
    torch.manual_seed(0)
    model = dit_dh.build(name, latent_shape=(384, 8, 8), num_classes=10, **sizes)
    optimizer = flow_train.adamw(model)
    optimizer.param_groups[0]["lr"] = 2e-4
    losses = []
    start = None
    for step in range(steps):
        flow_train.seed_step(0, step, 0)
        terms, _ = flow_train.train_step(
            model, optimizer, x, y, time_dist="uniform", shift=2.45, clip=1.0, accum=1, precision="bf16"
        )
        losses.append(terms["loss"].item())
        start = start or time.time()  # the first step allocates
    rate = (steps - 1) / max(time.time() - start, 1e-9)
    status = Path("/proc/self/status").read_text()
    memory = int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9
    return sum(weight.numel() for weight in model.parameters()) / 1e6, rate, memory, np.mean(losses[-10:])


def head(args):
    """5: a wide DiT against a narrower body with a wide, shallow head; then at equal cost on photographs."""
    networks = {
        "DiT 1152 x 28": ("DiT-XL", {}),
        "DiT-DH 768 x 28 + 1152 x 2": ("DiT-DH-B", {"depth": 28, "head_width": 1152}),
    }
    if args.share < 0.1:
        networks = {"DiT": ("DiT-mini", {}), "DiT-DH": ("DiT-DH-mini", {})}
    context = multiprocessing.get_context("spawn")
    lines = []
    for label, (name, sizes) in networks.items():
        with ProcessPoolExecutor(1, context) as pool:
            measured = pool.submit(measure_training, name, sizes, scaled(args, 50, 3)).result()
        lines.append("{}: {:.0f} M, {:.3f} steps/s, {:.1f} GB, loss {:.3f}".format(label, *measured))

    # At equal cost: a step of DiT-S takes as long as 1.4 of DiT-DH-XS. (The shared flow also learns a base
    # output, which costs little and which a DiT has not.)
    path = decoder(args, "all")
    plain = flow(args, "no-head", path, 500, flags=["--model", "DiT-S", *FLOW])
    with_head = frechet(args, samples(args, "all", shared_flow(args, "all", path)))
    without = frechet(args, samples(args, "no-head", plain))
    lines.append(f"FD with head, 700 steps: {with_head:.0f}; without, 500 steps: {without:.0f}")
    return "; ".join(lines), {"FD at equal cost": with_head < without}


def representation(args):
    """3: the trained ViT against the same network untrained, one recipe."""
    figures = {
        "trained": judge(args, "all", decoder(args, "all")),
        "untrained": judge(args, "untrained", decoder(args, "untrained", weights="random")),
    }
    return both_figures(figures), {"FD": figures["trained"][1] < figures["untrained"][1]}


def layers(args):
    """RAEv2, 3: latents of the last layer against the mean of all but the first."""
    figures = {}
    for choice in ("last", "all"):
        figures[choice] = judge(args, choice, decoder(args, choice, layers=choice))
    came_out = {
        "PSNR": figures["all"][0] > figures["last"][0],
        "FD": figures["all"][1] < figures["last"][1],
    }
    return both_figures(figures), came_out


def guidance(args):
    """Classifier-free guidance at four scales, AutoGuidance by a shorter training, internal guidance."""
    path = decoder(args, "all")
    strong = shared_flow(args, "all", path)
    weak = flow(args, "short", path, 200, flags=["--model", "DiT-DH-XS", *FLOW])
    settings = {f"CFG {scale}": ["--cfg", str(scale)] for scale in (1, 1.5, 2, 3)}
    settings["AutoGuidance 1.5"] = ["--autoguide", weak, "--cfg", "1.5"]
    settings["internal 1.5"] = ["--internal-guidance", "1.5"]
    distances = {}
    for label, options in settings.items():
        name = "guidance-" + label.replace(" ", "-")
        distances[label] = frechet(args, samples(args, name, strong, num=250, flags=options))
    figures = ", ".join(f"{label}: FD {distance:.0f}" for label, distance in distances.items())
    return f"of 250 samples, {figures}", {"AutoGuidance": distances["AutoGuidance 1.5"] < distances["CFG 1"]}


ROWS = {
    "width": width,
    "shift": shift,
    "noise": noise,
    "head": head,
    "representation": representation,
    "layers": layers,
    "guidance": guidance,
}


def write_json(path, value):
    rae_encoder.write_file(str(path), lambda file: file.write(json.dumps(value).encode()))


def result_of(args, name):
    """A row's {"figures", "came_out", "minutes"}: those in the row's file, else made and written there."""
    path = Path(args.out, f"{name}.json")
    if not path.exists():
        started = time.time()
        figures, came_out = ROWS[name](args)
        came_out = {measure: bool(word) for measure, word in came_out.items()}
        result = {"figures": figures, "came_out": came_out, "minutes": (time.time() - started) / 60}
        write_json(path, result)
    return json.loads(path.read_text())


def main(argv=None):
    args = parse_args(argv)
    os.makedirs(args.out, exist_ok=True)
    # Figures that are kept under --out belong to the flags that they were made with.
    settings = {key: value for key, value in vars(args).items() if key not in ("only", "workers", "out")}
    path = Path(args.out, "settings.json")
    if path.exists():
        rae_encoder.check_same(
            settings, "this run", json.loads(path.read_text()), args.out, settings, "choose another --out"
        )
    write_json(path, settings)

    print("| finding | here | published | came out | minutes |\n|---|---|---|---|---|", flush=True)
    for name in [args.only] if args.only else ROWS:
        result = result_of(args, name)
        words = [f"{measure}: {'yes' if yes else 'no'}" for measure, yes in result["came_out"].items()]
        cells = [name, result["figures"], PUBLISHED[name], ", ".join(words), f"{result['minutes']:.0f}"]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    rae_encoder.run(main)
