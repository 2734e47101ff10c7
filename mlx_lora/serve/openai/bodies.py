"""What requests may say: fields, their types and bounds, and what happens to fields that aren't among them.

A field that would change the answer is taken, or refused by its name: none is dropped. Fields that change nothing here
are in HARMLESS. A field that is null counts as absent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator, model_validator

from mlx_lora.errors import nearest
from mlx_lora.serve.openai.errors import ApiError, refused

# Ignored: they are about the caller, about OpenAI's own storage, or make an answer cheaper and no different.
HARMLESS = frozenset(
    "user metadata store service_tier safety_identifier prompt_cache_key prompt_cache_retention prediction".split()
)
# Accepted with the value that asks for nothing.
NOTHING_ASKED: dict[str, tuple[Any, ...]] = {
    "modalities": (["text"],), "verbosity": ("medium",), "functions": ([],), "function_call": ("none", "auto"),
    "echo": (False,), "suffix": ("",), "best_of": (1,),
}  # fmt: skip
# Refused with a hint.
INSTEAD = {
    "functions": "use tools", "function_call": "use tool_choice", "guided_json": "use response_format",
    "adapter": "name it as model", "adapters": "name one as model", "lora": "name it as model",
    "best_of": "use n", "images": "this server reads text",
}  # fmt: skip
MOST_CHOICES, MOST_STOPS, MOST_STOP_LENGTH, MOST_TOP, MOST_BIASES, MOST_TOOLS = 16, 16, 256, 20, 1024, 128
NAME = r"^[A-Za-z0-9_.-]{1,64}$"

Stop = Annotated[str, Field(min_length=1, max_length=MOST_STOP_LENGTH)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = Annotated[float, Field(ge=-100, le=100)]


class Part(BaseModel):
    """A part of a request; what it has beside its fields is refused."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        return (
            {key: value for key, value in values.items() if value is not None} if isinstance(values, dict) else values
        )


class StreamOptions(Part):
    include_usage: bool = False
    include_obfuscation: bool = False


class Schema(Part):
    name: str = ""
    description: str = ""
    strict: bool = False
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")


class ResponseFormat(Part):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: Schema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> Self:
        if self.type == "json_schema" and (self.json_schema is None or self.json_schema.schema_ is None):
            raise ValueError("json_schema needs a schema")
        return self

    @property
    def schema_to_keep(self) -> dict[str, Any] | bool | None:
        """The schema that the answer must satisfy; None where any text will do."""
        if self.type == "json_object":
            return {"type": "object"}
        return self.json_schema.schema_ if self.json_schema else None


class Function(Part):
    name: str = Field(pattern=NAME)
    description: str = ""
    parameters: dict[str, Any] = Field(default_factory=dict)
    strict: bool = False


class Tool(Part):
    type: Literal["function"]
    function: Function


class Named(Part):
    name: str


class NamedTool(Part):
    type: Literal["function"] = "function"
    function: Named


class Common(Part):
    """What both endpoints take."""

    model: str = Field(min_length=1, max_length=512)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    logit_bias: dict[str, Bias] = Field(default_factory=dict, max_length=MOST_BIASES)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 64)
    n: int = Field(1, ge=1, le=MOST_CHOICES)
    stop: list[Stop] = Field(default_factory=list, max_length=MOST_STOPS)

    @field_validator("stop", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class ChatBody(Common):
    """/v1/chat/completions. `messages` are looked at by `messages.py`."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MOST_TOP)
    response_format: ResponseFormat = ResponseFormat(type="text")
    tools: list[Tool] = Field(default_factory=list, max_length=MOST_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool = True
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    enable_thinking: bool | None = None
    _shown_tools: list[Any] = PrivateAttr(default_factory=list)

    @property
    def shown_tools(self) -> list[Any]:
        """The tools just as the request has them, which is how a template shows them."""
        return self._shown_tools

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        names = [tool.function.name for tool in self.tools]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"tools names {twice[0]!r} twice")
        if self.tool_choice == "required" and not names:
            raise ValueError("tool_choice is required, and there are no tools")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice names {self.tool_choice.function.name!r}, which isn't among the tools")
        return self

    @property
    def top(self) -> int | None:
        """How many likely tokens to tell with each, None for no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionBody(Common):
    """/v1/completions: texts, or lists of token ids, that are continued as they are."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=MOST_TOP)

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


B = TypeVar("B", bound=Common)


def read(kind: type[B], body: Any) -> B:
    """A request's body. Raises ApiError naming the field at fault."""
    if not isinstance(body, dict):
        raise ApiError(400, "invalid_body", "the body is not a JSON object")
    kept = {key: value for key, value in body.items() if value is not None and key not in HARMLESS}
    known = {field.alias or name for name, field in kind.model_fields.items()}
    for key in [key for key in kept if key not in known]:
        if kept[key] not in NOTHING_ASKED.get(key, ()):
            raise _unknown(key, known)
        del kept[key]
    try:
        found = kind.model_validate(kept)
    except ValidationError as error:
        raise _fault(error) from None
    if isinstance(found, ChatBody):
        found._shown_tools = list(body.get("tools") or [])
    return found


def _unknown(key: str, known: set[str]) -> ApiError:
    shown = key[:64]
    if key in NOTHING_ASKED or key in INSTEAD:
        more = f"; {INSTEAD[key]}" if key in INSTEAD else ""
        return refused(shown, f"{shown} isn't supported here{more}", "unsupported_parameter")
    close = nearest(shown, known)
    return refused(
        shown, f"unknown field {shown!r}{close if 'did you mean' in close else ''}", "unknown_parameter"
    )  # fmt: skip


def _fault(error: ValidationError) -> ApiError:
    """The first fault, in words. A value is not repeated: it may be long, or private."""
    first: Mapping[str, Any] = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place = ".".join(str(part) for part in first["loc"])[:120]
    code = "missing_required_parameter" if first["type"] == "missing" else "invalid_value"
    message = str(first["msg"]).removeprefix("Value error, ")
    return ApiError(400, code, f"{place}: {message}" if place else message, place or None)
