"""One doubling of the patch grid on the way to the mask resolution."""

import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn


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
        return self.norm(self.conv2(self.act(self.double_size(x))))

    def double_size(self, x: Tensor) -> Tensor:
        """`conv1(x)`: with stride 2 its windows do not overlap, so it is a linear layer from a pixel to four."""
        weight = self.conv1.weight.permute(2, 3, 1, 0).flatten(0, 2)  # [2 * 2 * C, C]
        x = F.linear(x.permute(0, 2, 3, 1), weight, self.conv1.bias.repeat(4))
        x = x.unflatten(3, (2, 2, -1)).transpose(2, 3)  # [B, H, 2, W, 2, C]
        return x.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)
