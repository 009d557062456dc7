"""CUDA graphs: the rules of recording, as far as a CPU can see them, and on a GPU the replay of every method."""

import pytest
import torch

from fastssl.engine.capture import CapturedUpdate
from fastssl.engine.graphs import CudaGraphs
from fastssl.engine.prepare import prepare_method
from tests.engine.method_worker import cases
from tests.engine.test_capture import CUDA, make_trainer, state, walk


class FakeCuda:
    """Stands for torch.cuda: writes down what is asked of it."""

    def __init__(self, monkeypatch):
        self.said = said = []

        class Fake:
            def __init__(self, *given, **options):
                said.append((type(self).__name__, options))

            def __enter__(self):
                said.append(f"enter {type(self).__name__}")

            def __exit__(self, *given):
                said.append(f"leave {type(self).__name__}")

        def make(name, **methods):
            return type(name, (Fake,), {key: (lambda self, *a, key=key: said.append(f"{name}.{key}")) for key in methods})

        self.generator = make("generator", graphsafe_set_state=1)()
        self.generator.clone_state = lambda: said.append("clone_state")
        parts = {"CUDAGraph": make("graph", register_generator_state=1, replay=1), "graph": make("recording"), "device": make("device")}
        parts |= {"Stream": make("side", wait_stream=1), "stream": make("stream"), "current_device": lambda: 0, "default_generators": [self.generator]}
        current = make("current", wait_stream=1)()
        parts["current_stream"] = lambda device=None: current
        for name, part in parts.items():
            monkeypatch.setattr(torch.cuda, name, part)
        said.clear()


def test_cuda_graphs_keep_the_rules_of_recording(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    backend = CudaGraphs(CUDA, generators=[object()])
    with backend.aside():
        cuda.said.append("warm up")
    order = [word for word in cuda.said if isinstance(word, str)]
    assert order == ["side.wait_stream", "enter stream", "warm up", "leave stream", "current.wait_stream"]
    cuda.said.clear()
    recorded = backend.record(lambda: cuda.said.append("work") or 7)
    assert recorded.result == 7 and recorded.pending
    options = next(entry[1] for entry in cuda.said if entry[0] == "recording")
    assert options == {"stream": backend.stream, "capture_error_mode": "thread_local"}
    order = [word for word in cuda.said if isinstance(word, str)]
    assert order.index("graph.register_generator_state") < order.index("enter recording") < order.index("work") < order.index("leave recording")
    recorded.replay()
    assert cuda.said[-1] == "graph.replay"


def test_a_failed_recording_leaves_the_generator_as_it_was(monkeypatch):
    cuda = FakeCuda(monkeypatch)

    def refuse():
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        CudaGraphs(CUDA).record(refuse)
    assert "clone_state" in cuda.said and cuda.said[-1] == "generator.graphsafe_set_state"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", cases())
def test_cuda_graphs_replay_what_eager_updates_do(tiny_data, tmp_path, case):
    method, overrides = cases()[case]
    states = []
    for recorded in (False, True):
        trainer = make_trainer(tiny_data, tmp_path, "batchnorm.groups=4", "train.capture=off", *overrides, method=method)
        prepare_method(trainer.updater, trainer.streams, trainer.views)
        walk(trainer, CapturedUpdate(trainer.updater, CudaGraphs(torch.device("cuda"))) if recorded else trainer.updater, 6)
        states.append({name: tensor.cpu() for name, tensor in state(trainer).items()})
    for name, eager in states[0].items():
        torch.testing.assert_close(states[1][name], eager, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
