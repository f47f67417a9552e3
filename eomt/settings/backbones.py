"""Which plain backbone tensors belong to, told by their names and shapes alone; torch is not needed."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eomt.settings.backbone_names import Names, name_tensors

NO_EOMT = "a plain backbone without queries and heads"
DEFAULT_BACKBONE = "vit_large_patch14_reg4_dinov2"  # where neither backbone_name nor a file names one
DINOV2, DINOV3, MAE, DEIT, VIT = "DINOv2", "DINOv3", "MAE", "DeiT", ""
LETTERS = {(192, 12): "Ti", (384, 12): "S", (768, 12): "B", (1024, 24): "L", (1280, 32): "H", (1536, 40): "g"}
LETTERS |= {(4096, 40): "7B"}  # the papers' names for widths and depths
DINOV2_GATED = {"S": False, "B": False, "L": False, "g": True}
DINOV3_NAMES = {  # size and whether its MLPs are gated
    ("S", False): "vit_small_patch16_dinov3",
    ("S", True): "vit_small_plus_patch16_dinov3",
    ("B", False): "vit_base_patch16_dinov3",
    ("L", False): "vit_large_patch16_dinov3",
    ("H", True): "vit_huge_plus_patch16_dinov3",
    ("7B", True): "vit_7b_patch16_dinov3",
}
MAE_NAMES = {
    ("B", 16): "vit_base_patch16_224.mae",
    ("L", 16): "vit_large_patch16_224.mae",
    ("H", 14): "vit_huge_patch14_224.mae",
}
DEIT_NAMES = {
    "Ti": "deit_tiny_distilled_patch16_224",
    "S": "deit_small_distilled_patch16_224",
    "B": "deit_base_distilled_patch16_224",
}
# timm's models that names and shapes tell, but for biases
TOLD = {f"vit_{size}_patch14_{reg}dinov2" for size in ("small", "base", "large", "giant") for reg in ("", "reg4_")}
TOLD |= {*DINOV3_NAMES.values(), *DEIT_NAMES.values()}
SATELLITE = ((0.43, 0.411, 0.296), (0.213, 0.156, 0.143))  # statistics of the pixels of DINOv3's sat493m
BLOCK = re.compile(r"^blocks\.(\d+)\.")
ROPE_THETA = 100.0  # of DINOv3, in timm, too
ATTENTION, QKV = re.compile(r"blocks\.\d+\.attn\."), re.compile(r"blocks\.\d+\.attn\.qkv\.weight")
PATCHES = "patch_embed.proj.weight"
OTHER_KINDS = {  # what no plain ViT has, and which kinds have it
    re.compile(r"(^|\.)(relative_position|rel_pos_bias)"): "BEiT",
    re.compile(r"\.rel_pos_[hw]$|^neck\."): "SAM",
    re.compile(r"^blocks_token_only\."): "CaiT",
}
Shape = Sequence[int]


@dataclass(frozen=True)
class Backbone:
    """A plain ViT, as far as names and shapes tell; `str` says it in words.

    Args:
        family: whose training it comes from; VIT where nothing tells.
        width: channels. depth: blocks. patch_size: pixels. registers: tokens beside the class token.
        gated: its MLPs have a gate (SwiGLU).
        biased: its attention adds biases to queries and values.
        scaled: its blocks have layer scale.
        rotary: its positions are rotary, without embeddings.
        distilled: it has a distillation token.
    """

    family: str
    width: int
    depth: int
    patch_size: int
    registers: int
    gated: bool
    biased: bool
    scaled: bool
    rotary: bool
    distilled: bool

    @property
    def letter(self) -> str | None:
        """The size in the papers' letters; None for one that no paper has."""
        return LETTERS.get((self.width, self.depth))

    def __str__(self) -> str:
        plus = "+" if self.rotary and self.gated and self.letter in ("S", "H") else ""
        size = f"-{self.letter}{plus}" if self.letter else f" {self.width} wide, patch"
        parts = [f"{self.registers} register{'s' * (self.registers > 1)}"] if self.registers else []
        parts += ["rotary positions"] if self.rotary and self.family == VIT else []
        parts = f" with {' and '.join(parts)}" if parts else ""
        article = "an" if self.family == MAE else "a"
        return f"{article} {f'{self.family} ViT'.strip()}{size}/{self.patch_size} of {self.depth} blocks{parts}"

    @property
    def timm_name(self) -> str | None:
        """The one timm model that this is; None where it may be several, or is none."""
        if self.family == DINOV2 and self.patch_size == 14 and DINOV2_GATED.get(self.letter) == self.gated:
            size = {"S": "small", "B": "base", "L": "large", "g": "giant"}[self.letter]
            return {0: f"vit_{size}_patch14_dinov2", 4: f"vit_{size}_patch14_reg4_dinov2"}.get(self.registers)
        if self.family == DINOV3 and self.patch_size == 16 and self.registers == 4:
            name = DINOV3_NAMES.get((self.letter, self.gated))
            return f"{name}_qkvb" if name and self.biased and self.letter != "7B" else name
        if self.family == MAE:
            return MAE_NAMES.get((self.letter, self.patch_size))
        return DEIT_NAMES.get(self.letter) if self.distilled and self.patch_size == 16 else None

    def is_like(self, other: Backbone) -> bool:
        """Whether weights of one fit the other, but for patches, which are resampled, and biases."""
        names = ("width", "depth", "registers", "gated", "scaled", "rotary", "distilled")
        return all(getattr(self, name) == getattr(other, name) for name in names)


def recognise(names: Names, shapes: Mapping[str, Shape]) -> Backbone:
    """Returns the backbone that a file's tensors make.

    Args:
        names: of all its tensors.
        shapes: by the file's own names.

    Raises:
        ValueError: they are no plain ViT.
    """
    made = names.made_of
    first = {name: list(shapes[parts[0].key]) for name, parts in made.items()}
    blocks = {int(found[1]) for name in made if (found := BLOCK.match(name))}
    patches = first.get(PATCHES, [])
    if len(patches) != 4 or patches[1] != 3 or patches[2] != patches[3]:
        what = f"{PATCHES} is {patches}" if patches else f"no {PATCHES} among {', '.join(sorted(shapes)[:3])}, ..."
        raise ValueError(f"no plain ViT for images in three channels: {what}")
    if not any(ATTENTION.match(name) for name in made):
        raise ValueError(f"no plain ViT: no attention in blocks among {', '.join(sorted(shapes)[:3])}, ...")
    for mark, kind in OTHER_KINDS.items():
        if found := next((parts[0].key for name, parts in made.items() if mark.search(name)), None):
            raise ValueError(f"no plain ViT: {found} belongs to another kind, {kind}")
    widths = {first[name][-1] for name in made if QKV.fullmatch(name)} | {patches[0]}
    if len(widths) > 1:
        raise ValueError(f"no plain ViT: its blocks are {', '.join(map(str, sorted(widths)))} wide")
    if not blocks or blocks != set(range(len(blocks))):
        raise ValueError(f"no whole ViT: its blocks are {sorted(blocks)}")
    scaled = any(name.startswith("blocks.0.") and re.search(r"\.(ls1\.gamma|gamma_1)$", name) for name in made)
    rotary = "pos_embed" not in made
    registers = first.get("reg_token", [1, 0])[1]
    distilled = "dist_token" in made
    return Backbone(
        family=_family(names, first, scaled, rotary, registers, distilled),
        width=patches[0],
        depth=len(blocks),
        patch_size=patches[2],
        registers=registers,
        gated=_is_gated(names, first),
        biased=any(name in made for name in ("blocks.0.attn.q_bias", "blocks.0.attn.qkv.bias")),
        scaled=scaled,
        rotary=rotary,
        distilled=distilled,
    )


def rope_theta(config: Mapping[str, Any]) -> Any:
    """What transformers' config.json says of rotary periods, in the spelling of any version; None without."""
    return config.get("rope_theta", (config.get("rope_parameters") or {}).get("rope_theta"))


def plain_vit(shapes: Mapping[str, Shape]) -> Backbone | None:
    """The plain ViT that tensors of these shapes make; None where they are something else."""
    try:
        return recognise(name_tensors(shapes), shapes)
    except ValueError:
        return None


def _family(
    names: Names, first: Mapping[str, Shape], scaled: bool, rotary: bool, registers: int, distilled: bool
) -> str:
    if any(re.match(r"(\w+\.)*decoder_", key) for key in names.left_out):
        return MAE
    if distilled:
        return DEIT
    if rotary:  # timm's own have no class token
        return DINOV3 if scaled and registers and "cls_token" in first else VIT
    tokens = first["pos_embed"][-2] if len(first["pos_embed"]) > 1 else 0
    class_too = math.isqrt(max(tokens - 1, 0)) ** 2 == tokens - 1  # DeiT III has layer scale, too, but none for it
    return DINOV2 if scaled and "cls_token" in first and (class_too or registers) else VIT


def _is_gated(names: Names, first: Mapping[str, Shape]) -> bool:
    fc1, fc2 = "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight"
    if "blocks.0.mlp.fc1_g.weight" in first or len(names.made_of.get(fc1, ())) == 2:
        return True
    return fc1 in first and fc2 in first and first[fc1][:1] == [2 * first[fc2][-1]]
