"""MNIST, or digits drawn here where MNIST cannot be had, as uint8 in memory.

`load` gives a `Dataset`, `make_shards` deals its training set to k MACHs, and
one `Batches` per MACH gives that MACH's mini-batches. No function here touches
a global random generator.
"""

import contextlib
import dataclasses
import io
import os
import shutil
import socket
import sys
import tempfile
import threading
import time

import torch
from torch.nn import functional
from torchvision import datasets
from torchvision.datasets import utils

CLASSES = 10
SIDE = 28  # pixels; an image is SIDE * SIDE = 784 of them, row by row
MEAN, DEVIATION = 0.1307, 0.3081  # of MNIST's training pixels, in 0..1
MIRROR = 'https://ossci-datasets.s3.amazonaws.com/mnist/'

# torchvision checks what it downloads and then trusts what it has unpacked, so
# a disk fault or a killed run goes unseen: these are the unpacked files' sums.
UNPACKED_MD5 = {
    'train-images-idx3-ubyte': '6bbc9ace898e44ae57da46a324031adb',
    'train-labels-idx1-ubyte': 'a25bea736e30d166cdddb491f175f624',
    't10k-images-idx3-ubyte': '2646ac647ad5339dbf082846283269ea',
    't10k-labels-idx1-ubyte': '27ae3e4e09519cfbb04c329615203637',
}


class DataError(Exception):
    """What is wrong with the data or its settings: one line, for the user."""


class _Unavailable(Exception):
    """MNIST is not in the folder and cannot be fetched; one line says why."""


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Three parts; images are uint8 [N, 784] in 0..255, labels int64 [N]."""
    name: str  # 'MNIST' or 'drawn-digits'
    train_images: torch.Tensor
    train_labels: torch.Tensor
    validation_images: torch.Tensor  # [0, 784] when none are held out
    validation_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor


def load(folder='data', validation=5000, strict=False, deadline=120.0):
    """Reads MNIST from `folder`, fetching it there first where it is missing.

    Files lie in `folder`/MNIST/raw, as torchvision has them. The four `.gz`
    are enough, even in a folder that cannot be written. A damaged file is
    named on stderr, moved aside to `.corrupt` and replaced.

    Args:
      folder: path; created if MNIST can be fetched.
      validation: images held out of the training set, always the same ones,
        equally many of each class (give or take one).
      strict: raise DataError where MNIST cannot be had. If False, warn on
        stderr and draw digits in its place.
      deadline: seconds after which fetching is given up.

    Returns:
      A Dataset, its images in the order of the files.

    Raises:
      DataError: `folder` is not a usable folder, or `validation` leaves some
        class without training images, or `strict` and no MNIST.
    """
    if not deadline > 0:
        raise DataError(f'the deadline must be above 0 s, not {deadline}')
    name = 'MNIST'
    try:
        parts = _read_mnist(folder, time.monotonic() + deadline)
    except _Unavailable as error:
        files = ', '.join(f'{plain}.gz' for plain in UNPACKED_MD5)
        message = (f'MNIST cannot be had: {error}. To fix it, put {files} '
                   f'(from {MIRROR}) in {_raw(folder)}')
        if strict:
            raise DataError(message) from error
        print(
            f'warning: {message}. Drawn digits take its place: expect other '
            'accuracies.',
            file=sys.stderr)
        name, parts = 'drawn-digits', draw_digits()
    images, labels, test_images, test_labels = parts
    held = _held_out(labels, validation)
    return Dataset(name, images[~held], labels[~held], images[held],
                   labels[held], test_images, test_labels)


def normalise(images):
    """uint8 [B, 784] to float32 [B, 784], (x / 255 - mean) / deviation."""
    # Base plus scaled bytes: one pass, which also converts to float.
    return torch.add(torch.tensor(-MEAN / DEVIATION),
                     images,
                     alpha=1 / (255 * DEVIATION))


def make_shards(labels, k, kind='disjoint', seed=0):
    """Says which training images each of `k` MACHs may see.

    Args:
      labels: int64 [N].
      k: how many MACHs, at least 1.
      kind: 'disjoint': each image goes to exactly one shard, and both the
        shards' sizes and their counts of any one class differ by at most 1.
        'full': every shard is all of them (one tensor, k times).
      seed: which images go where, for 'disjoint'.

    Returns:
      k int64 tensors of indices into `labels`.

    Raises:
      DataError: k is below 1 or, for 'disjoint', above the smallest class.
    """
    if k < 1:
        raise DataError(f'need at least 1 shard, not {k}')
    if kind == 'full':
        return [torch.arange(len(labels))] * k
    if kind != 'disjoint':
        raise DataError(f"shards are 'disjoint' or 'full', not {kind!r}")
    by_class = _shuffled_by_class(labels, seed)
    largest = min(len(members) for members in by_class)
    if k > largest:
        raise DataError(f'{k} disjoint shards cannot each have every class: '
                        f'{largest} is the largest number possible')
    # Dealing on from class to class, without going back to shard 0 for each,
    # keeps the sizes within 1 of each other.
    deck = torch.cat(by_class)
    return [deck[shard::k].sort().values for shard in range(k)]


class Batches:
    """Endless shuffled mini-batches of one shard.

    Every image comes once per epoch, in an order drawn anew for each. Where an
    epoch does not end with a batch, that batch goes on into the next epoch, so
    none is short and no image is left out.
    """

    def __init__(self, images, labels, indices, batch_size, seed, device='cpu'):
        """Images [N, 784], labels int64 [N], indices int64 [n].

        Images are uint8, or have been normalised: once for several of these.

        Raises:
          DataError: batch_size is not in 1 .. n.
        """
        if not 1 <= batch_size <= len(indices):
            raise DataError(f'batch_size {batch_size} does not fit a shard of '
                            f'{len(indices)} images: 1 to {len(indices)} does')
        if images.dtype is torch.uint8:
            images = normalise(images)
        self._images = images.to(device)
        self._labels = labels.to(device)
        self._indices = indices
        self._size = batch_size
        self._generator = torch.Generator().manual_seed(seed)
        self._queue = indices[:0]  # what is left of the epoch

    def next(self):
        """Gives x float32 [batch_size, 784] and y int64 [batch_size].

        Both are new memory at each call: they travel as messages, which must
        not change under their reader.
        """
        while len(self._queue) < self._size:
            order = torch.randperm(len(self._indices),
                                   generator=self._generator)
            self._queue = torch.cat([self._queue, self._indices[order]])
        rows = self._queue[:self._size].to(self._images.device)
        self._queue = self._queue[self._size:]
        return (self._images.index_select(0, rows),
                self._labels.index_select(0, rows))


def _shuffled_by_class(labels, seed):
    """For each class in `labels` [N], its indices in an order drawn by seed."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    mixed = labels[order]
    return [order[mixed == c] for c in range(CLASSES)]


def _held_out(labels, count):
    """Bool [N]: True for the `count` validation images among `labels` [N]."""
    by_class = _shuffled_by_class(labels, seed=0)  # the same for every run
    largest = CLASSES * (min(len(members) for members in by_class) - 1)
    if not 0 <= count <= largest:
        raise DataError(f'the validation set can have 0 to {largest} of the '
                        f'{len(labels)} training images, not {count}')
    held = torch.zeros(len(labels), dtype=torch.bool)
    for c, members in enumerate(by_class):
        held[members[:count // CLASSES + (c < count % CLASSES)]] = True
    return held


def _raw(folder):
    return os.path.join(folder, 'MNIST', 'raw')


class MNIST(datasets.MNIST):
    """torchvision's, but fetching only what is missing, until it is stopped.

    torchvision names the folder after the class, hence MNIST.
    """
    stopped = False

    @property
    def resources(self):
        return [(name, md5)
                for name, md5 in datasets.MNIST.resources
                if not os.path.exists(os.path.join(self.raw_folder, name[:-3]))]

    @property
    def mirrors(self):
        for mirror in datasets.MNIST.mirrors:
            if self.stopped:
                raise RuntimeError('stopped')
            yield mirror

    def _check_legacy_exist(self):
        return False  # older torchvision's own files, which nothing checks


def _tensors(root, kind):
    """Images [N, 784] and labels [N] of both sets: four tensors."""
    train, test = (kind(root, train=t, download=True) for t in (True, False))
    return (train.data.flatten(1), train.targets, test.data.flatten(1),
            test.targets)


def _read_mnist(folder, end):
    """Four tensors as `_tensors` gives, by the time `end` (monotonic, s)."""
    created = []  # folders that are new, deepest first
    path = os.path.abspath(folder)
    while not os.path.exists(path):
        created.append(path)
        path = os.path.dirname(path)
    try:
        if created:
            os.makedirs(folder, exist_ok=True)
        return _read_or_fetch(folder, end)
    except OSError as error:
        raise DataError(f'cannot use the data folder {folder}: '
                        f'{error.strerror} ({error.filename})') from error
    finally:
        with contextlib.suppress(OSError):  # ends at the first not empty
            for path in created:
                os.rmdir(path)


def _read_or_fetch(folder, end):
    raw = _raw(folder)
    inside = [
        p for p in (folder, os.path.dirname(raw), raw) if os.path.exists(p)
    ]
    for path in inside:
        os.listdir(path)  # raises where it is no folder or cannot be read
    writable = all(os.access(path, os.W_OK) for path in inside)
    good = []
    for name, md5 in datasets.MNIST.resources:
        plain = name[:-3]
        if _intact(os.path.join(raw, plain), UNPACKED_MD5[plain], writable):
            good.append(plain)
        elif _intact(os.path.join(raw, name), md5, writable):
            good.append(name)
    if set(good) == set(UNPACKED_MD5):
        return _tensors(folder, MNIST)

    # Unpacked and fetched elsewhere, then renamed into place whole: a run
    # that is killed, or another that starts now, never meets half a file.
    with tempfile.TemporaryDirectory(prefix='.mnist-',
                                     dir=folder if writable else None,
                                     ignore_cleanup_errors=True) as staging:
        new = _raw(staging)
        os.makedirs(new)
        for name in good:
            shutil.copy(os.path.join(raw, name), new)
        tensors = _fetch(staging, end)
        if writable:
            os.makedirs(raw, exist_ok=True)
            for name in os.listdir(new):
                if name not in good:
                    os.replace(os.path.join(new, name), os.path.join(raw, name))
        return tensors


def _intact(path, md5, writable):
    """Whether `path` is there and right; if wrong, names it, moves it aside."""
    if not os.path.exists(path):
        return False
    if utils.check_md5(path, md5):
        return True
    fate = 'ignored'
    if writable:
        fate = f'moved to {path}.corrupt'
        os.replace(path, f'{path}.corrupt')
    print(f'warning: {path} is damaged (MD5 sum), {fate}', file=sys.stderr)
    return False


def _fetch(root, end):
    """Four tensors from `root`, where torchvision unpacks and downloads."""
    kind = type('MNIST', (MNIST,), {})  # a `stopped` of its own
    outcome = []

    def work():
        try:
            outcome.append(_tensors(root, kind))
        except Exception as error:  # of any library under torchvision
            outcome.append(error)

    # torchvision waits without limit. The sockets' limit lets every mirror
    # have its turn; the thread's holds where a socket's does not (names being
    # resolved, a trickle of bytes).
    left = max(end - time.monotonic(), 0.001)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(min(left / 4, 15))
    thread = threading.Thread(target=work, daemon=True)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # stdout is the log
            thread.start()
            thread.join(left)
    finally:
        kind.stopped = True
        socket.setdefaulttimeout(before)
    if not outcome:
        raise _Unavailable(f'no answer within {left:.3g} s')
    if isinstance(outcome[0], Exception):
        raise _Unavailable(' '.join(str(outcome[0]).split()))
    return outcome[0]


# Ways to write each digit. A way is strokes, a stroke a smooth curve through
# points, a point two figures: x (0 left) and y (0 top, 9 bottom).
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

    Each digit is a few pen strokes, shaken, then turned, slanted, stretched,
    shifted and bent, in its own thickness and brightness, with pixel noise.
    The warps' strengths are chosen so that a linear model gets fewer right
    than on MNIST while a multilayer perceptron does about as well.

    Args:
      train, test: how many images.
      seed: the same seed draws the same images.

    Returns:
      Train images uint8 [train, 784] and labels int64 [train], then test's.
    """
    threads = torch.get_num_threads()
    # Two seconds with one thread; with more, waiting for a core that another
    # program holds, at each of these short operations, can take ten times it.
    torch.set_num_threads(1)
    try:
        images, labels = _draw(train + test, seed)
    finally:
        torch.set_num_threads(threads)
    return images[:train], labels[:train], images[train:], labels[train:]


def _draw(count, seed, variants=60, batch=2500):
    """Images uint8 [count, 784] and labels int64 [count]."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    def uniform(*shape):
        return torch.rand(shape, generator=generator)

    distances = _distances(variants, normal)
    labels = torch.arange(count) % CLASSES
    labels = labels[torch.randperm(count, generator=generator)]
    images = torch.empty(count, SIDE * SIDE, dtype=torch.uint8)
    # A warp is a weighted sum of these fields [28, 784]: constant (shifts), x
    # and y (linear maps), and 25 smooth bumps (bends).
    axis = torch.linspace(-1, 1, SIDE)
    bumps = functional.interpolate(torch.eye(25).view(25, 1, 5, 5),
                                   (SIDE, SIDE),
                                   mode='bicubic',
                                   align_corners=True).flatten(1)
    y, x = torch.meshgrid(axis, axis, indexing='ij')
    fields = torch.stack([torch.ones(SIDE * SIDE), x.flatten(), y.flatten()])
    fields = torch.cat([fields, bumps])
    for start in range(0, count, batch):
        chosen = labels[start:start + batch] * variants
        n = len(chosen)
        chosen += torch.randint(variants, (n,), generator=generator)
        turn, slant = .145 * normal(n), .185 * normal(n)
        wide, high = (.115 * normal(n)).exp(), (.08 * normal(n)).exp()
        weights = torch.empty(n, 2, len(fields))
        weights[:, :, 0] = .075 * normal(n, 2)
        weights[:, 0, 1] = wide * turn.cos()
        weights[:, 0, 2] = wide * (slant - turn.sin())
        weights[:, 1, 1] = high * turn.sin()
        weights[:, 1, 2] = high * turn.cos()
        weights[:, :, 3:] = .068 * normal(n, 2, len(bumps))
        grid = (weights @ fields).mT.reshape(n, SIDE, SIDE, 2)
        distance = functional.grid_sample(distances[chosen],
                                          grid,
                                          padding_mode='border',
                                          align_corners=True).flatten(1)
        # Ink within the pen's half-width, fading out over one pixel (2 / 28).
        ink = ((.06 + .07 * uniform(n, 1) - distance) * 14 + .5).clamp_(0, 1)
        ink *= .7 + .3 * uniform(n, 1)
        ink += .06 * normal(n, SIDE * SIDE)
        images[start:start + n] = ink.clamp_(0, 1).mul_(255).to(torch.uint8)
    return images, labels


def _distances(variants, normal, side=32):
    """Per pixel its distance to the pen's path, [10 * variants, 1, side, side].

    Distances, not ink: once warped, a threshold gives any pen's thickness.
    The image spans -1..1.
    """
    axis = torch.linspace(-1, 1, side)
    y, x = torch.meshgrid(axis, axis, indexing='ij')
    pixels = torch.stack([x.flatten(), y.flatten()], dim=1)
    fields = []
    for ways in GLYPHS:
        for variant in range(variants):
            curves = []
            for stroke in ways[variant % len(ways)].split('|'):
                points = torch.tensor([[float(figure)
                                        for figure in point]
                                       for point in stroke.split()])
                points += .4 * normal(*points.shape)
                curve = functional.interpolate(points.T[None, :, None], (1, 40),
                                               mode='bicubic',
                                               align_corners=True)
                curves.append(curve.view(2, 40).T)
            path = (torch.cat(curves) / 4.5 - 1) * torch.tensor([.5, .7])
            fields.append(torch.cdist(pixels, path).amin(1))
    return torch.stack(fields).view(-1, 1, side, side)
