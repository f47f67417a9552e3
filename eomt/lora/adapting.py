"""What trains in a pretrained part of any network: adapters, else its last blocks, else nothing."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from eomt.fingerprints import is_adapter
from eomt.lora import files
from eomt.lora.merging import merge
from eomt.lora.ties import tied_outside, unique
from eomt.targets import find_stacks, parts_apart, stack_name
from lora_config import LoRASettings, Method, apply_lora, assert_not_adapted, listed

if TYPE_CHECKING:
    from peft import PeftModel

log = logging.getLogger(__name__)


class Adapted:
    """A pretrained part as `adapt` or `load_adapted` left it: what trains in it, and its adapters' files.

    A plain object, so that a module can keep it as an attribute without holding the part twice in its state dict.

    Args:
        module: the part itself, changed in place: use it on as before.
        settings: those of LoRA; None: no adapters.
        handle: PEFT's; None: no adapters.
    """

    def __init__(
        self, module: nn.Module, settings: LoRASettings | None = None, handle: PeftModel | None = None
    ) -> None:
        self.module, self.settings, self.handle = module, settings, handle

    def parameters(self) -> list[nn.Parameter]:
        """What trains in the part: the adapters, or the last blocks, and what was given as `also`."""
        return unique([*(p for p in self.module.parameters() if p.requires_grad), *self.also])

    def adapter_parameters(self) -> list[nn.Parameter]:
        """The adapters' own parameters, of all adapters, frozen or not."""
        return [p for name, p in self.module.named_parameters() if is_adapter(name)]

    @property
    def also(self) -> list[nn.Parameter]:
        """The parameters that were given to `adapt` to train besides, inside the part or outside."""
        return getattr(self.module, "lora_also", [])

    @property
    def summary(self) -> str:
        """`Trainable: 442,368 (0.51%) | Total: 86,168,064`, of the part."""
        sizes = [(p.numel(), p.requires_grad) for p in self.module.parameters()]
        total, trained = sum(n for n, _ in sizes), sum(n for n, trains in sizes if trains)
        return f"Trainable: {trained:,} ({100 * trained / max(total, 1):.2f}%) | Total: {total:,}"

    def save(self, directory: str | Path) -> None:
        """Writes the adapter in use to a folder, bound to its base by fingerprint; see `eomt.lora.files.save_adapter`.

        Raises:
            ValueError: there is none.
        """
        files.save_adapter(self._handle(), directory)

    def merge(self) -> nn.Module:
        """Adds the update to the base weights, in float32, and returns the part, plain again; see `merging.merge`."""
        merged = merge(self._handle())
        self.handle = self.settings = None
        return merged

    def add(self, directory: str | Path, name: str) -> None:
        """Loads a further adapter of the same base beside those that are there; see `files.add_adapter`."""
        files.add_adapter(self._handle(), directory, name)

    def use(self, name: str) -> None:
        """Switches to one of several adapters, or to none (`base`); all are frozen from then on."""
        files.use_adapter(self._handle(), name)

    def _handle(self) -> PeftModel:
        if self.handle is None:
            raise ValueError(f"{type(self.module).__name__} has no adapters: give `adapt` LoRASettings")
        return self.handle


def adapt(
    encoder: nn.Module,
    lora: LoRASettings | None = None,
    unfreeze_last_n: int = 0,
    also: Iterable[nn.Module | nn.Parameter] = (),
    network: nn.Module | None = None,
    method: Method | None = None,
    blocks: Sequence[nn.Module] | None = None,
    expect_untrained: bool = False,
) -> Adapted:
    """Freezes a pretrained part, in place, but for LoRA adapters, else its last blocks, else nothing.

    Load its weights before, and build the optimiser after.

    Args:
        encoder: the part, for example `model.vision`; base of the adapters.
        lora: adapters; they take the place of `unfreeze_last_n`.
        unfreeze_last_n: how many of its last numbered blocks train in full, if there is no LoRA.
        also: modules or parameters that train besides, inside it (a final norm) or outside (a head that is tied to its
            embedding, which then trains, too).
        network: the whole that the part belongs to; parameters that are tied to modules outside are then named.
        method: in place of LoRA; see `eomt.lora.methods.AdapterMethod`.
        blocks: its blocks for `unfreeze_last_n`; None: the numbered ones.
        expect_untrained: whether it is known to be without trained weights, of which else a warning tells.

    Raises:
        ImportError: PEFT is missing. TypeError: `lora` or `also` is something else.
        ValueError: there are fewer blocks, or several stacks of them; and what `apply_lora` raises. The part is then
            as it was.
    """
    encoder = getattr(encoder, "_orig_mod", encoder)  # what torch.compile wraps
    if lora is not None and not isinstance(lora, LoRASettings):
        raise TypeError(f"lora is {lora!r}: give LoRASettings, or None for no adapters")
    assert_not_adapted(encoder)
    besides = parameters_of(also)
    unfrozen = [] if lora or not unfreeze_last_n else last_blocks(encoder, unfreeze_last_n, blocks)
    if not expect_untrained and looks_untrained(encoder):
        log.warning("%s looks untrained (its norms are as they are made): load its weights before", name_of(encoder))
    if lora and unfreeze_last_n:
        log.warning("LoRA and unfreeze_last_n %s: LoRA takes its place, no block is unfrozen", unfreeze_last_n)
    with frozen_or_as_before(encoder):
        handle = apply_lora(encoder, lora, method) if lora else None
    for block in unfrozen:
        block.requires_grad_(True)
    train_besides(encoder, besides, network)
    adapted = Adapted(encoder, lora, handle)
    if not any(p.is_meta for p in encoder.parameters()):  # without weights it is built to be counted
        say(f"{name_of(encoder)}: {adapted.summary}")
    return adapted


def load_adapted(
    encoder: nn.Module,
    directory: str | Path,
    is_trainable: bool = False,
    also: Iterable[nn.Module | nn.Parameter] = (),
    network: nn.Module | None = None,
) -> Adapted:
    """Adapts a part, in place, with a saved adapter, which carries its settings; the part has its base weights.

    Args:
        encoder, also, network: as for `adapt`.
        directory: as `Adapted.save` wrote it.
        is_trainable: whether the adapter trains on.

    Raises:
        FileNotFoundError: the directory holds no adapter.
        ValueError: already adapted, the adapter was trained on other base weights, was edited, or does not fit. The
            part is then as it was.
    """
    encoder = getattr(encoder, "_orig_mod", encoder)
    assert_not_adapted(encoder)
    besides = parameters_of(also)
    with frozen_or_as_before(encoder):
        handle = files.load_adapter(encoder, directory, is_trainable)
    train_besides(encoder, besides, network)
    return Adapted(encoder, encoder.lora_settings, handle)


@contextmanager
def frozen_or_as_before(part: nn.Module) -> Iterator[None]:
    """A part is frozen inside; after an error its parameters train as they did before."""
    before = [(p, p.requires_grad) for p in part.parameters()]
    part.requires_grad_(False)
    try:
        yield
    except BaseException:
        for p, requires_grad in before:
            p.requires_grad_(requires_grad)
        raise


def parameters_of(parts: Iterable[nn.Module | nn.Parameter] | nn.Module | nn.Parameter) -> list[nn.Parameter]:
    """The parameters among modules and parameters, of which there may be one alone; each once.

    Raises:
        TypeError: something else is among them.
    """
    parts = [parts] if isinstance(parts, (nn.Module, nn.Parameter, str)) else list(parts)
    if wrong := [part for part in parts if not isinstance(part, (nn.Module, nn.Parameter))]:
        raise TypeError(f"also holds {wrong[0]!r}: give modules or parameters, for example [model.norm]")
    return unique(p for part in parts for p in ([part] if isinstance(part, nn.Parameter) else part.parameters()))


def train_besides(encoder: nn.Module, besides: Sequence[nn.Parameter], network: nn.Module | None) -> None:
    """Lets these parameters train, too, and names what outside of the part is frozen because it is tied to it."""
    encoder.lora_also = list(besides)  # a plain list, for the audit
    for p in besides:
        p.requires_grad_(True)
    for name, others in tied_outside(encoder, network).items() if network is not None else ():
        if not encoder.get_parameter(name).requires_grad:
            remedy = "give that module in `also` if it is to train"
            log.warning("%s of the adapted part is tied to %s, which is frozen, too; %s", name, listed(others), remedy)


def looks_untrained(part: nn.Module) -> bool:
    """Whether there are norms and all are as they are made, of equal weights and zero biases: training moves them."""
    norms = [m for m in part.modules() if "norm" in type(m).__name__.lower() and getattr(m, "weight", None) is not None]
    tensors = [(norm.weight, getattr(norm, "bias", None)) for norm in norms if not norm.weight.is_meta]
    return bool(tensors) and all(
        bool((weight == weight.flatten()[0]).all()) and (bias is None or not bias.any()) for weight, bias in tensors
    )


def say(sentence: str) -> None:
    """Logs it; where no log is set up it goes to stderr, as Python does with warnings, since it is what was asked."""
    log.info(sentence) if log.hasHandlers() else print(sentence, file=sys.stderr)


def name_of(part: nn.Module) -> str:
    return type(part).__name__


def last_blocks(encoder: nn.Module, count: int, blocks: Sequence[nn.Module] | None = None) -> list[nn.Module]:
    """The last of these blocks; None: of the numbered ones, decoders apart.

    Raises:
        ValueError: there are fewer, or several stacks of them.
    """
    if blocks is None:
        apart = tuple(f"{part}." for part in parts_apart(encoder))
        stacks = [stack for stack in find_stacks(encoder) if not stack[0].startswith(apart)]
        if len(stacks) > 1:
            names = ", ".join(map(stack_name, stacks))
            raise ValueError(f"unfreeze_last_n {count}: there are {len(stacks)} stacks, {names}; adapt each by itself")
        blocks = [encoder.get_submodule(name) for stack in stacks for name in stack]
    if not isinstance(count, Integral) or isinstance(count, bool) or not 0 <= count <= len(blocks):
        there = len(blocks)
        raise ValueError(f"unfreeze_last_n {count}: the backbone has {there} blocks; give a number from 0 to {there}")
    return list(blocks[len(blocks) - count :])
