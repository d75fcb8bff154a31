"""Foreign compressed-tensors configs: targets by name, pattern and class on the checkpoint's own module names, and
words that are dense or padded."""

from collections import OrderedDict
from itertools import permutations
from typing import Any

import pytest
import torch
from compressed_tensors.utils.match import is_match, match_targets

from vllm_autoround.format.dialects import read_manifest
from vllm_autoround.format.dialects.dense import layout_by_version
from vllm_autoround.format.dialects.modules import modules_of
from vllm_autoround.format.dialects.targets import resolve
from vllm_autoround.format.errors import ManifestError
from vllm_autoround.format.layouts import LAYOUTS
from vllm_autoround.format.scheme import QuantScheme
from vllm_autoround.format.weights import Integer

BLOCK = "model.layers.0"
HIDDEN, HEADS, FFN = 128, 64, 256  # K of q; K of o; K of down
LAYERS = {
    f"{BLOCK}.self_attn.q_proj": (HEADS, HIDDEN),
    f"{BLOCK}.self_attn.v_proj": (HEADS, HIDDEN),
    f"{BLOCK}.self_attn.o_proj": (HIDDEN, HEADS),
    f"{BLOCK}.mlp.up_proj": (FFN, HIDDEN),
    f"{BLOCK}.mlp.down_proj": (HIDDEN, FFN),
    "lm_head": (96, HIDDEN),
}
Q, V, O, UP, DOWN, HEAD = LAYERS  # noqa: E741
REST = {"model.embed_tokens.weight": (96, HIDDEN), "model.norm.weight": (HIDDEN,)}


def scheme(bits: int = 4, group: int | None = 32, symmetric: bool = True) -> QuantScheme:
    return QuantScheme(Integer(bits=bits, group_size=group, symmetric=symmetric))


def shapes_of(schemes: dict[str, QuantScheme], layout: str = "compressed-tensors") -> dict[str, tuple[int, ...]]:
    """A checkpoint in which these layers are quantized, and the other ones are not."""
    shapes: dict[str, tuple[int, ...]] = dict(REST)
    for layer, size in LAYERS.items():
        if layer in schemes:
            specs = LAYOUTS[layout].specs(schemes[layer], *size, torch.bfloat16)
            shapes |= {f"{layer}.{suffix}": spec.shape for suffix, spec in specs.items()}
        else:
            shapes[f"{layer}.weight"] = size
    return shapes


def config_of(
    groups: dict[str, tuple[list[str], QuantScheme]], ignore: list[str] | None = None, **rest: Any
) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            name: {"targets": targets, "weights": {**scheme.weights.args(), "observer": "minmax"}}
            for name, (targets, scheme) in groups.items()
        },
        "ignore": ignore or [],
        "version": "0.19.0",
    } | rest


def every(scheme_: QuantScheme, *without: str) -> dict[str, QuantScheme]:
    return {layer: scheme_ for layer in LAYERS if layer not in without}


def test_a_class_takes_every_linear_layer_that_is_not_ignored() -> None:
    config = config_of({"group_0": (["Linear"], scheme())}, ["lm_head", "re:.*down_proj"])
    manifest = read_manifest(config, shapes_of(every(scheme(), HEAD, DOWN)))
    assert manifest.schemes == every(scheme(), HEAD, DOWN)
    assert manifest.ignore == (HEAD, DOWN)  # by name, the embedding not among them


def test_names_come_before_patterns_and_patterns_before_classes() -> None:
    groups = {
        "class": (["Linear"], scheme(8)),
        "pattern": (["re:.*self_attn.*"], scheme(4)),
        "name": ([V], scheme(2)),
    }
    expected = {**every(scheme(8)), Q: scheme(4), O: scheme(4), V: scheme(2)}
    for order in permutations(groups):
        config = config_of({name: groups[name] for name in order})
        assert read_manifest(config, shapes_of(expected)).schemes == expected


def test_patterns_match_from_the_beginning_of_the_checkpoints_own_names() -> None:
    """vLLM asks about its fused qkv_proj instead, and so does not know what to do with a pattern for v_proj."""
    config = config_of(
        {"a": (["re:.*v_proj$"], scheme(8)), "b": (["Linear"], scheme(4)), "c": (["re:v_proj"], scheme(2))}
    )
    expected = {**every(scheme(4)), V: scheme(8)}
    assert read_manifest(config, shapes_of(expected)).schemes == expected


def test_an_embedding_has_a_class_of_its_own() -> None:
    config = config_of({"group_0": (["Linear"], scheme(4)), "group_1": (["Embedding"], scheme(8))})
    specs = LAYOUTS["compressed-tensors"].specs(scheme(8), 96, HIDDEN, torch.bfloat16)
    shapes = shapes_of(every(scheme(4)))
    del shapes["model.embed_tokens.weight"]
    shapes |= {f"model.embed_tokens.{suffix}": spec.shape for suffix, spec in specs.items()}
    assert read_manifest(config, shapes).schemes == {**every(scheme(4)), "model.embed_tokens": scheme(8)}


@pytest.mark.parametrize(
    "targets",
    [
        ["Linear", "re:.*self_attn.*", V],
        ["re:.*v_proj", "re:.*self_attn", "re:.*"],
        ["re:model.*", "Linear", "re:.*mlp.*"],
        [HEAD, DOWN, "re:.*o_proj$", "Linear"],
    ],
)
@pytest.mark.parametrize("ignore", [[], [HEAD], ["re:.*up_proj", O], ["re:lm", "re:proj"]])
def test_resolution_is_that_of_the_library(targets: list[str], ignore: list[str]) -> None:
    module = torch.nn.Linear(1, 1)
    ordered = OrderedDict((target, f"group_{index}") for index, target in enumerate(targets))
    expected = {}
    for layer in LAYERS:
        matched = match_targets(layer, module, ordered)
        if matched and not is_match(layer, module, ignore):
            expected[layer] = ordered[matched[0]]
    modules = modules_of(shapes_of(dict.fromkeys(expected, scheme())))
    assert resolve(ordered, ignore, modules) == expected


@pytest.mark.parametrize(
    ("targets", "ignore", "message"),
    [
        (["re:.*self_attn.*"], [], "down_proj is quantized, but no target of the config matches it"),
        (["Linear"], ["re:.*v_proj"], r"v_proj is in ignore \('re:.\*v_proj'\), but its tensors are quantized"),
        (["Linear"], [V], "v_proj is in ignore"),
        (["re:*"], [], "is not a regular expression"),
        (["Linear", f"{BLOCK}.mlp.gate_proj"], [], "promised tensors are missing, the first is .*gate_proj"),
    ],
)
def test_configs_that_contradict_the_tensors(targets: list[str], ignore: list[str], message: str) -> None:
    config = config_of({"group_0": (targets, scheme())}, ignore)
    with pytest.raises(ManifestError, match=message):
        read_manifest(config, shapes_of({DOWN: scheme(), V: scheme()}))


def layouts(config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> set[str]:
    manifest = read_manifest(config, shapes)
    return {manifest.layout_name(layer) for layer in manifest.schemes}


@pytest.mark.parametrize("layout", ["compressed-tensors", "padded"])
@pytest.mark.parametrize("bits", [3, 5, 6, 7])
@pytest.mark.parametrize("version", [None, "0.17.0", "0.19.0"])
def test_groups_tell_dense_words_from_padded_ones(bits: int, layout: str, version: str | None) -> None:
    """Whatever the config says of the version."""
    config = config_of({"group_0": (["Linear"], scheme(bits))}, version=version)
    assert layouts(config, shapes_of(every(scheme(bits)), layout)) == {layout}


@pytest.mark.parametrize("layout", ["compressed-tensors", "padded"])
@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_zero_points_tell_where_there_are_no_groups(bits: int, layout: str) -> None:
    asymmetric = scheme(bits, None, symmetric=False)
    config = config_of({"group_0": (["Linear"], asymmetric)}, version=None)
    assert layouts(config, shapes_of(every(asymmetric), layout)) == {layout}


# Lengths that rows of 64, 128 and 256 dense (or padded) 3-bit codes would have if they were padded (or dense).
MISLEADING = {f"other_{size}.bias": (size,) for size in (60, 120, 240, 70, 130, 270)}


@pytest.mark.parametrize("layout", ["compressed-tensors", "padded"])
def test_other_layers_tell_where_a_layer_itself_does_not(layout: str) -> None:
    schemes = {**every(scheme(3, None)), Q: scheme(5)}
    config = config_of({"a": (["Linear"], scheme(3, None)), "b": ([Q], scheme(5))}, version=None)
    assert layouts(config, {**shapes_of(schemes, layout), **MISLEADING}) == {layout}
    alone = config_of({"a": (["Linear"], scheme(3, None))}, version=None)
    with pytest.raises(ManifestError, match="it cannot be told"):
        layouts(alone, {**shapes_of(every(scheme(3, None)), layout), **MISLEADING})


@pytest.mark.parametrize(("version", "layout"), [("0.17.0", "padded"), ("0.18.0", "compressed-tensors")])
def test_the_version_tells_where_the_shapes_do_not(version: str, layout: str) -> None:
    config = config_of({"group_0": (["Linear"], scheme(3, None))}, version=version)
    assert layouts(config, shapes_of(every(scheme(3, None)), layout)) == {layout}


@pytest.mark.parametrize("layout", ["compressed-tensors", "padded"])
def test_the_sizes_of_the_model_tell_at_last(layout: str) -> None:
    """A row of 3-bit codes is 128 long, as the norms are, or it is another number that the model does not have."""
    config = config_of({"group_0": (["Linear"], scheme(3, None))}, version=None)
    assert layouts(config, shapes_of(every(scheme(3, None)), layout)) == {layout}


def test_what_cannot_be_told_is_refused() -> None:
    config = config_of({"group_0": (["Linear"], scheme(3, None))}, version=None)
    # 12 words: 118 to 128 codes densely, 111 to 120 padded; the model has both 128 and 120.
    shapes = {**shapes_of({Q: scheme(3, None)}), "other.bias": (120,)}
    with pytest.raises(ManifestError, match=r"q_proj: it cannot be told .*padded.*add the version"):
        read_manifest(config, shapes)
    assert layouts({**config, "version": "0.16.0"}, shapes) == {"padded"}


def test_versions_of_the_library() -> None:
    dense, padded = "compressed-tensors", "padded"
    told = {"0.9.4": padded, "0.17.0": padded, "0.17.1": padded, "0.18.0": dense, "0.20.1": dense, "1.0": dense}
    told |= {"0.16.1.a20260101": padded, "0.19.0.a20260101": dense}
    for version, layout in told.items():
        assert layout_by_version(version) == layout, version
    for version in ("0.17.1.a20260701", "0.18.0a1", "unknown", "", None, 18):
        assert layout_by_version(version) is None, version


def test_other_widths_do_not_care() -> None:
    for bits in (2, 4, 8):
        config = config_of({"group_0": (["Linear"], scheme(bits, None))}, version=None)
        assert layouts(config, shapes_of(every(scheme(bits, None)))) == {"compressed-tensors"}


@pytest.mark.parametrize("format_", ["int-quantized", "naive-quantized"])
def test_integers_that_are_not_packed(format_: str) -> None:
    asymmetric = scheme(8, None, symmetric=False)
    config = config_of({"group_0": (["Linear"], asymmetric)}, format=format_)
    assert layouts(config, shapes_of(every(asymmetric), "int-quantized")) == {"int-quantized"}


@pytest.mark.parametrize("order", ["weight", "static"])
def test_an_activation_order_that_leaves_no_trace_is_read(order: str) -> None:
    config = config_of({"group_0": (["Linear"], scheme())})
    config["config_groups"]["group_0"]["weights"]["actorder"] = order
    assert read_manifest(config, shapes_of(every(scheme()))).schemes == every(scheme())


def test_a_g_idx_is_claimed_by_no_scheme() -> None:
    config = config_of({"group_0": (["Linear"], scheme())})
    with pytest.raises(ManifestError, match=r"belong to no quantized layer, the first is .*weight_g_idx"):
        read_manifest(config, {**shapes_of(every(scheme())), f"{Q}.weight_g_idx": (HIDDEN,)})
    config["config_groups"]["group_0"]["weights"]["actorder"] = "group"
    with pytest.raises(ManifestError, match="actorder"):
        read_manifest(config, shapes_of(every(scheme())))


KV_ARGS = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
KV_SHAPES = {f"{BLOCK}.self_attn.{letter}_scale": (1,) for letter in "kv"}


def test_scales_of_the_kv_cache_need_their_scheme() -> None:
    shapes = {**shapes_of(every(scheme())), **KV_SHAPES}
    config = config_of({"group_0": (["Linear"], scheme())}, kv_cache_scheme=KV_ARGS)
    manifest = read_manifest(config, shapes)
    assert (manifest.kv_cache, manifest.kv_scales) == ("fp8", ("k_scale", "v_scale"))
    with pytest.raises(ManifestError, match="k_scale is there but kv_cache_scheme is not"):
        read_manifest({**config, "kv_cache_scheme": None}, shapes)
    with pytest.raises(ManifestError, match="dynamic"):
        read_manifest({**config, "kv_cache_scheme": {**KV_ARGS, "dynamic": True}}, shapes)
    heads = {name: (2, 1, 1) for name in KV_SHAPES}
    per_head = {**config, "kv_cache_scheme": {**KV_ARGS, "strategy": "attn_head"}}
    assert read_manifest(per_head, {**shapes, **heads}).kv_cache == "fp8_per_head"
    with pytest.raises(ManifestError, match="one scale per tensor"):
        read_manifest(config, {**shapes, **heads})


def test_auto_rounds_group_of_attention_layers_says_what_the_kv_cache_says() -> None:
    shapes = {**shapes_of(every(scheme())), **KV_SHAPES, f"{BLOCK}.self_attn.q_scale": (1,)}
    config = config_of({"group_0": (["Linear"], scheme())}, kv_cache_scheme=KV_ARGS)
    attention = {"targets": ["LlamaAttention"], "input_activations": KV_ARGS}
    key = "attention_input_activations"
    assert read_manifest({**config, key: attention}, shapes).kv_scales == ("k_scale", "v_scale", "q_scale")
    for changed in (
        {"targets": ["Linear"]},
        {"input_activations": {**KV_ARGS, "strategy": "attn_head"}},
        {"strategy": "tensor"},
    ):
        with pytest.raises(ManifestError, match=key):
            read_manifest({**config, key: {**attention, **changed}}, shapes)
    with pytest.raises(ManifestError, match=key):
        read_manifest({**config, key: attention, "kv_cache_scheme": None}, shapes)


def test_llm_compressors_group_of_attention_layers_is_refused() -> None:
    config = config_of({"group_0": (["Linear"], scheme())}, kv_cache_scheme=KV_ARGS)
    config["config_groups"]["group_1"] = {"targets": ["LlamaAttention"], "input_activations": KV_ARGS}
    with pytest.raises(ManifestError, match=r"group_1 quantizes attention layers: .*whatever was in memory"):
        read_manifest(config, {**shapes_of(every(scheme())), **KV_SHAPES})
