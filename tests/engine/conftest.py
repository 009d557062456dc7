import pytest

from tests.helpers import make_dataset


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """One tiny dataset folder for all tests of a session; tests must not write into it."""
    return make_dataset(tmp_path_factory.mktemp("tiny") / "data")
