"""The velocity network of stage 2: DiT, and DiT-DH, a DiT with a wide and shallow head.

Zheng et al. 2025, Diffusion Transformers with Representation Autoencoders (arXiv 2510.11690), section 5. The
blocks are LightningDiT's: RMSNorm, rotary positions, SwiGLU, adaLN-zero. Where paper and released code
differ, this follows the code, so released checkpoints load. RAEv2 (Singh et al. 2026, arXiv 2605.18324) adds
networks that predict x, and a second output for internal guidance. flow_train.py trains a network, sample.py
draws samples from it. In Python:

    model = dit_dh.build("DiT-DH-S", latent_shape=(768, 16, 16), num_classes=1000).eval()
    velocity = model(torch.randn(2, 768, 16, 16), torch.rand(2), torch.tensor([207, 1000]))   # 1000: no class
    model = dit_dh.load("runs/flow/last.pt")   # or stage2_model.pt

Letters: B batch, C latent channels, G latent positions a side, N = G * G tokens, W width, h heads, d channels
of a head, K classes, t in [0, 1] with t = 0 data and t = 1 noise, x latents, v velocity, s the body's output.
"""

import math

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.nn import Conv2d, Embedding, Identity, Linear, Module, ModuleList, Parameter, Sequential, SiLU
from torch.nn.init import normal_, xavier_uniform_, zeros_
from torch.utils.checkpoint import checkpoint

# A DiT has the first three dimensions, a DiT-DH all six.
DIMENSIONS = ("width", "depth", "heads", "head_width", "head_depth", "head_heads")
SIZES = {
    # The paper's networks: millions of parameters of DiT and DiT-DH, for latents (768, 16, 16) and K = 1000
    "S": (384, 12, 6, 2048, 2, 16),  # 33.650, 196.456
    "B": (768, 12, 12, 2048, 2, 16),  # 131.884, 294.296
    "L": (1024, 24, 16, 2048, 2, 16),  # 459.923, 621.744
    "XL": (1152, 28, 16, 2048, 2, 16),  # 677.248, 838.676
    # Small networks beside them, each with a head that is at least as wide as a token
    "mini": (128, 4, 4, 128, 2, 4),  # 1.323, 1.926 for latents (64, 4, 4) and K = 4
    "XS": (384, 4, 6, 512, 2, 8),  # 11.611, 21.739 for latents (384, 8, 8) and K = 10
}
NAMES = [f"{family}-{size}" for family in ("DiT", "DiT-DH") for size in SIZES]
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


class RotaryEmbedding(Module):
    """2-D rotary positions: the first half of a head's channels turns with the row, the last with the column.

    Channels (2j, 2j+1) of a half turn together, by the index times 10000^(-4j / d), so the tables (N, d) hold
    each value twice. They are buffers since the released files hold them.
    """

    def __init__(self, width, heads, grid):
        super().__init__()
        if width % (4 * heads):
            raise SystemExit(f"width {width} with {heads} heads: must be a multiple of {4 * heads}")
        head_size = width // heads
        frequency = 10000.0 ** (-torch.arange(0, head_size, 4) / head_size)  # (d / 4)
        index = torch.arange(grid)
        position = torch.cartesian_prod(index, index)  # (N, 2) row, column
        angle = (position[:, :, None] * frequency.repeat_interleave(2)).flatten(1)  # (N, d)
        self.register_buffer("freqs_cos", angle.cos())
        self.register_buffer("freqs_sin", angle.sin())

    def forward(self, x):
        """x (B, h, N, d) -> the same, rotated: (a, b) becomes (a cos - b sin, b cos + a sin)."""
        cos = self.freqs_cos.to(x.dtype)  # (N, d)
        sin = self.freqs_sin.to(x.dtype)  # (N, d)
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)  # each (B, h, N, d / 2)
        turned = torch.stack((-b, a), -1).flatten(-2)  # (B, h, N, d)
        # addcmul is x * cos + turned * sin in two passes over memory instead of three.
        return torch.addcmul(x * cos, turned, sin)


class TokenEmbedder(Module):
    """Latents (B, C, G, G) -> tokens (B, N, W), by a convolution over patches of one position."""

    def __init__(self, channels, width):
        super().__init__()
        self.proj = Conv2d(channels, width, 1)

    def forward(self, x):
        # The convolution of single positions is this product of matrices.
        return F.linear(x.flatten(2).mT, self.proj.weight.flatten(1), self.proj.bias)


class TimeEmbedder(Module):
    """Times t (B,) in [0, 1] -> (B, 1, W): random Fourier features, which are never trained, and an MLP."""

    def __init__(self, width):
        super().__init__()
        self.W = Parameter(torch.randn(256), requires_grad=False)
        self.mlp = Sequential(Linear(512, width), SiLU(), Linear(width, width))

    def forward(self, t):
        angle = 2 * math.pi * t[:, None, None] * self.W  # (B, 1, 256)
        return self.mlp(torch.cat([angle.sin(), angle.cos()], -1))


class LabelEmbedder(Module):
    """Labels y (B,) in 0..K, K for no class -> (B, 1, W). In training a label becomes K at a rate of 0.1.

    The draw is from torch's default generator: seed it and a step repeats. eval() turns the dropout off.
    """

    def __init__(self, num_classes, width):
        super().__init__()
        self.num_classes = num_classes
        self.embedding_table = Embedding(num_classes + 1, width)

    def forward(self, y):
        if self.training:
            dropped = torch.rand_like(y.float()) < LABEL_DROPOUT
            y = y.masked_fill(dropped, self.num_classes)
        return self.embedding_table(y[:, None])


class ModulatedRMSNorm(torch.nn.RMSNorm):
    """x / rms(x) * weight over the last axis, computed in fp32, then times 1 + scale, plus shift."""

    def forward(self, x, shift, scale):
        """x (B, N, W), shift and scale (B, 1 or N, W) -> (B, N, W) in the dtype of scale."""
        x = x.float()
        # vector_norm makes no tensor (B, N, W) of squares.
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)  # (B, N, 1)
        x = x * torch.rsqrt(norm**2 / x.shape[-1] + 1e-6)

        # Weight times 1 + scale spares a pass over x. With the addcmuls of this file a training step of
        # DiT-DH-S on a CPU (batch 4, fp32) takes 4.5 s instead of 5.0 s.
        weight = self.weight.to(scale.dtype) * (1 + scale)
        # Under bf16 autocast scale is bf16, to which the next layer would round its input anyway.
        return torch.addcmul(shift, x.to(scale.dtype), weight)


class Attention(Module):
    """Multi-head self-attention of tokens (B, N, W), whose queries and keys are rotated."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(self, x, rope):
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (B, N, 3, h, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, h, N, d)
        x = F.scaled_dot_product_attention(rope(q), rope(k), v)
        return self.proj(x.transpose(1, 2).flatten(2))  # (B, N, W)


class SwiGLU(Module):
    """The gated MLP of a block, (B, N, W) -> (B, N, W), with two thirds of 4 W hidden channels."""

    def __init__(self, width):
        super().__init__()
        hidden = 8 * width // 3
        self.w12 = Linear(width, 2 * hidden)
        self.w3 = Linear(hidden, width)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, -1)  # each (B, N, hidden)
        return self.w3(F.silu(gate) * value)


class Block(Module):
    """Attention, then SwiGLU; the condition shifts and scales their inputs and gates their outputs."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = ModulatedRMSNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = ModulatedRMSNorm(width)
        self.mlp = SwiGLU(width)
        self.adaLN_modulation = Sequential(SiLU(), Linear(width, 6 * width))

    def forward(self, x, c, rope):
        """x (B, N, W), condition c (B, 1, W) or, per token, (B, N, W) -> (B, N, W)."""
        modulation = self.adaLN_modulation(c)  # (B, 1 or N, 6 W)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, -1)

        # addcmul(x, gate, y) is x + gate * y in one pass over memory instead of two.
        attended = self.attn(self.norm1(x, shift_attn, scale_attn), rope)
        x = torch.addcmul(x, gate_attn, attended)
        return torch.addcmul(x, gate_mlp, self.mlp(self.norm2(x, shift_mlp, scale_mlp)))


class FinalLayer(Module):
    """Tokens (B, N, W) and condition (B, 1 or N, W) -> latents (B, C, G, G)."""

    def __init__(self, width, channels):
        super().__init__()
        self.norm_final = ModulatedRMSNorm(width)
        self.linear = Linear(width, channels)
        self.adaLN_modulation = Sequential(SiLU(), Linear(width, 2 * width))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, -1)
        x = self.linear(self.norm_final(x, shift, scale))  # (B, N, C)
        return x.mT.unflatten(2, (math.isqrt(x.shape[1]), -1))  # (B, C, G, G)


def run_block(block, x, c, rope, recompute):
    """Apply a block; with recompute, the backward pass computes its inside once more and stores less."""
    if recompute:
        # A block draws no random numbers, so there is no generator to keep.
        return checkpoint(block, x, c, rope, use_reentrant=False, preserve_rng_state=False)
    return block(x, c, rope)


def to_velocity(output, x, t, prediction):
    """Output of a network at x = x_t and times t (B,) -> velocity v; all but t are (B, C, G, G).

    For prediction "x" the output is the clean latent, and v = (x_t - output) / max(t, 0.05), in fp32 (RAEv2).
    """
    if prediction == "v":
        return output
    t = t.float().clamp(min=0.05)[:, None, None, None]  # (B, 1, 1, 1)
    return (x.float() - output) / t


class DiT(Module):
    """The baseline: all blocks and the final layer are conditioned on time + label.

    latent_shape is (C, G, G). prediction, which build sets, is the meaning of the final layer's output, "v"
    or "x"; forward returns v in either case. checkpoint_activations trades time for memory in training.
    """

    base_depth = None  # only a DiT-DH has a base
    checkpoint_activations = False

    def __init__(self, latent_shape, num_classes, width, depth, heads):
        super().__init__()
        channels, grid, _ = latent_shape
        self.pos_embed = Parameter(sincos_position(width, grid), requires_grad=False)
        self.x_embedder = TokenEmbedder(channels, width)
        self.t_embedder = TimeEmbedder(width)
        self.y_embedder = LabelEmbedder(num_classes, width)
        self.feat_rope = RotaryEmbedding(width, heads, grid)
        self.blocks = ModuleList(Block(width, heads) for _ in range(depth))
        self.final_layer = FinalLayer(width, channels)

        # Only the plain DiT starts so; a DiT-DH keeps torch's default.
        for module in self.modules():
            if isinstance(module, Linear):
                xavier_uniform_(module.weight)
                zeros_(module.bias)
        init_weights(self)

    def forward(self, x, t, y):
        """Latents x (B, C, G, G), times t (B,) in [0, 1], labels y (B,) in 0..K -> velocity (B, C, G, G)."""
        c = self.t_embedder(t) + self.y_embedder(y)  # (B, 1, W)
        h = self.x_embedder(x) + self.pos_embed  # (B, N, W)
        for block in self.blocks:
            h = run_block(block, h, c, self.feat_rope, self.checkpoint_activations)
        return to_velocity(self.final_layer(h, c), x, t, self.prediction)


class DiTDH(Module):
    """DiT with a DDT head: a deep body makes s, which conditions a shallow head token by token.

    The head is at least as wide as a token: a narrower network can't fit its noise (section 4.1, theorem 1).
    Attributes are those of DiT. base_depth = D, a block of the body counted from 1, adds the base: a second
    and weaker output, which a final layer makes of the tokens after block D (RAEv2, section 5).
    """

    checkpoint_activations = False

    def __init__(
        self,
        latent_shape,
        num_classes,
        width,
        depth,
        heads,
        head_width,
        head_depth,
        head_heads,
        base_depth=None,
    ):
        super().__init__()
        channels, grid, _ = latent_shape
        self.depth = depth
        self.base_depth = base_depth
        self.pos_embed = Parameter(sincos_position(width, grid), requires_grad=False)
        self.s_embedder = TokenEmbedder(channels, width)
        self.x_embedder = TokenEmbedder(channels, head_width)
        self.s_projector = Identity() if width == head_width else Linear(width, head_width)
        self.t_embedder = TimeEmbedder(width)
        self.y_embedder = LabelEmbedder(num_classes, width)
        self.enc_feat_rope = RotaryEmbedding(width, heads, grid)
        self.dec_feat_rope = RotaryEmbedding(head_width, head_heads, grid)

        # Body and head share one list, as in the released files.
        self.blocks = ModuleList(Block(width, heads) for _ in range(depth))
        self.blocks.extend(Block(head_width, head_heads) for _ in range(head_depth))
        self.final_layer = FinalLayer(head_width, channels)
        if base_depth is not None:
            if not 1 <= base_depth <= depth:
                raise SystemExit(f"--base-depth {base_depth}: the body has blocks 1 to {depth}")
            self.base_layer = FinalLayer(width, channels)
        init_weights(self)

    def forward(self, x, t, y, with_base=False):
        """Latents x (B, C, G, G), times t (B,) in [0, 1], labels y (B,) in 0..K -> velocity (B, C, G, G).

        with_base, of a network that has one: (velocity, the base's velocity). Training needs both: its loss
        is the sum of theirs. Internal guidance (RAEv2, eq. 3) is base + scale * (velocity - base).
        """
        t_emb = self.t_embedder(t)  # (B, 1, W)

        # The body's blocks apply SiLU to c once more, as released.
        c = F.silu(t_emb + self.y_embedder(y))  # (B, 1, W)
        s = self.s_embedder(x) + self.pos_embed  # (B, N, W)
        for number, block in enumerate(self.blocks[: self.depth], 1):
            s = run_block(block, s, c, self.enc_feat_rope, self.checkpoint_activations)
            if with_base and number == self.base_depth:
                # In the base each token is its own condition.
                q = F.silu(t_emb + s)  # (B, N, W)
                base = to_velocity(self.base_layer(q, q), x, t, self.prediction)

        # The head starts from the latents, and s conditions it token by token.
        s = self.s_projector(F.silu(t_emb + s))  # (B, N, head width)
        h = self.x_embedder(x)  # (B, N, head width)
        for block in self.blocks[self.depth :]:
            h = run_block(block, h, s, self.dec_feat_rope, self.checkpoint_activations)
        velocity = to_velocity(self.final_layer(h, s), x, t, self.prediction)
        if with_base:
            return velocity, base
        return velocity


def init_weights(model):
    """Start a network as released: adaLN is zero, so blocks are identities, and the first output is 0."""
    for module in model.modules():
        if isinstance(module, TokenEmbedder):
            xavier_uniform_(module.proj.weight)
            zeros_(module.proj.bias)
        if isinstance(module, (Block, FinalLayer)):
            for parameter in module.adaLN_modulation.parameters():
                zeros_(parameter)
        if isinstance(module, FinalLayer):
            zeros_(module.linear.weight)
            zeros_(module.linear.bias)

    # mlp[::2] are the two linear layers of the time MLP.
    for layer in (model.y_embedder.embedding_table, *model.t_embedder.mlp[::2]):
        normal_(layer.weight, std=0.02)


def model_name(text):
    """Return the spelling in NAMES of a name in any case of letters. Raises SystemExit for an unknown one."""
    for name in NAMES:
        if name.lower() == text.lower():
            return name
    raise SystemExit(f"--model {text}: unknown; choose one of {', '.join(NAMES)}")


def build(name, latent_shape, num_classes, prediction="v", base_depth=None, **sizes):
    """Build the network of a name in NAMES, in any case of letters, for latents (C, G, G) and K classes.

    sizes replace DIMENSIONS of the name; None keeps one. prediction is "v" or "x"; base_depth is the block of
    a DiT-DH's body, from 1, that the base follows. The network's attributes latent_shape, num_classes, sizes
    and prediction hold what it was built with. Raises SystemExit for names and sizes that don't fit.
    """
    if prediction not in ("v", "x"):
        raise SystemExit(f"--prediction {prediction}: neither v nor x")
    family, size = model_name(name).rsplit("-", 1)
    dimensions = DIMENSIONS if family == "DiT-DH" else DIMENSIONS[:3]
    chosen = dict(zip(dimensions, SIZES[size], strict=False))
    for dimension, value in sizes.items():
        if value is not None:
            chosen[dimension] = value

    if family == "DiT-DH":
        model = DiTDH(latent_shape, num_classes, base_depth=base_depth, **chosen)
    elif base_depth is None and len(chosen) == 3:
        model = DiT(latent_shape, num_classes, **chosen)
    else:
        raise SystemExit(f"--model {name} has neither head nor base; choose a DiT-DH")
    model.latent_shape = tuple(latent_shape)
    model.num_classes = num_classes
    model.sizes = chosen
    model.prediction = prediction
    return model


def load(path, flag="--flow"):
    """Return the network of a flow checkpoint: EMA weights if the file has them, fp32, on CPU, in eval mode.

    path is a file of flow_train.py or a released one (.pt, .safetensors): a state dict, bare or under "ema"
    or "model", whose names may start with "module." or "_orig_mod.". The network's attribute config is the
    checkpoint's, or config_from_shapes of a bare file. Raises SystemExit, which names flag and the first key
    that doesn't fit, for any other file.
    """
    file = read(path, flag)
    weights = file.get("ema") or file.get("model") or file
    state = {}
    for key, value in weights.items():
        # DDP and torch.compile put these prefixes before a name.
        state[key.replace("_orig_mod.", "").replace("module.", "")] = value

    # No other kind of network, decoder or statistics has random Fourier features of this name.
    if "t_embedder.W" not in state:
        raise SystemExit(f"{flag} {path}: not a flow checkpoint but {file.get('format', 'other data')}")

    try:
        config = file.get("config") or config_from_shapes(state)
        # On the meta device no weights are drawn that the file's then replace: 0.8 s instead of 12 for XL.
        with torch.device("meta"):
            model = build(
                config["model"],
                config["latent_shape"],
                config["num_classes"],
                config["prediction"],
                config["base_depth"],
                **config["sizes"],
            )
        # load_state_dict copies weights of any dtype into fp32 ones, and leaves none mapped to the file.
        model.to_empty(device="cpu").load_state_dict(state)
    except (KeyError, RuntimeError) as error:
        # torch lists all keys that don't fit, from the second line on.
        lines = str(error).split("\n\t")[:2]
        raise SystemExit(f"{flag} {path}: not a flow checkpoint ({lines[-1]:.200})") from None
    model.config = config
    return model.eval()


def config_from_shapes(state):
    """The config of the DiT-DH whose state dict this is, as flow_train.py stores it, from shapes alone.

    Shapes tell neither the prediction nor the base's depth. The only recipe with a base is RAEv2's, whose
    network predicts x and has its base after block 8; without a base the prediction is v. Raises KeyError for
    a state dict that lacks tensors, as a DiT's.
    """
    _, tokens, width = state["pos_embed"].shape
    head_width, channels = state["x_embedder.proj.weight"].shape[:2]
    grid = math.isqrt(tokens)
    widths = [len(state[key]) for key in state if "norm1" in key]  # of the blocks
    # Shapes don't tell body and head of one width apart; released heads have two blocks.
    head_depth = 2 if head_width == width else widths.count(head_width)
    has_base = "base_layer.linear.weight" in state
    return {
        "model": "DiT-DH-S",
        "latent_shape": [channels, grid, grid],
        "num_classes": len(state["y_embedder.embedding_table.weight"]) - 1,
        "prediction": "x" if has_base else "v",
        "base_depth": 8 if has_base else None,
        "sizes": {
            "width": width,
            "depth": len(widths) - head_depth,
            "heads": width // state["enc_feat_rope.freqs_cos"].shape[1],
            "head_width": head_width,
            "head_depth": head_depth,
            "head_heads": head_width // state["dec_feat_rope.freqs_cos"].shape[1],
        },
    }


def read(path, flag="--flow"):
    """Return the dict in a flow checkpoint or a released file; tensors stay in the file until they are used.

    Raises SystemExit, which names flag, for a file that can't be read or holds no dict.
    """
    try:
        if str(path).endswith(".safetensors"):
            return load_file(path)
        return dict(torch.load(path, map_location="cpu", mmap=True, weights_only=True))
    except Exception as error:  # torch's message would advise weights_only=False
        raise SystemExit(f"{flag} {path}: not a flow checkpoint ({type(error).__name__})") from None
