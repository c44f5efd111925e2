"""The velocity network of stage 2: DiT, and DiT-DH, a DiT with a wide and shallow head.

Zheng et al. 2025, Diffusion Transformers with Representation Autoencoders (arXiv 2510.11690), section 5. The
blocks are LightningDiT's: RMSNorm, rotary positions, SwiGLU, adaLN-zero. Where paper and released code differ
this is the code, and the released files load. From RAEv2 (Singh et al. 2026, arXiv 2605.18324): networks that
predict x, and a second output for internal guidance. flow_train.py trains it, sample.py samples. At a prompt:

    model = dit_dh.build("DiT-DH-S", latent_shape=(768, 16, 16), num_classes=1000).eval()
    velocity = model(torch.randn(2, 768, 16, 16), torch.rand(2), torch.tensor([207, 1000]))   # 1000: no class
    model = dit_dh.load("runs/flow/last.pt")   # or stage2_model.pt

Letters: B batch, C latent channels, G latent positions a side, N tokens, W width, h heads, s head size,
K classes, t in [0, 1] with t = 0 data and t = 1 noise.
"""

import math

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torch.utils.checkpoint import checkpoint

# Beside each size its millions of parameters, DiT and DiT-DH, for K = 1000 classes of latents (768, 16, 16).
SIZES = {
    "S": {"width": 384, "depth": 12, "heads": 6},  # 33.650, 196.456
    "B": {"width": 768, "depth": 12, "heads": 12},  # 131.884, 294.296
    "L": {"width": 1024, "depth": 24, "heads": 16},  # 459.923, 621.744
    "XL": {"width": 1152, "depth": 28, "heads": 16},  # 677.248, 838.676
}
HEAD = {"head_width": 2048, "head_depth": 2, "head_heads": 16, "base_depth": None}  # of a DiT-DH
LABEL_DROPOUT = 0.1  # share of labels that training replaces by "no class", for classifier-free guidance


def sincos_position(width, grid):
    """Fixed 2-D position embedding (1, N, width) in fp32 for N = grid * grid tokens, row by row, as in MAE.

    The first half of the channels encodes the column, the last the row. Each half is [sin, cos] of the index
    times omega_k = 10000^(-k / (width / 4)), computed in float64.
    """
    omega = 10000.0 ** (-torch.arange(width // 4).double() / (width / 4))
    index = torch.arange(grid)
    position = torch.cartesian_prod(index, index).flip(1)  # (N, 2) column, row
    angle = position[:, :, None] * omega  # (N, 2, width / 4)
    embedding = torch.cat([angle.sin(), angle.cos()], dim=2)  # (N, 2, width / 2)
    return embedding.flatten(1).float()[None]


class RotaryEmbedding(nn.Module):
    """2-D rotary positions: the first half of a head's channels turns with the row, the last with the column.

    Channels (2i, 2i+1) turn together, so the tables (N, s) hold each value twice. They are buffers since the
    released files hold them.
    """

    def __init__(self, head_size, grid):
        super().__init__()
        frequency = 10000.0 ** (-2 * torch.arange(head_size // 4) / (head_size / 2))
        index = torch.arange(grid)
        position = torch.cartesian_prod(index, index)  # (N, 2) row, column
        angle = position[:, :, None] * frequency  # (N, 2, s / 4)
        angle = angle.flatten(1).repeat_interleave(2, dim=1)  # (N, s)
        self.register_buffer("freqs_cos", angle.cos())
        self.register_buffer("freqs_sin", angle.sin())

    def forward(self, x):
        """x (B, N, h, s) -> the same, rotated: (a, b) becomes (a cos - b sin, b cos + a sin)."""
        cos = self.freqs_cos[:, None].to(x.dtype)  # (N, 1, s)
        sin = self.freqs_sin[:, None].to(x.dtype)  # (N, 1, s)
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)  # each (B, N, h, s / 2)
        # All pairs in three operations; a constant tensor of signs would be copied to the GPU in every call,
        # which waits for it: 60 times in a forward pass of DiT-DH-XL.
        turned = torch.stack((-b, a), dim=-1).flatten(-2)  # (B, N, h, s)
        return torch.addcmul(x * cos, turned, sin)


class TokenEmbedder(nn.Module):
    """Latents (B, C, G, G) -> tokens (B, N, W), by a convolution over patches of one position."""

    def __init__(self, channels, width):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=1)

    def forward(self, x):
        x = x.flatten(2).mT  # (B, N, C)
        # The convolution as a product: it saves turning channels into rows, 5 % of this layer's time.
        return F.linear(x, self.proj.weight.flatten(1), self.proj.bias)


class TimeEmbedder(nn.Module):
    """Times (B,) in [0, 1] -> (B, W): random Fourier features, which are fixed, and an MLP."""

    def __init__(self, width, features=256):
        super().__init__()
        self.W = nn.Parameter(torch.randn(features), requires_grad=False)
        self.mlp = nn.Sequential(nn.Linear(2 * features, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        angle = 2 * math.pi * t[:, None] * self.W
        return self.mlp(torch.cat([angle.sin(), angle.cos()], dim=1))


class LabelEmbedder(nn.Module):
    """Labels (B,) in 0..K, K for no class -> (B, W). In training mode a label becomes K with probability 0.1.

    The draw is from torch's default generator: seed it and a step repeats. eval() turns the dropout off.
    """

    def __init__(self, num_classes, width):
        super().__init__()
        self.num_classes = num_classes
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, y):
        if self.training:
            dropped = torch.rand(y.shape, device=y.device) < LABEL_DROPOUT
            y = torch.where(dropped, self.num_classes, y)
        return self.embedding_table(y)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, computed in fp32, then shifted and scaled by the condition."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x, shift, scale):
        x = x.float()
        # The norm sums the squares without a tensor (B, N, W) of them.
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)  # (B, N, 1)
        x = x * torch.rsqrt(norm**2 / x.shape[-1] + 1e-6)
        # From here on in the condition's dtype: under bf16 autocast the next layer would round to it anyway.
        x = x.to(scale.dtype)
        weight = self.weight.to(scale.dtype) * (1 + scale)
        return torch.addcmul(shift, x, weight)


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, rope):
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (B, N, 3, h, s)
        q, k, v = qkv.unbind(2)  # each (B, N, h, s)
        q = rope(q).transpose(1, 2)  # (B, h, N, s)
        k = rope(k).transpose(1, 2)
        v = v.transpose(1, 2)
        x = F.scaled_dot_product_attention(q, k, v)
        x = x.transpose(1, 2).flatten(2)  # (B, N, W)
        return self.proj(x)


class SwiGLU(nn.Module):
    def __init__(self, width):
        super().__init__()
        hidden = int(2 / 3 * (4 * width))
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class Block(nn.Module):
    """Attention, then SwiGLU; the condition shifts and scales what goes in and gates what comes out."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = RMSNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = RMSNorm(width)
        self.mlp = SwiGLU(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c, rope):
        """x (B, N, W), condition c (B, 1, W) or, per token, (B, N, W) -> (B, N, W)."""
        # Shift, scale and gate of the attention, then of the MLP.
        modulation = self.adaLN_modulation(c)  # (B, 1 or N, 6 W)
        a1, b1, g1, a2, b2, g2 = modulation.chunk(6, dim=-1)
        # addcmul(x, g, y) is x + g * y in one pass over memory.
        x = torch.addcmul(x, g1, self.attn(self.norm1(x, a1, b1), rope))
        return torch.addcmul(x, g2, self.mlp(self.norm2(x, a2, b2)))


class FinalLayer(nn.Module):
    """Tokens (B, N, W) and condition (B, 1 or N, W) -> latents (B, C, G, G)."""

    def __init__(self, width, channels):
        super().__init__()
        self.norm_final = RMSNorm(width)
        self.linear = nn.Linear(width, channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        x = self.linear(self.norm_final(x, shift, scale))  # (B, N, C)
        grid = math.isqrt(x.shape[1])
        return x.mT.unflatten(2, (grid, grid))  # (B, C, G, G)


def run_blocks(blocks, x, c, rope, recompute):
    """The blocks in turn; with recompute only their inputs are kept for the backward pass."""
    for block in blocks:
        if recompute:
            # The blocks draw no random numbers, so there is no generator to keep.
            x = checkpoint(block, x, c, rope, use_reentrant=False, preserve_rng_state=False)
        else:
            x = block(x, c, rope)
    return x


def init_weights(model):
    """The released start: adaLN and output zero, so blocks are identities and the first output is 0."""
    for name, parameter in model.named_parameters():
        if "embedder.proj.weight" in name:
            nn.init.xavier_uniform_(parameter)
        if "embedder.proj.bias" in name or "adaLN_modulation" in name or "layer.linear" in name:
            nn.init.zeros_(parameter)

    labels = model.y_embedder.embedding_table
    time = model.t_embedder.mlp
    for layer in (labels, time[0], time[2]):
        nn.init.normal_(layer.weight, std=0.02)


def to_velocity(output, x, t, prediction):
    """What the network puts out at x = x_t and times t (B,) -> velocity, all but t (B, C, G, G).

    For prediction "x" the output is the clean latent, and v = (x_t - output) / max(t, 0.05), in fp32 (RAEv2).
    """
    if prediction == "v":
        return output
    t = t.float().clamp(min=0.05)[:, None, None, None]  # (B, 1, 1, 1)
    return (x.float() - output) / t


class DiT(nn.Module):
    """The baseline: all blocks and the final layer are conditioned on time + label.

    latent_shape (C, G, G). prediction: what the blocks put out, "v" or "x"; forward returns v in either case.
    checkpoint_activations = True trades time for memory in training.
    """

    def __init__(self, *, latent_shape, num_classes, width, depth, heads, prediction="v"):
        super().__init__()
        channels, grid, _ = latent_shape
        self.latent_shape = tuple(latent_shape)
        self.num_classes = num_classes
        self.sizes = {"width": width, "depth": depth, "heads": heads}
        self.prediction = prediction
        self.base_depth = None  # only a DiT-DH has a base
        self.checkpoint_activations = False

        self.pos_embed = nn.Parameter(sincos_position(width, grid), requires_grad=False)
        self.x_embedder = TokenEmbedder(channels, width)
        self.t_embedder = TimeEmbedder(width)
        self.y_embedder = LabelEmbedder(num_classes, width)
        self.feat_rope = RotaryEmbedding(width // heads, grid)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.final_layer = FinalLayer(width, channels)

        # As in DiT; DiT-DH keeps torch's default.
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        init_weights(self)

    def forward(self, x, t, y):
        """Latents x (B, C, G, G), times t (B,) in [0, 1], labels y (B,) in 0..K -> velocity (B, C, G, G)."""
        c = self.t_embedder(t) + self.y_embedder(y)  # (B, W)
        c = c[:, None]  # (B, 1, W)
        h = self.x_embedder(x) + self.pos_embed  # (B, N, W)
        h = run_blocks(self.blocks, h, c, self.feat_rope, self.checkpoint_activations)
        return to_velocity(self.final_layer(h, c), x, t, self.prediction)


class DiTDH(nn.Module):
    """DiT with a DDT head: a deep body makes s, which conditions a shallow head token by token.

    The head is wider than a token: a narrower network can't fit the noise in it (section 4.1, theorem 1).
    Arguments and attributes as of DiT. base_depth = D adds the base, a second and weaker output that a final
    layer makes of the tokens after block D of the body (RAEv2, section 5).
    """

    def __init__(
        self,
        *,
        latent_shape,
        num_classes,
        width,
        depth,
        heads,
        head_width,
        head_depth,
        head_heads,
        prediction="v",
        base_depth=None,
    ):
        super().__init__()
        channels, grid, _ = latent_shape
        self.latent_shape = tuple(latent_shape)
        self.num_classes = num_classes
        self.sizes = {
            "width": width,
            "depth": depth,
            "heads": heads,
            "head_width": head_width,
            "head_depth": head_depth,
            "head_heads": head_heads,
        }
        self.prediction = prediction
        self.base_depth = base_depth
        self.checkpoint_activations = False

        self.pos_embed = nn.Parameter(sincos_position(width, grid), requires_grad=False)
        self.s_embedder = TokenEmbedder(channels, width)
        self.x_embedder = TokenEmbedder(channels, head_width)
        self.s_projector = nn.Identity() if width == head_width else nn.Linear(width, head_width)
        self.t_embedder = TimeEmbedder(width)
        self.y_embedder = LabelEmbedder(num_classes, width)
        self.enc_feat_rope = RotaryEmbedding(width // heads, grid)
        self.dec_feat_rope = RotaryEmbedding(head_width // head_heads, grid)

        # Body and head in one list, as in the released files.
        body = [Block(width, heads) for _ in range(depth)]
        head = [Block(head_width, head_heads) for _ in range(head_depth)]
        self.blocks = nn.ModuleList(body + head)
        self.final_layer = FinalLayer(head_width, channels)
        if base_depth is not None:
            self.base_layer = FinalLayer(width, channels)
        init_weights(self)

    def forward(self, x, t, y, with_base=False):
        """Latents x (B, C, G, G), times t (B,) in [0, 1], labels y (B,) in 0..K -> velocity (B, C, G, G).

        with_base, of a network that has one: (velocity, the base's velocity). Training needs both: its loss
        is the sum of theirs. Internal guidance (RAEv2, eq. 3) is base + scale * (velocity - base).
        """
        depth = self.sizes["depth"]
        middle = self.base_depth or depth
        recompute = self.checkpoint_activations

        # The body. Its blocks apply SiLU once more, as released.
        c = F.silu(self.t_embedder(t) + self.y_embedder(y))  # (B, W)
        c = c[:, None]  # (B, 1, W)
        s = self.s_embedder(x) + self.pos_embed  # (B, N, W)
        s = run_blocks(self.blocks[:middle], s, c, self.enc_feat_rope, recompute)

        # The base: each token is its own condition.
        if with_base:
            q = F.silu(self.t_embedder(t)[:, None] + s)  # (B, N, W)
            base = to_velocity(self.base_layer(q, q), x, t, self.prediction)
        s = run_blocks(self.blocks[middle:depth], s, c, self.enc_feat_rope, recompute)

        # The head
        s = F.silu(self.t_embedder(t)[:, None] + s)  # (B, N, W)
        s = self.s_projector(s)  # (B, N, head width)
        h = self.x_embedder(x)  # (B, N, head width)
        h = run_blocks(self.blocks[depth:], h, s, self.dec_feat_rope, recompute)
        velocity = to_velocity(self.final_layer(h, s), x, t, self.prediction)
        return (velocity, base) if with_base else velocity


def build(name, latent_shape, num_classes, prediction="v", base_depth=None, **sizes):
    """The network DiT-S .. DiT-XL or DiT-DH-S .. DiT-DH-XL, in any case, for latents (C, G, G) and K classes.

    sizes replace its width, depth, heads and, in DiT-DH, head_width, head_depth, head_heads; None keeps the
    named one. prediction "v" or "x"; base_depth: block of a DiT-DH's body, from 1, that the base follows.
    Raises SystemExit for an unknown name and for what doesn't fit.
    """
    networks = {"DIT": DiT, "DIT-DH": DiTDH}
    family, _, size = name.upper().rpartition("-")
    if family not in networks or size not in SIZES:
        raise SystemExit(f"--model {name}: neither DiT-SIZE nor DiT-DH-SIZE, SIZE one of {', '.join(SIZES)}")

    chosen = SIZES[size] | (HEAD if family == "DIT-DH" else {})
    for key, value in [*sizes.items(), ("base_depth", base_depth)]:
        if value is None:
            continue
        if key not in chosen:
            raise SystemExit(f"--model {name} has no {key}; leave it out or choose a DiT-DH")
        chosen[key] = value

    # Rotary positions turn pairs of channels, half of them by the row and half by the column.
    for width, heads in (("width", "heads"), ("head_width", "head_heads")):
        if width in chosen and chosen[width] % (4 * chosen[heads]):
            problem = f"must be a multiple of 4 * {heads}, here {4 * chosen[heads]}"
            raise SystemExit(f"{width} {chosen[width]}: {problem}")
    if base_depth is not None and not 1 <= base_depth <= chosen["depth"]:
        raise SystemExit(f"--base-depth {base_depth}: the body has blocks 1 to {chosen['depth']}")
    if prediction not in ("v", "x"):
        raise SystemExit(f"--prediction {prediction}: neither v nor x")
    return networks[family](
        latent_shape=latent_shape, num_classes=num_classes, prediction=prediction, **chosen
    )


def from_shapes(state):
    """The network that a bare state dict is of, untrained, out of the shapes alone. Raises KeyError.

    Shapes tell neither the prediction nor the base's depth: v, and the base after block 8, RAEv2's.
    """
    tokens, width = state["pos_embed"].shape[-2:]
    head_width, channels = state["x_embedder.proj.weight"].shape[:2]
    grid = math.isqrt(tokens)
    norms = [len(weight) for key, weight in state.items() if key.endswith("norm1.weight")]
    shared = {
        "latent_shape": (channels, grid, grid),
        "num_classes": len(state["y_embedder.embedding_table.weight"]) - 1,
        "width": width,
    }

    if "s_embedder.proj.weight" not in state:
        return DiT(**shared, depth=len(norms), heads=width // state["feat_rope.freqs_cos"].shape[1])

    # Where body and head have one width, shapes don't tell them apart; released heads have two blocks.
    head_depth = 2 if head_width == width else norms.count(head_width)
    depth = len(norms) - head_depth
    return DiTDH(
        **shared,
        depth=depth,
        heads=width // state["enc_feat_rope.freqs_cos"].shape[1],
        head_width=head_width,
        head_depth=head_depth,
        head_heads=head_width // state["dec_feat_rope.freqs_cos"].shape[1],
        base_depth=min(8, depth) if "base_layer.linear.weight" in state else None,
    )


def read(path, flag="--flow"):
    """The dict in a flow checkpoint or a released file; mapped, so that only the weights in use are read.

    Raises SystemExit, which names flag, for a file that is missing or holds no dict.
    """
    try:
        if str(path).endswith(".safetensors"):
            return load_file(path)
        file = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except FileNotFoundError:
        raise SystemExit(f"{flag} {path}: no such file; give a flow checkpoint, ours or released") from None
    except Exception as error:  # of many kinds, and torch's texts advise to trust the file
        reason = type(error).__name__
        raise SystemExit(f"{flag} {path}: not a flow checkpoint, ours or released ({reason})") from None
    if not isinstance(file, dict):
        raise SystemExit(f"{flag} {path}: not a flow checkpoint, ours or released (no dict)")
    return file


def weights_of(file):
    """The state dict in a file, EMA first; names lose what DDP and torch.compile put before them."""
    for level in ("ema", "model", "module", "state_dict"):
        if isinstance(file.get(level), dict):
            return weights_of(file[level])
    state = {}
    for key, value in file.items():
        name = str(key).replace("_orig_mod.", "").replace("module.", "")
        state[name] = value
    return state


def load(path, flag="--flow"):
    """The network of a flow checkpoint: EMA weights where the file has them, fp32, on CPU, in eval mode.

    path: a file of flow_train.py or a released one (.pt, .safetensors): a state dict, bare or under "ema",
    "model", "module" or "state_dict", also with "module." or "_orig_mod." before its names. For any other
    raises SystemExit, which names flag and the first key that doesn't fit.
    Hold one autocast region around all steps of a sampler: the weights are then cast to bf16 only once.
    """
    file = read(path, flag)
    if file.get("format") == "rae-decoder/1":
        raise SystemExit(f"{flag} {path}: is a decoder of rae_decoder_train.py; give a flow checkpoint")
    state = weights_of(file)
    foreign = f"{flag} {path}: not a flow checkpoint, ours or released"

    # On the meta device no weights are drawn that the file's then replace: 0.8 s instead of 12 for DiT-DH-XL.
    with torch.device("meta"):
        if file.get("format") == "rae-flow/1":
            config = file["config"]
            names = ("latent_shape", "num_classes", "prediction", "base_depth")
            options = {name: config[name] for name in names if name in config}
            sizes = dict(config["sizes"])
            sizes.pop("patch", None)  # in older checkpoints, always 1
            model = build(config["model"], **options, **sizes)
        else:
            try:
                model = from_shapes(state)
            except KeyError as error:
                raise SystemExit(f"{foreign} (it has no {error.args[0]})") from None

    expected = model.state_dict()
    for key in expected | state:
        if key not in state:
            raise SystemExit(f"{foreign} (it has no {key})")
        if key not in expected:
            raise SystemExit(f"{foreign} ({key} is unknown)")
        given = state[key].shape
        wanted = expected[key].shape
        if given != wanted:
            raise SystemExit(f"{foreign} ({key} has the shape {[*given]}, not {[*wanted]})")
    model.to_empty(device="cpu").load_state_dict(state)
    return model.eval()
