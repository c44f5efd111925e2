"""Every step on a device that only pretends: training, sampling, evaluation. Run by test_fake_device.py.

    python -m pytest -q tests/fake_device.py      # no GPU, no driver; nothing is computed

torch's FakeTensorMode knows shapes, dtypes and devices. In it, as on a GPU, an operation on tensors of two
devices is an error. Fake "cuda" tensors can't go backward without a driver, so the device is one of Python's
own, "gpu". To register it changes torch for the whole process: these tests must have one to themselves.
"""

import inspect
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._pytree import tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

sys.path.insert(0, str(Path(__file__).parents[1]))
import dit_dh  # noqa: E402
import fid  # noqa: E402
import flow_train  # noqa: E402
import rae_decoder_train  # noqa: E402
import rae_encoder  # noqa: E402
import sample  # noqa: E402

LATENT = (384, 16, 16)  # of DINOv2-S at 256 px
FLOW = {"time_dist": "logit-normal", "shift": 6.93, "clip": 1.0, "accum": 1, "precision": "bf16"}
DECODER = {"noise_tau": 0.8, "lpips_weight": 1.0, "gan_weight": 0.75, "accum": 1, "precision": "bf16"}


# The device


class Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self):
        return [torch.bfloat16]


_setup_privateuseone_for_python_backend("gpu", backend_module=Backend())
GPU = torch.device("gpu", 0)
AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)


def in_bf16(operation):
    """What autocast makes of an operation: its fp32 arguments are cast to bf16."""

    def kernel(*args, **options):
        with torch._C._ExcludeDispatchKeyGuard(AUTOCAST):
            return operation(*tree_map_only(torch.Tensor, to_bf16, args), **options)

    return kernel


def to_bf16(x):
    return x.bfloat16() if x.dtype == torch.float32 else x


# The operations that CUDA's autocast casts down; all others are left as they are.
DEFAULT = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
DEFAULT.fallback(torch.library.fallthrough_kernel)
CASTS = torch.library.Library("aten", "IMPL", "AutocastPrivateUse1")
for name in ("linear", "matmul", "mm", "bmm", "addmm", "conv1d", "conv2d", "scaled_dot_product_attention"):
    CASTS.impl(name, in_bf16(getattr(torch.ops.aten, name)))


@pytest.fixture(autouse=True)
def fake(monkeypatch):
    """Fake mode, in which values that a step asks for are made up."""
    tensor = torch.tensor
    tolist = torch.Tensor.tolist

    # Numbers are copied to a device outside of what fake mode sees.
    def make_tensor(data, dtype=None, device="cpu"):
        made = tensor(data, dtype=dtype)
        return torch.empty(made.shape, dtype=made.dtype, device=device)

    def new_tensor(self, data):
        return make_tensor(data, self.dtype, self.device)

    def real_list(self):
        with unset_fake_temporarily():
            return tolist(self)

    monkeypatch.setattr(FakeTensor, "tolist", lambda self: ones(self.shape))
    monkeypatch.setattr(torch.Tensor, "tolist", real_list)
    monkeypatch.setattr(torch.Tensor, "new_tensor", new_tensor)
    monkeypatch.setattr(torch, "tensor", make_tensor)
    monkeypatch.setattr(torch, "isfinite", lambda x: True)
    monkeypatch.setattr(rae_encoder, "fingerprint", lambda tensors: "")
    monkeypatch.setattr(sample, "network_hash", lambda tensors: "")
    with FakeTensorMode(allow_non_fake_inputs=False), torch.autograd.set_multithreading_enabled(False):
        yield


def ones(shape):
    """Lists in lists, as tolist() makes them of a tensor of this shape."""
    return [ones(shape[1:]) for _ in range(shape[0])] if shape else 1.0


def on_gpu(make):
    """The module make(), built without memory or values, with parameters and buffers on the device."""
    with unset_fake_temporarily(), torch.device("meta"):
        module = make()
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                moved = torch.empty(value.shape, dtype=value.dtype, device=GPU)
                part._parameters[name] = nn.Parameter(moved, value.requires_grad)
        for name, value in part._buffers.items():
            if value is not None:
                part._buffers[name] = torch.empty(value.shape, dtype=value.dtype, device=GPU)
    return module


def on_device(*tensors):
    assert tensors
    for tensor in tensors:
        assert tensor.device == GPU


def gradients(parameters):
    return [weight.grad for weight in parameters if weight.grad is not None]


def images(num=4):
    return torch.empty(num, 3, 256, 256, device=GPU)


def latents(num=4):
    return torch.empty(num, *LATENT, device=GPU)


def labels(num=4):
    return torch.zeros(num, dtype=torch.long, device=GPU)


def make_encoder(script=rae_encoder):
    return on_gpu(lambda: script.Encoder("vit_small_patch14_reg4_dinov2", image_size=256, weights="random"))


def make_decoder(script=rae_decoder_train):
    return on_gpu(lambda: script.Decoder("ViT-mini", 384, 16, 16, [0.5] * 3, [0.5] * 3))


def make_perceptual():
    return on_gpu(lambda: rae_decoder_train.perceptual_loss("random"))


def make_disc(script=rae_decoder_train):
    return on_gpu(lambda: script.Discriminator("random").eval())


def make_dit(name="DiT-S", **options):
    return on_gpu(lambda: dit_dh.build(name, LATENT, 1000, depth=3, **options))


# The steps. Each takes the script that it is of, so that it runs on altered ones, too.


def run_flow(script, network, **options):
    network.train()
    optimizer = script.adamw(network, 1e-4)
    terms, finite = script.train_step(network, optimizer, latents(), labels(), **FLOW | options)
    on_device(*terms.values(), *gradients(network.parameters()))
    assert finite and optimizer.state


def run_decoder(script, gan=True, recompute=False, **options):
    decoder = make_decoder(script)
    decoder.checkpoint_activations = recompute
    disc = make_disc(script) if gan else None
    optimizer = script.adamw(decoder, 1e-4)
    step = DECODER | options
    terms, _ = script.decoder_step(decoder, optimizer, images(), latents(), make_perceptual(), disc, **step)
    on_device(*terms.values(), *gradients(decoder.parameters()))
    if disc:
        optimizer = script.adamw(disc.heads, 1e-4)
        settings = (step["accum"], step["precision"])
        loss, _ = script.disc_step(disc, optimizer, images(), latents(), decoder, *settings)
        on_device(loss, *gradients(disc.heads.parameters()))


class Data:
    """Eight images, as much of ImageData as latents and evaluation need."""

    seed = 0

    def __len__(self):
        return 8


def load(data, order, device, workers=0):
    """In the place of load_images: four images and labels a batch."""
    for keys in order:
        yield torch.empty(len(keys), 3, 256, 256).to(device), torch.zeros(len(keys)).long().to(device)


def run_statistics(script, monkeypatch):
    monkeypatch.setattr(script, "load_images", load)
    encoder = make_encoder(script)
    views = script.encode_views(encoder, Data(), script.even_order(8, 8, 4))
    mean, var = script.latent_statistics(z for z, _ in views)
    on_device(mean, var)


def run_latents(script, cached, monkeypatch):
    monkeypatch.setattr(script, "load_images", load)
    monkeypatch.setattr(rae_encoder, "load_images", load)
    encoder = make_encoder()
    source = script.LatentCache(encoder, Data(), 4, 0, 0, 1) if cached else Data()
    mean = torch.zeros(LATENT, device=GPU)
    var = torch.ones(LATENT, device=GPU)
    for z, y in script.load_latents(source, encoder, mean, var, rae_encoder.even_order(8, 8, 4), 0):
        on_device(z, y)


def run_evaluation(script, monkeypatch):
    monkeypatch.setattr(script, "load_images", load)
    scores = script.evaluate(make_decoder(script), make_encoder(), make_perceptual(), Data(), 0, batch_size=4)
    assert scores.keys() == {"eval_psnr", "eval_lpips"}


def run_sampling(script, monkeypatch, *flags):
    """What sample.py does between its files: Job.images, in autocast."""
    monkeypatch.setattr(script, "local_file", lambda path, flag: path)
    monkeypatch.setattr(dit_dh, "load", lambda path, flag: make_dit("DiT-DH-S").eval())
    monkeypatch.setattr(nn.Module, "to", lambda module, device: module)  # fake weights can't be moved
    statistics = {"mean": torch.zeros(LATENT), "var": torch.ones(LATENT)}  # on the CPU, as they are read
    monkeypatch.setattr(dit_dh, "read", lambda path, flag: statistics)
    monkeypatch.setattr(script, "network_hash", lambda tensors: "")
    args = script.parse_args(["--num", "6", "--steps", "4", *flags])
    job = script.open_sampling(args, make_decoder().eval(), {}, GPU)
    with torch.no_grad(), torch.autocast("gpu", torch.bfloat16):
        for made in job.images([[0, 1, 2, 3], [4, 5]]):
            on_device(made)
            assert made.shape[1:] == (3, 256, 256)


def altered(script, old, new):
    """The script with one piece of its text replaced."""
    source = inspect.getsource(script)
    assert source.count(old) == 1, f"{script.__name__} has {source.count(old)} of {old}"
    module = types.ModuleType(script.__name__)
    module.__file__ = script.__file__
    exec(compile(source.replace(old, new), script.__file__, "exec"), module.__dict__)
    if hasattr(module, "fingerprint"):
        module.fingerprint = lambda tensors: ""
    return module


# Every step stays on the device


def test_ema():
    ema = make_dit()
    flow_train.update_ema(ema, make_dit(), 0.9)
    on_device(*ema.parameters())


@pytest.mark.parametrize("options", [{}, {"accum": 2}, {"precision": "fp32", "clip": 0}])
def test_train_step(options):
    for distribution in ("uniform", "logit-normal"):
        run_flow(flow_train, make_dit(), time_dist=distribution, **options)


@pytest.mark.parametrize("recompute", [False, True])
def test_train_step_of_a_head_and_a_base(recompute):
    network = make_dit("DiT-DH-S", prediction="x", base_depth=2)
    network.checkpoint_activations = recompute
    run_flow(flow_train, network)
    velocity, base = network(latents(), torch.rand(4, device=GPU), labels(), with_base=True)
    (velocity + base).sum().backward()
    on_device(velocity, base, *gradients(network.base_layer.parameters()))


def test_decoder_step():
    run_decoder(rae_decoder_train, gan=False)


@pytest.mark.parametrize("options", [{}, {"recompute": True, "accum": 2, "precision": "fp32"}])
def test_decoder_step_with_discriminator(options):
    run_decoder(rae_decoder_train, **options)


def test_statistics(monkeypatch):
    run_statistics(rae_encoder, monkeypatch)


@pytest.mark.parametrize("cached", [False, True])
def test_latents(cached, monkeypatch):
    run_latents(flow_train, cached, monkeypatch)


def test_evaluation(monkeypatch):
    run_evaluation(rae_decoder_train, monkeypatch)


@pytest.mark.parametrize("guidance", [[], ["--cfg", "2"], ["--cfg", "2", "--autoguide", "weak.pt"]])
def test_sampling(guidance, monkeypatch):
    run_sampling(sample, monkeypatch, "--solver", "heun", *guidance)


@pytest.mark.parametrize("protocol", ["adm", "pytorch-fid", "clean"])
def test_inception(protocol):
    network = on_gpu(lambda: fid.Inception(protocol).fold())
    with torch.inference_mode():
        on_device(network(torch.zeros(2, 3, 64, 64, dtype=torch.uint8, device=GPU)))


# A tensor on the wrong device is found

ALTERED = {
    "times": (flow_train, "torch.randn(num, device=device)", "torch.randn(num)"),
    "loss": (flow_train, "torch.zeros((), device=x.device)", "torch.zeros(1)"),
    "cached latents": (flow_train, "yield (z.to(device) - mean)", "yield (z - mean)"),
    "latent noise": (rae_decoder_train, "1, 1, 1, device=z.device)", "1, 1, 1)"),
    "augmentation": (rae_decoder_train, "torch.arange(size, device=x.device)", "torch.arange(size)"),
    "draws of disc_step": (rae_decoder_train, "2, 5, device=z.device)", "2, 5)"),
    "pixels of the decoder": (
        rae_decoder_train,
        "x * self.std + self.mean",
        "x * self.std.cpu() + self.mean",
    ),
    "8-bit images": (rae_decoder_train, "xhat = to_8_bit(", "xhat = to_8_bit(encoder.mean.cpu() + "),
    "mean of the encoder": (rae_encoder, "(x - self.mean) / self.std", "(x - self.mean.cpu()) / self.std"),
    "sums of the latents": (rae_encoder, 'z.device.type == "mps"', 'z.device.type == "gpu"'),
    "sampling noise": (sample, "model.latent_shape, args.seed).to(device)", "model.latent_shape, args.seed)"),
    "sampling labels": (sample, "for i in indices], device=device)", "for i in indices])"),
    "sampling statistics": (sample, "return mean.to(device)", "return mean"),
    "interpolation": (fid, ".clamp(min=0).to(x.device)", ".clamp(min=0)"),
}


@pytest.mark.parametrize("name", ALTERED)
def test_a_tensor_left_behind_is_found(name, monkeypatch):
    script = altered(*ALTERED[name])
    with pytest.raises((RuntimeError, AssertionError), match="(?s)device"):
        if script.__name__ == "flow_train":
            run_flow(script, make_dit())
            run_latents(script, True, monkeypatch)
        elif script.__name__ == "rae_decoder_train":
            run_evaluation(script, monkeypatch)
            run_decoder(script)
        elif script.__name__ == "rae_encoder":
            run_statistics(script, monkeypatch)
        elif script.__name__ == "sample":
            run_sampling(script, monkeypatch, "--cfg", "2")
        else:
            on_gpu(lambda: script.Inception("adm").fold())(images().byte())
