"""What each invariance of SGCL is worth: short runs that differ in one, scored on patients that none of them saw.

python examples/sgcl_ablation.py --quick --out ablation                # synthetic tiles, a tiny model: a minute
python examples/sgcl_ablation.py --data lc25000 --classes lung_aca lung_n lung_scc --out ablation

Slides are mosaics of labelled tiles in regions of one tissue each, so that neighbours mean something; a patient's tiles
come from groups that no other patient has, and two thirds of the patients are trained on. "self" is plain instance
discrimination, "random" an encoder without training. Every run has the same budget; each variant is trained once per
seed and scored by a linear probe, with an interval over patients and seeds (bootstrap). The table is OUT/ablation.md.
What is done is kept: the same line again goes on.
"""

import argparse
from pathlib import Path

from ssmamba_models.data.labelled import read_tiles
from ssmamba_models.data.mosaic_files import write_mosaic_tiles
from ssmamba_models.data.mosaics import MosaicKind, assemble_mosaics
from ssmamba_models.data.synthetic import write_synthetic_tiles
from ssmamba_models.data.tile_files import read_features
from ssmamba_models.engine.embed import embed_tiles
from ssmamba_models.engine.encoder import load_encoder
from ssmamba_models.engine.pretrain import PretrainConfig, pretrain
from ssmamba_models.evaluation.bootstrap import compare
from ssmamba_models.evaluation.scoring import TaskData, score_encoder
from ssmamba_models.evaluation.settings import Settings
from ssmamba_models.evaluation.tasks import Task

# Variant -> arguments of the method; None is not trained at all.
VARIANTS = {
    "sgcl": {},
    "no_intra": {"intra": False},
    "no_inter": {"inter": False},
    "no_inner": {"inner": False},
    "self": {"intra": False, "inter": False, "inner": False},
    "random": None,
}


def write_slides(arguments) -> Path:
    """Assemble the slides, once; returns their folder."""
    folder = arguments.out / "slides"
    if (folder / "manifest.csv").exists():
        return folder
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
    write_mosaic_tiles(mosaics, tiles, folder, splits)
    return folder


def encoder_of(variant, seed, folder, arguments):
    """The encoder of a variant and a seed, trained if it was not yet."""
    if VARIANTS[variant] is None:
        return load_encoder(arguments.model, img_size=arguments.img_size, seed=seed)
    config = PretrainConfig(
        method="sgcl",
        data=str(folder),
        model=arguments.model,
        img_size=arguments.img_size,
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        lr=arguments.lr,
        optimizer=arguments.optimizer,
        seed=seed,
        workers=arguments.workers,
        drop_path_rate=0.0,
        # The spatial loss must count for most of a short run.
        method_args={"ramp_epochs": max(1, arguments.epochs // 5), **VARIANTS[variant]},
    )
    run = arguments.out / f"{variant}-{seed}"
    pretrain(config, run, resume=True, progress=False)
    return load_encoder(arguments.model, checkpoint=run)


def features_of(variant, seed, tiles, folder, arguments):
    """(N, D) of all tiles."""
    file = arguments.out / f"{variant}-{seed}.h5"
    if not file.exists():
        encoder = encoder_of(variant, seed, folder, arguments)
        embed_tiles(tiles, encoder, file, workers=arguments.workers, progress=False)
        print(f"{variant}, seed {seed}: done", flush=True)
    return read_features(file).features


def row_of(name, estimate, gain):
    low, high = estimate.interval()
    seeds = ", ".join(f"{score:.3f}" for score in estimate.seeds)
    difference = f"{gain['difference']:+.3f} ({gain['low']:+.3f} to {gain['high']:+.3f})" if gain else ""
    return f"| {name} | {estimate.value:.3f} ({low:.3f} to {high:.3f}) | {seeds} | {difference} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="labelled tiles, with groups if possible")
    parser.add_argument("--classes", nargs="+", help="the tissues of every slide, in equal parts")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), help="default: all")
    parser.add_argument("--model", default="test_ssmamba", help="ours, or any timm name; default: %(default)s")
    parser.add_argument("--img-size", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--patients", type=int, default=30, help="of one slide each; default: %(default)s")
    parser.add_argument("--cells", type=int, default=12, help="tiles along a slide's side; default: %(default)s")
    parser.add_argument("--epochs", type=int, default=5, help="of each run; default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--optimizer", default="adamw", help="default: %(default)s")
    parser.add_argument("--lr", type=float, default=1e-3, help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=0, help="processes that read tiles; default: %(default)s")
    parser.add_argument("--out", type=Path, required=True, help="folder of the slides, the runs and the table")
    parser.add_argument("--quick", action="store_true", help="a tiny model on synthetic tiles")
    arguments = parser.parse_args()
    if not arguments.quick and not (arguments.data and arguments.classes):
        parser.error("give --data FOLDER and --classes, or --quick to look at synthetic tiles")
    if arguments.quick:
        arguments.data, arguments.classes = None, ["stroma", "glands"]
        arguments.patients, arguments.cells, arguments.epochs, arguments.batch_size = 6, 4, 1, 16
        arguments.variants, arguments.seeds = ["sgcl", "self", "random"], 1
    arguments.out.mkdir(parents=True, exist_ok=True)
    folder = write_slides(arguments)
    tiles = read_tiles(folder)
    settings = Settings(seeds=arguments.seeds)
    data = TaskData(tiles, Task("tissue", tuple(arguments.classes)), settings)
    figures = {}
    for variant in arguments.variants:
        features = [features_of(variant, seed, tiles, folder, arguments) for seed in range(arguments.seeds)]
        figures[variant] = score_encoder(data, features, settings).methods["linear_probe"].estimates["macro_f1"]
    lines = ["| variant | linear probe, macro-F1 (95 %) | each seed | less the first |", "| --- | --- | --- | --- |"]
    first = figures[arguments.variants[0]]
    for variant, estimate in figures.items():
        lines.append(row_of(variant, estimate, None if estimate is first else compare(estimate, first)))
    table = "\n".join([*lines, ""])
    (arguments.out / "ablation.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
