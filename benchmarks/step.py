"""Training steps: transformers' EoMT and ours, from the same weights on the same batch; and ours with and without LoRA.

A step is the forward pass with masked attention, the loss of all predictions, the backward pass and the optimiser.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.bench import Case, Work
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


def peer_step(task: Task, device: str) -> Work:
    """The plain recipe: dense masks, float attention masks, the whole mask maps, a parameter group for each tensor."""
    network = theirs(task).to(device).train()
    groups = [{"params": [p], "lr": 1e-5} for p in network.parameters()]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.05)
    images, labels = batch_of(task, device)

    def step() -> Tensor:
        torch.manual_seed(0)
        masks, classes = dense_masks(labels)
        with autocast(device):
            loss = network(normalized(images / 255), mask_labels=masks, class_labels=classes).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def our_step(task: Task, device: str, **settings: Any) -> Work:
    """What the LightningModule does in a step."""
    module = module_of(task, **settings).to(device)
    optimizer = module.optimizer()
    for group in optimizer.param_groups:
        group["lr"] = 1e-5
    images, labels = batch_of(task, device)

    def step() -> Tensor:
        torch.manual_seed(0)
        with autocast(device):
            terms = module.criterion(module.network.predictions(images / 255), labels)
            loss = sum(term.sum() for term in terms.values())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def same_loss(tolerance: float, theirs: Tensor, ours: Tensor) -> str:
    """Points are drawn differently, so that the losses agree as two draws of one loss do."""
    apart = abs(theirs - ours) / abs(theirs)
    if not apart < tolerance:
        raise AssertionError(f"losses {theirs:.5f} and {ours:.5f} differ by {100 * apart:.2f} %")
    return f"first loss {theirs:.5f} and {ours:.5f}, {100 * apart:.3f} % apart (other random points)"


def cases() -> list[Case]:
    return [
        Case(
            name="step.full",
            what="full step, " + "{task}",
            peer="transformers",
            build_peer=lambda device: peer_step(task_for(device), device),
            build_ours=lambda device: our_step(task_for(device), device),
            check=partial(same_loss, 0.01),
            time_target=0.70,
            memory_target=0.70,
        )
    ]


def options(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in settings.items())
