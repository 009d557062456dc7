"""Methods with banks and priors are killed (SIGKILL) and resumed: weights, teacher, optimiser, method state and metrics as if nothing had happened.

FixMatch, and everything around the method, is killed in test_resume.py.
"""

import json
import multiprocessing
import signal

import pytest

from fastssl.engine.train import train
from tests.engine.test_resume import _killed, assert_same_run, kill_points, recipe_for
from tests.helpers import PATIENCE_S

# Terms are alive from the second epoch (of 5 updates) on; the ring of SimMatch wraps, and is not full at the first kill.
OPTIONS = {
    "simmatch": ["method.threshold=0.26", "method.embed_dim=8", "method.alignment_length=8"],
    "simpro": ["method.threshold=0.3"],
}


@pytest.mark.parametrize("method", OPTIONS)
def test_kill_and_resume(method, tiny_data, tmp_path):
    run = train(recipe_for(tiny_data, tmp_path / "straight", *OPTIONS[method], method=method))
    recipe = recipe_for(tiny_data, tmp_path / "killed", *OPTIONS[method], method=method)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    points = kill_points(method)
    for how, step, file in points:
        process = context.Process(target=_killed, args=(recipe, how, step, file))
        process.start()
        process.join(PATIENCE_S)
        assert process.exitcode == -signal.SIGKILL, (how, step, file)
    resumed = train(recipe, resume="auto")
    assert len(json.loads((resumed / "env.json").read_text())["resumed"]) == len(points)
    assert_same_run(run, resumed)
