"""An official data set brought into our layout, once; what is there already stays as it is.

Images are linked where the file system can and copied otherwise, never encoded again; tiles of
.mat files and mosaics become PNG. Labels become 8-bit PNG of class ids, 255 = ignore. Each file
becomes visible when it is complete, so a killed run is continued by starting it again.
"""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stego_core.config.load import dump_toml
from stego_core.config.schema import PrepareJob
from stego_core.datasets import camvid, cityscapes, coco_stuff, potsdam, voc
from stego_core.datasets.decoders import Decoders
from stego_core.datasets.official import Found, Item, Official
from stego_core.errors import ConfigError, InputError
from stego_core.storage import fs
from stego_core.storage.lease import hold
from stego_core.storage.names import below
from stego_core.storage.run import RunDirectory

logger = logging.getLogger(__name__)

DATASETS: dict[str, Official] = {
    "cocostuff27": coco_stuff.COCOSTUFF27,
    "cocostuff15": coco_stuff.COCOSTUFF15,
    "cocostuff3": coco_stuff.COCOSTUFF3,
    "cityscapes27": cityscapes.CITYSCAPES27,
    "potsdam3": potsdam.POTSDAM3,
    "potsdam3-raw": potsdam.POTSDAM3_RAW,
    "voc2012": voc.VOC2012,
    "camvid": camvid.CAMVID,
}
_MAX_MOSAICS = 2  # held in memory at a time: one has 36 million pixels, several times over
_SHOWN_PROBLEMS = 20
_TILE_NAME = re.compile(r"(_r\d+_c\d+)?\.\w+$")  # what follows the stem of an item
_SPLIT = re.compile(r"\w[\w+-]*")

Pieces = Iterable[tuple[str, NDArray[np.uint8]]]


def plan_prepare(job: PrepareJob) -> list[str]:
    """Return what a run would do and what stands in its way, one line each.

    Only names and lists are read; what is wrong inside a file shows in the run.

    Raises:
        ConfigError: if the data set or the source is not named, or a split has no usable name.
    """
    official, splits = _find(job)
    names = official.class_names
    lines = [
        f"data set: {job.dataset}, {len(names)} classes: {', '.join(names)}",
        f"source: {job.source}",
        f"out: {job.out}",
    ]
    for split, found in splits.items():
        labelled = sum(item.label is not None for item in found.items)
        thing = "mosaics" if official.storage == "mosaics" else "images"
        done = _present(fs.join(job.out, "imgs", split))
        left = sum(_image_name(official, item) not in done for item in found.items)
        lines.append(
            f"{split}: {len(found.items)} {thing}, {labelled} with labels; {left} {thing} to do"
        )
        lines += [f"{split}: {note}" for note in found.notes]
    problems = _problems(job, official, splits)
    lines += [f"problem: {problem}" for problem in problems]
    if problems:
        lines.append("these problems would end the run before it writes anything")
    return lines


def prepare(job: PrepareJob, run: RunDirectory, decoders: Decoders) -> None:
    """Write the data set to `job.out`.

    Args:
        job: the settings.
        run: of `job.out`: status and events lie beside the data.
        decoders: of images and labels.

    Raises:
        ConfigError: as `plan_prepare`, or if `job.out` holds another data set, or another job does.
        InputError: if files are missing, before anything is written; or if some can't be used,
            after all others are written. Every problem has a line.
    """
    official, splits = _find(job)
    problems = _problems(job, official, splits)
    if problems:
        raise InputError("\n".join(problems))
    with hold(job.out):
        problems = _write(job, run, decoders, official, splits)
    if problems:
        more = len(problems) - _SHOWN_PROBLEMS
        shown = problems[:_SHOWN_PROBLEMS]
        shown += [f"... and {more} more, all in {run.path('events.jsonl')}"] if more > 0 else []
        raise InputError("\n".join(["some files can't be used; the others are written", *shown]))


def _write(
    job: PrepareJob,
    run: RunDirectory,
    decoders: Decoders,
    official: Official,
    splits: dict[str, Found],
) -> list[str]:
    """Write all splits; return what can't be used."""
    problems: list[str] = []
    run.claim({"dataset": job.dataset})
    fs.write_bytes(run.path("config.resolved.toml"), dump_toml(job).encode())
    names = "".join(f"{name}\n" for name in official.class_names)
    fs.write_bytes(run.path("classes.txt"), names.encode())
    for split, found in splits.items():
        run.status("running", stage=split)
        for note in found.notes:
            logger.info("%s: %s", split, note)
        wrong = _write_split(_Writer(official, job, decoders, split), found.items)
        problems += wrong
        images = _present(run.path("imgs", split))
        labels = _present(run.path("labels", split))
        logger.info("%s: %d images, %d labels in %s", split, len(images), len(labels), job.out)
        run.count(**{f"{split}_images": len(images), f"{split}_labels": len(labels)})
        run.event(
            "prepare/split",
            split=split,
            images=len(images),
            labels=len(labels),
            notes=found.notes,
            problems=wrong,
        )
    return problems


def _find(job: PrepareJob) -> tuple[Official, dict[str, Found]]:
    wrong = []
    if job.dataset is None:
        wrong.append(f"--dataset: name one of {', '.join(DATASETS)}")
    if job.source is None:
        wrong.append("--source: give the folder of the unpacked official download")
    elif not fs.is_local(job.source):
        wrong.append(f"--source {job.source}: must be a local folder")
    wrong += [f"--splits {s}: not a split's name" for s in job.splits if not _SPLIT.fullmatch(s)]
    if wrong or job.dataset is None or job.source is None:
        raise ConfigError(*wrong)
    official, root = DATASETS[job.dataset], fs.local_path(job.source)
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; check --source")
    splits = dict.fromkeys(job.splits or official.splits)
    return official, {split: official.find(root, split) for split in splits}


def _problems(job: PrepareJob, official: Official, splits: dict[str, Found]) -> list[str]:
    """Return what stands in the way of a run, one line each."""
    lines = []
    for split, found in splits.items():
        lines += [f"{split}: {problem}" for problem in found.problems]
        folder = fs.join(job.out, "imgs", split)
        stems = {item.stem for item in found.items}
        others = sorted(n for n in _present(folder) if _TILE_NAME.sub("", n) not in stems)
        if found.items and others:
            lines.append(
                f"{split}: {folder} holds {len(others)} files that are not of this split, the "
                f"first: {others[0]}; delete the folder or give another --out"
            )
    return lines


def _present(folder: str) -> set[str]:
    """Return the files that are complete, relative to the folder."""
    return {file.path for file in fs.list_files(folder)} if fs.is_folder(folder) else set()


def _image_name(official: Official, item: Item) -> str:
    """Return the file that tells that an item's image is done."""
    if official.storage == "files":
        return item.stem + item.image.suffix.lower()
    return f"{item.stem}{potsdam.FIRST_TILE if official.storage == 'mosaics' else ''}.png"


@dataclass(frozen=True, slots=True)
class _Writer:
    """Writes the items of one split."""

    official: Official
    job: PrepareJob
    decoders: Decoders
    split: str

    def image(self, item: Item) -> None:
        """Write an item's image, or the tiles of its mosaic."""
        target = fs.join(self.job.out, "imgs", self.split)
        if self.official.storage == "files":
            place_file(
                item.image, below(target, _image_name(self.official, item)), link=self.job.link
            )
            return
        data = item.image.read_bytes()
        if self.official.storage == "mat":
            self._write(target, item, [("", potsdam.mat_image(data))])
        else:
            mosaic = potsdam.halve(self.decoders.read_image(data), is_label=False)
            self._write(target, item, potsdam.cut_tiles(mosaic))

    def label(self, item: Item) -> None:
        """Write an item's label map, or those of the tiles of its mosaic."""
        assert item.label is not None  # noqa: S101 - items without labels are left out before
        data = item.label.read_bytes()
        pieces: Pieces
        if self.official.storage == "mosaics":
            colours = potsdam.halve(self.decoders.read_image(data), is_label=True)
            pieces = potsdam.cut_tiles(self.official.to_classes(colours))
        elif self.official.storage == "mat":
            pieces = [("", self.official.to_classes(potsdam.read_mat(data, "gt")))]
        else:
            pieces = [("", self.official.to_classes(self.decoders.read_label(data)))]
        self._write(fs.join(self.job.out, "labels", self.split), item, pieces)

    def _write(self, target: str, item: Item, pieces: Pieces) -> None:
        for name, pixels in pieces:
            fs.write_bytes(below(target, f"{item.stem}{name}.png"), _png(pixels))


def place_file(source: Path, target: str, *, link: bool) -> None:
    """Make a file available under another name: hard link, else symbolic link, else copy.

    Args:
        source: the file.
        target: local path or URI; a file that is there stays.
        link: False copies.

    Raises:
        InputError: if the source is gone: a link to nothing would look like a file.
    """
    if not source.is_file():
        raise InputError("listed, but gone when it was read, or not a file")
    if link and fs.is_local(target):
        path = fs.local_path(target)
        path.parent.mkdir(parents=True, exist_ok=True)
        for make in (path.hardlink_to, path.symlink_to):
            try:
                make(source.resolve())
            except FileExistsError:
                return
            except OSError:  # another file system, or one without links
                continue
            return
    fs.write_bytes(target, source.read_bytes())


def _write_split(writer: _Writer, items: tuple[Item, ...]) -> list[str]:
    """Write what is missing of a split; return one line for each file that can't be used."""
    official, out = writer.official, writer.job.out
    done = _present(fs.join(out, "imgs", writer.split))
    images = [item for item in items if _image_name(official, item) not in done]
    done = _present(fs.join(out, "labels", writer.split))
    last = potsdam.FIRST_TILE if official.storage == "mosaics" else ""
    labels = [i for i in items if i.label is not None and f"{i.stem}{last}.png" not in done]
    threads = writer.job.threads
    if official.storage == "mosaics":
        threads = min(threads, _MAX_MOSAICS)
    with ThreadPoolExecutor(threads) as pool:
        wrong = [*pool.map(lambda item: _try(writer.image, item, item.image), images)]
        wrong += pool.map(lambda item: _try(writer.label, item, item.label), labels)
    return [f"{writer.split}: {line}" for line in wrong if line is not None]


def _try(write: Callable[[Item], None], item: Item, path: Any) -> str | None:
    try:
        write(item)
    except InputError as error:
        return f"{path}: {error}"
    except OSError as error:
        if str(error.filename) != str(path):  # the output's, which no other file escapes
            raise
        return f"{path}: can't be read: {error.strerror}"
    return None


def _png(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
