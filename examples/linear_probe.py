"""Frozen features and a linear classifier: what an encoder knows, with intervals, against colour alone.

python examples/linear_probe.py [--folder tiles] [--model ssmamba_tiny] [--out out]

Without --folder synthetic H&E tiles are drawn. A folder has one folder per class, or a manifest.csv with the columns
path, label and, if you know it, group (the patient: tiles of one patient are never on both sides).
"""

import argparse
import tempfile
from pathlib import Path

from ssmamba_models.data.synthetic import write_synthetic_tiles
from ssmamba_models.evaluation.embedding import Embedding
from ssmamba_models.evaluation.evaluate import evaluate
from ssmamba_models.evaluation.model_choice import parse_models
from ssmamba_models.evaluation.settings import Settings


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="labelled tiles; without it some are drawn")
    parser.add_argument("--model", default="ssmamba_tiny", help="NAME[@INIT]; @none: random; default: %(default)s")
    parser.add_argument("--size", type=int, default=96, help="side of the input in pixels; default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("linear_probe"), help="folder of the report; %(default)s")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or write_synthetic_tiles(scratch, tiles_per_kind=24, size=128)
        report = evaluate(
            folder,
            parse_models([f"encoder={arguments.model}", "color_histogram"]),
            arguments.out,
            settings=Settings(folds=3, seeds=2),
            embedding=Embedding(img_size=arguments.size),
            overwrite=True,
        )
    for task in report["tasks"]:
        for label, results in task["results"].items():
            figure = results["linear_probe"]["metrics"]["macro_f1"]
            print(f"{label:<16} macro-F1 {figure['value']:.3f} ({figure['low']:.3f} to {figure['high']:.3f})")
    print(f"wrote {arguments.out / 'report.md'}")


if __name__ == "__main__":
    main()
