"""The pieces of SGCL: bank, nearest rows, propagation, hard negatives, the loss with several positives."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ssmamba_models.ssl import nearest_rows as nearest_module
from ssmamba_models.ssl import propagation
from ssmamba_models.ssl.feature_bank import FeatureBank
from ssmamba_models.ssl.hard_negatives import BetaHardNegativeSampler
from ssmamba_models.ssl.multi_positive import MultiPositiveInfoNCE
from ssmamba_models.ssl.nearest_rows import nearest_rows, row_similarity, unite
from ssmamba_models.ssl.propagation import SpatialPropagationMiner


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


class TestBank:
    def test_it_begins_with_unit_vectors_of_the_seed(self):
        bank = FeatureBank(50, 8, seed=3)
        torch.testing.assert_close(bank.rows.norm(dim=1), torch.ones(50))
        assert torch.equal(bank.rows, FeatureBank(50, 8, seed=3).rows)
        assert not torch.equal(bank.rows, FeatureBank(50, 8, seed=4).rows)

    def test_rows_follow(self):
        bank, new = FeatureBank(6, 4, momentum=0.25), unit(2, 4, seed=5)
        bank.seen[:] = True
        before = bank.rows.clone()
        bank.update(torch.tensor([4, 1]), 3 * new)
        expected = F.normalize(0.25 * before[[4, 1]] + 0.75 * new, dim=1)
        torch.testing.assert_close(bank.rows[[4, 1]], expected)
        assert torch.equal(bank.rows[[0, 2, 3, 5]], before[[0, 2, 3, 5]])

    def test_noise_is_replaced_by_the_first_vector(self):
        bank, new = FeatureBank(6, 4), unit(1, 4, seed=5)
        bank.update(torch.tensor([4]), 3 * new)
        torch.testing.assert_close(bank.rows[[4]], new)
        assert bank.seen.tolist() == [False] * 4 + [True, False]

    def test_of_a_row_that_is_named_twice_the_last_counts(self):
        new = unit(3, 4, seed=5)
        twice, once = FeatureBank(6, 4), FeatureBank(6, 4)
        twice.update(torch.tensor([2, 5, 2]), new)
        once.update(torch.tensor([5, 2]), new[1:])
        assert torch.equal(twice.rows, once.rows)

    def test_an_update_leaves_the_gradient_of_what_was_read(self):
        bank, query = FeatureBank(6, 4), torch.randn(2, 4, requires_grad=True)
        index = torch.tensor([0, 3])
        before = bank.rows[index].clone()
        loss = (query * bank(index)).sum()
        bank.update(index, query)
        loss.backward()
        assert torch.equal(query.grad, before)

    @pytest.mark.parametrize("arguments", [{"size": 0}, {"dim": 0}, {"momentum": 1.0}, {"momentum": math.nan}])
    def test_bad_arguments(self, arguments):
        with pytest.raises(ValueError, match="expected"):
            FeatureBank(**{"size": 3, "dim": 2, **arguments})


class TestNearest:
    @pytest.mark.parametrize("block", [1, 64, 2**25])
    def test_chunks_do_not_matter(self, block):
        queries, bank = unit(3, 8), unit(101, 8, seed=1)
        expected = (queries @ bank.T).topk(7, dim=1).indices
        assert torch.equal(nearest_rows(queries, bank, 7, block), expected)

    def test_all_of_them(self):
        assert nearest_rows(unit(2, 4), unit(5, 4), 5).sort(dim=1).values.tolist() == [[0, 1, 2, 3, 4]] * 2
        with pytest.raises(ValueError, match="the 6 nearest of 5"):
            nearest_rows(unit(2, 4), unit(5, 4), 6)

    def test_similarity_with_and_without_gradient(self, monkeypatch):
        queries, bank, index = unit(5, 4).requires_grad_(), unit(9, 4, seed=1), torch.randint(9, (5, 3))
        expected = torch.stack([bank[places] @ query for query, places in zip(queries, index)])
        kept = row_similarity(queries, bank, index)
        torch.testing.assert_close(kept, expected)
        kept.sum().backward()
        torch.testing.assert_close(queries.grad, bank[index].sum(1))
        monkeypatch.setattr(nearest_module, "LARGEST_BLOCK", 24)  # two queries at a time
        torch.testing.assert_close(row_similarity(queries.detach(), bank, index), expected)

    def test_sets(self):
        index = torch.tensor([[5, 3, 5, 9], [0, 0, 0, 0], [7, 1, 2, 2]])
        valid = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0], [0, 1, 1, 1]]).bool()
        members, counts = unite(index, valid)
        assert members.tolist() == [[3, 5], [0, 0], [1, 2]]
        assert counts.tolist() == [[True, True], [False, False], [True, True]]


@pytest.fixture
def blobs():
    """Sixty unit vectors in three tight bunches, twenty each."""
    centers = torch.eye(3, 8).repeat_interleave(20, dim=0)
    return F.normalize(centers + 0.05 * unit(60, 8), dim=1)


class TestPropagation:
    def test_positives_share_all_clusters(self, blobs):
        miner = SpatialPropagationMiner(60, nearest=30, clusters=3)
        miner.fit(blobs, epoch=0)
        found, valid = miner.mine(blobs[[0, 25]], torch.tensor([0, 25]), blobs)
        assert found.shape == valid.shape == (2, 30)
        for row, (near, good) in enumerate(zip(found, valid)):
            tile = (0, 25)[row]
            agree = {j for j in near.tolist() if torch.equal(miner.labels[:, j], miner.labels[:, tile])} - {tile}
            assert set(near[good].tolist()) == agree
            assert agree <= set(range(20 * (tile // 20), 20 * (tile // 20) + 20))
            assert agree

    def test_one_clustering_that_disagrees_is_enough(self, blobs):
        miner = SpatialPropagationMiner(60, nearest=60)
        miner.labels[:] = 1
        miner.labels[1, 1::2] = 2
        _, valid = miner.mine(blobs[:1], torch.tensor([0]), blobs)
        assert valid.sum() == 29  # the even ones but 0 itself

    def test_far_entries_of_the_cluster_are_none(self, blobs):
        miner = SpatialPropagationMiner(60, nearest=20)
        found, valid = miner.mine(blobs[:1], torch.tensor([0]), blobs)  # before a fit all are in one cluster
        assert set(found[valid].tolist()) == set(range(1, 20))

    def test_the_own_slide_can_be_left_out(self, blobs):
        slides = torch.arange(60) % 4
        miner = SpatialPropagationMiner(60, slides=slides)
        found, valid = miner.mine(blobs[:2], torch.tensor([0, 1]), blobs)
        assert valid.any(1).all()
        assert not (slides[found] == slides[:2][:, None])[valid].any()

    def test_a_fit_depends_on_seed_and_epoch_alone(self):
        vectors = unit(300, 8)
        drawn = {}
        for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0)):
            miner = SpatialPropagationMiner(300, seed=seed)
            miner.fit(vectors, epoch)
            assert int(miner.fitted_epoch) == epoch
            assert torch.equal(drawn.setdefault((seed, epoch), miner.labels), miner.labels)
        assert not torch.equal(drawn[0, 0], drawn[0, 1])
        assert not torch.equal(drawn[0, 0], drawn[1, 0])
        assert not torch.equal(drawn[0, 0][0], drawn[0, 0][1])

    @pytest.mark.parametrize(("size", "clusters", "nearest"), [(5, 1, 5), (60, 6, 60), (20_000, 1000, 4096)])
    def test_small_data_is_clipped_for(self, size, clusters, nearest):
        miner = SpatialPropagationMiner(size)
        assert (miner.clusters, miner.nearest) == (clusters, nearest)

    def test_a_collapsed_bank_is_clustered_without_a_word(self, recwarn):
        miner = SpatialPropagationMiner(100)
        miner.fit(torch.ones(100, 4) / 2, 0)
        assert not recwarn.list
        assert int(miner.labels.max()) < 10

    def test_faiss_is_named_where_it_is_missing(self, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "faiss", None)
        with pytest.raises(ImportError, match="faiss-cpu"):
            SpatialPropagationMiner(100, kmeans="faiss")

    def test_faiss_finds_bunches_too(self, blobs):
        pytest.importorskip("faiss", reason="k-means by faiss needs faiss")
        miner = SpatialPropagationMiner(60, clusters=3, kmeans="faiss")
        miner.fit(blobs, 0)
        assert all(len(set(labels[:20].tolist())) == 1 for labels in miner.labels)

    def test_scikit_learn_is_named_where_it_is_missing(self, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "sklearn.cluster", None)
        with pytest.raises(ImportError, match=r"ssmamba-models\[train\]"):
            SpatialPropagationMiner(100)

    @pytest.mark.parametrize("changes", [{"nearest": 0}, {"clusters": 0}, {"n_clusterings": 0}, {"kmeans": "magic"}])
    def test_bad_arguments(self, changes):
        with pytest.raises(ValueError, match=next(iter(changes))):
            SpatialPropagationMiner(100, **changes)

    def test_the_libraries_are_listed(self):
        assert propagation.KMEANS == ("sklearn", "faiss")


def excluding(*rows):
    width = max(map(len, rows))
    index = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    return index, torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])


class TestHardNegatives:
    def test_they_are_ranked_without_what_is_excluded(self):
        bank, queries = unit(400, 8), unit(2, 8, seed=1)
        index, valid = excluding([0, 5, 9], [7])
        sampler = BetaHardNegativeSampler(400, share=0.2, count=300)
        drawn, any_left = sampler.sample(queries, bank, index, valid, np.random.default_rng(0))
        assert drawn.shape == (2, 300)
        assert any_left.all()
        places = np.random.default_rng(0).beta(5, 15, 300)
        for row, excluded in enumerate(([0, 5, 9], [7])):
            similarity = (bank @ queries[row]).tolist()
            ranking = sorted(set(range(400)) - set(excluded), key=lambda tile: -similarity[tile])
            reach = int(0.2 * len(ranking))
            assert drawn[row].tolist() == [ranking[int(place * reach)] for place in places]

    def test_the_density_is_that_of_beta(self):
        bank = F.normalize(torch.stack([torch.ones(1000), torch.linspace(0, 3, 1000)], dim=1), dim=1)
        query = torch.tensor([[1.0, 0.0]])  # tile t has rank t
        sampler = BetaHardNegativeSampler(1000, count=1000)
        draws = [
            sampler.sample(query, bank, *excluding([999]), np.random.default_rng(seed))[0].double() / 199
            for seed in range(20)
        ]
        draws = torch.cat(draws)
        assert draws.max() < 1
        assert draws.mean().item() == pytest.approx(5 / 20, abs=0.01)
        assert draws.std().item() == pytest.approx(math.sqrt(5 * 15 / (20**2 * 21)), abs=0.01)

    def test_nothing_is_left(self):
        sampler = BetaHardNegativeSampler(3)
        _, any_left = sampler.sample(
            unit(2, 4), unit(3, 4), *excluding([0, 1, 2], [1]), np.random.default_rng(0)
        )
        assert any_left.tolist() == [[False], [True]]

    @pytest.mark.parametrize(("size", "count"), [(2, 1), (100, 20), (1_000_000, 4096)])
    def test_the_default_adapts(self, size, count):
        assert BetaHardNegativeSampler(size).count == count

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"count": 101}, "hard_negatives is 101, but there are 100 tiles"),
            ({"count": 0}, "hard_negatives is 0"),
            ({"share": 0}, "hard_share is 0"),
            ({"share": math.nan}, "hard_share is nan"),
            ({"beta": 0}, r"Beta\(5.0, 0\)"),
        ],
    )
    def test_bad_arguments(self, changes, message):
        with pytest.raises(ValueError, match=message):
            BetaHardNegativeSampler(100, **changes)


class TestMultiPositive:
    def test_one_positive_is_infonce(self):
        positive, negative = torch.randn(6, 1), torch.randn(6, 9)
        expected = F.cross_entropy(torch.cat([positive, negative], 1) / 0.2, torch.zeros(6).long(), reduction="none")
        torch.testing.assert_close(MultiPositiveInfoNCE(0.2)(positive, negative), expected)

    def test_the_formula(self):
        positive, negative = torch.tensor([[0.9, 0.1, 7.0]]), torch.tensor([[0.5, 9.0]])
        valid = (torch.tensor([[True, True, False]]), torch.tensor([[True, False]]))
        own, other = math.exp(0.9 / 0.5) + math.exp(0.1 / 0.5), math.exp(0.5 / 0.5)
        loss = MultiPositiveInfoNCE(0.5)(positive, negative, *valid)
        assert loss.tolist() == pytest.approx([-math.log(own / (own + other))])

    def test_doubtful_positives_get_their_share_of_the_gradient(self):
        positive = torch.tensor([[0.9, 0.1]], requires_grad=True)
        MultiPositiveInfoNCE(0.07)(positive, torch.tensor([[0.5]])).sum().backward()
        near, far = positive.grad[0].tolist()
        assert near < far < 0
        assert far / near == pytest.approx(math.exp((0.1 - 0.9) / 0.07), rel=1e-4)

    def test_without_a_positive_there_is_neither_loss_nor_gradient(self):
        positive = torch.randn(2, 3, requires_grad=True)
        valid = torch.tensor([[True] * 3, [False] * 3])
        loss = MultiPositiveInfoNCE(0.1)(positive, torch.randn(2, 4), valid)
        loss.sum().backward()
        assert loss[1] == 0
        assert positive.grad[0].all()
        assert not positive.grad[1].any()

    def test_temperature(self):
        with pytest.raises(ValueError, match="temperature is 0"):
            MultiPositiveInfoNCE(0)
