"""What all job scripts share: flags, the run directory, one-line errors, exit codes."""

from __future__ import annotations

import errno
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

from stego_core import log
from stego_core.config.doctor import DoctorJob
from stego_core.config.load import load_job
from stego_core.config.schema import EvaluateJob, Job, MineJob
from stego_core.datasets.demo import DEMO
from stego_core.errors import EXIT_BUG, EXIT_OK, ConfigError, StegoError
from stego_core.storage import fs
from stego_core.storage.run import RunDirectory

logger = logging.getLogger(__name__)
RANDOM_WEIGHTS = "random"
# What the driver meets where it may not read or write, or where nothing fits any more.
_NOT_ALLOWED = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.EFBIG,
}
_PATHS = (
    "names",
    "out",
    "input",
    "model",
    "masks",
    "metrics",
    "source",
    "checkpoint",
    "json",
    "settings",
)
JobT = TypeVar("JobT", bound=Job)


def run_job(
    job_type: type[JobT],
    argv: Sequence[str] | None,
    *,
    prog: str,
    plan: Callable[[JobT], list[str]],
    run: Callable[..., None],
    directory: Callable[[JobT], str] | None,
) -> int:
    """Read the flags, run the job (or print its plan) and return the exit code.

    Whatever happens, the run directory's `status.json` says how it ended: `ray job submit` does
    not pass exit codes on. A configuration error touches nothing.

    Args:
        job_type: the job's settings.
        argv: flags; None takes those of the command line.
        prog: name of the script.
        plan: job → what it would do, one line each.
        run: job and `RunDirectory` → None; called with the job alone without a directory.
        directory: job → URI of its run directory. None is for what leaves none: its lines and
            exit code are all.
    """
    where: RunDirectory | None = None
    debug = False
    try:
        with _whoever_reads():
            job = load_job(job_type, sys.argv[1:] if argv is None else argv, prog=prog)
        job = _with_absolute_paths(job)
        debug = job.debug
        log.setup(debug=debug)
        if job.dry_run:
            lines = plan(job)
            with _whoever_reads():
                sys.stdout.write("".join(f"{line}\n" for line in lines))
        elif directory is None:
            run(job)
        else:
            where = RunDirectory(directory(job), job=prog.removesuffix(".py"))
            run(job, where)
            where.status("done", stage="end", exit_code=EXIT_OK)
            where.event("end", exit_code=EXIT_OK)
    except SystemExit as error:
        if where is None:  # --help, or a flag that ends the program
            raise
        # Ray ends a driver so at SIGTERM: of `ray job stop`, a node that is taken back, and others.
        return _failed(error, where, prog=prog, debug=debug)
    except (Exception, KeyboardInterrupt) as error:
        return _failed(error, where, prog=prog, debug=debug)
    return EXIT_OK


@contextmanager
def _whoever_reads() -> Iterator[None]:
    """End the program in peace if whoever reads the help or a plan has seen enough."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Python would flush once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(EXIT_OK) from None


def _with_absolute_paths(job: JobT) -> JobT:
    """Return the job with local paths made absolute: workers run in folders of their own."""
    changes: dict[str, Any] = {}
    for name in _PATHS:
        value = getattr(job, name, None)
        if value is not None:
            changes[name] = _absolute(value)
    if isinstance(job, MineJob | EvaluateJob):
        changes["data"] = replace(job.data, root=_absolute(job.data.root))
    if isinstance(job, EvaluateJob) and job.store.uri is not None:
        changes["store"] = replace(job.store, uri=_absolute(job.store.uri))
    if isinstance(job, MineJob | DoctorJob) and job.backbone.weights is not None:
        weights = _absolute(job.backbone.weights)
        changes["backbone"] = replace(job.backbone, weights=weights)
    return replace(job, **changes)


def _absolute(value: str) -> str:
    # The words that stand for something else than a path.
    if value in (DEMO, RANDOM_WEIGHTS) or not fs.is_local(value):
        return value
    return str(fs.local_path(value).absolute())


def _failed(error: BaseException, directory: RunDirectory | None, *, prog: str, debug: bool) -> int:
    # A store's refusal has no number.
    denied = isinstance(error, PermissionError)
    if denied or (isinstance(error, OSError) and error.errno in _NOT_ALLOWED):
        error = ConfigError(f"{error}: allow access, free space there, or give another path")
    known = isinstance(error, StegoError)
    code = error.exit_code if isinstance(error, StegoError) else EXIT_BUG
    text = str(error) if known else f"unexpected {type(error).__name__}: {error}"
    if isinstance(error, SystemExit):
        known, code = True, error.code if isinstance(error.code, int) else EXIT_BUG
        text = f"ended from outside (exit code {code}); start it again to go on"
    if debug or not known:
        traceback.print_exc()
    for line in text.splitlines() or [type(error).__name__]:
        sys.stderr.write(log.redact(f"{prog}: error: {line}\n"))
    # Settings that can't be used leave an earlier run's word as it is; a run that has begun must
    # not leave its own `running`, for example where the disk filled up.
    if directory is None or (isinstance(error, ConfigError) and not directory.is_told):
        return code
    try:
        directory.status("failed", exit_code=code, error=text.splitlines()[0])
        directory.event("end", exit_code=code, error=text)
    except OSError as second:
        sys.stderr.write(f"{prog}: status.json can't be written: {second}\n")
    return code
