"""Weights on disk: starting weights, trained runs, and the one-file release format.

A release is one safetensors file. Its metadata holds the nodes `model` and `transform` of the run's
configuration and the names of the classes, so that the file alone can be evaluated.
"""

import inspect
import json
from collections.abc import Iterator, Mapping
from copy import deepcopy
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from common.checkpoint import load_model, newest
from common.log import InputError, get_logger

# A configuration that arrives with weights may build these and nothing else.
TRUSTED = (
    "detection_tsd.models.", "detection_tsd.matching.", "detection_tsd.postprocess.",
    "detection_tsd.data.transforms.",
)  # fmt: skip
NODES = ("model", "transform")
FACTS = ("train_set", "num_classes", "classes", "class_ids", "seed")
# What stays new when a run starts from weights for other classes.
CLASS_PARTS = ("head.", "heads.", "mask.")


class Trainee(nn.Module):
    """What a checkpoint of a training holds: the detector, and the average of its weights."""

    def __init__(self, model: nn.Module, decay: float | None = None):
        super().__init__()
        self.model, self.average = model, None
        if decay is not None:
            rule = get_ema_multi_avg_fn(decay)
            self.average = AveragedModel(model, multi_avg_fn=rule, use_buffers=True)
            self.average.requires_grad_(False)

    def update_average(self) -> None:
        """After a step of the optimizer."""
        if self.average is not None:
            self.average.update_parameters(self.model)

    @property
    def best(self) -> nn.Module:
        """The average when there is one, else the detector."""
        found: nn.Module = self.model if self.average is None else self.average.module
        return found


class Trained(NamedTuple):
    """A detector in evaluation mode, how its images are made, and where it came from."""

    model: nn.Module
    transform: Any
    config: dict[str, Any]
    step: int
    source: Path

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the foreground classes; label k is classes[k - 1]."""
        return tuple(self.config["classes"])

    @property
    def class_ids(self) -> tuple[Any, ...]:
        """What the files of the data set call them."""
        return tuple(self.config["class_ids"])


def open_trained(path: Path | str, device: torch.device | str = "cpu", **post: Any) -> Trained:
    """Load a release file, a `step_XXXXXXXX` folder, or the newest checkpoint of a run folder.

    Raises:
        InputError: it is none of these.
    """
    path = Path(path)
    if path.is_file() or path.name.startswith("step_"):
        return load_trained(checkpoint=path, device=device, **post)
    if not path.is_dir():
        raise InputError(path, "no such file or folder")
    return load_trained(run_dir=path, device=device, **post)


def load_trained(
    run_dir: Path | str | None = None,
    checkpoint: Path | str | None = None,
    device: torch.device | str = "cpu",
    **post: Any,
) -> Trained:
    """Load a detector for evaluation.

    Args:
        run_dir: a run folder; its newest complete checkpoint is read.
        checkpoint: a `step_XXXXXXXX` folder of a run, or a release file (`export`).
        device: where the detector goes.
        post: arguments of `PostProcess` that replace those of the configuration, for instance
            `score_threshold=0.05`.

    Raises:
        InputError: nothing or both given, no such file, not one of ours, weights that do not fit.
    """
    if (run_dir is None) == (checkpoint is None):
        raise InputError("run_dir, checkpoint", "give exactly one of them", (run_dir, checkpoint))
    if checkpoint is not None and not Path(checkpoint).exists():
        raise InputError(checkpoint, "no such release file or checkpoint folder")
    if checkpoint is not None and Path(checkpoint).is_file():
        return _from_release(Path(checkpoint), device, post)
    folder = _newest(Path(str(run_dir))) if checkpoint is None else Path(checkpoint)
    run = folder.parent.parent
    config = _read_config(run / "config.yaml")
    model, transform = _build(config, run / "config.yaml", post)
    trainee = Trainee(model, config.get("ema"))
    step = load_model(folder, trainee)
    return Trained(trainee.best.to(device).eval(), transform, config, step, folder)


def _newest(run: Path) -> Path:
    found = newest(run / "checkpoints")
    if found is None:
        raise InputError(run, "holds no complete checkpoint")
    return found


def release_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a release keeps of the configuration of a run."""
    return {key: config[key] for key in (*NODES, *FACTS)}


def write_release(
    state: Mapping[str, Tensor], config: Mapping[str, Any], step: int, path: Path
) -> None:
    """Write weights and the configuration that `load_trained` needs; nobody sees half a file."""
    ready = {name: value.contiguous().cpu() for name, value in state.items()}
    metadata = {"format": "pt", "config": json.dumps(dict(config)), "step": str(step)}
    temporary = path.with_name(path.name + ".tmp")
    save_file(ready, temporary, metadata)
    temporary.chmod(0o644)  # a release is there to be shared; the library writes 0600
    temporary.replace(path)


def load_initial(model: nn.Module, path: Path) -> None:
    """Start from the weights of a release file or a run.

    Heads stay as initialised when the file has them for other classes or in another form; anything
    else must fit.

    Raises:
        InputError: no such file; keys or shapes that do not fit (all are listed).
    """
    state = read_safetensors(path)[0] if path.is_file() else open_trained(path).model.state_dict()
    own = model.state_dict()
    unfit = {n for n in state.keys() & own.keys() if state[n].shape != own[n].shape}
    unfit |= state.keys() ^ own.keys()
    new = {name for name in unfit if name.startswith(CLASS_PARTS)}
    if unfit - new:
        raise InputError(path, "weights do not fit this detector", sorted(unfit - new))
    if new:
        get_logger(__name__).info("%s: left as they were: %s", path, ", ".join(sorted(new)))
    model.load_state_dict({n: x for n, x in state.items() if n not in new}, strict=False)


def _from_release(path: Path, device: torch.device | str, post: Mapping[str, Any]) -> Trained:
    state, metadata = read_safetensors(path)
    if "config" not in metadata:
        raise InputError(path, "is not a release file: its metadata has no key", "config")
    try:
        config = dict(json.loads(metadata["config"]))
        step = int(metadata["step"])
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(path, "has broken metadata", error) from error
    model, transform = _build(config, path, post)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(path, "weights do not fit its configuration", error) from error
    return Trained(model.to(device).eval(), transform, config, step, path)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        InputError: no such file, or another kind of file.
    """
    if not path.is_file():
        raise InputError(path, "no such file")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except SafetensorError as error:
        raise InputError(path, "is not a safetensors file", error) from error


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OSError, OmegaConfBaseException, ValueError) as error:
        raise InputError(path, "configuration of the run cannot be read", error) from error
    if not isinstance(config, dict) or not {"model", "transform", "data"} <= config.keys():
        raise InputError(path, "is not the configuration of a run", "no model, transform or data")
    return {str(key): value for key, value in config.items()}


def _build(config: Mapping[str, Any], path: Path, post: Mapping[str, Any]) -> tuple[nn.Module, Any]:
    for key in NODES:
        if not isinstance(config.get(key), Mapping):
            raise InputError(path, f"{key} is no configuration node", config.get(key))
        for target in _targets(config[key]):
            _refuse_foreign(target, path)
    for key in FACTS:
        if key not in config:
            raise InputError(path, "does not say", key)
    node = _without_weights(deepcopy(config["model"]))
    try:
        node["post"] = {**node["post"], **post}
        return instantiate(node), instantiate(config["transform"])
    except (KeyError, TypeError, ValueError, InstantiationException) as error:
        raise InputError(path, "its model or transform cannot be built", error) from error


def _without_weights(node: Any) -> Any:
    """A model node that reads no file of its own: the weights of the run follow."""
    if isinstance(node, Mapping):
        return {k: None if k == "weights" else _without_weights(v) for k, v in node.items()}
    return [_without_weights(item) for item in node] if isinstance(node, list) else node


def refuse_foreign_loader(node: Any, path: Path) -> None:
    """Raise `InputError` unless a run's `data` node calls a loader of ours."""
    for target in _targets(node):
        found = _find(target, ("detection_tsd.data.",))
        if not getattr(found, "__name__", "").startswith("load_"):
            raise InputError(path, "names a loader that a run may not call", target)


def _refuse_foreign(target: str, path: Path) -> None:
    """Raise `InputError` unless the target is one of our classes, or adjusts a head."""
    found = _find(target, TRUSTED)
    adjusts = inspect.isfunction(found) and found.__name__.startswith("with_")
    if not isinstance(found, type) and not adjusts:
        raise InputError(path, "names a class that weights may not build", target)


def _find(target: str, trusted: tuple[str, ...]) -> Any:
    """What a target names, or None when that is not defined in a trusted module.

    A dotted name may also lead through a module to what it imports, and an interpolation could
    turn into another target after this check: neither is found.
    """
    module, _, name = target.rpartition(".")
    if not target.startswith(trusted) or "${" in target:
        return None
    try:
        found = getattr(import_module(module), name, None)
    except ImportError:
        return None
    return found if f"{getattr(found, '__module__', '')}.".startswith(trusted) else None


def _targets(node: Any) -> Iterator[str]:
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield str(node["_target_"])
        for value in node.values():
            yield from _targets(value)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _targets(value)
    elif isinstance(node, str) and "${" in node:
        yield node
