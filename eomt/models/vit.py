"""A timm ViT as EoMT's encoder: pixels in, tokens out, one interface for every backbone family."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch._functorch.config
import torch.nn.functional as F
from timm.layers import RotaryEmbeddingDinoV3
from torch import Tensor, nn

from eomt.models.backbone_weights import BackboneReport, load_backbone
from eomt.models.resampling import create_resized
from eomt.models.tracing import is_traced
from eomt.settings.hub import given_up_soon
from eomt.settings.model import check_img_size

DECIDED = {"img_size", "patch_size", "num_classes", "global_pool", "checkpoint_path", "pretrained_cfg"}  # elsewhere
PLAIN_FAMILIES = ("vision_transformer", "eva", "deit")  # timm's modules: one sequence of blocks over patch tokens

USUAL = ("separate", "ij")  # how DINOv3 scales and orders the coordinates of patches


class ViT(nn.Module):
    """A plain ViT from timm (DINOv2, DINOv3, SigLIP2, `vit_*`, EVA) and its pixel normalisation.

    Args:
        img_size: (height, width) in pixels, multiples of `patch_size`.
        patch_size: side of a patch; pretrained patch embeddings of another size are resampled by timm.
        backbone_name: any timm ViT, e.g. `vit_large_patch14_reg4_dinov2`.
        pretrained: take timm's weights from the hub.
        weights: take those of a file in their place, see `load_backbone`.
        backbone_kwargs: passed to `timm.create_model`; `{embed_dim: 64, depth: 6, num_heads: 2}` makes a tiny one.
            DINOv3 has `rope_rescale_coords: 2.0` unless it is given (null: off), see `own_kwargs`. `norm_eps` is ours:
            what all norms add to the variance, where it is not timm's, as in transformers' EoMT on DINOv3.

    Raises:
        ValueError: impossible image size, unknown name, a model that is no plain ViT, or a file of other weights.
        ConnectionError: the pretrained weights could not be had.
    """

    def __init__(
        self,
        img_size: Sequence[int],
        patch_size: int = 16,
        backbone_name: str = "vit_large_patch14_reg4_dinov2",
        pretrained: bool = True,
        backbone_kwargs: Mapping[str, Any] | None = None,
        weights: str | Path | None = None,
    ) -> None:
        super().__init__()
        self.img_size = check_img_size(img_size, patch_size)
        self.patch_size = patch_size
        pretrained = pretrained and not weights
        kwargs = dict(backbone_kwargs or {})
        norm_eps = kwargs.pop("norm_eps", None)
        self.backbone = create_backbone(backbone_name, self.img_size, patch_size, pretrained, kwargs)
        if norm_eps is not None:
            set_norm_eps(self.backbone, norm_eps)
        self.report: BackboneReport | None = None
        if weights:
            self.report = load_backbone(self.backbone, backbone_name, weights, self.img_size, patch_size)
        self.resized = False
        config = self.backbone.pretrained_cfg
        self.register_buffer("pixel_mean", torch.tensor(config["mean"]).reshape(1, 3, 1, 1))
        self.register_buffer("pixel_std", torch.tensor(config["std"]).reshape(1, 3, 1, 1))

    @property
    def blocks(self) -> nn.ModuleList:
        return self.backbone.blocks

    @property
    def norm(self) -> nn.Module:
        return self.backbone.norm

    @property
    def embed_dim(self) -> int:
        return self.backbone.embed_dim

    @property
    def num_prefix_tokens(self) -> int:
        """Class and register tokens, which stand before the patches."""
        return self.backbone.num_prefix_tokens

    @property
    def grid_size(self) -> tuple[int, int]:
        """Patches (down, across)."""
        return self.img_size[0] // self.patch_size, self.img_size[1] // self.patch_size

    def normalize(self, images: Tensor) -> Tensor:
        """Images in [0, 1] to the mean and deviation that the backbone was pretrained with; done here alone."""
        if not is_traced():
            if not images.is_floating_point():
                raise ValueError(
                    f"images are {images.dtype}, but the model takes floats in [0, 1]: divide uint8 by 255"
                )
            low, high = images.aminmax()
            if not (low >= 0 and high <= 1):  # NaN fails too
                raise ValueError(
                    f"images range from {low:.3g} to {high:.3g}, but the model takes [0, 1] and normalises by itself; "
                    "divide uint8 images by 255 and drop any other normalisation"
                )
        return (images - self.pixel_mean) / self.pixel_std

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images [B, 3, H, W] in [0, 1] -> tokens [B, prefix + H/p * W/p, C], and rotary embeddings or None."""
        if tuple(images.shape[-2:]) != self.img_size:
            raise ValueError(
                f"image {list(images.shape[-2:])}: this model was built for img_size {list(self.img_size)}"
            )
        tokens = self.backbone._pos_embed(self.backbone.patch_embed(self.normalize(images)))
        tokens, rope = tokens if isinstance(tokens, tuple) else (tokens, None)
        return self.backbone.norm_pre(tokens), self.positions() if self.resized else rope

    @property
    def takes_any_size(self) -> bool:
        """Whether positions are computed from the grid, as DINOv3's, and none were learnt for one size."""
        rope = getattr(self.backbone, "rope", None)
        plain = isinstance(rope, RotaryEmbeddingDinoV3) and (rope.normalize_coords, rope.grid_indexing) == USUAL
        return plain and not rope.grid_offset and self.backbone.pos_embed is None

    @contextmanager
    def for_size(self, size: Sequence[int]) -> Iterator[None]:
        """The same network for images of another (height, width), which may be symbols of an export.

        Raises:
            ValueError: its positions were learnt for `img_size`.
        """
        if not self.takes_any_size:
            raise ValueError(
                f"the positions of this backbone were learnt for images of {self.img_size[0]}x{self.img_size[1]}, and "
                "for others they would be another network's; DINOv3's alone are computed for any size"
            )
        patch_embed = self.backbone.patch_embed
        before = self.img_size, patch_embed.img_size
        self.img_size, patch_embed.img_size, self.resized = tuple(size), None, True
        try:
            yield
        finally:
            (self.img_size, patch_embed.img_size), self.resized = before, False

    def positions(self) -> Tensor:
        """Rotary embeddings [N, 2 C'] of the grid; timm computes them with sizes that an export takes as constants."""
        centres = [(torch.arange(side, device=self.pixel_mean.device) + 0.5) / side for side in self.grid_size]
        grid = torch.stack(torch.meshgrid(*centres, indexing="ij"), dim=-1).flatten(0, 1)  # [N, 2], in (0, 1)
        return torch.cat(self.backbone.rope._get_pos_embed_from_coords(2 * grid - 1), dim=-1)


# When a compiled graph first runs, torch from 2.14 on looks for aliases of custom operators, of which there are none
# here, and refuses any subclass of Tensor.
if hasattr(torch._functorch.config, "check_custom_op_aliasing"):
    torch._functorch.config.check_custom_op_aliasing = False


class QueryMask(Tensor):
    """Marks the columns that the first Q rows of an attention may see, bool [B, 1, Q, N]; the other rows see all.

    Attention runs in two calls, equal to one with a mask [N, N], which would cost the rows without a mask the fast
    kernel and all of them N^2 mask entries. Like `torch.nn.attention.bias`, it acts where timm calls torch.
    """

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):  # noqa: ANN001
        with torch._C.DisableTorchFunctionSubclass():
            if function is F.scaled_dot_product_attention:
                return attention_in_two(*args, **(kwargs or {}))
            return function(*args, **(kwargs or {}))


def attention_in_two(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, dropout_p: float = 0.0, is_causal: bool = False
) -> Tensor:
    """Attention [B, heads, N, d] with a `QueryMask`."""
    masked, free = query.tensor_split([attn_mask.shape[2]], dim=2)
    masked = F.scaled_dot_product_attention(masked, key, value, attn_mask, dropout_p)
    free = F.scaled_dot_product_attention(free, key, value, None, dropout_p)
    return torch.cat((masked, free), dim=2)


def attend(block: nn.Module, x: Tensor, rope: Tensor | None, mask: QueryMask | None = None) -> Tensor:
    """One transformer block on tokens [B, N, C], the first of them masked if there is a mask."""
    return block(x, attn_mask=mask) if rope is None else block(x, rope=rope, attn_mask=mask)


def create_backbone(
    name: str, img_size: tuple[int, int], patch_size: int, pretrained: bool, kwargs: Mapping[str, Any]
) -> nn.Module:
    """The timm model, headless and ready for LoRA; see `ViT` for the arguments and errors."""
    family = name.split(".")[0]  # "family.tag" names one of its pretrained weights
    if not timm.is_model(family):
        known = timm.list_models("*vit*") + timm.list_models("eva*")
        similar = difflib.get_close_matches(name, known, n=3) or [model for model in known if name in model][:3]
        raise ValueError(
            f"backbone_name {name!r} is not a timm model; did you mean {' or '.join(similar) or 'a vit_*'}?"
        )
    no_plain_vit = f"backbone_name {name!r} is no plain ViT: EoMT needs one sequence of blocks over patch tokens"
    if timm.models.model_entrypoint(family).__module__.split(".")[-1] not in PLAIN_FAMILIES:
        raise ValueError(no_plain_vit)
    if name != family and name not in timm.list_pretrained(family):
        raise ValueError(f"backbone_name {name!r}: timm has {', '.join(timm.list_pretrained(family)) or 'no such tag'}")
    if kwargs.get("patch_drop_rate"):
        raise ValueError("backbone_kwargs patch_drop_rate: every patch is needed, masks are predicted from all of them")
    if pretrained and not timm.get_pretrained_cfg(name).has_weights and "pretrained_cfg_overlay" not in kwargs:
        raise ValueError(
            f"timm has no pretrained weights for {name!r}: set pretrained=false or choose another backbone"
        )
    if given := sorted(DECIDED & kwargs.keys()):
        raise ValueError(f"backbone_kwargs {given[0]}: the model's own settings decide it; leave it out")
    # without a pooling head, whose weights would never train; a distilled model has none, and takes "token" alone
    pool = "token" if "distilled" in family else ""
    options = {"pretrained": pretrained, "num_classes": 0, "global_pool": pool, **own_kwargs(family), **kwargs}
    create, sizes = partial(timm.create_model, name, **options), {"img_size": img_size, "patch_size": patch_size}
    from_hub = pretrained and "pretrained_cfg_overlay" not in kwargs
    try:
        with given_up_soon() if from_hub else nullcontext(True) as answers:
            if pretrained:
                backbone = create_resized(create, not from_hub or "flexi" in family, **sizes)
            else:
                backbone = create(**sizes)
    except (TypeError, ValueError, AssertionError, RuntimeError, ArithmeticError, LookupError, AttributeError) as error:
        # arguments, or weights of other shapes
        raise ValueError(f"backbone {name!r} with backbone_kwargs {dict(kwargs)}: {shorten(error)}") from error
    except Exception as error:
        if not pretrained:
            raise
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        if not answers:
            reason = "the hub does not answer, or HF_HUB_OFFLINE is set, and they were not fetched before"
        raise ConnectionError(
            f"pretrained weights of {name!r} could not be loaded ({reason}); "
            "ways out: connect to the hub, give a backbone with backbone_weights=FILE or an EoMT checkpoint with "
            "ckpt_path=FILE pretrained=false, or train from random weights with pretrained=false (on a command line "
            "model.pretrained=false, and so on)"
        ) from error
    if getattr(backbone, "rope_mixed", False) or not all(hasattr(block, "attn") for block in backbone.blocks):
        raise ValueError(no_plain_vit)
    apply_projection_layers(backbone)
    return backbone


def set_norm_eps(backbone: nn.Module, eps: Any) -> None:
    """Sets what the layer norms add to the variance; ValueError where it is no positive number."""
    if not isinstance(eps, float) or not eps > 0:
        raise ValueError(f"backbone_kwargs norm_eps {eps!r}: a small positive number is meant, as 1.0e-6")
    for module in backbone.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = eps


def shorten(error: Exception, limit: int = 300) -> str:
    """The beginning of a message; timm and torch name each key of a state dict that does not fit."""
    message = " ".join(str(error).split())
    return message if len(message) <= limit else f"{message[:limit]} ..."


def own_kwargs(family: str) -> dict[str, Any]:
    """Returns what DINOv3's training sets and timm does not: patch coordinates are rescaled at random, by up to 2.

    In evaluation they stay as they are.
    """
    return {"rope_rescale_coords": 2.0} if "dinov3" in family else {}


def apply_projection_layers(backbone: nn.Module) -> None:
    """Makes every attention call its `qkv` layer instead of reading the weight, so that an adapter there acts.

    timm's Eva and BEiT read `self.qkv.weight` directly unless `qkv_bias_separate` is set; the result is the same.
    """
    for block in backbone.blocks:
        block.attn.fused_attn = True  # where a QueryMask acts, whatever TIMM_FUSED_ATTN says
        if hasattr(block.attn, "qkv_bias_separate"):
            block.attn.qkv_bias_separate = True
