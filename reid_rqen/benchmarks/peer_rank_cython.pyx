# cython: boundscheck=False, wraparound=False, nonecheck=False, cdivision=True
"""The rule and the cost of torchreid's Cython evaluator, written anew.

Like the original it sorts the whole matrix, gathers all matches, walks every gallery row of every
query in C, keeps running sums in float32 and adds up the curves at the end.
"""

import numpy as np


def ranked(distance, query_pid, query_cam, gallery_pid, gallery_cam, max_rank):
    """CMC at ranks 1..max_rank (float32) and mAP."""
    return _ranked(
        np.asarray(distance, dtype=np.float32),
        np.asarray(query_pid, dtype=np.int64),
        np.asarray(query_cam, dtype=np.int64),
        np.asarray(gallery_pid, dtype=np.int64),
        np.asarray(gallery_cam, dtype=np.int64),
        max_rank,
    )


cdef _ranked(
    float[:, :] distance,
    long[:] query_pid,
    long[:] query_cam,
    long[:] gallery_pid,
    long[:] gallery_cam,
    long max_rank,
):
    cdef long queries = distance.shape[0]
    cdef long rows = distance.shape[1]
    cdef long[:, :] order = np.argsort(distance, axis=1)
    cdef long[:, :] match = (
        np.asarray(gallery_pid)[np.asarray(order)] == np.asarray(query_pid)[:, None]
    ).astype(np.int64)
    cdef float[:, :] curve = np.zeros((queries, max_rank), dtype=np.float32)
    cdef float[:] average = np.zeros(queries, dtype=np.float32)
    cdef float[:] hit = np.zeros(rows, dtype=np.float32)
    cdef float[:] found = np.zeros(rows, dtype=np.float32)
    cdef float[:] mean_curve = np.zeros(max_rank, dtype=np.float32)
    cdef float valid = 0, total, precision, mean_average = 0
    cdef long query, place, column, kept
    for query in range(queries):
        kept = 0
        total = 0
        for place in range(rows):
            column = order[query, place]
            if gallery_pid[column] != query_pid[query] or gallery_cam[column] != query_cam[query]:
                hit[kept] = match[query, place]
                total += hit[kept]
                kept += 1
        if total == 0:
            continue
        valid += 1
        found[0] = hit[0]
        for place in range(1, kept):
            found[place] = found[place - 1] + hit[place]
        for place in range(min(max_rank, kept)):
            curve[query, place] = 1 if found[place] > 1 else found[place]
        precision = 0
        for place in range(kept):
            precision += found[place] / (place + 1.0) * hit[place]
        average[query] = precision / total
    for place in range(max_rank):
        for query in range(queries):
            mean_curve[place] += curve[query, place]
        mean_curve[place] /= valid
    for query in range(queries):
        mean_average += average[query]
    return np.asarray(mean_curve), mean_average / valid
