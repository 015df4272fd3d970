"""The pictures and what happens to them, on the CPU; the downloads come from a server in this file.

The two tests of the real CIFAR-100 skip, and say so, where data/ does not hold it.
"""
import contextlib
import hashlib
import http.server
import io
import os
import pickle
import socket
import struct
import tarfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data as D

REAL = Path(__file__).parent.parent / "data"
needs_cifar100 = pytest.mark.skipif(not (REAL / D.CIFAR100.base_folder).exists(),
                                    reason="CIFAR-100 is not in data/")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The pictures are few: beside other work, two threads mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(n, seed=0):
    return torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=rng(seed))


# --- the built-in set ---

@pytest.fixture(scope="module")
def drawn():
    return D.synthetic(n_train=2000, n_test=500)


def test_the_synthetic_set_is_the_same_bytes_every_time():
    one, two, other = (D.synthetic(seed, n_train=300, n_test=100) for seed in (0, 0, 1))
    assert torch.equal(one.train.images, two.train.images) and one.md5 == two.md5
    assert one.md5 != other.md5
    assert not torch.equal(one.test.images, one.train.images[:100])
    # A change of the drawing makes every older number incomparable: then write the new one here.
    md5 = hashlib.md5(one.test.images.numpy().tobytes()).hexdigest()
    assert md5 == "94d3ffca0ff69aa5e2d72f31cf901fc4"


def test_every_fine_class_is_there_equally_often_and_knows_its_coarse_class(drawn):
    assert drawn.train.fine.bincount().tolist() == [20] * 100
    assert torch.equal(drawn.train.coarse, drawn.train.fine // 5)
    for fine, name in enumerate(drawn.fine_names):
        assert name.startswith(drawn.coarse_names[fine // 5] + " ")
    assert len(set(drawn.fine_names)) == 100 and len(set(drawn.coarse_names)) == 20


def test_a_name_says_what_is_drawn():
    # Classes 0..4 are one material; a ring shows the background in its middle, a disc does not.
    disc, ring = (D.draw(torch.full((100,), k), rng()) for k in (0, 1))
    assert D.SHAPES[:2] == ["disc", "ring"]
    middle = (slice(None), slice(None), slice(14, 18), slice(14, 18))
    assert ring[middle].float().std() < 0.6 * disc[middle].float().std()
    # Vertical stripes change from left to right, horizontal bars from top to bottom.
    for name, steeper, flatter in (("striped", 3, 2), ("barred", 2, 3)):
        k = D.TEXTURES.index(name)
        square = D.draw(torch.full((50,), 5 * k + D.SHAPES.index("square")), rng()).float()
        centre = square[:, :, 10:22, 10:22]
        assert centre.diff(dim=steeper).abs().mean() > 2 * centre.diff(dim=flatter).abs().mean()
    # The two colours of a material are opposite hues: red against cyan is red against the rest.
    red_cyan, green_magenta = (D.draw(torch.full((100,), 20 * k), rng()).float() for k in (0, 3))
    for images, loud in ((red_cyan, 0), (green_magenta, 1)):
        others = [c for c in range(3) if c != loud]
        contrast = (images[:, loud] - images[:, others].mean(1))[:, 8:24, 8:24].std()
        assert contrast > 1.5 * (images[:, others[0]] - images[:, others[1]])[:, 8:24, 8:24].std()


def test_the_two_colours_of_a_material_swap_roles():
    # Otherwise the mean colour would name the palette, as dots cover less than their ground does.
    dotted_square = 5 * D.TEXTURES.index("dotted") + D.SHAPES.index("square")
    images = [D.draw(torch.full((100,), 20 * k + dotted_square), rng()) for k in range(5)]
    colour = torch.stack([(i / 255)[:, :, 8:24, 8:24].mean((0, 2, 3)) for i in images])    # (5, 3)
    assert colour.std(dim=0).max() < 0.02


def test_a_linear_classifier_on_pixels_stays_under_40_percent(drawn):
    # Ridge regression on one-hot labels, on pixels averaged 2 x 2 so that it takes a second.
    x, y = (F.pad(F.avg_pool2d(s.images / 255, 2).flatten(1), (0, 1), value=1.0)
            for s in (drawn.train, drawn.test))
    target = F.one_hot(drawn.train.fine).float() - 0.01
    best = 0
    for ridge in (1, 100):
        w = torch.linalg.solve(x.T @ x + ridge * torch.eye(x.shape[1]), x.T @ target)
        best = max(best, ((y @ w).argmax(1) == drawn.test.fine).float().mean().item())
    assert 0.01 < best < 0.4


def test_mean_and_std_are_those_of_the_training_pixels(drawn):
    pixels = drawn.train.images.double() / 255
    assert drawn.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist())
    assert drawn.std == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist())
    x = drawn.normalise(drawn.train.images)
    assert x.dtype == torch.float32
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3)), torch.ones(3), atol=1e-4, rtol=0)


def test_a_channel_that_never_changes_becomes_zero_and_not_nan():
    grey = torch.randint(0, 256, (6, 3, 8, 8)).byte()
    grey[:, 1] = 77
    mean, std = D.channel_stats(grey)
    assert std[1] == 1.0 and mean[1] == pytest.approx(77 / 255)
    assert std[0] == pytest.approx((grey[:, 0] / 255.0).double().std(correction=0).item())


def test_bytes_and_floats_of_the_same_picture_are_normalised_alike():
    x, data = pictures(3), D.synthetic(n_train=20, n_test=10)
    data = data._replace(mean=(0.3, 0.5, 0.7), std=(0.1, 0.2, 0.4))
    assert torch.equal(data.normalise(x), data.normalise(x.float() / 255))
    assert data.normalise(x)[1, 2, 3, 4] == pytest.approx(
        (x[1, 2, 3, 4].item() / 255 - 0.7) / 0.4, rel=1e-5)


def test_a_byte_is_divided_by_255_to_its_last_bit():
    # b * (1 / 255), as torchvision has it, is another float for some of the 256 bytes
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal(D.unit(x)[0, 0].flatten(), torch.arange(256) / 255)
    assert not torch.equal(D.v2.functional.to_dtype(x, scale=True), D.unit(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_standardising_is_torchvisions_normalize_to_its_last_bit(dtype):
    x = (torch.arange(256) / 255).to(dtype).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    for mean, std in ((D.synthetic(n_train=20, n_test=10)[7:]), ((0.485, 0.456, 0.406), (1, 3, 7))):
        assert torch.equal(D.standardise(x, mean, std), D.v2.functional.normalize(x, mean, std))
        assert torch.equal(D.per_channel(std, x), x.new_tensor(std).view(3, 1, 1))


# --- augmentation ---

def test_no_augmentation_changes_nothing():
    x = pictures(5)
    torch.testing.assert_close(D.augment(x, "none", rng()), x.float() / 255)
    with pytest.raises(ValueError, match="no augmentation 'ligth'"):
        D.augment(x, "ligth", rng())


def test_a_cropped_and_flipped_image_is_made_of_its_own_pixels():
    # Every pixel carries its own address in its three bytes: image, row, column.
    n = 200
    address = torch.stack(torch.meshgrid(*map(torch.arange, (n, 32, 32)), indexing="ij"), dim=1)
    out = D.crop_and_flip(address.to(torch.uint8), rng()).long()
    image, row, column = out.unbind(1)
    assert torch.equal(image, torch.arange(n)[:, None, None].expand(-1, 32, 32))
    # Rows move together, by at most 4, and come back at the border: reflect(i + shift).
    shifts = set()
    for b in range(n):
        assert (row[b] == row[b, :, :1]).all() and (column[b] == column[b, :1]).all()
        r, c = row[b, :, 0].numpy(), column[b, 0].numpy()
        padded = np.pad(np.arange(32), 4, mode="reflect")
        down = [s for s in range(-4, 5) if (padded[4 + s:36 + s] == r).all()]
        right = [(s, f) for s in range(-4, 5) for f in (1, -1)
                 if (padded[4 + s:36 + s][::f] == c).all()]
        assert len(down) == 1 and len(right) == 1
        shifts.add((down[0], *right[0]))
    assert {s[0] for s in shifts} == {s[1] for s in shifts} == set(range(-4, 5))
    assert {s[2] for s in shifts} == {1, -1}


@pytest.mark.parametrize("strength", ["light", "heavy"])
def test_every_sample_draws_its_own(strength):
    same = pictures(1).expand(64, -1, -1, -1)
    out = D.augment(same, strength, rng())
    assert len(out.flatten(1).unique(dim=0)) > 50
    assert out.dtype == torch.float32 and out.min() >= 0 and out.max() <= 1


@pytest.mark.parametrize("strength", ["light", "heavy"])
def test_the_same_seed_draws_the_same_batch(strength):
    x = pictures(16)
    torch.manual_seed(1)
    first = D.augment(x, strength, rng(3))
    torch.manual_seed(2)                       # nothing is drawn from the global generator
    assert torch.equal(first, D.augment(x, strength, rng(3)))
    assert not torch.equal(first, D.augment(x, strength, rng(4)))


def test_half_of_the_images_are_warped_and_the_others_are_left_sharp():
    x = D.unit(pictures(400))
    moved = (D.warp(x, rng()) - x).abs().amax((1, 2, 3)) > 1e-3
    assert 160 < moved.sum() < 240


def test_a_warp_keeps_the_centre_near_the_centre():
    # One bright spot in the middle stays within the shift of 0.15 * 16 = 2.4 pixels (+ its blur).
    x = torch.zeros(300, 3, 32, 32)
    x[:, :, 15:17, 15:17] = 1
    at = torch.arange(32) - 15.5
    out = D.warp(x, rng())[:, 0]
    mass = out.sum((1, 2))
    cy, cx = (out.sum(2) @ at) / mass, (out.sum(1) @ at) / mass
    assert max(cy.abs().max(), cx.abs().max()) < 1.5 * 2.4 + 0.5
    assert cy.std() > 0.5 and cx.std() > 0.5


def test_a_colour_operation_leaves_every_edge_where_it_is():
    # A picture of two flat halves is two flat halves after any of them, in colours of its own.
    x = torch.empty(600, 3, 32, 32)
    x[..., :16] = torch.tensor([0.95, 0.5, 0.1])[:, None, None]
    x[..., 16:] = torch.tensor([0.2, 0.3, 0.8])[:, None, None]
    out = D.recolour(x, rng())
    torch.testing.assert_close(out, torch.cat([out[..., :1].expand(-1, -1, 32, 16),
                                               out[..., 31:].expand(-1, -1, 32, 16)], dim=3))
    unchanged = ((out - x).abs().amax((1, 2, 3)) < 1e-6).float().mean()
    assert 0.12 < unchanged < 0.22             # 1 in 6
    left = out[:, :, 0, 0]
    assert (left[:, 2] > left[:, 0]).any()     # solarised: the brightest channel is now the darkest
    assert (left.std(1) < 0.15).any()          # nearly grey
    assert (left.amax(1) > 0.99).any()         # bright
    assert (left.amax(1) < 0.5).any()          # dark


def test_one_sample_in_six_is_left_with_few_tones():
    # A ramp of 32 tones keeps 18 or more of them when stretched; posterised it has 5 to 13.
    ramp = torch.linspace(0, 1, 32).expand(600, 3, 32, 32)
    tones = torch.tensor([len(row.unique()) for row in D.recolour(ramp, rng())[:, 0, 0]])
    few = tones[(tones > 1) & (tones <= 13)]
    assert 70 < len(few) < 130
    assert few.min() == 5 and few.max() > 10


def test_a_quarter_of_the_images_lose_one_flat_box():
    x = D.unit(pictures(800))
    out = D.erase(x, rng())
    gone = (out != x).any(dim=1)               # (B, 32, 32)
    hit = gone.any((1, 2))
    assert 150 < hit.sum() < 250
    assert 0.01 < gone[hit].float().mean() < 0.33
    height, width = gone[hit].any(2).sum(1), gone[hit].any(1).sum(1)
    assert (height > 2 * width).sum() > 10 and (width > 2 * height).sum() > 10
    for image, hole in zip(out[hit][:50], gone[hit][:50], strict=True):
        assert (image[:, hole] == image[:, hole][:, :1]).all()             # one colour
        rows, columns = hole.any(1), hole.any(0)
        assert torch.equal(hole, rows[:, None] & columns)                  # and a rectangle
        assert (rows.nonzero().diff(dim=0) == 1).all()                     # without a gap
        assert (columns.nonzero().diff(dim=0) == 1).all()


# --- mixing ---

def mixed(mixup, cutmix, seed=0, n=40):
    """n images, image i everywhere i and of class i: its mean says what its target must."""
    x = torch.arange(float(n)).view(n, 1, 1, 1).expand(-1, 3, 32, 32)
    return D.mix(x, torch.arange(n), n, mixup, cutmix, seed)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0), (0, 1.0), (0.8, 1.0), (0.01, 0.01)])
def test_mixed_targets_sum_to_one_and_name_the_images_that_were_mixed(mixup, cutmix):
    for seed in range(10):
        x, y = mixed(mixup, cutmix, seed)
        torch.testing.assert_close(y.sum(1), torch.ones(40))
        # e.g. 3 with a quarter of 7 in it: mean pixel 0.75 * 3 + 0.25 * 7 = target . (0..39)
        torch.testing.assert_close(x.mean((1, 2, 3)), y @ torch.arange(40.0), rtol=1e-4, atol=1e-4)


def test_without_mixing_images_stay_and_labels_become_one_hot():
    x = torch.rand(4, 3, 32, 32)
    same, y = D.mix(x, torch.tensor([2, 0, 1, 2]), 3, 0, 0, seed=0)
    assert same is x and y.tolist() == [[0, 0, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1]]


def test_cutmix_labels_follow_the_pasted_area():
    x, y = mixed(0, 1.0)
    for i in range(40):                        # two kinds of pixels, and the label counts them
        own = (x[i, 0] == i).float().mean()
        assert y[i, i] == pytest.approx(own.item(), abs=1e-6) and 0 < own < 1
        assert len(x[i].unique()) == 2


def test_mixup_blends_every_pixel_alike():
    x, y = mixed(0.8, 0)
    assert (x.flatten(1).std(1) < 1e-5).all() and 0.01 < y[0, 0] < 0.99


def test_a_batch_has_one_lambda_and_the_seed_decides_it():
    lambdas = [mixed(0.8, 0, seed)[1].diagonal() for seed in (0, 0, 1, 2)]
    assert all((each == each[0]).all() for each in lambdas)
    assert torch.equal(lambdas[0], lambdas[1]) and len({each[0].item() for each in lambdas}) == 3


def test_mixing_leaves_the_global_generator_as_it_was():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    mixed(0.8, 1.0)
    assert torch.equal(torch.rand(1), expected)


def test_with_both_on_half_of_the_batches_get_each():
    boxed = [mixed(0.8, 1.0, seed, n=2)[0][1].std() > 1e-3 for seed in range(300)]
    assert 120 < sum(boxed) < 170              # a few boxes have no pixel, or all of them


# --- what a run is given ---

@pytest.fixture(scope="module")
def few():
    return D.synthetic(seed=5, n_train=64, n_test=40)


def asked(**flags):
    """A configuration, as far as data.py looks at it."""
    return SimpleNamespace(**dict(labels="fine", split="full", train_images=0, batch_size=16,
                                  probe_images=5, augment="none", mixup=0.0, cutmix=0.0, seed=0)
                           | flags)


def epoch_of(data, epoch=1, **flags):
    """(images, targets) of a whole epoch."""
    cfg = asked(**flags)
    return tuple(map(torch.cat, zip(*D.batches(cfg, data, D.split(cfg, data), epoch), strict=True)))


def pixels_of(images):
    return {image.numpy().tobytes() for image in images}


def test_every_image_is_trained_on_once_in_an_epoch_but_for_the_rest_of_a_batch(few):
    images, targets = epoch_of(few)
    assert pixels_of(images) == pixels_of(few.normalise(few.train.images))
    label = dict(zip((p.numpy().tobytes() for p in few.normalise(few.train.images)),
                     few.train.fine.tolist(), strict=True))
    for image, target in zip(images, targets, strict=True):
        assert target.argmax() == label[image.numpy().tobytes()] and target.sum() == 1
    assert len(epoch_of(few, batch_size=24)[0]) == 48                     # 64 = 24 + 24 + 16


def test_every_seed_and_every_epoch_has_an_order_of_its_own(few):
    first, again, seed, later = (epoch_of(few, epoch, seed=seed)[0]
                                 for epoch, seed in ((1, 0), (1, 0), (1, 1), (2, 0)))
    assert torch.equal(first, again)
    assert not torch.equal(first, seed) and not torch.equal(first, later)


def test_held_out_images_are_never_trained_on_and_are_the_probe(few):
    sets = D.split(asked(split="val"), few)
    assert len(sets.train[0]) == 58 and len(sets.val[0]) == 6 and len(sets.test[0]) == 40
    assert not pixels_of(sets.train[0]) & pixels_of(sets.val[0])
    assert pixels_of(sets.probe[0]) < pixels_of(sets.val[0])
    assert D.split(asked(), few).val is None


def test_the_probe_is_fixed_and_clean_and_the_shares_are_those_of_every_seed(few):
    one, two = (D.split(asked(seed=seed, train_images=32), few) for seed in (0, 9))
    assert torch.equal(one.probe[0], two.probe[0]) and torch.equal(one.train[0], two.train[0])
    assert len(one.probe[0]) == 5 and one.probe[0].dtype == torch.uint8 and len(one.train[0]) == 32
    assert pixels_of(one.probe[0]) < pixels_of(one.train[0]) < pixels_of(few.train.images)


def test_labels_choose_100_or_20_classes(few):
    fine, coarse = (D.split(asked(labels=labels), few) for labels in ("fine", "coarse"))
    assert torch.equal(fine.train[1] // 5, coarse.train[1]) and coarse.test[1].max() < 20
    assert epoch_of(few, labels="coarse")[1].shape == (64, 20)


def test_augment_says_how_far_an_image_is_from_the_original(few):
    clean, light, heavy = (epoch_of(few, augment=s)[0] for s in ("none", "light", "heavy"))
    originals = pixels_of(few.normalise(few.train.images))
    assert pixels_of(clean) == originals and not pixels_of(heavy) & originals
    assert not torch.equal(clean, light) and not torch.equal(light, heavy)


def test_mixup_and_cutmix_are_each_switched_on_by_their_own_number(few):
    _, blended = epoch_of(few, mixup=0.8)
    pasted, _ = epoch_of(few, cutmix=1.0)
    assert (blended > 0).sum(dim=1).max() == 2
    clean = pixels_of(few.normalise(few.train.images).movedim(1, -1).reshape(-1, 3))
    assert pixels_of(pasted.movedim(1, -1).reshape(-1, 3)) <= clean     # whole pixels, no blend


def test_every_batch_is_mixed_anew_and_another_epoch_in_another_way(few):
    shares = [[y.max(dim=1).values.min().item()
               for y in epoch_of(few, epoch, mixup=0.8)[1].split(16)] for epoch in (1, 1, 2)]
    assert shares[0] == shares[1] and len({*shares[0], *shares[2]}) == 8


# --- where the data comes from ---

def write_tar(path, folder, files):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.fixture()
def tiny(tmp_path, monkeypatch):
    """A CIFAR-100 of 7 + 5 random images in the official layout; torchvision checks its md5s."""
    def part(n, seed):
        pixels = np.random.default_rng(seed).integers(0, 256, (n, 3072), dtype=np.uint8)
        return {"data": pixels, "fine_labels": [10 + i for i in range(n)],
                "coarse_labels": [(3 * i) % 20 for i in range(n)]}

    meta = {"fine_label_names": [f"fine{i}" for i in range(100)],
            "coarse_label_names": [f"coarse{i}" for i in range(20)]}
    parts = {"train": part(7, 0), "test": part(5, 1), "meta": meta}
    files = {name: pickle.dumps(content) for name, content in parts.items()}
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    archive = tmp_path / "tiny.tar.gz"
    write_tar(archive, D.CIFAR100.base_folder, files)
    monkeypatch.setattr(D.CIFAR100, "train_list", [["train", md5["train"]]])
    monkeypatch.setattr(D.CIFAR100, "test_list", [["test", md5["test"]]])
    monkeypatch.setattr(D.CIFAR100, "meta", D.CIFAR100.meta | {"md5": md5["meta"]})
    monkeypatch.setattr(D.CIFAR100, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(D.CIFAR100, "url", "http://127.0.0.1:9/nobody-listens-here")
    monkeypatch.setenv("no_proxy", "*")

    class Tiny:
        content, bytes = parts, archive.read_bytes()
        data_dir = tmp_path / "data"

        def unpack(self):
            folder = self.data_dir / D.CIFAR100.base_folder
            folder.mkdir(parents=True)
            for name, content in files.items():
                (folder / name).write_bytes(content)
            return folder
    return Tiny()


@contextlib.contextmanager
def server(monkeypatch, body, chunk=1 << 20, pause=0.0, announce=None):
    """An archive on the loopback, sent in chunks with a pause after each."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(announce or len(body)))
            self.end_headers()
            with contextlib.suppress(ConnectionError):
                for at in range(0, len(body), chunk):
                    self.wfile.write(body[at:at + chunk])
                    time.sleep(pause)

        def log_message(self, *_):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(D.CIFAR100, "url", f"http://127.0.0.1:{httpd.server_port}/cifar.tar.gz")
    try:
        yield
    finally:
        httpd.shutdown()


def nothing_left_in(folder):
    return not folder.exists() or not list(folder.iterdir())


def test_the_layout_of_cifar100_is_read_as_it_is(tiny):
    tiny.unpack()
    data = D.load("auto", tiny.data_dir)
    assert data.name == "cifar100" and str(tiny.data_dir) in data.note
    for name, split in (("train", data.train), ("test", data.test)):
        content = tiny.content[name]
        n = len(content["data"])
        assert split.images.dtype == torch.uint8 and split.images.is_contiguous()
        assert (split.images.numpy() == content["data"].reshape(n, 3, 32, 32)).all()
        assert split.fine.tolist() == content["fine_labels"] and split.fine.dtype == torch.int64
        assert split.coarse.tolist() == content["coarse_labels"]
    assert data.fine_names[7] == "fine7" and data.coarse_names[7] == "coarse7"
    assert data.md5 == D.CIFAR100.tgz_md5
    assert data.mean == pytest.approx((data.train.images.double() / 255).mean((0, 2, 3)).tolist())


@pytest.fixture()
def small(monkeypatch):
    real = D.synthetic
    monkeypatch.setattr(D, "synthetic", lambda: real(n_train=20, n_test=10))


def test_auto_on_a_cpu_takes_the_built_in_set_and_says_how_to_get_the_other(tiny, small):
    data = D.load("auto", tiny.data_dir)
    assert data.name == "synthetic" and nothing_left_in(tiny.data_dir)
    assert "CIFAR-100 is not in" in data.note and "`python train.py --data cifar100" in data.note
    assert f"--data_dir {tiny.data_dir}`" in data.note
    assert "as asked" in D.load("synthetic", tiny.data_dir).note


def test_the_built_in_set_is_taken_when_asked_for_even_beside_cifar100(tiny, small):
    tiny.unpack()
    assert D.load("synthetic", tiny.data_dir).name == "synthetic"


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="choose auto, cifar100, cifar10, synthetic or folder:DIR"):
        D.load("cifar1000")


def test_cifar10_is_read_from_its_archive_and_has_one_set_of_labels(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    parts = {name: {"data": rng.integers(0, 256, (n, 3072), dtype=np.uint8),
                    "labels": [(3 * i) % 10 for i in range(n)]}
             for name, n in (("data_batch_1", 4), ("data_batch_2", 3), ("test_batch", 5))}
    files = {name: pickle.dumps(content) for name, content in parts.items()}
    files["batches.meta"] = pickle.dumps({"label_names": [f"class{i}" for i in range(10)]})
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    archive = tmp_path / D.CIFAR10.filename
    write_tar(archive, D.CIFAR10.base_folder, files)
    monkeypatch.setattr(D.CIFAR10, "train_list", [[f"data_batch_{i}", md5[f"data_batch_{i}"]]
                                                  for i in (1, 2)])
    monkeypatch.setattr(D.CIFAR10, "test_list", [["test_batch", md5["test_batch"]]])
    monkeypatch.setattr(D.CIFAR10, "meta", D.CIFAR10.meta | {"md5": md5["batches.meta"]})
    monkeypatch.setattr(D.CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    for data_dir in (tmp_path, tmp_path, tmp_path / D.CIFAR10.base_folder):     # unpacked only once
        data = D.load("cifar10", data_dir, may_download=False)
        assert data.name == "cifar10" and "CIFAR-10 from" in data.note
        pixels = np.concatenate([parts[f"data_batch_{i}"]["data"] for i in (1, 2)])
        assert (data.train.images.numpy() == pixels.reshape(7, 3, 32, 32)).all()
        assert data.train.fine.tolist() == [0, 3, 6, 9, 0, 3, 6]
        assert data.test.fine.tolist() == [0, 3, 6, 9, 2]
        assert data.fine_names[3] == "class3" and data.md5 == D.CIFAR10.tgz_md5
    with pytest.raises(ValueError, match="cifar10 has no coarse labels: leave --labels out"):
        D.class_names(SimpleNamespace(labels="coarse"), data)
    with pytest.raises(ValueError, match=r"CIFAR-10 is not in .*--data cifar10 to download it"):
        D.load("cifar10", tmp_path / "elsewhere", may_download=False)


# --- a folder of pictures ---

def paint(folder, names, width=40, height=24):
    """Pictures of one grey each: their number, in steps of 10."""
    folder.mkdir(parents=True)
    for i, name in enumerate(names):
        Image.new("RGB", (width, height), (10 * i,) * 3).save(folder / name)


def test_a_folder_of_pictures_is_a_data_set_with_a_fixed_tenth_for_the_test(tmp_path):
    for kind in ("cat", "dog"):
        paint(tmp_path / kind, [f"{i:02}.png" for i in range(15)])
    data, again = (D.load(f"folder:{tmp_path}", size=16) for _ in range(2))
    assert data.train.images.shape == (27, 3, 16, 16) and data.test.images.shape == (3, 3, 16, 16)
    assert data.fine_names == ["cat", "dog"] and not data.coarse_names
    # every picture is in one split, with the class of its folder
    found = sorted((y, x[0, 0, 0].item()) for part in (data.train, data.test)
                   for x, y in zip(part.images, part.fine.tolist(), strict=True))
    assert found == [(y, 10 * i) for y in (0, 1) for i in range(15)]
    assert data.md5 == again.md5 and torch.equal(data.test.images, again.test.images)
    assert "2 classes, a fixed tenth" in data.note and str(tmp_path) in data.note
    (tmp_path / "cat/00.png").unlink()
    assert D.load(f"folder:{tmp_path}", size=16).md5 != data.md5


def test_a_test_folder_is_the_test_and_its_classes_are_those_of_the_training(tmp_path):
    for part, n in (("train", 4), ("test", 2)):
        for kind in ("cat", "dog"):
            paint(tmp_path / part / kind, [f"{i}.png" for i in range(n)])
    data = D.load(f"folder:{tmp_path}", size=8)
    assert data.train.fine.tolist() == [0] * 4 + [1] * 4 and data.test.fine.tolist() == [0, 0, 1, 1]
    paint(tmp_path / "test/emu", ["0.png"])
    with pytest.raises(ValueError, match="train/ and test/ must hold the same classes"):
        D.load(f"folder:{tmp_path}")


def test_of_an_oblong_picture_the_middle_is_kept_undistorted(tmp_path):
    picture = Image.new("RGB", (96, 32))
    picture.paste((255, 0, 0), (32, 0, 64, 32))             # the middle third is red
    picture.save(tmp_path / "x.png")
    x = D.square(tmp_path / "x.png", 32)
    assert (x == torch.tensor([255, 0, 0], dtype=torch.uint8).view(3, 1, 1)).all()


def test_a_handful_of_pictures_has_no_tenth(tmp_path):
    paint(tmp_path / "cat", [f"{i}.png" for i in range(9)])
    with pytest.raises(ValueError, match=r"has 9 pictures, of which a tenth .*bring 10 or more"):
        D.load(f"folder:{tmp_path}", size=8)
    paint(tmp_path / "dog", ["9.png"])
    assert len(D.load(f"folder:{tmp_path}", size=8).test.fine) == 1


def test_a_split_without_held_out_images_is_refused_and_tests_nothing(tmp_path):
    for part, n in (("train", 4), ("test", 2)):
        for kind in ("cat", "dog"):
            paint(tmp_path / part / kind, [f"{i}.png" for i in range(n)])
    data = D.load(f"folder:{tmp_path}", size=8)
    cfg = SimpleNamespace(labels="fine", split="val", train_images=0, batch_size=2, probe_images=1)
    with pytest.raises(ValueError, match=r"--split val holds a tenth .* has 8: bring 10 or more"):
        D.split(cfg, data)


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_a_picture_of_more_than_8_bits_is_refused_and_not_cut_off(tmp_path, mode):
    Image.new(mode, (8, 8), 40_000).save(tmp_path / "x.tiff")
    with pytest.raises(OSError, match=r"x\.tiff has more than 8 bits a channel: save it with 8"):
        D.square(tmp_path / "x.tiff", 8)


def test_a_damaged_note_on_how_a_camera_was_held_costs_no_picture(tmp_path, monkeypatch):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "x.png")

    def damaged(picture):
        raise struct.error("required argument is not an integer")

    monkeypatch.setattr(Image.Image, "getexif", damaged)
    assert (D.square(tmp_path / "x.png", 8)[0] == 255).all()


@pytest.mark.parametrize("held, corner", [
    (1, (0, 0)), (2, (0, 1)), (3, (1, 1)), (4, (1, 0)), (5, (0, 0)), (6, (0, 1)), (7, (1, 1)),
    (8, (1, 0)), (9, (0, 0))])
def test_each_way_to_hold_a_camera_has_its_turn(tmp_path, held, corner):
    exif = Image.Exif()
    exif[0x0112] = held
    picture = Image.new("RGB", (2, 2), "black")
    picture.putpixel((0, 0), (255, 255, 255))               # where does the first pixel belong?
    picture.save(tmp_path / "x.png", exif=exif)
    bright = (D.square(tmp_path / "x.png", 2)[0] == 255).nonzero()
    assert bright.tolist() == [list(corner)]


@pytest.mark.skipif(os.name == "nt", reason="a link needs rights on Windows")
def test_a_picture_that_a_link_makes_two_of_is_refused(tmp_path):
    for kind in ("cat", "dog"):
        paint(tmp_path / kind, [f"{i}.png" for i in range(12)])
    assert len(D.load(f"folder:{tmp_path}", size=8).train.fine) == 22
    (tmp_path / "all").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(ValueError, match="holds a picture twice, by a link"):
        D.load(f"folder:{tmp_path}", size=8)


def test_a_class_that_has_only_test_pictures_is_refused_by_name(tmp_path):
    paint(tmp_path / "many", [f"{i}.png" for i in range(10)])
    paint(tmp_path / "one", ["0.png"])
    drawn = torch.randperm(11, generator=torch.Generator().manual_seed(0))[0]
    assert drawn == 10                                      # the last, which is the lone one
    with pytest.raises(ValueError, match="has no picture of one to learn from, but in the test"):
        D.load(f"folder:{tmp_path}", size=8)


def test_a_folder_without_a_name_is_an_unset_variable():
    with pytest.raises(ValueError, match="--data folder: names no folder: give one"):
        D.load("folder:")


def test_a_picture_that_is_too_large_to_be_one_is_refused_by_name(tmp_path, monkeypatch):
    Image.new("L", (80, 80)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000)
    with pytest.raises(OSError, match=r"x\.png is no picture that can be read"):
        D.square(tmp_path / "x.png", 8)


def test_an_alpha_may_be_a_whole_number():
    mixed = [D.mix(X, Y, 100, a, 0, seed=3) for a in (1, 1.0)]
    assert all(torch.equal(one, other) for one, other in zip(*mixed, strict=True))
    assert not torch.equal(mixed[0][0], X)


@pytest.mark.parametrize("parts", [["train", "val"], ["train"], ["Train", "validation"]])
def test_parts_of_a_data_set_are_not_taken_for_its_classes(tmp_path, parts):
    for part in parts:
        paint(tmp_path / part / "cat", [f"{i}.png" for i in range(12)])
    with pytest.raises(ValueError, match=r"which are no classes: it must hold"):
        D.load(f"folder:{tmp_path}", size=8)


def test_a_broken_picture_is_named(tmp_path):
    paint(tmp_path / "cat", [f"{i}.jpg" for i in range(12)])
    whole = (tmp_path / "cat/7.jpg").read_bytes()
    (tmp_path / "cat/7.jpg").write_bytes(whole[:-9])
    with pytest.raises(ValueError, match=r"7\.jpg is no picture that can be read \(.*runcated"):
        D.load(f"folder:{tmp_path}", size=8)


@pytest.mark.parametrize("prepare, sentence", [
    (lambda folder: None, "cannot be read"),
    (lambda folder: (folder / "cat").mkdir(), "cannot be read .*cat"),
    (lambda folder: (paint(folder / "cat", ["0.png"]), (folder / "cat/1.png").write_text("no")),
     "cannot be read .*1.png")])
def test_what_is_no_folder_of_pictures_is_a_sentence(tmp_path, prepare, sentence):
    prepare(tmp_path)
    with pytest.raises(ValueError, match=sentence) as error:
        D.load(f"folder:{tmp_path}")
    assert "a folder of pictures per class" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("S", [24, 64])
def test_pictures_of_another_size_are_resized_and_standardised_anew(S):
    data = D.load("synthetic", size=S)
    assert data.train.images.shape[1:] == (3, S, S) and data.train.images.dtype == torch.uint8
    assert f"made {S} pixels wide" in data.note
    x = data.normalise(data.train.images[:2000])
    assert x.mean().abs() < 0.05 and (x.std() - 1).abs() < 0.05
    for strength in ("none", "light", "heavy"):
        assert D.augment(data.train.images[:5], strength, rng()).shape == (5, 3, S, S)


def test_a_picture_of_64_pixels_is_cropped_by_up_to_eight():
    rows = torch.arange(64, dtype=torch.uint8).view(1, 1, 64, 1).expand(500, 3, 64, 64)
    first = D.crop_and_flip(rows, rng())[:, 0, 0, 0].long()         # where the window begins
    assert set(first.tolist()) == set(range(9))                     # reflected: 8 above is 8 below


def test_a_download_arrives_whole_and_is_unpacked(tiny, monkeypatch):
    with server(monkeypatch, tiny.bytes):
        data = D.load("cifar100", tiny.data_dir)
    assert "downloaded" in data.note and data.train.fine.tolist() == list(range(10, 17))
    assert {p.name for p in tiny.data_dir.iterdir()} == {D.CIFAR100.filename,
                                                         D.CIFAR100.base_folder}
    assert (tiny.data_dir / D.CIFAR100.filename).read_bytes() == tiny.bytes
    assert "downloaded" not in D.load("cifar100", tiny.data_dir).note      # no second time


def test_what_another_process_brought_meanwhile_is_not_brought_again(tiny, monkeypatch):
    """The archive's address is nobody's: a second download would fail."""
    @contextlib.contextmanager
    def claim(folder, *_):
        tiny.unpack()                                       # while this one waited for its turn
        yield

    monkeypatch.setattr(D, "claim", claim)
    assert D.load("cifar100", tiny.data_dir).train.fine.tolist() == list(range(10, 17))


def test_an_archive_put_there_by_hand_is_unpacked_without_a_network(tiny):
    tiny.data_dir.mkdir()
    (tiny.data_dir / D.CIFAR100.filename).write_bytes(tiny.bytes)
    assert D.load("auto", tiny.data_dir).name == "cifar100"


def test_a_server_that_falls_silent_is_given_up(tiny, monkeypatch):
    monkeypatch.setattr(D, "PATIENCE_S", 0.3)
    before = socket.getdefaulttimeout()
    with (server(monkeypatch, b"x" * 100, chunk=50, pause=3),
          pytest.raises(OSError, match=r"stopped.*timed out.*by hand.*--data synthetic") as stop):
        D.load("cifar100", tiny.data_dir)
    assert D.CIFAR100.url in str(stop.value) and str(tiny.data_dir) in str(stop.value)
    assert nothing_left_in(tiny.data_dir) and socket.getdefaulttimeout() == before


def test_a_server_that_does_not_answer_is_given_up(tiny, monkeypatch):
    monkeypatch.setattr(D, "PATIENCE_S", 0.3)
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        monkeypatch.setattr(D.CIFAR100, "url", f"http://127.0.0.1:{deaf.getsockname()[1]}/x")
        with pytest.raises(OSError, match=r"stopped.*timed out.*--data synthetic"):
            D.load("cifar100", tiny.data_dir)


def test_no_server_is_a_sentence_with_the_way_out(tiny):
    with pytest.raises(OSError, match=r"stopped \(.*refused\).*by hand.*--data synthetic"):
        D.load("cifar100", tiny.data_dir)
    assert nothing_left_in(tiny.data_dir)


@pytest.mark.parametrize("announce", [None, 10_000_000])
def test_a_download_that_arrives_damaged_is_not_kept(tiny, monkeypatch, announce):
    body = tiny.bytes[:-100]
    with (server(monkeypatch, body, announce=announce),
          pytest.raises(OSError, match="md5 of what came is wrong")):
        D.load("cifar100", tiny.data_dir)
    assert nothing_left_in(tiny.data_dir)


@pytest.mark.parametrize("name", ["auto", "cifar100"])
@pytest.mark.parametrize("file", ["train", "test", "meta"])
def test_a_damaged_file_is_named_as_damage_and_never_replaced_in_silence(tiny, name, file):
    path = tiny.unpack() / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1            # one bit
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged: delete it and run again") as damage:
        D.load(name, tiny.data_dir)
    assert str(path.parent) in str(damage.value) and "\n" not in str(damage.value)


def test_a_missing_file_is_damage_too(tiny):
    (tiny.unpack() / "test").unlink()
    with pytest.raises(ValueError, match="is damaged: delete it and run again"):
        D.load("auto", tiny.data_dir)


def test_a_damaged_archive_is_not_fetched_again_unasked(tiny):
    tiny.data_dir.mkdir()
    (tiny.data_dir / D.CIFAR100.filename).write_bytes(tiny.bytes[:-1])
    with pytest.raises(ValueError, match=r"\.tar\.gz is damaged.*delete it"):
        D.load("auto", tiny.data_dir)


def test_an_unreadable_folder_is_a_sentence(tiny, monkeypatch):
    folder = tiny.unpack()

    def refuse(self, *_, **__):
        raise PermissionError(13, "Permission denied", str(self))
    monkeypatch.setattr(Path, "read_bytes", refuse)     # root may read all, so chmod proves nothing
    with pytest.raises(OSError, match=r"Permission denied.*another --data_dir") as no:
        D.load("auto", tiny.data_dir)
    assert str(folder.parent) in str(no.value) and "Errno" not in str(no.value)


def test_a_data_dir_that_is_a_file_is_a_sentence(tiny, monkeypatch):
    tiny.data_dir.write_bytes(b"")
    with (server(monkeypatch, tiny.bytes),
          pytest.raises(OSError, match=r"cannot be used \(.*\): choose another --data_dir")):
        D.load("cifar100", tiny.data_dir)


@needs_cifar100
def test_the_real_cifar100_has_the_known_mean_and_classes():
    data = D.load("cifar100", REAL)
    assert data.train.images.shape == (50_000, 3, 32, 32) and len(data.test.fine) == 10_000
    assert data.mean == pytest.approx((0.5071, 0.4865, 0.4409), abs=1e-4)
    assert data.std == pytest.approx((0.2673, 0.2564, 0.2762), abs=1e-4)
    assert data.train.fine.bincount().tolist() == [500] * 100
    # Five fine classes in each coarse one: maple, oak, palm, pine and willow are trees.
    trees = data.train.fine[data.train.coarse == data.coarse_names.index("trees")].unique()
    assert [data.fine_names[i] for i in trees] == [
        "maple_tree", "oak_tree", "palm_tree", "pine_tree", "willow_tree"]


# --- what is refused ---

SET = D.synthetic(n_train=250, n_test=250)
X, Y = torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 99])


def a_mix(images=X, labels=Y, n_classes=100, mixup=0.5, cutmix=0.5):
    return lambda: D.mix(images, labels, n_classes, mixup, cutmix, seed=0)


REFUSED = [
    *((a_mix(**{kind: a}), f"{kind} cannot be {a}: choose 0 or more")
      for kind in ("mixup", "cutmix") for a in (-1, -1e-9, float("nan"), float("inf"))),
    *((a_mix(labels=y, mixup=on), r"labels must be \(4\), not") for on in (0, 1)
      for y in (Y[:3], Y[:1], Y[None])),
    *((a_mix(labels=Y + i, mixup=on), "labels must be 0 to 99, not ") for on in (0, 1)
      for i in (-1, 1, 2**40)),
    *((a_mix(images=x), r"images must be \(B, 3, H, W\), not")
      for x in (X[:0], X[0], X[:, :1], X.mT[..., None])),
    *((a_mix(images=(255 * X).to(dtype)), f"images must be float, not {dtype}: mix them after")
      for dtype in (torch.uint8, torch.int64)),
    *((lambda x=x: SET.normalise(x), "images must be .*3.*, not")
      for x in (X[:, :1], X[:, :2], X.permute(0, 2, 3, 1), X[0, 0], torch.rand(4, 4, 32, 32))),
    *((lambda s=s: D.augment(X, s, rng()), f"there is no augmentation {s!r}: choose none, light or")
      for s in ("ligth", "", None)),
    *((lambda x=x, s=s: D.augment(x, s, rng()), r"images must be \(B, 3, .*\), not")
      for s in ("none", "light", "heavy")
      for x in (X[:0], X[0], X[:, :1], torch.rand(4, 3, 16, 64))),
    *((lambda i=i: D.draw(Y + i, rng()), "fine must be 0 to 99, not ") for i in (-1, 1)),
    (lambda: D.draw(Y[None], rng()), r"fine must be \(B\), not"),
    *((lambda x=x: D.channel_stats(x), "images must be ") for x in (X, X[:0], X[0], X[:, :1])),
]


@pytest.mark.parametrize("call, sentence", REFUSED)
def test_what_is_no_batch_of_pictures_is_refused_in_a_sentence(call, sentence):
    with pytest.raises((ValueError, TypeError), match=sentence):
        call()


def test_pictures_in_float64_stay_there():
    assert SET.normalise(X.double()).dtype == torch.float64
