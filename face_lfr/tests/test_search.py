"""The search: halving, what it leaves behind, going on after a stop."""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import yaml
from omegaconf import OmegaConf

from common.log import InputError
from face_lfr.data.challenge import load_deepglint
from face_lfr.flops import count
from face_lfr.metrics import interval
from face_lfr.search import SearchConfig, search
from face_lfr.search_report import apart
from face_lfr.search_runs import Proxy
from face_lfr.search_score import HeldOut, Score, measure, open_held_out
from face_lfr.search_space import Space
from face_lfr.tests.conftest import SIZES
from face_lfr.tests.launch import command, config, rows, train
from face_lfr.weights import load_trained

SPACE = Space(blocks=[1, 2], maps=[1, 2], features=[16], widths=[0.06, 0.1])
OURS = "our search, not the paper's"


@pytest.fixture
def settings(synth: Path, tmp_path: Path) -> SearchConfig:
    """Four candidates, of which two go on. The row sets the width of a network of its own."""
    sizes = [f"data.{name}={number}" for name, number in SIZES.items()]
    row = ["global_batch=8", "draws.cache=false", "model.dropout=0.0"]
    return SearchConfig(
        out=str(tmp_path / "out"), budget_gflops=0.006, fit=[0.3, 1.0], space=SPACE, candidates=4,
        rungs=[2, 5], divide=2, experiment="synth/polyface_nano", words=sizes, proxy_words=row,
        root=str(synth), fpr=0.01, jobs=2,
    )  # fmt: skip


class Fake:
    """Trains nothing: leaves the configuration a training leaves; stops or fails where it is told.

    A network of more blocks scores more; those in `broken` break down.
    """

    def __init__(self, stop_at: int = 10**6, broken: Sequence[str] = ()):
        self.stop_at, self.broken = stop_at, broken
        self.trained: list[tuple[str, int]] = []
        self.scored: list[tuple[str, int]] = []

    def train(self, proxies: Sequence[Proxy], parallel: int) -> Mapping[str, str]:
        for proxy in proxies:
            if len(self.trained) == self.stop_at:
                raise KeyboardInterrupt
            proxy.run_dir.mkdir(parents=True, exist_ok=True)
            (proxy.run_dir / "config.yaml").write_text(composed(proxy.words))
            self.trained.append((proxy.name, proxy.steps))
        return {proxy.name: "code 1: it broke" for proxy in proxies if proxy.name in self.broken}

    def score(self, run_dir: Path, steps: int, test: HeldOut, fpr: float, workers: int) -> Score:
        name = run_dir.parent.name
        if len(self.scored) == self.stop_at:
            raise KeyboardInterrupt
        self.scored.append((name, steps))
        return fake_score(name, steps)


@cache
def composed(words: tuple[str, ...]) -> str:
    """The configuration that a training with these overrides writes down."""
    return OmegaConf.to_yaml(config("train", *words), resolve=True)


def fake_score(name: str, steps: int) -> Score:
    good = 100 * sum(int(number) for number in re.findall(r"[abc](\d)", name)) + 20 * steps
    return Score(good / 1000, *interval(good, 1000), 7, 1000, 700)


def run(settings: SearchConfig, fake: Fake, picture: bool = False) -> dict:
    """A search without trainings, and without its picture, which takes half of the time."""
    with pytest.MonkeyPatch.context() as patch:
        if not picture:
            patch.setattr("face_lfr.search.draw", lambda *_: None)
        return search(settings, fake.train, fake.score)


def test_the_better_part_goes_on(settings: SearchConfig) -> None:
    fake = Fake()
    report = run(settings, fake)
    first, second = ([n for n, steps in fake.trained if steps == rung] for rung in (2, 5))
    assert len(set(first)) == 4
    assert len(second) == 2
    cost = {row["name"]: row["gflops"] for row in report["candidates"]}
    order = sorted(first, key=lambda name: (-fake_score(name, 2).tpr, cost[name]))
    assert sorted(second) == sorted(order[:2])
    assert report["found"]["name"] == order[0]
    assert all(0.3 * 0.006 <= value <= 0.006 for value in cost.values())
    for row in report["candidates"]:
        assert [score["steps"] for score in row["scores"]] == (
            [2, 5] if row["name"] in second else [2]
        )
        assert row["scores"][0]["tpr"] == fake_score(row["name"], 2).tpr
    front = {  # by hand: no finalist is cheaper and as good
        name for name in second
        if not any(cost[other] < cost[name] and fake_score(other, 5).tpr >= fake_score(name, 5).tpr
                   for other in second)
    }  # fmt: skip
    assert set(report["pareto"]) == front
    assert report["complete"]


def test_it_says_that_it_is_not_the_papers(settings: SearchConfig) -> None:
    report, out = run(settings, Fake(), picture=True), Path(settings.out)
    assert json.loads((out / "search.json").read_text()) == report
    texts = [
        "search.json",
        "search.md",
        *(f"found/{g}/found.yaml" for g in ("model", "experiment")),
    ]
    assert all(OURS in (out / name).read_text() for name in texts)
    assert (out / "search.png").read_bytes().startswith(b"\x89PNG")
    table = (out / "search.md").read_text()
    assert all(f"| {row['name']} |" in table for row in report["candidates"])
    assert report["found"]["command"] in table
    assert "![cost and score](search.png)" in table


@pytest.mark.parametrize("stop_at", [1, 5])
def test_a_stopped_search_goes_on(settings: SearchConfig, tmp_path: Path, stop_at: int) -> None:
    whole = Fake()
    wanted = run(replace(settings, out=str(tmp_path / "whole")), whole)
    stopped, again = Fake(stop_at), Fake()
    with pytest.raises(KeyboardInterrupt):
        run(settings, stopped)
    found = run(settings, again)
    assert sorted(stopped.scored + again.scored) == sorted(whole.scored)  # nothing twice
    assert found["candidates"] == wanted["candidates"]
    assert found["found"]["name"] == wanted["found"]["name"]
    idle = Fake()
    assert run(settings, idle)["candidates"] == wanted["candidates"]
    assert not idle.trained
    assert not idle.scored


def test_a_search_may_grow_but_not_change_its_trainings(settings: SearchConfig) -> None:
    first, more = Fake(), Fake()
    run(settings, first)
    run(replace(settings, candidates=5, rungs=[2, 5, 7], fpr=0.01), more)
    assert not set(more.trained) & set(first.trained)
    assert len([name for name, steps in more.trained if steps == 2]) == 1
    other = Fake()
    run(replace(settings, fpr=0.02), other)  # asks for other scores
    assert sorted(other.scored) == sorted(first.scored)
    for change in ({"seed": 1}, {"proxy_words": []}, {"experiment": "synth/base"}):
        with pytest.raises(InputError, match=f"holds trainings with another {next(iter(change))}"):
            run(replace(settings, **change), Fake())


def test_a_network_that_breaks_down_is_left_out(settings: SearchConfig) -> None:
    best = run(settings, Fake())["found"]["name"]
    again = replace(settings, out=f"{settings.out}_again")
    report = run(again, Fake(broken=[best]))
    assert report["found"]["name"] != best
    (row,) = [row for row in report["candidates"] if row["name"] == best]
    assert (row["failed"], row["scores"], row["pareto"]) == ("code 1: it broke", [], False)
    assert "code 1: it broke" in (Path(again.out) / "search.md").read_text()
    names = [row["name"] for row in report["candidates"]]
    with pytest.raises(InputError, match=r"train\.log: every training of the rung broke down"):
        run(replace(settings, out=f"{settings.out}_broken"), Fake(broken=names))


def test_a_rung_may_have_an_input_of_its_own(settings: SearchConfig) -> None:
    report = run(replace(settings, rung_sizes=[75, None]), Fake())
    best = report["found"]["name"]
    folders = {path.name for path in (Path(settings.out) / "runs" / best).iterdir()}
    (size,) = [row["input_size"] for row in report["candidates"] if row["name"] == best]
    assert folders == {"2_75px", f"5_{size}px"}
    assert "nothing of what a larger input adds" in (Path(settings.out) / "search.md").read_text()


@pytest.mark.parametrize("row", ["experiment=found", "experiment=synth/base"])
def test_the_found_network_trains(settings: SearchConfig, tmp_path: Path, row: str) -> None:
    report, folder = run(settings, Fake()), tmp_path / "out" / "found"
    words = shlex.split(report["found"]["command"])
    assert words[:3] == ["python", "-m", "face_lfr.train"]
    assert f"hydra.searchpath=[file://{folder}]" in words
    assert words[4] == "experiment=found"
    words[4:5] = [row] if row == "experiment=found" else [row, "model=found", "transform=found"]
    words += ["steps=1", "global_batch=4", f"run_dir={tmp_path / 'run'}", "draws.cache=false"]
    train(*words[3:])
    trained = load_trained(tmp_path / "run")
    (best,) = [c for c in report["candidates"] if c["name"] == report["found"]["name"]]
    for name in ("blocks", "features", "width", "input_size"):
        assert trained.config["model"][name] == best[name]
    assert trained.transform.input_size == best["input_size"]
    assert count(trained.model, best["input_size"]) == pytest.approx(best["gflops"] * 1e9)
    if row == "experiment=found":
        assert trained.config["max_gflops"] == 0.006


def test_a_network_above_the_budget_is_not_written(settings: SearchConfig, tmp_path: Path) -> None:
    """The found network is counted layer by layer, whatever the closed form said."""

    class Wider(Fake):
        def train(self, proxies: Sequence[Proxy], parallel: int) -> Mapping[str, str]:
            failed = super().train(proxies, parallel)
            for proxy in proxies:
                path = proxy.run_dir / "config.yaml"
                node = yaml.safe_load(path.read_text())
                node["model"]["width"] = 1.0
                path.write_text(yaml.safe_dump(node))
            return failed

    with pytest.raises(InputError, match=r"the bound is: 0\.006 G"):
        run(settings, Wider())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget_gflops": 9.0}, "budget_gflops: no network costs 30% to 100%"),
        ({"rungs": []}, "rungs: needs rising numbers of steps"),
        ({"rungs": [5, 5]}, "rungs: needs rising numbers of steps"),
        ({"rung_sizes": [75]}, "rung_sizes: needs one for each of 2 rungs"),
        ({"rung_sizes": [75, 100]}, "rung_sizes: no PolyFace takes it: input_size=100"),
        ({"divide": 1.0}, "divide: must be above 1"),
        ({"fpr": 0.0}, "fpr: must be in"),
        ({"size_key": "model.input_size"}, "size_key: must name a field of the transform"),
        ({"test": "nowhere.bin"}, r"nowhere\.bin: file is missing"),
        ({"test_classes": [0, 3]}, "test_classes: the training has all persons"),
    ],
)
def test_a_setting_that_cannot_work_is_named(
    settings: SearchConfig, changes: dict, message: str
) -> None:
    fake = Fake()
    with pytest.raises(InputError, match=message):
        run(replace(settings, **changes), fake)
    assert not fake.trained


def test_bad_input_is_one_line() -> None:
    ended = command("face_lfr.search", "out=nowhere", "budget_gflops=5")
    assert ended.code == 2
    assert ended.err.startswith("error: budget_gflops: no network costs 93% to 100% of it")
    assert ended.err.count("\n") == 1


@pytest.mark.parametrize("words", [[], ["search=large", "root=DIR"]])
def test_the_configurations_describe_trainings(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every proxy composes, keeps the budget, and has a test that the training set is not."""
    from face_lfr import search as module

    cfg = config("search", "out=OUT", *words)
    if words:
        cfg.space.blocks, cfg.space.maps = [20, 40], [6]  # the whole space takes a second
    space = module.fitting(cfg.space, cfg.budget_gflops, cfg.fit)
    chosen = module.spread(space.candidates, cfg.candidates, cfg.seed, cfg.include)
    assert len(chosen) == cfg.candidates
    for rung, steps in enumerate(cfg.rungs):
        proxy = module._proxy(cfg, chosen[0], rung)
        made = config("train", *proxy.words, f"steps={steps}")
        assert made.epochs is None
        assert made.max_gflops == cfg.budget_gflops
        assert made.model.blocks == list(chosen[0].blocks)
        size = OmegaConf.select(made, cfg.size_key)
        assert size == made.model.input_size
        assert size == (cfg.rung_sizes[rung] if cfg.rung_sizes else None) or chosen[0].input_size
    if words:
        assert chosen[0].name == "a23b38c23_235px_d256"
        assert made.data.part[1] <= cfg.test_classes[0]


def test_names_in_the_picture_keep_apart() -> None:
    places = apart([1.0, 1.0, 1.1, 5.0, 9.9, 10.0], 0.0, 10.0, 0.5)
    assert np.diff(places).min() >= 0.5 - 1e-9
    assert places[0] == 1.0
    assert places[3] == 5.0
    assert places[-1] <= 10.0
    crowded = apart([5.0] * 21, 0.0, 10.0, 2.0)
    assert np.allclose(np.diff(crowded), 0.5)
    assert min(crowded) >= -1e-9


@pytest.mark.slow
def test_a_search_trains_and_scores(settings: SearchConfig, synth: Path) -> None:
    """Two networks for two steps each, through the entry point; then both kinds of test."""
    few = replace(settings, candidates=2, rungs=[2])
    report = search(few)
    for row in report["candidates"]:
        run_dir = Path(few.out) / "runs" / row["name"] / f"2_{row['input_size']}px"
        assert rows(run_dir)[-1]["step"] == 2
        assert 0 <= row["scores"][0]["low"] <= row["scores"][0]["tpr"] <= row["scores"][0]["high"]
        assert row["scores"][0]["positives"] == 8 * 6  # pairs of 4 images of 8 persons
    assert report["test"] == str(synth / "glint_syn")
    idle = Fake(stop_at=0)  # everything is there
    assert run(few, idle)["candidates"] == report["candidates"]
    pairs = open_held_out({}, str(synth / "syn.bin"), None)
    found = measure(run_dir, 2, pairs, 0.1)
    assert found.positives == found.negatives == 20
    assert found.false_accepts <= 2
    with pytest.raises(InputError, match=r"was stopped before its 3 steps .*: 2"):
        measure(run_dir, 3, pairs, 0.1)
    assert load_deepglint(synth / "glint_syn").labels_N is not None
