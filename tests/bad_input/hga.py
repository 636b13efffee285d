"""Wrong calls of the HGA half: (id, call, exception, what the message must say)."""

import copy
import tempfile
from pathlib import Path

import torch

from hici_kernels import HGAConfig, Rope
from hici_kernels.kv.store import KVStore
from hici_kernels.nn.hga_attention import HGAAttention
from hici_kernels.ops.hga_attention.api import hga_attention
from hici_kernels.ops.hga_route.api import hga_route
from hici_kernels.ops.hga_summaries.api import hga_summaries

CONFIG = HGAConfig(chunk_size=4, group_size=2)
ROPE = Rope.from_theta(1e4, 8)
Q, K = torch.zeros(2, 9, 4, 8), torch.zeros(2, 9, 2, 8)
CHUNKS, GROUPS = torch.zeros(2, 2, 2, 8), torch.zeros(2, 2, 2, 2, 8)
HIDDEN = torch.zeros(2, 9, 8)


def attend(q=Q, k=K, v=K, config=CONFIG, rope=ROPE, **options):
    return lambda: hga_attention(q, k, v, config, rope=rope, **options)


def configured(**fields):
    return lambda: HGAConfig(**fields)


def summarise(k=K, rope=ROPE, **options):
    return lambda: hga_summaries(k, rope=rope, **options)


def route(q=Q, chunk_keys=CHUNKS, group_keys=GROUPS, config=CONFIG, **options):
    return lambda: hga_route(q, chunk_keys, group_keys, config, **options)


def make(config=CONFIG, **changes):
    fields = {"rope": ROPE, "layers": 2, "kv_heads": 2, "head_dim": 8, "batch": 2}
    return KVStore(config, **{**fields, "dtype": torch.float32, "device": "cpu", **changes})


def store(**changes):
    return lambda: make(**changes)


def append(layer=0, q=Q, k=K, v=K, **options):
    return lambda: make().attend(layer, q, k, v, **options)


def after(act, **changes):
    """``act`` on a store of 9 tokens a row."""

    def call():
        held = make(**changes)
        for layer in range(2):
            held.attend(layer, Q, K, K)
        act(held)

    return call


def build(config=CONFIG, **changes):
    fields = {"hidden_size": 8, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "rope": ROPE, **changes}
    return HGAAttention(config=config, **fields)


def forward(hidden=HIDDEN, layer=None, **options):
    return lambda: build(**(layer or {}))(hidden, **options)


def closed():
    held = make()
    held.close()
    held.attend(0, Q, K, K)


# no window: chunks become records at once
SHORT = {"config": HGAConfig(chunk_size=4, group_size=2, keep_first=0, keep_last=0)}


def nested(held):
    with held.segment(), held.segment():
        pass


def rewound(held):
    with held.segment():
        held.rewind(1)


def in_segment(act):
    def inside(held):
        with held.segment():
            act(held)

    return after(inside)


def once_closed(act):
    def call():
        held = make()
        held.close()
        act(held)

    return call


def reopened(**options):
    def load(held):
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory, "saved")
            held.save(path)
            KVStore.load(path, device="cpu", **options)

    return after(load)


def enter(held):
    with held:
        pass


def enter_segment(held):
    with held.segment():
        pass


def other_heads(held):
    held.attend(0, Q[:, :, :2], K, K)


CASES = [
    ("HGAConfig: chunk_size 0", configured(chunk_size=0), ValueError, "chunk_size must be at least 1"),
    ("HGAConfig: chunk_size a float", configured(chunk_size=64.0), TypeError, "chunk_size must be an int"),
    ("HGAConfig: chunk_size beyond memory", configured(chunk_size=2**40), ValueError, "chunk_size must be at most"),
    ("HGAConfig: group_size that does not divide", configured(group_size=7), ValueError, "group_size must divide"),
    ("HGAConfig: keep_first negative", configured(keep_first=-1), ValueError, "keep_first must be at least 0"),
    ("HGAConfig: topk_groups a bool", configured(topk_groups=True), TypeError, "topk_groups must be an int"),
    ("HGAConfig: topk_chunks beyond int64", configured(topk_chunks=2**63), ValueError, "topk_chunks must be at most"),
    ("HGAConfig: unknown routing", configured(routing="fast"), ValueError, "routing must be one of"),
    ("HGAConfig: route_block 0", configured(route_block=0), ValueError, "route_block must be at least 1"),
    ("HGAConfig: unknown share", configured(share="all"), ValueError, "share must be one of"),
    ("HGAConfig: super_chunk beyond memory", configured(super_chunk=2**40), ValueError, "super_chunk must be at most"),
    (
        "HGAConfig: super_chunk with another routing",
        configured(super_chunk=4, routing="block"),
        ValueError,
        "super_chunk must be 0 with routing='block'",
    ),
    ("hga_attention: q of 3 dimensions", attend(q=Q[0]), ValueError, r"q must be \[B, T, Hq, D\]"),
    ("hga_attention: q a list", attend(q=[1.0]), TypeError, "q must be a tensor"),
    ("hga_attention: k of another head_dim", attend(k=K[..., :4]), ValueError, "k must be"),
    ("hga_attention: v shorter than k", attend(v=K[:, :5]), ValueError, "v must be"),
    ("hga_attention: v of another dtype", attend(v=K.double()), TypeError, "v has dtype"),
    ("hga_attention: integer q", attend(q=Q.long(), k=K.long(), v=K.long()), TypeError, "q must be float32"),
    ("hga_attention: more queries than keys", attend(k=K[:, :5], v=K[:, :5]), ValueError, "q must have at most"),
    ("hga_attention: heads that do not divide", attend(q=Q[:, :, :3]), ValueError, "q has 3 heads"),
    (
        "hga_attention: strided last dimension",
        attend(q=torch.zeros(2, 9, 4, 16)[..., ::2]),
        ValueError,
        "q must be contiguous in its last dimension",
    ),
    ("hga_attention: config a dict", attend(config={}), TypeError, "config must be an HGAConfig"),
    ("hga_attention: rope a tensor", attend(rope=torch.ones(4)), TypeError, "rope must be a Rope"),
    ("hga_attention: rope wider than the head", attend(rope=Rope.from_theta(1e4, 16)), ValueError, "rope.rotary_dim"),
    ("hga_attention: float positions", attend(positions=torch.zeros(2, 9)), TypeError, "positions must be integer"),
    (
        "hga_attention: positions of one row",
        attend(positions=torch.zeros(9, dtype=torch.int64)),
        ValueError,
        "positions must be",
    ),
    ("hga_attention: mask of another length", attend(attention_mask=torch.ones(2, 8)), ValueError, "attention_mask"),
    ("hga_attention: scale nan", attend(scale=float("nan")), ValueError, "scale must be finite"),
    ("hga_attention: return_lse an int", attend(return_lse=1), TypeError, "return_lse must be a bool"),
    ("hga_attention: return_routes a str", attend(return_routes="yes"), TypeError, "return_routes must be a bool"),
    ("hga_attention: unknown impl", attend(impl="fast"), ValueError, "impl must be None or one of"),
    ("hga_attention: impl that cannot serve", attend(impl="flash_attn"), ValueError, "impl='flash_attn' cannot serve"),
    ("hga_summaries: k of 3 dimensions", summarise(k=K[0]), ValueError, "k must be"),
    ("hga_summaries: integer k", summarise(k=K.int()), TypeError, "k must be float32"),
    ("hga_summaries: chunk_size 0", summarise(chunk_size=0), ValueError, "chunk_size must be at least 1"),
    ("hga_summaries: chunk_size beyond memory", summarise(chunk_size=2**40), ValueError, "chunk_size must be at most"),
    ("hga_summaries: group_size that does not divide", summarise(group_size=7), ValueError, "group_size must divide"),
    ("hga_summaries: chunk_size a float", summarise(chunk_size=4.0), TypeError, "chunk_size must be an int"),
    (
        "hga_summaries: positions of another length",
        summarise(positions=torch.arange(8)),
        ValueError,
        "positions must be",
    ),
    ("hga_summaries: no rope", summarise(rope=None), TypeError, "rope must be a Rope"),
    ("hga_route: group_keys of another M", route(group_keys=GROUPS[:, :, :1]), ValueError, "group_keys must be"),
    ("hga_route: chunk_keys of another batch", route(chunk_keys=CHUNKS[:1]), ValueError, "chunk_keys must be"),
    ("hga_route: group_keys of another dtype", route(group_keys=GROUPS.double()), TypeError, "group_keys has dtype"),
    ("hga_route: config None", route(config=None), TypeError, "config must be an HGAConfig"),
    (
        "hga_route: positions for other queries",
        route(positions=torch.zeros(2, 8, dtype=torch.int64)),
        ValueError,
        "positions must be",
    ),
    ("KVStore: no layers", store(layers=0), ValueError, "layers must be at least 1"),
    ("KVStore: batch a float", store(batch=1.5), TypeError, "batch must be an int"),
    ("KVStore: integer dtype", store(dtype=torch.int32), TypeError, "dtype must be float32"),
    ("KVStore: device a number", store(device=0), TypeError, "device must be"),
    ("KVStore: unknown tier", store(tier="tape"), ValueError, "tier must be one of"),
    ("KVStore: path without a disk", store(path="x"), ValueError, "path must be None"),
    (
        "KVStore: host_bytes without a host",
        store(host_bytes=1),
        ValueError,
        "host_bytes must be None with tier='device'",
    ),
    (
        "KVStore: bank_pages on the device",
        store(bank_pages=1),
        ValueError,
        "bank_pages must be None with tier='device'",
    ),
    ("KVStore: disk without a path", store(tier="disk"), ValueError, "path must be given with tier='disk'"),
    ("KVStore: path a number", store(tier="disk", path=3), TypeError, "path must be a str or a path"),
    ("KVStore: path that is not there", store(tier="disk", path="absent"), ValueError, "path must be a directory that"),
    ("KVStore: negative host_bytes", store(tier="host", host_bytes=-1), ValueError, "host_bytes must be at least 0"),
    (
        "KVStore: host_bytes below a page",
        store(tier="disk", path=tempfile.gettempdir(), host_bytes=100),
        ValueError,
        "host_bytes must hold at least one page",
    ),
    ("KVStore: negative bank_pages", store(tier="host", bank_pages=-1), ValueError, "bank_pages must be at least 0"),
    ("KVStore: cold_dtype of 16 bits", store(cold_dtype=torch.float16), ValueError, "cold_dtype must be None or torch"),
    ("KVStore: unknown fetch", store(fetch="push", tier="host"), ValueError, "fetch must be one of 'copy', 'gather'"),
    ("KVStore: fetch without a bank", store(fetch="gather"), ValueError, "fetch must be 'copy' with tier='device'"),
    ("KVStore: no queue", store(queue_depth=0), ValueError, "queue_depth must be at least 1"),
    ("KVStore: unknown io", store(io="mmap"), ValueError, "io must be one of"),
    ("KVStore: direct an int", store(direct=1), TypeError, "direct must be a bool"),
    ("KVStore: prefetch a str", store(prefetch="yes"), TypeError, "prefetch must be a bool"),
    ("KVStore: negative device_bytes", store(device_bytes=-1), ValueError, "device_bytes must be at least 0"),
    ("KVStore: config a str", store(config="default"), TypeError, "config must be an HGAConfig"),
    ("KVStore: rope wider than the head", store(head_dim=4), ValueError, "rope.rotary_dim"),
    ("KVStore.attend: layer out of range", append(layer=2), ValueError, "layer must be at most 1"),
    ("KVStore.attend: layer a bool", append(layer=True), TypeError, "layer must be an int"),
    ("KVStore.attend: another batch", append(q=Q[:1], k=K[:1], v=K[:1]), ValueError, "q has batch 1"),
    ("KVStore.attend: another dtype", append(*(0, Q.double(), K.double(), K.double())), TypeError, "q has dtype"),
    ("KVStore.attend: fewer queries than keys", append(q=Q[:, :3]), ValueError, "k must be"),
    ("KVStore.attend: other kv heads", append(k=K[:, :, :1], v=K[:, :, :1]), ValueError, "k must be"),
    (
        "KVStore.attend: mask over the history",
        append(attention_mask=torch.ones(2, 18)),
        ValueError,
        "attention_mask must be",
    ),
    (
        "KVStore.attend: other heads than before",
        after(other_heads, config=HGAConfig(chunk_size=4, group_size=2, routing="prefix")),
        ValueError,
        "q has 2 heads, expected 4",
    ),
    ("KVStore.attend: over the cap", after(id, device_bytes=100), ValueError, "device_bytes is 100"),
    ("KVStore.attend: closed", closed, ValueError, "this KVStore is closed"),
    ("KVStore.rewind: beyond the history", after(lambda s: s.rewind(10)), ValueError, "length must be at most the 9"),
    ("KVStore.rewind: row out of range", after(lambda s: s.rewind(1, row=2)), ValueError, "row must be at most 1"),
    ("KVStore.reset: row a str", after(lambda s: s.reset("0")), TypeError, "row must be an int"),
    ("KVStore.reorder: row out of range", after(lambda s: s.reorder([0, 2])), ValueError, "rows must be at most 1"),
    ("KVStore.reorder: a float tensor", after(lambda s: s.reorder(torch.zeros(2))), TypeError, "rows must be"),
    (
        "KVStore.attend: over host_bytes",
        after(id, tier="host", host_bytes=100, **SHORT),
        ValueError,
        "host_bytes is 100",
    ),
    ("KVStore.segment: inside a segment", after(nested), ValueError, "inside a segment already"),
    ("KVStore.rewind: inside a segment", after(rewound), ValueError, "inside a segment"),
    ("KVStore.save: path a number", after(lambda s: s.save(3)), TypeError, "path must be a str or a path"),
    ("KVStore.save: no such directory", after(lambda s: s.save("absent/x")), ValueError, "path must be in a directory"),
    ("KVStore.attend: unknown impl", append(impl="fast"), ValueError, "impl must be None or one of"),
    ("KVStore.attend: q a list", append(q=[1.0]), TypeError, "q must be a tensor"),
    (
        "KVStore.attend: on another device",
        append(q=Q.to("meta"), k=K.to("meta"), v=K.to("meta")),
        ValueError,
        "q is on meta, expected cpu",
    ),
    (
        "KVStore.next_columns: layer out of range",
        after(lambda s: s.next_columns(2)),
        ValueError,
        "layer must be at most 1",
    ),
    ("KVStore.rewind: negative length", after(lambda s: s.rewind(-1)), ValueError, "length must be at least 0"),
    ("KVStore.rewind: length a float", after(lambda s: s.rewind(1.0)), TypeError, "length must be an int"),
    ("KVStore.reset: row out of range", after(lambda s: s.reset(2)), ValueError, "row must be at most 1"),
    ("KVStore.reset: inside a segment", in_segment(lambda s: s.reset()), ValueError, "inside a segment"),
    ("KVStore.reorder: inside a segment", in_segment(lambda s: s.reorder([0])), ValueError, "inside a segment"),
    ("KVStore.save: inside a segment", in_segment(lambda s: s.save("x")), ValueError, "inside a segment"),
    ("KVStore.load: another number of heads", reopened(kv_heads=4), ValueError, "kv_heads is that of the saved store"),
    ("KVStore.load: unknown tier", reopened(tier="tape"), ValueError, "tier must be one of"),
    ("KVStore.reset: closed", once_closed(lambda s: s.reset()), ValueError, "this KVStore is closed"),
    ("KVStore.reorder: closed", once_closed(lambda s: s.reorder([0])), ValueError, "this KVStore is closed"),
    ("KVStore.segment: closed", once_closed(enter_segment), ValueError, "this KVStore is closed"),
    ("KVStore.save: closed", once_closed(lambda s: s.save("x")), ValueError, "this KVStore is closed"),
    ("KVStore as a context: closed", once_closed(enter), ValueError, "this KVStore is closed"),
    ("copy.deepcopy of a KVStore: closed", once_closed(copy.deepcopy), ValueError, "this KVStore is closed"),
    ("copy.deepcopy of a KVStore: inside a segment", in_segment(copy.deepcopy), ValueError, "inside a segment"),
    ("copy.copy of a KVStore", after(copy.copy), TypeError, "would share the history"),
    ("HGAAttention: heads that do not divide", lambda: build(num_heads=3), ValueError, "num_heads must be a multiple"),
    ("HGAAttention: config None", lambda: build(config=None), TypeError, "config must be an HGAConfig"),
    ("HGAAttention: negative layer_idx", lambda: build(layer_idx=-1), ValueError, "layer_idx must be at least 0"),
    ("HGAAttention: hidden of another width", forward(HIDDEN[..., :4]), ValueError, "hidden must be"),
    ("HGAAttention: hidden of another dtype", forward(HIDDEN.double()), TypeError, "hidden has dtype"),
    (
        "HGAAttention: cu_seqlens",
        forward(cu_seqlens=torch.tensor([0, 9], dtype=torch.int32)),
        ValueError,
        "cu_seqlens is not supported",
    ),
    ("HGAAttention: cache a dict", forward(cache={}), TypeError, "cache must be a KVStore"),
    ("HGAAttention: cache of another config", forward(cache=make(HGAConfig())), ValueError, "cache was made for"),
    (
        "HGAAttention: cache of another dtype",
        forward(cache=make(dtype=torch.bfloat16)),
        TypeError,
        "cache has dtype torch.bfloat16, expected torch.float32",
    ),
    ("HGAAttention: cache of another batch", forward(cache=make(batch=3)), ValueError, "cache has batch 3"),
    ("HGAAttention: cache of fewer layers", forward(layer={"layer_idx": 2}, cache=make()), ValueError, "cache has 2"),
]
