"""Every method on 1, 2 and 4 gloo processes: the same losses, gradients and state in float64, and identical buffers on all ranks.

One process group for each world size walks all methods.
"""

import pytest
import torch

from tests.engine import method_worker
from tests.helpers import run_python

WORLDS = (2, 4)


@pytest.fixture(scope="module")
def results(tiny_data, tmp_path_factory):
    """World size -> {case: result}."""
    out = tmp_path_factory.mktemp("one")
    method_worker.main(tiny_data, out)
    found = {1: torch.load(out / "results.pt", weights_only=False)["results"]}
    for world in WORLDS:
        out = tmp_path_factory.mktemp(f"world{world}")
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world), "-m")
        done = run_python(*launcher, "tests.engine.method_worker", str(tiny_data), str(out))
        assert done.returncode == 0, done.stdout + done.stderr
        saved = torch.load(out / "results.pt", weights_only=False)
        assert saved["world"] == world
        found[world] = saved["results"]
    return found


@pytest.mark.parametrize("case", method_worker.cases())
@pytest.mark.parametrize("world", WORLDS)
def test_losses_gradients_and_state_do_not_depend_on_the_world(results, case, world):
    one, many = results[1][case], results[world][case]
    assert many["losses"] == pytest.approx(one["losses"], abs=1e-9, rel=1e-9)
    assert one["gradients"].keys() == many["gradients"].keys()
    for name, gradient in one["gradients"].items():
        torch.testing.assert_close(many["gradients"][name], gradient, atol=1e-10, rtol=1e-7, msg=lambda m, n=name: f"gradient of {n}: {m}")
    assert one["state"].keys() == many["state"].keys()
    for name, tensor in one["state"].items():
        torch.testing.assert_close(many["state"][name], tensor, atol=1e-8, rtol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", method_worker.cases())
@pytest.mark.parametrize("world", WORLDS)
def test_all_ranks_hold_the_same(results, case, world):
    assert len(set(results[world][case]["hashes"])) == 1, "parameters or buffers differ between ranks"


@pytest.mark.parametrize("case", method_worker.cases())
def test_the_case_is_alive(results, case):
    """Agreement of dead terms would say nothing: the first gradients move the network, and every part of the loss is non-zero in some update."""
    one = results[1][case]
    assert max(float(g.abs().max()) for g in one["gradients"].values()) > 1e-6
    parts = one["parts"]
    dead = [name for name in parts[0] if all(step[name] == 0 for step in parts)]
    assert dead == [], f"never alive: {dead}; give the case overrides in method_worker.OVERRIDES"
