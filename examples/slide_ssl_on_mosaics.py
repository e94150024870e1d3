"""What slide-level pretraining is worth with few labels: Giga-SSL and PAMA on slides assembled from real tiles.

python examples/slide_ssl_on_mosaics.py --quick --out slides             # synthetic tiles, tiny models: a minute
python examples/slide_ssl_on_mosaics.py --data lc25000 --model ssmamba_small --out slides

Two questions are asked of the same slides. `mixture`: is there more of the second tissue or of the first? `layout`: do
the tissues lie in regions, or scattered? The mixture is drawn alike for both layouts, so the mean of a slide's tiles
cannot answer that one. No label is seen in pretraining; a patient's tiles come from groups that no other patient has,
and is never divided between training and test. Each variant is trained once per seed; AUC of a logistic regression from
--labelled slides, with an interval over patients and draws (bootstrap). The table is OUT/slide_ssl.md. What is done is
kept: the same line again goes on.
"""

import argparse
import csv
from pathlib import Path

import numpy as np
import torch
from torchvision.transforms.v2 import functional as transforms

from ssmamba_models.data.labelled import read_tiles
from ssmamba_models.data.mosaic_files import LABELS, write_mosaic_features
from ssmamba_models.data.mosaics import MosaicKind, assemble_mosaics
from ssmamba_models.data.slide_vectors import SlideVectors, read_slide_vectors
from ssmamba_models.data.synthetic import write_synthetic_tiles
from ssmamba_models.data.tile_files import read_features
from ssmamba_models.data.tiles import read_tile
from ssmamba_models.engine.embed import embed_folder
from ssmamba_models.engine.encoder import load_encoder
from ssmamba_models.engine.slide_embed import MEAN_POOL, RANDOM, embed_slides
from ssmamba_models.engine.slide_pretrain import SlidePretrainConfig, pretrain_slides
from ssmamba_models.evaluation.bootstrap import Estimate, compare
from ssmamba_models.evaluation.slide_data import label_slides
from ssmamba_models.evaluation.slide_scoring import SlideSettings, SlideTask, score_vectors
from ssmamba_models.wsi.shared_aug import draw_augmentation

# Narrow models: the whole takes half an hour on one core.
GIGASSL = {
    "method": "gigassl",
    "model": "gigassl_scm",
    "model_args": {"embed_dim": 128},
    "batch_size": 64,
    "lr": 1e-3,
}
PAMA = {"method": "pama", "model": "pama_small", "batch_size": 32, "lr": 1e-3, "method_args": {"decoder_dim": 128}}
PAMA_ARGS = {"embed_dim": 128, "depth": 2, "num_heads": 4, "tiles_per_anchor": 16}
# Variant -> (settings of SlidePretrainConfig, options of the embedding).
VARIANTS = {
    "gigassl": ({**GIGASSL, "epochs": 30}, {}),
    "gigassl, plain features": ({**GIGASSL, "epochs": 30, "view_args": {"shared_aug": False}}, {}),
    "gigassl, 64 tiles, plain": (
        {**GIGASSL, "epochs": 15, "view_args": {"shared_aug": False, "tiles": 64}},
        {"tiles": 64, "views": 10},
    ),
    "pama": ({**PAMA, "epochs": 15, "model_args": PAMA_ARGS}, {}),
    "pama, no KRO": ({**PAMA, "epochs": 15, "model_args": {**PAMA_ARGS, "kro": False}}, {}),
    "pama, no anchor dropout": ({**PAMA, "epochs": 15, "model_args": {**PAMA_ARGS, "anchor_drop_rate": 0.0}}, {}),
}
QUICK = ("gigassl", "pama")
QUESTIONS = ("mixture", "layout")


class SharedBags:
    """Makes the bags of shared augmentation of a mosaic: (A, n, D) features and the cells (A, n) that they are of."""

    def __init__(self, tiles, encoder, bags, bag_tiles):
        self.tiles, self.encoder, self.bags, self.bag_tiles = tiles, encoder, bags, bag_tiles

    @torch.inference_mode()
    def __call__(self, mosaic):
        config = self.encoder.data_config
        size = config["input_size"][1:]
        dice = np.random.default_rng(int(mosaic.name.split("_")[1]) * 1000 + int(mosaic.name.split("_")[2]))
        cells = dice.integers(mosaic.tiles.size, size=(self.bags, self.bag_tiles))
        features = []
        for bag in cells:
            paths = [self.tiles.root / self.tiles.paths[index] for index in mosaic.tiles.reshape(-1)[bag]]
            images = torch.stack([transforms.to_image(read_tile(path).resize(size)) for path in paths]).float() / 255
            images = transforms.normalize(draw_augmentation(dice)(images), config["mean"], config["std"])
            features.append(self.encoder.embed(images))
        return np.stack(features), cells


def write_slides(arguments) -> Path:
    """Assemble the slides and a table of labels for each question, once; returns their folder."""
    folder = arguments.out / "slides"
    if (folder / LABELS).exists():
        return folder
    data = arguments.data or write_synthetic_tiles(arguments.out / "tiles", tiles_per_kind=40, size=64)
    pretrained = not arguments.quick
    file = arguments.features or arguments.out / "tiles.h5"
    if not file.exists():
        embed_folder(data, file, arguments.model, pretrained=pretrained, img_size=arguments.img_size)
    stored, tiles = read_features(file), read_tiles(data)
    place = {path: row for row, path in enumerate(stored.paths)}
    features = stored.features[[place[path] for path in tiles.paths]]
    first, second = arguments.tissues
    kinds = {
        f"{mixture}-{layout}": MosaicKind({first: None, second: shares}, layout)
        for mixture, shares in (("less", (0.3, 0.45)), ("more", (0.4, 0.55)))
        for layout in ("scattered", "regions")
    }
    shape = (arguments.cells, arguments.cells)
    mosaics = assemble_mosaics(tiles, kinds, patients=arguments.patients, shape=shape)
    encoder = load_encoder(arguments.model, pretrained=pretrained, img_size=arguments.img_size)
    bags = SharedBags(tiles, encoder, arguments.bags, arguments.bag_tiles)
    write_mosaic_features(mosaics, features, stored.attributes, folder, bags=bags)
    return folder


def write_labels(question, folder, out) -> Path:
    """A table of labels that asks one question alone."""
    with open(folder / LABELS, newline="") as file:
        rows = list(csv.DictReader(file))
    path = out / f"{question}.csv"
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["slide", "label", "patient"])
        part = QUESTIONS.index(question)
        writer.writerows((row["slide"], row["label"].split("-")[part], row["patient"]) for row in rows)
    return path


def embedded(variant, seed, folder, arguments) -> SlideVectors:
    """The slides' vectors by a variant, trained if it was not yet."""
    settings, options = VARIANTS[variant]
    run = arguments.out / f"{variant.replace(', ', '-').replace(' ', '_')}-{seed}"
    file = run.with_suffix(".h5")
    if not file.exists():
        epochs = 2 if arguments.quick else settings["epochs"]
        batch = 8 if arguments.quick else settings["batch_size"]
        config = {**settings, "epochs": epochs, "batch_size": batch, "seed": seed, "workers": 0}
        pretrain_slides(SlidePretrainConfig(features=str(folder), **config), run, resume=True, progress=False)
        embed_slides(run, folder, file, options=options, seed=seed, progress=False)
        print(f"{variant}, seed {seed}: done", flush=True)
    return read_slide_vectors(file)


def all_vectors(arguments, folder) -> dict[str, list[SlideVectors]]:
    """What is compared, by name: one set of vectors for each seed, and one of the mean."""
    named: dict[str, list[SlideVectors]] = {}
    for variant in arguments.variants:
        runs = [embedded(variant, seed, folder, arguments) for seed in range(arguments.seeds)]
        named.setdefault(MEAN_POOL, [SlideVectors(runs[0].slides, runs[0].baselines[MEAN_POOL])])
        twins = [SlideVectors(run.slides, run.baselines[RANDOM]) for run in runs]
        named.setdefault(f"random {variant.split(',')[0]}", twins)
        named[variant] = [SlideVectors(run.slides, run.embeddings) for run in runs]
    return named


def mean_of(estimates) -> Estimate:
    """The mean over runs, in each draw too."""
    values = [estimate.value for estimate in estimates]
    return Estimate(float(np.mean(values)), np.mean([one.draws for one in estimates], axis=0), tuple(values))


def score(named, labels, arguments) -> dict[str, Estimate]:
    """AUC from few labels, by name."""
    files = {f"{name}/{seed}": ("", run) for name, runs in named.items() for seed, run in enumerate(runs)}
    slides = label_slides(files, labels)
    task = SlideTask(slides, SlideSettings(budgets=(arguments.labelled,)))
    auc = {one.label: score_vectors(task, one.vectors)[0].estimates["auc"] for one in slides.sets}
    return {name: mean_of([auc[f"{name}/{seed}"] for seed in range(len(runs))]) for name, runs in named.items()}


def row_of(name, estimate, mean_pool):
    low, high = estimate.interval()
    seeds = ", ".join(f"{value:.3f}" for value in estimate.seeds)
    gain = compare(estimate, mean_pool)
    difference = f"{gain['difference']:+.3f} ({gain['low']:+.3f} to {gain['high']:+.3f})" if name != MEAN_POOL else ""
    return f"| {name} | {estimate.value:.3f} ({low:.3f} to {high:.3f}) | {seeds} | {difference} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="labelled tiles, with groups if possible")
    parser.add_argument("--features", type=Path, help="HDF5 file of `ssmamba embed`; made if not given")
    parser.add_argument("--model", default="ssmamba_small", help="tile encoder; default: %(default)s")
    parser.add_argument("--img-size", type=int, default=96, help="its input; default: %(default)s")
    parser.add_argument("--tissues", nargs=2, default=["lung_n", "lung_aca"], help="two classes; default: %(default)s")
    parser.add_argument("--patients", type=int, default=100, help="with two slides each; default: %(default)s")
    parser.add_argument("--cells", type=int, default=12, help="tiles along a slide's side; default: %(default)s")
    parser.add_argument("--bags", type=int, default=6, help="of shared augmentation per slide; default: %(default)s")
    parser.add_argument("--bag-tiles", type=int, default=10, help="tiles of a bag; default: %(default)s")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), help="default: all")
    parser.add_argument("--labelled", default="50", help="training slides: 50, 25%%, all, ...; default: %(default)s")
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--out", type=Path, required=True, help="folder of the slides, the runs and the table")
    parser.add_argument("--quick", action="store_true", help="synthetic tiles, a tiny model with random weights")
    arguments = parser.parse_args()
    if not arguments.quick and not arguments.data:
        parser.error("give --data FOLDER, or --quick to look at synthetic tiles")
    if arguments.quick:
        arguments.data, arguments.model, arguments.img_size = None, "test_ssmamba", 64
        arguments.tissues, arguments.patients, arguments.cells, arguments.seeds = ["stroma", "solid"], 12, 6, 1
        arguments.bags, arguments.bag_tiles, arguments.labelled, arguments.variants = 2, 4, "all", list(QUICK)
    arguments.out.mkdir(parents=True, exist_ok=True)
    folder = write_slides(arguments)
    named = all_vectors(arguments, folder)
    lines = []
    for question in QUESTIONS:
        figures = score(named, write_labels(question, folder, arguments.out), arguments)
        lines += [f"| {question} | AUC (95 %) | each seed | less mean pooling |", "| --- | --- | --- | --- |"]
        lines += [row_of(name, estimate, figures[MEAN_POOL]) for name, estimate in figures.items()] + [""]
    table = "\n".join(lines)
    (arguments.out / "slide_ssl.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
