"""Prompts of a tiny model that teach the prediction of its scores, and that it predicts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support import tiny
from support.llamas import ONE_THREAD

from kvcompose_gguf import ConfigError, KVCompose
from kvcompose_gguf.cli import doctor
from kvcompose_gguf.measurements.learned import Learned, read_learned, update_learned
from kvcompose_gguf.methods.predictor import Predictor
from kvcompose_gguf.methods.variant import Variant
from kvcompose_gguf.native import family as family_module
from kvcompose_gguf.native.vocab_only import open_vocabulary
from kvcompose_gguf.scoring.requests import SpotCheck


def prompt(seed: int, n: int = 600) -> list[int]:
    return tiny.tokens(tiny.GQA, n, seed=seed)


def test_prompts_are_learnt_from_and_then_predicted(make_llama: Callable[..., Any], kept: Path) -> None:
    method = KVCompose(compression_ratio=0.5)
    llama = make_llama(tiny.GQA, method, n_ctx=2048, **ONE_THREAD)
    notes = [llama.compress(prompt(seed)).scoring for seed in range(3)]
    assert notes[:2] == ["repeat 1/2 (learning)", "repeat all (learning)"]
    assert notes[2].startswith("predicted, checked 1/4 (agreement 0.")  # of the first part, 512 tokens
    (file,) = kept.glob("*.npz")
    assert read_learned(file.stem).n_prompts == 3
    other = make_llama(tiny.GQA, method, n_ctx=2048, **ONE_THREAD)  # another process finds it as well
    assert other.compress(prompt(5)).scoring.startswith("predicted, checked")
    other.kv_compressor = replace(method, spot_check=0.0)
    report = other.compress(prompt(6))
    assert (report.scoring, report.scoring_chunk) == ("predicted", 0)
    assert read_learned(file.stem).n_prompts == 4


def test_an_object_may_learn_nothing(make_llama: Callable[..., Any], kept: Path) -> None:
    llama = make_llama(tiny.GQA, KVCompose(compression_ratio=0.5, learn=False), n_ctx=2048, **ONE_THREAD)
    for seed in range(3):
        assert llama.compress(prompt(seed)).scoring == "repeat 1/2 (learning)"
    assert not kept.exists()


def test_scores_are_the_prediction_and_at_least_what_was_seen(make_llama: Callable[..., Any]) -> None:
    method = KVCompose(compression_ratio=0.5, add_mean_across_heads=False, learn=False)
    llama = make_llama(tiny.GQA, n_ctx=2048, **ONE_THREAD)
    method = method.for_model(Path(llama.model_path)).informed()
    evidence = llama.observe(prompt(0), method)
    taught = method.taught_by(evidence)
    assert taught.predictor.known is not None
    predicted = taught.predictor.known.predict(evidence)
    for l, scores in enumerate(method.scores(evidence)):
        seen = evidence.attention[l].reshape(2, 2, -1).mean(axis=1)
        np.testing.assert_array_equal(scores, np.maximum(predicted[l], seen))


@pytest.mark.parametrize(
    ("options", "n_prompts"),
    [({"scoring_chunk": None}, 1), ({"in_place": True}, 1), ({}, 0), ({"in_place": True, "learn": False}, 0),
     ({"scoring_chunk": None, "instruction": "Again: "}, 0), ({"in_place": True, "scoring_fraction": 0.5}, 0),
     ({"in_place": True, "agg_task": "mean"}, 0)],
)  # fmt: skip
def test_a_repeat_that_was_asked_for_teaches_if_it_is_the_one_that_is_predicted(
    make_llama: Callable[..., Any], kept: Path, options: dict[str, Any], n_prompts: int
) -> None:
    method = KVCompose(compression_ratio=0.5, scoring="repeat", **options)
    llama = make_llama(tiny.GQA, method, n_ctx=2048, **ONE_THREAD)
    assert llama.compress(prompt(0)).scoring == ""
    files = [*kept.glob("*.npz")]
    assert [read_learned(file.stem).n_prompts for file in files] == [1] * n_prompts
    assert [read_learned(file.stem).n_tokens for file in files] == [600] * n_prompts


def test_a_long_repeat_teaches_with_some_of_its_tokens(make_llama: Callable[..., Any], kept: Path) -> None:
    llama = make_llama(tiny.GQA, KVCompose(compression_ratio=0.5, spot_check=1.0), n_ctx=4096, **ONE_THREAD)
    llama.compress(prompt(0, 1300))
    (file,) = kept.glob("*.npz")
    assert read_learned(file.stem).n_tokens == 1024


def test_scores_alone_teach_nothing(make_llama: Callable[..., Any], kept: Path) -> None:
    llama = make_llama(tiny.GQA, KVCompose(compression_ratio=0.5), n_ctx=2048, **ONE_THREAD)
    evidence = llama.observe(prompt(0), llama.kv_compressor)
    llama.kv_compressor.plan(evidence)
    assert not kept.exists()


def test_what_is_repeated_of_a_prompt_depends_on_what_is_known() -> None:
    def check(n_prompts: int, n_tokens: int, share: float | None = None, agreements: tuple[float, ...] = ()) -> Any:
        return Predictor("f", Learned(n_prompts, n_tokens, agreements)).check(share)

    assert Predictor("f").check(None) == check(0, 0) == SpotCheck(0.2, 1024, least=256)
    assert check(1, 384) == check(1, 1024) == check(3, 500) == SpotCheck(1.0, 2048)
    assert check(2, 1300, None, (0.6, 0.75)) == SpotCheck(0.125, 256, to_end=False)
    assert check(4, 1800, None, (0.65, 0.7, 0.8)) == SpotCheck(0.0625, 256, to_end=False)
    assert check(0, 0, 0.5) == check(9, 5000, 0.5) == SpotCheck(0.5)
    assert check(0, 0, 0.0) == SpotCheck(0.2, 1024, least=256)  # something has to be known first
    assert check(9, 5000, 0.0) is None


def test_a_whole_repeat_is_taken_as_it_is(make_llama: Callable[..., Any]) -> None:
    method = KVCompose(compression_ratio=0.5, add_mean_across_heads=False, learn=False, spot_check=1.0)
    llama = make_llama(tiny.GQA, n_ctx=2048, **ONE_THREAD)
    method = method.for_model(Path(llama.model_path)).informed()
    evidence = llama.observe(prompt(0), method)
    for scores, attention in zip(method.taught_by(evidence).scores(evidence), evidence.attention, strict=True):
        np.testing.assert_array_equal(scores, attention.reshape(2, 2, -1).mean(axis=1))


def test_options_that_nobody_predicts_repeat_the_context(make_llama: Callable[..., Any], kept: Path) -> None:
    llama = make_llama(tiny.GQA, KVCompose(compression_ratio=0.5, agg_task="mean"), n_ctx=2048)
    assert llama.kv_compressor.scoring == "repeat"
    assert llama.compress(prompt(0)).scoring == ""
    with pytest.raises(ConfigError, match="scoring='learned' predicts max and mean"):
        KVCompose(compression_ratio=0.5, scoring="learned", agg_group="max")
    for share in (-0.1, 1.5):
        with pytest.raises(ConfigError, match="spot_check="):
            KVCompose(compression_ratio=0.5, spot_check=share)


@pytest.mark.parametrize(
    "options", [{"scoring_fraction": 0.5}, {"instruction": "x"}, {"agg_task": "mean"}, {"agg_group": "max"}], ids=str
)
def test_auto_is_the_repeat_if_an_option_asks_for_scores_that_nobody_predicts(
    make_llama: Callable[..., Any], options: dict[str, Any]
) -> None:
    path = Path(make_llama(tiny.GQA).model_path)
    assert KVCompose(n_kept=9, agg_head="max").for_model(path).scoring == "learned"
    assert KVCompose(n_kept=9, **options).for_model(path).scoring == "repeat"
    for name in ("own", "output_norm"):
        changed: dict[str, Any] = {name: True}
        assert Variant(n_kept=9, **changed).for_model(path).scoring == "repeat"
    with pytest.raises(ConfigError, match="'surrogate' is now scoring='learned'"):
        KVCompose(n_kept=9, scoring="surrogate")


def family(monkeypatch: pytest.MonkeyPatch, file: Path, **metadata: str) -> str:
    """Returns the family of a file, as if its metadata had further values."""

    @contextlib.contextmanager
    def opened(path: Path) -> Any:
        with open_vocabulary(path) as vocabulary:
            known = vocabulary.metadata() | {
                name.replace("general_", "general."): value for name, value in metadata.items()
            }
            yield SimpleNamespace(metadata=lambda: known, n_vocab=vocabulary.n_vocab)

    monkeypatch.setattr(family_module, "open_vocabulary", opened)
    return family_module.family_of(file)


def test_a_family_is_the_model_and_not_its_file(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, other = tiny_model(tiny.GQA), tmp_path / "other.gguf"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1  # another weight, as in another quantization
    other.write_bytes(data)
    named = [family(monkeypatch, path, general_name="Tiny Model 1B") for path in (file, other)]
    assert named[0] == named[1]
    assert named[0].startswith("Tiny-Model-1B-")
    assert family(monkeypatch, file, general_name="Tiny Model 2B") != named[0]
    assert family(monkeypatch, file, general_name="Tiny Model 1B", **{"llama.rope.freq_base": "5"}) != named[0]
    assert family(monkeypatch, tiny_model(tiny.MHA), general_name="Tiny Model 1B") != named[0]
    assert family(monkeypatch, file) != family(monkeypatch, other)  # without a name


def test_the_doctor_says_what_is_known_of_each_model(make_llama: Callable[..., Any], kept: Path) -> None:
    llama = make_llama(tiny.GQA, KVCompose(compression_ratio=0.5), n_ctx=2048, **ONE_THREAD)
    for seed in range(2):
        llama.compress(prompt(seed))
    (file,) = kept.glob("*.npz")
    (finding,) = (finding for finding in doctor.examine() if finding.name == "learnt of")
    assert finding.value.startswith(f"{file.stem}: 2 prompts, agreement ")
    assert finding.value.endswith(" MB")


def test_a_prompt_of_another_model_of_the_same_name_begins_to_learn_again(
    make_llama: Callable[..., Any], kept: Path
) -> None:
    llama = make_llama(tiny.GQA, KVCompose(compression_ratio=0.5), n_ctx=2048, **ONE_THREAD)
    for seed in range(3):
        llama.compress(prompt(seed))
    (file,) = kept.glob("*.npz")

    def turned(known: Learned) -> Learned:  # whatever was predicted high is now predicted low
        return replace(known, layers=tuple(replace(layer, weights=-layer.weights) for layer in known.layers))

    update_learned(file.stem, turned)
    assert llama.compress(prompt(5)).scoring == "repeat 1/4 (learning)"
    assert read_learned(file.stem).n_prompts == 1


def test_the_users_share_has_no_limit(make_llama: Callable[..., Any], kept: Path) -> None:
    method = KVCompose(compression_ratio=0.5, spot_check=1.0)
    llama = make_llama(tiny.GQA, method, n_ctx=4096, **ONE_THREAD)
    evidence = llama.observe(prompt(0, 1300), llama.kv_compressor)
    assert evidence.repeated.tolist() == list(range(1300))
    for seed in range(3):
        assert llama.compress(prompt(seed, 1300)).scoring == "repeat all (learning)"
