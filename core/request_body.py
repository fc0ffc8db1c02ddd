"""The fields of POST /v1/jobs: names, types and ranges as OpenAI and vLLM have them.

Types are strict (no "5" for 5), except that a whole number may stand for a float.
"""

from typing import Annotated, Any, Final, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

from core import priority
from core.json_schema import schema_problem
from core.json_values import Uncarriable, check_text, check_value
from core.webhook_url import UrlRefused, parse_url

INT64: Final = 2**63
INT32: Final = 2**31
#: What a completion without max_tokens gets, as in OpenAI's and vLLM's API.
DEFAULT_COMPLETION_TOKENS: Final = 16
#: Below this temperature vLLM samples greedily, and refuses several answers.
GREEDY_BELOW: Final = 1e-5
#: Arguments of the tokenizer's own function, which a template argument must not replace:
#: `chat_template` would be code of the user's, `tokenize` and others have blocked whole servers.
RESERVED_TEMPLATE_KWARGS: Final = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "documents",
        "max_length",
        "messages",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    }
)


def _problem(message: str, field: str | None = None) -> PydanticCustomError:
    """An error with `message`, about `field` where that is not the place it is raised at."""
    context = {"clause": message} | ({"field": field} if field else {})
    return PydanticCustomError("lorry", "{clause}", context)


def _carriable_text(text: str) -> str:
    try:
        return check_text(text)
    except Uncarriable as error:
        raise _problem(str(error)) from None


def _carriable(value: Any) -> Any:
    try:
        return check_value(value)
    except Uncarriable as error:
        raise _problem(str(error)) from None


def _valid_schema(schema: dict[str, Any]) -> dict[str, Any]:
    problem = schema_problem(_carriable(schema))
    if problem:
        raise _problem(problem)
    return schema


def _webhook_url(url: str) -> str:
    try:
        parse_url(url)
    except UrlRefused as error:
        raise _problem(str(error)) from None
    return url


def _template_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    reserved = sorted(RESERVED_TEMPLATE_KWARGS & kwargs.keys())
    if reserved:
        raise _problem(f"must not set {reserved[0]!r}, which is not the template's to choose")
    return _carriable(kwargs)  # type: ignore[no-any-return]


def _text_part(part: Any) -> Any:
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(kind, str) and kind != "text":
        raise _problem(f"is a part of type {kind[:40]!r}, which is not supported; send text parts")
    return part


Text = Annotated[str, AfterValidator(_carriable_text)]
NonemptyText = Annotated[str, Field(min_length=1), AfterValidator(_carriable_text)]
ModelName = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(_carriable_text)]
TokenId = Annotated[int, Field(ge=0, lt=INT32)]
AnswerTokens = Annotated[int, Field(ge=1, lt=INT32)]
MetadataKey = Annotated[str, Field(min_length=1, max_length=64), AfterValidator(_carriable_text)]
MetadataValue = Annotated[str, Field(max_length=512), AfterValidator(_carriable_text)]
WebhookUrl = Annotated[str, AfterValidator(_webhook_url)]
BiasedToken = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")]


def _text_or_list(value: Any) -> str | None:
    if isinstance(value, str):
        return "<text>"
    return "<list>" if isinstance(value, list) else None


#: Tags of the alternatives of a field; in angle brackets, since pydantic puts them into the path.
TEXT_OR_LIST: Final = Discriminator(
    _text_or_list,
    custom_error_type="lorry",
    custom_error_message="must be a string or a list",
)


class Strict(BaseModel):
    """A part of the body: unknown fields and wrong types are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(Strict):
    """A text part of a message."""

    type: Literal["text"]
    text: Text


Parts = Annotated[list[Annotated[TextPart, BeforeValidator(_text_part)]], Field(min_length=1)]


class Message(Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[Text, Tag("<text>")] | Annotated[Parts, Tag("<list>")], TEXT_OR_LIST
    ]
    name: Text | None = None
    # null in the messages that answers bring, so that one can be sent back as it came
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None


class JsonSchema(Strict):
    """The schema that an answer must fit."""

    name: Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: Text | None = None
    schema_: Annotated[dict[str, Any], AfterValidator(_valid_schema)] = Field(alias="schema")
    strict: bool | None = None


class TextFormat(Strict):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(Strict):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchemaFormat(Strict):
    """JSON that fits a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


def _format_type(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else None
    return f"<{kind}>"


ResponseFormat = Annotated[
    Annotated[TextFormat, Tag("<text>")]
    | Annotated[JsonObjectFormat, Tag("<json_object>")]
    | Annotated[JsonSchemaFormat, Tag("<json_schema>")],
    Discriminator(
        _format_type,
        custom_error_type="lorry",
        custom_error_message="must have the type 'text', 'json_object' or 'json_schema'",
    ),
]
Stop = Annotated[
    Annotated[NonemptyText, Tag("<text>")]
    | Annotated[list[NonemptyText], Field(max_length=16), Tag("<list>")],
    TEXT_OR_LIST,
]


class CommonBody(Strict):
    """What both kinds of request take."""

    model: ModelName = Field(description="a base model, an adapter (`name` or `name@3`) or a task")

    max_tokens: AnswerTokens | None = None
    max_completion_tokens: AnswerTokens | None = None
    min_tokens: int | None = Field(None, ge=0, lt=INT32)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=INT32, description="-1 or 0 takes every token")
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0)
    logit_bias: dict[BiasedToken, Annotated[float, Field(ge=-100, le=100)]] | None = None
    n: int | None = Field(None, ge=1, le=128)
    seed: int | None = Field(None, ge=-INT64, lt=INT64)
    stop: Stop | None = None
    ignore_eos: bool | None = None
    response_format: ResponseFormat | None = None
    user: Text | None = None
    stream: Literal[False] | None = Field(None, description="answers are never streamed")

    priority: int | None = Field(
        None, ge=priority.LOWEST, le=priority.HIGHEST, description="higher goes first"
    )
    deadline: float | None = Field(None, ge=0, description="unix seconds; the job expires then")
    metadata: dict[MetadataKey, MetadataValue] | None = Field(
        None, max_length=16, description="your own pairs, given back with the job"
    )
    webhook_url: WebhookUrl | None = Field(None, description="told when the job is final")

    @property
    def answer_tokens(self) -> int | None:
        """The most tokens of one answer, if the user said."""
        return self.max_completion_tokens or self.max_tokens

    @model_validator(mode="after")
    def _agree_on_tokens(self) -> "CommonBody":
        longest = self.answer_tokens
        if self.max_tokens and longest != self.max_tokens:
            raise _problem(
                f"is {longest} while max_tokens is {self.max_tokens}; give only one of them",
                "max_completion_tokens",
            )
        if longest is None and isinstance(self, CompletionBody):
            longest = DEFAULT_COMPLETION_TOKENS
        if longest is not None and (self.min_tokens or 0) > longest:
            raise _problem(
                f"is {self.min_tokens}, more than max_tokens ({longest}); lower it, or raise "
                "max_tokens",
                "min_tokens",
            )
        return self

    @model_validator(mode="after")
    def _no_copies(self) -> "CommonBody":
        if (self.n or 1) > 1 and self.temperature is not None and self.temperature < GREEDY_BELOW:
            raise _problem(
                f"is {self.n} with temperature 0, which makes the same answer each time; "
                "set n to 1, or raise the temperature",
                "n",
            )
        return self


class ChatBody(CommonBody):
    """The body of OpenAI's /v1/chat/completions, with Lorry's own fields."""

    messages: list[Message] = Field(min_length=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    chat_template_kwargs: Annotated[dict[str, Any], AfterValidator(_template_kwargs)] | None = None

    @model_validator(mode="after")
    def _logprobs_wanted(self) -> "ChatBody":
        if self.top_logprobs is not None and not self.logprobs:
            raise _problem("needs logprobs: true; add it, or remove top_logprobs", "top_logprobs")
        return self


class CompletionBody(CommonBody):
    """The body of OpenAI's /v1/completions, with Lorry's own fields."""

    prompt: Annotated[
        Annotated[NonemptyText, Tag("<text>")]
        | Annotated[list[TokenId], Field(min_length=1), Tag("<list>")],
        TEXT_OR_LIST,
    ] = Field(description="a string, or the prompt's token ids")
    logprobs: int | None = Field(None, ge=0, le=20)
