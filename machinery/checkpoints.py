"""Checkpoints on disk and on the hub: found, checked, read, written, replaced.

A checkpoint is a Hugging Face directory. What save() writes, AutoModelForCausalLM loads, and the other way round: its
logits, token ids and end tokens are those of transformers, or load() says in one line why not. docs/your-own.md lists
what was tried and what is refused.
"""

import copy
import errno
import json
import os
import shutil
import time
from functools import lru_cache
from pathlib import Path

import torch

from machinery.data import READ, beside_scripts, short
from machinery.notes import note
from machinery.text import read_tokenizer
from model import FAMILIES, Model, rotary_tables

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SLOW = 3  # times: bf16 halves memory, and whoever needs that may pay as much
RESAVED = ("transformers' AutoModelForCausalLM.from_pretrained({0}).save_pretrained(OUT), and the same of AutoTokenizer, "
           "write what is read here")
OTHER_FORMATS = {  # files in place of model.safetensors: what they are, and what to do
    "*.gguf": ("a GGUF file, quantised for llama.cpp", RESAVED.format("DIR, gguf_file=NAME")),
    "pytorch_model*.bin": ("an unsafe .bin (a pickle, which can run any code when it is read)",
                           f"if you trust its maker, {RESAVED.format('DIR')}"),
    "*.pth": ("a .pth as the model's maker trained it", "fetch the version for transformers, on the hub often named -hf"),
    "*.msgpack": ("Flax weights", "fetch the safetensors of the same model"),
    "*.h5": ("TensorFlow weights", "fetch the safetensors of the same model"),
    "*.onnx": ("an ONNX file", "fetch the safetensors of the same model"),
    "*.npz": ("MLX weights", "fetch the safetensors of the same model"),
    "global_step*": ("a DeepSpeed checkpoint", "zero_to_fp32.py in the same folder and save_pretrained put it together"),
    "*.distcp": ("an FSDP checkpoint in shards", "accelerate merge-weights puts it together"),
    "*.pt": ("a PyTorch file", "load it in the program that wrote it, and save_pretrained from there"),
}
WRAPPERS = {"_orig_mod.": "torch.compile", "module.": "DistributedDataParallel", "base_model.": "PEFT"}


class BrokenWeights(ValueError):
    """A model that gives numbers which are not finite."""


# ------------------------------------------------------------------------------------------------------- read and write
def load(path_or_id, *, dtype=torch.float32, device="cpu"):
    """A Hugging Face directory or hub id -> (model, tokenizer).

    Weights may be one model.safetensors or several shards with an index. A hub id is downloaded (or found in the cache)
    by transformers. Raises ValueError or FileNotFoundError with a line that says what to mend."""
    check_device(device)
    if str(device).startswith("cuda:"):
        torch.cuda.set_device(device)  # CUDA graphs and streams are of the current one
    if dtype == torch.bfloat16 and str(device) == "cpu" and (times := slower_in_bf16()) > SLOW:
        note(f"this CPU computes bfloat16 {times:.0f} times slower than float32 (measured just now): take --dtype float32, "
             "unless memory is what it lacks")
    directory = find_directory(path_or_id)
    hf_config, generation_config, tokenizer, state = read_directory(directory)
    if hf_config.tie_word_embeddings:
        tie(hf_config, state, directory)
    with torch.device("meta"):
        model = Model(hf_config)
    expected = set(model.state_dict())
    if state.keys() != expected:
        wrapper = next((name for prefix, name in WRAPPERS.items() if any(key.startswith(prefix) for key in state)), "")
        raise ValueError(f"got weights in {directory} that do not fit its config: "
                         f"missing {sorted(expected - state.keys())[:3]}, "
                         f"unexpected {sorted(state.keys() - expected)[:3]}"
                         f"{f'; they were saved from inside {wrapper}: save the model in it' if wrapper else ''}")
    for name, parameter in model.state_dict().items():
        if state[name].shape != parameter.shape:
            raise ValueError(f"got {name} of shape {tuple(state[name].shape)} in {directory}, "
                             f"expected {tuple(parameter.shape)} by its config")
    # a copy: on Windows and NFS a file whose tensors are in use, as they were read from it, cannot be replaced
    model.load_state_dict({name: tensor.to(dtype, copy=True) for name, tensor in state.items()}, assign=True)
    if model.config.tied_embeddings:
        model.lm_head.weight = model.model["embed_tokens"].weight
    model.cos, model.sin = rotary_tables(model.config)  # buffers are computed, not stored
    model.generation_config, model.source = generation_config, str(path_or_id)
    return model.to(device), tokenizer


def tie(hf_config, state: dict, directory: Path) -> None:
    """The two names of tied embeddings, where one is stored; two different ones are not tied, whatever the config says:
    as transformers does it."""
    names = ("model.embed_tokens.weight", "lm_head.weight")
    stored = [name for name in names if name in state]
    if len(stored) == 2 and not torch.equal(*(state[name] for name in names)):
        note(f"{directory} says tie_word_embeddings, but its embedding and lm_head differ: they are kept apart")
        hf_config.tie_word_embeddings = False
    elif stored:
        state |= dict.fromkeys(names, state[stored[0]])


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
    if model.generation_config:
        text = json.dumps(model.generation_config, indent=2) + "\n"
        (staging / "generation_config.json").write_text(text, encoding="utf-8")
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in (state or model.state_dict()).items()
             if "lora_" not in name}
    if model.config.tied_embeddings:
        state.pop("lm_head.weight", None)
    try:
        save_file(state, staging / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:  # it has no errno
        raise OSError(errno.ENOSPC if "No space left" in str(error) else errno.EIO, str(error)) from None
    replace_directory(staging, directory)


def replace_directory(staging: Path, directory: Path) -> None:
    """Puts staging in directory's place; at every moment the old or the new one is there whole, as NAME or NAME.old."""
    old = directory.with_name(directory.name + ".old")
    if directory.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(directory, old)
    os.rename(staging, directory)
    shutil.rmtree(old, ignore_errors=True)


# --------------------------------------------------------------------------------------------------------------- checks
def check_dtype(name: str) -> None:
    if name not in DTYPES:
        raise ValueError(f"got dtype {name!r}, expected one of {', '.join(DTYPES)}")


def check_device(device) -> None:
    kind, colon, number = str(device).partition(":")
    if kind not in ("cpu", "cuda") or colon and not number.isdecimal():
        mps = " (MPS has no float64, which sampling needs, and no Mac's GPU has run this)" * (kind == "mps")
        raise ValueError(f"got device {str(device)!r}, expected cpu or cuda, or one of several as cuda:1{mps}; "
                         "use --device cpu")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"got device {device!r}, but this PyTorch sees no CUDA GPU; use --device cpu")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise ValueError(f"got device {device!r}, but this PyTorch sees {torch.cuda.device_count()} GPUs, from cuda:0 on")


@lru_cache
def slower_in_bf16(size: int = 384) -> float:
    """Time of a matrix product in bfloat16 over that in float32: below 1 with bf16 units, tens without."""
    seconds = {}
    for dtype in DTYPES.values():
        x = torch.ones(size, size, dtype=dtype)
        x @ x  # the first call loads the kernel
        started = time.perf_counter()
        for _ in range(3):
            x @ x
        seconds[dtype] = time.perf_counter() - started
    return seconds[torch.bfloat16] / seconds[torch.float32]


def check_finite(values, source: str, what: str = "log-probs") -> None:
    """values: a tensor or a list. Raises BrokenWeights where one is NaN or infinite; source: the checkpoint that made it."""
    if not torch.as_tensor(values).isfinite().all():
        raise BrokenWeights(f"got {what} from {source} that are not finite (nan or inf), expected numbers: its weights "
                            "are broken, or too large for this dtype")


# ----------------------------------------------------------------------------------------------------------- one by one
def find_directory(path_or_id) -> Path:
    directory = beside_scripts(path_or_id)
    if directory.is_dir():
        return directory
    if directory.is_file():
        refuse_other_formats([directory], directory.parent)
        raise ValueError(f"got model {path_or_id}, which is a file; expected the directory that holds it, with "
                         "config.json and tokenizer.json")
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

    if (directory / "adapter_config.json").exists():
        raise ValueError(f"got {directory}, an adapter of PEFT (LoRA) and no whole model; merge it into its base: "
                         "AutoPeftModelForCausalLM.from_pretrained(DIR).merge_and_unload().save_pretrained(OUT) of peft, "
                         "and the tokenizer beside it")
    weights = shards(directory)
    for name in ("config.json", "tokenizer.json", *weights):
        if not (directory / name).exists():
            if not (directory / weights[0]).exists():
                refuse_other_formats(sorted(directory.iterdir()), directory)
            below = [*directory.glob("checkpoint*"), *directory.glob("snapshots/*")]  # of a run, of the hub's cache
            inside = next((path for path in sorted(below) if path.is_dir()), None)
            old = any((directory / other).exists() for other in ("vocab.json", "tokenizer.model"))
            convert = "; transformers' AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) may make it" if old else ""
            expected = ("expected the weights as safetensors, in one file or in every shard that "
                        "model.safetensors.index.json names" if name in weights else
                        "expected config.json, tokenizer.json and model.safetensors, as save_pretrained writes them")
            raise FileNotFoundError(f"got model directory {directory} without {name}; {expected}"
                                    f"{f'; did you mean {inside}?' if inside else ''}"
                                    f"{convert if name == 'tokenizer.json' else ''}")
    for name in {*weights, *READ}:
        if (directory / name).exists() and is_pointer(directory / name):
            raise ValueError(f"got {directory / name}, which is a Git LFS pointer and not the file itself; "
                             "run git lfs pull there")
    read_json(directory / "tokenizer.json")
    content = read_json(directory / "config.json")
    if content.get("model_type") not in FAMILIES:  # said before transformers complains about one that it does not know
        raise ValueError(f"got a config of architecture {content.get('model_type')!r} in {directory}, "
                         f"expected one of {', '.join(FAMILIES)}")
    if quantized := content.get("quantization_config") or content.get("quantization"):
        method = quantized.get("quant_method", "") if isinstance(quantized, dict) else ""
        raise ValueError(f"got quantised weights{f' ({method})' if method else ''} in {directory}, expected float32, "
                         "bfloat16 or float16: fetch the checkpoint that they were made from")
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # a dozen kinds: a missing field, a field of a wrong type, ...
        raise ValueError(f"got {directory / 'config.json'}, which transformers cannot read "
                         f"({type(error).__name__}: {short(error)})") from None


def refuse_other_formats(paths: list[Path], where: Path) -> None:
    for pattern, (name, advice) in OTHER_FORMATS.items():
        if found := next((path for path in paths if path.match(pattern)), None):
            raise ValueError(f"got {found.name} in {where}, {name}, expected config.json, tokenizer.json and "
                             f"model.safetensors; {advice}")


def is_pointer(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(30).startswith(b"version https://git-lfs")


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:  # no JSON, or no UTF-8
        raise ValueError(f"got a corrupt or truncated {path} ({error}); copy it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"got {path} with a {type(content).__name__}, expected a JSON object; copy it again")
    return content


def shards(directory: Path) -> list[str]:
    """The names of the weight files; where one file and an index are there, the one file, as transformers chooses."""
    index = directory / "model.safetensors.index.json"
    if (directory / "model.safetensors").exists() or not index.exists():
        return ["model.safetensors"]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(s, str) for s in weight_map.values()):
        raise ValueError(f"got {index} without weight_map, expected the shard of each weight; copy it again")
    return sorted(set(weight_map.values()))


def read_directory(directory: Path):
    """-> (transformers config, generation_config.json, tokenizer, state dict), or a ValueError or FileNotFoundError that
    says what to mend."""
    hf_config = read_hf_config(directory)
    path = directory / "generation_config.json"
    generation_config = read_json(path) if path.exists() else {}
    tokenizer = read_tokenizer(directory, hf_config.vocab_size)
    if "eos_token_id" not in read_json(directory / "config.json"):
        hf_config.eos_token_id = None  # and not the default of a config class, 2 for Llama: nor does generate() take it
    named = listed(hf_config.eos_token_id) + listed(generation_config.get("eos_token_id"))
    if wrong := [token for token in named if type(token) is not int or not 0 <= token < hf_config.vocab_size]:
        raise ValueError(f"got eos_token_id {wrong[0]!r} in config.json or generation_config.json of {directory}, expected "
                         f"numbers of tokens, below {hf_config.vocab_size}")
    ends = end_ids(hf_config, generation_config, tokenizer)
    if not ends:
        raise ValueError(f"got a checkpoint without an EOS token in {directory}; completions could never end. Set "
                         "eos_token in tokenizer_config.json, or eos_token_id in generation_config.json")
    if tokenizer.eos_token_id is None:
        if (end := tokenizer.convert_ids_to_tokens(min(ends))) is None:
            raise ValueError(f"got end tokens {sorted(ends)} in {directory}, for which its tokenizer has no token; set "
                             "eos_token in tokenizer_config.json")
        tokenizer.eos_token = end
    vocabulary = tokenizer.get_vocab()
    beyond = sorted((name for name, i in vocabulary.items() if i >= hf_config.vocab_size), key=vocabulary.get)
    if beyond:
        raise ValueError(f"got a tokenizer of {len(vocabulary):,} tokens in {directory} and an embedding of "
                         f"{hf_config.vocab_size:,} rows: {len(beyond)} tokens ({', '.join(beyond[:3])}) have none. They "
                         "were added without model.resize_token_embeddings(len(tokenizer)); do that, and save both")
    return hf_config, generation_config, tokenizer, read_weights(directory)


def read_weights(directory: Path) -> dict:
    """The state dict. Raises ValueError with the file that cannot be read, or the tensor that is not finite."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    state = {}
    for shard in shards(directory):
        try:
            state |= load_file(directory / shard)
        except SafetensorError as error:
            raise ValueError(f"got a corrupt or truncated weights file {directory / shard} ({error}); "
                             "copy it again") from None
    # what old versions stored although it is computed
    state = {name: tensor for name, tensor in state.items() if not name.endswith("rotary_emb.inv_freq")}
    for name, tensor in state.items():
        if not tensor.is_floating_point() or tensor.element_size() == 1:  # 1: fp8
            raise ValueError(f"got {name} as {str(tensor.dtype).removeprefix('torch.')} in {directory}, expected "
                             "float32, bfloat16 or float16")
        if not tensor.isfinite().all():
            raise BrokenWeights(f"got {name} in {directory} with numbers that are not finite (nan or inf); copy the "
                                "checkpoint again, or take one from before it broke")
    return state


def listed(named) -> list:
    """An eos_token_id as configs have it, which is a number, several, or none."""
    return [] if named is None else named if isinstance(named, list) else [named]


def end_ids(hf_config, generation_config: dict, tokenizer) -> set[int]:
    """All three places count: the tokenizer's EOS, and what the two configs name (chat models name several)."""
    return {*listed(tokenizer.eos_token_id), *listed(hf_config.eos_token_id),
            *listed(generation_config.get("eos_token_id"))}


def end_tokens(model: Model, tokenizer) -> set[int]:
    """The token ids that end a completion."""
    return end_ids(model.hf_config, model.generation_config, tokenizer)


def generate_ends(model: Model) -> set[int]:
    """Those at which generate() stops, which does not ask the tokenizer: generation_config.json's, if there is one, else
    config.json's."""
    return set(listed(model.generation_config.get("eos_token_id") if model.generation_config
                      else model.hf_config.eos_token_id))
