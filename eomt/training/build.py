"""Network and losses from settings."""

import logging
from dataclasses import fields

from torch import nn

from eomt.models.checkpoint import needs_pretrained
from eomt.models.eomt import EoMT
from eomt.models.vit import ViT
from eomt.settings.model import LossSettings, ModelSettings
from eomt.training.mask_classification_loss import MaskClassificationLoss
from eomt.training.outlier_loss import OutlierLoss

logger = logging.getLogger(__name__)


def build_network(settings: ModelSettings, encoder: nn.Module | None = None) -> EoMT:
    """Builds EoMT over timm's encoder, or over another one; its attribute `drawn` names the tensors that are random."""
    loaded = encoder is not None  # how another one came to its weights is not known
    if loaded and settings.backbone_weights:
        raise ValueError(
            f"backbone_weights {settings.backbone_weights} is for timm's backbones, and model.encoder puts another one "
            "in their place: leave one out"
        )
    if not loaded:
        encoder, loaded = build_encoder(settings)
    network = EoMT(
        encoder,
        settings.num_classes,
        num_q=settings.num_q,
        num_blocks=settings.num_blocks,
        masked_attn_enabled=settings.masked_attn_enabled,
        checkpoint_predictions=settings.checkpoint_predictions,
        cosine_scale=settings.cosine_scale,
    )
    network.drawn = {name for name in network.state_dict() if not (loaded and name.startswith("encoder."))}
    return network


def build_encoder(settings: ModelSettings) -> tuple[ViT, bool]:
    """timm's encoder, and whether its weights are loaded already; those of an EoMT come later, and replace them all."""
    path, weights = settings.ckpt_path, settings.backbone_weights
    wanted = not path or needs_pretrained(path, settings.delta_weights)
    if weights and not wanted:
        raise ValueError(
            f"ckpt_path {path} holds every weight, and backbone_weights {weights} would be loaded for nothing: leave "
            "one out"
        )
    encoder = ViT(
        settings.img_size,
        settings.patch_size,
        settings.backbone_name,
        pretrained=settings.pretrained and wanted,
        backbone_kwargs=settings.backbone_kwargs,
        weights=weights,
    )
    if encoder.report:
        logger.info("%s", encoder.report)
    return encoder, bool(weights) or (settings.pretrained and wanted)


def build_loss(
    settings: ModelSettings, outliers: bool, kind: type[MaskClassificationLoss] = MaskClassificationLoss
) -> MaskClassificationLoss:
    """The published loss with these settings, or a subclass of it."""
    coefficients = {field.name: getattr(settings, field.name) for field in fields(LossSettings)}
    return kind(
        settings.num_classes,
        class_weights=settings.class_weights,
        scale=settings.cosine_scale or 1.0,
        margin=settings.arcface_margin if settings.head == "arcface" else 0.0,
        outliers=outliers,
        **coefficients,
    )


def build_outlier_loss(settings: ModelSettings) -> OutlierLoss | None:
    """The loss on outliers that the settings name; warns of margins that do nothing."""
    margins = {"inlier_margin": settings.inlier_margin, "outlier_margin": settings.outlier_margin}
    if settings.outlier_loss:
        return OutlierLoss(settings.outlier_loss, settings.num_classes, settings.outlier_weight, **margins)
    if any(margin is not None for margin in margins.values()):
        logger.warning("inlier_margin and outlier_margin are of outlier_loss, which is null: they do nothing")
    return None
