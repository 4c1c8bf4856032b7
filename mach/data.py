"""MNIST, or digits drawn here where MNIST cannot be had, as uint8 in memory.

`load` gives a `Dataset`, `deal` the endless mini-batches of each of k MACHs.
No function here touches a global random generator.
"""

import contextlib
import dataclasses
import gzip
import hashlib
import os
import pathlib
import socket
import stat
import sys
import tempfile
import threading
import zlib

import torch
from torch.nn import functional
from torchvision import datasets

CLASSES = 10
SIDE = 28  # pixels; an image is SIDE * SIDE of them, row by row
PIXELS = SIDE * SIDE  # 784
MEAN, DEVIATION = 0.1307, 0.3081  # of MNIST's training pixels, in 0..1
# Bytes and MD5 sum of each file once unpacked. torchvision checks what it
# downloads, but not what it has unpacked: a disk fault would go unseen.
FILES = {
    'train-images-idx3-ubyte': (47040016, '6bbc9ace898e44ae57da46a324031adb'),
    'train-labels-idx1-ubyte': (60008, 'a25bea736e30d166cdddb491f175f624'),
    't10k-images-idx3-ubyte': (7840016, '2646ac647ad5339dbf082846283269ea'),
    't10k-labels-idx1-ubyte': (10008, '27ae3e4e09519cfbb04c329615203637'),
}


class DataError(Exception):
    """What is wrong with data, settings, a checkpoint: a line for the user."""


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
    named on stderr and, once there is another, moved aside to `.corrupt`.

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
    if not 0 < deadline <= threading.TIMEOUT_MAX:
        raise DataError(f'the deadline must be above 0 s, not {deadline}')
    raw = pathlib.Path(folder, 'MNIST', 'raw')
    name = 'MNIST'
    try:
        images, labels, test_images, test_labels = _read_mnist(raw, deadline)
    except ConnectionError as error:
        message = (f'MNIST cannot be had: {error}. To fix it, put '
                   f'{".gz, ".join(FILES)}.gz (from '
                   f'{datasets.MNIST.mirrors[0]}) in {raw}')
        if strict:
            raise DataError(message) from error
        print(
            f'warning: {message}. Drawn digits take its place: expect other '
            'accuracies.',
            file=sys.stderr)
        name = 'drawn-digits'
        images, labels, test_images, test_labels = draw_digits()
    except OSError as error:
        raise DataError(f'cannot use the data folder {folder}: '
                        f'{error.strerror} ({error.filename})') from error
    by_class = _shuffle_by_class(labels, seed=0)  # the same for every run
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


def _read_mnist(raw, deadline):
    """Images uint8 [N, 784] and labels int64 [N] of both sets: four tensors.

    Raises:
      ConnectionError: a file has to be fetched and cannot be.
      OSError: the folder `raw` can be neither read nor created.
    """
    created = [path for path in (raw, *raw.parents) if not path.exists()]
    damaged = []
    contents = _read(raw, FILES, '', damaged)
    new = _read(raw, FILES.keys() - contents.keys(), '.gz', damaged)
    missing = FILES.keys() - contents.keys() - new.keys()
    try:
        if missing:
            # That this cannot be is better said before a download than after.
            raw.parent.parent.mkdir(parents=True, exist_ok=True)
            new |= _fetch(missing, deadline)
        if new:
            with contextlib.suppress(OSError):  # a folder only to be read
                _save(raw, new, damaged)
    finally:
        for path in created:  # deepest first; those in use by now stay
            with contextlib.suppress(OSError):
                path.rmdir()
    contents |= new
    images, labels, test_images, test_labels = (torch.frombuffer(
        bytearray(contents[name]), dtype=torch.uint8) for name in FILES)
    # After the headers, which the sums have checked with all the rest.
    return (images[16:].view(-1, SIDE * SIDE), labels[8:].long(),
            test_images[16:].view(-1, SIDE * SIDE), test_labels[8:].long())


def _read(folder, names, suffix, damaged):
    """{name: bytes} of the right ones of `names`; `suffix` is '' or '.gz'.

    The paths of wrong ones are named on stderr and go to the list `damaged`.
    """
    contents = {}
    for name in names:
        path, (size, md5) = folder / (name + suffix), FILES[name]
        content = b''
        try:
            if stat.S_ISREG(path.stat().st_mode):  # to open a fifo may hang
                with (gzip.open if suffix else open)(path, 'rb') as file:
                    content = file.read(size + 1)  # it may unpack to anything
        except FileNotFoundError:
            continue
        except (gzip.BadGzipFile, EOFError, zlib.error):
            pass
        if hashlib.md5(content, usedforsecurity=False).hexdigest() == md5:
            contents[name] = content
        else:
            damaged.append(path)
            print(
                f'warning: {path} is damaged (MD5 sum) or no regular file: '
                'not used',
                file=sys.stderr)
    return contents


def _save(folder, contents, damaged):
    """Puts files into `folder` whole, moving the `damaged` out of the way.

    A run that is killed, or another that starts now, never meets half a file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix='.mnist-', dir=folder) as staging:
        for name, content in contents.items():
            pathlib.Path(staging, name).write_bytes(content)
        for path in damaged:
            path.replace(f'{path}.corrupt')
            print(f'warning: {path} moved to {path}.corrupt', file=sys.stderr)
        for name in contents:
            pathlib.Path(staging, name).replace(folder / name)


def _fetch(names, seconds):
    """{name: unpacked bytes} of `names`; ConnectionError after `seconds`."""
    fetcher = datasets.MNIST.__new__(datasets.MNIST)  # its __init__ would read
    fetcher.mirrors = list(datasets.MNIST.mirrors)
    fetcher.resources = [(gz, md5)
                         for gz, md5 in datasets.MNIST.resources
                         if gz.removesuffix('.gz') in names]
    errors = []

    def work():
        try:
            fetcher.download()
        except Exception as error:  # of any library under torchvision
            errors.append(error)

    # torchvision waits without limit. The sockets' limit lets every mirror
    # have its turn; the thread's holds where a socket's does not (names being
    # resolved, a trickle of bytes).
    thread = threading.Thread(target=work, daemon=True)
    before = socket.getdefaulttimeout()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as staging:
        fetcher.root = staging
        socket.setdefaulttimeout(min(seconds / 4, 15))
        try:
            with contextlib.redirect_stdout(sys.stderr):  # stdout is the log
                thread.start()
                thread.join(seconds)
        finally:
            fetcher.mirrors.clear()  # so that the present one is the last
            socket.setdefaulttimeout(before)
        if thread.is_alive():
            raise ConnectionError(f'no answer within {seconds:.3g} s')
        if errors:
            raise ConnectionError(' '.join(str(errors[0]).split()))
        contents = _read(pathlib.Path(fetcher.raw_folder), names, '', [])
    if contents.keys() != names:
        raise ConnectionError('what was fetched is wrong')
    return contents


def normalise(images):
    """uint8 [B, 784] to float32 [B, 784], (x / 255 - mean) / deviation."""
    # Base plus scaled bytes: one pass, which also converts to float.
    return torch.add(torch.tensor(-MEAN / DEVIATION),
                     images,
                     alpha=1 / (255 * DEVIATION))


def denormalise(x):
    """The uint8 [B, 784] of which normalise makes x [B, 784]; else the nearest."""
    return x.mul(255 * DEVIATION).add_(255 * MEAN).round_().clamp_(0, 255).to(
        torch.uint8)


def deal(dataset, k, shards, batch_size, seed, device='cpu'):
    """Gives k Batches of a Dataset's training set, one for each MACH.

    `make_shards` says what `k` and `shards` mean. MACH i's order of images is
    drawn by `seed` * 1009 + i.

    Raises:
      DataError: as make_shards and Batches.
    """
    images = dataset.train_images.to(device)  # one copy for all
    labels = dataset.train_labels
    return [
        Batches(images, labels, indices, batch_size, seed * 1009 + i, device)
        for i, indices in enumerate(make_shards(labels, k, shards, seed))
    ]


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
    by_class = _shuffle_by_class(labels, seed)
    most = min(map(len, by_class))
    if k > most:
        raise DataError(f'{k} disjoint shards cannot each have every class: '
                        f'{most} is the largest number possible')
    # Dealing on from class to class, without going back to shard 0 for each,
    # keeps the sizes within 1 of each other.
    deck = torch.cat(by_class)
    return [deck[shard::k].sort().values for shard in range(k)]


def _shuffle_by_class(labels, seed):
    """For each class in `labels` [N], its indices in an order drawn by seed."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    mixed = labels[order]
    return [order[mixed == c] for c in range(CLASSES)]


class Batches:
    """Endless shuffled mini-batches of one shard.

    Every image comes once per epoch, in an order drawn anew for each. Where an
    epoch does not end with a batch, that batch goes on into the next epoch, so
    none is short and no image is left out.
    """

    def __init__(self, images, labels, indices, batch_size, seed, device='cpu'):
        """Images uint8 [N, 784], labels int64 [N], the shard's indices [n].

        Raises:
          DataError: batch_size is not in 1 .. n.
        """
        if not 1 <= batch_size <= len(indices):
            raise DataError(f'batch_size {batch_size} does not fit a shard of '
                            f'{len(indices)} images: 1 to {len(indices)} does')
        self._images, self._labels = images.to(device), labels.to(device)
        self._indices, self._size = indices, batch_size
        self._generator = torch.Generator().manual_seed(seed)
        self._queue = indices[:0]  # what is left of the epoch

    def next(self):
        """Gives x float32 [batch_size, 784] and y int64 [batch_size].

        x is normalised. Both are new memory at each call: they travel as
        messages, which must not change under their reader.
        """
        if len(self._queue) < self._size:
            order = torch.randperm(len(self._indices),
                                   generator=self._generator)
            self._queue = torch.cat([self._queue, self._indices[order]])
        rows, self._queue = self._queue.tensor_split([self._size])
        rows = rows.to(self._images.device)
        return (normalise(self._images.index_select(0, rows)),
                self._labels.index_select(0, rows))

    def state(self):
        """Which batches are to come, for `restore`: tensors and numbers."""
        labels = self._labels.cpu()[self._indices]
        return dict(generator=self._generator.get_state(),
                    queue=self._queue.clone(),
                    labels=zlib.crc32(labels.numpy()))

    def restore(self, state):
        """Goes on from the state of another that has the same images.

        Raises:
          DataError: it had others.
        """
        if state['labels'] != self.state()['labels']:
            raise DataError('the training images are others than before')
        self._generator.set_state(state['generator'].cpu())
        self._queue = state['queue'].cpu()


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


def _draw(count, seed, variants=60):
    """Images uint8 [count, 784] and labels int64 [count]."""
    generator = torch.Generator().manual_seed(seed)

    def normal(scale, *shape):
        return scale * torch.randn(shape, generator=generator)

    distances = _distances(variants, normal)
    labels = torch.arange(count) % CLASSES
    labels = labels[torch.randperm(count, generator=generator)]
    # A warp is a weighted sum of these fields [28, 784]: constant (shifts), x
    # and y (linear maps), and 25 smooth bumps (bends).
    bumps = functional.interpolate(torch.eye(25).view(25, 1, 5, 5),
                                   (SIDE, SIDE),
                                   mode='bicubic',
                                   align_corners=True).flatten(1)
    fields = torch.cat([torch.ones(1, SIDE * SIDE), _pixels(SIDE).T, bumps])
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
        distance = functional.grid_sample(distances[chosen * variants +
                                                    variant],
                                          grid,
                                          padding_mode='border',
                                          align_corners=True).flatten(1)
        # Ink within the pen's half-width, fading out over one pixel (2 / 28).
        pen, bright = torch.rand(2, n, 1, generator=generator)
        ink = ((.06 + .07 * pen - distance) * 14 + .5).clamp_(0, 1)
        ink *= .7 + .3 * bright
        ink += normal(.06, n, SIDE * SIDE)
        images.append(ink.clamp_(0, 1).mul_(255).to(torch.uint8))
    return torch.cat(images), labels


def _pixels(side):
    """x and y of an image's pixels, row by row, from -1 to 1: [side**2, 2]."""
    axis = torch.linspace(-1, 1, side)
    return torch.cartesian_prod(axis, axis).flip(1)


def _distances(variants, normal, side=32):
    """Per pixel its distance to the pen's path, [10 * variants, 1, side, side].

    Distances, not ink: once warped, a threshold gives any pen's thickness.
    """
    fields = []
    for ways in GLYPHS:
        for variant in range(variants):
            curves = []
            for stroke in ways[variant % len(ways)].split('|'):
                points = torch.tensor(
                    [[float(x), float(y)] for x, y in stroke.split()])
                points += normal(.4, *points.shape)
                curve = functional.interpolate(points.T[None, :, None], (1, 40),
                                               mode='bicubic',
                                               align_corners=True)
                curves.append(curve.view(2, 40).T)
            path = (torch.cat(curves) / 4.5 - 1) * torch.tensor([.5, .7])
            fields.append(torch.cdist(_pixels(side), path).amin(1))
    return torch.stack(fields).view(-1, 1, side, side)
