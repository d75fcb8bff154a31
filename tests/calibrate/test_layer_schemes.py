"""Which layer gets which scheme: patterns, their order, and what only the plugin can serve."""

import json
from pathlib import Path

import pytest

from calibrate.config import CalibrationConfig, CalibrationError
from calibrate.layer_config import parse_layer_rule, read_layer_config
from calibrate.layer_schemes import assign_schemes, fused_groups, match_layers, stock_problems
from vllm_autoround.format.scheme import QuantScheme

LEAVES = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
INSIDE = [f"model.layers.{index}.{leaf}" for index in (0, 1, 10) for leaf in LEAVES]
OUTSIDE = ["model.embed_tokens", "lm_head"]


def assign(**settings: object) -> tuple[dict[str, QuantScheme], list[str]]:
    return assign_schemes(CalibrationConfig(**settings), INSIDE, OUTSIDE)  # type: ignore[arg-type]


def test_by_default_every_layer_in_the_blocks_and_none_outside() -> None:
    schemes, problems = assign(scheme="W4A16", group_size=64)
    assert not problems
    assert schemes == dict.fromkeys(INSIDE, QuantScheme.parse("W4A16G64"))


def test_the_first_rule_that_matches_wins_and_ignore_comes_last() -> None:
    schemes, problems = assign(
        layers=[("model.layers.0.mlp.down_proj", "FP8_STATIC"), ("down_proj", "W8A16"), ("lm_head", "W8A16")],
        ignore=["re:model[.]layers[.]1[.]"],
    )
    assert not problems
    assert schemes["model.layers.0.mlp.down_proj"] == QuantScheme.parse("FP8_STATIC")
    assert schemes["model.layers.1.mlp.down_proj"] == QuantScheme.parse("W8A16")  # before ignore
    assert schemes["lm_head"] == QuantScheme.parse("W8A16")
    assert "model.embed_tokens" not in schemes
    assert "model.layers.1.self_attn.q_proj" not in schemes
    assert schemes["model.layers.10.self_attn.q_proj"] == QuantScheme.parse("W4A16")


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("model.layers.1.mlp.up_proj", 1),  # a name is that name alone, though it is also an expression
        ("v_proj", 3),
        ("re:v_proj", 0),
        ("re:.*v_proj", 3),
        ("[qkv]_proj$", 9),
        (r"layers\.1\.", 7),
        ("lm_head", 1),
        ("nothing", 0),
    ],
)
def test_patterns(pattern: str, count: int) -> None:
    assert len(match_layers(pattern, [*INSIDE, *OUTSIDE])) == count


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": [("v_prj", "W8A16")]}, "'v_prj' matches no layer"),
        ({"ignore": ["re:.*experts"]}, "'re:.*experts' matches no layer"),
        ({"layers": [("(", "W8A16")]}, "is not a regular expression"),
        ({"layers": [("proj", "W8A16"), ("v_proj", "W4A16")]}, "'v_proj' has no effect"),
    ],
)
def test_a_rule_without_effect_is_a_problem(settings: dict[str, object], message: str) -> None:
    _, problems = assign(**settings)
    assert len(problems) == 1
    assert message in problems[0]


def test_an_unknown_scheme_in_a_rule_is_named_when_the_settings_are_made() -> None:
    with pytest.raises(CalibrationError, match="unknown scheme 'W9'"):
        CalibrationConfig(layers=[("v_proj", "W9")])


def test_fused_groups() -> None:
    groups = fused_groups(LEAVES)
    assert groups == [list(LEAVES[:3]), [LEAVES[3]], list(LEAVES[4:6]), [LEAVES[6]]]


def test_stock_vllm_takes_one_scheme_for_what_it_fuses() -> None:
    schemes, _ = assign(layers=[(r"layers\.0\..*v_proj", "W8A16"), (r"layers\.1\..*gate_proj", "ignore")])
    problems = stock_problems(schemes, INSIDE)
    assert len(problems) == 2
    assert "model.layers.0.self_attn: stock vLLM fuses q_proj, k_proj, v_proj" in problems[0]
    assert "--layer" in problems[0]
    assert "gate_proj: not quantized" in problems[1]
    # What the message says to do resolves it.
    rule = problems[0].split("--layer '")[1].split("'")[0].replace("SCHEME", "W8A16")
    schemes, _ = assign(layers=[parse_layer_rule(rule.replace("\\\\", "\\"))])
    assert not stock_problems(schemes, INSIDE)


def test_stock_vllm_has_no_odd_asymmetric_widths() -> None:
    schemes, _ = assign(scheme="W3A16_ASYM")
    assert "asymmetric weights of 3 bits" in stock_problems(schemes, INSIDE)[0]
    schemes, _ = assign(scheme="W4A16_ASYM")
    assert not stock_problems(schemes, INSIDE)


def test_layer_config_files(tmp_path: Path) -> None:
    content = {"v_proj": "W8A16", "re:.*o_proj": {"scheme": "W4A16", "group_size": 32}, "lm_head": "ignore"}
    expected = [("v_proj", "W8A16"), ("re:.*o_proj", "W4A16_G32"), ("lm_head", "ignore")]
    (tmp_path / "layers.json").write_text(json.dumps(content))
    assert read_layer_config(tmp_path / "layers.json") == expected
    (tmp_path / "layers.yaml").write_text(
        "v_proj: W8A16\n're:.*o_proj': {scheme: W4A16, group_size: 32}\nlm_head: ignore\n"
    )
    assert read_layer_config(tmp_path / "layers.yaml") == expected
    assert QuantScheme.parse("W4A16_G32") == QuantScheme.parse("W4A16", 32)


@pytest.mark.parametrize("content", ["", "[1, 2]", "a: 4", "a: {bits: 4}", "a: [", "a: {scheme: W4A16, sym: true}"])
def test_layer_config_files_that_say_something_else(tmp_path: Path, content: str) -> None:
    (tmp_path / "layers.yaml").write_text(content)
    with pytest.raises(CalibrationError, match=r"layers\.yaml"):
        read_layer_config(tmp_path / "layers.yaml")


@pytest.mark.parametrize("rule", ["v_proj", "=W4A16", "v_proj="])
def test_rules_need_both_sides(rule: str) -> None:
    with pytest.raises(CalibrationError, match="PATTERN=SCHEME"):
        parse_layer_rule(rule)
