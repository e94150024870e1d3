"""The models as graphs: torch.fx, TorchScript, torch.compile and torch.export."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from model_cases import image, small
from timm.models import create_feature_extractor, get_graph_node_names


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    """With a classifier of 42; not to be altered."""
    return small(num_classes=42)


def fx_extractor(model):
    train_nodes, eval_nodes = get_graph_node_names(model)
    assert train_nodes[-1] == eval_nodes[-1]
    return create_feature_extractor(model, [eval_nodes[-1]]), eval_nodes[-1]


def test_fx_forward_and_backward(model):
    extractor, node = fx_extractor(deepcopy(model))
    x = image()
    with torch.no_grad():
        torch.testing.assert_close(extractor.eval()(x)[node], model(x))
    extractor.train()
    y = next(iter(extractor(x).values()))
    y.mean().backward()
    assert all(p.grad is not None for p in extractor.parameters())


def test_torchscript(model):
    scripted = torch.jit.script(small(num_classes=42)).eval()
    for size in ((64, 64), (33, 47)):
        with torch.no_grad():
            torch.testing.assert_close(scripted(image(*size)), model(image(*size)))


def test_torchscript_in_float64():
    network, x = small(num_classes=42).eval().double(), image().double()
    torch.testing.assert_close(torch.jit.script(network)(x), network(x), rtol=1e-10, atol=1e-10)


def test_torchscript_saved_and_loaded(model, tmp_path):
    torch.jit.save(torch.jit.script(small(num_classes=42)), tmp_path / "model.pt")
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.load(tmp_path / "model.pt")(image()), model(image()))


def test_torchscript_by_timms_argument(model):
    with torch.no_grad():
        torch.testing.assert_close(small(num_classes=42, scriptable=True)(image()), model(image()))


def test_torchscript_of_the_fx_graph(model):
    extractor, node = fx_extractor(deepcopy(model))
    scripted = torch.jit.script(extractor.eval())
    with torch.no_grad():
        torch.testing.assert_close(scripted(image())[node], model(image()))


def test_torchscript_of_features_only():
    features = small(features_only=True)
    scripted = torch.jit.script(small(features_only=True, scriptable=True))
    with torch.no_grad():
        for have, want in zip(scripted(image()), features(image())):
            torch.testing.assert_close(have, want)


def test_jit_trace(model):
    with torch.no_grad():
        traced = torch.jit.trace(model, image(), check_trace=False)
        torch.testing.assert_close(traced(image(seed=3)), model(image(seed=3)))


def test_compile_in_one_graph_with_backward():
    torch._dynamo.reset()
    grads = []
    for compiled in (False, True):
        model = small(num_classes=3).train()
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        y = run(image())
        y.square().mean().backward()
        grads.append([y.detach(), *(p.grad for p in model.parameters())])
    for have, want in zip(*grads):
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compile_in_one_graph_at_any_size(model):
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for size in ((64, 64), (96, 65), (33, 47)):
            torch.testing.assert_close(compiled(image(*size)), model(image(*size)), rtol=1e-4, atol=1e-5)


def test_export(model, tmp_path):
    program = torch.export.export(deepcopy(model), (image(),))
    torch.export.save(program, tmp_path / "model.pt2")
    with torch.no_grad():
        loaded = torch.export.load(tmp_path / "model.pt2").module()
        torch.testing.assert_close(loaded(image(seed=5)), model(image(seed=5)))
