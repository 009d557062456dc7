"""What limits a recipe, and which setting to try next: a rule over measured numbers, nothing is measured here."""

from __future__ import annotations

from dataclasses import dataclass

RENDER_GOAL = 0.05  # of a step, on a GPU
CLEARLY = 1.05  # one rate limits the other when it is lower by this factor
CANVAS_PER_VIEW = 1.43  # shorter canvases than this times the view cost crops their detail: 320 for views of 224
SMALL = 96  # pixels: images that the arrays format is meant for


@dataclass(frozen=True)
class Facts:
    """Seconds per step of each phase (see fastssl/engine/bench.py), over ``images`` images of all ranks, with the settings that matter."""

    images: int
    read_s: float
    loader_s: float
    render_s: float
    step_s: float
    together_s: float
    cuda: bool
    format: str  # of the dataset folder: arrays, ffcv, dali
    reader: str  # data.source
    on_device: bool  # canvases are made or kept on the device
    workers: int
    cores: int
    threads: int
    precision: str
    canvas: int  # its longer side
    view: int  # side of the largest view
    padding: float
    pack: str
    can_scale: bool  # data.scaled_decode=1 would decode most images reduced
    has_dali: bool
    backend: str
    geometry: str

    @property
    def decodes(self) -> bool:
        return self.format != "arrays"


def advise(facts: Facts) -> tuple[str, list[str], str]:
    """(what limits, settings to try in order, one sentence).  The limit is decode, read, transfer, render or network."""
    limit = bottleneck(facts)
    tries = {"decode": _for_decode, "read": _for_read, "transfer": _for_transfer, "render": _for_render, "network": _for_network}[limit](facts)
    loader, step = _rate(facts, facts.loader_s), _rate(facts, facts.step_s)
    if limit in ("decode", "read", "transfer"):
        said = f"{limit}-bound: {loader} images/s against a step that takes {step}"
    elif limit == "render":
        said = f"render-bound: views take {facts.render_s / facts.step_s:.0%} of a step that takes {step} images/s; the loader delivers {loader}"
    else:
        said = f"network-bound: a step takes {step} images/s, views are {facts.render_s / facts.step_s:.0%} of it; the loader delivers {loader}"
        if facts.cuda and facts.render_s > RENDER_GOAL * facts.step_s:
            tries = [*_for_render(facts)[:1], *tries]
    if not facts.cuda:
        said += " (loader and step share the processor)"
    return limit, tries, f"{said}; {'use ' + ', or '.join(tries[:2]) if tries else 'no setting here makes it faster'}"


def bottleneck(facts: Facts) -> str:
    """On a GPU the loader works beside the step, so the slower of the two limits; on the CPU they share the cores, so the larger part does."""
    data = "decode" if facts.decodes else "read"
    network_s = facts.step_s - facts.render_s
    if facts.cuda:
        if facts.loader_s > CLEARLY * facts.step_s:
            return "transfer" if facts.loader_s > 1.25 * facts.read_s and not facts.on_device else data
        return "render" if facts.render_s > network_s else "network"
    parts = {data: facts.loader_s, "render": facts.render_s, "network": network_s}
    return max(parts, key=lambda name: parts[name])


def _for_decode(facts: Facts) -> list[str]:
    tries = []
    if facts.workers < facts.cores:
        tries.append(f"data.workers={facts.cores}")
    if facts.cuda and facts.format == "dali" and facts.reader != "dali":
        tries.append("data.source=dali, which decodes on the GPU" + ("" if facts.has_dali else " (make dali)"))
    smaller = -(-round(CANVAS_PER_VIEW * facts.view) // 32) * 32
    if facts.view <= SMALL and facts.canvas <= 2 * SMALL:
        tries.append("fastssl-data convert --format arrays: images this small need no decoding")
    elif facts.canvas > 1.2 * smaller:
        tries.append(f"fastssl-data convert --max-side {smaller}")
    if facts.can_scale:
        tries.append("data.scaled_decode=1")
    if facts.cuda and facts.format == "ffcv":
        tries.append("fastssl-data convert --format dali with data.source=dali, which decodes on the GPU")
    return tries or ["more processor cores per process"]


def _for_read(facts: Facts) -> list[str]:
    if facts.cuda and not facts.on_device:
        return ["data.device_resident=yes, if the dataset fits the device's memory"]
    return ["a faster disk, or enough memory that the pixel file stays cached"]


def _for_transfer(facts: Facts) -> list[str]:
    tries = []
    if facts.format == "arrays":
        tries.append("data.device_resident=yes, if the dataset fits the device's memory")
    if facts.padding > 0.1 and facts.pack == "off":
        tries.append("data.pack=auto")
    elif 0.1 < facts.padding <= 0.3 and facts.pack == "auto":
        tries.append("data.pack=on")
    smaller = -(-round(CANVAS_PER_VIEW * facts.view) // 32) * 32
    if facts.canvas > 1.2 * smaller:
        tries.append(f"fastssl-data convert --max-side {smaller}")
    if facts.format == "dali" and facts.reader != "dali":
        tries.append("data.source=dali: only JPEG bytes travel to the GPU")
    return tries or ["fewer images per step"]


def _for_render(facts: Facts) -> list[str]:
    tries = []
    if facts.cuda and facts.backend != "triton":
        tries.append("augment.backend=triton")
    if facts.cuda and facts.geometry == "per_op":
        tries.append("augment.geometry=composed, which changes pixels slightly")
    if not facts.cuda and facts.threads < facts.cores:
        tries.append(f"train.threads={facts.cores}")
    return tries or (["a smaller augment.size"] if facts.cuda else ["a GPU, where views are rendered by Triton", "a smaller augment.size"])


def _for_network(facts: Facts) -> list[str]:
    tries = []
    if facts.cuda and facts.precision == "no":
        tries.append("train.precision=bf16")
    if not facts.cuda and facts.threads < facts.cores:
        tries.append(f"train.threads={facts.cores}")
    return tries or ["a larger batch, a smaller network or more devices: the data path has room"]


def _rate(facts: Facts, seconds: float) -> str:
    return f"{facts.images / seconds:,.0f}".replace(",", " ")
