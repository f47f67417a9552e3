"""Class logits as scaled cosines: the head of ArcFace."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CosineHead(nn.Module):
    """`scale` times the cosine of the angle between a query and each class's weight: logits in [-scale, scale].

    Deng et al., "ArcFace", CVPR 2019, section 2. The same logits serve the matcher, the loss, which adds the margin by
    itself (`add_margin`), and inference; "no object", the last one, is a cosine as well and never has a margin.

    Args:
        in_features: C. out_features: K + 1. scale: s, at least 1.
    """

    def __init__(self, in_features: int, out_features: int, scale: float) -> None:
        super().__init__()
        self.in_features, self.out_features, self.scale = in_features, out_features, scale
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        nn.init.normal_(self.weight, std=in_features**-0.5)

    def forward(self, queries: Tensor) -> Tensor:
        """[B, Q, C] -> [B, Q, K + 1]."""
        return self.scale * F.linear(F.normalize(queries, dim=-1), F.normalize(self.weight, dim=-1))
