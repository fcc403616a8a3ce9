"""Is there anything to learn? What a small learner gets out of the frozen tower's features, before any training.

A model that was fine-tuned on a few hundred pictures may have learned nothing but how questions are worded. Whether it
could have learned more is seen in seconds: kernel ridge regression from question and picture to the answer, on the very
features that the projector would get. Questions are alike by their words (TF-IDF of one and two), pictures by their
pooled features, and a question about a picture is alike another as both are:

    k((q, x), (q', x')) = words(q, q') * (1 + 3 exp(-|x - x'|^2))

It is cross-validated by group of pictures, and held to three controls: words alone, a wrong picture of the same kind,
any other picture. **Where the right picture gains nothing over a wrong one, neither wording nor training longer will
help**: it takes more pictures, or a tower that sees what is asked. Where it gains, the model should gain as much; no
probe proves that more cannot be had. Nothing here is tuned to a dataset: the constants are fixed.

Source: the method is that of linear probes (Alain and Bengio, arXiv 1610.01644), with a kernel for the question.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.kernel_ridge import KernelRidge
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.model_selection import GroupKFold
from sklearn.preprocessing import StandardScaler

from ldrt_edge.bench.metrics import normalise
from ldrt_edge.bench.statistics import Difference, Rate, joined, paired_difference, rate
from ldrt_edge.bench.vqa import draw_controls
from ldrt_edge.dataset import Dataset, Row, Split, choose_rows, group_by_image
from ldrt_edge.errors import DataError
from ldrt_edge.front import Front
from ldrt_edge.runtimes.hf import load_model
from ldrt_edge.train.collate import PackedRow
from ldrt_edge.train.features import FeatureStore

FOLDS, WRONG_DRAWS, LEAST_QUESTIONS = 5, 10, 20
_MIX, _COMPONENTS, _RIDGE, _CACHE_BYTES = 3.0, 128, 0.3, 20 * 10**9

Matrix = NDArray[np.float64]
Indices = NDArray[np.intp]


@dataclass(frozen=True)
class Learnable:
    """Rates of right answers on pictures that were not learned from, all of them from the same folds.

    words: a learner that gets the question alone.
    right, wrong, any: one that gets the picture too, asked with the right one, others of its kind, any others.
    worth: right less wrong, the answer to the question; clustered by picture.
    """

    words: Rate
    right: Rate
    wrong: Rate
    any: Rate
    worth: Difference


def learnable(
    base: Path, data: Path, split: Split = "train", limit: int = 4000, seed: int = 0
) -> dict[str, Learnable]:
    """Probe the tower of `base` on about `limit` of a dataset's questions, as whole pictures; "overall" and by task.

    Memory grows with the square of `limit`: 4,000 take half a gigabyte. Tasks of fewer than 20 questions are not shown
    apart.

    Raises:
        DataError: fewer than 2 groups of pictures a fold, or a picture cannot be read.
    """
    dataset = Dataset(data)
    rows = choose_rows(list(dataset.rows(split)), limit, seed)
    if len(set(_clusters(rows))) < 2 * FOLDS:
        raise DataError(f"{data}: it takes pictures of {2 * FOLDS} groups or more to learn from some and ask others")
    return probe(rows, _features(base, dataset, rows), seed)


def probe(rows: Sequence[Row], features: Mapping[str, NDArray[np.float32]], seed: int = 0) -> dict[str, Learnable]:
    """The same from a vector (width,) for each picture, by its path in the dataset."""
    learner = _Learner(rows, features, seed)
    hits = {name: np.zeros(len(rows)) for name in ("words", "right", "wrong", "any")}
    folds = GroupKFold(FOLDS, shuffle=True, random_state=seed).split(rows, groups=_clusters(rows))
    for known, asked in folds:
        learner.learn(known)
        images = [rows[i].image for i in asked]
        hits["words"][asked] = learner.right(asked, None)
        hits["right"][asked] = learner.right(asked, images)
        for draw in range(WRONG_DRAWS):
            controls = draw_controls([rows[i] for i in asked], seed + draw)
            hits["wrong"][asked] += learner.right(asked, [controls.same_kind[image] for image in images])
            hits["any"][asked] += learner.right(asked, [controls.any_kind[image] for image in images])
    hits["wrong"] /= WRONG_DRAWS
    hits["any"] /= WRONG_DRAWS
    parts = {"overall": list(range(len(rows)))}
    for task in sorted({row.task for row in rows}):
        parts[task] = [i for i, row in enumerate(rows) if row.task == task]
    return {
        part: _summary({name: right[at] for name, right in hits.items()}, [rows[i] for i in at], seed)
        for part, at in parts.items() if len(at) >= LEAST_QUESTIONS
    }


class _Learner:
    """Kernel ridge regression onto the answers, one column each, with the picture and without."""

    def __init__(self, rows: Sequence[Row], features: Mapping[str, NDArray[np.float32]], seed: int) -> None:
        images = sorted({row.image for row in rows})
        self._place = {image: at for at, image in enumerate(images)}
        self._shown = np.array([self._place[row.image] for row in rows])
        self._pictures = _likeness(np.stack([features[image] for image in images]), seed)
        words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\w+")
        vectors = words.fit_transform([row.question for row in rows])
        self._words: Matrix = (vectors @ vectors.T).toarray()
        answers, self._wanted = np.unique([normalise(row.answer, row.language) for row in rows], return_inverse=True)
        self._targets: Matrix = np.eye(len(answers))[self._wanted]

    def learn(self, known: Indices) -> None:
        """Learn from these rows."""
        self._known, self._prior = known, self._targets[known].mean(0)
        targets = self._targets[known] - self._prior
        kernels = self._kernel(known, None), self._kernel(known, self._shown[known])
        self._blind, self._seeing = (
            KernelRidge(alpha=_RIDGE, kernel="precomputed").fit(kernel, targets) for kernel in kernels
        )

    def right(self, asked: Indices, images: Sequence[str] | None) -> Matrix:
        """1 for each of these rows that is answered rightly, else 0, when it is asked with these pictures."""
        shown = None if images is None else np.array([self._place[image] for image in images])
        model: Any = self._blind if shown is None else self._seeing
        said = (model.predict(self._kernel(asked, shown)) + self._prior).argmax(1)
        return np.asarray(said == self._wanted[asked], np.float64)

    def _kernel(self, rows: Indices, shown: Indices | None) -> Matrix:
        """Likeness of rows, asked with these pictures, to the known rows: (rows, known)."""
        words: Matrix = self._words[np.ix_(rows, self._known)]
        return words if shown is None else words * (1 + _MIX * self._pictures[np.ix_(shown, self._shown[self._known])])


def _likeness(features: NDArray[np.float32], seed: int) -> Matrix:
    """exp(-squared distance) of pictures, (pictures, pictures), in their leading components scaled to mean length 1."""
    scaled = StandardScaler().fit_transform(features.astype(np.float64))
    parts = PCA(min(_COMPONENTS, *scaled.shape), random_state=seed).fit_transform(scaled)
    parts /= np.sqrt((parts**2).sum(1).mean()) or 1.0
    return np.asarray(rbf_kernel(parts, gamma=1.0), np.float64)


def _features(base: Path, dataset: Dataset, rows: Sequence[Row]) -> dict[str, NDArray[np.float32]]:
    """A vector for each picture: mean, deviation and maximum of its patches, and the means of its four quarters."""
    front, model = Front.load(base), load_model(base, "float32")
    store = FeatureStore(model, front, exact=False, limit_bytes=_CACHE_BYTES)
    first = {image: members[0] for image, members in group_by_image(rows).items()}
    store.fill(model, [PackedRow(dataset.image_path(row), row.image_sha256, ()) for row in first.values()])
    side = front.config.image_size // front.config.patch_size
    return {image: _pooled(store.get(row.image_sha256)[0].float().numpy(), side) for image, row in first.items()}


def _pooled(features: NDArray[np.float32], side: int) -> NDArray[np.float32]:
    """(tiles * patches, width) → (7 * width,), from the first tile, which shows the whole picture."""
    patches = features[: side * side]
    grid = patches.reshape(side, side, -1)
    quarters = [part.mean((0, 1)) for half in np.array_split(grid, 2, 0) for part in np.array_split(half, 2, 1)]
    return np.concatenate([patches.mean(0), patches.std(0), patches.max(0), *quarters])


def _summary(hits: Mapping[str, Matrix], rows: Sequence[Row], seed: int) -> Learnable:
    rates = {name: rate(list(values), _clusters(rows), seed) for name, values in hits.items()}
    worth = paired_difference(list(hits["right"]), list(hits["wrong"]), _clusters(rows), seed)
    return Learnable(**rates, worth=worth)


def _clusters(rows: Sequence[Row]) -> list[int]:
    """A number for what is never learned from and asked about at once: a picture's rows, and a group's."""
    number: dict[Hashable, int] = {}
    return [
        number.setdefault(label, len(number)) for label in joined([r.image for r in rows], [r.group for r in rows])
    ]
