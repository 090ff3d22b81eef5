"""Models of the request bodies, with llama-server's names, defaults and ranges (server-schema.cpp)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from .descriptions import CHOICES, MESSAGE, TOOL

INT_MAX = 2**31 - 1

Count = Annotated[int, Field(ge=0, le=INT_MAX)]
CountOrAll = Annotated[int, Field(ge=-1, le=INT_MAX)]
#: a list of tokens and texts, mixed
Mixed = list[int | str]


class _Request(BaseModel):
    """A request body. A field that is null counts as absent."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, body: Any) -> Any:
        return {name: value for name, value in body.items() if value is not None} if isinstance(body, dict) else body


class PromptObject(BaseModel):
    """A prompt that may contain images in llama-server. This server refuses images."""

    prompt_string: str | Mixed
    multimodal_data: list[str] | None = None


Prompt = str | PromptObject | list[Any]


def _clamped(low: float, high: float) -> BeforeValidator:
    def clamp(value: Any) -> Any:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return min(max(value, low), high) if is_number else value

    return BeforeValidator(clamp)


Share = Annotated[float, _clamped(0, 1)]


class KVCompress(BaseModel):
    """How to compress the cache of a prompt. llama-server does not have this.

    Give at most one of ``ratio``, ``n_kept`` and ``max_kv_bytes``. Without one, the server's own budget is used.
    """

    model_config = ConfigDict(extra="forbid")

    method: str | None = Field(
        None, max_length=200, description="For example `kvcompose,scoring=window` or `snapkv`. Default: the server's."
    )
    ratio: float | None = Field(None, ge=0, lt=1, description="Fraction of the cache entries to remove.")
    n_kept: float | None = Field(None, gt=0, description="Tokens to keep per layer, on average.")
    max_kv_bytes: int | None = Field(None, gt=0, description="Maximum bytes of the rows that are kept.")
    min_tokens: int | None = Field(None, ge=1, description="Shorter prompts are not compressed.")
    keep_last: int | None = Field(None, ge=0, description="Number of last prompt tokens that are not compressed.")


class StreamOptions(_Request):
    """``stream_options`` of OpenAI's API."""

    include_usage: bool = False


#: fields of OpenAI and llama-server that would change an answer, and that this server does not have; false or empty
#: values are accepted. Other unknown fields change no answer and are ignored, as in llama-server
NOT_OFFERED = {
    "functions": "use tools", "function_call": "use tool_choice", "audio": "this server writes text",
    "web_search_options": "this server does not search", "lora": "this server has no LoRA adapters",
    "grammar_lazy": "a lazy grammar belongs to tools", "grammar_triggers": "a lazy grammar belongs to tools",
}  # fmt: skip


class GenerationRequest(_Request):
    """Fields of all generation requests. Absent fields have the server's defaults."""

    model_config = ConfigDict(extra="allow", populate_by_name=True)

    @model_validator(mode="before")
    @classmethod
    def _offered(cls, body: Any) -> Any:
        given = body if isinstance(body, dict) else {}
        asked = [name for name in NOT_OFFERED if given.get(name)]
        modalities = given.get("modalities")
        if isinstance(modalities, list) and "audio" in modalities:
            asked.append("audio")
        if asked:
            raise PydanticCustomError("not_offered", "{name} is not supported: {why}", {
                "name": asked[0], "why": NOT_OFFERED[asked[0]]
            })  # fmt: skip
        return body

    stream: bool = False
    stream_options: StreamOptions | None = None
    cache_prompt: bool | None = None
    return_tokens: bool = False
    return_progress: bool = False
    timings_per_token: bool = False
    response_fields: list[str] = []
    verbose: bool = False
    n_predict: CountOrAll | None = Field(
        None, validation_alias=AliasChoices("n_predict", "max_completion_tokens", "max_tokens")
    )
    n_indent: Count = 0
    n_keep: CountOrAll | None = None
    n_discard: Count | None = None
    n: int | None = Field(None, ge=1, validation_alias=AliasChoices("n_cmpl", "n"))
    t_max_predict_ms: int = Field(-1, ge=-1, le=2**63 - 1)
    id_slot: int = -1
    stop: str | Annotated[list[str], Field(max_length=64)] | None = None
    ignore_eos: bool = False
    n_probs: Count | None = Field(None, validation_alias=AliasChoices("n_probs", "logprobs"))
    post_sampling_probs: bool = False
    logit_bias: list[Any] | dict[str, Any] | None = None
    grammar: str | None = None
    json_schema: Any = None
    samplers: list[str] | str | None = None
    seed: int | None = None
    temperature: Annotated[float, _clamped(0, float("inf"))] | None = None
    dynatemp_range: float | None = None
    dynatemp_exponent: float | None = None
    top_k: Annotated[int, _clamped(0, INT_MAX)] | None = None
    top_p: Share | None = None
    min_p: Share | None = None
    top_n_sigma: float | None = None
    xtc_probability: Share | None = None
    xtc_threshold: Share | None = None
    typical_p: float | None = None
    repeat_last_n: Count | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    dry_multiplier: float | None = None
    dry_base: float | None = None
    dry_allowed_length: Annotated[int, Field(le=INT_MAX)] | None = None
    dry_penalty_last_n: Count | None = None
    dry_sequence_breakers: Annotated[list[str], Field(min_length=1, max_length=32)] | None = None
    mirostat: Annotated[int, _clamped(0, 2)] | None = None
    mirostat_tau: float | None = None
    mirostat_eta: float | None = None
    adaptive_target: Annotated[float, _clamped(float("-inf"), 1)] | None = None
    adaptive_decay: float | None = Field(None, ge=0, le=0.99)
    min_keep: Count | None = None
    kv_compress: KVCompress | bool | None = Field(
        None, description="Not in llama-server. true or absent: the server's options. false: none. Or an object."
    )


class CompletionRequest(GenerationRequest):
    """Body of /completion and /v1/completions."""

    prompt: Prompt
    kv_prefix: str | None = Field(
        None,
        max_length=64,
        description="Not in llama-server. An id from /kv/compress: its document is put before the prompt.",
    )


class OpenAICompletionRequest(CompletionRequest):
    """Body of /v1/completions. ``echo``, ``suffix`` and ``best_of`` are refused, as in llama-server."""

    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None


class InfillRequest(GenerationRequest):
    """Body of /infill."""

    input_prefix: str
    input_suffix: str
    input_extra: list[Any] = []
    prompt: str = ""


class ChatRequest(GenerationRequest):
    """Body of /v1/chat/completions. Messages and tools: ``server.chat`` checks them, with better error messages."""

    messages: Annotated[Any, WithJsonSchema({"type": "array", "items": MESSAGE})] = None
    tools: Annotated[Any, WithJsonSchema({"type": "array", "items": TOOL})] = None
    tool_choice: Annotated[Any, WithJsonSchema({"anyOf": CHOICES})] = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool | str | None = None
    echo: bool = False
    reasoning_format: str | None = None
    reasoning_effort: str | None = None
    reasoning_budget_tokens: CountOrAll | None = Field(
        None, validation_alias=AliasChoices("reasoning_budget_tokens", "thinking_budget_tokens")
    )
    reasoning_budget_message: str = ""
    kv_documents: Annotated[list[str], Field(max_length=64)] = Field(
        [], description="Not in llama-server. Ids from /kv/documents: their texts are put before the first question."
    )
    n_probs: Count | None = None
    logprobs: bool = False
    top_logprobs: Count | None = None


class DocumentFile(_Request):
    """A file, as OpenAI's messages have it."""

    filename: str = Field("the file", max_length=200, description="Its name. HTML is known by its ending.")
    file_data: str = Field(description="Its bytes in Base64, or a data URL: text, HTML or PDF.")


class DocumentRequest(_Request):
    """Body of /kv/documents."""

    text: str = Field("", description="What the document says.")
    file: DocumentFile | None = Field(None, description="A file that says it, instead of the text.")
    title: str = Field("", max_length=200, description="A name for people. Default: the file's, or the beginning.")
    system: str = Field("", description="The system message of the conversations that will begin with it.")
    kv_compress: KVCompress | None = None
    stream: bool = Field(False, description="Tell the progress as server-sent events.")


class MarkdownRequest(_Request):
    """Body of /kv/markdown."""

    text: str = ""


class TokenizeRequest(_Request):
    """Body of /tokenize."""

    content: str | Mixed = ""
    add_special: bool = False
    parse_special: bool = True
    with_pieces: bool = False


class DetokenizeRequest(_Request):
    """Body of /detokenize."""

    tokens: Annotated[list[int], Field(max_length=1 << 20)] = []


class EmbeddingRequest(_Request):
    """Body of /embedding and /v1/embeddings."""

    input: Any = None
    content: Any = None
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    embd_normalize: int = Field(2, ge=-1, le=INT_MAX)
    dimensions: int | None = None


class CompressRequest(_Request):
    """Body of /kv/compress."""

    prompt: str | Mixed = Field(description="The document that later prompts begin with.")
    kv_compress: KVCompress | None = None
