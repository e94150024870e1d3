"""What pretraining saves in labels: fine-tuning with a share of the labelled groups, pretrained against from scratch.

python examples/few_labels.py --quick --out few                        # synthetic tiles, a tiny model: a minute
python examples/few_labels.py --data lc25000 --classes lung_aca,lung_n,lung_scc --out few

The groups are drawn by the seed, the same for both beginnings; all are scored on the groups of the split val. Macro-F1
is that of the last epoch, with an interval over groups and seeds (bootstrap). What is done is kept: the same line
again goes on where it was stopped. The table is OUT/few_labels.md.
"""

import argparse
import csv
import json
import tempfile
from pathlib import Path

import numpy as np

from ssmamba_models.data.labelled import read_tiles
from ssmamba_models.data.synthetic import write_synthetic_tiles
from ssmamba_models.engine.finetune import finetune, select_sets
from ssmamba_models.engine.finetune_config import FinetuneConfig
from ssmamba_models.evaluation.bootstrap import Resampling, compare
from ssmamba_models.evaluation.class_metrics import estimate_metrics

BATCH = 32


def config_of(data, fraction, init, seed, arguments):
    settings = {
        "data": str(data),
        "classes": tuple(arguments.classes.split(",")) if arguments.classes else None,
        "model": "test_ssmamba" if arguments.quick else arguments.model,
        "img_size": 64 if arguments.quick else arguments.img_size,
        "batch_size": 4 if arguments.quick else BATCH,
        "lr": arguments.lr,
        "precision": arguments.precision,
        "init": init,
        "layer_decay": arguments.layer_decay,
        "train_fraction": fraction,
        "seed": seed,
        "split_seed": 0,
        "workers": 0,
    }
    train, _ = select_sets(FinetuneConfig(**settings))
    # As many steps for one share of the groups as for another; one percent of them may not fill a batch.
    settings["batch_size"] = min(settings["batch_size"], len(train))
    epochs = max(1, round(arguments.steps / (len(train) // settings["batch_size"])))
    return FinetuneConfig(**settings, epochs=epochs, validate_every=epochs)


def scored(run, classes):
    """Groups, labels and probabilities (N, K) of the validation tiles."""
    with open(run / "predictions.csv", encoding="utf-8", newline="") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: row["path"])
    probabilities = np.array([[float(row[f"probability_{name}"]) for name in classes] for row in rows])
    return [row["group"] or row["path"] for row in rows], [row["label"] for row in rows], probabilities


def estimate(runs, resampling, classes):
    actual = np.array([classes.index(label) for label in scored(runs[0], classes)[1]])
    return estimate_metrics(actual, np.stack([scored(run, classes)[2] for run in runs]), resampling)["macro_f1"]


def row_of(name, figure):
    low, high = figure.interval()
    return f"| {name} | {figure.value:.3f} ({low:.3f} to {high:.3f}) | {', '.join(f'{s:.3f}' for s in figure.seeds)} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="labelled tiles")
    parser.add_argument("--classes", help="a,b,c; default: all")
    parser.add_argument("--model", default="ssmamba_tiny", help="default: %(default)s")
    parser.add_argument("--init", default="pretrained", help="pretrained, a file or a run; default: %(default)s")
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.01, 0.1], help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=40, help="of each run; default: %(default)s")
    parser.add_argument("--lr", type=float, default=5e-4, help="default: %(default)s")
    # For both: in so few steps a random network that learns at the full rate everywhere keeps to one answer.
    parser.add_argument("--layer-decay", type=float, default=0.65, help="of both beginnings; default: %(default)s")
    parser.add_argument("--precision", default="auto", help="auto, fp32 or bf16; default: %(default)s")
    parser.add_argument("--img-size", type=int, default=96, help="default: %(default)s")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and the table")
    parser.add_argument("--quick", action="store_true", help="a tiny model on synthetic tiles; no pretrained weights")
    arguments = parser.parse_args()
    if not arguments.quick and not arguments.data:
        parser.error("give --data FOLDER, or --quick to look at synthetic tiles")
    if arguments.quick:
        arguments.fractions, arguments.seeds, arguments.steps = [0.3, 0.6], 2, 6
    lines = ["| groups, beginning | macro-F1 (95 %) | each seed |", "| --- | --- | --- |"]
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        data = arguments.data or write_synthetic_tiles(scratch, tiles_per_kind=12, size=96)
        for fraction in arguments.fractions:
            runs = {"scratch": [], "pretrained": []}
            for seed in range(arguments.seeds):
                for name, init in (("scratch", "none"), ("pretrained", "none" if arguments.quick else arguments.init)):
                    run = arguments.out / f"{name}-{fraction:g}-{seed}"
                    result = finetune(config_of(data, fraction, init, seed, arguments), run, resume=True)
                    runs[name].append(run)
                    print(f"{run.name}: macro-F1 {result.best['macro_f1']:.3f}", flush=True)
            classes = json.loads((runs["scratch"][0] / "metrics.json").read_text())["classes"]
            groups, labels, _ = scored(runs["scratch"][0], classes)
            resampling = Resampling(groups, labels, arguments.seeds)
            figures = {name: estimate(found, resampling, classes) for name, found in runs.items()}
            lines += [row_of(f"{fraction:.0%}, {name}", figure) for name, figure in figures.items()]
            gain = compare(figures["pretrained"], figures["scratch"])
            lines.append(
                f"| {fraction:.0%}, difference | {gain['difference']:+.3f} ({gain['low']:+.3f} to {gain['high']:+.3f}) "
                f"| p {gain['p']:.3f} |"
            )
        tiles = len(read_tiles(data))
    table = "\n".join([f"Of {tiles} tiles; {arguments.steps} steps each.", "", *lines, ""])
    (arguments.out / "few_labels.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
