"""Weights on disk: starting weights, trained runs, and the one-file release format.

A release is one safetensors file. Its metadata holds the nodes `model`, `transform` and `sampler`
of the run's configuration and the names of the classes, so that the file alone can be evaluated.
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
from common.log import InputError, get_logger

# What stays new when a run starts from weights for other classes.
CLASSIFIER = ("head.", "trn.")
# A configuration that arrives with weights may build these and nothing else.
TRUSTED = ("video_mmit.models.", "video_mmit.data.transforms.", "video_mmit.data.sampling.")
NODES = ("model", "transform", "sampler")
FACTS = ("train_set", "num_classes", "classes", "multi_label", "seed")


class Trained(NamedTuple):
    """A model in evaluation mode, how its clips are made, and where it came from."""

    model: nn.Module
    transform: Any
    sampler: Any
    config: dict[str, Any]
    step: int
    source: Path

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the K classes in the order of the scores."""
        return tuple(self.config["classes"])

    @property
    def multi_label(self) -> bool:
        """Whether a video may carry several of the classes."""
        return bool(self.config["multi_label"])


def load_trained(
    run_dir: Path | str | None = None,
    checkpoint: Path | str | None = None,
    device: torch.device | str = "cpu",
    **transform_options: Any,
) -> Trained:
    """Load a model for evaluation.

    Args:
        run_dir: a run folder; its newest complete checkpoint is read.
        checkpoint: a `step_XXXXXXXX` folder of a run, or a release file (`export`).
        device: where the model goes.
        transform_options: arguments of the transform that replace those of its configuration, for
            instance `input_size=256` for a test on whole frames.

    Raises:
        InputError: nothing or both given, no such file, not one of ours, weights that do not fit.
    """
    if (run_dir is None) == (checkpoint is None):
        raise InputError("run_dir, checkpoint", "give exactly one of them", (run_dir, checkpoint))
    if checkpoint is not None and not Path(checkpoint).exists():
        raise InputError(checkpoint, "no such release file or checkpoint folder")
    if checkpoint is not None and Path(checkpoint).is_file():
        return _from_release(Path(checkpoint), device, transform_options)
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
    model, transform, sampler = _build(config, run / "config.yaml", transform_options)
    step = load_model(folder, model)
    return Trained(_ready(model, device), transform, sampler, config, step, folder)


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
    """Start from the weights of a file.

    The file holds a whole model, or a backbone alone (its keys get the prefix `backbone.`). The
    classifier stays as initialised when the file has none or has other classes, the temporal
    modules and non-local blocks when the file has none of them; anything else must fit. A
    convolution that only one of the two wraps with a temporal module is the same convolution.

    Raises:
        InputError: no such file; keys or shapes that do not fit (all are listed).
    """
    own = model.state_dict()
    state, _ = read_safetensors(path)
    if not any(name.startswith("backbone.") for name in state) and hasattr(model, "backbone"):
        state = {f"backbone.{name}": value for name, value in state.items()}
    state = {_rename(name, own): value for name, value in state.items()}
    others = {n for n in state.keys() & own.keys() if state[n].shape != own[n].shape}
    classifier = {n for n in state if n.startswith(CLASSIFIER)}
    if classifier & (others | (state.keys() - own.keys())):
        get_logger(__name__).info("%s: its classifier is for other classes and stays behind", path)
        state = {n: value for n, value in state.items() if n not in classifier}
        others -= classifier
    unknown = sorted(state.keys() - own.keys())
    missing = sorted(
        n
        for n in own.keys() - state.keys()
        if not n.startswith(CLASSIFIER) and ".temporal." not in n and "non_local" not in n
    )
    if unknown or others or missing:
        listed = f"unknown {unknown}, of another shape {sorted(others)}, missing {missing}"
        raise InputError(path, "weights do not fit this model", listed)
    model.load_state_dict(state, strict=False)


def _rename(name: str, own: Mapping[str, Tensor]) -> str:
    """The name in this model of a convolution that may be wrapped in only one of the two."""
    stem, _, last = name.rpartition(".")
    wrapped = f"{stem}.conv.{last}"
    plain = f"{stem.removesuffix('.conv')}.{last}"
    return next((known for known in (name, wrapped, plain) if known in own), name)


def _from_release(path: Path, device: torch.device | str, options: dict[str, Any]) -> Trained:
    state, metadata = read_safetensors(path)
    if "config" not in metadata:
        raise InputError(path, "is not a release file: its metadata has no key", "config")
    try:
        config = dict(json.loads(metadata["config"]))
        step = int(metadata["step"])
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(path, "has broken metadata", error) from error
    model, transform, sampler = _build(config, path, options)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(path, "weights do not fit its configuration", error) from error
    return Trained(_ready(model, device), transform, sampler, config, step, path)


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
    data = config["data"]
    sampler = data.get("sampler") if isinstance(data, dict) else None
    return {str(key): value for key, value in config.items()} | {"sampler": sampler}


def _build(
    config: Mapping[str, Any], path: Path, options: Mapping[str, Any]
) -> tuple[nn.Module, Any, Any]:
    for key in NODES:
        if not isinstance(config.get(key), Mapping):
            raise InputError(path, f"{key} is no configuration node", config.get(key))
        for target in _targets(config[key]):
            _refuse_foreign(target, path)
    for key in FACTS:
        if key not in config:
            raise InputError(path, "does not say", key)
    transform = {**config["transform"], **options}
    try:
        model = instantiate(_without_weights(config["model"]))(num_classes=config["num_classes"])
        return model, instantiate(transform), instantiate(config["sampler"])
    except (TypeError, ValueError, InstantiationException) as error:
        raise InputError(path, "its model, transform or sampler cannot be built", error) from error


def _without_weights(node: Any) -> Any:
    """A model node that reads no file of its own: the weights of the run follow."""
    if isinstance(node, Mapping):
        return {k: None if k == "weights" else _without_weights(v) for k, v in node.items()}
    return node


def _ready(model: nn.Module, device: torch.device | str) -> nn.Module:
    return model.to(device).eval()


def refuse_foreign_loader(node: Any, path: Path) -> None:
    """Raise `InputError` unless a run's `data` node calls a loader, reader or sampler of ours."""
    for target in _targets(node):
        found = _find(target, ("video_mmit.data.",))
        loads = inspect.isfunction(found) and found.__name__.startswith("load_")
        if not loads and not isinstance(found, type):
            raise InputError(path, "names a loader that a run may not call", target)


def _refuse_foreign(target: str, path: Path) -> None:
    """Raise `InputError` unless the target is one of our classes, or inserts a temporal module."""
    found = _find(target, TRUSTED)
    inserts = inspect.isfunction(found) and found.__name__.startswith("add_")
    if not isinstance(found, type) and not inserts:
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
