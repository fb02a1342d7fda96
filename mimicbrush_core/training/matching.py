"""Features that two pictures share: where a hole can only be filled by looking at the reference."""

from __future__ import annotations

from types import ModuleType

import numpy as np

from .extras import require

RATIO = 0.75
"""A match must be that much closer than the second best (Lowe 2004 gives 0.8).

Chosen on eight photographs at 512 px under `augmentation.augment` at full strength (medians): a photograph shares 160
features with itself and 2.5 with another one at 0.7, 206 and 5.5 at 0.75, 246 and 13 at 0.8. Without the demand that
the match holds both ways there are about twice as many false ones, and hardly more true ones.
"""


def opencv() -> ModuleType:
    """OpenCV, held to one thread; ArgumentError where it is not installed.

    The data workers are the parallelism. And a worker forked from a process in which OpenCV has threads waits for
    them for ever: so this is called before workers start, too.
    """
    cv2 = require("cv2", "Finding matched features (SIFT)")
    if cv2.getNumThreads() != 1:
        cv2.setNumThreads(1)
    return cv2


def shared_features(source: np.ndarray, reference: np.ndarray, mirrored: bool = False) -> np.ndarray:
    """Positions (x, y) in the source of SIFT features that the reference shows too, float32 [N,2] in pixels.

    Matched is what passes the ratio test and is the best match in both directions (arXiv 2406.07547, section 3.3:
    SIFT between the two frames). source, reference: uint8 [S,S,3]. mirrored: whether exactly one of the two shows
    its scene flipped; SIFT does not recognise a mirror image, so the reference is flipped back before.
    """
    cv2 = opencv()
    sift = cv2.SIFT_create()
    if mirrored:
        reference = np.ascontiguousarray(reference[:, ::-1])
    grey = [cv2.cvtColor(np.ascontiguousarray(picture), cv2.COLOR_RGB2GRAY) for picture in (source, reference)]
    (points, ours), (_, theirs) = (sift.detectAndCompute(picture, None) for picture in grey)
    if ours is None or theirs is None or len(theirs) < 2:  # plain pictures have no features
        return np.zeros((0, 2), np.float32)
    matcher = cv2.BFMatcher(cv2.NORM_L2)
    back = {match.queryIdx: match.trainIdx for match in matcher.match(theirs, ours)}
    kept = [
        points[best.queryIdx].pt
        for best, second in matcher.knnMatch(ours, theirs, k=2)
        if best.distance < RATIO * second.distance and back[best.trainIdx] == best.queryIdx
    ]
    return np.array(kept, np.float32).reshape(-1, 2)


def marked_pixels(points: np.ndarray, size: int) -> np.ndarray:
    """bool [size,size], True at the pixels that hold a point (x, y) of [N,2]."""
    marked = np.zeros((size, size), bool)
    columns, rows = np.clip(points, 0, size - 1).astype(int).T
    marked[rows, columns] = True
    return marked
