"""Costs of training, known before it starts: a step is run on tensors without values, and what it allocates added up.

Every operation of the real step runs in its real order, on torch's fake tensors: they have a shape, a type and a
lifetime, but no memory behind them. So the peak is the most bytes alive at any moment of the step, and not a formula
that would have to be kept up with the network.
"""

import logging
import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from eomt.cost.flops import flop_counter
from eomt.inference.artefacts import PLAIN_BASE
from eomt.lora.merging import cast_base
from eomt.lora.quantised import count_parameters as count_all
from eomt.lora.quantised import quantise_base
from eomt.models.vit import attention_in_two
from eomt.settings.backbone_choice import choose_backbone
from eomt.settings.model import completed
from eomt.settings.start import taken_over
from eomt.training.build import build_loss
from eomt.training.mask_classification_loss import MaskClassificationLoss, Matches, total
from eomt.training.mask_classification_semantic import MaskClassificationSemantic

AUTOCAST = {"32-true": None, "16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}
AUTOCAST |= {"32": None, "16": torch.float16, "bf16": torch.bfloat16}  # Lightning's older names
TARGETS = 19  # classes in an image that are assumed to be matched, at most
BESIDES = 2**30  # bytes of a card that no tensor gets: CUDA's context, workspaces of its libraries, gaps


@dataclass(frozen=True)
class Cost:
    """The parameters, memory and operations of training on each device.

    Args:
        batch_size: images a step, before accumulation.
        parameters, trained: how many, by part: backbone, adapters, queries, class_head, mask_head, upscale.
        forward_flops, backward_flops: of an optimiser step.
        weights, gradients, optimizer: bytes of them.
        activations: bytes that the forward pass leaves for the backward pass, those of the loss included.
        peak: the most bytes alive at any moment of a step.
    """

    batch_size: int
    parameters: dict[str, int]
    trained: dict[str, int]
    forward_flops: int
    backward_flops: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    peak: int

    @property
    def flops(self) -> int:
        return self.forward_flops + self.backward_flops


def training_cost(settings: Mapping[str, Any], batch_size: int, **options: Any) -> Cost:
    """The cost of a training step; see `rehearsal`."""
    with rehearsal(settings, **options) as cost_of:
        return cost_of(batch_size)


@contextmanager
def rehearsal(
    settings: Mapping[str, Any],
    precision: str | int = "bf16-mixed",
    accumulate: int = 1,
    device: str = "cuda",
    targets: int | None = None,
    cached_blocks: int = 0,
) -> Iterator[Callable[[int], Cost]]:
    """Training without weights, data, or that device: yields a function from a batch size to the cost of a step.

    Within the context every new tensor is without values.

    Args:
        settings: arguments of `MaskClassificationSemantic`.
        precision: as `lightning.Trainer` takes it.
        accumulate: batches an optimiser step.
        device: "cuda" or "cpu", which differ in what autocast leaves in float32.
        targets: classes in every image; None: as many as there are, queries permitting, and at most 19.
        cached_blocks: train from their output; see `TrunkCache`.

    Raises:
        ValueError: impossible settings, or a precision that is not known here.
    """
    if str(precision) not in AUTOCAST:
        raise ValueError(f"precision {precision}: the cost is known for {', '.join(AUTOCAST)}")
    dtype, module = AUTOCAST[str(precision)], build_for_rehearsal(settings, targets or TARGETS)
    masked = torch.full((module.network.num_blocks,), float(begins_masked(settings)))  # the one value that is read
    parameters = count_parameters(module)
    if dtype and device != "cpu":
        keep_norms_full(module)
    with fake_tensors() as live:
        module.to_empty(device="cpu").train()
        module.network.attn_mask_probs = masked
        if cached_blocks:
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                module.train_from(cached_blocks)
        weights = live.bytes
        for p in (p for p in module.parameters() if p.requires_grad):
            p.grad = torch.empty_like(p)
        gradients = live.bytes - weights
        optimizer = module.optimizer()
        optimizer.step()  # makes its state
        state = live.bytes - weights - gradients

        @cache
        def cost_of(batch_size: int) -> Cost:
            batch = empty_batch(module, batch_size)
            before = live.peak = live.bytes
            with flop_counter() as counter:
                with torch.autocast("cpu", dtype, enabled=dtype is not None):
                    loss = total(module.losses(*batch))
                activations, forward = live.bytes - before, counter.get_total_flops()
                if accumulate == 1:
                    optimizer.zero_grad()  # where Lightning does it: the last gradients outlive the forward pass
                loss.backward()
            optimizer.step()
            flops = [count * accumulate for count in (forward, counter.get_total_flops() - forward)]
            return Cost(batch_size, *parameters, *flops, weights, gradients, state, activations, live.peak)

        yield cost_of


def build_for_rehearsal(settings: Mapping[str, Any], targets: int) -> MaskClassificationSemantic:
    """The module without weights, whose step reads no value: at most `targets` classes are matched in every image."""
    module = build_without_weights(settings)
    with torch.device("meta"):
        module.criterion = build_loss(module.settings, outliers=module.outlier_loss is not None, kind=MatchesAll)
    module.criterion.targets = min(targets, module.hparams.num_classes, module.hparams.num_q)
    module.network.mask_type = Tensor  # a fake tensor cannot become a `QueryMask`; `MaskedAttention` takes its place
    return module


def begins_masked(settings: Mapping[str, Any]) -> bool:
    """Whether the first step has masked attention: always, but from a checkpoint that has learned to do without."""
    return not settings.get("ckpt_path") or bool(settings.get("attn_mask_annealing_enabled"))


def build_without_weights(settings: Mapping[str, Any]) -> MaskClassificationSemantic:
    """The module on meta tensors; nothing is downloaded or read."""
    no_weights = {"pretrained": False, "ckpt_path": None, "delta_weights": False, "compile": False}
    name = choose_backbone(settings.get("backbone_name"), settings.get("backbone_weights"))
    no_weights |= {"backbone_name": name, "backbone_weights": None}
    start = completed(settings)
    names = ("ckpt_path", "load_ckpt_class_head", "num_q", "backbone_kwargs")
    no_weights |= taken_over(*(start[name] for name in names))
    no_weights |= PLAIN_BASE
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # that the backbone is random
    try:
        with torch.device("meta"):
            module = MaskClassificationSemantic(**{**settings, **no_weights})
    finally:
        logging.disable(disabled)
    if settings.get("base_dtype") == "bfloat16":
        cast_base(module.backbone, torch.bfloat16)
    quantise_base(module.backbone, settings.get("base_quantisation"))
    return module


class MatchesAll(MaskClassificationLoss):
    """The loss where every image has `targets` classes, matched to some queries, so that no value is read."""

    targets = TARGETS

    def assign(self, cost: Tensor, seen: Tensor) -> Matches:
        return Matches(*torch.zeros(2, *cost.shape[:2], self.targets, dtype=torch.int64))


def empty_batch(module: MaskClassificationSemantic, batch_size: int) -> tuple[Tensor, Tensor]:
    """Images, or what is cached of them, and label maps."""
    encoder = module.network.encoder
    (height, width), (rows, columns) = encoder.img_size, encoder.grid_size
    labels = torch.empty(batch_size, height, width, dtype=torch.uint8)
    if not module.cached_blocks:
        return torch.empty(batch_size, 3, height, width, dtype=torch.uint8), labels
    tokens = encoder.num_prefix_tokens + rows * columns
    return torch.empty(batch_size, tokens, encoder.embed_dim, dtype=torch.bfloat16), labels


def count_parameters(module: MaskClassificationSemantic) -> tuple[dict[str, int], dict[str, int]]:
    """All parameters and the trainable ones, by part."""
    adapters = {id(p) for p in module.adapter_parameters()}
    parts = {
        "backbone": [p for p in module.backbone.parameters() if id(p) not in adapters],
        "adapters": module.adapter_parameters(),
        **{name: list(part.parameters()) for name, part in module.heads().items()},
    }
    everything = {name: sum(p.numel() for p in part) for name, part in parts.items()}
    everything["backbone"] += count_all(module) - sum(p.numel() for p in module.parameters())
    return everything, {name: sum(p.numel() for p in part if p.requires_grad) for name, part in parts.items()}


def keep_norms_full(module: nn.Module) -> None:
    """Layer norms in float32, as CUDA's autocast has them; that of the CPU, under which this runs, does not."""
    for layer in module.modules():
        if isinstance(layer, nn.LayerNorm):
            layer.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))


@contextmanager
def fake_tensors() -> Iterator["LiveBytes"]:
    """Tensors made in this context have no values; it yields what would be alive of them."""
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live, MaskedAttention():
        yield live


class MaskedAttention(TorchFunctionMode):
    """Attention with a mask in two calls, although the mask is no `QueryMask`."""

    def __torch_function__(self, function, types, args=(), kwargs=None):  # noqa: ANN001
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention and kwargs.get("attn_mask") is not None:
            return attention_in_two(*args, **kwargs)
        return function(*args, **kwargs)


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations made and that are still alive, and the most there were.

    Values that an operation would read are taken to be true: a check is passed, and no element is zero.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self.storages: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # noqa: ANN001
        if function is torch.ops.aten._local_scalar_dense.default:
            return 1
        if function is torch.ops.aten.nonzero.default:
            return torch.zeros(args[0].numel(), args[0].dim(), dtype=torch.int64)
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.add(tensor.untyped_storage())
        return result

    def add(self, storage: torch.UntypedStorage) -> None:
        """Counts a storage, unless it is counted already, until it is freed."""
        key, size = id(storage), storage.nbytes()
        if key in self.storages:
            return

        def freed(_: weakref.ref) -> None:
            self.bytes -= size
            del self.storages[key]

        self.storages[key] = weakref.ref(storage, freed)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)


def largest_batch(memory: int, cost_of: Callable[[int], Cost]) -> int:
    """The most images a step whose peak stays within `memory` bytes; 0 if one is too many."""

    def on_a_line(a: int, b: int) -> int:
        per_image = (cost_of(b).peak - cost_of(a).peak) / (b - a)
        return b + math.floor((memory - cost_of(b).peak) / per_image)

    images = max(0, on_a_line(1, 2))  # memory grows on a straight line, very nearly
    if images > 2:
        images = on_a_line(1, images)
    while images > 0 and cost_of(images).peak > memory:
        images -= 1
    while cost_of(images + 1).peak <= memory:
        images += 1
    return images


def variants(settings: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], str]:
    """The four ways to train this network, by name, and which of them the settings are; if none, they come last.

    K of "LoRA, last K" is `lora_blocks` if that is a number, otherwise the number of blocks that see the queries.
    """
    blocks = settings.get("lora_blocks", "all")
    last = settings["num_blocks"] if blocks == "all" else blocks
    nothing = {"use_lora": False, "lora_blocks": "all", "freeze": [], "unfreeze_last_n": None}
    ways = {
        "full": nothing,
        "LoRA": nothing | {"use_lora": True},
        f"LoRA, last {last}": nothing | {"use_lora": True, "lora_blocks": last},
        "frozen": nothing | {"freeze": ["backbone"]},
    }
    settings = {**settings, "freeze": list(settings["freeze"])}
    if not settings["use_lora"]:
        settings["lora_blocks"] = "all"
    own = {key: settings[key] for key in nothing}
    given = next((name for name, way in ways.items() if way == own), "as given")
    result = {name: {**settings, **way} for name, way in ways.items()}
    for way in result.values():
        if not way["use_lora"]:
            way |= PLAIN_BASE
    return result | ({} if given in ways else {given: settings}), given
