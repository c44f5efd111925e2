"""Every step on a device that only pretends: training, sampling, features. Run by test_fake_device.py.

    python -m pytest -q tests/fake_device.py      # no GPU, no driver; nothing is computed

torch's FakeTensorMode knows shapes, dtypes and devices. In it, as on a GPU, an operation on tensors of two
devices is an error. Fake "cuda" tensors can't go backward without a driver, so the device is one of Python's
own, "gpu". To register it changes torch for the whole process: these tests must have one to themselves.

It does not see the mains, pinned loading, isfinite (which is made up) and numbers of any kind: those are in
test_cuda.py.
"""

import copy
import sys
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._pytree import tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench import without_values  # noqa: E402

import dit_dh  # noqa: E402
import fid  # noqa: E402
import flow_train  # noqa: E402
import rae_decoder_train  # noqa: E402
import rae_encoder  # noqa: E402
import sample  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.* to a meta parameter")  # lpips has weights of its own
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

    def cast(x):
        return x.bfloat16() if x.dtype == torch.float32 else x

    def kernel(*args, **options):
        with torch._C._ExcludeDispatchKeyGuard(AUTOCAST):
            return operation(*tree_map_only(torch.Tensor, cast, args), **options)

    return kernel


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
    monkeypatch.setattr(torch, "allclose", lambda a, b, **options: True)
    monkeypatch.setattr(rae_encoder, "fingerprint", lambda tensors: "")
    monkeypatch.setattr(sample, "weights_hash", lambda state: "")
    with FakeTensorMode(allow_non_fake_inputs=False), torch.autograd.set_multithreading_enabled(False):
        yield


def ones(shape):
    """Lists in lists, as tolist() makes them of a tensor of this shape."""
    return [ones(shape[1:]) for _ in range(shape[0])] if shape else 1.0


NETWORKS = {
    "encoder": lambda: rae_encoder.Encoder("vit_small_patch14_reg4_dinov2", weights="random"),
    "decoder": lambda: rae_decoder_train.Decoder("ViT-mini", 384, 16, 16, [0.5] * 3, [0.5] * 3),
    "perceptual": lambda: rae_decoder_train.perceptual_loss("random"),
    "discriminator": lambda: rae_decoder_train.Discriminator("random").eval(),
    "DiT": lambda: dit_dh.build("DiT-S", LATENT, 1000, depth=3),
    "DiT-DH": lambda: dit_dh.build("DiT-DH-S", LATENT, 1000, depth=3),
    "x with base": lambda: dit_dh.build("DiT-DH-S", LATENT, 1000, "x", 2, depth=3),
    "Inception": lambda: fid.Inception("adm").fold(),
}


@cache
def on_meta(name):
    """The network, built without memory or values, once for all tests."""
    with unset_fake_temporarily(), torch.device("meta"):
        return NETWORKS[name]()


def on_gpu(name):
    """A copy of the network with parameters and buffers on the device."""
    return without_values(partial(copy.deepcopy, on_meta(name)), GPU)


def on_device(*tensors):
    assert tensors
    for tensor in tensors:
        assert tensor.device == GPU


def gradients(parameters):
    return [weight.grad for weight in parameters if weight.grad is not None]


def latents():
    return torch.empty(4, *LATENT, device=GPU)


# The steps


def run_flow(network, **options):
    network.train()
    optimizer = flow_train.adamw(network)
    y = torch.zeros(4, dtype=torch.long, device=GPU)
    terms, finite = flow_train.train_step(network, optimizer, latents(), y, **FLOW | options)
    on_device(*terms.values(), *gradients(network.parameters()))
    assert finite and optimizer.state


def run_decoder(gan=True, recompute=False, **options):
    network = on_gpu("decoder")
    network.checkpoint_activations = recompute
    disc = on_gpu("discriminator") if gan else None
    step = DECODER | options
    images = torch.empty(4, 3, 256, 256, device=GPU)
    optimizer = rae_decoder_train.adamw(network)
    terms, _ = rae_decoder_train.decoder_step(
        network, optimizer, images, latents(), on_gpu("perceptual"), disc, **step
    )
    on_device(*terms.values(), *gradients(network.parameters()))
    if gan:
        optimizer = rae_decoder_train.adamw(disc.heads)
        settings = (step["accum"], step["precision"])
        loss, _ = rae_decoder_train.disc_step(disc, optimizer, images, latents(), network, *settings)
        on_device(loss, *gradients(disc.heads.parameters()))


class Data:
    """Eight images, as much of ImageData as latents need."""

    seed = 0

    def __len__(self):
        return 8


def load(data, order, device, workers=0):
    """In the place of load_images: four images and labels a batch."""
    for keys in order:
        yield torch.empty(len(keys), 3, 256, 256).to(device), torch.zeros(len(keys)).long().to(device)


def run_statistics(network, monkeypatch):
    monkeypatch.setattr(rae_encoder, "load_images", load)
    views = rae_encoder.encode_views(network, Data(), rae_encoder.even_order(8, 8, 4))
    on_device(*rae_encoder.latent_statistics(z for z, _ in views))


def network_of_file():
    network = on_gpu("DiT-DH").eval()
    network.config = {"latent_shape": list(LATENT), "num_classes": 1000}
    return network


def run_sampling(monkeypatch, *flags):
    """What sample.py does between its files: the images of open_sampling, in autocast."""
    statistics = {"mean": torch.zeros(LATENT), "var": torch.ones(LATENT)}  # on the CPU, as they are read
    monkeypatch.setattr(sample, "local_file", lambda path, flag: path)
    monkeypatch.setattr(dit_dh, "load", lambda path, flag: network_of_file())
    monkeypatch.setattr(sample, "read_weights", lambda path, flag: statistics)
    monkeypatch.setattr(sample, "load_decoder", lambda *args: (on_gpu("decoder").eval(), {}))
    monkeypatch.setattr(nn.Module, "to", lambda module, device: module)  # fake weights can't be moved
    args = sample.parse_args(
        ["--flow", "flow.pt", "--decoder", "decoder.pt", "-n", "6", "--steps", "4", *flags]
    )
    *_, images, _ = sample.open_sampling(args, GPU)
    with torch.no_grad(), torch.autocast("gpu", torch.bfloat16):
        for made in images([[0, 1, 2, 3], [4, 5]]):
            on_device(made)
            assert made.shape[1:] == (3, 256, 256)


# Every step stays on the device


def test_ema():
    ema = on_gpu("DiT")
    flow_train.update_ema(ema, on_gpu("DiT"), 0.9)
    on_device(*ema.parameters())


@pytest.mark.parametrize("options", [{}, {"accum": 2, "precision": "fp32", "clip": 0}])
@pytest.mark.parametrize("distribution", ["uniform", "logit-normal"])
def test_train_step(distribution, options):
    run_flow(on_gpu("DiT"), time_dist=distribution, **options)


@pytest.mark.parametrize("recompute", [False, True])
def test_train_step_of_a_head_and_a_base(recompute):
    network = on_gpu("x with base")
    network.checkpoint_activations = recompute
    run_flow(network, prediction="x", with_base=True)
    on_device(*gradients(network.base_layer.parameters()))


@pytest.mark.parametrize(
    "options",
    [{"gan": False, "noise_law": "half-normal"}, {}, {"recompute": True, "accum": 2, "precision": "fp32"}],
)
def test_decoder_step(options):
    run_decoder(**options)


def test_statistics(monkeypatch):
    run_statistics(on_gpu("encoder"), monkeypatch)


@pytest.mark.parametrize(("cached", "flip"), [(False, True), (True, True), (True, False)])
def test_latents(cached, flip, monkeypatch):
    monkeypatch.setattr(flow_train, "load_images", load)
    monkeypatch.setattr(rae_encoder, "load_images", load)
    network = on_gpu("encoder")
    source = flow_train.LatentCache(network, Data(), flip, 4, 0, 0) if cached else Data()
    mean = torch.zeros(LATENT, device=GPU)
    var = torch.ones(LATENT, device=GPU)
    order = rae_encoder.even_order(8, 8, 4)
    for z, y in flow_train.load_latents(source, network, mean, var, order, 0):
        on_device(z, y)


@pytest.mark.parametrize("guidance", [[], ["--cfg", "2"], ["--cfg", "2", "--autoguide", "weak.pt"]])
def test_sampling(guidance, monkeypatch):
    run_sampling(monkeypatch, "--solver", "heun", *guidance)


def test_inception():
    with torch.inference_mode():
        on_device(on_gpu("Inception")(torch.zeros(2, 3, 64, 64, dtype=torch.uint8, device=GPU)))


# A tensor on the wrong device is found


def test_a_tensor_left_behind_is_found(monkeypatch):
    """One in each script: times, augmented images, the encoder's mean, the noise of samples."""
    wrong_device = pytest.raises((RuntimeError, AssertionError), match="(?s)device")
    for module, name, run in (
        (flow_train, "draw_times", lambda: run_flow(on_gpu("DiT"))),
        (rae_decoder_train, "diff_augment", run_decoder),
    ):
        function = getattr(module, name)
        with monkeypatch.context() as patch, wrong_device:
            patch.setattr(module, name, lambda *args, function=function: function(*args).cpu())
            run()
    network = on_gpu("encoder")
    network.mean = torch.zeros(3, 1, 1)
    with monkeypatch.context() as patch, wrong_device:
        run_statistics(network, patch)
    with monkeypatch.context() as patch, wrong_device:
        statistics = (torch.zeros(LATENT), torch.ones(LATENT))
        patch.setattr(sample, "open_statistics", lambda *args: statistics)
        run_sampling(patch)
