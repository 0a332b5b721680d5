"""Write a trained detector as one safetensors file and as ONNX, both checked.

    python -m detection_tsd.export run_dir=DIR out=DIR [height=800 width=1344]

`model.safetensors` holds the configuration of model and transform and the weights, without the
sibling heads that only training needs; it must give the same weights and the same detections bit
for bit. `model.onnx` is the whole detector for one image of a fixed size, from the normalised
image (and proposals, where there is no RPN) to its detections, masks included. A suppression other
than the hard one has no graph: the file then ends with probabilities and boxes of all regions
(`PostProcess.decoded` goes on from there). The detections must agree with PyTorch's. `export.json`
states what was checked, and what a caller must know to prepare images and to read the detections.

Letters: H W size of the input, M proposals, D detections.
"""

import importlib.util
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import numpy as np
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig
from rich.console import Console
from rich.table import Table
from torch import Tensor

from common.log import InputError, exit_on_bad_input, setup_logging
from common.rundir import environment, fingerprint, write_text
from detection_tsd.data.detection_data import Detections
from detection_tsd.models.detector import TwoStage
from detection_tsd.models.tsd_head import TSDHead, strip
from detection_tsd.onnx_network import DETECTIONS, IMAGE, MASKS, PROPOSALS, SIZE, Network
from detection_tsd.onnx_network import write_onnx as write_graph
from detection_tsd.weights import Trained, load_trained, release_config, write_release

SIBLING_OFF = {"joint": False, "margin_cls": None, "margin_box": None}
SMALL_SIDE = 256  # height and width for a detector that takes pictures as they are
EXAMPLES = 60  # proposals that a file is tried with

USE = (
    "boxes are x1, y1, x2, y2 in pixels of the input, width = x2 - x1: divide by the scale of the "
    "picture (x, y); label k is classes[k - 1]; rows with the score 0, at the end, are no detection"
)
REGION_USE = (
    "probability of each class (0 is the background) and its box, for every region: cut the boxes "
    "at the valid part, then suppress within classes as `post` says"
)


@dataclass
class ExportConfig:
    """Schema of configs/export.yaml."""

    out: str = MISSING
    run_dir: str | None = None
    checkpoint: str | None = None
    onnx: bool = True
    height: int | None = None  # of the ONNX input; null: what pictures of the test are padded to
    width: int | None = None
    opset: int = 20
    optimize: bool = True  # fold constants of the ONNX graph; other runtimes do so as well
    tolerance: float = 1e-4  # of ONNX: in score, and of boxes as a share of the longer side
    # Share of detections that may have no partner: rounding decides between equal proposals.
    unmatched: float = 0.02
    seed: int = 0  # of the random images


ConfigStore.instance().store("tsd_export_schema", ExportConfig)


class Example(NamedTuple):
    """Input of a detector: a normalised image, its valid part, and proposals or None."""

    image_13HW: Tensor
    size_2: Tensor
    proposals_M4: Tensor | None


class Parity(NamedTuple):
    """How the detections of two networks differ; the differences are those of partners."""

    detections: int
    unmatched: int
    max_box_diff: float
    max_score_diff: float


def export(cfg: ExportConfig) -> dict[str, Any]:
    """Write and check the files `cfg` asks for; returns what `export.json` holds.

    Raises:
        InputError: nothing to load, a missing package, a size that is not accepted, or a file that
            does not reproduce the detector.
    """
    if cfg.onnx:
        check_installed()
    trained = load_trained(cfg.run_dir, cfg.checkpoint)
    size = _check(cfg, trained)
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    examples = make_examples(trained, size, cfg.seed)
    release = out / "model.safetensors"
    save_stripped(trained, release)
    check_release(trained, release, examples)
    small = load_trained(checkpoint=release)
    result: dict[str, Any] = {
        "source": str(trained.source),
        "step": trained.step,
        "trained_on": trained.config["train_set"],
        "classes": list(trained.classes),
        "class_ids": list(trained.class_ids),
        "versions": environment()["versions"],
        "input": trained.transform.contract(),
        "post": {**trained.config["model"]["post"], "_target_": None},
        "parameters": {"training": count(trained.model), "release": count(small.model)},
        "safetensors": {"file": release.name, **fingerprint(release), "bitwise_equal": True},
        "onnx": export_onnx(small, out / "model.onnx", examples, cfg) if cfg.onnx else None,
    }
    del result["post"]["_target_"]
    write_text(out / "export.json", json.dumps(result, indent=1) + "\n")
    return result


def check_installed() -> None:
    """Raise `InputError` unless the packages of the extra `export` are there."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(name) is None:
            what = "not installed (onnx=false leaves it out): pip install 'vision-tasks[export]'"
            raise InputError(name, what)


def _check(cfg: ExportConfig, trained: Trained) -> tuple[int, int]:
    """Height and width of the input."""
    if cfg.tolerance < 0:
        raise InputError("tolerance", "must not be negative", cfg.tolerance)
    if not 0 <= cfg.unmatched < 1:
        raise InputError("unmatched", "must be in [0, 1)", cfg.unmatched)
    transform = trained.transform
    sides = {"height": cfg.height, "width": cfg.width}
    usual = (SMALL_SIDE, SMALL_SIDE)
    if not transform.keep_size:
        usual = (transform.test_short, transform.test_long)
    size = []
    for (name, side), default in zip(sides.items(), usual, strict=True):
        side = -(-default // transform.divisor) * transform.divisor if side is None else side
        if side < 1 or side % transform.divisor:
            raise InputError(name, f"must be a multiple of {transform.divisor}", side)
        size.append(side)
    return size[0], size[1]


def count(model: torch.nn.Module) -> int:
    """Parameters of a network."""
    return sum(parameter.numel() for parameter in model.parameters())


def save_stripped(trained: Trained, path: Path) -> None:
    """Write a release without what only training needs."""
    config = release_config(trained.config)
    config["model"] = without_sibling(config["model"])
    write_release(strip(trained.model.state_dict()), config, trained.step, path)


def without_sibling(node: Any) -> Any:
    """A model node whose TSD heads have no sibling head and no progressive constraint."""
    if isinstance(node, Mapping):
        clean = {key: without_sibling(value) for key, value in node.items()}
        name = f"{TSDHead.__module__}.{TSDHead.__qualname__}"
        return {**clean, **SIBLING_OFF} if node.get("_target_") == name else clean
    return [without_sibling(item) for item in node] if isinstance(node, list) else node


def make_examples(trained: Trained, size: tuple[int, int], seed: int) -> list[Example]:
    """Noise of the given size as the network sees it, once with a part that is padding.

    Blocks of 8 pixels have one colour, so that maps of all strides see something.
    """
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for height, width in (size, (max(1, size[0] * 3 // 4), max(1, size[1] * 4 // 5))):
        cells = (1, 3, -(-size[0] // 8), -(-size[1] // 8))
        noise = torch.randint(256, cells, generator=generator, dtype=torch.uint8)
        image_13HW = noise.repeat_interleave(8, 2).repeat_interleave(8, 3)
        size_12 = torch.tensor([[height, width]])
        x_13HW = trained.transform.normalize(image_13HW[:, :, : size[0], : size[1]], size_12)
        corner_M2 = torch.rand(EXAMPLES, 2, 2, generator=generator) * torch.tensor([width, height])
        box_M4 = torch.cat((corner_M2.amin(dim=1), corner_M2.amax(dim=1)), dim=1)
        proposals = box_M4 if trained.model.rpn is None else None
        examples.append(Example(x_13HW, size_12[0], proposals))
    # Another number of proposals: the file must not have made it a constant.
    last = examples[-1]
    if last.proposals_M4 is not None:
        examples[-1] = last._replace(proposals_M4=last.proposals_M4[: EXAMPLES // 3])
    return examples


@torch.inference_mode()
def detect(model: TwoStage, example: Example) -> Detections:
    """Detections of an example."""
    image_13HW, size_2, box_M4 = example
    found: Any = model(image_13HW, size_2[None], proposals=None if box_M4 is None else [box_M4])
    detections: Detections = found[0]
    return detections


def check_release(trained: Trained, path: Path, examples: Sequence[Example]) -> None:
    """Raise `InputError` unless the file gives back weights and detections bit for bit."""
    again = load_trained(checkpoint=path)
    state, copy = strip(trained.model.state_dict()), again.model.state_dict()
    different = [n for n in state.keys() | copy.keys() if not _equal(state.get(n), copy.get(n))]
    if different:
        raise InputError(path, "does not reproduce the weights", ", ".join(sorted(different)))
    if again.transform.contract() != trained.transform.contract():
        found = again.transform.contract()
        raise InputError(path, "does not reproduce how images are prepared", found)
    for example in examples:
        pair = [detect(one.model, example) for one in (trained, again)]  # type: ignore[arg-type]
        if not all(_equal(a, b) for a, b in zip(*pair, strict=True)):
            raise InputError(path, "does not reproduce the detections of the model")


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and torch.equal(a, b)


def export_onnx(
    trained: Trained, path: Path, examples: Sequence[Example], cfg: ExportConfig
) -> dict[str, Any]:
    """Write the ONNX file and compare its detections with PyTorch's.

    Raises:
        InputError: too many detections have no partner; no file is left then.
    """
    model: Any = trained.model
    network = Network(model, suppress=model.post.nms == "hard").eval()
    part = path.with_name(path.name + ".tmp")
    path.unlink(missing_ok=True)
    try:
        example = tuple(x for x in examples[0] if x is not None)
        write_graph(network, example, part, cfg.opset, cfg.optimize)
        parity = compare(network, part, examples, cfg.tolerance)
        if parity.unmatched > cfg.unmatched * parity.detections:
            what = f"of {parity.detections} detections differ from PyTorch's by more than"
            raise InputError(path, f"{parity.unmatched} {what} tolerance={cfg.tolerance}")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return {
        "file": path.name,
        **fingerprint(path),
        "opset": cfg.opset,
        "input": describe_input(network, examples[0]),
        "output": describe_output(network),
        "use": USE if network.suppress else REGION_USE,
        **parity._asdict(),
        "tolerance": cfg.tolerance,
        "proposals_tried": [
            None if example.proposals_M4 is None else len(example.proposals_M4)
            for example in examples
        ],
    }


def describe_input(network: Network, example: Example) -> dict[str, Any]:
    """Shape of every input by its name; the image is normalised, 0 outside of its valid part."""
    shapes: dict[str, Any] = {IMAGE: list(example.image_13HW.shape), SIZE: [2]}
    return shapes | ({PROPOSALS: ["proposals", 4]} if PROPOSALS in network.inputs else {})


def describe_output(network: Network) -> dict[str, Any]:
    """Shape of every output by its name."""
    rows = network.detector.post.per_image
    columns: dict[str, list[Any]] = {DETECTIONS[0]: [rows, 4], MASKS: [rows, "side", "side"]}
    regions = {"prob_MK": ["regions", "classes"], "box_MK4": ["regions", "classes", 4]}
    return {name: (columns | regions).get(name, [rows]) for name in network.outputs}


def compare(network: Network, path: Path, examples: Sequence[Example], tolerance: float) -> Parity:
    """Detections of the file and of the detector on every example."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it reports constants that it does not fold
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    parts = []
    for example in examples:
        given = [x.numpy() for x in example if x is not None]
        found = session.run(None, dict(zip(network.inputs, given, strict=True)))
        own = from_outputs(network, found, example)
        pixels = tolerance * max(example.image_13HW.shape[2:])
        parts.append(partners(detect(network.detector, example), own, pixels, tolerance))
    return Parity(
        sum(part.detections for part in parts),
        sum(part.unmatched for part in parts),
        max(part.max_box_diff for part in parts),
        max(part.max_score_diff for part in parts),
    )


def from_outputs(network: Network, found: Sequence[np.ndarray], example: Example) -> Detections:
    """What the outputs of a file say, as a detector says it."""
    outputs = [torch.from_numpy(np.asarray(value)) for value in found]
    if not network.suppress:
        height, width = example.size_2.tolist()
        return network.detector.select(outputs[0], outputs[1], (height, width))
    real_D = outputs[1] > 0
    return Detections(*(value[real_D] for value in outputs))


def partners(a: Detections, b: Detections, pixels: float, tolerance: float) -> Parity:
    """Match detections of the same class, box and score, whatever their order.

    Scores that differ in their last bit may change places. A detection of either side without a
    partner counts as unmatched; a side of a box may be off by `pixels`, a score and the mean of a
    mask by `tolerance`.
    """
    box_AB = (a.box_D4[:, None] - b.box_D4[None]).abs().amax(dim=2)
    score_AB = (a.score_D[:, None] - b.score_D[None]).abs()
    good_AB = (box_AB <= pixels) & (score_AB <= tolerance)
    good_AB &= a.label_D[:, None] == b.label_D[None]
    if a.mask_DSS is not None and b.mask_DSS is not None:
        mask_AB = (a.mask_DSS.flatten(1)[:, None] - b.mask_DSS.flatten(1)[None]).abs()
        good_AB &= mask_AB.mean(dim=2) <= tolerance
    lonely = int((~good_AB.any(dim=1)).sum()), int((~good_AB.any(dim=0)).sum())
    worst = [float(x_AB[good_AB].max()) if good_AB.any() else 0.0 for x_AB in (box_AB, score_AB)]
    return Parity(max(len(a.score_D), len(b.score_D)), max(lonely), *worst)


def show(result: dict[str, Any], out: Path) -> None:
    """Print the files and how they were checked."""
    table = Table("file", "MB", "checked", title=str(out))
    weights, onnx, sizes = result["safetensors"], result["onnx"], result["parameters"]
    said = f"weights and detections bitwise equal; {sizes['release']:,} parameters"
    if sizes["training"] > sizes["release"]:
        said += f" of {sizes['training']:,} in training"
    table.add_row(weights["file"], f"{weights['bytes'] / 1e6:.2f}", said)
    if onnx is not None:
        matched = onnx["detections"] - onnx["unmatched"]
        said = (
            f"{matched} of {onnx['detections']} detections equal to PyTorch's within "
            f"{onnx['max_box_diff']:.2g} px and {onnx['max_score_diff']:.2g} in score"
        )
        table.add_row(onnx["file"], f"{onnx['bytes'] / 1e6:.2f}", said)
    Console().print(table)


@hydra.main(version_base=None, config_path="configs", config_name="export")
def main(cfg: DictConfig) -> None:
    setup_logging(rank=0)
    for name in ("onnxscript", "onnx_ir", "torch.onnx"):  # they report every rewritten node
        logging.getLogger(name).setLevel(logging.WARNING)
    show(export(cfg), Path(cfg.out))  # type: ignore[arg-type]


if __name__ == "__main__":
    exit_on_bad_input(main)
