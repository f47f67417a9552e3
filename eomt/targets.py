"""The linear layers that a LoRA target means: a role in the attention, the dotted end of a name, or a full name."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from eomt.fingerprints import is_adapter

if TYPE_CHECKING:
    from torch import nn

ROLES = ("query", "key", "value", "out", "attention", "mlp")  # that a target may name, in whatever network
QKV = ("query", "key", "value")
NAMES = {  # of the layers with these parts, in timm, torchvision, and transformers 4 and 5
    ("query",): ("query", "q_proj", "q", "q_lin", "to_q", "query_proj", "wq"),
    ("key",): ("key", "k_proj", "k", "k_lin", "to_k", "key_proj", "wk"),
    ("value",): ("value", "v_proj", "v", "v_lin", "to_v", "value_proj", "wv"),
    ("query", "key"): ("qk", "to_qk"),
    ("key", "value"): ("kv", "kv_proj", "to_kv", "key_value", "wkv"),
    QKV: ("qkv", "qkv_proj", "to_qkv", "wqkv", "query_key_value", "c_attn"),
    ("out",): ("out_proj", "o_proj", "out_lin"),
}
PARTS = {name: parts for parts, names in NAMES.items() for name in names}
OUT_OF_ATTENTION = ("proj", "c_proj", "o", "out", "dense", "wo", "projection", "proj_out")
MLP = ("fc1", "fc2", "fc3", "fc_in", "fc_out", "c_fc", "lin1", "lin2", "linear1", "linear2", "up_proj", "down_proj")
MLP += ("gate_proj", "gate_up_proj", "w1", "w2", "w3", "w12", "wi", "wi_0", "wi_1", "wo", "weights_in", "weights_out")
MLP += ("dense_h_to_4h", "dense_4h_to_h")
ATTENTION_PART = re.compile(r"attn|attention|mha")
MLP_PART = re.compile(r"mlp|ffn|feed_?forward|densereludense|intermediate|^ff$")
CROSS_PART = re.compile(r"cross_?att|encoder_att|encdec|multihead_attn")


@dataclass
class Found:
    """The layers that targets mean: `names` in the module's order.

    `fused` says for each fused layer's short name which parts were asked for; `left_out` holds matches that were not
    named expressly: in decoders, in attention to another sequence, or outside of the numbered blocks. `missing` holds
    parts of the role `attention` that were not found, and the blocks that lack them.
    """

    names: list[str] = field(default_factory=list)
    fused: dict[str, list[str]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    missing: dict[tuple[str, ...], list[str]] = field(default_factory=dict)


def is_linear(module: nn.Module) -> bool:
    """Whether PEFT adapts it as a linear layer: torch's, or the transposed `Conv1D` of GPT-2."""
    from torch import nn

    conv1d = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", nn.Linear)
    return isinstance(module, (nn.Linear, conv1d))


def linear_names(module: nn.Module) -> list[str]:
    """Names of the linear layers, as they were before adaptation too; `nn.MultiheadAttention` calls none of its own."""
    from torch.nn import MultiheadAttention

    parts = dict(module.named_modules())
    names = (name for name, part in parts.items() if name and is_linear(part) and not is_adapter(name))
    names = (name.removesuffix(".base_layer") for name in names)
    return [name for name in names if not isinstance(parts[name.rpartition(".")[0]], MultiheadAttention)]


# Stacks of blocks ----------------------------------------------------------------------------------------------------


def find_stacks(module: nn.Module) -> list[list[str]]:
    """The stacks of numbered blocks, each as the names of its blocks in order.

    A block is a numbered component that holds at least two linear layers; a stack has two blocks, or one that is all
    its list holds. The blocks of stages of one kind are counted through (`layers.0.blocks.1`).
    """
    return _stacks(module, "", linear_names(module))


def _stacks(module: nn.Module, prefix: str, linears: Sequence[str]) -> list[list[str]]:
    children = {f"{prefix}{name}": child for name, child in module.named_children()}
    inside = {name: [linear for linear in linears if linear.startswith(f"{name}.")] for name in children}
    blocks = [name for name in children if name.rpartition(".")[2].isdigit() and len(inside[name]) > 1]
    below = {name: _stacks(child, f"{name}.", inside[name]) for name, child in children.items() if inside[name]}
    if not blocks or (len(blocks) == 1 and len(children) > 1):
        return [stack for stacks in below.values() for stack in stacks]
    nested = [name for block in blocks for stack in below[block] for name in stack]
    if len({type(children[block]) for block in blocks}) > 1 and nested:  # several networks in a list
        return [stack for block in blocks for stack in below[block]]
    is_staged = (
        len(nested) > len(blocks) and len({type(module.get_submodule(n.removeprefix(prefix))) for n in nested}) == 1
    )
    return [nested if is_staged else blocks]


def stack_name(stack: Sequence[str]) -> str:
    """`encoder.layers.#.blocks (12 blocks)`"""
    place = re.sub(r"(?<![^.])\d+(?![^.])", "#", stack[0].rpartition(".")[0])
    return f"{place or 'the network'} ({len(stack)} blocks)"


# Targets -------------------------------------------------------------------------------------------------------------


def resolve(module: nn.Module, targets: Sequence[str], blocks: int | str = "all") -> Found:
    """The linear layers that the targets mean, in all stacks of the network, whether it is adapted already or not.

    A target is a role (one of `ROLES`), a role inside a part (`decoder.query`), the dotted end of a name (`attn.proj`)
    or a full name. Names of the query, key and value that the network does not know mean their role. Of layers that
    are not named in full, those outside of the blocks do not count where there are others inside, and those in decoders
    or in attention to another sequence only where the target names that part.

    Args:
        module: the network, or the part to adapt.
        targets: what to adapt.
        blocks: "all", or K for the last K blocks of the only stack that has such layers.

    Raises:
        ValueError: a target matches nothing, there are fewer blocks than asked for, or they are in several stacks.
    """
    found, chosen = Found(), set()
    names, stacks, apart = linear_names(module), find_stacks(module), parts_apart(module)
    places = {name: block for stack in stacks for block in stack for name in names if name.startswith(f"{block}.")}
    for target in targets:
        matches = _matches(target, names, places)
        kept = [name for name in matches if name == target or _is_named(name, target, apart)]
        if any(name in places for name in kept):
            kept = [name for name in kept if name in places or name == target]
        if not kept:
            raise ValueError(_nothing(module, target, names, matches, apart))
        chosen.update(kept)
        found.left_out += [name for name in matches if name not in kept]
        if _last(target) == "attention" and all(_last(other) in ROLES for other in targets):
            found.missing |= _missing(kept, names, places)
        for name in kept:
            last = name.rpartition(".")[2]
            if len(PARTS.get(last.lower(), ())) > 1 and (part := _part(target)) and target != name:
                asked = found.fused.setdefault(last, [])
                asked += [part] if part not in asked else []
    if blocks != "all":
        chosen = _in_last_blocks(chosen, targets, blocks, stacks, places)
    found.names = [name for name in names if name in chosen]
    found.left_out = [name for name in dict.fromkeys(found.left_out) if name not in chosen]
    return found


def _matches(target: str, names: Sequence[str], places: Mapping[str, str]) -> list[str]:
    """All layers that a target could mean."""
    path, _, last = target.rpartition(".")
    if path and target in names:
        return [target]
    literal = [name for name in names if f".{name}".endswith(f".{target}")]
    role = last if last in ROLES else None if literal else _part(target)
    if role is None:
        return literal
    inside = [name for name in names if not path or f".{path}." in f".{name.rpartition('.')[0]}."]
    attentions = {name.rpartition(".")[0] for name in names if PARTS.get(_last(name))}
    meant = {name for name in inside if role in _roles(name, places, attentions)}
    return [name for name in names if name in meant or name in literal]


def _roles(name: str, places: Mapping[str, str], attentions: Collection[str]) -> tuple[str, ...]:
    """What a layer does in its block: parts of the attention, and with them `attention`, or `mlp`, or nothing.

    `attentions` are the modules that hold a query, key or value, whatever they are called.
    """
    *path, last = name.removeprefix(f"{places.get(name)}.").lower().split(".")
    if last == "0" and path:  # `to_out.0`
        last = {"to_out": "out"}.get(path[-1], last)
    nearest = next((part for part in reversed(path) if ATTENTION_PART.search(part) or MLP_PART.search(part)), "")
    in_attention = bool(ATTENTION_PART.search(nearest))  # `attn_block.mlp.fc1` is none of attention
    is_mlp = last in MLP or [*path, last] == ["output", "dense"]
    is_mlp = is_mlp or any(MLP_PART.search(part) for part in (*path, last))
    is_beside = name.rpartition(".")[0] in attentions and not is_mlp
    parts = PARTS.get(last, ()) or (("out",) if (in_attention or is_beside) and last in OUT_OF_ATTENTION else ())
    if parts:
        return (*parts, "attention")
    return ("mlp",) if is_mlp and not in_attention else ()


def _missing(kept: Sequence[str], names: Sequence[str], places: Mapping[str, str]) -> dict[tuple[str, ...], list[str]]:
    """The parts of an attention that blocks lack, of those that have some."""
    attentions = {name.rpartition(".")[0] for name in names if PARTS.get(_last(name))}
    there: dict[str, set[str]] = {}
    for name in kept:
        there.setdefault(places.get(name, "the network"), set()).update(_roles(name, places, attentions))
    missing: dict[tuple[str, ...], list[str]] = {}
    for block, roles in there.items():
        if lacking := tuple(part for part in (*QKV, "out") if part not in roles):
            missing.setdefault(lacking, []).append(block)
    return missing


def _last(name: str) -> str:
    return name.rpartition(".")[2].lower()


def _part(target: str) -> str | None:
    """The one of `QKV` that the end of a target names; None: another."""
    parts = PARTS.get(_last(target), ())
    return parts[0] if len(parts) == 1 and parts[0] in QKV else None


def parts_apart(module: nn.Module) -> set[str]:
    """The parts that are adapted only where a target names them: decoders, and attention to another sequence."""
    found = set()
    for name, part in module.named_modules():
        last, kind = _last(name), type(part).__name__
        is_decoder = ("decoder" in last and "encoder" not in last) or kind.endswith("Decoder")
        if name and (is_decoder or CROSS_PART.search(last) or "CrossAttention" in kind):
            found.add(name)
    return found


def _is_named(name: str, target: str, apart: set[str]) -> bool:
    """Whether a layer is in no part of `apart`, or the target names the innermost one."""
    parents = [name[: match.start()] for match in re.finditer(r"\.", name)]
    inner = next((parent for parent in reversed(parents) if parent in apart), None)
    return inner is None or inner.rpartition(".")[2] in target.split(".")


def _in_last_blocks(
    chosen: set[str], targets: Sequence[str], blocks: int, stacks: Sequence[Sequence[str]], places: Mapping[str, str]
) -> set[str]:
    meant = [stack for stack in stacks if any(places.get(name) in stack for name in chosen)]
    if len(meant) > 1:
        raise ValueError(
            f"LoRA blocks {blocks}: the targets lie in {len(meant)} stacks, {', '.join(map(stack_name, meant))}; adapt "
            f"each part by itself, or name the part in the targets, for example '{_own_part(meant)}.query'"
        )
    numbered = meant[0] if meant else []
    if blocks > len(numbered):
        raise ValueError(f"LoRA blocks {blocks}: the module has {len(numbered)} numbered blocks; use 'all' or fewer")
    last = {name for name in chosen if places.get(name) in numbered[-blocks:]}
    if not last:
        raise ValueError(f"LoRA targets {', '.join(targets)} match no linear layer in the last {blocks} blocks")
    return last


def _own_part(stacks: Sequence[Sequence[str]]) -> str:
    """A part of the first stack's place that no other has."""
    own, *others = [stack[0].split(".")[:-1] for stack in stacks]
    return next((part for part in own if not part.isdigit() and all(part not in other for other in others)), own[-1])


def _nothing(module: nn.Module, target: str, names: Sequence[str], matches: Sequence[str], apart: set[str]) -> str:
    if matches:
        part = next(part for part in sorted(apart, key=len, reverse=True) if matches[0].startswith(f"{part}."))
        last = part.rpartition(".")[2]
        return (
            f"LoRA target {target!r} matches only layers of decoders or of attention to another sequence, such as "
            f"{matches[0]}; name that part, for example '{last}.{target.rpartition('.')[2]}'"
        )
    from torch.nn import MultiheadAttention

    has_torchs = any(isinstance(part, MultiheadAttention) for part in module.modules())
    hint = "; nn.MultiheadAttention calls no layers, so its own cannot be adapted" if has_torchs else ""
    there = sorted({re.sub(r"^.*\d+\.", "", name) for name in names})
    return (
        f"LoRA target {target!r} matches no linear layer; there are {', '.join(there) or 'none'}; a role is one of "
        f"{', '.join(ROLES)}{hint}"
    )
