"""Write a trained network as one safetensors file and as ONNX, both checked.

    python -m face_lfr.export run_dir=DIR out=DIR

`model.safetensors` holds the weights, without the classifier of the training, and the configuration
of model and transform; it must give back the network bit for bit. `model.onnx` maps normalised
images to the test feature (`embed`), or to the score of a quality network; batch norm is folded
into the convolutions, and the file must agree with PyTorch. `export.json` states what was checked,
and all that a caller must know to prepare images and to compare features.

Letters: B images, C channels, H W size, D embedding width.
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
from face_lfr.data.align import template
from face_lfr.engine import check_fits
from face_lfr.models.fold import folded
from face_lfr.weights import Trained, load_trained, save_release

BATCHES = (1, 2, 5)  # sizes the ONNX file is tried with
FLOOR = 1e-4
INPUT = "image_BCHW"
OUTPUT = {"embedding": "feature_BD", "quality": "score_B"}
MIRROR = (
    "feature of a face: mean of the outputs for its input and for the input mirrored left to right "
    "(behind crop and resize); faces are compared by the cosine of their features"
)
NO_MIRROR = "score of a face: the output for its input, without a mirror image; greater is better"


@dataclass
class ExportConfig:
    """Schema of configs/export.yaml."""

    out: str = MISSING
    run_dir: str | None = None
    checkpoint: str | None = None
    onnx: bool = True
    opset: int = 20
    tolerance: float = 1e-4  # of ONNX, as a share of the largest number of the output
    seed: int = 0  # of the random input


ConfigStore.instance().store("lfr_export_schema", ExportConfig)


class Exported(nn.Module):
    """What the ONNX file computes: (B, 3, S, S) -> test features (B, D), or scores (B,)."""

    def __init__(self, model: nn.Module, kind: str) -> None:
        super().__init__()
        self.model, self.kind = model, kind

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """The test feature, which training may follow by a norm; or the score."""
        run: Any = self.model.embed if self.kind == "embedding" else self.model
        output: Tensor = run(image_BCHW)
        return output


class Parity(NamedTuple):
    """Largest difference from PyTorch, and the largest number it stands beside."""

    max_abs_diff: float
    max_abs: float

    @property
    def relative(self) -> float:
        """The difference as a share of the largest number.

        That counts as `FLOOR` at least: scores of noise may all but cancel out.
        """
        return self.max_abs_diff / max(self.max_abs, FLOOR)


def export(cfg: ExportConfig) -> dict[str, Any]:
    """Write and check the files `cfg` asks for; returns what `export.json` holds.

    Raises:
        InputError: nothing to load, a missing package, or a file that does not reproduce the model.
    """
    if cfg.tolerance < 0:
        raise InputError("tolerance", "must not be negative", cfg.tolerance)
    if cfg.onnx:
        check_installed()
    trained = load_trained(cfg.run_dir, cfg.checkpoint)
    check_fits(trained.model, trained.transform)
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(cfg.seed)
    release = out / "model.safetensors"
    save_release(trained, release)
    check_release(trained, release, random_images(trained, 2))
    result: dict[str, Any] = {
        "source": str(trained.source),
        "step": trained.step,
        "kind": trained.kind,
        "trained_on": trained.config["train_set"],
        "versions": environment()["versions"],
        "input": describe_input(trained),
        "output": describe_output(trained),
        "safetensors": {"file": release.name, **fingerprint(release), "bitwise_equal": True},
        "onnx": export_onnx(trained, out / "model.onnx", cfg) if cfg.onnx else None,
    }
    write_text(out / "export.json", json.dumps(result, indent=1) + "\n")
    return result


def check_installed() -> None:
    """Raise `InputError` unless the packages of the extra `export` are there."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(name) is None:
            what = "not installed (onnx=false leaves it out): pip install 'vision-tasks[export]'"
            raise InputError(name, what)


def describe_input(trained: Trained) -> dict[str, Any]:
    """How an image becomes the input of the network, in the order of the steps."""
    transform = trained.transform
    low, high = sorted((v - transform.centre) / transform.scale for v in (0, 255))
    return {
        "aligned_size": transform.size,
        "landmarks": [list(point) for point in template(transform.size).round(4).tolist()],
        "colour": transform.colour,
        "crop": "first row and first column dropped" if transform.crop_first else "none",
        "resize": transform.resize,
        "resize_mode": None if transform.resize is None else transform.resize_mode,
        "values": {
            "centre": transform.centre,
            "scale": transform.scale,
            "map": f"(v - {transform.centre:g}) / {transform.scale:g}, v in 0..255",
            "range": [low, high],
        },
        "size": transform.input_size,
        "contract": transform.contract(),
    }


def describe_output(trained: Trained) -> dict[str, Any]:
    """What comes out, and what a caller does with it."""
    if trained.kind == "quality":
        return {"features": width(trained), "flip_averaging": False, "use": NO_MIRROR}
    return {"features": width(trained), "flip_averaging": True, "use": MIRROR}


def width(trained: Trained) -> int:
    """D of a recogniser; a quality network has one number."""
    return int(getattr(trained.model, "features", 1))


def random_images(trained: Trained, count: int) -> Tensor:
    """Noise as the network sees images, (count, 3, S, S) float32."""
    size = trained.transform.size
    noise_BCHW = torch.randint(256, (count, 3, size, size), dtype=torch.uint8)
    image_BCHW: Tensor = trained.transform.normalize(noise_BCHW)
    return image_BCHW


@torch.inference_mode()
def check_release(trained: Trained, path: Path, image_BCHW: Tensor) -> None:
    """Raise `InputError` unless the file gives back weights and outputs bit for bit."""
    again = load_trained(checkpoint=path)
    state, copy = trained.model.state_dict(), again.model.state_dict()
    different = [n for n in state.keys() | copy.keys() if not _equal(state.get(n), copy.get(n))]
    if different:
        raise InputError(path, "does not reproduce the weights", ", ".join(sorted(different)))
    if again.transform.contract() != trained.transform.contract():
        found = again.transform.contract()
        raise InputError(path, "does not reproduce how images are prepared", found)
    outputs = [Exported(one.model, one.kind)(image_BCHW) for one in (trained, again)]
    if not _equal(*outputs):
        raise InputError(path, "does not reproduce the output of the model")


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and a.dtype == b.dtype and torch.equal(a, b)


def export_onnx(trained: Trained, path: Path, cfg: ExportConfig) -> dict[str, Any]:
    """Write the ONNX file and compare it with PyTorch.

    With folded norms when these can be folded and agree; else with the network as it is.

    Raises:
        InputError: the output differs by more than the tolerance; no file is left then.
    """
    plain, output = Exported(trained.model, trained.kind).eval(), OUTPUT[trained.kind]
    part = path.with_name(path.name + ".tmp")
    path.unlink(missing_ok=True)
    images = [random_images(trained, count) for count in BATCHES]
    try:
        for is_folded, module in _candidates(trained, plain):
            write_onnx(module, images[1], part, output, cfg.opset)
            parity = compare(plain, part, images, output)
            if parity.relative <= cfg.tolerance:
                part.replace(path)
                break
            if is_folded:
                message = "%s: folded norms differ by %.3g, they are left as they are"
                get_logger(__name__).warning(message, path, parity.max_abs_diff)
        else:
            what = f"{output} differs from PyTorch by more than tolerance={cfg.tolerance}"
            raise InputError(path, what, parity.max_abs_diff)
    finally:
        part.unlink(missing_ok=True)
    columns = [] if trained.kind == "quality" else [width(trained)]
    return {
        "file": path.name,
        **fingerprint(path),
        "opset": cfg.opset,
        "input": {INPUT: ["batch", *images[0].shape[1:]]},
        "output": {output: ["batch", *columns]},
        "folded": is_folded,
        **parity._asdict(),
        "tolerance": cfg.tolerance,
        "batches": list(BATCHES),
    }


def _candidates(trained: Trained, plain: Exported) -> Sequence[tuple[bool, Exported]]:
    try:
        module = Exported(folded(trained.model), trained.kind).eval()
    except ValueError as error:
        get_logger(__name__).warning("norms are left as they are: %s", error)
        return [(False, plain)]
    return [(True, module), (False, plain)]


def write_onnx(module: nn.Module, image_BCHW: Tensor, path: Path, output: str, opset: int) -> None:
    """Export with a batch of any size, from one of two images or more.

    A batch of one would be taken for a constant.
    """
    batch = ({0: torch.export.Dim.DYNAMIC},)
    # Strict: eager tracing would turn len(image) into a constant.
    program = torch.export.export(module, (image_BCHW,), dynamic_shapes=batch, strict=True)
    torch.onnx.export(
        program,
        f=path,
        dynamo=True,
        opset_version=opset,
        external_data=False,
        verbose=False,
        input_names=[INPUT],
        output_names=[output],
    )


@torch.inference_mode()
def compare(module: nn.Module, path: Path, images: Sequence[Tensor], output: str) -> Parity:
    """Run both on every batch; the worst case.

    Raises:
        InputError: the file gives an output of another shape.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    worst = Parity(0.0, 0.0)
    for image_BCHW in images:
        wanted = module(image_BCHW).numpy()
        (found,) = session.run([output], {INPUT: image_BCHW.numpy()})
        if found.shape != wanted.shape:
            raise InputError(path, f"{output} has shape {found.shape}, PyTorch has", wanted.shape)
        now = (np.abs(found - wanted).max(), np.abs(wanted).max())
        worst = Parity(*np.maximum(worst, now).tolist())
    return worst


def show(result: dict[str, Any], out: Path) -> None:
    """Print the files and how they were checked."""
    table = Table("file", "MB", "checked", title=str(out))
    weights, onnx = result["safetensors"], result["onnx"]
    table.add_row(weights["file"], f"{weights['bytes'] / 1e6:.2f}", "bitwise equal to the run")
    if onnx is not None:
        said = f"max abs difference {onnx['max_abs_diff']:.3g} from PyTorch"
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
