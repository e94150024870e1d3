"""Feature files in, slide vectors out: `ssmamba slide-embed` in Python."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ssmamba_models._version import __version__
from ssmamba_models.data.bags import Bag, Bags, check_same_provenance
from ssmamba_models.data.slide_bags import check_finite, read_slides
from ssmamba_models.data.slide_vectors import SlideVectors, write_slide_vectors
from ssmamba_models.engine.device import resolve_device, use_bf16
from ssmamba_models.engine.rng import seeded
from ssmamba_models.output import check_output
from ssmamba_models.progress import progress_bar
from ssmamba_models.slide.slide_encoder import SlideEncoder
from ssmamba_models.slide.slide_encoders import create_slide_encoder
from ssmamba_models.slide.slide_weights import load_slide_encoder, read_slide_config
from ssmamba_models.threads import threaded

# The baselines that every file of slide vectors holds.
MEAN_POOL, RANDOM = "mean_pool", "random_encoder"


@dataclass(frozen=True)
class SlideEmbedSummary:
    """What `embed_slides` did.

    Attributes:
        out: the file written.
        count: S, the number of slides in it.
        embed_dim: E, the length of a vector.
        unreadable: (file, reason) of each feature file that could not be read and is not in the file.
    """

    out: Path
    count: int
    embed_dim: int
    unreadable: tuple[tuple[str, str], ...]


@threaded
def embed_slides(
    run: str | os.PathLike,
    features: str | os.PathLike,
    out: str | os.PathLike,
    *,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    precision: str = "fp32",
    device: str | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> SlideEmbedSummary:
    """Embed the slides of a folder of feature files into one file (see `ssmamba_models.data.slide_vectors`).

    Beside each slide's vector stand the mean of its tiles' features and the vector of the same architecture with random
    weights: what a vector is worth shows against those. Slides are read one at a time and whole: memory is that of the
    largest.

    Args:
        run: a run folder of `ssmamba slide-pretrain`, a folder of `ssmamba publish --dry-run`, or "hf-hub:ORG/NAME".
        features: folder of feature files, or one of them; of the kind that the encoder was trained on.
        out: the file to write; its folder must exist. Written whole or not at all.
        options: of the encoder's `embed_slide`, such as views and tiles.
        seed: of what is drawn, and of the random weights.
        precision: "fp32", "bf16" (autocast), or "auto": bf16 where a GPU computes in it.
        device: "cpu", "cuda", ...; None takes a GPU where there is one.
        threads: CPU threads; None takes the cores that this process may use (see `threads.use_threads`).
        overwrite: replace an existing `out`.
        progress: draw a progress bar on stderr.

    Returns:
        What was done, and which files could not be read.

    Raises:
        ValueError: no slide encoder, an option that it does not have, or features of another kind.
        FileNotFoundError, FileExistsError, OSError: something to read is not there, or `out` cannot be written.
        ImportError: h5py is missing.
    """
    path, place = check_output(out, overwrite), resolve_device(device)
    config = read_slide_config(run)
    encoder = load_slide_encoder(run).to(place)
    options = check_options(encoder, options or {})
    unreadable: list[tuple[str, str]] = []
    slides = read_slides(features, lambda file, reason: unreadable.append((str(file), reason)))
    _check_kind(config, slides)
    embedder = SlideEmbedder({"embeddings": encoder, RANDOM: random_twin(encoder, seed)}, options, seed, precision)
    names, rows = embedder.embed(slides, unreadable, progress)
    vectors = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    attributes = {
        "model": encoder.name,
        "weights_sha256": config["domain"]["sha256"],
        "seed": seed,
        **{f"option_{name}": value for name, value in options.items() if value is not None},
        **{f"features_{name}": value for name, value in slides.provenance.items() if value is not None},
        "dtype": "bfloat16" if embedder.bf16 else "float32",
        "device": place.type,
        "ssmamba_models_version": __version__,
        "torch_version": str(torch.__version__),
    }
    embeddings = vectors.pop("embeddings")
    write_slide_vectors(path, SlideVectors(names, embeddings, vectors, attributes), overwrite)
    return SlideEmbedSummary(path, len(names), encoder.embed_dim, tuple(unreadable))


def embed_baselines(features: str | os.PathLike, model: str = "gigassl_scm", seed: int = 0) -> tuple[SlideVectors, str]:
    """What vectors from elsewhere are compared with: the mean of each slide's tiles, and a random encoder's vector.

    Args:
        features: folder of feature files.
        model: one of `list_slide_encoders()`, the architecture with random weights.
        seed: of the weights, and of what is drawn.

    Returns:
        The mean vectors with both as baselines, of the slides that can be read; and the name of the random encoder.

    Raises:
        ValueError, OSError, ImportError: as `read_slides`.
    """
    slides = read_slides(features, lambda file, reason: None)
    with seeded(seed):
        encoder = create_slide_encoder(model, slides.feature_dim).eval()
    embedder = SlideEmbedder({RANDOM: encoder}, check_options(encoder, {}), seed, "fp32")
    names, rows = embedder.embed(slides, [], progress=False)
    vectors = {name: np.stack([row[name] for row in rows]) for name in (MEAN_POOL, RANDOM)}
    return SlideVectors(names, vectors[MEAN_POOL], vectors), model


def check_options(encoder: SlideEncoder, options: Mapping[str, Any]) -> dict[str, Any]:
    """All options of an encoder's `embed_slide`, with their values.

    Raises:
        ValueError: it has no such option.
    """
    parameters = inspect.signature(encoder.embed_slide).parameters
    known = {name: parameter.default for name, parameter in list(parameters.items())[3:]}
    for name in options:
        if name not in known:
            raise ValueError(f"{encoder.name!r} has no option {name!r}; it has: {', '.join(known) or 'none'}")
    return {**known, **options}


def random_twin(encoder: SlideEncoder, seed: int) -> SlideEncoder:
    """An encoder of the same architecture with random weights, on the same device: what training is measured by."""
    arguments = dict(encoder.arguments)
    with seeded(seed):
        twin = create_slide_encoder(encoder.name, arguments.pop("feature_dim"), **arguments)
    return twin.to(encoder.device).eval()


def _check_kind(config: Mapping[str, Any], slides: Bags) -> None:
    trained = config["metadata"].get("provenance") or {"feature_dim": config["arguments"]["feature_dim"]}
    now = {name: slides.provenance[name] for name in trained if name in slides.provenance}
    check_same_provenance({"what the encoder was trained on": trained, slides.bags[0].slide: now})


class SlideEmbedder:
    """Embeds slides by several encoders at once, and by the mean of their tiles.

    Args:
        encoders: name -> encoder; all on one device.
        options: of their `embed_slide`.
        seed: of what is drawn, for each slide the same: a vector does not depend on the other slides.
        precision: as `embed_slides`.
    """

    def __init__(self, encoders: Mapping[str, SlideEncoder], options: Mapping[str, Any], seed: int, precision: str):
        self.encoders, self.options, self.seed = encoders, options, seed
        self.device = next(iter(encoders.values())).device if encoders else torch.device("cpu")
        self.bf16 = use_bf16(precision, self.device)

    def embed(
        self, slides: Bags, unreadable: list[tuple[str, str]], progress: bool
    ) -> tuple[tuple[str, ...], list[dict[str, np.ndarray]]]:
        """The vectors of all slides that can be read; the others are appended to `unreadable`.

        Returns:
            S names, and for each name -> (E,) float32, of the encoders and `MEAN_POOL`.

        Raises:
            ValueError: no slide can be read.
        """
        names, rows = [], []
        bar = progress_bar("slide-embed", "slide", progress, items=slides.bags)
        for bag in bar:
            try:
                features, coords = bag.read()
                check_finite(features, bag.slide)
            except (OSError, ValueError) as error:
                unreadable.append((str(bag.path), str(error)))
                continue
            rows.append(self._slide(bag, features, coords))
            names.append(bag.slide)
        if not rows:
            raise ValueError(f"no feature file in {str(slides.folder)!r} can be read (first: {unreadable[0][1]})")
        return tuple(names), rows

    def _slide(self, bag: Bag, features: np.ndarray, coords: np.ndarray) -> dict[str, np.ndarray]:
        mean = features.mean(axis=0, dtype=np.float64).astype(np.float32)
        tiles = torch.from_numpy(features).float()
        grid = torch.from_numpy(coords / bag.patch_size_level0).float()
        found = {MEAN_POOL: mean}
        for name, encoder in self.encoders.items():
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                found[name] = encoder.embed(tiles, grid, seed=self.seed, **self.options).float().cpu().numpy()
        return found
