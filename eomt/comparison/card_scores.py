"""The scores of a saved network with their intervals, for its card."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from eomt.comparison.bootstrap import bootstrap_iou, image_weights, mean_over_seeds, units
from eomt.comparison.counts import hits_and_unions, nanmean
from eomt.comparison.result_files import read_confusion, read_sequences, read_summary
from eomt.exchange.model_card import Score
from eomt.files import read_yaml
from eomt.inference.saved import artefact_id_in, is_shipped, run_of
from eomt.settings.formats import EVALUATION, read_format


def known_scores(artefact: Path, data: str | None = None) -> list[Score]:
    """Returns what evaluations of this very network left in its run's folder, and else what its training reported.

    Args:
        artefact: an adapter/ or model/ folder.
        data: the name of the data that it was trained on.
    """
    run, own = run_of(artefact), artefact_id_in(artefact)
    files = [file for file in sorted((run / "evaluation").rglob("*.json")) if file.with_suffix(".npz").is_file()]
    found = [(file, read_format(file, EVALUATION)) for file in files]
    scores = [_of_evaluation(file, facts) for file, facts in found if own and facts.get("artefact_id") == own]
    summary = read_summary(run) if is_shipped(artefact, run) else {}
    if scores or summary.get("miou") is None:
        return scores
    images = (summary.get("data") or {}).get("val_images")
    limit = (read_yaml(run / "config.yaml", {}).get("trainer") or {}).get("limit_val_batches")
    some = limit not in (None, 1.0) or isinstance(limit, int)
    return [Score(data or "the run's data", summary["miou"], summary["class_iou"], images, some=some)]


def _of_evaluation(file: Path, facts: dict) -> Score:
    confusion = read_confusion(file.with_suffix(".npz"), facts)
    drawn = units(len(confusion), read_sequences(file, facts))
    resampled = nanmean(bootstrap_iou(hits_and_unions(confusion), image_weights(drawn)), -1)
    low, high = np.nanpercentile(mean_over_seeds(resampled[None], drawn), [2.5, 97.5]).clip(0, 1).tolist()
    name = facts.get("description") or facts.get("domain") or file.stem
    return Score(name, facts["miou"], facts["class_iou"], len(confusion), (low, high), drawn.words)
