"""model.attend again, as fused kernels in Triton, forward and backward, for a GPU.

The explicit form writes scores and weights (B, H, T, P+S) to memory and copies the prefix into
every row of the batch. Here a program, a group of threads on the GPU, keeps one tile of queries on
the chip and walks over the keys: first the prefix, read where it lies, then the text. The softmax
is taken on the way ("online": Milakov and Gimelshein 2018); nothing of size T x (P+S) is written.
The backward pass computes the weights again instead of storing them (Dao et al. 2022). train.py and
sample.py hand `attend` to the model for `--attention fused`. Not here: the meaning (model.attend),
a fall-back: where this cannot run, it says so.

Under TRITON_INTERPRET=1, set before triton is imported, the kernels run on a CPU as slow ordinary
Python: put a breakpoint in one and look. Letters as in model.py; K = P + S; j a key, t a query.
"""
import math

import torch
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ValueError("got fused attention, which is written in Triton, and the package triton is "
                     "not installed; `pip install triton`, or use --attention explicit") from error

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# What changes from batch to batch. Left alone, Triton compiles anew for 1 and for multiples of 16.
CHANGING = ["B", "T", "S", "P", "K", "N", "first", "share", "real_b"]
# A GPU has an instruction for 2^x, not for e^x. So scores come multiplied by log2(e), and e^s is
# 2^s: `scale` is log2(e) / sqrt(D), and 1 / sqrt(D) is scale * LN2.
LN2 = tl.constexpr(math.log(2))
# A shared prefix's gradient is spread over so many programs: two for each of the 132 processors of
# an H200. A constant: the same sums in the same order on every GPU.
PROGRAMS = 256


# ---- what the kernels share; Triton writes these functions into them

@triton.jit
def tile(x, stride, row, end, D: tl.constexpr, BLOCK_D: tl.constexpr, DOT: tl.constexpr):
    """The rows `row` of a matrix x (end, D): (rows, BLOCK_D), zeros where there is nothing."""
    d = tl.arange(0, BLOCK_D)                           # a power of 2, which D need not be
    inside = (row < end)[:, None] & (d < D)[None, :]
    return tl.load(x + row[:, None] * stride + d[None, :], mask=inside, other=0).to(DOT)


@triton.jit
def put(x, stride, row, end, values, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write values (rows, BLOCK_D) to the rows `row` of x (end, D), rounded to its dtype."""
    d = tl.arange(0, BLOCK_D)
    inside = (row < end)[:, None] & (d < D)[None, :]
    tl.store(x + row[:, None] * stride + d[None, :], values.to(x.dtype.element_ty), mask=inside)


@triton.jit
def last_key(t, T, K, CAUSAL: tl.constexpr):
    """The last key that each query t may look at: the lower right corner, see model.may_look.

    Queries behind the end, t >= T, need no care: they are zeros, and so are their gradients.
    """
    return K - T + t if CAUSAL else K + 0 * t


@triton.jit
def scores(q, k, real, j, end, last, scale):
    """One tile of scores, -inf where a query may not look: (BLOCK_T, keys) in fp32.

    j: the numbers of these keys among all K; those from `end` on are not there.
    """
    # "ieee": for fp32 the tensor cores would round the operands to 10 bits (tf32).
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    here = tl.load(real + j, mask=j < end, other=0) != 0
    return tl.where(here[None, :] & (j[None, :] <= last[:, None]), s, float("-inf"))


# ---- forward

@triton.jit
def look(q, k, v, real, j, end, last, scale, top, total, y):
    """The online softmax: what the queries know after one more tile of keys and values.

    softmax(s) v = sum_j 2^s_j v_j / sum_j 2^s_j. Both sums can be taken tile by tile. But 2^s
    overflows, so s - top is used, top being the largest score so far: it cancels in the ratio.
    When a later tile brings a larger one, the sums so far were taken with too small a top; times
    2^(old top - new top) they are what they would have been with the new one.
    """
    s = scores(q, k, real, j, end, last, scale)                 # (BLOCK_T, keys)
    higher = tl.maximum(top, tl.max(s, 1))                      # (BLOCK_T,)
    shrink = tl.exp2(top - higher)                              # (BLOCK_T,)
    e = tl.exp2(s - higher[:, None])                            # (BLOCK_T, keys) hidden: 2^-inf = 0
    total = total * shrink + tl.sum(e, 1)                       # (BLOCK_T,)
    y = y * shrink[:, None] + tl.dot(e.to(v.dtype), v, input_precision="ieee")
    return higher, total, y


@triton.jit(do_not_specialize=CHANGING)
def forward_kernel(q, k, v, pk, pv, real, out, lse, scale, H, T, S, P, q_b, q_h, q_t, k_b, k_h, k_s,
                   p_b, p_h, p_s, real_b, CAUSAL: tl.constexpr, D: tl.constexpr,
                   BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr,
                   BLOCK_S: tl.constexpr, DOT: tl.constexpr):
    """The program (i, h, b) answers the i-th tile of queries of head h in row b.

    q_b is q's distance in memory from one b to the next, and so on; p_b = 0 is a prefix that all
    rows share: each program reads the same one, which stays in the GPU's cache.
    """
    start, h, b = tl.program_id(0) * BLOCK_T, tl.program_id(1), tl.program_id(2).to(tl.int64)
    t, K = start + tl.arange(0, BLOCK_T), P + S
    last, real = last_key(t, T, K, CAUSAL), real + b * real_b
    pk, pv = pk + b * p_b + h * p_h, pv + b * p_b + h * p_h
    k, v = k + b * k_b + h * k_h - P * k_s, v + b * k_b + h * k_h - P * k_s     # key P is k's row 0
    q = tile(q + b * q_b + h * q_h, q_t, t, T, D, BLOCK_D, DOT)         # (BLOCK_T, BLOCK_D)
    # Finite, not -inf: where nothing is seen, s - top must be -inf and not -inf + inf = NaN.
    top = tl.full((BLOCK_T,), -1e30, tl.float32)
    total = tl.zeros((BLOCK_T,), tl.float32)
    y = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for first in range(0, P, BLOCK_P):
        j = first + tl.arange(0, BLOCK_P)
        top, total, y = look(q, tile(pk, p_s, j, P, D, BLOCK_D, DOT),
                             tile(pv, p_s, j, P, D, BLOCK_D, DOT),
                             real, j, P, last, scale, top, total, y)
    end = tl.minimum(K, K - T + start + BLOCK_T) if CAUSAL else K       # none of these looks beyond
    for first in range(P, end, BLOCK_S):
        j = first + tl.arange(0, BLOCK_S)
        top, total, y = look(q, tile(k, k_s, j, K, D, BLOCK_D, DOT),
                             tile(v, k_s, j, K, D, BLOCK_D, DOT),
                             real, j, K, last, scale, top, total, y)
    total = tl.where(total == 0, 1, total)                      # nothing was seen: 0 / 1
    put(out + (b * T * H + h) * D, H * D, t, T, y / total[:, None], D, BLOCK_D)
    # All that the backward pass needs of the softmax: weight = 2^s / sum 2^s = 2^(s - lse).
    tl.store(lse + (b * H + h) * T + t, top + tl.log2(total), mask=t < T)


# ---- backward. With w = softmax(s), y = w v and g the gradient of y:
#   dv = w^T g;   dw = g v^T;   ds = w * (dw - delta), delta = sum_j w_j dw_j = y . g, one number a
#   query;   dq = ds k / sqrt(D);   dk = ds^T q / sqrt(D).
# dq is a sum over keys and dk, dv are sums over queries, so there is a kernel for each: a program
# owns what it sums up, nothing is added by two programs at once, and two runs agree bit for bit.

@triton.jit
def pull(q, k, v, g, delta, lse, real, j, end, last, scale):
    """The weights of one tile again, and the gradient of its scores: (BLOCK_T, keys) each."""
    w = tl.exp2(scores(q, k, real, j, end, last, scale) - lse[:, None])
    return w, w * (tl.dot(g, tl.trans(v), input_precision="ieee") - delta[:, None])


@triton.jit
def answered(out, grad, lse, b, h, t, H, T, D: tl.constexpr, BLOCK_D: tl.constexpr,
             DOT: tl.constexpr):
    """What the forward pass left about the queries t: g (BLOCK_T, BLOCK_D), delta and lse."""
    y = tile(out + (b * T * H + h) * D, H * D, t, T, D, BLOCK_D, tl.float32)
    g = tile(grad + (b * T * H + h) * D, H * D, t, T, D, BLOCK_D, DOT)
    # Cheaper to compute again in each kernel than to store in one and wait for it in another.
    delta = tl.sum(y * g.to(tl.float32), 1)
    return g, delta, tl.load(lse + (b * H + h) * T + t, mask=t < T, other=0)


@triton.jit(do_not_specialize=CHANGING)
def queries_kernel(q, k, v, pk, pv, real, out, lse, grad, dq, scale, H, T, S, P,
                   q_b, q_h, q_t, k_b, k_h, k_s, p_b, p_h, p_s, real_b, CAUSAL: tl.constexpr,
                   D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
                   BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr, DOT: tl.constexpr):
    """dq: the walk of `forward_kernel` once more, with the same programs."""
    start, h, b = tl.program_id(0) * BLOCK_T, tl.program_id(1), tl.program_id(2).to(tl.int64)
    t, K = start + tl.arange(0, BLOCK_T), P + S
    last, real = last_key(t, T, K, CAUSAL), real + b * real_b
    pk, pv = pk + b * p_b + h * p_h, pv + b * p_b + h * p_h
    k, v = k + b * k_b + h * k_h - P * k_s, v + b * k_b + h * k_h - P * k_s
    q = tile(q + b * q_b + h * q_h, q_t, t, T, D, BLOCK_D, DOT)
    g, delta, lse = answered(out, grad, lse, b, h, t, H, T, D, BLOCK_D, DOT)
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for first in range(0, P, BLOCK_P):
        j = first + tl.arange(0, BLOCK_P)
        keys = tile(pk, p_s, j, P, D, BLOCK_D, DOT)
        _, ds = pull(q, keys, tile(pv, p_s, j, P, D, BLOCK_D, DOT), g, delta, lse, real, j, P,
                     last, scale)
        total += tl.dot(ds.to(DOT), keys, input_precision="ieee")
    end = tl.minimum(K, K - T + start + BLOCK_T) if CAUSAL else K
    for first in range(P, end, BLOCK_S):
        j = first + tl.arange(0, BLOCK_S)
        keys = tile(k, k_s, j, K, D, BLOCK_D, DOT)
        _, ds = pull(q, keys, tile(v, k_s, j, K, D, BLOCK_D, DOT), g, delta, lse, real, j, K,
                     last, scale)
        total += tl.dot(ds.to(DOT), keys, input_precision="ieee")
    put(dq + (b * T * H + h) * D, H * D, t, T, total * (scale * LN2), D, BLOCK_D)


@triton.jit(do_not_specialize=CHANGING)
def keys_kernel(q, k, v, real, out, lse, grad, dk, dv, scale, B, H, T, K, N, first, share,
                q_b, q_h, q_t, k_b, k_h, k_s, real_b, CAUSAL: tl.constexpr, D: tl.constexpr,
                BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
                DOT: tl.constexpr):
    """dk and dv of N keys, the keys first, first + 1, ... of all K: the text's, or a prefix's.

    The program (i, h, group) owns the i-th tile of them, and sums over all queries of `share` rows
    of the batch: 1 where every row has keys of its own, more for a prefix that the rows share.
    """
    start, h, group = tl.program_id(0) * BLOCK_N, tl.program_id(1), tl.program_id(2).to(tl.int64)
    row, n = group * share, start + tl.arange(0, BLOCK_N)
    k = tile(k + row * k_b + h * k_h, k_s, n, N, D, BLOCK_D, DOT)       # (BLOCK_N, BLOCK_D)
    v = tile(v + row * k_b + h * k_h, k_s, n, N, D, BLOCK_D, DOT)       # (BLOCK_N, BLOCK_D)
    dk_sum = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv_sum = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    begin = 0
    if CAUSAL:                                          # the first query that sees any of these
        begin = tl.maximum(first + start - (K - T), 0) // BLOCK_T * BLOCK_T
    for i in range(0, tl.minimum(share, B - row)):
        b = row + i
        for t0 in range(begin, T, BLOCK_T):
            t = t0 + tl.arange(0, BLOCK_T)
            queries = tile(q + b * q_b + h * q_h, q_t, t, T, D, BLOCK_D, DOT)
            g, delta, log = answered(out, grad, lse, b, h, t, H, T, D, BLOCK_D, DOT)
            w, ds = pull(queries, k, v, g, delta, log, real + b * real_b, first + n, first + N,
                         last_key(t, T, K, CAUSAL), scale)
            dv_sum += tl.dot(tl.trans(w.to(DOT)), g, input_precision="ieee")
            dk_sum += tl.dot(tl.trans(ds.to(DOT)), queries, input_precision="ieee")
    put(dk + (group * N * H + h) * D, H * D, n, N, dk_sum * (scale * LN2), D, BLOCK_D)
    put(dv + (group * N * H + h) * D, H * D, n, N, dv_sum, D, BLOCK_D)


# ---- the kernels as a function that autograd knows

def power_of_2(n):
    """The least that is not below n; a product of tiles wants at least 16."""
    return max(16, 1 << (n - 1).bit_length())


def block(x, length):
    """How many rows of x make a tile: no more than there are, or than a program holds."""
    bytes_of_row = x.size(3) * x.element_size()
    most = 64 if bytes_of_row <= 128 else 32 if bytes_of_row <= 256 else 16     # found by compiling
    return min(most, power_of_2(length))


def tiles(q, P, S, causal):
    """What the two kernels that own queries are compiled for; another value, another build."""
    (T, D), dot = q.shape[2:], DTYPES[q.dtype]
    if triton.knobs.runtime.interpret:
        dot = tl.float32            # the interpreter knows bf16 only as bits, and multiplies those
    return dict(CAUSAL=causal, D=D, BLOCK_D=power_of_2(D), DOT=dot,
                BLOCK_T=block(q, T), BLOCK_P=block(q, P), BLOCK_S=block(q, S))


def tiles_of_keys(q, N, causal):
    """The same for the kernel that owns keys. Two sums, dk and dv, stay on the chip there.

    So: half as many queries at a time, twice the threads (8 warps of 32), and no loads ahead of
    time (1 stage), whose buffers would not fit either.
    """
    sizes = tiles(q, N, N, causal)
    sizes |= dict(BLOCK_T=max(16, sizes["BLOCK_T"] // 2), BLOCK_N=sizes.pop("BLOCK_P"))
    del sizes["BLOCK_S"]
    return sizes | dict(num_warps=8, num_stages=1)


def steps(x):
    """The distances in memory from one b, h and row of x (1 or B, H, rows, D) to the next."""
    return 0 if x.size(0) == 1 else x.stride(0), x.stride(1), x.stride(2)


def alike(k, v):
    """k and v, laid out alike with the D numbers of a head side by side; copied only if not."""
    same = k.stride() == v.stride() and k.stride(3) == 1
    return (k, v) if same else (k.contiguous(), v.contiguous())


def key_gradients(ctx, k, v, first, g):
    """dk and dv, (1 or B, H, N, D) each, of N keys: the keys first, first + 1, ... of all K."""
    q, _, _, _, _, real, out, lse = ctx.saved_tensors
    (B, H, T, D), (rows, _, N, _), (scale, _, _, S, P) = q.shape, k.shape, ctx.numbers[:5]
    sizes, share, dtype = tiles_of_keys(q, N, ctx.sizes["CAUSAL"]), 1, k.dtype
    count = math.ceil(N / sizes["BLOCK_N"])                 # tiles of keys
    if rows < B:        # shared by the batch: sums over some rows in fp32, then the sum of these
        share, dtype = math.ceil(B / max(1, PROGRAMS // max(1, H * count))), torch.float32
    both = q.new_empty(2, math.ceil(B / share), N, H, D, dtype=dtype)      # (2, groups, N, H, D)
    if N:
        keys_kernel[(count, H, both.size(1))](
            q, k, v, real, out, lse, g, both[0], both[1], scale, B, H, T, P + S, N, first, share,
            *steps(q), *steps(k), ctx.numbers[-1], **sizes)
    if rows < B:
        both = both.sum(1, keepdim=True).to(k.dtype)                        # (2, 1, N, H, D)
    return both.transpose(2, 3)                                             # (2, 1 or B, H, N, D)


class Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, pk, pv, real, causal):
        (B, H, T, D), S, P = q.shape, k.size(2), pk.size(2)
        (q, _), (k, v), (pk, pv) = alike(q, q), alike(k, v), alike(pk, pv)
        # Lying as the next linear layer wants it: transposing it back there is no copy.
        out = q.new_empty(B, T, H, D)                                           # (B, T, H, D)
        lse = q.new_empty(B, H, T, dtype=torch.float32)                         # (B, H, T)
        ctx.numbers = (math.log2(math.e) / math.sqrt(D), H, T, S, P, *steps(q), *steps(k),
                       *steps(pk), 0 if len(real) == 1 else real.stride(0))
        ctx.sizes = tiles(q, P, S, causal)
        ctx.grid = (math.ceil(T / ctx.sizes["BLOCK_T"]), H, B)
        forward_kernel[ctx.grid](q, k, v, pk, pv, real, out, lse, *ctx.numbers, **ctx.sizes)
        ctx.save_for_backward(q, k, v, pk, pv, real, out, lse)
        return out.transpose(1, 2)                                              # (B, H, T, D)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        q, k, v, pk, pv, real, out, lse = ctx.saved_tensors
        need, g = ctx.needs_input_grad, g.transpose(1, 2).contiguous()          # (B, T, H, D)
        dq = dk = dv = dpk = dpv = None
        if need[0]:
            dq = torch.empty_like(out)                                          # (B, T, H, D)
            queries_kernel[ctx.grid](q, k, v, pk, pv, real, out, lse, g, dq, *ctx.numbers,
                                     **ctx.sizes)
            dq = dq.transpose(1, 2)                                             # (B, H, T, D)
        if need[1] or need[2]:
            dk, dv = key_gradients(ctx, k, v, pk.size(2), g)
        if need[3] or need[4]:
            dpk, dpv = key_gradients(ctx, pk, pv, 0, g)
        return dq, dk, dv, dpk, dpv, None, None


def check(device, dtype):
    """Raises ValueError, with the reason and what to use, where the kernels cannot run."""
    device, why = torch.device(device), None
    if dtype not in DTYPES:
        why = f"in {dtype}; expected fp32, bf16 or fp16; use another --dtype"
    elif device.type != "cuda" and not triton.knobs.runtime.interpret:
        why = (f"on the device {device}; expected a CUDA GPU, for which Triton compiles; to step "
               "through the kernels slowly on a CPU set TRITON_INTERPRET=1")
    elif device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        why = (f"on {torch.cuda.get_device_name(device)}; expected a GPU of compute capability 8.0 "
               "or newer, for which Triton compiles")
    if why:
        raise ValueError(f"got fused attention {why}, or use --attention explicit")


def attend(q, k, v, pk, pv, real, causal):
    """The same function as model.attend; shapes and meaning there. fp32, bf16 or fp16, D <= 256."""
    check(q.device, q.dtype)
    (B, H, _, D), S, P = q.shape, k.size(2), pk.size(2)
    if D > 256:
        raise ValueError(f"got fused attention for heads of size {D}; expected at most 256, tiles "
                         "of which fit on the chip; use --attention explicit")
    # A kernel does not notice a wrong shape or type: it reads whatever lies there.
    assert k.shape == v.shape == (B, H, S, D) and real.shape == (len(real), P + S), "a wrong shape"
    assert pk.shape == pv.shape == (len(pk), H, P, D), "pk and pv do not fit q"
    assert {len(real), len(pk)} <= {1, B}, "real and the prefix have one row, or B"
    assert {x.dtype for x in (k, v, pk, pv)} == {q.dtype}, "q, k, v and the prefix differ in dtype"
    real = (real if real.stride(1) == 1 else real.contiguous()).view(torch.uint8)   # (1 or B, P+S)
    with torch.cuda.device_of(q):       # Triton starts a kernel on the current GPU, whatever q's is
        return Attend.apply(q, k, v, pk, pv, real, causal)
