"""The speed and the memory of each part, beside what this machine can do at best; no test.

    python tests/bench.py --quick           # a few minutes on two cores
    python tests/bench.py --only dit --json
    python tests/bench.py --only memory     # the README's table of GPU memory; needs no GPU

A row has the median of five calls after a first one, in milliseconds, and the spread of the five, from the
fastest to the slowest, as a share of it: differences below the spread mean nothing. Then come floating-point
operations a second, those of attention counted as plain products, whichever kernel ran, and `of limit`: the
share of the rate of a large square matrix product in the same precision, which is measured at the start and,
since a shared machine drifts, once more at the end.
"""

import argparse
import contextlib
import json
import math
import multiprocessing
import resource
import sys
import tempfile
import time
import warnings
import weakref
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from unittest import mock

import scipy.linalg
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import dit_dh  # noqa: E402
import fid  # noqa: E402
import flow_train  # noqa: E402
import rae_decoder_train  # noqa: E402
import rae_encoder  # noqa: E402

LATENT = (768, 16, 16)  # of DINOv2-B at 256 px
CLASSES = 1000
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
COLUMNS = {
    "ms": ("ms", ".1f"),
    "spread": ("spread", ".0%"),
    "gflops": ("GFLOP/s", ".0f"),
    "of_limit": ("of limit", ".2f"),
    "images_per_s": ("images/s", ".1f"),
}


# Measuring


def seconds_of(run):
    """(median, spread) of the seconds of five calls; the spread is a share of the median."""
    seconds = []
    for _ in range(5):
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        seconds.append(time.perf_counter() - start)
    middle = median(seconds)
    return middle, (max(seconds) - min(seconds)) / middle


def synchronize():
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


class Table:
    """Prints a row at a time; knows the limit of each precision, with which rates are compared."""

    def __init__(self, as_json):
        self.as_json = as_json
        self.limit = {}

    def head(self):
        if not self.as_json:
            print(f"{'part':<48}", *(f"{title:>10}" for title, _ in COLUMNS.values()), sep="")

    def add(self, part, run, images=0, precision=None):
        """Times run(), counting its operations where a precision is given; returns the seconds."""
        # torch counts no operations of the CPU's fused attention; of its plain products it does.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            run()
        run()
        seconds, spread = seconds_of(run)
        row = {"part": part, "ms": 1e3 * seconds, "spread": spread}
        if precision:
            row["gflops"] = counter.get_total_flops() / seconds / 1e9
            row["of_limit"] = row["gflops"] / self.limit[precision]
        self.show(row, images)
        return seconds

    def add_limit(self, precision, when):
        """The rate of a large square product; rows are compared with the first."""
        size = 8192 if DEVICE.type == "cuda" else 2048
        a = torch.randn(size, size, device=DEVICE).to(DTYPES[precision])
        torch.mm(a, a)
        seconds, spread = seconds_of(partial(torch.mm, a, a))
        rate = 2 * size**3 / seconds / 1e9
        self.limit.setdefault(precision, rate)
        part = f"matrix product {precision}, {when}: the limit"
        self.show({"part": part, "ms": 1e3 * seconds, "spread": spread, "gflops": rate}, 0)

    def show(self, row, images):
        if images:
            row["images_per_s"] = images / row["ms"] * 1e3
        if self.as_json:
            print(json.dumps(row), flush=True)
            return
        cells = [f"{row[key]:10{form}}" if key in row else " " * 10 for key, (_, form) in COLUMNS.items()]
        print(f"{row['part']:<48}", *cells, sep="", flush=True)

    def note(self, part, value):
        if self.as_json:
            print(json.dumps({"part": part.strip(), "value": value}), flush=True)
        else:
            print(f"{part:<48}{value:10.3g}", flush=True)


# Speed


def autocast(precision):
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=precision == "bf16")


def training_step(model, loss, precision):
    """-> a function that makes one step of AdamW on loss(model)."""
    optimizer = rae_decoder_train.adamw(model)

    def step():
        # On a CPU the trainings switch fused attention off (rae_encoder.set_up).
        plain = sdpa_kernel(SDPBackend.MATH) if DEVICE.type == "cpu" else contextlib.nullcontext()
        with plain, autocast(precision):
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


def flow_inputs(batch):
    """Latents, times and labels."""
    x = torch.randn(batch, *LATENT, device=DEVICE)
    t = torch.rand(batch, device=DEVICE)
    y = torch.randint(CLASSES, (batch,), device=DEVICE)
    return x, t, y


def bench_dit(table, quick, precision):
    model = dit_dh.build("DiT-DH-S", LATENT, CLASSES).to(DEVICE)
    for batch in (4,) if quick else (4, 16):
        x, t, y = flow_inputs(batch)
        name = f"DiT-DH-S batch {batch} {precision}"
        table.add(f"{name} forward", forward(partial(model.eval(), x, t, y), precision), batch, precision)
        loss = partial(flow_train.flow_loss, x=x, y=y, t=t, eps=torch.randn_like(x))
        step = training_step(model.train(), loss, precision)
        table.add(f"{name} training step", step, batch, precision)


def bench_decoder(table, quick, precision):
    batch = 2 if quick else 8
    z = torch.randn(batch, *LATENT, device=DEVICE)
    images = torch.rand(batch, 3, 256, 256, device=DEVICE)
    decoder = rae_decoder_train.Decoder("ViT-B", 768, 16, 16, [0.5] * 3, [0.5] * 3).to(DEVICE)
    step = training_step(decoder, lambda model: F.l1_loss(model(z), images), precision)
    table.add(f"stage 1 step, ViT-B, L1, batch {batch} {precision}", step, batch, precision)


def bench_encoder(table, quick, precision):
    encoder = rae_encoder.Encoder("vit_base_patch14_reg4_dinov2", weights="random").to(DEVICE)
    images = torch.rand(4 if quick else 16, 3, 256, 256, device=DEVICE)
    # Stage 2 and statistics encode in fp32 whatever the precision.
    for used in sorted({precision, "fp32"}):
        part = f"encoder DINOv2-B batch {len(images)} {used}"
        table.add(part, forward(partial(encoder, images), used), len(images), used)


def bench_inception(table, quick, precision):
    images = torch.randint(0, 256, (8 if quick else 16, 3, 256, 256), dtype=torch.uint8, device=DEVICE)
    network = fid.Inception().fold().to(DEVICE)
    with rae_encoder.exact_fp32():
        run = forward(partial(network, images), "fp32")
        table.add(f"Inception batch {len(images)} fp32", run, len(images), "fp32")


def bench_frechet(table, quick, precision):
    size = 512 if quick else 2048
    one, two = (fid.moments(torch.randn(3000, size) @ torch.randn(size, size)) for _ in range(2))
    part = f"Frechet distance, {size} dimensions"
    table.add(part, partial(fid.frechet_distance, *one, *two))
    root = scipy.linalg.sqrtm((one[1] @ two[1]).numpy()).real.trace()
    expected = (one[0] - two[0]).square().sum() + one[1].trace() + two[1].trace() - 2 * root
    error = abs(fid.frechet_distance(*one, *two) / expected.item() - 1)
    table.note("  relative difference from scipy.linalg.sqrtm", error)


def bench_loader(table, quick, precision):
    num = 64 if quick else 200
    with tempfile.TemporaryDirectory() as folder:
        rae_encoder.draw_demo(f"{folder}/demo", num)
        images = rae_encoder.ImageData(f"{folder}/demo", 32)
        order = rae_encoder.even_order(len(images), num, 32)
        load = partial(rae_encoder.load_images, images, order, DEVICE)
        table.add("loader, 32 px, no workers", lambda: list(load()), num)


# Memory of a training step, by tensors that have shapes but no values


class PeakMemory(TorchDispatchMode):
    """The bytes of the storages that live, rounded as by CUDA's allocator, and the most of them so far."""

    def __init__(self):
        super().__init__()
        self.sizes = {}  # of the living, by id
        self.live = 0
        self.peak = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **kwargs or {})
        tree_map_only(torch.Tensor, self.count, result)
        return result

    def count(self, tensor):
        storage = tensor.untyped_storage()
        if id(storage) not in self.sizes:
            self.sizes[id(storage)] = 512 * math.ceil(storage.nbytes() / 512)
            self.live += self.sizes[id(storage)]
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.forget, id(storage))

    def forget(self, key):
        self.live -= self.sizes.pop(key)


def autocast_like_cuda():
    """Casts in the CPU's autocast what else CUDA's casts: copies that wait for the backward pass.

    Returns what holds while it lives. Of CUDA's list these are the operations that get bf16 in our steps.
    """
    library = torch.library.Library("aten", "IMPL", "AutocastCPU")
    for name in ("pow.Tensor_Scalar", "sum.dim_IntList", "addcmul"):
        packet, _, overload = name.partition(".")
        operation = getattr(getattr(torch.ops.aten, packet), overload or "default")
        library.impl(name, partial(in_fp32, operation, mixed=name == "addcmul"))
    return library


def in_fp32(operation, *args, mixed, **options):
    """The operation on fp32 copies of its bf16 arguments; mixed: only where another is fp32 already."""
    dtypes = {x.dtype for x in args if isinstance(x, torch.Tensor)}
    if not mixed or torch.float32 in dtypes:
        args = tree_map_only(torch.Tensor, torch.Tensor.float, args)
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)):
        return operation(*args, **options)


def flow_step(name, batch, size, recompute, precision, place):
    """Stage 2 -> (its step, the networks that it trains). place: how a network is made of its function."""
    encoder = place(partial(make_encoder, size))
    latent = (encoder.width, encoder.grid, encoder.grid)
    network = place(partial(dit_dh.build, name, latent, CLASSES)).train()
    network.checkpoint_activations = recompute
    optimizer = flow_train.adamw(network)
    settings = {"time_dist": "logit-normal", "shift": 7.0, "clip": 1.0, "accum": 1, "precision": precision}

    def step():
        z = encoder(torch.zeros(batch, 3, size, size))
        flow_train.train_step(network, optimizer, z, torch.zeros(batch).long(), **settings)

    return step, [network]


def decoder_step(name, batch, size, recompute, precision, place):
    """Stage 1 with LPIPS and GAN, as flow_step."""
    encoder = place(partial(make_encoder, size))
    sizes = (encoder.width, encoder.grid, 16, [0.5] * 3, [0.5] * 3)
    decoder = place(partial(rae_decoder_train.Decoder, name, *sizes))
    decoder.checkpoint_activations = recompute
    perceptual = place(partial(rae_decoder_train.perceptual_loss, "random"))
    disc = place(partial(rae_decoder_train.Discriminator, "random")).eval()
    optimizer = rae_decoder_train.adamw(decoder)
    disc_optimizer = rae_decoder_train.adamw(disc.heads)
    settings = {"noise_tau": 0.8, "lpips_weight": 1.0, "gan_weight": 0.75, "accum": 1, "precision": precision}

    def step():
        images = torch.zeros(batch, 3, size, size)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            z = encoder(images)
        rae_decoder_train.decoder_step(decoder, optimizer, images, z, perceptual, disc, **settings)
        rae_decoder_train.disc_step(disc, disc_optimizer, images, z, decoder, 1, precision)

    return step, [decoder, disc.heads]


def make_encoder(size):
    return rae_encoder.Encoder("vit_base_patch14_reg4_dinov2", image_size=size, weights="random")


def without_values(make, device="cpu"):
    """The module make(), its weights and buffers fake tensors on the device."""
    warnings.filterwarnings("ignore", ".* to a meta parameter")  # lpips has some weights of its own
    with unset_fake_temporarily(), torch.device("meta"):
        module = make()
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                fake = torch.empty(weight.shape, device=device)
                part._parameters[name] = torch.nn.Parameter(fake, weight.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
    return module


def fake_peak(build, name, batch, size, recompute, precision):
    """(bytes at the peak of the second step, when AdamW's moments are there, bytes of trained weights)."""
    finite = mock.patch.object(torch, "isfinite", return_value=True)
    no_hash = mock.patch.object(rae_encoder, "fingerprint", return_value="")
    with finite, no_hash, FakeTensorMode(), PeakMemory() as memory:
        step, networks = build(name, batch, size, recompute, precision, without_values)
        step()
        step()
    weights = [weight for network in networks for weight in network.parameters() if weight.requires_grad]
    return memory.peak, 4 * sum(weight.numel() for weight in weights)


def real_peak(build, name, batch, size, recompute, precision):
    """Bytes by which a process grows in two steps on a CPU."""
    before = most_bytes()
    step, _ = build(name, batch, size, recompute, precision, lambda make: make())
    step()
    step()
    return most_bytes() - before


def most_bytes():
    """The most that this process had at any time."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def images_within(capacity, floor, fixed, each):
    """The largest power of two of images that fit, since batches are powers of two; 0 where none does."""
    number = 1
    while max(floor, fixed + each * number) <= capacity:
        number *= 2
    return number // 2


def memory_rows(build, name, size):
    """Lines of a Markdown table: a training step's memory in GB, and the images that fit on three GPUs."""
    few, many = (128, 192) if size == 256 else (32, 48)
    least, weights = fake_peak(build, name, 1, size, False, "fp32")
    copies = 2 * weights  # EMA and DDP's buckets
    for precision in ("bf16", "fp32"):
        for recompute in (False, True):
            low, _ = fake_peak(build, name, few, size, recompute, precision)
            high, _ = fake_peak(build, name, many, size, recompute, precision)
            each = (high - low) / (many - few)
            fixed = low - few * each + copies
            cells = [
                f"{name}, {size} px",
                precision,
                "yes" if recompute else "",
                f"{fixed / 1e9:.1f}",
                f"{(least + copies) / 1e9:.1f}",
                f"{each / 1e9:.3f}",
            ]
            for capacity in (24e9, 40e9, 80e9):
                cells.append(str(images_within(capacity, least + copies, fixed, each)))
            yield f"| {' | '.join(cells)} |"


def bench_memory(table, quick, precision):
    """By name alone: the README's table.

    In `fixed` are weights, EMA, gradients, DDP's buckets, AdamW's moments, encoder, in stage 1 VGG and DINO;
    `at least` is the peak of AdamW's step.
    """
    library = autocast_like_cuda()
    cases = [(flow_step, name, 256) for name in ("DiT-DH-S", "DiT-DH-B", "DiT-DH-XL")]
    cases += [(flow_step, "DiT-DH-XL", 512), (decoder_step, "ViT-XL", 256), (decoder_step, "ViT-XL", 512)]
    print("| network | precision | checkpointed | fixed | at least | each image | 24 GB | 40 GB | 80 GB |")
    print("|---|---|---|---|---|---|---|---|---|")
    for build, name, size in cases[:1] if quick else cases:
        for row in memory_rows(build, name, size):
            print(row, flush=True)
    del library


def bench_memory_error(table, quick, precision):
    """By name alone: the count of bench_memory beside a process that really trains, on a CPU."""
    for build, name in ((flow_step, "DiT-DH-S"), (decoder_step, "ViT-S")):
        for batch in (2,) if quick else (2, 6):
            case = (build, name, batch, 256, False, "fp32")
            counted, _ = fake_peak(*case)
            # A new process has its memory for itself.
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                real = pool.submit(real_peak, *case).result()
            table.note(f"{name} batch {batch} fp32: counted, GB", counted / 1e9)
            table.note("  process, GB", real / 1e9)
            table.note("  counted / process", counted / real)


def main(argv=None):
    benches = {name[6:]: run for name, run in globals().items() if name.startswith("bench_")}
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--quick", action="store_true", help="smaller batches")
    parser.add_argument("--json", action="store_true", help="a JSON line for each row")
    parser.add_argument("--only", choices=benches, help="one part")
    parser.add_argument("--precision", choices=DTYPES, help="default: what the scripts would choose")
    args = parser.parse_args(argv)

    by_name = {"memory", "memory_error"}
    chosen = [args.only] if args.only else [name for name in benches if name not in by_name]

    rae_encoder.join_ranks(DEVICE.type)
    precision, why = rae_encoder.choose_precision(args.precision, DEVICE)
    threads = f"{torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {DEVICE.type}, {threads}; {precision}: {why}", file=sys.stderr)
    torch.manual_seed(0)
    table = Table(args.json)
    limited = args.only not in by_name
    if limited:
        table.head()
        for each in DTYPES:
            table.add_limit(each, "at the start")
    for name in chosen:
        benches[name](table, args.quick, precision)
    if limited:
        for each in DTYPES:
            table.add_limit(each, "at the end")


if __name__ == "__main__":
    main()
