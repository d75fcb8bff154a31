"""One process that vLLM takes for rank 0 of 1, on the CPU, and the layers' rank in it as a fixture."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch
from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import (
    destroy_distributed_environment,
    destroy_model_parallel,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.distributed.parallel_state import get_tp_group

torch.set_num_threads(1)  # these matrices are too small to share

TensorParallel = Callable[[int, int], AbstractContextManager[None]]


@pytest.fixture(scope="session", autouse=True)
def _process_groups() -> Iterator[None]:
    with (
        set_current_vllm_config(VllmConfig(device_config=DeviceConfig("cpu"))),
        tempfile.TemporaryDirectory() as folder,
    ):
        init_distributed_environment(
            world_size=1,
            rank=0,
            local_rank=0,
            distributed_init_method=f"file://{folder}/rendezvous",
            backend="gloo",
        )
        initialize_model_parallel(1, 1)
        yield
        destroy_model_parallel()
        destroy_distributed_environment()


@pytest.fixture(autouse=True)
def _vllm_config(_process_groups: None) -> Iterator[None]:
    """A configuration a test: vLLM keeps the attention layers of a model in it, by name."""
    with set_current_vllm_config(VllmConfig(device_config=DeviceConfig("cpu"))):
        yield


@pytest.fixture
def tensor_parallel(monkeypatch: pytest.MonkeyPatch) -> TensorParallel:
    """``with tensor_parallel(rank, size):`` layers are created as that rank's; they must not communicate."""

    @contextmanager
    def as_rank(rank: int, size: int) -> Iterator[None]:
        with monkeypatch.context() as patch:
            # Every layer and parameter asks this group, in all versions.
            patch.setattr(get_tp_group(), "rank_in_group", rank)
            patch.setattr(get_tp_group(), "world_size", size)
            yield

    return as_rank
