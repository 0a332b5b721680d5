"""Write a trained model as one safetensors file and as ONNX, both checked.

    python -m video_mmit.export run_dir=DIR out=DIR

`model.safetensors` holds the weights and the configuration of model, transform and sampler; it
must give back the model bit for bit. `model.onnx` maps normalised clips of any number of videos
and the model's own number of frames to logits (batch norm folded into the convolutions); it must
agree with PyTorch. What was checked, and what a caller must know to prepare clips and to read the
logits, is written to `export.json`.

Letters: N videos, T frame positions, C channels, H W size, K classes.
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

from common.log import InputError, exit_on_bad_input, setup_logging
from common.rundir import environment, fingerprint, write_text
from video_mmit.weights import Trained, load_trained, save_release

BATCHES = (1, 2, 3)  # numbers of videos the ONNX file is tried with
INPUT, OUTPUT = "clip_NTCHW", "logit_NK"


@dataclass
class ExportConfig:
    """Schema of configs/export.yaml."""

    out: str = MISSING
    run_dir: str | None = None
    checkpoint: str | None = None
    onnx: bool = True
    opset: int = 20
    tolerance: float = 1e-4  # of ONNX, as a share of the largest logit
    seed: int = 0  # of the random input


ConfigStore.instance().store("mmit_export_schema", ExportConfig)


class Parity(NamedTuple):
    """Largest difference of the logits from PyTorch, and the largest logit it stands beside."""

    max_abs_diff: float
    max_abs: float

    @property
    def relative(self) -> float:
        """The difference as a share of the largest logit, which counts as 0.01 at least."""
        return self.max_abs_diff / max(self.max_abs, 0.01)


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
    if cfg.onnx:
        _check_repeatable(trained)
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(cfg.seed)
    release = out / "model.safetensors"
    save_release(trained, release)
    check_release(trained, release, random_clips(trained, 2), cfg.seed)
    result: dict[str, Any] = {
        "source": str(trained.source),
        "step": trained.step,
        "versions": environment()["versions"],
        "transform": trained.config["transform"],
        "sampler": trained.config["sampler"],
        "classes": list(trained.classes),
        "multi_label": trained.multi_label,
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


def _check_repeatable(trained: Trained) -> None:
    if any(getattr(module, "stochastic_eval", False) for module in trained.model.modules()):
        what = "draws frames at random, no file can agree with it (onnx=false leaves ONNX out)"
        raise InputError("model.trn.stochastic_eval", what, True)


def random_clips(trained: Trained, count: int) -> Tensor:
    """Noise as the network sees clips, (count, T, C, H, W) float32.

    Every frame is another one: a model that shifted the wrong way would not go unnoticed.
    """
    transform, sampler = trained.transform, trained.sampler
    frames = sampler.test(1).shape[1]  # T * length, whatever the length of the video
    size = transform.input_size
    clip_FHWC = np.zeros((frames, size, size, transform.planes), dtype=np.uint8)
    shape = transform.test(clip_FHWC).shape[1:]
    noise_NTCHW = torch.randint(256, (count, *shape), dtype=torch.uint8)
    x_NTCHW: Tensor = transform.normalize(noise_NTCHW)
    return x_NTCHW


@torch.inference_mode()
def check_release(trained: Trained, path: Path, x_NTCHW: Tensor, seed: int = 0) -> None:
    """Raise `InputError` unless the file gives back the weights and logits bit for bit."""
    again = load_trained(checkpoint=path)
    state, copy = trained.model.state_dict(), again.model.state_dict()
    different = [n for n in state.keys() | copy.keys() if not _equal(state.get(n), copy.get(n))]
    if different:
        raise InputError(path, "does not reproduce the weights", ", ".join(sorted(different)))
    logits = []
    for model in (trained.model, again.model):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # a TRN may draw its frames
            logits.append(model(x_NTCHW))
    if not _equal(*logits):
        raise InputError(path, "does not reproduce the logits of the model")


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and a.dtype == b.dtype and torch.equal(a, b)


def export_onnx(trained: Trained, path: Path, cfg: ExportConfig) -> dict[str, Any]:
    """Write the ONNX file and compare it with PyTorch.

    Raises:
        InputError: the logits differ by more than the tolerance; no file is left then.
    """
    model = trained.model.eval()
    part = path.with_name(path.name + ".tmp")
    path.unlink(missing_ok=True)
    clips = [random_clips(trained, count) for count in BATCHES]
    write_onnx(model, clips[1], part, cfg.opset)
    parity = compare(model, part, clips)
    if not parity.relative <= cfg.tolerance:
        part.unlink()
        what = f"{OUTPUT} differs from PyTorch by more than tolerance={cfg.tolerance}"
        raise InputError(path, what, parity.max_abs_diff)
    part.replace(path)
    return {
        "file": path.name,
        **fingerprint(path),
        "opset": cfg.opset,
        "input": {INPUT: ["batch", *clips[0].shape[1:]]},
        "output": {OUTPUT: ["batch", len(trained.classes)]},
        **parity._asdict(),
        "tolerance": cfg.tolerance,
        "batches": list(BATCHES),
    }


def write_onnx(model: nn.Module, x_NTCHW: Tensor, path: Path, opset: int) -> None:
    """Export with any number of videos; T, C, H and W are those of `x_NTCHW`, two videos or more.

    A batch of one would be taken for a constant.
    """
    batch = ({0: torch.export.Dim.DYNAMIC},)
    # Strict: eager tracing would turn len(x_NTCHW) into a constant.
    program = torch.export.export(model, (x_NTCHW,), dynamic_shapes=batch, strict=True)
    torch.onnx.export(
        program,
        f=path,
        dynamo=True,
        opset_version=opset,
        external_data=False,
        verbose=False,
        input_names=[INPUT],
        output_names=[OUTPUT],
    )


@torch.inference_mode()
def compare(model: nn.Module, path: Path, clips: Sequence[Tensor]) -> Parity:
    """Run both on every batch of clips; the worst case.

    Raises:
        InputError: the file gives logits of another shape.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    worst = Parity(0.0, 0.0)
    for x_NTCHW in clips:
        wanted_NK = model(x_NTCHW).numpy()
        (found_NK,) = session.run([OUTPUT], {INPUT: x_NTCHW.numpy()})
        if found_NK.shape != wanted_NK.shape:
            what = f"{OUTPUT} has shape {found_NK.shape}, PyTorch has"
            raise InputError(path, what, wanted_NK.shape)
        now = (np.abs(found_NK - wanted_NK).max(), np.abs(wanted_NK).max())
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
