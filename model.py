"""A Qwen-class decoder in one file: RMSNorm, rotary embedding, grouped-query attention with a KV cache, SwiGLU.

Reads and writes Hugging Face directories of Qwen2/Qwen2.5 (biases on q, k, v), Qwen3 (norms on q and k) and Llama (rope
scaling): what save() writes, AutoModelForCausalLM loads, with equal logits. Parameters carry the names of those
checkpoints, so that a state dict needs no translation.

Shapes: B sequences, T tokens, V vocabulary, D width, L layers, H query heads, K key/value heads, E head dimension, S
columns of the cache, W of them in use.
"""

import copy
import json
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

FAMILIES = ("qwen2", "qwen3", "llama")


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

    def forward(self, x):
        return self.weight * F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)


def rotary_tables(config: ModelConfig, device=None) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of position * frequency, (context, E) each, in fp32.

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
    angles = torch.cat([angles, angles], dim=-1)  # (context, E)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Rotates the pairs (x[i], x[i + E/2]) of every head by the position's angles.

    x (B, T, H or K, E); cos, sin (B or 1, T, H, E), the same for every head.
    """
    heads = x.shape[2]
    left, right = x.chunk(2, dim=-1)
    return x * cos[:, :, :heads] + torch.cat([-right, left], dim=-1) * sin[:, :, :heads]


class KVCache:
    """Keys and values of every layer, B rows, S columns. All rows write into the same column, whatever their lengths.

    Rows of different age share one cursor: the caller's mask says which columns belong to a row, and positions are the
    caller's too, so a row may begin at any column. Then appending a token is one slice copy, and attention reads one
    contiguous window.
    """

    def __init__(self, config: ModelConfig, rows: int, columns: int, *, device=None, dtype=torch.float32):
        shape = (config.num_layers, rows, config.num_kv_heads, columns, config.head_dim)  # (L, B, K, S, E)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.begin = 0  # first column that any row uses
        self.end = 0    # the cursor: the next column to write

    def append(self, layer: int, keys, values):
        """Writes (B, K, T, E) at the cursor and returns the window (B, K, W, E) of all columns in use.

        hidden() moves the cursor, once for all layers.
        """
        stop = self.end + keys.shape[2]
        self.keys[layer, :, :, self.end:stop] = keys
        self.values[layer, :, :, self.end:stop] = values
        return self.keys[layer, :, :, self.begin:stop], self.values[layer, :, :, self.begin:stop]

    def keep_rows(self, rows) -> None:
        """Moves these rows together and forgets the others. In place, a layer at a time: never holds a second cache."""
        window = slice(self.begin, self.end)
        for tensor in (*self.keys, *self.values):  # (B, K, S, E)
            tensor[:len(rows), :, window] = tensor[rows, :, window]
        self.keys, self.values = self.keys[:, :len(rows)], self.values[:, :len(rows)]

    def shift_left(self, columns: int) -> None:
        """Moves everything in use this many columns to the left, to make room at the right end."""
        for tensor in (*self.keys, *self.values):
            tensor[:, :, :self.end - columns] = tensor[:, :, columns:self.end].clone()
        self.begin, self.end = self.begin - columns, self.end - columns


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def forward(self, x, cos, sin, layer: int, cache: KVCache | None, mask):
        B, T, _ = x.shape
        heads = (B, T, -1, self.config.head_dim)
        q, k, v = (project(x).view(heads) for project in (self.q_proj, self.k_proj, self.v_proj))  # (B, T, H or K, E)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin).transpose(1, 2), rotate(k, cos, sin).transpose(1, 2)  # (B, H, T, E), (B, K, T, E)
        v = v.transpose(1, 2)
        if cache is not None:
            k, v = cache.append(layer, k, v)  # (B, K, W, E)
        if T == 1 and mask is not None:
            # one new token: the H/K heads that share keys become queries on the same keys, which are read only once
            q = q.view(B, self.config.num_kv_heads, -1, self.config.head_dim)  # (B, K, H/K, E)
            scores = q @ k.transpose(-1, -2) * self.config.head_dim ** -0.5 + mask  # (B, K, H/K, W)
            attended = (scores.softmax(-1) @ v).view(B, 1, -1)  # (B, 1, H*E)
        else:
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                                      enable_gqa=self.config.num_heads != self.config.num_kv_heads)
            attended = attended.transpose(1, 2).reshape(B, T, -1)
        return self.o_proj(attended)


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

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
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(self.config.vocab_size, self.config.hidden_size),
            "layers": nn.ModuleList(Block(self.config) for _ in range(self.config.num_layers)),
            "norm": RMSNorm(self.config.hidden_size, self.config.norm_eps)})
        self.lm_head = nn.Linear(self.config.hidden_size, self.config.vocab_size, bias=False)
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
        cos, sin = (table[positions].unsqueeze(2).repeat(1, 1, self.config.num_heads, 1).to(x.dtype)
                    for table in (self.cos, self.sin))  # (B or 1, T, H, E)
        for layer, block in enumerate(self.model["layers"]):
            x = block(x, cos, sin, layer, cache, mask)
        if cache is not None:
            cache.end += input_ids.shape[1]
        return self.model["norm"](x)

    def forward(self, input_ids, *, positions=None, cache: KVCache | None = None, mask=None):
        return self.lm_head(self.hidden(input_ids, positions=positions, cache=cache, mask=mask))


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
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoTokenizer

    check_device(device)
    directory = find_directory(path_or_id)
    for name in ("config.json", "tokenizer.json"):
        if not (directory / name).exists():
            raise FileNotFoundError(f"got model directory {directory} without {name}; expected config.json, "
                                    "tokenizer.json and model.safetensors, as save_pretrained writes them")
        try:
            json.loads((directory / name).read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"got a corrupt or truncated {directory / name} ({error}); copy it again") from None
    index, shards = directory / "model.safetensors.index.json", ["model.safetensors"]
    if index.exists():
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    for shard in shards:
        if not (directory / shard).exists():
            raise FileNotFoundError(f"got model directory {directory} without {shard}; expected the weights as "
                                    "safetensors, in one file or in every shard that "
                                    "model.safetensors.index.json names")
    architecture = json.loads((directory / "config.json").read_text()).get("model_type")
    if architecture not in FAMILIES:  # said before transformers complains about one that it does not know either
        raise ValueError(f"got a config of architecture {architecture!r} in {directory}, "
                         f"expected one of {', '.join(FAMILIES)}")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"got a tokenizer without an EOS token in {directory}; completions could never end. "
                         "Set eos_token in tokenizer_config.json")
    with torch.device("meta"):
        model = Model(AutoConfig.from_pretrained(directory))
    state = {}
    for shard in shards:
        try:
            state |= load_file(directory / shard)
        except SafetensorError as error:
            raise ValueError(f"got a corrupt or truncated weights file {directory / shard} ({error}); "
                             "copy it again") from None
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


def check_device(device) -> None:
    if str(device).startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"got device {device!r}, but this PyTorch sees no CUDA GPU; use --device cpu")


def find_directory(path_or_id) -> Path:
    directory = Path(path_or_id)
    if directory.is_dir():
        return directory
    if str(path_or_id).count("/") != 1 or str(path_or_id).startswith((".", "/", "models/", "runs/")):
        raise FileNotFoundError(f"got model {str(path_or_id)!r}, which is no directory here and "
                                "no hub id like Qwen/Qwen2.5-1.5B")
    from huggingface_hub import snapshot_download  # comes with transformers
    try:
        patterns = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]
        return Path(snapshot_download(str(path_or_id), allow_patterns=patterns))
    except Exception as error:  # the hub raises a dozen kinds; all of them mean: not here and not to be had
        raise FileNotFoundError(f"got model {str(path_or_id)!r}, which is no directory here and could not be fetched "
                                f"from the hub ({type(error).__name__}); check the name and the network, or download "
                                "it elsewhere and pass its directory") from None


def end_tokens(model: Model, tokenizer) -> set[int]:
    """The token ids that end a completion: the tokenizer's EOS and those of the config (chat models name several)."""
    from_config = getattr(model.hf_config, "eos_token_id", None)
    return {tokenizer.eos_token_id, *(from_config if isinstance(from_config, list) else [from_config])} - {None}


def save(model: Model, tokenizer, directory) -> None:
    """Writes a Hugging Face directory, built beside its place and moved there whole: a kill leaves no half model."""
    from safetensors.torch import save_file

    directory = Path(directory)
    staging = directory.with_name(directory.name + ".tmp")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    hf_config = copy.deepcopy(model.hf_config)
    hf_config.dtype = model.lm_head.weight.dtype  # else a checkpoint read as bf16 and trained in fp32 is rounded again
    hf_config.save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tied_embeddings:
        del state["lm_head.weight"]
    save_file(state, staging / "model.safetensors", metadata={"format": "pt"})
    replace_directory(staging, directory)


def replace_directory(staging: Path, directory: Path) -> None:
    """Puts staging in directory's place; at every moment the old or the new one is there whole, as NAME or NAME.old."""
    old = directory.with_name(directory.name + ".old")
    if directory.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(directory, old)
    os.rename(staging, directory)
    shutil.rmtree(old, ignore_errors=True)
