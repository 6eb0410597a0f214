"""Ours and torch's own count of the operations of a module."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from modiff.evaluate.cost import measure_cost


def measure(module, *inputs):
    return measure_cost(module, lambda: module(*inputs))


def torch_macs(module, *inputs):
    """torch's own count; it counts two operations per MAC and knows no fused attention on the CPU."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        module(*inputs)
    assert counter.get_total_flops() % 2 == 0
    return counter.get_total_flops() // 2
