"""What ``kvcompose learn --for compresskv`` measures: semantic retrieval heads, eviction errors (arXiv 2508.02401).

Needle trials hide a fact in prose and ask for it. S(h) sums over the generated tokens that belong to the answer. Each
term is the attention of head h to the answer's whole place in the prose, from the query that predicts the token. S(h)
is the mean over the trials with a right answer. Differences from the authors' semantic_retrieval_head_detection.py: a
token belongs to the answer if its text, ignoring spaces and case, equals the text of a token in the place (theirs: if
its id does), and it counts once (theirs: once per occurrence); recall uses no stemmer; the prose is generated, and the
facts are our own.

Eviction errors come from prompts reduced to 32 tokens (24 and the window of 8): e(l) = sum over the answer's decode
steps of ||O_compressed - O_full|| / (||O_full|| + eps). Only layer l is compressed, so errors of earlier layers do not
contribute, as in the authors' modeling_mistral_new.py. Differences: O is the attention output before its projection,
and the prompts are needle trials, not LongBench.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ConfigError, UnsupportedError
from ..kernels.types import FloatArray
from ..measurements.calibration import Calibration
from ..methods.allocation import Uniform
from ..methods.compresskv import CompressKV
from ..tasks.answering import answer
from ..tasks.prompts import chat_frame, prompt_tokens
from ..tasks.samples import Sample
from ..tasks.texts import load_texts

if TYPE_CHECKING:
    from ..llama import Llama

EPS = 1e-5  # epsilon of the relative error
N_KEPT = 32  # tokens kept per layer while measuring the error
MAX_ANSWER = 50
N_REPEATS, N_SEQUENCES = 4, 4  # for random tokens
MAX_SCORE_BYTES = 64 << 20

#: the beginning of a sentence, its end (the answer), and the question
NEEDLES = (
    ("The best thing to do in Lisbon is to", "ride the old yellow tram and eat a custard tart beside the river",
     "What is the best thing to do in Lisbon?"),
    ("The old lighthouse was closed because", "a storm broke its lamp and the last keeper married a baker",
     "Why was the old lighthouse closed?"),
    ("The secret of Grandmother Olsen's plum cake is", "a spoon of black pepper that is stirred into warm honey",
     "What is the secret of Grandmother Olsen's plum cake?"),
    ("The night train to the coast was late because", "a herd of reindeer had fallen asleep on the rails",
     "Why was the night train to the coast late?"),
    ("A new study of the southern lakes shows that", "water levels fell again while salt and algae reached new records",
     "What does a new study of the southern lakes show?"),
)  # fmt: skip


@dataclass(frozen=True)
class CalibrateOptions:
    """The size of a calibration. The authors use 3 needles, 20 lengths from 1,000 to 50,000 and 10 depths.

    Attributes:
        n_needles, n_lengths, n_depths: number of facts, prompt lengths and depths; all combinations are tried.
        shortest, longest: range of the prompt lengths in tokens.
        n_errors: number of right trials that errors are measured with, evenly spread.
        n_random: if not 0, use this many random tokens, repeated four times, instead of text (RazorAttention, arXiv
            2407.15891: 2,500). S(h) = attention to earlier occurrences of a query's token and to their successors, mean
            over the last repeat. That repeat runs token by token, because the library sums over the queries of a
            decode.
    """

    n_needles: int = 3
    n_lengths: int = 4
    n_depths: int = 5
    shortest: int = 300
    longest: int = 1200
    n_errors: int = 12
    n_random: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("n_needles", 1, len(NEEDLES)), ("n_lengths", 1, 100), ("n_depths", 1, 100), ("longest", 200, 1 << 20),
            ("shortest", 200, self.longest), ("n_errors", 1, 10_000), ("n_random", 0, 1 << 18),
        ):  # fmt: skip
            if not low <= getattr(self, name) <= high:
                raise ConfigError(f"{name}={getattr(self, name)}; allowed: {low} to {high}")
        if 0 < self.n_random < N_KEPT:
            raise ConfigError(f"n_random={self.n_random}; allowed: 0, or {N_KEPT} and more")

    @property
    def n_trials(self) -> int:
        """Number of needle trials, or of sequences of random tokens."""
        return N_SEQUENCES if self.n_random else self.n_needles * self.n_lengths * self.n_depths

    @property
    def n_tokens(self) -> int:
        """Number of cells that the longest trial takes."""
        return N_REPEATS * self.n_random + 1 if self.n_random else self.longest + MAX_ANSWER


def needle_trial(llama: Llama, options: CalibrateOptions, number: int) -> dict[str, Any]:
    """Asks for one needle; returns the answer as tokens and text, and each layer's S per head, None if it is wrong."""
    prompt, place = needle_prompt(llama, options, number)
    llama.reset()  # start from an empty cache, so that no trial depends on the one before
    llama.prefill(prompt[:-1])
    reply = answer(llama, prompt[-1:], MAX_ANSWER, one_line=True)
    heads = None
    if recall(_needle(options, number)[1], reply.text) > 0.5:
        texts = {_text(llama, prompt[i]) for i in place} - {""}
        belongs = [_text(llama, token) in texts for token in reply.choices]
        heads = attention_to(llama, prompt, reply.choices, belongs, place)
    return {"answer": reply.choices, "text": reply.text, "heads": heads}


def needle_prompt(llama: Llama, options: CalibrateOptions, number: int) -> tuple[list[int], range]:
    """Returns a prompt filled with as many sentences as fit, and the place of the needle's end in it.

    Every needle has its own prose, taken from the end of the texts' sentences; evaluations take theirs from the
    beginning. Five needles in prompts of up to 5,000 tokens leave 60 % of the sentences (88,000 words) to evaluations.
    The two overlap only if both need more.
    """
    beginning, end, question = _needle(options, number)
    needle, trial = divmod(number, options.n_lengths * options.n_depths)
    length, place = divmod(trial, options.n_depths)
    n_tokens = int(np.linspace(options.shortest, options.longest, options.n_lengths)[length])
    depth = float(np.linspace(0, 1, options.n_depths)[place])
    frame, sentences = chat_frame(llama), load_texts("generated").sentences
    first = max(0, len(sentences) - (needle + 1) * (options.longest // 8))  # no sentence has fewer than 8 tokens

    def tokens(n: int) -> list[int]:
        units = list(sentences[first : first + n])
        units.insert(round(depth * n), f"{beginning} {end}.")
        sample = Sample(
            task="needle", index=number, context=" ".join(units), references=(end,), max_tokens=MAX_ANSWER,
            question=f"\n\nBased on the text above, answer the question. Question: {question}",
            answer_prefix=" Answer:", metric="string_match_all", n_tokens=n_tokens,
        )  # fmt: skip
        return [*itertools.chain(*prompt_tokens(llama, sample, frame))]

    low, high = 0, n_tokens // 4  # in sentences; none has fewer than 4 tokens
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if len(tokens(middle)) <= n_tokens else (low, middle - 1)
    prompt = tokens(low)
    pieces = [llama.piece(token) for token in prompt]
    ends = np.cumsum([len(piece) for piece in pieces])
    at = b"".join(pieces).find(end.encode())
    if at < 0:
        raise UnsupportedError("this model's tokens do not reproduce the text they come from: try --data-free")
    return prompt, range(int((ends <= at).sum()), int((ends < at + len(end.encode())).sum()) + 1)


def random_prompt(llama: Llama, options: CalibrateOptions, number: int) -> tuple[list[int], range]:
    """Returns repeated random tokens up to the middle of the last repeat, and the place of that whole repeat."""
    rng = np.random.default_rng(number)
    repeat: list[int] = []
    while len(repeat) < options.n_random:
        token = int(rng.integers(llama.n_vocab()))
        if not llama.is_end(token) and llama.piece(token):  # skips control tokens
            repeat.append(token)
    bos = [llama.token_bos()] if llama.adds_bos else []
    n_before = len(bos) + (N_REPEATS - 1) * options.n_random
    prompt = [*bos, *repeat * (N_REPEATS - 1), *repeat[: options.n_random // 2]]
    return prompt, range(n_before, n_before + options.n_random)


def random_trial(llama: Llama, options: CalibrateOptions, number: int) -> dict[str, Any]:
    """Returns echo and induction of every head as a needle trial; the answer is the rest of the last repeat."""
    prompt, last = random_prompt(llama, options, number)
    n_random, repeat = options.n_random, prompt[last.start - options.n_random : last.start]
    llama.reset()
    llama.prefill(prompt[: last.start])
    session, cache = llama.session, llama.context
    total = [np.zeros(layer.n_head) for layer in session.layers]
    before = [np.zeros((layer.n_head, last.stop), np.float32) for layer in session.layers]
    with cache.on_top(), session.scoring("sum", last.stop, MAX_SCORE_BYTES):
        for pos, token in zip(last, repeat, strict=True):
            cache.decode([token], pos)
            columns = [pos - k * n_random + i for k in range(1, N_REPEATS) for i in (0, 1)]
            after = session.scores()
            for l, scores in enumerate(after):
                total[l] += (scores[:, columns] - before[l][:, columns]).sum(axis=1, dtype=np.float64)
            before = after
    rest = repeat[n_random // 2 :][:MAX_ANSWER]
    return {"answer": rest, "text": "", "heads": [(mass / n_random).tolist() for mass in total]}


def attention_to(
    llama: Llama, prompt: Sequence[int], answer: Sequence[int], belongs: Sequence[bool], place: range
) -> list[list[float]]:
    """Returns each layer's and head's attention to ``place`` from the queries that predicted the tokens in ``belongs``.

    The first such query is the prompt's last token: it is removed, and evaluated again with the answer.
    """
    session, cache, n_before = llama.session, llama.context, len(prompt) - 1
    queries, pos = [prompt[-1], *answer[:-1]], n_before
    total = [np.zeros(layer.n_head) for layer in session.layers]
    llama.prefill(prompt[:-1])
    with cache.on_top():
        for belong, group in itertools.groupby(zip(belongs, queries, strict=True), key=lambda pair: pair[0]):
            part = [query for _, query in group]
            if not belong:
                cache.decode(part, pos)
            else:
                with session.scoring("sum", n_before, MAX_SCORE_BYTES):
                    cache.decode(part, pos)
                    for mass, scores in zip(total, session.scores(), strict=True):
                        mass += scores[:, place.start : place.stop].sum(axis=1, dtype=np.float64)
            pos += len(part)
    return [mass.tolist() for mass in total]


def eviction_errors(
    llama: Llama, prompt: list[int], answer: Sequence[int], heads: tuple[tuple[float, ...], ...]
) -> list[float]:
    """Returns for each layer the relative error of its attention output, summed over the answer's tokens but the last.

    Needs one decode per layer, in which the other layers see everything. A bias hides rows instead of removing them.
    The full cache gets a bias of zeros, so that both runs use the same kernels.
    """
    n_layer, n_tokens, steps = len(heads), len(prompt), list(answer[:-1])
    even = Calibration("", "", heads, (1 / n_layer,) * n_layer)
    method = CompressKV(n_kept=N_KEPT, calibration=even, allocation=Uniform(), max_score_bytes=MAX_SCORE_BYTES)
    llama.reset()
    plan = method.plan(llama.observe(prompt, method))
    session, cache = llama.session, llama.context
    nothing = [np.zeros((layer.n_head_kv, 1), np.float32) for layer in session.layers]

    def outputs(biases: Sequence[FloatArray], layers: Sequence[int]) -> list[FloatArray]:
        with cache.on_top(), session.biased(biases), session.taps("outputs", len(steps)):
            cache.decode(steps, n_tokens)
            return [session.tapped("outputs", l, len(steps)).reshape(len(steps), -1) for l in layers]

    errors = []
    for l, full in enumerate(outputs(nothing, range(n_layer))):
        hidden = np.full((session.layers[l].n_head_kv, n_tokens), -np.inf, np.float32)
        np.put_along_axis(hidden, plan.rows[l].astype(np.int64), 0, axis=1)
        (compressed,) = outputs([*nothing[:l], hidden, *nothing[l + 1 :]], [l])
        lost = np.linalg.norm((compressed - full).astype(np.float64), axis=1)
        errors.append(float((lost / (np.linalg.norm(full.astype(np.float64), axis=1) + EPS)).sum()))
    if not any(errors):
        raise UnsupportedError("this model's attention accepts no bias, so its eviction errors cannot be measured")
    return errors


def recall(reference: str, text: str) -> float:
    """Returns ROUGE-1 recall: the share of the reference's words that occur in the text, counting repetitions."""
    wanted, found = (Counter(re.findall(r"[a-z0-9]+", part.lower())) for part in (reference, text))
    return sum((wanted & found).values()) / wanted.total()


def _needle(options: CalibrateOptions, number: int) -> tuple[str, str, str]:
    return NEEDLES[number // (options.n_lengths * options.n_depths)]


def _text(llama: Llama, token: int) -> str:
    return llama.piece(token).decode("utf-8", errors="replace").strip().lower()
