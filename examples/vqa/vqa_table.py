"""Tables of several runs on the same questions: what trains, or the adapters' ranks, over seeds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from vqa_questions import TYPES
from vqa_scenes import write_scenes
from vqa_scores import exact_match, interval, span
from vqa_settings import DRAWN, PARTS, Settings
from vqa_start import check_network, drawn_source, once

from eomt.files import read_json, write_json, write_text

LAST = 3  # layers
VARIANTS = {
    "frozen": {},
    f"last {LAST} layers": {"unfreeze_encoder_layers": LAST},
    "vision LoRA": {"use_vision_lora": True},
    "text LoRA": {"use_text_lora": True},
    "both": {"use_vision_lora": True, "use_text_lora": True},
}
WHAT = "Exact match of answers to drawn questions: what trains in the encoders, from one network, over seeds"
COLUMNS = (
    "variant",
    "trains",
    "LoRA",
    "EM",
    "95 %",
    "of each seed",
    "blank EM",
    "to the first",
    "95 %",
    "CPU seconds",
)


def compare_variants(
    settings: Settings, folder: Path, seeds: Sequence[int], lora: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Trains what is frozen, the last layers, and LoRA on one part or both, from one network; returns the table's rows.

    Args:
        settings: of all runs.
        folder: for the runs, `results.json` and `results.md`.
        seeds: of the runs.
        lora: flags of the adapters, for those that have some.

    Raises:
        ValueError: a flag says already what trains.
    """
    chosen = [name for name in ("use_vision_lora", "use_text_lora", "unfreeze_encoder_layers", "train_all")]
    if chosen := [name for name in chosen if getattr(settings, name)]:
        raise ValueError(f"--compare sets --{chosen[0]} itself, for each of its runs: leave it out")
    return tabulate(settings, folder, {name: own | of_parts(own, lora) for name, own in VARIANTS.items()}, seeds)


def ablate_ranks(
    settings: Settings, folder: Path, ranks: Sequence[int], seeds: Sequence[int], lora: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The same for ranks of the parts that have LoRA; alpha is twice the rank.

    Raises:
        ValueError: a flag says the rank or alpha already, or belongs to a part without LoRA.
    """
    if given := [name for name in lora if name.endswith(("_r", "_alpha", "_preset"))]:
        raise ValueError(f"--ablate sets ranks, and alpha to twice the rank, itself: leave --{given[0]} out")
    parts = [part for part in PARTS if getattr(settings, f"use_{part}_lora")]
    if idle := [name for part in PARTS if part not in parts for name in lora if name.startswith(f"{part}_lora")]:
        raise ValueError(f"--{idle[0]} does nothing beside --use_{parts[0]}_lora alone: leave it out")
    variants = {}
    for rank in ranks:
        own = {f"use_{part}_lora": True for part in parts} | {f"{part}_lora_r": rank for part in parts}
        own |= {f"{part}_lora_alpha": 2.0 * rank for part in parts}
        variants[f"rank {rank}"] = own | of_parts(own, lora)
    return tabulate(settings, folder, variants, seeds)


def of_parts(changes: Mapping[str, Any], lora: Mapping[str, Any]) -> dict[str, Any]:
    """The flags of adapters that a variant has."""
    parts = [part for part in PARTS if changes.get(f"use_{part}_lora")]
    prefixes = (*(f"{part}_lora_" for part in parts), *(["lora_"] if parts else []))
    return {name: value for name, value in lora.items() if name.startswith(tuple(prefixes))}


def tabulate(
    settings: Settings, folder: Path, variants: Mapping[str, Mapping[str, Any]], seeds: Sequence[int]
) -> list[dict[str, Any]]:
    """Runs each variant with each seed, and writes `results.json` and `results.md`; runs that are there are kept."""
    planned = {name: replace(settings, **changes) for name, changes in variants.items()}  # errors come first
    for own in planned.values():
        check_network(own)
        for seed in seeds:
            replace(own, seed=seed)
    from eomt.reporting.run_summary import provenance

    origin = provenance(seeds)
    common = data_and_start(settings, folder)
    runs: dict[str, list[Path]] = {name: [] for name in planned}
    for seed in seeds:
        for name, own in planned.items():
            place = folder / name.replace(" ", "_") / f"seed_{seed}"
            once(replace(own, seed=seed, output_dir=str(place), **common), place)
            runs[name].append(place)
    rows = table_rows(runs)
    summaries = [read_json(place / "summary.json") for places in runs.values() for place in places]
    commits = sorted({str(summary["git_commit"]) for summary in summaries})
    origin |= {"git_commit": " and ".join(commits), "versions": summaries[0]["versions"]}  # some may be of earlier days
    facts = {"what": WHAT, **origin, "settings": settings.as_dict(), "rows": rows}
    if settings.start == DRAWN:
        source = read_json(folder / "source" / "summary.json")
        facts["source"] = {name: source[name] for name in ("scores", "cpu_seconds", "rates", "settings", "git_commit")}
    write_json(folder / "results.json", facts)
    write_text(folder / "results.md", markdown(rows, len(seeds)))
    print(f"\n{markdown(rows, len(seeds))}")
    return rows


def data_and_start(settings: Settings, folder: Path) -> dict[str, Any]:
    """What all runs have in common: with `--start drawn` the network, and the scenes that they learn."""
    if settings.start != DRAWN:
        return {}
    model = drawn_source(settings, folder / "source")
    data = folder / "scenes"
    write_scenes(data, settings.scenes, settings.data_seed, domain=settings.domain)
    usual = ("scenes", "domain", "config", "img_size", "source_scenes", "source_epochs")
    usual = {one.name: one.default for one in fields(Settings) if one.name in usual}
    paths = {"start": model, "train_csv": data / "questions.csv", "image_dir": data / "images"}
    return usual | {name: str(path) for name, path in paths.items()}


def table_rows(runs: Mapping[str, Sequence[Path]]) -> list[dict[str, Any]]:
    """A row for each variant: means over seeds, and intervals over questions of these means."""
    rows, first, first_seeds = [], None, []
    for name, places in runs.items():
        summaries = [read_json(place / "summary.json") for place in places]
        em, blank = (100 * np.mean([matches(place, key) for place in places], 0) for key in ("prediction", "blank"))
        seeds = [summary["scores"]["all"]["em"] for summary in summaries]
        first, first_seeds = (em, seeds) if first is None else (first, first_seeds)
        trainable = summaries[0]["trainable"]
        rows.append(
            {
                "variant": name,
                "trainable": sum(trainable.values()),
                "adapters": sum(size for part, size in trainable.items() if part.endswith(" LoRA")),
                "parts": trainable,
                "em": float(em.mean()),
                "em_interval": interval(em),
                "em_of_seeds": seeds,
                "em_of_types": by_type(summaries, "em"),
                "blank_em_of_types": by_type(summaries, "blank_em"),
                "most_common_em_of_types": most_common(places[0]),
                "blank_em": float(blank.mean()),
                "to_first": float((em - first).mean()),
                "to_first_interval": interval(em - first),
                "to_first_of_seeds": [own - other for own, other in zip(seeds, first_seeds, strict=True)],
                "cpu_seconds": float(np.mean([summary["cpu_seconds"] for summary in summaries])),
                "rates": summaries[0]["rates"],
                "adapters_have": summaries[0]["adapters"],
            }
        )
    return rows


def by_type(summaries: Sequence[Mapping[str, Any]], name: str) -> dict[str, float]:
    """The mean of a score over runs, for each type of question."""
    return {
        kind: float(np.mean([summary["scores"][kind][name] for summary in summaries]))
        for kind in summaries[0]["scores"]
    }


def most_common(place: Path) -> dict[str, float]:
    """What always giving the most common answer of a type would score on a run's questions."""
    answers: dict[str, Counter] = {name: Counter() for name in TYPES}
    for row in read_json(place / "predictions.json")["questions"]:
        answers[TYPES[row["type"]]][row["answer"]] += 1
    return {name: 100 * max(each.values()) / each.total() for name, each in answers.items() if each}


def matches(place: Path, key: str) -> list[float]:
    """Exact match of each question in a run, with its picture (`prediction`) or a blank one (`blank`)."""
    return [exact_match(row[key], row["answer"]) for row in read_json(place / "predictions.json")["questions"]]


def markdown(rows: Sequence[Mapping[str, Any]], seeds: int) -> str:
    """The table, and what it says."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        each = ", ".join(f"{em:.1f}" for em in row["em_of_seeds"])
        cells = [row["variant"], f"{row['trainable']:,}", f"{row['adapters']:,}", f"{row['em']:.1f}"]
        cells += [span(row["em_interval"]), each, f"{row['blank_em']:.1f}", f"{row['to_first']:+.1f}"]
        cells += [span(row["to_first_interval"]), f"{row['cpu_seconds']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    said = [f"- {reading(row, rows[0]['variant'])}" for row in rows[1:]]
    note = f"Means over {seeds} seed{'s' * (seeds > 1)}; intervals are over questions, not over seeds."
    return "\n".join([*lines, "", note, "", *said, "", *type_lines(rows), ""])


def type_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table of the types of questions."""
    kinds = [kind for kind in rows[0]["em_of_types"] if kind != "all"]
    lines = ["Exact match by type, with the picture and with a blank one:", "", f"| variant | {' | '.join(kinds)} |"]
    lines.append("|---" * (len(kinds) + 1) + "|")
    for row in rows:
        both = [(row["em_of_types"][kind], row["blank_em_of_types"][kind]) for kind in kinds]
        lines.append(f"| {row['variant']} | {' | '.join(f'{em:.1f}, {blank:.1f}' for em, blank in both)} |")
    common = rows[0]["most_common_em_of_types"]
    lines.append(f"| always the most common answer | {' | '.join(f'{common[kind]:.1f}' for kind in kinds)} |")
    return lines


def reading(row: Mapping[str, Any], first: str) -> str:
    """What an interval says of a variant."""
    low, high = row["to_first_interval"]
    if low <= 0 <= high:
        return f"{row['variant']}: no measurable difference to {first} ({span((low, high))})"
    changes = row["to_first_of_seeds"]
    if min(changes) < 0 < max(changes):
        each = ", ".join(f"{change:+.1f}" for change in changes)
        return f"{row['variant']}: seeds disagree about it and {first} ({each})"
    return f"{row['variant']}: {abs(row['to_first']):.1f} points {'above' if low > 0 else 'below'} {first}"
