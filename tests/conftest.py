import json
import os

# Sums are in another order with another number of threads, and a sample that differs changes all that follows: what a
# test sees must not depend on how many cores there are. Before torch is imported, and for processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest


@pytest.fixture(scope="session", autouse=True)
def _cache_of_these_tests(tmp_path_factory):
    """No test reads or writes the cache of whoever runs it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XTOKMAP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def prompts(tmp_path):
    """A small file of prompts, some of them held out."""
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": t, "split": "train"} for t in ("the sky", "the dog", "a fox?", "1 + 2")]
    rows += [{"prompt": t, "split": "heldout"} for t in ("the grass", "naïve")]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path
