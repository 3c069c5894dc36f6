"""Several processes, one GPU each: who takes which prompts, sums over all of them, weights split among them (FSDP).

    torchrun --nproc-per-node 8 --shutdown-timeout 3600 train_countdown.py --device cuda

On Ctrl-C torchrun waits for the step in progress and its checkpoint, but by default for 30 seconds only.

Every process (its number is its rank) runs the same script on its share of a step's prompts. What they must agree on
meets here. Without torchrun there is one process and every function leaves things as they are, so that a script needs
no second path.

The functions marked "all ranks" wait until every rank calls them: call them in the same order everywhere, never under
a condition that could differ between ranks.
"""

import copy
import os
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from machinery.checkpoints import check_device
from model import Model


def start(device: str) -> str:
    """Joins the other processes that torchrun started -> this one's device: cuda:0, cuda:1, ... or cpu.

    Raises ValueError for a device that is not there, and for more processes than GPUs."""
    check_device(device)
    if "LOCAL_RANK" not in os.environ:  # not started by torchrun
        return device
    backend = "gloo"
    if device.startswith("cuda"):
        if local_size() > torch.cuda.device_count():
            raise ValueError(f"got {local_size()} processes on a machine with {torch.cuda.device_count()} GPUs, expected "
                             "one process a GPU; lower --nproc-per-node")
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        backend = "cpu:gloo,cuda:nccl"  # lists and numbers need not wait for the GPU
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, os.cpu_count() // local_size()))  # else each process would use every core
    # hours, because the others wait while one evaluates or saves; when a process dies, torchrun stops the others itself
    dist.init_process_group(backend, timeout=timedelta(hours=2))
    return device


def local_size() -> int:
    """Processes of this run on this machine, which share its memory and its cores."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def started() -> bool:
    """Whether torchrun started this process."""
    return dist.is_initialized()


def rank() -> int:
    """0 for the process that prints, logs and saves."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def own_part(n: int) -> range:
    """Which of a step's n prompts this rank takes. In rank order the parts cover all n; sizes differ by at most 1."""
    if n < world_size():
        raise ValueError(f"got {n} prompts a step for {world_size()} processes, expected at least one each; raise "
                         "--batch-size, lower --group-size or start fewer processes")
    return range(n * rank() // world_size(), n * (rank() + 1) // world_size())


def gather(rows: list) -> list:
    """All ranks: every rank's list, one after the other in rank order. Rows are anything that pickle takes."""
    lists = [rows] * world_size()
    if world_size() > 1:
        dist.all_gather_object(lists, rows)
    return [row for rows in lists for row in rows]


def sum_over_ranks(values: dict[str, float]) -> dict[str, float]:
    """All ranks: sums by name, in float64. A rank that trained on nothing lacks some names; it adds 0 to them."""
    sums = {}
    for row in gather([values]):
        for name, value in row.items():
            sums[name] = sums.get(name, 0.0) + value
    return sums


def max_over_ranks(values: list[float]) -> float:
    """All ranks: the largest of all their values; nan if one is, which Python's max would lose."""
    return torch.tensor(gather(values), dtype=torch.float64).max().item()


def any_rank(flag: bool) -> bool:
    """All ranks: whether it holds on one of them, so that all stop, or save, at the same step."""
    return any(gather([flag]))


def barrier() -> None:
    """All ranks: nobody goes on before everybody is here."""
    if dist.is_initialized():
        dist.barrier()


def sum_gradients(gradients: list[torch.Tensor]) -> None:
    """All ranks: each tensor becomes its sum over the ranks, in place. Sharded ones stay: backward() summed those.

    The sum, not the mean: each rank divided its loss by the tokens of the whole step. A rank that trained on nothing
    brings zeros."""
    if any(isinstance(gradient, nn.Parameter) for gradient in gradients):
        raise ValueError("got parameters, expected their gradients; pass [parameter.grad for ...]")
    for gradient in gradients:
        if world_size() > 1 and not is_split(gradient):
            dist.all_reduce(gradient)


def is_split(tensor) -> bool:
    """Whether this is one rank's part of a tensor: a DTensor. To import that class takes half a second of every start,
    so its imports stand where something is split, and its method tells it from a plain tensor."""
    return hasattr(tensor, "full_tensor")


def shard(model: Model, *, dtype: torch.dtype) -> None:
    """All ranks: splits each parameter, and with it gradient and optimizer state, over the ranks. Before the optimizer.

    A block's weights are put together when forward or backward reaches it, in `dtype`, and dropped behind it; the
    shards stay in the model's own dtype, so load it in fp32. backward() sums the gradients over the ranks, in fp32.
    Train through model(...): model.hidden(...) alone would not put the root's weights together."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if not dist.is_initialized():
        return
    empty = {id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta", dtype=dtype))
             for parameter in model.parameters()}
    skeleton = copy.deepcopy(model, empty)  # for whole_weights; deepcopy takes from `empty` what it finds there
    mesh = init_device_mesh("cuda" if "nccl" in dist.get_backend_config() else "cpu", (world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for module in (*model.model["layers"], model):
        # the root too: FSDP would keep its weights after a forward without backward, and they would outlive a step
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        # the default is the mean. A sum, and no division through an NCCL-only operation, which gloo lacks
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    model.skeleton = (skeleton,)  # in a tuple, so that it is no submodule; only a sharded model has one


def add_missing_passes(model: Model, passes: int) -> None:
    """All ranks, before the micro-batches of an optimizer step; passes: how many this rank has, 0 too.

    Under FSDP a forward and a backward are collective, so a rank with fewer micro-batches than the others would leave
    them waiting for ever. It makes up for it here, with passes over one token whose gradient is zero."""
    if hasattr(model, "skeleton"):
        for _ in range(int(max_over_ranks([passes])) - passes):
            logits = model(torch.zeros(1, 1, dtype=torch.long, device=model.lm_head.weight.device))  # (1, 1, V)
            (logits * 0).sum().backward()


@contextmanager
def whole_weights(model: Model):
    """All ranks: `with whole_weights(model) as whole`, where whole is a Model that needs no other rank: for sampling
    and scoring, where ranks make different numbers of forward passes.

    A model that is not sharded comes back as it is. A sharded one is copied: `dtype` of shard(), so 2 bytes a parameter
    in bf16, until the block ends, and without FSDP's hooks around every block of every decoding step."""
    if not hasattr(model, "skeleton"):
        yield model
        return
    skeleton, = model.skeleton
    tensors = {id(empty): buffer for empty, buffer in zip(skeleton.buffers(), model.buffers(), strict=True)}
    for empty, parameter in zip(skeleton.parameters(), model.parameters(), strict=True):
        full = parameter.detach().to(empty.dtype).full_tensor()
        tensors[id(empty)] = nn.Parameter(full, requires_grad=False)
    whole = copy.deepcopy(skeleton, tensors)
    del tensors, full
    try:
        yield whole
    finally:
        whole.to("meta")  # the caller's name for it outlives the block; the memory must not


def full_state(tree):
    """All ranks: a state dict (of a model or an optimizer) with every sharded tensor whole, on the CPU of rank 0.

    The other ranks get None in their place. What is not sharded stays as it is."""
    if is_split(tree):
        whole = tree.detach().full_tensor()
        return whole.cpu() if rank() == 0 else None
    if isinstance(tree, dict):
        return {key: full_state(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(full_state(value) for value in tree)
    return tree


def load_optimizer(optimizer, state: dict) -> None:
    """optimizer.load_state_dict for what full_state made of any optimizer, sharded or not, on any number of ranks.

    Each rank reads the whole state and keeps its part; they need not meet."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def part(value, parameter):
        if is_split(parameter) and value.shape == parameter.shape:  # the moments; step is one number
            from torch.distributed.tensor import distribute_tensor
            return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
        return value

    optimizer.load_state_dict({**state, "state": {
        index: {name: part(value, parameters[index]) for name, value in moments.items()}
        for index, moments in state["state"].items()}})
