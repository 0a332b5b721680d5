"""Write a trained model as one safetensors file and as ONNX, both checked.

    python -m reid_rqen.export run_dir=DIR out=DIR

`model.safetensors` holds the weights without classifiers and the configuration of model and
transform; it must give back the model bit for bit. `model.onnx` maps normalised frames to region
features and scores (batch norm folded into the convolutions), or, for a sequence model, tracklets
of `frames` frames to their embeddings; it must agree with PyTorch. What was checked is written to
`export.json`.

Letters: B frames or S tracklets of T frames, C channels, H W size, R regions, D embedding.
"""

import importlib.util
import json
import logging
from collections.abc import Sequence
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
from torch import Tensor, nn

from common.log import InputError, exit_on_bad_input, get_logger, setup_logging
from common.rundir import environment, fingerprint, write_text
from reid_rqen.data.transforms import FlowTransform
from reid_rqen.weights import Trained, load_trained, save_release

BATCHES = (1, 2, 5)  # sizes the ONNX file is tried with


@dataclass
class ExportConfig:
    """Schema of configs/export.yaml."""

    out: str = MISSING
    run_dir: str | None = None
    checkpoint: str | None = None
    onnx: bool = True
    opset: int = 20
    frames: int = 8  # of a tracklet, for sequence models
    tolerance: float = 1e-4  # of ONNX, as a share of the largest output
    seed: int = 0  # of the random input


ConfigStore.instance().store("rqen_export_schema", ExportConfig)


class Exported(nn.Module):
    """What the ONNX file computes: the outputs of evaluation as one tuple."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        framewise = hasattr(model, "frames")
        self.input = "image_BCHW" if framewise else "image_STCHW"
        self.outputs = ("region_BRC", "score_BR") if framewise else ("vector",)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Region features and scores of frames, or the embeddings of tracklets."""
        if hasattr(self.model, "frames"):
            out: tuple[Tensor, ...] = tuple(self.model.frames(image))
            return out
        return (self.model.sequences(image),)


class Parity(NamedTuple):
    """Largest difference of one output from PyTorch, and the largest value it stands beside."""

    max_abs_diff: float
    max_abs: float

    @property
    def relative(self) -> float:
        """The difference as a share of the largest value, which counts as 0.01 at least.

        A quality head may call random pictures all but worthless: scores of 1e-5 whose rounding
        is a large share of them and means nothing.
        """
        return self.max_abs_diff / max(self.max_abs, 0.01)


def export(cfg: ExportConfig) -> dict[str, Any]:
    """Write and check the files `cfg` asks for; returns what `export.json` holds.

    Raises:
        InputError: nothing to load, a missing package, or a file that does not reproduce the model.
    """
    if cfg.frames < 1 or cfg.tolerance < 0:
        found = (cfg.frames, cfg.tolerance)
        raise InputError("frames, tolerance", "must be at least 1 and not negative", found)
    if cfg.onnx:
        check_installed()
    trained = load_trained(cfg.run_dir, cfg.checkpoint)
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(cfg.seed)
    shape = input_shape(trained, cfg.frames)
    release = out / "model.safetensors"
    save_release(trained, release)
    check_release(trained, release, random_input(trained, 2, cfg.frames))
    result: dict[str, Any] = {
        "source": str(trained.source),
        "step": trained.step,
        "versions": environment()["versions"],
        "safetensors": {"file": release.name, **fingerprint(release), "bitwise_equal": True},
        "onnx": export_onnx(trained, out / "model.onnx", shape, cfg) if cfg.onnx else None,
    }
    write_text(out / "export.json", json.dumps(result, indent=1) + "\n")
    return result


def check_installed() -> None:
    """Raise `InputError` unless the packages of the extra `export` are there."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(name) is None:
            what = "not installed (onnx=false leaves it out): pip install 'vision-tasks[export]'"
            raise InputError(name, what)


def input_shape(trained: Trained, frames: int) -> tuple[int, ...]:
    """Shape of one frame (C, H, W), or of one tracklet (T, C, H, W) for sequence models."""
    transform = trained.transform
    size = transform.crop if isinstance(transform, FlowTransform) else transform.size
    frame = (transform.channels, *size)
    return frame if hasattr(trained.model, "frames") else (frames, *frame)


def random_input(trained: Trained, count: int, frames: int) -> Tensor:
    """Noise as the network sees pictures, (count, C, H, W), or tracklets (count, T, C, H, W)."""
    shape = (count, *input_shape(trained, frames))
    if isinstance(trained.transform, FlowTransform):
        return torch.randn(shape)
    image: Tensor = trained.transform.normalize(torch.randint(256, shape, dtype=torch.uint8))
    return image


@torch.inference_mode()
def check_release(trained: Trained, path: Path, image: Tensor) -> None:
    """Raise `InputError` unless the file gives back the weights and outputs bit for bit."""
    again = load_trained(checkpoint=path)
    state, copy = trained.model.state_dict(), again.model.state_dict()
    different = [n for n in state.keys() | copy.keys() if not _equal(state.get(n), copy.get(n))]
    if different:
        raise InputError(path, "does not reproduce the weights", ", ".join(sorted(different)))
    pairs = zip(Exported(trained.model)(image), Exported(again.model)(image), strict=True)
    if not all(_equal(ours, theirs) for ours, theirs in pairs):
        raise InputError(path, "does not reproduce the outputs of the model")


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and a.dtype == b.dtype and torch.equal(a, b)


def export_onnx(
    trained: Trained, path: Path, shape: tuple[int, ...], cfg: ExportConfig
) -> dict[str, Any] | None:
    """Write the ONNX file and compare it with PyTorch; None when a sequence model has no ONNX form.

    Raises:
        InputError: the outputs differ by more than the tolerance; no file is left then.
    """
    module = Exported(trained.model).eval()
    part = path.with_name(path.name + ".tmp")
    path.unlink(missing_ok=True)
    try:
        write_onnx(module, random_input(trained, 2, cfg.frames), part, cfg.opset)
    except (torch.onnx.OnnxExporterError, torch._dynamo.exc.TorchDynamoException) as error:
        if hasattr(trained.model, "frames"):
            raise
        name = type(trained.model).__name__
        get_logger(__name__).debug("%s: no ONNX", name, exc_info=error)
        get_logger(__name__).warning("%s has no ONNX form: only safetensors was written", name)
        return None
    inputs = [random_input(trained, size, cfg.frames) for size in BATCHES]
    parity = compare(module, part, inputs)
    wrong = [name for name, value in parity.items() if not value.relative <= cfg.tolerance]
    if wrong:
        part.unlink()
        what = f"{wrong[0]} differs from PyTorch by more than tolerance={cfg.tolerance}"
        raise InputError(path, what, parity[wrong[0]].max_abs_diff)
    part.replace(path)
    return {
        "file": path.name,
        **fingerprint(path),
        "opset": cfg.opset,
        "input": {module.input: ["batch", *shape]},
        "outputs": {name: value._asdict() for name, value in parity.items()},
        "max_abs_diff": max(value.max_abs_diff for value in parity.values()),
        "tolerance": cfg.tolerance,
        "batches": list(BATCHES),
    }


def write_onnx(module: Exported, image: Tensor, path: Path, opset: int) -> None:
    """Export with a batch of any size."""
    batch = {"image": {0: torch.export.Dim.DYNAMIC}}
    # Strict: eager tracing would turn len(image) into a constant.
    program = torch.export.export(module, (image,), dynamic_shapes=batch, strict=True)
    torch.onnx.export(
        program,
        f=path,
        dynamo=True,
        opset_version=opset,
        external_data=False,
        verbose=False,
        input_names=[module.input],
        output_names=module.outputs,
    )


@torch.inference_mode()
def compare(module: Exported, path: Path, inputs: Sequence[Tensor]) -> dict[str, Parity]:
    """Run both on every input; the worst case of every output."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    worst = dict.fromkeys(module.outputs, Parity(0.0, 0.0))
    for image in inputs:
        wanted = [value.numpy() for value in module(image)]
        found = session.run(list(module.outputs), {module.input: image.numpy()})
        for name, ours, theirs in zip(module.outputs, wanted, found, strict=True):
            if ours.shape != theirs.shape:
                raise InputError(path, f"{name} has shape {theirs.shape}, PyTorch has", ours.shape)
            now = Parity(float(np.abs(ours - theirs).max()), float(np.abs(ours).max()))
            worst[name] = Parity(*np.maximum(worst[name], now).tolist())
    return worst


def show(result: dict[str, Any], out: Path) -> None:
    """Print the files and how they were checked."""
    table = Table("file", "MB", "checked")
    weights, onnx = result["safetensors"], result["onnx"]
    table.add_row(weights["file"], f"{weights['bytes'] / 1e6:.2f}", "bitwise equal to the run")
    if onnx is not None:
        said = f"max abs difference {onnx['max_abs_diff']:.3g} from PyTorch"
        table.add_row(onnx["file"], f"{onnx['bytes'] / 1e6:.2f}", said)
    table.title = str(out)
    Console().print(table)


@hydra.main(version_base=None, config_path="configs", config_name="export")
def main(cfg: DictConfig) -> None:
    setup_logging(rank=0)
    for name in ("onnxscript", "onnx_ir", "torch.onnx"):  # they report every rewritten node
        logging.getLogger(name).setLevel(logging.WARNING)
    show(export(cfg), Path(cfg.out))  # type: ignore[arg-type]


if __name__ == "__main__":
    exit_on_bad_input(main)
