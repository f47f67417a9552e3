"""Under which names other programs keep the tensors of a whole EoMT, and the published names for them.

torch is not needed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from eomt.settings.backbone_names import Names, Part, name_tensors

PUBLISHED, TRANSFORMERS, LIGHTLY = "an EoMT", "transformers' EoMT", "LightlyTrain's EoMT"
KNOWN = (
    "a published EoMT (.bin, .ckpt, .safetensors), a model/ folder or checkpoint of this project, a folder of "
    "transformers' EoMT, an exported EoMT of LightlyTrain"
)
BACKBONE = "encoder.backbone."
WRAPPER = re.compile(r"((state_dict|train_model|module|model|network|_orig_mod)\.)*")
SIGNS = {  # how a name begins that no other network has
    TRANSFORMERS: ("query.weight", "upscale_block."),
    LIGHTLY: ("queries.weight",),
    PUBLISHED: ("q.weight", "mask_head.0.", "encoder.backbone.blocks."),
}
BACKBONES = {
    TRANSFORMERS: re.compile(r"(?=(embeddings|layers|layernorm)\.)"),
    LIGHTLY: re.compile(r"backbone\."),
}
HEADS = {  # how their names begin: how ours do
    TRANSFORMERS: {
        "query.": "q.",
        "class_predictor.": "class_head.",
        "mask_head.fc1.": "mask_head.0.",
        "mask_head.fc2.": "mask_head.2.",
        "mask_head.fc3.": "mask_head.4.",
        "upscale_block.block.": "upscale.",
    },
    LIGHTLY: {"queries.": "q."},
}
BLOCK = re.compile(r"backbone\.blocks\.(\d+)\.")


def bare(key: str) -> str:
    """A name without what training programs, wrappers and `torch.compile` add to it."""
    return key[WRAPPER.match(key).end() :].replace("._orig_mod", "")


def program_of(keys: Iterable[str]) -> str | None:
    """Returns the program whose EoMT has tensors of these names; None where they are no EoMT's."""
    names = [bare(key) for key in keys]
    return next((program for program, signs in SIGNS.items() if any(name.startswith(signs) for name in names)), None)


def is_backbone_alone(keys: Iterable[str]) -> bool:
    """Whether tensors are the encoder of a published EoMT, without queries and heads."""
    names = [bare(key) for key in keys]
    return bool(names) and all(name.startswith("encoder.") for name in names)


def name_eomt(keys: Iterable[str], program: str) -> Names:
    """Finds the published names, less `network.`, for those of another program's file.

    What no rule knows keeps its own name, so that loading names it.

    Raises:
        ValueError: two tensors have one name: there are several networks.
    """
    keys = list(keys)
    whole = [key for key in keys if not (program == LIGHTLY and not re.match(r"(train_model\.)?model\.", key))]
    backbone, made_of = {}, {}
    for key in whole:
        name = bare(key)
        if inside := BACKBONES[program].match(name):
            backbone[name[inside.end() :]] = key
        else:
            made_of[head_name(name, program)] = [Part(key)]
    names = name_tensors(backbone)
    for name, parts in names.made_of.items():
        made_of[BACKBONE + name] = [Part(backbone[key], third) for key, third in parts]
    left_out = [backbone[key] for key in names.left_out]
    return Names(made_of, [*left_out, *(key for key in keys if key not in set(whole))])


def head_name(name: str, program: str) -> str:
    """The published name for one outside the backbone."""
    for theirs, ours in HEADS[program].items():
        if name.startswith(theirs):
            name = ours + name.removeprefix(theirs)
    return name.replace(".layernorm2d.", ".norm.") if program == TRANSFORMERS else name


def sizes_of(shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Returns the sizes of the network that tensors under the published names make, as far as they tell."""
    blocks = [int(number[1]) for key in shapes if (number := BLOCK.search(key))]
    facts = {  # key, dimensions, size
        "num_q": ("q.weight", 2, lambda shape: shape[0]),
        "num_blocks": ("attn_mask_probs", 1, lambda shape: shape[0]),
        "num_classes": ("class_head.weight", 2, lambda shape: shape[0] - 1),
        "patch_size": (f"{BACKBONE}patch_embed.proj.weight", 4, lambda shape: shape[-1]),
        "embed_dim": ("q.weight", 2, lambda shape: shape[1]),
    }
    found = {
        name: read(shapes[key])
        for name, (key, dimensions, read) in facts.items()
        if key in shapes and len(shapes[key]) == dimensions
    }
    return found | ({"depth": max(blocks) + 1} if blocks else {})
