"""The decoder against transformers, the directories it reads and writes, and what it refuses. Transformers is the
reference here."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

import corpus
from machinery.checkpoints import end_tokens, load, replace_directory, save
from model import KVCache, Model, init_weights

SMALL = dict(vocab_size=263, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=128)
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
# head_dim 8: frequencies 1, 0.1, 0.01 and 0.001 make 10, 1.02, 0.1 and 0.01 turns in 64 positions: the first is kept,
# the second blended, the others are slowed down
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
CONFIGS = {
    "qwen2": (Qwen2Config, dict(rope_parameters=ROPE)),
    "qwen3": (Qwen3Config, dict(rope_parameters=ROPE, head_dim=16)),  # not hidden_size / heads, as in Qwen3-0.6B
    "llama": (LlamaConfig, dict(rope_parameters=ROPE)),
    "llama3": (LlamaConfig, dict(rope_parameters=LLAMA3)),
    "no_groups": (Qwen3Config, dict(rope_parameters=ROPE, head_dim=8, num_key_value_heads=4)),  # a key head per query
}
IDS = torch.randint(0, 263, (3, 20), generator=torch.Generator().manual_seed(0))  # (B, T)


def reference(name: str, tied: bool, seed: int = 0):
    """A transformers model in which every parameter is random: zero biases and norms of one would hide half of the
    mistakes."""
    config_class, settings = CONFIGS[name]
    config = config_class(**{**SMALL, **settings}, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 * (parameter.dim() == 1), 0.15, generator=generator)
    return model.eval()


def write(model, directory, **settings):
    model.save_pretrained(directory, **settings)
    corpus.build_tokenizer().save_pretrained(directory)
    return directory


@torch.no_grad()
def logits_of(model):
    """(3, 20, V), by ours or by transformers'."""
    return getattr(out := model(IDS), "logits", out)


# ---------------------------------------------------------------------------------------------------------- the decoder
@pytest.mark.parametrize("tied", (True, False), ids=("tied", "untied"))
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_those_of_transformers_with_and_without_cache(name, tied, tmp_path):
    """Same weights, same tokens: 1e-4 apart at most, in one pass, and in a prefill of 7 tokens with 13 single ones
    after it."""
    theirs = reference(name, tied)
    expected = logits_of(theirs)
    model, _ = load(write(theirs, tmp_path / "hf"))
    assert expected.std() > 0.3  # else 1e-4 would say nothing
    torch.testing.assert_close(logits_of(model), expected, atol=1e-4, rtol=0)

    with torch.no_grad():
        cache = KVCache(model.config, rows=3, columns=20)
        pieces = [model(IDS[:, :7], cache=cache)]
        for t in range(7, 20):
            mask = torch.zeros(3, 1, 1, t + 1)
            pieces.append(model(IDS[:, t:t + 1], positions=torch.full((3, 1), t), cache=cache, mask=mask))
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, atol=1e-4, rtol=0)
    assert cache.end == 20


@torch.no_grad()
def test_positions_are_relative_and_the_mask_hides_foreign_columns():
    """Rotary embedding knows distances only: a row that begins at column 5, behind another's columns, reads the same as
    alone."""
    model = Model(Qwen3Config(**SMALL, head_dim=8, rope_parameters=ROPE))
    init_weights(model, seed=0)
    cache = KVCache(model.config, rows=3, columns=12)
    model(IDS[:, :5], cache=cache)  # another's tokens, hidden below
    mask = torch.full((1, 1, 6, 11), -torch.inf)
    mask[..., 5:] = torch.full((6, 6), -torch.inf).triu(1)
    late = model(IDS[:, 5:11], positions=torch.arange(6)[None], cache=cache, mask=mask)
    torch.testing.assert_close(late, model(IDS[:, 5:11]), atol=1e-5, rtol=0)
    moved = model(IDS[:, 5:11], positions=torch.arange(40, 46)[None])
    torch.testing.assert_close(moved, model(IDS[:, 5:11]), atol=1e-5, rtol=0)


def test_a_cache_that_holds_tokens_wants_a_mask():
    """Which of its columns a row may see is the caller's knowledge; guessing would be silently wrong."""
    model = Model(Qwen3Config(**SMALL, head_dim=8, rope_parameters=ROPE))
    cache = KVCache(model.config, rows=3, columns=12)
    with torch.no_grad():
        model(IDS[:, :1], cache=cache)  # an empty one does not, not even for a single token
        with pytest.raises(ValueError, match="already holds tokens and no mask"):
            model(IDS[:, 1:2], positions=torch.ones(3, 1, dtype=torch.long), cache=cache)


def test_what_follows_a_token_does_not_change_its_logits():
    """Causal: that is why rows padded on the right need no mask."""
    model = Model(Qwen3Config(**SMALL, head_dim=8, rope_parameters=ROPE))
    changed = IDS.clone()
    changed[:, 11:] = 0
    with torch.no_grad():
        assert torch.equal(model(changed)[:, :11], model(IDS)[:, :11])


def test_init_weights_follows_its_seed():
    """Deviation 0.02 for matrices, less for what writes into the residual stream; norms stay one."""
    def new(seed):
        init_weights(model := Model(Qwen3Config(**SMALL, head_dim=8, rope_parameters=ROPE)), seed)
        return model.state_dict()
    first, again, other = new(0), new(0), new(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    assert first["lm_head.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert first["model.layers.0.mlp.down_proj.weight"].std().item() == pytest.approx(0.01, rel=0.1)  # 0.02 (2 L)^-0.5
    assert (first["model.norm.weight"] == 1).all()


# ------------------------------------------------------------------------------------------------------------ the cache
def filled_cache(rows: int):
    """Row b, column s holds 10 * b + s everywhere, in columns 2 to 7."""
    cache = KVCache(Model(Qwen3Config(**SMALL, head_dim=8, rope_parameters=ROPE)).config, rows, columns=9)
    cache.begin, cache.end = 2, 8
    values = 10.0 * torch.arange(rows)[:, None] + torch.arange(9)  # (B, S)
    cache.keys[:] = values[:, None, :, None]
    cache.values[:] = -values[:, None, :, None]
    return cache


def test_shrink_puts_the_last_rows_into_the_places_of_stopped_ones():
    cache = filled_cache(rows=4)
    cache.shrink(2, holes=[0], movers=[3])
    assert cache.keys.shape == (2, 2, 2, 9, 8)  # (L, B, K, S, E)
    for layer, head in ((0, 0), (1, 1)):
        assert cache.keys[layer, :, head, 2:8, 0].tolist() == [[32, 33, 34, 35, 36, 37], [12, 13, 14, 15, 16, 17]]
        assert (cache.values == -cache.keys)[layer, :, head, 2:8].all()


def test_shift_left_moves_the_columns_in_use_and_the_cursor():
    cache = filled_cache(rows=2)
    cache.shift_left(2)  # 6 columns by 2: source and destination overlap
    assert (cache.begin, cache.end) == (0, 6)
    assert cache.keys[1, :, 1, :6, 3].tolist() == [[2, 3, 4, 5, 6, 7], [12, 13, 14, 15, 16, 17]]
    assert cache.values[0, 1, 0, :6, 0].tolist() == [-12, -13, -14, -15, -16, -17]


# ---------------------------------------------------------------------------------------------------------- directories
@pytest.mark.parametrize("tied", (True, False), ids=("tied", "untied"))
@pytest.mark.parametrize("name", ("qwen2", "qwen3", "llama3"))
def test_transformers_loads_what_save_writes(name, tied, tmp_path):
    theirs = reference(name, tied)
    model, tokenizer = load(write(theirs, tmp_path / "hf"))
    save(model, tokenizer, tmp_path / "ours")
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "ours")), logits_of(theirs))
    again, tokenizer_again = load(tmp_path / "ours")
    assert torch.equal(logits_of(again), logits_of(model))
    assert tokenizer_again.get_vocab() == tokenizer.get_vocab()
    assert tokenizer_again.eos_token_id == tokenizer.eos_token_id
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "ours"]  # no staging directory is left


@pytest.mark.parametrize("tied", (True, False), ids=("tied", "untied"))
def test_weights_in_several_shards_are_one_model(tied, tmp_path):
    theirs = reference("qwen2", tied)
    model, _ = load(write(theirs, tmp_path / "hf", max_shard_size="20KB"))
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 2
    torch.testing.assert_close(logits_of(model), logits_of(theirs), atol=1e-4, rtol=0)


def test_fp32_weights_stay_fp32_when_the_checkpoint_was_bf16(tmp_path):
    """Training moves weights by 1e-6, which bf16 cannot hold. Real checkpoints say bfloat16 in config.json, and
    transformers obeys it."""
    theirs = reference("qwen3", tied=True).to(torch.bfloat16)
    model, tokenizer = load(write(theirs, tmp_path / "hf"))
    with torch.no_grad():
        model.model["norm"].weight += 1e-4  # the smallest bf16 step at 1 is 0.0078
    save(model, tokenizer, tmp_path / "ours")
    reread = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert reread.dtype == torch.float32
    torch.testing.assert_close(logits_of(reread), logits_of(model), atol=1e-4, rtol=0)


def test_bf16_is_a_choice_and_rotary_angles_stay_fp32(tmp_path):
    directory = write(reference("qwen3", tied=True), tmp_path / "hf")
    model, _ = load(directory, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.cos.dtype == model.sin.dtype == torch.float32
    assert {parameter.dtype for parameter in load(directory)[0].parameters()} == {torch.float32}


def test_a_completion_ends_at_the_eos_of_tokenizer_and_config(tmp_path):
    model, tokenizer = load(write(reference("qwen3", tied=True), tmp_path / "hf"))
    eos = tokenizer.eos_token_id
    for from_config, expected in ((None, {eos}), (7, {eos, 7}), ([7, 9], {eos, 7, 9})):
        model.hf_config.eos_token_id = from_config
        assert end_tokens(model, tokenizer) == expected


# ------------------------------------------------------------------------------------------------------------- refusals
def edit(name: str, **changes):
    """A spoiler that sets keys of a JSON file; None removes the key."""
    def spoil(directory):
        content = json.loads((directory / name).read_text()) | changes
        (directory / name).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return spoil


def remove(name: str):
    return lambda directory: (directory / name).unlink()


def cut(name: str, share: float):
    def spoil(directory):
        content = (directory / name).read_bytes()
        (directory / name).write_bytes(content[:int(share * len(content))])
    return spoil


def name_a_missing_shard(directory):
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    (directory / "model.safetensors").rename(directory / shards[0])
    index = {"weight_map": {"model.norm.weight": shards[0], "lm_head.weight": shards[1]}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write(reference("qwen3", tied=False), tmp_path_factory.mktemp("whole") / "model")


@pytest.mark.parametrize("spoil, error, fragments", (
    (remove("config.json"), FileNotFoundError, ("without config.json", "expected config.json, tokenizer.json and ")),
    (remove("tokenizer.json"), FileNotFoundError, ("without tokenizer.json",)),
    (remove("model.safetensors"), FileNotFoundError, ("without model.safetensors",)),
    (name_a_missing_shard, FileNotFoundError, ("without model-00002-of-00002.safetensors", "every shard")),
    (edit("config.json", model_type="gpt2"), ValueError, ("'gpt2'", "expected one of qwen2, qwen3, llama")),
    (edit("config.json", model_type="unheard-of"), ValueError, ("'unheard-of'", "expected one of qwen2, qwen3, llama")),
    (edit("config.json", use_sliding_window=True), ValueError, ("use_sliding_window=True", "expected False")),
    (edit("config.json", attention_bias=True), ValueError, ("attention_bias=True", "expected False")),
    (edit("config.json", hidden_act="gelu"), ValueError, ("hidden_act='gelu'", "expected 'silu'")),
    (edit("config.json", rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}), ValueError,
     ("rope_type 'linear'", "expected default or llama3")),
    (edit("tokenizer_config.json", eos_token=None), ValueError, ("without an EOS token", "Set eos_token")),
    (cut("model.safetensors", 0.9), ValueError, ("corrupt or truncated weights file", "copy it again")),
    (cut("model.safetensors", 0), ValueError, ("corrupt or truncated weights file", "copy it again")),
    (cut("config.json", 0.9), ValueError, ("config.json", "got")),
    (cut("tokenizer.json", 0.5), ValueError, ("tokenizer.json", "got")),
    (edit("config.json", intermediate_size=64), ValueError,
     ("got model.layers.0.mlp.gate_proj.weight of shape (48, 32)", "(64, 32)")),
    (edit("config.json", num_hidden_layers=3, layer_types=["full_attention"] * 3), ValueError,
     ("do not fit its config: missing ['model.layers.2",)),
    (edit("config.json", num_hidden_layers=1, layer_types=["full_attention"]), ValueError,
     ("do not fit its config", "unexpected ['model.layers.1")),
), ids=("no config", "no tokenizer", "no weights", "no second shard", "other architecture", "unknown architecture",
        "sliding window", "bias", "activation", "rope", "no EOS", "truncated weights", "empty weights",
        "truncated config", "truncated tokenizer", "other width", "a layer missing", "a layer too many"))
def test_a_bad_directory_is_refused_with_what_to_mend(spoil, error, fragments, whole, tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(whole, directory)
    spoil(directory)
    with pytest.raises(error) as caught:
        load(directory)
    assert [fragment for fragment in fragments if fragment not in str(caught.value)] == []


@pytest.mark.parametrize("name", ("/no/such/model", "models/no-such-model", "no-such-model"))
def test_a_path_that_is_no_directory_never_goes_to_the_hub(name):
    with pytest.raises(FileNotFoundError, match="no directory here and no hub id"):
        load(name)


# --------------------------------------------------------------------------------------------------- never half a model
def copy_of(whole, directory):
    shutil.copytree(whole, directory)
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_a_save_that_fails_leaves_the_old_model_whole(whole, tmp_path, monkeypatch):
    before = copy_of(whole, tmp_path / "model")
    model, tokenizer = load(tmp_path / "model")

    def disk_full(*args, **kwargs):
        raise OSError("No space left on device")
    monkeypatch.setattr("safetensors.torch.save_file", disk_full)
    with pytest.raises(OSError, match="No space"):
        save(model, tokenizer, tmp_path / "model")
    with pytest.raises(OSError, match="No space"):
        save(model, tokenizer, tmp_path / "new")
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
    assert not (tmp_path / "new").exists()
    monkeypatch.undo()
    save(model, tokenizer, tmp_path / "model")  # what the failed one left behind is no obstacle
    assert load_file(tmp_path / "model" / "model.safetensors").keys() == load_file(whole / "model.safetensors").keys()


@pytest.mark.parametrize("existing", ("model", "model.old"), ids=("first kill", "second kill"))
def test_a_kill_between_the_renames_leaves_a_whole_model(existing, whole, tmp_path, monkeypatch):
    """Old model out of the way, new one into its place: killed in between, NAME.old is the only copy, also for the save
    after that."""
    before = copy_of(whole, tmp_path / existing)
    copy_of(whole, tmp_path / "staging")
    rename = os.rename

    def killed(source, target):
        if str(source).endswith("staging"):
            raise KeyboardInterrupt
        rename(source, target)
    monkeypatch.setattr(os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        replace_directory(tmp_path / "staging", tmp_path / "model")
    assert {path.name: path.read_bytes() for path in (tmp_path / "model.old").iterdir()} == before
