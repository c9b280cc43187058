"""Settings of the method: head, loss, optimisation, clusters."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from annotated_types import Ge, Le

from stego_core.config.base import (
    Decay,
    Fraction,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Strict,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadConfig(Strict):
    """The trained projection of features to the code."""

    kind: Literal["nonlinear", "linear", "transformer", "none"] = "nonlinear"
    """`nonlinear` adds a two-layer branch to the linear one (paper, section 4); `transformer` has
    a transformer block before it, in which the tokens of an image see each other, as CAUSE does;
    `none` takes the features as the code, whatever `dim` says: the paper's baseline of the
    backbone alone."""
    dim: Positive = 64
    """Channels of the code (the paper has 70 or more)."""
    dropout: Annotated[float, Ge(0), Le(0.9)] = 0.1
    """Channel dropout of the features in training."""
    whiten: NonNegative = 64
    """Principal components of the features that teacher and head see, each scaled to variance 1;
    the head starts as the identity on them. 0 leaves features as they are, as the paper does."""
    details: NonNegative = 192
    """Principal components beyond those that `whiten` scales, which the model keeps beside the
    code. Linear probes read them; loss and clusters do not. Not used without `whiten`."""
    consistent: bool = True
    """Rank neighbours anew in whitened space, and scale directions by how well matched tokens of
    neighbouring views agree in them: once before training, once on the trained codes. Not used
    without `whiten`."""
    smooth: NonNegativeFloat = 0.2
    """Temperature at which an image's tokens share their codes with tokens of similar features,
    when clusters are fitted and images segmented; 0 leaves each code as it is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PairConfig(Strict):
    """Weight and shift of one kind of pair."""

    weight: NonNegativeFloat
    """λ of the paper."""
    shift: float
    """b of the paper: correspondences above it attract, below it repel. Used when
    `loss.shifts` is `fixed`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig(Strict):
    """The correspondence loss (paper, section 3)."""

    energy: Literal["correspondence", "smooth", "concept"] = "correspondence"
    """What pairs of points pay for: `correspondence` compares codes, as the paper does; `smooth`
    compares their soft assignments to prototypes, as SmooSeg does, and needs no neighbours;
    `concept` has no pairs, but contrasts codes by the concepts of their features, as CAUSE does."""
    shifts: Literal["auto", "fixed", "adaptive"] = "auto"
    """`auto` sets one shift for all kinds of pairs, from correspondences measured on the views,
    and is `adaptive` with `head.whiten = 0`; `fixed` uses the numbers given for each kind;
    `adaptive` computes a shift for each kind in each step from the mean correspondences of
    features and codes, as EAGLE does."""
    self: PairConfig = field(default_factory=lambda: PairConfig(weight=0.3, shift=0.08))
    knn: PairConfig = field(default_factory=lambda: PairConfig(weight=1.0, shift=0.02))
    random: PairConfig = field(default_factory=lambda: PairConfig(weight=0.63, shift=0.66))
    samples: Positive = 11
    """S: S x S points are drawn from each feature map."""
    negatives: Positive = 5
    """Random partners drawn for each image and step."""
    pointwise: bool = False
    """Spatial centring of the feature correspondences (paper, Eq. 5)."""
    zero_clamp: bool = True
    """Clamp code correspondences at 0 (paper, section 3.2)."""
    stabilize: bool = False
    """Also clamp code correspondences at 0.8."""
    reconstruction: NonNegativeFloat = 0.0
    """Weight of the reconstruction loss: the features predicted linearly from the code."""
    alignment: NonNegativeFloat = 0.0
    """Weight of the alignment loss: a view and its augmented copy should have the same code where
    they show the same place. Runs the backbone in every step."""
    crf: NonNegativeFloat = 0.0
    """Weight of the CRF loss: near pixels of like colour should have like codes. Reads the images
    in every step."""
    local: NonNegativeFloat = 0.0
    """Weight of the same loss on codes mixed with like neighbours in the grid (local hidden
    positives)."""
    salience: bool = False
    """Draw nine in ten points from labelled pixels (the original's `use_salience`). A study: the
    points then depend on where there are labels."""
    oracle: bool = False
    """Use labels, one-hot, in place of the features of the correspondence loss (the original's
    `use_true_labels`). A study of the loss: training is then supervised, its scores no result."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig(Strict):
    """The optimisation."""

    steps: NonNegative = 300
    """Batches, however many workers share them."""
    batch: Positive = 16
    """Views of one step over all workers together."""
    head_lr: PositiveFloat = 1e-4
    probe_lr: PositiveFloat = 5e-3
    checkpoint_every: Positive = 200
    """Steps between checkpoints; a killed run continues from the newest."""
    log_every: Positive = 20
    """Steps between lines of events.jsonl."""
    linear_pixels: Positive = 1024
    """Labelled pixels drawn from each view for a linear probe that is trained, not fitted."""
    linear_refit: bool = True
    """With labels: fit the linear probe to its optimum after training, and another one on the
    frozen features beside it; false keeps the probe that SGD trained, as the paper does."""
    ema: Decay = 0.0
    """Decay of a moving average of the head, which becomes the model in place of the last step's
    head; 0.99 is usual, 0 keeps none."""
    select: Literal["last", "agreement", "stability", "margin"] = "last"
    """Which state becomes the model: that after the last step, or the best by a criterion that
    looks at no label, among those at every `checkpoint_every` steps, the untrained one included.
    Each is fitted and kept below `candidates/`."""
    reset_probes_at: Positive | None = None
    """After this many batches both probes start anew, with their optimisers (the original's
    `reset_probe_steps`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClustersConfig(Strict):
    """The cluster probe: which code means which cluster."""

    count: NonNegative = 0
    """K, the number of clusters; 0 chooses it before training, without labels: the largest number
    whose clusters neighbouring images agree on as well as on any other (docs/options.md)."""
    extra: NonNegative = 0
    """Clusters beyond K (the original's `extra_clusters`). Those that match no class are errors
    when scored."""
    refit: Literal["kmeans", "modularity", "none"] = "kmeans"
    """`kmeans`: after training, spherical k-means over the codes sets the clusters (labels are
    never used); `modularity`: clusters that maximise the modularity of the graph of codes, as
    CAUSE does; `none` keeps the probe that SGD trained, as the paper does."""
    alpha: PositiveFloat | None = None
    """Sharpness of the soft assignment that trains the probe, softmax(alpha * cosine) (the
    original's `alpha` of its cluster probe); without it each code counts for its best cluster
    alone, as in the paper. Only with `refit` = `none`: a refit starts from the codes."""
    boost: Literal["none", "primaps"] = "none"
    """`primaps` fits the clusters that the refit ends with to mask proposals of each image, as
    PriMaPs-EM does."""
    over: Positive = 1
    """Fit this many times the clusters, then merge them by average linkage; a merged cluster
    keeps all its centroids."""
    restarts: Positive = 8
    """k-means++ starts; the best by mean cosine is kept, and where `head.consistent` matches
    neighbours by their agreement too."""
    background: Fraction = 0.1
    """Share of the weight that tokens of low objectness (what surrounds things) have together when
    clusters are fitted; 1 weighs all tokens alike."""
    sample: Positive = 60_000
    """Codes that k-means is fitted on."""
    passes: NonNegative = 0
    """Iterations of k-means over all codes of all views after those on the sample, shared by the
    workers. Only with `refit` = `kmeans` and without `boost`."""

    @property
    def total(self) -> int:
        """Return the clusters of the probe: `count` and `extra`."""
        return self.count + self.extra

    @property
    def fitted(self) -> int:
        """Return the clusters that are fitted after training, before they are merged."""
        return self.total * self.over


def settled_loss(loss: LossConfig, head: HeadConfig) -> LossConfig:
    """Return the loss with `shifts` as they are found: `auto` is `adaptive` with plain features.

    The correspondences of plain features differ from those of whitened ones, for which the measured
    shift was made (docs/adr/0009-automatic-shifts.md has the trials).
    """
    is_plain = loss.shifts == "auto" and not head.whiten
    return replace(loss, shifts="adaptive") if is_plain else loss
