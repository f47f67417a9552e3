"""What another machine computes, run in a process with other threads and other instructions of the processor.

python tests/other_machine.py FOLDER ...: reads settings.json there, opens adapter/ and last.ckpt, writes other.json and
outputs.pt. Imported by the test as well, which computes the same on its own machine.
"""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eomt.data.transforms import TrainTransform
from eomt.fingerprints import identify
from eomt.reporting.run_summary import HashBatches
from eomt.training.mask_classification_semantic import MaskClassificationSemantic


def build(settings, **changes):
    torch.manual_seed(0)
    return MaskClassificationSemantic(**settings | changes)


def start(module):
    """What `train_with_lora.py` records of the weights before the first step."""
    identity = identify(module.network, module.network.drawn)
    return {"exact": identity.exact, **identity.as_dict()}


def batches():
    """What a run records of its first batches, here of four crops of a drawn picture."""
    torch.manual_seed(0)
    transform, first = TrainTransform((64, 96)), HashBatches(2)
    picture = torch.randint(0, 256, (80, 120, 3), dtype=torch.uint8).permute(2, 0, 1)  # as decoded: pixel by pixel
    labels = torch.randint(0, 19, (80, 120), dtype=torch.uint8)
    for index in range(2):
        images, maps = zip(transform(picture, labels), transform(picture, labels), strict=True)
        first.on_train_batch_start(None, None, [torch.stack(images), torch.stack(maps)], index)
    return {"exact": first.identity.exact, **first.identity.as_dict()}


def outputs(module):
    """Mask and class logits of one image [3, h, w] in one row."""
    image = torch.rand(1, 3, *module.hparams.img_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), module.eval().network.deployed():
        mask_logits, class_logits = module.network(image)
    return torch.cat([logits.flatten() for logits in (*mask_logits, *class_logits)])


def opened(path):
    return outputs(MaskClassificationSemantic.from_pretrained(path))


def resumed(settings, path):
    """The outputs of a run that goes on from a checkpoint, as Lightning loads it."""
    module = build(settings, use_lora=True)
    checkpoint = torch.load(path, weights_only=True)
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"], strict=False)
    return outputs(module)


if __name__ == "__main__":
    for folder in map(Path, sys.argv[1:]):
        settings = json.loads((folder / "settings.json").read_text())
        facts = {"start": start(build(settings)), "batches": batches()}
        (folder / "other.json").write_text(json.dumps(facts))
        last = folder / "last.ckpt"
        torch.save([opened(folder / "adapter"), opened(last), resumed(settings, last)], folder / "outputs.pt")
