"""Every box head of the configurations is the row that its name says."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException
from hydra.utils import instantiate
from omegaconf import DictConfig, open_dict

from detection_tsd.models.d_head import DHead
from detection_tsd.models.double_head import DoubleHead
from detection_tsd.models.dpool_head import DeformPoolHead
from detection_tsd.models.sibling_head import BoxHead, SiblingHead
from detection_tsd.models.tsd_head import TSDHead
from detection_tsd.tests.small_heads import count

FOLDER = Path(__file__).resolve().parents[1] / "configs" / "head"
BASELINE, TSD, JOINT = 14_310_805, 31_575_289, 45_886_094
# Class, parameters for 80 classes (6 of the small ones), and what sets the row apart.
ROWS: dict[str, tuple[type[BoxHead], int, dict[str, Any]]] = {
    "sibling": (SiblingHead, BASELINE, {"loss_weights": (1.0, 1.0), "pooling": "aligned"}),
    "sibling_wide": (SiblingHead, 30_718_357, {}),
    "d_head": (DHead, 28_206_485, {}),
    "dpool": (DeformPoolHead, 28_306_935, {"sampler": "aligned", "gamma": 0.1}),
    "double_head": (DoubleHead, 19_898_261, {"enlarge": 1.3, "loss_weights": (2.0, 2.0)}),
    "tsd": (TSDHead, JOINT, {"margin_cls": 0.2, "margin_box": 0.2, "pc_mode": "repo"}),
    "tsd_plain": (TSDHead, TSD, {"margin_cls": None, "margin_box": None, "sibling": None}),
    "tsd_joint": (TSDHead, JOINT, {"margin_cls": None, "margin_box": None}),
    "tsd_mcls": (TSDHead, JOINT, {"margin_cls": 0.2, "margin_box": None}),
    "tsd_mloc": (TSDHead, JOINT, {"margin_cls": None, "margin_box": 0.2}),
    "tsd_detached": (TSDHead, JOINT, {"margin_cls": 0.2, "detach_delta_r_target": True}),
    "sibling_small": (SiblingHead, 221_859, {}),
    "sibling_wide_small": (SiblingHead, 707_435, {}),
    "d_head_small": (DHead, 439_203, {}),
    "dpool_small": (DeformPoolHead, 332_805, {}),
    "double_head_small": (DoubleHead, 311_011, {"loss_weights": (2.0, 2.0)}),
    "tsd_small": (TSDHead, 776_298, {"margin_cls": 0.2, "margin_box": 0.2}),
    "tsd_plain_small": (TSDHead, 554_439, {"margin_cls": None, "sibling": None}),
    "tsd_joint_small": (TSDHead, 776_298, {"margin_cls": None, "margin_box": None}),
    "tsd_detached_small": (TSDHead, 776_298, {"detach_delta_r_target": True}),
}


def node(name: str, *words: str) -> DictConfig:
    """The head's node for 80 classes, or 6 of the small ones."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(FOLDER.parent), version_base=None):
        cfg = compose(overrides=[f"+head={name}", *words])
    with open_dict(cfg):
        cfg.num_classes = 6 if name.endswith("_small") else 80
    return cfg.head


def build(name: str, *words: str) -> Any:
    with torch.device("meta"):
        return instantiate(node(name, *words))


def test_no_row_is_missing() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == ROWS.keys()


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_what_it_says(name: str) -> None:
    kind, parameters, settings = ROWS[name]
    found = build(name)
    small = name.endswith("_small")
    assert type(found) is kind
    assert count(found) == parameters
    assert found.num_classes == (6 if small else 80)
    assert (found.level_base, found.channels) == ((18.0, 32) if small else (56.0, 256))
    assert (found.size, found.samples, found.plus) == (7, 2, 0.0)
    assert found.stds == (0.1, 0.1, 0.2, 0.2)
    for key, value in settings.items():
        assert getattr(found, key) == value, key


@pytest.mark.parametrize("name", ROWS)
def test_the_first_line_names_the_row(name: str) -> None:
    """Numbers of parameters that it claims are those of the model."""
    first = (FOLDER / f"{name}.yaml").read_text().splitlines()[0]
    assert first.startswith("# ")
    claimed = {int(word.replace(",", "")) for word in re.findall(r"\d[\d,]*,\d{3}", first)}
    assert claimed <= {ROWS[name][1], TSD}


def test_the_conventions_of_the_authors_code() -> None:
    words = ["head.sampler=legacy", "head.pooling=mmdet_v1", "head.plus=1.0"]
    found = build("tsd", *words, "head.margin_cls=0.3", "head.margin_box=0.3")
    assert (found.sampler, found.shift_samples, found.pooling) == ("legacy", 4, "mmdet_v1")
    assert found.plus == 1.0
    assert (found.margin_cls, found.margin_box) == (0.3, 0.3)


@pytest.mark.parametrize("cls_shift", ["point", "prop"])
@pytest.mark.parametrize("reg_shift", ["point", "prop"])
def test_ways_to_derive_the_proposals(cls_shift: str, reg_shift: str) -> None:
    found = build("tsd", f"head.cls_shift={cls_shift}", f"head.reg_shift={reg_shift}")
    bins = {"point": 49, "prop": 1}
    tail = 256 * 256 + 256 + 257 * 2 * bins[cls_shift]
    assert count(found.offset.cls) == tail
    assert count(found.offset.reg) == 256 * 256 + 256 + 257 * 2 * bins[reg_shift]


def test_a_misspelt_key_is_refused() -> None:
    with pytest.raises(ConfigCompositionException, match="margn_cls"):
        node("tsd", "head.margn_cls=0.3")
