"""Slides from feature files: cross-validated AUC, then a heatmap of one slide.

python examples/mil.py [--features DIR --labels labels.csv] [--aggregator abmil] [--slide slide.svs] [--out out]

Without --features synthetic slides are written, of which the positive ones hold a spot of 5 to 10 % shifted tiles.
Feature files of your own come from `ssmamba extract`; labels.csv has the columns slide, label and, if you have it,
patient.
"""

import argparse
import tempfile
from pathlib import Path

from ssmamba_models.data.synthetic_slides import write_synthetic_slides
from ssmamba_models.engine.mil import train_mil
from ssmamba_models.engine.mil_config import MilConfig
from ssmamba_models.evaluation.heatmap import draw_heatmap
from ssmamba_models.evaluation.mil_report import report_mil


def train(features, labels, arguments):
    """Train by patient-grouped cross-validation, and print how good it is on patients that were held out."""
    config = MilConfig(
        features=str(features),
        labels=str(labels),
        aggregator=arguments.aggregator,
        folds=arguments.folds,
        epochs=arguments.epochs,
        lr=arguments.lr,
    )
    run = arguments.out / "run"
    result = train_mil(config, run)
    report = report_mil(run)
    for name in ("auc", "macro_f1", "accuracy"):
        figure = report["metrics"][name]
        print(f"{name:<9} {figure['value']:.3f} ({figure['low']:.3f} to {figure['high']:.3f})")
    return run, result


def most_certain(result):
    """The slide that is most surely of the last class."""
    rows = [row for row in result.predictions if row.label == result.classes[-1]]
    return max(rows, key=lambda row: row.probabilities[-1]).slide


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=Path, help="folder of feature files; without it synthetic ones are written")
    parser.add_argument("--labels", type=Path, help="CSV: slide, label[, patient]; default: labels.csv in --features")
    parser.add_argument("--slide", type=Path, help="draw this slide's heatmap, over the slide; it needs a feature file")
    parser.add_argument("--aggregator", default="abmil", help="default: %(default)s")
    parser.add_argument("--folds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--epochs", type=int, default=15, help="default: %(default)s")
    parser.add_argument("--lr", type=float, default=1e-3, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("mil"), help="folder to write; default: %(default)s")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as scratch:
        features = arguments.features or write_synthetic_slides(scratch, patients=24, tiles=300).parent
        labels = arguments.labels or features / "labels.csv"
        run, result = train(features, labels, arguments)
        name = arguments.slide.stem if arguments.slide else most_certain(result)
        drawn = draw_heatmap(run, features / f"{name}.h5", arguments.out, slide=arguments.slide, max_size=512)
    print(f"wrote {run / 'report.md'}, {drawn.png} and {drawn.geojson}")


if __name__ == "__main__":
    main()
