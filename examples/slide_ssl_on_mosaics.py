"""What slide-level pretraining is worth with few labels: Giga-SSL and PAMA on slides assembled from real tiles.

python examples/slide_ssl_on_mosaics.py --quick --out slides             # synthetic tiles, tiny models: a minute
python examples/slide_ssl_on_mosaics.py --data lc25000 --model ssmamba_small --out slides

Two questions are asked of the same slides. `mixture`: is there more of the second tissue or of the first? `layout`: do
the second's tiles lie around one place, or scattered? The mixture is drawn alike for both layouts, so the mean of a
slide's tiles cannot answer that one. Each patient has slides of every mixture and layout, of the same few tiles, which
no other patient has: who the patient is tells nothing of the answer. No label is seen in pretraining, and no patient is
divided between training and test. Tiles are reduced to their principal components, which makes a training short.

Each variant is trained once per seed; AUC of a logistic regression from --labelled slides, with an interval over
patients and draws (bootstrap). The table is OUT/slide_ssl.md. What is done is kept: the same line again goes on.
"""

import argparse
import csv
import itertools
from pathlib import Path

import numpy as np
import torch
from torchvision.transforms.v2 import functional as transforms

from ssmamba_models.data.labelled import read_tiles
from ssmamba_models.data.mosaic_files import LABELS, remember_mosaics, write_mosaic_features
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
from ssmamba_models.output import whole_file
from ssmamba_models.wsi.shared_aug import draw_augmentation

# Narrow models: all trainings take a quarter of an hour to an hour on one core.
GIGASSL = {
    "method": "gigassl",
    "model": "gigassl_scm",
    "model_args": {"embed_dim": 64},
    "method_args": {"temperature": 0.1, "hidden_dim": 256, "out_dim": 128},
    "view_args": {"tiles": 128},
    "epochs": 40,
    "batch_size": 48,
    "lr": 2e-3,
}
PAMA_ARGS = {"embed_dim": 64, "depth": 2, "num_heads": 4, "tiles_per_anchor": 16}
PAMA = {
    "method": "pama",
    "model": "pama_small",
    "model_args": PAMA_ARGS,
    "method_args": {"decoder_dim": 64, "decoder_heads": 4},
    "epochs": 20,
    "batch_size": 8,
    "lr": 4e-3,
}
# Variant -> (settings of SlidePretrainConfig, options of the embedding).
VARIANTS = {
    "gigassl": (GIGASSL, {"tiles": "all"}),
    "gigassl, plain features": ({**GIGASSL, "view_args": {"tiles": 128, "shared_aug": False}}, {"tiles": "all"}),
    "gigassl, 5 tiles": ({**GIGASSL, "view_args": {"tiles": 5, "shared_aug": False}}, {"tiles": 5, "views": 50}),
    "pama": (PAMA, {}),
    "pama, no KRO": ({**PAMA, "model_args": {**PAMA_ARGS, "kro": False}}, {}),
    "pama, no anchor dropout": ({**PAMA, "model_args": {**PAMA_ARGS, "anchor_drop_rate": 0.0}}, {}),
}
QUICK = ("gigassl", "pama")
QUESTIONS = ("mixture", "layout")
# What the slides follow from.
MADE_OF = (
    *("data", "features", "model", "img_size", "tissues", "less", "more", "patients", "slides", "cells", "pool"),
    *("components", "bags", "bag_tiles"),
)


class SharedBags:
    """The bags of shared augmentation of a mosaic: (A, n, D) features and the cells (A, n) that they are of.

    A patient's tiles are altered A times, all alike, and embedded once for all of the patient's mosaics; each bag of a
    mosaic draws its cells anew. `altered` (A, M, D) holds the features of the M (patient, tile) pairs of `rows`.
    """

    def __init__(self, rows, altered, bag_tiles):
        self.place = {row: place for place, row in enumerate(rows)}
        self.altered, self.bag_tiles = altered, bag_tiles

    def __call__(self, mosaic):
        dice = np.random.default_rng([int(part) for part in mosaic.name.split("_")[1:]])
        cells = dice.integers(mosaic.tiles.size, size=(len(self.altered), self.bag_tiles))
        places = np.array([self.place[mosaic.patient, tile] for tile in mosaic.tiles.reshape(-1).tolist()])
        return np.stack([bag[places[drawn]] for bag, drawn in zip(self.altered, cells)]), cells


@torch.inference_mode()
def embed_altered(tiles, rows, encoder, bags):
    """(A, M, D): for each (patient, tile) its feature under each of its patient's A augmentations."""
    config = encoder.data_config
    features = []
    for patient, own in itertools.groupby(rows, key=lambda row: row[0]):
        images = [read_tile(tiles.root / tiles.paths[tile]).resize(config["input_size"][1:]) for _, tile in own]
        images = torch.stack([transforms.to_image(image) for image in images]).float() / 255
        dice = np.random.default_rng(int(patient.split("_")[1]))
        altered = [draw_augmentation(dice)(images) for _ in range(bags)]
        normalised = (transforms.normalize(one, config["mean"], config["std"]) for one in altered)
        features.append(np.stack([encoder.embed(one) for one in normalised]))
        print(f"{patient}: {bags} augmentations of {len(images)} tiles", flush=True)
    return np.concatenate(features, axis=1)


def altered_features(arguments, tiles, mosaics):
    """The (patient, tile) pairs of the mosaics, and their features under shared augmentation, embedded once."""
    rows = sorted({(mosaic.patient, tile) for mosaic in mosaics for tile in mosaic.tiles.reshape(-1).tolist()})
    file = arguments.out / "altered.npy"
    if not file.exists():
        encoder = load_encoder(arguments.model, pretrained=not arguments.quick, img_size=arguments.img_size)
        altered = embed_altered(tiles, rows, encoder, arguments.bags)
        with whole_file(file) as part, open(part, "wb") as stream:
            np.save(stream, altered)
    return rows, np.load(file)


def principal_components(features, count):
    """A projection to the first principal components, of unit variance on average; no label is read."""
    mean = features.mean(0)
    _, values, axes = np.linalg.svd(features - mean, full_matrices=False)
    scale = np.sqrt(np.square(values[:count]).mean() / len(features))
    return lambda x: ((x - mean) @ axes[:count].T / scale).astype(np.float32)


def assemble(arguments, tiles):
    """The slides: each patient has as many of every mixture and layout."""
    first, second = arguments.tissues
    kinds = {
        f"{mixture}-{layout}": MosaicKind({second: tuple(shares), first: None}, layout)
        for mixture, shares in (("less", arguments.less), ("more", arguments.more))
        for layout in ("scattered", "compact")
    }
    return assemble_mosaics(
        tiles,
        kinds,
        patients=arguments.patients,
        slides_per_patient=arguments.slides,
        shape=(arguments.cells, arguments.cells),
        every_label=True,
        tiles_per_class=arguments.pool,
    )


def write_slides(arguments) -> Path:
    """Assemble the slides and a table of labels for each question, once; returns their folder."""
    folder = arguments.out / "slides"
    remember_mosaics(arguments.out, {name: getattr(arguments, name) for name in MADE_OF})
    if (folder / LABELS).exists():
        return folder
    data = arguments.data or write_synthetic_tiles(arguments.out / "tiles", tiles_per_kind=40, size=64)
    file = arguments.features or arguments.out / "tiles.h5"
    if not file.exists():
        embed_folder(data, file, arguments.model, pretrained=not arguments.quick, img_size=arguments.img_size)
    stored, tiles = read_features(file), read_tiles(data)
    place = {path: row for row, path in enumerate(stored.paths)}
    features = stored.features[[place[path] for path in tiles.paths]]
    mosaics = assemble(arguments, tiles)
    bags = None
    project = principal_components(features[np.isin(tiles.labels, arguments.tissues)], arguments.components)
    if arguments.bags:
        rows, altered = altered_features(arguments, tiles, mosaics)
        bags = SharedBags(rows, project(altered), arguments.bag_tiles)
    attributes = {**stored.attributes, "principal_components": arguments.components}
    write_mosaic_features(mosaics, project(features), attributes, folder, bags=bags)
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
    parser.add_argument("--less", nargs=2, type=float, default=[0.35, 0.48], help="share of the second: %(default)s")
    parser.add_argument("--more", nargs=2, type=float, default=[0.52, 0.65], help="share of the second: %(default)s")
    parser.add_argument("--patients", type=int, default=24, help="default: %(default)s")
    parser.add_argument("--slides", type=int, default=8, help="of a patient; default: %(default)s")
    parser.add_argument("--cells", type=int, default=12, help="tiles along a slide's side; default: %(default)s")
    parser.add_argument("--pool", type=int, default=16, help="a patient's tiles of each tissue; default: %(default)s")
    parser.add_argument("--components", type=int, default=32, help="principal components kept; default: %(default)s")
    parser.add_argument("--bags", type=int, default=3, help="of shared augmentation per slide; default: %(default)s")
    parser.add_argument("--bag-tiles", type=int, default=288, help="tiles of a bag; default: %(default)s")
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
        arguments.tissues, arguments.patients, arguments.cells, arguments.seeds = ["stroma", "solid"], 6, 6, 1
        arguments.slides, arguments.pool, arguments.components = 4, 4, 8
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
