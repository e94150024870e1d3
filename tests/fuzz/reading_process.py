"""A program that reads files that may be broken, each in a child of its own: a reader that dies or hangs is found.

It reads lines of JSON (reader, path) and answers with what came of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import shutil
import signal
import sys
import traceback
import warnings
from pathlib import Path

import numpy as np
import torch

from ssmamba_models.data.bags import open_bag
from ssmamba_models.data.clam import read_tensor
from ssmamba_models.data.convert import convert_features
from ssmamba_models.data.feature_check import check_slide_features
from ssmamba_models.data.features import read_slide_features
from ssmamba_models.data.labelled import read_tiles
from ssmamba_models.data.slide_labels import check_slide_labels, match_slides, read_slide_labels
from ssmamba_models.data.slide_table import read_slide_table
from ssmamba_models.data.slide_vectors import read_ids, read_slide_vectors
from ssmamba_models.data.spatial_tiles import read_spatial_tiles
from ssmamba_models.data.tile_files import read_features
from ssmamba_models.data.tiles import read_tile
from ssmamba_models.engine.checkpoints import Checkpoints
from ssmamba_models.engine.config import config_values, load_config
from ssmamba_models.engine.encoder import load_encoder
from ssmamba_models.engine.mil_config import MilConfig
from ssmamba_models.engine.mil_model import load_mil_model
from ssmamba_models.engine.mil_predictions import read_predictions
from ssmamba_models.engine.pretrain import PretrainConfig
from ssmamba_models.engine.run_log import cut_log
from ssmamba_models.engine.slide_pretrain import SlidePretrainConfig
from ssmamba_models.hub.run_record import read_run
from ssmamba_models.slide.pama_checkpoint import load_pama_checkpoint
from ssmamba_models.slide.slide_weights import load_slide_encoder
from ssmamba_models.wsi.errors import TileError
from ssmamba_models.wsi.mpp import read_mpp_csv
from ssmamba_models.wsi.reader import open_slide
from ssmamba_models.wsi.status import StatusLog, write_summary

# A reader of small files that takes longer hangs; the machine may be busy.
_SECONDS = 60
# What a reader of a small file may take besides what is loaded.
_BYTES = 4 << 30


def read_slide_feature_file(path: str) -> None:
    found = read_slide_features(path, grid=True, bags=True)
    rows = len(found.coords)
    assert rows > 0
    assert found.features.shape[0] == rows
    assert found.features.ndim == 2
    assert found.features.dtype in (np.float32, np.float16)
    assert found.coords.shape == (rows, 2)
    assert found.coords.dtype == np.int64
    assert isinstance(found.name, str)
    for number in (found.patch_size, found.patch_size_level0, found.level0_mpp, found.target_mpp):
        assert 0 < number < float("inf")
    assert found.grid is None or found.grid.shape[0] == rows
    assert found.tile_grid.shape == (rows, 2)


def read_bag(path: str) -> None:
    bag, provenance = open_bag(path)
    json.dumps(provenance)
    features, coords = bag.read()
    assert features.shape == (bag.tiles, provenance["feature_dim"])
    assert coords.shape == (bag.tiles, 2)
    some, _ = bag.read(np.arange(0, bag.tiles, 2))
    assert np.array_equal(some, features[::2], equal_nan=True)
    if bag.shared_bags:
        assert len(bag.read_shared()[0]) == bag.shared_bags


def check_features(path: str) -> None:
    check_slide_features(path)


def read_tile_features(path: str) -> None:
    found = read_features(path)
    assert found.features.ndim == 2
    assert len(found.paths) == len(found.features)
    assert all(isinstance(name, str) for name in found.paths)
    assert found.labels is None or len(found.labels) == len(found.paths)


def read_vectors(path: str) -> None:
    found = read_slide_vectors(path, None if path.endswith(".h5") else Path(path).with_name("ids.txt"))
    assert np.isfinite(found.embeddings).all()
    assert all(isinstance(name, str) for name in found.slides)


def _convert(path: str, layout: str) -> None:
    out = Path(path).with_name("converted")
    shutil.rmtree(out, ignore_errors=True)
    given = {"level0_mpp": 0.5, "target_mpp": 1.0, "patch_size": 64, "overlap": 0, "model": "m"}
    given |= {"level0_width": 1000, "level0_height": 1000}
    summary = convert_features(path, out, source_layout=layout, target_layout="ssmamba", given=given)
    for written in summary.written:
        read_slide_feature_file(str(written[1]))
    left = [file for file in out.rglob("*") if file.is_file()]
    assert sorted(left) == sorted(written for _, written in summary.written), left
    assert all("KeyError" not in reason and reason.strip("'\"") for _, reason in summary.failed), summary.failed


def convert_clam(path: str) -> None:
    _convert(path, "clam")


def convert_trident(path: str) -> None:
    _convert(path, "trident")


def convert_ours(path: str) -> None:
    out = Path(path).with_name("converted")
    shutil.rmtree(out, ignore_errors=True)
    summary = convert_features(path, out, source_layout="ssmamba", target_layout="clam")
    assert len([file for file in out.rglob("*") if file.is_file()]) == 2 * len(summary.written)


def read_labels(path: str) -> None:
    rows = read_slide_labels(path)
    assert rows
    assert all(row["slide"] and row["label"] for row in rows)
    found, missing = match_slides(rows, {"a", "b", "c"}, path)
    assert len(found) + len(missing) == len(rows)
    if found:
        check_slide_labels(found, path)


def read_table(path: str) -> None:
    for facts in read_slide_table(path).values():
        assert all(isinstance(value, (int, float)) and np.isfinite(value) for value in facts.values())


def read_mpp_table(path: str) -> None:
    assert all(0 < mpp < float("inf") for mpp in read_mpp_csv(path).values())


def read_tile_manifest(path: str) -> None:
    found = read_tiles(Path(path).parent)
    assert len(found) == len(set(found.paths)) > 0
    found.sha256()


def read_place_manifest(path: str) -> None:
    found = read_spatial_tiles(path)
    assert len(found.x) == len(found.y) == len(found.slides) == len(found)
    found.sha256()


def read_id_table(path: str) -> None:
    assert all(read_ids(path))


def read_predicted(path: str) -> None:
    rows, classes = read_predictions(Path(path))
    assert all(len(row.probabilities) == len(classes) and np.isfinite(row.probabilities).all() for row in rows)


def read_slide(path: str) -> None:
    with open_slide(path, mpp_override=0.5) as slide:
        width, height = slide.dimensions
        assert min(width, height) > 0
        for x, y, mpp in ((0, 0, 0.5), (width - 40, height - 40, 0.5), (width // 2, 0, 2.0), (-10, height, 0.7)):
            with contextlib.suppress(TileError):
                tile = slide.read_region(x, y, 64, 64, mpp)
                assert (tile.shape, tile.dtype) == ((64, 64, 3), np.uint8)
        thumbnail, downsample = slide.thumbnail(128)
        assert max(thumbnail.shape[:2]) <= 129
        assert downsample >= 1


def read_slide_mpp(path: str) -> None:
    with open_slide(path) as slide:
        assert 0 < slide.mpp < float("inf")


def read_image(path: str) -> None:
    try:
        assert read_tile(path).mode == "RGB"
    except (ValueError, OSError) as error:
        raise type(error)(f"{path}: {error}") from error  # who reads a tile says which


def read_encoder(path: str) -> None:
    # Features that are not finite are refused where they are written.
    encoder = load_encoder("test_ssmamba", checkpoint=path, device="cpu", img_size=64)
    assert encoder.embed(torch.zeros(1, 3, 64, 64)).shape == (1, encoder.embed_dim)


def read_hub_folder(path: str) -> None:
    folder = Path(path).parent
    encoder = load_encoder(f"local-dir:{folder}", pretrained=True, device="cpu", img_size=64)
    assert encoder.embed(torch.zeros(1, 3, 64, 64)).shape == (1, encoder.embed_dim)


def read_slide_encoder(path: str) -> None:
    encoder = load_slide_encoder(Path(path).parent)
    assert encoder.embed_dim > 0


def read_mil_model(path: str) -> None:
    found = load_mil_model(path)
    assert all(isinstance(name, str) for name in found.classes)


def read_pama(path: str) -> None:
    load_pama_checkpoint(path, tiles_per_anchor=8)


def read_clam_tensor(path: str) -> None:
    assert read_tensor(Path(path)).ndim == 2


def read_checkpoints(path: str) -> None:
    told = []
    state = Checkpoints(Path(path).parent).load(told.append)
    assert set(state) == {"step", "weights"}
    assert (state["step"], float(state["weights"].sum())) in ((1, 3.0), (2, 6.0)), state
    assert (state["step"] == 2) != bool(told)


def read_run_folder(path: str) -> None:
    folder = Path(path).parent
    record = read_run(folder / "weights.safetensors")
    json.dumps(record.last)
    assert record.seconds is None or record.seconds >= 0
    shutil.copy(folder / "log.jsonl", folder / "cut.jsonl")
    cut_log(folder / "cut.jsonl", 2)
    for line in (folder / "cut.jsonl").read_text().splitlines():
        assert json.loads(line)["step"] <= 2


def read_status_log(path: str) -> None:
    latest = StatusLog(path).latest()
    assert all(isinstance(name, str) for name in latest)
    write_summary(Path(path).with_name("summary.csv"), latest, ["a", "b"])


def read_pretrain_config(path: str) -> None:
    config_values(load_config(PretrainConfig, path))


def read_slide_pretrain_config(path: str) -> None:
    config_values(load_config(SlidePretrainConfig, path))


def read_mil_config(path: str) -> None:
    config_values(load_config(MilConfig, path))


READERS = {
    name: value
    for name, value in list(globals().items())
    if callable(value) and getattr(value, "__module__", "") == "__main__" and not name.startswith("_")
}


def _read(reader: str, path: str) -> dict:
    try:
        READERS[reader](path)
    except BaseException as error:
        types = [kind.__name__ for kind in type(error).__mro__]
        return {"how": "error", "types": types, "message": str(error)[:4000], "trace": traceback.format_exc()[-3000:]}
    return {"how": "result"}


def _child(answer: int, order: dict) -> None:
    with open("/proc/self/statm") as file:
        held = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + _BYTES, held + _BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.alarm(2 * _SECONDS)
    os.write(answer, json.dumps(_read(**order)).encode("utf-8", "surrogatepass"))


def _answer(order: dict) -> dict:
    mine, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.dup2(2, 1)  # what libraries print must not look like an answer
            _child(theirs, order)
        finally:
            os._exit(0)
    os.close(theirs)
    data, hung = b"", False
    while not hung:
        hung = not select.select([mine], [], [], _SECONDS)[0]
        part = b"" if hung else os.read(mine, 1 << 16)
        if not part:
            break
        data += part
    os.close(mine)
    if hung:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if hung:
        return {"how": "hang"}
    return json.loads(data) if data else {"how": "crash", "status": os.waitstatus_to_exitcode(status)}


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for line in sys.stdin:
        print(json.dumps(_answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
