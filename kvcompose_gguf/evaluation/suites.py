"""Named lists of methods, for `kvcompose eval --method @name`."""

from __future__ import annotations

from ..errors import ConfigError

#: each entry states its scoring, so it does not depend on what was learnt here; "quick" shows the default
SUITES: dict[str, tuple[str, ...]] = {
    "none": (),
    "quick": ("kvcompose", "kvcompose,scoring=repeat", "snapkv", "streaming-llm"),
    "baselines": (
        "kvcompose,scoring=repeat",
        "kvcompose,scoring=repeat,n_sink=0",
        "kvcompose,scoring=window",
        "kvcompose,scoring=prefill,agg_task=mean",
        "compresskv",
        "compresskv,per_head=True",
        "snapkv",
        "pyramidkv",
        "tova",
        "observed-attention",
        "keydiff",
        "knorm",
        "expected-attention",
        "streaming-llm",
        "kvzip",
        "random",
    ),
    "scoring": (
        "kvcompose,scoring=repeat",
        "kvcompose,scoring=repeat,scoring_chunk=None",
        "kvcompose,scoring=repeat,scoring_chunk=256",
        "kvcompose,scoring=repeat,scoring_chunk=1024",
        "kvcompose,scoring=repeat,scoring_fraction=0.5",
        "kvcompose,scoring=repeat,scoring_fraction=0.25",
        "kvcompose,scoring=window",
        "kvcompose,scoring=prefill",
    ),
    "ablations": (
        "kvcompose,scoring=repeat",
        "kvcompose,scoring=repeat,agg_task=mean",
        "kvcompose,scoring=repeat,agg_group=max",
        "kvcompose,scoring=repeat,agg_head=max",
        "kvcompose,scoring=repeat,add_v_norm=True",
        "kvcompose,scoring=repeat,add_mean_across_heads=False",
        "kvcompose,scoring=repeat,allocation=uniform",
        "kvcompose,scoring=repeat,first_layer_rule=True",
        "kvcompose,scoring=repeat,n_sink=0",
        "unstructured,scoring=repeat",
    ),
    "variants": (
        "kvcompose,scoring=repeat",
        "kvcompose,scoring=repeat,n_sink=0",
        "kvcompose,scoring=repeat,n_recent=32",
        'kvcompose,scoring=repeat,instruction="\\n\\nRepeat the previous context exactly."',
        "variant,scoring=repeat,own=True",
        "variant,scoring=repeat,pool=3",
        "variant,scoring=repeat,pool=5,pooling=max",
        "variant,scoring=repeat,output_norm=True",
        "variant,scoring=repeat,fold=1.0",
        "variant,scoring=repeat,correct=0.5",
    ),
}


def expand(names: list[str] | tuple[str, ...]) -> list[str]:
    """Replaces every ``@suite`` by its methods; returns every method text once.

    Raises:
        ConfigError: a suite does not exist.
    """
    specs: list[str] = []
    for name in names:
        if name.startswith("@") and name[1:] not in SUITES:
            raise ConfigError(f"method={name!r} is not a suite: {', '.join('@' + suite for suite in SUITES)}")
        specs += SUITES[name[1:]] if name.startswith("@") else (name,)
    return list(dict.fromkeys(specs))
