"""model.attend as fused kernels in Triton, forward and backward, for a GPU: --attention fused.

The explicit form writes scores and weights (B, H, T, P+S) to memory and copies the prefix into
every row of the batch. Here a program, a group of threads on the GPU, keeps one tile of queries on
the chip and walks over the keys, the prefix's and then the text's, each read where it lies. The
softmax is taken on the way ("online": Milakov and Gimelshein 2018); nothing of size T x (P+S) is
written. The backward pass computes the weights again instead of storing them (Dao et al. 2022).
Not here: the definition (model.attend); a fallback: where it cannot run, it is an error.

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

# What changes from batch to batch. Left alone, Triton compiles anew for 1 and for multiples of 16.
CHANGING = ["B", "T", "S", "P", "K", "N", "first", "share", "mask_b"]
# A shared prefix's gradient is spread over so many programs: about two for each of the 132
# multiprocessors of an H200. A constant: the same sums in the same order on every GPU.
PROGRAMS = 256
LOG2E = tl.constexpr(math.log2(math.e))
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


# ---- what the kernels share; Triton writes these functions into them. A tile is some rows of a
# matrix; `at` are the addresses of its numbers, `there` tells which of the rows exist.

@triton.constexpr_function
def power_of_2(n):
    """The least that is not below n: a tile's sides are such, and 16 at least in a product."""
    return max(16, 1 << (n - 1).bit_length())


@triton.jit
def rows(x, i, step, D: tl.constexpr):
    """The addresses of the rows i of a matrix at x: (rows, D), D made a power of 2."""
    return x + i[:, None] * step + tl.arange(0, power_of_2(D))[None, :]


@triton.jit
def joined(p, x, j, P, p_s, x_s, D: tl.constexpr):
    """The same of [p; x], prefix and text. This is the whole concatenation: nothing is moved."""
    return tl.where((j < P)[:, None], rows(p, j, p_s, D), rows(x, j - P, x_s, D))


@triton.jit
def tile(at, there, D: tl.constexpr):
    """The numbers at these addresses, (rows, D); zeros in rows that do not exist."""
    x = tl.load(at, mask=there[:, None] & (tl.arange(0, at.shape[1]) < D)[None, :], other=0)
    return x.to(tl.float32) if INTERPRETED else x       # it would multiply the bits of a bf16


@triton.jit
def put(x, at, there, D: tl.constexpr):
    """Write x (rows, D), rounded to the dtype of that memory."""
    inside = there[:, None] & (tl.arange(0, at.shape[1]) < D)[None, :]
    tl.store(at, x.to(at.dtype.element_ty), mask=inside)


@triton.jit
def product(x, y):
    """x @ y in fp32, x rounded to y's dtype. "ieee", or fp32 would be cut to 10 bits (tf32)."""
    return tl.dot(x.to(y.dtype), y, input_precision="ieee")


@triton.jit
def scores(q, k, key_mask, t, j, end, T, K, CAUSAL: tl.constexpr, D: tl.constexpr):
    """log2(e) q k^T / sqrt(D), -inf where a query must not see: (BLOCK_T, BLOCK_K).

    t, j: the numbers of these queries and keys; keys from `end` on are not there. Queries from T on
    are not either, but need no care: they are zeros, and so are their gradients.
    log2(e), because a GPU has an instruction for 2^x and none for e^x: e^s = 2^(s log2(e)).
    """
    seen = (tl.load(key_mask + j, mask=j < end, other=0) != 0)[None, :]         # (1, BLOCK_K)
    if CAUSAL:                                  # the lower right corner: see model.attention_mask
        seen = seen & (j[None, :] <= K - T + t[:, None])
    return tl.where(seen, product(q, tl.trans(k)) * (LOG2E * D ** -0.5), float("-inf"))


# ---- forward

@triton.jit(do_not_specialize=CHANGING)
def forward_kernel(q, k, v, pk, pv, key_mask, out, lse, H, T, S, P, q_b, q_h, q_t, k_b, k_h, k_s,
                   p_b, p_h, p_s, mask_b, CAUSAL: tl.constexpr, D: tl.constexpr,
                   BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr):
    """The program (i, h, b) computes the output of the i-th tile of queries of head h in row b.

    q_b is the stride of q along b, and so on; the stride p_b = 0 means a prefix that all rows
    share: each program reads the same one, which stays in the GPU's cache.
    """
    start, h, b = tl.program_id(0) * BLOCK_T, tl.program_id(1), tl.program_id(2).to(tl.int64)
    t, K = start + tl.arange(0, BLOCK_T), P + S
    k, v, pk, pv = k + b * k_b + h * k_h, v + b * k_b + h * k_h, pk + b * p_b, pv + b * p_b
    pk, pv, key_mask = pk + h * p_h, pv + h * p_h, key_mask + b * mask_b
    q = tile(rows(q + b * q_b + h * q_h, t, q_t, D), t < T, D)                  # (BLOCK_T, D)
    # The online softmax. softmax(s) v = sum_j 2^s_j v_j / sum_j 2^s_j: both sums can be taken tile
    # by tile. But 2^s overflows, so s - top is used, top being the largest score so far: it cancels
    # in the ratio. Finite, not -inf: where nothing is seen yet, s - top must not be inf - inf.
    top = tl.full((BLOCK_T,), -1e30, tl.float32)
    total = tl.zeros((BLOCK_T,), tl.float32)                                    # sum of 2^(s - top)
    y = tl.zeros((BLOCK_T, power_of_2(D)), tl.float32)                          # ... times v
    end = tl.minimum(K, K - T + start + BLOCK_T) if CAUSAL else K       # none of these sees beyond
    for first in range(0, end, BLOCK_K):
        j = first + tl.arange(0, BLOCK_K)
        keys = tile(joined(pk, k, j, P, p_s, k_s, D), j < K, D)                 # (BLOCK_K, D)
        values = tile(joined(pv, v, j, P, p_s, k_s, D), j < K, D)               # (BLOCK_K, D)
        s = scores(q, keys, key_mask, t, j, K, T, K, CAUSAL, D)                 # (BLOCK_T, BLOCK_K)
        higher = tl.maximum(top, tl.max(s, 1))                                  # (BLOCK_T,)
        # Where this tile brings a larger score, the sums so far were taken with too small a top.
        # Times 2^(old top - new top) they are what they would have been with the new one.
        shrink = tl.exp2(top - higher)                                          # (BLOCK_T,)
        e = tl.exp2(s - higher[:, None])        # (BLOCK_T, BLOCK_K); hidden keys have 2^-inf = 0
        total = total * shrink + tl.sum(e, 1)                                   # (BLOCK_T,)
        y = y * shrink[:, None] + product(e, values)                            # (BLOCK_T, D)
        top = higher
    total = tl.where(total == 0, 1, total)                      # nothing was seen: 0 / 1
    put(y / total[:, None], rows(out + (b * T * H + h) * D, t, H * D, D), t < T, D)
    # All that the backward pass needs of the softmax: weight = 2^s / sum 2^s = 2^(s - lse).
    tl.store(lse + (b * H + h) * T + t, top + tl.log2(total), mask=t < T)


# ---- backward. With w = softmax(s), y = w v and g the gradient of y:
#   dv = w^T g;   dw = g v^T;   ds = w * (dw - delta), delta = sum_j w_j dw_j = y . g, one number a
#   query;   dq = ds k / sqrt(D);   dk = ds^T q / sqrt(D).
# dq is a sum over keys and dk, dv are sums over queries, so there is a kernel for each: a program
# owns what it sums up, nothing is added by two programs at once, and two runs agree bit for bit.

@triton.jit
def answered(out, grad, lse, b, h, t, H, T, D: tl.constexpr):
    """For the queries t: g (BLOCK_T, D); delta and the forward pass's lse, (BLOCK_T, 1) each."""
    y = tile(rows(out + (b * T * H + h) * D, t, H * D, D), t < T, D)            # (BLOCK_T, D)
    g = tile(rows(grad + (b * T * H + h) * D, t, H * D, D), t < T, D)           # (BLOCK_T, D)
    # Cheaper to compute again in each kernel than to store in one and wait for it in another.
    delta = tl.sum(y.to(tl.float32) * g.to(tl.float32), 1)
    return g, delta[:, None], tl.load(lse + (b * H + h) * T + t, mask=t < T, other=0)[:, None]


@triton.jit(do_not_specialize=CHANGING)
def queries_kernel(q, k, v, pk, pv, key_mask, out, lse, grad, dq, H, T, S, P, q_b, q_h, q_t, k_b,
                   k_h, k_s, p_b, p_h, p_s, mask_b, CAUSAL: tl.constexpr, D: tl.constexpr,
                   BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr):
    """dq: the walk of `forward_kernel` once more, with the same programs."""
    start, h, b = tl.program_id(0) * BLOCK_T, tl.program_id(1), tl.program_id(2).to(tl.int64)
    t, K = start + tl.arange(0, BLOCK_T), P + S
    k, v, pk, pv = k + b * k_b + h * k_h, v + b * k_b + h * k_h, pk + b * p_b, pv + b * p_b
    pk, pv, key_mask = pk + h * p_h, pv + h * p_h, key_mask + b * mask_b
    q = tile(rows(q + b * q_b + h * q_h, t, q_t, D), t < T, D)                  # (BLOCK_T, D)
    g, delta, lse = answered(out, grad, lse, b, h, t, H, T, D)
    total = tl.zeros((BLOCK_T, power_of_2(D)), tl.float32)
    end = tl.minimum(K, K - T + start + BLOCK_T) if CAUSAL else K
    for first in range(0, end, BLOCK_K):
        j = first + tl.arange(0, BLOCK_K)
        keys = tile(joined(pk, k, j, P, p_s, k_s, D), j < K, D)                 # (BLOCK_K, D)
        values = tile(joined(pv, v, j, P, p_s, k_s, D), j < K, D)               # (BLOCK_K, D)
        w = tl.exp2(scores(q, keys, key_mask, t, j, K, T, K, CAUSAL, D) - lse)  # (BLOCK_T, BLOCK_K)
        total += product(w * (product(g, tl.trans(values)) - delta), keys)      # (BLOCK_T, D)
    put(total * D ** -0.5, rows(dq + (b * T * H + h) * D, t, H * D, D), t < T, D)


@triton.jit(do_not_specialize=CHANGING)
def keys_kernel(q, k, v, key_mask, out, lse, grad, dk, dv, B, H, T, K, N, first, share, q_b, q_h,
                q_t, k_b, k_h, k_s, mask_b, CAUSAL: tl.constexpr, D: tl.constexpr,
                BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr):
    """dk and dv of N keys, the keys first, first + 1, ... of all K: the text's, or a prefix's.

    The program (i, h, group) owns the i-th tile of them, and sums over all queries of `share` rows
    of the batch: 1 where every row has keys of its own, more for a prefix that the rows share.
    """
    start, h, group = tl.program_id(0) * BLOCK_K, tl.program_id(1), tl.program_id(2).to(tl.int64)
    n = start + tl.arange(0, BLOCK_K)
    own = group * share * k_b + h * k_h
    k = tile(rows(k + own, n, k_s, D), n < N, D)                                # (BLOCK_K, D)
    v = tile(rows(v + own, n, k_s, D), n < N, D)                                # (BLOCK_K, D)
    dk_sum = tl.zeros((BLOCK_K, power_of_2(D)), tl.float32)
    dv_sum = tl.zeros((BLOCK_K, power_of_2(D)), tl.float32)
    seen = tl.maximum(first + start - (K - T), 0) if CAUSAL else 0      # by this query and later
    for b in range(group * share, tl.minimum((group + 1) * share, B)):
        for t0 in range(seen // BLOCK_T * BLOCK_T, T, BLOCK_T):
            t = t0 + tl.arange(0, BLOCK_T)
            queries = tile(rows(q + b * q_b + h * q_h, t, q_t, D), t < T, D)    # (BLOCK_T, D)
            g, delta, log = answered(out, grad, lse, b, h, t, H, T, D)
            s = scores(queries, k, key_mask + b * mask_b, t, first + n, first + N, T, K, CAUSAL, D)
            w = tl.exp2(s - log)                                                # (BLOCK_T, BLOCK_K)
            dv_sum += product(tl.trans(w), g)                                   # (BLOCK_K, D)
            dk_sum += product(tl.trans(w * (product(g, tl.trans(v)) - delta)), queries)
    own = (group * N * H + h) * D
    put(dk_sum * D ** -0.5, rows(dk + own, n, H * D, D), n < N, D)
    put(dv_sum, rows(dv + own, n, H * D, D), n < N, D)


# ---- the kernels as a function that autograd knows

def tiles(q, keys, causal, owned="queries"):
    """What a kernel is compiled for, by what its programs own; another value, another build.

    Where they own keys, two sums, dk and dv, stay on the chip. So: half as many queries at a time,
    twice the threads (8 warps of 32), and no loads ahead of time (1 stage), which need room, too.
    """
    T, D = q.shape[2:]
    bytes_of_row = D * q.element_size()
    most = 64 if bytes_of_row <= 128 else 32 if bytes_of_row <= 256 else 16     # found by compiling
    sizes = dict(CAUSAL=causal, D=D, BLOCK_T=min(most, power_of_2(T)),
                 BLOCK_K=min(most, power_of_2(keys)))
    if owned == "keys":
        sizes |= dict(BLOCK_T=max(16, sizes["BLOCK_T"] // 2), num_warps=8, num_stages=1)
    return sizes


def strides(x):
    """The strides of x (1 or B, ..., D) without D's; 0 along b where all rows share x."""
    return 0 if len(x) == 1 else x.stride(0), *x.stride()[1:-1]


def alike(*tensors):
    """These, laid out alike with the D numbers of a head side by side; copied only if not."""
    same = all(x.stride() == tensors[0].stride() and x.stride(3) == 1 for x in tensors)
    return tensors if same else [x.contiguous() for x in tensors]


def key_gradients(saved, causal, k, v, first, g):
    """dk and dv, (1 or B, H, N, D) each, of N keys: the keys first, first + 1, ... of all K."""
    q, _, _, _, _, key_mask, out, lse = saved
    (B, H, T, D), (rows, _, N, _), K = q.shape, k.shape, key_mask.size(1)
    sizes, share, dtype = tiles(q, N, causal, "keys"), 1, k.dtype
    count = math.ceil(N / sizes["BLOCK_K"])                 # tiles of keys
    if rows < B:        # shared by the batch: sums over some rows in fp32, then the sum of these
        share, dtype = math.ceil(B / max(1, PROGRAMS // max(1, H * count))), torch.float32
    both = q.new_empty(2, math.ceil(B / share), N, H, D, dtype=dtype)           # 2, groups, N, H, D
    if N:
        keys_kernel[count, H, both.size(1)](
            q, k, v, key_mask, out, lse, g, both[0], both[1], B, H, T, K, N, first, share,
            *strides(q), *strides(k), *strides(key_mask), **sizes)
    if rows < B:
        both = both.sum(1, keepdim=True).to(k.dtype)                            # (2, 1, N, H, D)
    return both.transpose(2, 3)                                         # (2, 1 or B, H, N, D)


class FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, pk, pv, key_mask, causal):
        (B, H, T, D), S, P = q.shape, k.size(2), pk.size(2)
        (q,), (k, v), (pk, pv) = alike(q), alike(k, v), alike(pk, pv)
        # Lying as the next linear layer wants it: transposing it back there is no copy.
        out = q.new_empty(B, T, H, D)                                           # (B, T, H, D)
        lse = q.new_empty(B, H, T, dtype=torch.float32)                         # (B, H, T)
        ctx.numbers = H, T, S, P, *strides(q), *strides(k), *strides(pk), *strides(key_mask)
        ctx.sizes = tiles(q, P + S, causal)
        ctx.grid = math.ceil(T / ctx.sizes["BLOCK_T"]), H, B
        tensors = q, k, v, pk, pv, key_mask, out, lse
        forward_kernel[ctx.grid](*tensors, *ctx.numbers, **ctx.sizes)
        ctx.save_for_backward(*tensors)
        return out.transpose(1, 2)                                              # (B, H, T, D)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        g, need = g.transpose(1, 2).contiguous(), ctx.needs_input_grad          # (B, T, H, D)
        saved = ctx.saved_tensors       # once: checkpointing forbids a second read
        _, k, v, pk, pv, _, out, _ = saved
        causal = ctx.sizes["CAUSAL"]
        dq = dk = dv = dpk = dpv = None
        if need[0]:
            dq = torch.empty_like(out).transpose(1, 2)                          # (B, H, T, D)
            queries_kernel[ctx.grid](*saved, g, dq, *ctx.numbers, **ctx.sizes)
        if need[1] or need[2]:
            dk, dv = key_gradients(saved, causal, k, v, pk.size(2), g)
        if need[3] or need[4]:
            dpk, dpv = key_gradients(saved, causal, pk, pv, 0, g)
        return dq, dk, dv, dpk, dpv, None, None


def check(device, dtype):
    """Raises ValueError, with the reason and what to use, where the kernels cannot run."""
    device, why = torch.device(device), ""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        why = f"in {dtype}; expected fp32, bf16 or fp16; use another --dtype"
    elif device.type != "cuda" and not triton.knobs.runtime.interpret:
        why = (f"on the device {device}; expected a CUDA GPU, for which Triton compiles; to step "
               "through the kernels slowly on a CPU set TRITON_INTERPRET=1")
    elif device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        why = (f"on {torch.cuda.get_device_name(device)}; expected a GPU of compute capability 8.0 "
               "or newer, for which Triton compiles")
    if why:
        raise ValueError(f"got fused attention {why}, or use --attention explicit")


class TritonAttention:
    """The same function as model.ExplicitAttention; fp32, bf16 or fp16, D <= 256."""
    supports_tree = False
    joins_prefix = False        # the kernel reads a prefix where it lies, so no cache copies it

    def __init__(self, device, dtype):
        check(device, dtype)

    @staticmethod
    def mask(key_mask, T, causal, tree=None):
        """What the kernels read: the key mask (1 or B, P+S) as bytes, and whether it is causal."""
        if tree is not None:
            raise ValueError("got fused attention and texts that branch, of beams or of a shared "
                             "source; expected one text in each row: the kernel knows no tree; use "
                             "--attention explicit")
        return key_mask.contiguous().view(torch.uint8), causal

    def __call__(self, q, k, v, pk, pv, mask):
        key_mask, causal = mask
        (B, H, _, D), S, P = q.shape, k.size(2), pk.size(2)
        if D > 256:
            raise ValueError(f"got fused attention for heads of size {D}; expected at most 256, "
                             "tiles of which fit on the chip; use --attention explicit")
        # A kernel does not notice a wrong shape or type: it reads whatever lies there.
        assert k.shape == v.shape == (B, H, S, D), "k and v do not fit q"
        assert key_mask.shape == (len(key_mask), P + S), "the mask does not fit the keys"
        assert pk.shape == pv.shape == (len(pk), H, P, D), "pk and pv do not fit q"
        assert {len(key_mask), len(pk)} <= {1, B}, "the mask and the prefix have one row, or B"
        assert {x.dtype for x in (k, v, pk, pv)} == {q.dtype}, "q, k, v, pk and pv differ in dtype"
        with torch.cuda.device_of(q):   # Triton starts a kernel on the current GPU, whatever q's is
            return FusedAttention.apply(q, k, v, pk, pv, key_mask, causal)
