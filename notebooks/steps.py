"""steps.py -- what does a whole training step cost here, beside the plain step of known libraries?

    python notebooks/steps.py --json notebooks/results/steps_cpu.json       about ten minutes
    python notebooks/steps.py --page notebooks/RESULTS.md notebooks/results/steps_cpu.json

A dense ViT of torchvision and one of timm (where it is installed) have the width, depth, heads,
patches and classes of ours and take the same images, loss, clipping and AdamW. The steps take
turns. Peak memory is what a step holds beyond the weights and the optimiser.
"""
import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import checkpoint

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from torchvision.models import VisionTransformer

import data
import report
import train
from notebooks import bench

BEGIN, END = "<!-- steps:begin -->", "<!-- steps:end -->"
OURS = {"ours, dense": "--method dense", "ours, V-MoE": "--method moe --k 1",
        "ours, TGR": "--method tgr --k 1", "ours, TGR + MoDE": "--method tgr+mode --k 2"}
SIZES = {"tiny": "--preset tiny", "small": "--preset small --batch_size 64"}


def torchvision_vit(cfg):
    return VisionTransformer(cfg.image_size, cfg.patch, cfg.depth, cfg.heads, cfg.dim,
                             int(cfg.dim * cfg.mlp_ratio), num_classes=100)


def timm_vit(cfg):
    import timm
    return timm.models.VisionTransformer(
        cfg.image_size, cfg.patch, num_classes=100, embed_dim=cfg.dim, depth=cfg.depth,
        num_heads=cfg.heads, mlp_ratio=cfg.mlp_ratio)


LIBRARIES = {"torchvision, dense": torchvision_vit, "timm, dense": timm_vit}


def a_step(name, size, device):
    """(a function that makes one training step, images in it, parameters of the model)."""
    flags = [SIZES[size], OURS.get(name, "--method dense"), "--data synthetic --device", device,
             "--drop_path 0 --mixup 0 --cutmix 0 --no-compile --train_images 0"]
    cfg = train.resolve(train.parse(" ".join(flags).split()))
    pictures = data.synthetic(n_train=cfg.batch_size, n_test=cfg.batch_size)
    images = pictures.normalise(pictures.train.images).to(device)
    targets = F.one_hot(pictures.train.fine, 100).float().to(device)
    guide = None
    if name in LIBRARIES:
        torch.manual_seed(0)
        model = LIBRARIES[name](cfg).to(device)
    else:
        model = train.build(cfg, pictures)
        if "guide" in train.METHODS[cfg.method]:
            dense = train.replace(cfg, method="dense", moe_blocks="")
            guide = train.Guide(train.build(dense, pictures), model, cfg.n_experts).to(device)
    optimizer = torch.optim.AdamW(train.parameter_groups(model, guide, cfg.weight_decay), lr=1e-4,
                                  fused=device != "cpu")

    def step():
        optimizer.zero_grad(set_to_none=True)
        if name in LIBRARIES:
            with train.autocast(cfg, images):
                loss = F.cross_entropy(model(images).float(), targets)
        else:
            loss = sum(train.losses(cfg, model, guide, images, targets).values())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
        optimizer.step()

    model.train()
    return step, len(images), sum(p.numel() for p in model.parameters())


def memory(step, device):
    """Bytes that a step holds at its peak beyond weights and optimiser."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        seen.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    held = [e["args"]["Total Allocated"] for e in events if e["name"] == "[memory]"]
    return max(held) - min(held)         # least after zero_grad, when only what stays is there


def measure(device, rounds):
    for size in SIZES:
        steps, images, rows = {}, {}, {}
        for name in (*LIBRARIES, *OURS):
            try:
                steps[name], images[name], n = a_step(name, size, device)
            except ImportError as error:
                print(f"{name}: {error}", file=sys.stderr)
                continue
            steps[name]()                           # from now on the optimiser has its moments
            rows[name] = {"size": size, "name": name, "parameters": n, "images": images[name],
                          "peak_bytes": memory(steps[name], device)}
        samples = bench.clock(steps, rounds, 60, device != "cpu")
        first = next(iter(steps))
        for name, row in rows.items():
            ratios = [own / its for own, its in zip(samples[name], samples[first], strict=False)]
            yield row | {"images_per_second": 1e3 * images[name] / statistics.median(samples[name]),
                         "times_first": statistics.median(ratios), "n": len(samples[name])}


def table(path):
    record = json.loads(Path(path).read_text(encoding="utf-8"))
    lines = ["| size | a training step of | parameters | images / s | time over the first's | "
             "peak memory |", "|-|-|-|-|-|-|"]
    for r in record["rows"]:
        lines.append(f"| {r['size']}, batch {r['images']} | {r['name']} | "
                     f"{r['parameters'] / 1e6:.2f} M | {r['images_per_second']:,.0f} | "
                     f"{r['times_first']:.2f} | {r['peak_bytes'] / 1e6:,.0f} MB |")
    libraries = ", ".join(f"{name} {v}" for name, v in record["libraries"].items())
    return "\n".join([*lines, "", f"{record['device']}; torch {record['versions']['torch']}; "
                      f"{libraries}; commit {record['commit'][:12]}; `{record['command']}`."])


def main():
    checkpoint.printable()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("path", nargs="?", help="with --page: the results")
    parser.add_argument("--page", help="write the table between the markers of this file")
    parser.add_argument("--json", help="write the results here")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.page:
        return report.put_between(args.page, BEGIN, END, lambda: table(args.path),
                                  f"python notebooks/steps.py --page {args.page} {args.path}")
    rows = []
    for row in measure(args.device, args.rounds):
        print(row, flush=True)
        rows.append(row)
    if args.json:
        libraries = {name: bench.metadata.version(name) for name in ("timm",)
                     if any(name in row["name"] for row in rows)}
        record = {"command": f"python notebooks/steps.py --json {args.json} --device {args.device}",
                  **checkpoint.provenance(args.device), "libraries": libraries, "rows": rows}
        checkpoint.write(args.json, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
