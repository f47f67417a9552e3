"""One doubling of the patch grid on the way to the mask resolution."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from eomt.models.tracing import is_traced

aten = torch.ops.aten


class ScaleBlock(nn.Module):
    """Upscales features by two: transposed convolution, GELU, depthwise 3x3 convolution, layer norm.

    Follows the published EoMT (Kerssies et al., CVPR 2025, section 3.1), parameter names included.
    """

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.conv1 = nn.ConvTranspose2d(embed_dim, embed_dim, kernel_size=2, stride=2)
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(embed_dim, embed_dim, kernel_size=3, padding=1, groups=embed_dim, bias=False)
        self.norm = LayerNorm2d(embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, 2H, 2W], both channels last in memory."""
        wide = self.double_size(x)
        if is_traced():  # compilers fuse and recompute by themselves; files hold no autograd functions of ours
            return self.plainly(wide)
        kernel = self.conv2.weight.to(wide.dtype)
        return Refine.apply(wide, kernel, self.norm.weight, self.norm.bias, self.norm.eps)

    def double_size(self, x: Tensor) -> Tensor:
        """`conv1(x)`: with stride 2 its windows do not overlap, so it is a linear layer from a pixel to four.

        Returns a view [B, H, 2, W, 2, C]; in memory the four lie beside each other: [B, H, W, 2, 2, C].
        """
        weight = self.conv1.weight.permute(2, 3, 1, 0).flatten(0, 2)  # [2 * 2 * C, C]
        x = F.linear(x.permute(0, 2, 3, 1), weight, self.conv1.bias.repeat(4))
        return x.unflatten(3, (2, 2, -1)).transpose(2, 3)

    def plainly(self, wide: Tensor) -> Tensor:
        """Computes the same as `Refine` from `double_size`, as the paper has it."""
        return self.norm(self.conv2(self.act(as_map(wide)))).to(wide.dtype)


class Refine(torch.autograd.Function):
    """GELU, depthwise convolution and layer norm, of which the backward pass keeps no more than the input.

    The rest is computed again there: maps of this size take longer to bring into memory than to compute.
    """

    @staticmethod
    def forward(ctx: Any, wide: Tensor, kernel: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """`double_size` [B, H, 2, W, 2, C] -> [B, C, 2H, 2W]; kernel [C, 1, 3, 3]; weight and bias of the norm, [C]."""
        convolved = convolve(activate(wide), kernel).permute(0, 2, 3, 1).to(weight.dtype)
        normed, mean, rstd = aten.native_layer_norm(convolved, weight.shape, weight, bias, eps)
        ctx.save_for_backward(wide, kernel, weight, bias, mean, rstd)
        return normed.permute(0, 3, 1, 2).to(wide.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of the inputs, from that of the output."""
        wide, kernel, weight, bias, mean, rstd = ctx.saved_tensors
        _, of_kernel, of_weight, of_bias, _ = ctx.needs_input_grad
        activated = activate(wide)
        convolved = convolve(activated, kernel).permute(0, 2, 3, 1).to(weight.dtype)
        grad, grad_weight, grad_bias = aten.native_layer_norm_backward(
            *(grad.permute(0, 2, 3, 1).to(weight.dtype), convolved, weight.shape),
            *(mean, rstd, weight, bias, [True, of_weight, of_bias]),
        )
        del convolved
        grad, grad_kernel, _ = aten.convolution_backward(
            *(grad.permute(0, 3, 1, 2).to(kernel.dtype), activated, kernel),
            *(None, [1, 1], [1, 1], [1, 1], False, [0, 0], len(kernel), [True, of_kernel, False]),
        )
        del activated
        grad = grad.permute(0, 2, 3, 1).unflatten(2, (-1, 2)).unflatten(1, (-1, 2))
        grad_wide = torch.empty_like(wide)
        aten.gelu_backward(grad, wide, grad_input=grad_wide)
        return grad_wide, grad_kernel, grad_weight, grad_bias, None


def activate(wide: Tensor) -> Tensor:
    """GELU of [B, H, 2, W, 2, C], written where a map [B, C, 2H, 2W] with channels last has it."""
    out = torch.empty(wide.shape, dtype=wide.dtype, device=wide.device)
    return as_map(aten.gelu(wide, out=out))


def as_map(wide: Tensor) -> Tensor:
    """[B, H, 2, W, 2, C] -> [B, C, 2H, 2W]."""
    return wide.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


def convolve(features: Tensor, kernel: Tensor) -> Tensor:
    """Depthwise, 3x3."""
    return F.conv2d(features, kernel, padding=1, groups=len(kernel))
