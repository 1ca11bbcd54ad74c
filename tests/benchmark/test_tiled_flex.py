"""FlexAttention in tiles computes what attention of this project computes."""

import pytest
import torch

from sasa_det.benchmark.tiled_flex import TiledFlexAttention2d, tile_mask
from sasa_det.ops import local_attention


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("height,width,kernel_size", [(17, 26, 7), (5, 5, 7), (8, 16, 3)])
def test_it_equals_local_attention(height, width, kernel_size):
    torch.manual_seed(0)
    geometry = {"num_heads": 2, "kernel_size": kernel_size}
    module = TiledFlexAttention2d(32, height, width, **geometry, compiled=False).requires_grad_(
        False
    )
    x = torch.randn(2, 32, height, width)
    query, key, value = module.joined(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).chunk(3, 1)
    embeddings = (module.rel_rows, module.rel_cols)
    expected = local_attention(query, key, value, *embeddings, **geometry, backend="loop")
    torch.testing.assert_close(module(x), expected)
    # Nine tiles at most are looked at, however many there are.
    mask = tile_mask(height, width, kernel_size, x.device)
    assert int(mask.kv_num_blocks.max()) <= 9
