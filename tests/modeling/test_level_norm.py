"""Norms of levels in one piece, beside detectron2's."""

import copy

import pytest
import torch
from detectron2.layers import CycleBatchNormList
from torch import nn

from sasa_det.modeling.level_norm import LevelBatchNorm, join_level_norms


def make(**options):
    torch.manual_seed(0)
    norms = CycleBatchNormList(2, num_features=6, **options).double()
    for parameter in norms.parameters():
        nn.init.normal_(parameter)
    for buffer in (norm.running_var for norm in norms):
        buffer.uniform_(0.5, 2)
    return norms


def saved_bytes(function):
    """Return the bytes that a backward pass keeps, and the function's result."""
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = function()
    return sum(kept.values()), result


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"affine": False}, {"momentum": None}, {"bn_class": nn.SyncBatchNorm}], ids=str
)
def test_results_gradients_and_statistics_are_those_of_detectron2(options, training):
    theirs = make(**options).train(training)
    ours = join_level_norms(copy.deepcopy(theirs))
    assert type(ours) is LevelBatchNorm
    inputs = [torch.randn(2, 6, 4 - level, 5).double().requires_grad_() for level in range(2)]
    results = []
    for norms in (theirs, ours):
        outputs = [norms(x) for x in [*inputs, *inputs]]
        loss = sum((output * output.detach().cos()).sum() for output in outputs)
        results.append([*outputs, *torch.autograd.grad(loss, [*inputs, *norms.parameters()])])
        # What is lent to a norm does not stay there.
        assert all(norm.weight is None for norm in norms)
    torch.testing.assert_close(*results)
    torch.testing.assert_close(theirs.state_dict(), ours.state_dict())


def test_one_map_is_kept_for_the_backward_pass():
    x = torch.randn(2, 6, 40, 50).double().requires_grad_()
    theirs, _ = saved_bytes(lambda: make()(x))
    ours, _ = saved_bytes(lambda: join_level_norms(make())(x))
    size = x.untyped_storage().nbytes()
    assert 2 * size <= theirs and ours <= 1.1 * size


def test_maps_keep_their_type_under_autocast():
    norms = make().float()
    with torch.autocast("cpu", torch.bfloat16):
        assert norms(torch.randn(2, 6, 3, 4).bfloat16()).dtype == torch.float32
        assert join_level_norms(norms)(torch.randn(2, 6, 3, 4).bfloat16()).dtype == torch.bfloat16


def test_a_norm_that_fails_gives_back_what_it_was_lent():
    norms = join_level_norms(make())
    with pytest.raises(ValueError, match="expected 4D input"):
        norms(torch.zeros(2, 6).double())
    assert norms[0].weight is None and norms[0].bias is None
