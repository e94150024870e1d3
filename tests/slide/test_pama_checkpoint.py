"""Published checkpoints of PAMA, made here with their names and shapes, and what their code computes of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ssmamba_models.slide.pama_checkpoint import load_pama_checkpoint
from ssmamba_models.slide.slide_weights import load_slide_encoder, save_slide_encoder

pytestmark = pytest.mark.usefixtures("one_thread")


def block(name: str, dim: int, heads: int, tables: int) -> dict[str, tuple[int, ...]]:
    norms = {f"{name}.{norm}.{part}": (dim,) for norm in ("norm1", "norm2") for part in ("weight", "bias")}
    return {
        **norms,
        f"{name}.attn.polar_emb.weight": (8, tables),
        f"{name}.attn.dis_embed.weight": (66, heads),
        f"{name}.attn.qkv.weight": (3 * dim, dim),
        f"{name}.attn.qkv.bias": (3 * dim,),
        f"{name}.attn.proj.weight": (dim, dim),
        f"{name}.attn.proj.bias": (dim,),
        f"{name}.mlp.fc1.weight": (4 * dim, dim),
        f"{name}.mlp.fc1.bias": (4 * dim,),
        f"{name}.mlp.fc2.weight": (dim, 4 * dim),
        f"{name}.mlp.fc2.bias": (dim,),
    }


def published(dim: int = 16, depth: int = 3, heads: int = 4, width: int = 6, tables: int = 1) -> dict:
    """A state dict with the names and shapes of the authors' pre-training."""
    shapes = {
        "cls_token": (1, 1, dim),
        "kernel_token": (1, 1, dim),
        "patch_embed.weight": (dim, width),
        "patch_embed.bias": (dim,),
        "norm.weight": (dim,),
        "norm.bias": (dim,),
        "mask_token": (1, 1, 8),
        "decoder_embed.weight": (8, dim),
        "decoder_embed.bias": (8,),
        "decoder_norm.weight": (8,),
        "decoder_norm.bias": (8,),
        "decoder_pred.weight": (width, 8),
        "decoder_pred.bias": (width,),
        **block("decoder_blocks.0", 8, 2, tables),
    }
    for i in range(depth):
        shapes |= block(f"blocks.{i}", dim, heads, tables)
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}


def save(tmp_path, found, name: str = "multi_organ_pretrain.pth.tar"):
    torch.save(found, tmp_path / name)
    return tmp_path / name


def slide(tiles: int = 30) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    place = torch.randperm(100, generator=generator)[:tiles]
    return torch.randn(tiles, 6, generator=generator), torch.stack([place % 10, place // 10], dim=-1).float()


def vector_of(state: dict, features: torch.Tensor, distance: torch.Tensor, polar: torch.Tensor) -> torch.Tensor:
    """What the published formulas make of one slide, head by head: distance and polar (K, N), all with a sector."""
    heads = state["blocks.0.attn.dis_embed.weight"].shape[1]
    depth = sum(name.endswith("attn.qkv.weight") and name.startswith("blocks") for name in state)
    distance, polar = (
        torch.cat([bins.float().mean(1, keepdim=True).long(), bins.long()], dim=1) for bins in (distance, polar)
    )
    x = torch.cat([state["cls_token"][0], F.linear(features, state["patch_embed.weight"], state["patch_embed.bias"])])
    a = state["kernel_token"][0].expand(len(distance), -1)
    for i in range(depth):
        part = {n.removeprefix(f"blocks.{i}."): w for n, w in state.items() if n.startswith(f"blocks.{i}.")}

        def affine(y, name, part=part):
            return F.linear(y, part[f"{name}.weight"], part[f"{name}.bias"])

        def norm(y, name, part=part):
            return F.layer_norm(y, y.shape[-1:], part[f"{name}.weight"], part[f"{name}.bias"])

        x, a = norm(x, "norm1"), norm(a, "norm1")  # and the residual begins here
        (xq, xk, xv), (aq, ak, av) = (affine(y, "attn.qkv").chunk(3, dim=-1) for y in (x, a))
        new_x, new_a = [], []
        for q, k, v, q2, k2, v2, table in zip(
            *(y.chunk(heads, dim=-1) for y in (xq, xk, xv, aq, ak, av)), part["attn.dis_embed.weight"].T
        ):
            scores = q2 @ k.T / k.shape[1] ** 0.5
            votes = torch.stack([(scores.abs() * (polar == r)).sum(1) for r in range(8)], dim=1)
            turned = (polar - votes.argmax(1, keepdim=True)) % 8
            bias = table[distance] + part["attn.polar_emb.weight"][turned, 0]
            new_a.append((scores + bias).softmax(1) @ v)
            new_x.append((q @ k2.T / k.shape[1] ** 0.5 + bias.T).softmax(1) @ v2)
        x, a = (y + affine(torch.cat(new, dim=1), "attn.proj") for y, new in ((x, new_x), (a, new_a)))
        x, a = (y + affine(F.gelu(affine(norm(y, "norm2"), "mlp.fc1")), "mlp.fc2") for y in (x, a))
    return F.layer_norm(x[0], x.shape[-1:], state["norm.weight"], state["norm.bias"])


@pytest.mark.parametrize("wrapped", ["state_dict", "model", None])
@pytest.mark.parametrize("prefix", ["module.", ""])
def test_it_computes_what_the_published_code_does(tmp_path, wrapped, prefix):
    state = published()
    stored = {f"{prefix}{name}": value for name, value in state.items()}
    optimizer = {"state": {0: {"step": 3}}, "param_groups": [{"lr": 1e-3}]}
    found = {"epoch": 100, wrapped: stored, "optimizer": optimizer} if wrapped else stored
    encoder = load_pama_checkpoint(save(tmp_path, found), tiles_per_anchor=7)
    assert (encoder.feature_dim, encoder.embed_dim, len(encoder.blocks)) == (6, 16, 3)
    assert encoder.compat
    assert encoder.tiles_per_anchor == 7
    assert not encoder.training
    features, grid = slide()
    geometry = encoder.slide_geometry(grid)
    assert len(geometry.anchors) == 5
    polar = geometry.polar.masked_fill(geometry.polar == 8, 0)
    want = vector_of(state, features, geometry.distance, polar)
    torch.testing.assert_close(encoder(features[None], grid[None])[0], want, atol=1e-5, rtol=1e-4)


def test_tables_of_sectors_by_head(tmp_path):
    encoder = load_pama_checkpoint(save(tmp_path, {"state_dict": published(tables=4)}))
    assert not encoder.shared_polar
    assert encoder.blocks[0].attn.polar_embed.weight.shape == (8, 4)


def test_a_fine_tuned_one_has_a_classifier(tmp_path):
    state = {name: value for name, value in published().items() if not name.startswith(("decoder", "mask"))}
    state |= {"head.weight": torch.zeros(3, 16), "head.bias": torch.zeros(3)}
    assert load_pama_checkpoint(save(tmp_path, {"state_dict": state})).feature_dim == 6


def test_it_is_saved_like_any_other(tmp_path):
    encoder = load_pama_checkpoint(save(tmp_path, published()), max_tiles=20)
    save_slide_encoder(encoder, tmp_path / "pama")
    again, (features, grid) = load_slide_encoder(tmp_path / "pama"), slide()
    assert again.max_tiles == 20
    torch.testing.assert_close(again.embed(features, grid), encoder.embed(features, grid))


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_pama_checkpoint(tmp_path / "x.pth")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(ValueError, match="cannot be read"):
        load_pama_checkpoint(tmp_path / "text.pth")
    (tmp_path / "empty.pth").touch()
    with pytest.raises(ValueError, match="cannot be read"):
        load_pama_checkpoint(tmp_path / "empty.pth")
    with pytest.raises(ValueError, match="cannot be read"):  # runs no code
        load_pama_checkpoint(save(tmp_path, {"state_dict": print}))
    with pytest.raises(ValueError, match="holds no state dict"):
        load_pama_checkpoint(save(tmp_path, [torch.zeros(2)]))
    with pytest.raises(ValueError, match=r"none of PAMA: patch_embed\.weight is missing"):
        load_pama_checkpoint(save(tmp_path, {"fc.weight": torch.zeros(2, 2)}))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("norm.weight", None, r"norm\.weight is missing"),
        ("fc_norm.weight", torch.zeros(16), r"fc_norm\.weight is unknown"),
        ("kernel_token", torch.zeros(1, 1, 9), r"kernel_token has shape \(1, 1, 9\), expected \(1, 1, 16\)"),
        ("blocks.1.attn.dis_embed.weight", torch.zeros(65, 4), r"expected \(66, 4\)"),
        ("blocks.0.attn.polar_emb.weight", torch.zeros(8, 3), "3 tables of sectors, expected 1 or 4"),
        ("patch_embed.weight", torch.zeros(16), r"patch_embed\.weight has shape \(16,\), expected a matrix"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, name, value, message):
    state = published()
    state[name] = value
    if value is None:
        del state[name]
    with pytest.raises(ValueError, match=message):
        load_pama_checkpoint(save(tmp_path, state))


def test_what_the_shapes_tell_is_not_given(tmp_path):
    with pytest.raises(ValueError, match=r"depth is read from .*, where it is 3"):
        load_pama_checkpoint(save(tmp_path, published()), depth=4)
