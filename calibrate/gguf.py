"""The GGUF exporters: 4-bit codes in groups of 32 along K as llama.cpp keeps them, in one file with the tokenizer.

A block of 32 weights (llama.cpp, ggml-common.h; a byte holds codes i and i + 16):

    q4_0   d float16, 16 bytes            w = d * (q - 8)
    q4_1   d, m float16, 16 bytes         w = d * q + m

q4_0 is what a symmetric weight means, with d its scale: exact where float16 holds the scale.

q4_1 keeps s * (q - z) as d = s, m = -s * z. The product of a bfloat16 scale, 8 significant bits, and a zero point of up
to 4 bits may need 12, one more than float16 has; so where z is 9 or more the block is written mirrored, with d = -s,
codes 15 - q and m = s * (15 - z): then the factor, 0 to 8, has at most 3 significant bits, and m is exact. It is exact,
that is, for every scale of 8 significant bits from 2^-17 (float16's subnormals end at 2^-24) to 65504 / 8. Scales with
more, as float16 models have, are exact only by luck and refused by name.

Unquantized matrices keep the model's dtype, vectors and norms become float32, as in llama.cpp's own files.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

from calibrate.config import CalibrationError
from calibrate.origin import Origin, Shapes, exactly
from calibrate.partial import copy, save_tensors, sync
from vllm_autoround.format.errors import ManifestError
from vllm_autoround.format.manifest import FORMAT_VERSION, MARKER, Manifest
from vllm_autoround.format.scheme import QuantScheme
from vllm_autoround.format.weights import Integer, QuantizedWeight

if TYPE_CHECKING:
    from calibrate.gguf_model import GgufModel

BLOCK = 32
_MOST_FACTOR = 8  # of a scale in m
_LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gguf:
    """One block type."""

    name: str
    symmetric: bool  # q4_0, else q4_1

    @property
    def scale_dtypes(self) -> tuple[torch.dtype, ...]:
        return (torch.bfloat16, torch.float16) if self.symmetric else (torch.bfloat16,)

    @property
    def file(self) -> str:
        """The file in the checkpoint's folder."""
        return f"model-{self.name.partition(':')[2]}.gguf"

    def problems(self, manifest: Manifest, shapes: Shapes, origin: Origin) -> list[str]:
        if find_spec("gguf") is None:
            return [f"{self.name} needs the gguf package: pip install 'vllm-autoround[gguf]'"]
        from calibrate.gguf_model import model_problems  # noqa: PLC0415 - an optional dependency
        from calibrate.gguf_tokenizer import tokenizer_problems  # noqa: PLC0415

        scheme = QuantScheme(Integer(bits=4, group_size=BLOCK, symmetric=self.symmetric))
        others = [layer for layer, found in manifest.schemes.items() if found != scheme]
        problems = [*model_problems(origin.config), *tokenizer_problems(origin.folder)]
        if others:
            problems.append(
                f"{self.name} takes {scheme} only; {len(others)} layers are not, the first is {others[0]} "
                f"({manifest.schemes[others[0]]}); use --scheme {'W4A16G32' if self.symmetric else 'W4A16_ASYM_G32'}"
            )
        if manifest.kv_cache:
            problems.append(f"{self.name} has no place for KV-cache scales; leave --kv-cache out or use another format")
        return problems

    def open(self, folder: Path, manifest: Manifest, origin: Origin) -> GgufSink:
        """Start writing the file."""
        return GgufSink(self, folder, manifest, origin)

    def read_back(
        self, folder: Path, manifest: Manifest, origin: Origin, names: Iterable[str]
    ) -> Iterator[tuple[str, Tensor]]:
        """What the gguf package reads, in float32, with the names and rows of the original model."""
        import gguf  # noqa: PLC0415

        from calibrate.gguf_model import GgufModel  # noqa: PLC0415

        model = GgufModel(origin.config)
        tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(folder / self.file).tensors}
        for name in names:
            stored = tensors.get(model.tensor_name(name) or "")
            if stored is not None:
                values = torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type).copy())
                order = model.row_order(name.rpartition(".")[0], len(values))
                yield name, values if order is None else values[order.argsort()]

    def blocks(self, layer: str, weight: QuantizedWeight) -> Tensor:
        """A weight [N, K] as bytes [N, K/32 * 18 or 20].

        Raises:
            CalibrationError: a scale that float16 does not hold, by name.
        """
        codes, what = weight.codes, f"{self.name}: {layer}: scale"
        if weight.zero_point is None:
            halves = [exactly(weight.scale, torch.float16, what)]
        else:
            mirrored = weight.zero_point > _MOST_FACTOR
            zero = torch.where(mirrored, 15 - weight.zero_point, weight.zero_point)
            codes = torch.where(mirrored.repeat_interleave(BLOCK, 1), 15 - codes, codes)
            scale = torch.where(mirrored, -weight.scale.float(), weight.scale.float())
            halves = [exactly(scale, torch.float16, what)]
            halves.append(exactly(-scale * zero, torch.float16, f"{what} times zero point,"))
        grouped = codes.unflatten(1, (-1, BLOCK))
        low, high = grouped.split(BLOCK // 2, dim=-1)
        scales = torch.stack(halves, dim=-1).contiguous().view(torch.uint8)
        return torch.cat([scales, low | (high << 4)], dim=-1).flatten(1)


class GgufSink:
    """Collects a `Gguf` in safetensors files, under llama.cpp's names, and makes one file of them at the end."""

    def __init__(self, exporter: Gguf, folder: Path, manifest: Manifest, origin: Origin) -> None:
        from calibrate.gguf_model import GgufModel  # noqa: PLC0415

        self._exporter, self._folder, self._manifest, self._origin = exporter, folder, manifest, origin
        self._model = GgufModel(origin.config)
        self._parts: list[Path] = []
        self._written: set[str] = set()

    def write_part(self, name: str, weights: Mapping[str, QuantizedWeight], tensors: Mapping[str, Tensor]) -> None:
        part = {
            self._name(f"{layer}.weight"): _in_order(self._model, layer, self._exporter.blocks(layer, weight))
            for layer, weight in weights.items()
        }
        for full_name, tensor in tensors.items():
            part[self._name(full_name)] = _in_order(
                self._model, full_name.rpartition(".")[0], tensor if tensor.ndim > 1 else tensor.float()
            )
        path = self._folder / f"{name}.part"
        save_tensors(path, part)
        self._parts.append(path)
        self._written |= weights.keys()

    def _name(self, name: str) -> str:
        found = self._model.tensor_name(name)
        if found is None:
            raise CalibrationError(f"{self._exporter.name}: {name} is a tensor that llama.cpp does not know")
        return found

    def finish(self, provenance: Mapping[str, Any]) -> None:
        if missing := self._manifest.schemes.keys() - self._written:
            raise ManifestError(f"{len(missing)} promised layers are missing, the first is {min(missing)}")
        save_tensors(self._folder / "extra.part", self._model.extra_tensors())
        self._parts.append(self._folder / "extra.part")
        write_file(self._folder / self._exporter.file, self._parts, self._exporter, self._origin, provenance)
        for path in self._parts:
            path.unlink()
        for pattern in _LICENCES:
            for path in sorted(self._origin.folder.glob(pattern)):
                copy(path, self._folder / path.name)


def write_file(path: Path, parts: list[Path], exporter: Gguf, origin: Origin, provenance: Mapping[str, Any]) -> None:
    """Make one GGUF file of safetensors files, tensor by tensor; bytes there are blocks."""
    import gguf  # noqa: PLC0415

    from calibrate.gguf_model import GgufModel  # noqa: PLC0415
    from calibrate.gguf_tokenizer import add_tokenizer  # noqa: PLC0415

    types = {
        torch.uint8: gguf.GGMLQuantizationType.Q4_0 if exporter.symmetric else gguf.GGMLQuantizationType.Q4_1,
        torch.float32: gguf.GGMLQuantizationType.F32,
        torch.float16: gguf.GGMLQuantizationType.F16,
        torch.bfloat16: gguf.GGMLQuantizationType.BF16,
    }
    model = GgufModel(origin.config)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[model.arch])
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(_model_name(origin.folder))
    model.add_metadata(writer)
    kind = gguf.LlamaFileType.MOSTLY_Q4_0 if exporter.symmetric else gguf.LlamaFileType.MOSTLY_Q4_1
    writer.add_file_type(kind)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_string(f"{MARKER}.provenance", json.dumps({"format_version": FORMAT_VERSION, **provenance}))
    add_tokenizer(writer, origin.folder, origin.config["vocab_size"])
    for name, tensor in _tensors(parts):
        data = tensor.view(torch.uint8).numpy()
        writer.add_tensor_info(name, data.shape, data.dtype, data.nbytes, raw_dtype=types[tensor.dtype])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, tensor in _tensors(parts):
        writer.write_tensor_data(tensor.view(torch.uint8).numpy())
    writer.close()
    sync(path)


def _model_name(folder: Path) -> str:
    """A folder's name; in the Hub's cache, where that is a commit, the repository's."""
    cached = folder.parent.name == "snapshots"
    return folder.parent.parent.name.rpartition("--")[2] if cached else folder.name


def _tensors(parts: list[Path]) -> Iterator[tuple[str, Tensor]]:
    for path in parts:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is not iterable
                yield name, file.get_tensor(name)


def _in_order(model: GgufModel, layer: str, rows: Tensor) -> Tensor:
    """A layer's weight or bias with its rows [N, ...] as llama.cpp has them."""
    order = model.row_order(layer, len(rows))
    return rows if order is None else rows[order.to(rows.device)]
