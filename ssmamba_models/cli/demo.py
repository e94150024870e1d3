"""`ssmamba demo`: a model, an image, and a picture of what the model makes of it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ssmamba_models.cli.options import threads_option
from ssmamba_models.output import check_output, whole_file
from ssmamba_models.threads import threaded

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from ssmamba_models.engine.encoder import Encoder

_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp")
_FORMATS = ", ".join(_SUFFIXES)


@click.command()
@click.argument("image", type=click.Path(), required=False)
@click.option(
    "--out", default="ssmamba_demo.png", show_default=True, type=click.Path(), help=f"Picture to write ({_FORMATS})."
)
@click.option("--model", default="ssmamba_small", show_default=True, help="Ours, or any timm name.")
@click.option(
    "--pretrained/--random",
    default=None,
    help="The model's trained weights, or random ones. Default: trained ones where the package holds them.",
)
@click.option("--checkpoint", type=click.Path(), help="Use the weights of this .safetensors or .pth file.")
@click.option(
    "--img-size",
    type=click.IntRange(min=16),
    default=512,
    show_default=True,
    help="Side of the input in pixels.",
)
@click.option("--point", type=int, nargs=2, help="X Y of the marked token in the input. Default: the centre.")
@threads_option
@click.option("--device", help="cpu, cuda, cuda:1, ... Default: a GPU where there is one.")
@threaded
def command(
    image: str | None,
    out: str,
    model: str,
    pretrained: bool | None,
    checkpoint: str | None,
    img_size: int,
    point: tuple[int, int] | None,
    threads: int | None,
    device: str | None,
) -> None:
    """Create a model, embed an image and draw what it sees.

    Without IMAGE a synthetic H&E image is drawn. The picture shows the image, its token map and what is like the marked
    token; an existing one is replaced.

    \b
    Examples:
      ssmamba demo
      ssmamba demo tile.png --model ssmamba_tiny --out tile_map.png

    Exit code: 0 drawn, 2 bad input.
    """
    from ssmamba_models.data.synthetic import synthetic_he
    from ssmamba_models.engine.encoder import load_encoder
    from ssmamba_models.evaluation.token_map import draw_token_map, token_grid

    _check_picture(out, image)
    source = _read(image) if image else synthetic_he(img_size, seed=18)
    if pretrained is None:
        pretrained = checkpoint is None and _packaged(model)
    encoder = load_encoder(model, pretrained=pretrained, checkpoint=checkpoint, device=device, img_size=img_size)
    images = encoder.transform(source)[None]
    features, seconds = _timed_embed(encoder, images)
    tokens = token_grid(encoder.runner, images.to(encoder.device))[0]
    picture = draw_token_map(_as_seen(encoder, images[0]), tokens, point)
    with whole_file(out, overwrite=True) as part:
        picture.save(part)
    name = image or "a synthetic H&E image"
    click.echo(f"{model} on {name} ({images.shape[3]} x {images.shape[2]} px, {encoder.device})")
    click.echo(f"features {tuple(features.shape)} in {seconds * 1000:.0f} ms; tokens {tuple(tokens.shape)}")
    click.echo(f"picture  {Path(out).resolve()}")


def _packaged(model: str) -> bool:
    """Whether the package itself holds weights of this name: no network is needed."""
    from timm.models import get_pretrained_cfg, is_model

    name = model.split(".")[0]
    try:
        config = get_pretrained_cfg(model) if is_model(name) else None
    except RuntimeError:  # no such tag, as the encoder's loading says better
        return False
    return config is not None and bool(config.file)


def _check_picture(out: str, image: str | None) -> None:
    if Path(out).suffix.lower() not in _SUFFIXES:
        raise ValueError(f"the picture {out!r} needs a suffix that names its format: {_FORMATS}")
    if check_output(out, overwrite=True).exists() and image and Path(image).exists() and Path(out).samefile(image):
        raise ValueError(f"the picture {out!r} would replace the image itself; give another --out")


def _read(path: str) -> Image.Image:
    from ssmamba_models.data.tiles import read_tile

    if not Path(path).is_file():
        raise FileNotFoundError(f"the image {path!r} does not exist (or is a folder)")
    try:
        return read_tile(path)
    except ValueError as error:
        raise ValueError(f"the image {path!r} cannot be read: {error}") from error


def _timed_embed(encoder: Encoder, images: torch.Tensor) -> tuple[torch.Tensor, float]:
    encoder.embed(images)  # the first run pays for set-up that no later one does
    start = time.perf_counter()
    features = encoder.embed(images)
    return features, time.perf_counter() - start


def _as_seen(encoder: Encoder, image: torch.Tensor) -> Image.Image:
    import torch
    from PIL import Image

    # Undo the normalisation: the picture shows what the model saw after resizing and cropping.
    mean, std = (torch.tensor(encoder.data_config[key]).view(3, 1, 1) for key in ("mean", "std"))
    pixels = ((image * std + mean).clamp(0, 1) * 255).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())
