"""What the tests of `predict` share: drawn faces, a call that checks files, features by hand."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from face_lfr.data.faces import Identity, Pose, render
from face_lfr.predict import PredictConfig, run
from face_lfr.weights import open_trained


def draw_album(root: Path) -> Path:
    """Pictures `<person>/<number>.png` of three persons, 112 x 112; two of them have one only."""
    rng = np.random.default_rng(0)
    for person, count in enumerate((1, 11, 1)):
        face = Identity.draw(rng)
        for number in range(count):
            save(root / str(person) / f"{number}.png", render(face, Pose.draw(rng)))
    return root


def save(path: Path, image_HWC: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image_HWC[..., ::-1])
    return path


def go(net: Path, out: Path, source: Path, **options: Any) -> dict[str, Any]:
    cfg = PredictConfig(
        input=str(source), out=str(out), checkpoint=str(net), device="cpu", **options
    )
    result = run(cfg)

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    text = (out / "predict.json").read_text()
    assert json.loads(text, parse_constant=refuse) == result
    drawn = cv2.imread(str(out / "predict.png"))
    assert drawn.shape[1] >= 600
    assert drawn.std() > 20
    return result


def features(net: Path, faces: list[np.ndarray], flip: bool = True) -> np.ndarray:
    """Features (N, D) of aligned faces, step by step."""
    model, rows = open_trained(net).model, []
    for face in faces:
        small = cv2.resize(face, (24, 24), interpolation=cv2.INTER_LINEAR)
        x_3HW = (torch.from_numpy(small.transpose(2, 0, 1).astype(np.float32)) - 127.5) / 127.5
        with torch.no_grad():
            image, mirror = model(torch.stack([x_3HW, x_3HW.flip(-1)]))
        rows.append(((image + mirror) / 2 if flip else image).double().numpy())
    return np.stack(rows)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))
