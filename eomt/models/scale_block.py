"""One doubling of the patch grid on the way to the mask resolution."""

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
        """[B, C, H, W] -> [B, C, 2H, 2W]."""
        return self.norm(self.conv2(self.act(self.conv1(x))))
