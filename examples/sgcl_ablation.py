"""What each invariance of SGCL is worth: short runs that differ in one, scored on patients that none of them saw.

python examples/sgcl_ablation.py --quick --out ablation                # synthetic tiles, a tiny model: a minute
python examples/sgcl_ablation.py --data lc25000 --classes lung_aca lung_n lung_scc --slide a.svs --out ablation

Slides are mosaics of labelled tiles in regions of one tissue each, so that neighbours mean something; a patient's tiles
come from groups that no other patient has, and two thirds of the patients are trained on. With --slide the runs train
on tiles of that slide too (--slide-alone: on nothing else), but for its end, a third of its longer side: nobody knows
what those tiles show, so each is asked to find its neighbours among them, which are the tiles around it, with no pixel
in common.

"self" is plain instance discrimination, "random" an encoder without training. Every run has the same budget; each
variant is trained once per seed and scored by a linear probe and by the nearest neighbours in feature space, with an
interval over patients and seeds (bootstrap). The tables are in OUT/report.md. What is done is kept: the same line again
goes on, and --no-report trains alone, so that several processes can share the variants.
"""

import argparse
import csv
import json
from pathlib import Path

import numpy as np
import torch

from ssmamba_models.data.labelled import read_tiles
from ssmamba_models.data.mosaic_files import write_mosaic_tiles
from ssmamba_models.data.mosaics import MosaicKind, assemble_mosaics
from ssmamba_models.data.spatial_tiles import read_spatial_tiles
from ssmamba_models.data.synthetic import write_synthetic_tiles
from ssmamba_models.data.tile_files import read_features
from ssmamba_models.engine.embed import embed_tiles
from ssmamba_models.engine.encoder import load_encoder
from ssmamba_models.engine.pretrain import PretrainConfig, pretrain
from ssmamba_models.evaluation.bootstrap import compare
from ssmamba_models.evaluation.scoring import TaskData, score_encoder
from ssmamba_models.evaluation.settings import Settings
from ssmamba_models.evaluation.tasks import Task
from ssmamba_models.output import whole_file
from ssmamba_models.ssl.spatial_neighbors import SpatialNeighborIndex
from ssmamba_models.wsi.tile_slides import TilePlan, tile_slides

# Variant -> arguments of the method; None is not trained at all.
VARIANTS = {
    "sgcl": {},
    "no_intra": {"intra": False},
    "no_inter": {"inter": False},
    "no_inner": {"inner": False},
    "self": {"intra": False, "inter": False, "inner": False},
    "random": None,
}
# What stands for the label of the real slide's tiles.
UNLABELLED = "unlabelled"
# The 8 places around a tile.
AROUND = 1.5
COLUMNS = ("path", "slide", "x", "y", "label", "group", "split")


def write_slides(arguments):
    """Assemble slides and cut the real one, once; returns their manifest."""
    manifest = arguments.out / "tiles.csv"
    if manifest.exists():
        return manifest
    rows = mosaic_rows(arguments) + (slide_rows(arguments) if arguments.slide else [])
    with whole_file(manifest) as part, open(part, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return manifest


def mosaic_rows(arguments):
    data = arguments.data or write_synthetic_tiles(arguments.out / "tiles", tiles_per_kind=24, size=64)
    tiles = read_tiles(data)
    share = 1 / len(arguments.classes)
    shares = {**dict.fromkeys(arguments.classes[1:], share), arguments.classes[0]: None}
    mosaics = assemble_mosaics(
        tiles,
        {"slide": MosaicKind(shares, "regions")},
        patients=arguments.patients,
        slides_per_patient=1,
        shape=(arguments.cells, arguments.cells),
    )
    patients = sorted({mosaic.patient for mosaic in mosaics})
    splits = {name: "val" if number % 3 == 2 else "train" for number, name in enumerate(patients)}
    with open(write_mosaic_tiles(mosaics, tiles, arguments.out / "slides", splits), encoding="utf-8") as file:
        return [{**row, "path": f"slides/{row['path']}"} for row in csv.DictReader(file)]


def slide_rows(arguments):
    """The real slide's tiles; the last third along its longer side is held out."""
    plan = TilePlan(tile_size=arguments.slide_tile, workers=0)
    cut = tile_slides([arguments.slide], arguments.out / "cut", plan, progress=False)
    with open(cut.manifest, encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise SystemExit(f"no tile of {arguments.slide} holds enough tissue; `ssmamba tile` says more")
    places = {axis: np.array([int(row[axis]) for row in rows]) for axis in "xy"}
    along = max("xy", key=lambda axis: np.ptp(places[axis]))
    held_out = places[along] >= np.quantile(places[along], 2 / 3)
    # One slide on both sides is what is wanted here, and elsewhere a mistake: the two ends are two groups.
    return [
        {
            **row,
            "path": f"cut/{row['path']}",
            "label": UNLABELLED,
            "group": f"{row['slide']}, {'held out' if held else 'trained on'}",
            "split": "val" if held else "train",
        }
        for row, held in zip(rows, held_out)
    ]


def run_folder(variant, seed, arguments):
    return arguments.out / f"{variant}-{seed}"


def encoder_of(variant, seed, manifest, arguments):
    """The encoder of a variant and a seed, trained if it was not yet."""
    if VARIANTS[variant] is None:
        return load_encoder(arguments.model, img_size=arguments.img_size, seed=seed)
    config = PretrainConfig(
        method="sgcl",
        data=str(manifest),
        classes=(UNLABELLED,) if arguments.slide_alone else None,
        model=arguments.model,
        img_size=arguments.img_size,
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        lr=arguments.lr,
        optimizer=arguments.optimizer,
        seed=seed,
        workers=arguments.workers,
        drop_path_rate=0.0,
        # The banks begin as noise, and in the first epoch that is what the network would learn.
        warmup_epochs=min(1.0, arguments.epochs / 2),
        checkpoint_epochs=None,
        view_args={"jitter": arguments.jitter, "gray": arguments.jitter / 2},
        # The spatial loss must count for most of a short run.
        method_args={"ramp_epochs": max(1, arguments.epochs // 5), **VARIANTS[variant]},
    )
    run = run_folder(variant, seed, arguments)
    if pretrain(config, run, resume=True, progress=False).stopped_by is not None:
        raise SystemExit(f"{run} was stopped; the same line goes on with it")
    return load_encoder(arguments.model, checkpoint=run)


def features_of(variant, seed, tiles, manifest, arguments):
    """(N, D) of all tiles."""
    file = arguments.out / f"{variant}-{seed}.h5"
    if not file.exists():
        encoder = encoder_of(variant, seed, manifest, arguments)
        embed_tiles(tiles, encoder, file, workers=arguments.workers, progress=False)
        print(f"{variant}, seed {seed}: done", flush=True)
    return read_features(file).features


def retrieval(tiles, features, k):
    """How many of the 8 tiles around a held-out tile of the real slide are among the k nearest to it in feature space.

    Returns:
        The mean share, that of chance, and the number of tiles that are asked.
    """
    known = enumerate(zip(tiles.labels, tiles.splits))
    held_out = [place for place, (label, split) in known if label == UNLABELLED and split == "val"]
    index = SpatialNeighborIndex(tiles.subset(held_out), AROUND)
    near, valid = (part.numpy() for part in index.query(torch.arange(len(held_out))))
    vectors = features[held_out] - features[held_out].mean(0)
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-12)
    similarity = vectors @ vectors.T
    np.fill_diagonal(similarity, -np.inf)
    found = np.zeros(similarity.shape, bool)
    np.put_along_axis(found, np.argsort(-similarity, axis=1)[:, :k], True, axis=1)
    asked = valid.any(1)
    shares = (np.take_along_axis(found, near, 1) & valid).sum(1)[asked] / valid.sum(1)[asked]
    return float(shares.mean()), k / (len(held_out) - 1), int(asked.sum())


def probe_table(figures, method):
    lines = [f"| variant | {method.replace('_', ' ')}, macro-F1 (95 %) | each seed | less the first |"]
    lines.append("| --- | --- | --- | --- |")
    first = next(iter(figures.values()))
    for variant, estimate in figures.items():
        low, high = estimate.interval()
        seeds = ", ".join(f"{score:.3f}" for score in estimate.seeds)
        gain = compare(estimate, first)
        difference = f"{gain['difference']:+.3f} ({gain['low']:+.3f} to {gain['high']:+.3f})"
        shown = "" if estimate is first else difference
        lines.append(f"| {variant} | {estimate.value:.3f} ({low:.3f} to {high:.3f}) | {seeds} | {shown} |")
    return lines


def retrieval_table(tiles, features, k):
    rows = {variant: [retrieval(tiles, one, k) for one in seeds] for variant, seeds in features.items()}
    _, chance, asked = next(iter(rows.values()))[0]
    lines = [f"| variant | recall@{k} of the tiles around, {asked} held-out tiles | each seed |", "| --- " * 3 + "|"]
    for variant, found in rows.items():
        shares = [share for share, _, _ in found]
        lines.append(f"| {variant} | {np.mean(shares):.3f} | {', '.join(f'{share:.3f}' for share in shares)} |")
    return [*lines, f"| chance | {chance:.3f} | |"]


def training_table(variants, arguments, count):
    """Whether the runs learned: what the last steps say."""
    names = ("loss_self", "loss_spatial", "loss_crop", "positives", "propagated", "feature_rank")
    lines = [f"| variant | {' | '.join(names)} |", "| --- " * (len(names) + 1) + "|"]
    for variant in variants:
        if VARIANTS[variant] is None:
            continue
        ends = []
        for seed in range(arguments.seeds):
            text = (run_folder(variant, seed, arguments) / "log.jsonl").read_text(encoding="utf-8")
            log = [json.loads(line) for line in text.splitlines()]
            ends += [line for line in log if "loss" in line][-3:]
        means = (np.mean([line[name] for line in ends]) for name in names)
        lines.append(f"| {variant} | {' | '.join(f'{mean:.2f}' for mean in means)} |")
    return [*lines, "", f"At chance loss_self is log({count}) = {np.log(count):.2f}."]


def report(tiles, manifest, arguments):
    settings = Settings(seeds=arguments.seeds, episodes=1)  # of few labels, which no table shows
    data = TaskData(tiles, Task("tissue", tuple(sorted(arguments.classes))), settings)
    features = {
        variant: [features_of(variant, seed, tiles, manifest, arguments) for seed in range(arguments.seeds)]
        for variant in arguments.variants
    }
    scores = {variant: score_encoder(data, seeds, settings).methods for variant, seeds in features.items()}
    lines = []
    for method in ("linear_probe", "knn"):
        figures = {variant: methods[method].estimates["macro_f1"] for variant, methods in scores.items()}
        lines += [*probe_table(figures, method), ""]
    if arguments.slide:
        lines += [*retrieval_table(tiles, features, arguments.nearest), ""]
    trained = tiles.select("train", (UNLABELLED,) if arguments.slide_alone else None)
    return "\n".join([*lines, *training_table(arguments.variants, arguments, len(trained)), ""])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="labelled tiles, with groups if possible")
    parser.add_argument("--classes", nargs="+", help="the tissues of every slide, in equal parts")
    parser.add_argument("--slide", type=Path, help="a whole slide to train on as well")
    parser.add_argument("--slide-alone", action="store_true", help="train on no mosaics")
    parser.add_argument("--slide-tile", type=int, default=96, help="px of its tiles, 0.5 um each; default: %(default)s")
    parser.add_argument("--nearest", type=int, default=8, help="k of its recall@k; default: %(default)s")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), help="default: all")
    parser.add_argument("--model", default="test_ssmamba", help="ours, or any timm name; default: %(default)s")
    parser.add_argument("--img-size", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--patients", type=int, default=30, help="of one slide each; default: %(default)s")
    parser.add_argument("--cells", type=int, default=12, help="tiles along a slide's side; default: %(default)s")
    parser.add_argument("--epochs", type=int, default=5, help="of each run; default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--optimizer", default="adamw", help="default: %(default)s")
    parser.add_argument("--lr", type=float, default=1e-3, help="default: %(default)s")
    parser.add_argument("--jitter", type=float, default=0.4, help="of colours, and twice the share of grey views")
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=0, help="processes that read tiles; default: %(default)s")
    parser.add_argument("--out", type=Path, required=True, help="folder of the slides, the runs and the tables")
    parser.add_argument("--no-report", action="store_true", help="train alone")
    parser.add_argument("--quick", action="store_true", help="a tiny model on synthetic tiles")
    arguments = parser.parse_args()
    if not arguments.quick and not (arguments.data and arguments.classes):
        parser.error("give --data FOLDER and --classes, or --quick to look at synthetic tiles")
    if arguments.slide_alone and not arguments.slide:
        parser.error("--slide-alone needs --slide")
    if arguments.quick:
        arguments.data, arguments.classes = None, ["stroma", "glands"]
        arguments.patients, arguments.cells, arguments.epochs, arguments.batch_size = 6, 4, 1, 16
        arguments.variants, arguments.seeds = ["sgcl", "self", "random"], 1
    arguments.out.mkdir(parents=True, exist_ok=True)
    manifest = write_slides(arguments)
    tiles = read_spatial_tiles(manifest)
    for seed in range(arguments.seeds):
        for variant in arguments.variants:
            features_of(variant, seed, tiles, manifest, arguments)
    if arguments.no_report:
        return
    written = report(tiles, manifest, arguments)
    (arguments.out / "report.md").write_text(written)
    print(written)


if __name__ == "__main__":
    main()
