"""The collections that source tests share, converted once and opened once per kind: an engine that compiles does so once."""

import pytest

from tests.sources.worlds import built, opened


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    return built(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def readers(world):
    cache = {}

    def reader(kind):
        if kind not in cache:
            cache[kind] = opened(world[0], kind)
        return cache[kind]

    yield reader
    for source in cache.values():
        source.close()
