"""The threshold of `predict` out of an evaluation of the same model."""

from pathlib import Path

import pytest

from common.log import InputError
from face_lfr.tests.launch import evaluate
from face_lfr.tests.prediction import draw_album, go
from face_lfr.tests.releases import write


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("net") / "net.safetensors")


@pytest.fixture(scope="module")
def album(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_album(tmp_path_factory.mktemp("album") / "album")


def test_the_threshold_of_an_evaluation(net: Path, synth: Path, tmp_path: Path) -> None:
    words = [f"checkpoint={net}", f"images={synth / 'glint_syn'}", f"out={tmp_path / 'pairs'}"]
    scored = evaluate("protocol=all_pairs", *words, "fpr=[0.1,0.02]")
    pictures = sorted((synth / "glint_syn").rglob("*.jpg"))
    a, b = pictures[0], str(pictures[1])
    options = {"other": b, "calibration": str(tmp_path / "pairs")}
    result = go(net, tmp_path / "out", a, **options, fpr=0.02)
    point = next(point for point in scored["points"] if point["fpr"] == 0.02)
    assert (result["threshold"], result["fpr"]) == (point["threshold"], 0.02)
    assert result["threshold_source"].endswith("pairs/metrics.json: all pairs at FPR 0.02")
    wanted = "same" if result["similarity"] > point["threshold"] else "different"
    assert result["verdict"].startswith(wanted)
    for fpr, message in (
        (None, r"fpr: choose one that .* measured: 0\.1, 0\.02"),
        (1e-8, r"fpr: was not measured in .*, which has 0\.1, 0\.02: 1e-08"),
    ):
        with pytest.raises(InputError, match=message):
            go(net, tmp_path / "out", a, **options, fpr=fpr)
    with pytest.raises(InputError, match=r"measured another model .*: flip is False here and: Tr"):
        go(net, tmp_path / "out", a, **options, fpr=0.1, flip=False)
    later = write(tmp_path / "later.safetensors", seed=1)
    with pytest.raises(InputError, match=r"measured another model .*: seed is 1 here and: 0"):
        go(later, tmp_path / "out", a, **options, fpr=0.1)


def test_the_threshold_of_a_verification(net: Path, synth: Path, tmp_path: Path) -> None:
    words = [f"checkpoint={net}", f"annotations={synth / 'syn.bin'}", f"out={tmp_path / 'ten'}"]
    scored = evaluate("protocol=verification", *words)
    a, b = sorted((synth / "glint_syn").rglob("*.jpg"))[:2]
    options = {"other": str(b), "calibration": str(tmp_path / "ten")}
    result = go(net, tmp_path / "out", a, **options)
    assert result["threshold"] == pytest.approx(1 - scored["syn/threshold"] / 2)
    said = "metrics.json: best accuracy, mean of the folds of syn"
    assert result["threshold_source"].endswith(said)
    assert go(net, tmp_path / "out", a, **options, calibration_set="syn") == result
    with pytest.raises(InputError, match="fpr: a verification has the threshold of best accuracy"):
        go(net, tmp_path / "out", a, **options, fpr=1e-3)
    with pytest.raises(InputError, match=r"calibration_set: choose a set .* \(syn\): lfw"):
        go(net, tmp_path / "out", a, **options, calibration_set="lfw")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no JSON"),
        ("[]", "is not what an evaluation writes: list"),
        ('{"protocol": "video"}', "has no threshold for pictures, .*: video"),
        ('{"protocol": "all_pairs", "points": [{"fpr": 1}]}', "malformed operating points"),
        (
            '{"protocol": "all_pairs", "points": [{"fpr": 1, "threshold": -Infinity}]}',
            "must be a cosine, .*: -inf",
        ),
        ('{"protocol": "verification"}', "there is none"),
        ('{"protocol": "verification", "threshold": "x"}', "threshold is no number: x"),
        ('{"protocol": "verification", "threshold": 9}', "must be a cosine, .*: -3.5"),
    ],
)
def test_broken_evaluations_are_named(
    net: Path, album: Path, tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / "metrics.json").write_text(content)
    with pytest.raises(InputError, match=message):
        go(net, tmp_path / "out", album / "0" / "0.png", calibration=str(tmp_path))


def test_features_of_unknown_origin_are_taken_with_a_warning(
    net: Path, album: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "metrics.json").write_text(
        '{"protocol": "verification", "features": "f.npy", "threshold": 1.2, "val_threshold": 9}'
    )
    other = str(album / "1" / "0.png")
    result = go(net, tmp_path, album / "0" / "0.png", other=other, calibration=str(tmp_path))
    assert result["threshold"] == pytest.approx(0.4)
    assert "measured on f.npy; whether these are features of this model is not known" in caplog.text
