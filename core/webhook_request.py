"""The bodies of the requests about webhooks."""

from typing import Annotated, Final

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

from core.json_values import Uncarriable, check_text
from core.webhook_events import EventType

LATEST_SINCE: Final = 253_402_300_799  # the end of the year 9999


def _text(text: str) -> str:
    try:
        return check_text(text)
    except Uncarriable as error:
        raise PydanticCustomError("lorry", "{clause}", {"clause": str(error)}) from None


def _events(events: list[str]) -> list[str]:
    known = [event.value for event in EventType]
    for event in events:
        if event not in known:
            clause = f"names {event[:80]!r}, which is no event; known are {', '.join(known)}"
            raise PydanticCustomError("lorry", "{clause}", {"clause": clause})
    return list(dict.fromkeys(events))


Url = Annotated[str, Field(min_length=1, max_length=2048)]
Events = Annotated[list[str], Field(min_length=1, max_length=100), AfterValidator(_events)]
Description = Annotated[str, Field(max_length=512), AfterValidator(_text)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class NewWebhook(_Body):
    """An endpoint to be made."""

    url: Url = Field(description="https, or http in a network that the operator opened")
    events: Events = Field(description="such as job.succeeded")
    description: Description = ""


class WebhookChanges(_Body):
    """What is to be changed of an endpoint."""

    url: Url | None = None
    events: Events | None = None
    description: Description | None = None
    disabled: bool | None = Field(None, description="false enables it again")


class SecretRequest(_Body):
    """What is asked of the default secret."""

    rotate: bool = Field(False, description="make a new one; the former signs for a day more")


class ReplayRequest(_Body):
    """Which failed deliveries are to be sent once more."""

    since: float = Field(ge=0, le=LATEST_SINCE, description="unix seconds: failed since then")
