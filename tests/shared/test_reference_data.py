"""Real data and a real trained model, where a checkout has them beside it."""

from pathlib import Path

import pytest

from calibrate.data import load_samples
from calibrate.gate import _write_local_task
from calibrate.source import load_source
from tests.conftest import SHARED

pytestmark = pytest.mark.shared


def test_real_calibration_texts_fill_the_published_recipe() -> None:
    source = load_source(str(SHARED / "models" / "ref-llama"), trust_remote_code=False)  # two shards, tied head
    samples = load_samples(
        str(SHARED / "data" / "calib.jsonl.gz"),
        source.tokenizer,
        seqlen=1024,
        nsamples=128,
        seed=42,
        vocabulary=source.model.get_input_embeddings().num_embeddings,
    )
    assert samples.shape == (128, 1024)
    assert len({tuple(sample) for sample in samples.tolist()}) == 128


def test_gsm8k_itself_is_a_local_task(tmp_path: Path) -> None:
    folder = _write_local_task(SHARED / "data" / "gsm8k" / "test.jsonl.gz", 5, tmp_path)
    assert len((folder / "test.jsonl").read_text().splitlines()) == 1319 - 5
