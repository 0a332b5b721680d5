"""Names and identifiers of the classes of published checkpoints."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from common.log import InputError
from detection_tsd.data.oid_files import read_classes


class ClassNames(NamedTuple):
    """Names of the foreground classes, label k first to last, and what the files call them."""

    names: tuple[str, ...]
    ids: tuple[Any, ...]


def coco_categories() -> dict[int, str]:
    """The 80 categories of COCO by id, ascending; ids reach 90 with ten gaps (torchvision)."""
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

    listed = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    return {number: name for number, name in enumerate(listed) if number and name != "N/A"}


def name_classes(
    count: int, path: str | None = None, meta: Mapping[str, Any] | None = None
) -> ClassNames:
    """Names of `count` classes: of the file, of the checkpoint, COCO's 80, or numbers.

    Args:
        count: foreground classes.
        path: file of `identifier,name` or `identifier,name,label` lines, as Open Images has it.
        meta: of an mmcv checkpoint; its CLASSES are used where there is no file.

    Raises:
        InputError: the file is not such a file, or it or the checkpoint names another number.
    """
    if path is not None:
        known = read_classes(path)
        if len(known) != count:
            raise InputError(path, f"names {len(known)} classes, the checkpoint has", count)
        return ClassNames(known.names, tuple(known))
    coco = coco_categories()
    written = _written(meta or {})
    if written and len(written) != count:
        what = f"meta of the checkpoint names {len(written)} classes, its head has"
        raise InputError("classes", what, count)
    if count == len(coco) and (not written or _same(written, coco.values())):
        return ClassNames(tuple(coco.values()), tuple(coco))
    numbers = tuple(range(1, count + 1))
    return ClassNames(written or tuple(map(str, numbers)), numbers)


def _written(meta: Mapping[str, Any]) -> tuple[str, ...]:
    found = meta.get("CLASSES")
    is_list = isinstance(found, Sequence) and not isinstance(found, str)
    return tuple(map(str, found)) if is_list and found else ()


def _same(written: Sequence[str], known: Any) -> bool:
    """Some names have an underscore in mmdetection."""
    return [name.replace("_", " ") for name in written] == list(known)
