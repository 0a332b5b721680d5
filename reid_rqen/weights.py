"""Weights on disk: starting weights, trained runs, and the one-file release format.

A release is one safetensors file without training-only parts. Its metadata holds the nodes
`model` and `transform` of the run's configuration, so that the file alone can be evaluated.
"""

import json
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from common.checkpoint import load_model, newest
from common.log import InputError

# A new data set has other identities: their classifiers never come from a file.
TRAINING_ONLY = ("classifier.", "auxiliary.")
# A configuration that arrives with weights may build these and nothing else.
TRUSTED = ("reid_rqen.models.", "reid_rqen.data.transforms.")


class Trained(NamedTuple):
    """A model in evaluation mode, how its frames are prepared, and where it came from."""

    model: Any  # an nn.Module with `frames` or `sequences`
    transform: Any
    config: dict[str, Any]
    step: int
    source: Path


def load_trained(
    run_dir: Path | str | None = None,
    checkpoint: Path | str | None = None,
    device: torch.device | str = "cpu",
    **model_options: Any,
) -> Trained:
    """Load a model for evaluation; the classifiers are dropped, so any data set can follow.

    Args:
        run_dir: a run folder; its newest complete checkpoint is read.
        checkpoint: a `step_XXXXXXXX` folder of a run, or a release file (`export`).
        device: where the model goes.
        model_options: arguments of the model that replace those of its configuration, for
            instance `fixed_scores=True` or `use_regions=[0]`.

    Raises:
        InputError: nothing or both given, no such file, not one of ours, weights that do not fit.
    """
    if (run_dir is None) == (checkpoint is None):
        raise InputError("run_dir, checkpoint", "give exactly one of them", (run_dir, checkpoint))
    if checkpoint is not None and not Path(checkpoint).exists():
        raise InputError(checkpoint, "no such release file or checkpoint folder")
    if checkpoint is not None and Path(checkpoint).is_file():
        return _from_release(Path(checkpoint), device, model_options)
    if checkpoint is not None:
        folder, run = Path(checkpoint), Path(checkpoint).parent.parent
        if not folder.is_dir():
            raise InputError(folder, "no such file or checkpoint folder")
    else:
        run = Path(str(run_dir))
        found = newest(run / "checkpoints")
        if found is None:
            raise InputError(run, "holds no complete checkpoint")
        folder = found
    config = _read_config(run / "config.yaml")
    model, transform = _build(config, run / "config.yaml", model_options)
    step = load_model(folder, model, ignore=TRAINING_ONLY)
    return Trained(_ready(model, device), transform, config, step, folder)


def save_release(trained: Trained, path: Path) -> None:
    """Write a release file; a reader never sees half of it."""
    state = {name: value.contiguous().cpu() for name, value in trained.model.state_dict().items()}
    kept = {key: trained.config.get(key) for key in ("model", "transform", "train_set", "seed")}
    metadata = {"format": "pt", "config": json.dumps(kept), "step": str(trained.step)}
    temporary = path.with_name(path.name + ".tmp")
    save_file(state, temporary, metadata)
    temporary.chmod(0o644)  # a release is there to be shared; the library writes 0600
    temporary.replace(path)


def load_initial(model: nn.Module, path: Path) -> None:
    """Start from the weights of a file; classifiers and auxiliary heads stay as initialised.

    The file holds a whole model, or a trunk alone (its keys get the prefix `trunk.`). The quality
    head may be missing, anything else must fit.

    Raises:
        InputError: no such file; keys or shapes that do not fit (all are listed).
    """
    state, _ = _read_release(path)
    if not any(name.startswith("trunk.") for name in state):
        state = {f"trunk.{name}": value for name, value in state.items()}
    state = {name: v for name, v in state.items() if not name.startswith(TRAINING_ONLY)}
    own = {n: v for n, v in model.state_dict().items() if not n.startswith(TRAINING_ONLY)}
    unknown = sorted(state.keys() - own.keys())
    wrong = sorted(n for n in state.keys() & own.keys() if state[n].shape != own[n].shape)
    missing = sorted(n for n in own.keys() - state.keys() if not n.startswith("quality."))
    if unknown or wrong or missing:
        listed = f"unknown {unknown}, of another shape {wrong}, missing {missing}"
        raise InputError(path, "weights do not fit this model", listed)
    model.load_state_dict(state, strict=False)


def _from_release(path: Path, device: torch.device | str, options: dict[str, Any]) -> Trained:
    state, metadata = _read_release(path)
    if "config" not in metadata:
        raise InputError(path, "is not a release file: its metadata has no key", "config")
    try:
        config = dict(json.loads(metadata["config"]))
        step = int(metadata["step"])
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(path, "has broken metadata", error) from error
    model, transform = _build(config, path, options)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(path, "weights do not fit its configuration", error) from error
    return Trained(_ready(model, device), transform, config, step, path)


def _read_release(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
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
    if not isinstance(config, dict) or not {"model", "transform"} <= config.keys():
        raise InputError(path, "is not the configuration of a run", "no model or transform")
    return {str(key): value for key, value in config.items()}


def _build(config: Mapping[str, Any], path: Path, options: dict[str, Any]) -> tuple[nn.Module, Any]:
    for key in ("model", "transform"):
        if not isinstance(config.get(key), Mapping):
            raise InputError(path, f"{key} is no configuration node", config.get(key))
    for node in (config["model"], config["transform"]):
        for target in _targets(node):
            _refuse_foreign(target, path)
    model_node = {**config["model"], **options}
    if "trunk" in model_node and "weights" in model_node["trunk"]:
        model_node["trunk"] = {**model_node["trunk"], "weights": None}  # ours follow
    try:
        model = instantiate(model_node)(num_classes=None)
    except (TypeError, ValueError) as error:  # an option it does not know, a region it lacks
        raise InputError(path, "its model cannot be built", error) from error
    return model, instantiate(config["transform"])


def _ready(model: nn.Module, device: torch.device | str) -> nn.Module:
    """In evaluation mode on its device; channels last, in which convolutions run faster."""
    return model.to(device).eval().to(memory_format=torch.channels_last)


def refuse_foreign_loader(node: Any, path: Path) -> None:
    """Raise `InputError` unless a run's `data` node calls one of our loaders and nothing else."""
    for target in _targets(node):
        found = _find(target, ("reid_rqen.data.",))
        if not getattr(found, "__name__", "").startswith("load_"):
            raise InputError(path, "names a loader that a run may not call", target)


def _refuse_foreign(target: str, path: Path) -> None:
    """Raise `InputError` unless the target is a class of our models or transforms."""
    if not isinstance(_find(target, TRUSTED), type):
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
