"""The velocity network of stage 2: DiT, and DiT-DH, a DiT with a wide and shallow head.

Zheng et al. 2025, Diffusion Transformers with Representation Autoencoders (arXiv 2510.11690), section 5. The
blocks are LightningDiT's: RMSNorm, rotary positions, SwiGLU, adaLN-zero. Where paper and released code differ
this is the code, and the released files load. flow_train.py trains it, sample.py samples. At a prompt:

    model = dit_dh.build("DiT-DH-S", latent_shape=(768, 16, 16), num_classes=1000).eval()
    velocity = model(torch.randn(2, 768, 16, 16), torch.rand(2), torch.tensor([207, 1000]))   # 1000: no class
    model = dit_dh.load("runs/flow/last.pt")   # or stage2_model.pt

Letters: B batch, C latent channels, G latent positions a side, N tokens, W width, h heads, s head size,
K classes, t in [0, 1] with t = 0 data and t = 1 noise.
"""

import math
import os

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
HEAD = {"head_width": 2048, "head_depth": 2, "head_heads": 16}  # of every DiT-DH
LABEL_DROPOUT = 0.1  # share of labels that training replaces by "no class", for classifier-free guidance


def sincos_position(width, grid):
    """Fixed 2-D position embedding (1, N, width), as in MAE: the column in the first half of the channels."""
    omega = 10000.0 ** (-torch.arange(width // 4) / (width / 4))
    angle = torch.arange(grid)[:, None] * omega
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)  # (grid, width / 2)
    return torch.cat([axis.repeat(grid, 1), axis.repeat_interleave(grid, dim=0)], dim=1)[None]


class RotaryEmbedding(nn.Module):
    """2-D rotary positions: the first half of a head's channels turns with the row, the last with the column.

    Channels (2i, 2i+1) turn together, so the tables (N, s) hold each value twice.
    """

    def __init__(self, head_size, grid):
        super().__init__()
        frequency = 10000.0 ** (-2 * torch.arange(head_size // 4) / (head_size / 2))
        angle = (torch.arange(grid)[:, None] * frequency).repeat_interleave(2, dim=1)  # (grid, s / 2)
        angle = torch.cat([angle.repeat_interleave(grid, dim=0), angle.repeat(grid, 1)], dim=1)  # (N, s)
        self.register_buffer("freqs_cos", angle.cos())
        self.register_buffer("freqs_sin", angle.sin())

    def forward(self, x):
        """x (B, N, h, s) -> the same, rotated: (a, b) becomes (a cos - b sin, b cos + a sin)."""
        cos, sin = self.freqs_cos[:, None].to(x.dtype), self.freqs_sin.to(x.dtype)  # (N, 1, s), (N, s)
        sin = (sin.unflatten(1, (-1, 2)) * sin.new_tensor([-1, 1])).flatten(1)[:, None]  # (N, 1, s)
        swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        return torch.addcmul(x * cos, swapped, sin)


class TokenEmbedder(nn.Module):
    """Latents (B, C, G, G) -> tokens (B, N, W)."""

    def __init__(self, channels, width, patch):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, x):
        x = F.pixel_unshuffle(x, self.proj.stride[0]).flatten(2).transpose(1, 2)  # (B, N, C * patch**2)
        # The convolution as a product, whose output has its tokens in rows, as the blocks want them.
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
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True) ** 2 / x.shape[-1]
        # From here on in the condition's dtype: under bf16 autocast the next layer would round to it anyway.
        x = (x * torch.rsqrt(mean_square + 1e-6)).to(scale.dtype)
        return torch.addcmul(shift, x, self.weight.to(scale.dtype) * (1 + scale))


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, rope):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)  # each (B, N, h, s)
        q, k, v = (z.transpose(1, 2) for z in (rope(q), rope(k), v))  # each (B, h, N, s)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))  # (B, N, W)


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
        a1, b1, g1, a2, b2, g2 = self.adaLN_modulation(c).chunk(6, dim=-1)  # shift, scale, gate
        x = torch.addcmul(x, g1, self.attn(self.norm1(x, a1, b1), rope))
        return torch.addcmul(x, g2, self.mlp(self.norm2(x, a2, b2)))


class FinalLayer(nn.Module):
    """Tokens (B, N, W) and condition (B, 1 or N, W) -> latents (B, C, G, G)."""

    def __init__(self, width, channels, patch):
        super().__init__()
        self.patch = patch
        self.norm_final = RMSNorm(width)
        self.linear = nn.Linear(width, patch**2 * channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        x = self.linear(self.norm_final(x, shift, scale))  # (B, N, patch**2 * C)
        x = x.unflatten(-1, (self.patch**2, -1)).permute(0, 3, 2, 1)  # (B, C, patch**2, N)
        grid = math.isqrt(x.shape[-1])
        return F.pixel_shuffle(x.reshape(len(x), -1, grid, grid), self.patch)  # (B, C, G, G)


def run_blocks(blocks, x, c, rope, recompute):
    """The blocks in turn; with recompute only their inputs are kept for the backward pass."""
    for block in blocks:
        x = checkpoint(block, x, c, rope, use_reentrant=False) if recompute else block(x, c, rope)
    return x


def init_weights(model, embedders):
    """The released start: adaLN and output zero, so blocks are identities and the first velocity is 0."""
    for embedder in embedders:
        nn.init.xavier_uniform_(embedder.proj.weight.flatten(1))
        nn.init.zeros_(embedder.proj.bias)
    for module in (model.y_embedder.embedding_table, model.t_embedder.mlp[0], model.t_embedder.mlp[2]):
        nn.init.normal_(module.weight, std=0.02)
    adaln = [module.adaLN_modulation[1] for module in (*model.blocks, model.final_layer)]
    for module in (*adaln, model.final_layer.linear):
        nn.init.zeros_(module.weight)
        nn.init.zeros_(module.bias)


class DiT(nn.Module):
    """The baseline: all blocks and the final layer are conditioned on time + label.

    latent_shape (C, G, G). checkpoint_activations = True trades time for memory in training.
    """

    def __init__(self, *, latent_shape, num_classes, width, depth, heads, patch=1):
        super().__init__()
        channels, grid = latent_shape[0], latent_shape[1] // patch
        self.latent_shape, self.num_classes = tuple(latent_shape), num_classes
        self.sizes = dict(width=width, depth=depth, heads=heads, patch=patch)
        self.checkpoint_activations = False
        self.pos_embed = nn.Parameter(sincos_position(width, grid), requires_grad=False)
        self.x_embedder = TokenEmbedder(channels, width, patch)
        self.t_embedder = TimeEmbedder(width)
        self.y_embedder = LabelEmbedder(num_classes, width)
        self.feat_rope = RotaryEmbedding(width // heads, grid)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.final_layer = FinalLayer(width, channels, patch)
        for module in self.modules():  # DiT's own; DiT-DH keeps torch's default
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        init_weights(self, [self.x_embedder])

    def forward(self, x, t, y):
        """Latents x (B, C, G, G), times t (B,) in [0, 1], labels y (B,) in 0..K -> velocity (B, C, G, G)."""
        c = (self.t_embedder(t) + self.y_embedder(y))[:, None]  # (B, 1, W)
        x = self.x_embedder(x) + self.pos_embed  # (B, N, W)
        x = run_blocks(self.blocks, x, c, self.feat_rope, self.checkpoint_activations)
        return self.final_layer(x, c)


class DiTDH(nn.Module):
    """DiT with a DDT head: a deep body makes s, which conditions a shallow head token by token.

    The head is wider than a token: a narrower network can't fit the noise in it (section 4.1, theorem 1).
    Arguments and attributes as of DiT.
    """

    def __init__(
        self, *, latent_shape, num_classes, width, depth, heads, head_width, head_depth, head_heads, patch=1
    ):
        super().__init__()
        channels, grid = latent_shape[0], latent_shape[1] // patch
        self.latent_shape, self.num_classes = tuple(latent_shape), num_classes
        self.sizes = dict(width=width, depth=depth, heads=heads, patch=patch)
        self.sizes |= dict(head_width=head_width, head_depth=head_depth, head_heads=head_heads)
        self.checkpoint_activations = False
        self.pos_embed = nn.Parameter(sincos_position(width, grid), requires_grad=False)
        self.s_embedder = TokenEmbedder(channels, width, patch)
        self.x_embedder = TokenEmbedder(channels, head_width, patch)
        self.s_projector = nn.Identity() if width == head_width else nn.Linear(width, head_width)
        self.t_embedder = TimeEmbedder(width)
        self.y_embedder = LabelEmbedder(num_classes, width)
        self.enc_feat_rope = RotaryEmbedding(width // heads, grid)
        self.dec_feat_rope = RotaryEmbedding(head_width // head_heads, grid)
        body = [Block(width, heads) for _ in range(depth)]
        head = [Block(head_width, head_heads) for _ in range(head_depth)]
        self.blocks = nn.ModuleList(body + head)  # one list, as in the released files
        self.final_layer = FinalLayer(head_width, channels, patch)
        init_weights(self, [self.s_embedder, self.x_embedder])

    def body(self, x, t, y):
        """Arguments as of forward -> s (B, N, W), which a sampler may use again at the next times."""
        # The blocks apply SiLU once more, as released.
        c = F.silu(self.t_embedder(t) + self.y_embedder(y))[:, None]  # (B, 1, W)
        s = self.s_embedder(x) + self.pos_embed  # (B, N, W)
        body = self.blocks[: self.sizes["depth"]]
        return run_blocks(body, s, c, self.enc_feat_rope, self.checkpoint_activations)

    def head(self, x, t, s):
        """Latents x (B, C, G, G), times t (B,), the body's s (B, N, W) -> velocity (B, C, G, G)."""
        s = self.s_projector(F.silu(self.t_embedder(t)[:, None] + s))  # (B, N, head width)
        h = self.x_embedder(x)  # (B, N, head width)
        head = self.blocks[self.sizes["depth"] :]
        h = run_blocks(head, h, s, self.dec_feat_rope, self.checkpoint_activations)
        return self.final_layer(h, s)

    def forward(self, x, t, y):
        """Latents x (B, C, G, G), times t (B,) in [0, 1], labels y (B,) in 0..K -> velocity (B, C, G, G)."""
        return self.head(x, t, self.body(x, t, y))


def build(name, latent_shape, num_classes, **sizes):
    """The network DiT-S .. DiT-XL or DiT-DH-S .. DiT-DH-XL for latents (C, G, G) and K classes.

    sizes replace its width, depth, heads and, in DiT-DH, head_width, head_depth, head_heads; None keeps the
    named one. Raises SystemExit for an unknown name and for sizes that don't fit.
    """
    family, _, size = name.rpartition("-")
    if family not in ("DiT", "DiT-DH") or size not in SIZES:
        raise SystemExit(f"{name}: neither DiT-SIZE nor DiT-DH-SIZE, with a SIZE of {', '.join(SIZES)}")
    network, named = (DiT, SIZES[size]) if family == "DiT" else (DiTDH, SIZES[size] | HEAD)
    sizes = named | {key: value for key, value in sizes.items() if value is not None}
    if unknown := sizes.keys() - named.keys() - {"patch"}:
        raise SystemExit(f"{name} has no {', '.join(sorted(unknown))}; leave it out or choose a DiT-DH")
    for part in ["", "head_"][: len(named) // 3]:
        width, heads = sizes[f"{part}width"], sizes[f"{part}heads"]
        if width % (4 * heads):  # 2-D rotary positions turn pairs of channels by row and by column
            raise SystemExit(f"{part}width {width}: must be a multiple of 4 * {part}heads, here {4 * heads}")
    return network(latent_shape=latent_shape, num_classes=num_classes, **sizes)


def sizes_of(state):
    """The keyword arguments of DiT or DiTDH that a bare state dict implies, out of its shapes alone."""
    deep = "s_embedder.proj.weight" in state  # a DiT-DH
    width, channels, patch, _ = state["s_embedder.proj.weight" if deep else "x_embedder.proj.weight"].shape
    head_size = state["enc_feat_rope.freqs_cos" if deep else "feat_rope.freqs_cos"].shape[1]
    grid = math.isqrt(state["pos_embed"].shape[1]) * patch
    block_widths = [len(weight) for key, weight in state.items() if key.endswith("norm1.weight")]
    sizes = dict(latent_shape=(channels, grid, grid), patch=patch, width=width, depth=len(block_widths))
    sizes |= dict(heads=width // head_size, num_classes=len(state["y_embedder.embedding_table.weight"]) - 1)
    if deep:
        head_width = len(state["x_embedder.proj.weight"])
        # Where body and head have one width, shapes don't tell them apart; released heads have two blocks.
        head_depth = 2 if head_width == width else block_widths.count(head_width)
        sizes |= dict(depth=len(block_widths) - head_depth, head_width=head_width, head_depth=head_depth)
        sizes["head_heads"] = head_width // state["dec_feat_rope.freqs_cos"].shape[1]
    return sizes


def read(path):
    """The dict in a flow checkpoint or a released file; mapped, so that only the weights in use are read."""
    if not os.path.isfile(path):
        raise SystemExit(f"{path}: no such file; give a flow checkpoint, ours or released")
    if str(path).endswith(".safetensors"):
        return load_file(path)
    return torch.load(path, map_location="cpu", mmap=True, weights_only=True)


def load(path):
    """The network of a flow checkpoint: EMA weights where the file has them, fp32, on CPU, in eval mode.

    path: a file of flow_train.py or a released one (.pt, .safetensors): a state dict, bare or under "ema",
    "model", "module" or "state_dict", also with "module." before its names. Raises SystemExit for any other.
    Hold one autocast region around all steps of a sampler: the weights are then cast to bf16 only once.
    """
    try:
        state = file = read(path)
        while level := next((key for key in ("ema", "model", "module", "state_dict") if key in state), None):
            state = state[level]
        state = {key.removeprefix("module."): value for key, value in state.items()}
        with torch.device("meta"):
            if file.get("format") == "rae-flow/1":
                name, *shape = (file["config"][key] for key in ("model", "latent_shape", "num_classes"))
                model = build(name, *shape, **file["config"]["sizes"])
            else:
                model = (DiTDH if "s_embedder.proj.weight" in state else DiT)(**sizes_of(state))
        model.to_empty(device="cpu").load_state_dict(state)
    except Exception as error:  # a foreign file can break in any of these lines
        reason = " ".join(str(error).split())[:200]
        raise SystemExit(f"{path}: not a flow checkpoint, ours or released ({reason})") from None
    return model.eval()
