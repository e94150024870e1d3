"""Proximity that is propagated: tiles of any slide that are like a tile, or like its neighbour."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ssmamba_models.choices import KMEANS
from ssmamba_models.layers.gather_rows import is_distributed
from ssmamba_models.ssl.nearest_rows import nearest_rows


class SpatialPropagationMiner(nn.Module):
    """Finds positives beyond the neighbourhood: near in a bank, and of the query's cluster in several clusterings.

    For a query, the `nearest` entries of the bank are taken, and of these the ones that share its tile's cluster in all
    of `n_clusterings` k-means clusterings of the bank. One clustering errs at its borders; different ones err in
    different places, so their agreement is trusted.

    The clusterings are computed on one process (CPU, or with faiss a GPU) and sent to the others, which therefore hold
    the same. Memory: 4 * n_clusterings * N bytes held; of the search see `nearest_rows`.

    Args:
        size: N, rows of the bank.
        nearest: entries that are looked at; clipped to N.
        clusters: of each clustering; of a small bank N // 10, so that a cluster has ten entries on average.
        n_clusterings: how many must agree.
        slides: (N,) int64, the slide of each tile, to leave out entries of the query's own slide; None keeps them.
        kmeans: "sklearn" (MiniBatchKMeans), or "faiss", which uses a GPU where it was built for one.
        seed: of the clusterings.

    Raises:
        ValueError: an argument out of its range.
        ImportError: the package for k-means is missing.

    Source: SGCL (Lin et al., Medical Image Analysis 89, 102845, 2023), inter-invariance; agreement of clusterings:
    Zhuang et al., arXiv:1903.12355, sec. 3.1.
    """

    def __init__(
        self,
        size: int,
        nearest: int = 4096,
        clusters: int = 1000,
        n_clusterings: int = 3,
        slides: Tensor | None = None,
        kmeans: str = "sklearn",
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (("nearest", nearest), ("clusters", clusters), ("n_clusterings", n_clusterings)):
            if value < 1:
                raise ValueError(f"{name} is {value}, expected 1 or more")
        if kmeans not in KMEANS:
            raise ValueError(f"kmeans is {kmeans!r}, expected one of {', '.join(KMEANS)}")
        self.nearest, self.clusters = min(nearest, size), min(clusters, max(1, size // 10))
        self.seed, self._cluster = seed, _clusterer(kmeans)
        self.register_buffer("labels", torch.zeros(n_clusterings, size, dtype=torch.int32))
        # In checkpoints: a training that goes on in mid-epoch keeps the clusters of that epoch.
        self.register_buffer("fitted_epoch", torch.tensor(-1))
        self.register_buffer("slides", slides, persistent=False)

    @torch.no_grad()
    def fit(self, bank: Tensor, epoch: int) -> None:
        """Cluster the bank anew, on the first process; all processes must call this.

        Args:
            bank: (N, D), unit vectors.
            epoch: decides the draws, with the seed.
        """
        first = not is_distributed() or dist.get_rank() == 0
        if first:
            vectors = bank.float().cpu().numpy()
            for number, labels in enumerate(self.labels):
                draw = int(np.random.default_rng([self.seed, epoch, number]).integers(2**31))
                labels.copy_(torch.from_numpy(self._cluster(vectors, self.clusters, draw).astype(np.int32)))
        if is_distributed():
            dist.broadcast(self.labels, 0)
        self.fitted_epoch.fill_(epoch)

    @torch.no_grad()
    def mine(self, queries: Tensor, tiles: Tensor, bank: Tensor) -> tuple[Tensor, Tensor]:
        """Find the propagated positives of queries.

        Args:
            queries: (B, D), unit vectors.
            tiles: (B,) int64, whose they are: their clusters, and their slides, are the queries'.
            bank: (N, D), what was clustered.

        Returns:
            (B, nearest) int64, entries, and (B, nearest) bool, which of them are positives; a query's own tile is none.
        """
        found = nearest_rows(queries, bank, self.nearest)
        valid = (self.labels[:, found] == self.labels[:, tiles][..., None]).all(0) & (found != tiles[:, None])
        if self.slides is not None:
            valid &= self.slides[found] != self.slides[tiles][:, None]
        return found, valid


def _clusterer(name: str) -> Callable[[np.ndarray, int, int], np.ndarray]:
    """(vectors (N, D) float32, clusters, seed) -> (N,) clusters; a missing package is found here, before a training."""
    if name == "faiss":
        try:
            import faiss  # noqa: F401
        except ImportError as error:
            raise ImportError("kmeans='faiss' needs faiss; pip install faiss-cpu, or take kmeans='sklearn'") from error
        return _faiss_kmeans
    try:
        import sklearn.cluster  # noqa: F401
    except ImportError as error:
        raise ImportError('k-means needs scikit-learn; pip install "ssmamba-models[train]"') from error
    return _sklearn_kmeans


def _sklearn_kmeans(vectors: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.exceptions import ConvergenceWarning

    kmeans = MiniBatchKMeans(clusters, batch_size=4096, n_init=1, random_state=seed)
    with warnings.catch_warnings():
        # Fewer distinct vectors than clusters: a collapsed bank, of which feature_rank tells.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return kmeans.fit_predict(vectors)


def _faiss_kmeans(vectors: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    import faiss

    kmeans = faiss.Kmeans(
        vectors.shape[1], clusters, niter=20, seed=seed, gpu=faiss.get_num_gpus() > 0, min_points_per_centroid=1
    )
    kmeans.train(vectors)
    return kmeans.index.search(vectors, 1)[1][:, 0]
