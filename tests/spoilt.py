"""A module whose batches fail on demand; run as a file, two processes train it, and process 1 alone fails.

python tests/spoilt.py CACHE FOLDER
"""

import json
import math
import sys
from pathlib import Path

import lightning
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eomt.data.toy_streets import toy_streets
from eomt.fingerprints import combine_hashes, hash_tensors
from eomt.training.finite_steps import FiniteSteps
from eomt.training.mask_classification_semantic import MaskClassificationSemantic


class Spoilt(MaskClassificationSemantic):
    """Batches of these numbers, counted over all epochs, give a loss, logits or gradients that are not finite."""

    def __init__(self, *args, spoil=(), what="loss", **settings):
        super().__init__(*args, **settings)
        self.spoil, self.what, self.seen = set(spoil), what, -1

    def losses(self, images, labels):
        self.seen += 1
        if self.seen not in self.spoil:
            return super().losses(images, labels)
        return getattr(self, f"losses_without_{self.what}")(images, labels)

    def losses_without_logit(self, images, labels):
        handle = self.network.class_head.register_forward_hook(lambda *args: args[2] * math.nan)
        terms = super().losses(images, labels)
        handle.remove()
        return terms

    def losses_without_loss(self, images, labels):
        terms = super().losses(images, labels)
        return terms | {"class": terms["class"] + math.nan}  # whose gradients are finite

    def losses_without_gradient(self, images, labels, factor=math.nan):
        terms = super().losses(images, labels)
        terms["class"].register_hook(lambda gradient: gradient * factor)
        return terms

    def losses_without_overflow(self, images, labels):
        return self.losses_without_gradient(images, labels, math.inf)


class Remember(lightning.Callback):
    """Writes which steps left the weights as they were, and the weights at the end."""

    def __init__(self, folder, finite):
        self.folder, self.finite, self.hashes = Path(folder), finite, []

    def on_train_batch_end(self, trainer, module, *args):
        self.hashes.append(combine_hashes(hash_tensors(dict(module.named_parameters()))))

    def on_train_end(self, trainer, module):
        pairs = zip(self.hashes, self.hashes[1:], strict=False)
        facts = {"unchanged": [i for i, (a, b) in enumerate(pairs, 1) if a == b], "weights": self.hashes[-1]}
        text = json.dumps(facts | {"skipped": self.finite.skipped})
        (self.folder / f"process_{trainer.global_rank}.json").write_text(text)


class OneFails(Spoilt):
    def on_fit_start(self):
        super().on_fit_start()
        self.spoil = {1, 2} if self.global_rank == 1 else set()

    def on_train_batch_start(self, batch, batch_idx):
        super().on_train_batch_start(batch, batch_idx)
        self.what = "loss" if self.seen == 0 else "logit"


if __name__ == "__main__":
    cache, folder = sys.argv[1:]
    torch.manual_seed(0)
    torch.set_num_threads(1)
    sizes = {"img_size": [64, 128], "num_q": 20, "num_blocks": 2, "num_points": 64, "warmup_steps": [0, 0]}
    kwargs = {"embed_dim": 64, "depth": 3, "num_heads": 2}
    module = OneFails(
        num_classes=19, backbone_name="vit_tiny_patch16_224", backbone_kwargs=kwargs, pretrained=False, **sizes
    )
    data = toy_streets(cache, num_train=8, num_val=3, size=(64, 128), img_size=[64, 128], batch_size=1, num_workers=0)
    finite = FiniteSteps(folder)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp_fork",
        max_steps=4,
        limit_val_batches=0,
        callbacks=[finite, Remember(folder, finite)],
        **quiet,
    )
    trainer.fit(module, data)
