"""Evaluation protocols by name: which gallery rows a query is ranked against, and which AP.

| name | gallery | removed for a query | average precision |
|---|---|---|---|
| closed_pair | one row per identity | nothing | none (PRID 2011, iLIDS-VID: CMC only) |
| lpw | scene 1, views 1 and 3 | nothing | plain (the paper reports CMC only) |
| mars_official | all 12,180, with the queries | pid -1; same pid and camera | trapezoid |
| mars_11310 | 1,980 queries + 9,330 others | the same | plain |
| mars_9330 | neither queries nor junk | the same | plain |

`mars_official` is the rule of the MARS authors' Matlab code (liangzheng06/MARS-evaluation),
`mars_11310` the one of most later video papers, `mars_9330` the one of torchreid. Their numbers
are not comparable: print the name beside every number.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from common.log import InputError

JUNK_PID = -1  # MARS: detections that show no person; 0 is a distractor and counts as a wrong match


class Protocol(NamedTuple):
    """What is ranked and how it is scored.

    `single_match` demands exactly one gallery row per query identity. `drop_queries` removes the
    gallery rows that are queries themselves. `counts_junk` says whether the published gallery
    size includes the junk rows, which are never ranked in any case when `drop_junk` is set.
    `expects_queries` marks the galleries that by definition contain the queries.
    """

    name: str
    drop_junk: bool
    drop_same_camera: bool
    average_precision: Literal["plain", "trapezoid", "none"]
    drop_queries: bool = False
    single_match: bool = False
    counts_junk: bool = False
    expects_queries: bool = False


PROTOCOLS: dict[str, Protocol] = {
    entry.name: entry
    for entry in (
        Protocol("closed_pair", False, False, "none", single_match=True),
        Protocol("lpw", False, False, "plain"),
        Protocol("mars_official", True, True, "trapezoid", counts_junk=True, expects_queries=True),
        Protocol("mars_11310", True, True, "plain", expects_queries=True),
        Protocol("mars_9330", True, True, "plain", drop_queries=True),
    )
}


def get_protocol(name: str | Protocol) -> Protocol:
    """Return the protocol called `name`; raises `InputError` that lists the valid names."""
    if isinstance(name, Protocol):
        return name
    if name not in PROTOCOLS:
        raise InputError("protocol", f"is none of {', '.join(sorted(PROTOCOLS))}", name)
    return PROTOCOLS[name]
