"""The measurements of ``kvcompose calibrate``: semantic retrieval heads and eviction errors (arXiv 2508.02401).

Needle trials: a fact is hidden in prose and asked for. S(h) = sum, over the generated tokens that belong to the answer,
of the attention that head h pays to the whole of the answer's place in the prose, by the query that each is predicted
from; mean over the trials whose answer is right. Where we differ from semantic_retrieval_head_detection.py, the
authors': a token belongs to the answer if its text, without spaces and case, is that of a token of the place (theirs:
if its number is), and counts once (theirs: as often as it is there); recall is without a stemmer; the prose is
generated, and the facts are our own.

Eviction errors, of prompts reduced to 32 tokens (24 and the window of 8): e(l) = sum over the answer's decode steps of
||O_compressed - O_full|| / (||O_full|| + eps), where only layer l is compressed, so that it has no share in the errors
of those before it, as in the authors' modeling_mistral_new.py. Where we differ: O is the attention output before its
projection, and the prompts are trials, not LongBench.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .calibration import Calibration
from .errors import ConfigError, UnsupportedError
from .evaluation.answering import answer
from .evaluation.prompts import chat_frame, prompt_tokens
from .evaluation.samples import Sample
from .evaluation.texts import load_texts
from .kernels.types import FloatArray
from .methods.allocation import Uniform
from .methods.compresskv import CompressKV

if TYPE_CHECKING:
    from .llama import Llama

EPS = 1e-5  # of the relative error
N_KEPT = 32  # tokens a layer that the error is measured with
MAX_ANSWER = 50
N_REPEATS, N_SEQUENCES = 4, 4  # of random tokens
MAX_SCORE_BYTES = 64 << 20

#: the beginning of a sentence, its end that is the answer, and the question
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
    """The size of a calibration; the authors' is 3 needles, 20 lengths from 1,000 to 50,000 and 10 depths.

    Attributes:
        n_needles, n_lengths, n_depths: facts, prompt lengths and places, every one with every other.
        shortest, longest: tokens of the prompts.
        n_errors: of the trials that count, those that errors are measured with, evenly spread.
        n_random: not 0: no text, but random tokens that come four times (RazorAttention, arXiv 2407.15891: 2,500).
            S(h) = attention to earlier occurrences of a query's token and to their successors, mean over the last
            repeat, which runs token by token: the library sums over the queries of a decode.
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
                raise ConfigError(f"{name}={getattr(self, name)}, allowed are {low} to {high}")
        if 0 < self.n_random < N_KEPT:
            raise ConfigError(f"n_random={self.n_random}, allowed are 0, and {N_KEPT} and more")

    @property
    def n_trials(self) -> int:
        """Needles, or sequences of random tokens."""
        return N_SEQUENCES if self.n_random else self.n_needles * self.n_lengths * self.n_depths

    @property
    def n_tokens(self) -> int:
        """Cells that the longest trial takes."""
        return N_REPEATS * self.n_random + 1 if self.n_random else self.longest + MAX_ANSWER


def needle_trial(llama: Llama, options: CalibrateOptions, number: int) -> dict[str, Any]:
    """Ask for one needle: the answer as tokens and text, and for each layer the heads' S, None if it is wrong."""
    prompt, place = needle_prompt(llama, options, number)
    llama.reset()  # nothing is reused: a trial must not depend on the one before
    llama.prefill(prompt[:-1])
    reply = answer(llama, prompt[-1:], MAX_ANSWER, one_line=True)
    heads = None
    if recall(_needle(options, number)[1], reply.text) > 0.5:
        texts = {_text(llama, prompt[i]) for i in place} - {""}
        belongs = [_text(llama, token) in texts for token in reply.choices]
        heads = attention_to(llama, prompt, reply.choices, belongs, place)
    return {"answer": reply.choices, "text": reply.text, "heads": heads}


def needle_prompt(llama: Llama, options: CalibrateOptions, number: int) -> tuple[list[int], range]:
    """The prompt of a trial, as long as whole sentences permit, and the place of the needle's end in it.

    Every needle has prose of its own, from the end of the texts' sentences; evaluations take theirs from the beginning.
    Five needles in prompts of up to 5,000 tokens leave them 60 % of the sentences, 88,000 words; only where both need
    more do they overlap.
    """
    beginning, end, question = _needle(options, number)
    needle, trial = divmod(number, options.n_lengths * options.n_depths)
    length, place = divmod(trial, options.n_depths)
    n_tokens = int(np.linspace(options.shortest, options.longest, options.n_lengths)[length])
    depth = float(np.linspace(0, 1, options.n_depths)[place])
    frame, sentences = chat_frame(llama), load_texts("generated").sentences
    first = max(0, len(sentences) - (needle + 1) * (options.longest // 8))  # none of 8 tokens

    def tokens(n: int) -> list[int]:
        units = list(sentences[first : first + n])
        units.insert(round(depth * n), f"{beginning} {end}.")
        sample = Sample(
            task="needle", index=number, context=" ".join(units), references=(end,), max_tokens=MAX_ANSWER,
            question=f"\n\nBased on the text above, answer the question. Question: {question}",
            answer_prefix=" Answer:", metric="string_match_all", n_tokens=n_tokens,
        )  # fmt: skip
        return [*itertools.chain(*prompt_tokens(llama, sample, frame))]

    low, high = 0, n_tokens // 4  # sentences; none has fewer than 4 tokens
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if len(tokens(middle)) <= n_tokens else (low, middle - 1)
    prompt = tokens(low)
    pieces = [llama.piece(token) for token in prompt]
    ends = np.cumsum([len(piece) for piece in pieces])
    at = b"".join(pieces).find(end.encode())
    if at < 0:
        raise UnsupportedError("tokens of this model do not spell the text that they were made from: try --data-free")
    return prompt, range(int((ends <= at).sum()), int((ends < at + len(end.encode())).sum()) + 1)


def random_prompt(llama: Llama, options: CalibrateOptions, number: int) -> tuple[list[int], range]:
    """Random tokens again and again until the middle of the last repeat, and the place of the whole of that."""
    rng = np.random.default_rng(number)
    repeat: list[int] = []
    while len(repeat) < options.n_random:
        token = int(rng.integers(llama.n_vocab()))
        if not llama.is_end(token) and llama.piece(token):  # no control token
            repeat.append(token)
    bos = [llama.token_bos()] if llama.adds_bos else []
    n_before = len(bos) + (N_REPEATS - 1) * options.n_random
    prompt = [*bos, *repeat * (N_REPEATS - 1), *repeat[: options.n_random // 2]]
    return prompt, range(n_before, n_before + options.n_random)


def random_trial(llama: Llama, options: CalibrateOptions, number: int) -> dict[str, Any]:
    """Echo and induction of every head, in the form of a needle trial; the answer is what comes in the last repeat."""
    prompt, last = random_prompt(llama, options, number)
    n_random, repeat = options.n_random, prompt[last.start - options.n_random : last.start]
    llama.reset()
    llama.prefill(prompt[: last.start])
    session, decoder = llama.session, llama.decoder()
    total = [np.zeros(layer.n_head) for layer in session.layers]
    before = [np.zeros((layer.n_head, last.stop), np.float32) for layer in session.layers]
    with decoder.on_top(last.start), session.scoring("sum", last.stop, MAX_SCORE_BYTES):
        for pos, token in zip(last, repeat, strict=True):
            decoder.decode([token], pos)
            columns = [pos - k * n_random + i for k in range(1, N_REPEATS) for i in (0, 1)]
            after = session.scores(last.stop)
            for l, scores in enumerate(after):
                total[l] += (scores[:, columns] - before[l][:, columns]).sum(axis=1, dtype=np.float64)
            before = after
    rest = repeat[n_random // 2 :][:MAX_ANSWER]
    return {"answer": rest, "text": "", "heads": [(mass / n_random).tolist() for mass in total]}


def attention_to(
    llama: Llama, prompt: Sequence[int], answer: Sequence[int], belongs: Sequence[bool], place: range
) -> list[list[float]]:
    """For each layer and head the attention that ``place`` gets from the queries that chose the tokens that belong.

    The first of these is the prompt's last token: it is forgotten, and evaluated again with the answer.
    """
    session, decoder, n_before = llama.session, llama.decoder(), len(prompt) - 1
    queries, pos = [prompt[-1], *answer[:-1]], n_before
    total = [np.zeros(layer.n_head) for layer in session.layers]
    llama.prefill(prompt[:-1])
    with decoder.on_top(n_before):
        for belong, group in itertools.groupby(zip(belongs, queries, strict=True), key=lambda pair: pair[0]):
            part = [query for _, query in group]
            if not belong:
                decoder.decode(part, pos)
            else:
                with session.scoring("sum", n_before, MAX_SCORE_BYTES):
                    decoder.decode(part, pos)
                    for mass, scores in zip(total, session.scores(n_before), strict=True):
                        mass += scores[:, place.start : place.stop].sum(axis=1, dtype=np.float64)
            pos += len(part)
    return [mass.tolist() for mass in total]


def eviction_errors(
    llama: Llama, prompt: list[int], answer: Sequence[int], heads: tuple[tuple[float, ...], ...]
) -> list[float]:
    """For each layer the sum over the answer's tokens, but the last, of the relative error of its attention output.

    One decode a layer, whose other layers see everything; rows are hidden by a bias, not removed, and the full cache
    has one of zeros, so that both run the same kernels.
    """
    n_layer, n_tokens, steps = len(heads), len(prompt), list(answer[:-1])
    even = Calibration("", "", heads, (1 / n_layer,) * n_layer)
    method = CompressKV(n_kept=N_KEPT, calibration=even, allocation=Uniform(), max_score_bytes=MAX_SCORE_BYTES)
    llama.reset()
    plan = method.plan(llama.observe(prompt, method))
    session, decoder = llama.session, llama.decoder()
    nothing = [np.zeros((layer.n_head_kv, 1), np.float32) for layer in session.layers]

    def outputs(biases: Sequence[FloatArray], layers: Sequence[int]) -> list[FloatArray]:
        with decoder.on_top(n_tokens), session.biased(biases), session.taps("outputs", len(steps)):
            decoder.decode(steps, n_tokens)
            return [session.tapped("outputs", l, len(steps)).reshape(len(steps), -1) for l in layers]

    errors = []
    for l, full in enumerate(outputs(nothing, range(n_layer))):
        hidden = np.full((session.layers[l].n_head_kv, n_tokens), -np.inf, np.float32)
        np.put_along_axis(hidden, plan.cells[l].astype(np.int64), 0, axis=1)
        (compressed,) = outputs([*nothing[:l], hidden, *nothing[l + 1 :]], [l])
        lost = np.linalg.norm((compressed - full).astype(np.float64), axis=1)
        errors.append(float((lost / (np.linalg.norm(full.astype(np.float64), axis=1) + EPS)).sum()))
    if not any(errors):
        raise UnsupportedError("attention of this model takes no bias: its eviction errors cannot be measured")
    return errors


def recall(reference: str, text: str) -> float:
    """ROUGE-1 recall: share of the reference's words that the text has, each as often as it has it."""
    wanted, found = (Counter(re.findall(r"[a-z0-9]+", part.lower())) for part in (reference, text))
    return sum((wanted & found).values()) / wanted.total()


def _needle(options: CalibrateOptions, number: int) -> tuple[str, str, str]:
    return NEEDLES[number // (options.n_lengths * options.n_depths)]


def _text(llama: Llama, token: int) -> str:
    return llama.piece(token).decode("utf-8", errors="replace").strip().lower()
