"""LoRA (arXiv 2106.09685): small trained adapters on the matrices of a frozen model.

    add_lora(model, rank, alpha, seed)     once, before the optimizer
    with merged(model): ...                sample, or save, with the adapters added to the weights
    with without_lora(model): ...          the frozen model: the KL's reference, without a second copy
"""

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from model import Linear, Model


class LoraLinear(Linear):
    """x W^T + bias + scale * (x A^T) B^T (equation 3), with A (rank, in) and B (out, rank). W and bias are those of the
    layer whose place it takes, and keep their names in the state dict."""

    def __init__(self, linear: Linear, rank: int, alpha: float, generator: torch.Generator):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        a = torch.randn(rank, self.in_features, generator=generator) * self.in_features ** -0.5
        self.lora_a = nn.Parameter(a.to(self.weight))
        self.lora_b = nn.Parameter(self.weight.new_zeros(self.out_features, rank))
        self.scale, self.adapted = alpha / rank, True

    def forward(self, x):
        y = super().forward(x)
        return y + F.linear(F.linear(x, self.lora_a), self.lora_b) * self.scale if self.adapted else y


def add_lora(model: Model, rank: int, alpha: float, seed: int) -> None:
    """Freezes the model and puts an adapter on every matrix of its blocks. A is random and B zero, so that training starts
    from the frozen model. A matrix of 2,048 x 11,008 trains 13,056 numbers per unit of rank, instead of 22.5 million."""
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    for block in model.model["layers"]:
        for part in (block.self_attn, block.mlp):
            for name, module in list(part.named_children()):
                if isinstance(module, Linear):
                    setattr(part, name, LoraLinear(module, rank, alpha, generator))


def lora_layers(model: Model) -> list[LoraLinear]:
    return [module for module in model.modules() if isinstance(module, LoraLinear)]


@contextmanager
def merged(model: Model):
    """Inside, W + scale * B A stands in W's place: sampling costs nothing extra, and save() writes a plain checkpoint.

    Rounding makes "add, then subtract" inexact, so the frozen weights are put back from a copy in host memory. In bf16
    the sum itself is rounded, and what is less than half a step of W is lost: sampler and trainer differ by that, and
    logprob_gap says how much. A model without adapters is left as it is."""
    layers = lora_layers(model)
    with torch.no_grad():
        for module in layers:
            if not hasattr(module, "frozen"):
                module.frozen = module.weight.to("cpu", copy=True)  # once: these weights never change
            module.weight += module.scale * (module.lora_b.float() @ module.lora_a.float())
            module.adapted = False
    try:
        yield
    finally:
        with torch.no_grad():
            for module in layers:
                module.weight.copy_(module.frozen)
                module.adapted = True


@contextmanager
def without_lora(model: Model):
    """Inside, the model is the frozen one: the KL's reference, without a second copy."""
    for module in lora_layers(model):
        module.adapted = False
    try:
        yield
    finally:
        for module in lora_layers(model):
            module.adapted = True
