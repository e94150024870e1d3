"""A plan's operators against their definitions in ops/reference.py: a network put together of these, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from planned_cases import images, small

from ssmamba_models.inference.planned import PlannedSSMamba
from ssmamba_models.ops import dispatch, reference
from ssmamba_models.ops.cpu import plan

pytestmark = pytest.mark.skipif(not dispatch.is_served_by("c", "cpu"), reason="the C kernels were not built")


def convolved(x, conv, norm):
    """A 3x3 convolution of stride 2 and a layer norm, channels last."""
    x = F.conv2d(x.permute(0, 3, 1, 2), conv.weight, conv.bias, 2, 1).permute(0, 2, 3, 1)
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def scanned(u, scan):
    """One scale of DMS: pooled, projected, scanned, enlarged."""
    v = reference.pool(u, scan.scale)
    states = 4 * scan.d_state
    r, b, c = (v @ scan.x_proj.weight.T).split([scan.dt_rank, states, states], -1)
    b, c = (t.unflatten(-1, (4, scan.d_state)) for t in (b, c))
    delta, A = r @ scan.dt_proj.weight.T, -torch.exp(scan.A_log)
    y = reference.directional_scan(v, delta, A, b + scan.B_bias, c, scan.D, scan.dt_bias)
    return reference.upsample(y, *u.shape[1:3])


def block_of(x, block):
    dms, mlp = block.dms, block.mlp
    x = reference.depthwise3x3(x, block.lpr.conv.weight, block.lpr.conv.bias, residual=True)
    u = reference.norm_linear(x, block.norm1.weight, block.norm1.bias, dms.in_proj.weight, block.norm1.eps)
    u = reference.depthwise3x3(u, dms.conv.weight, dms.conv.bias, silu=True)
    y = torch.cat([scanned(part, scan) for part, scan in zip(u.split(dms.widths, -1), dms.scans, strict=True)], -1)
    x = reference.norm_linear(y, dms.norm.weight, dms.norm.bias, dms.out_proj.weight, dms.norm.eps, residual=x)
    norm, first, second = block.norm2, mlp.fc1, mlp.fc2
    return reference.residual_mlp(
        x, norm.weight, norm.bias, first.weight, first.bias, second.weight, second.bias, norm.eps
    )


def network(model, x):
    """The maps of all stages."""
    stem, maps = model.stem, []
    x = F.gelu(convolved(x.permute(0, 2, 3, 1), stem.conv1, stem.norm1))
    x = convolved(x, stem.conv2, stem.norm2)
    for i, stage in enumerate(model.stages):
        x = convolved(x, stage.downsample.conv, stage.downsample.norm) if i else x
        for block in stage.blocks:
            x = block_of(x, block)
        maps.append(x)
    return maps


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("instructions", [s.name for s in plan.instruction_sets() if s.usable])
def test_equals_the_definitions(instructions, precision):
    if instructions.endswith("bf16") and precision == "float32":
        pytest.skip("an instruction set of bfloat16 products")
    model = small(dims=(16, 24, 40), depths=(1, 1, 1), scales=((1, 2), (3, 1), (2,)), d_state=2)
    x = images(2, 3, 43, 27)
    fast = PlannedSSMamba(model, precision, instructions=instructions)
    with torch.inference_mode():
        result = fast.forward_intermediates(x, output_fmt="NHWC", intermediates_only=True)
        wanted = network(model.double(), x.double())
    for ours, true in zip(result, wanted, strict=True):
        assert ((ours - true).norm() / true.norm()).item() < {"float32": 1e-5, "bfloat16": 1e-2}[precision]
