"""AdamW for a model that computes in bf16: fp32 master weights, fp32 gradients, on the GPU or in host memory.

bf16 has 8 bits of precision: a weight of 0.02 moves in steps of 0.0001, and an update of 1e-6 is lost. So the model's
bf16 weights, which sampler and trainer share, are only a rounded copy. What AdamW moves are fp32 master weights, and
the copy is rounded anew after each step. Gradients are bf16 within one backward pass and are added up in fp32.

Bytes a parameter, on the GPU:  bf16 weight 2, fp32 gradient 4, master 4, AdamW's two moments 8: 18; with offload the
last three lines' 12 are in host memory, and the step itself runs on the CPU.

A model in fp32 is its own master: then this is torch.optim.AdamW and nothing else.
"""

import torch

from machinery.distributed import is_split, load_optimizer


@torch.no_grad()
def clip_gradients(gradients: list[torch.Tensor], max_norm: float) -> float:
    """Scales the gradients to this norm at most, in place -> the norm before, over all and, under FSDP, all shards."""
    norm = torch.nn.utils.get_total_norm(gradients)
    if is_split(norm):
        norm = norm.full_tensor()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient *= scale
    return norm.item()


class Muon(torch.optim.Optimizer):
    """For matrices: momentum (Nesterov's), made orthogonal (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

    torch.optim.Muon, but for one thing: that one makes orthogonal in bf16, which a CPU without bf16 units computes tens of
    times slower than fp32. Here it is fp32, whatever the machine."""

    def __init__(self, matrices, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(matrices, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonal(p.grad.lerp(momentum, group["momentum"]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * max(1, p.shape[0] / p.shape[1]) ** 0.5)


def orthogonal(matrix, steps: int = 5):
    """About U V^T of the matrix's U S V^T, by a quintic Newton-Schulz iteration: singular values end between 0.7 and 1.2,
    which serves as well as 1."""
    a, b, c = 3.4445, -4.775, 2.0315
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=1e-7)  # no singular value above 1
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class MasterAdamW:
    """AdamW over the parameters that require gradients."""

    def __init__(self, parameters, *, lr: float, betas=(0.9, 0.999), weight_decay: float = 0.0, offload: bool = False):
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.masters = [p if p.dtype == torch.float32 and not offload else
                        p.detach().to("cpu" if offload else p.device, torch.float32, copy=True)
                        for p in self.parameters]
        self.sums = {}  # parameter -> its gradient summed up in fp32, where the parameter is not fp32 itself
        for parameter in self.parameters:
            if parameter.dtype != torch.float32:
                parameter.register_post_accumulate_grad_hook(self.collect)
        self.adamw = torch.optim.AdamW(self.masters, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)

    def set_learning_rate(self, learning_rate: float) -> None:
        for settings in self.adamw.param_groups:
            settings["lr"] = learning_rate

    def collect(self, parameter) -> None:
        """Adds a micro-batch's bf16 gradient to the step's fp32 sum, and frees it, as soon as autograd has made it."""
        if parameter in self.sums:
            self.sums[parameter] += parameter.grad
        else:
            self.sums[parameter] = parameter.grad.float()
        parameter.grad = None

    def gradients(self) -> list[torch.Tensor]:
        """The step's fp32 gradients, in the parameters' order and on their device; changed in place by clipping."""
        for parameter in self.parameters:
            if parameter.dtype == torch.float32:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            elif parameter not in self.sums:
                self.sums[parameter] = torch.zeros_like(parameter, dtype=torch.float32)
        return [p.grad if p.dtype == torch.float32 else self.sums[p] for p in self.parameters]

    @torch.no_grad()
    def step(self) -> None:
        for parameter, master, gradient in zip(self.parameters, self.masters, self.gradients(), strict=True):
            if master is not parameter:
                master.grad = gradient.to(master.device)
        self.adamw.step()
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if master is not parameter:
                parameter.copy_(master)
        self.zero_grad()

    def zero_grad(self) -> None:
        """Frees all gradients: the sampler's cache needs the memory."""
        self.sums.clear()
        for tensor in self.parameters + self.masters:
            tensor.grad = None

    def state_dict(self) -> dict:
        """Moments and step counts, and the masters where the model itself is not fp32."""
        return {"adamw": self.adamw.state_dict(),
                "masters": [None if m is p else m for p, m in zip(self.parameters, self.masters, strict=True)]}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        load_optimizer(self.adamw, state["adamw"])
        for master, saved in zip(self.masters, state["masters"], strict=True):
            if saved is not None:
                master.copy_(saved)
