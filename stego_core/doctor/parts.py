"""Optional libraries and the weights of the backbone."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from importlib import metadata

from stego_core.config.schema import BackboneConfig
from stego_core.doctor.findings import Finding, State

_TEXTS = {
    "faiss": ("faiss", "`cpu` or `gpu`", "for FAISS search; exact search needs none"),
    "crf": ("pydensecrf.densecrf", "`crf`", "for --crf; a C++ compiler is needed"),
    "report": ("jinja2", "`report`", "for jobs/report.py"),
}
EXTRAS = tuple(_TEXTS)


def check_extra(name: str) -> Iterator[Finding]:
    """Import an optional library: one that is missing is passed over, a broken one is a failure.

    Args:
        name: of `EXTRAS`.
    """
    module, extra, use = _TEXTS[name]
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != module.partition(".")[0]:
            raise
        yield Finding(name, State.SKIP, f"not installed: the extra {extra}, {use}")
        return
    version = getattr(found, "__version__", None) or _version(module.partition(".")[0])
    yield Finding(name, State.OK, f"{module} {version}".strip())


def _version(package: str) -> str:
    names = metadata.packages_distributions().get(package, [])
    return metadata.version(names[0]) if names else ""


def check_weights(config: BackboneConfig) -> Iterator[Finding]:
    """Load the backbone where its weights are here; fetch nothing.

    Raises:
        InputError, CheckpointError, ConfigError: if weights that are here can't be used.
    """
    from stego_core.model.backbone import load_backbone
    from stego_core.model.registry import find_backbone
    from stego_core.model.weights import cache_path

    path = cache_path(find_backbone(config.name))
    if config.weights is None and not path.exists():
        advice = f"the first job fetches them; offline, give --backbone.weights or put {path} there"
        yield Finding("weights", State.WARN, f"{config.name}: not in the cache", advice)
        return
    backbone = load_backbone(config)
    numbers = sum(parameter.numel() for parameter in backbone.parameters())
    where = config.weights or str(path)
    yield Finding("weights", State.OK, f"{config.name}: {numbers / 1e6:.1f} M numbers of {where}")
