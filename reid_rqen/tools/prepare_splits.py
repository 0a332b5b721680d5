"""Write ten seeded half splits of PRID 2011 or iLIDS-VID, in torchreid's JSON form.

python -m reid_rqen.tools.prepare_splits dataset=prid2011 root=DIR out=splits.json seed=0

For data whose published split file is not at hand. With seed 0 the file holds what the loaders
generate without one.
"""

from dataclasses import dataclass
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from common.log import InputError, exit_on_bad_input, get_logger, setup_logging
from reid_rqen.data.ilidsvid import ilidsvid_persons
from reid_rqen.data.prid2011 import prid2011_persons
from reid_rqen.data.splits import random_splits, write_splits

PERSONS = {"prid2011": prid2011_persons, "ilidsvid": ilidsvid_persons}


def prepare(dataset: str, root: Path, out: Path, seed: int = 0) -> None:
    """Write the splits; `InputError` for an unknown data set or a tree that is not one."""
    if dataset not in PERSONS:
        raise InputError("dataset", f"accepted: {', '.join(PERSONS)}", dataset)
    persons = PERSONS[dataset](root).names
    write_splits(out, random_splits(persons, seed))
    get_logger(__name__).info("%s: ten splits of %d persons, seed %d", out, len(persons), seed)


@dataclass
class PrepareSplitsConfig:
    """Schema of configs/prepare_splits.yaml."""

    dataset: str = MISSING
    root: Path = MISSING
    out: Path = MISSING
    seed: int = 0


ConfigStore.instance().store("rqen_prepare_splits_schema", PrepareSplitsConfig)


@hydra.main(version_base=None, config_path="../configs", config_name="prepare_splits")
def main(cfg: PrepareSplitsConfig) -> None:
    setup_logging(rank=0)
    prepare(cfg.dataset, Path(cfg.root), Path(cfg.out), cfg.seed)


if __name__ == "__main__":
    exit_on_bad_input(main)
