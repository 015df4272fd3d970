"""data.py -- which images is the model shown, and what happens to them on the way?

CIFAR-100 where it can be had, and otherwise a built-in set of drawn puzzles with the same shape:
100 fine classes in 20 coarse ones. Or CIFAR-10, or a folder of your own pictures. Each is one uint8
tensor that lives on the device, and every step from there to the model is batched tensor code: no
worker processes, no Python per image.

    B images of a batch, n images of a split; every picture is (3, S, S), S pixels on a side

Where a function takes `cfg`, it is the `Config` of train.py, whose flags say what is asked for.
"""
import contextlib
import hashlib
import http.client
import math
import os
import pickle
import shutil
import socket
import sys
from pathlib import Path
from typing import NamedTuple

from checkpoint import claim

import torch
import torch.nn.functional as F
from PIL import ExifTags, Image
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100, ImageFolder
from torchvision.datasets.utils import check_integrity, extract_archive
from torchvision.transforms import v2

from router import expect

SIZE = 32            # S of CIFAR and of the drawn pictures
PATIENCE_S = 10      # seconds a server may take to answer, or to send its next bytes
AGAIN = "run again, or train with --data synthetic"


class Split(NamedTuple):
    images: Tensor   # (n, 3, S, S) uint8
    fine: Tensor     # (n,) int64, in CIFAR-100 0..99
    coarse: Tensor   # (n,) int64, in CIFAR-100 0..19; the fine ones where a set has one kind alone


class Data(NamedTuple):
    name: str                           # "cifar100", "cifar10", "synthetic" or "folder:DIR"
    note: str                           # what was chosen and why, in one sentence
    md5: str                            # of CIFAR's archive, or of the bytes of all pictures
    train: Split
    test: Split
    fine_names: list[str]
    coarse_names: list[str]             # empty where a set has none
    mean: tuple[float, float, float]    # of the training images in [0, 1], per channel
    std: tuple[float, float, float]

    def normalise(self, images):
        """uint8, or float in [0, 1], (B, 3, S, S) -> float, mean 0 and std 1 per channel."""
        expect("images", images, *images.shape[:-3], 3, *images.shape[-2:])
        return standardise(unit(images), self.mean, self.std)

    def shown(self):
        """What a trained model must still know of it, in primitives: all but the pictures."""
        return {name: value for name, value in self._asdict().items()
                if name not in ("note", "train", "test")}


def unit(images):
    """Bytes become float32 in [0, 1]; what is float already passes."""
    # not v2's to_dtype: it multiplies by 1/255, which would move the last bit of every number
    return images if images.is_floating_point() else images.float() / 255


def standardise(images, mean, std):
    """Float images (B, 3, S, S) less `mean` and divided by `std`, three numbers each."""
    # not v2's normalize: it copies the six numbers to the device, and the host waits for a GPU
    return images.sub(per_channel(mean, images)).div_(per_channel(std, images))


def per_channel(numbers, images):
    """Three numbers as a tensor (3, 1, 1) like `images`, filled in on their device."""
    return torch.stack([images.new_full((1, 1), number) for number in numbers])


def load(name="auto", data_dir="data", device="cpu", may_download=True, size=SIZE):
    """The data set by name, on the device; `auto` never chooses in silence: see Data.note.

    Pictures of another size are made `size` pixels wide.
    """
    if not (name in ("auto", "synthetic", *TITLES) or name.startswith("folder:")):
        raise ValueError(f"there is no data set {name!r}: choose auto, cifar100, cifar10, "
                         f"synthetic or folder:DIR")
    on_cpu, data = torch.device(device).type == "cpu", None
    if name.startswith("folder:"):
        if name == "folder:":                               # an unset variable, most likely
            raise ValueError("--data folder: names no folder: give one, as folder:DIR")
        data = pictures(name, Path(name.removeprefix("folder:")).expanduser(), size)
    elif name != "synthetic":
        C = CIFAR10 if name == "cifar10" else CIFAR100
        data = cifar(C, data_dir, may_download and (name != "auto" or not on_cpu))
    if data is None and name in TITLES:
        raise ValueError(f"{TITLES[name]} is not in {data_dir}/: say where with --data_dir, or add "
                         f"--data {name} to download it there")
    if data is None:
        where = "" if str(data_dir) == "data" else f" --data_dir {data_dir}"
        note = "the built-in synthetic set, as asked" if name == "synthetic" else (
            f"the built-in synthetic set, because CIFAR-100 is not in {data_dir}/ and a CPU run "
            f"downloads nothing unasked; `python train.py --data cifar100{where}` would fetch it")
        data = synthetic()._replace(note=note)
    if data.train.images.shape[-1] != size:
        train, test = (part._replace(images=resized(part.images, size))
                       for part in (data.train, data.test))
        mean, std = channel_stats(train.images)
        data = data._replace(train=train, test=test, mean=mean, std=std,
                             note=f"{data.note}, made {size} pixels wide")
    train, test = (Split(*(t.to(device) for t in part)) for part in (data.train, data.test))
    return data._replace(train=train, test=test)


def resized(images, size):
    return torch.cat([v2.functional.resize(some, [size, size], antialias=True)
                      for some in images.split(1000)])


def channel_stats(images):
    """Mean and std per channel in [0, 1]; exact, and small in memory, from three histograms."""
    expect("images", images, "n", 3, *images.shape[2:])
    if images.dtype != torch.uint8:
        raise TypeError(f"images must be uint8, not {images.dtype}")
    value = torch.arange(256, dtype=torch.float64) / 255
    mean, std = [], []
    for channel in images.unbind(1):
        share = channel.flatten().bincount(minlength=256).double() / channel.numel()  # (256,)
        mean.append((share * value).sum().item())
        # a channel that never changes becomes 0
        std.append((share * (value - mean[-1]).square()).sum().sqrt().item() or 1.0)
    return tuple(mean), tuple(std)


# --- CIFAR (Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009) ---

TITLES = {"cifar100": "CIFAR-100", "cifar10": "CIFAR-10"}


def cifar(C, data_dir="data", fetch=True):
    """torchvision's C, CIFAR100 or CIFAR10, from `data_dir`, its md5s checked; if it is not there,
    download it or, without `fetch`, return None."""
    name, data_dir = C.__name__.lower(), Path(data_dir)
    title = TITLES[name]
    if data_dir.name == C.base_folder and (data_dir / C.meta["filename"]).exists():
        data_dir = data_dir.parent             # the set's own folder was named
    folder, archive = data_dir / C.base_folder, data_dir / C.filename
    note = f"{title} from {data_dir}/, md5 checked"
    try:
        found, damaged = read_folder(C, data_dir), folder.exists()
        if found is None and (archive.exists() or (fetch and not damaged)):
            with claim(data_dir, f"to bring {title}", "--data_dir"):
                found = read_folder(C, data_dir)    # another run may have brought it meanwhile
                if found is None and not archive.exists():
                    download(C, archive)
                    note = f"{title}, downloaded to {data_dir}/, md5 checked"
                if found is None:
                    unpack(C, archive, folder)
                    found = read_folder(C, data_dir)
                    note += ", unpacked again, for its folder was damaged" if damaged else ""
    except OSError as error:
        if error.strerror is None:             # already a sentence
            raise
        raise OSError(f"{data_dir}/ cannot be used ({error.strerror}): choose another --data_dir, "
                      "or train with --data synthetic") from error
    if found is None and damaged:
        raise ValueError(f"{title} in {folder}/ is damaged: delete it and {AGAIN}")
    if found is None:
        return None
    splits, fine_names, coarse_names = found
    return Data(name, note, C.tgz_md5, *splits, fine_names, coarse_names,
                *channel_stats(splits[0].images))


def read_folder(C, data_dir):
    """The unpacked set: (train, test), fine and coarse names; None where it is missing or damaged.
    """
    folder, splits = data_dir / C.base_folder, []
    try:
        parts = {"train": C(data_dir, train=True), "test": C(data_dir, train=False)}
    except RuntimeError:                       # how torchvision says missing, or md5 wrong
        return None
    for file, part in parts.items():
        fine = coarse = torch.tensor(part.targets)
        if C is CIFAR100:       # torchvision keeps only the fine labels; its pickles are checked
            pickled = pickle.loads((folder / file).read_bytes(), encoding="latin1")
            coarse = torch.tensor(pickled["coarse_labels"])
        images = torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous()
        splits.append(Split(images, fine, coarse))
    coarse_names = [] if C is CIFAR10 else pickle.loads(
        (folder / "meta").read_bytes(), encoding="latin1")["coarse_label_names"]
    return splits, parts["train"].classes, coarse_names


def unpack(C, archive, folder):
    """Put a sound archive's folder in place whole, instead of a damaged one if there is one."""
    if not check_integrity(archive, C.tgz_md5):
        raise ValueError(f"{archive} is damaged (its md5 is wrong): delete it and {AGAIN}")
    aside = folder.with_name(".unpacked")      # the caller has claimed the place
    shutil.rmtree(aside, ignore_errors=True)
    extract_archive(archive, aside)
    if folder.exists():
        folder.rename(aside / "damaged")
    (aside / folder.name).rename(folder)
    shutil.rmtree(aside, ignore_errors=True)


def download(C, archive):
    """Fetch the archive whole and with the right md5, or give up in a sentence."""
    part = archive.with_name(f".{archive.name}.part")      # half an archive never has the real name
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE_S)       # torch would wait for a silent server for ever
    try:
        torch.hub.download_url_to_file(C.url, str(part), progress=sys.stderr.isatty())
        if not check_integrity(part, C.tgz_md5):
            raise OSError("the md5 of what came is wrong")
        os.replace(part, archive)
    except (OSError, http.client.HTTPException) as error:
        why = getattr(error, "reason", None) or error      # urllib wraps the cause in `reason`
        title = TITLES[C.__name__.lower()]
        raise OSError(f"the download of {title} was stopped ({why}): put {C.url} into "
                      f"{archive.parent}/ by hand, or train with --data synthetic") from error
    finally:
        socket.setdefaulttimeout(patience)
        part.unlink(missing_ok=True)


# --- a folder of pictures ---

def pictures(name, folder, size):
    """A folder per class, as of torchvision's ImageFolder, decoded once.

    In `folder` itself, of which a fixed tenth is then the test, or in its train/ and test/. A
    picture's shorter side is made `size` pixels long and the middle is kept.
    """
    divided = (folder / "train").is_dir() and (folder / "test").is_dir()
    parts = [folder / "train", folder / "test"] if divided else [folder]
    try:
        found = [ImageFolder(part) for part in parts]
        files = [os.path.realpath(file) for part in found for file, _ in part.samples]
        if len(set(files)) < len(files):
            raise ValueError(f"{name} holds a picture twice, by a link, perhaps into the test too: "
                             f"take the link out")
        images = [torch.stack([square(file, size) for file, _ in part.samples]) for part in found]
    except OSError as error:                   # of ImageFolder's, and of a file that is no picture
        why = str(error).splitlines()[0]
        raise ValueError(f"{name} cannot be read ({why}): it must hold a folder of pictures per "
                         f"class, or such folders in train/ and test/") from error
    classes, labels = found[0].classes, [torch.tensor(part.targets) for part in found]
    if {title.lower() for title in classes} <= {"train", "val", "valid", "validation", "test"}:
        raise ValueError(f"{name} holds {'/ and '.join(classes)}/, which are no classes: it must "
                         f"hold a folder of pictures per class, or such folders in train/ and "
                         f"test/")
    if divided and found[1].classes != classes:
        raise ValueError(f"{name}: train/ and test/ must hold the same classes")
    if not divided:
        if len(labels[0]) < 10:
            raise ValueError(f"{name} has {len(labels[0])} pictures, of which a tenth is to be the "
                             f"test: bring 10 or more, or put them into train/ and test/")
        order = torch.randperm(len(labels[0]), generator=torch.Generator().manual_seed(0))
        rows = order[len(order) // 10:], order[:len(order) // 10]
        images, labels = [images[0][r] for r in rows], [labels[0][r] for r in rows]
    if alone := set(labels[1].tolist()) - set(labels[0].tolist()):
        raise ValueError(f"{name} has no picture of {classes[min(alone)]} to learn from, but in "
                         f"the test: bring more of it")
    md5 = hashlib.md5(os.fsencode(" ".join(classes)))
    for tensor in (*images, *labels):
        md5.update(tensor.numpy().tobytes())
    train, test = (Split(x, y, y) for x, y in zip(images, labels, strict=True))
    note = (f"{len(labels[0]):,} training and {len(labels[1]):,} test pictures of {folder}/, "
            f"{len(classes)} classes")
    return Data(name, note if divided else f"{note}, a fixed tenth of them for the test",
                md5.hexdigest(), train, test, classes, [], *channel_stats(train.images))


def upright(picture):
    """A picture as its camera was held, if its EXIF says how; one that is damaged says nothing."""
    turn, held = Image.Transpose, None
    with contextlib.suppress(Exception):                    # the format's parser raises all kinds
        held = picture.getexif().get(ExifTags.Base.Orientation)
    turns = {2: turn.FLIP_LEFT_RIGHT, 3: turn.ROTATE_180, 4: turn.FLIP_TOP_BOTTOM,
             5: turn.TRANSPOSE, 6: turn.ROTATE_270, 7: turn.TRANSVERSE, 8: turn.ROTATE_90}
    return picture.transpose(turns[held]) if held in turns else picture


def square(file, size):
    """A picture's file -> (3, size, size) uint8; OSError where it holds none, or has no 8 bits."""
    try:
        with Image.open(file) as picture:
            if picture.mode[0] in "IF":                     # PIL would cut off what is above 255
                raise OSError(f"{file} has more than 8 bits a channel: save it with 8")
            picture = upright(picture).convert("RGB")
    except (OSError, ValueError, TypeError, SyntaxError, Image.DecompressionBombError) as error:
        if str(file) in str(error):
            raise
        raise OSError(f"{file} is no picture that can be read ({error})") from error
    picture = v2.functional.resize(picture, size, antialias=True)
    return v2.functional.pil_to_tensor(v2.functional.center_crop(picture, [size, size]))


# --- the built-in set: shapes cut from two-coloured materials ---

# A coarse class is a material, seen in any one patch of the object; a fine class is the shape cut
# from it, seen only by patches together. No class is a colour at a place: position, phase, size
# and contrast are random and the two colours swap roles, so the mean picture says almost nothing.
PALETTES = ["red-cyan", "orange-blue", "lime-violet", "green-magenta", "mint-pink"]
TEXTURES = ["striped", "barred", "checked", "dotted"]
SHAPES = ["disc", "ring", "square", "triangle", "cross"]


def synthetic(seed=0, n_train=10_000, n_test=2_000):
    """100 classes of drawn puzzles, the same bytes for the same seed."""
    splits, md5 = [], hashlib.md5()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                   # on a busy machine two would wait for each other
    for part, n in enumerate((n_train, n_test)):
        generator = torch.Generator().manual_seed(2 * seed + part)
        fine = (torch.arange(n) % 100)[torch.randperm(n, generator=generator)]
        # in pieces, for the maps of a few hundred images fit into the cache
        images = torch.cat([draw(piece, generator) for piece in fine.split(250)])
        splits.append(Split(images, fine, fine // 5))
        for tensor in splits[-1]:
            md5.update(tensor.numpy().tobytes())
    torch.set_num_threads(threads)
    coarse_names = [f"{p} {t}" for p in PALETTES for t in TEXTURES]
    fine_names = [f"{material} {shape}" for material in coarse_names for shape in SHAPES]
    return Data("synthetic", "the built-in synthetic set", md5.hexdigest(), *splits,
                fine_names, coarse_names, *channel_stats(splits[0].images))


def uniform(B, generator, low=0.0, high=1.0, channels=1, dtype=torch.float32):
    """One number per sample (and channel), (B, channels, 1, 1), to be spread over its picture."""
    shape = (B, channels, 1, 1)
    draw = torch.rand(shape, generator=generator, device=generator.device, dtype=dtype)
    return low + (high - low) * draw


def draw(fine, generator):
    """One picture per label (B,) -> (B, 3, 32, 32) uint8: a textured shape on a dim background."""
    B, = expect("fine", fine, "B", below=100)
    palette, texture, shape = fine // 20, fine // 5 % 4, fine % 5

    def rand(low, high, channels=1):
        # in float64, so that a sin() that differs in its last bit changes no byte of the picture
        return uniform(B, generator, low, high, channels, torch.float64)

    def choose(which, *maps):                  # for each image, one of several (B, 1, 32, 32) maps
        return torch.stack(maps).take_along_dim(which.view(1, B, 1, 1, 1), dim=0)[0]

    axis = torch.arange(SIZE, dtype=torch.float64) - (SIZE - 1) / 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")                # (32, 32), 0 in the middle

    # The object's own coordinates, moved and slightly turned.
    tilt = rand(-0.25, 0.25)                                        # (B, 1, 1, 1)
    u, v = x - rand(-3, 3), y - rand(-3, 3)                         # (B, 1, 32, 32)
    u, v = u * tilt.cos() + v * tilt.sin(), v * tilt.cos() - u * tilt.sin()
    r, far, near = u.hypot(v), torch.maximum(u.abs(), v.abs()), torch.minimum(u.abs(), v.abs())

    # How many pixels inside the outline; clamped to 0..1 this is a mask with a soft edge.
    R = rand(9.5, 13)
    inside = choose(shape,
                    0.95 * R - r,                                                   # disc
                    0.30 * R - (r - 0.75 * R).abs(),                                # ring
                    0.85 * R - far,                                                 # square
                    0.55 * R - torch.maximum(v - R / 4, 0.87 * u.abs() - (v - R / 4) / 2),
                    torch.minimum(R - far, 0.38 * R - near))                        # cross
    mask = (inside + 0.5).clamp(0, 1)

    # The texture: +1 where the material has its first colour, -1 where it has its second.
    k = 2 * math.pi / rand(4.8, 6.2)
    across, down = (k * u + rand(0, 7)).sin(), (k * v + rand(0, 7)).sin()
    wave = choose(texture, across, down, 1.5 * across * down, across + down - 0.7)
    wave = (2 * wave).clamp(-1, 1)

    # The palette: opposite hues around a grey. A random sign says which one comes first.
    hue = (36 * palette.view(B, 1, 1, 1) + rand(-10, 10)).deg2rad()
    red, green = torch.tensor([[2, -1, -1], [0, 1, -1]], dtype=torch.float64)[..., None, None]
    chroma = hue.cos() * red / math.sqrt(6) + hue.sin() * green / math.sqrt(2)      # (B, 3, 1, 1)
    sign = (rand(-1, 1) > 0) * 2 - 1
    colour = sign * (rand(0.26, 0.52) * chroma + rand(-0.15, 0.15))
    thing = rand(0.4, 0.6) + colour * wave                          # (B, 3, 32, 32)

    # The background: a tinted grey with three slow waves, each in a direction of its own.
    swell = sum((x * rand(-0.6, 0.6) + y * rand(-0.6, 0.6) + rand(0, 7)).sin() for _ in range(3))
    ground = rand(0.2, 0.5) + rand(-0.1, 0.1, channels=3) + rand(0.015, 0.06, channels=3) * swell

    return ((ground + mask * (thing - ground)).clamp(0, 1) * 255).round().to(torch.uint8)


# --- from the data set to the images of a run ---

class Sets(NamedTuple):
    """(images uint8 (n, 3, S, S), labels (n,)) for each use."""
    train: tuple[Tensor, Tensor]
    probe: tuple[Tensor, Tensor]         # fixed and never augmented: their routing is recorded
    val: tuple[Tensor, Tensor] | None    # the held-out tenth; None where all is trained on
    test: tuple[Tensor, Tensor]


def class_names(cfg, data):
    names = getattr(data, f"{cfg.labels}_names")
    if not names:
        raise ValueError(f"{data.name} has no {cfg.labels} labels: leave --labels out")
    return names


def trainable(cfg, data):
    """How many training images are left where --split val has held a tenth out."""
    n = len(data.train.fine)
    return n - n // 10 if cfg.split == "val" else n


def split(cfg, data):
    """Share the images out as cfg asks; ValueError where there are too few.

    The shares depend on the data set alone: every seed trains on the same images. The probe images
    are the first of the held-out ones, or of the training images where none are held out.
    """
    labels = getattr(data.train, cfg.labels)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    order = order.to(labels.device)
    held_out = len(labels) - trainable(cfg, data)
    if cfg.split == "val" and not held_out:
        raise ValueError(f"--split val holds a tenth of the training images out, and {data.name} "
                         f"has {len(labels)}: bring 10 or more")
    kept = order[:len(labels) - held_out]
    if cfg.train_images > len(kept):
        raise ValueError(f"--train_images {cfg.train_images}: {data.name} has {len(kept)} to train "
                         f"on; 0 takes them all")
    kept = kept[:cfg.train_images or len(kept)]
    if cfg.batch_size > len(kept):
        raise ValueError(f"--batch_size {cfg.batch_size} is more than the {len(kept)} training "
                         f"images: choose a smaller one")
    val = order[len(labels) - held_out:]
    probe = (val if held_out else kept)[:cfg.probe_images]

    def pick(rows):
        return data.train.images[rows], labels[rows]

    return Sets(pick(kept), pick(probe), pick(val) if held_out else None,
                (data.test.images, getattr(data.test, cfg.labels)))


def batches(cfg, data, sets, epoch):
    """The epoch's augmented (images, targets (B, n_classes)), fixed by cfg.seed and epoch.

    The last images of an epoch's order, too few for a batch, are left out; each epoch has another
    order and so leaves out others.
    """
    images, labels = sets.train
    seed = cfg.seed * 100_003 + epoch
    generator = torch.Generator(images.device).manual_seed(seed)
    order = torch.randperm(len(images), generator=generator, device=images.device)
    parts = order.split(cfg.batch_size)[:steps_per_epoch(cfg, sets)]
    for step, some in enumerate(parts):
        x = augment(images[some], cfg.augment, generator)
        x, targets = mix(x, labels[some], len(class_names(cfg, data)), cfg.mixup, cfg.cutmix,
                         seed=1_000_003 * seed + step)
        yield data.normalise(x), targets


def steps_per_epoch(cfg, sets):
    return len(sets.train[0]) // cfg.batch_size


# --- augmentation: by hand, for torchvision's draws once for a whole batch, and an image alone ---
#     would need a loop in Python; only mixing, which is one draw a batch as published, is theirs

def augment(images, strength, generator):
    """uint8 (B, 3, S, S) -> float32 in [0, 1]; every sample has its own draw from `generator`.

    none: as it is. light: crop and flip. heavy: light, one affine warp, two colour operations and
    an erased box, in the manner of RandAugment (arXiv:1909.13719) and arXiv:1708.04896.
    """
    if strength not in ("none", "light", "heavy"):
        raise ValueError(f"there is no augmentation {strength!r}: choose none, light or heavy")
    expect("images", images, "B", 3, *images.shape[-1:] * 2)
    if strength == "none":
        return unit(images)
    images = unit(crop_and_flip(images, generator))
    if strength == "heavy":
        images = warp(images, generator)
        for _ in range(2):
            images = recolour(images, generator)
        images = erase(images, generator)
    return images


def crop_and_flip(images, generator):
    """A window moved by up to an eighth, the border reflected, mirrored half of the time."""
    S = images.shape[-1]
    reach = S // 8
    rows, columns = (
        torch.arange(S, device=images.device)
        + torch.randint(-reach, reach + 1, (len(images), 1), generator=generator,
                        device=images.device)
        for _ in range(2))                                          # (B, S) each, of 32: -4..35
    flip = uniform(len(images), generator)[:, :, 0, 0] < 0.5             # (B, 1)
    columns = torch.where(flip, S - 1 - columns, columns)
    rows, columns = ((S - 1) - (S - 1 - i.abs()).abs() for i in (rows, columns))
    pixel = S * rows[:, :, None] + columns[:, None, :]              # (B, S, S) where to look
    index = pixel.flatten(1)[:, None].expand(-1, 3, -1)             # (B, 3, S * S), no copy
    return images.flatten(2).gather(2, index).view_as(images)


def warp(images, generator, p=0.5):
    """One affine grid_sample: a share `p` of the images is turned, sheared, scaled and shifted."""
    def amount(most):                          # 0 for the images that are left alone
        return on * uniform(len(images), generator, -most, most).flatten()

    on = (uniform(len(images), generator) < p).flatten()                 # (B,)
    angle, scale = amount(0.35), 1 + amount(0.2)
    # half of RandAugment's largest strengths, because here they come all at once
    matrix = torch.stack([
        scale * angle.cos(), amount(0.15) - scale * angle.sin(), amount(0.15),
        amount(0.15) + scale * angle.sin(), scale * angle.cos(), amount(0.15)], dim=1)
    grid = F.affine_grid(matrix.view(-1, 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def recolour(images, generator):
    """Per sample one of brightness, contrast, saturation, posterise, solarise, or nothing."""
    which = (6 * uniform(len(images), generator)).floor()                # (B, 1, 1, 1), 0..5
    amount = uniform(len(images), generator, -0.7, 0.7)
    grey = images.mean(dim=1, keepdim=True)                         # (B, 1, 32, 32)
    # Brightness, contrast and saturation are one blend, with black, with the image's mean grey,
    # and with each pixel's own grey; a negative amount leads away from it.
    anchor = torch.where(which == 1, grey.mean(dim=(2, 3), keepdim=True), grey * (which == 2))
    blended = torch.lerp(images, anchor, amount).clamp(0, 1)
    levels = (4 + 12 * amount.abs()).round()
    posterised = (images * levels).round() / levels
    solarised = torch.where(images > 1 - 0.5 * amount.abs(), 1 - images, images)
    return (images.where(which == 5, blended).where(which != 3, posterised)
            .where(which != 4, solarised))


def box(S, cy, cx, height, width):
    """True inside a box per sample, cut off at the border: four (B, 1, 1, 1) -> (B, 1, S, S)."""
    at = torch.arange(S, device=cy.device) + 0.5                    # pixel centres
    return (((at[:, None] - cy).abs() < height / 2) & ((at - cx).abs() < width / 2))


def erase(images, generator, p=0.25):
    """A share `p` of the images loses a box of 2 to 33 % of its area to one flat random colour."""
    S = images.shape[-1]
    area = S**2 * uniform(len(images), generator, 0.02, 0.33)
    aspect = uniform(len(images), generator, math.log(0.3), math.log(3.3)).exp()
    cy, cx = (uniform(len(images), generator, 0, S) for _ in range(2))
    gone = box(S, cy, cx, (area * aspect).sqrt(), (area / aspect).sqrt())
    gone = gone & (uniform(len(images), generator) < p)                  # (B, 1, S, S)
    # ours: the paper fills the box with noise per pixel; one colour costs less to draw
    colour = uniform(len(images), generator, channels=3)
    return torch.where(gone, colour, images)


def mix(images, labels, n_classes, mixup, cutmix, seed):
    """Mixup (arXiv:1710.09412) or cutmix (arXiv:1905.04899) of a batch, or neither.

    Float images (B, 3, S, S) and labels (B,) -> images and targets (B, n_classes). The two
    numbers are the alphas of Beta(alpha, alpha), and 0 switches one off; with both on, a coin
    decides, batch by batch.
    """
    expect("labels", labels, *expect("images", images, "B", 3, "H", "W")[:1], below=n_classes)
    if not images.is_floating_point():
        raise TypeError(f"images must be float, not {images.dtype}: mix them after `augment`")
    for name, alpha in (("mixup", mixup), ("cutmix", cutmix)):
        if not 0 <= alpha < math.inf:
            raise ValueError(f"{name} cannot be {alpha}: choose 0 or more")
    kinds = [kind(alpha=float(alpha), num_classes=n_classes)
             for kind, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix)) if alpha]
    if not kinds:
        return images, F.one_hot(labels, n_classes).float()
    with torch.random.fork_rng(devices=[]):    # v2 draws from the global generator of the CPU
        torch.default_generator.manual_seed(seed)
        return v2.RandomChoice(kinds)(images, labels)
