"""Pretraining by masking on drawn faces, with transformers' MAE: three quarters of the patches are left out.

The faces are bona fide and of other persons than those to train and test with. The weights are kept in the cache folder
and found again by what they were made of.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from eomt.files import cache_folder, new_folder
from morph.faces import bona_fide, draw_identity
from morph.settings import DRAWN, Settings

if TYPE_CHECKING:
    from transformers import ViTMAEConfig

log = logging.getLogger(__name__)

VERSION = 1  # of the drawing and of the pretraining; a new one makes new weights
PERSONS = 1500  # whose pictures are drawn, one of each
LR = 1e-3


def base_weights(settings: Settings) -> Path | None:
    """The file with a run's base weights, made if they are drawn ones; None: no file has them.

    Raises:
        ImportError: transformers is missing and there are weights to make.
    """
    if settings.weights in ("hub", "none"):
        return None
    return pretrained(settings) if settings.weights == DRAWN else Path(settings.weights)


def pretrained(settings: Settings) -> Path:
    """The folder with the weights of an encoder pretrained on drawn faces, from the cache or made now."""
    names = ("img_size", "patch_size", "backbone_kwargs", "mae_steps", "mae_batch_size", "data_seed")
    facts = {name: getattr(settings, name) for name in names} | {"version": VERSION}
    folder = cache_folder("morph") / sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    if not folder.is_dir():
        network = pretrain(settings)
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # of one file
        with new_folder(folder) as draft:
            network.vit.save_pretrained(draft)
    return folder


def mae_config(settings: Settings) -> ViTMAEConfig:
    """That of transformers for the encoder that the settings describe, with a small decoder.

    Raises:
        ImportError: transformers is missing. ValueError: the sizes of the encoder are not all given.
    """
    try:
        from transformers import ViTMAEConfig
    except ImportError as error:
        raise ImportError(
            "pretraining on drawn faces needs the package transformers: pip install transformers, or give weights=FILE"
        ) from error
    kwargs = settings.backbone_kwargs
    if missing := [name for name in ("embed_dim", "depth", "num_heads") if name not in kwargs]:
        raise ValueError(
            f"weights={DRAWN} pretrains an encoder of the sizes in backbone_kwargs, which lack {', '.join(missing)}: "
            "give them, or weights=hub or a FILE"
        )
    width = kwargs["embed_dim"]
    decoder = dict(decoder_hidden_size=64, decoder_num_hidden_layers=2, decoder_num_attention_heads=4)
    return ViTMAEConfig(
        hidden_size=width,
        num_hidden_layers=kwargs["depth"],
        num_attention_heads=kwargs["num_heads"],
        intermediate_size=kwargs.get("mlp_ratio", 4) * width,
        image_size=settings.img_size,
        patch_size=settings.patch_size,
        layer_norm_eps=1e-6,  # as timm has it
        norm_pix_loss=True,
        decoder_intermediate_size=256,
        **decoder,
    )


def pretrain(settings: Settings) -> torch.nn.Module:
    """Trains a `ViTMAEForPreTraining` of `mae_steps` steps; the first and the last loss are logged."""
    from transformers import ViTMAEForPreTraining

    with torch.random.fork_rng():
        torch.manual_seed(settings.data_seed)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        network = ViTMAEForPreTraining(mae_config(settings)).to(device).train()
        optimizer = torch.optim.AdamW(network.parameters(), LR, betas=(0.9, 0.95), weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, settings.mae_steps)
        for step, pixels in enumerate(batches(settings)):
            loss = network(pixels.to(device)).loss
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if step % 100 == 0 or step == settings.mae_steps - 1:
                log.info("pretraining by masking, step %d of %d: loss %.3f", step + 1, settings.mae_steps, loss.item())
    return network.cpu()


def batches(settings: Settings) -> Iterator[torch.Tensor]:
    """Normalised pictures [B, 3, H, W] of drawn faces, flipped at random, a batch for each step."""
    rng = np.random.default_rng((settings.data_seed, 99))
    persons = min(PERSONS, settings.mae_steps * settings.mae_batch_size)
    faces = np.stack([bona_fide(draw_identity(rng), rng, settings.img_size) for _ in range(persons)])
    mean, deviation = pixel_statistics(settings.backbone_name)
    for _ in range(settings.mae_steps):
        images = faces[rng.integers(persons, size=settings.mae_batch_size)].astype(np.float32) / 255
        images = np.where(rng.integers(2, size=(len(images), 1, 1, 1)), images, images[:, :, ::-1])
        yield torch.from_numpy((images - mean) / deviation).float().permute(0, 3, 1, 2).contiguous()


def pixel_statistics(backbone_name: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation [3] with which the encoder will normalise, as timm has them."""
    import timm

    config = timm.get_pretrained_cfg(backbone_name)
    return np.array(config.mean, np.float32), np.array(config.std, np.float32)
