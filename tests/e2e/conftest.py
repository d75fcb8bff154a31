"""What the tests with a real engine ask it."""

import pytest
import transformers as tf

from demo.problems import generate
from tests.conftest import DEMO_MODEL


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    tokenizer = tf.AutoTokenizer.from_pretrained(DEMO_MODEL)
    return [tokenizer(f"Question: {p['question']}\nAnswer:").input_ids for p in generate("test", 4, seed=2)]
