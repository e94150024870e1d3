"""Jobs of extraction by a tiny model and of cutting tiles, on small slides, and what is looked at afterwards."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from slide_files import blank, corrupt_tile, make_empty_file, make_not_a_slide, make_pyramid, tissue, truncate

from ssmamba_models.wsi.extract import ExtractResult, extract_slides
from ssmamba_models.wsi.extract_plan import ExtractPlan
from ssmamba_models.wsi.tile_slides import TilePlan, TileResult, tile_slides

MODEL, TILE = "test_ssmamba", 64
GEOMETRY = f"1mpp_{TILE}px_0px"
FEATURES = f"{GEOMETRY}/features_{MODEL}"
TINY = {"model": MODEL, "mpp": 1.0, "tile_size": TILE, "img_size": TILE, "batch_size": 8, "workers": 0}


def disc(xs, ys):
    """One piece of tissue, large enough to be found."""
    return tissue(xs, ys, period=1600)


def make_slides(folder: Path, names: str = "abc") -> Path:
    """Slides of 18 to 50 tiles with tissue, of different sizes."""
    folder.mkdir(exist_ok=True)
    for index, name in enumerate(names):
        make_pyramid(folder / f"{name}.tif", (1600 - 160 * (index % 3), 1200), mpp=0.5, content=disc)
    return folder


def make_bad_slides(folder: Path) -> Path:
    """One slide of each kind of trouble, and a good one; their names tell the trouble."""
    folder.mkdir()
    size = (1600, 1200)
    make_pyramid(folder / "good.tif", size, mpp=0.5, content=disc)
    make_pyramid(folder / "blank.tif", size, mpp=0.5, content=blank)
    make_pyramid(folder / "no_mpp.tif", size, content=disc)
    truncate(make_pyramid(folder / "truncated.tif", size, mpp=0.5, content=disc))
    # Level 0 has 7 x 5 TIFF tiles; the overview comes from level 1, so the fault is met tile by tile.
    corrupt_tile(make_pyramid(folder / "one_bad_tile.tif", size, mpp=0.5, levels=(1, 4), content=disc), 17)
    make_empty_file(folder / "zero_bytes.svs")
    make_not_a_slide(folder / "no_slide.svs")
    return folder


def extract(slides, out, **changes) -> ExtractResult:
    """Extract without a progress bar, by the tiny model unless said otherwise."""
    return extract_slides(slides, out, ExtractPlan(**{**TINY, **changes}), progress=False)


def cut(slides, out, **changes) -> TileResult:
    """Cut tiles without a progress bar, where `extract` takes its own."""
    plan = TilePlan(**{"mpp": 1.0, "tile_size": TILE, "workers": 0, **changes})
    return tile_slides(slides, out, plan, progress=False)


def digests(job: Path, patterns=("*.h5", "*.png", "*.geojson")) -> dict[str, str]:
    """Path -> hash of its bytes, of all outputs."""
    files = sorted(path for pattern in patterns for path in job.rglob(pattern) if path.is_file())
    return {str(path.relative_to(job)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def leftovers(job: Path) -> list[str]:
    """What no finished job has: part files, probes, locks."""
    return sorted(str(path.relative_to(job)) for path in job.rglob(".*"))


def events(job: Path, status: str) -> list[str]:
    """The slides of which status.jsonl tells this, once for each time."""
    lines = map(json.loads, (job / "status.jsonl").read_text().splitlines())
    return [line["slide"] for line in lines if line["status"] == status]
