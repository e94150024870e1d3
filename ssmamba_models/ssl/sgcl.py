"""SGCL, Spatial Guided Contrastive Learning: learn an encoder from tiles that know where they lay in a slide."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ssmamba_models.layers.vector_spread import vector_spread
from ssmamba_models.ssl.feature_bank import FeatureBank
from ssmamba_models.ssl.hard_negatives import BetaHardNegativeSampler, check_count
from ssmamba_models.ssl.multi_positive import MultiPositiveInfoNCE
from ssmamba_models.ssl.nearest_rows import row_similarity, unite
from ssmamba_models.ssl.propagation import SpatialPropagationMiner
from ssmamba_models.ssl.spatial_neighbors import SpatialManifest, SpatialNeighborIndex

_CORNERS = 4
_NEGATIVES = 65536


class SGCL(nn.Module):
    """Instance discrimination against memory banks, with positives from the tiles' places in their slides.

    With q_i the projected feature of tile i, V a bank of those of all tiles, and w a weight that rises::

        L = L_self + w(epoch) L_spatial + L_crop,    w(e) = exp(-5 (1 - min(e, R) / R)^2), R = ramp_epochs

    L_self: InfoNCE of q_i and V[i] against `negatives` uniform entries of V.
    L_spatial: `MultiPositiveInfoNCE` of q_i and its positives against `BetaHardNegativeSampler`'s tiles. Positives are
        the neighbours in the slide (`intra`: `SpatialNeighborIndex`) and what is like the tile, or like that neighbour
        which is most like it (`inter`: `SpatialPropagationMiner`). A tile without neighbours has the self term alone.
    L_crop (`inner`): InfoNCE of the crop of each corner and that corner's bank entry, against a quarter of the same
        uniform tiles, with all their corners.

    Rows of the banks are noise until their tile was looked at. They do not count before, nor does the tile: the first
    epoch fills the banks, and teaches nothing.

    With all three switched off it is plain instance discrimination. With `intra` off the neighbours are no positives,
    and no hard negatives either.

    Before each training step call `start_step`, which every epoch clusters the bank anew. Draws are a function of
    (seed, step) alone, and all processes share their rows at each update of the banks: two processes, or a training
    that was stopped, give the numbers of one unbroken process with the same batches (batch norm apart, whose statistics
    are each process's own). With gradient accumulation the banks are updated after each part of a batch.

    For N = 1,000,000 tiles, embed_dim 384 and dim 128 the banks take 512 MB (V), 2,048 MB (corners, with `inner`) and
    1,536 MB (encoder features, with `intra` or `inter`), 4.1 GB in all, on the device and in each checkpoint; an
    average of the weights (ema_decay) doubles that. Clusters take 12 MB, the neighbour index 32 MB. A step of B tiles
    holds up to about 0.4 GB besides, and the crops' logits, 3 MB per tile. It multiplies B * N * (2 * 128 + 384) times,
    0.16 TFLOP for B = 128, and selects from as many rows; an epoch's clusterings take three passes of MiniBatchKMeans
    over 1M x 128 with 1,000 clusters. Measured on two CPU cores at N = 100,000, B = 128: 12 s for a clustering, 0.5 s
    for a step's nearest entries and hard negatives; at a million 90 s (worked out), and 3 s and 0.3 GB for the nearest
    entries (measured). `ssmamba benchmark sgcl` measures all of it on your machine.

    Args:
        encoder: any timm model that pools to a vector; it stays a plain timm model. Its classifier plays no part and is
            frozen here. Where it takes images of no other size than the global view's (a ViT without
            `dynamic_img_size=True`), the crops are enlarged to that size, which costs as much as four global views.
        manifest: `slides` (N names), `x` and `y` (N whole numbers, grid units) of the tiles.
        seed: of banks, negatives and clusterings.
        intra, inter, inner: the three invariances, as above.
        dim: length of q.
        momentum: of the banks.
        radius: grid units; see `SpatialNeighborIndex`.
        temperature: of L_self and L_crop.
        spatial_temperature: of L_spatial.
        negatives: uniform negatives; None takes 65,536, or all tiles where there are fewer.
        hard_negatives, hard_share: see `BetaHardNegativeSampler`.
        nearest, clusters, n_clusterings, kmeans: see `SpatialPropagationMiner`.
        exclude_own_slide: propagate to other slides alone.
        ramp_epochs: R, epochs until w is 1; 0: at once.

    forward: a batch of `SpatialGuidedMultiCrop`'s views with `index` (B,) int64, which tiles they show -> dict of
        scalars: loss, loss_self, loss_spatial and loss_crop (0 where left out), and, detached, spatial_weight (w),
        positives and propagated (how many a tile has, and how many of these are like it), feature_cosine and
        feature_rank (of the encoder's features; see `vector_spread`). In eval mode the banks stay as they are.

    Raises:
        ValueError: an encoder that is no timm model, an argument out of its range, more negatives than tiles, a batch
            that does not fit; also as `SpatialNeighborIndex`.
        ImportError: `inter` without the package for k-means.

    Source: Lin et al., "SGCL: Spatial guided contrastive learning on whole-slide pathological images", Medical Image
    Analysis 89, 102845, 2023. Not in it: the limits for small data, w as an option, and rows that do not count yet.
    """

    def __init__(
        self,
        encoder: nn.Module,
        manifest: SpatialManifest,
        seed: int = 0,
        intra: bool = True,
        inter: bool = True,
        inner: bool = True,
        dim: int = 128,
        momentum: float = 0.5,
        radius: float = 3.0,
        temperature: float = 0.2,
        spatial_temperature: float = 0.07,
        negatives: int | None = None,
        hard_negatives: int | None = None,
        hard_share: float = 0.2,
        nearest: int = 4096,
        clusters: int = 1000,
        n_clusterings: int = 3,
        kmeans: str = "sklearn",
        exclude_own_slide: bool = False,
        ramp_epochs: int = 10,
    ) -> None:
        super().__init__()
        embed_dim = _embed_dim(encoder)
        size = len(manifest.slides)
        if size < 2:
            raise ValueError(f"SGCL tells tiles apart, and there is {size}; expected 2 or more")
        if dim < 1 or ramp_epochs < 0:
            raise ValueError(f"dim is {dim} and ramp_epochs is {ramp_epochs}, expected at least 1 and 0")
        check_count("negatives", negatives, size)
        self.encoder = encoder
        self.projection = nn.Sequential(nn.Linear(embed_dim, embed_dim), nn.ReLU(), nn.Linear(embed_dim, dim))
        self.seed, self.intra, self.inter, self.inner, self.ramp_epochs = seed, intra, inter, inner, ramp_epochs
        self.size = size
        self.negatives = min(_NEGATIVES, size) if negatives is None else negatives
        self.self_loss = MultiPositiveInfoNCE(temperature)
        self.bank = FeatureBank(size, dim, momentum, self._seed_of(0))
        if inner:
            self.corners = FeatureBank(_CORNERS * size, dim, momentum, self._seed_of(1))
        # Made even where the switches leave it out: coordinates that are wrong are wrong for all of them.
        self.neighbors = SpatialNeighborIndex(manifest, radius)
        if intra or inter:
            self.spatial_loss = MultiPositiveInfoNCE(spatial_temperature)
            self.features = FeatureBank(size, embed_dim, momentum, self._seed_of(2))
            self.sampler = BetaHardNegativeSampler(size, hard_share, hard_negatives)
        if inter:
            slides = self.neighbors.slide if exclude_own_slide else None
            self.miner = SpatialPropagationMiner(
                size, nearest, clusters, n_clusterings, slides, kmeans, self._seed_of(3)
            )
        self.epoch = self.step = 0
        self._sizes_taken: dict[tuple[int, ...], bool] = {}
        # They are the same on all processes already, and too large to send before each step.
        own = [name for name, _ in self.named_buffers() if not name.startswith("encoder.")]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, own)

    def start_step(self, epoch: int, step: int) -> None:
        """Say where the training stands, before each step and on all processes; a new epoch clusters the bank.

        Args:
            epoch: epochs done.
            step: steps done, over all epochs.
        """
        self.epoch, self.step = epoch, step
        if self.inter and int(self.miner.fitted_epoch) != epoch:
            self.miner.fit(self.bank.rows, epoch)

    @torch.no_grad()
    def mine(self, index: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """What the spatial loss would set against tiles now, with their rows of the banks as queries.

        Args:
            index: (B,) int64, tiles.

        Returns:
            near (in the slide), propagated and hard (negatives): each (B, W) int64, tiles, and (B, W) bool, which of
            them count. Hard negatives are drawn with replacement.

        Raises:
            ValueError: `intra` and `inter` are both switched off: there is no spatial loss.
        """
        if not (self.intra or self.inter):
            raise ValueError("SGCL without intra and inter has no spatial loss, and so no positives to show")
        if self.inter and int(self.miner.fitted_epoch) < 0:
            self.start_step(self.epoch, self.step)
        generator = np.random.default_rng([self.seed, 5, self.step])
        sets = self._mine(self.bank(index), self.features(index), index, generator)
        return dict(zip(("near", "propagated", "hard"), sets))

    def ramp(self, epoch: int) -> float:
        """w, the weight of L_spatial in an epoch, counted from 0."""
        if self.ramp_epochs == 0:
            return 1.0
        return math.exp(-5 * (1 - min(epoch, self.ramp_epochs) / self.ramp_epochs) ** 2)

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self._check_batch(batch)
        if self.inter and int(self.miner.fitted_epoch) < 0:
            self.start_step(self.epoch, self.step)
        index = batch["index"]
        features = self._pool(batch["image"])
        queries = self._project(features)
        corners = self._project(self._pool(self._fit_crops(batch))) if self.inner else None
        # Products in bfloat16 would leave two digits of a cosine, which the temperature then magnifies.
        with torch.autocast(index.device.type, enabled=False):
            units = F.normalize(features.detach().float(), dim=1)
            losses = self._losses(queries, units, corners, index)
            if self.training:
                self._update(queries, units, corners, index)
            return {**losses, **vector_spread(features.detach())}

    def _losses(self, queries: Tensor, units: Tensor, corners: Tensor | None, index: Tensor) -> dict[str, Tensor]:
        generator = np.random.default_rng([self.seed, 4, self.step])
        drawn = generator.permutation(self.size)[: self.negatives]
        others = torch.from_numpy(drawn).to(index.device)
        nothing = queries.new_zeros(())
        weight = self.ramp(self.epoch)
        parts = {"loss_self": self._instance_loss(queries, index, others, index, self.bank)}
        loss, parts["loss_spatial"], parts["loss_crop"] = parts["loss_self"], nothing, nothing
        counts = {"positives": nothing, "propagated": nothing}
        if self.intra or self.inter:
            parts["loss_spatial"], counts = self._spatial_loss(queries, units, index, generator)
            loss = loss + weight * parts["loss_spatial"]
        if corners is not None:
            parts["loss_crop"] = self._crop_loss(corners, index, others)
            loss = loss + parts["loss_crop"]
        return {"loss": loss, **parts, "spatial_weight": nothing + weight, **counts}

    def _instance_loss(
        self, queries: Tensor, own: Tensor, others: Tensor, tiles: Tensor, bank: FeatureBank, per_tile: int = 1
    ) -> Tensor:
        """Mean InfoNCE of queries and rows `own` of a bank, against rows `others` of other tiles than their own."""
        valid = (others // per_tile != tiles[:, None]) & bank.seen[others]
        positive = (queries * bank(own)).sum(1, keepdim=True)
        return self.self_loss(positive, queries @ bank(others).T, bank.seen[own, None], valid).mean()

    def _crop_loss(self, corners: Tensor, index: Tensor, others: Tensor) -> Tensor:
        rows = _corner_rows(others[: max(1, len(others) // _CORNERS)])
        tiles = index.repeat_interleave(_CORNERS)
        return self._instance_loss(corners, _corner_rows(index), rows, tiles, self.corners, _CORNERS)

    def _spatial_loss(
        self, queries: Tensor, units: Tensor, index: Tensor, generator: np.random.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        (near, near_valid), (alike, alike_valid), (hard, any_hard) = self._mine(queries, units, index, generator)
        positives, valid = unite(
            torch.cat([near, alike], dim=1), torch.cat([near_valid & self.intra, alike_valid], dim=1)
        )
        # Not even by a little: an optimiser that scales gradients would make a training of it.
        seen = self.bank.seen
        losses = self.spatial_loss(
            row_similarity(queries, self.bank.rows, positives),
            row_similarity(queries.detach(), self.bank.rows, hard),
            valid & seen[positives] & seen[index, None],
            any_hard & seen[hard],
        )
        counts = {"positives": valid.sum(1).float().mean(), "propagated": alike_valid.sum(1).float().mean()}
        return losses.mean(), counts

    def _mine(
        self, queries: Tensor, units: Tensor, index: Tensor, generator: np.random.Generator
    ) -> tuple[tuple[Tensor, Tensor], ...]:
        """Neighbours, propagated positives and hard negatives of tiles, each (B, W), and which count."""
        near, near_valid = self.neighbors.query(index)
        alike, alike_valid = self._propagate(queries.detach(), index, near, near_valid)
        # What lies near is no negative, whether it is a positive or not.
        known, known_valid = unite(
            torch.cat([index[:, None], near, alike], dim=1),
            torch.cat([torch.ones_like(index[:, None], dtype=torch.bool), near_valid, alike_valid], dim=1),
        )
        hard, any_hard = self.sampler.sample(units, self.features.rows, known, known_valid, generator)
        return (near, near_valid), (alike, alike_valid), (hard, any_hard.expand_as(hard))

    def _propagate(self, queries: Tensor, index: Tensor, near: Tensor, near_valid: Tensor) -> tuple[Tensor, Tensor]:
        """The propagated positives of tiles and of their most similar neighbours: (B, W) tiles, and which count."""
        if not self.inter:
            return index[:, None], torch.zeros_like(index[:, None], dtype=torch.bool)
        rows = self.bank.rows
        similarity = row_similarity(queries, rows, near).masked_fill(~near_valid, -torch.inf)
        closest = near.gather(1, similarity.argmax(1, keepdim=True))[:, 0]
        found, valid = self.miner.mine(torch.cat([queries, rows[closest]]), torch.cat([index, closest]), rows)
        found, valid = torch.cat(found.chunk(2), dim=1), torch.cat(valid.chunk(2), dim=1)
        valid &= (found != index[:, None]) & near_valid.any(1, keepdim=True) & self.bank.seen[found]
        return unite(found, valid)

    def _update(self, queries: Tensor, units: Tensor, corners: Tensor | None, index: Tensor) -> None:
        self.bank.update(index, queries)
        if self.intra or self.inter:
            self.features.update(index, units)
        if corners is not None:
            self.corners.update(_corner_rows(index), corners)

    def _pool(self, images: Tensor) -> Tensor:
        features = self.encoder.forward_head(self.encoder.forward_features(images), pre_logits=True)
        if features.ndim != 2:
            raise ValueError(
                f"SGCL: the encoder pools to shape {tuple(features.shape)}, expected one vector per image; create it "
                "with its own global_pool"
            )
        return features

    def _project(self, features: Tensor) -> Tensor:
        return F.normalize(self.projection(features).float(), dim=1)

    def _fit_crops(self, batch: Mapping[str, Tensor]) -> Tensor:
        """(4 * B, 3, s, s), or as large as the global view for an encoder that takes no other size."""
        crops, size = batch["crops"].flatten(0, 1), tuple(batch["image"].shape[2:])
        if tuple(crops.shape[2:]) == size or self._takes(crops):
            return crops
        return F.interpolate(crops, size=size, mode="bilinear", align_corners=False)

    @torch.no_grad()
    def _takes(self, images: Tensor) -> bool:
        size = tuple(images.shape[2:])
        if size not in self._sizes_taken:
            modes = [(module, module.training) for module in self.encoder.modules()]
            self.encoder.eval()
            try:
                self._pool(torch.zeros_like(images[:1]))
                self._sizes_taken[size] = True
            except (AssertionError, RuntimeError, ValueError):
                self._sizes_taken[size] = False
            for module, mode in modes:
                module.training = mode
        return self._sizes_taken[size]

    def _seed_of(self, number: int) -> int:
        return int(np.random.default_rng([self.seed, number]).integers(2**62))

    def _check_batch(self, batch: Mapping[str, Tensor]) -> None:
        missing = [name for name in ("image", "index", *(["crops"] if self.inner else [])) if name not in batch]
        if missing:
            raise ValueError(f"SGCL: the batch has no {', '.join(missing)}, but {', '.join(batch) or 'nothing'}")
        images, index = batch["image"], batch["index"]
        if images.ndim != 4 or tuple(index.shape) != (len(images),):
            raise ValueError(
                f"SGCL: image has shape {tuple(images.shape)} and index {tuple(index.shape)}, expected (B, 3, H, W) "
                "and (B,)"
            )
        if self.inner and (batch["crops"].ndim != 5 or tuple(batch["crops"].shape[:2]) != (len(images), _CORNERS)):
            raise ValueError(
                f"SGCL: crops have shape {tuple(batch['crops'].shape)}, expected ({len(images)}, {_CORNERS}, 3, h, w)"
            )


def _corner_rows(tiles: Tensor) -> Tensor:
    """The rows of tiles' four corners in their bank, (4 * B,)."""
    return (_CORNERS * tiles[:, None] + torch.arange(_CORNERS, device=tiles.device)).reshape(-1)


def _embed_dim(encoder: nn.Module) -> int:
    if not all(hasattr(encoder, name) for name in ("forward_features", "forward_head", "num_features")):
        raise ValueError(f"SGCL needs a timm model as encoder, not {type(encoder).__name__}; see timm.create_model")
    # A parameter without a gradient stops distributed training.
    classifier = encoder.get_classifier()
    for part in classifier if isinstance(classifier, (tuple, list)) else [classifier]:
        if isinstance(part, nn.Module):
            part.requires_grad_(False)
    return getattr(encoder, "head_hidden_size", None) or encoder.num_features
