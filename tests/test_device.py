"""What will happen on a GPU, as far as a machine without one can know?

Here tensors live on a GPU that is not there: they have a shape, a dtype and a device, and no
numbers. So whole epochs run, and two laws can be tested: no operation mixes devices, and no
training step makes the host wait. Not seen are the backward pass, for autograd wants a real card's
streams (torch.compile traces it on the CPU instead), what happens inside an operation of torch (a
grouped_mm may read its offsets), the Triton kernels, and speed.
"""
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import checkpoint

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision import models

import kernels
import report
import teacher
import train
from data import Split, batches, split, synthetic
from train import METHODS

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a real one")
ROOT = Path(train.__file__).parent
aten = torch.ops.aten
SMALL = synthetic(seed=5, n_train=48, n_test=16)
BASE = ["--preset", "tiny", "--epochs", "1", "--batch_size", "16", "--dim", "16", "--depth", "1",
        "--heads", "2", "--patch", "16", "--moe_blocks", "1", "--n_experts", "4",
        "--probe_images", "8", "--train_images", "0", "--out", "run"]


class NoNumbers(FakeTensorMode):
    avoid_device_init = True        # not even where is_available has been told to say yes


class PretendedGPU(TorchDispatchMode):
    """Notes which function of ours reads a number of the GPU's, or sends it one, in `waits`, and in
    `doubles` which makes a float64. What is read is made up. Tensors of the CPU keep their numbers,
    and reading them is no wait.
    """

    def __init__(self):
        super().__init__()
        self.waits, self.doubles = [], []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        to = kwargs.get("device")
        to_cpu, to_gpu = to is not None and to.type == "cpu", to is not None and to.type == "cuda"
        tensors = [v for v in tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor)]
        if not to_gpu and not any(isinstance(v, FakeTensor) for v in tensors):
            with unset_fake_temporarily():
                return op(*args, **kwargs)
        moved = args[0].is_cuda != to_gpu if op == aten._to_copy.default and (to_cpu or to_gpu) \
            else op == aten.copy_.default and args[0].device.type != args[1].device.type
        # where devices may be mixed, as in x[i], torch moves what lies on the CPU, but not a scalar
        moved = moved or (to is None and any(v.ndim and not v.is_cuda for v in tensors))
        if moved or op == aten._local_scalar_dense.default:
            self.note(self.waits)
        if op == aten._local_scalar_dense.default or (moved and to_cpu):
            with unset_fake_temporarily():
                seen = torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
                return seen if to_cpu else seen.item()
        if op == aten._grouped_mm.default:      # it multiplies more dtypes than can be pretended
            return args[0].new_empty(len(args[0]), args[1].shape[2])
        if "generator" in kwargs:
            kwargs = kwargs | {"generator": None}
        out = op(*args, **kwargs)
        if any(isinstance(v, FakeTensor) and v.dtype == torch.float64 for v in tree_leaves(out)):
            self.note(self.doubles)
        return out

    def note(self, where):
        frame = sys._getframe(1)
        while frame and (Path(frame.f_code.co_filename).parent != ROOT
                         or frame.f_code.co_name[0] == "<"):
            frame = frame.f_back
        where.append(f"{Path(frame.f_code.co_filename).name}, {frame.f_code.co_name}" if frame
                     else "a test")


class PretendedGenerator(torch.Generator):
    def __new__(cls, device="cpu"):
        made = super().__new__(cls)
        made.of = torch.device(device)
        return made

    def __init__(self, device="cpu"):
        pass

    @property
    def device(self):
        return self.of


def a_card(monkeypatch, **differs):
    """Let torch believe that there is one, an H100 where nothing else is said."""
    there = {"is_available": True, "device_count": 1, "get_device_capability": (9, 0),
             "get_device_name": "a pretended GPU", "is_bf16_supported": True,
             "get_arch_list": ["sm_75", "sm_90a", "sm_120"]}
    for name, value in (there | differs).items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    monkeypatch.setattr(kernels, "INTERPRETED", False)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """The context of a machine with a GPU, in which train.fit runs, but for autograd."""
    with NoNumbers(allow_non_fake_inputs=True), PretendedGPU() as gpu, torch.no_grad():
        a_card(monkeypatch)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        monkeypatch.setattr(torch, "Generator", PretendedGenerator)
        monkeypatch.setattr(torch.nn.Module, "to", to_gpu)
        monkeypatch.setattr(train, "load", lambda *_, **__: SMALL._replace(**{
            part: Split(*(t.cuda() for t in getattr(SMALL, part))) for part in ("train", "test")}))
        monkeypatch.setattr(teacher, "published",
                            lambda name, _: models.get_model(name).state_dict())
        monkeypatch.setattr(checkpoint, "save", lambda path, state: None)
        monkeypatch.setattr(report, "figures", lambda out: {})
        yield gpu


def to_gpu(module, device):
    """What module.to does, but for parameters that are there already: these it could not swap."""
    for part in module.modules():
        if not all(t.is_cuda for t in (*part.parameters(False), *part.buffers(False))):
            part._apply(lambda t: t.to(device), recurse=False)
    return module


def train_on(gpu, monkeypatch, *flags):
    """Train a student for an epoch; returns (the waits of that epoch, the doubles, its terms)."""
    teacher, job = train.plan(train.parse([*BASE, "--device", "cuda", *flags]))
    guide = train.guide_of(teacher, job) if teacher else None
    seen, one_epoch = [], train.one_epoch

    def watched(*args):
        gpu.waits.clear(), gpu.doubles.clear()
        terms = one_epoch(*args)
        seen.extend((list(gpu.waits), list(gpu.doubles), terms))
        return terms

    def backward(loss):
        for module in (job.model, guide and guide.routers):
            for p in module.parameters() if module else ():
                p.grad = torch.empty_like(p)

    monkeypatch.setattr(train, "one_epoch", watched)
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    train.fit(job, guide)
    return seen


# --- is the pretence any good? ---

@pytest.mark.parametrize("read", [
    lambda x: x.sum().item(), lambda x: bool(x.sum() > 0), lambda x: x.tolist(), lambda x: x.cpu(),
    lambda x: float(x[0]), lambda x: x.to("cpu", torch.float16), lambda x: x.new_tensor([1.0, 2]),
    lambda x: torch.tensor([1.0, 2], device=x.device), lambda x: x[[0, 2]],
    lambda x: x[torch.tensor([0, 2])],
    lambda x: x.copy_(torch.ones(3)), lambda x: torch.ones(3).copy_(x)])
def test_what_the_host_would_wait_for_is_noticed(read, gpu):
    x = torch.zeros(3, device="cuda")
    read(x)
    assert gpu.waits


@pytest.mark.parametrize("write", [
    lambda x: x.new_full((2,), 3.0), lambda x: x + 1.5, lambda x: x * torch.tensor(2.0),
    lambda x: torch.ones(3).sum().item(), lambda x: torch.rand(3, device=x.device) < x])
def test_what_the_host_would_not_wait_for_is_not(write, gpu):
    write(torch.zeros(3, device="cuda"))
    assert not gpu.waits


def test_devices_that_are_mixed_are_noticed(gpu):
    with pytest.raises(RuntimeError, match="same device"):
        torch.zeros(3, device="cuda") + torch.ones(3)


# --- the laws ---

CASES = [
    "dense --augment none", "soft --augment heavy",
    "moe --gate sigmoid --augment heavy --mixup 0.8 --cutmix 1 --split val --labels coarse",
    "moe --k 1 --noise 1 --drop_path 0.1 --depth 2 --capacity_factor 1.2 --label_smoothing 0.1",
    "tgr --guide_tokens class --mixup 0.8", "tgr --k 1 --guide_tokens patches --guide_until 0.5",
    "mode --backend lean", "moe --backend fused", "mode --k 1 --cutmix 1", "tgr+mode",
    "tgr+mode --k 1 --precision fp32", "tgr+mode --precision fp16 --gate topk_softmax",
    "tgr --teacher torchvision:resnet18 --teacher_pixels 32"]


@pytest.mark.parametrize("flags", CASES)
def test_a_step_on_a_gpu_mixes_no_devices_makes_no_float64_and_waits_only_where_it_is_checked(
        flags, gpu, monkeypatch):
    waits, doubles, terms = train_on(gpu, monkeypatch, "--no-compile", "--method", *flags.split())
    # the loss, and the gradient's norm or the loss's scale, in the first and the last of the steps;
    # the epoch's means
    assert Counter(waits) == {"train.py, stop_unless_finite": 4,
                              "train.py, one_epoch": len(terms)}
    # torch's own scaler does in each step, but not on an Apple GPU, which has none
    assert set(doubles) == ({"train.py, one_epoch"} if "fp16" in flags else set())


def test_every_method_has_gone_an_epoch_on_a_gpu_with_one_expert_per_token_and_with_two():
    gone = {(case.split()[0], "--k 1" in case) for case in CASES}
    routed = set(METHODS) - {"dense", "soft"}
    assert gone == {(method, False) for method in METHODS} | {(method, True) for method in routed}


def test_a_router_on_a_gpu_looks_at_its_logits_in_evaluation_alone(gpu, monkeypatch):
    train_on(gpu, monkeypatch, "--method", "moe", "--no-compile")
    assert "router.py, route" in gpu.waits                      # after the epoch


# --- torch.compile, which a GPU's runs use by default: on a CPU, up to where code is written ---

def a_step(*flags):
    """The arguments of train.losses for a step in bfloat16, of which nothing is compiled yet."""
    torch._dynamo.reset()
    cfg = train.resolve(train.parse([*BASE, "--device", "cpu", "--precision", "bf16", *flags]))
    student, guide = train.build(cfg, SMALL), None
    if "guide" in METHODS[cfg.method]:
        dense = train.build(train.replace(cfg, method="dense"), SMALL)
        guide = train.Guide(dense, student, cfg.n_experts)
    return cfg, student, guide, *next(batches(cfg, SMALL, split(cfg, SMALL), epoch=1))


@pytest.mark.parametrize("flags", ["dense", "soft", "moe --k 1 --capacity_factor 1.2", "tgr",
                                   "mode --k 1 --noise 1 --drop_path 0.1 --depth 2", "tgr+mode"])
def test_every_method_is_one_graph_and_one_more_when_guidance_ends(flags):
    graphs = []
    cfg, student, guide, *batch = a_step("--method", *flags.split())
    losses = torch.compile(train.losses, backend=lambda graph, _: graphs.append(1) or graph)
    for guided, how_many in ((guide, 1), (guide, 1), (None, 2), (None, 2), (guide, 2)):
        losses(cfg, student, guided, *batch)
        assert len(graphs) == (how_many if guide else 1)


def test_the_backward_pass_is_one_graph_too():
    forward, backward = [], []
    cfg, student, *rest = a_step("--method", "tgr+mode")
    losses = torch.compile(train.losses, backend=aot_autograd(
        fw_compiler=lambda graph, _: forward.append(1) or make_boxed_func(graph),
        bw_compiler=lambda graph, _: backward.append(1) or make_boxed_func(graph)))
    for _ in range(2):
        sum(losses(cfg, student, *rest).values()).backward()
        assert len(forward) == len(backward) == 1
    assert all(p.grad.isfinite().all() for p in student.parameters())


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_elsewhere_than_in_bfloat16_grouped_is_many_graphs_and_the_next_steps_compile_no_more(
        precision):
    graphs = []
    cfg, student, guide, *batch = a_step("--method", "tgr", "--precision", precision)
    losses = torch.compile(train.losses, backend=lambda graph, _: graphs.append(1) or graph)
    losses(cfg, student, guide, *batch)
    first = len(graphs)
    for images, targets in (batch, [t.flip(0) for t in batch]):     # other groups of tokens
        losses(cfg, student, guide, images, targets)
        assert 2 < len(graphs) == first


@pytest.mark.skipif(kernels.triton is None, reason="Triton is not installed")
def test_the_fused_rung_is_in_that_graph_whole_in_every_precision_that_it_has():
    graphs = []
    for precision in ("fp32", "fp16"):                          # the interpreter has no bfloat16
        cfg, student, guide, *batch = a_step("--method", "tgr+mode", "--backend", "fused",
                                             "--precision", precision)
        losses = torch.compile(train.losses, backend=lambda graph, _: graphs.append(graph) or graph)
        losses(cfg, student, guide, *batch)
    assert [graph.code.count("kernels.fused") for graph in graphs] == [1, 1]


# --- on a card that nobody has tried, which rung is "auto"? ---

def a_plan(*flags):
    """A job on the pretended card, and the clause of its plan about the rung."""
    _, job = train.plan(train.parse([*BASE, "--device", "cuda", *flags]))
    return job, train.try_fused(job)


@pytest.fixture
def contests(monkeypatch, tmp_path):
    """The layers of the contests that were held; `came_out` is what each returns, or raises."""
    held = SimpleNamespace(layers=[], came_out=(1.1, [0.8, 0.7, 0.9]))

    def contest(*layer):
        held.layers.append(layer)
        if isinstance(held.came_out, Exception):
            raise held.came_out
        return held.came_out

    monkeypatch.setattr(kernels, "contest", contest)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return held


@pytest.mark.parametrize("came_out, rung, said", [
    ((1.1, [0.8, 0.7, 0.9]), "fused", "right here, and it takes 0.70 to 0.90 of grouped's time"),
    ((2.0, [0.8, 0.7, 0.99]), "fused", "0.70 to 0.99"),
    ((1.1, [0.8, 0.7, 1.0]), "auto", "right here but takes 0.70 to 1.00 of its time"),
    ((2.1, [0.1, 0.1, 0.1]), "auto", "wrong here, with 2.1 times the error: please report"),
    ((float("nan"), [0.1, 0.1, 0.1]), "auto", "wrong here, with nan times"),
    (RuntimeError("no kernel\nimage"), "auto", "failed here, RuntimeError: no kernel image")])
def test_auto_is_fused_where_that_is_right_and_faster_in_every_round(
        came_out, rung, said, gpu, contests):
    contests.came_out = came_out
    job, clause = a_plan("--method", "moe")
    assert job.cfg.backend == rung == job.model.blocks[0].mlp.backend and said in clause
    assert clause.startswith(f" by the rung {'fused' if rung == 'fused' else 'grouped'} (")
    # 16 images of 5 tokens; D, H, E and K of the experts
    assert contests.layers == [(80, 16, 32, 4, 2, torch.bfloat16, "cuda", True)]


@pytest.mark.parametrize("flags", ["--method dense", "--method soft", "--backend grouped",
                                   "--backend fused"])
def test_no_contest_is_held_where_nothing_is_to_be_chosen(flags, gpu, contests):
    job, clause = a_plan("--method", "moe", *flags.split())
    assert clause == "" and not contests.layers
    assert job.cfg.backend == (flags.split()[1] if "backend" in flags else "auto")


def test_no_contest_is_held_on_a_card_that_the_kernels_are_not_compiled_for(
        gpu, contests, monkeypatch):
    a_card(monkeypatch, get_device_capability=(7, 5), is_bf16_supported=False)
    _, clause = a_plan("--method", "moe")
    assert "older than compute capability 8.0" in clause and not contests.layers


def test_a_contest_is_held_once_per_card_layer_and_code(gpu, contests, monkeypatch, tmp_path):
    first = a_plan("--method", "moe")[1]
    assert a_plan("--method", "moe")[1] == first and len(contests.layers) == 1
    differ = [lambda: a_card(monkeypatch, get_device_name="another"),
              lambda: monkeypatch.setattr(torch, "__version__", "3.0"),
              lambda: monkeypatch.setattr(kernels.triton, "__version__", "4.0"),
              lambda: monkeypatch.setattr(kernels, "__file__", train.__file__)]
    for n, change in enumerate(differ, start=2):
        change()
        assert a_plan("--method", "moe")[1] == first and len(contests.layers) == n
    for n, flags in enumerate(["--k 1", "--precision fp32", "--no-compile"], start=6):
        a_plan("--method", "moe", *flags.split())
        assert len(contests.layers) == n
    for note in (tmp_path / "hub" / "guided_moe").iterdir():
        note.write_text("{")
    assert a_plan("--method", "moe")[1] == first and len(contests.layers) == 9


def test_a_contest_that_cannot_be_noted_is_held_again(gpu, contests, tmp_path):
    (tmp_path / "hub").write_text("no folder")
    for n in (1, 2):
        assert "by the rung fused" in a_plan("--method", "moe")[1] and len(contests.layers) == n


def test_a_contest_that_failed_is_held_again(gpu, contests):
    contests.came_out = RuntimeError("another process has the memory")
    for n in (1, 2):
        assert "failed here" in a_plan("--method", "moe")[1] and len(contests.layers) == n


def test_the_plan_says_which_rung_and_why(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "load", lambda *_, **__: SMALL)
    monkeypatch.setattr(train, "try_fused", lambda job: " by the rung fused (of course)")
    train.main([*BASE, "--device", "cpu", "--method", "moe"])
    assert "K=2 by the rung fused (of course), in run" in capsys.readouterr().out


# --- which card is it? ---

def test_routed_experts_are_compiled_where_they_are_one_graph(monkeypatch):
    for capability, bf16, precision in (((9, 0), True, "bf16"), ((7, 5), False, "fp16")):
        a_card(monkeypatch, get_device_capability=capability, is_bf16_supported=bf16)
        for method in METHODS:
            cfg = train.resolve(train.parse([*BASE, "--method", method]))
            assert (cfg.device, cfg.precision) == ("cuda", precision)
            assert cfg.compile == (bf16 or method in ("dense", "soft"))
        if bf16:                        # the fused rung is one graph in every precision
            with NoNumbers():
                assert all(train.resolve(train.parse(
                    [*BASE, "--backend", "fused", "--precision", precision])).compile
                    for precision in ("fp32", "fp16"))
        assert train.resolve(train.parse([*BASE, "--compile"])).compile


def test_a_card_too_old_for_triton_is_not_compiled_for_and_this_is_said_once(monkeypatch, capsys):
    a_card(monkeypatch, get_device_capability=(6, 1), is_bf16_supported=False,
           get_arch_list=["sm_50", "sm_61"])
    for asked in ([], ["--compile"]):
        assert not train.resolve(train.parse([*BASE, "--method", "dense", *asked])).compile
        said = capsys.readouterr().out
        assert said.count("7.0 or newer: a pretended GPU is older") == 1
    train.resolve(train.parse([*BASE, "--method", "dense", "--no-compile"]))
    assert not capsys.readouterr().out


@pytest.mark.parametrize("flags", [[], ["--device", "cuda"], ["--device", "cuda:0"]])
def test_a_card_older_than_its_torch_was_made_for_is_told_so_before_training(
        flags, monkeypatch, capsys):
    a_card(monkeypatch, get_device_capability=(6, 1))
    with pytest.raises(SystemExit) as end:
        train.main([*BASE, *flags])
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1
    assert "made for GPUs of compute capability 7.5 and newer, and a pretended GPU has 6.1" in said
    assert "--device cpu" in said
    a_card(monkeypatch, get_device_capability=(6, 1), get_arch_list=["gfx90a"])     # not NVIDIA's
    assert train.resolve(train.parse([*BASE, *flags, "--no-compile"])).device.startswith("cuda")


def test_a_card_that_is_not_there_is_told_from_the_one_that_is(monkeypatch, capsys):
    a_card(monkeypatch)
    with pytest.raises(SystemExit) as end:
        train.main([*BASE, "--device", "cuda:1"])
    assert end.value.code == 2 and "no cuda:1" in capsys.readouterr().err


def test_an_apple_gpu_is_no_cuda_device(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    cfg = train.resolve(train.parse([*BASE, "--device", "mps"]))
    assert (cfg.precision, cfg.compile) == ("fp32", False)


def test_a_run_on_an_apple_gpu_keeps_the_state_of_its_generator(monkeypatch):
    kept = []
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: torch.tensor([7], dtype=torch.uint8))
    monkeypatch.setattr(torch.mps, "set_rng_state", kept.append)
    states = checkpoint.get_rng("mps")
    assert len(states) == 2 and len(checkpoint.get_rng("cpu")) == 1
    checkpoint.set_rng(states, "mps")
    checkpoint.set_rng(states[:1], "mps")                       # of a run that began on a CPU
    checkpoint.set_rng(states, "cpu")
    assert kept == [states[1]]
