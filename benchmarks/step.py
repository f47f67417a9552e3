"""Training steps: transformers' EoMT and ours, from the same weights on the same batch; and ours with and without LoRA.

A step is the forward pass with masked attention, the loss of all predictions, the backward pass and the optimiser.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.bench import Case, Row
from benchmarks.peer import SIZES, dense_masks, normalized, our_names, peer_network
from eomt.training.mask_classification_semantic import MaskClassificationSemantic

CLASSES = 19


@dataclass(frozen=True)
class Task:
    """What is trained on: network, image side, images a step, queries, classes in an image."""

    size: str = "small"
    side: int = 512
    batch: int = 2
    queries: int = 100
    targets: int = 12
    classes: int = CLASSES

    def __str__(self) -> str:
        return f"ViT-{self.size[0].upper()}/16, {self.side}x{self.side}, batch {self.batch}, {self.queries} queries"


def task_for(device: str) -> Task:
    return Task() if device == "cpu" else Task("large", 1024)


def batch_of(task: Task, device: str) -> tuple[Tensor, Tensor]:
    """Random images uint8 [B, 3, H, W] and label maps uint8 [B, H, W] of rectangles, the same each time."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (task.batch, 3, task.side, task.side), dtype=torch.uint8, generator=generator)
    columns = -(-task.targets // 4)  # a chessboard of 4 rows
    cells = torch.arange(4 * columns).view(4, columns) % task.targets
    labels = cells.repeat_interleave(task.side // 4, 0).repeat_interleave(-(-task.side // columns), 1)[:, : task.side]
    return images.to(device), labels.to(torch.uint8).expand(task.batch, -1, -1).contiguous().to(device)


def autocast(device: str) -> torch.autocast:
    """float32 on a CPU, bf16 on a GPU."""
    return torch.autocast(device, torch.bfloat16, enabled=device != "cpu")


def theirs(task: Task, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    width, depth, heads, _ = SIZES[task.size]
    network = peer_network(width, depth, heads, task.side, task.classes, task.queries, blocks=4)
    for name, parameter in network.named_parameters():  # as far from an untrained network as masks need
        if "layer_scale" in name:
            nn.init.ones_(parameter)
    return network


def module_of(task: Task, **settings: Any) -> MaskClassificationSemantic:
    """Our network with the peer's weights, masks annealed as in a run from the start."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/model.safetensors"
        save_file({key: t.contiguous() for key, t in our_names(theirs(task).state_dict()).items()}, path)
        settings = {"num_q": task.queries, "attn_mask_annealing_enabled": True, "lora_dropout": 0.0} | settings
        return MaskClassificationSemantic(
            (task.side, task.side), task.classes, backbone_name=SIZES[task.size][3], ckpt_path=path, **settings
        ).train()


class Step:
    """One training step a call; returns the loss that it started with."""

    def __init__(self, loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer, device: str) -> None:
        self.loss, self.optimizer, self.device = loss, optimizer, device

    def __call__(self) -> Tensor:
        torch.manual_seed(0)
        with autocast(self.device):
            loss = self.loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def state_bytes(self) -> int:
        """Of gradients and of what the optimiser keeps."""
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        state = [t for entry in self.optimizer.state.values() for t in entry.values() if isinstance(t, Tensor)]
        return sum(t.numel() * t.element_size() for t in (*params, *state))


def peer_step(task: Task, device: str) -> Step:
    """The plain recipe: dense masks, float attention masks, whole mask maps, a parameter group for each tensor."""
    network = theirs(task).to(device).train()
    groups = [{"params": [p], "lr": 1e-5} for p in network.parameters()]
    images, labels = batch_of(task, device)

    def loss() -> Tensor:
        masks, classes = dense_masks(labels)
        return network(normalized(images / 255), mask_labels=masks, class_labels=classes).loss

    return Step(loss, torch.optim.AdamW(groups, weight_decay=0.05), device)


def our_step(task: Task, device: str, **settings: Any) -> Step:
    """What the LightningModule does in a step."""
    return step_of(module_of(task, **settings).to(device), batch_of(task, device), device)


def step_of(module: MaskClassificationSemantic, batch: tuple[Tensor, Tensor], device: str) -> Step:
    module.log = module.log_dict = lambda *args, **kwargs: None
    optimizer = module.optimizer()
    for group in optimizer.param_groups:
        group["lr"] = 1e-5
    return Step(lambda: module.training_step(batch, 0), optimizer, device)


def cached_step(task: Task, device: str, **settings: Any) -> Step:
    """LoRA in the last blocks, from tokens that came out of the frozen ones in bf16."""
    module = module_of(task, **LAST, masked_attn_enabled=False, **settings).to(device)
    images, labels = batch_of(task, device)
    depth = len(module.network.encoder.blocks) - module.network.num_blocks
    with torch.no_grad(), autocast(device):
        tokens = module.network.trunk(images / 255, depth)[0].bfloat16()
    module.train_from(depth)
    return step_of(module, (tokens, labels), device)


LORA = {"use_lora": True, "lora_rank": 16}
LAST = LORA | {"lora_blocks": 4}


def same_loss(tolerance: float, note: str, theirs: Tensor, ours: Tensor) -> str:
    apart = (abs(theirs - ours) / abs(theirs)).item()
    if not apart <= tolerance:
        raise AssertionError(f"losses {theirs:.6f} and {ours:.6f} differ by {100 * apart:.2g} %")
    return f"first loss {theirs:.6f} and {ours:.6f}, {100 * apart:.2g} % apart{note}"


def same_as_from_pixels(device: str, full: Tensor, cached: Tensor) -> str:
    """The cached step against the same step without the cache; its loss is of one prediction, the full step's of 5."""
    pixels = our_step(task_for(device), device, **LAST, masked_attn_enabled=False)()
    return same_loss(5e-3, ", with and without the cache", pixels, cached)


def cases(device: str) -> list[Case]:
    task = task_for(device)

    def ours(**settings: Any) -> Callable[[str], Step]:
        return lambda device: our_step(task, device, **settings)

    equal = partial(same_loss, 1e-5, "")  # fresh adapters change nothing
    return [
        Case(
            name="step.full",
            what=f"full step, {task}",
            peer="transformers' EomtForUniversalSegmentation",
            build_peer=lambda device: peer_step(task, device),
            build_ours=ours(),
            check=partial(same_loss, 0.01, ", at other random points"),
            time_target=0.70,
            memory_target=0.70,
        ),
        Case(
            name="step.lora",
            what="LoRA step, qkv and proj in all blocks",
            peer="our full step",
            build_peer=ours(),
            build_ours=ours(**LORA),
            check=equal,
            time_target=0.88,
        ),
        Case(
            name="step.last",
            what="LoRA step, last 4 blocks",
            peer="our full step",
            build_peer=ours(),
            build_ours=ours(**LAST),
            check=equal,
            time_target=0.70,
            memory_target=0.70,
        ),
        Case(
            name="step.checkpoint",
            what="LoRA step, last 4 blocks, checkpoint_predictions",
            peer="the same without",
            build_peer=ours(**LAST),
            build_ours=ours(**LAST, checkpoint_predictions=True),
            check=equal,
            time_target=1.15,
        ),
        Case(
            name="step.activations",
            what="LoRA step, last 4 blocks, checkpoint_predictions",
            peer="our full step",
            build_peer=ours(),
            build_ours=ours(**LAST, checkpoint_predictions=True),
            check=equal,
            memory_target=0.50,
            memory_from="state",
        ),
        Case(
            name="step.cached",
            what="LoRA step, last 4 blocks, trunk_cache",
            peer="our full step",
            build_peer=ours(),
            build_ours=lambda device: cached_step(task, device),
            check=partial(same_as_from_pixels, device),
            time_target=0.30,
        ),
    ]


def rows(device: str) -> list[Row]:
    """What is counted and not timed."""
    task = task_for(device)
    state = {}
    for side, settings in (("peer", {}), ("ours", LORA)):
        step = our_step(task, device, **settings)
        step()
        state[side] = step.state_bytes()
    ratio = state["ours"] / state["peer"]
    shown = [f"{state[side] / 2**20:.1f} MiB" for side in ("peer", "ours")]
    what = "LoRA step, qkv and proj in all blocks: gradients and optimiser"
    return [Row(what, *shown, ratio, "<= 0.10", ratio <= 0.10, facts={"bytes": state}), large_flops()]


def large_flops() -> Row:
    """ViT-L/16 at 1024x1024, counted without computing."""
    from eomt.cost.training_cost import training_cost

    network = {
        "img_size": (1024, 1024),
        "num_classes": CLASSES,
        "backbone_name": SIZES["large"][3],
        "pretrained": False,
    }
    full, last = (training_cost(network | settings, 1, precision="bf16-mixed") for settings in ({}, LAST))
    flops = {"peer": full.forward_flops + full.backward_flops, "ours": last.forward_flops + last.backward_flops}
    ratio = flops["ours"] / flops["peer"]
    shown = [f"{flops[side] / 1e12:.2f} TFLOP" for side in ("peer", "ours")]
    what = "LoRA step, last 4 blocks, ViT-L/16, 1024x1024: counted FLOPs"
    return Row(what, *shown, ratio, "<= 0.52", ratio <= 0.52, facts={"flops": flops})
