"""Whatever a caller has at hand, as the settings of the checkpoint's processors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from edgeq.config import ModelConfig, VisionConfig, read_json
from edgeq.errors import ModelError, UsageError
from edgeq.inputs import exists
from edgeq.printable import brief
from edgeq.processor import FAMILY, ProcessorConfig, parse_processor

__all__ = ["Config", "processor_of", "processor_values"]


class HasConfig(Protocol):
    """A model, or a checkpoint."""

    @property
    def config(self) -> ModelConfig: ...


Config = ProcessorConfig | ModelConfig | VisionConfig | Mapping[str, Any] | str | Path | HasConfig | None
"""What the functions of `edgeq.vision` take as `config`: a model's configuration, which has its checkpoint's settings;
those settings themselves; the contents of a processor's file; a checkpoint's folder; None for the family's own."""


def processor_of(config: Config) -> ProcessorConfig:
    """The settings that `config` stands for. A dict without `image_processor` or `video_processor` is for both."""
    if config is None:
        return FAMILY
    if isinstance(config, ProcessorConfig):
        return config
    if isinstance(config, ModelConfig):
        return config.processor or processor_of(config.vision)
    if isinstance(config, VisionConfig):
        return parse_processor({}, {}, config)
    if isinstance(config, str | Path):
        return parse_processor(*processor_values(Path(config)))
    if isinstance(config, Mapping):
        if not {"image_processor", "video_processor"} & set(config):
            return parse_processor(config, config)
        image, video = (_part(config, f"{kind}_processor", "config") for kind in ("image", "video"))
        return parse_processor(image, video)
    inner: object = getattr(config, "config", None)
    if isinstance(inner, ModelConfig):
        return processor_of(inner)
    raise UsageError(f"{brief(config)} is no configuration of images", hint="give a model's config, or None")


def processor_values(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a checkpoint's folder says of images and of video, as preprocessor_config.json and
    video_preprocessor_config.json say it; empty where nothing is said.

    Where processor_config.json has a part for either, that is what holds, as in transformers.
    """
    joint = folder / "processor_config.json"
    values = read_json(joint) if exists(joint) else {}
    files = {"image": "preprocessor_config.json", "video": "video_preprocessor_config.json"}
    image, video = (
        _part(values, f"{kind}_processor", str(joint)) or (read_json(folder / name) if exists(folder / name) else {})
        for kind, name in files.items()
    )
    return image, video


def _part(values: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    part = values.get(key)
    if part is not None and not isinstance(part, Mapping):
        raise ModelError(f"{where}: {key} is {brief(part)}, expected an object")
    return dict(part or {})
