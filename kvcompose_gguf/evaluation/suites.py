"""Named lists of methods: what `kvcompose eval --method @name` stands for."""

from __future__ import annotations

from ..errors import ConfigError

#: methods by what they do, not by what this machine has a surrogate for, but for "quick", which shows the default
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
