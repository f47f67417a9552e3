"""Opening an ONNX file that `export_onnx` wrote, and scoring images with it; torch is not needed until then."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, PositiveInt

from eomt.command_line import one_sentence
from eomt.exchange.extras import require
from eomt.files import parse_json
from eomt.settings.config_check import check_type
from eomt.settings.formats import EXPORTED, check_format

if TYPE_CHECKING:
    from torch import Tensor

Channel = Annotated[int, Field(ge=0, le=255)]
TYPES = {  # what a description says, as far as it is used
    "img_size": Annotated[list[PositiveInt], Field(min_length=2, max_length=2)],
    "outputs": Literal["classes", "queries"],
    "images": Literal["uint8", "float"],
    "batch": PositiveInt | None,
    "class_names": Annotated[list[str], Field(min_length=1)],
    "class_colors": list[Annotated[list[Channel], Field(min_length=3, max_length=3)]],
}
METADATA = "eomt"  # the name, among those of an ONNX file's metadata, of what it says of itself, as JSON


def open_session(path: Path, device: str = "cpu", threads: int = 0) -> Any:
    """Returns onnxruntime's session of a file.

    Args:
        device: `cpu` or `cuda`. threads: of the CPU; 0: as many as there are cores.

    Raises:
        ImportError: onnxruntime is missing. FileNotFoundError: there is no file. ValueError: it cannot be opened, or
            this onnxruntime sees no GPU.
    """
    require("onnx", f"{path}, an ONNX file,", "onnxruntime")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    import onnxruntime

    provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[device]
    if provider not in onnxruntime.get_available_providers():
        raise ValueError(
            f"--device {device}: the installed onnxruntime has no {provider}; install onnxruntime-gpu, or leave it out"
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    try:
        return onnxruntime.InferenceSession(path, options, providers=[provider])
    except Exception as error:
        raise ValueError(
            f"{path} cannot be opened by onnxruntime ({one_sentence(error)}): it may be half-written or of a later "
            "version of ONNX"
        ) from error


def description(session: Any, path: Path) -> dict[str, Any]:
    """Returns what `describe` put into a file.

    Raises:
        ValueError: another program wrote it.
    """
    written = session.get_modelmeta().custom_metadata_map.get(METADATA)
    if written is None:
        takes = ", ".join(f"{each.name} {each.type} {each.shape}" for each in session.get_inputs())
        raise ValueError(
            f"{path} is an ONNX file of another program (it takes {takes}, and names no classes): give one that "
            "scripts/convert.py --to onnx wrote"
        )
    try:
        found = parse_json(written)
    except ValueError as error:
        raise ValueError(f"{path}: its description is no JSON ({one_sentence(error)}): export it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: its description is a {type(found).__name__}, no mapping: export it again")
    check_format(found, EXPORTED, path)
    for name, kind in TYPES.items():
        if name not in found:
            raise ValueError(f"{path}: its description has no {name}: export it again")
        check_type(found[name], kind, f"{path}: {name}")
    if len(found["class_colors"]) != len(found["class_names"]):
        raise ValueError(
            f"{path}: its description has another number of class_colors than of class_names: export again"
        )
    return found


class OnnxScorer:
    """An ONNX file as a `Scorer`: the windows of `window_logits`, each scored by onnxruntime.

    Raises:
        As `open_session` and `description` do.
    """

    def __init__(self, path: str | Path, device: str = "cpu", threads: int = 0) -> None:
        self.path = Path(path)
        self.session = open_session(self.path, device, threads)
        self.facts = description(self.session, self.path)

    @property
    def need_less(self) -> str:
        height, width = self.facts["img_size"]
        return f"all windows of an image, {height}x{width} each, are in it at once: smaller images"

    def run(self, images: Tensor) -> list[Tensor]:
        """Images as the file takes them, to what it returns."""
        import torch

        return [torch.from_numpy(each) for each in self.session.run(None, {"images": images.numpy()})]

    def __call__(self, images: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """See `Scorer`."""
        import torch

        from eomt.exchange.deployed import Signature, in_batches
        from eomt.inference.windows import check_outputs, merged_strips, score_strips, to_windows, winners

        window = tuple(self.facts["img_size"])
        signature = Signature(*(self.facts[name] for name in ("outputs", "images", "batch")))
        windows, origins = zip(*(to_windows(image.cpu(), window) for image in images), strict=True)
        outputs = in_batches(self.run, torch.cat(windows), signature)
        check_outputs({str(k): output for k, output in enumerate(outputs)})
        parts = zip(*(output.split([len(each) for each in windows]) for output in outputs), strict=True)
        found = []
        for part, places, image in zip(parts, origins, images, strict=True):
            where = places, window, tuple(image.shape[-2:])
            if signature.outputs == "queries":
                strips = score_strips(*part, *where)
            else:
                strips = merged_strips([partial(some_rows, scores) for scores in part[0]], part[0].shape[1], *where)
            found.append(winners(strips))
        return found


def some_rows(scores: Tensor, rows: range) -> Tensor:
    """Of maps [K, H, W], these rows."""
    return scores[:, rows.start : rows.stop]
