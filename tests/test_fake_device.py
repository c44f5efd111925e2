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


def test_exact_fp32_has_no_tf32_and_leaves_no_trace():
    """Latents are made while they are summed to statistics, so the encoder runs without TF32 as well."""
    seen = []

    def latents():
        seen.append(tf32())
        yield torch.randn(2, 2, 3, 4, 4)

    torch.set_float32_matmul_precision("high")  # as join_ranks leaves a process with CUDA
    try:
        with pytest.raises(ValueError), exact_fp32():
            seen.append(tf32())
            raise ValueError
        after = [tf32()]
        rae_encoder.latent_statistics(latents())
        after.append(tf32())
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == 2 * [("highest", False)] and after == 2 * [("high", True)]


# Compiling


@pytest.fixture
def own_limit():
    """compile_blocks sets a limit of torch's; each test begins with torch's own."""
    torch._dynamo.reset()
    before = torch._dynamo.config.cache_size_limit
    yield
    torch._dynamo.config.cache_size_limit = before


class Block:
    compiled = False

    def compile(self):
        self.compiled = True


@pytest.mark.slow
def test_compiling_is_for_cuda_unless_asked_and_needs_a_compiler(own_limit, monkeypatch):
    for explicit, name, compiled in (
        (None, "cuda", True),
        (None, "cpu", False),
        (None, "mps", False),
        (True, "cpu", True),
        (False, "cuda", False),
    ):
        case = ([Block(), Block()], explicit, torch.device(name))
        monkeypatch.setattr(shutil, "which", lambda name: None)
        if compiled:
            assert "--no-compile" in message(compile_blocks, *case)
            monkeypatch.setattr(shutil, "which", lambda name: name)
        compile_blocks(*case)
        assert [block.compiled for block in case[0]] == [compiled, compiled], case


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
    versions = []
    blocks = [Scaled(float(k), versions) for k in range(10)]
    compile_blocks(blocks, True, torch.device("cpu"))
    for block in blocks:
        block(torch.ones(2))
    assert len(versions) == 10


# Process groups


def test_ddp_is_silent(monkeypatch, tmp_path, recwarn):
    """torch 2.14 warns of the old name of a flag, which alone older versions know."""
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }.items():
        monkeypatch.setenv(name, value)
    start = dist.init_process_group

    def start_alone(timeout, **_options):
        assert timeout.total_seconds() == 3600
        store = dist.FileStore(str(tmp_path / "store"), 1)
        start(backend="gloo", store=store, rank=0, world_size=1, timeout=timeout)

    monkeypatch.setattr(dist, "init_process_group", start_alone)
    rae_encoder.join_ranks("cpu")
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
    """A row of a distance, between the limits of the machine."""
    bench.main(["--quick", "--json", "--only", "frechet"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    start, end = (
        [f"matrix product {name}, at the {when}: the limit" for name in bench.DTYPES]
        for when in ("start", "end")
    )
    note = rows.pop(3)
    assert [row["part"] for row in rows] == [*start, "Frechet distance, 512 dimensions", *end]
    assert all(row["ms"] > 0 and row["spread"] >= 0 for row in rows) and note["value"] < 1e-6


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
        assert row["of_limit"] == row["gflops"]
