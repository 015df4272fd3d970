"""kernels.py -- how does every token get through its own experts and no others?

One name, `expert_mlp`, over a ladder of rungs with the same signature, the clearest first.
The tests trust only the first rung; everything above it must give the same numbers and gradients.
"""
import torch
import torch.nn.functional as F

# --- 1. the definition: every expert on every token, then keep the chosen ones -------------------

def reference(x, experts, w_in, b_in, w_out, b_out):
    """The chosen experts' outputs (T, K, D), at E / K times the necessary work."""
    everything = torch.stack([
        F.gelu(x @ w_in[e] + b_in[e]) @ w_out[e] + b_out[e] for e in range(len(w_in))
    ], dim=1)                                                           # (T, E, D)
    return everything.gather(1, experts[..., None].expand(-1, -1, x.shape[1]))


# --- 2. sort the choices by expert, multiply group by group, undo the sort -----------------------

def grouped(x, experts, w_in, b_in, w_out, b_out):
    """The chosen experts' outputs (T, K, D) with no work for the others."""
    (T, K), D = experts.shape, x.shape[1]
    expert, order = experts.reshape(-1).sort(stable=True)               # (T*K,) rows by expert
    # index_select, not x[...]: the same rows, but a backward that is 1.5 times faster on a CPU
    rows = x.index_select(0, order // K)                                # (T*K, D) row t*K+k is t's
    mlp = grouped_mm_mlp if _grouped_mm_takes(x, w_in) else sliced_mlp
    out = mlp(rows, expert, w_in, b_in, w_out, b_out)                   # (T*K, D) still by expert
    undo = torch.empty_like(order).scatter_(0, order, torch.arange(T * K, device=x.device))
    return out.index_select(0, undo).view(T, K, D)


def sliced_mlp(rows, expert, w_in, b_in, w_out, b_out):
    """The experts' MLPs on rows (S, D) sorted by expert (S,): two plain products per expert."""
    sizes = expert.bincount(minlength=len(w_in)).tolist()               # E sizes, 0 for an idle one
    # unbind once: indexing w_in[e] in the loop would write a full-size zero gradient per expert
    weights = zip(w_in.unbind(), b_in.unbind(), w_out.unbind(), b_out.unbind(), strict=True)
    out = []
    for group, (wi, bi, wo, bo) in zip(rows.split(sizes), weights, strict=True):
        out.append(torch.addmm(bo, F.gelu(torch.addmm(bi, group, wi)), wo))
    return torch.cat(out)                                               # (S, D)


def grouped_mm_mlp(rows, expert, w_in, b_in, w_out, b_out):
    """The same in two launches, with no group size known to the host."""
    E = len(w_in)
    one_hot = F.one_hot(expert, E).to(rows.dtype)                       # (S, E)
    ends = one_hot.sum(dim=0, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    # grouped_mm has no bias; as a product with the one-hot rows its gradient is a product too
    z = torch.addmm(F.grouped_mm(rows, w_in, offs=ends), one_hot, b_in)             # (S, H)
    return torch.addmm(F.grouped_mm(F.gelu(z), w_out, offs=ends), one_hot, b_out)   # (S, D)


def _grouped_mm_takes(x, w_in):
    """Whether grouped_mm is the better product here and accepts these tensors."""
    aligned = all(n * x.element_size() % 16 == 0 for n in w_in.shape[1:])   # rows of 16 bytes
    compiling = torch.compiler.is_compiling()
    fast = x.is_cuda or compiling                          # on a CPU the slices are no slower
    half = x.dtype in (torch.bfloat16, torch.float16)      # all that it takes while compiling
    return fast and aligned and (half or (x.dtype == torch.float32 and not compiling))


# --- the one name that the rest of the code imports ----------------------------------------------

BACKENDS = {"reference": reference, "grouped": grouped}


def expert_mlp(x, experts, gates, w_in, b_in, w_out, b_out, backend="auto", return_choices=False):
    """Send each token through its chosen experts and add up their gated outputs.

    x (T, D); experts (T, K) int64; gates (T, K); w_in (E, D, H); b_in (E, H); w_out (E, H, D);
    b_out (E, D). Returns y (T, D), y_t = sum_k gates_tk MLP_{experts_tk}(x_t); with
    return_choices=True also raw (T, K, D), the outputs before their gates. A backend of "auto"
    is "grouped". The gates multiply and add in their own float32; y has the dtype of x.
    torch.export takes "reference" alone in float32, for group sizes are data.
    """
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"there is no backend {backend!r}: choose auto, {', '.join(BACKENDS)}")
    rung = BACKENDS["grouped" if backend == "auto" else backend]
    raw = rung(x, experts, w_in, b_in, w_out, b_out)                    # (T, K, D)
    y = (raw * gates[..., None]).sum(dim=1).to(x.dtype)                 # (T, D)
    return (y, raw) if return_choices else y


if __name__ == "__main__":      # the side-by-side table: python kernels.py --help
    import sys
    sys.path.append(sys.path[0] + "/tests")
    import bench
    bench.main()
