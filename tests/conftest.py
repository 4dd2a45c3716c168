import pytest


@pytest.fixture(scope="session", autouse=True)
def _cache_of_these_tests(tmp_path_factory):
    """No test reads or writes the cache of whoever runs it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XTOKMAP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
