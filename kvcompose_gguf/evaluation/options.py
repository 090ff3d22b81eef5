"""The options of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import ConfigError
from ..measurements.learned import Learned
from ..methods import Method, make_method
from ..native.kv_types import PLAIN_TYPES
from ..support.checks import check_positive
from ..tasks.ruler import RULER_TASKS, TASKS
from . import suites


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Options of an evaluation.

    Attributes:
        tasks: names in ``ruler.TASKS``; ``passkey`` is reported separately from the means.
        n_tokens: length of a sample including its longest answer, without the chat format.
        n_samples: samples per task.
        methods: texts for ``make_method``.
        ratios: fractions removed.
        types_kv: names of ggml types, or a type of keys and a type of values with a slash between them: ``q8_0/q4_0``.
        question_seen: append the question to the prompt that the methods read. By default it is hidden, as in the
            field's protocol. Only methods that read the last tokens of the prompt are affected.
        chat: use the model's chat format, if it has one.
        n_depths: number of needle depths in ``passkey``.
        texts: source of prose and questions, see ``load_texts``.
        seed: seed of the samples.
        max_tokens: longest answer. None: twice the tokens of the references plus 16, at most RULER's limit.
    Raises:
        ConfigError: an option is out of range.
    """

    tasks: tuple[str, ...] = RULER_TASKS
    n_tokens: int = 2048
    n_samples: int = 20
    methods: tuple[str, ...] = suites.SUITES["baselines"]
    ratios: tuple[float, ...] = (0.25, 0.5, 0.75, 0.875, 0.9375)
    types_kv: tuple[str, ...] = ("f16",)
    question_seen: bool = False
    chat: bool = True
    n_depths: int = 5
    texts: str = "auto"
    seed: int = 0
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("tasks", "methods", "ratios", "types_kv"):  # each value once
            object.__setattr__(self, name, tuple(dict.fromkeys(getattr(self, name))))
        for name in ("n_tokens", "n_samples", "n_depths", "max_tokens"):
            check_positive(name, getattr(self, name))
        unknown = [task for task in self.tasks if task not in TASKS]
        if unknown or not self.tasks:
            raise ConfigError(f"tasks={','.join(self.tasks)}; allowed: {', '.join(TASKS)}")
        wrong = [ratio for ratio in self.ratios if not 0 < ratio < 1]
        if wrong or (self.methods and not self.ratios):
            raise ConfigError(f"compression_ratio={wrong}: give one or more in (0, 1); 0 is always included")
        if not self.types_kv:
            raise ConfigError("types_kv is empty")
        for types in self.types_kv:
            kv_types(types)
        self.make_methods()

    def make_methods(self, model_path: Path | None = None, known: Learned | None = None) -> dict[str, list[Method]]:
        """Returns one method per ratio for every text, made for ``model_path`` if it is given.

        Args:
            known: what is known of the model; None: it is read from the user's cache.
        """
        made = {}
        for spec in self.methods:
            for_ratio = [make_method(spec, compression_ratio=ratio, min_tokens=1) for ratio in self.ratios]
            first = for_ratio[0]
            quantized = [types for types in self.types_kv if not set(types.lower().split("/")) <= set(PLAIN_TYPES)]
            if quantized and first.simulated:
                raise ConfigError(f"method={spec!r} is simulated, not for types_kv={','.join(quantized)}")
            if model_path is not None:
                # nothing is learnt, so that the order of samples does not matter
                first = first.for_model(model_path).informed(learn=False, known=known)
            made[spec] = [replace(first, compression_ratio=ratio) for ratio in self.ratios]
        return made


def kv_types(names: str) -> tuple[int, int]:
    """Returns the ggml types of keys and values for a name such as ``"q8_0"``, or two such as ``"q8_0/q4_0"``.

    Raises:
        ConfigError: there is no such type.
    """
    from gguf import GGMLQuantizationType

    keys, slash, values = names.partition("/")
    try:
        return int(GGMLQuantizationType[keys.upper()]), int(GGMLQuantizationType[(values if slash else keys).upper()])
    except KeyError as error:
        raise ConfigError(f"types_kv={names!r} is not a ggml type; use for example f16 or q8_0") from error


def quick(options: EvalOptions) -> EvalOptions:
    """Returns options for a few samples of tasks that the smallest models can solve; takes minutes."""
    return replace(
        options, tasks=("niah_single_1", "niah_single_2", "passkey"), n_tokens=1024, n_samples=2,
        methods=suites.SUITES["quick"], ratios=(0.5, 0.75),
    )  # fmt: skip
