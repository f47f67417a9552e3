"""Class logits as scaled cosines: the head of ArcFace."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CosineHead(nn.Module):
    """`scale` times the cosine of the angle between a query and each class's weight: logits in [-scale, scale].

    Deng et al., "ArcFace", CVPR 2019. The same logits serve the matcher, the loss, which adds the margin by itself
    (`add_margin`), and inference; "no object", the last one, is a cosine as well and never has a margin.

    The scale is a buffer, so that a checkpoint says which one its weights were trained with.

    Args:
        in_features: C. out_features: K + 1. scale: s.
    """

    def __init__(self, in_features: int, out_features: int, scale: float) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.register_buffer("scale", torch.tensor(float(scale)))
        nn.init.normal_(self.weight, std=in_features**-0.5)

    def forward(self, queries: Tensor) -> Tensor:
        """[B, Q, C] -> [B, Q, K + 1], in float32: bf16 would round logits of 30 to steps of 0.125."""
        with torch.autocast(queries.device.type, enabled=False):
            cosine = F.linear(F.normalize(queries.float(), dim=-1), F.normalize(self.weight.float(), dim=-1))
            return self.scale * cosine
