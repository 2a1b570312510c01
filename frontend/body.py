"""What all bodies have in common: exact types, finite numbers, no unknown fields."""

import re
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Discriminator, Field

_REQUEST_ID = r"[!-~]{1,256}"  # what a header can carry
RequestId = Annotated[str, Field(pattern=f"^{_REQUEST_ID}$", description="unique among the unfinished ones")]


class Body(BaseModel):
    """Base of every body and of what is in it."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


def is_request_id(text: str) -> bool:
    """Whether `text` can be the id of a request."""
    return re.fullmatch(_REQUEST_ID, text) is not None


def text_or(other: str) -> Discriminator:
    """Tells the arms of a union apart by whether the value is text, so that an error is about the one meant."""

    def arm(value: Any) -> str:
        return "text" if isinstance(value, str) else other

    return Discriminator(arm)
