"""Counted floating-point operations, the same on a GPU, on a CPU and on tensors without values."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count, sdpa_backward_flop_count, sdpa_flop_count

Shape = Sequence[int]


def flop_counter() -> FlopCounterMode:
    """A context that counts two operations a multiplication: of matrix products, convolutions and attention.

    It is torch's own, but for the backward pass of grouped convolutions, of which torch counts the weight's gradient
    as that of a dense one, `groups` times too much, and for attention on CPUs, which older releases leave out.
    """
    aten = torch.ops.aten
    counter = FlopCounterMode(
        display=False,
        custom_mapping={
            aten.convolution_backward: convolution_backward_flops,
            aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
        },
    )
    counter.mod_tracker = Everywhere()
    return counter


class Everywhere(nullcontext):
    """In place of `ModuleTracker`, whose hooks keep activations alive: counts are of the whole, not of each module."""

    parents = frozenset({"Global"})


def convolution_backward_flops(
    grad_output: Shape,
    images: Shape,
    weight: Shape,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    output_mask: Sequence[bool],
    **_: Any,
) -> int:
    """From shapes: the gradients of images and weight take as many products each as the convolution did."""
    return sum(output_mask[:2]) * conv_flop_count(images, weight, grad_output, transposed)


def attention_flops(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """Two products of shapes [B, heads, N, d]."""
    return sdpa_flop_count(query, key, value)


def attention_backward_flops(grad_output: Shape, query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """Five products, since the scores are computed again."""
    return sdpa_backward_flop_count(grad_output, query, key, value)
