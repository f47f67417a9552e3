"""A table of several ways to train, over several seeds."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from eomt.files import write_json, write_text
from eomt.reporting.run_summary import provenance
from morph.data import read_splits
from morph.running import train
from morph.settings import WHAT_TRAINS, Settings

log = logging.getLogger(__name__)

RATES = {"d_eer": "D-EER", "macer_at_bpcer_1": "MACER at BPCER 1 %", "macer_at_bpcer_5": "at 5 %"}
RATES |= {"macer_at_bpcer_10": "at 10 %"}


def compare(cells: Mapping[tuple[str, int], Settings], output: Path) -> str:
    """Trains each (variant, seed) in a folder of its own, unless it is finished there.

    Returns:
        The table, which stands in `results.md`, too; `results.json` says all that is known of the runs.

    Raises:
        ValueError: there are no test pictures.
    """
    origin = provenance(list(dict.fromkeys(seed for _, seed in cells)))  # before anything is written
    runs, settings = [], next(iter(cells.values()))
    if not len(read_splits(settings)["test"]):
        raise ValueError(f"data {settings.data} has no test pictures to compare by: put some below test")
    for (variant, seed), settings in cells.items():
        log.info("%s, seed %d", variant, seed)
        summary = train(settings, output / f"{variant}_seed{seed}", resume="auto")
        runs.append({"variant": variant, "seed": seed, **summary})
    commits = list(dict.fromkeys(str(run["git_commit"]) for run in runs))
    if len(commits) > 1:
        log.warning("the runs in %s are of several commits: %s; a new folder makes a table of one", output, commits)
    facts = {"what": "morphed faces: ways to train, over seeds", **origin, "git_commit": ", ".join(commits)}
    common = {k: v for k, v in dataclasses.asdict(settings).items() if k not in (*WHAT_TRAINS, "weights", "seed")}
    results = {**facts, "settings": common, "runs": runs}
    write_json(output / "results.json", results)
    write_text(output / "results.md", results_table(results))
    return results_table(results)


def results_table(results: Mapping[str, Any]) -> str:
    """Mean and standard deviation over the seeds of each variant, in Markdown."""
    runs = results["runs"]
    variants = list(dict.fromkeys(run["variant"] for run in runs))
    test = runs[0]["test"]
    seeds = len({run["seed"] for run in runs})
    header = ["variant", *(f"{name}, %" for name in RATES.values()), "trainable parameters", "CPU s", "frozen tensors"]
    lines = [header, ["---"] * len(header)]
    for variant in variants:
        own = [run for run in runs if run["variant"] == variant]
        trained, total = own[0]["trainable_parameters"], own[0]["total_parameters"]
        kept = f"{own[0]['frozen_tensors']} unchanged" if own[0]["frozen_tensors"] else "none"
        rates = [spread([run["test"][name] for run in own]) for name in RATES]
        seconds = f"{mean(run['cpu_seconds'] for run in own):.0f}"
        lines.append([variant, *rates, f"{trained:,} ({100 * trained / total:.1f} %)", seconds, kept])
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    counts = f"{test['bona_fide']} bona fide pictures and {test['morphs']} morphs"
    over = f"Mean ± standard deviation over {seeds} seeds" if seeds > 1 else "One seed"
    return f"{rows}\n\n{over}; {counts} to test with.\n"


def spread(values: list[float | None]) -> str:
    """`26.1 ± 1.2`, of shares in percent."""
    known = [100 * value for value in values if value is not None]
    if not known:
        return "none"
    return f"{mean(known):.1f}" + (f" ± {stdev(known):.1f}" if len(known) > 1 else "")
