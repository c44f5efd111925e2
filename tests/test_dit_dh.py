"""The velocity networks against naive formulas, the paper's sizes and the released files' names."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import message
from safetensors.torch import save_file

import dit_dh

SMALL = {
    "DiT": {"width": 32, "depth": 3, "heads": 4},
    "DiT-DH": {"width": 32, "depth": 3, "heads": 4, "head_width": 48, "head_depth": 2, "head_heads": 2},
}
SHAPE, CLASSES = (6, 4, 4), 5


def build(family, prediction="v", base_depth=None, **sizes):
    """A small network at its start."""
    sizes = SMALL[family] | sizes
    return dit_dh.build(f"{family}-S", SHAPE, CLASSES, prediction, base_depth, **sizes)


def small(family, *options, **sizes):
    """A small network of random weights, those that start at zero included, with inputs for it."""
    torch.manual_seed(0)
    model = build(family, *options, **sizes).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return model, (torch.randn(3, *SHAPE), torch.tensor([0.0, 0.3, 1.0]), torch.tensor([0, 3, CLASSES]))


# The network once more, in float64, an image and a token at a time; w holds the state dict.


def linear(w, name, x):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def rms(w, name, x):
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"]


def rotate(z, row, column):
    """One head's vector: its channels as complex numbers, turned by row, then by column."""
    quarter = len(z) // 4
    turns = [p * 10000 ** (-2 * j / (len(z) / 2)) for p in (row, column) for j in range(quarter)]
    turn = torch.polar(torch.ones(2 * quarter, dtype=z.dtype), torch.tensor(turns, dtype=z.dtype))
    return torch.view_as_real(torch.view_as_complex(z.reshape(-1, 2).contiguous()) * turn).flatten()


def naive_attention(w, name, x, heads):
    tokens, width = x.shape
    grid = math.isqrt(tokens)
    qkv = linear(w, f"{name}.qkv", x).reshape(tokens, 3, heads, width // heads)
    out = torch.zeros(tokens, heads, width // heads, dtype=x.dtype)
    for h in range(heads):
        q, k = (
            torch.stack([rotate(qkv[n, i, h], n // grid, n % grid) for n in range(tokens)]) for i in (0, 1)
        )
        scores = (q @ k.T / math.sqrt(width // heads)).exp()
        out[:, h] = scores / scores.sum(1, keepdim=True) @ qkv[:, 2, h]
    return linear(w, f"{name}.proj", out.flatten(1))


def naive_block(w, name, x, c, heads):
    a1, b1, g1, a2, b2, g2 = linear(w, f"{name}.adaLN_modulation.1", F.silu(c)).chunk(6, -1)
    x = x + g1 * naive_attention(w, f"{name}.attn", rms(w, f"{name}.norm1", x) * (1 + b1) + a1, heads)
    first, second = linear(w, f"{name}.mlp.w12", rms(w, f"{name}.norm2", x) * (1 + b2) + a2).chunk(2, -1)
    return x + g2 * linear(w, f"{name}.mlp.w3", F.silu(first) * second)


def position(width, grid):
    def axis(p):
        angles = [p * 10000 ** (-k / (width / 4)) for k in range(width // 4)]
        return [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]

    rows = [axis(n % grid) + axis(n // grid) for n in range(grid**2)]
    return torch.tensor(rows, dtype=torch.float64)


def naive_velocity(model, family, x, t, y):
    """One image x (C, G, G), one time, one label -> velocity, and the base's if the network has one."""
    w, sizes = {key: value.double() for key, value in model.state_dict().items()}, model.sizes
    grid, width, depth = x.shape[1], sizes["width"], sizes["depth"]
    x, t = x.double().flatten(1).T, t.double()
    time, base = t, None

    def embed(name):
        return x @ w[f"{name}.proj.weight"].flatten(1).T + w[f"{name}.proj.bias"]

    def final(name, h, c):
        shift, scale = linear(w, f"{name}.adaLN_modulation.1", F.silu(c)).chunk(2, -1)
        out = linear(w, f"{name}.linear", rms(w, f"{name}.norm_final", h) * (1 + scale) + shift)
        if model.prediction == "x":
            out = (x - out) / max(time, 0.05)
        return out.T.reshape(-1, grid, grid)

    angle = 2 * math.pi * t * w["t_embedder.W"]
    t = linear(w, "t_embedder.mlp.0", torch.cat([angle.sin(), angle.cos()]))
    t = linear(w, "t_embedder.mlp.2", F.silu(t))
    c = t + w["y_embedder.embedding_table.weight"][y]
    if family == "DiT":
        h, c, first = embed("x_embedder") + position(width, grid), c, 0
        heads, last = sizes["heads"], depth
    else:
        s = embed("s_embedder") + position(width, grid)
        for i in range(depth):
            s = naive_block(w, f"blocks.{i}", s, F.silu(c), sizes["heads"])
            if i + 1 == model.base_depth:
                q = F.silu(t + s)
                base = final("base_layer", q, q)
        c = linear(w, "s_projector", F.silu(t + s))
        h, first, last, heads = embed("x_embedder"), depth, depth + sizes["head_depth"], sizes["head_heads"]
    for i in range(first, last):
        h = naive_block(w, f"blocks.{i}", h, c, heads)
    return final("final_layer", h, c), base


def test_position_is_exact_to_fp32():
    """Angles computed in fp32 would be off by 8e-7 here."""
    embedding = dit_dh.sincos_position(64, 32)
    assert embedding.dtype == torch.float32 and embedding.shape == (1, 32 * 32, 64)
    assert (embedding[0].double() - position(64, 32)).abs().max() <= 2**-25  # half a step of fp32 below 1


@torch.no_grad()
@pytest.mark.parametrize("prediction", ["v", "x"])
@pytest.mark.parametrize(
    ("family", "base_depth"),
    [("DiT", None), ("DiT-DH", None), ("DiT-DH", 1), ("DiT-DH", 2), ("DiT-DH", 3)],
)
def test_agrees_with_naive_formulas(family, base_depth, prediction):
    """The velocity, and the base's (RAEv2, section 5)."""
    model, inputs = small(family, prediction, base_depth)
    outputs = model(*inputs, with_base=True) if base_depth else [model(*inputs)]
    naive = [naive_velocity(model, family, *sample) for sample in zip(*inputs, strict=True)]
    for output, expected in zip(outputs, zip(*naive, strict=True), strict=False):
        expected = torch.stack(expected)
        assert expected.std() > 0.1
        assert (output - expected).abs().max() < 1e-5 * expected.abs().max()
    assert torch.equal(model(*inputs), outputs[0])


# The base (RAEv2, section 5)


def test_x_prediction_is_divided_in_fp32():
    """Of an output in bf16, and with the true x as the output v = eps - x where t >= 0.05."""
    x, noise = torch.randn(2, *SHAPE), torch.randn(2, *SHAPE)
    t = torch.tensor([0.05, 0.7])
    noisy = torch.lerp(x, noise, t[:, None, None, None])
    assert torch.allclose(dit_dh.to_velocity(x, noisy, t, "x"), noise - x, atol=1e-5)
    output = x.bfloat16()
    velocity = dit_dh.to_velocity(output, noisy.bfloat16(), t.bfloat16(), "x")
    expected = (noisy.bfloat16().float() - output.float()) / t.bfloat16().float()[:, None, None, None]
    assert velocity.dtype == torch.float32 and torch.allclose(velocity, expected, rtol=1e-6)


def test_base_adds_its_parameters_and_changes_nothing_else():
    """W + (W C + C) + (2 W W + 2 W) of them, named base_layer.*; without base the same names and bits."""
    plain, inputs = small("DiT-DH")
    model, _ = small("DiT-DH", base_depth=2)
    added = {k: v for k, v in model.state_dict().items() if k not in plain.state_dict()}
    width, channels = 32, SHAPE[0]
    count = width + (width * channels + channels) + (2 * width * width + 2 * width)
    assert sum(value.numel() for value in added.values()) == count
    layers = ("norm_final.weight", "linear.weight", "linear.bias")
    layers += ("adaLN_modulation.1.weight", "adaLN_modulation.1.bias")
    assert set(added) == {f"base_layer.{layer}" for layer in layers}

    model.load_state_dict(added | plain.state_dict())
    for with_base in (False, True):
        output = model(*inputs, with_base=with_base)
        assert torch.equal(output[0] if with_base else output, plain(*inputs))

    start = build("DiT-DH", base_depth=2).base_layer
    assert not any(p.any() for layer in (start.linear, start.adaLN_modulation) for p in layer.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(("family", "base_depth"), [("DiT", None), ("DiT-DH", 1)])
def test_recomputed_and_compiled_gradients_are_the_same(family, base_depth):
    """No gradient is missing, for which DDP would wait for ever, nor zero."""
    gradients = []
    for recompute in (False, True):
        model, inputs = small(family, "x", base_depth, depth=2)
        model.train().checkpoint_activations = recompute
        for network in (model, torch.compile(model, fullgraph=True, backend="eager")):
            model.zero_grad()
            torch.manual_seed(1)
            outputs = network(*inputs, with_base=True) if base_depth else [network(*inputs)]
            sum(output.square().mean() for output in outputs).backward()
            gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for other in gradients[1:]:
        assert all(torch.equal(a, b) and a.any() for a, b in zip(gradients[0], other, strict=True))


@pytest.mark.parametrize(
    ("size", "dit", "ditdh"),
    [
        ("S", 33.650, 196.456),
        ("B", 131.884, 294.296),
        ("L", 459.923, 621.744),
        ("XL", 677.248, 838.676),
    ],
)
def test_parameter_counts_of_the_paper(size, dit, ditdh):
    """In millions; test_by_hand.py compares widths, depths and heads."""
    with torch.device("meta"):
        counts = [
            parameters(dit_dh.build(f"{family}-{size}", (768, 16, 16), 1000)) for family in ("DiT", "DiT-DH")
        ]
    assert [round(count / 1e6, 3) for count in counts] == [dit, ditdh]


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_small_networks():
    """About 2 million parameters for the demo and 21 million for one's own images."""
    with torch.device("meta"):
        mini = dit_dh.build("DiT-DH-mini", (64, 4, 4), 4)
        xs = dit_dh.build("DiT-DH-XS", (384, 8, 8), 10)
    counts = [parameters(model) for model in (mini, xs)]
    assert counts == [1_925_948, 21_738_708]
    assert (mini.sizes["heads"], mini.sizes["head_heads"]) == (4, 4)
    assert (xs.sizes["heads"], xs.sizes["head_heads"]) == (6, 8)


def test_state_dict_has_the_released_names_and_shapes():
    def block(i, width):
        hidden = int(2 / 3 * 4 * width)
        layers = {"attn.qkv": (3 * width, width), "attn.proj": (width, width), "mlp.w12": (2 * hidden, width)}
        layers |= {"mlp.w3": (width, hidden), "adaLN_modulation.1": (6 * width, width)}
        names = {f"blocks.{i}.norm{n}.weight": (width,) for n in (1, 2)}
        return names | both({f"blocks.{i}.{layer}": shape for layer, shape in layers.items()})

    def both(layers):
        biases = {f"{name}.bias": shape[:1] for name, shape in layers.items()}
        return {f"{name}.weight": shape for name, shape in layers.items()} | biases

    def network(width, head_width):
        names = both({"x_embedder.proj": (head_width, 6, 1, 1)})
        names |= both({"t_embedder.mlp.0": (width, 512), "t_embedder.mlp.2": (width, width)})
        names |= both({"final_layer.linear": (6, head_width)})
        names |= both({"final_layer.adaLN_modulation.1": (2 * head_width, head_width)})
        names |= {"final_layer.norm_final.weight": (head_width,), "pos_embed": (1, 16, width)}
        return names | {"t_embedder.W": (256,), "y_embedder.embedding_table.weight": (6, width)}

    def rope(name, size):
        return {f"{name}.freqs_cos": (16, size), f"{name}.freqs_sin": (16, size)}

    dit = network(32, 32) | rope("feat_rope", 8) | block(0, 32) | block(1, 32) | block(2, 32)
    dh = network(32, 48) | rope("enc_feat_rope", 8) | rope("dec_feat_rope", 24)
    dh |= both({"s_embedder.proj": (32, 6, 1, 1), "s_projector": (48, 32)})
    dh |= block(0, 32) | block(1, 32) | block(2, 32) | block(3, 48) | block(4, 48)
    for family, names in (("DiT", dit), ("DiT-DH", dh)):
        assert {key: tuple(value.shape) for key, value in small(family)[0].state_dict().items()} == names


def test_start():
    """Velocity 0; Xavier and zero biases where the released code has them, torch's default where not."""
    torch.manual_seed(0)
    for family in SMALL:
        model = build(family)
        assert model(torch.randn(2, *SHAPE), torch.rand(2), torch.tensor([1, 2])).abs().max() == 0
        assert not any(p.any() for b in model.blocks for p in b.adaLN_modulation.parameters())
        assert not any(p.any() for p in model.final_layer.adaLN_modulation.parameters())
        assert not model.x_embedder.proj.bias.any() and model.x_embedder.proj.weight.any()
        for weight in (
            model.y_embedder.embedding_table.weight,
            *(model.t_embedder.mlp[i].weight for i in (0, 2)),
        ):
            assert weight.std().item() == pytest.approx(0.02, rel=0.2)
        layer = model.blocks[0].mlp.w12  # uniform within its bound
        bound = math.sqrt(6 / sum(layer.weight.shape)) if family == "DiT" else 1 / math.sqrt(32)
        assert layer.weight.abs().max().item() == pytest.approx(bound, rel=0.02)
        for module in (model.t_embedder.mlp[0], layer, model.blocks[0].attn.qkv):
            assert module.bias.any() == (family == "DiT-DH")
    embedder = dit_dh.build("DiT-DH-mini", (768, 4, 4), CLASSES).s_embedder.proj.weight
    assert embedder.abs().max().item() == pytest.approx(math.sqrt(6 / (768 + 128)), rel=0.02)


@pytest.mark.parametrize("family", SMALL)
def test_frequencies_and_positions_are_never_trained(family):
    """The 256 frequencies are drawn from N(0, 1); the bounds are 4 standard deviations."""
    torch.manual_seed(0)
    model = build(family)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"t_embedder.W", "pos_embed"}
    frequencies = model.t_embedder.W
    assert frequencies.shape == (256,)
    assert frequencies.mean().item() == pytest.approx(0, abs=0.25)
    assert frequencies.std().item() == pytest.approx(1, abs=0.18)


def test_bf16_autocast_is_close_to_fp32():
    model, inputs = small("DiT-DH")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rounded = model(*inputs)
    exact = model(*inputs)
    assert (rounded - exact).norm() / exact.norm() < 0.03


def test_norm_is_computed_in_fp32():
    """Squares of these would overflow or vanish in half precision."""
    norm, x = dit_dh.ModulatedRMSNorm(8), torch.tensor([[6e4] * 8, [1e-2] * 8], dtype=torch.float16)
    zero = torch.zeros(2, 8, dtype=torch.float16)
    assert torch.allclose(norm(x, zero, zero), torch.ones(()).half(), rtol=0.006)


# Files


def under(prefix, state):
    return {f"{prefix}{key}": value for key, value in state.items()}


LEVELS = {
    "bare": lambda state, other: state,
    "ema": lambda state, other: {"model": other, "ema": state},
    "model": lambda state, other: {"model": under("module.", state), "ema": None},
    "compiled": lambda state, other: {"ema": under("_orig_mod.", state), "epoch": 3},
    "compiled under DDP": lambda state, other: under("module._orig_mod.", state),
    "DDP under compile": lambda state, other: under("_orig_mod.module.", state),
}


@pytest.mark.parametrize(
    ("level", "options"),
    [
        ("bare", {"head_width": 32}),  # of one width, the last two blocks are the head
        ("bare", {"head_depth": 3}),
        # Shapes tell of a base, which is RAEv2's: the network predicts x, and the base follows block 8.
        ("bare", {"depth": 10, "prediction": "x", "base_depth": 8}),
        *((level, {}) for level in [*LEVELS, "safetensors"]),
    ],
)
def test_load_rebuilds_a_released_network_from_its_shapes(tmp_path, level, options):
    model, inputs = small("DiT-DH", **options)
    state = model.state_dict()
    other = {key: torch.zeros_like(value) for key, value in state.items()}
    path = tmp_path / ("model.safetensors" if level == "safetensors" else "model.pt")
    if level == "safetensors":
        save_file(state, path)
    else:
        torch.save(LEVELS[level](state, other), path)
    loaded = dit_dh.load(path)
    assert_same(loaded, model, inputs)
    config = {"latent_shape": list(SHAPE), "num_classes": CLASSES, "sizes": model.sizes}
    assert config.items() <= loaded.config.items()


def assert_same(loaded, model, inputs):
    assert not loaded.training and type(loaded) is type(model)
    for name in ("sizes", "latent_shape", "num_classes", "prediction", "base_depth"):
        assert getattr(loaded, name) == getattr(model, name), name
    assert torch.equal(loaded(*inputs), model(*inputs))
    if model.base_depth:
        assert torch.equal(loaded(*inputs, with_base=True)[1], model(*inputs, with_base=True)[1])


def write(path, model, **changes):
    """A checkpoint of flow_train.py, as far as load reads it; its model's weights are zero."""
    state = model.state_dict()
    config = {
        "model": "DiT-S" if isinstance(model, dit_dh.DiT) else "DiT-DH-S",
        "latent_shape": list(SHAPE),
        "num_classes": CLASSES,
        "prediction": model.prediction,
        "base_depth": model.base_depth,
        "sizes": model.sizes,
    }
    online = {key: torch.zeros_like(value) for key, value in state.items()}
    file = {"format": "rae-flow/1", "config": config | changes, "model": online, "ema": state, "step": 3}
    torch.save(file, path)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("DiT", {"prediction": "x"}),
        ("DiT-DH", {"prediction": "x", "base_depth": 2}),
        # Of a head of one block and the body's width only the config knows.
        ("DiT-DH", {"head_width": 32, "head_depth": 1}),
    ],
)
def test_load_reads_ema_and_config_of_a_checkpoint(tmp_path, family, options):
    model, inputs = small(family, **options)
    write(tmp_path / "last.pt", model)
    loaded = dit_dh.load(tmp_path / "last.pt")
    assert_same(loaded, model, inputs)
    assert loaded.config == torch.load(tmp_path / "last.pt", weights_only=True)["config"]


def test_half_precision_becomes_fp32(tmp_path):
    half = {key: value.bfloat16() for key, value in small("DiT-DH")[0].state_dict().items()}
    torch.save(half, tmp_path / "half.pt")
    loaded = dit_dh.load(tmp_path / "half.pt").state_dict()
    for key, value in half.items():
        assert loaded[key].dtype == torch.float32 and loaded[key].device.type == "cpu"
        assert torch.equal(loaded[key], value.float())


def test_load_draws_no_weights_and_lets_go_of_the_file(tmp_path):
    """They would be replaced at once, after 12 seconds for DiT-DH-XL; a training may replace the file."""
    path = tmp_path / "last.pt"
    write(path, small("DiT-DH")[0])
    before = torch.get_rng_state()
    loaded = dit_dh.load(path)
    assert torch.equal(torch.get_rng_state(), before)
    assert not loaded.t_embedder.W.requires_grad and not loaded.pos_embed.requires_grad
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(path) not in maps.read_text()


@pytest.mark.parametrize(("text", "name"), [("DIT-XL", "DiT-XL"), ("DiT-dh-Mini", "DiT-DH-mini")])
def test_names_in_any_case(text, name):
    assert dit_dh.model_name(text) == name and name in dit_dh.NAMES
    size = name.rpartition("-")[2]
    with torch.device("meta"):
        model = dit_dh.build(text, SHAPE, CLASSES, width=None)
    assert isinstance(model, dit_dh.DiTDH) == ("DH" in name)
    assert (*model.sizes.values(),) == dit_dh.SIZES[size][: len(model.sizes)]


@pytest.mark.parametrize(
    ("name", "options", "line"),
    [
        ("UNet-S", {}, "--model UNet-S: unknown; choose one of DiT-S, "),
        ("DiT-XXL", {}, "--model DiT-XXL: unknown; choose one of DiT-S, "),
        ("dit-s", {"head_width": 64}, "--model dit-s has neither head nor base; choose a DiT-DH"),
        ("DiT-S", {"base_depth": 2}, "--model DiT-S has neither head nor base; choose a DiT-DH"),
        ("DiT-S", {"width": 36}, "width 36 with 6 heads: must be a multiple of 24"),
        ("DiT-DH-S", {"head_width": 100}, "width 100 with 16 heads: must be a multiple of 64"),
        ("DiT-DH-mini", {"base_depth": 0}, "--base-depth 0: the body has blocks 1 to 4"),
        ("DiT-DH-mini", {"base_depth": 5}, "--base-depth 5: the body has blocks 1 to 4"),
        ("DiT-S", {"prediction": "eps"}, "--prediction eps: neither v nor x"),
    ],
)
def test_errors_of_build_are_one_line(name, options, line):
    with torch.device("meta"):
        assert message(lambda: dit_dh.build(name, SHAPE, CLASSES, **options)).startswith(line)


def test_load_names_what_does_not_fit(tmp_path):
    """The flag, the file and the first key that doesn't fit, in one line."""
    dh = small("DiT-DH")[0].state_dict()
    wide = torch.ones(9)
    no_biases = {key: value for key, value in dh.items() if ".qkv.bias" not in key}
    files = {
        "decoder": ({"format": "rae-decoder/1", "ema": {"pos_embed": wide}}, "but rae-decoder/1"),
        "statistics": ({"mean": wide, "var": wide}, "but other data"),
        "vision transformer": ({"pos_embed": torch.ones(1, 16, 8)}, "but other data"),
        "extra": (dh | {"extra": wide, "second": wide}, '(Unexpected key(s) in state_dict: "extra"'),
        "epoch": (dh | {"epoch": 3}, '(Unexpected key(s) in state_dict: "epoch"'),
        "shape": (dh | {"final_layer.linear.bias": wide}, "(size mismatch for final_layer.linear.bias"),
        "missing": (no_biases, '(Missing key(s) in state_dict: "blocks.0.attn.qkv.bias"'),
        "baseline": (small("DiT")[0].state_dict(), "('enc_feat_rope.freqs_cos')"),
    }
    for name, (content, reason) in files.items():
        path = tmp_path / f"{name}.pt"
        torch.save(content, path)
        line = message(dit_dh.load, path, "--init")
        assert line.startswith(f"--init {path}: not a flow checkpoint {reason}"), line
        assert len(line) < 300 + len(str(path))

    write(tmp_path / "other.pt", small("DiT-DH")[0], num_classes=9)
    assert "size mismatch for y_embedder" in message(dit_dh.load, tmp_path / "other.pt")

    (tmp_path / "text.pt").write_text("not a checkpoint")
    for name in ("text.pt", "absent.safetensors"):
        assert f"--flow {tmp_path / name}: " in message(dit_dh.load, tmp_path / name)
