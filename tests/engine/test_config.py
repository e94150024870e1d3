"""Hyper-parameters are typed, checked, named when wrong, and the same after a round trip through YAML."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

pytest.importorskip("yaml", reason="configurations need the [train] extra")

from ssmamba_models.engine.config import check_types, complete_arguments, load_config, parse_setting, save_config
from ssmamba_models.engine.pretrain import PretrainConfig


def test_round_trip(tmp_path):
    config = PretrainConfig(
        data="tiles ä",
        classes=("a", "b"),
        betas=(0.8, 0.9),
        lr=3e-4,
        clip_grad=None,
        model_args={"d_state": 2},
        view_args={"zoom": [1.5, 2.0]},
    )
    save_config(config, tmp_path / "config.yaml")
    assert load_config(PretrainConfig, tmp_path / "config.yaml") == config


def test_every_setting_of_the_method_is_written_down():
    config = PretrainConfig(data="tiles", method_args={"cell_size": 16})
    assert config.method_args["cell_size"] == 16
    assert config.method_args["masked_state"] == "token"
    assert config.view_args["mask_ratio"] == 0.5
    # The views take it from the method: the two must agree.
    assert "cell_size" not in config.view_args


def test_overrides_go_before_the_file_and_reach_into_it(tmp_path):
    (tmp_path / "c.yaml").write_text("data: tiles\nepochs: 5\nview_args: {mask_ratio: 0.6, max_upsampling: 3}\n")
    overrides = {"epochs": 7, "view_args.mask_ratio": 0.7}
    config = load_config(PretrainConfig, tmp_path / "c.yaml", overrides)
    assert (config.epochs, config.view_args["mask_ratio"], config.view_args["max_upsampling"]) == (7, 0.7, 3.0)


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("lr=0.1", "lr", 0.1),
        ("betas=[0.9, 0.99]", "betas", [0.9, 0.99]),
        ("clip_grad=null", "clip_grad", None),
        ("init=a=b", "init", "a=b"),
    ],
)
def test_setting(text, key, value):
    assert parse_setting(text) == (key, value)


@pytest.mark.parametrize("text", ["lr", "=1", "betas=[1"])
def test_no_setting(text):
    with pytest.raises(ValueError, match="--set"):
        parse_setting(text)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epoch": 3}, "unknown key 'epoch' .*did you mean epochs"),
        ({"method_args.cel_size": 16}, "unknown key 'cel_size' in method_args; did you mean cell_size"),
        ({"view_args.cell_size": 16}, "unknown key 'cell_size' in view_args"),
        ({"method": "mamm"}, "unknown method 'mamm'; known are: mamim"),
        ({"lr": -1}, "lr is -1.0, expected"),
        ({"lr": "fast"}, "lr is 'fast', expected a number"),
        ({"lr": float("nan")}, "lr is nan, expected"),
        ({"epochs": 0}, "epochs is 0, expected 1 or more"),
        ({"epochs": 1.5}, "epochs is 1.5, expected a whole number"),
        ({"epochs": True}, "epochs is True, expected a whole number"),
        ({"betas": [0.9]}, "betas is .*expected 2 values"),
        ({"betas": [0.9, 1.0]}, "betas is .*less than 1"),
        ({"precision": "fp8"}, "precision is 'fp8', expected one of auto, fp32, bf16"),
        ({"warmup_epochs": 100}, "warmup_epochs is 100, expected less than epochs, which is 100"),
        ({"min_lr": 0.5}, "min_lr is 0.5, expected at most the peak learning rate"),
        ({"drop_path_rate": 1.0}, "drop_path_rate is 1.0, expected 0 to 0.99"),
        ({"view_args.mask_ratio": "half"}, "view_args.mask_ratio is 'half', expected a number"),
        ({"view_args.zoom": 2}, "view_args.zoom is 2, expected a list"),
        ({"method_args": 3}, "method_args is 3, expected a mapping"),
        ({"data": None}, "data is None, expected text"),
        ({"classes": "lung"}, "classes is 'lung', expected a list"),
    ],
)
def test_what_is_wrong_is_named(values, message):
    with pytest.raises(ValueError, match=message):
        load_config(PretrainConfig, None, {"data": "tiles", **values})


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match=r"data must be given: on the command line \(--data\)"):
        load_config(PretrainConfig)


@pytest.mark.parametrize(("text", "message"), [("[1, 2]", "holds a list"), ("a: [", "is not YAML")])
def test_no_configuration(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config(PretrainConfig, tmp_path / "c.yaml")


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_config(PretrainConfig, tmp_path / "c.yaml")


@dataclass(frozen=True)
class Example:
    count: int = 1
    rate: float = 0.5
    place: str | None = None
    pair: tuple[float, float] = (1.0, 2.0)
    many: Sequence[int] = ()
    kind: Literal["a", "b"] = "a"
    more: dict[str, Any] = field(default_factory=dict)


def test_yaml_quirks_are_understood():
    example = Example(count=3.0, rate="1e-4", pair=[1, 2], many=[1, 2, 3])
    check_types(example)
    assert example == Example(3, 1e-4, None, (1.0, 2.0), (1, 2, 3))
    assert isinstance(example.count, int)


def test_arguments_of_a_function():
    def function(bound, rate: float = 0.5, name: str = "x"):
        """Takes what the test gives it."""

    assert complete_arguments("args", function, {"rate": 1}, ("bound",)) == {"rate": 1.0, "name": "x"}
    with pytest.raises(ValueError, match="unknown key 'bound' in args"):
        complete_arguments("args", function, {"bound": 1}, ("bound",))
