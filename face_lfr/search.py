"""Search for a PolyFace under a bound of operations: our search, not the paper's.

    python -m face_lfr.search out=DIR                                  synthetic faces, minutes
    python -m face_lfr.search search=large out=DIR root=DIR            30 GFLOPs on MS1MV3, GPUs

arXiv 1909.00632 calls its network searched and leaves the procedure open. Here: list every network
of the space whose cost, by the organisers' counting, is just below the bound (`search_space`);
choose some that differ much; train each for a few steps and keep the best third, again and again
with more steps (successive halving); rank by the true positive rate on persons nobody trained on.
Every rung trains from the start, because a learning rate that has run down cannot be continued.

Writes into `out`: `search.json` (every candidate), `search.md`, `search.png`, and in `found/` the
best network as configuration files of the training. A search that was stopped goes on where it was.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
from hydra import compose
from hydra.core.config_store import ConfigStore
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

import face_lfr.train  # noqa: F401  its schema is what the trainings are composed by
from common import dist
from common.log import InputError, exit_on_bad_input, get_logger, setup_logging
from face_lfr.evaluate import write_json
from face_lfr.models.poly_blocks import last_side
from face_lfr.rows import own_hydra
from face_lfr.search_report import Entry, describe, draw, show, write_found, write_markdown
from face_lfr.search_runs import Proxy, quoted, train_proxies
from face_lfr.search_score import HeldOut, Score, measure, open_held_out
from face_lfr.search_space import FIRST_SIZE, SIZE_STEP, Candidate, Space, fitting, spread

MODEL = "polyface_base"  # whose arguments a candidate replaces
# What decides a proxy beside its candidate, steps and input: a folder holds proxies of one setting.
SETTING = ("experiment", "words", "proxy_words", "root", "size_key", "seed")


@dataclass
class SearchConfig:
    """Schema of configs/search.yaml."""

    out: str = "runs/lfr/search"
    budget_gflops: float = 30.0  # by the organisers' counting
    fit: list[float] = field(default_factory=lambda: [0.93, 1.0])  # shares of it to fill
    space: Space = field(default_factory=Space)
    include: list[str] = field(default_factory=list)  # names of candidates to try in any case
    candidates: int = 8
    rungs: list[int] = field(default_factory=lambda: [60, 180])  # steps of the proxies
    rung_sizes: list[int | None] = field(default_factory=list)  # input of each rung; null: own
    divide: float = 3.0  # of a rung's candidates one in so many goes on
    seed: int = 0  # of the choice of candidates, and of the proxies
    experiment: str = "synth/base"  # row the proxies are trained by
    words: list[str] = field(default_factory=list)  # overrides of that row
    proxy_words: list[str] = field(default_factory=list)  # further ones of the proxies alone
    root: str | None = None  # folder of the training data
    size_key: str = "transform.size"  # what sets the side of the images to the network's
    test: str | None = None  # .bin or labelled folder; null: the synthetic set's own
    test_classes: list[int] | None = None  # instead, classes of the training set left out of it
    fpr: float = 1e-3
    jobs: int = 2  # proxies side by side
    ranks: int = 1  # processes of each
    workers: int = 0  # that read the images to score by


ConfigStore.instance().store("lfr_search_schema", SearchConfig)

Train = Callable[[Sequence[Proxy], int], Mapping[str, str]]
Measure = Callable[[Path, int, HeldOut, float, int], Score]


def search(cfg: SearchConfig, train: Train = train_proxies, score: Measure = measure) -> dict:
    """Search, or go on with a search; returns the content of `search.json`.

    Args:
        cfg: see `SearchConfig`.
        train: trains proxies side by side; returns name -> reason of those that broke down.
        score: of the network in a run folder, see `search_score.measure`.

    Raises:
        InputError: a setting, the data or an earlier content of `out` is not usable, no network
            fits, or every training of a rung broke down.
    """
    _check(cfg)
    start, out = time.perf_counter(), Path(cfg.out)
    space = fitting(cfg.space, cfg.budget_gflops, list(cfg.fit))
    chosen = spread(space.candidates, cfg.candidates, cfg.seed, list(cfg.include))
    get_logger(__name__).info(
        "%d of %d networks fit, %d are tried", len(space.candidates), space.total, len(chosen)
    )
    _remember(out, cfg)
    data = _training_data(cfg, chosen[0])
    test = open_held_out(data, cfg.test, cfg.test_classes)
    entries = [Entry(candidate) for candidate in chosen]
    alive = entries
    for number in range(len(cfg.rungs)):
        _rung(cfg, alive, number, test, train, score)
        report = describe(cfg, space, entries, test.name, time.perf_counter() - start)
        write_json(out / "search.json", report)
        alive = ranked(alive, number)
        if number + 1 < len(cfg.rungs):
            alive = alive[: max(1, math.ceil(len(alive) / cfg.divide))]
    best = alive[0].candidate
    run_dir = _proxy(cfg, best, len(cfg.rungs) - 1).run_dir
    report["found"] |= write_found(out / "found", cfg, best, run_dir / "config.yaml")
    report["complete"] = True
    write_json(out / "search.json", report)
    draw(report, out / "search.png")
    write_markdown(report, out / "search.md")
    return report


def ranked(entries: Sequence[Entry], rung: int) -> list[Entry]:
    """Those with a score in a rung, the best first, of equal ones the cheaper."""
    scored = [entry for entry in entries if len(entry.scores) > rung]
    return sorted(scored, key=lambda e: (-e.scores[rung].tpr, e.candidate.operations))


def _check(cfg: SearchConfig) -> None:
    if dist.init().size > 1:
        raise InputError("search", "runs as one process; its trainings take", "ranks=N")
    rungs = list(cfg.rungs)
    if not rungs or min(rungs) < 1 or rungs != sorted(set(rungs)):
        raise InputError("rungs", "needs rising numbers of steps", rungs)
    if cfg.divide <= 1:
        raise InputError("divide", "must be above 1", cfg.divide)
    if not 0 < cfg.fpr <= 1:
        raise InputError("fpr", "must be in (0, 1]", cfg.fpr)
    if not cfg.size_key.startswith("transform."):
        raise InputError("size_key", "must name a field of the transform", cfg.size_key)
    sizes = list(cfg.rung_sizes)
    if sizes and len(sizes) != len(rungs):
        raise InputError("rung_sizes", f"needs one for each of {len(rungs)} rungs, or none", sizes)
    for size in sizes:
        try:
            last_side(FIRST_SIZE + SIZE_STEP if size is None else size)
        except ValueError as error:
            raise InputError("rung_sizes", "no PolyFace takes it", error) from error


def _remember(out: Path, cfg: SearchConfig) -> None:
    """Note what the proxies of this folder are trained by; refuse to mix them with others."""
    path, wanted = out / "setting.json", {key: _plain(getattr(cfg, key)) for key in SETTING}
    if cfg.root is not None:
        wanted["root"] = str(Path(cfg.root).resolve())
    if path.exists():
        try:
            earlier = dict(json.loads(path.read_text()))
        except ValueError as error:
            raise InputError(path, "is not the setting of a search") from error
        for key, value in wanted.items():
            if earlier.get(key) != value:
                what = f"holds trainings with another {key} (use another folder)"
                raise InputError(out, what, f"{earlier.get(key)} not {value}")
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, wanted)


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _proxy(cfg: SearchConfig, candidate: Candidate, rung: int) -> Proxy:
    """The training of a candidate in a rung."""
    steps, sizes = cfg.rungs[rung], list(cfg.rung_sizes) or [None] * len(cfg.rungs)
    size = sizes[rung] or candidate.input_size
    blocks, features, width = candidate.node().values()
    words = [
        f"experiment={cfg.experiment}", f"model={MODEL}", f"seed={cfg.seed}",
        *([] if cfg.root is None else [f"data.root={quoted(cfg.root)}"]),
        *cfg.words, *cfg.proxy_words,
        f"model.blocks={blocks}", f"model.features={features}", f"model.width={width}",
        f"model.input_size={size}", f"{cfg.size_key}={size}", f"max_gflops={cfg.budget_gflops}",
    ]  # fmt: skip
    run_dir = Path(cfg.out) / "runs" / candidate.name / f"{steps}_{size}px"
    return Proxy(candidate.name, run_dir, steps, tuple(words), cfg.ranks)


def _training_data(cfg: SearchConfig, candidate: Candidate) -> dict[str, Any]:
    """Node of the training set, which is read once: before anything is trained, and by one process.

    Raises:
        InputError: the set cannot be read.
    """
    words = _proxy(cfg, candidate, 0).words
    with own_hydra():
        node = OmegaConf.to_container(compose("train", list(words)).data, resolve=True)
    instantiate(node)
    assert isinstance(node, dict)
    return {str(key): value for key, value in node.items()}


def _rung(
    cfg: SearchConfig, entries: list[Entry], rung: int, test: HeldOut, train: Train, score: Measure
) -> None:
    """Train and score the candidates of a rung that are not scored yet; notes it in the entries.

    Raises:
        InputError: every training broke down.
    """
    proxies = {entry.candidate.name: _proxy(cfg, entry.candidate, rung) for entry in entries}
    steps = cfg.rungs[rung]
    facts = {"test": test.name, "fpr": cfg.fpr, "steps": steps}
    known = {name: _known(proxy.run_dir, facts) for name, proxy in proxies.items()}
    failed = train([proxies[name] for name, found in known.items() if found is None], cfg.jobs)
    for entry in entries:
        name = entry.candidate.name
        entry.failed = failed.get(name)
        if entry.failed is not None:
            continue
        found = known[name]
        if found is None:
            found = score(proxies[name].run_dir, steps, test, cfg.fpr, cfg.workers)
            write_json(proxies[name].run_dir / "score.json", facts | found._asdict())
        entry.scores.append(found)
    if len(failed) == len(entries):
        name = next(iter(failed))
        raise InputError(proxies[name].log, "every training of the rung broke down", failed[name])


def _known(run_dir: Path, facts: Mapping[str, Any]) -> Score | None:
    """The score that an earlier start wrote, when it is of the same test."""
    try:
        found = dict(json.loads((run_dir / "score.json").read_text()))
        return (
            Score(*(found[key] for key in Score._fields))
            if facts.items() <= found.items()
            else None
        )
    except (OSError, ValueError, KeyError):
        return None


@hydra.main(version_base=None, config_path="configs", config_name="search")
def main(cfg: DictConfig) -> None:
    setup_logging(rank=0)
    show(search(cfg))  # type: ignore[arg-type]


if __name__ == "__main__":
    exit_on_bad_input(main)
