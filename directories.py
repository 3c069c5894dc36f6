"""Model directories, on disk and on the hub: found, checked, read, replaced. model.py makes models of their content."""

import json
import os
import shutil
from pathlib import Path

import torch


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


def read_hf_config(directory: Path, families: tuple[str, ...]):
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
    if architecture not in families:  # said before transformers complains about one that it does not know either
        raise ValueError(f"got a config of architecture {architecture!r} in {directory}, "
                         f"expected one of {', '.join(families)}")
    return AutoConfig.from_pretrained(directory)


def shards(directory: Path) -> list[str]:
    """The names of the weight files."""
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        return ["model.safetensors"]
    return sorted(set(json.loads(index.read_text())["weight_map"].values()))


def read_directory(directory: Path, families: tuple[str, ...]):
    """-> (transformers config, tokenizer, state dict), or a ValueError or FileNotFoundError that says what to mend."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    hf_config = read_hf_config(directory, families)
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
