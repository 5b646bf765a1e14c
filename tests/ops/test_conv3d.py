"""3-D convolution by taps against PyTorch's own, in float64; that of patches in what is rounded."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mv2v_engine.ops.conv3d import PatchConv3d, conv3d_by_taps, speed_up_conv3d


@pytest.mark.parametrize("kernel", [(3, 3, 3), (3, 1, 1), (1, 1, 1), (2, 3, 2)])
@pytest.mark.parametrize("stride", [(1, 1, 1), (2, 1, 1), (2, 2, 3)])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_sum_of_taps_is_the_convolution(
    kernel: tuple[int, int, int], stride: tuple[int, int, int], batch: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 5, 6, 7, 9, generator=generator, dtype=torch.float64)
    weight = torch.randn(4, 5, *kernel, generator=generator, dtype=torch.float64)
    bias = torch.randn(4, generator=generator, dtype=torch.float64)
    for given in (bias, None):
        expected = F.conv3d(x, weight, given, stride)
        with torch.inference_mode():
            torch.testing.assert_close(conv3d_by_taps(x, weight, given, stride), expected)
    x.requires_grad_()
    weight.requires_grad_()
    ours = torch.autograd.grad(conv3d_by_taps(x, weight, bias, stride).square().sum(), [x, weight])
    theirs = torch.autograd.grad(F.conv3d(x, weight, bias, stride).square().sum(), [x, weight])
    torch.testing.assert_close(ours, theirs)


def test_padded_grouped_and_dilated_convolutions_stay_as_they_are() -> None:
    plain = nn.Conv3d(4, 4, 3)
    others = [
        nn.Conv3d(4, 4, 3, padding=1),
        nn.Conv3d(4, 4, 3, groups=2),
        nn.Conv3d(4, 4, 3, dilation=2),
    ]
    model = nn.ModuleList([plain, *others])
    x = torch.randn(1, 4, 7, 8, 9)
    before = [module(x) for module in model]
    speed_up_conv3d(model)
    assert "_conv_forward" in vars(plain)
    assert not any("_conv_forward" in vars(module) for module in others)
    for module, expected in zip(model, before, strict=True):
        torch.testing.assert_close(module(x), expected)


# a tokenizer's patches, a history's, and those of the target; some leave columns over
@pytest.mark.parametrize(
    "patch", [(1, 2, 2), (1, 4, 4), (1, 8, 8), (2, 4, 4), (4, 8, 8), (1, 2, 4)]
)
@pytest.mark.parametrize("channels", [4, 16, 20, 32])
@pytest.mark.parametrize("columns", [48, 50])
@pytest.mark.parametrize("is_autocast", [False, True])
def test_patches_are_embedded_in_bfloat16_as_in_float32(
    patch: tuple[int, int, int], channels: int, columns: int, is_autocast: bool
) -> None:
    torch.manual_seed(0)
    embedding, x = PatchConv3d(channels, 48, patch), torch.randn(2, channels, 5, 24, columns)
    # what bfloat16 has of them, so that products alone are rounded
    x = x.bfloat16().float()
    embedding.bfloat16().float()
    expected = F.conv3d(x, embedding.weight, embedding.bias, stride=patch)
    assert torch.equal(embedding(x), expected)
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        found = embedding(x) if is_autocast else embedding.bfloat16()(x.bfloat16())
    assert found.dtype == torch.bfloat16 and found.shape == expected.shape
    # products are summed in float32 and rounded once
    torch.testing.assert_close(found.float(), expected, rtol=2**-7, atol=1e-4)
