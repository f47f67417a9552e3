"""Where memory runs out, one sentence says so, and what to lower."""

import errno
import re

import pytest
import torch
from conftest import TINY, TOY_DATA, TOY_MODEL, fit, run_training

from eomt.command_line import RunError, memory_explained, out_of_memory, reports_errors
from eomt.cost.memory_errors import explain_memory
from eomt.data.toy_streets import toy_streets
from eomt.inference.folder_prediction import FolderPrediction
from eomt.inference.prediction import TorchScorer
from eomt.training.evaluation import evaluate
from eomt.training.mask_classification_semantic import MaskClassificationSemantic

CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.6 GiB")
ENDED = "DataLoader worker (pid 4242) is killed by signal: "
BUS = "Bus error. It is possible that dataloader's workers are out of shared memory. Please try to raise your limit."


@pytest.fixture
def data(toy_cache):
    return toy_streets(
        str(toy_cache), num_train=8, num_val=3, size=(64, 128), img_size=[64, 128], batch_size=2, num_workers=0
    )


def build(**settings):
    return MaskClassificationSemantic(**{**TINY, **settings})


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (CUDA, "the GPU ran out of memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "the GPU"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
            "out",
        ),
        (MemoryError(), "out of memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of memory"),
        (RuntimeError(ENDED + "Killed. "), r"a loader process was ended by the system \(Killed\)"),
        (RuntimeError(ENDED + BUS), "a loader process ran out of shared memory"),
        (RuntimeError("DataLoader worker (pid(s) 4, 5) exited unexpectedly"), "a loader process was ended"),
        (MemoryError("Caught MemoryError in DataLoader worker process 0.\nOriginal Traceback"), "a loader process ran"),
        (
            RuntimeError("Caught RuntimeError in DataLoader worker process 1.\nunable to allocate shared memory(shm)"),
            "a lo",
        ),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
        (OSError(errno.ENOSPC, "No space left on device"), None),
        (RunError("out of memory: said already"), None),
    ],
)
def test_errors_about_memory_are_known_by_what_they_say(error, words):
    said = out_of_memory(error)
    assert re.match(words, said) if words else said is None


def test_an_error_about_something_else_passes_as_it_is():
    with pytest.raises(RuntimeError, match="shapes") as caught, memory_explained():
        raise RuntimeError("shapes")
    assert type(caught.value) is RuntimeError


def test_a_script_that_runs_out_of_memory_says_so_in_a_sentence(capsys):
    @reports_errors()
    def main():
        raise MemoryError

    assert main() == 1 and capsys.readouterr().err.startswith("error: out of memory: take a smaller network")


def explained(module, data, batch_size, **trainer):
    with (
        pytest.raises(RunError) as caught,
        memory_explained(lambda: explain_memory(module.trainer, module, batch_size)),
    ):
        fit(module, data, **trainer)
    return str(caught.value)


def fails(*args):
    raise CUDA


def test_a_step_names_what_to_lower_with_the_numbers_of_the_estimate(data):
    module = build(num_points=4096)
    module.losses = fails
    said = explained(module, data, 2)
    numbers = re.fullmatch(
        r"the GPU ran out of memory: a step with data\.batch_size=2 at 64x128 needs about ([\d.]+) GiB; with data\."
        r"batch_size=1 about ([\d.]+) GiB, with model\.checkpoint_predictions=true about ([\d.]+) GiB",
        said,
    )
    now, *less = map(float, numbers.groups())
    assert all(0 < other < now for other in less)


def test_a_step_of_one_image_is_told_to_take_smaller_crops(data):
    module = build(checkpoint_predictions=True)
    module.losses = fails
    said = explained(module, data, 1)
    assert 'with "model.img_size=[32,64]" about' in said and "checkpoint_predictions" not in said


def test_where_no_memory_is_left_to_estimate_with_the_settings_are_named_all_the_same(data):
    module = build()
    module.losses = fails
    module.hparams.precision = module.hparams.nothing = "of the kind"  # which the estimate does not know
    assert "with data.batch_size=1 an unknown amount" in explained(module, data, 2)


def test_validation_names_its_own_remedy(data):
    module = build()
    module.network.forward = fails
    said = explained(module, data, 2, limit_val_batches=1, num_sanity_val_steps=1, precision="32-true")
    assert "all windows of an image, 64x128 each" in said and "trainer.precision=bf16-mixed (now 32-true)" in said


def test_evaluation_and_prediction_say_what_to_lower(data, tmp_path):
    module = build(class_names=list(data.classes.names))
    module.network.forward = fails
    with pytest.raises(RunError, match=r"the GPU ran out of memory: all windows of .* --precision bf16-mixed"):
        evaluate(module, data, precision="32-true", accelerator="cpu")
    for batch_size, remedy in ((2, "lower --batch-size, it is 2"), (1, "--precision bf16-mixed")):
        predict = FolderPrediction(TorchScorer(module.network), data.classes, tmp_path, batch_size=batch_size)
        with pytest.raises(RunError, match=f"the GPU ran out of memory: .*{remedy}"):
            list(predict._predict(iter([(str(k), torch.zeros(3, 64, 128, dtype=torch.uint8)) for k in range(2)])))


def test_a_run_that_runs_out_of_memory_ends_in_a_sentence(toy_cache, tmp_path):
    words = [*TOY_DATA, f"data.root={toy_cache}", "model=tiny", *TOY_MODEL, "data.batch_size=4", "trainer.max_epochs=1"]
    words += ["model.num_points=1000000000000000", f"output_dir={tmp_path}"]  # more than there are addresses
    result = run_training(*words)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert re.match(r"error: out of memory: a step with data\.batch_size=4 at 64x64 needs about [\d.]+ GiB; with", line)
    assert '"status": "failed: out of memory' in (tmp_path / "summary.json").read_text()
