"""The core's answers to calls, and its errors turned into two of our own.

Import it only after `prepare_environment`.
"""

import re
from collections.abc import Awaitable
from typing import TypeVar

from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from workers.engine.protocol import EngineDead

DIED = "the engine's core process has died; its own messages say why"
_T = TypeVar("_T")


class CallFailedError(Exception):
    """The core failed at a call and lives on; its message says why."""


async def answer(llm: AsyncLLM, call: Awaitable[_T]) -> _T:
    """Await an answer of the core, which sends any kind of error back.

    Raises:
        CallFailedError: it failed, and the core lives on.
        EngineDead: the engine has died.
    """
    try:
        return await call
    except EngineDeadError as error:
        raise EngineDead(DIED) from error
    except Exception as error:
        if llm.errored:
            raise EngineDead(DIED) from error
        raise CallFailedError(reason_of(error)) from error


def reason_of(error: Exception) -> str:
    """What the core says of an error, without what it was called by."""
    text = str(error) or type(error).__name__
    return re.sub(r"^Call to \w+ method failed: ", "", text)
