"""MNIST as uint8 tensors in memory, or drawn digits where there is no MNIST.

`load` gives a `Dataset`. `deal` gives each of k MACHs its endless batches.
Every function takes its own seed.
"""

import contextlib
import dataclasses
import errno
import functools
import os
import pathlib
import shutil
import socket
import tempfile
import threading
import zlib

import numpy
import torch
from torch.nn import functional
from torchvision import datasets

from mach import metrics

CLASSES = 10
SIDE = 28  # pixels; an image has SIDE rows of SIDE pixels
PIXELS = SIDE * SIDE
MEAN, DEVIATION = 0.1307, 0.3081  # of MNIST's training pixels, in 0..1
SHIFT = torch.tensor(-MEAN / DEVIATION)
SIZES = {  # bytes of each unpacked file
    'train-images-idx3-ubyte': 47040016,
    'train-labels-idx1-ubyte': 60008,
    't10k-images-idx3-ubyte': 7840016,
    't10k-labels-idx1-ubyte': 10008,
}
FOLDER = 'data'  # the default: no fault of it ends a run
# Errors of a disk, not of a network.
NO_ROOM = errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG


class DataError(Exception):
    """Says in one line what is wrong with data, settings or a checkpoint."""


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Three parts. Images are uint8 [N, 784] in 0..255, labels int64 [N]."""
    name: str  # 'MNIST' or 'drawn-digits'
    train_images: torch.Tensor
    train_labels: torch.Tensor
    validation_images: torch.Tensor  # [0, 784] if validation is 0
    validation_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor


def load(folder=FOLDER, validation=5000, deadline=120.0):
    """Reads MNIST from `folder`/MNIST/raw, where the four `.gz` are enough.

    Missing files are fetched, for at most `deadline` seconds. Where there is
    no MNIST, a warning on stderr says so and drawn digits take its place.
    Every run holds out the same `validation` training images. Their counts of
    two classes differ by at most 1.

    Raises:
      DataError: the folder cannot be used and is not FOLDER, or `validation`
        leaves a class without training images.
    """
    name = 'MNIST'
    try:
        images, labels, test_images, test_labels = _read_mnist(folder, deadline)
    except OSError as error:
        if not isinstance(error, ConnectionError) and str(folder) != FOLDER:
            where = f'the data folder {folder}'
            if error.errno in NO_ROOM:
                where += f' or the temporary folder {tempfile.gettempdir()}'
            raise DataError(f'cannot use {where}: {error.strerror} '
                            f'({error.filename})') from error
        metrics.warn(
            f'warning: cannot get MNIST: {error}. This run uses drawn digits '
            'instead: expect other accuracies. To fix it, put '
            f'{".gz, ".join(SIZES)}.gz (from {datasets.MNIST.mirrors[0]}) in '
            f'{folder}/MNIST/raw.')
        name = 'drawn-digits'
        images, labels, test_images, test_labels = draw_digits()
    by_class = _shuffle_by_class(labels, seed=0)
    most = CLASSES * (min(map(len, by_class)) - 1)
    if not 0 <= validation <= most:
        raise DataError(f'the validation set can have 0 to {most} of the '
                        f'{len(labels)} training images, not {validation}')
    held = torch.zeros(len(labels), dtype=torch.bool)
    each, over = divmod(validation, CLASSES)
    for c, members in enumerate(by_class):
        held[members[:each + (c < over)]] = True
    return Dataset(name, images[~held], labels[~held], images[held],
                   labels[held], test_images, test_labels)


def _read_mnist(folder, deadline):
    """Gives images uint8 [N, 784] and labels int64 [N] of both sets.

    Missing or damaged files are made in a temporary folder first. Raises
    ConnectionError if that fails, other OSErrors if a folder cannot be used.
    """
    raw, found = pathlib.Path(folder, 'MNIST', 'raw'), []
    given = str(folder) != FOLDER
    with contextlib.suppress(FileNotFoundError if given else OSError):
        found = [raw / name for name in os.listdir(raw) if name in SIZES]
    if given and not os.path.isdir(folder):  # can it be made?
        up = next(one for one in raw.parents if os.path.lexists(one))
        tempfile.TemporaryDirectory(dir=up).cleanup()
    damaged = [one for one in found if one.stat().st_size != SIZES[one.name]]
    if len(found) == len(SIZES) and not damaged:
        try:
            return _parse(folder)
        except (AssertionError, LookupError, RuntimeError, ValueError):
            damaged = found  # torchvision does not say which file it is
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as staging:
        new = pathlib.Path(staging, 'MNIST', 'raw')
        new.mkdir(parents=True)
        for gz, md5 in datasets.MNIST.resources:
            if datasets.utils.check_integrity(raw / gz, md5):
                shutil.copyfile(raw / gz, new / gz)
            elif (raw / gz).exists():
                damaged.append(raw / gz)
        for path in damaged:
            metrics.warn(f'warning: {path} is damaged: it is not used')
        _fetch(staging, deadline)
        # Another run never sees half a file, because `replace` is atomic. A
        # folder that cannot be written stays as it is.
        with contextlib.suppress(OSError):
            raw.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix='.mnist-',
                                             dir=raw) as beside:
                for name in SIZES:
                    copy = pathlib.Path(beside, name)
                    shutil.copyfile(new / name, copy)
                    copy.replace(raw / name)
        return _parse(staging)


def _parse(folder):
    """Reads four good files, as _read_mnist gives them."""
    sets = [datasets.MNIST(folder, train=train) for train in (True, False)]
    return [part for one in sets for part in (one.data.flatten(1), one.targets)]


def _fetch(folder, seconds):
    """Lets torchvision download and unpack the files that `folder` lacks.

    Raises ConnectionError if that fails or takes longer than `seconds`.
    """
    fetcher = datasets.MNIST.__new__(datasets.MNIST)  # its __init__ would wait
    fetcher.root, fetcher.mirrors = folder, list(datasets.MNIST.mirrors)
    errors = [f'no answer within {seconds:.3g} s']

    def work():
        try:
            fetcher.download()
            errors.clear()
        except Exception as error:  # torchvision passes on errors of all kinds
            errors[:] = [error]

    # The time limit of sockets gives every mirror its turn. The time limit of
    # the thread also ends a slow name lookup and a trickle of bytes.
    # Older versions of torchvision print what they do, but stdout is the log.
    datasets.mnist.print = datasets.utils.print = lambda *_: None
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(min(seconds / 4, 15))
    thread = threading.Thread(target=work, daemon=True)
    try:
        thread.start()
        thread.join(seconds)
    finally:
        fetcher.mirrors.clear()  # a late thread tries no other mirror
        socket.setdefaulttimeout(before)
    if errors and getattr(errors[0], 'errno', 0) in NO_ROOM:
        raise errors[0]
    if errors:
        raise ConnectionError(' '.join(str(errors[0]).split()))


def normalise(images):
    """uint8 [B, 784] to float32 [B, 784], (x / 255 - mean) / deviation."""
    # One pass scales, shifts and converts to float.
    return torch.add(SHIFT, images, alpha=1 / (255 * DEVIATION))


def denormalise(x):
    """float32 [B, 784] to the nearest uint8 [B, 784]. Inverts normalise."""
    return x.mul(255 * DEVIATION).add_(255 * MEAN).round_().clamp_(0, 255).to(
        torch.uint8)


def deal(dataset, k, shards, batch_size, seed, device='cpu', skew=0.5):
    """Gives k Batches of a Dataset's training set, one for each MACH.

    `make_shards` explains `k`, `shards` and `skew`, and raises DataError. So
    does a `batch_size` that does not fit all shards. The order of MACH i's
    images depends on `seed` * 1009 + i.
    """
    devices = ['cpu', *map('cuda:{}'.format, range(torch.cuda.device_count()))]
    if device not in devices:
        raise DataError(f'--device: must be str, {" or ".join(devices)}, '
                        f'not {device!r}')
    images = dataset.train_images.to(device)  # one copy for all MACHs
    labels = dataset.train_labels
    dealt = make_shards(labels, k, shards, seed, skew)
    least = min(map(len, dealt))
    if not 1 <= batch_size <= least:
        raise DataError(f'batch_size {batch_size} does not fit the smallest '
                        f'shard of {least} images: 1 to {least} does')
    return [
        Batches(images, labels, indices, batch_size, seed * 1009 + i, device)
        for i, indices in enumerate(dealt)
    ]


def make_shards(labels, k, kind='disjoint', seed=0, skew=0.5):
    """Chooses training images for `k` MACHs: k int64 tensors of indices.

    The kind 'full' puts every image into every shard. The other kinds put each
    image into one shard, chosen by `seed`. With 'disjoint', the sizes of two
    shards differ by at most 1, and so do their counts of each class.

    With 'skewed', each class is dealt by a Dirichlet(`skew`) draw over the
    MACHs (Hsu et al. 2019, arXiv 1909.06335, draws classes for each MACH
    instead). Before that, 2% of each class are dealt evenly, or one image for
    each MACH if that is more.

    Raises DataError if k is below 1 or shards would lack a class.
    """
    if k < 1:
        raise DataError(f'need at least 1 shard, not {k}')
    if kind == 'full':
        return [torch.arange(len(labels))] * k
    if kind not in ('disjoint', 'skewed'):
        raise DataError(
            f"shards are 'disjoint', 'skewed' or 'full', not {kind!r}")
    by_class = _shuffle_by_class(labels, seed)
    most = min(map(len, by_class))
    if k > most:
        raise DataError(f'{k} {kind} shards cannot each have every class: '
                        f'{most} is the largest number possible')
    if kind == 'disjoint':
        # One deck of all classes keeps the sizes within 1 of each other.
        deck = torch.cat(by_class)
        return [deck[shard::k].sort().values for shard in range(k)]
    draws, shards = numpy.random.default_rng(seed), [[] for _ in range(k)]
    for members in by_class:
        n = len(members)
        even = max(n // 50, k)
        ends = draws.dirichlet([skew] * k).cumsum()[:-1] * (n - even)
        parts = members[even:].tensor_split(ends.round().astype(int).tolist())
        for i, part in enumerate(parts):
            shards[i] += [members[:even][i::k], part]
    return [torch.cat(parts).sort().values for parts in shards]


def _shuffle_by_class(labels, seed):
    """Gives the shuffled indices of each class in `labels` [N]."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    mixed = labels[order]
    return [order[mixed == c] for c in range(CLASSES)]


class Batches:
    """Iterates without end over shuffled mini-batches of one shard.

    Each epoch has every image once, in a new order. A batch may begin in one
    epoch and end in the next, so all batches have the same size.

    Takes images uint8 [N, 784], labels int64 [N] and the shard's indices [n].
    `batch_size` is 1 to n. The attribute `classes` has the shard's number of
    images of each class, [10].
    """

    def __init__(self, images, labels, indices, batch_size, seed, device='cpu'):
        self._images, self._labels = images.to(device), labels.to(device)
        self._indices, self._size = indices, batch_size
        self.classes = labels[indices].bincount(minlength=CLASSES)
        self._generator = torch.Generator().manual_seed(seed)
        self._queue = indices[:0]  # the indices that are left of the epoch

    def __iter__(self):
        return self

    def __next__(self):
        """Gives normalised x [B, 784] and y int64 [B], in new memory."""
        if len(self._queue) < self._size:
            order = torch.randperm(len(self._indices),
                                   generator=self._generator)
            self._queue = torch.cat([self._queue, self._indices[order]])
        rows, self._queue = self._queue.tensor_split([self._size])
        rows = rows.to(self._images.device)
        return (normalise(self._images.index_select(0, rows)),
                self._labels.index_select(0, rows))

    def state_dict(self):
        """Gives the position in the epoch and a checksum of the labels."""
        labels = self._labels.cpu()[self._indices]
        return dict(generator=self._generator.get_state(),
                    queue=self._queue.clone(),
                    labels=zlib.crc32(labels.numpy()))

    def load_state_dict(self, state):
        """Continues at `state`, or raises DataError if it has other labels."""
        if state['labels'] != self.state_dict()['labels']:
            raise DataError('the training labels have changed')
        self._generator.set_state(state['generator'].cpu())
        self._queue = state['queue'].cpu()


# GLYPHS[d] has the ways to write digit d. A way is one or more strokes, with |
# between them. A stroke is a smooth curve through points. A point is two
# figures, x (0 is left) and y (0 is top, 9 is bottom).
GLYPHS = (
    ('50 21 04 17 49 78 95 81 50', '60 31 16 38 59 78 75 61 51'),
    ('50 59', '23 50|50 59', '60 39', '32 50|50 59|29 79'),
    ('12 30 70 82 56 19|19 89', '12 40 81 65 28 19 17 38 89'),
    ('11 40 71 63 44|44 75 87 59 08', '10 80|80 44|44 85 78 49 08'),
    ('20 15|15 85|61 69', '60 05|05 95|60 69', '11 14 45 85|80 84 79'),
    ('80 20|20 14|14 53 86 58 08', '20 14|14 54 86 69 19|20 80'),
    ('70 32 06 28 59 87 65 25 06', '51 24 17 39 78 76 45 17'),
    ('10 80|80 39', '10 80|80 54 39|25 75', '12 10|10 80|80 55 49'),
    ('71 40 12 45 87 59 17 45 72', '50 21 23 44 73 71 50|44 16 28 59 87 86 44'),
    ('82 50 12 24 64 82|82 79', '82 50 12 24 64 82|82 83 76 49 19'),
)


def draw_digits(train=60000, test=10000, seed=0):
    """Draws images like MNIST's, about as many of each class.

    A digit is a few pen strokes. They are shaken, turned, slanted, stretched,
    shifted and bent. Thickness and brightness vary, and pixels have noise. A
    linear model gets fewer digits right than on MNIST, a multilayer
    perceptron about as many. This takes a second if torch has one thread.
    It can take twenty if torch has more threads than there are idle cores.

    Returns:
      Images uint8 [train, 784], labels int64 [train], then the test set's.
    """
    variants = 60  # drawings of each digit, before the warps
    generator = torch.Generator().manual_seed(seed)

    def normal(scale, *shape):
        return scale * torch.randn(shape, generator=generator)

    distances = _distances(variants, normal)
    labels = torch.arange(train + test) % CLASSES
    labels = labels[torch.randperm(train + test, generator=generator)]
    # A warp is a weighted sum of fields [28, 784]: a constant (shifts), x and
    # y (linear maps), and 25 smooth bumps (bends).
    bumps = _smooth(torch.eye(25).view(25, 1, 5, 5), (SIDE, SIDE)).flatten(1)
    fields = torch.cat([torch.ones(1, PIXELS), _pixels(SIDE).T, bumps])
    images = []
    for chosen in labels.split(2500):
        n = len(chosen)
        variant = torch.randint(variants, (n,), generator=generator)
        turn, slant = normal(.145, n), normal(.185, n)
        wide, high = normal(.115, n).exp(), normal(.08, n).exp()
        linear = [
            wide * turn.cos(), wide * (slant - turn.sin()), high * turn.sin(),
            high * turn.cos()
        ]
        weights = torch.cat([
            normal(.075, n, 2, 1),
            torch.stack(linear, 1).view(n, 2, 2),
            normal(.068, n, 2, len(bumps))
        ], 2)
        grid = (weights @ fields).mT.reshape(n, SIDE, SIDE, 2)
        drawing = distances[chosen * variants + variant]
        distance = functional.grid_sample(drawing,
                                          grid,
                                          padding_mode='border',
                                          align_corners=True).flatten(1)
        # A threshold on distances gives a pen of any thickness. The ink fades
        # out over one pixel (2 / 28).
        pen, bright = torch.rand(2, n, 1, generator=generator)
        ink = ((.06 + .07 * pen - distance) * 14 + .5).clamp_(0, 1)
        ink *= .7 + .3 * bright
        ink += normal(.06, n, PIXELS)
        images.append(ink.clamp_(0, 1).mul_(255).to(torch.uint8))
    images = torch.cat(images)
    return images[:train], labels[:train], images[train:], labels[train:]


_smooth = functools.partial(functional.interpolate,
                            mode='bicubic',
                            align_corners=True)


def _pixels(side):
    """Gives x and y of all pixels, row by row, from -1 to 1: [side**2, 2]."""
    axis = torch.linspace(-1, 1, side)
    return torch.cartesian_prod(axis, axis).flip(1)


def _distances(variants, normal, side=32):
    """Gives distances to the pen's path, [10 * variants, 1, side, side]."""
    fields = []
    for ways in GLYPHS:
        for variant in range(variants):
            curves = []
            for stroke in ways[variant % len(ways)].split('|'):
                points = torch.tensor(
                    [[float(x), float(y)] for x, y in stroke.split()])
                points += normal(.4, *points.shape)
                curve = _smooth(points.T[None, :, None], (1, 40))
                curves.append(curve.view(2, 40).T)
            path = (torch.cat(curves) / 4.5 - 1) * torch.tensor([.5, .7])
            fields.append(torch.cdist(_pixels(side), path).amin(1))
    return torch.stack(fields).view(-1, 1, side, side)
