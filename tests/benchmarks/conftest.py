"""What several tests of benchmarks need."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model and its tokenizer."""
    return tiny_folder.save(tmp_path_factory.mktemp("tiny"))
