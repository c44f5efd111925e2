"""The speed of each part, as a share of what this machine's matrix products reach; no test.

    python tests/bench.py --quick           # about a minute on two cores
    python tests/bench.py --only dit --json

Each row: the fastest of a few calls after a first one, in milliseconds; floating-point operations a second as
torch counts them; their share of a large square matrix product's in the same precision; images a second.
"""

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import scipy.linalg
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import dit_dh  # noqa: E402
import fid  # noqa: E402
import rae_decoder_train  # noqa: E402
import rae_encoder  # noqa: E402
import sample  # noqa: E402

LATENT, CLASSES = (768, 16, 16), 1000  # DINOv2-B at 256 px, ImageNet
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def clock():
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class Table:
    """Prints a row at a time; knows the limit of each precision, to which rates are compared."""

    def __init__(self, quick, as_json):
        self.repeats, self.as_json, self.limit = 1 if quick else 3, as_json, {}
        if not as_json:
            print(f"{'part':<44}{'ms':>10}{'GFLOP/s':>10}{'share':>8}{'images/s':>10}")

    def add(self, part, run, images=0, precision=None, repeats=None):
        """Times run(); returns the seconds of the fastest call. Without repeats the first call is all."""
        repeats, flops, seconds = self.repeats if repeats is None else repeats, 0, math.inf
        if repeats:  # the first call warms up, and its operations are counted
            with FlopCounterMode(display=False) as counter:
                run()
            flops = counter.get_total_flops() if precision else 0
        for _ in range(max(1, repeats)):
            start = clock()
            run()
            seconds = min(seconds, clock() - start)
        row = {"part": part, "ms": 1e3 * seconds}
        if flops:
            rate = flops / seconds / 1e9
            row |= {"gflops": rate, "share": rate / self.limit.setdefault(precision, rate)}
        if images:
            row["images_per_s"] = images / seconds
        if self.as_json:
            print(json.dumps(row), flush=True)
        else:
            rate = f"{row['gflops']:10.0f}{row['share']:8.0%}" if flops else " " * 18
            speed = f"{row['images_per_s']:10.1f}" if images else ""
            print(f"{part:<44}{row['ms']:10.1f}{rate}{speed}", flush=True)
        return seconds

    def note(self, what, value):
        print(
            json.dumps({"part": what.strip(), "value": value}) if self.as_json else f"{what:<44}{value:10.3g}"
        )


def autocast(precision):
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=precision == "bf16")


def training_step(model, loss, precision):
    """-> a function that makes one step of AdamW on loss(model)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step():
        with autocast(precision):
            value = loss(model)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()

    return step


def forward(run, precision):
    """-> run() without gradients, under autocast."""

    def call():
        with torch.no_grad(), autocast(precision):
            return run()

    return call


def bench_dit(table, quick):
    model = dit_dh.build("DiT-DH-S", LATENT, CLASSES).to(DEVICE)
    for batch, precision in ((4, "bf16"),) if quick else ((4, "bf16"), (16, "bf16"), (4, "fp32")):
        x, t = torch.randn(batch, *LATENT, device=DEVICE), torch.rand(batch, device=DEVICE)
        y = torch.randint(CLASSES, (batch,), device=DEVICE)
        name = f"DiT-DH-S batch {batch} {precision}"
        table.add(f"{name} forward", forward(partial(model.eval(), x, t, y), precision), batch, precision)
        step = training_step(model.train(), lambda m, x=x, t=t, y=y: F.mse_loss(m(x, t, y), x), precision)
        table.add(f"{name} training step", step, batch, precision)


def bench_compile(table, quick):
    """Only where there is CUDA, or by name: on a CPU compiling takes minutes."""
    model = dit_dh.build("DiT-DH-S", LATENT, CLASSES).to(DEVICE).eval()
    x, t = torch.randn(4, *LATENT, device=DEVICE), torch.rand(4, device=DEVICE)
    y = torch.zeros(4, dtype=torch.long, device=DEVICE)
    eager, compiled = (forward(lambda m=m: m(x, t, y), "bf16") for m in (model, torch.compile(model)))
    table.add("compiling DiT-DH-S", compiled, repeats=0)
    before = table.add("DiT-DH-S batch 4 bf16 forward", eager, 4, "bf16")
    after = table.add("  compiled", compiled, 4, repeats=0)  # the counter of operations would recompile it
    table.note("  times faster", before / after)


def peak_memory(network, batch, recompute):
    """Bytes that bf16 training steps of L1 take at most, in a process of its own."""
    if network.startswith("ViT"):
        model = rae_decoder_train.Decoder(network, 768, 16, 16, [0.5] * 3, [0.5] * 3)
        model.recomputes, inputs = recompute, (torch.randn(batch, *LATENT, device=DEVICE),)
    else:
        model = dit_dh.build(network, LATENT, CLASSES)
        model.checkpoint_activations = recompute
        y = torch.zeros(batch, dtype=torch.long, device=DEVICE)
        inputs = torch.randn(batch, *LATENT, device=DEVICE), torch.rand(batch, device=DEVICE), y
    rae_encoder.keep_freed_memory()
    step = training_step(model.to(DEVICE), lambda m: m(*inputs).abs().mean(), "bf16")
    step(), step()  # AdamW's state is there from the second on
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def bench_memory(table, quick):
    """By name alone: DiT-DH-XL takes 16 GB, and minutes on a CPU. Gradients and AdamW's state are in it."""
    for network in ("DiT-DH-S", "ViT-B") if quick else ("DiT-DH-XL", "ViT-XL"):
        for recompute in (False, True):
            few, many = 1, 5
            with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
                one, five = (pool.submit(peak_memory, network, n, recompute).result() for n in (few, many))
            name = f"{network} bf16 step{', recomputing' * recompute}"
            table.note(f"{name}: GB", one / 1e9)
            table.note("  for each further image: GB", (five - one) / (many - few) / 1e9)


def bench_decoder(table, quick):
    batch = 2 if quick else 8
    z, images = torch.randn(batch, *LATENT, device=DEVICE), torch.rand(batch, 3, 256, 256, device=DEVICE)
    decoder = rae_decoder_train.Decoder("ViT-B", 768, 16, 16, [0.5] * 3, [0.5] * 3).to(DEVICE)
    step = training_step(decoder, lambda m: F.l1_loss(m(z), images), "bf16")
    table.add(f"stage 1 step, ViT-B, L1, batch {batch} bf16", step, batch, "bf16")


def bench_encoder(table, quick):
    encoder = rae_encoder.Encoder("vit_base_patch14_reg4_dinov2", weights="random").to(DEVICE)
    images = torch.rand(4 if quick else 16, 3, 256, 256, device=DEVICE)
    for precision in ("bf16", "fp32"):
        run = forward(lambda: encoder(images), precision)
        table.add(f"encoder DINOv2-B batch {len(images)} {precision}", run, len(images), precision)


def bench_sampler(table, quick):
    """CFG in half of the steps doubles the network's work there: 1.5 times the time is no loss."""
    model = dit_dh.build("DiT-DH-S", LATENT, CLASSES).to(DEVICE).eval()
    batch, grid = 2, sample.time_grid(4, 1.0)  # t = 1, 3/4, 1/2, 1/4, 0
    noise = torch.randn(batch, *LATENT, device=DEVICE)
    y = torch.zeros(batch, dtype=torch.long, device=DEVICE)

    def network(x, t, y):
        return model(x, x.new_full((len(x),), t), y).float()

    def images(scale):
        velocity = lambda x, t: sample.guided_velocity(x, t, y, network, None, scale, (0, 0.6), CLASSES)  # noqa: E731
        return sample.sample_latents(velocity, noise, grid)

    plain = table.add("sampler, 4 steps, unguided, bf16", forward(lambda: images(1), "bf16"), batch, "bf16")
    guided = table.add("  with CFG in 2 of them", forward(lambda: images(1.5), "bf16"), batch, "bf16")
    table.note("  times unguided", guided / plain)


def bench_inception(table, quick):
    images = torch.randint(0, 256, (8 if quick else 16, 3, 256, 256), dtype=torch.uint8, device=DEVICE)
    network = fid.Inception().fold().to(DEVICE)
    run = forward(lambda: network(images), "fp32")
    table.add(f"Inception batch {len(images)} fp32", run, len(images), "fp32")


def bench_frechet(table, quick):
    one, two = (fid.moments(torch.randn(3000, 2048) @ torch.randn(2048, 2048)) for _ in range(2))
    seconds = table.add("Frechet distance, 2048 dimensions", lambda: fid.frechet_distance(*one, *two))
    if quick:
        return
    start = clock()
    root = scipy.linalg.sqrtm((one[1] @ two[1]).numpy()).real.trace()
    table.note("  times faster than scipy.linalg.sqrtm", (clock() - start) / seconds)
    theirs = ((one[0] - two[0]).square().sum() + one[1].trace() + two[1].trace() - 2 * root).item()
    table.note("  relative difference from it", abs(fid.frechet_distance(*one, *two) / theirs - 1))


def bench_programs(table, quick):
    """Images a second of the loader, and of whole commands, their start included."""
    num = 64 if quick else 200
    with tempfile.TemporaryDirectory() as folder:
        data, out = os.path.join(folder, "demo"), os.path.join(folder, "samples")
        rae_encoder.draw_demo(data, num)
        images = rae_encoder.ImageData(data, 32)
        order = rae_encoder.even_order(len(images), num, 32)
        loader = lambda: sum(len(x) for x, _ in rae_encoder.load_images(images, order, DEVICE))  # noqa: E731
        table.add("loader, 32 px, no workers", loader, num)

        torch.save(dit_dh.build("DiT-S", (384, 16, 16), 10).state_dict(), f"{folder}/flow.pt")
        decoder = rae_decoder_train.Decoder("ViT-S", 384, 16, 16, [0.5] * 3, [0.5] * 3)
        torch.save(decoder.state_dict(), f"{folder}/decoder.pt")
        torch.save({"mean": torch.zeros(384, 16, 16), "var": torch.ones(384, 16, 16)}, f"{folder}/stats.pt")
        files = [f"--{name}={folder}/{name}.pt" for name in ("flow", "decoder", "stats")]
        judge = ["fid.py", data, "--ref", data, "--inception-weights", "random"]
        draw = ["sample.py", *files, "--steps=5", "--num=8", "--out", out]
        for part, words, count in (
            (f"fid.py, {2 * num} images", judge, 2 * num),
            ("sample.py, DiT-S, ViT-S, 256 px, 5 steps", draw, 8),
        ):
            command = partial(subprocess.run, [sys.executable, *words], cwd=ROOT, check=True)
            table.add(part, partial(command, capture_output=True), count, repeats=0)


def main(argv=None):
    benches = {name[6:]: run for name, run in globals().items() if name.startswith("bench_")}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="smaller batches, one call each")
    parser.add_argument("--json", action="store_true", help="a JSON line for each row")
    parser.add_argument("--only", choices=benches, help="one part")
    args = parser.parse_args(argv)
    by_name = {"memory"} | ({"compile"} if DEVICE.type == "cpu" else set())
    chosen = [args.only] if args.only else [name for name in benches if name not in by_name]
    if not args.json:
        print(f"torch {torch.__version__}, {DEVICE.type}, {torch.get_num_threads()} threads", file=sys.stderr)
    rae_encoder.keep_freed_memory()
    torch.manual_seed(0)
    table, size = Table(args.quick, args.json), 8192 if DEVICE.type == "cuda" else 2048
    for precision, dtype in {"bf16": torch.bfloat16, "fp32": torch.float32}.items():
        a = torch.randn(size, size, device=DEVICE).to(dtype)
        table.add(f"matrix product {precision}: the limit", partial(torch.mm, a, a), 0, precision, 20)
    for name in chosen:
        benches[name](table, args.quick)


if __name__ == "__main__":
    main()
