"""A Qwen-class decoder in one file: RMSNorm, rotary embedding, grouped-query attention with a KV cache, SwiGLU.

Reads and writes Hugging Face directories of Qwen2/Qwen2.5 (biases on q, k, v), Qwen3 (norms on q and k) and Llama (rope
scaling): what save() writes, AutoModelForCausalLM loads, with equal logits. Parameters carry the names of those
checkpoints, so that a state dict needs no translation.

Shapes: B sequences, T tokens, V vocabulary, D width, L layers, H query heads, K key/value heads, E head dimension, S
columns of the cache, W of them in use.
"""

import copy
import math
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from directories import check_device, find_directory, read_directory, replace_directory
from kv_cache import KVCache

FAMILIES = ("qwen2", "qwen3", "llama")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


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
    for name, expected in (("hidden_act", "silu"), ("mlp_bias", False), ("use_sliding_window", False),
                           ("attention_bias", family == "qwen2")):
        if getattr(hf_config, name, expected) != expected:
            raise ValueError(f"got {name}={getattr(hf_config, name)!r} in a {family} config, expected {expected!r}")
    return ModelConfig(
        vocab_size=hf_config.vocab_size, hidden_size=hf_config.hidden_size, num_layers=hf_config.num_hidden_layers,
        num_heads=hf_config.num_attention_heads, num_kv_heads=hf_config.num_key_value_heads,
        head_dim=getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads,
        intermediate_size=hf_config.intermediate_size, norm_eps=hf_config.rms_norm_eps,
        tied_embeddings=hf_config.tie_word_embeddings, qkv_bias=family == "qwen2", qk_norm=family == "qwen3",
        rope_theta=rope["rope_theta"], rope_scaling=rope if rope["rope_type"] == "llama3" else None,
        context=hf_config.max_position_embeddings)


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
    """x W^T + bias; with an adapter on top, + scale * (x A^T) B^T (LoRA, arXiv 2106.09685, equation 3)."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.lora_a = self.lora_b = None

    def forward(self, x):
        rows, wide = x.numel() // x.shape[-1], self.out_features > self.in_features
        if rows <= (8 if wide else 4) and self.weight.numel() > 2 ** 18 and x.is_cpu and not torch.is_grad_enabled():
            # a CPU reads a large matrix 2 to 6 times faster for W X^T than for X W^T if X has 2 to 8 rows, or 1 doubled
            columns = x.reshape(rows, -1).repeat(1 + (rows == 1), 1).t()  # (in, rows)
            y = torch.mm(self.weight, columns).t()[:rows].reshape(*x.shape[:-1], self.out_features)
            y = y if self.bias is None else y + self.bias
        else:
            y = super().forward(x)
        if self.lora_a is None or not self.adapted:
            return y
        return y + F.linear(F.linear(x, self.lora_a), self.lora_b) * self.scale


def rotary_tables(config: ModelConfig, device=None) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of position * frequency, (context, E) each, in fp32; the first half of sin is negated for rotate().

    Frequency i is theta^(-2i/E) (RoFormer, arXiv 2104.09864). Llama 3 scales it: long wavelengths are slowed down by
    `factor`, short ones stay, those between are blended linearly.
    """
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
    x[i + E/2] cos + x[i] sin. All shapes (B, T, heads, E); rolling by E/2 swaps the halves, and sin has their signs.
    """
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
    """input_ids (B, T) -> logits (B, T, V). `hf_config` is kept so that save() writes back what was read."""

    def __init__(self, hf_config):
        super().__init__()
        self.hf_config, self.config = hf_config, read_config(hf_config)
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
        of the cache.
        """
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


# ----------------------------------------------------------------------------------------------------------------- LoRA


def add_lora(model: Model, rank: int, alpha: float, seed: int) -> None:
    """Freezes the model and puts an adapter on every matrix of its blocks: W + alpha / rank * B A, with A (rank, in)
    and B (out, rank). A is random and B zero, so that training starts from the frozen model.

    A matrix of 2,048 x 11,008 trains 13,056 numbers per unit of rank, instead of 22.5 million.
    """
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    for module in lora_layers(model):
        a = torch.randn(rank, module.in_features, generator=generator) * module.in_features ** -0.5
        module.lora_a = nn.Parameter(a.to(module.weight))
        module.lora_b = nn.Parameter(module.weight.new_zeros(module.out_features, rank))
        module.scale, module.adapted = alpha / rank, True


def lora_layers(model: Model) -> list[Linear]:
    return [module for module in model.model["layers"].modules() if isinstance(module, Linear)]


@contextmanager
def merged(model: Model):
    """Inside, W + scale * B A stands in W's place: sampling costs nothing extra, and save() writes a plain checkpoint.

    Rounding makes "add, then subtract" inexact, so the frozen weights are put back from a copy in host memory. In bf16
    the sum itself is rounded, and what is less than half a step of W is lost: sampler and trainer differ by that, and
    logprob_gap says how much. A model without adapters is left as it is.
    """
    layers = [module for module in lora_layers(model) if module.lora_a is not None]
    with torch.no_grad():
        for module in layers:
            if not hasattr(module, "frozen"):
                module.frozen = module.weight.to("cpu", copy=True)  # once: these weights never change
            module.weight += module.scale * (module.lora_b.float() @ module.lora_a.float())
            module.adapted = False
    try:
        yield
    finally:
        with torch.no_grad():
            for module in layers:
                module.weight.copy_(module.frozen)
                module.adapted = True


@contextmanager
def without_lora(model: Model):
    """Inside, the model is the frozen one: the KL's reference, without a second copy."""
    for module in lora_layers(model):
        module.adapted = False
    try:
        yield
    finally:
        for module in lora_layers(model):
            module.adapted = True


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


# ---------------------------------------------------------------------------------------------------------- directories


def load(path_or_id, *, dtype=torch.float32, device="cpu"):
    """A Hugging Face directory or hub id -> (model, tokenizer).

    Weights may be one model.safetensors or several shards with an index. A hub id is downloaded (or found in the cache)
    by transformers. Raises ValueError or FileNotFoundError with a line that says what to mend.
    """
    check_device(device)
    directory = find_directory(path_or_id)
    hf_config, tokenizer, state = read_directory(directory, FAMILIES)
    with torch.device("meta"):
        model = Model(hf_config)
    if model.config.tied_embeddings:
        state.setdefault("lm_head.weight", state.get("model.embed_tokens.weight"))
    expected = set(model.state_dict())
    if state.keys() != expected:
        raise ValueError(f"got weights in {directory} that do not fit its config: "
                         f"missing {sorted(expected - state.keys())[:3]}, "
                         f"unexpected {sorted(state.keys() - expected)[:3]}")
    for name, parameter in model.state_dict().items():
        if state[name].shape != parameter.shape:
            raise ValueError(f"got {name} of shape {tuple(state[name].shape)} in {directory}, "
                             f"expected {tuple(parameter.shape)} by its config")
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()}, assign=True)
    if model.config.tied_embeddings:
        model.lm_head.weight = model.model["embed_tokens"].weight
    model.cos, model.sin = rotary_tables(model.config)  # buffers are computed, not stored
    return model.to(device), tokenizer


def check_dtype(name: str) -> None:
    if name not in DTYPES:
        raise ValueError(f"got dtype {name!r}, expected one of {', '.join(DTYPES)}")


def end_tokens(model: Model, tokenizer) -> set[int]:
    """The token ids that end a completion: the tokenizer's EOS and those of the config (chat models name several)."""
    from_config = getattr(model.hf_config, "eos_token_id", None)
    return {tokenizer.eos_token_id, *(from_config if isinstance(from_config, list) else [from_config])} - {None}


def set_context(model: Model, context: int) -> None:
    """Room for so many tokens. Rotary positions need no new weights, only rows of training that use them."""
    model.hf_config.max_position_embeddings = context
    model.config = read_config(model.hf_config)
    model.cos, model.sin = (table.to(model.cos.device) for table in rotary_tables(model.config))


def save(model: Model, tokenizer, directory, state: dict | None = None) -> None:
    """Writes a Hugging Face directory, built beside its place and moved there whole: a kill leaves no half model.

    state: the state dict to write, where the model's own tensors are split over processes.
    """
    from safetensors.torch import save_file

    directory = Path(directory)
    staging = directory.with_name(directory.name + ".tmp")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    hf_config = copy.deepcopy(model.hf_config)
    hf_config.dtype = model.lm_head.weight.dtype  # else a checkpoint read as bf16 and trained in fp32 is rounded again
    hf_config.save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in (state or model.state_dict()).items()
             if "lora_" not in name}
    if model.config.tied_embeddings:
        state.pop("lm_head.weight", None)
    save_file(state, staging / "model.safetensors", metadata={"format": "pt"})
    replace_directory(staging, directory)
