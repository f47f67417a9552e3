"""A deterministic VQA network: two encoders, their fusion, and a decoder that generates the answer."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vqa_config import VQAConfig, read_config
from vqa_questions import TYPES
from vqa_weights import build_language, build_vision, fields_of, load_tensors

from eomt.lora.adapting import Adapted, adapt, load_adapted
from eomt.lora.report import trainable_report
from lora_config import LoRASettings

if TYPE_CHECKING:
    from transformers import Dinov2Model, MBartForConditionalGeneration

log = logging.getLogger(__name__)
TARGETS = ("query", "key", "value")
TYPE_LOSS = 0.1  # weight of the question types' loss


@dataclass
class VQAOutput:
    """`logits` [B, T, V] of the answer's tokens, `loss` where labels were given, `type_logits` [B, 4] if there are."""

    logits: Tensor
    loss: Tensor | None = None
    type_logits: Tensor | None = None


class DeterministicVQA(nn.Module):
    """Image encoder (DINOv2), text encoder and answer decoder (MBart, as BARTpho is one), and fusion between them.

    The image's patches, each with its place, attend to the question; the decoder attends to both. LoRA adapters, where
    they are asked for, are in place when this returns, with everything else as `freeze_pretrained()` has it. Without,
    nothing is frozen.

    Args:
        config: sizes; or a YAML file, or the name of one beside this module.
        pretrained: whether the weights of `vision_hub` and `text_hub` are taken.
        vision_weights: a DINOv2 in a file, which then says the image encoder's sizes as well.
        start: tensors to start from, by their names in a network without adapters.
        dropout: of projection and fusion.
        use_type_loss: whether the text encoder also learns to tell the question's type.
        use_vision_lora, vision_lora_r, vision_lora_alpha, vision_lora_dropout: LoRA on the image encoder's q, k, v.
        use_text_lora, text_lora_r, text_lora_alpha, text_lora_dropout: LoRA on the text encoder's q, k, v.
        freeze: whether LoRA is put in place; False: `freeze_pretrained` is called next, with arguments of its own.

    Raises:
        ImportError: transformers is missing, or PEFT where LoRA is asked for.
        ValueError: a size or a LoRA setting that cannot be, or weights that do not fit.
    """

    def __init__(
        self,
        config: VQAConfig | str | Path = "tiny",
        pretrained: bool = False,
        vision_weights: str | Path | None = None,
        start: Mapping[str, Tensor] | None = None,
        dropout: float = 0.1,
        use_type_loss: bool = False,
        use_vision_lora: bool = False,
        vision_lora_r: int = 8,
        vision_lora_alpha: float = 16,
        vision_lora_dropout: float = 0.1,
        use_text_lora: bool = False,
        text_lora_r: int = 16,
        text_lora_alpha: float = 32,
        text_lora_dropout: float = 0.1,
        freeze: bool = True,
    ) -> None:
        super().__init__()
        vision_lora = LoRASettings(vision_lora_r, vision_lora_alpha, vision_lora_dropout, TARGETS)
        text_lora = LoRASettings(text_lora_r, text_lora_alpha, text_lora_dropout, TARGETS)
        self.lora = (vision_lora if use_vision_lora else None, text_lora if use_text_lora else None)
        config = config if isinstance(config, VQAConfig) else read_config(config)
        self.vision: Dinov2Model = build_vision(config, pretrained, vision_weights)
        self.language: MBartForConditionalGeneration = build_language(config, pretrained)
        self.config = replace(config, vision=fields_of(self.vision.config), text=fields_of(self.language.config))
        check_size(config.img_size, self.vision.config.patch_size)
        width, patches = self.language.config.d_model, self.vision.config.hidden_size
        self.projection = nn.Sequential(nn.Linear(patches, width), nn.LayerNorm(width), nn.Dropout(dropout))
        self.places = nn.Embedding(1 + (config.img_size // self.vision.config.patch_size) ** 2, width)
        nn.init.normal_(self.places.weight, std=0.5)  # beside patches of a standard deviation of 1
        block = nn.TransformerDecoderLayer(
            width, config.fusion_heads, 4 * width, dropout, "gelu", batch_first=True, norm_first=True
        )
        self.fusion = nn.TransformerDecoder(block, config.fusion_layers, nn.LayerNorm(width))
        self.type_head = nn.Linear(width, len(TYPES)) if use_type_loss else None
        self.is_random = [not (pretrained or vision_weights or start), not (pretrained or start)]  # vision, text
        self.vision_part: Adapted | None = None
        self.text_part: Adapted | None = None
        if start:
            load_tensors(self, start)
        self.train()  # transformers loads in eval mode, in which dropout, LoRA's as well, would do nothing
        if freeze and (use_vision_lora or use_text_lora):
            self.freeze_pretrained()

    @property
    def text(self) -> nn.Module:
        """The text encoder."""
        return self.language.model.encoder

    def freeze_pretrained(self, unfreeze_encoder_layers: int = 0, unfreeze_decoder: bool = True) -> None:
        """Freezes the encoders but for LoRA, else the last layers of the text encoder; call it before the optimiser.

        With the decoder its language-model head trains, and with that the text encoder's embedding, which is the same
        tensor. Without, all three are frozen.

        Args:
            unfreeze_encoder_layers: how many of the text encoder's last layers train in full, if it has no LoRA.
            unfreeze_decoder: whether the decoder trains.

        Raises:
            ValueError: there are fewer layers, or the adapters have been trained already.
        """
        layers = len(self.text.layers)
        if not 0 <= unfreeze_encoder_layers <= layers:
            raise ValueError(
                f"unfreeze_encoder_layers {unfreeze_encoder_layers}: the text encoder has {layers}, give 0 to {layers}"
            )
        self._remove_fresh_adapters()
        decoder = (self.language.model.decoder, self.language.lm_head)
        for part in decoder:
            part.requires_grad_(unfreeze_decoder)
        if not unfreeze_decoder:
            log.info("the head and the text encoder's embedding are one tensor, and frozen: unfreeze_decoder trains it")
        vision_lora, text_lora = self.lora
        if text_lora and unfreeze_encoder_layers:
            log.warning("unfreeze_encoder_layers %d: LoRA takes its place, no layer trains", unfreeze_encoder_layers)
            unfreeze_encoder_layers = 0
        vision, text = self.is_random  # of which the one who built it knows
        besides = decoder if unfreeze_decoder else ()
        self.vision_part = adapt(self.vision, vision_lora, network=self, expect_untrained=vision)
        self.text_part = adapt(self.text, text_lora, unfreeze_encoder_layers, besides, expect_untrained=text)

    def _remove_fresh_adapters(self) -> None:
        """Adapters that `freeze_pretrained` put in before: they are zero, and merging them gives the same weights."""
        for part in (self.vision_part, self.text_part):
            if part and part.handle:
                updates = [p for name, p in part.module.named_parameters() if "lora_B" in name]
                if any(p.any() for p in updates):
                    raise ValueError("freeze_pretrained on trained adapters would drop them: call it before training")
                dtype = next(part.module.parameters()).dtype
                part.merge().to(dtype)  # merging computes in float32

    def load_adapters(self, vision: Path | None, text: Path | None) -> None:
        """Puts saved adapters on the encoders, which have their base weights; all else stays as it is."""
        self.vision_part = load_adapted(self.vision, vision) if vision else None
        self.text_part = load_adapted(self.text, text) if text else None
        self.lora = tuple(part and part.settings for part in (self.vision_part, self.text_part))

    def adapted(self) -> dict[str, Adapted]:
        """The encoders that have adapters, by name."""
        parts = {"vision": self.vision_part, "text": self.text_part}
        return {name: part for name, part in parts.items() if part and part.handle}

    def parts(self) -> dict[str, nn.Module]:
        """Its parts by name; the head's weight, which is the text encoder's embedding as well, counts as the head's."""
        language = self.language
        parts = {"vision": self.vision, "head": language.lm_head, "text": self.text, "decoder": language.model.decoder}
        return parts | {"fusion": nn.ModuleList([self.projection, self.places, self.fusion])}

    def report(self) -> str:
        """The table of what trains, with a subtotal a part."""
        return trainable_report(self, parts=self.parts())

    def encode(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the decoder attends to [B, P + L, D], its mask [B, P + L], and the mean of the question [B, D].

        Args:
            pixel_values: [B, 3, H, W], normalised as the image encoder was trained.
            input_ids, attention_mask: [B, L], of the question.
        """
        text = self.text(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state  # [B, L, D]
        image = self.projection(self.vision(pixel_values).last_hidden_state) + self.places.weight  # [B, P, D]
        image = self.fusion(image, text, memory_key_padding_mask=attention_mask == 0)
        mask = torch.cat([attention_mask.new_ones(image.shape[:2]), attention_mask], 1)
        return torch.cat([image, text], 1), mask, mean_of(text, attention_mask)

    @torch.no_grad()
    def tell_type(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor | None:
        """The type that each question seems to be of [B]; None without a head of types."""
        if self.type_head is None:
            return None
        text = self.text(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self.type_head(mean_of(text, attention_mask)).argmax(1)

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor | None = None,
        types: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> VQAOutput:
        """Logits of the answer's tokens; without labels, of its first one.

        Args:
            pixel_values, input_ids, attention_mask: as for `encode`.
            labels: [B, T] tokens of the answer, -100 where it has ended.
            types: [B] of the question, for the types' loss.
            weights: [B] of the answers in the loss; None: 1.
        """
        memory, mask, question = self.encode(pixel_values, input_ids, attention_mask)
        config = self.language.config
        first = input_ids.new_full((len(input_ids), 1), config.decoder_start_token_id)
        tokens = first if labels is None else torch.cat([first, labels[:, :-1]], 1)
        tokens = tokens.masked_fill(tokens == -100, config.pad_token_id)
        logits = self.language(encoder_outputs=(memory,), attention_mask=mask, decoder_input_ids=tokens).logits
        type_logits = self.type_head(question) if self.type_head else None
        if labels is None:
            return VQAOutput(logits, None, type_logits)
        each = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none").view(labels.shape)
        each = each.sum(1) / (labels != -100).sum(1).clamp(min=1)  # [B]
        loss = each.mean() if weights is None else (each * weights).mean()
        if type_logits is not None and types is not None:
            loss = loss + TYPE_LOSS * F.cross_entropy(type_logits.float(), types)
        return VQAOutput(logits, loss, type_logits)

    @torch.no_grad()
    def generate(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor, num_beams: int = 1) -> Tensor:
        """Tokens of the answers [B, T], the most probable at each step, or by beams."""
        from transformers.modeling_outputs import BaseModelOutput

        memory, mask, _ = self.encode(pixel_values, input_ids, attention_mask)
        encoded = BaseModelOutput(last_hidden_state=memory)
        return self.language.generate(encoder_outputs=encoded, attention_mask=mask, num_beams=num_beams)


def mean_of(text: Tensor, mask: Tensor) -> Tensor:
    """The mean [B, D] of the tokens [B, L, D] that the mask [B, L] keeps."""
    weights = mask[:, :, None].to(text.dtype)
    return (text * weights).sum(1) / weights.sum(1).clamp(min=1)


def check_size(img_size: int, patch_size: int) -> None:
    """Raises ValueError where pixels at the border would be in no patch."""
    if img_size % patch_size:
        near = max(round(img_size / patch_size), 1) * patch_size
        raise ValueError(
            f"img_size {img_size}: it must be a multiple of the image encoder's patch {patch_size}; try {near}"
        )
