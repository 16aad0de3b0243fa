"""What a transformer is, as data: the vocabulary in which a family of models is described.

A transformer is a handful of vector **spaces** and the linears and embeddings that read one and write another. Whatever
slimtune does to a model's structure (rotate it, prune it, choose layers, export it) follows from those facts, so they
are written once, one `FamilySpec` a family, and bound to a model by `slimtune.arch.bind`.

Paths are relative: in a `StackSpec` to the block, in a `FamilySpec` to its `trunk`. A path that starts with `/` is
relative to the model.

Example:
    >>> PortSpec("attention.query", Space.RESIDUAL, (Space.HEAD,), stage=0).writes
    (<Space.HEAD: 'head'>,)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

Config = Any
"""A Hugging Face configuration object: attributes named by its family."""


class Space(str, Enum):
    """A vector space inside a model. Two ports that name the same space meet there: what one writes the other reads."""

    RESIDUAL = "residual"
    """The stream that every block adds to; `hidden_size` wide."""
    HEAD = "head"
    """Queries and attention outputs: query heads times head width."""
    KV_HEAD = "kv_head"
    """Keys and values: key-value heads times head width."""
    HEADS = "heads"
    """One number a query head: relative position biases."""
    FFN = "ffn"
    """The inside of a feed-forward layer."""
    VOCAB = "vocab"
    """Tokens: one dimension a token."""
    WORD = "word"
    """Token embeddings that a projection brings to the width of the residual stream."""
    POSITION = "position"
    """Positions, or buckets of distances."""
    FOREIGN = "foreign"
    """Whatever is not the language model's: vision towers. Its sizes are not checked."""


When = Callable[[Config], bool]
"""Whether a module exists, given the configuration."""


def always(config: Config) -> bool:
    """The condition of a module that every model of the family has."""
    return True


@dataclass(frozen=True)
class PortSpec:
    """A linear or an embedding: where it stands, what it reads and what it writes.

    `writes` has one space, or several that a fused layer stacks along `out_features`. `stage` is the place in a block's
    dataflow: ports of one stage share one input, and a stage reads what earlier stages made. `values` is the place in
    `writes` of the values that attention averages, for the next port that reads `HEAD`.
    """

    path: str
    reads: Space
    writes: tuple[Space, ...]
    stage: int = 0
    when: When = always
    values: int | None = None


NormKind = Literal["rms", "rms_plus_one", "layer"]
"""`rms`: `x / rms(x) * w`; `rms_plus_one`: `x / rms(x) * (1 + w)`; `layer`: LayerNorm, which subtracts the mean."""


@dataclass(frozen=True)
class NormSpec:
    """A normalisation, placed by the ports around it.

    It stands before the ports it `feeds` (those and nothing else), or after the port it `follows` and before what that
    port writes to. One with neither stands in the residual stream itself. `feeds` may use `*` wildcards.
    """

    path: str
    kind: NormKind
    feeds: tuple[str, ...] = ()
    follows: str = ""
    when: When = always


@dataclass(frozen=True)
class StackSpec:
    """A run of equal blocks: the path of their `ModuleList`, and what one block holds.

    `gated` is the path of a feed-forward layer that computes `third(f(first(x)) * second(x))` with its three ports in
    their order, where a block has one.
    """

    blocks: str
    ports: tuple[PortSpec, ...]
    norms: tuple[NormSpec, ...]
    gated: str = ""


@dataclass(frozen=True)
class Widths:
    """Where a family keeps the numbers that change when a model is made narrower or shallower.

    Each is the name of an attribute of the configuration; `blocks` may name several, one a stack. `head_width` says
    how wide a head is whatever the other sizes are; a family without it (`""`) cannot lose heads. `divides` says that
    the family's configuration wants the heads to divide the hidden size; `stand_in` is then the type of a family that
    computes the same without biases and does not.
    """

    heads: str = "num_attention_heads"
    kv_heads: str = "num_key_value_heads"
    head_width: str = "head_dim"
    ffn: str = "intermediate_size"
    blocks: tuple[str, ...] = ("num_hidden_layers",)
    divides: bool = False
    stand_in: str = ""


@dataclass(frozen=True)
class FamilySpec:
    """One row of the table of families.

    `entry` is what stands before the blocks (embeddings first, so that a tied weight belongs to the embedding), `exit`
    what stands after them; `norms` are those outside the blocks. `sizes` reads the width of a space from a
    configuration.

    A family that `wraps` a language model names the attribute of its configuration that describes the inner model: the
    inner model's own row is then used, with this row's `trunk` and in addition to this row's `entry` and `foreign`.
    `foreign` are regions whose linears and embeddings are all of `Space.FOREIGN`. `epsilon` is the attribute of the
    configuration with what RMS norms add to the mean square.
    """

    name: str
    model_types: tuple[str, ...]
    trunk: str = ""
    entry: tuple[PortSpec, ...] = ()
    stacks: tuple[StackSpec, ...] = ()
    norms: tuple[NormSpec, ...] = ()
    exit: tuple[PortSpec, ...] = ()
    sizes: Mapping[Space, Callable[[Config], int]] | None = None
    scaled_embeddings: bool = False
    wraps: str = ""
    foreign: tuple[str, ...] = ()
    widths: Widths = field(default_factory=Widths)
    epsilon: str = "rms_norm_eps"


def attention_heads(config: Config) -> int:
    """The number of query heads."""
    return int(config.num_attention_heads)


def head_width(config: Config) -> int:
    """The width of one head: `head_dim` where the configuration gives it, an equal share of the stream otherwise."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // attention_heads(config))


def key_value_heads(config: Config) -> int:
    """The number of key-value heads: as many as query heads where the configuration gives none."""
    return getattr(config, "num_key_value_heads", None) or attention_heads(config)
