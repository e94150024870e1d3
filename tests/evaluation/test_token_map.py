"""Token maps: which map is taken, what its colours and similarities mean, and how it is drawn."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from ssmamba_models.evaluation.token_map import (
    draw_token_map,
    principal_colours,
    token_grid,
    token_similarity,
)

pytestmark = pytest.mark.usefixtures("one_thread")


class TestTokenGrid:
    @pytest.mark.parametrize("name", ["test_ssmamba", "test_resnet"])
    def test_the_deepest_map_of_at_most_16_px_per_token(self, name):
        model = timm.create_model(name, num_classes=0).eval()
        images = torch.randn(2, 3, 96, 64)
        grid = token_grid(model, images)
        assert grid.shape[:3] == (2, 6, 4)
        maps = model.forward_intermediates(images, intermediates_only=True)
        assert any(torch.equal(grid, each.detach().permute(0, 2, 3, 1)) for each in maps)

    def test_a_coarser_stride(self):
        model = timm.create_model("test_ssmamba", num_classes=0).eval()
        assert token_grid(model, torch.randn(1, 3, 64, 64), stride=32).shape[1:3] == (2, 2)

    def test_a_transformer(self):
        model = timm.create_model("test_vit", num_classes=0).eval()
        assert token_grid(model, torch.randn(1, 3, 160, 160)).shape == (1, 10, 10, 64)

    def test_a_model_without_maps(self):
        with pytest.raises(ValueError, match="Linear has no forward_intermediates"):
            token_grid(torch.nn.Linear(3, 3), torch.randn(1, 3, 8, 8))


class TestPrincipalColours:
    def test_two_kinds_of_token_get_two_colours(self):
        tokens = torch.zeros(4, 6, 8)
        tokens[:, 3:, 2] = 1
        colours = principal_colours(tokens)
        assert colours.shape == (4, 6, 3)
        assert colours.dtype == np.uint8
        left, right = colours[:, :3].reshape(-1, 3), colours[:, 3:].reshape(-1, 3)
        assert np.ptp(left, axis=0).max() == np.ptp(right, axis=0).max() == 0
        assert abs(int(left[0, 0]) - int(right[0, 0])) == 255

    def test_the_first_component_is_the_direction_of_most_spread(self):
        generator = torch.Generator().manual_seed(0)
        strength = torch.randn(10, 10, generator=generator)
        tokens = 0.01 * torch.randn(10, 10, 16, generator=generator)
        tokens[..., 5] += strength
        red = principal_colours(tokens)[..., 0].astype(float)
        assert abs(np.corrcoef(red.ravel(), strength.ravel())[0, 1]) > 0.98

    def test_neither_order_of_channels_nor_sign_changes_the_picture(self):
        tokens = torch.randn(6, 6, 12, generator=torch.Generator().manual_seed(1))
        first, second = principal_colours(tokens), principal_colours(tokens.flip(-1))
        assert np.abs(first.astype(int) - second.astype(int)).max() <= 1

    @pytest.mark.parametrize("shape", [(4, 4, 8), (1, 1, 8), (4, 4, 2)])
    def test_tokens_that_do_not_differ_are_grey(self, shape):
        assert (principal_colours(torch.ones(shape)) == 128).all()


class TestSimilarity:
    def test_one_at_the_token_itself_and_between_minus_one_and_one(self):
        similarity = token_similarity(torch.randn(5, 7, 16), 3, 6)
        assert similarity.shape == (5, 7)
        assert similarity[3, 6] == pytest.approx(1)
        assert similarity.min() >= -1
        assert similarity.max() <= 1

    def test_what_all_tokens_share_is_left_out(self):
        tokens = torch.randn(5, 5, 16)
        shifted = token_similarity(tokens + 100, 0, 0)
        assert np.allclose(shifted, token_similarity(tokens, 0, 0), atol=1e-3)

    def test_kinds_of_token_are_told_apart(self):
        tokens = torch.zeros(4, 4, 8)
        tokens[:2, :, 0], tokens[2:, :, 1] = 1, 1
        similarity = token_similarity(tokens, 0, 0)
        assert np.allclose(similarity[:2], 1)
        assert np.allclose(similarity[2:], -1)


class TestDrawing:
    def image(self, width=128, height=128):
        return Image.new("RGB", (width, height), (230, 170, 200))

    @pytest.mark.parametrize("size", [(128, 128), (96, 160), (700, 600)])
    def test_three_panels_and_a_caption(self, size):
        drawn = draw_token_map(self.image(*size), torch.randn(8, 8, 16))
        zoom = max(1, round(512 / max(size)))
        assert drawn.mode == "RGB"
        assert drawn.width > 3 * size[0] * zoom
        caption = np.asarray(drawn)[-30:]
        assert (caption < 100).any()

    def test_the_point_chooses_the_token(self):
        tokens = torch.zeros(2, 2, 4)
        tokens[0, 0, 0], tokens[1, 1, 1] = 1, 1
        first, second = (np.asarray(draw_token_map(self.image(), tokens, point)) for point in ((5, 5), (120, 120)))
        width = first.shape[1] // 3
        assert np.array_equal(first[:, width : 2 * width], second[:, width : 2 * width])
        assert not np.array_equal(first[:, 2 * width :], second[:, 2 * width :])

    @pytest.mark.parametrize("point", [(128, 0), (0, 128), (-1, 0)])
    def test_a_point_outside_the_image(self, point):
        with pytest.raises(ValueError, match="outside the image of 128 x 128 px"):
            draw_token_map(self.image(), torch.randn(8, 8, 16), point)
