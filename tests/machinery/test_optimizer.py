"""AdamW with fp32 masters, against torch's own AdamW and against numbers that bf16 cannot hold."""

import io

import pytest
import torch
from torch import nn

from machinery.optimizer import MasterAdamW, clip_gradients

SETTINGS = dict(lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)


def small_model(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def backward(model, step: int):
    """A loss that is another one in each step."""
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
    model(x.to(model[0].weight.dtype)).square().sum().backward()


def train(model, optimizer, steps):
    for step in steps:
        backward(model, step)
        optimizer.step()


def reread(state: dict) -> dict:
    """What torch.save writes and torch.load reads, as in trainer_state.pt."""
    torch.save(state, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_equal(ours, theirs):
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


# ----------------------------------------------------------------------------------------------------------- the update
def test_a_model_in_fp32_is_its_own_master():
    """Then the weights are torch.optim.AdamW's after every step, to the last bit, and no second copy exists."""
    ours, theirs = small_model(), small_model()
    optimizer, adamw = MasterAdamW(ours.parameters(), **SETTINGS), torch.optim.AdamW(
        theirs.parameters(), **SETTINGS, fused=True)
    assert all(master is p for master, p in zip(optimizer.masters, ours.parameters(), strict=True))
    for step in range(5):
        optimizer.set_learning_rate(1e-3 * (step + 1))  # as train_countdown.py warms up
        adamw.param_groups[0]["lr"] = 1e-3 * (step + 1)
        train(ours, optimizer, [step])
        backward(theirs, step)
        adamw.step()
        adamw.zero_grad()
        assert_equal(ours, theirs)
    assert not torch.equal(ours[0].weight, small_model()[0].weight)


def test_updates_too_small_for_bf16_add_up_in_the_masters():
    """With a constant gradient an Adam step is the learning rate, here 1e-6. Around 0.02, bf16's numbers are 2^-13 =
    0.000122 apart: AdamW on bf16 weights rounds each step away and stays where it is. 200 steps are 1.64 * 2^-13, so
    the masters' rounded copy is 2 numbers further down."""
    plain, ours = (nn.Parameter(torch.full((4,), 0.02, dtype=torch.bfloat16)) for _ in range(2))
    start = ours.detach().float()
    adamw, optimizer = torch.optim.AdamW([plain], lr=1e-6, weight_decay=0.0), MasterAdamW([ours], lr=1e-6)
    moved = []
    for _ in range(200):
        plain.grad = torch.ones_like(plain)
        adamw.step()
        ours.sum().backward()
        optimizer.step()
        moved.append((start - ours.float())[0].item() / 2 ** -13)
    assert torch.equal(plain.float(), start)  # all 200 were lost
    torch.testing.assert_close(start - optimizer.masters[0], torch.full((4,), 200e-6), rtol=1e-3, atol=0)
    assert moved[0] == 0 and moved[-1] == 2
    assert (moved.count(0), moved.count(1)) == (pytest.approx(61, abs=1), pytest.approx(122, abs=1))  # at 1/2 and 3/2


def test_gradients_of_micro_batches_are_added_up_in_fp32():
    """1 and 256 times 2^-9: in bf16 1 + 2^-9 is 1, so the sum would stay 1. In fp32 it is 1.5."""
    parameter = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizer = MasterAdamW([parameter], lr=1e-3)
    for scale in [1.0] + [2 ** -9] * 256:
        (parameter * scale).sum().backward()
        assert parameter.grad is None  # freed as soon as it was added
    gradient, = optimizer.gradients()
    assert gradient.dtype == torch.float32 and gradient.tolist() == [1.5, 1.5]

    plain = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    for scale in [1.0] + [2 ** -9] * 256:
        (plain * scale).sum().backward()
    assert plain.grad.tolist() == [1.0, 1.0]  # what autograd's own sum makes of it


def test_bf16_weights_are_the_rounded_masters():
    """Masters begin as the weights and move as an fp32 AdamW given the same gradients moves."""
    model = small_model(torch.bfloat16)
    optimizer = MasterAdamW(model.parameters(), **SETTINGS)
    masters = [p.detach().float() for p in model.parameters()]
    adamw = torch.optim.AdamW(masters, **SETTINGS)
    for step in range(5):
        backward(model, step)
        for master, gradient in zip(masters, optimizer.gradients(), strict=True):
            master.grad = gradient.clone()
        adamw.step()
        optimizer.step()
        for p, ours, expected in zip(model.parameters(), optimizer.masters, masters, strict=True):
            torch.testing.assert_close(ours, expected, atol=1e-7, rtol=1e-6)
            assert p.dtype == torch.bfloat16 and torch.equal(p, ours.bfloat16())


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
def test_offload_changes_where_the_step_runs_and_not_the_weights(dtype):
    """On a machine without GPU both places are the same memory, but the masters are copies, of fp32 weights too."""
    near, far = small_model(dtype), small_model(dtype)
    optimizer, offloaded = (MasterAdamW(model.parameters(), **SETTINGS, offload=offload)
                            for model, offload in ((near, False), (far, True)))
    assert all(m is not p and m.data_ptr() != p.data_ptr() and m.is_cpu and m.dtype == torch.float32
               for m, p in zip(offloaded.masters, far.parameters(), strict=True))
    for step in range(5):
        train(near, optimizer, [step])
        train(far, offloaded, [step])
        assert_equal(near, far)
    assert not torch.equal(far[0].weight, small_model(dtype)[0].weight)


def test_frozen_parameters_are_left_out():
    """As under LoRA: no master, no moments, no gradient, no change, weight decay or not."""
    model = small_model(torch.bfloat16)
    model[0].requires_grad_(False)
    optimizer = MasterAdamW(model.parameters(), **SETTINGS)
    train(model, optimizer, range(3))
    assert [tuple(master.shape) for master in optimizer.masters] == [(3, 5), (3,)]
    assert len(optimizer.state_dict()["adamw"]["state"]) == 2
    start = small_model(torch.bfloat16)
    assert torch.equal(model[0].weight, start[0].weight) and not torch.equal(model[2].weight, start[2].weight)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
def test_a_parameter_that_got_no_gradient_has_a_zero_one(dtype):
    """A process whose groups were all equal has none to add to the others' sum; the list must still fit theirs."""
    model = small_model(dtype)
    optimizer = MasterAdamW(model.parameters(), **SETTINGS)
    model[2](torch.zeros(1, 5, dtype=dtype)).sum().backward()  # model[0] takes no part
    gradients = optimizer.gradients()
    assert [tuple(g.shape) for g in gradients] == [tuple(p.shape) for p in model.parameters()]
    assert {g.dtype for g in gradients} == {torch.float32}
    assert [g.abs().sum().item() for g in gradients] == [0, 0, 0, 3]  # only the last bias has one


@pytest.mark.parametrize("offload", (False, True), ids=("", "offload"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
def test_zero_grad_frees_every_gradient(dtype, offload):
    """The sampler's cache needs the memory; so does step() when it is done."""
    for free in (MasterAdamW.zero_grad, MasterAdamW.step):
        model = small_model(dtype)
        optimizer = MasterAdamW(model.parameters(), **SETTINGS, offload=offload)
        backward(model, 0)
        assert len(optimizer.gradients()) == 4
        free(optimizer)
        assert optimizer.sums == {}
        assert all(tensor.grad is None for tensor in [*model.parameters(), *optimizer.masters])


# --------------------------------------------------------------------------------------------------------------- resume
@pytest.mark.parametrize("offload", (False, True), ids=("", "offload"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
def test_training_continues_from_a_state_dict_bit_for_bit(dtype, offload):
    """Three steps, a checkpoint, three more: the weights of six in one go. bf16 weights alone would not do, the part
    of the masters that they round away is in the state."""
    whole = small_model(dtype)
    train(whole, MasterAdamW(whole.parameters(), **SETTINGS, offload=offload), range(6))
    first = small_model(dtype)
    optimizer = MasterAdamW(first.parameters(), **SETTINGS, offload=offload)
    train(first, optimizer, range(3))
    state, weights = reread(optimizer.state_dict()), reread(first.state_dict())

    second = small_model(dtype)
    second.load_state_dict(weights)
    resumed = MasterAdamW(second.parameters(), **{**SETTINGS, "lr": 1.0}, offload=offload)  # its own lr is in the state
    resumed.load_state_dict(state)
    assert resumed.adamw.param_groups[0]["lr"] == 1e-3
    for a, b in zip(resumed.masters, optimizer.masters, strict=True):
        assert torch.equal(a, b)
    resumed.set_learning_rate(1e-3)  # must reach the groups that the next step uses
    train(second, resumed, range(3, 6))
    assert_equal(second, whole)


def test_only_masters_that_are_copies_are_saved():
    """4 bytes a parameter, which a model in fp32 has in its own checkpoint."""
    for dtype, offload, copies in ((torch.float32, False, 0), (torch.float32, True, 4), (torch.bfloat16, False, 4)):
        optimizer = MasterAdamW(small_model(dtype).parameters(), **SETTINGS, offload=offload)
        assert sum(master is not None for master in optimizer.state_dict()["masters"]) == copies


# ------------------------------------------------------------------------------------------------------------- clipping
def test_clipping_scales_to_the_norm_and_returns_the_one_before():
    """Norm over all gradients together: sqrt(3^2 + 4^2 + 12^2) = 13, so a limit of 6.5 halves them."""
    gradients = [torch.tensor([3.0, 4.0]), torch.tensor([[12.0]])]
    assert clip_gradients(gradients, 6.5) == 13.0
    assert gradients[0].tolist() == pytest.approx([1.5, 2.0]) and gradients[1].item() == pytest.approx(6.0)
    assert clip_gradients(gradients, 100.0) == pytest.approx(6.5)  # below the limit: not scaled up
    assert gradients[0].tolist() == pytest.approx([1.5, 2.0]) and gradients[1].item() == pytest.approx(6.0)
    zeros = [torch.zeros(3)]
    assert clip_gradients(zeros, 1.0) == 0.0 and zeros[0].tolist() == [0, 0, 0]


@pytest.mark.parametrize("limit", (0.01, 1.0, 1e6))
def test_clipping_agrees_with_torch(limit):
    ours, theirs = small_model(), small_model()
    backward(ours, 0)
    backward(theirs, 0)
    norm = clip_gradients(MasterAdamW(ours.parameters(), **SETTINGS).gradients(), limit)
    assert norm == torch.nn.utils.clip_grad_norm_(theirs.parameters(), limit).item()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_clipping_a_bf16_model_changes_the_sums_that_the_step_uses():
    """Adam hides a common factor, but for its eps: with a clipped norm of 1e-8 = eps the first step is half of lr."""
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    optimizer = MasterAdamW([parameter], lr=1e-3)
    (parameter * 5).sum().backward()
    assert clip_gradients(optimizer.gradients(), 1e-8) == 5.0
    optimizer.step()
    assert optimizer.masters[0].item() == pytest.approx(-0.5e-3, rel=1e-3)


def test_a_broken_gradient_gives_a_norm_that_is_not_finite():
    """train_countdown.py stops there, with the last good weights."""
    norm = clip_gradients([torch.tensor([1.0, torch.inf]), torch.ones(2)], 1.0)
    assert norm == torch.inf
