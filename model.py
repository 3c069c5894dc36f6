"""A Qwen-class decoder in one file: RMSNorm, rotary embedding, grouped-query attention with a KV cache, SwiGLU.

Computes Qwen2/Qwen2.5 (biases on q, k, v), Qwen3 (norms on q and k) and Llama (rope scaling), with the logits of
transformers. Parameters carry the names of those checkpoints, so that a state dict needs no translation. To read and
write one is the work of machinery/checkpoints.py; adapters (LoRA) are put on by machinery/lora.py.

Shapes: B sequences, T tokens, V vocabulary, D width, L layers, H query heads, K key/value heads, E head dimension, S
columns of the cache, W of them in use.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

FAMILIES = ("qwen2", "qwen3", "llama")
LONGEST = 2 ** 24  # tokens of context: their rotary angles are a table


@dataclass(frozen=True)
class ModelConfig:
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    norm_eps: float
    tied_embeddings: bool
    qkv_bias: bool           # Qwen2
    qk_norm: bool            # Qwen3
    rope_theta: float
    rope_scaling: dict | None  # Llama 3; None: plain rotary embedding
    context: int             # tokens, prompt and completion together


def read_config(hf_config) -> ModelConfig:
    """A transformers config -> ours. Raises ValueError for whatever this file would compute wrongly."""
    family = hf_config.model_type
    if family not in FAMILIES:
        raise ValueError(f"got a config of architecture {family!r}, expected one of {', '.join(FAMILIES)}")
    rope = dict(hf_config.rope_parameters)
    if rope["rope_type"] not in ("default", "llama3"):
        raise ValueError(f"got rope_type {rope['rope_type']!r}, expected default or llama3; "
                         "use a checkpoint without it")
    if getattr(hf_config, "original_max_position_embeddings", None):  # where it stands twice, this one counts
        rope["original_max_position_embeddings"] = hf_config.original_max_position_embeddings
    for name, expected in (("hidden_act", "silu"), ("mlp_bias", False), ("use_sliding_window", False),
                           ("attention_bias", False), ("is_causal", True)):
        if name == "attention_bias" and family == "qwen2":
            continue  # it always has biases
        if getattr(hf_config, name, expected) != expected:
            raise ValueError(f"got {name}={getattr(hf_config, name)!r} in a {family} config, expected {expected!r}")
    heads, kv_heads = hf_config.num_attention_heads, hf_config.num_key_value_heads
    sizes = (hf_config.vocab_size, hf_config.hidden_size, hf_config.num_hidden_layers, hf_config.intermediate_size, heads,
             kv_heads, hf_config.max_position_embeddings)
    if min(sizes) < 1 or heads % kv_heads or hf_config.max_position_embeddings > LONGEST:
        raise ValueError(f"got vocab_size, hidden_size, num_hidden_layers, intermediate_size, num_attention_heads, "
                         f"num_key_value_heads, max_position_embeddings of {sizes}, expected at least 1 each, heads that "
                         f"the key/value heads divide, and at most {LONGEST:,} positions")
    if not all(isinstance(value, (int, float)) for name, value in rope.items() if name != "rope_type"):
        raise ValueError(f"got rope parameters {rope}, expected numbers")
    return ModelConfig(
        vocab_size=hf_config.vocab_size, hidden_size=hf_config.hidden_size, num_layers=hf_config.num_hidden_layers,
        num_heads=hf_config.num_attention_heads, num_kv_heads=hf_config.num_key_value_heads,
        head_dim=getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads,
        intermediate_size=hf_config.intermediate_size, norm_eps=hf_config.rms_norm_eps,
        tied_embeddings=hf_config.tie_word_embeddings, qkv_bias=family == "qwen2", qk_norm=family == "qwen3",
        rope_theta=rope["rope_theta"], rope_scaling=rope if rope["rope_type"] == "llama3" else None,
        context=hf_config.max_position_embeddings)


# ------------------------------------------------------------------------------------------------------------ the cache
class KVCache:
    """Keys and values of the tokens read so far, so that a new token costs one column of attention and not a whole pass.

    Every layer, B rows, S columns. All rows write into the same column, whatever their lengths.

    Rows of different age share one cursor: the caller's mask says which columns belong to a row, and positions are the
    caller's too, so a row may begin at any column. Then appending a token is one slice copy, and attention reads one
    contiguous window."""

    def __init__(self, config, rows: int, columns: int, *, device=None, dtype=torch.float32):
        shape = (config.num_layers, rows, config.num_kv_heads, columns, config.head_dim)  # (L, B, K, S, E)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.begin = 0  # first column that any row uses
        self.end = 0    # the cursor: the next column to write
        self.cursor = torch.zeros(1, dtype=torch.long, device=device)  # the same number on the device

    def append(self, layer: int, keys, values):
        """Writes (B, K, T, E) at the cursor and returns the window (B, K, W, E) of all columns in use."""
        stop = self.end + keys.shape[2]
        self.keys[layer, :, :, self.end:stop] = keys
        self.values[layer, :, :, self.end:stop] = values
        return self.keys[layer, :, :, self.begin:stop], self.values[layer, :, :, self.begin:stop]

    @property
    def stop(self) -> int:
        """The end of the window that a single new token sees."""
        return self.end + 1

    def advance(self, columns: int) -> None:
        """Moves the cursor, once all layers have appended."""
        self.move_cursor(self.end + columns)

    def move_cursor(self, column: int) -> None:
        self.end = column
        self.cursor.fill_(column)

    def shrink(self, rows: int, holes: list[int], movers: list[int]) -> None:
        """Forgets all but the first `rows` rows, after rows `movers` were copied into rows `holes`. In place."""
        window = slice(self.begin, self.end)
        for tensor in (*self.keys, *self.values):  # (B, K, S, E)
            tensor[holes, :, window] = tensor[movers, :, window]
        self.keys, self.values = self.keys[:, :rows], self.values[:, :rows]

    def shift_left(self, columns: int) -> None:
        """Moves everything in use this many columns to the left, to make room at the right end. A layer at a time, so
        that there is never a second cache."""
        for tensor in (*self.keys, *self.values):
            tensor[:, :, :self.end - columns] = tensor[:, :, columns:self.end].clone()
        self.begin -= columns
        self.move_cursor(self.end - columns)


# ---------------------------------------------------------------------------------------------------------- the decoder
class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension, in fp32 whatever the input's dtype."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps
        self.floor = torch.tensor((size * eps) ** 0.5, device="cpu")

    def forward(self, x):
        if x.is_cpu and x.dtype == torch.float32 and not torch.is_grad_enabled():
            # the same, x sqrt(D) / sqrt(|x|^2 + D eps), in half as many kernels: a decoding step waits for those
            norm = torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), self.floor)
            return x / norm * (self.weight * x.shape[-1] ** 0.5)
        return self.weight * F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)


class Linear(nn.Linear):
    """x W^T + bias."""

    def forward(self, x):
        rows, wide = x.numel() // x.shape[-1], self.out_features > self.in_features
        if rows <= (8 if wide else 4) and self.weight.numel() > 2 ** 18 and x.is_cpu and not torch.is_grad_enabled():
            # a CPU reads a large matrix 2 to 6 times faster for W X^T than for X W^T if X has 2 to 8 rows, or 1 doubled
            columns = x.reshape(rows, -1).repeat(1 + (rows == 1), 1).t()  # (in, rows)
            y = torch.mm(self.weight, columns).t()[:rows].reshape(*x.shape[:-1], self.out_features)
            return y if self.bias is None else y + self.bias
        return super().forward(x)


def rotary_tables(config: ModelConfig, device=None) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of position * frequency, (context, E) each, in fp32; the first half of sin is negated for rotate().

    Frequency i is theta^(-2i/E) (RoFormer, arXiv 2104.09864). Llama 3 scales it: long wavelengths are slowed down by
    `factor`, short ones stay, those between are blended linearly."""
    exponents = -torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim  # (E/2,)
    frequencies = config.rope_theta ** exponents  # (E/2,)
    if config.rope_scaling:
        factor, low, high = (config.rope_scaling[key] for key in ("factor", "low_freq_factor", "high_freq_factor"))
        old_context = config.rope_scaling["original_max_position_embeddings"]
        turns = old_context * frequencies / (2 * math.pi)  # within the old context
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # 0: fewer than `low` turns, slow down; 1: over `high`, keep
        frequencies = keep * frequencies + (1 - keep) * frequencies / factor
    positions = torch.arange(config.context, dtype=torch.float32, device=device)
    angles = torch.outer(positions, frequencies)  # (context, E/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x, cos, sin):
    """Rotates the pairs (x[i], x[i + E/2]) of every head by the position's angles: x[i] cos - x[i + E/2] sin, and
    x[i + E/2] cos + x[i] sin. All shapes (B, T, heads, E); rolling by E/2 swaps the halves, and sin has their signs."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, width, bias=config.qkv_bias)
        self.k_proj = Linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.v_proj = Linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.o_proj = Linear(width, config.hidden_size, bias=False)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def forward(self, x, cos, sin, layer: int, cache: KVCache | None, mask):
        (B, T, _), config = x.shape, self.config
        q, k, v = (project(x).view(B, T, -1, config.head_dim) for project in (self.q_proj, self.k_proj, self.v_proj))
        if config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        qk = rotate(torch.cat([q, k], dim=2), cos, sin)  # (B, T, H+K, E): both in one go, half the kernels
        q, k = (part.transpose(1, 2) for part in qk.split([config.num_heads, config.num_kv_heads], dim=2))
        v = v.transpose(1, 2)
        if cache is not None:
            k, v = cache.append(layer, k, v)  # (B, K, W, E)
        if T == 1:
            # one new token: the H/K heads that share keys become queries on the same keys, which are read only once
            q = q.reshape(B, config.num_kv_heads, -1, config.head_dim)  # (B, K, H/K, E)
        if T == 1 and mask is not None and q.is_cpu:  # here the fused kernel is slower than two matrix products
            scores = (q @ k.transpose(-1, -2)).mul_(config.head_dim ** -0.5).add_(mask)  # (B, K, H/K, W)
            attended = scores.softmax(-1) @ v  # (B, K, H/K, E)
        else:
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                                      enable_gqa=q.shape[1] != k.shape[1])
        if T > 1:
            attended = attended.transpose(1, 2)  # (B, T, H, E)
        return self.o_proj(attended.reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, layer, cache, mask):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, layer, cache, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Model(nn.Module):
    """input_ids (B, T) -> logits (B, T, V). `hf_config` is kept so that a checkpoint says what was read."""

    def __init__(self, hf_config):
        super().__init__()
        self.hf_config, self.config = hf_config, read_config(hf_config)
        self.source, self.generation_config = "random weights", {}  # where the checkpoint came from, and what it said
        self.activation_checkpointing = False  # keep each block's input only, compute the rest again in the backward pass
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(self.config.vocab_size, self.config.hidden_size),
            "layers": nn.ModuleList(Block(self.config) for _ in range(self.config.num_layers)),
            "norm": RMSNorm(self.config.hidden_size, self.config.norm_eps)})
        self.lm_head = Linear(self.config.hidden_size, self.config.vocab_size, bias=False)
        if self.config.tied_embeddings:
            self.lm_head.weight = self.model["embed_tokens"].weight
        cos, sin = rotary_tables(self.config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def hidden(self, input_ids, *, positions=None, cache: KVCache | None = None, mask=None):
        """input_ids (B, T) -> the last layer's normed state (B, T, D).

        Without a cache: plain causal attention from position 0. Right-padded rows need no mask, since no token sees
        what follows it. With a cache: the tokens go to its cursor, `positions` (B, T) are theirs, and `mask`, additive
        and broadcastable to (B, K, T, W), is 0 where a query may look and -inf elsewhere, over the columns begin..end
        of the cache."""
        if cache is not None and cache.end and mask is None:
            raise ValueError("got a cache that already holds tokens and no mask; expected the mask that says which of "
                             "its columns a row may see")
        if positions is None:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]  # (1, T)
        x = self.model["embed_tokens"](input_ids)  # (B, T, D)
        # written out for every head, once for all layers: elementwise kernels are 3 times faster on it than on a
        # broadcast of short rows
        heads = self.config.num_heads + self.config.num_kv_heads
        cos, sin = (table[positions].unsqueeze(2).repeat(1, 1, heads, 1).to(x.dtype)
                    for table in (self.cos, self.sin))  # (B or 1, T, H+K, E)
        for layer, block in enumerate(self.model["layers"]):
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, layer, cache, mask, use_reentrant=False)
            else:
                x = block(x, cos, sin, layer, cache, mask)
        if cache is not None:
            cache.advance(input_ids.shape[1])
        return self.model["norm"](x)

    def forward(self, input_ids, *, positions=None, cache: KVCache | None = None, mask=None, head=None):
        """-> logits (B, T, V), or what head(lm_head, hidden) makes of the last state, for who needs no full logits."""
        hidden = self.hidden(input_ids, positions=positions, cache=cache, mask=mask)
        return self.lm_head(hidden) if head is None else head(self.lm_head, hidden)


def init_weights(model: Model, seed: int) -> None:
    """Random weights: normal with deviation 0.02, as in Qwen and Llama; projections into the residual stream less."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                scale = (2 * model.config.num_layers) ** -0.5 if residual else 1.0
                parameter.normal_(0, 0.02 * scale, generator=generator)
            elif name.endswith("bias"):
                parameter.zero_()


def set_context(model: Model, context: int) -> None:
    """Room for so many tokens. Rotary positions need no new weights, only rows of training that use them."""
    model.hf_config.max_position_embeddings = context
    model.config = read_config(model.hf_config)
    model.cos, model.sin = (table.to(model.cos.device) for table in rotary_tables(model.config))
