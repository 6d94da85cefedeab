"""A compact Qwen3.5 in torch, written for training: text, vision tower and MTP head, in the family's tensor names.

The modules are nested and named so that `state_dict()` *is* the checkpoint: names, shapes and meaning are those of
transformers' `Qwen3_5ForConditionalGeneration` plus `mtp.*`. What differs is only the arithmetic's form: the delta rule
is chunked (Yang et al. 2024, "Gated Delta Networks", the WY form) and images of a batch share one size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .architecture import Shape

EPS = 1e-6


class RMSNorm(nn.Module):
    """Zero-centred RMS norm: the stored weight w stands for a gain of 1 + w."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], 1 + self.weight, EPS)


class GatedNorm(nn.Module):
    """RMS norm per head with plain weight, then times SiLU of the gate."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, EPS) * F.silu(gate)


class UnitTriangularInverse(torch.autograd.Function):
    """(I + N)^-1 of strictly lower triangular N [..., n, n], n a power of two: blocks of 1, 2, 4 .. are joined.

    As exact as substitution, and many small systems at once are a few batched products instead of a call each.
    """

    @staticmethod
    def forward(ctx: Any, system: Tensor) -> Tensor:
        size = system.shape[-1]
        inverse = torch.eye(size, device=system.device).expand_as(system).clone()
        half = 1
        while half < size:
            blocks = size // (2 * half)
            n = system.unflatten(-1, (blocks, 2 * half)).unflatten(-3, (blocks, 2 * half))
            out = inverse.unflatten(-1, (blocks, 2 * half)).unflatten(-3, (blocks, 2 * half))
            n, diagonal = (x.diagonal(dim1=-4, dim2=-2).movedim(-1, -3) for x in (n, out))
            upper, lower = diagonal[..., :half, :half], diagonal[..., half:, half:]
            diagonal[..., half:, :half] = -lower @ (n[..., half:, :half] @ upper)
            half *= 2
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        t = inverse.transpose(-1, -2)
        return -(t @ gradient @ t).tril(-1)


def delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """Gated delta rule over [B, H, T, D] with log decay g and step size beta [B, H, T], float32; returns [B, H, T, D].

    Within a chunk the T corrections solve one unit-triangular system; only the state passes from chunk to chunk.
    """
    batch, heads, length, width = q.shape
    size = 32 if length <= 256 else 64
    pad = -length % size
    q, k, v = (F.pad(x, (0, 0, 0, pad)) for x in (q, k, v))
    g, beta = F.pad(g, (0, pad)), F.pad(beta, (0, pad))
    q, k, v = (x.reshape(batch, heads, -1, size, x.shape[-1]) for x in (q, k, v))
    g = g.reshape(batch, heads, -1, size).cumsum(-1)
    beta = beta.reshape(batch, heads, -1, size, 1)

    lower = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
    decay = (g.unsqueeze(-1) - g.unsqueeze(-2)).masked_fill(~lower, -torch.inf).exp()
    kt = k.transpose(-1, -2)
    system = (beta * k @ kt * decay).tril(-1)
    grown = g.exp().unsqueeze(-1)
    right = torch.cat((beta * v, beta * grown * k), -1)
    solved = UnitTriangularInverse.apply(system) @ right
    fresh, old = solved.split((v.shape[-1], width), -1)
    within = q @ kt * decay
    q_in = q * grown
    k_out = k * (g[..., -1:] - g).exp().unsqueeze(-1)
    keep = g[..., -1].exp()

    state = q.new_zeros(batch, heads, width, v.shape[-1])
    out = []
    for c in range(q.shape[2]):
        new = fresh[:, :, c] - old[:, :, c] @ state
        out.append(q_in[:, :, c] @ state + within[:, :, c] @ new)
        state = keep[:, :, c, None, None] * state + k_out[:, :, c].transpose(-1, -2) @ new
    return torch.stack(out, 2).reshape(batch, heads, -1, v.shape[-1])[:, :, :length]


class DeltaNet(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        d = s.linear_head_dim
        self.key, self.value = s.linear_k_heads * d, s.linear_v_heads * d
        channels = 2 * self.key + self.value
        self.in_proj_qkv = nn.Linear(s.hidden, channels, bias=False)
        self.in_proj_z = nn.Linear(s.hidden, self.value, bias=False)
        self.in_proj_b = nn.Linear(s.hidden, s.linear_v_heads, bias=False)
        self.in_proj_a = nn.Linear(s.hidden, s.linear_v_heads, bias=False)
        self.conv1d = nn.Conv1d(channels, channels, 4, groups=channels, bias=False)
        self.out_proj = nn.Linear(self.value, s.hidden, bias=False)
        self.norm = GatedNorm(d)
        # A in [1/4, 8] and steps in [0.005, 0.2]: half-lives from a few tokens to several hundred.
        step = torch.exp(torch.empty(s.linear_v_heads).uniform_(math.log(0.005), math.log(0.2)))
        self.dt_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))
        self.A_log = nn.Parameter(torch.empty(s.linear_v_heads).uniform_(0.25, 8).log())

    def convolve(self, x: Tensor) -> Tensor:
        """Depthwise causal convolution of width 4 over [B, T, C], as four shifted products, then SiLU."""
        taps = self.conv1d.weight[:, 0].to(x.dtype)
        padded = F.pad(x, (0, 0, 3, 0))
        length = x.shape[1]
        return F.silu(sum(padded[:, i : i + length] * taps[:, i] for i in range(4)))

    def forward(self, x: Tensor) -> Tensor:
        s, d = self.s, self.s.linear_head_dim
        batch, length, _ = x.shape
        mixed = self.convolve(self.in_proj_qkv(x))
        q, k, v = mixed.split((self.key, self.key, self.value), -1)
        q, k = (_unit(t.view(batch, length, -1, d)) for t in (q, k))
        groups = s.linear_v_heads // s.linear_k_heads
        q = (q * d**-0.5).repeat_interleave(groups, 2)
        k = k.repeat_interleave(groups, 2)
        v = v.view(batch, length, -1, d)
        beta = self.in_proj_b(x).float().sigmoid()
        g = -self.A_log.exp() * F.softplus(self.in_proj_a(x).float() + self.dt_bias)
        q, k, v = (t.float().transpose(1, 2) for t in (q, k, v))
        out = delta_rule(q, k, v, g.transpose(1, 2), beta.transpose(1, 2)).transpose(1, 2)
        z = self.in_proj_z(x).view(batch, length, -1, d)
        return self.out_proj(self.norm(out, z).reshape(batch, length, -1))


def _unit(x: Tensor) -> Tensor:
    """L2 norm along the last axis with the epsilon inside the root."""
    x = x.float()
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + EPS)


class Attention(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        self.q_proj = nn.Linear(s.hidden, 2 * s.heads * s.head_dim, bias=False)
        self.k_proj = nn.Linear(s.hidden, s.kv_heads * s.head_dim, bias=False)
        self.v_proj = nn.Linear(s.hidden, s.kv_heads * s.head_dim, bias=False)
        self.o_proj = nn.Linear(s.heads * s.head_dim, s.hidden, bias=False)
        self.q_norm = RMSNorm(s.head_dim)
        self.k_norm = RMSNorm(s.head_dim)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        s = self.s
        batch, length, _ = x.shape
        q, gate = self.q_proj(x).view(batch, length, s.heads, 2 * s.head_dim).chunk(2, -1)
        k = self.k_proj(x).view(batch, length, s.kv_heads, s.head_dim)
        v = self.v_proj(x).view(batch, length, s.kv_heads, s.head_dim)
        q, k = rotate(self.q_norm(q), rope), rotate(self.k_norm(k), rope)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v.float()))
        groups = s.heads // s.kv_heads
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out = out.transpose(1, 2).reshape(batch, length, -1) * gate.reshape(batch, length, -1).sigmoid()
        return self.o_proj(out)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of the first R of D dims of [B, T, H, D]; cos and sin are [B, T, 1, R/2]."""
    cos, sin = rope
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)


class MLP(nn.Module):
    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, s: Shape, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.input_layernorm = RMSNorm(s.hidden)
        self.post_attention_layernorm = RMSNorm(s.hidden)
        if kind == "linear_attention":
            self.linear_attn = DeltaNet(s)
        else:
            self.self_attn = Attention(s)
        self.mlp = MLP(s.hidden, s.intermediate)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        normed = self.input_layernorm(x)
        x = x + (self.linear_attn(normed) if self.kind == "linear_attention" else self.self_attn(normed, rope))
        return x + self.mlp(self.post_attention_layernorm(x))


class Text(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        self.embed_tokens = nn.Embedding(s.vocab, s.hidden)
        self.layers = nn.ModuleList(Layer(s, kind) for kind in s.layer_types)
        self.norm = RMSNorm(s.hidden)

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [B, T, 1, R/2] of positions [3, B, T] (time, row, column), interleaved as in the family."""
        half = self.s.head_dim // 8
        freqs = self.s.rope_theta ** (-torch.arange(half, device=positions.device) / half)
        stream = torch.zeros(half, dtype=torch.long, device=positions.device)
        for axis in (1, 2):
            stream[axis : 3 * self.s.mrope_section[axis] : 3] = axis
        angle = positions[stream].permute(1, 2, 0).unsqueeze(2) * freqs
        return angle.cos(), angle.sin()

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        for layer in self.layers:
            x = layer(x, rope)
        return self.norm(x)


class MTP(nn.Module):
    """The draft head: from the final hidden state at p and the token at p + 1 to the token at p + 2."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.fc = nn.Linear(2 * s.hidden, s.hidden, bias=False)
        self.pre_fc_norm_embedding = RMSNorm(s.hidden)
        self.pre_fc_norm_hidden = RMSNorm(s.hidden)
        self.layers = nn.ModuleList([Layer(s, "full_attention")])
        self.norm = RMSNorm(s.hidden)

    def forward(self, embedding: Tensor, hidden: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        x = self.fc(torch.cat((self.pre_fc_norm_embedding(embedding), self.pre_fc_norm_hidden(hidden)), -1))
        return self.norm(self.layers[0](x, rope))


class VisionBlock(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        width = s.vision_hidden
        self.heads = s.vision_heads
        self.norm1, self.norm2 = nn.LayerNorm(width, EPS), nn.LayerNorm(width, EPS)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict(
            {
                "linear_fc1": nn.Linear(width, s.vision_intermediate),
                "linear_fc2": nn.Linear(s.vision_intermediate, width),
            }
        )

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        batch, patches, width = x.shape
        qkv = self.attn["qkv"](self.norm1(x)).view(batch, patches, 3, self.heads, -1)
        q, k, v = qkv.unbind(2)
        q, k = rotate(q, rope), rotate(k, rope)
        out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
        x = x + self.attn["proj"](out.transpose(1, 2).reshape(batch, patches, width))
        return x + self.mlp["linear_fc2"](F.gelu(self.mlp["linear_fc1"](self.norm2(x)), approximate="tanh"))


class Vision(nn.Module):
    """Vision tower over images of one size, given as patch vectors [N, gh * gw, 1536] in 2 x 2 block order."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        width, merged = s.vision_hidden, 4 * s.vision_hidden
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv3d(3, width, (2, 16, 16), (2, 16, 16))})
        self.pos_embed = nn.Embedding(s.vision_positions, width)
        self.blocks = nn.ModuleList(VisionBlock(s) for _ in range(s.vision_depth))
        self.merger = nn.ModuleDict(
            {
                "norm": nn.LayerNorm(width, EPS),
                "linear_fc1": nn.Linear(merged, merged),
                "linear_fc2": nn.Linear(merged, s.hidden),
            }
        )

    def positions(self, grid: tuple[int, int]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Learned positions [gh * gw, V] resampled bilinearly to the grid, and the 2D rope, both in block order."""
        rows, cols = (torch.arange(n, device=self.pos_embed.weight.device) for n in grid)
        side = math.isqrt(self.s.vision_positions)
        table = self.pos_embed.weight.view(1, side, side, -1).permute(0, 3, 1, 2)
        learned = F.interpolate(table, size=grid, mode="bilinear", align_corners=True)[0].permute(1, 2, 0)
        quarter = self.s.vision_hidden // self.s.vision_heads // 4
        freqs = 10000.0 ** (-torch.arange(quarter, device=rows.device) / quarter)
        angle = torch.cat(
            (
                (rows[:, None, None] * freqs).expand(*grid, quarter),
                (cols[None, :, None] * freqs).expand(*grid, quarter),
            ),
            -1,
        )
        angle = block_order(angle)[None, :, None]
        return block_order(learned), (angle.cos(), angle.sin())

    def forward(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        learned, rope = self.positions(grid)
        proj = self.patch_embed["proj"]
        x = F.linear(patches, proj.weight.flatten(1), proj.bias) + learned
        for block in self.blocks:
            x = block(x, rope)
        x = self.merger["norm"](x).reshape(len(x), -1, 4 * x.shape[-1])
        return self.merger["linear_fc2"](F.gelu(self.merger["linear_fc1"](x)))


def block_order(x: Tensor) -> Tensor:
    """[gh, gw, C] to [gh * gw, C], the four patches of each 2 x 2 block next to each other."""
    gh, gw, c = x.shape
    return x.view(gh // 2, 2, gw // 2, 2, c).transpose(1, 2).reshape(-1, c)


class Model(nn.Module):
    """The whole checkpoint; `state_dict()` has the family's names."""

    def __init__(self, s: Shape, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.s = s
        self.model = nn.ModuleDict({"language_model": Text(s), "visual": Vision(s)})
        self.mtp = MTP(s)
        self.apply(_initialise)
        for name, p in self.named_parameters():  # residual branches start small
            if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight")):
                p.data *= (2 * s.layers) ** -0.5

    @property
    def text(self) -> Text:
        part: Text = self.model["language_model"]
        return part

    @property
    def tower(self) -> Vision:
        part: Vision = self.model["visual"]
        return part

    def embed(self, ids: Tensor, patches: Tensor | None = None, grid: tuple[int, int] = (6, 6)) -> Tensor:
        """Token embeddings [B, T, hidden], image tokens replaced by the tower's output in reading order."""
        x = self.text.embed_tokens(ids)
        if patches is None or not len(patches):
            return x
        features = self.tower(patches, grid).reshape(-1, x.shape[-1])
        return x.masked_scatter((ids == self.s.image_token).unsqueeze(-1), features.to(x.dtype))

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.text.embed_tokens.weight)

    def forward(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        patches: Tensor | None = None,
        grid: tuple[int, int] = (6, 6),
    ) -> tuple[Tensor, Tensor]:
        """Hidden states after the final norm [B, T, hidden], and the embeddings that went in."""
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device).expand(3, *ids.shape)
        x = self.embed(ids, patches, grid)
        return self.text(x, self.text.rope(positions)), x


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=module.in_features**-0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02 if module.num_embeddings < 1000 else module.embedding_dim**-0.5)
    elif isinstance(module, nn.Conv1d):
        nn.init.uniform_(module.weight, -0.5, 0.5)
