"""The engines that read .beton files, as test parameters."""

import importlib.util

import pytest

HAS_FFCV = importlib.util.find_spec("ffcv") is not None
NEEDS_FFCV = [pytest.mark.ffcv, pytest.mark.skipif(not HAS_FFCV, reason="the ffcv package is not installed (make ffcv)")]
ENGINES = [pytest.param("native"), pytest.param("ffcv", marks=NEEDS_FFCV)]
