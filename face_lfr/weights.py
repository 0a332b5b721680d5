"""Weights on disk: starting weights, trained runs, and the one-file release format.

A release is one safetensors file. Its metadata holds the nodes `model` and `transform` of the run's
configuration, so that the file alone says which colour order, size and values the network expects.
The classifier of a training is no part of a release.
"""

import inspect
import json
from collections.abc import Iterator, Mapping
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

from common.checkpoint import load_model, newest
from common.log import InputError

# A configuration that arrives with weights may build these and nothing else.
TRUSTED = ("face_lfr.models.", "face_lfr.data.transforms.")
TRUSTED_OBJECTIVE = ("face_lfr.classifier.", "face_lfr.margins.")
NODES = ("model", "transform")
FACTS = ("train_set", "num_classes", "seed", "kind")
KINDS = ("embedding", "quality")


class Trainee(nn.Module):
    """What a checkpoint of a training holds: the network, and the objective with its classifier."""

    def __init__(self, model: nn.Module, objective: nn.Module | None = None):
        super().__init__()
        self.model = model
        self.objective = nn.Module() if objective is None else objective


class Trained(NamedTuple):
    """A model in evaluation mode, how its images are made, and where it came from."""

    model: nn.Module
    transform: Any
    config: dict[str, Any]
    step: int
    source: Path

    @property
    def kind(self) -> str:
        """`embedding` for a recogniser, `quality` for a network that scores images."""
        return str(self.config["kind"])


def open_trained(path: Path | str, device: torch.device | str = "cpu") -> Trained:
    """Load a release file, a `step_XXXXXXXX` folder, or the newest checkpoint of a run folder.

    Raises:
        InputError: it is none of these.
    """
    path = Path(path)
    if path.is_file() or path.name.startswith("step_"):
        return load_trained(checkpoint=path, device=device)
    if not path.is_dir():
        raise InputError(path, "no such file or folder")
    return load_trained(run_dir=path, device=device)


def load_trained(
    run_dir: Path | str | None = None,
    checkpoint: Path | str | None = None,
    device: torch.device | str = "cpu",
) -> Trained:
    """Load a model for evaluation.

    Args:
        run_dir: a run folder; its newest complete checkpoint is read.
        checkpoint: a `step_XXXXXXXX` folder of a run, or a release file (`export`).
        device: where the model goes.

    Raises:
        InputError: nothing or both given, no such file, not one of ours, weights that do not fit.
    """
    if (run_dir is None) == (checkpoint is None):
        raise InputError("run_dir, checkpoint", "give exactly one of them", (run_dir, checkpoint))
    if checkpoint is not None and not Path(checkpoint).exists():
        raise InputError(checkpoint, "no such release file or checkpoint folder")
    if checkpoint is not None and Path(checkpoint).is_file():
        return _from_release(Path(checkpoint), device)
    folder = Path(checkpoint) if checkpoint is not None else _newest(Path(str(run_dir)))
    config = _read_config(folder.parent.parent / "config.yaml")
    model, transform = _build(config, folder.parent.parent / "config.yaml")
    step = load_model(folder, Trainee(model), ignore=("objective.",))
    return Trained(_ready(model, device), transform, config, step, folder)


def load_centres(trained: Trained) -> Tensor | None:
    """Unit class centres (C, D) of the classifier a recogniser was trained with.

    None for a release file, which has no classifier, and for a quality network.

    Raises:
        InputError: the run's objective is not a classifier of this package.
    """
    if trained.source.is_file() or trained.kind != "embedding":
        return None
    path = trained.source.parent.parent / "config.yaml"
    node = trained.config.get("objective")
    for target in _targets(node):
        _refuse_foreign(target, path, TRUSTED_OBJECTIVE)
    sizes = {"features": trained.model.features, "num_classes": trained.config["num_classes"]}
    try:
        objective = instantiate(node)(**sizes)
    except (TypeError, ValueError, InstantiationException) as error:
        raise InputError(path, "its objective cannot be built", error) from error
    load_model(trained.source, Trainee(trained.model, objective))
    centres_CD: Tensor = objective.centres().detach()
    return centres_CD


def save_release(trained: Trained, path: Path) -> None:
    """Write a release file; a reader never sees half of it."""
    state = {name: value.contiguous().cpu() for name, value in trained.model.state_dict().items()}
    write_release(state, {key: trained.config[key] for key in (*NODES, *FACTS)}, trained.step, path)


def write_release(
    state: Mapping[str, Tensor], config: Mapping[str, Any], step: int, path: Path
) -> None:
    """Write weights and the configuration that `load_trained` needs as one file."""
    metadata = {"format": "pt", "config": json.dumps(config), "step": str(step)}
    temporary = path.with_name(path.name + ".tmp")
    save_file(dict(state), temporary, metadata)
    temporary.chmod(0o644)  # a release is there to be shared; the library writes 0600
    temporary.replace(path)


def load_initial(model: nn.Module, path: Path) -> None:
    """Start a training from the weights of a release file or of a run, whatever its classes.

    Raises:
        InputError: no such file; keys or shapes that do not fit (all are listed).
    """
    if path.is_dir():
        folder = path if path.name.startswith("step_") else _newest(path)
        load_model(folder, Trainee(model), ignore=("objective.",))
        return
    own, (state, _) = model.state_dict(), read_safetensors(path)
    unknown, missing = sorted(state.keys() - own.keys()), sorted(own.keys() - state.keys())
    others = sorted(n for n in state.keys() & own.keys() if state[n].shape != own[n].shape)
    if unknown or others or missing:
        listed = f"unknown {unknown}, of another shape {others}, missing {missing}"
        raise InputError(path, "weights do not fit this model", listed)
    model.load_state_dict(state)


def _newest(run: Path) -> Path:
    found = newest(run / "checkpoints")
    if found is None:
        raise InputError(run, "holds no complete checkpoint")
    return found


def _from_release(path: Path, device: torch.device | str) -> Trained:
    state, metadata = read_safetensors(path)
    if "config" not in metadata:
        raise InputError(path, "is not a release file: its metadata has no key", "config")
    try:
        config = dict(json.loads(metadata["config"]))
        step = int(metadata["step"])
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(path, "has broken metadata", error) from error
    model, transform = _build(config, path)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(path, "weights do not fit its configuration", error) from error
    return Trained(_ready(model, device), transform, config, step, path)


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
    if not isinstance(config, dict) or not {*NODES, "data"} <= config.keys():
        raise InputError(path, "is not the configuration of a run", "no model, transform or data")
    return {str(key): value for key, value in config.items()}


def _build(config: Mapping[str, Any], path: Path) -> tuple[nn.Module, Any]:
    for key in NODES:
        if not isinstance(config.get(key), Mapping):
            raise InputError(path, f"{key} is no configuration node", config.get(key))
        for target in _targets(config[key]):
            _refuse_foreign(target, path, TRUSTED)
    for key in FACTS:
        if key not in config:
            raise InputError(path, "does not say", key)
    if config["kind"] not in KINDS:
        raise InputError(path, f"kind must be one of {', '.join(KINDS)}", config["kind"])
    try:
        return instantiate(config["model"]), instantiate(config["transform"])
    except (TypeError, ValueError, InstantiationException) as error:
        raise InputError(path, "its model or transform cannot be built", error) from error


def _ready(model: nn.Module, device: torch.device | str) -> nn.Module:
    return model.to(device).eval()


def refuse_foreign_loader(node: Any, path: Path) -> None:
    """Raise `InputError` unless a run's `data` node calls a loader of this package."""
    for target in _targets(node):
        found = _find(target, ("face_lfr.data.",))
        if not (inspect.isfunction(found) and found.__name__.startswith("load_")):
            raise InputError(path, "names a loader that a run may not call", target)


def _refuse_foreign(target: str, path: Path, trusted: tuple[str, ...]) -> None:
    """Raise `InputError` unless the target is a class of ours."""
    if not isinstance(_find(target, trusted), type):
        raise InputError(path, "names a class that weights may not build", target)


def _find(target: str, trusted: tuple[str, ...]) -> Any:
    """What a target names, or None when that is not defined in a trusted module.

    A dotted name may also lead through a module to what it imports, and an interpolation could
    turn into another target after this check: neither is found.
    """
    module, _, name = target.rpartition(".")
    if not f"{module}.".startswith(trusted) or "${" in target:
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
