"""How often the 95 % interval of a comparison holds the true difference, on drawn scores of seeds and video frames.

python benchmarks/coverage.py benchmarks/coverage.json
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from eomt.comparison.bootstrap import Units, bootstrap_iou, image_weights, mean_over_seeds, units
from eomt.files import write_json
from eomt.reporting.run_summary import provenance

IMAGES, TRIALS, SEED = 100, 1000, 0
TRUE, IMAGE_SD, PIXELS = 1.0, 3.0, 10_000  # points; points; pixels of an image's union
IMAGES_ALONE, BOTH = "images alone", "seeds and images"


def differences(rng: np.random.Generator, seeds: int, seed_sd: float, correlation: float) -> np.ndarray:
    """A variant's points above the baseline [seeds, images]; neighbouring images are correlated."""
    images = rng.normal(size=IMAGES)
    for k in range(1, IMAGES):
        images[k] = correlation * images[k - 1] + np.sqrt(1 - correlation**2) * images[k]
    return TRUE + seed_sd * rng.normal(size=(seeds, 1)) + IMAGE_SD * images + rng.normal(size=(seeds, IMAGES))


def holds(points: np.ndarray, weights: np.ndarray, of: Units) -> dict[str, bool]:
    """Whether the intervals hold the true difference."""

    def score(hits: np.ndarray) -> np.ndarray:
        return bootstrap_iou(np.stack([hits, np.full_like(hits, PIXELS)], 1)[..., None], weights)[:, 0]

    baseline = score(np.full(IMAGES, 0.6 * PIXELS))
    values = np.stack([score(0.6 * PIXELS + PIXELS * row / 100) for row in points]) - baseline
    ends = {
        name: np.percentile(drawn, [2.5, 97.5])
        for name, drawn in ((IMAGES_ALONE, values[:, 1:].mean(0)), (BOTH, mean_over_seeds(values, of)))
    }
    return {name: bool(low <= TRUE / 100 <= high) for name, (low, high) in ends.items()}


def coverage(seeds: int, ratio: float, correlation: float = 0, of: Units | None = None) -> dict[str, float]:
    """The shares of trials whose intervals hold the true difference.

    `ratio` is the deviation of the seeds' differences in standard errors of the mean over independent images.
    """
    rng, of = np.random.default_rng(SEED), of or units(IMAGES)
    weights = image_weights(of)
    seed_sd = ratio * IMAGE_SD / np.sqrt(IMAGES)
    found = [holds(differences(rng, seeds, seed_sd, correlation), weights, of) for _ in range(TRIALS)]
    return {name: float(np.mean([trial[name] for trial in found])) for name in (IMAGES_ALONE, BOTH)}


def main() -> None:
    """Writes the shares as JSON."""
    by_seeds = [
        {"seeds": seeds, "seed_sd_in_standard_errors_of_images": ratio} | coverage(seeds, ratio)
        for ratio in (0.3, 1, 3)
        for seeds in (1, 2, 3, 5, 10)
    ]
    blocks = units(IMAGES, ["one"] * IMAGES)
    by_correlation = [
        {"correlation_of_neighbours": rho, "drawn": drawn.words, BOTH: coverage(10, 0.3, rho, drawn)[BOTH]}
        for rho in (0, 0.5, 0.8)
        for drawn in (units(IMAGES), blocks)
    ]
    facts = {"what": __doc__.splitlines()[0], "trials": TRIALS} | provenance([SEED])
    write_json(sys.argv[1], facts | {"by_seeds": by_seeds, "by_correlation": by_correlation})


if __name__ == "__main__":
    main()
