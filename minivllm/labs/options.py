"""Options of `minivllm lab NAME`."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from minivllm.bench.offline.options import ShapedConfig


class LabOptions(ShapedConfig):
    """Which model and device, how much work, and where the sheet goes."""

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: the GPU if there is one")
    quick: bool = Field(False, description="as little work as shows the idea")
    out: Path = Field(Path("labs"), description="directory for the sheet and its picture; made if missing")
