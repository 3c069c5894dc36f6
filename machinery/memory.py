"""What a run needs in memory, estimated from the shapes alone, before a weight is read; and what would make it fit.

    python -m machinery.memory --preset gpu-24gb           # the table of a preset
    python -m machinery.memory --model Qwen/Qwen2.5-3B --dtype bfloat16 --lora-rank 16

The peak is the weights and the optimizer, which are always there, plus the larger of two phases: sampling (the KV
cache) and training (gradients, activations, a chunk of logits).

Letters as in model.py; I is the width inside the MLP, N the parameters.
"""

import ctypes
import dataclasses
import math
import os
from dataclasses import dataclass

import torch

from machinery.batching import LOGITS_AT_ONCE
from machinery.checkpoints import find_directory, read_hf_config
from machinery.distributed import local_size
from machinery.flags import bad_input_exits, parse_config
from machinery.presets import PRESETS
from model import Linear, Model

GIB = 2 ** 30
SPARE = 0.08  # share of the device left to the CUDA context, kernels' workspaces and fragmentation


def estimate(hf_config, config, *, prompt_tokens: int = 256, world_size: int = 1) -> dict[str, float]:
    """Bytes by purpose, on one device, and "host" in host memory. config: Config, or train_countdown.Config, whose fields
    it has."""
    with torch.device("meta"):
        model = Model(hf_config)
    c, size = model.config, 2 if config.dtype == "bfloat16" else 4
    weights = sum(p.numel() for p in model.parameters())
    matrices = [module for module in model.model["layers"].modules() if isinstance(module, Linear)]
    adapters = sum(config.lora_rank * (m.in_features + m.out_features) for m in matrices)
    trained = adapters if config.lora_rank else weights
    own_master = config.dtype == "float32" and not config.offload_optimizer
    state = trained * (8 + (0 if own_master else 4))  # AdamW's two moments, and the fp32 masters

    # what autograd keeps of a layer, a token: two norms (input in fp32, normed, times weight), the rotated q and k, v,
    # what attention makes of them, four widths of the MLP; with norms on q and k, their fp32 inputs and normed values
    rotated = (c.num_heads + c.num_kv_heads) * c.head_dim
    norms = 2 * c.hidden_size * (4 + 2 * size) + (rotated * (4 + size) if c.qk_norm else 0)
    layer = norms + size * (2 * rotated + 4 * c.intermediate_size)
    inputs = size * c.hidden_size
    kept = c.num_layers * inputs + layer if config.activation_checkpointing else c.num_layers * layer
    chunk = min(LOGITS_AT_ONCE, config.micro_batch_tokens * c.vocab_size)

    columns = 1.25 * (prompt_tokens + config.max_new_tokens)
    rows = min(config.slots, config.batch_size)
    column = 2 * c.num_layers * c.num_kv_heads * c.head_dim * size
    shards = world_size if config.fsdp else 1
    parts = {
        "weights": (weights + adapters) * size + (weights * 4 / shards if config.fsdp else 0),
        "reference": weights * size if config.kl_coef and not config.lora_rank else 0,
        "optimizer": 0 if config.offload_optimizer else state / shards,
        "KV cache": rows * columns * column + 4 * rows * c.vocab_size * 4,
        "gradients": 4 * trained / shards,
        "activations": config.micro_batch_tokens * kept,
        "logits": 4 * chunk * 4,  # logits, log_softmax, their gradient, and a temporary
    }
    parts["peak"] = (parts["weights"] + parts["reference"] + parts["optimizer"] + max(
        parts["KV cache"], parts["gradients"] + parts["activations"] + parts["logits"]))
    parts["host"] = (state if config.offload_optimizer else 0) + (weights * size if config.lora_rank else 0)
    if not config.device.startswith("cuda"):
        parts["peak"] += parts["host"]  # it is the same memory
    return parts


def available(device: str) -> float:
    """Bytes of the device that one process may use: of a GPU all, of the machine its share beside torchrun's others."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_properties(device).total_memory * (1 - SPARE)
    return machine_memory() * (1 - SPARE) / local_size()


def machine_memory() -> float:
    """Bytes of RAM, on Linux, macOS and Windows; infinite where nobody says."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf, others not these names
        kilobytes = ctypes.c_ulonglong()
        kernel = getattr(getattr(ctypes, "windll", None), "kernel32", None)
        known = kernel and kernel.GetPhysicallyInstalledSystemMemory(ctypes.byref(kilobytes))
        return kilobytes.value * 1024 if known else math.inf


MEMORY_ONLY = ("micro_batch_tokens", "slots", "activation_checkpointing")  # no other result depends on these
REMEDIES = ({"dtype": "bfloat16"}, {"activation_checkpointing": True}, {"micro_batch_tokens": 4096},
            {"offload_optimizer": True}, {"slots": 64}, {"slots": 16}, {"lora_rank": 16})  # least painful first


def check_fits(config, *, model="", world_size: int = 1) -> None:
    """Raises ValueError with the estimate, and the flags that would make it fit, where the model is too large for the
    device, or what it keeps in host memory for the machine.

    model: the directory that is read, where it is not config.model."""
    hf_config, limit = read_hf_config(find_directory(model or config.model)), available(config.device)
    host = available("cpu") if config.device.startswith("cuda") else math.inf  # on a CPU the peak holds it already
    parts = estimate(hf_config, config, world_size=world_size)
    if parts["host"] > host:
        raise ValueError(f"got {config.model}, which needs about {parts['host'] / GIB:.1f} GiB of host memory, expected at most "
                         f"the {host / GIB:.1f} GiB that each of {local_size()} processes has on this machine; start fewer "
                         "processes, or leave out --offload-optimizer")
    if parts["peak"] <= limit:
        return
    smaller, peak = config, parts["peak"]
    for remedy in 2 * REMEDIES:  # twice: what shrinks the smaller phase helps only once the larger one has shrunk
        if config.resume and not remedy.keys() <= set(MEMORY_ONLY):
            continue  # a resumed run keeps the others
        try:
            candidate = dataclasses.replace(smaller, **remedy)
        except ValueError:  # it does not go with --fsdp or --ref-every
            continue
        needs = estimate(hf_config, candidate, world_size=world_size)
        if needs["peak"] < peak and peak > limit and needs["host"] <= host:
            smaller, peak = candidate, needs["peak"]
    changed = {name: value for name, value in dataclasses.asdict(smaller).items() if value != getattr(config, name)}
    flags = " ".join(f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
                     for name, value in changed.items())
    advice = f"with {flags} it needs about {peak / GIB:.1f} GiB" if peak <= limit else (
        f"even with {flags or 'all flags that save memory'} it needs about {peak / GIB:.1f} GiB; use a smaller model, "
        "or --fsdp on more GPUs")
    raise ValueError(f"got {config.model}, which needs about {parts['peak'] / GIB:.1f} GiB ({describe(parts)}), "
                     f"expected at most the {limit / GIB:.1f} GiB that {config.device} has to give; {advice}")


def describe(parts: dict[str, float]) -> str:
    return ", ".join(f"{name} {value / GIB:.1f}" for name, value in parts.items()
                     if name != "peak" and value > GIB / 20)


@dataclass(frozen=True)
class Config:
    """The fields of train_countdown.Config that memory depends on, with its defaults."""
    model: str = "models/tiny-base"  # checkpoint directory or hub id; only its config is read
    batch_size: int = 256            # completions per step
    max_new_tokens: int = 1024       # longest completion
    kl_coef: float = 0.0             # above 0: a reference model is kept beside the policy
    lora_rank: int = 0               # adapters of this rank are trained, 0: all weights
    micro_batch_tokens: int = 2048   # tokens per training pass
    slots: int = 256                 # rows that decode at the same time
    dtype: str = "float32"           # float32, or bfloat16 with fp32 master weights
    activation_checkpointing: bool = False  # keep a block's input only
    offload_optimizer: bool = False  # master weights and AdamW's moments in host memory
    fsdp: bool = False               # split over the GPUs; the estimate is for one
    device: str = "cpu"              # cpu or cuda


def main() -> None:
    names = {field.name for field in dataclasses.fields(Config)}
    presets = {preset: {name: value for name, value in values.items() if name in names}
               for preset, values in PRESETS.items()}
    config = parse_config(Config, __doc__, presets=presets)
    with bad_input_exits():
        parts = estimate(read_hf_config(find_directory(config.model)), config)
    for name, value in parts.items():
        print(f"{name:>12} {value / GIB:8.2f} GiB")


if __name__ == "__main__":
    main()
