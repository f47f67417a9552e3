"""EoMT: learnable queries join the patch tokens inside a plain ViT, which then segments by itself.

Kerssies et al., "Your ViT is Secretly an Image Segmentation Model", CVPR 2025. Parameter names are those of the
published code, so its checkpoints load as they are.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from eomt.models.cosine_head import CosineHead
from eomt.models.scale_block import ScaleBlock
from eomt.models.tracing import is_traced
from eomt.models.vit import QueryMask, attend


class Prediction(NamedTuple):
    """Q masks and their classes. The masks are left as the product they are, which is rarely needed as a whole.

    embeddings: of the queries, [B, Q, C].
    features: of the pixels, [B, C, H/4, W/4], channels last in memory.
    class_logits: [B, Q, K + 1].
    """

    embeddings: Tensor
    features: Tensor
    class_logits: Tensor

    def mask_logits(self, size: tuple[int, int] | None = None) -> Tensor:
        """[B, Q, H/4, W/4]; or at another size (bilinear), which is cheap: masks are linear in the features."""
        features = F.interpolate(self.features, size, mode="bilinear") if size else self.features
        return multiply(self.embeddings, features)

    def masks_of(self, queries: Tensor) -> Tensor:
        """Mask logits [B, M, H/4, W/4] of M queries of each image, int64 [B, M]."""
        chosen = queries[..., None].expand(-1, -1, self.embeddings.shape[2])
        return multiply(self.embeddings.gather(1, chosen), self.features)


def multiply(embeddings: Tensor, features: Tensor) -> Tensor:
    """[B, Q, C] times [B, C, h, w] -> [B, Q, h, w], so that the gradient of the features has channels last, too."""
    # transpose(1, 2) is mT, which exporters to ONNX do not all know
    masks = features.flatten(2).transpose(1, 2) @ embeddings.transpose(1, 2)  # [B, h * w, Q]
    return masks.transpose(1, 2).unflatten(2, features.shape[2:])


class Encoder(Protocol):
    """The encoder of an EoMT: an `nn.Module` with these attributes; `ViT` is one over timm.

    LoRA adapts its `backbone` if it has one, or else all of it. `norm` and `blocks` say which learning rate decays how
    far. Attention goes through `F.scaled_dot_product_attention`, where a block hands on its `attn_mask`.
    """

    img_size: tuple[int, int]  # height, width in pixels
    patch_size: int
    grid_size: tuple[int, int]  # patches down, across
    embed_dim: int
    num_prefix_tokens: int  # class and register tokens, before the patches
    blocks: nn.ModuleList  # each: (x [B, N, C], attn_mask=None) -> [B, N, C], with `rope=` where `embed` returns one
    norm: nn.Module

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images [B, 3, H, W] in [0, 1] -> tokens [B, prefix + N, C], and rotary embeddings or None."""
        ...


class EoMT(nn.Module):
    """Encoder-only mask transformer.

    Args:
        encoder: a `ViT`, or another `Encoder`.
        num_classes: K known classes; class logits have one more, "no object", in the last place.
        num_q: number of queries, Q.
        num_blocks: how many last blocks see the queries, L.
        masked_attn_enabled: predict before each of these blocks and let a query attend to its own mask only.
        checkpoint_predictions: keep little of the predictions for the backward pass and compute them again there: they
            hold much of the activations.
        cosine_scale: class logits are cosines times this (`CosineHead`); None: a linear layer, as published.

    `attn_mask_probs` [L] holds, per block, the probability that a query is masked: 1 at the start of training,
    annealed to 0, so that the deployed network needs no masks (section 3.2).
    """

    mask_type: type[Tensor] = QueryMask  # of `attention_mask`

    def __init__(
        self,
        encoder: Encoder,
        num_classes: int,
        num_q: int = 100,
        num_blocks: int = 4,
        masked_attn_enabled: bool = True,
        checkpoint_predictions: bool = False,
        cosine_scale: float | None = None,
    ) -> None:
        super().__init__()
        depth, dim = len(encoder.blocks), encoder.embed_dim
        for name, value, low, high in (
            ("num_classes", num_classes, 1, None),
            ("num_q", num_q, 1, None),
            ("num_blocks", num_blocks, 1, depth),
        ):
            if value < low or (high is not None and value > high):
                wanted = f"at least {low}" if high is None else f"between {low} and the backbone's depth {high}"
                raise ValueError(f"{name} {value}: must be {wanted}")
        self.encoder = encoder
        self.num_q = num_q
        self.num_blocks = num_blocks
        self.masked_attn_enabled = masked_attn_enabled
        self.checkpoint_predictions = checkpoint_predictions

        self.register_buffer("attn_mask_probs", torch.ones(num_blocks))
        self.q = nn.Embedding(num_q, dim)
        linear = cosine_scale is None
        self.class_head = nn.Linear(dim, num_classes + 1) if linear else CosineHead(dim, num_classes + 1, cosine_scale)
        self.mask_head = nn.Sequential(
            nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim)
        )
        num_upscale = max(1, int(math.log2(encoder.patch_size)) - 2)
        self.upscale = nn.Sequential(*[ScaleBlock(dim) for _ in range(num_upscale)])

        # Rotary positions are for patches only, and the queries stand before them.
        for block in encoder.blocks[depth - num_blocks :]:
            if hasattr(getattr(block, "attn", None), "num_prefix_tokens"):
                block.attn.num_prefix_tokens = encoder.num_prefix_tokens + num_q

    def compile_parts(self) -> None:
        """Compiles the blocks and the upscaling in place, which take most of the time; outputs stay what they are."""
        for part in (*self.encoder.blocks, self.upscale):
            part.compile()

    @property
    def num_classes(self) -> int:
        """K, "no object" not counted."""
        return self.class_head.out_features - 1

    def forward(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Predicts Q masks and their classes, before each masked block and at the end.

        Args:
            images: [B, 3, H, W] in [0, 1].

        Returns:
            Mask logits [B, Q, H/4, W/4] and class logits [B, Q, K + 1], a list entry per prediction: L + 1 with masked
            attention, otherwise the final one alone. In evaluation mode, what is compiled, exported or traced is the
            deployed network, with the final one alone: a graph cannot read the masks' probabilities.
        """
        predictions = self.predictions(images)
        return [p.mask_logits() for p in predictions], [p.class_logits for p in predictions]

    def predictions(self, images: Tensor) -> list[Prediction]:
        """`forward`, with masks that are not multiplied out."""
        before_queries = len(self.encoder.blocks) - self.num_blocks
        return self.predictions_from(*self.trunk(images, before_queries), before_queries)

    def trunk(self, images: Tensor, depth: int) -> tuple[Tensor, Tensor | None]:
        """Tokens [B, P + N, C] (prefix, patches) after the first blocks, as many as `depth`, and rotary embeddings."""
        x, rope = self.encoder.embed(images)
        for block in self.encoder.blocks[:depth]:
            x = attend(block, x, rope)
        return x, rope

    def predictions_from(self, x: Tensor, rope: Tensor | None, depth: int) -> list[Prediction]:
        """Returns `predictions` from the output of `trunk`; its depth is at most that of the backbone less L."""
        blocks = self.encoder.blocks
        for block in blocks[depth : -self.num_blocks]:
            x = attend(block, x, rope)

        queries = self.q.weight.expand(x.shape[0], -1, -1)
        x = torch.cat((queries, x), dim=1)  # [B, Q + P + N, C]
        if not self.masked_attn_enabled or (is_traced() and not self.training):
            for block in blocks[-self.num_blocks :]:
                x = attend(block, x, rope)
            return [self.predict(x)]

        predictions = []
        for block, prob in zip(blocks[-self.num_blocks :], self.attn_mask_probs.tolist(), strict=True):
            predictions.append(self.predict(x))
            x = attend(block, x, rope, self.attention_mask(predictions[-1], prob))
        return [*predictions, self.predict(x)]

    @contextmanager
    def deployed(self) -> Iterator[None]:
        """Without masked attention, as it is evaluated and used: the final prediction alone."""
        enabled, self.masked_attn_enabled = self.masked_attn_enabled, False
        try:
            yield
        finally:
            self.masked_attn_enabled = enabled

    def predict(self, x: Tensor) -> Prediction:
        """From tokens [B, Q + P + N, C]."""
        if self.checkpoint_predictions and torch.is_grad_enabled():
            return checkpoint(self.predict_plainly, x, use_reentrant=False, preserve_rng_state=False)
        return self.predict_plainly(x)

    def predict_plainly(self, x: Tensor) -> Prediction:
        """`predict`, with everything kept for the backward pass."""
        x = self.encoder.norm(x)
        queries = x[:, : self.num_q]
        pixels = x[:, self.num_q + self.encoder.num_prefix_tokens :]  # [B, N, C]
        pixels = pixels.transpose(1, 2).unflatten(2, self.encoder.grid_size)  # [B, C, H/p, W/p]
        return Prediction(self.mask_head(queries), self.upscale(pixels), self.class_head(queries))

    @torch.no_grad()
    def attention_mask(self, prediction: Prediction, prob: float) -> Tensor | None:
        """Marks the tokens that each query may attend to: [B, 1, Q, Q + P + N], or None when nothing is masked.

        A query sees all queries and prefix tokens, but of the patches those inside its own mask only; with probability
        1 - `prob` it sees all of them. Patches and prefix tokens see everything.
        """
        if prob == 0:
            return None
        inside = prediction.mask_logits(self.encoder.grid_size).flatten(2) > 0  # [B, Q, N]
        inside |= torch.rand(inside.shape[:2], device=inside.device)[..., None] > prob
        others = self.num_q + self.encoder.num_prefix_tokens
        return F.pad(inside, (others, 0), value=True)[:, None].as_subclass(self.mask_type)
