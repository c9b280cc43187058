"""Every setting of every job: one tree of frozen dataclasses.

The defaults are the same for all data sets. A docstring under a field is its `--help` text. This
module imports nothing heavy; `stego_core.config.load` reads, checks and writes these classes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Gt, Le

from stego_core.config.backbone import BackboneConfig as BackboneConfig
from stego_core.config.base import (
    Fraction,
    LabelValue,
    NonNegative,
    Positive,
    Space,
    Strict,
)
from stego_core.config.chaos import FaultsConfig
from stego_core.config.compat import EvaluateCompat, ImageCompat, MineCompat, TrainCompat
from stego_core.config.doctor import DoctorJob
from stego_core.config.export import ExportJob
from stego_core.config.limits import ImageLimits as ImageLimits
from stego_core.config.method import ClustersConfig, HeadConfig, LossConfig, TrainConfig
from stego_core.config.neighbors import NeighborsConfig as NeighborsConfig
from stego_core.config.predict import LabelMapConfig as LabelMapConfig
from stego_core.config.predict import PredictConfig as PredictConfig
from stego_core.config.tune import TuneConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig(Strict):
    """Where the images (and, for metrics only, the labels) are."""

    root: str = "demo"
    """Folder or URI: `imgs/<split>/*` with optional `labels/<split>/*.png`, or any folder of
    images. The word `demo` stands for the photographs of scikit-image and scikit-learn."""
    split: str = "train"
    """The sub-folder of `imgs/` to read; not used for a folder without `imgs/`."""
    ignore_classes: tuple[LabelValue, ...] = ()
    """Label values that are not scored (treated as 255 by `evaluate` and `tune`)."""
    score_classes: tuple[LabelValue, ...] = ()
    """The only label values to score; empty scores all that are not ignored."""
    fraction: Annotated[float, Gt(0), Le(1)] = 1.0
    """Use only this share of the images, chosen by a hash of each image's path: the same ones
    every time, also when more images come. Applied before `limit`."""
    limit: Positive | None = None
    """Use only the first N images of the stable listing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewConfig(Strict):
    """What the head is trained on: square views cut from the images on the fly."""

    resolution: Positive = 320
    """Side of a view, in pixels; rounded up to a multiple of the patch size."""
    crops: Literal["whole", "five", "random"] = "whole"
    """`whole`: the centre square; `five`: four corners and centre of each image, for
    scenes of many small things (the paper used it on CocoStuff and Cityscapes); `random`: five
    crops at places drawn from the image's id, so every run cuts the same ones."""
    crop_ratio: Annotated[float, Gt(0), Le(1)] = 0.5
    """Side of a crop as a share of the image's side."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreConfig(Strict):
    """The feature store: patch features of every training view, computed once."""

    max_bytes: NonNegative = 20 * 2**30
    """Above this size only embeddings are stored, and training streams through the backbone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job(Strict):
    seed: NonNegative = 0
    limits: ImageLimits = field(default_factory=ImageLimits)
    dry_run: bool = False
    """Print the plan and touch nothing."""
    debug: bool = False
    """Show tracebacks and Ray's own messages."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _ImagesJob(_Job):
    max_failed: Fraction = 1.0
    """Share of images that may fail before the job ends with exit code 4."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MineJob(_ImagesJob):
    """Embed every view and find its nearest neighbours."""

    out: str = "runs/default"
    """The run directory."""
    data: DataConfig = field(default_factory=DataConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    views: ViewConfig = field(default_factory=ViewConfig)
    neighbors: NeighborsConfig = field(default_factory=NeighborsConfig)
    workers: Positive = 1
    """Processes that train, or actors that embed."""
    min_workers: Positive | None = None
    """Go on with as few workers as this where the cluster has no room for more. A training then
    loses workers with a node, and takes them back when one joins; without it, their number is
    fixed."""
    retry: bool = False
    """Try images again that could not be read; with more images, the model is made anew."""
    overwrite: bool = False
    """Replace what was mined from other images or settings, and the model."""
    store: StoreConfig = field(default_factory=StoreConfig)
    compat: MineCompat = field(default_factory=MineCompat)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainJob(MineJob):
    """Distil a head; mines neighbours first where they are missing."""

    head: HeadConfig = field(default_factory=HeadConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    clusters: ClustersConfig = field(default_factory=ClustersConfig)
    compat: TrainCompat = field(default_factory=TrainCompat)


@dataclass(frozen=True, kw_only=True, slots=True)
class TuneJob(TrainJob):
    """Study how results depend on settings: many trainings around these, scored without labels."""

    tune: TuneConfig = field(default_factory=TuneConfig)
    predict: PredictConfig = field(default_factory=PredictConfig)
    space: Space = field(default_factory=Space)
    """What varies: a table of dotted paths in a `--config` file (see docs/sensitivity.md)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentJob(_ImagesJob):
    """Segment a folder or bucket into Parquet."""

    input: str = "demo"
    """Folder or URI of images."""
    model: str = "runs/default"
    """Run directory or checkpoint folder of a trained model."""
    weights: str | None = None
    """The same weights of the backbone, where the place that the training had them from is away."""
    out: str = "runs/default-masks"
    """Where masks, quarantine and status go."""
    actors: NonNegative = 0
    """Actors that run the model; 0: one for each GPU, or without GPUs for each node."""
    crf: bool = False
    """Refine with a dense CRF (a fraction of a second of one CPU per image; see `predict.crf`)."""
    flip: bool = False
    """Average the code with that of the mirrored image (doubles the cost)."""
    mask_size: Literal["model", "original"] = "model"
    """Size of the stored label maps."""
    limit: Positive | None = None
    """Segment only the first N images of the stable listing."""
    predict: LabelMapConfig = field(default_factory=LabelMapConfig)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    overwrite: bool = False
    """Replace an output that other settings made."""
    retry: bool = False
    """Try images again that failed for a reason that may pass: denied, vanished, store in
    trouble, too little memory, too slow, a process that died."""
    compat: ImageCompat = field(default_factory=ImageCompat)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateStoreConfig(Strict):
    """Patch features of a split, kept for the next evaluation of it."""

    uri: str | None = None
    """Folder or bucket that evaluations share: a model with the same backbone finds the features
    of the same images there, and only its head is computed. Without it nothing is kept."""
    max_bytes: NonNegative = 20 * 2**30
    """Nothing is read or kept if the features of this evaluation exceed this size; what the store
    holds already is not counted, and never deleted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateJob(_ImagesJob):
    """Score a model against labels."""

    data: DataConfig = field(default_factory=lambda: DataConfig(split="val"))
    model: str = "runs/default"
    weights: str | None = None
    """The same weights of the backbone, where the place that the training had them from is away."""
    out: str = "runs/default-eval"
    actors: NonNegative = 0
    """As of a segmentation."""
    crf: bool = False
    flip: bool = False
    predict: LabelMapConfig = field(default_factory=LabelMapConfig)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    store: EvaluateStoreConfig = field(default_factory=EvaluateStoreConfig)
    compat: EvaluateCompat = field(default_factory=EvaluateCompat)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportJob(_Job):
    """Make an HTML report of what a run produced."""

    masks: str = "runs/default-masks"
    """Output of segment_bucket.py; the report goes to `report/` below it."""
    model: str = "runs/default"
    """Run directory of train.py, for the loss curves; may be missing."""
    metrics: str | None = None
    """Output of evaluate.py, where there are labels."""
    images: Positive = 60
    """Images shown, spread evenly over all; those of `metrics` that were worst come on top."""
    names: str | None = None
    """TOML file of names by cluster id, as for `export_masks.py`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareJob(_Job):
    """Bring an official data set into the layout that the other jobs read."""

    dataset: (
        Literal[
            "cocostuff27",
            "cocostuff15",
            "cocostuff3",
            "cityscapes27",
            "potsdam3",
            "potsdam3-raw",
            "voc2012",
            "camvid",
        ]
        | None
    ) = None
    """Which data set (see docs/datasets.md)."""
    source: str | None = None
    """Local folder of the unpacked official download."""
    out: str = "data"
    """Folder or URI of the result: `imgs/`, `labels/`, `classes.txt`."""
    splits: tuple[str, ...] = ()
    """Splits to prepare, by the data set's own names; empty takes its usual ones."""
    link: bool = True
    """Link image files to the source where the file system can, instead of copying them."""
    threads: Positive = 8
    """Files read and written at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportJob(_Job):
    """Turn a checkpoint of the original STEGO code into a model, running none of its code."""

    checkpoint: str = "stego.ckpt"
    """The Lightning checkpoint (.ckpt), a local file or URI."""
    out: str = "runs/imported"
    """The run directory; the model goes to `model/` in it, backbone included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChaosJob(_Job):
    """Segment or train again and again under injected faults; count what is lost or changed."""

    out: str = "runs/chaos"
    """Folder or URI of the rounds' outputs and of `chaos.json`."""
    target: Literal["segment", "train"] = "segment"
    """The job that is disturbed. A training starts for many seconds: give `train` a mean time
    between faults of 15 s or more, or it gets nowhere before the last of them."""
    input: str | None = None
    """Folder or URI of images; without it, small pictures are drawn."""
    model: str | None = None
    """Trained model; without it, a small one of random weights. Of `segment` only."""
    settings: str | None = None
    """TOML file with the settings of the training; without it, those of a tiny one."""
    images: Positive = 400
    """Pictures that are drawn."""
    steps: Positive = 200
    """Steps of the tiny training."""
    actors: Positive = 2
    """Actors that segment, or workers of the tiny training."""
    nodes: NonNegative = 3
    """Worker nodes on this machine; 0 takes the cluster of the environment, head spared."""
    node_cpus: Positive = 2
    """CPUs that each of these nodes says it has."""
    predict: LabelMapConfig = field(
        default_factory=lambda: LabelMapConfig(resolution=96, unit_images=4, shard_batches=8)
    )
    faults: FaultsConfig = field(default_factory=FaultsConfig)


Job = (
    MineJob
    | TrainJob
    | TuneJob
    | SegmentJob
    | EvaluateJob
    | ReportJob
    | PrepareJob
    | ImportJob
    | ChaosJob
    | DoctorJob
    | ExportJob
)
