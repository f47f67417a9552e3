"""Fingerprints: SHA-256 of tensors, and whether two machines hold the same ones.

Bytes agree between machines as long as a tensor was copied from a file. What was computed, resampled to another size or
drawn at random, differs in the last bits with the processor and the number of threads: an `Identity` keeps such tensors
apart and compares them within rounding.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


# what the names of adapter parameters begin with in PEFT, by method: LoRA, IA3, LoHa, LoKr, OFT, BOFT, VeRA, HRA
ADAPTER_PREFIXES = ("lora_", "ia3_", "hada_", "lokr_", "oft_", "boft_", "vera_", "hra_")
WRAPPERS = ("base_layer", "_orig_mod", "_checkpoint_wrapped_module")  # what PEFT and torch put around a module
SUMS = 16
# Relative distance that rounding explains. Between processors it was 2e-7 at most; another interpolation makes 1e-2.
ROUNDING = 1e-5


@dataclass(frozen=True)
class Identity:
    """Tells whether two machines hold the same tensors.

    Args:
        exact: SHA-256 over all tensors, as they are on this machine.
        stored: SHA-256 over the tensors as their files hold them, before resampling, without those that no file holds.
            None: the record is of an earlier version, and only `exact` can be compared.
        computed: of each tensor that was resampled or drawn at random, its shape and `sums`.
        hashes: SHA-256 of each tensor, as it is on this machine; not kept in files.
    """

    exact: str | None
    stored: str | None = None
    computed: Mapping[str, tuple[tuple[int, ...], tuple[float, ...]]] = field(default_factory=dict)
    hashes: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Returns what JSON can hold; `from_dict` reads it."""
        computed = {
            name: {"shape": list(shape), "sums": " ".join(f"{value:.8g}" for value in values)}
            for name, (shape, values) in self.computed.items()
        }
        return {"stored": self.stored, "computed": computed}

    @classmethod
    def from_dict(cls, exact: str | None, facts: Mapping[str, Any] | None) -> Identity:
        """Reads what `as_dict` returned; without it, the record of an earlier version.

        Raises:
            ValueError: it is something else.
        """
        facts = facts or {}
        try:
            computed = {
                name: (tuple(map(int, tensor["shape"])), tuple(map(float, tensor["sums"].split())))
                for name, tensor in facts.get("computed", {}).items()
            }
            known = [value for value in (exact, facts.get("stored")) if value is not None]
            if not all(isinstance(value, str) for value in known) or any(len(v) != SUMS for _, v in computed.values()):
                raise ValueError(f"{known} and {len(computed)} tensors")
        except (LookupError, TypeError, AttributeError, ValueError, OverflowError) as error:
            raise ValueError(f"the record of weights is none ({error}): put back what was saved") from error
        return cls(exact, facts.get("stored"), computed)

    def difference(self, here: Identity, rounding: float = ROUNDING) -> str | None:
        """Says how the tensors here differ from the recorded ones; None if they are the same, but for rounding."""
        if self.exact == here.exact:
            return None
        if self.stored is None or here.stored is None:
            return _difference_of_bytes(self, here)
        if self.stored != here.stored:
            return f"other weights: fingerprint {here.stored[:12]}, the adapter was trained on {self.stored[:12]}"
        for name in sorted(self.computed.keys() | here.computed.keys()):
            if problem := _difference_of_values(name, self.computed.get(name), here.computed.get(name), rounding):
                return problem
        return None


def _difference_of_bytes(record: Identity, here: Identity) -> str:
    sentence = f"other weights: fingerprint {str(here.exact)[:12]}, the adapter was trained on {str(record.exact)[:12]}"
    if record.exact and here.computed:
        sentence += (
            f"; it is of a version that compared every bit, and {' and '.join(sorted(here.computed))} were resampled "
            "here, which differs between processors: open it once where it was trained and save it again"
        )
    return sentence


def _difference_of_values(name: str, recorded: tuple | None, here: tuple | None, rounding: float) -> str | None:
    if recorded is None or here is None:
        was, now = ("as stored" if tensor is None else f"resampled to {list(tensor[0])}" for tensor in (recorded, here))
        return f"the same weights at other sizes: {name} is {now}, the adapter was trained on it {was}"
    if recorded[0] != here[0]:
        was, now = list(recorded[0]), list(here[0])
        return f"the same weights at other sizes: {name} is {now}, the adapter was trained on {was}"
    change = sum((a - b) ** 2 for a, b in zip(recorded[1], here[1], strict=True)) ** 0.5
    change /= max(sum(a * a for a in recorded[1]) ** 0.5, 1e-30)
    if change <= rounding:
        return None
    return (
        f"the same weights as stored, but {name} was resampled otherwise: it differs by {change:.1e} of its size, and "
        f"rounding explains {rounding:.0e}; install the version of timm that the adapter was trained with"
    )


def plain_name(name: str) -> str:
    """A tensor's or layer's name before it was adapted, compiled or wrapped for activation checkpointing."""
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    return ".".join(parts)


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return any(part.startswith(ADAPTER_PREFIXES) for part in name.split("."))


def identify(module: nn.Module, drawn: Collection[str] = ()) -> Identity:
    """Identifies a module's base tensors, the same before and after adaptation.

    A submodule whose tensors were resampled says so in its attribute `resampled`: their names, and SHA-256 of what
    their file holds, or None where that is not known. `drawn` names tensors that were drawn at random.
    """
    resampled = {
        f"{prefix}.{name}" if prefix else name: digest
        for prefix, part in module.named_modules()
        for name, digest in getattr(part, "resampled", {}).items()
    }
    return identify_tensors(base_tensors(module), resampled, drawn)


def identify_tensors(
    tensors: Mapping[str, Tensor], resampled: Mapping[str, str | None], drawn: Collection[str] = ()
) -> Identity:
    """Identifies tensors, of which some were resampled (see `identify`) or drawn at random."""
    hashes = hash_tensors(tensors)
    stored = {name: digest for name, digest in (hashes | dict(resampled)).items() if digest and name not in drawn}
    computed = {
        name: (tuple(tensor.shape), sums(tensor))
        for name, tensor in tensors.items()
        if (name in resampled or name in drawn) and not tensor.is_meta
    }
    return Identity(combine_hashes(hashes), combine_hashes(stored), computed, hashes)


def sums(tensor: Tensor) -> tuple[float, ...]:
    """Sums of a tensor's values under fixed random signs, in `SUMS` groups.

    The distance between the sums of two tensors is about that between the tensors (a count sketch, Charikar et al.,
    https://doi.org/10.1016/S0304-3975(03)00400-6).
    """
    import torch

    values = tensor.detach().cpu().double().flatten()
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(2 * SUMS, values.shape, generator=generator)
    signed = torch.where(places >= SUMS, -values, values)
    return tuple(torch.zeros(SUMS, dtype=torch.double).index_add_(0, places % SUMS, signed).tolist())


def checksums(module: nn.Module) -> list[float]:
    """A sum of each of a module's tensors, on its own device: quick, and others once a callback has swapped weights."""
    import torch

    totals = [tensor.sum(dtype=torch.float32) for tensor in module.state_dict().values()]
    return torch.stack(totals).tolist() if totals else []  # one wait for the device


def tensor_hashes(module: nn.Module) -> dict[str, str]:
    """SHA-256 of each base tensor (parameters and persistent buffers), by its name before adaptation."""
    return hash_tensors(base_tensors(module))


def fingerprint(module: nn.Module) -> str:
    """SHA-256 over names, shapes, types and bytes of the base tensors: the same before and after adaptation."""
    return combine_hashes(tensor_hashes(module))


def combine_hashes(hashes: Mapping[str, str]) -> str:
    """One SHA-256 over those of tensors, by name."""
    return hashlib.sha256("\n".join(f"{name} {hashes[name]}" for name in sorted(hashes)).encode()).hexdigest()


def base_tensors(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers but the adapters, under their names before adaptation."""
    from torch import Tensor

    state = module.state_dict(keep_vars=True)
    return {
        plain_name(name): tensor
        for name, tensor in state.items()
        if isinstance(tensor, Tensor) and not is_adapter(name)
    }


def first_misfit(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str | None:
    """Says which tensor is of another shape or kind of numbers than the one of its name, or not finite; None if none.

    Names that only one of the two has are passed over.
    """
    for name in found.keys() & wanted.keys():
        tensor, own = found[name], wanted[name]
        if tensor.shape != own.shape:
            return f"does not fit: {name} is {list(tensor.shape)}, this network's is {list(own.shape)}"
        if (tensor.is_floating_point(), tensor.is_complex()) != (own.is_floating_point(), own.is_complex()):
            return f"does not fit: {name} is {tensor.dtype}, this network's is {own.dtype}"
        if unusual := unusual_numbers(tensor):
            return f"does not fit: {name} {unusual}"
        ends = tensor.aminmax() if tensor.is_floating_point() and tensor.numel() else ()  # one pass; nan stays nan
        if not all(end.isfinite() for end in ends):
            return f"cannot be used: {name} holds NaN or infinity, its training has diverged; take an earlier one"
    return None


def unusual_numbers(tensor: Tensor) -> str | None:
    """Says that a tensor is sparse, or of numbers in 8 bits, with which nothing is computed here; None if it is not."""
    strided = str(tensor.layout) == "torch.strided"
    if strided and not (tensor.is_floating_point() and tensor.itemsize < 2):
        return None
    return f"is {tensor.dtype if strided else tensor.layout}: save it dense, in float32, float16 or bfloat16"


def hash_tensors(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """SHA-256 over type, shape and bytes of each tensor, by its name.

    Raises:
        ValueError: one is of a type that does not give its bytes, as quantised ones of torchao.
    """
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashlib lets go of the interpreter lock
        return dict(zip(tensors, pool.map(_hash, tensors.values()), strict=True))


def _hash(tensor: Tensor) -> str:
    import torch

    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    if not tensor.is_meta:  # no bytes there
        try:
            content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        except NotImplementedError as error:
            raise ValueError(
                f"weights of the type {type(tensor.data).__name__} have no bytes to know a base by: adapt the weights "
                "as they were before they were quantised"
            ) from error
        digest.update(content.numpy())
    return digest.hexdigest()
