"""Under which names others keep the tensors of a plain ViT, and timm's names for them; torch is not needed.

The one place that knows them: timm, Facebook's DINOv2 and DINOv3, MAE and DeiT, and transformers before and since
version 5.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

# what wrappers, training programs and transformers' larger models put before a name
WRAPPER = re.compile(
    r"(_orig_mod|module|network|encoder(?=\.backbone\.)|model(_ema)?|state_dict(_ema)?|backbone|teacher|student|vit|deit|dinov2|"
    r"dinov2_with_registers|dinov3_vit)\."
)
STUDENT = re.compile(r"((_orig_mod|module|model|state_dict)\.)*student\.")
Rules = tuple[tuple[re.Pattern, str], ...]


def _rules(*pairs: tuple[str, str]) -> Rules:
    return tuple((re.compile(theirs), timms) for theirs, timms in pairs)


BLOCK = r"^(blocks\.\d+"
RENAMED = _rules(
    (r"^(embeddings|patch_embed)\.(cls|mask)_token$", r"\2_token"),
    (r"^embeddings\.position_embeddings(\.weight)?$", "pos_embed"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^((embeddings|patch_embed)\.)?register_tokens$|^storage_tokens$", "reg_token"),
    (r"^(embeddings|patch_embed)\.patch_embeddings\.(projection\.)?", "patch_embed.proj."),
    (r"^(encoder\.)?layers?\.(?=\d)", "blocks."),
    (r"^blocks\.\d+\.(?=\d+\.)", "blocks."),  # in chunks, blocks keep their own numbers
    (r"^layernorm\.", "norm."),
    (BLOCK + r")\.layernorm_before\.", r"\1.norm1."),
    (BLOCK + r")\.layernorm_after\.", r"\1.norm2."),
    (BLOCK + r")\.attention\.(output\.dense|o_proj|out_proj)\.", r"\1.attn.proj."),
    (BLOCK + r")\.attention\.(attention\.)?(query|q_proj)\.", r"\1.attn.q."),
    (BLOCK + r")\.attention\.(attention\.)?(key|k_proj)\.", r"\1.attn.k."),
    (BLOCK + r")\.attention\.(attention\.)?(value|v_proj)\.", r"\1.attn.v."),
    (BLOCK + r")\.intermediate\.dense\.", r"\1.mlp.fc1."),
    (BLOCK + r")\.output\.dense\.", r"\1.mlp.fc2."),
    (BLOCK + r")\.layer_scale(\d)\.lambda1$", r"\1.ls\2.gamma"),
    (BLOCK + r"\.mlp)\.(w12|weights_in)\.", r"\1.fc1."),
    (BLOCK + r"\.mlp)\.(w3|weights_out|down_proj)\.", r"\1.fc2."),
    (BLOCK + r"\.mlp)\.(w1|gate_proj)\.", r"\1.gate."),
    (BLOCK + r"\.mlp)\.(w2|up_proj)\.", r"\1.up."),
)
ROTARY = _rules(  # timm keeps DINOv3 in another class, with other names
    (r"\.ls([12])\.gamma$", r".gamma_\1"),
    (r"\.attn\.([qkv])\.bias$", r".attn.\1_bias"),
    (r"\.mlp\.gate\.", ".mlp.fc1_g."),
)
SPELLINGS = _rules(  # what the weights of timm's model alone tell, in which some have these very names
    (BLOCK + r")\.gamma_([12])$", r"\1.ls\2.gamma"),  # DeiT III
    (BLOCK + r"\.attn)\.[qkv]_bias$", r"\1.qkv.bias"),  # rotary ViTs without registers
)
LEFT_OUT = re.compile(
    r"^(\w+\.)?mask_token$"
    r"|^decoder(\.|_)"  # MAE's
    r"|^(head|head_dist|fc|classifier|cls_classifier|distillation_classifier|pooler|fc_norm|attn_pool)\."
    r"|^(dino_head|ibot_head|dino_loss|ibot_patch_loss|projectors|lm_head|local_cls_norm)\."
    r"|^rope(_embed|_embeddings)?\.(periods|inv_freq)$"  # computed
    r"|\.attn\.qkv\.bias_mask$"
    r"|^encoder\.pixel_(mean|std)$"  # a published EoMT's, which are compared
    r"|^(optimizer|optimizer_states|lr_scheduler|lr_schedulers|scaler|callbacks|loops)\."
)
QKV, GATE = re.compile(r"(.*\.attn)\.([qkv])\.(\w+)"), re.compile(r"(.*\.mlp)\.(gate|up)\.(\w+)")


class Part(NamedTuple):
    """A tensor of a file that one of timm's is made of, or the third of it that is: 0, 1 or 2."""

    key: str
    third: int | None = None


@dataclass(frozen=True)
class Names:
    """Which tensors of a file make which of timm's, in order (q, k and v are one there), and which make none."""

    made_of: Mapping[str, Sequence[Part]]
    left_out: Sequence[str]


def bare(key: str) -> str:
    """A name without what wrappers put before it."""
    while found := WRAPPER.match(key):
        key = key[found.end() :]
    return key


def renamed(key: str, rotary: bool) -> str:
    """timm's name for one bare name; q, k and v, gate and up still have names of their own."""
    for theirs, timms in (*RENAMED, *(ROTARY if rotary else ())):
        key = theirs.sub(timms, key)
    return key


def name_tensors(keys: Iterable[str]) -> Names:
    """Finds timm's names for those of a file; what no rule knows keeps its own.

    Of a teacher and a student, which DINO's programs save together, the teacher is taken, as they do.

    Raises:
        ValueError: two tensors have one name: there are several backbones.
    """
    keys = list(keys)
    students = [key for key in keys if STUDENT.match(key)] if any("teacher." in key for key in keys) else []
    short = {key: bare(key) for key in keys if key not in set(students)}
    rotary = not any(renamed(name, False) == "pos_embed" for name in short.values())
    timms = {key: renamed(name, rotary) for key, name in short.items()}
    left_out = [key for key, name in timms.items() if LEFT_OUT.search(name)]
    gated = any(".mlp.gate." in name or ".mlp.fc1_g." in name for name in timms.values())
    parts: dict[str, dict[int, Part]] = {}
    wanted: dict[str, int] = {}
    for key in (key for key in timms if key not in set(left_out)):
        for name, place, count, third in places(timms[key], rotary, gated):
            if place in parts.setdefault(name, {}):
                raise ValueError(f"{key} and {parts[name][place].key} are both {name}: keep one backbone in the file")
            parts[name][place], wanted[name] = Part(key, third), count
    made_of = {}
    for name, found in parts.items():
        if len(found) == wanted[name]:
            made_of[name] = [found[place] for place in sorted(found)]
        else:  # such parts keep their own names, which nothing takes
            made_of |= {part.key: [part] for part in found.values()}
    return Names(made_of, [*students, *left_out])


def named_as_in(names: Names, model: Collection[str]) -> Names:
    """The names as the weights of a model spell them, where the file does not tell how."""
    made_of = dict(names.made_of)
    for name in names.made_of:
        for theirs, timms in SPELLINGS:
            other = theirs.sub(timms, name)
            if other in model and name not in model and other not in names.made_of:
                made_of[other] = [Part(part.key) for part in made_of.pop(name)]
    return Names(made_of, names.left_out)


def places(name: str, rotary: bool, gated: bool) -> list[tuple[str, int, int, int | None]]:
    """Where a tensor goes that `renamed` has named.

    Returns:
        timm's name, the place among how many parts, and which third of the tensor that is.
    """
    if found := QKV.fullmatch(name):
        return [(f"{found[1]}.qkv.{found[3]}", "qkv".index(found[2]), 3, None)]
    if (found := GATE.fullmatch(name)) and gated and not rotary:
        return [(f"{found[1]}.fc1.{found[3]}", ("gate", "up").index(found[2]), 2, None)]
    if found:
        return [(f"{found[1]}.fc1{'_x' if gated else ''}.{found[3]}", 0, 1, None)]
    if rotary and name.endswith(".attn.qkv.bias"):
        return [(name.replace("qkv.bias", f"{part}_bias"), 0, 1, third) for third, part in enumerate("qkv")]
    return [(name, 0, 1, None)]
