"""Rebuild the two name lists of MARS from the image tree, and check them.

python -m reid_rqen.tools.prepare_mars root=DIR

The .mat files of liangzheng06/MARS-evaluation must be in `root/info`; its two name lists (20 MB)
are the sorted file names of the tree. A list that is already there is checked and left alone.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from common.log import exit_on_bad_input, get_logger, setup_logging
from reid_rqen.data.mars import build_tracklets, read_info, read_names
from reid_rqen.data.tracklet import list_frames, subfolders


def prepare(root: Path) -> None:
    """Write `info/train_name.txt` and `info/test_name.txt` where they are missing.

    Raises:
        InputError: the lists do not fit the track tables, as when images are missing.
    """
    info = read_info(root / "info")
    for part, table in (("train", info.train), ("test", info.test)):
        path, folder = root / "info" / f"{part}_name.txt", root / f"bbox_{part}"
        names = read_names(path) if path.is_file() else tree_names(folder)
        build_tracklets(folder, names, table, path if path.is_file() else folder)
        if not path.is_file():
            partial = path.with_suffix(".tmp")
            partial.write_bytes("".join(f"{name}\r\n" for name in names).encode())
            os.replace(partial, path)
        get_logger(__name__).info("%s: %d names, %d tracklets", path, len(names), len(table))


def tree_names(folder: Path) -> list[str]:
    """All file names of a part in the order of the published list: sorted as text."""
    homes = [folder / name for name in subfolders(folder)]
    return sorted(frame.name for home in homes for frame in list_frames(home))


@dataclass
class PrepareMarsConfig:
    """Schema of configs/prepare_mars.yaml."""

    root: Path = MISSING


ConfigStore.instance().store("rqen_prepare_mars_schema", PrepareMarsConfig)


@hydra.main(version_base=None, config_path="../configs", config_name="prepare_mars")
def main(cfg: PrepareMarsConfig) -> None:
    setup_logging(rank=0)
    prepare(Path(cfg.root))


if __name__ == "__main__":
    exit_on_bad_input(main)
