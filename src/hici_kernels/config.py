"""Configuration of the two methods: frozen dataclasses, validated on construction, stored as JSON."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from . import _checks

CONTEXT_MODES = ("none", "causal_gi", "causal_shift", "causal_shift_g", "causal_gi_gonly")
LEAK_FREE_MODES = ("causal_shift", "causal_shift_g")

ConfigT = TypeVar("ConfigT", bound="_Config")


class _ByContext(str):
    """The value that ``cut`` has where none was given: text like any other, but a constructor that gets it (from
    dataclasses.replace, which passes on what it reads) chooses anew."""


@dataclass(frozen=True)
class _Config:
    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls: type[ConfigT], values: dict[str, Any]) -> ConfigT:
        """The inverse of :meth:`to_dict`; a missing field takes its default, an unknown one is a ValueError."""
        if not isinstance(values, dict):
            raise TypeError(f"values must be a dict, got {type(values).__name__}")
        known = {f.name for f in dataclasses.fields(cls)}
        for name in values:
            if name not in known:
                raise ValueError(f"{name!r} is not a field of {cls.__name__}; fields: {', '.join(sorted(known))}")
        return cls(**values)

    def save(self, path: str | Path) -> None:
        """Write the fields as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls: type[ConfigT], path: str | Path) -> ConfigT:
        """Read what :meth:`save` wrote."""
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))


@dataclass(frozen=True)
class HiCIConfig(_Config):
    """Segments, slots and rules of a HiCI layer.

    Args:
        num_local_slots: M, slots per segment.
        global_slots: K, slots that summarise all segments.
        num_heads: heads of the local constructor.
        bottleneck_dim: attention width of the local constructor; None = full hidden width without output projection.
        compress_dim: width D of the integrator; None = bottleneck_dim, or 512 if that is None.
        integrator_heads: heads of the integrator; None = num_heads.
        shared_compress_dim: width C of the one compressor all five statistics share; None = five separate
            compressors of width D. C >= D needs no expansion and the integrator then has width C.
        num_segments: used when segment_len is None: segment_len = ceil(S / num_segments). Segment cuts then depend on
            the total length, so results change when the text grows.
        segment_len: tokens per segment; makes results independent of later length.
        context_mode: what the slots of segment i contain (1-based), and what leaks from the future:
            "none"             G of all segments, L_i   leaks the whole future through G, and its segment through L_i
            "causal_gi"        G_i of segments 1..i, L_i          a token sees later tokens of its own segment
            "causal_gi_gonly"  G_i                                the same
            "causal_shift"     G_{i-1}, L_{i-1}; segment 1 has no slots                            leaks nothing
            "causal_shift_g"   G_{i-1}; segment 1 has no slots                                     leaks nothing
            With num_segments instead of segment_len even these depend on the total length.
        use_global, use_local: ablations; False removes these slots from the keys.
        recurrence_len: R, tokens of the previous segment that a segment also sees (0..segment_len).
        single_segment: "on" = slots act although the sequence is one segment; "off" = they do not (the published
            inference rule). Judged per document when packed, per row with cut="token".
        empty: a segment without tokens: "skip" = it has no slots, is left out of G and is passed over by "previous
            segment"; "zero" / "uniform" = its slots are what the published Flash / Multi constructors give.
        cut: "index" = segments count columns, padding included (published); "token" = they count a row's own tokens,
            so a row of a padded batch equals the row alone. None = by context: "token" with decode="segment" and in
            models changed by :func:`apply_hici`, else "index". ``config.cut`` reads as that value. dataclasses.replace,
            copies, to_dict (None there) and saved files keep that none was given, and such a configuration differs
            from one that was given the same value, because apply_hici treats them differently.
        decode: tokens after the prefill: "full" = full attention over all cached tokens, no slots (published);
            "slots" = the same, with G and all local slots of the prompt kept in the cache; "segment" = the training
            semantics continued. "segment" needs segment_len and a leak-free mode.

    Raises:
        TypeError, ValueError: naming the field, its value and what was expected.
    """

    num_local_slots: int = 8
    global_slots: int = 4
    num_heads: int = 8
    bottleneck_dim: int | None = 512
    compress_dim: int | None = None
    integrator_heads: int | None = None
    shared_compress_dim: int | None = 128
    num_segments: int = 4
    segment_len: int | None = None
    context_mode: str = "causal_shift"
    use_global: bool = True
    use_local: bool = True
    recurrence_len: int = 0
    single_segment: str = "on"
    empty: str = "skip"
    cut: str | None = None
    decode: str = "full"

    def __post_init__(self) -> None:
        for name in ("num_local_slots", "global_slots", "num_heads", "num_segments"):
            _checks.integer(name, getattr(self, name), 1)
        for name in ("bottleneck_dim", "compress_dim", "integrator_heads", "shared_compress_dim", "segment_len"):
            if getattr(self, name) is not None:
                _checks.integer(name, getattr(self, name), 1)
        _checks.integer("recurrence_len", self.recurrence_len, 0)
        _checks.boolean("use_global", self.use_global)
        _checks.boolean("use_local", self.use_local)
        _checks.choice("context_mode", self.context_mode, CONTEXT_MODES)
        _checks.choice("single_segment", self.single_segment, ("on", "off"))
        _checks.choice("empty", self.empty, ("skip", "zero", "uniform"))
        _checks.choice("decode", self.decode, ("full", "segment", "slots"))
        if self.cut is None or isinstance(self.cut, _ByContext):
            object.__setattr__(self, "cut", _ByContext("token" if self.decode == "segment" else "index"))
        _checks.choice("cut", self.cut, ("index", "token"))
        if self.bottleneck_dim is not None and self.bottleneck_dim % self.num_heads:
            raise ValueError(
                f"bottleneck_dim must be a multiple of num_heads {self.num_heads}, got {self.bottleneck_dim}"
            )
        if self.integrator_width % self.integrator_num_heads:
            raise ValueError(
                f"the integrator's width (compress_dim, or shared_compress_dim if larger) must be a multiple of "
                f"integrator_heads {self.integrator_num_heads}, got {self.integrator_width}"
            )
        if self.segment_len is not None and self.recurrence_len > self.segment_len:
            raise ValueError(
                f"recurrence_len must be at most segment_len {self.segment_len}, got {self.recurrence_len}"
            )
        if self.decode == "segment":
            if self.segment_len is None:
                raise ValueError(
                    "segment_len must be given with decode='segment': with num_segments the cuts move as the text grows"
                )
            if self.context_mode not in LEAK_FREE_MODES:
                raise ValueError(
                    f"context_mode must be one of {', '.join(map(repr, LEAK_FREE_MODES))} with decode='segment', got "
                    f"{self.context_mode!r}: its slots need tokens that have not been decoded yet"
                )

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, HiCIConfig) or type(self) is not type(other):
            return NotImplemented
        return vars(self) == vars(other) and type(self.cut) is type(other.cut)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.to_dict().items())})"

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON types; ``cut`` is None where none was given."""
        return super().to_dict() | ({"cut": None} if isinstance(self.cut, _ByContext) else {})

    def with_default_cut(self, cut: str | None = None) -> HiCIConfig:
        """This configuration, with ``cut`` (None = the one it reads as) stated where its constructor was given none."""
        if not isinstance(self.cut, _ByContext):
            return self
        # str: what another configuration reads as may itself be a default
        return dataclasses.replace(self, cut=str(self.cut if cut is None else cut))

    @property
    def integrator_dim(self) -> int:
        """compress_dim with its default filled in."""
        if self.compress_dim is not None:
            return self.compress_dim
        return 512 if self.bottleneck_dim is None else self.bottleneck_dim

    @property
    def integrator_width(self) -> int:
        """Attention width of the integrator: shared_compress_dim where that is at least compress_dim."""
        return max(self.integrator_dim, self.shared_compress_dim or 0)

    @property
    def integrator_num_heads(self) -> int:
        """integrator_heads with its default filled in."""
        return self.num_heads if self.integrator_heads is None else self.integrator_heads

    def resolve_segment_len(self, length: int) -> int:
        """Tokens per segment of a sequence of ``length`` tokens (at least 1)."""
        if self.segment_len is not None:
            return self.segment_len
        return max(1, -(-length // self.num_segments))


#: Tokens of a chunk and chunks of a super-chunk: what is laid out by whole chunks then stays addressable.
LARGEST_CHUNK = 1 << 20


@dataclass(frozen=True)
class HGAConfig(_Config):
    """Budgets and rules of routed attention. All budgets are per query.

    Args:
        chunk_size: C, tokens per chunk, at most 1,048,576.
        group_size: tokens per group; divides chunk_size. M = chunk_size / group_size groups a chunk.
        keep_first: F, chunks at the start that every query sees (sinks).
        keep_last: W, closed chunks before the query's own that it sees (local window).
        topk_chunks: Kc, chunks of the pool between sinks and window that a query picks.
        topk_groups: Kg, groups it opens among the Kc * M groups of its chunks.
        routing: "strict" = each query picks for itself, nothing leaks; "prefix" = strict with every score replaced by
            its maximum over the queries since the start of the chunk, nothing leaks; "block" = the authors' rule:
            blocks of route_block queries share one capacity, so a result depends on later queries of its block.
        route_block: queries per block of routing="block"; blocks are also cut at chunk ends.
        super_chunk: 0 = every chunk of the pool is scored. X > 0 (at most 1,048,576): X consecutive chunks form a
            super-chunk, whose key is the mean of theirs; a query scores the super-chunks that lie wholly in its pool
            and then only the chunks of the topk_supers highest of them, and those in none. What survives is scored
            exactly; a chunk may be lost. For histories of very many chunks; routing="strict" only.
        topk_supers: super-chunks whose chunks are scored.
        share: "query" = each query head picks; "kv" = the maximum over the heads of a kv group picks for all of them.

    Raises:
        TypeError, ValueError: naming the field, its value and what was expected.
    """

    chunk_size: int = 64
    group_size: int = 16
    keep_first: int = 2
    keep_last: int = 8
    topk_chunks: int = 16
    topk_groups: int = 32
    routing: str = "strict"
    route_block: int = 64
    share: str = "query"
    super_chunk: int = 0
    topk_supers: int = 32

    def __post_init__(self) -> None:
        for name in ("chunk_size", "group_size"):
            _checks.integer(name, getattr(self, name), 1, LARGEST_CHUNK)
        _checks.integer("route_block", self.route_block, 1)
        _checks.integer("super_chunk", self.super_chunk, 0, LARGEST_CHUNK)
        for name in ("keep_first", "keep_last", "topk_chunks", "topk_groups", "topk_supers"):
            _checks.integer(name, getattr(self, name), 0)
        if self.chunk_size % self.group_size:
            raise ValueError(f"group_size must divide chunk_size {self.chunk_size}, got {self.group_size}")
        _checks.choice("routing", self.routing, ("strict", "block", "prefix"))
        _checks.choice("share", self.share, ("query", "kv"))
        if self.super_chunk and self.routing != "strict":
            raise ValueError(f"super_chunk must be 0 with routing={self.routing!r}, got {self.super_chunk}")

    @property
    def groups_per_chunk(self) -> int:
        """M = chunk_size / group_size."""
        return self.chunk_size // self.group_size
