"""Checkpoints on disk and on the hub: found, checked, read, written, replaced.

A checkpoint is a Hugging Face directory. What save() writes, AutoModelForCausalLM loads, and the other way round.
"""

import copy
import errno
import json
import os
import shutil
from pathlib import Path

import torch

from model import FAMILIES, Model, rotary_tables

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load(path_or_id, *, dtype=torch.float32, device="cpu"):
    """A Hugging Face directory or hub id -> (model, tokenizer).

    Weights may be one model.safetensors or several shards with an index. A hub id is downloaded (or found in the cache)
    by transformers. Raises ValueError or FileNotFoundError with a line that says what to mend."""
    check_device(device)
    directory = find_directory(path_or_id)
    hf_config, tokenizer, state = read_directory(directory)
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


def save(model: Model, tokenizer, directory, state: dict | None = None) -> None:
    """Writes a Hugging Face directory, built beside its place and moved there whole: a kill leaves no half model.

    state: the state dict to write, where the model's own tensors are split over processes."""
    from safetensors import SafetensorError
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
    try:
        save_file(state, staging / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:  # it has no errno
        raise OSError(errno.ENOSPC if "No space left" in str(error) else errno.EIO, str(error)) from None
    replace_directory(staging, directory)


def end_tokens(model: Model, tokenizer) -> set[int]:
    """The token ids that end a completion: the tokenizer's EOS and those of the config (chat models name several)."""
    from_config = getattr(model.hf_config, "eos_token_id", None)
    return {tokenizer.eos_token_id, *(from_config if isinstance(from_config, list) else [from_config])} - {None}


def check_dtype(name: str) -> None:
    if name not in DTYPES:
        raise ValueError(f"got dtype {name!r}, expected one of {', '.join(DTYPES)}")


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


def read_hf_config(directory: Path):
    """The directory's transformers config, once everything that it should hold is there; no weight is read."""
    from transformers import AutoConfig

    for name in ("config.json", "tokenizer.json"):
        if not (directory / name).exists():
            raise FileNotFoundError(f"got model directory {directory} without {name}; expected config.json, "
                                    "tokenizer.json and model.safetensors, as save_pretrained writes them")
        try:
            json.loads((directory / name).read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"got a corrupt or truncated {directory / name} ({error}); copy it again") from None
    for shard in shards(directory):
        if not (directory / shard).exists():
            raise FileNotFoundError(f"got model directory {directory} without {shard}; expected the weights as "
                                    "safetensors, in one file or in every shard that "
                                    "model.safetensors.index.json names")
    architecture = json.loads((directory / "config.json").read_text()).get("model_type")
    if architecture not in FAMILIES:  # said before transformers complains about one that it does not know either
        raise ValueError(f"got a config of architecture {architecture!r} in {directory}, "
                         f"expected one of {', '.join(FAMILIES)}")
    return AutoConfig.from_pretrained(directory)


def shards(directory: Path) -> list[str]:
    """The names of the weight files."""
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        return ["model.safetensors"]
    return sorted(set(json.loads(index.read_text())["weight_map"].values()))


def read_directory(directory: Path):
    """-> (transformers config, tokenizer, state dict), or a ValueError or FileNotFoundError that says what to mend."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    hf_config = read_hf_config(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"got a tokenizer without an EOS token in {directory}; completions could never end. "
                         "Set eos_token in tokenizer_config.json")
    state = {}
    for shard in shards(directory):
        try:
            state |= load_file(directory / shard)
        except SafetensorError as error:
            raise ValueError(f"got a corrupt or truncated weights file {directory / shard} ({error}); "
                             "copy it again") from None
    return hf_config, tokenizer, state


def replace_directory(staging: Path, directory: Path) -> None:
    """Puts staging in directory's place; at every moment the old or the new one is there whole, as NAME or NAME.old."""
    old = directory.with_name(directory.name + ".old")
    if directory.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(directory, old)
    os.rename(staging, directory)
    shutil.rmtree(old, ignore_errors=True)
