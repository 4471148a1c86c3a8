"""How varied prompts are, measured on their embeddings: mean similarities, and clusters as topics.

Paper (section on diversity): the cosine similarity of each prompt to all others, averaged; 1,000 prompts of each source.
A lower mean says that the prompts of a source are less alike. Topics there are named by a judge; here they are clusters,
and where a judge is at hand, labels besides.
"""

import dataclasses
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from synpo_assets.method.outcomes import COVERAGE

Row = dict[str, Any]

# Of this iteration, of the seed's train split, and of the baseline by M_0.
SOURCES = ("synthetic", "seed", "self_instruct")
MOST_ROUNDS = 100
RESAMPLES = 2000
NARROWEST_BANDWIDTH = 0.005


@dataclasses.dataclass(frozen=True)
class Diversity:
    """What was measured of several sources of prompts.

    By source: a row of figures, each prompt's mean similarity to the others, and the prompts most and least like the others.
    `topics` has a row per cluster, largest first, with its most central prompt and how many it holds of each source.
    """

    rows: list[Row]
    similarities: dict[str, np.ndarray]
    extremes: list[Row]
    topics: list[Row]


def equal_samples(sources: Mapping[str, Sequence[str]], most: int, random_seed: int) -> dict[str, list[str]]:
    """Random samples of equal size, so that figures which depend on the number of prompts can be compared.

    The smallest source decides if it has fewer than `most`. Sources with fewer than two prompts are left out: their prompts
    have no others to be compared with.

    Examples:
        >>> samples = equal_samples({"many": ["a", "b", "c"], "few": ["d", "e"], "one": ["f"]}, 1000, random_seed=0)
        >>> {name: len(prompts) for name, prompts in samples.items()}
        {'many': 2, 'few': 2}
    """
    compared = {name: prompts for name, prompts in sources.items() if len(prompts) > 1}
    size = min([most, *map(len, compared.values())])
    return {
        name: random.Random(f"{random_seed}:{name}").sample(list(prompts), size) for name, prompts in compared.items()
    }


def mean_similarities(embeddings: np.ndarray) -> np.ndarray:
    """The mean cosine similarity of each embedding to all others, of shape (prompts,).

    Embeddings are of shape (prompts, dimensions), at least two, none of length 0; other lengths do not count.

    Examples:
        >>> mean_similarities(np.array([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])).tolist()
        [0.5, 0.5, 0.0]
    """
    vectors = _unit(embeddings)
    # All others together: the sum of all, less the prompt itself. A matrix of all pairs is never made.
    return ((vectors @ vectors.sum(axis=0)) - (vectors**2).sum(axis=1)) / (len(vectors) - 1)


def similarity_interval(embeddings: np.ndarray, random_seed: int) -> tuple[float, float]:
    """The percentile bootstrap interval, 95 %, of the mean similarity of two prompts, over which prompts there are.

    Each resample draws prompts with replacement. A prompt that it holds twice is not compared with itself: that similarity of
    1 is none between two prompts, and would move the interval away from the mean.
    """
    vectors = _unit(embeddings)
    count = len(vectors)
    times = np.random.default_rng(random_seed).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    own = (times**2).sum(axis=1)
    # A resample of one prompt alone has no two to compare.
    times, pairs = times[own < count**2], count**2 - own[own < count**2]
    means = (((times @ vectors) ** 2).sum(axis=1) - (times**2).sum(axis=1)) / pairs
    low, high = np.quantile(means, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return float(low), float(high)


def similarity_figures(similarities: np.ndarray) -> Row:
    """Mean, standard deviation (of these numbers themselves, not of a population) and percentiles.

    Examples:
        >>> similarity_figures(np.array([0.0, 0.5, 1.0]))["median"]
        0.5
    """
    low, median, high = (float(value) for value in np.percentile(similarities, [5, 50, 95]))
    return {
        "mean": float(similarities.mean()),
        "standard_deviation": float(similarities.std()),
        "percentile_5": low,
        "median": median,
        "percentile_95": high,
    }


def density(values: np.ndarray, places: np.ndarray) -> np.ndarray:
    """A Gaussian kernel density estimate of the values at some places, with Scott's bandwidth."""
    # As matplotlib's GaussianKDE, which refuses values that are all equal.
    bandwidth = max(float(values.std()) * len(values) ** -0.2, NARROWEST_BANDWIDTH)
    kernels = np.exp(-0.5 * ((places[:, None] - values[None, :]) / bandwidth) ** 2)
    return kernels.mean(axis=1) / (bandwidth * np.sqrt(2 * np.pi))


def cluster(embeddings: np.ndarray, clusters: int, random_seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorts embeddings into clusters: k-means on vectors of length 1, begun as k-means++ does (Arthur, Vassilvitskii 2007).

    Embeddings are of shape (prompts, dimensions), none of length 0. Returns the cluster of each, counted from 0, and the
    centers, which are fewer where there are fewer different embeddings.

    Examples:
        >>> labels, centers = cluster(np.array([[1.0, 0.0], [0.0, 1.0], [3.0, 0.0]]), 2, random_seed=0)
        >>> bool(labels[0] == labels[2] != labels[1]), centers.shape
        (True, (2, 2))
    """
    vectors = _unit(embeddings)
    centers = _first_centers(vectors, clusters, np.random.default_rng(random_seed))
    labels = _nearest(vectors, centers)
    for _ in range(MOST_ROUNDS):
        # A cluster that lost all its members keeps its place.
        for number in np.unique(labels):
            centers[number] = vectors[labels == number].mean(axis=0)
        before, labels = labels, _nearest(vectors, centers)
        if np.array_equal(before, labels):
            break
    return labels, centers


def coverage(labels: np.ndarray) -> Row:
    """How many clusters the prompts of one source touch, and how evenly: the entropy of their shares, in nats.

    Its exponential is the number of clusters that would have this entropy if all of them had equal shares.

    Examples:
        >>> coverage(np.array([0, 0, 7, 7]))
        {'clusters_touched': 2, 'cluster_entropy': 0.6931471805599453, 'effective_clusters': 2.0}
    """
    touched, entropy = _spread(labels)
    return {"clusters_touched": touched, "cluster_entropy": entropy, "effective_clusters": float(np.exp(entropy))}


def label_coverage(labelled: Mapping[str, Sequence[Mapping[str, Any] | None]]) -> list[Row]:
    """How many topics and intentions the prompts of each source cover, and how evenly (entropy of the shares, in nats).

    By source, each prompt has a `topic` and an `intention`, or is None where the judge named none.

    Examples:
        >>> music, law = ({"topic": topic, "intention": "get ideas"} for topic in ("music", "law"))
        >>> label_coverage({"seed": [music, law, None]})[0]["topics"]
        2
    """
    rows = []
    for source, labels in labelled.items():
        known = [label for label in labels if label is not None]
        row: Row = {"source": source, "labelled": len(known), "not_labelled": len(labels) - len(known)}
        for kind in ("topic", "intention"):
            row[f"{kind}s"], row[f"{kind}_entropy"] = _spread(np.array([label[kind] for label in known]))
        rows.append(row)
    return rows


def label_counts(labelled: Mapping[str, Sequence[Mapping[str, Any] | None]]) -> list[Row]:
    """How many prompts of each source have each label: a row per topic, then per intention, the most frequent first."""
    rows = []
    for kind in ("topic", "intention"):
        counts = {source: Counter(label[kind] for label in labels if label) for source, labels in labelled.items()}
        for name, _ in sum(counts.values(), Counter()).most_common():
            rows.append({"kind": kind, "label": name, **{source: own[name] for source, own in counts.items()}})
    return rows


def measure(prompts: Mapping[str, Sequence[str]], embeddings: np.ndarray, clusters: int, random_seed: int) -> Diversity:
    """Measures the diversity of several sources of prompts, two at least of each, which are clustered all together.

    There is one row of embeddings per prompt, in the order of the sources.
    """
    ends = np.cumsum([len(texts) for texts in prompts.values()])[:-1]
    vectors = dict(zip(prompts, np.split(embeddings, ends), strict=True))
    similarities = {name: mean_similarities(own) for name, own in vectors.items()}
    labels, centers = cluster(embeddings, clusters, random_seed)
    by_source = dict(zip(prompts, np.split(labels, ends), strict=True))
    return Diversity(
        rows=[
            {
                "source": name,
                "prompts": len(own),
                **similarity_figures(own),
                **dict(zip(("mean_low", "mean_high"), similarity_interval(vectors[name], random_seed), strict=True)),
                **coverage(by_source[name]),
            }
            for name, own in similarities.items()
        ],
        similarities=similarities,
        extremes=[
            {
                "source": name,
                "which": f"{which} like the others",
                "similarity": float(own[row]),
                "prompt": prompts[name][row],
            }
            for name, own in similarities.items()
            for which, row in (("most", int(own.argmax())), ("least", int(own.argmin())))
        ],
        topics=_topics(
            [text for texts in prompts.values() for text in texts], by_source, _unit(embeddings) @ centers.T
        ),
    )


def _topics(texts: Sequence[str], by_source: Mapping[str, np.ndarray], closeness: np.ndarray) -> list[Row]:
    """The clusters with members; `closeness` has a row per text and a column per center, larger is closer."""
    labels = np.concatenate(list(by_source.values()))
    rows = []
    for number in np.unique(labels):
        members = np.flatnonzero(labels == number)
        counts = {name: int((own == number).sum()) for name, own in by_source.items()}
        rows.append({**counts, "central_prompt": texts[members[closeness[members, number].argmax()]]})
    return sorted(rows, key=lambda row: sum(row[name] for name in by_source), reverse=True)


def _spread(labels: np.ndarray) -> tuple[int, float]:
    """How many different labels there are, and the entropy of their shares in nats; 0 of none."""
    _, counts = np.unique(labels, return_counts=True)
    shares = counts / counts.sum()
    # Minus zero would be shown as such.
    return len(counts), abs(float(-(shares * np.log(shares)).sum()))


def _first_centers(vectors: np.ndarray, clusters: int, generator: np.random.Generator) -> np.ndarray:
    """Centers far from each other: each next one is drawn with its squared distance to the nearest as weight."""
    chosen = [int(generator.integers(len(vectors)))]
    distances = np.full(len(vectors), np.inf)
    while len(chosen) < clusters:
        distances = np.minimum(distances, ((vectors - vectors[chosen[-1]]) ** 2).sum(axis=1))
        if not distances.any():
            break
        chosen.append(int(generator.choice(len(vectors), p=distances / distances.sum())))
    return vectors[chosen].copy()


def _nearest(vectors: np.ndarray, centers: np.ndarray) -> np.ndarray:
    return ((centers**2).sum(axis=1) - 2 * vectors @ centers.T).argmin(axis=1)


def _unit(embeddings: np.ndarray) -> np.ndarray:
    """The embeddings in double precision, scaled to length 1."""
    vectors = np.asarray(embeddings, np.float64)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
