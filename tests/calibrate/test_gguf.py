"""GGUF: the bits by hand, every product of a scale and a zero point, and whole files read by others' readers."""

from __future__ import annotations

import math
from pathlib import Path

import gguf
import pytest
import torch
import transformers as tf
from torch import Tensor

from calibrate.config import CalibrationError
from calibrate.gguf import Gguf, _model_name
from calibrate.gguf_model import GgufModel, model_problems
from calibrate.gguf_tokenizer import tokenizer_problems
from tests.calibrate.exports import SIZES, Exported, as_json, export, llama
from tests.conftest import DEMO_MODEL
from vllm_autoround.format.weights import Integer, QuantizedWeight

Q4_0, Q4_1 = Gguf(name="gguf:q4_0", symmetric=True), Gguf(name="gguf:q4_1", symmetric=False)
TYPES = {"gguf:q4_0": gguf.GGMLQuantizationType.Q4_0, "gguf:q4_1": gguf.GGMLQuantizationType.Q4_1}
FAMILIES = {
    "llama": llama(rope_parameters={"rope_type": "default", "rope_theta": 5000.0}),
    "llama-bias": llama(attention_bias=True, tie_word_embeddings=True),
    "mistral": tf.MistralConfig(**SIZES, sliding_window=None),
    "qwen2": tf.Qwen2Config(**{key: value for key, value in SIZES.items() if key != "head_dim"}),
    "qwen3": tf.Qwen3Config(**{**SIZES, "head_dim": 128}),  # transformers reads no other head_dim for qwen3
}


def half(value: float) -> list[int]:
    """The two bytes of a float16."""
    return torch.tensor([value], dtype=torch.float16).view(torch.uint8).tolist()


def weight(codes: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> QuantizedWeight:
    type_ = Integer(bits=4, group_size=32, symmetric=zero_point is None)
    return QuantizedWeight(type=type_, codes=codes, scale=scale, zero_point=zero_point)


def test_q4_0_bits_by_hand() -> None:
    codes = torch.arange(32, dtype=torch.uint8)[None] % 16
    block = Q4_0.blocks("layer", weight(codes, torch.tensor([[-0.375]])))
    # Code i of the first half is in the low nibble of byte i, code 16 + i in the high one.
    assert block.tolist() == [[*half(-0.375), *(i | i << 4 for i in range(16))]]


def test_q4_1_bits_by_hand_and_mirrored_above_8() -> None:
    codes = torch.tensor([[*range(16), *[5] * 16]] * 2, dtype=torch.uint8)
    scale, zero = torch.tensor([[0.5], [0.5]]), torch.tensor([[8], [9]], dtype=torch.uint8)
    plain, mirrored = Q4_1.blocks("layer", weight(codes, scale, zero)).tolist()
    assert plain == [*half(0.5), *half(-4.0), *(i | 5 << 4 for i in range(16))]
    assert mirrored == [*half(-0.5), *half(3.0), *(15 - i | 10 << 4 for i in range(16))]


def test_q4_1_is_exact_for_every_bfloat16_scale_zero_point_and_code() -> None:
    """128 mantissas x 2 signs x 16 zero points x 16 codes, from the least scale that we make to the greatest."""
    mantissas = 1 + torch.arange(128) / 128
    exponents = torch.tensor([-17, -14, -1, 0, 12])
    scale = (mantissas * 2.0 ** exponents[:, None]).flatten()
    scale = torch.cat([scale, -scale]).bfloat16()
    scale = scale.repeat_interleave(16)[:, None]
    zero = (torch.arange(len(scale)) % 16).to(torch.uint8)[:, None]
    original = weight(torch.arange(32, dtype=torch.uint8).expand(len(scale), 32) % 16, scale, zero)
    values = gguf.quants.dequantize(Q4_1.blocks("layer", original).numpy(), gguf.GGMLQuantizationType.Q4_1)
    assert torch.equal(torch.from_numpy(values), original.dequantize())


@pytest.mark.parametrize(
    ("exporter", "scale", "zero", "message"),
    [
        (Q4_0, 1.0 + 2**-11, None, r"gguf:q4_0: model.x: scale 1.00048828 of row 1, group 0 is not a float16 number"),
        (Q4_0, 70000.0, None, r"scale 70000 of row 1, group 0 is not a float16 number"),
        (Q4_0, 2.0**-30, None, r"scale 9.31322575e-10 of row 1"),
        (Q4_1, 1.0 + 2**-10, 7, r"gguf:q4_1: model.x: scale times zero point, -7.00683594 of row 1"),
        (Q4_1, 16384.0, 4, r"scale times zero point, -65536 of row 1, group 0 is not a float16 number"),
    ],
)
def test_what_float16_cannot_hold_is_refused_by_name(
    exporter: Gguf, scale: float, zero: int | None, message: str
) -> None:
    scales = torch.tensor([[1.0], [scale]])
    zeros = None if zero is None else torch.full((2, 1), zero, dtype=torch.uint8)
    with pytest.raises(CalibrationError, match=message):
        exporter.blocks("model.x", weight(torch.zeros(2, 32, dtype=torch.uint8), scales, zeros))


@pytest.fixture(scope="module", params=FAMILIES)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("gguf")
    kind = "W4A16_ASYM_G32" if request.param in ("mistral", "qwen2") else "W4A16G32"
    name = "gguf:q4_1" if "ASYM" in kind else "gguf:q4_0"
    return export(folder, FAMILIES[request.param], kind, [name])


def test_the_gguf_package_reads_the_same_weights(exported: Exported) -> None:
    [path] = exported.out.glob("*.gguf")
    reader = gguf.GGUFReader(path)
    config = as_json(exported.source / "config.json")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[reader.fields["general.architecture"].contents().upper()], 2)
    state, seen = exported.state(), set()
    for tensor in reader.tensors:
        [name] = [name for name in state if names.get_name(name, (".weight", ".bias")) == tensor.name]
        expected = state[name]
        if config["model_type"] in ("llama", "mistral") and ("q_proj" in name or "k_proj" in name):
            heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            expected = neighbours(expected, heads)
        assert torch.equal(dequantized(tensor), expected), name
        quantized = name.removesuffix(".weight") in exported.weights
        unquantized = "F32" if expected.ndim == 1 else "BF16"
        assert tensor.tensor_type.name == (path.stem.removeprefix("model-").upper() if quantized else unquantized)
        seen.add(name)
    assert seen == state.keys() - ({"lm_head.weight"} if config["tie_word_embeddings"] else set())
    assert not list(exported.out.glob("*.part"))
    assert (exported.out / "LICENSE.txt").read_text() == "yours\n"


def dequantized(tensor: gguf.ReaderTensor) -> Tensor:
    return torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())


def neighbours(rows: Tensor, heads: int) -> Tensor:
    """Row by row: feature i of a head and feature i + D/2, which transformers rotates together, become neighbours."""
    size = len(rows) // heads
    order = [h * size + i + part * size // 2 for h in range(heads) for i in range(size // 2) for part in range(2)]
    return rows[order]


def test_transformers_reads_the_same_model(exported: Exported) -> None:
    [path] = exported.out.glob("*.gguf")
    model = tf.AutoModelForCausalLM.from_pretrained(exported.out, gguf_file=path.name, dtype=torch.float32).eval()
    original = tf.AutoConfig.from_pretrained(exported.source)
    for key in ("hidden_size", "num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "vocab_size"):
        assert getattr(model.config, key) == pytest.approx(getattr(original, key))
    assert model.config.rope_parameters["rope_theta"] == original.rope_parameters["rope_theta"]
    state = exported.state()
    biases = {name for name in state if name.endswith("_proj.bias")}  # its llama has none: it cannot know of them
    loaded = model.state_dict()
    assert loaded.keys() | biases == state.keys()
    for name, tensor in loaded.items():
        assert torch.equal(tensor, state[name]), name
    if not biases - loaded.keys():
        ids = torch.arange(40).reshape(2, 20)
        torch.testing.assert_close(model(ids).logits, exported.logits(ids))


def test_transformers_reads_the_same_tokenizer(exported: Exported) -> None:
    [path] = exported.out.glob("*.gguf")
    loaded = tf.AutoTokenizer.from_pretrained(exported.out, gguf_file=path.name)
    original = tf.AutoTokenizer.from_pretrained(DEMO_MODEL)
    text = "Sam has 3 boxes of seven apples. How many apples?"
    assert loaded.decode(loaded.encode(text, add_special_tokens=False)) == text
    # Its class for byte-level BPE adds a token of its own, after those of the file.
    assert original.get_vocab().items() <= loaded.get_vocab().items()
    assert (loaded.bos_token_id, loaded.eos_token_id) == (original.bos_token_id, original.eos_token_id)


def test_metadata_says_who_made_it_and_how_to_tokenize(exported: Exported) -> None:
    [path] = exported.out.glob("*.gguf")
    fields = {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}
    assert '"made_by": "a test"' in fields["vllm_autoround.provenance"]
    assert fields["general.name"] == "source"
    assert _model_name(Path("hub/models--org--Some-Model/snapshots/0a1b2c")) == "Some-Model"
    assert fields["tokenizer.ggml.pre"] == "smollm"  # single digits, then GPT-2's split: the demo model's tokenizer
    assert fields["tokenizer.ggml.add_bos_token"] is True
    assert fields["tokenizer.ggml.eos_token_id"] == 1
    kind = "MOSTLY_Q4_0" if "q4_0" in path.name else "MOSTLY_Q4_1"
    assert fields["general.file_type"] == gguf.LlamaFileType[kind]


def test_llama_3_divisors_give_transformers_frequencies() -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = llama(head_dim=128, hidden_size=512, max_position_embeddings=131072, rope_parameters=rope)
    [divisors] = GgufModel({**config.to_dict(), "architectures": ["LlamaForCausalLM"]}).extra_tensors().values()
    expected = tf.models.llama.modeling_llama.LlamaRotaryEmbedding(config).inv_freq
    plain = 1 / 500000.0 ** (torch.arange(0, 128, 2) / 128)
    assert (divisors == 1).any()
    assert (divisors == 8).any()
    torch.testing.assert_close(plain / divisors, expected)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architectures": ["OPTForCausalLM"]}, "OPTForCausalLM cannot be written as GGUF here; known are Llama"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "no name for rotary positions of type 'dynamic'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "only a part of each head is rotated"),
        ({"hidden_act": "gelu"}, "has silu, not gelu"),
    ],
)
def test_models_that_it_cannot_say_are_refused(config: dict[str, object], message: str) -> None:
    [problem] = model_problems({"architectures": ["LlamaForCausalLM"], **config})
    assert message in problem


def test_tokenizers_that_it_cannot_say_are_refused(tmp_path: Path) -> None:
    [problem] = tokenizer_problems(tmp_path)
    assert "has no tokenizer.json" in problem
    text = (DEMO_MODEL / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(text.replace('"individual_digits": true', '"individual_digits": false'))
    assert (tmp_path / "tokenizer.json").read_text() != text
    [problem] = tokenizer_problems(tmp_path)
    assert "llama.cpp has no name for the way in which this tokenizer splits text" in problem


def test_a_sliding_window_bounds_the_context() -> None:
    writer = gguf.GGUFWriter(None, "llama")
    config = tf.MistralConfig(**SIZES, sliding_window=64).to_dict() | {"architectures": ["MistralForCausalLM"]}
    GgufModel(config).add_metadata(writer)
    assert writer.kv_data[0]["llama.context_length"].value == 64
    assert math.isclose(writer.kv_data[0]["llama.rope.freq_base"].value, 10000.0)
