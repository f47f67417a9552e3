"""The loss alone: mask logits from embeddings and features, matching, all terms of 5 predictions, and back."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench import Case
from benchmarks.peer import dense_masks
from benchmarks.step import batch_of, module_of, same_loss, task_for, theirs
from eomt.models.eomt import Prediction


def work_on(device: str, loss: Callable[[list[Prediction], Tensor], Tensor]) -> Callable[[], Tensor]:
    """A round: the loss of the untrained network's predictions, and its gradient at each of them."""
    task = task_for(device)
    images, labels = batch_of(task, device)
    with torch.no_grad():
        outputs = module_of(task).to(device).network.predictions(images / 255)
    predictions = [Prediction(*(tensor.detach().requires_grad_() for tensor in one)) for one in outputs]
    leaves = [tensor for one in predictions for tensor in one]

    def work() -> Tensor:
        torch.manual_seed(0)
        for leaf in leaves:
            leaf.grad = None
        total = loss(predictions, labels)
        total.backward()
        return total.detach()

    return work


def peer(device: str) -> Callable[[], Tensor]:
    network = theirs(task_for(device)).to(device)

    def loss(predictions: list[Prediction], labels: Tensor) -> Tensor:
        masks, classes = dense_masks(labels)
        total: Any = 0
        for one in predictions:
            logits = torch.einsum("bqc,bchw->bqhw", one.embeddings, one.features)
            terms = network.get_loss_dict(logits, one.class_logits, masks, classes, None)
            total = total + network.get_loss(terms)
        return total

    return work_on(device, loss)


def ours(device: str) -> Callable[[], Tensor]:
    criterion = module_of(task_for(device)).criterion.to(device)
    return work_on(device, lambda predictions, labels: sum(t.sum() for t in criterion(predictions, labels).values()))


def cases(device: str) -> list[Case]:
    return [
        Case(
            name="loss",
            what=f"loss of 5 predictions and its gradient, {task_for(device)}",
            peer="transformers' EomtLoss",
            build_peer=peer,
            build_ours=ours,
            check=partial(same_loss, 0.01, ", at other random points"),
            time_target=0.35,
        )
    ]
