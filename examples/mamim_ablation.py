"""What each part of MAMIM is worth: short runs that differ in one setting, scored on groups that none of them saw.

python examples/mamim_ablation.py --quick --out ablation               # synthetic tiles, a tiny model: two minutes
python examples/mamim_ablation.py --data lc25000 --out ablation --share 0.4 --precision bf16 \\
    --task lung-3=lung_aca,lung_n,lung_scc --task colon-2=colon_aca,colon_n

Every run has the same budget and, for a seed, the same order of tiles; the scores of a variant are those of its seeds
together. What is done is kept: the same line again goes on where it was stopped. --only NAME, --seeds 1 and --no-report
train a part of the runs, so that several processes or machines can share them. --share 0.4 takes that share of the
training groups, for the runs and for the probes. The table is OUT/report/report.md.
"""

import argparse
import contextlib
import csv
import tempfile
from itertools import product
from pathlib import Path

from ssmamba_models.data.labelled import MANIFEST, group_fraction, read_tiles
from ssmamba_models.data.synthetic import write_synthetic_tiles
from ssmamba_models.engine.pretrain import PretrainConfig, pretrain
from ssmamba_models.evaluation.embedding import Embedding
from ssmamba_models.evaluation.evaluate import evaluate
from ssmamba_models.evaluation.model_choice import parse_models
from ssmamba_models.evaluation.settings import Settings
from ssmamba_models.evaluation.tasks import parse_task
from ssmamba_models.output import whole_file

ONE_SCALE = ((1,), (1,), (1,), (1,))
TEACHER = {"alignment": "teacher", "cross_weight": 1.0}
STAIN = {"stain": 0.2, "jitter": 0.2, "gray": 0.1}

# Name -> what differs from the first: (model_args, method_args, view_args, other settings).
RUNS = {
    "base": ({}, {}, {}, {}),
    "hold": ({}, {"masked_state": "hold"}, {}, {}),
    "no_alignment": ({}, {"cross_weight": 0.0}, {}, {}),
    "cosine_alignment": ({}, {"alignment": "cosine", "cross_weight": 0.1}, {}, {}),
    "no_color": ({}, {"color_weight": 0.0}, {}, {}),
    "mask_75": ({}, {}, {"mask_ratio": 0.75}, {}),
    "stain": ({}, {}, STAIN, {}),
    "teacher": ({}, TEACHER, {}, {}),
    "teacher_stain": ({}, TEACHER, STAIN, {}),
    "features": ({}, {"feature_weight": 1.0}, {}, {}),
    "cross_features": ({}, {"cross_feature_weight": 1.0}, {}, {}),
    "local": ({}, {**TEACHER, "local_weight": 0.5}, {"local_crops": 2}, {}),
    "one_scale": ({"scales": ONE_SCALE}, {}, {}, {}),
    "silent_init": ({"scan_init": "silent"}, {}, {}, {}),
    "silent_init_hold": ({"scan_init": "silent"}, {"masked_state": "hold"}, {}, {}),
    "adamw": ({}, {}, {}, {"optimizer": "adamw", "lr": 6e-4}),
}
# The recipe of the packaged weights, but for its length.
LC25000 = {"model": "ssmamba_tiny", "img_size": 96, "batch_size": 64, "lr": 1.5e-3, "optimizer": "muon"}
QUICK = {"model": "test_ssmamba", "img_size": 64, "batch_size": 12, "lr": 2e-3, "workers": 0, "epochs": 2}


def config_of(name, seed, data, arguments):
    model_args, method_args, view_args, settings = RUNS[name]
    shared = QUICK if arguments.quick else {**LC25000, "epochs": arguments.epochs, "workers": 1}
    return PretrainConfig(
        data=str(data),
        seed=seed,
        drop_path_rate=0.0,
        precision=arguments.precision,
        reconstruct_every=None,
        model_args={"scan_init": "unit", **model_args},
        method_args={"cell_size": 16, **method_args},
        view_args=view_args,
        **{**shared, **settings},
    )


def write_share(data, share, folder):
    """A folder with a link to the tiles and a manifest.csv: a share of the training groups, all of the other splits."""
    tiles = read_tiles(data)
    train = tiles.select("train")
    kept = set(train.subset(group_fraction(train, share)).paths)
    rows = zip(tiles.paths, tiles.known_labels, tiles.groups or tiles.paths, tiles.splits)
    folder.mkdir(parents=True, exist_ok=True)
    # Several processes may share the folder.
    with contextlib.suppress(FileExistsError):
        (folder / "all").symlink_to(data.resolve(), target_is_directory=True)
    with whole_file(folder / MANIFEST, overwrite=True) as part, open(part, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "group", "split"])
        writer.writerows((f"all/{row[0]}", *row[1:]) for row in rows if row[3] != "train" or row[0] in kept)
    return folder


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="labelled tiles with a split train")
    parser.add_argument("--task", action="append", default=[], help="NAME=class,class,...; once for each")
    parser.add_argument("--epochs", type=int, default=1, help="of each run; default: %(default)s")
    parser.add_argument("--share", type=float, default=1.0, help="of the training groups; default: %(default)s")
    parser.add_argument("--precision", default="auto", help="auto, fp32 or bf16; default: %(default)s")
    parser.add_argument("--only", action="append", choices=list(RUNS), help="this variant; once for each")
    parser.add_argument("--seeds", type=int, nargs="+", help="a run of each variant per seed; default: 0 1 2")
    parser.add_argument("--no-report", action="store_true", help="train alone")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and the report")
    parser.add_argument("--quick", action="store_true", help="a tiny model on synthetic tiles")
    arguments = parser.parse_args()
    if not arguments.quick and not arguments.data:
        parser.error("give --data FOLDER, or --quick to look at synthetic tiles")
    if "," in str(arguments.out):
        parser.error("--out must not hold commas, which part the runs of a variant")
    names = arguments.only or list(RUNS)
    seeds = arguments.seeds or ([0] if arguments.quick else [0, 1, 2])
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        data = arguments.data or write_synthetic_tiles(scratch, tiles_per_kind=16, size=96)
        if arguments.share < 1:
            data = write_share(data, arguments.share, arguments.out / "tiles")
        for seed, name in product(seeds, names):
            print(f"== {name}, seed {seed}", flush=True)
            run = pretrain(config_of(name, seed, data, arguments), arguments.out / f"{name}-{seed}", resume=True)
            if run.stopped_by is not None:
                raise SystemExit(f"{name}, seed {seed}, was stopped; the same line goes on with it")
        if arguments.no_report:
            return
        model = config_of("base", 0, data, arguments).model
        runs = {name: ",".join(str(arguments.out / f"{name}-{seed}") for seed in seeds) for name in names}
        trained = [f"{name}={model}@{folders}" for name, folders in runs.items()]
        evaluate(
            data,
            parse_models([*trained, f"random={model}@none", "color_histogram"]),
            arguments.out / "report",
            tasks=[parse_task(text) for text in arguments.task],
            settings=Settings(seeds=len(seeds), magnification=True),
            embedding=Embedding(img_size=64 if arguments.quick else 96, precision=arguments.precision),
            overwrite=True,
        )
    print((arguments.out / "report" / "report.md").read_text().split("### Comparisons")[0])


if __name__ == "__main__":
    main()
