"""What a GPU asks of the code, as far as it shows without one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import bench
import pytest
import torch
import torch.distributed as dist
from helpers import message

import flow_train
import rae_decoder_train
import rae_encoder
from rae_encoder import compile_blocks, exact_fp32


@pytest.mark.slow
def test_every_step_on_a_device_that_only_pretends():
    """In a process of its own: the device is registered in torch, where other tests would meet it."""
    tests = Path(__file__).with_name("fake_device.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
    assert torch._C._get_privateuse1_backend_name() == "privateuseone"  # here it is not


# TF32


def tf32():
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32


@pytest.fixture
def released_tf32():
    """The state in which join_ranks leaves a process with CUDA."""
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


def test_exact_fp32_has_no_tf32_and_leaves_no_trace(released_tf32):
    cudnn = torch.backends.cudnn.enabled
    with pytest.raises(ValueError), exact_fp32():
        assert tf32() == ("highest", False)
        assert torch.backends.cudnn.enabled == cudnn
        raise ValueError
    assert tf32() == ("high", True)


def test_statistics_are_exact(released_tf32):
    """Their latents are made while they are summed, so the encoder runs without TF32 as well."""
    seen = []

    def latents():
        seen.append(tf32())
        yield torch.randn(2, 2, 3, 4, 4)

    rae_encoder.latent_statistics(latents())
    assert seen == [("highest", False)]
    assert tf32() == ("high", True)


# Compiling


@pytest.fixture
def own_limit():
    """compile_blocks sets a limit of torch's; each test begins with torch's own."""
    torch._dynamo.reset()
    before = torch._dynamo.config.cache_size_limit
    yield
    torch._dynamo.config.cache_size_limit = before


class Blocks(list):
    """Two blocks that only note that they are compiled."""

    def __init__(self):
        self.compiled = 0
        super().__init__([self, self])

    def compile(self):
        self.compiled += 1


@pytest.mark.slow
def test_compiling_is_for_cuda_unless_asked(own_limit, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: name)  # a machine with a C compiler
    for asked, device, expected in (
        (None, "cuda", 2),
        (None, "cpu", 0),
        (None, "mps", 0),
        (True, "cpu", 2),
        (False, "cuda", 0),
    ):
        blocks = Blocks()
        compile_blocks(blocks, asked, torch.device(device))
        assert blocks.compiled == expected, (asked, device)


@pytest.mark.slow
def test_without_a_compiler_one_line_says_what_to_do(own_limit, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    blocks = Blocks()
    assert "--no-compile" in message(compile_blocks, blocks, None, torch.device("cuda"))
    assert not blocks.compiled
    compile_blocks(blocks, False, torch.device("cuda"))  # whoever does not compile needs none


class Scaled(torch.nn.Module):
    """Its factor is a constant of what is compiled, so each factor is a version of its own."""

    def __init__(self, factor, versions):
        super().__init__()
        self.factor = factor
        self.versions = versions

    def compile(self):
        super().compile(backend=self.note)

    def note(self, graph, inputs):
        self.versions.append(self.factor)
        return graph.forward

    def forward(self, x):
        return x * self.factor


@pytest.mark.slow
def test_past_eight_versions_blocks_are_still_compiled(own_limit, monkeypatch):
    """torch's own limit is eight; past it a block runs eager without a word."""
    monkeypatch.setattr(shutil, "which", lambda name: name)  # nothing here needs a real C compiler
    x = torch.ones(2)
    versions = []
    blocks = [Scaled(float(k), versions) for k in range(10)]
    for block in blocks:
        block.compile()
    for block in blocks:
        block(x)
    assert len(versions) == 8

    torch._dynamo.reset()
    versions.clear()
    compile_blocks(blocks, True, torch.device("cpu"))
    for block in blocks:
        block(x)
    assert len(versions) == 10


# Process groups


def test_ddp_is_silent(monkeypatch, tmp_path, recwarn):
    """torch 2.14 warns of the old name of a flag; older versions, for which this can't fail, don't know the
    new one.
    """
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "0")
    started = []

    def start(**options):
        store = dist.FileStore(str(tmp_path / "store"), 1)
        dist_init(backend="gloo", store=store, rank=0, world_size=1, timeout=options["timeout"])
        started.append(options["timeout"].total_seconds())

    dist_init = dist.init_process_group
    monkeypatch.setattr(dist, "init_process_group", start)
    rae_encoder.join_ranks("cpu")
    assert started == [3600]
    try:
        rae_encoder.parallel(torch.nn.Linear(2, 2), [], None, torch.device("cpu"))
    finally:
        dist.destroy_process_group()
    assert not [str(warning.message) for warning in recwarn if "buffers" in str(warning.message)]


# Memory


@pytest.mark.slow
@pytest.mark.parametrize("script", [flow_train, rae_decoder_train])
def test_presets_fit_eight_gpus_of_80_gb(script, preset="imagenet256"):
    """In fp32, which takes more than bf16, with the GAN, EMA and DDP's buckets: as bench.py counts it."""
    args = script.parse_args(["--preset", preset, "--data", "x"])
    build = bench.flow_step if script is flow_train else bench.decoder_step
    name = args.model if script is flow_train else args.decoder

    def step_bytes(accum):
        images = args.batch_size // (8 * accum)
        recompute = args.checkpoint_activations
        peak, weights = bench.fake_peak(build, name, images, args.image_size, recompute, "fp32")
        return peak + 2 * weights

    assert step_bytes(args.accum) < 80e9
    if args.accum > 1:
        assert step_bytes(args.accum // 2) > 80e9  # no more micro-batches than needed


def test_the_count_of_memory_is_that_of_a_step_known_by_hand():
    """y = (x * 2).sum(): x and its double at the peak, and x alone after it."""
    memory = bench.PeakMemory()
    with memory:
        x = torch.zeros(1000)
        y = (x * 2).sum()
        rows = x.view(10, 100)  # no memory of its own
    assert memory.peak == 4096 + 4096 + 512
    assert memory.live == 4096 + 512
    del x, rows
    assert memory.live == 512
    del y
    assert memory.live == 0


# Speed


@pytest.mark.slow
def test_bench_runs(one_thread, capsys):
    """A row of a distance that is known elsewhere, between the limits of the machine."""
    bench.main(["--quick", "--json", "--only", "frechet"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    limits = [
        f"matrix product {name}, at the {when}: the limit"
        for when in ("start", "end")
        for name in bench.DTYPES
    ]
    assert [row["part"] for row in rows] == [*limits[:2], "Frechet distance, 512 dimensions", *limits[2:]]
    assert all(row["ms"] > 0 and row["spread"] >= 0 for row in rows)


@pytest.mark.slow
def test_rows_of_bench_count_attention_alike(one_thread):
    """A block's products: four of its width, two of attention, two of its MLP; backward takes twice that."""
    batch, tokens, width = 2, 5, 8
    block = torch.nn.TransformerEncoderLayer(width, 2, 16, dropout=0, batch_first=True)
    x = torch.randn(batch, tokens, width, requires_grad=True)
    table = bench.Table(as_json=True)
    table.limit = {"fp32": 1.0}
    flops = 2 * batch * tokens * (4 * width**2 + 2 * tokens * width + 2 * 16 * width)
    for run, times in (
        (bench.forward(lambda: block(x), "fp32"), 1),
        (bench.training_step(block, lambda model: model(x).square().mean(), "fp32"), 3),
    ):
        rows = []
        table.show = lambda row, images, rows=rows: rows.append(row)
        table.add("block", run, precision="fp32")
        (row,) = rows
        assert row["gflops"] * row["ms"] * 1e6 == pytest.approx(times * flops)
        assert row["of_own"] > 0
