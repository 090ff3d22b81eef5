"""Named lists of methods: what `kvcompose eval --method @name` stands for."""

from __future__ import annotations

from ..errors import ConfigError

SUITES: dict[str, tuple[str, ...]] = {
    "none": (),
    "quick": ("kvcompose", "kvcompose,scoring=window", "snapkv", "streaming-llm"),
    "baselines": (
        "kvcompose",
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
        "kvcompose",
        "kvcompose,scoring_chunk=None",
        "kvcompose,scoring_chunk=256",
        "kvcompose,scoring_chunk=1024",
        "kvcompose,scoring_fraction=0.5",
        "kvcompose,scoring_fraction=0.25",
        "kvcompose,scoring=window",
        "kvcompose,scoring=prefill",
    ),
    "ablations": (
        "kvcompose",
        "kvcompose,agg_task=mean",
        "kvcompose,agg_group=max",
        "kvcompose,agg_head=max",
        "kvcompose,add_v_norm=True",
        "kvcompose,add_mean_across_heads=False",
        "kvcompose,allocation=uniform",
        "kvcompose,first_layer_rule=True",
        "kvcompose,n_sink=4",
        "unstructured",
    ),
    "variants": (
        "kvcompose",
        "kvcompose,n_sink=4",
        "kvcompose,n_recent=32",
        'kvcompose,instruction="\\n\\nRepeat the previous context exactly."',
        "variant,own=True",
        "variant,pool=3",
        "variant,pool=5,pooling=max",
        "variant,output_norm=True",
        "variant,fold=1.0",
        "variant,correct=0.5",
    ),
}


def expand(names: list[str] | tuple[str, ...]) -> list[str]:
    """Method texts with every ``@suite`` replaced by its methods, each once.

    Raises:
        ConfigError: there is no such suite.
    """
    specs: list[str] = []
    for name in names:
        if name.startswith("@") and name[1:] not in SUITES:
            raise ConfigError(f"method={name!r} is no suite, there are {', '.join('@' + suite for suite in SUITES)}")
        specs += SUITES[name[1:]] if name.startswith("@") else (name,)
    return list(dict.fromkeys(specs))
