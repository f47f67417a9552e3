"""The report of a comparison: a page to read, beside its table in other formats."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from eomt.comparison import axes, plots
from eomt.comparison.anomalies import METRICS, chance, spread
from eomt.comparison.costs import costs_words, with_costs_of
from eomt.comparison.facts import audit_words, command, kept_network, provenance, shared_facts
from eomt.comparison.formats import latex, markdown, print_table, records, write_csv
from eomt.comparison.galleries import Predictions, galleries, heat_maps
from eomt.comparison.runs import Run
from eomt.comparison.statistics import Comparison, Variant, compare
from eomt.comparison.table import NONE, Part, Table, drawn_words, failure, percent, table, warnings_of
from eomt.comparison.verdicts import headline
from eomt.files import replacing_files, write_json
from eomt.reporting.run_summary import git_commit
from eomt.settings.formats import REPORT, stamped


def write_report(
    runs: Sequence[Run],
    out_dir: Path,
    baseline: str | None = None,
    allow_different: bool = False,
    predictions: Predictions | None = None,
    score: str | None = None,
    tunings: Sequence[axes.Tuning] = (),
    costs: Sequence[Run] = (),
) -> Comparison:
    """Writes report.html, report.md, report.csv, report.json and report.tex, and prints the table.

    Args:
        runs: see `load_runs`.
        out_dir: created where it is missing.
        baseline: see `compare`.
        allow_different: runs that are not comparable are marked with † instead of refused.
        predictions: from a run folder and image names to (image uint8 [3, H, W], target uint8 [H, W], prediction
            uint8 [H, W]) by name; None, an OSError or a ValueError leave the page without those pictures.
        score: of anomalies, see `compare`.
        tunings: what was chosen for each variant.
        costs: runs to take seconds and memory from, see `with_costs_of`; none: each run's own.

    Runs on fewer training images than others stand in a table and a plot of their own.

    Raises:
        ValueError: what `compare` raises, or the runs differ in a condition that they must share.
    """
    runs, measured = with_costs_of(runs, costs) if costs else (runs, [])
    comparison = compare(list(axes.by_images(runs).values())[-1] if runs else runs, baseline, score)
    fewer = axes.compare_fewer(runs, comparison.baseline, comparison.score)
    found = [difference for each in (comparison, *fewer.values()) for difference in each.differences]
    if found and not allow_different:
        raise ValueError(
            "These runs do not belong in one table: "
            + "; ".join(map(str, found))
            + ". Leave runs out, or allow differences to have them marked."
        )
    edges = axes.edge_notes(tunings)
    comparison.tuning_notes = axes.tuning_notes(tunings, comparison, bool(fewer)) + edges
    comparison.notes += [costs_words(measured)] if measured else []
    failed = [run for run in runs if run.error is not None]
    content = table(comparison)
    content.footnotes.extend(failure(run) for run in failed if run.subset != comparison.runs[0].subset)
    content.footnotes.extend(axes.fewer_notes(fewer, comparison))
    parts = [axes.images_table(fewer, comparison), axes.tuning_table(tunings), *axes.values_tables(tunings)]
    content.beside.extend(part for part in parts if part)
    names = [variant.name for variant in comparison.variants]
    beside = [axes.images_plot(fewer, comparison), *axes.tuning_plots(tunings, names)]
    with replacing_files(out_dir) as draft:
        page = html(comparison, content, runs, predictions, [plot for plot in beside if plot], edges)
        (draft / "report.html").write_text(page, encoding="utf-8")
        (draft / "report.md").write_text(markdown(comparison, content), encoding="utf-8")
        (draft / "report.tex").write_text(latex(comparison, content), encoding="utf-8")
        write_csv(draft / "report.csv", records(comparison, content))
        write_json(draft / "report.json", stamped(REPORT, report_facts(comparison, runs, fewer, tunings, measured)))
    print_table(content)
    return comparison


def report_facts(
    comparison: Comparison,
    runs: Sequence[Run],
    fewer: Mapping[int, Comparison],
    tunings: Sequence[axes.Tuning],
    measured: Sequence[Run],
) -> dict[str, Any]:
    """Returns what report.json holds: where the runs are from, and all values, also with fewer training images.

    `git_commit` is that of the runs' code, `report_commit` that of the code which compares them.

    `measured` are the runs that seconds and memory are from, where these are others.
    """
    facts = provenance(runs) | {"report_commit": git_commit(), "baseline": comparison.baseline}
    facts["chosen"] = {tuning["variant"]: tuning["chosen"] for tuning in tunings}
    facts |= {"costs": provenance(measured)} if measured else {}
    facts["tuning"] = list(tunings)
    facts["compared"] = {
        label: [{"value": value, "runs": of} for value, of in values] for label, values in shared_facts(comparison)
    }
    facts["chance"] = {name: chance(found) for name, found in comparison.benchmarks.items()}
    facts |= {"training_images": axes.images_of(comparison), "table": records(comparison, table(comparison))}
    facts["notes"] = list(comparison.notes)
    facts["fewer_images"] = [
        {"training_images": axes.images_of(each), "table": axes.fewer_records(each, comparison.baseline)}
        for each in fewer.values()
    ]
    facts["runs"] = [
        {"variant": run.variant, "seed": run.seed, "train_images": run.subset, "error": run.error}
        | {"lora_audit": audit_words(run)}
        | {f"{domain}_miou_percent": 100 * scores.miou for domain, scores in run.evaluations.items()}
        for run in runs
    ]
    return facts


def html(
    comparison: Comparison,
    content: Table,
    runs: Sequence[Run],
    predictions: Predictions | None = None,
    beside: Sequence[plots.Plot] = (),
    edges: Sequence[str] = (),
) -> str:
    """The page, with everything in it.

    Args:
        comparison, content: of the runs with most training images. runs: all of them.
        predictions: see `write_report`.
        beside: drawings of what varies beside variants and seeds.
        edges: warnings about settings that were chosen.
    """
    lead, *sentences = headline(comparison)
    same = comparison.same_machinery
    evaluation = comparison.evaluation
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html").render(
        lead=lead,
        sentences=sentences,
        warnings=[*warnings_of(comparison), *edges]
        + ([] if same else [note for note in comparison.notes if "Times" in note]),
        table=content,
        tables=content.parts(("scores",), ("anomalies",), ("differences",), ("costs",)),
        failed=[run for run in runs if run.error is not None],
        drawings=cost_plots(comparison),
        beside=beside,
        opened=next(
            (v.name for v in comparison.others if v.uses_lora), comparison.others[0].name if comparison.others else ""
        ),
        class_plots=plots.class_plots(comparison),
        left_out=", ".join(v.name for v in comparison.others if v not in plots.in_panels(comparison)),
        drawn=drawn_words(comparison),
        galleries=galleries(comparison, predictions) if predictions else None,
        heat_maps=heat_maps(comparison),
        score_tables=score_tables(comparison),
        class_colors=[
            (name, "rgb({}, {}, {})".format(*rgb))
            for name, rgb in zip(evaluation.classes, evaluation.colors, strict=False)
        ],
        facts=shared_facts(comparison),
        runs=runs,
        run_table=run_table(runs),
        command=command,
        baseline=comparison.baseline,
        colors={name: style.color for name, style in plots.styles([v.name for v in comparison.variants]).items()},
        chosen=any(kept_network(run).startswith("best") for run in comparison.runs if run.error is None),
        tests=sum(v.delta is not None and v.delta.low is not None for v in comparison.others),
    )


def cost_plots(comparison: Comparison) -> list[plots.Plot]:
    """mIoU against parameters, training time and steps, as far as the runs tell them."""
    trained = "" if comparison.same_machinery else "; times of different machines or versions, not comparable"
    scale, unit = (3600, "hours") if _longest(comparison) > 3 * 3600 else (60, "minutes")
    drawings = [
        plots.score_plot(comparison, lambda run: run.trainable, "trainable parameters", log=True),
        plots.score_plot(
            comparison,
            lambda run: run.training_seconds and run.training_seconds / scale,
            f"training time, {unit}",
            about=f" (steps times seconds per step{trained})",
        ),
        plots.curve_plot(comparison),
    ]
    return [plot for plot in drawings if plot]


def _longest(comparison: Comparison) -> float:
    return max((run.training_seconds or 0 for v in comparison.variants for run in v.runs), default=0)


def score_tables(comparison: Comparison) -> list[tuple[str, list[str], list[list[str]]]]:
    """Returns each benchmark's title, scores, and a row for each variant: AuPRC / FPR95 by score, means over seeds."""

    def cell(variant: Variant, benchmark: str, score: str) -> str:
        spreads = [spread(variant, benchmark, metric, score) for metric in METRICS]
        return " / ".join(percent(found and found.mean) for found in spreads)

    tables = []
    for name, evaluation in comparison.benchmarks.items():
        scores = list(dict.fromkeys(score for scores in comparison.known(name, lambda e: e.auprc) for score in scores))
        rows = [[variant.name, *(cell(variant, name, score) for score in scores)] for variant in comparison.variants]
        tables.append((evaluation.title, scores, rows))
    return tables


def run_table(runs: Sequence[Run]) -> Part:
    """A row for each run, with its number of training images where not all have all."""
    some = any(run.subset is not None for run in runs)
    titles = ["variant", "seed", *["training images"] * some, "mIoU, %", "steps", "LoRA audit", "folder"]
    rows = []
    for run in runs:
        images = [str(run.subset or "all")] * some
        steps = NONE if run.steps is None else f"{run.steps:,}"
        score = percent(run.target.miou) if run.error is None else "failed"
        rows.append([run.variant, str(run.seed), *images, score, steps, audit_words(run), str(run.path)])
    return Part("Every run", titles, rows)
