"""The register is the folder."""

from pathlib import Path

import pytest

from fastssl import methods
from fastssl.errors import RecipeError
from fastssl.methods.base import Method


def test_names_are_the_files():
    files = {path.stem for path in Path(methods.__file__).parent.glob("*.py")} - {"__init__", "base"}
    assert methods.names() == sorted(files)
    assert {"erm", "fixmatch"} <= files


def test_each_name_gives_the_one_method_of_its_file():
    for name in methods.names():
        method = methods.get(name)
        assert issubclass(method, Method) and method is not Method
        assert method.__module__ == f"fastssl.methods.{name}"
        assert method.__doc__


@pytest.mark.parametrize("name", ["fixmach", "base", "__init__", "", "fixmatch.FixMatch", "../erm"])
def test_an_unknown_name_is_an_error_that_lists_the_known_ones(name):
    with pytest.raises(RecipeError, match="erm, fixmatch") as error:
        methods.get(name)
    assert ("did you mean 'fixmatch'" in str(error.value)) == name.startswith("fixm")
