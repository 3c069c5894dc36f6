"""Two real processes on the CPU against one process that does the same work.

two_processes() below is what each of the two does; the tests compare what they found. One start serves all tests, since
it takes longer than everything in it. They start as under torchrun, but without it: importing it takes seconds.
"""

import faulthandler
import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.tensor import DTensor

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))  # the two processes know nothing of conftest.py

from machinery import distributed as d
from model import Model, init_weights

pytestmark = pytest.mark.slow

LENGTHS = (12, 5, 9, 7, 4)  # rank 0 takes the first 2 sequences, rank 1 the other 3: different tokens, different passes
TOKENS = sum(length - 1 for length in LENGTHS)
ROWS = [torch.randint(4, 263, (1, length), generator=torch.Generator().manual_seed(length)) for length in LENGTHS]


def fresh(dtype=torch.float32):
    """The tiny model with random weights. load() would import transformers, half of this file's time."""
    model = Model(SimpleNamespace(**json.loads((ROOT / "models" / "tiny-base" / "config.json").read_text())))
    init_weights(model, seed=0)
    for parameter in model.parameters():  # buffers stay fp32, as load() leaves them
        parameter.data = parameter.data.to(dtype)
    return model


def adamw(model):
    # a large eps: where a gradient is rounding noise, the noise must not become a step of full size
    return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)


def backward(model, rows):
    """One micro-batch a sequence; the loss is divided by the tokens of all sequences, whoever has them."""
    d.add_missing_passes(model, len(rows))
    for ids in rows:
        logprobs = model(ids[:, :-1]).log_softmax(-1).gather(-1, ids[:, 1:, None])
        (-logprobs.sum() / TOKENS).backward()
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    d.sum_gradients([parameter.grad for parameter in model.parameters()])


def finish(model, optimizer):
    """The rest of an optimizer step -> gradient norm before clipping, several times the limit."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


def gradients(model):
    return d.full_state({name: parameter.grad for name, parameter in model.named_parameters()})


def state(model, optimizer):
    return {"model": d.full_state(model.state_dict()), "optimizer": d.full_state(optimizer.state_dict())}


def copied(tree):
    """State dicts share memory with what they describe, which goes on training."""
    return torch.utils._pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, tree)


# ------------------------------------------------------------------------------------------ what each of the two does
def two_processes(folder: Path) -> None:
    faulthandler.dump_traceback_later(60, exit=True)  # a deadlock ends here, and shows where
    device = d.start("cpu")
    rank, found = d.rank(), {}
    rows = [ROWS[i] for i in d.own_part(len(ROWS))]
    found["start"] = (device, d.rank(), d.world_size(), torch.get_num_threads())
    found["gather"] = d.gather([(rank, i) for i in range(3 - rank)])
    found["sum"] = d.sum_over_ranks({"a": 0.1 + rank, **({"b": 2.0} if rank else {})})
    found["max"] = (d.max_over_ranks([-rank]), d.max_over_ranks([float("nan")] if rank else [5.0, 4.0]))
    found["any"] = (d.any_rank(rank == 1), d.any_rank(False))

    model = fresh()
    backward(model, rows)
    found["gradients"] = gradients(model)
    model = fresh()
    backward(model, ROWS if rank == 0 else [])
    found["gradients, rank 1 idle"] = gradients(model)
    found["mixed dtypes"] = [torch.full((2,), 1.0 + rank, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    d.sum_gradients(found["mixed dtypes"])

    # sharded: goes on from the checkpoint of one process, and leaves one that one process can read
    model, saved = fresh(), torch.load(folder / "one.pt")
    model.load_state_dict(saved["model"])
    d.shard(model, dtype=torch.float32)
    optimizer = adamw(model)
    d.load_optimizer(optimizer, saved["optimizer"])
    moments = [moment["exp_avg"].to_local() for moment in optimizer.state.values()]
    found["memory of the moments"] = sum(moment.untyped_storage().nbytes() for moment in moments) / 4
    found["elements"] = sum(parameter.to_local().numel() for parameter in model.parameters())
    backward(model, rows)
    found["sharded gradients"] = gradients(model)
    found["sharded norm"] = finish(model, optimizer)
    backward(model, ROWS if rank == 0 else [])
    found["sharded gradients, rank 1 idle"] = gradients(model)
    optimizer.zero_grad()
    found["state"] = state(model, optimizer)

    with d.whole_weights(model) as whole, torch.no_grad():
        for ids in ROWS if rank == 0 else ROWS[:1]:  # 5 passes here, 1 there
            hidden = whole.hidden(ids)
        found["logits"], found["hidden"] = whole(ROWS[0]), (rank, hidden)
        found["whole asks for gradients"] = any(parameter.requires_grad for parameter in whole.parameters())
    found["devices after"] = {tensor.device.type for tensor in whole.parameters()}
    with torch.no_grad():
        model(ROWS[0])
    found["sharded after a forward"] = all(isinstance(parameter, DTensor) for parameter in model.parameters())

    half = fresh()
    d.shard(half, dtype=torch.bfloat16)
    with d.whole_weights(half) as whole, torch.no_grad():
        found["bf16 logits"] = whole(ROWS[0])
    found["bf16 master weights"] = {parameter.dtype for parameter in half.parameters()}
    d.barrier()
    torch.save(found, folder / f"{rank}.pt")
    d.stop()


# -------------------------------------------------------------------------------------------- the same by one process
@pytest.fixture(scope="module")
def one():
    """Three optimizer steps on all sequences; what each began with, gradients and norm, and the state after it."""
    model, found = fresh(), {}
    optimizer = adamw(model)
    for step in (1, 2, 3):
        backward(model, ROWS)
        found[f"gradients {step}"] = copied(gradients(model))
        found[f"norm {step}"] = finish(model, optimizer)
        found[f"state {step}"] = copied(state(model, optimizer))
    return found


@pytest.fixture(scope="module")
def two(one, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    torch.save(one["state 1"], folder / "one.pt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [subprocess.Popen([sys.executable, __file__, str(folder)], stderr=subprocess.PIPE, text=True, env={
        **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}) for rank in (0, 1)]
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(error[-4000:] for error in errors)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


def assert_close(tensors, expected, tolerance=1e-6):
    """Relative to the norm of each tensor."""
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert (tensor - expected[name]).norm() <= tolerance * expected[name].norm(), name


def difference(after, before):
    return {name: tensor - before[name] for name, tensor in after.items()}


# ----------------------------------------------------------------------------------------------------- numbers, lists
@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_shares_cover_all_prompts_once_in_order_and_evenly(monkeypatch, world):
    """Ranks in order, prompts in order: gather() of what the ranks made of their shares is in the order of prompts."""
    monkeypatch.setattr(d, "world_size", lambda: world)
    for n in range(world, 20):
        shares = []
        for rank in range(world):
            monkeypatch.setattr(d, "rank", lambda: rank)
            shares.append(list(d.own_part(n)))
        assert sum(shares, []) == list(range(n))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_more_processes_than_prompts_are_refused(monkeypatch):
    """A rank without prompts would sample nothing, at full price."""
    monkeypatch.setattr(d, "world_size", lambda: 4)
    with pytest.raises(ValueError, match="got 3 prompts a step for 4 processes.*--batch-size"):
        d.own_part(3)


def test_more_processes_than_gpus_are_refused(monkeypatch):
    """CUDA would say: invalid device ordinal."""
    for name, value in {"WORLD_SIZE": "4", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(d, "check_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="got 4 processes on a machine with 2 GPUs.*--nproc-per-node"):
        d.start("cuda")


def test_each_process_knows_its_number_and_takes_its_part_of_the_cores(two):
    """Two processes with a thread per core each would take turns on every core."""
    assert [found["start"] for found in two] == [("cpu", rank, 2, max(1, os.cpu_count() // 2)) for rank in (0, 1)]


def test_gather_keeps_the_order_of_ranks_on_every_rank(two):
    """Lists of different lengths, one after the other."""
    for found in two:
        assert found["gather"] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]


def test_a_sum_is_over_all_ranks_in_float64_where_a_name_may_be_missing(two):
    """0.1 + 1.1 in float32 would be off by 5e-8; b is known to rank 1 only."""
    for found in two:
        assert found["sum"] == {"a": 0.1 + 1.1, "b": 2.0}


def test_a_maximum_is_over_all_ranks_and_does_not_lose_nan(two):
    """The largest of 0 and -1; then of 5 and nan, where Python's max(5, nan) is 5."""
    for found in two:
        assert found["max"][0] == 0 and math.isnan(found["max"][1])


def test_one_rank_is_enough_to_stop_all(two):
    """Ctrl-C may reach one process only; the others would wait for it in the next step."""
    for found in two:
        assert found["any"] == (True, False)


# ------------------------------------------------------------------------------------------------------------ gradients
def test_two_processes_have_the_gradient_of_one(one, two):
    """Sum over ranks of d/dw (sum over the rank's tokens / all tokens) = d/dw (mean over all tokens)."""
    for found in two:
        assert_close(found["gradients"], one["gradients 1"])


def test_a_rank_with_nothing_to_train_still_joins(one, two):
    """All its groups had equal rewards; its zeros leave the other's gradient as it is, on both."""
    for found in two:
        assert_close(found["gradients, rank 1 idle"], one["gradients 1"])


def test_parameters_instead_of_gradients_are_refused():
    """Weights would be summed, and training would go on with twice the weights."""
    with pytest.raises(ValueError, match="got parameters, expected their gradients"):
        d.sum_gradients(list(fresh().parameters()))


def test_gradients_of_different_dtypes_keep_theirs(two):
    """1 + 2 in fp32 and in bf16, which travel in one message."""
    for found in two:
        assert [tensor.dtype for tensor in found["mixed dtypes"]] == [torch.float32, torch.bfloat16]
        assert all((tensor == 3).all() for tensor in found["mixed dtypes"])


def test_sharded_gradients_are_those_of_one_process(one, two):
    """Summed, not averaged; with 2 micro-batches here and 3 there, and with 5 here and none there."""
    assert_close(two[0]["sharded gradients"], one["gradients 2"])
    assert_close(two[0]["sharded gradients, rank 1 idle"], one["gradients 3"], 1e-5)  # after two different second steps


def test_the_norm_for_clipping_is_over_all_shards(one, two):
    """Each rank holds half of the gradient; its own norm would be too small, and differ between ranks."""
    for found in two:
        assert found["sharded norm"] == pytest.approx(one["norm 2"], rel=1e-6)


# ------------------------------------------------------------------------------------------------------ sharded weights
def test_weights_and_moments_are_split_between_the_ranks(one, two):
    """Together they hold every element once, and a loaded moment keeps no more memory than its part needs."""
    assert sum(found["elements"] for found in two) == sum(p.numel() for p in fresh().parameters())
    for found in two:
        assert found["memory of the moments"] == found["elements"]


def test_a_checkpoint_of_one_process_continues_on_two(one, two):
    """Weights and AdamW's state of step 1 were loaded; step 2 must move every weight as it does in one process."""
    before = one["state 1"]["model"]
    assert_close(difference(two[0]["state"]["model"], before), difference(one["state 2"]["model"], before), 1e-4)


def test_a_checkpoint_of_two_processes_continues_on_one(one, two):
    """Saved after step 2, loaded by plain PyTorch; state and step 3 are those of one process throughout."""
    saved, expected = two[0]["state"], one["state 2"]
    assert saved["optimizer"]["param_groups"] == expected["optimizer"]["param_groups"]
    for index, moments in saved["optimizer"]["state"].items():
        assert_close(moments, expected["optimizer"]["state"][index], 1e-5)
    model = fresh()
    model.load_state_dict(saved["model"])
    optimizer = adamw(model)
    optimizer.load_state_dict(copied(saved["optimizer"]))
    backward(model, ROWS)
    finish(model, optimizer)
    before = one["state 2"]["model"]
    assert_close(difference(model.state_dict(), before), difference(one["state 3"]["model"], before), 1e-3)


@pytest.fixture
def one_thread():
    """As the ranks run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_only_rank_0_keeps_the_whole_state(two):
    """It alone writes; eight copies of a 7B model and its moments would need 672 GB of memory."""
    assert set(two[1]["state"]["model"].values()) == {None}
    assert all(moments["exp_avg"] is None for moments in two[1]["state"]["optimizer"]["state"].values())


def test_whole_weights_are_the_model_on_every_rank_for_any_number_of_passes(two, one_thread):
    """Rank 0 made 6 passes inside, rank 1 made 2: with any collective in them neither would have come back. Logits are
    bit for bit those of an unsharded model with the same weights, on as many threads: a matrix product that is cut
    for two rounds in another order on some CPUs."""
    model = fresh()
    model.load_state_dict(two[0]["state"]["model"])
    with torch.no_grad():
        for found in two:
            assert torch.equal(found["logits"], model(ROWS[0])) and not found["whole asks for gradients"]
            rank, hidden = found["hidden"]
            assert torch.equal(hidden, model.hidden(ROWS[-1 if rank == 0 else 0]))


def test_whole_weights_have_the_dtype_of_the_forward_pass_and_the_shards_stay_fp32(two):
    """The sampler must compute as the trainer does; small updates would be lost in bf16 master weights."""
    with torch.no_grad():
        logits = fresh(torch.bfloat16)(ROWS[0])
    for found in two:
        assert found["bf16 logits"].dtype == torch.bfloat16 and torch.equal(found["bf16 logits"], logits)
        assert found["bf16 master weights"] == {torch.float32}


def test_nothing_whole_is_left_behind(two):
    """Neither the copy of whole_weights nor the root's weights after a forward without backward: the first would fill
    the memory, the second would be the old weights after the next optimizer step."""
    for found in two:
        assert found["devices after"] == {"meta"}
        assert found["sharded after a forward"]


# ---------------------------------------------------------------------------------------------------------- one process
def test_one_process_needs_no_second_path(monkeypatch):
    """Without torchrun every function leaves things as they are."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert (d.start("cpu"), d.rank(), d.world_size(), d.own_part(3)) == ("cpu", 0, 1, range(3))
    assert d.gather([1, 2]) == [1, 2] and d.sum_over_ranks({"a": 1.5}) == {"a": 1.5}
    assert d.max_over_ranks([1, 2]) == 2 and d.any_rank(True) and not d.any_rank(False)
    model = fresh()
    d.shard(model, dtype=torch.bfloat16)
    d.add_missing_passes(model, 0)
    with d.whole_weights(model) as whole:
        assert whole is model
    gradient = torch.ones(2)
    d.sum_gradients([gradient])
    assert gradient.tolist() == [1, 1]
    assert {(type(p), p.dtype, p.grad) for p in model.parameters()} == {(torch.nn.Parameter, torch.float32, None)}
    assert d.full_state({"a": [model.lm_head.weight]})["a"][0] is model.lm_head.weight
    d.barrier()
    d.stop()


if __name__ == "__main__":
    two_processes(Path(sys.argv[1]))
