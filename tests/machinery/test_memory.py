"""The memory estimate against what autograd really keeps and against numbers worked out by hand, and the advice to who
asks for too much."""

import dataclasses
import re
import sys

import pytest
import torch
from transformers import Qwen2Config, Qwen3Config

import sft
import train_countdown
from machinery import memory, rl_run
from machinery.checkpoints import DTYPES, save
from machinery.flags import parse_config
from machinery.memory import GIB, check_fits, estimate
from machinery.presets import PRESETS
from model import Model
from train_countdown import Config

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
REAL = dict(vocab_size=151936, max_position_embeddings=4096, tie_word_embeddings=True, rope_parameters=ROPE)
QWEN_1_5B = Qwen2Config(**REAL, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
                        num_key_value_heads=2)
QWEN_3B = Qwen2Config(**REAL, hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16,
                      num_key_value_heads=2)
# D 16, I 24, V 100, H 4, K 2, E 4. A layer: q 16*16+16, k and v 16*8+8 each, o 16*16, three of 16*24, two norms of 16:
# 1984. Two layers, 100*16 embeddings, a norm of 16: 5584 parameters. LoRA, a layer, per rank: 4 * 16 + 2 * (16 + 8) -
# that is 32 + 24 + 24 + 32 for q, k, v, o - and 3 * 40: 232
SMALL = Qwen2Config(vocab_size=100, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, rope_parameters=ROPE)
N, ADAPTERS = 5584, 2 * 232


# ---------------------------------------------------------------------------------------------------------- activations
def eighth(family: str, layers: int):
    """Qwen2.5-1.5B and Qwen3-0.6B, every width divided by 8."""
    settings = dict(vocab_size=64, num_hidden_layers=layers, max_position_embeddings=64, rope_parameters=ROPE)
    if family == "qwen2":
        return Qwen2Config(**settings, hidden_size=192, intermediate_size=1120, num_attention_heads=12,
                           num_key_value_heads=2)
    return Qwen3Config(**settings, hidden_size=128, intermediate_size=384, num_attention_heads=16,
                       num_key_value_heads=8, head_dim=16)


def kept_bytes(hf_config, dtype, checkpointing: bool) -> int:
    """Bytes that a forward pass of 4 x 32 tokens leaves for the backward pass. A storage counts once, however many
    layers keep a view of it; parameters are there anyway."""
    model = Model(hf_config).to(dtype)
    model.activation_checkpointing = checkpointing
    parameters, storages, alive = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}, []

    def pack(tensor):
        alive.append(tensor)  # else its address would soon be another's
        if tensor.untyped_storage().data_ptr() not in parameters:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.hidden(torch.zeros(4, 32, dtype=torch.long))
    return sum(storages.values())


@pytest.mark.parametrize("checkpointing", (False, True), ids=("", "checkpointing"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ("qwen2", "qwen3"))
def test_a_layer_keeps_the_activations_that_are_estimated(family, dtype, checkpointing):
    """What four layers keep more than two, halved: what is there once, as the rotary tables, cancels."""
    kept = [kept_bytes(eighth(family, layers), DTYPES[dtype], checkpointing) for layers in (2, 4)]
    config = Config(dtype=dtype, activation_checkpointing=checkpointing, micro_batch_tokens=4 * 32)
    estimated = [estimate(eighth(family, layers), config)["activations"] for layers in (2, 4)]
    assert 0.95 < (estimated[1] - estimated[0]) / (kept[1] - kept[0]) < 1.35


@pytest.mark.parametrize("family", ("qwen2", "qwen3"))
def test_with_checkpointing_one_layer_is_whole_and_the_others_are_their_inputs(family):
    """D numbers a token for each of L layers, and all that a layer keeps for the one whose gradient is computed."""
    def activations(layers, checkpointing):
        config = Config(micro_batch_tokens=100, activation_checkpointing=checkpointing)
        return estimate(eighth(family, layers), config)["activations"]
    inputs = 100 * 4 * eighth(family, 1).hidden_size
    assert activations(6, True) == 6 * inputs + activations(1, False)


# ---------------------------------------------------------------------------------------------------- the rest, by hand
def small(**settings):
    defaults = dict(batch_size=8, group_size=4, slots=3, max_new_tokens=24, micro_batch_tokens=64, device="cuda")
    return estimate(SMALL, Config(**{**defaults, **settings}), prompt_tokens=16)


def test_the_cache_holds_a_quarter_more_columns_than_a_row_can_need():
    """A column: keys and values, L 2, K 2, E 4, so 32 numbers. 1.25 * (16 + 24) = 50 columns, 3 slots, and four copies
    of the logits in fp32; more slots than completions are not used."""
    logits = 4 * 100 * 4
    assert small()["KV cache"] == 3 * (50 * 32 * 4 + logits)
    assert small(dtype="bfloat16")["KV cache"] == 3 * (50 * 32 * 2 + logits)
    assert small(slots=100)["KV cache"] == 8 * (50 * 32 * 4 + logits)


@pytest.mark.parametrize("settings, weights, gradients, optimizer, host", (
    ({}, 4 * N, 4 * N, 8 * N, 0),  # fp32: its own master, two moments
    ({"dtype": "bfloat16"}, 2 * N, 4 * N, 12 * N, 0),  # gradients are added up in fp32
    ({"dtype": "bfloat16", "offload_optimizer": True}, 2 * N, 4 * N, 0, 12 * N),
    ({"offload_optimizer": True}, 4 * N, 4 * N, 0, 12 * N),  # away from the GPU the masters are copies
    ({"lora_rank": 2}, 4 * (N + 2 * ADAPTERS), 8 * ADAPTERS, 16 * ADAPTERS, 4 * N),  # frozen ones twice
    ({"lora_rank": 2, "dtype": "bfloat16"}, 2 * (N + 2 * ADAPTERS), 8 * ADAPTERS, 24 * ADAPTERS, 2 * N),
), ids=("fp32", "bf16", "bf16 offload", "fp32 offload", "LoRA", "LoRA bf16"))
def test_bytes_of_weights_gradients_and_optimizer(settings, weights, gradients, optimizer, host):
    parts = small(**settings)
    assert [parts[name] for name in ("weights", "gradients", "optimizer", "host")] == [
        weights, gradients, optimizer, host]


def test_fsdp_divides_gradients_and_optimizer():
    """fp32 shards are the masters; each process has the whole model once more, to sample with."""
    parts = small(fsdp=True)
    for world_size in (2, 4):
        split = estimate(SMALL, Config(batch_size=8, group_size=4, fsdp=True, device="cuda"), world_size=world_size)
        assert split["weights"] == 4 * N + 4 * N / world_size
        assert split["gradients"] == parts["gradients"] / world_size
        assert split["optimizer"] == parts["optimizer"] / world_size


def test_the_reference_is_a_second_model_but_not_with_lora():
    assert small()["reference"] == 0
    assert small(kl_coef=0.1, dtype="bfloat16")["reference"] == 2 * N
    assert small(kl_coef=0.1, lora_rank=2)["reference"] == 0


def test_the_peak_is_the_larger_of_sampling_and_training():
    """Weights and optimizer stay; cache and gradients never exist together. On a CPU host memory is the same memory."""
    for settings in ({}, {"slots": 8}, {"micro_batch_tokens": 4096}, {"kl_coef": 0.1}):
        parts = small(**settings, offload_optimizer=True)
        training = parts["gradients"] + parts["activations"] + parts["logits"]
        peak = parts["weights"] + parts["reference"] + max(parts["KV cache"], training)
        assert parts["peak"] == peak
        assert small(**settings, offload_optimizer=True, device="cpu")["peak"] == peak + 12 * N
    assert small()["KV cache"] < small()["activations"] < small(slots=8, max_new_tokens=2000)["KV cache"]


# ----------------------------------------------------------------------------------------------------- real checkpoints
@pytest.mark.parametrize("hf_config, billions", ((QWEN_1_5B, 1.54), (QWEN_3B, 3.09)), ids=("1.5B", "3B"))
def test_the_shapes_are_those_of_the_model_cards(hf_config, billions):
    """1.54B and 3.09B parameters, tied embeddings counted once."""
    assert estimate(hf_config, Config())["weights"] / 4 == pytest.approx(billions * 1e9, abs=0.005e9)


def test_what_a_card_of_24_gb_trains():
    """1.5B with its optimizer in host memory; not with the optimizer on the card; 3B with adapters."""
    def peak(hf_config, **settings):
        return estimate(hf_config, Config(**{**PRESETS["gpu-24gb"], **settings}))["peak"] / GIB
    assert peak(QWEN_1_5B) < 22
    assert peak(QWEN_1_5B, offload_optimizer=False) > 24
    assert peak(QWEN_3B, lora_rank=16, slots=64) < 22
    assert peak(QWEN_3B) > peak(QWEN_1_5B)


# ----------------------------------------------------------------------------------------------------------- what to do
@pytest.fixture
def machine(monkeypatch, tmp_path):
    """machine(gib): a device with so much memory, and the shapes of Qwen2.5-1.5B without its weights. host: of the
    machine that a GPU stands in."""
    QWEN_1_5B.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").touch()

    def has(gib, host=1000, **settings):
        config = Config(model=str(tmp_path / "model"), **settings)
        monkeypatch.setattr(memory, "available", lambda device: (gib if device == config.device else host) * GIB)
        return config
    return has


def refusal(config, **settings) -> str:
    with pytest.raises(ValueError) as caught:
        check_fits(config, **settings)
    return str(caught.value)


def followed(message: str, config):
    """The config with the flags that the message advises, read as the command line reads them."""
    flags = re.search(r"(?<= )with (--.*) it needs about", message)[1].split()
    changed = parse_config(Config, "", flags)
    default = dataclasses.asdict(Config())
    return dataclasses.replace(config, **{name: value for name, value in dataclasses.asdict(changed).items()
                                          if value != default[name]})


WIDE = dict(device="cuda", max_new_tokens=1024, batch_size=512, slots=512)


@pytest.mark.parametrize("settings", (dict(device="cuda"), WIDE, dict(device="cpu")), ids=("plain", "wide", "cpu"))
@pytest.mark.parametrize("gib", (8, 10, 14, 20, 30))
def test_advice_that_is_followed_fits(machine, gib, settings):
    """At each of these sizes some set of flags fits, so one must be named. A remedy for the smaller of the two phases
    helps only once the larger one has shrunk: 512 rows of cache hide the activations."""
    config = machine(gib, **settings)
    message = refusal(config)
    assert "even with" not in message
    check_fits(followed(message, config))


def test_a_model_that_fits_passes(machine):
    check_fits(machine(2000))
    parts = estimate(QWEN_1_5B, machine(2000))
    check_fits(machine(parts["peak"] / GIB))
    refusal(machine(parts["peak"] / GIB - 0.01))


def test_the_message_says_what_was_needed_and_what_there_is(machine):
    message = refusal(machine(20, device="cuda"))
    assert re.search(r"got .*model, which needs about [\d.]+ GiB \(weights 5.8, optimizer 11.5, .*\), expected at most "
                     r"the 20.0 GiB that cuda has to give; with --dtype bfloat16", message)


def test_where_nothing_helps_the_message_says_so(machine):
    """1.5B parameters in bf16 are 2.9 GiB."""
    message = refusal(machine(2.5))
    assert "even with --" in message and "--dtype bfloat16" in message and "--lora-rank 16" in message
    assert "use a smaller model, or --fsdp on more GPUs" in message


@pytest.mark.parametrize("settings", (dict(fsdp=True), dict(ref_every=10, kl_coef=0.1)), ids=("fsdp", "ref_every"))
def test_no_advice_contradicts_the_flags_that_were_given(machine, settings):
    """--fsdp excludes --offload-optimizer and --lora-rank, --ref-every the latter: neither is advised, and the message
    speaks of memory and not of flags that nobody gave."""
    message = refusal(machine(3, device="cuda", **settings), world_size=2)
    assert "needs about" in message and "--lora-rank" not in message
    assert "--offload-optimizer" not in message or not settings.get("fsdp")


def test_host_memory_is_held_to_the_machine(machine):
    """AdamW of 1.54B parameters in host memory is 17.3 GiB: neither taken nor advised where the machine has less."""
    message = refusal(machine(22, host=16, device="cuda", dtype="bfloat16", offload_optimizer=True))
    assert re.search(r"needs about 17.3 GiB of host memory, expected at most the 16.0 GiB .*fewer processes", message)
    check_fits(machine(22, host=18, device="cuda", dtype="bfloat16", offload_optimizer=True, activation_checkpointing=True,
                       slots=128))
    assert "--offload-optimizer" in refusal(machine(14, host=18, device="cuda"))
    assert "--offload-optimizer" not in refusal(machine(14, host=16, device="cuda"))


def test_processes_share_the_machine_but_not_their_gpus(monkeypatch):
    monkeypatch.setattr(memory, "machine_memory", lambda: 100 * GIB)
    alone = memory.available("cpu")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.available("cpu") == alone / 4


# -------------------------------------------------------------------------------------------------------- in the script
@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The directory of a random model of one layer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sft.TINY_MODELS, "test", dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                                                    num_attention_heads=2, num_key_value_heads=1, head_dim=16))
        model, tokenizer = sft.new_model("test", seed=0)
    save(model, tokenizer, directory := tmp_path_factory.mktemp("base") / "model")
    return directory


def test_training_that_does_not_fit_ends_before_there_is_a_run(base, monkeypatch, tmp_path, capsys):
    """One line, exit code 2, no weight read, no folder made."""
    monkeypatch.setattr(memory, "available", lambda device: 2 ** 10)
    monkeypatch.setattr(rl_run, "load", lambda *args, **settings: pytest.fail("read the weights"))
    monkeypatch.setattr(sys, "argv", ["train_countdown.py", "--model", str(base), "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as stop:
        train_countdown.main()
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith(f"error: got {base}, which needs about ")
    assert "expected at most the 0.0 GiB that cpu has to give; even with --" in error
    assert not (tmp_path / "run").exists()


def test_the_estimate_is_of_what_training_does_by_default():
    """memory.Config repeats some fields of train_countdown.Config, with their defaults."""
    assert {f.name: f.default for f in dataclasses.fields(memory.Config)}.items() <= {
        f.name: f.default for f in dataclasses.fields(Config)}.items()


def test_memory_py_prints_the_table(base, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["memory.py", "--preset", "gpu-24gb", "--model", str(base), "--device", "cpu"])
    memory.main()
    table = dict(re.findall(r"^ *([\w ]+?) +([\d.]+) GiB$", capsys.readouterr().out, flags=re.MULTILINE))
    assert {"weights", "optimizer", "KV cache", "activations", "peak", "host"} <= table.keys()
    assert float(table["peak"]) > 0
